//! A shard's point: which servers are read, and the founders that hold it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cluster::settings::Holding;
use cluster::{NodeId, NodeInfo, Peers, Role, View};
use fleet::founders::{FOUNDERS, Open, Opened, PauseLimits, PointLimits, Request, is_point_lost};
use futures_util::future::join_all;
use jobs::{Retryable, Run};
use pgerror::{PgError, SqlState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::away::{self, BLIP_MAX};
use crate::patience::server_may_pass;
use crate::rules::{Apart, Chosen, Decision, Fleet, Mode, Rules, decide, modes, nothing_to_read};
use crate::together::{self, Together};

/// Taking a point includes the dump of the schemas.
const OPEN_DEADLINE: Duration = Duration::from_secs(180);

/// A short question to the founders' node.
const ASK_DEADLINE: Duration = Duration::from_secs(10);

/// How often it is asked by somebody who cannot go on before it has answered.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Founders live at least so long without a coordinator.
const LEASE_MIN: Duration = Duration::from_secs(60);

/// What it takes to claim a job, find its point and renew it, at worst.
const TAKE_OVER: Duration = Duration::from_secs(30);

/// So often they are renewed, however long they live: the rest of a life that was renewed just now is the longest.
const RENEW_EVERY: Duration = Duration::from_secs(10);

/// How long founders live without a coordinator: longer than it takes to find another one for the job. The session of one
/// that has died lives on for a while, and where the registry has moved meanwhile, its claim is left alone for as long again.
fn lease_life(session_life: Duration) -> Duration {
    LEASE_MIN.max(session_life * 2 + TAKE_OVER)
}

/// Sessions per database and server; more would not read faster, and the server has other clients.
pub const READERS: usize = 4;

/// The same for all databases of a server together; where there are more databases than that, each has one.
const READERS_OF_ALL: usize = 16;

/// Sessions per database and server, of a backup of so many databases.
pub(crate) fn readers(databases: usize) -> usize {
    (READERS_OF_ALL / databases.max(1)).clamp(1, READERS)
}

/// Whether a refusal to take a point may pass: there are too many leases, somebody else has paused replay, or what a
/// server says of itself.
pub(crate) fn may_pass(error: &anyhow::Error) -> bool {
    server_may_pass(error, &[SqlState::CONFIGURATION_LIMIT_EXCEEDED, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE])
}

/// The servers, by shard, of which this process has said in a job that a right is missing.
static TOLD: Mutex<BTreeSet<(String, NodeId)>> = Mutex::new(BTreeSet::new());

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
    /// What keeps what is read, on those of these servers that are standbys.
    #[serde(default)]
    pub(crate) modes: BTreeMap<NodeId, Chosen>,
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

    /// The modes, for a text that has to be short: ` (node 3: paused)`, or nothing.
    pub(crate) fn modes_in_short(&self) -> String {
        let modes: Vec<String> =
            self.modes.iter().map(|(node, chosen)| format!("node {node}: {}", chosen.mode)).collect();
        if modes.is_empty() { String::new() } else { format!(" ({})", modes.join(", ")) }
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
pub(crate) fn readable(view: &View, shard: &str, rules: &Rules) -> anyhow::Result<(Fleet, Decision)> {
    leaseholder(view, shard)?;
    let fleet = Fleet::of(view, shard);
    let decision = decide(&fleet, rules);
    for (node, _, reason) in &decision.passed_over {
        tracing::debug!(%node, shard, "not read: {reason}");
    }
    match decision.reads.is_empty() {
        true => Err(anyhow::Error::new(nothing_to_read(shard, &decision, rules)).context(Retryable)),
        false => Ok((fleet, decision)),
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
    let settings = run.settings().await?;
    let (limits, life) = (settings.holding(), lease_life(settings.session_life()));
    let (fleet, decision) = readable(&peers.cluster().view(), shard, rules)?;
    let opening = Opening { run, peers, shard, databases, rules, limits, life, fleet };
    opening.tell_apart(&decision).await?;
    if decision.together.len() > 1
        && let Some(point) = opening.of_several(&decision, tries).await?
    {
        return Ok(point);
    }
    opening.of_one(&decision, tries).await
}

/// Of a shard's servers that lack a right those of which it has not been said; one that got it is news when it loses it.
fn news(told: &mut BTreeSet<(String, NodeId)>, shard: &str, powerless: Vec<NodeId>) -> Vec<NodeId> {
    told.retain(|(of, node)| of != shard || powerless.contains(node));
    powerless.into_iter().filter(|node| told.insert((shard.to_owned(), *node))).collect()
}

/// A point that is being taken.
struct Opening<'o> {
    run: &'o Run,
    peers: &'o Peers,
    shard: &'o str,
    databases: &'o [String],
    rules: &'o Rules,
    limits: Holding,
    /// How long its founders live without a coordinator.
    life: Duration,
    fleet: Fleet,
}

impl Opening<'_> {
    /// Says which servers could be read beside others, but for a right that is missing: in the first job that would, and
    /// not in each that follows. EXPLAIN and `backhaul check` say it whenever they are asked.
    async fn tell_apart(&self, decision: &Decision) -> anyhow::Result<()> {
        let powerless = decision.apart.iter().filter(|(_, _, why)| *why == Apart::NoRight).map(|(node, ..)| *node);
        let news = news(&mut TOLD.lock().unwrap_or_else(PoisonError::into_inner), self.shard, powerless.collect());
        for node in news {
            let why = Apart::NoRight;
            self.note_apart(format!("Node {node}'s cannot be read beside others: {why}.")).await?;
        }
        Ok(())
    }

    /// Of several servers at once; nothing where that cannot be had.
    async fn of_several(&self, decision: &Decision, tries: Tries) -> anyhow::Result<Option<ShardPoint>> {
        let (job, shard) = (self.run.id.0, self.shard);
        let taken = match self.modes(&decision.together) {
            Ok(modes) => {
                let request = |lease, node| self.request(lease, false, modes.get(&node));
                together::open(self.peers, shard, &decision.together, request).await.map(|taken| (taken, modes))
            }
            Err(error) => Err(error.into()),
        };
        match taken {
            Ok((Together { lease, node, others, opened }, mut modes)) => {
                tracing::info!(job, shard, %node, ?others, lsn = %opened.point.lsn, "one point taken of several servers");
                modes.retain(|of, _| *of == node || others.contains(of));
                Ok(Some(ShardPoint { shard: shard.to_owned(), node, others, lease, modes, tries, opened }))
            }
            Err(error) => {
                tracing::warn!(job, shard, "no point of several servers: {error:#}");
                let said = PgError::of(&error).map_or_else(String::new, together::sentence);
                self.note_apart(said).await?;
                Ok(None)
            }
        }
    }

    async fn of_one(&self, decision: &Decision, tries: Tries) -> anyhow::Result<ShardPoint> {
        let (job, shard) = (self.run.id.0, self.shard);
        let mut last = anyhow!("shard \"{shard}\" has no server that can be read").context(Retryable);
        let mut is_refused = false;
        for candidate in decision.candidates() {
            let node = candidate.node;
            if is_refused && candidate.role == Role::Leaseholder {
                // A mode was asked for that a standby cannot have; to read the primary instead would be a way around it.
                continue;
            }
            let modes = match self.modes(&[node]) {
                Ok(modes) => modes,
                Err(refusal) => {
                    is_refused = true;
                    let refusal = anyhow::Error::from(refusal);
                    self.run.note(&refusal).await?;
                    last = refusal.context(Retryable);
                    continue;
                }
            };
            let lease = Uuid::new_v4();
            let request = Request::Open(self.request(lease, candidate.role == Role::Voting, modes.get(&node)));
            let asked = ask::<Opened>(self.peers, node, &request, OPEN_DEADLINE);
            // It may have been taken all the same.
            match or_close(self.peers, &[node], lease, asked).await {
                Ok(opened) => {
                    let point = &opened.point;
                    tracing::info!(job, shard, %node, lsn = %point.lsn, mode = ?point.mode, "point taken");
                    let (shard, others) = (shard.to_owned(), Vec::new());
                    return Ok(ShardPoint { shard, node, others, lease, modes, tries, opened });
                }
                Err(error) => {
                    tracing::warn!(job, shard, %node, "no point on this server: {error:#}");
                    self.run.note(&error).await?;
                    last = if may_pass(&error) { error.context(Retryable) } else { error };
                }
            }
        }
        Err(last).with_context(|| format!("take a point of shard \"{shard}\""))
    }

    fn modes(&self, nodes: &[NodeId]) -> Result<BTreeMap<NodeId, Chosen>, PgError> {
        modes(&self.fleet, nodes, self.rules.standby_mode, &self.limits)
    }

    fn request(&self, lease: Uuid, voting: bool, chosen: Option<&Chosen>) -> Open {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let Holding { pause, wal, free, age, xmin_age, .. } = self.limits;
        let is_kept = chosen.is_some_and(|chosen| chosen.mode == Mode::Paused);
        Open {
            lease,
            job: self.run.id.0,
            databases: self.databases.to_vec(),
            readers: readers(self.databases.len()),
            voting,
            life_ms: ms(self.life),
            pause: is_kept.then(|| PauseLimits { longest_ms: ms(pause), wal_bytes: wal, free_bytes: free }),
            limits: PointLimits { age_ms: ms(age), xmin_age, wal_bytes: wal },
        }
    }

    /// Says in the job why one server is read where there are several.
    async fn note_apart(&self, why: String) -> anyhow::Result<()> {
        let message = format!("not all servers of shard \"{}\" that are near are read at once", self.shard);
        let error = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).detail(why);
        self.run.note(&anyhow::Error::from(error)).await
    }
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
    let asked = peers.call(node, FOUNDERS, request, deadline);
    away::watching(peers, node, BLIP_MAX, "a point was taken of it", asked).await
}

