//! The port.
//!
//! Everything arrives here: clients of PostgreSQL, clients of ours, other nodes, cancel requests. A connection is read
//! in this order: its first packets ([`startup`]); then, for a peer, [`peer`]; for anybody else a server is chosen
//! ([`route`]) and the session relayed ([`session`]), with every frame of the client judged in [`client_frames`] and
//! every frame of the server noted in [`server_frames`]; what is ours is done in [`run`], as part of the client's
//! transaction where it stands in one ([`transactions`]), after the client's own session
//! has been asked what only it knows ([`asking`]), and answered from [`local`] and [`answer`]. A text of PostgreSQL's with
//! a SHOW of ours as a row source goes on with rows in its place ([`rows`]), and a text of several statements goes on one by
//! one ([`script`]). In which words all this is told is the client's to choose ([`speech`]).
//!
//! **The relay is faithful.** Frames pass byte for byte. PostgreSQL authenticates its own clients through it; no
//! password is kept and no user list exists. A frame is looked at only where it may be ours: the text of Query and
//! Parse, and the names in Bind, Describe, Execute and Close.
//!
//! **Ours stands in line.** A statement of ours is answered after everything that was asked before it and before
//! everything that was asked after it, in pipelines too, and its failure fails the client's transaction ([`pipeline`]).
//!
//! **A hop.** A gateway whose shard is led elsewhere opens a connection to the leading node's port, says what it takes
//! that node for, and relays there; the leading node only checks that it is what it is taken for and copies bytes.

mod answer;
mod asking;
mod bound;
mod calls;
mod cancel;
mod client_frames;
mod collections;
mod control;
mod external;
mod frame;
mod inbound;
mod local;
mod peer;
mod pipeline;
mod plans;
mod progress;
mod requests;
mod route;
mod rows;
mod run;
mod script;
mod server_frames;
mod session;
mod settings;
mod show;
mod speech;
mod startup;
pub mod tls;
mod transactions;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use backup::Backups;
use bytes::{Bytes, BytesMut};
use cluster::registry::Registry;
use cluster::secret::ClusterSecret;
use cluster::socket::{self, Socket};
use cluster::{Cluster, PEER_OPTION, Peers};
use fleet::Server;
use fleet::probe::Door;
use pgerror::{PgError, SqlState};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use answer::Writer;
use cancel::{CancelKeys, Cancelable};
use route::Route;
use session::{Follows, Session};
use startup::{Hop, Packet, Startup, read_packet};

/// A client that has not sent its startup packet by then is sent away; PostgreSQL's `authentication_timeout`.
const STARTUP_DEADLINE: Duration = Duration::from_secs(60);

/// What a hop holds in each direction at most, in bytes.
const HOP_BUFFER: usize = 128 * 1024;

/// How long open sessions may take to hear that the node stops.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// The PostgreSQL server beside this node, as the gateway needs it.
pub struct OwnServer {
    /// Where it is.
    pub server: Server,
    /// Whether clients may be relayed to it.
    pub door: watch::Receiver<Door>,
}

/// What a gateway works with.
pub struct Parts {
    /// The view of all nodes.
    pub cluster: Cluster,
    /// The registry.
    pub registry: Registry,
    /// The server beside this node, if any.
    pub server: Option<OwnServer>,
    /// What nodes do for each other.
    pub peers: Peers,
    /// What BACKUP does, and the jobs it makes.
    pub backups: Backups,
    /// What makes a connection a peer.
    pub secret: ClusterSecret,
    /// TLS towards clients and nodes.
    pub tls: tls::Tls,
    /// Cancelled when the node stops.
    pub shutdown: CancellationToken,
}

struct Shared {
    parts: Parts,
    /// The keys of its sessions.
    cancel_keys: CancelKeys,
}

/// The front of a node; clones share everything.
#[derive(Clone)]
pub struct Gateway(Arc<Shared>);

impl Deref for Gateway {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0.parts
    }
}

