//! Sessions that may restore, and the databases they work in.
//!
//! The service role may not make databases, nor give objects to other roles. Where a superuser has granted it
//! [`RESTORE_ROLE`] it acts as that one here, and nowhere else. A database of ours is known by these together:
//! its OID, its owner, a name that holds the job, and a comment, the *mark*; it is never touched by its name alone.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_util::sync::CancellationToken;

use super::types::RESTORE_ROLE;
use crate::Server;
use crate::founders::session::{Session, has_code, quoted, within};

/// A statement that copies, scans or deletes whole databases, or builds what they hold, fails after this long.
pub(super) const LONG: Duration = Duration::from_secs(24 * 3600);

/// A session that was told to end and has not by then is left to what comes next, which then says so.
const END_WAIT_MS: i64 = 10_000;

/// What the founders set and a restore must not have: views are read to fill materialized ones, and rows are counted
/// by as many processes as the server allows.
const SETTINGS: &str = "
    RESET max_parallel_workers_per_gather; SET default_transaction_read_only = off;
    SELECT pg_catalog.set_config(name, '', false) FROM pg_catalog.pg_settings
    WHERE name = 'restrict_nonsystem_relation_kind'";

/// A session that acts as who may restore.
pub(super) struct Acting {
    pub(super) session: Session,
    /// The role that was taken for it; none where the service role is a superuser.
    pub(super) role: Option<&'static str>,
}

impl Acting {
    /// Opens one in `database`, which lasts until `end` at most.
    pub(super) async fn open(
        server: &Server,
        database: &str,
        job: i64,
        end: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let session = Session::open(server, database, job, end).await?;
        let query = "SELECT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = session_user),
                            EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1 AND rolsuper
                                        AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER'))";
        let row = session.row(query, &[&RESTORE_ROLE]).await.context("ask what the role of the node may do")?;
        let (is_super, is_member): (bool, bool) = (row.get(0), row.get(1));
        if !is_member && !is_super {
            return Err(may_not(server).into());
        }
        if is_member {
            // From release 16 on a member may lack the right to take the role.
            session.run(&format!("SET ROLE {RESTORE_ROLE}")).await.map_err(|error| {
                if has_code(&error, &[SqlState::INSUFFICIENT_PRIVILEGE]) { may_not(server).into() } else { error }
            })?;
        }
        session.run(SETTINGS).await.context("set up a session that restores")?;
        Ok(Self { session, role: is_member.then_some(RESTORE_ROLE) })
    }

    /// Opens one where the node logs in when it has no reason for another database.
    pub(super) async fn outside(server: &Server, job: i64) -> anyhow::Result<Self> {
        let acting = Self::open(server, server.database(), job, &CancellationToken::new()).await?;
        let row = acting.session.row("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
        if row.get(0) {
            let message = format!("server {} is a standby, and databases are restored on a primary", server.address());
            return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).into());
        }
        Ok(acting)
    }

    /// Opens one in the database of `job`, which must be the one with this OID.
    pub(super) async fn inside(server: &Server, job: i64, oid: u32, end: &CancellationToken) -> anyhow::Result<Self> {
        let opened = Self::open(server, &own_name(job), job, end).await;
        let acting =
            opened.map_err(
                |error| {
                    if has_code(&error, &[SqlState::UNDEFINED_DATABASE]) { gone(job).into() } else { error }
                },
            )?;
        let found = Found::by_oid(&acting.session, oid).await?;
        if !found.is_some_and(|found| found.is_of(job)) {
            return Err(gone(job).into());
        }
        Ok(acting)
    }

    /// Runs statements that may take as long as the database is large.
    pub(super) async fn run_long(&self, statements: &str) -> anyhow::Result<()> {
        within(LONG, self.session.client.batch_execute(statements)).await
    }
}

fn may_not(server: &Server) -> PgError {
    PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, "the role of the node may not restore databases").hint(format!(
        "Run as a superuser: CREATE ROLE {RESTORE_ROLE} SUPERUSER NOLOGIN; GRANT {RESTORE_ROLE} TO {}.",
        quoted(server.user())
    ))
}

/// The name of a job's database until it gets its own.
pub(super) fn own_name(job: i64) -> String {
    format!("_backhaul_{job}")
}

/// The comment on a database that is being restored.
pub(super) fn mark(job: i64) -> String {
    format!("backhaul restore of job {job}")
}

/// The comment on one that is whole and only lacks its name.
pub(super) fn whole_mark(job: i64) -> String {
    format!("backhaul restore of job {job}, whole")
}

