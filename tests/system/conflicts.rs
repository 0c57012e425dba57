//! A long read on a standby, and VACUUM on the primary that removes what it reads: with `hot_standby_feedback` it is not
//! removed; without, replay ends the founders, and the job goes on at another point.

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
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://1/c'
                     WITH EXECUTION LOCALITY = 'region=us-west-1', strict execution locality, DETACHED";
    // Only the server that is read has a say in what VACUUM may remove.
    on_server(demo, 2, "ALTER SYSTEM SET hot_standby_feedback = off");
    on_server(demo, 2, "SELECT pg_reload_conf()");
    on_server(demo, 3, "ALTER SYSTEM SET max_standby_streaming_delay = '100ms'");
    for (feedback, mode) in [("off", "conflicts: retry"), ("on", "conflicts: feedback")] {
        on_server(demo, 3, &format!("ALTER SYSTEM SET hot_standby_feedback = {feedback}"));
        on_server(demo, 3, "SELECT pg_reload_conf()");
        let holding = "SELECT count(*) FROM pg_replication_slots WHERE xmin IS NOT NULL";
        until_on(demo, 1, holding, if feedback == "on" { "1" } else { "0" });
        until("the mode to be explained", || {
            let plan = demo.ask(1, &format!("EXPLAIN {statement}"));
            if plan.contains(mode) { Ok(()) } else { Err(plan) }
        });
        let before: usize = on_server(demo, 1, "SELECT count(*) FROM rides").parse().unwrap();
        let ended = "SELECT confl_snapshot FROM pg_stat_database_conflicts WHERE datname = 'movr'";
        let ended_before = on_server(demo, 3, ended);

        let job = fleet.held(statement, HELD);
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
