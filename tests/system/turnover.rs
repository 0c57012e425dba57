//! Nodes that come and go while a backup runs: one that comes helps, one that goes is done without, and only what matches is
//! ever asked; where nobody is left, the job says so.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::crash::{FILTER, ONE_SHARD, TWO_SHARDS};
use crate::support::demo::psql;
use crate::support::faults::{Fleet, Trouble};
use crate::support::jobs::{WEST, relocated};
use crate::support::store::{LocalBackup, S3, files_in};
use crate::support::{both, run, until};

/// The sealed manifest of the only backup in a collection.
#[track_caller]
fn sealed(s3: &S3, collection: &str) -> Value {
    let seals = s3.keys(&format!("{collection}/"));
    let seals: Vec<&String> = seals.iter().filter(|key| key.ends_with("/BACKUP_MANIFEST")).collect();
    assert_eq!(seals.len(), 1, "{seals:?}");
    serde_json::from_str(&s3.object(seals[0])).unwrap()
}

/// What of the manifest's files each node wrote, and how many rows of `rides` are in all of them.
fn writers_and_rides(manifest: &Value) -> (BTreeSet<u64>, u64) {
    let shard = &manifest["shards"][0];
    let tables = shard["databases"][0]["tables"].as_array().unwrap();
    let rides = &tables.iter().find(|table| table["name"] == "rides").unwrap()["oid"];
    let files = shard["files"].as_array().unwrap();
    let writers = files.iter().map(|file| file["written_by"].as_u64().unwrap()).collect();
    let of_rides = files.iter().filter(|file| &file["what"]["Table"]["oid"] == rides);
    (writers, of_rides.map(|file| file["rows"].as_u64().unwrap()).sum())
}

/// The files of the spans that a job has finished.
#[track_caller]
fn finished(fleet: &Fleet, job: &str) -> BTreeSet<String> {
    let paths = "SELECT value #>> '{file,path}' FROM registry.job_info";
    let told = fleet.registry(&format!("{paths} WHERE job_id = {job} AND key LIKE 'span/%'"));
    told.lines().map(str::to_owned).collect()
}

/// Makes an attached job from node 1, which does not match, and waits until it is held where it has gone; gives the job and
/// its coordinator.
#[track_caller]
fn moved_and_held(fleet: &Fleet, uri: &str, filter: &str, point: &str) -> (String, String) {
    let set = format!("SET backhaul.debug_pausepoints = '{point}:hold'");
    let statement = format!("BACKUP DATABASE movr INTO '{uri}' WITH {filter}");
    let mut psql = fleet.demo.psql(1);
    psql.args(["-Atq", "-v", "VERBOSITY=verbose", "-c", &set, "-c", &statement]);
    let told = both(&psql.output().unwrap());
    let (job, to) = relocated(&told);
    fleet.until_held(job, point);
    // G12
    assert_eq!(fleet.job(job, "status || '|' || coordinator_id"), format!("running|{to}"));
    (job.to_owned(), to.to_owned())
}

#[test]
fn a_node_that_comes_is_given_spans_and_one_that_goes_is_done_without() {
    let mut fleet = Fleet::start(&ONE_SHARD);
    let s3 = S3::start();
    let door = s3.watched();
    let mut matching = BTreeSet::new();
    for (collection, goes) in [("comes", None), ("drained", Some(Signal::SIGTERM)), ("dies", Some(Signal::SIGKILL))] {
        // At the beginning nodes 3 and 4 match, and node 3 reads its own server.
        fleet.end_node(5, Signal::SIGTERM);
        matching.extend([3, 4].map(|node| fleet.pid(node).as_raw()));
        let uri = format!(
            "s3://bucket/{collection}?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
            door.address
        );
        let (job, coordinator) = moved_and_held(&fleet, &uri, WEST, "backup.after_first_span");
        assert_eq!(coordinator, "3");
        let before = finished(&fleet, &job);
        // Node 5 comes. Node 4 goes with spans that it has begun and spans that it has not.
        fleet.start_node(5);
        fleet.until_all_live();
        if let Some(signal) = goes {
            fleet.end_node(4, signal);
        }
        fleet.let_go(&job, "backup.after_first_span");
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()), "{collection}");
        matching.insert(fleet.pid(5).as_raw());
        let manifest = sealed(&s3, collection);
        // What was finished by then is in the backup as it was.
        let paths =
            manifest["shards"][0]["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap());
        let paths: BTreeSet<String> = paths.map(str::to_owned).collect();
        assert!(!before.is_empty() && before.is_subset(&paths), "{collection}: {before:?} of {paths:?}");
        let (writers, rides) = writers_and_rides(&manifest);
        assert!(writers.contains(&5) && writers.is_subset(&BTreeSet::from([3, 4, 5])), "{collection}: {writers:?}");
        // Whatever was begun twice is in the backup once, and the job was not begun anew for it.
        assert_eq!((rides.to_string().as_str(), fleet.job(&job, "num_runs").as_str()), (ONE_SHARD[7], "1"));
        assert_eq!(door.visitors().difference(&matching).count(), 0, "who came to the store");
        if goes.is_some() {
            fleet.start_node(4);
            fleet.until_all_live();
        }
    }
}

