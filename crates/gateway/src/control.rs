//! PAUSE, RESUME and CANCEL of jobs: whose, which, and how many.

use std::collections::BTreeSet;

use backup::{JOB_TYPE, RESTORE_TYPE, Requester};
use jobs::{Control, Controller, Job, JobId};
use sql::{ControlJobs, ControlVerb, JobKind, Number, Selection, Text};

use crate::Gateway;
use crate::answer::Answer;

/// `ALL … JOBS` is tried so often, when jobs come to their ends between being listed and being asked; then the error is
/// the statement's.
const TRIES: usize = 3;

/// Runs one; its answer counts the jobs, those included that are in the wanted state already.
pub(crate) async fn run(gateway: &Gateway, statement: &ControlJobs, requester: &Requester) -> anyhow::Result<Answer> {
    let jobs = &gateway.backups.jobs;
    let reason = statement.reason.as_ref().and_then(Text::literal).map(str::to_owned);
    let control = match statement.verb {
        ControlVerb::Pause => Control::Pause { reason },
        ControlVerb::Resume => Control::Resume,
        ControlVerb::Cancel => Control::Cancel { reason: None },
    };
    let by = Controller { user: &requester.user, superuser: requester.superuser };
    let mut tries = TRIES;
    let count = loop {
        let chosen = match &statement.jobs {
            Selection::All(kind) => all(gateway, *kind, statement.verb, requester).await?,
            named => ids(named),
        };
        if chosen.is_empty() {
            break 0;
        }
        tries -= 1;
        match jobs.control(&control, &chosen, &by).await {
            Ok(count) => break count,
            Err(_) if matches!(statement.jobs, Selection::All(_)) && tries > 0 => {}
            Err(error) => return Err(error),
        }
    };
    Ok(Answer { rows: Vec::new(), notices: Vec::new(), count: Some(count) })
}

/// The ids that a statement names, each once. NULL is nobody's.
pub(crate) fn ids(selection: &Selection) -> Vec<JobId> {
    let named: &[Number] = match selection {
        Selection::Ids(ids) => ids,
        // A query has been answered before the statement is run.
        Selection::Query(_) | Selection::All(_) => &[],
    };
    let ids = named.iter().filter_map(|id| match id {
        Number::Literal(id) => Some(JobId(*id)),
        Number::Null | Number::Placeholder(_) => None,
    });
    ids.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Whether a client may see a job: a superuser sees all, anybody else their own.
pub(crate) fn may_see(requester: &Requester, job: &Job) -> bool {
    requester.superuser || job.user_name == requester.user
}

/// The jobs of a kind that the requester may see, and that this can be asked of.
async fn all(gateway: &Gateway, kind: JobKind, verb: ControlVerb, requester: &Requester) -> anyhow::Result<Vec<JobId>> {
    let job_type = match kind {
        JobKind::Backup => JOB_TYPE,
        JobKind::Restore => RESTORE_TYPE,
    };
    // CockroachDB's choice.
    let states: &[&str] = match verb {
        ControlVerb::Pause => &["pending", "running", "reverting"],
        ControlVerb::Resume => &["paused"],
        ControlVerb::Cancel => &["pending", "running", "paused"],
    };
    let chosen =
        |job: &Job| job.job_type == job_type && states.contains(&job.status.as_str()) && may_see(requester, job);
    Ok(gateway.backups.jobs.list().await?.iter().filter(|job| chosen(job)).map(|job| job.id).collect())
}
