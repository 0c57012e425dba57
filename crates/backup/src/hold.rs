//! Tables that keep being changed are held still on the leaseholder while a standby is read.
//!
//! A standby cannot keep its primary from altering a table. After two points were spoilt, ACCESS SHARE is held there
//! on the tables in question: users read and write on, and what would spoil the third point waits. The standby is read
//! once it has replayed everything up to the lock. If the leaseholder's node does not match the job's filter, this is
//! all that happens there: no row is read, and no store is touched. Where the statement forbids the leaseholder's own
//! rows (`replica`, or a strict execution locality), it forbids this, too: then the job fails, and names the tables.
//!
//! The locks are sessions of the coordinator's, one for each database, and end with it; those of a coordinator that
//! is frozen end by themselves, because they have to be renewed. Which tables they were on stands in the job
//! ([`Spoilt`]), so whoever goes on with it holds them again before it reads, at the old point or at another.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use cluster::{Lsn, PeerSession, Peers, Purpose, spoken};
use fleet::founders::DatabasePlan;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::restore_text::identifier;

/// Points that may be spoilt before tables are held.
const SPOILT_MAX: u32 = 2;

/// A lock that is not had by then is not waited for: whoever waits behind it waits, too.
const LOCK_WAIT: &str = "10s";

/// Locks whose coordinator does not answer for so long go, in milliseconds for the server; they are renewed more often.
const IDLE_MAX_MS: u32 = 30_000;
const RENEW_EVERY: Duration = Duration::from_secs(10);

/// What a role may have set that would end what is held; one of the settings older servers do not have. The isolation is
/// that of every session of a node's, so no snapshot is kept.
const SETTINGS: &str = "
    SET statement_timeout = 0; SET idle_session_timeout = 0;
    SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'";

/// The leaseholder's answers, its wait for a lock included.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(20);

/// A standby that has not replayed up to the lock by then is read as it is.
const REPLAY_DEADLINE: Duration = Duration::from_secs(60);

/// A table that was changed while it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Table {
    database: String,
    oid: u32,
    schema: String,
    name: String,
}

/// What has spoilt a shard's points, as the job's next run finds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spoilt {
    /// How many points.
    points: u32,
    /// The tables, each by its last name.
    tables: Vec<Table>,
}

impl Spoilt {
    /// The key in the job under which it stands.
    pub(crate) fn key(shard: &str) -> String {
        format!("spoilt/{shard}")
    }

    /// One more lost its point, the `points`th that was spoilt, if that was because of these.
    pub(crate) fn add(&mut self, points: u32, tables: impl IntoIterator<Item = Table>) {
        self.points = self.points.max(points);
        for table in tables {
            self.tables.retain(|other| (&other.database, other.oid) != (&table.database, table.oid));
            self.tables.push(table);
        }
    }

    /// The tables that have to be held; there are none before enough points were spoilt.
    pub(crate) fn held(&self) -> &[Table] {
        if self.points >= SPOILT_MAX { &self.tables } else { &[] }
    }
}

/// Locks on a leaseholder; dropped, they are gone.
pub(crate) struct Held {
    _sessions: Vec<AbortOnDropHandle<()>>,
}

/// Holds these tables of one shard.
///
/// # Errors
///
/// The leaseholder cannot be reached, or a table cannot be locked in time.
pub(crate) async fn hold(peers: &Peers, shard: &str, tables: &[Table]) -> anyhow::Result<Held> {
    let view = peers.cluster().view();
    let leader = view.leader(shard).context("find the leaseholder")?;
    let mut databases: BTreeMap<&str, Vec<&Table>> = BTreeMap::new();
    for table in tables {
        databases.entry(&table.database).or_default().push(table);
    }
    let mut sessions = Vec::new();
    let mut reached = Lsn(0);
    for (database, tables) in databases {
        let purpose = Purpose::Server { database: database.to_owned() };
        let session = peers.dialer().dial(&leader.address, &purpose).await?;
        let position = lock(&session, tables).await.with_context(|| format!("hold tables of database {database}"))?;
        reached = reached.max(position);
        tracing::info!(shard, database, "tables are held on the leaseholder while a standby is read");
        sessions.push(AbortOnDropHandle::new(tokio::spawn(renew(session))));
    }
    until_replayed(peers, shard, reached).await;
    Ok(Held { _sessions: sessions })
}

