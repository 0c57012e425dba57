//! What a server sends, frame by frame: passed on, and a little of it read on the way.

use bytes::Bytes;
use pgerror::PgError;

use crate::asking::with_position;
use crate::frame::{cut_string, data_run, header};
use crate::pipeline::{Transaction, Verdict};
use crate::session::{BUFFER_MAX, Session};

/// The server's code for a prepared statement that does not exist, as a field of its error.
const INVALID_NAME: &[u8] = b"C26000";

/// The encodings of clients in which the later bytes of a character may be those of ASCII, a backslash among them.
const ASCII_INSIDE: [&[u8]; 7] = [b"SJIS", b"SHIFT_JIS_2004", b"BIG5", b"GBK", b"UHC", b"JOHAB", b"GB18030"];

/// No more than this much of a frame is waited for and looked at.
const LOOK_MAX: usize = 16 * 1024;

impl Session {
    /// Takes what the server has sent as far as possible.
    pub(crate) fn digest_server(&mut self) -> Result<(), PgError> {
        while self.to_client.len() + self.from_server.waiting() < BUFFER_MAX {
            if !self.from_server.settle(&mut self.to_client) {
                break;
            }
            if !self.pipeline.is_asking() {
                let run = data_run(self.from_server.unjudged());
                self.from_server.pass(run);
                self.from_server.settle(&mut self.to_client);
            }
            let unjudged = self.from_server.unjudged();
            let Some(found) = header(unjudged)? else { break };
            let looked_at = match found.tag {
                b'Z' | b'E' | b'K' | b'S' | b'C' => found.len.min(LOOK_MAX),
                b'D' if self.pipeline.is_asking() => found.len.min(LOOK_MAX),
                // At most 65,535 types.
                b't' if self.pipeline.is_asking() => found.len,
                _ => 5,
            };
            let Some(body) = unjudged.get(5..looked_at) else { break };
            match self.pipeline.received(found.tag, body.first().copied()) {
                Verdict::Pass => {
                    let body = Bytes::copy_from_slice(body);
                    let whole_error = found.tag == b'E' && body.len() + 5 == found.len;
                    if let Some(moved) = whole_error.then(|| self.led_back(&body)).flatten() {
                        self.from_server.pass_on(&mut self.to_client);
                        self.to_client.extend_from_slice(&moved);
                        self.from_server.discard(found.len);
                    } else {
                        self.from_server.pass(found.len);
                    }
                    self.read_along(found.tag, &body);
                }
                Verdict::Replace(ours) => {
                    self.from_server.pass_on(&mut self.to_client);
                    self.to_client.extend_from_slice(&ours);
                    self.from_server.discard(found.len);
                }
                verdict @ (Verdict::Swallow | Verdict::Told | Verdict::Asked) => {
                    let row = (verdict == Verdict::Told).then(|| Bytes::copy_from_slice(body));
                    self.from_server.pass_on(&mut self.to_client);
                    self.from_server.discard(found.len);
                    if let Some((row, asking)) = row.zip(self.asking.as_mut()) {
                        asking.told(&row);
                    }
                    if verdict == Verdict::Asked {
                        self.asked();
                    }
                }
            }
        }
        self.from_server.pass_on(&mut self.to_client);
        Ok(())
    }

    /// An error of the server's about what this gateway made of the client's text, as one about that text.
    fn led_back(&self, error: &[u8]) -> Option<Bytes> {
        match (&self.asking, &self.places) {
            (Some(asking), _) => match asking.waiting() {
                Some((tag, body)) => with_position(error, |at| self.locals.position(tag, body, at)),
                None => asking.of_statement(error),
            },
            (None, Some(places)) => with_position(error, &places.position),
            (None, None) => None,
        }
    }

    /// An error ends what this gateway has asked; the client has been told in the server's words.
    fn end_asking(&mut self, error: &[u8]) {
        let Some(asking) = self.asking.take() else { return };
        self.skipping |= asking.is_extended();
        if let Some((tag, body)) = asking.waiting()
            && error.split(|byte| *byte == 0).any(|field| field == INVALID_NAME)
        {
            self.locals.forget_name(tag, body);
        }
        if asking.is_of_running() {
            drop(self.end_running());
        }
    }

    fn read_along(&mut self, tag: u8, mut body: &[u8]) {
        self.places.take_if(|places| tag == b'E' || tag == places.until);
        match tag {
            b'Z' => {
                self.greeted = true;
                let is_idle = self.pipeline.transaction() == Transaction::Idle;
                if is_idle {
                    self.locals.end_transaction();
                }
                self.joined.ready(&self.gateway.backups.jobs, is_idle);
            }
            b'1' => self.locals.confirm(),
            b'K' => {
                let key = Bytes::copy_from_slice(body);
                let session = std::sync::Arc::clone(&self.cancelable);
                self.registered = Some(self.gateway.cancel_keys().register(key, session));
            }
            b'S' => {
                let (Some(name), Some(value)) = (cut_string(&mut body), cut_string(&mut body)) else { return };
                match name {
                    b"standard_conforming_strings" => self.conforming_strings = value == b"on",
                    b"client_encoding" => self.ascii_in_characters = ASCII_INSIDE.contains(&value),
                    _ => {}
                }
                self.speech.heard(name, value);
            }
            b'C' => match cut_string(&mut body) {
                Some(b"DISCARD ALL" | b"DEALLOCATE ALL") => self.locals.discard_all(),
                Some(b"PREPARE") => self.locals.doubt(),
                Some(tag) => self.joined.completed(tag),
                None => {}
            },
            // The severity that is never translated comes among the first fields.
            b'E' => {
                self.locals.reject();
                self.end_asking(body);
                self.server_ended |= body.windows(7).any(|field| field == b"\0VFATAL" || field == b"\0VPANIC");
            }
            _ => {}
        }
    }
}
