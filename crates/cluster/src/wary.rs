//! A connection on which the other side has to ask for proof by SCRAM, and by nothing else.
//!
//! The PostgreSQL client underneath does as it is asked: it would send the cluster secret in clear text to whoever asks
//! for it that way, and believe whoever asks for no proof at all. With SCRAM the secret never travels, and the other
//! side proves that it has it, too. So the first message that is heard must be the demand for SASL, or an error.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::socket::Socket;

/// Tag, length and kind of an authentication message.
const HEAD: usize = 9;

/// The kind of AuthenticationSASL.
const SASL: [u8; 4] = [0, 0, 0, 10];

/// The connection; transparent once the first message was in order.
pub(crate) struct Wary {
    socket: Socket,
    heard: Vec<u8>,
}

impl Wary {
    pub(crate) fn new(socket: Socket) -> Self {
        Self { socket, heard: Vec::with_capacity(HEAD) }
    }

    /// Looks at what comes first.
    fn check(&mut self, bytes: &[u8]) -> io::Result<()> {
        let wanted = HEAD - self.heard.len();
        self.heard.extend(bytes.iter().take(wanted));
        let in_order = match self.heard.first() {
            Some(b'R') => self.heard.len() < HEAD || self.heard[5..] == SASL,
            Some(b'E') | None => true,
            Some(_) => false,
        };
        if in_order {
            return Ok(());
        }
        Err(io::Error::other("the node does not ask for the cluster secret as it should; is it --insecure?"))
    }
}

impl AsyncRead for Wary {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        if self.heard.len() < HEAD {
            let new = buf.filled()[before..].to_vec();
            self.check(&new)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wary {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn only_a_demand_for_scram_or_an_error_may_come_first() {
        for (first, in_order) in [
            (b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0".as_slice(), true),
            (b"E\0\0\0\x05\0", true),
            (b"R\0\0\0\x08\0\0\0\0", false),
            (b"R\0\0\0\x08\0\0\0\x03", false),
            (b"R\0\0\0\x0c\0\0\0\x05salt", false),
            (b"Z\0\0\0\x05I", false),
        ] {
            let (mut theirs, ours) = tokio::io::duplex(64);
            let mut wary = Wary::new(Box::new(ours));
            // In two pieces, as a network may deliver it.
            theirs.write_all(&first[..3]).await.unwrap();
            let mut heard = [0; 3];
            let mut outcome = wary.read_exact(&mut heard).await;
            theirs.write_all(&first[3..]).await.unwrap();
            let mut rest = vec![0; first.len() - 3];
            if outcome.is_ok() {
                outcome = wary.read_exact(&mut rest).await;
            }
            assert_eq!(outcome.is_ok(), in_order, "{first:?}");
        }
    }
}
