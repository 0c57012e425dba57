//! `BACKUP`, with all of CockroachDB's grammar.
//!
//! We do part of what it can say. The rest is read all the same, so that a syntax error is told before anything else
//! and a sound statement is refused by the name of what it asks for.

use pgerror::{PgError, SqlState};
use sqlparser::tokenizer::Token;

use crate::collection;
use crate::cursor::Cursor;
use crate::options::{Given, Known, Value, options};
use crate::statement::{Backup, BackupOptions, Text};
use crate::targets::{Targets, Verb, as_of, targets};

pub(crate) const BACKUP: Verb = Verb {
    name: "BACKUP",
    ends: &["INTO", "TO"],
    not_tables: "Back up the whole database: BACKUP DATABASE name INTO 'uri'.",
};

const NO_HISTORY: &str = "PostgreSQL keeps no history of rows.";

pub(crate) const NO_CLUSTERS: &str = "PostgreSQL has no virtual clusters.";

/// What makes no sense without incremental ones.
pub(crate) const ALL_FULL: &str = "Every backup is a full one.";

pub(crate) const LEAVE_OUT: &str = "Leave the option out.";

/// What the option and its alias are called when they are told twice.
const ALL_CLUSTERS: &str = "include_all_virtual_clusters";

/// The form that was removed, in CockroachDB's words.
const NO_BACKUP_TO: &str =
    "The `BACKUP TO` syntax is no longer supported. Please use `BACKUP INTO` to create a backup collection.";

const NO_ENCRYPTION: &str = "Backhaul does not encrypt what it writes.";

const NO_KMS: &str = "There is no key management service that Backhaul could ask.";

/// What to do without encryption of our own.
const LET_THE_STORE: &str = "Let the store encrypt: leave the option out, and give the bucket server-side encryption.";

pub(crate) const OPTIONS: [Known; 13] = [
    Known::ours("detached", Value::Switch, "detached option"),
    Known::ours("execution locality", Value::Text, "execution locality option"),
    Known::not_yet("revision_history", Value::Condition, "revision_history option").never(
        NO_HISTORY,
        "Leave the option out; PostgreSQL's WAL archive leads to the points in time between two backups.",
    ),
    Known::not_yet("encryption_passphrase", Value::Text, "encryption_passphrase").advised(NO_ENCRYPTION, LET_THE_STORE),
    Known::not_yet("kms", Value::Texts, "kms").advised(NO_KMS, LET_THE_STORE),
    Known::not_yet("incremental_location", Value::Texts, "incremental_location option").advised(ALL_FULL, LEAVE_OUT),
    Known::not_yet("include_all_virtual_clusters", Value::Condition, ALL_CLUSTERS).never(NO_CLUSTERS, LEAVE_OUT),
    Known::not_yet("include_all_secondary_tenants", Value::Condition, ALL_CLUSTERS).never(NO_CLUSTERS, LEAVE_OUT),
    Known::not_yet("updates_cluster_monitoring_metrics", Value::Condition, "updates_cluster_monitoring_metrics option")
        .advised("There is no such metric yet.", LEAVE_OUT),
    Known::not_yet("strict storage locality", Value::Nothing, "strict storage locality option").advised(
        "A backup has one store, so nothing of it can be written to another one.",
        "Leave the option out, and name a store of the right region.",
    ),
    // These are ours alone.
    Known::ours("strict execution locality", Value::Nothing, "strict execution locality option"),
    Known::ours("replica", Value::Text, "replica option"),
    Known::ours("skip_unreachable_shards", Value::Nothing, "skip_unreachable_shards option"),
];

pub(crate) fn backup(cursor: &mut Cursor<'_>) -> Result<Backup, PgError> {
    cursor.expect_words(&["BACKUP"])?;
    let targets = targets(cursor, &BACKUP)?;
    if cursor.eat_word("TO") {
        cursor.texts()?;
        return Err(cursor.wrong_before(NO_BACKUP_TO));
    }
    cursor.expect_words(&["INTO"])?;
    let into = destination(cursor)?;
    as_of(
        cursor,
        &BACKUP,
        NO_HISTORY,
        "Leave AS OF SYSTEM TIME out: a backup shows its databases as they are when it begins.",
    )?;
    let mut chosen = BackupOptions::default();
    let told = options(cursor, BACKUP.name, &OPTIONS)?;
    if let Some(why) = contradiction(&told, targets == Targets::Cluster) {
        cursor.refuse_first(PgError::new(SqlState::UNCATEGORIZED, why));
    }
    for option in told {
        match option {
            ("detached", given) => chosen.detached = matches!(given, Given::Yes),
            ("execution locality", Given::Text(filter)) => chosen.execution_locality = Some(filter),
            ("strict execution locality", _) => chosen.strict = true,
            ("replica", Given::Text(which)) => chosen.replica = Some(which),
            ("skip_unreachable_shards", _) => chosen.skip_unreachable_shards = true,
            _ => {}
        }
    }
    Ok(Backup { targets, into, options: chosen })
}

