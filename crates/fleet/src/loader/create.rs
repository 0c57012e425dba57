//! Making a job's database, and finding it again.
//!
//! What a backup needs on the server (roles, tablespaces, extensions) is looked at before anything is made, and all
//! that is missing is told at once. The database is made from template0, so that nothing is in it but what the backup
//! brings, and marked directly after; one that was made and not marked, because the node died between the two, is
//! empty, and is made anew.

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_util::sync::CancellationToken;

use super::acting::{Acting, end_others, has_done, literal};
use super::found::{Found, Mark, Stage, gone};
use super::remove::remove_unmarked;
use super::schema::PRE_DATA;
use super::{Create, Created, JobDatabase, Loader, Progress};
use crate::founders::DatabasePlan;
use crate::founders::session::{Session, quoted};

/// Missing objects that are named; of more, only the number.
const MISSING_TOLD: usize = 50;

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
            IF current_setting('application_name') ~ '^backhaul (pre|post)-data' THEN
                INSERT INTO backhaul_restore.state (key) VALUES (current_setting('application_name'))
                ON CONFLICT DO NOTHING;
            END IF;
        END $note$;
    CREATE EVENT TRIGGER backhaul_restore ON ddl_command_end EXECUTE FUNCTION backhaul_restore.note();";

const IS_SET_UP: &str = "SELECT pg_catalog.to_regclass('backhaul_restore.state') IS NOT NULL";

/// Makes the database, or takes up the one that was made.
pub(super) async fn create(loader: &Loader, request: &Create) -> anyhow::Result<Created> {
    let (job, name) = (request.job, request.job.own_name());
    let outside = Acting::outside(&loader.server, job).await?;
    if request.target.starts_with("_backhaul_") {
        let message = format!("a database cannot be restored under the name \"{}\"", request.target);
        let detail = "Such names are those of databases that are being restored.";
        return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).detail(detail).into());
    }
    if Found::by_name(&outside.session, &request.target).await?.is_some() {
        return Err(taken(&request.target).into());
    }
    incomplete(&missing(&outside.session, &request.plan).await?)?;
    end_others(&outside.session, job).await?;
    let found = match Found::by_name(&outside.session, &name).await? {
        Some(found) if found.stage(job).is_some() => found,
        Some(found) => {
            remove_unmarked(loader, &outside, &found, job).await?;
            make(&outside, request).await?
        }
        None => make(&outside, request).await?,
    };
    let stage = found.admit(&outside.session, job, request.run).await?;
    let inside = Acting::inside(&loader.server, job, found.oid, request.run, &CancellationToken::new()).await?;
    let is_set_up: bool = inside.session.row(IS_SET_UP, &[]).await?.get(0);
    if stage == Stage::Filling && !is_set_up {
        inside.session.run(SETUP).await.context("set up the database of the restore")?;
    }
    let progress = read_progress(&inside, stage).await?;
    Ok(Created { oid: found.oid, progress })
}

pub(super) fn taken(name: &str) -> PgError {
    PgError::new(SqlState::DUPLICATE_DATABASE, format!("database \"{name}\" already exists"))
}

/// What the database will refer to and the server does not have.
pub(super) async fn missing(session: &Session, plan: &DatabasePlan) -> anyhow::Result<Vec<String>> {
    let mut roles = plan.roles.clone();
    let tablespaces: Vec<&String> = plan.tablespaces.iter().chain(&plan.tablespace).collect();
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
    let rows = session.rows(query, &[&roles, &tablespaces, &extensions, &versions]).await;
    Ok(rows.context("look for what is missing")?.iter().map(|row| row.get(1)).collect())
}

/// Says that these things are missing, if there are any; nothing is made without them.
///
/// # Errors
///
/// 42704 naming them.
pub fn incomplete(missing: &[String]) -> Result<(), PgError> {
    if missing.is_empty() {
        return Ok(());
    }
    let more = missing.len().saturating_sub(MISSING_TOLD);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let told = missing[..missing.len().min(MISSING_TOLD)].join(", ");
    Err(PgError::new(SqlState::UNDEFINED_OBJECT, "objects that the database needs do not exist")
        .detail(format!("Missing: {told}{more}."))
        .hint("Create the roles and tablespaces, and install the extensions on the server's host."))
}

async fn make(outside: &Acting, request: &Create) -> anyhow::Result<Found> {
    let (job, plan) = (request.job, &request.plan);
    let version = outside.session.row("SELECT current_setting('server_version_num')::int", &[]).await?.get(0);
    let name = job.own_name();
    let statement = create_statement(&name, plan, version);
    outside.run_long(&statement).await.context("create the database")?;
    let mark = Mark { job, run: request.run, stage: Stage::Filling };
    outside.session.run(&mark.statement(&name)).await.context("mark the database")?;
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
    if let Some(rules) = &plan.locale_rules {
        statement.push_str(&format!(" ICU_RULES {}", literal(rules)));
    }
    if let Some(tablespace) = &plan.tablespace {
        statement.push_str(&format!(" TABLESPACE {}", quoted(tablespace)));
    }
    statement
}

/// How far the job is.
pub(super) async fn progress(loader: &Loader, job: JobDatabase) -> anyhow::Result<Progress> {
    let outside = Acting::outside(&loader.server, job).await?;
    let found = Found::by_name(&outside.session, &job.own_name()).await?.ok_or_else(|| gone(job))?;
    let stage = found.stage(job).ok_or_else(|| gone(job))?;
    let inside = Acting::inside(&loader.server, job, found.oid, i64::MAX, &CancellationToken::new()).await?;
    read_progress(&inside, stage).await
}

async fn read_progress(inside: &Acting, stage: Stage) -> anyhow::Result<Progress> {
    let session = &inside.session;
    if stage == Stage::Whole {
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
