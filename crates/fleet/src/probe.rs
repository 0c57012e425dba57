//! Asking the server beside this node what it is, without end.

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use cluster::{Downstream, Lsn, Replay, ServerInfo, ServerState, Upstream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use crate::disk::DataDirectory;
use crate::{Server, door};

/// Time between two questions: an upper bound on how late a promotion is noticed.
const PERIOD: Duration = Duration::from_millis(200);

/// A server that takes longer to answer counts as down.
const ANSWER_DEADLINE: Duration = Duration::from_secs(3);

/// A server that takes connections but does not finish a login by then counts as down.
const LOGIN_DEADLINE: Duration = Duration::from_secs(10);

/// Wait after a login that the server refused; what is amiss takes an operator to mend.
const REFUSED_WAIT: Duration = Duration::from_secs(1);

/// How often the ways in are looked at again. Each look leaves lines in the server's log.
const DOOR_PERIOD: Duration = Duration::from_secs(60);

/// How often it is looked how much room its disk has.
const FREE_PERIOD: Duration = Duration::from_secs(2);

/// Whether clients may be relayed to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Door {
    /// Not looked at since the server was last away.
    Unchecked,
    /// Everybody who comes in has to prove who they are, or the operator said not to look.
    Guarded,
}

/// The task that asks.
pub struct Probe {
    /// The server to ask.
    pub server: Server,
    /// Whether to leave the door unchecked (`--insecure`).
    pub insecure: bool,
    /// Where the outcome of the door check goes.
    pub door: watch::Sender<Door>,
}

impl Probe {
    /// Asks until the door is found open; hands every answer to `report`.
    ///
    /// # Errors
    ///
    /// The server lets in whoever comes from this host: the node must not stand in front of it.
    pub async fn run(self, report: impl Fn(ServerInfo)) -> anyhow::Error {
        if self.insecure {
            self.door.send_replace(Door::Guarded);
        }
        let mut checked = None;
        loop {
            let error = match self.attend(&mut checked, &report).await {
                Ok(open) => {
                    return anyhow!(
                        "{}; a node in front of it would let in everybody, so it does not run (use scram-sha-256, or \
                         --insecure on a host that only you reach)",
                        open.found
                    );
                }
                Err(error) => error,
            };
            let refused = error.downcast_ref::<Refused>().is_some();
            report(ServerInfo::Down { reason: format!("{error:#}") });
            sleep(if refused { REFUSED_WAIT } else { PERIOD }).await;
        }
    }

    /// One session with the server, from login to loss. `checked` is when the door was last found shut.
    async fn attend(
        &self,
        checked: &mut Option<Instant>,
        report: &impl Fn(ServerInfo),
    ) -> anyhow::Result<door::OpenDoor> {
        if self.is_due(*checked) {
            self.door.send_replace(Door::Unchecked);
            // Before the login, which may not be possible yet: clients do not wait for the service role.
            if let Some(open) = door::check(&self.server).await? {
                return Ok(open);
            }
            *checked = Some(Instant::now());
            self.door.send_replace(Door::Guarded);
        }
        let login = timeout(LOGIN_DEADLINE, self.server.session()).await.context("log into the server")?;
        let (client, _connection) = login.map_err(refused)?;
        let directory = DataDirectory::of(&client).await;
        let mut free = (Instant::now(), directory.free().await);
        let mut rules_read = None;
        let mut paused_before = false;
        loop {
            if self.is_due(rules_read) {
                // The first time right after the knocking above; then both, for rules change with a reload, too.
                if rules_read.is_some() {
                    match door::check(&self.server).await {
                        Ok(Some(open)) => return Ok(open),
                        Ok(None) => {}
                        // A server that is full, say, is not down: this session still hears it. The next look tells.
                        Err(error) => tracing::info!("the ways into the server could not be looked at: {error:#}"),
                    }
                }
                rules_read = Some(Instant::now());
                if let Some(open) = door::open_rule(&self.server, &client).await? {
                    return Ok(open);
                }
            }
            let mut state = timeout(ANSWER_DEADLINE, ask(&client)).await.context("ask the server what it is")??;
            // Seen twice: a pause for a point may begin or end between two looks of one statement.
            let paused = std::mem::replace(&mut paused_before, state.replay.paused);
            state.replay.paused &= paused;
            if free.0.elapsed() >= FREE_PERIOD {
                free = (Instant::now(), directory.free().await);
            }
            state.replay.free = free.1.filter(|_| state.in_recovery);
            report(ServerInfo::Up(state));
            // Once it was up and is lost, it may come back with other rules.
            *checked = None;
            sleep(PERIOD).await;
        }
    }

