//! The end of a backup: one body, recorded, then copied to where it counts.
//!
//! A coordinator writes the manifest under a name of its own claim and records its SHA-256 in the job, through the
//! claim. Only a recorded body is ever copied to the name that seals the backup, byte for byte, by whoever holds the
//! job then. So there is one seal, whoever dies in between, and whoever wakes up too late.
//!
//! What a reader needs beside the seal (the checksum, RESTORE.txt) is made from the recorded body and written before it:
//! a backup that is sealed can be restored. Without a seal these files mean nothing, and go with the others. Behind the
//! seal comes only the pointer to it, LATEST.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use cluster::NodeId;
use jobs::Run;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use storage::{Created, Store};

use crate::export::sha256;
use crate::layout;
use crate::manifest::{FORMAT, Manifest};
use crate::patience::later;
use crate::pausepoints::{AFTER_CHECKSUM, AFTER_SEAL};
use crate::{restore_text, written};

/// Under which key the recorded body stands.
const RECORDED: &str = "seal";

/// A body that has been written and may be sealed. From when it is recorded, nothing else is, and nowhere else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    path: String,
    sha256: String,
    /// Whose own directory it is in, if it is in one.
    #[serde(default)]
    pub(crate) node: Option<NodeId>,
}

/// Where a backup is sealed.
pub(crate) struct Place {
    /// The backup's directory.
    pub(crate) store: Store,
    /// The collection's root.
    pub(crate) collection: Store,
}

/// When a job was made, and the directory that this gave.
pub(crate) type When<'w> = (&'w str, DateTime<Utc>);

/// What this job has recorded, in an earlier run or this one.
///
/// # Errors
///
/// The registry is not reachable.
pub(crate) async fn recorded(run: &Run) -> anyhow::Result<Option<Recorded>> {
    run.kept(RECORDED).await
}

/// Writes the body and records it.
///
/// # Errors
///
/// A lost claim, or the store.
pub(crate) async fn record(run: &Run, store: &Store, manifest: &Manifest) -> anyhow::Result<Recorded> {
    let body = Bytes::from(serde_json::to_vec_pretty(manifest)?);
    let mut path = layout::body(run.claim);
    if let Created::Exists(_) = written::create(run, store, &path, &body).await? {
        // An earlier try under this very claim wrote another one, and came no further.
        path = format!("{path}-{}", uuid::Uuid::new_v4().simple());
        written::create(run, store, &path, &body).await?;
    }
    let recorded = Recorded { path, sha256: sha256(&body), node: store.node() };
    run.keep(RECORDED, &recorded).await?;
    Ok(recorded)
}

/// Seals the backup with a recorded body, unless that was done before, and does what comes behind the seal. None when
/// the body cannot be found in its place any more: then there is no seal either.
///
/// # Errors
///
/// A lost claim, somebody else's seal, or the store. What the store refuses for good before the seal fails the job.
pub(crate) async fn seal(
    run: &Run,
    place: &Place,
    recorded: &Recorded,
    when: When<'_>,
) -> anyhow::Result<Option<Manifest>> {
    let sealing = async {
        if sealed(run, place).await?.is_none() {
            let body = place.store.read(&recorded.path).await?.filter(|body| sha256(body) == recorded.sha256);
            let Some(body) = body else { return Ok(None) };
            let text = restore_text::text(&read(&body)?, when.0);
            let checksum = format!("{}\n", recorded.sha256);
            let beside = vec![(layout::CHECKSUM, checksum.into()), (layout::RESTORE_TEXT, text.into())];
            written::replace(run, &place.store, beside).await.context("write what belongs to a seal")?;
            run.pausepoint(AFTER_CHECKSUM).await?;
            // Written once: one that was there before is looked at by whoever comes behind it.
            written::create(run, &place.store, layout::SEAL, &body).await.context("seal the backup")?;
            run.pausepoint(AFTER_SEAL).await?;
        }
        finish(run, place, when).await
    };
    // It may hold a whole backup already.
    sealing.await.map_err(later)
}

/// The sealed body, if the backup is sealed.
///
/// # Errors
///
/// The store; the seal cannot be read; or it is another job's.
pub(crate) async fn sealed(run: &Run, place: &Place) -> anyhow::Result<Option<Bytes>> {
    let Some(body) = place.store.read(layout::SEAL).await? else { return Ok(None) };
    match serde_json::from_slice(&body) {
        Ok(Owner { job }) if job == run.id.0 => Ok(Some(body)),
        Ok(Owner { job }) => bail!("job {job} has sealed a backup in this directory"),
        Err(error) => {
            let message = format!("the manifest of the backup in {} is damaged", place.store.redacted());
            Err(PgError::new(SqlState::DATA_CORRUPTED, message).detail(format!("It cannot be read: {error}.")).into())
        }
    }
}

#[derive(Deserialize)]
struct Owner {
    job: i64,
}

/// A body as a manifest.
fn read(body: &[u8]) -> anyhow::Result<Manifest> {
    let manifest: Manifest = serde_json::from_slice(body).context("read the manifest")?;
    if manifest.format != FORMAT {
        bail!("the manifest has format {}, and this program knows only {FORMAT}", manifest.format);
    }
    Ok(manifest)
}

/// Behind the seal: points LATEST at it. Whoever comes after a coordinator that died there does the same again.
///
/// If the store refuses that for good, it is noted, and no reason to fail: the backup is whole, and has its own name.
///
/// # Errors
///
/// There is no seal of this job; or the store cannot be reached now.
pub(crate) async fn finish(run: &Run, place: &Place, when: When<'_>) -> anyhow::Result<Option<Manifest>> {
    let body = sealed(run, place).await?.context("find the seal")?;
    let manifest = read(&body)?;
    let (subdir, created) = when;
    let pointer = layout::latest(created, run.id);
    match place.collection.create(&pointer, Bytes::from(subdir.to_owned())).await {
        Err(error) if !storage::is_transient(&error) => {
            tracing::warn!(job = %run.id, "point LATEST at a backup that is whole: {error:#}");
            run.note(&not_pointed_at(&error, subdir).into()).await?;
        }
        done => drop(done?),
    }
    Ok(Some(manifest))
}

fn not_pointed_at(error: &anyhow::Error, subdir: &str) -> PgError {
    let (code, why) =
        PgError::of(error).map_or((SqlState::IO_ERROR, "it was not written"), |said| (said.code, &said.message));
    PgError::new(code, format!("LATEST does not point at the backup: {why}"))
        .detail(format!("The backup is whole; restore it by its own name, '{subdir}'."))
}
