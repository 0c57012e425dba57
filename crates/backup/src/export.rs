//! A worker's part: one span, from a founder to an object in the store.
//!
//! Rows come as COPY text from the node that lends the founder, are compressed and hashed on their way, and go to the
//! store in pieces; nothing is held whole. The object appears under its name only when all of it is there.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use cluster::service::{Boxed, Reply, Service};
use cluster::{Filter, NodeId, Peers};
use fleet::founders::{self, FOUNDERS, ROWS_SILENCE_MAX, SpanRequest};
use futures_util::StreamExt as _;
use jobs::Jobs;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use storage::{Store, Stores, Uri, Writer};
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;

use crate::limit::Limit;
use crate::manifest::FileEntry;

/// The name under which a node offers to export spans.
pub const EXPORT: &str = "export";

/// A founder that has not begun to answer by then is not there: it may have to wait for its turn first, and begins with
/// the first rows that there are. That the founder's node is gone is noticed much earlier, by the coordinator.
const FIRST_BYTES_DEADLINE: Duration = ROWS_SILENCE_MAX.saturating_add(Duration::from_secs(180));

/// A stream of rows that stands still for so long is given up; the founder, which knows more, gives it up before.
const STALL_DEADLINE: Duration = ROWS_SILENCE_MAX.saturating_add(Duration::from_secs(60));

/// Spans of a job whose coordinator does not want them any more have ended by then.
const SETTLE_DEADLINE: Duration = Duration::from_secs(30);

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

/// What a worker can be asked.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    /// Export a span. Answered with its [`FileEntry`].
    Span(Box<Task>),
    /// Answered with null when nothing is exported here for this job any more. Its coordinator has gone away or has ended
    /// its calls, so that is soon.
    Settle {
        /// The job.
        job: i64,
        /// It is reverted: nothing is exported for it from now on. A job that has succeeded may have to begin anew, where a
        /// registry was promoted that knows nothing of it.
        for_good: bool,
    },
}

/// One span for one worker.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The job.
    pub(crate) job: i64,
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

/// How many of something there are, by job.
type Counts = Arc<watch::Sender<BTreeMap<i64, usize>>>;

/// So many jobs are remembered that were reverted. A coordinator that stood still meanwhile and does not know yet
/// notices within moments.
const SETTLED_MAX: usize = 1000;

/// Exports spans for coordinators.
pub struct Export {
    peers: Peers,
    stores: Stores,
    jobs: Jobs,
    /// How many spans are exported here, by job.
    at_work: Counts,
    /// The jobs that were settled for good, the latest of them first.
    settled: Mutex<VecDeque<i64>>,
    /// Shared by all of them.
    limit: Limit,
}

/// A span that is being exported; dropping it says that it is not any more.
struct AtWork {
    all: Counts,
    job: i64,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.all.send_modify(|at_work| {
            let left = at_work.remove(&self.job).unwrap_or_default().saturating_sub(1);
            if left > 0 {
                at_work.insert(self.job, left);
            }
        });
    }
}

impl Export {
    /// A service to be offered as [`EXPORT`].
    pub fn new(peers: Peers, stores: Stores, jobs: Jobs) -> Arc<Self> {
        Arc::new(Self {
            peers,
            stores,
            jobs,
            at_work: Arc::default(),
            settled: Mutex::default(),
            limit: Limit::default(),
        })
    }

    fn settled(&self) -> MutexGuard<'_, VecDeque<i64>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a span of a job, unless that was settled for good.
    fn begin(&self, job: i64) -> anyhow::Result<AtWork> {
        self.at_work.send_modify(|at_work| *at_work.entry(job).or_default() += 1);
        let at_work = AtWork { all: Arc::clone(&self.at_work), job };
        if self.settled().contains(&job) {
            bail!("a span of job {job} has come behind the job's last one");
        }
        Ok(at_work)
    }

    async fn settle(&self, job: i64, for_good: bool) -> anyhow::Result<()> {
        if for_good && !self.settled().contains(&job) {
            let mut settled = self.settled();
            settled.truncate(SETTLED_MAX - 1);
            settled.push_front(job);
        }
        let mut at_work = self.at_work.subscribe();
        match timeout(SETTLE_DEADLINE, at_work.wait_for(|at_work| !at_work.contains_key(&job))).await {
            Ok(settled) => settled.map(drop).context("wait for exports to stop"),
            Err(_) => {
                let message = format!("job {job} is still worked on");
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
            }
        }
    }