    fn is_due(&self, last: Option<Instant>) -> bool {
        !self.insecure && last.is_none_or(|at| at.elapsed() >= DOOR_PERIOD)
    }
}

/// The server is there and does not let the service role in.
#[derive(Debug, thiserror::Error)]
#[error("log into the server as the service role: {0}")]
struct Refused(String);

fn refused(error: tokio_postgres::Error) -> anyhow::Error {
    let is_refusal = error.as_db_error().is_some_and(|said| *said.code() != SqlState::CANNOT_CONNECT_NOW);
    let words = spoken(error);
    if is_refusal { Refused(format!("{words:#}")).into() } else { words.context("log into the server") }
}

const STATE: &str = "
    SELECT pg_catalog.pg_is_in_recovery(),
           (SELECT system_identifier FROM pg_catalog.pg_control_system())::text,
           pg_catalog.current_setting('server_version_num')::int,
           CASE WHEN pg_catalog.pg_is_in_recovery()
                THEN coalesce((SELECT received_tli FROM pg_catalog.pg_stat_wal_receiver),
                              (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()))
                ELSE ('x' || substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8))::bit(32)::int
           END,
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                ELSE pg_catalog.pg_current_wal_lsn() END::text,
           (SELECT pg_catalog.shobj_description(oid, 'pg_database') FROM pg_catalog.pg_database
            WHERE datname = 'backhaul' AND datdba = (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user)),
           (SELECT status FROM pg_catalog.pg_stat_wal_receiver),
           (SELECT slot_name FROM pg_catalog.pg_stat_wal_receiver),
           (SELECT conninfo FROM pg_catalog.pg_stat_wal_receiver),
           pg_catalog.current_setting('cluster_name'),
           CASE WHEN pg_catalog.pg_is_in_recovery()
                THEN pg_catalog.pg_is_wal_replay_paused() AND NOT EXISTS (
                    SELECT FROM pg_catalog.pg_stat_activity
                    WHERE application_name LIKE 'backhaul job %' AND usename = current_user AND state = 'active'
                      AND query LIKE '%pg_wal_replay_pause()%')
                ELSE false END,
           nullif(pg_catalog.current_setting('recovery_min_apply_delay'), '0'),
           pg_catalog.current_setting('hot_standby_feedback')::bool,
           pg_catalog.has_function_privilege('pg_catalog.pg_wal_replay_pause()', 'EXECUTE')
           AND pg_catalog.has_function_privilege('pg_catalog.pg_wal_replay_resume()', 'EXECUTE')";

/// Of other roles' standbys only names are shown to a role without `pg_monitor`. Whether commits wait for them is unknown
/// then, which is not the same as that they do not.
const DOWNSTREAM: &str = "
    SELECT r.application_name, s.slot_name::text, coalesce(r.sync_state, 'unknown'), coalesce(r.state, 'unknown')
    FROM pg_catalog.pg_stat_replication r LEFT JOIN pg_catalog.pg_replication_slots s ON s.active_pid = r.pid
    WHERE r.state IS DISTINCT FROM 'backup' ORDER BY r.application_name, r.pid";

async fn ask(client: &Client) -> anyhow::Result<ServerState> {
    let row = client.query_one(STATE, &[]).await.map_err(spoken)?;
    let downstream = client.query(DOWNSTREAM, &[]).await.map_err(spoken)?;
    let Some(system_identifier) = row.get(1) else { bail!("the server has no system identifier") };
    let in_recovery: bool = row.get(0);
    let lsn: Option<&str> = row.get(4);
    let status: Option<String> = row.get(6);
    let upstream = in_recovery.then(|| Upstream {
        application_name: listed(&application_name(row.get(8), row.get(9)), row.get(2)),
        slot: row.get(7),
        status: status.unwrap_or_else(|| "not receiving".to_owned()),
    });
    Ok(ServerState {
        system_identifier,
        version: row.get(2),
        in_recovery,
        timeline: row.get::<_, i32>(3).unsigned_abs(),
        lsn: lsn.and_then(|text| text.parse().ok()).unwrap_or(Lsn(0)),
        registry: row.get::<_, Option<&str>>(5).and_then(registry_of),
        upstream,
        downstream: downstream
            .iter()
            .map(|row| Downstream {
                application_name: row.get(0),
                slot: row.get(1),
                sync_state: row.get(2),
                state: row.get(3),
            })
            .collect(),
        replay: Replay {
            paused: row.get(10),
            delay: row.get::<_, Option<String>>(11).filter(|_| in_recovery),
            feedback: in_recovery && row.get(12),
            may_pause: in_recovery && row.get(13),
            free: None,
        },
    })
}

