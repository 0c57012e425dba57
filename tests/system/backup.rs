//! What BACKUP promises: where it runs, what clients are told, and what is in it.

use std::collections::BTreeSet;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::restore::assert_sequences_not_behind;
use crate::support::demo::{Demo, directory, psql};
use crate::support::faults::Fleet;
use crate::support::fleet::Server;
use crate::support::jobs::{WEST, completed, data_files, detached, extern_dirs, relocated, succeeded};
use crate::support::store::{LocalBackup, S3, Watched, files_in};
use crate::support::{both, postgres_program, run, until};

/// G13
#[test]
fn a_detached_backup_runs_in_the_chosen_region_only() {
    let demo = Demo::start(&[]);
    let job = detached(&demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}, DETACHED"));
    let columns = succeeded(&demo, 2, &job);
    assert!(["3", "4"].contains(&columns[13].as_str()), "{columns:?}");
    let counts: Vec<usize> = (1..=4).map(|number| data_files(&demo, number)).collect();
    assert!(counts[0] == 0 && counts[1] == 0 && counts[2] > 0 && counts[3] > 0, "{counts:?}");

    // The id was told before any span was exported, and the manifest names who has which file.
    let registry = psql(&demo.nodes[0].url.replace("/movr", "/backhaul"))
        .args([
            "-Atc",
            "SELECT bool_and(j.created < i.written) FROM registry.jobs j JOIN registry.job_info i ON i.job_id = j.id",
        ])
        .output()
        .unwrap();
    assert_eq!(both(&registry).trim(), "t");
    let backup = LocalBackup::newest(&extern_dirs(&demo), "b");
    let shard = &backup.manifest["shards"][0];
    assert_eq!((&shard["read_from"], &shard["point"]["mode"]), (&3.into(), &"Paused".into()));
    for file in shard["files"].as_array().unwrap() {
        let node = file["node"].as_u64().unwrap() as usize;
        let path = file["path"].as_str().unwrap();
        let name = path.rsplit('/').next().unwrap();
        let held = files_in(&demo.node_dir(node).join("extern"));
        assert!(held.iter().any(|file| file.file_name().unwrap() == name), "{path} is not on node {node}");
    }
    assert_eq!(backup.rows("rides").len(), 1000);
    // Nothing is left behind on the server that was read.
    until("the founders to be gone", || {
        let left = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        let seen =
            both(&demo.psql_direct(3).args(["-Atc", left, "-c", "SELECT pg_is_wal_replay_paused()"]).output().unwrap());
        if seen.trim() == "0\nf" { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn an_attached_client_is_told_of_the_relocation() {
    let demo = Demo::start(&[]);
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}");
    let told = demo.ask(1, &statement);
    let (job, to) = relocated(&told);
    assert!(matches!(to, "3" | "4"), "{told}");
    assert!(told.contains("DETAIL:  The job goes on there"), "{told}");
    assert!(told.contains(&format!("HINT:  Use SHOW JOB WHEN COMPLETE {job}")) && told.contains("DETACHED"), "{told}");
    succeeded(&demo, 1, job);

    // On a node that matches: the row.
    let row = demo.ask(3, &statement);
    let columns: Vec<&str> = row.split('|').collect();
    // What is not in it is said to whoever waits, and stands in the job.
    let left_out = "table public.sessions_cache of database movr is left out: it is unlogged";
    assert!(row.contains(&format!("NOTICE:  00000: {left_out}")), "{row}");
    let registry = demo.nodes[0].url.replace("/movr", "/backhaul");
    let kept = format!("SELECT result -> 'left_out' ->> 0 FROM registry.jobs WHERE id IN ({job}, {})", columns[0]);
    let kept = run(psql(&registry).args(["-v", "ON_ERROR_STOP=1", "-Atc", &kept]));
    assert!(kept.lines().count() == 2 && kept.lines().all(|line| line.starts_with(left_out)), "{kept}");
    assert_eq!(columns[1..3], ["succeeded", "1.0"], "{row}");
    // G14
    assert_eq!(succeeded(&demo, 2, columns[0])[13], "3");
    let manifest = LocalBackup::newest(&extern_dirs(&demo), "b").manifest;
    assert_eq!(manifest["job"].to_string(), columns[0]);
    let files: Vec<_> = manifest["shards"][0]["files"].as_array().unwrap().iter().collect();
    let rows: u64 = files.iter().map(|file| file["rows"].as_u64().unwrap()).sum();
    assert_eq!((columns[3].parse(), columns[4]), (Ok(rows), "0"), "{row}");
    // No filter: everybody matches, and the leaseholder's node exports what its server holds.
    let row = demo.ask(4, "BACKUP DATABASE movr INTO 'nodelocal://self/all' WITH EXECUTION LOCALITY = ''");
    assert_eq!(row.split('|').nth(1), Some("succeeded"), "{row}");
    let manifest = LocalBackup::newest(&extern_dirs(&demo), "all").manifest;
    let files = manifest["shards"][0]["files"].as_array().unwrap().clone();
    assert!(files.iter().all(|file| file["written_by"] == 1), "{files:?}");
    assert_eq!(manifest["shards"][0]["point"]["mode"], "Exported");
}

#[test]
fn only_matching_nodes_reach_an_s3_store_and_its_keys_stay_secret() {
    let demo = Demo::start(&[]);
    let (s3, secret) = (S3::start(), "TheSecretKeyThatNobodyMayRead");
    let door = s3.watched();
    let uri = format!(
        "s3://bucket/fleet?AWS_ACCESS_KEY_ID=key&AWS_SECRET_ACCESS_KEY={secret}&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
        door.address
    );
    let job = detached(&demo, 1, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}, DETACHED"));
    let shown = succeeded(&demo, 1, &job).join("|");
    whoever_is_asked_looks_into_the_store(&demo, &s3, &|address: &str| uri.replace(&door.address, address));
    let pids = [3, 4].map(|number: usize| demo.nodes[number - 1].pid);
    assert_eq!(door.visitors().into_iter().collect::<Vec<_>>(), pids, "who came to the store");
    let seals = s3.keys("BACKUP_MANIFEST");
    assert_eq!(seals.len(), 2, "{seals:?}");
    // The same nodes read it back, and remove what a canceled job has written.
    let restore = format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'again', {WEST}, DETACHED");
    succeeded(&demo, 1, &detached(&demo, 1, &restore));
    let point = "backup.after_first_span";
    let canceled = format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}, DETACHED");
    let set = format!("SET backhaul.debug_pausepoints = '{point}'");
    let canceled = run(demo.psql(1).args(["-v", "ON_ERROR_STOP=1", "-Atqc", &set, "-c", &canceled]));
    let is = |status: &str| {
        until(status, || {
            let row = demo.ask(2, &format!("SHOW JOB {canceled}"));
            if row.split('|').nth(5) == Some(status) { Ok(()) } else { Err(row) }
        })
    };
    is("paused");
    assert!(!s3.keys(&format!("data/{}-", canceled.trim())).is_empty());
    demo.ask(1, &format!("CANCEL JOB {canceled}"));
    is("canceled");
    assert_eq!(
        (s3.keys(&format!("data/{}-", canceled.trim())), s3.keys("BACKUP_MANIFEST")),
        (Vec::new(), seals.clone())
    );
    assert_eq!(door.visitors().into_iter().collect::<Vec<_>>(), pids, "who came to restore and to remove");
    let latest = s3.keys("metadata/latest/LATEST-");
    assert!(seals[0].contains(&*s3.object(&latest[0])), "{latest:?} {seals:?}");

    // By its name, the same store; CREATE says who reaches it, and fails where nobody does.
    for (name, refused, told) in [
        ("nobody", &[1, 2, 3, 4][..], "ERROR:  42501: the store at s3://bucket/fleet"),
        (
            "half",
            &[2, 3],
            "NOTICE:  00000: the store is reached by nodes 1, 4\nDETAIL:  It is not reached by nodes 2, 3.",
        ),
        ("west", &[], "NOTICE:  00000: the store is reached by nodes 1, 2, 3, 4"),
    ] {
        let before = s3.watched();
        before.refuse(refused.iter().map(|number: &usize| demo.nodes[number - 1].pid));
        let at = if refused.is_empty() { uri.clone() } else { uri.replace(&door.address, &before.address) };
        let made = demo.ask(2, &format!("CREATE EXTERNAL CONNECTION {name} AS '{at}'"));
        assert!(made.contains(told), "{made}");
        assert_eq!(demo.ask(3, "SHOW EXTERNAL CONNECTIONS").contains(name), !told.starts_with("ERROR"), "{name}");
    }
    let named = detached(&demo, 1, &format!("BACKUP DATABASE movr INTO 'external://west/sub' WITH {WEST}, DETACHED"));
    succeeded(&demo, 1, &named);
    assert_eq!(s3.keys("fleet/sub/").iter().filter(|key| key.ends_with("BACKUP_MANIFEST")).count(), 1);

    let connections = demo.ask(3, "SHOW EXTERNAL CONNECTIONS");
    let dump = run(postgres_program("pg_dump").arg(demo.nodes[0].url.replace("/movr", "/backhaul")));
    let manifest = s3.object(&seals[0]);
    let logs = (1..=4).map(|n| (n, "node.log")).chain((1..=3).map(|n| (n, "server.log")));
    let logs: String = logs.map(|(n, name)| std::fs::read_to_string(demo.node_dir(n).join(name)).unwrap()).collect();
    assert!(connections.contains("AWS_SECRET_ACCESS_KEY=redacted"), "{connections}");
    for (place, text) in
        [("SHOW JOB", &shown), ("SHOW", &connections), ("registry", &dump), ("manifest", &manifest), ("logs", &logs)]
    {
        assert!(!text.contains(secret), "the secret is in the {place}");
    }
}

/// Statements without a filter: no other node comes to a store that the gateway reaches and is let into.
fn whoever_is_asked_looks_into_the_store(demo: &Demo, s3: &S3, through: &dyn Fn(&str) -> String) {
    for number in [2, 4] {
        let door = s3.watched();
        let uri = through(&door.address);
        assert_eq!(demo.ask(number, &format!("SHOW BACKUPS IN '{uri}'")).lines().count(), 1);
        let shown = demo.ask(number, &format!("SHOW BACKUP FROM LATEST IN '{uri}'"));
        assert!(shown.contains("rides") && !shown.contains("ERROR"), "{shown}");
        assert_eq!(door.visitors().into_iter().collect::<Vec<_>>(), [demo.nodes[number - 1].pid], "node {number}");
    }
    // Rights may be each node's own: where the gateway is refused, the next one is asked.
    let door = s3.watched();
    let pids: BTreeSet<i32> = demo.nodes.iter().map(|node| node.pid).collect();
    let [first, gateway] = [1, 2].map(|number: usize| demo.nodes[number - 1].pid);
    let list = |door: &Watched| demo.ask(2, &format!("SHOW BACKUPS IN '{}'", through(&door.address)));
    door.refuse([gateway]);
    let listed = list(&door);
    assert!(listed.lines().count() == 1 && listed.starts_with("/20"), "{listed}");
    assert_eq!(door.visitors(), BTreeSet::from([first, gateway]));
    // So it is with a restore: what it has to know is read by way of that one, and the leaseholder's node loads the rows.
    let restore = |door: &Watched| {
        let uri = through(&door.address);
        demo.ask(2, &format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'elsewhere'"))
    };
    let door = s3.watched();
    door.refuse([gateway]);
    let restored = restore(&door);
    assert!(restored.contains("|succeeded|1.0|"), "{restored}");
    assert_eq!(door.visitors(), BTreeSet::from([first, gateway]));
    let rides = demo.nodes[1].url.replace("/movr", "/elsewhere");
    let rides = run(psql(&rides).args(["-Atc", "SELECT count(*) FROM rides"]));
    assert_eq!(rides.trim(), "1000");
    demo.ask(2, "DROP DATABASE elsewhere");
    // Whoever runs the job of one that is DETACHED, here the leaseholder's node, the gateway is the first to look.
    for is_refused in [false, true] {
        let door = s3.watched();
        let [leaseholder, gateway] = [1, 4].map(|number: usize| demo.nodes[number - 1].pid);
        door.refuse(Some(gateway).filter(|_| is_refused));
        let uri = through(&door.address);
        let restore = format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'detached', DETACHED");
        assert_eq!(succeeded(demo, 2, &detached(demo, 4, &restore))[13], "1");
        assert_eq!(door.visitors(), BTreeSet::from([leaseholder, gateway]), "refused: {is_refused}");
        demo.ask(2, "DROP DATABASE detached");
    }
    // With a filter nobody else comes to the store, whatever it says to those who may.
    let door = s3.watched();
    let west: BTreeSet<i32> = demo.nodes[2..].iter().map(|node| node.pid).collect();
    door.refuse(west.iter().copied());
    let uri = through(&door.address);
    let told = demo.ask(3, &format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'west', {WEST}"));
    assert!(told.starts_with("ERROR:  42501: the store at s3://bucket/fleet"), "{told}");
    assert!(!door.visitors().is_empty() && door.visitors().is_subset(&west), "{:?}", door.visitors());
    for ask in [&list as &dyn Fn(&Watched) -> String, &restore] {
        let door = s3.watched();
        door.refuse(pids.iter().copied());
        let told = ask(&door);
        assert!(told.starts_with("ERROR:  42501: the store at s3://bucket/fleet"), "{told}");
        assert!(told.contains(" refused access"), "{told}");
        assert_eq!(door.visitors(), pids);
    }
}

#[test]
fn a_filter_that_nobody_matches_makes_no_job() {
    let demo = Demo::start(&["--no-example-database", "--nodes", "2"]);
    for (filter, message) in [
        ("region=mars", "no instances found matching locality filter region=mars"),
        ("abc", "tier must be in the form \"key=value\" not \"abc\""),
        ("a=b,", "tier must be in the form \"key=value\" not \"\""),
        ("=b", "tier must be in the form \"key=value\" not \"=b\""),
        ("a=b=c", "tier must be in the form \"key=value\" not \"a=b=c\""),
    ] {
        for detached in ["", ", DETACHED"] {
            let statement = format!(
                "BACKUP DATABASE postgres INTO 'nodelocal://self/b' WITH EXECUTION LOCALITY = '{filter}'{detached}"
            );
            let told = demo.ask(2, &statement);
            assert!(told.starts_with(&format!("ERROR:  XXUUU: {message}")), "{told}");
        }
    }
    assert_eq!(demo.ask(1, "SHOW JOBS"), "");
}

/// A client that writes until it is dropped: every transaction keeps the sums of two tables equal.
struct Writers {
    bench: Child,
}

impl Writers {
    fn start(demo: &Demo) -> Self {
        let make = "CREATE TABLE debit (id int PRIMARY KEY, amount bigint NOT NULL);
             CREATE TABLE credit (id int PRIMARY KEY, amount bigint NOT NULL);
             INSERT INTO debit SELECT i, 0 FROM generate_series(1, 20000) i;
             INSERT INTO credit SELECT i, 0 FROM generate_series(1, 20000) i";
        run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-c", make]));
        let script = demo.dir.path().join("transfer.sql");
        // More than 64 subtransactions, so that snapshots on standbys overflow.
        std::fs::write(
            &script,
            "\\set d random(1, 20000)\n\\set c random(1, 20000)\nBEGIN;
             UPDATE debit SET amount = amount + 1 WHERE id = :d;
             DO $$ BEGIN FOR i IN 1..70 LOOP BEGIN INSERT INTO promo_codes VALUES (gen_random_uuid()::text);
             EXCEPTION WHEN division_by_zero THEN END; END LOOP; END $$;
             UPDATE credit SET amount = amount + 1 WHERE id = :c;\nEND;\n",
        )
        .unwrap();
        let mut command = postgres_program("pgbench");
        command.args(["-n", "-c", "4", "-T", "120", "-f"]).arg(&script).arg(demo.direct_url(1));
        let bench = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let writers = Self { bench };
        until("the writers to write", || {
            let seen = demo.ask(1, "SELECT sum(amount) > 20 FROM debit");
            if seen == "t" { Ok(()) } else { Err(seen) }
        });
        writers
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        let _ = self.bench.kill();
        let _ = self.bench.wait();
    }
}

#[test]
fn rows_are_those_of_one_point() {
    let demo = Demo::start(&[]);
    let _writers = Writers::start(&demo);
    // The asynchronous standby, the primary, and the synchronous standby, which is never paused.
    let east = |zone: &str| format!("region=us-east-1,zone={zone}");
    for (place, mode) in
        [("region=us-west-1".to_owned(), Some("Paused")), (east("a"), Some("Exported")), (east("b"), None)]
    {
        let path = format!("{mode:?}");
        let statement = format!(
            "BACKUP DATABASE movr INTO 'nodelocal://self/{path}' WITH EXECUTION LOCALITY = '{place}', DETACHED"
        );
        succeeded(&demo, 1, &detached(&demo, 1, &statement));
        let backup = LocalBackup::newest(&extern_dirs(&demo), &path);
        let sum = |table: &str| {
            let rows = backup.rows(table);
            assert_eq!(rows.len(), 20_000, "{table} from {place}");
            rows.iter().map(|row| row.split('\t').nth(1).unwrap().parse::<i64>().unwrap()).sum::<i64>()
        };
        assert_eq!(sum("debit"), sum("credit"), "from {place}");
        assert_eq!(backup.rows("promo_codes").len() as i64, 70 * sum("debit"), "from {place}");
        if let Some(mode) = mode {
            assert_eq!(backup.manifest["shards"][0]["point"]["mode"], mode);
        }
    }
}

#[test]
fn ddl_during_an_export_never_costs_a_row() {
    let demo = Demo::start(&[]);
    run(demo.psql_direct(1).args(["-c", "CREATE TABLE t AS SELECT i AS a, -i AS b FROM generate_series(1, 1000) i"]));
    let done = AtomicBool::new(false);
    /// Ends the changes however the test ends.
    struct Done<'d>(&'d AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    // Whatever happens to it, at every moment t has 1000 rows and a = -b.
    let changes = [
        "BEGIN; CREATE TEMP TABLE k ON COMMIT DROP AS SELECT * FROM t; TRUNCATE t; INSERT INTO t SELECT * FROM k; END",
        "BEGIN; ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN b int; UPDATE t SET b = -a; END",
        "BEGIN; ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b; END",
        "BEGIN; CREATE TABLE u AS SELECT a, b FROM t; ALTER TABLE t RENAME TO v; ALTER TABLE u RENAME TO t; DROP TABLE v; END",
        "ALTER TABLE t ALTER a TYPE bigint, ALTER b TYPE bigint",
        "ALTER TABLE t ALTER a TYPE int, ALTER b TYPE int",
        "VACUUM FULL t",
    ];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !done.load(Ordering::Relaxed) {
                drop(demo.psql_direct(1).args(["-q", "-c", changes[round % changes.len()]]).output());
                round += 1;
            }
        });
        let _done = Done(&done);
        for _ in 0..3 {
            let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}, DETACHED");
            let columns = completed(&demo, 1, &detached(&demo, 1, &statement));
            if columns[5] == "failed" {
                assert!(columns[12].contains("table \"public.t\""), "{columns:?}");
                continue;
            }
            let backup = LocalBackup::newest(&extern_dirs(&demo), "b");
            assert_eq!(backup.manifest["job"].to_string(), columns[0]);
            let rows = backup.rows("t");
            let sums = rows.iter().map(|row| row.split('\t').map(|n| n.parse::<i64>().unwrap()).sum::<i64>());
            assert_eq!((rows.len(), sums.filter(|sum| *sum != 0).count()), (1000, 0));
        }
    });
}

