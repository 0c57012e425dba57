//! What a client may be told.
//!
//! Inside Backhaul errors travel as `anyhow::Error`, gathering context on their way up. A client sees none of that: it
//! is told exactly what a [`PgError`] says, and a `PgError` is only ever written on purpose. Whatever reaches the
//! border without one becomes an internal error (XX000) that carries nothing but the id under which the chain was
//! logged, so that a path, a password or a half-sentence meant for us never leaks by accident.
//!
//! Texts follow PostgreSQL's message style: the message is lower case without a full stop, DETAIL and HINT are
//! sentences, objects are named with their kind, and the HINT is the reader's next step. Texts and codes that
//! CockroachDB has are taken over as they are; where it has no category its code is [`SqlState::UNCATEGORIZED`].
//!
//! A `PgError` is always the *root* of an `anyhow` chain (`Err(PgError::new(..).into())`, then `.context("..")` on
//! top), never itself a context: [`PgError::of`] looks for it among the sources.

use std::fmt;

/// A five-character SQLSTATE code.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    /// What CockroachDB reports for an error that has no category of its own.
    pub const UNCATEGORIZED: Self = Self(*b"XXUUU");
    /// A bug of ours; the client gets a log id instead of a text.
    pub const INTERNAL_ERROR: Self = Self(*b"XX000");
    /// A text that cannot be parsed.
    pub const SYNTAX_ERROR: Self = Self(*b"42601");
    /// Understood, and not available here.
    pub const FEATURE_NOT_SUPPORTED: Self = Self(*b"0A000");
    /// A frame or a packet that breaks the protocol.
    pub const PROTOCOL_VIOLATION: Self = Self(*b"08P01");
    /// A node or a server that should be there cannot be reached.
    pub const CONNECTION_FAILURE: Self = Self(*b"08006");
    /// A server that is there does not take connections now.
    pub const CANNOT_CONNECT_NOW: Self = Self(*b"57P03");
    /// The connection is ended by an operator or by a change of the fleet.
    pub const ADMIN_SHUTDOWN: Self = Self(*b"57P01");
    /// A statement was cancelled on request.
    pub const QUERY_CANCELED: Self = Self(*b"57014");
    /// A value or an option that cannot be.
    pub const INVALID_PARAMETER_VALUE: Self = Self(*b"22023");
    /// A text in an encoding other than the declared one.
    pub const CHARACTER_NOT_IN_REPERTOIRE: Self = Self(*b"22021");
    /// An object is not in the state that the request needs.
    pub const OBJECT_NOT_IN_PREREQUISITE_STATE: Self = Self(*b"55000");
    /// An object is busy now.
    pub const OBJECT_IN_USE: Self = Self(*b"55006");
    /// The server's own code for a lock that was not granted in time.
    pub const LOCK_NOT_AVAILABLE: Self = Self(*b"55P03");
    /// No schema of this name exists.
    pub const INVALID_SCHEMA_NAME: Self = Self(*b"3F000");
    /// A name is that of another kind of object.
    pub const WRONG_OBJECT_TYPE: Self = Self(*b"42809");
    /// A value is of another type than the one that is wanted.
    pub const DATATYPE_MISMATCH: Self = Self(*b"42804");
    /// No database of this name exists.
    pub const UNDEFINED_DATABASE: Self = Self(*b"3D000");
    /// A database of this name exists.
    pub const DUPLICATE_DATABASE: Self = Self(*b"42P04");
    /// What is stored is not what was written.
    pub const DATA_CORRUPTED: Self = Self(*b"XX001");
    /// No table of this name exists.
    pub const UNDEFINED_TABLE: Self = Self(*b"42P01");
    /// No column of this name exists.
    pub const UNDEFINED_COLUMN: Self = Self(*b"42703");
    /// The wrong password, or none.
    pub const INVALID_PASSWORD: Self = Self(*b"28P01");
    /// A role that may not connect.
    pub const INVALID_AUTHORIZATION: Self = Self(*b"28000");
    /// A statement that cannot be part of a transaction, in one.
    pub const ACTIVE_SQL_TRANSACTION: Self = Self(*b"25001");
    /// A statement in a transaction that has already failed.
    pub const IN_FAILED_SQL_TRANSACTION: Self = Self(*b"25P02");
    /// A write, or what counts as one, where only reading is allowed.
    pub const READ_ONLY_SQL_TRANSACTION: Self = Self(*b"25006");
    /// A prepared statement of this name exists.
    pub const DUPLICATE_PREPARED_STATEMENT: Self = Self(*b"42P05");
    /// No prepared statement of this name exists.
    pub const INVALID_SQL_STATEMENT_NAME: Self = Self(*b"26000");
    /// A portal of this name exists.
    pub const DUPLICATE_CURSOR: Self = Self(*b"42P03");
    /// A limit of ours, named in the message, is used up.
    pub const CONFIGURATION_LIMIT_EXCEEDED: Self = Self(*b"53400");
    /// An object of this name exists.
    pub const DUPLICATE_OBJECT: Self = Self(*b"42710");
    /// No object of this name exists.
    pub const UNDEFINED_OBJECT: Self = Self(*b"42704");
    /// A file that exists and is never written twice.
    pub const DUPLICATE_FILE: Self = Self(*b"58P02");
    /// A store or a disk that cannot be reached or fails.
    pub const IO_ERROR: Self = Self(*b"58030");
    /// No room is left where something has to be written.
    pub const DISK_FULL: Self = Self(*b"53100");
    /// A text that its type cannot be read from.
    pub const INVALID_TEXT_REPRESENTATION: Self = Self(*b"22P02");
    /// A number that its type has no room for.
    pub const NUMERIC_VALUE_OUT_OF_RANGE: Self = Self(*b"22003");
    /// A NULL where a value is needed.
    pub const NULL_VALUE_NOT_ALLOWED: Self = Self(*b"22004");
    /// A parameter of a statement whose type nothing decides.
    pub const INDETERMINATE_DATATYPE: Self = Self(*b"42P18");
    /// A parameter of a statement that would need two types.
    pub const AMBIGUOUS_PARAMETER: Self = Self(*b"42P08");
    /// A parameter that no value was given for.
    pub const UNDEFINED_PARAMETER: Self = Self(*b"42P02");
    /// Something that this user, or the node itself, may not do.
    pub const INSUFFICIENT_PRIVILEGE: Self = Self(*b"42501");
    /// Whoever runs the fleet has switched it off.
    pub const OPERATOR_INTERVENTION: Self = Self(*b"57000");
    /// A file, a directory or a bucket that does not exist.
    pub const UNDEFINED_FILE: Self = Self(*b"58P01");

    /// No error at all: a notice.
    pub const SUCCESSFUL_COMPLETION: Self = Self(*b"00000");
    /// Bytes that are no value of their type.
    pub const INVALID_BINARY_REPRESENTATION: Self = Self(*b"22P03");
    /// A file that another job has written; CockroachDB's own code.
    pub const FILE_ALREADY_EXISTS: Self = Self(*b"42C01");
    /// A server that takes no further session.
    pub const TOO_MANY_CONNECTIONS: Self = Self(*b"53300");
    /// A snapshot that can no longer be kept: a conflict with recovery, say.
    pub const SERIALIZATION_FAILURE: Self = Self(*b"40001");
    /// Two transactions that wait for each other.
    pub const DEADLOCK_DETECTED: Self = Self(*b"40P01");
    /// A server that restarts after a crash.
    pub const CRASH_SHUTDOWN: Self = Self(*b"57P02");
    /// One name twice in a list.
    pub const DUPLICATE_ALIAS: Self = Self(*b"42712");

    /// The code that `text` spells, when it is five ASCII letters or digits.
    pub fn parse(text: &str) -> Option<Self> {
        let code: [u8; 5] = text.as_bytes().try_into().ok()?;
        code.iter().all(u8::is_ascii_alphanumeric).then_some(Self(code))
    }

    /// The code as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a SQLSTATE is ASCII by construction")
    }

    fn is_internal(self) -> bool {
        self == Self::INTERNAL_ERROR
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error in the words a client gets.
///
/// Its `Display` is the message alone; DETAIL and HINT are fields of their own on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgError {
    /// The SQLSTATE.
    pub code: SqlState,
    /// The primary message: lower case, no full stop.
    pub message: String,
    /// Sentences that say more about this occurrence.
    pub detail: Option<String>,
    /// A sentence with the reader's next step.
    pub hint: Option<String>,
    /// Where in the statement, in characters counted from 1.
    pub position: Option<usize>,
}

