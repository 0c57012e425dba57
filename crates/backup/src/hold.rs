//! Tables that keep being changed are held still on the leaseholder while a standby is read.
//!
//! A standby cannot keep its primary from altering a table. After two points were spoilt, ACCESS SHARE is held there
//! on the tables in question: users read and write on, and what would spoil the third point waits. The standby is read
//! once it has replayed everything up to the lock. If the leaseholder's node does not match the job's filter, this is
//! all that happens there: no row is read, and no store is touched. Where the statement forbids the leaseholder's own
//! rows (`replica`, or a strict execution locality), it forbids this, too: then the job fails, and names the tables.

use std::time::Duration;

use anyhow::Context as _;
use cluster::{Lsn, PeerSession, Peers, Purpose, spoken};
use fleet::founders::TablePlan;
use pgerror::{PgError, SqlState};
use tokio::time::timeout;

use crate::restore_text::identifier;

/// Points that may be spoilt before tables are held.
pub(crate) const SPOILT_MAX: u32 = 2;

/// A lock that is not had by then is not waited for: whoever waits behind it waits, too.
const LOCK_WAIT: &str = "10s";

/// The leaseholder's answers, its wait for a lock included.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(20);

/// A standby that has not replayed up to the lock by then is read as it is.
const REPLAY_DEADLINE: Duration = Duration::from_secs(60);

/// Locks on a leaseholder; dropped, they are gone.
pub(crate) struct Held {
    _sessions: Vec<PeerSession>,
}

/// Holds these tables of one shard, by database.
///
/// # Errors
///
/// The leaseholder cannot be reached, or a table cannot be locked in time.
pub(crate) async fn hold(peers: &Peers, shard: &str, tables: &[(String, TablePlan)]) -> anyhow::Result<Held> {
    let view = peers.cluster().view();
    let leader = view.leader(shard).context("find the leaseholder")?;
    let mut sessions = Vec::new();
    let mut reached = Lsn(0);
    for (database, table) in tables {
        let purpose = Purpose::Server { database: database.clone() };
        let session = peers.dialer().dial(&leader.address, &purpose).await?;
        let name = format!("{}.{}", identifier(&table.schema), identifier(&table.name));
        let lock = format!(
            "SET idle_in_transaction_session_timeout = 0; SET lock_timeout = '{LOCK_WAIT}'; BEGIN READ ONLY;
             LOCK TABLE ONLY {name} IN ACCESS SHARE MODE"
        );
        let locked = timeout(STATEMENT_DEADLINE, session.batch_execute(&lock)).await;
        locked.context("hold a table")?.map_err(spoken).with_context(|| format!("hold table {name}"))?;
        let position = "SELECT pg_catalog.pg_current_wal_insert_lsn()::text";
        let row = timeout(STATEMENT_DEADLINE, session.query_one(position, &[])).await;
        let row = row.context("read a position")?.map_err(spoken).context("read the leaseholder's position")?;
        reached = reached.max(row.get::<_, &str>(0).parse()?);
        tracing::info!(shard, table = name, "held on the leaseholder while a standby is read");
        sessions.push(session);
    }
    until_replayed(peers, shard, reached).await;
    Ok(Held { _sessions: sessions })
}

/// That these tables keep changing, and the statement keeps them from being held; `last` is what spoilt the last point.
pub(crate) fn forbidden(shard: &str, tables: &[(String, TablePlan)], last: &PgError) -> PgError {
    let names: Vec<String> =
        tables.iter().map(|(name, table)| format!("{name}.{}.{}", table.schema, table.name)).collect();
    let message = format!("tables of shard \"{shard}\" keep changing while they are read: {}", names.join(", "));
    let last = last.detail.as_deref().unwrap_or(&last.message);
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
        .detail(format!("The statement forbids to hold them on the leaseholder. At last: {last}"))
        .hint("Alter no tables while they are read, or leave out STRICT EXECUTION LOCALITY or replica.")
}

/// Waits until every server of the shard that answers has replayed up to `position`.
async fn until_replayed(peers: &Peers, shard: &str, position: Lsn) {
    let mut views = peers.cluster().subscribe();
    // A position is no news by itself: it comes with the next answer of each node.
    let replayed = async {
        loop {
            let behind = |info: &cluster::NodeInfo| {
                info.shard == shard && info.server_state().is_some_and(|server| server.lsn < position)
            };
            if !peers.cluster().view().nodes.values().any(|known| known.reachable && behind(&known.info)) {
                return;
            }
            let _ = timeout(Duration::from_millis(200), views.changed()).await;
        }
    };
    if timeout(REPLAY_DEADLINE, replayed).await.is_err() {
        tracing::info!(shard, "a standby has not replayed up to the lock");
    }
}

/// Which planned table a spoilt point's error is about.
pub(crate) fn table_of<'p>(
    error: &PgError,
    databases: &'p [fleet::founders::DatabasePlan],
) -> impl Iterator<Item = (String, TablePlan)> + use<'p> {
    let message = error.message.clone();
    let is_meant = move |table: &TablePlan| message.contains(&format!("\"{}.{}\"", table.schema, table.name));
    let spoilt = error.code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    databases
        .iter()
        .flat_map(|database| database.tables.iter().map(|table| (database.name.clone(), table.clone())))
        .filter(move |(_, table)| spoilt && is_meant(table))
}
