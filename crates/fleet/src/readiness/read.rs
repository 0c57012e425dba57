//! Reading what is known of a server, as its service role, with one query for each subject.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context as _;
use cluster::Lsn;
use pgerror::PgError;
use tokio::time::timeout;
use tokio_postgres::Client;

use super::facts::{Closed, DatabaseFacts, HbaFacts, Program, RoleFacts, ServerFacts, SlotFacts, StandbyFacts};
use crate::founders::session::within;
use crate::founders::{DATABASES_MAX, pg_dump_version};
use crate::loader::{RESTORE_ROLE, find_pg_restore};
use crate::{Server, door};

/// A server that has not told everything by then counts as one that does not answer.
const DEADLINE: Duration = Duration::from_secs(25);

/// A single question that takes longer fails.
const QUESTION_DEADLINE: Duration = Duration::from_secs(10);

/// A database whose tables are not counted by then is left uncounted.
const COUNT_DEADLINE: Duration = Duration::from_secs(3);

/// The oldest release whose catalogs these queries fit.
const VERSION_MIN: i32 = 140_000;

/// What is looked at in `pg_settings`; none of them can hold a secret.
const SETTINGS: [&str; 15] = [
    "data_checksums",
    "data_directory",
    "hot_standby_feedback",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_slot_wal_keep_size",
    "max_standby_streaming_delay",
    "old_snapshot_threshold",
    "primary_slot_name",
    "recovery_min_apply_delay",
    "reserved_connections",
    "superuser_reserved_connections",
    "wal_log_hints",
    "wal_receiver_status_interval",
];

const WHAT: &str = "
    SELECT pg_catalog.current_setting('server_version_num')::int, pg_catalog.pg_is_in_recovery(),
           pg_catalog.clock_timestamp(),
           (SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolsuper AND rolcanlogin ORDER BY oid LIMIT 1)";

/// From release 16 on a member may lack the right to take a role.
const ROLE: &str = "
    SELECT r.rolname::text, r.rolsuper,
           pg_catalog.pg_has_role('pg_read_all_data', 'USAGE'), pg_catalog.pg_has_role('pg_monitor', 'USAGE'),
           r.rolbypassrls, pg_catalog.current_setting('lo_compat_privileges')::bool,
           pg_catalog.has_function_privilege('pg_catalog.pg_wal_replay_pause()', 'EXECUTE')
           AND pg_catalog.has_function_privilege('pg_catalog.pg_wal_replay_resume()', 'EXECUTE'),
           r.rolconnlimit, restorer.oid IS NOT NULL, coalesce(restorer.rolsuper, false),
           coalesce(pg_catalog.pg_has_role(restorer.oid,
               CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END),
               false)
    FROM pg_catalog.pg_roles r LEFT JOIN pg_catalog.pg_roles restorer ON restorer.rolname = $1
    WHERE r.rolname = current_user";

/// Of the connection string only the place: it may hold a password, which stays on the server. Of words that are given
/// twice the last one counts. A WAL receiver waits at the end of a timeline; what its sender has of that one is the last
/// that it was told.
const STANDBY: &str = "
    SELECT (SELECT status FROM pg_catalog.pg_stat_wal_receiver),
           substring(c.conninfo from '.*\\mhost=''?([^'' ]+)'), substring(c.conninfo from '.*\\mport=''?([0-9]+)'),
           coalesce(c.conninfo ~ '\\muser=' AND c.conninfo !~ '\\mhostaddr=|://', false),
           EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver WHERE status IN ('waiting', 'restarting')
                   AND latest_end_lsn < pg_catalog.pg_last_wal_replay_lsn()),
           pg_catalog.pg_get_wal_replay_pause_state(),
           EXISTS (SELECT FROM pg_catalog.pg_stat_activity
                   WHERE application_name LIKE 'backhaul job %' AND query LIKE '%pg_wal_replay_pause()%'
                         AND pid <> pg_catalog.pg_backend_pid())
    FROM (SELECT (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'primary_conninfo') AS conninfo) c";

const SLOTS: &str = "
    SELECT slot_name::text, active, wal_status, restart_lsn::text,
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE pg_catalog.pg_current_wal_lsn() END::text
    FROM pg_catalog.pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary ORDER BY slot_name";

const SESSIONS: &str = "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend'";

const DATABASES: &str = "
    SELECT datname::text, pg_catalog.has_database_privilege(oid, 'CONNECT') FROM pg_catalog.pg_database
    WHERE datallowconn AND NOT datistemplate AND datconnlimit <> -2 ORDER BY datname";

/// What `pg_dump` locks.
const TABLES: &str = "SELECT count(*) FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p') AND oid >= 16384";

