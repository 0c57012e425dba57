//! Requests that change what becomes of jobs.

use pgerror::{PgError, SqlState};

use crate::job::{Job, JobId};
use crate::runner::Jobs;

/// What is to become of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// It stops where it is, until it is resumed.
    Pause {
        /// Why, in the user's words.
        reason: Option<String>,
    },
    /// It goes on.
    Resume,
    /// It ends, and what it made is removed.
    Cancel {
        /// Why, in the user's words.
        reason: Option<String>,
    },
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Controller<'u> {
    /// The current role of the client's session.
    pub user: &'u str,
    /// Whether that role is a superuser.
    pub superuser: bool,
}

impl Control {
    /// The states that are not changed by it, and those from which it leads to another.
    fn states(&self) -> (&'static [&'static str], &'static [&'static str], &'static str) {
        match self {
            Self::Pause { .. } => (
                &["paused", "pause-requested"],
                &["running", "pending", "reverting"],
                "cannot be requested to be paused",
            ),
            Self::Resume => (&["running", "reverting"], &["paused"], "cannot be resumed"),
            Self::Cancel { .. } => (
                &["canceled", "cancel-requested"],
                &["running", "pending", "paused"],
                "cannot be requested to be canceled",
            ),
        }
    }

    fn write(&self) -> &'static str {
        match self {
            Self::Pause { .. } => {
                "UPDATE registry.jobs SET status = 'paused', claim_id = NULL, claim_session = NULL WHERE id = $1"
            }
            Self::Resume => "UPDATE registry.jobs SET status = 'running' WHERE id = $1",
            Self::Cancel { .. } => {
                "UPDATE registry.jobs SET status = 'canceled', claim_id = NULL, error = 'job canceled by user',
                        finished = clock_timestamp() WHERE id = $1"
            }
        }
    }
}

impl Jobs {
    /// Asks this of all of these jobs, or of none; gives how many there are.
    ///
    /// # Errors
    ///
    /// One of them does not exist, is not the controller's, or is in a state in which this cannot be asked of it; the
    /// registry is not reachable.
    pub async fn control(&self, control: &Control, jobs: &[JobId], by: &Controller<'_>) -> anyhow::Result<u64> {
        let (same, from, refusal) = control.states();
        let found = self.find(jobs).await?;
        for id in jobs {
            let error = |code, message: String| Err(PgError::new(code, message).into());
            let Some(job) = found.iter().find(|job: &&Job| job.id == *id) else {
                return error(SqlState::UNCATEGORIZED, format!("job with ID {id} does not exist"));
            };
            if !by.superuser && job.user_name != by.user {
                let message = format!("user {} does not have privileges for job {id}", by.user);
                return error(SqlState::INSUFFICIENT_PRIVILEGE, message);
            }
            if !same.contains(&job.status.as_str()) && !from.contains(&job.status.as_str()) {
                return error(SqlState::UNCATEGORIZED, format!("job with status {} {refusal}", job.status));
            }
        }
        for job in found.iter().filter(|job| from.contains(&job.status.as_str())) {
            self.ledger().query(control.write(), &[&job.id.0]).await?;
        }
        self.ledger().notify().await;
        Ok(found.len() as u64)
    }
}