/// The nodes whose founders still live; renews them. Where replay was to stay paused and goes on before everything is read,
/// `run` is told, once.
pub(crate) async fn alive(run: Option<&Run>, peers: &Peers, point: &ShardPoint) -> Vec<NodeId> {
    renewed(run, peers, point).await.0
}

/// The same before a point is given up. Only its node can say that it is lost: one that does not say so may be away for a
/// moment, or unknown here as yet, as all are to a process that has just begun. It is asked again for a whole `moment`.
pub(crate) async fn alive_in_a_moment(peers: &Peers, point: &ShardPoint, moment: Duration) -> Vec<NodeId> {
    let begun = Instant::now();
    loop {
        let (alive, unsaid) = renewed(None, peers, point).await;
        if unsaid.is_empty() || begun.elapsed() >= moment {
            return alive;
        }
        sleep(ASK_AGAIN).await;
    }
}

/// As [`alive`]; and the nodes that have not said whether theirs do.
async fn renewed(run: Option<&Run>, peers: &Peers, point: &ShardPoint) -> (Vec<NodeId>, Vec<NodeId>) {
    let request = &Request::Renew { lease: point.lease };
    let renew = |node| async move { (node, peers.call::<Option<String>>(node, FOUNDERS, request, ASK_DEADLINE).await) };
    let (mut renewed, mut unsaid) = (Vec::new(), Vec::new());
    for (node, outcome) in join_all(point.nodes().into_iter().map(renew)).await {
        match outcome {
            Ok(over) => renewed.push((node, over)),
            Err(error) if PgError::of(&error).is_some_and(is_point_lost) => {}
            Err(_) => unsaid.push(node),
        }
    }
    for (run, node, why) in renewed.iter().filter_map(|(node, over)| Some((run?, *node, over.as_ref()?))) {
        if let Err(error) = tell_over(run, point, node, why).await {
            tracing::info!(%node, "that its replay goes on could not be told: {error:#}");
        }
    }
    (renewed.into_iter().map(|(node, _)| node).collect(), unsaid)
}

