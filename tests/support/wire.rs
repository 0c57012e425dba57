//! A client that says and hears single messages.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::mpsc::RecvTimeoutError;

use bytes::{BufMut as _, BytesMut};
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;

use super::DEADLINE;

/// A connection, and what was built to be sent on it.
pub struct Wire {
    address: String,
    stream: TcpStream,
    out: BytesMut,
    key: Vec<u8>,
}

impl Wire {
    /// Connects without a word.
    pub fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { address: address.to_owned(), stream, out: BytesMut::new(), key: Vec::new() }
    }

    /// Connects and logs in as `root` without a password, up to the first ReadyForQuery.
    pub fn login(address: &str, database: &str) -> Self {
        let mut wire = Self::connect(address);
        frontend::startup_message([("user", "root"), ("database", database)], &mut wire.out).unwrap();
        let greeting = wire.hear();
        assert!(greeting.ends_with("Z I"), "{greeting}");
        wire
    }

    /// Sends bytes as they are, at once.
    pub fn send(&mut self, bytes: &[u8]) -> &mut Self {
        self.stream.write_all(bytes).unwrap();
        self
    }

    /// What asks for the cancellation of whatever this connection does, again and again, until it is dropped.
    pub fn canceller(&self) -> Canceller {
        let (address, key) = (self.address.clone(), self.key.clone());
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // The request may come before the statement; then it is for nothing.
            while stopped.recv_timeout(std::time::Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
                let mut packet = vec![0, 0, 0, 8 + key.len() as u8, 4, 0xd2, 0x16, 0x2e];
                packet.extend_from_slice(&key);
                let mut stream = TcpStream::connect(&address).unwrap();
                stream.write_all(&packet).unwrap();
                // It is closed when the request has been carried out: none comes to the next statement.
                drop(stream.read_to_end(&mut Vec::new()));
            }
        });
        Canceller { stop: Some(stop), thread: Some(thread) }
    }

    /// Query.
    pub fn query(&mut self, text: &str) -> &mut Self {
        frontend::query(text, &mut self.out).unwrap();
        self
    }

    /// Parse.
    pub fn parse(&mut self, name: &str, text: &str) -> &mut Self {
        frontend::parse(name, text, [], &mut self.out).unwrap();
        self
    }

    /// Parse, with types for the first parameters.
    pub fn parse_typed(&mut self, name: &str, text: &str, types: &[u32]) -> &mut Self {
        frontend::parse(name, text, types.iter().copied(), &mut self.out).unwrap();
        self
    }

    /// Bind with these values, each in its format; columns in theirs.
    pub fn bind_values(
        &mut self,
        portal: &str,
        name: &str,
        values: &[(i16, Option<&[u8]>)],
        formats: &[i16],
    ) -> &mut Self {
        let given = values.iter().map(|(format, _)| *format);
        let put = |(_, value): &(i16, Option<&[u8]>), out: &mut BytesMut| {
            out.put_slice(value.unwrap_or_default());
            Ok(if value.is_some() { IsNull::No } else { IsNull::Yes })
        };
        let bound = frontend::bind(portal, name, given, values, put, formats.iter().copied(), &mut self.out);
        assert!(bound.is_ok());
        self
    }

    /// Bind without parameters; all columns in one format.
    pub fn bind(&mut self, portal: &str, name: &str, format: i16) -> &mut Self {
        let none: [i32; 0] = [];
        let bound = frontend::bind(portal, name, [], none, |_, _| Ok(IsNull::Yes), [format], &mut self.out);
        assert!(bound.is_ok());
        self
    }

    /// Describe: `S`tatement or `P`ortal.
    pub fn describe(&mut self, variant: u8, name: &str) -> &mut Self {
        frontend::describe(variant, name, &mut self.out).unwrap();
        self
    }

    /// Execute.
    pub fn execute(&mut self, portal: &str, rows: i32) -> &mut Self {
        frontend::execute(portal, rows, &mut self.out).unwrap();
        self
    }

    /// Close: `S`tatement or `P`ortal.
    pub fn close(&mut self, variant: u8, name: &str) -> &mut Self {
        frontend::close(variant, name, &mut self.out).unwrap();
        self
    }

    /// Flush.
    pub fn flush(&mut self) -> &mut Self {
        frontend::flush(&mut self.out);
        self
    }

    /// Sync.
    pub fn sync(&mut self) -> &mut Self {
        frontend::sync(&mut self.out);
        self
    }

    /// CopyData and CopyDone.
    pub fn copy(&mut self, text: &str) -> &mut Self {
        self.out.put_u8(b'd');
        self.out.put_u32(4 + text.len() as u32);
        self.out.put_slice(text.as_bytes());
        frontend::copy_done(&mut self.out);
        self
    }

    /// Sends what was built and hears everything up to ReadyForQuery or the end of the connection: a line a message.
    pub fn hear(&mut self) -> String {
        self.hear_until(|tag| tag == b'Z')
    }

    /// Sends what was built and closes this side of the connection; answers still come.
    pub fn send_and_close(&mut self) {
        let out = self.out.split();
        self.stream.write_all(&out).unwrap();
        self.stream.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// The same, up to a message of this kind.
    pub fn hear_until(&mut self, mut last: impl FnMut(u8) -> bool) -> String {
        let out = self.out.split();
        // A side that was closed has nothing to send any more.
        if !out.is_empty() {
            self.stream.write_all(&out).unwrap();
        }
        let mut lines = Vec::new();
        loop {
            let mut header = [0; 5];
            if self.stream.read_exact(&mut header).is_err() {
                lines.push("end".to_owned());
                break;
            }
            let length = u32::from_be_bytes(header[1..].try_into().unwrap()) as usize;
            let mut body = vec![0; length - 4];
            self.stream.read_exact(&mut body).unwrap();
            lines.extend(line(header[0], &body));
            if header[0] == b'K' {
                self.key.clone_from(&body);
            }
            if last(header[0]) {
                break;
            }
        }
        lines.join("\n")
    }
}

