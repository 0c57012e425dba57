//! Stores that backups go to, and what is in them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::faults::{FailingDoor, answer};
use super::{run, until};

/// An S3 server; ended when dropped.
pub struct S3 {
    child: Child,
    port: u16,
}

impl S3 {
    /// Starts one with the bucket `bucket`.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same, that lets nobody in once the bucket is there: it knows no key.
    #[track_caller]
    pub fn guarded() -> Self {
        Self::start_with(&[("INITIAL_NO_AUTH_ACTION_COUNT", "1")])
    }

    #[track_caller]
    fn start_with(environment: &[(&str, &str)]) -> Self {
        let moto = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/drivers/venv/bin/moto_server");
        assert!(moto.exists(), "the S3 server is not there; run scripts/prepare --tests");
        let mut command = Command::new(moto);
        command.args(["-H", "127.0.0.1", "-p", "0"]).stdout(Stdio::null()).stderr(Stdio::piped());
        command.envs(environment.iter().copied());
        let mut s3 = Self { child: command.spawn().unwrap(), port: 0 };
        // The port is its own to choose, and it goes on printing: it must not block on a full pipe.
        let mut lines = BufReader::new(s3.child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let port = lines.find_map(|line| line.split_once("Running on http://127.0.0.1:")?.1.trim().parse().ok());
        s3.port = port.expect("the S3 server says where it listens");
        std::thread::spawn(move || lines.for_each(drop));
        until("the S3 server to answer", || {
            TcpStream::connect(("127.0.0.1", s3.port)).map_err(|error| error.to_string())
        });
        s3.request("PUT", "bucket");
        s3
    }

    /// A door in front of it that can be made to fail.
    pub fn failing(&self) -> FailingDoor {
        FailingDoor::open(self.port)
    }

    /// `http://host:port`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn request(&self, method: &str, path: &str) -> String {
        let url = format!("{}/{path}", self.endpoint());
        let signed = ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", "key:secret"];
        run(Command::new("curl").args(["-sS", "-f", "-X", method]).args(signed).arg(url))
    }

    /// The keys of the objects whose keys have `part` in them.
    pub fn keys(&self, part: &str) -> Vec<String> {
        let listing = self.request("GET", "bucket?list-type=2&max-keys=1000");
        let keys = listing.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        keys.filter(|key| key.contains(part)).map(str::to_owned).collect()
    }

    /// An object.
    pub fn object(&self, key: &str) -> String {
        self.request("GET", &format!("bucket/{key}"))
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A door in front of a server, that remembers which processes came to it, and may let some of them not in.
pub struct Watched {
    /// `host:port` of the door.
    pub address: String,
    seen: Arc<Mutex<BTreeSet<i32>>>,
    refused: Arc<Mutex<BTreeSet<i32>>>,
}

impl Watched {
    /// Opens a door to `port`. It stays open as long as the test runs.
    pub fn open(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<BTreeSet<i32>>> = Arc::default();
        let remember = Arc::clone(&seen);
        let refused: Arc<Mutex<BTreeSet<i32>>> = Arc::default();
        let banned = Arc::clone(&refused);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let owner = owner_of(client.peer_addr().unwrap().port(), client.local_addr().unwrap().port());
                remember.lock().unwrap().extend(owner);
                if owner.is_some_and(|pid| banned.lock().unwrap().contains(&pid)) {
                    std::thread::spawn(move || answer(client, "403 Forbidden"));
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    });
                }
            }
        });
        Self { address, seen, refused }
    }

    /// What these processes ask on connections that they open from now on is answered with 403.
    pub fn refuse(&self, pids: impl IntoIterator<Item = i32>) {
        self.refused.lock().unwrap().extend(pids);
    }

    /// The processes that have come to it.
    pub fn visitors(&self) -> BTreeSet<i32> {
        self.seen.lock().unwrap().clone()
    }
}

impl S3 {
    /// A door in front of it.
    pub fn watched(&self) -> Watched {
        Watched::open(self.port)
    }
}

/// The process that holds the end `port` of an open connection to `door`. Both are needed: connections of several
/// processes may have one local port, as long as they lead to different places.
fn owner_of(port: u16, door: u16) -> Option<i32> {
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let (from, to) = (format!(":{port:04X}"), format!(":{door:04X}"));
    let inode = table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_it = fields.get(1)?.ends_with(&from) && fields[2].ends_with(&to);
        is_it.then(|| format!("socket:[{}]", fields[9]))
    })?;
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &i32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.into_iter().any(|file| std::fs::read_link(file.path()).is_ok_and(|to| to.to_string_lossy() == inode))
    })
}

/// A backup whose files are in local directories.
pub struct LocalBackup {
    /// The sealed manifest.
    pub manifest: Value,
    roots: Vec<PathBuf>,
    subdir: PathBuf,
}

impl LocalBackup {
    /// The newest sealed backup in the collection `path` of any of these external I/O directories.
    #[track_caller]
    pub fn newest(roots: &[PathBuf], path: &str) -> Self {
        let mut found = BTreeMap::new();
        for root in roots {
            let base = root.join(path);
            for file in files_in(&base).into_iter().filter(|file| file.ends_with("BACKUP_MANIFEST")) {
                let subdir = file.parent().unwrap().strip_prefix(&base).unwrap().to_owned();
                found.insert(subdir, file);
            }
        }
        let (subdir, file) = found.pop_last().expect("a sealed backup");
        let manifest = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        Self { manifest, roots: roots.iter().map(|root| root.join(path)).collect(), subdir }
    }

    /// Puts all its files into one directory, as an operator would before reading RESTORE.txt.
    pub fn gather(&self, into: &Path) {
        for root in &self.roots {
            let base = root.join(&self.subdir);
            for file in files_in(&base) {
                let to = into.join(file.strip_prefix(&base).unwrap());
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(&file, &to).unwrap();
            }
        }
    }

    /// The rows of a table, as COPY wrote them.
    #[track_caller]
    pub fn rows(&self, table: &str) -> Vec<String> {
        let mut rows = Vec::new();
        for shard in self.manifest["shards"].as_array().unwrap() {
            for database in shard["databases"].as_array().unwrap() {
                let tables = database["tables"].as_array().unwrap();
                let Some(found) = tables.iter().find(|found| found["name"] == table) else { continue };
                for file in shard["files"].as_array().unwrap() {
                    if file["what"]["Table"]["oid"] == found["oid"] {
                        rows.extend(self.text(file["path"].as_str().unwrap()).lines().map(str::to_owned));
                    }
                }
            }
        }
        rows
    }

    fn text(&self, path: &str) -> String {
        let file = self.roots.iter().map(|root| root.join(&self.subdir).join(path)).find(|file| file.exists());
        run(Command::new("zstd").arg("-dc").arg(file.expect("a file of the manifest")))
    }
}

/// All files below a directory.
pub fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            files.extend(files_in(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
}
