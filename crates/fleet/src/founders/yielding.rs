//! Spans of a primary give way to changes of the schema.
//!
//! A span holds ACCESS SHARE on its table for as long as its rows are taken, which a limit of the rate or a slow store may
//! draw out to minutes. An ALTER that waits for it has everybody who comes after it waiting, too; and so has a REINDEX,
//! which waits for an index, because planning locks all those of the table. So while a span of a primary is read, the
//! guard looks each second who waits for the table or an index of it; then the read is ended at once, whether its rows
//! are taken or not, and the span may be asked for again.
//!
//! An ALTER has its lock only when the last span has ended. So all spans of a table give way to the same few who wait
//! for it ([`Given`]), and to nobody else, or changes in a loop would keep a backup from ever ending. Whoever gives up,
//! say at a `lock_timeout`, and comes again is somebody else.
//!
//! On a standby nobody waits: there replay ends what is in its way. What it is, is asked with each look: a standby that was
//! promoted is a primary to those who wait, whatever it was when the point was taken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cluster::service::ByteStream;
use futures_util::StreamExt as _;
use futures_util::stream::unfold;
use pgerror::{PgError, SqlState};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_postgres::CancelToken;
use tokio_util::task::AbortOnDropHandle;

use super::pool::Pool;
use super::session::{Session, cancel, has_code};
use super::types::What;

/// To how many a point gives way for one table. Whoever waits for it after them waits for the end of the spans.
const YIELDS_MAX: usize = 2;

/// How often it is looked who waits.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A read that has not ended so long after it was cancelled is given up with its founder.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// Pieces that are read ahead of whoever takes them; beyond that the server waits.
const AHEAD: usize = 2;

/// Who waits, in the order in which they came, for what reading is in the way of: nothing weaker is, and what is stored
/// out of line is locked for no longer than it takes to fetch a value. A transaction that waits twice is two of them;
/// one that tries over and over would else be given way to without end. Who has just begun to wait has no start yet,
/// and is seen with the next look.
const WANTED: &str = "
    SELECT ARRAY(SELECT pg_catalog.concat_ws(' ', l.virtualtransaction, l.waitstart)
                 FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
                 WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND NOT l.granted
                   AND (l.relation = $1
                        OR l.relation IN (SELECT indexrelid FROM pg_catalog.pg_index WHERE indrelid = $1))
                   AND l.waitstart IS NOT NULL AND d.datname = pg_catalog.current_database()
                 ORDER BY l.waitstart)";

/// Whom a point has given way to, by table.
#[derive(Default)]
pub(super) struct Given(BTreeMap<u32, BTreeSet<String>>);

impl Given {
    /// Whether way is given to those who wait for `table`, in the order of their queue. Only the first is noted where all
    /// are new: a span that has given way to it comes back behind all the others.
    pub(super) fn gives_way(&mut self, table: u32, waiting: &[String]) -> bool {
        let given = self.0.entry(table).or_default();
        if waiting.iter().any(|waiter| given.contains(waiter)) {
            return true;
        }
        let first = waiting.first().filter(|_| given.len() < YIELDS_MAX);
        first.is_some_and(|first| given.insert(first.clone()))
    }
}

/// A read that gives way.
pub(super) struct Yielding {
    pool: Arc<Pool>,
    table: u32,
    cancel: CancelToken,
}

/// Has `founder`, which reads this span, give way, if it reads what somebody may come to wait for. It may have had its
/// lock since before the last of those came to whom way is given, so it looks whether or not there is room for another one.
pub(super) fn watched(pool: &Arc<Pool>, founder: &Session, what: &What) -> Option<Yielding> {
    match *what {
        What::Table { oid, .. } => {
            Some(Yielding { pool: pool.clone(), table: oid, cancel: founder.client.cancel_token() })
        }
        What::LargeObjects | What::LargeObjectData => None,
    }
}

impl Yielding {
    /// The same rows, or an error in their midst. A task of its own reads them: where nobody takes them, nobody would ask
    /// for the next, either. Dropped, it ends.
    pub(super) fn over(self, rows: ByteStream) -> ByteStream {
        let (pieces, taken) = mpsc::channel(AHEAD);
        let task = AbortOnDropHandle::new(tokio::spawn(self.run(rows, pieces)));
        Box::pin(unfold((taken, task), |(mut taken, task)| async move {
            let piece = taken.recv().await?;
            Some((piece, (taken, task)))
        }))
    }

    async fn run(self, mut rows: ByteStream, pieces: mpsc::Sender<anyhow::Result<Bytes>>) {
        tokio::select! {
            () = pass(&mut rows, &pieces) => return,
            () = self.wanted() => {}
        }
        let error = self.give_way(rows).await;
        // Whoever took the rows may be gone.
        drop(pieces.send(Err(error)).await);
    }

    /// Returns when somebody waits for the table to whom way is given.
    async fn wanted(&self) {
        loop {
            sleep(LOOK_EVERY).await;
            match self.waiting().await {
                Ok(waiting) if self.pool.gives_way(self.table, &waiting) => return,
                Ok(_) => {}
                Err(error) => tracing::debug!("who waits for a table could not be asked: {error:#}"),
            }
        }
    }

    async fn waiting(&self) -> anyhow::Result<Vec<String>> {
        let guard = self.pool.guard().await?;
        // Replay may hold what the other question has to look into, and is not given way to.
        if guard.row("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?.get(0) {
            return Ok(Vec::new());
        }
        Ok(guard.row(WANTED, &[&self.table]).await?.get(0))
    }

    /// Ends the read, and with it its lock.
    async fn give_way(self, mut rows: ByteStream) -> anyhow::Error {
        cancel(self.cancel).await;
        // A server that waits to be rid of rows does not hear that it was told to end.
        let ended = timeout(END_DEADLINE, async {
            loop {
                match rows.next().await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Some(error),
                    None => return None,
                }
            }
        });
        match ended.await {
            // It has ended for another reason, which says more.
            Ok(Some(error)) if !has_code(&error, &[SqlState::OBJECT_IN_USE]) => error,
            _ => {
                let name = self.pool.tables.get(&self.table).map(|table| format!("{}.{}", table.schema, table.name));
                let message = format!("table \"{}\" is wanted by somebody else", name.unwrap_or_default());
                PgError::new(SqlState::LOCK_NOT_AVAILABLE, message)
                    .detail("Reading it gave way to a change of the schema that waited for it, or for an index of it.")
                    .into()
            }
        }
    }
}

/// Hands on what is read, until all of it is or nobody takes it any more.
async fn pass(rows: &mut ByteStream, pieces: &mpsc::Sender<anyhow::Result<Bytes>>) {
    while let Some(piece) = rows.next().await {
        let is_last = piece.is_err();
        if pieces.send(piece).await.is_err() || is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spans_of_a_table_give_way_to_the_same_few() {
        let mut given = Given::default();
        for (table, waiting, expected) in [
            (1, &[][..], false),
            // Who waits behind the first has its turn with it, and takes no room.
            (1, &["a", "b"], true),
            (1, &["a"], true),
            // The same, come again.
            (1, &["a later", "b"], true),
            (1, &["c", "d"], false),
            (1, &["c", "a"], true),
            (1, &["b"], false),
            (2, &["c"], true),
            (1, &[], false),
        ] {
            let waiting: Vec<String> = waiting.iter().map(|waiter| (*waiter).to_owned()).collect();
            assert_eq!(given.gives_way(table, &waiting), expected, "{table} {waiting:?}");
        }
    }
}
