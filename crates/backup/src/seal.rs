//! The end of a backup: one body, recorded, then copied to where it counts.
//!
//! A coordinator writes the manifest under a name of its own claim and records its SHA-256 in the job, through the
//! claim. Only a recorded body is ever copied to the name that seals the backup, byte for byte, by whoever holds the
//! job then. So there is one seal, whoever dies in between, and whoever wakes up too late.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use jobs::{Retryable, Run};
use serde::{Deserialize, Serialize};
use storage::{Created, Store};
use tokio::time::timeout;

use crate::export::sha256;
use crate::layout;
use crate::manifest::{FORMAT, Manifest};
use crate::pausepoints::AFTER_SEAL;
use crate::restore_text;

/// Under which key the recorded body stands.
const RECORDED: &str = "seal";

/// A job that is being reverted has ended by then, and is looked at so often.
const WITHDRAW_DEADLINE: Duration = Duration::from_secs(120);
const WITHDRAW_LOOK: Duration = Duration::from_millis(200);

/// A body that has been written and may be sealed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Recorded {
    path: String,
    sha256: String,
}

fn read(bytes: &[u8]) -> anyhow::Result<Manifest> {
    let manifest: Manifest = serde_json::from_slice(bytes).context("read the manifest")?;
    if manifest.format != FORMAT {
        bail!("the manifest has format {}, and this program knows only {FORMAT}", manifest.format);
    }
    Ok(manifest)
}

/// The body that this job has recorded, in an earlier run or this one, if it can still be read.
///
/// # Errors
///
/// The registry or the store cannot be read.
pub(crate) async fn recorded(run: &Run, store: &Store) -> anyhow::Result<Option<Bytes>> {
    let Some(recorded) = run.kept::<Recorded>(RECORDED).await? else { return Ok(None) };
    let body = store.read(&recorded.path).await?;
    // In a store of another node's own it is not to be had here; then it is written again.
    Ok(body.filter(|body| sha256(body) == recorded.sha256))
}

/// Writes the body and records it.
///
/// # Errors
///
/// A lost claim, or the store.
pub(crate) async fn record(run: &Run, store: &Store, manifest: &Manifest) -> anyhow::Result<Bytes> {
    let body = Bytes::from(serde_json::to_vec_pretty(manifest)?);
    let mut path = layout::body(run.claim);
    if let Created::Exists(_) = store.create(&path, body.clone()).await? {
        // An earlier try under this very claim wrote another one, and came no further.
        path = format!("{path}-{}", uuid::Uuid::new_v4().simple());
        store.create(&path, body.clone()).await?;
    }
    run.keep(RECORDED, &Recorded { path, sha256: sha256(&body) }).await?;
    Ok(body)
}

/// Seals the backup with a recorded body, and points LATEST at it.
///
/// # Errors
///
/// A lost claim, the store, or somebody else's seal.
pub(crate) async fn seal(
    run: &Run,
    store: &Store,
    collection: &Store,
    body: Bytes,
    (subdir, created): (&str, DateTime<Utc>),
) -> anyhow::Result<Manifest> {
    // The last look: from here to the seal is one request.
    run.check().await?;
    if let Created::Exists(other) = store.create(layout::SEAL, body).await.map_err(once_sealed)? {
        let other = read(&other)?;
        if other.job != run.id.0 {
            bail!("job {} has sealed a backup in this directory", other.job);
        }
    }
    // Whoever stood still between the last look and the seal may have sealed what others have removed meanwhile.
    if let Err(error) = run.check().await {
        withdraw(run, store).await?;
        return Err(error);
    }
    run.pausepoint(AFTER_SEAL).await?;
    complete(run, store, collection, (subdir, created)).await?.context("find the seal that was just made")
}

/// Takes the seal back if the job has failed or was canceled. If it has not, somebody else goes on behind the seal.
async fn withdraw(run: &Run, store: &Store) -> anyhow::Result<()> {
    let decided = async {
        loop {
            match run.status().await?.as_deref() {
                Some("failed" | "canceled") => return store.delete(layout::SEAL).await,
                Some("reverting" | "cancel-requested") => tokio::time::sleep(WITHDRAW_LOOK).await,
                _ => return Ok(()),
            }
        }
    };
    timeout(WITHDRAW_DEADLINE, decided).await.unwrap_or(Ok(()))
}

/// If the backup is sealed, writes what belongs to the seal and is made from it, and points LATEST at it. Whoever comes
/// after a coordinator that died right behind the seal does the same again.
///
/// # Errors
///
/// The store.
pub(crate) async fn complete(
    run: &Run,
    store: &Store,
    collection: &Store,
    (subdir, created): (&str, DateTime<Utc>),
) -> anyhow::Result<Option<Manifest>> {
    let Some(body) = store.read(layout::SEAL).await? else { return Ok(None) };
    let manifest = read(&body)?;
    if manifest.job != run.id.0 {
        return Ok(None);
    }
    finish(run, store, collection, &manifest, &body, (subdir, created)).await.map_err(once_sealed)?;
    Ok(Some(manifest))
}

/// At the seal and behind it a store that does not answer is asked for longer than anywhere else: it may hold a whole
/// backup already.
fn once_sealed(error: anyhow::Error) -> anyhow::Error {
    if storage::is_transient(&error) { error.context(Retryable) } else { error }
}

async fn finish(
    run: &Run,
    store: &Store,
    collection: &Store,
    manifest: &Manifest,
    body: &[u8],
    (subdir, created): (&str, DateTime<Utc>),
) -> anyhow::Result<()> {
    for (path, text) in [
        (layout::CHECKSUM, format!("{}\n", sha256(body))),
        (layout::RESTORE_TEXT, restore_text::text(manifest, subdir)),
    ] {
        let mut writer = store.writer(path).await?;
        writer.write(Bytes::from(text)).await?;
        writer.finish().await?;
    }
    collection.create(&layout::latest(created, run.id), Bytes::from(subdir.to_owned())).await?;
    Ok(())
}
