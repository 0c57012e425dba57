//! EXPLAIN BACKUP: where the backup would run, what it would read, and why.
//!
//! What is wrong with the statement itself (its filter, databases, rights, URI) is its error, as it is BACKUP's. What
//! the fleet cannot do now stands in the answer: the plan as far as it goes, then the error's text, because who has to
//! mend the fleet wants to see both. Everything comes from the rules ([`crate::rules`], [`mod@crate::assign`]) that the job
//! goes by. Nothing runs, no store is touched, no job is made; sizes are read in a short transaction of the server
//! that would be read.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use cluster::settings::Holding;
use cluster::{Locality, NodeId, Role, View};
use fleet::founders::{DatabasePlan, FOUNDERS, Looked, Open, Request, What, never_fits};
use pgerror::PgError;
use sql::Backup;

use crate::assign::{assign, sharers};
use crate::manifest::left_out;
use crate::plan::{Backups, Judged, Requester, in_time};
use crate::point::{leaseholder, readers};
use crate::rules::{Decision, Fleet, Mode, Replica, Rules, anchor, decide, modes, nearest, nothing_to_read, workers};
use crate::spans::{self, Span, Tables};

/// A look at a server takes no longer; the whole plan has a deadline of its own.
const LOOK_DEADLINE: Duration = Duration::from_secs(30);

/// Tables that are told one by one, the largest; the others are told together.
const TABLES_MAX: usize = 1000;

/// Lines of the answer.
#[derive(Default)]
struct Page(Vec<String>);

impl Page {
    fn say(&mut self, depth: usize, text: impl AsRef<str>) {
        self.0.push(format!("{}{}", "  ".repeat(depth), text.as_ref()));
    }

    /// Why the backup would fail.
    fn fails(&mut self, depth: usize, error: &PgError) {
        self.say(depth, format!("error: {} ({})", error.message, error.code));
        for (name, text) in [("detail", &error.detail), ("hint", &error.hint)] {
            if let Some(text) = text {
                self.say(depth + 1, format!("{name}: {text}"));
            }
        }
    }

    /// The same of an error that may be somebody else's matter.
    fn fails_with(&mut self, depth: usize, error: anyhow::Error) -> anyhow::Result<()> {
        let said = PgError::of(&error).cloned();
        let Some(said) = said else { return Err(error) };
        self.fails(depth, &said);
        Ok(())
    }
}

impl Backups {
    /// Explains a BACKUP statement, as lines for a reader.
    ///
    /// # Errors
    ///
    /// What is wrong with the statement, before anything is looked at; or the registry is not reachable.
    pub async fn explain(&self, statement: &Backup, requester: &Requester) -> anyhow::Result<Vec<String>> {
        in_time(Box::pin(async {
            let judged = self.judge(statement, requester).await?;
            let mut page = Page::default();
            if let Err(refusal) = self.jobs.settings().await?.check_feature("backup", "BACKUP") {
                page.fails(0, &refusal);
            }
            self.coordinator(&mut page, &judged, statement.options.detached).await?;
            let limits = self.jobs.settings().await?.holding();
            let mut total = Sums::default();
            for (shard, databases) in &judged.targets.shards {
                total.add(&self.shard(&mut page, (shard, databases), (&judged.rules, &limits)).await?);
            }
            for shard in &judged.targets.without {
                page.say(0, format!("shard {shard}: holds none of the databases"));
            }
            judged.targets.left_out.iter().for_each(|it| page.say(0, left_out(it)));
            match judged.targets.failure().filter(|_| !statement.options.skip_unreachable_shards) {
                Some(failure) => page.fails(0, &failure),
                None => judged.targets.skipped().iter().for_each(|it| page.say(0, left_out(it))),
            }
            page.say(0, format!("total: {total}"));
            Ok(page.0)
        }))
        .await
    }

