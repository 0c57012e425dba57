//! Jobs that are undecided: made inside a transaction of a client's that has not ended, as far as is known.
//!
//! **The rule.** PostgreSQL decides, by the number of the subtransaction in which the job was made
//! ([`crate::Transaction`]): what `pg_xact_status` says of it on the shard's leaseholder is done. So nobody has to have
//! seen a COMMIT, a ROLLBACK TO or the end of a connection, and a prepared transaction, a chain of them or a COMMIT
//! whose answer was lost need nothing of their own. The gateway that sees a transaction end settles at once; whoever
//! reads an undecided job settles it before it answers; otherwise the gateway looks from time to time, and when its
//! session has ended, anybody does.
//!
//! **What makes the number trustworthy.** It was open on the leaseholder, and on that server's disk, before the row was
//! written ([`Jobs::prove`]): a server that crashes does not use it a second time. A commit that still waits for a
//! synchronous standby is taken for what other sessions take it for, an open transaction. A server that is in recovery, or
//! on a lower timeline than the one that the number is of, is not asked. A promoted standby knows what it has
//! received; one that was asynchronous may have lost the transaction, and use its number for another: a job that is
//! begun on the word of a later timeline says so.
//!
//! Everything here may be done by several nodes at once, and twice.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cluster::registry::Session;
use cluster::{PeerSession, Purpose, spoken};
use pgerror::{PgError, SqlState};
use tokio::time::timeout;
use tokio_postgres::Row;

use crate::birth::Transaction;
use crate::job::JobId;
use crate::runner::Jobs;

/// The status of a job that is not there yet.
pub(crate) const UNDECIDED: &str = "undecided";

/// A leaseholder that has not answered by then is asked again later; a reader goes on without it.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// So many undecided jobs are looked at in one turn; the next one takes more.
const DUE_MAX: i64 = 100;

/// When an undecided job is looked at again: the longer it has been, the later, because a transaction that is open for
/// hours will be for minutes more.
const NEXT_LOOK: &str =
    "clock_timestamp() + greatest(interval '1 s', least(interval '30 s', (clock_timestamp() - made) / 4))";

/// A text of several statements that has not come to its end by then never will, and its jobs go.
const TOLD_MAX: &str = "1 hour";

const COLUMNS: &str = "job_id, shard, timeline, top, part";

/// An undecided job.
struct Undecided {
    id: JobId,
    /// None where its gateway decides.
    transaction: Option<Transaction>,
}

/// What becomes of an undecided job.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is there from now on; perhaps with a remark.
    Publish(Option<String>),
    /// It never was.
    Remove,
    /// It stays undecided.
    Wait,
    /// Nobody can tell any more: it is there, and has failed.
    Forgotten,
}

/// What a leaseholder says of a transaction.
#[derive(Debug)]
enum Told {
    /// What `pg_xact_status` does; NULL means that it is too long ago.
    Status(Option<String>),
    /// Its number is ahead of all that were ever given out.
    Never,
}

/// The rule.
fn verdict(transaction: &Transaction, timeline: i32, told: &Told) -> Verdict {
    // An overtaken server, or one that was set back: not the one to ask.
    if timeline < transaction.timeline {
        return Verdict::Wait;
    }
    let status = match told {
        Told::Never => return Verdict::Remove,
        Told::Status(None) => return Verdict::Forgotten,
        Told::Status(Some(status)) => status.as_str(),
    };
    match status {
        "committed" => Verdict::Publish((timeline > transaction.timeline).then(|| {
            let Transaction { shard, timeline: before, .. } = transaction;
            format!(
                "the job was made in a transaction on timeline {before} of shard \"{shard}\", and is begun on the word \
                 of timeline {timeline}"
            )
        })),
        "aborted" => Verdict::Remove,
        _ => Verdict::Wait,
    }
}

impl Jobs {
    /// Sees to it that a transaction is open on its shard's leaseholder, under this number, for good.
    pub(crate) async fn prove(&self, transaction: &Transaction) -> anyhow::Result<()> {
        let asked = timeout(ASK_DEADLINE, async {
            let session = self.leaseholder(&transaction.shard).await?;
            // Its own commit flushes all WAL before it, and that has the number in it.
            let flush =
                "SET synchronous_commit = local; SELECT pg_catalog.pg_logical_emit_message(true, 'backhaul', '')";
            session.batch_execute(flush).await.map_err(spoken)?;
            let timeline = timeline_of(&session).await?;
            let told = told_of(&session, transaction).await?;
            let is_open = matches!(told, Told::Status(Some(status)) if status == "in progress");
            anyhow::Ok(is_open && timeline == transaction.timeline)
        });
        let shard = &transaction.shard;
        match asked.await {
            Ok(Ok(true)) => return Ok(()),
            Ok(Ok(false)) => {
                let message = format!("the transaction is not open on the leaseholder of shard \"{shard}\"");
                let error = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
                return Err(error.hint("Connect again to reach the leaseholder.").into());
            }
            Ok(Err(error)) => tracing::info!(%shard, "could not ask for a transaction: {error:#}"),
            Err(_) => tracing::info!(%shard, "a transaction was asked for in vain"),
        }
        Err(PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached"))
            .detail("Its leaseholder would have to say whether the transaction has committed, and does not answer.")
            .into())
    }

