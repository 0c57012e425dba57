//! Pieces of work dealt out to nodes, finished, lost and dealt out again.
//!
//! Exports and imports are dealt alike: to nodes that match the filter and answer now, by [`assign`]. A node that goes
//! is not asked again by this run, and what it had goes to the others; a piece that fails for a reason that may pass
//! is tried again a few times; anything else ends it all.

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
use crate::rules::{Fleet, Rules, anchor, workers};

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
    /// The node beside the server that is read from, or written to.
    pub(crate) server: NodeId,
    /// So many pieces are at work at the same time, however many nodes there are: the server lends no more sessions.
    pub(crate) at_once: usize,
}

struct Ended<P, R> {
    worker: NodeId,
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

impl Deal<'_> {
    /// Has every piece (with its weight in bytes) done once, by `one`; `done` takes note of each.
    ///
    /// # Errors
    ///
    /// No node that matches is left; `done` fails; `ends` says that a failure is the end, and which; or a piece fails
    /// for good.
    pub(crate) async fn run<P, R, F>(
        &self,
        pieces: Vec<(P, u64)>,
        one: impl Fn(NodeId, P) -> F + Sync,
        ends: impl Fn(&PgError) -> Option<anyhow::Error> + Sync,
        mut done: impl AsyncDone<P, R>,
    ) -> anyhow::Result<()>
    where
        P: Clone + Send + Sync,
        R: Send,
        F: Future<Output = anyhow::Result<R>> + Send,
    {
        let mut open: Open<P> =
            pieces.into_iter().map(|(piece, weight)| (piece, weight, Failures::default())).collect();
        let mut queues = Queues::new();
        let mut at_work: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut lost: Vec<NodeId> = Vec::new();
        let mut running = FuturesUnordered::new();
        loop {
            if !open.is_empty() {
                self.deal(&mut open, &lost, &mut queues)?;
            }
            for (worker, queue) in &mut queues {
                let busy = at_work.entry(*worker).or_default();
                while *busy < PIECES_AT_ONCE
                    && running.len() < self.at_once.max(1)
                    && let Some((piece, weight, failures)) = queue.pop_front()
                {
                    *busy += 1;
                    let work = one(*worker, piece.clone());
                    running.push(self.watched(*worker, piece, weight, failures, work));
                }
            }
            let Some(ended) = running.next().await else { return Ok(()) };
            *at_work.entry(ended.worker).or_default() -= 1;
            match ended.outcome {
                Ok(result) => done.done(ended.piece, ended.weight, result).await?,
                Err(error) => {
                    let said = PgError::of(&error).cloned();
                    if let Some(end) = said.as_ref().and_then(&ends) {
                        return Err(end);
                    }
                    let failures = self.judge(error, said, ended.worker, ended.failures, &mut lost)?;
                    open.push((ended.piece, ended.weight, failures));
                    if lost.contains(&ended.worker) {
                        open.extend(queues.remove(&ended.worker).unwrap_or_default());
                    }
                }
            }
        }
    }

    /// Deals pieces to the nodes that match and live now.
    fn deal<P>(&self, open: &mut Open<P>, lost: &[NodeId], queues: &mut Queues<P>) -> anyhow::Result<()> {
        let view = self.peers.cluster().view();
        let fleet = Fleet::of(&view, self.shard);
        let mut workers = workers(&fleet, self.rules, self.server);
        workers.retain(|worker| !lost.contains(&worker.id));
        if workers.is_empty() {
            let message = "no healthy sql instances available matching locality requirement";
            return Err(anyhow::Error::new(PgError::new(SqlState::UNCATEGORIZED, message)).context(Retryable));
        }
        leaseholder(&view, self.shard)?;
        let anchor = anchor(&fleet, self.rules, self.server).unwrap_or_default();
        let weights: Vec<u64> = open.iter().map(|(_, weight, _)| *weight).collect();
        let assigned = assign(&weights, &anchor, &workers, self.rules.balanced);
        for (worker, piece) in assigned.into_iter().zip(open.drain(..)) {
            queues.entry(worker).or_default().push_back(piece);
        }
        Ok(())
    }

    async fn watched<P, R>(
        &self,
        worker: NodeId,
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
            () = self.server_goes() => {
                let message = format!("the server beside node {} was lost while it was worked on", self.server);
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
            }
        };
        Ended { worker, piece, weight, failures, outcome }
    }

    /// Returns when the server that is worked on does not answer the node beside it any more: it may keep its
    /// connections open all the same, as one that is frozen does.
    async fn server_goes(&self) {
        let mut views = self.peers.cluster().subscribe();
        let gone = views.wait_for(|view| !self.has_server(view)).await;
        drop(gone);
    }

    fn has_server(&self, view: &View) -> bool {
        view.node(self.server).is_some_and(|known| known.reachable && known.info.server_state().is_some())
    }

    /// Whether the server that is worked on answers now.
    pub(crate) fn server_answers(&self) -> bool {
        self.has_server(&self.peers.cluster().view())
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
        said: Option<PgError>,
        worker: NodeId,
        mut failures: Failures,
        lost: &mut Vec<NodeId>,
    ) -> anyhow::Result<Failures> {
        if error.downcast_ref::<LostClaim>().is_some() {
            return Err(error);
        }
        tracing::warn!(shard = self.shard, %worker, "a piece of work failed: {error:#}");
        let code = said.map(|said| said.code);
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

/// Takes note of finished pieces.
pub(crate) trait AsyncDone<P, R>: Send {
    /// A piece of this weight is finished.
    fn done(&mut self, piece: P, weight: u64, result: R) -> impl Future<Output = anyhow::Result<()>> + Send;
}
