//! One proven point of several servers of a shard, taken from the coordinator.
//!
//! Sessions are opened on each server first, one server after the other by their nodes' numbers, so that two jobs never
//! wait for each other. Then all are paused, and those that are behind are stepped on until all stand at the same
//! position of the same timeline: a matter of milliseconds, and of a bounded number of them. Then all take their
//! snapshots where they stand, and say afterwards that they have not moved. Any doubt is an error, and the caller reads
//! one server instead: a server that cannot prove where it stands is never read beside others.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use cluster::{Lsn, NodeId, Peers};
use fleet::founders::{DatabasePlan, Open, Opened, Request, Standstill, TablePlan};
use futures_util::future::{join_all, try_join_all};
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::point::{ask, close, or_close};

/// A server on which others take a point for longer is left out.
const PREPARE_DEADLINE: Duration = Duration::from_secs(25);

/// One question to a server that stands, or comes to stand.
const STEP_DEADLINE: Duration = Duration::from_secs(12);

/// Snapshots, the plan, and the dump of the schemas.
const TAKE_DEADLINE: Duration = Duration::from_secs(60);

/// Servers that do not stand at one position after so many steps, or after so long, are not read at once: users of a
/// standby see it stand meanwhile. On a server with a free core a few steps are enough; where replay has to wait for its
/// turn with everybody else, each goes some dozens of records too far.
const STEPS_MAX: usize = 1000;
const STEPPING_MAX: Duration = Duration::from_secs(10);

/// How often it is tried again where a change of the schema is being replayed, and how long replay goes on before.
const LOCK_TRIES: usize = 20;
const LOCK_WAIT: Duration = Duration::from_millis(100);

/// The point.
pub(crate) struct Together {
    pub(crate) lease: Uuid,
    /// The node whose server the schema was dumped on.
    pub(crate) node: NodeId,
    /// The others.
    pub(crate) others: Vec<NodeId>,
    /// As the first one opened it.
    pub(crate) opened: Opened,
}

/// Takes one point of the servers beside `nodes`.
///
/// # Errors
///
/// Fewer than two of them can be brought to one position; nothing of it is left then.
pub(crate) async fn open(
    peers: &Peers,
    shard: &str,
    nodes: &[NodeId],
    request: impl Fn(Uuid, NodeId) -> Open,
) -> anyhow::Result<Together> {
    let mut tries = 0;
    loop {
        let lease = Uuid::new_v4();
        let error = match or_close(peers, nodes, lease, attempt(peers, nodes, lease, &request)).await {
            Ok(together) => return Ok(together),
            Err(error) => error,
        };
        tries += 1;
        let is_locked = PgError::of(&error).is_some_and(|said| said.code == SqlState::LOCK_NOT_AVAILABLE);
        if !is_locked || tries >= LOCK_TRIES {
            return Err(error.context(format!("take one point of several servers of shard \"{shard}\"")));
        }
        sleep(LOCK_WAIT).await;
    }
}

async fn attempt(
    peers: &Peers,
    nodes: &[NodeId],
    lease: Uuid,
    request: impl Fn(Uuid, NodeId) -> Open,
) -> anyhow::Result<Together> {
    let ready = prepare(peers, nodes, |node| request(lease, node)).await?;
    let at = one_position(peers, &ready, lease).await?;
    let (node, others) = ready.split_first().context("take a point of no server")?;
    let take = |node: NodeId, with_schema: bool| {
        let request = Request::Take { lease, at: at.clone(), with_schema };
        async move { ask::<Opened>(peers, node, &request, TAKE_DEADLINE).await }
    };
    let taking = others.iter().map(|node| take(*node, false));
    // Each one that is done lets its replay go on, whatever becomes of the others.
    let (opened, besides) = tokio::join!(take(*node, true), join_all(taking));
    let mut opened = opened?;
    let (proven, refused) = proven(&mut opened, others.iter().copied().zip(besides));
    match (proven.is_empty(), refused) {
        (true, Some(error)) => Err(error),
        (true, None) => Err(unproven("There is only one.").into()),
        (false, _) => {
            for node in others.iter().filter(|node| !proven.contains(node)) {
                tracing::warn!(%node, "its server is not read beside the others");
                close(peers, *node, lease).await;
            }
            Ok(Together { lease, node: *node, others: proven, opened })
        }
    }
}

