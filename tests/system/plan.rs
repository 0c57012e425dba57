//! EXPLAIN BACKUP tells what is done, and nothing is done by it; options never fall back; docs/locality.md is true.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::support::demo::{Demo, Holder};
use crate::support::faults::{Fleet, slow_door};
use crate::support::store::{LocalBackup, S3};
use crate::support::{both, run, until};

const WEST: &str = "EXECUTION LOCALITY = 'region=us-west-1'";

fn manifest(demo: &Demo, path: &str) -> Value {
    let dirs: Vec<PathBuf> = (1..=demo.nodes.len()).map(|number| demo.node_dir(number).join("extern")).collect();
    LocalBackup::newest(&dirs, path).manifest
}

/// Who wrote files of the first shard.
fn writers(manifest: &Value) -> BTreeSet<u64> {
    let files = manifest["shards"][0]["files"].as_array().unwrap();
    files.iter().map(|file| file["written_by"].as_u64().unwrap()).collect()
}

/// The plan of a statement, once it has this line.
#[track_caller]
fn explained(demo: &Demo, number: usize, statement: &str, line: &str) -> String {
    until(line, || {
        let plan = demo.ask(number, &format!("EXPLAIN {statement}"));
        if plan.lines().any(|said| said.trim().starts_with(line)) { Ok(plan) } else { Err(plan) }
    })
}

/// Runs statements one by one in one session of node `number`.
fn session(demo: &Demo, number: usize, statements: &[&str]) -> String {
    let mut psql = demo.psql(number);
    psql.args(["-Atq", "-v", "VERBOSITY=verbose"]);
    psql.args(statements.iter().flat_map(|statement| ["-c", statement]));
    both(&psql.output().unwrap()).trim_end().to_owned()
}

#[test]
fn what_is_explained_is_what_is_done() {
    let demo = Demo::start(&["--rows", "2000"]);
    let (s3, secret) = (S3::start(), "TheSecretKeyThatNobodyMayRead");
    let door = s3.watched();
    let uri = format!(
        "s3://bucket/x?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY={secret}&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
        door.address
    );
    let to = |uri: &str| format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}");
    let plan = explained(&demo, 1, &to(&uri), "read: node 3 (region=us-west-1,zone=a), non-voting replica");
    for line in [
        "coordinator: node 3 (region=us-west-1,zone=a)",
        "this gateway, node 1, lacks region=us-west-1: the job is relocated",
        "left out: node 2 (region=us-east-1,zone=b): it lacks region=us-west-1",
        "mode: paused",
        "next: node 1",
        "exported by: nodes 3, 4; counted from node 1",
        "table movr.public.rides: ",
        "total: ",
    ] {
        assert!(plan.lines().any(|said| said.trim().starts_with(line)), "{line}\n{plan}");
    }
    // No store was asked, no key is shown, no job was made, and nothing is left on the server.
    assert!(door.visitors().is_empty() && !plan.contains(secret), "{plan}");
    assert_eq!(demo.ask(1, "SHOW JOBS"), "");
    until("the look to be over", || {
        let left = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job%'";
        let seen = both(&demo.psql_direct(3).args(["-Atc", left]).output().unwrap());
        if seen.trim() == "0" { Ok(()) } else { Err(seen) }
    });

    let row = demo.ask(3, &to("nodelocal://self/b"));
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    let manifest = manifest(&demo, "b");
    let shard = &manifest["shards"][0];
    assert_eq!((&shard["read_from"], &shard["point"]["mode"]), (&3.into(), &"Paused".into()));
    assert_eq!(writers(&manifest), BTreeSet::from([3, 4]));
    let databases = shard["databases"][0]["tables"].as_array().unwrap();
    for file in shard["files"].as_array().unwrap() {
        let oid = &file["what"]["Table"]["oid"];
        if oid.is_null() {
            // Large objects have a line of their own.
            continue;
        }
        let table = databases.iter().find(|table| &table["oid"] == oid).unwrap();
        let line = format!("table movr.{}.{}: ", table["schema"].as_str().unwrap(), table["name"].as_str().unwrap());
        let said = plan.lines().find(|said| said.trim().starts_with(&line)).unwrap_or_else(|| panic!("{line}\n{plan}"));
        let node = format!("by node {}", file["written_by"]);
        assert!(said.ends_with(&node), "{said}: {node}");
        let kib = table["bytes"].as_f64().unwrap() / 1024.0;
        assert!(kib >= 1024.0 || kib == 0.0 || said.contains(&format!(", {kib:.1} KiB")), "{said}: {kib}");
    }
    // What is left to users is a quarter of what the server does not keep back.
    let connections = |setting: &str| -> usize {
        run(demo.psql_direct(3).args(["-Atc", &format!("SHOW {setting}")])).trim().parse().unwrap()
    };
    let room = connections("max_connections") - connections("superuser_reserved_connections");
    let budget = format!("on its server, where all backups together have {}", room - room / 4);
    let line = plan.lines().find(|said| said.trim().starts_with("connections: at most ")).unwrap();
    assert!(line.ends_with(&budget), "{line}: {budget}");
    let spans = format!("total: {} spans, ", shard["files"].as_array().unwrap().len());
    assert!(plan.lines().any(|said| said.starts_with(&spans)), "{spans}\n{plan}");
}