#[test]
fn the_coordinator_holds_a_replica_and_among_equals_has_the_fewest_jobs() {
    let fleet = Fleet::start(&ONE_SHARD);
    let mut jobs = Vec::new();
    for (filter, coordinator) in [(WEST, "3"), (WEST, "3"), (FILTER, "4"), (FILTER, "5"), (FILTER, "4")] {
        let name = jobs.len();
        let uri = format!("nodelocal://1/c{name}");
        let (job, to) = moved_and_held(&fleet, &uri, filter, "backup.after_lock");
        assert_eq!(to, coordinator, "job {name} with {filter}");
        jobs.push(job);
    }
    for job in jobs {
        fleet.let_go(&job, "backup.after_lock");
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    }
}

/// Its session lives on, for as long as nobody may take over from it.
#[test]
fn a_node_that_is_gone_coordinates_nothing_though_its_session_lives() {
    let mut fleet = Fleet::start(&[&ONE_SHARD[..6], &["--rows", "100"]].concat());
    fleet.demo.set_session_life(Duration::from_secs(300));
    fleet.end_node(4, Signal::SIGKILL);
    until("node 1 to know", || {
        let nodes = fleet.demo.ask(1, "SHOW NODES");
        let gone = nodes.lines().find(|row| row.starts_with("4|")).is_some_and(|row| row.contains("|t|f|"));
        if gone { Ok(()) } else { Err(nodes) }
    });
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {FILTER}");
    let plan = fleet.demo.ask(1, &format!("EXPLAIN {statement}"));
    assert!(plan.starts_with("coordinator: node 5 ") && plan.contains("left out: node 4 "), "{plan}");
    let told = fleet.demo.ask(1, &statement);
    let (job, to) = relocated(&told);
    assert_eq!(to, "5", "{told}");
    // A job ends when none of its filter's nodes can be at work for it any more.
    fleet.start_node(4);
    assert_eq!(fleet.end_of(job), ("succeeded".to_owned(), String::new()));
}

/// The node that a plan names as the coordinator, and why.
#[track_caller]
fn named(fleet: &Fleet, statement: &str) -> (String, String) {
    let plan = fleet.demo.ask(1, &format!("EXPLAIN {statement}"));
    let mut lines = plan.lines();
    let node = lines.next().and_then(|line| line.strip_prefix("coordinator: node ")).expect(&plan);
    let why = lines.next().and_then(|line| line.trim().strip_prefix("why: ")).expect(&plan);
    (node.split(' ').next().unwrap().to_owned(), why.to_owned())
}

