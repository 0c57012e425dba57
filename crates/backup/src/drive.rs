//! The export of one shard, watched from the coordinator: spans dealt out, finished, lost and dealt out again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cluster::{NodeId, Peers};
use fleet::founders::{SpanRequest, is_invalidated, is_point_lost};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use jobs::{LostClaim, Retryable, Run};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::assign::assign;
use crate::export::{EXPORT, Task};
use crate::layout;
use crate::manifest::FileEntry;
use crate::point::{ShardPoint, leaseholder, workers};
use crate::spans::Span;

/// Spans that one worker has at a time: while one is being compressed the other is being read.
const SPANS_AT_ONCE: usize = 2;

/// A span takes no longer; a worker that is stuck for less is told by its own deadlines.
const SPAN_DEADLINE: Duration = Duration::from_secs(1800);

/// A span that fails for reasons that may pass is tried this often.
const TRIES_MAX: u32 = 4;

/// Progress is written no more often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// A finished span, as the next coordinator finds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Finished {
    pub(crate) number: u32,
    pub(crate) file: FileEntry,
}

/// The point cannot be read from any more: the shard's export begins anew at another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shard has to be read at another point: {0}")]
pub(crate) struct Invalidated(#[source] pub(crate) PgError);

/// What stays the same for all spans of a shard.
pub(crate) struct Shard<'s> {
    pub(crate) run: &'s Run,
    pub(crate) peers: &'s Peers,
    pub(crate) point: &'s ShardPoint,
    /// The directory of the backup, with its keys.
    pub(crate) uri: &'s str,
    pub(crate) filter: &'s cluster::Filter,
    /// The share of the whole job that this shard is, and where it begins.
    pub(crate) progress: (f64, f64),
}

struct Ended {
    worker: NodeId,
    span: Span,
    tries: u32,
    outcome: anyhow::Result<FileEntry>,
}

/// The key under which a finished span is remembered.
pub(crate) fn key(point: &ShardPoint) -> String {
    format!("span/{}/{}/", point.shard, point.lease)
}

