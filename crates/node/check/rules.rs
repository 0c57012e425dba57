//! What the facts of all nodes together mean: pure, from what was seen to what is told.

use std::collections::{BTreeMap, BTreeSet};

use chrono::TimeDelta;
use cluster::leader::ShardFloor;
use cluster::{NodeId, Role, ServerState};
use fleet::readiness::{self, Finding, Place, Seat, ServerFacts};

use super::following;
use super::report::{Part, Report};
use super::service::{Disk, Own};

/// A disk with less than this free is told: a schema dump alone may take 1 GiB.
const FREE_MIN: u64 = 2 * 1024 * 1024 * 1024;

/// Clocks that are further apart are told. Nothing depends on them, but people compare times.
const SKEW_MAX: TimeDelta = TimeDelta::milliseconds(500);

/// Sessions that each node holds with the registry: its membership, and its jobs.
const REGISTRY_SESSIONS: usize = 2;

/// A node, as the one that was asked sees it and as it answered for itself.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) id: Option<NodeId>,
    pub(super) address: String,
    pub(super) shard: String,
    pub(super) build: String,
    /// What it is to its shard; `None` while it does not answer.
    pub(super) role: Option<Role>,
    /// Whether its session lives, where the registry could be asked.
    pub(super) is_live: Option<bool>,
    /// Its server, when that answers.
    pub(super) server: Option<ServerState>,
    /// Why it does not answer.
    pub(super) trouble: Option<String>,
    /// What it said of itself, or why it did not; `None` where it was not asked.
    pub(super) answer: Option<Result<Own, String>>,
    /// By how much its clock is off.
    pub(super) skew: TimeDelta,
}

impl Seen {
    pub(super) fn name(&self) -> String {
        match self.id {
            Some(id) => format!("node {id} at {}", self.address),
            None => format!("the node at {}", self.address),
        }
    }

    /// The facts of its server, where that could be asked.
    pub(super) fn facts(&self) -> Option<&ServerFacts> {
        self.answer.as_ref()?.as_ref().ok()?.server.as_ref()?.as_ref().ok()
    }
}

/// All nodes, and what is known of the fleet as a whole.
#[derive(Clone, Debug)]
pub(super) struct Fleet {
    pub(super) nodes: Vec<Seen>,
    /// The shards of the registry's list, with the highest timelines they were seen on.
    pub(super) floors: BTreeMap<String, ShardFloor>,
    /// Whether the asked node has ever joined a registry.
    pub(super) is_initialized: bool,
    /// The node beside the server that holds the registry.
    pub(super) registry: Option<String>,
    /// Why the registry could not list its nodes.
    pub(super) listing_failed: Option<String>,
    /// How many bytes of WAL a standby may be behind; 0 is any number.
    pub(super) lag_max: u64,
}

impl Fleet {
    pub(super) fn leader(&self, shard: &str) -> Option<&Seen> {
        self.nodes.iter().find(|seen| seen.shard == shard && seen.role == Some(Role::Leaseholder))
    }

    fn registry(&self) -> Option<&Seen> {
        self.nodes.iter().find(|seen| Some(&seen.address) == self.registry.as_ref())
    }

    /// The place of a node's server in the fleet.
    fn seat(&self, seen: &Seen, own: &Own) -> Seat {
        let head = self.leader(&seen.shard).and_then(|leader| Some(leader.server.as_ref()?.lsn.0));
        let replayed = seen.server.as_ref().map(|server| server.lsn.0);
        let holds_registry = Some(&seen.address) == self.registry.as_ref();
        Seat {
            role: seen.role,
            insecure: own.insecure,
            lag: head.zip(replayed).map_or(0, |(head, replayed)| head.saturating_sub(replayed)),
            lag_max: self.lag_max,
            readers: backup::READERS,
            slot_name: seen.id.map_or("backhaul".to_owned(), |id| format!("backhaul_n{id}")),
            registry_sessions: if holds_registry { self.nodes.len() * REGISTRY_SESSIONS } else { 0 },
        }
    }
}

/// What is missing, node by node; what is mended once for a shard is told once, beside its leaseholder if that answers.
pub(super) fn report(fleet: &Fleet) -> Report {
    let mut order: Vec<&Seen> = fleet.nodes.iter().collect();
    order.sort_by_key(|seen| seen.role != Some(Role::Leaseholder));
    let mut told: BTreeMap<&str, Vec<Finding>> = BTreeMap::new();
    let mut findings: BTreeMap<&str, Vec<Finding>> = BTreeMap::new();
    for seen in order {
        let told = told.entry(&seen.shard).or_default();
        let mut found = of_node(fleet, seen);
        found.retain(|finding| !told.contains(finding));
        told.extend(found.iter().filter(|finding| finding.is_of_shard()).cloned());
        found.sort_by_key(|finding| finding.severity);
        findings.insert(&seen.address, found);
    }
    let mut parts: Vec<Part> = fleet
        .nodes
        .iter()
        .map(|seen| Part {
            title: title(fleet, seen),
            findings: findings.remove(seen.address.as_str()).unwrap_or_default(),
        })
        .collect();
    let mut whole = of_fleet(fleet);
    if !whole.is_empty() {
        whole.sort_by_key(|finding| finding.severity);
        parts.insert(0, Part { title: "the fleet".to_owned(), findings: whole });
    }
    Report { parts, note: None }
}