    async fn export(&self, task: Task) -> anyhow::Result<FileEntry> {
        let me = self.peers.cluster().me();
        let filter: Filter = task.filter.parse().context("read the filter of a span")?;
        if let Some(tier) = me.locality.first_unmatched(&filter) {
            bail!("{} was given a span of a job for {tier}", me.name());
        }
        let at_work = self.begin(task.job)?;
        let session = self.jobs.session()?.id;
        let store = self.stores.open(&Uri::parse(&task.uri)?).await?;
        let request = founders::Request::Span(task.span.clone());
        let mut rows = self.peers.download(task.founder, FOUNDERS, &request, FIRST_BYTES_DEADLINE).await?;
        let mut writer = store.writer(&task.path).await?;
        let mut encoder = zstd::Encoder::new(Vec::with_capacity(PIECE * 2), COMPRESSION_LEVEL)?;
        encoder.include_checksum(true)?;
        let mut hash = Sha256::new();
        let (mut count, mut bytes, mut file_bytes) = (0, 0, 0);
        let settings = self.jobs.settings_heard();
        loop {
            let next = timeout(STALL_DEADLINE, rows.next()).await.map_err(|_| stalled(task.founder))?;
            let last = next.is_none();
            if let Some(piece) = next.transpose()? {
                let rate = settings.borrow().backup_rate();
                self.limit.wait(piece.len(), rate).await;
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
        // A task of its own: if nobody waits for the file any more, it is looked behind all the same.
        let (jobs, place, path) = (self.jobs.clone(), store.clone(), task.path.clone());
        let finishing = tokio::spawn(async move {
            let _at_work = at_work;
            finish(&place, &path, writer, || is_still(&jobs, session)).await
        });
        finishing.await.context("finish a file of a backup")??;
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
            read_from: Some(task.founder),
            written_by: me.node_id.context("export as a node that has a number")?,
        })
    }
}

impl Service for Export {
    fn call(&self, request: serde_json::Value) -> Boxed<'_, Reply> {
        Box::pin(async move {
            match serde_json::from_value(request).context("read what is to be exported")? {
                Request::Span(task) => Ok(Reply::Answer(serde_json::to_value(self.export(*task).await?)?)),
                Request::Settle { job, for_good } => {
                    self.settle(job, for_good).await?;
                    Ok(Reply::Answer(serde_json::Value::Null))
                }
            }
        })
    }
}

/// Whether this node's session is the one that it was.
fn is_still(jobs: &Jobs, session: Uuid) -> Result<(), PgError> {
    if jobs.session()?.id == session {
        return Ok(());
    }
    Err(PgError::new(SqlState::CONNECTION_FAILURE, "the node's session has ended while it worked"))
}

