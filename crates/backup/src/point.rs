//! A shard's point: which servers are read, and the founders that hold it.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cluster::{NodeId, NodeInfo, Peers, Role, View};
use fleet::founders::{FOUNDERS, Open, Opened, Request};
use futures_util::future::join_all;
use jobs::{Retryable, Run};
use pgerror::{PgError, SqlState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::away;
use crate::rules::{Apart, Decision, Fleet, Rules, decide, nothing_to_read};
use crate::together::{self, Together};

/// Taking a point includes the dump of the schemas.
const OPEN_DEADLINE: Duration = Duration::from_secs(180);

/// A short question to the founders' node.
const ASK_DEADLINE: Duration = Duration::from_secs(10);

/// Founders live so long without a coordinator: longer than it takes to find another one for the job.
const LEASE_LIFE: Duration = Duration::from_secs(60);

/// Sessions per database and server; more would not read faster, and the server has other clients.
pub const READERS: usize = 4;

/// The same for all databases of a server together; where there are more databases than that, each has one.
const READERS_OF_ALL: usize = 16;

/// Sessions per database and server, of a backup of so many databases.
pub(crate) fn readers(databases: usize) -> usize {
    (READERS_OF_ALL / databases.max(1)).clamp(1, READERS)
}

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
    /// The node beside the server that is read; the first one, where there are several.
    pub(crate) node: NodeId,
    /// The nodes beside the other servers that have founders at this very point. Points of older versions have none.
    #[serde(default)]
    pub(crate) others: Vec<NodeId>,
    /// The founders' lease, the same on each of these servers.
    pub(crate) lease: Uuid,
    /// What became of the points of this shard that were taken before this one.
    #[serde(default)]
    pub(crate) tries: Tries,
    /// The point, and what the databases hold at it.
    pub(crate) opened: Opened,
}

impl ShardPoint {
    /// The nodes that had founders when the point was taken, the first one first.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        [self.node].into_iter().chain(self.others.iter().copied()).collect()
    }
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

/// The leaseholder of `shard`.
///
/// # Errors
///
/// 08006 naming the shard: it cannot be reached, and a shorter backup is not made instead.
pub(crate) fn leaseholder<'v>(view: &'v View, shard: &str) -> anyhow::Result<&'v NodeInfo> {
    Ok(view.leader(shard).ok_or_else(|| {
        PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached"))
            .detail("No node that answers stands beside a primary of it.")
            .hint("SHOW NODES tells which nodes are there.")
    })?)
}

/// What the rules say of `shard` now.
///
/// # Errors
///
/// The shard cannot be reached, or the rules leave no server of it to be read; both may pass.
pub(crate) fn readable(view: &View, shard: &str, rules: &Rules) -> anyhow::Result<Decision> {
    leaseholder(view, shard)?;
    let decision = decide(&Fleet::of(view, shard), rules);
    for (node, _, reason) in &decision.passed_over {
        tracing::debug!(%node, shard, "not read: {reason}");
    }
    match decision.reads.is_empty() {
        true => Err(anyhow::Error::new(nothing_to_read(shard, &decision, rules)).context(Retryable)),
        false => Ok(decision),
    }
}

