//! The last section of the schema: indexes, constraints and all that comes behind them, side by side where that is safe.
//!
//! `toc` divides the dump's entries into stages, and each stage into groups that lock different tables, or lock them in
//! ways that get along. Each group is one run of `pg_restore`, which is one transaction that also notes the group. So
//! after a death at any moment each group is there or is not, and the next one to come makes those that are not. Locks
//! that the list does not show, of partitions or because an index becomes the replica identity, may still meet in a
//! deadlock; the server then undoes one of them, and that one is tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;

use anyhow::Context as _;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use pgerror::SqlState;

use super::acting::{Acting, has_done, note_done};
use super::pg_restore::{Restorer, What};
use super::toc::{self, Group, Stage};
use super::{JobDatabase, Loader};
use crate::founders::DatabasePlan;
use crate::founders::session::{has_code, quoted};

/// The last section's name, in the state and, with the group's, for sessions.
pub(super) const POST_DATA: &str = "backhaul post-data";

/// Sessions that build at the same time, each with the processes that the server allows it; further groups wait.
pub const BUILDERS_MAX: usize = 4;

/// A group that is undone by a deadlock more often than this fails the restore.
const TRIES: usize = 5;

/// Makes what of the last section is not there yet. The caller has ended all other sessions in the database.
pub(super) async fn build(
    loader: &Loader,
    inside: &Acting,
    (job, oid): (JobDatabase, u32),
    schema: &File,
    plan: &DatabasePlan,
) -> anyhow::Result<()> {
    if has_done(&inside.session, POST_DATA).await? {
        return Ok(());
    }
    let restorer = Restorer::new(loader, inside, job, oid, schema).await?;
    let list = toc::parse(&restorer.list(None).await?);
    let section: BTreeSet<u32> =
        toc::parse(&restorer.list(Some("post-data")).await?).iter().map(|entry| entry.id).collect();
    let bytes: BTreeMap<u32, u64> = plan.tables.iter().map(|table| (table.oid, table.bytes)).collect();
    for stage in toc::stages(&list, &section, &bytes) {
        side_by_side(&restorer, inside, &stage).await?;
    }
    note_done(&inside.session, POST_DATA).await
}

/// Makes the groups of a stage, never two at a time of which one would wait for the other.
async fn side_by_side(restorer: &Restorer<'_>, inside: &Acting, stage: &Stage) -> anyhow::Result<()> {
    let mut open: Vec<&Group> = stage.iter().collect();
    let mut at_work: Vec<&Group> = Vec::new();
    let mut running = FuturesUnordered::new();
    loop {
        let is_free = |group: &&Group| !at_work.iter().any(|other| group.is_in_the_way_of(other));
        if at_work.len() < BUILDERS_MAX
            && let Some(next) = open.iter().position(is_free)
        {
            let group = open.remove(next);
            at_work.push(group);
            running.push(async move { (group, make(restorer, inside, group).await) });
            continue;
        }
        let Some((group, made)) = running.next().await else { return Ok(()) };
        made?;
        at_work.retain(|other| *other != group);
    }
}

async fn make(restorer: &Restorer<'_>, inside: &Acting, group: &Group) -> anyhow::Result<()> {
    let name = format!("{POST_DATA} {}", group.name());
    if group.is_of_event_triggers && !has_done(&inside.session, &name).await? {
        drop_event_triggers(inside).await?;
    }
    let mut tries = TRIES;
    loop {
        tries -= 1;
        match restorer.make(&name, &What::Entries(&group.ids)).await {
            Err(error) if tries > 0 && has_code(&error, &[SqlState::DEADLOCK_DETECTED]) => {
                tracing::info!("{name} is tried again after a deadlock");
            }
            done => return done,
        }
    }
}

/// Making an event trigger notes nothing, because it sets off no event trigger. So whatever an earlier attempt has made
/// goes first; no other part of a schema makes any, but for extensions.
async fn drop_event_triggers(inside: &Acting) -> anyhow::Result<()> {
    let query = "SELECT evtname::text FROM pg_catalog.pg_event_trigger t
                 WHERE evtname <> 'backhaul_restore' AND NOT EXISTS (
                     SELECT FROM pg_catalog.pg_depend WHERE classid = 'pg_catalog.pg_event_trigger'::pg_catalog.regclass
                     AND objid = t.oid AND deptype = 'e')";
    for row in inside.session.rows(query, &[]).await.context("look for event triggers")? {
        inside
            .session
            .run(&format!("DROP EVENT TRIGGER {}", quoted(row.get(0))))
            .await
            .context("drop an event trigger")?;
    }
    Ok(())
}
