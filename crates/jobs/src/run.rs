//! A job at work: what its resumer may do to the row, always through the claim.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cluster::NodeId;
use pgerror::{PgError, SqlState};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::job::JobId;
use crate::ledger::Ledger;

/// The claim is somebody else's now: whoever worked under it stops, silently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the claim on the job is lost")]
pub struct LostClaim;

/// A failure after which the job may be tried again. A context in a chain; the reason is below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retryable;

impl fmt::Display for Retryable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this may succeed when it is tried again")
    }
}

/// Whose row it is: `$1` the job, `$2` the claim. A job that is reverting is worked on like one that runs.
pub(crate) const MINE: &str = "id = $1 AND claim_id = $2 AND status IN ('running', 'reverting')";

/// Under which key it stands how many runs in a row have brought nothing.
pub(crate) const FRUITLESS: &str = "fruitless";

/// How long a run stays at a pausepoint that holds it.
const HOLD_MAX: Duration = Duration::from_secs(600);

/// How often it looks whether it may go on.
const HOLD_LOOK: Duration = Duration::from_millis(50);

/// The session of a node that is gone has ended by then, if sessions live as long as they do by default; and how often
/// that is asked.
const SESSIONS_DEADLINE: Duration = Duration::from_secs(20);
const SESSIONS_LOOK: Duration = Duration::from_millis(200);

/// So many of the latest errors of a job are shown; CockroachDB's number.
pub(crate) const ERRORS_MAX: i32 = 3;

/// The errors of a row and one more, `$3`; the oldest goes when there are more than `$4`.
pub(crate) const NOTED: &str = "(execution_errors || (to_char(clock_timestamp() AT TIME ZONE 'UTC',
    'YYYY-MM-DD HH24:MI:SS') || ' ' || $3))[greatest(1, cardinality(execution_errors) + 2 - $4):]";

/// A job under this node's claim.
#[derive(Clone)]
pub struct Run {
    /// The job.
    pub id: JobId,
    /// The claim; names what this run makes.
    pub claim: Uuid,
    /// As the job was made.
    pub payload: Value,
    /// As the job was made.
    pub sealed: Option<Vec<u8>>,
    pub(crate) pausepoints: Vec<String>,
    /// Whoever stops at a pausepoint has it.
    pub(crate) stop: Arc<Mutex<()>>,
    /// Counts what has come to its end.
    pub(crate) fruits: Arc<AtomicU64>,
    /// Whether the job counts this run as one that has brought nothing yet.
    pub(crate) counted: Arc<AtomicBool>,
    pub(crate) ledger: Ledger,
}

impl Run {
    /// What was kept under `key` by this run or an earlier one.
    ///
    /// # Errors
    ///
    /// The registry is not reachable, or holds something else there.
    pub async fn kept<T: DeserializeOwned>(&self, key: &str) -> anyhow::Result<Option<T>> {
        let query = "SELECT value FROM registry.job_info WHERE job_id = $1 AND key = $2";
        let rows = self.ledger.query(query, &[&self.id.0, &key]).await?;
        Ok(rows.first().map(|row| serde_json::from_value(row.get(0))).transpose()?)
    }

    /// All that was kept under keys that begin with `prefix`, by key.
    ///
    /// # Errors
    ///
    /// As [`Run::kept`].
    pub async fn kept_under<T: DeserializeOwned>(&self, prefix: &str) -> anyhow::Result<Vec<T>> {
        let query = "SELECT value FROM registry.job_info WHERE job_id = $1 AND starts_with(key, $2) ORDER BY key";
        let rows = self.ledger.query(query, &[&self.id.0, &prefix]).await?;
        rows.iter().map(|row| Ok(serde_json::from_value(row.get(0))?)).collect()
    }

