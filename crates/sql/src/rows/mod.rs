//! SHOW as a row source: a text of PostgreSQL's in which a SHOW of ours stands where a table could.
//!
//! `SELECT status FROM [SHOW JOB 1]`, `WITH j AS (SHOW JOBS) SELECT …`. The SHOW is found here, by the server's own
//! rules for what is code ([`crate::lexer`]), and read; somebody else runs it; and its rows, as a query that gives
//! them, take its place in the text that goes on to PostgreSQL. Every text that has one is a syntax error to a bare
//! server: nothing that it accepts has `SHOW` and another of our words behind `[`, nor at the beginning of a CTE's body.
//!
//! A SHOW may name its jobs by a query, which may have row sources again, no deeper than [`DEPTH_MAX`].

use std::ops::Range;

use pgerror::{PgError, SqlState};

use crate::lexer::{Kind, Lexer, Piece};
use crate::names::is_reserved;
use crate::parser::parse_nested;
use crate::scan::starts_ours;
use crate::statement::Statement;

/// Row sources may stand in each other's queries so deep; deeper ones are refused.
pub(crate) const DEPTH_MAX: usize = 8;

/// Before a source in brackets comes one of these words, a comma, or a parenthesis.
const BEFORE: [&str; 4] = ["FROM", "JOIN", "USING", "LATERAL"];

/// PostgreSQL's words that may be functions or types, and so no alias without `AS`; the reserved ones beside.
const NO_ALIAS: [&str; 23] = [
    "authorization",
    "binary",
    "collation",
    "concurrently",
    "cross",
    "current_schema",
    "freeze",
    "full",
    "ilike",
    "inner",
    "is",
    "isnull",
    "join",
    "left",
    "like",
    "natural",
    "notnull",
    "outer",
    "overlaps",
    "right",
    "similar",
    "tablesample",
    "verbose",
];

/// What keeps a query and not its rows, behind CREATE.
const KEEPS: [&str; 5] = ["VIEW", "FUNCTION", "PROCEDURE", "RULE", "POLICY"];

/// What may stand between CREATE and what is created.
const MODIFIERS: [&str; 9] =
    ["OR", "REPLACE", "TEMP", "TEMPORARY", "LOCAL", "GLOBAL", "UNLOGGED", "MATERIALIZED", "RECURSIVE"];

/// Whether a text of PostgreSQL's has a SHOW of ours as a row source.
///
/// Asked for every text of every client. Nearly all of them do not have the word, which is found out first.
pub fn has_row_source(text: &[u8]) -> bool {
    says_show(text) && Finder::new(text).next().is_some()
}

fn says_show(text: &[u8]) -> bool {
    // It has one `w`, so cutting the text there leaves it whole.
    let mut pieces = text.split_inclusive(|byte| matches!(byte, b'w' | b'W'));
    pieces.any(|piece| piece.last_chunk::<4>().is_some_and(|word| word.eq_ignore_ascii_case(b"show")))
}

/// A row source in a text, in bytes.
struct Found {
    /// From the opening bracket to behind the closing one.
    whole: Range<usize>,
    inside: Range<usize>,
    bracketed: bool,
    /// The statement that it stands in begins here.
    statement: usize,
}

/// Finds the row sources of a text, but not those inside of others.
struct Finder<'t> {
    text: &'t [u8],
    lexer: Lexer<'t>,
    before: Option<Piece<'t>>,
    statement: usize,
    /// A function's body has begun, whose semicolons do not end the statement.
    in_body: bool,
    /// Where in a list of CTEs the text is, for each bracket that is open.
    ctes: Vec<Cte>,
}

/// A place in `WITH a AS (…), b (x) AS MATERIALIZED (…)`. `AS (show jobs)` stands elsewhere, too: behind a function it
/// declares a column of the type `jobs`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cte {
    Outside,
    /// A name comes next.
    Name,
    /// The name has come, and its columns may have.
    Named,
    /// The body comes next.
    As,
    /// The body has come.
    Whole,
}

