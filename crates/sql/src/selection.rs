//! Which jobs a statement is about: ids, or an expression or a query of PostgreSQL's that gives ids.
//!
//! Either is the user's own. It is not understood here, only cut out of the text, and runs in the user's session on
//! the server, with the user's rights and in the user's transaction. Its place is kept, so that a position in an error
//! of the server can be made one in the statement.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::rows::{Rewritten, Sourced, shifted};
use crate::statement::Number;

/// The words that a query begins with.
pub(crate) const QUERIES: [&str; 4] = ["SELECT", "WITH", "TABLE", "VALUES"];

/// The words by which a query goes on behind rows.
const GOES_ON: [&str; 8] = ["UNION", "INTERSECT", "EXCEPT", "ORDER", "LIMIT", "OFFSET", "FETCH", "FOR"];

/// A query may name so many jobs; a statement whose query gives more fails.
pub const IDS_MAX: usize = 1000;

/// Jobs as a statement names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// By their ids, in order, repetitions kept.
    Ids(Vec<Number>),
    /// By a query of PostgreSQL's that gives their ids.
    Query(Query),
    /// `ALL BACKUP JOBS`: every job of a kind that the request can be made of.
    All(JobKind),
}

/// A kind of job in `ALL … JOBS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// `BACKUP`.
    Backup,
    /// `RESTORE`.
    Restore,
}

/// A query in a statement of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// What it says, which may have row sources of ours.
    pub sourced: Sourced,
    /// The characters before it in the statement's text.
    pub before: usize,
    form: Form,
}

/// How a query is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Rows of ids.
    Rows,
    /// In parentheses where one value is wanted; PostgreSQL refuses it if it gives several.
    Value,
    /// No query, but what may stand in one for a value. It is sent in `VALUES`, where PostgreSQL refuses whatever gives
    /// several, or counts what is not there.
    Expression,
}

impl Query {
    pub(crate) fn new(text: &str, before: usize, form: Form, depth: usize) -> Result<Self, PgError> {
        let sourced = Sourced::read_at(text, depth).map_err(|error| shifted(error, before))?;
        Ok(Self { sourced, before, form })
    }

    /// In canonical form, behind `JOBS`.
    pub(crate) fn print(&self) -> String {
        let text = self.sourced.text();
        match self.form {
            Form::Rows | Form::Value => text.to_owned(),
            Form::Expression => format!("VALUES ({text})"),
        }
    }

    /// What the server is to run, with rows in the places of row sources. Its first column has the ids; of too many rows
    /// it gives one more than [`IDS_MAX`].
    ///
    /// As a part of another query it has no INSERT, UPDATE, DELETE or INTO: PostgreSQL refuses them. Its last line may be a comment, which
    /// ends before ours begins.
    pub fn for_server(&self, rewritten: &Rewritten) -> String {
        let (head, text) = (self.head(), &rewritten.text);
        match self.form {
            Form::Value => format!("{head}{text}"),
            Form::Expression => format!("{head}{text}\n)"),
            Form::Rows => format!("{head}{text}\n) AS named LIMIT {}", IDS_MAX + 1),
        }
    }

    /// Where a position in what the server ran is in the statement's text.
    pub fn position(&self, rewritten: &Rewritten, on_server: usize) -> usize {
        rewritten.position(on_server.saturating_sub(self.head().len()).max(1)) + self.before
    }

    fn head(&self) -> &'static str {
        match self.form {
            Form::Value => "SELECT ",
            Form::Expression => "VALUES (",
            Form::Rows => "SELECT * FROM (",
        }
    }
}

/// What follows `JOB`: one id, or a query in parentheses or an expression for it. An expression begins with a word or a
/// sign, or goes on behind an id with an operator or a cast; anything else that is no id is refused where it stands.
pub(crate) fn one(cursor: &mut Cursor<'_>) -> Result<Selection, PgError> {
    let begun = cursor.place();
    if !cursor.at_expression() {
        let plain = plain(cursor);
        let goes_on = cursor.at_operator() || plain.is_err() && at_value(cursor);
        if !goes_on || cursor.is_at(&begun) {
            return plain;
        }
    }
    cursor.return_to(begun);
    cursor.value().map(Selection::Query)
}

/// Whether what is no id may still be a part of an expression.
fn at_value(cursor: &Cursor<'_>) -> bool {
    cursor.at_expression() || cursor.at(&Token::LParen)
}

fn plain(cursor: &mut Cursor<'_>) -> Result<Selection, PgError> {
    if cursor.is_query_in_parentheses(&QUERIES) {
        return cursor.query(Form::Value).map(Selection::Query);
    }
    let parentheses = open(cursor);
    let id = cursor.number()?;
    close(cursor, parentheses)?;
    Ok(Selection::Ids(vec![id]))
}

