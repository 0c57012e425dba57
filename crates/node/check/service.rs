//! What each node answers to a check: for its own server and host, or for the whole fleet by asking all others.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use cluster::registry::{Listed, Registry};
use cluster::service::{Boxed, Reply, Service};
use cluster::{Known, Peers, Purpose, View};
use fleet::Server;
use fleet::readiness::{self, Closed, ServerFacts};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sql::Verb;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::anew::Last;
use super::rules::{Fleet, Seen, report};
use crate::flags::Start;

/// The name under which a node offers it.
pub(crate) const CHECK: &str = "check";

/// A node that has not answered for itself by then counts as one that does not answer.
const OWN_DEADLINE: Duration = Duration::from_secs(40);

/// Nodes that are asked at the same time.
const ASKED_AT_ONCE: usize = 16;

/// What a node can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// What is known of your own server and host? Answered with [`Own`].
    Own,
    /// What is missing in the whole fleet? Answered with a [`super::report::Report`].
    Fleet,
}

/// What a node knows of its own server and host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Own {
    /// The server beside it, if it has one.
    pub(super) server: Option<Result<ServerFacts, Closed>>,
    /// What that was when it was last asked, while it does not answer.
    #[serde(default)]
    pub(super) last: Option<Last>,
    /// Where it, its server and its programs write.
    pub(super) disks: Vec<Disk>,
    /// Whether it trusts whoever reaches it.
    pub(super) insecure: bool,
    /// Whether others than its own host reach it.
    pub(super) is_exposed: bool,
    /// Its clock.
    pub(super) clock: DateTime<Utc>,
}

/// A place that is written to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Disk {
    /// What is written there.
    pub(super) what: String,
    /// Where it is.
    pub(super) path: String,
    /// Bytes that are free.
    pub(super) free: u64,
}

/// What a node was started with, as far as a check looks at it.
pub(crate) struct Place {
    /// The server beside it.
    server: Option<Server>,
    /// Its store.
    store: PathBuf,
    /// The directory of nodelocal:// storage.
    extern_dir: PathBuf,
    /// Whether it trusts whoever reaches it.
    insecure: bool,
    /// Whether others than its own host reach it.
    is_exposed: bool,
}

impl Place {
    /// What these flags have come to.
    ///
    /// # Errors
    ///
    /// The listener has no address.
    pub(crate) fn of(
        flags: &Start,
        listener: &TcpListener,
        server: Option<Server>,
        extern_dir: &Path,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            server,
            store: flags.store.clone(),
            extern_dir: extern_dir.to_owned(),
            insecure: flags.trust.insecure,
            is_exposed: !listener.local_addr()?.ip().is_loopback(),
        })
    }
}

/// Answers checks.
pub(crate) struct Check {
    peers: Peers,
    registry: Registry,
    place: Place,
    /// What the server was at the last check for which it answered.
    last: Mutex<Option<Last>>,
}

impl Check {
    /// Answers for a node that stands there.
    pub(crate) fn new(peers: &Peers, registry: &Registry, place: Place) -> Arc<Self> {
        Arc::new(Self { peers: peers.clone(), registry: registry.clone(), place, last: Mutex::default() })
    }

    async fn answer(&self, request: Value) -> anyhow::Result<Reply> {
        let answer = match serde_json::from_value(request).context("read a request for a check")? {
            Request::Own => serde_json::to_value(self.own().await)?,
            Request::Fleet => serde_json::to_value(report(&self.fleet().await))?,
        };
        Ok(Reply::Answer(answer))
    }

    /// What is known of the own server; a server that is stopped, to be mended, does not tell any more what it was.
    async fn own(&self) -> Own {
        let mut own = own(&self.place).await;
        let state = self.peers.cluster().me().server_state().cloned();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match (&own.server, state) {
            // Of a server that was promoted in between, one of them is still the standby's.
            (Some(Ok(facts)), Some(state)) if facts.in_recovery() == state.in_recovery => {
                *last = Some(Last { facts: facts.clone(), state });
            }
            (Some(Err(_)), _) => own.last.clone_from(&last),
            _ => {}
        }
        own
    }

    /// The whole fleet as this node sees it, each node asked for itself.
    async fn fleet(&self) -> Fleet {
        let cluster = self.peers.cluster();
        let (view, me) = (cluster.view(), cluster.me());
        let listed = self.registry.nodes().await;
        let listing_failed = listed.as_ref().err().map(|error| format!("{error:#}"));
        let turns = Arc::new(Semaphore::new(ASKED_AT_ONCE));
        let mut asking = JoinSet::new();
        for seen in seen(&view, listed.as_deref().unwrap_or_default()) {
            let (peers, turns) = (self.peers.clone(), Arc::clone(&turns));
            asking.spawn(async move {
                let _turn = turns.acquire_owned().await;
                ask(&peers, seen).await
            });
        }
        let mut nodes = asking.join_all().await;
        nodes.sort_by_key(|seen| (seen.id.map_or(i32::MAX, |id| id.0), seen.address.clone()));
        let registry = view.registry().map(|(node, _)| node.address.clone());
        let lag_max = self.registry.settings().borrow().holding().lag;
        Fleet { nodes, floors: me.shards, is_initialized: me.cluster_id.is_some(), registry, listing_failed, lag_max }
    }
}

