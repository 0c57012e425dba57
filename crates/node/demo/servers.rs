//! A demo's PostgreSQL servers: one primary for each shard, and standbys that stream from it directly.

use std::path::Path;

use anyhow::Context as _;
use fleet::private::{Installation, Instance, RunAs, Settings};

use super::plan::{Part, PlannedNode};

/// The superuser of a demo's servers, as CockroachDB's is called.
pub(super) const SUPERUSER: &str = "root";

/// Starts the servers of all nodes that have one, primaries first, making those that are not there.
///
/// # Errors
///
/// One of them cannot be made or started; its own words are in the message.
pub(super) async fn start(
    installation: &Installation,
    run_as: Option<&RunAs>,
    dir: &Path,
    nodes: &[PlannedNode],
) -> anyhow::Result<Vec<Instance>> {
    let mut started: Vec<(&PlannedNode, Instance)> = Vec::new();
    let mut by_part: Vec<&PlannedNode> = nodes.iter().filter(|node| node.part != Part::None).collect();
    by_part.sort_by_key(|node| node.part != Part::Leaseholder);
    for node in by_part {
        let home = dir.join(node.name());
        std::fs::create_dir_all(&home)?;
        let mut server = Instance::new(installation.clone(), run_as.cloned(), &home)?;
        if !server.data().join("PG_VERSION").exists() {
            let settings = settings(node, nodes);
            let primary = started.iter().find(|(other, _)| other.shard == node.shard).map(|(_, server)| server);
            match primary {
                None => server.init(SUPERUSER, &settings),
                Some(primary) => server.clone_from(&primary.conninfo(SUPERUSER), &node.name(), &settings),
            }
            .with_context(|| format!("make the server of {}", node.name()))?;
        }
        let log = home.join("server.log");
        server.start(SUPERUSER, &log).await.with_context(|| format!("start the server of {}", node.name()))?;
        started.push((node, server));
    }
    started.sort_by_key(|(node, _)| node.number);
    Ok(started.into_iter().map(|(_, server)| server).collect())
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
