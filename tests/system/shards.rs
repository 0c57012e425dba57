//! Several shards with the same database: each is read by its own rules, put back where it belongs or where the statement
//! says, and never left out in silence.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::support::demo::{Demo, directory, psql};
use crate::support::faults::{Fleet, slow_door};
use crate::support::jobs::{WEST, extern_dirs};
use crate::support::store::{LocalBackup, files_in};
use crate::support::{both, postgres_program, run, until};

/// s1 is led from the east by n1 and followed from the west by n3; s2 is led from the west by n2 and followed from the
/// east by n4.
const CROSSED: [&str; 10] = [
    "--nodes",
    "4",
    "--servers",
    "4",
    "--shards",
    "2",
    "--voters",
    "1",
    "--demo-locality",
    "region=us-east-1,zone=a:region=us-west-1,zone=a:region=us-west-1,zone=b:region=us-east-1,zone=b",
];

fn start(rows: &str) -> Demo {
    Demo::start(&[&CROSSED[..], &["--rows", rows]].concat())
}

fn manifest(demo: &Demo, path: &str) -> Value {
    LocalBackup::newest(&extern_dirs(demo), path).manifest
}

/// Runs a query on the server beside node `number`.
#[track_caller]
fn on(demo: &Demo, number: usize, database: &str, query: &str) -> String {
    let url = demo.direct_url(number).replace("/movr?", &format!("/{database}?"));
    run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atqc", query])).trim_end().to_owned()
}

/// All rows of a database's larger tables, as a sum.
#[track_caller]
fn sums(demo: &Demo, number: usize, database: &str) -> String {
    let sum = |table: &str| {
        let query = format!("SELECT count(*), sum(hashtext(t::text)::numeric) FROM {table} t");
        on(demo, number, database, &query)
    };
    ["rides", "users", "vehicles", "vehicle_positions"].map(sum).join(" ")
}

/// Starts a job and gives its row when it has ended.
#[track_caller]
fn ended(demo: &Demo, number: usize, statement: &str) -> Vec<String> {
    let told = demo.ask(number, statement);
    let job = told.lines().last().unwrap_or_default();
    assert!(job.parse::<i64>().is_ok(), "{statement}: {told}");
    demo.ask(number, &format!("SHOW JOB WHEN COMPLETE {job}")).split('|').map(str::to_owned).collect()
}

#[track_caller]
fn succeeded(demo: &Demo, number: usize, statement: &str) -> Vec<String> {
    let columns = ended(demo, number, statement);
    assert_eq!((columns[5].as_str(), columns[12].as_str()), ("succeeded", ""), "{statement}: {columns:?}");
    columns
}

/// What a statement is answered, once it has these words in it.
#[track_caller]
fn told(demo: &Demo, number: usize, statement: &str, words: &[&str]) -> String {
    until(&words.join(", "), || {
        let told = demo.ask(number, statement);
        if words.iter().all(|word| told.contains(word)) { Ok(told) } else { Err(told) }
    })
}

/// The names of a manifest's shards, each with the node that was read beside, and who wrote its files.
fn parts(manifest: &Value) -> Vec<(String, u64, BTreeSet<u64>)> {
    let part = |part: &Value| {
        let writers = part["files"].as_array().unwrap().iter().map(|file| file["written_by"].as_u64().unwrap());
        (part["shard"].as_str().unwrap().to_owned(), part["read_from"].as_u64().unwrap(), writers.collect())
    };
    manifest["shards"].as_array().unwrap().iter().map(part).collect()
}

