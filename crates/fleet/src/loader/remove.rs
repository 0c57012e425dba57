//! Removing a job's database: by its OID and its mark, wherever it stands on its way to a name.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::SqlState;
use tokio_util::sync::CancellationToken;

use super::acting::{Acting, end_others};
use super::create::taken;
use super::finish::QUIET;
use super::found::{Found, Stage};
use super::publish::take_back;
use super::turns::Order;
use super::{JobDatabase, Loader, superseded};
use crate::founders::session::{has_code, quoted};

/// A job that is being worked on is waited for this long before its database is removed all the same.
const DROP_WAIT: Duration = Duration::from_secs(30);

/// Whether a database that has the job's name can only be one that was made for it and never marked.
async fn is_unmarked(loader: &Loader, found: &Found, job: JobDatabase) -> anyhow::Result<bool> {
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
pub(super) async fn remove_unmarked(
    loader: &Loader,
    outside: &Acting,
    found: &Found,
    job: JobDatabase,
) -> anyhow::Result<()> {
    if !is_unmarked(loader, found, job).await? {
        let detail = "It does not bear the mark of this restore, and is not an empty one of the node's.";
        return Err(taken(&found.name).detail(detail).into());
    }
    outside.run_long(&format!("DROP DATABASE {} WITH (FORCE)", quoted(&found.name))).await.context("drop the database")
}

/// Removes the job's database with all that is in it, and whoever works in it.
///
/// # Errors
///
/// A newer run works on it, or did: nothing is removed, and whoever has the job still asks again with a higher number. Or the
/// server.
pub(super) async fn remove(loader: &Loader, job: JobDatabase, run: i64) -> anyhow::Result<()> {
    let turn = loader.turns.of(job);
    turn.admit(Order(run, true))?;
    loader.turns.remember(turn.clone());
    // Whoever has it ends now, but for one who makes the database, and must come to know it.
    let _held = tokio::time::timeout(DROP_WAIT, turn.hold(Order(run, true))).await;
    loader.forget_schema(job);
    let outside = Acting::outside(&loader.server, job).await?;
    end_others(&outside.session, job).await?;
    if let Some(named) = Found::named(&outside.session, job).await? {
        if !named.admits(run) {
            return Err(superseded(job).into());
        }
        take_back(&outside.session, &named, job, run).await?;
    }
    let found = Found::by_name(&outside.session, &job.own_name()).await?;
    let Some(found) = found else { return Ok(()) };
    let stage = found.stage(job);
    // What somebody else has marked is not the job's, whatever it says.
    if stage.is_some() {
        if !found.admits(run) {
            return Err(superseded(job).into());
        }
        remove_subscriptions(loader, &found, job).await?;
    } else if !is_unmarked(loader, &found, job).await? {
        return Ok(());
    }
    remove_found(&outside, &found, job, stage).await
}

async fn remove_found(outside: &Acting, found: &Found, job: JobDatabase, stage: Option<Stage>) -> anyhow::Result<()> {
    // PostgreSQL drops by name only. Nobody but a restore gives this name, and only after it is free again.
    let still = Found::by_name(&outside.session, &found.name).await?;
    if !still.is_some_and(|still| still.oid == found.oid && still.is_mine && still.stage(job) == stage) {
        return Ok(());
    }
    let dropped = outside.run_long(&format!("DROP DATABASE {} WITH (FORCE)", quoted(&found.name))).await;
    dropped.or_else(|error| {
        let is_gone = has_code(&error, &[SqlState::UNDEFINED_DATABASE]);
        if is_gone { Ok(()) } else { Err(error).context("drop the database of the restore") }
    })
}

/// A database with subscriptions cannot be dropped. Those that were restored have never been connected to anything.
async fn remove_subscriptions(loader: &Loader, found: &Found, job: JobDatabase) -> anyhow::Result<()> {
    let inside = Acting::inside(&loader.server, job, found.oid, i64::MAX, &CancellationToken::new()).await?;
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
