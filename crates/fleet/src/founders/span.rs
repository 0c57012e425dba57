//! Reading a span: lock, compare, copy.
//!
//! On a standby no lock can be held against the primary, so between the point and now a table may have been truncated,
//! rewritten, altered, or replaced by another one under its name, and the old snapshot would read wrong rows from it
//! without an error. Therefore the table is locked by its name first; then a second session, which sees the catalogs
//! as they are now, compares what bears that name with the plan; and only then it is read. What could make a
//! difference needs a stronger lock, except for changes of types and names of schemas: therefore it is compared once
//! more behind the last row, before the stream ends as if all were well.
//!
//! Large objects have no lock of their own, and lie in catalogs that may be written anew like any table (VACUUM FULL,
//! REINDEX). On a standby the files that they are read from are compared in the same way, before and behind.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::BytesMut;
use cluster::service::ByteStream;
use futures_util::StreamExt as _;
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, timeout_at};
use tokio_postgres::CopyOutStream;

use super::catalog::{IDENTITY, LARGE_OBJECT_FILES, TYPES, may_read_large_objects};
use super::pool::{Lent, Pool};
use super::session::{Session, has_code, late, quoted, said, within};
use super::types::{Identity, LARGE_OBJECT_PIECE, ROWS_SILENCE_MAX, TablePlan, What, invalidated};
use super::yielding;

/// A table that is not unlocked by then is not read now; the span may be asked for again.
const LOCK_WAIT: &str = "5s";

/// Rows are sent on in pieces of about this size. One row is never divided here, and may be larger.
const PIECE: usize = 128 * 1024;

/// A piece that is not full so long after its first row is sent on as it is.
const PIECE_WAIT: Duration = Duration::from_secs(5);

/// Founders that a span is tried on, when one is lost before its first row.
const TRIES: usize = 2;

/// Begins to read a span.
pub(super) async fn read(pool: &Arc<Pool>, what: &What) -> anyhow::Result<ByteStream> {
    let mut tries = TRIES;
    loop {
        let lent = pool.lend().await?;
        tries -= 1;
        match begin(pool, lent.session()?, what).await {
            Ok(rows) => {
                let yielding = yielding::watched(pool, lent.session()?, what);
                let rows = stream(rows, lent, what);
                return Ok(match yielding {
                    Some(yielding) => yielding.over(rows),
                    None => rows,
                });
            }
            Err(error) => match lent.failed(error).await {
                (_, false) if tries > 0 => {}
                (error, _) => return Err(error),
            },
        }
    }
}

async fn begin(pool: &Pool, founder: &Session, what: &What) -> anyhow::Result<CopyOutStream> {
    let statement = match *what {
        What::Table { oid, from_block, to_block } => {
            let table = planned(pool, oid)?;
            let statement = copy_of(table, from_block, to_block)?;
            lock(founder, table).await?;
            compare(&*pool.guard().await?, table).await?;
            statement
        }
        What::LargeObjects => {
            compare_large_objects(pool).await?;
            LARGE_OBJECTS.to_owned()
        }
        What::LargeObjectData => {
            // Who is a member of what is no matter of the point.
            may_read_large_objects(founder, &pool.database).await?;
            compare_large_objects(pool).await?;
            large_object_data()
        }
    };
    if pool.copy_encoding != "UTF8" {
        founder.run(&format!("SET LOCAL client_encoding = '{}'", pool.copy_encoding)).await?;
    }
    // The server says that it has begun when it has some rows to say it with.
    within(ROWS_SILENCE_MAX, founder.client.copy_out(&statement)).await.context("begin to copy")
}

fn planned(pool: &Pool, oid: u32) -> anyhow::Result<&TablePlan> {
    pool.tables.get(&oid).ok_or_else(|| {
        let message = format!("no table with OID {oid} is in the plan of database {}", quoted(&pool.database));
        PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).into()
    })
}

/// The COPY of a range of blocks.
fn copy_of(table: &TablePlan, from_block: u64, to_block: Option<u64>) -> anyhow::Result<String> {
    let is_block = |block: u64| u32::try_from(block).is_ok();
    let is_whole = from_block == 0 && to_block.is_none();
    if !is_whole && !table.ranges_possible || !is_block(from_block) || !to_block.is_none_or(is_block) {
        let message = format!("table \"{}.{}\" cannot be read in this range of blocks", table.schema, table.name);
        return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).into());
    }
    let columns: Vec<String> = table.columns.iter().map(|column| quoted(column)).collect();
    let mut conditions = Vec::new();
    if from_block > 0 {
        conditions.push(format!("ctid >= '({from_block},0)'"));
    }
    if let Some(to_block) = to_block {
        conditions.push(format!("ctid < '({to_block},0)'"));
    }
    if let Some(condition) = &table.where_clause {
        conditions.push(format!("({condition})"));
    }
    let filter = if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) };
    let (columns, name) = (columns.join(", "), qualified(table));
    Ok(format!("COPY (SELECT {columns} FROM ONLY {name}{filter}) TO STDOUT"))
}

