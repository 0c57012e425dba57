//! The server beside a node.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cluster::socket::Socket;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_postgres::config::Host;
use tokio_postgres::tls::NoTlsStream;
use tokio_postgres::{Client, Config, Connection, NoTls};
use tokio_util::task::AbortOnDropHandle;

/// A server that does not take a connection within this time is down.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// What holds in every session of the node's from its first statement on, and in those of PostgreSQL's programs that it
/// runs, whatever server, database or role have set. A standby refuses every statement that would be serializable,
/// also the one that sets another isolation; and amounts of `money` are printed and read by a locale, which
/// `pg_dump` leaves as it is: what one locale has printed another refuses, or reads as another amount.
const OPTIONS: &str = r"-c default_transaction_isolation=read\ committed -c lc_monetary=C";

#[derive(Clone, Debug)]
enum Place {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// Where the server beside a node listens, and as whom the node logs into it (its service role).
///
/// Its `Debug` leaves the password out.
#[derive(Clone)]
pub struct Server {
    place: Place,
    config: Config,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("place", &self.place).field("user", &self.user()).finish_non_exhaustive()
    }
}

impl Server {
    /// Reads a libpq connection string (`host=/run/postgresql user=backhaul password=…`, or a URL).
    ///
    /// Left out, the host is 127.0.0.1, the port 5432, the user `backhaul`, the database `postgres`.
    ///
    /// # Errors
    ///
    /// The string cannot be parsed, or names several hosts: a node stands beside one server.
    pub fn from_conninfo(conninfo: &str) -> anyhow::Result<Self> {
        // The parser's error does not repeat the text, which may hold a password.
        let mut config: Config = conninfo.parse().context("read the connection string of the server")?;
        if config.get_hosts().len() > 1 || config.get_ports().len() > 1 {
            bail!("the connection string of the server names several hosts; a node stands beside one server");
        }
        if config.get_hosts().is_empty() {
            config.host("127.0.0.1");
        }
        if config.get_user().is_none() {
            config.user("backhaul");
        }
        if config.get_dbname().is_none() {
            config.dbname("postgres");
        }
        config.ssl_mode(tokio_postgres::config::SslMode::Disable).application_name("backhaul");
        config.connect_timeout(CONNECT_DEADLINE);
        // Behind the operator's, for of two the later counts.
        let options = config.get_options().map_or(OPTIONS.to_owned(), |given| format!("{given} {OPTIONS}"));
        config.options(options);
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let place = match config.get_hosts().first() {
            Some(Host::Tcp(host)) => Place::Tcp(host.clone(), port),
            Some(Host::Unix(dir)) => Place::Unix(dir.join(format!(".s.PGSQL.{port}"))),
            None => bail!("the connection string of the server names no host"),
        };
        Ok(Self { place, config })
    }

    /// The service role.
    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or("backhaul")
    }

    /// What its sessions are started with: the options of the connection string, and the node's own.
    pub(crate) fn options(&self) -> &str {
        self.config.get_options().unwrap_or(OPTIONS)
    }

    /// The service role's password, if one was given.
    pub(crate) fn password(&self) -> Option<&[u8]> {
        self.config.get_password()
    }

    /// The database that the node logs into when it has no reason for another one.
    pub fn database(&self) -> &str {
        self.config.get_dbname().unwrap_or("postgres")
    }

    /// Whether it is reached through a socket file of this host.
    pub fn is_local_socket(&self) -> bool {
        matches!(self.place, Place::Unix(_))
    }

    /// Where it listens, for messages: `host:port`, or the path of its socket file.
    pub fn address(&self) -> String {
        match &self.place {
            Place::Tcp(host, port) => format!("{host}:{port}"),
            Place::Unix(path) => path.display().to_string(),
        }
    }

    /// The variables from which libpq, and so each of PostgreSQL's programs, learns how to log in as this node does.
    /// The password is among them, and so is never seen in a list of processes.
    pub(crate) fn environment(&self, database: &str) -> Vec<(&'static str, OsString)> {
        let (host, port) = match &self.place {
            Place::Tcp(host, port) => (OsString::from(host), *port),
            Place::Unix(path) => {
                let port = self.config.get_ports().first().copied().unwrap_or(5432);
                (path.parent().map(OsString::from).unwrap_or_default(), port)
            }
        };
        let mut variables = vec![
            ("PGHOST", host),
            ("PGPORT", port.to_string().into()),
            ("PGUSER", self.user().into()),
            ("PGDATABASE", database.into()),
            ("PGSSLMODE", "disable".into()),
            ("PGCONNECT_TIMEOUT", CONNECT_DEADLINE.as_secs().to_string().into()),
            ("PGPASSFILE", "/dev/null".into()),
            ("PGOPTIONS", self.options().into()),
        ];
        if let Some(password) = self.password() {
            variables.push(("PGPASSWORD", OsString::from_vec(password.to_vec())));
        }
        variables
    }

    /// Opens a bare connection; nothing has been said on it yet.
    ///
    /// # Errors
    ///
    /// The server does not listen, or does not answer in time.
    pub async fn connect(&self) -> io::Result<Socket> {
        let connecting = async {
            Ok::<Socket, io::Error>(match &self.place {
                Place::Tcp(host, port) => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream)
                }
                Place::Unix(path) => Box::new(UnixStream::connect(path).await?),
            })
        };
        timeout(CONNECT_DEADLINE, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Opens a session as the service role, in the default database.
    ///
    /// # Errors
    ///
    /// As PostgreSQL says it.
    pub async fn session(&self) -> Result<(Client, AbortOnDropHandle<()>), tokio_postgres::Error> {
        self.session_in(self.database()).await
    }

    /// Opens a session as the service role, in `database`.
    ///
    /// # Errors
    ///
    /// As PostgreSQL says it.
    pub async fn session_in(&self, database: &str) -> Result<(Client, AbortOnDropHandle<()>), tokio_postgres::Error> {
        let (client, connection) = self.open_in(database, "backhaul").await?;
        // The connection's errors reach every request on the client.
        Ok((client, AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }))))
    }

    /// The same under a name of its own, for a caller that drives the connection itself.
    pub(crate) async fn open_in(
        &self,
        database: &str,
        application_name: &str,
    ) -> Result<(Client, Connection<tokio_postgres::Socket, NoTlsStream>), tokio_postgres::Error> {
        let mut config = self.config.clone();
        config.dbname(database).application_name(application_name).connect(NoTls).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_names_one_server_and_its_password_stays_inside() {
        let server = Server::from_conninfo("host=/run/postgresql port=5433 password=hunter2").unwrap();
        let shown = format!("{server:?}");
        assert!(shown.contains("/run/postgresql/.s.PGSQL.5433") && shown.contains("backhaul"), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(server.is_local_socket());

        let server = Server::from_conninfo("postgresql://me@db1/app").unwrap();
        assert_eq!((server.user(), server.database(), server.is_local_socket()), ("me", "app", false));
        assert_eq!(server.options(), OPTIONS);
        let server = Server::from_conninfo("options='-c lc_monetary=de_DE'").unwrap();
        assert_eq!(server.options(), format!("-c lc_monetary=de_DE {OPTIONS}"));
        for text in ["host=a,b", "nonsense", "password=hunter2 port=x"] {
            let error = Server::from_conninfo(text).unwrap_err();
            assert!(!format!("{error:#}").contains("hunter2"), "{error:#}");
        }
    }
}
