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

/// A table of any database of the plan.
fn table_of<'o>(opened: &'o Opened, name: &str) -> &'o TablePlan {
    opened.databases.iter().flat_map(|database| &database.tables).find(|table| table.name == name).unwrap()
}
