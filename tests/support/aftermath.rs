//! What is to be found after a job, however it ended: a backup that restores equal or nothing, and nothing else.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use super::disk::Disk;
use super::faults::{FailingDoor, Fleet};
use super::store::{S3, files_in};
use super::{both, runs, until};

/// A fleet on which jobs meet with accidents, and the store of their backups.
pub struct Scene {
    /// A disk on which n1's directory is. It goes before the fleet's files do.
    pub(crate) disk: Option<Disk>,
    /// The fleet.
    pub fleet: Fleet,
    /// The store, and the door to it; without one the files are in n1's directory.
    pub store: Option<(S3, FailingDoor)>,
    /// No primary is lost for good: standbys come to have what their primaries have.
    pub primaries_stay: bool,
}

impl Scene {
    /// The URI of a collection.
    pub fn collection(&self, name: &str) -> String {
        match &self.store {
            None => format!("nodelocal://1/{name}"),
            Some((_, door)) => format!(
                "s3://bucket/{name}?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY=hidden&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
                door.address
            ),
        }
    }

    /// The names of the files in a collection, without its own.
    pub fn files(&self, name: &str) -> BTreeSet<String> {
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

    /// Brings back the store and everything that has ended, and waits until every node works with every other.
    #[track_caller]
    pub fn bring_back(&mut self) {
        if let Some((_, door)) = &self.store {
            door.heal();
        }
        if let Some(disk) = &self.disk {
            disk.free();
        }
        self.start_ended(|_| true);
        self.fleet.until_all_live();
    }

    /// Starts the nodes and servers that have ended and have one of these numbers, as what supervises services does, or the
    /// demo if that has. A primary that is lost for good stays away.
    #[track_caller]
    pub fn start_ended(&mut self, numbers: impl Fn(usize) -> bool) {
        if self.fleet.start_ended_demo() {
            return;
        }
        for number in (1..=self.fleet.demo.nodes.len()).filter(|number| numbers(*number)) {
            if self.primaries_stay && self.fleet.demo.has_server(number) && !self.fleet.demo.server_runs(number) {
                self.fleet.demo.restart_server(number);
            }
            if !runs(self.fleet.pid(number)) {
                self.fleet.start_node(number);
            }
        }
    }

    /// Nothing is left of any job but backups, and restores into `again` have been dropped or were none.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let fleet = &self.fleet;
        let held = "SELECT count(*) FROM registry.jobs
                    WHERE finished IS NULL OR claim_id IS NOT NULL OR claim_session IS NOT NULL";
        assert_eq!(fleet.registry(held), "0", "jobs without an end, and claims");
        let servers =
            (1..=fleet.demo.nodes.len()).filter(|n| fleet.demo.node_dir(*n).join("pg/postmaster.pid").exists());
        // A standby whose primary is gone shows what was there then.
        let follows = self.primaries_stay;
        for server in servers {
            let left = format!(
                "SELECT (SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'
                         OR application_name ~ '^backhaul (job|schema|pre-data|post-data)'),
                        CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() END,
                        (SELECT count(*) FROM pg_database WHERE ({follows} OR NOT pg_is_in_recovery())
                         AND (datname LIKE '\\_backhaul%' OR datname = 'again'))"
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

    /// The files of a collection are those of its one sealed backup, or there are none.
    #[track_caller]
    pub fn assert_files(&self, name: &str, succeeded: bool) {
        let fixed = ["BACKUP-LOCK-", "BACKUP_MANIFEST", "RESTORE.txt", "metadata/latest/"];
        until("the store to hold the backup and nothing else", || {
            let files = self.files(name);
            let seals: Vec<&String> = files.iter().filter(|file| file.ends_with("/BACKUP_MANIFEST")).collect();
            let mut named = BTreeSet::new();
            for seal in &seals {
                let manifest: Value = serde_json::from_str(&self.text(name, seal)).unwrap();
                let dir = seal.strip_suffix("BACKUP_MANIFEST").unwrap();
                for shard in manifest["shards"].as_array().unwrap() {
                    for file in ["files", "schemas"].iter().flat_map(|list| shard[*list].as_array().unwrap()) {
                        named.insert(format!("{dir}{}", file["path"].as_str().unwrap()));
                    }
                }
            }
            let missing: Vec<&String> = named.difference(&files).collect();
            let stray = |file: &&String| !named.contains(*file) && !fixed.iter().any(|part| file.contains(part));
            let stray: Vec<&String> =
                if succeeded { files.iter().filter(stray).collect() } else { files.iter().collect() };
            let as_it_should = seals.len() == usize::from(succeeded) && missing.is_empty() && stray.is_empty();
            if as_it_should { Ok(()) } else { Err(format!("{seals:?}, missing {missing:?}, stray {stray:?}")) }
        });
    }

    /// The database `again`, restored from a backup of `movr`, has its rows, as each of these nodes sees them. It is dropped.
    #[track_caller]
    pub fn assert_equal_and_drop(&self, gateways: &[usize]) {
        for gateway in gateways {
            assert_eq!(sums(&self.fleet, *gateway, "again"), sums(&self.fleet, *gateway, "movr"));
            self.fleet.on(*gateway, "postgres", "DROP DATABASE again WITH (FORCE)");
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

/// Whether a job's error is one for its user.
pub fn is_understood(error: &str) -> bool {
    !error.is_empty() && !error.contains("internal error")
}
