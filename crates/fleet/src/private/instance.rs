//! One private server.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::process::Child;
use tokio::time::sleep;

use super::{Installation, RunAs};
use crate::Server;
use crate::login::{FirstAnswer, knock};

/// A server that has not begun to take connections by then is given up; a standby waits for its first WAL meanwhile.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// The number in a socket file's name, where the server listens on nothing else.
const SOCKET_PORT: u16 = 5432;

/// The longest path that fits into a socket address, less the name of PostgreSQL's socket file.
const SOCKET_DIR_MAX: usize = 107 - "/.s.PGSQL.65535".len();

/// What tells one private server from another: names and values for `postgresql.conf`.
pub type Settings = Vec<(String, String)>;

/// A private server: a directory with its data, and while it runs its process. Everybody on its socket is trusted
/// until [`Instance::set_hba`] says otherwise.
///
/// Dropping it leaves the process alone; see [`Instance::child`].
pub struct Instance {
    installation: Installation,
    run_as: Option<RunAs>,
    data: PathBuf,
    socket_dir: PathBuf,
    /// With a port the server listens on 127.0.0.1, too.
    port: Option<u16>,
    /// What databases on it have unless they say otherwise.
    encoding: &'static str,
    locale: &'static str,
    child: Option<Child>,
}

impl Instance {
    /// A server whose data is in `dir/pg` and whose socket is in `dir/socket`. Nothing is made yet.
    ///
    /// # Errors
    ///
    /// The directory's path is too long to hold a socket.
    pub fn new(installation: Installation, run_as: Option<RunAs>, dir: &Path) -> anyhow::Result<Self> {
        let socket_dir = dir.join("socket");
        if socket_dir.as_os_str().len() > SOCKET_DIR_MAX {
            bail!("the directory {} has too long a path to hold a socket; choose a shorter one", dir.display());
        }
        let (encoding, locale) = ("UTF8", "C.UTF-8");
        Ok(Self { installation, run_as, data: dir.join("pg"), socket_dir, port: None, encoding, locale, child: None })
    }