impl Cte {
    fn after(self, piece: &Piece<'_>) -> Self {
        let is_name = matches!(piece.kind, Kind::Word | Kind::Name);
        match self {
            Self::Name if piece.is_word("RECURSIVE") => Self::Name,
            Self::Name if is_name => Self::Named,
            // Its columns.
            Self::Named if piece.kind == Kind::Sign(b'(') => Self::Named,
            Self::Named if piece.is_word("AS") => Self::As,
            Self::As if piece.is_word("NOT") || piece.is_word("MATERIALIZED") => Self::As,
            Self::As if piece.kind == Kind::Sign(b'(') => Self::Whole,
            Self::Whole if piece.kind == Kind::Sign(b',') => Self::Name,
            _ if piece.is_word("WITH") => Self::Name,
            _ => Self::Outside,
        }
    }
}

impl<'t> Finder<'t> {
    fn new(text: &'t [u8]) -> Self {
        let (lexer, ctes) = (Lexer::new(text), vec![Cte::Outside]);
        Self { text, lexer, before: None, statement: 0, in_body: false, ctes }
    }

    /// Whether this piece opens a row source.
    fn opens(&self, piece: &Piece<'_>) -> bool {
        let stands = match (piece.kind, self.before) {
            (Kind::Sign(b'['), Some(before)) => {
                matches!(before.kind, Kind::Sign(b',' | b'(')) || BEFORE.iter().any(|word| before.is_word(word))
            }
            (Kind::Sign(b'('), _) => self.ctes.last() == Some(&Cte::As),
            _ => false,
        };
        stands && is_show(self.lexer.clone())
    }

    /// Takes note of a piece.
    fn pass(&mut self, piece: Piece<'t>) {
        if matches!(piece.kind, Kind::Sign(b']' | b')')) && self.ctes.len() > 1 {
            self.ctes.pop();
        } else if let Some(cte) = self.ctes.last_mut() {
            *cte = cte.after(&piece);
        }
        self.in_body |= piece.is_word("ATOMIC") && self.before.is_some_and(|before| before.is_word("BEGIN"));
        match piece.kind {
            Kind::Sign(b'[' | b'(') => self.ctes.push(Cte::Outside),
            Kind::Sign(b';') if !self.in_body => self.statement = piece.end(),
            _ => {}
        }
        self.before = Some(piece);
    }

    /// The closing bracket to the one that was just passed, itself passed.
    fn close(&mut self) -> Option<usize> {
        let depth = self.ctes.len();
        loop {
            let piece = self.lexer.next()?;
            self.pass(piece);
            if self.ctes.len() < depth {
                return Some(piece.start);
            }
        }
    }
}

impl Iterator for Finder<'_> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        loop {
            let piece = self.lexer.next()?;
            let (opens, statement) = (self.opens(&piece), self.statement);
            self.pass(piece);
            if opens {
                let close = self.close()?;
                let bracketed = piece.kind == Kind::Sign(b'[');
                let (whole, inside) = (piece.start..close + 1, piece.end()..close);
                let matches = self.text[close] == if bracketed { b']' } else { b')' };
                return matches.then_some(Found { whole, inside, bracketed, statement });
            }
        }
    }
}

/// Whether a SHOW of ours comes next.
fn is_show(mut rest: Lexer<'_>) -> bool {
    let mut first = true;
    let ours = starts_ours(|| {
        let word = rest.next().filter(|piece| piece.kind == Kind::Word)?;
        let is_it = !std::mem::take(&mut first) || word.is_word("SHOW");
        is_it.then_some(word.text)
    });
    ours && rest.next().is_none_or(|piece| piece.kind != Kind::Sign(b'.'))
}

/// A text of PostgreSQL's with its row sources, of which it may have none.
///
/// It may say anything, so its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Sourced {
    text: String,
    sources: Vec<RowSource>,
}

/// A SHOW of ours in a text of PostgreSQL's.
#[derive(Clone, PartialEq, Eq)]
pub struct RowSource {
    /// What it shows.
    pub statement: Statement,
    /// The characters of the text before the statement.
    pub before: usize,
    /// What its rows replace, in bytes.
    whole: Range<usize>,
    place: Place,
}

