//! Replay that stands for as long as rows are read, so that nothing is replayed that would take them away.
//!
//! A point on a standby is taken in a pause of a moment ([`super::pause`]). A point that is asked to keep it hands the
//! pause over to this module, where it stands until the last lease that shares it has ended, or until it has to end
//! before: the server was promoted, it lost its stream, commits may wait for it now, somebody has resumed it, or a limit
//! is passed. Then the founders stay as they are; what replay brings from there on may conflict with them as on any other
//! standby. Why it was is told with the next renewal of the lease.
//!
//! One pause stands on a server at a time. A backup that comes while it does takes its point in it, where replay stands,
//! and may keep it, too; how long it lasts counts from its beginning all the same.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use cluster::Lsn;
use pgerror::PgError;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::pause::{Pause, SILENCE_MAX, Seen, Turn, is_paused};
use super::session::Session;
use super::types::{FREE_SETTING, PAUSE_SETTING, PauseLimits, WAL_SETTING};
use crate::Server;
use crate::disk::DataDirectory;

/// How often it is looked whether a pause may go on. It is also how often life is shown to the server.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often the end of a pause is waited for that does not stand, and is known to; then a pause of one's own is begun.
const SHARED_TRIES: usize = 3;

/// A server that does not answer by then resumes, or is left to do so by itself.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// How often it is looked whether commits may wait for a server whose replay stands while its point is taken.
const VOTING_EVERY: Duration = Duration::from_millis(200);

/// A pause of a server of which it is not known for so long whether commits wait for it does not go on: what tells is
/// the primary's node, and that may be away for a moment.
const DOUBT_MAX: Duration = Duration::from_secs(5);

/// Whether commits on the primary may wait for the server; `None` when that is not known now. Then no pause is begun.
pub type IsVoting = Arc<dyn Fn() -> Option<bool> + Send + Sync>;

/// Since when it is not known whether commits wait for a server.
#[derive(Default)]
struct Doubt(Option<Instant>);

impl Doubt {
    /// Whether a pause has to end, by what is known `now`.
    fn ends(&mut self, is_voting: Option<bool>, now: Instant) -> bool {
        match is_voting {
            Some(is_voting) => {
                self.0 = None;
                is_voting
            }
            None => now.duration_since(*self.0.get_or_insert(now)) >= DOUBT_MAX,
        }
    }
}

/// Where a pause is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Stands,
    /// Replay goes on, or will in a moment.
    Ends,
    /// Nothing is left of it.
    Over,
}

/// A pause that stands, for those who share it. With the last of them it ends.
pub(super) struct Held {
    /// The time of the point that it was begun for, by the server's clock.
    since: DateTime<Utc>,
    state: watch::Receiver<State>,
    /// Why it ended before its time.
    why: Arc<Mutex<Option<String>>>,
    _end: DropGuard,
}

impl Held {
    fn stands(&self) -> bool {
        *self.state.borrow() == State::Stands
    }

    /// Waits until it is known that it stands no more, which is looked for each second.
    async fn ended(&self) {
        let mut state = self.state.clone();
        // An error means that its task is gone, and everything with it.
        drop(timeout(LOOK_EVERY + LOOK_DEADLINE, state.wait_for(|state| *state != State::Stands)).await);
    }

    fn why(&self) -> Option<String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What has become of the pause that a point was to keep.
pub(super) enum Kept {
    Held(Arc<Held>),
    /// Why it was not kept.
    Ended(String),
}

impl Kept {
    /// Why replay goes on, if it does.
    pub(super) fn over(&self) -> Option<String> {
        match self {
            Self::Held(held) => held.why(),
            Self::Ended(why) => Some(why.clone()),
        }
    }
}

/// The pause that stands on one server, if one does.
pub(super) struct Standing {
    is_voting: IsVoting,
    now: Mutex<Option<(Weak<Held>, watch::Receiver<State>)>>,
}

impl Standing {
    pub(super) fn new(is_voting: IsVoting) -> Self {
        Self { is_voting, now: Mutex::default() }
    }

    /// Whether it is known that no commit waits for the server.
    pub(super) fn is_non_voting(&self) -> bool {
        (self.is_voting)() == Some(false)
    }

    /// Returns when a pause has to end, because commits may wait for the server.
    pub(super) async fn until_voting(&self) {
        let mut doubt = Doubt::default();
        while !doubt.ends((self.is_voting)(), Instant::now()) {
            sleep(VOTING_EVERY).await;
        }
    }

