//! What a backup leaves behind: nothing but itself.
//!
//! A job that fails or is canceled removes its files; one that has succeeded removes what its manifest does not name:
//! files of tries that were lost, of claims that ended. Before anything is removed the workers are asked to stop, and
//! of one that cannot be asked the session is waited for to end: without one it finishes no file, or takes it
//! back ([`crate::export`]).
//!
//! A seal that is found before anything is removed wins: that backup is whole, and the job has succeeded whatever was
//! asked of it. One that appears later, out of a request that was under way, is removed with the rest. A coordinator
//! that slept through all of this, or whose run was dropped, looks once more behind what it wrote ([`crate::written`]).

use std::collections::BTreeSet;
use std::time::Duration;

use cluster::{Filter, Known, NodeId, Peers, View};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use jobs::{JobId, Run};
use pgerror::{PgError, SqlState};
use storage::{Entry, Store, Stores, Uri};
use tokio::time::timeout;

use crate::away::{self, BLIP_MAX};
use crate::drive::Finished;
use crate::export::{self, EXPORT};
use crate::manifest::Manifest;
use crate::restore::places;
use crate::{holders, layout};

/// A worker has stopped by then, or is asked again.
const SETTLE_DEADLINE: Duration = Duration::from_secs(40);

/// Files are listed and removed so often, until there are none.
const PASSES_MAX: usize = 5;

/// Files that are removed at the same time.
const AT_ONCE: usize = 8;

/// What a backup's files are found by.
pub(crate) struct Trace<'t> {
    pub(crate) run: &'t Run,
    pub(crate) peers: &'t Peers,
    pub(crate) stores: &'t Stores,
    pub(crate) filter: &'t Filter,
    /// The backup's directory, with its keys.
    pub(crate) directory: &'t Uri,
    /// The node in whose own directory the manifest is, if it is in one.
    pub(crate) sealed_on: Option<NodeId>,
}

impl Trace<'_> {
    /// Every place that may hold files of the backup: the store, or the directory of each node that has taken part. Nodes
    /// that have, and do not answer now, are the others.
    async fn places(&self) -> anyhow::Result<(Vec<Store>, Vec<NodeId>)> {
        let reachable = places(self.directory, self.peers, self.filter);
        let mut opened = Vec::new();
        for place in &reachable {
            opened.push(self.stores.open(place).await?);
        }
        let mut silent = BTreeSet::new();
        if self.directory.on(NodeId(0)).is_some() {
            let finished: Vec<Finished> = self.run.kept_under("span/").await?;
            let with_spans = finished.iter().filter_map(|done| done.file.node);
            silent.extend(holders::of(self.run).await?.into_iter().chain(with_spans).chain(self.sealed_on));
            silent.retain(|node| opened.iter().all(|store| store.node() != Some(*node)));
        }
        Ok((opened, silent.into_iter().collect()))
    }

    /// Returns when no node works on the job any more: those that answer say so, and the sessions of the others that were
    /// ever asked to have ended, after which they finish no file.
    async fn settle(&self, for_good: bool) -> anyhow::Result<()> {
        let holders = holders::of(self.run).await?;
        let silent_in =
            |view: &View| holders.iter().copied().filter(|node| !away::has_node(view, *node)).collect::<Vec<_>>();
        let mut views = self.peers.cluster().subscribe();
        let silent = silent_in(&views.borrow());
        if !silent.is_empty() {
            // A process that has just begun does not know all of them yet. The dead are not waited for.
            let known = timeout(BLIP_MAX, views.wait_for(|view| silent_in(view).is_empty()));
            tokio::select! {
                known = known => drop(known),
                ended = self.run.sessions_have_ended(&silent) => ended?,
            }
        }
        let view = self.peers.cluster().view();
        let request = export::Request::Settle { job: self.run.id.0, for_good };
        let ask = |node: NodeId| self.peers.call::<()>(node, EXPORT, &request, SETTLE_DEADLINE);
        // A registry that was promoted may have lost the latest notes.
        let matches = |node: &&Known| node.reachable && node.info.locality.first_unmatched(self.filter).is_none();
        let matching = view.nodes.values().filter(matches).filter_map(|node| node.info.node_id);
        for node in matching.filter(|node| !holders.contains(node)) {
            if let Err(error) = ask(node).await {
                tracing::info!(job = %self.run.id, %node, "a node that was not noted is not settled: {error:#}");
            }
        }
        for node in holders.iter().copied().filter(|node| away::has_node(&view, *node)) {
            ask(node).await?;
        }
        self.run.sessions_have_ended(&silent_in(&view)).await
    }

    /// Removes all files of the job.
    ///
    /// # Errors
    ///
    /// A store or a node cannot be reached, which may pass; or refuses. What the others have is removed all the same.
    pub(crate) async fn remove_all(&self) -> anyhow::Result<()> {
        self.settle(true).await?;
        self.remove_everywhere(|entries, _| of_job(self.run.id, entries)).await
    }

    /// Removes what is chosen of each place, and then tells what could not be.
    async fn remove_everywhere(&self, chosen: impl Fn(&[Entry], &Store) -> Vec<String>) -> anyhow::Result<()> {
        let (stores, silent) = self.places().await?;
        let mut failed = None;
        for store in stores {
            if let Err(error) = remove(&store, |entries| chosen(entries, &store)).await {
                tracing::info!(job = %self.run.id, "files are not removed yet: {error:#}");
                failed = Some(error);
            }
        }
        match failed {
            Some(error) => Err(error),
            None if silent.is_empty() => Ok(()),
            None => Err(holders::silent(&silent).into()),
        }
    }

    /// Removes the files of the job that the sealed manifest does not name. What cannot be removed now stays.
    pub(crate) async fn remove_strays(&self, manifest: &Manifest) -> anyhow::Result<()> {
        self.settle(false).await?;
        let named = |entry: &Entry, store: &Store| {
            let files = manifest.shards.iter().flat_map(|shard| shard.files.iter().chain(&shard.schemas));
            files.into_iter().any(|file| file.path == entry.path && file.node == store.node())
        };
        let stray = |entries: &[Entry], store: &Store| {
            let parts = entries.iter().filter(|entry| layout::is_part(&entry.path) && !named(entry, store));
            parts.map(|entry| entry.path.clone()).collect()
        };
        self.remove_everywhere(stray).await
    }
}

