//! `SHOW RANGES` and `SHOW REGIONS`: what a backup would cut, and where it lies.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::options::{Given, Known, Value, options};
use crate::statement::{RangesOf, ShowRanges, Statement};

const OPTIONS: [Known; 5] = [
    Known::ours("tables", Value::Nothing, "tables option"),
    Known::ours("details", Value::Nothing, "details option"),
    Known::not_yet("keys", Value::Nothing, "keys option")
        .never("PostgreSQL's tables are not ordered by a key.", "start_key and end_key are block numbers."),
    Known::not_yet("indexes", Value::Nothing, "indexes option")
        .never("A backup has no indexes; a restore builds them anew.", "Use WITH TABLES."),
    Known::not_yet("explain", Value::Nothing, "explain option"),
];

/// What follows `SHOW RANGES`.
pub(crate) fn ranges(cursor: &mut Cursor<'_>) -> Result<ShowRanges, PgError> {
    if cursor.at_end() || cursor.at_word("WITH") {
        let refusal = cursor.unsupported("SHOW RANGES of the current database is not supported yet");
        return Err(refusal.hint("Name it: SHOW RANGES FROM DATABASE name."));
    }
    cursor.expect_words(&["FROM"])?;
    if cursor.at_word("INDEX") {
        return Err(cursor.unsupported("SHOW RANGES FROM INDEX is not supported").detail("A backup has no indexes."));
    }
    let of = if cursor.eat_word("DATABASE") {
        RangesOf::Database(cursor.name()?)
    } else {
        cursor.expect_words(&["TABLE"])?;
        table(cursor)?
    };
    let (mut tables, mut details) = (false, false);
    for option in options(cursor, "SHOW RANGES", &OPTIONS)? {
        match option {
            ("tables", Given::Yes) => tables = true,
            ("details", Given::Yes) => details = true,
            _ => {}
        }
    }
    Ok(ShowRanges { of, tables, details })
}

fn table(cursor: &mut Cursor<'_>) -> Result<RangesOf, PgError> {
    let mut names = vec![cursor.name()?];
    while names.len() < 3 && cursor.eat(&Token::Period) {
        names.push(cursor.name()?);
    }
    let name = names.pop().unwrap_or_default();
    let schema = names.pop();
    Ok(RangesOf::Table { database: names.pop(), schema, name })
}

/// What follows `SHOW REGIONS`.
pub(crate) fn regions(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    if cursor.at_end() {
        return Ok(Statement::ShowRegions { databases: true });
    }
    cursor.expect_words(&["FROM"])?;
    for what in [&["DATABASE"][..], &["ALL", "DATABASES"]] {
        if cursor.at_words(what) {
            let refusal = cursor.unsupported(format!("SHOW REGIONS FROM {} is not supported yet", what.join(" ")));
            return Err(refusal.hint("SHOW REGIONS names the databases of each region."));
        }
    }
    cursor.expect_words(&["CLUSTER"])?;
    Ok(Statement::ShowRegions { databases: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    #[test]
    fn ranges_are_of_a_database_or_a_table() {
        let table = |database: Option<&str>, schema: Option<&str>, name: &str| RangesOf::Table {
            database: database.map(str::to_owned),
            schema: schema.map(str::to_owned),
            name: name.to_owned(),
        };
        for (text, of, tables, details) in [
            ("SHOW RANGES FROM DATABASE a", RangesOf::Database("a".to_owned()), false, false),
            ("show ranges from database \"A b\" with details;", RangesOf::Database("A b".to_owned()), false, true),
            ("SHOW RANGES FROM TABLE T", table(None, None, "t"), false, false),
            ("SHOW RANGES FROM TABLE s.t WITH TABLES, DETAILS", table(None, Some("s"), "t"), true, true),
            ("SHOW RANGES FROM TABLE d.s.\"T\" WITH tables", table(Some("d"), Some("s"), "T"), true, false),
        ] {
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert_eq!(parse(text), Ok(vec![Statement::ShowRanges(ShowRanges { of, tables, details })]), "{text}");
        }
        for (text, databases) in [("SHOW REGIONS", true), ("show regions from cluster;", false)] {
            assert_eq!(parse(text), Ok(vec![Statement::ShowRegions { databases }]), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_or_not_there_is_told_where_it_stands() {
        for (text, code, message, position) in [
            ("SHOW RANGES", "0A000", "SHOW RANGES of the current database is not supported yet", 12),
            ("SHOW RANGES FOR x", "42601", "at or near \"FOR\": syntax error", 13),
            ("SHOW RANGES FROM x", "42601", "at or near \"x\": syntax error", 18),
            ("SHOW RANGES FROM INDEX a@b", "0A000", "SHOW RANGES FROM INDEX is not supported", 18),
            ("SHOW RANGES FROM TABLE a.b.c.d", "42601", "at or near \".\": syntax error", 29),
            ("SHOW RANGES FROM DATABASE a WITH x", "42601", "at or near \"x\": syntax error", 34),
            ("SHOW RANGES FROM DATABASE a WITH KEYS", "0A000", "SHOW RANGES option keys is not supported", 34),
            (
                "SHOW RANGES FROM DATABASE a WITH details, details",
                "42601",
                "at or near \"details\": syntax error: details option specified multiple times",
                43,
            ),
            ("SHOW REGIONS FROM DATABASE a", "0A000", "SHOW REGIONS FROM DATABASE is not supported yet", 19),
            ("SHOW REGIONS FROM x", "42601", "at or near \"x\": syntax error", 19),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), (code, message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }
}
