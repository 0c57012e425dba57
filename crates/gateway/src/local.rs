//! Prepared statements and portals that are ours, beside those that the server holds for the same session.

use std::collections::{HashMap, VecDeque};

use bytes::BytesMut;
use pgerror::{PgError, SqlState};
use sql::{ParameterType, Statement};

use crate::answer::{Answer, Column, Format, Value, Writer};
use crate::bound::Bound;
use crate::frame::{cut_i16, cut_i32, cut_string};
use crate::run::columns;

/// The types that our parameters have, by `pg_type.oid`.
const TEXT_OID: u32 = 25;
const INT8_OID: u32 = 20;

/// A name that this gateway holds a statement or a portal of its own under is not looked up on the server.
#[derive(Debug, Default)]
pub(crate) struct Locals {
    statements: HashMap<Vec<u8>, Prepared>,
    /// Parsed here, and not yet accepted under its name by the server.
    parsed: Option<(Vec<u8>, Prepared)>,
    portals: HashMap<Vec<u8>, Portal>,
}

/// A statement of ours, prepared.
#[derive(Clone, Debug)]
struct Prepared {
    statement: Statement,
    parameters: Vec<ParameterType>,
    /// The parameters' types as the client is told: those that it named itself, else ours.
    oids: Vec<u32>,
}

/// A statement of ours, bound.
#[derive(Debug)]
struct Portal {
    statement: Statement,
    formats: Vec<i16>,
    /// Once executed: the rows that have not been fetched.
    rows: Option<VecDeque<Vec<Value>>>,
    /// What its completion is reported with.
    tag: String,
}

impl Portal {
    fn format(&self, column: usize) -> Format {
        let code = match self.formats.as_slice() {
            [] => 0,
            [all] => *all,
            each => each.get(column).copied().unwrap_or(0),
        };
        if code == 1 { Format::Binary } else { Format::Text }
    }
}

/// What an Execute needs before it can be answered.
pub(crate) enum Execution {
    /// The statement has to be run first.
    Run(Statement),
    /// Everything is there.
    Ready,
}

/// Whether a frame of the extended protocol names something of ours. `body` may be cut short behind the names.
pub(crate) fn concerns(locals: &Locals, tag: u8, mut body: &[u8]) -> bool {
    match tag {
        b'B' => cut_string(&mut body).and_then(|_portal| cut_string(&mut body)).is_some_and(|name| locals.holds(name)),
        b'D' | b'C' => match body.split_first() {
            // A statement is closed on the server, too.
            Some((b'S', _)) if tag == b'C' => false,
            Some((b'S', mut name)) => cut_string(&mut name).is_some_and(|name| locals.holds(name)),
            Some((b'P', mut name)) => cut_string(&mut name).is_some_and(|name| locals.portals.contains_key(name)),
            _ => false,
        },
        b'E' => cut_string(&mut body).is_some_and(|name| locals.portals.contains_key(name)),
        _ => false,
    }
}

fn malformed(message: &str) -> PgError {
    PgError::new(SqlState::PROTOCOL_VIOLATION, format!("invalid {message} message"))
}

impl Locals {
    fn holds(&self, name: &[u8]) -> bool {
        let parsed = self.parsed.as_ref().is_some_and(|(parsed, _)| parsed == name);
        parsed || self.statements.contains_key(name)
    }

    /// Forgets what a frame that goes to the server replaces there.
    pub(crate) fn superseded(&mut self, tag: u8, mut body: &[u8]) {
        let is_statement = body.first() == Some(&b'S');
        if tag == b'C' {
            body = body.get(1..).unwrap_or_default();
        }
        match (tag, cut_string(&mut body)) {
            // Of a named one the server will say that the name is taken.
            (b'P', Some(b"")) => self.forget(b""),
            (b'C', Some(name)) if is_statement => self.forget(name),
            (b'B', Some(name)) => drop(self.portals.remove(name)),
            _ => {}
        }
    }

