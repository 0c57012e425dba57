//! Statements of ours inside transactions of the client's.
//!
//! A detached BACKUP or RESTORE is part of the transaction that it stands in: of a block, of everything up to the Sync in
//! the extended protocol, of the statements of one text in the simple one. In the first two, and in a text that has statements
//! of PostgreSQL's, too ([`crate::script`]), the transaction is PostgreSQL's: the client's own session is asked for its number ([`MARK`]), the job's row is written with it, and
//! whether it has committed is PostgreSQL's to say ([`Jobs::settle`]). So nothing here has to understand what a client
//! does with its transaction; what passes is read only to settle its jobs at once when it ends.
//!
//! A text of several statements of ours never reaches the server. Its jobs are there when all of it has succeeded.

use jobs::{Birth, JobId, Jobs, Transaction};
use pgerror::{PgError, SqlState};
use sql::Statement;
use tokio_util::sync::CancellationToken;

use crate::Gateway;
use crate::answer::{Answer, Value, spoken};
use crate::client_frames::cancelled_by_user;
use crate::frame::header;
use crate::rows::Runner;
use crate::session::Answered;

/// Asks a session for the numbers of its transaction, and of the innermost subtransaction as a distance from it.
///
/// Only something that is written gives a subtransaction a number, and it has to be possible for everybody, in read-only
/// transactions, too: an empty message for logical decoding is. Of the numbers that a session holds locks on, those of
/// the open subtransactions around it and its own, the last is its own; a lock is released when its subtransaction ends.
pub(crate) const MARK: &str = "
    SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN 'standby' ELSE (
        WITH marked AS MATERIALIZED (
            SELECT pg_catalog.pg_current_xact_id() AS top,
                   pg_catalog.pg_logical_emit_message(true, 'backhaul', '') AS place)
        SELECT pg_catalog.concat_ws(' ', top,
            (SELECT pg_catalog.max((locks.transactionid::pg_catalog.text::pg_catalog.int8
                    OPERATOR(pg_catalog.-) top::pg_catalog.text::pg_catalog.int8) OPERATOR(pg_catalog.&) 4294967295)
             FROM pg_catalog.pg_locks AS locks
             WHERE marked.place IS NOT NULL AND locks.locktype OPERATOR(pg_catalog.=) 'transactionid' AND locks.granted
               AND locks.mode OPERATOR(pg_catalog.=) 'ExclusiveLock'
               AND locks.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()),
            pg_catalog.left(pg_catalog.pg_walfile_name(place), 8))
        FROM marked) END";

/// What the client's own session says of its transaction.
///
/// # Errors
///
/// 25006 when its server is a standby, where nothing can be part of a transaction.
pub(crate) fn transaction(told: &[Option<String>], shard: &str) -> Result<Transaction, PgError> {
    let text = told.first().and_then(Option::as_deref).unwrap_or_default();
    if text == "standby" {
        let message = "a job cannot be made in a transaction on a standby";
        return Err(PgError::new(SqlState::READ_ONLY_SQL_TRANSACTION, message)
            .detail("It would be there when the transaction commits, and a standby does not know commits of its own.")
            .hint("End the transaction first (drivers: use autocommit), or connect without backhaul.target=local."));
    }
    let read = || {
        let mut words = text.split(' ');
        let (top, distance) = (words.next()?.parse::<i64>().ok()?, words.next()?.parse::<i64>().ok()?);
        let timeline = i32::from_str_radix(words.next()?, 16).ok()?;
        Some(Transaction { shard: shard.to_owned(), timeline, top, part: top + distance })
    };
    read().ok_or_else(|| PgError::new(SqlState::INTERNAL_ERROR, "the server did not say which transaction is open"))
}

/// Whether a statement makes a job that its client does not wait for.
pub(crate) fn makes_job(statement: &Statement) -> bool {
    match statement {
        Statement::Backup(backup) => backup.options.detached,
        Statement::Restore(restore) => restore.options.detached,
        _ => false,
    }
}

/// When the jobs of these statements begin to be there, outside a transaction of PostgreSQL's.
pub(crate) fn birth_of(statements: &[Statement]) -> Birth {
    if statements.len() > 1 && statements.iter().any(makes_job) { Birth::Told } else { Birth::Now }
}

/// The jobs that a text's statements have made, in order.
fn made(outcome: &Answered) -> Vec<JobId> {
    let made = outcome.iter().filter(|(statement, _)| makes_job(statement));
    made.filter_map(|(_, answer)| match answer.as_ref().ok()?.rows.first()?.first()? {
        Value::Int8(id) => id.map(JobId),
        _ => None,
    })
    .collect()
}

/// What the client sends behind an Execute, as far as it decides whether that is a transaction of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// Nothing more up to the Sync.
    Sync,
    /// Something that may be part of the same transaction.
    More,
    /// It has not come in. The server answers nothing before it, either.
    Unknown,
}

/// Reads what stands behind a frame.
pub(crate) fn behind(mut bytes: &[u8]) -> Behind {
    loop {
        match header(bytes) {
            Ok(Some(found)) if found.tag == b'S' => return Behind::Sync,
            Ok(Some(found)) if found.tag == b'C' => match bytes.get(found.len..) {
                Some(rest) => bytes = rest,
                None => return Behind::Unknown,
            },
            Ok(None) => return Behind::Unknown,
            Ok(Some(_)) | Err(_) => return Behind::More,
        }
    }
}

