//! Files by way of other nodes: what every node offers to its peers, and how that becomes a store.
//!
//! A node has files of its own; it decides what is inside of its external I/O directory, and what another node asks for
//! is checked here again. And it may reach an object store that another one does not; for that one it reads there, and
//! never writes. Bytes travel as the peers' streams do, bounded by the receiver's pace.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use cluster::service::{Boxed, ByteStream, Reply, Service, Upload};
use cluster::{NodeId, Peers};
use futures_util::{StreamExt as _, stream};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::timeout;

use crate::REQUEST_DEADLINE;
use crate::directory::{Directory, sweep};
use crate::store::{Entry, Medium, Stores, gather};
use crate::trouble::{Place, transient};
use crate::uri::{Uri, inside};

/// The name under which a node offers its files to its peers, and what it reads in stores for them.
pub const FILES: &str = "files";

/// A listing comes when the other node has all of it; of a store it makes many requests, each with a deadline of its own.
const LIST_DEADLINE: Duration = Duration::from_secs(600);

/// What a node asks of another one.
#[derive(Serialize, Deserialize)]
struct Request {
    /// The store as errors name it.
    at: String,
    /// The collection, below the external I/O directory.
    root: String,
    /// Or the URI of a store that the node is to reach, with its keys: never logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    store: Option<String>,
    /// The file, or for a listing the prefix.
    path: String,
    action: Action,
}

/// Where the node that is asked finds the files.
pub(crate) enum Collection {
    /// Below its external I/O directory.
    Own(String),
    /// In an object store, by its URI.
    Store(String),
}

/// The root of no node's collection: a node of an older version, which knows of no stores of others, refuses it.
const NO_ROOT: &str = "..";

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    /// An upload that fails when the file exists.
    Create,
    /// An upload that replaces the file.
    Write,
    /// A download of the file; 58P01 when there is none.
    Read,
    /// A download of the entries as JSON: there may be too many for an answer in one frame.
    List,
    /// An answer of null.
    Delete,
}

/// This node's own files, and the stores that it reaches, for its peers.
pub struct Files {
    external_dir: PathBuf,
    stores: Stores,
}

impl Files {
    /// Those below `external_dir`, and what `stores` opens. What writers left in the directory more than a day ago is
    /// removed now.
    pub fn new(external_dir: &Path, stores: Stores) -> Self {
        sweep(external_dir);
        Self { external_dir: external_dir.to_owned(), stores }
    }

    async fn answer(&self, request: Value) -> anyhow::Result<Reply> {
        let Request { at, root, store, path, action } =
            serde_json::from_value(request).context("read what is asked of files")?;
        match store {
            None => self.own(Place::plain(at), &root, path, action).await,
            Some(uri) => self.read(&Uri::parse(&uri)?, &path, action).await,
        }
    }

    /// In a store, where nothing is changed for another node.
    async fn read(&self, uri: &Uri, path: &str, action: Action) -> anyhow::Result<Reply> {
        if !uri.is_shared() {
            bail!("a node was asked for the files of another node");
        }
        let store = self.stores.open(uri).await?;
        match action {
            Action::Read => store.download(path).await?.map(Reply::Download).ok_or_else(|| absent().into()),
            Action::List => listed(&store.list(path).await?),
            Action::Create | Action::Write | Action::Delete => bail!("a node was asked to write into another's store"),
        }
    }

    async fn own(&self, place: Place, root: &str, path: String, action: Action) -> anyhow::Result<Reply> {
        let directory = Directory::new(&self.external_dir, inside(root)?, place);
        let asked = inside(&path)?;
        match action {
            Action::Create => Ok(Reply::Upload(directory.upload(asked, true).await?)),
            Action::Write => Ok(Reply::Upload(directory.upload(asked, false).await?)),
            Action::Read => match directory.download(asked).await? {
                Some(stream) => Ok(Reply::Download(stream)),
                None => Err(absent().into()),
            },
            Action::List => {
                // A slash at the end is part of the prefix.
                listed(&directory.list(if path.ends_with('/') { asked + "/" } else { asked }).await?)
            }
            Action::Delete => {
                directory.delete(asked).await?;
                Ok(Reply::Answer(Value::Null))
            }
        }
    }
}

impl Service for Files {
    fn call(&self, request: Value) -> Boxed<'_, Reply> {
        Box::pin(self.answer(request))
    }
}

fn listed(entries: &[Entry]) -> anyhow::Result<Reply> {
    let listed = Bytes::from(serde_json::to_vec(entries)?);
    Ok(Reply::Download(stream::iter([Ok(listed)]).boxed()))
}

