//! What a node says of itself.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Locality;
use crate::leader::ShardFloor;

/// A node's number in its fleet, given once by the registry and kept in the node's store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub i32);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position in a PostgreSQL server's WAL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (high, low) = text.split_once('/').unwrap_or(("", text));
        Ok(Self((u64::from_str_radix(high, 16)? << 32) | u64::from_str_radix(low, 16)?))
    }
}

/// A node's answer to *who are you*.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// This process; a restarted node is another instance of the same node.
    pub instance: Uuid,
    /// The node's number, once the registry has given one.
    pub node_id: Option<NodeId>,
    /// The cluster that it has joined, once it has.
    pub cluster_id: Option<Uuid>,
    /// Where other nodes and clients reach its port.
    pub address: String,
    /// Its tiers.
    pub locality: Locality,
    /// The shard that its clients are relayed to, and that its server belongs to.
    pub shard: String,
    /// Version of the program.
    pub build: String,
    /// When the process started, by its own clock; shown, never compared.
    pub started_at: DateTime<Utc>,
    /// The PostgreSQL server beside it, if it has one.
    pub server: Option<ServerInfo>,
    /// Where it knows nodes to be: those that answer it, and the registry's members.
    pub peers: Vec<String>,
    /// How long the answers of others take it, in milliseconds, about.
    #[serde(default)]
    pub round_trips: BTreeMap<NodeId, u32>,
    /// What it knows for good about shards, by name.
    pub shards: BTreeMap<String, ShardFloor>,
    /// Grows with every change that matters to others; a later answer of the same instance has a higher one.
    pub revision: u64,
}

impl NodeInfo {
    /// The node in words for a message: `node 3`, or its address while it has no number.
    pub fn name(&self) -> String {
        match self.node_id {
            Some(id) => format!("node {id}"),
            None => format!("the node at {}", self.address),
        }
    }

    /// The state of its server, when that answers.
    pub fn server_state(&self) -> Option<&ServerState> {
        match &self.server {
            Some(ServerInfo::Up(state)) => Some(state),
            Some(ServerInfo::Down { .. }) | None => None,
        }
    }
}

/// The server beside a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ServerInfo {
    /// It answers.
    Up(ServerState),
    /// It does not answer, or not yet.
    Down {
        /// Why, in words for an operator.
        reason: String,
    },
}

/// What a PostgreSQL server says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerState {
    /// Identifies the shard together with a replication link or timeline ancestry; a promoted clone keeps it.
    pub system_identifier: String,
    /// `server_version_num`.
    pub version: i32,
    /// Whether it replays another server's WAL.
    pub in_recovery: bool,
    /// The timeline that it writes or follows.
    pub timeline: u32,
    /// What it has written, or replayed. Moves all the time and so is not news by itself.
    pub lsn: Lsn,
    /// The cluster whose registry is on it, read from the comment of the database `backhaul`.
    pub registry: Option<Uuid>,
    /// A standby's view of the server it follows.
    pub upstream: Option<Upstream>,
    /// The standbys that stream from it.
    pub downstream: Vec<Downstream>,
    /// What holds its replay back, and what its replay may do; of a primary nothing.
    #[serde(default)]
    pub replay: Replay,
}

/// How a standby replays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// Somebody has paused it, and it is no pause of a backup's: those end by themselves.
    pub paused: bool,
    /// `recovery_min_apply_delay`, as PostgreSQL prints it, if there is one.
    pub delay: Option<String>,
    /// `hot_standby_feedback`: the primary keeps what is read here.
    pub feedback: bool,
    /// Whether the node's role may pause and resume it.
    #[serde(default)]
    pub may_pause: bool,
    /// Bytes that are free where the server keeps its WAL, if the node may know it. Moves all the time, as the position.
    #[serde(default)]
    pub free: Option<u64>,
}

impl ServerState {
    /// Whether two states differ in anything but the WAL position and the room that is left.
    pub fn differs(&self, other: &Self) -> bool {
        let mut alike = Self { lsn: other.lsn, ..self.clone() };
        alike.replay.free = other.replay.free;
        alike != *other
    }
}

/// A standby's WAL receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// The name under which the sender lists this standby.
    pub application_name: String,
    /// The replication slot it uses.
    pub slot: Option<String>,
    /// `streaming`, or what keeps it from that.
    pub status: String,
}

/// A standby as its sender lists it in `pg_stat_replication`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downstream {
    /// The standby's `application_name`.
    pub application_name: String,
    /// The replication slot that it holds.
    pub slot: Option<String>,
    /// `async`, `potential`, `sync`, `quorum`, or `unknown` where the node's role may not see it.
    pub sync_state: String,
    /// `streaming`, `catchup`, ….
    pub state: String,
}

/// What a node is to its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It stands beside the shard's primary.
    Leaseholder,
    /// Beside a synchronous standby, whose confirmation commits may wait for.
    Voting,
    /// Beside an asynchronous standby.
    NonVoting,
    /// Beside a standby that does not follow the shard's primary: it follows another, or nobody, or there is none.
    Detached,
    /// Beside a primary that does not lead: another one is on a higher timeline.
    Overtaken,
    /// Beside a server that does not answer.
    Down,
    /// It has no server of its own.
    None,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Leaseholder => "leaseholder",
            Self::Voting => "voting replica",
            Self::NonVoting => "non-voting replica",
            Self::Detached => "detached standby",
            Self::Overtaken => "overtaken primary",
            Self::Down => "server down",
            Self::None => "no server",
        })
    }
}