/// Lets a file appear under its name, which is no other's, while the session `is_still` that in which it was begun. A node
/// that stood still for longer than its session lives finishes nothing: the job may have ended since, and what it has
/// made been removed. One that stood still just before its file appeared takes it back.
async fn finish(
    store: &Store,
    path: &str,
    writer: Writer,
    is_still: impl Fn() -> Result<(), PgError>,
) -> anyhow::Result<()> {
    is_still()?;
    let finished = writer.finish().await;
    if let Err(ended) = is_still() {
        store.delete(path).await?;
        return Err(ended.into());
    }
    finished
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

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use cluster::registry::Registry;
    use cluster::secret::ClusterSecret;
    use cluster::store;
    use cluster::{Cluster, Dialer};
    use futures_util::FutureExt as _;
    use jobs::Ledger;
    use serde_json::json;

    use super::*;

    /// A node in the west that knows nobody.
    pub(crate) fn west(state: &std::path::Path) -> (Cluster, Dialer, Peers, Stores) {
        let me = json!({
            "instance": Uuid::new_v4(), "node_id": 1, "cluster_id": null, "address": "127.0.0.1:1",
            "locality": "region=west,zone=a", "shard": "s1", "build": "", "started_at": "2026-01-01T00:00:00Z",
            "server": null, "peers": [], "shards": {}, "revision": 0,
        });
        let store = Arc::new(store::Store::open(state).unwrap());
        let cluster = Cluster::new(serde_json::from_value(me).unwrap(), &[], store).unwrap();
        let dialer = Dialer::new(ClusterSecret::Insecure, None, "test".to_owned());
        let peers = Peers::new(cluster.clone(), dialer.clone());
        let stores = Stores::new(peers.clone(), state.to_owned());
        (cluster, dialer, peers, stores)
    }

    /// It has no session, and so exports nothing in the end.
    fn export(state: &std::path::Path) -> Arc<Export> {
        let (cluster, dialer, peers, stores) = west(state);
        Export::new(peers, stores, Jobs::new(cluster, Registry::default(), Ledger::default(), dialer))
    }

    /// What it says to a span, none of which it can export.
    async fn refusal_of_a_span(export: &Export, job: i64, filter: &str) -> String {
        let what = founders::What::Table { oid: 1, from_block: 0, to_block: None };
        let span = SpanRequest { lease: Uuid::new_v4(), database: "shop".to_owned(), what };
        let (uri, path) = ("nodelocal://1/b".to_owned(), "data/x".to_owned());
        let task = Task { job, uri, filter: filter.to_owned(), path, founder: NodeId(1), span };
        let asked = serde_json::to_value(Request::Span(Box::new(task))).unwrap();
        let Err(error) = export.call(asked).await else { panic!("{filter}: it was exported") };
        format!("{error:#}")
    }

    #[tokio::test]
    async fn a_span_that_comes_when_its_job_is_settled_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let export = export(state.path());
        let is_late = |said: &str| said.ends_with("has come behind the job's last one");
        let at_work = export.begin(7).unwrap();
        let settle = serde_json::to_value(Request::Settle { job: 7, for_good: true }).unwrap();
        let mut settling = export.call(settle);
        assert!((&mut settling).now_or_never().is_none(), "a span is at work");
        let said = refusal_of_a_span(&export, 7, "").await;
        assert!(is_late(&said), "{said}");
        drop(at_work);
        settling.await.unwrap();
        assert!(is_late(&refusal_of_a_span(&export, 7, "").await));
        assert!(!is_late(&refusal_of_a_span(&export, 8, "").await));
        export.settle(8, false).await.unwrap();
        assert!(!is_late(&refusal_of_a_span(&export, 8, "").await), "it may have to begin anew");
        for job in (1000..1000 + SETTLED_MAX as i64).rev() {
            export.settle(job, true).await.unwrap();
        }
        let kept = export.settled().clone();
        assert_eq!((kept.len(), kept.front(), kept.contains(&7)), (SETTLED_MAX, Some(&1000), false));
    }

    #[tokio::test]
    async fn a_node_refuses_a_span_of_a_job_that_it_does_not_match() {
        let state = tempfile::tempdir().unwrap();
        let export = export(state.path());
        for (filter, refusal) in [
            ("region=east", Some("was given a span of a job for region=east")),
            ("zone=a,region=east", Some("was given a span of a job for region=east")),
            ("region=west,zone=b", Some("was given a span of a job for zone=b")),
            ("zone=a,region=west", None),
            ("", None),
        ] {
            let said = refusal_of_a_span(&export, 7, filter).await;
            assert_eq!(said.contains("was given a span"), refusal.is_some(), "{filter}: {said}");
            assert!(refusal.is_none_or(|refusal| said.ends_with(refusal)), "{filter}: {said}");
        }
    }

    #[tokio::test]
    async fn a_file_that_appears_after_its_node_s_session_is_taken_back() {
        let state = tempfile::tempdir().unwrap();
        let export = export(state.path());
        let store = export.stores.open(&Uri::parse("nodelocal://1/b").unwrap()).await.unwrap();
        // How often the session is found to be there still, and whether the file is in the end.
        for (lasts, is_there) in [(0, false), (1, false), (2, true)] {
            let path = format!("data/7-{lasts}.copy.zst");
            let mut writer = store.writer(&path).await.unwrap();
            writer.write(Bytes::from_static(b"rows")).await.unwrap();
            let asked = AtomicUsize::new(0);
            let is_still = || match asked.fetch_add(1, Ordering::Relaxed) < lasts {
                true => Ok(()),
                false => Err(PgError::new(SqlState::CONNECTION_FAILURE, "it has ended")),
            };
            let finished = finish(&store, &path, writer, is_still).await;
            assert_eq!(finished.is_ok(), is_there, "{lasts}: {finished:?}");
            let files = store.list("data/").await.unwrap();
            assert_eq!(files.iter().any(|file| file.path == path), is_there, "{lasts}: {files:?}");
        }
    }
}
