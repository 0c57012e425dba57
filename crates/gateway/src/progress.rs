//! What a statement that waits has to say before its end: how far its job is.
//!
//! A client asks for it with `SET backhaul.progress = on`. What is told is what the job's row says; how long it may
//! still take is reckoned from what happened while this statement waited, by this node's own clock. How many bytes have
//! been moved, and how fast, is in what the job says that it does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use backup::Requester;
use jobs::{Job, JobId, Jobs};
use pgerror::{PgError, SqlState};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

/// Rows are looked at, and a job is spoken of, no more often.
const EVERY: Duration = Duration::from_secs(1);

/// The time left is not told before so much has been seen: the first steps of a job say little about the others.
const SEEN_MIN: Duration = Duration::from_secs(2);

/// So many remarks wait for a client that does not take them; later ones are left out.
const REMARKS_MAX: usize = 16;

/// What a session's running statement has to say.
pub(crate) struct Remarks {
    sender: mpsc::Sender<PgError>,
    receiver: mpsc::Receiver<PgError>,
    next: Option<PgError>,
}

impl Default for Remarks {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(REMARKS_MAX);
        Self { sender, receiver, next: None }
    }
}

impl Remarks {
    /// For the statement.
    pub(crate) fn sender(&self) -> mpsc::Sender<PgError> {
        self.sender.clone()
    }

    /// Returns when there is one more to be taken.
    pub(crate) async fn heard(&mut self) {
        match self.next {
            Some(_) => std::future::pending().await,
            None => self.next = self.receiver.recv().await,
        }
    }

    /// The one that was heard.
    pub(crate) fn take(&mut self) -> Option<PgError> {
        self.next.take()
    }

    /// The statement has ended, and nobody wants to know any more.
    pub(crate) fn clear(&mut self) {
        self.next = None;
        while self.receiver.try_recv().is_ok() {}
    }
}

/// Waits for `work`, and meanwhile tells how far these jobs are, if the requester wants to know. The jobs may be named
/// after it has begun.
///
/// # Errors
///
/// As the work; 22023 when the session's setting has no meaning.
pub(crate) async fn telling<T>(
    jobs: &Jobs,
    requester: &Requester,
    named: watch::Receiver<Vec<JobId>>,
    remarks: &mpsc::Sender<PgError>,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    if !requester.settings.progress()? {
        return work.await;
    }
    tokio::select! {
        done = work => done,
        never = tell(jobs, named, remarks) => match never {},
    }
}

async fn tell(jobs: &Jobs, mut named: watch::Receiver<Vec<JobId>>, remarks: &mpsc::Sender<PgError>) -> Infallible {
    let ids = named.wait_for(|ids| !ids.is_empty()).await.map(|ids| ids.clone());
    let Ok(ids) = ids else { return std::future::pending().await };
    let mut seen: BTreeMap<JobId, Seen> = BTreeMap::new();
    loop {
        // While the registry is away there is nothing to tell; whoever waits for the end finds out by itself.
        for job in jobs.find(&ids).await.unwrap_or_default() {
            if job.finished.is_none()
                && let Some(text) = seen.entry(job.id).or_default().news(&job, Instant::now())
            {
                // A client that does not take its remarks goes without.
                let _ = remarks.try_send(PgError::new(SqlState::SUCCESSFUL_COMPLETION, text));
            }
        }
        sleep(EVERY).await;
    }
}

/// What was seen of a job.
#[derive(Default)]
struct Seen {
    /// When, and how far it was: where the reckoning begins.
    begun: Option<(Instant, f64)>,
    /// What was told last: status, per cent, what it does.
    told: Option<(String, u32, Option<String>)>,
}

impl Seen {
    /// What is to be told, if anything has changed.
    fn news(&mut self, job: &Job, now: Instant) -> Option<String> {
        let fraction = job.fraction_completed.clamp(0.0, 1.0);
        // A job that was begun anew is further back.
        let begun = *self.begun.get_or_insert((now, fraction));
        if fraction < begun.1 {
            self.begun = Some((now, fraction));
        }
        let percent = (fraction * 100.0).floor() as u32;
        let current = (job.status.clone(), percent, job.running_status.clone());
        if self.told.as_ref() == Some(&current) {
            return None;
        }
        self.told = Some(current);
        let status = (job.status != "running").then(|| job.status.clone());
        let (since, from) = self.begun?;
        let (seen, gained) = (now - since, fraction - from);
        let left = (seen >= SEEN_MIN && gained > 0.0).then(|| left(seen.as_secs_f64() * (1.0 - fraction) / gained));
        let parts = [status, Some(format!("{percent}% done")), job.running_status.clone(), left];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        Some(format!("job {}: {}", job.id, parts.join(", ")))
    }
}

/// No finer than it can be known.
fn left(seconds: f64) -> String {
    let (count, unit) = match seconds {
        short if short < 100.0 => (short.max(1.0), "s"),
        middle if middle < 6000.0 => (middle / 60.0, "min"),
        long => (long / 3600.0, "h"),
    };
    format!("about {count:.0} {unit} left")
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;

    fn job(fraction_completed: f64, status: &str, doing: Option<&str>) -> Job {
        Job {
            id: JobId(7),
            job_type: "BACKUP".to_owned(),
            description: String::new(),
            statement: String::new(),
            user_name: String::new(),
            status: status.to_owned(),
            running_status: doing.map(str::to_owned),
            created: Utc::now(),
            started: None,
            finished: None,
            modified: Utc::now(),
            fraction_completed,
            error: String::new(),
            coordinator: None,
            last_run: None,
            next_run: None,
            num_runs: 1,
            execution_errors: Vec::new(),
            pause_reason: None,
            result: None,
        }
    }

    #[test]
    fn only_what_has_changed_is_told() {
        let (mut seen, begun) = (Seen::default(), Instant::now());
        let mut at = |second: u64, fraction: f64, status: &str, doing: Option<&str>| {
            seen.news(&job(fraction, status, doing), begun + Duration::from_secs(second))
        };
        assert_eq!(at(0, 0.1, "running", None).as_deref(), Some("job 7: 10% done"));
        assert_eq!(at(1, 0.1, "running", None), None);
        assert_eq!(at(1, 0.11, "running", Some("rows")).as_deref(), Some("job 7: 11% done, rows"));
        assert_eq!(at(10, 0.6, "running", None).as_deref(), Some("job 7: 60% done, about 8 s left"));
        assert_eq!(at(11, 0.6, "reverting", None).as_deref(), Some("job 7: reverting, 60% done, about 9 s left"));
        assert_eq!(at(12, 0.0, "running", None).as_deref(), Some("job 7: 0% done"));
        assert_eq!(at(22, 0.01, "running", None).as_deref(), Some("job 7: 1% done, about 16 min left"));
        assert_eq!(at(86_412, 0.5, "running", None).as_deref(), Some("job 7: 50% done, about 24 h left"));
    }
}
