//! How long, and at what price for others, a point is held.
//!
//! What founders see, VACUUM must leave on a primary, and on a standby with `hot_standby_feedback` on the primary that it
//! follows. So a point has an age that it may reach, and a number of transactions that may begin meanwhile. Beyond either it
//! is given up: its sessions end, and whoever asks for it is told why. Nothing is tried again then, because another
//! point would come to the same.

use std::sync::{Arc, Weak};
use std::time::Duration;

use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep, timeout};

use super::Lease;
use super::pool::Pool;
use super::types::{AGE_SETTING, PointLimits, XMIN_SETTING};

/// How often it is asked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A server that does not answer by then is asked again; its point ages all the same.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// How many transactions have begun since the oldest snapshot of the job's sessions on this server, if that keeps
/// anything on a primary: of a standby without feedback it does not. On a standby they are counted as they are replayed.
const HELD: &str = "
    SELECT coalesce(max(pg_catalog.age(backend_xmin)), 0)::int8 FROM pg_catalog.pg_stat_activity
    WHERE application_name = $1 AND (NOT pg_catalog.pg_is_in_recovery()
                                     OR pg_catalog.current_setting('hot_standby_feedback')::bool)";

/// Gives a lease up when it is held for too long.
pub(super) async fn watch(lease: Weak<Lease>, job: i64, limits: PointLimits) {
    let (begun, name) = (Instant::now(), format!("backhaul job {job}"));
    while limits != PointLimits::default() {
        sleep(LOOK_EVERY).await;
        // Not the lease itself is held while the server is asked: it may end meanwhile.
        let Some(pool) = lease.upgrade().and_then(|lease| lease.pools.values().next().cloned()) else { return };
        let transactions = held(&pool, &name).await;
        let Some(error) = beyond(begun.elapsed(), transactions, &limits) else { continue };
        tracing::warn!(job, "a point is given up: {}", error.message);
        if let Some(lease) = lease.upgrade() {
            lease.give_up(error);
        }
        return;
    }
}

/// Not known where the server does not say.
async fn held(pool: &Arc<Pool>, name: &str) -> u64 {
    let asked = timeout(LOOK_DEADLINE, asked(pool, name)).await;
    asked.unwrap_or_default()
}

async fn asked(pool: &Arc<Pool>, name: &str) -> u64 {
    let Ok(guard) = pool.guard().await else { return 0 };
    let rows = guard.rows(HELD, &[&name]).await.unwrap_or_default();
    rows.first().and_then(|row| u64::try_from(row.get::<_, i64>(0)).ok()).unwrap_or(0)
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
        let limits = PointLimits { age_ms: 1500, xmin_age: 10 };
        let unlimited = PointLimits { age_ms: 0, xmin_age: 0 };
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
}
