//! Which node has which pieces still to do: pure, and told by [`crate::deal`] what happens.
//!
//! What is being done and what is finished stays where it is. Only what nobody has begun is dealt out again: the pieces
//! of a node that went, or, when one has come, all of them, so that it gets its part by the same rule as everybody else
//! ([`mod@crate::assign`]).

use std::collections::{BTreeMap, VecDeque};

use cluster::NodeId;

use crate::assign::{Anchor, Worker, assign_beside};

/// Pieces that one worker has at a time: while one is being compressed the other is being read. Where several shards are
/// dealt at once, [`crate::busy`] tells what they share.
pub(crate) const PIECES_AT_ONCE: usize = 2;

/// A node that was lost so often while it worked is not asked again by this run, even if it answers: it may be the work
/// that ends it.
const LOSSES_MAX: u32 = 3;

/// A piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece<P, F> {
    /// Its place among all: pieces are begun in this order.
    place: usize,
    pub(crate) what: P,
    /// In bytes.
    pub(crate) weight: u64,
    pub(crate) failures: F,
}

/// What one node has to do.
#[derive(Debug)]
struct Queue<P, F> {
    waiting: VecDeque<Piece<P, F>>,
    waiting_bytes: u64,
    at_work: usize,
    at_work_bytes: u64,
    losses: u32,
}

impl<P, F> Default for Queue<P, F> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), waiting_bytes: 0, at_work: 0, at_work_bytes: 0, losses: 0 }
    }
}

/// All pieces that are not finished.
#[derive(Debug)]
pub(crate) struct Queues<P, F> {
    /// What no node has.
    open: Vec<Piece<P, F>>,
    nodes: BTreeMap<NodeId, Queue<P, F>>,
    /// Those that took part when it was last dealt, in order.
    among: Vec<NodeId>,
}

impl<P, F: Default> Queues<P, F> {
    /// Pieces with their weights, none of them dealt.
    pub(crate) fn of(pieces: Vec<(P, u64)>) -> Self {
        let numbered = pieces.into_iter().enumerate();
        let open =
            numbered.map(|(place, (what, weight))| Piece { place, what, weight, failures: F::default() }).collect();
        Self { open, nodes: BTreeMap::new(), among: Vec::new() }
    }
}

impl<P, F> Queues<P, F> {
    /// Whether there is anything that no node has.
    pub(crate) fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Whether nothing is left to be begun.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.nodes.values().all(|queue| queue.waiting.is_empty())
    }

    /// Whether this node was lost too often to be asked again.
    pub(crate) fn is_out(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|queue| queue.losses >= LOSSES_MAX)
    }

    /// Takes note of who takes part now, and deals out what is open: pieces that no node has, those that wait at nodes
    /// that have gone, and, if a node has come, all that wait. Where nobody takes part, nothing changes.
    pub(crate) fn deal(&mut self, workers: &[Worker], anchor: &Anchor, balanced: bool) {
        if workers.is_empty() {
            return;
        }
        let now: Vec<NodeId> = workers.iter().map(|worker| worker.id).collect();
        let has_come = now.iter().any(|node| !self.among.contains(node));
        for (node, queue) in &mut self.nodes {
            if has_come || !now.contains(node) {
                self.open.extend(queue.take_back());
            }
        }
        self.among = now;
        self.open.sort_by_key(|piece| piece.place);
        let weights: Vec<u64> = self.open.iter().map(|piece| piece.weight).collect();
        let already = |node: NodeId| self.nodes.get(&node).map_or(0, |queue| queue.at_work_bytes + queue.waiting_bytes);
        let assigned = assign_beside(already, &weights, anchor, workers, balanced);
        for (node, piece) in assigned.into_iter().zip(self.open.drain(..)) {
            let queue = self.nodes.entry(node).or_default();
            queue.waiting_bytes += piece.weight;
            queue.waiting.push_back(piece);
        }
    }

    /// The piece that is to be begun next, by the node that has the fewest at work among those for which there is a server
    /// now; and that server. `server` is told how many the node has at work already.
    pub(crate) fn next(
        &mut self,
        server: impl Fn(NodeId, usize) -> Option<NodeId>,
    ) -> Option<(NodeId, NodeId, Piece<P, F>)> {
        let waits = self.nodes.iter_mut().filter(|(_, queue)| !queue.waiting.is_empty());
        let ready = waits.filter_map(|(node, queue)| Some((*node, server(*node, queue.at_work)?, queue)));
        let (node, server, queue) = ready.min_by_key(|(node, _, queue)| (queue.at_work, *node))?;
        let piece = queue.waiting.pop_front()?;
        queue.waiting_bytes -= piece.weight;
        queue.at_work += 1;
        queue.at_work_bytes += piece.weight;
        Some((node, server, piece))
    }

    /// A piece of this weight is not at work at `node` any more.
    pub(crate) fn ended(&mut self, node: NodeId, weight: u64) {
        let queue = self.nodes.entry(node).or_default();
        queue.at_work -= 1;
        queue.at_work_bytes -= weight;
    }

    /// A piece has to be done again, by whomever it is dealt to.
    pub(crate) fn again(&mut self, piece: Piece<P, F>) {
        self.open.push(piece);
    }

    /// What this node had waiting is open: it was dealt by what does not hold any more.
    pub(crate) fn give_back(&mut self, node: NodeId) {
        if let Some(queue) = self.nodes.get_mut(&node) {
            self.open.extend(queue.take_back());
        }
    }

    /// This node was lost while it worked. What it had waiting is open; should it answer again, it has come anew.
    pub(crate) fn lose(&mut self, node: NodeId) {
        self.among.retain(|one| *one != node);
        let queue = self.nodes.entry(node).or_default();
        // Once, with the last of what it was doing.
        queue.losses += u32::from(queue.at_work == 0);
        self.open.extend(queue.take_back());
    }
}

