//! How long, and at what price for others, a point is held.
//!
//! What founders see, VACUUM must leave on a primary, and on a standby with `hot_standby_feedback` on the primary that it
//! follows. So a point has an age that it may reach, and a number of transactions that may begin meanwhile. Beyond either it
//! is given up: its sessions end, and whoever asks for it is told why. Nothing is tried again then, because another
//! point would come to the same.
//!
//! Where `max_standby_streaming_delay` makes replay wait for queries, what a founder sees may also keep a standby from
//! replaying at all. How much WAL may wait then is limited, too; but that is chance, and another point may be taken.

use std::sync::{Arc, Weak};
use std::time::Duration;

use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep, timeout};

use super::Lease;
use super::pool::Pool;
use super::types::{AGE_SETTING, PointLimits, WAL_SETTING, XMIN_SETTING, point_lost};

/// How often it is asked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A server that does not answer by then is asked again; its point ages all the same.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// Replay that is behind and has not moved for so long stands; one that moves catches up by itself.
const STANDSTILL: Duration = Duration::from_secs(5);

/// How many transactions have begun since the oldest snapshot of the job's sessions on this server, if that keeps
/// anything on a primary: of a standby without feedback it does not. On a standby they are counted as they are replayed.
///
/// Then, of a standby whose replay is not paused: the bytes that wait to be replayed, and where it is. And whether replay
/// waits now for what the job may be: for a lock that it holds, or for queries, of which none that sees the job's databases
/// is older than the job. For which of several queries it waits PostgreSQL does not tell.
const HELD: &str = "
    WITH ours AS (
        SELECT pid, datid, pg_catalog.age(backend_xmin) AS age FROM pg_catalog.pg_stat_activity
        WHERE application_name = $1),
    oldest AS (SELECT coalesce(max(age), 0) AS age FROM ours),
    replay AS (
        SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_get_wal_replay_pause_state() <> 'paused'
                    ELSE false END AS goes)
    SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery() OR pg_catalog.current_setting('hot_standby_feedback')::bool
                THEN oldest.age ELSE 0 END::int8,
           CASE WHEN goes THEN coalesce(pg_catalog.pg_wal_lsn_diff(
                pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn()), 0) ELSE 0 END::int8,
           CASE WHEN goes THEN pg_catalog.pg_last_wal_replay_lsn() END::text,
           EXISTS (
               SELECT FROM pg_catalog.pg_stat_activity s WHERE s.backend_type = 'startup' AND CASE
                   WHEN s.wait_event_type = 'Lock' THEN EXISTS (
                       SELECT FROM pg_catalog.pg_locks w JOIN pg_catalog.pg_locks h
                       ON h.locktype = w.locktype AND h.database = w.database AND h.relation = w.relation AND h.granted
                       WHERE w.pid = s.pid AND NOT w.granted AND h.pid IN (SELECT pid FROM ours))
                   WHEN s.wait_event_type = 'BufferPin' OR s.wait_event LIKE 'RecoveryConflict%' THEN NOT EXISTS (
                       SELECT FROM pg_catalog.pg_stat_activity a
                       WHERE pg_catalog.age(a.backend_xmin) > oldest.age AND a.datid IN (SELECT datid FROM ours))
                   ELSE false END)
    FROM oldest, replay";

/// What a server keeps, or keeps waiting, for a point.
#[derive(Default)]
struct Held {
    transactions: u64,
    waiting: u64,
    replayed: Option<String>,
    is_in_the_way: bool,
}

/// Gives a lease of `server` up when it is held for too long.
pub(super) async fn watch(lease: Weak<Lease>, job: i64, limits: PointLimits, server: String) {
    let (begun, name) = (Instant::now(), format!("backhaul job {job}"));
    let mut stood = Stood::default();
    while limits != PointLimits::default() {
        sleep(LOOK_EVERY).await;
        // Not the lease itself is held while the server is asked: it may end meanwhile.
        let Some(pool) = lease.upgrade().and_then(|lease| lease.pools.values().next().cloned()) else { return };
        let held = timeout(LOOK_DEADLINE, held(&pool, &name)).await.ok().flatten();
        let held = held.unwrap_or_default();
        let stands = stood.stands(held.replayed.as_deref(), Instant::now()) && held.is_in_the_way;
        let stopped = || Some(point_lost(&server, &beyond_wal(held.waiting, &limits).filter(|_| stands)?));
        let Some(error) = beyond(begun.elapsed(), held.transactions, &limits).or_else(stopped) else { continue };
        tracing::warn!(job, "a point is given up: {}", error.message);
        if let Some(lease) = lease.upgrade() {
            lease.give_up(error);
        }
        return;
    }
}

