//! What a client sends, frame by frame: passed on, or ours.

use backup::Requester;
use bytes::{Bytes, BytesMut};
use jobs::Birth;
use pgerror::{PgError, SqlState};
use sql::{Settings, Sourced, Statement};

use crate::answer::{Format, Writer};
use crate::asking::{Asking, Next, Order, Question, Work};
use crate::bound::Bound;
use crate::frame::{Header, cut_string, header};
use crate::local::{Binding, Execution, ForServer, concerns, named, utf8};
use crate::pipeline::Transaction;
use crate::requests::Arguments;
use crate::rows::{Runner, Sent};
use crate::run::{JOB_GOES_ON, columns};
use crate::script::Origin;
use crate::session::{Answered, BUFFER_MAX, Outcome, Places, Running, Session};
use crate::transactions::{Behind, behind, makes_job};

/// No more than this much of a frame is looked at; a statement of ours that is longer is refused.
const LOOK_MAX: usize = 64 * 1024;

/// What becomes of a frame.
enum Judged {
    /// Not enough of it is there to tell.
    Later,
    Pass,
    /// It passes when everything before it is answered, so that what is answered next is about it.
    Alone,
    Drop,
    Ours,
    TooLong,
}

impl Session {
    /// Takes what the client has sent as far as possible.
    pub(crate) fn digest_client(&mut self) -> Result<(), PgError> {
        self.held = false;
        while self.asking.is_none()
            && self.running.is_none()
            && self.to_server.len() + self.from_client.waiting() < BUFFER_MAX
        {
            if !self.from_client.settle(&mut self.to_server) {
                break;
            }
            // A COPY in a text of several statements takes the client's frames, and nothing else does.
            if self.script.is_some() && !self.pipeline.is_reading() {
                if !self.step() {
                    break;
                }
                continue;
            }
            let Some(found) = header(self.from_client.unjudged())? else { break };
            match self.judge(found) {
                Judged::Later => break,
                Judged::Ours | Judged::Alone | Judged::TooLong if !self.is_our_turn() => {
                    self.held = true;
                    break;
                }
                Judged::Pass | Judged::Alone => {
                    if let Some(body) = self.from_client.unjudged().get(5..found.len.min(LOOK_MAX)) {
                        self.locals.superseded(found.tag, body);
                    }
                    self.client_ended |= found.tag == b'X';
                    self.pipeline.forwarded(found.tag);
                    self.from_client.pass(found.len);
                }
                Judged::Drop => self.from_client.discard(found.len),
                // Not held: a client that goes away here has not asked for anything, no more than of PostgreSQL.
                Judged::Ours if self.depends_on_what_follows(found) => break,
                Judged::Ours => {
                    let frame = self.from_client.take(found.len, &mut self.to_server);
                    if found.tag == b'Q' {
                        self.locals.superseded(found.tag, &frame.slice(5..));
                    }
                    self.ours(found.tag, &frame.slice(5..));
                }
                Judged::TooLong => {
                    self.from_client.pass_on(&mut self.to_server);
                    self.from_client.discard(found.len);
                    self.fail(found.tag, &too_long());
                }
            }
        }
        self.from_client.pass_on(&mut self.to_server);
        Ok(())
    }

    /// Ours is answered behind everything that was asked before, not in the middle of a frame of the server, and not
    /// while the client does not take its answers.
    pub(crate) fn is_our_turn(&mut self) -> bool {
        if !self.pipeline.is_quiet() && self.pipeline.take_flush() {
            self.from_client.pass_on(&mut self.to_server);
            Writer(&mut self.to_server).flush();
        }
        self.pipeline.is_quiet() && self.from_server.is_between_frames() && self.to_client.len() < BUFFER_MAX
    }

    /// A job is made in a transaction, and what has to stand alone is refused, unless it is all that happens before the Sync,
    /// which may still be under way.
    fn depends_on_what_follows(&self, found: Header) -> bool {
        let unjudged = self.from_client.unjudged();
        // Of a client that sends so much more without a Sync nothing further is expected.
        found.tag == b'E'
            && unjudged.len() < BUFFER_MAX
            && !self.pipeline.is_inside()
            && unjudged.get(found.len..).is_some_and(|rest| behind(rest) == Behind::Unknown)
            && unjudged.get(5..found.len).is_some_and(|body| {
                self.locals.runs(body, |statement| makes_job(statement) || stands_alone(statement).is_some())
            })
    }