    /// Lets the server that is about to be made listen on 127.0.0.1 as well; it trusts whoever comes from there.
    #[must_use]
    pub fn listening(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Lets the cluster that is about to be made have another encoding and locale than UTF-8.
    #[must_use]
    pub fn speaking(mut self, encoding: &'static str, locale: &'static str) -> Self {
        (self.encoding, self.locale) = (encoding, locale);
        self
    }

    /// Makes an empty cluster whose superuser is `superuser`.
    ///
    /// # Errors
    ///
    /// `initdb` fails; its last words are in the message.
    pub fn init(&self, superuser: &str, settings: &Settings) -> anyhow::Result<()> {
        self.make_dirs()?;
        let mut initdb = self.program("initdb");
        initdb.args(["--no-sync", "--auth=trust", "--username", superuser]);
        initdb.args(["--encoding", self.encoding, "--locale", self.locale]);
        run(initdb.arg("--pgdata").arg(&self.data))?;
        self.configure(settings)
    }

    /// Makes a standby of the server that `source`, a connection string, leads to. It will stream from there under
    /// `name`, holding a slot of that name.
    ///
    /// # Errors
    ///
    /// `pg_basebackup` fails; its last words are in the message.
    pub fn clone_from(&self, source: &str, name: &str, settings: &Settings) -> anyhow::Result<()> {
        self.make_dirs()?;
        let mut basebackup = self.program("pg_basebackup");
        let source = format!("{source} application_name={name}");
        basebackup.args(["--no-sync", "--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf"]);
        basebackup.args(["--create-slot", "--slot", name, "--dbname", &source, "--pgdata"]).arg(&self.data);
        run(&mut basebackup)?;
        self.configure(settings)
    }

    fn make_dirs(&self) -> anyhow::Result<()> {
        for dir in [&self.data, &self.socket_dir] {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
            if let Some(user) = &self.run_as {
                chown(dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                    .with_context(|| format!("give {} to {}", dir.display(), user.name))?;
            }
        }
        Ok(())
    }

    /// Replaces `pg_hba.conf`; a running server takes it up at its next reload.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn set_hba(&self, text: &str) -> anyhow::Result<()> {
        // Written over in place: the file stays with the user who made it.
        fs::write(self.data.join("pg_hba.conf"), text).context("write pg_hba.conf")
    }

    /// Writes the settings behind those of `initdb`; a standby's replace those it copied.
    fn configure(&self, settings: &Settings) -> anyhow::Result<()> {
        let mut conf = String::new();
        let socket_dir = self.socket_dir.display().to_string();
        let (address, port) = match self.port {
            Some(port) => ("127.0.0.1", port.to_string()),
            None => ("", SOCKET_PORT.to_string()),
        };
        let fixed = [
            ("listen_addresses", address),
            ("unix_socket_directories", &socket_dir),
            ("port", &port),
            ("fsync", "off"),
            ("shared_buffers", "32MB"),
            ("max_wal_size", "256MB"),
            ("wal_keep_size", "64MB"),
            ("wal_retrieve_retry_interval", "500ms"),
            ("max_connections", "60"),
            ("logging_collector", "off"),
            ("log_line_prefix", "%m [%p] %q%a %u@%d "),
        ];
        let given = settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in fixed.into_iter().chain(given) {
            writeln!(conf, "{name} = '{}'", value.replace('\'', "''"))?;
        }
        // Written over in place, as above.
        fs::write(self.data.join("postgresql.conf"), conf).context("write postgresql.conf")?;
        self.set_hba("local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 trust\n")
    }

    /// Starts the server and waits until it takes connections. Its log is `log`.
    ///
    /// # Errors
    ///
    /// It ends instead, or is not ready in time; the last lines of its log are in the message.
    pub async fn start(&mut self, superuser: &str, log: &Path) -> anyhow::Result<()> {
        let output = fs::OpenOptions::new().create(true).append(true).open(log).context("open the server's log")?;
        let mut postgres = self.program("postgres");
        // A group of its own: Ctrl-C on the terminal is for the program that started the server, which then ends it.
        postgres.arg("-D").arg(&self.data).process_group(0);
        postgres.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut child = tokio::process::Command::from(postgres).spawn().context("start postgres")?;
        let server = self.server(superuser)?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("the server in {} ended at its start ({status}):\n{}", self.data.display(), last_lines(log));
            }
            let parameters = [("user", superuser), ("database", "postgres")];
            if matches!(knock(&server, &parameters).await, Ok(FirstAnswer::LetIn | FirstAnswer::Guarded)) {
                break;
            }
            if Instant::now() > deadline {
                child.start_kill()?;
                child.wait().await?;
                bail!("the server in {} did not get ready:\n{}", self.data.display(), last_lines(log));
            }
            sleep(Duration::from_millis(20)).await;
        }
        self.child = Some(child);
        Ok(())
    }

    /// The running process, to wait for; the caller ends it.
    pub fn child(&mut self) -> Option<&mut Child> {
        self.child.as_mut()
    }

    /// Waits until the process ends; it has to be waited for, or its place stays taken for a restart.
    ///
    /// # Errors
    ///
    /// It was never started.
    pub async fn ended(mut self) -> anyhow::Result<std::process::ExitStatus> {
        Ok(self.child.as_mut().context("wait for a server that was not started")?.wait().await?)
    }

    /// Where the data is.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The connection string for `user`.
    pub fn conninfo(&self, user: &str) -> String {
        // Quoted as libpq has it: the directory may have any name.
        let host = self.socket_dir.display().to_string().replace('\\', "\\\\").replace('\'', "\\'");
        format!("host='{host}' port={} user={user}", self.port.unwrap_or(SOCKET_PORT))
    }

    /// The server, logged into as `user`.
    ///
    /// # Errors
    ///
    /// The connection string cannot be read.
    pub fn server(&self, user: &str) -> anyhow::Result<Server> {
        Server::from_conninfo(&self.conninfo(user))
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.installation.program(name));
        if let Some(user) = &self.run_as {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        // Neither the caller's working directory (which the other user may not enter) nor its PG* variables apply.
        command.current_dir("/").env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8");
        command
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}):\n{}", output.status, said.trim_end());
    }
    Ok(())
}

/// The last lines of a log, for a message.
fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}
