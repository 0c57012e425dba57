//! The connection to the registry that jobs are written and read through.
//!
//! It is another one than the membership's: a heartbeat must not wait behind a commit that a synchronous standby has
//! to confirm. It follows the registry when that moves, and LISTENs before it is used, so that whoever reads rows
//! after having seen it misses nothing.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cluster::registry::DATABASE;
use cluster::{Cluster, Dialer, PeerSession, Purpose, spoken};
use pgerror::{PgError, SqlState};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

/// Wait between tries to reach the registry.
const RETRY: Duration = Duration::from_millis(250);

/// How long a statement waits for a connection to the registry.
pub(crate) const CONNECTION_DEADLINE: Duration = Duration::from_secs(10);

/// How long a statement may take, the wait for a synchronous standby included.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(30);

/// Commits are as durable as the server's own settings make them; what a frozen node has begun ends on the server.
const SESSION_SETTINGS: &str = "
    SET lock_timeout = '5s'; SET statement_timeout = '25s'; SET idle_in_transaction_session_timeout = '10s';
    LISTEN backhaul_jobs";

/// The first to come to a registry that is new here writes down when. It does not wait for a synchronous standby.
const NOTE_INCARNATION: &str = "
    BEGIN; SET LOCAL synchronous_commit = local;
    INSERT INTO registry.incarnations (timeline, started)
    SELECT pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8), pg_catalog.pg_postmaster_start_time()
    WHERE NOT EXISTS (SELECT FROM registry.incarnations WHERE started = pg_catalog.pg_postmaster_start_time()
        AND timeline = pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8))
    ON CONFLICT DO NOTHING;
    COMMIT";

type Parameters<'p> = &'p [&'p (dyn ToSql + Sync)];

struct Shared {
    session: watch::Sender<Option<Arc<PeerSession>>>,
    bell: watch::Sender<u64>,
    /// Counts connections.
    connections: watch::Sender<u64>,
}

/// The handle; clones share one connection.
#[derive(Clone)]
pub struct Ledger(Arc<Shared>);

impl Default for Ledger {
    fn default() -> Self {
        let (session, bell, connections) =
            (watch::Sender::default(), watch::Sender::default(), watch::Sender::default());
        Self(Arc::new(Shared { session, bell, connections }))
    }
}

impl Ledger {
    /// Keeps the connection, for ever.
    pub async fn run(self, cluster: Cluster, dialer: Dialer) {
        let mut reported = String::new();
        loop {
            if let Err(error) = self.attend(&cluster, &dialer).await {
                let reason = format!("{error:#}");
                if reason != reported {
                    tracing::info!("jobs cannot reach the registry: {reason}");
                    reported = reason;
                }
            }
            self.0.session.send_replace(None);
            sleep(RETRY).await;
        }
    }

    async fn attend(&self, cluster: &Cluster, dialer: &Dialer) -> anyhow::Result<()> {
        let mut views = cluster.subscribe();
        let Some((beside, address)) = cluster.view().registry().map(|(node, _)| (node.instance, node.address.clone()))
        else {
            bail!("no server that holds the registry is known");
        };
        let session = dialer.dial(&address, &Purpose::Server { database: DATABASE.to_owned() }).await?;
        let ready = timeout(STATEMENT_DEADLINE, session.batch_execute(SESSION_SETTINGS)).await;
        ready.context("prepare the connection to the registry")?.map_err(spoken)?;
        let noted = timeout(STATEMENT_DEADLINE, session.batch_execute(NOTE_INCARNATION)).await;
        noted.context("note where the registry is")?.map_err(spoken)?;
        let mut notifications = session.notifications();
        self.0.session.send_replace(Some(Arc::new(session)));
        let mut given_up = self.0.session.subscribe();
        self.0.connections.send_modify(|count| *count += 1);
        self.ring();
        loop {
            tokio::select! {
                heard = notifications.changed() => match heard {
                    Ok(()) => self.ring(),
                    Err(_) => bail!("the connection to the registry was lost"),
                },
                late = given_up.wait_for(Option::is_none) => {
                    drop(late?);
                    bail!("the registry did not answer in time");
                }
                moved = views.wait_for(|view| view.registry().is_some_and(|(node, _)| node.instance != beside)) => {
                    moved?;
                    bail!("the registry has moved to another server");
                }
            }
        }
    }

    /// Wakes this node's own looks at the rows.
    pub(crate) fn ring(&self) {
        self.0.bell.send_modify(|count| *count += 1);
    }

    /// Changes whenever rows may have changed. Subscribe first, then read.
    pub fn bell(&self) -> watch::Receiver<u64> {
        self.0.bell.subscribe()
    }

    /// Changes with each new connection.
    pub(crate) fn connections(&self) -> watch::Receiver<u64> {
        self.0.connections.subscribe()
    }

    /// A session in the registry's database.
    ///
    /// # Errors
    ///
    /// 08006 when there is none before a deadline.
    pub async fn session(&self) -> anyhow::Result<Arc<PeerSession>> {
        let mut sessions = self.0.session.subscribe();
        let found = timeout(CONNECTION_DEADLINE, sessions.wait_for(Option::is_some)).await;
        match found {
            Ok(Ok(session)) => session.clone().context("take the session"),
            Ok(Err(_)) | Err(_) => Err(away()),
        }
    }

    /// Runs one statement, a transaction of its own.
    ///
    /// # Errors
    ///
    /// 08006 when the registry is not there, or does not answer in time: whether the statement was done is not known.
    pub async fn query(&self, statement: &str, parameters: Parameters<'_>) -> anyhow::Result<Vec<Row>> {
        let session = self.session().await?;
        match timeout(STATEMENT_DEADLINE, session.query(statement, parameters)).await {
            Ok(Ok(rows)) => Ok(rows),
            Ok(Err(error)) if is_passing(&error) => {
                tracing::info!("the registry was lost in a statement: {:#}", spoken(error));
                Err(away())
            }
            Ok(Err(error)) => Err(spoken(error)),
            Err(_) => {
                // A connection on which nothing comes back is not used again; `attend` opens another one. It may have
                // done so already: several statements wait on one.
                self.0.session.send_if_modified(|current| {
                    let is_it = current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &session));
                    if is_it {
                        *current = None;
                    }
                    is_it
                });
                Err(away())
            }
        }
    }

    /// Tells all nodes that rows have changed. A bell that does not ring costs a moment, so its failure is no error.
    pub async fn notify(&self) {
        if let Err(error) = self.query("SELECT pg_catalog.pg_notify('backhaul_jobs', '')", &[]).await {
            tracing::info!("could not ring for a job: {error:#}");
        }
    }
}

/// Whether the registry's server, or the node beside it, was lost or is being lost: the connection broke, it stops, it
/// is not the primary any more, or it did not get to the statement in time.
fn is_passing(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code().map(tokio_postgres::error::SqlState::code) else { return true };
    code.starts_with("08")
        || code.starts_with("57P")
        || code.starts_with("53")
        || ["25006", "55P03", "57014", "40001", "40P01"].contains(&code)
}

/// It is the registry that is away, and nothing that a job works on. A context in a chain; the reason is below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegistryAway;

impl fmt::Display for RegistryAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ask the registry")
    }
}

fn away() -> anyhow::Error {
    let error = PgError::new(SqlState::CONNECTION_FAILURE, "the registry cannot be reached")
        .detail("Jobs are kept in the database \"backhaul\" on the system shard's primary.")
        .hint("Try again; SHOW NODES tells which nodes are there.");
    anyhow::Error::new(error).context(RegistryAway)
}
