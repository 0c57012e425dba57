//! Prepared statements and portals that are ours, beside those that the server holds for the same session.

use std::collections::{HashMap, VecDeque};

use bytes::{Bytes, BytesMut};
use pgerror::{PgError, SqlState};
use sql::{ParameterType, Rewritten, Sourced, Statement};

use crate::answer::{Answer, Column, Format, Value, Writer};
use crate::bound::Bound;
use crate::frame::{cut_i16, cut_i32, cut_string};
use crate::requests::Arguments;
use crate::rows;
use crate::run::columns;
use crate::speech::Speech;

/// The types that our parameters have, by `pg_type.oid`.
const TEXT_OID: u32 = 25;
const INT8_OID: u32 = 20;

/// A name that this gateway holds a statement or a portal of its own under is not looked up on the server.
#[derive(Debug, Default)]
pub(crate) struct Locals {
    statements: HashMap<Vec<u8>, Prepared>,
    /// Parsed here, and not yet accepted under its name by the server.
    parsed: Option<(Vec<u8>, Prepared)>,
    /// A name of ours that the client parses something of the server's under: the server decides whether it was free, by its
    /// next answer, because that Parse was sent alone ([`Locals::is_renamed`]).
    taken: Option<Vec<u8>>,
    portals: HashMap<Vec<u8>, Portal>,
}

/// A text that is ours, or has something of ours in it, prepared.
#[derive(Clone, Debug)]
struct Prepared {
    meaning: Meaning,
    /// The types that its grammar decides.
    known: Vec<Option<ParameterType>>,
    /// Those that the client has named; zero for none.
    named: Vec<u32>,
    /// The client has made prepared statements by SQL since, perhaps one of this name in the place of this one.
    in_doubt: bool,
}

#[derive(Clone, Debug)]
enum Meaning {
    Ours(Statement),
    Sourced(Sourced),
}

/// What the server is to parse under the name of a prepared text, so that it knows the name and what only it can know:
/// the types of parameters in queries, and the columns of a text of its own.
pub(crate) struct ForServer<'b> {
    pub(crate) name: &'b [u8],
    pub(crate) text: String,
    pub(crate) types: Vec<u32>,
    /// Where a position in it is in the client's text.
    pub(crate) position: Box<dyn Fn(usize) -> usize + Send>,
}

impl Prepared {
    /// The types of all parameters, where `of_server` are those that the server tells.
    fn types(&self, of_server: &[u32]) -> Vec<u32> {
        let count = self.known.len().max(self.named.len()).max(of_server.len());
        let named = |index: usize| self.named.get(index).copied().filter(|oid| *oid != 0);
        let known = |index: usize| match self.known.get(index).copied().flatten()? {
            ParameterType::Text => Some(TEXT_OID),
            ParameterType::Int8 => Some(INT8_OID),
        };
        let told = |index: usize| of_server.get(index).copied();
        (0..count).map(|index| named(index).or_else(|| known(index)).or_else(|| told(index)).unwrap_or(0)).collect()
    }

    fn for_server<'b>(&self, name: &'b [u8]) -> ForServer<'b> {
        let types = self.types(&[]);
        let whole =
            |rewritten: Rewritten| -> Box<dyn Fn(usize) -> usize + Send> { Box::new(move |at| rewritten.position(at)) };
        match &self.meaning {
            Meaning::Sourced(sourced) => {
                let shape = rows::shape(sourced);
                ForServer { name, text: shape.text.clone(), types, position: whole(shape) }
            }
            Meaning::Ours(statement) => match statement.query().cloned() {
                Some(query) => {
                    let shape = rows::shape(&query.sourced);
                    let text = query.for_server(&shape);
                    ForServer { name, text, types, position: Box::new(move |at| query.position(&shape, at)) }
                }
                None => ForServer { name, text: String::new(), types: Vec::new(), position: Box::new(|at| at) },
            },
        }
    }
}

/// A statement of ours, bound.
#[derive(Debug)]
struct Portal {
    statement: Statement,
    arguments: Arguments,
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
    /// The statement has to be run first, with these values in its query.
    Run(Box<Statement>, Arguments),
    /// Everything is there.
    Ready,
}

/// What came of a Bind.
pub(crate) enum Binding {
    /// It has been answered.
    Done,
    /// Rows have to be put into this text, which then is bound on the server.
    Rows(Sourced, Arguments),
}

/// Whether a frame of the extended protocol names something of ours. `body` may be cut short behind the names.
pub(crate) fn concerns(locals: &Locals, tag: u8, mut body: &[u8]) -> bool {
    match tag {
        b'B' => {
            let (portal, name) = (cut_string(&mut body), cut_string(&mut body));
            let taken = portal.is_some_and(|portal| !portal.is_empty() && locals.portals.contains_key(portal));
            taken || name.is_some_and(|name| locals.holds(name))
        }
        b'D' | b'C' => match body.split_first() {
            // A statement is closed on the server, too.
            Some((b'S', _)) if tag == b'C' => false,
            Some((b'S', mut name)) => cut_string(&mut name).is_some_and(|name| locals.answers(name)),
            Some((b'P', mut name)) => cut_string(&mut name).is_some_and(|name| locals.portals.contains_key(name)),
            _ => false,
        },
        b'E' => cut_string(&mut body).is_some_and(|name| locals.portals.contains_key(name)),
        _ => false,
    }
}

