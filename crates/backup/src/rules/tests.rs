//! The rules' table of cases.

use std::time::Duration;

use cluster::{Downstream, Lsn, NodeInfo, Replay, ServerInfo, ServerState, Upstream};

use super::*;

/// Bytes of WAL that a standby may be behind.
const LAG: u64 = 1000;

/// Nodes one a line: number, locality, and what their server is, with what is amiss.
fn fleet(lines: &str) -> Fleet {
    let lines: Vec<&str> = lines.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let number = |line: &str| NodeId(line.split(' ').next().unwrap().parse().unwrap());
    let time = |line: &str| if line.ends_with(" far") { 90 } else { 1 };
    let times: BTreeMap<NodeId, u32> = lines.iter().map(|line| (number(line), time(line))).collect();
    let place = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let id = NodeId(words.next().unwrap().parse().unwrap());
        let locality = words.next().unwrap().parse().unwrap();
        let words: Vec<&str> = words.collect();
        let has = |word: &str| words.contains(&word);
        let role = match words.first().copied() {
            Some("primary") => Some(Role::Leaseholder),
            Some("sync") => Some(Role::Voting),
            Some("async") => Some(Role::NonVoting),
            Some("detached") => Some(Role::Detached),
            Some("overtaken") => Some(Role::Overtaken),
            Some("down") => Some(Role::Down),
            _ => None,
        };
        let server = role.map(|role| Standing {
            role,
            behind: if has("lags") { LAG + 1 } else { 17 },
            not_streaming: has("waiting").then(|| "waiting".to_owned()),
            delay: has("delayed").then(|| "5min".to_owned()),
            paused: has("paused"),
            may_pause: !has("powerless"),
            feedback: has("feedback"),
            free: (!has("unknown")).then_some(if has("full") { 99 } else { 100 }),
        });
        let round_trips = times.clone();
        Place { id, locality, reachable: !has("gone"), round_trips, server }
    };
    Fleet { places: lines.into_iter().map(place).collect() }
}

fn rules(text: &str) -> Rules {
    let mut rules = Rules { lag_limit: LAG, ..Rules::default() };
    for word in text.split_ascii_whitespace() {
        match word {
            "strict" => rules.strict = true,
            "standby" | "nonvoting" => rules.replicas = Replicas::parse(word).unwrap(),
            "balanced" => rules.balanced = true,
            "patient" => rules.lag_limit = 0,
            filter => rules.filter = filter.parse().unwrap(),
        }
    }
    rules
}

/// `read 3,1; over 2 Paused; work 3; out 1 lacks region=b`, as far as there is anything.
fn told(lines: &str, asked: &str) -> String {
    let decision = decide(&fleet(lines), &rules(asked));
    let list = |ids: Vec<String>| ids.join(",");
    let reads = list(decision.reads.iter().map(|replica| replica.node.to_string()).collect());
    let over: Vec<String> = decision.passed_over.iter().map(|(node, _, reason)| format!("{node} {reason:?}")).collect();
    let work = list(decision.workers.iter().map(NodeId::to_string).collect());
    let out: Vec<String> = decision.excluded.iter().map(|(node, why)| format!("{node} {why}")).collect();
    let parts = [("read", reads), ("over", over.join(",")), ("work", work), ("out", out.join(","))];
    let parts = parts.iter().filter(|(_, text)| !text.is_empty());
    parts.map(|(name, text)| format!("{name} {text}")).collect::<Vec<_>>().join("; ")
}

const DEMO: &str = "
    1 region=east,zone=a primary
    2 region=east,zone=b sync
    3 region=west,zone=a async
    4 region=west,zone=b";

