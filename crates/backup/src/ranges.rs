//! SHOW RANGES and SHOW REGIONS: the spans that a backup would cut, and where they lie.
//!
//! PostgreSQL has no ranges. What comes closest is what a backup is cut into: a run of blocks of one table in one shard,
//! which its servers hold all of. So a range is a span here, its leaseholder is the node beside the primary, its voting
//! replicas are that one and the synchronous standbys, and its non-voting replicas the asynchronous ones.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use cluster::{Locality, NodeId, Role, View, spoken};
use fleet::founders::{DatabasePlan, TablePlan, What};
use pgerror::{PgError, SqlState};
use sql::{RangesOf, ShowRanges};

use crate::plan::{Backups, Requester, in_time, leaseholder_session};
use crate::point::leaseholder;
use crate::rules::Fleet;
use crate::spans::{self, Span, Tables};

/// Names of the tier below a region, as CockroachDB knows them.
const ZONES: [&str; 3] = ["zone", "availability-zone", "az"];

/// One range.
#[derive(Clone, Debug, PartialEq)]
pub struct Range {
    /// `/shard/database/schema/table/block`, the first block.
    pub start_key: String,
    /// The same of the block behind the last one; `…/Max` for the last range of a table.
    pub end_key: String,
    /// The schema of its table; `None` for large objects.
    pub schema: Option<String>,
    /// Its table.
    pub table: Option<String>,
    /// The table's OID.
    pub table_id: Option<u32>,
    /// Bytes of heap and TOAST.
    pub bytes: u64,
    /// The node beside the primary.
    pub lease_holder: NodeId,
    /// The nodes beside servers of the shard that answer and follow, with their places.
    pub replicas: Vec<(NodeId, Locality)>,
    /// Of them those whose confirmation commits may wait for, and the primary's.
    pub voting: Vec<NodeId>,
    /// The others.
    pub non_voting: Vec<NodeId>,
}

/// One region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Its name.
    pub name: String,
    /// The zones in it.
    pub zones: BTreeSet<String>,
    /// The databases that some server in it holds.
    pub databases: BTreeSet<String>,
    /// The databases whose primary is in it.
    pub primary_of: BTreeSet<String>,
}

impl Backups {
    /// Runs SHOW RANGES.
    ///
    /// # Errors
    ///
    /// There is no such database or table, the requester may not connect to it, or a server cannot be reached.
    pub async fn ranges(&self, statement: &ShowRanges, requester: &Requester) -> anyhow::Result<Vec<Range>> {
        in_time(Box::pin(async {
            let database = match &statement.of {
                RangesOf::Database(name) | RangesOf::Table { database: Some(name), .. } => name,
                RangesOf::Table { database: None, .. } => &requester.database,
            };
            let mut ranges = Vec::new();
            let (mut exists, mut named) = (false, false);
            for shard in self.shards().await? {
                if !self.holds(&shard, database, requester).await? {
                    continue;
                }
                exists = true;
                let view = self.peers.cluster().view();
                let leader = leaseholder(&view, &shard)?.node_id.context("find the leaseholder's number")?;
                let plans = self.look_at(leader, std::slice::from_ref(database), false).await?.databases;
                let table = match &statement.of {
                    RangesOf::Database(_) => None,
                    RangesOf::Table { schema, name, .. } => {
                        match table_of(&plans, schema.as_deref(), name, &requester.search_path) {
                            Some(oid) => Some(oid),
                            None => continue,
                        }
                    }
                };
                named = true;
                ranges.extend(ranges_of(&view, &shard, leader, &plans, table));
            }
            match (&statement.of, exists, named) {
                (_, false, _) => {
                    let message = format!("database \"{database}\" does not exist");
                    Err(PgError::new(SqlState::UNDEFINED_DATABASE, message).into())
                }
                (RangesOf::Table { schema, name, .. }, true, false) => {
                    let shown = schema.iter().chain([name]).map(String::as_str).collect::<Vec<_>>().join(".");
                    Err(PgError::new(SqlState::UNDEFINED_TABLE, format!("table \"{shown}\" does not exist"))
                        .hint("Views and partitioned tables have no ranges of their own; partitions have.")
                        .into())
                }
                _ => Ok(ranges),
            }
        }))
        .await
    }

