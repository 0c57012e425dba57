//! The crash matrix: whatever goes wrong, wherever a job is, it ends right or says why not, and leaves nothing.
//!
//! A job is held between two steps of its story (a pausepoint), one thing goes wrong, and the job is let go. Then it has
//! succeeded and its backup restores equal, or it has failed with a reason; there is one seal or none, and nothing is
//! left of it but that: no claim, no session, no pause, no database, no file.
//!
//! `cargo test` runs every fault and every pausepoint once. The whole table takes `BACKHAUL_CRASH_MATRIX=all`, see
//! `scripts/crash-matrix`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

use backup::PAUSEPOINTS;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::demo::psql;
use crate::support::faults::{FailingDoor, Fleet, Trouble};
use crate::support::store::{S3, files_in};
use crate::support::{both, run, until};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillCoordinator,
    KillWorker,
    KillReaderNode,
    RestartFirstNode,
    StopCoordinator,
    StopWorker,
    PromoteSystemShard,
    PromoteDataShard,
    RestartReadServer,
    Store(Trouble),
}

/// n1 leads s1, which holds the registry; n4 and n5 have no servers. Jobs run on n4 and n5 and read from n3; files are in
/// n1's directory, or in an S3 store.
pub(crate) const ONE_SHARD: [&str; 8] = [
    "--nodes",
    "5",
    "--servers",
    "3",
    "--demo-locality",
    "region=us-east-1,zone=a:region=us-east-1,zone=b:region=us-west-1,zone=a:region=us-west-1,zone=b:region=us-west-1,zone=b",
    "--rows",
    "30000",
];

/// n1 and n3 hold s1 with the registry, n2 and n4 hold s2; n5 and n6 have no servers, and jobs run there.
pub(crate) const TWO_SHARDS: [&str; 10] = [
    "--nodes",
    "6",
    "--servers",
    "4",
    "--shards",
    "2",
    "--demo-locality",
    "region=us-east-1,zone=a:region=us-east-1,zone=b:region=us-west-1,zone=a:region=us-west-1,zone=c:region=us-west-1,zone=b:region=us-west-1,zone=b",
    "--rows",
    "30000",
];

pub(crate) const FILTER: &str = "EXECUTION LOCALITY = 'region=us-west-1,zone=b'";

struct Case {
    fleet: Fleet,
    store: Option<(S3, FailingDoor)>,
    fault: Fault,
    number: usize,
}

impl Case {
    fn start(fault: Fault) -> Self {
        let fleet = Fleet::mortal(if fault == Fault::PromoteDataShard { &TWO_SHARDS } else { &ONE_SHARD });
        let store = matches!(fault, Fault::Store(_)).then(|| {
            let s3 = S3::start();
            let door = s3.failing();
            (s3, door)
        });
        Self { fleet, store, fault, number: 0 }
    }

    /// The two nodes that jobs run on.
    fn workers(&self) -> [usize; 2] {
        if self.fault == Fault::PromoteDataShard { [5, 6] } else { [4, 5] }
    }