impl PgError {
    /// An error of `code` that says `message`.
    pub fn new(code: SqlState, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), detail: None, hint: None, position: None }
    }

    /// What a client is told of an error that nobody wrote for it: where to find it in the node's log.
    pub fn internal(log_id: impl fmt::Display) -> Self {
        Self::new(SqlState::INTERNAL_ERROR, "internal error")
            .hint(format!("The node's log has the cause under the id {log_id}."))
    }

    /// Adds the DETAIL.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds the HINT.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the position in the statement, in characters counted from 1.
    #[must_use]
    pub fn at(mut self, position: usize) -> Self {
        self.position = Some(position);
        self
    }

    /// What a chain of errors has to say to a client, if anything.
    ///
    /// The innermost `PgError` speaks, because it is closest to what happened; an outer internal error beats it, since
    /// whoever raised it knew that the inner one is not the user's doing (CockroachDB combines codes by the same rule).
    pub fn of(error: &anyhow::Error) -> Option<&Self> {
        let spoken = || error.chain().filter_map(|cause| cause.downcast_ref::<Self>());
        spoken().find(|e| e.code.is_internal()).or_else(|| spoken().last())
    }
}

impl fmt::Display for PgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for PgError {}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn what_was_written_for_the_client_is_found_under_contexts() {
        let error = Err::<(), _>(PgError::new(SqlState::CANNOT_CONNECT_NOW, "not now"))
            .context("open a session")
            .context("run the statement")
            .unwrap_err();
        assert_eq!(PgError::of(&error).map(|e| e.message.as_str()), Some("not now"));
    }

    #[test]
    fn an_error_that_nobody_wrote_for_the_client_has_nothing_to_say() {
        let error = anyhow::anyhow!("password is hunter2").context("log in");
        assert_eq!(PgError::of(&error), None);
        assert!(!PgError::internal("4711").message.contains("hunter2"));
    }

    #[test]
    fn a_code_is_five_letters_or_digits() {
        for (text, ok) in [("42601", true), ("XXUUU", true), ("4260", false), ("4260é", false), ("42 01", false)] {
            assert_eq!(SqlState::parse(text).is_some(), ok, "{text}");
        }
    }
}
