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
async fn a_child_that_is_locked_is_not_waited_for_with_its_parent() {
    let setup = "CREATE TABLE parent (a int); CREATE TABLE child () INHERITS (parent);
        INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2), (3)";
    let fleet = Fleet::start(false, setup).await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 1)).await;
    let [parent, child] = ["parent", "child"].map(|name| whole(table(&opened, name)));
    let (holder, _connection) = fleet.primary().session_in("shop").await.unwrap();
    holder.batch_execute("BEGIN; LOCK TABLE child IN ACCESS EXCLUSIVE MODE").await.unwrap();
    // Whoever waited for the lock would be refused, as one is who reads the child.
    assert_eq!(rows(&founders, lease, parent).await, ["1"]);
    let error = refused(&founders, &span(lease, child.clone())).await;
    assert_eq!(error.message, "table \"public.child\" is locked by somebody else");
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(rows(&founders, lease, child).await, ["2", "3"]);
}

/// The error in the midst of rows, whoever took them.
async fn given_way(rows: cluster::service::ByteStream) {
    let error = drain(rows).await.unwrap_err();
    let said = PgError::of(&error).unwrap_or_else(|| panic!("{error:#}"));
    assert!(
        said.code == SqlState::LOCK_NOT_AVAILABLE && said.message.ends_with("is wanted by somebody else"),
        "{said:?}"
    );
}

/// Three spans of one table that are read at the same time. Nobody takes their rows, and the server waits for whoever would.
async fn three_halves(founders: &Arc<Founders>, lease: Uuid, what: &What) -> Vec<cluster::service::ByteStream> {
    let mut halves = Vec::new();
    for _ in 0..3 {
        let mut half = stream(founders, &span(lease, what.clone())).await;
        half.next().await.unwrap().unwrap();
        halves.push(half);
    }
    halves
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_of_a_primary_gives_way_to_ddl_and_not_for_ever() {
    let rows_of = "AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n";
    let fleet = Fleet::start(false, &format!("CREATE TABLE big {rows_of}; CREATE TABLE other {rows_of}")).await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 3)).await;
    let (big, other) = (whole(table(&opened, "big")), whole(table(&opened, "other")));
    let halves = three_halves(&founders, lease, &big).await;
    let in_shop = |statement: &'static str| {
        let primary = fleet.primary();
        tokio::spawn(async move {
            let (client, _connection) = primary.session_in("shop").await.unwrap();
            client.batch_execute(statement).await.unwrap();
        })
    };
    timeout(DEADLINE, in_shop("ALTER TABLE big ADD COLUMN note text")).await.unwrap().unwrap();
    for half in halves {
        given_way(half).await;
    }
    // The founders are there still, read what has not changed, and refuse what has.
    call(&founders, &Request::Renew { lease }).await.unwrap();
    assert_eq!(rows(&founders, lease, other.clone()).await.len(), 60000);
    assert!(is_invalidated(&refused(&founders, &span(lease, big)).await));

    let lock = "BEGIN; LOCK TABLE other IN ACCESS EXCLUSIVE MODE; COMMIT";
    for _ in 0..2 {
        let halves = three_halves(&founders, lease, &other).await;
        timeout(DEADLINE, in_shop(lock)).await.unwrap().unwrap();
        for half in halves {
            given_way(half).await;
        }
    }
    // From now on it waits, for several looks.
    let halves = three_halves(&founders, lease, &other).await;
    let locking = in_shop(lock);
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND waitstart < clock_timestamp() - interval '3 s'";
    until(&fleet.primary(), waits, "1").await;
    for half in halves {
        drain(half).await.unwrap();
    }
    timeout(DEADLINE, locking).await.unwrap().unwrap();
}

/// Planning has a span hold the indexes of its table with it. What waits for one of them has the table's writers, or
/// everybody, waiting behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_span_of_a_primary_gives_way_to_who_waits_for_an_index_of_its_table() {
    let fleet = Fleet::start(
        false,
        "CREATE TABLE big AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n; CREATE INDEX by_n ON big (n)",
    )
    .await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 3)).await;
    let big = whole(table(&opened, "big"));
    for change in ["REINDEX INDEX by_n", "REINDEX TABLE big"] {
        let halves = three_halves(&founders, lease, &big).await;
        timeout(DEADLINE, fleet.in_database("shop", change)).await.unwrap();
        for half in halves {
            given_way(half).await;
        }
        // The table is the same as before.
        assert_eq!(rows(&founders, lease, big.clone()).await.len(), 60000, "{change}");
    }
}

/// Founders outlive the promotion of their standby, and from then on there are changes that wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_span_of_a_standby_that_was_promoted_gives_way_to_ddl() {
    let setup = "CREATE TABLE big AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n";
    let fleet = Fleet::start(true, setup).await;
    fleet.caught_up().await;
    let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 3)).await;
    let big = whole(table(&opened, "big"));
    let halves = three_halves(&founders, lease, &big).await;
    assert_eq!(ask(&fleet.standby(), "postgres", "SELECT pg_promote()").await, "t");
    let (promoted, _connection) = fleet.standby().session_in("shop").await.unwrap();
    let altered = promoted.batch_execute("ALTER TABLE big ADD COLUMN note text");
    timeout(DEADLINE, altered).await.unwrap().unwrap();
    for half in halves {
        given_way(half).await;
    }
    assert!(is_invalidated(&refused(&founders, &span(lease, big)).await));
}

