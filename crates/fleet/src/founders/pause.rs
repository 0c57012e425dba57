//! Pausing a standby's replay, and never leaving it paused.
//!
//! A standby that stays paused falls behind for good, so there are three ways back. The ordinary one is [`Pause::end`].
//! A pause that is dropped instead, because whoever opened founders went away, ends in the background. And should this
//! process die, the server resumes by itself: what pauses is one statement that pauses, sleeps for as long as the session
//! that keeps the pause is there, a minute at most, and resumes; it runs to its end without a client.
//!
//! Whoever pauses has a *turn*, and a pause keeps it until replay goes on and nothing is left on the server that would
//! resume, so that the next one's pause is not ended by this one.
//!
//! A pause that is to last longer than a point takes is *watched*: in the place of the statement that sleeps comes one
//! that looks, again and again, whether that session still shows life. A process that is killed has none any more, and one
//! that is frozen or cut off says nothing on it; in either case the server resumes. It counts its own looks, so that no clock has
//! a say. How long such a pause lasts is told in `super::standing`.
//!
//! A pause of somebody else's is left alone. (Should one begin while ours lasts, PostgreSQL cannot tell the two apart.)

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use cluster::Lsn;
use pgerror::{PgError, SqlState};
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::CancelToken;
use tokio_util::sync::CancellationToken;

use super::open::LOCK_WAIT;
use super::session::{Session, cancel, has_code};
use crate::Server;
use crate::disk::DataDirectory;

/// The server resumes by itself after this.
const SWITCH: Duration = Duration::from_secs(60);

/// What is done in a pause has to be done by then, so that the switch never acts while it is.
pub(super) const PAUSE_WORK: Duration = Duration::from_secs(45);

/// Replay pauses between two records; one that waits for a conflicting query longer than this is not waited for.
const PAUSED_WAIT: Duration = Duration::from_secs(10);

/// Time between two questions whether replay is paused.
const POLL: Duration = Duration::from_millis(5);

/// Replay that is let go on up to a position is paused again after this, wherever it is then.
const STEP_MAX: Duration = Duration::from_millis(500);

/// Up to so many bytes before that position it runs freely; from there on it is stopped every few records, and behind the
/// second mark after each, because it cannot be told where to stop.
const STEP_NEAR: u64 = 16 * 1024;
const STEP_CLOSE: u64 = 2 * 1024;

/// Sessions on which resuming is tried; after that it is left to the switch.
const RESUME_TRIES: usize = 3;

/// One such try.
const RESUME_DEADLINE: Duration = Duration::from_secs(10);

/// A cancelled switch that has not ended by then is terminated, and waited for once more.
const SWITCH_DEADLINE: Duration = Duration::from_secs(5);

/// A pause is looked after so often in the server.
const WATCH: Duration = Duration::from_millis(250);

/// A keeper that has said nothing for so long is taken for frozen or cut off, and replay goes on.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(10);

/// A statement that is to watch and is not seen at work by then is given up.
const WATCHED_DEADLINE: Duration = Duration::from_secs(5);

const NOT_PAUSED: &str = "not paused";
const PAUSED: &str = "paused";

/// The right to pause; free when the last of its clones is dropped.
pub(super) type Turn = Arc<OwnedMutexGuard<()>>;

/// The statement that pauses and sleeps.
struct Switch {
    /// Of the session it runs in.
    pid: i32,
    cancel: CancelToken,
    /// Whether it ran to its end, and so has resumed; `None` once that was asked.
    task: Option<JoinHandle<bool>>,
    /// Whether it has been seen to take effect.
    seen: bool,
}

impl Switch {
    /// Starts a statement that outlives this process.
    async fn start(server: &Server, job: i64, statement: String) -> anyhow::Result<Self> {
        let sleeper = Session::open(server, server.database(), job, &CancellationToken::new()).await?;
        // With the check of its client on, the statement would end with this process, and not resume.
        sleeper.run("SET client_connection_check_interval = 0").await?;
        // Which roles this one is member of it then knows, and need not read while replay may stand with a lock on them.
        let me = "SELECT pid FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())";
        let pid = sleeper.row(me, &[]).await?.get(0);
        let cancel = sleeper.client.cancel_token();
        let task = tokio::spawn(async move {
            // The whole session, or its connection would be closed here.
            let sleeper = sleeper;
            sleeper.client.batch_execute(&statement).await.is_ok()
        });
        Ok(Self { pid, cancel, task: Some(task), seen: false })
    }

