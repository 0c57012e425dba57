//! Who may use a store by its name: `GRANT` and `REVOKE` on external connections.
//!
//! `GRANT … ON EXTERNAL` alone is PostgreSQL's, about a table of that name; only with `CONNECTION` behind it is it ours.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::Cursor;
use crate::names::quoted_name;
use crate::statement::{Statement, Text};
use crate::targets::patterns;

/// `GRANT USAGE ON EXTERNAL CONNECTION a, b TO role`, or `REVOKE … FROM role`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Whether it gives or takes away.
    pub gives: bool,
    /// What, in order.
    pub privileges: Vec<Privilege>,
    /// On which connections.
    pub connections: Vec<Text>,
    /// To whom, or from whom: roles, folded to lower case unless quoted; `public` is everybody.
    pub roles: Vec<String>,
}

/// What somebody may do with an external connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// `USAGE`: to name it in a URI.
    Usage,
    /// `DROP`: to remove it.
    Drop,
    /// `ALL`: both.
    All,
}

impl Privilege {
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Usage => &["USAGE"],
            Self::Drop => &["DROP"],
            Self::All => &["USAGE", "DROP"],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Usage => "USAGE",
            Self::Drop => "DROP",
            Self::All => "ALL",
        }
    }
}

impl Grant {
    /// What it gives or takes away, by the names that they are kept under.
    pub fn parts(&self) -> Vec<&'static str> {
        self.privileges.iter().flat_map(|privilege| privilege.parts()).copied().collect()
    }

    pub(crate) fn tag(&self) -> &'static str {
        if self.gives { "GRANT" } else { "REVOKE" }
    }

    pub(crate) fn print(&self) -> String {
        let connections: Vec<String> = self.connections.iter().map(Text::print).collect();
        let roles: Vec<_> = self.roles.iter().map(|role| quoted_name(role)).collect();
        let privileges: Vec<&str> = self.privileges.iter().map(|privilege| privilege.name()).collect();
        let (tag, privileges, to) = (self.tag(), privileges.join(", "), if self.gives { "TO" } else { "FROM" });
        format!("{tag} {privileges} ON EXTERNAL CONNECTION {} {to} {}", connections.join(", "), roles.join(", "))
    }
}

const READS: &str = "A user may back up what they may read.";

const READ_ALL: &str = "Use GRANT pg_read_all_data TO role, or GRANT SELECT on the tables.";

const RUNS_AS_SQL: &str = "What is in a backup runs as SQL with all rights.";

const OWN_CREDENTIALS: &str = "Stores with credentials of their own are for superusers.";

const USE_CONNECTION: &str =
    "Let a superuser make an external connection, and use GRANT USAGE ON EXTERNAL CONNECTION name TO role.";

const ASK_SUPERUSER: &str = "Let a superuser do it.";

/// CockroachDB's privileges that nobody can have here: what they allow follows from PostgreSQL's own.
fn not_here(cursor: &Cursor<'_>, verb: &str) -> Option<PgError> {
    let (privileges, detail, hint): (&str, &str, &str) = if cursor.at_words(&["BACKUP", "ON"]) {
        ("BACKUP ON …", READS, READ_ALL)
    } else if cursor.at_words(&["SYSTEM", "BACKUP"]) {
        ("SYSTEM BACKUP", READS, READ_ALL)
    } else if cursor.at_words(&["RESTORE", "ON"]) {
        ("RESTORE ON …", RUNS_AS_SQL, ASK_SUPERUSER)
    } else if cursor.at_words(&["SYSTEM", "RESTORE"]) {
        ("SYSTEM RESTORE", RUNS_AS_SQL, ASK_SUPERUSER)
    } else if cursor.at_words(&["SYSTEM", "EXTERNALCONNECTION"]) {
        ("SYSTEM EXTERNALCONNECTION", OWN_CREDENTIALS, USE_CONNECTION)
    } else if cursor.at_words(&["SYSTEM", "EXTERNALIOIMPLICITACCESS"]) {
        ("SYSTEM EXTERNALIOIMPLICITACCESS", OWN_CREDENTIALS, USE_CONNECTION)
    } else if cursor.at_word("SYSTEM") {
        ("SYSTEM", "Everybody sees and controls their own jobs, and superusers all of them.", ASK_SUPERUSER)
    } else {
        return None;
    };
    Some(cursor.unsupported(format!("{verb} {privileges} is not supported")).detail(detail).hint(hint))
}

