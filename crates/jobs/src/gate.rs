//! Who runs a job: the gateway check (may this node, and who may if not), and the choice for a job that nobody was chosen
//! for yet.
//!
//! An attached job is its gateway's if that matches. Any other one is first claimed by whichever node looks first, and that
//! one chooses: by the same order as a job is handed over in. It does so **once**: who is chosen stands in the row, and a
//! job with a coordinator in its row is not chosen for. So the one that it was handed to runs it (or, if it does not
//! match after all, hands it over as the gateway check says), whoever takes it over from the dead runs it, and two nodes
//! that see the fleet differently do not send it to and fro. Only what says that it has no coordinator any more is
//! chosen for anew: `RESUME`, and a wait for a node that matches.
//!
//! A node that dies on the way leaves a claim of its own or of the chosen node's, and both end with a session.

use std::collections::HashMap;

use anyhow::Context as _;
use cluster::{Filter, Locality, NodeId, Role};
use pgerror::{PgError, SqlState};
use uuid::Uuid;

use crate::job::JobId;
use crate::runner::{Claimed, Jobs};

/// A node that has died between being chosen and being written down is chosen against this often at most.
const CHOICES_MAX: usize = 5;

/// A node that has a session, and answers this one.
#[derive(Clone, Debug)]
struct Live {
    id: NodeId,
    locality: Locality,
    /// The shard of which it holds a replica.
    shard: Option<String>,
    /// Jobs that it coordinates.
    load: i64,
}

/// A job that this node has claimed, and nobody was chosen for.
pub(crate) struct Unplaced {
    pub(crate) id: JobId,
    pub(crate) claim: Uuid,
    pub(crate) filter: Filter,
    pub(crate) prefers: Vec<String>,
}

/// The rule: those that match, the best coordinator first, which is one that holds a replica of the data, then the least
/// loaded.
fn candidates(live: &[Live], filter: &Filter, prefers: &[String]) -> Vec<NodeId> {
    let mut found: Vec<&Live> = live.iter().filter(|node| node.locality.first_unmatched(filter).is_none()).collect();
    found.sort_by_key(|node| {
        let holds_replica = node.shard.as_ref().is_some_and(|shard| prefers.contains(shard));
        (!holds_replica, node.load, node.id)
    });
    found.into_iter().map(|node| node.id).collect()
}