    fn judge(&mut self, found: Header) -> Judged {
        if !self.greeted {
            // Until the server has let the client in, only its proof passes.
            return if matches!(found.tag, b'p' | b'X') { Judged::Pass } else { Judged::Later };
        }
        if !self.intercepts {
            return Judged::Pass;
        }
        match found.tag {
            b'S' => {
                self.skipping = false;
                Judged::Pass
            }
            b'X' => Judged::Pass,
            _ if self.skipping || self.pipeline.server_skips() => Judged::Drop,
            b'Q' | b'P' | b'B' | b'D' | b'E' | b'C' => {
                let looked_at = found.len.min(LOOK_MAX);
                let Some(body) = self.from_client.unjudged().get(5..looked_at) else { return Judged::Later };
                if !self.is_ours(found.tag, body) {
                    if self.locals.is_renamed(found.tag, body) { Judged::Alone } else { Judged::Pass }
                } else if found.len > LOOK_MAX {
                    Judged::TooLong
                } else {
                    Judged::Ours
                }
            }
            _ => Judged::Pass,
        }
    }

    fn is_ours(&self, tag: u8, mut body: &[u8]) -> bool {
        match tag {
            b'Q' => self.has_ours(body) || self.is_mixed(tag, body),
            b'P' => cut_string(&mut body).is_some() && self.has_ours(body),
            _ => concerns(&self.locals, tag, body),
        }
    }

    /// Whether a text is ours, or has something of ours in it. What follows its end is no part of it.
    fn has_ours(&self, mut text: &[u8]) -> bool {
        let text = cut_string(&mut text).unwrap_or(text);
        self.conforming_strings && (sql::is_ours(text) || self.can_cut(text) && sql::has_row_source(text))
    }

    /// Whether this is a text of several statements, some ours and some not, and all of it is here.
    fn is_mixed(&self, tag: u8, mut body: &[u8]) -> bool {
        let text = Some(&mut body).filter(|_| tag == b'Q' && self.conforming_strings).and_then(|body| cut_string(body));
        text.is_some_and(|text| self.can_cut(text) && sql::is_mixed(text))
    }

    /// Whether what is a sign in a text and what is part of a character can be told without knowing its encoding.
    fn can_cut(&self, text: &[u8]) -> bool {
        !self.ascii_in_characters || text.is_ascii()
    }

    /// A frame of ours, with everything before it answered.
    fn ours(&mut self, tag: u8, body: &Bytes) {
        let is_failed = self.pipeline.transaction() == Transaction::Failed;
        // One of several statements may be what ends a transaction that has failed, as long as the first is not ours.
        let is_theirs = |body: &mut &[u8]| cut_string(body).is_some_and(|text| !sql::is_ours(text));
        let is_script = self.is_mixed(tag, body) || is_failed && tag == b'Q' && is_theirs(&mut &body[..]);
        if is_failed && matches!(tag, b'Q' | b'P' | b'B' | b'E') && !is_script {
            return self.fail(tag, &in_failed_transaction());
        }
        let done = match tag {
            b'Q' if is_script => self.several(body),
            b'Q' => self.query(body),
            b'P' => self.prepare(body),
            b'B' | b'D' if named(tag, body).is_some() => {
                self.ask_for_name(tag, body);
                Ok(())
            }
            b'D' => self.locals.describe(body, &[], &mut self.to_client),
            b'C' => self.locals.close(body, &mut self.to_client),
            _ => self.execute(body),
        };
        if let Err(error) = done {
            self.fail(tag, &error);
        }
    }

    fn several(&mut self, body: &[u8]) -> Result<(), PgError> {
        let mut parts = sql::read_mixed(query_text(body)?)?;
        for part in &mut parts {
            part.work = part.work.clone().bind(&[])?;
        }
        self.begin_script(parts)
    }

    fn query(&mut self, body: &[u8]) -> Result<(), PgError> {
        let text = query_text(body)?;
        let work = if sql::is_ours(text.as_bytes()) {
            let parsed = sql::parse(text)?;
            if self.speech.takes_apart(&parsed) {
                return self.several(body);
            }
            self.speech.work(parsed.into_iter().map(|statement| statement.bind(&[])).collect::<Result<_, _>>()?)
        } else {
            Work::Sourced(Sourced::read(text)?.bind(&[])?)
        };
        self.ask(Order::new(work, Origin::Query, Arguments::default()));
        Ok(())
    }

    /// A statement of ours takes its name on the server, too, as an empty one, or as its query: so the server knows the
    /// name as taken, and as known when it is to be deallocated. Its ParseComplete is the client's.
    fn prepare(&mut self, body: &Bytes) -> Result<(), PgError> {
        let ForServer { name, text, types, position } = self.locals.parse(body, &self.speech)?;
        Writer(&mut self.to_server).parse(name, &text, &types);
        self.pipeline.forwarded(b'P');
        self.places = Some(Places { until: b'1', position });
        Ok(())
    }

