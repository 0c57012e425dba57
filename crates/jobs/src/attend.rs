//! What is done under a claim, until the job is somebody else's, paused, or at its end.
//!
//! A run that is told to stop is dropped at its next await, and its claim is looked at again: what the row says then is
//! done. A job that fails or is canceled is `reverting` while what it made is removed ([`crate::revert`]), and only then
//! has the job ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cluster::registry::{Session, Standing};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio::time::sleep;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::gate;
use crate::run::{FRUITLESS, LostClaim, MINE, Retryable, Run};
use crate::runner::{Claimed, Duty, Held, Jobs, Resumer, TICK};

/// A job that fails in a way that may pass is begun again for so long after the first failure of a row, with waits that
/// double up to the longest. A run that brought something to its end or lasted for a while ends the row.
const RETRY_FOR: Duration = Duration::from_secs(300);
const A_WHILE: Duration = Duration::from_secs(60);

/// Runs in a row that lasted for a while and brought nothing to its end: what they wait for does not come.
const FRUITLESS_MAX: u32 = 5;

pub(crate) const FIRST_WAIT: Duration = Duration::from_millis(500);
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A job that was begun so often in a row without bearing fruit, on whichever nodes, fails: it may be what ends its
/// coordinators. Runs that end with a drain do not count, and RESUME begins the row anew.
const RUNS_MAX: i64 = 60;

/// A job that no node may run is tried again this often, and fails when there was none for so long.
const UNMATCHED_WAIT: &str = "2 seconds";
const UNMATCHED_MAX: &str = "60 seconds";

/// How often a running job's session is looked at.
const SESSION_LOOK: Duration = Duration::from_millis(100);

impl Jobs {
    /// Does what a claim obliges to, for as long as this node's session lives and nothing else is asked of the job.
    pub(crate) async fn attend(self, claimed: Claimed, held: Held, session: Uuid) {
        let job = claimed.id;
        tokio::select! {
            done = self.do_duty(&claimed) => match done {
                // Whoever is to do what comes next finds the claim with nobody at it.
                Ok(()) => {}
                Err(error) if error.downcast_ref::<LostClaim>().is_some() => {
                    tracing::info!(%job, "job is somebody else's now, or something is asked of it");
                }
                Err(error) => {
                    // The claim stays, and this is tried again with a later look at the rows.
                    tracing::warn!(%job, "nothing came of the claim on a job: {error:#}");
                    sleep(TICK).await;
                }
            },
            () = held.stop.cancelled() => tracing::info!(%job, "job is stopped here"),
            () = self.session_ends(session) => tracing::warn!(%job, "this node's session has ended; it stops the job"),
        }
        drop(held);
        self.ledger().ring();
    }

    async fn do_duty(&self, claimed: &Claimed) -> anyhow::Result<()> {
        let resumer = self.resumer(&claimed.job_type);
        let Some(resumer) = resumer else { bail!("no resumer for jobs of type {}", claimed.job_type) };
        let anywhere = match claimed.duty {
            Duty::Pause | Duty::Cancel => true,
            Duty::Run => false,
            Duty::Revert(_) => resumer.reverts_anywhere(self.run_of(claimed)).await?,
        };
        if claimed.duty == Duty::Run && self.hand_to_the_best(claimed).await? {
            return Ok(());
        }
        if !anywhere && !self.matches(&claimed.filter) {
            return match self.relocate(claimed.id, claimed.claim, &claimed.filter, &claimed.prefers).await? {
                Some(_) => Ok(()),
                None => self.postpone(claimed).await,
            };
        }
        match claimed.duty {
            Duty::Run => self.run_to_its_end(claimed, resumer).await,
            Duty::Revert(since) => self.revert(claimed, resumer, since).await,
            Duty::Pause => self.pause(claimed).await,
            Duty::Cancel => self.cancel(claimed).await,
        }
    }

    /// Nobody matches now: gives the claim back for a while, or, when that has lasted, goes on without.
    pub(crate) async fn postpone(&self, claimed: &Claimed) -> anyhow::Result<()> {
        let nobody = gate::nobody(&claimed.filter).into();
        if let Duty::Revert(since) = claimed.duty {
            return self.put_off(claimed, since, &nobody).await;
        }
        let release = format!(
            "UPDATE registry.jobs SET claim_id = NULL, claim_session = NULL, coordinator_id = NULL,
                    unmatched_since = coalesce(unmatched_since, clock_timestamp()),
                    next_run = clock_timestamp() + interval '{UNMATCHED_WAIT}',
                    running_status = 'waiting for a node that matches the locality filter'
             WHERE {MINE}
               AND coalesce(unmatched_since > clock_timestamp() - interval '{UNMATCHED_MAX}', true) RETURNING id"
        );
        match self.ledger().query(&release, &[&claimed.id.0, &claimed.claim]).await?.is_empty() {
            // Or something has been asked of it meanwhile: then that is done.
            true => self.begin_to_revert_of(&["running"], claimed, "failed", &nobody).await,
            false => Ok(()),
        }
    }

