//! Reading jobs, and waiting for their end.

use std::time::Duration;

use pgerror::{PgError, SqlState};
use tokio::time::timeout;
use tokio_postgres::types::ToSql;

use crate::job::{COLUMNS, Job, JobId};
use crate::runner::Jobs;
use crate::settle::UNDECIDED;

/// Waiting rows are read again this often even when no bell rang.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// A plain list leaves out what ended longer ago; CockroachDB's rule.
const LISTED_FOR: &str = "12 hours";

impl Jobs {
    /// The jobs of a plain `SHOW JOBS`: unfinished ones and those of the last hours, the unfinished first.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn list(&self) -> anyhow::Result<Vec<Job>> {
        let query = format!(
            "SELECT {COLUMNS} FROM registry.jobs
             WHERE finished IS NULL OR finished > clock_timestamp() - interval '{LISTED_FOR}'
             ORDER BY coalesce(finished, clock_timestamp()) DESC, started DESC"
        );
        self.read_settled(&query, &[]).await
    }

    /// The jobs that a query gives. What is undecided is settled first: whoever has seen a COMMIT sees its jobs, here
    /// and on every other node. What stays undecided is not there.
    async fn read_settled(&self, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> anyhow::Result<Vec<Job>> {
        let read = async || -> anyhow::Result<Vec<Job>> {
            Ok(self.ledger().query(query, parameters).await?.iter().map(Job::of).collect())
        };
        let mut found = read().await?;
        let undecided: Vec<JobId> = found.iter().filter(|job| job.status == UNDECIDED).map(|job| job.id).collect();
        if !undecided.is_empty() {
            self.settle(&undecided).await?;
            found = read().await?;
        }
        found.retain(|job| job.status != UNDECIDED);
        Ok(found)
    }

    /// These jobs, as far as they exist.
    ///
    /// # Errors
    ///
    /// XXUUU when a job that a client was told of here has lost its row; or the registry is not reachable.
    pub async fn find(&self, ids: &[JobId]) -> anyhow::Result<Vec<Job>> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let query = format!("SELECT {COLUMNS} FROM registry.jobs WHERE id = ANY($1) ORDER BY id");
        let found = self.read_settled(&query, &[&ids]).await?;
        let missing = ids.iter().map(|id| JobId(*id)).find(|id| found.iter().all(|job| job.id != *id));
        match missing.filter(|id| self.has_given(*id)) {
            Some(id) => Err(lost(id).into()),
            None => Ok(found),
        }
    }

    /// Waits until each of these jobs has ended, and gives them; ids that do not exist are left out. The bell wakes
    /// it: a wait costs nothing while nothing happens.
    ///
    /// # Errors
    ///
    /// XXUUU when a job's row was lost; the registry is not reachable for longer than a statement waits for it.
    pub async fn wait(&self, ids: &[JobId]) -> anyhow::Result<Vec<Job>> {
        self.wait_until(ids, |job| job.finished.is_some()).await
    }

    /// Waits until a job has ended or is paused.
    ///
    /// # Errors
    ///
    /// As [`Jobs::wait`].
    pub(crate) async fn wait_attached(&self, id: JobId) -> anyhow::Result<Job> {
        let found = self.wait_until(&[id], |job| job.finished.is_some() || job.status == "paused").await?;
        found.into_iter().next().ok_or_else(|| lost(id).into())
    }

    async fn wait_until(&self, ids: &[JobId], is_over: impl Fn(&Job) -> bool) -> anyhow::Result<Vec<Job>> {
        let mut bell = self.ledger().bell();
        loop {
            bell.mark_unchanged();
            let found = self.find(ids).await?;
            if found.iter().all(&is_over) {
                return Ok(found);
            }
            // The bell of a handle that is alive does not end.
            let _ = timeout(LOOK_AGAIN, bell.changed()).await;
        }
    }
}

/// CockroachDB's text, and why.
fn lost(id: JobId) -> PgError {
    PgError::new(SqlState::UNCATEGORIZED, format!("job {id} could not be loaded"))
        .detail("It was made, but the registry has moved to a server that had not received it.")
        .hint("The job may not have succeeded.")
}