/// The rest of a statement about privileges that nobody can have: `SYSTEM privilege, …` or `privilege ON [kind] name, …`, and
/// the roles.
fn refused(cursor: &mut Cursor<'_>, gives: bool) -> Result<Statement, PgError> {
    if cursor.eat_word("SYSTEM") {
        if cursor.eat_word("ALL") {
            cursor.eat_word("PRIVILEGES");
        } else {
            names(cursor)?;
        }
    } else {
        cursor.name()?;
        cursor.expect_words(&["ON"])?;
        let kinds: [&[&str]; 5] =
            [&["DATABASE"], &["TABLE"], &["SCHEMA"], &["EXTERNAL", "CONNECTION"], &["ALL", "TABLES", "IN", "SCHEMA"]];
        let _ = kinds.iter().any(|kind| cursor.eat_words(kind));
        patterns(cursor)?;
    }
    roles(cursor, gives)?;
    if gives && cursor.at_word("WITH") {
        cursor.expect_words(&["WITH", "GRANT", "OPTION"])?;
    }
    Err(cursor.refused())
}

/// `TO role, …` or `FROM role, …`.
fn roles(cursor: &mut Cursor<'_>, gives: bool) -> Result<Vec<String>, PgError> {
    cursor.expect_words(&[if gives { "TO" } else { "FROM" }])?;
    names(cursor)
}

fn names(cursor: &mut Cursor<'_>) -> Result<Vec<String>, PgError> {
    let mut names = vec![cursor.name()?];
    while cursor.eat(&Token::Comma) {
        names.push(cursor.name()?);
    }
    Ok(names)
}

/// One privilege. Which of them may stand in a list was judged when the text was taken.
fn privilege(cursor: &mut Cursor<'_>) -> Result<Privilege, PgError> {
    if cursor.eat_word("USAGE") {
        return Ok(Privilege::Usage);
    }
    if cursor.eat_word("DROP") {
        return Ok(Privilege::Drop);
    }
    cursor.expect_words(&["ALL"])?;
    cursor.eat_word("PRIVILEGES");
    Ok(Privilege::All)
}

/// `{ GRANT | REVOKE } { USAGE | DROP | USAGE, DROP | ALL [PRIVILEGES] } ON EXTERNAL CONNECTION name, … { TO | FROM } role, …`.
pub(crate) fn grant(cursor: &mut Cursor<'_>) -> Result<Statement, PgError> {
    let gives = cursor.eat_word("GRANT");
    if !gives {
        cursor.expect_words(&["REVOKE"])?;
    }
    if let Some(refusal) = not_here(cursor, if gives { "GRANT" } else { "REVOKE" }) {
        cursor.refuse(refusal);
        return refused(cursor, gives);
    }
    let mut privileges = vec![privilege(cursor)?];
    while cursor.eat(&Token::Comma) {
        privileges.push(privilege(cursor)?);
    }
    cursor.expect_words(&["ON", "EXTERNAL", "CONNECTION"])?;
    let mut connections = vec![cursor.text()?];
    while cursor.eat(&Token::Comma) {
        connections.push(cursor.text()?);
    }
    let roles = roles(cursor, gives)?;
    if gives && cursor.at_words(&["WITH", "GRANT", "OPTION"]) {
        let refusal = cursor.unsupported("GRANT ON EXTERNAL CONNECTION … WITH GRANT OPTION is not supported");
        cursor.refuse(refusal.hint("Its owner and superusers grant it."));
        cursor.expect_words(&["WITH", "GRANT", "OPTION"])?;
    }
    Ok(Statement::Grant(Grant { gives, privileges, connections, roles }))
}
