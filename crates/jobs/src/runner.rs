//! Which jobs this node works on: making, claiming, and handing over.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use cluster::registry::{Registry, Session, Standing};
use cluster::service::Boxed;
use cluster::{Cluster, Dialer, Filter, NodeId};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::attend::may_pass;
use crate::birth::{Birth, Transaction};
use crate::gate::{self, Unplaced};
use crate::job::{Job, JobId, NewJob};
use crate::ledger::{CONNECTION_DEADLINE, Ledger};
use crate::run::{FRUITLESS, LostClaim, Run};
use crate::settle::UNDECIDED;

/// Without a bell, rows are looked at this often: claims of the dead are found by it.
pub(crate) const TICK: Duration = Duration::from_secs(1);

/// So many unclaimed jobs are taken at once; the next look takes more.
const CLAIMS_AT_ONCE: i64 = 10;

/// So many ids that were given to clients are remembered, to be looked for when the registry has moved; of older ones
/// nobody notices here that they are lost.
const GIVEN_MAX: usize = 1000;

/// How long what runs here may take to stop before its claims are given away all the same: its writes are guarded.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// Knows how to do one type of job.
pub trait Resumer: Send + Sync {
    /// Does the job, from its beginning or from where an earlier run has left it, and gives its result. The future is
    /// dropped when the claim is lost, at any await.
    fn resume(&self, run: Run) -> Boxed<'_, Value>;

    /// The job has failed or was canceled: removes what it has made, so that a repeat goes on where this one was left.
    /// If it turns out that the job has reached its end already, nothing is removed and its result is given: then it has
    /// succeeded.
    fn revert(&self, run: Run) -> Boxed<'_, Option<Value>>;

    /// Whether what it has made may be removed by a node that does not match the filter.
    fn reverts_anywhere(&self, run: Run) -> Boxed<'_, bool>;
}

struct Shared {
    cluster: Cluster,
    registry: Registry,
    ledger: Ledger,
    /// The way to the servers that know of transactions.
    dialer: Dialer,
    resumers: Mutex<BTreeMap<String, Arc<dyn Resumer>>>,
    /// The claims that this process works on, and what stops the work.
    claims: Mutex<HashMap<Uuid, CancellationToken>>,
    /// The latest ids that clients were given here.
    given: Mutex<VecDeque<JobId>>,
    draining: AtomicBool,
}

/// The handle; clones share everything.
#[derive(Clone)]
pub struct Jobs(Arc<Shared>);

/// What the holder of a claim has to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Duty {
    Run,
    /// To remove what was made; it has been tried for so long.
    Revert(Duration),
    Pause,
    Cancel,
}

/// A job that this node has claimed.
#[derive(Clone)]
pub(crate) struct Claimed {
    pub(crate) id: JobId,
    pub(crate) job_type: String,
    pub(crate) filter: Filter,
    pub(crate) prefers: Vec<String>,
    pub(crate) payload: Value,
    pub(crate) sealed: Option<Vec<u8>>,
    pub(crate) pausepoints: Vec<String>,
    pub(crate) claim: Uuid,
    pub(crate) duty: Duty,
    /// The best coordinator, if one was chosen when it was claimed.
    pub(crate) best: Option<NodeId>,
}

/// How a job's row begins.
pub(crate) enum Start<'s> {
    /// For whoever takes it.
    Free,
    /// Under a claim of this node's.
    Claimed(&'s Session, Uuid),
    /// For nobody yet; without a transaction until this node says so.
    Undecided(&'s Session, Option<&'s Transaction>),
}

/// A claim that this process works on; dropping it ends that.
pub(crate) struct Held {
    jobs: Jobs,
    claim: Uuid,
    /// Cancelled when the work has to stop.
    pub(crate) stop: CancellationToken,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.jobs.claims().remove(&self.claim);
    }
}