#[test]
fn a_prepared_explain_is_bound_like_any_statement() {
    let demo = Demo::start(&["--rows", "100"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&demo.nodes[0].url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let text = "EXPLAIN BACKUP DATABASE movr INTO $1 WITH EXECUTION LOCALITY = $2, replica = $3";
        let statement = client.prepare(text).await.unwrap();
        assert_eq!((statement.params().len(), statement.columns()[0].name()), (3, "info"));
        let rows = client.query(&statement, &[&"nodelocal://1/x", &"region=us-east-1", &"any"]).await.unwrap();
        let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(lines[0], "coordinator: node 1 (region=us-east-1,zone=a)");
        assert!(lines.iter().any(|line| line.contains("mode: exported")), "{lines:?}");
        // Arrays of numbers in the binary form, too.
        let rows = client.query("SHOW RANGES FROM TABLE users", &[]).await.unwrap();
        assert_eq!(rows[0].get::<_, Vec<i64>>("replicas"), [1, 2, 3]);
    });
}

#[test]
fn a_standby_that_is_not_fit_is_passed_over_with_its_reason() {
    let demo = Demo::start(&["--rows", "100"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}");
    let on_n3 = |text: &str| {
        let output = demo.psql_direct(3).args(["-Atc", text]).output().unwrap();
        assert!(output.status.success(), "{}", both(&output));
    };
    let source = run(demo.psql_direct(3).args(["-Atc", "SHOW primary_conninfo"]));
    let follow = format!("ALTER SYSTEM SET primary_conninfo = '{}'", source.trim().replace('\'', "''"));
    let reload = "SELECT pg_reload_conf()";
    for (begin, end, role, reason) in [
        (
            vec!["SELECT pg_wal_replay_pause()"],
            vec!["SELECT pg_wal_replay_resume()"],
            "non-voting replica",
            "its replay is paused by somebody else",
        ),
        (
            vec!["ALTER SYSTEM SET recovery_min_apply_delay = '5min'", reload],
            vec!["ALTER SYSTEM RESET recovery_min_apply_delay", reload],
            "non-voting replica",
            "its replay is late by recovery_min_apply_delay = 5min",
        ),
        (
            vec!["ALTER SYSTEM SET primary_conninfo = ''", reload],
            vec![&*follow, reload],
            "detached standby",
            "it does not follow the shard's primary",
        ),
    ] {
        begin.into_iter().for_each(on_n3);
        let passed = format!("passed over: node 3 (region=us-west-1,zone=a), {role}: {reason}");
        explained(&demo, 3, &statement, &passed);
        let plan = explained(&demo, 1, &statement, &passed);
        assert!(plan.contains("read: node 1 (region=us-east-1,zone=a), leaseholder"), "{plan}");
        // Where nothing else is allowed, nothing else is read, and no job is made.
        let jobs = demo.ask(1, "SHOW JOBS");
        let refused = demo.ask(3, &format!("{statement}, STRICT EXECUTION LOCALITY, DETACHED"));
        assert!(refused.starts_with("ERROR:  55000: shard \"s1\" has no server that the backup may read"), "{refused}");
        assert!(refused.contains(&format!("node 3 ({role}): {reason}")), "{refused}");
        assert_eq!(demo.ask(1, "SHOW JOBS"), jobs);
        // The job does what was explained: the same function decides.
        let row = until("the node itself to know", || {
            let row = demo.ask(3, &statement);
            let read = manifest(&demo, "b")["shards"][0]["read_from"].clone();
            if read == 1 { Ok(row) } else { Err(format!("{row}: {read}")) }
        });
        assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
        end.into_iter().for_each(on_n3);
        explained(&demo, 1, &statement, "read: node 3 (region=us-west-1,zone=a), non-voting replica");
    }
}

/// Its replay waits for a reader, and nothing else is amiss with it.
#[test]
fn a_standby_that_is_too_far_behind_is_passed_over_until_it_has_caught_up() {
    let demo = Demo::start(&["--rows", "100"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}");
    let on = |number: usize, text: &str| {
        run(demo.psql_direct(number).args(["-v", "ON_ERROR_STOP=1", "-Atqc", text])).trim().to_owned()
    };
    for (number, setting) in
        [(2, "hot_standby_feedback = off"), (3, "hot_standby_feedback = off"), (3, "max_standby_streaming_delay = -1")]
    {
        on(number, &format!("ALTER SYSTEM SET {setting}"));
        on(number, "SELECT pg_reload_conf()");
    }
    let is = |number: usize, query: &str, expected: &str| {
        until(query, || {
            let seen = on(number, query);
            if seen == expected { Ok(()) } else { Err(seen) }
        });
    };
    is(3, "SHOW max_standby_streaming_delay", "-1");
    is(1, "SELECT count(*) FROM pg_replication_slots WHERE xmin IS NOT NULL", "0");
    // What VACUUM removes is seen by the reader.
    on(1, "CREATE TABLE spare AS SELECT generate_series(1, 1000) AS n");
    is(3, "SELECT to_regclass('spare') IS NOT NULL", "t");
    let reader =
        Holder::start(demo.psql_direct(3), "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM users");
    on(1, "DELETE FROM spare");
    on(1, "VACUUM spare");
    on(1, "CREATE TABLE filler AS SELECT repeat('x', 1000) FROM generate_series(1, 10000)");
    let read = |node: u64| {
        let row = until("the node itself to know", || {
            let row = demo.ask(3, &statement);
            let read = manifest(&demo, "b")["shards"][0]["read_from"].clone();
            if read == node { Ok(row) } else { Err(format!("{row}: {read}")) }
        });
        assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    };
    // It is 10 MB behind, which is little as long as nothing else is set.
    explained(&demo, 1, &statement, "read: node 3 (region=us-west-1,zone=a), non-voting replica");
    demo.ask(1, "SET CLUSTER SETTING bulkio.backup.standby_lag_limit = '4MiB'");
    let passed = "passed over: node 3 (region=us-west-1,zone=a), non-voting replica: it is ";
    explained(&demo, 3, &statement, passed);
    let plan = explained(&demo, 1, &statement, passed);
    assert!(plan.contains(" bytes of WAL behind, more than bulkio.backup.standby_lag_limit = 4194304"), "{plan}");
    assert!(plan.contains("read: node 1 (region=us-east-1,zone=a), leaseholder"), "{plan}");
    let refused = demo.ask(3, &format!("{statement}, STRICT EXECUTION LOCALITY, DETACHED"));
    assert!(refused.starts_with("ERROR:  55000: shard \"s1\" has no server that the backup may read"), "{refused}");
    read(1);
    drop(reader);
    explained(&demo, 1, &statement, "read: node 3 (region=us-west-1,zone=a), non-voting replica");
    read(3);
}

/// A standby that begins while somebody has more subtransactions open than a snapshot lists lets nobody in.
#[test]
fn a_standby_that_refuses_everybody_until_a_transaction_has_ended_is_passed_over_until_then() {
    let demo = Demo::start(&["--rows", "100"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}");
    let on = |number: usize, text: &str| {
        run(demo.psql_direct(number).args(["-v", "ON_ERROR_STOP=1", "-Atqc", text])).trim().to_owned()
    };
    on(1, "CREATE TABLE spare (n int)");
    let many = "BEGIN; DO $$ BEGIN FOR i IN 1..100 LOOP
                    BEGIN INSERT INTO spare VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END;
                END LOOP; END $$";
    let holder = Holder::start(demo.psql_direct(1), many);
    // It begins behind a checkpoint, which is after the transaction's beginning.
    on(1, "CHECKPOINT");
    let position = on(1, "SELECT pg_current_wal_flush_lsn()");
    until("the standby to have it", || {
        let seen = on(3, &format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"));
        if seen == "t" { Ok(()) } else { Err(seen) }
    });
    on(3, "CHECKPOINT");
    let server = demo.server_pid(3);
    kill(server, Signal::SIGQUIT).unwrap();
    until("the server to be gone", || if kill(server, None).is_err() { Ok(()) } else { Err("it is there".to_owned()) });
    demo.begin_server(3, "-W");
    until("the server to refuse", || {
        let said = both(&demo.psql_direct(3).args(["-Atc", "SELECT 1"]).output().unwrap());
        if said.contains("not yet accepting connections") { Ok(()) } else { Err(said) }
    });
    for number in [3, 1] {
        explained(
            &demo,
            number,
            &statement,
            "passed over: node 3 (region=us-west-1,zone=a), server down: it does not answer",
        );
    }
    let read = |node: u64| {
        let row = demo.ask(3, &statement);
        assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
        assert_eq!(manifest(&demo, "b")["shards"][0]["read_from"], node);
    };
    read(1);
    drop(holder);
    // What it waits for is logged with the next checkpoint.
    on(1, "CHECKPOINT");
    explained(&demo, 3, &statement, "read: node 3 (region=us-west-1,zone=a), non-voting replica");
    read(3);
}

#[test]
fn the_smallest_of_very_many_tables_are_explained_in_one_line() {
    let demo = Demo::start(&["--rows", "100"]);
    let make = "DO $$ BEGIN FOR n IN 1..1010 LOOP EXECUTE format('CREATE TABLE small%s (n int)', n); END LOOP; END $$";
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-Atqc", make]));
    let plan = explained(&demo, 1, "BACKUP DATABASE movr INTO 'nodelocal://self/b'", "exported by: node 1");
    let objects = ["table movr.", "large objects of movr", "contents of the large objects of movr"];
    let told = plan.lines().filter(|line| objects.iter().any(|object| line.trim().starts_with(object))).count();
    let number = |text: &str| text.split_ascii_whitespace().next().unwrap().parse::<usize>().unwrap();
    let (others, sums) = plan.lines().find_map(|line| line.trim().split_once(" smaller ones: ")).expect(&plan);
    assert!(told == 1000 && number(others) > 10 && sums.ends_with(" spans, 0 B"), "{told}: {others}: {sums}");
    // Whatever is told together is in the sum, too: each of these tables is one span.
    let total = plan.lines().find_map(|line| line.strip_prefix("total: ")).expect(&plan);
    assert_eq!((number(total), number(sums)), (told + number(others), number(others)), "{total}");
}

/// Of servers in the same tiers the one is read whose node answers soonest; by its number it would be the other one.
#[test]
fn a_node_without_a_server_reads_the_one_that_answers_soonest() {
    let zones = "region=east:region=west,zone=a:region=west,zone=a:region=west,zone=b";
    let mut fleet = Fleet::start(&["--rows", "100", "--servers", "3", "--voters", "1", "--demo-locality", zones]);
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH EXECUTION LOCALITY = 'zone=b'";
    for (slow, delay, soonest) in [(2, 50, 3), (3, 200, 2)] {
        let port = fleet.demo.nodes[slow - 1].address.rsplit_once(':').unwrap().1.parse().unwrap();
        fleet.move_behind(slow, &slow_door(port, Duration::from_millis(delay)));
        let plan = explained(&fleet.demo, 4, statement, &format!("read: node {soonest} (region=west,zone=a)"));
        assert!(plan.contains("exported by: node 4; counted from node 1"), "{plan}");
        let row = fleet.demo.ask(4, statement);
        assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
        assert_eq!(manifest(&fleet.demo, "b")["shards"][0]["read_from"], soonest);
    }
}

/// What every server would refuse is explained, and fails the job.
#[test]
fn what_is_certain_to_fail_is_an_error_of_the_plan() {
    let demo = Demo::start(&["--rows", "100"]);
    let on_n1 = |text: &str| drop(run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-qc", text])));
    let names: Vec<String> = (1..=13).map(|number| format!("d{number}")).collect();
    names.iter().for_each(|name| on_n1(&format!("CREATE DATABASE {name}")));
    let to = |databases: &str| format!("BACKUP DATABASE {databases} INTO 'nodelocal://self/b' WITH {WEST}");
    let (one, many) = (to("movr"), to(&format!("movr, {}", names.join(", "))));
    let role = "ALTER ROLE backhaul";
    for (begin, end, statement, code, message) in [
        (
            "SELECT",
            "SELECT",
            many,
            "22023",
            "a backup of 14 databases needs at least 46 connections, and the server has ",
        ),
        (
            &*format!("{role} RESET lo_compat_privileges"),
            &*format!("{role} SET lo_compat_privileges = on"),
            one.clone(),
            "42501",
            "the role of the node may not read the large objects of database \"movr\"",
        ),
    ] {
        on_n1(begin);
        // The job would ask all of them, one after the other.
        let plan = until("every server to refuse", || {
            let plan = demo.ask(1, &format!("EXPLAIN {statement}"));
            let refusals = plan.matches("would be read, and does not let itself: node").count();
            if refusals == 3 { Ok(plan) } else { Err(plan) }
        });
        assert_eq!(plan.matches(&format!("error: {message}")).count(), 3, "{plan}");
        assert_eq!(plan.matches(&format!(" ({code})\n")).count(), 3, "{plan}");
        for absent in [" read: node", "next: node", "exported by"] {
            assert!(!plan.contains(absent), "{plan}");
        }
        let told = demo.ask(3, &statement);
        assert!(told.starts_with(&format!("ERROR:  {code}: {message}")) && told.contains("HINT:  "), "{told}");
        on_n1(end);
    }
    let plan = explained(&demo, 1, &one, "read: node 3");
    assert!(!plan.contains("error: "), "{plan}");
}

#[test]
fn replica_chooses_what_is_read_and_never_falls_back() {
    let demo = Demo::start(&["--rows", "100"]);
    let statement = |options: &str| format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {options}");
    explained(&demo, 1, &statement("replica = 'nonvoting'"), "read: node 3");
    // All nodes match; the standby that is read stands in the leaseholder's place.
    let row = demo.ask(1, &statement("replica = 'nonvoting'"));
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    let made = manifest(&demo, "b");
    assert_eq!((made["shards"][0]["read_from"].clone(), writers(&made)), (3.into(), BTreeSet::from([3])));

    // A later point goes by the same options: with its server gone the job waits, and reads no other.
    let pausing = "SET backhaul.debug_pausepoints = 'backup.after_points'";
    let job = session(&demo, 1, &[pausing, &statement("replica = 'nonvoting', DETACHED")]);
    assert!(job.parse::<i64>().is_ok(), "{job}");
    let status = |wanted: &str| {
        until(wanted, || {
            let row = demo.ask(1, &format!("SHOW JOB {job}"));
            if row.split('|').nth(5) == Some(wanted) { Ok(row) } else { Err(row) }
        })
    };
    status("paused");
    kill(demo.server_pid(3), Signal::SIGKILL).unwrap();
    explained(
        &demo,
        1,
        &statement("replica = 'nonvoting'"),
        "error: shard \"s1\" has no server that the backup may read",
    );
    explained(&demo, 1, &statement("replica = 'standby'"), "read: node 2");
    assert_eq!(session(&demo, 1, &[&format!("RESUME JOB {job}")]), "");
    until("the job to find nothing to read", || {
        let row = demo.ask(1, &format!("SHOW JOB {job}"));
        let told = row.split('|').next_back().unwrap_or_default().contains("no server that the backup may read");
        if told && row.split('|').nth(5) == Some("running") { Ok(()) } else { Err(row) }
    });
    demo.restart_server(3);
    status("succeeded");
    let made = manifest(&demo, "b");
    assert_eq!((made["job"].to_string(), &made["shards"][0]["read_from"]), (job, &3.into()));

    // A voting replica is read where nothing else is allowed, and its replay is not paused.
    let plan = explained(
        &demo,
        2,
        &statement("replica = 'standby', EXECUTION LOCALITY = 'zone=b,region=us-east-1'"),
        "read: node 2",
    );
    assert!(plan.contains("mode: still, else single"), "{plan}");
    let row = demo.ask(2, &statement("replica = 'standby', EXECUTION LOCALITY = 'zone=b,region=us-east-1'"));
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    let made = manifest(&demo, "b");
    let shard = &made["shards"][0];
    assert!(shard["read_from"] == 2 && shard["point"]["mode"] != "Paused", "{shard}");
}

#[test]
fn balanced_nodes_with_a_replica_share_the_work() {
    let demo = Demo::start(&["--rows", "500"]);
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://self/b'";
    explained(&demo, 1, statement, "exported by: node 1; counted from node 1, its node takes part");
    let balanced = "SET backhaul.backup.balanced_distribution = on";
    let plan = session(&demo, 1, &[balanced, &format!("EXPLAIN {statement}")]);
    assert!(plan.contains("read: node 3") && plan.contains("exported by: nodes 1, 2, 3;"), "{plan}");
    let row = session(&demo, 1, &[balanced, statement]);
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    let made = manifest(&demo, "b");
    assert_eq!((made["shards"][0]["read_from"].clone(), writers(&made)), (3.into(), BTreeSet::from([1, 2, 3])));
}

/// Every statement of the document runs, and what it is said to answer is answered.
#[test]
fn the_document_on_locality_is_true() {
    let demo = Demo::start(&["--rows", "100"]);
    let text = include_str!("../../docs/locality.md");
    let blocks: Vec<&str> = text.split("```sql\n").skip(1).collect();
    assert!(blocks.len() >= 4);
    for block in blocks {
        let (statements, rest) = block.split_once("```").unwrap();
        let shown = rest.split_once("```text\n").unwrap().1.split("```").next().unwrap();
        let (changes, questions): (Vec<&str>, Vec<&str>) =
            statements.lines().partition(|statement| !statement.starts_with("SHOW "));
        assert!(!changes.is_empty() && !questions.is_empty(), "{statements}");
        let directly = changes[0].split_once(" -- on the server beside n").map(|(_, number)| number.parse().unwrap());
        let answer = match directly {
            Some(number) => both(&demo.psql_direct(number).args(["-c", changes[0]]).output().unwrap()),
            None => session(&demo, 1, &changes),
        };
        assert!(!answer.contains("ERROR"), "{answer}");
        let words = |line: &str| line.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
        until(shown, || {
            let mut psql = demo.psql(4);
            psql.args(["-x", "-q"]);
            psql.args(questions.iter().flat_map(|question| ["-c", question]));
            let answer = both(&psql.output().unwrap());
            let answered: Vec<String> = answer.lines().map(words).collect();
            if shown.lines().all(|line| answered.contains(&words(line))) { Ok(()) } else { Err(answer) }
        });
    }
}
