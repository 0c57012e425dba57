//! Which node exports a span: one pure rule.
//!
//! The rule is CockroachDB's (v23.1) with weights instead of chance. (a) If the leaseholder's node takes part, it gets
//! the span. (b) Else it is one of the nodes whose locality shares the longest leading run of tiers with the
//! leaseholder's; (c) if none shares any, one of all. Among several it is the one with the fewest weighted bytes so
//! far. Bytes that a node must read from another node's server weigh half as much again, so a node without a server
//! helps, and a replica's own node carries more.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use cluster::{Locality, NodeId};

/// A node that may export: it lives and matches the filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Worker {
    /// The node.
    pub(crate) id: NodeId,
    /// Where it is.
    pub(crate) locality: Locality,
    /// Whether the server that is read from stands beside it.
    pub(crate) reads_own_server: bool,
}

/// The leaseholder of the shard whose spans are assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaseholder {
    /// Its node, if that has a number.
    pub(crate) id: Option<NodeId>,
    /// Where it is.
    pub(crate) locality: Locality,
}

/// Gives each span, by its weight in bytes, to a worker; in the order of the spans. Empty when there are no workers.
pub(crate) fn assign(weights: &[u64], leaseholder: &Leaseholder, workers: &[Worker]) -> Vec<NodeId> {
    if let Some(home) = workers.iter().find(|worker| Some(worker.id) == leaseholder.id) {
        return vec![home.id; weights.len()];
    }
    let similarity = |worker: &Worker| worker.locality.shared_prefix(&leaseholder.locality);
    let best = workers.iter().map(similarity).max().unwrap_or(0);
    let mut heap: BinaryHeap<Reverse<(u64, NodeId, bool)>> = workers
        .iter()
        .filter(|worker| similarity(worker) == best)
        .map(|worker| Reverse((0, worker.id, worker.reads_own_server)))
        .collect();
    let mut assigned = Vec::with_capacity(weights.len());
    for weight in weights {
        let Some(Reverse((load, id, own))) = heap.pop() else { return Vec::new() };
        // An empty span is work, too.
        let weight = (*weight).max(1);
        let cost = if own { weight * 2 } else { weight * 3 };
        heap.push(Reverse((load + cost, id, own)));
        assigned.push(id);
    }
    assigned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(id: i32, locality: &str, own: bool) -> Worker {
        Worker { id: NodeId(id), locality: locality.parse().unwrap(), reads_own_server: own }
    }

    fn dealt(weights: &[u64], leaseholder: (i32, &str), workers: &[Worker]) -> Vec<i32> {
        let leaseholder = Leaseholder { id: Some(NodeId(leaseholder.0)), locality: leaseholder.1.parse().unwrap() };
        assign(weights, &leaseholder, workers).into_iter().map(|id| id.0).collect()
    }

    #[test]
    fn the_leaseholder_s_node_takes_all_when_it_takes_part() {
        let workers = [worker(1, "region=a", true), worker(2, "region=a", false)];
        assert_eq!(dealt(&[5, 5, 5], (1, "region=a"), &workers), [1, 1, 1]);
    }

    #[test]
    fn the_most_similar_share_by_weighted_bytes() {
        let near =
            [worker(2, "region=a,zone=x", true), worker(3, "region=a,zone=y", false), worker(4, "region=b", true)];
        for (weights, leaseholder, expected) in [
            // The node that must read from elsewhere gets two of five.
            (&[10, 10, 10, 10, 10][..], (1, "region=a"), &[2, 3, 2, 3, 2][..]),
            // Only the longest shared run counts.
            (&[10, 10], (1, "region=a,zone=y"), &[3, 3]),
            // Nobody shares a tier: everybody helps.
            (&[10, 10, 10], (1, "region=c"), &[2, 3, 4]),
            // One large span, and small ones around it.
            (&[100, 10, 10, 10], (1, "region=a"), &[2, 3, 3, 3]),
            // Empty spans are spread, too.
            (&[0, 0, 0], (1, "region=a"), &[2, 3, 2]),
        ] {
            assert_eq!(dealt(weights, leaseholder, &near), expected, "{weights:?} from {leaseholder:?}");
        }
    }

    #[test]
    fn without_workers_nobody_is_given_anything() {
        assert_eq!(dealt(&[1], (1, "region=a"), &[]), Vec::<i32>::new());
    }
}