    /// A node of each shard.
    fn gateways(&self) -> &'static [usize] {
        if self.fault == Fault::PromoteDataShard { &[1, 2] } else { &[1] }
    }

    fn collection(&self, name: &str) -> String {
        match &self.store {
            None => format!("nodelocal://1/{name}"),
            Some((_, door)) => format!(
                "s3://bucket/{name}?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
                door.address
            ),
        }
    }

    /// The names of the files in a collection, without its own.
    fn files(&self, name: &str) -> BTreeSet<String> {
        match &self.store {
            Some((s3, _)) => {
                let prefix = format!("{name}/");
                s3.keys(&prefix).iter().filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned())).collect()
            }
            None => {
                let root: PathBuf = self.fleet.demo.node_dir(1).join("extern").join(name);
                let relative = |file: &PathBuf| file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                files_in(&root).iter().map(relative).collect()
            }
        }
    }

    fn text(&self, name: &str, file: &str) -> String {
        match &self.store {
            Some((s3, _)) => s3.object(&format!("{name}/{file}")),
            None => std::fs::read_to_string(self.fleet.demo.node_dir(1).join("extern").join(name).join(file)).unwrap(),
        }
    }

    /// Does what the fault is, and lets the job go.
    #[track_caller]
    fn strike(&mut self, job: &str, point: &str) {
        let coordinator: usize = self.fleet.job(job, "coordinator_id").parse().unwrap();
        let worker = self.workers().into_iter().find(|node| *node != coordinator).unwrap();
        match self.fault {
            Fault::KillCoordinator => self.fleet.signal(coordinator, Signal::SIGKILL),
            Fault::KillWorker => self.fleet.signal(worker, Signal::SIGKILL),
            Fault::KillReaderNode => self.fleet.signal(3, Signal::SIGKILL),
            // Beside it are the registry, the target of restores and the files of backups: it comes back as any service does.
            Fault::RestartFirstNode => {
                self.fleet.end_node(1, Signal::SIGKILL);
                let url = self.fleet.demo.direct_url(1).replace("/movr?", "/backhaul?");
                run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-qc", &Fleet::letting_go(job, point)]));
                self.fleet.start_node(1);
            }
            Fault::StopCoordinator | Fault::StopWorker => {
                let node = if self.fault == Fault::StopWorker { worker } else { coordinator };
                self.fleet.signal(node, Signal::SIGSTOP);
                self.fleet.let_go(job, point);
                until("the session of the stopped node to end, and its work to be somebody else's", || {
                    let ended = format!(
                        "SELECT (SELECT expires_at < clock_timestamp() FROM registry.sessions WHERE node_id = {node})
                            AND (finished IS NOT NULL OR coordinator_id <> {node}) FROM registry.jobs WHERE id = {job}"
                    );
                    let seen = self.fleet.registry(&ended);
                    if seen == "t" { Ok(()) } else { Err(seen) }
                });
                self.fleet.signal(node, Signal::SIGCONT);
            }
            Fault::PromoteSystemShard => self.promote(1, 2),
            Fault::PromoteDataShard => self.promote(2, 4),
            Fault::RestartReadServer => {
                nix::sys::signal::kill(self.fleet.demo.server_pid(3), Signal::SIGKILL).unwrap();
                self.fleet.demo.restart_server(3);
            }
            Fault::Store(trouble) => {
                // Who hangs does not come again before long.
                let connections = if trouble == Trouble::Hangs { 1 } else { 3 };
                self.store.as_ref().unwrap().1.fail(trouble, connections);
            }
        }
        self.fleet.let_go(job, point);
    }

    fn promote(&self, primary: usize, standby: usize) {
        nix::sys::signal::kill(self.fleet.demo.server_pid(primary), Signal::SIGKILL).unwrap();
        self.fleet.demo.promote(standby);
    }

    /// Brings back what the fault took away.
    #[track_caller]
    fn heal(&mut self, job: &str) {
        if let Some((_, door)) = &self.store {
            door.heal();
        }
        for node in 1..=self.fleet.demo.nodes.len() {
            // A process that has ended has no command line, also before its parent has heard of it.
            let line = std::fs::read(format!("/proc/{}/cmdline", self.fleet.pid(node))).unwrap_or_default();
            if line.is_empty() {
                self.fleet.start_node(node);
            }
        }
        self.fleet.until_all_live();
        assert_eq!(self.fleet.job(job, "finished IS NOT NULL"), "t");
    }

    /// Nothing is left of any job but what it was to make.
    #[track_caller]
    fn assert_nothing_left(&self, left_database: &str) {
        let fleet = &self.fleet;
        let held = "SELECT count(*) FROM registry.jobs
                    WHERE finished IS NULL OR claim_id IS NOT NULL OR claim_session IS NOT NULL";
        assert_eq!(fleet.registry(held), "0", "jobs without an end, and claims");
        let servers =
            (1..=fleet.demo.nodes.len()).filter(|n| fleet.demo.node_dir(*n).join("pg/postmaster.pid").exists());
        // A standby whose primary is gone shows what was there then.
        let follows = !matches!(self.fault, Fault::PromoteSystemShard | Fault::PromoteDataShard);
        for server in servers {
            let left = format!(
                "SELECT (SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'
                         OR application_name ~ '^backhaul (job|schema|pre-data|post-data)'),
                        CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() END,
                        (SELECT count(*) FROM pg_database WHERE ({follows} OR NOT pg_is_in_recovery())
                         AND (datname LIKE '\\_backhaul%' OR datname = '{left_database}'))"
            );
            until("nothing to be held, paused or half-made", || {
                let output = fleet.demo.psql_direct(server).args(["-Atc", &left]).output().unwrap();
                let seen = both(&output);
                // A server that was killed for good, as a primary in whose place another one is, is not asked.
                let gone = !follows && (seen.contains("No such file") || seen.contains("Connection refused"));
                if ["0|f|0", "0||0"].contains(&seen.trim()) || gone {
                    Ok(())
                } else {
                    Err(format!("n{server}: {seen}"))
                }
            });
        }
    }
}

