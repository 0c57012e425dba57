//! What RESTORE promises: everything comes back the same, once, and damage is noticed.

use std::path::PathBuf;

use backup::PAUSEPOINTS;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::{Demo, Holder, psql};
use crate::support::faults::{DEATH_KNOWN, Fleet};
use crate::support::store::files_in;
use crate::support::{both, postgres_program, run, until};

const WEST: &str = "EXECUTION LOCALITY = 'region=us-west-1'";

#[track_caller]
fn ended(demo: &Demo, node: usize, statement: &str) -> Vec<String> {
    let job = demo.ask(node, statement);
    assert!(job.parse::<i64>().is_ok(), "{statement}: {job}");
    demo.ask(node, &format!("SHOW JOB WHEN COMPLETE {job}")).split('|').map(str::to_owned).collect()
}

#[track_caller]
fn succeeded(demo: &Demo, node: usize, statement: &str) {
    let columns = ended(demo, node, statement);
    assert_eq!((columns[5].as_str(), columns[12].as_str()), ("succeeded", ""), "{statement}: {columns:?}");
}

fn url(demo: &Demo, database: &str) -> String {
    demo.direct_url(1).replace("/movr?", &format!("/{database}?"))
}

fn on(demo: &Demo, database: &str, query: &str) -> String {
    run(psql(&url(demo, database)).args(["-v", "ON_ERROR_STOP=1", "-Atc", query]))
}

/// The target's sequences are those of the source, or further along. Both are connection strings.
#[track_caller]
pub(crate) fn assert_sequences_not_behind(source: &str, target: &str) {
    // A standby knows a sequence up to 32 values ahead: it may be further along, never behind.
    let sequences = |url: &str| {
        let query = "SELECT sequencename, coalesce(last_value, 0) FROM pg_sequences ORDER BY 1";
        let rows = run(psql(url).args(["-v", "ON_ERROR_STOP=1", "-Atc", query]));
        let row = |row: &str| row.split_once('|').map(|(name, value)| (name.to_owned(), value.parse::<i64>().unwrap()));
        rows.lines().map(|line| row(line).unwrap()).collect::<Vec<_>>()
    };
    let (target, source) = (sequences(target), sequences(source));
    assert_eq!(target.len(), source.len());
    for ((name, is), (same_name, was)) in target.into_iter().zip(source) {
        assert!(name == same_name && is >= was, "{name} is {is}, {same_name} was {was}");
    }
}

/// Both databases hold the same: schema, rows, sequences, views, large objects.
#[track_caller]
fn assert_same(demo: &Demo, source: &str, target: &str) {
    assert_same_rows(demo, source, target);
    assert_sequences_not_behind(&url(demo, source), &url(demo, target));
}

/// The same but for the sequences.
#[track_caller]
fn assert_same_rows(demo: &Demo, source: &str, target: &str) {
    let schema = |database: &str| {
        run(postgres_program("pg_dump").args(["--schema-only", "--restrict-key=x"]).arg(url(demo, database)))
    };
    assert_eq!(schema(target), schema(source));
    let relations = "SELECT c.oid::regclass FROM pg_class c WHERE relkind IN ('r', 'm') AND relpersistence = 'p'
         AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) ORDER BY 1";
    let relations = on(demo, source, relations);
    assert!(relations.lines().count() > 8, "{relations}");
    for relation in relations.lines() {
        let sum = format!("SELECT count(*), sum(hashtext(t::text)::numeric) FROM ONLY {relation} t");
        assert_eq!(on(demo, target, &sum), on(demo, source, &sum), "{relation}");
    }
    for query in [
        "SELECT m.oid, lomowner::regrole, lomacl, md5(lo_get(m.oid)) FROM pg_largeobject_metadata m ORDER BY 1",
        "SELECT datdba::regrole, encoding, datcollate, datacl IS NULL, shobj_description(oid, 'pg_database')
         FROM pg_database WHERE datname = current_database()",
        "SELECT unnest(setconfig) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = setdatabase
         WHERE datname = current_database() AND setrole = 0",
    ] {
        assert_eq!(on(demo, target, query), on(demo, source, query), "{query}");
    }
}