#[test]
fn a_backup_gives_way_to_whoever_waits_for_a_table_and_goes_on() {
    let fleet = Fleet::start(&["--rows", "100"]);
    let demo = &fleet.demo;
    fleet.on(1, "movr", "CREATE TABLE wanted AS SELECT n, repeat('x', 500) FROM generate_series(1, 30000) n");
    let (setting, zone) = ("bulkio.backup.node_rate_limit", "EXECUTION LOCALITY = 'region=us-east-1,zone=a'");
    // At this rate its rows take minutes, and are locked on the primary all the while.
    assert_eq!(demo.ask(1, &format!("SET CLUSTER SETTING {setting} = '64KiB'")), "SET CLUSTER SETTING");
    demo.until_settings_known();
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {zone}, DETACHED");
    let reading = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE relation = 'wanted'::regclass AND granted AND application_name LIKE 'backhaul job%' AND query LIKE 'COPY %'";
    let job = detached(demo, 1, &statement);
    until("its rows to be read", || {
        let seen = run(demo.psql_direct(1).args(["-Atc", reading]));
        if seen.trim() == "1" { Ok(()) } else { Err(fleet.job(&job, "status")) }
    });
    let lock = "SET lock_timeout = '25s'; BEGIN; LOCK TABLE wanted IN ACCESS EXCLUSIVE MODE; COMMIT";
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-qc", lock]));
    assert_eq!(fleet.job(&job, "status"), "running");
    assert_eq!(demo.ask(1, &format!("RESET CLUSTER SETTING {setting}")), "SET CLUSTER SETTING");
    assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
    let log = std::fs::read_to_string(demo.node_dir(1).join("node.log")).unwrap();
    assert!(log.contains("table \"public.wanted\" is wanted by somebody else"), "{log}");
    // Whatever was read of it before is not in the backup.
    let backup = LocalBackup::newest(&extern_dirs(demo), "b");
    assert_eq!(backup.manifest["shards"][0]["point"]["mode"], "Exported");
    let sorted = |mut rows: Vec<String>| {
        rows.sort_unstable();
        rows
    };
    let there = run(demo.psql_direct(1).args(["-qAtc", "COPY wanted TO STDOUT"]));
    assert!(sorted(backup.rows("wanted")) == sorted(there.lines().map(str::to_owned).collect()), "rows differ");
}

