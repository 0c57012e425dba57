//! A job that failed or was canceled removes what it has made, and only then it has ended.
//!
//! A store that is away, a shard without a leaseholder, a node that does not answer: each keeps a removal from its end, and
//! passes. A node tries for some time, then gives the claim back for a wait that grows; whichever node matches then goes
//! on, also when all of them were restarted meanwhile. The job is `reverting` as long as that lasts, and its row says
//! why. CockroachDB tries without end; here it ends after a day, and the job says what is left. A refusal that does not
//! pass by itself, of rights say, ends it at once in the same way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgerror::{PgError, SqlState};
use tokio::time::sleep;

use crate::attend::{FIRST_WAIT, LONGEST_WAIT, may_pass};
use crate::control::CANCELED;
use crate::ledger::RegistryAway;
use crate::run::{ERRORS_MAX, LostClaim, MINE, NOTED, words};
use crate::runner::{Claimed, Jobs, Resumer};

/// A node that cannot remove everything in so long gives the claim back.
const TRY_FOR: Duration = Duration::from_secs(15);

/// What is there still after so long stays.
const REVERT_MAX: Duration = Duration::from_secs(24 * 3600);

/// When a removal is tried again that was put off: the longer it has lasted, the later.
const NEXT_TRY: &str = "clock_timestamp() + greatest(interval '2 s', least(interval '5 min',
    (clock_timestamp() - coalesce(reverting_since, clock_timestamp())) / 8))";

impl Jobs {
    pub(crate) async fn cancel(&self, claimed: &Claimed) -> anyhow::Result<()> {
        let error = PgError::new(SqlState::QUERY_CANCELED, CANCELED);
        self.begin_to_revert(claimed, "canceled", &error.into()).await
    }

    /// Writes why the job does not succeed, under a new claim of this node's: nothing that still works under the old
    /// one can write any more.
    pub(crate) async fn begin_to_revert(
        &self,
        claimed: &Claimed,
        ends_as: &str,
        error: &anyhow::Error,
    ) -> anyhow::Result<()> {
        self.begin_to_revert_of(&["running", "cancel-requested"], claimed, ends_as, error).await
    }

    /// The same of a job that has one of these statuses; the claim on any other is lost.
    pub(crate) async fn begin_to_revert_of(
        &self,
        statuses: &[&str],
        claimed: &Claimed,
        ends_as: &str,
        error: &anyhow::Error,
    ) -> anyhow::Result<()> {
        let write = "
            UPDATE registry.jobs SET status = 'reverting', ends_as = $3, error = $4, result = $5, claim_id = gen_random_uuid(),
                   reverting_since = clock_timestamp(), running_status = 'removing what the job has made', next_run = NULL,
                   unmatched_since = NULL, modified = clock_timestamp()
            WHERE id = $1 AND claim_id = $2 AND status = ANY($6) RETURNING id";
        let (words, parts) = words(error);
        tracing::warn!(job = %claimed.id, "job is {ends_as}: {words}");
        self.last_word(write, &[&claimed.id.0, &claimed.claim, &ends_as, &words, &parts, &statuses]).await?;
        Ok(())
    }

    /// Removes what the job has made, which it has been doing for so long already.
    pub(crate) async fn revert(
        &self,
        claimed: &Claimed,
        resumer: Arc<dyn Resumer>,
        since: Duration,
    ) -> anyhow::Result<()> {
        let run = self.run_of(claimed);
        let begun = Instant::now();
        let mut failing_since: Option<Instant> = None;
        let mut wait = FIRST_WAIT;
        loop {
            let error = match resumer.revert(run.clone()).await {
                Ok(Some(result)) => return self.succeed(claimed, &result).await,
                Ok(None) => return self.end(claimed, None).await,
                Err(error) if error.downcast_ref::<LostClaim>().is_some() => return Err(error),
                Err(error) => error,
            };
            tracing::info!(job = %claimed.id, "what the job has made is not removed yet: {error:#}");
            // While the registry is away nothing is tried, and nothing could be written.
            if error.downcast_ref::<RegistryAway>().is_none() {
                if !may_pass(&error) {
                    return self.stay_behind(claimed, &error).await;
                }
                if failing_since.get_or_insert_with(Instant::now).elapsed() >= TRY_FOR {
                    return self.put_off(claimed, since + begun.elapsed(), &error).await;
                }
                let say = format!("UPDATE registry.jobs SET running_status = $3 WHERE {MINE} RETURNING id");
                self.last_word(&say, &[&claimed.id.0, &claimed.claim, &not_yet(&error)]).await?;
            }
            sleep(wait).await;
            wait = LONGEST_WAIT.min(wait * 2);
        }
    }

    /// Gives the claim on a job that cannot remove what it made now back for a while, unless that has lasted too long.
    pub(crate) async fn put_off(
        &self,
        claimed: &Claimed,
        since: Duration,
        error: &anyhow::Error,
    ) -> anyhow::Result<()> {
        if since >= REVERT_MAX {
            return self.stay_behind(claimed, error).await;
        }
        let write = format!(
            "UPDATE registry.jobs SET claim_id = NULL, claim_session = NULL, coordinator_id = NULL, next_run = {NEXT_TRY},
                    running_status = $3, modified = clock_timestamp()
             WHERE {MINE} RETURNING id"
        );
        self.last_word(&write, &[&claimed.id.0, &claimed.claim, &not_yet(error)]).await?;
        self.ledger().notify().await;
        Ok(())
    }

    /// Ends a job although what it made could not be removed.
    async fn stay_behind(&self, claimed: &Claimed, error: &anyhow::Error) -> anyhow::Result<()> {
        tracing::warn!(job = %claimed.id, "what the job has made stays: {error:#}");
        let note = format!("what the job has made was not all removed: {}", words(error).0);
        self.end(claimed, Some(&note)).await
    }

    async fn end(&self, claimed: &Claimed, note: Option<&str>) -> anyhow::Result<()> {
        let write = format!(
            "UPDATE registry.jobs SET status = ends_as, running_status = NULL, sealed = NULL, next_run = NULL,
                    claim_id = NULL, claim_session = NULL, finished = clock_timestamp(), modified = clock_timestamp(),
                    execution_errors = CASE WHEN $3::text IS NULL THEN execution_errors ELSE {NOTED} END
             WHERE {MINE} RETURNING id"
        );
        self.last_word(&write, &[&claimed.id.0, &claimed.claim, &note, &ERRORS_MAX]).await?;
        self.ledger().notify().await;
        Ok(())
    }
}

fn not_yet(error: &anyhow::Error) -> String {
    format!("what the job has made is not removed yet: {}", words(error).0)
}
