//! What this gateway asks a client's own session before it runs a statement of ours.
//!
//! Who asks, and with which settings, only PostgreSQL knows; and a query that names jobs is the user's own. Both are
//! asked in the client's session, between its own statements; the answers are swallowed ([`crate::pipeline`]) and read
//! here.

use std::time::Duration;

use backup::{Requester, Settings};
use bytes::Bytes;
use jobs::{Birth, Transaction};
use pgerror::{PgError, SqlState};
use sql::{IDS_MAX, Query, Statement};

use crate::frame::{cut_i16, cut_i32};
use crate::transactions::{MARK, birth_of, transaction};

/// Texts come in hexadecimal digits, because the answer is in the client's encoding.
const WHO: &str = "
    SELECT pg_catalog.encode(pg_catalog.convert_to(text, 'UTF8'), 'hex') FROM (VALUES
        (1, current_user::text), (2, pg_catalog.current_setting('is_superuser')),
        (3, (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'statement_timeout')),
        (4, pg_catalog.current_setting('backhaul.debug_pausepoints', true)),
        (5, pg_catalog.current_setting('backhaul.on_relocation', true)),
        (6, pg_catalog.current_setting('backhaul.progress', true)),
        (7, pg_catalog.current_setting('backhaul.backup.balanced_distribution', true)),
        (8, pg_catalog.current_database()::text),
        (9, pg_catalog.to_json(pg_catalog.current_schemas(true))::text)) AS asked (number, text) ORDER BY number";

/// No more of a value that is no id is told.
const TOLD_MAX: usize = 60;

/// Statements of ours that wait for the server to answer.
pub(crate) struct Asking {
    statements: Vec<Statement>,
    /// The Execute message that waits for them; `None` in the simple protocol.
    pub(crate) execute: Option<Bytes>,
    /// Who asks, once that is known.
    requester: Option<Requester>,
    /// The shard on which a transaction is open that has not been asked about.
    joins: Option<String>,
    /// The shard of the transaction that is being asked about.
    marking: Option<String>,
    /// The transaction that they are part of, once that is known.
    transaction: Option<Transaction>,
    /// The rows of the answer to the question that was asked last.
    told: Vec<Option<String>>,
    /// What is wrong with them.
    wrong: Option<PgError>,
    /// The query that was asked last, if it was one of the user's.
    query: Option<Query>,
}

/// What to do after an answer.
pub(crate) enum Next {
    /// To ask this.
    Ask(String),
    /// To run these, for whoever was told.
    Start(Vec<Statement>, Option<Box<Requester>>, Birth),
}

impl Asking {
    /// Begins with the question to ask first. With `joins`, the name of the session's shard, the statements are part of
    /// the transaction that is open there.
    pub(crate) fn begin(statements: Vec<Statement>, execute: Option<Bytes>, joins: Option<String>) -> (Self, String) {
        let (requester, marking, transaction) = (None, None, None);
        let (told, wrong, query) = (Vec::new(), None, None);
        let asking = Self { statements, execute, requester, joins, marking, transaction, told, wrong, query };
        (asking, WHO.to_owned())
    }

    /// A row of an answer; it may be cut short behind its first value. Rows beyond the limit are not kept.
    pub(crate) fn told(&mut self, mut row: &[u8]) {
        if self.told.len() > IDS_MAX {
            return;
        }
        let mut first = || match (cut_i16(&mut row)?, cut_i32(&mut row)?) {
            (0, _) => None,
            (_, -1) => Some(None),
            (_, length) => {
                let value = row.get(..usize::try_from(length).ok()?)?;
                Some(Some(String::from_utf8_lossy(value).into_owned()))
            }
        };
        match first() {
            Some(value) => self.told.push(value),
            None => self.wrong = Some(no_id(None)),
        }
    }

    /// The server's error about a query of the user's, as one about the statement that the query stands in.
    pub(crate) fn of_statement(&self, error: &[u8]) -> Option<Bytes> {
        let query = self.query.as_ref()?;
        with_position(error, |position| query.position(position))
    }

