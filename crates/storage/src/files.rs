//! Files of other nodes: what every node offers to its peers, and how a peer's files become a store.
//!
//! The node that holds the files decides what is inside of its external I/O directory; what another node asks for is
//! checked here again. Bytes travel as the peers' streams do, bounded by the receiver's pace.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
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
use crate::store::{Entry, Medium, gather};
use crate::trouble::Place;
use crate::uri::inside;

/// The name under which a node's files are offered to its peers.
pub const FILES: &str = "files";

/// What a node asks of another's files.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// The store as errors name it.
    at: String,
    /// The collection, below the external I/O directory.
    root: String,
    /// The file, or for a listing the prefix.
    path: String,
    action: Action,
}

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

/// This node's own files, for its peers.
#[derive(Debug)]
pub struct Files {
    external_dir: PathBuf,
}

impl Files {
    /// Those below `external_dir`. What writers left there more than a day ago is removed now.
    pub fn new(external_dir: &Path) -> Self {
        sweep(external_dir);
        Self { external_dir: external_dir.to_owned() }
    }

    async fn answer(&self, request: Value) -> anyhow::Result<Reply> {
        let Request { at, root, path, action } =
            serde_json::from_value(request).context("read what is asked of files")?;
        let place = Place::plain(at);
        let directory = Directory::new(&self.external_dir, inside(&root)?, place);
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
                let entries = directory.list(if path.ends_with('/') { asked + "/" } else { asked }).await?;
                let listed = Bytes::from(serde_json::to_vec(&entries)?);
                Ok(Reply::Download(stream::iter([Ok(listed)]).boxed()))
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

fn absent() -> PgError {
    PgError::new(SqlState::UNDEFINED_FILE, "nodelocal storage file does not exist")
}

fn is_absent(error: &anyhow::Error) -> bool {
    PgError::of(error) == Some(&absent())
}

/// A collection among another node's files.
pub(crate) struct Remote {
    peers: Peers,
    node: NodeId,
    root: String,
    place: Place,
}

impl Remote {
    /// The collection at `root` below `node`'s external I/O directory.
    pub(crate) fn new(peers: Peers, node: NodeId, root: String, place: Place) -> Self {
        Self { peers, node, root, place }
    }

    fn request(&self, path: String, action: Action) -> Request {
        Request { at: self.place.at.to_string(), root: self.root.clone(), path, action }
    }

    async fn begin(&self, request: Request) -> anyhow::Result<Option<ByteStream>> {
        let begun = self.peers.download(self.node, FILES, &request, REQUEST_DEADLINE).await;
        match begun {
            Err(error) if is_absent(&error) => Ok(None),
            begun => Ok(Some(paced(begun.map_err(|error| self.place.of_peer(error))?, self.place.clone()))),
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
        Box::pin(self.begin(self.request(path, Action::Read)))
    }

    fn list(&self, prefix: String) -> Boxed<'_, Vec<Entry>> {
        Box::pin(async move {
            let listing = self.begin(self.request(prefix.clone(), Action::List)).await?;
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
fn paced(stream: ByteStream, place: Place) -> ByteStream {
    Box::pin(stream::try_unfold((stream, place), |(mut stream, place)| async move {
        match timeout(REQUEST_DEADLINE, stream.next()).await.map_err(|_| place.late())? {
            None => Ok(None),
            Some(Ok(piece)) => Ok(Some((piece, (stream, place)))),
            Some(Err(error)) => Err(place.of_peer(error)),
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
