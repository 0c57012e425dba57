//! `SHOW BACKUPS` and `SHOW BACKUP`: what is in a collection, and what is in one backup of it.

use pgerror::PgError;

use crate::backup::{ALL_FULL, LEAVE_OUT};
use crate::collection::{self, collection};
use crate::cursor::Cursor;
use crate::expression::expression;
use crate::options::{Known, Value, options};
use crate::restore::NOT_ENCRYPTED;
use crate::statement::{ShowBackup, ShowBackupOptions, ShowBackupWhat, Statement};

const SIZES: &str = "Sizes are read from the manifest, and cost nothing.";

const ALL_LISTED: &str = "A collection is always listed by its files.";

const OPTIONS: [Known; 11] = [
    Known::ours("as_json", Value::Nothing, "as_json option"),
    Known::ours("check_files", Value::Nothing, "check_files option"),
    Known::not_yet("debug_ids", Value::Nothing, "debug_ids option")
        .advised("What is in a backup has the names that it had, and their OIDs are not its own.", LEAVE_OUT),
    Known::not_yet("incremental_location", Value::Texts, "incremental_location option").advised(ALL_FULL, LEAVE_OUT),
    Known::not_yet("kms", Value::Texts, "kms option").advised(NOT_ENCRYPTED, LEAVE_OUT),
    Known::not_yet("encryption_passphrase", Value::Text, "encryption_passphrase option")
        .advised(NOT_ENCRYPTED, LEAVE_OUT),
    Known::not_yet("encryption_info_dir", Value::Text, "encryption_info_dir option").advised(NOT_ENCRYPTED, LEAVE_OUT),
    Known::not_yet("privileges", Value::Nothing, "privileges option").advised(
        "Rights are in the schema of the backup, as GRANT statements.",
        "The backup's RESTORE.txt tells how to print the schema with pg_restore.",
    ),
    Known::not_yet("skip size", Value::Nothing, "skip size option").advised(SIZES, LEAVE_OUT),
    Known::not_yet("nosize", Value::Nothing, "skip size option").advised(SIZES, LEAVE_OUT),
    Known::not_yet("debug_dump_metadata_sst", Value::Nothing, "debug_dump_metadata_sst option")
        .advised("A backup's metadata is a text.", "Use as_json to see it."),
];

const LIST_OPTIONS: [Known; 2] = [
    Known::not_yet("index", Value::Nothing, "index option").advised(ALL_LISTED, LEAVE_OUT),
    Known::not_yet("revision start time", Value::Nothing, "revision start time option").advised(ALL_FULL, LEAVE_OUT),
];

/// What follows `SHOW BACKUPS`.
pub(crate) fn backups(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    cursor.expect_words(&["IN"])?;
    let collection = collection(cursor, "SHOW BACKUPS IN", "Name one URI.")?;
    for bound in ["NEWER", "OLDER"] {
        if cursor.at_word(bound) {
            let refusal = cursor.unsupported(format!("SHOW BACKUPS {bound} THAN is not supported yet"));
            let hint = "Choose among them: SELECT * FROM [SHOW BACKUPS IN 'uri'] AS b (path) WHERE path < '/2030'.";
            cursor.refuse(refusal.detail("All backups of the collection are listed.").hint(hint));
            cursor.expect_words(&[bound, "THAN"])?;
            expression(cursor)?;
        }
    }
    options(cursor, "SHOW BACKUPS", &LIST_OPTIONS)?;
    Ok(Statement::ShowBackups { collection })
}

/// What follows `SHOW BACKUP`.
pub(crate) fn backup(cursor: &mut Cursor<'_>) -> Result<ShowBackup, PgError> {
    let (form, what) = what(cursor);
    cursor.eat_word("FROM");
    let removed = format!(
        "The `{form}` syntax without the `IN` keyword is no longer supported. \
         Please use `{form} FROM <subdirectory> IN <collectionURI>`."
    );
    let (from, collection) = collection::backup(cursor, "SHOW BACKUP IN", &removed)?;
    let mut chosen = ShowBackupOptions::default();
    for (name, _) in options(cursor, "SHOW BACKUP", &OPTIONS)? {
        match name {
            "as_json" => chosen.as_json = true,
            "check_files" => chosen.check_files = true,
            _ => {}
        }
    }
    Ok(ShowBackup { what, from, collection, options: chosen })
}

