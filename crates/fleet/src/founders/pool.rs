//! The founders of one database, and lending them.
//!
//! A founder rests in a savepoint of its transaction. Whoever borrows it works behind that savepoint and gives it back
//! by rolling back to it, which ends every lock that the work took and leaves the snapshot. A founder that is not
//! given back in order is brought to rest in the background; one whose session has died is gone, for on a standby
//! nobody can open another at the same point. On a primary one more is imported, as long as the *anchor* lives: the
//! session that exported the snapshot, which is never lent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::dump::Schema;
use super::session::{Session, quoted};
use super::types::{TablePlan, point_lost};
use crate::Server;

/// A span that gets no founder by then is refused; it may be asked for again.
const SPAN_WAIT: Duration = Duration::from_secs(30);

/// A founder that is not at rest by then is given up.
const REST_DEADLINE: Duration = Duration::from_secs(10);

/// A cancel request may reach the statement behind the one it was meant for, so coming to rest is tried again.
const REST_TRIES: usize = 2;

/// Begins a founder's transaction, without a snapshot yet.
pub(super) const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Where a founder rests.
pub(super) const REST: &str = "SAVEPOINT rest";

/// How it comes back there.
pub(super) const BACK_TO_REST: &str = "ROLLBACK TO SAVEPOINT rest";

/// Takes over an exported snapshot. Only ever on a primary: on a standby an importer can see wrong rows.
pub(super) async fn import(session: &Session, snapshot: &str) -> anyhow::Result<()> {
    session.run(BEGIN).await?;
    session.run(&format!("SET TRANSACTION SNAPSHOT '{snapshot}'")).await?;
    // Before this the snapshot is not held.
    session.run("SELECT 1").await?;
    session.run(REST).await
}

/// The session that exported the snapshot.
pub(super) struct Anchor {
    pub(super) session: Session,
    pub(super) snapshot: String,
}

/// The founders of one database.
pub(super) struct Pool {
    pub(super) server: Server,
    pub(super) job: i64,
    pub(super) database: String,
    pub(super) tables: BTreeMap<u32, TablePlan>,
    pub(super) schema: Schema,
    pub(super) end: CancellationToken,
    anchor: Option<Anchor>,
    founders: Mutex<Founders>,
    /// Told to one waiter when a founder comes back, and to all when one is lost.
    freed: Notify,
    /// Looks at the catalogs as they are now.
    guard: tokio::sync::Mutex<Arc<Session>>,
}

struct Founders {
    idle: Vec<Session>,
    /// Idle ones and lent ones.
    living: usize,
    /// How many there were at first, which are never exceeded.
    size: usize,
}

/// What a pool is made of.
pub(super) struct Crew {
    pub(super) founders: Vec<Session>,
    pub(super) anchor: Option<Anchor>,
    pub(super) guard: Session,
}

enum Next {
    Idle(Session),
    Import,
    Wait,
    Lost,
}

impl Pool {
    pub(super) fn new(
        server: Server,
        job: i64,
        database: String,
        tables: BTreeMap<u32, TablePlan>,
        schema: Schema,
        end: CancellationToken,
        crew: Crew,
    ) -> Self {
        let size = crew.founders.len();
        Self {
            server,
            job,
            database,
            tables,
            schema,
            end,
            anchor: crew.anchor,
            founders: Mutex::new(Founders { idle: crew.founders, living: size, size }),
            freed: Notify::new(),
            guard: tokio::sync::Mutex::new(Arc::new(crew.guard)),
        }
    }