impl Jobs {
    /// Without resumers, until they are registered.
    pub fn new(cluster: Cluster, registry: Registry, ledger: Ledger, dialer: Dialer) -> Self {
        let (resumers, claims, given) = (Mutex::default(), Mutex::default(), Mutex::default());
        let draining = AtomicBool::new(false);
        Self(Arc::new(Shared { cluster, registry, ledger, dialer, resumers, claims, given, draining }))
    }

    /// From now on jobs of this type can run here.
    pub fn register(&self, job_type: &str, resumer: Arc<dyn Resumer>) {
        self.resumers().insert(job_type.to_owned(), resumer);
    }

    pub(crate) fn resumer(&self, job_type: &str) -> Option<Arc<dyn Resumer>> {
        self.resumers().get(job_type).cloned()
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

    pub(crate) fn dialer(&self) -> &Dialer {
        &self.0.dialer
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<Uuid, CancellationToken>> {
        self.0.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to work on a claim, unless this process does already.
    fn hold(&self, claim: Uuid) -> Option<Held> {
        let stop = CancellationToken::new();
        let mut claims = self.claims();
        if claims.contains_key(&claim) {
            return None;
        }
        claims.insert(claim, stop.clone());
        Some(Held { jobs: self.clone(), claim, stop })
    }

    /// This node's session in the registry.
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

    /// As [`Jobs::session`], but a node that has lost the registry is given a moment to be a member again: whoever asks
    /// for a job while the registry fails over need not ask twice.
    async fn member(&self) -> Result<Session, PgError> {
        if self.0.cluster.me().node_id.is_some() {
            self.0.registry.joined(CONNECTION_DEADLINE).await;
        }
        self.session()
    }

    /// Makes a job that any node may take, once it is there.
    ///
    /// # Errors
    ///
    /// [`Taken`](crate::Taken); or the registry is not reachable, and the error says whether the job may have been made all the
    /// same. With a transaction also: it is not open on the shard's leaseholder, or that cannot be asked.
    pub async fn create(&self, new: &NewJob, birth: &Birth) -> anyhow::Result<()> {
        let transaction = match birth {
            Birth::Now => {
                self.insert(new, Start::Free).await?;
                self.0.ledger.notify().await;
                return Ok(());
            }
            Birth::With(transaction) => {
                self.prove(transaction).await?;
                Some(transaction)
            }
            Birth::Told => None,
        };
        self.insert(new, Start::Undecided(&self.member().await?, transaction)).await
    }

    /// Makes a job that this node takes at once, and waits until it has ended or is paused.
    ///
    /// Dropping the future ends the wait, not the job.
    ///
    /// # Errors
    ///
    /// XXUUU `execution of job … relocated to …` when this node may not run it, and another one does; 08006 naming the job when
    /// the registry is not reachable for longer than a failover takes. A job that fails is no error here.
    pub async fn run_attached(&self, new: &NewJob) -> anyhow::Result<Job> {
        if let Some(to) = self.begin_here(new).await? {
            return Err(gate::relocated(new.id, to).into());
        }
        self.wait_attached(new.id).await
    }

    /// As [`Jobs::run_attached`], but a job that is relocated is waited for like one that is not.
    ///
    /// # Errors
    ///
    /// As [`Jobs::run_attached`], but for the relocation.
    pub async fn run_followed(&self, new: &NewJob) -> anyhow::Result<Job> {
        self.begin_here(new).await?;
        self.wait_attached(new.id).await
    }

    /// Makes a job under this node's claim and begins it, or writes it over to the node that is given.
    async fn begin_here(&self, new: &NewJob) -> anyhow::Result<Option<NodeId>> {
        let session = self.member().await?;
        let claimed = Claimed {
            id: new.id,
            job_type: new.job_type.clone(),
            filter: new.filter.clone(),
            prefers: new.prefers.clone(),
            payload: new.payload.clone(),
            sealed: new.sealed.clone(),
            pausepoints: new.pausepoints.clone(),
            claim: Uuid::new_v4(),
            duty: Duty::Run,
            // Its client waits here.
            best: None,
        };
        // Held before the row is there, so that the claim loop does not begin it a second time.
        let held = self.hold(claimed.claim).context("hold a claim that is new")?;
        self.insert(new, Start::Claimed(&session, claimed.claim)).await?;
        if self.matches(&claimed.filter) {
            tokio::spawn(self.clone().attend(claimed, held, session.id));
            return Ok(None);
        }
        let to = match self.relocate(claimed.id, claimed.claim, &claimed.filter, &claimed.prefers).await {
            Ok(None) => self.postpone(&claimed).await.map(|()| None),
            told => told,
        };
        match to {
            // The job is there all the same. Whoever holds its claim when the registry is back hands it over, or does what
            // has been asked of it.
            Err(error) if may_pass(&error) || error.downcast_ref::<LostClaim>().is_some() => {
                tracing::info!(job = %claimed.id, "job is handed over later: {error:#}");
                Ok(None)
            }
            told => told,
        }
    }

    pub(crate) fn matches(&self, filter: &Filter) -> bool {
        self.0.cluster.me().locality.first_unmatched(filter).is_none()
    }

    /// False when there is a row of this number, or one with the text that this one was to have alone.
    pub(crate) async fn write_row(&self, new: &NewJob, start: &Start<'_>) -> anyhow::Result<bool> {
        let insert = "
            WITH made AS (
                INSERT INTO registry.jobs (id, job_type, description, statement, user_name, filter, prefers, payload,
                                           sealed, pausepoints, claim_id, claim_session, coordinator_id, exclusive, status)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
                ON CONFLICT DO NOTHING RETURNING id),
            undecided AS (
                INSERT INTO registry.transactions (job_id, gateway, shard, timeline, top, part)
                SELECT id, $16, $17, $18, $19, $20 FROM made WHERE $16::uuid IS NOT NULL)
            SELECT id FROM made";
        let filter = new.filter.to_string();
        let (session, claim, gateway, transaction) = match *start {
            Start::Free => (None, None, None, None),
            Start::Claimed(session, claim) => (Some(session), Some(claim), None, None),
            Start::Undecided(session, transaction) => (None, None, Some(session.id), transaction),
        };
        let status = if gateway.is_some() { UNDECIDED } else { "running" };
        let (session_id, node) = (session.map(|session| session.id), session.map(|session| session.node_id.0));
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 20] = [
            &new.id.0,
            &new.job_type,
            &new.description,
            &new.statement,
            &new.user,
            &filter,
            &new.prefers,
            &new.payload,
            &new.sealed,
            &new.pausepoints,
            &claim,
            &session_id,
            &node,
            &new.exclusive,
            &status,
            &gateway,
            &transaction.map(|transaction| &transaction.shard),
            &transaction.map(|transaction| transaction.timeline),
            &transaction.map(|transaction| transaction.top),
            &transaction.map(|transaction| transaction.part),
        ];
        let made = self.0.ledger.query(insert, &parameters).await.with_context(|| format!("make job {}", new.id))?;
        Ok(!made.is_empty())
    }

    /// A client was told of this job, which is there now.
    pub(crate) fn remember(&self, id: JobId) {
        let mut given = self.given();
        given.truncate(GIVEN_MAX - 1);
        given.push_front(id);
    }

    fn given(&self) -> MutexGuard<'_, VecDeque<JobId>> {
        self.0.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a client was given this id here; if there is no such job, its row was lost. One that is old enough to
    /// have been removed is not remembered.
    pub(crate) fn has_given(&self, id: JobId) -> bool {
        let retention = self.retention();
        let mut given = self.given();
        given.retain(|id| !id.is_older_than(retention));
        given.contains(&id)
    }

    /// Claims and runs jobs, for ever.
    pub async fn run(self) {
        let mut bell = self.0.ledger.bell();
        let mut connections = self.0.ledger.connections();
        loop {
            bell.mark_unchanged();
            if let Ok(session) = self.session() {
                if let Err(error) = Box::pin(self.settle_due(&session)).await {
                    tracing::info!("could not look for undecided jobs: {error:#}");
                }
                if let Err(error) = self.adopt(&session).await {
                    tracing::info!("could not look for jobs: {error:#}");
                }
            }
            if connections.has_changed().unwrap_or(false) {
                connections.mark_unchanged();
                self.look_for_given().await;
            }
            // The bell of a handle that is alive does not end.
            let _ = timeout(TICK, bell.changed()).await;
        }
    }

    /// Says which jobs that clients were told of are not in the registry any more: it may have moved to a server that
    /// had not received them.
    async fn look_for_given(&self) {
        let retention = self.retention();
        let given: Vec<i64> = self.given().iter().filter(|id| !id.is_older_than(retention)).map(|id| id.0).collect();
        let query =
            "SELECT id FROM unnest($1::bigint[]) id WHERE NOT EXISTS (SELECT FROM registry.jobs j WHERE j.id = id.id)";
        match self.0.ledger.query(query, &[&given]).await {
            Ok(lost) => lost.iter().for_each(|row| {
                tracing::warn!(job = row.get::<_, i64>(0), "job was lost with the server that held the registry");
            }),
            Err(error) => tracing::info!("could not look for the jobs that clients were given: {error:#}"),
        }
    }

    /// Takes what nobody works on, and does its duty to what is claimed for this node.
    ///
    /// Claims of the dead are left alone for one session life after the registry has begun on another server or anew:
    /// those who hold them may only have lost sight of it.
    async fn adopt(&self, session: &Session) -> anyhow::Result<()> {
        if self.0.draining.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut places = self.claim_free(session).await?;
        let mine = "
            SELECT id, job_type, filter, prefers, payload, sealed, claim_id, pausepoints, status,
                   coalesce(extract(epoch FROM clock_timestamp() - reverting_since)::float8, 0)
            FROM registry.jobs
            WHERE claim_session = $1 AND status IN ('running', 'reverting', 'pause-requested', 'cancel-requested')";
        for row in self.0.ledger.query(mine, &[&session.id]).await? {
            let claimed = match claimed(&row) {
                Ok(claimed) => Claimed { best: places.remove(&claimed.claim), ..claimed },
                Err(error) => {
                    tracing::warn!(job = row.get::<_, i64>(0), "a job's row cannot be read: {error:#}");
                    continue;
                }
            };
            if let Some(held) = self.hold(claimed.claim) {
                tokio::spawn(self.clone().attend(claimed, held, session.id));
            } else if matches!(claimed.duty, Duty::Pause | Duty::Cancel)
                && let Some(stop) = self.claims().get(&claimed.claim)
            {
                // It ends what it does, and the next look finds the claim with nobody at it.
                stop.cancel();
            }
        }
        Ok(())
    }

    /// Claims what nobody works on, and chooses for those that have had no coordinator yet; gives who is to run them, by
    /// claim. A choice that is lost before it is carried out, with an answer of the registry's, is not made again: the
    /// row names this node by then, and the job stays here.
    async fn claim_free(&self, session: &Session) -> anyhow::Result<HashMap<Uuid, NodeId>> {
        let claim = "
            WITH settled AS (
                SELECT EXISTS (SELECT FROM registry.incarnations i, registry.settings s
                               WHERE s.name = 'session_life_ms' AND i.started = pg_catalog.pg_postmaster_start_time()
                                 AND i.timeline = pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8)
                                 AND i.since + s.value::float8 * interval '1 ms' <= clock_timestamp()) AS yes),
            free AS (
                SELECT j.id, j.coordinator_id IS NULL AND j.status = 'running' AS is_unplaced
                FROM registry.jobs j, settled
                WHERE j.status IN ('running', 'reverting', 'pause-requested', 'cancel-requested')
                  AND j.job_type = ANY($4) AND coalesce(j.next_run <= clock_timestamp(), true)
                  AND (j.claim_session IS NULL OR settled.yes)
                  AND NOT EXISTS (SELECT FROM registry.sessions s
                                  WHERE s.id = j.claim_session AND s.expires_at > clock_timestamp())
                ORDER BY j.created DESC LIMIT $3 FOR UPDATE OF j SKIP LOCKED)
            UPDATE registry.jobs j SET claim_id = gen_random_uuid(), claim_session = $1, coordinator_id = $2,
                   modified = clock_timestamp()
            FROM free WHERE j.id = free.id
              AND EXISTS (SELECT FROM registry.sessions WHERE id = $1 AND expires_at > clock_timestamp())
            RETURNING j.id, j.claim_id, j.filter, j.prefers, free.is_unplaced";
        let types: Vec<String> = self.resumers().keys().cloned().collect();
        let taken = self.0.ledger.query(claim, &[&session.id, &session.node_id.0, &CLAIMS_AT_ONCE, &types]).await?;
        let unplaced = taken.iter().filter(|row| row.get(4)).filter_map(unplaced).collect();
        Ok(self.places(unplaced).await.unwrap_or_else(|error| {
            tracing::info!("jobs that were claimed are kept here: {error:#}");
            HashMap::new()
        }))
    }

    /// Stops all work here and lets others take it, before the node ends.
    pub async fn drain(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
        let session = self.session();
        let stopped = async {
            loop {
                let running: Vec<CancellationToken> = self.claims().values().cloned().collect();
                if running.is_empty() {
                    return;
                }
                running.iter().for_each(CancellationToken::cancel);
                sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(DRAIN_DEADLINE, stopped).await.is_err() {
            tracing::warn!("jobs are handed over while they still stop here");
        }
        self.0.registry.leave().await;
        let Ok(session) = session else { return };
        // That a node is stopped is not the job's fault: what is not finished is not counted against it.
        let release = format!(
            "WITH released AS (
                UPDATE registry.jobs SET claim_id = NULL, claim_session = NULL, modified = clock_timestamp()
                WHERE claim_session = $1 AND finished IS NULL RETURNING id),
             uncounted AS (
                UPDATE registry.job_info i SET value = to_jsonb(greatest(i.value::bigint - 1, 0)) FROM released
                WHERE i.job_id = released.id AND i.key = '{FRUITLESS}')
             SELECT id FROM released"
        );
        match timeout(DRAIN_DEADLINE, self.0.ledger.query(&release, &[&session.id])).await {
            Ok(Ok(released)) if released.is_empty() => {}
            Ok(Ok(released)) => {
                tracing::info!(jobs = released.len(), "jobs are handed over");
                let _ = timeout(DRAIN_DEADLINE, self.0.ledger.notify()).await;
            }
            Ok(Err(_)) | Err(_) => tracing::warn!("jobs could not be handed over; others find them without a session"),
        }
    }

    /// A number for a job that is made here.
    ///
    /// # Errors
    ///
    /// 08006 when the node is no member of the registry, and does not become one within some seconds.
    pub async fn new_id(&self) -> Result<JobId, PgError> {
        Ok(JobId::new(self.member().await?.node_id))
    }
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
        pausepoints: row.get(7),
        duty: match row.get(8) {
            "reverting" => Duty::Revert(Duration::try_from_secs_f64(row.get(9)).unwrap_or_default()),
            "pause-requested" => Duty::Pause,
            "cancel-requested" => Duty::Cancel,
            _ => Duty::Run,
        },
        best: None,
    })
}

/// None for a row that cannot be read, which is told when the job is to be run.
fn unplaced(row: &Row) -> Option<Unplaced> {
    let filter = row.get::<_, &str>(2).parse().ok()?;
    Some(Unplaced { id: JobId(row.get(0)), claim: row.get(1), filter, prefers: row.get(3) })
}
