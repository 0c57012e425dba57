//! PostgreSQL's own way of cutting a text into pieces, as far as it takes to know what is code and what is not.
//!
//! sqlparser's tokenizer reads statements of ours. A text of PostgreSQL's is read here instead, by the server's rules
//! (`src/backend/parser/scan.l`), because a bracket that the server takes for a part of a literal must not be taken
//! for code. Bytes, not characters: every encoding of a server agrees with ASCII on all that matters here. Texts are
//! read as with `standard_conforming_strings`, without which the gateway looks at none.

/// What a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A bare word.
    Word,
    /// A name in double quotes.
    Name,
    /// A literal or a number.
    Literal,
    /// `$1`.
    Parameter,
    /// Any other byte.
    Sign(u8),
}

/// A piece of a text that means something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'t> {
    pub(crate) kind: Kind,
    /// Where it begins, in bytes.
    pub(crate) start: usize,
    pub(crate) text: &'t [u8],
}

impl Piece<'_> {
    pub(crate) fn is_word(&self, wanted: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(wanted.as_bytes())
    }

    /// Where it ends, in bytes.
    pub(crate) fn end(&self) -> usize {
        self.start + self.text.len()
    }
}

/// Gives the pieces of a text in order, up to its end or to something that never ends.
#[derive(Clone, Debug)]
pub(crate) struct Lexer<'t> {
    text: &'t [u8],
    at: usize,
}

impl<'t> Lexer<'t> {
    pub(crate) fn new(text: &'t [u8]) -> Self {
        Self { text, at: 0 }
    }

    fn rest(&self) -> &'t [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Skips white space and comments; false when a comment never ends.
    fn skip_blank(&mut self) -> bool {
        loop {
            self.at += run(self.rest(), is_space);
            if self.rest().starts_with(b"--") {
                self.at += run(self.rest(), |byte| !matches!(byte, b'\n' | b'\r'));
            } else if self.rest().starts_with(b"/*") {
                let Some(length) = block_comment(self.rest()) else { return false };
                self.at += length;
            } else {
                return true;
            }
        }
    }

    /// The kind and the length of what begins here; `None` when it never ends.
    fn piece(&self) -> Option<(Kind, usize)> {
        let rest = self.rest();
        Some(match *rest.first()? {
            b'\'' => (Kind::Literal, quoted(rest, b'\'')?),
            b'"' => (Kind::Name, quoted(rest, b'"')?),
            b'e' | b'E' if rest.get(1) == Some(&b'\'') => (Kind::Literal, 1 + escaped(&rest[1..])?),
            byte if is_letter(byte) => (Kind::Word, run(rest, is_in_word)),
            // What follows the digits is a word of its own, as servers before 15 read it.
            byte if byte.is_ascii_digit() => (Kind::Literal, run(rest, |byte| byte.is_ascii_digit() || byte == b'.')),
            b'$' => match rest.get(1) {
                Some(byte) if byte.is_ascii_digit() => {
                    (Kind::Parameter, 1 + run(&rest[1..], |byte| byte.is_ascii_digit()))
                }
                _ => match dollar_tag(rest) {
                    Some(tag) => (Kind::Literal, 2 * tag.len() + find(&rest[tag.len()..], tag)?),
                    None => (Kind::Sign(b'$'), 1),
                },
            },
            byte => (Kind::Sign(byte), 1),
        })
    }
}

impl<'t> Iterator for Lexer<'t> {
    type Item = Piece<'t>;

    fn next(&mut self) -> Option<Piece<'t>> {
        let found = if self.skip_blank() { self.piece() } else { None };
        let Some((kind, length)) = found else {
            self.at = self.text.len();
            return None;
        };
        let piece = Piece { kind, start: self.at, text: &self.rest()[..length] };
        self.at += length;
        Some(piece)
    }
}

/// Whether a text has nothing but white space and comments; one that never ends is more.
pub(crate) fn is_blank(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    lexer.skip_blank() && lexer.rest().is_empty()
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || !byte.is_ascii()
}

fn is_in_word(byte: u8) -> bool {
    is_letter(byte) || byte.is_ascii_digit() || byte == b'$'
}