fn title(fleet: &Fleet, seen: &Seen) -> String {
    let role = match seen.role {
        Some(role) => format!("{role}, shard \"{}\"", seen.shard),
        None => "does not answer".to_owned(),
    };
    let server = match (&seen.answer, seen.facts()) {
        (Some(Ok(own)), Some(facts)) => {
            let reading = readiness::reading(facts, &fleet.seat(seen, own));
            format!(", PostgreSQL {}, {reading}", facts.release())
        }
        _ => String::new(),
    };
    format!("{}: {role}{server}", seen.name())
}

fn of_node(fleet: &Fleet, seen: &Seen) -> Vec<Finding> {
    let mut found = Vec::new();
    if seen.role.is_none() {
        let why = seen.trouble.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        found.push(Finding::missing(format!("the node does not answer{why}")));
        return found;
    }
    if seen.is_live == Some(false) {
        found.push(Finding::missing(
            "the node answers, but its session in the registry has run out: it is given no work",
        ));
    }
    if seen.id.is_none() && fleet.is_initialized {
        found
            .push(Finding::missing("the node has no number yet: it could not join the registry, and its log says why"));
    }
    match &seen.answer {
        Some(Ok(own)) => {
            found.extend(of_host(own));
            match &own.server {
                Some(Ok(facts)) => found.extend(readiness::findings(facts, &fleet.seat(seen, own))),
                Some(Err(closed)) => found.push(readiness::closed(closed)),
                None => {}
            }
        }
        Some(Err(why)) => found.push(Finding::missing(format!("the node could not be asked: {why}"))),
        None => {}
    }
    if seen.skew.abs() > SKEW_MAX {
        let off = seen.skew.num_milliseconds();
        let what =
            format!("the host's clock is {off} ms off from that of the node that was asked; times will look wrong");
        found.push(Finding::advice(what).mended(Place::Host, ["timedatectl set-ntp true"]));
    }
    found.extend(following::findings(fleet, seen));
    found
}

fn of_host(own: &Own) -> Vec<Finding> {
    let mut found = Vec::new();
    if own.insecure && own.is_exposed {
        let what = "whoever reaches the node's port is trusted as a node of the fleet";
        found.push(Finding::advice(what).mended(Place::Node, ["--secret-file FILE, and not --insecure"]));
    }
    let tight = own.disks.iter().filter(|disk| disk.free < FREE_MIN);
    found.extend(tight.map(|Disk { what, path, free }| {
        Finding::advice(format!("{} MiB are free for {what} in {path}", free / (1024 * 1024)))
    }));
    found
}

fn of_fleet(fleet: &Fleet) -> Vec<Finding> {
    let mut found = Vec::new();
    match fleet.registry() {
        None if fleet.is_initialized => {
            found.push(Finding::missing(
                "no server that holds the registry can be written to: no job is made, none goes on",
            ));
        }
        None => {
            let address =
                fleet.nodes.iter().find(|seen| seen.role == Some(Role::Leaseholder)).map(|seen| &seen.address);
            let finding = Finding::missing("the fleet has no registry");
            found.push(match address {
                Some(address) => finding.mended(Place::Host, [format!("backhaul init --host {address}")]),
                None => finding,
            });
        }
        Some(node) => {
            if let Some(why) = &fleet.listing_failed {
                found.push(Finding::missing(format!("the registry cannot be read: {why}")));
            }
            found.extend(alone(node));
        }
    }
    // A shard that has just been added may not have reached the durable list that this node knows.
    let shards: BTreeSet<&String> = fleet.floors.keys().chain(fleet.nodes.iter().map(|seen| &seen.shard)).collect();
    for shard in shards.into_iter().filter(|shard| fleet.leader(shard).is_none()) {
        let what = format!("shard \"{shard}\" has no leaseholder: what is in it can be neither backed up nor restored");
        found.push(Finding::missing(what));
    }
    let mut builds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for seen in fleet.nodes.iter().filter(|seen| seen.role.is_some()) {
        builds.entry(&seen.build).or_default().push(seen.name());
    }
    if builds.len() > 1 {
        let each: Vec<String> =
            builds.iter().map(|(build, nodes)| format!("{build} on {}", nodes.join(" and "))).collect();
        found.push(Finding::advice(format!("nodes are of different builds: {}", each.join("; "))));
    }
    found
}

/// The registry survives the loss of its server only as far as a synchronous standby has confirmed it.
fn alone(registry: &Seen) -> Option<Finding> {
    let standbys = &registry.server.as_ref()?.downstream;
    if standbys.iter().any(|standby| matches!(standby.sync_state.as_str(), "sync" | "quorum")) {
        return None;
    }
    let what = format!(
        "the registry's server, beside {}, has no synchronous standby: a failover may forget the last jobs (for a \
         backup replay is paused on standbys only that are not named here)",
        registry.name()
    );
    let finding = Finding::advice(what);
    if standbys.is_empty() {
        return Some(finding);
    }
    let mut names: Vec<String> =
        standbys.iter().map(|standby| format!("\"{}\"", standby.application_name.replace('"', "\"\""))).collect();
    names.sort();
    names.dedup();
    let setting = format!("synchronous_standby_names = 'ANY 1 ({})'", names.join(", ").replace('\'', "''"));
    Some(finding.mended(
        Place::Primary { database: "postgres".to_owned() },
        [format!("ALTER SYSTEM SET {setting};"), "SELECT pg_reload_conf();".to_owned()],
    ))
}
