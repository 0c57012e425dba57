//! `BACKUP`, with all of CockroachDB's grammar.
//!
//! We do part of what it can say. The rest is read all the same, so that a syntax error is told before anything else
//! and a sound statement is refused by the name of what it asks for.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::statement::{Backup, BackupOptions, Text};

const NO_HISTORY: &str = "PostgreSQL keeps no history of rows.";

/// The form that was removed, in CockroachDB's words.
const NO_BACKUP_TO: &str =
    "The `BACKUP TO` syntax is no longer supported. Please use `BACKUP INTO` to create a backup collection.";

/// What may follow the name of an option.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Value {
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

/// An option of CockroachDB's.
struct Known {
    name: &'static [&'static str],
    value: Value,
    /// What it is told twice for.
    twice: &'static str,
}

const DETACHED: usize = 0;
const EXECUTION_LOCALITY: usize = 1;
const REVISION_HISTORY: usize = 2;

/// Ours first; an alias has the `twice` of its option.
const OPTIONS: [Known; 10] = [
    Known { name: &["detached"], value: Value::Switch, twice: "detached option specified multiple times" },
    Known {
        name: &["execution", "locality"],
        value: Value::Text,
        twice: "execution locality option specified multiple times",
    },
    Known {
        name: &["revision_history"],
        value: Value::Condition,
        twice: "revision_history option specified multiple times",
    },
    Known {
        name: &["encryption_passphrase"],
        value: Value::Text,
        twice: "encryption_passphrase specified multiple times",
    },
    Known { name: &["kms"], value: Value::Texts, twice: "kms specified multiple times" },
    Known {
        name: &["incremental_location"],
        value: Value::Texts,
        twice: "incremental_location option specified multiple times",
    },
    Known {
        name: &["include_all_virtual_clusters"],
        value: Value::Condition,
        twice: "include_all_virtual_clusters specified multiple times",
    },
    Known {
        name: &["include_all_secondary_tenants"],
        value: Value::Condition,
        twice: "include_all_virtual_clusters specified multiple times",
    },
    Known {
        name: &["updates_cluster_monitoring_metrics"],
        value: Value::Condition,
        twice: "updates_cluster_monitoring_metrics option specified multiple times",
    },
    Known {
        name: &["strict", "storage", "locality"],
        value: Value::Nothing,
        twice: "strict storage locality option specified multiple times",
    },
];

pub(crate) fn backup(cursor: &mut Cursor<'_>) -> Result<Backup, PgError> {
    cursor.expect_words(&["BACKUP"])?;
    let databases = targets(cursor)?;
    if cursor.eat_word("TO") {
        cursor.texts()?;
        return Err(cursor.wrong_before(NO_BACKUP_TO));
    }
    cursor.expect_words(&["INTO"])?;
    let into = destination(cursor)?;
    as_of(cursor)?;
    let options = options(cursor)?;
    Ok(Backup { databases, into, options })
}

/// The databases; none where something else is named, which is refused.
fn targets(cursor: &mut Cursor<'_>) -> Result<Vec<String>, PgError> {
    if cursor.at_word("INTO") || cursor.at_word("TO") {
        let refusal = cursor.unsupported("BACKUP of a whole cluster is not supported yet");
        cursor.refuse(refusal.hint("Name the databases: BACKUP DATABASE name, name INTO 'uri'."));
        return Ok(Vec::new());
    }
    if cursor.eat_word("DATABASE") {
        let mut names = vec![cursor.name()?];
        while cursor.eat(&Token::Comma) {
            names.push(cursor.name()?);
        }
        return Ok(names);
    }
    let refusal = cursor.unsupported("BACKUP VIRTUAL CLUSTER is not supported").detail("PostgreSQL has none.");
    let named_tenant =
        !matches!(cursor.second(), Token::Comma | Token::Period) && !cursor.at_words(&["TENANT", "INTO"]);
    if cursor.eat_words(&["VIRTUAL", "CLUSTER"]) || (named_tenant && cursor.eat_word("TENANT")) {
        cursor.refuse(refusal);
        if !cursor.eat_number() {
            cursor.text()?;
        }
        return Ok(Vec::new());
    }
    tables(cursor)?;
    Ok(Vec::new())
}