#[test]
fn the_server_that_is_read_follows_the_rules() {
    for (asked, expected) in [
        ("", "read 1,3,2; work 1,2,3,4"),
        ("region=west", "read 3,1,2; work 3,4; out 1 lacks region=west,2 lacks region=west"),
        // Its own node has no server: the closest.
        ("region=west,zone=b", "read 3,1,2; work 4; out 1 lacks region=west,2 lacks region=west,3 lacks zone=b"),
        // The leaseholder's node is not among them; its neighbour is read before the far asynchronous standby.
        ("zone=b,region=east", "read 2,1,3; work 2; out 1 lacks zone=b,3 lacks zone=b,4 lacks region=east"),
        ("balanced", "read 3,1,2; work 1,2,3,4"),
        ("balanced region=east", "read 1,2,3; work 1,2; out 3 lacks region=east,4 lacks region=east"),
        (
            "region=mars",
            "read 3,1,2; out 1 lacks region=mars,2 lacks region=mars,3 lacks region=mars,4 lacks region=mars",
        ),
    ] {
        assert_eq!(told(DEMO, asked), expected, "{asked}");
    }
}

#[test]
fn options_pass_servers_over_and_never_fall_back() {
    let west = "work 3,4; out 1 lacks region=west,2 lacks region=west";
    for (asked, expected) in [
        ("standby", "read 3,2; over 1 NotAsked(Standby); work 1,2,3,4".to_owned()),
        ("nonvoting", "read 3; over 1 NotAsked(NonVoting),2 NotAsked(NonVoting); work 1,2,3,4".to_owned()),
        (
            "strict region=west",
            format!("read 3; over 1 Outside({0}),2 Outside({0}); {west}", "Tier { key: \"region\", value: \"west\" }"),
        ),
        ("strict", "read 1,3,2; work 1,2,3,4".to_owned()),
    ] {
        assert_eq!(told(DEMO, asked), expected, "{asked}");
    }
    let decision = decide(&fleet(DEMO), &rules("strict nonvoting region=east"));
    assert!(decision.reads.is_empty());
    let error = nothing_to_read("s1", &decision, &rules("strict nonvoting region=east"));
    assert_eq!(error.message, "shard \"s1\" has no server that the backup may read");
    let detail = error.detail.unwrap();
    assert!(detail.contains("node 1 (leaseholder): the statement says replica = 'nonvoting'"), "{detail}");
    assert!(detail.contains("node 3 (non-voting replica): its node lacks region=east"), "{detail}");
}

#[test]
fn a_server_is_withdrawn_for_what_it_is_known_to_have_become() {
    use Role::{Detached, Down, Leaseholder, NonVoting, None, Overtaken, Voting};
    let (all, outside) = ([Leaseholder, Voting, NonVoting, Detached, Overtaken, Down, None], "region=west,zone=a");
    for (asked, withdrawn) in [
        ("", &[][..]),
        ("standby", &[Leaseholder]),
        ("nonvoting", &[Leaseholder, Voting]),
        ("strict region=west", &[]),
        ("strict region=east", &[Leaseholder]),
        ("region=east", &[]),
    ] {
        let rules = rules(asked);
        for role in all {
            let reason = rules.withdraw(role, &outside.parse().unwrap());
            assert_eq!(reason.is_some(), withdrawn.contains(&role), "{asked}: {role}: {reason:?}");
        }
    }
    let said = |asked: &str| rules(asked).withdraw(Leaseholder, &outside.parse().unwrap()).unwrap().to_string();
    assert_eq!(said("standby"), "the statement says replica = 'standby'");
    assert_eq!(said("strict region=east"), "its node lacks region=east, and the execution locality is strict");
}

#[test]
fn an_unfit_server_is_passed_over_with_its_reason() {
    for (server, reason) in [
        ("async lags", "Lags(1001, 1000)"),
        ("async delayed", "Delayed(\"5min\")"),
        ("async paused", "Paused"),
        ("async waiting", "NotStreaming(\"waiting\")"),
        ("sync lags", "Lags(1001, 1000)"),
        ("detached", "Detached"),
        ("overtaken", "Overtaken"),
        ("down", "Down"),
        ("async gone", "Unreachable"),
    ] {
        let lines = format!("1 region=east primary\n2 region=west {server}");
        let told = told(&lines, "region=west");
        assert!(told.starts_with(&format!("read 1; over 2 {reason}; ")), "{server}: {told}");
    }
    // Where the fleet has no limit, no lag is too much.
    assert!(told("1 region=east primary\n2 region=west async lags", "patient region=west").starts_with("read 2,1; "));
    // Nothing of this is asked of a primary, and a little lag is no matter.
    assert!(told("1 a=b primary lags delayed paused waiting\n2 a=c async", "").starts_with("read 1,2; work"));
    // Several reasons: the one that another would not mend away first.
    assert!(told("1 a=b primary\n2 a=c async paused lags delayed", "").contains("over 2 Delayed"));
}