/// The best coordinator of each, by claim, where anybody matches. Older ones are first, and each counts for the next.
fn places(mut live: Vec<Live>, mut jobs: Vec<Unplaced>) -> HashMap<Uuid, NodeId> {
    jobs.sort_by_key(|job| job.id);
    let mut chosen = HashMap::new();
    for job in jobs {
        let Some(best) = candidates(&live, &job.filter, &job.prefers).first().copied() else { continue };
        live.iter_mut().filter(|node| node.id == best).for_each(|node| node.load += 1);
        chosen.insert(job.claim, best);
    }
    chosen
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
        match filter.is_empty() || !self.coordinators(filter, &[]).await?.is_empty() {
            true => Ok(()),
            false => Err(nobody(filter).into()),
        }
    }

    /// The live nodes that a job with this filter may be handed to, the best coordinator first.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn coordinators(&self, filter: &Filter, prefers: &[String]) -> anyhow::Result<Vec<NodeId>> {
        Ok(candidates(&self.live(&[]).await?, filter, prefers))
    }

    /// The live nodes. Some jobs may be left out of what they coordinate.
    async fn live(&self, uncounted: &[i64]) -> anyhow::Result<Vec<Live>> {
        let query = "
            SELECT n.id, n.locality, n.shard,
                   (SELECT count(*) FROM registry.jobs j
                    WHERE j.coordinator_id = n.id AND j.finished IS NULL AND j.status <> 'paused' AND j.id <> ALL($1))
            FROM registry.nodes n JOIN registry.sessions s ON s.node_id = n.id
            WHERE s.expires_at > clock_timestamp()";
        let rows = self.ledger().query(query, &[&uncounted]).await.context("list the live nodes")?;
        let view = self.cluster().view();
        let live = rows
            .iter()
            .filter_map(|row| {
                let id = NodeId(row.get(0));
                let locality: Locality = row.get::<_, &str>(1).parse().ok()?;
                let known = view.node(id);
                // A session outlives its node for a while; a broken connection tells earlier.
                let alive = known.is_some_and(|known| known.reachable);
                let role = known.map_or(Role::None, |known| view.role(&known.info));
                let serves = matches!(role, Role::Leaseholder | Role::Voting | Role::NonVoting);
                let shard = serves.then(|| row.get(2));
                alive.then_some(Live { id, locality, shard, load: row.get(3) })
            })
            .collect();
        Ok(live)
    }

    /// Who is to run each of these, by claim; none for those that nobody matches now.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub(crate) async fn places(&self, jobs: Vec<Unplaced>) -> anyhow::Result<HashMap<Uuid, NodeId>> {
        if jobs.is_empty() {
            return Ok(HashMap::new());
        }
        // They would all count for this node, which has claimed them.
        let ids: Vec<i64> = jobs.iter().map(|job| job.id.0).collect();
        Ok(places(self.live(&ids).await?, jobs))
    }

    /// Writes a claim over to another node; false when that has no session any more, or the claim was lost.
    async fn hand_over(&self, job: JobId, claim: Uuid, to: NodeId) -> anyhow::Result<bool> {
        let write = "
            UPDATE registry.jobs j SET claim_id = $3, claim_session = s.id, coordinator_id = s.node_id,
                   modified = clock_timestamp(), unmatched_since = NULL
            FROM registry.sessions s
            WHERE j.id = $1 AND j.claim_id = $2 AND s.node_id = $4 AND s.expires_at > clock_timestamp() RETURNING j.id";
        let is_written = !self.ledger().query(write, &[&job.0, &claim, &Uuid::new_v4(), &to.0]).await?.is_empty();
        if is_written {
            self.ledger().notify().await;
        }
        Ok(is_written)
    }

    /// Hands a job over to the better coordinator that was chosen when it was claimed; false when there is none, or it
    /// is gone: then the job is this node's.
    ///
    /// # Errors
    ///
    /// The registry is not reachable. Then the next look finds the claim still here, and does not choose again; or it
    /// has gone over, although nobody was told.
    pub(crate) async fn hand_to_the_best(&self, claimed: &Claimed) -> anyhow::Result<bool> {
        let here = self.cluster().me().node_id;
        let Some(best) = claimed.best.filter(|best| Some(*best) != here) else { return Ok(false) };
        let is_there = self.hand_over(claimed.id, claimed.claim, best).await?;
        if is_there {
            tracing::info!(job = %claimed.id, to = %best, "job has a better coordinator and is handed over");
        }
        Ok(is_there)
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
        for _ in 0..CHOICES_MAX {
            let Some(chosen) = self.coordinators(filter, prefers).await?.first().copied() else { return Ok(None) };
            if self.hand_over(job, claim, chosen).await? {
                tracing::info!(%job, to = %chosen, %filter, "job does not match here and is relocated");
                return Ok(Some(chosen));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: i32, locality: &str, shard: &str, load: i64) -> Live {
        let shard = (!shard.is_empty()).then(|| shard.to_owned());
        Live { id: NodeId(id), locality: locality.parse().unwrap(), shard, load }
    }

    #[test]
    fn a_coordinator_matches_then_holds_a_replica_then_has_the_fewest_jobs() {
        let fleet = |loads: [i64; 5]| {
            vec![
                node(1, "region=east", "s1", loads[0]),
                node(2, "region=east", "s2", loads[1]),
                node(3, "region=west,zone=a", "s1", loads[2]),
                node(4, "region=west,zone=b", "", loads[3]),
                node(5, "region=west,zone=b", "", loads[4]),
            ]
        };
        for (loads, filter, prefers, expected) in [
            ([0, 0, 0, 0, 0], "", &["s1"][..], vec![1, 3, 2, 4, 5]),
            ([0, 0, 0, 0, 0], "", &["s1", "s2"], vec![1, 2, 3, 4, 5]),
            ([0, 0, 0, 0, 0], "", &[], vec![1, 2, 3, 4, 5]),
            ([0, 0, 0, 0, 0], "region=west", &["s1"], vec![3, 4, 5]),
            // Data before load, load before number.
            ([0, 0, 9, 0, 0], "region=west", &["s1"], vec![3, 4, 5]),
            ([0, 0, 9, 1, 0], "region=west", &["s2"], vec![5, 4, 3]),
            ([2, 0, 1, 0, 0], "", &["s1"], vec![3, 1, 2, 4, 5]),
            ([0, 0, 0, 0, 0], "region=mars", &["s1"], vec![]),
        ] {
            let prefers: Vec<String> = prefers.iter().map(|shard| (*shard).to_owned()).collect();
            let found: Vec<i32> =
                candidates(&fleet(loads), &filter.parse().unwrap(), &prefers).iter().map(|id| id.0).collect();
            assert_eq!(found, expected, "{loads:?} {filter} {prefers:?}");
        }
    }

    #[test]
    fn jobs_that_are_claimed_together_are_spread_the_oldest_first() {
        let live = vec![node(4, "zone=b", "", 0), node(5, "zone=b", "", 1), node(6, "zone=c", "", 0)];
        let job = |number: i64, filter: &str| {
            let (id, claim) = (JobId(number), Uuid::from_u128(number.unsigned_abs().into()));
            Unplaced { id, claim, filter: filter.parse().unwrap(), prefers: Vec::new() }
        };
        // As the registry gives them: in no order. Nobody matches the last.
        let jobs = vec![job(13, "zone=b"), job(11, "zone=b"), job(14, "zone=b"), job(12, "zone=b"), job(15, "zone=d")];
        let chosen = places(live, jobs);
        let of = |number: u128| chosen.get(&Uuid::from_u128(number)).map(|node| node.0);
        assert_eq!([11, 12, 13, 14, 15].map(of), [Some(4), Some(4), Some(5), Some(4), None]);
    }
}
