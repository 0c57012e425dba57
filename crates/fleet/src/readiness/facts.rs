//! What is known of one server; travels between nodes as JSON, and holds no secret.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// A server that could be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerFacts {
    /// Where it listens, for messages.
    pub address: String,
    /// Whether that is a socket file.
    #[serde(default)]
    pub is_local_socket: bool,
    /// The database that the node logs into, in which rights on functions are needed.
    pub database: String,
    /// `server_version_num`.
    pub version: i32,
    /// Its clock when it was asked.
    pub clock: DateTime<Utc>,
    /// The service role.
    pub role: RoleFacts,
    /// What only a standby has; `None` on a primary.
    pub standby: Option<StandbyFacts>,
    /// Its physical replication slots.
    pub slots: Vec<SlotFacts>,
    /// Settings that matter, by name, in their base units.
    pub settings: BTreeMap<String, String>,
    /// Those of them that the command line gives, which no file and no statement overrides.
    #[serde(default)]
    pub on_command_line: BTreeSet<String>,
    /// A superuser who may log in: the one that the server was made with, if that may.
    #[serde(default)]
    pub superuser: Option<String>,
    /// Clients' sessions, the node's own among them.
    pub sessions: i64,
    /// Its databases that take connections.
    pub databases: Vec<DatabaseFacts>,
    /// What `pg_hba.conf` says; `None` where the service role may not read it.
    pub hba: Option<HbaFacts>,
    /// A way in without a proof, if one was looked for and found.
    pub open_door: Option<String>,
    /// The programs on the node's host that are of no use for this server, or not there.
    pub programs: Vec<Program>,
}

impl ServerFacts {
    /// Whether it replays another server's WAL.
    pub fn in_recovery(&self) -> bool {
        self.standby.is_some()
    }

    /// A setting that is a number; 0 where the server does not know it.
    pub fn number(&self, name: &str) -> i64 {
        self.settings.get(name).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// The release, as people say it.
    pub fn release(&self) -> String {
        format!("{}.{}", self.version / 10_000, self.version % 10_000)
    }
}

/// What the service role is and may do; to a superuser everything is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleFacts {
    /// Its name.
    pub name: String,
    /// Whether it is a superuser.
    pub is_super: bool,
    /// Whether it has the rights of `pg_read_all_data`.
    pub reads_all: bool,
    /// Whether it has the rights of `pg_monitor`.
    pub monitors: bool,
    /// Whether row security leaves it alone.
    pub bypasses_rls: bool,
    /// Whether its sessions read all large objects.
    pub reads_large_objects: bool,
    /// Whether it may pause replay and resume it.
    pub may_pause: bool,
    /// Sessions that it may have; negative for any number.
    pub connection_limit: i32,
    /// Whether the role by which nodes restore is there.
    pub restorer_exists: bool,
    /// Whether that is a superuser.
    pub restorer_is_super: bool,
    /// Whether the service role may take it on.
    pub may_restore: bool,
}

/// What only a standby has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyFacts {
    /// What its WAL receiver does; `None` without one.
    pub receiver: Option<String>,
    /// The host it is to receive from, where that may be read.
    pub upstream_host: Option<String>,
    /// The port there.
    pub upstream_port: Option<String>,
    /// Whether a host and a port that are added to its connection string lead it there.
    #[serde(default)]
    pub may_be_led: bool,
    /// Whether it has replayed more of its timeline than its sender has of that one: it never follows from there.
    #[serde(default)]
    pub is_past_fork: bool,
    /// `not paused`, `pause requested` or `paused`.
    pub pause_state: String,
    /// Whether a backup has paused it just now.
    pub paused_by_backup: bool,
}

/// A physical replication slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotFacts {
    /// Its name.
    pub name: String,
    /// Whether a standby holds it now.
    pub active: bool,
    /// `reserved`, `extended`, `unreserved` or `lost`; `None` before its first use.
    pub wal_status: Option<String>,
    /// Bytes of WAL that are kept for it, on a primary.
    pub kept: Option<i64>,
}

/// A database that takes connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseFacts {
    /// Its name.
    pub name: String,
    /// Whether the service role may connect.
    pub may_connect: bool,
    /// Tables of users, each of which `pg_dump` locks; `None` where they were not counted.
    pub tables: Option<i64>,
}

/// What `pg_hba.conf` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HbaFacts {
    /// Lines that the server does not understand, with its words.
    pub broken: Vec<(i32, String)>,
    /// Whether a line lets a standby in that comes from the server's own host, as all do that stream through the node.
    pub replication: bool,
}

/// A program that should be there and is not, or is too old.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// What is wrong with it, as a clause.
    pub wrong: String,
}

/// A server that could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// Where it listens, for messages.
    pub address: String,
    /// Whether that is a socket file.
    pub is_local_socket: bool,
    /// The service role.
    pub user: String,
    /// The database that the node logs into.
    pub database: String,
    /// The SQLSTATE; empty when the server said nothing.
    pub code: String,
    /// Why, in the server's words or the system's.
    pub reason: String,
}