/// `[TABLE] a, b.*`, refused.
fn tables(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    let refusal = cursor.unsupported("BACKUP TABLE is not supported yet");
    cursor.refuse(refusal.hint("Back up the whole database: BACKUP DATABASE name INTO 'uri'."));
    cursor.eat_word("TABLE");
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

/// What follows `INTO`.
fn destination(cursor: &mut Cursor<'_>) -> Result<Text, PgError> {
    let hint = "Take a full backup: BACKUP DATABASE name INTO 'uri'.";
    let latest = cursor.unsupported("BACKUP INTO LATEST IN is not supported yet").hint(hint);
    let subdirectory = cursor.unsupported("BACKUP INTO a named subdirectory is not supported yet").hint(hint);
    if cursor.eat_words(&["LATEST", "IN"]) {
        cursor.refuse(latest);
        return collection(cursor);
    }
    let list = cursor.at(&Token::LParen);
    let into = collection(cursor)?;
    if !list && cursor.eat_word("IN") {
        cursor.refuse(subdirectory);
        return collection(cursor);
    }
    Ok(into)
}

/// The URI of the collection. Several are a backup that is spread over stores by locality, which is refused.
fn collection(cursor: &mut Cursor<'_>) -> Result<Text, PgError> {
    let refusal = cursor.unsupported("BACKUP INTO several URIs is not supported yet");
    let mut uris = cursor.texts()?;
    if uris.len() > 1 {
        cursor.refuse(refusal.hint("Name one URI; EXECUTION LOCALITY decides where the backup runs."));
    }
    Ok(uris.swap_remove(0))
}

fn as_of(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    if cursor.at_word("AS") {
        let refusal = cursor.unsupported("BACKUP AS OF SYSTEM TIME is not supported").detail(NO_HISTORY);
        cursor.refuse(
            refusal.hint("Leave AS OF SYSTEM TIME out: a backup shows its databases as they are when it begins."),
        );
        cursor.expect_words(&["AS", "OF", "SYSTEM", "TIME"])?;
        cursor.expression()?;
    }
    Ok(())
}

fn options(cursor: &mut Cursor<'_>) -> Result<BackupOptions, PgError> {
    let mut options = BackupOptions::default();
    if !cursor.eat_word("WITH") {
        return Ok(options);
    }
    let listed = cursor.eat_word("OPTIONS");
    if listed {
        cursor.expect(&Token::LParen)?;
    }
    let mut told = Vec::new();
    loop {
        option(cursor, &mut options, &mut told)?;
        if !cursor.eat(&Token::Comma) {
            break;
        }
    }
    if listed {
        cursor.expect(&Token::RParen)?;
    }
    Ok(options)
}

/// One option; `told` are the `twice` of those before it.
fn option(cursor: &mut Cursor<'_>, options: &mut BackupOptions, told: &mut Vec<&'static str>) -> Result<(), PgError> {
    // The first word decides, so that an error is at the second when that one is wrong.
    let Some(which) = OPTIONS.iter().position(|known| cursor.at_word(known.name[0])) else {
        return Err(cursor.unexpected());
    };
    let known = &OPTIONS[which];
    let mut refusal = cursor.unsupported(format!("BACKUP option {} is not supported yet", known.name.join(" ")));
    if which == REVISION_HISTORY {
        refusal.message = "BACKUP option revision_history is not supported".to_owned();
        refusal = refusal
            .detail(NO_HISTORY)
            .hint("Leave the option out; PostgreSQL's WAL archive leads to the points in time between two backups.");
    }
    cursor.expect_words(known.name)?;
    // CockroachDB's parser looks one token ahead only where the option could go on, and names the last it has seen.
    let mut looks_ahead = known.value == Value::Condition;
    let mut asked = true;
    match known.value {
        Value::Switch if !cursor.eat(&Token::Eq) => (looks_ahead, options.detached) = (true, true),
        Value::Switch if cursor.eat_word("TRUE") => options.detached = true,
        Value::Switch if cursor.eat_word("FALSE") => options.detached = false,
        Value::Switch => return Err(cursor.unexpected()),
        Value::Condition => asked = !cursor.eat(&Token::Eq) || !cursor.expression()?,
        Value::Text => {
            cursor.expect(&Token::Eq)?;
            let text = cursor.text()?;
            if which == EXECUTION_LOCALITY {
                options.execution_locality = Some(text);
            }
        }
        Value::Texts => {
            cursor.expect(&Token::Eq)?;
            cursor.texts()?;
        }
        Value::Nothing => {}
    }
    if told.contains(&known.twice) {
        return Err(if looks_ahead { cursor.wrong_here(known.twice) } else { cursor.wrong_before(known.twice) });
    }
    told.push(known.twice);
    if asked && ![DETACHED, EXECUTION_LOCALITY].contains(&which) {
        cursor.refuse(refusal);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Statement, parse};

    fn literal(text: &str) -> Text {
        Text::Literal(text.to_owned())
    }

    #[test]
    fn a_backup_of_databases_is_read() {
        let plain = BackupOptions::default();
        let detached = BackupOptions { detached: true, ..plain.clone() };
        let both = BackupOptions { detached: true, execution_locality: Some(literal("region=a")) };
        let bound = BackupOptions { detached: true, execution_locality: Some(Text::Placeholder(2)) };
        for (text, databases, into, options) in [
            ("BACKUP DATABASE foo INTO 'Bar'", vec!["foo"], literal("Bar"), &plain),
            ("backup database foo, BAZ into BAR;", vec!["foo", "baz"], literal("bar"), &plain),
            ("BACKUP DATABASE \"B b\", a INTO \"Bar\"", vec!["B b", "a"], literal("Bar"), &plain),
            ("BACKUP DATABASE a, a INTO ('it''s')", vec!["a", "a"], literal("it's"), &plain),
            ("BACKUP DATABASE a INTO ($1)", vec!["a"], Text::Placeholder(1), &plain),
            ("BACKUP DATABASE a INTO latest", vec!["a"], literal("latest"), &plain),
            ("BACKUP DATABASE database INTO E'a\\n' WITH detached = FALSE", vec!["database"], literal("a\n"), &plain),
            ("BACKUP DATABASE a INTO $$x$$ WITH Detached", vec!["a"], literal("x"), &detached),
            ("BACKUP DATABASE a INTO x WITH OPTIONS (detached = true)", vec!["a"], literal("x"), &detached),
            ("BACKUP DATABASE a INTO x WITH EXECUTION LOCALITY = 'region=a', DETACHED", vec!["a"], literal("x"), &both),
            (
                "BACKUP DATABASE a INTO $1 WITH OPTIONS (execution /* ! */ locality = $2, detached)",
                vec!["a"],
                Text::Placeholder(1),
                &bound,
            ),
            ("BACKUP DATABASE a INTO x WITH revision_history = false, detached", vec!["a"], literal("x"), &detached),
        ] {
            let databases = databases.into_iter().map(str::to_owned).collect();
            let expected = Backup { databases, into, options: options.clone() };
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert!(parse(text) == Ok(vec![Statement::Backup(expected)]), "{text}");
        }
    }

    #[test]
    fn a_syntax_error_names_its_token() {
        for (text, near, position) in [
            ("BACKUP", "EOF", 7),
            ("BACKUP DATABASE a", "EOF", 18),
            ("BACKUP DATABASE INTO 'x'", "INTO", 17),
            ("BACKUP DATABASE a.b INTO 'x'", ".", 18),
            ("BACKUP DATABASE a, INTO 'x'", "INTO", 20),
            ("BACKUP DATABASE 'a' INTO 'x'", "a", 17),
            ("BACKUP DATABASE select INTO 'x'", "select", 17),
            ("BACKUP DATABASE a INTO", "EOF", 23),
            ("BACKUP DATABASE a INTO ()", ")", 25),
            ("BACKUP DATABASE a INTO ('x'", "EOF", 28),
            ("BACKUP DATABASE a INTO ('x') IN 'y'", "IN", 30),
            ("BACKUP DATABASE a INTO 'x' WITH", "EOF", 32),
            ("BACKUP DATABASE a INTO 'x' WITH OPTIONS detached", "detached", 41),
            ("BACKUP DATABASE a INTO 'x' WITH OPTIONS ()", ")", 42),
            ("BACKUP DATABASE a INTO 'x' WITH OPTIONS (detached", "EOF", 50),
            ("BACKUP DATABASE a INTO 'x' WITH detached, x", "x", 43),
            ("BACKUP DATABASE a INTO 'x' WITH detached=$1", "1", 42),
            ("BACKUP DATABASE a INTO 'x' WITH execution = 'a'", "=", 43),
            ("BACKUP DATABASE a INTO 'x' WITH execution locality", "EOF", 51),
            ("BACKUP DATABASE a INTO 'x' WITH execution locality = region=a", "=", 60),
            ("BACKUP DATABASE a INTO 'x' WITH \"detached\"", "detached", 33),
            ("BACKUP DATABASE a INTO 'x' AS OF SYSTEM TIME", "EOF", 45),
            ("BACKUP DATABASE a INTO 'x' AS OF SYSTEM TIME (1", "EOF", 48),
            ("BACKUP foo INTO 'bar' WITH key1, key2 = 'value'", "key1", 28),
            ("BACKUP ROLE foo, bar INTO 'baz'", "foo", 13),
            ("BACKUP SCHEMA foo INTO 'baz'", "foo", 15),
            ("BACKUP TABLE INTO 'x'", "INTO", 14),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.message, format!("at or near \"{near}\": syntax error"), "{text}");
            assert_eq!((error.code.as_str(), error.position), ("42601", Some(position)), "{text}");
            assert_eq!(error.hint.as_deref(), Some("try \\h BACKUP"), "{text}");
        }
    }

    #[test]
    fn an_option_told_twice_is_a_syntax_error_at_the_last_token_seen() {
        for (options, near, why) in [
            ("detached, revision_history, detached", "EOF", "detached option"),
            ("detached, detached = true", "true", "detached option"),
            ("detached, detached = false, kms = 'x'", "false", "detached option"),
            ("revision_history, revision_history = 1 > 2, detached", ",", "revision_history option"),
            (
                "include_all_virtual_clusters=false, include_all_secondary_tenants",
                "EOF",
                "include_all_virtual_clusters",
            ),
            (
                "updates_cluster_monitoring_metrics=false, updates_cluster_monitoring_metrics, detached",
                ",",
                "updates_cluster_monitoring_metrics option",
            ),
            ("execution locality = 'a=b', execution locality = 'c=d'", "c=d", "execution locality option"),
            ("encryption_passphrase = 'a', encryption_passphrase = 'b'", "*****", "encryption_passphrase"),
            ("kms = 'a', kms = ('b', 'c')", ")", "kms"),
            ("incremental_location = 'a', incremental_location = 'b'", "b", "incremental_location option"),
            ("OPTIONS (detached, detached)", ")", "detached option"),
        ] {
            let text = format!("BACKUP DATABASE a INTO 'x' WITH {options}");
            let error = parse(&text).expect_err(options);
            let message = format!("at or near \"{near}\": syntax error: {why} specified multiple times");
            assert_eq!((error.code.as_str(), error.message), ("42601", message), "{options}");
        }
    }

    #[test]
    fn the_removed_form_is_answered_with_the_one_to_use() {
        let error = parse("BACKUP DATABASE foo TO 'bar'").expect_err("removed");
        assert_eq!(error.message, format!("at or near \"bar\": syntax error: {NO_BACKUP_TO}"));
        assert_eq!((error.code.as_str(), error.position), ("42601", Some(24)));
    }

    #[test]
    fn what_cannot_run_is_refused_by_name() {
        for (text, message, position) in [
            ("BACKUP INTO 'bar'", "BACKUP of a whole cluster is not supported yet", 8),
            ("BACKUP TABLE foo INTO 'bar'", "BACKUP TABLE is not supported yet", 8),
            ("BACKUP foo.foo, bar.*, a.b.c INTO 'bar'", "BACKUP TABLE is not supported yet", 8),
            ("BACKUP *, \"X\" INTO 'bar'", "BACKUP TABLE is not supported yet", 8),
            ("BACKUP role INTO 'bar'", "BACKUP TABLE is not supported yet", 8),
            ("BACKUP tenant INTO 'bar'", "BACKUP TABLE is not supported yet", 8),
            ("BACKUP TENANT 36 INTO 'bar'", "BACKUP VIRTUAL CLUSTER is not supported", 8),
            ("BACKUP VIRTUAL CLUSTER app INTO 'bar'", "BACKUP VIRTUAL CLUSTER is not supported", 8),
            ("BACKUP DATABASE a INTO LATEST IN 'bar'", "BACKUP INTO LATEST IN is not supported yet", 24),
            ("BACKUP DATABASE a INTO 'b' IN ($1, $2)", "BACKUP INTO a named subdirectory is not supported yet", 24),
            ("BACKUP DATABASE a INTO $1 IN $2", "BACKUP INTO a named subdirectory is not supported yet", 24),
            ("BACKUP DATABASE a INTO ('b', 'c')", "BACKUP INTO several URIs is not supported yet", 24),
            (
                "BACKUP DATABASE a INTO 'b' AS OF SYSTEM TIME '1'::timestamp WITH TIME ZONE WITH detached",
                "BACKUP AS OF SYSTEM TIME is not supported",
                28,
            ),
            ("BACKUP DATABASE a INTO b WITH revision_history", "BACKUP option revision_history is not supported", 31),
            (
                "BACKUP DATABASE a INTO b WITH revision_history = $1, detached",
                "BACKUP option revision_history is not supported",
                31,
            ),
            ("BACKUP DATABASE a INTO b WITH kms = ('x', $1)", "BACKUP option kms is not supported yet", 31),
            (
                "BACKUP DATABASE a INTO b WITH strict storage locality",
                "BACKUP option strict storage locality is not supported yet",
                31,
            ),
            (
                "BACKUP DATABASE a INTO b WITH detached, encryption_passphrase = 'x'",
                "BACKUP option encryption_passphrase is not supported yet",
                41,
            ),
            ("EXPLAIN BACKUP DATABASE a INTO 'b'", "EXPLAIN BACKUP is not supported yet", 1),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("0A000", message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }
}
