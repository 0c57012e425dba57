//! From a text to our statements, with positions.
//!
//! A text is tokenized once; each statement is then read by the file that knows its grammar.

use pgerror::{PgError, SqlState};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::tokenizer::{Token, Tokenizer};

use crate::cursor::Cursor;
use crate::statement::Statement;
use crate::syntax::Source;
use crate::{backup, control, external, grant, restore, schedules, settings, show};

/// Parses a text that [`crate::is_ours`] accepted into its statements, in order.
///
/// A text may hold several of our statements, which then run one by one. A statement of PostgreSQL among them is
/// refused (0A000): whoever takes such texts reads them with [`crate::read_mixed`]. So is
/// a `BACKUP` or a `RESTORE` among several statements of whoever (XXUUU), unless it is detached: its job would run while
/// their transaction is open.
///
/// # Errors
///
/// 42601 in CockroachDB's form (`at or near "x": syntax error`, a caret under the place in the DETAIL) with the
/// position; 22P02 or 22003 for a job's id that is no `bigint`; 0A000 for a mixed text and for what CockroachDB
/// understands and we do not do.
pub fn parse(text: &str) -> Result<Vec<Statement>, PgError> {
    parse_nested(text, 0)
}

/// The same for a text that is a row source in so many others.
pub(crate) fn parse_nested(text: &str, depth: usize) -> Result<Vec<Statement>, PgError> {
    let mut tokens = Vec::new();
    let tokenized = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize_with_location_into_buf(&mut tokens);
    let source = Source { text, tokens: &tokens };
    let mut cursor = Cursor::new(source, depth);
    if let Err(error) = tokenized {
        let why = error.message.trim_end_matches('.').to_lowercase();
        return Err(source.error_at(error.location, "EOF", &cursor.topic(), Some(&why)));
    }
    let (mut statements, mut attached) = (Vec::new(), None);
    loop {
        while cursor.eat(&Token::SemiColon) {}
        if cursor.at_end() {
            break;
        }
        let begun = cursor.here();
        if let Some((tag, first)) = attached
            && !cursor.at_ours()
        {
            return Err(needs_detached(tag, cursor.position(first)));
        }
        let statement = statement(&mut cursor)?;
        cursor.finish()?;
        if waits(&statement) {
            attached.get_or_insert((statement.tag(), begun));
        }
        statements.push(statement);
    }
    match attached {
        Some((tag, begun)) if statements.len() > 1 => Err(needs_detached(tag, cursor.position(begun))),
        _ => Ok(statements),
    }
}

fn statement(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    if !cursor.at_ours() {
        return Err(mixed(cursor));
    }
    cursor.begin();
    if cursor.at_word("EXPLAIN") {
        let begun = cursor.here();
        cursor.eat_word("EXPLAIN");
        // From here on, errors are about what is explained.
        cursor.begin();
        if cursor.at_word("BACKUP") {
            return backup::backup(cursor).map(Statement::ExplainBackup);
        }
        let refusal = cursor.unsupported_at(begun, format!("EXPLAIN {} is not supported yet", cursor.topic()));
        let hint = "EXPLAIN BACKUP tells where a backup would run; SHOW BACKUP tells what a RESTORE would find.";
        cursor.refuse(refusal.detail("Only a BACKUP has a plan to be shown.").hint(hint));
    }
    if schedules::is_control(cursor) {
        schedules::control(cursor)
    } else if cursor.at_word("BACKUP") {
        backup::backup(cursor).map(Statement::Backup)
    } else if cursor.at_word("RESTORE") {
        restore::restore(cursor).map(Statement::Restore)
    } else if let Some(verb) = control::verb(cursor) {
        control::control(cursor, verb).map(Statement::ControlJobs)
    } else if cursor.at_words(&["CREATE", "SCHEDULE"]) {
        schedules::create(cursor)
    } else if cursor.at_words(&["ALTER", "BACKUP"]) {
        schedules::alter(cursor)
    } else if cursor.at_word("CREATE") {
        external::create(cursor)
    } else if cursor.at_word("ALTER") {
        external::alter(cursor)
    } else if cursor.at_word("CHECK") {
        external::check(cursor)
    } else if cursor.at_word("SET") {
        settings::set(cursor)
    } else if cursor.at_word("GRANT") || cursor.at_word("REVOKE") {
        grant::grant(cursor)
    } else if cursor.at_word("RESET") {
        settings::reset(cursor)
    } else if cursor.at_word("DROP") {
        external::drop(cursor)
    } else {
        show::show(cursor)
    }
}

fn mixed(cursor: &Cursor<'_>) -> PgError {
    cursor
        .unsupported("statements of Backhaul and of PostgreSQL cannot be combined in one query string")
        .hint("Send each statement on its own.")
}

/// Whether a statement is answered only when its job has ended.
pub(crate) fn waits(statement: &Statement) -> bool {
    match statement {
        Statement::Backup(backup) => !backup.options.detached,
        Statement::Restore(restore) => !restore.options.detached,
        _ => false,
    }
}

