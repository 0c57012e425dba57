//! External connections: names for stores.

use pgerror::PgError;

use crate::cursor::Cursor;
use crate::options::{Known, Value, options};
use crate::statement::Statement;

const CHECK_OPTIONS: [Known; 3] = [
    Known::not_yet("transfer", Value::Text, "transfer option"),
    Known::not_yet("concurrently", Value::Condition, "concurrently option"),
    Known::not_yet("time", Value::Text, "time option"),
];

/// `CREATE EXTERNAL CONNECTION [IF NOT EXISTS] name AS uri`.
pub(crate) fn create(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    cursor.expect_words(&["CREATE", "EXTERNAL", "CONNECTION"])?;
    let if_not_exists = cursor.eat_words(&["IF", "NOT", "EXISTS"]);
    let name = cursor.text()?;
    cursor.expect_words(&["AS"])?;
    let uri = cursor.text()?;
    Ok(Statement::CreateExternalConnection { name, uri, if_not_exists })
}

/// `DROP EXTERNAL CONNECTION name`.
pub(crate) fn drop(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    cursor.expect_words(&["DROP", "EXTERNAL", "CONNECTION"])?;
    Ok(Statement::DropExternalConnection { name: cursor.text()? })
}

/// `ALTER EXTERNAL CONNECTION name AS uri`, refused.
pub(crate) fn alter(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let refusal = cursor.unsupported("ALTER EXTERNAL CONNECTION is not supported yet");
    cursor.refuse(refusal.hint("Drop it and create it again; jobs that run keep what it stood for."));
    cursor.expect_words(&["ALTER", "EXTERNAL", "CONNECTION"])?;
    cursor.text()?;
    cursor.expect_words(&["AS"])?;
    cursor.text()?;
    Err(cursor.refused())
}

/// `CHECK EXTERNAL CONNECTION uri [WITH …]`, refused.
pub(crate) fn check(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let refusal = cursor.unsupported("CHECK EXTERNAL CONNECTION is not supported yet");
    cursor.refuse(refusal.hint("CREATE EXTERNAL CONNECTION says which nodes reach the store."));
    cursor.expect_words(&["CHECK", "EXTERNAL", "CONNECTION"])?;
    cursor.text()?;
    options(cursor, "CHECK EXTERNAL CONNECTION", &CHECK_OPTIONS)?;
    Err(cursor.refused())
}

/// What follows `SHOW` in `SHOW CREATE EXTERNAL CONNECTION name` and `SHOW CREATE ALL EXTERNAL CONNECTIONS`, refused.
fn show_create(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let refusal = cursor.unsupported("SHOW CREATE EXTERNAL CONNECTION is not supported");
    let detail = "The statement would hold the keys of the store, which are shown to nobody.";
    cursor.refuse(refusal.detail(detail).hint("SHOW EXTERNAL CONNECTIONS shows them without keys."));
    cursor.expect_words(&["CREATE"])?;
    if cursor.eat_word("ALL") {
        cursor.expect_words(&["EXTERNAL", "CONNECTIONS"])?;
    } else {
        cursor.expect_words(&["EXTERNAL", "CONNECTION"])?;
        cursor.text()?;
    }
    Err(cursor.refused())
}

/// What follows `SHOW` in `SHOW EXTERNAL CONNECTIONS` and `SHOW EXTERNAL CONNECTION name`.
pub(crate) fn show(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    if cursor.at_word("CREATE") {
        return show_create(cursor);
    }
    cursor.expect_words(&["EXTERNAL"])?;
    if cursor.eat_word("CONNECTIONS") {
        return Ok(Statement::ShowExternalConnections { name: None });
    }
    cursor.expect_words(&["CONNECTION"])?;
    Ok(Statement::ShowExternalConnections { name: Some(cursor.text()?) })
}

#[cfg(test)]
mod tests {
    use crate::{Statement, Text, parse};

    fn literal(text: &str) -> Text {
        Text::Literal(text.to_owned())
    }

    #[test]
    fn a_connection_is_named_by_a_word_or_a_literal() {
        use Statement::{CreateExternalConnection, DropExternalConnection, ShowExternalConnections};
        let create = |name: &str, uri: &str, if_not_exists| CreateExternalConnection {
            name: literal(name),
            uri: literal(uri),
            if_not_exists,
        };
        for (text, expected) in [
            ("CREATE EXTERNAL CONNECTION West AS 's3://b?K=it''s'", create("west", "s3://b?K=it's", false)),
            ("create external connection if not exists \"West\" as e's3\\x3a'", create("West", "s3:", true)),
            ("CREATE EXTERNAL CONNECTION if AS $x$a$b$x$", create("if", "a$b", false)),
            ("DROP EXTERNAL CONNECTION 'West'", DropExternalConnection { name: literal("West") }),
            ("DROP EXTERNAL CONNECTION $1;", DropExternalConnection { name: Text::Placeholder(1) }),
            ("SHOW EXTERNAL CONNECTION west", ShowExternalConnections { name: Some(literal("west")) }),
            ("SHOW EXTERNAL CONNECTIONS", ShowExternalConnections { name: None }),
        ] {
            assert_eq!(parse(text), Ok(vec![expected]), "{text}");
        }
    }

    #[test]
    fn a_wrong_word_is_pointed_at() {
        for (text, near, position, topic) in [
            ("CREATE EXTERNAL CONNECTION x TO 'y'", "TO", 30, "CREATE"),
            ("CREATE EXTERNAL CONNECTION select AS 'y'", "select", 28, "CREATE"),
            ("CREATE EXTERNAL CONNECTION \"\" AS 'y'", "", 28, "CREATE"),
            ("DROP EXTERNAL CONNECTION", "EOF", 25, "DROP"),
            ("DROP EXTERNAL CONNECTION IF EXISTS x", "EXISTS", 29, "DROP"),
            ("SHOW EXTERNAL CONNECTIONS x", "x", 27, "SHOW"),
            ("SHOW EXTERNAL CONNECTION", "EOF", 25, "SHOW"),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.message, format!("at or near \"{near}\": syntax error"), "{text}");
            assert_eq!((error.position, error.hint), (Some(position), Some(format!("try \\h {topic}"))), "{text}");
        }
    }
}