    /// Who coordinates, who takes part, and who does not.
    async fn coordinator(&self, page: &mut Page, judged: &Judged, detached: bool) -> anyhow::Result<()> {
        let view = self.peers.cluster().view();
        let me = self.peers.cluster().me();
        let filter = &judged.rules.filter;
        let prefers: Vec<String> = judged.targets.shards.keys().cloned().collect();
        let candidates = self.jobs.coordinators(filter, &prefers).await?;
        let here = me.node_id.filter(|id| candidates.contains(id));
        match (here, candidates.first()) {
            (_, None) => {
                if let Err(error) = self.jobs.check_filter(filter).await {
                    page.fails_with(0, error)?;
                }
            }
            (Some(here), _) if !detached => {
                page.say(0, format!("coordinator: {}", named(&view, here)));
                page.say(1, "why: it is this gateway, and matches the execution locality");
            }
            (_, Some(best)) => {
                page.say(0, format!("coordinator: {}", named(&view, *best)));
                page.say(1, format!("why: of the nodes that match, it {}", merits(&view, *best, &prefers)));
                if detached {
                    page.say(1, "another node that claims the job first hands it over to this one");
                } else {
                    let lacks = me
                        .locality
                        .first_unmatched(filter)
                        .map_or_else(|| "has no session".to_owned(), |tier| format!("lacks {tier}"));
                    page.say(1, format!("this gateway, {}, {lacks}: the job is relocated", me.name()));
                }
            }
        }
        let decision = decide(&Fleet::of(&view, ""), &judged.rules);
        if !decision.workers.is_empty() {
            let taking_part: Vec<String> = decision.workers.iter().map(|node| named(&view, *node)).collect();
            page.say(0, format!("nodes that take part: {}", taking_part.join(", ")));
        }
        for (node, why) in &decision.excluded {
            page.say(0, format!("left out: {}: it {why}", named(&view, *node)));
        }
        Ok(())
    }

    async fn shard(
        &self,
        page: &mut Page,
        (shard, databases): (&str, &[String]),
        (rules, limits): (&Rules, &Holding),
    ) -> anyhow::Result<Sums> {
        let view = self.peers.cluster().view();
        let leader = leaseholder(&view, shard)?;
        page.say(0, format!("shard {shard}: leaseholder {} ({})", leader.name(), leader.locality));
        let fleet = Fleet::of(&view, shard);
        let decision = decide(&fleet, rules);
        let seen = Sight { view: &view, fleet: &fleet, rules, limits };
        let found = self.look_at_best(page, &seen, &decision, databases).await?;
        let servers = match &found {
            Some((replica, looked)) => self.beside(page, &seen, &decision, (replica, looked), databases).await?,
            None => Vec::new(),
        };
        // Those before the one that is read have been told.
        let read = found.as_ref().map(|(replica, _)| replica.node);
        let untold = decision.candidates().skip_while(|replica| Some(replica.node) != read);
        for replica in untold.filter(|replica| !servers.contains(&replica.node)) {
            let node = named(&view, replica.node);
            page.say(1, format!("next: {node}, {}: {replica}", replica.role));
        }
        for (node, role, reason) in &decision.passed_over {
            page.say(1, format!("passed over: {}, {role}: {reason}", named(&view, *node)));
        }
        let Some((_, looked)) = found else {
            if decision.reads.is_empty() {
                page.fails(1, &nothing_to_read(shard, &decision, rules));
            }
            return Ok(Sums::default());
        };
        let (workers, anchor) = (workers(&fleet, rules, &servers), anchor(&fleet, rules, &servers));
        let anchor = anchor.unwrap_or_default();
        let (share, sharing) = sharers(&anchor, &workers, rules.balanced);
        let sharing: Vec<NodeId> = sharing.iter().map(|worker| worker.id).collect();
        if sharing.is_empty() {
            return Ok(Sums::default());
        }
        let from = anchor.id.map_or_else(|| "the leaseholder".to_owned(), |id| format!("node {id}"));
        page.say(1, format!("exported by: {}; counted from {from}, {share}", list(&sharing)));
        let spans = spans::cut(&looked.databases);
        let weights: Vec<u64> = spans.iter().map(|span| span.weight.max(1)).collect();
        let assigned = assign(&weights, &anchor, &workers, rules.balanced);
        let near: BTreeMap<NodeId, NodeId> =
            sharing.iter().filter_map(|worker| Some((*worker, nearest(&fleet, *worker, &servers)?))).collect();
        let near = Near { of: near, is_told: servers.len() > 1 };
        Ok(tables(page, &view, &near, &looked.databases, spans.iter().zip(assigned)))
    }

