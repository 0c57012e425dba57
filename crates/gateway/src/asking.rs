//! What this gateway asks a client's own session before it runs a statement of ours.
//!
//! Who asks, and with which settings, only PostgreSQL knows; and a query that names jobs is the user's own. Both are
//! asked in the client's session, between its own statements; the answers are swallowed ([`crate::pipeline`]) and read
//! here. So is what the server knows of a prepared statement of ours: whether it still has its name, and which types the
//! parameters of its query have.

use std::time::Duration;

use backup::{Requester, Settings};
use bytes::Bytes;
use jobs::Birth;
use pgerror::{PgError, SqlState};
use sql::{IDS_MAX, Sourced, Statement};
use tokio::sync::oneshot;

use crate::frame::{cut_i16, cut_i32, cut_string};
use crate::local::is_taken;
use crate::requests::Arguments;
use crate::script::Origin;
use crate::transactions::{MARK, birth_of, transaction};

/// Texts come in hexadecimal digits, because the answer is in the client's encoding. Whether the user is a superuser is asked
/// of the catalog: the session's `is_superuser` stays what it was when the role was set.
///
/// Here and in every question to a client's session, operators, functions and types are named with their schema: found by
/// the client's `search_path`, they would be the client's own, and answer what it likes.
const WHO: &str = "
    SELECT pg_catalog.encode(pg_catalog.convert_to(told, 'UTF8'), 'hex') FROM (VALUES
        (1, CURRENT_USER::pg_catalog.text),
        (2, CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles AS roles
                WHERE roles.rolname OPERATOR(pg_catalog.=) CURRENT_USER AND roles.rolsuper) THEN 'on' ELSE 'off' END),
        (3, (SELECT setting FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) 'statement_timeout')),
        (4, pg_catalog.current_setting('backhaul.debug_pausepoints', true)),
        (5, pg_catalog.current_setting('backhaul.on_relocation', true)),
        (6, pg_catalog.current_setting('backhaul.progress', true)),
        (7, pg_catalog.current_setting('backhaul.backup.balanced_distribution', true)),
        (8, pg_catalog.current_setting('backhaul.backup.standby_mode', true)),
        (9, pg_catalog.current_database()::pg_catalog.text),
        (10, pg_catalog.to_json(pg_catalog.current_schemas(true))::pg_catalog.text),
        (11, pg_catalog.current_setting('client_min_messages'))) AS asked (number, told) ORDER BY number";

/// No more of a value that is no id is told.
const TOLD_MAX: usize = 60;

/// What a frame of ours asks for.
pub(crate) struct Order {
    pub(crate) work: Work,
    /// What it came in, and what waits for it.
    pub(crate) origin: Origin,
    /// What queries in it are run with.
    pub(crate) arguments: Arguments,
    /// Its client has said that it wants no notices.
    pub(crate) quiet: bool,
}

impl Order {
    pub(crate) fn new(work: Work, origin: Origin, arguments: Arguments) -> Self {
        Self { work, origin, arguments, quiet: false }
    }
}

/// What there is to do for it.
pub(crate) enum Work {
    /// Statements of ours, to be run and answered.
    Ours(Vec<Statement>),
    /// A text of PostgreSQL's, to be sent on with rows in it.
    Sourced(Sourced),
}

impl Work {
    /// When jobs that it makes begin to be there, outside a transaction of PostgreSQL's.
    pub(crate) fn birth(&self) -> Birth {
        match self {
            Self::Ours(statements) => birth_of(statements),
            Self::Sourced(_) => Birth::Now,
        }
    }
}

/// A query of the user's that names jobs, asked by a running statement.
pub(crate) struct Question {
    /// What the server is to run.
    pub(crate) text: String,
    pub(crate) arguments: Arguments,
    /// Where a position in it is in the client's text.
    pub(crate) position: Box<dyn Fn(usize) -> usize + Send>,
    /// Takes the ids.
    pub(crate) reply: oneshot::Sender<Result<Vec<i64>, PgError>>,
}

/// A question that waits for the server to answer.
pub(crate) struct Asking {
    about: About,
    extended: bool,
    /// The rows of the answer.
    told: Vec<Option<String>>,
    /// What is wrong with them.
    wrong: Option<PgError>,
}

