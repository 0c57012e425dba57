//! One shard of a backup job, on its coordinator: its point, its schemas, and its rows, read at another point when that one
//! is spoilt or lost.

use std::time::Duration;

use anyhow::Context as _;
use bytes::BytesMut;
use cluster::NodeId;
use fleet::founders::{DatabasePlan, FOUNDERS, Request, SCHEMA_BYTES_MAX, SequencePlan, is_invalidated, is_point_lost};
use futures_util::stream::StreamExt as _;
use pgerror::{PgError, SqlState};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::Story;
use crate::away::{self, BLIP_MAX};
use crate::drive::{self, Finished, Invalidated, Shard};
use crate::export::sha256;
use crate::hold::{self, Held, Spoilt};
use crate::manifest::{FileEntry, ShardPart};
use crate::pausepoints::AFTER_SCHEMAS;
use crate::point::{self, ShardPoint, Tries};
use crate::rules::Chosen;
use crate::{layout, sequences, spans};

/// The founders' node has the dump ready when it is asked for it.
const SCHEMA_DEADLINE: Duration = Duration::from_secs(60);

/// A shard's point, held until the shard's turn comes.
pub(super) struct Taken {
    pub(super) point: ShardPoint,
    /// Renews its founders.
    alive: AbortOnDropHandle<()>,
    spoilt: Spoilt,
    /// The locks on what has spoilt points before.
    held: Option<Held>,
}

