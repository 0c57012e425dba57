//! Which jobs this node works on: claiming, checking, running, ending.

use std::collections::{BTreeMap, HashSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cluster::registry::{Registry, Session, Standing};
use cluster::service::Boxed;
use cluster::{Cluster, Filter, NodeId};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::gate;
use crate::job::{Job, JobId, NewJob};
use crate::ledger::Ledger;
use crate::run::{LostClaim, Retryable, Run, words};

/// Without a bell, rows are looked at this often: claims of the dead are found by it.
const TICK: Duration = Duration::from_secs(1);

/// So many unclaimed jobs are taken at once; the next look takes more.
const CLAIMS_AT_ONCE: i64 = 10;

/// A job that fails in a way that may pass is begun again for so long after the first failure of a row, with waits that
/// double up to the longest. A run that lasted for a while ends the row.
const RETRY_FOR: Duration = Duration::from_secs(300);
const A_WHILE: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A job that was begun so often, on whichever nodes, fails: it may be what ends its coordinators.
const RUNS_MAX: i64 = 60;

/// A job that no node may run is tried again this often, and fails when there was none for so long.
const UNMATCHED_WAIT: &str = "2 seconds";
const UNMATCHED_MAX: &str = "60 seconds";

/// How often a running job's session is looked at.
const SESSION_LOOK: Duration = Duration::from_millis(100);

/// Knows how to do one type of job.
pub trait Resumer: Send + Sync {
    /// Does the job, from its beginning or from where an earlier run has left it, and gives its result. The future is
    /// dropped when the claim is lost, at any await.
    fn resume(&self, run: Run) -> Boxed<'_, Value>;

    /// The job has failed for good: removes what it has made. Best effort; what stays behind is logged.
    fn give_up(&self, run: Run) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

struct Shared {
    cluster: Cluster,
    registry: Registry,
    ledger: Ledger,
    resumers: Mutex<BTreeMap<String, Arc<dyn Resumer>>>,
    /// The claims that this process works on.
    claims: Mutex<HashSet<Uuid>>,
}

/// The handle; clones share everything.
#[derive(Clone)]
pub struct Jobs(Arc<Shared>);

/// A job that this node has claimed.
#[derive(Clone)]
struct Claimed {
    id: JobId,
    job_type: String,
    filter: Filter,
    prefers: Vec<String>,
    payload: Value,
    sealed: Option<Vec<u8>>,
    claim: Uuid,
}

/// A claim that this process works on; dropping it ends that.
struct Held {
    jobs: Jobs,
    claim: Uuid,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.jobs.claims().remove(&self.claim);
    }
}

impl Jobs {
    /// Without resumers, until they are registered.
    pub fn new(cluster: Cluster, registry: Registry, ledger: Ledger) -> Self {
        let (resumers, claims) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Shared { cluster, registry, ledger, resumers, claims }))
    }

    /// From now on jobs of this type can run here.
    pub fn register(&self, job_type: &str, resumer: Arc<dyn Resumer>) {
        self.resumers().insert(job_type.to_owned(), resumer);
    }

    fn resumers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<dyn Resumer>>> {
        self.0.resumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.0.cluster
    }

    /// Where rows are read and written.
    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    fn claims(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.0.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, claim: Uuid) -> Option<Held> {
        self.claims().insert(claim).then(|| Held { jobs: self.clone(), claim })
    }

    /// This node's number, once it is a member.
    ///
    /// # Errors
    ///
    /// 08006 when the node has no session, and so nothing may be promised in its name.
    pub fn session(&self) -> Result<Session, PgError> {
        match self.0.registry.standing() {
            Standing::Member(session) if session.is_valid() => Ok(session),
            Standing::Member(_) => Err(apart("its session has run out")),
            Standing::Apart { reason } => Err(apart(&reason)),
        }
    }

    /// Makes a job that any node may take.
    ///
    /// # Errors
    ///
    /// The registry is not reachable; whether the job was made is then not known.
    pub async fn create(&self, new: &NewJob) -> anyhow::Result<()> {
        self.insert(new, None, None).await?;
        self.0.ledger.notify().await;
        Ok(())
    }

    /// Makes a job that this node takes at once, and waits for its end.
    ///
    /// Dropping the future ends the wait, not the job.
    ///
    /// # Errors
    ///
    /// XXUUU `execution of job … relocated to …` when this node may not run it, and another one does; the registry is
    /// not reachable. A job that fails is no error here.
    pub async fn run_attached(&self, new: &NewJob) -> anyhow::Result<Job> {
        match self.take(new).await? {
            Some(to) => Err(gate::relocated(new.id, to).into()),
            None => self.ended(new.id).await,
        }
    }

    /// The same, but where another node has to run the job, its end is waited for all the same.
    ///
    /// # Errors
    ///
    /// The registry is not reachable. A job that fails is no error here.
    pub async fn run_followed(&self, new: &NewJob) -> anyhow::Result<Job> {
        self.take(new).await?;
        self.ended(new.id).await
    }

    /// Makes a job and begins it here; gives the node that it was relocated to, if it was.
    async fn take(&self, new: &NewJob) -> anyhow::Result<Option<NodeId>> {
        let session = self.session()?;
        let claimed = Claimed {
            id: new.id,
            job_type: new.job_type.clone(),
            filter: new.filter.clone(),
            prefers: new.prefers.clone(),
            payload: new.payload.clone(),
            sealed: new.sealed.clone(),
            claim: Uuid::new_v4(),
        };
        // Held before the row is there, so that the claim loop does not begin it a second time.
        let held = self.hold(claimed.claim).context("hold a claim that is new")?;
        self.insert(new, Some(claimed.claim), Some(&session)).await?;
        if self.matches(&claimed.filter) {
            tokio::spawn(self.clone().execute(claimed, held, session.id));
        } else if let Some(to) = self.relocate(claimed.id, claimed.claim, &claimed.filter, &claimed.prefers).await? {
            return Ok(Some(to));
        } else {
            self.postpone(&claimed).await?;
        }
        Ok(None)
    }

    async fn ended(&self, job: JobId) -> anyhow::Result<Job> {
        let jobs = self.wait(&[job]).await?;
        jobs.into_iter().next().with_context(|| format!("find job {job} again"))
    }

    fn matches(&self, filter: &Filter) -> bool {
        self.0.cluster.me().locality.first_unmatched(filter).is_none()
    }

    async fn insert(&self, new: &NewJob, claim: Option<Uuid>, session: Option<&Session>) -> anyhow::Result<()> {
        let insert = "
            INSERT INTO registry.jobs (id, job_type, description, statement, user_name, filter, prefers, payload,
                                       sealed, claim_id, claim_session, coordinator_id)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)";
        let filter = new.filter.to_string();
        let (session_id, node) = (session.map(|session| session.id), session.map(|session| session.node_id.0));
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 12] = [
            &new.id.0,
            &new.job_type,
            &new.description,
            &new.statement,
            &new.user,
            &filter,
            &new.prefers,
            &new.payload,
            &new.sealed,
            &claim,
            &session_id,
            &node,
        ];
        self.0.ledger.query(insert, &parameters).await.with_context(|| format!("make job {}", new.id))?;
        Ok(())
    }

    /// Claims and runs jobs, for ever.
    pub async fn run(self) {
        let mut bell = self.0.ledger.bell();
        loop {
            bell.mark_unchanged();
            if let Ok(session) = self.session()
                && let Err(error) = self.adopt(&session).await
            {
                tracing::info!("could not look for jobs: {error:#}");
            }
            // The bell of a handle that is alive does not end.
            let _ = timeout(TICK, bell.changed()).await;
        }
    }

    /// Takes what nobody works on, and begins what is claimed for this node.
    async fn adopt(&self, session: &Session) -> anyhow::Result<()> {
        let claim = "
            WITH free AS (
                SELECT j.id FROM registry.jobs j
                WHERE j.status = 'running' AND j.job_type = ANY($4) AND coalesce(j.next_run <= clock_timestamp(), true)
                  AND NOT EXISTS (SELECT FROM registry.sessions s
                                  WHERE s.id = j.claim_session AND s.expires_at > clock_timestamp())
                ORDER BY j.created DESC LIMIT $3 FOR UPDATE SKIP LOCKED)
            UPDATE registry.jobs j SET claim_id = gen_random_uuid(), claim_session = $1, coordinator_id = $2,
                   modified = clock_timestamp()
            FROM free WHERE j.id = free.id
              AND EXISTS (SELECT FROM registry.sessions WHERE id = $1 AND expires_at > clock_timestamp())";
        let types: Vec<String> = self.resumers().keys().cloned().collect();
        self.0.ledger.query(claim, &[&session.id, &session.node_id.0, &CLAIMS_AT_ONCE, &types]).await?;
        let mine = "
            SELECT id, job_type, filter, prefers, payload, sealed, claim_id FROM registry.jobs
            WHERE claim_session = $1 AND status = 'running'";
        for row in self.0.ledger.query(mine, &[&session.id]).await? {
            let claimed = match claimed(&row) {
                Ok(claimed) => claimed,
                Err(error) => {
                    tracing::warn!(job = row.get::<_, i64>(0), "a job's row cannot be read: {error:#}");
                    continue;
                }
            };
            if let Some(held) = self.hold(claimed.claim) {
                tokio::spawn(self.clone().attend(claimed, held, session.id));
            }
        }
        Ok(())
    }

    /// A claim that this node got: to be run here, or by somebody who matches.
    async fn attend(self, claimed: Claimed, held: Held, session: Uuid) {
        if self.matches(&claimed.filter) {
            return self.execute(claimed, held, session).await;
        }
        let moved = match self.relocate(claimed.id, claimed.claim, &claimed.filter, &claimed.prefers).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => self.postpone(&claimed).await,
            Err(error) => Err(error),
        };
        if let Err(error) = moved {
            // The claim stays, and this is tried again with the next look at the rows.
            tracing::info!(job = %claimed.id, "job could not be handed over: {error:#}");
            sleep(TICK).await;
        }
    }

    /// Nobody matches now: gives the claim back for a while, or, when that has lasted, fails the job.
    async fn postpone(&self, claimed: &Claimed) -> anyhow::Result<()> {
        let release = format!(
            "UPDATE registry.jobs SET claim_id = NULL, claim_session = NULL, coordinator_id = NULL,
                    unmatched_since = coalesce(unmatched_since, clock_timestamp()),
                    next_run = clock_timestamp() + interval '{UNMATCHED_WAIT}',
                    running_status = 'waiting for a node that matches the locality filter'
             WHERE id = $1 AND claim_id = $2 AND status = 'running'
               AND coalesce(unmatched_since > clock_timestamp() - interval '{UNMATCHED_MAX}', true) RETURNING id"
        );
        if self.0.ledger.query(&release, &[&claimed.id.0, &claimed.claim]).await?.is_empty() {
            self.fail(claimed, &gate::nobody(&claimed.filter).into()).await?;
        }
        Ok(())
    }

    /// Runs the job for as long as this node's session lives.
    async fn execute(self, claimed: Claimed, _held: Held, session: Uuid) {
        let job = claimed.id;
        tokio::select! {
            ended = self.run_to_its_end(&claimed) => match ended {
                Ok(()) => {}
                Err(error) if error.downcast_ref::<LostClaim>().is_some() => {
                    tracing::info!(%job, "job is somebody else's now");
                }
                Err(error) => tracing::warn!(%job, "job's end could not be written: {error:#}"),
            },
            () = self.session_ends(session) => tracing::warn!(%job, "this node's session has ended; it stops the job"),
        }
    }

    async fn run_to_its_end(&self, claimed: &Claimed) -> anyhow::Result<()> {
        let resumer = self.resumers().get(&claimed.job_type).cloned();
        let Some(resumer) = resumer else { bail!("no resumer for jobs of type {}", claimed.job_type) };
        let run = Run {
            id: claimed.id,
            claim: claimed.claim,
            payload: claimed.payload.clone(),
            sealed: claimed.sealed.clone(),
            ledger: self.0.ledger.clone(),
        };
        let mut wait = FIRST_WAIT;
        let mut failing_since: Option<Instant> = None;
        loop {
            let begun = Instant::now();
            if !self.begin(claimed).await? {
                let message = format!("the job was begun {RUNS_MAX} times and never came to its end");
                resumer.give_up(run).await;
                return self.fail(claimed, &PgError::new(SqlState::UNCATEGORIZED, message).into()).await;
            }
            let error = match resumer.resume(run.clone()).await {
                Ok(result) => return self.succeed(claimed, &result).await,
                Err(error) if error.downcast_ref::<LostClaim>().is_some() => return Err(error),
                Err(error) => error,
            };
            if begun.elapsed() >= A_WHILE {
                (failing_since, wait) = (None, FIRST_WAIT);
            }
            let since = *failing_since.get_or_insert_with(Instant::now);
            if !may_pass(&error) || since.elapsed() >= RETRY_FOR {
                resumer.give_up(run).await;
                return self.fail(claimed, &error).await;
            }
            tracing::warn!(job = %claimed.id, "job is tried again: {error:#}");
            if let Err(lost) = run.note(&error).await
                && lost.downcast_ref::<LostClaim>().is_some()
            {
                return Err(lost);
            }
            sleep(wait).await;
            wait = LONGEST_WAIT.min(wait * 2);
        }
    }

    /// False when it has been begun too often.
    async fn begin(&self, claimed: &Claimed) -> anyhow::Result<bool> {
        let write = "
            UPDATE registry.jobs SET started = coalesce(started, clock_timestamp()), last_run = clock_timestamp(),
                   num_runs = num_runs + 1, next_run = NULL, unmatched_since = NULL, modified = clock_timestamp()
            WHERE id = $1 AND claim_id = $2 AND status = 'running' RETURNING num_runs";
        let rows = self.last_word(write, &[&claimed.id.0, &claimed.claim]).await?;
        Ok(rows.first().is_some_and(|row| row.get::<_, i64>(0) <= RUNS_MAX))
    }

    async fn succeed(&self, claimed: &Claimed, result: &Value) -> anyhow::Result<()> {
        let write = "
            UPDATE registry.jobs SET status = 'succeeded', fraction_completed = 1, running_status = NULL, result = $3,
                   sealed = NULL, finished = clock_timestamp(), modified = clock_timestamp()
            WHERE id = $1 AND claim_id = $2 AND status = 'running' RETURNING id";
        self.last_word(write, &[&claimed.id.0, &claimed.claim, result]).await?;
        tracing::info!(job = %claimed.id, "job succeeded");
        self.0.ledger.notify().await;
        Ok(())
    }

    async fn fail(&self, claimed: &Claimed, error: &anyhow::Error) -> anyhow::Result<()> {
        let write = "
            UPDATE registry.jobs SET status = 'failed', running_status = NULL, error = $3, result = $4, sealed = NULL,
                   finished = clock_timestamp(), modified = clock_timestamp()
            WHERE id = $1 AND claim_id = $2 AND status = 'running' RETURNING id";
        let (words, parts) = words(error);
        tracing::warn!(job = %claimed.id, "job failed: {words}");
        self.last_word(write, &[&claimed.id.0, &claimed.claim, &words, &parts]).await?;
        self.0.ledger.notify().await;
        Ok(())
    }

    /// A write that has to be made while this node's session lives, however often the registry is away meanwhile.
    async fn last_word(
        &self,
        statement: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> anyhow::Result<Vec<Row>> {
        loop {
            match self.0.ledger.query(statement, parameters).await {
                Ok(rows) if rows.is_empty() => return Err(LostClaim.into()),
                Ok(rows) => return Ok(rows),
                Err(error) if may_pass(&error) => {
                    tracing::info!("the registry is away: {error:#}");
                    sleep(FIRST_WAIT).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns when the session under which a claim was made can no longer be relied on.
    async fn session_ends(&self, id: Uuid) {
        let mut last: Option<Session> = None;
        loop {
            match self.0.registry.standing() {
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

    /// This node's number.
    ///
    /// # Errors
    ///
    /// As [`Jobs::session`].
    pub fn node_id(&self) -> Result<NodeId, PgError> {
        Ok(self.session()?.node_id)
    }
}

/// Whether a job that ends with this error is tried again.
pub fn may_pass(error: &anyhow::Error) -> bool {
    let lost = PgError::of(error).is_some_and(|said| said.code == SqlState::CONNECTION_FAILURE);
    lost || error.downcast_ref::<Retryable>().is_some()
}

fn apart(reason: &str) -> PgError {
    PgError::new(SqlState::CONNECTION_FAILURE, "this node is not a member of the registry now")
        .detail(format!("The reason: {reason}."))
        .hint("Try again, or use another node; SHOW NODES lists them.")
}

fn claimed(row: &Row) -> anyhow::Result<Claimed> {
    Ok(Claimed {
        id: JobId(row.get(0)),
        job_type: row.get(1),
        filter: row.get::<_, &str>(2).parse().context("read a job's filter")?,
        prefers: row.get(3),
        payload: row.get(4),
        sealed: row.get(5),
        claim: row.get(6),
    })
}
