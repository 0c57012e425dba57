//! What this node knows of all nodes, and the handle by which the rest of the program asks and learns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::bail;
use tokio::sync::watch;
use uuid::Uuid;

use crate::leader::{Leader, confirm, elect, find_registry, merge_floors, raise_floors};
use crate::store::{LastKnown, Store};
use crate::{NodeId, NodeInfo, Role};

/// Addresses beyond this number are not followed; a fleet is not that large, a mistake may be.
const PEERS_MAX: usize = 1024;

/// A node as this one knows it.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its last answer.
    pub info: NodeInfo,
    /// Whether it answers now.
    pub reachable: bool,
}

/// All nodes at one moment; cheap to share, never changed.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Every node by its address, this one among them.
    pub nodes: BTreeMap<String, Known>,
    /// Who leads each shard.
    leaders: BTreeMap<String, Leader>,
    /// The node beside the registry's server, by its process, and the cluster's id.
    registry: Option<(Uuid, Uuid)>,
    /// Addresses that do not answer, and why, for messages.
    pub troubles: BTreeMap<String, String>,
}

impl View {
    /// The shards that a member of the fleet leads; a node without a number is none yet.
    pub fn led(&self) -> impl Iterator<Item = &str> {
        let is_member = |shard: &&str| self.leader(shard).is_some_and(|node| node.node_id.is_some());
        self.leaders.keys().map(String::as_str).filter(is_member)
    }

    /// The node that leads `shard` and answers now.
    pub fn leader(&self, shard: &str) -> Option<&NodeInfo> {
        let leader = self.leaders.get(shard)?;
        self.nodes.values().map(|known| &known.info).find(|info| info.instance == leader.instance)
    }

    /// The node of this number.
    pub fn node(&self, id: NodeId) -> Option<&Known> {
        self.nodes.values().find(|known| known.info.node_id == Some(id))
    }

    /// What `node` is to its shard.
    pub fn role(&self, node: &NodeInfo) -> Role {
        Role::of(node, self.leader(&node.shard))
    }

    /// The node beside the registry's server, with the cluster's id.
    pub fn registry(&self) -> Option<(&NodeInfo, Uuid)> {
        let (instance, cluster_id) = self.registry?;
        let node = self.nodes.values().map(|known| &known.info).find(|info| info.instance == instance)?;
        Some((node, cluster_id))
    }
}

struct State {
    me: NodeInfo,
    others: BTreeMap<String, Known>,
    troubles: BTreeMap<String, String>,
    /// Where this node was told to look by its operator.
    join: BTreeSet<String>,
    /// The other members' addresses, as the registry last had them.
    members: BTreeSet<String>,
    /// Where nodes are looked for: these, and whatever was heard of or remembered.
    addresses: BTreeSet<String>,
    known: LastKnown,
    leaders: BTreeMap<String, Leader>,
}

struct Shared {
    store: Arc<Store>,
    state: Mutex<State>,
    view: watch::Sender<Arc<View>>,
    addresses: watch::Sender<BTreeSet<String>>,
}

/// The handle; clones share one state.
///
/// Every change is followed by a new [`View`] before the call returns, so whoever waits on [`Cluster::subscribe`] sees
/// a promotion as soon as this node has heard of it.
#[derive(Clone)]
pub struct Cluster(Arc<Shared>);

