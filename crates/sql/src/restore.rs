//! `RESTORE`, with all of CockroachDB's grammar.
//!
//! As with `BACKUP`, what it can say and we cannot do is read first and refused by its name then.

use pgerror::{PgError, SqlState};

use crate::backup::{ALL_FULL, LEAVE_OUT, NO_CLUSTERS};
use crate::collection;
use crate::cursor::Cursor;
use crate::options::{Given, Known, Value, options};
use crate::statement::{Restore, RestoreOptions};
use crate::targets::{Targets, Verb, as_of, targets};

const RESTORE: Verb = Verb {
    name: "RESTORE",
    ends: &["FROM"],
    not_tables: "Restore the whole database, under another name if need be: \
                 RESTORE DATABASE name FROM LATEST IN 'uri' WITH new_db_name = 'other'.",
};

/// The form that was removed, in CockroachDB's words.
const NO_RESTORE_FROM_URI: &str = "The `RESTORE <targets> FROM <backupURI>` syntax is no longer supported. \
                                   Please use `RESTORE <targets> FROM <subdirectory> IN <collectionURI>`.";

/// The same without targets.
const NO_RESTORE_ALL_FROM_URI: &str = "The `RESTORE FROM <backupURI>` syntax is no longer supported. \
                                       Please use `RESTORE FROM <subdirectory> IN <collectionURI>`.";

/// CockroachDB's words.
const ONE_NEW_NAME: &str = "new_db_name can only be used for RESTORE DATABASE with a single target database";

const NO_REGIONS: &str = "A database of PostgreSQL has no regions.";

/// What there is nothing to skip in.
const WHOLE: &str = "A database is backed up whole, and nothing that it refers to is missing.";

pub(crate) const NOT_ENCRYPTED: &str = "Backhaul does not encrypt what it writes, so there is nothing to open.";

const OPTIONS: [Known; 25] = [
    Known::ours("detached", Value::Nothing, "detached option"),
    Known::ours("new_db_name", Value::Text, "new_db_name"),
    Known::ours("execution locality", Value::Text, "execution locality option"),
    Known::not_yet("encryption_passphrase", Value::Text, "encryption_passphrase").advised(NOT_ENCRYPTED, LEAVE_OUT),
    Known::not_yet("kms", Value::Texts, "kms").advised(NOT_ENCRYPTED, LEAVE_OUT),
    Known::not_yet("into_db", Value::Text, "into_db").advised(
        "A database is restored whole, and new.",
        "Give the database another name with new_db_name, and move tables from there.",
    ),
    Known::not_yet("skip_missing_foreign_keys", Value::Nothing, "skip_missing_foreign_keys").advised(WHOLE, LEAVE_OUT),
    Known::not_yet("skip_missing_sequences", Value::Nothing, "skip_missing_sequences").advised(WHOLE, LEAVE_OUT),
    Known::not_yet("skip_missing_sequence_owners", Value::Nothing, "skip_missing_sequence_owners")
        .advised(WHOLE, LEAVE_OUT),
    Known::not_yet("skip_missing_views", Value::Nothing, "skip_missing_views").advised(WHOLE, LEAVE_OUT),
    Known::not_yet("skip_missing_udfs", Value::Nothing, "skip_missing_udfs").advised(WHOLE, LEAVE_OUT),
    Known::not_yet("skip_localities_check", Value::Nothing, "skip_localities_check").never(NO_REGIONS, LEAVE_OUT),
    Known::not_yet("debug_pause_on", Value::Text, "debug_pause_on").advised(
        "Where a job is to stop is the session's to say.",
        "Use SET backhaul.debug_pausepoints before the statement.",
    ),
    Known::not_yet("incremental_location", Value::Texts, "incremental_location option").advised(ALL_FULL, LEAVE_OUT),
    Known::not_yet("virtual_cluster_name", Value::Text, "tenant_name option").never(NO_CLUSTERS, LEAVE_OUT),
    Known::not_yet("tenant_name", Value::Text, "tenant_name option").never(NO_CLUSTERS, LEAVE_OUT),
    Known::not_yet("virtual_cluster", Value::Text, "virtual_cluster option").never(NO_CLUSTERS, LEAVE_OUT),
    Known::not_yet("tenant", Value::Text, "virtual_cluster option").never(NO_CLUSTERS, LEAVE_OUT),
    Known::not_yet("schema_only", Value::Nothing, "schema_only option").advised(
        "A database is restored with its rows.",
        "The backup's RESTORE.txt tells how to restore the schema alone with pg_restore.",
    ),
    Known::not_yet("verify_backup_table_data", Value::Nothing, "verify_backup_table_data option").advised(
        "Every file is checked against its checksum as it is read.",
        "Use SHOW BACKUP FROM LATEST IN 'uri' WITH check_files to read every file without a restore.",
    ),
    Known::not_yet("unsafe_restore_incompatible_version", Value::Nothing, "unsafe_restore_incompatible_version")
        .advised("A backup whose format this version does not know cannot be read.", LEAVE_OUT),
    Known::not_yet("experimental deferred copy", Value::Nothing, "experimental deferred copy")
        .advised("Rows are in the database when the statement ends.", LEAVE_OUT),
    Known::not_yet("experimental copy", Value::Nothing, "experimental copy")
        .advised("Rows are in the database when the statement ends.", LEAVE_OUT),
    Known::not_yet("remove_regions", Value::Nothing, "remove_regions").never(NO_REGIONS, LEAVE_OUT),
    // Ours alone.
    Known::ours("shard_map", Value::Text, "shard_map option"),
];

