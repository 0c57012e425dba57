//! What goes wrong on purpose: a fleet whose nodes can be stopped and started again, and a door that fails.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::demo::{Demo, Node, directory, psql};
use super::{both, run, until};

/// How a store fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It closes every connection at once.
    Refuses,
    /// It takes requests and says nothing.
    Hangs,
    /// It does what it is asked, and its answers do not come back.
    LosesAnswers,
    /// It answers every request with this status.
    Answers(&'static str),
}

#[derive(Default)]
struct Shared {
    trouble: Option<Trouble>,
    /// Connections that failed since the trouble began.
    failed: usize,
    open: Vec<TcpStream>,
}

/// A door in front of a server that can be made to fail, and heals by itself when enough connections have.
pub struct FailingDoor {
    /// `host:port` of the door.
    pub address: String,
    shared: Arc<Mutex<Shared>>,
}

impl FailingDoor {
    /// Opens a door to `port`. It stays open as long as the test runs.
    pub fn open(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared: Arc<Mutex<Shared>> = Arc::default();
        let state = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                std::thread::spawn(move || attend(client, port, &state));
            }
        });
        Self { address, shared }
    }

    /// From now on `connections` fail, those that are open first of all.
    pub fn fail(&self, trouble: Trouble, connections: usize) {
        let mut shared = self.shared.lock().unwrap();
        (shared.trouble, shared.failed) = (Some(trouble), 0);
        shared.open.drain(..).for_each(|open| drop(open.shutdown(Shutdown::Both)));
        drop(shared);
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || {
            until("enough connections to fail", || {
                let mut shared = shared.lock().unwrap();
                if shared.failed < connections && shared.trouble == Some(trouble) {
                    return Err(format!("{} of them", shared.failed));
                }
                shared.trouble = None;
                shared.open.drain(..).for_each(|open| drop(open.shutdown(Shutdown::Both)));
                Ok(())
            });
        });
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.shared.lock().unwrap().trouble = None;
    }
}

fn attend(mut client: TcpStream, port: u16, shared: &Mutex<Shared>) {
    let trouble = {
        let mut shared = shared.lock().unwrap();
        shared.open.push(client.try_clone().unwrap());
        shared.failed += usize::from(shared.trouble.is_some());
        shared.trouble
    };
    match trouble {
        Some(Trouble::Refuses) => drop(client.shutdown(Shutdown::Both)),
        // Whoever hangs here is let go when the trouble is over.
        Some(Trouble::Hangs) => drop(client.read_to_end(&mut Vec::new())),
        Some(Trouble::Answers(status)) => answer(client, status),
        Some(Trouble::LosesAnswers) | None => {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { return };
            let (mut to, mut from) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let up = std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            let mut server = server;
            if trouble.is_some() {
                let _ = server.read(&mut [0; 1]);
            } else {
                let _ = std::io::copy(&mut server, &mut client);
            }
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
            let _ = up.join();
        }
    }
}

/// Answers the request of a connection with a status, and waits until the client has closed it.
pub fn answer(mut client: TcpStream, status: &str) {
    let mut request = [0; 65536];
    let _ = client.read(&mut request);
    let _ = write!(client, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let _ = client.shutdown(Shutdown::Write);
    let _ = client.read_to_end(&mut Vec::new());
}

/// Opens a door to `port` behind which everything takes `delay` longer, in each direction, and gives its `host:port`. It
/// stays open as long as the test runs.
pub fn slow_door(port: u16, delay: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            for (from, to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                std::thread::spawn(move || late(from, to, delay));
            }
        }
    });
    address
}

