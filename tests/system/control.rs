//! What clients may ask of running jobs, and what they are told while they wait.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use backup::PAUSEPOINTS;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::{Demo, psql};
use crate::support::faults::Fleet;
use crate::support::store::files_in;
use crate::support::wire::Wire;
use crate::support::{both, run, until};

const RATE: &str = "CLUSTER SETTING bulkio.backup.node_rate_limit";

/// A fleet whose backups are at work, reading rows, for minutes: until the limit is lifted.
fn slow() -> Demo {
    let demo = Demo::start(&["--rows", "20000"]);
    assert_eq!(demo.ask(1, &format!("SET {RATE} = '64KiB'")), "SET CLUSTER SETTING");
    demo.until_settings_known();
    demo
}

fn lift_the_limit(demo: &Demo) {
    assert_eq!(demo.ask(1, &format!("RESET {RATE}")), "SET CLUSTER SETTING");
}

fn backup(demo: &Demo) -> String {
    let job = demo.ask(1, "BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH DETACHED");
    assert!(job.parse::<i64>().is_ok(), "{job}");
    job
}

/// A statement's command tag, or its error.
fn tag(demo: &Demo, number: usize, statement: &str) -> String {
    let output = demo.psql(number).args(["-At", "-v", "VERBOSITY=verbose", "-c", statement]).output().unwrap();
    both(&output).trim_end().to_owned()
}

#[track_caller]
fn until_status(demo: &Demo, job: &str, status: &str) {
    until(&format!("the job to be {status}"), || {
        let row = demo.ask(2, &format!("SHOW JOB {job}"));
        if row.contains(&format!("|{status}|")) { Ok(()) } else { Err(row) }
    });
}

