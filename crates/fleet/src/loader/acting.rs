//! Sessions that may restore.
//!
//! The service role may not make databases, nor give objects to other roles. Where a superuser has granted it
//! [`RESTORE_ROLE`] it acts as that one here, and nowhere else.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_util::sync::CancellationToken;

use super::JobDatabase;
use super::found::{Found, gone};
use super::types::{RESTORE_ROLE, superseded};
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
        job: JobDatabase,
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
    pub(super) async fn outside(server: &Server, job: JobDatabase) -> anyhow::Result<Self> {
        let acting = Self::open(server, server.database(), job, &CancellationToken::new()).await?;
        let row = acting.session.row("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
        if row.get(0) {
            let message = format!("server {} is a standby, and databases are restored on a primary", server.address());
            // As the server itself says of every write.
            return Err(PgError::new(SqlState::READ_ONLY_SQL_TRANSACTION, message).into());
        }
        Ok(acting)
    }

    /// Opens one in the database of `job`, which must be the one with this OID, for a run that must not be an old one.
    pub(super) async fn inside(
        server: &Server,
        job: JobDatabase,
        oid: u32,
        run: i64,
        end: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let opened = Self::open(server, &job.own_name(), job, end).await;
        let acting =
            opened.map_err(
                |error| {
                    if has_code(&error, &[SqlState::UNDEFINED_DATABASE]) { gone(job).into() } else { error }
                },
            )?;
        let found = Found::by_oid(&acting.session, oid).await?.filter(|found| found.stage(job).is_some());
        let found = found.ok_or_else(|| gone(job))?;
        if !found.admits(run) {
            return Err(superseded(job).into());
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

/// Ends what earlier requests for the job still do outside its database: one that makes it, say, whose node has died.
pub(super) async fn end_others(session: &Session, job: JobDatabase) -> anyhow::Result<()> {
    let query = "SELECT pg_catalog.pg_terminate_backend(pid, $3) FROM pg_catalog.pg_stat_activity
                 WHERE application_name = $1 AND datname IS DISTINCT FROM $2 AND pid <> pg_catalog.pg_backend_pid()";
    let name = format!("backhaul job {job}");
    session.rows(query, &[&name, &job.own_name(), &END_WAIT_MS]).await.context("end earlier requests").map(drop)
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
    fn a_literal_is_read_back() {
        assert_eq!((literal("it's"), literal("a\\'")), ("'it''s'".to_owned(), " E'a\\\\'''".to_owned()));
    }
}