    /// Whether a prepared statement still has its name is the server's to say: it may have been deallocated, and the name
    /// given to another one.
    fn ask_for_name(&mut self, tag: u8, body: &Bytes) {
        let Some(name) = named(tag, body) else { return };
        if self.locals.take_doubt(name) {
            return self.ask_aside(Asking::namesake(tag, body.clone(), name));
        }
        Writer(&mut self.to_server).describe_statement(name);
        self.pipeline.asked_for_name();
        self.asking = Some(Asking::name(tag, body.clone()));
    }

    fn ask_aside(&mut self, (asking, question): (Asking, String)) {
        Writer(&mut self.to_server).ask(&question, Some(&Arguments::default()));
        self.pipeline.asked_aside();
        self.asking = Some(asking);
    }

    /// It has its name, and its parameters have these types there.
    fn take_named(&mut self, tag: u8, body: Bytes, types: Vec<u32>) -> Result<(), PgError> {
        if tag == b'D' {
            return self.locals.describe(&body, &types, &mut self.to_client);
        }
        match self.locals.opens(&body) {
            Some(portal) => self.ask_aside(Asking::portal(body.clone(), types, portal)),
            None => return self.bind(body, &types),
        }
        Ok(())
    }

    fn bind(&mut self, body: Bytes, types: &[u32]) -> Result<(), PgError> {
        if let Binding::Rows(sourced, arguments) = self.locals.bind(&body, types, &mut self.to_client)? {
            // It was read with other rules for backslashes than the server would read it with now.
            if !self.conforming_strings && sourced.text().contains('\\') {
                return Err(needs_conforming_strings());
            }
            self.ask(Order::new(Work::Sourced(sourced), Origin::Message(body), arguments));
        }
        Ok(())
    }

    fn execute(&mut self, body: &Bytes) -> Result<(), PgError> {
        match self.locals.begin_execute(body)? {
            Execution::Run(statement, arguments) => {
                let origin = Origin::Message(body.clone());
                self.ask(Order::new(Work::Ours(vec![*statement]), origin, arguments));
                Ok(())
            }
            Execution::Ready => self.locals.finish_execute(body, None, &mut self.to_client),
        }
    }

    /// Finds out who the client is now, by a question to its own session, unless it asks for what everybody gets.
    pub(crate) fn ask(&mut self, order: Order) {
        if is_for_everybody(&order.work) {
            if matches!((&order.work, &order.origin), (Work::Ours(_), Origin::Message(_))) {
                self.pipeline.executed();
            }
            return self.start(order, None, Birth::Now);
        }
        let statements = match &order.work {
            Work::Ours(statements) => statements.as_slice(),
            Work::Sourced(_) => &[],
        };
        let is_alone = !self.pipeline.is_inside()
            && match order.origin {
                // In the simple protocol a text is a transaction of its own.
                Origin::Query => true,
                Origin::Part { .. } => false,
                Origin::Message(_) => behind(self.from_client.unjudged()) == Behind::Sync,
            };
        if let Some((statement, refusal)) = statements.iter().find_map(stands_alone)
            && (!is_alone || statements.len() > 1)
        {
            let statement = statement.clone();
            return self.refuse(statement, order.origin, refusal);
        }
        let joins = !is_alone && statements.iter().any(makes_job);
        let shard = joins.then(|| self.gateway.cluster.me().shard);
        let (asking, question) = Asking::who(order, shard);
        self.put_question(asking, question, &Arguments::default());
    }

    fn put_question(&mut self, asking: Asking, question: &str, arguments: &Arguments) {
        let extended = asking.is_extended();
        Writer(&mut self.to_server).ask(question, extended.then_some(arguments));
        self.pipeline.asked(extended);
        self.asking = Some(asking);
    }

    /// A running statement asks which jobs a query names. Meanwhile it is the server's to be cancelled.
    pub(crate) fn put(&mut self, question: Question) {
        let Some(running) = &self.running else { return };
        let extended = running.origin.is_extended();
        self.cancelable.end();
        let (text, arguments) = (question.text.clone(), question.arguments.clone());
        self.put_question(Asking::jobs(question, extended), &text, &arguments);
    }

