//! What a node does for other nodes, beyond saying who it is.
//!
//! A crate that has something to offer implements [`Service`] under a name, and `node` registers it with [`Peers`].
//! Whoever needs it calls it by node id and name; that the node may be this one, or another one over a peer session,
//! is decided here and nowhere else. A request is JSON. What comes back is JSON, or a stream of bytes in one
//! direction, which travels as PostgreSQL's COPY and so is bounded by the receiver's pace.
//!
//! An error that was written for a client ([`PgError`]) crosses the wire as one; any other becomes the callee's log id.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use futures_util::{SinkExt as _, Stream, StreamExt as _};
use pgerror::{PgError, SqlState};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sql::Verb;
use tokio_postgres::CopyInSink;

use crate::{Cluster, Dialer, NodeId, PeerSession, Purpose};

/// A future that a service gives back.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send + 'a>>;

/// Bytes as they come; an error ends them. Dropping it abandons what produces them.
pub type ByteStream = Pin<Box<dyn Stream<Item = anyhow::Result<Bytes>> + Send>>;

/// Pieces of a stream are no longer than this when they travel between nodes.
pub const PIECE_MAX: usize = 256 * 1024;

/// What a service gives back.
pub enum Reply {
    /// One value.
    Answer(Value),
    /// Bytes from the service to the caller.
    Download(ByteStream),
    /// Bytes from the caller to the service.
    Upload(Box<dyn Upload>),
}

/// Where uploaded bytes go. Dropped before [`Upload::finish`], it leaves nothing.
pub trait Upload: Send {
    /// Takes the next bytes.
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()>;
    /// All bytes have come: makes them durable.
    fn finish(self: Box<Self>) -> Boxed<'static, ()>;
}

/// Something that a node does for others.
pub trait Service: Send + Sync {
    /// Answers one request. Dropping the future cancels it.
    fn call(&self, request: Value) -> Boxed<'_, Reply>;
}

struct Shared {
    cluster: Cluster,
    dialer: Dialer,
    services: Mutex<BTreeMap<&'static str, Arc<dyn Service>>>,
}

/// All nodes' services; clones share everything.
#[derive(Clone)]
pub struct Peers(Arc<Shared>);

impl Peers {
    /// Without services of this node's own, until they are registered.
    pub fn new(cluster: Cluster, dialer: Dialer) -> Self {
        Self(Arc::new(Shared { cluster, dialer, services: Mutex::default() }))
    }

    /// The view of all nodes.
    pub fn cluster(&self) -> &Cluster {
        &self.0.cluster
    }

    /// What opens peer sessions.
    pub fn dialer(&self) -> &Dialer {
        &self.0.dialer
    }

    /// Offers `service` to all nodes under `name`.
    pub fn offer(&self, name: &'static str, service: Arc<dyn Service>) {
        self.0.services.lock().unwrap_or_else(PoisonError::into_inner).insert(name, service);
    }

    /// Answers a request that was made of this node.
    ///
    /// # Errors
    ///
    /// This node does not offer that, or as the service says.
    pub async fn serve(&self, name: &str, request: Value) -> anyhow::Result<Reply> {
        match self.offered(name) {
            Some(service) => service.call(request).await,
            None => Err(PgError::new(SqlState::FEATURE_NOT_SUPPORTED, format!("this node does not offer \"{name}\""))
                .detail("It may be of another version.")
                .into()),
        }
    }

    /// Asks `node` for an answer.
    ///
    /// # Errors
    ///
    /// The node is not reachable, does not answer before `deadline`, or as the service says.
    pub async fn call<T: DeserializeOwned>(
        &self,
        node: NodeId,
        name: &str,
        request: &(impl Serialize + Sync),
        deadline: Duration,
    ) -> anyhow::Result<T> {
        let request = serde_json::to_value(request)?;
        let asked = async {
            if self.is_me(node) {
                return match self.serve(name, request).await? {
                    Reply::Answer(answer) => Ok(answer),
                    _ => Err(anyhow!("\"{name}\" does not answer that with a value")),
                };
            }
            let session = self.dial(node).await?;
            let text = session.ask(call(name, &request), deadline).await.map_err(|error| told(node, error))?;
            Ok(serde_json::from_str(&text)?)
        };
        let answer = tokio::time::timeout(deadline, asked).await;
        let answer =
            answer.map_err(|_| late(node, deadline))?.with_context(|| format!("ask node {node} for {name}"))?;
        serde_json::from_value(answer).with_context(|| format!("read what node {node} answered to {name}"))
    }