pub(crate) fn needs_detached(tag: &str, position: usize) -> PgError {
    let text = format!("{tag} cannot be used inside a multi-statement transaction without DETACHED option");
    PgError::new(SqlState::UNCATEGORIZED, text)
        .hint(format!("Send the {tag} on its own, or add WITH DETACHED."))
        .at(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_read_in_order() {
        use Statement::{ShowLocality, ShowNodes};
        for (text, expected) in [
            ("SHOW LOCALITY", vec![ShowLocality]),
            ("show nodes ;", vec![ShowNodes]),
            (";; SHOW LOCALITY; /* and */ SHOW NODES;", vec![ShowLocality, ShowNodes]),
            ("/* app */ ; SHOW NODES; -- nightly", vec![ShowNodes]),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_syntax_error_points_at_its_character() {
        for (text, message, position, caret) in [
            ("SHOW LOCALITY now", "at or near \"now\": syntax error", 15, "SHOW LOCALITY now\n              ^"),
            ("/* é日本 */ SHOW NODES 'x'", "at or near \"x\": syntax error", 22, "^"),
            ("SHOW NODES;\nSHOW LOCALITY (", "at or near \"(\": syntax error", 27, "SHOW LOCALITY (\n              ^"),
            ("SHOW JOB\n", "at or near \"EOF\": syntax error", 10, "SHOW JOB\n\n^"),
            (
                "SHOW NODES 'open",
                "at or near \"EOF\": syntax error: unterminated string literal",
                12,
                "SHOW NODES 'open\n           ^",
            ),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.code, SqlState::SYNTAX_ERROR);
            assert_eq!(error.message, message, "{text}");
            assert_eq!(error.position, Some(position), "{text}");
            let detail = error.detail.unwrap_or_default();
            assert!(detail.starts_with("source SQL:\n") && detail.ends_with(caret), "{text}: {detail}");
            assert_eq!(error.hint.as_deref(), Some("try \\h SHOW"));
        }
    }

    #[test]
    fn a_text_that_mixes_ours_and_theirs_is_refused() {
        for (text, position) in [
            ("SHOW NODES; SELECT 1", 13),
            ("SHOW NODES; SHOW nodes.x", 13),
            ("BACKUP DATABASE a INTO 'x' WITH DETACHED; SELECT 1", 43),
            ("SHOW JOBS; \"backup\" DATABASE a INTO 'x'", 12),
        ] {
            let error = parse(text).expect_err("mixed");
            assert_eq!((error.code, error.position), (SqlState::FEATURE_NOT_SUPPORTED, Some(position)), "{text}");
        }
    }

    #[test]
    fn a_job_among_other_statements_must_be_detached() {
        for (tag, rest) in [("BACKUP", "DATABASE a INTO 'x'"), ("RESTORE", "DATABASE a FROM LATEST IN 'x'")] {
            let detached = format!("{tag} {rest} WITH DETACHED");
            assert_eq!(parse(&format!("{detached}; {detached}; SHOW JOBS")).map(|all| all.len()), Ok(3));
            assert!(parse(&format!("; {tag} {rest} ;;")).is_ok());
            let error = parse(&format!("SHOW JOBS; {tag} {rest}; {detached}")).expect_err("attached");
            assert_eq!((error.code, error.position), (SqlState::UNCATEGORIZED, Some(12)));
            let text = format!("{tag} cannot be used inside a multi-statement transaction without DETACHED option");
            assert_eq!(error.message, text);
            // CockroachDB's text for a mixed one, too.
            let error = parse(&format!("{tag} {rest}; SELECT 1;")).expect_err("mixed");
            assert_eq!((error.code, error.position, error.message), (SqlState::UNCATEGORIZED, Some(1), text));
        }
    }

    #[test]
    fn a_long_text_is_read_in_one_pass() {
        let ids = format!("SHOW JOBS VALUES (1){}", ", (1)".repeat(100_000));
        assert!(parse(&ids).is_ok());
        assert_eq!(parse(&"SHOW JOBS;".repeat(100_000)).map(|all| all.len()), Ok(100_000));
        for one in [
            "SHOW JOB 1;",
            "PAUSE JOBS SELECT 1;",
            "SHOW BACKUP LATEST IN 'x' WITH as_json;",
            "BACKUP DATABASE a INTO 'x' WITH detached;",
            "RESTORE DATABASE a FROM LATEST IN 'x' WITH detached;",
        ] {
            assert_eq!(parse(&one.repeat(20_000)).map(|all| all.len()), Ok(20_000));
        }
        let nested = format!("SHOW JOB {}", "(".repeat(100_000));
        assert_eq!(parse(&nested).map_err(|error| error.position), Err(Some(100_010)));
    }

    #[test]
    fn every_statement_reports_its_tag() {
        for (text, tag) in [
            ("SHOW LOCALITY", "SHOW"),
            ("SHOW JOBS", "SHOW"),
            ("SHOW EXTERNAL CONNECTIONS", "SHOW"),
            ("SHOW RANGES FROM DATABASE a", "SHOW"),
            ("SHOW REGIONS", "SHOW"),
            ("EXPLAIN BACKUP DATABASE a INTO 'x'", "EXPLAIN"),
            ("BACKUP DATABASE a INTO 'x'", "BACKUP"),
            ("RESTORE DATABASE a FROM LATEST IN 'x'", "RESTORE"),
            ("SHOW BACKUPS IN 'x'", "SHOW"),
            ("PAUSE JOB 1", "PAUSE JOBS"),
            ("RESUME JOBS SELECT 1", "RESUME JOBS"),
            ("CANCEL ALL BACKUP JOBS", "CANCEL JOBS"),
            ("SHOW BACKUP LATEST IN 'x'", "SHOW"),
            ("CREATE EXTERNAL CONNECTION a AS 'x'", "CREATE EXTERNAL CONNECTION"),
            ("DROP EXTERNAL CONNECTION a", "DROP EXTERNAL CONNECTION"),
            ("GRANT USAGE ON EXTERNAL CONNECTION a TO b", "GRANT"),
            ("REVOKE ALL ON EXTERNAL CONNECTION a FROM b", "REVOKE"),
        ] {
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert_eq!(parse(text).expect(text)[0].tag(), tag);
        }
    }
}