    /// An answer is whole.
    ///
    /// # Errors
    ///
    /// What it says is not what was asked for.
    pub(crate) fn answered(&mut self) -> Result<Next, PgError> {
        let told = std::mem::take(&mut self.told);
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        let marking = self.marking.take();
        match self.statements.iter_mut().find(|statement| statement.query().is_some()) {
            _ if marking.is_some() => self.transaction = marking.map(|shard| transaction(&told, &shard)).transpose()?,
            _ if self.requester.is_none() => {
                let unknown = || PgError::new(SqlState::INTERNAL_ERROR, "the server did not say who the client is");
                self.requester = Some(requester(&told).ok_or_else(unknown)?);
            }
            Some(statement) => statement.answer_query(ids(&told)?),
            None => {}
        }
        if let Some(shard) = self.joins.take() {
            self.marking = Some(shard);
            return Ok(Next::Ask(MARK.to_owned()));
        }
        self.query = self.statements.iter().find_map(Statement::query).cloned();
        Ok(match &self.query {
            Some(query) => Next::Ask(query.for_server()),
            None => {
                let birth = self.transaction.take().map_or_else(|| birth_of(&self.statements), Birth::With);
                Next::Start(std::mem::take(&mut self.statements), self.requester.take().map(Box::new), birth)
            }
        })
    }
}

/// An ErrorResponse with this done to the position in it; `None` when there is none. `body` is whole.
fn with_position(body: &[u8], change: impl FnOnce(usize) -> usize) -> Option<Bytes> {
    let fields: Vec<&[u8]> = body.split(|byte| *byte == 0).take_while(|field| !field.is_empty()).collect();
    let at = fields.iter().position(|field| field.first() == Some(&b'P'))?;
    let position = std::str::from_utf8(&fields[at][1..]).ok()?.parse().ok()?;
    let changed = format!("P{}", change(position));
    let mut fields = fields;
    fields[at] = changed.as_bytes();
    let mut body = fields.join(&0);
    body.extend([0, 0]);
    let mut frame = vec![b'E'];
    frame.extend(u32::try_from(4 + body.len()).ok()?.to_be_bytes());
    frame.extend(body);
    Some(frame.into())
}

fn requester(told: &[Option<String>]) -> Option<Requester> {
    let text = |digits: &Option<String>| {
        let Some(digits) = digits else { return Some(None) };
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = digits.as_bytes().chunks(2).map(byte).collect();
        String::from_utf8(bytes?).ok().map(Some)
    };
    let told: Vec<Option<String>> = told.iter().map(text).collect::<Option<_>>()?;
    let [
        Some(user),
        Some(superuser),
        Some(timeout),
        pausepoints,
        on_relocation,
        progress,
        balanced,
        Some(database),
        Some(path),
    ] = <[Option<String>; 9]>::try_from(told).ok()?
    else {
        return None;
    };
    let milliseconds: u64 = timeout.parse().ok()?;
    Some(Requester {
        user,
        superuser: superuser == "on",
        statement_timeout: (milliseconds > 0).then(|| Duration::from_millis(milliseconds)),
        settings: Settings {
            pausepoints: pausepoints.unwrap_or_default(),
            on_relocation: on_relocation.unwrap_or_default(),
            progress: progress.unwrap_or_default(),
            balanced: balanced.unwrap_or_default(),
        },
        database,
        search_path: serde_json::from_str(&path).ok()?,
    })
}

/// NULL is nobody's id.
fn ids(told: &[Option<String>]) -> Result<Vec<i64>, PgError> {
    if told.len() > IDS_MAX {
        let message = format!("a query may name no more than {IDS_MAX} jobs");
        return Err(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
            .hint("Name fewer with LIMIT, and send the statement again for the others."));
    }
    told.iter().flatten().map(|text| text.parse().map_err(|_| no_id(Some(text)))).collect()
}