impl Cluster {
    /// Starts from this node's own description, the addresses it was given, and what its store remembers.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub fn new(mut me: NodeInfo, join: &[String], store: Arc<Store>) -> anyhow::Result<Self> {
        let known = store.last_known()?;
        let addresses: BTreeSet<String> =
            join.iter().chain(&known.peers).filter(|address| **address != me.address).cloned().collect();
        me.shards.clone_from(&known.shards);
        let state = State {
            me,
            others: BTreeMap::new(),
            troubles: BTreeMap::new(),
            join: join.iter().cloned().collect(),
            members: BTreeSet::new(),
            addresses: addresses.clone(),
            known,
            leaders: BTreeMap::new(),
        };
        let cluster = Self(Arc::new(Shared {
            store,
            state: Mutex::new(state),
            view: watch::Sender::default(),
            addresses: watch::Sender::new(addresses),
        }));
        cluster.publish(cluster.lock());
        Ok(cluster)
    }

    /// This node's description of itself.
    pub fn me(&self) -> NodeInfo {
        self.lock().me.clone()
    }

    /// The present view.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.0.view.borrow())
    }

    /// Views as they change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.0.view.subscribe()
    }

    /// This node's identity and last knowledge on disk.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Changes this node's description. `news` says whether others should hear of it at once.
    pub fn update_me(&self, news: impl FnOnce(&mut NodeInfo) -> bool) {
        let mut state = self.lock();
        if news(&mut state.me) {
            state.me.revision += 1;
            self.publish(state);
        }
    }

    /// Takes note that there may be nodes at these addresses.
    pub fn learn(&self, addresses: impl IntoIterator<Item = String>) {
        let mut state = self.lock();
        if state.learn(addresses) {
            self.publish(state);
        }
    }

    /// Takes up the registry's list of the other members' addresses. An address that is not among them, at which nobody has
    /// answered and which no operator has named, is one that a node has left: it is forgotten.
    pub fn confirm_members(&self, listed: Vec<String>) {
        let mut state = self.lock();
        let has_learned = state.learn(listed.iter().cloned());
        state.members = listed.into_iter().filter(|address| *address != state.me.address).collect();
        if state.forget() || has_learned {
            self.publish(state);
        }
    }

    /// Takes up the registry's list of shards: names and system identifiers.
    pub fn confirm_shards(&self, listed: &[(String, String)]) {
        let mut state = self.lock();
        if confirm(&mut state.known.shards, listed) {
            self.publish(state);
        }
    }

    /// The addresses to follow, as they come and go.
    pub(crate) fn addresses(&self) -> watch::Receiver<BTreeSet<String>> {
        self.0.addresses.subscribe()
    }

    /// Takes a node's answer; one to a plain question takes `round_trip`, which others are told.
    ///
    /// # Errors
    ///
    /// The node belongs to another cluster, and whatever it says is not for this one.
    pub(crate) fn answered(&self, info: NodeInfo, round_trip: Duration) -> anyhow::Result<()> {
        let mut state = self.lock();
        if let (Some(mine), Some(theirs)) = (state.me.cluster_id, info.cluster_id)
            && mine != theirs
        {
            bail!("{} belongs to another cluster ({theirs})", info.name());
        }
        // A restarted or moved node is the same node: its former process goes from the list.
        state.others.retain(|address, known| {
            *address == info.address || info.node_id.is_none() || known.info.node_id != info.node_id
        });
        state.troubles.remove(&info.address);
        // It may have been forgotten while the answer was on its way.
        state.addresses.insert(info.address.clone());
        state.learn(info.peers.iter().cloned());
        merge_floors(&mut state.known.shards, &info.shards);
        if let Some(id) = info.node_id {
            state.notice(id, round_trip);
        }
        state.others.insert(info.address.clone(), Known { info, reachable: true });
        self.publish(state);
        Ok(())
    }

    /// Takes note that the node at `address` does not answer.
    pub(crate) fn unreachable(&self, address: &str, reason: String) {
        let mut state = self.lock();
        if let Some(known) = state.others.get_mut(address) {
            known.reachable = false;
        }
        state.troubles.insert(address.to_owned(), reason);
        self.publish(state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held left a state that is whole: every change below is a single assignment.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Derives leaders and floors anew, keeps what is worth keeping, and shows the result.
    fn publish(&self, mut guard: MutexGuard<'_, State>) {
        let state = &mut *guard;
        let mut floors = std::mem::take(&mut state.known.shards);
        let mut answering: Vec<&NodeInfo> =
            state.others.values().filter(|known| known.reachable).map(|known| &known.info).collect();
        answering.push(&state.me);
        raise_floors(&mut floors, answering.iter().copied());
        let shards: BTreeSet<&str> = answering.iter().map(|node| node.shard.as_str()).collect();
        let leaders = shards
            .into_iter()
            .filter_map(|shard| {
                let before = state.leaders.get(shard);
                let leader = elect(shard, answering.iter().copied(), floors.get(shard), before)?;
                Some((shard.to_owned(), leader))
            })
            .collect();
        for (shard, leader) in &leaders {
            if state.leaders.get(shard) != Some(leader) {
                let name = answering.iter().find(|node| node.instance == leader.instance).map(|node| node.name());
                tracing::info!(%shard, timeline = leader.timeline, node = name.as_deref(), "shard has a leaseholder");
            }
        }
        let registry = find_registry(answering.iter().copied(), &floors, state.me.cluster_id);
        let registry = registry.map(|(node, mark)| (node.instance, mark));
        state.leaders = leaders;
        state.known.shards = floors;
        self.keep(state);

        let mut nodes = state.others.clone();
        let me = Known { info: state.me.clone(), reachable: true };
        nodes.insert(state.me.address.clone(), me);
        let view = View { nodes, leaders: state.leaders.clone(), registry, troubles: state.troubles.clone() };
        self.0.addresses.send_if_modified(|addresses| {
            let news = *addresses != state.addresses;
            addresses.clone_from(&state.addresses);
            news
        });
        self.0.view.send_replace(Arc::new(view));
    }

    /// Tells others, and the store, what has become known of addresses and shards.
    fn keep(&self, state: &mut State) {
        let (peers, told): (Vec<String>, _) = (state.addresses.iter().cloned().collect(), state.told());
        let is_news = state.me.peers != told || state.me.shards != state.known.shards;
        if !is_news && state.known.peers == peers {
            return;
        }
        if is_news {
            state.me.peers = told;
            state.me.shards.clone_from(&state.known.shards);
            state.me.revision += 1;
        }
        state.known.peers = peers;
        if let Err(error) = self.0.store.set_last_known(&state.known) {
            // The node works without; the next change tries again.
            tracing::warn!("could not keep what is known of the fleet: {error:#}");
        }
    }
}

impl State {
    /// In whole milliseconds. What differs by no more than a quarter from what was told is left at that: it would be news
    /// all the time.
    fn notice(&mut self, id: NodeId, round_trip: Duration) {
        let millis = u32::try_from(round_trip.as_millis()).unwrap_or(u32::MAX);
        let told = self.me.round_trips.get(&id);
        if told.is_none_or(|told| millis.abs_diff(*told) > told / 4 + 1) {
            self.me.round_trips.insert(id, millis);
            self.me.revision += 1;
        }
    }

    /// Where others are told that nodes are. What this node has by hearsay it does not pass on: nodes that tell each other of
    /// an address would keep it for ever, and one that moves often would leave a long trail.
    fn told(&self) -> Vec<String> {
        let answering = self.others.iter().filter(|(_, known)| known.reachable).map(|(address, _)| address);
        let told: BTreeSet<&String> = self.members.iter().chain(answering).collect();
        told.into_iter().cloned().collect()
    }

    /// Forgets the addresses that nodes have left. True when there are any.
    fn forget(&mut self) -> bool {
        let Self { join, members, others, addresses, troubles, .. } = self;
        let before = addresses.len();
        addresses.retain(|it| join.contains(it) || members.contains(it) || others.contains_key(it));
        troubles.retain(|address, _| addresses.contains(address));
        addresses.len() != before
    }

    /// True when there is a new address among them.
    fn learn(&mut self, addresses: impl IntoIterator<Item = String>) -> bool {
        let before = self.addresses.len();
        for address in addresses {
            if address != self.me.address && self.addresses.len() < PEERS_MAX {
                self.addresses.insert(address);
            }
        }
        self.addresses.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::node;

    #[test]
    fn addresses_that_nodes_have_left_are_followed_until_the_registry_answers_and_never_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<String>>();
        store.set_last_known(&LastKnown { peers: texts(&["left", "n2:26257"]), ..LastKnown::default() }).unwrap();
        let cluster = Cluster::new(node(1, "s1", None), &texts(&["door"]), store).unwrap();
        let followed = || cluster.addresses().borrow().iter().cloned().collect::<Vec<_>>();
        let kept = || cluster.store().last_known().unwrap().peers;
        let answered = |number: i32, address: &str, peers: &[&str]| {
            let info = NodeInfo { address: address.to_owned(), peers: texts(peers), ..node(number, "s1", None) };
            cluster.answered(info, Duration::ZERO).unwrap();
        };
        // Without the registry nobody can say who is away for a while and who for good.
        answered(2, "n2:26257", &["left", "heard of"]);
        cluster.unreachable("left", "nobody is there".to_owned());
        assert_eq!(followed(), ["door", "heard of", "left", "n2:26257"]);
        assert_eq!((cluster.me().peers, kept()), (texts(&["n2:26257"]), followed()));

        cluster.confirm_members(texts(&["away", "n2:26257"]));
        assert_eq!(followed(), ["away", "door", "n2:26257"]);
        assert_eq!((cluster.me().peers, kept()), (texts(&["away", "n2:26257"]), followed()));
        assert_eq!(cluster.view().troubles.len(), 0);

        // A node that does not answer stays known, and one that has moved is not where it was.
        cluster.unreachable("n2:26257", "it does not answer".to_owned());
        cluster.confirm_members(texts(&["away", "n2:26257"]));
        assert_eq!(cluster.me().peers, ["away", "n2:26257"]);
        answered(2, "moved", &["n2:26257"]);
        cluster.confirm_members(texts(&["away", "moved"]));
        assert_eq!(followed(), ["away", "door", "moved"]);
        assert_eq!((cluster.me().peers, kept()), (texts(&["away", "moved"]), followed()));

        // One that is no member yet is one all the same, as long as it answers.
        answered(3, "new", &[]);
        cluster.confirm_members(texts(&["away", "moved"]));
        assert_eq!(cluster.me().peers, ["away", "moved", "new"]);
    }
}