/// The prepared statement that a Bind, or a Describe of one, names.
pub(crate) fn named(tag: u8, mut body: &[u8]) -> Option<&[u8]> {
    match (tag, body.split_first()?) {
        (b'B', _) => cut_string(&mut body).and_then(|_portal| cut_string(&mut body)),
        (b'D', (b'S', mut name)) => cut_string(&mut name),
        _ => None,
    }
}

fn malformed(message: &str) -> PgError {
    PgError::new(SqlState::PROTOCOL_VIOLATION, format!("invalid {message} message"))
}

/// Of the name of a portal.
pub(crate) fn is_taken(name: &[u8]) -> PgError {
    // PostgreSQL's own words.
    let message = format!("cursor \"{}\" already exists", String::from_utf8_lossy(name));
    PgError::new(SqlState::DUPLICATE_CURSOR, message)
}

fn several_commands() -> PgError {
    // PostgreSQL's own words.
    PgError::new(SqlState::SYNTAX_ERROR, "cannot insert multiple commands into a prepared statement")
}

impl Locals {
    fn holds(&self, name: &[u8]) -> bool {
        let parsed = self.parsed.as_ref().is_some_and(|(parsed, _)| parsed == name);
        parsed || self.statements.contains_key(name)
    }

    /// Whether a statement is answered here. A text with row sources is the server's to describe.
    fn answers(&self, name: &[u8]) -> bool {
        let parsed = self.parsed.as_ref().filter(|(parsed, _)| parsed == name).map(|(_, prepared)| prepared);
        parsed
            .or_else(|| self.statements.get(name))
            .is_some_and(|prepared| matches!(prepared.meaning, Meaning::Ours(_)))
    }

    /// Where a position in what the server has of a statement is in the client's text.
    pub(crate) fn position(&self, tag: u8, body: &[u8], on_server: usize) -> usize {
        let prepared = named(tag, body).and_then(|name| self.statements.get(name));
        prepared.map_or(on_server, |prepared| (prepared.for_server(b"").position)(on_server))
    }

    /// Forgets the statement that a message names, which the server does not have.
    pub(crate) fn forget_name(&mut self, tag: u8, body: &[u8]) {
        if let Some(name) = named(tag, body) {
            self.forget(name);
        }
    }

    /// Whether a frame is a Parse of something of the server's under a name that is ours. Of several answers to such ones it
    /// could not be told which name each has freed.
    pub(crate) fn is_renamed(&self, tag: u8, mut body: &[u8]) -> bool {
        tag == b'P' && cut_string(&mut body).is_some_and(|name| !name.is_empty() && self.holds(name))
    }

    /// Forgets what a frame that goes to the server, or any Query, replaces there.
    pub(crate) fn superseded(&mut self, tag: u8, mut body: &[u8]) {
        if tag == b'Q' {
            self.portals.remove(b"".as_slice());
        }
        if !matches!(tag, b'P' | b'B' | b'C') {
            return;
        }
        let is_statement = body.first() == Some(&b'S');
        if tag == b'C' {
            body = body.get(1..).unwrap_or_default();
        }
        match (tag, cut_string(&mut body)) {
            // Of a named one the server will say that the name is taken.
            (b'P', Some(b"")) => self.forget(b""),
            (b'P', Some(name)) if self.holds(name) => self.taken = Some(name.to_vec()),
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
        if let Some(name) = self.taken.take() {
            self.statements.remove(&name);
        }
        self.statements.extend(self.parsed.take());
    }

    /// The client has made a prepared statement by SQL: whatever is held here may have been deallocated before, and the
    /// name be that one's now.
    pub(crate) fn doubt(&mut self) {
        self.statements.values_mut().for_each(|prepared| prepared.in_doubt = true);
    }

    /// Whether the prepared statement of a name may be another one by now. Asked once, it is no longer in doubt.
    pub(crate) fn take_doubt(&mut self, name: &[u8]) -> bool {
        self.statements.get_mut(name).is_some_and(|prepared| std::mem::take(&mut prepared.in_doubt))
    }

    /// The server has refused something, and with it the name.
    pub(crate) fn reject(&mut self) {
        self.parsed = None;
        self.taken = None;
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

    /// Parse, of a text that is ours or has row sources. Gives what the server has to accept, too.
    pub(crate) fn parse<'b>(&mut self, mut body: &'b [u8], speech: &Speech) -> Result<ForServer<'b>, PgError> {
        let (Some(name), Some(text)) = (cut_string(&mut body), cut_string(&mut body)) else {
            return Err(malformed("Parse"));
        };
        let text = utf8(text)?;
        if sql::is_mixed(text.as_bytes()) {
            return Err(several_commands());
        }
        let (meaning, known) = if sql::is_ours(text.as_bytes()) {
            let mut parsed = sql::parse(text)?;
            let (Some(statement), true) = (parsed.pop(), parsed.is_empty()) else { return Err(several_commands()) };
            let known = statement.parameters()?;
            let meaning = match speech.is_server_s(&statement) {
                true => Meaning::Sourced(Sourced::of(statement)),
                false => Meaning::Ours(statement),
            };
            (meaning, known)
        } else {
            let sourced = Sourced::read(text)?;
            let known = sourced.parameters()?;
            (Meaning::Sourced(sourced), known)
        };
        let count = cut_i16(&mut body).map_or(0, i16::cast_unsigned);
        let named = (0..count).map_while(|_| cut_i32(&mut body)).map(i32::cast_unsigned).collect();
        let prepared = Prepared { meaning, known, named, in_doubt: false };
        let for_server = prepared.for_server(name);
        self.parsed = Some((name.to_vec(), prepared));
        Ok(for_server)
    }

