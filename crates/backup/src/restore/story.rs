//! A restore job, step by step, on its coordinator. Every step can be the first one of a run that takes over.
//!
//! Each run has a number, higher than those before it, which goes with every request: a coordinator that was stopped and
//! goes on is refused where a later one has been. Whatever is written to the job's row says whether the claim is still
//! this run's; it is asked for once more before databases get their names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cluster::service::Boxed;
use cluster::{Filter, NodeId, Peers};
use fleet::founders::What;
use fleet::loader::{
    Create, Created, Finish, JobDatabase, LOADER, Load, Loaded, Publish, Request, is_superseded, needs_schema,
};
use futures_util::future::try_join_all;
use jobs::{LostClaim, Resumer, Retryable, Run};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use storage::{Stores, Uri};
use tokio::time::Instant;

use super::giving::{Giving, leader_of};
use super::import::{IMPORT, Task};
use super::parts::{self, Part};
use super::plan::superuser_of;
use super::shard_map::ShardMap;
use super::source::{Source, may_be_read_elsewhere};
use super::target;
use crate::busy::Busy;
use crate::deal::{AsyncDone, Deal, End};
use crate::manifest::FileEntry;
use crate::pace::Pace;
use crate::patience::{later, patiently, server_may_pass};
use crate::pausepoints;
use crate::plan::{SealSource, in_time};
use crate::targets::remark;

/// The type of these jobs.
pub const RESTORE_TYPE: &str = "RESTORE";

/// A question to the node beside the target, and the making of an empty database.
pub(crate) const ASK_DEADLINE: Duration = Duration::from_secs(120);

/// Objects without their rows.
const SCHEMA_DEADLINE: Duration = Duration::from_secs(3600);

/// Indexes, constraints, views and statistics of a whole database: the end of all patience.
const FINISH_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

/// One file; its own parts have deadlines that are shorter.
const FILE_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// What the target has lost is loaded again this often.
const ROUNDS_MAX: usize = 5;

/// Files that are loaded at the same time.
const LOADERS: usize = 6;

/// What loading rows is of the whole; the rest is indexes, constraints and views.
const LOAD_SHARE: f64 = 0.7;

/// Where on the way only names are left to be given.
const NAMED_AT: f64 = 0.99;

/// Under which key it stands that all rows are in: its value has the OIDs of the databases, in the order of the parts.
const FINISHING: &str = "finishing";

/// Under which key it stands that all databases have been made whole.
const WHOLE: &str = "whole";

/// Under which key the directory of the backup stands, once it was found: the newest is the newest when the job began.
const SUBDIR: &str = "subdir";

/// What a restore job was made with, for everybody to read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Payload {
    /// The databases, by the names that they have in the backup.
    pub(crate) databases: Vec<String>,
    /// Whether none is named, and all come back that the backup of a whole cluster holds.
    pub(crate) full_cluster: bool,
    /// What the only one is called instead.
    pub(crate) new_name: Option<String>,
    /// None is the newest.
    pub(crate) subdir: Option<String>,
    pub(crate) filter: String,
    pub(crate) user: String,
    /// The job's description before and behind the directory.
    #[serde(default)]
    pub(crate) description: Option<(String, String)>,
    /// Which shard's part goes into which other shard.
    #[serde(default)]
    pub(crate) shard_map: ShardMap,
    /// The fleet's shards when the job was made.
    #[serde(default)]
    pub(crate) fleet: Vec<String>,
    /// The node that the statement was sent to, if it had a number.
    #[serde(default)]
    pub(crate) gateway: Option<NodeId>,
}

/// Runs restore jobs.
pub struct ResumeRestore {
    peers: Peers,
    stores: Stores,
    seal: SealSource,
}

/// One run of one job.
struct Story<'s> {
    run: &'s Run,
    peers: &'s Peers,
    stores: &'s Stores,
    payload: Payload,
    filter: Filter,
    collection: Uri,
    /// The number of this run.
    number: i64,
}

impl ResumeRestore {
    /// A resumer for jobs of [`RESTORE_TYPE`]; `seal` opens what only nodes may read.
    pub fn new(peers: Peers, stores: Stores, seal: SealSource) -> Arc<Self> {
        Arc::new(Self { peers, stores, seal })
    }