/// I9, step by step: the request, for as long as the job's coordinator is silent, and what is done then.
#[test]
fn a_request_is_there_to_be_seen_until_it_is_heeded() {
    let demo = Demo::start(&[]);
    let point = "backup.after_lock";
    let west = "EXECUTION LOCALITY = 'region=us-west-1'";
    for (verb, requested, done) in [("PAUSE", "pause-requested", "paused"), ("CANCEL", "cancel-requested", "canceled")]
    {
        let set = format!("SET backhaul.debug_pausepoints = '{point}:hold'");
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/i9' WITH {west}, DETACHED");
        let job = run(demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-qAt", "-c", &set, "-c", &statement]));
        let job = job.trim();
        let coordinator = until("the job to be held", || {
            let row = demo.ask(1, &format!("SHOW JOB {job}"));
            let held = row.contains(&format!("|running|holding at pause point \"{point}\"|"));
            if held { Ok(row.split('|').nth(13).unwrap().parse::<usize>().unwrap()) } else { Err(row) }
        });
        // No other node takes the job over, however long this lasts.
        let live = "UPDATE registry.sessions SET expires_at = clock_timestamp() + interval '1 hour' WHERE node_id";
        let live = format!("{live} = {coordinator}");
        let coordinator = Pid::from_raw(demo.nodes[coordinator - 1].pid);
        kill(coordinator, Signal::SIGSTOP).unwrap();
        demo.registry(&live);
        let answer = tag(&demo, 2, &format!("{verb} JOB {job}"));
        let row = demo.ask(1, &format!("SHOW JOB {job}"));
        kill(coordinator, Signal::SIGCONT).unwrap();
        assert_eq!(answer, format!("{verb} JOBS 1"));
        assert!(row.contains(&format!("|{requested}|")), "{row}");
        until_status(&demo, job, done);
    }
}

/// Has the registry write down what each job says in `column`, one after the other, in `public.said`.
#[track_caller]
fn hear(fleet: &Fleet, column: &str) {
    fleet.registry(&format!(
        "CREATE TABLE public.said (n bigserial, job int8, status text);
         CREATE FUNCTION public.hear() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
             INSERT INTO public.said (job, status) VALUES (NEW.id, NEW.{column}); RETURN NULL; END $$;
         CREATE TRIGGER hears AFTER UPDATE OF {column} ON registry.jobs FOR EACH ROW
             WHEN (OLD.{column} IS DISTINCT FROM NEW.{column}) EXECUTE FUNCTION public.hear()"
    ));
}

/// I9 of one job: what it was, one after the other.
#[test]
fn a_running_job_is_paused_and_then_canceled_step_by_step() {
    let fleet = Fleet::start(&["--rows", "100"]);
    hear(&fleet, "status");
    let job = fleet.held("BACKUP DATABASE movr INTO 'nodelocal://1/i9' WITH DETACHED", "backup.after_first_span");
    assert_eq!(tag(&fleet.demo, 2, &format!("PAUSE JOB {job}")), "PAUSE JOBS 1");
    until_status(&fleet.demo, &job, "paused");
    assert_eq!(tag(&fleet.demo, 2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    assert_eq!(fleet.end_of(&job).0, "canceled");
    let told = fleet.registry("SELECT string_agg(status, ' ' ORDER BY n) FROM public.said");
    assert_eq!(told, "pause-requested paused cancel-requested reverting canceled");
}

/// I9: a running job is paused; and as it is then, canceled (below).
#[test]
fn a_job_pauses_and_goes_on() {
    let demo = slow();
    let job = backup(&demo);
    assert_eq!(tag(&demo, 2, &format!("PAUSE JOB {job} WITH REASON = 'the rush hour'")), "PAUSE JOBS 1");
    until_status(&demo, &job, "paused");
    // As CockroachDB: whoever waits for the end waits through a pause.
    let wait = format!("SHOW JOB WHEN COMPLETE {job}");
    let waiting = demo.psql(4).args(["-Atc", &wait]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let row = demo.ask(4, &format!("SHOW JOB {job}"));
    assert!(row.contains("|paused|the rush hour|"), "{row}");
    // What is so already is no error, and counts.
    assert_eq!(tag(&demo, 3, &format!("PAUSE JOBS VALUES ({job}), (NULL)")), "PAUSE JOBS 1");
    // All or none.
    let told = tag(&demo, 1, &format!("RESUME JOBS VALUES ({job}), (1)"));
    assert!(told.starts_with("ERROR:  XXUUU: job with ID 1 does not exist"), "{told}");
    until_status(&demo, &job, "paused");

    let chosen = format!("CREATE TABLE chosen AS SELECT {job} AS id, 'because' AS why");
    run(demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-qc", &chosen]));
    lift_the_limit(&demo);
    assert_eq!(tag(&demo, 3, "RESUME JOBS (SELECT id, why FROM chosen)"), "RESUME JOBS 1");
    let row = both(&waiting.wait_with_output().unwrap());
    assert!(row.contains("|succeeded|"), "{row}");
    let row = demo.ask(4, "SHOW JOBS WHEN COMPLETE SELECT id FROM chosen");
    assert!(row.starts_with(&format!("{job}|BACKUP|")) && row.contains("|succeeded|"), "{row}");
}

#[test]
fn a_cancelled_job_leaves_no_backup() {
    let demo = slow();
    let job = backup(&demo);
    assert_eq!(tag(&demo, 4, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    let other = backup(&demo);
    assert_eq!(tag(&demo, 1, &format!("PAUSE JOB {other}")), "PAUSE JOBS 1");
    until_status(&demo, &other, "paused");
    assert_eq!(tag(&demo, 4, "CANCEL ALL BACKUP JOBS"), "CANCEL JOBS 1");
    for job in [&job, &other] {
        let row = demo.ask(2, &format!("SHOW JOB WHEN COMPLETE {job}"));
        assert!(row.contains("|canceled|") && row.contains("|job canceled by user|"), "{row}");
        assert_eq!(tag(&demo, 3, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
        for (verb, refusal) in [("PAUSE", "requested to be paused"), ("RESUME", "resumed")] {
            let told = tag(&demo, 3, &format!("{verb} JOB {job}"));
            let expected = format!("ERROR:  XXUUU: job with status canceled cannot be {refusal}");
            assert!(told.starts_with(&expected), "{told}");
        }
    }
    until("what was written to be gone", || {
        let left = files_in(&demo.node_dir(1).join("extern"));
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

/// E18: a job that goes on is not stopped by its own lock, and has one only (CockroachDB's pausepoint is called
/// `backup.after.write_lock`; ours are words). E17: by another's it is.
#[test]
fn a_directory_has_one_lock() {
    let demo = Demo::start(&["--nodes", "2", "--rows", "300"]);
    let locks = || {
        let files = files_in(&demo.node_dir(1).join("extern"));
        files.into_iter().filter(|file| file.to_string_lossy().contains("/BACKUP-LOCK-")).collect::<Vec<_>>()
    };
    let make = |number: usize| {
        let points = "SET backhaul.debug_pausepoints = 'backup.after_lock,backup.after_first_span'";
        let statement = "BACKUP DATABASE movr INTO 'nodelocal://1/locks' WITH DETACHED";
        let job = run(demo.psql(number).args(["-qAt", "-c", points, "-c", statement])).trim().to_owned();
        until_status(&demo, &job, "paused");
        job
    };
    let job = make(1);
    let lock = locks();
    assert!(lock.len() == 1 && lock[0].to_string_lossy().ends_with(&job), "{lock:?}");
    for (status, number) in [("paused", 1), ("succeeded", 2)] {
        assert_eq!(tag(&demo, number, &format!("RESUME JOB {job}")), "RESUME JOBS 1");
        until_status(&demo, &job, status);
        assert_eq!(locks(), lock, "{status}");
    }
    let other = make(2);
    let lock = locks().into_iter().find(|file| file.to_string_lossy().ends_with(&other)).unwrap();
    std::fs::write(lock.with_file_name("BACKUP-LOCK-7"), "").unwrap();
    assert_eq!(tag(&demo, 2, &format!("RESUME JOB {other}")), "RESUME JOBS 1");
    let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {other}"));
    let text = "already contains a `BACKUP-LOCK` file written by job 7";
    assert!(row.contains("|failed|") && row.contains(text), "{row}");
    // The code that a client gets who waits for the job from its beginning.
    let code = format!("SELECT result ->> 'code' FROM registry.jobs WHERE id = {other}");
    assert_eq!(demo.registry(&code), "42C01");
}

/// A removal is put off while its store is away, a job while no node matches; neither has a coordinator then.
#[test]
fn a_request_to_a_job_that_was_put_off_is_heeded_at_once() {
    let fleet = Fleet::start(&["--rows", "100"]);
    let put_off = |name: &str, as_if: &str| {
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/{name}' WITH DETACHED");
        let job = fleet.held(&statement, "backup.after_lock");
        fleet.registry(&format!(
            "UPDATE registry.jobs SET {as_if}, claim_id = NULL, claim_session = NULL, coordinator_id = NULL,
                    next_run = clock_timestamp() + interval '1 hour' WHERE id = {job}"
        ));
        job
    };
    let as_if = "status = 'reverting', ends_as = 'canceled', error = 'away', reverting_since = clock_timestamp()";
    let reverting = put_off("reverting", as_if);
    assert_eq!(tag(&fleet.demo, 2, &format!("PAUSE JOB {reverting}")), "PAUSE JOBS 1");
    until_status(&fleet.demo, &reverting, "paused");
    assert_eq!(tag(&fleet.demo, 2, &format!("RESUME JOB {reverting}")), "RESUME JOBS 1");
    let running = put_off("running", "unmatched_since = clock_timestamp()");
    assert_eq!(tag(&fleet.demo, 2, &format!("CANCEL JOB {running}")), "CANCEL JOBS 1");
    for job in [&reverting, &running] {
        assert_eq!(fleet.end_of(job).0, "canceled");
    }
    let left = files_in(&fleet.demo.node_dir(1).join("extern"));
    assert!(left.is_empty(), "{left:?}");
}

/// A node that has a session and is known to no other, as to a coordinator that has just begun.
const UNKNOWN: &str = "
    INSERT INTO registry.nodes SELECT 99, gen_random_uuid(), 'host:1', locality, shard, build, started_at
    FROM registry.nodes WHERE id = 2;
    INSERT INTO registry.sessions SELECT 99, gen_random_uuid(), 1, gen_random_uuid(), 'host:1', 'infinity'";

#[test]
fn nothing_is_removed_while_a_node_that_was_asked_to_write_and_is_not_known_here_has_a_session() {
    let fleet = Fleet::start(&["--rows", "100"]);
    let job = fleet.held("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED", "backup.after_lock");
    fleet.registry(UNKNOWN);
    fleet.registry(&format!("INSERT INTO registry.job_info VALUES ({job}, 'holder/99', '99')"));
    assert_eq!(tag(&fleet.demo, 2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    let waiting = "reverting|what the job has made is not removed yet: node 99 cannot be reached, and has a session";
    until("the removal to wait for the session", || {
        let seen = fleet.job(&job, "concat_ws('|', status, running_status)");
        if seen == waiting { Ok(()) } else { Err(seen) }
    });
    let files = || files_in(&fleet.demo.node_dir(1).join("extern"));
    assert_eq!(files().len(), 1);
    fleet.registry("DELETE FROM registry.sessions WHERE node_id = 99");
    assert_eq!(fleet.end_of(&job).0, "canceled");
    assert!(files().is_empty(), "{:?}", files());
}

#[test]
fn nobody_waits_for_a_matching_node_that_was_never_asked_to_write() {
    let fleet = Fleet::start(&["--rows", "100"]);
    fleet.registry(UNKNOWN);
    let backup = "BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED";
    let job = fleet.held(backup, "backup.after_first_span");
    assert_eq!(tag(&fleet.demo, 2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    assert_eq!(fleet.end_of(&job).0, "canceled");
    let job = fleet.demo.ask(1, backup);
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
}

/// Nobody matches a job, its claim is to be given back for a while, and just before that is written it is canceled. By then
/// a node that matches is there again, to remove what it made.
const CANCELED_BETWEEN: &str = "
    CREATE FUNCTION registry.cancel() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE registry.jobs SET status = 'cancel-requested', filter = '' WHERE id = OLD.id;
        RETURN NULL;
    END $$;
    CREATE TRIGGER cancel BEFORE UPDATE ON registry.jobs FOR EACH ROW
        WHEN (OLD.status = 'running' AND OLD.unmatched_since IS NULL AND NEW.unmatched_since IS NOT NULL)
        EXECUTE FUNCTION registry.cancel()";

#[test]
fn a_job_that_is_cancelled_while_it_is_put_off_is_canceled_and_has_not_failed() {
    let fleet = Fleet::start(&["--rows", "100"]);
    fleet.registry(CANCELED_BETWEEN);
    let job = fleet.held("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH DETACHED", "backup.after_lock");
    fleet.registry(&format!(
        "UPDATE registry.jobs SET filter = 'region=mars', claim_id = NULL, claim_session = NULL, coordinator_id = NULL
         WHERE id = {job}"
    ));
    assert_eq!(fleet.end_of(&job), ("canceled".to_owned(), "job canceled by user".to_owned()));
    let left = files_in(&fleet.demo.node_dir(1).join("extern"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_backup_that_is_cancelled_leaves_nothing_unless_it_is_sealed() {
    let fleet = Fleet::start(&["--rows", "500"]);
    for point in PAUSEPOINTS.iter().filter(|point| point.starts_with("backup")) {
        let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/{point}' WITH DETACHED");
        let job = fleet.held(&statement, point);
        assert_eq!(tag(&fleet.demo, 2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
        let (status, error) = fleet.end_of(&job);
        let directory = fleet.demo.node_dir(1).join("extern").join(point);
        let left = files_in(&directory);
        let listed = fleet.demo.ask(1, &format!("SHOW BACKUPS IN 'nodelocal://1/{point}'"));
        if ["backup.after_seal", "backup.after_latest"].contains(point) {
            assert_eq!((status.as_str(), error.as_str()), ("succeeded", ""), "{point}");
            assert!(left.iter().any(|file| file.ends_with("BACKUP_MANIFEST")) && listed.starts_with("/20"), "{listed}");
        } else {
            assert_eq!((status.as_str(), error.as_str()), ("canceled", "job canceled by user"), "{point}");
            assert!(left.is_empty() && listed.is_empty(), "{point}: {left:?} {listed}");
            assert!(!directory.exists(), "{point} has left empty directories");
        }
    }
}

#[test]
fn an_attached_client_is_told_that_its_job_was_paused() {
    let demo = slow();
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://1/c'";
    let client = demo.psql(1).args(["-c", statement]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the job to be paused", || {
        let told = tag(&demo, 2, "PAUSE ALL BACKUP JOBS");
        if told == "PAUSE JOBS 1" { Ok(()) } else { Err(told) }
    });
    let told = both(&client.wait_with_output().unwrap());
    assert!(told.starts_with("ERROR:  job ") && told.contains(" was paused before it completed"), "{told}");
    assert_eq!(tag(&demo, 3, "RESUME ALL RESTORE JOBS"), "RESUME JOBS 0");
    lift_the_limit(&demo);
    assert_eq!(tag(&demo, 3, "RESUME ALL BACKUP JOBS"), "RESUME JOBS 1");
    let job = demo.ask(1, "SHOW JOBS").split('|').next().unwrap().to_owned();
    let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {job}"));
    assert!(row.contains("|succeeded|"), "{row}");
}

#[test]
fn jobs_belong_to_their_users() {
    let demo = Demo::start(&[]);
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-c", "CREATE ROLE plain LOGIN"]));
    let job = stuck(&demo);
    let as_plain = |statement: &str| {
        let url = demo.nodes[3].url.replace("root@", "plain@");
        both(&psql(&url).args(["-At", "-v", "VERBOSITY=verbose", "-c", statement]).output().unwrap())
    };
    for verb in ["PAUSE", "RESUME", "CANCEL"] {
        let told = as_plain(&format!("{verb} JOB {job}"));
        let expected = format!("ERROR:  42501: user plain does not have privileges for job {job}");
        assert!(told.starts_with(&expected), "{told}");
        // Of the jobs that are not theirs, ALL takes none.
        assert_eq!(as_plain(&format!("{verb} ALL BACKUP JOBS")), format!("{verb} JOBS 0\n"));
    }
    let point = "SET backhaul.debug_pausepoints = 'backup.after_lock'";
    let url = demo.nodes[0].url.replace("root@", "plain@");
    let told = psql(&url).args(["-c", point, "-c", "BACKUP DATABASE movr INTO 'nodelocal://1/c'"]).output().unwrap();
    let told = both(&told);
    assert!(told.contains("ERROR:  only superusers may set pausepoints for a job"), "{told}");
}

/// A job that no node knows how to run: what becomes of it is what the test writes. Gives its id.
fn stuck(demo: &Demo) -> &'static str {
    let make = "INSERT INTO registry.jobs (id, job_type, description, statement, user_name, filter, prefers, payload)
                VALUES (77, 'STUCK', '', '', 'root', '', '{}', '{}')";
    write(demo, make);
    "77"
}

fn write(demo: &Demo, statement: &str) {
    let registry = demo.direct_url(1).replace("/movr?", "/backhaul?");
    let ring = "SELECT pg_notify('backhaul_jobs', '')";
    run(psql(&registry).args(["-v", "ON_ERROR_STOP=1", "-q", "-c", statement, "-c", ring]));
}

const ENDS: &str = "UPDATE registry.jobs SET status = 'succeeded', finished = now() WHERE id = 77";

/// A client that waits; killed when dropped.
struct Waiting(Child);

impl Waiting {
    fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_client_that_waits_is_told_how_far_its_job_is() {
    let demo = Demo::start(&["--nodes", "2"]);
    let job = stuck(&demo);
    let mut client = demo.psql(2);
    client.args(["-At", "-c", &format!("SHOW JOB WHEN COMPLETE {job}")]);
    let mut client = Waiting::start(client.env("PGOPTIONS", "-c backhaul.progress=on"));
    let mut said = BufReader::new(client.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    // Each is heard before the next thing happens.
    assert_eq!(said.next().unwrap(), "NOTICE:  job 77: 0% done");
    write(&demo, "UPDATE registry.jobs SET fraction_completed = 0.42, running_status = 'loading rows' WHERE id = 77");
    let line = said.next().unwrap();
    assert!(line.starts_with("NOTICE:  job 77: 42% done, loading rows"), "{line}");
    write(&demo, "UPDATE registry.jobs SET status = 'reverting', running_status = NULL WHERE id = 77");
    let line = said.next().unwrap();
    assert!(line.starts_with("NOTICE:  job 77: reverting, 42% done"), "{line}");
    // I4
    let told = tag(&demo, 1, "CANCEL JOB 77");
    assert!(told.starts_with("ERROR:  XXUUU: job with status reverting cannot be requested to be canceled"), "{told}");
    // It has been heard of for two seconds by now.
    let doing = "exporting shard s1: 120 of 994 MB, 35 MB/s";
    let goes_on = format!("status = 'running', fraction_completed = 0.6, running_status = '{doing}'");
    write(&demo, &format!("UPDATE registry.jobs SET {goes_on} WHERE id = 77"));
    let line = said.next().unwrap();
    let left =
        line.strip_prefix(&format!("NOTICE:  job 77: 60% done, {doing}, about ")).unwrap_or_else(|| panic!("{line}"));
    assert!(left.ends_with(" left"), "{line}");
    write(&demo, ENDS);
    let mut row = String::new();
    client.0.stdout.take().unwrap().read_to_string(&mut row).unwrap();
    assert!(row.contains("|succeeded|") && said.next().is_none(), "{row}");
    // Who does not ask is not told.
    let quiet = demo.psql(2).args(["-At", "-c", &format!("SHOW JOB WHEN COMPLETE {job}")]).output().unwrap();
    assert!(quiet.stderr.is_empty() && both(&quiet).contains("|succeeded|"));
}

#[test]
fn a_client_that_backs_up_is_told_how_far_it_is() {
    let demo = Demo::start(&[]);
    // While a table is locked its backup does not end.
    let mut locker = Waiting::start(demo.psql_direct(1).arg("-q").stdin(Stdio::piped()));
    locker.0.stdin.as_mut().unwrap().write_all(b"BEGIN; LOCK TABLE rides;\n").unwrap();
    until("the table to be locked", || {
        let held = "SELECT count(*) FROM pg_locks WHERE relation = 'rides'::regclass AND mode = 'AccessExclusiveLock'";
        let seen = demo.ask(1, held);
        if seen == "1" { Ok(()) } else { Err(seen) }
    });
    let mut client = demo.psql(1);
    client.args(["-At", "-c", "SET backhaul.progress = true", "-c"]);
    client.arg("BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH EXECUTION LOCALITY = 'region=us-east-1,zone=a'");
    let mut client = Waiting::start(&mut client);
    let mut said = BufReader::new(client.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let line = said.next().unwrap();
    assert!(line.starts_with("NOTICE:  job ") && line.contains(": 0% done"), "{line}");
    drop(locker);
    let mut row = String::new();
    client.0.stdout.take().unwrap().read_to_string(&mut row).unwrap();
    assert!(row.contains("|succeeded|1.0|"), "{row}{:?}", said.collect::<Vec<_>>());
}

/// A rate is told of whoever has moved bytes for a second.
#[test]
fn a_job_says_how_fast_it_moves_bytes() {
    let fleet = Fleet::start(&["--rows", "500"]);
    hear(&fleet, "running_status");
    for (statement, point, doing) in [
        ("BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH DETACHED", "backup.after_first_span", "exporting shard s1"),
        (
            "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/c' WITH new_db_name = 'again', DETACHED",
            "restore.after_first_file",
            "loading rows",
        ),
    ] {
        let job = fleet.held(statement, point);
        const SECOND: Duration = Duration::from_millis(1100);
        let begun = Instant::now();
        until("a second to pass", || if begun.elapsed() > SECOND { Ok(()) } else { Err(String::new()) });
        fleet.let_go(&job, point);
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
        let rate = format!("{doing}: [0-9]+ of [0-9]+ MB, [0-9.]+ MB/s");
        let told = format!("SELECT count(*) > 0 FROM public.said WHERE job = {job} AND status ~ '^{rate}$'");
        assert_eq!(
            fleet.registry(&told),
            "t",
            "{}",
            fleet.registry("SELECT string_agg(status, '; ') FROM public.said")
        );
    }
}

#[test]
fn progress_comes_before_the_rows_and_a_wait_can_be_cancelled() {
    let demo = Demo::start(&["--nodes", "2"]);
    stuck(&demo);
    let mut wire = Wire::login(&demo.nodes[1].address, "movr");
    assert_eq!(wire.query("SET backhaul.progress = on").hear(), "C SET\nZ I");
    wire.parse("", "SHOW JOB WHEN COMPLETE 77").bind("", "", 0).execute("", 0).sync();
    assert_eq!(wire.hear_until(|tag| tag == b'N'), "1\n2\nN SNOTICE C00000 Mjob 77: 0% done");
    {
        let _canceller = wire.canceller();
        let heard = wire.hear();
        assert!(heard.starts_with("E SERROR C57014") && heard.ends_with("Z I"), "{heard}");
    }
    // Nothing that was meant for the wait comes later.
    assert_eq!(wire.query("SET backhaul.progress = off").hear(), "C SET\nZ I");
    wire.parse("", "SHOW JOB WHEN COMPLETE 77").bind("", "", 0).execute("", 0).sync();
    assert_eq!(wire.hear_until(|tag| tag == b'2'), "1\n2");
    write(&demo, ENDS);
    let heard = wire.hear();
    assert!(heard.starts_with("D 77|STUCK|") && heard.ends_with("C SHOW\nZ I"), "{heard}");
}

#[test]
fn controls_are_answered_in_either_protocol() {
    let demo = Demo::start(&["--nodes", "2", "--no-example-database"]);
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.query("PAUSE ALL BACKUP JOBS; CANCEL JOB NULL").hear(), "C PAUSE JOBS 0\nC CANCEL JOBS 0\nZ I");
        wire.parse("s", "RESUME JOBS SELECT 7 WHERE false").describe(b'S', "s").bind("p", "s", 0).execute("p", 0);
        wire.parse("", "SELECT 1").bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear(), "1\nt 0\nn\n2\nC RESUME JOBS 0\n1\n2\nD 1\nC SELECT 1\nZ I");
        for (text, expected) in [
            ("PAUSE JOB 1", "E SERROR CXXUUU Mjob with ID 1 does not exist"),
            ("PAUSE JOBS SELECT nothing", "E SERROR C42703 Mcolumn \"nothing\" does not exist P19"),
            ("CANCEL JOBS SELECT 'x'", "E SERROR C42804 Ma query that names jobs must give integers"),
            ("CANCEL JOBS SELECT 'é', nothing", "E SERROR C42703 Mcolumn \"nothing\" does not exist P25"),
        ] {
            assert_eq!(wire.query(text).hear(), format!("{expected}\nZ I"), "{text}");
            wire.parse("", text).bind("", "", 0).execute("", 0).bind("", "", 0).execute("", 0).sync();
            // The server judges the query when it is prepared.
            let before = if expected.contains("C42703") { "" } else { "1\n2\n" };
            assert_eq!(wire.hear(), format!("{before}{expected}\nZ I"), "{text}");
            // Inside a transaction it fails that, too.
            assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
            assert_eq!(wire.query(text).hear(), format!("{expected}\nZ E"), "{text}");
            assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
        }
        // What the query says is the user's, in the user's transaction.
        assert_eq!(wire.query("BEGIN; CREATE TEMP TABLE t AS SELECT 5 AS id").hear(), "C BEGIN\nC SELECT 1\nZ T");
        let heard = wire.query("SHOW JOBS TABLE t; PAUSE JOBS TABLE t").hear();
        assert!(heard.ends_with("C SHOW\nE SERROR CXXUUU Mjob with ID 5 does not exist\nZ E"), "{heard}");
        assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
    }
}

#[test]
fn an_option_of_the_connection_follows_a_relocated_job() {
    let demo = Demo::start(&[]);
    let statement = "BACKUP DATABASE movr INTO 'nodelocal://1/c' WITH EXECUTION LOCALITY = 'region=us-west-1'";
    let mut client = demo.psql(1);
    client.env("PGOPTIONS", "-c backhaul.on_relocation=wait").args(["-At", "-c", statement]);
    let row = run(&mut client);
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/c'
                   WITH new_db_name = 'again', EXECUTION LOCALITY = 'region=us-west-1'";
    let mut client = demo.psql(2);
    client.env("PGOPTIONS", "-c backhaul.on_relocation=WAIT").args(["-At", "-c", restore]);
    let row = run(&mut client);
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
}

#[test]
fn jobs_are_listed_with_the_latest_first_and_old_ones_not_at_all() {
    let fleet = Fleet::start(&["--nodes", "1", "--rows", "100"]);
    let point = "backup.after_lock";
    let held: Vec<String> = (1..=3)
        .map(|n| fleet.held(&format!("BACKUP DATABASE movr INTO 'nodelocal://1/c{n}' WITH DETACHED"), point))
        .collect();
    let listed = || -> Vec<String> {
        let rows = fleet.demo.ask(1, "SHOW JOBS");
        rows.lines().map(|row| row.split('|').next().unwrap().to_owned()).collect()
    };
    let newest_first: Vec<String> = held.iter().rev().cloned().collect();
    for job in &held {
        // A row that is written anew has another place in its table.
        fleet.registry(&format!("UPDATE registry.jobs SET running_status = running_status WHERE id = {job}"));
        assert_eq!(listed(), newest_first);
    }
    // What runs comes before what has ended, and what ended long ago is only there by its number.
    tag(&fleet.demo, 1, &format!("CANCEL JOB {}", held[2]));
    assert_eq!(fleet.end_of(&held[2]).0, "canceled");
    assert_eq!(listed(), [&*held[1], &held[0], &held[2]]);
    for (age, left) in [("11 hours", 3), ("13 hours", 2)] {
        let aged =
            format!("UPDATE registry.jobs SET finished = clock_timestamp() - interval '{age}' WHERE id = {}", held[2]);
        fleet.registry(&aged);
        assert_eq!(listed().len(), left, "{age}");
    }
    assert!(fleet.demo.ask(1, &format!("SHOW JOB {}", held[2])).contains("|canceled|"));
    tag(&fleet.demo, 1, "CANCEL ALL BACKUP JOBS");
}
