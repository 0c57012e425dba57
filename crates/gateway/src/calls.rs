//! Serving a peer's calls that carry bytes: PostgreSQL's COPY in the extended protocol, as tokio-postgres speaks it.
//!
//! A peer session asks for one thing at a time. Short questions are simple queries (`peer.rs`); a call whose answer or
//! argument is a stream is prepared, bound and executed, and the stream travels as CopyData. Backpressure is the
//! socket's. When the peer goes away in the middle, what produces its bytes is dropped, which cancels it.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use cluster::service::{ByteStream, PIECE_MAX, Reply, Upload};
use cluster::socket::Socket;
use futures_util::StreamExt as _;
use pgerror::{PgError, SqlState};
use sql::Verb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::Gateway;
use crate::answer::{Writer, spoken};
use crate::frame::cut_string;
use crate::peer::{AHEAD_MAX, frame};
use crate::pipeline::Transaction;

/// A peer that takes nothing, or gives nothing, for so long is gone: what it holds here others wait for.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// The part of a peer session that belongs to calls.
#[derive(Default)]
pub(crate) struct Calls {
    /// What was parsed last.
    prepared: Option<(String, String)>,
    /// A message has failed, and what follows does not count up to the next Sync.
    skipping: bool,
}

impl Calls {
    /// Takes a frame of the extended protocol. Answers gather in `out`, which the caller sends.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the peer breaks the protocol.
    pub(crate) async fn take(
        &mut self,
        gateway: &Gateway,
        tag: u8,
        body: &Bytes,
        wire: &mut Wire<'_>,
    ) -> anyhow::Result<()> {
        if tag == b'S' {
            self.skipping = false;
            Writer(&mut wire.out).ready(Transaction::Idle);
            return Ok(());
        }
        if self.skipping {
            return Ok(());
        }
        let mut out = Writer(&mut wire.out);
        match tag {
            b'P' => match prepare(body) {
                Some(prepared) => {
                    self.prepared = Some(prepared);
                    out.parse_complete();
                }
                None => self.fail(&unknown().into(), wire),
            },
            b'D' => {
                out.parameter_description(&[]);
                out.no_data();
            }
            b'B' => out.bind_complete(),
            b'C' => out.close_complete(),
            b'E' => {
                let (service, request) = self.prepared.clone().context("execute a call that was prepared")?;
                if let Err(error) = execute(gateway, &service, &request, wire).await {
                    if error.downcast_ref::<std::io::Error>().is_some() {
                        return Err(error);
                    }
                    self.fail(&error, wire);
                }
            }
            b'H' | b'd' | b'c' | b'f' => {}
            other => bail!("unexpected message \"{}\" on a peer session", other.escape_ascii()),
        }
        Ok(())
    }

    fn fail(&mut self, error: &anyhow::Error, wire: &mut Wire<'_>) {
        self.skipping = true;
        Writer(&mut wire.out).error(&spoken(error));
    }
}

/// Both directions of a peer session.
pub(crate) struct Wire<'s> {
    pub(crate) socket: &'s mut Socket,
    pub(crate) received: BytesMut,
    pub(crate) out: BytesMut,
}

impl Wire<'_> {
    pub(crate) async fn send(&mut self) -> std::io::Result<()> {
        self.socket.write_all_buf(&mut self.out).await?;
        self.socket.flush().await
    }
}

fn prepare(body: &Bytes) -> Option<(String, String)> {
    let mut rest = &body[..];
    let _name = cut_string(&mut rest)?;
    match std::str::from_utf8(cut_string(&mut rest)?).ok()?.parse() {
        Ok(Verb::Call { service, request }) => Some((service, request)),
        _ => None,
    }
}

/// A verb that this node does not have.
pub(crate) fn unknown() -> PgError {
    let message = "this node does not know that verb; it may be of another version";
    PgError::new(SqlState::FEATURE_NOT_SUPPORTED, message)
}

async fn execute(gateway: &Gateway, service: &str, request: &str, wire: &mut Wire<'_>) -> anyhow::Result<()> {
    let request = serde_json::from_str(request).context("read a peer's request")?;
    match gateway.peers.serve(service, request).await? {
        Reply::Download(stream) => download(stream, wire).await,
        Reply::Upload(upload) => receive(upload, wire).await,
        Reply::Answer(_) => bail!("a peer asked \"{service}\" for bytes where there are none"),
    }
}

async fn download(mut stream: ByteStream, wire: &mut Wire<'_>) -> anyhow::Result<()> {
    Writer(&mut wire.out).copy_out_response();
    wire.send().await?;
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            // The peer says no more than its Sync until the stream ends; that it has gone away is read here, too.
            read = wire.socket.read_buf(&mut wire.received), if wire.received.len() < AHEAD_MAX => {
                if read? == 0 {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
                continue;
            }
        };
        let Some(bytes) = next else { break };
        let mut bytes = bytes?;
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_MAX));
            Writer(&mut wire.out).copy_data(&piece);
            timeout(STALL_DEADLINE, wire.send()).await.map_err(std::io::Error::from)??;
        }
    }
    let mut out = Writer(&mut wire.out);
    out.copy_done();
    out.command_complete("COPY 0");
    Ok(())
}

async fn receive(mut upload: Box<dyn Upload>, wire: &mut Wire<'_>) -> anyhow::Result<()> {
    Writer(&mut wire.out).copy_in_response();
    wire.send().await?;
    loop {
        let next = timeout(STALL_DEADLINE, frame(wire.socket, &mut wire.received, AHEAD_MAX)).await;
        match next.map_err(std::io::Error::from)?? {
            Some((b'd', bytes)) => upload.write(bytes).await?,
            Some((b'c', _)) => break,
            // As PostgreSQL does while it reads COPY data.
            Some((b'S' | b'H', _)) => {}
            Some((b'f', _)) => bail!("a peer gave its upload up"),
            Some((other, _)) => bail!("unexpected message \"{}\" in an upload", other.escape_ascii()),
            None => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        }
    }
    upload.finish().await?;
    Writer(&mut wire.out).command_complete("COPY 0");
    Ok(())
}
