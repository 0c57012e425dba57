//! `backhaul demo`: a whole fleet on one machine, private and for trying things.
//!
//! The story: find PostgreSQL; take a directory; let a *reaper* watch this process; start the servers, then the nodes,
//! then the registry, then load a data set; say where everything is; run what the user gave, or wait. Whatever way
//! this process ends, the reaper sees its end of a pipe close and ends everything that runs in the directory.

mod ground;
mod movr;
mod network;
mod nodes;
mod object_store;
mod plan;
mod raise;
mod servers;

use std::cell::Cell;
use std::io::{IsTerminal as _, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fleet::private::{Installation, RunAs};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::flags::Demo;
use crate::{failed, print_beside, print_line};
use ground::Ground;
use network::Network;
use nodes::RunningNode;
use object_store::ObjectStore;
use plan::PlannedNode;
use raise::{Raised, Site};

/// The clean-up of an earlier demo in the same directory takes no longer than this.
const REAPER_DEADLINE: Duration = Duration::from_secs(60);

/// Starts the fleet and stays until it is told to end, or has run what it was given.
///
/// # Errors
///
/// Something cannot be started; what was is ended.
pub(crate) async fn run(flags: &Demo) -> anyhow::Result<ExitCode> {
    let planned = plan::plan(flags)?;
    let installation = Installation::find()?;
    let run_as = RunAs::choose()?;
    let ground = Ground::take(flags.data_dir.as_deref(), run_as.as_ref())?;
    let reaper = Reaper::start(&ground, flags.closed_network).await?;
    let (planned, installation, run_as) = (&planned, &installation, run_as.as_ref());
    let site = Site { flags, planned, installation, run_as, ground: &ground, network: None };
    // Said before the clean-up, which takes a moment.
    let outcome = until_told(site).await.unwrap_or_else(|error| failed(&error));
    // One that somebody has killed meanwhile left its work to another.
    if !reaper.finish().await? && !Reaper::start(&ground, flags.closed_network).await?.finish().await? {
        bail!("the clean-up was ended by a signal");
    }
    Ok(outcome)
}

/// Lives until the user has had enough.
async fn until_told(mut site: Site<'_>) -> anyhow::Result<ExitCode> {
    let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let in_psql = Cell::new(false);
    let interrupt = async {
        // Ctrl-C in psql is for psql's statement.
        while interrupted.recv().await.is_some() && in_psql.get() {}
    };
    let flags = site.flags;
    if flags.closed_network {
        site.network = Some(Network::make(site.planned, flags.sql_port, flags.http_port)?);
    }
    let outcome = tokio::select! {
        outcome = live(&site, &in_psql) => outcome,
        () = interrupt => Ok(ExitCode::SUCCESS),
        _ = terminated.recv() => Ok(ExitCode::SUCCESS),
    };
    if let Some(network) = site.network {
        // With -e, standard output belongs to the results.
        let tell = if flags.execute.is_empty() { print_line } else { print_beside };
        network.account()?.iter().for_each(|line| tell(line));
    }
    outcome
}

/// The reaper's own process: waits for its input to close, then ends everything in `dir`.
///
/// # Errors
///
/// The directory, or the closed network of the demo `network_of`, cannot be removed.
pub(crate) fn reap(dir: &Path, remove: bool, network_of: Option<u32>) -> anyhow::Result<()> {
    let wait = || {
        // Blocking is all that this process does.
        std::io::stdin().read_to_end(&mut Vec::new())?;
        Ok(())
    };
    ground::reap(dir, remove, || print_line("ready"), wait, || network_of.map_or(Ok(()), network::remove))
}

/// The process that outlives this one.
struct Reaper(Child);

impl Reaper {
    async fn start(ground: &Ground, closed_network: bool) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // A group of its own, so that Ctrl-C does not end it before its work.
        command.arg("demo-reaper").arg(&ground.dir).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        if ground.temporary {
            command.arg("--remove");
        }
        if closed_network {
            command.args(["--network-of", &std::process::id().to_string()]);
        }
        let mut child = command.spawn().context("start the reaper")?;
        let mut said = [0; 1];
        let mut out = child.stdout.take().context("hear the reaper")?;
        timeout(REAPER_DEADLINE, out.read_exact(&mut said))
            .await
            .context("wait for an earlier demo to be cleaned up")??;
        Ok(Self(child))
    }

    /// Has it do its work, and says whether it was there to do so.
    async fn finish(mut self) -> anyhow::Result<bool> {
        drop(self.0.stdin.take());
        let status = self.0.wait().await?;
        if !status.success() && status.signal().is_none() {
            bail!("the clean-up did not succeed ({status})");
        }
        Ok(status.success())
    }
}

