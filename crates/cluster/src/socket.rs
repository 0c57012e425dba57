//! Connections to nodes, before anything is said on them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A stream in both directions, whatever carries it.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection of any kind.
pub type Socket = Box<dyn Duplex>;

/// Asks a port for TLS: PostgreSQL's SSLRequest.
const TLS_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f];

/// A peer that is gone without a word is noticed after about the first of these and some of the second.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);

/// Prepares a socket: nothing waits to be sent together with more, and a host that vanishes is noticed. PostgreSQL asks
/// for the same on its own sockets, but what it sees behind a node is the node.
///
/// # Errors
///
/// The operating system refuses, which means that the connection is already gone.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Connects to a node's port, inside TLS when `tls` is there.
///
/// # Errors
///
/// The address is malformed or does not answer, or TLS cannot be had there.
pub async fn connect(address: &str, tls: Option<&Arc<ClientConfig>>) -> anyhow::Result<Socket> {
    let host = split_address(address)?;
    let mut stream = TcpStream::connect((host.0, host.1)).await?;
    prepare(&stream)?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    stream.write_all(&TLS_REQUEST).await?;
    if stream.read_u8().await? != b'S' {
        bail!("the node does not offer TLS");
    }
    let name = ServerName::try_from(host.0.to_owned()).context("read the host's name")?;
    Ok(Box::new(TlsConnector::from(Arc::clone(tls)).connect(name, stream).await.context("agree on TLS")?))
}

/// Splits `host:port`; an IPv6 host stands in brackets.
fn split_address(address: &str) -> anyhow::Result<(&str, u16)> {
    let (host, port) = address.rsplit_once(':').with_context(|| format!("address \"{address}\" has no port"))?;
    let port = port.parse().with_context(|| format!("address \"{address}\" has no valid port"))?;
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (address, expected) in
            [("n1:26257", Some(("n1", 26257))), ("[::1]:5", Some(("::1", 5))), ("n1", None), ("n1:x", None)]
        {
            assert_eq!(split_address(address).ok(), expected, "{address}");
        }
    }
}