const MAY_READ_HBA: &str = "
    SELECT pg_catalog.has_function_privilege('pg_catalog.pg_hba_file_rules()', 'EXECUTE')
           AND pg_catalog.has_table_privilege('pg_catalog.pg_hba_file_rules', 'SELECT')";

const BROKEN_HBA: &str =
    "SELECT line_number, error FROM pg_catalog.pg_hba_file_rules WHERE error IS NOT NULL ORDER BY line_number";

const REPLICATION_HBA: &str = "
    SELECT EXISTS (SELECT FROM pg_catalog.pg_hba_file_rules
                   WHERE error IS NULL AND 'replication' = ANY (database) AND auth_method <> 'reject'
                         AND CASE WHEN $1 THEN type = 'local'
                             ELSE type IN ('host', 'hostnossl')
                                  AND (address IN ('all', 'samehost', 'samenet', 'localhost', '::1', '0.0.0.0', '::')
                                       OR address LIKE '127.%') END)";

/// Asks `server` everything; `look_at_door` also knocks at it without a proof, which leaves lines in its log.
///
/// # Errors
///
/// It does not let the service role in, does not answer in time, or is older than release 14.
pub async fn read(server: &Server, look_at_door: bool) -> Result<ServerFacts, Closed> {
    let closed = |code: &str, reason: String| Closed {
        address: server.address(),
        is_local_socket: server.is_local_socket(),
        user: server.user().to_owned(),
        database: server.database().to_owned(),
        code: code.to_owned(),
        reason,
    };
    let asking = Box::pin(async {
        let (client, _connection) = server.session().await.map_err(|error| refusal(&error))?;
        let facts = facts(server, &client, look_at_door).await;
        facts.map_err(|error| {
            let code = PgError::of(&error).map_or(String::new(), |said| said.code.as_str().to_owned());
            (code, format!("{error:#}"))
        })
    });
    match timeout(DEADLINE, asking).await {
        Ok(Ok(facts)) => Ok(facts),
        Ok(Err((code, reason))) => Err(closed(&code, reason)),
        Err(_) => Err(closed("", format!("no answer within {} seconds", DEADLINE.as_secs()))),
    }
}

/// A login's failure: SQLSTATE and words.
fn refusal(error: &tokio_postgres::Error) -> (String, String) {
    match error.as_db_error() {
        Some(said) => {
            let detail = said.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
            (said.code().code().to_owned(), format!("{}{detail}", said.message()))
        }
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            (String::new(), format!("{error}{cause}"))
        }
    }
}

async fn facts(server: &Server, client: &Client, look_at_door: bool) -> anyhow::Result<ServerFacts> {
    let what = within(QUESTION_DEADLINE, client.query_one(WHAT, &[])).await.context("ask what the server is")?;
    let (version, in_recovery): (i32, bool) = (what.get(0), what.get(1));
    if version < VERSION_MIN {
        anyhow::bail!("PostgreSQL {} is too old; backups need release 14 or newer", version / 10_000);
    }
    let sessions = within(QUESTION_DEADLINE, client.query_one(SESSIONS, &[])).await.context("count sessions")?;
    let (settings, on_command_line) = settings(client).await.context("read the settings")?;
    let standby = if in_recovery { Some(standby(client).await.context("ask how the standby follows")?) } else { None };
    let open_door = if look_at_door { open_door(server, client).await } else { None };
    Ok(ServerFacts {
        address: server.address(),
        is_local_socket: server.is_local_socket(),
        database: server.database().to_owned(),
        version,
        clock: what.get(2),
        role: role(client).await.context("ask what the service role may do")?,
        standby,
        slots: slots(client).await.context("read the replication slots")?,
        settings,
        on_command_line,
        superuser: what.get(3),
        sessions: sessions.get(0),
        databases: databases(server, client).await.context("look at the databases")?,
        hba: hba(server, client).await.context("read the rules of pg_hba.conf")?,
        open_door,
        programs: programs(version).await,
    })
}

async fn role(client: &Client) -> anyhow::Result<RoleFacts> {
    let row = within(QUESTION_DEADLINE, client.query_one(ROLE, &[&RESTORE_ROLE])).await?;
    Ok(RoleFacts {
        name: row.get(0),
        is_super: row.get(1),
        reads_all: row.get(2),
        monitors: row.get(3),
        bypasses_rls: row.get(4),
        reads_large_objects: row.get(5),
        may_pause: row.get(6),
        connection_limit: row.get(7),
        restorer_exists: row.get(8),
        restorer_is_super: row.get(9),
        may_restore: row.get(10),
    })
}

