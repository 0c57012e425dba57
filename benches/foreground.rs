//! What users feel of a backup: pgbench on the leaseholder while nothing is backed up, while backups run that are pinned to a
//! region with an asynchronous standby, in each of its modes, and while backups run without a filter, which read the
//! leaseholder itself. They take turns in one go, and every figure is a ratio within its round, so it holds when the
//! machine's speed drifts.
//!
//! `cargo bench --bench foreground`, about five minutes. It judges nothing: in a fleet the standby and the nodes have
//! machines of their own, and here all of it shares this one's cores, so that what a pinned backup costs is mostly what
//! the same work costs anywhere on this machine.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "it prints its figures")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use support::demo::{Demo, psql};
use support::{postgres_program, run, until};

#[path = "../tests/support/mod.rs"]
mod support;

const ROUNDS: usize = 7;
/// Seconds of pgbench in each turn.
const TURN: &str = "6";
const CLIENTS: &str = "4";
/// Rides in the database that is backed up.
const ROWS: &str = "400000";

const PINNED: &str = "EXECUTION LOCALITY = 'region=us-west-1', DETACHED";

/// Without a backup, and with the options of one and the mode of a standby that it reads.
const WAYS: [(&str, Option<(&str, &str)>); 5] = [
    ("no backup", None),
    ("pinned to the standby's region, mode feedback", Some((PINNED, "feedback"))),
    ("pinned to the standby's region, mode paused", Some((PINNED, "paused"))),
    ("pinned to the standby's region, mode retry", Some((PINNED, "retry"))),
    ("unpinned, read from the leaseholder", Some(("DETACHED", "auto"))),
];

/// What pgbench's clients had in one turn.
#[derive(Clone, Copy)]
struct Felt {
    tps: f64,
    p99_ms: f64,
    backups: u32,
}

fn main() {
    let places = "region=us-east-1:region=us-west-1";
    let demo =
        Demo::start(&["--nodes", "2", "--servers", "2", "--voters", "1", "--demo-locality", places, "--rows", ROWS]);
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-qc", "CREATE DATABASE bench"]));
    let bench = demo.direct_url(1).replace("/movr?", "/bench?");
    run(postgres_program("pgbench").args(["-i", "-q", "-s", "10", &bench]).stderr(std::process::Stdio::null()));
    let mut rounds: Vec<Vec<Felt>> = Vec::new();
    for round in 0..=ROUNDS {
        let felt = WAYS.iter().map(|(_, options)| turn(&demo, &bench, *options)).collect();
        // The first round warms up.
        if round > 0 {
            rounds.push(felt);
        }
    }
    let of = |way: usize, value: &dyn Fn(&[Felt], Felt) -> f64| {
        median(rounds.iter().map(|felt| value(felt, felt[way])).collect())
    };
    println!("pgbench -c {CLIENTS} on the leaseholder, {ROUNDS} rounds of {TURN} s each way, medians");
    for (way, (name, options)) in WAYS.iter().enumerate() {
        if options.is_none() {
            let (tps, p99) = (of(way, &|_, felt| felt.tps), of(way, &|_, felt| felt.p99_ms));
            println!("{name}: {tps:.0} transactions a second, 99 % of them within {p99:.1} ms");
            continue;
        }
        let tps = of(way, &|felt, this| this.tps / felt[0].tps);
        let p99 = of(way, &|felt, this| this.p99_ms / felt[0].p99_ms);
        let backups = of(way, &|_, felt| f64::from(felt.backups));
        println!("{name}: {tps:.2} of the transactions, {p99:.2} of the time, {backups:.0} backups a turn");
    }
}

/// One turn of pgbench, with one backup after the other beside it.
fn turn(demo: &Demo, bench: &str, options: Option<(&str, &str)>) -> Felt {
    let (over, backups) = (AtomicBool::new(false), AtomicU32::new(0));
    let begun = AtomicBool::new(options.is_none());
    let logs = tempfile::tempdir().unwrap();
    let (tps, p99_ms) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let Some((options, mode)) = options else { return };
            let set = format!("SET backhaul.backup.standby_mode = '{mode}'");
            while !over.load(Ordering::Relaxed) {
                let backup = format!("BACKUP DATABASE movr INTO 'nodelocal://self/f' WITH {options}");
                let job = run(demo.psql(2).args(["-v", "ON_ERROR_STOP=1", "-Atqc", &set, "-c", &backup]));
                let job = job.trim();
                begun.store(true, Ordering::Relaxed);
                let row = demo.ask(2, &format!("SHOW JOB WHEN COMPLETE {job}"));
                assert!(row.contains("|succeeded|"), "{row}");
                backups.fetch_add(1, Ordering::Relaxed);
            }
        });
        until("the first backup to begin", || if begun.load(Ordering::Relaxed) { Ok(()) } else { Err(String::new()) });
        let felt = pgbench(bench, logs.path());
        over.store(true, Ordering::Relaxed);
        felt
    });
    // Room for the next turn, and no WAL of this one in it.
    for node in 1..=2 {
        let _ = std::fs::remove_dir_all(demo.node_dir(node).join("extern/f"));
    }
    run(psql(bench).args(["-qc", "CHECKPOINT"]));
    Felt { tps, p99_ms, backups: backups.into_inner() }
}

/// Transactions a second, and the time in milliseconds within which 99 of 100 were done.
fn pgbench(url: &str, logs: &Path) -> (f64, f64) {
    let prefix = logs.join("turn");
    let mut command = postgres_program("pgbench");
    command.args(["-n", "-c", CLIENTS, "-T", TURN, "-l", "--log-prefix"]).arg(&prefix).arg(url);
    run(command.stderr(std::process::Stdio::null()));
    let files = std::fs::read_dir(logs).unwrap().flatten();
    let text: String = files.map(|file| std::fs::read_to_string(file.path()).unwrap()).collect();
    // client, transaction, microseconds, …
    let mut times: Vec<f64> =
        text.lines().map(|line| line.split(' ').nth(2).unwrap().parse::<f64>().unwrap() / 1e3).collect();
    times.sort_by(f64::total_cmp);
    (times.len() as f64 / TURN.parse::<f64>().unwrap(), times[times.len() * 99 / 100])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
