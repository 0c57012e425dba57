//! What is asked of founders, and what they answer.
//!
//! These travel between nodes as JSON. A [`Request`] goes to the service [`FOUNDERS`]; what comes back is said at each
//! of its variants. Three refusals have to be told apart by whoever runs a backup, on whichever side of the wire it
//! is: [`is_invalidated`] (the point still stands, this table cannot be read at it any more), [`is_point_lost`] (open
//! anew), and everything else (try again, or give up).

use std::time::Duration;

use chrono::{DateTime, Utc};
use cluster::Lsn;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The name under which a node offers its founders.
pub const FOUNDERS: &str = "founders";

/// What a node can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Take a point and hold it. Answered with [`Opened`].
    Open(Open),
    /// Open the sessions for a point that several servers of a shard are to share; nothing is paused yet. Refused where
    /// replay may not be paused. Answered with null. What was opened goes when nothing more is asked for some seconds.
    Prepare(Open),
    /// Pause replay for such a point; or, where it stands for it already, let it go on until it has come up to `until`,
    /// and pause it again. Answered with [`Standstill`].
    Step {
        /// The lease.
        lease: Uuid,
        /// The position that another server stands at; `None` only pauses.
        until: Option<Lsn>,
    },
    /// Take such a point where replay stands, hold it, and let replay go on. Answered with [`Opened`]. Refused, it leaves
    /// nothing.
    Take {
        /// The lease.
        lease: Uuid,
        /// Where all servers stand.
        at: Standstill,
        /// Whether the schema is dumped here; one server's is enough.
        with_schema: bool,
    },
    /// Hold it for another life. Answered with null; or, where replay was to stay paused and goes on before the lease has
    /// ended, with the reason as a sentence.
    Renew {
        /// The lease.
        lease: Uuid,
    },
    /// Let it go. Answered with null, also when it is gone already.
    Close {
        /// The lease.
        lease: Uuid,
    },
    /// The schema of one database, as `pg_dump -Fc --schema-only` wrote it at the point. Answered with bytes.
    Schema {
        /// The lease.
        lease: Uuid,
        /// The database.
        database: String,
    },
    /// The sequences of one database as they are now, for a primary, whose sequences go on while rows are read: those of
    /// the plan, as far as they are still there. Answered with a list of [`SequencePlan`].
    Sequences {
        /// The lease.
        lease: Uuid,
        /// The database.
        database: String,
    },
    /// What the server and its databases are now, without a point: for plans that are only shown. Answered with
    /// [`Looked`]; nothing is held afterwards.
    Look {
        /// The databases.
        databases: Vec<String>,
        /// For a backup: what it may not read is refused.
        #[serde(default)]
        to_read: bool,
    },
    /// Rows. Answered with bytes: COPY's text format in [`DatabasePlan::copy_encoding`].
    Span(SpanRequest),
}

/// Takes one point of a server, and opens founders at it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// Chosen by the caller. Opening the same lease again replaces it, so that an answer that got lost does no harm.
    pub lease: Uuid,
    /// The job, for the log and `pg_stat_activity`.
    pub job: i64,
    /// The databases, all of them at the same point as far as the server allows.
    pub databases: Vec<String>,
    /// Founders per database that may be lent at the same time; more than [`READERS_MAX`] are cut to that.
    pub readers: usize,
    /// Commits on the primary may wait for this standby, so its replay is never paused.
    pub voting: bool,
    /// The lease ends after this many milliseconds, and with it all its sessions, unless it is renewed.
    pub life_ms: u64,
    /// Keep the server's replay paused until the lease ends, or one of these limits is passed; a refusal of the server's
    /// is no reason to refuse the point. `None` pauses it for the moment in which the point is taken.
    #[serde(default)]
    pub pause: Option<PauseLimits>,
    /// When the point is given up.
    #[serde(default)]
    pub limits: PointLimits,
}

/// How long replay may be kept paused. Beyond any of these it goes on, and the founders stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseLimits {
    /// Milliseconds.
    pub longest_ms: u64,
    /// Bytes of WAL that may wait to be replayed; 0 is any number.
    pub wal_bytes: u64,
    /// Bytes that have to stay free on the server's disk, where that is known.
    pub free_bytes: u64,
}

