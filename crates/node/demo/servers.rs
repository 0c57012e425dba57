//! A demo's PostgreSQL servers: one primary for each shard, and standbys that stream from it, directly or, in a closed
//! network, through nodes' ports.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fleet::private::{Installation, Instance, RunAs, Settings};
use tokio::runtime::Handle;
use tokio::time::sleep;

use super::network::Namespace;
use super::nodes::RunningNode;
use super::plan::{Part, PlannedNode};
use crate::client::{local_session, spoken};
use crate::flags::Trust;

/// The superuser of a demo's servers, as CockroachDB's is called.
pub(super) const SUPERUSER: &str = "root";

/// A standby that does not stream through its own node by then is given up.
const STREAM_DEADLINE: Duration = Duration::from_secs(30);

/// What servers are made of.
pub(super) struct Workshop<'a> {
    pub(super) installation: &'a Installation,
    pub(super) run_as: Option<&'a RunAs>,
    pub(super) dir: &'a Path,
    /// All nodes of the demo.
    pub(super) nodes: &'a [PlannedNode],
}

impl Workshop<'_> {
    /// Starts the server beside `node`, making it if it is not there: a primary, or a standby of the server that
    /// `source` leads to. It runs in the namespace, if one is given.
    ///
    /// # Errors
    ///
    /// It cannot be made or started; its own words are in the message.
    pub(super) async fn start(
        &self,
        node: &PlannedNode,
        source: Option<&str>,
        namespace: Option<&Namespace>,
    ) -> anyhow::Result<Instance> {
        let home = self.dir.join(node.name());
        std::fs::create_dir_all(&home)?;
        let mut server = Instance::new(self.installation.clone(), self.run_as.cloned(), &home)?;
        let log = home.join("server.log");
        let is_new = !server.data().join("PG_VERSION").exists();
        let make = || match source {
            _ if !is_new => Ok(()),
            None => server.init(SUPERUSER, &settings(node, self.nodes)),
            Some(source) => server.clone_from(source, &node.name(), &settings(node, self.nodes)),
        };
        let made = match namespace {
            Some(namespace) => namespace.within(make),
            None => make(),
        };
        made.with_context(|| format!("make the server of {}", node.name()))?;
        let started = match namespace {
            // A program is in the namespace of the thread that starts it.
            Some(namespace) => namespace.within(|| Handle::current().block_on(server.start(SUPERUSER, &log))),
            None => server.start(SUPERUSER, &log).await,
        };
        started.with_context(|| format!("start the server of {}", node.name()))?;
        Ok(server)
    }
}

/// Only the primary is told of synchronous standbys: one that is promoted must not wait for itself.
fn settings(node: &PlannedNode, nodes: &[PlannedNode]) -> Settings {
    let mut settings = Settings::new();
    let voting: Vec<String> = nodes
        .iter()
        .filter(|other| other.shard == node.shard && other.part == Part::Voting)
        .map(PlannedNode::name)
        .collect();
    if node.part == Part::Leaseholder && !voting.is_empty() {
        settings.push(("synchronous_standby_names".to_owned(), format!("ANY 1 ({})", voting.join(", "))));
    }
    if node.part != Part::Leaseholder {
        // Long reads on a standby are not ended for rows that the primary no longer needs.
        settings.push(("hot_standby_feedback".to_owned(), "on".to_owned()));
    }
    settings
}

/// The connection string by which a standby is made from the server beside the node at `address`. Before there is a
/// service role no node knows who leads, so it names the server.
pub(super) fn through(address: &str) -> anyhow::Result<String> {
    Ok(format!("{} options='-c backhaul.target=local'", of_port(address)?))
}

fn of_port(address: &str) -> anyhow::Result<String> {
    let (host, port) = address.rsplit_once(':').context("read a node's address")?;
    Ok(format!("host={host} port={port} user={SUPERUSER}"))
}

/// Lets every standby stream through the port of its own node, which knows who leads, and waits until they do. From one
/// start to the next the addresses are others.
///
/// # Errors
///
/// A standby refuses, or does not stream in time.
pub(super) async fn stream_through_own_nodes(nodes: &[RunningNode]) -> anyhow::Result<()> {
    let trust = Trust { secret_file: None, insecure: true, certs_dir: None };
    for node in nodes.iter().filter(|node| node.planned.part != Part::None) {
        let session = local_session(&node.address, SUPERUSER, "postgres", &trust).await?;
        let client = &session.client;
        if !client.query_one("SELECT pg_is_in_recovery()", &[]).await.map_err(spoken)?.get::<_, bool>(0) {
            continue;
        }
        let source = format!("{} application_name={}", of_port(&node.address)?, node.planned.name());
        let alter = format!("ALTER SYSTEM SET primary_conninfo = '{}'", source.replace('\'', "''"));
        client.batch_execute(&alter).await.map_err(spoken)?;
        client.batch_execute("SELECT pg_reload_conf()").await.map_err(spoken)?;
        let deadline = Instant::now() + STREAM_DEADLINE;
        let host = node.address.rsplit_once(':').map_or("", |(host, _)| host);
        let query = "SELECT 1 FROM pg_stat_wal_receiver WHERE status = 'streaming' AND sender_host = $1";
        while client.query_opt(query, &[&host]).await.map_err(spoken)?.is_none() {
            if Instant::now() > deadline {
                bail!("the standby of {} does not stream through its node's port", node.planned.name());
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}
