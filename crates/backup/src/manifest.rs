//! What a backup says of itself: complete in itself, readable with any JSON tool.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use cluster::NodeId;
use fleet::founders::{DatabasePlan, Point, Skipped, What};
use serde::{Deserialize, Serialize};

use crate::rules::Chosen;

/// The version of this format; a reader refuses what it does not know.
pub(crate) const FORMAT: u32 = 1;

/// The index of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this format.
    pub format: u32,
    /// The program that wrote it.
    pub build: String,
    /// The job that made the backup.
    pub job: i64,
    /// The statement, without secrets.
    pub description: String,
    /// The databases that were asked for, or those that there were.
    pub databases: Vec<String>,
    /// Whether it is of the whole cluster: of all databases of all shards, but for those that are left out by name.
    #[serde(default)]
    pub full_cluster: bool,
    /// Which nodes took part; empty for all.
    pub filter: String,
    /// When the job was made, by its gateway's clock.
    pub created: DateTime<Utc>,
    /// The largest difference between the times of the shards' points, in milliseconds. Nothing stronger is claimed
    /// across shards.
    pub skew_ms: i64,
    /// Each shard that holds one of the databases.
    pub shards: Vec<ShardPart>,
    /// Shards of the fleet that may hold one of the databases, too, and are left out because the statement said so.
    #[serde(default)]
    pub skipped_shards: Vec<Skipped>,
    /// What else of the cluster is left out: databases that are not their users', and what is no database's.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
    /// What each node did.
    pub nodes: BTreeMap<NodeId, NodeWork>,
}

/// One shard's part of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardPart {
    /// The shard.
    pub shard: String,
    /// The node beside the server that was read; the first one, where there are several.
    pub read_from: NodeId,
    /// The nodes beside the servers that were opened at the same proven point, and read beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read_beside: Vec<NodeId>,
    /// What kept what was read, on those of these servers that were standbys when it began.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub modes: BTreeMap<NodeId, Chosen>,
    /// At which point.
    pub point: Point,
    /// The databases at that point: properties, tables, sequences, what was left out.
    pub databases: Vec<DatabasePlan>,
    /// The schemas, one file for each database.
    pub schemas: Vec<FileEntry>,
    /// The rows.
    pub files: Vec<FileEntry>,
}

/// A file of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its path in the backup's directory.
    pub path: String,
    /// Whose local directory it is in, if it is in one.
    pub node: Option<NodeId>,
    /// The database.
    pub database: String,
    /// What it holds; none for a schema.
    pub what: Option<What>,
    /// `copy text, zstd` or `pg_dump custom`.
    pub encoding: String,
    /// Rows.
    pub rows: u64,
    /// Bytes before compression.
    pub bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// SHA-256 of the file, in hexadecimal digits.
    pub sha256: String,
    /// The node beside the server that its rows come from; none in old backups, where a shard has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_from: Option<NodeId>,
    /// Who wrote it.
    pub written_by: NodeId,
}

/// What one node did for a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeWork {
    /// Spans that it exported.
    pub spans: u64,
    /// Bytes that it read from its own server.
    pub bytes_read_locally: u64,
    /// Bytes that it read from another node's server.
    pub bytes_read_remotely: u64,
    /// Those of them that came from a node that shares no leading tier with it.
    pub bytes_read_across_localities: u64,
    /// Bytes that it wrote to the store.
    pub bytes_written: u64,
}

/// That something is not in a backup, for its reader.
pub fn left_out(skipped: &Skipped) -> String {
    format!("{} {} is left out: {}", skipped.kind, skipped.object, skipped.reason)
}

/// The same of a part of a database, for a reader who may have several.
pub fn left_out_of(database: &DatabasePlan, skipped: &Skipped) -> String {
    let Skipped { kind, object, reason } = skipped;
    format!("{kind} {object} of database {} is left out: {reason}", database.name)
}

impl FileEntry {
    /// Whether it holds rows of this table.
    pub fn is_of(&self, database: &DatabasePlan, table: u32) -> bool {
        self.database == database.name && matches!(self.what, Some(What::Table { oid, .. }) if oid == table)
    }

    /// Whether it holds large objects.
    pub fn is_of_large_objects(&self, database: &DatabasePlan) -> bool {
        let large = matches!(self.what, Some(What::LargeObjects | What::LargeObjectData));
        self.database == database.name && large
    }

    /// The first block of its range and the one behind the last, where it has such.
    pub fn blocks(&self) -> (Option<u64>, Option<u64>) {
        match self.what {
            Some(What::Table { from_block, to_block, .. }) => (Some(from_block), to_block),
            _ => (None, None),
        }
    }
}