    /// Keeps `value` under `key` for later runs.
    ///
    /// # Errors
    ///
    /// [`LostClaim`], or the registry is not reachable.
    pub async fn keep(&self, key: &str, value: &(impl Serialize + Sync)) -> anyhow::Result<()> {
        let write = format!(
            "WITH mine AS (SELECT id FROM registry.jobs WHERE {MINE} FOR UPDATE)
             INSERT INTO registry.job_info (job_id, key, value) SELECT id, $3, $4 FROM mine
             ON CONFLICT (job_id, key) DO UPDATE SET value = excluded.value, written = clock_timestamp()
             RETURNING job_id"
        );
        let value = serde_json::to_value(value)?;
        self.guarded(&write, &[&self.id.0, &self.claim, &key, &value]).await
    }

    /// Forgets everything under keys that begin with `prefix`.
    ///
    /// # Errors
    ///
    /// As [`Run::keep`].
    pub async fn forget(&self, prefix: &str) -> anyhow::Result<()> {
        let delete = format!(
            "WITH mine AS (SELECT id FROM registry.jobs WHERE {MINE} FOR UPDATE),
             gone AS (DELETE FROM registry.job_info USING mine WHERE job_id = id AND starts_with(key, $3))
             SELECT id FROM mine"
        );
        self.guarded(&delete, &[&self.id.0, &self.claim, &prefix]).await
    }

    /// Says that a part of the work is done for good. A job whose long runs bring nothing of the kind is given up, and so
    /// is one that is begun over and over without.
    ///
    /// # Errors
    ///
    /// As [`Run::keep`].
    pub async fn bears_fruit(&self) -> anyhow::Result<()> {
        self.fruits.fetch_add(1, Ordering::Relaxed);
        match self.counted.swap(false, Ordering::Relaxed) {
            true => self.forget(FRUITLESS).await,
            false => Ok(()),
        }
    }

    /// The job has been begun, and counts that until something comes of it.
    pub(crate) fn is_counted(&self) {
        self.counted.store(true, Ordering::Relaxed);
    }

    pub(crate) fn fruits(&self) -> u64 {
        self.fruits.load(Ordering::Relaxed)
    }

    /// Shows how far it is, and what it does now.
    ///
    /// # Errors
    ///
    /// As [`Run::keep`].
    pub async fn progress(&self, fraction: f64, doing: &str) -> anyhow::Result<()> {
        let write = format!(
            "UPDATE registry.jobs SET fraction_completed = $3, running_status = $4, modified = clock_timestamp()
             WHERE {MINE} RETURNING id"
        );
        self.guarded(&write, &[&self.id.0, &self.claim, &fraction, &doing]).await
    }

    /// Describes the job anew, without secrets: what was not known when it was made is now.
    ///
    /// # Errors
    ///
    /// As [`Run::keep`].
    pub async fn describe(&self, description: &str) -> anyhow::Result<()> {
        let write = format!("UPDATE registry.jobs SET description = $3 WHERE {MINE} RETURNING id");
        self.guarded(&write, &[&self.id.0, &self.claim, &description]).await
    }

    /// Shows that something went wrong that the job goes on after: in `execution_errors`, and as what it does now.
    ///
    /// # Errors
    ///
    /// As [`Run::keep`].
    pub async fn note(&self, error: &anyhow::Error) -> anyhow::Result<()> {
        let write = format!(
            "UPDATE registry.jobs SET running_status = 'trying again: ' || $3, modified = clock_timestamp(),
                    execution_errors = {NOTED}
             WHERE {MINE} RETURNING id"
        );
        let (words, _) = words(error);
        self.guarded(&write, &[&self.id.0, &self.claim, &words, &ERRORS_MAX]).await
    }

    /// Whether the claim still is this run's, asked of the registry.
    ///
    /// # Errors
    ///
    /// As [`Run::keep`].
    pub async fn check(&self) -> anyhow::Result<()> {
        self.guarded(&format!("SELECT id FROM registry.jobs WHERE {MINE}"), &[&self.id.0, &self.claim]).await
    }

