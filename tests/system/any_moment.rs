//! Any one process of a fleet is killed at any moment of a backup and of a restore. The crash matrix strikes between two
//! steps of a job's story, where it is held; this strikes wherever it happens to be, on the way from a client's statement to
//! the job's end.
//!
//! `cargo test` does it a few times, and `scripts/any-moment` as often as it is told.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::crash::FILTER;
use crate::support::aftermath::{Scene, is_understood};
use crate::support::demo::psql;
use crate::support::faults::Fleet;
use crate::support::{both, descendants, until};

/// As in the crash matrix: n1 leads the shard, and holds the registry and the files; jobs run on n4 and n5 and read from n3.
/// A demo ends with the last process that it has started: n6 is never killed.
const LAYOUT: [&str; 8] = [
    "--nodes",
    "6",
    "--servers",
    "3",
    "--demo-locality",
    "region=us-east-1,zone=a:region=us-east-1,zone=b:region=us-west-1,zone=a:region=us-west-1,zone=b:region=us-west-1,zone=b:region=eu-west-1",
    "--rows",
    "30000",
];
const MORTAL: std::ops::RangeInclusive<usize> = 1..=5;

/// Any number below `limit`.
fn any(limit: usize) -> usize {
    (RandomState::new().build_hasher().finish() % limit as u64) as usize
}

/// A process that is to die, and what it is called. The demo itself takes its fleet with it, and is started again.
fn any_process(fleet: &Fleet) -> (Pid, String) {
    let servers = || MORTAL.filter(|number| fleet.demo.has_server(*number));
    let named = |pid: &Pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let words = line.split_whitespace().filter(|word| !word.starts_with("postgresql://"));
        let words: Vec<&str> = words.map(|word| word.rsplit('/').next().unwrap_or(word)).take(5).collect();
        (*pid, words.join(" "))
    };
    let of_servers = || servers().flat_map(|number| descendants(fleet.demo.server_pid(number)));
    let of_nodes = || MORTAL.flat_map(|number| descendants(fleet.pid(number)));
    let chosen: Vec<(Pid, String)> = match any(6) {
        0 => of_servers().map(|pid| named(&pid)).collect(),
        // Which are there for short times only.
        1 => of_nodes().map(|pid| named(&pid)).collect(),
        2 => servers().map(|number| (fleet.demo.server_pid(number), format!("server {number}"))).collect(),
        3 => fleet.demo.reaper().into_iter().chain([fleet.demo.pid()]).map(|pid| named(&pid)).collect(),
        _ => Vec::new(),
    };
    if chosen.is_empty() {
        let number = any(*MORTAL.end()) + 1;
        return (fleet.pid(number), format!("node {number}"));
    }
    chosen[any(chosen.len())].clone()
}

/// What came of a job whose fleet lost a process.
struct Outcome {
    /// What the client was told: the job's id, or an error.
    said: String,
    /// The job's id, status and error, if it was ever made.
    job: Option<[String; 3]>,
}

impl Outcome {
    fn status(&self) -> &str {
        self.job.as_ref().map_or("no job", |[_, status, _]| status)
    }

    /// It has succeeded, or has failed for a reason that is told; a client that was told an id has its job.
    #[track_caller]
    fn assert_told(&self) {
        let error = match &self.job {
            None => &self.said,
            Some([id, status, error]) => {
                assert!(id == &self.said || is_refusal(&self.said), "{id}: {}", self.said);
                if status == "succeeded" {
                    return;
                }
                assert_eq!(status, "failed");
                error
            }
        };
        assert!(is_refusal(error), "{error}");
    }
}

/// An error that its reader understands, and no job's id.
fn is_refusal(said: &str) -> bool {
    is_understood(said) && said.parse::<i64>().is_err()
}

