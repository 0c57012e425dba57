//! Taking a point: sessions first, then their snapshots at the same moment, then the plan and the schema.
//!
//! How the moment is made one depends on the server. On a standby whose replay may be paused, everything is done in
//! one pause, so that the schema, the plan and all snapshots are of one WAL position. Where it may not be paused, the
//! snapshots are taken while the position happens to stand still, and when it never does, there is one founder. On a
//! primary one session exports its snapshot and the others import it; that is never done on a standby, where an
//! importer may see wrong rows. Wherever `pg_dump` does not run in a pause, a fingerprint of the catalogs before and
//! after it proves that the schema it wrote is that of the snapshots. How several standbys come to the same position is
//! told in [`super::shared`].
//!
//! Whatever was disturbed is done again, a bounded number of times, with the same sessions, or others in the place of
//! those that were ended.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use chrono::{DateTime, Utc};
use cluster::Lsn;
use futures_util::future::try_join_all;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use pgerror::{PgError, SqlState};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::budget::{Budget, Share};
use super::catalog;
use super::dump::{Program, Schema};
use super::pause::{PAUSE_WORK, Turn};
use super::pool::{Anchor, BACK_TO_REST, BEGIN, Crew, Pool, REST, import};
use super::session::{Session, has_code, late, quoted};
use super::standing::{Halt, Kept, Standing};
use super::types::{DatabasePlan, Mode, Open, Opened, Point, READERS_MAX};
use crate::Server;

/// Founders opened beyond those that are lent at the same time, in case one is lost. On a primary it is the anchor.
const SPARES: usize = 1;

/// Sessions that are being opened at the same time.
const OPENING_AT_ONCE: usize = 8;

/// How often a point is taken anew because the schema changed, `pg_dump` failed or the pause was broken.
const TRIES: usize = 5;

/// How often a pause is given up because replay holds a lock on a table; each time replay goes on for [`STEP`].
const LOCK_TRIES: usize = 50;

/// In a pause nothing that replay has locked comes free. What is not found by a look ([`LOCKED`]: one on the catalogs that
/// the look itself reads) is waited for no longer than this.
pub(super) const LOCK_WAIT: &str = "SET lock_timeout = '1s'";

/// The founders' setting (see `Session::open`).
const WAIT_ON: &str = "SET lock_timeout = 0";

/// How long replay goes on between two pauses.
const STEP: Duration = Duration::from_millis(100);

/// How often a moment is sought at which replay stands still by itself.
const STILL_TRIES: usize = 20;

/// A record in the middle of its replay is finished by then, so that the position would show it.
const STILL_WAIT: Duration = Duration::from_millis(10);

/// A founder whose transaction has not ended by then has its statement cancelled.
const STAND_DOWN_DEADLINE: Duration = Duration::from_secs(2);

/// How often ending a founder's transaction is tried; then another session takes its place.
const STAND_DOWN_TRIES: usize = 2;

/// How often a moment is sought at which a primary's databases have equal snapshots.
const EQUAL_TRIES: usize = 20;

/// Taking the point without a pause fails when it takes longer than this.
const WORK_DEADLINE: Duration = Duration::from_secs(300);

/// Recovery, version, identity, and whether replay may be paused.
pub(super) const FACTS: &str = "
    SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('server_version_num')::int,
           (SELECT system_identifier FROM pg_catalog.pg_control_system())::text,
           pg_catalog.has_function_privilege('pg_catalog.pg_wal_replay_pause()', 'EXECUTE')
           AND pg_catalog.has_function_privilege('pg_catalog.pg_wal_replay_resume()', 'EXECUTE')";

const POSITION: &str = "
    SELECT pg_catalog.pg_is_in_recovery(),
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                ELSE pg_catalog.pg_current_wal_lsn() END::text,
           pg_catalog.pg_last_wal_receive_lsn()::text,
           CASE WHEN pg_catalog.pg_is_in_recovery()
                THEN coalesce((SELECT received_tli FROM pg_catalog.pg_stat_wal_receiver),
                              (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()))
                ELSE ('x' || substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8))::bit(32)::int
           END,
           pg_catalog.clock_timestamp(), EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver)";

