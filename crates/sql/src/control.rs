//! `PAUSE`, `RESUME` and `CANCEL` of jobs.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::print::Literals;
use crate::schedules;
use crate::selection::{self, JobKind, Selection};
use crate::statement::{Text, print_option};

const VERBS: [(&str, ControlVerb); 3] =
    [("PAUSE", ControlVerb::Pause), ("RESUME", ControlVerb::Resume), ("CANCEL", ControlVerb::Cancel)];

/// `PAUSE JOBS … WITH REASON = 'r'`, `RESUME JOBS …`, `CANCEL JOBS …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlJobs {
    /// What is to become of them.
    pub verb: ControlVerb,
    /// Of which jobs.
    pub jobs: Selection,
    /// Why; only PAUSE has one.
    pub reason: Option<Text>,
}

/// What is to become of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlVerb {
    /// `PAUSE`.
    Pause,
    /// `RESUME`.
    Resume,
    /// `CANCEL`.
    Cancel,
}

impl ControlVerb {
    /// What a command tag begins with; the number of jobs follows.
    pub(crate) fn tag(self) -> &'static str {
        match self {
            Self::Pause => "PAUSE JOBS",
            Self::Resume => "RESUME JOBS",
            Self::Cancel => "CANCEL JOBS",
        }
    }
}

impl ControlJobs {
    /// In canonical form: `PAUSE JOB a` is `PAUSE JOBS VALUES (a)`.
    pub(crate) fn print(&self, literals: Literals) -> String {
        let (tag, jobs) = (self.verb.tag(), self.jobs.print(literals));
        let verb = match self.jobs {
            Selection::All(_) => tag.trim_end_matches(" JOBS"),
            Selection::Ids(_) | Selection::Query(_) => tag,
        };
        let reason = print_option(" WITH REASON", self.reason.as_ref()).unwrap_or_default();
        format!("{verb} {jobs}{reason}")
    }
}

/// Which of them begins here.
pub(crate) fn verb(cursor: &Cursor<'_>) -> Option<ControlVerb> {
    VERBS.iter().find(|(word, _)| cursor.at_word(word)).map(|(_, verb)| *verb)
}

pub(crate) fn control(cursor: &mut Cursor<'_>, verb: ControlVerb) -> Result<ControlJobs, PgError> {
    let topic = cursor.topic();
    cursor.expect_words(&[&topic])?;
    if cursor.eat_word("ALL") {
        let jobs = Selection::All(kind(cursor, &topic)?);
        return Ok(ControlJobs { verb, jobs, reason: None });
    }
    let jobs = if cursor.eat_word("JOBS") {
        if cursor.at_words(&["FOR", "SCHEDULE"]) || cursor.at_words(&["FOR", "SCHEDULES"]) {
            schedules::jobs_of(cursor, &format!("{topic} JOBS"))?;
        }
        selection::several(cursor)?
    } else {
        cursor.expect_words(&["JOB"])?;
        selection::one(cursor)?
    };
    Ok(ControlJobs { verb, jobs, reason: reason(cursor, verb)? })
}

/// `BACKUP JOBS`, behind `ALL`.
fn kind(cursor: &mut Cursor<'_>, topic: &str) -> Result<JobKind, PgError> {
    let kind = if cursor.eat_word("BACKUP") {
        JobKind::Backup
    } else if cursor.eat_word("RESTORE") {
        JobKind::Restore
    } else if let Some(other) = ["CHANGEFEED", "IMPORT"].into_iter().find(|word| cursor.at_word(word)) {
        let refusal = cursor.unsupported(format!("{topic} ALL {other} JOBS is not supported"));
        let hint = format!("Use {topic} ALL BACKUP JOBS, or name jobs by their ids.");
        cursor.refuse(refusal.detail("There are jobs of the kinds BACKUP and RESTORE only.").hint(hint));
        cursor.expect_words(&[other])?;
        JobKind::Backup
    } else {
        return Err(cursor.unexpected());
    };
    cursor.expect_words(&["JOBS"])?;
    Ok(kind)
}

fn reason(cursor: &mut Cursor<'_>, verb: ControlVerb) -> Result<Option<Text>, PgError> {
    if verb != ControlVerb::Pause || !cursor.eat_word("WITH") {
        return Ok(None);
    }
    cursor.expect_words(&["REASON"])?;
    cursor.expect(&Token::Eq)?;
    cursor.text().map(Some)
}

#[cfg(test)]
mod tests {
    use crate::{Literals, parse};