impl Role {
    /// What `node` is to its shard, given the node that leads it.
    ///
    /// A standby is the one its sender lists under the same slot, or under the same name when no slot is used
    /// (PostgreSQL offers no better link between `pg_stat_replication` and the standby). Of several under one name each may
    /// be the one, and of one whose state may not be seen each state may be true: where a commit may wait for it, it counts
    /// as voting, because a voting standby must never be paused. A standby that streams from another standby is
    /// asynchronous to the primary by nature.
    pub fn of(node: &NodeInfo, leader: Option<&NodeInfo>) -> Self {
        if node.server.is_none() {
            return Self::None;
        }
        if leader.is_some_and(|leader| leader.instance == node.instance) {
            return Self::Leaseholder;
        }
        let Some(state) = node.server_state() else { return Self::Down };
        let Some(upstream) = state.upstream.as_ref().filter(|_| state.in_recovery) else { return Self::Overtaken };
        let primary = leader.and_then(NodeInfo::server_state);
        let Some(primary) = primary.filter(|primary| primary.timeline == state.timeline) else { return Self::Detached };
        let is_it = |standby: &&Downstream| match (&upstream.slot, &standby.slot) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => standby.application_name == upstream.application_name,
        };
        let listed: Vec<_> = primary.downstream.iter().filter(is_it).collect();
        if listed.iter().any(|standby| standby.sync_state != "async") {
            Self::Voting
        } else if listed.is_empty() && upstream.status != "streaming" {
            Self::Detached
        } else {
            Self::NonVoting
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A node for tests of rules: `server` is (in recovery, timeline).
    pub(crate) fn node(number: i32, shard: &str, server: Option<(bool, u32)>) -> NodeInfo {
        NodeInfo {
            instance: Uuid::from_u128(u128::from(number.unsigned_abs())),
            node_id: Some(NodeId(number)),
            cluster_id: None,
            address: format!("n{number}:26257"),
            locality: Locality::default(),
            shard: shard.to_owned(),
            build: "test".to_owned(),
            started_at: DateTime::UNIX_EPOCH,
            server: server.map(|(in_recovery, timeline)| {
                ServerInfo::Up(ServerState {
                    system_identifier: format!("id-of-{shard}"),
                    version: 150_000,
                    in_recovery,
                    timeline,
                    lsn: Lsn(0),
                    registry: None,
                    upstream: None,
                    downstream: Vec::new(),
                    replay: Replay::default(),
                })
            }),
            peers: Vec::new(),
            round_trips: BTreeMap::new(),
            shards: BTreeMap::new(),
            revision: 1,
        }
    }

    #[test]
    fn an_lsn_prints_as_postgresql_prints_it() {
        for text in ["0/0", "0/16B3748", "AB/CDEF0123"] {
            assert_eq!(text.parse::<Lsn>().map(|lsn| lsn.to_string()), Ok(text.to_owned()));
        }
        assert!("nowhere".parse::<Lsn>().is_err());
    }

    #[test]
    fn a_role_is_read_from_the_leader_s_list_of_standbys() {
        let downstream = |name: &str, slot: Option<&str>, sync_state: &str| Downstream {
            application_name: name.to_owned(),
            slot: slot.map(str::to_owned),
            sync_state: sync_state.to_owned(),
            state: "streaming".to_owned(),
        };
        let mut leader = node(1, "s1", Some((false, 1)));
        if let Some(ServerInfo::Up(state)) = &mut leader.server {
            state.downstream = vec![
                downstream("walreceiver", Some("b"), "quorum"),
                downstream("walreceiver", Some("c"), "async"),
                downstream("named", None, "sync"),
                downstream("twins", None, "async"),
                downstream("twins", None, "potential"),
                downstream("unseen", None, "unknown"),
            ];
        }
        let receiving = |name: &str, slot: Option<&str>, status: &str| {
            let mut standby = node(2, "s1", Some((true, 1)));
            if let Some(ServerInfo::Up(state)) = &mut standby.server {
                state.upstream = Some(Upstream {
                    application_name: name.to_owned(),
                    slot: slot.map(str::to_owned),
                    status: status.to_owned(),
                });
            }
            standby
        };
        let standby = |name: &str, slot: Option<&str>| receiving(name, slot, "streaming");
        for (standby, role) in [
            (standby("walreceiver", Some("b")), Role::Voting),
            (standby("walreceiver", Some("c")), Role::NonVoting),
            (standby("named", None), Role::Voting),
            (standby("cascaded", None), Role::NonVoting),
            (standby("twins", None), Role::Voting),
            (standby("unseen", None), Role::Voting),
            (receiving("left behind", None, "not receiving"), Role::Detached),
            (node(3, "s1", Some((false, 1))), Role::Overtaken),
            (
                {
                    let mut elsewhere = standby("walreceiver", None);
                    if let Some(ServerInfo::Up(state)) = &mut elsewhere.server {
                        state.timeline = 2;
                    }
                    elsewhere
                },
                Role::Detached,
            ),
            (node(4, "s1", None), Role::None),
            (leader.clone(), Role::Leaseholder),
        ] {
            assert_eq!(Role::of(&standby, Some(&leader)), role, "{standby:?}");
        }
        assert_eq!(Role::of(&standby("named", None), None), Role::Detached);
    }
}
