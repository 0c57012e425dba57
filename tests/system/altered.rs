//! Tables that are altered while a standby is read: after the second spoilt point they are held on the leaseholder, unless
//! the statement keeps away from it; then the job fails and names them, as it does when even that is no help. Another
//! coordinator holds what the first one held.

use nix::sys::signal::Signal;

use crate::support::demo::psql;
use crate::support::faults::Fleet;
use crate::support::store::files_in;
use crate::support::{both, until};

const ROWS: [&str; 2] = ["--rows", "500"];

const WEST: &str = "EXECUTION LOCALITY = 'region=us-west-1'";

/// Between a point and the first row that is read at it.
const POINT: &str = "backup.after_schemas";

/// The table in question is locked by a session of the node's, which reads nothing here.
const HELD: &str = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE relation = 'users'::regclass AND mode = 'AccessShareLock' AND granted AND usename = 'backhaul'";

/// Has a fleet's backups held at each point that they take: the mark that a place was passed goes with the old point.
fn prepared(fleet: Fleet) -> Fleet {
    fleet.registry(&format!(
        "CREATE FUNCTION registry.again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             DELETE FROM registry.job_info WHERE job_id = NEW.job_id AND key = 'pausepoint/{POINT}';
             UPDATE registry.jobs SET pausepoints = '{{{POINT}:hold}}' WHERE id = NEW.job_id;
             RETURN NEW;
         END $$;
         CREATE TRIGGER again AFTER INSERT OR UPDATE ON registry.job_info FOR EACH ROW WHEN (NEW.key = 'point/s1')
         EXECUTE FUNCTION registry.again()"
    ));
    fleet
}

/// Waits until the job is held at the point that it has taken after so many were spoilt.
#[track_caller]
fn until_at(fleet: &Fleet, job: &str, spoilt: usize) {
    until("the next point", || {
        let key = format!(
            "SELECT value #>> '{{tries,spoilt}}' FROM registry.job_info WHERE job_id = {job} AND key = 'point/s1'"
        );
        let seen = fleet.registry(&key);
        if seen == spoilt.to_string() {
            Ok(())
        } else {
            Err(format!("{seen} {}", fleet.job(job, "execution_errors::text")))
        }
    });
    fleet.until_held(job, POINT);
}

/// Alters a table on the primary, and waits until the standby that is read has done the same.
#[track_caller]
fn alter(fleet: &Fleet, table: &str, column: usize) {
    fleet.on(1, "movr", &format!("ALTER TABLE {table} ADD COLUMN added_{column} int"));
    until("the standby to have the column", || {
        let query = format!(
            "SELECT count(*) FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attname = 'added_{column}'"
        );
        let seen = both(&fleet.demo.psql_direct(3).args(["-Atc", &query]).output().unwrap());
        if seen.trim() == "1" { Ok(()) } else { Err(seen) }
    });
}

