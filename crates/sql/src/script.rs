//! A text of several statements, of which some are ours and some PostgreSQL's: `BEGIN; BACKUP …; COMMIT`.
//!
//! A bare server refuses such a text, because it parses all of it first (or, if ours are only SHOWs, fails when it comes to
//! the first of them). It is cut here by the server's own rules for what is code, so that each statement can be
//! run by whom it belongs to, in order. A semicolon in parentheses, or in the body of a function, ends nothing.

use std::ops::Range;

use pgerror::PgError;

use crate::lexer::{Kind, Lexer, is_blank};
use crate::parser::{needs_detached, parse_nested, waits};
use crate::rows::{Sourced, shifted};
use crate::scan::is_ours;
use crate::statement::Statement;

/// A statement of a text of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it says.
    pub work: PartWork,
    /// The characters of the text before it.
    pub before: usize,
}

/// Whose statement it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartWork {
    /// Ours.
    Ours(Statement),
    /// PostgreSQL's, perhaps with row sources of ours.
    Theirs(Sourced),
}

/// Whether a text has several statements, of which some are ours and some are not.
///
/// Asked for every text of every client; nearly all of them are one statement, which is found out first.
pub fn is_mixed(text: &[u8]) -> bool {
    let Some(end) = text.iter().position(|byte| *byte == b';') else { return false };
    if text[end + 1..].trim_ascii().is_empty() {
        return false;
    }
    let mut seen = [false; 2];
    for range in statements(text) {
        seen[usize::from(is_ours(&text[range]))] = true;
        if seen == [true; 2] {
            return true;
        }
    }
    false
}

/// Reads a text of which [`is_mixed`] is true.
///
/// # Errors
///
/// As [`crate::parse`] and [`Sourced::read`] of each statement, with positions in the whole text. XXUUU, CockroachDB's
/// text, for a `BACKUP` or a `RESTORE` that is not detached: its job would run while the transaction of the others is open.
pub fn read_mixed(text: &str) -> Result<Vec<Part>, PgError> {
    let (mut parts, mut counted) = (Vec::new(), (0, 0));
    for range in statements(text.as_bytes()) {
        // Counted on from the statement before, not from the start.
        let before = counted.1 + text[counted.0..range.start].chars().count();
        counted = (range.start, before);
        let wrong = |error: PgError| shifted(error, before);
        let statement = &text[range];
        if !is_ours(statement.as_bytes()) {
            let work = PartWork::Theirs(Sourced::read(statement).map_err(wrong)?);
            parts.push(Part { work, before });
            continue;
        }
        for ours in parse_nested(statement, 0).map_err(wrong)? {
            if waits(&ours) {
                let blank = statement.chars().take_while(|char| char.is_whitespace()).count();
                return Err(wrong(needs_detached(ours.tag(), 1 + blank)));
            }
            parts.push(Part { work: PartWork::Ours(ours), before });
        }
    }
    Ok(parts)
}