/// The files of a directory that are this job's, the lock last and a seal first. Where another job has its lock, only names that carry
/// this job's number are.
fn of_job(job: JobId, entries: &[Entry]) -> Vec<String> {
    let (lock, data) = (layout::lock(job), layout::data_of(job));
    let is_shared = entries.iter().any(|entry| entry.path.starts_with(layout::LOCK_PREFIX) && entry.path != lock);
    let is_mine = |path: &str| path.starts_with(&data) || !is_shared;
    let paths = entries.iter().map(|entry| &entry.path).filter(|path| **path != lock && is_mine(path));
    let mut paths: Vec<String> = paths.cloned().collect();
    paths.sort_by_key(|path| path != layout::SEAL);
    paths.extend(entries.iter().any(|entry| entry.path == lock).then_some(lock));
    paths
}

async fn remove(store: &Store, chosen: impl Fn(&[Entry]) -> Vec<String>) -> anyhow::Result<()> {
    for _ in 0..PASSES_MAX {
        let mut paths = chosen(&store.list("").await?);
        let Some(last) = paths.pop() else { return Ok(()) };
        if paths.first().is_some_and(|path| path == layout::SEAL) {
            store.delete(&paths.remove(0)).await?;
        }
        let removals = paths.into_iter().map(|path| async move { store.delete(&path).await });
        stream::iter(removals).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        store.delete(&last).await?;
    }
    let message = format!("files keep coming to {}", store.redacted());
    Err(PgError::new(SqlState::OBJECT_IN_USE, message).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_job_s_own_files_are_removed_and_its_lock_last() {
        let entries = |paths: &[&str]| -> Vec<Entry> {
            paths.iter().map(|path| Entry { path: (*path).to_owned(), size: 1 }).collect()
        };
        for (there, removed) in [
            (
                &["BACKUP-LOCK-7", "BACKUP_MANIFEST", "data/7-a-1.copy.zst"][..],
                &["BACKUP_MANIFEST", "data/7-a-1.copy.zst", "BACKUP-LOCK-7"][..],
            ),
            (&["BACKUP-LOCK-8", "BACKUP_MANIFEST", "data/8-a-1.copy.zst"], &[]),
            (
                &["BACKUP-LOCK-7", "BACKUP-LOCK-8", "MANIFEST-x", "data/7-a-1.copy.zst"],
                &["data/7-a-1.copy.zst", "BACKUP-LOCK-7"],
            ),
            (&["data/7-a-1.copy.zst"], &["data/7-a-1.copy.zst"]),
            (&[], &[]),
        ] {
            assert_eq!(of_job(JobId(7), &entries(there)), removed, "{there:?}");
        }
    }
}
