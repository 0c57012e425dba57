//! The crash matrix: whatever goes wrong, wherever a job is, it ends right or says why not, and leaves nothing.
//!
//! A job is held between two steps of its story (a pausepoint), one thing goes wrong, and the job is let go. Then it has
//! succeeded and its backup restores equal, or it has failed with a reason; there is one seal or none, and nothing is
//! left of it but that: no claim, no session, no pause, no database, no file.
//!
//! `cargo test` runs every fault and every pausepoint once. The whole table takes `BACKHAUL_CRASH_MATRIX=all`, see
//! `scripts/crash-matrix`.

use std::collections::BTreeSet;
use std::time::Instant;

use backup::PAUSEPOINTS;
use nix::sys::signal::Signal;

use crate::support::aftermath::{Scene, is_understood};
use crate::support::demo::psql;
use crate::support::disk::Disk;
use crate::support::faults::{Fleet, Trouble};
use crate::support::store::S3;
use crate::support::{run, until};

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
    FillDisk,
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
    scene: Scene,
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
        let disk = (fault == Fault::FillDisk).then_some(()).and_then(|()| {
            let place = fleet.demo.node_dir(1).join("extern");
            std::fs::create_dir_all(&place).unwrap();
            Disk::mount(&place)
        });
        let primaries_stay = !matches!(fault, Fault::PromoteSystemShard | Fault::PromoteDataShard);
        Self { scene: Scene { disk, fleet, store, primaries_stay }, fault, number: 0 }
    }

    /// The two nodes that jobs run on.
    fn workers(&self) -> [usize; 2] {
        if self.fault == Fault::PromoteDataShard { [5, 6] } else { [4, 5] }
    }

    /// A node of each shard.
    fn gateways(&self) -> &'static [usize] {
        if self.fault == Fault::PromoteDataShard { &[1, 2] } else { &[1] }
    }

    /// Does what the fault is, and lets the job go.
    #[track_caller]
    fn strike(&mut self, job: &str, point: &str) {
        let coordinator: usize = self.scene.fleet.job(job, "coordinator_id").parse().unwrap();
        let worker = self.workers().into_iter().find(|node| *node != coordinator).unwrap();
        match self.fault {
            Fault::KillCoordinator => self.scene.fleet.signal(coordinator, Signal::SIGKILL),
            Fault::KillWorker => self.scene.fleet.signal(worker, Signal::SIGKILL),
            Fault::KillReaderNode => self.scene.fleet.signal(3, Signal::SIGKILL),
            // Beside it are the registry, the target of restores and the files of backups: it comes back as any service does.
            Fault::RestartFirstNode => {
                self.scene.fleet.end_node(1, Signal::SIGKILL);
                let url = self.scene.fleet.demo.direct_url(1).replace("/movr?", "/backhaul?");
                run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-qc", &Fleet::letting_go(job, point)]));
                self.scene.fleet.start_node(1);
            }
            Fault::StopCoordinator | Fault::StopWorker => {
                let node = if self.fault == Fault::StopWorker { worker } else { coordinator };
                self.scene.fleet.signal(node, Signal::SIGSTOP);
                self.scene.fleet.let_go(job, point);
                until("the session of the stopped node to end, and its work to be somebody else's", || {
                    let ended = format!(
                        "SELECT (SELECT expires_at < clock_timestamp() FROM registry.sessions WHERE node_id = {node})
                            AND (finished IS NOT NULL OR coordinator_id <> {node}) FROM registry.jobs WHERE id = {job}"
                    );
                    let seen = self.scene.fleet.registry(&ended);
                    if seen == "t" { Ok(()) } else { Err(seen) }
                });
                self.scene.fleet.signal(node, Signal::SIGCONT);
            }
            Fault::PromoteSystemShard => self.promote(1, 2),
            Fault::PromoteDataShard => self.promote(2, 4),
            Fault::RestartReadServer => {
                nix::sys::signal::kill(self.scene.fleet.demo.server_pid(3), Signal::SIGKILL).unwrap();
                self.scene.fleet.demo.restart_server(3);
            }
            Fault::Store(trouble) => {
                // Who hangs does not come again before long.
                let connections = if trouble == Trouble::Hangs { 1 } else { 3 };
                self.scene.store.as_ref().unwrap().1.fail(trouble, connections);
            }
            Fault::FillDisk => self.scene.disk.as_ref().unwrap().fill(),
        }
        self.scene.fleet.let_go(job, point);
    }

    fn promote(&self, primary: usize, standby: usize) {
        nix::sys::signal::kill(self.scene.fleet.demo.server_pid(primary), Signal::SIGKILL).unwrap();
        self.scene.fleet.demo.promote(standby);
    }

    /// Brings back what the fault took away.
    #[track_caller]
    fn heal(&mut self, job: &str) {
        self.scene.bring_back();
        assert_eq!(self.scene.fleet.job(job, "finished IS NOT NULL"), "t");
    }
}