#[test]
fn a_backup_opens_with_stock_tools() {
    let demo = Demo::start(&[]);
    let properties = "ALTER DATABASE movr CONNECTION LIMIT 30; COMMENT ON DATABASE movr IS 'it''s :\"target\" \\ $HOME';
        ALTER DATABASE movr SET search_path = \"$user\", public, \"a, b\"; ALTER ROLE root IN DATABASE movr SET work_mem = '7MB';
        CREATE ROLE keeper; CREATE ROLE looker; ALTER TABLE rides OWNER TO keeper; GRANT SELECT ON rides TO looker;
        ALTER LARGE OBJECT 16500 OWNER TO keeper; GRANT SELECT ON LARGE OBJECT 16500 TO looker WITH GRANT OPTION;
        GRANT UPDATE ON LARGE OBJECT 16500 TO PUBLIC; SELECT nextval('ticket_numbers') FROM generate_series(1, 40)";
    run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-c", properties]));
    let statement = format!("BACKUP DATABASE movr INTO 'nodelocal://self/b' WITH {WEST}, DETACHED");
    succeeded(&demo, 1, &detached(&demo, 1, &statement));
    let dir = directory();
    LocalBackup::newest(&extern_dirs(&demo), "b").gather(&dir.path().join("files"));
    let target = Server::primary(dir.path(), "target", &Vec::new());
    // As RESTORE.txt says, they have to exist before.
    target.ask("CREATE ROLE keeper; CREATE ROLE looker");
    let bin = postgres_program("createdb");
    let path = format!(
        "{}:{}",
        std::path::Path::new(bin.get_program()).parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let conninfo = target.instance.conninfo("root");
    let host = conninfo.split("host=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().trim_matches('\'');
    let mut restore = std::process::Command::new("sh");
    restore.arg("RESTORE.txt").current_dir(dir.path().join("files"));
    restore.env("PATH", path).env("PGHOST", host).env("PGUSER", "root").env("TARGET", "movr");
    if let Some(port) = conninfo.split("port=").nth(1).and_then(|rest| rest.split(' ').next()) {
        restore.env("PGPORT", port);
    }
    run(&mut restore);
    let url = format!("{conninfo} dbname=movr");
    for query in [
        "SELECT count(*), sum(hashtext(r::text)::bigint) FROM rides r",
        "SELECT count(*), sum(hashtext(u::text)::bigint) FROM users u",
        "SELECT count(*), sum(hashtext(v::text)::bigint) FROM vehicles v",
        "SELECT count(*), sum(hashtext(p::text)::bigint) FROM vehicle_positions p",
        "SELECT count(*), sum(hashtext(i::text)::bigint) FROM billing.\"Invoices\" i",
        "SELECT count(*), sum(hashtext(c::text)::bigint) FROM contracts c",
        "SELECT count(*), sum(hashtext(m::text)::bigint) FROM revenue_by_city m",
        "SELECT oid, lomowner::regrole, lomacl, md5(lo_get(oid)) FROM pg_largeobject_metadata ORDER BY 1",
        "SELECT count(*) FROM pg_constraint WHERE contype = 'f'",
        "SELECT datconnlimit, shobj_description(oid, 'pg_database'), datlocprovider, datcollate FROM pg_database
         WHERE datname = 'movr'",
        "SELECT setrole::regrole, setconfig FROM pg_db_role_setting WHERE setdatabase <> 0 ORDER BY 1",
    ] {
        let restored = run(psql(&url).args(["-Atc", query]));
        assert_eq!(restored, run(demo.psql_direct(1).args(["-Atc", query])), "{query}");
    }
    let schema = |url: &str| run(postgres_program("pg_dump").args(["--schema-only", "--restrict-key=x"]).arg(url));
    assert_eq!(schema(&url), schema(&demo.direct_url(1)));
    assert_sequences_not_behind(&demo.direct_url(1), &url);
}

#[test]
fn backups_of_one_moment_have_directories_of_their_own() {
    let demo = Demo::start(&["--rows", "100"]);
    let begin = |number: usize| {
        let statement = "BACKUP DATABASE movr INTO 'nodelocal://1/same' WITH DETACHED";
        demo.psql(number).args(["-Atc", statement]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let clients: Vec<_> = (0..8).map(|turn| begin(1 + turn % 4)).collect();
    let jobs: Vec<String> =
        clients.into_iter().map(|client| both(&client.wait_with_output().unwrap()).trim().to_owned()).collect();
    for job in &jobs {
        succeeded(&demo, 2, job);
    }
    assert_eq!(demo.ask(1, "SHOW BACKUPS IN 'nodelocal://1/same'").lines().count(), jobs.len());
}

#[test]
fn what_a_sequence_gives_out_while_a_primary_is_read_is_not_given_out_again() {
    let fleet = Fleet::start(&["--rows", "100"]);
    let make = "CREATE SEQUENCE up; CREATE SEQUENCE down INCREMENT BY -5; SELECT nextval('up'), nextval('down')";
    fleet.on(1, "movr", make);
    // Of a primary's they are read again when all rows are; those of a standby are what they were at its point.
    let point = "backup.after_first_span";
    let west = format!("{WEST}, DETACHED");
    for (options, mode, up, down) in [("DETACHED", "Exported", 3..=3, -6..=-6), (&*west, "Paused", 3..=100, -500..=-6)]
    {
        let job = fleet.held(&format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {options}"), point);
        fleet.on(1, "movr", "SELECT nextval('up'), nextval('up'), nextval('down')");
        if mode == "Paused" {
            // In WAL a sequence is ahead of itself, by 32 values.
            fleet.on(1, "movr", "SELECT nextval('up'), nextval('down') FROM generate_series(1, 200)");
            until("the standby to have them", || {
                let seen = run(fleet.demo.psql_direct(3).args(["-Atc", "SELECT last_value > 200 FROM up"]));
                if seen.trim() == "t" { Ok(()) } else { Err(seen) }
            });
        }
        fleet.let_go(&job, point);
        assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
        let shard = LocalBackup::newest(&extern_dirs(&fleet.demo), "b").manifest["shards"][0].clone();
        assert_eq!(shard["point"]["mode"], mode);
        let sequences = shard["databases"][0]["sequences"].as_array().unwrap().clone();
        for (name, values) in [("up", up), ("down", down)] {
            let found = sequences.iter().find(|sequence| sequence["name"] == name).unwrap();
            assert_eq!(found["is_called"], true, "{name}");
            assert!(values.contains(&found["last_value"].as_i64().unwrap()), "{found}");
        }
    }
}
