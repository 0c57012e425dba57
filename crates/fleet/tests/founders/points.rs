//! What makes a point one: replay that somebody else resumes spoils it, several databases have it in common, and no
//! snapshot is handed from one session of a standby to another.

use tokio_util::sync::CancellationToken;

use super::*;

const RESUMED: &str = "replay on the server was resumed by somebody else while the point was taken";

/// Resumes replay whenever it is seen to stand, so many times.
fn resumer(server: &Server, times: usize) -> tokio::task::JoinHandle<()> {
    let server = server.clone();
    tokio::spawn(async move {
        let (client, _connection) = server.session_in("postgres").await.unwrap();
        let mut resumed = 0;
        while resumed < times {
            let state: String = client.query_one(PAUSE_STATE, &[]).await.unwrap().get(0);
            // Whoever has paused it is to see it, too.
            sleep(Duration::from_millis(20)).await;
            if state == "paused" {
                client.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
                resumed += 1;
            }
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_that_somebody_else_resumes_is_another_try_and_then_an_error() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let standby = fleet.standby();
    let writers: Vec<_> = (1..4).map(|seed| writer(&fleet.primary(), seed)).collect();
    let founders = Founders::new(standby.clone());
    for (times, is_told) in [(2, false), (usize::MAX, true)] {
        let resuming = resumer(&standby, times);
        // Resumed before it has been seen to stand, a pause is given up with another message.
        let mut told = Vec::new();
        for _ in 0..10 {
            told.push(sound_or_told(&founders).await);
            if told.iter().any(|told| told == if is_told { RESUMED } else { "" }) {
                break;
            }
        }
        resuming.abort();
        assert_eq!(told.last().map(String::as_str), Some(if is_told { RESUMED } else { "" }), "{told:?}");
        until(&standby, PAUSE_STATE, "not paused").await;
    }
    writers.iter().for_each(tokio::task::JoinHandle::abort);
    fleet.caught_up().await;
}

/// Opens a point whose readers agree, for which nothing is told, or is told why there is none.
async fn sound_or_told(founders: &Arc<Founders>) -> String {
    let lease = Uuid::new_v4();
    match call(founders, &Request::Open(open(lease, 3))).await {
        Ok(Reply::Answer(answer)) => {
            let opened: Opened = serde_json::from_value(answer).unwrap();
            assert_eq!(opened.point.mode, Mode::Paused);
            assert_eq!(sum_by_three(founders, lease, table(&opened, "account")).await, 2_000_000);
            call(founders, &Request::Close { lease }).await.unwrap();
            String::new()
        }
        Ok(_) => panic!("not an answer"),
        Err(error) => {
            let said = PgError::of(&error).unwrap_or_else(|| panic!("{error:#}"));
            assert_eq!(said.code, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, "{said:?}");
            said.message.clone()
        }
    }
}

/// Lets replay go on for a few records and pauses it again while it stands by the statement of a node. What it leaves
/// paused when that has ended meanwhile it resumes; no node begins a pause where replay stands.
const STEP: &str = "
    DO $$ DECLARE
        is_paused CONSTANT boolean := pg_get_wal_replay_pause_state() = 'paused';
        is_a_nodes CONSTANT boolean := EXISTS (
            SELECT FROM pg_stat_activity
            WHERE state = 'active' AND query LIKE 'SELECT pg_catalog.pg_wal_replay_pause(), (%');
        stood CONSTANT pg_lsn := pg_last_wal_replay_lsn();
        ends CONSTANT timestamptz := clock_timestamp() + interval '200 ms';
    BEGIN
        IF is_paused THEN
            PERFORM pg_wal_replay_resume();
        END IF;
        IF is_paused AND is_a_nodes THEN
            WHILE pg_last_wal_replay_lsn() = stood AND clock_timestamp() < ends LOOP
            END LOOP;
            PERFORM pg_wal_replay_pause();
        END IF;
    END $$";

/// Does so again and again until it is told to end, and leaves replay resumed.
fn stepper(server: &Server, end: &CancellationToken) -> tokio::task::JoinHandle<()> {
    let (server, end) = (server.clone(), end.clone());
    tokio::spawn(async move {
        let (client, _connection) = server.session_in("postgres").await.unwrap();
        while !end.is_cancelled() {
            // Whoever has paused it is to see it.
            sleep(Duration::from_millis(20)).await;
            client.batch_execute(STEP).await.unwrap();
        }
        client.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
    })
}

/// At both ends of what is done in a pause replay is seen to stand: only its position tells.
#[tokio::test(flavor = "multi_thread")]
async fn replay_that_somebody_else_resumes_and_pauses_again_is_told_too() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let standby = fleet.standby();
    let writers: Vec<_> = (1..4).map(|seed| writer(&fleet.primary(), seed)).collect();
    let (founders, end) = (Founders::new(standby.clone()), CancellationToken::new());
    let stepping = stepper(&standby, &end);
    let mut told: Vec<String> = Vec::new();
    // Whoever is slow may meet another pause, and whoever is fast may not be disturbed.
    while told.len() < 10 && !told.iter().any(|told| told == RESUMED) {
        told.push(sound_or_told(&founders).await);
    }
    end.cancel();
    timeout(DEADLINE, stepping).await.unwrap().unwrap();
    assert_eq!(told.last().map(String::as_str), Some(RESUMED), "{told:?}");
    writers.iter().for_each(tokio::task::JoinHandle::abort);
    until(&standby, PAUSE_STATE, "not paused").await;
    fleet.caught_up().await;
}

/// What all accounts hold, each third of them read by another founder.
async fn sum_by_three(founders: &Arc<Founders>, lease: Uuid, account: &TablePlan) -> i64 {
    let third = account.blocks / 3;
    let oid = account.oid;
    // Each has its founder before any of them has ended.
    let parts =
        [(0, Some(third)), (third, Some(2 * third)), (2 * third, None)].map(|(from_block, to_block)| async move {
            let what = What::Table { oid, from_block, to_block };
            stream(founders, &span(lease, what)).await
        });
    let mut text = Vec::new();
    for part in futures_util::future::join_all(parts).await {
        text.extend(drain(part).await.unwrap());
    }
    let rows: Vec<String> = String::from_utf8(text).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(rows.len(), 20000);
    sum(&rows)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_to_one_database_after_another_is_read_in_that_order() {
    let fleet = Fleet::start(true, "CREATE TABLE t (n int); INSERT INTO t VALUES (0)").await;
    fleet.on_primary("CREATE DATABASE other TEMPLATE shop").await;
    fleet.caught_up().await;
    let primary = fleet.primary();
    let writing = tokio::spawn(async move {
        let (shop, _connection) = primary.session_in("shop").await.unwrap();
        let (other, _connection) = primary.session_in("other").await.unwrap();
        for n in 1.. {
            for client in [&shop, &other] {
                client.batch_execute(&format!("UPDATE t SET n = {n}")).await.unwrap();
            }
        }
    });
    for (server, mode) in [(fleet.standby(), Mode::Paused), (fleet.primary(), Mode::Exported)] {
        in_that_order(&Founders::new(server), mode).await;
    }
    writing.abort();
}

/// Several points: where one is said to be that of both databases, what it shows was there at one moment.
async fn in_that_order(founders: &Arc<Founders>, mode: Mode) {
    let mut last = 0;
    for _ in 0..5 {
        let lease = Uuid::new_v4();
        let request = Open { databases: vec!["shop".to_owned(), "other".to_owned()], ..open(lease, 2) };
        let opened = opened(founders, request).await;
        assert_eq!(opened.point.mode, mode);
        assert!(mode == Mode::Exported || opened.point.databases_at_one_point);
        let mut seen = Vec::new();
        for plan in &opened.databases {
            let what = whole(plan.tables.iter().find(|table| table.name == "t").unwrap());
            let request = Request::Span(SpanRequest { lease, database: plan.name.clone(), what });
            let text = drain(stream(founders, &request).await).await.unwrap();
            seen.push(String::from_utf8(text).unwrap().trim().parse::<i64>().unwrap());
        }
        let [shop, other] = seen[..] else { panic!("{seen:?}") };
        let is_one = other <= shop && shop <= other + 1;
        assert!(is_one || !opened.point.databases_at_one_point, "shop {shop}, other {other}");
        assert!(shop >= last);
        last = shop;
        call(founders, &Request::Close { lease }).await.unwrap();
    }
    assert!(last > 0, "nothing was written meanwhile");
}

/// A snapshot of one database and another one of the next are not one point, however near they are.
#[tokio::test(flavor = "multi_thread")]
async fn databases_of_a_primary_whose_snapshots_differ_are_not_said_to_be_at_one_point() {
    let fleet = Fleet::start(false, ACCOUNTS).await;
    fleet.on_primary("CREATE DATABASE other").await;
    let founders = Founders::new(fleet.primary());
    let taken = async |databases: &[&str]| {
        let databases = databases.iter().map(|name| (*name).to_owned()).collect();
        let opened = opened(&founders, Open { databases, ..open(Uuid::new_v4(), 2) }).await;
        assert_eq!(opened.point.mode, Mode::Exported);
        opened.point.databases_at_one_point
    };
    assert!(taken(&["shop", "other"]).await, "nothing is written, and the snapshots are equal");
    // From now on one database tells of a snapshot that no other one has, as if somebody wrote between any two.
    let differing = "ALTER FUNCTION pg_catalog.pg_current_snapshot() RENAME TO pg_true_snapshot;
        CREATE FUNCTION pg_catalog.pg_current_snapshot() RETURNS pg_snapshot LANGUAGE sql
        AS $$ SELECT '7:7:'::pg_snapshot $$";
    fleet.in_database("other", differing).await;
    for (databases, expected) in [(&["shop", "other"][..], false), (&["other", "shop"], false), (&["other"], true)] {
        assert_eq!(taken(databases).await, expected, "{databases:?}");
    }
}

/// All that `pg_dump` said is between the last statement that paused and the last that resumed.
fn schema_in_pause(log: &str) {
    let paused = log.rfind("statement: SELECT pg_catalog.pg_wal_replay_pause(), (").unwrap();
    let resumed = log.rfind("statement: SELECT pg_catalog.pg_wal_replay_resume()\n").unwrap();
    assert!(log[paused..resumed].contains("statement: SET DATESTYLE = ISO"), "the schema is not of the pause");
    assert!(!log[resumed..].contains("backhaul schema"), "the schema is not of the pause alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_snapshot_is_imported_on_a_standby() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let standby = fleet.standby();
    ask(&standby, "postgres", "ALTER SYSTEM SET log_statement = 'all'").await;
    ask(&standby, "postgres", "SELECT pg_reload_conf()").await;
    until(&standby, "SHOW log_statement", "all").await;
    let (founders, log) = (Founders::new(standby.clone()), fleet._dir.path().join("standby.log"));
    let mut modes = Vec::new();
    // In a pause, and without one: a voting standby is never paused.
    for voting in [false, true] {
        let lease = Uuid::new_v4();
        let opened = opened(&founders, Open { voting, ..open(lease, 3) }).await;
        modes.push(opened.point.mode);
        for _ in 0..4 {
            assert_eq!(rows(&founders, lease, whole(table(&opened, "account"))).await.len(), 20000);
        }
        call(&founders, &Request::Close { lease }).await.unwrap();
        if !voting {
            schema_in_pause(&std::fs::read_to_string(&log).unwrap());
        }
    }
    assert!(modes[0] == Mode::Paused && matches!(modes[1], Mode::Still | Mode::Single), "{modes:?}");
    let log = std::fs::read_to_string(&log).unwrap().to_uppercase();
    // All of it is in the log: founders, their rows, and pg_dump.
    for there in ["REPEATABLE READ", "COPY (SELECT", "PG_WAL_REPLAY_PAUSE", "SET DATESTYLE = ISO"] {
        assert!(log.contains(there), "{there} is not in the log");
    }
    for never in ["TRANSACTION SNAPSHOT", "PG_EXPORT_SNAPSHOT"] {
        assert!(!log.contains(never), "{never} is in the log");
    }
}

/// Replay that stands may be in the middle of a record, and one that receives nothing may go on with what comes from an
/// archive: then the snapshots of two founders may differ although the position did not move.
#[tokio::test(flavor = "multi_thread")]
async fn replay_that_stands_for_another_reason_than_having_nothing_to_do_gives_one_reader() {
    let setup = format!("{ACCOUNTS} CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader");
    let fleet = Fleet::start(true, &setup).await;
    let reader = fleet.standby.as_ref().unwrap().server("reader").unwrap();
    let reload = async |setting: &str| {
        ask(&fleet.standby(), "postgres", &format!("ALTER SYSTEM SET {setting}")).await;
        ask(&fleet.standby(), "postgres", "SELECT pg_reload_conf()").await;
    };
    // Of one database, and of two: each founder that reads alone has a snapshot of its own.
    let taken = async || {
        let founders = Founders::new(reader.clone());
        let one = opened(&founders, open(Uuid::new_v4(), 3)).await.point;
        let databases = vec!["shop".to_owned(), "postgres".to_owned()];
        let two = opened(&founders, Open { databases, ..open(Uuid::new_v4(), 3) }).await.point;
        assert_eq!((one.mode, one.readers, one.databases_at_one_point), (two.mode, two.readers, true));
        (one.mode, one.readers, two.databases_at_one_point)
    };
    fleet.caught_up().await;
    assert_eq!(taken().await, (Mode::Still, 3, true));
    // It waits for somebody who reads what was removed.
    for setting in ["hot_standby_feedback = off", "max_standby_streaming_delay = -1"] {
        reload(setting).await;
    }
    until(&fleet.primary(), "SELECT count(backend_xmin) FROM pg_stat_replication", "0").await;
    let (old, _connection) = fleet.standby().session_in("shop").await.unwrap();
    old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM account").await.unwrap();
    fleet.in_database("shop", "DELETE FROM account WHERE id % 3 = 0").await;
    fleet.in_database("shop", "VACUUM account").await;
    fleet.on_primary("SELECT pg_logical_emit_message(true, '', '')").await;
    let waits = "SELECT pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()
                 AND EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'startup'
                             AND wait_event LIKE 'RecoveryConflict%')";
    until(&fleet.standby(), waits, "t").await;
    assert_eq!(taken().await, (Mode::Single, 1, false));
    old.batch_execute("COMMIT").await.unwrap();
    fleet.caught_up().await;
    // It has nobody to stream from.
    reload("primary_conninfo = ''").await;
    until(&fleet.standby(), "SELECT count(*) FROM pg_stat_wal_receiver", "0").await;
    assert_eq!(taken().await, (Mode::Single, 1, false));
}