    /// Whether a shard has a database; the requester may then connect to it.
    async fn holds(&self, shard: &str, database: &str, requester: &Requester) -> anyhow::Result<bool> {
        let session = leaseholder_session(&self.peers, shard, "postgres").await?;
        let query = "
            SELECT coalesce((SELECT pg_catalog.has_database_privilege(r.oid, d.oid, 'CONNECT')
                             FROM pg_catalog.pg_roles r WHERE r.rolname = $2), false)
            FROM pg_catalog.pg_database d WHERE d.datname = $1 AND d.datallowconn";
        let found = session.query_opt(query, &[&database, &requester.user]).await.map_err(spoken);
        match found.context("look for the database")?.map(|row| row.get::<_, bool>(0)) {
            None => Ok(false),
            Some(true) => Ok(true),
            Some(false) => {
                let user = &requester.user;
                let message = format!("user {user} does not have CONNECT privilege on database {database}");
                Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).into())
            }
        }
    }

    /// Runs SHOW REGIONS: the regions of all nodes that answer, with the databases of those shards that do.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn regions(&self, databases: bool) -> anyhow::Result<Vec<Region>> {
        in_time(Box::pin(async {
            let view = self.peers.cluster().view();
            let mut regions: BTreeMap<String, Region> = BTreeMap::new();
            for known in view.nodes.values().filter(|known| known.reachable) {
                let Some(name) = tier(&known.info.locality, &["region"]) else { continue };
                let region = regions.entry(name.clone()).or_insert_with(|| Region { name, ..Region::default() });
                region.zones.extend(tier(&known.info.locality, &ZONES));
            }
            if databases {
                for shard in self.shards().await?.iter().filter(|shard| view.leader(shard).is_some()) {
                    let held = self.databases_of(shard).await?;
                    for (role, name) in places_of(&view, shard) {
                        let Some(region) = regions.get_mut(&name) else { continue };
                        region.databases.extend(held.iter().cloned());
                        if role == Role::Leaseholder {
                            region.primary_of.extend(held.iter().cloned());
                        }
                    }
                }
            }
            Ok(regions.into_values().collect())
        }))
        .await
    }

    async fn databases_of(&self, shard: &str) -> anyhow::Result<Vec<String>> {
        let session = leaseholder_session(&self.peers, shard, "postgres").await?;
        let query = "SELECT datname::text FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate";
        let rows = session.query(query, &[]).await.map_err(spoken).context("list the databases")?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

fn tier(locality: &Locality, keys: &[&str]) -> Option<String> {
    locality.tiers().iter().find(|tier| keys.contains(&tier.key.as_str())).map(|tier| tier.value.clone())
}

/// The servers of a shard that serve, by what they are and their region.
fn places_of(view: &View, shard: &str) -> Vec<(Role, String)> {
    let place = |(_, role, locality): (NodeId, Role, Locality)| Some((role, tier(&locality, &["region"])?));
    serving(view, shard).into_iter().filter_map(place).collect()
}

fn serving(view: &View, shard: &str) -> Vec<(NodeId, Role, Locality)> {
    let places = Fleet::of(view, shard).places.into_iter().filter(|place| place.reachable);
    let served = places.filter_map(|place| Some((place.id, place.server?.role, place.locality)));
    let mut serving: Vec<_> =
        served.filter(|(_, role, _)| matches!(role, Role::Leaseholder | Role::Voting | Role::NonVoting)).collect();
    serving.sort_by_key(|(node, ..)| *node);
    serving
}

/// The table that is meant.
fn table_of(plans: &[DatabasePlan], schema: Option<&str>, name: &str, path: &[String]) -> Option<u32> {
    let in_schema = |schema: &str| {
        let mut tables = plans.iter().flat_map(|plan| &plan.tables);
        tables.find(|table| table.schema == schema && table.name == name).map(|table| table.oid)
    };
    match schema {
        Some(schema) => in_schema(schema),
        None => path.iter().find_map(|schema| in_schema(schema)),
    }
}

/// All ranges of one shard, or those of one table, by table and block.
fn ranges_of(view: &View, shard: &str, lease_holder: NodeId, plans: &[DatabasePlan], table: Option<u32>) -> Vec<Range> {
    let serving = serving(view, shard);
    let of = |wanted: fn(Role) -> bool| {
        serving.iter().filter(|(_, role, _)| wanted(*role)).map(|(node, ..)| *node).collect::<Vec<_>>()
    };
    let (voting, non_voting) = (of(|role| role != Role::NonVoting), of(|role| role == Role::NonVoting));
    let replicas: Vec<_> = serving.iter().map(|(node, _, place)| (*node, place.clone())).collect();
    let index = Tables::of(plans);
    let mut spans = spans::cut(plans);
    spans.retain(|span| table.is_none_or(|oid| matches!(span.what, What::Table { oid: other, .. } if other == oid)));
    let range = |span: &Span, found: Option<&TablePlan>| {
        let (start, end) = match span.what {
            What::Table { from_block, to_block, .. } => (from_block, to_block),
            What::LargeObjects | What::LargeObjectData => (0, None),
        };
        let path = match found {
            Some(table) => format!("/{shard}/{}/{}/{}", span.database, table.schema, table.name),
            None if span.what == What::LargeObjects => format!("/{shard}/{}/large object rights", span.database),
            None => format!("/{shard}/{}/large objects", span.database),
        };
        Range {
            start_key: format!("{path}/{start}"),
            end_key: end.map_or_else(|| format!("{path}/Max"), |end| format!("{path}/{end}")),
            schema: found.map(|table| table.schema.clone()),
            table: found.map(|table| table.name.clone()),
            table_id: found.map(|table| table.oid),
            bytes: span.weight,
            lease_holder,
            replicas: replicas.clone(),
            voting: voting.clone(),
            non_voting: non_voting.clone(),
        }
    };
    let mut found: Vec<_> = spans.iter().map(|span| (index.get(span), span)).collect();
    found.sort_by_key(|(table, span)| {
        let from = if let What::Table { from_block, .. } = span.what { from_block } else { 0 };
        (table.is_none(), table.map(|table| (&table.schema, &table.name)), from)
    });
    found.into_iter().map(|(table, span)| range(span, table)).collect()
}
