//! The rules about a whole fleet: a sound one lacks nothing, and each thing that is amiss is told beside who has it.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta};
use cluster::leader::ShardFloor;
use cluster::{Downstream, Lsn, NodeId, Role, ServerState};
use fleet::readiness::{Closed, DatabaseFacts, HbaFacts, RoleFacts, ServerFacts, StandbyFacts};
use uuid::Uuid;

use super::anew::Last;
use super::rules::{Fleet, Seen, report};
use super::service::{Disk, Own};
use sample::{following, sound as sound_server};

#[path = "../../fleet/src/readiness/sample.rs"]
mod sample;

fn facts(number: i32, in_recovery: bool) -> ServerFacts {
    let mut facts = ServerFacts {
        address: format!("/run/n{number}/.s.PGSQL.5432"),
        is_local_socket: true,
        standby: in_recovery.then(|| following("n1", "26257")),
        superuser: Some("o'root".to_owned()),
        ..sound_server()
    };
    facts.role.is_super = true;
    facts.settings.insert("data_directory".to_owned(), "/data".to_owned());
    facts
}

fn node(number: i32, in_recovery: bool) -> Seen {
    let standby = Downstream {
        application_name: "n2".to_owned(),
        slot: None,
        sync_state: "quorum".to_owned(),
        state: "streaming".to_owned(),
    };
    let disk = Disk { what: "the node's store".to_owned(), path: "/store".to_owned(), free: 1 << 40 };
    Seen {
        id: Some(NodeId(number)),
        address: format!("n{number}:26257"),
        shard: "s1".to_owned(),
        build: "1".to_owned(),
        role: Some(if in_recovery { Role::Voting } else { Role::Leaseholder }),
        is_live: Some(true),
        server: Some(ServerState {
            system_identifier: "7".to_owned(),
            version: 150_018,
            in_recovery,
            timeline: 1,
            lsn: Lsn(1000),
            registry: Some(Uuid::nil()),
            upstream: None,
            downstream: if in_recovery { Vec::new() } else { vec![standby] },
            replay: cluster::Replay::default(),
        }),
        trouble: None,
        answer: Some(Ok(Own {
            server: Some(Ok(facts(number, in_recovery))),
            last: None,
            disks: vec![disk],
            insecure: false,
            is_exposed: true,
            clock: DateTime::UNIX_EPOCH,
        })),
        skew: TimeDelta::zero(),
    }
}

fn sound() -> Fleet {
    let floor = ShardFloor { system_identifier: "7".to_owned(), timeline: 1 };
    Fleet {
        nodes: vec![node(1, false), node(2, true)],
        floors: BTreeMap::from([("s1".to_owned(), floor)]),
        is_initialized: true,
        registry: Some("n1:26257".to_owned()),
        listing_failed: None,
        lag_max: 1 << 30,
    }
}

fn own(seen: &mut Seen) -> &mut Own {
    seen.answer.as_mut().unwrap().as_mut().unwrap()
}

fn asked(seen: &mut Seen) -> &mut ServerFacts {
    own(seen).server.as_mut().unwrap().as_mut().unwrap()
}

/// The first server was promoted to timeline 2, and the second has not come with it.
fn behind(fleet: &mut Fleet) -> &mut Seen {
    fleet.floors.get_mut("s1").unwrap().timeline = 2;
    fleet.nodes[0].server.as_mut().unwrap().timeline = 2;
    let seen = &mut fleet.nodes[1];
    seen.role = Some(Role::Detached);
    asked(seen).standby.as_mut().unwrap().receiver = Some("waiting".to_owned());
    seen
}

fn closed() -> Closed {
    Closed {
        address: "/run/n2".to_owned(),
        is_local_socket: true,
        user: "backhaul".to_owned(),
        database: "postgres".to_owned(),
        code: String::new(),
        reason: "no such file".to_owned(),
    }
}

/// The second server is down, and was this when it was last asked.
fn stopped(fleet: &mut Fleet, was: Option<fn(&mut ServerFacts)>) {
    let seen = behind(fleet);
    seen.role = Some(Role::Down);
    let (mut facts, state) = (asked(seen).clone(), seen.server.take().unwrap());
    own(seen).server = Some(Err(closed()));
    own(seen).last = was.map(|was| {
        was(&mut facts);
        Last { facts, state }
    });
}

fn told(fleet: &Fleet) -> String {
    report(fleet).lines().join("\n")
}