    pub(crate) fn run_of(&self, claimed: &Claimed) -> Run {
        Run {
            id: claimed.id,
            claim: claimed.claim,
            payload: claimed.payload.clone(),
            sealed: claimed.sealed.clone(),
            pausepoints: claimed.pausepoints.clone(),
            stop: Arc::default(),
            fruits: Arc::default(),
            counted: Arc::default(),
            ledger: self.ledger().clone(),
        }
    }

    async fn run_to_its_end(&self, claimed: &Claimed, resumer: Arc<dyn Resumer>) -> anyhow::Result<()> {
        let run = self.run_of(claimed);
        let mut failures = Failures::default();
        loop {
            let (begun, fruits) = (Instant::now(), run.fruits());
            if !self.begin(claimed, &run).await? {
                let message = format!("the job was begun {RUNS_MAX} times in a row, and nothing came of it");
                let error = PgError::new(SqlState::UNCATEGORIZED, message).into();
                return self.begin_to_revert(claimed, "failed", &error).await;
            }
            let error = match resumer.resume(run.clone()).await {
                Ok(result) => return self.succeed(claimed, &result).await,
                Err(error) if error.downcast_ref::<LostClaim>().is_some() => return Err(error),
                Err(error) => error,
            };
            let again = failures.after(begun.elapsed(), run.fruits() > fruits, Instant::now());
            let Some(wait) = again.filter(|_| may_pass(&error)) else {
                return self.begin_to_revert(claimed, "failed", &error).await;
            };
            tracing::warn!(job = %claimed.id, "job is tried again: {error:#}");
            if let Err(lost) = run.note(&error).await
                && lost.downcast_ref::<LostClaim>().is_some()
            {
                return Err(lost);
            }
            sleep(wait).await;
        }
    }

    /// False when it has been begun too often in a row.
    async fn begin(&self, claimed: &Claimed, run: &Run) -> anyhow::Result<bool> {
        let write = format!(
            "WITH mine AS (
                UPDATE registry.jobs SET started = coalesce(started, clock_timestamp()), last_run = clock_timestamp(),
                       num_runs = num_runs + 1, next_run = NULL, unmatched_since = NULL, modified = clock_timestamp()
                WHERE {MINE} RETURNING id)
             INSERT INTO registry.job_info AS i (job_id, key, value) SELECT id, '{FRUITLESS}', '1' FROM mine
             ON CONFLICT (job_id, key) DO UPDATE SET value = to_jsonb(i.value::bigint + 1), written = clock_timestamp()
             RETURNING value::bigint"
        );
        let rows = self.last_word(&write, &[&claimed.id.0, &claimed.claim]).await?;
        run.is_counted();
        Ok(rows.first().is_some_and(|row| row.get::<_, i64>(0) <= RUNS_MAX))
    }

    /// What the result has as its `note` is what the job's row goes on saying.
    pub(crate) async fn succeed(&self, claimed: &Claimed, result: &Value) -> anyhow::Result<()> {
        let write = format!(
            "UPDATE registry.jobs SET status = 'succeeded', fraction_completed = 1, running_status = $3::jsonb ->> 'note', result = $3,
                    sealed = NULL, error = '', ends_as = NULL, claim_id = NULL, claim_session = NULL,
                    finished = clock_timestamp(), modified = clock_timestamp()
             WHERE {MINE} RETURNING id"
        );
        self.last_word(&write, &[&claimed.id.0, &claimed.claim, result]).await?;
        tracing::info!(job = %claimed.id, "job succeeded");
        self.ledger().notify().await;
        Ok(())
    }

    async fn pause(&self, claimed: &Claimed) -> anyhow::Result<()> {
        let write = "
            UPDATE registry.jobs SET status = 'paused', claim_id = NULL, claim_session = NULL, modified = clock_timestamp(),
                   running_status = pause_reason
            WHERE id = $1 AND claim_id = $2 AND status = 'pause-requested' RETURNING id";
        self.last_word(write, &[&claimed.id.0, &claimed.claim]).await?;
        tracing::info!(job = %claimed.id, "job is paused");
        self.ledger().notify().await;
        Ok(())
    }

    /// A write that has to be made while this node's session lives, however often the registry is away meanwhile.
    pub(crate) async fn last_word(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> anyhow::Result<Vec<Row>> {
        loop {
            match self.ledger().query(statement, parameters).await {
                Ok(rows) if rows.is_empty() => return Err(LostClaim.into()),
                Ok(rows) => return Ok(rows),
                Err(error) if may_pass(&error) => {
                    tracing::info!("the registry is away: {error:#}");
                    sleep(FIRST_WAIT).await;
                }
                Err(error) => return Err(error).context("write what has become of a job"),
            }
        }
    }

    /// Returns when the session under which a claim was made can no longer be relied on.
    async fn session_ends(&self, id: Uuid) {
        let mut last: Option<Session> = None;
        loop {
            match self.registry().standing() {
                Standing::Member(session) if session.id == id => last = Some(session),
                Standing::Member(_) => return,
                // The registry is away; the session still lives for what is left of it.
                Standing::Apart { .. } => {}
            }
            if !last.as_ref().is_some_and(Session::is_valid) {
                return;
            }
            sleep(SESSION_LOOK).await;
        }
    }
}