    /// Waits for a founder.
    pub(super) async fn lend(self: &Arc<Self>) -> anyhow::Result<Lent> {
        let deadline = Instant::now() + SPAN_WAIT;
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            match self.next() {
                Next::Idle(session) => return Ok(Lent::new(Some(session), self.clone())),
                Next::Import => return self.import_another().await,
                Next::Lost => return Err(self.lost("None of its sessions on the server is left.")),
                Next::Wait => {}
            }
            if timeout_at(deadline, freed).await.is_err() {
                let message = format!("all readers of database {} are busy", quoted(&self.database));
                return Err(PgError::new(SqlState::OBJECT_IN_USE, message).into());
            }
        }
    }

    fn next(&self) -> Next {
        let mut founders = self.founders.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(session) = founders.idle.pop() {
            if !session.is_closed() {
                return Next::Idle(session);
            }
            founders.living -= 1;
        }
        let can_import = self.anchor.as_ref().is_some_and(|anchor| !anchor.session.is_closed());
        if can_import && founders.living < founders.size {
            founders.living += 1;
            return Next::Import;
        }
        if founders.living == 0 { Next::Lost } else { Next::Wait }
    }

    /// Opens a founder in the place of a lost one; its place has been counted already.
    async fn import_another(self: &Arc<Self>) -> anyhow::Result<Lent> {
        let mut lent = Lent::new(None, self.clone());
        let anchor = self.anchor.as_ref().context("import a snapshot without an anchor")?;
        let session = Session::open(&self.server, &self.database, self.job, &self.end).await?;
        import(&session, &anchor.snapshot).await?;
        lent.session = Some(session);
        Ok(lent)
    }

    /// That nothing can be read at the point any more.
    pub(super) fn lost(&self, detail: &str) -> anyhow::Error {
        let detail = if self.end.is_cancelled() { "Its lease has ended." } else { detail };
        point_lost(&self.server.address(), detail).into()
    }

    /// A session that sees the catalogs as they are now.
    pub(super) async fn guard(&self) -> anyhow::Result<Arc<Session>> {
        let mut guard = self.guard.lock().await;
        if guard.is_closed() {
            *guard = Arc::new(Session::open(&self.server, &self.database, self.job, &self.end).await?);
        }
        Ok(guard.clone())
    }

    fn take_back(&self, session: Option<Session>) {
        let mut founders = self.founders.lock().unwrap_or_else(PoisonError::into_inner);
        match session {
            Some(session) => {
                founders.idle.push(session);
                drop(founders);
                self.freed.notify_one();
            }
            None => {
                founders.living -= 1;
                drop(founders);
                tracing::info!("a founder in database {:?} is lost", self.database);
                self.freed.notify_waiters();
            }
        }
    }
}

/// A founder that is lent. Dropped, its statement is cancelled and it comes to rest in the background.
pub(super) struct Lent {
    /// `None` until it is open.
    session: Option<Session>,
    pool: Arc<Pool>,
    /// Whether the pool knows what has become of it.
    settled: bool,
}

impl Lent {
    fn new(session: Option<Session>, pool: Arc<Pool>) -> Self {
        Self { session, pool, settled: false }
    }

    pub(super) fn session(&self) -> anyhow::Result<&Session> {
        self.session.as_ref().context("use a founder that is not open")
    }

    /// Why it does not answer, if that is because its lease has ended.
    pub(super) fn ended(&self) -> Option<anyhow::Error> {
        self.pool.end.is_cancelled().then(|| self.pool.lost(""))
    }

    /// Gives it back when its statements have ended.
    pub(super) async fn give_back(mut self) {
        // Should this be dropped midway, the session is still inside and goes the other way.
        let rested = match &self.session {
            Some(session) => rest(session).await,
            None => false,
        };
        self.settled = true;
        self.pool.take_back(self.session.take().filter(|_| rested));
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let (pool, session) = (self.pool.clone(), self.session.take());
        match (session, tokio::runtime::Handle::try_current()) {
            (Some(session), Ok(runtime)) => {
                runtime.spawn(async move {
                    session.cancel().await;
                    let rested = rest(&session).await;
                    pool.take_back(Some(session).filter(|_| rested));
                });
            }
            _ => pool.take_back(None),
        }
    }
}

/// Brings a founder to rest; tells whether it is.
async fn rest(session: &Session) -> bool {
    for _ in 0..REST_TRIES {
        if matches!(timeout(REST_DEADLINE, session.run(BACK_TO_REST)).await, Ok(Ok(()))) {
            return true;
        }
    }
    false
}
