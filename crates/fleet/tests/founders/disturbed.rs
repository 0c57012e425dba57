//! Founders whose server, types or rights are not what they could wish: nothing wrong is read, and what is amiss is said
//! in words that whoever runs a backup can act upon.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_founder_that_replay_ends_is_a_lost_founder_and_no_serialization_failure() {
    let fleet =
        Fleet::start(true, "CREATE TABLE big AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n").await;
    for setting in ["hot_standby_feedback = off", "max_standby_streaming_delay = '300ms'"] {
        ask(&fleet.standby(), "postgres", &format!("ALTER SYSTEM SET {setting}")).await;
    }
    ask(&fleet.standby(), "postgres", "SELECT pg_reload_conf()").await;
    until(&fleet.primary(), "SELECT count(backend_xmin) FROM pg_stat_replication", "0").await;
    // The span is slow because nobody takes its rows, or because they are taken slowly.
    for (pause, number, deleted) in [(Duration::from_secs(3), 1, 0), (Duration::from_millis(20), 1000, 1)] {
        fleet.caught_up().await;
        let (founders, lease) = (Founders::new(fleet.standby()), Uuid::new_v4());
        let opened = opened(&founders, open(lease, 2)).await;
        let big = whole(table(&opened, "big"));
        let mut rows = stream(&founders, &span(lease, big.clone())).await;
        fleet.in_database("shop", &format!("DELETE FROM big WHERE n % 3 = {deleted}")).await;
        fleet.in_database("shop", "VACUUM big").await;
        let mut ended = None;
        for turn in 0.. {
            if turn < number {
                sleep(pause).await;
            }
            match rows.next().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    ended = Some(error);
                    break;
                }
                None => break,
            }
        }
        let error = ended.expect("the founder outlived the conflict");
        let said = PgError::of(&error).unwrap_or_else(|| panic!("{error:#}"));
        assert!(is_point_lost(said) || said.code == SqlState::CONNECTION_FAILURE, "{error:#}");
        // Replay ends the other founders one after the other; one of them may still begin.
        for left in (0..3).rev() {
            match call(&founders, &span(lease, big.clone())).await {
                Ok(Reply::Download(rows)) if left > 0 => drop(drain(rows).await),
                Ok(_) => panic!("more spans begin than there are founders"),
                Err(error) => {
                    assert!(PgError::of(&error).is_some_and(is_point_lost), "{error:#}");
                    break;
                }
            }
        }
    }
}

