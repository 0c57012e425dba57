//! What a coordinator writes itself: the lock, schemas, the manifest, and what belongs to the seal.
//!
//! Whoever stops waiting for a store does not stop the store: a file that was asked for appears all the same, perhaps when
//! the job has ended and its files were removed. A run is dropped at any await, and a coordinator may stand still. So
//! each file is written in a task of its own, which asks the registry once more behind it and takes back what has come
//! too late.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use cluster::service::Boxed;
use jobs::Run;
use storage::{Created, Store};
use tokio::time::timeout;

use crate::layout;
use crate::manifest::FileEntry;

/// A job that somebody else ends has ended by then, or removes later whatever it finds; and how often it is looked at.
const WITHDRAW_DEADLINE: Duration = Duration::from_secs(120);
const WITHDRAW_LOOK: Duration = Duration::from_millis(200);

/// What is asked of the registry about the job that a file belongs to.
pub(crate) trait Asked: Clone + Send + Sync + 'static {
    /// An error when the claim is lost, or that cannot be said.
    fn check(&self) -> Boxed<'_, ()>;
    /// What the job's row says that it is; none when there is no row any more.
    fn status(&self) -> Boxed<'_, Option<String>>;
    /// The schemas that the job counts on.
    fn schemas(&self) -> Boxed<'_, Vec<FileEntry>>;
}

impl Asked for Run {
    fn check(&self) -> Boxed<'_, ()> {
        Box::pin(Run::check(self))
    }

    fn status(&self) -> Boxed<'_, Option<String>> {
        Box::pin(Run::status(self))
    }

    fn schemas(&self) -> Boxed<'_, Vec<FileEntry>> {
        Box::pin(self.kept_under("schema/"))
    }
}

/// Writes a file that is never written again.
///
/// # Errors
///
/// A lost claim, or the store.
pub(crate) async fn create(run: &impl Asked, store: &Store, path: &str, bytes: &Bytes) -> anyhow::Result<Created> {
    let (place, name, bytes) = (store.clone(), path.to_owned(), bytes.clone());
    let writing = async move { place.create(&name, bytes).await };
    looked_behind(run, store, vec![path.to_owned()], writing).await
}

/// Writes files in the place of those that are there, one after the other.
///
/// # Errors
///
/// As [`create`].
pub(crate) async fn replace(run: &impl Asked, store: &Store, files: Vec<(&str, Bytes)>) -> anyhow::Result<()> {
    let files: Vec<(String, Bytes)> = files.into_iter().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
    let (place, paths) = (store.clone(), files.iter().map(|(path, _)| path.clone()).collect());
    let writing = async move {
        for (path, bytes) in files {
            let mut writer = place.writer(&path).await?;
            writer.write(bytes).await?;
            writer.finish().await?;
        }
        Ok(())
    };
    looked_behind(run, store, paths, writing).await
}

async fn looked_behind<T: Send + 'static>(
    run: &impl Asked,
    store: &Store,
    paths: Vec<String>,
    writing: impl Future<Output = anyhow::Result<T>> + Send + 'static,
) -> anyhow::Result<T> {
    let (run, store) = (run.clone(), store.clone());
    let looking = async move {
        // The last look: from here to the file is one request.
        run.check().await?;
        let made = writing.await;
        // Whoever stood still between the last look and the write may have written what others have removed meanwhile.
        if let Err(error) = run.check().await {
            // The run has ended, and may be wanted again here, before that is decided.
            tokio::spawn(async move {
                if let Err(error) = withdraw(&run, &store, &paths).await {
                    tracing::warn!(?paths, "what was written late may stay: {error:#}");
                }
            });
            return Err(error);
        }
        made
    };
    tokio::spawn(looking).await.context("write a file of a backup")?
}

