//! One point of several servers: what each of them does towards it.
//!
//! Two standbys show the same rows when they stream the same timeline and stand at the same position of it, unmoved
//! while their founders take their snapshots. Nobody can stop replay at a given position, so the coordinator has all of
//! them pause, and those that are behind go on until they have come up to the others, again and again, until all say
//! the same. Then each takes its founders' snapshots where it stands; the schema is dumped on one of them.
//!
//! A server that waits for the others must not stand still for long, whatever becomes of the coordinator: what is asked
//! of nobody for some seconds ends, and its pause with it; and behind that there is the switch of every pause
//! (`super::pause`). Sessions are opened before anything is paused, so that the pause is short. Until its end
//! a preparation keeps its server's turn, so two coordinators that prepare servers in the order of their numbers never
//! wait for each other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use cluster::Lsn;
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::open::{Taken, Taking, given_up};
use super::pause::PAUSE_WORK;
use super::standing::Halt;
use super::types::{Mode, Open, Opened, Standstill, point_lost};
use super::{Founders, check};
use crate::Server;

/// Sessions for which nothing is asked so long after they were opened are closed. The other servers may be taking
/// somebody else's point first.
const PREPARED_MAX: Duration = Duration::from_secs(60);

/// Replay that stands and is not asked about for so long goes on.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// One server on its way to a point that others share.
pub(super) struct Preparation {
    /// First, so that replay goes on before anything else is closed.
    pause: Option<(Halt, Instant)>,
    taking: Taking,
    guard: DropGuard,
}

impl Preparation {
    fn patience(&self) -> Duration {
        if self.pause.is_some() { SILENCE_MAX } else { PREPARED_MAX }
    }

    /// Pauses replay, or lets it go on up to `until`.
    async fn step(&mut self, until: Option<Lsn>) -> anyhow::Result<Standstill> {
        match (&mut self.pause, until) {
            (Some((pause, begun)), Some(until)) if begun.elapsed() < PAUSE_WORK => {
                if !pause.step(until).await? {
                    return Err(moved("Its replay stands for another backup, which reads it.").into());
                }
            }
            (Some(_), None) => {}
            (Some(_), Some(_)) => return Err(moved("Replay stood for too long.").into()),
            (None, _) => {
                if !self.taking.may_be_paused() {
                    return Err(may_not_be_paused(&self.taking.server).into());
                }
                let begun = Instant::now();
                self.pause = Some((self.taking.halt().await?, begun));
            }
        }
        self.standstill().await
    }

    async fn standstill(&self) -> anyhow::Result<Standstill> {
        let position = self.taking.position().await?;
        if !position.in_recovery || !position.receives {
            // Which timeline is replayed is known only of a server that receives it.
            return Err(moved("It does not stream from another server.").into());
        }
        let system_identifier = self.taking.system_identifier.clone();
        Ok(Standstill { system_identifier, timeline: position.timeline, lsn: position.lsn })
    }

    /// Takes the snapshots. Whatever comes of it, replay goes on.
    async fn take(self, at: &Standstill, with_schema: bool) -> anyhow::Result<(Open, Taken, DropGuard)> {
        let Self { pause, mut taking, guard } = self;
        let (pause, begun) = pause.context("take a point of a server that does not stand still")?;
        let longest = PAUSE_WORK.saturating_sub(begun.elapsed());
        let work = in_pause(&taking, &pause, (at, with_schema), longest).await;
        if work.is_err() {
            // Before replay goes on, or it could meet what the founders still hold.
            drop(taking.stand_down().await);
        }
        let kept = taking.after(pause, work.as_ref().ok().map(|(moment, _)| moment)).await;
        let (moment, plans) = work?;
        let request = taking.request.clone();
        Ok((request, Taken { kept, ..taking.taken(Mode::Paused, moment, plans) }, guard))
    }
}

