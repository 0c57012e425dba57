//! PostgreSQL servers.
//!
//! [`Server`] is the one beside a node: where it listens, and as whom the node logs into it. Around it stand
//!
//! - [`probe`]: asking it again and again what it is (primary or standby, timeline, standbys), which is how a promotion
//!   is noticed within a fraction of a second;
//! - [`login`]: a plain protocol-level login whose socket can be handed on, so that a session on this server can be
//!   lent to another node without the service password ever leaving the host;
//! - [`door`]: the check that a server does not let everybody in who comes from its own host, which is where all
//!   clients of a node seem to come from;
//! - [`disk`]: how much room is left where it keeps its data;
//! - [`founders`]: sessions that hold one point of a server for a backup, and are lent span by span;
//! - [`loader`]: what makes a database of a backup again, on the server beside the node;
//! - [`readiness`]: what a server lacks for backups and restores, and the statements that mend it;
//! - [`private`]: servers that Backhaul starts itself, for the demo and for tests.
//!
//! Nothing here writes to a server of a user, except the loader, into a database that it makes for that.

pub mod disk;
pub mod door;
pub mod founders;
mod killed;
pub mod loader;
pub mod login;
pub mod private;
pub mod probe;
pub mod readiness;
mod server;

pub use server::Server;
