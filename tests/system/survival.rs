//! Jobs outlive what they run on: nodes that are stopped in turn, and a registry that moves.

use nix::sys::signal::{Signal, kill};

use crate::crash::{FILTER, ONE_SHARD};
use crate::outages::{told, waiting_at};
use crate::support::demo::psql;
use crate::support::faults::{Fleet, Trouble};
use crate::support::store::{LocalBackup, S3, files_in};
use crate::support::{run, until};

const WEST: &str = "EXECUTION LOCALITY = 'region=us-west-1'";

/// Where a job is held while a node is restarted, one place for each of them.
const BACKUP_PLACES: [&str; 4] =
    ["backup.after_lock", "backup.after_points", "backup.after_schemas", "backup.after_first_span"];
const RESTORE_PLACES: [&str; 4] =
    ["restore.after_create", "restore.after_first_file", "restore.after_load", "restore.after_finish"];

/// Restarts every node while a job runs.
#[track_caller]
fn roll(fleet: &mut Fleet, statement: &str, places: [&str; 4]) {
    let holds = places.map(|place| format!("{place}:hold")).join(",");
    let set = format!("SET backhaul.debug_pausepoints = '{holds}'");
    let job = run(fleet.demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-Atqc", &set, "-c", statement]));
    let job = job.trim();
    for (node, place) in (1..).zip(places) {
        fleet.until_held(job, place);
        fleet.end_node(node, Signal::SIGTERM);
        // Replication does not run through the port: users commit while any node is away.
        let commit = "SET statement_timeout = '10s'; CREATE TABLE t (); DROP TABLE t";
        let other = fleet.demo.direct_url(1).replace("/movr?", "/other?");
        run(psql(&other).args(["-v", "ON_ERROR_STOP=1", "-qc", commit]));
        fleet.start_node(node);
        fleet.until_all_live();
        fleet.let_go(job, place);
    }
    fleet.registry(&format!("UPDATE registry.jobs SET pausepoints = '{{}}' WHERE id = {job}"));
    assert_eq!(fleet.end_of(job), ("succeeded".to_owned(), String::new()));
}

#[test]
fn a_rolling_restart_fails_no_job_and_holds_up_no_commit() {
    let mut fleet = Fleet::start(&["--rows", "20000"]);
    run(fleet.demo.psql_direct(1).args(["-c", "CREATE DATABASE other"]));
    roll(&mut fleet, &format!("BACKUP DATABASE movr INTO 'nodelocal://1/r' WITH {WEST}, DETACHED"), BACKUP_PLACES);
    let backup = LocalBackup::newest(&[fleet.demo.node_dir(1).join("extern")], "r");
    assert_eq!(backup.rows("rides").len(), 20000);
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/r' WITH new_db_name = 'again', DETACHED";
    roll(&mut fleet, restore, RESTORE_PLACES);
    let sum = "SELECT count(*), sum(hashtext(rides::text)) FROM rides";
    assert_eq!(fleet.on(1, "again", sum), fleet.on(1, "movr", sum));
}

#[test]
fn a_paused_backup_goes_on_elsewhere_at_its_point_with_what_is_missing() {
    let mut fleet = Fleet::mortal(&ONE_SHARD);
    let set = "SET backhaul.debug_pausepoints = 'backup.after_first_span'";
    let backup = format!("BACKUP DATABASE movr INTO 'nodelocal://1/p' WITH {FILTER}, DETACHED");
    let job = run(fleet.demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-Atqc", set, "-c", &backup]));
    let job = job.trim();
    until("the job to be paused", || {
        let seen = fleet.job(job, "status");
        if seen == "paused" { Ok(()) } else { Err(seen) }
    });
    let kept = |fleet: &Fleet, key: &str, path: &str| {
        fleet.registry(&format!("SELECT value #>> '{{{path}}}' FROM registry.job_info WHERE job_id = {job} AND key LIKE '{key}' ORDER BY key LIMIT 1"))
    };
    let (lease, file) = (kept(&fleet, "point/s1", "lease"), kept(&fleet, "span/%", "file,path"));
    assert!(!lease.is_empty() && file.starts_with("data/"), "{lease} {file}");
    // Whoever ran it is gone, without having said so; the founders are on a third node.
    let before: usize = fleet.job(job, "coordinator_id").parse().unwrap();
    fleet.end_node(before, Signal::SIGKILL);
    until_without_session(&fleet, before);
    assert_eq!(fleet.demo.ask(1, &format!("RESUME JOB {job}")), "RESUME JOBS 1");
    assert_eq!(fleet.end_of(job), ("succeeded".to_owned(), String::new()));
    assert_eq!((kept(&fleet, "point/s1", "lease"), fleet.job(job, "num_runs")), (lease, "2".to_owned()));
    let after: usize = fleet.job(job, "coordinator_id").parse().unwrap();
    assert!([4, 5].contains(&after) && after != before, "{before}, then {after}");
    let backup = LocalBackup::newest(&[fleet.demo.node_dir(1).join("extern")], "p");
    assert!(backup.manifest.to_string().contains(&file), "what was finished is not done again");
    assert_eq!(backup.rows("rides").len(), 30000);
}

#[track_caller]
fn until_without_session(fleet: &Fleet, node: usize) {
    until("its session to end", || {
        let ended = format!("SELECT expires_at < clock_timestamp() FROM registry.sessions WHERE node_id = {node}");
        let seen = fleet.registry(&ended);
        if seen == "t" { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn a_cancelled_backup_is_removed_although_its_store_is_away_and_its_coordinator_dies() {
    let (layout, _rows) = ONE_SHARD.split_at(6);
    let mut fleet = Fleet::mortal(&[layout, &["--rows", "2000"]].concat());
    let s3 = S3::start();
    let door = s3.failing();
    let backup = format!(
        "BACKUP DATABASE movr INTO 's3://bucket/r?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}' WITH {FILTER}, DETACHED",
        door.address
    );
    let job = fleet.held(&backup, "backup.after_export");
    assert!(s3.keys("r/").iter().any(|key| key.contains("/data/")));
    door.fail(Trouble::Refuses, usize::MAX);
    assert_eq!(fleet.demo.ask(1, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    let first: usize = until("a node to try to remove the files", || {
        let seen = fleet.job(&job, "status || ' ' || coordinator_id");
        let node = seen.strip_prefix("reverting ").ok_or_else(|| seen.clone())?;
        let log = std::fs::read_to_string(fleet.demo.node_dir(node.parse().unwrap()).join("node.log")).unwrap();
        let tried = log.contains("what the job has made is not removed yet");
        if tried { Ok(node.parse().unwrap()) } else { Err(log) }
    });
    fleet.end_node(first, Signal::SIGKILL);
    // n4 and n5 match.
    let second = 9 - first;
    until("the other node to go on with it", || {
        let seen = fleet.job(&job, "status || ' ' || coordinator_id");
        if seen == format!("reverting {second}") { Ok(()) } else { Err(seen) }
    });
    assert!(s3.keys("r/").iter().any(|key| key.contains("/data/")), "nobody could remove anything yet");
    door.heal();
    assert_eq!(fleet.end_of(&job), ("canceled".to_owned(), "job canceled by user".to_owned()));
    assert_eq!(fleet.job(&job, "coordinator_id"), second.to_string());
    assert_eq!(s3.keys("r/"), [""; 0]);
    assert_eq!(fleet.job(&job, "cardinality(execution_errors)"), "0", "nothing was left behind");
}

#[test]
fn a_client_that_waits_on_a_stopped_node_is_told_how_to_go_on() {
    let mut fleet = Fleet::start(&["--rows", "2000"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/w' WITH {WEST}, DETACHED");
    let job = fleet.held(&statement, "backup.after_export");
    let coordinator: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
    let client = waiting_at(&fleet, coordinator, "", "", &format!("SHOW JOB WHEN COMPLETE {job}"));
    fleet.end_node(coordinator, Signal::SIGTERM);
    let said = told(client);
    assert!(said.contains("FATAL:  57P01: terminating connection due to administrator command"), "{said}");
    assert!(
        said.contains("HINT:  The node is being stopped, and a job goes on elsewhere: connect to another"),
        "{said}"
    );
    assert!(said.contains("find it with SHOW JOBS and wait with SHOW JOB WHEN COMPLETE."), "{said}");
    fleet.let_go(&job, "backup.after_export");
    assert_eq!(fleet.end_of(&job).0, "succeeded");
    assert_ne!(fleet.job(&job, "coordinator_id"), coordinator.to_string());
    let log = std::fs::read_to_string(fleet.demo.node_dir(coordinator).join("node.log")).unwrap();
    // It is handed over also by a node that has no time to stop it first.
    let words = ["jobs are handed over jobs=1", "jobs are handed over while they still stop here"];
    assert!(words.iter().any(|words| log.contains(words)), "{log}");
}

/// Their sessions lead to the leaseholder's server, through the node beside it.
#[test]
fn a_client_that_waits_and_loses_its_session_is_told_how_to_go_on() {
    let mut fleet = Fleet::start(&["--voters", "1", "--rows", "500"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://2/w' WITH {WEST}, DETACHED");
    let held = |fleet: &Fleet| {
        let job = fleet.held(&statement, "backup.after_export");
        let waits = format!("SHOW JOB WHEN COMPLETE {job}");
        (job, waits)
    };
    let (job, waits) = held(&fleet);
    let way_on = "A job goes on: find it with SHOW JOBS and wait with SHOW JOB WHEN COMPLETE.";
    let client = waiting_at(&fleet, 3, "", "", &waits);
    fleet.end_node(1, Signal::SIGTERM);
    let said = told(client);
    assert!(said.contains("FATAL:  08006: the connection to the server beside node 1 was lost"), "{said}");
    let hint = "HINT:  Connect again; whether the last transaction was committed is not known.";
    assert!(said.contains(&format!("{hint} {way_on}")), "{said}");
    fleet.start_node(1);
    fleet.until_all_live();
    // Held or not: it may have been begun again when it lost the registry.
    fleet.let_go(&job, "backup.after_export");
    assert_eq!(fleet.end_of(&job).0, "succeeded");

    let (job, waits) = held(&fleet);
    // Node 3 may hear of the new leaseholder from node 2, or see that node 1, which has, lets its session go.
    let client = waiting_at(&fleet, 3, "", "", &waits);
    fleet.demo.promote(2);
    let said = told(client);
    assert!(said.contains("FATAL:  57P01: ") || said.contains("FATAL:  08006: "), "{said}");
    assert!(said.contains(way_on), "{said}");
    until("the job to be let go on the registry's new server", || {
        fleet.let_go(&job, "backup.after_export");
        let seen = fleet.registry(&format!("SELECT finished IS NOT NULL FROM registry.jobs WHERE id = {job}"));
        if seen == "t" { Ok(()) } else { Err(seen) }
    });
    assert_eq!(fleet.end_of(&job).0, "succeeded");
    let waited = fleet.demo.ask(3, &waits);
    assert!(waited.contains("|succeeded|"), "{waited}");
}

#[test]
fn claims_of_the_dead_are_left_alone_until_a_new_registry_has_settled() {
    let fleet = Fleet::mortal(&["--rows", "2000"]);
    let backup = |name: &str| format!("BACKUP DATABASE movr INTO 'nodelocal://1/{name}' WITH {WEST}, DETACHED");
    let job = fleet.held(&backup("a"), "backup.after_lock");
    let coordinator: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
    fleet.registry("UPDATE registry.incarnations SET since = clock_timestamp() + interval '1 hour'");
    fleet.signal(coordinator, Signal::SIGKILL);
    until_without_session(&fleet, coordinator);
    // What nobody has claimed is taken as ever, so rows are looked at; the claim of the dead stays.
    let other = fleet.demo.ask(1, &backup("b"));
    assert_eq!(fleet.end_of(&other).0, "succeeded");
    assert_eq!(fleet.job(&job, "coordinator_id"), coordinator.to_string());
    fleet.let_go(&job, "backup.after_lock");
    fleet.registry("UPDATE registry.incarnations SET since = clock_timestamp() - interval '1 hour'");
    assert_eq!(fleet.end_of(&job).0, "succeeded");
}

#[test]
fn a_job_whose_row_was_lost_with_the_registry_s_server_is_reported() {
    let fleet = Fleet::mortal(&["--voters", "1", "--rows", "2000"]);
    fleet.cut_off(2);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/lost' WITH {WEST}, DETACHED");
    let job = fleet.held(&statement, "backup.after_lock");
    let coordinator: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
    kill(fleet.demo.server_pid(1), Signal::SIGKILL).unwrap();
    fleet.demo.promote(2);
    until("the gateway to report it", || {
        let seen = fleet.demo.ask(1, &format!("SHOW JOB {job}"));
        let told = seen.starts_with(&format!("ERROR:  XXUUU: job {job} could not be loaded"))
            && seen.contains("HINT:  The job may not have succeeded.");
        if told { Ok(()) } else { Err(seen) }
    });
    let log = |node: usize| std::fs::read_to_string(fleet.demo.node_dir(node).join("node.log")).unwrap();
    until("the log to say so", || match log(1) {
        said if said.contains("job was lost with the server that held the registry") => Ok(()),
        said => Err(said),
    });
    // Who ran it stops, by whichever it notices first: that the row is gone, or that its session went with the server. And
    // what it would have sealed is not.
    let stops = ["job is somebody else's now", "this node's session has ended; it stops the job"];
    until("the coordinator to stop", || match log(coordinator) {
        said if stops.iter().any(|line| said.contains(line)) => Ok(()),
        said => Err(said),
    });
    let seals = files_in(&fleet.demo.node_dir(1).join("extern"))
        .iter()
        .filter(|file| file.ends_with("BACKUP_MANIFEST"))
        .count();
    assert_eq!(seals, 0);
}

#[test]
fn a_backup_in_the_nodes_own_directories_is_sealed_once_and_stays_whole() {
    let mut fleet = Fleet::start(&["--rows", "2000"]);
    for point in ["backup.after_record", "backup.after_seal", "backup.after_latest"] {
        let uri = format!("nodelocal://self/{point}");
        let job = fleet.held(&format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}, DETACHED"), point);
        let coordinator: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
        // Somebody else goes on, and the manifest is in the directory of the one that is gone.
        fleet.end_node(coordinator, Signal::SIGTERM);
        until("another node to have the job", || {
            let seen = fleet.job(&job, "coordinator_id");
            if seen == coordinator.to_string() { Err(seen) } else { Ok(()) }
        });
        fleet.start_node(coordinator);
        fleet.until_all_live();
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()), "{point}");
        let directories = (1..=4).flat_map(|node| files_in(&fleet.demo.node_dir(node).join("extern").join(point)));
        assert_eq!(directories.filter(|file| file.ends_with("BACKUP_MANIFEST")).count(), 1, "{point}");
        let shown = fleet.demo.ask(1, &format!("SHOW BACKUP FROM LATEST IN '{uri}' WITH check_files"));
        assert!(shown.contains("movr|public|rides|table|full|"), "{shown}");
    }
}

#[test]
fn behind_the_seal_a_store_is_waited_for_and_what_it_refuses_is_no_failure() {
    let mut fleet = Fleet::mortal(&["--rows", "500"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://2/s' WITH {WEST}, DETACHED");
    let job = fleet.held(&statement, "backup.after_seal");
    fleet.end_node(2, Signal::SIGKILL);
    fleet.let_go(&job, "backup.after_seal");
    until("the job to be tried again", || {
        let seen = fleet.job(&job, "status || ' ' || execution_errors::text");
        if seen.contains("running") && seen.contains("nodelocal://2/s") { Ok(()) } else { Err(seen) }
    });
    fleet.start_node(2);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    assert!(fleet.demo.ask(1, "SHOW BACKUPS IN 'nodelocal://2/s'").starts_with("/20"));

    let job = fleet.held(&statement, "backup.after_seal");
    // Where the pointer to the newest goes, there is a file in the way.
    let pointers = fleet.demo.node_dir(2).join("extern/s/metadata");
    std::fs::rename(&pointers, pointers.with_file_name("aside")).unwrap();
    std::fs::write(&pointers, "").unwrap();
    fleet.let_go(&job, "backup.after_seal");
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let noted = fleet.job(&job, "execution_errors::text");
    assert!(noted.contains("the store at nodelocal://2/s"), "{noted}");
    std::fs::remove_file(&pointers).unwrap();
    std::fs::rename(pointers.with_file_name("aside"), &pointers).unwrap();
    // It has its name, and is whole.
    assert_eq!(fleet.demo.ask(1, "SHOW BACKUPS IN 'nodelocal://2/s'").lines().count(), 1);
    let subdir = fleet.job(&job, "payload ->> 'subdir'");
    let shown = fleet.demo.ask(1, &format!("SHOW BACKUP FROM '{subdir}' IN 'nodelocal://2/s' WITH check_files"));
    assert!(shown.contains("movr|public|rides|table|full|"), "{shown}");
}

#[test]
fn what_is_being_removed_is_not_found_whole_again() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/l' WITH {WEST}, DETACHED");
    let job = fleet.held(&statement, "backup.after_seal");
    // As if the seal had come out of a request that was under way when the removal had begun.
    fleet.registry(&format!("INSERT INTO registry.job_info (job_id, key, value) VALUES ({job}, 'removing', 'true')"));
    assert_eq!(fleet.demo.ask(2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    assert_eq!(fleet.end_of(&job), ("canceled".to_owned(), "job canceled by user".to_owned()));
    let left = files_in(&fleet.demo.node_dir(1).join("extern"));
    assert!(left.is_empty(), "{left:?}");
}
