//! Whose statement is it? Asked for every text a client sends, so it reads a few words and no more.

/// The first words, with a comma as one, that make a text ours, none the beginning of another. Each is rejected by a bare
/// PostgreSQL (`SHOW` of an unknown name: 42704, all else: 42601); a test of the whole system proves it for every
/// statement in `sql-fixtures/`.
const OURS: [&[&str]; 82] = [
    &["BACKUP"],
    &["RESTORE"],
    &["EXPLAIN", "BACKUP"],
    &["EXPLAIN", "RESTORE"],
    &["SHOW", "LOCALITY"],
    &["SHOW", "NODES"],
    &["SHOW", "JOB"],
    &["SHOW", "JOBS"],
    &["SHOW", "BACKUP"],
    &["SHOW", "BACKUPS"],
    &["SHOW", "RANGES"],
    &["SHOW", "REGIONS"],
    &["SHOW", "EXTERNAL", "CONNECTION"],
    &["SHOW", "EXTERNAL", "CONNECTIONS"],
    &["CREATE", "EXTERNAL", "CONNECTION"],
    &["DROP", "EXTERNAL", "CONNECTION"],
    &["PAUSE", "JOB"],
    &["PAUSE", "JOBS"],
    &["PAUSE", "ALL"],
    &["RESUME", "JOB"],
    &["RESUME", "JOBS"],
    &["RESUME", "ALL"],
    &["CANCEL", "JOB"],
    &["CANCEL", "JOBS"],
    &["CANCEL", "ALL"],
    &["EXPLAIN", "PAUSE"],
    &["EXPLAIN", "RESUME"],
    &["EXPLAIN", "CANCEL"],
    &["SHOW", "AUTOMATIC", "JOBS"],
    &["SHOW", "ALL", "BACKHAUL"],
    &["SHOW", "ALL", "CLUSTER"],
    &["SHOW", "CLUSTER", "SETTING"],
    &["SHOW", "CLUSTER", "SETTINGS"],
    &["SET", "CLUSTER", "SETTING"],
    &["RESET", "CLUSTER", "SETTING"],
    &["ALTER", "EXTERNAL", "CONNECTION"],
    &["CHECK", "EXTERNAL", "CONNECTION"],
    &["CREATE", "SCHEDULE"],
    &["ALTER", "BACKUP", "SCHEDULE"],
    &["PAUSE", "SCHEDULE"],
    &["PAUSE", "SCHEDULES"],
    &["RESUME", "SCHEDULE"],
    &["RESUME", "SCHEDULES"],
    &["DROP", "SCHEDULE"],
    &["DROP", "SCHEDULES"],
    &["SHOW", "SCHEDULE"],
    &["SHOW", "SCHEDULES"],
    &["SHOW", "PAUSED", "SCHEDULES"],
    &["SHOW", "RUNNING", "SCHEDULES"],
    &["SHOW", "CREATE", "SCHEDULE"],
    &["SHOW", "CREATE", "ALL"],
    &["SHOW", "CREATE", "EXTERNAL"],
    &["GRANT", "USAGE", "ON", "EXTERNAL", "CONNECTION"],
    &["GRANT", "DROP", "ON", "EXTERNAL", "CONNECTION"],
    &["GRANT", "ALL", "ON", "EXTERNAL", "CONNECTION"],
    &["GRANT", "ALL", "PRIVILEGES", "ON", "EXTERNAL", "CONNECTION"],
    &["REVOKE", "USAGE", "ON", "EXTERNAL", "CONNECTION"],
    &["REVOKE", "DROP", "ON", "EXTERNAL", "CONNECTION"],
    &["REVOKE", "ALL", "ON", "EXTERNAL", "CONNECTION"],
    &["REVOKE", "ALL", "PRIVILEGES", "ON", "EXTERNAL", "CONNECTION"],
    &["GRANT", "USAGE", ",", "DROP", "ON", "EXTERNAL", "CONNECTION"],
    &["GRANT", "DROP", ",", "USAGE", "ON", "EXTERNAL", "CONNECTION"],
    &["REVOKE", "USAGE", ",", "DROP", "ON", "EXTERNAL", "CONNECTION"],
    &["REVOKE", "DROP", ",", "USAGE", "ON", "EXTERNAL", "CONNECTION"],
    &["GRANT", "BACKUP", "ON"],
    &["GRANT", "RESTORE", "ON"],
    &["GRANT", "SYSTEM", "ALL"],
    &["GRANT", "SYSTEM", "BACKUP"],
    &["GRANT", "SYSTEM", "RESTORE"],
    &["GRANT", "SYSTEM", "CONTROLJOB"],
    &["GRANT", "SYSTEM", "EXTERNALCONNECTION"],
    &["GRANT", "SYSTEM", "EXTERNALIOIMPLICITACCESS"],
    &["GRANT", "SYSTEM", "VIEWJOB"],
    &["REVOKE", "BACKUP", "ON"],
    &["REVOKE", "RESTORE", "ON"],
    &["REVOKE", "SYSTEM", "ALL"],
    &["REVOKE", "SYSTEM", "BACKUP"],
    &["REVOKE", "SYSTEM", "RESTORE"],
    &["REVOKE", "SYSTEM", "CONTROLJOB"],
    &["REVOKE", "SYSTEM", "EXTERNALCONNECTION"],
    &["REVOKE", "SYSTEM", "EXTERNALIOIMPLICITACCESS"],
    &["REVOKE", "SYSTEM", "VIEWJOB"],
];

