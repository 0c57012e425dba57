//! How far a job that moves bytes is, and how fast, in the words that `SHOW JOBS` and progress notices have for it:
//! `exporting shard s1: 120 of 994 MB, 35 MB/s`.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
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
            self.fraction()
        })
    }

    fn fraction(&self) -> f64 {
        (self.done as f64 / self.total.max(1) as f64).min(1.0)
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

/// How far a job is whose shards are exported side by side, with each other's bytes in one sum.
#[derive(Default)]
pub(crate) struct SharedPace(Mutex<Shards>);

#[derive(Default)]
struct Shards {
    /// From the first that begins on.
    pace: Option<Pace>,
    parts: BTreeMap<String, Part>,
}

/// One shard's part of it.
#[derive(Default)]
struct Part {
    /// What is said behind its name.
    how: String,
    total: u64,
    done: u64,
    is_at_work: bool,
}

impl SharedPace {
    /// So much will have to be done for this shard, whose turn has not come.
    pub(crate) fn expects(&self, shard: &str, total: u64) {
        let part = Part { total, ..Part::default() };
        self.lock().parts.insert(shard.to_owned(), part);
    }

    /// This shard's export begins, perhaps anew at another point: `done` of `total` is there already. `how` is said behind
    /// its name.
    pub(crate) fn begins(&self, shard: &str, how: String, (done, total): (u64, u64), now: Instant) {
        let mut shards = self.lock();
        shards.parts.insert(shard.to_owned(), Part { how, total, done, is_at_work: true });
        shards.pace.get_or_insert_with(|| Pace::new(0, 0, now));
        shards.sum();
    }

    /// So much more of it is there. Gives how far the job is, from 0 to 1, and what is to be said of it, when it is time
    /// to tell.
    pub(crate) fn moved(&self, shard: &str, bytes: u64, now: Instant) -> Option<(f64, String)> {
        let mut shards = self.lock();
        if let Some(part) = shards.parts.get_mut(shard) {
            part.done += bytes;
        }
        let doing = shards.doing();
        let pace = shards.pace.as_mut()?;
        let fraction = pace.moved(bytes, now)?;
        Some((fraction, pace.words(&doing, now)))
    }

    /// This shard's export has ended.
    pub(crate) fn ends(&self, shard: &str) {
        if let Some(part) = self.lock().parts.get_mut(shard) {
            part.is_at_work = false;
        }
    }

    /// How far the job is, from 0 to 1.
    pub(crate) fn fraction(&self) -> f64 {
        self.lock().pace.as_ref().map_or(0.0, Pace::fraction)
    }

    fn lock(&self) -> MutexGuard<'_, Shards> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shards {
    fn sum(&mut self) {
        let (total, done) = self.parts.values().fold((0, 0), |(total, done), it| (total + it.total, done + it.done));
        if let Some(pace) = &mut self.pace {
            (pace.total, pace.done) = (total, done);
        }
    }

    /// `exporting shard s1 (node 3: paused)`, or `exporting shards s1, s2`.
    fn doing(&self) -> String {
        let at_work = self.parts.iter().filter(|(_, part)| part.is_at_work);
        let names: Vec<String> = at_work.map(|(name, part)| format!("{name}{}", part.how)).collect();
        format!("exporting shard{} {}", if names.len() > 1 { "s" } else { "" }, names.join(", "))
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

    #[test]
    fn shards_side_by_side_have_one_sum() {
        let begun = Instant::now();
        let after = |millis: u64| begun + Duration::from_millis(millis);
        let pace = SharedPace::default();
        for (shard, total) in [("s1", 100_000_000), ("s2", 300_000_000), ("s3", 600_000_000)] {
            pace.expects(shard, total);
        }
        assert_eq!(pace.fraction(), 0.0);
        // What an earlier run has done counts, and what waits for its turn does, too.
        pace.begins("s1", String::new(), (50_000_000, 100_000_000), begun);
        pace.begins("s2", " (node 3: paused)".to_owned(), (0, 300_000_000), begun);
        assert_eq!(pace.fraction(), 0.05);
        assert_eq!(pace.moved("s1", 50_000_000, after(500)), None);
        let told = pace.moved("s2", 100_000_000, after(2_000));
        assert_eq!(told, Some((0.2, "exporting shards s1, s2 (node 3: paused): 200 of 1000 MB, 75 MB/s".to_owned())));
        // It is told once in a while, whichever moves.
        assert_eq!(pace.moved("s2", 50_000_000, after(2_500)), None);
        pace.ends("s1");
        let told = pace.moved("s2", 50_000_000, after(3_000));
        assert_eq!(told, Some((0.3, "exporting shard s2 (node 3: paused): 300 of 1000 MB, 83 MB/s".to_owned())));
        // One that has to begin anew gives back only what was its own.
        pace.begins("s2", String::new(), (0, 300_000_000), after(4_000));
        assert_eq!(pace.fraction(), 0.1);
    }
}
