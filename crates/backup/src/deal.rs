//! Pieces of work dealt out to nodes, finished, lost and dealt out again.
//!
//! Exports and imports are dealt alike: to nodes that match the filter and answer now ([`Queues`]). What a node had that
//! goes is dealt to the others, and one that comes gets its part of what nobody has begun; a piece that fails for a
//! reason that may pass is tried again for a while, and when that is over the job is begun again with what is finished;
//! anything else ends it all. Where there are several servers to read from, each worker has its own or the closest; when
//! one of them is lost, what its node had is dealt anew, and the others are read. One that the statement keeps away from
//! by now counts as lost; what does not answer for a moment is not lost yet ([`crate::away`]).

use std::collections::BTreeMap;
use std::time::Duration;

use cluster::{NodeId, Peers};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use jobs::{LostClaim, Retryable};
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep, sleep_until};

use crate::assign::Worker;
use crate::away::{self, BLIP_MAX};
use crate::busy::{Begun, Busy};
use crate::patience::{Patience, server_may_pass};
use crate::point::leaseholder;
use crate::queues::{Piece, Queues};
use crate::rules::{Fleet, Rules, anchor, nearest, workers};

/// Who has come and who has gone is looked at no more often, however many nodes there are and pieces end.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What may pass beside what a server says of itself: a store that refuses.
pub(crate) const PASSING: [SqlState; 1] = [SqlState::IO_ERROR];

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
    /// What the workers have at work, of other shards, too.
    pub(crate) busy: &'d Busy,
}

/// What a failure puts an end to.
pub(crate) enum End {
    /// Everything.
    All(anyhow::Error),
    /// The work on this server. The others go on; if it is the last one, this is the error.
    Server(anyhow::Error),
    /// Nothing but this try, if something else is at work on the server: it lends no more than it does then.
    Crowded,
}

struct Ended<P, R> {
    worker: NodeId,
    server: NodeId,
    piece: Piece<P, Failures>,
    outcome: anyhow::Result<R>,
}

/// What a piece has been through, and how long it rests before its next try.
#[derive(Clone, Copy, Default)]
struct Failures {
    patience: Patience,
    rest: Duration,
}

/// The servers that are worked on.
#[derive(Default)]
struct Servers {
    /// Those that were not given up.
    left: Vec<NodeId>,
    /// Which of them a worker has: its own, or the closest.
    near: BTreeMap<NodeId, NodeId>,
    /// How many pieces are at work on each.
    busy: BTreeMap<NodeId, usize>,
    /// How many may be, where that has turned out to be fewer than was thought: sessions may be lost one by one.
    room: BTreeMap<NodeId, usize>,
    /// Since when there is nobody that the work could be dealt to.
    nobody_since: Option<Instant>,
}

impl Servers {
    /// The server for one more piece at this worker, if it lends another session.
    fn free(&self, worker: NodeId, at_once: usize) -> Option<NodeId> {
        let server = self.near.get(&worker)?;
        let room = self.room.get(server).copied().unwrap_or(at_once).max(1);
        (self.busy.get(server).copied().unwrap_or_default() < room).then_some(*server)
    }

    /// A server had no session for one piece more. Gives whether that is because of the others at work there: their number
    /// is its room from now on, so this is said of it a few times at most.
    fn is_crowded(&mut self, server: NodeId) -> bool {
        let others = self.busy.get(&server).copied().unwrap_or_default();
        if others > 0 {
            self.room.insert(server, others);
        }
        others > 0
    }

    fn begin(&mut self, server: NodeId) {
        *self.busy.entry(server).or_default() += 1;
    }

