//! What comes too late, is not answered, or finds no room; and everything built side by side.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use cluster::service::Service as _;
use fleet::loader::{Created, Request, is_already_loaded, is_superseded};
use pgerror::{PgError, SqlState};
use tokio::time::timeout;

use crate::disk::Disk;
use crate::place::{Backup, OURS, Place, answer, call, give, removed, said, send, upload};
use crate::{CONTENT, KINDS, SLOW};

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_built_side_by_side_and_once() {
    let place = Place::start(KINDS).await;
    let (mut backup, loader) = (Backup::of(&place).await, place.loader());
    // As if every table were a large one: each index, key and foreign key is a transaction of its own.
    backup.plan.tables.iter_mut().for_each(|table| table.bytes = 1 << 30);
    let oid = backup.load_all(&loader, 7, "again", None).await;
    // Died many times, each time a little later, with what it had begun still at work.
    for step in 0..12 {
        let finish = serde_json::to_value(backup.finish(7, oid, "again")).unwrap();
        if timeout(Duration::from_millis(150 + step * 60), loader.call(finish)).await.is_ok() {
            break;
        }
    }
    backup.end(&loader, 7, oid, "again").await.unwrap();
    assert_eq!(place.dump("again").replace("again", "shop"), place.dump("shop"));
    assert_eq!(place.ask("again", CONTENT).await, place.ask("shop", CONTENT).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_comes_too_late_is_refused() {
    let place = Place::start(SLOW).await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let oid = backup.load_all(&loader, 7, "new", Some(0)).await;
    // Its session in the middle of a span ends by itself, when somebody newer sends the same.
    let mut stopped = upload(&loader, &backup.load(7, oid, 0)).await.unwrap();
    answer::<_, Created>(&loader, &backup.create_by(2, 7, "new")).await.unwrap();
    send(&loader, &backup.load_by(2, 7, oid, 0), &backup.spans[0].1).await.unwrap();
    let _ = stopped.write(backup.spans[0].1.clone()).await;
    assert!(stopped.finish().await.is_err());
    let late = |run: i64| {
        [
            backup.create_by(run, 7, "new"),
            Request::PreData { job: 7.into(), database_oid: oid, run },
            backup.load_by(run, 7, oid, 1),
            backup.finish_by(run, 7, oid, "new"),
            Request::Publish(backup.publish(run, 7, oid, "new")),
            Request::Release(backup.publish(run, 7, oid, "new")),
        ]
    };
    // Also by a node that was started anew: the database itself remembers.
    for loader in [&loader, &place.loader()] {
        for request in late(1).into_iter().chain([Request::Drop { job: 7.into(), run: 1 }]) {
            let error = said(call(loader, &request).await);
            assert!(is_superseded(&error), "{request:?}: {error:?}");
        }
        assert_eq!(place.ask("postgres", OURS).await, ["1"]);
    }
    // Whoever is at work when a newer one comes ends; what it has made is taken up.
    send(&loader, &Request::PreData { job: 7.into(), database_oid: oid, run: 2 }, &backup.schema).await.unwrap();
    let newer = async {
        let building = "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'backhaul post-data%'";
        while place.ask("postgres", building).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        answer::<_, ()>(&loader, &backup.finish_by(3, 7, oid, "new")).await
    };
    let older = backup.finish_by(2, 7, oid, "new");
    let (older, newer) = tokio::join!(call(&loader, &older), newer);
    assert!(is_superseded(&said(older)));
    newer.unwrap();
    answer::<_, ()>(&loader, &Request::Publish(backup.publish(3, 7, oid, "new"))).await.unwrap();
    for request in [Request::Release(backup.publish(2, 7, oid, "new")), Request::Drop { job: 7.into(), run: 2 }] {
        let error = said(call(&place.loader(), &request).await);
        assert!(is_superseded(&error), "{request:?}: {error:?}");
    }
    answer::<_, ()>(&loader, &Request::Drop { job: 7.into(), run: 4 }).await.unwrap();
    assert_eq!(place.ask("postgres", "SELECT 1 FROM pg_database WHERE datname ~ '^(_backhaul|new)'").await, [""; 0]);
    let error = said(call(&loader, &backup.create_by(4, 7, "new")).await);
    assert!(is_superseded(&error), "{error:?}");
    assert_eq!(place.ask("postgres", OURS).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_whose_commit_was_not_answered_is_there_once() {
    let place = Place::start("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 5000)").await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let oid = backup.load_all(&loader, 7, "new", Some(0)).await;
    let set = async |value: &str| {
        place.run("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{value}'")).await;
        place.run("postgres", "ALTER SYSTEM SET synchronous_commit = on").await;
        place.run("postgres", "SELECT pg_reload_conf()").await;
        while place.ask("postgres", "SHOW synchronous_standby_names").await != [value] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // The commit is durable, and its answer waits for a standby that never comes.
    set("ghost").await;
    let mut rows = upload(&loader, &backup.load(7, oid, 0)).await.unwrap();
    rows.write(backup.spans[0].1.clone()).await.unwrap();
    let committing = tokio::spawn(rows.finish());
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    while place.ask("postgres", end).await.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let error = said(timeout(Duration::from_secs(30), committing).await.unwrap().unwrap());
    assert!([SqlState::CONNECTION_FAILURE, SqlState::ADMIN_SHUTDOWN].contains(&error.code), "{error:?}");
    set("").await;
    let error = said(send(&loader, &backup.load(7, oid, 0), &backup.spans[0].1).await);
    assert!(is_already_loaded(&error), "{error:?}");
    backup.end(&loader, 7, oid, "new").await.unwrap();
    assert_eq!(place.ask("new", "SELECT count(*) FROM t").await, ["5000"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_has_no_connection_left_says_so_and_may_be_asked_again() {
    let place = Place::start("CREATE TABLE t (i int)").await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let created: Created = answer(&loader, &backup.create(7, "new")).await.unwrap();
    place.run("postgres", "ALTER ROLE svc CONNECTION LIMIT 0").await;
    for request in [
        backup.create(8, "other"),
        Request::Publish(backup.publish(1, 7, created.oid, "new")),
        Request::Release(backup.publish(1, 7, created.oid, "new")),
        Request::Drop { job: 7.into(), run: 1 },
    ] {
        let error = said(call(&loader, &request).await);
        assert_eq!(error.code, SqlState::TOO_MANY_CONNECTIONS, "{request:?}: {error:?}");
    }
    place.run("postgres", "ALTER ROLE svc CONNECTION LIMIT -1").await;
    answer::<_, ()>(&loader, &Request::Drop { job: 7.into(), run: 1 }).await.unwrap();
    assert_eq!(place.ask("postgres", OURS).await, [""; 0]);
}

/// Its node, which was beside the leader a moment ago, is asked still.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_says_that_it_takes_no_writes() {
    let mut place = Place::start("CREATE TABLE t (i int)").await;
    let backup = Backup::of(&place).await;
    place.become_standby().await;
    let loader = place.loader();
    for request in [backup.create(7, "new"), Request::Drop { job: 7.into(), run: 1 }] {
        let error = said(call(&loader, &request).await);
        assert_eq!(error.code, SqlState::READ_ONLY_SQL_TRANSACTION, "{request:?}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_keeps_what_it_was_made_with() {
    let place = Place::start("").await;
    let directory = place.dir.path().join("fast");
    give(&directory);
    place.run("postgres", &format!("CREATE TABLESPACE fast LOCATION '{}'", directory.display())).await;
    for (job, made, text) in [
        (7, "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TABLESPACE fast CONNECTION LIMIT 5", "é"),
        (8, "ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'de-DE-u-ks-level1' LC_COLLATE 'C' LC_CTYPE 'C'", "ß語"),
        (9, "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' IS_TEMPLATE true", "é"),
    ] {
        place.run("postgres", "DROP DATABASE IF EXISTS shop").await;
        place.run("postgres", &format!("CREATE DATABASE shop TEMPLATE template0 {made}")).await;
        place
            .run(
                "shop",
                &format!("CREATE TABLE t AS SELECT '{text}'::text AS a, 'x'::text AS b; CREATE INDEX ON t (a)"),
            )
            .await;
        let (backup, loader) = (Backup::of(&place).await, place.loader());
        let oid = backup.load_all(&loader, job, "again", None).await;
        backup.end(&loader, job, oid, "again").await.unwrap();
        assert_eq!(place.dump("again").replace("again", "shop"), place.dump("shop"), "{made}");
        assert_eq!(place.ask("again", "TABLE t").await, place.ask("shop", "TABLE t").await, "{made}");
        place.run("postgres", "ALTER DATABASE shop IS_TEMPLATE false").await;
        place.run("postgres", "ALTER DATABASE again IS_TEMPLATE false").await;
        place.run("postgres", "DROP DATABASE again").await;
    }
    // It is in no backup that was made by connecting, but a plan may say it.
    let (mut backup, loader) = (Backup::of(&place).await, place.loader());
    (backup.plan.allows_connections, backup.plan.tablespace) = (false, None);
    let oid = backup.load_all(&loader, 10, "closed", None).await;
    backup.end(&loader, 10, oid, "closed").await.unwrap();
    assert_eq!(place.ask("postgres", "SELECT datallowconn FROM pg_database WHERE datname = 'closed'").await, ["f"]);
}

/// A server has its own encoding and locale; the databases on it need not have them.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_otherwise_takes_a_database_as_it_is() {
    let setup = "CREATE TABLE t AS SELECT 'ß語é'::text AS \"語\"; CREATE INDEX ON t (\"語\"); CREATE VIEW \"größer\" AS TABLE t;
                 ALTER DATABASE shop SET app.note = 'x'; COMMENT ON DATABASE shop IS 'larger'";
    let (source, target) = (Place::start(setup).await, Place::speaking("LATIN1", "C", "").await);
    let (mut backup, loader) = (Backup::of(&source).await, target.loader());
    let oid = backup.load_all(&loader, 7, "again", None).await;
    backup.end(&loader, 7, oid, "again").await.unwrap();
    assert_eq!(target.dump("again").replace("again", "shop"), source.dump("shop"));
    assert_eq!(target.ask("again", "TABLE t").await, ["ß語é"]);
    let own = "SELECT format('%s %s %s', pg_encoding_to_char(encoding), datcollate, datctype) FROM pg_database
               WHERE datname = current_database()";
    assert_eq!(target.ask("again", own).await, ["UTF8 C.UTF-8 C.UTF-8"]);
    assert_eq!(target.ask("postgres", own).await, ["LATIN1 C C"]);

    // A comment is kept in what all databases share, which does not know this sign: said before anybody has the name.
    backup.plan.comment = Some("語".to_owned());
    let oid = backup.load_all(&loader, 8, "other", None).await;
    answer::<_, ()>(&loader, &backup.finish(8, oid, "other")).await.unwrap();
    let error = said(call(&loader, &Request::Publish(backup.publish(1, 8, oid, "other"))).await);
    assert_eq!(error.code.as_str(), "22P05", "{error:?}");
    assert!(error.message.contains("has no equivalent in encoding \"LATIN1\""), "{error:?}");
    removed(&target, 8).await;

    backup.plan.comment = None;
    (backup.plan.collate, backup.plan.ctype) = ("xx_YY.UTF-8".to_owned(), "xx_YY.UTF-8".to_owned());
    let error = said(call(&loader, &backup.create(9, "other")).await);
    assert!(error.message.contains("locale name: \"xx_YY.UTF-8\""), "{error:?}");
    assert_eq!(target.ask("postgres", OURS).await, [""; 0]);
    assert_eq!(target.ask("postgres", "SELECT 1 FROM pg_database WHERE datname = 'other'").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_wherever_it_is_met() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let mounted = dir.path().join("disk");
    std::fs::create_dir(&mounted).unwrap();
    let Some(disk) = Disk::mount(&mounted) else {
        eprintln!("no disk can be mounted here: how a full one is told stays untested");
        return;
    };
    let data =
        "CREATE TABLE t (a int, b text); INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 20000) i;
                CREATE INDEX ON t (a); CREATE INDEX ON t (b)";
    let place = Place::start(data).await;
    let directory = mounted.join("space");
    give(&directory);
    place.run("postgres", &format!("CREATE TABLESPACE small LOCATION '{}'", directory.display())).await;
    let (mut backup, loader) = (Backup::of(&place).await, place.loader());
    backup.plan.tablespace = Some("small".to_owned());
    let table = backup.spans.iter().position(|(_, bytes)| !bytes.is_empty()).unwrap();
    let assert_full = |error: PgError, job: i64| {
        let message = format!("on server {} for database \"_backhaul_{job}\"", place.server("svc").address());
        assert!(error.code == SqlState::DISK_FULL && error.message.ends_with(&message), "{error:?}");
    };
    disk.fill();
    assert_full(said(call(&loader, &backup.create(7, "new")).await), 7);
    removed(&place, 7).await;
    disk.free();
    let oid = backup.load_all(&loader, 8, "new", Some(table)).await;
    disk.fill();
    assert_full(said(send(&loader, &backup.load(8, oid, table), &backup.spans[table].1).await), 8);
    disk.free();
    send(&loader, &backup.load(8, oid, table), &backup.spans[table].1).await.unwrap();
    disk.fill();
    assert_full(said(call(&loader, &backup.finish(8, oid, "new")).await), 8);
    removed(&place, 8).await;
    assert_eq!(place.ask("postgres", OURS).await, [""; 0]);
}
