//! `backhaul demo`: a whole fleet on one machine, private and for trying things.
//!
//! The story: find PostgreSQL; take a directory; let a *reaper* watch this process; start the servers, then the nodes,
//! then the registry, then load a data set; say where everything is; run what the user gave, or wait. Whatever way
//! this process ends, the reaper sees its end of a pipe close and ends everything that runs in the directory.

mod ground;
mod movr;
mod nodes;
mod plan;
mod servers;

use std::cell::Cell;
use std::io::{IsTerminal as _, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fleet::private::{Installation, Instance, RunAs};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::flags::{Demo, Init, Trust};
use crate::init;
use crate::{failed, print_line};
use ground::Ground;
use nodes::RunningNode;
use plan::{Part, PlannedNode};
use servers::SUPERUSER;

/// The clean-up of an earlier demo in the same directory takes no longer than this.
const REAPER_DEADLINE: Duration = Duration::from_secs(60);

/// From so many rides on, the user is told what takes so long.
const ROWS_THAT_TAKE_A_WHILE: u32 = 50_000;

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
    let mut reaper = Reaper::start(&ground).await?;
    let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let in_psql = Cell::new(false);
    let interrupt = async {
        // Ctrl-C in psql is for psql's statement.
        while interrupted.recv().await.is_some() && in_psql.get() {}
    };
    let outcome = tokio::select! {
        outcome = live(flags, &planned, &installation, run_as.as_ref(), &ground, &in_psql) => outcome,
        () = interrupt => Ok(ExitCode::SUCCESS),
        _ = terminated.recv() => Ok(ExitCode::SUCCESS),
    };
    // Said before the clean-up, which takes a moment.
    let outcome = outcome.unwrap_or_else(|error| failed(&error));
    reaper.finish().await?;
    Ok(outcome)
}

/// The reaper's own process: waits for its input to close, then ends everything in `dir`.
///
/// # Errors
///
/// The directory cannot be removed.
pub(crate) fn reap(dir: &Path, remove: bool) -> anyhow::Result<()> {
    let wait = || {
        // Blocking is all that this process does.
        std::io::stdin().read_to_end(&mut Vec::new())?;
        Ok(())
    };
    ground::reap(dir, remove, || print_line("ready"), wait)
}

/// The process that outlives this one.
struct Reaper(Child);

impl Reaper {
    async fn start(ground: &Ground) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // A group of its own, so that Ctrl-C does not end it before its work.
        command.arg("demo-reaper").arg(&ground.dir).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        if ground.temporary {
            command.arg("--remove");
        }
        let mut child = command.spawn().context("start the reaper")?;
        let mut said = [0; 1];
        let mut out = child.stdout.take().context("hear the reaper")?;
        timeout(REAPER_DEADLINE, out.read_exact(&mut said))
            .await
            .context("wait for an earlier demo to be cleaned up")??;
        Ok(Self(child))
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        drop(self.0.stdin.take());
        let status = self.0.wait().await?;
        if !status.success() {
            bail!("the clean-up did not succeed ({status})");
        }
        Ok(())
    }
}

async fn live(
    flags: &Demo,
    planned: &[PlannedNode],
    installation: &Installation,
    run_as: Option<&RunAs>,
    ground: &Ground,
    in_psql: &Cell<bool>,
) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    nodes::check_ports(flags.sql_port, planned, "SQL")?;
    nodes::check_ports(flags.http_port, planned, "HTTP")?;
    // With -e, standard output belongs to the results.
    let quiet = !flags.execute.is_empty();
    let say = |line: &str| {
        if !quiet {
            print_line(line)
        }
    };
    let layout = layout(flags, planned);
    let is_new = match ground.ready_layout() {
        Some(before) if before != layout => {
            bail!("{} holds another fleet ({}); give the same flags or another directory", ground.dir.display(), before)
        }
        before => before.is_none(),
    };
    let bin = installation.bin.display();
    say(&format!("PostgreSQL {} from {bin}, data in {}", installation.version, ground.dir.display()));
    let servers = servers::start(installation, run_as, &ground.dir, planned).await?;
    let mut running = start_nodes(flags, planned, ground, &servers).await?;
    if is_new {
        initialize(&running).await?;
    }
    let roles = nodes::wait_until_whole(&mut running, is_new).await?;
    let database = if flags.no_example_database { "postgres" } else { movr::DATABASE };
    if is_new && !flags.no_example_database {
        if flags.rows >= ROWS_THAT_TAKE_A_WHILE {
            say(&format!("loading {} rides into the database {}", flags.rows, movr::DATABASE));
        }
        load_movr(flags, &running).await?;
    }
    ground.set_ready(&layout)?;
    for (node, role) in running.iter().zip(roles) {
        let PlannedNode { number, locality, shard, .. } = &node.planned;
        say(&format!("n{number}  pid {}  {locality}  {shard}  {role}  {}", node.pid(), node.url(database)));
    }
    say(&format!("ready in {:.1} seconds", begun.elapsed().as_secs_f64()));
    let first = running.first().context("a demo has a first node")?.url(database);
    if quiet {
        return execute(installation, &first, &flags.execute).await;
    }
    suggest(&running, &first).iter().for_each(|line| say(line));
    let ends = watch(running, planned, servers);
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

