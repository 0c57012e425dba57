//! The last two steps of a restore: databases get their names in all shards, then they are given to their user.
//!
//! Up to the names everything can be taken back. The first database that is given to its user is the point of no
//! return, and that it may have been passed is noted before: from then on the job can only go forward, also when it is
//! canceled or its backup cannot be read any more. So what the step needs is noted with it.

use cluster::{NodeId, Peers, View};
use fleet::loader::{Publish, Request};
use jobs::Run;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::story::ASK_DEADLINE;
use super::target;

/// Under which key it stands that databases may have been given to their user.
const GIVING: &str = "giving";

/// Whole databases, each with its shard, and what the job gives back when they are their user's.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Giving {
    pub(crate) databases: Vec<(String, Publish)>,
    pub(crate) result: Value,
}

/// The node beside the primary of a shard now.
///
/// # Errors
///
/// 08006 naming the shard.
pub(crate) fn leader_of(view: &View, shard: &str, detail: &str) -> Result<NodeId, PgError> {
    view.leader(shard).and_then(|leader| leader.node_id).ok_or_else(|| {
        PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached")).detail(detail)
    })
}

impl Giving {
    /// What an earlier run may have begun to give.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub(crate) async fn begun(run: &Run) -> anyhow::Result<Option<Self>> {
        run.kept(GIVING).await
    }

    /// Gives all their names. Nobody can connect to them yet.
    ///
    /// # Errors
    ///
    /// A name is taken; a shard cannot be reached.
    pub(crate) async fn name(&self, run: &Run, peers: &Peers, number: i64) -> anyhow::Result<()> {
        run.check().await?;
        self.ask(peers, number, Request::Publish, false).await
    }

    /// Gives all to their user.
    ///
    /// # Errors
    ///
    /// A lost claim; a shard cannot be reached.
    pub(crate) async fn give(&self, run: &Run, peers: &Peers, number: i64) -> anyhow::Result<()> {
        // Through the claim, so it is the last look, too.
        run.keep(GIVING, self).await?;
        self.ask(peers, number, Request::Release, false).await
    }

    /// Gives what an earlier run may have given. A database that is not there any more was its user's already, and they
    /// have removed it.
    ///
    /// # Errors
    ///
    /// A shard cannot be reached; a later run has been there.
    pub(crate) async fn give_again(&self, peers: &Peers, number: i64) -> anyhow::Result<()> {
        self.ask(peers, number, Request::Release, true).await
    }

    async fn ask(
        &self,
        peers: &Peers,
        number: i64,
        step: fn(Box<Publish>) -> Request,
        may_be_gone: bool,
    ) -> anyhow::Result<()> {
        let view = peers.cluster().view();
        for (shard, database) in &self.databases {
            let node = leader_of(&view, shard, "A database that is whole waits there for its name.")?;
            let request = step(Box::new(Publish { run: number, ..database.clone() }));
            let asked: anyhow::Result<()> = target::ask(peers, node, &request, ASK_DEADLINE).await;
            if let Err(error) = asked {
                let is_gone = PgError::of(&error).is_some_and(|said| said.code == SqlState::UNDEFINED_DATABASE);
                if !is_gone || !may_be_gone {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}