#[test]
fn each_shard_is_read_by_the_rules_of_its_own_leaseholder() {
    let demo = start("600");
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/west' WITH {WEST}");
    // n1 leads s1 from outside: all that take part share its spans. n2 leads s2, and takes part.
    told(
        &demo,
        1,
        &format!("EXPLAIN {statement}"),
        &[
            "shard s1: leaseholder node 1 (region=us-east-1,zone=a)\n  read: node 3 ",
            "exported by: nodes 2, 3; counted from node 1, no node that takes part shares a leading tier with it",
            "shard s2: leaseholder node 2 (region=us-west-1,zone=a)\n  read: node 2 ",
            "exported by: node 2; counted from node 2, its node takes part",
        ],
    );
    succeeded(&demo, 4, &format!("{statement}, DETACHED"));
    let west = manifest(&demo, "west");
    let names = |numbers: &[u64]| numbers.iter().copied().collect::<BTreeSet<u64>>();
    assert_eq!(parts(&west), [("s1".to_owned(), 3, names(&[2, 3])), ("s2".to_owned(), 2, names(&[2]))]);
    succeeded(&demo, 3, "BACKUP DATABASE movr INTO 'nodelocal://self/all' WITH DETACHED");
    let all = manifest(&demo, "all");
    assert_eq!(parts(&all), [("s1".to_owned(), 1, names(&[1])), ("s2".to_owned(), 2, names(&[2]))]);

    // Each shard has its own point and schema, and the manifest says how far the points are from each other.
    for manifest in [&west, &all] {
        let shards = manifest["shards"].as_array().unwrap();
        let times: Vec<chrono::DateTime<chrono::Utc>> =
            shards.iter().map(|part| part["point"]["time"].as_str().unwrap().parse().unwrap()).collect();
        let skew = (times[0] - times[1]).abs().num_milliseconds();
        assert_eq!(manifest["skew_ms"], skew, "{times:?}");
        // The moments are the points' own.
        let job = &manifest["job"];
        for time in &times {
            let of_job = format!("SELECT '{time}' BETWEEN created AND finished FROM registry.jobs WHERE id = {job}");
            assert_eq!(demo.registry(&of_job), "t", "{times:?}");
        }
        assert_ne!(times[0], times[1]);
        for part in shards {
            let (shard, schema) = (part["shard"].as_str().unwrap(), part["schemas"][0]["path"].as_str().unwrap());
            assert!(schema.starts_with(&format!("schema/{shard}/movr.")), "{schema}");
            // A position of this shard's own WAL, which its leaseholder has written by now.
            let leaseholder = if shard == "s1" { 1 } else { 2 };
            let written = on(&demo, leaseholder, "movr", "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn");
            let lsn = part["point"]["lsn"].as_u64().unwrap_or_else(|| panic!("{}", part["point"]));
            assert!(0 < lsn && lsn <= written.parse::<u64>().unwrap(), "{lsn} of {written}");
        }
        assert_eq!(manifest["skipped_shards"], serde_json::json!([]));
    }
    for (name, filter) in [("west", WEST), ("all", "EXECUTION LOCALITY = ''")] {
        let from = format!("RESTORE DATABASE movr FROM LATEST IN 'nodelocal://self/{name}'");
        succeeded(&demo, 4, &format!("{from} WITH new_db_name = '{name}', {filter}, DETACHED"));
        for number in [1, 2] {
            assert_eq!(sums(&demo, number, name), sums(&demo, number, "movr"), "shard s{number}");
        }
    }
    assert_ne!(sums(&demo, 1, "movr"), sums(&demo, 2, "movr"), "the shards have rows of their own");
}

#[test]
fn points_are_taken_side_by_side() {
    let demo = start("100");
    // The first shard's point waits for this lock; the second one's does not wait for the first.
    let mut holder = psql(&demo.direct_url(1));
    let lock = "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(600)";
    let mut holder = holder.args(["-qc", lock]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let locks = "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'users'::regclass";
    until("the lock", || if on(&demo, 1, "movr", locks) == "1" { Ok(()) } else { Err(String::new()) });
    let job = demo.ask(2, "BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED");
    let founders = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job%'
                    AND state = 'idle in transaction'";
    until("founders on the second shard", || {
        let seen = on(&demo, 2, "movr", founders);
        if seen == "0" { Err(demo.ask(1, &format!("SHOW JOB {job}"))) } else { Ok(()) }
    });
    let kept = format!("SELECT count(*) FROM registry.job_info WHERE job_id = {job} AND key = 'point/s1'");
    assert_eq!(on(&demo, 1, "backhaul", &kept), "0", "the first shard's point is not taken yet");
    on(
        &demo,
        1,
        "movr",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)'
                          AND pid <> pg_backend_pid()",
    );
    holder.wait().unwrap();
    let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {job}"));
    assert_eq!(row.split('|').nth(5), Some("succeeded"), "{row}");
}

