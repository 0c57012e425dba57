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
    /// The databases that were asked for.
    pub databases: Vec<String>,
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