    /// The first of the servers that answers, as the job would go through them, with what is on it.
    async fn look_at_best<'d>(
        &self,
        page: &mut Page,
        seen: &Sight<'_>,
        decision: &'d Decision,
        databases: &[String],
    ) -> anyhow::Result<Option<(&'d Replica, Looked)>> {
        for replica in decision.candidates() {
            let node = named(seen.view, replica.node);
            match self.look_to_read(replica.node, databases).await {
                Ok(looked) => {
                    page.say(1, format!("read: {node}, {}", replica.role));
                    page.say(2, format!("why: {replica}"));
                    how(page, seen, replica, &looked);
                    page.say(2, connections(databases.len(), &looked));
                    return Ok(Some((replica, looked)));
                }
                Err(error) => {
                    page.say(1, format!("would be read, and does not let itself: {node}, {}", replica.role));
                    page.fails_with(2, error)?;
                }
            }
        }
        Ok(None)
    }

    /// Tells the servers that are read beside the first one, at the same point, and why others are not; gives all that
    /// are read.
    async fn beside(
        &self,
        page: &mut Page,
        seen: &Sight<'_>,
        decision: &Decision,
        (first, looked): (&Replica, &Looked),
        databases: &[String],
    ) -> anyhow::Result<Vec<NodeId>> {
        let mut servers = vec![first.node];
        // Of those before it has been told why they are not read; and beside another one than was to be first none is.
        let untold = decision.candidates().skip_while(|it| it.node != first.node).skip(1);
        let shares = |it: &&Replica| [first.node, it.node].iter().all(|node| decision.together.contains(node));
        for replica in untold.filter(shares) {
            let node = named(seen.view, replica.node);
            match self.look_to_read(replica.node, databases).await {
                Ok(beside) if [looked, &beside].iter().all(|it| it.in_recovery && it.may_pause) => {
                    page.say(1, format!("read beside it: {node}, {}", replica.role));
                    page.say(
                        2,
                        "why: each node reads the closest; all stand at one position when their point is taken",
                    );
                    how(page, seen, replica, &beside);
                    page.say(2, connections(databases.len(), &beside));
                    servers.push(replica.node);
                }
                Ok(beside) => {
                    let whose = if beside.in_recovery && beside.may_pause { "that of the first" } else { "its replay" };
                    page.say(1, format!("not read beside it: {node}, {}: {whose} may not be paused", replica.role));
                }
                Err(error) => {
                    page.say(1, format!("would be read beside it, and does not let itself: {node}, {}", replica.role));
                    page.fails_with(2, error)?;
                }
            }
        }
        for (node, role, why) in decision.apart.iter().filter(|(node, ..)| *node != first.node) {
            page.say(1, format!("not read beside it: {}, {role}: {why}", named(seen.view, *node)));
        }
        if let Some((_, _, why)) = decision.apart.iter().find(|(node, ..)| *node == first.node) {
            page.say(2, format!("read alone: {why}"));
        }
        Ok(servers)
    }

    /// Looks at a server that a backup of these databases would read; an error is one that would refuse its point, too.
    async fn look_to_read(&self, node: NodeId, databases: &[String]) -> anyhow::Result<Looked> {
        let looked = self.look_at(node, databases, true).await?;
        match looked.budget.and_then(|budget| never_fits(databases.len(), budget)) {
            Some(refusal) => Err(refusal.into()),
            None => Ok(looked),
        }
    }

    /// Looks at the server beside `node`; where it is `to_read` these databases, an error is also what it would not let read.
    pub(crate) async fn look_at(&self, node: NodeId, databases: &[String], to_read: bool) -> anyhow::Result<Looked> {
        let request = Request::Look { databases: databases.to_vec(), to_read };
        self.peers.call(node, FOUNDERS, &request, LOOK_DEADLINE).await.context("look at a server")
    }
}

