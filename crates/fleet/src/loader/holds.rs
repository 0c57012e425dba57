//! Who loads which span just now, so that whoever comes later for the same span takes it over.
//!
//! A worker that has stopped without a word keeps its transaction, and with it the span's number, until it has been
//! silent for long. The coordinator has given the span to somebody else by then. The later one is right: number and
//! rows are committed together, so ending the earlier session either finds the span committed or leaves nothing of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_util::sync::CancellationToken;

use super::{JobDatabase, Load, superseded};
use crate::founders::session::Session;

/// An earlier session that has not ended by then is left to the INSERT of the number, which waits for its transaction.
const END_WAIT_MS: i64 = 10_000;

/// A job and a span of it.
type Key = (JobDatabase, u32);

/// The process that serves a session, and when it was started: the server may give its number to another one.
type Backend = (i32, String);

struct Holder {
    number: u64,
    /// Of the coordinator that asked.
    run: i64,
    end: CancellationToken,
    backend: Option<Backend>,
}

/// The spans that are being loaded through this node: no more than there are requests that load one.
#[derive(Clone, Default)]
pub(super) struct Holds(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    /// How many holds there have been, so that each has a number of its own.
    count: u64,
    spans: HashMap<Key, Holder>,
}

/// One span, until this is dropped or somebody takes it over.
pub(super) struct Hold {
    holds: Holds,
    key: Key,
    number: u64,
    /// The session that loads the span lasts until this.
    pub(super) end: CancellationToken,
    earlier: Option<Backend>,
}

impl Holds {
    /// Takes a span, from whoever has it, unless a newer coordinator gave it to them.
    pub(super) fn take(&self, load: &Load) -> Result<Hold, PgError> {
        let (key, end) = ((load.job, load.span), CancellationToken::new());
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.spans.get(&key).is_some_and(|holder| holder.run > load.run) {
            return Err(superseded(load.job));
        }
        held.count += 1;
        let number = held.count;
        let earlier = held.spans.insert(key, Holder { number, run: load.run, end: end.clone(), backend: None });
        let earlier = earlier.and_then(|holder| {
            tracing::info!("span {} of restore job {} is taken over", load.span, load.job);
            holder.end.cancel();
            holder.backend
        });
        Ok(Hold { holds: self.clone(), key, number, end, earlier })
    }
}

impl Hold {
    /// Notes which session loads the span, and sees to it that the earlier one has ended.
    pub(super) async fn begin(&mut self, session: &Session) -> anyhow::Result<()> {
        let query = "SELECT pid, backend_start::text FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())";
        let row = session.row(query, &[]).await.context("ask which session loads the span")?;
        let is_mine = self.with(|holder| holder.backend = Some((row.get(0), row.get(1))));
        if !is_mine {
            return Err(self.superseded().into());
        }
        let Some((pid, start)) = self.earlier.take() else { return Ok(()) };
        let query = "SELECT pg_catalog.pg_terminate_backend(pid, $3)
                     FROM pg_catalog.pg_stat_get_activity($1) WHERE backend_start::text = $2";
        session.rows(query, &[&pid, &start, &END_WAIT_MS]).await.context("end an earlier load of the span").map(drop)
    }

    /// Whether somebody else has taken the span over.
    pub(super) fn is_lost(&self) -> bool {
        !self.with(|_| ())
    }

    /// What is told when they have.
    pub(super) fn superseded(&self) -> PgError {
        let (job, span) = self.key;
        let message = format!("span {span} of restore job {job} is being loaded by somebody who came later");
        PgError::new(SqlState::LOCK_NOT_AVAILABLE, message)
    }

    /// An error of the session, or why the session has ended.
    pub(super) fn told(&self, error: anyhow::Error) -> anyhow::Error {
        if self.is_lost() { self.superseded().into() } else { error }
    }

    /// Does something to what is noted of this one, unless another one has come; says whether it is still there.
    fn with(&self, change: impl FnOnce(&mut Holder)) -> bool {
        let mut held = self.holds.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = held.spans.get_mut(&self.key).filter(|holder| holder.number == self.number);
        mine.map(change).is_some()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.holds.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.spans.get(&self.key).is_some_and(|holder| holder.number == self.number) {
            held.spans.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::Loaded;

    #[test]
    fn the_later_one_has_the_span() {
        let of = |run, span| {
            let (what, encoding) = (Loaded::LargeObjects, String::new());
            Load { job: 7.into(), database_oid: 1, run, span, what, encoding }
        };
        let holds = Holds::default();
        let take = |span| holds.take(&of(3, span)).unwrap();
        let (first, other) = (take(1), take(2));
        assert!(holds.take(&of(2, 1)).is_err() && !first.is_lost());
        let second = take(1);
        assert!(first.is_lost() && first.end.is_cancelled());
        drop(second);
        let second = take(1);
        assert!(first.is_lost());
        drop(first);
        assert!(!second.is_lost() && !other.is_lost() && !second.end.is_cancelled());
        drop((second, other));
        assert!(holds.0.lock().unwrap().spans.is_empty());
    }
}
