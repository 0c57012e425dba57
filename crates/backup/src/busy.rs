//! How many pieces are at work on each node, whichever shard they are of.
//!
//! Several shards are dealt at once, each by a [`crate::deal`] of its own, and a node may take part in all of them. Alone
//! a shard gives a node [`PIECES_AT_ONCE`]. Together they give it no more, but for one piece of each further shard: a
//! shard that waited until others leave a node alone might wait for all of them, while its point is held open.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use cluster::NodeId;

use crate::queues::PIECES_AT_ONCE;

/// Pieces at work, by node.
#[derive(Debug, Default)]
pub(crate) struct Busy(Mutex<BTreeMap<NodeId, usize>>);

/// A piece at work; dropped, it is not any more.
pub(crate) struct Begun<'b> {
    busy: &'b Busy,
    node: NodeId,
}

impl Busy {
    /// Whether `node` may begin one more piece of a shard of which it has `mine` at work.
    pub(crate) fn has_room(&self, node: NodeId, mine: usize) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&node).copied().unwrap_or_default();
        mine == 0 || all < PIECES_AT_ONCE
    }

    /// Counts one more.
    pub(crate) fn begin(&self, node: NodeId) -> Begun<'_> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(node).or_default() += 1;
        Begun { busy: self, node }
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let mut busy = self.busy.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = busy.get_mut(&self.node) {
            *count = count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_several_shards_use_has_one_piece_more_for_each() {
        let (busy, node) = (Busy::default(), NodeId(1));
        let room = |mine: usize| busy.has_room(node, mine);
        let begin = || busy.begin(node);
        assert!(room(0) && room(1));
        // One shard has all that there is; another one still gets its first piece, and no second.
        let mut first: Vec<Begun<'_>> = (0..PIECES_AT_ONCE).map(|_| begin()).collect();
        assert!(room(0));
        let second = begin();
        assert!(!room(1), "neither of them gets more");
        assert!(busy.has_room(NodeId(2), 1), "of another node");
        // What ends makes room, for whichever comes first.
        drop(first.pop());
        assert!(!room(1));
        drop(first.pop());
        assert!(room(1));
        drop(second);
        assert!(room(0) && room(1));
    }
}