/// Says in the job that a standby's replay goes on.
async fn tell_over(run: &Run, point: &ShardPoint, node: NodeId, why: &str) -> anyhow::Result<()> {
    let key = format!("resumed/{}/{node}", point.lease);
    if run.kept::<bool>(&key).await?.is_some() {
        return Ok(());
    }
    run.keep(&key, &true).await?;
    let message = format!("replay on the standby beside node {node} goes on before everything is read there");
    let error = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
    run.note(&anyhow::Error::from(error.detail(format!("{why} It is read on as in mode \"retry\".")))).await
}

/// Renews the founders until dropped; `run` is told as by [`alive`].
pub(crate) fn keep_alive(run: Option<&Run>, peers: &Peers, point: &ShardPoint) -> AbortOnDropHandle<()> {
    let (run, peers, point) = (run.cloned(), peers.clone(), point.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            sleep(RENEW_EVERY).await;
            let alive = alive(run.as_ref(), &peers, &point).await;
            for node in point.nodes().iter().filter(|node| !alive.contains(node)) {
                // Whoever reads there will be told; a node that was away for a moment is asked again.
                tracing::info!(shard = point.shard, %node, "founders could not be renewed");
            }
        }
    }))
}

/// Lets all founders of a point go.
pub(crate) async fn close_all(peers: &Peers, point: &ShardPoint) {
    close_each(peers, &point.nodes(), point.lease).await;
}