impl Story<'_> {
    /// A shard's point, with what an earlier run has held: that is held again before anything is read.
    pub(super) async fn taken(&self, shard: &str, databases: &[String]) -> anyhow::Result<Taken> {
        let spoilt = self.run.kept::<Spoilt>(&Spoilt::key(shard)).await?.unwrap_or_default();
        // Locks may be waited for; founders that are there already live on meanwhile.
        let before = match spoilt.held() {
            [] => None,
            _ => self.run.kept::<ShardPoint>(&format!("point/{shard}")).await?,
        };
        let _before = before.map(|point| point::keep_alive(None, self.peers, &point));
        let held = self.hold(shard, &spoilt).await;
        let point = self.point(shard, databases).await?;
        Ok(Taken { alive: point::keep_alive(None, self.peers, &point), point, spoilt, held })
    }

    /// The point of an earlier run, if its founders live; else a new one.
    async fn point(&self, shard: &str, databases: &[String]) -> anyhow::Result<ShardPoint> {
        let key = format!("point/{shard}");
        let before = self.run.kept::<ShardPoint>(&key).await?;
        let Some(point) = before else { return self.new_point(shard, databases, Tries::default()).await };
        let Some(why) = self.unusable(&point).await? else {
            tracing::info!(job = %self.run.id, shard, "an earlier run's point is kept");
            return Ok(point);
        };
        self.run.note(&anyhow::Error::from(why).context("read at another point")).await?;
        // Of several servers some may hold it still.
        point::close_all(self.peers, &point).await;
        let tries = point.tries.lost();
        self.new_point(shard, databases, tries).await
    }

    /// Why nothing can be read at the point any more, unless a server still holds it that may be read. The schema is on the
    /// first server alone until it has been moved.
    async fn unusable(&self, point: &ShardPoint) -> anyhow::Result<Option<PgError>> {
        let mut alive = point::alive_in_a_moment(self.peers, point, BLIP_MAX).await;
        let view = self.peers.cluster().view();
        let withdrawn = |node: &NodeId| away::withdrawn(&view, &self.rules, *node);
        let why = alive.iter().find_map(withdrawn);
        alive.retain(|node| withdrawn(node).is_none());
        let mut is_usable = !alive.is_empty();
        if !alive.contains(&point.node) {
            for database in &point.opened.databases {
                is_usable &= self.run.kept::<FileEntry>(&schema_key(point, &database.name)).await?.is_some();
            }
        }
        let lost = || {
            let nodes: Vec<String> = point.nodes().iter().map(NodeId::to_string).collect();
            let (shard, nodes) = (&point.shard, nodes.join(" and node "));
            let message = format!("the point of shard \"{shard}\" was lost with node {nodes} or its server");
            PgError::new(SqlState::CONNECTION_FAILURE, message)
        };
        Ok((!is_usable).then(|| why.unwrap_or_else(lost)))
    }

    async fn new_point(&self, shard: &str, databases: &[String], tries: Tries) -> anyhow::Result<ShardPoint> {
        if tries.are_over() {
            let Tries { spoilt, lost } = tries;
            let message = format!("shard \"{shard}\" could not be read at one point");
            return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
                .detail(format!(
                    "Points taken: {spoilt} were spoilt by schema changes, {lost} were lost with their server or node."
                ))
                .into());
        }
        self.run.progress(self.pace.fraction(), &format!("taking a point of shard {shard}")).await?;
        let point = point::open(self.run, self.peers, (shard, databases), &self.rules, tries).await?;
        point::or_close(self.peers, &point.nodes(), point.lease, self.make_room(&point)).await?;
        // Kept before anything is read at it: two points are never mixed. Where it is not known whether it was kept, the next
        // run may find it.
        if let Err(error) = self.run.keep(&format!("point/{shard}"), &point).await {
            if !jobs::may_pass(&error) {
                point::close_all(self.peers, &point).await;
            }
            return Err(error);
        }
        Ok(point)
    }

    /// What was read at the point before is not read any more.
    async fn make_room(&self, point: &ShardPoint) -> anyhow::Result<()> {
        let shard = &point.shard;
        let modes: Vec<String> = point.modes.iter().map(told).collect();
        if !modes.is_empty() {
            self.run
                .progress(self.pace.fraction(), &format!("a point of shard {shard} is taken: {}", modes.join("; ")))
                .await?;
        }
        self.run.forget(&format!("span/{shard}/")).await?;
        self.run.forget(&format!("schema/{shard}/")).await
    }

    /// Exports one shard, at another point when the first one is spoilt.
    pub(super) async fn shard(&self, taken: Taken) -> anyhow::Result<ShardPart> {
        let Taken { mut point, alive, mut spoilt, mut held } = taken;
        // From here on whoever reads it keeps it alive.
        drop(alive);
        loop {
            let error = match self.read(&point).await {
                Ok(part) => return Ok(part),
                Err(error) => error,
            };
            let Some(lost) = error.downcast_ref::<Invalidated>().cloned() else { return Err(error) };
            let Invalidated { said: reason, database } = lost;
            tracing::warn!(job = %self.run.id, shard = point.shard, "another point is needed: {reason}");
            self.run.note(&anyhow::Error::from(reason.clone()).context("read at another point")).await?;
            point::close_all(self.peers, &point).await;
            let tries = if is_invalidated(&reason) { point.tries.spoilt() } else { point.tries.lost() };
            if tries.are_over() {
                return Err(reason.into());
            }
            spoilt.add(tries.spoilt, hold::tables_of(&reason, database.as_deref(), &point.opened.databases));
            self.run.keep(&Spoilt::key(&point.shard), &spoilt).await?;
            if !spoilt.held().is_empty() && self.forbids_leaseholder(&point.shard) {
                return Err(hold::forbidden(&point.shard, spoilt.held(), &reason).into());
            }
            // What was held before goes when the new locks are there.
            held = self.hold(&point.shard, &spoilt).await.or(held);
            let databases = self.payload.shards.get(&point.shard).cloned().unwrap_or_default();
            point = self.new_point(&point.shard, &databases, tries).await?;
        }
    }

    /// Holds what has to be held. Where it cannot be, what is read may be spoilt again, and that is found out then.
    async fn hold(&self, shard: &str, spoilt: &Spoilt) -> Option<Held> {
        if spoilt.held().is_empty() || self.forbids_leaseholder(shard) {
            return None;
        }
        match hold::hold(self.peers, shard, spoilt.held()).await {
            Ok(held) => Some(held),
            Err(error) => {
                tracing::warn!(job = %self.run.id, "tables could not be held: {error:#}");
                None
            }
        }
    }

    /// Whether the statement keeps tables from being held on the leaseholder, where no row may be read either.
    fn forbids_leaseholder(&self, shard: &str) -> bool {
        let view = self.peers.cluster().view();
        self.rules.forbid(view.leader(shard).map(|leader| &leader.locality))
    }

    /// Reads a shard at its point, and says in the job whose replay went on before that was done.
    async fn read(&self, point: &ShardPoint) -> anyhow::Result<ShardPart> {
        let alive = point::keep_alive(Some(self.run), self.peers, point);
        let part = Box::pin(self.read_at(point)).await;
        drop(alive);
        point::alive(Some(self.run), self.peers, point).await;
        part
    }

    async fn read_at(&self, point: &ShardPoint) -> anyhow::Result<ShardPart> {
        let schemas = self.schemas(point).await?;
        self.run.pausepoint(AFTER_SCHEMAS).await?;
        let finished: Vec<Finished> = self.run.kept_under(&drive::key(point)).await?;
        let alive = point::alive(None, self.peers, point).await;
        // Where none answers now, reading tells why.
        let servers = if alive.is_empty() { point.nodes() } else { alive };
        let (run, peers, rules) = (self.run, self.peers, &self.rules);
        let (uri, busy, pace) = (self.uri.as_str(), &self.busy, &self.pace);
        let holders = &self.holders;
        let shard = Shard { run, peers, point, servers: &servers, uri, rules, busy, pace, holders };
        let files = shard.export(&spans::cut(&point.opened.databases), finished).await?;
        let mut databases = point.opened.databases.clone();
        if !point.opened.point.in_recovery {
            for database in &mut databases {
                self.later_sequences(point, database).await?;
            }
        }
        Ok(ShardPart {
            shard: point.shard.clone(),
            read_from: point.node,
            read_beside: point.others.clone(),
            point: point.opened.point.clone(),
            modes: point.modes.clone(),
            databases,
            schemas,
            files,
        })
    }

    /// On a primary sequences go on while rows are read, and rows of the point may use what was given out just after
    /// it was taken: of both values the one that is further along is kept.
    async fn later_sequences(&self, point: &ShardPoint, database: &mut DatabasePlan) -> anyhow::Result<()> {
        let request = Request::Sequences { lease: point.lease, database: database.name.clone() };
        let later: Vec<SequencePlan> =
            self.peers.call(point.node, FOUNDERS, &request, SCHEMA_DEADLINE).await.map_err(lost)?;
        sequences::merge(&mut database.sequences, &later);
        Ok(())
    }

    /// The same where nothing is lost with the point: another one is taken when its turn comes.
    pub(super) async fn schemas_or_not(&self, point: &ShardPoint) -> anyhow::Result<()> {
        match self.schemas(point).await {
            Err(error) if error.downcast_ref::<Invalidated>().is_some() => Ok(()),
            done => done.map(drop),
        }
    }

    /// The schemas of a point. What an earlier run has moved is there, and so is what was moved from a server that is
    /// lost.
    async fn schemas(&self, point: &ShardPoint) -> anyhow::Result<Vec<FileEntry>> {
        let mut schemas = Vec::new();
        for database in &point.opened.databases {
            let key = schema_key(point, &database.name);
            schemas.push(match self.run.kept(&key).await? {
                Some(moved) => moved,
                None => {
                    let moved = self.schema(point, &database.name).await?;
                    self.run.keep(&key, &moved).await?;
                    moved
                }
            });
        }
        Ok(schemas)
    }

    /// Moves a schema from the founders' node, which need not reach the store, to the store.
    async fn schema(&self, point: &ShardPoint, database: &str) -> anyhow::Result<FileEntry> {
        let request = Request::Schema { lease: point.lease, database: database.to_owned() };
        let asked = self.peers.download(point.node, FOUNDERS, &request, SCHEMA_DEADLINE).await;
        let mut stream = asked.map_err(lost)?;
        let mut dump = BytesMut::new();
        while let Some(piece) = timeout(SCHEMA_DEADLINE, stream.next()).await.map_err(|_| stalled(point))? {
            dump.extend_from_slice(&piece?);
            if dump.len() as u64 > SCHEMA_BYTES_MAX {
                let message = format!("the schema of database \"{database}\" is longer than {SCHEMA_BYTES_MAX} bytes");
                return Err(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).into());
            }
        }
        let dump = dump.freeze();
        let path = layout::schema(&point.shard, database, point.lease);
        // The lease is in the name: what is there already is this very dump.
        self.create(&path, &dump).await?;
        Ok(FileEntry {
            path,
            node: self.store.node(),
            database: database.to_owned(),
            what: None,
            encoding: "pg_dump custom".to_owned(),
            rows: 0,
            bytes: dump.len() as u64,
            file_bytes: dump.len() as u64,
            sha256: sha256(&dump),
            read_from: None,
            written_by: self.peers.cluster().me().node_id.context("coordinate as a node that has a number")?,
        })
    }
}

/// The key under which a schema is remembered that has been moved to the store.
fn schema_key(point: &ShardPoint, database: &str) -> String {
    format!("schema/{}/{}/{database}", point.shard, point.lease)
}

/// A standby's mode, for whoever looks at the job.
fn told((node, chosen): (&NodeId, &Chosen)) -> String {
    format!("node {node} {} ({})", chosen.mode, chosen.why)
}

fn stalled(point: &ShardPoint) -> PgError {
    let message = format!("the schema from node {} has stopped coming", point.node);
    PgError::new(SqlState::CONNECTION_FAILURE, message)
}

/// A point that is gone is no reason to fail: another one is taken.
fn lost(error: anyhow::Error) -> anyhow::Error {
    match PgError::of(&error) {
        Some(said) if is_point_lost(said) => Invalidated { said: said.clone(), database: None }.into(),
        _ => error,
    }
}
