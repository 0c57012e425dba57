//! The loader on a real server: what comes out is what went in, once, whoever dies when; and nothing else is touched.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../../../../tests/support/disk.rs"]
mod disk;
mod faults; // late coordinators, lost answers, a full disk; everything side by side
mod place; // a server with a loader, and a backup

use std::time::Duration;

use bytes::Bytes;
use cluster::service::Service as _;
use fleet::loader::{
    Created, JobDatabase, LOADERS_MAX, Load, Loaded, Loader, Progress, RESTORE_ROLE, Request, is_already_loaded,
    needs_schema,
};
use futures_util::FutureExt as _;
use pgerror::SqlState;
use tokio::time::timeout;

use self::place::{Backup, OURS, Place, answer, call, removed, said, send, upload};

const KINDS: &str = r#"
    CREATE ROLE owner; CREATE ROLE granted; CREATE SCHEMA app AUTHORIZATION owner;
    CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
    CREATE TYPE app.kind AS ENUM ('a', 'b');
    CREATE TABLE app.parent (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, k app.kind, "B c" text,
                             twice int GENERATED ALWAYS AS (length("B c") * 2) STORED, CHECK (length("B c") < 9));
    INSERT INTO app.parent (k, "B c") SELECT 'b', E'x\ty\\' || n % 7 FROM generate_series(1, 500) n;
    CREATE TABLE app.child (id serial UNIQUE, parent int REFERENCES app.parent ON DELETE CASCADE, UNIQUE (parent));
    INSERT INTO app.child (parent) SELECT id FROM app.parent WHERE id > 300; SELECT setval('app.child_id_seq', 5000);
    ALTER TABLE app.child OWNER TO owner; GRANT SELECT ON app.child TO granted;
    CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
    CREATE TABLE parted (a int, t text) PARTITION BY HASH (a); CREATE TABLE p0 PARTITION OF parted FOR VALUES
        WITH (MODULUS 2, REMAINDER 0); CREATE TABLE p1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    INSERT INTO parted SELECT n, repeat('é', n) FROM generate_series(1, 50) n; CREATE INDEX ON parted (a);
    CREATE MATERIALIZED VIEW base AS SELECT count(*) AS n FROM app.parent; CREATE VIEW middle AS SELECT n FROM base;
    CREATE MATERIALIZED VIEW aa AS SELECT n + 1 AS n FROM middle; CREATE UNIQUE INDEX ON aa (n);
    CREATE MATERIALIZED VIEW never AS SELECT 1 WITH NO DATA;
    CREATE MATERIALIZED VIEW emptied AS SELECT 5 AS n; CREATE MATERIALIZED VIEW aaa AS SELECT n FROM emptied;
    REFRESH MATERIALIZED VIEW emptied WITH NO DATA;
    ALTER TABLE app.parent ENABLE ROW LEVEL SECURITY; CREATE POLICY mine ON app.parent USING (false);
    CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
    CREATE FUNCTION forbid_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
    CREATE TRIGGER forbid BEFORE INSERT ON app.child FOR EACH ROW EXECUTE FUNCTION forbid_row();
    SELECT lo_from_bytea(4711, decode(repeat('ab', 2621440), 'hex')), lo_create(4712);
    COMMENT ON LARGE OBJECT 4712 IS 'it''s'; ALTER LARGE OBJECT 4711 OWNER TO owner;
    GRANT SELECT ON LARGE OBJECT 4711 TO granted WITH GRANT OPTION;
    CREATE PUBLICATION everything FOR ALL TABLES;
    CREATE SUBSCRIPTION far CONNECTION 'host=/nowhere password=hunter2' PUBLICATION p WITH (connect = false);
    ALTER DATABASE shop SET work_mem = '5MB'; ALTER DATABASE shop SET search_path = "$user", public, "A, b";
    ALTER ROLE granted IN DATABASE shop SET search_path = "A, b", app; ALTER ROLE granted IN DATABASE shop SET work_mem
    = '7MB'; ALTER DATABASE shop SET app.note = 'it''s'; COMMENT ON DATABASE shop IS 'the \ shop''s';
    REVOKE ALL ON DATABASE shop FROM PUBLIC; GRANT CONNECT ON DATABASE shop TO granted WITH GRANT OPTION;
    ALTER DATABASE shop OWNER TO owner; ALTER DATABASE shop CONNECTION LIMIT 17; ALTER DATABASE shop IS_TEMPLATE true;
    CREATE FUNCTION forbid_no() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
    CREATE INDEX "odd
 name" ON app.child (parent DESC); COMMENT ON INDEX app."odd
 name" IS 'odd'; ALTER TABLE app.child CLUSTER ON child_parent_key;
    ALTER TABLE app.child REPLICA IDENTITY USING INDEX child_id_key;
    CREATE VIEW grouped AS SELECT id, k FROM app.parent GROUP BY id;
    CREATE MATERIALIZED VIEW late AS SELECT id, k FROM app.parent GROUP BY id; CREATE UNIQUE INDEX ON late (id);
    CREATE TABLE keyed (a int PRIMARY KEY, r int REFERENCES keyed) PARTITION BY RANGE (a);
    CREATE TABLE keyed1 PARTITION OF keyed FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (a);
    CREATE TABLE keyed11 PARTITION OF keyed1 DEFAULT; CREATE INDEX ON keyed (r); INSERT INTO keyed VALUES (1, 1), (2, 1);
    CREATE TABLE to_keyed (a int REFERENCES keyed); INSERT INTO to_keyed VALUES (2);
    CREATE STATISTICS both_of ON k, "B c" FROM app.parent; CREATE RULE nowhere AS ON DELETE TO nothing DO INSTEAD NOTHING;
    COMMENT ON CONSTRAINT child_parent_fkey ON app.child IS 'fk';
    CREATE EVENT TRIGGER another ON ddl_command_end EXECUTE FUNCTION forbid_no();
    CREATE EVENT TRIGGER forbid ON ddl_command_start EXECUTE FUNCTION forbid(); COMMENT ON EVENT TRIGGER forbid IS 'x';"#;