async fn close_each(peers: &Peers, nodes: &[NodeId], lease: Uuid) {
    join_all(nodes.iter().map(|node| close(peers, *node, lease))).await;
}

/// Does what comes before the job knows of a lease on these nodes. Where that fails, or is dropped, nobody else can let its
/// founders go.
///
/// # Errors
///
/// As `work` does; the founders are gone then, or end by themselves.
pub(crate) async fn or_close<T>(
    peers: &Peers,
    nodes: &[NodeId],
    lease: Uuid,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let unknown = Unknown(Some((peers.clone(), nodes.to_vec(), lease)));
    let done = work.await;
    if done.is_err() {
        close_each(peers, nodes, lease).await;
    }
    unknown.settled();
    done
}

/// A lease of which the job does not know; dropped, its founders are let go.
struct Unknown(Option<(Peers, Vec<NodeId>, Uuid)>);

impl Unknown {
    /// The job knows of it, or it is gone.
    fn settled(mut self) {
        self.0 = None;
    }
}

impl Drop for Unknown {
    fn drop(&mut self) {
        // Where the whole process ends nobody is left to say it.
        if let (Some((peers, nodes, lease)), Ok(here)) = (self.0.take(), Handle::try_current()) {
            here.spawn(async move { close_each(&peers, &nodes, lease).await });
        }
    }
}

