//! What a statement of ours does, and the columns it answers with.
//!
//! Names, order and types of columns are CockroachDB's (v23.1).

use backup::{Outcome, Requester};
use jobs::{Birth, Job, JobId};
use pgerror::{PgError, SqlState};
use sql::{Literals, ShowJobs, Statement};
use tokio::sync::{mpsc, watch};

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value, column, spoken};
use crate::{collections, control, external, plans, progress, settings, show};

const LOCALITY: [Column; 1] = [column("locality", Kind::Text)];

const DETACHED: [Column; 1] = [column("job_id", Kind::Int8)];

const BACKUP: [Column; 6] = [
    column("job_id", Kind::Int8),
    column("status", Kind::Text),
    column("fraction_completed", Kind::Float8),
    column("rows", Kind::Int8),
    column("index_entries", Kind::Int8),
    column("bytes", Kind::Int8),
];

const JOBS: [Column; 19] = [
    column("job_id", Kind::Int8),
    column("job_type", Kind::Text),
    column("description", Kind::Text),
    column("statement", Kind::Text),
    column("user_name", Kind::Text),
    column("status", Kind::Text),
    column("running_status", Kind::Text),
    column("created", Kind::UtcTime),
    column("started", Kind::UtcTime),
    column("finished", Kind::UtcTime),
    column("modified", Kind::UtcTime),
    column("fraction_completed", Kind::Float8),
    column("error", Kind::Text),
    column("coordinator_id", Kind::Int8),
    column("trace_id", Kind::Int8),
    column("last_run", Kind::UtcTime),
    column("next_run", Kind::UtcTime),
    column("num_runs", Kind::Int8),
    column("execution_errors", Kind::Texts),
];

/// The columns of a statement's answer; none when it has no rows.
pub(crate) fn columns(statement: &Statement) -> &'static [Column] {
    match statement {
        Statement::ShowLocality => &LOCALITY,
        Statement::ShowNodes => &show::NODES,
        Statement::ExplainBackup(_) => &plans::EXPLAIN,
        Statement::ShowRanges(show) => plans::range_columns(show),
        Statement::ShowRegions { databases } => plans::region_columns(*databases),
        Statement::Backup(backup) if backup.options.detached => &DETACHED,
        Statement::Backup(_) => &BACKUP,
        Statement::Restore(restore) if restore.options.detached => &DETACHED,
        Statement::Restore(_) => &BACKUP,
        Statement::ShowBackups { .. } => &collections::BACKUPS,
        Statement::ShowBackup(show) => collections::columns(show),
        Statement::ShowJobs(_) => &JOBS,
        Statement::CreateExternalConnection { .. } | Statement::DropExternalConnection { .. } => &[],
        Statement::ControlJobs(_) | Statement::Grant(_) => &[],
        Statement::Settings(statement) => settings::columns(statement),
        Statement::ShowExternalConnections { .. } => &external::COLUMNS,
    }
}

