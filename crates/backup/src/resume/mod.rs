//! A backup job, step by step, on its coordinator. Every step can be the first one of a run that takes over.

mod shard;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use cluster::service::Boxed;
use cluster::{NodeId, Peers, View};
use fleet::founders::Skipped;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use jobs::{Resumer, Run};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use storage::{Store, Stores, Uri};
use tokio_util::task::AbortOnDropHandle;

use crate::busy::Busy;
use crate::explain::crosses;
use crate::holders::Holders;
use crate::manifest::{FORMAT, Manifest, NodeWork, ShardPart, left_out, left_out_of};
use crate::pace::SharedPace;
use crate::patience::{Patience, later, patiently};
use crate::pausepoints::{AFTER_EXPORT, AFTER_LATEST, AFTER_LOCK, AFTER_POINTS, AFTER_RECORD};
use crate::plan::SealSource;
use crate::point::{self, ShardPoint};
use crate::revert::Trace;
use crate::rules::{Replicas, Rules, Wanted};
use crate::seal::{Place, Recorded, When};
use crate::{elsewhere, layout, seal, spans, written};

use self::shard::Taken;

/// The type of these jobs.
pub const JOB_TYPE: &str = "BACKUP";

/// Under which key it stands that something may be in the store: it has answered before.
const TOUCHED: &str = "touched";

/// Under which key it stands that the job's files are being removed, whatever is found now.
const REMOVING: &str = "removing";

/// Shards that are exported at the same time; the points of further ones are held until their turn comes. What they may
/// ask of one node together is told in [`crate::busy`]; of its server each asks for itself.
const SHARDS_AT_ONCE: usize = 4;

/// What a backup job was made with, for everybody to read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Payload {
    pub(crate) databases: Vec<String>,
    /// Whether these are all that there were.
    #[serde(default)]
    pub(crate) full_cluster: bool,
    pub(crate) filter: String,
    pub(crate) subdir: String,
    pub(crate) created: DateTime<Utc>,
    pub(crate) description: String,
    /// The shards that hold any of the databases, and which of them.
    pub(crate) shards: BTreeMap<String, Vec<String>>,
    /// The shards that are left out, and why.
    #[serde(default)]
    pub(crate) skipped_shards: Vec<Skipped>,
    /// What else of the cluster is left out, and why.
    #[serde(default)]
    pub(crate) skipped: Vec<Skipped>,
    /// Whether a server outside the filter may not even be read.
    #[serde(default)]
    pub(crate) strict: bool,
    /// Which servers may be read.
    #[serde(default)]
    pub(crate) replicas: Replicas,
    /// Whether all matching nodes that hold a replica share the spans.
    #[serde(default)]
    pub(crate) balanced: bool,
    /// What is to keep standbys from taking away what is read.
    #[serde(default)]
    pub(crate) standby_mode: Wanted,
}

impl Payload {
    fn rules(&self, lag_limit: u64) -> anyhow::Result<Rules> {
        let filter = self.filter.parse().context("read the job's filter")?;
        let Self { strict, replicas, balanced, standby_mode, .. } = *self;
        Ok(Rules { filter, strict, replicas, balanced, standby_mode, lag_limit })
    }
}

/// Runs backup jobs.
pub struct Resume {
    peers: Peers,
    stores: Stores,
    seal: SealSource,
}

/// One run of one job.
struct Story<'s> {
    run: &'s Run,
    peers: &'s Peers,
    payload: Payload,
    rules: Rules,
    /// The backup's directory, with its keys.
    uri: String,
    store: Store,
    stores: &'s Stores,
    directory: Uri,
    /// The collection.
    root: Uri,
    /// What is at work on the nodes, of all shards.
    busy: Busy,
    /// How far all shards are.
    pace: SharedPace,
    /// Whose own directories are written to.
    holders: Holders<'s>,
}

impl Resume {
    /// A resumer for jobs of [`JOB_TYPE`]; `seal` opens what only nodes may read.
    pub fn new(peers: Peers, stores: Stores, seal: SealSource) -> Arc<Self> {
        Arc::new(Self { peers, stores, seal })
    }

