//! Servers that Backhaul starts itself: private ones, for the demo and for tests.
//!
//! They never touch a cluster of the machine's own: their data lies in a directory that the caller names, and they
//! listen on a socket file there and, unless told otherwise, on no network address. PostgreSQL refuses to run as root,
//! so under root they run as another user, to whom the directory is given.

mod installation;
mod instance;

pub use installation::{Installation, RunAs};
pub use instance::{Instance, Settings};