/// What follows `JOBS`: rows of ids, or a query for them. Rows that say more than ids, or go on behind them, are a query.
pub(crate) fn several(cursor: &mut Cursor<'_>) -> Result<Selection, PgError> {
    if at_any(cursor, &QUERIES[..3]) || cursor.is_query_in_parentheses(&QUERIES[..3]) {
        return cursor.query(Form::Rows).map(Selection::Query);
    }
    let begun = cursor.place();
    let parentheses = open(cursor);
    cursor.expect_words(&["VALUES"])?;
    let ids = values(cursor).and_then(|ids| close(cursor, parentheses).map(|()| ids));
    let says_more = ids.is_err() && (at_value(cursor) || cursor.at_operator() || at_any(cursor, &QUERIES));
    if says_more || at_any(cursor, &GOES_ON) {
        cursor.return_to(begun);
        return cursor.query(Form::Rows).map(Selection::Query);
    }
    ids.map(Selection::Ids)
}

fn at_any(cursor: &Cursor<'_>, words: &[&str]) -> bool {
    words.iter().any(|word| cursor.at_word(word))
}

/// `(1), (2)`.
fn values(cursor: &mut Cursor<'_>) -> Result<Vec<Number>, PgError> {
    let mut ids = Vec::new();
    loop {
        cursor.expect(&Token::LParen)?;
        let parentheses = open(cursor);
        ids.push(cursor.number()?);
        close(cursor, parentheses + 1)?;
        if !cursor.eat(&Token::Comma) {
            return Ok(ids);
        }
    }
}

fn open(cursor: &mut Cursor<'_>) -> usize {
    let mut count = 0;
    while cursor.eat(&Token::LParen) {
        count += 1;
    }
    count
}

fn close(cursor: &mut Cursor<'_>, count: usize) -> Result<(), PgError> {
    (0..count).try_for_each(|_| cursor.expect(&Token::RParen))
}

#[cfg(test)]
mod tests {
    use crate::{Selection, ShowJobs, Statement, parse};

    #[test]
    fn a_query_keeps_its_place() {
        for (text, sent) in [
            ("SHOW JOBS SELECT 1", "SELECT * FROM (SELECT 1\n) AS named LIMIT 1001"),
            ("SHOW JOBS WHEN COMPLETE (SELECT 1) ;", "SELECT * FROM ((SELECT 1)\n) AS named LIMIT 1001"),
            ("SHOW JOBS VALUES (1) OFFSET 0", "SELECT * FROM (VALUES (1) OFFSET 0\n) AS named LIMIT 1001"),
            ("SHOW JOB (SELECT 1)", "SELECT (SELECT 1)"),
            ("SHOW JOB(VALUES (1), (2))", "SELECT (VALUES (1), (2))"),
            ("SHOW JOB a -- é", "VALUES (a -- é\n)"),
            ("SHOW JOB (f(1, ')')) + 1;", "VALUES ((f(1, ')')) + 1\n)"),
            ("SHOW JOB ($1) || '7'", "VALUES (($1) || '7'\n)"),
            ("SHOW JOB -f(1)", "VALUES (-f(1)\n)"),
            ("SHOW JOB $1::text::int8", "VALUES ($1::text::int8\n)"),
            ("SHOW JOB ((1) + 2)", "VALUES (((1) + 2)\n)"),
            ("SHOW JOB ('x' || '1')::int8", "VALUES (('x' || '1')::int8\n)"),
            ("SHOW JOB (SELECT 1) + 1", "VALUES ((SELECT 1) + 1\n)"),
            ("SHOW JOB CASE WHEN true THEN 1 END", "VALUES (CASE WHEN true THEN 1 END\n)"),
            ("SHOW JOBS\n/* é */ TABLE x -- y", "SELECT * FROM (TABLE x -- y\n) AS named LIMIT 1001"),
            (
                "SHOW JOBS WITH reason AS (SELECT 1) TABLE reason",
                "SELECT * FROM (WITH reason AS (SELECT 1) TABLE reason\n) AS named LIMIT 1001",
            ),
            ("SHOW NODES; SHOW JOBS SELECT 'é;'; SHOW NODES", "SELECT * FROM (SELECT 'é;'\n) AS named LIMIT 1001"),
        ] {
            let statements = parse(text).expect(text);
            let query = statements.iter().find_map(|statement| match statement {
                Statement::ShowJobs(ShowJobs::These { jobs: Selection::Query(query), .. }) => Some(query),
                _ => None,
            });
            let query = query.expect(text);
            let rewritten = query.sourced.rewrite(Vec::new());
            assert_eq!(query.for_server(&rewritten), sent, "{text}");
            let characters = |text: &str| text[..text.find(query.sourced.text()).expect("its text")].chars().count();
            assert_eq!(query.position(&rewritten, characters(sent) + 1), characters(text) + 1, "{text}");
        }
    }
}
