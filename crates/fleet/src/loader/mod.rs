//! The loader.

mod types;

use std::sync::Arc;

use cluster::service::{Boxed, Reply, Service};
use pgerror::{PgError, SqlState};
use serde_json::Value;

pub use self::types::*;
use crate::Server;

/// The loader of the server beside this node.
pub struct Loader {
    _server: Server,
}

impl Loader {
    /// The loader of `server`.
    pub fn new(server: Server) -> Arc<Self> {
        Arc::new(Self { _server: server })
    }
}

impl Service for Loader {
    fn call(&self, _request: Value) -> Boxed<'_, Reply> {
        Box::pin(async { Err(PgError::new(SqlState::FEATURE_NOT_SUPPORTED, "not yet").into()) })
    }
}