/// The most words that it takes to know.
const LONGEST: usize = 7;

/// Whether a text begins with one of our statements.
///
/// Reads raw bytes in any client encoding that agrees with ASCII on letters, white space and comment signs, which is
/// every encoding that PostgreSQL allows on the wire for these characters in this place: before the first word.
pub fn is_ours(text: &[u8]) -> bool {
    let mut rest = text;
    // Statements that say nothing may come before it.
    while let Some(behind) = skip_blank(rest).and_then(|text| text.strip_prefix(b";")) {
        rest = behind;
    }
    // SHOW nodes.x is a setting of that name.
    starts_ours(|| next_word(&mut rest)) && !skip_blank(rest).is_some_and(|rest| rest.starts_with(b"."))
}

/// The same rule for words that come one by one; no more are asked for than it takes.
pub(crate) fn starts_ours<'w>(mut next: impl FnMut() -> Option<&'w [u8]>) -> bool {
    let mut words = [b"".as_slice(); LONGEST];
    for count in 1..=LONGEST {
        let Some(word) = next() else { return false };
        words[count - 1] = word;
        let begins = |ours: &[&str]| {
            let said = &words[..count.min(ours.len())];
            said.iter().zip(ours).all(|(word, ours)| word.eq_ignore_ascii_case(ours.as_bytes()))
        };
        let Some(ours) = OURS.iter().find(|ours| begins(ours)) else { return false };
        if ours.len() <= count {
            return true;
        }
    }
    false
}

/// Cuts the next bare word, or a comma, off the front of `text`; `None` when something else comes first.
fn next_word<'t>(text: &mut &'t [u8]) -> Option<&'t [u8]> {
    *text = skip_blank(text)?;
    if let Some((comma @ b",", rest)) = text.split_at_checked(1) {
        *text = rest;
        return Some(comma);
    }
    let end = text.iter().position(|b| !b.is_ascii_alphanumeric() && !matches!(*b, b'_' | b'$')).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    // A word that runs on in bytes above ASCII is a longer identifier, not our keyword.
    if word.is_empty() || rest.first().is_some_and(|b| !b.is_ascii()) {
        return None;
    }
    *text = rest;
    Some(word)
}

/// Skips white space and comments; `None` when a comment never ends.
fn skip_blank(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        text = text.trim_ascii_start();
        if let Some(rest) = text.strip_prefix(b"--") {
            let end = rest.iter().position(|b| matches!(*b, b'\n' | b'\r'))?;
            text = &rest[end..];
        } else if let Some(rest) = text.strip_prefix(b"/*") {
            text = skip_block_comment(rest)?;
        } else {
            return Some(text);
        }
    }
}

