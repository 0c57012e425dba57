//! `SHOW` of what nodes and jobs are.

use pgerror::PgError;

use crate::cursor::Cursor;
use crate::statement::{ShowJobs, Statement};
use crate::{external, ranges, schedules, selection, settings, show_backup};

pub(crate) fn show(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    cursor.expect_words(&["SHOW"])?;
    if cursor.eat_word("LOCALITY") {
        Ok(Statement::ShowLocality)
    } else if cursor.eat_word("NODES") {
        Ok(Statement::ShowNodes)
    } else if cursor.eat_word("JOB") {
        job(cursor).map(Statement::ShowJobs)
    } else if cursor.eat_word("JOBS") {
        jobs(cursor).map(Statement::ShowJobs)
    } else if cursor.eat_word("RANGES") {
        ranges::ranges(cursor).map(Statement::ShowRanges)
    } else if cursor.eat_word("REGIONS") {
        ranges::regions(cursor)
    } else if cursor.eat_word("BACKUPS") {
        show_backup::backups(cursor)
    } else if cursor.eat_word("BACKUP") {
        show_backup::backup(cursor).map(Statement::ShowBackup)
    } else if cursor.at_words(&["ALL"]) || cursor.at_words(&["CLUSTER"]) {
        settings::show(cursor)
    } else if cursor.at_word("AUTOMATIC") {
        automatic(cursor)
    } else if cursor.at_word("EXTERNAL") || cursor.at_words(&["CREATE", "EXTERNAL"]) || creates_connections(cursor) {
        external::show(cursor)
    } else {
        schedules::show(cursor)
    }
}

fn creates_connections(cursor: &Cursor<'_>) -> bool {
    cursor.at_words(&["CREATE", "ALL", "EXTERNAL"])
}

fn automatic(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let refusal = cursor.unsupported("SHOW AUTOMATIC JOBS is not supported");
    cursor.refuse(refusal.detail("There are no automatic jobs.").hint("SHOW JOBS lists all jobs."));
    cursor.expect_words(&["AUTOMATIC", "JOBS"])?;
    Err(cursor.refused())
}

/// What follows `SHOW JOB`: one id, or what stands for it.
fn job(cursor: &mut Cursor<'_>) -> Result<ShowJobs, PgError> {
    let when_complete = when_complete(cursor)?;
    let jobs = selection::one(cursor)?;
    if !when_complete && cursor.at_words(&["WITH", "EXECUTION", "DETAILS"]) {
        let refusal = cursor.unsupported("SHOW JOB WITH EXECUTION DETAILS is not supported yet");
        cursor.refuse(refusal.hint("SHOW JOB tells what has gone wrong in execution_errors."));
        cursor.expect_words(&["WITH", "EXECUTION", "DETAILS"])?;
    }
    Ok(ShowJobs::These { jobs, when_complete })
}

/// What follows `SHOW JOBS`: nothing, or rows of ids.
fn jobs(cursor: &mut Cursor<'_>) -> Result<ShowJobs, PgError> {
    if cursor.at_end() {
        return Ok(ShowJobs::All);
    }
    if cursor.at_words(&["FOR", "SCHEDULE"]) || cursor.at_words(&["FOR", "SCHEDULES"]) {
        schedules::jobs_of(cursor, "SHOW JOBS")?;
    }
    let when_complete = when_complete(cursor)?;
    Ok(ShowJobs::These { jobs: selection::several(cursor)?, when_complete })
}

fn when_complete(cursor: &mut Cursor<'_>) -> Result<bool, PgError> {
    let when = cursor.eat_word("WHEN");
    if when {
        cursor.expect_words(&["COMPLETE"])?;
    }
    Ok(when)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Number, Selection, parse};

    fn shown(text: &str) -> ShowJobs {
        match parse(text).expect(text).as_slice() {
            [Statement::ShowJobs(jobs)] => jobs.clone(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn jobs_are_named_by_their_ids() {
        use Number::{Literal, Null, Placeholder};
        for (text, expected, complete) in [
            ("SHOW JOB 123", vec![Literal(123)], false),
            ("show job (('123'));", vec![Literal(123)], false),
            ("SHOW JOB -9223372036854775808", vec![Literal(i64::MIN)], false),
            ("SHOW JOB +7", vec![Literal(7)], false),
            ("SHOW JOB $$ -7 $$", vec![Literal(-7)], false),
            ("SHOW JOB $1", vec![Placeholder(1)], false),
            ("SHOW JOB $1::int8", vec![Placeholder(1)], false),
            ("SHOW JOB NULL", vec![Null], false),
            ("SHOW JOB WHEN COMPLETE 1", vec![Literal(1)], true),
            ("SHOW JOBS VALUES (1), (2)", vec![Literal(1), Literal(2)], false),
            ("SHOW JOBS (VALUES ((1)))", vec![Literal(1)], false),
            ("SHOW JOBS WHEN COMPLETE VALUES ($2),('2'),(NULL)", vec![Placeholder(2), Literal(2), Null], true),
        ] {
            assert_eq!(
                shown(text),
                ShowJobs::These { jobs: Selection::Ids(expected), when_complete: complete },
                "{text}"
            );
        }
        assert_eq!(shown("SHOW JOBS"), ShowJobs::All);
    }

    #[test]
    fn what_is_no_id_is_refused_where_it_stands() {
        for (text, code, message, position) in [
            ("SHOW JOB", "42601", "at or near \"EOF\": syntax error", 9),
            ("SHOW JOB;", "42601", "at or near \"EOF\": syntax error", 9),
            ("SHOW JOB select", "42601", "at or near \"select\": syntax error", 10),
            ("SHOW JOB a, b", "42601", "at or near \",\": syntax error", 11),
            ("SHOW JOB (a", "42601", "at or near \"EOF\": syntax error", 12),
            ("SHOW JOB 1 2", "42601", "at or near \"2\": syntax error", 12),
            ("SHOW JOB (1", "42601", "at or near \"EOF\": syntax error", 12),
            ("SHOW JOB $0", "42601", "at or near \"0\": syntax error", 10),
            ("SHOW JOB $65536", "42601", "at or near \"65536\": syntax error", 10),
            ("SHOW JOBS 1", "42601", "at or near \"1\": syntax error", 11),
            ("SHOW JOBS VALUES (1, 2)", "42601", "at or near \",\": syntax error", 20),
            ("SHOW JOBS WHEN 1", "42601", "at or near \"1\": syntax error", 16),
            ("SHOW JOB '1x'", "22P02", "invalid input syntax for type bigint: \"1x\"", 10),
            ("SHOW JOB 1.5", "22P02", "invalid input syntax for type bigint: \"1.5\"", 10),
            (
                "SHOW JOBS VALUES (1), (-9223372036854775809)",
                "22003",
                "value \"-9223372036854775809\" is out of range for type bigint",
                24,
            ),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), (code, message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }

    #[test]
    fn what_shows_jobs_elsewhere_is_refused_by_name() {
        for (text, message, position) in [
            ("SHOW JOBS FOR SCHEDULE 1", "SHOW JOBS FOR SCHEDULES is not supported yet", 11),
            ("SHOW JOB 1 WITH EXECUTION DETAILS", "SHOW JOB WITH EXECUTION DETAILS is not supported yet", 12),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("0A000", message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
    }
}