    fn is_over(&self) -> bool {
        self.task.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// A pause of ours.
pub(super) struct Pause {
    server: Server,
    job: i64,
    /// Taken when the pause is ended.
    held: Option<(Session, Switch, Option<Turn>)>,
}

/// What a watched pause shows of its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether it is a standby still.
    pub(super) in_recovery: bool,
    /// Whether its replay is paused.
    pub(super) is_paused: bool,
    /// Bytes of WAL that it has received and not replayed.
    pub(super) waiting: u64,
    /// Whether it receives WAL. Only replay would begin that anew.
    pub(super) receives: bool,
}

impl Pause {
    /// Pauses replay, and waits until it stands.
    pub(super) async fn begin(server: &Server, job: i64, turn: Turn) -> anyhow::Result<Self> {
        Self::begin_for(server, job, turn, SWITCH).await
    }

    /// The same, with another life of the switch.
    async fn begin_for(server: &Server, job: i64, turn: Turn, switch: Duration) -> anyhow::Result<Self> {
        let control = Session::open(server, server.database(), job, &CancellationToken::new()).await?;
        if state(&control).await? != NOT_PAUSED {
            let message = "replay on the server is paused by somebody else";
            return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
                .hint("Resume it with pg_wal_replay_resume(), or let the backup read another server.")
                .into());
        }
        // Replay may stand with a lock on the catalogs: what is asked of this session until it goes on, it has to know by then.
        control.run(&format!("{LOCK_WAIT}; SELECT pg_catalog.pg_wal_replay_resume() WHERE false")).await?;
        let keeper = Keeper::of(&control).await?;
        let switch = Switch::start(server, job, pause(&keeper, switch)).await?;
        let held = Some((control, switch, Some(turn)));
        let mut pause = Self { server: server.clone(), job, held };
        match pause.stands().await {
            Ok(()) => Ok(pause),
            Err(error) => {
                pause.end().await;
                Err(error)
            }
        }
    }