fn backup_case(case: &mut Case, point: &str) -> String {
    case.number += 1;
    let name = format!("b{}", case.number);
    let statement = format!("BACKUP DATABASE movr INTO '{}' WITH {FILTER}, DETACHED", case.scene.collection(&name));
    let job = case.scene.fleet.held(&statement, point);
    case.strike(&job, point);
    let (status, error) = case.scene.fleet.end_of(&job);
    case.heal(&job);
    assert!(status == "succeeded" || status == "failed" && is_understood(&error), "{status}: {error}");
    case.scene.assert_files(&name, status == "succeeded");
    case.scene.assert_nothing_left();
    if status == "succeeded" {
        let is_pointed_at = case.scene.files(&name).iter().any(|file| file.starts_with("metadata/latest/"));
        let from = if is_pointed_at { "LATEST".to_owned() } else { own_name(case, &job) };
        restore_equal(case, &name, &from, "");
    }
    status
}

/// The directory of a backup that LATEST could not be pointed at any more, which its job says.
#[track_caller]
fn own_name(case: &Case, job: &str) -> String {
    let noted = case.scene.fleet.job(job, "execution_errors");
    let is_told = case.fault == Fault::FillDisk
        && noted.contains("LATEST does not point at the backup: the store at nodelocal://1/");
    assert!(is_told, "{noted}");
    case.scene.fleet.job(job, "quote_literal(payload ->> 'subdir')")
}

/// Restores a backup of a collection and compares; with a pausepoint the fault strikes there.
#[track_caller]
fn restore_equal(case: &mut Case, name: &str, from: &str, point: &str) -> String {
    let uri = case.scene.collection(name);
    let statement =
        format!("RESTORE DATABASE movr FROM {from} IN '{uri}' WITH new_db_name = 'again', {FILTER}, DETACHED");
    let job = if point.is_empty() {
        case.scene.fleet.demo.ask(1, &statement)
    } else {
        let job = case.scene.fleet.held(&statement, point);
        case.strike(&job, point);
        job
    };
    let (status, error) = case.scene.fleet.end_of(&job);
    if !point.is_empty() {
        case.heal(&job);
    }
    if status == "succeeded" {
        case.scene.assert_equal_and_drop(case.gateways());
    } else {
        assert!(!point.is_empty() && status == "failed" && is_understood(&error), "{status}: {error}");
    }
    case.scene.assert_nothing_left();
    status
}

/// Runs a fault at its usual points, or at all when the whole matrix is asked for.
#[track_caller]
fn strike(fault: Fault) {
    let all = std::env::var("BACKHAUL_CRASH_MATRIX").is_ok_and(|value| value == "all");
    let usual = USUAL.iter().find(|(usual, _)| *usual == fault).expect("a row of the fault");
    let points = if all { PAUSEPOINTS } else { usual.1 };
    let mut kept: Option<Case> = None;
    for point in points {
        let mut case = kept.take().unwrap_or_else(|| Case::start(fault));
        if fault == Fault::FillDisk && case.scene.disk.is_none() {
            eprintln!("no disk can be mounted here: what becomes of a job when one is full stays untested");
            return;
        }
        let begun = Instant::now();
        let status = if point.starts_with("backup") {
            backup_case(&mut case, point)
        } else {
            let uri = case.scene.collection("base");
            if case.number == 0 {
                case.number = 1;
            }
            if case.scene.files("base").is_empty() {
                let made =
                    case.scene.fleet.demo.ask(1, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {FILTER}, DETACHED"));
                assert_eq!(case.scene.fleet.end_of(&made), ("succeeded".to_owned(), String::new()));
            }
            restore_equal(&mut case, "base", "LATEST", point)
        };
        eprintln!("{fault:?} | {point} | {status} | {:.1} s", begun.elapsed().as_secs_f64());
        // After a promotion nothing is as it was.
        kept = case.scene.primaries_stay.then_some(case);
    }
}

/// What `cargo test` does: every fault, and every pausepoint.
const USUAL: [(Fault, &[&str]); 15] = [
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
    (Fault::FillDisk, &["backup.after_points"]),
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

#[test]
fn the_disk_of_a_store_is_full() {
    strike(Fault::FillDisk);
}
