//! What the server still owes the client, in order.
//!
//! The relay passes frames on without waiting, so at any moment several answers may be on their way. Before this
//! gateway answers a statement of its own, everything the client asked for earlier must have been answered; and a
//! statement of ours that fails inside a transaction must fail that transaction too. Both need to know which answer of
//! the server belongs to which question. That is all this module does; it holds no bytes and does no I/O.
//!
//! **Failing a transaction.** PostgreSQL aborts a transaction only for an error of its own. So a statement that fails
//! here is followed by one to the server that is certain to fail there (the *poison*), and the server's error is
//! replaced by ours on its way to the client.

use std::collections::VecDeque;

use bytes::Bytes;

/// A text that no PostgreSQL accepts. It appears in the server's log in place of the client's statement, which may
/// hold secrets.
pub(crate) const POISON: &str = "BACKHAUL: a statement of this transaction failed in the gateway";

/// A question that the server has not answered whole.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Slot {
    /// Answered by the one frame (or one of the frames) that its kind ends with.
    Step(Step),
    /// Answered up to and including ReadyForQuery: Query, FunctionCall, Sync.
    Cycle(Cycle),
    /// A Parse that is to fail; its error is replaced by these bytes.
    PoisonParse(Bytes),
    /// A Query that is to fail; its error is replaced by these bytes.
    PoisonQuery(Bytes),
    /// A step that the client has not asked for, and whose end it does not get.
    Hidden(Step),
    /// A question of this gateway's own; the server's answer is not the client's. In the extended protocol it ends
    /// with the last of three CloseCompletes.
    Ask(Ask),
    /// The client's end of COPY data. The server answers it only as part of the COPY.
    CopyEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Parse,
    Bind,
    Describe,
    Execute,
    Close,
}

/// What is still to come of the answer to a question of this gateway's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Ready,
    Closes(u8),
    /// The description of a statement: its parameters, and then its columns or none.
    Columns,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cycle {
    Query,
    Sync,
}

/// What to do with a frame of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The client gets it.
    Pass,
    /// The client gets these bytes in its place.
    Replace(Bytes),
    /// Part of the answer to a question of this gateway's own: nobody gets it.
    Swallow,
    /// A row of that answer, or the types in it.
    Told,
    /// The last frame of that answer.
    Asked,
}

/// The transaction status: that of the last ReadyForQuery, but for one that has failed and that a pipeline has ended since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Transaction {
    /// None is open.
    #[default]
    Idle,
    /// One is open; or there was one that had failed, and what a pipeline has open since is told at its Sync.
    Open,
    /// One is open and has failed.
    Failed,
}

impl Transaction {
    fn of(status: u8) -> Self {
        match status {
            b'T' => Self::Open,
            b'E' => Self::Failed,
            _ => Self::Idle,
        }
    }
}

/// The book of questions and answers of one session.
#[derive(Debug, Default)]
pub(crate) struct Pipeline {
    slots: VecDeque<Slot>,
    transaction: Transaction,
    /// Something was sent that the server may keep back until a Flush or a Sync.
    unflushed: bool,
    /// Something was executed, and no Sync came behind it: an implicit transaction is open, if no other is.
    begun: bool,
    /// After an error the server passes over everything up to the next Sync, and answers none of it.
    server_skips: bool,
    /// The server reads COPY data, and ignores Sync meanwhile.
    copy_in: bool,
}

impl Pipeline {
    /// The transaction status after all that has been answered.
    pub(crate) fn transaction(&self) -> Transaction {
        self.transaction
    }

    /// Whether what is executed next, by the client's frames up to here, is not the first of its transaction.
    pub(crate) fn is_inside(&self) -> bool {
        self.begun || self.transaction != Transaction::Idle
    }

    /// Whether the server has answered everything.
    pub(crate) fn is_quiet(&self) -> bool {
        // The end of COPY data that the server had stopped reading is never answered.
        self.slots.iter().all(|slot| *slot == Slot::CopyEnd)
    }

    /// Whether the server passes over everything up to the next Sync, as this gateway then has to.
    pub(crate) fn server_skips(&self) -> bool {
        self.server_skips
    }

    /// Whether a Flush has to be sent before the server will answer all; asked once, it counts as sent.
    pub(crate) fn take_flush(&mut self) -> bool {
        std::mem::take(&mut self.unflushed)
    }

