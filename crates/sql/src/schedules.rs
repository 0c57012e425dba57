//! Schedules, with CockroachDB's grammar. There are none here yet, so whatever is sound is refused by its name.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::backup::{BACKUP, OPTIONS};
use crate::cursor::Cursor;
use crate::expression::expression;
use crate::options::{one, options};
use crate::selection;
use crate::statement::Statement;
use crate::targets::targets;

/// What to do meanwhile.
const HINT: &str = "Let cron, or a timer of systemd, send the BACKUP through any node.";

/// Notes that a statement which begins with these words cannot be had.
fn refuse(cursor: &mut Cursor<'_>, what: &str) {
    let refusal = cursor.unsupported(format!("{what} is not supported yet"));
    cursor.refuse(refusal.hint(HINT));
}

/// `CREATE SCHEDULE [IF NOT EXISTS] [label] FOR BACKUP … RECURRING cron [FULL BACKUP {cron | ALWAYS}] [WITH SCHEDULE
/// OPTIONS …]`.
pub(crate) fn create(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    refuse(cursor, "CREATE SCHEDULE");
    cursor.expect_words(&["CREATE", "SCHEDULE"])?;
    cursor.eat_words(&["IF", "NOT", "EXISTS"]);
    if !cursor.at_word("FOR") {
        cursor.text()?;
    }
    cursor.expect_words(&["FOR", "BACKUP"])?;
    targets(cursor, &BACKUP)?;
    cursor.expect_words(&["INTO"])?;
    cursor.texts()?;
    options(cursor, BACKUP.name, &OPTIONS)?;
    cursor.expect_words(&["RECURRING"])?;
    cursor.text()?;
    if cursor.eat_words(&["FULL", "BACKUP"]) && !cursor.eat_word("ALWAYS") {
        cursor.text()?;
    }
    if cursor.eat_word("WITH") {
        cursor.expect_words(&["SCHEDULE", "OPTIONS"])?;
        schedule_option(cursor)?;
        while cursor.eat(&Token::Comma) {
            schedule_option(cursor)?;
        }
    }
    Err(cursor.refused())
}

/// `name [= value]`.
fn schedule_option(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    cursor.name()?;
    if cursor.eat(&Token::Eq) {
        expression(cursor)?;
    }
    Ok(())
}

/// `ALTER BACKUP SCHEDULE id command, …`.
pub(crate) fn alter(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    refuse(cursor, "ALTER BACKUP SCHEDULE");
    cursor.expect_words(&["ALTER", "BACKUP", "SCHEDULE"])?;
    cursor.number()?;
    command(cursor)?;
    while cursor.eat(&Token::Comma) {
        command(cursor)?;
    }
    Err(cursor.refused())
}

fn command(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    if cursor.eat_word("EXECUTE") {
        cursor.eat_word("FULL");
        return cursor.expect_words(&["IMMEDIATELY"]);
    }
    cursor.expect_words(&["SET"])?;
    if cursor.eat_word("LABEL") || cursor.eat_word("RECURRING") {
        cursor.text().map(drop)
    } else if cursor.eat_word("INTO") {
        cursor.texts().map(drop)
    } else if cursor.eat_word("WITH") {
        one(cursor, BACKUP.name, &OPTIONS)
    } else if cursor.eat_words(&["SCHEDULE", "OPTION"]) {
        schedule_option(cursor)
    } else {
        cursor.expect_words(&["FULL", "BACKUP"])?;
        if cursor.eat_word("ALWAYS") { Ok(()) } else { cursor.text().map(drop) }
    }
}

/// Whether `PAUSE`, `RESUME` or `DROP` of schedules begins here.
pub(crate) fn is_control(cursor: &Cursor<'_>) -> bool {
    ["PAUSE", "RESUME", "DROP"]
        .iter()
        .any(|verb| cursor.at_words(&[verb, "SCHEDULE"]) || cursor.at_words(&[verb, "SCHEDULES"]))
}

/// `PAUSE SCHEDULE id`, `RESUME SCHEDULES query`, `DROP SCHEDULE id`.
pub(crate) fn control(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let verb = cursor.topic();
    refuse(cursor, &format!("{verb} SCHEDULES"));
    cursor.expect_words(&[&verb])?;
    named(cursor)?;
    Err(cursor.refused())
}

/// What follows `FOR` in a statement about the jobs of schedules, of which `what` is the beginning.
pub(crate) fn jobs_of(cursor: &mut Cursor<'_>, what: &str) -> Result<(), PgError> {
    refuse(cursor, &format!("{what} FOR SCHEDULES"));
    cursor.expect_words(&["FOR"])?;
    named(cursor)?;
    Err(cursor.refused())
}

/// `SCHEDULE id`, or `SCHEDULES` and rows of ids.
fn named(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    if cursor.eat_word("SCHEDULES") {
        return selection::several(cursor).map(drop);
    }
    cursor.expect_words(&["SCHEDULE"])?;
    selection::one(cursor).map(drop)
}

/// What follows `SHOW`: `SCHEDULE id`, `[PAUSED | RUNNING] SCHEDULES [FOR kind]`, `CREATE SCHEDULE id`, `CREATE ALL
/// SCHEDULES`.
pub(crate) fn show(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    if cursor.eat_word("CREATE") {
        refuse(cursor, "SHOW CREATE SCHEDULE");
        if cursor.eat_word("ALL") {
            cursor.expect_words(&["SCHEDULES"])?;
        } else {
            cursor.expect_words(&["SCHEDULE"])?;
            selection::one(cursor)?;
        }
        return Err(cursor.refused());
    }
    refuse(cursor, "SHOW SCHEDULES");
    if cursor.eat_word("SCHEDULE") {
        selection::one(cursor)?;
        return Err(cursor.refused());
    }
    if !cursor.eat_word("PAUSED") {
        cursor.eat_word("RUNNING");
    }
    cursor.expect_words(&["SCHEDULES"])?;
    if cursor.eat_word("FOR") && !["BACKUP", "CHANGEFEED"].iter().any(|kind| cursor.eat_word(kind)) {
        cursor.expect_words(&["SQL", "STATISTICS"])?;
    }
    Err(cursor.refused())
}
