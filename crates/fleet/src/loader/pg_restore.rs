//! `pg_restore`: its one run is one transaction, and what it says is understood.
//!
//! So what it makes is there or it is not, and the event trigger that was set up with the database notes which, within
//! that transaction, by the name under which it runs: a repeat never guesses.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::acting::{Acting, LONG, end_sessions, has_done, note_done};
use super::{JobDatabase, Loader};
use crate::killed;
use crate::private::Installation;

/// What is kept of what `pg_restore` says on standard error.
const SAID_MAX: u64 = 16 * 1024;

/// What of that is told.
const TOLD_MAX: usize = 2048;

/// A program that is not started, or does not say its version, by then is given up.
const VERSION_DEADLINE: Duration = Duration::from_secs(30);

/// A dump whose list is not read by then is given up.
const LIST_DEADLINE: Duration = Duration::from_secs(300);

/// A longer list is refused: that of some million entries.
const LIST_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// What of a schema is made in one transaction.
pub(super) enum What<'w> {
    /// A section.
    Section(&'w str),
    /// Entries of the dump's list, in this order.
    Entries(&'w [u32]),
}

/// `pg_restore` of one schema into one database.
pub(super) struct Restorer<'l> {
    loader: &'l Loader,
    inside: &'l Acting,
    job: JobDatabase,
    oid: u32,
    program: PathBuf,
    schema: &'l File,
}

impl<'l> Restorer<'l> {
    /// One for the schema of `job`, whose database has this OID. The caller has the job's turn.
    pub(super) async fn new(
        loader: &'l Loader,
        inside: &'l Acting,
        job: JobDatabase,
        oid: u32,
        schema: &'l File,
    ) -> anyhow::Result<Self> {
        let version: i32 = inside.session.row("SELECT current_setting('server_version_num')::int", &[]).await?.get(0);
        let program = find(version.unsigned_abs() / 10_000).await?;
        Ok(Self { loader, inside, job, oid, program, schema })
    }

    /// Makes some of it, unless that was done before under this name.
    pub(super) async fn make(&self, name: &str, what: &What<'_>) -> anyhow::Result<()> {
        let session = &self.inside.session;
        if has_done(session, name).await? {
            return Ok(());
        }
        // A pg_restore whose node has died may still have a session, which would hold its locks.
        end_sessions(session, self.oid, Some(name)).await?;
        if has_done(session, name).await? {
            return Ok(());
        }
        let (mut command, mut entries) = (self.command()?, None);
        command.args(["--single-transaction", "--exit-on-error", "--no-password"]);
        command.arg(format!("--dbname={}", self.job.own_name()));
        match what {
            What::Section(section) => command.arg(format!("--section={section}")),
            What::Entries(ids) => command.arg("--use-list").arg(entries.insert(listed(ids)?).path()),
        };
        if let Some(role) = self.inside.role {
            command.arg(format!("--role={role}"));
        }
        command.envs(self.loader.server.environment(&self.job.own_name())).env("PGAPPNAME", name);
        command.stdout(Stdio::null());
        let ended = timeout(LONG, run(command, self.job)).await.map_err(|_| failed(self.job, "It took too long."))?;
        drop(entries);
        // It may also have failed after its COMMIT, or had nothing to make.
        match ended {
            Err(error) if !has_done(session, name).await? => Err(error),
            _ => note_done(session, name).await,
        }
    }

    /// What is in the dump, with what it depends on; or what is in one section of it, without, because a list with
    /// dependencies shows all sections.
    pub(super) async fn list(&self, section: Option<&str>) -> anyhow::Result<String> {
        let mut command = self.command()?;
        command.arg("--list");
        command.arg(section.map_or_else(|| "--verbose".to_owned(), |section| format!("--section={section}")));
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("start pg_restore")?;
        let out = child.stdout.take().context("read from pg_restore")?;
        let mut list = Vec::new();
        let reading = async {
            out.take(LIST_BYTES_MAX + 1).read_to_end(&mut list).await.context("read from pg_restore")?;
            // Of one that is longer the rest is not waited for.
            let is_whole = list.len() as u64 <= LIST_BYTES_MAX;
            anyhow::Ok(if is_whole { Some(child.wait().await.context("wait for pg_restore")?) } else { None })
        };
        let ended = timeout(LIST_DEADLINE, reading).await.map_err(|_| failed(self.job, "It took too long."))??;
        let unread = || failed(self.job, "The list of what is in the schema cannot be read.");
        let status = ended.ok_or_else(unread)?;
        if !status.success() {
            return Err(killed::told(unread(), status).into());
        }
        Ok(String::from_utf8_lossy(&list).into_owned())
    }

    fn command(&self) -> anyhow::Result<Command> {
        // Opened anew, because sessions side by side each need a position of their own in it.
        let own = File::open(Path::new("/proc/self/fd").join(self.schema.as_raw_fd().to_string()));
        let mut command = Command::new(&self.program);
        command.arg("--format=custom").current_dir("/").env_clear();
        command.env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8");
        command.stdin(own.context("read the schema")?).stderr(Stdio::piped()).kill_on_drop(true);
        Ok(command)
    }
}

/// A file that holds nothing but numbers; it is gone when this is dropped.
fn listed(ids: &[u32]) -> anyhow::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::NamedTempFile::new().context("make a file for a list")?;
    let text: String = ids.iter().map(|id| format!("{id};\n")).collect();
    file.write_all(text.as_bytes()).context("write a list")?;
    Ok(file)
}

/// A program of the server's own release is best: a newer one may set what the server does not know.
pub(crate) async fn find(release: u32) -> anyhow::Result<PathBuf> {
    let finding = tokio::task::spawn_blocking(move || Installation::find_release(release));
    let found = timeout(VERSION_DEADLINE, finding).await.context("look for pg_restore")?.context("look for it")?;
    let missing = || PgError::new(SqlState::UNDEFINED_FILE, "pg_restore was not found beside the server");
    let program = found.map_err(|_| missing())?.program("pg_restore");
    if program.is_file() { Ok(program) } else { Err(missing().into()) }
}

async fn run(mut command: Command, job: JobDatabase) -> anyhow::Result<()> {
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
    let failed = PgError { code: code_of(&String::from_utf8_lossy(&said)), ..failed(job, &told) };
    Err(killed::told(failed, status).into())
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
    } else if has("ERROR:  deadlock detected") {
        SqlState::DEADLOCK_DETECTED
    } else if LOST.iter().any(|text| has(text)) {
        SqlState::CONNECTION_FAILURE
    } else {
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
    }
}

fn failed(job: JobDatabase, detail: &str) -> PgError {
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

    #[tokio::test]
    async fn one_that_a_signal_ends_may_be_run_again() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo pg_restore: hello >&2; kill -9 $$"]).stderr(Stdio::piped());
        let error = run(command, 7.into()).await.unwrap_err();
        let said = PgError::of(&error).unwrap();
        assert_eq!((said.code, said.detail.as_deref()), (SqlState::CRASH_SHUTDOWN, Some("It was ended by signal 9.")));
    }

    #[test]
    fn a_full_disk_and_a_lost_server_are_told_apart() {
        let query = "pg_restore: error: could not execute query: ";
        for (said, code) in [
            ("ERROR:  could not extend file \"base/5/1\": No space left on device", SqlState::DISK_FULL),
            ("ERROR:  deadlock detected", SqlState::DEADLOCK_DETECTED),
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
