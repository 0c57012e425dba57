//! Founders: sessions that stand for a backup's point.
//!
//! A backup reads many tables with many sessions and has to see one state of the database in all of them. So the node
//! beside a server opens a bounded number of sessions whose snapshots are of the same point, and lends them: a worker
//! on any node asks it for a span of a table, and gets its rows. How the point is made one is told in `open`, how a
//! standby is kept from staying paused in `pause`, when it stays so while it is read in `standing`, when a point is held for
//! too long in `limits`, how sessions are lent in `pool`, why a span is never read from another table than the one that was
//! planned in `span`, and how it gives way to changes of the schema in `yielding`. A plan that is only shown takes a
//! `look`, which holds nothing.
//!
//! All of it hangs on a *lease*. Whoever opened it renews it; when it is closed, replaced, or not renewed in time,
//! all its sessions are closed, also those that are lent, so that a backup that was forgotten holds nothing back on
//! the server.

mod budget;
mod catalog;
mod dump;
mod limits;
mod look;
mod open;
mod pause;
mod pool;
pub(crate) mod session;
mod shared;
mod span;
mod standing;
mod types;
mod yielding;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context as _;
use cluster::service::{Boxed, Reply, Service};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

pub use self::budget::never_fits;
use self::budget::{Budget, Share};
pub use self::dump::SCHEMA_BYTES_MAX;
pub(crate) use self::dump::pg_dump_version;
use self::open::Taken;
use self::pause::Turn;
use self::pool::Pool;
use self::shared::Waiting;
pub use self::standing::IsVoting;
use self::standing::{Kept, Standing};
pub use self::types::*;
use crate::Server;

/// Leases held on one server at the same time; another one is refused. How many connections they may have together is
/// told in `budget`.
pub const LEASES_MAX: usize = 8;

/// A point that is not taken by then, with the wait for others that are being taken, is given up.
const OPEN_DEADLINE: Duration = Duration::from_secs(600);

/// A life is not shorter than this, or the answer to opening it could come after its end.
const LIFE_MIN: Duration = Duration::from_secs(1);

/// Nor longer: a lease that nobody renews must end.
pub const LIFE_MAX: Duration = Duration::from_secs(3600);

/// The founders on the server beside this node. Dropped, all of them are closed.
pub struct Founders {
    server: Server,
    leases: Mutex<HashMap<Uuid, Arc<Lease>>>,
    /// Points that other servers are to share, before they are taken.
    waiting: Waiting,
    /// One point at a time: two could not both pause replay.
    opening: Arc<tokio::sync::Mutex<()>>,
    /// Replay that stands while it is read.
    standing: Arc<Standing>,
    /// The connections of all leases.
    budget: Budget,
    me: Weak<Self>,
}

struct Lease {
    life: Duration,
    ends: Mutex<Instant>,
    pools: BTreeMap<String, Arc<Pool>>,
    _end: DropGuard,
    /// After the sessions, which would be in replay's way. Gone when the lease was given up.
    kept: Mutex<Option<Kept>>,
    given_up: OnceLock<PgError>,
    _share: Share,
    tasks: Mutex<Vec<AbortOnDropHandle<()>>>,
}

impl Lease {
    fn renew(&self) {
        *self.ends.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + self.life;
    }

    fn ends(&self) -> Instant {
        *self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why replay goes on, where it was to stay paused.
    fn pause_over(&self) -> Option<String> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(Kept::over)
    }

    /// Ends everything but the lease itself, which says why.
    fn give_up(&self, why: PgError) {
        drop(self.given_up.set(why.clone()));
        self.pools.values().for_each(|pool| pool.give_up(why.clone()));
        drop(self.kept.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Founders {
    /// The founders of `server`, for which no commit waits; there are none yet.
    pub fn new(server: Server) -> Arc<Self> {
        Self::beside(server, Arc::new(|| Some(false)))
    }

    /// The same of a server that may become a synchronous standby: its replay is not paused unless `is_voting` says that it
    /// is none.
    pub fn beside(server: Server, is_voting: IsVoting) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            server,
            leases: Mutex::default(),
            waiting: Waiting::default(),
            opening: Arc::default(),
            standing: Arc::new(Standing::new(is_voting)),
            budget: Budget::default(),
            me: me.clone(),
        })
    }

