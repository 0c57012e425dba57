//! What people ask of a job: to pause, to go on, to stop.
//!
//! A request changes nothing but the row's status; whoever holds the claim sees it with the next ring, stops its work
//! and writes what has become of the job. Texts and legal changes are CockroachDB's.

use std::collections::BTreeSet;

use pgerror::{PgError, SqlState};
use tokio_postgres::Row;

use crate::job::JobId;
use crate::run::FRUITLESS;
use crate::runner::Jobs;
use crate::settle::UNDECIDED;

/// What can be asked of jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Stop working, and keep what is there.
    Pause {
        /// Shown to whoever waits for the job.
        reason: Option<String>,
    },
    /// Go on where it was, on whichever node matches now.
    Resume,
    /// Stop for good, and remove what was made.
    Cancel {
        /// Shown with the job.
        reason: Option<String>,
    },
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Controller<'u> {
    /// The role.
    pub user: &'u str,
    /// Superusers control every job, others their own.
    pub superuser: bool,
}

/// What a canceled job's row says.
pub(crate) const CANCELED: &str = "job canceled by user";

impl Control {
    /// The statuses that it changes, and those in which there is nothing to be done.
    fn statuses(&self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Pause { .. } => (&["pending", "running", "reverting"], &["paused", "pause-requested"]),
            Self::Resume => (&["paused"], &["pending", "running", "reverting"]),
            Self::Cancel { .. } => (&["pending", "running", "paused"], &["canceled", "cancel-requested"]),
        }
    }

    fn refused(&self, status: &str) -> PgError {
        let message = match self {
            Self::Pause { .. } => format!("job with status {status} cannot be requested to be paused"),
            Self::Resume => format!("job with status {status} cannot be resumed"),
            Self::Cancel { .. } => format!("job with status {status} cannot be requested to be canceled"),
        };
        PgError::new(SqlState::UNCATEGORIZED, message)
    }

    /// The part of an UPDATE that it is; `$5` is the reason.
    fn change(&self) -> &'static str {
        match self {
            // A job that was put off is taken at once, so that somebody heeds it.
            Self::Pause { .. } => "status = 'pause-requested', pause_reason = $5, next_run = NULL",
            // Everything that would keep a node from taking it at once is forgotten.
            Self::Resume => {
                "status = CASE WHEN j.ends_as IS NULL THEN 'running' ELSE 'reverting' END, claim_id = NULL,
                 claim_session = NULL, coordinator_id = NULL, next_run = NULL, unmatched_since = NULL,
                 pause_reason = $5, running_status = NULL,
                 reverting_since = CASE WHEN j.ends_as IS NOT NULL THEN clock_timestamp() END"
            }
            Self::Cancel { .. } => "status = 'cancel-requested', pause_reason = $5, next_run = NULL",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Pause { reason } | Self::Cancel { reason } => reason.as_deref(),
            Self::Resume => None,
        }
    }
}

impl Jobs {
    /// Asks this of all these jobs, or of none when one of them cannot be asked. Gives how many there are; a job that is
    /// there already counts.
    ///
    /// # Errors
    ///
    /// XXUUU with CockroachDB's texts when an id is unknown or a job's status does not allow it; 42501 when a job is
    /// somebody else's; or the registry is not reachable.
    pub async fn control(&self, control: &Control, jobs: &[JobId], by: &Controller<'_>) -> anyhow::Result<u64> {
        self.settle(jobs).await?;
        let ids: Vec<i64> = jobs.iter().map(|id| id.0).collect::<BTreeSet<_>>().into_iter().collect();
        let (changes, stays) = control.statuses();
        let stays: Vec<&str> = changes.iter().chain(stays).copied().collect();
        let write = format!(
            "WITH asked AS (SELECT id, status, user_name, ends_as, error FROM registry.jobs WHERE id = ANY($1) FOR UPDATE),
             fine AS (SELECT count(*) = cardinality($1::bigint[]) AS all FROM asked
                      WHERE status = ANY($2) AND ($3 OR user_name = $4)
                        AND NOT ($7 AND status = 'paused' AND ends_as IS NOT NULL)),
             done AS (UPDATE registry.jobs j SET {}, modified = clock_timestamp()
                      FROM asked, fine WHERE j.id = asked.id AND fine.all AND asked.status = ANY($6)),
             uncounted AS (DELETE FROM registry.job_info i USING asked, fine
                           WHERE i.job_id = asked.id AND fine.all AND i.key = '{FRUITLESS}')
             SELECT id, status, user_name, error, ends_as IS NOT NULL, $5::text FROM asked ORDER BY id",
            control.change()
        );
        let is_cancel = matches!(control, Control::Cancel { .. });
        let asked = self
            .ledger()
            .query(&write, &[&ids, &stays, &by.superuser, &by.user, &control.reason(), &changes, &is_cancel])
            .await?;
        for id in &ids {
            let is_it = |row: &&Row| row.get::<_, i64>(0) == *id && row.get::<_, &str>(1) != UNDECIDED;
            let Some(row) = asked.iter().find(is_it) else {
                let message = format!("job with ID {id} does not exist");
                return Err(PgError::new(SqlState::UNCATEGORIZED, message).into());
            };
            let (status, owner): (&str, &str) = (row.get(1), row.get(2));
            if !by.superuser && owner != by.user {
                let message = format!("user {} does not have privileges for job {id}", by.user);
                return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).into());
            }
            if !stays.contains(&status) {
                return Err(control.refused(status).into());
            }
            if is_cancel && status == "paused" && row.get(4) {
                let message = format!(
                    "job {id} is paused and has non-nil FinalResumeError hence cannot be canceled and should be \
                     reverted: {}",
                    row.get::<_, &str>(3)
                );
                return Err(PgError::new(SqlState::UNCATEGORIZED, message)
                    .hint(format!("Use RESUME JOB {id}: it goes on removing what it made."))
                    .into());
            }
        }
        self.ledger().notify().await;
        Ok(ids.len() as u64)
    }
}
