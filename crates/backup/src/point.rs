//! A shard's point: which server is read, and the founders that hold it.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cluster::{Locality, NodeId, Peers, Role, View};
use fleet::founders::{FOUNDERS, Open, Opened, Request};
use jobs::{Retryable, Run};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::assign::{Leaseholder, Worker};

/// Taking a point includes the dump of the schemas.
const OPEN_DEADLINE: Duration = Duration::from_secs(180);

/// A short question to the founders' node.
const ASK_DEADLINE: Duration = Duration::from_secs(10);

/// Founders live so long without a coordinator: longer than it takes to find another one for the job.
const LEASE_LIFE: Duration = Duration::from_secs(60);

/// Sessions per database and server; more would not read faster, and the server has other clients.
pub const READERS: usize = 4;

/// A standby that is this far behind its primary, in bytes of WAL, is passed over.
pub const LAG_MAX: u64 = 1024 * 1024 * 1024;

/// Refusals to take a point that may pass: too many leases or sessions, a pause or a lock of somebody else's.
const PASSING: [SqlState; 5] = [
    SqlState::CONFIGURATION_LIMIT_EXCEEDED,
    SqlState::TOO_MANY_CONNECTIONS,
    SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    SqlState::LOCK_NOT_AVAILABLE,
    SqlState::OBJECT_IN_USE,
];

/// What the next coordinator must know to go on at the same point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ShardPoint {
    /// The shard.
    pub(crate) shard: String,
    /// The node beside the server that is read.
    pub(crate) node: NodeId,
    /// The founders' lease.
    pub(crate) lease: Uuid,
    /// What became of the points of this shard that were taken before this one.
    #[serde(default)]
    pub(crate) tries: Tries,
    /// The point, and what the databases hold at it.
    pub(crate) opened: Opened,
}

/// Points that a shard's export had to be begun anew after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tries {
    /// Tables had changed.
    pub(crate) spoilt: u32,
    /// The node or the server that held them was lost.
    pub(crate) lost: u32,
}

impl Tries {
    /// Schema changes that spoil so many points do not stop by themselves.
    const SPOILT_MAX: u32 = 4;

    /// Every node and server of a large fleet may be restarted once while a backup runs.
    const LOST_MAX: u32 = 30;

    pub(crate) fn spoilt(self) -> Self {
        Self { spoilt: self.spoilt + 1, ..self }
    }

    pub(crate) fn lost(self) -> Self {
        Self { lost: self.lost + 1, ..self }
    }

    pub(crate) fn are_over(self) -> bool {
        self.spoilt >= Self::SPOILT_MAX || self.lost >= Self::LOST_MAX
    }
}

/// A server that may be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replica {
    pub(crate) node: NodeId,
    pub(crate) role: Role,
}

/// The leaseholder of `shard`.
///
/// # Errors
///
/// 08006 naming the shard: it cannot be reached, and a shorter backup is not made instead.
pub(crate) fn leaseholder(view: &View, shard: &str) -> anyhow::Result<Leaseholder> {
    let leader = view.leader(shard).ok_or_else(|| {
        PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached"))
            .detail("No node that answers stands beside a primary of it.")
            .hint("SHOW NODES tells which nodes are there.")
    })?;
    Ok(Leaseholder { id: leader.node_id, locality: leader.locality.clone() })
}

/// The nodes that take part: they answer, have a number, and match the filter.
pub(crate) fn workers(view: &View, filter: &Locality, reads: NodeId) -> Vec<Worker> {
    let known = view.nodes.values().filter(|known| known.reachable);
    known
        .filter(|known| known.info.locality.first_unmatched(filter).is_none())
        .filter_map(|known| {
            let id = known.info.node_id?;
            Some(Worker { id, locality: known.info.locality.clone(), reads_own_server: id == reads })
        })
        .collect()
}

