//! The founders of one database, and lending them.
//!
//! A founder rests in a savepoint of its transaction. Whoever borrows it works behind that savepoint and gives it back
//! by rolling back to it, which ends every lock that the work took and leaves the snapshot. A founder that is not
//! given back in order is brought to rest in the background; one whose session has died is gone, for on a standby
//! nobody can open another at the same point. On a primary one more is imported, as long as the *anchor* lives: the
//! session that exported the snapshot, which is never lent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::dump::Schema;
use super::session::{Session, has_code, quoted};
use super::types::{DatabasePlan, TablePlan, is_invalidated, point_lost};
use super::yielding::Given;
use crate::Server;

/// A span that gets no founder by then is refused; it may be asked for again.
const SPAN_WAIT: Duration = Duration::from_secs(30);

/// A founder that is not at rest by then is given up.
const REST_DEADLINE: Duration = Duration::from_secs(10);

/// A cancel request may get lost, or reach the statement behind the one it was meant for, so coming to rest is tried
/// again.
const REST_TRIES: usize = 3;

/// Begins a founder's transaction, without a snapshot yet.
pub(super) const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Where a founder rests.
pub(super) const REST: &str = "SAVEPOINT rest";

/// How it comes back there.
pub(super) const BACK_TO_REST: &str = "ROLLBACK TO SAVEPOINT rest";

/// Takes over an exported snapshot. Only ever on a primary: on a standby an importer can see wrong rows.
pub(super) async fn import(session: &Session, snapshot: &str) -> anyhow::Result<()> {
    session.run(BEGIN).await?;
    let taken = session.run(&format!("SET TRANSACTION SNAPSHOT '{snapshot}'")).await;
    taken.map_err(|error| match has_code(&error, &[SqlState::INVALID_PARAMETER_VALUE]) {
        // It is there as long as the session that exported it.
        true => PgError::new(SqlState::CONNECTION_FAILURE, "the session that exported the snapshot was lost").into(),
        false => error,
    })?;
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
    /// Those of the plan, by schema and name.
    pub(super) sequences: BTreeSet<(String, String)>,
    /// From which files large objects are read.
    pub(super) large_object_files: Option<String>,
    /// In which rows leave the server.
    pub(super) copy_encoding: String,
    /// None where another server's founders have it.
    pub(super) schema: Option<Schema>,
    pub(super) end: CancellationToken,
    /// Why it was given up, if it was.
    given_up: OnceLock<PgError>,
    anchor: Option<Anchor>,
    founders: Mutex<Founders>,
    /// Told to one waiter when a founder comes back, and to all when one is lost.
    freed: Notify,
    /// Whom way was given to.
    given: Mutex<Given>,
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
        plan: &DatabasePlan,
        schema: Option<Schema>,
        end: CancellationToken,
        crew: Crew,
    ) -> Self {
        let size = crew.founders.len();
        Self {
            server,
            job,
            database: plan.name.clone(),
            tables: plan.tables.iter().map(|table| (table.oid, table.clone())).collect(),
            sequences: plan.sequences.iter().map(|one| (one.schema.clone(), one.name.clone())).collect(),
            large_object_files: plan.large_object_files.clone(),
            copy_encoding: plan.copy_encoding.clone(),
            schema,
            end,
            given_up: OnceLock::new(),
            anchor: crew.anchor,
            founders: Mutex::new(Founders { idle: crew.founders, living: size, size }),
            freed: Notify::new(),
            given: Mutex::default(),
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
                return Err(PgError::new(SqlState::TOO_MANY_CONNECTIONS, message).into());
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
        if self.can_import() && founders.living < founders.size {
            founders.living += 1;
            return Next::Import;
        }
        if founders.living == 0 { Next::Lost } else { Next::Wait }
    }

    fn can_import(&self) -> bool {
        self.anchor.as_ref().is_some_and(|anchor| !anchor.session.is_closed())
    }

    /// Whether the point was taken on a primary, by a snapshot that founders import.
    pub(super) fn is_exported(&self) -> bool {
        self.anchor.is_some()
    }

    /// Whether reads of this table give way to those who wait for it, the first of whom comes first.
    pub(super) fn gives_way(&self, table: u32, waiting: &[String]) -> bool {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).gives_way(table, waiting)
    }

    /// Whether nothing can be read at the point any more.
    fn is_lost(&self) -> bool {
        let founders = self.founders.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = founders.idle.iter().filter(|session| session.is_closed()).count();
        founders.living == closed && !self.can_import()
    }

    /// What a founder's error means to whoever asked for the span. Replay ends a founder that is in its way with the
    /// code of a serialization failure, which would have a client begin its transaction anew; but it is the founder
    /// that is gone, and perhaps the point with it.
    fn meaning(&self, error: anyhow::Error, lives: bool) -> anyhow::Error {
        let Some(said) = PgError::of(&error).filter(|said| !is_invalidated(said)) else { return error };
        let is_conflict = [SqlState::SERIALIZATION_FAILURE, SqlState::DEADLOCK_DETECTED].contains(&said.code)
            || said.code.as_str().starts_with("57P0");
        let detail = format!("The server said: {}.", said.message);
        if (is_conflict || !lives) && self.is_lost() {
            return self.lost(&detail);
        }
        if is_conflict || !lives {
            let message = format!("a founder on {} was lost", self.server.address());
            return PgError::new(SqlState::CONNECTION_FAILURE, message).detail(detail).into();
        }
        if said.code == SqlState::QUERY_CANCELED {
            let message = format!("reading from database {} was interrupted", quoted(&self.database));
            return PgError::new(SqlState::OBJECT_IN_USE, message).detail(detail).into();
        }
        error
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

    /// Ends all its sessions; whoever reads, or comes to read, is told why.
    pub(super) fn give_up(&self, why: PgError) {
        // Only the first reason counts.
        drop(self.given_up.set(why));
        self.end.cancel();
    }

    /// That nothing can be read at the point any more.
    pub(super) fn lost(&self, detail: &str) -> anyhow::Error {
        if let Some(why) = self.given_up.get() {
            return why.clone().into();
        }
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

    /// The pool it is from.
    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Gives it back after an error; tells what the error means to whoever asked for the span, and whether the founder
    /// outlived it.
    pub(super) async fn failed(self, error: anyhow::Error) -> (anyhow::Error, bool) {
        let (pool, ended) = (self.pool.clone(), self.ended());
        let lives = self.give_back().await;
        (ended.unwrap_or_else(|| pool.meaning(error, lives)), lives)
    }

    /// Gives it back when its statements have ended; tells whether it lives.
    pub(super) async fn give_back(mut self) -> bool {
        // Should this be dropped midway, the session is still inside and goes the other way.
        let rested = match &self.session {
            Some(session) => rest(session, REST_DEADLINE).await,
            None => false,
        };
        self.settled = true;
        self.pool.take_back(self.session.take().filter(|_| rested));
        rested
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
                    let rested = rest(&session, REST_DEADLINE).await;
                    pool.take_back(Some(session).filter(|_| rested));
                });
            }
            _ => pool.take_back(None),
        }
    }
}

