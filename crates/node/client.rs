//! How the tools around a node reach one.

use anyhow::Context as _;
use cluster::secret::ClusterSecret;
use gateway::tls::Tls;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use crate::flags::Trust;

impl Trust {
    /// The secret that these flags name.
    pub(crate) fn secret(&self) -> ClusterSecret {
        match &self.secret_file {
            Some(file) if !self.insecure => ClusterSecret::File(file.clone()),
            _ => ClusterSecret::Insecure,
        }
    }

    /// The certificates that these flags name.
    ///
    /// # Errors
    ///
    /// They cannot be read.
    pub(crate) fn tls(&self) -> anyhow::Result<Tls> {
        self.certs_dir.as_deref().map_or_else(|| Ok(Tls::default()), Tls::load)
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
    let mut config: Config = format!("postgresql://{host}/").parse().context("read the address of the node")?;
    config.user(user).dbname(database).options("-c backhaul.target=local").application_name("backhaul init");
    config.connect_timeout(std::time::Duration::from_secs(10));
    if let Some(password) = std::env::var_os("PGPASSWORD") {
        config.password(password.as_encoded_bytes());
    }
    let connect = async {
        Ok::<_, tokio_postgres::Error>(match trust.tls().ok().and_then(|tls| tls.to_nodes()) {
            Some(tls) => {
                config.ssl_mode(SslMode::Require);
                let (client, connection) = config.connect(MakeRustlsConnect::new((*tls).clone())).await?;
                (client, tokio::spawn(async move { drop(connection.await) }))
            }
            None => {
                config.ssl_mode(SslMode::Disable);
                let (client, connection) = config.connect(NoTls).await?;
                (client, tokio::spawn(async move { drop(connection.await) }))
            }
        })
    };
    let (client, connection) =
        connect.await.map_err(spoken).with_context(|| format!("connect through the node at {host} as {user}"))?;
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
