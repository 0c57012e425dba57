//! A demo's nodes, each a process of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cluster::secret::ClusterSecret;
use cluster::{Dialer, NodeInfo, PeerSession, Purpose, Role};
use fleet::private::Instance;
use sql::Verb;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::network::Namespace;
use super::plan::PlannedNode;

/// A node that does not listen, or a fleet that is not whole by then, is given up.
const DEADLINE: Duration = Duration::from_secs(30);

/// Where a node listens.
pub(super) struct Listen {
    pub(super) sql: String,
    pub(super) http: String,
    /// The network namespace it runs in, if not the host's.
    pub(super) namespace: Option<Namespace>,
}

/// A running node.
pub(super) struct RunningNode {
    pub(super) planned: PlannedNode,
    /// Its port's address.
    pub(super) address: String,
    pub(super) child: Child,
    log: PathBuf,
}

impl RunningNode {
    /// The URL for psql.
    pub(super) fn url(&self, database: &str) -> String {
        format!("postgresql://{}@{}/{database}", super::servers::SUPERUSER, self.address)
    }

    /// The process id, while it runs.
    pub(super) fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }
}

/// Where a node's ports are: `base + index`, or any for a base of 0.
pub(super) fn port(base: u16, index: usize) -> anyhow::Result<u16> {
    match base {
        0 => Ok(0),
        base => u16::try_from(index).ok().and_then(|index| base.checked_add(index)).context("ports end at 65535"),
    }
}

/// Finds out whether the ports are free, before servers are started in vain.
///
/// # Errors
///
/// One is taken; the message says which, and of which node.
pub(super) fn check_ports(base: u16, nodes: &[PlannedNode], what: &str) -> anyhow::Result<()> {
    for (index, node) in nodes.iter().enumerate() {
        let port = port(base, index)?;
        if port != 0
            && let Err(error) = std::net::TcpListener::bind(("127.0.0.1", port))
        {
            bail!("{what} port {port} of {} cannot be used: {error}", node.name());
        }
    }
    Ok(())
}

/// Starts a node and waits until it listens.
///
/// # Errors
///
/// It ends instead; the last lines of its log are in the message.
pub(super) async fn start(
    dir: &Path,
    planned: &PlannedNode,
    listen: &Listen,
    server: Option<&Instance>,
    join: &[String],
) -> anyhow::Result<RunningNode> {
    let home = dir.join(planned.name());
    fs::create_dir_all(&home)?;
    let (url_file, log) = (home.join("url"), home.join("node.log"));
    let _ = fs::remove_file(&url_file);
    let output = fs::OpenOptions::new().create(true).append(true).open(&log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["start", "--insecure", "--shard", &planned.shard]);
    if !planned.locality.is_empty() {
        command.args(["--locality", &planned.locality.to_string()]);
    }
    command.args(["--listen-addr", &listen.sql, "--http-addr", &listen.http]);
    command.args(["--node-id", &planned.number.to_string()]);
    command.arg("--store").arg(&home).arg("--external-io-dir").arg(home.join("extern"));
    command.arg("--listening-url-file").arg(&url_file);
    if !join.is_empty() {
        command.arg("--join").arg(join.join(","));
    }
    if let Some(server) = server {
        command.args(["--postgres", &server.conninfo("backhaul")]);
    }
    command.env_remove("BACKHAUL_POSTGRES").process_group(0);
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let mut spawn = || command.spawn().context("start a node");
    let mut child = match &listen.namespace {
        Some(namespace) => namespace.within(spawn)?,
        None => spawn()?,
    };
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Ok(url) = fs::read_to_string(&url_file) {
            let address = url.trim().trim_start_matches("postgresql://").to_owned();
            return Ok(RunningNode { planned: planned.clone(), address, child, log });
        }
        if let Some(status) = child.try_wait()? {
            bail!("{} ended at its start ({status}):\n{}", planned.name(), last_lines(&log));
        }
        if Instant::now() > deadline {
            bail!("{} does not listen; its log is {}", planned.name(), log.display());
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until every node has its number and, where the fleet is new, its planned role. Gives the roles.
///
/// # Errors
///
/// A node ends, or the fleet is not whole in time; the message says what is missing.
pub(super) async fn wait_until_whole(nodes: &mut [RunningNode], is_new: bool) -> anyhow::Result<Vec<Role>> {
    let dialer = Dialer::new(ClusterSecret::Insecure, None, "backhaul demo".to_owned());
    let mut sessions: Vec<PeerSession> = Vec::new();
    for node in nodes.iter() {
        sessions.push(dialer.dial(&node.address, &Purpose::Verbs).await?);
    }
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut infos = Vec::new();
        for session in &sessions {
            let answer = session.ask(Verb::WhoAreYou { since: None }, DEADLINE).await?;
            infos.push(serde_json::from_str::<NodeInfo>(&answer)?);
        }
        let roles: Vec<Role> = infos.iter().map(|info| role(info, &infos)).collect();
        let seen = nodes.iter().zip(&infos).zip(&roles);
        let missing = seen.into_iter().find_map(|((node, info), role)| {
            let wanted = is_new.then(|| node.planned.role());
            missing(info, *role, wanted, infos.len()).map(|what| format!("{} {what}", node.planned.name()))
        });
        let Some(missing) = missing else { return Ok(roles) };
        for node in nodes.iter_mut() {
            if let Some(status) = node.child.try_wait()? {
                bail!("{} ended ({status}):\n{}", node.planned.name(), last_lines(&node.log));
            }
        }
        if Instant::now() > deadline {
            bail!("the fleet did not become whole: {missing}");
        }
        sleep(Duration::from_millis(50)).await;
    }
}

fn role(info: &NodeInfo, all: &[NodeInfo]) -> Role {
    let leads = |other: &&NodeInfo| other.shard == info.shard && other.server_state().is_some_and(|s| !s.in_recovery);
    Role::of(info, all.iter().filter(leads).max_by_key(|other| other.server_state().map(|s| s.timeline)))
}

fn missing(info: &NodeInfo, role: Role, wanted: Option<Role>, nodes: usize) -> Option<String> {
    if info.node_id.is_none() {
        return Some("has no number yet".to_owned());
    }
    if info.peers.len() + 1 < nodes {
        return Some("does not know all others yet".to_owned());
    }
    if info.round_trips.len() + 1 < nodes {
        return Some("has not heard of all others yet".to_owned());
    }
    wanted.filter(|wanted| *wanted != role).map(|wanted| format!("is \"{role}\" and not yet \"{wanted}\""))
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