    /// Waits until replay is paused.
    async fn stands(&mut self) -> anyhow::Result<()> {
        let Some((control, switch, _)) = &mut self.held else { return Ok(()) };
        let deadline = Instant::now() + PAUSED_WAIT;
        loop {
            if switch.is_over() {
                bail!("the statement that pauses replay was ended by the server");
            }
            let state = state(control).await?;
            switch.seen |= state != NOT_PAUSED;
            if state == PAUSED {
                return Ok(());
            }
            if Instant::now() > deadline {
                let message = "replay on the server did not pause in time";
                return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
                    .detail("It may be waiting for a query that conflicts with it.")
                    .into());
            }
            sleep(POLL).await;
        }
    }

    /// Whether it has lasted without a break until now.
    pub(super) async fn still_stands(&self) -> anyhow::Result<bool> {
        let Some((control, switch, _)) = &self.held else { return Ok(false) };
        Ok(!switch.is_over() && is_paused(control).await?)
    }

    /// Lets replay go on until it has come up to `until`, or for [`STEP_MAX`], and waits until it is paused again. It may
    /// have come a few records further.
    pub(super) async fn step(&mut self, until: Lsn) -> anyhow::Result<()> {
        let Some((control, switch, _)) = &self.held else { bail!("replay is not paused") };
        if switch.is_over() {
            bail!("the statement that pauses replay was ended by the server");
        }
        control.run(&step(until)).await?;
        self.stands().await
    }

    /// Lets it last for up to `longest`, as long as this process shows life with [`Pause::look`]; its turn is free from now
    /// on. There is no moment without a statement that would resume.
    pub(super) async fn watched(&mut self, longest: Duration) -> anyhow::Result<()> {
        let Some((control, switch, turn)) = &mut self.held else { bail!("replay is not paused") };
        let statement = watch(&Keeper::of(control).await?, self.job, longest);
        let mut watching = Switch::start(&self.server, self.job, statement).await?;
        watching.seen = true;
        let at_work = timeout(WATCHED_DEADLINE, at_work(control, &watching)).await;
        let at_work =
            at_work.unwrap_or_else(|_| Err(anyhow!("the statement that watches a pause was not seen at work")));
        if let Err(error) = at_work {
            // Should it be at work all the same, it ends by itself when replay goes on.
            silence(control, watching).await;
            return Err(error);
        }
        silence(control, std::mem::replace(switch, watching)).await;
        // Whoever begins a pause asks first whether this one stands.
        drop(turn.take());
        Ok(())
    }

    /// What the server shows; with it this process shows life.
    pub(super) async fn look(&self) -> anyhow::Result<Seen> {
        let Some((control, switch, _)) = &self.held else { bail!("replay is not paused") };
        let row = control.row(SEEN, &[]).await?;
        let is_paused = row.get::<_, bool>(1) && !switch.is_over();
        let waiting = u64::try_from(row.get::<_, i64>(2)).unwrap_or(0);
        Ok(Seen { in_recovery: row.get(0), is_paused, waiting, receives: row.get(3) })
    }

    /// Where the server keeps its data.
    pub(super) async fn directory(&self) -> DataDirectory {
        match &self.held {
            Some((control, ..)) => DataDirectory::of(&control.client).await,
            None => DataDirectory::default(),
        }
    }

    /// Resumes replay. Given up midway, it goes on by itself.
    pub(super) async fn end(mut self) {
        if let Some(finishing) = self.finish() {
            drop(finishing.await);
        }
    }

    fn finish(&mut self) -> Option<JoinHandle<()>> {
        let (control, switch, turn) = self.held.take()?;
        let (server, job) = (self.server.clone(), self.job);
        // Without a runtime the process is ending, and the switch does it.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            finish(&server, job, control, switch).await;
            drop(turn);
        }))
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        drop(self.finish());
    }
}

/// One statement, so that nothing but the server's own pace comes between resuming and pausing. Should it end in the
/// middle, replay goes on.
///
/// Replay asks before each record whether it is to pause. Resumed and paused within one expression it goes on by a single
/// record, if it wakes up in between at all; so the last stretch takes some hundred such pairs, and ends at the goal.
fn step(until: Lsn) -> String {
    let before = |bytes: u64| Lsn(until.0.saturating_sub(bytes));
    let (near, close) = (before(STEP_NEAR), before(STEP_CLOSE));
    format!(
        "DO $$ DECLARE
            ends CONSTANT timestamptz := pg_catalog.clock_timestamp() + interval '{} ms';
        BEGIN
            IF pg_catalog.pg_last_wal_replay_lsn() < '{near}' THEN
                PERFORM pg_catalog.pg_wal_replay_resume();
                WHILE pg_catalog.pg_last_wal_replay_lsn() < '{near}' AND pg_catalog.clock_timestamp() < ends LOOP
                END LOOP;
                PERFORM pg_catalog.pg_wal_replay_pause();
            END IF;
            WHILE pg_catalog.pg_last_wal_replay_lsn() < '{close}' AND pg_catalog.clock_timestamp() < ends LOOP
                PERFORM pg_catalog.pg_wal_replay_resume();
                PERFORM pg_catalog.pg_wal_replay_pause();
            END LOOP;
            WHILE pg_catalog.pg_last_wal_replay_lsn() < '{until}' AND pg_catalog.clock_timestamp() < ends LOOP
                PERFORM pg_catalog.pg_wal_replay_resume(), pg_catalog.pg_wal_replay_pause();
            END LOOP;
        END $$",
        STEP_MAX.as_millis()
    )
}

/// The session that keeps a pause: its process and when that began, for numbers are used again.
struct Keeper {
    pid: i32,
    began: String,
}