/// Spoils two points of a job, and waits until it is held at the third, and holds the table.
#[track_caller]
fn spoilt_twice(fleet: &Fleet) -> String {
    let job = fleet.held(&format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, DETACHED"), POINT);
    for spoilt in 0..2 {
        until_at(fleet, &job, spoilt);
        assert_eq!(fleet.on(1, "movr", HELD).trim(), "0", "after {spoilt} spoilt points");
        alter(fleet, "users", spoilt);
        fleet.let_go(&job, POINT);
    }
    until_at(fleet, &job, 2);
    assert_eq!(fleet.on(1, "movr", HELD).trim(), "1");
    job
}

/// Sends the coordinator a signal, and waits until the next one is held at the same place and holds what the first one
/// did, and nobody else does. The point may be another one by then: its founders may have been on the same node. Gives
/// the number of the node that it was.
#[track_caller]
fn without_coordinator(fleet: &mut Fleet, job: &str, signal: Signal) -> usize {
    let holder = HELD.replace("count(*)", "string_agg(pid::text, ' ')");
    let before = fleet.on(1, "movr", &holder);
    let passed = format!("job_info WHERE job_id = {job} AND key = 'pausepoint/{POINT}'");
    fleet.registry(&format!("DELETE FROM registry.{passed}"));
    let coordinator: usize = fleet.job(job, "coordinator_id").parse().unwrap();
    match signal {
        Signal::SIGSTOP => fleet.signal(coordinator, signal),
        signal => fleet.end_node(coordinator, signal),
    }
    until("the next coordinator to be there", || {
        let seen = fleet.registry(&format!("SELECT count(*) FROM registry.{passed}"));
        if seen == "1" { Ok(()) } else { Err(fleet.job(job, "concat_ws(' ', running_status, execution_errors)")) }
    });
    until("another session to hold the table", || {
        let (count, now) = (fleet.on(1, "movr", HELD), fleet.on(1, "movr", &holder));
        if count.trim() == "1" && now != before { Ok(()) } else { Err(format!("{count}: {before}, {now}")) }
    });
    coordinator
}

#[test]
fn twice_spoilt_tables_are_held_on_the_leaseholder() {
    let mut fleet = prepared(Fleet::mortal(&ROWS));
    let job = spoilt_twice(&fleet);
    without_coordinator(&mut fleet, &job, Signal::SIGKILL);
    // Users read and write on; what would spoil the point waits.
    fleet.on(1, "movr", "UPDATE users SET city = city; SELECT count(*) FROM users");
    let url = &fleet.demo.nodes[0].url;
    let alter = "SET lock_timeout = '200ms'; ALTER TABLE users ADD COLUMN never int";
    let refused = both(&psql(url).args(["-v", "VERBOSITY=verbose", "-c", alter]).output().unwrap());
    assert!(refused.contains("ERROR:  55P03"), "{refused}");
    fleet.let_go(&job, POINT);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    until("the lock to be gone", || {
        let seen = fleet.on(1, "movr", HELD);
        if seen.trim() == "0" { Ok(()) } else { Err(seen) }
    });
    // The whole backup is of the third point.
    let shown = fleet.demo.ask(1, "SHOW BACKUP SCHEMAS FROM LATEST IN 'nodelocal://1/b'");
    assert!(shown.contains("added_0") && shown.contains("added_1") && !shown.contains("never"), "{shown}");
}

#[test]
fn what_a_frozen_coordinator_holds_is_let_go() {
    let mut fleet = prepared(Fleet::mortal(&ROWS));
    let job = spoilt_twice(&fleet);
    // It renews what it holds for as long as it lives.
    let renewed = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'backhaul' AND query = ''
                   AND state = 'idle in transaction' AND xact_start < state_change - interval '9 s'";
    until("the locks to be renewed", || {
        let seen = fleet.on(1, "movr", renewed);
        if seen.trim() == "1" { Ok(()) } else { Err(seen) }
    });
    let coordinator = without_coordinator(&mut fleet, &job, Signal::SIGSTOP);
    fleet.signal(coordinator, Signal::SIGCONT);
    fleet.let_go(&job, POINT);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
}

#[test]
fn where_the_leaseholder_is_forbidden_the_job_fails_and_names_the_tables() {
    let fleet = prepared(Fleet::start(&ROWS));
    for (number, options) in
        ["replica = 'nonvoting'", "replica = 'standby'", "STRICT EXECUTION LOCALITY"].iter().enumerate()
    {
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, {options}, DETACHED");
        let job = fleet.held(&statement, POINT);
        for (spoilt, table) in ["users", "vehicles"].into_iter().enumerate() {
            until_at(&fleet, &job, spoilt);
            assert_eq!(fleet.on(1, "movr", HELD).trim(), "0", "{options}");
            alter(&fleet, table, 10 * number + spoilt);
            fleet.let_go(&job, POINT);
        }
        let (status, error) = fleet.end_of(&job);
        assert_eq!(status, "failed", "{options}");
        let named = "tables of shard \"s1\" keep changing while they are read: movr.public.users, movr.public.vehicles; \
                     The statement forbids to hold them on the leaseholder.";
        assert!(error.starts_with(named), "{options}: {error}");
        assert_eq!(fleet.on(1, "movr", HELD).trim(), "0", "{options}");
    }
    let left = files_in(&fleet.demo.node_dir(1).join("extern"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_no_lock_holds_still_fails_the_job_in_the_end_and_is_named() {
    let fleet = prepared(Fleet::start(&ROWS));
    // Labels are added without a lock on the tables that have them.
    fleet.on(1, "movr", "CREATE TYPE mood AS ENUM ('calm'); CREATE TABLE moody AS SELECT 'calm'::mood AS mood");
    let job = fleet.held(&format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, DETACHED"), POINT);
    for spoilt in 0..4 {
        until_at(&fleet, &job, spoilt);
        assert_eq!(fleet.job(&job, "status"), "running");
        fleet.on(1, "movr", &format!("ALTER TYPE mood ADD VALUE 'mood {spoilt}'"));
        until("the standby to have the label", || {
            let label = format!("SELECT count(*) FROM pg_enum WHERE enumlabel = 'mood {spoilt}'");
            let seen = both(&fleet.demo.psql_direct(3).args(["-Atc", &label]).output().unwrap());
            if seen.trim() == "1" { Ok(()) } else { Err(seen) }
        });
        fleet.let_go(&job, POINT);
    }
    let (status, error) = fleet.end_of(&job);
    assert_eq!(status, "failed", "{error}");
    assert!(error.starts_with("table \"public.moody\" was changed while it was backed up"), "{error}");
    let left = files_in(&fleet.demo.node_dir(1).join("extern"));
    assert!(left.is_empty(), "{left:?}");
}
