//! The export of one shard, watched from the coordinator: what a span asks of a worker, and what its end means.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use cluster::{NodeId, Peers};
use fleet::founders::{SpanRequest, is_invalidated, is_point_lost};
use jobs::Run;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::away;
use crate::busy::Busy;
use crate::deal::{AsyncDone, Deal, End};
use crate::export::{EXPORT, Request, Task};
use crate::holders::Holders;
use crate::layout;
use crate::manifest::FileEntry;
use crate::pace::SharedPace;
use crate::pausepoints::AFTER_FIRST_SPAN;
use crate::point::{self, ShardPoint};
use crate::rules::Rules;
use crate::spans::{self, Span};

/// A span takes no longer. A worker has a deadline of its own for every piece of it, and one that is gone is noticed by
/// its silence: this is only the end of all patience, for a table that cannot be cut into ranges.
const SPAN_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A finished span, as the next coordinator finds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Finished {
    pub(crate) number: u32,
    pub(crate) file: FileEntry,
}

/// The point cannot be read from any more: the shard's export begins anew at another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shard has to be read at another point: {said}")]
pub(crate) struct Invalidated {
    /// Why.
    #[source]
    pub(crate) said: PgError,
    /// The database that was read when it was noticed.
    pub(crate) database: Option<String>,
}

/// What stays the same for all spans of a shard.
pub(crate) struct Shard<'s> {
    pub(crate) run: &'s Run,
    pub(crate) peers: &'s Peers,
    pub(crate) point: &'s ShardPoint,
    /// The nodes whose founders are to be read, of those that have any at the point.
    pub(crate) servers: &'s [NodeId],
    /// The directory of the backup, with its keys.
    pub(crate) uri: &'s str,
    pub(crate) rules: &'s Rules,
    /// What is at work on the nodes, for other shards, too.
    pub(crate) busy: &'s Busy,
    /// How far the job is, with all its shards.
    pub(crate) pace: &'s SharedPace,
    /// Whose own directories are written to.
    pub(crate) holders: &'s Holders<'s>,
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
    pub(crate) async fn export(&self, spans: &[Span], finished: Vec<Finished>) -> anyhow::Result<Vec<FileEntry>> {
        let (finished, open) = left_of(spans, finished);
        let open: Vec<(Span, u64)> = open.into_iter().map(|span| (span.clone(), span.weight.max(1))).collect();
        let (peers, shard) = (self.peers, self.point.shard.as_str());
        let total = spans::weight(spans);
        let done = total - open.iter().map(|(_, weight)| weight).sum::<u64>();
        self.pace.begins(shard, self.point.modes_in_short(), (done, total), Instant::now());
        let mut noted = Noted { shard: self, finished };
        let at_once = self.point.opened.point.readers;
        let deal = Deal { peers, rules: self.rules, shard, servers: self.servers, at_once, busy: self.busy };
        let ends = |span: &Span, said: &PgError, server: NodeId| {
            let end = || Invalidated { said: said.clone(), database: Some(span.database.clone()) }.into();
            if is_invalidated(said) {
                // What was changed is changed on every server.
                return Some(End::All(end()));
            }
            if said.code == SqlState::TOO_MANY_CONNECTIONS {
                return Some(End::Crowded);
            }
            let gone = said.code == SqlState::CONNECTION_FAILURE && !deal.has_server(server);
            (gone || is_point_lost(said)).then(|| End::Server(end()))
        };
        deal.run(open, |worker, server, span| self.one(worker, server, span), ends, &mut noted).await?;
        self.pace.ends(shard);
        noted.finished.sort_by_key(|done| done.number);
        if noted.finished.len() != spans.len() {
            bail!("{} files were written for {} spans", noted.finished.len(), spans.len());
        }
        Ok(noted.finished.into_iter().map(|done| done.file).collect())
    }

    async fn one(&self, worker: NodeId, server: NodeId, span: Span) -> anyhow::Result<FileEntry> {
        // A try that seems lost may still be writing: it never shares a name with the next.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let path = layout::data(self.run.id, self.run.claim, NEXT.fetch_add(1, Ordering::Relaxed));
        let task = Task {
            job: self.run.id.0,
            uri: self.uri.to_owned(),
            filter: self.rules.filter.to_string(),
            path,
            founder: server,
            span: SpanRequest { lease: self.point.lease, database: span.database, what: span.what },
        };
        self.holders.note(worker).await?;
        self.peers.call(worker, EXPORT, &Request::Span(Box::new(task)), SPAN_DEADLINE).await
    }
}

/// What of the spans is finished, and what is still open. By what it holds and not by its number alone: another version
/// may have cut the tables otherwise.
fn left_of(spans: &[Span], finished: Vec<Finished>) -> (Vec<Finished>, Vec<&Span>) {
    let mut finished: BTreeMap<u32, Finished> = finished.into_iter().map(|done| (done.number, done)).collect();
    let is = |done: &Finished, span: &Span| {
        done.file.database == span.database && done.file.what.as_ref() == Some(&span.what)
    };
    let mut kept = Vec::new();
    let mut open = Vec::new();
    for span in spans {
        match finished.remove(&span.number).filter(|done| is(done, span)) {
            Some(done) => kept.push(done),
            None => open.push(span),
        }
    }
    (kept, open)
}

/// What is finished, in the job's checkpoint and for the manifest.
struct Noted<'n> {
    shard: &'n Shard<'n>,
    finished: Vec<Finished>,
}

impl AsyncDone<Span, FileEntry> for &mut Noted<'_> {
    async fn done(&mut self, span: Span, weight: u64, file: FileEntry) -> anyhow::Result<()> {
        let entry = Finished { number: span.number, file };
        let key = format!("{}{:08}", key(self.shard.point), span.number);
        self.shard.run.keep(&key, &entry).await?;
        self.finished.push(entry);
        self.shard.run.bears_fruit().await?;
        self.shard.run.pausepoint(AFTER_FIRST_SPAN).await?;
        let shard = self.shard;
        match shard.pace.moved(&shard.point.shard, weight, Instant::now()) {
            Some((fraction, words)) => shard.run.progress(fraction, &words).await,
            None => Ok(()),
        }
    }

    async fn lost(&mut self, server: NodeId, error: &anyhow::Error) -> anyhow::Result<()> {
        let shard = &self.shard.point.shard;
        tracing::warn!(%server, shard, "its founders are lost; the others of the point are read: {error:#}");
        let said = error.downcast_ref::<Invalidated>().map(|lost| lost.said.clone());
        let said = said.context("say what was lost")?;
        if away::withdrawn(&self.shard.peers.cluster().view(), self.shard.rules, server).is_some() {
            // It lives, and founders would keep dead rows on what may be the users' primary by now.
            point::close(self.shard.peers, server, self.shard.point.lease).await;
        }
        self.shard.run.note(&anyhow::Error::from(said).context("read at the same point from another server")).await
    }
}
