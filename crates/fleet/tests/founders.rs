//! Founders on real servers: one point for all readers, no standby left paused, no row read from the wrong table.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fmt::Debug;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::service::{Reply, Service as _};
use fleet::Server;
use fleet::founders::{
    Founders, Mode, Open, Opened, PauseLimits, PointLimits, Request, SpanRequest, Standstill, TablePlan, What,
    is_invalidated, is_point_lost,
};
use fleet::private::{Installation, Instance, RunAs, Settings};
use futures_util::StreamExt as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgerror::{PgError, SqlState};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

#[path = "founders/disturbed.rs"]
mod disturbed;
#[path = "founders/guards.rs"]
mod guards;
#[path = "founders/points.rs"]
mod points;
#[path = "founders/shared.rs"]
mod shared;
#[path = "founders/standing.rs"]
mod standing;

const DEADLINE: Duration = Duration::from_secs(30);

/// A primary and, if wanted, an asynchronous standby of it.
struct Fleet {
    primary: Instance,
    standby: Option<Instance>,
    _dir: TempDir,
}

impl Fleet {
    async fn start(with_standby: bool, setup: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The servers may run as another user than this process.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let settings: Settings = vec![("autovacuum".to_owned(), "off".to_owned())];
        let mut primary = instance(dir.path(), "primary");
        primary.init("root", &settings).unwrap();
        primary.start("root", &dir.path().join("primary.log")).await.unwrap();
        let mut fleet = Self { primary, standby: None, _dir: dir };
        fleet.on_primary("CREATE DATABASE shop").await;
        fleet.in_database("shop", setup).await;
        if with_standby {
            let mut standby = instance(fleet._dir.path(), "standby");
            let mut settings = settings;
            // A conflict with a snapshot is what these tests are not about.
            for (name, value) in [
                ("max_standby_streaming_delay", "2s"),
                ("hot_standby_feedback", "on"),
                ("wal_receiver_status_interval", "1s"),
            ] {
                settings.push((name.to_owned(), value.to_owned()));
            }
            standby.clone_from(&fleet.primary.conninfo("root"), "standby", &settings).unwrap();
            standby.start("root", &fleet._dir.path().join("standby.log")).await.unwrap();
            fleet.standby = Some(standby);
        }
        fleet
    }

    fn primary(&self) -> Server {
        self.primary.server("root").unwrap()
    }

    fn standby(&self) -> Server {
        self.standby.as_ref().unwrap().server("root").unwrap()
    }

    async fn on_primary(&self, statement: &str) {
        ask(&self.primary(), "postgres", statement).await;
    }

    async fn in_database(&self, database: &str, statements: &str) {
        let (client, _connection) = self.primary().session_in(database).await.unwrap();
        client.batch_execute(statements).await.unwrap();
    }

