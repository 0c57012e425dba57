//! A collection's files, wherever they are.
//!
//! [`Store`] holds what is the same for all media: paths, tries, limits, and how writing once is decided. A medium
//! knows four things, and its uploads follow one rule: what is not finished is not there.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use cluster::service::{Boxed, ByteStream, Upload};
use cluster::{NodeId, Peers};
use futures_util::StreamExt as _;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::directory::Directory;
use crate::files::{Collection, Remote};
use crate::object::Bucketed;
use crate::s3::Regions;
use crate::trouble::{Place, is_transient};
use crate::uri::{self, Uri, inside};
use crate::{FIRST_DELAY, TRIES};

/// Files that are read or created whole are no longer than this; longer ones are refused. They go through
/// [`Store::writer`] and [`Store::download`].
pub const READ_MAX: usize = 256 * 1024 * 1024;

/// A listing that would be longer is refused: no collection's directory has as many files.
pub const LIST_MAX: usize = 100_000;

/// Proving that a store can be used takes no longer, tries included.
const PROBE_DEADLINE: Duration = Duration::from_secs(60);

/// What holds the bytes.
pub(crate) trait Medium: Send + Sync {
    /// Takes a new file. With `once`, finishing fails with 58P02 when the name is taken, or may have been taken by this
    /// very upload; without, it replaces what is there.
    fn upload(&self, path: String, once: bool) -> Boxed<'_, Box<dyn Upload>>;
    /// Gives a file's bytes, or none when there is no such file.
    fn download(&self, path: String) -> Boxed<'_, Option<ByteStream>>;
    /// Lists the files whose path begins with `prefix`, in any order.
    fn list(&self, prefix: String) -> Boxed<'_, Vec<Entry>>;
    /// Removes a file, if it is there.
    fn delete(&self, path: String) -> Boxed<'_, ()>;
}

/// A file in a store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// Below the collection's root.
    pub path: String,
    /// In bytes.
    pub size: u64,
}

/// What became of writing a file once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is there with our bytes.
    New,
    /// It was there before, with these other bytes.
    Exists(Bytes),
}

/// Opens stores; clones are the same.
#[derive(Clone)]
pub struct Stores {
    peers: Peers,
    external_dir: PathBuf,
    regions: Arc<Regions>,
    /// The node by way of which object stores are read.
    through: Option<NodeId>,
}

impl Stores {
    /// For a node whose own files are below `external_dir`, and which reaches others' through `peers`.
    pub fn new(peers: Peers, external_dir: PathBuf) -> Self {
        Self { peers, external_dir, regions: Arc::default(), through: None }
    }

    /// The same, but object stores are read by way of `node`, which may reach one that this node does not. What is opened
    /// cannot be written to.
    pub fn through(&self, node: NodeId) -> Self {
        Self { through: Some(node), ..self.clone() }
    }

    /// Opens a store. Nothing is asked of it yet, except that Amazon may be asked for a bucket's region.
    ///
    /// # Errors
    ///
    /// The URI is of an external connection that was not resolved, its parameters do not make a store, or Amazon does not
    /// say where the bucket is, which may pass.
    pub async fn open(&self, uri: &Uri) -> anyhow::Result<Store> {
        let redacted = uri.redacted();
        match &uri.0 {
            uri::Place::Nodelocal { node, path } => {
                let place = Place::plain(redacted);
                let root = inside(path)?;
                let me = self.peers.cluster().me().node_id;
                match node {
                    Some(other) if me != Some(*other) => {
                        let remote = Remote::new(self.peers.clone(), *other, Collection::Own(root), place.clone());
                        Ok(Store { medium: Arc::new(remote), place, node: Some(*other), tries: TRIES })
                    }
                    _ => {
                        let directory = Directory::new(&self.external_dir, root, place.clone());
                        Ok(Store { medium: Arc::new(directory), place, node: me, tries: 1 })
                    }
                }
            }
            uri::Place::S3(bucket) => {
                if let Some(node) = self.through {
                    let (of, place) = (Collection::Store(uri.exposed()), Place::plain(redacted));
                    return Ok(Store::over(Remote::new(self.peers.clone(), node, of, place.clone()), place));
                }
                let place = Place {
                    at: redacted.into(),
                    from: Some(self.peers.cluster().me().name().into()),
                    bucket: Some(bucket.name.as_str().into()),
                    secrets: bucket.secrets().into(),
                };
                let operator = bucket.operator(&place, &self.regions).await?;
                Ok(Store::over(Bucketed::new(operator, place.clone()), place))
            }
            uri::Place::External { name, .. } => {
                let message = format!("external connection with connection name {name} does not exist");
                Err(PgError::new(SqlState::UNDEFINED_OBJECT, message)).context("open a store that was not resolved")
            }
        }
    }
}