#[test]
fn everything_comes_back_the_same() {
    let demo = Demo::start(&[]);
    on(&demo, "movr", "ALTER DATABASE movr SET work_mem = '7MB'; COMMENT ON DATABASE movr IS 'rides, and more'");
    on(&demo, "movr", "CREATE DATABASE \"Second one\"");
    on(&demo, "Second%20one", "CREATE TABLE \"T\" AS SELECT i, md5(i::text) FROM generate_series(1, 100) i");
    // From the standby, from the primary, and of two databases in one statement.
    for (number, (databases, filter)) in
        [("movr", WEST), ("movr", "EXECUTION LOCALITY = 'region=us-east-1,zone=a'"), ("movr, \"Second one\"", WEST)]
            .into_iter()
            .enumerate()
    {
        let uri = format!("nodelocal://self/b{number}");
        succeeded(&demo, 1, &format!("BACKUP DATABASE {databases} INTO '{uri}' WITH {filter}, DETACHED"));
        let restore = |source: &str, target: &str| {
            let statement = format!(
                "RESTORE DATABASE {source} FROM LATEST IN '{uri}' WITH new_db_name = '{target}', {filter}, DETACHED"
            );
            succeeded(&demo, 2, &statement);
        };
        restore("movr", &format!("copy{number}"));
        assert_same(&demo, "movr", &format!("copy{number}"));
        if number == 2 {
            restore("\"Second one\"", "copy of it");
            assert_eq!(on(&demo, "copy%20of%20it", "SELECT count(*) FROM \"T\""), "100\n");
        }
    }
    let left = "SELECT count(*) FROM pg_database WHERE datname LIKE '\\_backhaul%'";
    assert_eq!(on(&demo, "postgres", left), "0\n");
}

