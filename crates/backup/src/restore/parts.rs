//! What a restore brings back: the parts of the backup, one for each database and shard, and where each of them goes.
//!
//! Which they are depends on the statement and the sealed manifest alone, and so does their order, so every run of a
//! job has the same ones. Before anything is made it is looked whether all their names are free and nothing that they
//! need is missing, so that all of it is told at once.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use cluster::{NodeId, Peers, View, spoken};
use fleet::founders::DatabasePlan;
use fleet::loader::{JobDatabase, Request, incomplete};
use pgerror::{PgError, SqlState};

use super::giving::leader_of;
use super::source::Source;
use super::story::{ASK_DEADLINE, Payload, passing};
use super::target;
use crate::manifest::{FileEntry, Manifest, ShardPart, left_out};
use crate::plan::leaseholder_session;

/// A shard's part of a database, and where it goes.
pub(super) struct Part<'p> {
    part: &'p ShardPart,
    pub(super) database: &'p DatabasePlan,
    /// Which of the job's databases.
    pub(super) which: JobDatabase,
    /// The name that the database gets.
    pub(super) target: String,
    /// The shard that it goes into.
    pub(super) shard: String,
    /// The node beside that shard's primary.
    pub(super) node: NodeId,
}

impl<'p> Part<'p> {
    /// The files of rows, in the manifest's order: a file's place is its number in the target's own book.
    pub(super) fn files(&self) -> impl Iterator<Item = &'p FileEntry> + use<'p> {
        let (part, name) = (self.part, &self.database.name);
        part.files.iter().filter(move |file| file.database == *name)
    }

    pub(super) fn schemas(&self) -> impl Iterator<Item = &'p FileEntry> + use<'p> {
        let (part, name) = (self.part, &self.database.name);
        part.schemas.iter().filter(move |file| file.database == *name)
    }
}

/// The parts that a job brings back, database by database.
///
/// # Errors
///
/// What only the manifest can tell: a database that is not in it, shards that do not fit; or a shard cannot be reached.
pub(super) fn parts<'p>(source: &'p Source, payload: &Payload, job: i64, view: &View) -> anyhow::Result<Vec<Part<'p>>> {
    let manifest = &source.manifest;
    let skipped = manifest.skipped_shards.iter().map(|it| it.object.as_str());
    let sources: Vec<&str> = manifest.shards.iter().map(|part| part.shard.as_str()).chain(skipped).collect();
    payload.shard_map.check_sources(&sources)?;
    let mut parts = Vec::new();
    for (name, nth) in names(manifest, payload)?.into_iter().zip(0..) {
        let holding = |part: &'p ShardPart| Some((part, part.databases.iter().find(|database| database.name == name)?));
        let holding: Vec<_> = manifest.shards.iter().filter_map(holding).collect();
        if holding.is_empty() {
            return Err(absent(&name, source).into());
        }
        if !payload.fleet.is_empty() {
            let sources: Vec<&str> = holding.iter().map(|(part, _)| part.shard.as_str()).collect();
            payload.shard_map.check_parts(&name, &sources, &payload.fleet)?;
        }
        for (part, database) in holding {
            let shard = payload.shard_map.target(&part.shard).to_owned();
            let node = leader_of(view, &shard, "The backup has rows for it.")?;
            let target = payload.new_name.clone().unwrap_or_else(|| name.clone());
            parts.push(Part { part, database, which: JobDatabase { job, nth }, target, shard, node });
        }
    }
    Ok(parts)
}

/// The databases that are restored, by the names that they have in the backup.
fn names(manifest: &Manifest, payload: &Payload) -> Result<Vec<String>, PgError> {
    if !payload.full_cluster {
        return Ok(payload.databases.clone());
    }
    if !manifest.full_cluster {
        let message = "full cluster RESTORE can only be used on full cluster BACKUP files";
        return Err(PgError::new(SqlState::UNCATEGORIZED, message)
            .detail(format!("The backup holds: {}.", manifest.databases.join(", ")))
            .hint("Name the databases: RESTORE DATABASE name, name FROM …."));
    }
    let held = manifest.shards.iter().flat_map(|part| &part.databases).map(|database| database.name.clone());
    Ok(held.collect::<BTreeSet<_>>().into_iter().collect())
}

