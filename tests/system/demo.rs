//! `backhaul demo`.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::support::demo::{Demo, assert_nothing_runs_in, command, directory};
use crate::support::{both, free_ports, until};

#[test]
fn the_default_fleet_is_as_documented() {
    let demo = Demo::start(&[]);
    let roles: Vec<&str> = demo.nodes.iter().map(|node| node.role.as_str()).collect();
    assert_eq!(roles, ["leaseholder", "voting replica", "non-voting replica", "no server"]);

    let expected = [
        "1|region=us-east-1,zone=a|s1|leaseholder|t|t",
        "2|region=us-east-1,zone=b|s1|voting replica|t|t",
        "3|region=us-west-1,zone=a|s1|non-voting replica|t|t",
        "4|region=us-west-1,zone=b|s1|no server|t|t",
    ];
    for number in 1..=4 {
        until("every node to see the same fleet", || {
            let rows = demo.ask(number, "SHOW NODES");
            let seen: Vec<String> = rows
                .lines()
                .map(|row| {
                    let fields: Vec<&str> = row.split('|').collect();
                    [0, 2, 3, 4, 5, 6].map(|index| *fields.get(index).unwrap_or(&"")).join("|")
                })
                .collect();
            if seen == expected { Ok(()) } else { Err(rows) }
        });
        assert!(demo.node_dir(number).join("extern").is_dir());
        assert!(demo.node_dir(number).join("node.log").is_file());
    }
    // Read on the standby itself: the data set has arrived there.
    until("the standby to have the rides", || {
        let rows = both(&demo.psql_direct(3).args(["-Atc", "SELECT count(*) FROM rides"]).output().unwrap());
        if rows.trim() == "1000" { Ok(()) } else { Err(rows) }
    });
}

#[test]
fn the_data_set_has_one_of_everything() {
    let demo = Demo::start(&["--nodes", "1", "--rows", "200"]);
    for (what, query) in [
        ("rides as asked", "SELECT count(*) = 200 FROM rides"),
        ("identity", "SELECT bool_or(attidentity = 'a') FROM pg_attribute WHERE attrelid = 'vehicles'::regclass"),
        ("serial", "SELECT pg_get_serial_sequence('rides', 'id') IS NOT NULL"),
        ("generated", "SELECT bool_or(attgenerated = 's') FROM pg_attribute WHERE attrelid = 'vehicles'::regclass"),
        (
            "text",
            r"SELECT bool_or(address LIKE E'%\n%') AND bool_or(address = '\N') AND bool_or(address IS NULL) FROM users",
        ),
        ("unicode", "SELECT bool_or(name LIKE '%🛵%') FROM users"),
        ("numeric", "SELECT bool_or(credit = 'NaN') AND bool_or(credit > 1e20 AND credit <> 'NaN') FROM users"),
        (
            "floats",
            "SELECT bool_or(rating = 'NaN') AND bool_or(rating = '-Infinity') AND bool_or(rating::text = '-0') FROM users",
        ),
        ("infinity", "SELECT bool_or(signed_up = 'infinity') AND bool_or(signed_up = '-infinity') FROM users"),
        ("interval", "SELECT count(member_for) > 0 FROM users"),
        ("bytea", "SELECT count(photo) > 0 FROM users"),
        ("jsonb", "SELECT count(preferences) > 0 FROM users"),
        ("arrays", "SELECT bool_or(favourites = '{}') AND bool_or(favourites[1] = 'a,b') FROM users"),
        (
            "enum, domain, composite, range",
            "SELECT count(kind) > 0 AND count(plate) > 0 AND count(stands_at) > 0 AND bool_or(isempty(in_service)) FROM vehicles",
        ),
        ("partitions", "SELECT count(DISTINCT tableoid) > 1 FROM vehicle_positions"),
        ("toast", "SELECT pg_relation_size(reltoastrelid) > 100000 FROM pg_class WHERE relname = 'contracts'"),
        ("no primary key", "SELECT count(*) = 0 FROM pg_index WHERE indrelid = 'app_log'::regclass"),
        ("empty", "SELECT count(*) = 0 FROM promo_codes"),
        (
            "foreign keys in a circle",
            "SELECT count(*) = 2 FROM pg_constraint WHERE conname IN ('vehicles_last_ride', 'rides_vehicle_id_fkey')",
        ),
        ("view", "SELECT count(*) > 0 FROM open_rides"),
        ("materialized view", "SELECT relispopulated FROM pg_class WHERE relname = 'revenue_by_city'"),
        ("function", "SELECT max(ride_minutes(rides)) = 11 FROM rides"),
        ("trigger", "SELECT count(*) > 0 FROM app_log"),
        ("sequence of its own", "SELECT last_value = 1010 FROM ticket_numbers"),
        ("comment", "SELECT obj_description('users'::regclass) LIKE '%second line'"),
        (
            "quoted names in a second schema",
            "SELECT count(*) > 0 AND bool_or(\"select\" = 'NaN') FROM billing.\"Invoices\"",
        ),
        ("unlogged", "SELECT relpersistence = 'u' FROM pg_class WHERE relname = 'sessions_cache'"),
        ("large object", "SELECT length(lo_get(16500)) > 100000"),
    ] {
        assert_eq!(demo.ask(1, query), "t", "{what}");
    }
}

