//! Which nodes may have files of a backup, finished or under way.
//!
//! Whoever removes files must know whom to ask to stop, and whom to wait for: a worker that cannot be asked may be finishing
//! one. Where each node writes to its own directory (`nodelocal://self`), what a job has made is on as many nodes as took
//! part, and a checkpoint is forgotten with its point; a lock or a schema stands in none. So a node is noted before it is
//! first asked to write. One that is not was never asked, however well it matches.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use cluster::NodeId;
use jobs::Run;
use pgerror::{PgError, SqlState};

/// What the keys begin with under which the nodes stand.
const HOLDER: &str = "holder/";

/// The nodes that one run of a job has write.
pub(crate) struct Holders<'h> {
    run: &'h Run,
    noted: Mutex<BTreeSet<NodeId>>,
}

impl<'h> Holders<'h> {
    pub(crate) fn new(run: &'h Run) -> Self {
        Self { run, noted: Mutex::default() }
    }

    /// Notes that `node` may have files from now on.
    ///
    /// # Errors
    ///
    /// A lost claim, or the registry is not reachable.
    pub(crate) async fn note(&self, node: NodeId) -> anyhow::Result<()> {
        let noted = || self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if noted().contains(&node) {
            return Ok(());
        }
        self.run.keep(&format!("{HOLDER}{node}"), &node).await?;
        noted().insert(node);
        Ok(())
    }
}

/// The nodes that any run of a job has had write.
///
/// # Errors
///
/// The registry is not reachable.
pub(crate) async fn of(run: &Run) -> anyhow::Result<Vec<NodeId>> {
    run.kept_under(HOLDER).await
}

/// That nodes with files of a backup do not answer.
pub(crate) fn silent(nodes: &[NodeId]) -> PgError {
    let message = match nodes {
        [node] => format!("node {node} does not answer, and its own directory may hold files of the backup"),
        _ => {
            let names: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
            format!("nodes {} do not answer, and their own directories may hold files of the backup", names.join(", "))
        }
    };
    PgError::new(SqlState::CONNECTION_FAILURE, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_are_silent_are_named() {
        for (nodes, named) in [(&[3][..], "node 3 does"), (&[3, 5], "nodes 3, 5 do")] {
            let nodes: Vec<NodeId> = nodes.iter().map(|node| NodeId(*node)).collect();
            assert!(silent(&nodes).message.starts_with(named));
        }
    }
}
