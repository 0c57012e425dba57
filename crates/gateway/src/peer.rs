//! Serving other nodes: proving that they are, answering verbs, lending sessions.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use cluster::service::Reply;
use cluster::socket::Socket;
use pgerror::{PgError, SqlState};
use pgwire::api::auth::sasl::scram::{SCRAM_ITERATIONS, ScramSecret, ScramServerAuth, gen_salted_password};
use pgwire::messages::startup::Authentication;
use sql::Verb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use uuid::Uuid;

use crate::answer::{Column, Format, Kind, Value, Writer, spoken};
use crate::calls::{Calls, Wire, unknown};
use crate::cancel::Cancelable;
use crate::frame::{cut_i32, cut_string, header};
use crate::pipeline::Transaction;
use crate::route::Route;
use crate::session::Session;
use crate::startup::Startup;
use crate::{Gateway, refuse, show};

/// A peer that has not proven itself by then is sent away.
const PROOF_DEADLINE: Duration = Duration::from_secs(10);

/// A proof is short; a longer frame is not from a peer.
const PROOF_MAX: usize = 64 * 1024;

/// A request of a proven peer may carry the plan of a database with many thousand tables; a longer one is refused.
pub(crate) const FRAME_MAX: usize = 256 * 1024 * 1024;

/// What a peer sends while it waits is kept up to this; then it is read no further.
pub(crate) const AHEAD_MAX: usize = 1024 * 1024;

/// The one column of a verb's answer.
const ANSWER: [Column; 1] = [Column { name: "answer", kind: Kind::Text }];

impl Gateway {
    /// Serves a connection that claims to be a peer's.
    pub(crate) async fn serve_peer(self, mut socket: Socket, startup: &Startup, purpose: &str) {
        let mut received = BytesMut::new();
        let proven = timeout(PROOF_DEADLINE, self.prove(&mut socket, &mut received)).await;
        let served = match proven {
            Err(_) => return,
            Ok(Err(error)) => Err(error),
            Ok(Ok(())) => match purpose {
                "verbs" => self.answer_verbs(&mut socket, received).await,
                "server" => return self.lend(socket, startup).await,
                other => Err(anyhow::anyhow!("unknown purpose of a peer session: {other}")),
            },
        };
        if let Err(error) = served {
            refuse(socket, &error).await;
        }
    }

    /// SCRAM-SHA-256 with the cluster secret; in an insecure fleet everybody is let in.
    async fn prove(&self, socket: &mut Socket, received: &mut BytesMut) -> anyhow::Result<()> {
        let secret = self.secret.read().map_err(|error| {
            tracing::warn!("a peer was refused: {error:#}");
            PgError::new(SqlState::INVALID_AUTHORIZATION, "this node has no cluster secret yet")
                .hint("Copy the secret file that \"backhaul init\" made to the node's host.")
        })?;
        let mut out = BytesMut::new();
        if let Some(secret) = secret {
            let salt: [u8; 16] = Uuid::new_v4().into_bytes();
            let salted_password = gen_salted_password(&secret, &salt, SCRAM_ITERATIONS);
            let verifier = ScramSecret::SaltedPassword { salt: salt.to_vec(), salted_password };
            Writer(&mut out).authentication(&Authentication::SASL(vec!["SCRAM-SHA-256".to_owned()]));
            socket.write_all_buf(&mut out).await?;

            let first = proof(socket, received).await?;
            let data = first_scram_message(&first).context("read the first SCRAM message")?;
            let scram = ScramServerAuth::new();
            let (server_first, scram) =
                scram.on_client_first_message_with_secret(data, verifier).map_err(|_| wrong_secret())?;
            Writer(&mut out).authentication(&Authentication::SASLContinue(server_first.into()));
            socket.write_all_buf(&mut out).await?;

            let last = proof(socket, received).await?;
            let server_final = scram.on_client_final_message(&last).map_err(|_| wrong_secret())?;
            Writer(&mut out).authentication(&Authentication::SASLFinal(server_final.into()));
        }
        Writer(&mut out).authentication(&Authentication::Ok);
        socket.write_all_buf(&mut out).await?;
        Ok(())
    }