/// Skips to behind the end of a block comment; they nest, as in PostgreSQL.
fn skip_block_comment(mut text: &[u8]) -> Option<&[u8]> {
    let mut depth = 1;
    while depth > 0 {
        if let Some(rest) = text.strip_prefix(b"/*") {
            depth += 1;
            text = rest;
        } else if let Some(rest) = text.strip_prefix(b"*/") {
            depth -= 1;
            text = rest;
        } else {
            text = text.get(1..)?;
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_first_words_make_a_text_ours() {
        for (text, ours) in [
            ("SHOW LOCALITY", true),
            ("  show\n\tlocality;", true),
            ("-- a comment\nSHOW NODES", true),
            ("/* one /* nested */ */ show /* two */ nodes", true),
            ("SHOW LOCALITY; SELECT 1", true),
            ("BACKUP", true),
            ("backup;", true),
            ("BACKUP/* all */INTO('x')", true),
            ("BACKUPS", false),
            ("SHOW jobs$a.b", false),
            ("-- c\rSELECT\nbackup FROM t", false),
            ("-- c\rSHOW JOBS", true),
            ("\"BACKUP\" INTO 'x'", false),
            ("(BACKUP INTO 'x')", false),
            ("EXPLAIN BACKUP DATABASE a INTO 'x'", true),
            ("restore DATABASE a FROM LATEST IN 'x'", true),
            ("RESTORES", false),
            ("\"RESTORE\" DATABASE a FROM LATEST IN 'x'", false),
            ("EXPLAIN RESTORE DATABASE a FROM LATEST IN 'x'", true),
            ("SHOW BACKUP LATEST IN 'x'", true),
            ("SHOW BACKUP'x'IN'y'", true),
            ("show backups in 'x'", true),
            ("SHOW backup.x", false),
            ("SHOW backups . x", false),
            ("SHOW \"backup\"", false),
            ("SHOW backups_x", false),
            ("EXPLAIN SHOW BACKUP LATEST IN 'x'", false),
            ("EXPLAIN SELECT 1", false),
            ("EXPLAIN (ANALYZE) BACKUP", false),
            ("SHOW RANGES FROM DATABASE a", true),
            ("show regions", true),
            ("SHOW regions.x", false),
            ("SHOW RANGE", false),
            ("SHOW JOB 1", true),
            ("SHOW jobs", true),
            ("SHOW jobs.x", false),
            ("SHOW job . x", false),
            ("SHOW EXTERNAL", false),
            ("SHOW external.x", false),
            ("SHOW EXTERNAL TABLES", false),
            ("SHOW EXTERNAL CONNECTION x", true),
            ("show external -- all\n connections", true),
            ("CREATE EXTERNAL CONNECTION x AS 'y'", true),
            ("CREATE EXTERNAL TABLE x", false),
            ("CREATE TABLE external (connection int)", false),
            ("DROP EXTERNAL CONNECTION x", true),
            ("DROP EXTERNAL CONNECTIONS", false),
            ("PAUSE JOB 1", true),
            ("pause jobs(SELECT 1)", true),
            ("RESUME ALL BACKUP JOBS", true),
            ("CANCEL JOB $1", true),
            ("PAUSE", false),
            ("CANCEL QUERY 'x'", false),
            ("EXPLAIN CANCEL JOB 1", true),
            ("\"PAUSE\" JOB 1", false),
            ("SHOW nodes.x", false),
            ("SHOW nodes /* a setting */ . x", false),
            ("SHOW locality_of", false),
            ("SHOW localityé", false),
            ("SHOW backhaul.target", false),
            ("SHOW \"locality\"", false),
            ("SHOW", false),
            ("SELECT 'SHOW LOCALITY'", false),
            ("/* SHOW LOCALITY", false),
            ("-- SHOW LOCALITY", false),
            ("", false),
        ] {
            assert_eq!(is_ours(text.as_bytes()), ours, "{text}");
        }
    }

    #[test]
    fn statements_that_say_nothing_may_come_first() {
        for (text, ours) in [
            (";SHOW LOCALITY", true),
            (" ; -- a\n;/* b */; backup DATABASE a INTO 'x'", true),
            (";", false),
            ("; SHOW jobs.x", false),
            ("; SELECT 1; SHOW JOBS", false),
        ] {
            assert_eq!(is_ours(text.as_bytes()), ours, "{text}");
        }
    }

    #[test]
    fn settings_and_schedules_are_ours_where_postgresql_has_none() {
        for (text, ours) in [
            ("SET CLUSTER SETTING a = 1", true),
            ("SET cluster.setting = 1", false),
            ("SET cluster TO 1", false),
            ("RESET cluster", false),
            ("SHOW ALL", false),
            ("SHOW ALL;", false),
            ("SHOW ALL BACKHAUL SETTINGS", true),
            ("SHOW cluster.setting", false),
            ("SHOW CLUSTER SETTINGS", true),
            ("SHOW schedules.x", false),
            ("SHOW CREATE TABLE x", false),
            ("DROP SCHEDULE 1", true),
            ("ALTER BACKUP x", false),
        ] {
            assert_eq!(is_ours(text.as_bytes()), ours, "{text}");
        }
    }

    #[test]
    fn a_privilege_is_ours_only_on_an_external_connection() {
        for (text, ours) in [
            ("GRANT USAGE ON EXTERNAL CONNECTION a TO b", true),
            ("grant all privileges on external connection a to b", true),
            ("REVOKE DROP ON EXTERNAL /* x */ CONNECTION a FROM b", true),
            ("GRANT USAGE, DROP ON EXTERNAL CONNECTION a TO b", true),
            ("revoke drop--\n,usage on external connection a from b", true),
            ("GRANT USAGE, DROP ON EXTERNAL TO b", false),
            ("GRANT USAGE, DROP ON TABLE external TO b", false),
            ("GRANT USAGE, SELECT ON EXTERNAL CONNECTION a TO b", false),
            ("GRANT usage, drop TO b", false),
            ("GRANT, USAGE ON EXTERNAL CONNECTION a TO b", false),
            ("GRANT USAGE ON EXTERNAL TO b", false),
            ("GRANT USAGE ON EXTERNAL, CONNECTION TO b", false),
            ("GRANT USAGE ON EXTERNAL.CONNECTION TO b", false),
            ("GRANT USAGE ON SCHEMA external TO connection", false),
            ("GRANT ALL ON TABLE external TO connection", false),
            ("GRANT ALL ON ALL TABLES IN SCHEMA external TO connection", false),
            ("GRANT SELECT ON EXTERNAL CONNECTION a TO b", false),
            ("GRANT external TO connection", false),
            ("REVOKE GRANT OPTION FOR USAGE ON EXTERNAL CONNECTION a FROM b", false),
        ] {
            assert_eq!(is_ours(text.as_bytes()), ours, "{text}");
        }
    }

    #[test]
    fn bytes_of_another_encoding_are_not_ours_and_do_no_harm() {
        assert!(!is_ours(b"SELECT '\xe9'"));
        assert!(is_ours(b"/* \xe9 */ SHOW NODES"));
        assert!(!is_ours(b"SHOW\xa0NODES"));
    }
}