/// What the comment on the registry's database begins with; the cluster's id follows. `init` writes it last, so it
/// says that the registry is whole. Only a database that the service role owns counts: anybody who may create a
/// database could write such a comment.
pub const REGISTRY_MARK: &str = "backhaul cluster ";

fn registry_of(comment: &str) -> Option<Uuid> {
    comment.strip_prefix(REGISTRY_MARK)?.parse().ok()
}

/// The name under which a standby is listed by its sender: `application_name` of its connection string, else
/// `cluster_name`, else `walreceiver` (PostgreSQL's documentation of `primary_conninfo`).
///
/// `pg_stat_wal_receiver` shows that string with nothing quoted, so a name may have blanks and equals signs in it. It is
/// followed by what the receiver itself gives as a fallback, which libpq lists next.
fn application_name(conninfo: Option<&str>, cluster_name: Option<&str>) -> String {
    let conninfo = format!(" {}", conninfo.unwrap_or_default());
    let given = conninfo.split_once(" application_name=").map(|(_, rest)| {
        let next = rest.find(" fallback_application_name=").or_else(|| rest.find(char::is_whitespace));
        &rest[..next.unwrap_or(rest.len())]
    });
    let cluster_name = cluster_name.filter(|name| !name.is_empty());
    given.filter(|name| !name.is_empty()).or(cluster_name).unwrap_or("walreceiver").to_owned()
}

/// A name as `pg_stat_replication` shows it: what is not printable ASCII is replaced, from version 16 on by its bytes in
/// hexadecimal digits, and what is longer than an identifier is cut off (PostgreSQL's documentation of `application_name`).
fn listed(name: &str, version: i32) -> String {
    const LEN_MAX: usize = 63;
    let printed = |byte: u8| match byte {
        b' '..=b'~' => char::from(byte).to_string(),
        _ if version >= 160_000 => format!("\\x{byte:02x}"),
        _ => "?".to_owned(),
    };
    let mut listed: String = name.bytes().map(printed).collect();
    listed.truncate(LEN_MAX);
    listed
}

/// tokio-postgres prints a server's error as "db error"; the words are in its source.
fn spoken(error: tokio_postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(said) => anyhow!("{} ({})", said.message(), said.code().code()),
        None => anyhow::Error::new(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_is_listed_under_the_name_it_gives() {
        for (conninfo, cluster_name, name) in [
            (Some("user=r application_name=n2 host=/tmp"), Some("c"), "n2"),
            (Some("user=r host=/tmp"), Some("c"), "c"),
            (Some("user=r application_name= host=/tmp"), Some(""), "walreceiver"),
            (None, None, "walreceiver"),
            (Some("application_name=n2"), None, "n2"),
            // As PostgreSQL 15 shows it.
            (
                Some(
                    "user=r host=/tmp application_name=my 'st= andby fallback_application_name=walreceiver sslmode=prefer",
                ),
                None,
                "my 'st= andby",
            ),
            (Some("host=/tmp fallback_application_name=c sslmode=prefer"), Some("c"), "c"),
        ] {
            assert_eq!(application_name(conninfo, cluster_name), name);
        }
    }

    #[test]
    fn a_name_is_compared_as_it_is_listed() {
        let long = "n".repeat(70);
        for (name, version, expected) in [
            ("my standby", 150_000, "my standby"),
            ("n\u{e4}h", 150_000, "n??h"),
            ("n\u{e4}h", 160_000, "n\\xc3\\xa4h"),
            (&long, 150_000, &long[..63]),
        ] {
            assert_eq!(listed(name, version), expected);
        }
    }

    #[test]
    fn only_the_mark_makes_a_registry() {
        let id = Uuid::new_v4();
        assert_eq!(registry_of(&format!("{REGISTRY_MARK}{id}")), Some(id));
        assert_eq!(registry_of("somebody's own comment"), None);
    }
}