    /// The answer is whole.
    pub(crate) fn asked(&mut self) {
        let Some(asking) = self.asking.take() else { return };
        let tag = if asking.is_extended() { b'E' } else { b'Q' };
        let done = match asking.answered() {
            Ok(Next::Ask(asking, question)) => {
                self.put_question(asking, question, &Arguments::default());
                Ok(())
            }
            Ok(Next::Start(order, requester, birth)) => {
                self.start(order, Some(*requester), birth);
                Ok(())
            }
            Ok(Next::GoOn) => {
                if let Some(running) = &self.running {
                    self.cancelable.go_on(running.cancelled.clone());
                    self.keep_awake(tag != b'Q');
                }
                Ok(())
            }
            Ok(Next::Know(tag, body, is_theirs)) => {
                if is_theirs {
                    self.locals.forget_name(tag, &body);
                    self.locals.superseded(tag, &body);
                    Writer(&mut self.to_server).message(tag, &body);
                    self.pipeline.forwarded(tag);
                } else {
                    self.ask_for_name(tag, &body);
                }
                Ok(())
            }
            Ok(Next::Take(tag, body, types)) => self.take_named(tag, body, types),
            Ok(Next::Bind(body, types)) => self.bind(body, &types),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            self.fail(tag, &error);
        }
    }

    fn start(&mut self, order: Order, requester: Option<Requester>, birth: Birth) {
        let Order { work, origin, arguments, quiet } = order;
        self.speech.quiet = quiet;
        self.keep_awake(origin.is_extended());
        let before = origin.before();
        let cancelled = self.cancelable.begin();
        let (gateway, remarks, questions) = (self.gateway.clone(), self.remarks.sender(), self.questions.clone());
        let mut runner = Runner::new(gateway.clone(), requester, remarks, questions, arguments);
        let joins = matches!(birth, Birth::With(_));
        let cancel = cancelled.clone();
        let future = Box::pin(async move {
            match work {
                Work::Sourced(sourced) => Outcome::Sent(tokio::select! {
                    sent = runner.send(&sourced, before) => sent.map(Box::new),
                    () = cancel.cancelled() => Err(cancelled_by_user()),
                }),
                Work::Ours(statements) => {
                    Outcome::Answered(gateway.run_all(statements, &mut runner, before, &birth, &cancel).await)
                }
            }
        });
        self.running = Some(Running { future, origin, joins, cancelled });
    }

    /// Refuses a statement that stands where it cannot, unless it is refused for itself before.
    fn refuse(&mut self, statement: Statement, origin: Origin, refusal: PgError) {
        self.keep_awake(origin.is_extended());
        let (gateway, cancelled) = (self.gateway.clone(), self.cancelable.begin());
        let cancel = cancelled.clone();
        let future = Box::pin(async move {
            let error = tokio::select! {
                error = gateway.refusal(&statement, refusal) => error,
                () = cancel.cancelled() => cancelled_by_user(),
            };
            Outcome::Answered(vec![(statement, Err(error))])
        });
        self.running = Some(Running { future, origin, joins: false, cancelled });
    }

    /// The server takes a session for idle whose Query it has answered, and its timeouts would end one that waits for a
    /// statement of ours. They count up to the next message of whatever kind, and this one does nothing else. In a
    /// pipeline nothing is counted.
    fn keep_awake(&mut self, extended: bool) {
        if !extended {
            Writer(&mut self.to_server).flush();
        }
    }

    /// Ends what a Query is answered with: the ReadyForQuery is the server's, which counts from then on how long the
    /// session is idle.
    fn conclude(&mut self) {
        Writer(&mut self.to_server).sync();
        self.pipeline.forwarded(b'S');
    }

    /// What ours does has come to its end.
    pub(crate) fn finish(&mut self, outcome: Outcome) {
        let Some(running) = self.end_running() else { return };
        let tag = running.origin.tag();
        let finished = match outcome {
            Outcome::Answered(answers) => {
                if running.joins {
                    self.joined.note(&answers);
                }
                self.answer(answers, &running.origin)
            }
            Outcome::Sent(sent) => sent.and_then(|sent| self.send_on(*sent, running.origin)),
        };
        if let Err(error) = finished {
            self.fail(tag, &error);
        }
    }

    fn answer(&mut self, answers: Answered, origin: &Origin) -> Result<(), PgError> {
        for (statement, answer) in answers {
            let answer = self.speech.answer(answer?);
            match origin {
                Origin::Message(body) => self.locals.finish_execute(body, Some(answer), &mut self.to_client)?,
                Origin::Query | Origin::Part { .. } => {
                    let mut out = Writer(&mut self.to_client);
                    answer.notices.iter().for_each(|notice| out.notice(notice));
                    if !columns(&statement).is_empty() {
                        out.row_description(columns(&statement), |_| Format::Text);
                    }
                    answer.rows.iter().for_each(|row| out.row(row, |_| Format::Text));
                    out.command_complete(&answer.tag(&statement));
                }
            }
        }
        if matches!(origin, Origin::Query) {
            self.conclude();
        }
        Ok(())
    }

