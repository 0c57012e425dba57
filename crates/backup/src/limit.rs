//! How fast a node reads rows for backups (`bulkio.backup.node_rate_limit`).
//!
//! All spans that a node exports share one limit. A piece of rows that would be too soon waits, and with it the COPY
//! that it comes from: PostgreSQL does not read ahead of a client that does not take its rows.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When the next piece may be taken.
#[derive(Debug, Default)]
pub(crate) struct Limit(Mutex<Option<Instant>>);

impl Limit {
    /// Waits until a piece of so many bytes may be taken at so many bytes in a second; `None` is at once.
    pub(crate) async fn wait(&self, bytes: usize, rate: Option<u64>) {
        let Some(rate) = rate else { return };
        let now = Instant::now();
        let turn = {
            let mut next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (turn, free) = reserve(*next, now, bytes, rate);
            *next = Some(free);
            turn
        };
        if turn > now {
            tokio::time::sleep_until(turn.into()).await;
        }
    }
}

/// When a piece may be taken, and when the one behind it. Time in which nothing was taken is not saved up.
fn reserve(next: Option<Instant>, now: Instant, bytes: usize, rate: u64) -> (Instant, Instant) {
    let turn = next.map_or(now, |next| next.max(now));
    (turn, turn + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_one_another_at_the_rate() {
        let begun = Instant::now();
        let at = |milliseconds| begun + Duration::from_millis(milliseconds);
        for (next, now, bytes, expected) in [
            (None, at(0), 500, (at(0), at(500))),
            (Some(at(500)), at(0), 500, (at(500), at(1000))),
            (Some(at(500)), at(500), 0, (at(500), at(500))),
            // A second of idleness is no credit.
            (Some(at(500)), at(1500), 500, (at(1500), at(2000))),
        ] {
            assert_eq!(reserve(next, now, bytes, 1000), expected);
        }
    }
}