/// `None` where the server does not say.
async fn held(pool: &Arc<Pool>, name: &str) -> Option<Held> {
    let guard = pool.guard().await.ok()?;
    let row = guard.row(HELD, &[&name]).await.ok()?;
    let count = |column| u64::try_from(row.get::<_, i64>(column)).unwrap_or(0);
    Some(Held { transactions: count(0), waiting: count(1), replayed: row.get(2), is_in_the_way: row.get(3) })
}

/// Since when replay has been where it is.
#[derive(Default)]
struct Stood(Option<(String, Instant)>);

impl Stood {
    /// Whether replay, found at `replayed` now, has not moved for [`STANDSTILL`].
    fn stands(&mut self, replayed: Option<&str>, now: Instant) -> bool {
        match (&self.0, replayed) {
            (Some((before, since)), Some(replayed)) if before == replayed => now.duration_since(*since) >= STANDSTILL,
            (_, replayed) => {
                self.0 = replayed.map(|replayed| (replayed.to_owned(), now));
                false
            }
        }
    }
}

/// What is said of a point for which replay stands, if too much waits.
fn beyond_wal(waiting: u64, limits: &PointLimits) -> Option<String> {
    let most = limits.wal_bytes;
    (most > 0 && waiting > most).then(|| {
        format!(
            "The server waits for it to replay on, and {waiting} bytes of WAL wait, more than {WAL_SETTING}, which is {most}."
        )
    })
}

/// What a point is given up with.
fn beyond(age: Duration, transactions: u64, limits: &PointLimits) -> Option<PgError> {
    let given_up = |message: &str, detail: String, setting: &str| {
        PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
            .detail(detail)
            .hint(format!("SET CLUSTER SETTING {setting} allows more; a backup of fewer tables is done sooner."))
    };
    let most = Duration::from_millis(limits.age_ms);
    if limits.age_ms > 0 && age >= most {
        let detail = format!("It is {:.1} s old, and may be {:.1} s.", age.as_secs_f64(), most.as_secs_f64());
        return Some(given_up("the backup's point has become too old", detail, AGE_SETTING));
    }
    if limits.xmin_age > 0 && transactions > limits.xmin_age {
        let most = limits.xmin_age;
        let detail =
            format!("Dead rows of the last {transactions} transactions are kept for it, and may be of {most}.");
        let message = "the backup's point keeps too much from being vacuumed on the primary";
        return Some(given_up(message, detail, XMIN_SETTING));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_given_up_beyond_its_limits() {
        let limits = PointLimits { age_ms: 1500, xmin_age: 10, wal_bytes: 0 };
        let unlimited = PointLimits::default();
        let (young, old) = (Duration::from_millis(1499), Duration::from_millis(1500));
        for (age, transactions, limits, detail) in [
            (young, 10, &limits, None),
            (old, u64::MAX, &unlimited, None),
            (old, 0, &limits, Some("It is 1.5 s old, and may be 1.5 s.")),
            (young, 11, &limits, Some("Dead rows of the last 11 transactions are kept for it, and may be of 10.")),
        ] {
            let error = beyond(age, transactions, limits);
            assert_eq!(error.as_ref().and_then(|error| error.detail.as_deref()), detail);
            assert!(error.is_none_or(|error| error.code == SqlState::CONFIGURATION_LIMIT_EXCEEDED));
        }
    }

    #[test]
    fn replay_stands_that_has_not_moved_for_a_while() {
        let begun = Instant::now();
        let mut stood = Stood::default();
        for (after, replayed, stands) in [
            (0, Some("0/1"), false),
            (4, Some("0/1"), false),
            (5, Some("0/1"), true),
            (6, Some("0/2"), false),
            (10, Some("0/2"), false),
            // A server that does not say where it is may have moved.
            (11, None, false),
            (12, Some("0/2"), false),
            (17, Some("0/2"), true),
        ] {
            assert_eq!(stood.stands(replayed, begun + Duration::from_secs(after)), stands, "{after}");
        }
        for (waiting, most, is_beyond) in [(10, 10, false), (11, 10, true), (u64::MAX, 0, false)] {
            let limits = PointLimits { wal_bytes: most, ..PointLimits::default() };
            assert_eq!(beyond_wal(waiting, &limits).is_some(), is_beyond, "{waiting} of {most}");
        }
    }
}
