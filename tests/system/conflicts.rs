//! A long read on a standby, and VACUUM or DDL on the primary that removes what it reads: in mode `feedback` it is not
//! removed; in `retry` replay ends the founders, and the job goes on at another point; in `paused` replay stands, and
//! goes on when the job has ended, however that was, or when a limit is passed.

use nix::sys::signal::Signal;

use crate::support::demo::Demo;
use crate::support::faults::Fleet;
use crate::support::jobs::extern_dirs;
use crate::support::store::LocalBackup;
use crate::support::{both, run, until};

const HELD: &str = "backup.after_points";

/// On the server beside node `number` itself.
#[track_caller]
fn on_server(demo: &Demo, number: usize, statement: &str) -> String {
    run(demo.psql_direct(number).args(["-v", "ON_ERROR_STOP=1", "-Atqc", statement])).trim().to_owned()
}

#[track_caller]
fn until_on(demo: &Demo, number: usize, query: &str, expected: &str) {
    until(query, || {
        let seen = both(&demo.psql_direct(number).args(["-Atqc", query]).output().unwrap()).trim().to_owned();
        if seen == expected { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn what_vacuum_removes_costs_a_point_without_feedback_and_nothing_with_it() {
    let fleet = Fleet::start(&["--rows", "2000"]);
    let demo = &fleet.demo;
    let statement = &statement();
    // Without feedback it would be paused.
    let set = |mode: &str| format!("SET backhaul.backup.standby_mode = '{mode}'");
    // Only the server that is read has a say in what VACUUM may remove.
    on_server(demo, 2, "ALTER SYSTEM SET hot_standby_feedback = off");
    on_server(demo, 2, "SELECT pg_reload_conf()");
    on_server(demo, 3, "ALTER SYSTEM SET max_standby_streaming_delay = '100ms'");
    for (feedback, mode) in [("off", "conflicts: retry"), ("on", "conflicts: feedback")] {
        on_server(demo, 3, &format!("ALTER SYSTEM SET hot_standby_feedback = {feedback}"));
        on_server(demo, 3, "SELECT pg_reload_conf()");
        let holding = "SELECT count(*) FROM pg_replication_slots WHERE xmin IS NOT NULL";
        until_on(demo, 1, holding, if feedback == "on" { "1" } else { "0" });
        let wanted = set(if feedback == "on" { "auto" } else { "retry" });
        until_explained(&fleet, &wanted, mode);
        let before: usize = on_server(demo, 1, "SELECT count(*) FROM rides").parse().unwrap();
        let ended = "SELECT confl_snapshot FROM pg_stat_database_conflicts WHERE datname = 'movr'";
        let ended_before = on_server(demo, 3, ended);

        let job = fleet.held_after(&wanted, statement, HELD);
        on_server(demo, 1, "DELETE FROM rides WHERE ctid IN (SELECT ctid FROM rides LIMIT 100)");
        on_server(demo, 1, "VACUUM rides");
        let position = on_server(demo, 1, "SELECT pg_current_wal_flush_lsn()");
        until_on(demo, 3, &format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"), "t");
        fleet.let_go(&job, HELD);

        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
        let errors = fleet.job(&job, "execution_errors::text");
        let rows = LocalBackup::newest(&extern_dirs(demo), "c").rows("rides").len();
        if feedback == "on" {
            assert_eq!((errors.as_str(), rows), ("{}", before), "the point is kept");
            assert_eq!(on_server(demo, 3, ended), ended_before);
        } else {
            assert!(errors.contains("is lost"), "{errors}");
            assert_eq!(rows, before - 100, "the other point is a later one");
        }
    }
}

const STATE: &str = "SELECT pg_get_wal_replay_pause_state()";
const WEST: &str = "EXECUTION LOCALITY = 'region=us-west-1', strict execution locality";
const PAUSED: &str = "conflicts: paused (no commit waits for it, and it may be paused";

/// A fleet whose standby in the west (n3) has no feedback and no patience, so that it is kept paused while it is read.
fn pausing() -> Fleet {
    let fleet = Fleet::mortal(&["--rows", "2000"]);
    for (number, setting) in [
        (2, "hot_standby_feedback = off"),
        (3, "hot_standby_feedback = off"),
        (3, "max_standby_streaming_delay = '100ms'"),
    ] {
        on_server(&fleet.demo, number, &format!("ALTER SYSTEM SET {setting}"));
        on_server(&fleet.demo, number, "SELECT pg_reload_conf()");
    }
    // Whatever room this machine has.
    fleet.demo.ask(1, "SET CLUSTER SETTING bulkio.backup.standby_free_space_floor = 0");
    until_explained(&fleet, "", PAUSED);
    fleet
}

fn statement() -> String {
    format!("BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH {WEST}, DETACHED")
}

#[track_caller]
fn until_explained(fleet: &Fleet, set: &str, words: &str) -> String {
    until(words, || {
        let explain = format!("EXPLAIN {}", statement());
        let plan = both(&fleet.demo.psql(1).args(["-Atq", "-c", set, "-c", &explain]).output().unwrap());
        if plan.contains(words) { Ok(plan) } else { Err(plan) }
    })
}

#[track_caller]
fn assert_still_paused(fleet: &Fleet, job: &str) {
    assert_eq!(on_server(&fleet.demo, 3, STATE), "paused", "{}", fleet.job(job, "execution_errors::text"));
}

#[test]
fn nothing_that_is_done_on_the_primary_disturbs_a_standby_that_is_paused() {
    let fleet = pausing();
    let demo = &fleet.demo;
    let before: usize = on_server(demo, 1, "SELECT count(*) FROM rides").parse().unwrap();
    let promised = on_server(demo, 1, "SELECT count(*) FROM promo_codes");
    assert_eq!(on_server(demo, 3, STATE), "not paused");
    let job = fleet.held(&statement(), HELD);
    assert_still_paused(&fleet, &job);
    for change in [
        "DELETE FROM rides WHERE ctid IN (SELECT ctid FROM rides LIMIT 100)",
        "VACUUM rides",
        "DROP TABLE promo_codes",
        "ALTER TABLE users ADD COLUMN disturbed int DEFAULT 1",
        "TRUNCATE app_log",
        "VACUUM FULL contracts",
    ] {
        on_server(demo, 1, change);
    }
    let position = on_server(demo, 1, "SELECT pg_current_wal_flush_lsn()");
    until_on(demo, 3, &format!("SELECT pg_last_wal_receive_lsn() >= '{position}'"), "t");
    // A second backup meanwhile takes its point where replay stands, and is done before the first one.
    let other = demo.ask(1, &statement().replace("/c'", "/other'"));
    assert_eq!(fleet.end_of(&other), ("succeeded".to_owned(), String::new()));
    assert_still_paused(&fleet, &job);
    fleet.let_go(&job, HELD);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    until_on(demo, 3, STATE, "not paused");
    until_on(demo, 3, &format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"), "t");

    assert_eq!(fleet.job(&job, "execution_errors::text"), "{}");
    for collection in ["c", "other"] {
        let backup = LocalBackup::newest(&extern_dirs(demo), collection);
        assert_eq!(
            (backup.rows("rides").len(), backup.rows("promo_codes").len().to_string()),
            (before, promised.clone())
        );
        assert_eq!(backup.manifest["shards"][0]["modes"]["3"]["mode"], "paused");
    }
}

#[test]
fn nothing_stays_paused_whatever_becomes_of_the_job() {
    let mut fleet = pausing();
    for end in ["cancelled", "failed", "frozen", "killed"] {
        // Below what may be set: a point that is too old when it is wanted.
        let age = if end == "failed" { "1" } else { "86400000" };
        fleet.registry(&format!(
            "INSERT INTO registry.settings (name, value) VALUES ('bulkio.backup.snapshot_age_limit', '{age}')
             ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        ));
        let job = fleet.held(&statement(), HELD);
        match end {
            "cancelled" => {
                assert_still_paused(&fleet, &job);
                assert_eq!(fleet.demo.ask(1, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
            }
            // Once the point was given up; then it is wanted.
            "failed" => {
                until_on(&fleet.demo, 3, STATE, "not paused");
                fleet.let_go(&job, HELD);
            }
            // What the operating system does to a node that is frozen: its connections stay.
            "frozen" => {
                assert_still_paused(&fleet, &job);
                fleet.signal(3, Signal::SIGSTOP);
            }
            _ => {
                assert_still_paused(&fleet, &job);
                fleet.end_node(3, Signal::SIGKILL);
            }
        }
        until_on(&fleet.demo, 3, STATE, "not paused");
        let expected = match end {
            "cancelled" => ("canceled", ""),
            "failed" => ("failed", "the backup's point has become too old"),
            _ => ("succeeded", ""),
        };
        match end {
            "frozen" => fleet.signal(3, Signal::SIGCONT),
            "killed" => fleet.start_node(3),
            _ => {}
        }
        if expected.0 == "succeeded" {
            fleet.let_go(&job, HELD);
        }
        let (status, error) = fleet.end_of(&job);
        assert!(status == expected.0 && error.starts_with(expected.1), "{end}: {status}: {error}");
        if status == "succeeded" {
            let backup = LocalBackup::newest(&extern_dirs(&fleet.demo), "c");
            let (made_by, shard) = (&backup.manifest["job"], &backup.manifest["shards"][0]);
            // Whatever was lost, the statement lets nothing else be read.
            assert_eq!((made_by.to_string(), &shard["read_from"]), (job, &3.into()), "{end}");
        }
        until_on(&fleet.demo, 3, STATE, "not paused");
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job%'";
        until_on(&fleet.demo, 3, sessions, "0");
        fleet.until_all_live();
        until_explained(&fleet, "", PAUSED);
    }
}

#[test]
fn beyond_a_limit_replay_goes_on_and_so_does_the_job() {
    let fleet = pausing();
    let demo = &fleet.demo;
    let before: usize = on_server(demo, 1, "SELECT count(*) FROM rides").parse().unwrap();
    demo.ask(1, "SET CLUSTER SETTING bulkio.backup.standby_wal_limit = '4MiB'");
    for conflict in [false, true] {
        until_explained(&fleet, "", "with 4.0 MiB of WAL to replay");
        let job = fleet.held(&statement(), HELD);
        assert_still_paused(&fleet, &job);
        if conflict {
            on_server(demo, 1, "DELETE FROM rides WHERE ctid IN (SELECT ctid FROM rides LIMIT 100)");
            on_server(demo, 1, "VACUUM rides");
        }
        on_server(demo, 1, "CREATE TABLE filler AS SELECT repeat('x', 1000) FROM generate_series(1, 10000)");
        on_server(demo, 1, "DROP TABLE filler");
        until_on(demo, 3, STATE, "not paused");
        let position = on_server(demo, 1, "SELECT pg_current_wal_flush_lsn()");
        until_on(demo, 3, &format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"), "t");
        fleet.let_go(&job, HELD);
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
        let errors = fleet.job(&job, "execution_errors::text");
        assert!(errors.contains("more than bulkio.backup.standby_wal_limit, which is 4194304"), "{errors}");
        let rows = LocalBackup::newest(&extern_dirs(demo), "c").rows("rides").len();
        assert_eq!(rows, if conflict { before - 100 } else { before }, "{errors}");
        assert!(!conflict || errors.contains("is lost"), "{errors}");
        until_on(demo, 3, STATE, "not paused");
    }
}

/// What is set for the fleet comes to the server that is read: how long it stands, what is left of its disk, and for how
/// many transactions its primary keeps dead rows.
#[test]
fn every_limit_of_the_fleet_holds_where_a_point_is_kept() {
    let fleet = pausing();
    let demo = &fleet.demo;
    // Below and above what may be set.
    let limit = |name: &str, value: u64| {
        fleet.registry(&format!(
            "INSERT INTO registry.settings (name, value) VALUES ('bulkio.backup.{name}', '{value}')
             ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        ))
    };
    limit("standby_pause_limit", 1500);
    let job = fleet.held(&statement(), HELD);
    until_on(demo, 3, STATE, "not paused");
    fleet.let_go(&job, HELD);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let errors = fleet.job(&job, "execution_errors::text");
    assert!(errors.contains("bulkio.backup.standby_pause_limit"), "{errors}");

    // No disk has so much.
    limit("standby_pause_limit", 1_800_000);
    limit("standby_free_space_floor", 1 << 60);
    until_explained(&fleet, "", "conflicts: retry");

    limit("xmin_age_limit", 50);
    let primary = format!(
        "BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH {}, DETACHED",
        "EXECUTION LOCALITY = 'zone=a,region=us-east-1'"
    );
    let job = fleet.held(&primary, HELD);
    let burn = "DO 'BEGIN FOR n IN 1..200 LOOP PERFORM txid_current(); COMMIT; END LOOP; END'";
    on_server(demo, 1, burn);
    let own = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job {job}%'");
    until_on(demo, 1, &own, "0");
    fleet.let_go(&job, HELD);
    let (status, error) = fleet.end_of(&job);
    assert!(status == "failed" && error.starts_with("the backup's point keeps too much"), "{status}: {error}");
}

#[test]
fn a_standby_that_would_wait_for_ever_for_a_backup_goes_on_when_too_much_waits() {
    let fleet = pausing();
    let demo = &fleet.demo;
    let before: usize = on_server(demo, 1, "SELECT count(*) FROM rides").parse().unwrap();
    demo.ask(1, "SET CLUSTER SETTING bulkio.backup.standby_wal_limit = '4MiB'");
    on_server(demo, 3, "ALTER SYSTEM SET max_standby_streaming_delay = -1");
    on_server(demo, 3, "SELECT pg_reload_conf()");
    let retry = "SET backhaul.backup.standby_mode = 'retry'";
    until_explained(&fleet, retry, "conflicts: retry");
    let job = fleet.held_after(retry, &statement(), HELD);
    on_server(demo, 1, "DELETE FROM rides WHERE ctid IN (SELECT ctid FROM rides LIMIT 100)");
    on_server(demo, 1, "VACUUM rides");
    on_server(demo, 1, "CREATE TABLE filler AS SELECT repeat('x', 1000) FROM generate_series(1, 10000)");
    let position = on_server(demo, 1, "SELECT pg_current_wal_flush_lsn()");
    until_on(demo, 3, &format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"), "t");
    fleet.let_go(&job, HELD);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let errors = fleet.job(&job, "execution_errors::text");
    assert!(errors.contains("is lost") && errors.contains("bulkio.backup.standby_wal_limit"), "{errors}");
    assert_eq!(LocalBackup::newest(&extern_dirs(demo), "c").rows("rides").len(), before - 100);
}

/// Each lost point is counted, whichever run of the job loses it, and the last one fails it.
#[test]
fn a_point_that_is_lost_again_and_again_fails_the_job() {
    let fleet = pausing();
    let demo = &fleet.demo;
    let set = "SET backhaul.debug_pausepoints = 'backup.after_points'";
    let job = run(demo.psql(1).args(["-Atqc", set, "-c", &statement()])).trim().to_owned();
    let is = |status: &str| {
        until(status, || {
            let seen = fleet.job(&job, "status");
            if seen == status { Ok(()) } else { Err(seen) }
        });
    };
    is("paused");
    let often = "UPDATE registry.job_info SET value = jsonb_set(value, '{tries,lost}', '29') WHERE key = 'point/s1'";
    fleet.registry(&format!("{often} AND job_id = {job}"));
    let own = format!("FROM pg_stat_activity WHERE application_name LIKE 'backhaul job {job}%'");
    on_server(demo, 3, &format!("SELECT count(pg_terminate_backend(pid)) {own}"));
    until_on(demo, 3, &format!("SELECT count(*) {own}"), "0");
    demo.ask(1, &format!("RESUME JOB {job}"));
    let (status, error) = fleet.end_of(&job);
    assert!(status == "failed" && error.starts_with("the backup's point on ") && error.contains(" is lost"), "{error}");
    until_on(demo, 3, STATE, "not paused");
}

#[test]
fn a_mode_that_cannot_be_had_is_refused_and_commits_never_wait_for_a_pause() {
    let fleet = pausing();
    let demo = &fleet.demo;
    let told = |mode: &str, statement: &str| {
        let set = format!("SET backhaul.backup.standby_mode = '{mode}'");
        both(&demo.psql(1).args(["-Atq", "-v", "VERBOSITY=verbose", "-c", &set, "-c", statement]).output().unwrap())
    };
    let east = statement().replace("region=us-west-1", "region=us-east-1,zone=b");
    for (mode, statement, node, reason) in [
        ("feedback", &statement(), 3, "hot_standby_feedback is off"),
        ("paused", &east, 2, "commits may wait for it, so its replay is never paused"),
    ] {
        for statement in [statement.clone(), format!("EXPLAIN {statement}")] {
            let told = told(mode, &statement);
            let refusal = format!("the standby beside node {node} cannot be read in mode \"{mode}\"");
            assert!(told.contains(&refusal) && told.contains(reason), "{told}");
            assert!(told.contains("RESET backhaul.backup.standby_mode"), "{told}");
        }
    }
    let told_wrong = told("pause", &statement());
    assert!(told_wrong.contains("ERROR:  22023: invalid value for parameter") && told_wrong.contains("auto, paused"));

    // A voting standby is read, and its replay goes on.
    let plan = demo.ask(1, &format!("EXPLAIN {east}"));
    assert!(plan.contains("not paused, because commits may wait for it"), "{plan}");
    let job = fleet.held(&east, HELD);
    assert_eq!(on_server(demo, 2, STATE), "not paused");
    fleet.let_go(&job, HELD);
    assert_eq!(fleet.end_of(&job).0, "succeeded");

    // A standby that becomes one while it is read is not paused any longer: commits wait for what it has replayed.
    let job = fleet.held(&statement(), HELD);
    assert_still_paused(&fleet, &job);
    on_server(demo, 1, "ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (n3)'");
    on_server(demo, 1, "SELECT pg_reload_conf()");
    until_on(demo, 3, STATE, "not paused");
    on_server(demo, 1, "SET synchronous_commit = remote_apply; CREATE TABLE applied ()");
    fleet.let_go(&job, HELD);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let errors = fleet.job(&job, "execution_errors::text");
    assert!(errors.contains("Commits may wait for the server now."), "{errors}");
    until_on(demo, 3, STATE, "not paused");
}

/// Where a later point cannot be had in the mode that was asked for, the primary is not read instead, though it may be.
#[test]
fn a_job_waits_for_a_standby_that_can_have_the_mode_it_was_begun_in() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let demo = &fleet.demo;
    let feedback = |number: usize, value: &str| {
        on_server(demo, number, &format!("ALTER SYSTEM SET hot_standby_feedback = {value}"));
        on_server(demo, number, "SELECT pg_reload_conf()");
    };
    let wanted = "SET backhaul.backup.standby_mode = 'feedback'";
    let statement =
        "BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH EXECUTION LOCALITY = 'region=us-west-1', DETACHED";
    let until_told = |words: &str| {
        until(words, || {
            let explain = format!("EXPLAIN {statement}");
            let plan = both(&demo.psql(1).args(["-Atq", "-c", wanted, "-c", &explain]).output().unwrap());
            if plan.contains(words) { Ok(()) } else { Err(plan) }
        });
    };
    feedback(2, "off");
    feedback(3, "on");
    until_told("conflicts: feedback");
    let job = fleet.held_after(wanted, statement, HELD);
    feedback(3, "off");
    until_told("the standby beside node 3 cannot be read in mode");
    let own = format!("FROM pg_stat_activity WHERE application_name LIKE 'backhaul job {job}%'");
    on_server(demo, 3, &format!("SELECT count(pg_terminate_backend(pid)) {own}"));
    until_on(demo, 3, &format!("SELECT count(*) {own}"), "0");
    fleet.let_go(&job, HELD);
    until("the job to be tried again", || {
        let told = fleet.job(&job, "concat_ws('|', status, num_runs > 1, execution_errors)");
        assert!(told.starts_with("running|"), "{told}");
        if told.starts_with("running|t|") && told.contains("cannot be read in mode") { Ok(()) } else { Err(told) }
    });
    feedback(3, "on");
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let backup = LocalBackup::newest(&extern_dirs(demo), "c");
    let shard = &backup.manifest["shards"][0];
    assert_eq!((&shard["read_from"], &shard["modes"]["3"]["mode"]), (&3.into(), &"feedback".into()));
}

#[test]
fn a_pause_does_not_outlast_the_node_that_knows_who_votes() {
    let mut fleet = pausing();
    let job = fleet.held(&statement(), HELD);
    assert_still_paused(&fleet, &job);
    fleet.end_node(1, Signal::SIGKILL);
    // Behind everybody's back.
    on_server(&fleet.demo, 1, "ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (n3)'");
    on_server(&fleet.demo, 1, "SELECT pg_reload_conf()");
    on_server(&fleet.demo, 1, "SET synchronous_commit = remote_apply; CREATE TABLE applied ()");
    until_on(&fleet.demo, 3, STATE, "not paused");
    let log = std::fs::read_to_string(fleet.demo.node_dir(3).join("node.log")).unwrap();
    assert!(log.contains("replay goes on before everything is read: Commits may wait"), "{log}");
    fleet.start_node(1);
    fleet.until_all_live();
    fleet.let_go(&job, HELD);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
}
