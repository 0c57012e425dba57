//! Whole clusters: every database of every shard is in the backup or named as left out, and comes back under its own
//! name, all of them or none.

use crate::support::demo::{Demo, psql};
use crate::support::faults::Fleet;
use crate::support::jobs::completed;
use crate::support::{both, postgres_program, run, until};

/// n1 leads s1, n2 leads s2.
const TWO_SHARDS: [&str; 10] = ["--nodes", "4", "--servers", "4", "--shards", "2", "--voters", "1", "--rows", "300"];

/// The databases that are to come back, each with the node beside the primary of its shard.
const HELD: [(usize, &str); 4] = [(1, "movr"), (1, "solo"), (2, "Second one"), (2, "movr")];

fn url(demo: &Demo, number: usize, database: &str) -> String {
    let direct = demo.direct_url(number);
    let (_, options) = direct.split_once('?').unwrap();
    format!("postgresql:///{}?{options}", database.replace(' ', "%20"))
}

/// Runs SQL on the server beside node `number`.
#[track_caller]
fn on(demo: &Demo, number: usize, database: &str, query: &str) -> String {
    let mut psql = psql(&url(demo, number, database));
    run(psql.args(["-v", "ON_ERROR_STOP=1", "-Atqc", query])).trim_end().to_owned()
}

/// What a statement through node 1 is answered, in a database that stays; `first` are statements before it.
fn ask(demo: &Demo, first: &[&str], statement: &str) -> String {
    let (node, _) = demo.nodes[0].url.rsplit_once('/').unwrap();
    let mut psql = psql(&format!("{node}/postgres"));
    psql.args(["-Atq", "-v", "VERBOSITY=verbose"]);
    for text in first.iter().chain([&statement]) {
        psql.args(["-c", text]);
    }
    both(&psql.output().unwrap()).trim_end().to_owned()
}

/// The id of the job that a DETACHED statement has made, and all that was said.
#[track_caller]
fn detached(demo: &Demo, first: &[&str], statement: &str) -> (String, String) {
    let told = ask(demo, first, statement);
    let job = told.lines().find(|line| line.parse::<i64>().is_ok()).unwrap_or_else(|| panic!("{statement}: {told}"));
    (job.to_owned(), told)
}

/// Schema, rows, sequences and properties of a database.
#[track_caller]
fn image(demo: &Demo, number: usize, database: &str) -> String {
    let mut all = run(postgres_program("pg_dump")
        .args(["--schema-only", "--restrict-key=x", "--create"])
        .arg(url(demo, number, database)));
    let relations = "SELECT c.oid::regclass::text FROM pg_class c WHERE relkind IN ('r', 'm') AND relpersistence = 'p'
         AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) ORDER BY 1";
    for relation in on(demo, number, database, relations).lines() {
        let sum = format!("SELECT '{relation}', count(*), sum(hashtext(t::text)::numeric) FROM ONLY {relation} t");
        all.push_str(&on(demo, number, database, &sum));
        all.push('\n');
    }
    for query in [
        "SELECT sequencename, last_value FROM pg_sequences ORDER BY 1",
        "SELECT m.oid, lomowner::regrole, md5(lo_get(m.oid)) FROM pg_largeobject_metadata m ORDER BY 1",
    ] {
        all.push_str(&on(demo, number, database, query));
    }
    all
}

#[track_caller]
fn images(demo: &Demo) -> Vec<String> {
    HELD.iter().map(|(number, database)| image(demo, *number, database)).collect()
}

/// Databases of these names, of which there may be none, in both shards.
#[track_caller]
fn count(demo: &Demo, condition: &str) -> String {
    let query = format!("SELECT count(*) FROM pg_database WHERE {condition}");
    [1, 2].map(|number| on(demo, number, "postgres", &query)).join(" ")
}

const OURS: &str = "datname LIKE '\\_backhaul%'";

#[track_caller]
fn drop_all(demo: &Demo, held: &[(usize, &str)]) {
    for (number, database) in held {
        on(demo, *number, "postgres", &format!("DROP DATABASE \"{database}\" WITH (FORCE)"));
    }
}

/// A fleet with a database in both shards, one in each, and some that no backup of the whole takes.
#[track_caller]
fn start() -> Fleet {
    let fleet = Fleet::start(&TWO_SHARDS);
    let demo = &fleet.demo;
    for (number, database, role) in [(1, "solo", "keeper"), (2, "Second one", "other")] {
        on(demo, number, "postgres", &format!("CREATE ROLE {role}; COMMENT ON ROLE {role} IS 'owns'"));
        on(demo, number, "postgres", &format!("CREATE DATABASE \"{database}\""));
        let objects = format!(
            "CREATE TABLE t (i int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, s text UNIQUE);
             INSERT INTO t (s) SELECT md5(i::text) FROM generate_series(1, 500) i; ALTER TABLE t OWNER TO {role};
             CREATE MATERIALIZED VIEW m AS SELECT count(*) FROM t; ALTER DATABASE \"{database}\" SET work_mem = '7MB'"
        );
        on(demo, number, database, &objects);
    }
    on(demo, 2, "postgres", "CREATE DATABASE closed ALLOW_CONNECTIONS false");
    on(demo, 1, "postgres", "CREATE DATABASE pattern IS_TEMPLATE true");
    fleet
}

