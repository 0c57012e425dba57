//! What one side has sent: frames that were judged, and bytes that were not.

use bytes::{Buf as _, Bytes, BytesMut};

/// A buffer of frames. Judged frames at its front go on or are thrown away as their bytes come in, so that a long one
/// is never held whole; behind them is what has not been looked at.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    pub(crate) bytes: BytesMut,
    /// Bytes at the front that go on with the next [`Inbound::pass_on`].
    passed: usize,
    /// Bytes of a judged frame that are still to come and will pass.
    pass: usize,
    /// Bytes of a judged frame that are still to come and will be thrown away.
    drop: usize,
}

impl Inbound {
    /// What has not been judged.
    pub(crate) fn unjudged(&self) -> &[u8] {
        &self.bytes[self.passed..]
    }

    /// How much has been judged to go on and is still here.
    pub(crate) fn waiting(&self) -> usize {
        self.passed
    }

    /// Whether the last byte that went on was the last of its frame: only then may something be said in between.
    pub(crate) fn is_between_frames(&self) -> bool {
        self.pass == 0 && self.drop == 0
    }

    /// The next `len` bytes pass.
    pub(crate) fn pass(&mut self, len: usize) {
        self.pass += len;
    }

    /// The next `len` bytes are thrown away.
    pub(crate) fn discard(&mut self, len: usize) {
        self.drop += len;
    }

    /// Moves over what has been judged; false while more of it has to come in first.
    pub(crate) fn settle(&mut self, out: &mut BytesMut) -> bool {
        let pass = self.unjudged().len().min(self.pass);
        self.pass -= pass;
        self.passed += pass;
        if self.drop > 0 {
            self.pass_on(out);
            let drop = self.bytes.len().min(self.drop);
            self.drop -= drop;
            self.bytes.advance(drop);
        }
        self.is_between_frames()
    }

    /// Takes the next `len` bytes out; what was judged before goes on first.
    pub(crate) fn take(&mut self, len: usize, out: &mut BytesMut) -> Bytes {
        self.pass_on(out);
        self.bytes.split_to(len).freeze()
    }

    /// Moves what passes on to `out`, without copying where nothing else waits there.
    pub(crate) fn pass_on(&mut self, out: &mut BytesMut) {
        let chunk = self.bytes.split_to(std::mem::take(&mut self.passed));
        if out.is_empty() {
            *out = chunk;
        } else {
            out.extend_from_slice(&chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_pass_and_go_piece_by_piece() {
        let mut inbound = Inbound::default();
        let mut out = BytesMut::new();
        inbound.bytes.extend_from_slice(b"pass");
        inbound.pass(6);
        assert!(!inbound.settle(&mut out) && !inbound.is_between_frames());
        inbound.pass_on(&mut out);
        assert_eq!(&out[..], b"pass");

        inbound.bytes.extend_from_slice(b"eddrop");
        assert!(inbound.settle(&mut out) && inbound.unjudged() == b"drop");
        inbound.discard(6);
        assert!(!inbound.settle(&mut out));
        inbound.bytes.extend_from_slice(b"edtaken");
        assert!(inbound.settle(&mut out) && inbound.unjudged() == b"taken");
        assert_eq!(&inbound.take(5, &mut out)[..], b"taken");
        assert_eq!(&out[..], b"passed");
    }
}