/// What every row of a database comes to; equal databases have equal sums.
fn sums(fleet: &Fleet, gateway: usize, database: &str) -> String {
    let relations = "SELECT c.oid::regclass FROM pg_class c WHERE relkind IN ('r', 'm') AND relpersistence = 'p'
         AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) ORDER BY 1";
    let relations = fleet.on(gateway, database, relations);
    let one = |name: &str| format!("SELECT '{name}', count(*), sum(hashtext(t::text)::numeric) FROM ONLY {name} t");
    let union: Vec<String> = relations.lines().map(one).collect();
    assert!(union.len() > 8, "{relations}");
    fleet.on(gateway, database, &format!("{} ORDER BY 1", union.join(" UNION ALL ")))
}

/// The files of a collection are those of its sealed backups, and nothing else.
#[track_caller]
fn assert_files(case: &Case, name: &str, succeeded: bool) {
    let fixed = ["BACKUP-LOCK-", "BACKUP_MANIFEST", "RESTORE.txt", "metadata/latest/"];
    until("the store to hold the backup and nothing else", || {
        let files = case.files(name);
        let seals: Vec<&String> = files.iter().filter(|file| file.ends_with("/BACKUP_MANIFEST")).collect();
        let mut named = BTreeSet::new();
        for seal in &seals {
            let manifest: Value = serde_json::from_str(&case.text(name, seal)).unwrap();
            let dir = seal.strip_suffix("BACKUP_MANIFEST").unwrap();
            for shard in manifest["shards"].as_array().unwrap() {
                for file in ["files", "schemas"].iter().flat_map(|list| shard[*list].as_array().unwrap()) {
                    named.insert(format!("{dir}{}", file["path"].as_str().unwrap()));
                }
            }
        }
        let missing: Vec<&String> = named.difference(&files).collect();
        let stray = |file: &&String| !named.contains(*file) && !fixed.iter().any(|part| file.contains(part));
        let stray: Vec<&String> = if succeeded { files.iter().filter(stray).collect() } else { files.iter().collect() };
        let as_it_should = seals.len() == usize::from(succeeded) && missing.is_empty() && stray.is_empty();
        if as_it_should { Ok(()) } else { Err(format!("{seals:?}, missing {missing:?}, stray {stray:?}")) }
    });
}

/// Whether a job's error is one for its user.
fn is_understood(error: &str) -> bool {
    !error.is_empty() && !error.contains("internal error")
}

fn backup_case(case: &mut Case, point: &str) -> String {
    case.number += 1;
    let name = format!("b{}", case.number);
    let statement = format!("BACKUP DATABASE movr INTO '{}' WITH {FILTER}, DETACHED", case.collection(&name));
    let job = case.fleet.held(&statement, point);
    case.strike(&job, point);
    let (status, error) = case.fleet.end_of(&job);
    case.heal(&job);
    assert!(status == "succeeded" || status == "failed" && is_understood(&error), "{status}: {error}");
    assert_files(case, &name, status == "succeeded");
    case.assert_nothing_left("again");
    if status == "succeeded" {
        restore_equal(case, &name, "");
    }
    status
}

/// Restores what is in a collection and compares; with a pausepoint the fault strikes there.
#[track_caller]
fn restore_equal(case: &mut Case, name: &str, point: &str) -> String {
    let uri = case.collection(name);
    let statement =
        format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'again', {FILTER}, DETACHED");
    let job = if point.is_empty() {
        case.fleet.demo.ask(1, &statement)
    } else {
        let job = case.fleet.held(&statement, point);
        case.strike(&job, point);
        job
    };
    let (status, error) = case.fleet.end_of(&job);
    if !point.is_empty() {
        case.heal(&job);
    }
    if status == "succeeded" {
        for gateway in case.gateways() {
            assert_eq!(sums(&case.fleet, *gateway, "again"), sums(&case.fleet, *gateway, "movr"));
            case.fleet.on(*gateway, "postgres", "DROP DATABASE again WITH (FORCE)");
        }
    } else {
        assert!(!point.is_empty() && status == "failed" && is_understood(&error), "{status}: {error}");
    }
    case.assert_nothing_left("again");
    status
}