#[test]
fn an_attached_restore_is_relocated_as_a_backup_is() {
    let demo = Demo::start(&[]);
    succeeded(&demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://3/b' WITH {WEST}, DETACHED"));
    let statement = |name: &str| {
        format!("RESTORE DATABASE movr FROM LATEST IN 'nodelocal://3/b' WITH new_db_name = '{name}', {WEST}")
    };
    let told = demo.ask(1, &statement("one"));
    assert!(told.starts_with("ERROR:  XXUUU: execution of job ") && told.contains(" relocated to "), "{told}");
    let row = demo.ask(3, &statement("two"));
    // The description names what LATEST was, the statement is as it was given.
    let job = demo.ask(1, &format!("SHOW JOB {}", row.split('|').next().unwrap()));
    assert!(
        job.contains("|RESTORE DATABASE movr FROM '/20") && job.contains("|RESTORE DATABASE movr FROM 'latest'"),
        "{job}"
    );
    let columns: Vec<&str> = row.split('|').collect();
    assert_eq!((columns[1], columns[2], columns[4]), ("succeeded", "1.0", "0"), "{row}");
    assert_same(&demo, "movr", "two");
    let told = demo.ask(3, &statement("two"));
    assert!(told.starts_with("ERROR:  42P04: database \"two\" already exists"), "{told}");

    // Looking into the collection needs no filter.
    let paths = demo.ask(2, "SHOW BACKUPS IN 'nodelocal://3/b'");
    assert!(paths.starts_with("/20") && paths.lines().count() == 1, "{paths}");
    let shown = demo.ask(2, &format!("SHOW BACKUP FROM '{paths}' IN 'nodelocal://3/b' WITH check_files"));
    assert!(shown.contains("movr|public|rides|table|full|"), "{shown}");
    assert!(shown.contains("NOTICE:  00000: table public.sessions_cache of database movr is left out"), "{shown}");
    let files = demo.ask(2, "SHOW BACKUP FILES FROM LATEST IN 'nodelocal://3/b'");
    assert!(files.contains("table \"public.rides\" of movr"), "{files}");
}

#[test]
fn the_statements_of_a_backup_make_its_objects() {
    let demo = Demo::start(&["--rows", "100"]);
    on(&demo, "movr", "CREATE TABLE \"t; Type: VIEW\" (i int PRIMARY KEY, \"a b\" int UNIQUE)");
    succeeded(&demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://3/b' WITH {WEST}, DETACHED"));
    let shown = |options: &str, format: &[&str]| {
        let statement = format!("SHOW BACKUP SCHEMAS FROM LATEST IN 'nodelocal://3/b'{options}");
        // A node beside a server, and one without.
        let [first, second] = [1, 4].map(|node| run(demo.psql(node).args(format).args(["-c", &statement])));
        assert_eq!(first, second);
        first
    };
    let columns = "database_name,parent_schema_name,object_name,object_type,backup_type,start_time,end_time,\
                   size_bytes,rows,is_full_cluster,create_statement,regions";
    assert_eq!(shown("", &["--csv"]).lines().next(), Some(columns));
    assert_eq!(shown(" WITH check_files", &["--csv"]).lines().next(), Some(format!("{columns},file_bytes")).as_deref());
    assert!(shown(" WITH as_json", &["-At"]).starts_with("{\"format\":1,"));
    let rows = shown("", &["-At", "-F", "\x1f", "-R", "\x1e"]);
    let rows: Vec<Vec<&str>> = rows.trim_end().split('\x1e').map(|row| row.split('\x1f').collect()).collect();
    let statement = |kind: &str, name: &str| {
        let found = rows.iter().find(|row| row[2] == name && row[3] == kind);
        found.unwrap_or_else(|| panic!("{kind} {name}: {rows:?}"))[10]
    };
    for row in rows.iter().filter(|row| row[3] != "large objects") {
        assert!(row[10].contains("CREATE ") || row[10].contains("GENERATED"), "{row:?}");
    }
    assert!(statement("database", "movr").starts_with("CREATE DATABASE movr "));
    assert!(!rows.iter().any(|row| row[10].contains('\\')), "no commands of psql's");
    // In another database they run as they are.
    on(&demo, "postgres", "CREATE DATABASE empty");
    for (kind, name) in
        [("table", "promo_codes"), ("sequence", "ticket_numbers"), ("table", "t; Type: VIEW"), ("table", "app_log")]
    {
        on(&demo, "empty", statement(kind, name));
    }
    let made = "SELECT count(*) FROM pg_index WHERE indrelid = '\"t; Type: VIEW\"'::regclass";
    assert_eq!(on(&demo, "empty", made), "2\n");
}

/// The first data file of a table, below any node's external I/O directory.
fn data_file(demo: &Demo, table: &str) -> PathBuf {
    let files = demo.ask(1, "SHOW BACKUP FILES FROM LATEST IN 'nodelocal://3/b'");
    let row = files.lines().find(|row| row.contains(&format!("\"public.{table}\""))).expect("a file of the table");
    let name = row.split('|').next().unwrap().rsplit('/').next().unwrap();
    let held = files_in(&demo.node_dir(3).join("extern"));
    held.into_iter().find(|file| file.file_name().unwrap() == name).expect("the file")
}

const RESTORE: &str = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://3/b' WITH new_db_name = 'bad'";
const CHECK: &str = "SHOW BACKUP FROM LATEST IN 'nodelocal://3/b' WITH check_files";

/// A fleet with a backup on node 3.
fn backed_up() -> Demo {
    let demo = Demo::start(&[]);
    succeeded(&demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://3/b' WITH {WEST}, DETACHED"));
    demo
}

/// The statement fails with all these words, and there is no database that it has begun.
#[track_caller]
fn refused(demo: &Demo, statement: &str, words: &[&str]) {
    let told = demo.ask(3, statement);
    assert!(told.starts_with("ERROR:  ") && words.iter().all(|word| told.contains(word)), "{words:?}: {told}");
    let left = "SELECT count(*) FROM pg_database WHERE datname LIKE '\\_backhaul%' OR datname = 'bad'";
    assert_eq!(on(demo, "postgres", left), "0\n", "{told}");
}

/// Each kind of file with one bit flipped, cut in its middle, and removed.
#[test]
fn damage_is_named_with_what_it_hit_and_leaves_no_database() {
    let demo = backed_up();
    let held = files_in(&demo.node_dir(3).join("extern"));
    let ending = |end: &str| held.iter().find(|file| file.to_string_lossy().ends_with(end)).expect(end).clone();
    let latest = held.iter().find(|file| file.to_string_lossy().contains("/metadata/latest/LATEST-")).expect("LATEST");
    let (rides, dump) = (data_file(&demo, "rides"), ending(".dump"));
    let name = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap().to_owned();
    let [rides_name, dump_name] = [&rides, &dump].map(|file| format!("{}\" of the backup is", name(file)));
    let of_rides = "It holds table \"public.rides\" of database \"movr\".";
    let of_schema = "It holds the schema of database \"movr\".";
    let [mismatch, astray] = [
        &["XX001: the manifest of the backup in nodelocal://3/b", "checksum mismatch"][..],
        &["XX001: file \"metadata/latest/LATEST-", "Name the directory instead of LATEST"],
    ];
    for (file, read_only, flipped, cut, gone) in [
        (
            &rides,
            true,
            &["XX001", &rides_name, of_rides][..],
            &["XX001", &rides_name, "the manifest says", of_rides][..],
            &["58P01", &rides_name, of_rides][..],
        ),
        (
            &dump,
            true,
            &["XX001", &dump_name, of_schema],
            &["XX001", &dump_name, "the manifest says", of_schema],
            &["58P01", &dump_name, of_schema],
        ),
        (&ending("/BACKUP_MANIFEST"), false, mismatch, mismatch, &["58P01: could not find BACKUP manifest file"]),
        (
            &ending("/BACKUP_MANIFEST-CHECKSUM"),
            false,
            mismatch,
            mismatch,
            &["XX001", "The file BACKUP_MANIFEST-CHECKSUM is missing."],
        ),
        (latest, false, astray, astray, &["58P01: path does not contain a completed latest backup"]),
    ] {
        let whole = std::fs::read(file).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 0x80;
        std::fs::write(file, &damaged).unwrap();
        refused(&demo, RESTORE, flipped);
        if read_only {
            // It looks at lengths, and says no more than that.
            let told = demo.ask(2, CHECK);
            assert!(told.contains("movr|public|rides|table|full|"), "{told}");
        } else {
            refused(&demo, CHECK, flipped);
        }
        std::fs::write(file, &whole[..whole.len() / 2]).unwrap();
        for statement in [RESTORE, CHECK] {
            refused(&demo, statement, cut);
        }
        std::fs::remove_file(file).unwrap();
        for statement in [RESTORE, CHECK] {
            refused(&demo, statement, gone);
        }
        std::fs::write(file, &whole).unwrap();
    }
    let told = demo.ask(2, CHECK);
    assert!(told.contains("movr|public|rides|table|full|"), "{told}");
}

#[test]
fn a_manifest_that_is_not_the_sealed_one_or_not_there_is_refused() {
    let demo = backed_up();
    let refused = |statement: &str, expected: &str| refused(&demo, statement, &[expected]);
    let held = files_in(&demo.node_dir(3).join("extern"));
    let manifest = held.into_iter().find(|file| file.ends_with("BACKUP_MANIFEST")).expect("the manifest");
    let whole = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, whole.replacen("\"rows\": 1", "\"rows\": 2", 1)).unwrap();
    refused(RESTORE, "checksum mismatch");
    let later = whole.replacen("\"format\": 1", "\"format\": 99", 1);
    std::fs::write(&manifest, &later).unwrap();
    let sum = run(std::process::Command::new("sha256sum").arg(&manifest));
    let checksum = manifest.with_file_name("BACKUP_MANIFEST-CHECKSUM");
    std::fs::write(&checksum, sum.split(' ').next().unwrap()).unwrap();
    refused(RESTORE, "0A000: the backup has format 99");
    let earlier = whole.replacen("\"format\": 1", "\"format\": 0", 1);
    std::fs::write(&manifest, &earlier).unwrap();
    let sum = run(std::process::Command::new("sha256sum").arg(&manifest));
    std::fs::write(&checksum, sum.split(' ').next().unwrap()).unwrap();
    refused(RESTORE, "0A000: the backup has format 0");
    std::fs::remove_file(&manifest).unwrap();
    refused(RESTORE, "could not find BACKUP manifest file");
    refused(&RESTORE.replace("3/b", "3/nothing"), "58P01: path does not contain a completed latest backup");
    refused(&RESTORE.replace("DATABASE movr", "DATABASE other"), "could not find BACKUP manifest file");
    on(&demo, "movr", "CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader");
    let told =
        psql(&demo.nodes[0].url.replace("root@", "reader@")).args(["-v", "VERBOSITY=verbose", "-c", RESTORE]).output();
    let told = both(&told.unwrap());
    assert!(told.contains("42501: user reader does not have RESTORE privilege"), "{told}");
}

#[test]
fn a_cancelled_restore_leaves_no_database_unless_it_is_its_user_s_already() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let demo = &fleet.demo;
    succeeded(demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, DETACHED"));
    for (number, point) in PAUSEPOINTS.iter().filter(|point| point.starts_with("restore")).enumerate() {
        let name = format!("again{number}");
        let statement = format!(
            "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/b' WITH new_db_name = '{name}', {WEST}, DETACHED"
        );
        let job = fleet.held(&statement, point);
        assert_eq!(demo.ask(2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
        let (status, error) = fleet.end_of(&job);
        let left = "SELECT count(*) FROM pg_database WHERE datname LIKE '\\_backhaul%' OR datname LIKE 'again%'";
        if *point == "restore.after_release" {
            assert_eq!((status.as_str(), error.as_str()), ("succeeded", ""), "{point}");
            assert_same(demo, "movr", &name);
            assert_eq!(on(demo, "postgres", left), "1\n", "{point}");
        } else {
            assert_eq!((status.as_str(), error.as_str()), ("canceled", "job canceled by user"), "{point}");
            assert_eq!(on(demo, "postgres", left), "0\n", "{point}");
        }
    }
}

/// As in a registry that goes on with what an asynchronous standby had received of it.
#[test]
fn a_cancelled_restore_leaves_no_database_where_the_registry_has_lost_count_of_its_runs() {
    let fleet = Fleet::start(&["--rows", "500"]);
    let demo = &fleet.demo;
    succeeded(demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, DETACHED"));
    let restore =
        format!("RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/b' WITH new_db_name = 'again', {WEST}, DETACHED");
    let job = fleet.held(&restore, "restore.after_create");
    let runs = format!("FROM registry.job_info WHERE job_id = {job} AND key = 'run'");
    assert_eq!(demo.registry(&format!("SELECT value {runs}")), "1");
    demo.registry(&format!("UPDATE registry.job_info SET value = '-3' WHERE job_id = {job} AND key = 'run'"));
    assert_eq!(demo.ask(2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    let (status, error) = fleet.end_of(&job);
    assert_eq!((status.as_str(), error.as_str()), ("canceled", "job canceled by user"));
    assert_eq!(on(demo, "postgres", "SELECT datname FROM pg_database WHERE datname LIKE '\\_backhaul%'"), "");
    assert_eq!(demo.registry(&format!("SELECT value {runs}")), "1");
}

const LOADING: &str = "query LIKE 'COPY %FROM STDIN%' AND datname LIKE '\\_backhaul%'";
const BUILDING: &str = "application_name LIKE 'backhaul post-data%' AND query LIKE 'CREATE INDEX%'";

/// Whoever holds this lock has everything wait that calls `waits()`.
const GATE: &str = "SELECT pg_advisory_lock(77)";

const GATED: &str = "
    CREATE FUNCTION waits(a bigint) RETURNS bigint IMMUTABLE PARALLEL UNSAFE LANGUAGE plpgsql AS $$ BEGIN
        WHILE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND objid = 77) LOOP
            PERFORM pg_catalog.pg_sleep(0.02);
        END LOOP;
        RETURN a;
    END $$";

/// Rows that are held up in the middle of each file, and an index while it is built.
const CHECKED: &str = "ALTER TABLE rides ADD CONSTRAINT gated CHECK (id % 500 <> 7 OR waits(id) > 0)";
const INDEXED: &str = "
    CREATE TABLE slowly (a bigint); INSERT INTO slowly SELECT generate_series(1, 150); CREATE INDEX ON slowly (waits(a))";

/// A restore in its middle, which does not go on before the gate is dropped.
struct Restoring {
    demo: Demo,
    job: String,
    gate: Holder,
}

/// A fleet that finds out about deaths within a second, in the middle of a restore into the database `copy`: where
/// there is a session that `doing` is true for.
fn restoring(rows: &str, setup: &str, doing: &str) -> Restoring {
    let demo = Demo::start(&["--rows", rows]);
    on(&demo, "movr", &format!("{GATED}; {setup}"));
    demo.set_session_life(DEATH_KNOWN);
    succeeded(&demo, 1, "BACKUP DATABASE movr INTO 'nodelocal://2/b' WITH DETACHED");
    let gate = Holder::start(psql(&url(&demo, "postgres")), GATE);
    let job = demo.ask(
        1,
        &format!("RESTORE DATABASE movr FROM LATEST IN 'nodelocal://2/b' WITH new_db_name = 'copy', {WEST}, DETACHED"),
    );
    until("the restore to get there", || {
        let waits = "wait_event = 'PgSleep'";
        let seen = on(&demo, "postgres", &format!("SELECT count(*) FROM pg_stat_activity WHERE {doing} AND {waits}"));
        if seen.trim() == "0" { Err(demo.ask(1, &format!("SHOW JOB {job}"))) } else { Ok(()) }
    });
    Restoring { demo, job, gate }
}

/// Whoever gets this signal in the middle, everything is there once.
fn survives(Restoring { demo, job, gate }: Restoring, number: usize, signal: Signal) {
    let node = Pid::from_raw(demo.nodes[number - 1].pid);
    let coordinator = || demo.registry(&format!("SELECT coordinator_id FROM registry.jobs WHERE id = {job}"));
    let before = coordinator();
    kill(node, signal).unwrap();
    if before == number.to_string() {
        until("another node to have the job", || {
            let now = coordinator();
            if now == before { Err(now) } else { Ok(()) }
        });
    }
    drop(gate);
    let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {job}"));
    assert!(row.contains("|succeeded|"), "{row}");
    if signal == Signal::SIGSTOP {
        // It goes on with what it was at, and finds that it is too late.
        kill(node, Signal::SIGCONT).unwrap();
        until("the node to be back", || {
            let seen = demo.ask(1, "SHOW NODES");
            let back = seen.lines().any(|row| row.starts_with(&format!("{number}|")) && row.contains("|t|t|"));
            if back { Ok(()) } else { Err(seen) }
        });
    }
    assert_same(&demo, "movr", "copy");
    let left = "SELECT count(*) FROM pg_database WHERE datname LIKE '\\_backhaul%'";
    assert_eq!(on(&demo, "postgres", left), "0\n");
}

fn coordinator(demo: &Demo, job: &str) -> usize {
    demo.ask(1, &format!("SHOW JOB {job}")).split('|').nth(13).unwrap().parse().unwrap()
}

/// A server that crashed is started again, and everything is there once.
fn survives_a_crash(Restoring { demo, job, gate }: Restoring) {
    // It holds the registry, too, and the gate.
    kill(demo.server_pid(1), Signal::SIGKILL).unwrap();
    drop(gate);
    demo.restart_server(1);
    let row = until("the job to end", || {
        let row = demo.ask(1, &format!("SHOW JOB {job}"));
        if row.contains("|succeeded|") || row.contains("|failed|") { Ok(row) } else { Err(row) }
    });
    assert!(row.contains("|succeeded|"), "{row}");
    // A crash moves the source's own sequences up to 32 values on.
    assert_same_rows(&demo, "movr", "copy");
}

#[test]
fn a_restore_survives_the_death_of_one_worker() {
    survives(restoring("100000", CHECKED, LOADING), 3, Signal::SIGKILL);
}

#[test]
fn a_restore_survives_a_worker_that_stops_and_goes_on() {
    survives(restoring("100000", CHECKED, LOADING), 4, Signal::SIGSTOP);
}

#[test]
fn a_restore_survives_the_death_of_the_other() {
    survives(restoring("100000", CHECKED, LOADING), 4, Signal::SIGKILL);
}

#[test]
fn a_restore_survives_a_crash_of_the_server_that_it_fills() {
    survives_a_crash(restoring("100000", CHECKED, LOADING));
}

#[test]
fn a_restore_survives_a_crash_of_the_server_while_it_builds_indexes() {
    survives_a_crash(restoring("5000", INDEXED, BUILDING));
}

#[test]
fn a_restore_survives_the_death_of_its_coordinator_while_indexes_are_built() {
    let restoring = restoring("5000", INDEXED, BUILDING);
    let node = coordinator(&restoring.demo, &restoring.job);
    survives(restoring, node, Signal::SIGKILL);
}

#[test]
fn a_restore_survives_a_coordinator_that_stops_and_goes_on() {
    let restoring = restoring("5000", INDEXED, BUILDING);
    let node = coordinator(&restoring.demo, &restoring.job);
    survives(restoring, node, Signal::SIGSTOP);
}

#[test]
fn each_shard_gets_its_own_rows_back() {
    let demo = Demo::start(&["--nodes", "4", "--servers", "4", "--shards", "2", "--voters", "1"]);
    succeeded(&demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://1/s' WITH {WEST}, DETACHED"));
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/s' WITH new_db_name = 'copy', DETACHED";
    succeeded(&demo, 2, restore);
    for number in [1, 2] {
        let sum = |database: &str| {
            let url = demo.direct_url(number).replace("/movr?", &format!("/{database}?"));
            let query = "SELECT count(*), sum(hashtext(r::text)::numeric), min(id) FROM rides r";
            run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atc", query]))
        };
        assert_eq!(sum("copy"), sum("movr"), "shard s{number}");
    }
}

#[test]
fn all_shards_get_the_name_or_none() {
    let arguments = ["--nodes", "4", "--servers", "4", "--shards", "2", "--voters", "1", "--rows", "300"];
    let fleet = Fleet::start(&arguments);
    let demo = &fleet.demo;
    succeeded(demo, 1, &format!("BACKUP DATABASE movr INTO 'nodelocal://1/s' WITH {WEST}, DETACHED"));
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/s' WITH new_db_name = 'copy', DETACHED";
    let in_shard = |number: usize, query: &str| {
        let url = demo.direct_url(number).replace("/movr?", "/postgres?");
        run(psql(&url).args(["-v", "ON_ERROR_STOP=1", "-Atc", query]))
    };
    // Somebody takes the name in the second shard meanwhile.
    let begun = "SELECT count(*) FROM pg_database WHERE datname LIKE '\\_backhaul%'";
    let job = fleet.held(restore, "restore.after_load");
    assert_eq!((in_shard(1, begun).as_str(), in_shard(2, begun).as_str()), ("1\n", "1\n"));
    in_shard(2, "CREATE DATABASE copy");
    fleet.let_go(&job, "restore.after_load");
    let name = "SELECT oid FROM pg_database WHERE datname = 'copy'";
    let theirs = in_shard(2, name);
    let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {job}"));
    assert!(row.contains("|failed|") && row.contains("database \"copy\" already exists"), "{row}");
    assert_eq!((in_shard(1, name), in_shard(2, name)), (String::new(), theirs));
    assert_eq!((in_shard(1, begun).as_str(), in_shard(2, begun).as_str()), ("0\n", "0\n"));
    in_shard(2, "DROP DATABASE copy");
    succeeded(demo, 2, restore);
}