    /// The pause that stands; waits for the end of one that ends. Only whoever has the turn asks.
    async fn shared(&self) -> Option<Arc<Held>> {
        let (held, mut state) = {
            let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
            let (held, state) = now.as_ref()?;
            (held.upgrade(), state.clone())
        };
        if let Some(held) = held.filter(|held| held.stands()) {
            return Some(held);
        }
        // Its end has deadlines of its own; an error means that its task is gone, and everything with it.
        drop(state.wait_for(|state| *state == State::Over).await);
        None
    }

    /// Lets a pause stand in which a point was taken at the time `since`.
    async fn begin(&self, mut pause: Pause, limits: &PauseLimits, since: DateTime<Utc>) -> Kept {
        let longest = Duration::from_millis(limits.longest_ms);
        if let Err(error) = pause.watched(longest).await {
            tracing::warn!("replay is not kept paused: {error:#}");
            pause.end().await;
            let why = PgError::of(&error).map_or_else(|| format!("{error:#}"), |said| said.message.clone());
            return Kept::Ended(format!("It could not be kept paused: {why}."));
        }
        let (tell, state) = watch::channel(State::Stands);
        let (why, end) = (Arc::default(), CancellationToken::new());
        let held = Held { since, state: state.clone(), why: Arc::clone(&why), _end: end.clone().drop_guard() };
        let held = Arc::new(held);
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = Some((Arc::downgrade(&held), state));
        let watching = Watching { pause, limits: limits.clone(), is_voting: Arc::clone(&self.is_voting), end };
        tokio::spawn(async move {
            let (pause, ended_by) = watching.until_over().await;
            if let Some(reason) = &ended_by {
                tracing::warn!("replay goes on before everything is read: {reason}");
            }
            *why.lock().unwrap_or_else(PoisonError::into_inner) = ended_by;
            tell.send_replace(State::Ends);
            pause.end().await;
            tell.send_replace(State::Over);
        });
        Kept::Held(held)
    }
}

struct Watching {
    pause: Pause,
    limits: PauseLimits,
    is_voting: IsVoting,
    end: CancellationToken,
}

impl Watching {
    /// Returns when nobody shares the pause any more, or, with the reason, when it may not go on.
    async fn until_over(self) -> (Pause, Option<String>) {
        let (begun, mut doubt) = (Instant::now(), Doubt::default());
        let directory = self.pause.directory().await;
        loop {
            let looked = tokio::select! {
                () = self.end.cancelled() => return (self.pause, None),
                looked = timeout(LOOK_DEADLINE, self.look(begun, &mut doubt, &directory)) => looked,
            };
            if let Some(why) = looked.unwrap_or_else(|_| Some("The server did not answer in time.".to_owned())) {
                return (self.pause, Some(why));
            }
            tokio::select! {
                () = self.end.cancelled() => return (self.pause, None),
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn look(&self, begun: Instant, doubt: &mut Doubt, directory: &DataDirectory) -> Option<String> {
        match self.pause.look().await {
            Ok(seen) => {
                let is_voting = doubt.ends((self.is_voting)(), Instant::now());
                beyond(&seen, is_voting, begun.elapsed(), directory.free().await, &self.limits)
            }
            Err(error) => Some(format!("The server could not be asked: {error:#}.")),
        }
    }
}

/// Why a pause may not go on, as a sentence.
fn beyond(seen: &Seen, is_voting: bool, stood: Duration, free: Option<u64>, limits: &PauseLimits) -> Option<String> {
    if !seen.in_recovery {
        return Some("The server was promoted.".to_owned());
    }
    if !seen.is_paused {
        let silence = SILENCE_MAX.as_secs();
        return Some(format!("Somebody resumed it, or its node showed no life for {silence} seconds."));
    }
    if !seen.receives {
        return Some("It lost its stream of WAL, which only replay begins anew.".to_owned());
    }
    if is_voting {
        return Some("Commits may wait for the server now.".to_owned());
    }
    if stood >= Duration::from_millis(limits.longest_ms) {
        return Some(format!("It stood for {} seconds, as long as {PAUSE_SETTING} lets it.", stood.as_secs()));
    }
    if limits.wal_bytes > 0 && seen.waiting > limits.wal_bytes {
        let (waiting, most) = (seen.waiting, limits.wal_bytes);
        return Some(format!("{waiting} bytes of WAL wait to be replayed, more than {WAL_SETTING}, which is {most}."));
    }
    let free = free.filter(|free| *free < limits.free_bytes)?;
    let least = limits.free_bytes;
    Some(format!("The disk of the server has {free} bytes free, less than {FREE_SETTING}, which is {least}."))
}

/// Replay that stands while a point is taken: in a pause of the point's own, or in one that stands already.
pub(super) enum Halt {
    Own(Box<Pause>),
    Shared(Arc<Held>),
}

impl Halt {
    /// Sees to it that replay stands; `control` is a session that may ask.
    pub(super) async fn begin(
        standing: &Standing,
        (server, control): (&Server, &Session),
        job: i64,
        turn: Turn,
    ) -> anyhow::Result<Self> {
        for _ in 0..SHARED_TRIES {
            let Some(held) = standing.shared().await else { break };
            // What is known of it is up to a second old.
            if is_paused(control).await? {
                return Ok(Self::Shared(held));
            }
            held.ended().await;
        }
        Ok(Self::Own(Box::new(Pause::begin(server, job, turn).await?)))
    }

    /// Whether it has stood without a break until now. Somebody who resumed it and paused it again is not seen by this;
    /// that the position has not moved is asked besides.
    pub(super) async fn still_stands(&self, control: &Session) -> anyhow::Result<bool> {
        match self {
            Self::Own(pause) => pause.still_stands().await,
            Self::Shared(held) => Ok(held.stands() && is_paused(control).await?),
        }
    }

    /// Lets it go on for a moment, as [`Pause::step`]; tells whether it may: others read where it stands.
    pub(super) async fn step(&mut self, until: Lsn) -> anyhow::Result<bool> {
        match self {
            Self::Own(pause) => pause.step(until).await.map(|()| true),
            Self::Shared(_) => Ok(false),
        }
    }

    /// Lets it go on, unless others share it.
    pub(super) async fn end(self) {
        if let Self::Own(pause) = self {
            pause.end().await;
        }
    }

    /// The time of the point that was taken first where replay stands, by the server's clock, if that is another one.
    pub(super) fn since(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Own(_) => None,
            Self::Shared(held) => Some(held.since),
        }
    }

    /// Lets it stand while the point is read, which was taken at the time `since`.
    pub(super) async fn keep(self, standing: &Standing, limits: &PauseLimits, since: DateTime<Utc>) -> Kept {
        match self {
            Self::Own(pause) => standing.begin(*pause, limits, since).await,
            Self::Shared(held) => Kept::Held(held),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_when_commits_may_wait_or_when_that_is_not_known_for_long() {
        let begun = Instant::now();
        let mut doubt = Doubt::default();
        for (after, is_voting, ends) in [
            (0, Some(false), false),
            (1, None, false),
            (5, None, false),
            // A doubt that is over does not count any more.
            (6, Some(false), false),
            (7, None, false),
            (11, None, false),
            (12, None, true),
            (13, Some(false), false),
            (14, Some(true), true),
        ] {
            assert_eq!(doubt.ends(is_voting, begun + Duration::from_secs(after)), ends, "{after}");
        }
    }

    #[test]
    fn a_pause_may_not_go_on_beyond_its_limits() {
        let limits = PauseLimits { longest_ms: 60_000, wal_bytes: 1000, free_bytes: 500 };
        let unlimited = PauseLimits { wal_bytes: 0, free_bytes: 0, ..limits };
        let seen = Seen { in_recovery: true, is_paused: true, waiting: 1000, receives: true };
        let promoted = Seen { in_recovery: false, is_paused: false, waiting: 0, receives: false };
        let more = Seen { waiting: 1001, ..seen };
        let (short, long) = (Duration::from_secs(59), Duration::from_secs(60));
        for (seen, is_voting, stood, free, limits, expected) in [
            (&seen, false, short, Some(500), &limits, None),
            (&seen, false, short, None, &limits, None),
            (&more, false, short, Some(0), &unlimited, None),
            (&more, false, short, Some(0), &limits, Some("1001 bytes of WAL wait")),
            (&seen, false, short, Some(499), &limits, Some("has 499 bytes free")),
            (&seen, false, long, Some(500), &unlimited, Some("It stood for 60 seconds")),
            (&more, true, long, Some(0), &limits, Some("Commits may wait")),
            (&Seen { is_paused: false, ..seen }, true, short, None, &limits, Some("Somebody resumed it")),
            (&Seen { receives: false, ..seen }, true, short, None, &limits, Some("lost its stream")),
            (&promoted, false, short, None, &limits, Some("promoted")),
        ] {
            let why = beyond(seen, is_voting, stood, free, limits);
            let is_as_expected = match (&why, expected) {
                (Some(why), Some(words)) => why.contains(words) && why.ends_with('.'),
                (why, expected) => why.is_none() && expected.is_none(),
            };
            assert!(is_as_expected, "{expected:?}: {why:?}");
        }
    }
}
