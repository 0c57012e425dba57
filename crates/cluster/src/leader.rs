//! Who leads a shard: one pure rule over the answers of all nodes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{NodeInfo, ServerState};

/// What is known for good about a shard, and kept in the store of every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFloor {
    /// The shard's identity; a server with another one never leads it.
    pub system_identifier: String,
    /// The highest timeline that any primary of the shard was seen on; a server on a lower one never leads again.
    pub timeline: u32,
}

/// The node that leads a shard now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// The node's process.
    pub instance: Uuid,
    /// The timeline that its server writes.
    pub timeline: u32,
}

/// Decides who leads `shard`.
///
/// A candidate answers, belongs to the shard by its word and by its system identifier, is not in recovery and writes a
/// timeline not below the floor. The highest timeline wins: a promotion always starts a higher one, so the old primary
/// loses even while it still runs. Two candidates on one timeline (a copy that was started twice) leave it with the
/// one that led before, else with the lowest node number, so that all nodes agree.
pub fn elect<'n>(
    shard: &str,
    nodes: impl Iterator<Item = &'n NodeInfo>,
    floor: Option<&ShardFloor>,
    before: Option<&Leader>,
) -> Option<Leader> {
    nodes
        .filter(|node| node.shard == shard)
        .filter_map(|node| Some((node, node.server_state()?)))
        .filter(|(_, server)| may_lead(server, floor))
        .max_by_key(|(node, server)| {
            let led_before = before.is_some_and(|leader| leader.instance == node.instance);
            (server.timeline, led_before, std::cmp::Reverse(node.node_id.map_or(i32::MAX, |id| id.0)))
        })
        .map(|(node, server)| Leader { instance: node.instance, timeline: server.timeline })
}

fn may_lead(server: &ServerState, floor: Option<&ShardFloor>) -> bool {
    !server.in_recovery
        && floor.is_none_or(|floor| {
            server.system_identifier == floor.system_identifier && server.timeline >= floor.timeline
        })
}

/// The server that holds the registry: the one with the highest timeline among those that carry its mark.
///
/// It is found by the mark and not through the leaders of shards, because a node whose server was given to the wrong
/// shard has to find the registry in order to be told so. A node that has joined a cluster looks for that one only.
pub fn find_registry<'n>(
    nodes: impl Iterator<Item = &'n NodeInfo>,
    floors: &BTreeMap<String, ShardFloor>,
    joined: Option<Uuid>,
) -> Option<(&'n NodeInfo, Uuid)> {
    nodes
        .filter_map(|node| Some((node, node.server_state()?)))
        .filter(|(node, server)| may_lead(server, floors.get(&node.shard)))
        .filter_map(|(node, server)| Some((node, server, server.registry?)))
        .filter(|(_, _, mark)| joined.is_none_or(|joined| joined == *mark))
        .max_by_key(|(node, server, _)| (server.timeline, std::cmp::Reverse(node.node_id.map_or(i32::MAX, |id| id.0))))
        .map(|(node, _, mark)| (node, mark))
}

/// Takes up what others know of shards: new ones, and higher timelines of the same. True when anything changed.
///
/// Identities come from the registry alone ([`confirm`]) and are passed on by nodes that have them: a node that was
/// started with the wrong server must not be able to give a shard its own.
pub fn merge_floors(floors: &mut BTreeMap<String, ShardFloor>, known: &BTreeMap<String, ShardFloor>) -> bool {
    let mut changed = false;
    for (shard, theirs) in known {
        match floors.get_mut(shard) {
            Some(ours) if ours.system_identifier == theirs.system_identifier => {
                changed |= ours.timeline < theirs.timeline;
                ours.timeline = ours.timeline.max(theirs.timeline);
            }
            Some(_) => {}
            None => {
                floors.insert(shard.clone(), theirs.clone());
                changed = true;
            }
        }
    }
    changed
}

/// Takes up what the registry says shards are. True when anything changed.
pub fn confirm(floors: &mut BTreeMap<String, ShardFloor>, listed: &[(String, String)]) -> bool {
    let mut changed = false;
    for (shard, system_identifier) in listed {
        if floors.get(shard).is_none_or(|floor| floor.system_identifier != *system_identifier) {
            let floor = ShardFloor { system_identifier: system_identifier.clone(), timeline: 0 };
            floors.insert(shard.clone(), floor);
            changed = true;
        }
    }
    changed
}

