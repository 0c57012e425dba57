//! What a statement of ours does, and the columns it answers with.
//!
//! Names, order and types of columns are CockroachDB's (v23.1).

use backup::{Outcome, Requester};
use jobs::{Job, JobId};
use pgerror::{PgError, SqlState};
use sql::{Number, ShowJobs, Statement};

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value, spoken};
use crate::{collections, external, show};

const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind }
}

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
        Statement::Backup(backup) if backup.options.detached => &DETACHED,
        Statement::Backup(_) => &BACKUP,
        Statement::Restore(restore) if restore.options.detached => &DETACHED,
        Statement::Restore(_) => &BACKUP,
        Statement::ShowBackups { .. } => &collections::BACKUPS,
        Statement::ShowBackup(show) => collections::columns(show),
        Statement::ShowJobs(_) => &JOBS,
        Statement::CreateExternalConnection { .. } | Statement::DropExternalConnection { .. } => &[],
        Statement::ShowExternalConnections { .. } => &external::COLUMNS,
    }
}

impl Gateway {
    /// Runs one statement of ours for a client; `requester` is who that is, for statements that depend on it.
    pub(crate) async fn run(&self, statement: &Statement, requester: Option<&Requester>) -> Result<Answer, PgError> {
        let done = match statement {
            Statement::ShowLocality => return Ok(one_text(self.cluster.me().locality.to_string())),
            Statement::ShowNodes => return Ok(show::nodes(&self.cluster, &self.registry).await),
            _ => {
                let requester = requester.ok_or_else(|| {
                    PgError::new(SqlState::INTERNAL_ERROR, "the server did not say who the client is")
                })?;
                let work = self.run_for(statement, requester);
                match requester.statement_timeout {
                    None => work.await,
                    Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out().into())),
                }
            }
        };
        done.map_err(|error| spoken(&error))
    }

    async fn run_for(&self, statement: &Statement, requester: &Requester) -> anyhow::Result<Answer> {
        match statement {
            Statement::Backup(backup) => {
                let outcome = self.backups.run(backup, requester).await?;
                Ok(outcome_answer(outcome))
            }
            Statement::Restore(restore) => Ok(outcome_answer(self.backups.restore(restore, requester).await?)),
            Statement::ShowBackups { collection } => collections::list(self, collection, requester).await,
            Statement::ShowBackup(show) => collections::show(self, show, requester).await,
            Statement::ShowJobs(which) => self.show_jobs(which, requester).await,
            other => external::run(self, other, requester).await,
        }
    }

    /// A superuser sees all jobs, anybody else their own.
    async fn show_jobs(&self, which: &ShowJobs, requester: &Requester) -> anyhow::Result<Answer> {
        let may_see = |job: &Job| requester.superuser || job.user_name == requester.user;
        let jobs = match which {
            ShowJobs::All => self.backups.jobs.list().await?,
            ShowJobs::These { ids, when_complete } => {
                let number = |id: &Number| match id {
                    Number::Literal(id) => Some(JobId(*id)),
                    Number::Null | Number::Placeholder(_) => None,
                };
                let ids: Vec<JobId> = ids.iter().filter_map(number).collect();
                let found = self.backups.jobs.find(&ids).await?;
                let ids: Vec<JobId> = found.iter().filter(|job| may_see(job)).map(|job| job.id).collect();
                if *when_complete { self.backups.jobs.wait(&ids).await? } else { self.backups.jobs.find(&ids).await? }
            }
        };
        let rows = jobs.into_iter().filter(may_see).map(job_row).collect();
        Ok(Answer { rows, notices: Vec::new() })
    }
}

fn timed_out() -> PgError {
    // PostgreSQL's own words.
    PgError::new(SqlState::QUERY_CANCELED, "canceling statement due to statement timeout")
        .hint("A job that was made goes on; SHOW JOBS lists it.")
}

fn one_text(text: String) -> Answer {
    Answer { rows: vec![vec![Value::Text(Some(text))]], notices: Vec::new() }
}

fn outcome_answer(outcome: Outcome) -> Answer {
    let notices = match &outcome {
        Outcome::Detached(_) => Vec::new(),
        Outcome::Finished(done) => {
            let notice = |text: &String| PgError::new(SqlState::SUCCESSFUL_COMPLETION, text.clone());
            done.notices.iter().map(notice).collect()
        }
    };
    Answer { rows: vec![outcome_row(outcome)], notices }
}

fn outcome_row(outcome: Outcome) -> Vec<Value> {
    match outcome {
        Outcome::Detached(id) => vec![Value::Int8(Some(id.0))],
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
