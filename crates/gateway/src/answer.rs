//! What this gateway says itself, as frames. The only place that builds messages with pgwire.

use std::sync::Arc;

use bytes::{BufMut as _, BytesMut};
use chrono::{DateTime, Utc};
use pgerror::PgError;
use pgwire::api::Type;
use pgwire::api::results::{DataRowEncoder, FieldFormat, FieldInfo};
use pgwire::error::{ErrorInfo, PgWireResult};
use pgwire::messages::Message;
use pgwire::messages::copy::{CopyDone, CopyInResponse, CopyOutResponse};
use pgwire::messages::data::{FieldDescription, NoData, ParameterDescription, RowDescription};
use pgwire::messages::extendedquery::{BindComplete, CloseComplete, Flush, Parse, ParseComplete, PortalSuspended};
use pgwire::messages::response::{CommandComplete, ErrorResponse, NoticeResponse, ReadyForQuery, TransactionStatus};
use pgwire::messages::simplequery::Query;
use pgwire::messages::startup::Authentication;
use pgwire::types::ToSqlText;
use pgwire::types::format::FormatOptions;
use sql::Statement;
use tokio_postgres::types::ToSql;

use crate::pipeline::{POISON, Transaction};

/// A column of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its type.
    pub(crate) kind: Kind,
}

/// One column of a list of them.
pub(crate) const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind }
}

/// The types that our answers have.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// `text`
    Text,
    /// `int8`
    Int8,
    /// `bool`
    Bool,
    /// `timestamptz`
    Timestamp,
    /// `timestamp`, in UTC
    UtcTime,
    /// `float8`
    Float8,
    /// `text[]`
    Texts,
    /// `int8[]`
    Int8s,
}

/// A value; `None` is NULL.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// `text`
    Text(Option<String>),
    /// `int8`
    Int8(Option<i64>),
    /// `bool`
    Bool(Option<bool>),
    /// `timestamptz`
    Timestamp(Option<DateTime<Utc>>),
    /// `timestamp`, in UTC
    UtcTime(Option<DateTime<Utc>>),
    /// `float8`
    Float8(Option<f64>),
    /// `text[]`
    Texts(Vec<String>),
    /// `int8[]`
    Int8s(Vec<i64>),
}

/// The rows that a statement of ours gives.
#[derive(Debug)]
pub(crate) struct Answer {
    /// As many values as the statement has columns.
    pub(crate) rows: Vec<Vec<Value>>,
    /// What the client should know beside the rows.
    pub(crate) notices: Vec<PgError>,
    /// What the command tag ends in, if it counts something.
    pub(crate) count: Option<u64>,
}

impl Answer {
    /// Rows, and nothing to be said about them.
    pub(crate) fn of(rows: Vec<Vec<Value>>) -> Self {
        Self { rows, notices: Vec::new(), count: None }
    }

    /// The command tag that a statement with this answer is completed with.
    pub(crate) fn tag(&self, statement: &Statement) -> String {
        let tag = statement.tag();
        self.count.map_or_else(|| tag.to_owned(), |count| format!("{tag} {count}"))
    }
}

/// How a client wants a column: text or binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// As text.
    Text,
    /// In the type's binary form.
    Binary,
}

impl Kind {
    fn pg_type(self) -> Type {
        match self {
            Self::Text => Type::TEXT,
            Self::Int8 => Type::INT8,
            Self::Bool => Type::BOOL,
            Self::Timestamp => Type::TIMESTAMPTZ,
            Self::UtcTime => Type::TIMESTAMP,
            Self::Float8 => Type::FLOAT8,
            Self::Texts => Type::TEXT_ARRAY,
            Self::Int8s => Type::INT8_ARRAY,
        }
    }

    fn size(self) -> i16 {
        match self {
            Self::Text | Self::Texts | Self::Int8s => -1,
            Self::Int8 | Self::Timestamp | Self::UtcTime | Self::Float8 => 8,
            Self::Bool => 1,
        }
    }
}

/// What pgwire can write into a row, as one type.
trait Encodable {
    fn put(
        &self,
        encoder: &mut DataRowEncoder,
        pg_type: &Type,
        format: FieldFormat,
        options: &FormatOptions,
    ) -> PgWireResult<()>;
}

impl<T: ToSql + ToSqlText> Encodable for T {
    fn put(
        &self,
        encoder: &mut DataRowEncoder,
        pg_type: &Type,
        format: FieldFormat,
        options: &FormatOptions,
    ) -> PgWireResult<()> {
        encoder.encode_field_with_type_and_format(self, pg_type, format, options)
    }
}

/// Frames, written one behind the other.
pub(crate) struct Writer<'b>(pub(crate) &'b mut BytesMut);

