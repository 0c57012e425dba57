//! A fleet as a user starts it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{backhaul, both, postgres_program, processes_in};

/// A running `backhaul demo`; ended when dropped.
pub struct Demo {
    child: Child,
    rest: Option<JoinHandle<Vec<String>>>,
    arguments: Vec<String>,
    /// Its data directory.
    pub dir: tempfile::TempDir,
    /// Its nodes, in order.
    pub nodes: Vec<Node>,
    /// What it printed up to `ready`, that line included.
    pub said: Vec<String>,
}

/// A node of a demo, as the demo printed it.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its process.
    pub pid: i32,
    /// `host:port`.
    pub address: String,
    /// As the demo's line has it.
    pub role: String,
    /// For psql.
    pub url: String,
}

/// A directory that servers of another user may enter.
pub fn directory() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("backhaul-test-").tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

impl Demo {
    /// Starts a demo with these flags, on any ports, and waits until it is ready.
    #[track_caller]
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(directory(), arguments)
    }

    /// The same in a given directory.
    #[track_caller]
    pub fn start_in(dir: tempfile::TempDir, arguments: &[&str]) -> Self {
        let mut command = command(&dir, arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut said = Vec::new();
        while !said.last().is_some_and(|line: &String| line.starts_with("ready")) {
            match lines.next() {
                Some(line) => said.push(line.unwrap()),
                None => {
                    let mut errors = String::new();
                    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
                    panic!("the demo did not get ready: {said:?}\n{errors}");
                }
            }
        }
        let nodes = said.iter().filter_map(|line| node(line)).collect();
        // The demo goes on printing, and must not block on a full pipe.
        let rest = Some(std::thread::spawn(move || lines.map_while(Result::ok).collect()));
        let arguments = arguments.iter().map(ToString::to_string).collect();
        Self { child, rest, arguments, dir, nodes, said }
    }

    /// Starts it again in its directory, as its user does after its end.
    #[track_caller]
    pub fn start_again(&mut self) {
        let dir = std::mem::replace(&mut self.dir, directory());
        let arguments = self.arguments.clone();
        *self = Self::start_in(dir, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The process that cleans up behind it.
    pub fn reaper(&self) -> Option<Pid> {
        let children = super::descendants(self.pid());
        let line = |pid: &Pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        children.into_iter().find(|pid| line(pid).contains("demo-reaper"))
    }

    /// The demo's own process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// psql on node `number`, without the user's own settings.
    pub fn psql(&self, number: usize) -> Command {
        psql(&self.nodes[number - 1].url)
    }

    /// The rows of a statement through node `number`, unaligned; errors as they are printed.
    pub fn ask(&self, number: usize, statement: &str) -> String {
        let output = self.psql(number).args(["-At", "-v", "VERBOSITY=verbose", "-c", statement]).output().unwrap();
        both(&output).trim_end().to_owned()
    }

    /// psql on the server beside node `number`, around all nodes.
    pub fn psql_direct(&self, number: usize) -> Command {
        psql(&self.direct_url(number))
    }

    /// The URL of the server beside node `number`.
    pub fn direct_url(&self, number: usize) -> String {
        let database = self.nodes[0].url.rsplit('/').next().unwrap();
        format!("postgresql:///{database}?user=root&host={}", self.node_dir(number).join("socket").display())
    }

    /// The rows of a statement in the registry, on the server beside the first node, around all nodes.
    #[track_caller]
    pub fn registry(&self, statement: &str) -> String {
        let url = self.direct_url(1);
        let (_database, server) = url.split_once('?').unwrap();
        let mut psql = psql(&format!("postgresql:///backhaul?{server}"));
        super::run(psql.args(["-v", "ON_ERROR_STOP=1", "-Atqc", statement])).trim_end().to_owned()
    }

    /// Has every node's session live so long without renewal, and waits until each does. A shorter life than the product's
    /// own is for tests in which somebody dies: on a busy machine a heartbeat may be late, and costs the node its jobs.
    #[track_caller]
    pub fn set_session_life(&self, life: Duration) {
        let life = life.as_millis();
        self.registry(&format!("UPDATE registry.settings SET value = '{life}' WHERE name = 'session_life_ms'"));
        let nodes = self.nodes.len().to_string();
        super::until("every session to live as long", || {
            // It is renewed when a quarter is over.
            let query = format!(
                "SELECT count(*) FROM registry.sessions
                 WHERE expires_at - clock_timestamp() BETWEEN interval '{life} ms' / 2 AND interval '{life} ms'"
            );
            let seen = self.registry(&query);
            if seen == nodes { Ok(()) } else { Err(seen) }
        });
    }

    /// Waits until every node has heard what is set for the fleet. It comes with the answer to a heartbeat, and has been read
    /// when the next one is sent.
    #[track_caller]
    pub fn until_settings_known(&self) {
        for _ in 0..2 {
            let now = self.registry("SELECT clock_timestamp()");
            super::until("every node to have sent a heartbeat", || {
                let query = format!("SELECT count(*) FROM registry.nodes WHERE updated_at <= '{now}'");
                let late = self.registry(&query);
                if late == "0" { Ok(()) } else { Err(late) }
            });
        }
    }

    /// The store of node `number`.
    pub fn node_dir(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("n{number}"))
    }

    /// Whether there is a server beside node `number`.
    pub fn has_server(&self, number: usize) -> bool {
        self.node_dir(number).join("pg").exists()
    }

    /// Whether it runs.
    pub fn server_runs(&self, number: usize) -> bool {
        // One that ends in an orderly way takes its file with it.
        self.node_dir(number).join("pg/postmaster.pid").exists() && super::runs(self.server_pid(number))
    }

    /// The process id of the server beside node `number`.
    pub fn server_pid(&self, number: usize) -> Pid {
        let text = std::fs::read_to_string(self.node_dir(number).join("pg/postmaster.pid")).unwrap();
        Pid::from_raw(text.lines().next().unwrap().trim().parse().unwrap())
    }

    /// Sends a signal to every process of the server beside node `number`.
    pub fn signal_server(&self, number: usize, signal: Signal) {
        let first = self.server_pid(number);
        // Before its children, so that it starts no more of them.
        kill(first, signal).unwrap();
        let children = std::fs::read_to_string(format!("/proc/{first}/task/{first}/children")).unwrap();
        for child in children.split_ascii_whitespace() {
            // One may have ended meanwhile.
            let _ = kill(Pid::from_raw(child.parse().unwrap()), signal);
        }
    }

    /// Starts the server beside node `number` again, after it was killed.
    #[track_caller]
    pub fn restart_server(&self, number: usize) {
        self.begin_server(number, "-w");
    }

    /// The same; `wait` is pg_ctl's word for whether it returns before the server lets anybody in.
    #[track_caller]
    pub fn begin_server(&self, number: usize, wait: &str) {
        let mut start = postgres_program("pg_ctl");
        start.args(["start", wait, "-s", "-l", "/dev/null", "-D"]).arg(self.node_dir(number).join("pg"));
        if nix::unistd::Uid::effective().is_root() {
            let mut as_postgres = Command::new("runuser");
            as_postgres.args(["-u", "postgres", "--"]).arg(start.get_program()).args(start.get_args());
            start = as_postgres;
        }
        start.current_dir("/");
        // Until the last of the crashed server's processes is gone, its memory is still in use.
        super::until("a crashed server to start", || {
            let output = start.output().unwrap();
            if output.status.success() { Ok(()) } else { Err(both(&output)) }
        });
    }

    /// Makes the standby beside node `number` a primary.
    #[track_caller]
    pub fn promote(&self, number: usize) {
        let done = self.psql_direct(number).args(["-Atc", "SELECT pg_promote()"]).output().unwrap();
        assert_eq!(both(&done).trim(), "t");
    }

    /// Ends the demo by a signal and waits for it; its directory stays.
    pub fn end(self, signal: Signal) -> tempfile::TempDir {
        self.end_hearing(signal).0
    }

    /// The same, and what it printed after `ready`.
    pub fn end_hearing(mut self, signal: Signal) -> (tempfile::TempDir, Vec<String>) {
        let said = self.stop(signal);
        (std::mem::replace(&mut self.dir, directory()), said)
    }

    /// Ends the demo by a signal, waits for it, and gives what it printed after `ready`.
    pub fn stop(&mut self, signal: Signal) -> Vec<String> {
        if self.child.try_wait().unwrap().is_none() {
            kill(self.pid(), signal).unwrap();
            self.child.wait().unwrap();
        }
        self.rest.take().map(|rest| rest.join().unwrap()).unwrap_or_default()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for number in 1..=self.nodes.len() {
                let log = std::fs::read_to_string(self.node_dir(number).join("node.log")).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("--- n{number}:\n{}", lines[lines.len().saturating_sub(25)..].join("\n"));
            }
        }
        self.stop(Signal::SIGTERM);
    }
}