/// A shorter backup is never made, also when a shard is lost behind the planning.
#[test]
fn a_shard_that_goes_once_a_job_has_begun_is_named_and_waited_for() {
    let fleet = Fleet::start(&[&CROSSED[..], &["--rows", "100"]].concat());
    let point = "backup.after_lock";
    let job = fleet.held("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED", point);
    [2, 4].into_iter().for_each(|number| fleet.demo.signal_server(number, Signal::SIGKILL));
    until("both servers of s2 to be known as gone", || {
        let seen = fleet.demo.ask(1, "SELECT count(*) FROM [SHOW NODES] WHERE role = 'server down'");
        if seen == "2" { Ok(()) } else { Err(seen) }
    });
    fleet.let_go(&job, point);
    until("the job to say what it waits for", || {
        let seen = fleet.job(&job, "concat_ws('|', status, array_to_string(execution_errors, ' '))");
        let named = seen.contains("shard \"s2\" cannot be reached");
        if seen.starts_with("running|") && named { Ok(()) } else { Err(seen) }
    });
    fleet.demo.restart_server(2);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let names: Vec<String> = parts(&manifest(&fleet.demo, "b")).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, ["s1", "s2"]);
}

#[test]
fn shards_are_exported_side_by_side() {
    let fleet = Fleet::start(&[&CROSSED[..], &["--rows", "300"]].concat());
    let job = fleet.held("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED", "backup.after_first_span");
    let finished = |what: &str| {
        let of_job = format!("FROM registry.job_info WHERE job_id = {job} AND key LIKE 'span/%'");
        fleet.registry(&format!("SELECT {what} {of_job}"))
    };
    // Held behind a span of one shard, it finishes one of the other, too, and stops with that.
    until("a span of each shard", || {
        let seen = finished("string_agg(split_part(key, '/', 2), ' ' ORDER BY key)");
        if seen == "s1 s2" { Ok(()) } else { Err(seen) }
    });
    let files = finished("string_agg(value #>> '{file,path}', ' ' ORDER BY key)");
    assert_eq!(fleet.demo.ask(2, &format!("PAUSE JOB {job}")), "PAUSE JOBS 1");
    until("the job to be paused", || match fleet.job(&job, "status") {
        status if status == "paused" => Ok(()),
        status => Err(status),
    });
    assert_eq!(finished("count(*)"), "2");
    fleet.demo.ask(2, &format!("RESUME JOB {job}"));
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    // What was finished is not read again, and each shard is whole.
    let manifest = manifest(&fleet.demo, "b");
    let names: Vec<String> = parts(&manifest).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, ["s1", "s2"]);
    for (part, file) in manifest["shards"].as_array().unwrap().iter().zip(files.split(' ')) {
        let paths: Vec<&str> =
            part["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
        assert!(paths.contains(&file), "{file} of {paths:?}");
    }
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/b' WITH new_db_name = 'again', DETACHED";
    succeeded(&fleet.demo, 4, restore);
    for number in [1, 2] {
        assert_eq!(sums(&fleet.demo, number, "again"), sums(&fleet.demo, number, "movr"), "shard s{number}");
    }
}