    /// Waits until the standby has replayed all that the primary has done, also what is not committed yet.
    async fn caught_up(&self) {
        // A commit, without which the last of what was done would stay in memory for long.
        self.on_primary("SELECT pg_logical_emit_message(true, '', '')").await;
        let lsn = ask(&self.primary(), "postgres", "SELECT pg_current_wal_lsn()").await;
        let query = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'");
        until(&self.standby(), &query, "t").await;
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for instance in [self.standby.as_mut(), Some(&mut self.primary)].into_iter().flatten() {
            let Some(child) = instance.child() else { continue };
            let Some(pid) = child.id() else { continue };
            kill(Pid::from_raw(pid as i32), Signal::SIGQUIT).unwrap();
            while child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn instance(dir: &Path, name: &str) -> Instance {
    let dir = dir.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    Instance::new(Installation::find().unwrap(), RunAs::choose().unwrap(), &dir).unwrap()
}

/// The first column of the first row, as text.
async fn ask(server: &Server, database: &str, statement: &str) -> String {
    let (client, _connection) = server.session_in(database).await.unwrap();
    let messages = client.simple_query(statement).await.unwrap();
    let row = messages.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
        _ => None,
    });
    row.unwrap_or_default()
}

async fn until(server: &Server, query: &str, expected: &str) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let seen = ask(server, "postgres", query).await;
        if seen == expected {
            return;
        }
        assert!(Instant::now() < deadline, "waited in vain for {query} to be {expected}: it is {seen}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn open(lease: Uuid, readers: usize) -> Open {
    let (databases, limits) = (vec!["shop".to_owned()], PointLimits::default());
    Open { lease, job: 7, databases, readers, voting: false, life_ms: 120_000, pause: None, limits }
}

async fn call(founders: &Arc<Founders>, request: &Request) -> anyhow::Result<Reply> {
    timeout(Duration::from_secs(60), founders.call(serde_json::to_value(request).unwrap())).await.unwrap()
}

async fn opened(founders: &Arc<Founders>, request: Open) -> Opened {
    match call(founders, &Request::Open(request)).await.unwrap() {
        Reply::Answer(answer) => serde_json::from_value(answer).unwrap(),
        _ => panic!("not an answer"),
    }
}

async fn refused(founders: &Arc<Founders>, request: &Request) -> PgError {
    match call(founders, request).await {
        Ok(_) => panic!("{request:?} was not refused"),
        Err(error) => PgError::of(&error).unwrap_or_else(|| panic!("{error:#}")).clone(),
    }
}

fn span(lease: Uuid, what: What) -> Request {
    Request::Span(SpanRequest { lease, database: "shop".to_owned(), what })
}

fn whole(table: &TablePlan) -> What {
    What::Table { oid: table.oid, from_block: 0, to_block: None }
}

async fn stream(founders: &Arc<Founders>, request: &Request) -> cluster::service::ByteStream {
    match call(founders, request).await.unwrap() {
        Reply::Download(stream) => stream,
        _ => panic!("not a download"),
    }
}

async fn drain(mut stream: cluster::service::ByteStream) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(piece) = timeout(DEADLINE, stream.next()).await.unwrap() {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}

async fn rows(founders: &Arc<Founders>, lease: Uuid, what: What) -> Vec<String> {
    let text = String::from_utf8(drain(stream(founders, &span(lease, what)).await).await.unwrap()).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn table<'a>(opened: &'a Opened, name: &str) -> &'a TablePlan {
    let found = opened.databases[0].tables.iter().find(|table| table.name == name);
    found.unwrap_or_else(|| panic!("no table {name} in the plan"))
}

fn names<T: Debug>(items: &[T], name: impl Fn(&T) -> String) -> Vec<String> {
    let mut names: Vec<String> = items.iter().map(name).collect();
    names.sort();
    names
}

const PAUSE_STATE: &str = "SELECT pg_get_wal_replay_pause_state()";

const ACCOUNTS: &str = "
    CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
    INSERT INTO account SELECT n, 100 FROM generate_series(1, 20000) n;
    CREATE TABLE history (id bigserial PRIMARY KEY, moved int);";

/// Moves money between accounts without end; what all accounts hold together stays the same.
fn writer(server: &Server, seed: i32) -> tokio::task::JoinHandle<()> {
    let server = server.clone();
    tokio::spawn(async move {
        let (client, _connection) = server.session_in("shop").await.unwrap();
        let mut n = seed;
        loop {
            n = (n * 7919 + 13) % 20000;
            let (from, to) = (n % 20000 + 1, (n + 977) % 20000 + 1);
            // Both rows in one order, so that no two writers wait for each other.
            let (low, high) = (from.min(to), from.max(to));
            let transfer = format!(
                "BEGIN; UPDATE account SET balance = balance - 1 WHERE id = {low};
                 UPDATE account SET balance = balance + 1 WHERE id = {high};
                 INSERT INTO history (moved) VALUES (1); COMMIT"
            );
            client.batch_execute(&transfer).await.unwrap();
        }
    })
}

/// A transaction with more than 64 subtransactions, left open.
const MANY_SUBTRANSACTIONS: &str = "
    BEGIN;
    DO $$ BEGIN FOR n IN 1..150 LOOP
        BEGIN INSERT INTO account VALUES (100000 + n, 1000); EXCEPTION WHEN division_by_zero THEN NULL; END;
    END LOOP; END $$";

fn sum(rows: &[String]) -> i64 {
    rows.iter().map(|row| row.split('\t').nth(1).unwrap().parse::<i64>().unwrap()).sum()
}