/// `backhaul demo` on any ports, in `dir`.
pub fn command(dir: &tempfile::TempDir, arguments: &[&str]) -> Command {
    let mut command = backhaul();
    command.args(["demo", "--http-port", "0", "--data-dir"]).arg(dir.path()).args(arguments);
    if !arguments.contains(&"--sql-port") {
        command.args(["--sql-port", "0"]);
    }
    command.stdin(Stdio::null());
    command
}

/// psql on a URL, without the user's own settings.
pub fn psql(url: &str) -> Command {
    let mut command = postgres_program("psql");
    command.args(["--no-psqlrc", "--set=ON_ERROR_STOP=0", url]).env("PGCONNECT_TIMEOUT", "20").stdin(Stdio::null());
    command
}

/// A session that holds what a statement has locked; ended when dropped, and the locks are gone with it.
pub struct Holder(Child);

impl Holder {
    /// Runs the statement, and returns when it is done.
    #[track_caller]
    pub fn start(mut psql: Command, statement: &str) -> Self {
        let psql = psql.args(["-Atq", "-v", "ON_ERROR_STOP=1"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = Self(psql.spawn().unwrap());
        // Its input stays open: at its end psql would go.
        writeln!(holder.0.stdin.as_mut().unwrap(), "{statement};\n\\echo held").unwrap();
        let mut said = BufReader::new(holder.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(said.any(|line| line == "held"), "{statement}");
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `n1  pid 17  region=a,zone=b  s1  leaseholder  postgresql://root@127.0.0.1:5/movr`
fn node(line: &str) -> Option<Node> {
    let fields: Vec<&str> = line.split("  ").collect();
    let [name, pid, _locality, _shard, role, url] = fields[..] else { return None };
    name.strip_prefix('n')?.parse::<u32>().ok()?;
    let address = url.strip_prefix("postgresql://root@")?.split('/').next()?.to_owned();
    Some(Node { pid: pid.strip_prefix("pid ")?.parse().ok()?, address, role: role.to_owned(), url: url.to_owned() })
}

/// Nothing that ran in `dir` runs any more.
#[track_caller]
pub fn assert_nothing_runs_in(dir: &std::path::Path) {
    super::until("every process to end", || match processes_in(dir) {
        none if none.is_empty() => Ok(()),
        some => Err(some.join("\n")),
    });
}