enum About {
    /// Who asks for this, which is part of the transaction that is open on the shard, if one is named.
    Who(Order, Option<String>),
    /// Which transaction that is.
    Mark(Order, Box<Requester>, String),
    /// Which jobs a query names.
    Jobs(Question),
    /// Whether the server has the name of a prepared statement, and its parameters; this message waits.
    Name { tag: u8, body: Bytes, types: Vec<u32> },
    /// Whether the client has given that name to something else by SQL; this message waits.
    Namesake { tag: u8, body: Bytes },
    /// Whether the server has a portal of the name that this Bind is for, of a statement with parameters of these types.
    Portal { body: Bytes, types: Vec<u32> },
}

/// What to do after an answer.
pub(crate) enum Next {
    /// To ask this for the same order.
    Ask(Asking, &'static str),
    /// To run this, for whoever was told.
    Start(Order, Box<Requester>, Birth),
    /// To let the running statement go on.
    GoOn,
    /// To go on with this message; true when its prepared statement is one that was made by SQL.
    Know(u8, Bytes, bool),
    /// To take this message, of a prepared statement with parameters of these types.
    Take(u8, Bytes, Vec<u32>),
    /// To bind this, of a prepared statement with parameters of these types.
    Bind(Bytes, Vec<u32>),
}

impl Asking {
    fn new(about: About, extended: bool) -> Self {
        Self { about, extended, told: Vec::new(), wrong: None }
    }

    /// Begins with the question who asks for this. With `joins`, the name of the session's shard, it is part of the
    /// transaction that is open there.
    pub(crate) fn who(order: Order, joins: Option<String>) -> (Self, &'static str) {
        let extended = order.origin.is_extended();
        (Self::new(About::Who(order, joins), extended), WHO)
    }

    /// A query that names jobs.
    pub(crate) fn jobs(question: Question, extended: bool) -> Self {
        Self::new(About::Jobs(question), extended)
    }

    /// What the server knows of the prepared statement that this message names.
    pub(crate) fn name(tag: u8, body: Bytes) -> Self {
        Self::new(About::Name { tag, body, types: Vec::new() }, true)
    }

    /// Whether the prepared statement that this message names was made by SQL: then it is not ours.
    pub(crate) fn namesake(tag: u8, body: Bytes, name: &[u8]) -> (Self, String) {
        let whose = is_named(name);
        let question = format!("SELECT 1 FROM pg_catalog.pg_prepared_statements WHERE from_sql AND {whose}");
        (Self::new(About::Namesake { tag, body }, true), question)
    }

    /// Whether the server has a portal of the name that this Bind is for: a cursor, perhaps, that was declared.
    pub(crate) fn portal(body: Bytes, types: Vec<u32>, name: &[u8]) -> (Self, String) {
        let question = format!("SELECT 1 FROM pg_catalog.pg_cursors WHERE {}", is_named(name));
        (Self::new(About::Portal { body, types }, true), question)
    }

    /// Whether it is asked in the extended protocol.
    pub(crate) fn is_extended(&self) -> bool {
        self.extended
    }

    /// Whether a running statement waits for it.
    pub(crate) fn is_of_running(&self) -> bool {
        matches!(self.about, About::Jobs(_))
    }

    /// The message that waits to know whether its prepared statement has its name.
    pub(crate) fn waiting(&self) -> Option<(u8, &Bytes)> {
        match &self.about {
            About::Name { tag, body, .. } => Some((*tag, body)),
            About::Who(..) | About::Mark(..) | About::Jobs(_) | About::Namesake { .. } | About::Portal { .. } => None,
        }
    }