/// Makes the backup; a database that comes after the statement was planned is not in it.
#[track_caller]
fn back_up(fleet: &Fleet) {
    let demo = &fleet.demo;
    let plan = ask(demo, &[], "EXPLAIN BACKUP INTO 'nodelocal://1/all'");
    let hold = "SET backhaul.debug_pausepoints = 'backup.after_lock:hold'";
    let (job, told) = detached(demo, &[hold], "BACKUP INTO 'nodelocal://1/all' WITH DETACHED");
    fleet.until_held(&job, "backup.after_lock");
    on(demo, 1, "postgres", "CREATE DATABASE late");
    fleet.let_go(&job, "backup.after_lock");
    let row = completed(demo, 3, &job);
    assert_eq!((row[5].as_str(), row[12].as_str()), ("succeeded", ""), "{row:?}");
    assert!(row[2].starts_with("BACKUP INTO '/20") && row[2].ends_with(" IN 'nodelocal://1/all' WITH detached"));
    assert_eq!(row[3], "BACKUP INTO 'nodelocal://1/all' WITH detached");

    // Whatever is not in it is named wherever somebody looks.
    let shown = ask(demo, &[], "SHOW BACKUP FROM LATEST IN 'nodelocal://1/all'");
    for left_out in [
        "database backhaul of shard s1 is left out: it is the registry of the fleet",
        "database pattern of shard s1 is left out: it is a template",
        "database closed of shard s2 is left out: nobody may connect to it",
        "every role and tablespace is left out: a backup is of databases",
    ] {
        for said in [&plan, &told, &shown] {
            assert!(said.contains(left_out), "{left_out}: {said}");
        }
    }
    for line in ["shard s1: leaseholder node 1", "shard s2: leaseholder node 2", "table Second one.public.t: "] {
        assert!(plan.contains(line), "{line}: {plan}");
    }
    let rows = shown.lines().filter(|line| line.matches('|').count() == 10).collect::<Vec<_>>();
    assert!(rows.iter().all(|row| row.split('|').nth(9) == Some("t")), "{shown}");
    let mut databases: Vec<&str> = rows
        .iter()
        .map(|row| row.split('|').collect::<Vec<_>>())
        .filter(|row| row[3] == "database")
        .map(|row| row[2])
        .collect();
    databases.sort_unstable();
    assert_eq!(databases, ["Second one", "movr", "movr", "solo"]);
    drop_all(demo, &[(1, "late")]);
}

#[test]
fn every_database_comes_back_under_its_own_name_all_or_none() {
    let fleet = start();
    let demo = &fleet.demo;
    back_up(&fleet);
    let was = images(demo);

    let whole = "RESTORE FROM LATEST IN 'nodelocal://1/all'";
    let taken = ask(demo, &[], whole);
    assert!(taken.starts_with("ERROR:  42P04: databases \"Second one\", \"movr\", \"solo\" already exist"), "{taken}");
    // Two by their names, each into its shard.
    drop_all(demo, &HELD[1..3]);
    let absent = ask(demo, &[], "RESTORE DATABASE solo, nowhere FROM LATEST IN 'nodelocal://1/all'");
    assert!(absent.starts_with("ERROR:  3D000: database \"nowhere\" is not in the backup"), "{absent}");
    let two = ask(demo, &[], "RESTORE DATABASE \"Second one\", solo FROM LATEST IN 'nodelocal://1/all'");
    assert!(two.contains("|succeeded|1.0|1000|"), "{two}");
    assert_eq!(images(demo), was);

    drop_all(demo, &HELD);
    // What is missing is told all at once, before anything is made.
    on(demo, 1, "postgres", "ALTER ROLE keeper RENAME TO away");
    on(demo, 2, "postgres", "ALTER ROLE other RENAME TO away");
    let missing = ask(demo, &[], whole);
    assert!(
        missing.starts_with("ERROR:  42704: objects that the database needs do not exist\n")
            && missing.contains("DETAIL:  Missing: role \"keeper\" in shard \"s1\", role \"other\" in shard \"s2\"."),
        "{missing}"
    );
    on(demo, 1, "postgres", "ALTER ROLE away RENAME TO keeper");
    on(demo, 2, "postgres", "ALTER ROLE away RENAME TO other");

    // Somebody takes one of the names when all are whole: then none gets its name.
    let hold = "SET backhaul.debug_pausepoints = 'restore.after_finish:hold'";
    let (job, _) = detached(demo, &[hold], &format!("{whole} WITH DETACHED"));
    fleet.until_held(&job, "restore.after_finish");
    assert_eq!(count(demo, OURS), "2 2");
    on(demo, 2, "postgres", "CREATE DATABASE \"Second one\"");
    fleet.let_go(&job, "restore.after_finish");
    let (status, error) = fleet.end_of(&job);
    assert!(status == "failed" && error.contains("database \"Second one\" already exists"), "{status}: {error}");
    assert_eq!(count(demo, &format!("{OURS} OR datname IN ('movr', 'solo')")), "0 0");
    drop_all(demo, &HELD[2..3]);

    // Interrupted, it goes on where it was; cancelled, it leaves nothing.
    for (points, ends) in
        [("restore.after_load", "CANCEL"), ("restore.after_first_file,restore.after_finish", "RESUME")]
    {
        let pause = format!("SET backhaul.debug_pausepoints = '{points}'");
        let (job, _) = detached(demo, &[&pause], &format!("{whole} WITH DETACHED"));
        for _ in points.split(',') {
            until("the job to be paused", || match fleet.job(&job, "status").as_str() {
                "paused" => Ok(()),
                status => Err(format!("{status}: {}", fleet.job(&job, "error"))),
            });
            ask(demo, &[], &format!("{ends} JOB {job}"));
        }
        let (status, error) = fleet.end_of(&job);
        let expected = if ends == "CANCEL" { ("canceled", "job canceled by user") } else { ("succeeded", "") };
        assert_eq!((status.as_str(), error.as_str()), expected);
        assert_eq!(count(demo, OURS), "0 0");
    }
    assert_eq!(images(demo), was);
}