/// Brings a founder to rest; tells whether it is.
async fn rest(session: &Session, deadline: Duration) -> bool {
    for _ in 0..REST_TRIES {
        match timeout(deadline, session.run(BACK_TO_REST)).await {
            Ok(Ok(())) => return true,
            Ok(Err(_)) if session.is_closed() => return false,
            Ok(Err(_)) => {}
            // What keeps it from resting is still running.
            Err(_) => session.cancel().await,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::private::{Installation, Instance, RunAs, Settings};

    #[tokio::test]
    async fn a_founder_whose_statement_goes_on_is_brought_to_rest() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        std::fs::create_dir(dir.path().join("server")).unwrap();
        let (found, user) = (Installation::find().unwrap(), RunAs::choose().unwrap());
        let mut instance = Instance::new(found, user, &dir.path().join("server")).unwrap();
        instance.init("root", &Settings::new()).unwrap();
        instance.start("root", &dir.path().join("log")).await.unwrap();
        let (server, end) = (instance.server("root").unwrap(), CancellationToken::new());
        let session = Session::open(&server, "postgres", 7, &end).await.unwrap();
        session.run(&format!("{BEGIN}; {REST}")).await.unwrap();
        let sleeping = session.run("SELECT pg_sleep(60)");
        // Given up by its client, the statement still runs on the server.
        assert!(timeout(Duration::from_millis(100), sleeping).await.is_err());
        assert!(rest(&session, Duration::from_millis(500)).await);
        assert_eq!(session.row("SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);
        let child = instance.child().unwrap();
        child.start_kill().unwrap();
        child.wait().await.unwrap();
    }
}