/// Takes files back if the job has ended without them. While the registry or the store is away, that waits.
async fn withdraw(run: &impl Asked, store: &Store, paths: &[String]) -> anyhow::Result<()> {
    let decided = async {
        loop {
            match take_back(run, store, paths).await {
                Ok(true) => break Ok(()),
                Ok(false) => {}
                Err(error) if jobs::may_pass(&error) || storage::is_transient(&error) => {
                    tracing::info!("what was written late is not taken back yet: {error:#}");
                }
                Err(error) => break Err(error),
            }
            tokio::time::sleep(WITHDRAW_LOOK).await;
        }
    };
    timeout(WITHDRAW_DEADLINE, decided).await.unwrap_or(Ok(()))
}

/// Removes those of the files that the job has ended without, and gives whether it is decided how it ends. If it goes on
/// for long, somebody else goes on behind them, or removes them with the others.
async fn take_back(run: &impl Asked, store: &Store, paths: &[String]) -> anyhow::Result<bool> {
    let late: Vec<&String> = match run.status().await?.as_deref() {
        Some("failed" | "canceled") => paths.iter().collect(),
        Some("succeeded") => {
            let schemas = run.schemas().await?;
            let is_named = |path: &str| schemas.iter().any(|it| it.path == path && it.node == store.node());
            paths.iter().filter(|path| layout::is_part(path) && !is_named(path)).collect()
        }
        // What is left over may have been removed just before.
        Some("running" | "reverting" | "cancel-requested") => return Ok(false),
        _ => Vec::new(),
    };
    for path in late {
        store.delete(path).await?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use cluster::NodeId;
    use cluster::service::{Reply, Service, Upload};
    use jobs::{JobId, LostClaim};
    use pgerror::{PgError, SqlState};
    use serde_json::{Value, json};
    use storage::{FILES, Files, Uri};
    use tokio::sync::{Semaphore, watch};
    use uuid::Uuid;

    use super::*;
    use crate::export::tests::west;

    /// A node's files, each of which appears when it may, whether somebody waits for it or not.
    struct Slow {
        files: Files,
        steps: Steps,
    }

    #[derive(Clone)]
    struct Steps {
        asked_for: Arc<Semaphore>,
        may_appear: Arc<Semaphore>,
        appeared: Arc<Semaphore>,
    }

    struct Appearing {
        upload: Box<dyn Upload>,
        steps: Steps,
    }

    async fn passes(step: &Semaphore) {
        step.acquire().await.unwrap().forget();
    }

    impl Service for Slow {
        fn call(&self, request: Value) -> Boxed<'_, Reply> {
            Box::pin(async move {
                Ok(match self.files.call(request).await? {
                    Reply::Upload(upload) => Reply::Upload(Box::new(Appearing { upload, steps: self.steps.clone() })),
                    reply => reply,
                })
            })
        }
    }

    impl Upload for Appearing {
        fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
            self.upload.write(bytes)
        }

        fn finish(self: Box<Self>) -> Boxed<'static, ()> {
            let finishing = tokio::spawn(async move {
                self.steps.asked_for.add_permits(1);
                passes(&self.steps.may_appear).await;
                let finished = self.upload.finish().await;
                self.steps.appeared.add_permits(1);
                finished
            });
            Box::pin(async move { finishing.await? })
        }
    }

    /// The status of a job whose claim is lost; while there is none, the claim is this run's. The sender knows when
    /// nobody asks any more.
    #[derive(Clone)]
    struct Told {
        status: watch::Receiver<Option<&'static str>>,
        /// How often the registry is away before it is told, and how often it was asked for.
        away: usize,
        asked: Arc<AtomicUsize>,
    }

    impl Told {
        fn of(status: watch::Receiver<Option<&'static str>>, away: usize) -> Self {
            Self { status, away, asked: Arc::default() }
        }
    }

    impl Asked for Told {
        fn check(&self) -> Boxed<'_, ()> {
            let is_mine = self.status.borrow().is_none();
            Box::pin(async move { if is_mine { Ok(()) } else { Err(LostClaim.into()) } })
        }

        fn status(&self) -> Boxed<'_, Option<String>> {
            let status = self.status.borrow().map(str::to_owned);
            let is_away = self.asked.fetch_add(1, Ordering::Relaxed) < self.away;
            let away = || PgError::new(SqlState::CONNECTION_FAILURE, "the registry cannot be reached");
            Box::pin(async move { if is_away { Err(away().into()) } else { Ok(status) } })
        }

        fn schemas(&self) -> Boxed<'_, Vec<FileEntry>> {
            let schema = json!({
                "path": layout::schema("s1", "shop", Uuid::nil()), "node": 2, "database": "shop", "what": null,
                "encoding": "", "rows": 0, "bytes": 0, "file_bytes": 0, "sha256": "", "written_by": 1,
            });
            Box::pin(async move { Ok(vec![serde_json::from_value(schema)?]) })
        }
    }

    /// The directory of node 2, which is this one, as any other node has it.
    async fn slow_store(state: &std::path::Path) -> (Store, Steps) {
        let (cluster, _, peers, stores) = west(state);
        let store = stores.open(&Uri::parse("nodelocal://2/b").unwrap()).await.unwrap();
        cluster.update_me(|me| me.node_id.replace(NodeId(2)) != Some(NodeId(2)));
        let step = || Arc::new(Semaphore::new(0));
        let steps = Steps { asked_for: step(), may_appear: step(), appeared: step() };
        let files = Files::new(state, stores);
        peers.offer(FILES, Arc::new(Slow { files, steps: steps.clone() }));
        (store, steps)
    }

    #[tokio::test]
    async fn a_file_that_appears_when_its_run_is_gone_stays_only_if_the_job_goes_on_or_counts_on_it() {
        let state = tempfile::tempdir().unwrap();
        let (store, steps) = slow_store(state.path()).await;
        let (lock, body) = (layout::lock(JobId(7)), layout::body(Uuid::nil()));
        let named = layout::schema("s1", "shop", Uuid::nil());
        let unnamed = layout::schema("s1", "shop", Uuid::new_v4());
        // What the job's row says before the file appears and after, once the claim is lost.
        for (path, statuses, stays) in [
            (&lock, &["reverting", "canceled"][..], false),
            (&body, &["canceled"], false),
            (&named, &["cancel-requested", "failed"], false),
            (&lock, &["succeeded"], true),
            (&body, &["succeeded"], false),
            (&named, &["succeeded"], true),
            (&unnamed, &["succeeded"], false),
            (&unnamed, &["running", "succeeded"], false),
            (&lock, &["running", "succeeded"], true),
            (&body, &["running", "paused"], true),
            (&unnamed, &["pause-requested"], true),
            (&lock, &[], true),
        ] {
            let (status, told) = watch::channel(None);
            let (place, name) = (store.clone(), path.clone());
            let run = tokio::spawn(async move {
                create(&Told::of(told, 0), &place, &name, &Bytes::from_static(b"a file")).await.map(drop)
            });
            passes(&steps.asked_for).await;
            run.abort();
            assert!(run.await.unwrap_err().is_cancelled());
            status.send_replace(statuses.first().copied());
            // What reverts the job finds nothing to remove.
            assert_eq!(store.list("").await.unwrap(), [], "{path} {statuses:?}");
            steps.may_appear.add_permits(1);
            passes(&steps.appeared).await;
            status.send_replace(statuses.last().copied());
            status.closed().await;
            let left: Vec<String> = store.list("").await.unwrap().into_iter().map(|entry| entry.path).collect();
            assert_eq!(left.contains(path), stays, "{path} {statuses:?}: {left:?}");
            store.delete(path).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_is_taken_back_also_when_the_registry_is_away_for_a_moment() {
        let state = tempfile::tempdir().unwrap();
        let (_, _, _, stores) = west(state.path());
        let store = stores.open(&Uri::parse("nodelocal://1/b").unwrap()).await.unwrap();
        let path = layout::SEAL.to_owned();
        for away in 0..3 {
            store.create(&path, Bytes::from_static(b"a manifest")).await.unwrap();
            let (_status, told) = watch::channel(Some("canceled"));
            withdraw(&Told::of(told, away), &store, std::slice::from_ref(&path)).await.unwrap();
            assert_eq!(store.list("").await.unwrap(), [], "{away}");
        }
    }
}