/// Of the servers that took the point beside `opened` those that have proven to show the same, and why the last of the
/// others has not. What `opened` says then holds for all of them.
fn proven(
    opened: &mut Opened,
    besides: impl Iterator<Item = (NodeId, anyhow::Result<Opened>)>,
) -> (Vec<NodeId>, Option<anyhow::Error>) {
    let (mut proven, mut refused) = (Vec::new(), None);
    for (node, beside) in besides {
        match beside {
            Ok(beside) if is_same(opened, &beside) => {
                // A busy server lends fewer sessions, and what is dealt is dealt to all of them alike.
                opened.point.readers = opened.point.readers.min(beside.point.readers);
                proven.push(node);
            }
            Ok(_) => refused = Some(unproven(&format!("Node {node}'s does not show what the others do.")).into()),
            Err(error) => refused = Some(error),
        }
    }
    (proven, refused)
}

/// Opens sessions; gives the nodes on which that was possible, in the order of `nodes`.
async fn prepare(peers: &Peers, nodes: &[NodeId], open: impl Fn(NodeId) -> Open) -> anyhow::Result<Vec<NodeId>> {
    let mut sorted = nodes.to_vec();
    sorted.sort();
    let mut ready = Vec::new();
    let mut refused = None;
    for node in sorted {
        let open = open(node);
        let lease = open.lease;
        match ask::<()>(peers, node, &Request::Prepare(open), PREPARE_DEADLINE).await {
            Ok(()) => ready.push(node),
            Err(error) => {
                tracing::warn!(%node, "its server cannot be read beside others: {error:#}");
                // It may have been prepared all the same.
                close(peers, node, lease).await;
                refused = Some(error);
            }
        }
    }
    if ready.len() < 2 {
        return Err(refused.unwrap_or_else(|| unproven("There is only one.").into()));
    }
    Ok(nodes.iter().copied().filter(|node| ready.contains(node)).collect())
}

/// Brings all to one position, and gives it.
async fn one_position(peers: &Peers, nodes: &[NodeId], lease: Uuid) -> anyhow::Result<Standstill> {
    let step = |node: NodeId, until: Option<Lsn>| {
        let request = Request::Step { lease, until };
        async move { anyhow::Ok((node, ask::<Standstill>(peers, node, &request, STEP_DEADLINE).await?)) }
    };
    let paused: Vec<(NodeId, Standstill)> = try_join_all(nodes.iter().map(|node| step(*node, None))).await?;
    let mut stand: BTreeMap<NodeId, Standstill> = paused.into_iter().collect();
    let begun = Instant::now();
    for _ in 0..STEPS_MAX {
        let foremost = stand.values().max_by_key(|at| at.lsn).context("compare positions")?.clone();
        let comparable =
            |at: &Standstill| (&at.system_identifier, at.timeline) == (&foremost.system_identifier, foremost.timeline);
        if !stand.values().all(comparable) {
            return Err(unproven("They follow different timelines.").into());
        }
        let behind: Vec<NodeId> = stand.iter().filter(|(_, at)| at.lsn < foremost.lsn).map(|(node, _)| *node).collect();
        if behind.is_empty() {
            return Ok(foremost);
        }
        if begun.elapsed() >= STEPPING_MAX {
            break;
        }
        let stepped: Vec<(NodeId, Standstill)> =
            try_join_all(behind.into_iter().map(|node| step(node, Some(foremost.lsn)))).await?;
        stand.extend(stepped);
    }
    Err(unproven(&format!("They did not come to stand at one position within {} seconds.", STEPPING_MAX.as_secs()))
        .into())
}

