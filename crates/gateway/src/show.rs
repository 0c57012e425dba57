//! SHOW NODES: its columns and its rows.

use chrono::{DateTime, Utc};
use cluster::registry::{Listed, Registry};
use cluster::{Cluster, View};
use pgerror::{PgError, SqlState};

use crate::answer::{Answer, Column, Kind, Value, column};

/// Named after the columns of `cockroach node status` and `crdb_internal.gossip_nodes` where they mean the same.
pub(crate) const NODES: [Column; 12] = [
    column("node_id", Kind::Int8),
    column("address", Kind::Text),
    column("locality", Kind::Text),
    column("shard", Kind::Text),
    column("role", Kind::Text),
    column("is_live", Kind::Bool),
    column("is_reachable", Kind::Bool),
    column("build", Kind::Text),
    column("started_at", Kind::Timestamp),
    column("updated_at", Kind::Timestamp),
    column("timeline", Kind::Int8),
    column("lsn", Kind::Text),
];

/// All nodes of the registry, with what this node sees of them. While the registry cannot be reached the list is this
/// node's own, without a word about sessions: `is_live` is NULL.
pub(crate) async fn nodes(cluster: &Cluster, registry: &Registry) -> Answer {
    let view = cluster.view();
    match registry.nodes().await {
        Ok(listed) => Answer::of(listed.iter().map(|node| listed_row(node, &view)).collect()),
        Err(error) => {
            tracing::info!("SHOW NODES without the registry: {error:#}");
            let notice = PgError::new(SqlState::CONNECTION_FAILURE, "the registry cannot be reached")
                .detail("These are the nodes that this gateway knows; whether their sessions live is not known.");
            let mut rows: Vec<Vec<Value>> = view.nodes.values().map(|known| seen_row(known, &view)).collect();
            rows.sort_by_key(|row| match row.first() {
                Some(Value::Int8(id)) => id.unwrap_or(i64::MAX),
                _ => i64::MAX,
            });
            Answer { notices: vec![notice], ..Answer::of(rows) }
        }
    }
}

fn listed_row(node: &Listed, view: &View) -> Vec<Value> {
    let known = view.node(node.id);
    vec![
        Value::Int8(Some(node.id.0.into())),
        Value::Text(Some(node.address.clone())),
        Value::Text(Some(node.locality.clone())),
        Value::Text(Some(node.shard.clone())),
        Value::Text(known.filter(|known| known.reachable).map(|known| view.role(&known.info).to_string())),
        Value::Bool(Some(node.is_live)),
        Value::Bool(Some(known.is_some_and(|known| known.reachable))),
        Value::Text(Some(node.build.clone())),
        Value::Timestamp(Some(node.started_at)),
        Value::Timestamp(Some(node.updated_at)),
        timeline(known),
        lsn(known),
    ]
}

fn timeline(known: Option<&cluster::Known>) -> Value {
    Value::Int8(server(known).map(|server| server.timeline.into()))
}

/// What the server has written or replayed, as of its node's last answer: with the timeline, what an operator looks at
/// before promoting a standby.
fn lsn(known: Option<&cluster::Known>) -> Value {
    Value::Text(server(known).map(|server| server.lsn.to_string()))
}

fn server(known: Option<&cluster::Known>) -> Option<&cluster::ServerState> {
    known.filter(|known| known.reachable)?.info.server_state()
}

fn seen_row(known: &cluster::Known, view: &View) -> Vec<Value> {
    let info = &known.info;
    vec![
        Value::Int8(info.node_id.map(|id| id.0.into())),
        Value::Text(Some(info.address.clone())),
        Value::Text(Some(info.locality.to_string())),
        Value::Text(Some(info.shard.clone())),
        Value::Text(known.reachable.then(|| view.role(info).to_string())),
        Value::Bool(None),
        Value::Bool(Some(known.reachable)),
        Value::Text(Some(info.build.clone())),
        Value::Timestamp(Some(info.started_at)),
        Value::Timestamp(None),
        timeline(Some(known)),
        lsn(Some(known)),
    ]
}

/// The rows as text, for a tool that has no types: NULL is `None`.
pub(crate) fn as_text(rows: &[Vec<Value>]) -> Vec<Vec<Option<String>>> {
    let time = |time: &Option<DateTime<Utc>>| time.map(|time| time.format("%Y-%m-%d %H:%M:%S+00").to_string());
    let text = |value: &Value| match value {
        Value::Text(text) => text.clone(),
        Value::Int8(number) => number.map(|number| number.to_string()),
        Value::Bool(truth) => truth.map(|truth| truth.to_string()),
        Value::Timestamp(at) | Value::UtcTime(at) => time(at),
        Value::Float8(number) => number.map(|number| number.to_string()),
        Value::Texts(texts) => Some(texts.join(",")),
        Value::Int8s(numbers) => Some(numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(",")),
    };
    rows.iter().map(|row| row.iter().map(text).collect()).collect()
}

/// The names of the columns of SHOW NODES.
pub(crate) fn node_columns() -> Vec<&'static str> {
    NODES.iter().map(|column| column.name).collect()
}