    /// Does with these jobs what their transactions' ends oblige to, as far as they are undecided and can be decided
    /// now. Others are not touched.
    ///
    /// # Errors
    ///
    /// The registry is not reachable. A shard that is not reachable is no error: its jobs stay undecided.
    pub async fn settle(&self, ids: &[JobId]) -> anyhow::Result<()> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let query = format!("SELECT {COLUMNS} FROM registry.transactions WHERE job_id = ANY($1) AND shard IS NOT NULL");
        let found = self.ledger().query(&query, &[&ids]).await?;
        self.decide(found.iter().map(undecided).collect()).await
    }

    /// The same with those that are due: this node's own, and those of gateways that are gone.
    pub(crate) async fn settle_due(&self, session: &Session) -> anyhow::Result<()> {
        let due = format!(
            "WITH due AS (
                SELECT t.job_id FROM registry.transactions t
                WHERE t.next_look <= clock_timestamp()
                  AND (t.gateway = $1 AND t.shard IS NOT NULL
                       OR t.shard IS NULL AND t.made < clock_timestamp() - interval '{TOLD_MAX}'
                       OR NOT EXISTS (SELECT FROM registry.sessions s
                                      WHERE s.id = t.gateway AND s.expires_at > clock_timestamp()))
                ORDER BY t.next_look LIMIT $2 FOR UPDATE SKIP LOCKED)
             UPDATE registry.transactions t SET next_look = {NEXT_LOOK} FROM due WHERE t.job_id = due.job_id
             RETURNING t.job_id, t.shard, t.timeline, t.top, t.part"
        );
        let found = self.ledger().query(&due, &[&session.id, &DUE_MAX]).await?;
        if found.is_empty() {
            return Ok(());
        }
        self.decide(found.iter().map(undecided).collect()).await
    }

    async fn decide(&self, found: Vec<Undecided>) -> anyhow::Result<()> {
        let mut shards: BTreeMap<String, Vec<(JobId, Transaction)>> = BTreeMap::new();
        for Undecided { id, transaction } in found {
            match transaction {
                Some(transaction) => shards.entry(transaction.shard.clone()).or_default().push((id, transaction)),
                None => self.carry_out(id, &Verdict::Remove).await?,
            }
        }
        for (shard, jobs) in &shards {
            // What was told before the time is over counts: far from a leaseholder there may be much to ask.
            let mut decided = Vec::new();
            match timeout(ASK_DEADLINE, self.ask(shard, jobs, &mut decided)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::info!(%shard, "jobs stay undecided: {error:#}"),
                Err(_) => tracing::info!(%shard, "jobs stay undecided: the leaseholder does not answer in time"),
            }
            for (id, verdict) in decided {
                self.carry_out(id, &verdict).await?;
            }
        }
        Ok(())
    }

    async fn ask(
        &self,
        shard: &str,
        jobs: &[(JobId, Transaction)],
        decided: &mut Vec<(JobId, Verdict)>,
    ) -> anyhow::Result<()> {
        let session = self.leaseholder(shard).await?;
        let timeline = timeline_of(&session).await?;
        for (id, transaction) in jobs {
            decided.push((*id, verdict(transaction, timeline, &told_of(&session, transaction).await?)));
        }
        Ok(())
    }

    async fn carry_out(&self, id: JobId, verdict: &Verdict) -> anyhow::Result<()> {
        let no_longer = "WITH gone AS (DELETE FROM registry.transactions WHERE job_id = $1)";
        match verdict {
            Verdict::Wait => {}
            Verdict::Publish(remark) => {
                let publish = format!(
                    "{no_longer} UPDATE registry.jobs SET status = 'running', modified = clock_timestamp(),
                            execution_errors = CASE WHEN $2::text IS NULL THEN execution_errors ELSE ARRAY[$2] END
                     WHERE id = $1 AND status = 'undecided' RETURNING id"
                );
                if !self.ledger().query(&publish, &[&id.0, remark]).await?.is_empty() {
                    tracing::info!(job = %id, "job is there: its transaction has committed");
                    self.remember(id);
                    self.ledger().notify().await;
                }
            }
            Verdict::Remove => self.forget(&[id]).await?,
            Verdict::Forgotten => {
                let fail = format!(
                    "{no_longer} UPDATE registry.jobs SET status = 'failed', sealed = NULL, finished = clock_timestamp(),
                            modified = clock_timestamp(),
                            error = 'whether the transaction in which the job was made has committed is not known any more'
                     WHERE id = $1 AND status = 'undecided' RETURNING id"
                );
                if !self.ledger().query(&fail, &[&id.0]).await?.is_empty() {
                    tracing::warn!(job = %id, "the server does not know any more whether a job's transaction has committed");
                }
            }
        }
        Ok(())
    }

    /// These jobs never were, if they are undecided.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn forget(&self, ids: &[JobId]) -> anyhow::Result<()> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let remove = "DELETE FROM registry.jobs WHERE id = ANY($1) AND status = 'undecided' RETURNING id";
        for row in self.ledger().query(remove, &[&ids]).await? {
            tracing::info!(job = row.get::<_, i64>(0), "job was made in a transaction that did not commit");
        }
        Ok(())
    }

    async fn leaseholder(&self, shard: &str) -> anyhow::Result<PeerSession> {
        let view = self.cluster().view();
        let Some(leader) = view.leader(shard) else { bail!("shard \"{shard}\" has no leaseholder now") };
        let purpose = Purpose::Server { database: "postgres".to_owned() };
        self.dialer().dial(&leader.address, &purpose).await
    }
}

