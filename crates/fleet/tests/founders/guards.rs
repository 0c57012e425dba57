//! What stands between a span and somebody else's lock, timeout or change of the schema.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_schema_that_does_not_end_is_told_and_replay_goes_on() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let (ddl, _connection) = fleet.primary().session_in("shop").await.unwrap();
    ddl.batch_execute("BEGIN; ALTER TABLE account ADD COLUMN note text").await.unwrap();
    fleet.caught_up().await;
    let error = refused(&Founders::new(fleet.standby()), &Request::Open(open(Uuid::new_v4(), 2))).await;
    let message = "table \"public.account\" is locked by a change of the schema that has not ended";
    assert_eq!((error.code, error.message.as_str()), (SqlState::LOCK_NOT_AVAILABLE, message));
    until(&fleet.standby(), PAUSE_STATE, "not paused").await;
    fleet.caught_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_stays_locked_is_told_and_may_be_asked_for_again() {
    let fleet = Fleet::start(false, ACCOUNTS).await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 1)).await;
    let account = whole(table(&opened, "account"));
    let (holder, _connection) = fleet.primary().session_in("shop").await.unwrap();
    holder.batch_execute("BEGIN; LOCK TABLE account IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let error = refused(&founders, &span(lease, account.clone())).await;
    assert_eq!(error.message, "table \"public.account\" is locked by somebody else");
    assert!(error.code == SqlState::LOCK_NOT_AVAILABLE && !is_invalidated(&error) && !is_point_lost(&error));
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(rows(&founders, lease, account).await.len(), 20000);
}

#[tokio::test(flavor = "multi_thread")]
async fn ddl_on_a_primary_waits_for_a_span_and_not_for_the_backup() {
    let rows_of = "AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n";
    let fleet = Fleet::start(false, &format!("CREATE TABLE big {rows_of}; CREATE TABLE other {rows_of}")).await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 2)).await;
    let (big, other) = (whole(table(&opened, "big")), whole(table(&opened, "other")));
    let mut half = stream(&founders, &span(lease, big.clone())).await;
    half.next().await.unwrap().unwrap();
    let (ddl, _connection) = fleet.primary().session_in("shop").await.unwrap();
    let altering = tokio::spawn(async move { ddl.batch_execute("ALTER TABLE big ADD COLUMN note text").await });
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    until(&fleet.primary(), waiting, "1").await;
    drain(half).await.unwrap();
    timeout(DEADLINE, altering).await.unwrap().unwrap().unwrap();
    // The founders are there still, read what has not changed, and refuse what has.
    call(&founders, &Request::Renew { lease }).await.unwrap();
    assert_eq!(rows(&founders, lease, other).await.len(), 60000);
    assert!(is_invalidated(&refused(&founders, &span(lease, big)).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_timeout_of_the_server_ends_a_founder_that_stands_idle() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    for timeout in ["idle_in_transaction_session_timeout", "idle_session_timeout", "statement_timeout", "lock_timeout"]
    {
        fleet.on_primary(&format!("ALTER ROLE root SET {timeout} = '1s'")).await;
    }
    fleet.caught_up().await;
    for server in [fleet.primary(), fleet.standby()] {
        let (founders, lease) = (Founders::new(server.clone()), Uuid::new_v4());
        let opened = opened(&founders, open(lease, 2)).await;
        // Somebody else who stands idle from now on is ended: so these timeouts are in force.
        let (idle, _connection) = server.session_in("shop").await.unwrap();
        idle.batch_execute("BEGIN").await.unwrap();
        let ended = async {
            while !idle.is_closed() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(DEADLINE, ended).await.unwrap();
        assert_eq!(rows(&founders, lease, whole(table(&opened, "account"))).await.len(), 20000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_has_no_more_sessions_than_are_announced() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    fleet.on_primary("CREATE DATABASE other").await;
    fleet.caught_up().await;
    for server in [fleet.primary(), fleet.standby()] {
        let (counter, _connection) = server.session_in("postgres").await.unwrap();
        let counting = tokio::spawn(async move {
            let count = "SELECT count(*) FROM pg_stat_activity
                         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
            let mut most = 0;
            while let Ok(row) = counter.query_one(count, &[]).await {
                most = most.max(row.get::<_, i64>(0));
                if row.get::<_, i64>(0) == 0 && most > 0 {
                    break;
                }
            }
            most
        });
        let (founders, lease) = (Founders::new(server), Uuid::new_v4());
        let databases = vec!["shop".to_owned(), "other".to_owned()];
        let opened = opened(&founders, Open { databases, ..open(lease, 3) }).await;
        for _ in 0..3 {
            assert_eq!(rows(&founders, lease, whole(table_of(&opened, "account"))).await.len(), 20000);
        }
        call(&founders, &Request::Close { lease }).await.unwrap();
        let most = timeout(DEADLINE, counting).await.unwrap().unwrap();
        assert!(most > 0 && most <= Open::connections_for(2, 3) as i64, "{most}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_leases_together_have_one_budget() {
    let fleet = Fleet::start(false, ACCOUNTS).await;
    let server = fleet.primary();
    let founders = Founders::new(server.clone());
    let max: usize = ask(&server, "postgres", "SHOW max_connections").await.parse().unwrap();
    // The role is a superuser, for whom nothing is kept back.
    let budget = max - max / 4;
    let (mut leases, mut held) = (Vec::new(), 0);
    let error = loop {
        let lease = Uuid::new_v4();
        match call(&founders, &Request::Open(open(lease, 16))).await {
            Ok(Reply::Answer(answer)) => {
                let opened: Opened = serde_json::from_value(answer).unwrap();
                let fit = Open::readers_within(1, 16, budget - held);
                assert_eq!(Some(opened.point.readers), fit, "beside {held} of {budget}");
                // While one is opened it has more than it keeps.
                held += Open::connections_for(1, opened.point.readers) - 4;
                leases.push((lease, opened));
            }
            Ok(_) => panic!("not an answer"),
            Err(error) => break PgError::of(&error).unwrap_or_else(|| panic!("{error:#}")).clone(),
        }
    };
    assert!(leases.len() >= 2 && leases.iter().any(|(_, opened)| opened.point.readers < 16), "{}", leases.len());
    assert_eq!(
        (error.code, error.message.as_str()),
        (SqlState::TOO_MANY_CONNECTIONS, "the server has no connections left for a backup of 1 database")
    );
    let detail = format!("Backups have {held} of the {budget} that all of them may have");
    assert!(error.detail.as_ref().unwrap().contains(&detail), "{error:?}");
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'backhaul job 7'";
    until(&server, sessions, &held.to_string()).await;
    // Each of them is read, and one that goes makes room for another.
    for (lease, opened) in &leases {
        assert_eq!(rows(&founders, *lease, whole(table(opened, "account"))).await.len(), 20000);
    }
    call(&founders, &Request::Close { lease: leases[0].0 }).await.unwrap();
    opened(&founders, open(Uuid::new_v4(), 4)).await;

    // What would never fit is no matter of waiting.
    let databases: Vec<String> = (0..20).map(|n| format!("d{n}")).collect();
    let error = refused(&founders, &Request::Open(Open { databases, ..open(Uuid::new_v4(), 4) })).await;
    let message = format!("a backup of 20 databases needs at least 64 connections, and the server has {budget}");
    assert_eq!((error.code, error.message), (SqlState::INVALID_PARAMETER_VALUE, message));
}

/// A table of any database of the plan.
fn table_of<'o>(opened: &'o Opened, name: &str) -> &'o TablePlan {
    opened.databases.iter().flat_map(|database| &database.tables).find(|table| table.name == name).unwrap()
}