#[test]
fn a_database_that_goes_before_its_point_is_named() {
    let fleet = start();
    let demo = &fleet.demo;
    let hold = "SET backhaul.debug_pausepoints = 'backup.after_lock:hold'";
    let (job, _) = detached(demo, &[hold], "BACKUP INTO 'nodelocal://1/all' WITH DETACHED");
    fleet.until_held(&job, "backup.after_lock");
    drop_all(demo, &HELD[1..2]);
    fleet.let_go(&job, "backup.after_lock");
    let (status, error) = fleet.end_of(&job);
    assert!(status == "failed" && error.contains("database \"solo\" does not exist"), "{status}: {error}");
    // The whole is what there is now; where nothing is named, something of a user's has to be there.
    let again = ask(demo, &[], "BACKUP INTO 'nodelocal://1/all'");
    assert!(again.contains("|succeeded|1.0|"), "{again}");
    drop_all(demo, &[HELD[0], HELD[2], HELD[3]]);
    let nothing = ask(demo, &[], "BACKUP INTO 'nodelocal://1/all'");
    let expected =
        "ERROR:  3D000: failed to resolve targets specified in the BACKUP stmt: there is no database to back up";
    assert!(nothing.starts_with(expected), "{nothing}");
    // What was made in the default database is a user's, too.
    on(demo, 2, "postgres", "CREATE TABLE t AS SELECT 1 AS i");
    let default = ask(demo, &[], "BACKUP INTO 'nodelocal://1/all'");
    assert!(default.contains("|succeeded|1.0|1|"), "{default}");
}

#[test]
fn more_databases_than_a_node_keeps_schemas_for() {
    let demo = Demo::start(&["--nodes", "1", "--no-example-database"]);
    let names: Vec<String> = (0..10).map(|number| format!("d{number}")).collect();
    for name in &names {
        on(&demo, 1, "postgres", &format!("CREATE DATABASE {name}"));
        on(&demo, 1, name, &format!("CREATE TABLE t AS SELECT '{name}' AS name; CREATE UNIQUE INDEX ON t (name)"));
    }
    // Each is read by one session then, and has a spare and a guard.
    let plan = ask(&demo, &[], "EXPLAIN BACKUP INTO 'nodelocal://1/all'");
    assert!(plan.contains("connections: at most 34 on its server"), "{plan}");
    let made = ask(&demo, &[], "BACKUP INTO 'nodelocal://1/all'");
    assert!(made.contains("|succeeded|1.0|10|"), "{made}");
    for name in &names {
        on(&demo, 1, "postgres", &format!("DROP DATABASE {name} WITH (FORCE)"));
    }
    let restored = ask(&demo, &[], "RESTORE FROM LATEST IN 'nodelocal://1/all'");
    assert!(restored.contains("|succeeded|1.0|10|"), "{restored}");
    for name in &names {
        let query = "SELECT name, (SELECT count(*) FROM pg_index WHERE indrelid = 't'::regclass) FROM t";
        assert_eq!(on(&demo, 1, name, query), format!("{name}|1"));
    }
}