    /// Removes what the job has made, by its mark, in whichever shard: the backup itself may not be readable any more.
    /// Databases that may be their user's already are not taken back; then the job goes to its end, and has succeeded.
    async fn take_back(&self, run: &Run) -> anyhow::Result<Option<Value>> {
        let number = next_number(run).await?;
        if let Some(giving) = Giving::begun(run).await? {
            giving.give_again(&self.peers, number).await?;
            return Ok(Some(giving.result));
        }
        let view = self.peers.cluster().view();
        let mut failed = None;
        for (shard, nth) in run.kept_under::<(String, u32)>("made/").await? {
            let removed = async {
                let node = leader_of(&view, &shard, "A database that was not finished may be there.")?;
                let request = Request::Drop { job: JobDatabase { job: run.id.0, nth }, run: number };
                target::ask::<()>(&self.peers, node, &request, ASK_DEADLINE).await
            };
            if let Err(error) = removed.await {
                tracing::warn!(job = %run.id, shard, "an unfinished database may be left: {error:#}");
                failed = Some(error);
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn story(&self, run: &Run) -> anyhow::Result<Value> {
        let payload: Payload = serde_json::from_value(run.payload.clone()).context("read the job's payload")?;
        let sealed = run.sealed.as_deref().context("read the job's URI")?;
        let story = Story {
            run,
            peers: &self.peers,
            stores: &self.stores,
            filter: payload.filter.parse().context("read the job's filter")?,
            collection: Uri::parse(&(self.seal)()?.open(sealed)?)?,
            payload,
            number: next_number(run).await?,
        };
        story.tell().await
    }
}

impl Resumer for ResumeRestore {
    fn resume(&self, run: Run) -> Boxed<'_, Value> {
        Box::pin(async move {
            match self.story(&run).await {
                // What has been found once is there.
                Err(error) if storage::is_transient(&error) && run.kept::<String>(SUBDIR).await?.is_some() => {
                    Err(later(error))
                }
                done => done,
            }
        })
    }

    fn revert(&self, run: Run) -> Boxed<'_, Option<Value>> {
        Box::pin(async move { self.take_back(&run).await })
    }

    /// Databases are removed by the nodes beside them; no store is touched.
    fn reverts_anywhere(&self, _run: Run) -> Boxed<'_, bool> {
        Box::pin(std::future::ready(Ok(true)))
    }
}

