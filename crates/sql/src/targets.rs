//! What a `BACKUP` or a `RESTORE` is of: everything, databases, or something that is refused.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::expression::expression;
use crate::names::quoted_name;

/// What a `BACKUP` or a `RESTORE` is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Nothing is named: all databases of the fleet, or of the backup.
    Cluster,
    /// `DATABASE a, b`, as named: folded to lower case unless quoted, in order, repetitions kept.
    Databases(Vec<String>),
}

impl Targets {
    /// The databases that are named.
    pub fn databases(&self) -> &[String] {
        match self {
            Self::Cluster => &[],
            Self::Databases(names) => names,
        }
    }

    /// What stands between the verb and the next word, with a blank before it.
    pub(crate) fn print(&self) -> String {
        match self {
            Self::Cluster => String::new(),
            Self::Databases(names) => {
                let names: Vec<_> = names.iter().map(|name| quoted_name(name)).collect();
                format!(" DATABASE {}", names.join(", "))
            }
        }
    }
}

/// A statement that has targets.
pub(crate) struct Verb {
    /// Its first word.
    pub(crate) name: &'static str,
    /// What may follow the targets.
    pub(crate) ends: &'static [&'static str],
    /// What to do instead of naming tables.
    pub(crate) not_tables: &'static str,
}

/// The targets; no databases where something else is named, which is refused.
pub(crate) fn targets(cursor: &mut Cursor<'_>, verb: &Verb) -> Result<Targets, PgError> {
    let name = verb.name;
    if verb.ends.iter().any(|end| cursor.at_word(end)) {
        return Ok(Targets::Cluster);
    }
    if cursor.eat_word("DATABASE") {
        let mut names = vec![cursor.name()?];
        while cursor.eat(&Token::Comma) {
            names.push(cursor.name()?);
        }
        return Ok(Targets::Databases(names));
    }
    let begun = cursor.here();
    let named_tenant = !matches!(cursor.second(), Token::Comma | Token::Period)
        && !verb.ends.iter().any(|end| cursor.at_words(&["TENANT", end]));
    if cursor.eat_words(&["VIRTUAL", "CLUSTER"]) || (named_tenant && cursor.eat_word("TENANT")) {
        let refusal = cursor.unsupported_at(begun, format!("{name} VIRTUAL CLUSTER is not supported"));
        cursor.refuse(refusal.detail("PostgreSQL has no virtual clusters.").hint(verb.not_tables));
        if !cursor.eat_number() {
            cursor.text()?;
        }
        return Ok(Targets::Databases(Vec::new()));
    }
    tables(cursor, verb)?;
    Ok(Targets::Databases(Vec::new()))
}

/// `[TABLE] a, b.*`, refused.
fn tables(cursor: &mut Cursor<'_>, verb: &Verb) -> Result<(), PgError> {
    let refusal = cursor.unsupported(format!("{} TABLE is not supported yet", verb.name));
    cursor.refuse(refusal.hint(verb.not_tables));
    cursor.eat_word("TABLE");
    patterns(cursor)
}

/// `a, b.*`: names of tables, read over.
pub(crate) fn patterns(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    loop {
        while !cursor.eat(&Token::Mul) {
            cursor.name()?;
            if !cursor.eat(&Token::Period) {
                break;
            }
        }
        if !cursor.eat(&Token::Comma) {
            return Ok(());
        }
    }
}

/// `AS OF SYSTEM TIME` and its expression, refused; `hint` says how to do without.
pub(crate) fn as_of(cursor: &mut Cursor<'_>, verb: &Verb, detail: &str, hint: &str) -> Result<(), PgError> {
    if cursor.at_word("AS") {
        let refusal = cursor.unsupported(format!("{} AS OF SYSTEM TIME is not supported", verb.name));
        cursor.refuse(refusal.detail(detail).hint(hint));
        cursor.expect_words(&["AS", "OF", "SYSTEM", "TIME"])?;
        expression(cursor)?;
    }
    Ok(())
}
