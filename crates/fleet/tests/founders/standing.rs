//! Replay that stands while it is read: shared, ended by whoever is last, by limits, by others; and points that are held for
//! too long.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn limits() -> PauseLimits {
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
        assert_eq!(beside.point.lsn, point.point.lsn);
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
async fn a_pause_ends_before_its_time_and_says_why() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (voting, standby) = (Arc::new(AtomicBool::new(false)), fleet.standby());
    let seen = Arc::clone(&voting);
    let founders = Founders::beside(standby.clone(), Arc::new(move || seen.load(Ordering::Relaxed)));

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
    voting.store(true, Ordering::Relaxed);
    until(&standby, PAUSE_STATE, "not paused").await;
    says(renewed(&founders, lease.lease).await, "Commits may wait for the server now.");
    // Nor is it paused for a moment while that is so, whatever the coordinator believes.
    let lease = keeping(8, limits());
    let unpaused = opened(&founders, lease.clone()).await;
    assert!(matches!(unpaused.point.mode, Mode::Still | Mode::Single));
    says(renewed(&founders, lease.lease).await, "It could not be paused");
    voting.store(false, Ordering::Relaxed);

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
    let old = PointLimits { age_ms: 1500, xmin_age: 0 };
    let costly = PointLimits { age_ms: 0, xmin_age: 50 };
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