/// How many bytes at the front are such.
fn run(text: &[u8], such: impl Fn(u8) -> bool) -> usize {
    text.iter().position(|byte| !such(*byte)).unwrap_or(text.len())
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

/// The length of a block comment; they nest.
fn block_comment(text: &[u8]) -> Option<usize> {
    let (mut at, mut depth) = (2, 1_usize);
    while depth > 0 {
        match text.get(at..at + 2)? {
            b"/*" => (at, depth) = (at + 2, depth + 1),
            b"*/" => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    Some(at)
}

/// The length of what stands in these quotes; doubled, they stand for themselves.
fn quoted(text: &[u8], quote: u8) -> Option<usize> {
    let mut at = 1;
    loop {
        at += text.get(at..)?.iter().position(|byte| *byte == quote)? + 1;
        if text.get(at) != Some(&quote) {
            return Some(at);
        }
        at += 1;
    }
}

/// The length of a literal in which a backslash escapes, from its first quote on. Further parts, each on a line of its
/// own, belong to it and have no `E` before them.
fn escaped(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        at += text.get(at..)?.iter().position(|byte| matches!(byte, b'\\' | b'\''))?;
        if text[at] == b'\\' || text.get(at + 1) == Some(&b'\'') {
            at += 2;
            continue;
        }
        at += 1;
        let rest = &text[at..];
        let mut between = Lexer::new(rest);
        let goes_on = between.skip_blank() && between.rest().first() == Some(&b'\'');
        let blank = &rest[..between.at.min(rest.len())];
        if !goes_on || find(blank, b"/*").is_some() || !blank.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            return Some(at);
        }
        at += blank.len() + 1;
    }
}

/// `$tag$`, with which a dollar-quoted literal begins.
fn dollar_tag(text: &[u8]) -> Option<&[u8]> {
    let length = 1 + run(&text[1..], |byte| is_in_word(byte) && byte != b'$');
    let tag = text.get(..=length)?;
    (tag[length] == b'$' && !tag[1].is_ascii_digit()).then_some(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<String> {
        Lexer::new(text.as_bytes()).map(|piece| String::from_utf8_lossy(piece.text).into_owned()).collect()
    }

    #[test]
    fn a_text_is_cut_as_the_server_cuts_it() {
        for (text, expected) in [
            ("a b.c", vec!["a", "b", ".", "c"]),
            ("a$b$ $1$2", vec!["a$b$", "$1", "$2"]),
            ("'a''b' \"c\"\"d\"", vec!["'a''b'", "\"c\"\"d\""]),
            (r"'a\' b", vec![r"'a\'", "b"]),
            (r"E'a\' b' c", vec![r"E'a\' b'", "c"]),
            (r"e'a''\\' b", vec![r"e'a''\\'", "b"]),
            ("E'a'\n'b\\' c' d", vec!["E'a'\n'b\\' c'", "d"]),
            ("E'a' -- x\n '\\' c' d", vec!["E'a' -- x\n '\\' c'", "d"]),
            (r"E'a' 'b\' c", vec!["E'a'", r"'b\'", "c"]),
            ("E'a' /* x\n*/ 'b\\' c", vec!["E'a'", "'b\\'", "c"]),
            ("$$ a ' $$ b", vec!["$$ a ' $$", "b"]),
            ("$x$ $y$ $$ $x$ b", vec!["$x$ $y$ $$ $x$", "b"]),
            ("1$x$ a $x$", vec!["1", "$x$ a $x$"]),
            ("a -- b\rc --", vec!["a", "c"]),
            ("a*/*b /* c */ */d", vec!["a", "*", "d"]),
            ("1.5e3 éa", vec!["1.5", "e3", "éa"]),
            ("U&'a\\' b", vec!["U", "&", "'a\\'", "b"]),
            ("a 'b", vec!["a"]),
            ("a /* b", vec!["a"]),
            ("a $x$ b", vec!["a"]),
            ("a E'b\\", vec!["a"]),
            ("$", vec!["$"]),
            ("", vec![]),
        ] {
            assert_eq!(pieces(text), expected, "{text}");
        }
    }
}
