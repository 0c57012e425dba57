//! EXPLAIN BACKUP, SHOW RANGES and SHOW REGIONS: plans, and what they are made from.
//!
//! Columns have CockroachDB's names and order (v23.1). Left out is what PostgreSQL has no counterpart for (the keys of a
//! table's indexes, span statistics); `range_size_mb` is `float8` where the original has a decimal.

use backup::{Range, Region, Requester};
use sql::{Backup, ShowRanges};

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value, column};

pub(crate) const EXPLAIN: [Column; 1] = [column("info", Kind::Text)];

const START: [Column; 3] =
    [column("start_key", Kind::Text), column("end_key", Kind::Text), column("range_id", Kind::Int8)];

const TABLES: [Column; 3] =
    [column("schema_name", Kind::Text), column("table_name", Kind::Text), column("table_id", Kind::Int8)];

const SIZE: [Column; 3] = [
    column("range_size_mb", Kind::Float8),
    column("lease_holder", Kind::Int8),
    column("lease_holder_locality", Kind::Text),
];

const REPLICAS: [Column; 6] = [
    column("replicas", Kind::Int8s),
    column("replica_localities", Kind::Texts),
    column("voting_replicas", Kind::Int8s),
    column("non_voting_replicas", Kind::Int8s),
    column("learner_replicas", Kind::Int8s),
    column("split_enforced_until", Kind::Timestamp),
];

const BYTES: [Column; 1] = [column("range_size", Kind::Int8)];

const PLAIN: [Column; 9] = joined([&START, &REPLICAS]);
const WITH_TABLES: [Column; 12] = joined([&START, &TABLES, &REPLICAS]);
const WITH_DETAILS: [Column; 13] = joined([&START, &SIZE, &REPLICAS, &BYTES]);
const WITH_BOTH: [Column; 16] = joined([&START, &TABLES, &SIZE, &REPLICAS, &BYTES]);

const CLUSTER: [Column; 2] = [column("region", Kind::Text), column("zones", Kind::Texts)];

const REGIONS: [Column; 5] = [
    column("region", Kind::Text),
    column("zones", Kind::Texts),
    column("database_names", Kind::Texts),
    column("primary_region_of", Kind::Texts),
    column("secondary_region_of", Kind::Texts),
];

/// These columns, one part behind the other.
const fn joined<const N: usize, const P: usize>(parts: [&[Column]; P]) -> [Column; N] {
    let mut all = [column("", Kind::Text); N];
    let (mut part, mut at) = (0, 0);
    while part < P {
        let mut index = 0;
        while index < parts[part].len() {
            all[at] = parts[part][index];
            index += 1;
            at += 1;
        }
        part += 1;
    }
    assert!(at == N);
    all
}

/// The columns of a SHOW RANGES.
pub(crate) fn range_columns(show: &ShowRanges) -> &'static [Column] {
    match (show.tables, show.details) {
        (false, false) => &PLAIN,
        (true, false) => &WITH_TABLES,
        (false, true) => &WITH_DETAILS,
        (true, true) => &WITH_BOTH,
    }
}

/// The columns of a SHOW REGIONS, with or without databases.
pub(crate) fn region_columns(databases: bool) -> &'static [Column] {
    if databases { &REGIONS } else { &CLUSTER }
}

/// Runs EXPLAIN BACKUP.
pub(crate) async fn explain(gateway: &Gateway, statement: &Backup, requester: &Requester) -> anyhow::Result<Answer> {
    let lines = gateway.backups.explain(statement, requester).await?;
    Ok(Answer::of(lines.into_iter().map(|line| vec![Value::Text(Some(line))]).collect()))
}

/// Runs SHOW RANGES.
pub(crate) async fn ranges(gateway: &Gateway, show: &ShowRanges, requester: &Requester) -> anyhow::Result<Answer> {
    let ranges = gateway.backups.ranges(show, requester).await?;
    Ok(Answer::of(ranges.into_iter().zip(1..).map(|(range, id)| range_row(range, id, show)).collect()))
}

fn range_row(range: Range, id: i64, show: &ShowRanges) -> Vec<Value> {
    let numbers = |nodes: &[cluster::NodeId]| Value::Int8s(nodes.iter().map(|node| node.0.into()).collect());
    let mut row = vec![Value::Text(Some(range.start_key)), Value::Text(Some(range.end_key)), Value::Int8(Some(id))];
    if show.tables {
        row.push(Value::Text(range.schema));
        row.push(Value::Text(range.table));
        row.push(Value::Int8(range.table_id.map(i64::from)));
    }
    if show.details {
        let place = range.replicas.iter().find(|(node, _)| *node == range.lease_holder);
        row.push(Value::Float8(Some(range.bytes as f64 / 1_000_000.0)));
        row.push(Value::Int8(Some(range.lease_holder.0.into())));
        row.push(Value::Text(place.map(|(_, locality)| locality.to_string())));
    }
    row.push(numbers(&range.replicas.iter().map(|(node, _)| *node).collect::<Vec<_>>()));
    row.push(Value::Texts(range.replicas.iter().map(|(_, locality)| locality.to_string()).collect()));
    row.extend([numbers(&range.voting), numbers(&range.non_voting), numbers(&[]), Value::Timestamp(None)]);
    if show.details {
        row.push(Value::Int8(i64::try_from(range.bytes).ok()));
    }
    row
}

/// Runs SHOW REGIONS.
pub(crate) async fn regions(gateway: &Gateway, databases: bool) -> anyhow::Result<Answer> {
    let row = |region: Region| {
        let mut row = vec![Value::Text(Some(region.name)), Value::Texts(region.zones.into_iter().collect())];
        if databases {
            row.push(Value::Texts(region.databases.into_iter().collect()));
            row.push(Value::Texts(region.primary_of.into_iter().collect()));
            row.push(Value::Texts(Vec::new()));
        }
        row
    };
    Ok(Answer::of(gateway.backups.regions(databases).await?.into_iter().map(row).collect()))
}