fn qualified(table: &TablePlan) -> String {
    format!("{}.{}", quoted(&table.schema), quoted(&table.name))
}

async fn lock(founder: &Session, table: &TablePlan) -> anyhow::Result<()> {
    let statement =
        format!("SET LOCAL lock_timeout = '{LOCK_WAIT}'; LOCK TABLE ONLY {} IN ACCESS SHARE MODE", qualified(table));
    let gone = [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME, SqlState::WRONG_OBJECT_TYPE];
    founder.run(&statement).await.map_err(|error| {
        if has_code(&error, &gone) {
            return changed(table, "No table has its name now.");
        }
        if has_code(&error, &[SqlState::LOCK_NOT_AVAILABLE]) {
            let message = format!("table \"{}.{}\" is locked by somebody else", table.schema, table.name);
            let said = PgError::new(SqlState::LOCK_NOT_AVAILABLE, message);
            return said.detail(format!("It was not free within {LOCK_WAIT}.")).into();
        }
        error.context("lock the table")
    })
}

/// Compares what bears the table's name now with the plan.
async fn compare(guard: &Session, table: &TablePlan) -> anyhow::Result<()> {
    let query = format!(
        "SELECT {IDENTITY}, {TYPES} FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relname = $2"
    );
    let rows = guard.rows(&query, &[&table.schema, &table.name]).await.context("look at the table as it is now")?;
    let Some(row) = rows.first() else { return Err(changed(table, "No table has its name now.")) };
    let now: Identity = serde_json::from_str(row.get(0)).context("read what the table is")?;
    match difference(&table.identity, &now) {
        None if row.get::<_, Option<&str>>(1) == table.types.as_deref() => Ok(()),
        None => Err(changed(table, "A type of one of its columns was altered.")),
        Some(detail) => Err(changed(table, detail)),
    }
}

fn changed(table: &TablePlan, detail: &str) -> anyhow::Error {
    invalidated(&format!("{}.{}", table.schema, table.name), detail).into()
}

fn difference(planned: &Identity, now: &Identity) -> Option<&'static str> {
    if planned == now {
        None
    } else if planned.oid != now.oid {
        Some("Another table has its name now.")
    } else if planned.columns != now.columns {
        Some("Its columns were altered.")
    } else {
        Some("It was truncated or rewritten.")
    }
}

const LARGE_OBJECTS: &str = "
    COPY (SELECT m.oid, pg_catalog.pg_get_userbyid(m.lomowner), m.lomacl::text,
                 pg_catalog.obj_description(m.oid, 'pg_largeobject')
          FROM pg_catalog.pg_largeobject_metadata m ORDER BY m.oid) TO STDOUT";

/// Piece by piece, so that no more than one of them is in memory; the length of an object is known only at its end.
fn large_object_data() -> String {
    format!(
        "COPY (SELECT m.oid, p.number, p.piece
               FROM (SELECT oid FROM pg_catalog.pg_largeobject_metadata ORDER BY oid) m, LATERAL (
                   WITH RECURSIVE pieces (number, piece) AS (
                       SELECT 0, pg_catalog.lo_get(m.oid, 0, {LARGE_OBJECT_PIECE})
                       UNION ALL
                       SELECT number + 1,
                              pg_catalog.lo_get(m.oid, (number + 1)::bigint * {LARGE_OBJECT_PIECE}, {LARGE_OBJECT_PIECE})
                       FROM pieces WHERE length(piece) = {LARGE_OBJECT_PIECE})
                   SELECT number, piece FROM pieces WHERE number = 0 OR length(piece) > 0) p) TO STDOUT"
    )
}

/// Compares the files of the large objects with the plan. A primary keeps what the point shows when it writes them anew.
async fn compare_large_objects(pool: &Pool) -> anyhow::Result<()> {
    if pool.is_exported() {
        return Ok(());
    }
    let guard = pool.guard().await?;
    let now = guard.row(LARGE_OBJECT_FILES, &[]).await.context("look at the files of large objects")?;
    match now.get::<_, Option<String>>(0) == pool.large_object_files {
        true => Ok(()),
        false => Err(invalidated("pg_catalog.pg_largeobject", "It or one of its indexes was rewritten.").into()),
    }
}

