//! A worker's part of a restore: one file, from the store into the database.
//!
//! The file is decompressed and hashed on its way; nothing is held whole. What it put into the database is committed
//! only when all of it has come and is what the manifest says: the node beside the server rolls back otherwise.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use cluster::service::{Boxed, Reply, Service, Upload};
use cluster::{Filter, NodeId, Peers};
use fleet::loader::{LOADER, Load, Request, is_already_loaded};
use futures_util::StreamExt as _;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use storage::{Stores, Uri};
use tokio::time::timeout;

use crate::export::hex;
use crate::manifest::FileEntry;

/// The name under which a node offers to import files.
pub const IMPORT: &str = "import";

/// The database takes a file when it is its turn.
const BEGIN_DEADLINE: Duration = Duration::from_secs(120);

/// A store that gives nothing for so long is given up.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// The commit of what one file brought, on a server that may have much to write.
const COMMIT_DEADLINE: Duration = Duration::from_secs(600);

/// Decompressed bytes gather up to this many before they go on.
const PIECE: usize = 256 * 1024;

/// Compressed bytes are taken in pieces of this size; zstd makes at most some thirty thousand times as many of them.
const BITE: usize = 256;

/// One file for one worker.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The directory that holds the file, with its keys: never logged.
    pub(crate) uri: String,
    /// The filter of the job; a node that does not match refuses.
    pub(crate) filter: String,
    /// The file.
    pub(crate) file: FileEntry,
    /// What it holds, for messages.
    pub(crate) holds: String,
    /// The node beside the server that it goes to.
    pub(crate) loader: NodeId,
    /// Where in the database it goes.
    pub(crate) load: Load,
}

/// Imports files for coordinators.
pub struct Import {
    peers: Peers,
    stores: Stores,
}

impl Import {
    /// A service to be offered as [`IMPORT`].
    pub fn new(peers: Peers, stores: Stores) -> Arc<Self> {
        Arc::new(Self { peers, stores })
    }

    async fn import(&self, task: Task) -> anyhow::Result<()> {
        let me = self.peers.cluster().me();
        let filter: Filter = task.filter.parse().context("read the filter of a file")?;
        if let Some(tier) = me.locality.first_unmatched(&filter) {
            bail!("{} was given a file of a job for {tier}", me.name());
        }
        match self.copy(&task).await {
            Err(error) if PgError::of(&error).is_some_and(is_already_loaded) => Ok(()),
            done => done,
        }
    }

    async fn copy(&self, task: &Task) -> anyhow::Result<()> {
        let store = self.stores.open(&Uri::parse(&task.uri)?).await?;
        let damaged = |detail: &str| {
            let message = format!("file \"{}\" of the backup is damaged", task.file.path);
            PgError::new(SqlState::DATA_CORRUPTED, message).detail(format!("{detail} {}", task.holds))
        };
        let mut packed = store.download(&task.file.path).await?.ok_or_else(|| {
            let message = format!("file \"{}\" of the backup is missing", task.file.path);
            PgError::new(SqlState::UNDEFINED_FILE, message).detail(task.holds.clone())
        })?;
        let request = Request::Load(task.load.clone());
        let mut upload = self.peers.upload(task.loader, LOADER, &request, BEGIN_DEADLINE).await?;
        let mut decoder = zstd::stream::write::Decoder::new(Vec::with_capacity(PIECE * 2))?;
        let mut hash = Sha256::new();
        let mut sent = Sent::default();
        while let Some(piece) = timeout(STALL_DEADLINE, packed.next()).await.map_err(|_| stalled(&task.file.path))? {
            let piece = piece?;
            hash.update(&piece);
            // In small bites, because a few bytes may stand for very many.
            for bite in piece.chunks(BITE) {
                decoder.write_all(bite).map_err(|_| damaged("It cannot be decompressed."))?;
                if sent.bytes + decoder.get_ref().len() as u64 > task.file.bytes {
                    return Err(damaged("It is longer than the manifest says.").into());
                }
                send(&mut upload, decoder.get_mut(), PIECE, &mut sent).await?;
            }
        }
        decoder.flush().map_err(|_| damaged("It cannot be decompressed."))?;
        send(&mut upload, decoder.get_mut(), 1, &mut sent).await?;
        let found = hex(&hash.finalize());
        if found != task.file.sha256 {
            return Err(damaged(&format!("Its SHA-256 is {found}.")).into());
        }
        if sent.rows != task.file.rows {
            return Err(damaged(&format!("It has {} rows; the manifest says {}.", sent.rows, task.file.rows)).into());
        }
        timeout(COMMIT_DEADLINE, upload.finish()).await.map_err(|_| stalled("the commit"))?
    }
}

/// What has gone on so far.
#[derive(Default)]
struct Sent {
    bytes: u64,
    rows: u64,
}

/// Sends on what was decompressed once there are `enough` bytes.
async fn send(upload: &mut Box<dyn Upload>, bytes: &mut Vec<u8>, enough: usize, sent: &mut Sent) -> anyhow::Result<()> {
    if bytes.len() < enough {
        return Ok(());
    }
    let full = std::mem::replace(bytes, Vec::with_capacity(PIECE * 2));
    sent.bytes += full.len() as u64;
    sent.rows += full.iter().filter(|byte| **byte == b'\n').count() as u64;
    let taken = timeout(STALL_DEADLINE, upload.write(Bytes::from(full))).await;
    taken.map_err(|_| stalled("the database"))?
}

fn stalled(what: &str) -> PgError {
    PgError::new(SqlState::CONNECTION_FAILURE, format!("{what} has come to a standstill"))
}

impl Service for Import {
    fn call(&self, request: serde_json::Value) -> Boxed<'_, Reply> {
        Box::pin(async move {
            let task: Task = serde_json::from_value(request).context("read a file's task")?;
            self.import(task).await?;
            Ok(Reply::Answer(serde_json::Value::Null))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::export::tests::west;

    #[tokio::test]
    async fn a_node_refuses_a_file_of_a_job_that_it_does_not_match() {
        let state = tempfile::tempdir().unwrap();
        let (_, _, peers, stores) = west(state.path());
        let import = Import::new(peers, stores);
        for (filter, refusal) in [
            ("region=east", Some("was given a file of a job for region=east")),
            ("region=west,zone=b", Some("was given a file of a job for zone=b")),
            ("zone=a,region=west", None),
            ("", None),
        ] {
            let task = json!({
                "uri": "nodelocal://1/b", "filter": filter, "holds": "", "loader": 1,
                "file": {
                    "path": "data/x", "node": null, "database": "shop", "what": null, "encoding": "", "rows": 0,
                    "bytes": 0, "file_bytes": 0, "sha256": "", "written_by": 1,
                },
                "load": {
                    "job": 7, "database_oid": 1, "run": 1, "span": 0, "what": "LargeObjects",
                },
            });
            let Err(error) = import.call(task).await else { panic!("{filter}: it was imported") };
            let said = format!("{error:#}");
            assert_eq!(said.contains("was given a file"), refusal.is_some(), "{filter}: {said}");
            assert!(refusal.is_none_or(|refusal| said.ends_with(refusal)), "{filter}: {said}");
            assert!(refusal.is_some() || said.contains("file \"data/x\" of the backup is missing"), "{filter}: {said}");
        }
    }
}