    /// The name of the portal that a Bind makes here. Whether the server has one of that name only it can say.
    pub(crate) fn opens<'b>(&self, mut body: &'b [u8]) -> Option<&'b [u8]> {
        let (portal, name) = (cut_string(&mut body)?, cut_string(&mut body)?);
        (!portal.is_empty() && !self.portals.contains_key(portal) && self.answers(name)).then_some(portal)
    }

    /// Bind, of a statement whose parameters have these types on the server.
    pub(crate) fn bind(&mut self, body: &Bytes, of_server: &[u32], out: &mut BytesMut) -> Result<Binding, PgError> {
        let bound = Bound::read(body).ok_or_else(|| malformed("Bind"))?;
        let Bound { portal, name, values, given, formats, .. } = bound;
        let prepared = self.statements.get(name).cloned();
        if !portal.is_empty() && self.portals.contains_key(portal) {
            return Err(is_taken(portal));
        }
        let prepared = prepared.ok_or_else(|| malformed("Bind"))?;
        let types = prepared.types(of_server);
        if values.len() != types.len() {
            let (name, given, wanted) = (String::from_utf8_lossy(name), values.len(), types.len());
            let message = format!(
                "bind message supplies {given} parameters, but prepared statement \"{name}\" requires {wanted}"
            );
            return Err(PgError::new(SqlState::PROTOCOL_VIOLATION, message));
        }
        let is_ours = |index: usize| prepared.known.get(index).is_some_and(Option::is_some);
        let texts = values.iter().zip(&types).enumerate().map(|(index, (value, oid))| match is_ours(index) {
            true => value.text(*oid),
            // In a query: the server reads it.
            false => Ok(None),
        });
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let arguments = Arguments { types, given: body.slice_ref(given) };
        match prepared.meaning {
            Meaning::Sourced(sourced) => {
                self.portals.remove(portal);
                Ok(Binding::Rows(sourced.bind(&texts)?, arguments))
            }
            Meaning::Ours(statement) => {
                self.open(portal, statement.bind(&texts)?, arguments, formats)?;
                Writer(out).bind_complete();
                Ok(Binding::Done)
            }
        }
    }

    fn open(
        &mut self,
        portal: &[u8],
        statement: Statement,
        arguments: Arguments,
        formats: Vec<i16>,
    ) -> Result<(), PgError> {
        let width = columns(&statement).len();
        if formats.len() > 1 && formats.len() != width {
            let message = format!("bind message has {} result formats but query has {width} columns", formats.len());
            return Err(PgError::new(SqlState::PROTOCOL_VIOLATION, message));
        }
        let tag = statement.tag().to_owned();
        self.portals.insert(portal.to_vec(), Portal { tag, statement, arguments, formats, rows: None });
        Ok(())
    }

    /// Describe, of something of ours.
    /// `of_server` are the types that a statement's parameters have on the server.
    pub(crate) fn describe(&self, body: &[u8], of_server: &[u32], out: &mut BytesMut) -> Result<(), PgError> {
        let (kind, mut rest) = body.split_first().ok_or_else(|| malformed("Describe"))?;
        let name = cut_string(&mut rest).ok_or_else(|| malformed("Describe"))?;
        let mut out = Writer(out);
        if *kind == b'S' {
            let prepared = self.statements.get(name).ok_or_else(|| malformed("Describe"))?;
            let Meaning::Ours(statement) = &prepared.meaning else { return Err(malformed("Describe")) };
            out.parameter_description(&prepared.types(of_server));
            describe_rows(&mut out, columns(statement), |_| Format::Text);
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
        matches!(self.begin_execute(body), Ok(Execution::Run(statement, _)) if is_one(&statement))
    }

    /// What an Execute of a portal of ours needs.
    pub(crate) fn begin_execute(&self, mut body: &[u8]) -> Result<Execution, PgError> {
        let name = cut_string(&mut body).ok_or_else(|| malformed("Execute"))?;
        let portal = self.portals.get(name).ok_or_else(|| malformed("Execute"))?;
        Ok(match portal {
            Portal { statement, arguments, rows: None, .. } => {
                Execution::Run(Box::new(statement.clone()), arguments.clone())
            }
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
