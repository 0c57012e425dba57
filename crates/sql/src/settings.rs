//! Settings of the whole fleet: `SET CLUSTER SETTING` and its relatives. What a setting is called and may be is not
//! known here.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::names::quoted_name;
use crate::statement::{Statement, Text};

/// A statement about settings of the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settings {
    /// `SHOW ALL BACKHAUL SETTINGS`: those of the fleet and those of the session.
    All,
    /// `SHOW CLUSTER SETTINGS`, `SHOW ALL CLUSTER SETTINGS`: those of the fleet.
    Fleet,
    /// `SHOW CLUSTER SETTING name`.
    One {
        /// Its name, folded to lower case.
        name: String,
    },
    /// `SET CLUSTER SETTING name = value`.
    Set {
        /// Its name, folded to lower case.
        name: String,
        /// Its value; `None` for `DEFAULT`, and for `RESET CLUSTER SETTING name`.
        value: Option<Text>,
    },
}

impl Settings {
    pub(crate) fn tag(&self) -> &'static str {
        match self {
            Self::All | Self::Fleet | Self::One { .. } => "SHOW",
            // CockroachDB's, for RESET as well.
            Self::Set { .. } => "SET CLUSTER SETTING",
        }
    }

    pub(crate) fn print(&self) -> String {
        match self {
            Self::All => "SHOW ALL BACKHAUL SETTINGS".to_owned(),
            Self::Fleet => "SHOW CLUSTER SETTINGS".to_owned(),
            Self::One { name } => format!("SHOW CLUSTER SETTING {}", print_name(name)),
            Self::Set { name, value } => {
                let value = value.as_ref().map_or_else(|| "DEFAULT".to_owned(), Text::print);
                format!("SET CLUSTER SETTING {} = {value}", print_name(name))
            }
        }
    }
}

fn print_name(name: &str) -> String {
    name.split('.').map(quoted_name).collect::<Vec<_>>().join(".")
}

/// `SET CLUSTER SETTING name { = | TO } { value | DEFAULT }`.
pub(crate) fn set(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    cursor.expect_words(&["SET", "CLUSTER", "SETTING"])?;
    let name = name(cursor)?;
    if !cursor.eat_word("TO") {
        cursor.expect(&Token::Eq)?;
    }
    let value = if cursor.eat_word("DEFAULT") { None } else { Some(value(cursor)?) };
    Ok(Statement::Settings(Settings::Set { name, value }))
}

/// `RESET CLUSTER SETTING name`.
pub(crate) fn reset(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    cursor.expect_words(&["RESET", "CLUSTER", "SETTING"])?;
    Ok(Statement::Settings(Settings::Set { name: name(cursor)?, value: None }))
}

/// What follows `SHOW`, in the statements that show them.
pub(crate) fn show(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let shown = if cursor.eat_words(&["ALL", "BACKHAUL"]) {
        cursor.expect_words(&["SETTINGS"])?;
        Settings::All
    } else if cursor.eat_words(&["CLUSTER", "SETTING"]) {
        Settings::One { name: name(cursor)? }
    } else {
        cursor.eat_word("ALL");
        cursor.expect_words(&["CLUSTER", "SETTINGS"])?;
        Settings::Fleet
    };
    Ok(Statement::Settings(shown))
}

/// `a.b.c`.
fn name(cursor: &mut Cursor<'_>) -> Result<String, PgError> {
    let mut name = cursor.name()?;
    while cursor.eat(&Token::Period) {
        name = format!("{name}.{}", cursor.name()?);
    }
    Ok(name)
}

/// A literal, a number, a word, or a placeholder. `true` and `on` are reserved, so they are no words elsewhere.
fn value(cursor: &mut Cursor<'_>) -> Result<Text, PgError> {
    if let Some(word) = ["true", "false", "on"].into_iter().find(|word| cursor.eat_word(word)) {
        return Ok(Text::Literal(word.to_owned()));
    }
    match cursor.signed_number() {
        Some(number) => Ok(Text::Literal(number)),
        None => cursor.text(),
    }
}