    async fn answer(&self, request: Value) -> anyhow::Result<Reply> {
        let request: Request = serde_json::from_value(request)
            .map_err(|_| PgError::new(SqlState::PROTOCOL_VIOLATION, "the request for founders cannot be read"))?;
        match request {
            Request::Open(open) => Ok(Reply::Answer(serde_json::to_value(self.open(open).await?)?)),
            Request::Prepare(open) => {
                self.prepare(open).await?;
                Ok(Reply::Answer(Value::Null))
            }
            Request::Step { lease, until } => Ok(Reply::Answer(serde_json::to_value(self.step(lease, until).await?)?)),
            Request::Take { lease, at, with_schema } => {
                Ok(Reply::Answer(serde_json::to_value(self.take(lease, &at, with_schema).await?)?))
            }
            Request::Renew { lease } => {
                let lease = self.lease(lease)?;
                lease.renew();
                Ok(Reply::Answer(serde_json::to_value(lease.pause_over())?))
            }
            Request::Close { lease } => {
                self.remove(lease);
                Ok(Reply::Answer(Value::Null))
            }
            Request::Schema { lease, database } => {
                let pool = self.pool(lease, &database)?;
                let schema = pool.schema.as_ref().context("give a schema that was dumped on another server")?;
                Ok(Reply::Download(schema.stream()))
            }
            Request::Sequences { lease, database } => {
                let pool = self.pool(lease, &database)?;
                let guard = pool.guard().await?;
                let in_recovery = guard.row("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?.get(0);
                let sequences = catalog::sequences_left(&guard, in_recovery, &pool.sequences).await?;
                Ok(Reply::Answer(serde_json::to_value(sequences)?))
            }
            Request::Look { databases, to_read } => {
                check(&databases)?;
                Ok(Reply::Answer(serde_json::to_value(look::look(&self.server, &databases, to_read).await?)?))
            }
            Request::Span(request) => {
                let pool = self.pool(request.lease, &request.database)?;
                Ok(Reply::Download(span::read(&pool, &request.what).await?))
            }
        }
    }

    async fn open(&self, request: Open) -> anyhow::Result<Opened> {
        check(&request.databases)?;
        timeout(OPEN_DEADLINE, Box::pin(self.open_in_turn(request))).await.map_err(|_| {
            let message = format!("the backup's point on {} could not be taken in time", self.server.address());
            PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
        })?
    }

    /// Waits until nobody else takes a point, and there is room for another lease.
    async fn turn(&self, lease: Uuid) -> anyhow::Result<Turn> {
        // First, for what waits keeps its turn.
        self.remove(lease);
        let turn = Arc::new(self.opening.clone().lock_owned().await);
        if self.leases.lock().unwrap_or_else(PoisonError::into_inner).len() >= LEASES_MAX {
            let message = format!("{LEASES_MAX} backups read {} already", self.server.address());
            return Err(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).into());
        }
        Ok(turn)
    }

    async fn open_in_turn(&self, request: Open) -> anyhow::Result<Opened> {
        let turn = self.turn(request.lease).await?;
        let end = CancellationToken::new();
        // Whatever was opened until an error is closed by this.
        let guard = end.clone().drop_guard();
        let place = (turn, Arc::clone(&self.standing));
        let taken = open::open(&self.server, &request, &end, place, &self.budget).await.context("open founders")?;
        Ok(self.keep(&request, taken, guard))
    }

    /// Holds a point that was taken.
    fn keep(&self, request: &Open, taken: Taken, guard: DropGuard) -> Opened {
        let life = Duration::from_millis(request.life_ms).clamp(LIFE_MIN, LIFE_MAX);
        let pools = taken.pools.into_iter().map(|pool| (pool.database.clone(), Arc::new(pool))).collect();
        let ends = Mutex::new(Instant::now() + life);
        let unpaused = || Kept::Ended("It could not be paused when the point was taken.".to_owned());
        let kept = taken.kept.or_else(|| request.pause.is_some().then(unpaused));
        let (kept, given_up, tasks) = (Mutex::new(kept), OnceLock::new(), Mutex::default());
        let lease = Arc::new(Lease { life, ends, pools, _end: guard, kept, given_up, _share: taken.share, tasks });
        let expiry = tokio::spawn(expire(self.me.clone(), request.lease, Arc::downgrade(&lease)));
        let (limits, server) = (request.limits.clone(), self.server.address());
        let limits = tokio::spawn(limits::watch(Arc::downgrade(&lease), request.job, limits, server));
        let tasks = [expiry, limits].map(AbortOnDropHandle::new);
        lease.tasks.lock().unwrap_or_else(PoisonError::into_inner).extend(tasks);
        self.leases.lock().unwrap_or_else(PoisonError::into_inner).insert(request.lease, lease);
        taken.opened
    }

    fn remove(&self, lease: Uuid) {
        drop(self.waiting.remove(lease));
        let removed = self.leases.lock().unwrap_or_else(PoisonError::into_inner).remove(&lease);
        drop(removed);
    }

    fn lease(&self, lease: Uuid) -> anyhow::Result<Arc<Lease>> {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let held = leases.get(&lease).cloned();
        let held = held.ok_or_else(|| point_lost(&self.server.address(), "Its lease has ended."))?;
        match held.given_up.get() {
            Some(why) => Err(why.clone().into()),
            None => Ok(held),
        }
    }

    fn pool(&self, lease: Uuid, database: &str) -> anyhow::Result<Arc<Pool>> {
        let lease = self.lease(lease)?;
        let pool = lease.pools.get(database).cloned();
        pool.ok_or_else(|| {
            let message = format!("database \"{database}\" is not part of the lease");
            PgError::new(SqlState::UNDEFINED_DATABASE, message).into()
        })
    }
}

impl Service for Founders {
    fn call(&self, request: Value) -> Boxed<'_, Reply> {
        Box::pin(self.answer(request))
    }
}

fn check(databases: &[String]) -> anyhow::Result<()> {
    let count = databases.len();
    let mut names = databases.to_vec();
    names.sort();
    names.dedup();
    if count == 0 || count > DATABASES_MAX || names.len() != count {
        let message = format!("founders are opened in 1 to {DATABASES_MAX} different databases, not in {count}");
        return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).into());
    }
    Ok(())
}

/// Ends a lease that is not renewed.
async fn expire(founders: Weak<Founders>, id: Uuid, lease: Weak<Lease>) {
    while let Some(ends) = lease.upgrade().map(|lease| lease.ends()) {
        if ends <= Instant::now() {
            let (Some(founders), Some(lease)) = (founders.upgrade(), lease.upgrade()) else { return };
            let mut leases = founders.leases.lock().unwrap_or_else(PoisonError::into_inner);
            if leases.get(&id).is_some_and(|held| Arc::ptr_eq(held, &lease)) {
                leases.remove(&id);
                tracing::info!("a lease of founders was not renewed and has ended");
            }
            return;
        }
        sleep_until(ends).await;
    }
}