fn absent(name: &str, source: &Source) -> PgError {
    let manifest = &source.manifest;
    let message = format!("database \"{name}\" is not in the backup {}", source.subdir);
    let skipped: Vec<String> = manifest.skipped_shards.iter().map(left_out).collect();
    let skipped = if skipped.is_empty() { String::new() } else { format!(" Note: {}.", skipped.join("; ")) };
    PgError::new(SqlState::UNDEFINED_DATABASE, message)
        .detail(format!("It holds: {}.{skipped}", manifest.databases.join(", ")))
}

/// Sees to it, before anything is made, that every name is free and that each server has what its databases need.
///
/// # Errors
///
/// 42P04 with all names that are taken, 42704 with all that is missing; a shard cannot be reached.
pub(super) async fn check(peers: &Peers, parts: &[Part<'_>], payload: &Payload) -> anyhow::Result<()> {
    let mut wanted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for part in parts {
        wanted.entry(&part.shard).or_default().push(&part.target);
    }
    let is_one = !payload.full_cluster && payload.databases.len() == 1;
    check_names(peers, &wanted, is_one).await.map_err(passing)?;
    let mut missing = BTreeSet::new();
    // Of one database the loader says it itself, before it makes it.
    for part in parts.iter().filter(|_| parts.len() > 1) {
        let request = Request::Missing { job: part.which, plan: Box::new(part.database.clone()) };
        let told: Vec<String> = target::ask(peers, part.node, &request, ASK_DEADLINE).await?;
        let shard = if wanted.len() > 1 { format!(" in shard \"{}\"", part.shard) } else { String::new() };
        missing.extend(told.into_iter().map(|name| format!("{name}{shard}")));
    }
    Ok(incomplete(&missing.into_iter().collect::<Vec<_>>())?)
}

/// Sees to it that in each of these shards these names are free, as far as the shards can be reached; `is_one` where
/// another name can be given instead.
///
/// # Errors
///
/// 42P04 with all names that are taken; a leaseholder does not answer.
pub(super) async fn check_names(peers: &Peers, wanted: &BTreeMap<&str, Vec<&str>>, is_one: bool) -> anyhow::Result<()> {
    let view = peers.cluster().view();
    let mut taken = BTreeSet::new();
    for (shard, names) in wanted {
        if view.leader(shard).is_none() {
            continue;
        }
        let session = leaseholder_session(peers, shard, "postgres").await?;
        let query = "SELECT datname::text FROM pg_catalog.pg_database WHERE datname = ANY($1)";
        let found = session.query(query, &[names]).await.map_err(spoken).context("look for the targets")?;
        taken.extend(found.iter().map(|row| row.get::<_, String>(0)));
    }
    Ok(free(&taken.into_iter().collect::<Vec<_>>(), is_one)?)
}

/// That names are taken.
fn free(taken: &[String], is_one: bool) -> Result<(), PgError> {
    let names: Vec<String> = taken.iter().map(|name| format!("\"{name}\"")).collect();
    let message = match &names[..] {
        [] => return Ok(()),
        [name] => format!("database {name} already exists"),
        _ => format!("databases {} already exist", names.join(", ")),
    };
    let hint = match is_one {
        true => "Restore it under another name: WITH new_db_name = '…'.",
        false => {
            "Drop or rename what is there, or name the databases that are to come back: \
             RESTORE DATABASE name, name FROM …."
        }
    };
    Err(PgError::new(SqlState::DUPLICATE_DATABASE, message).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_that_are_taken_are_told() {
        for (taken, is_one, message, hint) in [
            (&["a"][..], true, "database \"a\" already exists", "new_db_name"),
            (&["a"], false, "database \"a\" already exists", "RESTORE DATABASE name, name"),
            (&["B b", "a"], false, "databases \"B b\", \"a\" already exist", "RESTORE DATABASE name, name"),
        ] {
            let taken: Vec<String> = taken.iter().map(|name| (*name).to_owned()).collect();
            let error = free(&taken, is_one).unwrap_err();
            assert_eq!((error.code.as_str(), error.message.as_str()), ("42P04", message));
            assert!(error.hint.unwrap().contains(hint), "{message}");
        }
        assert_eq!(free(&[], true), Ok(()));
    }
}
