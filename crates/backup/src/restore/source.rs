//! A backup that is read: found, checked, and opened file by file.

use std::time::Duration;

use anyhow::Context as _;
use cluster::{Filter, NodeId, Peers};
use pgerror::{PgError, SqlState};
use storage::{Store, Stores, Uri};
use tokio::time::Instant;

use crate::export::sha256;
use crate::layout;
use crate::manifest::{FORMAT, FileEntry, Manifest};

/// Other nodes are asked, one after the other, until so long has passed.
const ELSEWHERE_MAX: Duration = Duration::from_secs(60);

/// A backup and where its files are.
pub(crate) struct Source {
    /// What opens them.
    stores: Stores,
    /// Its manifest, verified.
    pub(crate) manifest: Manifest,
    /// Its directory in the collection.
    pub(crate) subdir: String,
    /// The place of its directory, with keys.
    uri: Uri,
}

/// The places where a collection's indexes may be. `nodelocal://self` is each node's own directory, and a backup's
/// index is in its coordinator's: those of all nodes that match the filter are looked at.
pub(crate) fn places(collection: &Uri, peers: &Peers, filter: &Filter) -> Vec<Uri> {
    let view = peers.cluster().view();
    let known = view.nodes.values().filter(|known| known.reachable);
    let matching = known.filter(|known| known.info.locality.first_unmatched(filter).is_none());
    let mut nodes: Vec<NodeId> = matching.filter_map(|known| known.info.node_id).collect();
    nodes.sort_unstable();
    match collection.on(NodeId(0)) {
        Some(_) => nodes.into_iter().filter_map(|node| collection.on(node)).collect(),
        None => vec![collection.clone()],
    }
}

/// The directories of all backups in a collection, oldest first.
///
/// # Errors
///
/// The store cannot be read.
pub(crate) async fn list(stores: &Stores, peers: &Peers, collection: &Uri) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for place in places(collection, peers, &Filter::default()) {
        let store = stores.open(&place).await?;
        for entry in store.list(layout::LATEST_PREFIX).await? {
            found.extend(text(&store, &entry.path).await?);
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

async fn text(store: &Store, path: &str) -> anyhow::Result<Option<String>> {
    let bytes = store.read(path).await?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()))
}

impl Source {
    /// Finds the backup in `subdir`, or the newest one.
    ///
    /// # Errors
    ///
    /// 58P01 when there is none; XX001 when its manifest is not the one that was sealed, or what leads to the newest
    /// cannot be read; 0A000 when another version wrote it; or the store cannot be read.
    pub(crate) async fn find(
        stores: &Stores,
        peers: &Peers,
        collection: &Uri,
        subdir: Option<&str>,
        filter: &Filter,
    ) -> anyhow::Result<Self> {
        let places = places(collection, peers, filter);
        let subdir = match subdir {
            Some(subdir) => format!("/{}", subdir.trim_matches('/')),
            None => latest(stores, &places, collection).await?,
        };
        for place in &places {
            let uri = place.join(&subdir);
            let store = stores.open(&uri).await?;
            let Some(body) = store.read(layout::SEAL).await? else { continue };
            let expected = text(&store, layout::CHECKSUM).await?;
            let found = sha256(&body);
            let damaged = |detail: String| {
                let message = format!("the manifest of the backup in {} is damaged", uri.redacted());
                PgError::new(SqlState::DATA_CORRUPTED, message).detail(detail)
            };
            match expected {
                Some(expected) if expected == found => {}
                Some(expected) => {
                    return Err(damaged(format!("checksum mismatch; expected {expected}, got {found}")).into());
                }
                None => return Err(damaged(format!("The file {} is missing.", layout::CHECKSUM)).into()),
            }
            let manifest = parse(&body).map_err(|detail| match detail {
                Unreadable::Version(error) => error,
                Unreadable::Text(detail) => damaged(detail),
            })?;
            let uri = collection.join(&subdir);
            return Ok(Self { stores: stores.clone(), manifest, subdir, uri });
        }
        let message = format!("could not find BACKUP manifest file in {}", collection.join(&subdir).redacted());
        Err(PgError::new(SqlState::UNDEFINED_FILE, message)
            .hint("SHOW BACKUPS IN the collection lists the backups that are there.")
            .into())
    }

    /// The backup by way of the first other node that reads it, after [`Source::find`] has failed with `here` on this one: the
    /// store is not reached from here, or lets nobody in. That is for those without a filter only: with one, no node that
    /// does not match comes to the store. Nothing when no other node reads it either; what they say of it stays in the log,
    /// for it may be another store that they reach under that name.
    pub(crate) async fn find_elsewhere(
        stores: &Stores,
        peers: &Peers,
        collection: &Uri,
        subdir: Option<&str>,
        here: &anyhow::Error,
    ) -> Option<Self> {
        if !collection.is_shared() || !may_be_read_elsewhere(here) {
            return None;
        }
        let (view, me) = (peers.cluster().view(), peers.cluster().me().node_id);
        let others = view.nodes.values().filter(|known| known.reachable && known.info.node_id != me);
        let mut others: Vec<NodeId> = others.filter_map(|known| known.info.node_id).collect();
        others.sort_unstable();
        let begun = Instant::now();
        for node in others.into_iter().take_while(|_| begun.elapsed() < ELSEWHERE_MAX) {
            match Self::find(&stores.through(node), peers, collection, subdir, &Filter::default()).await {
                Ok(source) => {
                    tracing::info!(%node, "the backup is read by way of another node, because here: {here:#}");
                    return Some(source);
                }
                Err(error) => tracing::info!(%node, "the backup is not read by way of another node: {error:#}"),
            }
        }
        None
    }

