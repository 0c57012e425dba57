//! What a server sends, frame by frame: passed on, and a little of it read on the way.

use bytes::{Buf as _, Bytes};
use pgerror::PgError;

use crate::client_frames::pass_on;
use crate::frame::{cut_string, data_run, header};
use crate::pipeline::{Transaction, Verdict};
use crate::session::{BUFFER_MAX, Session};

/// No more than this much of a frame is waited for and looked at.
const LOOK_MAX: usize = 16 * 1024;

impl Session {
    /// Takes what the server has sent as far as possible.
    pub(crate) fn digest_server(&mut self) -> Result<(), PgError> {
        let mut passed = 0;
        while self.to_client.len() + passed < BUFFER_MAX {
            let here = self.from_server.len() - passed;
            if self.server_rest.pass > 0 {
                let pass = here.min(self.server_rest.pass);
                self.server_rest.pass -= pass;
                passed += pass;
                if self.server_rest.pass > 0 {
                    break;
                }
            }
            if self.server_rest.drop > 0 {
                pass_on(&mut self.from_server, &mut passed, &mut self.to_client);
                let drop = self.from_server.len().min(self.server_rest.drop);
                self.server_rest.drop -= drop;
                self.from_server.advance(drop);
                if self.server_rest.drop > 0 {
                    break;
                }
            }
            passed += data_run(&self.from_server[passed..]);
            let Some(found) = header(&self.from_server[passed..])? else { break };
            let looked_at = match found.tag {
                b'Z' | b'E' | b'K' | b'S' | b'C' => found.len.min(LOOK_MAX),
                _ => 5,
            };
            if self.from_server.len() - passed < looked_at {
                break;
            }
            let body = passed + 5..passed + looked_at;
            match self.pipeline.received(found.tag, self.from_server[body.clone()].first().copied()) {
                Verdict::Pass => self.server_rest.pass = found.len,
                Verdict::Replace(ours) => {
                    pass_on(&mut self.from_server, &mut passed, &mut self.to_client);
                    self.to_client.extend_from_slice(&ours);
                    self.server_rest.drop = found.len;
                    continue;
                }
            }
            self.read_along(found.tag, body);
        }
        pass_on(&mut self.from_server, &mut passed, &mut self.to_client);
        Ok(())
    }

    fn read_along(&mut self, tag: u8, body: std::ops::Range<usize>) {
        let mut body = &self.from_server[body];
        match tag {
            b'Z' => {
                self.greeted = true;
                if self.pipeline.transaction() == Transaction::Idle {
                    self.locals.end_transaction();
                }
            }
            b'K' => {
                let key = Bytes::copy_from_slice(body);
                let session = std::sync::Arc::clone(&self.cancelable);
                self.registered = Some(self.gateway.cancel_keys.register(key, session));
            }
            b'S' if cut_string(&mut body) == Some(b"standard_conforming_strings") => {
                self.conforming_strings = body.starts_with(b"on");
            }
            b'C' if matches!(cut_string(&mut body), Some(b"DISCARD ALL" | b"DEALLOCATE ALL")) => {
                self.locals.discard_all();
            }
            // The severity that is never translated comes among the first fields.
            b'E' => self.server_ended |= body.windows(7).any(|field| field == b"\0VFATAL" || field == b"\0VPANIC"),
            _ => {}
        }
    }
}
