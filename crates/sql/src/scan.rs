//! Whose statement is it? Asked for every text a client sends, so it reads a few words and no more.

/// The pairs of first words that make a text ours. Each is rejected by a bare PostgreSQL (`SHOW` of an unknown name:
/// 42704); a test of the whole system proves it for every statement in `sql-fixtures/`.
const OURS: [[&str; 2]; 2] = [["SHOW", "LOCALITY"], ["SHOW", "NODES"]];

/// Whether a text begins with one of our statements.
///
/// Reads raw bytes in any client encoding that agrees with ASCII on letters, white space and comment signs, which is
/// every encoding that PostgreSQL allows on the wire for these characters in this place: before the first word.
pub fn is_ours(text: &[u8]) -> bool {
    let mut rest = text;
    let (Some(first), Some(second)) = (next_word(&mut rest), next_word(&mut rest)) else {
        return false;
    };
    // SHOW nodes.x is a setting of that name.
    starts_ours(first, second) && !skip_blank(rest).is_some_and(|rest| rest.starts_with(b"."))
}

/// The same rule for words that are already cut.
pub(crate) fn starts_ours(first: &[u8], second: &[u8]) -> bool {
    OURS.iter().any(|[a, b]| first.eq_ignore_ascii_case(a.as_bytes()) && second.eq_ignore_ascii_case(b.as_bytes()))
}

/// Cuts the next bare word off the front of `text`; `None` when something else comes first.
fn next_word<'t>(text: &mut &'t [u8]) -> Option<&'t [u8]> {
    *text = skip_blank(text)?;
    let end = text.iter().position(|b| !b.is_ascii_alphanumeric() && *b != b'_').unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    // A word that runs on in bytes above ASCII is a longer identifier, not our keyword.
    if word.is_empty() || rest.first().is_some_and(|b| !b.is_ascii()) {
        return None;
    }
    *text = rest;
    Some(word)
}

/// Skips white space and comments; `None` when a comment never ends.
fn skip_blank(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        text = text.trim_ascii_start();
        if let Some(rest) = text.strip_prefix(b"--") {
            let end = rest.iter().position(|b| *b == b'\n')?;
            text = &rest[end..];
        } else if let Some(rest) = text.strip_prefix(b"/*") {
            text = skip_block_comment(rest)?;
        } else {
            return Some(text);
        }
    }
}

/// Skips to behind the end of a block comment; they nest, as in PostgreSQL.
fn skip_block_comment(mut text: &[u8]) -> Option<&[u8]> {
    let mut depth = 1;
    while depth > 0 {
        if let Some(rest) = text.strip_prefix(b"/*") {
            depth += 1;
            text = rest;
        } else if let Some(rest) = text.strip_prefix(b"*/") {
            depth -= 1;
            text = rest;
        } else {
            text = text.get(1..)?;
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_first_words_make_a_text_ours() {
        for (text, ours) in [
            ("SHOW LOCALITY", true),
            ("  show\n\tlocality;", true),
            ("-- a comment\nSHOW NODES", true),
            ("/* one /* nested */ */ show /* two */ nodes", true),
            ("SHOW LOCALITY; SELECT 1", true),
            ("SHOW nodes.x", false),
            ("SHOW nodes /* a setting */ . x", false),
            ("SHOW locality_of", false),
            ("SHOW localityé", false),
            ("SHOW backhaul.target", false),
            ("SHOW \"locality\"", false),
            ("SHOW", false),
            ("SELECT 'SHOW LOCALITY'", false),
            ("/* SHOW LOCALITY", false),
            ("-- SHOW LOCALITY", false),
            ("", false),
            (";SHOW LOCALITY", false),
        ] {
            assert_eq!(is_ours(text.as_bytes()), ours, "{text}");
        }
    }

    #[test]
    fn bytes_of_another_encoding_are_not_ours_and_do_no_harm() {
        assert!(!is_ours(b"SELECT '\xe9'"));
        assert!(is_ours(b"/* \xe9 */ SHOW NODES"));
        assert!(!is_ours(b"SHOW\xa0NODES"));
    }
}