/// The runs of a job under one claim that have failed in a way that may pass.
#[derive(Debug, Default)]
struct Failures {
    /// Since when there are nothing but short ones that brought nothing.
    since: Option<Instant>,
    /// How many of these there are.
    short: u32,
    /// How many lasted for a while and brought nothing, since the last one that did.
    fruitless: u32,
}

impl Failures {
    /// Takes note of a run that has failed at `now`. Gives how long to wait before the next one, or nothing when this was the
    /// last.
    fn after(&mut self, lasted: Duration, bore_fruit: bool, now: Instant) -> Option<Duration> {
        if bore_fruit {
            *self = Self::default();
        } else if lasted >= A_WHILE {
            *self = Self { fruitless: self.fruitless + 1, ..Self::default() };
        }
        let since = *self.since.get_or_insert(now);
        let wait = LONGEST_WAIT.min(FIRST_WAIT * 2_u32.pow(self.short.min(16)));
        self.short += 1;
        let is_over = now.duration_since(since) >= RETRY_FOR || self.fruitless >= FRUITLESS_MAX;
        (!is_over).then_some(wait)
    }
}

/// Whether what ended with this error is tried again.
pub fn may_pass(error: &anyhow::Error) -> bool {
    let lost = PgError::of(error).is_some_and(|said| said.code == SqlState::CONNECTION_FAILURE);
    lost || error.downcast_ref::<Retryable>().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_begun_again_for_as_long_as_its_runs_bring_something_or_last() {
        const SHORT: u64 = 10;
        // Runs of so many seconds each, fruitful or not, and how many there are until the last one; none is without end.
        for (what, runs, last) in [
            ("short, and nothing is finished", &[(SHORT, false)][..], Some(18)),
            ("short, and each finishes something", &[(SHORT, true)], None),
            ("short, and one now and then finishes something", &[(SHORT, false), (SHORT, false), (SHORT, true)], None),
            ("long, and nothing is finished", &[(60, false)], Some(5)),
            ("long, and each finishes something", &[(60, true)], None),
            ("one of them is long", &[(SHORT, false), (60, false)], Some(10)),
            ("long, but something is finished in a short one", &[(60, false), (60, false), (SHORT, true)], None),
            ("a little too short", &[(59, false)], Some(6)),
        ] {
            let (mut failures, mut now) = (Failures::default(), Instant::now());
            let mut is_over = |(lasted, bore_fruit): &(u64, bool)| {
                let lasted = Duration::from_secs(*lasted);
                now += lasted;
                let wait = failures.after(lasted, *bore_fruit, now);
                now += wait.unwrap_or_default();
                wait.is_none()
            };
            let ended = runs.iter().cycle().take(1000).position(&mut is_over).map(|before| before + 1);
            assert_eq!(ended, last, "{what}");
        }
    }

    #[test]
    fn the_waits_between_runs_grow_until_one_brings_something_or_lasts() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        for (lasted, bore_fruit, wait_ms) in [
            (1, false, 500),
            (1, false, 1000),
            (1, false, 2000),
            (1, true, 500),
            (1, false, 1000),
            (60, false, 500),
            (1, false, 1000),
            (1, false, 2000),
            (1, false, 4000),
            (1, false, 8000),
            (1, false, 10_000),
            (1, false, 10_000),
        ] {
            let wait = failures.after(Duration::from_secs(lasted), bore_fruit, now);
            assert_eq!(wait, Some(Duration::from_millis(wait_ms)), "{lasted} {bore_fruit}");
        }
    }
}