/// Makes `table` one of an extension's, of whose rows those that meet `condition` are the user's.
async fn with_condition(fleet: &Fleet, table: &str, condition: &str) {
    let condition = condition.replace('\'', "''");
    let configured = format!(
        "ALTER EXTENSION plpgsql ADD TABLE {table};
         UPDATE pg_extension SET extconfig = ARRAY['{table}'::regclass::oid], extcondition = ARRAY['WHERE {condition}']"
    );
    fleet.in_database("shop", &configured).await;
}

/// What is run by reading, an extension's condition say, changes nothing on a primary.
#[tokio::test(flavor = "multi_thread")]
async fn a_founder_cannot_write() {
    let setup = "CREATE TABLE price (n int); INSERT INTO price VALUES (1); CREATE TABLE written (n int);
        CREATE FUNCTION write() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.written VALUES (1); RETURN true;
        END $$";
    let fleet = Fleet::start(false, setup).await;
    with_condition(&fleet, "price", "public.write()").await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 1)).await;
    let read = match call(&founders, &span(lease, whole(table(&opened, "price")))).await {
        Ok(Reply::Download(rows)) => drain(rows).await,
        Ok(_) => panic!("not a download"),
        Err(error) => Err(error),
    };
    let error = read.unwrap_err();
    assert_eq!(PgError::of(&error).map(|said| said.code), Some(SqlState::READ_ONLY_SQL_TRANSACTION), "{error:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_slowly_are_sent_on_before_there_are_many() {
    let slow = "CREATE TABLE slow AS SELECT n, repeat('x', 20000) FROM generate_series(1, 6) n;
        CREATE FUNCTION opened() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
            WHILE NOT pg_try_advisory_xact_lock_shared(7) LOOP PERFORM pg_sleep(0.02); END LOOP; RETURN true;
        END $$";
    let fleet = Fleet::start(false, slow).await;
    with_condition(&fleet, "slow", "n < 6 OR public.opened()").await;
    let (holder, _connection) = fleet.primary().session_in("shop").await.unwrap();
    holder.batch_execute("SELECT pg_advisory_lock(7)").await.unwrap();
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 1)).await;
    let mut pieces = stream(&founders, &span(lease, whole(table(&opened, "slow")))).await;
    // The server keeps the last of them until it has more to send.
    let first = timeout(DEADLINE, pieces.next()).await.unwrap().unwrap().unwrap();
    assert!(first.iter().filter(|byte| **byte == b'\n').count() >= 4, "{}", first.len());
    holder.batch_execute("SELECT pg_advisory_unlock(7)").await.unwrap();
    let rest = drain(pieces).await.unwrap();
    assert_eq!([&first[..], &rest[..]].concat().iter().filter(|byte| **byte == b'\n').count(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_databases_and_roles_do_not_reach_the_founders() {
    let fleet = Fleet::start(true, "CREATE TABLE price (amount money); INSERT INTO price VALUES (12.34)").await;
    with_condition(&fleet, "price", "current_setting('lc_monetary') = 'C'").await;
    fleet.on_primary("ALTER DATABASE shop SET lc_monetary = 'C.UTF-8'").await;
    fleet.on_primary("ALTER ROLE root SET default_transaction_isolation = 'serializable'").await;
    fleet.caught_up().await;
    for (instance, in_recovery) in [(&fleet.primary, false), (fleet.standby.as_ref().unwrap(), true)] {
        // They are in force for others.
        let conninfo = format!("{} dbname=shop", instance.conninfo("root"));
        let (other, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
        let _connection = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
        let seen = other.query_one("SELECT current_setting('lc_monetary')", &[]).await;
        match in_recovery {
            true => assert!(format!("{:?}", seen.unwrap_err()).contains("serializable mode in a hot standby")),
            false => assert_eq!(seen.unwrap().get::<_, String>(0), "C.UTF-8"),
        }
        let server = instance.server("root").unwrap();
        let (founders, lease) = (Founders::new(server.clone()), Uuid::new_v4());
        let opened = opened(&founders, open(lease, 1)).await;
        assert_eq!(rows(&founders, lease, whole(table(&opened, "price"))).await, ["$12.34"]);
        assert_eq!(is_up(server).await, Some(in_recovery));
    }
}

/// Whether the probe finds a server in recovery, if it finds it up.
async fn is_up(server: Server) -> Option<bool> {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (door, _) = tokio::sync::watch::channel(fleet::probe::Door::Unchecked);
    let probe = fleet::probe::Probe { server, insecure: true, door };
    let probing = tokio::spawn(probe.run(move |seen| drop(tell.send(seen))));
    let seen = timeout(DEADLINE, told.recv()).await.unwrap().unwrap();
    probing.abort();
    match seen {
        cluster::ServerInfo::Up(state) => Some(state.in_recovery),
        cluster::ServerInfo::Down { .. } => None,
    }
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
    // A pause that is kept has other sessions, which take over from those that it began with.
    for (server, pause) in
        [(fleet.primary(), None), (fleet.standby(), None), (fleet.standby(), Some(standing::limits()))]
    {
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
        let opened = opened(&founders, Open { databases, pause: pause.clone(), ..open(lease, 3) }).await;
        for _ in 0..3 {
            assert_eq!(rows(&founders, lease, whole(table_of(&opened, "account"))).await.len(), 20000);
        }
        call(&founders, &Request::Close { lease }).await.unwrap();
        let most = timeout(DEADLINE, counting).await.unwrap().unwrap();
        assert!(most > 0 && most <= Open::connections_for(2, 3) as i64, "{most} with {pause:?}");
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
