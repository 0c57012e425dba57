//! Nodes and servers one by one, for what a demo does not do: passwords, secrets, certificates, mistakes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use ::fleet::private::{Installation, Instance, RunAs, Settings};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{backhaul, until};

/// A private server with the superuser `root`; ended when dropped.
pub struct Server {
    /// The server itself.
    pub instance: Instance,
    dir: PathBuf,
    // Its child has to be waited for by the runtime that started it.
    runtime: tokio::runtime::Runtime,
}

impl Server {
    /// Makes and starts a primary in `dir/<name>`.
    pub fn primary(dir: &Path, name: &str, settings: &Settings) -> Self {
        Self::make(dir, name, None, |server| server.init("root", settings))
    }

    /// The same, listening on 127.0.0.1 as well.
    pub fn primary_on(dir: &Path, name: &str, port: u16) -> Self {
        Self::make(dir, name, Some(port), |server| server.init("root", &Vec::new()))
    }

    /// Makes and starts, in `dir/<name>`, a standby of the server that a connection string leads to.
    pub fn standby(dir: &Path, name: &str, source: &str) -> Self {
        Self::make(dir, name, None, |server| server.clone_from(source, name, &Vec::new()))
    }

    fn make(dir: &Path, name: &str, port: Option<u16>, make: impl FnOnce(&Instance) -> anyhow::Result<()>) -> Self {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let mut instance = Instance::new(Installation::find().unwrap(), RunAs::choose().unwrap(), &dir).unwrap();
        if let Some(port) = port {
            instance = instance.listening(port);
        }
        make(&instance).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut server = Self { instance, dir, runtime };
        server.start();
        server
    }

    /// Where it listens, if on more than its socket.
    pub fn address(&self) -> String {
        let conninfo = self.instance.conninfo("root");
        let port = conninfo.split("port=").nth(1).and_then(|rest| rest.split(' ').next());
        format!("127.0.0.1:{}", port.unwrap())
    }

    /// Starts it (again).
    pub fn start(&mut self) {
        let log = self.dir.join("server.log");
        self.runtime.block_on(self.instance.start("root", &log)).unwrap();
    }

    /// Ends it: SIGINT is a fast shutdown, SIGKILL a crash.
    pub fn stop(&mut self, signal: Signal) {
        let Some(child) = self.instance.child() else { return };
        if let Some(pid) = child.id() {
            kill(Pid::from_raw(pid as i32), signal).unwrap();
            self.runtime.block_on(child.wait()).unwrap();
        }
    }

    /// Changes who may come in. By a restart: of a reload nobody can tell when it has been done.
    pub fn set_hba(&mut self, text: &str) {
        self.instance.set_hba(text).unwrap();
        self.stop(Signal::SIGINT);
        self.start();
    }

    /// The rows of a statement on the server itself.
    pub fn ask(&self, statement: &str) -> String {
        let conninfo = format!("{} dbname=postgres", self.instance.conninfo("root"));
        super::run(super::demo::psql(&conninfo).env("PGPASSWORD", "of root").args(["-Atc", statement]))
            .trim_end()
            .to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(Signal::SIGINT);
    }
}

/// A node; killed when dropped.
pub struct Node {
    child: Child,
    /// `host:port` of its port.
    pub address: String,
    log: PathBuf,
}

impl Node {
    /// Starts `backhaul start` in `dir/<name>` on any port, and waits until it listens.
    #[track_caller]
    pub fn start(dir: &Path, name: &str, arguments: &[&str]) -> Self {
        match Self::try_start(dir, name, arguments) {
            Ok(node) => node,
            Err(log) => panic!("{name} ended at its start:\n{log}"),
        }
    }

    /// The same, giving the log of a node that ends instead.
    pub fn try_start(dir: &Path, name: &str, arguments: &[&str]) -> Result<Self, String> {
        Self::try_start_with(dir, name, arguments, &[])
    }

    /// The same, with variables in its environment.
    pub fn try_start_with(
        dir: &Path,
        name: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self, String> {
        let home = dir.join(name);
        std::fs::create_dir_all(&home).unwrap();
        let (url, log) = (home.join("url"), home.join("node.log"));
        let _ = std::fs::remove_file(&url);
        let output = std::fs::File::create(&log).unwrap();
        let mut command = backhaul();
        command.arg("start").arg("--listening-url-file").arg(&url).args(arguments);
        if !arguments.contains(&"--listen-addr") {
            command.args(["--listen-addr", "127.0.0.1:0"]);
        }
        if !arguments.contains(&"--store") {
            command.arg("--store").arg(home.join("store"));
        }
        command.envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        let mut child = command.spawn().unwrap();
        let address = until("a node to listen", || {
            if let Ok(url) = std::fs::read_to_string(&url) {
                return Ok(Ok(url.trim().trim_start_matches("postgresql://").to_owned()));
            }
            match child.try_wait().unwrap() {
                Some(_) => Ok(Err(std::fs::read_to_string(&log).unwrap())),
                None => Err("it does not listen".to_owned()),
            }
        })?;
        Ok(Self { child, address, log })
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until it has logged `text`.
    #[track_caller]
    pub fn until_logged(&self, text: &str) {
        until(text, || if self.log().contains(text) { Ok(()) } else { Err(self.log()) });
    }

    /// Waits until it ends by itself, and gives its exit code and its log.
    #[track_caller]
    pub fn until_ended(mut self) -> (Option<i32>, String) {
        let status = until("a node to end", || match self.child.try_wait().unwrap() {
            Some(status) => Ok(status),
            None => Err(self.log()),
        });
        (status.code(), self.log())
    }

    /// psql through it.
    pub fn psql(&self, user_and_password: &str, database: &str) -> Command {
        super::demo::psql(&format!("postgresql://{user_and_password}@{}/{database}", self.address))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- node at {}:\n{}", self.address, self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