/// How long a point may be held, and at what price. Beyond any of these the lease is given up: with 53400, or, for the
/// WAL, as a point that was lost ([`is_point_lost`]).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointLimits {
    /// Milliseconds; 0 is any number.
    pub age_ms: u64,
    /// Transactions that may begin on the primary while it has to keep what the point shows; 0 is any number.
    pub xmin_age: u64,
    /// Bytes of WAL that may wait on a standby whose replay stands though nobody has paused it; 0 is any number.
    #[serde(default)]
    pub wal_bytes: u64,
}

/// The settings of the fleet that these come from, for messages.
pub(super) const PAUSE_SETTING: &str = "bulkio.backup.standby_pause_limit";
pub(super) const WAL_SETTING: &str = "bulkio.backup.standby_wal_limit";
pub(super) const FREE_SETTING: &str = "bulkio.backup.standby_free_space_floor";
pub(super) const AGE_SETTING: &str = "bulkio.backup.snapshot_age_limit";
pub(super) const XMIN_SETTING: &str = "bulkio.backup.xmin_age_limit";

impl Open {
    /// How many connections this takes on the server, at most: founders with a spare and the guard of each database,
    /// and while it is being opened the pause's two and one of `pg_dump`. A pause that is kept has two to the end.
    pub fn connections_max(&self) -> usize {
        Self::connections_for(self.databases.len(), self.readers)
    }

    /// The same for a request that is not made yet.
    pub fn connections_for(databases: usize, readers: usize) -> usize {
        Self::connections_held(databases, readers) + 4
    }

    /// What of it stays open once the point is taken.
    pub(super) fn connections_held(databases: usize, readers: usize) -> usize {
        databases * (readers.clamp(1, READERS_MAX) + 2)
    }

    /// How many of `readers` there can be in each database within so many connections; none where not even one fits.
    pub fn readers_within(databases: usize, readers: usize, connections: usize) -> Option<usize> {
        let fits = |readers: &usize| Self::connections_for(databases, *readers) <= connections;
        (1..=readers.clamp(1, READERS_MAX)).rev().find(fits)
    }
}

/// Founders lent per database at the same time; a request for more gets this many.
pub const READERS_MAX: usize = 16;

/// Databases in one request; more are refused.
pub const DATABASES_MAX: usize = 64;

/// What was opened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Opened {
    /// The point.
    pub point: Point,
    /// What each database holds at the point, in the order of the request.
    pub databases: Vec<DatabasePlan>,
}

/// Where a server's replay stands. Two standbys that stream the same timeline and stand at the same position of it show
/// the same rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standstill {
    /// Which servers it can be compared with.
    pub system_identifier: String,
    /// The timeline that is being received.
    pub timeline: u32,
    /// The position.
    pub lsn: Lsn,
}

/// What a look at a server found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Looked {
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// Whether the node's role may pause and resume its replay.
    pub may_pause: bool,
    /// How many connections all backups together may have there. Older nodes do not say.
    #[serde(default)]
    pub budget: Option<usize>,
    /// What each database holds, in the order of the request.
    pub databases: Vec<DatabasePlan>,
}

/// A point of one server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The WAL position. Exact in [`Mode::Paused`] and [`Mode::Still`]; else what was read right after the snapshots.
    pub lsn: Lsn,
    /// The timeline on which that position is.
    pub timeline: u32,
    /// The server's clock at the point.
    pub time: DateTime<Utc>,
    /// Whether the server was a standby.
    pub in_recovery: bool,
    /// How the point was taken.
    pub mode: Mode,
    /// `server_version_num`.
    pub server_version: i32,
    /// The shard's identity, as far as a number can give it.
    pub system_identifier: String,
    /// Founders per database that are lent at the same time.
    pub readers: usize,
    /// Whether it is proven that all databases were read at the same point.
    pub databases_at_one_point: bool,
}

/// How the founders of one database came to the same point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// A standby's replay was paused while they took their snapshots.
    Paused,
    /// A standby's replay stood still by itself meanwhile.
    Still,
    /// A standby's replay neither could be paused nor stood still: one founder does all the reading.
    Single,
    /// On a primary: one exported its snapshot, the others imported it.
    Exported,
}

