//! How far a job that moves bytes is, and how fast, in the words that `SHOW JOBS` and progress notices have for it:
//! `exporting shard s1: 120 of 994 MB, 35 MB/s`.

use std::time::Duration;

use tokio::time::Instant;

/// Progress is written no more often.
const EVERY: Duration = Duration::from_secs(1);

/// A rate is not told before so much time has passed: the first bytes say little about the others.
const SEEN_MIN: Duration = Duration::from_secs(1);

/// What is to be moved, and what is moved already.
pub(crate) struct Pace {
    total: u64,
    done: u64,
    /// Since when this run moves bytes, and how many it had moved itself.
    begun: Instant,
    moved: u64,
    told: Instant,
}

impl Pace {
    /// `done` of `total` bytes are there already, perhaps by an earlier run.
    pub(crate) fn new(total: u64, done: u64, now: Instant) -> Self {
        Self { total, done, begun: now, moved: 0, told: now }
    }

    /// So many bytes turn out to have been there before this run.
    pub(crate) fn found(&mut self, bytes: u64) {
        self.done += bytes;
    }

    /// How many bytes are there, and back to it when some of what was moved since was lost.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    pub(crate) fn back_to(&mut self, done: u64) {
        self.done = done;
    }

    /// So many more have been moved. Gives how far it is, from 0 to 1, when it is time to tell.
    pub(crate) fn moved(&mut self, bytes: u64, now: Instant) -> Option<f64> {
        self.done += bytes;
        self.moved += bytes;
        let is_time = now.duration_since(self.told) >= EVERY;
        is_time.then(|| {
            self.told = now;
            (self.done as f64 / self.total.max(1) as f64).min(1.0)
        })
    }

    /// `doing`, with how much of it is done.
    pub(crate) fn words(&self, doing: &str, now: Instant) -> String {
        let (done, total) = (megabytes(self.done.min(self.total)), megabytes(self.total));
        let seconds = now.duration_since(self.begun);
        if seconds < SEEN_MIN {
            return format!("{doing}: {done} of {total} MB");
        }
        let rate = self.moved as f64 / seconds.as_secs_f64() / 1e6;
        let rate = if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") };
        format!("{doing}: {done} of {total} MB, {rate} MB/s")
    }
}

fn megabytes(bytes: u64) -> u64 {
    bytes.div_ceil(1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_what_this_run_has_moved() {
        let begun = Instant::now();
        let after = |millis: u64| begun + Duration::from_millis(millis);
        let mut pace = Pace::new(1_000_000_000, 0, begun);
        pace.found(500_000_000);
        assert_eq!(pace.moved(5_000_000, after(500)), None);
        assert_eq!(pace.words("rows", after(500)), "rows: 505 of 1000 MB");
        assert_eq!(pace.moved(5_000_000, after(2_000)), Some(0.51));
        assert_eq!(pace.words("rows", after(2_000)), "rows: 510 of 1000 MB, 5.0 MB/s");
        assert_eq!(pace.moved(490_000_000, after(2_500)), None);
        assert_eq!(pace.words("rows", after(10_000)), "rows: 1000 of 1000 MB, 50 MB/s");
        let before = pace.done();
        assert_eq!(pace.moved(1_000_000, after(11_000)), Some(1.0));
        pace.back_to(before);
        assert_eq!(pace.words("rows", after(10_000)), "rows: 1000 of 1000 MB, 50 MB/s");
    }
}