/// The jobs that a session has made in a transaction that it has open.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    jobs: Vec<JobId>,
    /// Something has ended inside: a savepoint was gone back to, or another transaction follows in a chain.
    touched: bool,
}

impl Joined {
    /// Statements have been run in the transaction.
    pub(crate) fn note(&mut self, outcome: &Answered) {
        self.jobs.extend(made(outcome));
    }

    /// The server has completed a command.
    pub(crate) fn completed(&mut self, tag: &[u8]) {
        self.touched |= matches!(tag, b"COMMIT" | b"ROLLBACK");
    }

    /// The server is ready for another command, or the session is over: jobs whose transaction may have ended are
    /// settled. It takes its own time; who asks for such a job meanwhile settles it.
    pub(crate) fn ready(&mut self, jobs: &Jobs, is_over: bool) {
        let touched = std::mem::take(&mut self.touched);
        if self.jobs.is_empty() || !(is_over || touched) {
            return;
        }
        let (jobs, ids) = (jobs.clone(), self.jobs.clone());
        if is_over {
            self.jobs.clear();
        }
        tokio::spawn(async move {
            if let Err(error) = jobs.settle(&ids).await {
                tracing::info!("jobs of a transaction are settled later: {error:#}");
            }
        });
    }
}

impl Gateway {
    /// Why a statement is refused that has to stand alone and does not: in CockroachDB's order, for what it says itself
    /// first.
    pub(crate) async fn refusal(&self, statement: &Statement, refusal: PgError) -> PgError {
        self.backups.check_first(statement).await.err().map_or(refusal, |error| spoken(&error))
    }

    /// Runs the statements of one text, one by one, up to the first that fails or is cancelled. `before` are the characters
    /// before their text in the client's.
    pub(crate) async fn run_all(
        &self,
        statements: Vec<Statement>,
        runner: &mut Runner,
        before: usize,
        birth: &Birth,
        cancelled: &CancellationToken,
    ) -> Answered {
        let mut outcome = Vec::with_capacity(statements.len());
        for mut statement in statements {
            let answer = tokio::select! {
                answer = runner.run(&mut statement, before, birth) => answer,
                () = cancelled.cancelled() => Err(cancelled_by_user()),
            };
            let failed = answer.is_err();
            outcome.push((statement, answer));
            if failed {
                break;
            }
        }
        if *birth == Birth::Told {
            self.conclude(&mut outcome).await;
        }
        outcome
    }

    /// The jobs of a text that has come to its end are there, all or none.
    async fn conclude(&self, outcome: &mut Answered) {
        let (ids, jobs) = (made(outcome), &self.backups.jobs);
        let failed = outcome.last().is_some_and(|(_, answer): &(_, Result<Answer, PgError>)| answer.is_err());
        if failed {
            if let Err(error) = jobs.forget(&ids).await {
                tracing::info!("jobs of a text that failed are removed later: {error:#}");
            }
            // As PostgreSQL: of a text that fails the rows are there up to the failure, and what it has done is not.
            return;
        }
        if let Err(error) = jobs.publish(&ids).await
            && let Some((_, answer)) = outcome.last_mut()
        {
            *answer = Err(spoken(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_s_word_is_read() {
        let read = |text: &str| transaction(&[Some(text.to_owned())], "s1");
        let expected = Transaction { shard: "s1".to_owned(), timeline: 16, top: 4_294_967_290, part: 4_294_967_299 };
        assert_eq!(read("4294967290 9 00000010"), Ok(expected));
        assert_eq!(read("standby").map_err(|error| error.code), Err(SqlState::READ_ONLY_SQL_TRANSACTION));
        for text in ["", "7", "7 0", "7  00000001", "x 0 00000001"] {
            assert_eq!(read(text).map_err(|error| error.code), Err(SqlState::INTERNAL_ERROR), "{text}");
        }
        assert!(transaction(&[], "s1").is_err());
    }

    #[test]
    fn an_execute_is_alone_when_a_sync_follows() {
        let frame = |tag: u8, body: &[u8]| {
            let mut frame = vec![tag, 0, 0, 0, 4 + body.len() as u8];
            frame.extend(body);
            frame
        };
        let (sync, close) = (frame(b'S', b""), frame(b'C', b"Pportal\0"));
        for (bytes, expected) in [
            (vec![], Behind::Unknown),
            (sync.clone(), Behind::Sync),
            (sync[..4].to_vec(), Behind::Unknown),
            ([close.clone(), sync.clone()].concat(), Behind::Sync),
            (close[..7].to_vec(), Behind::Unknown),
            (close, Behind::Unknown),
            (frame(b'H', b""), Behind::More),
            (frame(b'P', b"\0\0\0\0")[..6].to_vec(), Behind::More),
            (vec![b'S', 0, 0, 0, 0], Behind::More),
        ] {
            assert_eq!(behind(&bytes), expected, "{bytes:?}");
        }
    }
}
