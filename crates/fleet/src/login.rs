//! A login at protocol level, whose socket can be handed on.
//!
//! tokio-postgres keeps its sockets to itself. A node that lends a session to another node needs the bare one behind a
//! finished authentication, and the open-door check needs to see what a server asks for before anybody is let in.

use std::io;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::BytesMut;
use cluster::socket::Socket;
use pgerror::{PgError, SqlState};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_postgres::fallible_iterator::FallibleIterator as _;

use crate::Server;

/// What a lent session finds first, whatever a database's owner has said for it: their operators and types would run with
/// the service role's rights.
const OWN_PATH: &str = "-c search_path=pg_catalog";

/// A login that takes longer is given up.
const LOGIN_DEADLINE: Duration = Duration::from_secs(10);

/// An authenticated connection.
pub struct LoggedIn {
    /// The connection, just behind AuthenticationOk.
    pub socket: Socket,
    /// What the server has already sent after that.
    pub received: BytesMut,
}

/// What a server answers to a startup packet.
pub(crate) enum FirstAnswer {
    /// It lets the client in as it is.
    LetIn,
    /// It asks for a proof, or has no rule that would let this client in.
    Guarded,
    /// It refuses for a reason that says nothing about proofs: it is starting, say, or full.
    NotNow(PgError),
}

/// Logs into `database` as the service role, presenting itself as `application_name`.
///
/// # Errors
///
/// The server is not there, refuses (its own words and SQLSTATE, as a [`PgError`]), or asks for a kind of proof other
/// than a password.
pub async fn login(server: &Server, database: &str, application_name: &str) -> anyhow::Result<LoggedIn> {
    let options = format!("{} {OWN_PATH}", server.options());
    let parameters = [
        ("user", server.user()),
        ("database", database),
        ("application_name", application_name),
        ("client_encoding", "UTF8"),
        ("options", &options),
    ];
    let steps = async {
        let mut login = Login::open(server, &parameters).await?;
        login.authenticate(server).await?;
        Ok(LoggedIn { socket: login.socket, received: login.received })
    };
    timeout(LOGIN_DEADLINE, steps)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the server did not finish the login in time"))?
}

/// Presents a startup packet without ever answering a demand for a proof.
pub(crate) async fn knock(server: &Server, parameters: &[(&str, &str)]) -> anyhow::Result<FirstAnswer> {
    let steps = async {
        let mut login = Login::open(server, parameters).await?;
        Ok(match login.next().await? {
            Message::AuthenticationOk => FirstAnswer::LetIn,
            Message::ErrorResponse(body) => match said(&body) {
                refused if refused.code.as_str().starts_with("28") => FirstAnswer::Guarded,
                other => FirstAnswer::NotNow(other),
            },
            _ => FirstAnswer::Guarded,
        })
    };
    timeout(LOGIN_DEADLINE, steps).await.map_err(|_| anyhow!("the server did not answer in time"))?
}

struct Login {
    socket: Socket,
    received: BytesMut,
}

impl Login {
    async fn open(server: &Server, parameters: &[(&str, &str)]) -> anyhow::Result<Self> {
        let socket = server.connect().await.context("connect to the server")?;
        let mut login = Self { socket, received: BytesMut::new() };
        let mut packet = BytesMut::new();
        frontend::startup_message(parameters.iter().copied(), &mut packet)?;
        login.socket.write_all(&packet).await?;
        Ok(login)
    }

    async fn next(&mut self) -> anyhow::Result<Message> {
        loop {
            if let Some(message) = Message::parse(&mut self.received)? {
                return Ok(message);
            }
            if self.socket.read_buf(&mut self.received).await? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection").into());
            }
        }
    }

    async fn authenticate(&mut self, server: &Server) -> anyhow::Result<()> {
        let password = || server.password().context("the server asks for a password and none was given");
        loop {
            let mut reply = BytesMut::new();
            match self.next().await? {
                Message::AuthenticationOk => return Ok(()),
                Message::AuthenticationCleartextPassword => frontend::password_message(password()?, &mut reply)?,
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(server.user().as_bytes(), password()?, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut reply)?;
                }
                Message::AuthenticationSasl(_) => {
                    self.scram(password()?).await?;
                    continue;
                }
                Message::ErrorResponse(body) => return Err(said(&body).into()),
                _ => bail!("the server asks for a proof other than a password"),
            }
            self.socket.write_all(&reply).await?;
        }
    }

    async fn scram(&mut self, password: &[u8]) -> anyhow::Result<()> {
        // No channel binding: the last hop is without TLS, on one host.
        let mut scram = ScramSha256::new(password, ChannelBinding::unsupported());
        let mut reply = BytesMut::new();
        frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut reply)?;
        self.socket.write_all(&reply).await?;
        loop {
            match self.next().await? {
                Message::AuthenticationSaslContinue(body) => {
                    scram.update(body.data())?;
                    let mut reply = BytesMut::new();
                    frontend::sasl_response(scram.message(), &mut reply)?;
                    self.socket.write_all(&reply).await?;
                }
                Message::AuthenticationSaslFinal(body) => return Ok(scram.finish(body.data())?),
                Message::ErrorResponse(body) => return Err(said(&body).into()),
                _ => bail!("the server broke off the SCRAM exchange"),
            }
        }
    }
}

/// A server's error in its own words.
fn said(body: &ErrorResponseBody) -> PgError {
    let mut error = PgError::new(SqlState::INTERNAL_ERROR, "");
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => error.code = SqlState::parse(&value).unwrap_or(error.code),
            b'M' => error.message = value,
            b'D' => error.detail = Some(value),
            b'H' => error.hint = Some(value),
            _ => {}
        }
    }
    error
}