    async fn story<'s>(&'s self, run: &'s Run) -> anyhow::Result<Story<'s>> {
        let payload: Payload = serde_json::from_value(run.payload.clone()).context("read the job's payload")?;
        let sealed = run.sealed.as_deref().context("read the job's URI")?;
        let collection = Uri::parse(&(self.seal)()?.open(sealed)?)?;
        let uri = collection.join(payload.subdir.trim_start_matches('/'));
        Ok(Story {
            run,
            peers: &self.peers,
            rules: payload.rules(run.settings().await?.holding().lag)?,
            store: patiently(|| self.stores.open(&uri)).await?,
            holders: Holders::new(run),
            stores: &self.stores,
            uri: uri.exposed(),
            directory: uri,
            root: collection,
            payload,
            busy: Busy::default(),
            pace: SharedPace::default(),
        })
    }
}

impl Resumer for Resume {
    fn resume(&self, run: Run) -> Boxed<'_, Value> {
        Box::pin(async move {
            let told = async { self.story(&run).await?.tell().await };
            match told.await {
                Err(error) if storage::is_transient(&error) && run.kept::<bool>(TOUCHED).await?.is_some() => {
                    Err(later(error))
                }
                done => done,
            }
        })
    }

    fn revert(&self, run: Run) -> Boxed<'_, Option<Value>> {
        Box::pin(async move {
            let taken_back = async { self.story(&run).await?.take_back().await };
            taken_back.await.map_err(later)
        })
    }

    /// Stores are for nodes that match. A job that never came to one has nothing there.
    fn reverts_anywhere(&self, run: Run) -> Boxed<'_, bool> {
        Box::pin(async move { Ok(run.kept::<bool>(TOUCHED).await?.is_none()) })
    }
}