    /// Waits until none of these nodes has a session any more.
    ///
    /// # Errors
    ///
    /// 08006 when one of them renews its session: it works, and only cannot be reached from here. Or the registry is not
    /// reachable.
    pub async fn sessions_have_ended(&self, nodes: &[NodeId]) -> anyhow::Result<()> {
        let nodes: Vec<i32> = nodes.iter().map(|node| node.0).collect();
        let live = "SELECT node_id FROM registry.sessions WHERE node_id = ANY($1) AND expires_at > clock_timestamp()";
        let begun = tokio::time::Instant::now();
        loop {
            let rows = self.ledger.query(live, &[&nodes]).await?;
            let Some(row) = rows.first() else { return Ok(()) };
            if begun.elapsed() >= SESSIONS_DEADLINE {
                let message = format!("node {} cannot be reached, and has a session", row.get::<_, i32>(0));
                return Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into());
            }
            tokio::time::sleep(SESSIONS_LOOK).await;
        }
    }

    /// What the job's row says that it is now; none when there is no row any more.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn status(&self) -> anyhow::Result<Option<String>> {
        let rows = self.ledger.query("SELECT status FROM registry.jobs WHERE id = $1", &[&self.id.0]).await?;
        Ok(rows.first().map(|row| row.get(0)))
    }

    /// A place between two steps where a job can be made to stop, once, by its pausepoints. `name` pauses it there:
    /// `RESUME JOB` goes on, and the next run passes. `name:hold` keeps it there as it is, with all that it holds, until
    /// the text is taken out of the job's row, or for ten minutes. Where parts of the job come by side by side, the first
    /// stops there, and the others stop with it.
    ///
    /// # Errors
    ///
    /// [`LostClaim`] when it pauses; or as [`Run::keep`].
    pub async fn pausepoint(&self, name: &str) -> anyhow::Result<()> {
        let Some(asked) = self.pausepoints.iter().find(|asked| asked.split(':').next() == Some(name)) else {
            return Ok(());
        };
        let _stop = self.stop.lock().await;
        let key = format!("pausepoint/{name}");
        if self.kept::<bool>(&key).await?.is_some() {
            return Ok(());
        }
        self.keep(&key, &true).await?;
        if asked.ends_with(":hold") {
            return tokio::time::timeout(HOLD_MAX, self.hold_at(name, asked)).await.unwrap_or(Ok(()));
        }
        let write =
            format!("UPDATE registry.jobs SET status = 'pause-requested', pause_reason = $3 WHERE {MINE} RETURNING id");
        self.guarded(&write, &[&self.id.0, &self.claim, &format!("pause point \"{name}\" hit")]).await?;
        Err(LostClaim.into())
    }

    async fn hold_at(&self, name: &str, asked: &str) -> anyhow::Result<()> {
        let shown = format!("holding at pause point \"{name}\"");
        let show = format!("UPDATE registry.jobs SET running_status = $3 WHERE {MINE} RETURNING id");
        self.guarded(&show, &[&self.id.0, &self.claim, &shown]).await?;
        self.ledger.notify().await;
        let look = format!("SELECT $3 = ANY(pausepoints) FROM registry.jobs WHERE {MINE}");
        loop {
            let rows = self.ledger.query(&look, &[&self.id.0, &self.claim, &asked]).await?;
            match rows.first().map(|row| row.get::<_, bool>(0)) {
                None => return Err(LostClaim.into()),
                Some(false) => return Ok(()),
                Some(true) => tokio::time::sleep(HOLD_LOOK).await,
            }
        }
    }

    async fn guarded(
        &self,
        statement: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> anyhow::Result<()> {
        match self.ledger.query(statement, parameters).await?.is_empty() {
            true => Err(LostClaim.into()),
            false => Ok(()),
        }
    }
}

/// What a job's row says of an error, as one text and in parts: the words for a client, or where to find the others.
pub(crate) fn words(error: &anyhow::Error) -> (String, Value) {
    let spoken = PgError::of(error).cloned().unwrap_or_else(|| {
        let id = Uuid::new_v4();
        tracing::error!(%id, "a job failed: {error:#}");
        PgError::internal(id)
    });
    let parts = json!({
        "code": spoken.code.as_str(), "message": spoken.message, "detail": spoken.detail, "hint": spoken.hint,
    });
    let mut text = spoken.message;
    for part in [spoken.detail, spoken.hint.filter(|_| spoken.code == SqlState::INTERNAL_ERROR)].into_iter().flatten() {
        text.push_str("; ");
        text.push_str(&part);
    }
    (text, parts)
}
