//! Writing a job's row so that it is there once, and publishing it, although the answer may be lost.
//!
//! A registry that fails over takes answers with it: the row may have been written, may still be, or never will. The
//! number of the job is chosen before and is nobody else's, so the same row is written again: a try that finds the number
//! taken has found its own row, and one that finds it published has found its own work. Only when that lasts too long a
//! client is told what is not known, and how to find it out: it is never invited to make a second job.

use std::time::{Duration, Instant};

use pgerror::{PgError, SqlState};
use tokio::time::sleep;

use crate::job::{JobId, NewJob, Taken};
use crate::ledger::RegistryAway;
use crate::runner::{Jobs, Start};

/// A registry that was lost while it was told something is waited for so long: longer than a promotion takes.
pub(crate) const AWAY_MAX: Duration = Duration::from_secs(60);

/// The wait before it is asked again; finding a connection may take longer.
pub(crate) const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What the registry is told of a job of this node's.
#[derive(Clone, Copy)]
enum Deed<'d> {
    Row(&'d NewJob, &'d Start<'d>),
    Publish(&'d [JobId]),
}

impl Jobs {
    /// Writes a job's row.
    ///
    /// # Errors
    ///
    /// [`Taken`]; or the registry is not reachable. The error names the job if it may have been made all the same.
    pub(crate) async fn insert(&self, new: &NewJob, start: Start<'_>) -> anyhow::Result<()> {
        self.until_known(new.id, Deed::Row(new, &start)).await?;
        if !matches!(start, Start::Undecided(..)) {
            self.remember(new.id);
        }
        Ok(())
    }

    /// These jobs, made to be told ([`crate::Birth::Told`]), are there from now on: all of them, or none.
    ///
    /// # Errors
    ///
    /// 57014 when they were given up; or the registry is not reachable. The error names one of the jobs if they may be
    /// there all the same.
    pub async fn publish(&self, ids: &[JobId]) -> anyhow::Result<()> {
        let Some(first) = ids.first() else { return Ok(()) };
        self.until_known(*first, Deed::Publish(ids)).await?;
        ids.iter().for_each(|id| self.remember(*id));
        self.ledger().notify().await;
        Ok(())
    }

    /// Does what is there once however often it is done, until the answer is known.
    async fn until_known(&self, id: JobId, deed: Deed<'_>) -> anyhow::Result<()> {
        let mut unknown_since: Option<Instant> = None;
        loop {
            // What is not sent cannot arrive.
            let is_sent = self.ledger().session().await.is_ok();
            let may_be_done = unknown_since.is_some();
            let done = match deed {
                Deed::Row(new, start) => self.write_row_or_find_it(new, start, may_be_done).await,
                Deed::Publish(ids) => self.publish_or_find_it_done(ids, may_be_done).await,
            };
            let Err(error) = done else { return Ok(()) };
            let is_away = error.downcast_ref::<RegistryAway>().is_some();
            if !is_away || !is_sent && unknown_since.is_none() {
                return Err(error);
            }
            let since = unknown_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= AWAY_MAX {
                return Err(unknown(id).into());
            }
            tracing::info!(job = %id, "whether the job was made is not known yet: {error:#}");
            sleep(ASK_AGAIN).await;
        }
    }

    async fn write_row_or_find_it(&self, new: &NewJob, start: &Start<'_>, may_be_done: bool) -> anyhow::Result<()> {
        if self.write_row(new, start).await? {
            return Ok(());
        }
        let query = "SELECT id FROM registry.jobs WHERE id = $1";
        match may_be_done && !self.ledger().query(query, &[&new.id.0]).await?.is_empty() {
            true => Ok(()),
            false => Err(Taken.into()),
        }
    }

    async fn publish_or_find_it_done(&self, ids: &[JobId], may_be_done: bool) -> anyhow::Result<()> {
        let numbers: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let publish = "
            WITH gone AS (DELETE FROM registry.transactions WHERE job_id = ANY($1) RETURNING job_id)
            UPDATE registry.jobs SET status = 'running', modified = clock_timestamp()
            WHERE id = ANY($1) AND status = 'undecided' AND (SELECT count(*) FROM gone) = cardinality($1) RETURNING id";
        if self.ledger().query(publish, &[&numbers]).await?.len() == ids.len() {
            return Ok(());
        }
        let query = "SELECT id FROM registry.jobs WHERE id = ANY($1) AND status <> 'undecided'";
        if may_be_done && self.ledger().query(query, &[&numbers]).await?.len() == ids.len() {
            return Ok(());
        }
        let message = "the jobs of this text were given up before it came to its end";
        Err(PgError::new(SqlState::QUERY_CANCELED, message).hint("Send it again.").into())
    }
}

fn unknown(id: JobId) -> PgError {
    PgError::new(SqlState::CONNECTION_FAILURE, "the registry cannot be reached")
        .detail(format!("It was lost while job {id} was made, and whether the job is there is not known."))
        .hint(format!(
            "When the registry is back, SHOW JOB {id} tells. Run the statement again only if there is no such job."
        ))
}