/// What a shard's servers are seen as, and what is allowed of them.
struct Sight<'s> {
    view: &'s View,
    fleet: &'s Fleet,
    rules: &'s Rules,
    limits: &'s Holding,
}

/// How the point is taken, and what a long read on the server means.
fn how(page: &mut Page, seen: &Sight<'_>, replica: &Replica, looked: &Looked) {
    page.say(2, match (looked.in_recovery, looked.may_pause, replica.role) {
        (false, ..) => "mode: exported (its sessions share one snapshot)",
        (true, true, Role::NonVoting) => "mode: paused (its replay, for the moment in which snapshots are taken)",
        (true, _, Role::Voting) => {
            "mode: still, else single (snapshots while replay stands still by itself, else one session reads: commits \
             may wait for this server, so its replay is never paused)"
        }
        (true, ..) => {
            "mode: still, else single (snapshots while replay stands still by itself, else one session reads: the \
             role of the node may not pause replay)"
        }
    });
    match modes(seen.fleet, &[replica.node], seen.rules.standby_mode, seen.limits) {
        Ok(modes) => modes.get(&replica.node).into_iter().for_each(|chosen| {
            page.say(2, format!("conflicts: {} ({})", chosen.mode, chosen.why));
            if chosen.mode == Mode::Paused {
                page.say(2, format!("its replay goes on sooner {}", bounds(seen.limits)));
            }
        }),
        Err(refusal) => page.fails(2, &refusal),
    }
}

/// What the backup opens on the server that was looked at, and what all backups together may. Where others have taken
/// their share it opens fewer, or waits.
fn connections(databases: usize, looked: &Looked) -> String {
    let Some(budget) = looked.budget else {
        // A node of an older version, which has none.
        return format!("connections: at most {} on its server", Open::connections_for(databases, readers(databases)));
    };
    let readers = Open::readers_within(databases, readers(databases), budget).unwrap_or(1);
    let count = Open::connections_for(databases, readers);
    format!("connections: at most {count} on its server, where all backups together have {budget}")
}

/// When a pause ends before everything is read.
fn bounds(limits: &Holding) -> String {
    let mut bounds = vec![format!("after {} seconds", limits.pause.as_secs())];
    if limits.wal > 0 {
        bounds.push(format!("with {} of WAL to replay", size(limits.wal)));
    }
    if limits.free > 0 {
        bounds.push(format!("with less than {} free on its disk", size(limits.free)));
    }
    bounds.join(", or ")
}

/// Spans and bytes.
#[derive(Clone, Copy, Default)]
struct Sums {
    spans: u64,
    bytes: u64,
    /// Of them those that a node reads from another node's server.
    remote: u64,
    /// Of these those that share no leading tier with it.
    across: u64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.spans += other.spans;
        self.bytes += other.bytes;
        self.remote += other.remote;
        self.across += other.across;
    }
}

impl std::fmt::Display for Sums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.spans == 1 { "" } else { "s" };
        write!(f, "{} span{plural}, {}", self.spans, size(self.bytes))?;
        match (self.remote, self.across) {
            (0, _) => Ok(()),
            (remote, 0) => write!(f, ", of them {} from another node's server", size(remote)),
            (remote, across) => {
                write!(
                    f,
                    ", of them {} from another node's server and {} across localities",
                    size(remote),
                    size(across)
                )
            }
        }
    }
}

/// From which node's server each worker reads.
struct Near {
    of: BTreeMap<NodeId, NodeId>,
    /// Whether there is more than one that could be meant.
    is_told: bool,
}

impl Near {
    fn server(&self, worker: NodeId) -> NodeId {
        self.of.get(&worker).copied().unwrap_or(worker)
    }

    /// A worker, with the server that it reads from.
    fn named(&self, worker: NodeId) -> String {
        match self.is_told {
            true => format!("node {worker} (from node {})", self.server(worker)),
            false => format!("node {worker}"),
        }
    }
}

