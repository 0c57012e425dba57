//! Replay that stands while it is read: shared, ended by whoever is last, by limits, by others; and points that are held for
//! too long.

use std::sync::Mutex;

use super::*;

pub(super) fn limits() -> PauseLimits {
    PauseLimits { longest_ms: 120_000, wal_bytes: 0, free_bytes: 0 }
}

fn keeping(job: i64, pause: PauseLimits) -> Open {
    Open { job, pause: Some(pause), ..open(Uuid::new_v4(), 2) }
}

/// Why replay goes on, if that is told.
async fn renewed(founders: &Arc<Founders>, lease: Uuid) -> Option<String> {
    match call(founders, &Request::Renew { lease }).await.unwrap() {
        Reply::Answer(answer) => serde_json::from_value(answer).unwrap(),
        _ => panic!("not an answer"),
    }
}

/// The same when it does.
async fn until_over(founders: &Arc<Founders>, lease: Uuid) -> Option<String> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let over = renewed(founders, lease).await;
        if over.is_some() || Instant::now() > deadline {
            return over;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

#[track_caller]
fn says(over: Option<String>, words: &str) {
    assert!(over.as_ref().is_some_and(|why| why.contains(words)), "{over:?}");
}

async fn close(founders: &Arc<Founders>, lease: Uuid) {
    call(founders, &Request::Close { lease }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_stands_until_the_last_lease_that_shares_it_has_ended() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let founders = Founders::new(fleet.standby());
    let (first, second) = (keeping(7, limits()), keeping(8, limits()));
    let passing = Open { job: 9, ..open(Uuid::new_v4(), 1) };
    let point = opened(&founders, first.clone()).await;
    assert_eq!(ask(&fleet.standby(), "postgres", PAUSE_STATE).await, "paused");
    fleet.in_database("shop", "UPDATE account SET balance = balance + 1").await;
    fleet.in_database("shop", "ALTER TABLE account ADD COLUMN note text DEFAULT ''").await;
    // Whoever comes while it stands takes its point where it stands.
    for request in [&second, &passing] {
        let beside = opened(&founders, request.clone()).await;
        assert_eq!((beside.point.lsn, beside.point.time), (point.point.lsn, point.point.time));
        assert_eq!(table(&beside, "account").columns, ["id", "balance"]);
    }
    close(&founders, first.lease).await;
    let both = rows(&founders, second.lease, whole(table(&point, "account"))).await;
    assert_eq!((ask(&fleet.standby(), "postgres", PAUSE_STATE).await.as_str(), both.len()), ("paused", 20000));
    assert_eq!(renewed(&founders, second.lease).await, None);
    close(&founders, second.lease).await;
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
    // This one did not ask for it.
    assert_eq!(renewed(&founders, passing.lease).await, None);
    fleet.caught_up().await;
    let watching = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%watching its pause'";
    until(&fleet.standby(), watching, "0").await;

    // The next one begins anew, and ends with the founders themselves.
    let third = opened(&founders, keeping(7, limits())).await;
    assert!(third.point.lsn > point.point.lsn);
    drop(founders);
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_is_watched_for_longer_than_a_statement_of_the_node_s_role_may_last() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    fleet.on_primary("ALTER ROLE root SET statement_timeout = '2s'").await;
    fleet.caught_up().await;
    let (founders, standby) = (Founders::new(fleet.standby()), fleet.standby());
    let lease = keeping(7, limits());
    opened(&founders, lease.clone()).await;
    // A statement that begins now is ended: so the timeout is in force, and is over for those that began before.
    let (sleeper, _connection) = standby.session_in("postgres").await.unwrap();
    let ended = timeout(DEADLINE, sleeper.batch_execute("SELECT pg_sleep(60)")).await.unwrap().unwrap_err();
    assert_eq!(ended.code().map(tokio_postgres::error::SqlState::code), Some("57014"), "{ended:?}");
    let watching = "SELECT count(*) FROM pg_stat_activity
                    WHERE application_name LIKE '%watching its pause' AND state = 'active'";
    assert_eq!(ask(&standby, "postgres", watching).await, "1");
    assert_eq!(renewed(&founders, lease.lease).await, None);
    assert_eq!(ask(&standby, "postgres", PAUSE_STATE).await, "paused");
}

/// What is known of a standby's vote.
struct Voting(Arc<Mutex<Option<bool>>>);

impl Voting {
    fn new(known: Option<bool>) -> Self {
        Self(Arc::new(Mutex::new(known)))
    }

    fn set(&self, known: Option<bool>) {
        *self.0.lock().unwrap() = known;
    }

    fn beside(&self, server: &Server) -> Arc<Founders> {
        let known = self.0.clone();
        Founders::beside(server.clone(), Arc::new(move || *known.lock().unwrap()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_becomes_voting_while_its_point_is_sought_is_not_paused_any_more() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (voting, standby) = (Voting::new(Some(false)), fleet.standby());
    let founders = voting.beside(&standby);
    // Between two tries.
    let (ddl, _connection) = fleet.primary().session_in("shop").await.unwrap();
    ddl.batch_execute("BEGIN; ALTER TABLE account ADD COLUMN note text").await.unwrap();
    fleet.caught_up().await;
    let seeking = founders.clone();
    let seeking = tokio::spawn(async move { opened(&seeking, open(Uuid::new_v4(), 2)).await });
    let (watcher, _connection) = standby.session_in("postgres").await.unwrap();
    while watcher.query_one(PAUSE_STATE, &[]).await.unwrap().get::<_, &str>(0) != "paused" {}
    voting.set(Some(true));
    // Without a pause it waits for the lock as everybody else does.
    until(&standby, "SELECT count(*) FROM pg_locks WHERE NOT granted", "1").await;
    assert_eq!(ask(&standby, "postgres", PAUSE_STATE).await, "not paused");
    ddl.batch_execute("ROLLBACK").await.unwrap();
    let point = timeout(DEADLINE, seeking).await.unwrap().unwrap().point;
    assert!(matches!(point.mode, Mode::Still | Mode::Single), "{point:?}");

    // While it stands for others, whose coordinator asks on and on.
    voting.set(Some(false));
    let lease = Uuid::new_v4();
    call(&founders, &Request::Prepare(open(lease, 2))).await.unwrap();
    let step = Request::Step { lease, until: None };
    call(&founders, &step).await.unwrap();
    assert_eq!(ask(&standby, "postgres", PAUSE_STATE).await, "paused");
    voting.set(Some(true));
    let deadline = Instant::now() + DEADLINE;
    while call(&founders, &step).await.is_ok() {
        assert!(Instant::now() < deadline, "replay stands on");
        sleep(Duration::from_millis(100)).await;
    }
    until(&standby, PAUSE_STATE, "not paused").await;
    fleet.caught_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_somebody_has_ended_is_not_shared() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (founders, standby) = (Founders::new(fleet.standby()), fleet.standby());
    opened(&founders, keeping(7, limits())).await;
    ask(&standby, "postgres", "SELECT pg_wal_replay_resume()").await;
    // At once, when the founders do not know of it yet.
    let second = keeping(8, limits());
    assert_eq!(opened(&founders, second.clone()).await.point.mode, Mode::Paused);
    assert_eq!(ask(&standby, "postgres", PAUSE_STATE).await, "paused");
    assert_eq!(renewed(&founders, second.lease).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_ends_before_its_time_and_says_why() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (voting, standby) = (Voting::new(Some(false)), fleet.standby());
    let founders = voting.beside(&standby);

    let lease = keeping(7, PauseLimits { wal_bytes: 100_000, ..limits() });
    opened(&founders, lease.clone()).await;
    fleet.in_database("shop", "UPDATE account SET balance = balance + 1").await;
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "more than bulkio.backup.standby_wal_limit, which is 100000.");

    let lease = keeping(7, PauseLimits { longest_ms: 1500, ..limits() });
    opened(&founders, lease.clone()).await;
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "as long as bulkio.backup.standby_pause_limit lets it.");

    let lease = keeping(7, PauseLimits { free_bytes: u64::MAX, ..limits() });
    opened(&founders, lease.clone()).await;
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "less than bulkio.backup.standby_free_space_floor");

    let lease = keeping(7, limits());
    opened(&founders, lease.clone()).await;
    voting.set(Some(true));
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "Commits may wait for the server now.");
    // Nor is it paused for a moment while that is so, or not known, whatever the coordinator believes.
    for unsure in [Some(true), None] {
        voting.set(unsure);
        let lease = keeping(8, limits());
        let unpaused = opened(&founders, lease.clone()).await;
        assert!(matches!(unpaused.point.mode, Mode::Still | Mode::Single));
        says(renewed(&founders, lease.lease).await, "It could not be paused");
        close(&founders, lease.lease).await;
    }
    voting.set(Some(false));

    // What is not known for long ends it, too.
    let lease = keeping(7, limits());
    opened(&founders, lease.clone()).await;
    voting.set(None);
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "Commits may wait for the server now.");
    close(&founders, lease.lease).await;
    voting.set(Some(false));

    // A stream that is lost stays lost as long as replay stands.
    let lease = keeping(7, limits());
    opened(&founders, lease.clone()).await;
    let receiver = ask(&standby, "postgres", "SELECT pid FROM pg_stat_wal_receiver").await;
    kill(Pid::from_raw(receiver.parse().unwrap()), Signal::SIGTERM).unwrap();
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "It lost its stream of WAL");
    fleet.caught_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_somebody_ends_is_not_begun_anew_and_theirs_is_left_alone() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (founders, standby) = (Founders::new(fleet.standby()), fleet.standby());
    let lease = keeping(7, limits());
    opened(&founders, lease.clone()).await;
    ask(&standby, "postgres", "SELECT pg_wal_replay_resume()").await;
    says(until_over(&founders, lease.lease).await, "Somebody resumed it");
    ask(&standby, "postgres", "SELECT pg_wal_replay_pause()").await;
    until(&standby, PAUSE_STATE, "paused").await;
    close(&founders, lease.lease).await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job 7%'";
    until(&standby, sessions, "0").await;
    assert_eq!(ask(&standby, "postgres", PAUSE_STATE).await, "paused");
    let refused = refused(&founders, &Request::Open(keeping(7, limits()))).await;
    assert_eq!(refused.message, "replay on the server is paused by somebody else");
    ask(&standby, "postgres", "SELECT pg_wal_replay_resume()").await;

    // A promotion ends it, too.
    let lease = keeping(7, limits());
    opened(&founders, lease.clone()).await;
    assert_eq!(ask(&standby, "postgres", "SELECT pg_promote()").await, "t");
    says(until_over(&founders, lease.lease).await, "The server was promoted.");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_given_up_that_is_held_for_too_long() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let old = PointLimits { age_ms: 1500, ..PointLimits::default() };
    let costly = PointLimits { xmin_age: 50, ..PointLimits::default() };
    let burn = "DO $$ BEGIN FOR n IN 1..200 LOOP UPDATE account SET balance = 0 WHERE id = 1; COMMIT; END LOOP; END $$";
    for (server, limits, message, setting) in [
        (fleet.primary(), &old, "the backup's point has become too old", "snapshot_age_limit"),
        (fleet.standby(), &old, "the backup's point has become too old", "snapshot_age_limit"),
        (fleet.primary(), &costly, "the backup's point keeps too much", "xmin_age_limit"),
        // This standby has feedback on.
        (fleet.standby(), &costly, "the backup's point keeps too much", "xmin_age_limit"),
    ] {
        let founders = Founders::new(server.clone());
        let request = Open { limits: limits.clone(), ..open(Uuid::new_v4(), 2) };
        let request = Open { pause: (limits == &old).then(self::limits), ..request };
        let opened = opened(&founders, request.clone()).await;
        fleet.in_database("shop", burn).await;
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job 7%'";
        until(&server, sessions, "0").await;
        for asked in [span(request.lease, whole(table(&opened, "account"))), Request::Renew { lease: request.lease }] {
            let error = refused(&founders, &asked).await;
            assert!(error.message.starts_with(message) && !is_point_lost(&error), "{error:?}");
            assert_eq!(error.code, SqlState::CONFIGURATION_LIMIT_EXCEEDED);
            assert!(error.hint.is_some_and(|hint| hint.contains(setting)));
        }
    }
    // With it the pause is over.
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
    fleet.caught_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_keeps_a_standby_from_replaying_is_given_up_when_too_much_waits() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let standby = fleet.standby();
    // Replay waits for queries for ever, and the primary does not know what they see.
    for setting in ["max_standby_streaming_delay = -1", "hot_standby_feedback = off"] {
        ask(&standby, "postgres", &format!("ALTER SYSTEM SET {setting}")).await;
    }
    ask(&standby, "postgres", "SELECT pg_reload_conf()").await;
    until(&standby, "SELECT current_setting('max_standby_streaming_delay')", "-1").await;
    until(&fleet.primary(), "SELECT count(backend_xmin) FROM pg_stat_replication", "0").await;
    let founders = Founders::new(standby.clone());
    let limits = PointLimits { wal_bytes: 1_000_000, ..PointLimits::default() };
    let request = Open { limits, ..open(Uuid::new_v4(), 2) };
    opened(&founders, request.clone()).await;
    fleet.in_database("shop", "DELETE FROM account WHERE id < 10000").await;
    fleet.in_database("shop", "VACUUM account").await;
    fleet.in_database("shop", "UPDATE account SET balance = balance + 1").await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backhaul job 7%'";
    until(&standby, sessions, "0").await;
    let error = refused(&founders, &Request::Renew { lease: request.lease }).await;
    assert!(is_point_lost(&error), "{error:?}");
    assert!(error.detail.is_some_and(|detail| detail.contains("more than bulkio.backup.standby_wal_limit")));
    fleet.caught_up().await;
}