/// Locks tables of one database; gives the position behind the last lock.
async fn lock(session: &PeerSession, tables: Vec<&Table>) -> anyhow::Result<Lsn> {
    let waits = format!("SET idle_in_transaction_session_timeout = {IDLE_MAX_MS}; SET lock_timeout = '{LOCK_WAIT}'");
    let names = tables.iter().map(|table| format!("{}.{}", identifier(&table.schema), identifier(&table.name)));
    let locks = names.map(|name| format!("LOCK TABLE ONLY {name} IN ACCESS SHARE MODE"));
    // Each a text of its own: one of several statements would be a transaction of the isolation that was set before it.
    for statement in [waits, SETTINGS.to_owned(), "BEGIN READ ONLY".to_owned()].into_iter().chain(locks) {
        let done = timeout(STATEMENT_DEADLINE, session.batch_execute(&statement)).await;
        done.context("wait for a lock")?.map_err(spoken).with_context(|| statement.clone())?;
    }
    let position = "SELECT pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text";
    let row = timeout(STATEMENT_DEADLINE, session.query_one(position, &[])).await;
    let row = row.context("wait for a position")?.map_err(spoken).context("read the leaseholder's position")?;
    Ok(row.get::<_, &str>(0).parse()?)
}

/// Keeps a session from being idle for too long, until it is lost: what is read then may be spoilt again, and that is found
/// out.
async fn renew(session: PeerSession) {
    loop {
        sleep(RENEW_EVERY).await;
        match timeout(STATEMENT_DEADLINE, session.batch_execute("")).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return tracing::warn!("tables are not held any more: {:#}", spoken(error)),
            Err(_) => return tracing::warn!("tables are not held any more: the leaseholder does not answer"),
        }
    }
}

/// That these tables keep changing, and the statement keeps them from being held; `last` is what spoilt the last point.
pub(crate) fn forbidden(shard: &str, tables: &[Table], last: &PgError) -> PgError {
    let names: Vec<String> =
        tables.iter().map(|table| format!("{}.{}.{}", table.database, table.schema, table.name)).collect();
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

/// Which planned tables a spoilt point's error is about, in the database that was read, if that is known.
pub(crate) fn tables_of(error: &PgError, read: Option<&str>, databases: &[DatabasePlan]) -> Vec<Table> {
    if error.code != SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE {
        return Vec::new();
    }
    let read = databases.iter().filter(|database| read.is_none_or(|read| read == database.name));
    let tables = read.flat_map(|database| {
        database.tables.iter().map(|table| Table {
            database: database.name.clone(),
            oid: table.oid,
            schema: table.schema.clone(),
            name: table.name.clone(),
        })
    });
    tables.filter(|table| error.message.contains(&format!("\"{}.{}\"", table.schema, table.name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests;

    fn table(oid: u32, name: &str) -> Table {
        Table { database: "shop".to_owned(), oid, schema: "public".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn tables_are_held_after_two_spoilt_points_and_by_their_last_names() {
        let mut spoilt = Spoilt::default();
        assert!(spoilt.held().is_empty());
        spoilt.add(1, [table(1, "one")]);
        assert!(spoilt.held().is_empty());
        spoilt.add(2, [table(1, "renamed"), table(2, "two")]);
        assert_eq!(spoilt.held(), [table(1, "renamed"), table(2, "two")]);
        // A third may be lost for another reason: what was held is held on.
        spoilt.add(2, []);
        assert_eq!(spoilt.held().len(), 2);
        let again: Spoilt = serde_json::from_value(serde_json::to_value(&spoilt).unwrap()).unwrap();
        assert_eq!(again, spoilt);
    }

    /// A table of the same name in another database is not in the way of anything.
    #[test]
    fn only_tables_of_the_database_that_was_read_are_held() {
        let users = [tests::table(1, "users"), tests::table(2, "rides")];
        let plans: Vec<DatabasePlan> = ["shop", "stock"]
            .map(|name| serde_json::from_value::<DatabasePlan>(tests::database(name, &users)).unwrap())
            .into();
        let message = "table \"public.users\" was changed while it was backed up";
        let changed = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
        let locked = PgError::new(SqlState::LOCK_NOT_AVAILABLE, message);
        for (error, read, expected) in [
            (&changed, Some("shop"), vec!["shop"]),
            (&changed, Some("stock"), vec!["stock"]),
            (&changed, None, vec!["shop", "stock"]),
            (&changed, Some("else"), vec![]),
            (&locked, Some("shop"), vec![]),
        ] {
            let held = tables_of(error, read, &plans);
            assert!(held.iter().all(|table| (table.oid, table.name.as_str()) == (1, "users")), "{held:?}");
            let databases: Vec<&str> = held.iter().map(|table| table.database.as_str()).collect();
            assert_eq!(databases, expected, "{read:?}");
        }
    }
}
