//! What this gateway asks a server on its own account, or in other words than its client's: frames to the server.
//!
//! Names and texts are written as bytes, because a client's name may be in any encoding.

use bytes::{BufMut as _, Bytes};

use crate::answer::Writer;

/// The name of a question's statement and portal.
const ASK: &[u8] = b"backhaul_ask";

/// The name under which a text of the client's is parsed that is not as the client sent it, for as long as it takes to
/// bind it.
const ROWS: &[u8] = b"backhaul_rows";

/// The values that a client has bound.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arguments {
    /// The types of all of them.
    pub(crate) types: Vec<u32>,
    /// Their formats and themselves, as they stand in the client's Bind message; empty for none.
    pub(crate) given: Bytes,
}

impl Writer<'_> {
    fn frame(&mut self, tag: u8, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.0.put_u8(tag);
        // Beyond the limit of a frame the server ends the connection; texts with rows in them are kept far below.
        self.0.put_u32(u32::try_from(4 + length).unwrap_or(u32::MAX));
        parts.iter().for_each(|part| self.0.put_slice(part));
    }

    /// Query.
    pub(crate) fn query(&mut self, text: &str) {
        self.frame(b'Q', &[text.as_bytes(), b"\0"]);
    }

    /// A message of the client's, as it came.
    pub(crate) fn message(&mut self, tag: u8, body: &[u8]) {
        self.frame(tag, &[body]);
    }

    /// Sync.
    pub(crate) fn sync(&mut self) {
        self.frame(b'S', &[]);
    }

    /// Runs a statement without parameters as a part of a pipeline, with its rows in text; it leaves no name behind.
    pub(crate) fn run_text(&mut self, text: &str) {
        self.frame(b'C', &[b"S", ROWS, b"\0"]);
        self.parse(ROWS, text, &[]);
        self.frame(b'B', &[b"\0", ROWS, b"\0", &[0; 6]]);
        self.frame(b'D', &[b"P\0"]);
        self.frame(b'C', &[b"S", ROWS, b"\0"]);
        self.frame(b'E', &[&[0; 5]]);
    }

    /// Close, of the portal that [`Writer::run_text`] has used. Not part of that: a COPY would find it in its data.
    pub(crate) fn close_unnamed_portal(&mut self) {
        self.frame(b'C', &[b"P\0"]);
    }

    /// Parse, with the types of the first parameters; zero leaves one to the server.
    pub(crate) fn parse(&mut self, name: &[u8], text: &str, types: &[u32]) {
        let mut oids = Vec::with_capacity(2 + 4 * types.len());
        oids.put_u16(u16::try_from(types.len()).unwrap_or(u16::MAX));
        types.iter().for_each(|oid| oids.put_u32(*oid));
        self.frame(b'P', &[name, b"\0", text.as_bytes(), b"\0", &oids]);
    }

    /// Describe of a statement, to be answered now.
    pub(crate) fn describe_statement(&mut self, name: &[u8]) {
        self.frame(b'D', &[b"S", name, b"\0"]);
        self.flush();
    }

    /// A question of this gateway's own, answered as [`crate::pipeline`] expects it. One that has failed before its end
    /// has left its statement behind, which is closed first.
    pub(crate) fn ask(&mut self, question: &str, extended: Option<&Arguments>) {
        let Some(Arguments { types, given }) = extended else { return self.query(question) };
        let given: &[u8] = if given.is_empty() { &[0; 4] } else { given };
        self.frame(b'C', &[b"S", ASK, b"\0"]);
        self.parse(ASK, question, types);
        self.frame(b'B', &[ASK, b"\0", ASK, b"\0", given, &[0, 0]]);
        self.frame(b'E', &[ASK, &[0; 5]]);
        self.frame(b'C', &[b"P", ASK, b"\0"]);
        self.frame(b'C', &[b"S", ASK, b"\0"]);
        self.flush();
    }

    /// Binds a text to a portal of the client's; `rest` is what stands behind the names in the client's own Bind. The
    /// portal keeps what it needs when its statement is closed.
    pub(crate) fn bind_text(&mut self, portal: &[u8], text: &str, types: &[u32], rest: &[u8]) {
        self.frame(b'C', &[b"S", ROWS, b"\0"]);
        self.parse(ROWS, text, types);
        self.frame(b'B', &[portal, b"\0", ROWS, b"\0", rest]);
        self.frame(b'C', &[b"S", ROWS, b"\0"]);
    }
}