#[test]
fn two_shards_share_the_rows() {
    let demo = Demo::start(&["--nodes", "4", "--servers", "4", "--shards", "2", "--rows", "301"]);
    let roles: Vec<&str> = demo.nodes.iter().map(|node| node.role.as_str()).collect();
    assert_eq!(roles, ["leaseholder", "leaseholder", "voting replica", "voting replica"]);
    // Every node leads to its own shard.
    let rides: Vec<u32> = (1..=4).map(|n| demo.ask(n, "SELECT count(*) FROM rides").parse().unwrap()).collect();
    assert_eq!((rides[0] + rides[1], rides[0] == rides[2], rides[1] == rides[3]), (301, true, true), "{rides:?}");
}

#[test]
fn whatever_way_a_demo_ends_nothing_is_left_and_it_can_start_again() {
    let mut dir = directory();
    // The same ports each time, as for a user who names none.
    let port = free_ports(2).to_string();
    for (start, signal) in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM].into_iter().enumerate() {
        let demo = Demo::start_in(dir, &["--nodes", "2", "--sql-port", &port]);
        if start == 0 {
            assert_eq!(demo.ask(1, "CREATE TABLE kept (i int)"), "CREATE TABLE");
        }
        assert_eq!(demo.ask(2, "SELECT count(*) FROM kept"), "0", "the directory is kept, and taken up again");
        dir = demo.end(signal);
        if signal != Signal::SIGKILL {
            assert_nothing_runs_in(dir.path());
        }
        // After SIGKILL the next start does not wait, and is not harmed by the clean-up that still goes on.
    }
}

#[test]
fn a_fleet_that_begins_at_other_addresses_forgets_where_it_was() {
    let mut demo = Demo::start(&["--nodes", "3", "--servers", "1", "--no-example-database"]);
    for _ in 0..2 {
        demo.stop(Signal::SIGKILL);
        demo.start_again();
    }
    for number in 1..=3 {
        until("the addresses of before to be forgotten", || {
            let known = std::fs::read_to_string(demo.node_dir(number).join("fleet.json")).unwrap();
            let known: Value = serde_json::from_str(&known).unwrap();
            let others =
                demo.nodes.iter().map(|node| node.address.as_str()).filter(|it| *it != demo.nodes[number - 1].address);
            let followed = known["peers"].as_array().unwrap().iter().map(|address| address.as_str().unwrap());
            let (others, followed): (BTreeSet<&str>, BTreeSet<&str>) = (others.collect(), followed.collect());
            if followed == others { Ok(()) } else { Err(format!("node {number}: {followed:?}")) }
        });
    }
}

