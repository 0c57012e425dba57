//! A Bind message, read: which statement, which portal, and the values in whichever format the client sent them.

use pgerror::{PgError, SqlState};

use crate::frame::{cut_i16, cut_i32, cut_string};
use crate::local::utf8;

/// What a Bind message says.
pub(crate) struct Bound<'b> {
    pub(crate) portal: &'b [u8],
    pub(crate) name: &'b [u8],
    pub(crate) values: Vec<Given<'b>>,
    /// The values as they stand in the message, with their formats before them.
    pub(crate) given: &'b [u8],
    /// What stands behind the names: the same, and the formats of the result.
    pub(crate) rest: &'b [u8],
    /// The formats of the result's columns: none, one for all, or one for each.
    pub(crate) formats: Vec<i16>,
}

/// A value as the client gave it.
pub(crate) struct Given<'b> {
    binary: bool,
    bytes: Option<&'b [u8]>,
}

impl<'b> Bound<'b> {
    /// `None` when the message is cut short.
    pub(crate) fn read(mut body: &'b [u8]) -> Option<Self> {
        let portal = cut_string(&mut body)?;
        let name = cut_string(&mut body)?;
        let rest = body;
        let given = formats(&mut body)?;
        let mut values = Vec::new();
        for index in 0..usize::try_from(cut_i16(&mut body)?).ok()? {
            let bytes = match cut_i32(&mut body)? {
                -1 => None,
                length => {
                    let (bytes, rest) = body.split_at_checked(usize::try_from(length).ok()?)?;
                    body = rest;
                    Some(bytes)
                }
            };
            let format = if given.len() == 1 { given.first() } else { given.get(index) };
            values.push(Given { binary: format == Some(&1), bytes });
        }
        let given = &rest[..rest.len() - body.len()];
        let formats = formats(&mut body)?;
        Some(Self { portal, name, values, given, rest, formats })
    }
}

fn formats(body: &mut &[u8]) -> Option<Vec<i16>> {
    (0..cut_i16(body)?).map(|_| cut_i16(body)).collect()
}

/// The integers among the types that a client may give a parameter, by `pg_type.oid`: int8, int2, int4, oid.
const INTEGERS: [u32; 4] = [20, 21, 23, 26];

/// And the others whose binary form is read: bool, float4, float8.
const BOOL: u32 = 16;
const FLOATS: [u32; 2] = [700, 701];

/// And the texts: text, unknown, varchar, bpchar, name.
const TEXTS: [u32; 5] = [25, 705, 1043, 1042, 19];

impl Given<'_> {
    /// The value as text; `None` is NULL. It came in the type that the parameter has, which the client may have chosen.
    ///
    /// # Errors
    ///
    /// 22P03 for bytes that are no number, 22021 for a text that is not UTF-8, 0A000 for the binary form of another type.
    pub(crate) fn text(&self, oid: u32) -> Result<Option<String>, PgError> {
        let Some(bytes) = self.bytes else { return Ok(None) };
        if !self.binary || TEXTS.contains(&oid) {
            return Ok(Some(utf8(bytes)?.to_owned()));
        }
        let read = match oid {
            BOOL => truth(bytes),
            _ if FLOATS.contains(&oid) => float(bytes),
            _ if INTEGERS.contains(&oid) => integer(bytes, oid == INTEGERS[3]),
            _ => {
                let message =
                    "a parameter of a statement of Backhaul in binary form must be a text, a number or a truth value";
                return Err(PgError::new(SqlState::FEATURE_NOT_SUPPORTED, message)
                    .detail("Of the numbers, numeric has to be sent as text.")
                    .hint("Let the driver take the type that Describe gives, or send it as text."));
            }
        };
        let malformed = || {
            let message = "incorrect binary data format in bind parameter";
            PgError::new(SqlState::INVALID_BINARY_REPRESENTATION, message)
        };
        read.map(Some).ok_or_else(malformed)
    }
}

fn truth(bytes: &[u8]) -> Option<String> {
    match *bytes {
        [byte] => Some((byte != 0).to_string()),
        _ => None,
    }
}

fn integer(bytes: &[u8], unsigned: bool) -> Option<String> {
    let number = match *bytes {
        [a, b] => i64::from(i16::from_be_bytes([a, b])),
        [a, b, c, d] if unsigned => i64::from(u32::from_be_bytes([a, b, c, d])),
        [a, b, c, d] => i64::from(i32::from_be_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => i64::from_be_bytes([a, b, c, d, e, f, g, h]),
        _ => return None,
    };
    Some(number.to_string())
}

fn float(bytes: &[u8]) -> Option<String> {
    match *bytes {
        [a, b, c, d] => Some(f32::from_be_bytes([a, b, c, d]).to_string()),
        [a, b, c, d, e, f, g, h] => Some(f64::from_be_bytes([a, b, c, d, e, f, g, h]).to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_either_format() {
        let mut body = b"\0s\0".to_vec();
        body.extend([0, 2, 0, 1, 0, 0, 0, 3]);
        body.extend([0, 0, 0, 4, 0, 0, 0, 7, 0, 0, 0, 2, b'4', b'2', 0xff, 0xff, 0xff, 0xff, 0, 1, 0, 1]);
        let bound = Bound::read(&body).unwrap();
        let texts: Vec<_> = bound.values.iter().map(|value| value.text(23).unwrap()).collect();
        assert_eq!((bound.name, &bound.formats), (&b"s"[..], &vec![1]));
        assert_eq!(texts, [Some("7".to_owned()), Some("42".to_owned()), None]);
        assert_eq!(([bound.given, &[0, 1, 0, 1]].concat(), bound.rest), (body[3..].to_vec(), &body[3..]));
        let binary = |bytes: &[u8], oid| Given { binary: true, bytes: Some(bytes) }.text(oid);
        for (bytes, oid, expected) in [
            (b"1234".as_slice(), 25, Ok("1234")),
            (b"1234", 23, Ok("825373492")),
            (b"\xff\xff\xff\xff", 26, Ok("4294967295")),
            (b"\xff\xff", 21, Ok("-1")),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", 20, Ok("-2")),
            (b"123", 20, Err("22P03")),
            (b"\xff", 25, Err("22021")),
            (b"\0", 16, Ok("false")),
            (b"\x01", 16, Ok("true")),
            (b"\0\0", 16, Err("22P03")),
            (&1.5_f32.to_be_bytes(), 700, Ok("1.5")),
            (&65_536_f64.to_be_bytes(), 701, Ok("65536")),
            (b"123", 701, Err("22P03")),
            (b"1234", 1700, Err("0A000")),
        ] {
            let read = binary(bytes, oid);
            let read = read.as_ref().map(|text| text.as_deref().unwrap()).map_err(|error| error.code.as_str());
            assert_eq!(read, expected, "{bytes:?} as {oid}");
        }
        for short in 0..body.len() {
            assert!(Bound::read(&body[..short]).is_none(), "{short}");
        }
    }
}