/// Everything that a schema does not say.
const CONTENT: &str = "
    SELECT format('%s.%s %s', n.nspname, c.relname, query_to_xml(format(
        CASE relkind WHEN 'S' THEN 'SELECT last_value, is_called FROM %I.%I'
                     ELSE 'SELECT t::text FROM ONLY %I.%I t ORDER BY 1' END,
        n.nspname, c.relname), true, true, ''))
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE n.nspname IN ('app', 'public') AND (relkind IN ('r', 'S') OR relkind = 'm' AND relispopulated)
    UNION ALL SELECT format('%s %s %s %s %s', oid, lomowner::regrole, lomacl, md5(lo_get(oid)),
                            obj_description(oid, 'pg_largeobject')) FROM pg_largeobject_metadata ORDER BY 1";

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_out_is_what_went_in() {
    let place = Place::start(KINDS).await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let created: Created = answer(&loader, &backup.create(7, "again")).await.unwrap();
    let oid = created.oid;
    assert_eq!(created.progress, Progress::default());
    // An upload that is dropped leaves nothing.
    let mut dropped = upload(&loader, &Request::PreData { job: 7.into(), database_oid: oid, run: 1 }).await.unwrap();
    dropped.write(backup.schema.slice(..100)).await.unwrap();
    drop(dropped);
    send(&loader, &Request::PreData { job: 7.into(), database_oid: oid, run: 1 }, &backup.schema).await.unwrap();
    let largest = backup.spans.iter().position(|(_, bytes)| !bytes.is_empty()).unwrap();
    let mut dropped = upload(&loader, &backup.load(7, oid, largest)).await.unwrap();
    dropped.write(backup.spans[largest].1.clone()).await.unwrap();
    drop(dropped);
    assert_eq!(backup.load_all(&loader, 7, "again", None).await, oid);
    let error = said(send(&loader, &backup.load(7, oid, 1), &Bytes::new()).await);
    assert!(is_already_loaded(&error), "{error:?}");
    let progress: Progress = answer(&loader, &Request::Progress { job: 7.into() }).await.unwrap();
    assert_eq!(progress, Progress { pre_data: true, spans: (0..backup.spans.len() as u32).collect(), whole: false });

    // The node is started anew.
    let loader = place.loader();
    let error = said(call(&loader, &backup.finish(7, oid, "again")).await);
    assert!(needs_schema(&error), "{error:?}");
    assert_eq!(answer::<_, Created>(&loader, &backup.create(7, "again")).await.unwrap(), Created { oid, progress });
    send(&loader, &Request::PreData { job: 7.into(), database_oid: oid, run: 1 }, &backup.schema).await.unwrap();
    for _ in 0..2 {
        // A session of somebody's own is in the way of the last step.
        let _session = place.server("root").session_in("_backhaul_7").await;
        backup.end(&loader, 7, oid, "again").await.unwrap();
    }
    let dump = place.dump("again").replace("again", "shop");
    assert_eq!(dump, place.dump("shop"));
    assert_eq!(place.ask("again", CONTENT).await, place.ask("shop", CONTENT).await);
    let views = "SELECT relname || relispopulated FROM pg_class WHERE relkind = 'm' ORDER BY relname";
    assert_eq!(
        place.ask("again", views).await,
        ["aatrue", "aaatrue", "basetrue", "emptiedfalse", "latetrue", "neverfalse"]
    );
    let analyzed = "SELECT count(*) FROM pg_stats WHERE tablename = 'child'";
    assert_eq!(place.ask("again", analyzed).await, ["2"]);
    // It is the user's now.
    assert_eq!(said(call(&loader, &backup.create(7, "again")).await).code, SqlState::DUPLICATE_DATABASE);
    removed(&place, 7).await;
    // A repeat, by whoever it is, finds nothing to do.
    backup.end(&place.loader(), 7, oid, "again").await.unwrap();
    assert_eq!(place.ask("postgres", "SELECT oid FROM pg_database WHERE datname = 'again'").await, [oid.to_string()]);
    // What the last section brings is no obstacle to removing a database.
    backup.load_all(&loader, 8, "third", None).await;
    let late = "CREATE SUBSCRIPTION x CONNECTION 'host=/nowhere' PUBLICATION p WITH (connect = false);
                CREATE EVENT TRIGGER forbid ON ddl_command_start EXECUTE FUNCTION forbid()";
    place.run("_backhaul_8", late).await;
    removed(&place, 8).await;
    assert_eq!(place.ask("postgres", OURS).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_databases_of_one_job_do_not_get_into_each_others_way() {
    let place = Place::start(KINDS).await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let [second, third] = [1, 2].map(|nth| JobDatabase { job: 7, nth });
    let one = backup.load_all(&loader, 7, "one", Some(0)).await;
    let mut rows = upload(&loader, &backup.load(7, one, 0)).await.unwrap();
    let two = backup.load_all(&loader, second, "two", None).await;
    rows.write(backup.spans[0].1.clone()).await.unwrap();
    rows.finish().await.unwrap();
    backup.load_all(&loader, third, "three", None).await;
    removed(&place, third).await;
    let names = "SELECT datname FROM pg_database WHERE datname ~ '^_backhaul' ORDER BY 1";
    assert_eq!(place.ask("postgres", names).await, ["_backhaul_7", "_backhaul_7_1"]);
    backup.end(&loader, second, two, "two").await.unwrap();
    backup.end(&loader, 7, one, "one").await.unwrap();
    for name in ["one", "two"] {
        assert_eq!(place.ask(name, CONTENT).await, place.ask("shop", CONTENT).await, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_made_where_something_is_missing_or_in_the_way() {
    let place = Place::start("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let error = said(call(&Loader::new(place.server("nobody")), &backup.create(7, "new")).await);
    assert_eq!(
        (error.code, error.message.as_str()),
        (SqlState::INSUFFICIENT_PRIVILEGE, "the role of the node may not restore databases")
    );
    assert!(error.hint.unwrap().ends_with("GRANT backhaul_restore TO \"nobody\"."));
    let mut plan = backup.plan.clone();
    plan.owner = "ghost".to_owned();
    plan.roles.push("spirit".to_owned());
    plan.role_settings.push(("wraith".to_owned(), "work_mem=7MB".to_owned()));
    plan.tablespaces.push("fast".to_owned());
    plan.extensions.push(("levitation".to_owned(), "1.1".to_owned()));
    let lacking = Backup { plan, schema: Bytes::new(), spans: Vec::new() };
    let error = said(call(&loader, &lacking.create(7, "new")).await);
    let expected = "Missing: role \"ghost\", role \"spirit\", role \"wraith\", tablespace \"fast\", extension \"levitation\" (1.1).";
    assert_eq!((error.code, error.detail.as_deref()), (SqlState::UNDEFINED_OBJECT, Some(expected)));
    let error = said(call(&loader, &backup.create(7, "shop")).await);
    assert_eq!(
        (error.code, error.message.as_str()),
        (SqlState::DUPLICATE_DATABASE, "database \"shop\" already exists")
    );
    assert_eq!(place.ask("postgres", OURS).await, [""; 0]);

    // A database of the same name that is somebody else's, though one that looks like ours.
    place.run("postgres", "CREATE DATABASE _backhaul_7").await;
    for owner in ["root", RESTORE_ROLE] {
        place.run("postgres", &format!("ALTER DATABASE _backhaul_7 OWNER TO {owner}")).await;
        place.run("_backhaul_7", "CREATE TABLE IF NOT EXISTS kept ()").await;
        assert_eq!(said(call(&loader, &backup.create(7, "new")).await).code, SqlState::DUPLICATE_DATABASE);
        removed(&place, 7).await;
        let oid = place.ask("postgres", "SELECT oid FROM pg_database WHERE datname = '_backhaul_7'").await[0]
            .parse()
            .unwrap();
        assert_eq!(said(call(&loader, &backup.load(7, oid, 0)).await).code, SqlState::UNDEFINED_DATABASE);
        assert_eq!(said(call(&loader, &backup.finish(7, oid, "new")).await).code, SqlState::UNDEFINED_DATABASE);
        assert_eq!(place.ask("_backhaul_7", "SELECT count(*) FROM kept").await, ["0"]);
    }
    // One that was made and not marked yet is removed, or made anew.
    place.run("_backhaul_7", "DROP TABLE kept").await;
    removed(&place, 7).await;
    assert_eq!(place.ask("postgres", OURS).await, [""; 0]);
    // The mark alone makes it nobody's, whichever run it names.
    place.run("postgres", "CREATE DATABASE _backhaul_7 OWNER nobody").await;
    place.run("postgres", "COMMENT ON DATABASE _backhaul_7 IS 'backhaul restore of job 7, run 9'").await;
    assert_eq!(said(call(&loader, &backup.create(7, "new")).await).code, SqlState::DUPLICATE_DATABASE);
    removed(&place, 7).await;
    place.run("postgres", "COMMENT ON DATABASE _backhaul_7 IS NULL").await;
    place.run("postgres", &format!("ALTER DATABASE _backhaul_7 OWNER TO {RESTORE_ROLE}")).await;
    let oid = backup.load_all(&loader, 7, "new", None).await;
    let publish = || Request::Publish(backup.publish(1, 7, oid, "new"));
    assert_eq!(said(call(&loader, &publish()).await).message, "the database of restore job 7 is not whole");
    // The name is taken meanwhile, and free again.
    place.run("postgres", "CREATE DATABASE new").await;
    answer::<_, ()>(&loader, &backup.finish(7, oid, "new")).await.unwrap();
    let release = Request::Release(backup.publish(1, 7, oid, "new"));
    assert_eq!(said(call(&loader, &release).await).message, "the database of restore job 7 has no name yet");
    assert_eq!(said(call(&loader, &publish()).await).code, SqlState::DUPLICATE_DATABASE);
    let progress: Progress = answer(&loader, &Request::Progress { job: 7.into() }).await.unwrap();
    assert!(progress.whole);
    place.run("postgres", "DROP DATABASE new").await;
    // Between its name and its user nobody is let in, and it is removed by its mark.
    answer::<_, ()>(&loader, &publish()).await.unwrap();
    assert!(place.server("root").session_in("new").await.is_err());
    removed(&place, 7).await;
    assert_eq!(place.ask("postgres", "SELECT 1 FROM pg_database WHERE datname ~ '^(_backhaul|new)'").await, [""; 0]);
    let oid = backup.load_all(&loader, 9, "new", None).await;
    backup.end(&loader, 9, oid, "new").await.unwrap();
    assert_eq!(place.ask("new", "SELECT a FROM t").await, ["1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_refused_at_the_end_is_refused_before_anybody_sees_the_name() {
    let place = Place::start("CREATE TABLE t (a int)").await;
    let (mut ghostly, loader) = (Backup::of(&place).await, place.loader());
    let oid = ghostly.load_all(&loader, 10, "other", None).await;
    answer::<_, ()>(&loader, &ghostly.finish(10, oid, "other")).await.unwrap();
    ghostly.plan.owner = "ghost".to_owned();
    let error = said(call(&loader, &Request::Publish(ghostly.publish(1, 10, oid, "other"))).await);
    assert_eq!(error.message, "role \"ghost\" does not exist");
    assert_eq!(place.ask("postgres", "SELECT 1 FROM pg_database WHERE datname = 'other'").await, [""; 0]);
}

const SLOW: &str = "
    CREATE FUNCTION slow(a int) RETURNS int IMMUTABLE PARALLEL UNSAFE LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_catalog.pg_sleep(0.01); RETURN a; END';
    CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 200);
    CREATE TABLE u (a int PRIMARY KEY); INSERT INTO u SELECT generate_series(1, 200);
    ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES u;
    CREATE INDEX a ON u (a); CREATE INDEX b ON t (slow(a)); CREATE INDEX c ON t (a)";

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_died_is_repeated_and_a_wrong_one_is_refused() {
    let place = Place::start(SLOW).await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let index = |name: &str| {
        let is_it =
            |(loaded, _): &(Loaded, Bytes)| matches!(loaded, Loaded::Table { name: found, .. } if found == name);
        backup.spans.iter().position(is_it).unwrap()
    };
    let (t, u) = (index("t"), index("u"));
    let oid = backup.load_all(&loader, 7, "new", Some(t)).await;
    let error = said(call(&loader, &backup.finish(7, oid, "new")).await);
    assert_eq!(
        (error.code, error.message.as_str()),
        (SqlState::DATA_CORRUPTED, "table \"public.t\" has 0 rows instead of 200")
    );
    let error = said(send(&loader, &backup.load(7, oid, t), &Bytes::from_static(b"1\nx\n")).await);
    assert!(error.message.starts_with("cannot load table \"public.t\": invalid input syntax"), "{error:?}");
    // A worker that stopped holds its span; another node is told so, and Finish does not wait for it.
    let mut stopped = upload(&loader, &backup.load(7, oid, t)).await.unwrap();
    stopped.write(backup.spans[t].1.clone()).await.unwrap();
    assert_eq!(said(call(&place.loader(), &backup.load(7, oid, t)).await).code, SqlState::LOCK_NOT_AVAILABLE);
    assert_eq!(said(call(&loader, &backup.finish(7, oid, "new")).await).code, SqlState::DATA_CORRUPTED);
    assert!(stopped.finish().await.is_err());
    send(&loader, &backup.load(7, oid, t), &backup.spans[t].1).await.unwrap();
    // The session of pg_restore is ended within the index that takes 2 seconds.
    let finish = backup.finish(7, oid, "new");
    let ending = async {
        let query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE application_name LIKE 'backhaul post-data%' AND query ~ '^CREATE INDEX b'";
        while place.ask("postgres", query).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (finished, ()) =
        tokio::join!(call(&loader, &finish), timeout(Duration::from_secs(30), ending).map(Result::unwrap));
    let error = said(finished);
    assert_eq!(
        (error.code, error.message.as_str()),
        (SqlState::CONNECTION_FAILURE, "pg_restore for restore job 7 failed")
    );
    // Whoever finishes it dies within the index that takes 2 seconds, and leaves the session of pg_restore behind.
    let finish = serde_json::to_value(backup.finish(7, oid, "new")).unwrap();
    assert!(timeout(Duration::from_millis(1500), loader.call(finish)).await.is_err());
    let error = said(
        call(
            &loader,
            &Request::Load(Load {
                job: 7.into(),
                database_oid: oid,
                run: 1,
                span: 99,
                what: backup.spans[u].0.clone(),
                encoding: String::new(),
            }),
        )
        .await,
    );
    assert_eq!(error.message, "restore job 7 does not take rows any more");
    backup.end(&loader, 7, oid, "new").await.unwrap();
    assert_eq!(place.dump("new").replace("new", "shop"), place.dump("shop"));
    assert_eq!(place.ask("new", CONTENT).await, place.ask("shop", CONTENT).await);

    // Rows that do not fit together: pg_restore says which, and what was made can be removed.
    let mut wrong = backup;
    wrong.spans[u].1 = Bytes::from_static(b"1\n");
    let oid = wrong.load_all(&loader, 8, "other", None).await;
    let error = said(call(&loader, &wrong.finish(8, oid, "other")).await);
    assert_eq!(error.message, "pg_restore for restore job 8 failed");
    assert!(error.detail.unwrap().contains("violates foreign key constraint"));
    assert_eq!(place.ask("_backhaul_8", "SELECT count(*) FROM pg_constraint WHERE contype = 'f'").await, ["0"]);
    removed(&place, 8).await;
    assert_eq!(said(call(&loader, &Request::Progress { job: 8.into() }).await).code, SqlState::UNDEFINED_DATABASE);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_later_takes_a_span_over() {
    let place = Place::start("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 5000)").await;
    let (backup, loader) = (Backup::of(&place).await, place.loader());
    let oid = backup.load_all(&loader, 7, "new", Some(0)).await;
    let begun = std::time::Instant::now();
    // More of them than there may be sessions: each gives its place to the next one.
    let mut stopped = Vec::new();
    for _ in 0..LOADERS_MAX + 2 {
        let mut one = upload(&loader, &backup.load(7, oid, 0)).await.unwrap();
        one.write(backup.spans[0].1.slice(..4000)).await.unwrap();
        stopped.push(one);
    }
    send(&loader, &backup.load(7, oid, 0), &backup.spans[0].1).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    for one in stopped {
        let error = said(one.finish().await);
        assert_eq!(error.code, SqlState::LOCK_NOT_AVAILABLE, "{error:?}");
    }
    let error = said(call(&loader, &backup.load(7, oid, 0)).await);
    assert!(is_already_loaded(&error), "{error:?}");
    backup.end(&loader, 7, oid, "new").await.unwrap();
    assert_eq!(place.ask("new", "SELECT count(*) FROM t").await, ["5000"]);
}