#[test]
fn a_demo_whose_reaper_was_killed_leaves_nothing_either() {
    let demo = Demo::start(&["--nodes", "2", "--no-example-database"]);
    kill(demo.reaper().unwrap(), Signal::SIGKILL).unwrap();
    assert_nothing_runs_in(demo.end(Signal::SIGTERM).path());
}

#[test]
fn a_temporary_fleet_takes_its_files_with_it() {
    let place = directory();
    let mut command = crate::support::backhaul();
    command.args(["demo", "--nodes", "1", "--no-example-database", "--sql-port", "0", "--http-port", "0"]);
    // A directory that is to be kept is kept, whatever its name.
    let kept = place.path().join("backhaul-demo-mine");
    std::fs::create_dir(&kept).unwrap();
    std::fs::write(kept.join("DEMO"), "").unwrap();
    let output = command.args(["-e", "SHOW LOCALITY"]).env("TMPDIR", place.path()).output().unwrap();
    assert!(output.status.success(), "{}", both(&output));
    let left: Vec<_> = std::fs::read_dir(place.path()).unwrap().flatten().map(|entry| entry.path()).collect();
    assert_eq!(left, [kept]);
    assert_nothing_runs_in(place.path());
}

#[test]
fn statements_print_as_psql_prints_them_and_give_its_status() {
    let dir = directory();
    let output = command(&dir, &["--nodes", "1", "-e", "SELECT 1 AS one", "-e", "SHOW LOCALITY"]).output().unwrap();
    let expected = " one \n-----\n   1\n(1 row)\n\n        locality         \n-------------------------\n region=us-east-1,zone=a\n(1 row)\n\n";
    assert_eq!((String::from_utf8_lossy(&output.stdout).as_ref(), output.status.code()), (expected, Some(0)));

    let output = command(&dir, &["--nodes", "1", "-e", "SELECT 1/0"]).output().unwrap();
    assert_eq!((both(&output).trim(), output.status.code()), ("ERROR:  division by zero", Some(1)));
    assert_nothing_runs_in(dir.path());
}

#[test]
fn a_start_that_cannot_be_says_why_and_leaves_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let refused = |dir: &Path, arguments: &[&str], words: &str| {
        let mut command = crate::support::backhaul();
        command.args(["demo", "--nodes", "1", "--http-port", "0", "--data-dir"]).arg(dir).args(arguments);
        let output = command.output().unwrap();
        let said = both(&output);
        assert!(!output.status.success() && said.contains(words), "{words}: {said}");
        assert_nothing_runs_in(dir);
    };
    let dir = directory();
    refused(dir.path(), &["--sql-port", &port.to_string()], &format!("SQL port {port} of n1 cannot be used"));

    let deep = dir.path().join("d".repeat(100));
    refused(&deep, &["--sql-port", "0"], "too long a path to hold a socket");

    let foreign = directory();
    std::fs::write(foreign.path().join("thesis.txt"), "").unwrap();
    refused(foreign.path(), &["--sql-port", "0"], "is not empty and was not made by a demo");

    let demo = Demo::start(&["--nodes", "1", "--no-example-database"]);
    let elsewhere = demo.dir.path().to_owned();
    let output = command(&demo.dir, &["--nodes", "1"]).output().unwrap();
    assert!(both(&output).contains("another demo runs in"), "{}", both(&output));

    let kept = demo.end(Signal::SIGTERM);
    refused(&elsewhere, &["--sql-port", "0"], "holds another fleet");
    std::fs::write(kept.path().join("n1/pg/postgresql.conf"), "nonsense = 1\n").unwrap();
    let arguments = ["--sql-port", "0", "--no-example-database"];
    refused(kept.path(), &arguments, "unrecognized configuration parameter \"nonsense\"");
}