/// Who looks first is chance; that each of a row of jobs is with the one that was named before is not, because whom that
/// is changes from job to job.
#[test]
fn a_detached_job_is_coordinated_by_the_node_that_explain_named_whoever_claims_it_first() {
    let fleet = Fleet::start(&[&ONE_SHARD[..6], &["--rows", "500"]].concat());
    let point = "backup.after_lock";
    let idle = "of the nodes that match, it coordinates the fewest jobs";
    let beside = "of the nodes that match, it holds a replica, and of those coordinates the fewest jobs";
    let mut jobs: Vec<String> = Vec::new();
    for (filter, coordinator, why) in [
        // Any node matches, and three hold a replica.
        ("", "1", beside),
        ("", "2", beside),
        ("", "3", beside),
        ("", "1", beside),
        (FILTER, "4", idle),
        (FILTER, "5", idle),
        (FILTER, "4", idle),
        (FILTER, "5", idle),
        // A replica weighs more than jobs do.
        (WEST, "3", beside),
        (WEST, "3", beside),
    ] {
        let options = if filter.is_empty() { "DETACHED".to_owned() } else { format!("{filter}, DETACHED") };
        let number = jobs.len();
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/d{number}' WITH {options}");
        assert_eq!(named(&fleet, &statement), (coordinator.to_owned(), why.to_owned()), "job {number}");
        let job = fleet.held(&statement, point);
        assert_eq!(fleet.job(&job, "coordinator_id || '|' || num_runs"), format!("{coordinator}|1"), "job {number}");
        jobs.push(job);
    }
    let end = |job: &str, runs: &str| {
        fleet.let_go(job, point);
        assert_eq!(fleet.end_of(job), ("succeeded".to_owned(), String::new()));
        // It was not begun by anybody else on the way.
        assert_eq!(fleet.job(job, "num_runs || '|' || cardinality(execution_errors)"), format!("{runs}|0"));
    };
    // When node 5 has nothing more to do, a job that was paused on node 4 goes on there.
    let resumed = jobs.remove(6);
    jobs.drain(5..7).for_each(|job| end(&job, "1"));
    assert_eq!(fleet.demo.ask(1, &format!("PAUSE JOB {resumed}")), "PAUSE JOBS 1");
    until("the job to be paused", || {
        let seen = fleet.job(&resumed, "status");
        if seen == "paused" { Ok(()) } else { Err(seen) }
    });
    assert_eq!(fleet.demo.ask(1, &format!("RESUME JOB {resumed}")), "RESUME JOBS 1");
    until("the job to be begun again", || {
        let seen = fleet.job(&resumed, "coordinator_id || '|' || num_runs");
        if seen == "5|2" { Ok(()) } else { Err(seen) }
    });
    end(&resumed, "2");
    jobs.iter().for_each(|job| end(job, "1"));
}

/// When a node comes back that matches.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Back {
    InTime,
    ToRemove,
    Never,
}

#[test]
fn a_job_that_no_node_matches_any_more_waits_for_one_and_then_fails_in_the_original_s_words() {
    let mut fleet = Fleet::mortal(&["--rows", "500"]);
    for back in [Back::InTime, Back::ToRemove, Back::Never] {
        let name = format!("{back:?}");
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/{name}' WITH {WEST}, DETACHED");
        let job = fleet.held(&statement, "backup.after_lock");
        // First the one that is not its coordinator, so that nobody takes over.
        let coordinator: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
        for node in [7 - coordinator, coordinator] {
            fleet.end_node(node, Signal::SIGKILL);
        }
        let mut tries = BTreeSet::new();
        until("the job to be tried again and again", || {
            let seen = fleet.job(&job, "concat_ws('|', status, running_status, next_run)");
            if seen.starts_with("running|waiting for a node that matches the locality filter|") {
                tries.insert(seen.clone());
            }
            if tries.len() > 2 { Ok(()) } else { Err(seen) }
        });
        fleet.let_go(&job, "backup.after_lock");
        if back == Back::InTime {
            fleet.start_node(4);
            assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
            assert_eq!(fleet.job(&job, "coordinator_id"), "4");
            fleet.start_node(3);
            fleet.until_all_live();
            continue;
        }
        // As if it had waited for its minute.
        let aged = "unmatched_since = unmatched_since - interval '1 minute'";
        until("the job to be seen between two tries", || {
            let statement = format!(
                "UPDATE registry.jobs SET {aged} WHERE id = {job} AND unmatched_since IS NOT NULL AND claim_id IS NULL RETURNING 'aged'"
            );
            let seen = fleet.registry(&statement);
            if seen == "aged" { Ok(()) } else { Err(seen) }
        });
        // The store is for nodes that match: what is there is removed by one that comes back.
        let nobody = "no instances found matching locality filter region=us-west-1";
        let not_yet = format!("reverting|what the job has made is not removed yet: {nobody}|f");
        until("the removal to be put off", || {
            let seen = fleet.job(&job, "concat_ws('|', status, running_status, next_run IS NULL)");
            if seen == not_yet { Ok(()) } else { Err(seen) }
        });
        let files = |fleet: &Fleet| files_in(&fleet.demo.node_dir(1).join("extern").join(&name)).len();
        assert_eq!(files(&fleet), 1);
        match back {
            Back::ToRemove => fleet.start_node(4),
            // As if it had been tried for a day.
            _ => drop(fleet.registry(&format!(
                "UPDATE registry.jobs SET reverting_since = reverting_since - interval '1 day', next_run = NULL WHERE id = {job}"
            ))),
        }
        let (status, error) = fleet.end_of(&job);
        assert_eq!(status, "failed");
        // G16. Its second text no client can be told: a coordinator that lives matches, and so has itself to work with. What
        // would be said if it had not is a test of `crates/backup/src/deal.rs`.
        assert!(error.starts_with(nobody), "{error}");
        if back == Back::ToRemove {
            assert_eq!((files(&fleet), fleet.job(&job, "execution_errors::text").as_str()), (0, "{}"));
            fleet.start_node(3);
            fleet.until_all_live();
            continue;
        }
        let row = fleet.demo.ask(2, &format!("SHOW JOB WHEN COMPLETE {job}"));
        assert!(row.contains("|failed|") && row.contains(&error), "{row}");
        // What is there stays, and the job says it.
        assert!(row.contains("what the job has made was not all removed"), "{row}");
        // Nobody is asked to run a new one, either.
        let told = fleet.demo.ask(1, &statement);
        assert!(told.starts_with("ERROR:  XXUUU: no instances found matching locality filter"), "{told}");
    }
}