    async fn answer_verbs(&self, socket: &mut Socket, received: BytesMut) -> anyhow::Result<()> {
        let mut wire = Wire { socket, received, out: BytesMut::new() };
        let mut calls = Calls::default();
        Writer(&mut wire.out).ready(Transaction::Idle);
        loop {
            wire.send().await?;
            let next = tokio::select! {
                next = frame(wire.socket, &mut wire.received, FRAME_MAX) => next?,
                () = self.shutdown.cancelled() => return Ok(()),
            };
            let Some((tag, body)) = next else { return Ok(()) };
            match tag {
                b'X' => return Ok(()),
                b'Q' => {
                    let verb = cut_string(&mut &body[..]).and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
                    let answer = match verb {
                        Some(verb) => tokio::select! {
                            answer = self.answer_verb(verb) => answer,
                            // Nobody waits for it any more: what works on it is dropped.
                            () = gone(wire.socket, &mut wire.received) => return Ok(()),
                            () = self.shutdown.cancelled() => return Ok(()),
                        },
                        None => Err(unknown().into()),
                    };
                    let mut out = Writer(&mut wire.out);
                    match answer {
                        Ok(text) => {
                            out.row_description(&ANSWER, |_| Format::Text);
                            out.row(&[Value::Text(Some(text))], |_| Format::Text);
                            out.command_complete("SELECT 1");
                        }
                        Err(error) => out.error(&spoken(&error)),
                    }
                    out.ready(Transaction::Idle);
                }
                tag => tokio::select! {
                    taken = calls.take(self, tag, &body, &mut wire) => taken?,
                    () = self.shutdown.cancelled() => return Ok(()),
                },
            }
        }
    }

    async fn answer_verb(&self, verb: Verb) -> anyhow::Result<String> {
        match verb {
            Verb::WhoAreYou { since } => Ok(serde_json::to_string(&self.cluster.who_am_i(since).await)?),
            Verb::Call { service, request } => {
                let request = serde_json::from_str(&request).context("read a peer's request")?;
                match self.peers.serve(&service, request).await? {
                    Reply::Answer(answer) => Ok(answer.to_string()),
                    Reply::Download(_) | Reply::Upload(_) => {
                        bail!("a peer asked \"{service}\" for a value where there is none")
                    }
                }
            }
            Verb::Nodes => {
                let answer = show::nodes(&self.cluster, &self.registry).await;
                let words = |notice: &PgError| match &notice.detail {
                    Some(detail) => format!("{}: {detail}", notice.message),
                    None => notice.message.clone(),
                };
                let notices: Vec<String> = answer.notices.iter().map(words).collect();
                Ok(serde_json::to_string(&serde_json::json!({
                    "columns": show::node_columns(),
                    "rows": show::as_text(&answer.rows),
                    "notices": notices,
                }))?)
            }
        }
    }

    /// Lends a session on the own server: the login is this node's, everything behind it the peer's.
    async fn lend(self, socket: Socket, startup: &Startup) {
        let database = startup.parameter("database").unwrap_or("postgres");
        let name = startup.parameter("application_name").unwrap_or("backhaul");
        let opened = async {
            let own = self.server.as_ref().context("lend a session on a server that this node does not have")?;
            fleet::login::login(&own.server, database, name).await
        };
        match opened.await {
            Err(error) => refuse(socket, &error).await,
            Ok(logged_in) => {
                let cancelable = Cancelable::new(Route::Own);
                let mut session = Session::new(self, cancelable, false);
                session.from_server.bytes = logged_in.received;
                session.relay(socket, logged_in.socket, None).await;
            }
        }
    }
}

fn wrong_secret() -> PgError {
    PgError::new(SqlState::INVALID_PASSWORD, "the cluster secret does not match")
        .hint("All nodes of a fleet need the same secret file.")
}

/// SASLInitialResponse: the mechanism, a length, and the message. Read here and not by pgwire, which panics when it is
/// cut short.
fn first_scram_message(mut body: &[u8]) -> Option<&[u8]> {
    let mechanism = cut_string(&mut body)?;
    let length = usize::try_from(cut_i32(&mut body)?).ok()?;
    (mechanism == b"SCRAM-SHA-256" && length == body.len()).then_some(body)
}

async fn proof(socket: &mut Socket, received: &mut BytesMut) -> anyhow::Result<Bytes> {
    match frame(socket, received, PROOF_MAX).await? {
        Some((b'p', body)) => Ok(body),
        Some(_) => bail!("a peer sent something other than its proof"),
        // The peer tried a password that it does not have, most likely: it is told when it comes back.
        None => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
    }
}

/// Returns when the peer has closed its side. What it sends meanwhile stays for later.
async fn gone(socket: &mut Socket, received: &mut BytesMut) {
    while received.len() < AHEAD_MAX {
        if !matches!(socket.read_buf(received).await, Ok(read) if read > 0) {
            return;
        }
    }
    std::future::pending().await
}

/// Reads one whole frame of at most `limit` bytes: its tag and its body.
pub(crate) async fn frame(
    socket: &mut Socket,
    received: &mut BytesMut,
    limit: usize,
) -> anyhow::Result<Option<(u8, Bytes)>> {
    loop {
        if let Some(found) = header(received)? {
            if found.len > limit {
                bail!("a frame of {} bytes on a peer session", found.len);
            }
            if received.len() >= found.len {
                let mut frame = received.split_to(found.len).freeze();
                frame.advance(5);
                return Ok(Some((found.tag, frame)));
            }
        }
        if socket.read_buf(received).await? == 0 {
            return Ok(None);
        }
    }
}
