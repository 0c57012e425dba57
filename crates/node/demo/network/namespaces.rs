//! Network namespaces by their names, what runs in them, and their end.
//!
//! All that a closed network consists of is in namespaces named `backhaul-<pid of the demo>-…`, but for one interface on
//! the host, `bh<pid>`, which goes with the namespace that holds its other end. So whoever knows the pid can clean up,
//! and a name whose demo does not live any more says that somebody has to.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::Handle;
use tokio::task::block_in_place;

/// Where `ip netns` keeps its names.
const DIR: &str = "/run/netns";

/// What the names of all demos begin with.
const PREFIX: &str = "backhaul-";

/// Processes in a namespace that have not ended this long after they were asked are killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// One namespace.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    /// As `ip netns` knows it.
    pub(crate) name: String,
}

impl Namespace {
    /// Makes the namespace `label` of the demo `pid`.
    ///
    /// # Errors
    ///
    /// The kernel, or the container around this process, does not allow it.
    pub(super) fn make(pid: u32, label: &str) -> anyhow::Result<Self> {
        let name = format!("{PREFIX}{pid}-{label}");
        run("ip", &["netns", "add", &name], "")?;
        Ok(Self { name })
    }

    /// Runs commands of `ip` in it, one a line.
    ///
    /// # Errors
    ///
    /// One of them fails; those behind it are not run.
    pub(super) fn ip(&self, commands: &str) -> anyhow::Result<()> {
        run("ip", &["-n", &self.name, "-batch", "-"], commands).map(drop)
    }

    /// Does `work` on a thread that is inside: sockets that it opens and programs that it starts belong to the
    /// namespace. Children are waited for by this runtime.
    ///
    /// # Errors
    ///
    /// The namespace is gone, or the work fails.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let file = fs::File::open(Path::new(DIR).join(&self.name))
            .with_context(|| format!("open the network namespace {}", self.name))?;
        let runtime = Handle::current();
        let inside = || {
            setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.name))?;
            let _entered = runtime.enter();
            work()
        };
        // A thread cannot be sent back to where it came from once it lacks the right to; this one ends.
        block_in_place(|| thread::scope(|scope| scope.spawn(inside).join()))
            .map_err(|_| anyhow!("the work in {} panicked", self.name))?
    }
}

/// Runs a program of this network's trade to its end, and gives what it printed.
///
/// # Errors
///
/// It is not installed, or fails; what it said is in the message.
pub(super) fn run(program: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            let package = if program == "nft" { "nftables" } else { "iproute2" };
            anyhow!("the program {program} is missing; install the package {package}")
        }
        _ => anyhow!(error).context(format!("start {program}")),
    })?;
    // A program that ends without reading says itself why.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), said.trim().replace('\n', "; "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The host's end of the demo's network.
pub(super) fn host_interface(pid: u32) -> String {
    format!("bh{pid}")
}

/// Ends everything that runs in the namespaces of the demo `pid`, and removes them.
///
/// # Errors
///
/// One of them cannot be removed.
pub(super) fn end(pid: u32) -> anyhow::Result<()> {
    let names: Vec<String> = all().filter(|(of, _)| *of == pid).map(|(_, name)| name).collect();
    if names.is_empty() {
        return Ok(());
    }
    end_processes(&names);
    // It would go with the namespace of its other end, but later. Where there is none, there was none.
    let _ = run("ip", &["link", "delete", &host_interface(pid)], "");
    for name in &names {
        // Another clean-up may have been faster.
        run("ip", &["netns", "delete", name], "").or_else(|error| match Path::new(DIR).join(name).exists() {
            true => Err(error),
            false => Ok(String::new()),
        })?;
    }
    Ok(())
}

/// Ends the networks of demos that do not live any more, and whose clean-up has died with them.
///
/// # Errors
///
/// A namespace cannot be removed.
pub(super) fn end_of_the_dead() -> anyhow::Result<()> {
    let pids: BTreeSet<u32> = all().map(|(pid, _)| pid).filter(|pid| !is_demo(*pid)).collect();
    pids.into_iter().try_for_each(end)
}

/// Whether the process is a demo: numbers are given again.
fn is_demo(pid: u32) -> bool {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pid != std::process::id() && words.split(|byte| *byte == 0).nth(1) == Some(b"demo")
}

/// The namespaces of all demos, with the demos' pids.
fn all() -> impl Iterator<Item = (u32, String)> {
    let entries = fs::read_dir(DIR).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let name = entry.file_name().to_str()?.to_owned();
        let pid = name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()?;
        Some((pid, name))
    })
}

fn end_processes(names: &[String]) {
    // To a server SIGINT is a fast shutdown, to a node and to the store a request to end.
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let deadline = Instant::now() + PATIENCE;
        let mut told = BTreeSet::new();
        while Instant::now() < deadline {
            let running: BTreeSet<Pid> = names.iter().flat_map(|name| processes_in(name)).collect();
            if running.is_empty() {
                return;
            }
            for pid in running.difference(&told) {
                // It may have ended by itself meanwhile.
                let _ = kill(*pid, signal);
            }
            told = running;
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn processes_in(name: &str) -> Vec<Pid> {
    // A name that leads nowhere has none.
    let pids = run("ip", &["netns", "pids", name], "").unwrap_or_default();
    pids.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}
