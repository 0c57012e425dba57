//! From loaded rows to a whole database.
//!
//! Each step is noted in the database when it is done, or can be seen to be done, and a repeat goes on behind the last
//! one. The order matters: rows are counted before anything is built on them; sequences, indexes and constraints come
//! before views, which may be slow without them. At the end the restore's own schema is dropped and the mark says
//! *whole*, in one transaction; after that only the name is left to be given (`publish`), which happens only when the
//! databases of all shards are whole.

use std::fmt::Write as _;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_util::sync::CancellationToken;

use super::acting::{Acting, LONG, end_sessions, has_done, note_done};
use super::found::{Found, Mark, Stage, gone};
use super::post_data::{POST_DATA, build};
use super::{Finish, Loader, no_schema, views};
use crate::founders::session::{quoted, within};
use crate::founders::{DatabasePlan, LARGE_OBJECT_PIECE};

/// All rows are there; no more are taken.
pub(super) const COUNTED: &str = "counted";

/// The user's own event triggers are there after the last section, and what we do then is not what they wait for.
pub(super) const QUIET: &str = "SET session_replication_role = replica";

const SEQUENCES: &str = "sequences";
const ANALYZED: &str = "analyzed";

/// Large objects made in one transaction; each of them is locked in it.
const LARGE_OBJECTS_AT_ONCE: i32 = 100;

/// Tables named in one error; of more, only the number.
const TABLES_TOLD: usize = 20;

/// Makes the job's database whole.
pub(super) async fn finish(loader: &Loader, request: &Finish) -> anyhow::Result<()> {
    let (job, oid) = (request.job, request.database_oid);
    let outside = Acting::outside(&loader.server, job).await?;
    let found = Found::by_oid(&outside.session, oid).await?.ok_or_else(|| gone(job))?;
    // The answers to earlier requests were lost.
    if found.is_released(&request.target) {
        return Ok(());
    }
    if found.admit(&outside.session, job, request.run).await? == Stage::Filling {
        let inside = Acting::inside(&loader.server, job, oid, request.run, &CancellationToken::new()).await?;
        make_whole(loader, &inside, request).await?;
    }
    loader.forget_schema(job);
    Ok(())
}

async fn make_whole(loader: &Loader, inside: &Acting, request: &Finish) -> anyhow::Result<()> {
    let (job, oid, session) = (request.job, request.database_oid, &inside.session);
    session.run(QUIET).await?;
    // Whoever still loads is behind its time.
    end_sessions(session, oid, None).await?;
    if !has_done(session, COUNTED).await? {
        count(inside, request).await?;
        note_done(session, COUNTED).await?;
        end_sessions(session, oid, None).await?;
    }
    large_objects(inside).await?;
    if !has_done(session, SEQUENCES).await? {
        sequences(inside, &request.plan).await?;
        note_done(session, SEQUENCES).await?;
    }
    if !has_done(session, POST_DATA).await? {
        let schema = loader.schema(job).ok_or_else(|| no_schema(job))?;
        let built = build(loader, inside, (job, oid), &schema, &request.plan).await;
        built.context("restore indexes and constraints")?;
    }
    views::refresh(inside, &request.plan.materialized_views).await?;
    if !has_done(session, ANALYZED).await? {
        inside.run_long("ANALYZE").await.context("analyze the tables")?;
        note_done(session, ANALYZED).await?;
    }
    let mark = Mark { job, run: request.run, stage: Stage::Whole }.statement(&job.own_name());
    let seal =
        format!("BEGIN; DROP EVENT TRIGGER backhaul_restore; DROP SCHEMA backhaul_restore CASCADE; {mark}; COMMIT");
    session.run(&seal).await.context("remove what the restore needed")
}