/// Raises the floors of known shards by the primaries that answer. True when anything changed.
///
/// A standby's timeline does not count: it may follow one that no primary of the fleet writes yet.
pub fn raise_floors<'n>(floors: &mut BTreeMap<String, ShardFloor>, nodes: impl Iterator<Item = &'n NodeInfo>) -> bool {
    let mut changed = false;
    for (node, server) in nodes.filter_map(|node| Some((node, node.server_state()?))) {
        if let Some(floor) = floors.get_mut(&node.shard)
            && may_lead(server, Some(floor))
            && floor.timeline < server.timeline
        {
            floor.timeline = server.timeline;
            changed = true;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::node;

    #[test]
    fn the_highest_timeline_out_of_recovery_leads() {
        let floor = |timeline| Some(ShardFloor { system_identifier: "id-of-s1".to_owned(), timeline });
        let led = |number| Some(Leader { instance: node(number, "s1", None).instance, timeline: 1 });
        let primary = |number, timeline| node(number, "s1", Some((false, timeline)));
        let standby = |number, timeline| node(number, "s1", Some((true, timeline)));
        let stranger = {
            let mut stranger = node(3, "s1", Some((false, 9)));
            if let Some(crate::ServerInfo::Up(state)) = &mut stranger.server {
                state.system_identifier = "another".to_owned();
            }
            stranger
        };
        for (case, nodes, floor, before, leader) in [
            ("one primary", vec![primary(1, 1), standby(2, 1)], None, None, Some(1)),
            ("no primary", vec![standby(1, 1), standby(2, 1), node(4, "s1", None)], None, None, None),
            ("after a promotion", vec![primary(1, 1), primary(2, 2)], floor(2), led(1), Some(2)),
            ("the old primary came back alone", vec![primary(1, 1), standby(3, 2)], floor(2), None, None),
            ("two on one timeline, one led before", vec![primary(1, 1), primary(2, 1)], floor(1), led(2), Some(2)),
            ("two on one timeline", vec![primary(2, 1), primary(1, 1)], None, None, Some(1)),
            ("another shard", vec![node(1, "s2", Some((false, 1)))], None, None, None),
            ("a server of other identity", vec![stranger, primary(1, 1)], floor(1), None, Some(1)),
        ] {
            let elected = elect("s1", nodes.iter(), floor.as_ref(), before.as_ref());
            let expected = leader.map(|number| node(number, "s1", None).instance);
            assert_eq!(elected.map(|leader| leader.instance), expected, "{case}");
        }
    }

    #[test]
    fn floors_only_rise_and_only_where_the_registry_has_confirmed_them() {
        let mut floors = BTreeMap::new();
        let first = node(1, "s1", Some((false, 3)));
        assert!(!raise_floors(&mut floors, std::iter::once(&first)) && floors.is_empty());
        assert!(confirm(&mut floors, &[("s1".to_owned(), "id-of-s1".to_owned())]));
        assert!(!confirm(&mut floors, &[("s1".to_owned(), "id-of-s1".to_owned())]));
        for (case, seen, changed, timeline) in [
            ("first sight", first, true, 3),
            ("a lower primary", node(2, "s1", Some((false, 2))), false, 3),
            ("a standby ahead", node(2, "s1", Some((true, 7))), false, 3),
            ("a promotion", node(2, "s1", Some((false, 4))), true, 4),
        ] {
            assert_eq!(raise_floors(&mut floors, std::iter::once(&seen)), changed, "{case}");
            assert_eq!(floors["s1"].timeline, timeline, "{case}");
        }

        let floor = |id: &str, timeline| ShardFloor { system_identifier: id.to_owned(), timeline };
        let told = |id: &str, timeline| BTreeMap::from([("s1".to_owned(), floor(id, timeline))]);
        assert!(!merge_floors(&mut floors, &told("id-of-s1", 2)) && floors["s1"].timeline == 4);
        assert!(merge_floors(&mut floors, &told("id-of-s1", 6)) && floors["s1"].timeline == 6);
        assert!(!merge_floors(&mut floors, &told("another", 9)) && floors["s1"].timeline == 6);
        assert!(merge_floors(&mut floors, &BTreeMap::from([("s2".to_owned(), floor("x", 1))])));
    }

    #[test]
    fn the_registry_is_found_by_its_mark() {
        let (ours, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let marked = |number, server, mark| {
            let mut node = node(number, "s1", Some(server));
            if let Some(crate::ServerInfo::Up(state)) = &mut node.server {
                state.registry = Some(mark);
            }
            node
        };
        let floors =
            BTreeMap::from([("s1".to_owned(), ShardFloor { system_identifier: "id-of-s1".to_owned(), timeline: 2 })]);
        let none = BTreeMap::new();
        for (case, nodes, floors, joined, found) in [
            (
                "a standby has the mark, too",
                vec![marked(1, (false, 1), ours), marked(2, (true, 1), ours)],
                &none,
                None,
                Some(1),
            ),
            ("after a promotion", vec![marked(1, (false, 1), ours), marked(2, (false, 2), ours)], &none, None, Some(2)),
            ("the old one alone", vec![marked(1, (false, 1), ours)], &floors, Some(ours), None),
            (
                "another cluster's",
                vec![marked(1, (false, 3), other), marked(2, (false, 2), ours)],
                &floors,
                Some(ours),
                Some(2),
            ),
            ("no mark", vec![node(1, "s1", Some((false, 1)))], &none, None, None),
        ] {
            let registry = find_registry(nodes.iter(), floors, joined);
            assert_eq!(registry.and_then(|(node, _)| node.node_id), found.map(crate::NodeId), "{case}");
        }
    }
}