fn late(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let mut piece = [0; 65536];
    while let Ok(read @ 1..) = from.read(&mut piece) {
        std::thread::sleep(delay);
        if to.write_all(&piece[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// How long the sessions of those live who are to die.
pub const DEATH_KNOWN: Duration = Duration::from_secs(1);

/// A demo whose nodes can be started again.
pub struct Fleet {
    restarted: BTreeMap<usize, Child>,
    /// The command line of each node.
    lines: Vec<Vec<String>>,
    /// Where nodes find programs of PostgreSQL before all others.
    programs: BTreeMap<usize, tempfile::TempDir>,
    /// The demo.
    pub demo: Demo,
}

impl Fleet {
    /// Starts a demo. Its sessions live as long as the product has it, so that none is lost on a busy machine.
    #[track_caller]
    pub fn start(arguments: &[&str]) -> Self {
        let demo = Demo::start(arguments);
        let lines = demo.nodes.iter().map(command_line).collect();
        Self { restarted: BTreeMap::new(), lines, programs: BTreeMap::new(), demo }
    }

    /// The same in which a death is known within a second, where somebody is killed, stopped or cut off.
    #[track_caller]
    pub fn mortal(arguments: &[&str]) -> Self {
        let fleet = Self::start(arguments);
        fleet.demo.set_session_life(DEATH_KNOWN);
        fleet
    }

    /// Runs a statement in the registry, on whichever server that is.
    #[track_caller]
    pub fn registry(&self, statement: &str) -> String {
        until("the registry to answer", || {
            let url = self.demo.nodes[0].url.replace("/movr", "/backhaul");
            let output = psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atqc", statement]).output().unwrap();
            if output.status.success() { Ok(both(&output).trim().to_owned()) } else { Err(both(&output)) }
        })
    }

    /// The process of node `number`.
    pub fn pid(&self, number: usize) -> Pid {
        let id = self.restarted.get(&number).map_or(self.demo.nodes[number - 1].pid, |child| child.id() as i32);
        Pid::from_raw(id)
    }

    /// Sends a signal to node `number`.
    pub fn signal(&self, number: usize, signal: Signal) {
        kill(self.pid(number), signal).unwrap();
    }

    /// Starts the demo again if it has ended, which takes its whole fleet with it, and says whether it had.
    #[track_caller]
    pub fn start_ended_demo(&mut self) -> bool {
        if !self.demo.has_ended() {
            return false;
        }
        self.demo.start_again();
        self.lines = self.demo.nodes.iter().map(command_line).collect();
        for mut child in std::mem::take(&mut self.restarted).into_values() {
            child.wait().unwrap();
        }
        true
    }

    /// Starts node `number`, which has ended, as it was started the first time.
    #[track_caller]
    pub fn start_node(&mut self, number: usize) {
        if let Some(mut child) = self.restarted.remove(&number) {
            child.wait().unwrap();
        }
        // While it was away somebody may have been given its port for a moment.
        let address = &self.demo.nodes[number - 1].address;
        until("the port of a node to be free", || TcpListener::bind(address).map_err(|error| error.to_string()));
        let log = std::fs::File::options().append(true).open(self.demo.node_dir(number).join("node.log")).unwrap();
        let (program, arguments) = self.lines[number - 1].split_first().unwrap();
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        if let Some(programs) = self.programs.get(&number) {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{path}", programs.path().display()));
        }
        self.restarted.insert(number, command.spawn().unwrap());
    }

    /// The same with another word in the place of one of its command line.
    #[track_caller]
    pub fn start_node_with(&mut self, number: usize, word: &str, other: &str) {
        let words = &mut self.lines[number - 1];
        let changed: Vec<String> = words.iter().map(|said| said.replace(word, other)).collect();
        assert_ne!(changed, *words);
        *words = changed;
        self.start_node(number);
    }

    /// Ends node `number` and starts it so that the others come to it by `door`.
    #[track_caller]
    pub fn move_behind(&mut self, number: usize, door: &str) {
        self.end_node(number, Signal::SIGTERM);
        self.lines[number - 1].extend(["--advertise-addr".to_owned(), door.to_owned()]);
        self.start_node(number);
        self.until_all_live();
    }

    /// Ends node `number` and starts it so that it finds a release of PostgreSQL that is newer than all others and has an old
    /// `pg_dump`.
    #[track_caller]
    pub fn mislead(&mut self, number: usize) {
        self.end_node(number, Signal::SIGTERM);
        let programs = directory();
        for name in ["postgres", "initdb", "pg_basebackup", "pg_ctl", "pg_dump"] {
            let version = if name == "pg_dump" { "9.6.24" } else { "99.1" };
            let script = programs.path().join(name);
            std::fs::write(&script, format!("#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")).unwrap();
            std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        self.programs.insert(number, programs);
        self.start_node(number);
        self.until_all_live();
    }

    /// Has a standby receive nothing more of what its primary does.
    #[track_caller]
    pub fn cut_off(&self, number: usize) {
        for apart in ["ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"] {
            run(self.demo.psql_direct(number).args(["-v", "ON_ERROR_STOP=1", "-Atc", apart]));
        }
        until("the standby to be cut off", || {
            let seen = run(self.demo.psql_direct(number).args(["-Atc", "SELECT count(*) FROM pg_stat_wal_receiver"]));
            if seen.trim() == "0" { Ok(()) } else { Err(seen) }
        });
    }

    /// Makes a job that is held at a pausepoint, and waits until it is there.
    #[track_caller]
    pub fn held(&self, statement: &str, point: &str) -> String {
        self.held_after("", statement, point)
    }

    /// The same in a session that has run something before.
    #[track_caller]
    pub fn held_after(&self, before: &str, statement: &str, point: &str) -> String {
        let set = format!("SET backhaul.debug_pausepoints = '{point}:hold'");
        let statements = ["-Atqc", before, "-c", &set, "-c", statement];
        let job = run(self.demo.psql(1).args(["-v", "ON_ERROR_STOP=1"]).args(statements));
        self.until_held(job.trim(), point);
        job.trim().to_owned()
    }

    /// Waits until a job is held at a pausepoint.
    #[track_caller]
    pub fn until_held(&self, job: &str, point: &str) {
        until("the job to be held", || {
            let seen = self.job(job, "coalesce(running_status, status)");
            if seen == format!("holding at pause point \"{point}\"") { Ok(()) } else { Err(seen) }
        });
    }

    /// A column, or an expression, of a job's row.
    #[track_caller]
    pub fn job(&self, job: &str, column: &str) -> String {
        self.registry(&format!("SELECT {column} FROM registry.jobs WHERE id = {job}"))
    }

    /// Lets a held job go on.
    #[track_caller]
    pub fn let_go(&self, job: &str, point: &str) {
        self.registry(&Self::letting_go(job, point));
    }

    /// The statement that does so.
    pub fn letting_go(job: &str, point: &str) -> String {
        let without = format!("array_remove(pausepoints, '{point}:hold')");
        format!("UPDATE registry.jobs SET pausepoints = {without} WHERE id = {job}")
    }

    /// Waits for a job's end, and gives its status and error.
    #[track_caller]
    pub fn end_of(&self, job: &str) -> (String, String) {
        until("the job to end", || {
            let seen = self.job(job, "status || '|' || (finished IS NOT NULL)");
            if seen.ends_with("|true") { Ok(()) } else { Err(seen) }
        });
        (self.job(job, "status"), self.job(job, "error"))
    }

    /// Ends node `number` by a signal and waits until it is gone.
    #[track_caller]
    pub fn end_node(&mut self, number: usize, signal: Signal) {
        let pid = self.pid(number);
        self.signal(number, signal);
        match self.restarted.remove(&number) {
            Some(mut child) => drop(child.wait()),
            // The demo reaps its own.
            None => until("the node to be gone", || match kill(pid, None) {
                Ok(()) => Err("it is there still".to_owned()),
                Err(_) => Ok(()),
            }),
        }
    }

    /// Waits until every node has a session, and answers every other one: each has a view of its own, and work is dealt by
    /// that of the coordinator.
    #[track_caller]
    pub fn until_all_live(&self) {
        let live = format!("{}", self.demo.nodes.len());
        until("every node to be back", || {
            let query = "SELECT count(*) FROM registry.sessions WHERE expires_at > clock_timestamp()";
            let seen = self.registry(query);
            if seen != live {
                return Err(format!("{seen} sessions"));
            }
            for number in 1..=self.demo.nodes.len() {
                let nodes = self.demo.ask(number, "SHOW NODES");
                if nodes.lines().filter(|row| row.contains("|t|t|")).count() != self.demo.nodes.len() {
                    return Err(format!("node {number}: {nodes}"));
                }
            }
            Ok(())
        });
    }

    /// Runs SQL in a database, on whichever server leads the shard of node `number`.
    #[track_caller]
    pub fn on(&self, number: usize, database: &str, query: &str) -> String {
        let url = self.demo.nodes[number - 1].url.replace("/movr", &format!("/{database}"));
        run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atqc", query]))
    }
}

/// How a node was started, on the port that it has been given.
fn command_line(node: &Node) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{}/cmdline", node.pid)).unwrap();
    let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let mut words: Vec<String> = words.filter(|word| !word.is_empty()).collect();
    let flag = words.iter().position(|word| word == "--listen-addr").unwrap();
    words[flag + 1].clone_from(&node.address);
    words
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for child in self.restarted.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