pub(crate) fn restore(cursor: &mut Cursor<'_>) -> Result<Restore, PgError> {
    cursor.expect_words(&["RESTORE"])?;
    let removed = if cursor.at_word("FROM") { NO_RESTORE_ALL_FROM_URI } else { NO_RESTORE_FROM_URI };
    let targets = if cursor.at_words(&["SYSTEM", "USERS"]) { users(cursor)? } else { targets(cursor, &RESTORE)? };
    cursor.expect_words(&["FROM"])?;
    let (from, collection) = collection::backup(cursor, "RESTORE from", removed)?;
    as_of(
        cursor,
        &RESTORE,
        "A backup shows its databases as they were when it began.",
        "Leave AS OF SYSTEM TIME out, and name the backup by its time: SHOW BACKUPS IN 'uri' lists them.",
    )?;
    let mut chosen = RestoreOptions::default();
    for option in options(cursor, RESTORE.name, &OPTIONS)? {
        match option {
            ("detached", _) => chosen.detached = true,
            ("new_db_name", Given::Text(name)) => chosen.new_db_name = Some(name),
            ("execution locality", Given::Text(filter)) => chosen.execution_locality = Some(filter),
            ("shard_map", Given::Text(pairs)) => chosen.shard_map = Some(pairs),
            _ => {}
        }
    }
    if chosen.new_db_name.is_some() && targets.databases().len() != 1 {
        cursor.refuse_first(PgError::new(SqlState::UNCATEGORIZED, ONE_NEW_NAME));
    }
    Ok(Restore { targets, from, collection, options: chosen })
}

