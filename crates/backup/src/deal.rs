//! Pieces of work dealt out to nodes, finished, lost and dealt out again.
//!
//! Exports and imports are dealt alike: to nodes that match the filter and answer now, by [`assign`]. A node that goes
//! is not asked again by this run, and what it had goes to the others; a piece that fails for a reason that may pass
//! is tried again a few times; anything else ends it all. Where there are several servers to read from, each worker has
//! its own or the closest; when one of them is lost, what its node had is dealt anew, and the others are read.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use cluster::{NodeId, Peers, View};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use jobs::{LostClaim, Retryable};
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep};

use crate::assign::assign;
use crate::patience::Patience;
use crate::point::leaseholder;
use crate::rules::{Fleet, Rules, anchor, nearest, workers};

/// Pieces that one worker has at a time: while one is being compressed the other is being read.
const PIECES_AT_ONCE: usize = 2;

/// What may pass: a store or a lock that refuses, a conflict with recovery, a server that restarts.
const PASSING: [SqlState; 8] = [
    SqlState::IO_ERROR,
    SqlState::LOCK_NOT_AVAILABLE,
    SqlState::OBJECT_IN_USE,
    SqlState::SERIALIZATION_FAILURE,
    SqlState::DEADLOCK_DETECTED,
    SqlState::ADMIN_SHUTDOWN,
    SqlState::CRASH_SHUTDOWN,
    SqlState::CANNOT_CONNECT_NOW,
];

/// Where pieces may go.
pub(crate) struct Deal<'d> {
    pub(crate) peers: &'d Peers,
    /// Whom they may go to.
    pub(crate) rules: &'d Rules,
    /// The shard that they are about.
    pub(crate) shard: &'d str,
    /// The nodes beside the servers that are read from, or the one beside that which is written to.
    pub(crate) servers: &'d [NodeId],
    /// So many pieces are at work at the same time on each of them, however many nodes there are: a server lends no more
    /// sessions.
    pub(crate) at_once: usize,
}

/// What a failure puts an end to.
pub(crate) enum End {
    /// Everything.
    All(anyhow::Error),
    /// The work on this server. The others go on; if it is the last one, this is the error.
    Server(anyhow::Error),
}

struct Ended<P, R> {
    worker: NodeId,
    server: NodeId,
    piece: P,
    weight: u64,
    failures: Failures,
    outcome: anyhow::Result<R>,
}

/// What a piece has been through, and how long it rests before its next try.
#[derive(Clone, Copy, Default)]
struct Failures {
    patience: Patience,
    rest: Duration,
}

type Open<P> = Vec<(P, u64, Failures)>;
type Queues<P> = BTreeMap<NodeId, VecDeque<(P, u64, Failures)>>;

/// What is not done yet, and with whom it can be.
struct Left<P> {
    /// Not dealt yet.
    open: Open<P>,
    /// Dealt, by worker.
    queues: Queues<P>,
    /// The servers that are still worked on.
    servers: Vec<NodeId>,
    /// Workers that are not asked again.
    lost: Vec<NodeId>,
}