/// Lets the founders of one node go. If that cannot be said, their lease runs out.
pub(crate) async fn close(peers: &Peers, node: NodeId, lease: Uuid) {
    if let Err(error) = peers.call::<()>(node, FOUNDERS, &Request::Close { lease }, ASK_DEADLINE).await {
        tracing::info!(%node, "founders end by themselves: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;

    use cluster::service::{Boxed, Reply, Service};
    use fleet::founders::LIFE_MAX;
    use jobs::LostClaim;
    use serde_json::{Value, json};
    use tokio::sync::{mpsc, oneshot};
    use tokio::task::yield_now;

    use super::*;
    use crate::export::tests::west;
    use crate::manifest::tests;

    /// Has founders, or has lost them; and tells what is asked of it.
    struct Held {
        is_lost: bool,
        asked: mpsc::UnboundedSender<Request>,
    }

    impl Service for Held {
        fn call(&self, request: Value) -> Boxed<'_, Reply> {
            self.asked.send(serde_json::from_value(request).unwrap()).unwrap();
            let lost =
                PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, "the backup's point on db1:5432 is lost");
            let answer = if self.is_lost { Err(lost.into()) } else { Ok(Reply::Answer(Value::Null)) };
            Box::pin(std::future::ready(answer))
        }
    }

    #[tokio::test]
    async fn a_node_that_is_unknown_for_a_moment_has_not_lost_its_founders() {
        let opened = json!({ "point": tests::point(), "databases": [] });
        let point = json!({ "shard": "s1", "node": 2, "lease": Uuid::new_v4(), "opened": opened });
        let point: ShardPoint = serde_json::from_value(point).unwrap();
        for (what, is_found, is_lost, moment, alive, times) in [
            ("it is found", true, false, Duration::MAX, vec![NodeId(2)], 1),
            ("it says that they are lost", true, true, Duration::MAX, vec![], 1),
            ("it stays unknown", false, false, Duration::ZERO, vec![], 0),
        ] {
            let state = tempfile::tempdir().unwrap();
            let (cluster, _, peers, _) = west(state.path());
            let (asked, mut heard) = mpsc::unbounded_channel();
            peers.offer(FOUNDERS, Arc::new(Held { is_lost, asked }));
            let found = async {
                // It has been asked for by then, in vain.
                yield_now().await;
                cluster.update_me(|me| {
                    me.node_id = is_found.then_some(NodeId(2));
                    true
                });
            };
            let (answered, ()) = tokio::join!(alive_in_a_moment(&peers, &point, moment), found);
            let heard: Vec<Request> = std::iter::from_fn(|| heard.try_recv().ok()).collect();
            assert_eq!((answered, heard), (alive, vec![Request::Renew { lease: point.lease }; times]), "{what}");
        }
    }

    #[tokio::test]
    async fn founders_that_no_row_names_yet_are_let_go_with_the_run() {
        let state = tempfile::tempdir().unwrap();
        let (_, _, peers, _) = west(state.path());
        let (asked, mut heard) = mpsc::unbounded_channel();
        peers.offer(FOUNDERS, Arc::new(Held { is_lost: false, asked }));
        let nodes = [NodeId(1)];
        // The job knows of this one: it is not the first that is closed.
        or_close(&peers, &nodes, Uuid::new_v4(), async { Ok(()) }).await.unwrap();
        let refused = Uuid::new_v4();
        let error = or_close(&peers, &nodes, refused, async { Err::<(), _>(LostClaim.into()) }).await.unwrap_err();
        assert!(error.downcast_ref::<LostClaim>().is_some(), "{error:#}");
        assert_eq!(heard.try_recv(), Ok(Request::Close { lease: refused }));
        let dropped = Uuid::new_v4();
        let (begun, has_begun) = oneshot::channel();
        let keeping = async move {
            begun.send(()).unwrap();
            pending::<anyhow::Result<()>>().await
        };
        let keeping = tokio::spawn(async move { or_close(&peers, &nodes, dropped, keeping).await });
        has_begun.await.unwrap();
        keeping.abort();
        assert!(keeping.await.unwrap_err().is_cancelled());
        assert_eq!(heard.recv().await, Some(Request::Close { lease: dropped }));
    }

    #[test]
    fn points_are_taken_anew_a_bounded_number_of_times() {
        let mut tries = Tries::default();
        for spoilt in 0..4 {
            assert_eq!((tries.spoilt, tries.are_over()), (spoilt, false));
            tries = tries.spoilt();
        }
        assert!(tries.are_over());
        let mut tries = Tries { spoilt: 3, lost: 0 };
        for lost in 0..30 {
            assert_eq!((tries.spoilt, tries.lost, tries.are_over()), (3, lost, false));
            tries = tries.lost();
        }
        assert!(tries.are_over());
    }

    #[test]
    fn founders_outlive_the_search_for_another_coordinator() {
        for (session_life_ms, seconds) in
            [(300, 60), (10_000, 60), (15_000, 60), (16_000, 62), (60_000, 150), (600_000, 1230)]
        {
            let session_life = Duration::from_millis(session_life_ms);
            let life = lease_life(session_life);
            assert_eq!(life, Duration::from_secs(seconds), "{session_life:?}");
            // The last renewal may lie so far back, and what a node grants has an end.
            assert!(RENEW_EVERY + session_life * 2 < life && life <= LIFE_MAX, "{session_life:?}");
        }
    }

    #[test]
    fn a_missing_right_is_said_once_until_it_was_there() {
        let mut told = BTreeSet::new();
        let (two, three) = (NodeId(2), NodeId(3));
        for (shard, powerless, expected) in [
            ("s1", vec![two], vec![two]),
            ("s1", vec![two, three], vec![three]),
            ("s2", vec![two], vec![two]),
            ("s1", vec![two, three], vec![]),
            ("s1", vec![three], vec![]),
            ("s1", vec![two, three], vec![two]),
        ] {
            assert_eq!(news(&mut told, shard, powerless), expected);
        }
    }
}