impl Keeper {
    async fn of(session: &Session) -> anyhow::Result<Self> {
        let mine =
            "SELECT pid, backend_start::text FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()";
        let row = session.row(mine, &[]).await?;
        Ok(Self { pid: row.get(0), began: row.get(1) })
    }
}

/// Pauses, looks whether the keeper is there, and resumes when it is not, or after `longest`.
///
/// Replay may come to stand with a lock on any catalog. So all of it is one statement, which is planned before the pause,
/// evaluates its columns from left to right, and names no table: it takes no lock in between.
fn pause(keeper: &Keeper, longest: Duration) -> String {
    let Keeper { pid, began } = keeper;
    let (looks, wait) = (longest.as_millis() / WATCH.as_millis(), WATCH.as_secs_f64());
    format!(
        "SELECT pg_catalog.pg_wal_replay_pause(), (
            WITH RECURSIVE looks (number, keeper, waited) AS (
                SELECT 0, {pid}, true
                UNION ALL
                SELECT number + 1, keeper,
                       pg_catalog.pg_sleep({wait}) IS NOT NULL AND pg_catalog.pg_stat_clear_snapshot() IS NOT NULL
                FROM looks, LATERAL pg_catalog.pg_stat_get_activity(keeper) AS seen
                WHERE number < {looks} AND seen.backend_start::text = '{began}')
            SELECT count(waited) FROM looks), pg_catalog.pg_wal_replay_resume()"
    )
}

/// None of these may be asked of a server that was promoted.
const SEEN: &str = "
    SELECT pg_catalog.pg_is_in_recovery(),
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_get_wal_replay_pause_state() = 'paused'
                ELSE false END,
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN coalesce(pg_catalog.pg_wal_lsn_diff(
                pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn()), 0) ELSE 0 END::int8,
           EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver)";

/// The name under which a statement that watches is listed once it is at work.
fn watcher(job: i64) -> String {
    format!("backhaul job {job}, watching its pause")
}

/// Watches a pause that stands already, and resumes it when its keeper is gone or silent. It never pauses, and where
/// somebody has resumed before it, it does nothing: a pause that it finds later would be another one.
///
/// Its first words are those by which a node knows its own pauses (`crate::probe`); of a long statement only the
/// beginning is listed.
fn watch(keeper: &Keeper, job: i64, longest: Duration) -> String {
    let Keeper { pid, began } = keeper;
    // Behind the keeper, which knows the time as well and can say why it is over.
    let looks = (longest + SILENCE_MAX).as_millis() / WATCH.as_millis();
    let silence = SILENCE_MAX.as_millis() / WATCH.as_millis();
    format!(
        "DO $$ -- Behind pg_wal_replay_pause(), until pg_wal_replay_resume().
        DECLARE
            said timestamptz;
            said_before timestamptz;
            silent int := 0;
        BEGIN
            PERFORM pg_catalog.set_config('application_name', '{}', false);
            FOR look IN 1..{looks} LOOP
                PERFORM pg_catalog.pg_sleep({});
                IF NOT pg_catalog.pg_is_in_recovery() THEN
                    RETURN;
                ELSIF NOT pg_catalog.pg_is_wal_replay_paused() THEN
                    RETURN;
                END IF;
                PERFORM pg_catalog.pg_stat_clear_snapshot();
                SELECT max(state_change) INTO said FROM pg_catalog.pg_stat_activity
                WHERE pid = {pid} AND backend_start::text = '{began}';
                EXIT WHEN said IS NULL;
                silent := CASE WHEN said = said_before THEN silent + 1 ELSE 0 END;
                said_before := said;
                EXIT WHEN silent >= {silence};
            END LOOP;
            PERFORM pg_catalog.pg_wal_replay_resume();
        END $$",
        watcher(job),
        WATCH.as_secs_f64()
    )
}

/// Waits until a statement that watches is listed as one.
async fn at_work(control: &Session, watching: &Switch) -> anyhow::Result<()> {
    let listed = "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity
                                 WHERE pid = $1 AND state = 'active' AND application_name LIKE '%, watching its pause')";
    loop {
        if watching.is_over() {
            bail!("the statement that watches a pause was ended by the server");
        }
        if control.row(listed, &[&watching.pid]).await?.get(0) {
            return Ok(());
        }
        sleep(POLL).await;
    }
}

