//! Two standbys at one point: they come to stand at one position under load, show the same rows, and never stay paused
//! for a coordinator that is gone.

use super::*;

/// A fleet and a second standby of it.
struct Twin {
    second: Instance,
    fleet: Fleet,
}

impl Twin {
    async fn start() -> Self {
        let fleet = Fleet::start(true, ACCOUNTS).await;
        let mut second = instance(fleet._dir.path(), "second");
        let settings: Settings = vec![
            ("hot_standby_feedback".to_owned(), "on".to_owned()),
            ("wal_receiver_status_interval".to_owned(), "1s".to_owned()),
        ];
        second.clone_from(&fleet.primary.conninfo("root"), "second", &settings).unwrap();
        second.start("root", &fleet._dir.path().join("second.log")).await.unwrap();
        let twin = Self { second, fleet };
        for server in twin.servers() {
            until(&server, "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'", "1").await;
        }
        twin
    }

    fn servers(&self) -> [Server; 2] {
        [self.fleet.standby(), self.second.server("root").unwrap()]
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let Some(child) = self.second.child() else { return };
        let Some(pid) = child.id() else { return };
        kill(Pid::from_raw(pid as i32), Signal::SIGQUIT).unwrap();
        while child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

async fn answer<T: serde::de::DeserializeOwned>(founders: &Arc<Founders>, request: &Request) -> T {
    match call(founders, request).await.unwrap() {
        Reply::Answer(answer) => serde_json::from_value(answer).unwrap(),
        _ => panic!("not an answer"),
    }
}

async fn step(founders: &Arc<Founders>, lease: Uuid, until: Option<cluster::Lsn>) -> Standstill {
    answer(founders, &Request::Step { lease, until }).await
}

/// Steps whichever is behind, as a coordinator does; gives where both stand, unless that takes too many steps.
async fn to_one_position(pair: &[Arc<Founders>; 2], lease: Uuid) -> Option<Standstill> {
    let [first, second] = pair;
    let (mut one, mut other) = (step(first, lease, None).await, step(second, lease, None).await);
    for _ in 0..200 {
        if one == other {
            return Some(one);
        }
        if one.lsn < other.lsn {
            one = step(first, lease, Some(other.lsn)).await;
        } else {
            other = step(second, lease, Some(one.lsn)).await;
        }
    }
    None
}

/// Prepares both and brings them to one position. Where other tests keep all processors busy that may take several tries.
async fn both_stand(pair: &[Arc<Founders>; 2], pause: Option<PauseLimits>) -> (Uuid, Standstill) {
    for _ in 0..10 {
        let lease = Uuid::new_v4();
        for founders in pair {
            answer::<()>(founders, &Request::Prepare(Open { pause: pause.clone(), ..open(lease, 2) })).await;
        }
        if let Some(at) = to_one_position(pair, lease).await {
            return (lease, at);
        }
        for founders in pair {
            answer::<()>(founders, &Request::Close { lease }).await;
        }
    }
    panic!("they never stand at one position");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_standbys_are_stepped_to_one_point_and_show_the_same() {
    let twin = Twin::start().await;
    let writing = writer(&twin.fleet.primary(), 1);
    let (big, _connection) = twin.fleet.primary().session_in("shop").await.unwrap();
    let pair = twin.servers().map(Founders::new);
    for round in 0..6 {
        // In the last of them replay stays paused for as long as the point is read.
        let pause = (round == 5).then(standing::limits);
        let state = if pause.is_some() { "paused" } else { "not paused" };
        // Open while the snapshots are taken, and committed before they are read.
        big.batch_execute(&MANY_SUBTRANSACTIONS.replace("100000", &format!("{}", 100_000 + 1000 * round)))
            .await
            .unwrap();
        let (lease, at) = both_stand(&pair, pause).await;
        let mut seen = Vec::new();
        let mut taken: Vec<Opened> = Vec::new();
        for (founders, with_schema) in pair.iter().zip([true, false]) {
            taken.push(answer(founders, &Request::Take { lease, at: at.clone(), with_schema }).await);
        }
        big.batch_execute("COMMIT").await.unwrap();
        for (founders, opened) in pair.iter().zip(&taken) {
            assert_eq!(
                (opened.point.lsn, opened.point.timeline, opened.point.mode),
                (at.lsn, at.timeline, Mode::Paused)
            );
            seen.push(rows(founders, lease, whole(table(opened, "account"))).await);
        }
        assert_eq!(table(&taken[0], "account").identity, table(&taken[1], "account").identity);
        assert!(taken[0].databases[0].schema_bytes > 0 && taken[1].databases[0].schema_bytes == 0);
        assert_eq!(taken[0].databases[0].sequences, taken[1].databases[0].sequences);
        assert!(seen[0] == seen[1], "the servers differ");
        assert_eq!(sum(&seen[0]), 2_000_000 + 150_000 * i64::from(round));
        for (founders, server) in pair.iter().zip(twin.servers()) {
            assert_eq!(ask(&server, "postgres", PAUSE_STATE).await, state);
            assert_eq!(answer::<Option<String>>(founders, &Request::Renew { lease }).await, None);
            answer::<()>(founders, &Request::Close { lease }).await;
            until(&server, PAUSE_STATE, "not paused").await;
        }
    }
    writing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_waits_for_others_does_not_wait_for_long() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
    let prepare = |voting| Request::Prepare(Open { voting, ..open(lease, 2) });
    // Where replay may not be paused nothing is prepared.
    let error = refused(&founders, &prepare(true)).await;
    assert!(error.message.ends_with("may not be paused"), "{error:?}");
    let error = refused(&Founders::new(fleet.primary()), &prepare(false)).await;
    assert!(error.message.ends_with("may not be paused"), "{error:?}");
    assert!(is_point_lost(&refused(&founders, &Request::Step { lease, until: None }).await));

    // Another position than the one where it stands is refused, and replay goes on.
    answer::<()>(&founders, &prepare(false)).await;
    let at = step(&founders, lease, None).await;
    assert_eq!(ask(&fleet.standby(), "postgres", PAUSE_STATE).await, "paused");
    for elsewhere in [
        Standstill { lsn: cluster::Lsn(at.lsn.0 + 8), ..at.clone() },
        Standstill { timeline: at.timeline + 1, ..at.clone() },
    ] {
        let error = refused(&founders, &Request::Take { lease, at: elsewhere, with_schema: false }).await;
        assert_eq!(error.message, "the server does not stand at the point that others share");
        assert_eq!(ask(&fleet.standby(), "postgres", PAUSE_STATE).await, "not paused");
        answer::<()>(&founders, &prepare(false)).await;
        step(&founders, lease, None).await;
    }
    // Closed, it goes on at once; and nobody else's turn is held up.
    answer::<()>(&founders, &Request::Close { lease }).await;
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
    opened(&founders, open(Uuid::new_v4(), 2)).await;

    // A coordinator that is gone says nothing more.
    answer::<()>(&founders, &prepare(false)).await;
    step(&founders, lease, None).await;
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
    assert!(is_point_lost(&refused(&founders, &Request::Step { lease, until: None }).await));
    fleet.caught_up().await;
}

/// Which timeline a server replays is known only while it receives it, and without that there is no proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_streams_from_nobody_shares_no_point() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (standby, lease) = (fleet.standby(), Uuid::new_v4());
    let founders = Founders::new(standby.clone());
    let receivers = "SELECT count(*) FROM pg_stat_wal_receiver";
    // It has lost its receiver since it stands; while it does, it gets no other one.
    answer::<()>(&founders, &Request::Prepare(open(lease, 2))).await;
    let at = step(&founders, lease, None).await;
    let receiver = ask(&standby, "postgres", "SELECT pid::text FROM pg_stat_wal_receiver").await;
    kill(Pid::from_raw(receiver.parse().unwrap()), Signal::SIGTERM).unwrap();
    until(&standby, receivers, "0").await;
    let error = refused(&founders, &Request::Take { lease, at, with_schema: false }).await;
    assert_eq!(error.message, "the server does not stand at the point that others share");
    until(&standby, PAUSE_STATE, "not paused").await;
    fleet.caught_up().await;
    // It has none from the beginning.
    ask(&standby, "postgres", "ALTER SYSTEM SET primary_conninfo = ''").await;
    ask(&standby, "postgres", "SELECT pg_reload_conf()").await;
    until(&standby, receivers, "0").await;
    answer::<()>(&founders, &Request::Prepare(open(lease, 2))).await;
    let error = refused(&founders, &Request::Step { lease, until: None }).await;
    assert_eq!(error.detail.as_deref(), Some("It does not stream from another server."));
    answer::<()>(&founders, &Request::Close { lease }).await;
    until(&standby, PAUSE_STATE, "not paused").await;
}

/// What replay holds on the catalogs that the look for locks reads itself is not waited for in a pause, which would not
/// end before its last moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_replay_has_locked_keeps_no_pause() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
    let (rewriter, _connection) = fleet.primary().session_in("shop").await.unwrap();
    // The sessions are there before, and would not be opened behind it.
    answer::<()>(&founders, &Request::Prepare(open(lease, 2))).await;
    rewriter.batch_execute("BEGIN; LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE").await.unwrap();
    fleet.caught_up().await;
    let at = step(&founders, lease, None).await;
    let error = refused(&founders, &Request::Take { lease, at, with_schema: false }).await;
    let message = "the system catalogs are locked by a change that has not ended";
    assert_eq!((error.code, error.message.as_str()), (SqlState::LOCK_NOT_AVAILABLE, message));
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
    rewriter.batch_execute("COMMIT").await.unwrap();
    let opened = opened(&founders, open(Uuid::new_v4(), 2)).await;
    assert_eq!(opened.point.mode, Mode::Paused);
}

/// What is prepared stands idle outside of a transaction until the other servers have come to their turn.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_outlives_the_time_that_a_session_may_stand_idle() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    fleet.on_primary("ALTER ROLE root SET idle_session_timeout = '1s'").await;
    fleet.caught_up().await;
    let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
    answer::<()>(&founders, &Request::Prepare(open(lease, 2))).await;
    // Somebody else who stands idle from now on is ended: so the timeout is in force.
    let (idle, _connection) = fleet.standby().session_in("shop").await.unwrap();
    let ended = async {
        while !idle.is_closed() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, ended).await.unwrap();
    let at = step(&founders, lease, None).await;
    let taken: Opened = answer(&founders, &Request::Take { lease, at: at.clone(), with_schema: true }).await;
    assert_eq!((taken.point.lsn, taken.point.readers), (at.lsn, 2));
    assert_eq!(rows(&founders, lease, whole(table(&taken, "account"))).await.len(), 20000);
}

