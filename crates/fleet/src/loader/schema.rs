//! The schema, and `pg_restore` of its two sections.
//!
//! Each section is one transaction. So it is there or it is not, and the event trigger that was set up with the
//! database notes which, within that transaction: a repeat never guesses. The price is that indexes are built one
//! after the other (each by several processes, as far as the server allows), and that the server must have room for
//! the locks of all objects at once, as `pg_dump` needs for all tables (`max_locks_per_transaction`).

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use cluster::service::{Boxed, Upload};
use pgerror::{PgError, SqlState};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Loader;
use super::acting::{Acting, LONG, end_sessions, has_done, note_done, own_name};
use crate::private::Installation;

/// A longer schema is refused.
pub(super) const SCHEMA_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// What is kept of what `pg_restore` says on standard error.
const SAID_MAX: u64 = 16 * 1024;

/// What of that is told.
const TOLD_MAX: usize = 2048;

/// A program that is not started, or does not say its version, by then is given up.
const VERSION_DEADLINE: Duration = Duration::from_secs(30);

/// The first section's name, for sessions and in the state.
pub(super) const PRE_DATA: &str = "backhaul pre-data";

/// The last section's name.
pub(super) const POST_DATA: &str = "backhaul post-data";

/// A schema as it comes in.
pub(super) struct SchemaUpload {
    loader: Arc<Loader>,
    job: i64,
    oid: u32,
    file: tokio::fs::File,
    bytes: u64,
}

impl SchemaUpload {
    /// Begins to take one, for a database that must exist.
    pub(super) async fn begin(loader: Arc<Loader>, job: i64, oid: u32) -> anyhow::Result<Self> {
        Acting::inside(&loader.server, job, oid, &CancellationToken::new()).await?;
        let file = tokio::task::spawn_blocking(tempfile::tempfile).await?.context("make a file for the schema")?;
        Ok(Self { loader, job, oid, file: tokio::fs::File::from_std(file), bytes: 0 })
    }
}

impl Upload for SchemaUpload {
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            self.bytes += bytes.len() as u64;
            if self.bytes > SCHEMA_BYTES_MAX {
                let message = format!("the schema of restore job {} is longer than 512 MiB", self.job);
                return Err(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).into());
            }
            self.file.write_all(&bytes).await.context("keep the schema")
        })
    }

    fn finish(mut self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            self.file.flush().await.context("keep the schema")?;
            let file = Arc::new(self.file.into_std().await);
            let _turn = self.loader.turn(self.job).await?;
            self.loader.keep_schema(self.job, file.clone());
            let inside = Acting::inside(&self.loader.server, self.job, self.oid, &CancellationToken::new()).await?;
            restore(&self.loader, &inside, self.job, self.oid, PRE_DATA, &file).await
        })
    }
}

/// Restores one section, unless that was done before. The caller has the job's turn.
pub(super) async fn restore(
    loader: &Loader,
    inside: &Acting,
    job: i64,
    oid: u32,
    section: &'static str,
    schema: &File,
) -> anyhow::Result<()> {
    if has_done(&inside.session, section).await? {
        return Ok(());
    }
    // A pg_restore whose node has died may still have a session, which would hold its locks.
    end_sessions(&inside.session, oid, Some(section)).await?;
    if has_done(&inside.session, section).await? {
        return Ok(());
    }
    let version: i32 = inside.session.row("SELECT current_setting('server_version_num')::int", &[]).await?.get(0);
    let program = find(version.unsigned_abs() / 10_000).await?;
    let command = command(loader, inside, job, section, program, schema)?;
    let ended = timeout(LONG, run(command, job)).await.map_err(|_| failed(job, "It took too long."))?;
    // It may also have failed after its COMMIT, or had nothing to make.
    match ended {
        Err(error) if !has_done(&inside.session, section).await? => Err(error),
        _ => note_done(&inside.session, section).await,
    }
}

/// A program of the server's own release is best: a newer one may set what the server does not know.
pub(crate) async fn find(release: u32) -> anyhow::Result<PathBuf> {
    let finding = tokio::task::spawn_blocking(move || Installation::find_release(release));
    let found = timeout(VERSION_DEADLINE, finding).await.context("look for pg_restore")?.context("look for it")?;
    let missing = || PgError::new(SqlState::UNDEFINED_FILE, "pg_restore was not found beside the server");
    let program = found.map_err(|_| missing())?.program("pg_restore");
    if program.is_file() { Ok(program) } else { Err(missing().into()) }
}

