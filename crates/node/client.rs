//! How the tools around a node reach one.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cluster::secret::ClusterSecret;
use cluster::socket::connect;
use gateway::tls::{Tls, authority};
use rustls::ClientConfig;
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls};
use tokio_util::task::AbortOnDropHandle;

use crate::flags::Trust;

/// A login through a node that takes longer is given up.
const CONNECT_DEADLINE: Duration = Duration::from_secs(20);

impl Trust {
    /// The secret that these flags name.
    pub(crate) fn secret(&self) -> ClusterSecret {
        match &self.secret_file {
            Some(file) if !self.insecure => ClusterSecret::File(file.clone()),
            _ => ClusterSecret::Insecure,
        }
    }

    /// What a node does with the certificates that these flags name.
    ///
    /// # Errors
    ///
    /// They cannot be read.
    pub(crate) fn tls(&self) -> anyhow::Result<Tls> {
        self.certs_dir.as_deref().map_or_else(|| Ok(Tls::default()), Tls::load)
    }

    /// Whom a tool trusts to be a node; without certificates it speaks plain text.
    ///
    /// # Errors
    ///
    /// The directory has no certificate authority, or it cannot be read.
    pub(crate) fn authority(&self) -> anyhow::Result<Option<Arc<ClientConfig>>> {
        self.certs_dir.as_deref().map(authority).transpose()
    }
}

/// A client's session through a node's port, on the server beside that node.
pub(crate) struct LocalSession {
    pub(crate) client: Client,
    _connection: AbortOnDropHandle<()>,
}

/// Opens a session on the server beside the node at `host`.
///
/// # Errors
///
/// The node cannot be reached, or PostgreSQL refuses.
pub(crate) async fn local_session(
    host: &str,
    user: &str,
    database: &str,
    trust: &Trust,
) -> anyhow::Result<LocalSession> {
    let mut config = Config::new();
    config.user(user).dbname(database).ssl_mode(SslMode::Disable);
    config.options("-c backhaul.target=local").application_name("backhaul init");
    let password = std::env::var_os("PGPASSWORD");
    if let Some(password) = &password {
        config.password(password.as_encoded_bytes());
    }
    let authority = trust.authority()?;
    let connecting = async {
        // TLS is agreed on here, so to the PostgreSQL client the connection is a plain one.
        let socket = connect(host, authority.as_ref()).await?;
        config.connect_raw(socket, NoTls).await.map_err(|error| match error.as_db_error() {
            None if password.is_none() => {
                spoken(error).context("the server asks for a password; give it by PGPASSWORD")
            }
            _ => spoken(error),
        })
    };
    let connected = timeout(CONNECT_DEADLINE, connecting).await.unwrap_or_else(|_| Err(anyhow!("no answer in time")));
    let (client, connection) = connected.with_context(|| format!("connect through the node at {host} as {user}"))?;
    // The connection's errors reach every request on the client.
    let connection = tokio::spawn(async move { drop(connection.await) });
    Ok(LocalSession { client, _connection: AbortOnDropHandle::new(connection) })
}

/// tokio-postgres prints a server's error as "db error"; what the server said is in its source.
pub(crate) fn spoken(error: tokio_postgres::Error) -> anyhow::Error {
    let said = error.as_db_error().map(|said| match said.hint() {
        Some(hint) => format!("{} ({}; {hint})", said.message(), said.code().code()),
        None => format!("{} ({})", said.message(), said.code().code()),
    });
    match said {
        Some(text) => anyhow::anyhow!(text),
        None => anyhow::Error::new(error),
    }
}