impl Story<'_> {
    async fn tell(&self) -> anyhow::Result<Value> {
        // The store is the judge: what is sealed is done. Only what was recorded can be.
        if let Some(recorded) = seal::recorded(self.run).await?
            && let Some(manifest) = self.seal(&recorded).await?
        {
            return self.end(&manifest).await;
        }
        let kept = self.keep_points().await?;
        self.lock().await?;
        drop(kept);
        self.run.pausepoint(AFTER_LOCK).await?;
        let manifest = self.export().await?;
        self.run.pausepoint(AFTER_EXPORT).await?;
        let recorded = patiently(|| seal::record(self.run, &self.store, &manifest)).await?;
        self.run.pausepoint(AFTER_RECORD).await?;
        let manifest = self.seal(&recorded).await?.context("find the manifest that was just recorded")?;
        self.end(&manifest).await
    }

    async fn seal(&self, recorded: &Recorded) -> anyhow::Result<Option<Manifest>> {
        seal::seal(self.run, &self.place(recorded).await?, recorded, self.when()).await
    }

    async fn end(&self, manifest: &Manifest) -> anyhow::Result<Value> {
        self.run.pausepoint(AFTER_LATEST).await?;
        self.tidy(manifest).await?;
        Ok(self.result(manifest))
    }

    /// Where the recorded body is: another node's own directory, perhaps.
    async fn place(&self, recorded: &Recorded) -> anyhow::Result<Place> {
        let there = |uri: &Uri| recorded.node.and_then(|node| uri.on(node)).unwrap_or_else(|| uri.clone());
        let (store, collection) = (there(&self.directory), there(&self.root));
        Ok(Place { store: self.stores.open(&store).await?, collection: self.stores.open(&collection).await? })
    }

    fn result(&self, manifest: &Manifest) -> Value {
        result(manifest, &self.peers.cluster().view())
    }

    fn when(&self) -> When<'_> {
        (self.payload.subdir.as_str(), self.payload.created)
    }

    fn trace(&self, recorded: Option<&Recorded>) -> Trace<'_> {
        let (run, peers, stores) = (self.run, self.peers, self.stores);
        let sealed_on = recorded.and_then(|recorded| recorded.node);
        Trace { run, peers, stores, filter: &self.rules.filter, directory: &self.directory, sealed_on }
    }

    /// The backup is whole. That something is left beside it is no reason to fail.
    async fn tidy(&self, manifest: &Manifest) -> anyhow::Result<()> {
        close_points(self.run, self.peers).await?;
        let recorded = seal::recorded(self.run).await?;
        let mut patience = Patience::default();
        while let Err(error) = self.trace(recorded.as_ref()).remove_strays(manifest).await {
            if let Err(error) = patience.again(error).await {
                tracing::warn!(job = %self.run.id, "files that the manifest does not name may be left: {error:#}");
                self.run.note(&error).await?;
                break;
            }
        }
        Ok(())
    }

    /// Removes everything, unless the backup is whole. Which of both is decided once: a seal that comes out of a request
    /// that was under way is removed with the rest.
    async fn take_back(&self) -> anyhow::Result<Option<Value>> {
        close_points(self.run, self.peers).await?;
        if self.run.kept::<bool>(TOUCHED).await?.is_none() {
            return Ok(None);
        }
        let recorded = seal::recorded(self.run).await?;
        if let Some(recorded) = &recorded
            && self.run.kept::<bool>(REMOVING).await?.is_none()
            && let Some(manifest) = self.sealed(recorded).await?
        {
            self.tidy(&manifest).await?;
            return Ok(Some(self.result(&manifest)));
        }
        self.run.keep(REMOVING, &true).await?;
        self.trace(recorded.as_ref()).remove_all().await?;
        Ok(None)
    }

    /// The backup, if it is sealed. Nothing is removed before the store has answered that.
    async fn sealed(&self, recorded: &Recorded) -> anyhow::Result<Option<Manifest>> {
        let place = self.place(recorded).await?;
        match seal::sealed(self.run, &place).await? {
            Some(_) => seal::finish(self.run, &place, self.when()).await,
            None => Ok(None),
        }
    }

    /// Keeps the points of an earlier run alive: the store may have to be waited for before they are read.
    async fn keep_points(&self) -> anyhow::Result<Vec<AbortOnDropHandle<()>>> {
        let points: Vec<ShardPoint> = self.run.kept_under("point/").await?;
        Ok(points.iter().map(|point| point::keep_alive(None, self.peers, point)).collect())
    }

    /// The directory is this job's, and stays so. Jobs of one fleet never share a name; those of several fleets that use
    /// one collection may, and then none of them goes on that sees another's lock.
    async fn lock(&self) -> anyhow::Result<()> {
        patiently(|| self.is_alone()).await?;
        self.run.keep(TOUCHED, &true).await?;
        if let Some(node) = self.store.node() {
            self.holders.note(node).await?;
        }
        // A lock of this job from an earlier run is as good as a new one.
        self.create(&layout::lock(self.run.id), &Bytes::from(format!("{}\n", self.payload.description))).await?;
        patiently(|| self.is_alone()).await
    }

    async fn is_alone(&self) -> anyhow::Result<()> {
        let mine = layout::lock(self.run.id);
        let entries = self.store.list(layout::LOCK_PREFIX).await?;
        let Some(other) = entries.iter().find(|entry| entry.path != mine) else { return Ok(()) };
        let (uri, other) = (self.store.redacted(), other.path.trim_start_matches(layout::LOCK_PREFIX));
        let message = format!("{uri} already contains a `BACKUP-LOCK` file written by job {other}");
        Err(PgError::new(SqlState::FILE_ALREADY_EXISTS, message).into())
    }

    async fn export(&self) -> anyhow::Result<Manifest> {
        // All points first, side by side, so that they are as close to each other in time as can be; each is held until its
        // turn comes. Where one cannot be taken, the others are kept for the next run.
        let taken = self.payload.shards.iter().map(|(shard, databases)| self.taken(shard, databases));
        let points = join_all(taken).await.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        self.run.pausepoint(AFTER_POINTS).await?;
        // Before a row is read: whichever server is lost then, the others need nothing of it.
        let moved: Vec<_> = points.iter().map(|it| self.schemas_or_not(&it.point)).collect();
        stream::iter(moved).buffer_unordered(SHARDS_AT_ONCE).try_collect::<()>().await?;
        for Taken { point, .. } in &points {
            self.pace.expects(&point.shard, spans::weight(&spans::cut(&point.opened.databases)));
        }
        // The first that fails is the end of all: dropped, the others' calls end on their workers, too.
        let exported: Vec<_> = points.into_iter().map(|taken| self.shard(taken)).collect();
        let mut shards: Vec<ShardPart> = stream::iter(exported).buffer_unordered(SHARDS_AT_ONCE).try_collect().await?;
        shards.sort_by(|one, other| one.shard.cmp(&other.shard));
        let skew = skew_ms(shards.iter().map(|part| part.point.time));
        Ok(Manifest {
            format: FORMAT,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            job: self.run.id.0,
            description: self.payload.description.clone(),
            databases: self.payload.databases.clone(),
            full_cluster: self.payload.full_cluster,
            filter: self.payload.filter.clone(),
            created: self.payload.created,
            skew_ms: skew,
            nodes: self.work(&shards),
            shards,
            skipped_shards: self.payload.skipped_shards.clone(),
            skipped: self.payload.skipped.clone(),
        })
    }

    /// Writes a file, if the store does so within some seconds.
    async fn create(&self, path: &str, bytes: &Bytes) -> anyhow::Result<()> {
        patiently(|| written::create(self.run, &self.store, path, bytes)).await.map(drop)
    }

    /// What each node read and wrote.
    fn work(&self, shards: &[ShardPart]) -> BTreeMap<NodeId, NodeWork> {
        let view = self.peers.cluster().view();
        let place = |node: NodeId| view.node(node).map(|known| known.info.locality.clone()).unwrap_or_default();
        let mut nodes: BTreeMap<NodeId, NodeWork> = BTreeMap::new();
        for part in shards {
            for file in part.files.iter().chain(&part.schemas) {
                let work = nodes.entry(file.written_by).or_default();
                work.bytes_written += file.file_bytes;
                if file.what.is_none() {
                    continue;
                }
                work.spans += 1;
                let read_from = file.read_from.unwrap_or(part.read_from);
                if file.written_by == read_from {
                    work.bytes_read_locally += file.bytes;
                    continue;
                }
                work.bytes_read_remotely += file.bytes;
                if crosses(&place(file.written_by), &place(read_from)) {
                    work.bytes_read_across_localities += file.bytes;
                }
            }
        }
        nodes
    }
}

