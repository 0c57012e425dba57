//! The server that a database is restored to, by way of the node beside it.

use std::time::Duration;

use cluster::{NodeId, Peers};
use fleet::loader::{LOADER, Request};
use serde::de::DeserializeOwned;

use super::story::passing;
use crate::away;

/// A target that is away for so long is not waited for: another server may lead its shard by then, and the job's next
/// run asks that one. Longer than where pieces can go to somebody else, because what was begun here is begun anew.
const AWAY_MAX: Duration = Duration::from_secs(15);

/// Asks the node beside a target, for as long as the target's server answers it.
///
/// # Errors
///
/// 08006 when the server or its node stays away; or as the node says, to be tried again where that may pass.
pub(super) async fn ask<T: DeserializeOwned>(
    peers: &Peers,
    node: NodeId,
    request: &Request,
    deadline: Duration,
) -> anyhow::Result<T> {
    watching(peers, node, peers.call(node, LOADER, request, deadline)).await
}

/// The same for what is asked in another way.
///
/// # Errors
///
/// See [`ask`].
pub(super) async fn watching<T>(
    peers: &Peers,
    node: NodeId,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    away::watching(peers, node, AWAY_MAX, "a database was restored to it", work).await.map_err(passing)
}