    /// Takes note of a frame of the client that is passed on.
    pub(crate) fn forwarded(&mut self, tag: u8) {
        match tag {
            b'E' => self.begun = true,
            b'S' | b'Q' | b'F' => self.begun = false,
            _ => {}
        }
        let slot = match tag {
            b'P' => Slot::Step(Step::Parse),
            b'B' => Slot::Step(Step::Bind),
            b'D' => Slot::Step(Step::Describe),
            b'E' => Slot::Step(Step::Execute),
            b'C' => Slot::Step(Step::Close),
            b'Q' | b'F' => Slot::Cycle(Cycle::Query),
            b'S' => Slot::Cycle(Cycle::Sync),
            b'H' => {
                self.unflushed = false;
                return;
            }
            b'c' | b'f' if self.copy_in => {
                self.copy_in = false;
                // A Flush that came in between was read as a part of the data.
                self.unflushed = true;
                return;
            }
            b'c' | b'f' => Slot::CopyEnd,
            _ => return,
        };
        self.push(slot);
    }

    /// Takes note of a poison that is sent: a Parse in the extended protocol, else a Query.
    pub(crate) fn poisoned(&mut self, extended: bool, replacement: Bytes) {
        self.push(if extended { Slot::PoisonParse(replacement) } else { Slot::PoisonQuery(replacement) });
    }

    /// Takes note that something was executed of which the server does not know.
    pub(crate) fn executed(&mut self) {
        self.begun = true;
    }

    /// Takes note of a question of this gateway's own that is sent.
    pub(crate) fn asked(&mut self, extended: bool) {
        self.push(Slot::Ask(if extended { Ask::Closes(3) } else { Ask::Ready }));
        self.begun |= extended;
        self.unflushed = false;
    }

    /// Takes note of a question in the extended protocol that is no part of what the client does.
    pub(crate) fn asked_aside(&mut self) {
        let begun = self.begun;
        self.asked(true);
        self.begun = begun;
    }

    /// Takes note of a question for the description of a statement that is sent.
    pub(crate) fn asked_for_name(&mut self) {
        self.push(Slot::Ask(Ask::Columns));
        self.unflushed = false;
    }

    /// Takes note that a text was parsed and bound under a name of this gateway's own: only the BindComplete is the
    /// client's.
    pub(crate) fn bound_text(&mut self) {
        let hidden = [Slot::Hidden(Step::Close), Slot::Hidden(Step::Parse)];
        for slot in hidden.into_iter().chain([Slot::Step(Step::Bind), Slot::Hidden(Step::Close)]) {
            self.push(slot);
        }
    }

    /// Takes note that a statement was run in a pipeline that its client does not know of: what is left of the answer is that
    /// of a simple query, without its ReadyForQuery.
    pub(crate) fn ran_text(&mut self) {
        self.begun = true;
        for step in [Step::Close, Step::Parse, Step::Bind, Step::Describe, Step::Close] {
            self.push(Slot::Hidden(step));
        }
        self.push(Slot::Step(Step::Execute));
    }

    /// Takes note that the unnamed portal is closed behind such statements, which their client does not know of, either.
    pub(crate) fn closed_unnamed_portal(&mut self) {
        self.push(Slot::Hidden(Step::Close));
    }

    /// Whether the server reads COPY data.
    pub(crate) fn is_reading(&self) -> bool {
        self.copy_in
    }

    /// Whether the answer to a question of this gateway's own comes next.
    pub(crate) fn is_asking(&self) -> bool {
        matches!(self.slots.front(), Some(Slot::Ask(_)))
    }

    fn push(&mut self, slot: Slot) {
        let is_sync = slot == Slot::Cycle(Cycle::Sync);
        if self.server_skips && !is_sync || self.copy_in && is_sync {
            return;
        }
        self.server_skips = false;
        match slot {
            Slot::Step(_) | Slot::Hidden(_) | Slot::PoisonParse(_) => self.unflushed = true,
            Slot::Cycle(_) | Slot::PoisonQuery(_) => self.unflushed = false,
            Slot::CopyEnd | Slot::Ask(_) => {}
        }
        self.slots.push_back(slot);
    }