/// What two starts in one directory must have in common.
fn layout(flags: &Demo, planned: &[PlannedNode]) -> String {
    let nodes: Vec<String> =
        planned.iter().map(|node| format!("n{} {} {:?}", node.number, node.shard, node.part)).collect();
    let movr =
        if flags.no_example_database { "no example database".to_owned() } else { format!("{} rows", flags.rows) };
    format!("{}; {movr}", nodes.join(", "))
}

async fn start_nodes(
    flags: &Demo,
    planned: &[PlannedNode],
    ground: &Ground,
    servers: &[Instance],
) -> anyhow::Result<Vec<RunningNode>> {
    let mut running: Vec<RunningNode> = Vec::new();
    for (index, node) in planned.iter().enumerate() {
        let ports = (nodes::port(flags.sql_port, index)?, nodes::port(flags.http_port, index)?);
        let join: Vec<String> = running.first().map(|first| first.address.clone()).into_iter().collect();
        // Servers are those of the first nodes, in their order.
        let server = servers.get(index);
        running.push(nodes::start(&ground.dir, node, ports, server, &join).await?);
    }
    Ok(running)
}

fn leaseholders(running: &[RunningNode]) -> impl Iterator<Item = &RunningNode> {
    running.iter().filter(|node| node.planned.part == Part::Leaseholder)
}

/// The registry on the first shard, the service role on all of them.
async fn initialize(running: &[RunningNode]) -> anyhow::Result<()> {
    for (index, node) in leaseholders(running).enumerate() {
        let init = Init {
            host: node.address.clone(),
            user: SUPERUSER.to_owned(),
            service_role: "backhaul".to_owned(),
            service_role_only: index > 0,
            allow_restore: true,
            trust: Trust { secret_file: None, insecure: true, certs_dir: None },
        };
        init::run(&init, |_| ()).await.with_context(|| format!("initialize {}", node.planned.shard))?;
    }
    Ok(())
}

async fn load_movr(flags: &Demo, running: &[RunningNode]) -> anyhow::Result<()> {
    let shards = leaseholders(running).count();
    for (index, node) in leaseholders(running).enumerate() {
        let part = movr::Part { rows: flags.rows, shard: index, shards };
        movr::load(&node.address, SUPERUSER, &part)
            .await
            .with_context(|| format!("load the database {} into {}", movr::DATABASE, node.planned.shard))?;
    }
    Ok(())
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

fn suggest(running: &[RunningNode], first: &str) -> Vec<String> {
    let mut lines = vec![
        String::new(),
        "Try, in psql on any of these nodes:".to_owned(),
        "  SHOW LOCALITY;".to_owned(),
        "  SHOW NODES;".to_owned(),
        "  SELECT pg_is_in_recovery(), count(*) FROM rides;  -- every node leads to the leaseholder".to_owned(),
    ];
    if let (Some(last), Some(database)) = (running.last(), first.rsplit('/').next()) {
        let region = last.planned.locality.tiers().first().map(ToString::to_string).unwrap_or_default();
        let backup = format!(
            "BACKUP DATABASE {database} INTO 'nodelocal://self/b' WITH EXECUTION LOCALITY = '{region}', DETACHED"
        );
        lines.push(format!("  {backup};  -- runs in {region} only"));
        lines.push("  SHOW JOBS;".to_owned());
        lines.push(format!("Kill a node and look:  kill -9 {};  psql {first} -c 'SHOW NODES'", last.pid()));
    }
    lines
}

/// Waits for every process of the fleet, so that each may be started again by hand once it has ended.
fn watch(running: Vec<RunningNode>, planned: &[PlannedNode], servers: Vec<Instance>) -> JoinSet<String> {
    let mut ends = JoinSet::new();
    for mut node in running {
        ends.spawn(async move {
            let status = node.child.wait().await;
            how(&node.planned.name(), status.ok())
        });
    }
    for (node, server) in planned.iter().zip(servers) {
        let name = format!("the server of {}", node.name());
        ends.spawn(async move { how(&name, server.ended().await.ok()) });
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
