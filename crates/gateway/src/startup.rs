//! The packets that come before there are frames.
//!
//! They are read with exact sizes: not a byte behind a TLS request is taken from the socket before the handshake, so
//! nothing that was sent in plain text can pass for something said inside TLS.

use bytes::{BufMut as _, Bytes, BytesMut};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::frame::cut_string;

/// PostgreSQL's own limit (`MAX_STARTUP_PACKET_LENGTH`).
const PACKET_MAX: usize = 10_000;

const CANCEL_REQUEST: u32 = 80_877_102;
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;

/// The code of a [`Hop`], in the range in which PostgreSQL looks for no protocol version.
const HOP: u32 = 80_877_300;

/// A packet at the beginning of a connection.
#[derive(Debug)]
pub(crate) enum Packet {
    /// The client wants TLS.
    Tls,
    /// The client wants GSS encryption.
    Gss,
    /// Cancel what the connection with this key (process id and secret) is doing.
    Cancel(Bytes),
    /// Another node passes a client on.
    Hop(Hop),
    /// A client wants a session.
    Startup(Startup),
}

/// What a node says before it passes a client's packets on to the node beside the server that they are for.
///
/// It grants nothing that the client could not ask for itself; it says what the sending node believes, so that a
/// belief that is out of date ends in an error and not at the wrong server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hop {
    /// The shard that the sender takes the receiver for the leaseholder of.
    pub(crate) shard: String,
    /// The timeline that the sender believes its server to write.
    pub(crate) timeline: u32,
}

impl Hop {
    /// The packet as it is sent.
    pub(crate) fn encode(&self) -> Bytes {
        let body = serde_json::to_vec(self).expect("strings and numbers serialize");
        let mut packet = BytesMut::new();
        packet.put_u32(u32::try_from(8 + body.len()).expect("a hop is short"));
        packet.put_u32(HOP);
        packet.put_slice(&body);
        packet.freeze()
    }
}

/// A client's startup packet.
#[derive(Clone, Debug)]
pub(crate) struct Startup {
    /// As it came, length included.
    pub(crate) raw: Bytes,
    parameters: Vec<(Bytes, Bytes)>,
}

impl Startup {
    /// A parameter's value, when it is UTF-8.
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.parameters.iter().find(|(key, _)| key == name.as_bytes());
        found.and_then(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// A setting given by `options` (`-c name=value` or `--name=value`), the last one counting.
    pub(crate) fn setting(&self, name: &str) -> Option<String> {
        let words = split_options(self.parameter("options")?);
        let mut value = None;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let setting = match word.strip_prefix("-c") {
                Some("") => words.next().map(String::as_str),
                Some(joined) => Some(joined),
                None => word.strip_prefix("--"),
            };
            if let Some((found, given)) = setting.and_then(|setting| setting.split_once('='))
                && found.eq_ignore_ascii_case(name)
            {
                value = Some(given.to_owned());
            }
        }
        value
    }

    /// Whether the client wants replication, physical or logical.
    pub(crate) fn wants_replication(&self) -> bool {
        let value = self.parameter("replication").unwrap_or_default().to_ascii_lowercase();
        !matches!(value.as_str(), "" | "false" | "off" | "no" | "0")
    }

    /// Whether the client wants to stream WAL or copy the server, rather than replicate changes of one database.
    pub(crate) fn wants_physical_replication(&self) -> bool {
        self.wants_replication() && !self.parameter("replication").unwrap_or_default().eq_ignore_ascii_case("database")
    }
}

/// Splits as PostgreSQL splits `options`: at white space, a backslash taking the next character as it is.
fn split_options(options: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = options.chars();
    while let Some(c) = chars.next() {
        if c.is_ascii_whitespace() {
            words.extend(word.take());
        } else {
            let c = if c == '\\' { chars.next().unwrap_or('\\') } else { c };
            word.get_or_insert_default().push(c);
        }
    }
    words.extend(word);
    words
}