/// Whether two servers show the same: what is proven by their position, seen in what they hold.
fn is_same(one: &Opened, other: &Opened) -> bool {
    let point = |opened: &Opened| {
        let point = &opened.point;
        (point.lsn, point.timeline, point.system_identifier.clone(), point.databases_at_one_point)
    };
    let tables = |plan: &DatabasePlan| -> BTreeMap<u32, TablePlan> {
        let bare = |table: &TablePlan| TablePlan { blocks: 0, bytes: 0, estimated_rows: 0, ..table.clone() };
        plan.tables.iter().map(|table| (table.oid, bare(table))).collect()
    };
    let databases = |opened: &Opened| -> Vec<(String, u32, BTreeMap<u32, TablePlan>)> {
        opened.databases.iter().map(|plan| (plan.name.clone(), plan.oid, tables(plan))).collect()
    };
    point(one) == point(other) && databases(one) == databases(other)
}

fn unproven(detail: &str) -> PgError {
    let message = "the servers could not be brought to one position of the WAL";
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).detail(detail)
}

/// An error as a detail of another one.
pub(crate) fn sentence(said: &PgError) -> String {
    let detail = said.detail.as_deref().map(|detail| format!(" {detail}")).unwrap_or_default();
    let mut chars = said.message.chars();
    let message = chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect());
    format!("{message}.{detail}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::manifest::tests;

    /// A point of a database with one table, with some of it another one.
    fn opened(point: &[(&str, Value)], table: &[(&str, Value)]) -> Opened {
        let with = |mut whole: Value, parts: &[(&str, Value)]| {
            parts.iter().for_each(|(name, part)| whole[name] = part.clone());
            whole
        };
        let database = tests::database("shop", &[with(tests::table(10, "rides"), table)]);
        let (point, databases) = (with(tests::point(), point), [database]);
        serde_json::from_value(json!({ "point": point, "databases": databases })).unwrap()
    }

    #[test]
    fn servers_are_read_together_that_show_the_same_with_the_fewest_readers_of_any() {
        let mut first = opened(&[("readers", json!(4))], &[]);
        // How large a table's files are differs from server to server.
        let sizes = [("blocks", json!(8)), ("bytes", json!(3)), ("estimated_rows", json!(0))];
        let another = json!({ "oid": 10, "relkind": "r", "relam": 2, "relfilenode": 11, "columns": [] });
        let besides = [
            opened(&[("readers", json!(3))], &sizes),
            opened(&[("readers", json!(1)), ("lsn", json!(2))], &[]),
            opened(&[("readers", json!(1)), ("timeline", json!(2))], &[]),
            opened(&[("readers", json!(1)), ("system_identifier", json!("8"))], &[]),
            opened(&[("readers", json!(1)), ("databases_at_one_point", json!(false))], &[]),
            opened(&[("readers", json!(1))], &[("identity", another)]),
            opened(&[("readers", json!(2))], &[]),
            opened(&[("readers", json!(4))], &[]),
        ];
        let (proven, refused) = proven(&mut first, (2..).map(NodeId).zip(besides.map(Ok)));
        assert_eq!((first.point.readers, proven), (2, [2, 8, 9].map(NodeId).to_vec()));
        let said = PgError::of(&refused.unwrap()).cloned().unwrap();
        assert_eq!(said.detail.as_deref(), Some("Node 7's does not show what the others do."));
    }

    #[test]
    fn an_error_becomes_a_sentence() {
        let said = unproven("There is only one.");
        let expected = "The servers could not be brought to one position of the WAL. There is only one.";
        assert_eq!(sentence(&said), expected);
        assert_eq!(sentence(&PgError::new(SqlState::INTERNAL_ERROR, "x")), "X.");
    }
}