impl Deal<'_> {
    /// Has every piece (with its weight in bytes) done once, by `one`, which is given a worker and its server; `done` takes
    /// note of each.
    ///
    /// # Errors
    ///
    /// No node that matches is left; `done` fails; `ends` says that a failure on a server is the end, and which; or a
    /// piece fails for good.
    pub(crate) async fn run<P, R, F>(
        &self,
        pieces: Vec<(P, u64)>,
        one: impl Fn(NodeId, NodeId, P) -> F + Sync,
        ends: impl Fn(&PgError, NodeId) -> Option<End> + Sync,
        mut done: impl AsyncDone<P, R>,
    ) -> anyhow::Result<()>
    where
        P: Clone + Send + Sync,
        R: Send,
        F: Future<Output = anyhow::Result<R>> + Send,
    {
        let mut at_work: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut on_servers: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut near = BTreeMap::new();
        let mut left = Left {
            open: pieces.into_iter().map(|(piece, weight)| (piece, weight, Failures::default())).collect(),
            queues: Queues::new(),
            servers: self.servers.to_vec(),
            lost: Vec::new(),
        };
        let mut running = FuturesUnordered::new();
        loop {
            if !left.open.is_empty() {
                self.deal(&mut left)?;
                near = self.near(&left);
            }
            for (worker, queue) in &mut left.queues {
                let Some(server) = near.get(worker).copied() else { continue };
                let (busy, on_server) = (at_work.entry(*worker).or_default(), on_servers.entry(server).or_default());
                while *busy < PIECES_AT_ONCE
                    && *on_server < self.at_once.max(1)
                    && let Some((piece, weight, failures)) = queue.pop_front()
                {
                    *busy += 1;
                    *on_server += 1;
                    let work = one(*worker, server, piece.clone());
                    running.push(self.watched((*worker, server), piece, weight, failures, work));
                }
            }
            let Some(ended) = running.next().await else { return Ok(()) };
            let Ended { worker, server, piece, weight, failures, outcome } = ended;
            *at_work.entry(worker).or_default() -= 1;
            *on_servers.entry(server).or_default() -= 1;
            match outcome {
                Ok(result) => done.done(piece, weight, result).await?,
                Err(error) => {
                    let end = PgError::of(&error).and_then(|said| ends(said, server));
                    let piece = (piece, weight, failures);
                    if let Some(why) = self.failed(&mut left, (worker, server), piece, (error, end))? {
                        done.lost(server, &why).await?;
                    }
                }
            }
        }
    }

    /// Puts a piece that failed back to what is open. Gives the reason when its server is given up now.
    fn failed<P>(
        &self,
        left: &mut Left<P>,
        (worker, server): (NodeId, NodeId),
        (piece, weight, failures): (P, u64, Failures),
        (error, end): (anyhow::Error, Option<End>),
    ) -> anyhow::Result<Option<anyhow::Error>> {
        let was_there = left.servers.contains(&server);
        let (mut failures, mut given_up) = (failures, None);
        match end {
            Some(End::All(end)) => return Err(end),
            Some(End::Server(end)) => {
                left.servers.retain(|other| *other != server);
                if left.servers.is_empty() {
                    return Err(end);
                }
                // Its own node may still export; it reads from elsewhere now.
                left.open.extend(left.queues.remove(&server).unwrap_or_default());
                if !self.is_reachable(worker) {
                    left.lost.push(worker);
                }
                given_up = was_there.then_some(end);
            }
            // Begun before its server was given up: not the piece's fault.
            None if !was_there && error.downcast_ref::<LostClaim>().is_none() => {}
            None => failures = self.judge(error, worker, failures, &mut left.lost)?,
        }
        left.open.push((piece, weight, failures));
        if left.lost.contains(&worker) {
            left.open.extend(left.queues.remove(&worker).unwrap_or_default());
        }
        Ok(given_up)
    }

    /// From which server each of these workers reads.
    fn near<P>(&self, left: &Left<P>) -> BTreeMap<NodeId, NodeId> {
        let fleet = Fleet::of(&self.peers.cluster().view(), self.shard);
        let workers = left.queues.keys();
        workers.filter_map(|worker| Some((*worker, nearest(&fleet, *worker, &left.servers)?))).collect()
    }

    /// Deals pieces to the nodes that match and live now.
    fn deal<P>(&self, left: &mut Left<P>) -> anyhow::Result<()> {
        let Left { open, queues, servers, lost } = left;
        let view = self.peers.cluster().view();
        let fleet = Fleet::of(&view, self.shard);
        let mut workers = workers(&fleet, self.rules, servers);
        workers.retain(|worker| !lost.contains(&worker.id));
        if workers.is_empty() {
            let message = "no healthy sql instances available matching locality requirement";
            return Err(anyhow::Error::new(PgError::new(SqlState::UNCATEGORIZED, message)).context(Retryable));
        }
        leaseholder(&view, self.shard)?;
        let anchor = anchor(&fleet, self.rules, servers).unwrap_or_default();
        let weights: Vec<u64> = open.iter().map(|(_, weight, _)| *weight).collect();
        let assigned = assign(&weights, &anchor, &workers, self.rules.balanced);
        for (worker, piece) in assigned.into_iter().zip(open.drain(..)) {
            queues.entry(worker).or_default().push_back(piece);
        }
        Ok(())
    }

    async fn watched<P, R>(
        &self,
        (worker, server): (NodeId, NodeId),
        piece: P,
        weight: u64,
        failures: Failures,
        work: impl Future<Output = anyhow::Result<R>>,
    ) -> Ended<P, R> {
        let rested = async {
            sleep(failures.rest).await;
            work.await
        };
        let outcome = tokio::select! {
            outcome = rested => outcome,
            () = self.goes(worker) => {
                let message = format!("node {worker} was lost while it worked");
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
            }
            () = self.server_goes(server) => {
                let message = format!("the server beside node {server} was lost while it was worked on");
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
            }
        };
        Ended { worker, server, piece, weight, failures, outcome }
    }

    /// Returns when a server that is worked on does not answer the node beside it any more: it may keep its
    /// connections open all the same, as one that is frozen does.
    async fn server_goes(&self, server: NodeId) {
        let mut views = self.peers.cluster().subscribe();
        let gone = views.wait_for(|view| !has_server(view, server)).await;
        drop(gone);
    }

    /// Whether the server beside this node answers now.
    pub(crate) fn answers(&self, server: NodeId) -> bool {
        has_server(&self.peers.cluster().view(), server)
    }

    /// Returns when `node` does not answer any more.
    async fn goes(&self, node: NodeId) {
        let mut views = self.peers.cluster().subscribe();
        let gone = views.wait_for(|view| !view.node(node).is_some_and(|known| known.reachable)).await;
        drop(gone);
    }

    /// Whether `node` answers now.
    pub(crate) fn is_reachable(&self, node: NodeId) -> bool {
        self.peers.cluster().view().node(node).is_some_and(|known| known.reachable)
    }

    /// What a failure means: for the worker, for the piece, or for everything.
    fn judge(
        &self,
        error: anyhow::Error,
        worker: NodeId,
        mut failures: Failures,
        lost: &mut Vec<NodeId>,
    ) -> anyhow::Result<Failures> {
        if error.downcast_ref::<LostClaim>().is_some() {
            return Err(error);
        }
        tracing::warn!(shard = self.shard, %worker, "a piece of work failed: {error:#}");
        let code = PgError::of(&error).map(|said| said.code);
        let connection = code == Some(SqlState::CONNECTION_FAILURE);
        if connection && !self.is_reachable(worker) {
            // Its death is not the piece's fault, and each node dies once.
            lost.push(worker);
            return Ok(failures);
        }
        // What a store or a lock refuses now it may grant later; across nodes only the code tells.
        let may_pass = connection || code.is_some_and(|code| PASSING.contains(&code)) || storage::is_transient(&error);
        match failures.patience.after_failure(Instant::now()).filter(|_| may_pass) {
            Some(rest) => Ok(Failures { rest, ..failures }),
            None => Err(error),
        }
    }
}

fn has_server(view: &View, node: NodeId) -> bool {
    view.node(node).is_some_and(|known| known.reachable && known.info.server_state().is_some())
}

/// Takes note of finished pieces.
pub(crate) trait AsyncDone<P, R>: Send {
    /// A piece of this weight is finished.
    fn done(&mut self, piece: P, weight: u64, result: R) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// The work on this server has ended, and goes on with the others.
    fn lost(&mut self, server: NodeId, error: &anyhow::Error) -> impl Future<Output = anyhow::Result<()>> + Send {
        let said = format!("{error:#}");
        async move {
            tracing::warn!(%server, "a server is not worked on any more: {said}");
            Ok(())
        }
    }
}