/// What is wrong with these options together, or with this target, in CockroachDB's words.
fn contradiction(told: &[(&str, Given)], whole: bool) -> Option<&'static str> {
    let has = |name: &str| told.iter().any(|(told, given)| *told == name && !matches!(given, Given::No));
    if has("encryption_passphrase") && has("kms") {
        return Some("cannot have both encryption_passphrase and kms option set");
    }
    let all_clusters = has("include_all_virtual_clusters") || has("include_all_secondary_tenants");
    (all_clusters && !whole)
        .then_some("the include_all_virtual_clusters option is only supported for full cluster backups")
}

/// What follows `INTO`.
fn destination(cursor: &mut Cursor<'_>) -> Result<Text, PgError> {
    let hint = "Take a full backup: BACKUP DATABASE name INTO 'uri'.";
    let begun = cursor.here();
    if cursor.eat_words(&["LATEST", "IN"]) {
        cursor.refuse(cursor.unsupported_at(begun, "BACKUP INTO LATEST IN is not supported yet").hint(hint));
        return collection(cursor);
    }
    let list = cursor.at(&Token::LParen);
    let into = collection(cursor)?;
    if !list && cursor.eat_word("IN") {
        let refusal = cursor.unsupported_at(begun, "BACKUP INTO a named subdirectory is not supported yet");
        cursor.refuse(refusal.hint(hint));
        return collection(cursor);
    }
    Ok(into)
}

fn collection(cursor: &mut Cursor<'_>) -> Result<Text, PgError> {
    let hint = "Name one URI; EXECUTION LOCALITY decides where the backup runs.";
    collection::collection(cursor, "BACKUP INTO", hint)
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
        let at = |place| BackupOptions { execution_locality: Some(place), ..plain.clone() };
        let both = BackupOptions { detached: true, ..at(literal("region=a")) };
        let bound = BackupOptions { detached: true, ..at(Text::Placeholder(2)) };
        let skipping = BackupOptions { skip_unreachable_shards: true, ..detached.clone() };
        let read = |which| BackupOptions { strict: true, replica: Some(which), ..plain.clone() };
        let (strict, strict_bound) = (read(literal("standby")), read(Text::Placeholder(3)));
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
            ("BACKUP DATABASE a INTO x WITH SKIP_UNREACHABLE_SHARDS, detached", vec!["a"], literal("x"), &skipping),
            ("BACKUP DATABASE a INTO x WITH revision_history = false, detached", vec!["a"], literal("x"), &detached),
            (
                "BACKUP DATABASE a INTO x WITH Strict Execution Locality, REPLICA = standby",
                vec!["a"],
                literal("x"),
                &strict,
            ),
            (
                "BACKUP DATABASE a INTO x WITH OPTIONS (replica = $3, strict execution locality)",
                vec!["a"],
                literal("x"),
                &strict_bound,
            ),
        ] {
            let databases = databases.into_iter().map(str::to_owned).collect();
            let expected = Backup { targets: Targets::Databases(databases), into, options: options.clone() };
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert!(parse(text) == Ok(vec![Statement::Backup(expected.clone())]), "{text}");
            let explained = format!("EXPLAIN {text}");
            assert!(parse(&explained) == Ok(vec![Statement::ExplainBackup(expected)]), "{explained}");
        }
    }

    #[test]
    fn a_backup_of_nothing_that_is_named_is_of_all() {
        for text in ["BACKUP INTO 'x' WITH detached", "backup into ('x') with options (DETACHED)"] {
            let options = BackupOptions { detached: true, ..BackupOptions::default() };
            let expected = Backup { targets: Targets::Cluster, into: literal("x"), options };
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
            ("BACKUP DATABASE a INTO 'x' WITH strict", "EOF", 39),
            ("BACKUP DATABASE a INTO 'x' WITH strict execution locality = true", "=", 59),
            ("BACKUP DATABASE a INTO 'x' WITH replica", "EOF", 40),
            ("BACKUP DATABASE a INTO 'x' WITH skip_unreachable_shards = true", "=", 57),
            ("EXPLAIN BACKUP DATABASE a", "EOF", 26),
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
            (
                "strict execution locality, strict execution locality, detached",
                "locality",
                "strict execution locality option",
            ),
            ("replica = 'any', replica = 'standby'", "standby", "replica option"),
            (
                "skip_unreachable_shards, detached, skip_unreachable_shards",
                "skip_unreachable_shards",
                "skip_unreachable_shards option",
            ),
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
            ("EXPLAIN BACKUP DATABASE a INTO b WITH kms = 'x'", "BACKUP option kms is not supported yet", 39),
            ("EXPLAIN RESTORE DATABASE a FROM LATEST IN 'b'", "EXPLAIN RESTORE is not supported yet", 1),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("0A000", message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }
}