fn absent() -> PgError {
    PgError::new(SqlState::UNDEFINED_FILE, "nodelocal storage file does not exist")
}

fn is_absent(error: &anyhow::Error) -> bool {
    PgError::of(error) == Some(&absent())
}

/// A collection by way of another node.
pub(crate) struct Remote {
    peers: Peers,
    node: NodeId,
    of: Collection,
    place: Place,
}

impl Remote {
    /// The collection as `node` finds it.
    pub(crate) fn new(peers: Peers, node: NodeId, of: Collection, place: Place) -> Self {
        Self { peers, node, of, place }
    }

    fn request(&self, path: String, action: Action) -> Request {
        let (root, store) = match &self.of {
            Collection::Own(root) => (root.clone(), None),
            Collection::Store(uri) => (NO_ROOT.to_owned(), Some(uri.clone())),
        };
        Request { at: self.place.at.to_string(), root, store, path, action }
    }

    /// What an error of the other node's means. What an object store does not do now it may do later, and between nodes
    /// that is not told.
    fn trouble(&self) -> impl Fn(anyhow::Error) -> anyhow::Error + Send + use<> {
        let (place, is_store) = (self.place.clone(), matches!(self.of, Collection::Store(_)));
        move |error| {
            let error = place.of_peer(error);
            match PgError::of(&error).filter(|said| is_store && said.code == SqlState::IO_ERROR) {
                Some(said) => transient(said.clone()),
                None => error,
            }
        }
    }

    async fn begin(&self, request: Request, deadline: Duration) -> anyhow::Result<Option<ByteStream>> {
        let begun = self.peers.download(self.node, FILES, &request, deadline).await;
        match begun {
            Err(error) if is_absent(&error) => Ok(None),
            begun => {
                let trouble = self.trouble();
                Ok(Some(paced(begun.map_err(&trouble)?, self.place.clone(), trouble)))
            }
        }
    }
}

impl Medium for Remote {
    fn upload(&self, path: String, once: bool) -> Boxed<'_, Box<dyn Upload>> {
        Box::pin(async move {
            let request = self.request(path, if once { Action::Create } else { Action::Write });
            let begun = self.peers.upload(self.node, FILES, &request, REQUEST_DEADLINE).await;
            let upload = begun.map_err(|error| self.place.of_peer(error))?;
            Ok(Box::new(Sending { upload, place: self.place.clone() }) as Box<dyn Upload>)
        })
    }

    fn download(&self, path: String) -> Boxed<'_, Option<ByteStream>> {
        Box::pin(self.begin(self.request(path, Action::Read), REQUEST_DEADLINE))
    }

    fn list(&self, prefix: String) -> Boxed<'_, Vec<Entry>> {
        Box::pin(async move {
            let listing = self.begin(self.request(prefix.clone(), Action::List), LIST_DEADLINE).await?;
            let listing = listing.context("list another node's files")?;
            let listed = gather(listing, &prefix, &self.place).await?;
            serde_json::from_slice(&listed).context("read another node's list of files")
        })
    }

    fn delete(&self, path: String) -> Boxed<'_, ()> {
        Box::pin(async move {
            let request = self.request(path, Action::Delete);
            let deleted: anyhow::Result<Value> = self.peers.call(self.node, FILES, &request, REQUEST_DEADLINE).await;
            deleted.map(|_| ()).map_err(|error| self.place.of_peer(error))
        })
    }
}

/// A stream each of whose pieces has a deadline, and whose errors are the store's.
fn paced(
    stream: ByteStream,
    place: Place,
    trouble: impl Fn(anyhow::Error) -> anyhow::Error + Send + 'static,
) -> ByteStream {
    Box::pin(stream::try_unfold((stream, place, trouble), |(mut stream, place, trouble)| async move {
        match timeout(REQUEST_DEADLINE, stream.next()).await.map_err(|_| place.late())? {
            None => Ok(None),
            Some(Ok(piece)) => Ok(Some((piece, (stream, place, trouble)))),
            Some(Err(error)) => Err(trouble(error)),
        }
    }))
}

struct Sending {
    upload: Box<dyn Upload>,
    place: Place,
}

impl Upload for Sending {
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            let written = timeout(REQUEST_DEADLINE, self.upload.write(bytes)).await.map_err(|_| self.place.late())?;
            written.map_err(|error| self.place.of_peer(error))
        })
    }

    fn finish(self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            let finished = timeout(REQUEST_DEADLINE, self.upload.finish()).await.map_err(|_| self.place.late())?;
            finished.map_err(|error| self.place.of_peer(error))
        })
    }
}
