//! Which databases a backup of the whole cluster is of: all that are their users' own, in every shard.
//!
//! The list is made once, when the statement is planned, from what each shard's leaseholder has then. A database that is
//! made later is not in the backup; one that is dropped before its point is taken fails the job, which names it. Whatever
//! is left out is named with the reason, but for what every server is made with: the two templates, and a `postgres` in
//! which nothing was made.

use anyhow::Context as _;
use cluster::{PeerSession, spoken};
use fleet::founders::{DATABASES_MAX, Skipped};
use fleet::probe::REGISTRY_MARK;
use pgerror::{PgError, SqlState};

use crate::plan::{Backups, Requester, leaseholder_session};

/// The database that every server is made with for whoever has no other.
const DEFAULT: &str = "postgres";

/// What `initdb` makes has an OID below this one, except large objects, of which it makes none.
const OF_INITDB: u32 = 16384;

/// What a shard has for a backup of the whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holding {
    /// Its databases.
    pub(crate) databases: Vec<String>,
    /// What of it is left out.
    pub(crate) skipped: Vec<Skipped>,
}

/// A row of `pg_database`.
struct Row {
    name: String,
    oid: u32,
    comment: String,
    allows_connections: bool,
    is_template: bool,
    /// -2 where DROP DATABASE has begun and did not come to its end.
    limit: i32,
}

/// What is to be done about a database.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Take,
    /// Take it if anything was made in it.
    Look,
    /// Every server has it.
    Nothing,
    LeaveOut(&'static str),
}

impl Row {
    fn judge(&self) -> Verdict {
        if self.comment.starts_with(REGISTRY_MARK) {
            Verdict::LeaveOut("it is the registry of the fleet")
        } else if self.comment.starts_with("backhaul restore of job ") {
            Verdict::LeaveOut("a restore job is making it")
        } else if self.limit == -2 {
            Verdict::LeaveOut("it is invalid, because dropping it was interrupted")
        } else if self.is_template && self.oid < OF_INITDB {
            Verdict::Nothing
        } else if !self.allows_connections {
            Verdict::LeaveOut("nobody may connect to it")
        } else if self.is_template {
            Verdict::LeaveOut("it is a template")
        } else if self.name == DEFAULT {
            Verdict::Look
        } else {
            Verdict::Take
        }
    }
}

impl Backups {
    /// The databases of a shard that a backup of the whole cluster holds, and what it leaves out.
    ///
    /// # Errors
    ///
    /// The requester is no superuser there; there are too many databases; the shard cannot be reached.
    pub(crate) async fn holding(&self, shard: &str, requester: &Requester) -> anyhow::Result<Holding> {
        let session = leaseholder_session(&self.peers, shard, DEFAULT).await?;
        check_superuser(&session, shard, &requester.user).await?;
        let query = "
            SELECT datname::text, oid, coalesce(pg_catalog.shobj_description(oid, 'pg_database'), ''), datallowconn,
                   datistemplate, datconnlimit
            FROM pg_catalog.pg_database ORDER BY datname::text COLLATE \"C\"";
        let rows = session.query(query, &[]).await.map_err(spoken).context("list the databases")?;
        let mut holding = Holding::default();
        for row in &rows {
            let row = Row {
                name: row.get(0),
                oid: row.get(1),
                comment: row.get(2),
                allows_connections: row.get(3),
                is_template: row.get(4),
                limit: row.get(5),
            };
            let verdict = match row.judge() {
                Verdict::Look if is_empty(&session).await? => Verdict::Nothing,
                Verdict::Look => Verdict::Take,
                verdict => verdict,
            };
            match verdict {
                Verdict::Take | Verdict::Look => holding.databases.push(row.name),
                Verdict::Nothing => {}
                Verdict::LeaveOut(reason) => {
                    let object = format!("{} of shard {shard}", row.name);
                    let reason = reason.to_owned();
                    holding.skipped.push(Skipped { kind: "database".to_owned(), object, reason });
                }
            }
        }
        match holding.databases.len() {
            0..=DATABASES_MAX => Ok(holding),
            count => Err(too_many(shard, count).into()),
        }
    }
}

