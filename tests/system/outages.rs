//! Stores, nodes and registries that are away for longer than a moment: what is done is kept, what is made is removed in the
//! end, and whoever waits is told the truth.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::crash::{FILTER, ONE_SHARD};
use crate::support::demo::Holder;
use crate::support::faults::{Fleet, Trouble};
use crate::support::jobs::WEST;
use crate::support::store::{S3, files_in};
use crate::support::{both, run, until, until_in};

/// More than a store tries for one request by itself.
const CONNECTIONS: usize = 12;

/// Longer than a job is patient with its store, or a lock, before it is begun again.
const PATIENCE: Duration = Duration::from_secs(90);

fn uri(address: &str, collection: &str) -> String {
    format!(
        "s3://bucket/{collection}?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{address}"
    )
}

/// What a job has kept for its next run.
fn kept(fleet: &Fleet, job: &str, key: &str, path: &str) -> String {
    fleet.registry(&format!(
        "SELECT value #>> '{{{path}}}' FROM registry.job_info WHERE job_id = {job} AND key LIKE '{key}' ORDER BY key LIMIT 1"
    ))
}

#[test]
fn a_store_that_is_away_for_some_seconds_fails_no_job() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let s3 = S3::start();
    let door = s3.failing();
    let backup = format!("BACKUP DATABASE movr INTO '{}' WITH {WEST}, DETACHED", uri(&door.address, "b"));
    let restore = format!(
        "RESTORE DATABASE movr FROM LATEST IN '{}' WITH new_db_name = 'again', {WEST}, DETACHED",
        uri(&door.address, "b")
    );
    for (statement, point) in [
        (&backup, ""),
        (&backup, "backup.after_record"),
        (&restore, ""),
        (&restore, "restore.after_source"),
        (&restore, "restore.after_create"),
    ] {
        let job = if point.is_empty() {
            door.fail(Trouble::Refuses, CONNECTIONS);
            fleet.demo.ask(1, statement)
        } else {
            let job = fleet.held(statement, point);
            door.fail(Trouble::Refuses, CONNECTIONS);
            fleet.let_go(&job, point);
            job
        };
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()), "{point}");
        door.heal();
        if statement == &restore {
            assert_eq!(fleet.on(1, "again", "SELECT count(*) FROM rides").trim(), "500");
            fleet.on(1, "postgres", "DROP DATABASE again WITH (FORCE)");
        }
    }
}

#[test]
fn a_job_is_begun_again_at_its_point_when_its_store_was_away_for_long() {
    let fleet = Fleet::start(&ONE_SHARD);
    let s3 = S3::start();
    let door = s3.failing();
    let statement = format!("BACKUP DATABASE movr INTO '{}' WITH {FILTER}, DETACHED", uri(&door.address, "b"));
    let job = fleet.held(&statement, "backup.after_first_span");
    let span = "SELECT max(key) FROM registry.job_info WHERE key LIKE 'span/%'";
    let span = fleet.registry(&format!("{span} AND job_id = {job}"));
    let point = || (kept(&fleet, &job, "point/s1", "lease"), kept(&fleet, &job, &span, "file,path"));
    let before = point();
    assert!(before.1.starts_with("data/"), "{before:?}");
    door.fail(Trouble::Refuses, usize::MAX);
    fleet.let_go(&job, "backup.after_first_span");
    until_in(PATIENCE, "the job to be begun again", || {
        let seen = fleet.job(&job, "concat_ws('|', status, num_runs, execution_errors)");
        if seen.starts_with("running|2|") { Ok(()) } else { Err(seen) }
    });
    let told = fleet.demo.ask(2, &format!("SHOW JOB {job}"));
    assert!(told.contains("the store at s3://bucket/b") && !told.contains("hidden"), "{told}");
    door.heal();
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    assert_eq!(point(), before);
}

#[test]
fn a_job_is_begun_again_at_its_point_while_a_table_stays_locked() {
    let fleet = Fleet::start(&["--rows", "500"]);
    // Read on the primary.
    let filter = "EXECUTION LOCALITY = 'region=us-east-1,zone=a'";
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {filter}, DETACHED");
    let job = fleet.held(&statement, "backup.after_schemas");
    let before = kept(&fleet, &job, "point/s1", "lease");
    let locker = Holder::start(fleet.demo.psql_direct(1), "BEGIN; LOCK TABLE rides IN ACCESS EXCLUSIVE MODE");
    fleet.let_go(&job, "backup.after_schemas");
    until_in(PATIENCE, "the job to be begun again", || {
        let seen = fleet.job(&job, "concat_ws('|', status, num_runs, execution_errors)");
        let told = seen.contains("is locked by somebody else; It was not free within");
        if seen.starts_with("running|2|") && told { Ok(()) } else { Err(seen) }
    });
    drop(locker);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    assert_eq!(kept(&fleet, &job, "point/s1", "lease"), before);
}