/// What is to be shown, and the words that said so.
fn what(cursor: &mut Cursor<'_>) -> (&'static str, ShowBackupWhat) {
    let begun = cursor.here();
    // SHOW BACKUP files IN 'uri' is of a subdirectory of that name.
    let mut eat = |word| !cursor.at_words(&[word, "IN"]) && cursor.eat_word(word);
    if eat("SCHEMAS") {
        ("SHOW BACKUP SCHEMAS", ShowBackupWhat::Schemas)
    } else if eat("FILES") {
        ("SHOW BACKUP FILES", ShowBackupWhat::Files)
    } else if eat("RANGES") {
        let refusal = cursor.unsupported_at(begun, "SHOW BACKUP RANGES is not supported");
        let hint = "SHOW BACKUP FILES lists the files of a backup.";
        cursor.refuse(refusal.detail("PostgreSQL has no ranges.").hint(hint));
        ("SHOW BACKUP RANGES", ShowBackupWhat::Objects)
    } else {
        ("SHOW BACKUP", ShowBackupWhat::Objects)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Subdir, Text, parse};

    fn literal(text: &str) -> Text {
        Text::Literal(text.to_owned())
    }

    #[test]
    fn a_backup_is_shown_by_its_subdirectory() {
        use ShowBackupWhat::{Files, Objects, Schemas};
        use Subdir::{Latest, Named};
        for (text, what, from, collection, json, files) in [
            ("SHOW BACKUP LATEST IN 'Bar'", Objects, Latest, literal("Bar"), false, false),
            ("show backup from latest in bar;", Objects, Latest, literal("bar"), false, false),
            ("SHOW BACKUP 'LateST' IN ('x')", Objects, Latest, literal("x"), false, false),
            ("SHOW BACKUP FROM '/2026' IN x", Objects, Named(literal("/2026")), literal("x"), false, false),
            ("SHOW BACKUP $2 IN $1", Objects, Named(Text::Placeholder(2)), Text::Placeholder(1), false, false),
            ("SHOW BACKUP SCHEMAS FROM foo IN x", Schemas, Named(literal("foo")), literal("x"), false, false),
            ("SHOW BACKUP files 'Foo' IN x", Files, Named(literal("Foo")), literal("x"), false, false),
            ("SHOW BACKUP FILES IN x", Objects, Named(literal("files")), literal("x"), false, false),
            ("SHOW BACKUP FROM ranges IN x", Objects, Named(literal("ranges")), literal("x"), false, false),
            ("SHOW BACKUP LATEST IN x WITH CHECK_FILES", Objects, Latest, literal("x"), false, true),
            ("SHOW BACKUP LATEST IN x WITH OPTIONS (as_json, check_files)", Objects, Latest, literal("x"), true, true),
        ] {
            let options = ShowBackupOptions { check_files: files, as_json: json };
            let expected = Statement::ShowBackup(ShowBackup { what, from, collection, options });
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert!(parse(text) == Ok(vec![expected]), "{text}");
        }
        for (text, collection) in
            [("SHOW BACKUPS IN 'Bar'", literal("Bar")), ("show backups in ($1);", Text::Placeholder(1))]
        {
            assert!(parse(text) == Ok(vec![Statement::ShowBackups { collection }]), "{text}");
        }
    }

    #[test]
    fn a_syntax_error_names_its_token() {
        for (text, near, position) in [
            ("SHOW BACKUP", "EOF", 12),
            ("SHOW BACKUP FROM", "EOF", 17),
            ("SHOW BACKUP IN 'x'", "IN", 13),
            ("SHOW BACKUP SCHEMAS FROM IN 'x'", "IN", 26),
            ("SHOW BACKUP LATEST IN", "EOF", 22),
            ("SHOW BACKUP LATEST IN 'x' 'y'", "y", 27),
            ("SHOW BACKUP LATEST IN 'x' WITH", "EOF", 31),
            ("SHOW BACKUP LATEST IN 'x' WITH foo", "foo", 32),
            ("SHOW BACKUP LATEST IN 'x' WITH check_files = true", "=", 44),
            ("SHOW BACKUP LATEST IN 'x' WITH skip, nosize", ",", 36),
            ("SHOW BACKUP LATEST IN 'x' WITH OPTIONS (as_json", "EOF", 48),
            ("SHOW BACKUPS", "EOF", 13),
            ("SHOW BACKUPS FROM 'x'", "FROM", 14),
            ("SHOW BACKUPS IN 'x' WITH as_json", "as_json", 26),
            ("SHOW BACKUPS IN 'x' NEWER 'y'", "y", 27),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.message, format!("at or near \"{near}\": syntax error"), "{text}");
            assert_eq!((error.code.as_str(), error.position), ("42601", Some(position)), "{text}");
            assert_eq!(error.hint.as_deref(), Some("try \\h SHOW"), "{text}");
        }
    }

    #[test]
    fn a_removed_form_is_answered_with_the_one_to_use() {
        for (text, form, near, position) in [
            ("SHOW BACKUP 'foo'", "SHOW BACKUP", "EOF", 18),
            ("SHOW BACKUP FROM 'foo'", "SHOW BACKUP", "EOF", 23),
            ("SHOW BACKUP 'foo' WITH KMS = ('foo', 'bar')", "SHOW BACKUP", "WITH", 19),
            ("SHOW BACKUP FILES 'foo'", "SHOW BACKUP FILES", "EOF", 24),
            ("SHOW BACKUP RANGES 'foo'", "SHOW BACKUP RANGES", "EOF", 25),
            ("SHOW BACKUP SCHEMAS 'foo';", "SHOW BACKUP SCHEMAS", "EOF", 26),
        ] {
            let error = parse(text).expect_err(text);
            let message = format!(
                "at or near \"{near}\": syntax error: The `{form}` syntax without the `IN` keyword is no longer \
                 supported. Please use `{form} FROM <subdirectory> IN <collectionURI>`."
            );
            assert_eq!((error.message, error.position), (message, Some(position)), "{text}");
        }
    }

    #[test]
    fn an_option_told_twice_is_a_syntax_error() {
        for (options, near, why) in [
            ("check_files, as_json, check_files", "check_files", "check_files"),
            ("skip size, nosize, as_json", "nosize", "skip size"),
            ("kms = 'a', kms = ('b', 'c')", ")", "kms"),
            ("encryption_passphrase = 'a', encryption_passphrase = 'b'", "*****", "encryption_passphrase"),
        ] {
            let error = parse(&format!("SHOW BACKUP LATEST IN 'x' WITH {options}")).expect_err(options);
            let message = format!("at or near \"{near}\": syntax error: {why} option specified multiple times");
            assert_eq!((error.code.as_str(), error.message), ("42601", message), "{options}");
        }
    }

    #[test]
    fn what_cannot_be_shown_is_refused_by_name() {
        for (text, message, position) in [
            ("SHOW BACKUP RANGES FROM 'a' IN 'b'", "SHOW BACKUP RANGES is not supported", 13),
            ("SHOW BACKUP LATEST IN ('a', $1)", "SHOW BACKUP IN several URIs is not supported yet", 23),
            (
                "SHOW BACKUP LATEST IN 'bar' WITH ENCRYPTION_PASSPHRASE='secret', CHECK_FILES",
                "SHOW BACKUP option encryption_passphrase is not supported yet",
                34,
            ),
            (
                "SHOW BACKUP LATEST IN 'bar' WITH check_files, skip size",
                "SHOW BACKUP option skip size is not supported yet",
                47,
            ),
            (
                "SHOW BACKUP $1 IN $2 WITH OPTIONS (encryption_info_dir = $3)",
                "SHOW BACKUP option encryption_info_dir is not supported yet",
                36,
            ),
            ("SHOW BACKUPS IN ('a', 'b')", "SHOW BACKUPS IN several URIs is not supported yet", 17),
            ("SHOW BACKUPS IN 'a' WITH index", "SHOW BACKUPS option index is not supported yet", 26),
            ("SHOW BACKUPS IN 'a' OLDER THAN '1h'", "SHOW BACKUPS OLDER THAN is not supported yet", 21),
            (
                "SHOW BACKUPS IN 'a' NEWER THAN '1h' OLDER THAN now() WITH REVISION START TIME",
                "SHOW BACKUPS NEWER THAN is not supported yet",
                21,
            ),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("0A000", message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }
}
