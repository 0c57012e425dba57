//! A demo's directory, and the end of everything that runs in it.
//!
//! ```text
//! DIR/DEMO            says that a demo made this, and whether it is temporary; locked while one runs here
//! DIR/REAPER          locked by the process that cleans up after the demo
//! DIR/READY           the fleet was whole at least once; its text is the layout
//! DIR/n<i>/           node i's store (its LOCK holds the process id), with extern/ and node.log
//! DIR/n<i>/pg/        its server (postmaster.pid holds the process id), with server.log beside it
//! ```
//!
//! Processes are found by their command lines: a node or a program of PostgreSQL that was told to work in this very
//! directory. No list of them has to be kept, so the reaper, a regular end and the start after a crash all clean up by
//! the same few lines, and a process that was started a moment ago is found, too.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fleet::private::RunAs;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a temporary directory's name begins with.
const PREFIX: &str = "backhaul-demo-";

/// What the file DEMO of a temporary directory says.
const TEMPORARY: &str = "temporary\n";

/// Processes that have not ended this long after they were asked are ended harder.
const PATIENCE: Duration = Duration::from_secs(10);

/// The directory of a demo, locked.
pub(super) struct Ground {
    /// Where it is, as an absolute path.
    pub(super) dir: PathBuf,
    /// Whether it goes when the demo ends.
    pub(super) temporary: bool,
    _lock: Flock<fs::File>,
}

impl Ground {
    /// Takes `given`, or a new temporary directory, ending and cleaning what an earlier demo left there.
    ///
    /// # Errors
    ///
    /// Another demo runs there, the directory holds something else, or `run_as` could not enter it.
    pub(super) fn take(given: Option<&Path>, run_as: Option<&RunAs>) -> anyhow::Result<Self> {
        let Some(given) = given else {
            clean_temporary();
            let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().context("create a temporary directory")?.keep();
            // Servers of another user have to get inside.
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
            fs::write(dir.join("DEMO"), TEMPORARY)?;
            return Self::lock(dir, true, run_as);
        };
        fs::create_dir_all(given).with_context(|| format!("create {}", given.display()))?;
        let dir = given.canonicalize()?;
        let ours = dir.join("DEMO").exists();
        if !ours && fs::read_dir(&dir)?.next().is_some() {
            bail!("{} is not empty and was not made by a demo; choose another directory", dir.display());
        }
        let ground = Self::lock(dir, false, run_as)?;
        end_processes(&ground.dir);
        if !ground.dir.join("READY").exists() {
            // A start that never finished is begun again.
            clear(&ground.dir)?;
        }
        Ok(ground)
    }

    fn lock(dir: PathBuf, temporary: bool, run_as: Option<&RunAs>) -> anyhow::Result<Self> {
        if let Some(run_as) = run_as {
            check_enterable(&dir, run_as)?;
        }
        let file = fs::OpenOptions::new().create(true).append(true).open(dir.join("DEMO"))?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            bail!("another demo runs in {}", dir.display());
        };
        Ok(Self { dir, temporary, _lock: lock })
    }

    /// The layout of the fleet that was once whole here.
    pub(super) fn ready_layout(&self) -> Option<String> {
        fs::read_to_string(self.dir.join("READY")).ok()
    }

    /// From now on a start in this directory takes up what is there.
    pub(super) fn set_ready(&self, layout: &str) -> anyhow::Result<()> {
        fs::write(self.dir.join("READY"), layout).context("write READY")
    }
}

/// Servers run as another user under root, who has to get to their data.
fn check_enterable(dir: &Path, run_as: &RunAs) -> anyhow::Result<()> {
    for ancestor in dir.ancestors() {
        let mode = fs::metadata(ancestor)?.permissions().mode();
        if mode & 0o001 == 0 {
            bail!(
                "PostgreSQL runs as user {} here, who may not enter {}; choose a directory that everybody may enter",
                run_as.name,
                ancestor.display()
            );
        }
    }
    Ok(())
}

/// Ends and removes temporary fleets whose demo and reaper are both gone.
fn clean_temporary() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let dir = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // Somebody may have given such a name to a directory that is to be kept.
        if !fs::read_to_string(dir.join("DEMO")).is_ok_and(|text| text == TEMPORARY) {
            continue;
        }
        let Ok(file) = fs::OpenOptions::new().append(true).open(dir.join("DEMO")) else { continue };
        if let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            end_processes(&dir);
            // What cannot be removed is somebody else's.
            let _ = fs::remove_dir_all(&dir);
        }
    }
}

/// Removes what a demo made in its directory, but not the directory nor its lock.
fn clear(dir: &Path) -> anyhow::Result<()> {
    for path in node_dirs(dir) {
        fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

fn node_dirs(dir: &Path) -> Vec<PathBuf> {
    let numbered = |name: &str| name.strip_prefix('n').is_some_and(|number| number.parse::<usize>().is_ok());
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| numbered(&entry.file_name().to_string_lossy())).map(|entry| entry.path()).collect()
}

/// Ends the nodes, then the servers, of the demo in `dir`, and waits until they are gone.
pub(super) fn end_processes(dir: &Path) {
    end(dir, is_node, [Signal::SIGTERM, Signal::SIGKILL]);
    // What was making a server stops at once; a server shuts down.
    end(dir, is_maker, [Signal::SIGTERM, Signal::SIGKILL]);
    end(dir, is_server, [Signal::SIGINT, Signal::SIGQUIT]);
}

fn is_node(program: &str, arguments: &[&str]) -> bool {
    program == "backhaul" && arguments.first() == Some(&"start")
}

fn is_maker(program: &str, _: &[&str]) -> bool {
    matches!(program, "initdb" | "pg_basebackup")
}

fn is_server(program: &str, _: &[&str]) -> bool {
    program == "postgres"
}

/// The running processes of this kind that were told to work in `dir`.
fn find(dir: &Path, kind: fn(&str, &[&str]) -> bool) -> Vec<Pid> {
    let inside = format!("{}/n", dir.display());
    let is_ours = |pid: &Pid| {
        // A process that nobody has waited for has no command line any more.
        let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let mut words = text.split('\0');
        let program = words.next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        let arguments: Vec<&str> = words.collect();
        kind(program, &arguments) && arguments.iter().any(|argument| argument.starts_with(&inside))
    };
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw);
    pids.filter(|pid| *pid != Pid::this()).filter(is_ours).collect()
}

fn end(dir: &Path, kind: fn(&str, &[&str]) -> bool, signals: [Signal; 2]) {
    for signal in signals {
        let deadline = Instant::now() + PATIENCE;
        let mut told = Vec::new();
        while Instant::now() < deadline {
            let running = find(dir, kind);
            if running.is_empty() {
                return;
            }
            for pid in running.iter().filter(|pid| !told.contains(*pid)) {
                // It may have ended by itself meanwhile.
                let _ = kill(*pid, signal);
            }
            told = running;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The reaper's work: once `wait` returns, everything of the demo in `dir` ends, `after` removes what else the demo made,
/// and the directory goes if it was temporary.
///
/// There is one reaper at a time. A demo that starts where another was killed a moment ago waits in `ready` until that
/// one's reaper is done, which could not tell the new processes from the old.
pub(super) fn reap(
    dir: &Path,
    remove: bool,
    ready: impl FnOnce(),
    wait: impl FnOnce() -> anyhow::Result<()>,
    after: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let file = fs::OpenOptions::new().create(true).append(true).open(dir.join("REAPER"))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("lock REAPER")?;
    ready();
    wait()?;
    end_processes(dir);
    // The directory goes even where something else cannot be removed.
    let removed = after();
    if remove {
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    removed
}