/// How rows are put into a text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Instead of brackets that have a name.
    Named,
    /// Instead of brackets without a name: they get one, which older servers demand.
    Nameless,
    /// Into the parentheses of a CTE, or as a whole text.
    Body,
}

impl std::fmt::Debug for Sourced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sourced(… {} …)", self.sources.len())
    }
}

impl Sourced {
    /// Reads a text.
    ///
    /// # Errors
    ///
    /// As [`crate::parse`] of a source; 42601 for several statements in one; 0A000 for a source in what is kept for
    /// later, whose rows would never change; 53400 for sources that are nested too deeply.
    pub fn read(text: &str) -> Result<Self, PgError> {
        Self::read_at(text, 0)
    }

    /// A statement of ours as the query of its rows, and nothing else.
    pub fn of(statement: Statement) -> Self {
        let source = RowSource { statement, before: 0, whole: 0..0, place: Place::Body };
        Self { text: String::new(), sources: vec![source] }
    }

    pub(crate) fn read_at(text: &str, depth: usize) -> Result<Self, PgError> {
        let (mut sources, mut counted) = (Vec::new(), (0, 0));
        for found in Finder::new(text.as_bytes()) {
            // Counted on from the source before, not from the start.
            let before = counted.1 + text[counted.0..found.inside.start].chars().count();
            counted = (found.inside.start, before);
            let wrong = |error: PgError| shifted(error, before);
            if depth >= DEPTH_MAX {
                let message = format!("row sources may not be nested deeper than {DEPTH_MAX}");
                return Err(wrong(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).at(1)));
            }
            if let Some(what) = keeps(&text.as_bytes()[found.statement..]) {
                return Err(wrong(kept(what)));
            }
            let mut parsed = parse_nested(&text[found.inside.clone()], depth + 1).map_err(wrong)?;
            let (Some(statement), true) = (parsed.pop(), parsed.is_empty()) else {
                let message = "a row source is one statement";
                return Err(wrong(PgError::new(SqlState::SYNTAX_ERROR, message).at(1)));
            };
            let (whole, place) = match (found.bracketed, is_named(&text.as_bytes()[found.whole.end..])) {
                (false, _) => (found.inside, Place::Body),
                (true, true) => (found.whole, Place::Named),
                (true, false) => (found.whole, Place::Nameless),
            };
            sources.push(RowSource { statement, before, whole, place });
        }
        Ok(Self { text: text.to_owned(), sources })
    }

    /// What it says.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its row sources, in order.
    pub fn sources(&self) -> &[RowSource] {
        &self.sources
    }

    pub(crate) fn sources_mut(&mut self) -> &mut [RowSource] {
        &mut self.sources
    }

    /// The numbers of the placeholders outside its sources, whose types are the server's to find.
    pub(crate) fn placeholders(&self) -> impl Iterator<Item = usize> {
        let outside = |piece: &Piece<'_>| !self.sources.iter().any(|source| source.whole.contains(&piece.start));
        let found =
            Lexer::new(self.text.as_bytes()).filter(move |piece| piece.kind == Kind::Parameter && outside(piece));
        found.filter_map(|piece| std::str::from_utf8(&piece.text[1..]).ok()?.parse().ok())
    }

    /// The text with these queries in the places of its sources, one for each.
    pub fn rewrite(&self, queries: Vec<Put>) -> Rewritten {
        let mut rewritten = Rewritten { text: String::new(), replaced: Vec::new() };
        let (mut done, mut old_chars, mut new_chars) = (0, 0, 0);
        for (number, (source, Put { text: query, inner })) in self.sources.iter().zip(queries).enumerate() {
            let kept = &self.text[done..source.whole.start];
            rewritten.text.push_str(kept);
            (old_chars, new_chars) = (old_chars + kept.chars().count(), new_chars + kept.chars().count());
            let put = match source.place {
                Place::Body => query,
                Place::Named => format!("({query})"),
                Place::Nameless => format!("({query}) AS backhaul_rows_{}", number + 1),
            };
            let (start, paren) = (new_chars, usize::from(source.place != Place::Body));
            new_chars += put.chars().count();
            old_chars += self.text[source.whole.clone()].chars().count();
            rewritten.text.push_str(&put);
            let inner = inner.map(|inner| Inner { at: start + paren + inner.at, ..inner });
            rewritten.replaced.push(Replaced { new: start..new_chars, old: source.before, old_end: old_chars, inner });
            done = source.whole.end;
        }
        rewritten.text.push_str(&self.text[done..]);
        rewritten
    }
}