impl Service for Check {
    fn call(&self, request: Value) -> Boxed<'_, Reply> {
        Box::pin(self.answer(request))
    }
}

/// All nodes that the registry lists or that answer, not yet asked.
fn seen(view: &View, listed: &[Listed]) -> Vec<Seen> {
    let mut seen: Vec<Seen> = view.nodes.values().map(|known| of_view(view, known)).collect();
    for node in listed {
        match seen.iter_mut().find(|seen| seen.id == Some(node.id)) {
            Some(known) => known.is_live = Some(node.is_live),
            None => seen.push(Seen {
                id: Some(node.id),
                address: node.address.clone(),
                shard: node.shard.clone(),
                build: node.build.clone(),
                role: None,
                is_live: Some(node.is_live),
                server: None,
                trouble: view.troubles.get(&node.address).cloned(),
                answer: None,
                skew: TimeDelta::zero(),
            }),
        }
    }
    seen
}

fn of_view(view: &View, known: &Known) -> Seen {
    let info = &known.info;
    Seen {
        id: info.node_id,
        address: info.address.clone(),
        shard: info.shard.clone(),
        build: info.build.clone(),
        role: known.reachable.then(|| view.role(info)),
        is_live: None,
        server: info.server_state().filter(|_| known.reachable).cloned(),
        trouble: view.troubles.get(&info.address).cloned(),
        answer: None,
        skew: TimeDelta::zero(),
    }
}

/// Asks a node for itself, and finds by how much its clock is certainly off from this one's.
async fn ask(peers: &Peers, mut seen: Seen) -> Seen {
    if seen.role.is_none() {
        return seen;
    }
    let sent = Utc::now();
    let answer = match seen.id {
        Some(id) => peers.call::<Own>(id, CHECK, &Request::Own, OWN_DEADLINE).await,
        None => call_newcomer(peers, &seen.address).await,
    };
    if let Ok(own) = &answer {
        seen.skew = certain_skew(sent, own.clock, Utc::now());
    }
    seen.answer = Some(answer.map_err(|error| format!("{error:#}")));
    seen
}

/// Before there is a registry, nodes have addresses and no numbers.
async fn call_newcomer(peers: &Peers, address: &str) -> anyhow::Result<Own> {
    let session = peers.dialer().dial(address, &Purpose::Verbs).await?;
    let verb = Verb::Call { service: CHECK.to_owned(), request: serde_json::to_string(&Request::Own)? };
    let answer = session.ask(verb, OWN_DEADLINE).await?;
    serde_json::from_str(&answer).context("read what the node knows of itself")
}

/// A clock that was read between two readings of another one, and shows a time outside of them, is off.
fn certain_skew(sent: DateTime<Utc>, clock: DateTime<Utc>, received: DateTime<Utc>) -> TimeDelta {
    if clock < sent {
        clock - sent
    } else if clock > received {
        clock - received
    } else {
        TimeDelta::zero()
    }
}

async fn own(place: &Place) -> Own {
    let server = match &place.server {
        Some(server) => Some(readiness::read(server, !place.insecure).await),
        None => None,
    };
    let mut places = vec![
        ("the node's store", place.store.clone()),
        ("nodelocal:// storage", place.extern_dir.clone()),
        ("temporary files, schema dumps among them", std::env::temp_dir()),
    ];
    let data = server.as_ref().and_then(|server| server.as_ref().ok()?.settings.get("data_directory"));
    places.extend(data.map(|data| ("the server's data", PathBuf::from(data))));
    let looked = move || places.iter().filter_map(|(what, path)| disk(what, path)).collect();
    // A disk that does not answer is left alone; the other facts are still told.
    let disks = tokio::time::timeout(Duration::from_secs(5), tokio::task::spawn_blocking(looked)).await;
    Own {
        server,
        last: None,
        disks: disks.ok().and_then(Result::ok).unwrap_or_default(),
        insecure: place.insecure,
        is_exposed: place.is_exposed,
        clock: Utc::now(),
    }
}

fn disk(what: &str, path: &Path) -> Option<Disk> {
    let free = fleet::disk::free(path)?;
    Some(Disk { what: what.to_owned(), path: path.display().to_string(), free })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_only_when_no_delay_explains_it() {
        let at = |seconds| DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds);
        for (sent, clock, received, skew) in [(10, 11, 12, 0), (10, 10, 10, 0), (10, 7, 12, -3), (10, 15, 12, 3)] {
            assert_eq!(certain_skew(at(sent), at(clock), at(received)), TimeDelta::seconds(skew));
        }
    }
}