/// A collection's files; clones are the same. Paths are relative to the collection's root and never leave it.
#[derive(Clone)]
pub struct Store {
    medium: Arc<dyn Medium>,
    place: Place,
    node: Option<NodeId>,
    /// Object stores count their own tries.
    tries: usize,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.place.at)
    }
}

impl Store {
    pub(crate) fn over(medium: impl Medium + 'static, place: Place) -> Self {
        Self { medium: Arc::new(medium), place, node: None, tries: 1 }
    }

    /// The URI without secrets.
    pub fn redacted(&self) -> &str {
        &self.place.at
    }

    /// The node that holds the files, when a node does and has its number.
    pub fn node(&self) -> Option<NodeId> {
        self.node
    }

    /// Writes a file that is never written again. Trying it twice with the same bytes is new both times.
    ///
    /// # Errors
    ///
    /// The bytes are too many, or the store fails; then the file may be there or not.
    pub async fn create(&self, path: &str, bytes: Bytes) -> anyhow::Result<Created> {
        if bytes.len() > READ_MAX {
            return Err(self.place.too_long(path, READ_MAX).into());
        }
        let path = file(path)?;
        let made = self.persist(|| Box::pin(self.create_once(path.clone(), bytes.clone()))).await;
        match made.context("create a file in a store") {
            Err(error) if PgError::of(&error).is_some_and(|said| said.code == SqlState::DUPLICATE_FILE) => {
                match self.read(&path).await? {
                    Some(found) if found == bytes => Ok(Created::New),
                    Some(found) => Ok(Created::Exists(found)),
                    // Somebody deleted it between.
                    None => Err(error),
                }
            }
            made => made.map(|()| Created::New),
        }
    }

    async fn create_once(&self, path: String, bytes: Bytes) -> anyhow::Result<()> {
        let mut upload = self.medium.upload(path, true).await?;
        if !bytes.is_empty() {
            upload.write(bytes).await?;
        }
        upload.finish().await
    }

    /// Reads a whole file; none when it does not exist.
    ///
    /// # Errors
    ///
    /// It is longer than [`READ_MAX`], or the store fails.
    pub async fn read(&self, path: &str) -> anyhow::Result<Option<Bytes>> {
        let path = file(path)?;
        let read = self.persist(|| {
            let path = path.clone();
            Box::pin(async move {
                match self.medium.download(path.clone()).await? {
                    Some(stream) => gather(stream, &path, &self.place).await.map(Some),
                    None => Ok(None),
                }
            })
        });
        read.await.context("read a file of a store")
    }

    /// Reads a file of any length piece by piece; none when it does not exist. An error ends the stream.
    ///
    /// # Errors
    ///
    /// The store fails.
    pub async fn download(&self, path: &str) -> anyhow::Result<Option<ByteStream>> {
        let path = file(path)?;
        let begun = self.persist(|| self.medium.download(path.clone())).await;
        begun.context("begin to read a file of a store")
    }

    /// Writes a file of any length piece by piece. It replaces what is there: its name must be the writer's own.
    ///
    /// # Errors
    ///
    /// The store fails.
    pub async fn writer(&self, path: &str) -> anyhow::Result<Writer> {
        let path = file(path)?;
        let begun = self.persist(|| self.medium.upload(path.clone(), false)).await;
        Ok(Writer { upload: begun.context("begin to write a file of a store")? })
    }

    /// All files whose path begins with `prefix`, sorted by path. The prefix need not end where a directory does.
    ///
    /// # Errors
    ///
    /// There are more than [`LIST_MAX`], or the store fails.
    pub async fn list(&self, prefix: &str) -> anyhow::Result<Vec<Entry>> {
        let ends_in_directory = prefix.is_empty() || prefix.ends_with('/');
        let mut prefix = inside(prefix)?;
        if ends_in_directory && !prefix.is_empty() {
            prefix.push('/');
        }
        let mut entries =
            self.persist(|| self.medium.list(prefix.clone())).await.context("list the files of a store")?;
        entries.sort();
        Ok(entries)
    }

