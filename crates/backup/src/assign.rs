//! Which node exports a span: one pure rule.
//!
//! The rule is CockroachDB's (v23.1) with weights instead of chance. (a) If the leaseholder's node takes part, it gets
//! the span. (b) Else it is one of the nodes whose locality shares the longest leading run of tiers with the
//! leaseholder's; (c) if none shares any, one of all. Among several it is the one with the fewest weighted bytes so
//! far. Bytes that a node must read from another node's server weigh half as much again, so a node without a server
//! helps, and a replica's own node carries more.
//!
//! With `balanced` (CockroachDB's later default), (a) becomes: one of the nodes that hold a replica and take part, by
//! the same measure.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;

use cluster::{Locality, NodeId};

/// A node that may export: it lives and matches the filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// The node.
    pub id: NodeId,
    /// Where it is.
    pub locality: Locality,
    /// Whether a server that is read from stands beside it.
    pub reads_own_server: bool,
    /// Whether any server of the shard does.
    pub holds_replica: bool,
}

/// Where the rule starts from: the leaseholder of the shard whose spans are assigned, or what stands in its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Anchor {
    /// Its node, if that has a number.
    pub id: Option<NodeId>,
    /// Where it is.
    pub locality: Locality,
    /// Whether it stands in the leaseholder's place, which may not be read; then the nodes beside all servers that are
    /// read are as good as it.
    pub stands_in: bool,
}

/// Which part of the rule holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// (a) The anchor's node takes all.
    Anchor,
    /// (a), where servers stand in for the leaseholder: the nodes beside them.
    Readers,
    /// (a), balanced: the nodes that hold a replica.
    Holders,
    /// (b) The nodes that share so many leading tiers with the anchor.
    Similar(usize),
    /// (c) All that take part.
    All,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anchor => f.write_str("its node takes part"),
            Self::Readers => f.write_str("of the nodes that take part, these stand beside the servers that are read"),
            Self::Holders => f.write_str("of the nodes that take part, these hold a replica"),
            Self::Similar(tiers) => {
                write!(f, "of the nodes that take part, these share the most leading tiers with it: {tiers}")
            }
            Self::All => f.write_str("no node that takes part shares a leading tier with it"),
        }
    }
}

/// The workers that spans are shared among, and by which part of the rule.
pub fn sharers<'w>(anchor: &Anchor, workers: &'w [Worker], balanced: bool) -> (Share, Vec<&'w Worker>) {
    let those = |is: &dyn Fn(&Worker) -> bool| workers.iter().filter(|worker| is(worker)).collect::<Vec<_>>();
    let holders = those(&|worker| balanced && worker.holds_replica);
    if !holders.is_empty() {
        return (Share::Holders, holders);
    }
    let home = those(&|worker| Some(worker.id) == anchor.id || anchor.stands_in && worker.reads_own_server);
    if !home.is_empty() {
        return (if home.len() > 1 { Share::Readers } else { Share::Anchor }, home);
    }
    let similarity = |worker: &Worker| worker.locality.shared_prefix(&anchor.locality);
    let best = workers.iter().map(similarity).max().unwrap_or(0);
    let share = if best == 0 { Share::All } else { Share::Similar(best) };
    (share, those(&|worker| similarity(worker) == best))
}

/// Gives each span, by its weight in bytes, to a worker; in the order of the spans. Empty when there are no workers.
pub fn assign(weights: &[u64], anchor: &Anchor, workers: &[Worker], balanced: bool) -> Vec<NodeId> {
    assign_beside(|_| 0, weights, anchor, workers, balanced)
}

