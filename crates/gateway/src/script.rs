//! A text of several statements, of which some are ours: `BEGIN; BACKUP …; COMMIT` as one Query.
//!
//! PostgreSQL would run such a text as one implicit transaction, which `BEGIN` turns into a block and `COMMIT` ends. A
//! pipeline of the extended protocol is just that, up to its Sync. So the text is taken apart ([`sql::read_mixed`]), each
//! statement of PostgreSQL's goes to the server as a Parse, Bind, Describe and Execute of this gateway's own, ours are run in
//! between as in any pipeline, and one Sync ends all: the server decides what is committed, and its ReadyForQuery is the
//! client's. Whatever fails, the rest is passed over. The client hears what a simple query is answered with; that more was
//! said on the way is hidden from it ([`crate::pipeline`]).
//!
//! The statements go one by one, each when the one before has been answered: a COPY reads what the client sends next,
//! and must not find the next statement there.
//!
//! What differs from one text for the server: a statement that does not parse fails when its turn comes and not before the
//! first, and `statement_timeout` counts anew for each.

use std::collections::VecDeque;

use bytes::Bytes;
use pgerror::PgError;
use sql::{Part, PartWork};

use crate::answer::Writer;
use crate::asking::{Order, Work};
use crate::client_frames::in_failed_transaction;
use crate::pipeline::Transaction;
use crate::requests::Arguments;
use crate::session::{Places, Session};

/// The statements of a text that have not had their turn.
pub(crate) type Script = VecDeque<Part>;

/// What a statement of ours came in, and so who waits for it.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// A Query of its own, or with others of ours.
    Query,
    /// A text of several statements; so many characters stand before it.
    Part {
        /// The characters.
        before: usize,
    },
    /// This message of the extended protocol: an Execute or a Bind.
    Message(Bytes),
}

impl Origin {
    /// Whether it stands in a pipeline, as the server sees it.
    pub(crate) fn is_extended(&self) -> bool {
        !matches!(self, Self::Query)
    }

    /// The kind of message that it fails as.
    pub(crate) fn tag(&self) -> u8 {
        if self.is_extended() { b'E' } else { b'Q' }
    }

    /// The characters before it in the client's text.
    pub(crate) fn before(&self) -> usize {
        match self {
            Self::Part { before } => *before,
            Self::Query | Self::Message(_) => 0,
        }
    }
}

impl Session {
    /// Begins a text of several statements.
    pub(crate) fn begin_script(&mut self, parts: Vec<Part>) -> Result<(), PgError> {
        let is_failed = self.pipeline.transaction() == Transaction::Failed;
        // One of PostgreSQL's may be what ends the transaction; with rows of ours in it, it is a query.
        let is_query = |part: &Part| !matches!(&part.work, PartWork::Theirs(sourced) if sourced.sources().is_empty());
        if is_failed && parts.first().is_some_and(is_query) {
            return Err(in_failed_transaction());
        }
        self.script = Some(parts.into());
        Ok(())
    }

    /// Takes the next step in such a text; false when that has to wait.
    pub(crate) fn step(&mut self) -> bool {
        let failed = self.skipping || self.pipeline.server_skips();
        if !failed && !self.is_our_turn() {
            return false;
        }
        self.from_client.pass_on(&mut self.to_server);
        let next = self.script.as_mut().filter(|_| !failed).and_then(VecDeque::pop_front);
        let Some(Part { work, before }) = next else {
            self.end_script();
            return true;
        };
        let origin = Origin::Part { before };
        let work = match work {
            PartWork::Ours(statement) => self.speech.work(vec![statement]),
            PartWork::Theirs(sourced) if sourced.sources().is_empty() => {
                self.send_part(sourced.text(), Box::new(move |at| at + before));
                return true;
            }
            PartWork::Theirs(sourced) => Work::Sourced(sourced),
        };
        self.ask(Order::new(work, origin, Arguments::default()));
        true
    }

    /// Everything has had its turn, or something has failed: the server concludes the transaction.
    fn end_script(&mut self) {
        self.script = None;
        self.skipping = false;
        // A simple query leaves no unnamed portal behind, and so does this one.
        Writer(&mut self.to_server).close_unnamed_portal();
        self.pipeline.closed_unnamed_portal();
        Writer(&mut self.to_server).sync();
        self.pipeline.forwarded(b'S');
    }

    /// Sends a statement on as a part of the pipeline; a position in its text is led back to the client's.
    pub(crate) fn send_part(&mut self, text: &str, position: Box<dyn Fn(usize) -> usize + Send>) {
        Writer(&mut self.to_server).run_text(text);
        self.pipeline.ran_text();
        self.places = Some(Places { until: b'C', position });
    }
}
