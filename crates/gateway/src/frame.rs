//! Frames: the units that the relay passes on byte for byte.

use pgerror::{PgError, SqlState};

/// The longest frame that is let through, in bytes; PostgreSQL itself refuses longer ones.
const FRAME_MAX: usize = 1 << 30;

/// A frame's first bytes, read and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The message type.
    pub(crate) tag: u8,
    /// The whole frame's length, the tag and the length field included.
    pub(crate) len: usize,
}

/// Reads the header at the front of `bytes`; `None` while it is not all there.
///
/// # Errors
///
/// 08P01 for a length that cannot be: nothing behind it can be told apart any more, so the connection has to end.
pub(crate) fn header(bytes: &[u8]) -> Result<Option<Header>, PgError> {
    let Some((&tag, rest)) = bytes.split_first() else { return Ok(None) };
    let Some(length) = rest.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if !(4..=FRAME_MAX).contains(&length) {
        let message = format!("invalid message length {length} of message type \"{}\"", tag.escape_ascii());
        return Err(PgError::new(SqlState::PROTOCOL_VIOLATION, message));
    }
    Ok(Some(Header { tag, len: length + 1 }))
}

/// The length of the whole frames of rows or COPY data at the front of `bytes`. They are most of what ever passes, and
/// nothing about them has to be noted.
pub(crate) fn data_run(bytes: &[u8]) -> usize {
    let mut run = 0;
    while let Some([tag, a, b, c, d]) = bytes.get(run..).and_then(|rest| rest.first_chunk::<5>()) {
        let len = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if !matches!(tag, b'd' | b'D') || len < 4 || bytes.len() - run <= len {
            break;
        }
        run += len + 1;
    }
    run
}

/// Cuts a NUL-terminated string off the front of `bytes`; `None` when no NUL is there.
pub(crate) fn cut_string<'b>(bytes: &mut &'b [u8]) -> Option<&'b [u8]> {
    let end = bytes.iter().position(|b| *b == 0)?;
    let (string, rest) = bytes.split_at(end);
    *bytes = &rest[1..];
    Some(string)
}

/// Cuts a big-endian 16-bit number off the front of `bytes`.
pub(crate) fn cut_i16(bytes: &mut &[u8]) -> Option<i16> {
    let (number, rest) = bytes.split_first_chunk::<2>()?;
    *bytes = rest;
    Some(i16::from_be_bytes(*number))
}

/// Cuts a big-endian 32-bit number off the front of `bytes`.
pub(crate) fn cut_i32(bytes: &mut &[u8]) -> Option<i32> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(i32::from_be_bytes(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_data_ends_before_anything_else() {
        let row = |body: &[u8]| [b"D\0\0\0".as_slice(), &[4 + body.len() as u8], body].concat();
        let (one, two) = (row(b"one"), row(b""));
        for (bytes, run) in [
            (vec![], 0),
            ([one.clone(), two.clone()].concat(), one.len() + two.len()),
            ([one.clone(), two[..4].to_vec()].concat(), one.len()),
            ([one.clone(), one[..7].to_vec()].concat(), one.len()),
            ([two.clone(), b"Z\0\0\0\x05I".to_vec()].concat(), two.len()),
            (b"d\0\0\0\x03abc".to_vec(), 0),
            (b"d\xff\xff\xff\xffabc".to_vec(), 0),
            (b"C\0\0\0\x04".to_vec(), 0),
        ] {
            assert_eq!(data_run(&bytes), run, "{bytes:?}");
        }
    }

    #[test]
    fn a_length_that_lies_ends_the_connection() {
        for (bytes, expected) in [
            (b"".as_slice(), Some(None)),
            (b"Q\0\0\0", Some(None)),
            (b"Q\0\0\0\x04", Some(Some(Header { tag: b'Q', len: 5 }))),
            (b"d\x3f\xff\xff\xff", Some(Some(Header { tag: b'd', len: 1 << 30 }))),
            (b"Q\0\0\0\x03", None),
            (b"Q\0\0\0\0", None),
            (b"Q\xff\xff\xff\xff", None),
            (b"d\x40\0\0\x01", None),
        ] {
            let read = header(bytes);
            assert_eq!(read.clone().ok(), expected, "{bytes:?}");
            if let Err(error) = read {
                assert_eq!(error.code, SqlState::PROTOCOL_VIOLATION);
            }
        }
    }
}