    /// A row of an answer, which may be cut short behind its first value, or a whole ParameterDescription. Rows beyond
    /// the limit are not kept.
    pub(crate) fn told(&mut self, mut row: &[u8]) {
        if let About::Name { types, .. } = &mut self.about {
            let count = cut_i16(&mut row).map_or(0, i16::cast_unsigned);
            types.extend((0..count).map_while(|_| cut_i32(&mut row)).map(i32::cast_unsigned));
            return;
        }
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

    /// The server's error about a query of the user's, as one about the text that the query stands in.
    pub(crate) fn of_statement(&self, error: &[u8]) -> Option<Bytes> {
        match &self.about {
            About::Jobs(question) => with_position(error, &question.position),
            About::Who(..) | About::Mark(..) | About::Name { .. } | About::Namesake { .. } | About::Portal { .. } => {
                None
            }
        }
    }

    /// An answer is whole.
    ///
    /// # Errors
    ///
    /// What it says is not what was asked for.
    pub(crate) fn answered(self) -> Result<Next, PgError> {
        match self.about {
            About::Who(mut order, joins) => {
                let unknown = || PgError::new(SqlState::INTERNAL_ERROR, "the server did not say who the client is");
                let (requester, quiet) = requester(&self.told).ok_or_else(unknown)?;
                let requester = Box::new(requester);
                order.quiet = quiet;
                Ok(match joins {
                    Some(shard) => {
                        let asking = Self::new(About::Mark(order, requester, shard), self.extended);
                        Next::Ask(asking, MARK)
                    }
                    None => {
                        let birth = order.work.birth();
                        Next::Start(order, requester, birth)
                    }
                })
            }
            About::Mark(order, requester, shard) => {
                Ok(Next::Start(order, requester, Birth::With(transaction(&self.told, &shard)?)))
            }
            About::Jobs(question) => {
                // Who has been cancelled meanwhile does not hear it.
                let _ = question.reply.send(self.wrong.map_or_else(|| ids(&self.told), Err));
                Ok(Next::GoOn)
            }
            About::Name { tag, body, types } => Ok(Next::Take(tag, body, types)),
            About::Namesake { tag, body } => Ok(Next::Know(tag, body, !self.told.is_empty())),
            About::Portal { body, types } if self.told.is_empty() => Ok(Next::Bind(body, types)),
            About::Portal { body, .. } => Err(is_taken(cut_string(&mut &body[..]).unwrap_or_default())),
        }
    }
}

/// An ErrorResponse with this done to the position in it; `None` when there is none. `body` is whole.
pub(crate) fn with_position(body: &[u8], change: impl FnOnce(usize) -> usize) -> Option<Bytes> {
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

/// A condition for a name, which is in the client's encoding and may have anything in it.
fn is_named(name: &[u8]) -> String {
    let digits: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "name OPERATOR(pg_catalog.=) \
         pg_catalog.convert_from(pg_catalog.decode('{digits}', 'hex'), pg_catalog.pg_client_encoding())"
    )
}

/// Who asks, and whether they want no notices.
fn requester(told: &[Option<String>]) -> Option<(Requester, bool)> {
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
        standby_mode,
        Some(database),
        Some(path),
        Some(min_messages),
    ] = <[Option<String>; 11]>::try_from(told).ok()?
    else {
        return None;
    };
    let milliseconds: u64 = timeout.parse().ok()?;
    let requester = Requester {
        user,
        superuser: superuser == "on",
        statement_timeout: (milliseconds > 0).then(|| Duration::from_millis(milliseconds)),
        settings: Settings {
            pausepoints: pausepoints.unwrap_or_default(),
            on_relocation: on_relocation.unwrap_or_default(),
            progress: progress.unwrap_or_default(),
            balanced: balanced.unwrap_or_default(),
            standby_mode: standby_mode.unwrap_or_default(),
        },
        database,
        search_path: serde_json::from_str(&path).ok()?,
    };
    // All that this gateway says beside errors is a NOTICE.
    Some((requester, matches!(min_messages.as_str(), "warning" | "error")))
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
    use ::jobs::Transaction;

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

    fn order() -> Order {
        let statements = sql::parse("SHOW JOBS").unwrap();
        Order::new(Work::Ours(statements), Origin::Query, Arguments::default())
    }