async fn in_pause(
    taking: &Taking,
    pause: &Halt,
    (at, with_schema): (&Standstill, bool),
    longest: Duration,
) -> anyhow::Result<(super::open::Moment, super::open::Plans)> {
    let Some(work) = taking.while_it_may(pause, with_schema, longest).await else {
        return Err(moved("It took too long, or commits may wait for the server now.").into());
    };
    let (moment, plans) = work.map_err(given_up)?;
    // In the pause the position did not move; this is that it is the others', too.
    let after = taking.position().await?;
    let is_there = after.receives && after.lsn == at.lsn && after.timeline == at.timeline;
    match is_there && moment.position.lsn == at.lsn && moment.position.timeline == at.timeline {
        true => Ok((moment, plans)),
        false => Err(moved("Its position is another one now.").into()),
    }
}

fn moved(detail: &str) -> PgError {
    let message = "the server does not stand at the point that others share";
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).detail(detail)
}

/// What waits for other servers, by lease.
#[derive(Default)]
pub(super) struct Waiting(Mutex<HashMap<Uuid, (Preparation, AbortOnDropHandle<()>)>>);

impl Waiting {
    /// Takes it out; it does not end by itself any more.
    pub(super) fn remove(&self, lease: Uuid) -> Option<Preparation> {
        let (preparation, _expiry) = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&lease)?;
        Some(preparation)
    }
}

impl Founders {
    /// Opens sessions.
    pub(super) async fn prepare(&self, request: Open) -> anyhow::Result<()> {
        check(&request.databases)?;
        let turn = self.turn(request.lease).await?;
        let end = CancellationToken::new();
        let guard = end.clone().drop_guard();
        let place = (turn, Arc::clone(&self.standing));
        let taking = Taking::begin(&self.server, &request, &end, place, &self.budget).await.context("open founders")?;
        if !taking.may_be_paused() {
            return Err(may_not_be_paused(&self.server).into());
        }
        self.wait(request.lease, Preparation { pause: None, taking, guard });
        Ok(())
    }

    /// Pauses, or goes on for a moment. A failure is its end.
    pub(super) async fn step(&self, lease: Uuid, until: Option<Lsn>) -> anyhow::Result<Standstill> {
        let mut preparation = self.prepared(lease)?;
        let standstill = preparation.step(until).await?;
        self.wait(lease, preparation);
        Ok(standstill)
    }

    /// Takes the point.
    pub(super) async fn take(&self, lease: Uuid, at: &Standstill, with_schema: bool) -> anyhow::Result<Opened> {
        let (request, taken, guard) = self.prepared(lease)?.take(at, with_schema).await?;
        Ok(self.keep(&request, taken, guard))
    }

    fn prepared(&self, lease: Uuid) -> anyhow::Result<Preparation> {
        let waiting = self.waiting.remove(lease);
        waiting.ok_or_else(|| point_lost(&self.server.address(), "It was not asked about in time.").into())
    }

    /// Keeps it for the next question, which has to come in time.
    fn wait(&self, lease: Uuid, preparation: Preparation) {
        let (founders, patience) = (self.me.clone(), preparation.patience());
        let (standing, is_paused) = (self.standing.clone(), preparation.pause.is_some());
        let expiry = tokio::spawn(async move {
            tokio::select! {
                () = sleep(patience) => {}
                () = standing.until_voting(), if is_paused => {}
            }
            if let Some(founders) = founders.upgrade() {
                tracing::info!("nobody takes a point that several servers were to share, or it may not be waited for");
                drop(founders.waiting.remove(lease));
            }
        });
        let entry = (preparation, AbortOnDropHandle::new(expiry));
        drop(self.waiting.0.lock().unwrap_or_else(PoisonError::into_inner).insert(lease, entry));
    }
}

fn may_not_be_paused(server: &Server) -> PgError {
    let message = format!("replay on {} may not be paused", server.address());
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
        .detail("It is a primary, commits may wait for it, or the role of the node lacks the right.")
}