struct Copying {
    rows: std::pin::Pin<Box<CopyOutStream>>,
    lent: Lent,
    /// The table whose rows they are; none of large objects.
    table: Option<u32>,
}

impl Copying {
    /// Behind the last row: whether all of them were read from what was planned.
    async fn conclude(&self) -> anyhow::Result<()> {
        let pool = self.lent.pool();
        match self.table {
            Some(oid) => compare(&*pool.guard().await?, planned(pool, oid)?).await,
            None => compare_large_objects(pool).await,
        }
    }
}

/// The rows in pieces. Dropped before its end, it cancels the statement.
fn stream(rows: CopyOutStream, lent: Lent, what: &What) -> ByteStream {
    let table = match *what {
        What::Table { oid, .. } => Some(oid),
        What::LargeObjects | What::LargeObjectData => None,
    };
    let copying = Copying { rows: Box::pin(rows), lent, table };
    Box::pin(futures_util::stream::try_unfold(Some(copying), |copying| async move {
        let Some(mut copying) = copying else { return Ok(None) };
        let mut piece = BytesMut::with_capacity(PIECE + PIECE / 8);
        let mut full = Instant::now() + ROWS_SILENCE_MAX;
        while piece.len() < PIECE {
            let ended = match timeout_at(full, copying.rows.next()).await {
                Ok(Some(Ok(row))) => {
                    if piece.is_empty() {
                        full = Instant::now() + PIECE_WAIT;
                    }
                    piece.extend_from_slice(&row);
                    continue;
                }
                Ok(Some(Err(error))) => Err(said(error)),
                // The lock is still held, so that only what it does not keep from changing can differ.
                Ok(None) => copying.conclude().await,
                Err(_) if piece.is_empty() => return Err(late(ROWS_SILENCE_MAX).into()),
                Err(_) => break,
            };
            return match ended {
                Ok(()) => {
                    copying.lent.give_back().await;
                    Ok((!piece.is_empty()).then(|| (piece.freeze(), None)))
                }
                Err(error) => Err(copying.lent.failed(error).await.0),
            };
        }
        Ok(Some((piece.freeze(), Some(copying))))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(columns: &[&str], ranges_possible: bool, where_clause: Option<&str>) -> TablePlan {
        TablePlan {
            oid: 16384,
            schema: "s".to_owned(),
            name: "t\"1".to_owned(),
            columns: columns.iter().map(|name| (*name).to_owned()).collect(),
            blocks: 10,
            bytes: 81920,
            estimated_rows: 0,
            ranges_possible,
            where_clause: where_clause.map(str::to_owned),
            types: None,
            identity: Identity {
                oid: 16384,
                relkind: "r".to_owned(),
                relam: 2,
                relfilenode: 16384,
                toast_relfilenode: None,
                columns: Vec::new(),
            },
        }
    }

    #[test]
    fn a_range_becomes_a_condition() {
        let plain = table(&["a", "B"], true, None);
        for (from, to, filter) in [
            (0, None, ""),
            (0, Some(5), " WHERE ctid < '(5,0)'"),
            (5, None, " WHERE ctid >= '(5,0)'"),
            (5, Some(9), " WHERE ctid >= '(5,0)' AND ctid < '(9,0)'"),
        ] {
            let expected = format!("COPY (SELECT \"a\", \"B\" FROM ONLY \"s\".\"t\"\"1\"{filter}) TO STDOUT");
            assert_eq!(copy_of(&plain, from, to).unwrap(), expected);
        }
        let some = table(&[], false, Some("NOT x OR y"));
        let expected = "COPY (SELECT  FROM ONLY \"s\".\"t\"\"1\" WHERE (NOT x OR y)) TO STDOUT";
        assert_eq!(copy_of(&some, 0, None).unwrap(), expected);
        assert!(copy_of(&some, 1, None).is_err());
        assert!(copy_of(&plain, 0, Some(1 << 32)).is_err());
    }

    #[test]
    fn a_difference_is_named() {
        let planned = table(&[], true, None).identity;
        let mut rewritten = planned.clone();
        rewritten.toast_relfilenode = Some(1);
        let mut another = planned.clone();
        another.oid = 1;
        assert_eq!(difference(&planned, &planned), None);
        assert_eq!(difference(&planned, &rewritten), Some("It was truncated or rewritten."));
        assert_eq!(difference(&planned, &another), Some("Another table has its name now."));
    }
}