fn no_id(value: Option<&str>) -> PgError {
    let error = PgError::new(SqlState::DATATYPE_MISMATCH, "a query that names jobs must give integers");
    error.detail(match value {
        Some(value) => {
            let shown: String = value.chars().take(TOLD_MAX).collect();
            format!("Its first column has the value \"{shown}\".")
        }
        None => "It has no column, or a very long value in the first.".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A DataRow's body.
    fn row(values: &[Option<&str>]) -> Vec<u8> {
        let mut row = i16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap());
            row.extend(length.to_be_bytes());
            row.extend(value.unwrap_or_default().as_bytes());
        }
        row
    }

    fn told_who() -> Asking {
        told_who_in(None)
    }

    fn told_who_in(joins: Option<String>) -> Asking {
        let statements = sql::parse("SHOW JOBS SELECT 1; SHOW JOBS; PAUSE JOBS TABLE x").unwrap();
        let (mut asking, question) = Asking::begin(statements, None, joins);
        assert_eq!(question, WHO);
        let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let settings = [Some("jürgen"), Some("on"), Some("50"), None, Some("wait"), Some("")];
        for value in settings.into_iter().chain([Some("off"), Some("movr"), Some(r#"["pg_catalog","ü"]"#)]) {
            let digits = value.map(hex);
            asking.told(&row(&[digits.as_deref()]));
        }
        asking
    }

    #[test]
    fn questions_follow_one_another() {
        let mut asking = told_who();
        let Ok(Next::Ask(first)) = asking.answered() else { panic!("no question") };
        assert!(first.ends_with("(SELECT 1\n) AS named LIMIT 1001"), "{first}");
        asking.told(&row(&[Some("7"), Some("x")]));
        asking.told(&row(&[None]));
        asking.told(&row(&[Some("-8")]));
        let Ok(Next::Ask(second)) = asking.answered() else { panic!("no question") };
        assert!(second.ends_with("(TABLE x\n) AS named LIMIT 1001"), "{second}");
        let Ok(Next::Start(statements, Some(requester), Birth::Now)) = asking.answered() else { panic!("no start") };
        assert_eq!(
            statements,
            sql::parse("SHOW JOBS VALUES (7), (-8); SHOW JOBS")
                .unwrap()
                .into_iter()
                .chain([statements[2].clone()])
                .collect::<Vec<_>>()
        );
        assert!(statements[2].query().is_none());
        let settings = Settings { on_relocation: "wait".to_owned(), balanced: "off".to_owned(), ..Settings::default() };
        let expected = Requester {
            user: "jürgen".to_owned(),
            superuser: true,
            statement_timeout: Some(Duration::from_millis(50)),
            database: "movr".to_owned(),
            search_path: vec!["pg_catalog".to_owned(), "ü".to_owned()],
            settings,
        };
        assert_eq!(*requester, expected);
    }

    #[test]
    fn a_transaction_is_asked_about_before_the_user_s_queries() {
        let mut asking = told_who_in(Some("s1".to_owned()));
        assert!(matches!(asking.answered(), Ok(Next::Ask(question)) if question == MARK));
        asking.told(&row(&[Some("740 2 00000001")]));
        assert!(matches!(asking.answered(), Ok(Next::Ask(question)) if question.contains("SELECT 1")));
        assert!(matches!(asking.answered(), Ok(Next::Ask(question)) if question.contains("TABLE x")));
        let transaction = Transaction { shard: "s1".to_owned(), timeline: 1, top: 740, part: 742 };
        assert!(matches!(asking.answered(), Ok(Next::Start(.., Birth::With(joined))) if joined == transaction));
    }

    #[test]
    fn a_position_is_that_in_the_statement() {
        let mut asking = told_who();
        let error = b"SERROR\0C42703\0P22\0Fparse.c\0\0";
        assert_eq!(asking.of_statement(error), None);
        assert!(matches!(asking.answered(), Ok(Next::Ask(_))));
        // `1` of `SHOW JOBS SELECT 1`, behind `SELECT * FROM (`.
        let moved = asking.of_statement(b"SERROR\0C42703\0P23\0Fparse.c\0\0").unwrap();
        assert_eq!(&moved[..], b"E\0\0\0\x20SERROR\0C42703\0P18\0Fparse.c\0\0");
        assert_eq!(asking.of_statement(b"SERROR\0C42703\0\0"), None);
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for (rows, code) in [
            (vec![row(&[Some("seven")])], "42804"),
            (vec![row(&[Some("1.0")])], "42804"),
            (vec![row(&[])], "42804"),
            (vec![row(&[Some("123")])[..8].to_vec()], "42804"),
            (vec![row(&[Some("1")]); IDS_MAX + 1], "53400"),
        ] {
            let mut asking = told_who();
            assert!(matches!(asking.answered(), Ok(Next::Ask(_))));
            rows.iter().for_each(|row| asking.told(row));
            let Err(error) = asking.answered() else { panic!("{rows:?}") };
            assert_eq!(error.code.as_str(), code);
        }
    }
}