impl Story<'_> {
    async fn tell(&self) -> anyhow::Result<Value> {
        if let Some(giving) = Giving::begun(self.run).await? {
            giving.give_again(self.peers, self.number).await?;
            return Ok(giving.result);
        }
        let found = self.run.kept::<String>(SUBDIR).await?;
        let chosen = found.as_deref().or(self.payload.subdir.as_deref());
        let source = self.find(chosen).await.map_err(|error| self.absent(error, found.is_some()))?;
        self.run.keep(SUBDIR, &source.subdir).await?;
        let skipped = &source.manifest.skipped_shards;
        if let Some((before, behind)) = &self.payload.description
            && (self.payload.subdir.is_none() || !skipped.is_empty())
        {
            self.run.describe(&format!("{before}{}{behind}{}", source.subdir, remark(skipped))).await?;
        }
        let parts = parts::parts(&source, &self.payload, self.run.id.0, &self.peers.cluster().view())?;
        self.check_rights(&parts).await?;
        self.run.pausepoint(pausepoints::AFTER_SOURCE).await?;
        self.restore(&source, &parts).await
    }

    /// Without a filter by way of the gateway first, which finds what its client sees there, and also where only another
    /// node reads the store; each is tried once, before it is waited for.
    async fn find(&self, subdir: Option<&str>) -> anyhow::Result<Source> {
        let (stores, peers, collection) = (self.stores, self.peers, &self.collection);
        let find = || Source::find(stores, peers, collection, subdir, &self.filter);
        if let Some(gateway) = self.gateway_elsewhere() {
            match Source::find(&stores.through(gateway), peers, collection, subdir, &self.filter).await {
                Err(error) if may_be_read_elsewhere(&error) => {
                    tracing::info!(%gateway, "the backup is not read by way of the gateway: {error:#}");
                }
                found => return found,
            }
        }
        let here = match find().await {
            Err(error) => error,
            found => return found,
        };
        if self.filter.is_empty()
            && let Some(source) = Source::find_elsewhere(stores, peers, collection, subdir, &here).await
        {
            return Ok(source);
        }
        if storage::is_transient(&here) { patiently(find).await } else { Err(here) }
    }

    /// The gateway, if it is another node that answers, and any node may come to the store.
    fn gateway_elsewhere(&self) -> Option<NodeId> {
        let gateway = self.payload.gateway.filter(|_| self.filter.is_empty() && self.collection.is_shared())?;
        let cluster = self.peers.cluster();
        let answers = cluster.view().node(gateway).is_some_and(|known| known.reachable);
        (answers && cluster.me().node_id != Some(gateway)).then_some(gateway)
    }

    /// Of a node's own directory nothing is seen while it is away: a backup that was found there before is there still.
    fn absent(&self, error: anyhow::Error, was_found: bool) -> anyhow::Error {
        let is_absent = PgError::of(&error).is_some_and(|said| said.code == SqlState::UNDEFINED_FILE);
        let has_own = self.collection.on(NodeId(0)).is_some();
        if was_found && has_own && is_absent { error.context(Retryable) } else { error }
    }

    /// What is in a backup runs as SQL with all rights, so its user has to have them where it runs, and to have them
    /// still.
    async fn check_rights(&self, parts: &[Part<'_>]) -> anyhow::Result<()> {
        let shards: BTreeSet<&str> = parts.iter().map(|part| part.shard.as_str()).collect();
        in_time(superuser_of(self.peers, shards.into_iter(), &self.payload.user)).await
    }

    async fn restore(&self, source: &Source, parts: &[Part<'_>]) -> anyhow::Result<Value> {
        let files: Vec<&FileEntry> = parts.iter().flat_map(|part| part.files().chain(part.schemas())).collect();
        patiently(|| source.check(&files)).await?;
        // An earlier run had all rows in, and some of the databases may have their names already: then nothing but the
        // end of it can be repeated.
        let oids = match self.run.kept::<Vec<u32>>(FINISHING).await? {
            Some(oids) => oids,
            None => self.fill(source, parts).await?,
        };
        self.complete(source, parts, &oids).await?;
        Ok(self.result(source, parts))
    }

    /// Makes the databases and loads all rows; gives their OIDs.
    async fn fill(&self, source: &Source, parts: &[Part<'_>]) -> anyhow::Result<Vec<u32>> {
        parts::check(self.peers, parts, &self.payload).await?;
        let mut made = Vec::new();
        for part in parts {
            made.push(self.create(source, part).await?);
        }
        let total: u64 = parts.iter().flat_map(Part::files).map(|file| file.bytes.max(1)).sum();
        let mut noted = Noted { run: self.run, pace: Pace::new(total, 0, Instant::now()) };
        for (part, created) in parts.iter().zip(&mut made) {
            self.load(source, part, created, &mut noted).await?;
        }
        let oids = made.iter().map(|created| created.oid).collect();
        self.run.keep(FINISHING, &oids).await?;
        self.run.pausepoint(pausepoints::AFTER_LOAD).await?;
        Ok(oids)
    }

    /// Makes all of them whole; then gives all their names; then gives all of them to their user. So when it ends in
    /// between, either none is anybody's, or what is left takes a moment and is repeated.
    async fn complete(&self, source: &Source, parts: &[Part<'_>], oids: &[u32]) -> anyhow::Result<()> {
        self.run.progress(LOAD_SHARE, "building indexes, constraints and views").await?;
        // One after the other on each server: what a database needs is built by several sessions already.
        let mut servers: BTreeMap<&str, Vec<(&Part<'_>, u32)>> = BTreeMap::new();
        for (part, oid) in parts.iter().zip(oids) {
            servers.entry(&part.shard).or_default().push((part, *oid));
        }
        let finished = servers.into_values().map(|parts| async move {
            for (part, oid) in parts {
                self.finish(source, part, oid).await?;
            }
            anyhow::Ok(())
        });
        try_join_all(finished).await?;
        // Once: a run that only finds them whole brings nothing to its end.
        if self.run.kept::<bool>(WHOLE).await?.is_none() {
            self.run.keep(WHOLE, &true).await?;
            self.run.bears_fruit().await?;
        }
        self.run.pausepoint(pausepoints::AFTER_FINISH).await?;
        self.run.progress(NAMED_AT, "giving databases their names").await?;
        let named = parts.iter().zip(oids).map(|(part, oid)| {
            let database = Publish {
                job: part.which,
                database_oid: *oid,
                run: self.number,
                target: part.target.clone(),
                plan: part.database.clone(),
            };
            (part.shard.clone(), database)
        });
        let giving = Giving { databases: named.collect(), result: self.result(source, parts) };
        giving.name(self.run, self.peers, self.number).await?;
        self.run.pausepoint(pausepoints::AFTER_PUBLISH).await?;
        giving.give(self.run, self.peers, self.number).await?;
        self.run.pausepoint(pausepoints::AFTER_RELEASE).await
    }

    async fn create(&self, source: &Source, part: &Part<'_>) -> anyhow::Result<Created> {
        let database = format!("making database {} in shard {}", part.target, part.shard);
        self.run.progress(0.0, &database).await?;
        // Where there may be something to remove, should the job fail.
        let nth = part.which.nth;
        self.run.keep(&format!("made/{nth}/{}", part.shard), &(&part.shard, nth)).await?;
        let target = part.target.clone();
        let (job, run, plan) = (part.which, self.number, part.database.clone());
        let request = Request::Create(Box::new(Create { job, run, target, plan }));
        let created: Created = target::ask(self.peers, part.node, &request, ASK_DEADLINE).await?;
        self.run.pausepoint(pausepoints::AFTER_CREATE).await?;
        if !created.progress.pre_data {
            self.schema(source, part, created.oid).await?;
        }
        self.run.pausepoint(pausepoints::AFTER_PRE_DATA).await?;
        Ok(created)
    }

    /// Gives the schema to the node beside the target, which makes the objects unless they are there.
    async fn schema(&self, source: &Source, part: &Part<'_>, oid: u32) -> anyhow::Result<()> {
        let file = part.schemas().next().context("find the schema in the manifest")?;
        let dump = patiently(|| source.read(file)).await?;
        let request = Request::PreData { job: part.which, database_oid: oid, run: self.number };
        let made = async {
            let mut upload = self.peers.upload(part.node, LOADER, &request, ASK_DEADLINE).await?;
            upload.write(dump).await?;
            upload.finish().await
        };
        let made = target::watching(self.peers, part.node, made);
        tokio::time::timeout(SCHEMA_DEADLINE, made).await.context("make the objects")?
    }

    /// Loads until the target itself says that every file is in: a server that crashed may have lost the last ones.
    async fn load(
        &self,
        source: &Source,
        part: &Part<'_>,
        created: &mut Created,
        noted: &mut Noted<'_>,
    ) -> anyhow::Result<()> {
        let before = noted.pace.done();
        for _ in 0..ROUNDS_MAX {
            noted.pace.back_to(before);
            self.load_missing(source, part, created, noted).await?;
            let request = Request::Progress { job: part.which };
            created.progress = target::ask(self.peers, part.node, &request, ASK_DEADLINE).await?;
            if created.progress.whole
                || part.files().zip(0..).all(|(_, number)| created.progress.spans.contains(&number))
            {
                return Ok(());
            }
        }
        let message = "the target server loses what it has committed";
        Err(PgError::new(SqlState::DATA_CORRUPTED, message).into())
    }

    async fn load_missing(
        &self,
        source: &Source,
        part: &Part<'_>,
        created: &Created,
        noted: &mut Noted<'_>,
    ) -> anyhow::Result<()> {
        if created.progress.whole {
            return Ok(());
        }
        let mut open = Vec::new();
        for (file, number) in part.files().zip(0..) {
            if created.progress.spans.contains(&number) {
                noted.pace.found(file.bytes.max(1));
            } else {
                open.push(((number, file.clone()), file.bytes.max(1)));
            }
        }
        let shard = part.shard.as_str();
        let rules = crate::rules::Rules::matching(&self.filter);
        // One part is loaded after the other.
        let busy = Busy::default();
        let servers = &[part.node];
        let deal = Deal { peers: self.peers, rules: &rules, shard, servers, at_once: LOADERS, busy: &busy };
        let one = |worker: NodeId, _server: NodeId, (span, file): (u32, FileEntry)| async move {
            let load = self.load_of(part, created, span, &file)?;
            let task = Task {
                uri: source.place(&file).exposed(),
                filter: self.filter.to_string(),
                holds: source.holds(&file),
                file,
                loader: part.node,
                load,
            };
            self.peers.call::<()>(worker, IMPORT, &task, FILE_DEADLINE).await
        };
        // Another server leads the shard: the next run goes there.
        let ends = |_: &(u32, FileEntry), said: &PgError, _server: NodeId| {
            let view = self.peers.cluster().view();
            let moved = view.leader(shard).is_some_and(|leader| leader.node_id != Some(part.node));
            (moved && said.code == SqlState::CONNECTION_FAILURE).then(|| End::All(said.clone().into()))
        };
        deal.run(open, one, ends, noted).await.map_err(passing)
    }

    fn load_of(&self, part: &Part<'_>, created: &Created, span: u32, file: &FileEntry) -> anyhow::Result<Load> {
        let what = match file.what.as_ref().context("load a file of rows")? {
            What::Table { oid, .. } => {
                let table = part.database.tables.iter().find(|table| table.oid == *oid);
                let table = table.with_context(|| format!("find the table of {}", file.path))?;
                let (schema, name) = (table.schema.clone(), table.name.clone());
                Loaded::Table { schema, name, columns: table.columns.clone() }
            }
            What::LargeObjects => Loaded::LargeObjects,
            What::LargeObjectData => Loaded::LargeObjectData,
        };
        let encoding = part.database.copy_encoding.clone();
        Ok(Load { job: part.which, database_oid: created.oid, run: self.number, span, what, encoding })
    }

    async fn finish(&self, source: &Source, part: &Part<'_>, oid: u32) -> anyhow::Result<()> {
        let mut rows: BTreeMap<u32, u64> = part.database.tables.iter().map(|table| (table.oid, 0)).collect();
        for file in part.files() {
            if let Some(What::Table { oid, .. }) = file.what {
                *rows.entry(oid).or_default() += file.rows;
            }
        }
        let table = |oid: &u32| part.database.tables.iter().find(|table| table.oid == *oid);
        let rows = rows.iter().filter_map(|(oid, rows)| {
            let table = table(oid)?;
            Some((table.schema.clone(), table.name.clone(), *rows))
        });
        let request = Request::Finish(Box::new(Finish {
            job: part.which,
            database_oid: oid,
            run: self.number,
            target: part.target.clone(),
            plan: part.database.clone(),
            rows: rows.collect(),
        }));
        match target::ask::<()>(self.peers, part.node, &request, FINISH_DEADLINE).await {
            Err(error) if PgError::of(&error).is_some_and(needs_schema) => {
                // That node was restarted, and its copy is gone.
                self.schema(source, part, oid).await?;
                target::ask::<()>(self.peers, part.node, &request, FINISH_DEADLINE).await
            }
            done => done,
        }
    }

    fn result(&self, source: &Source, parts: &[Part<'_>]) -> Value {
        let rows: u64 = parts.iter().flat_map(Part::files).map(|file| file.rows).sum();
        let bytes: u64 = parts.iter().flat_map(Part::files).map(|file| file.bytes).sum();
        let manifest = &source.manifest;
        let of_cluster = manifest.skipped.iter().filter(|_| self.payload.full_cluster);
        let whole = manifest.skipped_shards.iter().chain(of_cluster);
        let left_out = whole.chain(parts.iter().flat_map(|part| &part.database.skipped));
        let left_out: Vec<String> =
            left_out.map(|it| format!("{} {} was left out of the backup: {}", it.kind, it.object, it.reason)).collect();
        json!({ "rows": rows, "index_entries": 0, "bytes": bytes, "left_out": left_out })
    }
}

/// Whether the target's server may grant later what it refuses now: a leader that has become a standby is followed by
/// another one, or is one again; or what a server says of itself.
pub(crate) fn may_pass(error: &anyhow::Error) -> bool {
    server_may_pass(error, &[SqlState::READ_ONLY_SQL_TRANSACTION])
}

/// What the target's server refuses now it may grant later: it restarts, say, or an earlier run still holds something.
pub(crate) fn passing(error: anyhow::Error) -> anyhow::Error {
    if PgError::of(&error).is_some_and(is_superseded) {
        return error.context(LostClaim);
    }
    if may_pass(&error) { error.context(Retryable) } else { error }
}

/// The number of a run that begins: kept through the claim, so no two runs have the same, and later ones have higher.
async fn next_number(run: &Run) -> anyhow::Result<i64> {
    let number = run.kept::<i64>("run").await?.unwrap_or(0) + 1;
    run.keep("run", &number).await?;
    Ok(number)
}

/// How far it is.
struct Noted<'n> {
    run: &'n Run,
    pace: Pace,
}

impl AsyncDone<(u32, FileEntry), ()> for &mut Noted<'_> {
    async fn done(&mut self, _file: (u32, FileEntry), weight: u64, (): ()) -> anyhow::Result<()> {
        self.run.bears_fruit().await?;
        self.run.pausepoint(pausepoints::AFTER_FIRST_FILE).await?;
        let now = Instant::now();
        if let Some(done) = self.pace.moved(weight, now) {
            self.run.progress(LOAD_SHARE * done, &self.pace.words("loading rows", now)).await?;
        }
        Ok(())
    }
}