/// Takes a point on the servers that can be read at once, or else on the best one that gives one. Why it is one where
/// there could be more stands in the job's errors.
///
/// # Errors
///
/// No server of the shard gives one; the last refusal is told.
pub(crate) async fn open(
    run: &Run,
    peers: &Peers,
    (shard, databases): (&str, &[String]),
    rules: &Rules,
    tries: Tries,
) -> anyhow::Result<ShardPoint> {
    let job = run.id.0;
    let decision = readable(&peers.cluster().view(), shard, rules)?;
    for (node, _, why) in decision.apart.iter().filter(|(_, _, why)| *why == Apart::NoRight) {
        note_apart(run, shard, format!("Node {node}'s cannot be read beside others: {why}.")).await?;
    }
    if decision.together.len() > 1 {
        let request = |lease| open_request(job, lease, databases, false);
        match together::open(peers, shard, &decision.together, request).await {
            Ok(Together { lease, node, others, opened }) => {
                tracing::info!(job, shard, %node, ?others, lsn = %opened.point.lsn, "one point taken of several servers");
                return Ok(ShardPoint { shard: shard.to_owned(), node, others, lease, tries, opened });
            }
            Err(error) => {
                tracing::warn!(job, shard, "no point of several servers: {error:#}");
                let said = PgError::of(&error).map_or_else(String::new, together::sentence);
                note_apart(run, shard, said).await?;
            }
        }
    }
    let mut last = anyhow!("shard \"{shard}\" has no server that can be read").context(Retryable);
    for candidate in decision.candidates() {
        let lease = Uuid::new_v4();
        let request = Request::Open(open_request(job, lease, databases, candidate.role == Role::Voting));
        match ask::<Opened>(peers, candidate.node, &request, OPEN_DEADLINE).await {
            Ok(opened) => {
                let point = &opened.point;
                tracing::info!(job, shard, node = %candidate.node, lsn = %point.lsn, mode = ?point.mode, "point taken");
                let (shard, node) = (shard.to_owned(), candidate.node);
                return Ok(ShardPoint { shard, node, others: Vec::new(), lease, tries, opened });
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

/// Asks the founders' node, for as long as its server answers it: one that freezes keeps its sessions open, and every
/// statement that waits for it has a deadline that is meant for one that is slow.
///
/// # Errors
///
/// 08006 when the server, or its node, stays away; or as the node says.
pub(crate) async fn ask<T: DeserializeOwned>(
    peers: &Peers,
    node: NodeId,
    request: &Request,
    deadline: Duration,
) -> anyhow::Result<T> {
    tokio::select! {
        answer = peers.call(node, FOUNDERS, request, deadline) => answer,
        () = away::server(peers, node) => {
            let message = format!("the server beside node {node} was lost while a point was taken of it");
            Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
        }
    }
}

fn open_request(job: i64, lease: Uuid, databases: &[String], voting: bool) -> Open {
    let life_ms = u64::try_from(LEASE_LIFE.as_millis()).unwrap_or(u64::MAX);
    Open { lease, job, databases: databases.to_vec(), readers: readers(databases.len()), voting, life_ms }
}

/// Says in the job why one server is read where there are several.
async fn note_apart(run: &Run, shard: &str, why: String) -> anyhow::Result<()> {
    let message = format!("not all servers of shard \"{shard}\" that are near are read at once");
    let error = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).detail(why);
    run.note(&anyhow::Error::from(error)).await
}

/// The nodes whose founders still live; renews them.
pub(crate) async fn alive(peers: &Peers, point: &ShardPoint) -> Vec<NodeId> {
    let request = &Request::Renew { lease: point.lease };
    let renew = |node| async move {
        let renewed = peers.call::<()>(node, FOUNDERS, request, ASK_DEADLINE).await;
        renewed.is_ok().then_some(node)
    };
    join_all(point.nodes().into_iter().map(renew)).await.into_iter().flatten().collect()
}

/// Renews the founders until dropped.
pub(crate) fn keep_alive(peers: &Peers, point: &ShardPoint) -> AbortOnDropHandle<()> {
    let (peers, point) = (peers.clone(), point.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(LEASE_LIFE / 6).await;
            let alive = alive(&peers, &point).await;
            for node in point.nodes().iter().filter(|node| !alive.contains(node)) {
                // Whoever reads there will be told; a node that was away for a moment is asked again.
                tracing::info!(shard = point.shard, %node, "founders could not be renewed");
            }
        }
    }))
}

/// Lets all founders of a point go.
pub(crate) async fn close_all(peers: &Peers, point: &ShardPoint) {
    join_all(point.nodes().into_iter().map(|node| close(peers, node, point.lease))).await;
}

/// Lets the founders of one node go. If that cannot be said, their lease runs out.
pub(crate) async fn close(peers: &Peers, node: NodeId, lease: Uuid) {
    if let Err(error) = peers.call::<()>(node, FOUNDERS, &Request::Close { lease }, ASK_DEADLINE).await {
        tracing::info!(%node, "founders end by themselves: {error:#}");
    }
}