/// Compares what each table has with what it had.
async fn count(inside: &Acting, request: &Finish) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for (schema, name, expected) in &request.rows {
        let plan = request.plan.tables.iter().find(|table| table.schema == *schema && table.name == *name);
        // An extension's own rows come with the extension, and are in no backup.
        let filter = plan.and_then(|table| table.where_clause.as_ref());
        let filter = filter.map(|condition| format!(" WHERE ({condition})")).unwrap_or_default();
        let query = format!("SELECT pg_catalog.count(*) FROM ONLY {}.{}{filter}", quoted(schema), quoted(name));
        let counted = within(LONG, inside.session.client.query_one(&query, &[])).await;
        let counted = counted.with_context(|| format!("count the rows of {schema}.{name}"))?.get::<_, i64>(0);
        if u64::try_from(counted).ok() != Some(*expected) {
            wrong.push((format!("table \"{schema}.{name}\""), counted, *expected));
        }
    }
    let query = "SELECT (SELECT count(*) FROM backhaul_restore.large_objects),
        (SELECT count(*) FROM backhaul_restore.large_objects o
         WHERE (SELECT coalesce(max(number) + 1, 0) <> count(*) OR count(*) = 0
                FROM backhaul_restore.pieces p WHERE p.id = o.id))";
    let row = within(LONG, inside.session.client.query_one(query, &[])).await.context("count large objects")?;
    let (objects, incomplete): (i64, i64) = (row.get(0), row.get(1));
    if objects - incomplete != request.plan.large_objects {
        let expected = request.plan.large_objects.unsigned_abs();
        wrong.push(("the set of large objects".to_owned(), objects - incomplete, expected));
    }
    let Some((what, counted, expected)) = wrong.first() else { return Ok(()) };
    let said = PgError::new(SqlState::DATA_CORRUPTED, format!("{what} has {counted} rows instead of {expected}"));
    let mut others = String::new();
    for (what, counted, expected) in wrong.iter().skip(1).take(TABLES_TOLD) {
        write!(others, "{what} has {counted} instead of {expected}. ")?;
    }
    let more = wrong.len().saturating_sub(TABLES_TOLD + 1);
    if more > 0 {
        write!(others, "And {more} more.")?;
    }
    let others = others.trim_end();
    Err(if others.is_empty() { said } else { said.detail(format!("Also, {others}")) }.into())
}

/// Makes some large objects from what was loaded, and removes that; gives back how many.
fn make_large_objects() -> String {
    format!(
        "CREATE OR REPLACE FUNCTION backhaul_restore.make_large_objects(batch int) RETURNS int
         LANGUAGE plpgsql AS $make$
         DECLARE o record; a record; made int := 0; grantee text;
         BEGIN
             FOR o IN SELECT * FROM backhaul_restore.large_objects ORDER BY id LIMIT batch LOOP
                 PERFORM lo_create(o.id);
                 FOR a IN SELECT number, piece FROM backhaul_restore.pieces WHERE id = o.id ORDER BY number LOOP
                     PERFORM lo_put(o.id, a.number * {LARGE_OBJECT_PIECE}, a.piece);
                 END LOOP;
                 EXECUTE format('ALTER LARGE OBJECT %s OWNER TO %I', o.id, o.owner);
                 IF o.note IS NOT NULL THEN
                     EXECUTE format('COMMENT ON LARGE OBJECT %s IS %L', o.id, o.note);
                 END IF;
                 IF o.acl IS NOT NULL THEN
                     EXECUTE format('REVOKE ALL ON LARGE OBJECT %s FROM %I', o.id, o.owner);
                 END IF;
                 FOR a IN SELECT * FROM aclexplode(o.acl::aclitem[]) LOOP
                     grantee := CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END;
                     EXECUTE format('GRANT %s ON LARGE OBJECT %s TO %s%s', a.privilege_type, o.id, grantee,
                                    CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
                 END LOOP;
                 DELETE FROM backhaul_restore.pieces WHERE id = o.id;
                 DELETE FROM backhaul_restore.large_objects WHERE id = o.id;
                 made := made + 1;
             END LOOP;
             RETURN made;
         END $make$"
    )
}

async fn large_objects(inside: &Acting) -> anyhow::Result<()> {
    let session = &inside.session;
    session.run(&make_large_objects()).await.context("prepare to make large objects")?;
    loop {
        let query = "SELECT backhaul_restore.make_large_objects($1)";
        let made = within(LONG, session.client.query_one(query, &[&LARGE_OBJECTS_AT_ONCE])).await;
        if made.context("make large objects")?.get::<_, i32>(0) == 0 {
            return Ok(());
        }
    }
}

async fn sequences(inside: &Acting, plan: &DatabasePlan) -> anyhow::Result<()> {
    let schemas: Vec<&str> = plan.sequences.iter().map(|sequence| sequence.schema.as_str()).collect();
    let names: Vec<&str> = plan.sequences.iter().map(|sequence| sequence.name.as_str()).collect();
    let values: Vec<i64> = plan.sequences.iter().map(|sequence| sequence.last_value).collect();
    let called: Vec<bool> = plan.sequences.iter().map(|sequence| sequence.is_called).collect();
    let query = "SELECT pg_catalog.setval(format('%I.%I', schema, name)::regclass, value, called)
                 FROM unnest($1::text[], $2::text[], $3::bigint[], $4::boolean[]) s (schema, name, value, called)";
    inside.session.rows(query, &[&schemas, &names, &values, &called]).await.context("set the sequences").map(drop)
}