/// What takes the place of a row source: a query.
pub struct Put {
    /// What it says.
    pub text: String,
    /// The part of it that stands in the source, too.
    pub inner: Option<Inner>,
}

impl From<String> for Put {
    fn from(text: String) -> Self {
        Self { text, inner: None }
    }
}

/// A part of a query that its source has, too, in whatever form.
pub struct Inner {
    /// The characters before it.
    pub at: usize,
    /// Its length in characters.
    pub length: usize,
    /// Where a position in it is in the source; both count characters, from 1.
    pub position: Box<dyn Fn(usize) -> usize + Send>,
}

/// A text in which something else stands in the places of row sources.
pub struct Rewritten {
    /// What goes to the server.
    pub text: String,
    replaced: Vec<Replaced>,
}

/// In characters.
struct Replaced {
    new: Range<usize>,
    /// Where the SHOW begins in the original.
    old: usize,
    /// Where the original goes on.
    old_end: usize,
    inner: Option<Inner>,
}

impl Replaced {
    /// Where something in what replaces the source is in the original, as characters before it.
    fn old(&self, at: usize) -> usize {
        let inside = self.inner.as_ref().filter(|inner| (inner.at..inner.at + inner.length).contains(&at));
        inside.map_or(self.old, |inner| self.old + (inner.position)(at - inner.at + 1).saturating_sub(1))
    }
}

impl Rewritten {
    /// Where a position in this text is in the original; positions count characters, from 1.
    pub fn position(&self, on_server: usize) -> usize {
        let at = on_server.saturating_sub(1);
        let behind = self.replaced.iter().rev().find(|replaced| replaced.new.start <= at);
        1 + match behind {
            None => at,
            Some(replaced) if at < replaced.new.end => replaced.old(at),
            Some(replaced) => replaced.old_end + at - replaced.new.end,
        }
    }
}

/// An error about a part of a text, as one about the text.
pub(crate) fn shifted(error: PgError, before: usize) -> PgError {
    match error.position {
        Some(position) => error.at(position + before),
        None => error,
    }
}

/// Whether an alias comes next.
fn is_named(rest: &[u8]) -> bool {
    Lexer::new(rest).next().is_some_and(|piece| match piece.kind {
        Kind::Name => true,
        Kind::Word => std::str::from_utf8(piece.text).is_ok_and(|word| {
            let word = word.to_ascii_lowercase();
            word == "as" || !is_reserved(&word) && NO_ALIAS.binary_search(&word.as_str()).is_err()
        }),
        _ => false,
    })
}

/// What a statement keeps for later with its text, if it does.
fn keeps(statement: &[u8]) -> Option<String> {
    let mut words = Lexer::new(statement).take_while(|piece| piece.kind == Kind::Word);
    let first = words.next()?;
    if first.is_word("PREPARE") {
        return Some("a statement of PREPARE".to_owned());
    }
    let made = words.find(|word| !MODIFIERS.iter().any(|modifier| word.is_word(modifier)))?;
    let kind = KEEPS.iter().find(|kind| made.is_word(kind)).filter(|_| first.is_word("CREATE"))?;
    Some(format!("a {}", kind.to_ascii_lowercase()))
}

fn kept(what: String) -> PgError {
    PgError::new(SqlState::FEATURE_NOT_SUPPORTED, format!("{what} cannot have SHOW as a row source"))
        .hint("Its rows would never change. Keep them in a table, with CREATE TABLE … AS SELECT, or send the query itself.")
        .at(1)
}

#[cfg(test)]
mod tests;
