//! Making a job's database, finding it again, and removing it.
//!
//! What a backup needs on the server (roles, tablespaces, extensions) is looked at before anything is made, and all
//! that is missing is told at once. The database is made from template0, so that nothing is in it but what the backup
//! brings, and marked directly after; one that was made and not marked, because the node died between the two, is
//! empty, and is made anew.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_util::sync::CancellationToken;

use super::acting::{Acting, Found, gone, has_done, literal, mark, own_name};
use super::finish::QUIET;
use super::schema::PRE_DATA;
use super::{Create, Created, Loader, Progress};
use crate::founders::DatabasePlan;
use crate::founders::session::{Session, has_code, quoted};

/// Missing objects that are named; of more, only the number.
const MISSING_TOLD: usize = 50;

/// A job that is being worked on is waited for this long before its database is removed all the same.
const DROP_WAIT: Duration = Duration::from_secs(30);

/// What a restore keeps inside the database, in one transaction, so that it is there as a whole or not at all.
///
/// The event trigger writes, within the transaction of `pg_restore`, that this transaction is done: whether it was
/// committed is known from that alone, whoever died when. It goes by the name under which `pg_restore` runs. No
/// statement of ours sets it off, except these, under another name.
const SETUP: &str = "
    CREATE SCHEMA backhaul_restore;
    CREATE TABLE backhaul_restore.progress (span bigint PRIMARY KEY, rows bigint, loaded timestamptz NOT NULL);
    CREATE TABLE backhaul_restore.state (key text PRIMARY KEY);
    CREATE TABLE backhaul_restore.large_objects (id oid PRIMARY KEY, owner text, acl text, note text);
    CREATE TABLE backhaul_restore.pieces (id oid, number bigint, piece bytea, PRIMARY KEY (id, number));
    CREATE FUNCTION backhaul_restore.note() RETURNS event_trigger LANGUAGE plpgsql AS $note$
        BEGIN
            IF current_setting('application_name') IN ('backhaul pre-data', 'backhaul post-data') THEN
                INSERT INTO backhaul_restore.state (key) VALUES (current_setting('application_name'))
                ON CONFLICT DO NOTHING;
            END IF;
        END $note$;
    CREATE EVENT TRIGGER backhaul_restore ON ddl_command_end EXECUTE FUNCTION backhaul_restore.note();";

const IS_SET_UP: &str = "SELECT pg_catalog.to_regclass('backhaul_restore.state') IS NOT NULL";

/// Makes the database, or takes up the one that was made.
pub(super) async fn create(loader: &Loader, request: &Create) -> anyhow::Result<Created> {
    let (job, name) = (request.job, own_name(request.job));
    let _turn = loader.turn(job).await?;
    let outside = Acting::outside(&loader.server, job).await?;
    if request.target.starts_with("_backhaul_") {
        let message = format!("a database cannot be restored under the name \"{}\"", request.target);
        let detail = "Such names are those of databases that are being restored.";
        return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).detail(detail).into());
    }
    if Found::by_name(&outside.session, &request.target).await?.is_some() {
        return Err(taken(&request.target).into());
    }
    complete(&outside.session, &request.plan).await?;
    let found = match Found::by_name(&outside.session, &name).await? {
        Some(found) if found.is_of(job) => found,
        Some(found) => {
            remove_unmarked(loader, &outside, &found, job).await?;
            make(&outside, job, &request.plan).await?
        }
        None => make(&outside, job, &request.plan).await?,
    };
    let inside = Acting::inside(&loader.server, job, found.oid, &CancellationToken::new()).await?;
    let is_set_up: bool = inside.session.row(IS_SET_UP, &[]).await?.get(0);
    if !found.is_whole(job) && !is_set_up {
        inside.session.run(SETUP).await.context("set up the database of the restore")?;
    }
    let progress = read_progress(&inside, &found, job).await?;
    Ok(Created { oid: found.oid, progress })
}