/// All readers of a point see the same rows, while many write and a transaction with many subtransactions commits.
async fn one_point(fleet: &Fleet, server: Server, mode: Mode) {
    let writers: Vec<_> = (1..4).map(|seed| writer(&fleet.primary(), seed)).collect();
    let (big, _connection) = fleet.primary().session_in("shop").await.unwrap();
    big.batch_execute(MANY_SUBTRANSACTIONS).await.unwrap();
    sleep(Duration::from_millis(500)).await;
    let (founders, lease) = (Founders::new(server.clone()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 4)).await;
    assert_eq!((opened.point.mode, opened.point.readers), (mode, 4));
    assert!(opened.point.databases_at_one_point && opened.point.lsn.0 > 0 && opened.point.timeline == 1);
    if mode == Mode::Paused {
        assert_eq!(ask(&server, "postgres", PAUSE_STATE).await, "not paused");
    }
    big.batch_execute("COMMIT").await.unwrap();
    sleep(Duration::from_millis(500)).await;
    // Begun before any of them is read, so by four different founders.
    let account = table(&opened, "account");
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(stream(&founders, &span(lease, whole(account))).await);
    }
    let mut seen = Vec::new();
    for stream in streams {
        seen.push(drain(stream).await.unwrap());
    }
    let first: Vec<String> = String::from_utf8(seen[0].clone()).unwrap().lines().map(str::to_owned).collect();
    assert_eq!((first.len(), sum(&first)), (20000, 2_000_000));
    assert!(seen.iter().all(|bytes| *bytes == seen[0]), "the readers differ");
    // The same rows in ranges of blocks, each once.
    let mut ranged = Vec::new();
    let middle = account.blocks / 2;
    for (from_block, to_block) in [(0, Some(3)), (3, Some(middle)), (middle, None)] {
        ranged.extend(rows(&founders, lease, What::Table { oid: account.oid, from_block, to_block }).await);
    }
    assert_eq!(ranged, first);
    // The sequence is not behind the rows.
    let history = rows(&founders, lease, whole(table(&opened, "history"))).await;
    let highest = history.iter().map(|row| row.split('\t').next().unwrap().parse::<i64>().unwrap()).max().unwrap();
    assert!(opened.databases[0].sequences[0].last_value >= highest);
    let request = Request::Sequences { lease, database: "shop".to_owned() };
    let Reply::Answer(now) = call(&founders, &request).await.unwrap() else { panic!("not an answer") };
    assert!(now[0]["last_value"].as_i64().unwrap() > opened.databases[0].sequences[0].last_value, "{now}");
    writers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_paused_standby_see_one_point() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    one_point(&fleet, fleet.standby(), Mode::Paused).await;
    // Replay goes on.
    fleet.caught_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_primary_see_one_point() {
    let fleet = Fleet::start(false, ACCOUNTS).await;
    one_point(&fleet, fleet.primary(), Mode::Exported).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_not_left_paused_when_its_founders_are_given_up_midway() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let founders = Founders::new(fleet.standby());
    for delay in (0..240).step_by(12) {
        let request = serde_json::to_value(Request::Open(open(Uuid::new_v4(), 2))).unwrap();
        let call = timeout(Duration::from_millis(delay), founders.call(request)).await;
        drop(call);
        // Twice, with time for a statement that was still on its way.
        for _ in 0..2 {
            until(&fleet.standby(), PAUSE_STATE, "not paused").await;
            sleep(Duration::from_millis(50)).await;
        }
    }
    drop(founders);
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job%'";
    until(&fleet.standby(), sessions, "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_else_s_pause_is_left_alone() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    ask(&fleet.standby(), "postgres", "SELECT pg_wal_replay_pause()").await;
    until(&fleet.standby(), PAUSE_STATE, "paused").await;
    let founders = Founders::new(fleet.standby());
    let error = refused(&founders, &Request::Open(open(Uuid::new_v4(), 2))).await;
    assert_eq!(error.message, "replay on the server is paused by somebody else");
    assert_eq!(ask(&fleet.standby(), "postgres", PAUSE_STATE).await, "paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_replay_holds_is_stepped_over() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    // A table's, and that of a catalog which is in no database.
    for change in ["ALTER TABLE account ADD COLUMN note text", "LOCK TABLE pg_shdescription IN ACCESS EXCLUSIVE MODE"] {
        let (ddl, _connection) = fleet.primary().session_in("shop").await.unwrap();
        ddl.batch_execute(&format!("BEGIN; {change}")).await.unwrap();
        fleet.on_primary("SELECT pg_logical_emit_message(true, '', '')").await;
        fleet.caught_up().await;
        let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
        let committing = tokio::spawn(async move {
            sleep(Duration::from_secs(1)).await;
            ddl.batch_execute("COMMIT").await.unwrap();
        });
        let opened = opened(&founders, open(lease, 2)).await;
        committing.await.unwrap();
        assert_eq!(opened.point.mode, Mode::Paused, "{change}");
        assert_eq!(table(&opened, "account").columns, ["id", "balance", "note"]);
        assert_eq!(rows(&founders, lease, whole(table(&opened, "account"))).await.len(), 20000);
        assert_eq!(ask(&fleet.standby(), "postgres", PAUSE_STATE).await, "not paused");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_may_not_be_paused_gives_one_reader_when_it_never_stands_still() {
    let fleet =
        Fleet::start(true, &format!("{ACCOUNTS} CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader")).await;
    let standby = fleet.standby.as_ref().unwrap().server("reader").unwrap();
    let (founders, lease) = (Founders::new(standby), Uuid::new_v4());
    fleet.caught_up().await;
    let still = opened(&founders, open(lease, 3)).await;
    assert_eq!((still.point.mode, still.point.readers), (Mode::Still, 3));
    // The same lease again: the first is replaced.
    let writers: Vec<_> = (1..4).map(|seed| writer(&fleet.primary(), seed)).collect();
    let mut single = opened(&founders, open(lease, 3)).await;
    // On a busy machine writers may begin late, or all of them rest for a moment.
    for _ in 0..10 {
        if single.point.mode == Mode::Still {
            single = opened(&founders, open(lease, 3)).await;
        }
    }
    assert_eq!((single.point.mode, single.point.readers), (Mode::Single, 1));
    let account = rows(&founders, lease, whole(table(&single, "account"))).await;
    assert_eq!(sum(&account), 2_000_000);
    writers.iter().for_each(tokio::task::JoinHandle::abort);
    // Nor is a voting standby ever paused, whoever may.
    let founders = Founders::new(fleet.standby());
    fleet.caught_up().await;
    let voting = opened(&founders, Open { voting: true, ..open(Uuid::new_v4(), 2) }).await;
    assert!(matches!(voting.point.mode, Mode::Still | Mode::Single));
}

const GUARDED: &str = "
    CREATE SCHEMA first; CREATE SCHEMA second;
    CREATE TABLE first.moved (a int); CREATE TABLE second.moved (a int);
    CREATE TABLE kept (a int, b int, c int);
    CREATE TABLE truncated (LIKE kept); CREATE TABLE readded (LIKE kept); CREATE TABLE swapped_columns (LIKE kept);
    CREATE TABLE swapped_1 (LIKE kept); CREATE TABLE swapped_2 (LIKE kept); CREATE TABLE recreated (LIKE kept);
    CREATE TABLE rewritten (LIKE kept); CREATE TABLE gone (LIKE kept); CREATE TABLE shrunk (LIKE kept);
    CREATE TABLE retyped (a int, b int, c varchar); CREATE TABLE viewed (LIKE kept);
    CREATE TABLE expressed (a int, b int, c int, d int GENERATED ALWAYS AS (a * 2) STORED);
    CREATE TABLE toast_rewritten (a int, b int, c text);
    DO $$ DECLARE t regclass; BEGIN
        FOR t IN SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' LOOP
            EXECUTE format('INSERT INTO %s SELECT n, 10 * n, 100 * n FROM generate_series(1, 100) n', t);
        END LOOP; END $$";

const CHANGES: &str = "
    TRUNCATE truncated;
    ALTER TABLE readded DROP COLUMN c; ALTER TABLE readded ADD COLUMN c int;
    ALTER TABLE swapped_columns RENAME b TO x; ALTER TABLE swapped_columns RENAME c TO b;
    ALTER TABLE swapped_columns RENAME x TO c;
    ALTER TABLE swapped_1 RENAME TO x; ALTER TABLE swapped_2 RENAME TO swapped_1; ALTER TABLE x RENAME TO swapped_2;
    DROP TABLE recreated; CREATE TABLE recreated (LIKE kept);
    ALTER TABLE rewritten ALTER b TYPE bigint;
    DROP TABLE gone;
    ALTER TABLE retyped ALTER c TYPE text;
    ALTER TABLE expressed ALTER d DROP EXPRESSION;
    DROP TABLE viewed; CREATE VIEW viewed AS SELECT * FROM kept;
    ALTER SCHEMA first RENAME TO x; ALTER SCHEMA second RENAME TO first; ALTER SCHEMA x RENAME TO second;
    INSERT INTO kept VALUES (0, 0, 0); DELETE FROM kept WHERE a = 1; ANALYZE kept; CREATE INDEX ON kept (a);";

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_changed_behind_the_point_is_never_read() {
    let fleet = Fleet::start(true, GUARDED).await;
    let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 2)).await;
    // By then the primary knows which rows the founders still see.
    sleep(Duration::from_millis(2500)).await;
    fleet.in_database("shop", CHANGES).await;
    fleet.in_database("shop", "VACUUM FULL shrunk").await;
    let toast = "SELECT reltoastrelid::regclass FROM pg_class WHERE oid = 'toast_rewritten'::regclass";
    let toast = ask(&fleet.primary(), "shop", toast).await;
    fleet.in_database("shop", &format!("VACUUM FULL {toast}")).await;
    fleet.caught_up().await;
    let mut changed = Vec::new();
    for table in &opened.databases[0].tables {
        match call(&founders, &span(lease, whole(table))).await {
            Ok(Reply::Download(stream)) => {
                let expected = if table.schema == "public" { 100 } else { 0 };
                let text = String::from_utf8(drain(stream).await.unwrap()).unwrap();
                assert_eq!(text.lines().count(), expected, "{table:?}");
            }
            Ok(_) => panic!("not a download"),
            Err(error) => {
                let error = PgError::of(&error).unwrap_or_else(|| panic!("{error:#}")).clone();
                assert!(is_invalidated(&error) && !is_point_lost(&error), "{error:?}");
                changed.push(table.name.clone());
            }
        }
    }
    changed.sort();
    let expected = [
        "expressed",
        "gone",
        "moved",
        "moved",
        "readded",
        "recreated",
        "retyped",
        "rewritten",
        "shrunk",
        "swapped_1",
        "swapped_2",
        "swapped_columns",
        "toast_rewritten",
        "truncated",
        "viewed",
    ];
    assert_eq!(changed, expected);
    // The point itself still stands, for both founders.
    for _ in 0..2 {
        assert_eq!(rows(&founders, lease, whole(table(&opened, "kept"))).await.len(), 100);
    }
}

const KINDS: &str = r#"
    CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
    CREATE FOREIGN TABLE "Far" (line text) SERVER files OPTIONS (filename '/dev/null');
    CREATE UNLOGGED TABLE passing (a int); INSERT INTO passing VALUES (1);
    CREATE TABLE computed (a int, gone int, "B" int GENERATED ALWAYS AS (a * 2) STORED, t text);
    ALTER TABLE computed DROP COLUMN gone; INSERT INTO computed VALUES (1, DEFAULT, E'x\ty\nz'), (2, DEFAULT, NULL);
    CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
    CREATE TABLE parent (a int); CREATE TABLE child () INHERITS (parent);
    INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2), (3);
    CREATE TABLE parted (a int) PARTITION BY RANGE (a); CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (9);
    INSERT INTO parted VALUES (4);
    CREATE MATERIALIZED VIEW filled AS SELECT 1; CREATE MATERIALIZED VIEW empty AS SELECT 1 WITH NO DATA;
    CREATE SEQUENCE down INCREMENT BY -5; SELECT nextval('down'); CREATE SEQUENCE fresh;
    CREATE ROLE owner; CREATE ROLE granted; ALTER TABLE parent OWNER TO owner; GRANT SELECT ON child TO granted;
    ALTER DATABASE shop SET work_mem = '5MB'; COMMENT ON DATABASE shop IS 'the shop';
    GRANT CONNECT ON DATABASE shop TO granted;
    SELECT lo_from_bytea(4711, decode(repeat('ab', 2621440), 'hex')); SELECT lo_create(4712);
    COMMENT ON LARGE OBJECT 4712 IS 'empty'; ALTER LARGE OBJECT 4711 OWNER TO owner;"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_plan_names_what_there_is_and_what_is_skipped() {
    let fleet = Fleet::start(true, KINDS).await;
    let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 1)).await;
    let plan = &opened.databases[0];
    let tables = names(&plan.tables, |table| table.name.clone());
    assert_eq!(tables, ["child", "computed", "nothing", "parent", "part"]);
    let skipped = names(&plan.skipped, |skipped| format!("{} {}", skipped.kind, skipped.object));
    assert_eq!(skipped, ["foreign table public.\"Far\"", "table public.passing"]);
    let views = names(&plan.materialized_views, |view| format!("{} {}", view.name, view.populated));
    assert_eq!(views, ["empty false", "filled true"]);
    let sequences = names(&plan.sequences, |s| format!("{} {} {} {}", s.name, s.last_value, s.is_called, s.increment));
    assert_eq!(sequences, ["down -1 true -5", "fresh 1 false 1"]);
    assert_eq!(plan.roles, ["granted", "owner", "root"]);
    assert_eq!((plan.owner.as_str(), plan.encoding.as_str(), plan.large_objects), ("root", "UTF8", 2));
    assert_eq!((plan.settings.join(","), plan.comment.as_deref()), ("work_mem=5MB".to_owned(), Some("the shop")));
    assert!(plan.acl.as_deref().unwrap().contains("granted=c/root"), "{:?}", plan.acl);
    assert!(plan.extensions.iter().any(|(name, _)| name == "file_fdw"));
    for (name, expected) in [
        ("computed", vec!["1\tx\\ty\\nz", "2\t\\N"]),
        ("nothing", vec!["", ""]),
        ("parent", vec!["1"]),
        ("child", vec!["2", "3"]),
        ("part", vec!["4"]),
    ] {
        assert_eq!(rows(&founders, lease, whole(table(&opened, name))).await, expected, "{name}");
    }
    assert_eq!(table(&opened, "computed").columns, ["a", "t"]);
    large_objects(&founders, lease).await;
    let schema = drain(stream(&founders, &Request::Schema { lease, database: "shop".to_owned() }).await).await.unwrap();
    assert!(schema.starts_with(b"PGDMP") && schema.len() as u64 == plan.schema_bytes);
}