impl<P, F> Queue<P, F> {
    fn take_back(&mut self) -> impl Iterator<Item = Piece<P, F>> + use<'_, P, F> {
        self.waiting_bytes = 0;
        self.waiting.drain(..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Node 1 leads and does not take part; others by number, as they are given.
    const PLACES: [&str; 5] =
        ["region=east", "region=west,zone=a", "region=west,zone=b", "region=west,zone=c", "region=east"];

    fn workers(ids: &[i32]) -> Vec<Worker> {
        let worker = |id: &i32| Worker {
            id: NodeId(*id),
            locality: PLACES[*id as usize - 1].parse().unwrap(),
            reads_own_server: false,
            holds_replica: false,
        };
        ids.iter().map(worker).collect()
    }

    fn anchor() -> Anchor {
        Anchor { id: Some(NodeId(1)), locality: PLACES[0].parse().unwrap(), stands_in: false }
    }

    /// `2:ac 3:b` is what waits where; a capital is at work.
    fn told(queues: &Queues<char, ()>, at_work: &[(i32, Piece<char, ()>)]) -> String {
        let waits = |node: &NodeId| queues.nodes.get(node).into_iter().flat_map(|queue| &queue.waiting);
        let node = |node: &NodeId| {
            let works = at_work.iter().filter(|(at, _)| NodeId(*at) == *node).map(|(_, piece)| piece.what);
            let works = works.map(|what| what.to_ascii_uppercase());
            let all: String = works.chain(waits(node).map(|piece| piece.what)).collect();
            (!all.is_empty()).then(|| format!("{node}:{all}"))
        };
        let open: String = queues.open.iter().map(|piece| piece.what).collect();
        let open = (!open.is_empty()).then(|| format!("open:{open}"));
        queues.nodes.keys().filter_map(node).chain(open).collect::<Vec<_>>().join(" ")
    }

    /// Ten pieces of one weight, and what becomes of them step by step. `take 2,3`: who takes part, and is dealt to;
    /// `begin n`: so many are begun; `end a`: that one is finished; `lose 2`: that node is; `again a`: that one failed.
    fn play(steps: &[(&str, &str)]) {
        let mut queues: Queues<char, ()> = Queues::of(('a'..='j').map(|what| (what, 10)).collect());
        let mut at_work: Vec<(i32, Piece<char, ()>)> = Vec::new();
        for (step, expected) in steps {
            let (verb, rest) = step.split_once(' ').unwrap();
            let of_node = |at_work: &mut Vec<(i32, Piece<char, ()>)>, node: i32| {
                let (its, others) = std::mem::take(at_work).into_iter().partition(|(at, _)| *at == node);
                *at_work = others;
                its
            };
            match verb {
                "take" => {
                    let ids: Vec<i32> =
                        rest.split(',').filter(|id| !id.is_empty()).map(|id| id.parse().unwrap()).collect();
                    let ids: Vec<i32> = ids.into_iter().filter(|id| !queues.is_out(NodeId(*id))).collect();
                    queues.deal(&workers(&ids), &anchor(), false);
                }
                "begin" => (0..rest.parse().unwrap()).for_each(|_| {
                    let (node, _, piece) =
                        queues.next(|_, at_work| (at_work < PIECES_AT_ONCE).then_some(NodeId(1))).expect(step);
                    at_work.push((node.0, piece));
                }),
                "end" | "again" => rest.chars().for_each(|what| {
                    let at = at_work.iter().position(|(_, piece)| piece.what == what).expect(step);
                    let (node, piece) = at_work.remove(at);
                    queues.ended(NodeId(node), piece.weight);
                    if verb == "again" {
                        queues.again(piece);
                    }
                }),
                "lose" => {
                    let node: i32 = rest.parse().unwrap();
                    let its: Vec<(i32, Piece<char, ()>)> = of_node(&mut at_work, node);
                    for (_, piece) in its {
                        queues.ended(NodeId(node), piece.weight);
                        queues.again(piece);
                    }
                    queues.lose(NodeId(node));
                }
                _ => panic!("{step}"),
            }
            assert_eq!(told(&queues, &at_work), *expected, "after {step} of {steps:?}");
        }
    }

    #[test]
    fn a_node_that_comes_gets_its_part_of_what_nobody_has_begun() {
        play(&[
            ("take 2,3", "2:acegi 3:bdfhj"),
            ("begin 4", "2:ACegi 3:BDfhj"),
            ("end a", "2:Cegi 3:BDfhj"),
            // What is at work counts, what is finished does not.
            ("take 2,3,4", "2:Cfh 3:BDi 4:egj"),
            ("begin 2", "2:CFh 3:BDi 4:Egj"),
            ("take 2,3,4", "2:CFh 3:BDi 4:Egj"),
        ]);
        // One that is closer to the leaseholder gets all that is left, as it would have at the beginning.
        play(&[("take 2,3", "2:acegi 3:bdfhj"), ("begin 2", "2:Acegi 3:Bdfhj"), ("take 2,3,5", "2:A 3:B 5:cdefghij")]);
        play(&[("take 2", "2:abcdefghij"), ("take 2,3", "2:acegi 3:bdfhj")]);
    }

    #[test]
    fn of_a_node_that_goes_only_its_own_is_dealt_again() {
        play(&[
            ("take 2,3,4", "2:adgj 3:beh 4:cfi"),
            ("begin 3", "2:Adgj 3:Beh 4:Cfi"),
            // It is seen to be gone before what it was doing has failed.
            ("take 2,3", "2:Adgji 3:Behf 4:C"),
            ("lose 4", "2:Adgji 3:Behf open:c"),
            ("take 2,3", "2:Adgji 3:Behfc"),
            // When it is back, it is one that comes.
            ("take 2,3,4", "2:Adgj 3:Beh 4:cfi"),
        ]);
        // A piece that failed is dealt again, and nothing else is.
        play(&[
            ("take 2,3", "2:acegi 3:bdfhj"),
            ("begin 2", "2:Acegi 3:Bdfhj"),
            ("again a", "2:cegi 3:Bdfhj open:a"),
            ("take 2,3", "2:cegia 3:Bdfhj"),
        ]);
    }

    #[test]
    fn a_node_that_is_lost_again_and_again_is_not_asked_any_more() {
        let (both, lost) = (("take 2,3", "2:acegi 3:bdfhj"), ("lose 3", "2:acegi open:bdfhj"));
        play(&[both, lost, both, lost, both, lost, ("take 2,3", "2:acegibdfhj")]);
    }

    #[test]
    fn a_node_that_dies_with_two_pieces_has_died_once() {
        let mut queues: Queues<char, ()> = Queues::of(vec![('a', 10), ('b', 10)]);
        for death in 1..=LOSSES_MAX {
            assert!(!queues.is_out(NodeId(2)), "before death {death}");
            queues.deal(&workers(&[2]), &anchor(), false);
            let begun =
                [(); 2].map(|()| queues.next(|_, at_work| (at_work < PIECES_AT_ONCE).then_some(NodeId(1))).unwrap());
            for (node, _, piece) in begun {
                queues.ended(node, piece.weight);
                queues.again(piece);
                queues.lose(node);
            }
        }
        assert!(queues.is_out(NodeId(2)));
    }

    #[test]
    fn what_nobody_is_there_for_stays_open() {
        play(&[
            ("take ", "open:abcdefghij"),
            ("take 2", "2:abcdefghij"),
            ("begin 2", "2:ABcdefghij"),
            // Nobody takes part for a moment: those that are gone will be found to be lost.
            ("take ", "2:ABcdefghij"),
            ("lose 2", "open:abcdefghij"),
            ("take ", "open:abcdefghij"),
            ("take 3", "3:abcdefghij"),
        ]);
    }
}
