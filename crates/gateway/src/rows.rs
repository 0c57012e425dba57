//! Rows of ours in texts of PostgreSQL's.
//!
//! A SHOW that stands as a row source is run here, and its rows take its place as a query that gives them, with their
//! names and types; the server does the rest. A prepared text is known to the server in a *shape*: the same columns and
//! parameters, but no rows, so that it is described and deallocated like any other, and fails when it is run by EXECUTE
//! instead of by Bind, which is where rows are put in.

use std::fmt::Write as _;

use backup::Requester;
use jobs::Birth;
use pgerror::{PgError, SqlState};
use serde_json::json;
use sql::{Inner, ParameterType, Put, Query, Rewritten, Sourced, Statement};
use tokio::sync::{mpsc, oneshot};

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value};
use crate::asking::Question;
use crate::requests::Arguments;
use crate::run::columns;

/// The rows of all sources of a text may be so long, in bytes as they go to the server; the statement fails beyond.
const ROWS_MAX: usize = 32 * 1024 * 1024;

/// What a shape has instead of JSON, so that it fails when it is run; the server's error shows this word.
const SHAPE: &str = "SHOW_as_a_row_source_needs_Bind_and_not_EXECUTE ";

/// What a query of rows in JSON begins with.
const BEFORE_DOCUMENT: &str = "SELECT * FROM pg_catalog.json_to_recordset(";

/// What stands before a query that a shape has only for its parameters and its errors.
const EXISTS: &str = ", EXISTS (";

/// Runs statements of ours for a client, with the queries and the row sources in them.
pub(crate) struct Runner {
    gateway: Gateway,
    /// Who asks; for statements that give everybody the same it is not found out.
    requester: Option<Requester>,
    remarks: mpsc::Sender<PgError>,
    questions: mpsc::Sender<Question>,
    arguments: Arguments,
    notices: Vec<PgError>,
    /// What is left of [`ROWS_MAX`].
    room: usize,
}

/// A text that goes on to the server, with rows in it.
pub(crate) struct Sent {
    pub(crate) rewritten: Rewritten,
    pub(crate) arguments: Arguments,
    /// What the client should know beside the rows.
    pub(crate) notices: Vec<PgError>,
}

impl Runner {
    pub(crate) fn new(
        gateway: Gateway,
        requester: Option<Requester>,
        remarks: mpsc::Sender<PgError>,
        questions: mpsc::Sender<Question>,
        arguments: Arguments,
    ) -> Self {
        Self { gateway, requester, remarks, questions, arguments, notices: Vec::new(), room: ROWS_MAX }
    }

    /// Runs a statement; `before` are the characters before it in the client's text, `birth` when a job of its is there.
    pub(crate) async fn run(
        &mut self,
        statement: &mut Statement,
        before: usize,
        birth: &Birth,
    ) -> Result<Answer, PgError> {
        if let Some(query) = statement.query().cloned() {
            let ids = self.named(query, before).await?;
            statement.answer_query(ids);
        }
        let mut answer = self.gateway.run(statement, self.requester.as_ref(), birth, &self.remarks).await?;
        let mut notices = std::mem::take(&mut self.notices);
        notices.append(&mut answer.notices);
        Ok(Answer { notices, ..answer })
    }

    /// The jobs that a query names.
    async fn named(&mut self, query: Query, before: usize) -> Result<Vec<i64>, PgError> {
        let rewritten = Box::pin(self.rewrite(&query.sourced, before + query.before)).await?;
        let (reply, answered) = oneshot::channel();
        let text = query.for_server(&rewritten);
        let position = Box::new(move |at| before + query.position(&rewritten, at));
        let question = Question { text, arguments: self.arguments.clone(), position, reply };
        let unheard = || PgError::new(SqlState::INTERNAL_ERROR, "the session did not take a question");
        self.questions.send(question).await.map_err(|_| unheard())?;
        answered.await.map_err(|_| unheard())?
    }

    async fn rewrite(&mut self, sourced: &Sourced, before: usize) -> Result<Rewritten, PgError> {
        let mut queries = Vec::with_capacity(sourced.sources().len());
        for source in sourced.sources() {
            let mut statement = source.statement.clone();
            let answer = self.run(&mut statement, before + source.before, &Birth::Now).await?;
            let rows = json(columns(&statement), &answer.rows, self.room)?;
            self.notices.extend(answer.notices);
            self.room = self.room.saturating_sub(rows.len());
            // Whatever `standard_conforming_strings` is by the time that the server reads it.
            let literal = format!("E'{}'", rows.replace('\\', "\\\\").replace('\'', "''"));
            queries.push(query(&literal, columns(&statement)).into());
        }
        Ok(sourced.rewrite(queries))
    }

    /// Runs the row sources of a text and puts their rows into it; `before` are the characters before it in the client's.
    pub(crate) async fn send(mut self, sourced: &Sourced, before: usize) -> Result<Sent, PgError> {
        let rewritten = self.rewrite(sourced, before).await?;
        Ok(Sent { rewritten, arguments: self.arguments, notices: self.notices })
    }
}

/// A text with the columns and the parameters of its row sources, and no rows.
pub(crate) fn shape(sourced: &Sourced) -> Rewritten {
    sourced.rewrite(sourced.sources().iter().map(|source| shape_of(&source.statement)).collect())
}