    /// Asks `node` for bytes.
    ///
    /// # Errors
    ///
    /// As [`Peers::call`]; the bytes themselves may end in an error, too.
    pub async fn download(
        &self,
        node: NodeId,
        name: &str,
        request: &(impl Serialize + Sync),
        deadline: Duration,
    ) -> anyhow::Result<ByteStream> {
        let request = serde_json::to_value(request)?;
        let asked = async {
            if self.is_me(node) {
                return match self.serve(name, request).await? {
                    Reply::Download(stream) => Ok(stream),
                    _ => Err(anyhow!("\"{name}\" does not answer that with bytes")),
                };
            }
            let session = self.dial(node).await?;
            let stream = session.copy_out(&call(name, &request).to_string()).await;
            let stream = stream.map_err(|error| told(node, error.into()))?;
            // The session lives as long as its stream.
            let held = stream.map(move |bytes| {
                let _session = &session;
                bytes.map_err(|error| told(node, error.into()))
            });
            Ok(Box::pin(held) as ByteStream)
        };
        let stream = tokio::time::timeout(deadline, asked).await.map_err(|_| late(node, deadline))?;
        stream.with_context(|| format!("ask node {node} for {name}"))
    }

    /// Offers bytes to `node`.
    ///
    /// # Errors
    ///
    /// As [`Peers::call`].
    pub async fn upload(
        &self,
        node: NodeId,
        name: &str,
        request: &(impl Serialize + Sync),
        deadline: Duration,
    ) -> anyhow::Result<Box<dyn Upload>> {
        let request = serde_json::to_value(request)?;
        let asked = async {
            if self.is_me(node) {
                return match self.serve(name, request).await? {
                    Reply::Upload(upload) => Ok(upload),
                    _ => Err(anyhow!("\"{name}\" does not take bytes for that")),
                };
            }
            let session = self.dial(node).await?;
            let sink = session.copy_in(&call(name, &request).to_string()).await;
            let sink = sink.map_err(|error| told(node, error.into()))?;
            Ok(Box::new(RemoteUpload { node, sink: Box::pin(sink), _session: session }) as Box<dyn Upload>)
        };
        let upload = tokio::time::timeout(deadline, asked).await.map_err(|_| late(node, deadline))?;
        upload.with_context(|| format!("ask node {node} for {name}"))
    }

    fn offered(&self, name: &str) -> Option<Arc<dyn Service>> {
        self.0.services.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn is_me(&self, node: NodeId) -> bool {
        self.0.cluster.me().node_id == Some(node)
    }

    async fn dial(&self, node: NodeId) -> anyhow::Result<PeerSession> {
        let view = self.0.cluster.view();
        let known = view.node(node).ok_or_else(|| unreachable(node, "This node does not know where it is."))?;
        let dialed = self.0.dialer.dial(&known.info.address, &Purpose::Verbs).await;
        dialed.map_err(|error| match PgError::of(&error) {
            Some(_) => error,
            None => {
                tracing::info!("{error:#}");
                unreachable(node, "The connection could not be opened.").into()
            }
        })
    }
}

struct RemoteUpload {
    node: NodeId,
    sink: Pin<Box<CopyInSink<Bytes>>>,
    _session: PeerSession,
}

impl Upload for RemoteUpload {
    fn write(&mut self, mut bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            while !bytes.is_empty() {
                let piece = bytes.split_to(bytes.len().min(PIECE_MAX));
                self.sink.send(piece).await.map_err(|error| told(self.node, error.into()))?;
            }
            Ok(())
        })
    }

    fn finish(mut self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            self.sink.as_mut().finish().await.map_err(|error| told(self.node, error.into()))?;
            Ok(())
        })
    }
}

fn call(name: &str, request: &Value) -> Verb {
    Verb::Call { service: name.to_owned(), request: request.to_string() }
}

fn late(node: NodeId, deadline: Duration) -> PgError {
    unreachable(node, &format!("It did not answer within {} seconds.", deadline.as_secs_f32()))
}

fn unreachable(node: NodeId, detail: &str) -> PgError {
    PgError::new(SqlState::CONNECTION_FAILURE, format!("node {node} cannot be reached")).detail(detail)
}

/// What a node said over the wire, as the error that it was there; a connection that broke is an error of its own.
fn told(node: NodeId, error: anyhow::Error) -> anyhow::Error {
    let Some(cause) = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>()) else {
        return error;
    };
    let Some(said) = cause.as_db_error() else {
        tracing::info!("node {node} was lost: {cause}");
        return unreachable(node, "The connection was lost.").into();
    };
    let Some(code) = SqlState::parse(said.code().code()) else { return error };
    let mut spoken = PgError::new(code, said.message());
    spoken.detail = said.detail().map(str::to_owned);
    spoken.hint = said.hint().map(str::to_owned);
    spoken.into()
}
