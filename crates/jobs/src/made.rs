//! Writing a job's row so that it is there once, although the answer may be lost.
//!
//! A registry that fails over takes answers with it: the row may have been written, may still be, or never will. The
//! number of the job is chosen before and is nobody else's, so the same row is written again: a try that finds the number
//! taken has found its own row. Only when that lasts too long a client is told what is not known, and how to find it out:
//! it is never invited to make a second job.

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

impl Jobs {
    /// Writes a job's row.
    ///
    /// # Errors
    ///
    /// [`Taken`]; or the registry is not reachable. The error names the job if it may have been made all the same.
    pub(crate) async fn insert(&self, new: &NewJob, start: Start<'_>) -> anyhow::Result<()> {
        let mut unknown_since: Option<Instant> = None;
        loop {
            // What is not sent cannot arrive.
            let is_sent = self.ledger().session().await.is_ok();
            let error = match self.write_row_or_find_it(new, &start, unknown_since.is_some()).await {
                Ok(()) => break,
                Err(error) => error,
            };
            let is_away = error.downcast_ref::<RegistryAway>().is_some();
            if !is_away || !is_sent && unknown_since.is_none() {
                return Err(error);
            }
            let since = unknown_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= AWAY_MAX {
                return Err(unknown(new.id).into());
            }
            tracing::info!(job = %new.id, "whether the job was made is not known yet: {error:#}");
            sleep(ASK_AGAIN).await;
        }
        if !matches!(start, Start::Undecided(..)) {
            self.remember(new.id);
        }
        Ok(())
    }

    async fn write_row_or_find_it(&self, new: &NewJob, start: &Start<'_>, may_be_there: bool) -> anyhow::Result<()> {
        if self.write_row(new, start).await? {
            return Ok(());
        }
        let query = "SELECT id FROM registry.jobs WHERE id = $1";
        match may_be_there && !self.ledger().query(query, &[&new.id.0]).await?.is_empty() {
            true => Ok(()),
            false => Err(Taken.into()),
        }
    }
}

fn unknown(id: JobId) -> PgError {
    PgError::new(SqlState::CONNECTION_FAILURE, "the registry cannot be reached")
        .detail(format!("It was lost while job {id} was made, and whether the job is there is not known."))
        .hint(format!(
            "When the registry is back, SHOW JOB {id} tells. Run the statement again only if there is no such job."
        ))
}
