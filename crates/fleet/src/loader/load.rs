//! Loading a span: its number first, its rows after it, in one transaction.
//!
//! The number is the key of a table in the same database. So a span is committed once, whoever sends it how often, and
//! however answers get lost: a second one finds the number there, and one that comes while the first is not yet
//! committed ends it (`holds`), or, where another node has it, waits for it. What is answered with success is flushed,
//! however small the span: whoever sent it forgets it then, so a crash of the server must not lose it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use cluster::service::{Boxed, Upload};
use futures_util::SinkExt as _;
use pgerror::{PgError, SqlState};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::CopyInSink;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::acting::{Acting, has_done};
use super::finish::COUNTED;
use super::holds::Hold;
use super::{LOADERS_MAX, Load, Loaded, Loader, already_loaded, full};
use crate::Server;
use crate::founders::session::{has_code, quoted, within};

/// A span for which no session is free by then is refused, and may be sent again.
const LOADER_WAIT: Duration = Duration::from_secs(300);

/// A span whose number is in another transaction, of a worker that has gone perhaps, is refused after this long.
const LOCK_WAIT: &str = "10s";

/// Where the server's own setting is not to wait for the disk, a span does; a stronger setting is left as it is.
const FLUSHED: &str = "SELECT pg_catalog.set_config(name, 'local', true) FROM pg_catalog.pg_settings
    WHERE name = 'synchronous_commit' AND setting = 'off'";

/// A COPY that has not begun by then fails.
const BEGIN_DEADLINE: Duration = Duration::from_secs(60);

/// A span is given up when the server takes no rows, or none come, for so long.
const STALL_DEADLINE: Duration = Duration::from_secs(600);

/// A commit that takes longer fails, or its answer is lost; a repeat tells which.
const COMMIT_DEADLINE: Duration = Duration::from_secs(600);

type Sink = Pin<Box<CopyInSink<Bytes>>>;

/// A span as it comes in.
pub(super) struct Rows {
    sink: Sink,
    acting: Acting,
    watch: Watch,
    load: Load,
    server: Server,
    /// Last, because the span is free only after its session has been told to end.
    hold: Hold,
}

/// Begins to load a span. Whoever loads it through this node already is ended.
pub(super) async fn begin(loader: &Loader, load: Load) -> anyhow::Result<Rows> {
    let mut hold = loader.holds.take(&load)?;
    let permit = permit(loader, &hold).await?;
    let begun = begin_held(loader, &load, &mut hold).await;
    let (acting, sink) = begun.map_err(|error| hold.told(error))?;
    let server = loader.server.clone();
    Ok(Rows { sink, acting, watch: Watch::over(hold.end.clone(), permit), load, server, hold })
}

async fn permit(loader: &Loader, hold: &Hold) -> anyhow::Result<OwnedSemaphorePermit> {
    let waiting = timeout(LOADER_WAIT, loader.sessions.clone().acquire_owned());
    let waited = tokio::select! {
        waited = waiting => waited,
        () = hold.end.cancelled() => return Err(hold.superseded().into()),
    };
    let full = || {
        let message = format!("{LOADERS_MAX} sessions load rows into {} already", loader.server.address());
        PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
    };
    Ok(waited.map_err(|_| full())??)
}

async fn begin_held(loader: &Loader, load: &Load, hold: &mut Hold) -> anyhow::Result<(Acting, Sink)> {
    let acting = Acting::inside(&loader.server, load.job, load.database_oid, load.run, &hold.end).await?;
    let session = &acting.session;
    hold.begin(session).await?;
    session.run(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_WAIT}'; {FLUSHED}")).await?;
    let insert = "INSERT INTO backhaul_restore.progress (span, loaded) VALUES ($1, pg_catalog.now())
                  ON CONFLICT DO NOTHING RETURNING 1";
    let inserted = session.rows(insert, &[&i64::from(load.span)]).await.map_err(|error| not_now(error, load))?;
    if inserted.is_empty() {
        return Err(already_loaded(load.job, load.span).into());
    }
    if has_done(session, COUNTED).await? {
        let message = format!("restore job {} does not take rows any more", load.job);
        return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).into());
    }
    let copying = within(BEGIN_DEADLINE, session.client.copy_in(&copy_of(&load.what, &load.encoding))).await;
    let sink = Box::pin(copying.map_err(|error| named(error, &load.what))?);
    Ok((acting, sink))
}

fn not_now(error: anyhow::Error, load: &Load) -> anyhow::Error {
    if has_code(&error, &[SqlState::LOCK_NOT_AVAILABLE]) {
        let message = format!("span {} of restore job {} is being loaded by somebody else", load.span, load.job);
        return PgError::new(SqlState::LOCK_NOT_AVAILABLE, message).into();
    }
    error.context("note the span")
}