/// One database at the point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatabasePlan {
    /// Its name.
    pub name: String,
    /// Its OID.
    pub oid: u32,
    /// Its encoding: `UTF8`.
    pub encoding: String,
    /// The encoding of the rows: `UTF8`, except where PostgreSQL does not know what the bytes of the database mean, and
    /// they are taken as they are. Whoever loads them sets `client_encoding` to it. Empty in old plans, for `UTF8`.
    #[serde(default)]
    pub copy_encoding: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// `datlocprovider`: `c`, or on newer releases `i` or `b`.
    pub locale_provider: String,
    /// The locale of a provider other than `c`.
    pub locale: Option<String>,
    /// The rules of its ICU locale, which are there from release 16 on.
    #[serde(default)]
    pub locale_rules: Option<String>,
    /// The tablespace that its objects lie in unless they say otherwise, if it is not the server's default.
    #[serde(default)]
    pub tablespace: Option<String>,
    /// How many sessions it may have; -1 for any number.
    #[serde(default = "any_number")]
    pub connection_limit: i32,
    /// Whether it may be copied by whoever may make databases.
    #[serde(default)]
    pub is_template: bool,
    /// Whether anybody may connect to it.
    #[serde(default = "yes")]
    pub allows_connections: bool,
    /// Its owner.
    pub owner: String,
    /// `datacl` as text, unless it is the default.
    pub acl: Option<String>,
    /// `ALTER DATABASE … SET`: each `name=value`.
    pub settings: Vec<String>,
    /// `ALTER ROLE … IN DATABASE … SET`: the role, and `name=value`.
    #[serde(default)]
    pub role_settings: Vec<(String, String)>,
    /// Its comment.
    pub comment: Option<String>,
    /// Its extensions: name and version.
    pub extensions: Vec<(String, String)>,
    /// The tables whose rows a backup holds, largest first.
    pub tables: Vec<TablePlan>,
    /// Its sequences.
    pub sequences: Vec<SequencePlan>,
    /// Its materialized views.
    pub materialized_views: Vec<MaterializedViewPlan>,
    /// How many large objects it has.
    pub large_objects: i64,
    /// Which files they are read from. Must still be the same on a standby when the last of them was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub large_object_files: Option<String>,
    /// Roles that own its objects or are named in their privileges.
    pub roles: Vec<String>,
    /// Tablespaces that its objects lie in, without the default one.
    pub tablespaces: Vec<String>,
    /// What a backup at this point cannot hold, and why.
    pub skipped: Vec<Skipped>,
    /// What `pg_dump` warned of, line by line, though it wrote the schema.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How long the schema is, in bytes.
    pub schema_bytes: u64,
    /// The version of the `pg_dump` that wrote the schema.
    pub dump_version: String,
}

/// What plans without a connection limit mean.
fn any_number() -> i32 {
    -1
}

/// What plans without `allows_connections` mean.
fn yes() -> bool {
    true
}

/// One table at the point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TablePlan {
    /// Its OID, by which spans are asked for.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The columns that a span holds, in their order: neither dropped nor generated ones.
    pub columns: Vec<String>,
    /// The blocks of its heap; rows of the point are in these.
    pub blocks: u64,
    /// Bytes of heap and TOAST.
    pub bytes: u64,
    /// Rows as the statistics have it; 0 when they do not know.
    pub estimated_rows: u64,
    /// Whether it may be read in ranges of blocks.
    pub ranges_possible: bool,
    /// The rows of an extension's table that belong to the user, as a condition.
    pub where_clause: Option<String>,
    /// What must still be so when it is read.
    pub identity: Identity,
    /// A digest of the types that users made and that its columns are of or have inside, as far as they can be altered
    /// without a lock on the table; `None` when there are none. Must still be the same when the last row was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub types: Option<String>,
}