/// Nothing is read at this job's points any more.
async fn close_points(run: &Run, peers: &Peers) -> anyhow::Result<()> {
    for point in run.kept_under::<ShardPoint>("point/").await? {
        point::close_all(peers, &point).await;
    }
    Ok(())
}

/// Between the first and the last of all points, in milliseconds.
fn skew_ms(times: impl Iterator<Item = DateTime<Utc>> + Clone) -> i64 {
    times.clone().max().zip(times.min()).map_or(0, |(last, first)| (last - first).num_milliseconds())
}

fn result(manifest: &Manifest, view: &View) -> Value {
    let databases = manifest.shards.iter().flat_map(|shard| &shard.databases);
    let whole = manifest.skipped_shards.iter().chain(&manifest.skipped).map(left_out);
    let parts = databases.flat_map(|database| database.skipped.iter().map(move |it| left_out_of(database, it)));
    let left_out: Vec<String> = whole.chain(parts).collect();
    json!({
        "rows": manifest.rows(), "index_entries": 0, "bytes": manifest.bytes(), "nodes": manifest.nodes,
        "left_out": left_out, "note": elsewhere::note(manifest, view),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skew_is_between_the_first_and_the_last_point() {
        for (at, skew) in [(&[][..], 0), (&[7], 0), (&[1000, 1030], 30), (&[1030, 1000, 1012], 30), (&[3, 1, 9, 5], 8)]
        {
            let times = at.iter().map(|ms| DateTime::from_timestamp_millis(*ms).unwrap());
            assert_eq!(skew_ms(times), skew, "{at:?}");
        }
    }
}