/// On the server beside its node: it outlives the leaseholder.
const BESIDE: &str = "-c backhaul.target=local";

/// A client that waits in `statement` at node `number`, with these options of the connection. Returns when it has been told
/// how far its job is; its errors are to be read on.
#[track_caller]
pub(crate) fn waiting_at(
    fleet: &Fleet,
    number: usize,
    options: &str,
    before: &str,
    statement: &str,
) -> (Child, BufReader<ChildStderr>) {
    let mut psql = fleet.demo.psql(number);
    let options = format!("{options} -c backhaul.progress=on -c backhaul.on_relocation=wait");
    psql.env("PGOPTIONS", options).args(["-Atq", "-v", "VERBOSITY=verbose", "-c", before, "-c", statement]);
    let mut client = psql.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(client.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with("NOTICE:  00000: job "), "{line}");
    (client, said)
}

/// What a client has been told at its end.
pub(crate) fn told((client, mut said): (Child, BufReader<ChildStderr>)) -> String {
    let mut errors = String::new();
    said.read_to_string(&mut errors).unwrap();
    format!("{}{errors}", both(&client.wait_with_output().unwrap()))
}

fn log(fleet: &Fleet, number: usize) -> String {
    std::fs::read_to_string(fleet.demo.node_dir(number).join("node.log")).unwrap()
}

#[test]
fn a_client_waits_on_while_the_registry_is_away_and_gets_its_row() {
    let fleet = Fleet::mortal(&["--rows", "2000"]);
    let set = "SET backhaul.debug_pausepoints = 'backup.after_export:hold'";
    let backup = format!("BACKUP DATABASE movr INTO 'nodelocal://1/w' WITH {WEST}");
    let client = waiting_at(&fleet, 3, BESIDE, set, &backup);
    let job = fleet.registry("SELECT id FROM registry.jobs");
    fleet.until_held(&job, "backup.after_export");
    kill(fleet.demo.server_pid(1), Signal::SIGKILL).unwrap();
    until_in(PATIENCE, "the wait to have missed the registry", || match log(&fleet, 3) {
        said if said.contains("a client waits on for the end of a job") => Ok(()),
        said => Err(said),
    });
    fleet.demo.promote(2);
    fleet.let_go(&job, "backup.after_export");
    let told = told(client);
    assert!(told.contains(&format!("{job}|succeeded|1")), "{told}");
    assert_eq!(fleet.registry("SELECT count(*) FROM registry.jobs"), "1");
}

#[test]
fn a_job_that_is_lost_while_it_is_waited_for_is_told_on_every_node() {
    let fleet = Fleet::mortal(&["--voters", "1", "--rows", "2000"]);
    fleet.cut_off(2);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/lost' WITH {WEST}, DETACHED");
    let job = fleet.held(&statement, "backup.after_lock");
    // Node 1 has given out the id.
    let client = waiting_at(&fleet, 3, BESIDE, "", &format!("SHOW JOB WHEN COMPLETE {job}"));
    kill(fleet.demo.server_pid(1), Signal::SIGKILL).unwrap();
    fleet.demo.promote(2);
    let told = told(client);
    assert!(told.contains(&format!("ERROR:  XXUUU: job {job} could not be loaded")), "{told}");
    assert!(told.contains("HINT:  The job may not have succeeded."), "{told}");
}

/// Sends a text to node 1, whose server's synchronous standby is frozen; breaks the one connection that waits for it in
/// `statement`, which is committed by then; and gives what the client has heard in the end.
fn unanswered(fleet: &Fleet, statement: &str, text: &str) -> String {
    fleet.demo.signal_server(2, Signal::SIGSTOP);
    let mut psql = fleet.demo.psql(1);
    let client = psql.args(["-Atq", "-v", "VERBOSITY=verbose", "-c", text]);
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let broken = format!(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE wait_event = 'SyncRep' AND query LIKE '%{statement}%' AND pid <> pg_backend_pid()"
    );
    until("the commit to wait", || {
        let seen = both(&fleet.demo.psql_direct(1).args(["-Atc", &broken]).output().unwrap());
        if seen.trim() == "1" { Ok(()) } else { Err(seen) }
    });
    until("its gateway to ask again", || match log(fleet, 1) {
        said if said.contains("whether the job was made is not known yet") => Ok(()),
        said => Err(said),
    });
    fleet.demo.signal_server(2, Signal::SIGCONT);
    both(&client.wait_with_output().unwrap()).trim().to_owned()
}