    #[test]
    fn a_control_is_printed_in_canonical_form() {
        for (text, printed) in [
            ("PAUSE JOB 123", "PAUSE JOBS VALUES (123)"),
            ("resume job ('-7');", "RESUME JOBS VALUES (-7)"),
            ("CANCEL JOB $1::int8", "CANCEL JOBS VALUES ($1)"),
            ("CANCEL JOBS VALUES (1), ($2), (NULL)", "CANCEL JOBS VALUES (1), ($2), (NULL)"),
            ("PAUSE JOB 1 WITH REASON = 'it''s late'", "PAUSE JOBS VALUES (1) WITH REASON = 'it''s late'"),
            ("pause jobs (values (1)) with reason = $1", "PAUSE JOBS VALUES (1) WITH REASON = $1"),
            ("CANCEL JOBS SELECT a", "CANCEL JOBS SELECT a"),
            ("PAUSE JOBS SELECT a FROM b WITH REASON = c", "PAUSE JOBS SELECT a FROM b WITH REASON = 'c'"),
            ("PAUSE JOBS(SELECT a) WITH REASON='c';", "PAUSE JOBS (SELECT a) WITH REASON = 'c'"),
            (
                "PAUSE JOBS WITH reason AS (SELECT ')') TABLE reason WITH REASON = 'r'",
                "PAUSE JOBS WITH reason AS (SELECT ')') TABLE reason WITH REASON = 'r'",
            ),
            (
                "PAUSE JOB (SELECT max(id) FROM t) WITH REASON = r",
                "PAUSE JOBS (SELECT max(id) FROM t) WITH REASON = 'r'",
            ),
            ("pause all backup jobs", "PAUSE ALL BACKUP JOBS"),
            ("RESUME ALL RESTORE JOBS", "RESUME ALL RESTORE JOBS"),
        ] {
            assert!(crate::is_ours(text.as_bytes()), "{text}");
            assert_eq!(parse(text).expect(text)[0].print(Literals::Shown), printed, "{text}");
        }
    }

    #[test]
    fn a_syntax_error_names_its_token() {
        for (text, topic, near, position) in [
            ("PAUSE JOB", "PAUSE", "EOF", 10),
            ("PAUSE JOBS", "PAUSE", "EOF", 11),
            ("PAUSE JOBS 1", "PAUSE", "1", 12),
            ("PAUSE JOB 1, 2", "PAUSE", ",", 12),
            ("PAUSE JOB SELECT 1", "PAUSE", "SELECT", 11),
            ("PAUSE JOB (SELECT 1", "PAUSE", "EOF", 20),
            ("PAUSE JOBS SELECT 1)", "PAUSE", ")", 20),
            ("PAUSE JOB 1 WITH", "PAUSE", "EOF", 17),
            ("PAUSE JOB 1 WITH REASON 'x'", "PAUSE", "x", 25),
            ("PAUSE JOB 1 WITH REASON = ", "PAUSE", "EOF", 27),
            ("PAUSE JOBS SELECT 1 WITH REASON = 'x' y", "PAUSE", "y", 39),
            ("RESUME JOB 1 WITH REASON = 'x'", "RESUME", "WITH", 14),
            ("CANCEL JOBS SELECT 1 WITH REASON = 'x'", "CANCEL", "WITH", 22),
            ("CANCEL ALL JOBS", "CANCEL", "JOBS", 12),
            ("RESUME ALL BACKUP", "RESUME", "EOF", 18),
            ("PAUSE ALL BACKUP JOBS WITH REASON = 'x'", "PAUSE", "WITH", 23),
            ("EXPLAIN PAUSE JOB", "PAUSE", "EOF", 18),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.message, format!("at or near \"{near}\": syntax error"), "{text}");
            assert_eq!((error.code.as_str(), error.position), ("42601", Some(position)), "{text}");
            assert_eq!(error.hint, Some(format!("try \\h {topic}")), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_controlled_is_refused_by_name() {
        for (text, message, position) in [
            ("PAUSE JOBS FOR SCHEDULE 1", "PAUSE JOBS FOR SCHEDULES is not supported yet", 12),
            ("CANCEL JOBS FOR SCHEDULES SELECT 1", "CANCEL JOBS FOR SCHEDULES is not supported yet", 13),
            ("RESUME ALL CHANGEFEED JOBS", "RESUME ALL CHANGEFEED JOBS is not supported", 12),
            ("EXPLAIN CANCEL JOB 1", "EXPLAIN CANCEL is not supported yet", 1),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), ("0A000", message), "{text}");
            assert_eq!(error.position, Some(position), "{text}");
        }
        assert_eq!(parse("PAUSE JOB 'x'").expect_err("no id").code.as_str(), "22P02");
    }
}