async fn standby(client: &Client) -> anyhow::Result<StandbyFacts> {
    let row = within(QUESTION_DEADLINE, client.query_one(STANDBY, &[])).await?;
    Ok(StandbyFacts {
        receiver: row.get(0),
        upstream_host: row.get(1),
        upstream_port: row.get(2),
        may_be_led: row.get(3),
        is_past_fork: row.get(4),
        pause_state: row.get(5),
        paused_by_backup: row.get(6),
    })
}

async fn slots(client: &Client) -> anyhow::Result<Vec<SlotFacts>> {
    let rows = within(QUESTION_DEADLINE, client.query(SLOTS, &[])).await?;
    let lsn = |text: Option<&str>| text.and_then(|text| text.parse::<Lsn>().ok());
    let kept = |from: Option<Lsn>, to: Option<Lsn>| i64::try_from(to?.0.saturating_sub(from?.0)).ok();
    let slots = rows.iter().map(|row| SlotFacts {
        name: row.get(0),
        active: row.get(1),
        wal_status: row.get(2),
        kept: kept(lsn(row.get(3)), lsn(row.get(4))),
    });
    Ok(slots.collect())
}

/// The settings, and the names of those that the command line gives.
async fn settings(client: &Client) -> anyhow::Result<(BTreeMap<String, String>, BTreeSet<String>)> {
    let query = "
        SELECT name, setting, source = 'command line' FROM pg_catalog.pg_settings
        WHERE name = ANY ($1) AND setting IS NOT NULL";
    let rows = within(QUESTION_DEADLINE, client.query(query, &[&SETTINGS.as_slice()])).await?;
    let given = rows.iter().filter(|row| row.get(2)).map(|row| row.get(0)).collect();
    Ok((rows.iter().map(|row| (row.get(0), row.get(1))).collect(), given))
}

/// A database that goes away meanwhile, or is full, is one whose tables are not counted.
async fn databases(server: &Server, client: &Client) -> anyhow::Result<Vec<DatabaseFacts>> {
    let rows = within(QUESTION_DEADLINE, client.query(DATABASES, &[])).await?;
    let mut databases = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let (name, may_connect): (String, bool) = (row.get(0), row.get(1));
        // Of more than a backup can hold, the names must do.
        let tables = if may_connect && index < DATABASES_MAX { tables(server, &name).await } else { None };
        databases.push(DatabaseFacts { name, may_connect, tables });
    }
    Ok(databases)
}

async fn tables(server: &Server, database: &str) -> Option<i64> {
    let counting = async {
        let (client, _connection) = server.session_in(database).await?;
        // The database's owner may have put operators of their own in front.
        client.batch_execute("SET search_path = pg_catalog").await?;
        Ok::<i64, tokio_postgres::Error>(client.query_one(TABLES, &[]).await?.get(0))
    };
    timeout(COUNT_DEADLINE, counting).await.ok()?.ok()
}

async fn hba(server: &Server, client: &Client) -> anyhow::Result<Option<HbaFacts>> {
    if !within(QUESTION_DEADLINE, client.query_one(MAY_READ_HBA, &[])).await?.get::<_, bool>(0) {
        return Ok(None);
    }
    let broken = within(QUESTION_DEADLINE, client.query(BROKEN_HBA, &[])).await?;
    let is_local = server.is_local_socket();
    let replication = within(QUESTION_DEADLINE, client.query_one(REPLICATION_HBA, &[&is_local])).await?.get(0);
    Ok(Some(HbaFacts { broken: broken.iter().map(|row| (row.get(0), row.get(1))).collect(), replication }))
}

/// A server that is full, say, refuses to tell; the node itself knocks again and again.
async fn open_door(server: &Server, client: &Client) -> Option<String> {
    let found = match door::check(server).await {
        Ok(None) => door::open_rule(server, client).await,
        found => found,
    };
    found
        .unwrap_or_else(|error| {
            tracing::info!("the ways into the server could not be looked at: {error:#}");
            None
        })
        .map(|open| open.found)
}

/// The programs of PostgreSQL that backups and restores of this server lack on this host.
async fn programs(version: i32) -> Vec<Program> {
    let mut lacking = Vec::new();
    let mut lacks = |name: &str, error: anyhow::Error| {
        let wrong = PgError::of(&error).map_or_else(|| format!("{error:#}"), |said| said.message.clone());
        lacking.push(Program { name: name.to_owned(), wrong });
    };
    if let Err(error) = pg_dump_version(version).await {
        lacks("pg_dump", error);
    }
    if let Err(error) = find_pg_restore(version.unsigned_abs() / 10_000).await {
        lacks("pg_restore", error);
    }
    lacking
}
