//! Who may change a job's database as a whole, among coordinators that come one after the other.
//!
//! One that was stopped and goes on believes that the job is still its own. So every request carries the number of
//! the coordinator's run, which grows with each run of the job, and here the newest wins: an older request is refused,
//! and one that is at work when a newer comes is given up. Removing is the last word of its run. The database's mark
//! remembers the number as well (`found`), for when this node was started anew; only that a database was removed is
//! remembered here alone, so that a late request does not make it again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use pgerror::{PgError, SqlState};
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::timeout;

use super::{JobDatabase, superseded};

/// A job that somebody else works on for longer is not worked on by this request.
const TURN_WAIT: Duration = Duration::from_secs(600);

/// Jobs that were removed and are remembered; of older ones, a late request could make the database again.
const REMOVED_KEPT: usize = 256;

/// A run's number, and whether it removes: that comes after all else of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Order(pub(super) i64, pub(super) bool);

/// The jobs that are worked on through this node.
#[derive(Default)]
pub(super) struct Turns {
    known: Mutex<HashMap<JobDatabase, Weak<Turn>>>,
    removed: Mutex<VecDeque<Arc<Turn>>>,
}

/// One job.
pub(super) struct Turn {
    job: JobDatabase,
    newest: watch::Sender<Order>,
    lock: Arc<tokio::sync::Mutex<()>>,
}

impl Turns {
    pub(super) fn of(&self, job: JobDatabase) -> Arc<Turn> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, turn| turn.strong_count() > 0);
        let made = || Arc::new(Turn { job, newest: watch::Sender::default(), lock: Arc::default() });
        let turn = known.get(&job).and_then(Weak::upgrade).unwrap_or_else(made);
        known.insert(job, Arc::downgrade(&turn));
        turn
    }

    /// Remembers a job that is being removed.
    pub(super) fn remember(&self, turn: Arc<Turn>) {
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        removed.retain(|kept| kept.job != turn.job);
        removed.push_back(turn);
        if removed.len() > REMOVED_KEPT {
            removed.pop_front();
        }
    }
}

impl Turn {
    /// Refuses an order that is older than another one that was here, and makes the others that are older end.
    pub(super) fn admit(&self, order: Order) -> Result<(), PgError> {
        self.newest.send_if_modified(|newest| {
            let is_newer = order > *newest;
            *newest = order.max(*newest);
            is_newer
        });
        if *self.newest.borrow() > order { Err(superseded(self.job)) } else { Ok(()) }
    }

    async fn is_overtaken(&self, order: Order) {
        let _ = self.newest.subscribe().wait_for(|newest| *newest > order).await.map(drop);
    }

    /// Waits until nobody else on this node changes the job's database as a whole.
    pub(super) async fn hold(&self, order: Order) -> anyhow::Result<OwnedMutexGuard<()>> {
        self.admit(order)?;
        let waited = tokio::select! {
            waited = timeout(TURN_WAIT, self.lock.clone().lock_owned()) => waited,
            () = self.is_overtaken(order) => return Err(superseded(self.job).into()),
        };
        waited.map_err(|_| {
            let message = format!("the database of restore job {} is being worked on by somebody else", self.job);
            PgError::new(SqlState::OBJECT_IN_USE, message).into()
        })
    }

    /// Does some work that may be ended at any point, when it is its turn and until somebody newer comes.
    pub(super) async fn take<T>(
        &self,
        order: Order,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        let _held = self.hold(order).await?;
        tokio::select! {
            done = work => done,
            () = self.is_overtaken(order) => Err(superseded(self.job).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::is_superseded;

    #[tokio::test]
    async fn the_newest_wins_and_removing_is_the_last_word() {
        let turns = Turns::default();
        let turn = turns.of(7.into());
        let old = turn.take(Order(1, false), std::future::pending::<anyhow::Result<()>>());
        let new = async {
            tokio::task::yield_now().await;
            turns.of(7.into()).take(Order(2, false), async { Ok(5) }).await
        };
        let (old, new) = tokio::join!(old, new);
        assert!(is_superseded(PgError::of(&old.unwrap_err()).unwrap()));
        assert_eq!(new.unwrap(), 5);
        assert!(turn.admit(Order(1, true)).is_err() && turn.admit(Order(2, false)).is_ok());
        assert!(turn.admit(Order(2, true)).is_ok() && turn.admit(Order(2, false)).is_err());
        turns.remember(turn);
        assert!(
            turns.of(7.into()).admit(Order(2, false)).is_err() && turns.of(7.into()).admit(Order(3, false)).is_ok()
        );
        assert!(turns.of(8.into()).admit(Order(1, false)).is_ok());
    }
}