    /// Takes note of a frame of the server and says what becomes of it. `status` is the byte after the header.
    pub(crate) fn received(&mut self, tag: u8, status: Option<u8>) -> Verdict {
        while self.slots.front() == Some(&Slot::CopyEnd) {
            self.slots.pop_front();
        }
        if let Some(verdict) = self.answer_of_ask(tag, status) {
            return verdict;
        }
        match (tag, self.slots.front()) {
            (b'Z', _) => {
                self.transaction = Transaction::of(status.unwrap_or(b'I'));
                self.copy_in = false;
                self.server_skips = false;
                self.end_cycle();
            }
            (b'E', _) => return self.failed(),
            (b'1', Some(Slot::Hidden(Step::Parse)))
            | (b'2', Some(Slot::Hidden(Step::Bind)))
            | (b'3', Some(Slot::Hidden(Step::Close)))
            | (b'n', Some(Slot::Hidden(Step::Describe))) => {
                self.slots.pop_front();
                return Verdict::Swallow;
            }
            (b'G', _) => self.begin_copy_in(),
            (b'1', Some(Slot::Step(Step::Parse)))
            | (b'2', Some(Slot::Step(Step::Bind)))
            | (b'3', Some(Slot::Step(Step::Close)))
            | (b'T' | b'n', Some(Slot::Step(Step::Describe)))
            // The rows that follow are the client's.
            | (b'T', Some(Slot::Hidden(Step::Describe))) => {
                self.slots.pop_front();
            }
            (b'C' | b'I' | b's', Some(Slot::Step(Step::Execute))) => {
                // In a transaction that has failed nothing is completed but what ends it or goes back to a savepoint. An
                // empty statement is answered there, too, with a message of its own.
                if tag == b'C' && self.transaction == Transaction::Failed {
                    self.transaction = Transaction::Open;
                }
                self.copy_in = false;
                self.slots.pop_front();
            }
            _ => {}
        }
        Verdict::Pass
    }

    fn answer_of_ask(&mut self, tag: u8, status: Option<u8>) -> Option<Verdict> {
        let Some(Slot::Ask(ask)) = self.slots.front_mut() else { return None };
        let is_last = match (tag, ask) {
            (b'E', Ask::Ready) => {
                // The client is told what the server says, and the cycle ends as one of its own.
                self.slots[0] = Slot::Cycle(Cycle::Query);
                return Some(Verdict::Pass);
            }
            (b'E', Ask::Closes(_) | Ask::Columns) => {
                self.slots[0] = Slot::Step(Step::Execute);
                return None;
            }
            (b'D', Ask::Ready | Ask::Closes(_)) | (b't', Ask::Columns) => return Some(Verdict::Told),
            (b'T' | b'n', Ask::Columns) => true,
            (b'Z', Ask::Ready) => {
                self.transaction = Transaction::of(status.unwrap_or(b'I'));
                true
            }
            (b'3', Ask::Closes(left)) => {
                *left -= 1;
                *left == 0
            }
            (b'1' | b'2' | b'T' | b'C', _) => false,
            // Notices, notifications and parameters come when they come.
            _ => return Some(Verdict::Pass),
        };
        if is_last {
            self.slots.pop_front();
        }
        Some(if is_last { Verdict::Asked } else { Verdict::Swallow })
    }

    fn end_cycle(&mut self) {
        // Whatever stood before belongs to the same cycle and will not be answered any more.
        while let Some(slot) = self.slots.pop_front() {
            if matches!(slot, Slot::Cycle(_) | Slot::PoisonQuery(_)) {
                break;
            }
        }
    }

    fn failed(&mut self) -> Verdict {
        self.copy_in = false;
        let verdict = match self.slots.front_mut() {
            Some(slot @ Slot::PoisonQuery(_)) => {
                let Slot::PoisonQuery(bytes) = std::mem::replace(slot, Slot::Cycle(Cycle::Query)) else {
                    return Verdict::Pass;
                };
                return Verdict::Replace(bytes);
            }
            Some(Slot::PoisonParse(bytes)) => Verdict::Replace(std::mem::take(bytes)),
            Some(Slot::Cycle(_)) | None => return Verdict::Pass,
            Some(Slot::Step(_) | Slot::Hidden(_) | Slot::CopyEnd | Slot::Ask(_)) => Verdict::Pass,
        };
        // The server answers nothing more up to the next Sync, a Query in between included.
        let sync = self.slots.iter().position(|slot| *slot == Slot::Cycle(Cycle::Sync));
        self.slots.drain(..sync.unwrap_or(self.slots.len()));
        self.server_skips = sync.is_none();
        verdict
    }