#[test]
fn a_frozen_server_is_left_for_another_replica() {
    let fleet = Fleet::start(&ONE_SHARD);
    for point in ["backup.after_points", "backup.after_first_span"] {
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/{point}' WITH {WEST}, DETACHED");
        let job = fleet.held(&statement, point);
        fleet.demo.signal_server(3, Signal::SIGSTOP);
        fleet.let_go(&job, point);
        let ended = fleet.end_of(&job);
        fleet.demo.signal_server(3, Signal::SIGCONT);
        assert_eq!(ended, ("succeeded".to_owned(), String::new()), "{point}");
        assert!(fleet.job(&job, "execution_errors::text").contains("the server beside node 3 was lost"), "{point}");
        let backup = LocalBackup::newest(&[fleet.demo.node_dir(1).join("extern")], point);
        assert_ne!(backup.manifest["shards"][0]["read_from"], 3, "{point}");
        assert_eq!(backup.rows("rides").len().to_string(), ONE_SHARD[7]);
        until_thawed(&fleet, &statement);
    }
}

/// What the server beside node 3 was about to do for a job when it froze ends when it goes on, and it is read again.
#[track_caller]
fn until_thawed(fleet: &Fleet, statement: &str) {
    until("nothing to be held or paused, and the server to be read again", || {
        let left = "SELECT count(*) FILTER (WHERE state LIKE 'idle in transaction%'
                           OR application_name LIKE 'backhaul job%'), pg_is_wal_replay_paused() FROM pg_stat_activity";
        let left = both(&fleet.demo.psql_direct(3).args(["-Atc", left]).output().unwrap());
        let plan = fleet.demo.ask(1, &format!("EXPLAIN {statement}"));
        if left.trim() == "0|f" && plan.contains("read: node 3") { Ok(()) } else { Err(format!("{left}{plan}")) }
    });
}