/// Another backup reads where it stands.
#[tokio::test(flavor = "multi_thread")]
async fn replay_that_stands_for_another_backup_is_shared_and_not_stepped() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (founders, [reading, lease]) = (Founders::new(fleet.standby()), [Uuid::new_v4(), Uuid::new_v4()]);
    let pause = Some(standing::limits());
    let point = opened(&founders, Open { pause, ..open(reading, 2) }).await.point;
    answer::<()>(&founders, &Request::Prepare(Open { job: 8, ..open(lease, 2) })).await;
    let at = step(&founders, lease, None).await;
    assert_eq!((at.lsn, at.timeline), (point.lsn, point.timeline));
    // There is something to step over.
    fleet.in_database("shop", "UPDATE account SET balance = balance + 1").await;
    let request = Request::Step { lease, until: Some(cluster::Lsn(at.lsn.0 + 8)) };
    let error = refused(&founders, &request).await;
    assert_eq!(error.message, "the server does not stand at the point that others share");
    assert_eq!(error.detail.as_deref(), Some("Its replay stands for another backup, which reads it."));
    assert_eq!(answer::<Option<String>>(&founders, &Request::Renew { lease: reading }).await, None);
    assert_eq!(ask(&fleet.standby(), "postgres", PAUSE_STATE).await, "paused");
    let replayed = ask(&fleet.standby(), "postgres", "SELECT pg_last_wal_replay_lsn()").await;
    assert_eq!(replayed.parse::<cluster::Lsn>().unwrap(), point.lsn);
}