/// Resumes first and cancels the switch only then: in between, it would still resume if this process died.
async fn finish(server: &Server, job: i64, control: Session, mut switch: Switch) {
    let end = CancellationToken::new();
    let orphan = control.client.cancel_token();
    let mut session = Some(control);
    for _ in 0..RESUME_TRIES {
        let control = match session.take() {
            Some(session) => session,
            None => {
                // A step that has lost its client may still run, and would end in a pause behind everything here.
                cancel(orphan.clone()).await;
                sleep(STEP_MAX * 2).await;
                match Session::open(server, server.database(), job, &end).await {
                    Ok(session) => session,
                    Err(_) => continue,
                }
            }
        };
        match timeout(RESUME_DEADLINE, resume(&control, &mut switch)).await {
            Ok(Ok(())) => {
                silence(&control, switch).await;
                return;
            }
            Ok(Err(error)) => tracing::warn!("replay could not be resumed: {error:#}"),
            Err(_) => tracing::warn!("replay could not be resumed in time"),
        }
    }
    tracing::error!("replay is left to be resumed by the server itself, within {} seconds", SWITCH.as_secs());
    if let Some(task) = switch.task {
        drop(timeout(SWITCH + SWITCH_DEADLINE, task).await);
    }
}

/// Ends the statement that sleeps; left alone, it would resume whatever pause there is when it wakes.
async fn silence(control: &Session, switch: Switch) {
    let Some(mut task) = switch.task else { return };
    cancel(switch.cancel).await;
    if timeout(SWITCH_DEADLINE, &mut task).await.is_ok() {
        return;
    }
    let statement = format!("SELECT pg_catalog.pg_terminate_backend({})", switch.pid);
    let terminating = control.run(&statement);
    let terminated = matches!(timeout(SWITCH_DEADLINE, terminating).await, Ok(Ok(_)));
    if !terminated || timeout(SWITCH_DEADLINE, task).await.is_err() {
        tracing::error!("a session that pauses replay, process {} of the server, could not be ended", switch.pid);
    }
}

