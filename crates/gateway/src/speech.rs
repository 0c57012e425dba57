//! How a client is spoken to: in its encoding, in its style of dates, and of no more than it wants to hear.
//!
//! What SHOW and EXPLAIN give a client of another encoding than UTF-8, or of another style of dates than ISO, goes through
//! its server as a row source does ([`crate::rows`]), which writes it as it writes everything. All else that this gateway
//! says itself is short: signs that the encoding may not have become question marks, so that no client ever hears bytes
//! that are none of its characters.
//!
//! The server tells of these settings when it is ready for another command; one that was changed in the same text or
//! pipeline is known behind it.

use pgerror::PgError;
use sql::{Sourced, Statement};

use crate::answer::{Answer, Value};
use crate::asking::Work;

/// What is known of a client's wishes.
#[derive(Debug, Default)]
pub(crate) struct Speech {
    /// The client's encoding has not all signs, or writes them otherwise than UTF-8.
    is_foreign: bool,
    /// Dates are not written as ISO has them.
    has_other_dates: bool,
    /// It wants no notices, as of the statement that runs.
    pub(crate) quiet: bool,
}

impl Speech {
    /// The server has told a setting.
    pub(crate) fn heard(&mut self, name: &[u8], value: &[u8]) {
        match name {
            // Without an encoding bytes pass as they are.
            b"client_encoding" => self.is_foreign = !matches!(value, b"UTF8" | b"SQL_ASCII"),
            b"DateStyle" => self.has_other_dates = !value.starts_with(b"ISO"),
            _ => {}
        }
    }

    /// Whether what a statement gives is the server's to write.
    pub(crate) fn is_server_s(&self, statement: &Statement) -> bool {
        (self.is_foreign || self.has_other_dates) && matches!(statement.tag(), "SHOW" | "EXPLAIN")
    }

    /// Whether the statements of one text have to go to the server one by one.
    pub(crate) fn takes_apart(&self, statements: &[Statement]) -> bool {
        statements.len() > 1 && statements.iter().all(|statement| self.is_server_s(statement))
    }

    /// What there is to do for these statements.
    pub(crate) fn work(&self, statements: Vec<Statement>) -> Work {
        match statements.as_slice() {
            [only] if self.is_server_s(only) => Work::Sourced(Sourced::of(only.clone())),
            _ => Work::Ours(statements),
        }
    }

    /// An error or a notice, as the client can read it.
    pub(crate) fn words(&self, error: PgError) -> PgError {
        if !self.is_foreign {
            return error;
        }
        let (detail, hint) = (error.detail.map(plain), error.hint.map(plain));
        PgError { message: plain(error.message), detail, hint, ..error }
    }

    /// Of these notices what the client wants to hear.
    pub(crate) fn notices(&self, mut notices: Vec<PgError>) -> Vec<PgError> {
        if self.quiet {
            notices.clear();
        }
        notices.into_iter().map(|notice| self.words(notice)).collect()
    }

    /// An answer that this gateway writes itself.
    pub(crate) fn answer(&self, answer: Answer) -> Answer {
        let notices = self.notices(answer.notices);
        let mut rows = answer.rows;
        if self.is_foreign {
            rows.iter_mut().flatten().for_each(|value| match value {
                Value::Text(text) => *text = text.take().map(plain),
                Value::Texts(texts) => texts.iter_mut().for_each(|text| *text = plain(std::mem::take(text))),
                _ => {}
            });
        }
        Answer { rows, notices, count: answer.count }
    }
}

/// A text in ASCII, which every encoding of a client has.
fn plain(text: String) -> String {
    if text.is_ascii() { text } else { text.replace(|sign: char| !sign.is_ascii(), "?") }
}

#[cfg(test)]
mod tests {
    use pgerror::SqlState;

    use super::*;

    fn speech(encoding: &str, dates: &str) -> Speech {
        let mut speech = Speech::default();
        speech.heard(b"client_encoding", encoding.as_bytes());
        speech.heard(b"DateStyle", dates.as_bytes());
        speech
    }

    #[test]
    fn what_the_gateway_cannot_write_is_the_server_s() {
        for (encoding, dates, expected) in [
            ("UTF8", "ISO, DMY", false),
            ("SQL_ASCII", "ISO, MDY", false),
            ("LATIN1", "ISO, MDY", true),
            ("UTF8", "SQL, DMY", true),
            ("UTF8", "German, DMY", true),
        ] {
            let speech = speech(encoding, dates);
            for (text, goes) in [
                ("SHOW JOBS", expected),
                ("SHOW CLUSTER SETTINGS", expected),
                ("EXPLAIN BACKUP DATABASE a INTO 'x'", expected),
                ("BACKUP DATABASE a INTO 'x'", false),
                ("SET CLUSTER SETTING a = 1", false),
                ("PAUSE JOB 1", false),
            ] {
                let statements = sql::parse(text).expect(text);
                assert_eq!(matches!(speech.work(statements), Work::Sourced(_)), goes, "{encoding} {dates} {text}");
            }
            for (text, apart) in
                [("SHOW JOBS; SHOW NODES", expected), ("SHOW JOBS", false), ("SHOW JOBS; PAUSE JOB 1", false)]
            {
                assert_eq!(speech.takes_apart(&sql::parse(text).expect(text)), apart, "{text}");
            }
        }
    }

    #[test]
    fn signs_that_an_encoding_may_not_have_become_question_marks() {
        let notice = || PgError::new(SqlState::SUCCESSFUL_COMPLETION, "größe").detail("日").hint("hint").at(3);
        let row = || vec![Value::Text(Some("ü".to_owned())), Value::Text(None), Value::Texts(vec!["aé".to_owned()])];
        let answer = || Answer { notices: vec![notice()], ..Answer::of(vec![row()]) };
        let mut latin = speech("LATIN1", "ISO, MDY");
        let told = latin.answer(answer());
        assert_eq!(told.notices, [PgError::new(notice().code, "gr??e").detail("?").hint("hint").at(3)]);
        assert!(matches!(&told.rows[0][..], [Value::Text(Some(text)), Value::Text(None), Value::Texts(texts)]
            if text == "?" && texts[0] == "a?"));
        let unicode = speech("UTF8", "SQL, DMY").answer(answer());
        assert_eq!(unicode.notices, [notice()]);
        assert!(matches!(&unicode.rows[0][0], Value::Text(Some(text)) if text == "ü"));
        latin.quiet = true;
        assert!(latin.answer(answer()).notices.is_empty());
    }
}