#[test]
fn a_sound_fleet_lacks_nothing() {
    let told = told(&sound());
    assert!(told.ends_with("\n0 missing, 0 advised") && told.lines().count() == 3, "{told}");
    assert!(told.starts_with("node 1 at n1:26257: leaseholder, shard \"s1\", PostgreSQL 15.18, read at"), "{told}");
}

/// What is spoilt, how, what must be told below which title, and how many are missing and advised.
type Case = (&'static str, fn(&mut Fleet), &'static str, &'static [&'static str], (usize, usize));

const CASES: &[Case] = &[
    (
        "a node is gone",
        |f| (f.nodes[1].role, f.nodes[1].trouble, f.nodes[1].answer) = (None, Some("refused".to_owned()), None),
        "node 2 ",
        &["  missing  the node does not answer: refused"],
        (1, 0),
    ),
    (
        "a session is over",
        |f| f.nodes[1].is_live = Some(false),
        "node 2 ",
        &["session in the registry has run out"],
        (1, 0),
    ),
    ("a number is not given", |f| f.nodes[1].id = None, "the node at n2", &["has no number yet"], (1, 0)),
    (
        "an older node",
        |f| f.nodes[1].answer = Some(Err("this node does not offer \"check\"".to_owned())),
        "node 2 ",
        &["could not be asked: this node does not offer"],
        (1, 0),
    ),
    ("builds", |f| f.nodes[1].build = "2".to_owned(), "the fleet", &["1 on node 1 at n1:26257; 2 on node 2"], (0, 1)),
    ("a clock", |f| f.nodes[1].skew = TimeDelta::seconds(-3), "node 2 ", &["-3000 ms off", "timedatectl"], (0, 1)),
    ("a disk", |f| own(&mut f.nodes[1]).disks[0].free = 5 << 20, "node 2 ", &["5 MiB are free", "/store"], (0, 1)),
    (
        "an open port",
        |f| own(&mut f.nodes[0]).insecure = true,
        "node 1 ",
        &["whoever reaches", "--secret-file FILE"],
        (0, 1),
    ),
    (
        "a closed server",
        |f| {
            f.nodes[1].role = Some(Role::Down);
            f.nodes[1].server = None;
            own(&mut f.nodes[1]).server = Some(Err(closed()));
        },
        "node 2 ",
        &["cannot ask the server /run/n2 as role \"backhaul\": no such file"],
        (1, 0),
    ),
    (
        "an overtaken primary",
        |f| {
            f.nodes[1].role = Some(Role::Overtaken);
            asked(&mut f.nodes[1]).standby = None;
            f.floors.get_mut("s1").unwrap().timeline = 4;
        },
        "node 2 ",
        &[
            "on timeline 1, and shard \"s1\" has reached timeline 4",
            "mv '/data' '/data.old'",
            "--pgdata='/data' ",
            r"host=n1 port=26257 user='\''o\'\''root'\'' ",
        ],
        (1, 0),
    ),
    (
        "a standby without its slot",
        |f| {
            f.nodes[1].role = Some(Role::Detached);
            asked(&mut f.nodes[1]).standby.as_mut().unwrap().receiver = None;
        },
        "node 2 ",
        &["\"not receiving\" on timeline 1, and is to receive from n1:26257", "slot('n2');"],
        (1, 0),
    ),
    (
        "a standby that is to receive from elsewhere",
        |f| {
            let standby = asked(behind(f)).standby.as_mut().unwrap();
            standby.upstream_host = Some("n9".to_owned());
        },
        "node 2 ",
        &[
            "is to receive from n9:26257",
            "slot('n2');",
            "current_setting('primary_conninfo') || ' host=n1 port=26257') \\gexec",
            "SELECT pg_reload_conf();",
        ],
        (1, 0),
    ),
    (
        "a standby without a way",
        |f| {
            let standby = asked(behind(f)).standby.as_mut().unwrap();
            (standby.upstream_host, standby.may_be_led) = (None, false);
        },
        "node 2 ",
        &["primary_conninfo has to say host=n1 port=26257, and user="],
        (1, 0),
    ),
    (
        "a standby past the fork",
        |f| asked(behind(f)).standby.as_mut().unwrap().is_past_fork = true,
        "node 2 ",
        &["cannot go on from there: stop it", "while it is stopped", "pg_basebackup --pgdata='/data' "],
        (1, 0),
    ),
    (
        "a standby beyond all that was written",
        |f| behind(f).server.as_mut().unwrap().lsn = Lsn(1001),
        "node 2 ",
        &["cannot go on from there: stop it", "pg_basebackup --pgdata='/data' "],
        (1, 0),
    ),
    (
        "a standby that may be past the fork",
        |f| {
            drop(asked(behind(f)).settings.insert("primary_slot_name".to_owned(), String::new()));
        },
        "node 2 ",
        &["if the server's log says that it is not in the history"],
        (1, 0),
    ),
    (
        "a stopped primary whose WAL can be rewound",
        |f| {
            stopped(
                f,
                Some(|facts| {
                    facts.standby = None;
                    facts.settings.insert("wal_log_hints".to_owned(), "on".to_owned());
                }),
            );
        },
        "node 2 ",
        &["was a primary on timeline 1; shard \"s1\" has reached timeline 2", "pg_rewind --target-pgdata='/data' "],
        (2, 0),
    ),
    (
        "a stopped standby past the fork",
        |f| stopped(f, Some(|facts| facts.standby.as_mut().unwrap().is_past_fork = true)),
        "node 2 ",
        &["was a standby beyond the fork", "pg_basebackup --pgdata='/data' "],
        (2, 0),
    ),
    ("a stopped standby", |f| stopped(f, Some(|_| ())), "node 2 ", &["cannot ask the server"], (1, 0)),
    (
        "a stopped server that nobody knows",
        |f| stopped(f, None),
        "node 2 ",
        &["if it was a primary before node 1 at n1:26257 reached timeline 2", "before it is started"],
        (1, 1),
    ),
    (
        "no line for standbys",
        |f| asked(&mut f.nodes[0]).hba = Some(HbaFacts { broken: Vec::new(), replication: false }),
        "node 1 ",
        &["stream through the nodes' ports, as node 2", "local  replication  all"],
        (1, 0),
    ),
    (
        "another identity",
        |f| f.nodes[1].server.as_mut().unwrap().system_identifier = "8".to_owned(),
        "node 2 ",
        &["system identifier 8, and shard \"s1\" has 7"],
        (1, 0),
    ),
    (
        "another release",
        |f| f.nodes[1].server.as_mut().unwrap().version = 160_001,
        "node 2 ",
        &["of release 16"],
        (1, 0),
    ),
    (
        "no registry",
        |f| (f.registry, f.is_initialized) = (None, false),
        "the fleet",
        &["backhaul init --host n1:26257"],
        (1, 0),
    ),
    ("a lost registry", |f| f.registry = None, "the fleet", &["no server that holds the registry"], (1, 0)),
    (
        "a silent registry",
        |f| f.listing_failed = Some("late".to_owned()),
        "the fleet",
        &["cannot be read: late"],
        (1, 0),
    ),
    (
        "a shard without a leaseholder",
        |f| drop(f.floors.insert("s2".to_owned(), f.floors["s1"].clone())),
        "the fleet",
        &["shard \"s2\" has no leaseholder"],
        (1, 0),
    ),
    (
        "a shard that is not listed yet",
        |f| {
            f.nodes.push(Seen {
                shard: "s3".to_owned(),
                role: Some(Role::None),
                server: None,
                answer: None,
                ..node(3, true)
            });
        },
        "the fleet",
        &["shard \"s3\" has no leaseholder"],
        (1, 0),
    ),
    (
        "an asynchronous standby of the registry",
        |f| f.nodes[0].server.as_mut().unwrap().downstream[0].sync_state = "async".to_owned(),
        "the fleet",
        &["no synchronous standby", "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (\"n2\")';"],
        (0, 1),
    ),
    (
        "a right of the shard",
        |f| f.nodes.iter_mut().for_each(|seen| asked(seen).role.may_pause = false),
        "node 1 ",
        &["may not pause replay"],
        (1, 0),
    ),
];

#[test]
fn each_thing_amiss_is_told_beside_who_has_it() {
    for (case, spoil, title, words, (missing, advised)) in CASES {
        let mut fleet = sound();
        spoil(&mut fleet);
        let told = told(&fleet);
        let below: Vec<&str> = told
            .lines()
            .skip_while(|line| !line.starts_with(title))
            .enumerate()
            .take_while(|(at, line)| *at == 0 || line.starts_with(' '))
            .map(|(_, line)| line)
            .collect();
        let part = below.join("\n");
        assert!(words.iter().all(|word| part.contains(word)), "{case}: {told}");
        assert!(told.ends_with(&format!("\n{missing} missing, {advised} advised")), "{case}: {told}");
    }
}