async fn resume(control: &Session, switch: &mut Switch) -> anyhow::Result<()> {
    loop {
        if switch.is_over() {
            let resumed = match switch.task.take() {
                Some(task) => task.await.unwrap_or(false),
                None => false,
            };
            if resumed {
                return Ok(());
            }
            break;
        }
        match state(control).await {
            Ok(state) if state == NOT_PAUSED && switch.seen => return Ok(()),
            // The switch may be on its way to the server still; resumed before it arrives, it would pause after all.
            Ok(state) if state == NOT_PAUSED => sleep(POLL).await,
            Ok(_) => break,
            Err(error) if is_promoted(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    match control.run("SELECT pg_catalog.pg_wal_replay_resume()").await {
        Err(error) if !is_promoted(&error) => Err(error),
        _ => Ok(()),
    }
}

/// "recovery is not in progress": promotion has ended the pause.
fn is_promoted(error: &anyhow::Error) -> bool {
    has_code(error, &[SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE])
}

/// Whether replay stands, whoever has paused it.
pub(super) async fn is_paused(control: &Session) -> anyhow::Result<bool> {
    Ok(state(control).await? == PAUSED)
}

async fn state(control: &Session) -> anyhow::Result<String> {
    Ok(control.row("SELECT pg_catalog.pg_get_wal_replay_pause_state()", &[]).await?.get(0))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;
    use crate::private::{Installation, Instance, RunAs, Settings};

    fn instance(dir: &Path, name: &str) -> Instance {
        std::fs::create_dir_all(dir.join(name)).unwrap();
        Instance::new(Installation::find().unwrap(), RunAs::choose().unwrap(), &dir.join(name)).unwrap()
    }

    async fn stop(instance: &mut Instance) {
        let child = instance.child().unwrap();
        child.start_kill().unwrap();
        child.wait().await.unwrap();
    }

    async fn ask(server: &Server) -> String {
        let session = Session::open(server, "postgres", 0, &CancellationToken::new()).await.unwrap();
        state(&session).await.unwrap()
    }

    /// A pause that is watched, and nothing but the watch to end it.
    async fn watched_until(server: &Server, turn: Turn, end: &str, longest: Duration) {
        let mut pause = Pause::begin(server, 0, turn).await.unwrap();
        pause.watched(longest).await.unwrap();
        // Longer than any look of the server's.
        sleep(WATCH * 3).await;
        assert_eq!(ask(server).await, "paused", "{end}");
        if end == "gone" {
            let (control, switch, _) = pause.held.take().unwrap();
            switch.task.unwrap().abort();
            drop(control);
        }
        let begun = Instant::now();
        while ask(server).await != NOT_PAUSED {
            assert!(begun.elapsed() < SILENCE_MAX * 3, "replay stays paused: {end}");
            sleep(POLL).await;
            if end == "over" {
                drop(pause.look().await);
            }
        }
        pause.end().await;
        assert_eq!(ask(server).await, NOT_PAUSED);
    }

    #[tokio::test]
    async fn the_server_resumes_by_itself_when_nobody_is_left_to_do_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let (mut primary, mut standby) = (instance(dir.path(), "primary"), instance(dir.path(), "standby"));
        primary.init("root", &Settings::new()).unwrap();
        primary.start("root", &dir.path().join("primary.log")).await.unwrap();
        // A server that looks after its clients while a statement runs must not end this one with its client.
        let checks = vec![("client_connection_check_interval".to_owned(), "50ms".to_owned())];
        standby.clone_from(&primary.conninfo("root"), "standby", &checks).unwrap();
        standby.start("root", &dir.path().join("standby.log")).await.unwrap();
        let server = standby.server("root").unwrap();

        let turns = Arc::new(tokio::sync::Mutex::new(()));
        let turn = async || Arc::new(turns.clone().lock_owned().await);
        // As if this process had been killed: the connections are gone, and nothing was said. Or as if it stood still.
        for (is_killed, switch) in [(true, SWITCH), (false, Duration::from_secs(2))] {
            let mut pause = Pause::begin_for(&server, 0, turn().await, switch).await.unwrap();
            sleep(WATCH * 3).await;
            assert!(pause.still_stands().await.unwrap(), "{is_killed}");
            let (control, switch, _) = pause.held.take().unwrap();
            switch.task.unwrap().abort();
            let kept = (!is_killed).then_some(control);
            let deadline = Instant::now() + SWITCH / 4;
            while ask(&server).await != NOT_PAUSED {
                assert!(Instant::now() < deadline, "replay stays paused: {is_killed}");
                sleep(POLL).await;
            }
            drop(kept);
        }

        // A switch that an operator ends leaves the pause to us.
        let pause = Pause::begin(&server, 0, turn().await).await.unwrap();
        cancel(pause.held.as_ref().unwrap().1.cancel.clone()).await;
        while pause.still_stands().await.unwrap() {
            sleep(POLL).await;
        }
        pause.end().await;
        assert_eq!(ask(&server).await, NOT_PAUSED);

        // The next turn comes when replay goes on, and nothing that sleeps is left.
        drop(Pause::begin(&server, 0, turn().await).await.unwrap());
        turn().await;
        assert_eq!(ask(&server).await, NOT_PAUSED);
        let session = Session::open(&server, "postgres", 0, &CancellationToken::new()).await.unwrap();
        let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep%'
                        AND pid <> pg_backend_pid()";
        assert_eq!(session.row(sleeping, &[]).await.unwrap().get::<_, i64>(0), 0);
        // A pause that is watched ends when its keeper is gone, when it says nothing, and in the end by itself.
        for (end, longest) in [("gone", SWITCH), ("silent", SWITCH), ("over", Duration::from_secs(1))] {
            watched_until(&server, turn().await, end, longest).await;
        }
        stop(&mut standby).await;
        stop(&mut primary).await;
    }
}