fn taken(name: &str) -> PgError {
    PgError::new(SqlState::DUPLICATE_DATABASE, format!("database \"{name}\" already exists"))
}

/// Whether all is there that the database will refer to.
async fn complete(session: &Session, plan: &DatabasePlan) -> anyhow::Result<()> {
    let mut roles = plan.roles.clone();
    roles.push(plan.owner.clone());
    roles.extend(plan.role_settings.iter().map(|(role, _)| role.clone()));
    let (extensions, versions): (Vec<String>, Vec<String>) = plan.extensions.iter().cloned().unzip();
    let query = "
        SELECT DISTINCT 1, format('role \"%s\"', name) FROM unnest($1::text[]) name
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = name)
        UNION ALL
        SELECT DISTINCT 2, format('tablespace \"%s\"', name) FROM unnest($2::text[]) name
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_tablespace WHERE spcname = name)
        UNION ALL
        SELECT DISTINCT 3, format('extension \"%s\" (%s)', name, version)
        FROM unnest($3::text[], $4::text[]) e (name, version)
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_available_extension_versions a WHERE a.name = e.name)
        ORDER BY 1, 2";
    let rows = session.rows(query, &[&roles, &plan.tablespaces, &extensions, &versions]).await;
    let missing: Vec<String> = rows.context("look for what is missing")?.iter().map(|row| row.get(1)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let more = missing.len().saturating_sub(MISSING_TOLD);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let told = missing[..missing.len().min(MISSING_TOLD)].join(", ");
    Err(PgError::new(SqlState::UNDEFINED_OBJECT, "objects that the database needs do not exist")
        .detail(format!("Missing: {told}{more}."))
        .hint("Create the roles and tablespaces, and install the extensions on the server's host.")
        .into())
}

async fn make(outside: &Acting, job: i64, plan: &DatabasePlan) -> anyhow::Result<Found> {
    let version = outside.session.row("SELECT current_setting('server_version_num')::int", &[]).await?.get(0);
    let name = own_name(job);
    let statement = create_statement(&name, plan, version);
    outside.run_long(&statement).await.context("create the database")?;
    let comment = format!("COMMENT ON DATABASE {} IS {}", quoted(&name), literal(&mark(job)));
    outside.session.run(&comment).await.context("mark the database")?;
    Found::by_name(&outside.session, &name).await?.ok_or_else(|| gone(job).into())
}

fn create_statement(name: &str, plan: &DatabasePlan, server_version: i32) -> String {
    let mut statement = format!(
        "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        quoted(name),
        literal(&plan.encoding),
        literal(&plan.collate),
        literal(&plan.ctype)
    );
    let (provider, locale) = match plan.locale_provider.as_str() {
        "i" => ("icu", "ICU_LOCALE"),
        "b" => ("builtin", "BUILTIN_LOCALE"),
        _ => ("libc", ""),
    };
    // An older server knows only libc; for another provider it is to say so itself.
    if server_version >= 150_000 || provider != "libc" {
        statement.push_str(&format!(" LOCALE_PROVIDER {provider}"));
    }
    if let Some(value) = plan.locale.as_ref().filter(|_| !locale.is_empty()) {
        statement.push_str(&format!(" {locale} {}", literal(value)));
    }
    statement
}

/// Whether a database that has the job's name can only be one that was made for it and never marked.
async fn is_unmarked(loader: &Loader, found: &Found, job: i64) -> anyhow::Result<bool> {
    if !found.is_mine {
        return Ok(false);
    }
    let inside = Acting::open(&loader.server, &found.name, job, &CancellationToken::new()).await?;
    let query = "SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid >= 16384)
                     OR EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE oid >= 16384)
                     OR EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)
                     OR EXISTS (SELECT FROM pg_catalog.pg_proc WHERE oid >= 16384)
                     OR pg_catalog.shobj_description($1, 'pg_database') IS NOT NULL";
    let row = inside.session.row(query, &[&found.oid]).await.context("look into a database without a mark")?;
    Ok(!row.get::<_, bool>(0))
}

