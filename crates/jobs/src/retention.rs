//! Jobs that have ended leave the registry after a while (`jobs.retention_time`).
//!
//! Whatever they made stays: a backup is known by its manifest, not by its job. Every node looks, so that one that is
//! alive does; of two that look at once each leaves the other's rows alone.

use std::time::Duration;

use tokio::time::timeout;

use crate::runner::Jobs;

/// How often it is looked; more often only when the setting has changed.
const LOOK: Duration = Duration::from_secs(60);

/// So many rows go in one statement, so that none holds many locks; the next one follows at once.
const AT_ONCE: usize = 1000;

impl Jobs {
    /// Removes what is too old, for ever.
    pub async fn forget_the_ended(self) {
        let mut settings = self.settings_heard();
        loop {
            settings.mark_unchanged();
            if self.session().is_ok()
                && let Err(error) = self.remove_older_than(self.retention()).await
            {
                tracing::info!("could not remove jobs that ended long ago: {error:#}");
            }
            // The settings of a registry handle that is alive do not end.
            let _ = timeout(LOOK, settings.changed()).await;
        }
    }

    /// How long a job that has ended is kept, as this node has heard.
    pub(crate) fn retention(&self) -> Duration {
        self.settings_heard().borrow().retention()
    }

    async fn remove_older_than(&self, retention: Duration) -> anyhow::Result<()> {
        let delete = "
            DELETE FROM registry.jobs WHERE id IN (
                SELECT id FROM registry.jobs WHERE finished < clock_timestamp() - $1::float8 * interval '1 second'
                ORDER BY finished LIMIT $2 FOR UPDATE SKIP LOCKED)
            RETURNING id";
        loop {
            let limit = i64::try_from(AT_ONCE).unwrap_or(i64::MAX);
            let gone = self.ledger().query(delete, &[&retention.as_secs_f64(), &limit]).await?.len();
            if gone > 0 {
                tracing::info!(jobs = gone, "jobs that ended long ago were removed from the registry");
            }
            if gone < AT_ONCE {
                return Ok(());
            }
        }
    }
}