/// See [`Wire::canceller`].
pub struct Canceller {
    stop: Option<std::sync::mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Canceller {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking());
    }
}

/// A message in a line; what differs from run to run is left out.
fn line(tag: u8, body: &[u8]) -> Option<String> {
    let name = char::from(tag);
    Some(match tag {
        b'S' | b'K' | b'R' => return None,
        b'Z' => format!("Z {}", char::from(body[0])),
        b'C' => format!("C {}", text(&body[..body.len() - 1])),
        b'E' | b'N' => {
            let fields =
                body.split(|b| *b == 0).filter(|field| matches!(field.first(), Some(b'S' | b'C' | b'M' | b'P')));
            let shown: Vec<String> = fields.map(text).collect();
            format!("{name} {}", shown.join(" "))
        }
        b'D' => format!("D {}", values(body).join("|")),
        b'T' => format!("T {}", columns(body).join("|")),
        b't' => {
            let oids = body[2..].chunks(4).map(|oid| u32::from_be_bytes(oid.try_into().unwrap()));
            let count = i16::from_be_bytes([body[0], body[1]]);
            [format!("t {count}")].into_iter().chain(oids.map(|oid| format!(":{oid}"))).collect()
        }
        _ => name.to_string(),
    })
}

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string().replace("\\\"", "\"").replace("\\'", "'")
}

fn values(mut body: &[u8]) -> Vec<String> {
    let mut values = Vec::new();
    body = &body[2..];
    while let Some((length, rest)) = body.split_first_chunk::<4>() {
        let length = i32::from_be_bytes(*length);
        let (value, rest) = rest.split_at(usize::try_from(length).unwrap_or(0));
        values.push(if length < 0 { "NULL".to_owned() } else { text(value) });
        body = rest;
    }
    values
}

/// `name:type oid:format`
fn columns(body: &[u8]) -> Vec<String> {
    let mut columns = Vec::new();
    let mut rest = &body[2..];
    while let Some(end) = rest.iter().position(|b| *b == 0) {
        let (name, fixed) = rest.split_at(end);
        let fixed = &fixed[1..];
        let kind = u32::from_be_bytes(fixed[6..10].try_into().unwrap());
        let format = i16::from_be_bytes(fixed[16..18].try_into().unwrap());
        columns.push(format!("{}:{kind}:{format}", text(name)));
        rest = &fixed[18..];
    }
    columns
}