    fn tell_who(asking: &mut Asking, min_messages: &str) {
        let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let settings = [Some("jürgen"), Some("on"), Some("50"), None, Some("wait"), Some("")];
        let path = Some(r#"["pg_catalog","ü"]"#);
        for value in settings.into_iter().chain([Some("off"), None, Some("movr"), path, Some(min_messages)]) {
            let digits = value.map(hex);
            asking.told(&row(&[digits.as_deref()]));
        }
    }

    #[test]
    fn who_asks_is_told_in_digits() {
        let (mut asking, question) = Asking::who(order(), None);
        assert_eq!((question, asking.is_extended()), (WHO, false));
        tell_who(&mut asking, "notice");
        let Ok(Next::Start(_, requester, Birth::Now)) = asking.answered() else { panic!("no start") };
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
        assert!(Asking::who(order(), None).0.answered().is_err());
        for (min_messages, quiet) in [("debug1", false), ("log", false), ("warning", true), ("error", true)] {
            let mut asking = Asking::who(order(), None).0;
            tell_who(&mut asking, min_messages);
            assert!(matches!(asking.answered(), Ok(Next::Start(order, ..)) if order.quiet == quiet), "{min_messages}");
        }
    }

    #[test]
    fn questions_leave_nothing_to_the_client_s_search_path() {
        let (_, namesake) = Asking::namesake(b'B', Bytes::new(), b"s");
        for question in [WHO, MARK, &namesake] {
            let bare: String = question.split('\'').step_by(2).collect();
            assert!(bare.split("::").skip(1).all(|cast| cast.starts_with("pg_catalog.")), "{question}");
            let unnamed = bare.split("OPERATOR(pg_catalog.").enumerate().map(|(index, part)| match index {
                0 => part,
                _ => part.split_once(')').unwrap().1,
            });
            assert!(unnamed.flat_map(str::chars).all(|sign| !"=<>+-/%&|^!~@#".contains(sign)), "{question}");
            let words: Vec<&str> = bare.split_inclusive('(').collect();
            for call in words {
                let name = call.trim_end_matches('(').rsplit([' ', '(']).next().unwrap();
                let keyword = ["", "OPERATOR", "EXISTS", "VALUES", "asked", "AS", "ELSE"].contains(&name.trim());
                assert!(!call.ends_with('(') || keyword || name.starts_with("pg_catalog."), "{call}");
            }
        }
    }

    type Reply = oneshot::Receiver<Result<Vec<i64>, PgError>>;

    fn jobs() -> (Asking, Reply) {
        let (reply, answered) = oneshot::channel();
        let position = Box::new(|at| at + 10);
        let question = Question { text: String::new(), arguments: Arguments::default(), position, reply };
        (Asking::jobs(question, true), answered)
    }

    #[test]
    fn ids_are_those_of_the_first_column() {
        let (mut asking, mut answered) = jobs();
        for values in [[Some("7"), Some("x")].as_slice(), &[None], &[Some("-8")]] {
            asking.told(&row(values));
        }
        assert!(matches!(asking.answered(), Ok(Next::GoOn)));
        assert_eq!(answered.try_recv().unwrap(), Ok(vec![7, -8]));
    }

    #[test]
    fn a_transaction_is_asked_about_before_anything_is_run() {
        let (mut asking, _) = Asking::who(order(), Some("s1".to_owned()));
        tell_who(&mut asking, "notice");
        let Ok(Next::Ask(mut asking, question)) = asking.answered() else { panic!("no question") };
        assert_eq!(question, MARK);
        asking.told(&row(&[Some("740 2 00000001")]));
        let transaction = Transaction { shard: "s1".to_owned(), timeline: 1, top: 740, part: 742 };
        assert!(matches!(asking.answered(), Ok(Next::Start(_, _, Birth::With(joined))) if joined == transaction));
    }

    #[test]
    fn a_position_is_that_in_the_statement() {
        let (asking, _answered) = jobs();
        let moved = asking.of_statement(b"SERROR\0C42703\0P8\0Fparse.c\0\0").unwrap();
        assert_eq!(&moved[..], b"E\0\0\0\x20SERROR\0C42703\0P18\0Fparse.c\0\0");
        assert_eq!(asking.of_statement(b"SERROR\0C42703\0\0"), None);
        assert_eq!(Asking::who(order(), None).0.of_statement(b"SERROR\0P8\0\0"), None);
    }

    #[test]
    fn the_types_of_parameters_are_read() {
        let mut asking = Asking::name(b'B', Bytes::from_static(b"x"));
        asking.told(&[0, 2, 0, 0, 0, 20, 0, 0, 1, 0]);
        assert_eq!(asking.waiting(), Some((b'B', &Bytes::from_static(b"x"))));
        let Ok(Next::Take(b'B', body, types)) = asking.answered() else { panic!("no message") };
        assert_eq!((&body[..], types), (&b"x"[..], vec![20, 256]));
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
            let (mut asking, mut answered) = jobs();
            rows.iter().for_each(|row| asking.told(row));
            assert!(asking.answered().is_ok());
            let Ok(Err(error)) = answered.try_recv() else { panic!("{rows:?}") };
            assert_eq!(error.code.as_str(), code);
        }
    }
}
