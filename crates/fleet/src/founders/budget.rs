//! One budget of connections for all leases on a server.
//!
//! Each lease opens founders in each of its databases, and nobody who starts a backup knows of the others. So what all
//! of them may have together is computed from the server's own settings: its connections without those that it keeps back
//! for superusers and reserved roles, and without a part for its users ([`USERS_PERCENT`]). A lease for which there is
//! less room than it asks for gets fewer readers; where not even one fits it is refused, and whoever runs the backup
//! asks again or takes another server. Points are taken one at a time (`Turn`), so nobody else takes what was
//! found to be free.
//!
//! What a restore opens, or a look at a server, is not in it: a restore has a bound of its own, and a look is one session.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use pgerror::{PgError, SqlState};

use super::session::Session;
use super::types::Open;

/// So much of the connections that a server does not keep back is never taken for backups, however many there are.
const USERS_PERCENT: i64 = 25;

/// What the server can have and what is taken, by whoever it is; the session that asks is among them. Of which kind others'
/// sessions are is not told to a role without `pg_read_all_stats`.
const ROOM: &str = "
    SELECT pg_catalog.current_setting('max_connections')::bigint,
           CASE WHEN (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = CURRENT_USER) THEN 0
                ELSE pg_catalog.current_setting('superuser_reserved_connections')::bigint
                     + coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::bigint END,
           (SELECT count(*) FROM pg_catalog.pg_stat_activity
            WHERE backend_type = 'client backend' OR backend_type IS NULL AND datid IS NOT NULL)";

/// What a server has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// What all leases together may have.
    pub(super) budget: usize,
    /// What nobody has at this moment.
    free: usize,
}

impl Room {
    fn of(max: i64, kept_back: i64, taken: i64) -> Self {
        let room = (max - kept_back).max(0);
        let count = |connections: i64| usize::try_from(connections.max(0)).unwrap_or(usize::MAX);
        Self { budget: count(room - room * USERS_PERCENT / 100), free: count(room - taken) }
    }

    /// What is left for one more lease beside those that have `held`; the session that has asked is its own.
    fn left(self, held: usize) -> usize {
        self.budget.saturating_sub(held).min(self.free + 1)
    }
}

/// Asks a server what it has room for.
pub(super) async fn room(session: &Session) -> anyhow::Result<Room> {
    let row = session.row(ROOM, &[]).await.context("ask the server for its connections")?;
    Ok(Room::of(row.get(0), row.get(1), row.get(2)))
}

/// What the leases on one server have.
#[derive(Default)]
pub(super) struct Budget(Arc<Mutex<usize>>);

impl Budget {
    /// Takes what a lease needs; gives how many readers it may have in each database.
    ///
    /// # Errors
    ///
    /// 53300 when it would have to wait for others; 22023 when it would not fit if there were none.
    pub(super) async fn share(&self, session: &Session, request: &Open) -> anyhow::Result<(usize, Share)> {
        let room = room(session).await?;
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let databases = request.databases.len();
        let readers = Open::readers_within(databases, request.readers, room.left(*held))
            .ok_or_else(|| refused(room, databases, *held))?;
        if readers < request.readers {
            tracing::info!(job = request.job, readers, "fewer readers than asked for: others have the connections");
        }
        let count = Open::connections_for(databases, readers);
        *held += count;
        Ok((readers, Share { count, held: self.0.clone() }))
    }
}

/// Why a backup of so many databases would not fit into a server's budget if there were no other, as it is told to whoever
/// asks for a point: 22023. Nothing where it would.
pub fn never_fits(databases: usize, budget: usize) -> Option<PgError> {
    let needed = Open::connections_for(databases, 1);
    let message =
        format!("a backup {} needs at least {needed} connections, and the server has {budget}", of(databases));
    (needed > budget).then(|| {
        PgError::new(SqlState::INVALID_PARAMETER_VALUE, message)
            .detail(format!("{USERS_PERCENT} per cent of what it does not keep back is left to its users."))
            .hint("Raise max_connections there, or back up fewer databases in one statement.")
    })
}

fn of(databases: usize) -> String {
    format!("of {databases} database{}", if databases == 1 { "" } else { "s" })
}

fn refused(room: Room, databases: usize, held: usize) -> PgError {
    if let Some(never) = never_fits(databases, room.budget) {
        return never;
    }
    let needed = Open::connections_for(databases, 1);
    let message = format!("the server has no connections left for a backup {}", of(databases));
    PgError::new(SqlState::TOO_MANY_CONNECTIONS, message)
        .detail(format!(
            "It needs at least {needed}. Backups have {held} of the {} that all of them may have, and {} are free.",
            room.budget, room.free
        ))
        .hint("It is tried again for a while; raise max_connections there if that happens often.")
}

/// What one lease has of the budget; given back when dropped.
pub(super) struct Share {
    count: usize,
    held: Arc<Mutex<usize>>,
}

impl Share {
    /// Keeps what `request` needs once its point is taken.
    pub(super) fn shrink(&mut self, request: &Open) {
        // A pause that is kept has a session that watches it, and one that shows life.
        let pause = if request.pause.is_some() { 2 } else { 0 };
        let count = (Open::connections_held(request.databases.len(), request.readers) + pause).min(self.count);
        self.give_back(self.count - count);
        self.count = count;
    }

    fn give_back(&self, count: usize) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) -= count;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_of_the_budget_and_free() {
        for (max, kept_back, taken, held, budget, left) in [
            (100, 3, 1, 0, 73, 73),
            (100, 3, 50, 40, 73, 33),
            // Users have more than their part just now.
            (100, 3, 90, 0, 73, 8),
            (100, 0, 101, 0, 75, 1),
            (100, 0, 10, 80, 75, 0),
            (2, 3, 1, 0, 0, 0),
        ] {
            let room = Room::of(max, kept_back, taken);
            assert_eq!((room.budget, room.left(held)), (budget, left), "{max} {kept_back} {taken} {held}");
        }
    }

    #[test]
    fn readers_are_as_many_as_fit() {
        for (databases, readers, connections, fit) in [
            (1, 4, 10, Some(4)),
            (1, 4, 100, Some(4)),
            (1, 4, 9, Some(3)),
            (1, 4, 7, Some(1)),
            (1, 4, 6, None),
            (64, 4, 200, Some(1)),
            (64, 4, 195, None),
            (1, 100, 22, Some(16)),
        ] {
            assert_eq!(
                Open::readers_within(databases, readers, connections),
                fit,
                "{databases} {readers} {connections}"
            );
        }
    }
}
