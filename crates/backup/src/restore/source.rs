//! A backup that is read: found, checked, and opened file by file.

use anyhow::Context as _;
use cluster::{Filter, NodeId, Peers};
use pgerror::{PgError, SqlState};
use storage::{Store, Stores, Uri};

use crate::export::sha256;
use crate::layout;
use crate::manifest::{FORMAT, FileEntry, Manifest};

/// A backup and where its files are.
pub(crate) struct Source {
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
            return Ok(Self { manifest, subdir, uri });
        }
        let message = format!("could not find BACKUP manifest file in {}", collection.join(&subdir).redacted());
        Err(PgError::new(SqlState::UNDEFINED_FILE, message)
            .hint("SHOW BACKUPS IN the collection lists the backups that are there.")
            .into())
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
    pub(crate) async fn check(&self, stores: &Stores, files: &[&FileEntry]) -> anyhow::Result<()> {
        let mut places: Vec<(Uri, Vec<storage::Entry>)> = Vec::new();
        for file in files {
            let place = self.place(file);
            let index = match places.iter().position(|(known, _)| *known == place) {
                Some(index) => index,
                None => {
                    let entries = stores.open(&place).await?.list("").await?;
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
    pub(crate) async fn read(&self, stores: &Stores, file: &FileEntry) -> anyhow::Result<bytes::Bytes> {
        let bytes = stores.open(&self.place(file)).await?.read(&file.path).await?;
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