/// What a backup of the whole cluster leaves out of every server, for whoever takes it for one of the server.
pub(crate) fn server_wide() -> Skipped {
    let reason = "a backup is of databases; a restore names those that it needs and does not find".to_owned();
    Skipped { kind: "every".to_owned(), object: "role and tablespace".to_owned(), reason }
}

/// A whole cluster is a superuser's to back up, in every shard of it: CockroachDB's admin.
async fn check_superuser(session: &PeerSession, shard: &str, user: &str) -> anyhow::Result<()> {
    let query = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = $1";
    let found = session.query_opt(query, &[&user]).await.map_err(spoken).context("look for the user")?;
    if found.is_some_and(|row| row.get(0)) {
        return Ok(());
    }
    let message = format!(
        "only users with the admin role or the BACKUP system privilege are allowed to perform full cluster backups: \
         user {user} does not have BACKUP system privilege"
    );
    Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
        .detail(format!("The user is not a superuser in shard \"{shard}\"."))
        .hint("BACKUP DATABASE name, name INTO 'uri' takes databases whose every row the user may read.")
        .into())
}

/// Whether nothing has been made in the session's database, but for what is gone with some session.
async fn is_empty(session: &PeerSession) -> anyhow::Result<bool> {
    let query = "
        WITH kept AS (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_(temp|toast)'),
             made (oid) AS (
                SELECT oid FROM kept
                UNION ALL SELECT oid FROM pg_catalog.pg_class WHERE relnamespace IN (TABLE kept)
                UNION ALL SELECT oid FROM pg_catalog.pg_proc WHERE pronamespace IN (TABLE kept)
                UNION ALL SELECT oid FROM pg_catalog.pg_type WHERE typnamespace IN (TABLE kept)
                UNION ALL SELECT oid FROM pg_catalog.pg_operator WHERE oprnamespace IN (TABLE kept)
                UNION ALL SELECT oid FROM pg_catalog.pg_extension
                UNION ALL SELECT oid FROM pg_catalog.pg_foreign_data_wrapper
                UNION ALL SELECT oid FROM pg_catalog.pg_event_trigger
                UNION ALL SELECT oid FROM pg_catalog.pg_publication)
        SELECT NOT EXISTS (SELECT FROM made WHERE oid >= $1)
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)";
    let row =
        session.query_one(query, &[&OF_INITDB]).await.map_err(spoken).context("look into the default database")?;
    Ok(row.get(0))
}

fn too_many(shard: &str, count: usize) -> PgError {
    let message = format!("shard \"{shard}\" has {count} databases, and a backup holds at most {DATABASES_MAX} of one");
    PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
        .hint("Back them up by several statements: BACKUP DATABASE name, name INTO 'uri'.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_databases_are_taken_and_the_others_are_named() {
        use Verdict::{LeaveOut, Look, Nothing, Take};
        let registry = format!("{REGISTRY_MARK}x");
        for (name, oid, comment, allows_connections, is_template, limit, expected) in [
            ("shop", 16400, "mine", true, false, -1, Take),
            ("backhaul", 16400, "mine", true, false, 5, Take),
            ("postgres", 5, "default administrative connection database", true, false, -1, Look),
            ("template0", 4, "", false, true, -1, Nothing),
            ("template1", 1, "", true, true, -1, Nothing),
            ("backhaul", 16400, registry.as_str(), true, false, -1, LeaveOut("it is the registry of the fleet")),
            (
                "_backhaul_7",
                16400,
                "backhaul restore of job 7, run 3",
                true,
                false,
                -1,
                LeaveOut("a restore job is making it"),
            ),
            ("gone", 16400, "", true, false, -2, LeaveOut("it is invalid, because dropping it was interrupted")),
            ("closed", 16400, "", false, false, -1, LeaveOut("nobody may connect to it")),
            ("pattern", 16400, "", true, true, -1, LeaveOut("it is a template")),
        ] {
            let (name, comment) = (name.to_owned(), comment.to_owned());
            let row = Row { name, oid, comment, allows_connections, is_template, limit };
            assert_eq!(row.judge(), expected, "{} {}", row.name, row.comment);
        }
    }
}