    fn ended(&mut self, server: NodeId) {
        *self.busy.entry(server).or_default() -= 1;
    }
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
        ends: impl Fn(&P, &PgError, NodeId) -> Option<End> + Sync,
        mut done: impl AsyncDone<P, R>,
    ) -> anyhow::Result<()>
    where
        P: Clone + Send + Sync,
        R: Send,
        F: Future<Output = anyhow::Result<R>> + Send,
    {
        let mut queues = Queues::of(pieces);
        let mut servers = Servers { left: self.servers.to_vec(), ..Servers::default() };
        let mut running = FuturesUnordered::new();
        let mut look = Instant::now();
        loop {
            if queues.is_open() || look <= Instant::now() {
                self.deal_or_wait(&mut queues, &mut servers, running.is_empty())?;
                look = Instant::now() + LOOK_EVERY;
            }
            let free = |servers: &Servers, worker: NodeId, mine: usize| {
                servers.free(worker, self.at_once).filter(|_| self.busy.has_room(worker, mine))
            };
            while let Some((worker, server, piece)) = queues.next(|worker, mine| free(&servers, worker, mine)) {
                servers.begin(server);
                let (work, begun) = (one(worker, server, piece.what.clone()), self.busy.begin(worker));
                running.push(self.watched((worker, server), piece, begun, work));
            }
            if running.is_empty() && queues.is_empty() {
                return Ok(());
            }
            let ended = tokio::select! {
                Some(ended) = running.next() => ended,
                () = sleep_until(look) => continue,
            };
            let Ended { worker, server, piece, outcome } = ended;
            queues.ended(worker, piece.weight);
            servers.ended(server);
            match outcome {
                Ok(result) => done.done(piece.what, piece.weight, result).await?,
                Err(error) => {
                    let end = PgError::of(&error).and_then(|said| ends(&piece.what, said, server));
                    let lost = self.failed((&mut queues, &mut servers), (worker, server), piece, (error, end))?;
                    if let Some(why) = lost {
                        done.lost(server, &why).await?;
                    }
                }
            }
        }
    }

    /// Puts a piece that failed back to what is open. Gives the reason when its server is given up now.
    fn failed<P>(
        &self,
        (queues, servers): (&mut Queues<P, Failures>, &mut Servers),
        (worker, server): (NodeId, NodeId),
        mut piece: Piece<P, Failures>,
        (error, end): (anyhow::Error, Option<End>),
    ) -> anyhow::Result<Option<anyhow::Error>> {
        let was_there = servers.left.contains(&server);
        let mut given_up = None;
        match end {
            Some(End::All(end)) => return Err(end),
            Some(End::Server(end)) => {
                servers.left.retain(|other| *other != server);
                if servers.left.is_empty() {
                    return Err(end);
                }
                // Its own node may still export; it reads from elsewhere now.
                queues.give_back(server);
                if !self.has_node(worker) {
                    queues.lose(worker);
                }
                given_up = was_there.then_some(end);
            }
            Some(End::Crowded) if servers.is_crowded(server) => {}
            // Begun before its server was given up: not the piece's fault.
            Some(End::Crowded) | None if !was_there && error.downcast_ref::<LostClaim>().is_none() => {}
            Some(End::Crowded) | None => match self.judge(error, worker, piece.failures)? {
                Some(failures) => piece.failures = failures,
                None => queues.lose(worker),
            },
        }
        queues.again(piece);
        Ok(given_up)
    }

    /// [`Self::deal`], for which there may be nobody for a moment.
    fn deal_or_wait<P>(
        &self,
        queues: &mut Queues<P, Failures>,
        servers: &mut Servers,
        idle: bool,
    ) -> anyhow::Result<()> {
        let Err(error) = self.deal(queues, servers, idle) else {
            servers.nobody_since = None;
            return Ok(());
        };
        // Nothing is begun meanwhile by those who were there before.
        servers.near.clear();
        let since = *servers.nobody_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= BLIP_MAX { Err(error) } else { Ok(()) }
    }

    /// Deals what is open, and what has to be dealt anew, to the nodes that match and live now. While nothing is at work
    /// (`idle`), what waits has to be begun by somebody: nobody else will notice that there is nobody left.
    fn deal<P>(&self, queues: &mut Queues<P, Failures>, servers: &mut Servers, idle: bool) -> anyhow::Result<()> {
        let view = self.peers.cluster().view();
        let fleet = Fleet::of(&view, self.shard);
        let mut workers = workers(&fleet, self.rules, &servers.left);
        workers.retain(|worker| !queues.is_out(worker.id));
        if workers.is_empty() && (queues.is_open() || idle && !queues.is_empty()) {
            let message = "no healthy sql instances available matching locality requirement";
            return Err(anyhow::Error::new(PgError::new(SqlState::UNCATEGORIZED, message)).context(Retryable));
        }
        match leaseholder(&view, self.shard) {
            // Where the rule starts from is not known at the moment.
            Err(_) if !queues.is_open() => return Ok(()),
            found => found?,
        };
        let anchor = anchor(&fleet, self.rules, &servers.left).unwrap_or_default();
        queues.deal(&workers, &anchor, self.rules.balanced);
        let near = |worker: &Worker| Some((worker.id, nearest(&fleet, worker.id, &servers.left)?));
        servers.near = workers.iter().filter_map(near).collect();
        Ok(())
    }

    async fn watched<P, R>(
        &self,
        (worker, server): (NodeId, NodeId),
        piece: Piece<P, Failures>,
        begun: Begun<'_>,
        work: impl Future<Output = anyhow::Result<R>>,
    ) -> Ended<P, R> {
        let rested = async {
            sleep(piece.failures.rest).await;
            match away::withdrawn(&self.peers.cluster().view(), self.rules, server) {
                Some(why) => Err(why.into()),
                None => work.await,
            }
        };
        let watched = away::watching(self.peers, server, BLIP_MAX, "it was worked on", rested);
        let outcome = tokio::select! {
            // What the work itself has come to counts, whatever else has become known.
            biased;
            outcome = watched => outcome,
            () = away::node(self.peers, worker) => {
                let message = format!("node {worker} was lost while it worked");
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
            }
            why = away::withdrawal(self.peers, self.rules, server) => Err(why.into()),
        };
        drop(begun);
        Ended { worker, server, piece, outcome }
    }

    /// Whether the server beside this node answers now, and may be read still.
    pub(crate) fn has_server(&self, server: NodeId) -> bool {
        let view = self.peers.cluster().view();
        away::has_server(&view, server) && away::withdrawn(&view, self.rules, server).is_none()
    }

    /// Whether `node` answers now.
    fn has_node(&self, node: NodeId) -> bool {
        away::has_node(&self.peers.cluster().view(), node)
    }

    /// What a failure means: for everything, an error; for the worker, which is lost, none; for the piece.
    fn judge(&self, error: anyhow::Error, worker: NodeId, mut failures: Failures) -> anyhow::Result<Option<Failures>> {
        if error.downcast_ref::<LostClaim>().is_some() {
            return Err(error);
        }
        tracing::warn!(shard = self.shard, %worker, "a piece of work failed: {error:#}");
        let code = PgError::of(&error).map(|said| said.code);
        let connection = code == Some(SqlState::CONNECTION_FAILURE);
        if connection && !self.has_node(worker) {
            // Its death is not the piece's fault.
            return Ok(None);
        }
        // What a store or a lock refuses now it may grant later; across nodes only the code tells.
        let may_pass = connection || server_may_pass(&error, &PASSING) || storage::is_transient(&error);
        match failures.patience.after_failure(Instant::now()).filter(|_| may_pass) {
            Some(rest) => Ok(Some(Failures { rest, ..failures })),
            // A store that stays away, which the job has come to before; a table that stays locked: it is begun again with
            // all that it has, for as long as jobs are.
            None if may_pass => Err(error.context(Retryable)),
            None => Err(error),
        }
    }
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use cluster::secret::ClusterSecret;
    use cluster::store::Store;
    use cluster::{Cluster, Dialer};

    use super::*;
    use crate::rules::tests::info;

    fn peers(state: &Path) -> Peers {
        let store = Arc::new(Store::open(state).unwrap());
        let cluster = Cluster::new(info(1, 0, None), &[], store).unwrap();
        Peers::new(cluster, Dialer::new(ClusterSecret::Insecure, None, "test".to_owned()))
    }

    fn rules() -> Rules {
        Rules::matching(&"region=west".parse().unwrap())
    }

    fn deal<'d>(peers: &'d Peers, rules: &'d Rules, busy: &'d Busy) -> Deal<'d> {
        Deal { peers, rules, shard: "s1", servers: &[NodeId(1)], at_once: 1, busy }
    }

    /// What passes is tried again here first, then by the job as a whole; its client is told of it in the end.
    #[tokio::test]
    async fn what_may_pass_fails_no_job_at_once() {
        let (state, rules, busy) = (tempfile::tempdir().unwrap(), rules(), Busy::default());
        let peers = peers(state.path());
        let deal = deal(&peers, &rules, &busy);
        for (code, passes) in [
            (SqlState::IO_ERROR, true),
            (SqlState::TOO_MANY_CONNECTIONS, true),
            (SqlState::LOCK_NOT_AVAILABLE, true),
            (SqlState::OBJECT_IN_USE, true),
            (SqlState::SERIALIZATION_FAILURE, true),
            (SqlState::DEADLOCK_DETECTED, true),
            (SqlState::ADMIN_SHUTDOWN, true),
            (SqlState::CRASH_SHUTDOWN, true),
            (SqlState::CANNOT_CONNECT_NOW, true),
            (SqlState::UNDEFINED_TABLE, false),
            (SqlState::DISK_FULL, false),
            (SqlState::INTERNAL_ERROR, false),
        ] {
            let said = PgError::new(code, "not now").detail("It is somebody else's.").hint("Wait for them.");
            let judge = |failures| deal.judge(said.clone().into(), NodeId(1), failures);
            let last = match judge(Failures::default()) {
                Ok(again) => {
                    assert!(passes && again.is_some_and(|failures| failures.rest > Duration::ZERO), "{said:?}");
                    judge(Failures { patience: Patience::exhausted(), ..Failures::default() }).err().unwrap()
                }
                Err(error) => error,
            };
            assert_eq!(last.downcast_ref::<Retryable>().is_some(), passes, "{said:?}");
            assert_eq!(PgError::of(&last), Some(&said));
        }
    }

    /// G16, the second text. A coordinator matches, and so is a worker itself: this is for one that would not.
    #[tokio::test]
    async fn without_a_node_that_matches_nothing_is_dealt_and_it_may_be_tried_again() {
        let (state, rules, busy) = (tempfile::tempdir().unwrap(), rules(), Busy::default());
        let peers = peers(state.path());
        let deal = deal(&peers, &rules, &busy);
        let mut queues: Queues<&str, Failures> = Queues::of(vec![("a span", 7)]);
        let error = deal.deal(&mut queues, &mut Servers::default(), true).unwrap_err();
        let said = PgError::of(&error).unwrap();
        assert_eq!(said.code, SqlState::UNCATEGORIZED);
        assert_eq!(said.message, "no healthy sql instances available matching locality requirement");
        assert!(error.downcast_ref::<Retryable>().is_some() && queues.is_open());
        // For a moment it is waited for, and nothing is begun.
        assert!(deal.deal_or_wait(&mut queues, &mut Servers::default(), true).is_ok());
        assert!(queues.next(|_, _| Some(NodeId(1))).is_none());
    }

    #[test]
    fn a_server_without_room_is_asked_for_less() {
        let (mut servers, worker, server) = (Servers::default(), NodeId(1), NodeId(2));
        servers.near.insert(worker, server);
        for _ in 0..3 {
            assert_eq!(servers.free(worker, 3), Some(server));
            servers.begin(server);
        }
        assert_eq!(servers.free(worker, 3), None);
        // One had no session; the two others work, and are enough from now on.
        servers.ended(server);
        assert!(servers.is_crowded(server));
        assert_eq!(servers.free(worker, 3), None);
        servers.ended(server);
        assert_eq!(servers.free(worker, 3), Some(server));
        // Nothing else is at work: that is no matter of room.
        servers.ended(server);
        assert!(!servers.is_crowded(server));
        assert_eq!(servers.free(worker, 3), Some(server));
    }
}