/// What a table is, apart from its rows. A difference means that its rows cannot be read at the point any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// `pg_class.oid`.
    pub oid: u32,
    /// `pg_class.relkind`.
    pub relkind: String,
    /// `pg_class.relam`.
    pub relam: u32,
    /// `pg_class.relfilenode`.
    pub relfilenode: u32,
    /// The same of its TOAST table.
    pub toast_relfilenode: Option<u32>,
    /// All its columns, also dropped ones.
    pub columns: Vec<ColumnIdentity>,
}

/// What a column is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnIdentity {
    /// `attnum`.
    pub number: i16,
    /// `attname`.
    pub name: String,
    /// `atttypid`.
    pub type_oid: u32,
    /// `attisdropped`.
    pub dropped: bool,
    /// `attgenerated`.
    pub generated: String,
}

/// One sequence at the point; not behind what rows of the point use, unless somebody has set it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequencePlan {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The value.
    pub last_value: i64,
    /// Whether that value has been given out.
    pub is_called: bool,
    /// By how much it grows; tells which of two values is further along.
    pub increment: i64,
}

/// One materialized view at the point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaterializedViewPlan {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether it had been filled.
    pub populated: bool,
}

/// What a backup leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its name, quoted where SQL needs it.
    pub object: String,
    /// `table`, `foreign table`, `sequence`, `subscription` or `user mapping`.
    pub kind: String,
    /// Why, as a clause: `it is unlogged, and a standby does not have its rows`.
    pub reason: String,
}

/// Rows of one database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpanRequest {
    /// The lease.
    pub lease: Uuid,
    /// The database.
    pub database: String,
    /// Which rows.
    pub what: What,
}

/// Which rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A half-open range of a table's blocks.
    Table {
        /// The table.
        oid: u32,
        /// The first block.
        from_block: u64,
        /// The block behind the last one; `None` leaves the range open at its end.
        to_block: Option<u64>,
    },
    /// For each large object: OID, owner, privileges, comment.
    LargeObjects,
    /// The large objects' contents: OID, number of the piece from 0, the piece as `bytea` of up to
    /// [`LARGE_OBJECT_PIECE`] bytes. An empty object has one empty piece.
    LargeObjectData,
}

/// A span that gives no row for so long fails. Rows that the point does not show take time and give none, so whoever
/// waits for a span has to wait for longer than this.
pub const ROWS_SILENCE_MAX: Duration = Duration::from_secs(600);

/// Bytes in a piece of a large object.
pub const LARGE_OBJECT_PIECE: u32 = 1024 * 1024;

const CHANGED: &str = "was changed while it was backed up";
const LOST: (&str, &str) = ("the backup's point on ", " is lost");

/// A table that cannot be read at the point any more.
pub(super) fn invalidated(table: &str, detail: &str) -> PgError {
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, format!("table \"{table}\" {CHANGED}")).detail(detail)
}

/// A point at which nothing can be read any more.
pub(super) fn point_lost(server: &str, detail: &str) -> PgError {
    let (before, after) = LOST;
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, format!("{before}{server}{after}")).detail(detail)
}

/// Whether a span was refused because its table is not the one that was planned any more: dropped, truncated,
/// rewritten, altered, of altered types, or another one under its name. The founders' point stands; this table's rows are gone from it.
pub fn is_invalidated(error: &PgError) -> bool {
    error.code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE && error.message.ends_with(CHANGED)
}

/// Whether the lease has ended or no founder of the database is left: nothing more can be read at that point.
pub fn is_point_lost(error: &PgError) -> bool {
    let (before, after) = LOST;
    error.code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
        && error.message.starts_with(before)
        && error.message.ends_with(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusals_are_told_apart() {
        let (changed, lost) =
            (invalidated("public.t", "It was truncated."), point_lost("db1:5432", "The lease ended."));
        assert_eq!((is_invalidated(&changed), is_point_lost(&changed)), (true, false));
        assert_eq!((is_invalidated(&lost), is_point_lost(&lost)), (false, true));
        assert_eq!(lost.message, "the backup's point on db1:5432 is lost");
    }

    #[test]
    fn requests_survive_the_wire() {
        let what = What::Table { oid: 16384, from_block: 0, to_block: None };
        let request = Request::Span(SpanRequest { lease: Uuid::new_v4(), database: "shop".to_owned(), what });
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