    /// Sends the client's message on with rows in its text.
    fn send_on(&mut self, sent: Sent, origin: Origin) -> Result<(), PgError> {
        let Sent { rewritten, arguments, notices } = sent;
        self.speech.notices(notices).iter().for_each(|notice| Writer(&mut self.to_client).notice(notice));
        let mut out = Writer(&mut self.to_server);
        let until = match origin {
            Origin::Query => {
                out.query(&rewritten.text);
                self.pipeline.forwarded(b'Q');
                b'Z'
            }
            Origin::Part { before } => {
                let text = rewritten.text.clone();
                self.send_part(&text, Box::new(move |at| before + rewritten.position(at)));
                return Ok(());
            }
            Origin::Message(body) => {
                let malformed = || PgError::new(SqlState::PROTOCOL_VIOLATION, "invalid Bind message");
                let bound = Bound::read(&body).ok_or_else(malformed)?;
                out.bind_text(bound.portal, &rewritten.text, &arguments.types, bound.rest);
                self.pipeline.bound_text();
                b'2'
            }
        };
        self.places = Some(Places { until, position: Box::new(move |at| rewritten.position(at)) });
        Ok(())
    }

    /// A statement of ours fails, and with it the transaction that it stands in, as PostgreSQL does it.
    fn fail(&mut self, tag: u8, error: &PgError) {
        let mut said = BytesMut::new();
        Writer(&mut said).error(&self.speech.words(error.clone()));
        let extended = tag != b'Q';
        if extended || self.pipeline.transaction() == Transaction::Open {
            Writer(&mut self.to_server).poison(extended);
            self.pipeline.poisoned(extended, said.freeze());
            self.pipeline.take_flush();
            self.skipping = extended;
        } else {
            self.to_client.unsplit(said);
            self.conclude();
        }
    }
}

/// Whether everybody gets the same.
fn is_for_everybody(work: &Work) -> bool {
    let same = |statement: &Statement| matches!(statement, Statement::ShowLocality);
    match work {
        Work::Ours(statements) => statements.iter().all(same),
        Work::Sourced(sourced) => sourced.sources().iter().all(|source| same(&source.statement)),
    }
}

/// Why a statement cannot be part of a transaction with others, if it cannot.
fn stands_alone(statement: &Statement) -> Option<(&Statement, PgError)> {
    let refusal = match statement {
        Statement::Backup(backup) if !backup.options.detached => in_transaction(statement.tag()),
        Statement::Restore(restore) if !restore.options.detached => in_transaction(statement.tag()),
        Statement::Settings(Settings::Set { .. }) => setting_in_transaction(),
        _ => return None,
    };
    Some((statement, refusal))
}

fn query_text(body: &[u8]) -> Result<&str, PgError> {
    let text = cut_string(&mut &body[..]);
    utf8(text.ok_or_else(|| PgError::new(SqlState::PROTOCOL_VIOLATION, "invalid Query message"))?)
}

fn in_transaction(verb: &str) -> PgError {
    // CockroachDB's text.
    let message = format!("{verb} cannot be used inside a multi-statement transaction without DETACHED option");
    PgError::new(SqlState::UNCATEGORIZED, message)
        .hint("Give the option DETACHED, or end the transaction first (drivers: use autocommit).")
}

fn needs_conforming_strings() -> PgError {
    let message =
        "a text with SHOW as a row source and backslashes cannot be run while standard_conforming_strings is off";
    PgError::new(SqlState::FEATURE_NOT_SUPPORTED, message)
        .hint("Use SET standard_conforming_strings = on, or send the SHOW by itself.")
}

fn setting_in_transaction() -> PgError {
    // CockroachDB's text.
    let message = "SET CLUSTER SETTING cannot be used inside a multi-statement transaction";
    PgError::new(SqlState::ACTIVE_SQL_TRANSACTION, message)
        .hint("Send it on its own; end the transaction first (drivers: use autocommit).")
}

pub(crate) fn in_failed_transaction() -> PgError {
    // PostgreSQL's own words.
    let message = "current transaction is aborted, commands ignored until end of transaction block";
    PgError::new(SqlState::IN_FAILED_SQL_TRANSACTION, message)
}

pub(crate) fn cancelled_by_user() -> PgError {
    // PostgreSQL's own words.
    PgError::new(SqlState::QUERY_CANCELED, "canceling statement due to user request").hint(JOB_GOES_ON)
}

fn too_long() -> PgError {
    let message = format!("a statement of Backhaul may not be longer than {LOOK_MAX} bytes");
    PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
}
