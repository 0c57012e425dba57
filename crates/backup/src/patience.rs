//! Asking again while what fails may pass: a store that refuses for some seconds, a lock, a server that restarts.
//!
//! **Stores.** Each use that a job makes of its store is repeated for some seconds. A store that stays away then fails a
//! job that has never come to it: its URI may be wrong, and whoever has written it should not wait for minutes. A job
//! that has come to it before has something to lose; it is begun again as a whole ([`jobs::Retryable`]), for as long as
//! jobs are.

use std::time::Duration;

use jobs::Retryable;
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep};

/// So long after its first failure something is tried again; what takes long to fail is tried a few times all the same.
const PATIENCE: Duration = Duration::from_secs(30);
const TRIES_MIN: u32 = 4;

/// Waits between tries double up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What a server refuses now and may grant later, whatever it is asked for: all its connections are taken, somebody has a
/// lock, others are in the way for a moment, or it restarts.
const SERVER_PASSING: [SqlState; 8] = [
    SqlState::TOO_MANY_CONNECTIONS,
    SqlState::LOCK_NOT_AVAILABLE,
    SqlState::OBJECT_IN_USE,
    SqlState::SERIALIZATION_FAILURE,
    SqlState::DEADLOCK_DETECTED,
    SqlState::ADMIN_SHUTDOWN,
    SqlState::CRASH_SHUTDOWN,
    SqlState::CANNOT_CONNECT_NOW,
];

/// Whether a server that has said this may be asked again: it passes for every server, or is one of `others`, which do
/// for what was asked.
pub(crate) fn server_may_pass(error: &anyhow::Error, others: &[SqlState]) -> bool {
    PgError::of(error).is_some_and(|said| SERVER_PASSING.contains(&said.code) || others.contains(&said.code))
}

/// How often something has failed, and since when.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Patience {
    failing_since: Option<Instant>,
    tries: u32,
}

impl Patience {
    /// Takes note of a failure; gives how long to wait before the next try, or nothing when it was the last.
    pub(crate) fn after_failure(&mut self, now: Instant) -> Option<Duration> {
        let since = *self.failing_since.get_or_insert(now);
        self.tries += 1;
        let is_over = self.tries >= TRIES_MIN && now.duration_since(since) >= PATIENCE;
        (!is_over).then(|| LONGEST_WAIT.min(FIRST_WAIT * 2_u32.pow(self.tries.min(16))))
    }

    /// Waits before the next try of what has failed with `error`.
    ///
    /// # Errors
    ///
    /// `error` itself, when it was the last one.
    pub(crate) async fn again(&mut self, error: anyhow::Error) -> anyhow::Result<()> {
        let Some(wait) = self.after_failure(Instant::now()) else { return Err(error) };
        tracing::info!("tried again in {wait:?}: {error:#}");
        sleep(wait).await;
        Ok(())
    }
}

/// Makes a request to a store, again and again while what it fails with may pass.
///
/// # Errors
///
/// The last one.
pub(crate) async fn patiently<T, F>(request: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let mut patience = Patience::default();
    loop {
        match request().await {
            Err(error) if storage::is_transient(&error) => patience.again(error).await?,
            done => return done,
        }
    }
}

/// Marks an error of a store that may pass as one after which the job is begun again.
pub(crate) fn later(error: anyhow::Error) -> anyhow::Error {
    if storage::is_transient(&error) { error.context(Retryable) } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Patience {
        /// The next failure is the last one.
        pub(crate) fn exhausted() -> Self {
            Self { failing_since: Instant::now().checked_sub(PATIENCE), tries: TRIES_MIN }
        }
    }

    /// And what passes for some of them only.
    #[test]
    fn what_a_server_may_grant_later_is_the_same_for_all_that_ask_it() {
        use crate::point::may_pass as point;
        use crate::restore::may_pass as restore;
        let deal = |error: &anyhow::Error| server_may_pass(error, &crate::deal::PASSING);
        for (code, [of_point, of_deal, of_restore]) in [
            ("53300", [true; 3]),
            ("55P03", [true; 3]),
            ("55006", [true; 3]),
            ("40001", [true; 3]),
            ("40P01", [true; 3]),
            ("57P01", [true; 3]),
            ("57P02", [true; 3]),
            ("57P03", [true; 3]),
            // Too many leases, or a standby whose replay somebody else has paused.
            ("53400", [true, false, false]),
            ("55000", [true, false, false]),
            // A store.
            ("58030", [false, true, false]),
            // A leader that has become a standby.
            ("25006", [false, false, true]),
            ("42501", [false; 3]),
            ("53100", [false; 3]),
            ("42P01", [false; 3]),
        ] {
            let error = PgError::new(SqlState::parse(code).unwrap(), "not now").into();
            assert_eq!([point(&error), deal(&error), restore(&error)], [of_point, of_deal, of_restore], "{code}");
        }
    }

    #[test]
    fn it_lasts_for_a_while_and_for_some_tries() {
        let begun = Instant::now();
        let (mut short, mut waited) = (Patience::default(), Duration::ZERO);
        while let Some(wait) = short.after_failure(begun + waited) {
            waited += wait;
        }
        assert!(waited >= PATIENCE && waited < PATIENCE + LONGEST_WAIT, "{waited:?}");
        let (mut long, mut tries) = (Patience::default(), 1);
        while long.after_failure(begun + PATIENCE * 2 * tries).is_some() {
            tries += 1;
        }
        assert_eq!(tries, TRIES_MIN);
    }
}