/// The statements of a text, in bytes, each from the end of the one before, without the semicolon; empty ones are left out.
fn statements(text: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let (mut lexer, mut start) = (Lexer::new(text), 0);
    // A function's body has semicolons of its own, and where it ends is not known here: nothing behind it is cut.
    let (mut depth, mut in_body, mut after_begin) = (0_usize, false, false);
    std::iter::from_fn(move || {
        loop {
            let piece = lexer.next();
            let end = match &piece {
                Some(piece) if piece.kind == Kind::Sign(b';') && depth == 0 && !in_body => piece.start,
                // What never ends belongs to the statement.
                None if start < text.len() => text.len(),
                None => return None,
                Some(piece) => {
                    match piece.kind {
                        Kind::Sign(b'(' | b'[') => depth += 1,
                        Kind::Sign(b')' | b']') => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    in_body |= after_begin && piece.is_word("ATOMIC");
                    after_begin = piece.is_word("BEGIN");
                    continue;
                }
            };
            let range = start..end;
            start = piece.as_ref().map_or(text.len(), |_| end + 1);
            after_begin = false;
            // A comment alone is no statement, behind the last semicolon either; what never ends is one.
            if !is_blank(&text[range.clone()]) {
                return Some(range);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<&str> {
        statements(text.as_bytes()).map(|range| text[range].trim()).collect()
    }

    #[test]
    fn a_text_is_cut_where_the_server_cuts_it() {
        for (text, expected) in [
            ("BEGIN; SHOW JOBS; COMMIT", vec!["BEGIN", "SHOW JOBS", "COMMIT"]),
            (" ;; a ;/* b; */; -- c;\n d;", vec!["a", "-- c;\n d"]),
            ("a';';b\";\";c $$;$$;d$e$;f$e$", vec!["a';'", "b\";\"", "c $$;$$", "d$e$", "f$e$"]),
            ("DO INSTEAD (a; b); c", vec!["DO INSTEAD (a; b)", "c"]),
            ("a; BEGIN ATOMIC b; END; c", vec!["a", "BEGIN ATOMIC b; END; c"]),
            ("a; 'b; c", vec!["a", "'b; c"]),
            ("a) ; b", vec!["a)", "b"]),
            ("é; ü", vec!["é", "ü"]),
            ("a; -- b", vec!["a"]),
            ("a; /* b; */ \n", vec!["a"]),
            ("a; /* b", vec!["a", "/* b"]),
            ("-- a\n; b", vec!["b"]),
            ("-- a", vec![]),
            (";", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(cut(text), expected, "{text}");
        }
    }

    #[test]
    fn a_text_is_mixed_when_it_has_ours_and_theirs() {
        for (text, mixed) in [
            ("BEGIN; BACKUP DATABASE a INTO 'x' WITH DETACHED; COMMIT", true),
            ("SHOW JOBS; SELECT 1", true),
            ("SELECT 1; /* x */ show jobs", true),
            ("SHOW JOBS; SHOW NODES;", false),
            ("SELECT 1; SELECT 2", false),
            ("SELECT 1; SHOW jobs.x", false),
            ("SELECT ';SHOW JOBS'", false),
            ("SELECT '; SHOW JOBS; '", false),
            ("SELECT 1; -- SHOW JOBS", false),
            ("SELECT $$;$$, (1; SHOW JOBS)", false),
            ("SHOW JOBS; \"backup\" DATABASE a INTO 'x'", true),
            ("SHOW JOBS;\n\t", false),
            ("SHOW JOBS; -- nightly", false),
            ("BACKUP DATABASE a INTO 'x'; /* app */ ; -- b", false),
            ("; SHOW JOBS", false),
            ("; SHOW JOBS; SELECT 1", true),
            ("SHOW JOBS; /* open", true),
            ("SELECT 1;", false),
        ] {
            assert_eq!(is_mixed(text.as_bytes()), mixed, "{text}");
        }
    }

    #[test]
    fn statements_are_read_in_their_order_with_their_places() {
        let parts = read_mixed("/* é */ BEGIN;SHOW JOBS SELECT 1; ;SELECT 'é;'").unwrap();
        let read: Vec<(usize, bool)> =
            parts.iter().map(|part| (part.before, matches!(part.work, PartWork::Ours(_)))).collect();
        assert_eq!(read, [(0, false), (14, true), (35, false)]);
        for (text, code, position) in [
            ("SELECT 'é'; SHOW JOBS x", "42601", 23),
            ("SELECT 1; BACKUP DATABASE a INTO 'x'", "XXUUU", 11),
            ("RESTORE DATABASE a FROM LATEST IN 'x'; SELECT 1", "XXUUU", 1),
            ("SHOW JOBS; SELECT * FROM [SHOW JOBS x]", "42601", 37),
            ("SHOW JOBS; CREATE VIEW v AS SELECT * FROM [SHOW JOBS]", "0A000", 44),
        ] {
            let error = read_mixed(text).unwrap_err();
            assert_eq!((error.code.as_str(), error.position), (code, Some(position)), "{text}");
        }
    }
}
