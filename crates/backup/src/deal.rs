//! Pieces of work dealt out to nodes, finished, lost and dealt out again.
//!
//! Exports and imports are dealt alike: to nodes that match the filter and answer now ([`Queues`]). What a node had that
//! goes is dealt to the others, and one that comes gets its part of what nobody has begun; a piece that fails for a
//! reason that may pass is tried again a few times; anything else ends it all.

use std::time::Duration;

use cluster::{NodeId, Peers, View};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use jobs::{LostClaim, Retryable};
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep, sleep_until};

use crate::patience::Patience;
use crate::point::leaseholder;
use crate::queues::{Piece, Queues};
use crate::rules::{Fleet, Rules, anchor, workers};

/// Who has come and who has gone is looked at no more often, however many nodes there are and pieces end.
const LOOK_EVERY: Duration = Duration::from_millis(500);

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
    piece: Piece<P, Failures>,
    outcome: anyhow::Result<R>,
}

/// What a piece has been through, and how long it rests before its next try.
#[derive(Clone, Copy, Default)]
struct Failures {
    patience: Patience,
    rest: Duration,
}

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
        let mut queues = Queues::of(pieces);
        let mut running = FuturesUnordered::new();
        let mut look = Instant::now();
        loop {
            if queues.is_open() || look <= Instant::now() {
                self.deal(&mut queues)?;
                look = Instant::now() + LOOK_EVERY;
            }
            while running.len() < self.at_once.max(1)
                && let Some((worker, piece)) = queues.next()
            {
                let work = one(worker, piece.what.clone());
                running.push(self.watched(worker, piece, work));
            }
            if running.is_empty() {
                return Ok(());
            }
            let ended = tokio::select! {
                Some(ended) = running.next() => ended,
                () = sleep_until(look) => continue,
            };
            let (worker, mut piece) = (ended.worker, ended.piece);
            queues.ended(worker, piece.weight);
            match ended.outcome {
                Ok(result) => done.done(piece.what, piece.weight, result).await?,
                Err(error) => {
                    let said = PgError::of(&error).cloned();
                    if let Some(end) = said.as_ref().and_then(&ends) {
                        return Err(end);
                    }
                    match self.judge(error, said, worker, piece.failures)? {
                        Some(failures) => piece.failures = failures,
                        None => queues.lose(worker),
                    }
                    queues.again(piece);
                }
            }
        }
    }

    /// Deals what is open, and what has to be dealt anew, to the nodes that match and live now.
    fn deal<P>(&self, queues: &mut Queues<P, Failures>) -> anyhow::Result<()> {
        let view = self.peers.cluster().view();
        let fleet = Fleet::of(&view, self.shard);
        let mut workers = workers(&fleet, self.rules, self.server);
        workers.retain(|worker| !queues.is_out(worker.id));
        if workers.is_empty() && queues.is_open() {
            let message = "no healthy sql instances available matching locality requirement";
            return Err(anyhow::Error::new(PgError::new(SqlState::UNCATEGORIZED, message)).context(Retryable));
        }
        match leaseholder(&view, self.shard) {
            // Where the rule starts from is not known at the moment.
            Err(_) if !queues.is_open() => return Ok(()),
            found => found?,
        };
        let anchor = anchor(&fleet, self.rules, self.server).unwrap_or_default();
        queues.deal(&workers, &anchor, self.rules.balanced);
        Ok(())
    }

    async fn watched<P, R>(
        &self,
        worker: NodeId,
        piece: Piece<P, Failures>,
        work: impl Future<Output = anyhow::Result<R>>,
    ) -> Ended<P, R> {
        let rested = async {
            sleep(piece.failures.rest).await;
            work.await
        };
        let outcome = tokio::select! {
            // What is done is done, whatever has gone since.
            biased;
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
        Ended { worker, piece, outcome }
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

    /// What a failure means: nothing when the worker is lost, how the piece stands now, or the end of everything.
    fn judge(
        &self,
        error: anyhow::Error,
        said: Option<PgError>,
        worker: NodeId,
        mut failures: Failures,
    ) -> anyhow::Result<Option<Failures>> {
        if error.downcast_ref::<LostClaim>().is_some() {
            return Err(error);
        }
        tracing::warn!(shard = self.shard, %worker, "a piece of work failed: {error:#}");
        let code = said.map(|said| said.code);
        let connection = code == Some(SqlState::CONNECTION_FAILURE);
        if connection && !self.is_reachable(worker) {
            // Its death is not the piece's fault.
            return Ok(None);
        }
        // What a store or a lock refuses now it may grant later; across nodes only the code tells.
        let may_pass = connection || code.is_some_and(|code| PASSING.contains(&code)) || storage::is_transient(&error);
        match failures.patience.after_failure(Instant::now()).filter(|_| may_pass) {
            Some(rest) => Ok(Some(Failures { rest, ..failures })),
            None => Err(error),
        }
    }
}

/// Takes note of finished pieces.
pub(crate) trait AsyncDone<P, R>: Send {
    /// A piece of this weight is finished.
    fn done(&mut self, piece: P, weight: u64, result: R) -> impl Future<Output = anyhow::Result<()>> + Send;
}
