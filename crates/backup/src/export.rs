//! A worker's part: one span, from a founder to an object in the store.
//!
//! Rows come as COPY text from the node that lends the founder, are compressed and hashed on their way, and go to the
//! store in pieces; nothing is held whole. The object appears under its name only when all of it is there.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use cluster::service::{Boxed, Reply, Service};
use cluster::{Filter, NodeId, Peers};
use fleet::founders::{FOUNDERS, Request, SpanRequest};
use futures_util::StreamExt as _;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use storage::{Stores, Uri};
use tokio::time::timeout;

use crate::manifest::FileEntry;

/// The name under which a node offers to export spans.
pub const EXPORT: &str = "export";

/// A founder that has not begun to answer by then is not there: it may have to wait for its turn first.
const FIRST_BYTES_DEADLINE: Duration = Duration::from_secs(120);

/// A stream of rows that stands still for so long is given up.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// Fast, and still four times smaller than the text; level 3 gains a twentieth and costs twice the time.
const COMPRESSION_LEVEL: i32 = 1;

/// Compressed bytes gather up to this many before they go to the store.
const PIECE: usize = 1024 * 1024;

/// The format of the files that this writes.
pub(crate) const ENCODING: &str = "copy text, zstd";

/// The name under which a node tells whether it reaches a store.
pub const PROBE: &str = "probe";

/// Tries stores for other nodes.
pub struct Probe {
    stores: Stores,
}

impl Probe {
    /// A service to be offered as [`PROBE`].
    pub fn new(stores: Stores) -> Arc<Self> {
        Arc::new(Self { stores })
    }
}

#[derive(Deserialize)]
struct ProbeRequest {
    uri: String,
}

impl Service for Probe {
    fn call(&self, request: serde_json::Value) -> Boxed<'_, Reply> {
        Box::pin(async move {
            let request: ProbeRequest = serde_json::from_value(request).context("read which store to try")?;
            self.stores.open(&Uri::parse(&request.uri)?).await?.probe().await?;
            Ok(Reply::Answer(serde_json::Value::Null))
        })
    }
}

/// One span for one worker.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The directory of the backup, with its keys: never logged.
    pub(crate) uri: String,
    /// The filter of the job; a node that does not match refuses.
    pub(crate) filter: String,
    /// The name of the object.
    pub(crate) path: String,
    /// The node that lends founders.
    pub(crate) founder: NodeId,
    /// What to ask it for.
    pub(crate) span: SpanRequest,
}

/// Exports spans for coordinators.
pub struct Export {
    peers: Peers,
    stores: Stores,
}

impl Export {
    /// A service to be offered as [`EXPORT`].
    pub fn new(peers: Peers, stores: Stores) -> Arc<Self> {
        Arc::new(Self { peers, stores })
    }

    async fn export(&self, task: Task) -> anyhow::Result<FileEntry> {
        let me = self.peers.cluster().me();
        let filter: Filter = task.filter.parse().context("read the filter of a span")?;
        if let Some(tier) = me.locality.first_unmatched(&filter) {
            bail!("{} was given a span of a job for {tier}", me.name());
        }
        let store = self.stores.open(&Uri::parse(&task.uri)?).await?;
        let request = Request::Span(task.span.clone());
        let mut rows = self.peers.download(task.founder, FOUNDERS, &request, FIRST_BYTES_DEADLINE).await?;
        let mut writer = store.writer(&task.path).await?;
        let mut encoder = zstd::Encoder::new(Vec::with_capacity(PIECE * 2), COMPRESSION_LEVEL)?;
        encoder.include_checksum(true)?;
        let mut hash = Sha256::new();
        let (mut count, mut bytes, mut file_bytes) = (0, 0, 0);
        loop {
            let next = timeout(STALL_DEADLINE, rows.next()).await.map_err(|_| stalled(task.founder))?;
            let last = next.is_none();
            if let Some(piece) = next.transpose()? {
                // In COPY's text format a line break is the end of a row and nothing else.
                count += piece.iter().filter(|byte| **byte == b'\n').count() as u64;
                bytes += piece.len() as u64;
                encoder.write_all(&piece)?;
            }
            if last {
                break;
            }
            if encoder.get_ref().len() >= PIECE {
                let full = std::mem::replace(encoder.get_mut(), Vec::with_capacity(PIECE * 2));
                hash.update(&full);
                file_bytes += full.len() as u64;
                writer.write(Bytes::from(full)).await?;
            }
        }
        let end = encoder.finish()?;
        hash.update(&end);
        file_bytes += end.len() as u64;
        writer.write(Bytes::from(end)).await?;
        writer.finish().await?;
        Ok(FileEntry {
            path: task.path,
            node: store.node(),
            database: task.span.database,
            what: Some(task.span.what),
            encoding: ENCODING.to_owned(),
            rows: count,
            bytes,
            file_bytes,
            sha256: hex(&hash.finalize()),
            written_by: me.node_id.context("export as a node that has a number")?,
        })
    }
}

impl Service for Export {
    fn call(&self, request: serde_json::Value) -> Boxed<'_, Reply> {
        Box::pin(async move {
            let task: Task = serde_json::from_value(request).context("read a span's task")?;
            Ok(Reply::Answer(serde_json::to_value(self.export(task).await?)?))
        })
    }
}

fn stalled(node: NodeId) -> PgError {
    let message = format!("rows from node {node} have stopped coming");
    PgError::new(SqlState::CONNECTION_FAILURE, message)
        .detail(format!("Nothing came for {} seconds.", STALL_DEADLINE.as_secs()))
}

/// Hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of `bytes`, in hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
