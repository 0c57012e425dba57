//! What can go wrong with a BACKUP: deaths in the middle, stores that fail, and statements that cannot be.

use std::io::Read;
use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::{Demo, psql};
use crate::support::faults::DEATH_KNOWN;
use crate::support::store::{LocalBackup, S3, files_in};
use crate::support::{both, run, until};

const ROWS: &str = "150000";

/// A fleet with enough rows for something to happen while they are read.
fn fleet() -> Demo {
    Demo::start(&["--rows", ROWS])
}

fn backup(demo: &Demo, uri: &str) -> String {
    let statement = format!("BACKUP DATABASE movr INTO '{uri}' WITH EXECUTION LOCALITY = 'region=us-west-1', DETACHED");
    let job = demo.ask(1, &statement);
    assert!(job.parse::<i64>().is_ok(), "{job}");
    job
}

/// A column of a job's row, counted from 0: 5 is its status, 12 its error, 13 its coordinator.
fn column(demo: &Demo, job: &str, column: usize, when: &str) -> String {
    let row = demo.ask(1, &format!("SHOW JOB {when} {job}"));
    row.split('|').nth(column).unwrap_or_else(|| panic!("{row}")).to_owned()
}

fn extern_dir(demo: &Demo, number: usize) -> PathBuf {
    demo.node_dir(number).join("extern")
}

#[track_caller]
fn until_writing(demo: &Demo, number: usize) {
    until("rows to be written", || match files_in(&extern_dir(demo, number)).len() {
        0 | 1 => Err("nothing".to_owned()),
        _ => Ok(()),
    });
}

/// Every row is there once, and all are of one point.
#[track_caller]
fn assert_whole(demo: &Demo, path: &str) {
    let backup = LocalBackup::newest(&[extern_dir(demo, 1)], path);
    let mut ids: Vec<i64> =
        backup.rows("rides").iter().map(|row| row.split('\t').next().unwrap().parse().unwrap()).collect();
    let rows = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((rows.to_string().as_str(), ids.len()), (ROWS, rows));
}

