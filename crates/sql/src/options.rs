//! The options of a statement: what follows `WITH`, or stands in parentheses behind `WITH OPTIONS`.
//!
//! Each statement has a table of all the options that CockroachDB's has. Which of them we have stands in it too, so that
//! the others are refused by name.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::expression::expression;
use crate::statement::Text;

/// What may follow the name of an option.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    /// Nothing, `= TRUE`, or `= FALSE`: `DETACHED`, which must be known before parameters have values.
    Switch,
    /// Nothing, or `=` an expression.
    Condition,
    /// `=` a text.
    Text,
    /// `=` a text, or several in parentheses.
    Texts,
    /// Nothing.
    Nothing,
}

/// What an option was given.
pub(crate) enum Given {
    /// It is told without a value, or with one that is not known to be false, or with several texts.
    Yes,
    /// `= FALSE`, as if it were not told.
    No,
    /// A text.
    Text(Text),
}

/// Whether we have an option.
#[derive(Clone, Copy)]
enum Support {
    Ours,
    NotYet,
    /// Not, and it is not planned either.
    Never,
}

/// An option of CockroachDB's.
pub(crate) struct Known {
    /// Its words.
    name: &'static str,
    value: Value,
    /// What it is called when it is told twice; an alias has what its option has.
    twice: &'static str,
    support: Support,
    /// Why it cannot be had, and what to do instead: a DETAIL and a HINT.
    advice: Option<(&'static str, &'static str)>,
}

impl Known {
    /// An option that we have.
    pub(crate) const fn ours(name: &'static str, value: Value, twice: &'static str) -> Self {
        Self { name, value, twice, support: Support::Ours, advice: None }
    }

    /// An option that we do not have yet.
    pub(crate) const fn not_yet(name: &'static str, value: Value, twice: &'static str) -> Self {
        Self { name, value, twice, support: Support::NotYet, advice: None }
    }

    /// The same option, when we are never to have it.
    pub(crate) const fn never(self, detail: &'static str, hint: &'static str) -> Self {
        Self { support: Support::Never, ..self.advised(detail, hint) }
    }

    /// The same option, with a reason and a way to do without it.
    pub(crate) const fn advised(self, detail: &'static str, hint: &'static str) -> Self {
        Self { advice: Some((detail, hint)), ..self }
    }

    fn words(&self) -> Vec<&'static str> {
        self.name.split(' ').collect()
    }

    /// Why it cannot be had; its name is at `begun`.
    fn refusal(&self, cursor: &Cursor<'_>, begun: Option<usize>, statement: &str) -> Option<PgError> {
        let yet = match self.support {
            Support::Ours => return None,
            Support::NotYet => " yet",
            Support::Never => "",
        };
        let what = format!("{statement} option {} is not supported{yet}", self.name);
        let refusal = cursor.unsupported_at(begun, what);
        Some(match self.advice {
            Some((detail, hint)) => refusal.detail(detail).hint(hint),
            None => refusal,
        })
    }
}

/// The options here, if any, by their names; those that we do not have are refused. `statement` is what has them.
pub(crate) fn options(
    cursor: &mut Cursor<'_>,
    statement: &str,
    table: &'static [Known],
) -> Result<Vec<(&'static str, Given)>, PgError> {
    let mut told = Vec::new();
    if !cursor.eat_word("WITH") {
        return Ok(Vec::new());
    }
    let listed = cursor.eat_word("OPTIONS");
    if listed {
        cursor.expect(&Token::LParen)?;
    }
    loop {
        let (known, given) = option(cursor, statement, table, &told)?;
        told.push((known, given));
        if !cursor.eat(&Token::Comma) {
            break;
        }
    }
    if listed {
        cursor.expect(&Token::RParen)?;
    }
    Ok(told.into_iter().map(|(known, given)| (known.name, given)).collect())
}

/// One option, behind a word that says that it is one.
pub(crate) fn one(cursor: &mut Cursor<'_>, statement: &str, table: &'static [Known]) -> Result<(), PgError> {
    option(cursor, statement, table, &[]).map(drop)
}

/// One option; `told` are those before it.
fn option(
    cursor: &mut Cursor<'_>,
    statement: &str,
    table: &'static [Known],
    told: &[(&'static Known, Given)],
) -> Result<(&'static Known, Given), PgError> {
    // Where no name is whole the first word decides, so that the error is at the word that is wrong.
    let whole = table.iter().find(|known| cursor.at_words(&known.words()));
    let other = || table.iter().find(|known| cursor.at_words(&known.words()[..1]));
    let Some(known) = whole.or_else(other) else { return Err(cursor.unexpected()) };
    let begun = cursor.here();
    cursor.expect_words(&known.words())?;
    let (given, looks_ahead) = value(cursor, known.value)?;
    if told.iter().any(|(before, _)| before.twice == known.twice) {
        let why = format!("{} specified multiple times", known.twice);
        return Err(if looks_ahead { cursor.wrong_here(&why) } else { cursor.wrong_before(&why) });
    }
    if !matches!(given, Given::No)
        && let Some(refusal) = known.refusal(cursor, begun, statement)
    {
        cursor.refuse(refusal);
    }
    Ok((known, given))
}

/// What follows a name, and whether CockroachDB's parser has then seen the token behind: it looks one ahead only where
/// the option could go on, and names the last that it has seen.
fn value(cursor: &mut Cursor<'_>, value: Value) -> Result<(Given, bool), PgError> {
    let given = match value {
        Value::Nothing => return Ok((Given::Yes, false)),
        Value::Switch | Value::Condition if !cursor.eat(&Token::Eq) => return Ok((Given::Yes, true)),
        Value::Condition => return Ok((if expression(cursor)? { Given::No } else { Given::Yes }, true)),
        Value::Switch if cursor.eat_word("TRUE") => Given::Yes,
        Value::Switch if cursor.eat_word("FALSE") => Given::No,
        Value::Switch => return Err(cursor.unexpected()),
        Value::Text => {
            cursor.expect(&Token::Eq)?;
            Given::Text(cursor.text()?)
        }
        Value::Texts => {
            cursor.expect(&Token::Eq)?;
            cursor.texts()?;
            Given::Yes
        }
    };
    Ok((given, false))
}