/// Reads one packet; `None` when the client leaves without one.
///
/// # Errors
///
/// 08P01 for a length or a content that cannot be.
pub(crate) async fn read_packet(socket: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<Option<Packet>> {
    let mut length = [0; 4];
    match socket.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let size = u32::from_be_bytes(length) as usize;
    if !(8..=PACKET_MAX).contains(&size) {
        return Err(PgError::new(SqlState::PROTOCOL_VIOLATION, "invalid length of startup packet").into());
    }
    let mut raw = BytesMut::zeroed(size);
    raw[..4].copy_from_slice(&length);
    socket.read_exact(&mut raw[4..]).await?;
    decode(raw.freeze()).map(Some).map_err(Into::into)
}

fn decode(raw: Bytes) -> Result<Packet, PgError> {
    let malformed = || PgError::new(SqlState::PROTOCOL_VIOLATION, "invalid startup packet layout");
    let code = u32::from_be_bytes(*raw[4..].first_chunk().ok_or_else(malformed)?);
    Ok(match code {
        SSL_REQUEST => Packet::Tls,
        GSS_REQUEST => Packet::Gss,
        CANCEL_REQUEST => Packet::Cancel(raw.slice(8..)),
        HOP => Packet::Hop(serde_json::from_slice(&raw[8..]).map_err(|_| malformed())?),
        version if version >> 16 == 3 => {
            let parameters = parameters(&raw).ok_or_else(malformed)?;
            Packet::Startup(Startup { raw, parameters })
        }
        // The server speaks for itself about versions that it does not know.
        _ => Packet::Startup(Startup { raw, parameters: Vec::new() }),
    })
}

fn parameters(raw: &Bytes) -> Option<Vec<(Bytes, Bytes)>> {
    let mut rest = &raw[8..];
    let mut parameters = Vec::new();
    loop {
        let key = cut_string(&mut rest)?;
        if key.is_empty() {
            return rest.is_empty().then_some(parameters);
        }
        let value = cut_string(&mut rest)?;
        parameters.push((raw.slice_ref(key), raw.slice_ref(value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(code: u32, body: &[u8]) -> Bytes {
        let mut raw = BytesMut::new();
        raw.put_u32(8 + body.len() as u32);
        raw.put_u32(code);
        raw.put_slice(body);
        raw.freeze()
    }

    async fn read(bytes: &[u8]) -> Result<Option<Packet>, String> {
        read_packet(&mut &*bytes).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_packet_of_impossible_size_or_layout_is_refused() {
        for (bytes, message) in [
            (vec![0, 0, 0, 7], "invalid length of startup packet"),
            (vec![0x7f, 0xff, 0xff, 0xff], "invalid length of startup packet"),
            (vec![0x16, 3, 1, 2], "invalid length of startup packet"),
            (packet(0x3_0000, b"user\0me").to_vec(), "invalid startup packet layout"),
            (packet(0x3_0000, b"user\0me\0\0more").to_vec(), "invalid startup packet layout"),
            (packet(HOP, b"{").to_vec(), "invalid startup packet layout"),
        ] {
            assert_eq!(read(&bytes).await.expect_err("refused"), message, "{bytes:?}");
        }
        assert!(matches!(read(b"").await, Ok(None)));
    }

    #[tokio::test]
    async fn settings_are_found_in_options_as_postgresql_finds_them() {
        for (options, value) in [
            ("-c backhaul.target=local", Some("local")),
            ("-cbackhaul.target=local", Some("local")),
            ("--backhaul.target=local", Some("local")),
            ("-c work_mem=1MB -c BACKHAUL.target=a -c backhaul.target=b\\ c", Some("b c")),
            ("-c backhaul.target", None),
            ("backhaul.target=local", None),
            ("", None),
        ] {
            let raw = packet(0x3_0000, format!("user\0me\0options\0{options}\0\0").as_bytes());
            let Ok(Some(Packet::Startup(startup))) = read(&raw).await else { panic!("{options}") };
            assert_eq!(startup.setting("backhaul.target").as_deref(), value, "{options}");
            assert_eq!(startup.parameter("user"), Some("me"));
        }
    }

    #[tokio::test]
    async fn a_hop_reads_back_as_itself() {
        let hop = Hop { shard: "s1".to_owned(), timeline: 7 };
        assert!(matches!(read(&hop.encode()).await, Ok(Some(Packet::Hop(read))) if read == hop));
    }
}