    /// Removes a file; one that does not exist is fine.
    ///
    /// # Errors
    ///
    /// The store fails.
    pub async fn delete(&self, path: &str) -> anyhow::Result<()> {
        let path = file(path)?;
        self.persist(|| self.medium.delete(path.clone())).await.context("delete a file of a store")
    }

    /// Finds out whether files can be written, read and deleted here.
    ///
    /// # Errors
    ///
    /// They cannot, or not within a minute.
    pub async fn probe(&self) -> anyhow::Result<()> {
        self.try_out().await.map(|_| ())
    }

    /// Finds out whether the store keeps a file that is created twice as it was, or lies about that. What is found
    /// out is of one moment; the registry's fences stay necessary.
    ///
    /// # Errors
    ///
    /// As [`Store::probe`].
    pub async fn is_write_once(&self) -> anyhow::Result<bool> {
        self.try_out().await
    }

    async fn try_out(&self) -> anyhow::Result<bool> {
        let path = format!("backhaul_storage_probe-{}", Uuid::new_v4());
        let tried = timeout(PROBE_DEADLINE, async {
            let (first, second) = (Bytes::from_static(b"first"), Bytes::from_static(b"second"));
            self.create(&path, first.clone()).await?;
            let again = self.create(&path, second).await;
            let read = self.read(&path).await;
            self.delete(&path).await?;
            let (again, read) = (again?, read?);
            Ok(again == Created::Exists(first.clone()) && read == Some(first))
        });
        let outcome = tried.await.unwrap_or_else(|_| {
            Err(self.place.unreachable(&format!("It was not proven within {} seconds.", PROBE_DEADLINE.as_secs())))
        });
        outcome.context("try a store out")
    }

    /// Makes a request as many times as this medium needs, while what fails may pass.
    async fn persist<'s, T>(&'s self, request: impl Fn() -> Boxed<'s, T>) -> anyhow::Result<T> {
        let mut delay = FIRST_DELAY;
        for _ in 1..self.tries {
            match request().await {
                Err(error) if is_transient(&error) => {
                    tracing::debug!(store = %self.place.at, "a request to a store is tried again: {error:#}");
                    sleep(delay).await;
                    delay *= 2;
                }
                outcome => return outcome,
            }
        }
        request().await
    }
}

/// A file that is being written. Dropped before [`Writer::finish`], it leaves nothing under its name.
pub struct Writer {
    upload: Box<dyn Upload>,
}

impl Writer {
    /// Takes the next bytes.
    ///
    /// # Errors
    ///
    /// The store fails; the writer is of no more use.
    pub async fn write(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.upload.write(bytes).await.context("write a file of a store")
    }

    /// Makes the file appear, durably and whole.
    ///
    /// # Errors
    ///
    /// The store fails; the file may be there or not, but not in part.
    pub async fn finish(self) -> anyhow::Result<()> {
        self.upload.finish().await.context("finish a file of a store")
    }
}

/// A path that can be a file's.
fn file(path: &str) -> Result<String, PgError> {
    let path = inside(path)?;
    if path.is_empty() {
        return Err(uri::invalid("a file in a store must have a name"));
    }
    Ok(path)
}

/// All bytes of a stream, up to [`READ_MAX`].
pub(crate) async fn gather(mut stream: ByteStream, path: &str, place: &Place) -> anyhow::Result<Bytes> {
    let mut gathered = BytesMut::new();
    while let Some(bytes) = stream.next().await {
        let bytes = bytes?;
        if gathered.len() + bytes.len() > READ_MAX {
            return Err(place.too_long(path, READ_MAX).into());
        }
        gathered.extend_from_slice(&bytes);
    }
    Ok(gathered.freeze())
}

/// A listing that has grown too long.
pub(crate) fn too_many(place: &Place) -> PgError {
    let message = format!("the store at {} has too many files to list", place.at);
    PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).detail(format!("At most {LIST_MAX} are listed."))
}
