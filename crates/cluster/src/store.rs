//! A node's own directory: who it is, and what it last knew of the fleet.
//!
//! ```text
//! <store>/LOCK         held while a node runs here; its text is the process id
//!         node.json    this node's identity, its number and its cluster; replaced whole
//!         fleet.json   addresses of peers, shards with their identity and highest timeline; replaced whole
//! ```
//!
//! Losing `fleet.json` costs nothing while a `--join` address answers. Losing `node.json` makes this another node.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::NodeId;
use crate::leader::ShardFloor;

/// Who a node is, wherever its process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Made when the store is first used; two nodes never share one.
    pub store_id: Uuid,
    /// The node's number, once the registry gave it.
    pub node_id: Option<NodeId>,
    /// The cluster it joined; it never joins another.
    pub cluster_id: Option<Uuid>,
}

/// What a node knew of its fleet when it last ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastKnown {
    /// Addresses of other nodes.
    pub peers: Vec<String>,
    /// Shards by name.
    pub shards: BTreeMap<String, ShardFloor>,
}

/// The directory, locked for as long as this value lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: Flock<fs::File>,
}

impl Store {
    /// Opens the directory, making it if needed, and locks it.
    ///
    /// # Errors
    ///
    /// The directory cannot be made or written, or another process runs on it.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create the store {}", dir.display()))?;
        let path = dir.join("LOCK");
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)?;
                bail!("the store {} is in use by process {}", dir.display(), holder.trim());
            }
            Err((_, errno)) => return Err(errno).with_context(|| format!("lock {}", path.display())),
        };
        lock.set_len(0)?;
        lock.rewind()?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// This node's identity, made at the first call on a new store.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written, or is damaged.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        if let Some(identity) = self.read("node.json")? {
            return Ok(identity);
        }
        let identity = Identity { store_id: Uuid::new_v4(), node_id: None, cluster_id: None };
        self.set_identity(&identity)?;
        Ok(identity)
    }

    /// Keeps a changed identity.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn set_identity(&self, identity: &Identity) -> anyhow::Result<()> {
        self.replace("node.json", identity)
    }

    /// What was last known of the fleet; nothing when this is new.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is damaged.
    pub fn last_known(&self) -> anyhow::Result<LastKnown> {
        Ok(self.read("fleet.json")?.unwrap_or_default())
    }

    /// Keeps what is known of the fleet.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn set_last_known(&self, last_known: &LastKnown) -> anyhow::Result<()> {
        self.replace("fleet.json", last_known)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<Option<T>> {
        let path = self.dir.join(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        serde_json::from_str(&text).map(Some).with_context(|| format!("read {}", path.display()))
    }

    /// Writes beside and renames, so that a crash leaves the old file or the new one.
    fn replace<T: Serialize>(&self, name: &str, value: &T) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        let beside = self.dir.join(format!("{name}.new"));
        let write = || -> anyhow::Result<()> {
            let mut file = fs::File::create(&beside)?;
            file.write_all(&serde_json::to_vec_pretty(value)?)?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            // The rename itself has to be on disk, or a power loss takes it back.
            fs::File::open(&self.dir)?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_store_serves_one_node_and_remembers_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut identity = store.identity().unwrap();
        identity.node_id = Some(NodeId(3));
        store.set_identity(&identity).unwrap();
        let known = LastKnown { peers: vec!["n2:26257".to_owned()], ..LastKnown::default() };
        store.set_last_known(&known).unwrap();

        let taken = Store::open(dir.path()).unwrap_err().to_string();
        assert!(taken.ends_with(&format!("is in use by process {}", std::process::id())), "{taken}");

        drop(store);
        let again = Store::open(dir.path()).unwrap();
        assert_eq!(again.identity().unwrap(), identity);
        assert_eq!(again.last_known().unwrap(), known);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node.json"), "{").unwrap();
        let error = Store::open(dir.path()).unwrap().identity().unwrap_err();
        assert!(error.to_string().contains("node.json"), "{error}");
    }
}