/// The database of a job is not there, or it is another one.
pub(super) fn gone(job: i64) -> PgError {
    PgError::new(SqlState::UNDEFINED_DATABASE, format!("the database of restore job {job} does not exist"))
}

/// A database of the server.
pub(super) struct Found {
    pub(super) oid: u32,
    pub(super) name: String,
    comment: Option<String>,
    /// Whether whoever asks owns it.
    pub(super) is_mine: bool,
}

impl Found {
    /// Whether it has the name and a mark of `job`, and the role that restores as its owner: whoever else may make
    /// databases could have made one with name and mark beforehand.
    pub(super) fn is_of(&self, job: i64) -> bool {
        let is_marked = self.comment.as_ref().is_some_and(|comment| *comment == mark(job));
        self.is_mine && self.name == own_name(job) && (is_marked || self.is_whole(job))
    }

    /// Whether nothing is left to do but to give the name.
    pub(super) fn is_whole(&self, job: i64) -> bool {
        self.comment.as_ref().is_some_and(|comment| *comment == whole_mark(job))
    }

    pub(super) async fn by_oid(session: &Session, oid: u32) -> anyhow::Result<Option<Self>> {
        Self::one(session, "oid = $1", &oid).await
    }

    pub(super) async fn by_name(session: &Session, name: &str) -> anyhow::Result<Option<Self>> {
        Self::one(session, "datname = $1", &name).await
    }

    async fn one(
        session: &Session,
        condition: &str,
        value: &(dyn tokio_postgres::types::ToSql + Sync),
    ) -> anyhow::Result<Option<Self>> {
        let query = format!(
            "SELECT oid, datname::text, pg_catalog.shobj_description(oid, 'pg_database'),
                    pg_catalog.pg_get_userbyid(datdba) = current_user
             FROM pg_catalog.pg_database WHERE {condition}"
        );
        let rows = session.rows(&query, &[value]).await.context("look for a database")?;
        Ok(rows.first().map(|row| Self { oid: row.get(0), name: row.get(1), comment: row.get(2), is_mine: row.get(3) }))
    }
}

/// Ends all other sessions in a database, or only those under one name, and waits for their end.
pub(super) async fn end_sessions(session: &Session, oid: u32, name: Option<&str>) -> anyhow::Result<()> {
    let query = "SELECT pg_catalog.pg_terminate_backend(pid, $3) FROM pg_catalog.pg_stat_activity
                 WHERE datid = $1 AND pid <> pg_catalog.pg_backend_pid() AND coalesce(application_name = $2, true)";
    session.rows(query, &[&oid, &name, &END_WAIT_MS]).await.context("end what is left of earlier attempts").map(drop)
}

/// What a job has done inside its database, beyond its spans.
pub(super) async fn has_done(session: &Session, step: &str) -> anyhow::Result<bool> {
    let query = "SELECT EXISTS (SELECT FROM backhaul_restore.state WHERE key = $1)";
    Ok(session.row(query, &[&step]).await.context("read how far the restore is")?.get(0))
}

/// Notes that a step is done; noting it twice does no harm.
pub(super) async fn note_done(session: &Session, step: &str) -> anyhow::Result<()> {
    let statement = "INSERT INTO backhaul_restore.state (key) VALUES ($1) ON CONFLICT DO NOTHING";
    session.rows(statement, &[&step]).await.context("note how far the restore is").map(drop)
}

/// A text as SQL reads it back, whatever the server takes a backslash for.
pub(super) fn literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') { format!(" E'{}'", doubled.replace('\\', "\\\\")) } else { format!("'{doubled}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_of_a_job_by_name_and_mark() {
        for (name, comment, of, whole) in [
            ("_backhaul_7", Some("backhaul restore of job 7"), true, false),
            ("_backhaul_7", Some("backhaul restore of job 7, whole"), true, true),
            ("_backhaul_7", Some("mine"), false, false),
            ("_backhaul_7", None, false, false),
            ("_backhaul_8", Some("backhaul restore of job 7"), false, false),
            ("_backhaul_7", Some("backhaul restore of job 77"), false, false),
        ] {
            let comment = comment.map(str::to_owned);
            let mut found = Found { oid: 1, name: name.to_owned(), comment, is_mine: true };
            assert_eq!((found.is_of(7), found.is_whole(7)), (of, whole), "{name} {:?}", found.comment);
            found.is_mine = false;
            assert!(!found.is_of(7), "{name} {:?}", found.comment);
        }
    }

    #[test]
    fn a_literal_is_read_back() {
        assert_eq!((literal("it's"), literal("a\\'")), ("'it''s'".to_owned(), " E'a\\\\'''".to_owned()));
    }
}