impl Gateway {
    /// Puts a gateway together.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(Shared { parts, cancel_keys: CancelKeys::default() }))
    }

    /// Takes connections until the node stops, then tells the open ones and waits for them a little.
    pub async fn serve(self, listener: TcpListener) {
        let sessions = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.shutdown.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => drop(sessions.spawn(self.clone().attend(stream))),
                Err(error) => {
                    // Out of file descriptors, most likely; sessions that end will free some.
                    tracing::warn!("could not take a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        sessions.close();
        if timeout(SHUTDOWN_DEADLINE, sessions.wait()).await.is_err() {
            tracing::warn!(left = sessions.len(), "sessions were still open when the node stopped");
        }
    }

    fn cancel_keys(&self) -> &CancelKeys {
        &self.0.cancel_keys
    }

    async fn attend(self, stream: TcpStream) {
        if socket::prepare(&stream).is_err() {
            return;
        }
        match timeout(STARTUP_DEADLINE, self.greet(stream)).await {
            Err(_) | Ok(Ok(None)) => {}
            Ok(Ok(Some((socket, Packet::Startup(startup))))) => self.start(socket, startup).await,
            Ok(Ok(Some((_, Packet::Cancel(key))))) => self.cancel(&key).await,
            Ok(Ok(Some((socket, Packet::Hop(hop))))) => self.receive(socket, &hop).await,
            Ok(Ok(Some((_, Packet::Tls | Packet::Gss)))) => {}
            Ok(Err((socket, error))) => refuse(socket, &error).await,
        }
    }

    /// Reads a connection's first packets, through TLS if the client asks for it.
    async fn greet(&self, stream: TcpStream) -> Result<Option<(Socket, Packet)>, (Socket, anyhow::Error)> {
        let mut plain = stream;
        loop {
            let packet = match read_packet(&mut plain).await {
                Ok(Some(packet)) => packet,
                Ok(None) => return Ok(None),
                Err(error) => return Err((Box::new(plain), error)),
            };
            let tls = self.tls.to_clients.as_ref().filter(|_| matches!(packet, Packet::Tls));
            let answer = match (&packet, tls) {
                (Packet::Tls, Some(_)) => b"S",
                (Packet::Tls | Packet::Gss, _) => b"N",
                _ => return Ok(Some((Box::new(plain), packet))),
            };
            // PostgreSQL's rule and words, since CVE-2021-23214.
            let mut early = [0];
            if matches!(plain.try_read(&mut early), Ok(read) if read > 0) {
                let error = PgError::new(SqlState::PROTOCOL_VIOLATION, "received unencrypted data after SSL request")
                    .detail("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.");
                return Err((Box::new(plain), error.into()));
            }
            if plain.write_all(answer).await.is_err() {
                return Ok(None);
            }
            if let Some(acceptor) = tls {
                return greet_inside_tls(acceptor, plain).await;
            }
        }
    }

    async fn start(self, socket: Socket, startup: Startup) {
        if let Some(purpose) = startup.setting(PEER_OPTION) {
            return self.serve_peer(socket, &startup, &purpose).await;
        }
        let opened = async {
            let chosen = route::choose(&self.cluster, &startup).await?;
            self.keep_from_itself(&startup, &chosen.route)?;
            let mut server = self.open(&chosen.route).await?;
            server.write_all(&startup.raw).await?;
            anyhow::Ok((chosen, server))
        };
        match opened.await {
            Err(error) => refuse(socket, &error).await,
            Ok((chosen, server)) => {
                let shard = self.cluster.me().shard;
                let follows = chosen.follows.map(|instance| Follows { shard, instance });
                let intercepts = !startup.wants_replication();
                let session = Session::new(self, Cancelable::new(chosen.route), intercepts);
                session.relay(socket, server, follows).await;
            }
        }
    }

    /// A standby that streams through the port must not be given its own server to follow.
    fn keep_from_itself(&self, startup: &Startup, route: &Route) -> Result<(), PgError> {
        let me = self.cluster.me();
        let standby = me.server_state().is_some_and(|server| server.in_recovery);
        let streams = startup.parameter("application_name").is_some_and(|name| {
            let upstream = me.server_state().and_then(|server| server.upstream.as_ref());
            upstream.is_some_and(|upstream| upstream.application_name == name)
        });
        if startup.wants_physical_replication() && standby && streams && matches!(route, Route::Own) {
            let message = format!("the standby beside {} cannot follow itself", me.name());
            return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
                .hint(format!("Leave {}=local out of the standby's primary_conninfo.", route::TARGET)));
        }
        Ok(())
    }

    /// Another node passes a client on to the server beside this one.
    async fn receive(self, mut socket: Socket, hop: &Hop) {
        let opened = async {
            let packet = timeout(STARTUP_DEADLINE, read_packet(&mut socket)).await??;
            let raw = match packet {
                Some(Packet::Startup(startup)) => startup.raw,
                Some(Packet::Cancel(key)) => {
                    self.cancel_on(&Route::Own, &key).await;
                    return Ok(None);
                }
                _ => return Ok(None),
            };
            route::check_hop(&self.cluster, hop)?;
            let mut server = self.open(&Route::Own).await?;
            server.write_all(&raw).await?;
            anyhow::Ok(Some(server))
        };
        match opened.await {
            Err(error) => refuse(socket, &error).await,
            Ok(None) => {}
            Ok(Some(mut server)) => {
                let follows = Follows { shard: hop.shard.clone(), instance: self.cluster.me().instance };
                let mut views = self.cluster.subscribe();
                views.mark_changed();
                tokio::select! {
                    // Either side's end is the end; the sending gateway finds the words for its client.
                    _ = copy_bidirectional_with_sizes(&mut socket, &mut server, HOP_BUFFER, HOP_BUFFER) => {}
                    () = session::moved(&mut views, Some(&follows)) => {}
                    () = self.shutdown.cancelled() => {}
                }
            }
        }
    }

    /// A cancel request: the key decides whether it is for a statement of ours or for a server.
    async fn cancel(&self, key: &Bytes) {
        match self.cancel_keys().find(key) {
            Some(session) if session.cancel() => {}
            Some(session) => self.cancel_on(&session.route, key).await,
            // As PostgreSQL: nobody is told that a key is unknown.
            None => {}
        }
    }

    /// Passes a cancel request on, and returns when the server has taken it.
    async fn cancel_on(&self, route: &Route, key: &Bytes) {
        let asked = async {
            let mut server = self.open(route).await?;
            let mut packet = BytesMut::new();
            packet.extend_from_slice(&u32::try_from(8 + key.len())?.to_be_bytes());
            packet.extend_from_slice(&80_877_102_u32.to_be_bytes());
            packet.extend_from_slice(key);
            server.write_all(&packet).await?;
            // The server closes the connection once the signal is sent.
            let mut nothing = Vec::new();
            server.read_to_end(&mut nothing).await?;
            anyhow::Ok(())
        };
        if let Err(error) = asked.await {
            tracing::info!("cancel request was not passed on: {error:#}");
        }
    }
}

async fn greet_inside_tls(
    acceptor: &TlsAcceptor,
    plain: TcpStream,
) -> Result<Option<(Socket, Packet)>, (Socket, anyhow::Error)> {
    let mut stream = match acceptor.accept(plain).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!("TLS handshake: {error}");
            return Ok(None);
        }
    };
    loop {
        match read_packet(&mut stream).await {
            Ok(None) => return Ok(None),
            Ok(Some(Packet::Gss)) => {
                if stream.write_all(b"N").await.is_err() {
                    return Ok(None);
                }
            }
            Ok(Some(packet)) => return Ok(Some((Box::new(stream), packet))),
            Err(error) => return Err((Box::new(stream), error)),
        }
    }
}

/// Ends a connection that has not become a session, with a reason.
async fn refuse(mut socket: Socket, error: &anyhow::Error) {
    let mut said = BytesMut::new();
    if error.downcast_ref::<std::io::Error>().is_some() {
        return;
    }
    Writer(&mut said).fatal(&answer::spoken(error));
    // Who has left does not hear it.
    if socket.write_all(&said).await.is_ok() {
        let _ = socket.shutdown().await;
    }
}