impl Gateway {
    /// Runs one statement of ours for a client; `requester` is who that is, for statements that depend on it. A job that it
    /// makes and does not wait for is there when its `birth` says so. What it has to say before its end goes to
    /// `remarks`.
    pub(crate) async fn run(
        &self,
        statement: &Statement,
        requester: Option<&Requester>,
        birth: &Birth,
        remarks: &mpsc::Sender<PgError>,
    ) -> Result<Answer, PgError> {
        tracing::debug!("runs {}", statement.print(Literals::Hidden));
        let done = match statement {
            Statement::ShowLocality => return Ok(one_text(self.cluster.me().locality.to_string())),
            _ => {
                let requester = requester.ok_or_else(|| {
                    PgError::new(SqlState::INTERNAL_ERROR, "the server did not say who the client is")
                })?;
                let work = self.run_for(statement, requester, birth, remarks);
                match requester.statement_timeout {
                    None => work.await,
                    Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out().into())),
                }
            }
        };
        done.map_err(|error| spoken(&error))
    }

    async fn run_for(
        &self,
        statement: &Statement,
        requester: &Requester,
        birth: &Birth,
        remarks: &mpsc::Sender<PgError>,
    ) -> anyhow::Result<Answer> {
        let (tell, waited_for) = watch::channel(Vec::new());
        let on_wait = move |id| drop(tell.send_replace(vec![id]));
        match statement {
            Statement::Backup(backup) => {
                let work = self.backups.run(backup, requester, birth, &on_wait);
                progress::telling(&self.backups.jobs, requester, waited_for, remarks, work).await.map(outcome_answer)
            }
            Statement::ShowNodes => Ok(show::nodes(&self.cluster, &self.registry).await),
            Statement::ExplainBackup(backup) => plans::explain(self, backup, requester).await,
            Statement::ShowRanges(show) => plans::ranges(self, show, requester).await,
            Statement::ShowRegions { databases } => plans::regions(self, *databases).await,
            Statement::Restore(restore) => {
                let work = Box::pin(self.backups.restore(restore, requester, birth, &on_wait));
                progress::telling(&self.backups.jobs, requester, waited_for, remarks, work).await.map(outcome_answer)
            }
            Statement::ShowBackups { collection } => collections::list(self, collection, requester).await,
            Statement::ShowBackup(show) => collections::show(self, show, requester).await,
            Statement::ShowJobs(which) => self.show_jobs(which, requester, remarks).await,
            Statement::ControlJobs(statement) => control::run(self, statement, requester).await,
            Statement::Settings(statement) => settings::run(self, statement, requester).await,
            other => external::run(self, other, requester).await,
        }
    }

    async fn show_jobs(
        &self,
        which: &ShowJobs,
        requester: &Requester,
        remarks: &mpsc::Sender<PgError>,
    ) -> anyhow::Result<Answer> {
        let jobs = &self.backups.jobs;
        let found = match which {
            ShowJobs::All => jobs.list().await?,
            ShowJobs::These { jobs: named, when_complete } => {
                let found = jobs.find(&control::ids(named)).await?;
                let ids: Vec<JobId> =
                    found.iter().filter(|job| control::may_see(requester, job)).map(|job| job.id).collect();
                if *when_complete {
                    let (_named, named) = watch::channel(ids.clone());
                    progress::telling(jobs, requester, named, remarks, jobs.wait(&ids)).await?
                } else {
                    found
                }
            }
        };
        let rows = found.into_iter().filter(|job| control::may_see(requester, job)).map(job_row).collect();
        Ok(Answer::of(rows))
    }
}

/// The end of a wait is not the end of what is waited for.
pub(crate) const JOB_GOES_ON: &str = "A job that was made goes on; SHOW JOBS lists it.";

fn timed_out() -> PgError {
    // PostgreSQL's own words.
    PgError::new(SqlState::QUERY_CANCELED, "canceling statement due to statement timeout").hint(JOB_GOES_ON)
}

fn one_text(text: String) -> Answer {
    Answer::of(vec![vec![Value::Text(Some(text))]])
}

fn outcome_answer(outcome: Outcome) -> Answer {
    let notices = match &outcome {
        Outcome::Detached { notices, .. } => notices,
        Outcome::Finished(done) => &done.notices,
    };
    let notice = |text: &String| PgError::new(SqlState::SUCCESSFUL_COMPLETION, text.clone());
    let notices = notices.iter().map(notice).collect();
    Answer { notices, ..Answer::of(vec![outcome_row(outcome)]) }
}

fn outcome_row(outcome: Outcome) -> Vec<Value> {
    match outcome {
        Outcome::Detached { id, .. } => vec![Value::Int8(Some(id.0))],
        Outcome::Finished(done) => vec![
            Value::Int8(Some(done.id.0)),
            Value::Text(Some(done.status)),
            Value::Float8(Some(done.fraction_completed)),
            Value::Int8(Some(done.rows)),
            Value::Int8(Some(done.index_entries)),
            Value::Int8(Some(done.bytes)),
        ],
    }
}

fn job_row(job: Job) -> Vec<Value> {
    vec![
        Value::Int8(Some(job.id.0)),
        Value::Text(Some(job.job_type)),
        Value::Text(Some(job.description)),
        Value::Text(Some(job.statement)),
        Value::Text(Some(job.user_name)),
        Value::Text(Some(job.status)),
        Value::Text(job.running_status),
        Value::UtcTime(Some(job.created)),
        Value::UtcTime(job.started),
        Value::UtcTime(job.finished),
        Value::UtcTime(Some(job.modified)),
        Value::Float8(Some(job.fraction_completed)),
        Value::Text(Some(job.error)),
        Value::Int8(job.coordinator.map(|id| id.0.into())),
        Value::Int8(None),
        Value::UtcTime(job.last_run),
        Value::UtcTime(job.next_run),
        Value::Int8(Some(job.num_runs)),
        Value::Texts(job.execution_errors),
    ]
}