fn shape_of(statement: &Statement) -> Put {
    let mut parts = format!("pg_catalog.concat('{SHAPE}'");
    // A statement whose parameters cannot be is refused before its shape is wanted.
    for (index, found) in statement.parameters().unwrap_or_default().iter().enumerate() {
        let name = match found {
            Some(ParameterType::Text) => "text",
            Some(ParameterType::Int8) => "int8",
            None => continue,
        };
        let _ = write!(parts, ", ${}::pg_catalog.{name}", index + 1);
    }
    let mut inner = None;
    if let Some(query) = statement.query().cloned() {
        let shape = shape(&query.sourced);
        let text = query.for_server(&shape);
        let at = BEFORE_DOCUMENT.chars().count() + parts.chars().count() + EXISTS.chars().count();
        let length = text.chars().count();
        let _ = write!(parts, "{EXISTS}{text}\n)");
        inner = Some(Inner { at, length, position: Box::new(move |at| query.position(&shape, at)) });
    }
    Put { text: query(&format!("{parts})"), columns(statement)), inner }
}

/// A query of the rows in a JSON document. Everything in it is named with its schema: a session may have functions and
/// types of its own.
fn query(document: &str, columns: &[Column]) -> String {
    let columns: Vec<String> =
        columns.iter().map(|column| format!("\"{}\" {}", column.name, name_of(column.kind))).collect();
    format!("{BEFORE_DOCUMENT}{document}::pg_catalog.json) AS shown({})", columns.join(", "))
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Text => "pg_catalog.text",
        Kind::Int8 => "pg_catalog.int8",
        Kind::Bool => "pg_catalog.bool",
        Kind::Timestamp => "pg_catalog.timestamptz",
        Kind::UtcTime => "pg_catalog.timestamp",
        Kind::Float8 => "pg_catalog.float8",
        Kind::Texts => "pg_catalog.text[]",
        Kind::Int8s => "pg_catalog.int8[]",
    }
}

/// Rows as a JSON document in ASCII, which says the same in every encoding of a client.
fn json(columns: &[Column], rows: &[Vec<Value>], room: usize) -> Result<String, PgError> {
    let mut document = "[".to_owned();
    for row in rows {
        let fields = columns.iter().zip(row).map(|(column, value)| (column.name.to_owned(), field(value)));
        let text = serde_json::Value::Object(fields.collect()).to_string();
        document.push_str(if document.len() > 1 { ",\n" } else { "" });
        for char in text.chars() {
            match char.is_ascii() {
                true => document.push(char),
                false => char.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                    let _ = write!(document, "\\u{unit:04x}");
                }),
            }
        }
        if document.len() >= room {
            let message = format!("the rows of SHOW as a row source are longer than {ROWS_MAX} bytes");
            return Err(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
                .hint("Show less at once: SHOW JOBS SELECT … names jobs by a query."));
        }
    }
    document.push(']');
    Ok(document)
}

fn field(value: &Value) -> serde_json::Value {
    match value {
        // PostgreSQL's texts have no NUL.
        Value::Text(text) => json!(text.as_ref().map(|text| text.replace('\0', ""))),
        Value::Int8(number) => json!(number),
        Value::Bool(truth) => json!(truth),
        Value::Timestamp(time) => json!(time.map(|time| time.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string())),
        Value::UtcTime(time) => json!(time.map(|time| time.format("%Y-%m-%d %H:%M:%S%.6f").to_string())),
        Value::Float8(Some(number)) if !number.is_finite() => json!(number.to_string()),
        Value::Float8(number) => json!(number),
        Value::Texts(texts) => json!(texts),
        Value::Int8s(numbers) => json!(numbers),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    const COLUMNS: [Column; 4] = [
        Column { name: "a b", kind: Kind::Text },
        Column { name: "n", kind: Kind::Int8 },
        Column { name: "at", kind: Kind::UtcTime },
        Column { name: "l", kind: Kind::Texts },
    ];

    #[test]
    fn rows_are_json_in_ascii() {
        let at = DateTime::from_timestamp_micros(1_500_000_000_000_001);
        let row = vec![
            Value::Text(Some("it's \"é𝄞\"\n\0".to_owned())),
            Value::Int8(Some(i64::MIN)),
            Value::UtcTime(at),
            Value::Texts(vec!["\\".to_owned(), String::new()]),
        ];
        let null = vec![Value::Text(None), Value::Int8(None), Value::UtcTime(None), Value::Texts(Vec::new())];
        let expected = "[{\"a b\":\"it's \\\"\\u00e9\\ud834\\udd1e\\\"\\n\",\"at\":\"2017-07-14 02:40:00.000001\",\
                        \"l\":[\"\\\\\",\"\"],\"n\":-9223372036854775808},\n\
                        {\"a b\":null,\"at\":null,\"l\":[],\"n\":null}]";
        assert_eq!(json(&COLUMNS, &[row, null], 1000).unwrap(), expected);
        assert_eq!(json(&COLUMNS, &[], 1000).unwrap(), "[]");
    }

    #[test]
    fn rows_beyond_the_limit_are_refused() {
        let row = vec![Value::Text(Some("x".repeat(100)))];
        assert!(json(&COLUMNS[..1], &vec![row.clone(); 8], 1000).is_ok_and(|document| document.len() < 1000));
        let error = json(&COLUMNS[..1], &vec![row; 10], 1000).unwrap_err();
        assert_eq!(error.code, SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    }

    #[test]
    fn a_shape_has_the_columns_and_the_parameters() {
        let sourced = Sourced::read("SELECT $3 FROM [SHOW JOBS SELECT x FROM [SHOW JOB $2] WHERE y = $1] j").unwrap();
        let shape = shape(&sourced).text;
        for part in [
            "SELECT $3 FROM (SELECT * FROM ",
            "WHERE y = $1\n) AS named",
            ", $2::pg_catalog.int8",
            "\"num_runs\" pg_catalog.int8",
        ] {
            assert!(shape.contains(part), "{shape}");
        }
        assert!(!shape.contains("SHOW JOB $2"), "{shape}");
    }
}