/// Only replay can hold this mode on a standby. What it has locked and nobody can see yet is in nobody's way. Catalogs that
/// all databases share are in no database.
const LOCKED: &str = "
    SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_class c ON c.oid = l.relation
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_database d ON l.database IN (0, d.oid) AND d.datname = pg_catalog.current_database()
    WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.granted AND c.relpersistence <> 't'
    LIMIT 1";

/// A point that was taken, and the pools of its founders.
pub(super) struct Taken {
    pub(super) opened: Opened,
    pub(super) pools: Vec<Pool>,
    /// The pause that was to stay, if one was.
    pub(super) kept: Option<Kept>,
    /// Of the server's connections.
    pub(super) share: Share,
}

/// Why a point has to be taken anew.
pub(super) enum Disturbance {
    /// Replay holds a lock on a table.
    Locked(PgError),
    /// The position moved where it had to stand still.
    Moved,
    /// Anything else that may be over the next time.
    Other(anyhow::Error),
    /// Nothing that another try would mend.
    Fatal(anyhow::Error),
}

impl From<anyhow::Error> for Disturbance {
    fn from(error: anyhow::Error) -> Self {
        // A session that was ended, perhaps by replay, is opened again.
        let passing = [
            SqlState::CONNECTION_FAILURE,
            SqlState::SERIALIZATION_FAILURE,
            SqlState::DEADLOCK_DETECTED,
            SqlState::ADMIN_SHUTDOWN,
        ];
        if has_code(&error, &passing) {
            return Self::Other(error);
        }
        match PgError::of(&error).filter(|said| said.code == SqlState::LOCK_NOT_AVAILABLE) {
            Some(said) => {
                let message = "the system catalogs are locked by a change that has not ended";
                let locked = PgError::new(SqlState::LOCK_NOT_AVAILABLE, message);
                Self::Locked(locked.detail(format!("The server said: {}.", said.message)))
            }
            None => Self::Fatal(error),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Position {
    pub(super) in_recovery: bool,
    pub(super) lsn: Lsn,
    received: Option<Lsn>,
    pub(super) timeline: u32,
    time: DateTime<Utc>,
    /// Whether WAL is being received.
    pub(super) receives: bool,
}

/// The sessions of one database.
struct Team {
    database: String,
    founders: Vec<Session>,
    guard: Session,
    /// The snapshot that the first founder exported.
    exported: Option<String>,
}

/// What is done to take the point.
pub(super) struct Taking {
    pub(super) server: Server,
    pub(super) request: Open,
    end: CancellationToken,
    pub(super) turn: Turn,
    pub(super) standing: Arc<Standing>,
    control: Session,
    program: Program,
    version: i32,
    pub(super) system_identifier: String,
    in_recovery: bool,
    may_pause: bool,
    share: Share,
    teams: Vec<Team>,
}

/// The position and the snapshots are there.
pub(super) struct Moment {
    pub(super) position: Position,
    databases_at_one_point: bool,
}

/// Takes the point that `request` asks for. The sessions last until `end`.
pub(super) async fn open(
    server: &Server,
    request: &Open,
    end: &CancellationToken,
    (turn, standing): (Turn, Arc<Standing>),
    budget: &Budget,
) -> anyhow::Result<Taken> {
    let taking = Taking::begin(server, request, end, (turn, standing), budget).await?;
    match taking.in_recovery {
        false => taking.unpaused(Mode::Exported).await,
        true if taking.may_be_paused() => taking.paused().await,
        true => taking.unpaused(Mode::Still).await,
    }
}

impl Taking {
    /// Opens all sessions, or as many as there is room for; none has a transaction yet, and nothing is paused.
    pub(super) async fn begin(
        server: &Server,
        request: &Open,
        end: &CancellationToken,
        (turn, standing): (Turn, Arc<Standing>),
        budget: &Budget,
    ) -> anyhow::Result<Self> {
        let control = controlling(server, request.job, end).await?;
        let facts = control.row(FACTS, &[]).await.context("ask the server what it is")?;
        let version = facts.get(1);
        let (readers, share) = budget.share(&control, request).await?;
        let mut taking = Self {
            server: server.clone(),
            request: Open { readers, ..request.clone() },
            end: end.clone(),
            turn,
            standing,
            control,
            program: Program::find(version).await?,
            version,
            system_identifier: facts.get(2),
            in_recovery: facts.get(0),
            may_pause: facts.get(3),
            share,
            teams: Vec::new(),
        };
        taking.assemble().await?;
        Ok(taking)
    }

    /// Whether its replay may be paused: by the node's role, and without any commit having to wait.
    pub(super) fn may_be_paused(&self) -> bool {
        self.in_recovery && self.may_pause && !self.request.voting && self.standing.is_non_voting()
    }

    fn readers(&self) -> usize {
        self.request.readers.clamp(1, READERS_MAX)
    }

    async fn assemble(&mut self) -> anyhow::Result<()> {
        let (server, job, end) = (&self.server, self.request.job, &self.end);
        for database in &self.request.databases {
            // The founders, their spare, and the guard.
            let count = self.readers() + SPARES + 1;
            let opening = stream::iter(0..count).map(|_| Session::open(server, database, job, end));
            let mut founders: Vec<Session> = opening.buffered(OPENING_AT_ONCE).try_collect().await?;
            let guard = founders.pop().context("open a guard")?;
            self.teams.push(Team { database: database.clone(), founders, guard, exported: None });
        }
        Ok(())
    }

    /// On a standby whose replay may be paused.
    async fn paused(mut self) -> anyhow::Result<Taken> {
        let (mut tries, mut lock_tries) = (0, 0);
        loop {
            // Asked anew each time: the tries may take minutes.
            if !self.may_be_paused() {
                return self.unpaused(Mode::Still).await;
            }
            let halt = self.halt().await?;
            let begun = Instant::now();
            let work = self.while_it_may(&halt, true, PAUSE_WORK).await;
            // Before replay goes on, or it could meet what the founders still hold.
            let stood_down = if matches!(work, Some(Ok(_))) { Ok(()) } else { self.stand_down().await };
            let taken = work.as_ref().and_then(|work| Some(&work.as_ref().ok()?.0));
            let kept = self.after(halt, taken).await;
            let Some(work) = work else {
                tracing::info!("the point could not be taken within one pause of replay; it is sought without one");
                stood_down?;
                return self.unpaused(Mode::Still).await;
            };
            match work {
                Ok((moment, plans)) => return Ok(Taken { kept, ..self.taken(Mode::Paused, moment, plans) }),
                Err(Disturbance::Locked(error)) if lock_tries >= LOCK_TRIES => return Err(error.into()),
                Err(Disturbance::Locked(_)) => lock_tries += 1,
                Err(Disturbance::Fatal(error)) => return Err(error),
                Err(other) if tries >= TRIES => return Err(given_up(other)),
                Err(_) => tries += 1,
            }
            stood_down?;
            // Replay goes on for as long as it stood, if that was longer: what holds a lock has to come to its end.
            sleep(STEP.max(begun.elapsed())).await;
        }
    }

    /// Sees to it that replay stands.
    pub(super) async fn halt(&self) -> anyhow::Result<Halt> {
        Halt::begin(&self.standing, (&self.server, &self.control), self.request.job, self.turn.clone()).await
    }

    /// [`Self::in_pause`], unless it takes longer than that, or commits may wait for the server meanwhile.
    pub(super) async fn while_it_may(
        &self,
        halt: &Halt,
        with_schema: bool,
        longest: Duration,
    ) -> Option<Result<(Moment, Plans), Disturbance>> {
        tokio::select! {
            work = timeout(longest, self.in_pause(halt, with_schema)) => work.ok(),
            () = self.standing.until_voting() => None,
        }
    }

    /// Lets replay go on, or keeps it paused where that is wanted of a point that was taken.
    pub(super) async fn after(&self, halt: Halt, taken: Option<&Moment>) -> Option<Kept> {
        match (&self.request.pause, taken) {
            (Some(limits), Some(moment)) => Some(halt.keep(&self.standing, limits, moment.position.time).await),
            _ => {
                halt.end().await;
                None
            }
        }
    }

    /// Everything that is done while replay is paused; the schema is dumped if it is wanted.
    async fn in_pause(&self, halt: &Halt, with_schema: bool) -> Result<(Moment, Plans), Disturbance> {
        try_join_all(self.teams.iter().map(|team| is_free(&team.guard))).await?;
        let mut position = self.position().await?;
        // Where it stands is as old as the pause.
        position.time = halt.since().unwrap_or(position.time);
        if !halt.still_stands(&self.control).await? {
            return Err(Disturbance::Moved);
        }
        try_join_all(self.teams.iter().flat_map(|team| &team.founders).map(begin)).await?;
        try_join_all(self.teams.iter().flat_map(|team| &team.founders).map(hold)).await?;
        let plans = self.plans(Mode::Paused, with_schema).await?;
        let after = self.position().await?;
        if after.lsn != position.lsn || !after.in_recovery || !halt.still_stands(&self.control).await? {
            return Err(Disturbance::Moved);
        }
        Ok((Moment { position, databases_at_one_point: true }, plans))
    }

    /// On a primary, or a standby whose replay is not paused: the moment is sought, the schema is proven.
    async fn unpaused(mut self, mode: Mode) -> anyhow::Result<Taken> {
        for number in 1.. {
            let work = timeout(WORK_DEADLINE, self.try_unpaused(mode)).await;
            match work.map_err(|_| late(WORK_DEADLINE))? {
                Ok((mode, moment, plans)) => return Ok(self.taken(mode, moment, plans)),
                Err(Disturbance::Fatal(error)) => return Err(error),
                Err(other) if number >= TRIES => return Err(given_up(other)),
                Err(_) => {}
            }
            self.stand_down().await?;
            sleep(STEP).await;
        }
        Err(anyhow!("the tries are bounded"))
    }

    async fn try_unpaused(&mut self, mode: Mode) -> Result<(Mode, Moment, Plans), Disturbance> {
        let (mode, moment) = match mode {
            Mode::Exported => (mode, self.export().await?),
            _ => match self.stand_still().await? {
                Some(moment) => (Mode::Still, moment),
                None => (Mode::Single, self.alone().await?),
            },
        };
        let firsts = || self.teams.iter().filter_map(|team| Some((team.founders.first()?, &team.guard)));
        let before = try_join_all(firsts().map(|(founder, _)| catalog::fingerprint(founder))).await?;
        let plans = self.plans(mode, true).await?;
        let after = try_join_all(firsts().map(|(_, guard)| catalog::fingerprint(guard))).await?;
        if let Some((team, _)) = self.teams.iter().zip(before.iter().zip(&after)).find(|(_, (a, b))| a != b) {
            let message = format!("the schema of database {} kept changing", quoted(&team.database));
            let changed = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
            return Err(Disturbance::Other(changed.hint("Back it up when no DDL runs.").into()));
        }
        if self.position().await?.in_recovery != moment.position.in_recovery {
            return Err(Disturbance::Other(anyhow!("the server was promoted while the point was taken")));
        }
        Ok((mode, moment, plans))
    }

    /// All snapshots at a moment at which replay stands still by itself, if there is one.
    async fn stand_still(&mut self) -> anyhow::Result<Option<Moment>> {
        for _ in 0..STILL_TRIES {
            try_join_all(self.teams.iter().flat_map(|team| &team.founders).map(begin)).await?;
            let before = self.position().await?;
            try_join_all(self.teams.iter().flat_map(|team| &team.founders).map(hold)).await?;
            sleep(STILL_WAIT).await;
            let after = self.position().await?;
            if !before.receives || !after.receives {
                // WAL comes from an archive, or will come: how much of it is waiting to be replayed is unknown.
                self.stand_down().await?;
                return Ok(None);
            }
            // Where more has come than was replayed, a record may be in the middle of its replay.
            if before.lsn == after.lsn && after.received == Some(after.lsn) {
                return Ok(Some(Moment { position: after, databases_at_one_point: true }));
            }
            self.stand_down().await?;
            sleep(STEP).await;
        }
        Ok(None)
    }

    /// One founder per database.
    async fn alone(&mut self) -> anyhow::Result<Moment> {
        for team in &mut self.teams {
            team.founders.truncate(1);
        }
        try_join_all(self.teams.iter().flat_map(|team| &team.founders).map(begin)).await?;
        try_join_all(self.teams.iter().flat_map(|team| &team.founders).map(hold)).await?;
        Ok(Moment { position: self.position().await?, databases_at_one_point: self.teams.len() == 1 })
    }

    /// The first founder of each database exports its snapshot, the others import it. A snapshot belongs to one
    /// database; those of several are at one point when they are equal.
    async fn export(&mut self) -> anyhow::Result<Moment> {
        let mut tries = 0;
        let (position, databases_at_one_point) = loop {
            let firsts = || self.teams.iter().filter_map(|team| team.founders.first());
            try_join_all(firsts().map(begin)).await?;
            let asked = firsts().map(|first| first.row("SELECT pg_catalog.pg_current_snapshot()::text", &[]));
            let rows = try_join_all(asked).await?;
            let snapshots: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
            let are_equal = snapshots.windows(2).all(|pair| pair[0] == pair[1]);
            tries += 1;
            if are_equal || tries >= EQUAL_TRIES {
                break (self.position().await?, are_equal);
            }
            self.stand_down().await?;
        };
        for team in &mut self.teams {
            let Some((first, others)) = team.founders.split_first() else { continue };
            let snapshot: String = first.row("SELECT pg_catalog.pg_export_snapshot()", &[]).await?.get(0);
            first.run(REST).await?;
            try_join_all(others.iter().map(|other| import(other, &snapshot))).await?;
            team.exported = Some(snapshot);
        }
        Ok(Moment { position, databases_at_one_point })
    }

    /// The plan and the schema of every database, in the order of the request.
    async fn plans(&self, mode: Mode, with_schema: bool) -> Result<Plans, Disturbance> {
        let mut plans = Vec::new();
        for team in &self.teams {
            let first = team.founders.first().context("ask a founder for the plan")?;
            if mode == Mode::Paused {
                first.run(LOCK_WAIT).await?;
            }
            let read = catalog::plan(first, mode != Mode::Exported).await;
            // A sequence that is dropped after the snapshot is still listed in it, and cannot be read.
            let gone = |error: &anyhow::Error| mode != Mode::Paused && has_code(error, &[SqlState::UNDEFINED_TABLE]);
            let mut plan = read.map_err(|error| match gone(&error) {
                true => Disturbance::Other(error),
                false => error.context(format!("plan database {:?}", team.database)).into(),
            })?;
            if plan.large_objects > 0 {
                catalog::may_read_large_objects(first, &team.database).await?;
            }
            // Ends the locks that reading took, and what it was set to.
            first.run(BACK_TO_REST).await?;
            if !with_schema {
                plans.push((plan, None));
                continue;
            }
            let dumped = self.program.run(&self.server, &team.database, mode, team.exported.as_deref()).await;
            let schema = dumped.map_err(Disturbance::Other)?;
            plan.schema_bytes = schema.bytes;
            plan.warnings.clone_from(&schema.warnings);
            plan.dump_version.clone_from(&self.program.version);
            plans.push((plan, Some(schema)));
        }
        Ok(plans)
    }

    pub(super) async fn position(&self) -> anyhow::Result<Position> {
        let row = self.control.row(POSITION, &[]).await.context("ask the server for its WAL position")?;
        let lsn = |text: Option<&str>| text.and_then(|text| text.parse::<Lsn>().ok());
        Ok(Position {
            in_recovery: row.get(0),
            lsn: lsn(row.get(1)).context("read the WAL position")?,
            received: lsn(row.get(2)),
            timeline: row.get::<_, i32>(3).unsigned_abs(),
            time: row.get(4),
            receives: row.get(5),
        })
    }

    /// Ends all transactions, to begin anew.
    pub(super) async fn stand_down(&mut self) -> anyhow::Result<()> {
        let (server, job, end) = (&self.server, self.request.job, &self.end);
        let downs = self.teams.iter_mut().map(|team| async {
            let database = &team.database;
            team.exported = None;
            let founders = std::mem::take(&mut team.founders);
            let downs = stream::iter(founders).map(|founder| stood_down(founder, server, database, job, end));
            team.founders = downs.buffered(OPENING_AT_ONCE).try_collect().await?;
            // A look for locks may have been given up midway, and replay may have ended the session.
            if !matches!(timeout(STAND_DOWN_DEADLINE, team.guard.run(WAIT_ON)).await, Ok(Ok(()))) {
                team.guard = Session::open(server, database, job, end).await?;
            }
            anyhow::Ok(())
        });
        try_join_all(downs).await?;
        if self.control.is_closed() {
            self.control = controlling(server, job, end).await?;
        }
        Ok(())
    }

    pub(super) fn taken(mut self, mode: Mode, moment: Moment, plans: Plans) -> Taken {
        // Fewer once a try has ended with one founder for each database.
        let founders = self.teams.iter().map(|team| team.founders.len()).min().unwrap_or(1);
        let readers = self.readers().min(founders);
        let point = Point {
            lsn: moment.position.lsn,
            timeline: moment.position.timeline,
            time: moment.position.time,
            in_recovery: moment.position.in_recovery,
            mode,
            server_version: self.version,
            system_identifier: self.system_identifier,
            readers,
            databases_at_one_point: moment.databases_at_one_point,
        };
        let mut databases = Vec::new();
        let mut pools = Vec::new();
        for (mut team, (plan, schema)) in self.teams.into_iter().zip(plans) {
            let anchor = team.exported.map(|snapshot| Anchor { session: team.founders.remove(0), snapshot });
            let crew = Crew { founders: team.founders, anchor, guard: team.guard };
            let (server, job, end) = (self.server.clone(), self.request.job, self.end.clone());
            pools.push(Pool::new(server, job, &plan, schema, end, crew));
            databases.push(plan);
        }
        self.share.shrink(&self.request);
        Taken { opened: Opened { point, databases }, pools, kept: None, share: self.share }
    }
}

/// What each database holds, with its schema if that was dumped here.
pub(super) type Plans = Vec<(DatabasePlan, Option<Schema>)>;

/// Begins a founder's transaction.
async fn begin(session: &Session) -> anyhow::Result<()> {
    session.run(BEGIN).await
}

/// Takes a founder's snapshot.
async fn hold(session: &Session) -> anyhow::Result<()> {
    session.run("SELECT 1").await?;
    session.run(REST).await
}

/// A session that asks for positions.
async fn controlling(server: &Server, job: i64, end: &CancellationToken) -> anyhow::Result<Session> {
    let control = Session::open(server, server.database(), job, end).await?;
    control.run(LOCK_WAIT).await?;
    Ok(control)
}

/// Sees to it that replay holds no lock, in the database of this session or on what all have in common.
async fn is_free(guard: &Session) -> Result<(), Disturbance> {
    guard.run(LOCK_WAIT).await?;
    let locked = guard.rows(LOCKED, &[]).await;
    guard.run(WAIT_ON).await?;
    let locked = locked?;
    let Some(row) = locked.first() else { return Ok(()) };
    let table = format!("{}.{}", row.get::<_, &str>(0), row.get::<_, &str>(1));
    let message = format!("table \"{table}\" is locked by a change of the schema that has not ended");
    Err(Disturbance::Locked(PgError::new(SqlState::LOCK_NOT_AVAILABLE, message)))
}

/// A founder without a transaction: the same session, or another one in the place of one that was ended or does not
/// answer.
async fn stood_down(
    founder: Session,
    server: &Server,
    database: &str,
    job: i64,
    end: &CancellationToken,
) -> anyhow::Result<Session> {
    for _ in 0..STAND_DOWN_TRIES {
        match timeout(STAND_DOWN_DEADLINE, founder.run("ROLLBACK")).await {
            Ok(Ok(())) => return Ok(founder),
            Ok(Err(_)) => {}
            Err(_) => founder.cancel().await,
        }
    }
    drop(founder);
    Session::open(server, database, job, end).await
}

pub(super) fn given_up(disturbance: Disturbance) -> anyhow::Error {
    match disturbance {
        Disturbance::Locked(error) => error.into(),
        Disturbance::Other(error) | Disturbance::Fatal(error) => error,
        Disturbance::Moved => {
            let message = "replay on the server was resumed by somebody else while the point was taken";
            PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).into()
        }
    }
}