async fn large_objects(founders: &Arc<Founders>, lease: Uuid) {
    assert_eq!(rows(founders, lease, What::LargeObjects).await, ["4711\towner\t\\N\t\\N", "4712\troot\t\\N\tempty"]);
    let pieces = rows(founders, lease, What::LargeObjectData).await;
    let lengths: Vec<(&str, usize)> = pieces
        .iter()
        .map(|row| {
            let (head, piece) = row.rsplit_once('\t').unwrap();
            (head, (piece.len() - "\\\\x".len()) / 2)
        })
        .collect();
    let mega = 1024 * 1024;
    assert_eq!(lengths, [("4711\t0", mega), ("4711\t1", mega), ("4711\t2", mega / 2), ("4712\t0", 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn founders_are_lent_again_replaced_on_a_primary_and_lost_on_a_standby() {
    let fleet =
        Fleet::start(true, "CREATE TABLE big AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n").await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name = 'backhaul job 7' AND state LIKE 'idle in transaction' AND query LIKE '%rest'";
    for server in [fleet.primary(), fleet.standby()] {
        let (founders, lease) = (Founders::new(server.clone()), Uuid::new_v4());
        let opened = opened(&founders, open(lease, 1)).await;
        let big = whole(table(&opened, "big"));
        // Each one dropped midway.
        for _ in 0..5 {
            let mut half = stream(&founders, &span(lease, big.clone())).await;
            half.next().await.unwrap().unwrap();
        }
        assert_eq!(rows(&founders, lease, big.clone()).await.len(), 60000);
        until(
            &server,
            "SELECT count(*) FROM pg_locks WHERE relation = 'pg_class'::regclass AND pid <> pg_backend_pid()",
            "0",
        )
        .await;
        if opened.point.mode == Mode::Exported {
            // The lent one, and not the anchor, whose last words were others.
            let rollback = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                            WHERE application_name = 'backhaul job 7' AND query = 'ROLLBACK TO SAVEPOINT rest'
                              AND pid <> (SELECT min(pid) FROM pg_stat_activity WHERE application_name = 'backhaul job 7'
                                          AND query = 'ROLLBACK TO SAVEPOINT rest')";
            ask(&server, "postgres", rollback).await;
            sleep(Duration::from_millis(200)).await;
            assert_eq!(rows(&founders, lease, big.clone()).await.len(), 60000);
        } else {
            ask(&server, "postgres", end).await;
            sleep(Duration::from_millis(200)).await;
            let error = refused(&founders, &span(lease, big.clone())).await;
            assert!(is_point_lost(&error), "{error:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_ends_when_it_is_closed_or_not_renewed() {
    let fleet = Fleet::start(false, ACCOUNTS).await;
    let founders = Founders::new(fleet.primary());
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'backhaul job 7'";
    let (short, long) = (Uuid::new_v4(), Uuid::new_v4());
    let short_opened = opened(&founders, Open { life_ms: 4000, ..open(short, 1) }).await;
    opened(&founders, open(long, 1)).await;
    // Two founders and a guard each, once the session that opened them has gone.
    until(&fleet.primary(), sessions, "6").await;
    // Longer than it lives without, and each time with room for a busy machine.
    for _ in 0..4 {
        sleep(Duration::from_millis(1200)).await;
        call(&founders, &Request::Renew { lease: short }).await.unwrap();
    }
    until(&fleet.primary(), sessions, "3").await;
    for request in [Request::Renew { lease: short }, span(short, whole(table(&short_opened, "account")))] {
        let error = refused(&founders, &request).await;
        assert!(is_point_lost(&error), "{error:?}");
    }
    for _ in 0..2 {
        call(&founders, &Request::Close { lease: long }).await.unwrap();
    }
    until(&fleet.primary(), sessions, "0").await;
    let request = Open { databases: vec!["postgres".to_owned(), "nowhere".to_owned()], ..open(long, 1) };
    let error = refused(&founders, &Request::Open(request)).await;
    assert_eq!(
        (error.code, error.message.as_str()),
        (SqlState::UNDEFINED_DATABASE, "database \"nowhere\" does not exist")
    );
    until(&fleet.primary(), sessions, "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_databases_share_a_point_and_ddl_meanwhile_does_not_show() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    fleet.on_primary("CREATE DATABASE other").await;
    fleet.in_database("other", "CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await;
    fleet.caught_up().await;
    // Temporary tables do not count as changes of the schema; those would never stop here.
    let primary = fleet.primary();
    let ddl = tokio::spawn(async move {
        let (client, _connection) = primary.session_in("shop").await.unwrap();
        loop {
            client
                .batch_execute("CREATE TEMPORARY TABLE x (a serial PRIMARY KEY, t text); DROP TABLE x")
                .await
                .unwrap();
        }
    });
    for server in [fleet.primary(), fleet.standby()] {
        let founders = Founders::new(server);
        let request = Open { databases: vec!["shop".to_owned(), "other".to_owned()], ..open(Uuid::new_v4(), 2) };
        let opened = opened(&founders, request).await;
        assert_eq!(names(&opened.databases, |plan| plan.name.clone()), ["other", "shop"]);
        assert!(opened.point.mode == Mode::Exported || opened.point.databases_at_one_point);
    }
    ddl.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_changes_between_snapshot_and_dump_is_dumped_again() {
    let fleet = Fleet::start(true, "CREATE TABLE t (a int CHECK (a > 0))").await;
    let (primary, standby) = (fleet.primary(), fleet.standby());
    let (short, long) = (Duration::from_millis(300), Duration::from_secs(1));
    // On a standby all of it is done in one pause.
    for (server, duration) in [(&primary, short), (&primary, long), (&standby, short), (&standby, long)] {
        let primary = fleet.primary();
        let ddl = tokio::spawn(async move {
            let (client, _connection) = primary.session_in("shop").await.unwrap();
            let begun = Instant::now();
            while begun.elapsed() < duration {
                client.batch_execute("ALTER TABLE t RENAME a TO b").await.unwrap();
                sleep(Duration::from_millis(5)).await;
                client.batch_execute("ALTER TABLE t RENAME b TO a").await.unwrap();
                sleep(Duration::from_millis(5)).await;
            }
        });
        let (founders, lease) = (Founders::new(server.clone()), Uuid::new_v4());
        let opened = opened(&founders, open(lease, 1)).await;
        let request = Request::Schema { lease, database: "shop".to_owned() };
        let schema = drain(stream(&founders, &request).await).await.unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), schema).unwrap();
        let pg_restore = Installation::find().unwrap().program("pg_restore");
        let output = std::process::Command::new(pg_restore).arg("--file=-").arg(file.path()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let column = &table(&opened, "t").columns[0];
        assert!(text.contains(&format!("CHECK (({column} > 0))")) && text.contains(&format!("    {column} integer")));
        ddl.await.unwrap();
    }
}