/// Removes such a database, so that the job's own can be made.
async fn remove_unmarked(loader: &Loader, outside: &Acting, found: &Found, job: i64) -> anyhow::Result<()> {
    if !is_unmarked(loader, found, job).await? {
        let detail = "It does not bear the mark of this restore, and is not an empty one of the node's.";
        return Err(taken(&found.name).detail(detail).into());
    }
    outside.run_long(&format!("DROP DATABASE {} WITH (FORCE)", quoted(&found.name))).await.context("drop the database")
}

/// How far the job is.
pub(super) async fn progress(loader: &Loader, job: i64) -> anyhow::Result<Progress> {
    let outside = Acting::outside(&loader.server, job).await?;
    let found = Found::by_name(&outside.session, &own_name(job)).await?.filter(|found| found.is_of(job));
    let found = found.ok_or_else(|| gone(job))?;
    let inside = Acting::inside(&loader.server, job, found.oid, &CancellationToken::new()).await?;
    read_progress(&inside, &found, job).await
}

async fn read_progress(inside: &Acting, found: &Found, job: i64) -> anyhow::Result<Progress> {
    let session = &inside.session;
    if found.is_whole(job) {
        return Ok(Progress { pre_data: true, spans: Vec::new(), whole: true });
    }
    if !session.row(IS_SET_UP, &[]).await?.get::<_, bool>(0) {
        return Ok(Progress::default());
    }
    let rows = session.rows("SELECT span FROM backhaul_restore.progress ORDER BY 1", &[]).await;
    let rows = rows.context("read which spans are loaded")?;
    let spans = rows.iter().filter_map(|row| u32::try_from(row.get::<_, i64>(0)).ok()).collect();
    Ok(Progress { pre_data: has_done(session, PRE_DATA).await?, spans, whole: false })
}

/// Removes the job's database with all that is in it, and whoever works in it.
pub(super) async fn remove(loader: &Loader, job: i64) -> anyhow::Result<()> {
    let _turn = tokio::time::timeout(DROP_WAIT, loader.turn(job)).await;
    loader.forget_schema(job);
    let outside = Acting::outside(&loader.server, job).await?;
    let found = Found::by_name(&outside.session, &own_name(job)).await?;
    let Some(found) = found else { return Ok(()) };
    let is_marked = found.is_of(job);
    if is_marked {
        remove_subscriptions(loader, &found, job).await?;
    } else if !is_unmarked(loader, &found, job).await? {
        return Ok(());
    }
    // PostgreSQL drops by name only. Nobody but a restore gives this name, and only after it is free again.
    let still = Found::by_name(&outside.session, &found.name).await?;
    if !still.is_some_and(|still| still.oid == found.oid && still.is_mine && still.is_of(job) == is_marked) {
        return Ok(());
    }
    let dropped = outside.run_long(&format!("DROP DATABASE {} WITH (FORCE)", quoted(&found.name))).await;
    dropped.or_else(|error| {
        let is_gone = has_code(&error, &[SqlState::UNDEFINED_DATABASE]);
        if is_gone { Ok(()) } else { Err(error).context("drop the database of the restore") }
    })
}

/// A database with subscriptions cannot be dropped. Those that were restored have never been connected to anything.
async fn remove_subscriptions(loader: &Loader, found: &Found, job: i64) -> anyhow::Result<()> {
    let inside = Acting::inside(&loader.server, job, found.oid, &CancellationToken::new()).await?;
    inside.session.run(QUIET).await?;
    let query = "SELECT subname::text FROM pg_catalog.pg_subscription WHERE subdbid = $1";
    for row in inside.session.rows(query, &[&found.oid]).await.context("look for subscriptions")? {
        let name = quoted(row.get(0));
        for statement in [
            format!("ALTER SUBSCRIPTION {name} DISABLE"),
            format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE)"),
            format!("DROP SUBSCRIPTION {name}"),
        ] {
            inside.session.run(&statement).await.context("drop a subscription that was restored")?;
        }
    }
    Ok(())
}