/// The server's timeline.
///
/// # Errors
///
/// It does not answer, or is in recovery.
async fn timeline_of(session: &PeerSession) -> anyhow::Result<i32> {
    let query = "SELECT pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8)";
    let row = session.query_one(query, &[]).await.map_err(spoken).context("ask for the timeline")?;
    i32::from_str_radix(row.get(0), 16).context("read the timeline")
}

/// What the server says of a transaction.
async fn told_of(session: &PeerSession, transaction: &Transaction) -> anyhow::Result<Told> {
    // A commit counts when others see it. While a synchronous standby is awaited the status alone may be `committed`
    // already, in some releases. A snapshot knows whole transactions only.
    let query = "
        SELECT CASE WHEN status = 'committed'
                     AND NOT pg_catalog.pg_visible_in_snapshot($2::text::xid8, pg_catalog.pg_current_snapshot())
                    THEN 'in progress' ELSE status END
        FROM (SELECT pg_catalog.pg_xact_status($1::text::xid8) AS status OFFSET 0) AS told";
    let (part, top) = (transaction.part.to_string(), transaction.top.to_string());
    match session.query_one(query, &[&part, &top]).await {
        Ok(row) => Ok(Told::Status(row.get(0))),
        Err(error) if error.code().is_some_and(|code| code.code() == "22023") => Ok(Told::Never),
        Err(error) => Err(spoken(error)).context("ask what became of a transaction"),
    }
}

fn undecided(row: &Row) -> Undecided {
    let transaction = || {
        Some(Transaction {
            shard: row.get::<_, Option<_>>(1)?,
            timeline: row.get(2),
            top: row.get(3),
            part: row.get(4),
        })
    };
    Undecided { id: JobId(row.get(0)), transaction: transaction() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_s_word_decides() {
        let transaction = Transaction { shard: "s1".to_owned(), timeline: 3, top: 740, part: 742 };
        let later =
            "the job was made in a transaction on timeline 3 of shard \"s1\", and is begun on the word of timeline 4";
        let status = |text: &str| Told::Status(Some(text.to_owned()));
        for (timeline, told, expected) in [
            (3, status("in progress"), Verdict::Wait),
            (3, status("committed"), Verdict::Publish(None)),
            (3, status("aborted"), Verdict::Remove),
            (3, Told::Status(None), Verdict::Forgotten),
            (3, Told::Never, Verdict::Remove),
            // After a failover.
            (4, status("in progress"), Verdict::Wait),
            (4, status("committed"), Verdict::Publish(Some(later.to_owned()))),
            (4, status("aborted"), Verdict::Remove),
            (4, Told::Never, Verdict::Remove),
            // A server that was overtaken knows nothing.
            (2, status("committed"), Verdict::Wait),
            (2, status("aborted"), Verdict::Wait),
            (2, Told::Never, Verdict::Wait),
        ] {
            assert_eq!(verdict(&transaction, timeline, &told), expected, "{timeline} {told:?}");
        }
    }
}
