//! The schema of a database, by `pg_dump`.
//!
//! It goes into a file without a name, bounded in size, that lasts as long as the lease or a download of it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use cluster::service::ByteStream;
use pgerror::{PgError, SqlState};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use super::types::Mode;
use crate::private::Installation;
use crate::{Server, killed};

/// A longer schema is refused: it is not a schema, and whoever moves it to a store holds it whole.
pub const SCHEMA_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// A `pg_dump` that waits longer for a lock fails, and the point is taken anew.
const LOCK_WAIT_MS: u32 = 5000;

/// A `pg_dump` that takes longer is ended. In a pause, that has an earlier deadline.
const DUMP_DEADLINE: Duration = Duration::from_secs(180);

/// What is kept of what `pg_dump` says on standard error.
const SAID_MAX: u64 = 16 * 1024;

/// What of that is told.
const TOLD_MAX: usize = 600;

/// A download is read in pieces of this size.
const PIECE: usize = 128 * 1024;

/// `pg_dump` as it is installed here.
pub(super) struct Program {
    path: PathBuf,
    /// As it says it: `15.18`.
    pub(super) version: String,
}

/// A dump by an older program leaves out what it does not know, so it refuses; better before than in the middle.
fn check_version(version: &str, server_version: i32) -> Result<(), PgError> {
    let major: i32 = version.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    let server_major = server_version / 10_000;
    if major >= server_major {
        return Ok(());
    }
    let message = format!("pg_dump {version} is older than the server ({server_major})");
    Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
        .hint(format!("Install the client programs of PostgreSQL {server_major} on the node's host.")))
}

/// The version of the `pg_dump` that would write this server's schemas.
///
/// # Errors
///
/// There is none, or it is older than the server.
pub(crate) async fn pg_dump_version(server_version: i32) -> anyhow::Result<String> {
    Ok(Program::find(server_version).await?.version)
}

impl Program {
    /// Finds the newest one, which must not be older than the server.
    pub(super) async fn find(server_version: i32) -> anyhow::Result<Self> {
        let found = tokio::task::spawn_blocking(Installation::find).await.context("look for pg_dump")?;
        let found = found.map_err(|error| {
            PgError::new(SqlState::UNDEFINED_FILE, "pg_dump was not found beside the server")
                .detail(format!("{}.", capitalized(&error.to_string())))
        })?;
        let path = found.program("pg_dump");
        let asked = Command::new(&path).arg("--version").kill_on_drop(true).output();
        let output = timeout(Duration::from_secs(10), asked).await.context("ask pg_dump for its version")??;
        if !output.status.success() {
            let failed = PgError::new(SqlState::UNDEFINED_FILE, "pg_dump does not say its version");
            return Err(killed::told(failed, output.status).into());
        }
        // "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_ascii_whitespace().nth(2).context("read the version of pg_dump")?.to_owned();
        check_version(&version, server_version)?;
        Ok(Self { path, version })
    }

    /// Writes the schema of `database`. A `snapshot` is only ever given on a primary.
    pub(super) async fn run(
        &self,
        server: &Server,
        database: &str,
        mode: Mode,
        snapshot: Option<&str>,
    ) -> anyhow::Result<Schema> {
        let mut command = Command::new(&self.path);
        command.args(["--format=custom", "--schema-only", "--no-password"]);
        command.arg(format!("--lock-wait-timeout={LOCK_WAIT_MS}"));
        if let Some(snapshot) = snapshot.filter(|_| mode == Mode::Exported) {
            command.arg(format!("--snapshot={snapshot}"));
        }
        command.current_dir("/").env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8");
        command.envs(server.environment(database)).env("PGAPPNAME", "backhaul schema");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        timeout(DUMP_DEADLINE, dump(command, database)).await.map_err(|_| failed(database, "It took too long."))?
    }
}

async fn dump(mut command: Command, database: &str) -> anyhow::Result<Schema> {
    let file = tokio::task::spawn_blocking(tempfile::tempfile).await?.context("make a file for the schema")?;
    let mut child = command.spawn().context("start pg_dump")?;
    let out = child.stdout.take().context("read from pg_dump")?;
    let err = child.stderr.take().context("read from pg_dump")?;
    let keeping = tokio::fs::File::from_std(file.try_clone().context("write the schema")?);
    let (bytes, said) = tokio::join!(keep(out, keeping), listen(err));
    let bytes = bytes?;
    if bytes > SCHEMA_BYTES_MAX {
        let most = SCHEMA_BYTES_MAX / (1024 * 1024);
        return Err(failed(database, &format!("The schema is longer than {most} MiB.")).into());
    }
    let status = child.wait().await.context("wait for pg_dump")?;
    if !status.success() {
        tracing::warn!("pg_dump of database {database:?} failed ({status}): {said}");
        return Err(killed::told(failed(database, &told(&said)), status).into());
    }
    Ok(Schema { file: Arc::new(file), bytes, warnings: warnings(&said) })
}