/// Runs a detached statement, kills a process at this moment after its beginning, and waits for what comes of it.
#[track_caller]
fn strike(scene: &mut Scene, statement: &str, moment: Duration) -> Outcome {
    let newest = scene.fleet.registry("SELECT coalesce(max(id), 0) FROM registry.jobs");
    let mut client = scene.fleet.demo.psql(any(scene.fleet.demo.nodes.len()) + 1);
    let client = client.args(["-v", "VERBOSITY=verbose", "-Atqc", statement]);
    let mut client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(moment);
    let (pid, killed) = any_process(&scene.fleet);
    // One that has just ended by itself was nobody's loss.
    let _ = kill(pid, Signal::SIGKILL);
    let at_once = any(2) == 0;
    // Some must come back for anything to go on, as any service does: the registry, the target of restores and the files of
    // backups are at n1, and commits there wait for n2.
    let back = |number: usize| at_once || number <= 2;
    let when = if at_once { "back at once" } else { "back after the job" };
    eprint!("{killed}, {when} | ");
    until("the statement to end", || {
        scene.start_ended(back);
        client.try_wait().unwrap().ok_or_else(|| killed.clone())
    });
    let said = both(&client.wait_with_output().unwrap()).trim().to_owned();
    let job = format!(
        "SELECT finished IS NOT NULL, id, status, error FROM registry.jobs WHERE id > {newest} ORDER BY id LIMIT 1"
    );
    let url = scene.fleet.demo.direct_url(1).replace("/movr?", "/backhaul?");
    let mut sure = false;
    let job = until("the job to end", || {
        scene.start_ended(back);
        let output = psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atqc", &job]).output().unwrap();
        let seen = both(&output).trim().to_owned();
        match seen.split_once('|') {
            Some(("t", job)) if output.status.success() => Ok(job.splitn(3, '|').map(str::to_owned).collect()),
            // A statement whose client was told of an error may yet be done, as long as its session has not ended.
            None if output.status.success() && !sure => {
                scene.bring_back();
                sure = true;
                Err(seen)
            }
            None if output.status.success() => Ok(Vec::new()),
            _ => Err(seen),
        }
    });
    Outcome { said, job: job.try_into().ok() }
}

fn backup(scene: &Scene, name: &str) -> String {
    format!("BACKUP DATABASE movr INTO '{}' WITH {FILTER}, DETACHED", scene.collection(name))
}

fn restore(scene: &Scene, name: &str) -> String {
    let uri = scene.collection(name);
    format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'again', {FILTER}, DETACHED")
}

/// Runs a statement in peace, and gives how long its job took.
#[track_caller]
fn in_peace(scene: &Scene, statement: &str) -> Duration {
    let begun = Instant::now();
    let job = scene.fleet.demo.ask(1, statement);
    assert_eq!(scene.fleet.end_of(&job), ("succeeded".to_owned(), String::new()), "{job}");
    begun.elapsed()
}

/// A backup that loses a process, and a restore of what it made.
#[track_caller]
fn struck_backup(scene: &mut Scene, name: &str, moment: Duration) -> Outcome {
    let outcome = strike(scene, &backup(scene, name), moment);
    scene.bring_back();
    outcome.assert_told();
    scene.assert_files(name, outcome.status() == "succeeded");
    scene.assert_nothing_left();
    if outcome.status() == "succeeded" {
        in_peace(scene, &restore(scene, name));
        scene.assert_equal_and_drop(&[1]);
        scene.assert_nothing_left();
    }
    outcome
}

/// A restore that loses a process.
#[track_caller]
fn struck_restore(scene: &mut Scene, moment: Duration) -> Outcome {
    let outcome = strike(scene, &restore(scene, "base"), moment);
    scene.bring_back();
    outcome.assert_told();
    if outcome.status() == "succeeded" {
        scene.assert_equal_and_drop(&[1]);
    }
    scene.assert_nothing_left();
    outcome
}

#[test]
fn whatever_process_is_killed_at_whatever_moment_jobs_end_right_and_leave_nothing() {
    let rounds = std::env::var("BACKHAUL_ANY_MOMENT").map_or(3, |rounds| rounds.parse().unwrap());
    let mut scene = Scene { disk: None, fleet: Fleet::mortal(&LAYOUT), store: None, primaries_stay: true };
    let whole = [in_peace(&scene, &backup(&scene, "base")), in_peace(&scene, &restore(&scene, "base"))];
    scene.assert_equal_and_drop(&[1]);
    for number in 0..rounds {
        for (what, whole) in ["backup", "restore"].into_iter().zip(whole) {
            let begun = Instant::now();
            // A little longer than it takes: its last writes are in it, and what is done behind them.
            let part = any(120);
            let moment = whole.mul_f64(part as f64 / 100.0);
            eprint!("{what} | {part} % of {:.1} s | ", whole.as_secs_f64());
            let outcome = match what {
                "backup" => struck_backup(&mut scene, &format!("b{number}"), moment),
                _ => struck_restore(&mut scene, moment),
            };
            let error = outcome.job.as_ref().map_or(&outcome.said, |[_, _, error]| error);
            eprintln!("{} | {:.1} s {error}", outcome.status(), begun.elapsed().as_secs_f64());
        }
    }
}
