//! What a job is.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Utc};
use cluster::{Filter, NodeId};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio_postgres::Row;

/// A job's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub i64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// CockroachDB counts from 2015 in steps of ten microseconds; ids of today have nineteen digits.
const EPOCH_SECONDS: u64 = 1_420_070_400;

impl JobId {
    /// A new number, which no other node makes: time above, the node below (CockroachDB's `unique_rowid`). Not from a
    /// sequence, because a registry that was promoted may count an old stretch again.
    pub fn new(node: NodeId) -> Self {
        static LAST: AtomicI64 = AtomicI64::new(0);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ticks = since.as_micros() / 10 - u128::from(EPOCH_SECONDS) * 100_000;
        let ticks = i64::try_from(ticks).unwrap_or(0);
        // Two in the same step, or a clock that went back: the next free step.
        let last = LAST.fetch_max(ticks, Ordering::SeqCst);
        let ticks = if last >= ticks { LAST.fetch_add(1, Ordering::SeqCst) + 1 } else { ticks };
        Self(ticks << 15 | i64::from(node.0 & 0x7fff))
    }

    /// Whether it was made longer ago than this, by this host's clock.
    pub(crate) fn is_older_than(self, age: Duration) -> bool {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let made = Duration::from_micros(u64::try_from(self.0 >> 15).unwrap_or(0).saturating_mul(10));
        since.saturating_sub(Duration::from_secs(EPOCH_SECONDS)).saturating_sub(made) > age
    }
}

/// Another job has the text that was to be this one's alone. No job was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another job has been made at the same moment for the same place")]
pub struct Taken;

/// A job that is to be made.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its number, so that what it makes can be named before its row is there.
    pub id: JobId,
    /// `BACKUP`, say: the name under which its resumer is registered.
    pub job_type: String,
    /// The statement, made canonical, without secrets.
    pub description: String,
    /// The statement as it was given, without secrets.
    pub statement: String,
    /// Whose job it is.
    pub user: String,
    /// Where it may run.
    pub filter: Filter,
    /// Shards whose replicas its coordinator should preferably stand beside.
    pub prefers: Vec<String>,
    /// What the resumer needs, readable by everybody who may read the registry.
    pub payload: Value,
    /// What the resumer needs and nobody else may read, encrypted.
    pub sealed: Option<Vec<u8>>,
    /// A text that no two jobs may have: a place that both would write to.
    pub exclusive: Option<String>,
    /// Where it stops; see [`Run::pausepoint`](crate::Run::pausepoint).
    pub pausepoints: Vec<String>,
}

/// A job as it is shown.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// Its type.
    pub job_type: String,
    /// The statement, made canonical.
    pub description: String,
    /// The statement as it was given.
    pub statement: String,
    /// Whose it is.
    pub user_name: String,
    /// `running`, `succeeded`, ….
    pub status: String,
    /// What it does now.
    pub running_status: Option<String>,
    /// When its row was made, by the registry's clock, as all its times are.
    pub created: DateTime<Utc>,
    /// When it was first worked on.
    pub started: Option<DateTime<Utc>>,
    /// When it came to its end.
    pub finished: Option<DateTime<Utc>>,
    /// When its row last changed.
    pub modified: DateTime<Utc>,
    /// From 0 to 1.
    pub fraction_completed: f64,
    /// Why it failed; empty if it has not.
    pub error: String,
    /// Who works on it, or did last.
    pub coordinator: Option<NodeId>,
    /// When it was last begun.
    pub last_run: Option<DateTime<Utc>>,
    /// When it will be begun again.
    pub next_run: Option<DateTime<Utc>>,
    /// How often it was begun.
    pub num_runs: i64,
    /// What went wrong on the way, the latest last.
    pub execution_errors: Vec<String>,
    /// Why it was paused, or is to be.
    pub pause_reason: Option<String>,
    /// What its resumer gave back at the end, or the parts of the error that it ended with.
    pub result: Option<Value>,
}

/// The columns that [`Job::of`] reads.
pub(crate) const COLUMNS: &str = "id, job_type, description, statement, user_name, status, running_status, created, \
    started, finished, modified, fraction_completed, error, coordinator_id, last_run, next_run, num_runs, result, execution_errors, \
    pause_reason";

impl Job {
    /// Whether the removal of what it made was put off: why it failed is known, and its end may be far.
    pub(crate) fn is_put_off(&self) -> bool {
        self.status == "reverting" && self.next_run.is_some()
    }

    /// Why it did not succeed, as the error that its resumer ended with.
    pub fn failure(&self) -> PgError {
        if self.status == "paused" {
            return self.paused();
        }
        let told = |name: &str| Some(self.result.as_ref()?.get(name)?.as_str()?.to_owned());
        let code = told("code").and_then(|code| SqlState::parse(&code)).unwrap_or(SqlState::UNCATEGORIZED);
        let message = told("message").unwrap_or_else(|| format!("job {} is {}", self.id, self.status));
        let mut error = PgError::new(code, message);
        error.detail = told("detail");
        error.hint = told("hint");
        if self.is_put_off() {
            let before = error.detail.take().map(|detail| format!("{detail} ")).unwrap_or_default();
            let id = self.id;
            error.detail = Some(format!(
                "{before}What job {id} has made could not be removed yet, and is tried again; SHOW JOB {id} tells why."
            ));
        }
        error
    }

    /// CockroachDB's texts: one for pausepoints, one for people.
    fn paused(&self) -> PgError {
        let id = self.id;
        let reason = self.pause_reason.as_deref().unwrap_or_default();
        let message = if reason.starts_with("pause point ") {
            format!(
                "pausing due to error; use RESUME JOB to try to proceed once the issue is resolved, or CANCEL JOB to \
                 rollback: {reason}"
            )
        } else if reason.is_empty() {
            format!("job {id} was paused before it completed")
        } else {
            format!("job {id} was paused before it completed with reason: {reason}")
        };
        PgError::new(SqlState::UNCATEGORIZED, message)
            .hint(format!("Use RESUME JOB {id} to go on, or CANCEL JOB {id} to remove what it has made."))
    }

    pub(crate) fn of(row: &Row) -> Self {
        Self {
            id: JobId(row.get(0)),
            job_type: row.get(1),
            description: row.get(2),
            statement: row.get(3),
            user_name: row.get(4),
            status: row.get(5),
            running_status: row.get(6),
            created: row.get(7),
            started: row.get(8),
            finished: row.get(9),
            modified: row.get(10),
            fraction_completed: row.get(11),
            error: row.get(12),
            coordinator: row.get::<_, Option<i32>>(13).map(NodeId),
            last_run: row.get(14),
            next_run: row.get(15),
            num_runs: row.get(16),
            result: row.get(17),
            execution_errors: row.get(18),
            pause_reason: row.get(19),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_grow_and_say_who_made_them() {
        let ids: Vec<JobId> = (0..1000).map(|_| JobId::new(NodeId(3))).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(ids.iter().all(|id| id.0 & 0x7fff == 3 && id.to_string().len() == 19), "{}", ids[0]);
    }
}