    fn forget(&mut self, name: &[u8]) {
        self.statements.remove(name);
        self.parsed.take_if(|(parsed, _)| parsed == name);
    }

    /// The server has accepted the name of the statement that was parsed last.
    pub(crate) fn confirm(&mut self) {
        self.statements.extend(self.parsed.take());
    }

    /// The server has refused something, and with it the name.
    pub(crate) fn reject(&mut self) {
        self.parsed = None;
    }

    /// A transaction has ended, and its portals with it.
    pub(crate) fn end_transaction(&mut self) {
        self.portals.clear();
    }

    /// `DISCARD ALL` or `DEALLOCATE ALL` has been done.
    pub(crate) fn discard_all(&mut self) {
        self.statements.clear();
        self.portals.clear();
    }

    /// Parse, of a text that is ours. Gives the name, which the server has to accept, too.
    pub(crate) fn parse<'b>(&mut self, mut body: &'b [u8]) -> Result<&'b [u8], PgError> {
        let (Some(name), Some(text)) = (cut_string(&mut body), cut_string(&mut body)) else {
            return Err(malformed("Parse"));
        };
        let mut parsed = sql::parse(utf8(text)?)?;
        let (Some(statement), true) = (parsed.pop(), parsed.is_empty()) else {
            let message = "cannot insert multiple commands into a prepared statement";
            return Err(PgError::new(SqlState::SYNTAX_ERROR, message));
        };
        let parameters = statement.parameters()?;
        let named = (0..cut_i16(&mut body).unwrap_or(0)).map_while(|_| cut_i32(&mut body)).map(i32::cast_unsigned);
        let mut named = named.map(Some);
        let oid = |parameter: &ParameterType| match (named.next().flatten(), parameter) {
            (Some(oid), _) if oid != 0 => oid,
            (_, ParameterType::Text) => TEXT_OID,
            (_, ParameterType::Int8) => INT8_OID,
        };
        let oids = parameters.iter().map(oid).collect();
        self.parsed = Some((name.to_vec(), Prepared { statement, parameters, oids }));
        Ok(name)
    }

    /// Bind, of a statement of ours.
    pub(crate) fn bind(&mut self, body: &[u8], out: &mut BytesMut) -> Result<(), PgError> {
        let Bound { portal, name, values, formats } = Bound::read(body).ok_or_else(|| malformed("Bind"))?;
        let Some(prepared) = self.statements.get(name).cloned() else { return Err(malformed("Bind")) };
        if values.len() != prepared.parameters.len() {
            let (name, given, wanted) = (String::from_utf8_lossy(name), values.len(), prepared.parameters.len());
            let message = format!(
                "bind message supplies {given} parameters, but prepared statement \"{name}\" requires {wanted}"
            );
            return Err(PgError::new(SqlState::PROTOCOL_VIOLATION, message));
        }
        let texts = values.iter().zip(&prepared.parameters).map(|(value, parameter)| value.text(*parameter));
        let statement = prepared.statement.bind(&texts.collect::<Result<Vec<_>, _>>()?)?;
        let width = columns(&statement).len();
        if formats.len() > 1 && formats.len() != width {
            let message = format!("bind message has {} result formats but query has {width} columns", formats.len());
            return Err(PgError::new(SqlState::PROTOCOL_VIOLATION, message));
        }
        if !portal.is_empty() && self.portals.contains_key(portal) {
            let message = format!("cursor \"{}\" already exists", String::from_utf8_lossy(portal));
            return Err(PgError::new(SqlState::DUPLICATE_CURSOR, message));
        }
        self.portals
            .insert(portal.to_vec(), Portal { tag: statement.tag().to_owned(), statement, formats, rows: None });
        Writer(out).bind_complete();
        Ok(())
    }

    /// Describe, of something of ours.
    pub(crate) fn describe(&self, body: &[u8], out: &mut BytesMut) -> Result<(), PgError> {
        let (kind, mut rest) = body.split_first().ok_or_else(|| malformed("Describe"))?;
        let name = cut_string(&mut rest).ok_or_else(|| malformed("Describe"))?;
        let mut out = Writer(out);
        if *kind == b'S' {
            let prepared = self.statements.get(name).ok_or_else(|| malformed("Describe"))?;
            out.parameter_description(&prepared.oids);
            describe_rows(&mut out, columns(&prepared.statement), |_| Format::Text);
        } else {
            let portal = self.portals.get(name).ok_or_else(|| malformed("Describe"))?;
            describe_rows(&mut out, columns(&portal.statement), |column| portal.format(column));
        }
        Ok(())
    }

    /// Close, of a portal of ours.
    pub(crate) fn close(&mut self, body: &[u8], out: &mut BytesMut) -> Result<(), PgError> {
        let mut rest = body.get(1..).unwrap_or_default();
        self.portals.remove(cut_string(&mut rest).ok_or_else(|| malformed("Close"))?);
        Writer(out).close_complete();
        Ok(())
    }

    /// Whether an Execute of a portal of ours runs a statement of this kind.
    pub(crate) fn runs(&self, body: &[u8], is_one: impl Fn(&Statement) -> bool) -> bool {
        matches!(self.begin_execute(body), Ok(Execution::Run(statement)) if is_one(&statement))
    }

    /// What an Execute of a portal of ours needs.
    pub(crate) fn begin_execute(&self, mut body: &[u8]) -> Result<Execution, PgError> {
        let name = cut_string(&mut body).ok_or_else(|| malformed("Execute"))?;
        let portal = self.portals.get(name).ok_or_else(|| malformed("Execute"))?;
        Ok(match portal {
            Portal { statement, rows: None, .. } => Execution::Run(statement.clone()),
            Portal { rows: Some(_), .. } => Execution::Ready,
        })
    }

    /// Answers an Execute; `answer` is there when the statement was run for it.
    pub(crate) fn finish_execute(
        &mut self,
        mut body: &[u8],
        answer: Option<Answer>,
        out: &mut BytesMut,
    ) -> Result<(), PgError> {
        let name = cut_string(&mut body).ok_or_else(|| malformed("Execute"))?;
        let limit = cut_i32(&mut body).ok_or_else(|| malformed("Execute"))?;
        let portal = self.portals.get_mut(name).ok_or_else(|| malformed("Execute"))?;
        let mut out = Writer(out);
        if let Some(answer) = answer {
            answer.notices.iter().for_each(|notice| out.notice(notice));
            portal.tag = answer.tag(&portal.statement);
            portal.rows = Some(answer.rows.into());
        }
        let mut rows = portal.rows.take().unwrap_or_default();
        // Zero, and any negative number, means all.
        let wanted = if limit > 0 { limit.unsigned_abs() as usize } else { rows.len() };
        for row in rows.drain(..wanted.min(rows.len())) {
            out.row(&row, |column| portal.format(column));
        }
        if rows.is_empty() {
            out.command_complete(&portal.tag)
        } else {
            out.portal_suspended()
        }
        portal.rows = Some(rows);
        Ok(())
    }
}

fn describe_rows(out: &mut Writer<'_>, columns: &[Column], formats: impl Fn(usize) -> Format) {
    match columns {
        [] => out.no_data(),
        columns => out.row_description(columns, formats),
    }
}

/// Our statements are read as UTF-8, whatever the client's encoding.
pub(crate) fn utf8(text: &[u8]) -> Result<&str, PgError> {
    std::str::from_utf8(text).map_err(|_| {
        PgError::new(SqlState::CHARACTER_NOT_IN_REPERTOIRE, "a statement of Backhaul must be valid UTF-8")
            .hint("Use SET client_encoding = 'UTF8'.")
    })
}
