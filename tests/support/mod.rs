//! What whole-system tests stand on: fleets of real servers and nodes that live as long as a value does.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

pub mod aftermath;
pub mod demo;
pub mod disk;
pub mod faults;
pub mod fleet;
pub mod golden;
pub mod jobs;
pub mod store;
pub mod wire;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

/// Whatever a test waits for has come by then, or never will.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// The program under test.
pub fn backhaul() -> Command {
    Command::new(env!("CARGO_BIN_EXE_backhaul"))
}

/// Asks until the answer is there.
///
/// # Panics
///
/// It is not there in time; the message is what was waited for, and the last thing that was seen instead.
#[track_caller]
pub fn until<T>(what: &str, ask: impl FnMut() -> Result<T, String>) -> T {
    until_in(DEADLINE, what, ask)
}

/// The same for what takes longer by its nature.
///
/// # Panics
///
/// As [`until`].
#[track_caller]
pub fn until_in<T>(time: Duration, what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + time;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(seen) if Instant::now() > deadline => panic!("waited in vain for {what}: {seen}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The first of so many ports in a row that nobody has, for whoever has to be told its port. They are below those that the
/// system gives out by itself, so that nobody gets one by chance before it is used, or while its owner is away.
///
/// # Panics
///
/// There are none.
#[track_caller]
pub fn free_ports(count: u16) -> u16 {
    const FIRST: u16 = 10_000;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let end = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768);
    assert!(end > FIRST + 2 * count, "no ports are left below {end}");
    // Tests that run side by side are processes of their own, and begin at different places.
    let mut at = std::process::id() as u16;
    until("free ports", || {
        at = at.wrapping_add(1) % ((end - FIRST) / count);
        let first = FIRST + at * count;
        let taken: Vec<_> = (first..first + count).map(|port| TcpListener::bind(("127.0.0.1", port))).collect();
        if taken.iter().all(Result::is_ok) { Ok(first) } else { Err(format!("{taken:?}")) }
    })
}

/// Runs a program to its end and gives what it printed.
///
/// # Panics
///
/// It fails.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the program can be started");
    assert!(output.status.success(), "{command:?} failed:\n{}", both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Standard output and error, for messages and comparisons.
pub fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The processes whose command line names `dir`, and that still run.
pub fn processes_in(dir: &Path) -> Vec<String> {
    let dir = dir.to_string_lossy();
    let command_lines = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        // A process that has ended and was not waited for has no command line any more.
        let text = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&text).replace('\0', " "))
    });
    command_lines.filter(|line| line.contains(&*dir)).collect()
}

/// Whether a process runs.
pub fn runs(pid: Pid) -> bool {
    // One that has ended is a zombie until its parent has heard of it. The state stands behind the name.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

/// The processes that a process has started, and those that they have.
pub fn descendants(pid: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    // Each thread has the children that it has started.
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in children.split_ascii_whitespace().filter_map(|child| child.parse().ok()).map(Pid::from_raw) {
            found.push(child);
            found.extend(descendants(child));
        }
    }
    found
}

/// One of PostgreSQL's programs.
pub fn postgres_program(name: &str) -> Command {
    let installation = ::fleet::private::Installation::find().expect("PostgreSQL is installed");
    let path = installation.program(name);
    Command::new(if path.exists() { path.into_os_string() } else { name.into() })
}
