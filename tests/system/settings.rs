//! What is set for the fleet holds on every node, without a restart. What each statement says is in
//! `sql-fixtures/settings/`.

use crate::support::demo::Demo;
use crate::support::until;

#[test]
fn every_node_renews_its_session_for_the_life_that_was_set() {
    let demo = Demo::start(&["--nodes", "2", "--no-example-database"]);
    let set = demo.ask(2, "SET CLUSTER SETTING server.sqlliveness.ttl = '5min'");
    assert_eq!(set, "SET CLUSTER SETTING");
    let longer = "SELECT count(*) FROM registry.sessions WHERE expires_at > clock_timestamp() + interval '1 minute'";
    until("both nodes to live longer", || match demo.registry(longer) {
        both if both == "2" => Ok(()),
        other => Err(other),
    });
    assert_eq!(demo.ask(1, "RESET CLUSTER SETTING server.sqlliveness.ttl"), "SET CLUSTER SETTING");
    assert_eq!(demo.ask(1, "SHOW CLUSTER SETTING server.sqlliveness.ttl"), "10s");
}

#[test]
fn jobs_that_ended_are_forgotten_when_they_are_old_enough() {
    let demo = Demo::start(&["--rows", "300"]);
    let made = demo.ask(1, "BACKUP DATABASE movr INTO 'nodelocal://1/b'");
    let id = made.split('|').next().unwrap();
    let young = demo.ask(1, "BACKUP DATABASE movr INTO 'nodelocal://1/c'");
    let young = young.split('|').next().unwrap();
    assert_eq!(demo.ask(2, &format!("SHOW JOBS VALUES ({id}), ({young})")).lines().count(), 2);
    // Shorter than anybody may set it, so that there is nothing to wait for.
    let age = format!("UPDATE registry.jobs SET finished = clock_timestamp() - interval '15 days' WHERE id = {id}");
    assert_eq!(demo.registry(&format!("{age} RETURNING 1")), "1");
    assert_eq!(demo.ask(3, "SET CLUSTER SETTING jobs.retention_time = '13d'"), "SET CLUSTER SETTING");
    until("the job to be forgotten", || match demo.ask(2, &format!("SHOW JOBS VALUES ({id}), ({young})")) {
        one if one.lines().count() == 1 && one.starts_with(young) => Ok(()),
        other => Err(other),
    });
    // The node that made it does not take it for lost; its own clock says that it is young, so it may not say so yet.
    demo.registry("UPDATE registry.settings SET value = '0' WHERE name = 'jobs.retention_time'");
    until("the one that made it to forget it", || match demo.ask(1, &format!("SHOW JOB {id}")) {
        none if none.is_empty() => Ok(()),
        other => Err(other),
    });
    // Its backup is there all the same.
    assert_eq!(demo.ask(1, "SHOW BACKUPS IN 'nodelocal://1/b'").lines().count(), 1);
}

#[test]
fn a_limit_of_the_rate_holds_on_every_node_and_is_lifted_while_a_job_runs() {
    let demo = Demo::start(&["--rows", "20000"]);
    let set = "SET CLUSTER SETTING bulkio.backup.node_rate_limit = '64KiB'";
    assert_eq!(demo.ask(1, set), "SET CLUSTER SETTING");
    // Megabytes of rows would take minutes; without the limit they take less than the timeout.
    let backup = "SET statement_timeout = '3s'; SET backhaul.on_relocation = 'wait'";
    let limited = |number: usize, filter: &str| {
        until("a backup to be slow", || {
            let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH EXECUTION LOCALITY = '{filter}'");
            let mut psql = demo.psql(number);
            let output =
                psql.args(["-At", "-v", "VERBOSITY=verbose", "-c", backup, "-c", &statement]).output().unwrap();
            match crate::support::both(&output) {
                late if late.contains("57014") => Ok(()),
                other => Err(other),
            }
        });
    };
    limited(1, "region=us-east-1");
    limited(4, "region=us-west-1");
    let running = demo.ask(2, "SHOW JOBS").lines().filter(|job| job.contains("|running|")).count();
    assert!(running >= 2, "{}", demo.ask(2, "SHOW JOBS"));
    assert_eq!(demo.ask(3, "RESET CLUSTER SETTING bulkio.backup.node_rate_limit"), "SET CLUSTER SETTING");
    until("the backups to be fast", || match demo.ask(2, "SHOW JOBS") {
        done if done.lines().all(|job| job.contains("|succeeded|")) => Ok(()),
        other => Err(other),
    });
}