/// The servers that may be read for workers under this filter, the best first.
///
/// If the leaseholder's node takes part, all spans are its, and it reads its own server. Else a server beside a node
/// that takes part, then the closest by shared leading tiers, by kind (an asynchronous standby bothers nobody, a
/// primary somebody, and a synchronous standby cannot be paused), by round trip, by id.
pub(crate) fn replicas(view: &View, shard: &str, filter: &Locality) -> anyhow::Result<Vec<Replica>> {
    let leader = leaseholder(view, shard)?;
    let head = view.leader(shard).and_then(|node| node.server_state()).map(|server| server.lsn.0);
    let participants: Vec<&Locality> = view
        .nodes
        .values()
        .filter(|known| known.reachable && known.info.locality.first_unmatched(filter).is_none())
        .map(|known| &known.info.locality)
        .collect();
    let mut ranked = Vec::new();
    for known in view.nodes.values().filter(|known| known.reachable && known.info.shard == shard) {
        let (Some(node), role) = (known.info.node_id, view.role(&known.info)) else { continue };
        let kind = match role {
            Role::NonVoting => 0,
            Role::Leaseholder => 1,
            Role::Voting => 2,
            Role::Detached | Role::Overtaken | Role::Down | Role::None => continue,
        };
        let replayed = known.info.server_state().map_or(0, |server| server.lsn.0);
        if head.is_some_and(|head| head.saturating_sub(replayed) > LAG_MAX) {
            tracing::info!(%node, shard, "a standby that lags behind is passed over");
            continue;
        }
        let matches = known.info.locality.first_unmatched(filter).is_none();
        let is_home = matches && leader.id == Some(node);
        let shared = participants.iter().map(|place| place.shared_prefix(&known.info.locality)).max().unwrap_or(0);
        let rank = (!is_home, !matches, std::cmp::Reverse(shared), kind, known.round_trip, node);
        ranked.push((rank, Replica { node, role }));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    Ok(ranked.into_iter().map(|(_, replica)| replica).collect())
}

/// Takes a point on the best server that gives one.
///
/// # Errors
///
/// No server of the shard gives one; the last refusal is told.
pub(crate) async fn open(
    run: &Run,
    peers: &Peers,
    (shard, databases): (&str, &[String]),
    filter: &Locality,
    tries: Tries,
) -> anyhow::Result<ShardPoint> {
    let job = run.id.0;
    let candidates = replicas(&peers.cluster().view(), shard, filter)?;
    let mut last = anyhow!("shard \"{shard}\" has no server that can be read").context(Retryable);
    for candidate in candidates {
        let lease = Uuid::new_v4();
        let request = Request::Open(Open {
            lease,
            job,
            databases: databases.to_vec(),
            readers: READERS,
            voting: candidate.role == Role::Voting,
            life_ms: u64::try_from(LEASE_LIFE.as_millis()).unwrap_or(u64::MAX),
        });
        match peers.call::<Opened>(candidate.node, FOUNDERS, &request, OPEN_DEADLINE).await {
            Ok(opened) => {
                let point = &opened.point;
                tracing::info!(job, shard, node = %candidate.node, lsn = %point.lsn, mode = ?point.mode, "point taken");
                return Ok(ShardPoint { shard: shard.to_owned(), node: candidate.node, lease, tries, opened });
            }
            Err(error) => {
                tracing::warn!(job, shard, node = %candidate.node, "no point on this server: {error:#}");
                run.note(&error).await?;
                // It may have been taken all the same.
                close(peers, candidate.node, lease).await;
                let passes = PgError::of(&error).is_some_and(|said| PASSING.contains(&said.code));
                last = if passes { error.context(Retryable) } else { error };
            }
        }
    }
    Err(last).with_context(|| format!("take a point of shard \"{shard}\""))
}

/// Whether the founders still live; renews them if so.
pub(crate) async fn is_alive(peers: &Peers, point: &ShardPoint) -> bool {
    let renewed = peers.call::<()>(point.node, FOUNDERS, &Request::Renew { lease: point.lease }, ASK_DEADLINE).await;
    renewed.is_ok()
}

/// Renews the founders until dropped.
pub(crate) fn keep_alive(peers: &Peers, point: &ShardPoint) -> AbortOnDropHandle<()> {
    let (peers, point) = (peers.clone(), point.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(LEASE_LIFE / 6).await;
            if !is_alive(&peers, &point).await {
                // Whoever reads there will be told; a node that was away for a moment is asked again.
                tracing::info!(shard = point.shard, node = %point.node, "founders could not be renewed");
            }
        }
    }))
}

/// Lets the founders go. If that cannot be said, their lease runs out.
pub(crate) async fn close(peers: &Peers, node: NodeId, lease: Uuid) {
    if let Err(error) = peers.call::<()>(node, FOUNDERS, &Request::Close { lease }, ASK_DEADLINE).await {
        tracing::info!(%node, "founders end by themselves: {error:#}");
    }
}