impl Shard<'_> {
    /// Exports the spans that are not among `finished`, and gives the files of all.
    ///
    /// # Errors
    ///
    /// [`Invalidated`] at the root; a lost claim; no node left that matches; or a span that fails for good.
    pub(crate) async fn export(&self, spans: &[Span], mut finished: Vec<Finished>) -> anyhow::Result<Vec<FileEntry>> {
        let total: u64 = spans.iter().map(|span| span.weight.max(1)).sum();
        let is_open = |span: &&Span| !finished.iter().any(|done| done.number == span.number);
        let mut open: Vec<(Span, u32)> = spans.iter().filter(is_open).map(|span| (span.clone(), 1)).collect();
        let mut done = total - open.iter().map(|(span, _)| span.weight.max(1)).sum::<u64>();
        let mut queues: BTreeMap<NodeId, VecDeque<(Span, u32)>> = BTreeMap::new();
        let mut at_work: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut lost: Vec<NodeId> = Vec::new();
        let mut running = FuturesUnordered::new();
        let mut reported = Instant::now();
        loop {
            if !open.is_empty() {
                self.deal(&mut open, &lost, &mut queues)?;
            }
            for (worker, queue) in &mut queues {
                let busy = at_work.entry(*worker).or_default();
                while *busy < SPANS_AT_ONCE
                    && let Some((span, tries)) = queue.pop_front()
                {
                    *busy += 1;
                    running.push(self.one(*worker, span, tries));
                }
            }
            let Some(ended) = running.next().await else { break };
            *at_work.entry(ended.worker).or_default() -= 1;
            match ended.outcome {
                Ok(file) => {
                    let entry = Finished { number: ended.span.number, file };
                    let key = format!("{}{:08}", key(self.point), ended.span.number);
                    self.run.keep(&key, &entry).await?;
                    done += ended.span.weight.max(1);
                    finished.push(entry);
                    if reported.elapsed() >= PROGRESS_EVERY {
                        reported = Instant::now();
                        let (begin, share) = self.progress;
                        let fraction = begin + share * done as f64 / total as f64;
                        self.run.progress(fraction, &format!("exporting shard {}", self.point.shard)).await?;
                    }
                }
                Err(error) => {
                    let worker = ended.worker;
                    self.judge(error, worker, ended.tries, &mut lost).await?;
                    open.push((ended.span, ended.tries + 1));
                    if lost.contains(&worker) {
                        open.extend(queues.remove(&worker).unwrap_or_default());
                    }
                }
            }
        }
        finished.sort_by_key(|done| done.number);
        Ok(finished.into_iter().map(|done| done.file).collect())
    }

    /// Deals spans to the nodes that match and live now.
    fn deal(
        &self,
        open: &mut Vec<(Span, u32)>,
        lost: &[NodeId],
        queues: &mut BTreeMap<NodeId, VecDeque<(Span, u32)>>,
    ) -> anyhow::Result<()> {
        let view = self.peers.cluster().view();
        let mut workers = workers(&view, self.filter, self.point.node);
        workers.retain(|worker| !lost.contains(&worker.id));
        if workers.is_empty() {
            let message = "no healthy sql instances available matching locality requirement";
            return Err(anyhow::Error::new(PgError::new(SqlState::UNCATEGORIZED, message)).context(Retryable));
        }
        let leaseholder = leaseholder(&view, &self.point.shard)?;
        let weights: Vec<u64> = open.iter().map(|(span, _)| span.weight).collect();
        for (worker, piece) in assign(&weights, &leaseholder, &workers).into_iter().zip(open.drain(..)) {
            queues.entry(worker).or_default().push_back(piece);
        }
        Ok(())
    }

    async fn one(&self, worker: NodeId, span: Span, tries: u32) -> Ended {
        // A try that seems lost may still be writing: it never shares a name with the next.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let path = layout::data(self.run.id.0, self.run.claim, NEXT.fetch_add(1, Ordering::Relaxed));
        let lease = self.point.lease;
        let request = SpanRequest { lease, database: span.database.clone(), what: span.what.clone() };
        let task = Task {
            uri: self.uri.to_owned(),
            filter: self.filter.to_string(),
            path,
            founder: self.point.node,
            span: request,
        };
        let outcome = tokio::select! {
            outcome = self.peers.call::<FileEntry>(worker, EXPORT, &task, SPAN_DEADLINE) => outcome,
            () = self.goes(worker) => {
                let message = format!("node {worker} was lost while it exported a span");
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
            }
        };
        Ended { worker, span, tries, outcome }
    }

    /// Returns when `node` does not answer any more.
    async fn goes(&self, node: NodeId) {
        let mut views = self.peers.cluster().subscribe();
        let gone = views.wait_for(|view| !view.node(node).is_some_and(|known| known.reachable)).await;
        drop(gone);
    }

    fn is_reachable(&self, node: NodeId) -> bool {
        self.peers.cluster().view().node(node).is_some_and(|known| known.reachable)
    }

    /// What a failed span means: for the worker, for the point, or for the job.
    async fn judge(
        &self,
        error: anyhow::Error,
        worker: NodeId,
        tries: u32,
        lost: &mut Vec<NodeId>,
    ) -> anyhow::Result<()> {
        if error.downcast_ref::<LostClaim>().is_some() {
            return Err(error);
        }
        tracing::warn!(job = %self.run.id, %worker, "span failed: {error:#}");
        let said = PgError::of(&error).cloned();
        if let Some(said) = said.clone().filter(|said| is_invalidated(said) || is_point_lost(said)) {
            return Err(Invalidated(said).into());
        }
        let connection = said.as_ref().is_some_and(|said| said.code == SqlState::CONNECTION_FAILURE);
        if connection && !self.is_reachable(worker) {
            // Its death is not the span's fault, and each node dies once.
            lost.push(worker);
            return Ok(());
        }
        if connection && !self.is_reachable(self.point.node) {
            let message = format!("node {} is gone, and with it the backup's point", self.point.node);
            return Err(Invalidated(PgError::new(SqlState::CONNECTION_FAILURE, message)).into());
        }
        // What a store or a lock refuses now it may grant later; across nodes only the code tells.
        let passing = [SqlState::IO_ERROR, SqlState::LOCK_NOT_AVAILABLE, SqlState::OBJECT_IN_USE];
        let may_pass = said.is_some_and(|said| passing.contains(&said.code)) || storage::is_transient(&error);
        if tries < TRIES_MAX && (connection || may_pass) {
            tokio::time::sleep(Duration::from_millis(200) * 2_u32.pow(tries)).await;
            return Ok(());
        }
        Err(error)
    }
}