const TYPED: &str = "
    CREATE TYPE pair AS (a int, b text); CREATE TYPE mood AS ENUM ('glad', 'sad'); CREATE DOMAIN pairs AS pair[];
    CREATE TYPE unused AS (a int); CREATE TABLE made (n int); CREATE TABLE uses (m made);
    CREATE TABLE pairs_of (n int, p pairs, t text);
    INSERT INTO pairs_of SELECT n, ARRAY[ROW(n, 'x')::pair], repeat('x', 500) FROM generate_series(1, 20000) n;
    CREATE TABLE moods (m mood); INSERT INTO moods VALUES ('glad'), ('sad');
    CREATE TABLE plain (a int, t text[]); INSERT INTO plain VALUES (1, '{}');";

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_changed_behind_the_point_spoils_the_tables_that_use_it() {
    let fleet = Fleet::start(true, TYPED).await;
    for server in [fleet.standby(), fleet.primary()] {
        fleet.caught_up().await;
        let (founders, lease) = (Founders::new(server), Uuid::new_v4());
        let opened = opened(&founders, open(lease, 1)).await;
        for (name, typed) in [("pairs_of", true), ("moods", true), ("uses", true), ("plain", false), ("made", false)] {
            assert_eq!(table(&opened, name).types.is_some(), typed, "{name}");
        }
        let (pairs, moods) = (whole(table(&opened, "pairs_of")), whole(table(&opened, "moods")));
        // What is not inside of a table does not matter to it.
        fleet.in_database("shop", "ALTER TYPE unused ADD ATTRIBUTE c int; CREATE TYPE more AS (a int)").await;
        fleet.caught_up().await;
        assert_eq!(rows(&founders, lease, moods.clone()).await, ["glad", "sad"]);
        let mut half = stream(&founders, &span(lease, pairs.clone())).await;
        half.next().await.unwrap().unwrap();
        // Renamed to and fro, too: rows in between would have had the other name.
        fleet
            .in_database(
                "shop",
                "ALTER TYPE pair ADD ATTRIBUTE c int; ALTER TYPE mood RENAME VALUE 'sad' TO 'bad';
                 ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'; ALTER TYPE more ADD ATTRIBUTE c int",
            )
            .await;
        fleet.caught_up().await;
        let error = drain(half).await.unwrap_err();
        let said = PgError::of(&error).unwrap_or_else(|| panic!("{error:#}"));
        assert!(is_invalidated(said) && said.message.contains("\"public.pairs_of\""), "{said:?}");
        assert_eq!(said.detail.as_deref(), Some("A type of one of its columns was altered."));
        for what in [pairs, moods] {
            let error = refused(&founders, &span(lease, what)).await;
            assert!(is_invalidated(&error), "{error:?}");
        }
        assert_eq!(rows(&founders, lease, whole(table(&opened, "plain"))).await, ["1\t{}"]);
        let back = "ALTER TYPE pair DROP ATTRIBUTE c; ALTER TYPE unused DROP ATTRIBUTE c; DROP TYPE more";
        fleet.in_database("shop", back).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_no_known_encoding_are_taken_as_they_are() {
    let fleet = Fleet::start(false, "").await;
    fleet.on_primary("CREATE DATABASE raw ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0").await;
    fleet.on_primary("CREATE ROLE clerk; ALTER ROLE clerk IN DATABASE raw SET work_mem = '7MB'").await;
    fleet.in_database("raw", "CREATE TABLE t (a text); INSERT INTO t VALUES (chr(233)), ('plain')").await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, Open { databases: vec!["raw".to_owned()], ..open(lease, 1) }).await;
    let plan = &opened.databases[0];
    assert_eq!((plan.encoding.as_str(), plan.copy_encoding.as_str()), ("SQL_ASCII", "SQL_ASCII"));
    assert_eq!(plan.role_settings, [("clerk".to_owned(), "work_mem=7MB".to_owned())]);
    for _ in 0..2 {
        let what = whole(table(&opened, "t"));
        let request = Request::Span(SpanRequest { lease, database: "raw".to_owned(), what });
        assert_eq!(drain(stream(&founders, &request).await).await.unwrap(), b"\xe9\nplain\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_role_may_not_read_is_named() {
    let setup = "CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader; CREATE FOREIGN DATA WRAPPER w;
        CREATE SERVER \"Far\" FOREIGN DATA WRAPPER w;
        CREATE USER MAPPING FOR root SERVER \"Far\" OPTIONS (password 'hunter2');
        CREATE SUBSCRIPTION news CONNECTION '' PUBLICATION p WITH (connect = false)";
    let fleet = Fleet::start(false, setup).await;
    for (server, named) in [(fleet.primary.server("reader").unwrap(), true), (fleet.primary(), false)] {
        let opened = opened(&Founders::new(server), open(Uuid::new_v4(), 1)).await;
        let plan = &opened.databases[0];
        let skipped = names(&plan.skipped, |skipped| format!("{} {}", skipped.kind, skipped.object));
        let expected = ["subscription news", "user mapping for root on server \"Far\""];
        assert_eq!(skipped, if named { expected.as_slice() } else { &[] });
        assert_eq!(plan.warnings.iter().any(|line| line.contains("subscriptions")), named, "{:?}", plan.warnings);
        assert!(!format!("{plan:?}").contains("hunter2"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_are_ended_while_the_point_is_taken_are_opened_again() {
    let fleet = Fleet::start(true, ACCOUNTS).await;
    let ending = "SELECT count(pg_terminate_backend(pid)) FROM (
                      SELECT pid FROM pg_stat_activity
                      WHERE application_name = 'backhaul job 7' AND state LIKE 'idle in transaction%' LIMIT 1) one";
    for server in [fleet.standby(), fleet.primary()] {
        let victim = server.clone();
        let killer = tokio::spawn(async move {
            let mut ended = 0;
            while ended < 3 {
                ended += ask(&victim, "postgres", ending).await.parse::<i32>().unwrap();
            }
        });
        let (founders, lease) = (Founders::new(server.clone()), Uuid::new_v4());
        let request = open(lease, 3);
        let opened = opened(&founders, request).await;
        killer.abort();
        assert_eq!(opened.point.readers, 3);
        if opened.point.mode == Mode::Paused {
            assert_eq!(ask(&server, "postgres", PAUSE_STATE).await, "not paused");
        }
    }
}

const OBJECTS: &str = "SELECT lo_from_bytea(5001, decode(repeat('ab', 3000), 'hex')), lo_from_bytea(5002, 'hello')";

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_whose_files_were_rewritten_are_never_read() {
    let fleet = Fleet::start(true, OBJECTS).await;
    let standby = fleet.standby();
    // Nothing keeps the primary from forgetting what the founders see, and replay waits for them where it says so.
    for setting in ["hot_standby_feedback = off", "max_standby_streaming_delay = -1"] {
        ask(&standby, "postgres", &format!("ALTER SYSTEM SET {setting}")).await;
    }
    ask(&standby, "postgres", "SELECT pg_reload_conf()").await;
    until(&fleet.primary(), "SELECT count(backend_xmin) FROM pg_stat_replication", "0").await;
    for rewriting in [
        "VACUUM FULL pg_largeobject",
        "VACUUM FULL pg_largeobject_metadata",
        "REINDEX INDEX pg_largeobject_loid_pn_index",
        "REINDEX INDEX pg_largeobject_metadata_oid_index",
    ] {
        fleet.in_database("shop", "SELECT lo_from_bytea(5003, 'unlinked')").await;
        fleet.caught_up().await;
        let (founders, lease) = (Founders::new(standby.clone()), Uuid::new_v4());
        opened(&founders, open(lease, 1)).await;
        let files =
            "SELECT string_agg(relfilenode::text, ' ' ORDER BY oid) FROM pg_class WHERE relname LIKE 'pg_largeobject%'";
        let before = ask(&standby, "shop", files).await;
        fleet.in_database("shop", "SELECT lo_unlink(5003)").await;
        fleet.in_database("shop", rewriting).await;
        fleet.on_primary("SELECT pg_logical_emit_message(true, '', '')").await;
        let deadline = Instant::now() + DEADLINE;
        while ask(&standby, "shop", files).await == before {
            assert!(Instant::now() < deadline, "{rewriting} is not replayed");
            sleep(Duration::from_millis(20)).await;
        }
        for what in [What::LargeObjects, What::LargeObjectData] {
            let error = refused(&founders, &span(lease, what)).await;
            assert!(is_invalidated(&error), "{rewriting}: {error:?}");
            assert_eq!(error.detail.as_deref(), Some("It or one of its indexes was rewritten."));
        }
        // Replay goes on.
        drop(founders);
        fleet.caught_up().await;
    }
    // On a primary all of it is there.
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    opened(&founders, open(lease, 1)).await;
    fleet.in_database("shop", "SELECT lo_unlink(5002)").await;
    fleet.in_database("shop", "VACUUM FULL pg_largeobject").await;
    for what in [What::LargeObjects, What::LargeObjectData] {
        assert_eq!(rows(&founders, lease, what).await.len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_that_the_role_may_not_read_are_refused_before_their_rows() {
    let setup = format!(
        "{OBJECTS}; CREATE ROLE reader LOGIN; CREATE ROLE owner; GRANT pg_read_all_data, owner TO reader;
         GRANT SELECT ON LARGE OBJECT 5001 TO PUBLIC"
    );
    let fleet = Fleet::start(false, &setup).await;
    let refusal = "the role of the node may not read the large objects of database \"shop\"";
    for (step, may_read) in [
        ("SELECT", false),
        ("ALTER LARGE OBJECT 5002 OWNER TO owner", true),
        ("ALTER LARGE OBJECT 5002 OWNER TO root", false),
        ("ALTER ROLE reader SET lo_compat_privileges = on", true),
    ] {
        fleet.in_database("shop", step).await;
        let (founders, lease) = (Founders::new(fleet.primary.server("reader").unwrap()), Uuid::new_v4());
        if may_read {
            opened(&founders, open(lease, 1)).await;
            assert_eq!(rows(&founders, lease, What::LargeObjectData).await.len(), 2, "{step}");
            continue;
        }
        // Nothing is begun that could not come to its end.
        let look = |to_read| Request::Look { databases: vec!["shop".to_owned()], to_read };
        for asked in [Request::Open(open(lease, 1)), look(true)] {
            assert_eq!(refused(&founders, &asked).await.message, refusal, "{step}");
        }
        // What there is may be shown all the same.
        assert!(call(&founders, &look(false)).await.is_ok());
    }
    // A right that is lost after the point.
    fleet
        .in_database("shop", "ALTER ROLE reader RESET lo_compat_privileges; ALTER LARGE OBJECT 5002 OWNER TO owner")
        .await;
    let (founders, lease) = (Founders::new(fleet.primary.server("reader").unwrap()), Uuid::new_v4());
    opened(&founders, open(lease, 1)).await;
    fleet.in_database("shop", "REVOKE owner FROM reader").await;
    assert_eq!(refused(&founders, &span(lease, What::LargeObjectData)).await.message, refusal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_is_dropped_while_it_is_read_is_left_out() {
    let fleet = Fleet::start(false, "CREATE SEQUENCE kept; CREATE SEQUENCE passing").await;
    let (founders, lease) = (Founders::new(fleet.primary()), Uuid::new_v4());
    let opened = opened(&founders, open(lease, 1)).await;
    assert_eq!(names(&opened.databases[0].sequences, |one| one.name.clone()), ["kept", "passing"]);
    fleet.in_database("shop", "CREATE SEQUENCE later; SELECT setval('kept', 7)").await;
    // One that is no part of the plan does not matter, and is not waited for.
    let (other, _connection) = fleet.primary().session_in("shop").await.unwrap();
    other.batch_execute("BEGIN; DROP SEQUENCE later").await.unwrap();
    let (dropper, _connection) = fleet.primary().session_in("shop").await.unwrap();
    dropper.batch_execute("BEGIN; DROP SEQUENCE passing").await.unwrap();
    let reading = tokio::spawn(async move {
        let request = Request::Sequences { lease, database: "shop".to_owned() };
        call(&founders, &request).await
    });
    // The other one is listed still, and waited for.
    until(&fleet.primary(), "SELECT count(*) FROM pg_locks WHERE NOT granted", "1").await;
    dropper.batch_execute("COMMIT").await.unwrap();
    let Ok(Reply::Answer(left)) = timeout(DEADLINE, reading).await.unwrap().unwrap() else { panic!("refused") };
    let left: Vec<fleet::founders::SequencePlan> = serde_json::from_value(left).unwrap();
    assert_eq!(names(&left, |one| format!("{} {}", one.name, one.last_value)), ["kept 7"]);
}