/// Tells each table's spans, and gives their sum.
fn tables<'s>(
    page: &mut Page,
    view: &View,
    near: &Near,
    databases: &'s [DatabasePlan],
    spans: impl Iterator<Item = (&'s Span, NodeId)>,
) -> Sums {
    let place = |node: NodeId| view.node(node).map(|known| known.info.locality.clone()).unwrap_or_default();
    let index = Tables::of(databases);
    let mut across: BTreeMap<NodeId, bool> = BTreeMap::new();
    // In the order in which tables come first, which is that of their spans' sizes.
    let mut order: Vec<String> = Vec::new();
    let mut told: BTreeMap<String, (Sums, BTreeMap<NodeId, u64>)> = BTreeMap::new();
    let mut total = Sums::default();
    for (span, node) in spans {
        let read = near.server(node);
        let is_across = *across.entry(node).or_insert_with(|| crosses(&place(node), &place(read)));
        let bytes = |counts: bool| if counts { span.weight } else { 0 };
        let remote = node != read;
        let sums = Sums { spans: 1, bytes: span.weight, remote: bytes(remote), across: bytes(remote && is_across) };
        let name = object(&index, span);
        let (sum, by) = told.entry(name.clone()).or_insert_with(|| {
            order.push(name);
            (Sums::default(), BTreeMap::new())
        });
        sum.add(&sums);
        *by.entry(node).or_default() += 1;
        total.add(&sums);
    }
    let mut others = Sums::default();
    for (index, name) in order.iter().enumerate() {
        let Some((sums, by)) = told.get(name) else { continue };
        if index >= TABLES_MAX {
            others.add(sums);
            continue;
        }
        let by: Vec<String> = match by.len() {
            1 => by.keys().map(|node| near.named(*node)).collect(),
            _ => by.iter().map(|(node, spans)| format!("{}: {spans}", near.named(*node))).collect(),
        };
        page.say(2, format!("{name}: {sums}; by {}", by.join(", ")));
    }
    if order.len() > TABLES_MAX {
        page.say(2, format!("{} smaller ones: {others}", order.len() - TABLES_MAX));
    }
    total
}

/// Whether bytes between these two places count as bytes across localities: they share no leading tier, which is the widest
/// that there is. Nodes of which nothing is said are not apart.
pub(crate) fn crosses(one: &Locality, other: &Locality) -> bool {
    one != other && one.shared_prefix(other) == 0
}

fn object<'p>(tables: &Tables<'p>, span: &'p Span) -> String {
    match span.what {
        What::Table { oid, .. } => match tables.get(span) {
            Some(table) => format!("table {}.{}.{}", span.database, table.schema, table.name),
            None => format!("table {oid} of {}", span.database),
        },
        What::LargeObjects => format!("large objects of {}", span.database),
        What::LargeObjectData => format!("contents of the large objects of {}", span.database),
    }
}

fn named(view: &View, node: NodeId) -> String {
    match view.node(node) {
        Some(known) => format!("node {node} ({})", known.info.locality),
        None => format!("node {node}"),
    }
}

/// Why a node is chosen to coordinate.
fn merits(view: &View, node: NodeId, shards: &[String]) -> &'static str {
    let serves = view.node(node).is_some_and(|known| {
        let role = view.role(&known.info);
        shards.contains(&known.info.shard) && matches!(role, Role::Leaseholder | Role::Voting | Role::NonVoting)
    });
    if serves { "holds a replica, and of those coordinates the fewest jobs" } else { "coordinates the fewest jobs" }
}

fn list(nodes: &[NodeId]) -> String {
    let numbers: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    let word = if nodes.len() == 1 { "node" } else { "nodes" };
    format!("{word} {}", numbers.join(", "))
}

/// Bytes for a reader.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_572_864, "1.5 MiB"),
            (5 << 30, "5.0 GiB"),
            (3 << 50, "3072.0 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn sums_say_what_there_is_to_say() {
        let sums = Sums { spans: 1, bytes: 2048, remote: 0, across: 0 };
        assert_eq!(sums.to_string(), "1 span, 2.0 KiB");
        let sums = Sums { spans: 2, remote: 1024, ..sums };
        assert_eq!(sums.to_string(), "2 spans, 2.0 KiB, of them 1.0 KiB from another node's server");
        let sums = Sums { across: 512, ..sums };
        assert!(sums.to_string().ends_with("1.0 KiB from another node's server and 512 B across localities"));
    }
}