#[test]
fn a_job_whose_making_was_not_answered_is_there_once() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/o' WITH {WEST}, DETACHED");
    let job = unanswered(&fleet, "INSERT INTO registry.jobs", &statement);
    assert!(job.parse::<i64>().is_ok(), "{job}");
    assert_eq!(fleet.registry("SELECT string_agg(id::text, ' ') FROM registry.jobs"), job);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
}

/// The jobs of a text of several statements are written one by one, and are there together.
#[test]
fn jobs_of_one_text_whose_end_was_not_answered_are_there_once() {
    let fleet = Fleet::start(&["--rows", "500"]);
    // Of all commits only that which makes them be there waits for the standby.
    for statement in ["ALTER SYSTEM SET synchronous_commit = 'local'", "SELECT pg_reload_conf()"] {
        run(fleet.demo.psql_direct(1).args(["-Atqc", statement]));
    }
    fleet.registry(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
                        $$BEGIN SET LOCAL synchronous_commit = on; RETURN NEW; END$$;
                    CREATE TRIGGER wait AFTER UPDATE ON registry.jobs FOR EACH ROW
                        WHEN (OLD.status = 'undecided') EXECUTE FUNCTION wait()",
    );
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/o' WITH {WEST}, DETACHED");
    let jobs = unanswered(&fleet, "DELETE FROM registry.transactions", &format!("{statement}; {statement}"));
    assert_eq!(fleet.registry("SELECT string_agg(id::text, E'\\n' ORDER BY id) FROM registry.jobs"), jobs);
    assert_eq!(jobs.lines().count(), 2);
    for job in jobs.lines() {
        assert_eq!(fleet.end_of(job), ("succeeded".to_owned(), String::new()));
    }
}

#[test]
fn what_belongs_to_a_seal_is_written_before_it_or_the_job_fails() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://2/s' WITH {WEST}, DETACHED");
    let job = fleet.held(&statement, "backup.after_record");
    let root = fleet.demo.node_dir(2).join("extern/s");
    let is_body = |file: &&PathBuf| file.file_name().unwrap().to_string_lossy().starts_with("MANIFEST-");
    let body = files_in(&root).iter().find(is_body).unwrap().clone();
    std::fs::create_dir(body.with_file_name("BACKUP_MANIFEST-CHECKSUM")).unwrap();
    fleet.let_go(&job, "backup.after_record");
    let (status, error) = fleet.end_of(&job);
    assert_eq!(status, "failed");
    assert!(error.contains("the store at nodelocal://2/s"), "{error}");
    assert!(files_in(&root).is_empty(), "{:?}", files_in(&root));

    let job = fleet.held(&statement, "backup.after_checksum");
    let names = || -> Vec<String> {
        let files = files_in(&root);
        files.iter().map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect()
    };
    for (name, is_there) in [("BACKUP_MANIFEST-CHECKSUM", true), ("RESTORE.txt", true), ("BACKUP_MANIFEST", false)] {
        assert_eq!(names().iter().any(|file| file == name), is_there, "{name}");
    }
    fleet.let_go(&job, "backup.after_checksum");
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let shown = fleet.demo.ask(1, "SHOW BACKUP FROM LATEST IN 'nodelocal://2/s' WITH check_files");
    assert!(shown.contains("movr|public|rides|table|full|"), "{shown}");
}