/// The same for spans that come to others: a worker has so many bytes to export `already`.
pub(crate) fn assign_beside(
    already: impl Fn(NodeId) -> u64,
    weights: &[u64],
    anchor: &Anchor,
    workers: &[Worker],
    balanced: bool,
) -> Vec<NodeId> {
    let (_, sharers) = sharers(anchor, workers, balanced);
    let load = |worker: &Worker| weighed(already(worker.id), worker.reads_own_server);
    let mut heap: BinaryHeap<Reverse<(u64, NodeId, bool)>> =
        sharers.into_iter().map(|worker| Reverse((load(worker), worker.id, worker.reads_own_server))).collect();
    let mut assigned = Vec::with_capacity(weights.len());
    for weight in weights {
        let Some(mut least) = heap.peek_mut() else { return Vec::new() };
        // An empty span is work, too.
        let weight = (*weight).max(1);
        let Reverse((load, id, own)) = &mut *least;
        *load = load.saturating_add(weighed(weight, *own));
        assigned.push(*id);
    }
    assigned
}

/// Bytes from another node's server are half as many again.
fn weighed(bytes: u64, own: bool) -> u64 {
    bytes.saturating_mul(if own { 2 } else { 3 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(id: i32, locality: &str) -> Anchor {
        Anchor { id: Some(NodeId(id)), locality: locality.parse().unwrap(), stands_in: false }
    }

    /// `own`: the server that is read stands beside it; `other`: another one of the shard does.
    fn worker(id: i32, locality: &str, server: &str) -> Worker {
        let (reads_own_server, holds_replica) = (server == "own", server != "none");
        Worker { id: NodeId(id), locality: locality.parse().unwrap(), reads_own_server, holds_replica }
    }

    fn dealt(weights: &[u64], anchor: &Anchor, workers: &[Worker], balanced: bool) -> Vec<i32> {
        assign(weights, anchor, workers, balanced).into_iter().map(|id| id.0).collect()
    }

    #[test]
    fn the_leaseholder_s_node_takes_all_when_it_takes_part() {
        let workers = [worker(1, "region=a", "own"), worker(2, "region=a", "none"), worker(3, "region=b", "other")];
        let dealt = |balanced| dealt(&[5, 5, 5, 5, 5], &at(1, "region=a"), &workers, balanced);
        assert_eq!(dealt(false), [1, 1, 1, 1, 1]);
        // Balanced, every node with a replica helps, by weight; others do not.
        assert_eq!(dealt(true), [1, 3, 1, 3, 1]);
        assert_eq!(sharers(&at(1, "region=a"), &workers, true).0, Share::Holders);
        // And where none holds one, the rule goes on as without.
        assert_eq!(sharers(&at(1, "region=a"), &workers[1..2], true).0, Share::Similar(1));
    }

    #[test]
    fn servers_that_stand_in_for_the_leaseholder_share_like_it() {
        let workers = [worker(2, "region=a", "own"), worker(3, "region=b", "own"), worker(4, "region=a", "none")];
        let anchor = Anchor { stands_in: true, ..at(2, "region=a") };
        assert_eq!(dealt(&[5, 5, 5, 5], &anchor, &workers, false), [2, 3, 2, 3]);
        assert_eq!(sharers(&anchor, &workers, false).0, Share::Readers);
        assert_eq!(sharers(&anchor, &workers[2..], false).0, Share::Similar(1));
    }

    #[test]
    fn the_most_similar_share_by_weighted_bytes() {
        let near =
            [worker(2, "region=a,zone=x", "own"), worker(3, "region=a,zone=y", "none"), worker(4, "region=b", "own")];
        for (weights, anchor, expected) in [
            // The node that must read from elsewhere gets two of five.
            (&[10, 10, 10, 10, 10][..], at(1, "region=a"), &[2, 3, 2, 3, 2][..]),
            // Only the longest shared run counts.
            (&[10, 10], at(1, "region=a,zone=y"), &[3, 3]),
            // Nobody shares a tier: everybody helps.
            (&[10, 10, 10], at(1, "region=c"), &[2, 3, 4]),
            // One large span, and small ones around it.
            (&[100, 10, 10, 10], at(1, "region=a"), &[2, 3, 3, 3]),
            // Empty spans are spread, too.
            (&[0, 0, 0], at(1, "region=a"), &[2, 3, 2]),
        ] {
            assert_eq!(dealt(weights, &anchor, &near, false), expected, "{weights:?} from {anchor:?}");
        }
    }

    /// CockroachDB's cases (`TestClosestInstances`): instances, a place, the closest, and how many tiers they share.
    ///
    /// H10 differs on purpose. Among the closest it is not chance that chooses but weights, so that the same spans are dealt alike
    /// by whoever deals them. And where there are no closest ones (H1), the coordinator does not take all: everybody
    /// that takes part has a share.
    #[test]
    fn the_closest_are_those_of_cockroachdb() {
        let deeper = &["a=x,b=1", "a=x,b=2", "a=x,b=3", "a=y,b=1", "a=z,b=1"];
        for (instances, place, closest, shared) in [
            // H1
            (&["a=x", "a=y", "a=z"][..], "z=z", &[1, 2, 3][..], 0),
            (&["a=x", "a=y", "a=z"], "", &[1, 2, 3], 0),
            // H3, H4
            (&["a=x", "a=y", "a=z"], "a=x", &[1], 1),
            (&["a=x", "a=y", "a=z"], "a=z", &[3], 1),
            (&["a=x", "a=x", "a=z", "a=z"], "a=x", &[1, 2], 1),
            // H6
            (&["a=x", "a=x", "a=z", "a=z"], "a=z", &[3, 4], 1),
            (deeper, "a=x", &[1, 2, 3], 1),
            (deeper, "a=x,b=2", &[2], 2),
            // H9
            (deeper, "a=z", &[5], 1),
            (&["a=x,b=1", "a=x,b=2", "a=y,b=1", "a=z,b=1", "a=z,b=2"], "a=z,b=2", &[5], 2),
            (&["a=x,b=1", "a=x,b=2", "a=y,b=1"], "a=x,b=3", &[1, 2], 1),
            // By position: the same tiers in another order are not alike.
            (&["a=x,b=1", "b=1,a=y"], "b=1,a=x", &[2], 1),
        ] {
            let workers: Vec<Worker> = instances.iter().zip(1..).map(|(place, id)| worker(id, place, "none")).collect();
            let (share, found) = sharers(&at(99, place), &workers, false);
            let found: Vec<i32> = found.iter().map(|worker| worker.id.0).collect();
            let expected = if shared == 0 { Share::All } else { Share::Similar(shared) };
            assert_eq!((found.as_slice(), share), (closest, expected), "{place} among {instances:?}");
        }
    }

    #[test]
    fn what_a_worker_has_already_counts() {
        let workers = [worker(2, "region=a", "own"), worker(3, "region=a", "none")];
        for (already, expected) in [([0, 0], [2, 3, 2, 3]), ([30, 0], [3, 3, 2, 3]), ([0, 30], [2, 2, 2, 2])] {
            let already = |id: NodeId| if id.0 == 2 { already[0] } else { already[1] };
            let dealt = assign_beside(already, &[10, 10, 10, 10], &at(9, "region=a"), &workers, false);
            assert_eq!(dealt, expected.map(NodeId));
        }
    }

    #[test]
    fn without_workers_nobody_is_given_anything() {
        assert_eq!(dealt(&[1], &at(1, "region=a"), &[], false), Vec::<i32>::new());
    }

    #[test]
    fn no_node_that_shares_is_given_more_than_its_part() {
        let workers: Vec<Worker> =
            (1..=7).map(|id| worker(id, "region=a", if id == 1 { "own" } else { "none" })).collect();
        let weights: Vec<u64> = (0..10_000).map(|n| n * 7919 % 1000).collect();
        let mut loads = std::collections::BTreeMap::<i32, u64>::new();
        for (id, weight) in dealt(&weights, &at(9, "region=b"), &workers, false).into_iter().zip(&weights) {
            *loads.entry(id).or_default() += weight.max(&1) * if id == 1 { 2 } else { 3 };
        }
        let (most, least) = (loads.values().max().unwrap(), loads.values().min().unwrap());
        assert!(loads.len() == 7 && most - least <= 3 * 1000, "{loads:?}");
    }
}
