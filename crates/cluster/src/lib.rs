//! The fleet as its nodes see it.
//!
//! A node needs to know three things about the others before it can do anything: where they are, what they are (their
//! locality, their shard, the state of the server beside them), and which of them leads its shard. None of that may
//! depend on the registry, because the registry itself lives on a PostgreSQL server that has to be found first, and
//! that may be the one that just failed. So nodes ask each other: every node holds one *peer session* to every other
//! one and asks *who are you*, again and again; the answer comes at once when there is news and otherwise after a
//! short wait. From all answers a [`View`] is made, the same by one rule on every node, and the leader of each shard
//! is read from it ([`leader`]). What was learned is kept in the node's [`store`], so that a restarted node finds the
//! fleet although its `--join` address is gone, and so that a shard's timeline never goes back.
//!
//! On top of that stands the [`registry`]: the durable list of nodes and shards, and the sessions by whose expiry,
//! on PostgreSQL's clock alone, the fleet decides that a node is dead.
//!
//! Peer sessions are PostgreSQL connections to the other node's port, authenticated by that node with the cluster
//! [`secret`]; over one of them a node asks verbs, calls a [`service`], or is lent a session on the callee's own server.
//!
//! What a crash leaves: the store's files are replaced whole (written beside, then renamed); everything else is in
//! memory here or in the registry, where an unrenewed session ends by itself.

mod dial;
mod handle;
pub mod leader;
mod locality;
mod node;
mod peers;
pub mod registry;
pub mod secret;
pub mod service;
pub mod settings;
pub mod socket;
pub mod store;
mod wary;

pub use dial::{Dialer, PEER_OPTION, PEER_USER, PeerSession, Purpose, said_by_server, spoken};
pub use handle::{Cluster, Known, View};
pub use locality::{Filter, Locality, LocalityError, Tier};
pub use node::{Downstream, Lsn, NodeId, NodeInfo, Replay, Role, ServerInfo, ServerState, Upstream};
pub use peers::follow_peers;
pub use service::Peers;
