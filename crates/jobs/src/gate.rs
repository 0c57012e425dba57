//! The gateway check: may this node run the job, and who may if not.

use anyhow::Context as _;
use cluster::{Filter, Locality, NodeId, Role};
use pgerror::{PgError, SqlState};
use uuid::Uuid;

use crate::job::JobId;
use crate::runner::Jobs;

/// A node that has died between being chosen and being written down is chosen against this often at most.
const CHOICES_MAX: usize = 5;

/// A live node whose locality matches a job's filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    id: NodeId,
    holds_replica: bool,
    /// Jobs that it coordinates.
    load: i64,
}

/// The text of CockroachDB, when planning or (later) running finds nobody.
pub(crate) fn nobody(filter: &Filter) -> PgError {
    PgError::new(SqlState::UNCATEGORIZED, format!("no instances found matching locality filter {filter}"))
        .hint("SHOW NODES lists the nodes with their localities.")
}

/// The text of CockroachDB, with where to look next.
pub(crate) fn relocated(job: JobId, to: NodeId) -> PgError {
    PgError::new(SqlState::UNCATEGORIZED, format!("execution of job {job} relocated to {to}"))
        .detail("The job goes on there; only this statement's wait for it has ended.")
        .hint(format!(
            "Use SHOW JOB WHEN COMPLETE {job} to wait for its end, or give the option DETACHED to be told the id only."
        ))
}

impl Jobs {
    /// Sees to it that some live node matches the filter of a job that is to be made.
    ///
    /// # Errors
    ///
    /// XXUUU `no instances found matching locality filter …`, or the registry is not reachable.
    pub async fn check_filter(&self, filter: &Filter) -> anyhow::Result<()> {
        match filter.is_empty() || !self.candidates(filter, &[]).await?.is_empty() {
            true => Ok(()),
            false => Err(nobody(filter).into()),
        }
    }

    /// The live nodes that a job with this filter may be handed to, in the order in which it would be.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn coordinators(&self, filter: &Filter, prefers: &[String]) -> anyhow::Result<Vec<NodeId>> {
        Ok(self.candidates(filter, prefers).await?.into_iter().map(|candidate| candidate.id).collect())
    }

    /// Live nodes that match, the best coordinator first: one that holds a replica of the data, then the least loaded.
    async fn candidates(&self, filter: &Filter, prefers: &[String]) -> anyhow::Result<Vec<Candidate>> {
        let query = "
            SELECT n.id, n.locality, n.shard,
                   (SELECT count(*) FROM registry.jobs j WHERE j.coordinator_id = n.id AND j.finished IS NULL)
            FROM registry.nodes n JOIN registry.sessions s ON s.node_id = n.id
            WHERE s.expires_at > clock_timestamp()";
        let rows = self.ledger().query(query, &[]).await.context("list the live nodes")?;
        let view = self.cluster().view();
        let mut found: Vec<Candidate> = rows
            .iter()
            .filter_map(|row| {
                let id = NodeId(row.get(0));
                let locality: Locality = row.get::<_, &str>(1).parse().ok()?;
                let known = view.node(id);
                // A session outlives its node for a while; a broken connection tells earlier.
                let alive = known.is_some_and(|known| known.reachable);
                let role = known.map_or(Role::None, |known| view.role(&known.info));
                let serves = matches!(role, Role::Leaseholder | Role::Voting | Role::NonVoting);
                let holds_replica = serves && prefers.iter().any(|shard| shard == row.get::<_, &str>(2));
                let matches = alive && locality.first_unmatched(filter).is_none();
                matches.then_some(Candidate { id, holds_replica, load: row.get(3) })
            })
            .collect();
        found.sort_by_key(|candidate| (!candidate.holds_replica, candidate.load, candidate.id));
        Ok(found)
    }

    /// Writes the claim over to a matching node and rings for it; `None` when there is none now.
    ///
    /// # Errors
    ///
    /// The registry is not reachable. A claim that was lost meanwhile is no error: then it is somebody's anyway, and
    /// the chosen node is given although it is not the one.
    pub(crate) async fn relocate(
        &self,
        job: JobId,
        claim: Uuid,
        filter: &Filter,
        prefers: &[String],
    ) -> anyhow::Result<Option<NodeId>> {
        let hand_over = "
            UPDATE registry.jobs j SET claim_id = $3, claim_session = s.id, coordinator_id = s.node_id,
                   modified = clock_timestamp(), unmatched_since = NULL
            FROM registry.sessions s
            WHERE j.id = $1 AND j.claim_id = $2 AND s.node_id = $4 AND s.expires_at > clock_timestamp() RETURNING j.id";
        for _ in 0..CHOICES_MAX {
            let Some(chosen) = self.candidates(filter, prefers).await?.first().copied() else { return Ok(None) };
            let written = self.ledger().query(hand_over, &[&job.0, &claim, &Uuid::new_v4(), &chosen.id.0]).await?;
            if !written.is_empty() {
                self.ledger().notify().await;
                tracing::info!(%job, to = %chosen.id, %filter, "job does not match here and is relocated");
                return Ok(Some(chosen.id));
            }
        }
        Ok(None)
    }
}