impl Manifest {
    /// What a file holds, in words.
    pub fn what(&self, file: &FileEntry) -> String {
        let Some(what) = &file.what else { return "the schema".to_owned() };
        let What::Table { oid, from_block, to_block } = what else { return "large objects".to_owned() };
        let databases =
            self.shards.iter().filter(|shard| shard.files.contains(file)).flat_map(|shard| &shard.databases);
        let mut tables =
            databases.filter(|database| database.name == file.database).flat_map(|database| &database.tables);
        let table = tables.find(|table| table.oid == *oid);
        let name = table.map_or_else(|| format!("{oid}"), |table| format!("{}.{}", table.schema, table.name));
        match to_block {
            None if *from_block == 0 => format!("table \"{name}\""),
            None => format!("table \"{name}\" from block {from_block} on"),
            Some(to_block) => format!("table \"{name}\" from block {from_block} to {to_block}"),
        }
    }

    /// Rows in all files.
    pub fn rows(&self) -> u64 {
        self.shards.iter().flat_map(|shard| &shard.files).map(|file| file.rows).sum()
    }

    /// Bytes in all files of rows, before compression.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().flat_map(|shard| &shard.files).map(|file| file.bytes).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn table(oid: u32, name: &str) -> Value {
        let identity = json!({ "oid": oid, "relkind": "r", "relam": 2, "relfilenode": oid, "columns": [] });
        json!({
            "oid": oid, "schema": "public", "name": name, "columns": ["i"], "blocks": 9, "bytes": 1, "estimated_rows": 1,
            "ranges_possible": true, "identity": identity
        })
    }

    pub(crate) fn database(name: &str, tables: &[Value]) -> Value {
        json!({
            "name": name, "oid": 5, "encoding": "UTF8", "collate": "C", "ctype": "C", "locale_provider": "c",
            "owner": "o", "settings": [], "extensions": [], "tables": tables, "sequences": [], "materialized_views": [],
            "large_objects": 0, "roles": [], "tablespaces": [], "skipped": [], "schema_bytes": 1, "dump_version": "18"
        })
    }

    fn file(database: &str, what: &Value) -> Value {
        json!({
            "path": format!("data/{database}{what}"), "database": database, "what": what, "encoding": "", "rows": 1,
            "bytes": 1, "file_bytes": 1, "sha256": "", "written_by": 1
        })
    }

    pub(crate) fn point() -> Value {
        json!({
            "lsn": 1, "timeline": 1, "time": "2026-11-22T10:58:16Z", "in_recovery": true, "mode": "Paused",
            "server_version": 180_000, "system_identifier": "7", "readers": 1, "databases_at_one_point": true
        })
    }

    fn shard(name: &str, databases: &[Value], files: &[Value]) -> Value {
        let schemas = [file("shop", &Value::Null)];
        json!({
            "shard": name, "read_from": 1, "point": point(), "databases": databases, "schemas": schemas, "files": files
        })
    }

    /// An OID says which table it is only together with the shard and the database.
    #[test]
    fn a_file_is_told_by_its_table_and_span() {
        let span = |oid: u32, from: u64, to: Option<u64>| json!({ "Table": { "oid": oid, "from_block": from, "to_block": to } });
        let first = [
            (file("shop", &span(10, 0, Some(4))), "table \"public.rides\" from block 0 to 4"),
            (file("shop", &span(10, 4, Some(8))), "table \"public.rides\" from block 4 to 8"),
            (file("shop", &span(10, 8, None)), "table \"public.rides\" from block 8 on"),
            (file("shop", &span(11, 0, None)), "table \"public.users\""),
            (file("stock", &span(10, 0, None)), "table \"public.parts\""),
            (file("shop", &json!("LargeObjects")), "large objects"),
            (file("shop", &json!("LargeObjectData")), "large objects"),
        ];
        let second = [
            (file("shop", &span(10, 1, Some(3))), "table \"public.drivers\" from block 1 to 3"),
            (file("shop", &span(12, 0, None)), "table \"12\""),
        ];
        let files = |rows: &[(Value, &str)]| rows.iter().map(|(file, _)| file.clone()).collect::<Vec<_>>();
        let shop = database("shop", &[table(10, "rides"), table(11, "users")]);
        let shards = [
            shard("s1", &[shop, database("stock", &[table(10, "parts")])], &files(&first)),
            shard("s2", &[database("shop", &[table(10, "drivers")])], &files(&second)),
        ];
        let manifest: Manifest = serde_json::from_value(json!({
            "format": 1, "build": "", "job": 7, "description": "", "databases": ["shop", "stock"], "filter": "",
            "created": "2026-11-22T10:58:16Z", "skew_ms": 0, "shards": shards, "nodes": {}
        }))
        .unwrap();
        let held = manifest.shards.iter().flat_map(|shard| &shard.files);
        for (file, (_, expected)) in held.zip(first.iter().chain(&second)) {
            assert_eq!(manifest.what(file), *expected);
        }
        assert_eq!(manifest.what(&manifest.shards[0].schemas[0]), "the schema");
    }
}
