//! Which servers of a shard are read at once.
//!
//! Several can be when all of them can be made to stand at the same WAL position for a moment: asynchronous standbys
//! whose replay may be paused. A primary cannot stand still, and for a synchronous standby commits may wait. Those are
//! taken that are as near as the best server, and of these the ones that are the closest to some node that takes part:
//! its own server first of all. Where the leaseholder's node takes part everything is its own, and nobody else is read.

use std::fmt;

use cluster::{NodeId, Role};

use super::{Fleet, Place, Replica};

/// Servers that are read at once; others are left in peace. With each more it takes longer until all stand at one
/// position.
pub const TOGETHER_MAX: usize = 4;

/// Why a server cannot be read beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    /// It is the primary.
    Primary,
    /// Commits may wait for it.
    Voting,
    /// The node's role may not pause it.
    NoRight,
}

impl fmt::Display for Apart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "it is written to all the time, and stands at no position that others share",
            Self::Voting => "commits may wait for it, so its replay is never paused",
            Self::NoRight => "the role of its node may not pause its replay",
        })
    }
}

/// The servers that are read at once, and those that are as near and cannot be among them.
pub(super) fn together(
    fleet: &Fleet,
    participants: &[&Place],
    reads: &[Replica],
) -> (Vec<NodeId>, Vec<(NodeId, Role, Apart)>) {
    let Some(best) = reads.first() else { return (Vec::new(), Vec::new()) };
    let is_near = |replica: &&Replica| {
        !best.is_home && replica.matches == best.matches && (best.matches || replica.shared == best.shared)
    };
    let near: Vec<&Replica> = reads.iter().filter(is_near).collect();
    if near.len() < 2 {
        return (vec![best.node], Vec::new());
    }
    let (mut fit, mut apart) = (Vec::new(), Vec::new());
    for replica in near {
        match obstacle(fleet, replica) {
            Some(why) => apart.push((replica.node, replica.role, why)),
            None => fit.push(replica.node),
        }
    }
    if !best.matches {
        let places: Vec<&Place> = fit.iter().filter_map(|node| fleet.place(*node)).collect();
        let closest = |near: &&Place| closest(near, places.iter().copied());
        let wanted: Vec<NodeId> = participants.iter().filter_map(closest).collect();
        fit.retain(|node| wanted.contains(node));
    }
    fit.truncate(TOGETHER_MAX);
    match fit.len() {
        0 | 1 => (vec![best.node], apart),
        _ => (fit, apart),
    }
}

fn obstacle(fleet: &Fleet, replica: &Replica) -> Option<Apart> {
    let may_pause = || fleet.place(replica.node).and_then(|place| place.server.as_ref()).is_some_and(|it| it.may_pause);
    match replica.role {
        Role::Leaseholder => Some(Apart::Primary),
        Role::NonVoting if may_pause() => None,
        Role::NonVoting => Some(Apart::NoRight),
        _ => Some(Apart::Voting),
    }
}

fn closest<'p>(near: &Place, places: impl Iterator<Item = &'p Place>) -> Option<NodeId> {
    let rank = |place: &&Place| (near.distance(place), place.id);
    places.min_by_key(rank).map(|place| place.id)
}

/// From which of the servers beside `servers` the node `worker` reads: its own, else the closest, by leading tiers, then
/// by round trip, then by number.
pub fn nearest(fleet: &Fleet, worker: NodeId, servers: &[NodeId]) -> Option<NodeId> {
    if servers.len() < 2 || servers.contains(&worker) {
        return servers.iter().find(|server| **server == worker).or(servers.first()).copied();
    }
    let Some(place) = fleet.place(worker) else { return servers.first().copied() };
    closest(place, servers.iter().filter_map(|server| fleet.place(*server))).or(servers.first().copied())
}