    /// The directory that holds `file`, with keys.
    pub(crate) fn place(&self, file: &FileEntry) -> Uri {
        file.node.and_then(|node| self.uri.on(node)).unwrap_or_else(|| self.uri.clone())
    }

    /// Sees to it that every one of these files is there, in its length. What is in them is looked at when they are
    /// read: to do it here would cost as much as a restore reads.
    ///
    /// # Errors
    ///
    /// 58P01 or XX001, naming the first file that is not.
    pub(crate) async fn check(&self, files: &[&FileEntry]) -> anyhow::Result<()> {
        let mut places: Vec<(Uri, Vec<storage::Entry>)> = Vec::new();
        for file in files {
            let place = self.place(file);
            let index = match places.iter().position(|(known, _)| *known == place) {
                Some(index) => index,
                None => {
                    let entries = self.stores.open(&place).await?.list("").await?;
                    places.push((place.clone(), entries));
                    places.len() - 1
                }
            };
            let entries = &places[index].1;
            let found = entries.binary_search_by(|entry| entry.path.as_str().cmp(&file.path)).map(|at| &entries[at]);
            match found {
                Ok(entry) if entry.size == file.file_bytes => {}
                Ok(entry) => {
                    let detail = format!("It has {} bytes; the manifest says {}.", entry.size, file.file_bytes);
                    return Err(self.damaged(file, &detail).into());
                }
                Err(_) => {
                    let message = format!("file \"{}\" of the backup is missing", file.path);
                    let error = PgError::new(SqlState::UNDEFINED_FILE, message);
                    return Err(error.detail(self.holds(file)).into());
                }
            }
        }
        Ok(())
    }

    /// A whole, verified file.
    ///
    /// # Errors
    ///
    /// It is missing or damaged, or the store cannot be read.
    pub(crate) async fn read(&self, file: &FileEntry) -> anyhow::Result<bytes::Bytes> {
        let bytes = self.stores.open(&self.place(file)).await?.read(&file.path).await?;
        let bytes = bytes.with_context(|| format!("read {}", file.path))?;
        match sha256(&bytes) {
            found if found == file.sha256 => Ok(bytes),
            found => Err(self.damaged(file, &format!("Its SHA-256 is {found}.")).into()),
        }
    }

    fn damaged(&self, file: &FileEntry, detail: &str) -> PgError {
        PgError::new(SqlState::DATA_CORRUPTED, format!("file \"{}\" of the backup is damaged", file.path))
            .detail(format!("{detail} {}", self.holds(file)))
    }

    /// What a file holds, in a sentence.
    pub(crate) fn holds(&self, file: &FileEntry) -> String {
        format!("It holds {} of database \"{}\".", self.manifest.what(file), file.database)
    }
}

/// Whether another node may do what fails with this error on one: its way to the store, its rights there (those of
/// `AUTH=implicit`, or what an endpoint allows) and its programs of PostgreSQL are each node's own. A requester's missing
/// rights are found before any node is asked.
pub(super) fn may_be_read_elsewhere(error: &anyhow::Error) -> bool {
    const PASSING: [SqlState; 4] = [
        SqlState::IO_ERROR,
        SqlState::CONNECTION_FAILURE,
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    ];
    PgError::of(error).is_some_and(|said| PASSING.contains(&said.code))
}

async fn latest(stores: &Stores, places: &[Uri], collection: &Uri) -> anyhow::Result<String> {
    let mut newest: Option<(String, Store)> = None;
    for place in places {
        let store = stores.open(place).await?;
        // The newest sorts first.
        let Some(entry) = store.list(layout::LATEST_PREFIX).await?.into_iter().next() else { continue };
        if newest.as_ref().is_none_or(|(path, _)| entry.path < *path) {
            newest = Some((entry.path, store));
        }
    }
    if let Some((path, store)) = newest
        && let Some(found) = text(&store, &path).await?
    {
        return if layout::is_subdir(&found) { Ok(found) } else { Err(astray(&path, collection).into()) };
    }
    let message = format!("path does not contain a completed latest backup: {}", collection.redacted());
    Err(PgError::new(SqlState::UNDEFINED_FILE, message)
        .hint("SHOW BACKUPS IN the collection lists the backups that are there.")
        .into())
}

/// That the newest pointer of a collection leads nowhere. An older backup is never taken in its place.
fn astray(path: &str, collection: &Uri) -> PgError {
    let message = format!("file \"{path}\" of the collection {} is damaged", collection.redacted());
    PgError::new(SqlState::DATA_CORRUPTED, message)
        .detail("It should hold the directory of the newest backup.")
        .hint("Name the directory instead of LATEST: the description of the backup's job in SHOW JOBS has it.")
}

enum Unreadable {
    Version(PgError),
    Text(String),
}

fn parse(body: &[u8]) -> Result<Manifest, Unreadable> {
    #[derive(serde::Deserialize)]
    struct Version {
        format: u32,
    }
    let text = |error: serde_json::Error| Unreadable::Text(format!("It cannot be read: {error}."));
    let Version { format } = serde_json::from_slice(body).map_err(text)?;
    if format != FORMAT {
        let message = format!("the backup has format {format}, and this program knows only format {FORMAT}");
        return Err(Unreadable::Version(
            PgError::new(SqlState::FEATURE_NOT_SUPPORTED, message)
                .hint("Restore it with the program that made it, or with its RESTORE.txt."),
        ));
    }
    serde_json::from_slice(body).map_err(text)
}