#[test]
fn a_server_that_freezes_while_its_point_is_taken_is_left_for_another() {
    let fleet = Fleet::start(&ONE_SHARD);
    let on = |number: usize, text: &str| {
        let url = fleet.demo.direct_url(number).replace("/movr?", "/postgres?");
        run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atqc", text])).trim().to_owned()
    };
    // Where replay may not be paused, the point waits for a lock that is being replayed.
    on(1, "REVOKE EXECUTE ON FUNCTION pg_wal_replay_pause() FROM backhaul");
    until("the standby to have lost the right", || {
        let seen = on(3, "SELECT has_function_privilege('backhaul', 'pg_wal_replay_pause()', 'EXECUTE')");
        if seen == "f" { Ok(()) } else { Err(seen) }
    });
    let lock = "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(600)";
    let mut holder = psql(&fleet.demo.direct_url(1));
    let mut holder = holder.args(["-qc", lock]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let waiting = |who: &str| format!("SELECT count(*) FROM pg_stat_activity WHERE {who}");
    until("the lock", || {
        let seen = on(1, &waiting("query LIKE '%pg_sleep(600)' AND wait_event = 'PgSleep'"));
        if seen == "1" { Ok(()) } else { Err(seen) }
    });
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, DETACHED");
    let job = fleet.demo.ask(2, &statement);
    until("the point to be waiting for the lock", || {
        let seen = on(3, &waiting("wait_event_type = 'Lock' AND application_name LIKE 'backhaul%'"));
        if seen == "0" { Err(fleet.demo.ask(1, &format!("SHOW JOB {job}"))) } else { Ok(()) }
    });
    fleet.demo.signal_server(3, Signal::SIGSTOP);
    on(1, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'");
    holder.wait().unwrap();
    let ended = fleet.end_of(&job);
    fleet.demo.signal_server(3, Signal::SIGCONT);
    assert_eq!(ended, ("succeeded".to_owned(), String::new()));
    let noted = fleet.job(&job, "execution_errors::text");
    assert!(noted.contains("the server beside node 3 was lost while a point was taken of it"), "{noted}");
    let backup = LocalBackup::newest(&[fleet.demo.node_dir(1).join("extern")], "b");
    assert_ne!(backup.manifest["shards"][0]["read_from"], 3);
    assert_eq!(backup.rows("rides").len().to_string(), ONE_SHARD[7]);
    until_thawed(&fleet, &statement);
}

#[test]
fn a_server_that_is_silent_for_a_moment_keeps_its_point() {
    let fleet = Fleet::start(&ONE_SHARD);
    let s3 = S3::start();
    let door = s3.failing();
    // How long the moment is depends on the machine, too: one that does not cost the point is enough.
    let is_kept = (1..=3).any(|number| {
        let collection = format!("silent{number}");
        let uri = format!(
            "s3://bucket/{collection}?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
            door.address
        );
        let statement = format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}, DETACHED");
        let job = fleet.held(&statement, "backup.after_schemas");
        let coordinator: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
        // Whether the server's node sees it is what the coordinator has heard: a server that does not answer has no position.
        let until_seen = |is_silent: bool| {
            until("the coordinator to know", || {
                let nodes = fleet.demo.ask(coordinator, "SHOW NODES");
                let row = nodes.lines().find(|row| row.starts_with("3|")).unwrap_or_default();
                if row.ends_with("||") == is_silent { Ok(()) } else { Err(nodes) }
            });
        };
        // The spans wait for the store, while they are watched.
        door.fail(Trouble::Hangs, usize::MAX);
        fleet.let_go(&job, "backup.after_schemas");
        fleet.demo.signal_server(3, Signal::SIGSTOP);
        until_seen(true);
        fleet.demo.signal_server(3, Signal::SIGCONT);
        until_seen(false);
        door.heal();
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
        let (_, rides) = writers_and_rides(&sealed(&s3, &collection));
        assert_eq!(rides.to_string(), ONE_SHARD[7]);
        let noted = fleet.job(&job, "execution_errors::text");
        let is_kept = !noted.contains("was lost");
        assert_eq!(is_kept, sealed(&s3, &collection)["shards"][0]["read_from"] == 3, "{noted}");
        is_kept
    });
    assert!(is_kept, "the point was given up each time");
}

#[test]
fn a_target_that_freezes_while_it_is_restored_to_is_left_for_the_one_that_leads_then() {
    let fleet = Fleet::start(&TWO_SHARDS);
    let made = fleet.demo.ask(1, &format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {FILTER}, DETACHED"));
    assert_eq!(fleet.end_of(&made).0, "succeeded");
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/b' WITH new_db_name = 'again', DETACHED";
    let job = fleet.held(restore, "restore.after_load");
    fleet.demo.signal_server(2, Signal::SIGSTOP);
    fleet.let_go(&job, "restore.after_load");
    // Its connections stay open, and what was asked has days to be answered.
    until("the target to be given up", || {
        let noted = fleet.job(&job, "execution_errors::text");
        if noted.contains(r#"shard \"s2\" cannot be reached"#) || noted.contains("the server beside node 2 was lost") {
            Ok(())
        } else {
            Err(fleet.demo.ask(1, &format!("SHOW JOB {job}")))
        }
    });
    fleet.demo.promote(4);
    let ended = fleet.end_of(&job);
    fleet.demo.signal_server(2, Signal::SIGCONT);
    assert_eq!(ended, ("succeeded".to_owned(), String::new()));
    for gateway in [1, 4] {
        let sum = "SELECT count(*), sum(hashtext(rides::text)) FROM rides";
        assert_eq!(fleet.on(gateway, "again", sum), fleet.on(gateway, "movr", sum));
    }
}
