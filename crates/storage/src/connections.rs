//! External connections: names for stores, so that a statement names a bucket and holds none of its keys.
//!
//! They live in the registry, their URIs sealed. Whoever resolves one has asked before whether the
//! user may use it; that is not known here.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio::time::timeout;
use tokio_postgres::{Client, Row};

use crate::{Seal, Uri};

/// A registry that does not answer by then is not reachable.
const QUESTION_DEADLINE: Duration = Duration::from_secs(10);

/// External connections by name.
#[derive(Debug)]
pub struct Connections {
    seal: Seal,
}

/// A connection as it may be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Where it leads, without secrets.
    pub uri_redacted: String,
    /// Who made it.
    pub owner: String,
    /// The roles that may use it.
    pub users: Vec<String>,
    /// The roles that may remove it.
    pub droppers: Vec<String>,
}

/// A change of who may do what with connections.
#[derive(Clone, Debug)]
pub struct Change<'c> {
    /// Whether privileges are given or taken away.
    pub gives: bool,
    /// `USAGE`, `DROP`.
    pub privileges: &'c [&'c str],
    /// On which connections.
    pub names: &'c [&'c str],
    /// To whom, or from whom.
    pub roles: &'c [String],
}

impl Connections {
    /// Those of the fleet whose seal this is.
    pub fn new(seal: Seal) -> Self {
        Self { seal }
    }

    /// Makes one. False means that one of this name existed, which was said not to matter.
    ///
    /// # Errors
    ///
    /// One exists and that does matter (42710), the URI is another external connection, or the registry fails.
    pub async fn create(
        &self,
        client: &Client,
        name: &str,
        uri: &Uri,
        owner: &str,
        if_not_exists: bool,
    ) -> anyhow::Result<bool> {
        if uri.connection().is_some() {
            let message = "an external connection cannot refer to another external connection";
            return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).into());
        }
        if name.is_empty() {
            let message = "the name of an external connection must not be empty";
            return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).into());
        }
        let sealed = self.seal.seal(&uri.exposed())?;
        let insert = "WITH made AS (
                INSERT INTO registry.external_connections (name, uri, redacted, owner)
                VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING RETURNING name, owner)
            INSERT INTO registry.external_connection_grants (connection, grantee, privilege)
            SELECT name, owner, privilege FROM made, unnest(ARRAY['USAGE', 'DROP']) AS privilege";
        let made = answered(client.execute(insert, &[&name, &sealed, &uri.redacted(), &owner])).await;
        match made.context("create an external connection")? {
            0 if if_not_exists => Ok(false),
            0 => {
                let message = format!("external connection with connection name {name} already exists");
                Err(PgError::new(SqlState::DUPLICATE_OBJECT, message).into())
            }
            _ => Ok(true),
        }
    }

    /// Removes one. What was made through it stays.
    ///
    /// # Errors
    ///
    /// None has this name (42704), or the registry fails.
    pub async fn drop(&self, client: &Client, name: &str) -> anyhow::Result<()> {
        let delete = "DELETE FROM registry.external_connections WHERE name = $1";
        let gone = answered(client.execute(delete, &[&name])).await.context("drop an external connection")?;
        if gone == 0 { Err(unknown(name).into()) } else { Ok(()) }
    }

    /// All of them, or the one of a name if there is one, by name.
    ///
    /// # Errors
    ///
    /// The registry fails.
    pub async fn list(&self, client: &Client, name: Option<&str>) -> anyhow::Result<Vec<Listed>> {
        let select = "SELECT name, redacted, owner,
                array(SELECT grantee FROM registry.external_connection_grants
                      WHERE connection = name AND privilege = 'USAGE'),
                array(SELECT grantee FROM registry.external_connection_grants
                      WHERE connection = name AND privilege = 'DROP')
            FROM registry.external_connections WHERE $1::text IS NULL OR name = $1 ORDER BY name";
        let rows = answered(client.query(select, &[&name])).await.context("list external connections")?;
        let listed = |row: &Row| Listed {
            name: row.get(0),
            uri_redacted: row.get(1),
            owner: row.get(2),
            users: row.get(3),
            droppers: row.get(4),
        };
        Ok(rows.iter().map(listed).collect())
    }

    /// Gives privileges or takes them away: all of them, or none. What is there already, or gone, is no error.
    ///
    /// # Errors
    ///
    /// A connection was dropped meanwhile (42704), or the registry fails.
    pub async fn change(&self, client: &Client, change: &Change<'_>) -> anyhow::Result<()> {
        let Change { gives, privileges, names, roles } = change;
        let statement = if *gives {
            "INSERT INTO registry.external_connection_grants (connection, privilege, grantee)
                SELECT * FROM unnest($1::text[]) AS c, unnest($2::text[]) AS p, unnest($3::text[]) AS r
                ON CONFLICT DO NOTHING"
        } else {
            "DELETE FROM registry.external_connection_grants
                WHERE connection = ANY($1) AND privilege = ANY($2) AND grantee = ANY($3)"
        };
        match answered(client.execute(statement, &[names, privileges, roles])).await {
            Ok(_) => Ok(()),
            Err(error) if is_orphan(&error) => {
                let message = "an external connection was dropped while it was granted";
                Err(PgError::new(SqlState::UNDEFINED_OBJECT, message).into())
            }
            Err(error) => Err(error.context("change who may use external connections")),
        }
    }

    /// The URI of a store: `external://name/sub` becomes what the connection stands for, and `sub` below it; any other
    /// URI is itself.
    ///
    /// # Errors
    ///
    /// None has this name (42704), it cannot be opened with this fleet's secret, or the registry fails.
    pub async fn resolve(&self, client: &Client, uri: &Uri) -> anyhow::Result<Uri> {
        let Some((name, sub)) = uri.external() else { return Ok(uri.clone()) };
        let select = "SELECT uri FROM registry.external_connections WHERE name = $1";
        let row = answered(client.query_opt(select, &[&name])).await.context("look for an external connection")?;
        let sealed: Vec<u8> = row.ok_or_else(|| unknown(name))?.get(0);
        let plain = self.seal.open(&sealed).with_context(|| format!("open external connection {name}"))?;
        Ok(Uri::parse(&plain)?.join(sub))
    }
}

/// Whether a row was refused because what it belongs to is not there.
fn is_orphan(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::code);
    code == Some(&tokio_postgres::error::SqlState::FOREIGN_KEY_VIOLATION)
}

/// No connection has this name.
#[must_use]
pub fn unknown(name: &str) -> PgError {
    let message = format!("external connection with connection name {name} does not exist");
    PgError::new(SqlState::UNDEFINED_OBJECT, message)
}

async fn answered<T>(question: impl Future<Output = Result<T, tokio_postgres::Error>>) -> anyhow::Result<T> {
    match timeout(QUESTION_DEADLINE, question).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(PgError::new(SqlState::CONNECTION_FAILURE, "the registry does not answer").into()),
    }
}