/// `SYSTEM USERS`, refused.
fn users(cursor: &mut Cursor<'_>) -> Result<Targets, PgError> {
    let refusal = cursor.unsupported("RESTORE SYSTEM USERS is not supported yet").detail("Roles are in no backup.");
    cursor.refuse(refusal.hint("Use pg_dumpall --roles-only on one cluster, and psql on the other."));
    cursor.expect_words(&["SYSTEM", "USERS"])?;
    Ok(Targets::Databases(Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Statement, Subdir, Text, parse};

    fn literal(text: &str) -> Text {
        Text::Literal(text.to_owned())
    }

    fn of(database: &str) -> Targets {
        Targets::Databases(vec![database.to_owned()])
    }

    #[test]
    fn a_restore_of_a_database_is_read() {
        use Subdir::{Latest, Named};
        let plain = RestoreOptions::default();
        let detached = RestoreOptions { detached: true, ..plain.clone() };
        let renamed = RestoreOptions { new_db_name: Some(literal("New")), ..plain.clone() };
        let all = RestoreOptions {
            new_db_name: Some(literal("b")),
            execution_locality: Some(literal("region=a")),
            detached: true,
            shard_map: None,
        };
        let bound = RestoreOptions {
            new_db_name: Some(Text::Placeholder(4)),
            execution_locality: Some(Text::Placeholder(3)),
            detached: false,
            shard_map: Some(Text::Placeholder(5)),
        };
        let mapped = RestoreOptions { shard_map: Some(literal("s2=s1,S3=s1")), ..plain.clone() };
        for (text, database, from, collection, options) in [
            ("RESTORE DATABASE foo FROM LATEST IN 'Bar'", "foo", Latest, literal("Bar"), &plain),
            ("restore database FOO from latest in BAR;", "foo", Latest, literal("bar"), &plain),
            ("RESTORE DATABASE \"B b\" FROM 'LATEST' IN ('it''s')", "B b", Latest, literal("it's"), &plain),
            ("RESTORE DATABASE a FROM '/2026' IN x", "a", Named(literal("/2026")), literal("x"), &plain),
            ("RESTORE DATABASE a FROM $1 IN ($2)", "a", Named(Text::Placeholder(1)), Text::Placeholder(2), &plain),
            ("RESTORE DATABASE database FROM $$a$$ IN x", "database", Named(literal("a")), literal("x"), &plain),
            ("RESTORE DATABASE a FROM LATEST IN x WITH Detached", "a", Latest, literal("x"), &detached),
            ("RESTORE DATABASE a FROM LATEST IN x WITH new_db_name = 'New'", "a", Latest, literal("x"), &renamed),
            ("RESTORE DATABASE a FROM LATEST IN x WITH Shard_Map = 's2=s1,S3=s1'", "a", Latest, literal("x"), &mapped),
            (
                "RESTORE DATABASE a FROM LATEST IN x WITH OPTIONS (NEW_DB_NAME = B, \
                 EXECUTION /* ! */ LOCALITY = 'region=a', DETACHED)",
                "a",
                Latest,
                literal("x"),
                &all,
            ),
            (
                "RESTORE DATABASE a FROM $1 IN $2 WITH execution locality = $3, new_db_name = $4, shard_map = $5",
                "a",
                Named(Text::Placeholder(1)),
                Text::Placeholder(2),
                &bound,
            ),
        ] {
            let expected = Restore { targets: of(database), from, collection, options: options.clone() };
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert!(parse(text) == Ok(vec![Statement::Restore(expected)]), "{text}");
        }
    }

    #[test]
    fn several_databases_or_all_are_read_and_keep_their_names() {
        let two = Targets::Databases(vec!["a".to_owned(), "B".to_owned()]);
        for (text, targets) in
            [("RESTORE DATABASE a, \"B\" FROM LATEST IN x", two), ("restore FROM latest IN ('x')", Targets::Cluster)]
        {
            let options = RestoreOptions::default();
            let expected = Restore { targets, from: Subdir::Latest, collection: literal("x"), options };
            assert!(parse(text) == Ok(vec![Statement::Restore(expected)]), "{text}");
            let error = parse(&format!("{text} WITH new_db_name = $1")).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("XXUUU", ONE_NEW_NAME), "{text}");
        }
    }

    #[test]
    fn a_syntax_error_names_its_token() {
        for (text, near, position) in [
            ("RESTORE", "EOF", 8),
            ("RESTORE DATABASE a", "EOF", 19),
            ("RESTORE DATABASE FROM LATEST IN 'x'", "FROM", 18),
            ("RESTORE DATABASE a.b FROM LATEST IN 'x'", ".", 19),
            ("RESTORE DATABASE a INTO 'x'", "INTO", 20),
            ("RESTORE DATABASE a FROM", "EOF", 24),
            ("RESTORE DATABASE a FROM IN 'x'", "IN", 25),
            ("RESTORE DATABASE a FROM ('x') IN 'x'", "(", 25),
            ("RESTORE DATABASE a FROM LATEST IN", "EOF", 34),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH", "EOF", 43),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH OPTIONS ()", ")", 53),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH OPTIONS (detached", "EOF", 61),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH detached = true", "=", 53),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH new_db_name", "EOF", 55),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH new_db_name = ('b')", "(", 58),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH revision_history", "revision_history", 44),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH shard_map", "EOF", 53),
            ("RESTORE DATABASE a FROM LATEST IN 'x' WITH experimental detached", "detached", 57),
            ("RESTORE DATABASE a FROM LATEST IN 'x' AS OF SYSTEM TIME '-1h' foo", "foo", 63),
            ("RESTORE foo FROM 'bar' IN 'baz' WITH key1, key2 = 'value'", "key1", 38),
            ("RESTORE ROLE foo, bar FROM 'baz' IN 'qux'", "foo", 14),
            ("EXPLAIN RESTORE DATABASE a", "EOF", 27),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.message, format!("at or near \"{near}\": syntax error"), "{text}");
            assert_eq!((error.code.as_str(), error.position), ("42601", Some(position)), "{text}");
            assert_eq!(error.hint.as_deref(), Some("try \\h RESTORE"), "{text}");
        }
    }

    #[test]
    fn an_option_told_twice_is_a_syntax_error_at_the_second() {
        for (options, near, why) in [
            ("detached, skip_missing_views, detached", "detached", "detached option"),
            ("skip_missing_foreign_keys, skip_missing_foreign_keys", "skip_missing_foreign_keys", ""),
            ("OPTIONS (skip_missing_udfs, schema_only, skip_missing_udfs)", "skip_missing_udfs", ""),
            ("new_db_name = 'a', new_db_name = 'b', detached", "b", "new_db_name"),
            ("shard_map = 'a=b', shard_map = 'c=d'", "c=d", "shard_map option"),
            ("execution locality = 'a=b', execution locality = 'c=d'", "c=d", "execution locality option"),
            ("virtual_cluster = 'a', tenant = 'b'", "b", "virtual_cluster option"),
            ("tenant_name = 'a', virtual_cluster_name = 'b'", "b", "tenant_name option"),
            ("kms = 'a', kms = ('b', 'c')", ")", "kms"),
            ("encryption_passphrase = 'a', encryption_passphrase = 'b'", "*****", "encryption_passphrase"),
            ("experimental deferred copy, experimental deferred copy", "copy", "experimental deferred copy"),
        ] {
            let text = format!("RESTORE DATABASE a FROM LATEST IN 'x' WITH {options}");
            let error = parse(&text).expect_err(options);
            let why = if why.is_empty() { near } else { why };
            let message = format!("at or near \"{near}\": syntax error: {why} specified multiple times");
            assert_eq!((error.code.as_str(), error.message), ("42601", message), "{options}");
        }
    }

    #[test]
    fn a_removed_form_is_answered_with_the_one_to_use() {
        for (text, near, why, position) in [
            ("RESTORE foo FROM 'bar'", "EOF", NO_RESTORE_FROM_URI, 23),
            ("RESTORE DATABASE foo FROM 'bar';", "EOF", NO_RESTORE_FROM_URI, 32),
            ("RESTORE DATABASE foo FROM 'bar', 'baz'", ",", NO_RESTORE_FROM_URI, 32),
            ("RESTORE DATABASE foo FROM $1 WITH new_db_name = 'baz'", "WITH", NO_RESTORE_FROM_URI, 30),
            ("EXPLAIN RESTORE DATABASE foo FROM 'bar'", "EOF", NO_RESTORE_FROM_URI, 40),
            ("RESTORE FROM 'foo'", "EOF", NO_RESTORE_ALL_FROM_URI, 19),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.message, format!("at or near \"{near}\": syntax error: {why}"), "{text}");
            assert_eq!((error.code.as_str(), error.position), ("42601", Some(position)), "{text}");
            assert_eq!(error.hint.as_deref(), Some("try \\h RESTORE"), "{text}");
        }
    }

    #[test]
    fn what_cannot_run_is_refused_by_name() {
        for (text, message, position) in [
            (
                "RESTORE FROM LATEST IN 'bar' WITH unsafe_restore_incompatible_version, execution locality = 'abc'",
                "RESTORE option unsafe_restore_incompatible_version is not supported yet",
                35,
            ),
            ("RESTORE TABLE foo FROM LATEST IN 'bar'", "RESTORE TABLE is not supported yet", 9),
            ("RESTORE abc.xzy, a.* FROM 'a' IN 'b' WITH into_db = 'foo'", "RESTORE TABLE is not supported yet", 9),
            ("RESTORE role FROM 'a' IN 'b'", "RESTORE TABLE is not supported yet", 9),
            ("RESTORE tenant FROM 'a' IN 'b'", "RESTORE TABLE is not supported yet", 9),
            ("RESTORE system FROM 'a' IN 'b'", "RESTORE TABLE is not supported yet", 9),
            ("RESTORE SYSTEM USERS FROM 'a' IN 'b'", "RESTORE SYSTEM USERS is not supported yet", 9),
            ("RESTORE TENANT 36 FROM LATEST IN ($1, $2)", "RESTORE VIRTUAL CLUSTER is not supported", 9),
            ("RESTORE VIRTUAL CLUSTER a FROM LATEST IN b", "RESTORE VIRTUAL CLUSTER is not supported", 9),
            ("RESTORE DATABASE a FROM $1 IN ($2, $3)", "RESTORE from several URIs is not supported yet", 31),
            (
                "RESTORE DATABASE a FROM LATEST IN 'b' AS OF SYSTEM TIME '1' WITH detached",
                "RESTORE AS OF SYSTEM TIME is not supported",
                39,
            ),
            ("EXPLAIN RESTORE DATABASE a FROM LATEST IN 'b'", "EXPLAIN RESTORE is not supported yet", 1),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("0A000", message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }

    #[test]
    fn an_option_that_we_do_not_have_is_refused_by_name() {
        for (option, yet) in [
            ("encryption_passphrase = 'x'", true),
            ("kms = ('x', $1)", true),
            ("into_db = baz", true),
            ("skip_missing_foreign_keys", true),
            ("SKIP_MISSING_SEQUENCES", true),
            ("skip_missing_sequence_owners", true),
            ("skip_missing_views", true),
            ("skip_missing_udfs", true),
            ("skip_localities_check", false),
            ("debug_pause_on = 'error'", true),
            ("incremental_location = 'x'", true),
            ("virtual_cluster_name = 'x'", false),
            ("tenant_name = 'x'", false),
            ("virtual_cluster = '5'", false),
            ("tenant = '5'", false),
            ("schema_only", true),
            ("verify_backup_table_data", true),
            ("unsafe_restore_incompatible_version", true),
            ("experimental deferred copy", true),
            ("experimental copy", true),
            ("remove_regions", false),
        ] {
            let error =
                parse(&format!("RESTORE DATABASE a FROM LATEST IN 'b' WITH detached, {option}")).expect_err(option);
            let name = option.split(" =").next().unwrap_or_default().to_lowercase();
            let message = format!("RESTORE option {name} is not supported{}", if yet { " yet" } else { "" });
            assert_eq!((error.code.as_str(), error.message, error.position), ("0A000", message, Some(54)), "{option}");
        }
    }
}