/// The node that is killed may coordinate, export, or hold the point that is read at.
fn survives_the_death_of(number: usize) {
    let demo = fleet();
    demo.set_session_life(DEATH_KNOWN);
    let job = backup(&demo, "nodelocal://1/k");
    until_writing(&demo, 1);
    kill(Pid::from_raw(demo.nodes[number - 1].pid), Signal::SIGKILL).unwrap();
    let status = column(&demo, &job, 5, "WHEN COMPLETE");
    assert_eq!((status.as_str(), column(&demo, &job, 12, "").as_str()), ("succeeded", ""));
    let other = if number == 3 { "4" } else { "3" };
    let coordinator = column(&demo, &job, 13, "");
    assert!(coordinator == other || coordinator == number.to_string(), "{coordinator}");
    assert_whole(&demo, "k");
    // Sessions that the dead node had end with it, and nobody is left paused.
    until("the standby to replay, and nothing to be held", || {
        let left = "SELECT count(*), pg_is_wal_replay_paused() FROM pg_stat_activity WHERE state LIKE 'idle in%'";
        let seen = both(&demo.psql_direct(3).args(["-Atc", left]).output().unwrap());
        if seen.trim() == "0|f" { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn a_backup_survives_the_death_of_the_node_beside_the_server_it_reads() {
    survives_the_death_of(3);
}

#[test]
fn a_backup_survives_the_death_of_a_node_without_a_server() {
    survives_the_death_of(4);
}

#[test]
fn an_attached_backup_goes_on_when_its_client_goes() {
    let demo = fleet();
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://1/k' WITH EXECUTION LOCALITY = 'region=us-west-1'";
    let mut client = demo.psql(3).args(["-c", statement]).stdout(Stdio::null()).spawn().unwrap();
    until_writing(&demo, 1);
    client.kill().unwrap();
    client.wait().unwrap();
    until("its session to end", || {
        let left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND pid <> pg_backend_pid()";
        let seen = both(&demo.psql_direct(1).args(["-Atc", left]).output().unwrap());
        if seen.trim() == "0" { Ok(()) } else { Err(seen) }
    });
    let job = demo.ask(2, "SHOW JOBS").split('|').next().unwrap().to_owned();
    assert_eq!(column(&demo, &job, 5, "WHEN COMPLETE"), "succeeded");
    assert_whole(&demo, "k");
}

#[test]
fn a_waiting_client_can_cancel_its_wait_but_not_the_job() {
    let demo = fleet();
    let job = backup(&demo, "nodelocal://1/k");
    let mut client = demo.psql(4);
    // A psql that has not connected yet dies of the signal: the first command says that this one has.
    client.args(["-v", "VERBOSITY=verbose", "-c", r"\! echo connected"]);
    client.args(["-c", &format!("SHOW JOB WHEN COMPLETE {job}")]);
    let mut client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 1];
    client.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    // One that comes before the statement is sent cancels nothing.
    until("psql to end", || {
        kill(Pid::from_raw(client.id() as i32), Signal::SIGINT).unwrap();
        client.try_wait().unwrap().ok_or_else(|| "waiting still".to_owned())
    });
    let said = both(&client.wait_with_output().unwrap());
    // A wait that had ended already is no failure of the cancel.
    assert!(said.contains("57014: canceling statement due to user request") || said.contains("succeeded"), "{said}");
    assert_eq!(column(&demo, &job, 5, "WHEN COMPLETE"), "succeeded");
}

#[test]
fn a_store_that_fails_fails_the_job_with_a_reason() {
    let demo = fleet();
    let s3 = S3::start();
    let uri = |bucket: &str, endpoint: &str| {
        format!(
            "s3://{bucket}/b?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT={endpoint}"
        )
    };
    let endpoint = s3.endpoint();
    drop(s3);
    // One that was never there is not waited for as long as one that a job has used (outages.rs).
    let job = backup(&demo, &uri("bucket", &endpoint));
    assert_eq!(column(&demo, &job, 5, "WHEN COMPLETE"), "failed");
    let error = column(&demo, &job, 12, "");
    assert!(error.contains("the store at s3://bucket/b") && !error.contains("hidden"), "{error}");

    let (s3, guarded) = (S3::start(), S3::guarded());
    for (uri, expected) in [
        (uri("bucket", &guarded.endpoint()), "42501: "),
        (uri("nope", &s3.endpoint()), "58P01: bucket \"nope\" does not exist"),
        ("nodelocal://3/f".to_owned(), "58030: "),
        (
            "nodelocal://3/../../etc".to_owned(),
            "42501: local file access to paths outside of external-io-dir is not allowed",
        ),
        ("nodelocal://77/b".to_owned(), "58P01: node 77 of nodelocal://77/b is not known"),
        ("external://nobody".to_owned(), "42704: external connection with connection name nobody does not exist"),
        ("gopher://b".to_owned(), "22023: unsupported storage scheme: \"gopher\""),
    ] {
        std::fs::write(extern_dir(&demo, 3).join("f"), "in the way").unwrap();
        let told = demo
            .ask(3, &format!("BACKUP DATABASE movr INTO '{uri}' WITH EXECUTION LOCALITY = 'zone=a,region=us-west-1'"));
        assert!(told.starts_with(&format!("ERROR:  {expected}")), "{uri}: {told}");
        assert!(!told.contains("hidden"), "{told}");
    }
}

#[test]
fn rights_are_those_of_the_client_s_role() {
    let demo = Demo::start(&[]);
    let make = "CREATE ROLE plain LOGIN; CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader";
    // Some drop what no query of theirs needs.
    let rid = "DROP SCHEMA information_schema CASCADE";
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-c", make, "-c", rid]));
    let objects = "DO $$ DECLARE o oid; BEGIN FOR o IN SELECT oid FROM pg_largeobject_metadata LOOP
                   EXECUTE format('GRANT SELECT ON LARGE OBJECT %s TO reader', o); END LOOP; END $$";
    let ask = |user: &str, statement: &str| {
        let url = demo.nodes[3].url.replace("root@", &format!("{user}@"));
        let told =
            psql(&url).args(["-At", "-v", "VERBOSITY=verbose", "-c", statement, "-c", "SELECT 'usable'"]).output();
        both(&told.unwrap())
    };
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://self/b'";
    let told = ask("plain", statement);
    assert!(told.contains("42501: user plain does not have SELECT privilege on relation"), "{told}");
    assert!(told.contains("usable"), "{told}");
    // pg_read_all_data does not reach large objects.
    let told = ask("reader", statement);
    assert!(told.contains("42501: user reader does not have SELECT privilege on large object"), "{told}");
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-c", objects]));
    let told = ask("reader", statement);
    assert!(told.contains("42501: only users with the admin role or the EXTERNALIOIMPLICITACCESS"), "{told}");
    let told = ask("reader", "CREATE EXTERNAL CONNECTION c AS 'nodelocal://1/c'");
    assert!(told.contains("42501: only users with the EXTERNALCONNECTION system privilege"), "{told}");
    // SET ROLE counts, as everywhere in PostgreSQL.
    let told = demo.ask(2, "SET ROLE plain; SELECT 1");
    assert!(told.contains('1'), "{told}");
    let both_roles = both(&demo.psql(2).args(["-c", "SET ROLE plain", "-c", statement]).output().unwrap());
    assert!(both_roles.contains("user plain does not have SELECT privilege"), "{both_roles}");

    run(demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-c", "CREATE EXTERNAL CONNECTION mine AS 'nodelocal://1/mine'"]));
    let told = ask("reader", "BACKUP DATABASE movr INTO 'external://mine'");
    assert!(told.contains("42501: user reader does not have USAGE privilege on external_connection mine"), "{told}");
    // Jobs of others are not shown.
    let job = demo.ask(1, "BACKUP DATABASE movr INTO 'external://mine' WITH DETACHED");
    assert_eq!(column(&demo, &job, 5, "WHEN COMPLETE"), "succeeded");
    assert_eq!(ask("reader", &format!("SHOW JOB {job}")).trim(), "usable");
}

#[test]
fn without_the_right_to_pause_a_point_is_taken_all_the_same() {
    let demo = Demo::start(&[]);
    let revoke = "REVOKE EXECUTE ON FUNCTION pg_wal_replay_pause() FROM backhaul";
    run(psql(&demo.direct_url(1).replace("/movr?", "/postgres?")).args(["-v", "ON_ERROR_STOP=1", "-c", revoke]));
    until("the standby to know", || {
        let query = "SELECT has_function_privilege('backhaul', 'pg_wal_replay_pause()', 'EXECUTE')";
        let url = demo.direct_url(3).replace("/movr?", "/postgres?");
        let seen = both(&psql(&url).args(["-Atc", query]).output().unwrap());
        if seen.trim() == "f" { Ok(()) } else { Err(seen) }
    });
    let job = backup(&demo, "nodelocal://1/k");
    assert_eq!(column(&demo, &job, 5, "WHEN COMPLETE"), "succeeded");
    let manifest = LocalBackup::newest(&[extern_dir(&demo, 1)], "k").manifest;
    assert_eq!(manifest["shards"][0]["point"]["mode"], "Still");
}

#[test]
fn a_registry_that_is_down_is_a_clear_error() {
    let demo = Demo::start(&["--no-example-database"]);
    kill(demo.server_pid(1), Signal::SIGKILL).unwrap();
    until("the loss to be known", || {
        let seen = demo.ask(3, "SELECT 1");
        if seen.contains("has no leaseholder now") { Ok(()) } else { Err(seen) }
    });
    let mut local = demo.psql(3);
    local.env("PGOPTIONS", "-c backhaul.target=local").args(["-At", "-v", "VERBOSITY=verbose"]);
    local.args([
        "-c",
        "BACKUP DATABASE postgres INTO 'nodelocal://self/b'",
        "-c",
        "SHOW JOBS",
        "-c",
        "SELECT 'usable'",
    ]);
    let told = both(&local.output().unwrap());
    assert_eq!(told.matches("ERROR:  08006: ").count(), 2, "{told}");
    assert!(told.contains("registry") && told.contains("usable"), "{told}");
}
