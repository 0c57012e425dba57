//! SHOW BACKUPS and SHOW BACKUP: what is in a collection.

use std::collections::HashMap;

use backup::{Created, FileEntry, Manifest, Requester, ShardPart, Shown};
use pgerror::{PgError, SqlState};
use sql::{ShowBackup, ShowBackupWhat, Text};

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value, column};

pub(crate) const BACKUPS: [Column; 1] = [column("path", Kind::Text)];

const OBJECTS: [Column; 11] = [
    column("database_name", Kind::Text),
    column("parent_schema_name", Kind::Text),
    column("object_name", Kind::Text),
    column("object_type", Kind::Text),
    column("backup_type", Kind::Text),
    column("start_time", Kind::UtcTime),
    column("end_time", Kind::UtcTime),
    column("size_bytes", Kind::Int8),
    column("rows", Kind::Int8),
    column("is_full_cluster", Kind::Bool),
    column("regions", Kind::Text),
];

/// The same, with what `check_files` adds.
const CHECKED: [Column; 12] = with_column(OBJECTS, OBJECTS.len(), column("file_bytes", Kind::Int8));

/// Where SCHEMAS has its own column: behind `is_full_cluster`.
const CREATE_STATEMENT: usize = 10;

const SCHEMAS: [Column; 12] = with_column(OBJECTS, CREATE_STATEMENT, column("create_statement", Kind::Text));

const SCHEMAS_CHECKED: [Column; 13] = with_column(SCHEMAS, SCHEMAS.len(), column("file_bytes", Kind::Int8));

/// These columns with one more at `place`.
const fn with_column<const N: usize, const M: usize>(columns: [Column; N], place: usize, one: Column) -> [Column; M] {
    let mut all = [one; M];
    let mut index = 0;
    while index < N {
        all[if index < place { index } else { index + 1 }] = columns[index];
        index += 1;
    }
    all
}

const FILES: [Column; 10] = [
    column("path", Kind::Text),
    column("backup_type", Kind::Text),
    column("start_pretty", Kind::Text),
    column("end_pretty", Kind::Text),
    column("start_key", Kind::Text),
    column("end_key", Kind::Text),
    column("size_bytes", Kind::Int8),
    column("rows", Kind::Int8),
    column("locality", Kind::Text),
    column("file_bytes", Kind::Int8),
];

const JSON: [Column; 1] = [column("manifest", Kind::Text)];

/// The columns of a SHOW BACKUP.
pub(crate) fn columns(statement: &ShowBackup) -> &'static [Column] {
    match (statement.what, statement.options.as_json, statement.options.check_files) {
        (_, true, _) => &JSON,
        (ShowBackupWhat::Files, false, _) => &FILES,
        (ShowBackupWhat::Objects, false, true) => &CHECKED,
        (ShowBackupWhat::Objects, false, false) => &OBJECTS,
        (ShowBackupWhat::Schemas, false, true) => &SCHEMAS_CHECKED,
        (ShowBackupWhat::Schemas, false, false) => &SCHEMAS,
    }
}

/// Runs SHOW BACKUPS.
pub(crate) async fn list(gateway: &Gateway, collection: &Text, requester: &Requester) -> anyhow::Result<Answer> {
    let paths = gateway.backups.show_backups(collection, requester).await?;
    let rows = paths.into_iter().map(|path| vec![Value::Text(Some(path))]).collect();
    Ok(Answer::of(rows))
}

/// Runs SHOW BACKUP. What the backup leaves out is told in notices.
pub(crate) async fn show(gateway: &Gateway, statement: &ShowBackup, requester: &Requester) -> anyhow::Result<Answer> {
    let Shown { manifest, created } = gateway.backups.show_backup(statement, requester).await?;
    let rows = match statement.what {
        _ if statement.options.as_json => vec![vec![Value::Text(Some(serde_json::to_string(&manifest)?))]],
        ShowBackupWhat::Files => manifest.shards.iter().flat_map(|part| files(&manifest, part)).collect(),
        what => {
            let statements = (what == ShowBackupWhat::Schemas).then(|| by_object(&created));
            let shards = manifest.shards.iter();
            shards
                .flat_map(|part| objects(&manifest, part, statement.options.check_files, statements.as_ref()))
                .collect()
        }
    };
    let databases = manifest.shards.iter().flat_map(|part| &part.databases);
    let left_out = databases.flat_map(|database| database.skipped.iter().map(move |it| (database, it)));
    let notice = |(database, it)| PgError::new(SqlState::SUCCESSFUL_COMPLETION, backup::left_out_of(database, it));
    let whole = |it| PgError::new(SqlState::SUCCESSFUL_COMPLETION, backup::left_out(it));
    let notices =
        manifest.skipped_shards.iter().chain(&manifest.skipped).map(whole).chain(left_out.map(notice)).collect();
    Ok(Answer { notices, ..Answer::of(rows) })
}