fn command(
    loader: &Loader,
    inside: &Acting,
    job: i64,
    section: &str,
    program: PathBuf,
    schema: &File,
) -> anyhow::Result<Command> {
    let mut from_start = schema.try_clone().context("read the schema")?;
    from_start.seek(SeekFrom::Start(0)).context("read the schema")?;
    let mut command = Command::new(program);
    command.args(["--format=custom", "--single-transaction", "--exit-on-error", "--no-password"]);
    command.arg(format!("--section={}", section.trim_start_matches("backhaul ")));
    command.arg(format!("--dbname={}", own_name(job)));
    if let Some(role) = inside.role {
        command.arg(format!("--role={role}"));
    }
    command.current_dir("/").env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8");
    command.envs(loader.server.environment(&own_name(job))).env("PGAPPNAME", section);
    command.stdin(from_start).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}

async fn run(mut command: Command, job: i64) -> anyhow::Result<()> {
    let mut child = command.spawn().context("start pg_restore")?;
    let mut err = child.stderr.take().context("read from pg_restore")?;
    let mut said = Vec::new();
    (&mut err).take(SAID_MAX).read_to_end(&mut said).await.context("read from pg_restore")?;
    // The rest is read too, so that it never waits for a full pipe.
    tokio::io::copy(&mut err, &mut tokio::io::sink()).await.context("read from pg_restore")?;
    let status = child.wait().await.context("wait for pg_restore")?;
    if status.success() {
        return Ok(());
    }
    let told = told(&String::from_utf8_lossy(&said));
    tracing::warn!("pg_restore for job {job} failed ({status}): {told}");
    Err(PgError { code: code_of(&String::from_utf8_lossy(&said)), ..failed(job, &told) }.into())
}

/// What `pg_restore` says when the server, or the way to it, is gone; a job may try that again.
const LOST: [&str; 5] = [
    "server closed the connection",
    "terminating connection",
    "the database system is",
    "could not connect",
    "connection to server",
];

/// What kind of failure it was, as far as the program's own lines tell. The statements that it repeats do not count.
fn code_of(said: &str) -> SqlState {
    let has = |text: &str| said.lines().filter(is_safe).any(|line| line.contains(text));
    if has("No space left on device") {
        SqlState::DISK_FULL
    } else if LOST.iter().any(|text| has(text)) {
        SqlState::CONNECTION_FAILURE
    } else {
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
    }
}

fn failed(job: i64, detail: &str) -> PgError {
    let message = format!("pg_restore for restore job {job} failed");
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).detail(detail)
}

fn is_safe(line: &&str) -> bool {
    ["pg_restore: ", "DETAIL: ", "HINT: "].iter().any(|head| line.starts_with(head))
}

/// What may be told of what it said. The statements that it repeats are left out: one may hold a password, of a user
/// mapping for example.
fn told(said: &str) -> String {
    let lines: Vec<&str> = said.lines().filter(is_safe).collect();
    let text = format!("It said: {}", lines.join(" "));
    let end = text.char_indices().map(|(at, char)| at + char.len_utf8()).take_while(|end| *end <= TOLD_MAX).last();
    text[..end.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_statement_of_the_schema_is_told() {
        let said = "pg_restore: error: could not execute query: ERROR:  server \"far\" does not exist\n\
                    HINT:  Make it.\n\
                    LINE 1: CREATE USER MAPPING FOR me SERVER far OPTIONS (password 'hunter2')\n\
                    Command was: CREATE USER MAPPING FOR me SERVER far OPTIONS (\n    password 'hunter2'\n);\n";
        let expected = "It said: pg_restore: error: could not execute query: \
                        ERROR:  server \"far\" does not exist HINT:  Make it.";
        assert_eq!(told(said), expected);
        let long = format!("pg_restore: {}", "é".repeat(TOLD_MAX));
        assert!((TOLD_MAX - 1..=TOLD_MAX).contains(&told(&long).len()));
    }

    #[test]
    fn a_full_disk_and_a_lost_server_are_told_apart() {
        let query = "pg_restore: error: could not execute query: ";
        for (said, code) in [
            ("ERROR:  could not extend file \"base/5/1\": No space left on device", SqlState::DISK_FULL),
            ("server closed the connection unexpectedly", SqlState::CONNECTION_FAILURE),
            ("FATAL:  terminating connection due to administrator command", SqlState::CONNECTION_FAILURE),
            ("FATAL:  the database system is shutting down", SqlState::CONNECTION_FAILURE),
            ("ERROR:  type \"x\" does not exist", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE),
            ("ERROR:  x\nCommand was: SELECT 'could not connect'", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE),
        ] {
            assert_eq!(code_of(&format!("{query}{said}\n")), code, "{said}");
        }
        let refused = "pg_restore: error: connection to server on socket \"/x\" failed: No such file or directory\n";
        assert_eq!(code_of(refused), SqlState::CONNECTION_FAILURE);
    }
}
