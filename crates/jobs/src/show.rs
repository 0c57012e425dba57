//! Reading jobs, and waiting for their end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pgerror::{PgError, SqlState};
use tokio::time::{sleep, timeout};
use tokio_postgres::types::ToSql;

use crate::job::{COLUMNS, Job, JobId};
use crate::ledger::RegistryAway;
use crate::made::{ASK_AGAIN, AWAY_MAX};
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

    /// Waits until each of these jobs, which have been found before, has ended, and gives them. The bell wakes it: a wait
    /// costs nothing while nothing happens. A failover of the registry is waited out.
    ///
    /// # Errors
    ///
    /// XXUUU when a job's row was lost; 08006 when the registry is not reachable for longer than a failover takes.
    pub async fn wait(&self, ids: &[JobId]) -> anyhow::Result<Vec<Job>> {
        self.wait_until(ids, |job| job.finished.is_some()).await
    }

    /// Waits until a job has ended or is paused, or has failed and cannot remove now what it made.
    ///
    /// # Errors
    ///
    /// As [`Jobs::wait`].
    pub(crate) async fn wait_attached(&self, id: JobId) -> anyhow::Result<Job> {
        let is_over = |job: &Job| job.finished.is_some() || job.status == "paused" || job.is_put_off();
        self.wait_until(&[id], is_over).await?.pop().ok_or_else(|| lost(id).into())
    }

    async fn wait_until(&self, ids: &[JobId], is_over: impl Fn(&Job) -> bool) -> anyhow::Result<Vec<Job>> {
        let mut bell = self.ledger().bell();
        let mut open = ids.to_vec();
        // One that has ended may be forgotten while others are waited for.
        let mut over: BTreeMap<JobId, Job> = BTreeMap::new();
        let mut away_since: Option<Instant> = None;
        loop {
            bell.mark_unchanged();
            let found = match self.find(&open).await {
                Err(error) if error.downcast_ref::<RegistryAway>().is_some() => {
                    if away_since.get_or_insert_with(Instant::now).elapsed() >= AWAY_MAX {
                        return Err(unheard(&open).into());
                    }
                    tracing::info!("the registry is away, and a client waits on for the end of a job: {error:#}");
                    sleep(ASK_AGAIN).await;
                    continue;
                }
                found => found?,
            };
            away_since = None;
            if let Some(id) = open.iter().find(|id| found.iter().all(|job| job.id != **id)) {
                return Err(lost(*id).into());
            }
            over.extend(found.into_iter().filter(&is_over).map(|job| (job.id, job)));
            open.retain(|id| !over.contains_key(id));
            if open.is_empty() {
                return Ok(over.into_values().collect());
            }
            // The bell of a handle that is alive does not end.
            let _ = timeout(LOOK_AGAIN, bell.changed()).await;
        }
    }
}

/// The end of a wait is not the end of what is waited for.
fn unheard(ids: &[JobId]) -> PgError {
    let error = PgError::new(SqlState::CONNECTION_FAILURE, "the registry cannot be reached");
    match ids {
        [id] => error
            .detail(format!("Job {id} goes on; only this statement's wait for it has ended."))
            .hint(format!("Use SHOW JOB WHEN COMPLETE {id} to wait on; BACKUP or RESTORE would make another job.")),
        _ => error
            .detail("The jobs go on; only this statement's wait for them has ended.")
            .hint("Use SHOW JOBS WHEN COMPLETE to wait on; BACKUP or RESTORE would make another job."),
    }
}

/// CockroachDB's text, and why.
fn lost(id: JobId) -> PgError {
    PgError::new(SqlState::UNCATEGORIZED, format!("job {id} could not be loaded"))
        .detail("It was made, but the registry has moved to a server that had not received it.")
        .hint("The job may not have succeeded.")
}