#[test]
fn a_shard_map_says_where_each_part_goes() {
    let demo = start("300");
    on(&demo, 1, "movr", "CREATE DATABASE solo");
    on(&demo, 1, "solo", "CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 500) i");
    succeeded(&demo, 2, "BACKUP DATABASE movr, solo INTO 'nodelocal://1/b' WITH DETACHED");
    let held = |part: &Value| {
        let databases = part["databases"].as_array().unwrap().iter();
        databases.map(|database| database["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
    };
    let made = manifest(&demo, "b");
    let held: Vec<String> = made["shards"].as_array().unwrap().iter().map(held).collect();
    assert_eq!(held, ["movr solo", "movr"]);
    told(
        &demo,
        2,
        "EXPLAIN BACKUP DATABASE solo INTO 'nodelocal://1/b'",
        &["shard s1: leaseholder", "\nshard s2: holds none of the databases\n"],
    );

    let restore = |database: &str, options: &str| {
        format!("RESTORE DATABASE {database} FROM LATEST IN 'nodelocal://1/b' WITH {options}")
    };
    let swap = restore("movr", "new_db_name = 'swapped', shard_map = 's1=s2, s2=s1', DETACHED");
    let columns = succeeded(&demo, 3, &swap);
    assert!(columns[2].ends_with(" WITH detached, new_db_name = 'swapped', shard_map = 's1=s2, s2=s1'"), "{columns:?}");
    assert_eq!(sums(&demo, 1, "swapped"), sums(&demo, 2, "movr"));
    assert_eq!(sums(&demo, 2, "swapped"), sums(&demo, 1, "movr"));
    // Under its own name, into a shard that does not have it: the one that has it is only a source.
    succeeded(&demo, 4, &restore("solo", "shard_map = 's1=s2', DETACHED"));
    let count = "SELECT count(*), sum(i) FROM t";
    assert_eq!(on(&demo, 2, "solo", count), on(&demo, 1, "solo", count));

    // What only the manifest can tell is told by the job, which leaves nothing.
    for (database, map, expected) in [
        ("movr", "s1=s2", "ERROR:  22023: two shards' parts of the backup would come into shard \"s2\""),
        ("movr", "s7=s2", "ERROR:  42704: shard \"s7\" of shard_map is not in the backup"),
        ("solo", "s1=s2", "ERROR:  42P04: database \"again\" already exists"),
    ] {
        on(&demo, 2, "postgres", "DROP DATABASE IF EXISTS again");
        if database == "solo" {
            on(&demo, 2, "postgres", "CREATE DATABASE again");
        }
        let refused = demo.ask(1, &restore(database, &format!("new_db_name = 'again', shard_map = '{map}'")));
        assert!(refused.starts_with(expected), "{map}: {refused}");
    }
    for number in [1, 2] {
        let left = "SELECT count(*) FROM pg_database WHERE datname LIKE '\\_backhaul%'";
        assert_eq!(on(&demo, number, "postgres", left), "0");
    }
}

#[test]
fn a_shard_that_cannot_be_reached_is_an_error_or_left_out_by_name() {
    let demo = start("300");
    on(&demo, 2, "movr", "CREATE DATABASE elsewhere");
    let statement = |options: &str| format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {options}");
    let skip = "skip_unreachable_shards";
    kill(demo.server_pid(2), Signal::SIGKILL).unwrap();
    let why = "no node that answers stands beside a primary of it";
    let out = format!("shard s2 is left out: it could not be reached ({why})");
    told(
        &demo,
        1,
        &statement("DETACHED"),
        &[
            "ERROR:  08006: shard \"s2\" cannot be reached",
            "DETAIL:  No node that answers stands beside a primary of it.",
            "HINT:  SHOW NODES tells which nodes are there. WITH skip_unreachable_shards makes",
        ],
    );
    assert_eq!(demo.ask(1, "SHOW JOBS"), "", "no job was made");
    let plan = demo.ask(1, &format!("EXPLAIN {}", statement("DETACHED")));
    assert!(plan.contains("shard s1: leaseholder") && plan.contains("\nerror: shard \"s2\" cannot be"), "{plan}");
    let plan = demo.ask(1, &format!("EXPLAIN {}", statement(skip)));
    assert!(plan.contains(&format!("\n{out}\ntotal: ")) && !plan.contains("error:"), "{plan}");
    // It may be there or not, so it is not said that it is not; where nothing may be left out, that is all there is to say.
    let perhaps = "BACKUP DATABASE elsewhere INTO 'nodelocal://self/b'";
    let failed = demo.ask(1, perhaps);
    assert!(failed.starts_with("ERROR:  08006: shard \"s2\" cannot be reached\nDETAIL:  No node that"), "{failed}");
    let plan = demo.ask(1, &format!("EXPLAIN {perhaps}"));
    let told_of_both = "\nshard s1: holds none of the databases\nerror: shard \"s2\" cannot be reached (08006)\n";
    assert!(plan.contains(told_of_both) && plan.contains("\ntotal: "), "{plan}");
    let missing = demo.ask(1, &format!("{perhaps} WITH {skip}"));
    assert!(
        missing.contains("3D000") && missing.contains("DETAIL:  It may be in what cannot be reached: shard \"s2\".")
    );

    // With the option every form of the statement says so, and so does whatever remembers it.
    let notice = format!("NOTICE:  00000: {out}");
    let detached = demo.ask(1, &statement(&format!("DETACHED, {skip}")));
    assert!(detached.contains(&notice), "{detached}");
    let job = detached.lines().find(|line| line.parse::<i64>().is_ok()).unwrap_or_else(|| panic!("{detached}"));
    let row = demo.ask(3, &format!("SHOW JOB WHEN COMPLETE {job}"));
    assert!(row.contains("|succeeded|"), "{row}");
    assert!(row.contains(" WITH detached, skip_unreachable_shards /* left out: shard s2 */|"), "{row}");
    let attached = demo.ask(1, &statement(skip));
    assert!(attached.contains("|succeeded|1.0|") && attached.contains(&notice), "{attached}");
    let relocated = demo.ask(1, &statement(&format!("{WEST}, {skip}")));
    assert!(relocated.contains(" relocated to ") && relocated.contains(&format!("Note: {out}.")), "{relocated}");

    let backup = LocalBackup::newest(&extern_dirs(&demo)[..1], "b");
    assert_eq!(parts(&backup.manifest).len(), 1);
    assert_eq!(backup.manifest["skipped_shards"][0]["object"], "s2");
    let text = files_in(&demo.node_dir(1).join("extern/b")).into_iter().find(|file| file.ends_with("RESTORE.txt"));
    assert!(std::fs::read_to_string(text.unwrap()).unwrap().contains("# Left out: shard s2: it could not be reached"));
    let subdir = demo.ask(1, &format!("SHOW JOB {job}")).split('\'').nth(1).unwrap().to_owned();
    let shown = demo.ask(3, &format!("SHOW BACKUP FROM '{subdir}' IN 'nodelocal://self/b'"));
    assert!(shown.contains(&notice), "{shown}");

    // What comes back says what does not.
    let restore = |database: &str, options: &str| {
        format!("RESTORE DATABASE {database} FROM '{subdir}' IN 'nodelocal://self/b' WITH new_db_name = 'c'{options}")
    };
    let absent = demo.ask(1, &restore("elsewhere", ""));
    assert!(absent.contains("3D000") && absent.contains(&format!("Note: {out}.")), "{absent}");
    let restored = demo.ask(1, &restore("movr", ", shard_map = 's2=s1'"));
    let was = format!("NOTICE:  00000: shard s2 was left out of the backup: it could not be reached ({why})");
    assert!(restored.contains("|succeeded|1.0|") && restored.contains(&was), "{restored}");
    assert!(demo.ask(1, "SHOW JOBS").contains("shard_map = 's2=s1' /* left out: shard s2 */|"));
    assert_eq!(sums(&demo, 1, "c"), sums(&demo, 1, "movr"));

    demo.restart_server(2);
    told(&demo, 1, &format!("EXPLAIN {}", statement(skip)), &["shard s2: leaseholder node 2"]);
    assert!(succeeded(&demo, 1, &statement(&format!("{skip}, DETACHED")))[2].ends_with(skip));
}

#[test]
fn a_shard_that_is_led_and_not_listed_yet_is_in_a_backup() {
    let demo = start("100");
    let listed = "SELECT string_agg(name, ',' ORDER BY name) FROM registry.shards";
    until("both to be listed", || {
        let seen = on(&demo, 1, "backhaul", listed);
        if seen == "s1,s2" { Ok(()) } else { Err(seen) }
    });
    on(&demo, 1, "backhaul", "DELETE FROM registry.shards WHERE name = 's2'");
    succeeded(&demo, 1, "BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED");
    assert_eq!(parts(&LocalBackup::newest(&extern_dirs(&demo)[..1], "b").manifest).len(), 2);
}

/// It knows where the registry is as soon as its own server answers, and of others when they have answered.
#[test]
fn a_gateway_that_has_just_begun_leaves_no_shard_out_that_it_has_not_heard_of_yet() {
    let mut fleet = Fleet::start(&["--shards", "2", "--servers", "2", "--nodes", "4", "--rows", "100"]);
    let port = fleet.demo.nodes[1].address.rsplit_once(':').unwrap().1.parse().unwrap();
    fleet.move_behind(2, &slow_door(port, Duration::from_millis(100)));
    let statement = "EXPLAIN BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH skip_unreachable_shards";
    for round in 0..3 {
        fleet.end_node(1, Signal::SIGKILL);
        fleet.start_node(1);
        let plan = until("the node to explain", || {
            let told = fleet.demo.ask(1, statement);
            if told.starts_with("coordinator: ") { Ok(told) } else { Err(told) }
        });
        assert!(plan.contains("shard s2: leaseholder node 2 ") && !plan.contains("left out"), "{round}: {plan}");
    }
}

#[test]
fn a_server_that_is_silent_is_unreachable_one_that_refuses_is_not_and_a_retired_shard_is_not_asked() {
    let demo = start("100");
    let statement = |options: &str| format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED{options}");
    // What answers is in the backup, or there is none.
    on(&demo, 2, "postgres", "ALTER DATABASE movr CONNECTION LIMIT 0");
    for options in ["", ", skip_unreachable_shards"] {
        let refused = demo.ask(1, &statement(options));
        let why = "DETAIL:  Its leaseholder says: too many connections for database \"movr\".";
        let expected = format!("ERROR:  53300: shard \"s2\" refuses a session in database \"movr\"\n{why}");
        assert!(refused.starts_with(&expected), "{refused}");
    }
    assert_eq!(demo.ask(1, "SHOW JOBS"), "", "no job was made");
    on(&demo, 2, "postgres", "ALTER DATABASE movr CONNECTION LIMIT -1");
    let server = demo.server_pid(2);
    // What is connected stays so, and answers; whoever comes new waits, and nobody waits for ever.
    kill(server, Signal::SIGSTOP).unwrap();
    let refused = demo.ask(1, &statement(""));
    assert!(
        refused.starts_with("ERROR:  08006: shard \"s2\" cannot be reached\nDETAIL:  Its leaseholder"),
        "{refused}"
    );
    let left_out = demo.ask(1, &statement(", skip_unreachable_shards"));
    assert!(
        left_out.contains("NOTICE:  00000: shard s2 is left out: it could not be reached (its leaseholder"),
        "{left_out}"
    );
    kill(server, Signal::SIGCONT).unwrap();

    kill(server, Signal::SIGKILL).unwrap();
    told(&demo, 1, &statement(""), &["ERROR:  08006: shard \"s2\" cannot be reached\nDETAIL:  No node that answers"]);
    let retire = "DELETE FROM registry.shards WHERE name = 's2'";
    assert!(include_str!("../../docs/backups.md").contains(retire));
    on(&demo, 1, "backhaul", retire);
    succeeded(&demo, 1, &statement(""));
}

#[test]
fn a_fleet_with_other_shards_is_told_where_to_put_a_part() {
    let demo = start("100");
    on(&demo, 2, "movr", "CREATE DATABASE solo");
    on(&demo, 2, "solo", "CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 500) i");
    succeeded(&demo, 1, "BACKUP DATABASE solo INTO 'nodelocal://1/b' WITH DETACHED");
    succeeded(&demo, 1, "BACKUP DATABASE movr INTO 'nodelocal://1/both' WITH DETACHED");
    let (from, count) = (demo.node_dir(1).join("extern"), "SELECT count(*), sum(i) FROM t");
    let was = on(&demo, 2, "solo", count);

    let other = Demo::start(&["--nodes", "1", "--no-example-database"]);
    for file in files_in(&from) {
        let to = other.node_dir(1).join("extern").join(file.strip_prefix(&from).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&file, &to).unwrap();
    }
    let restore = "RESTORE DATABASE solo FROM LATEST IN 'nodelocal://1/b'";
    let refused = other.ask(1, restore);
    assert!(refused.starts_with("ERROR:  42704: shard \"s2\" of the backup does not exist in this fleet"), "{refused}");
    // The hint is what helps.
    let hint = refused.split("WITH ").nth(1).and_then(|rest| rest.split('.').next()).unwrap();
    assert_eq!(hint, "shard_map = 's2=s1'");
    let row = other.ask(1, &format!("{restore} WITH {hint}"));
    assert!(row.contains("|succeeded|1.0|500|"), "{row}");
    let url = other.direct_url(1).replace("/postgres?", "/solo?");
    assert_eq!(run(psql(&url).args(["-Atc", count])).trim_end(), was);
    // One shard cannot take both parts of one database.
    let refused = other.ask(1, "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/both' WITH shard_map = 's2=s1'");
    assert!(refused.contains("Shards \"s1\" and \"s2\" both hold database \"movr\"."), "{refused}");
}

#[test]
fn stock_tools_restore_the_part_that_is_named() {
    let demo = start("200");
    succeeded(&demo, 1, "BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED");
    let dir = directory();
    LocalBackup::newest(&extern_dirs(&demo), "b").gather(dir.path());
    let bin = postgres_program("createdb");
    let bin = std::path::Path::new(bin.get_program()).parent().unwrap().display().to_string();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    let restore = |number: usize, shard: &str| {
        let mut restore = std::process::Command::new("sh");
        restore.arg("RESTORE.txt").current_dir(dir.path()).env("PATH", &path).env("PGUSER", "root");
        restore.env("PGHOST", demo.node_dir(number).join("socket")).env("PREFIX", "again_").env("SHARD", shard);
        restore.output().unwrap()
    };
    let told = both(&restore(1, ""));
    assert_eq!(told.trim(), "Say whose part is to be restored: SHARD='s1' or SHARD='s2'");
    for (number, shard) in [(1, "s1"), (2, "s2")] {
        let done = restore(number, shard);
        assert!(done.status.success(), "{}", both(&done));
        assert_eq!(sums(&demo, number, "again_movr"), sums(&demo, number, "movr"));
    }
}
