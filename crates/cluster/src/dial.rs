//! Opening peer sessions: PostgreSQL connections to another node's port.

use std::future::poll_fn;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use pgerror::{PgError, SqlState};
use sql::Verb;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, SimpleQueryMessage};
use tokio_util::task::AbortOnDropHandle;

use crate::secret::ClusterSecret;
use crate::socket::connect;
use crate::wary::Wary;

/// The user name of every peer session; no PostgreSQL role of this name is ever asked for.
pub const PEER_USER: &str = "backhaul_node";

/// The startup option that makes a connection a peer session; its value is the [`Purpose`].
pub const PEER_OPTION: &str = "backhaul.peer";

/// An address that does not answer within this time counts as unreachable.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);

/// What a peer session is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Asking verbs.
    Verbs,
    /// A session on the callee's own PostgreSQL server, in this database, as the callee's service role.
    Server {
        /// The database to log into.
        database: String,
    },
}

impl Purpose {
    /// The value of [`PEER_OPTION`].
    pub fn option(&self) -> &'static str {
        match self {
            Self::Verbs => "verbs",
            Self::Server { .. } => "server",
        }
    }
}

/// Opens peer sessions with this node's secret.
#[derive(Clone)]
pub struct Dialer {
    secret: ClusterSecret,
    tls: Option<Arc<rustls::ClientConfig>>,
    name: String,
}

/// A peer session; dropping it closes the connection.
pub struct PeerSession {
    client: Client,
    notifications: watch::Receiver<u64>,
    _connection: AbortOnDropHandle<()>,
}

impl Dialer {
    /// Connections will carry `name` as their `application_name`; with `tls` they insist on it.
    pub fn new(secret: ClusterSecret, tls: Option<Arc<rustls::ClientConfig>>, name: String) -> Self {
        Self { secret, tls, name }
    }

    /// Opens a peer session to the node at `address` (`host:port`).
    ///
    /// # Errors
    ///
    /// The address is malformed or does not answer in time, the secret cannot be read, or the node refuses it.
    pub async fn dial(&self, address: &str, purpose: &Purpose) -> anyhow::Result<PeerSession> {
        let mut config = Config::new();
        config.user(PEER_USER).application_name(&self.name).ssl_mode(SslMode::Disable);
        config.options(format!("-c {PEER_OPTION}={}", purpose.option()));
        if let Purpose::Server { database } = purpose {
            config.dbname(database);
        }
        let secret = self.secret.read()?;
        let opened = timeout(DIAL_DEADLINE, self.open(address, config, secret)).await;
        opened
            .map_err(|_| anyhow!("no answer within {} seconds", DIAL_DEADLINE.as_secs()))
            .and_then(|opened| opened)
            .with_context(|| format!("connect to the node at {address}"))
    }

    async fn open(&self, address: &str, mut config: Config, secret: Option<String>) -> anyhow::Result<PeerSession> {
        // TLS is agreed on before, so that what is heard first inside it can be looked at.
        let mut socket = connect(address, self.tls.as_ref()).await?;
        if let Some(secret) = secret {
            config.password(secret);
            socket = Box::new(Wary::new(socket));
        }
        let has_secret = config.get_password().is_some();
        let (client, connection) = config.connect_raw(socket, NoTls).await.map_err(|error| {
            // Of the errors that are not the node's words, without a secret, this is the one: it was asked for one.
            let asked = !has_secret && error.as_db_error().is_none() && !error.is_closed();
            let error = spoken(error);
            if asked { error.context("the node asks for the cluster secret; give --secret-file") } else { error }
        })?;
        let (heard, notifications) = watch::channel(0);
        // The connection's own errors reach every request made on the client; its end needs no second report.
        let mut connection = connection;
        let driven = tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                if matches!(message, AsyncMessage::Notification(_)) {
                    heard.send_modify(|count| *count += 1);
                }
            }
        });
        Ok(PeerSession { client, notifications, _connection: AbortOnDropHandle::new(driven) })
    }
}

impl PeerSession {
    /// Counts the notifications that have come; its end is the end of the connection.
    pub fn notifications(&self) -> watch::Receiver<u64> {
        self.notifications.clone()
    }

    /// Returns when the connection has ended.
    pub async fn lost(&self) {
        let mut notifications = self.notifications();
        while notifications.changed().await.is_ok() {}
    }

    /// Asks a verb and returns the text of its answer.
    ///
    /// # Errors
    ///
    /// The node refuses, the connection fails, or no answer comes before `deadline`.
    pub async fn ask(&self, verb: Verb, deadline: Duration) -> anyhow::Result<String> {
        let answer = timeout(deadline, self.client.simple_query(&verb.to_string()))
            .await
            .map_err(|_| anyhow!("no answer within {} seconds", deadline.as_secs_f32()))?
            .map_err(spoken)?;
        let row = answer.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        row.and_then(|row| row.get(0).map(str::to_owned)).context("read the answer")
    }
}

impl Deref for PeerSession {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// tokio-postgres prints a server's error as "db error"; what the server said is in its source.
pub fn spoken(error: tokio_postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(said) => {
            let text = format!("{} ({})", said.message(), said.code().code());
            anyhow::Error::new(error).context(text)
        }
        None => anyhow::Error::new(error),
    }
}

/// What a server, or a node, has answered, where [`spoken`] has made the error of it.
pub fn said_by_server(error: &anyhow::Error) -> Option<PgError> {
    let said = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>())?.as_db_error()?;
    let mut answer = PgError::new(SqlState::parse(said.code().code())?, said.message());
    (answer.detail, answer.hint) = (said.detail().map(str::to_owned), said.hint().map(str::to_owned));
    Some(answer)
}