async fn live(site: &Site<'_>, in_psql: &Cell<bool>) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let (flags, installation, network) = (site.flags, site.installation, site.network.as_ref());
    if network.is_none() {
        nodes::check_ports(flags.sql_port, site.planned, "SQL")?;
        nodes::check_ports(flags.http_port, site.planned, "HTTP")?;
    }
    // With -e, standard output belongs to the results.
    let quiet = !flags.execute.is_empty();
    let say = |line: &str| {
        if !quiet {
            print_line(line)
        }
    };
    let raised = site.raise(say).await?;
    let database = if flags.no_example_database { "postgres" } else { movr::DATABASE };
    for (node, role) in raised.running.iter().zip(&raised.roles) {
        let PlannedNode { number, locality, shard, .. } = &node.planned;
        say(&format!("n{number}  pid {}  {locality}  {shard}  {role}  {}", node.pid(), node.url(database)));
    }
    if let Some(network) = network {
        network.describe().iter().for_each(|line| say(line));
        say(&match &raised.store {
            Some(store) => format!("S3 server, reached from {} only: {}", network.store_tier(), store.uri("")),
            None => object_store::MISSING.to_owned(),
        });
    }
    say(&format!("ready in {:.1} seconds", begun.elapsed().as_secs_f64()));
    let first = raised.running.first().context("a demo has a first node")?.url(database);
    if quiet {
        return execute(installation, &first, &flags.execute).await;
    }
    suggest(&raised, network, &first).iter().for_each(|line| say(line));
    let ends = watch(raised);
    let on_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let way_out = if on_terminal { "\\q" } else { "Ctrl-C" };
    say(&format!("{way_out} ends the demo and everything it started."));
    if on_terminal {
        in_psql.set(true);
        let status = psql(installation, &first).status().await.context("run psql")?;
        return Ok(exit_code(status));
    }
    tell(ends).await
}

fn psql(installation: &Installation, url: &str) -> Command {
    let own = installation.program("psql");
    let mut command = Command::new(if own.exists() { own.as_os_str() } else { "psql".as_ref() });
    command.arg(url).kill_on_drop(true);
    command
}

async fn execute(installation: &Installation, url: &str, statements: &[String]) -> anyhow::Result<ExitCode> {
    let mut command = psql(installation, url);
    command.arg("--no-psqlrc");
    for statement in statements {
        command.arg("-c").arg(statement);
    }
    Ok(exit_code(command.stdin(Stdio::null()).status().await.context("run psql")?))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    // As a shell has it for a program that was killed.
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn suggest(raised: &Raised, network: Option<&Network>, first: &str) -> Vec<String> {
    let mut lines = vec![
        String::new(),
        "Try, in psql on any of these nodes:".to_owned(),
        "  SHOW LOCALITY;".to_owned(),
        "  SHOW NODES;".to_owned(),
        "  SELECT pg_is_in_recovery(), count(*) FROM rides;  -- every node leads to the leaseholder".to_owned(),
    ];
    if let (Some(last), Some(database)) = (raised.running.last(), first.rsplit('/').next()) {
        let (region, uri) = match network.zip(raised.store.as_ref()) {
            Some((network, store)) => (network.store_tier().to_owned(), store.uri("b")),
            None => (first_tier(last), "nodelocal://self/b".to_owned()),
        };
        let backup = format!("BACKUP DATABASE {database} INTO '{uri}' WITH EXECUTION LOCALITY = '{region}', DETACHED");
        lines.push(format!("  EXPLAIN {backup};  -- where, and why"));
        lines.push(format!("  {backup};  -- runs in {region} only"));
        lines.push("  SHOW JOBS;".to_owned());
        lines.push(format!("Kill a node and look:  kill -9 {};  psql {first} -c 'SHOW NODES'", last.pid()));
    }
    lines
}

fn first_tier(node: &RunningNode) -> String {
    node.planned.locality.tiers().first().map(ToString::to_string).unwrap_or_default()
}

/// Waits for every process of the fleet, so that each may be started again by hand once it has ended.
fn watch(raised: Raised) -> JoinSet<String> {
    let mut ends = JoinSet::new();
    for mut node in raised.running {
        ends.spawn(async move {
            let status = node.child.wait().await;
            how(&node.planned.name(), status.ok())
        });
    }
    for (node, server) in raised.servers {
        ends.spawn(async move { how(&format!("the server of {node}"), server.ended().await.ok()) });
    }
    if let Some(ObjectStore { mut child, .. }) = raised.store {
        ends.spawn(async move { how("the S3 server", child.wait().await.ok()) });
    }
    ends
}

fn how(name: &str, status: Option<ExitStatus>) -> String {
    match status {
        Some(status) => format!("{name} has ended ({status})"),
        None => format!("{name} has ended"),
    }
}

/// Says what ends, and stays.
async fn tell(mut ends: JoinSet<String>) -> anyhow::Result<ExitCode> {
    while let Some(ended) = ends.join_next().await {
        print_line(&ended?);
    }
    bail!("all nodes and servers have ended")
}