fn copy_of(what: &Loaded, encoding: &str) -> String {
    let encoding = if encoding.is_empty() { "UTF8".to_owned() } else { encoding.replace('\'', "''") };
    match what {
        Loaded::Table { schema, name, columns } => {
            let columns: Vec<String> = columns.iter().map(|column| quoted(column)).collect();
            let columns = if columns.is_empty() { String::new() } else { format!(" ({})", columns.join(", ")) };
            format!("COPY {}.{}{columns} FROM STDIN (ENCODING '{encoding}')", quoted(schema), quoted(name))
        }
        Loaded::LargeObjects => "COPY backhaul_restore.large_objects (id, owner, acl, note) FROM STDIN".to_owned(),
        Loaded::LargeObjectData => "COPY backhaul_restore.pieces (id, number, piece) FROM STDIN".to_owned(),
    }
}

/// An error with the name of what was loaded, which the server leaves to its CONTEXT.
fn named(error: anyhow::Error, what: &Loaded) -> anyhow::Error {
    let Some(said) = PgError::of(&error) else { return error };
    if said.code == SqlState::CONNECTION_FAILURE {
        return error;
    }
    let name = match what {
        Loaded::Table { schema, name, .. } => format!("table \"{schema}.{name}\""),
        Loaded::LargeObjects | Loaded::LargeObjectData => "large objects".to_owned(),
    };
    PgError { message: format!("cannot load {name}: {}", said.message), ..said.clone() }.into()
}

impl Upload for Rows {
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            self.watch.seen();
            // What the server has against a row is only said at the end.
            let sent = within(STALL_DEADLINE, self.sink.send(bytes)).await;
            sent.map_err(|error| self.hold.told(error)).context("send rows")
        })
    }

    fn finish(self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            self.watch.rest();
            let Self { mut sink, acting, watch: _watch, load, server, hold } = *self;
            let committed = commit(sink.as_mut(), &acting, &load).await;
            committed.map_err(|error| full::told(hold.told(error), &server, load.job))
        })
    }
}

async fn commit(sink: Pin<&mut CopyInSink<Bytes>>, acting: &Acting, load: &Load) -> anyhow::Result<()> {
    let copied = within(COMMIT_DEADLINE, sink.finish()).await;
    let rows = copied.map_err(|error| named(error, &load.what))?;
    let note = "UPDATE backhaul_restore.progress SET rows = $2 WHERE span = $1";
    let rows = i64::try_from(rows).context("count rows")?;
    acting.session.rows(note, &[&i64::from(load.span), &rows]).await.context("note the rows of the span")?;
    let committed = within(COMMIT_DEADLINE, acting.session.client.batch_execute("COMMIT")).await;
    committed.map_err(|error| named(error, &load.what)).context("commit the span")
}

/// Ends a session into which nothing is written any more, so that a sender that fell silent does not hold its span;
/// and gives its place among the loaders back as soon as the session is ended, which the sender may not notice.
struct Watch {
    /// When something was written last; none once all is written.
    last: Arc<Mutex<Option<Instant>>>,
    _task: AbortOnDropHandle<()>,
}

impl Watch {
    fn over(end: CancellationToken, permit: OwnedSemaphorePermit) -> Self {
        let last = Arc::new(Mutex::new(Some(Instant::now())));
        let seen = last.clone();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = silence(&seen) => end.cancel(),
                () = end.cancelled() => {}
            }
            drop(permit);
        });
        Self { last, _task: AbortOnDropHandle::new(task) }
    }

    fn seen(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// All is written; what remains has deadlines of its own.
    fn rest(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Waits until nothing has been written for too long.
async fn silence(last: &Mutex<Option<Instant>>) {
    loop {
        let last = *last.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(until) = last.map(|last| last + STALL_DEADLINE) else { return std::future::pending().await };
        if until <= Instant::now() {
            return;
        }
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_named_where_there_are_any() {
        let table = |columns: &[&str]| Loaded::Table {
            schema: "s".to_owned(),
            name: "t\"1".to_owned(),
            columns: columns.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(
            copy_of(&table(&["a", "B"]), ""),
            "COPY \"s\".\"t\"\"1\" (\"a\", \"B\") FROM STDIN (ENCODING 'UTF8')"
        );
        assert_eq!(copy_of(&table(&[]), "SQL_ASCII"), "COPY \"s\".\"t\"\"1\" FROM STDIN (ENCODING 'SQL_ASCII')");
    }
}