#[test]
fn a_node_that_holds_files_is_waited_for_before_they_are_given_up() {
    let mut fleet = Fleet::mortal(&ONE_SHARD);
    let set = "SET backhaul.debug_pausepoints = 'backup.after_lock:hold'";
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/h' WITH {FILTER}");
    // The client waits at a node that has no part in it.
    let client = waiting_at(&fleet, 2, BESIDE, set, &statement);
    let job = fleet.registry("SELECT id FROM registry.jobs");
    fleet.until_held(&job, "backup.after_lock");
    let first: usize = fleet.job(&job, "coordinator_id").parse().unwrap();
    let own = fleet.demo.node_dir(first).join("extern");
    // Nothing but a lock is there: no span tells of it.
    assert_eq!(files_in(&own).len(), 1);
    fleet.end_node(first, Signal::SIGKILL);
    assert_eq!(fleet.demo.ask(1, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    let silent = format!("node {first} does not answer, and its own directory may hold files of the backup");
    let not_yet = format!("reverting|what the job has made is not removed yet: {silent}");
    until_in(PATIENCE, "the job to say what it waits for, and to wait without a coordinator", || {
        let seen = fleet.job(&job, "concat_ws('|', status, running_status, coordinator_id)");
        if seen == not_yet { Ok(()) } else { Err(seen) }
    });
    let told = told(client);
    assert!(told.contains("ERROR:  57014: job canceled by user"), "{told}");
    assert!(told.contains(&format!("DETAIL:  What job {job} has made could not be removed yet, and is tried again")));
    fleet.start_node(first);
    assert_eq!(fleet.end_of(&job), ("canceled".to_owned(), "job canceled by user".to_owned()));
    assert!(files_in(&own).is_empty(), "{:?}", files_in(&own));
    assert_eq!(fleet.job(&job, "cardinality(execution_errors)"), "0", "nothing was left behind");
}

#[test]
fn only_runs_in_a_row_that_bring_nothing_are_counted() {
    let mut fleet = Fleet::mortal(&[&ONE_SHARD[..6], &["--rows", "2000"]].concat());
    let points = ["backup.after_lock", "backup.after_points", "backup.after_first_span"];
    let holds: Vec<String> = points.iter().map(|point| format!("{point}:hold")).collect();
    let set = format!("SET backhaul.debug_pausepoints = '{}'", holds.join(","));
    let statement = |name: &str| format!("BACKUP DATABASE movr INTO 'nodelocal://1/{name}' WITH {FILTER}, DETACHED");
    let held = |fleet: &Fleet, name: &str| {
        let made = run(fleet.demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-Atqc", &set, "-c", &statement(name)]));
        let job = made.trim().to_owned();
        fleet.until_held(&job, points[0]);
        job
    };
    let counted = |fleet: &Fleet, job: &str| kept(fleet, job, "fruitless", "");
    let coordinator = |fleet: &Fleet, job: &str| -> usize { fleet.job(job, "coordinator_id").parse().unwrap() };
    let counts = |fleet: &Fleet, job: &str, runs: u32| {
        fleet.registry(&format!(
            "INSERT INTO registry.job_info (job_id, key, value) VALUES ({job}, 'fruitless', '{runs}')
             ON CONFLICT (job_id, key) DO UPDATE SET value = excluded.value"
        ));
    };

    let job = held(&fleet, "many");
    assert_eq!(counted(&fleet, &job), "1");
    fleet.registry(&format!("UPDATE registry.jobs SET num_runs = 200 WHERE id = {job}"));
    let drained = coordinator(&fleet, &job);
    fleet.end_node(drained, Signal::SIGTERM);
    fleet.until_held(&job, points[1]);
    assert_eq!(counted(&fleet, &job), "1", "the run that was drained does not count");
    fleet.let_go(&job, points[1]);
    fleet.until_held(&job, points[2]);
    assert_eq!(counted(&fleet, &job), "", "a span is done");
    assert_eq!(fleet.job(&job, "num_runs"), "201");
    fleet.start_node(drained);
    fleet.until_all_live();
    fleet.let_go(&job, points[2]);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));

    let job = held(&fleet, "resumed");
    counts(&fleet, &job, 60);
    assert_eq!(fleet.demo.ask(1, &format!("PAUSE JOB {job}")), "PAUSE JOBS 1");
    until("the job to be paused", || {
        let seen = fleet.job(&job, "status");
        if seen == "paused" { Ok(()) } else { Err(seen) }
    });
    assert_eq!(fleet.demo.ask(1, &format!("RESUME JOB {job}")), "RESUME JOBS 1");
    for point in &points[1..] {
        fleet.until_held(&job, point);
        fleet.let_go(&job, point);
    }
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));

    let job = held(&fleet, "fruitless");
    counts(&fleet, &job, 60);
    let killed = coordinator(&fleet, &job);
    fleet.end_node(killed, Signal::SIGKILL);
    let told = "the job was begun 60 times in a row, and nothing came of it".to_owned();
    assert_eq!(fleet.end_of(&job), ("failed".to_owned(), told));
}