fn number(value: u64) -> Value {
    Value::Int8(i64::try_from(value).ok())
}

fn text(text: &str) -> Value {
    Value::Text(Some(text.to_owned()))
}

/// Statements by shard, database, kind, schema and name.
type Statements<'c> = HashMap<[&'c str; 5], &'c str>;

fn by_object(created: &[Created]) -> Statements<'_> {
    let mut all = HashMap::new();
    for Created { shard, database, kind, schema, name, statement } in created {
        all.insert([shard, database, kind, schema, name].map(String::as_str), statement.as_str());
    }
    all
}

fn objects(
    manifest: &Manifest,
    part: &ShardPart,
    with_files: bool,
    statements: Option<&Statements<'_>>,
) -> Vec<Vec<Value>> {
    let mut rows = Vec::new();
    for database in &part.databases {
        let row = |schema: Option<&str>, name: &str, kind: &str, files: &[&FileEntry]| {
            let sum = |of: fn(&FileEntry) -> u64| number(files.iter().map(|file| of(file)).sum());
            let mut row = vec![
                Value::Text(schema.map(|_| database.name.clone())),
                Value::Text(schema.filter(|schema| !schema.is_empty()).map(str::to_owned)),
                text(name),
                text(kind),
                text("full"),
                Value::UtcTime(None),
                Value::UtcTime(Some(part.point.time)),
                sum(|file| file.bytes),
                sum(|file| file.rows),
                Value::Bool(Some(manifest.full_cluster)),
                Value::Text(None),
            ];
            if let Some(statements) = statements {
                let key = [&part.shard, &database.name, kind, schema.unwrap_or_default(), name];
                let statement = statements.get(&key).map(|statement| (*statement).to_owned());
                row.insert(CREATE_STATEMENT, Value::Text(statement));
            }
            if with_files {
                row.push(sum(|file| file.file_bytes));
            }
            row
        };
        let of_table =
            |oid: u32| -> Vec<&FileEntry> { part.files.iter().filter(|file| file.is_of(database, oid)).collect() };
        rows.push(row(None, &database.name, "database", &[]));
        for table in &database.tables {
            rows.push(row(Some(&table.schema), &table.name, "table", &of_table(table.oid)));
        }
        for view in &database.materialized_views {
            rows.push(row(Some(&view.schema), &view.name, "materialized view", &[]));
        }
        for sequence in &database.sequences {
            rows.push(row(Some(&sequence.schema), &sequence.name, "sequence", &[]));
        }
        if database.large_objects > 0 {
            let files: Vec<&FileEntry> = part.files.iter().filter(|file| file.is_of_large_objects(database)).collect();
            rows.push(row(Some(""), "large objects", "large objects", &files));
        }
    }
    rows
}

fn files(manifest: &Manifest, part: &ShardPart) -> Vec<Vec<Value>> {
    let row = |file: &FileEntry| {
        let (start, end) = file.blocks();
        vec![
            text(&file.path),
            text("full"),
            text(&format!("{} of {}", manifest.what(file), file.database)),
            Value::Text(end.map(|block| format!("up to block {block}"))),
            Value::Text(start.map(|block| block.to_string())),
            Value::Text(end.map(|block| block.to_string())),
            number(file.bytes),
            number(file.rows),
            Value::Text(file.node.map(|node| format!("node {node}"))),
            number(file.file_bytes),
        ]
    };
    part.schemas.iter().chain(&part.files).map(row).collect()
}