/// Runs a fault at its usual points, or at all when the whole matrix is asked for.
#[track_caller]
fn strike(fault: Fault) {
    let all = std::env::var("BACKHAUL_CRASH_MATRIX").is_ok_and(|value| value == "all");
    let usual = USUAL.iter().find(|(usual, _)| *usual == fault).expect("a row of the fault");
    let points = if all { PAUSEPOINTS } else { usual.1 };
    // After a promotion nothing is as it was.
    let once = matches!(fault, Fault::PromoteSystemShard | Fault::PromoteDataShard);
    let mut kept: Option<Case> = None;
    for point in points {
        let mut case = kept.take().unwrap_or_else(|| Case::start(fault));
        let begun = Instant::now();
        let status = if point.starts_with("backup") {
            backup_case(&mut case, point)
        } else {
            let uri = case.collection("base");
            if case.number == 0 {
                case.number = 1;
            }
            if case.files("base").is_empty() {
                let made =
                    case.fleet.demo.ask(1, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {FILTER}, DETACHED"));
                assert_eq!(case.fleet.end_of(&made), ("succeeded".to_owned(), String::new()));
            }
            restore_equal(&mut case, "base", point)
        };
        eprintln!("{fault:?} | {point} | {status} | {:.1} s", begun.elapsed().as_secs_f64());
        kept = (!once).then_some(case);
    }
}

/// What `cargo test` does: every fault, and every pausepoint.
const USUAL: [(Fault, &[&str]); 14] = [
    (Fault::KillCoordinator, &["backup.after_first_span", "restore.after_load"]),
    (Fault::KillWorker, &["backup.after_lock", "restore.after_finish"]),
    (Fault::KillReaderNode, &["backup.after_points"]),
    (Fault::RestartFirstNode, &["backup.after_export", "restore.after_load"]),
    (Fault::StopCoordinator, &["backup.after_record", "restore.after_release"]),
    (Fault::StopWorker, &["backup.after_first_span", "restore.after_first_file"]),
    (Fault::PromoteSystemShard, &["backup.after_checksum", "restore.after_pre_data"]),
    (Fault::PromoteDataShard, &["restore.after_publish"]),
    (Fault::RestartReadServer, &["backup.after_schemas"]),
    (Fault::Store(Trouble::Refuses), &["backup.after_latest"]),
    (Fault::Store(Trouble::Hangs), &["restore.after_source"]),
    (Fault::Store(Trouble::LosesAnswers), &["backup.after_seal"]),
    (Fault::Store(Trouble::Answers("503 Slow Down")), &["restore.after_create"]),
    (Fault::Store(Trouble::Answers("507 Insufficient Storage")), &["backup.after_first_span"]),
];

/// A fault that nobody strikes with, or a pausepoint that nothing goes wrong at, is noticed here. A fault that is in no
/// row at all is dead code.
#[test]
fn the_usual_rows_have_every_fault_and_every_pausepoint() {
    let points: BTreeSet<&str> = USUAL.iter().flat_map(|(_, points)| *points).copied().collect();
    assert_eq!(points, PAUSEPOINTS.iter().copied().collect::<BTreeSet<_>>());
    let tests = include_str!("crash.rs");
    for (number, (fault, points)) in USUAL.iter().enumerate() {
        let call = format!("    strike(Fault::{});", format!("{fault:?}").replace("Store(", "Store(Trouble::"));
        assert!(tests.contains(&call) && !points.is_empty(), "{call}");
        assert!(USUAL[..number].iter().all(|(before, _)| before != fault), "{fault:?} has two rows");
    }
}

#[test]
fn a_coordinator_is_killed() {
    strike(Fault::KillCoordinator);
}

#[test]
fn a_worker_is_killed() {
    strike(Fault::KillWorker);
}

#[test]
fn the_node_beside_the_read_server_is_killed() {
    strike(Fault::KillReaderNode);
}

#[test]
fn the_node_beside_the_registry_is_killed_and_started() {
    strike(Fault::RestartFirstNode);
}

#[test]
fn a_coordinator_is_stopped_and_goes_on() {
    strike(Fault::StopCoordinator);
}

#[test]
fn a_worker_is_stopped_and_goes_on() {
    strike(Fault::StopWorker);
}

#[test]
fn the_registry_fails_over() {
    strike(Fault::PromoteSystemShard);
}

#[test]
fn a_data_shard_fails_over() {
    strike(Fault::PromoteDataShard);
}

#[test]
fn the_read_server_is_restarted() {
    strike(Fault::RestartReadServer);
}

#[test]
fn a_store_refuses() {
    strike(Fault::Store(Trouble::Refuses));
}

#[test]
fn a_store_hangs() {
    strike(Fault::Store(Trouble::Hangs));
}

#[test]
fn a_store_loses_answers() {
    strike(Fault::Store(Trouble::LosesAnswers));
}

#[test]
fn a_store_is_overloaded() {
    strike(Fault::Store(Trouble::Answers("503 Slow Down")));
}

#[test]
fn a_store_is_full() {
    strike(Fault::Store(Trouble::Answers("507 Insufficient Storage")));
}