impl Writer<'_> {
    fn put(&mut self, message: &impl Message) {
        // Encoding fails only for messages beyond the frame limit, which none of ours comes near.
        message.encode(self.0).expect("a message of ours is short");
    }

    pub(crate) fn bind_complete(&mut self) {
        self.put(&BindComplete::new());
    }

    pub(crate) fn parse_complete(&mut self) {
        self.put(&ParseComplete::new());
    }

    pub(crate) fn no_data(&mut self) {
        self.put(&NoData::new());
    }

    pub(crate) fn copy_out_response(&mut self) {
        self.put(&CopyOutResponse::new(0, 0, Vec::new()));
    }

    pub(crate) fn copy_in_response(&mut self) {
        self.put(&CopyInResponse::new(0, 0, Vec::new()));
    }

    pub(crate) fn copy_data(&mut self, bytes: &[u8]) {
        self.0.put_u8(b'd');
        self.0.put_u32(u32::try_from(4 + bytes.len()).expect("a piece is short"));
        self.0.put_slice(bytes);
    }

    pub(crate) fn copy_done(&mut self) {
        self.put(&CopyDone::new());
    }

    pub(crate) fn close_complete(&mut self) {
        self.put(&CloseComplete::new());
    }

    pub(crate) fn portal_suspended(&mut self) {
        self.put(&PortalSuspended::new());
    }

    /// To the server: a statement that it will refuse, in the simple or the extended protocol.
    ///
    /// The extended one has a name, because a Parse without one would drop the client's unnamed statement.
    pub(crate) fn poison(&mut self, extended: bool) {
        if extended {
            self.put(&Parse::new(Some("backhaul_poison".to_owned()), POISON.to_owned(), Vec::new()));
            self.flush();
        } else {
            self.put(&Query::new(POISON.to_owned()));
        }
    }

    /// To the server: answer now what you have.
    pub(crate) fn flush(&mut self) {
        self.put(&Flush::new());
    }

    pub(crate) fn parameter_description(&mut self, oids: &[u32]) {
        self.put(&ParameterDescription::new(oids.to_vec()));
    }

    pub(crate) fn row_description(&mut self, columns: &[Column], formats: impl Fn(usize) -> Format) {
        let fields = columns.iter().enumerate().map(|(index, column)| {
            let format = formats(index) as i16;
            FieldDescription::new(
                column.name.to_owned(),
                0,
                0,
                column.kind.pg_type().oid(),
                column.kind.size(),
                -1,
                format,
            )
        });
        self.put(&RowDescription::new(fields.collect()));
    }

    pub(crate) fn row(&mut self, values: &[Value], formats: impl Fn(usize) -> Format) {
        let schema: Vec<FieldInfo> = Vec::new();
        let mut encoder = DataRowEncoder::new(Arc::new(schema));
        for (index, value) in values.iter().enumerate() {
            let format = match formats(index) {
                Format::Text => FieldFormat::Text,
                Format::Binary => FieldFormat::Binary,
            };
            let options = FormatOptions::default();
            let mut put = |pg_type: &Type, value: &dyn Encodable| value.put(&mut encoder, pg_type, format, &options);
            let encoded = match value {
                Value::Text(text) => put(&Type::TEXT, text),
                Value::Int8(number) => put(&Type::INT8, number),
                Value::Bool(truth) => put(&Type::BOOL, truth),
                Value::Timestamp(time) => put(&Type::TIMESTAMPTZ, time),
                Value::UtcTime(time) => put(&Type::TIMESTAMP, &time.map(|time| time.naive_utc())),
                Value::Float8(number) => put(&Type::FLOAT8, number),
                Value::Texts(texts) => put(&Type::TEXT_ARRAY, texts),
                Value::Int8s(numbers) => put(&Type::INT8_ARRAY, numbers),
            };
            encoded.expect("a value matches its own type");
        }
        self.put(&encoder.take_row());
    }

    pub(crate) fn command_complete(&mut self, tag: &str) {
        self.put(&CommandComplete::new(tag.to_owned()));
    }

    pub(crate) fn ready(&mut self, transaction: Transaction) {
        self.put(&ReadyForQuery::new(match transaction {
            Transaction::Idle => TransactionStatus::Idle,
            Transaction::Open => TransactionStatus::Transaction,
            Transaction::Failed => TransactionStatus::Error,
        }));
    }

    pub(crate) fn authentication(&mut self, step: &Authentication) {
        self.put(step);
    }

    /// An error that ends the statement.
    pub(crate) fn error(&mut self, error: &PgError) {
        self.put(&ErrorResponse::from(info("ERROR", error)));
    }

    /// An error that ends the connection.
    pub(crate) fn fatal(&mut self, error: &PgError) {
        self.put(&ErrorResponse::from(info("FATAL", error)));
    }

    /// Something worth knowing.
    pub(crate) fn notice(&mut self, notice: &PgError) {
        self.put(&NoticeResponse::from(info("NOTICE", notice)));
    }
}

fn info(severity: &str, error: &PgError) -> ErrorInfo {
    let mut info = ErrorInfo::new(severity.to_owned(), error.code.to_string(), error.message.clone());
    info.severity_nonlocalized = Some(severity.to_owned());
    info.detail.clone_from(&error.detail);
    info.hint.clone_from(&error.hint);
    info.position = error.position.map(|position| position.to_string());
    info
}

/// What a client is told of `error`; the whole chain goes to the log when nobody wrote a text for the client.
pub(crate) fn spoken(error: &anyhow::Error) -> PgError {
    PgError::of(error).cloned().unwrap_or_else(|| {
        let id = uuid::Uuid::new_v4();
        tracing::error!(%id, "internal error: {error:#}");
        PgError::internal(id)
    })
}