#[test]
fn a_server_that_is_no_replica_of_the_shard_is_none_for_the_work_either() {
    let lines = "1 a=b primary\n2 a=b detached\n3 a=b down\n4 a=b overtaken\n5 a=b sync\n6 a=b async\n7 a=b";
    let workers = workers(&fleet(lines), &rules("balanced"), &[NodeId(1)]);
    let with = |is: fn(&Worker) -> bool| workers.iter().filter(|it| is(it)).map(|it| it.id.0).collect::<Vec<_>>();
    assert_eq!(with(|_| true), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((with(|it| it.holds_replica), with(|it| it.reads_own_server)), (vec![1, 5, 6], vec![1]));
}

#[test]
fn a_node_that_does_not_answer_takes_no_part() {
    let lines = "1 region=east primary\n2 region=west async gone\n3 region=west gone\n4 region=west";
    let expected = "read 1; over 2 Unreachable; work 4; out 1 lacks region=west,2 does not answer,3 does not answer";
    assert_eq!(told(lines, "region=west"), expected);
    let gone = "1 region=east primary\n2 region=west async gone";
    assert_eq!(told(gone, "region=west"), "read 1; over 2 Unreachable; out 1 lacks region=west,2 does not answer");
}

/// A node of s1 as others hear of it: a primary at `lsn`, or a standby that has come so far and whose receiver is `status`.
pub(crate) fn info(number: i32, lsn: u64, status: Option<&str>) -> NodeInfo {
    let name = format!("n{number}");
    let upstream = |status: &str| Upstream { application_name: name.clone(), slot: None, status: status.to_owned() };
    let listed = |number: i32| Downstream {
        application_name: format!("n{number}"),
        slot: None,
        sync_state: "async".to_owned(),
        state: "streaming".to_owned(),
    };
    NodeInfo {
        instance: uuid::Uuid::from_u128(number.unsigned_abs().into()),
        node_id: Some(NodeId(number)),
        cluster_id: None,
        address: format!("{name}:26257"),
        locality: "region=east".parse().unwrap(),
        shard: "s1".to_owned(),
        build: "test".to_owned(),
        started_at: chrono::DateTime::UNIX_EPOCH,
        server: Some(ServerInfo::Up(ServerState {
            system_identifier: "1".to_owned(),
            version: 150_000,
            in_recovery: status.is_some(),
            timeline: 1,
            lsn: Lsn(lsn),
            registry: None,
            upstream: status.map(upstream),
            downstream: if status.is_none() { (2..9).map(listed).collect() } else { Vec::new() },
            replay: Replay::default(),
        })),
        peers: Vec::new(),
        round_trips: BTreeMap::new(),
        shards: std::collections::BTreeMap::new(),
        revision: 1,
    }
}

#[test]
fn what_a_view_knows_of_lag_and_streaming_counts() {
    const HEAD: u64 = 3 * LAG;
    let dir = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(cluster::store::Store::open(dir.path()).unwrap());
    let leader = cluster::Cluster::new(info(1, HEAD, None), &[], store).unwrap();
    let mut view = (*leader.view()).clone();
    for (number, lsn, status) in [
        (2, HEAD, "streaming"),
        (3, HEAD - LAG, "streaming"),
        (4, HEAD - LAG - 1, "streaming"),
        (5, HEAD, "waiting"),
        // It has replayed more than the leaseholder's last answer says.
        (6, HEAD + 1, "streaming"),
    ] {
        let info = info(number, lsn, Some(status));
        let known = cluster::Known { info, reachable: true };
        view.nodes.insert(known.info.address.clone(), known);
    }
    let own = view.nodes.get_mut("n4:26257").unwrap();
    own.info.round_trips.insert(NodeId(2), 7);
    let fleet = Fleet::of(&view, "s1");
    let measured: Vec<u32> =
        fleet.places.iter().filter_map(|place| place.round_trips.get(&NodeId(2)).copied()).collect();
    assert_eq!((measured, fleet.places[3].id), (vec![7], NodeId(4)));
    let behind: Vec<u64> = fleet.places.iter().map(|place| place.server.as_ref().unwrap().behind).collect();
    assert_eq!(behind, [0, 0, LAG, LAG + 1, 0, 0]);
    let decision = decide(&fleet, &rules(""));
    let reads: Vec<i32> = decision.reads.iter().map(|replica| replica.node.0).collect();
    assert_eq!(reads, [1, 2, 3, 6]);
    let over: Vec<(i32, Reason)> = decision.passed_over.into_iter().map(|(node, _, reason)| (node.0, reason)).collect();
    assert_eq!(over, [(4, Reason::Lags(LAG + 1, LAG)), (5, Reason::NotStreaming("waiting".to_owned()))]);
    // Another shard's servers are not read, and its nodes may take part.
    assert!(Fleet::of(&view, "s2").places.iter().all(|place| place.server.is_none()));
}

#[test]
fn the_closest_is_by_tiers_then_kind_then_distance_then_number() {
    let lines = "
        1 cloud=x,region=a primary
        5 cloud=x,region=b async far
        6 cloud=x,region=b async
        4 cloud=x,region=b async far
        2 cloud=y,region=c async
        3 cloud=x,region=b sync
        9 cloud=x,region=c";
    assert_eq!(
        told(lines, "region=c,cloud=x"),
        "read 6,4,5,1,3,2; work 9; out 1 lacks region=c,2 lacks cloud=x,3 lacks region=c,4 lacks region=c,\
         5 lacks region=c,6 lacks region=c"
    );
}

/// How far a node is from itself says nothing of its server.
#[test]
fn a_server_of_a_node_that_takes_part_gains_nothing_by_a_longer_locality() {
    let lines =
        "1 region=east primary\n2 region=west,zone=a sync\n3 region=west async\n4 region=west,zone=b,rack=1 async";
    assert_eq!(told(lines, "region=west"), "read 3,4,2,1; work 2,3,4; out 1 lacks region=west");
    assert_eq!(decide(&fleet(lines), &rules("region=west")).together, [NodeId(3), NodeId(4)]);
}

#[test]
fn a_leaseholder_that_is_not_read_is_no_anchor() {
    let demo = fleet(DEMO);
    for (asked, server, expected) in [("", 3, 1), ("standby", 3, 3), ("nonvoting region=east", 3, 3)] {
        let anchor = anchor(&demo, &rules(asked), &[NodeId(server)]).unwrap();
        assert_eq!(anchor.id, Some(NodeId(expected)), "{asked}");
    }
}

#[test]
fn a_statement_may_keep_away_from_the_leaseholder_whoever_that_is_or_by_where_it_is() {
    let east = "region=east".parse().unwrap();
    for (asked, east_is, nobody_is) in [
        ("standby", true, true),
        ("nonvoting", true, true),
        ("strict region=west", true, false),
        ("strict region=east", false, false),
        ("region=west", false, false),
    ] {
        assert_eq!((rules(asked).forbid(Some(&east)), rules(asked).forbid(None)), (east_is, nobody_is), "{asked}");
    }
}

#[test]
fn every_reason_reads_as_the_end_of_a_sentence() {
    let tier = Tier { key: "a".to_owned(), value: "b".to_owned() };
    for reason in [
        Reason::Unreachable,
        Reason::Down,
        Reason::Overtaken,
        Reason::Detached,
        Reason::NotStreaming("waiting".to_owned()),
        Reason::Lags(5, 4),
        Reason::Delayed("5min".to_owned()),
        Reason::Paused,
        Reason::NotAsked(Replicas::Standby),
        Reason::NotAsked(Replicas::NonVoting),
        Reason::Outside(tier),
    ] {
        let text = reason.to_string();
        assert!(text.starts_with("it") || text.starts_with("the statement says"), "{text}");
        assert!(!text.ends_with('.'), "{text}");
    }
}

/// A standby in each of two zones in the west, and one more node.
const TWIN: &str = "
    1 region=east,zone=a primary
    2 region=east,zone=b sync
    3 region=west,zone=a async
    4 region=west,zone=b async
    5 region=west,zone=b";

#[test]
fn servers_that_can_stand_at_one_position_are_read_together() {
    let with = |more: &str| format!("{TWIN}\n{more}");
    for (lines, asked, expected) in [
        (TWIN.to_owned(), "region=west", "3,4"),
        // The leaseholder's node takes part: everything is its own.
        (TWIN.to_owned(), "", "1"),
        (TWIN.to_owned(), "balanced", "3,4; 1 Primary,2 Voting"),
        (TWIN.to_owned(), "balanced region=east", "1; 1 Primary,2 Voting"),
        (TWIN.to_owned(), "nonvoting", "3,4"),
        (TWIN.to_owned(), "standby", "3,4; 2 Voting"),
        // One zone: one server is beside a node that takes part.
        (TWIN.to_owned(), "region=west,zone=b", "4"),
        (TWIN.replace("zone=b async", "zone=b async powerless"), "region=west", "3; 4 NoRight"),
        (TWIN.replace("zone=b async", "zone=b async lags"), "region=west", "3"),
        (TWIN.replace("zone=b async", "zone=b sync"), "region=west", "3; 4 Voting"),
        // The best cannot be among them, and two others can.
        (
            with("6 region=west,zone=c async").replace("zone=a async", "zone=a async powerless"),
            "region=west",
            "4,6; 3 NoRight",
        ),
        // Beside no node that takes part: those that are the closest to one.
        (with("6 region=west,zone=a,x=y\n7 region=west,zone=b,x=y\n8 region=west,zone=c async"), "x=y", "3,4"),
        (with("6 region=west,zone=c,x=y"), "x=y", "3"),
        (
            with("6 region=west,zone=b async\n7 region=west,zone=c async\n8 region=west,zone=d async"),
            "region=west",
            "3,4,6,7",
        ),
    ] {
        let decision = decide(&fleet(&lines), &rules(asked));
        let together: Vec<String> = decision.together.iter().map(NodeId::to_string).collect();
        let apart: Vec<String> = decision.apart.iter().map(|(node, _, why)| format!("{node} {why:?}")).collect();
        let told = [together.join(","), apart.join(",")];
        let told: Vec<&str> = told.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
        assert_eq!(told.join("; "), expected, "{asked}: {lines}");
        assert_eq!(decision.candidates().next().map(|replica| replica.node), decision.together.first().copied());
        assert_eq!(decision.candidates().count(), decision.reads.len());
    }
}

#[test]
fn a_worker_reads_its_own_server_else_the_closest() {
    let lines =
        format!("{TWIN}\n6 region=east,zone=c\n7 region=north\n8 region=west,zone=c\n9 region=west,zone=b async");
    let mut fleet = fleet(&lines.replace("zone=a async", "zone=a async far"));
    for (worker, servers, expected) in [
        (3, &[3, 4][..], 3),
        (4, &[3, 4], 4),
        (5, &[3, 4], 4),
        (5, &[3], 3),
        // One tier shared with both: by distance.
        (8, &[3, 4], 4),
        (6, &[3, 4, 1], 1),
        // The same in everything: by number.
        (7, &[9, 4], 4),
        (99, &[3, 4], 3),
    ] {
        let servers: Vec<NodeId> = servers.iter().map(|id| NodeId(*id)).collect();
        assert_eq!(nearest(&fleet, NodeId(worker), &servers), Some(NodeId(expected)), "{worker} of {servers:?}");
    }
    assert_eq!(nearest(&fleet, NodeId(3), &[]), None);
    // What others measure does not matter.
    fleet.places.iter_mut().filter(|place| place.id == NodeId(8)).for_each(|place| {
        // Nor does one that it has not heard of.
        place.round_trips = BTreeMap::from([(NodeId(4), 2), (NodeId(3), 1)]);
    });
    assert_eq!(nearest(&fleet, NodeId(8), &[NodeId(1), NodeId(3), NodeId(4)]), Some(NodeId(3)));
}

#[test]
fn the_mode_of_a_standby_is_chosen_with_its_reason() {
    let limits = cluster::settings::Holding {
        lag: 0,
        pause: Duration::from_secs(60),
        wal: LAG,
        free: 100,
        age: Duration::ZERO,
        xmin_age: 0,
    };
    for (server, auto, paused, feedback) in [
        ("primary", "none", "none", "none"),
        ("primary feedback powerless", "none", "none", "none"),
        ("async", "paused", "paused", "no: hot_standby_feedback is off"),
        ("async feedback", "feedback", "paused", "feedback"),
        ("async powerless", "retry", "no: the role of its node may not", "no: hot"),
        ("async powerless feedback", "feedback", "no: the role of its node may not", "feedback"),
        ("async delayed", "retry", "no: its replay is late by", "no: hot"),
        ("async paused", "retry", "no: its replay is paused by somebody else", "no: hot"),
        ("async lags", "retry", "no: it has 1001 bytes of WAL to replay, more than", "no: hot"),
        ("async full", "retry", "no: its disk has 99 bytes free, less than", "no: hot"),
        // What is not known is no reason to risk it, and none against whoever asks for it.
        ("async unknown", "retry", "paused", "no: hot"),
        ("sync", "retry", "no: commits may wait for it", "no: hot"),
        ("sync feedback", "feedback", "no: commits may wait for it", "feedback"),
    ] {
        let fleet = fleet(&format!("1 a=b {server}"));
        let told = |wanted: &str| {
            let wanted = Wanted::parse(wanted).unwrap();
            match choose(fleet.places[0].server.as_ref().unwrap(), wanted, &limits) {
                Ok(chosen) => chosen.map_or("none".to_owned(), |chosen| chosen.mode.to_string()),
                Err(why) => format!("no: {why}"),
            }
        };
        assert_eq!(told("auto"), auto, "{server}");
        assert_eq!(told("retry"), if auto == "none" { "none" } else { "retry" }, "{server}");
        assert!(told("paused").starts_with(paused), "{server}: {}", told("paused"));
        assert!(told("feedback").starts_with(feedback), "{server}: {}", told("feedback"));
    }
    let unlimited = cluster::settings::Holding { wal: 0, free: 0, ..limits };
    let fleet = fleet("1 a=b async lags unknown\n2 a=b sync");
    let all = [NodeId(1), NodeId(2)];
    let chosen = modes(&fleet, &all, Wanted::Auto, &unlimited).unwrap();
    assert_eq!((chosen[&all[0]].mode, chosen[&all[1]].mode), (Mode::Paused, Mode::Retry));
    assert!(
        chosen[&all[1]].why.ends_with("not paused, because commits may wait for it, so its replay is never paused")
    );
    let refused = modes(&fleet, &all, Wanted::Only(Mode::Paused), &unlimited).unwrap_err();
    assert_eq!(refused.message, "the standby beside node 2 cannot be read in mode \"paused\"");
}

#[test]
fn a_wanted_mode_survives_the_job_it_is_kept_in() {
    for (text, stored) in
        [("", "auto"), ("AUTO", "auto"), ("paused", "paused"), ("Feedback", "feedback"), ("retry", "retry")]
    {
        let wanted = Wanted::parse(text).unwrap();
        assert_eq!(serde_json::to_value(wanted).unwrap(), stored);
        assert_eq!(serde_json::from_value::<Wanted>(stored.into()).unwrap(), wanted);
    }
    assert_eq!(Wanted::parse("pause"), None);
}