/// Writes what comes into the file, until there is more than is allowed.
async fn keep(out: impl AsyncRead + Unpin, mut file: tokio::fs::File) -> anyhow::Result<u64> {
    let bytes = tokio::io::copy(&mut out.take(SCHEMA_BYTES_MAX + 1), &mut file).await.context("keep the schema")?;
    file.flush().await.context("keep the schema")?;
    Ok(bytes)
}

/// Reads everything, so that nobody waits for a full pipe, and keeps the beginning.
async fn listen(mut err: impl AsyncRead + Unpin) -> String {
    let mut kept = Vec::new();
    let read = (&mut err).take(SAID_MAX).read_to_end(&mut kept).await;
    if read.is_ok() {
        drop(tokio::io::copy(&mut err, &mut tokio::io::sink()).await);
    }
    String::from_utf8_lossy(&kept).trim_end().to_owned()
}

/// What is told of a dump that did not fail, line by line.
fn warnings(said: &str) -> Vec<String> {
    let bare = |line: &str| {
        let line = line.trim().trim_start_matches("pg_dump: ").trim_start_matches("warning: ");
        line.chars().take(TOLD_MAX).collect::<String>()
    };
    said.lines().map(bare).filter(|line| !line.is_empty()).collect()
}

fn failed(database: &str, detail: &str) -> PgError {
    let message = format!("pg_dump of database \"{database}\" failed");
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).detail(detail)
}

fn told(said: &str) -> String {
    let end = said.char_indices().nth(TOLD_MAX).map_or(said.len(), |(end, _)| end);
    format!("It said: {}", &said[..end])
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// A schema that was written.
#[derive(Clone)]
pub(super) struct Schema {
    file: Arc<File>,
    /// How long it is.
    pub(super) bytes: u64,
    /// What `pg_dump` warned of.
    pub(super) warnings: Vec<String>,
}

impl Schema {
    /// Its bytes, from the beginning.
    pub(super) fn stream(&self) -> ByteStream {
        let schema = self.clone();
        Box::pin(futures_util::stream::try_unfold((schema, 0), |(schema, at)| async move {
            let file = schema.file.clone();
            let length = usize::try_from(schema.bytes - at).unwrap_or(usize::MAX).min(PIECE);
            if length == 0 {
                return Ok(None);
            }
            let read = move || {
                let mut piece = vec![0; length];
                file.read_exact_at(&mut piece, at).map(|()| Bytes::from(piece))
            };
            let piece = tokio::task::spawn_blocking(read).await.map_err(|_| anyhow!("reading was given up"))?;
            let piece = piece.context("read the schema")?;
            let at = at + piece.len() as u64;
            Ok(Some((piece, (schema, at))))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_kept_line_by_line() {
        let said =
            "pg_dump: warning: subscriptions not dumped because current user is not a superuser\n\npg_dump: hint: x";
        let expected = ["subscriptions not dumped because current user is not a superuser", "hint: x"];
        assert_eq!(warnings(said), expected);
    }

    #[tokio::test]
    async fn one_that_a_signal_ends_may_be_run_again() {
        let mut command = Command::new("sh");
        command.args(["-c", "kill -9 $$"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let Err(error) = dump(command, "shop").await else { panic!("it was ended") };
        let said = PgError::of(&error).unwrap();
        assert_eq!((said.code, said.detail.as_deref()), (SqlState::CRASH_SHUTDOWN, Some("It was ended by signal 9.")));
        assert_eq!(said.message, "pg_dump of database \"shop\" failed");
    }

    #[test]
    fn an_older_pg_dump_is_refused() {
        for (version, server, refused) in
            [("15.18", 150_018, false), ("17.1", 150_000, false), ("14.9", 150_000, true), ("18beta1", 190_000, true)]
        {
            assert_eq!(check_version(version, server).is_err(), refused, "{version} for {server}");
        }
        let told = check_version("14.9", 150_000).unwrap_err();
        assert_eq!(told.message, "pg_dump 14.9 is older than the server (15)");
    }
}