    /// The server asks for COPY data, and ignores every Sync up to their end; drivers do send one right after Execute.
    fn begin_copy_in(&mut self) {
        let end = self.slots.iter().position(|slot| *slot == Slot::CopyEnd);
        let mut index = 0;
        self.slots.retain(|slot| {
            let inside = index > 0 && end.is_none_or(|end| index <= end);
            index += 1;
            !(inside && matches!(slot, Slot::CopyEnd | Slot::Cycle(Cycle::Sync)))
        });
        self.copy_in = end.is_none();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays frames: upper part of a step is the client's (`>`), lower part the server's (`<`); Z carries its status.
    fn play(script: &str) -> Pipeline {
        let mut pipeline = Pipeline::default();
        for step in script.split_ascii_whitespace() {
            let (direction, frame) = step.split_at(1);
            let tag = frame.as_bytes()[0];
            match direction {
                ">" => pipeline.forwarded(tag),
                _ => assert_eq!(
                    pipeline.received(tag, frame.as_bytes().get(1).copied()),
                    Verdict::Pass,
                    "{script}: {step}"
                ),
            }
        }
        pipeline
    }

    #[test]
    fn the_answer_to_a_question_of_our_own_is_swallowed() {
        use Verdict::{Asked, Pass, Swallow, Told};
        let simple = |pipeline: &mut Pipeline| pipeline.asked(false);
        let extended = |pipeline: &mut Pipeline| pipeline.asked(true);
        let bound = [(b'3', Swallow), (b'1', Swallow), (b'2', Pass), (b'3', Swallow)];
        let ran = [(b'3', Swallow), (b'1', Swallow), (b'2', Swallow)];
        for (ask, script) in [
            (
                &simple as &dyn Fn(&mut Pipeline),
                vec![(b'T', Swallow), (b'N', Pass), (b'D', Told), (b'C', Swallow), (b'Z', Asked)],
            ),
            (
                &extended,
                vec![
                    (b'3', Swallow),
                    (b'1', Swallow),
                    (b'2', Swallow),
                    (b'D', Told),
                    (b'C', Swallow),
                    (b'3', Swallow),
                    (b'3', Asked),
                ],
            ),
            (&simple, vec![(b'E', Pass), (b'Z', Pass)]),
            (&Pipeline::asked_for_name, vec![(b't', Told), (b'N', Pass), (b'n', Asked)]),
            (&Pipeline::asked_for_name, vec![(b't', Told), (b'T', Asked)]),
            (&Pipeline::asked_for_name, vec![(b'E', Pass)]),
            (&Pipeline::bound_text, bound.to_vec()),
            (&Pipeline::ran_text, [&ran, &[(b'T', Pass), (b'3', Swallow), (b'D', Pass), (b'C', Pass)][..]].concat()),
            (&Pipeline::ran_text, [&ran, &[(b'n', Swallow), (b'3', Swallow), (b'C', Pass)][..]].concat()),
            (&Pipeline::ran_text, [&ran[..2], &[(b'E', Pass)]].concat()),
            (&Pipeline::bound_text, [&bound[..1], &[(b'E', Pass)]].concat()),
            (&Pipeline::bound_text, [&bound[..2], &[(b'E', Pass)]].concat()),
        ] {
            let mut pipeline = Pipeline::default();
            ask(&mut pipeline);
            for (tag, verdict) in script {
                assert!(!pipeline.is_quiet());
                assert_eq!(pipeline.received(tag, Some(b'I')), verdict, "{}", tag.escape_ascii());
            }
            assert!(pipeline.is_quiet());
        }
        let mut failed = Pipeline::default();
        failed.asked(true);
        assert_eq!(failed.received(b'E', None), Pass);
        assert!(failed.is_quiet() && failed.server_skips());
    }

    #[test]
    fn every_question_is_quiet_once_it_is_answered() {
        for (script, quiet) in [
            ("", true),
            (">Q", false),
            (">Q <T <D <C", false),
            (">Q <T <D <C <ZI", true),
            (">Q <E <ZI", true),
            (">F <V <ZT", true),
            (">P >B >D >E >S <1 <2 <T <D <C", false),
            (">P >B >D >E >S <1 <2 <T <D <C <ZI", true),
            (">P >D >S <1 <t <T <ZI", true),
            (">P >D <1 <t", false),
            (">B >E >C >S <2 <s <3 <ZI", true),
            // An error answers for all up to its Sync, and for nothing behind it.
            (">P >B >E >S >P >B >E >S <E <ZI", false),
            (">P >B >E >S >P >B >E >S <E <ZI <1 <2 <C <ZI", true),
            // What follows an error without a Sync is passed over by the server.
            (">P <E >B >E", true),
            (">P <E >B >E >S <ZI", true),
            // Notices, notifications and parameters belong to nobody.
            (">P >S <N <A <S <1 <ZI", true),
            // COPY in both protocols, with the Sync that a driver sends too early.
            (">Q <G >d >c <C <ZI", true),
            (">B >E >S <2 <G >d >c >S <C <ZI", true),
            (">B >E >S >d >c >S <2 <G <C <ZI", true),
            (">B >E >S <2 <G >d <E >c >S <ZI", true),
            (">B >E >S <2 <H <d <c <C <ZI", true),
            // The rest of a COPY that has failed is nobody's.
            (">Q <G >d <E <ZI >d >c", true),
            (">Q <G >d <E <ZI >d >c >Q", false),
            (">Q <G >d <E <ZI >d >c >Q <C <ZI", true),
            // A COPY that fails before it reads, with its Sync already sent.
            (">B >E >S <2 <G <E <ZI >Q", false),
            (">B >E >S <2 <G <E <ZI >Q <C <ZI", true),
        ] {
            assert_eq!(play(script).is_quiet(), quiet, "{script}");
        }
    }

    #[test]
    fn the_transaction_is_what_the_server_last_said() {
        for (script, transaction) in [
            ("", Transaction::Idle),
            (">Q <C <ZT", Transaction::Open),
            (">Q <C <ZT >Q <E <ZE", Transaction::Failed),
            (">Q <C <ZT >Q <C <ZI", Transaction::Idle),
            // What is completed after a failure has ended the transaction, or gone back in it.
            (">Q <E <ZE >P >B >E <1 <2", Transaction::Failed),
            (">Q <E <ZE >P >B >E <1 <2 <C", Transaction::Open),
            (">Q <E <ZE >P >B >E >S <1 <2 <C <ZI", Transaction::Idle),
            (">Q <E <ZE >P >B >E >P >B >E >S <1 <2 <C <E <ZI", Transaction::Idle),
            (">Q <E <ZE >E <I", Transaction::Failed),
            (">Q <E <ZE >P <E", Transaction::Failed),
            (">Q <E <ZE >Q <C", Transaction::Failed),
        ] {
            assert_eq!(play(script).transaction(), transaction, "{script}");
        }
    }

    #[test]
    fn what_is_executed_before_a_sync_is_one_transaction() {
        for (script, inside) in [
            ("", false),
            (">P >B >D", false),
            (">P >B >E", true),
            (">P >B >E >S", false),
            (">P >B >E <1 <2 <E >S <ZI", false),
            (">Q <C <ZI", false),
            (">Q <C <ZT", true),
            (">B >E >S <2 <C <ZT", true),
            (">Q <C <ZT >Q <E <ZE", true),
            // A block that a pipeline has begun, of which no ReadyForQuery has told yet.
            (">P >B >E <1 <2 <C >P >B", true),
        ] {
            assert_eq!(play(script).is_inside(), inside, "{script}");
        }
        let mut ours = Pipeline::default();
        ours.executed();
        assert!(ours.is_inside());
        ours.forwarded(b'S');
        assert!(!ours.is_inside());
        let mut asked = Pipeline::default();
        asked.asked(false);
        assert!(!asked.is_inside());
        asked.asked_aside();
        assert!(!asked.is_inside());
        asked.asked(true);
        assert!(asked.is_inside());
    }

    #[test]
    fn a_flush_is_needed_once_after_steps_without_a_sync() {
        for (script, needed) in [
            ("", false),
            (">P", true),
            (">P >H", false),
            (">P >S", false),
            (">P >S >B", true),
            (">B >E >H <2 <G >d >c", true),
        ] {
            let mut pipeline = play(script);
            assert_eq!((pipeline.take_flush(), pipeline.take_flush()), (needed, false), "{script}");
        }
    }

    #[test]
    fn the_error_of_a_poison_is_replaced_by_ours() {
        let ours = Bytes::from_static(b"ours");
        let mut simple = play(">Q <C <ZT");
        simple.poisoned(false, ours.clone());
        assert_eq!(simple.received(b'N', None), Verdict::Pass);
        assert_eq!(simple.received(b'E', None), Verdict::Replace(ours.clone()));
        assert_eq!(simple.received(b'Z', Some(b'E')), Verdict::Pass);
        assert_eq!((simple.is_quiet(), simple.transaction()), (true, Transaction::Failed));

        let mut extended = play(">P <1");
        extended.poisoned(true, ours.clone());
        assert_eq!(extended.received(b'E', None), Verdict::Replace(ours));
        extended.forwarded(b'B');
        assert!(extended.is_quiet(), "the server passes over a Bind behind the error");
        extended.forwarded(b'S');
        assert_eq!(extended.received(b'Z', Some(b'I')), Verdict::Pass);
        assert!(extended.is_quiet());
    }
}
