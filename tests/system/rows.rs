//! SHOW as a row source, where SQL cannot look: prepared texts, pipelines, positions, cancel. What SQL can see is in
//! `sql-fixtures/rows/`.

use crate::support::both;
use crate::support::demo::{Demo, directory};
use crate::support::wire::Wire;

/// What of a job is shown.
const JOB: &str = "job_id|bigint job_type|text description|text statement|text user_name|text status|text \
         running_status|text created|timestamp started|timestamp finished|timestamp modified|timestamp \
         fraction_completed|double error|text coordinator_id|bigint trace_id|bigint last_run|timestamp \
         next_run|timestamp num_runs|bigint execution_errors|text[]";

/// The answers' columns with their types (`timestamp` is without a time zone), as docs and reference name them.
const COLUMNS: [(&str, &str); 20] = [
    ("SHOW LOCALITY", "locality|text"),
    (
        "SHOW NODES",
        "node_id|bigint address|text locality|text shard|text role|text is_live|boolean is_reachable|boolean \
         build|text started_at|timestamptz updated_at|timestamptz timeline|bigint lsn|text",
    ),
    (
        "SHOW REGIONS",
        "region|text zones|text[] database_names|text[] primary_region_of|text[] secondary_region_of|text[]",
    ),
    ("SHOW REGIONS FROM CLUSTER", "region|text zones|text[]"),
    (
        "SHOW RANGES FROM DATABASE movr",
        "start_key|text end_key|text range_id|bigint replicas|bigint[] replica_localities|text[] \
         voting_replicas|bigint[] non_voting_replicas|bigint[] learner_replicas|bigint[] \
         split_enforced_until|timestamptz",
    ),
    (
        "SHOW RANGES FROM TABLE users WITH DETAILS",
        "start_key|text end_key|text range_id|bigint range_size_mb|double lease_holder|bigint \
         lease_holder_locality|text replicas|bigint[] replica_localities|text[] voting_replicas|bigint[] \
         non_voting_replicas|bigint[] learner_replicas|bigint[] split_enforced_until|timestamptz \
         range_size|bigint",
    ),
    ("SHOW JOBS", JOB),
    ("SHOW JOB 1", JOB),
    ("SHOW JOB WHEN COMPLETE 1", JOB),
    ("SHOW BACKUPS IN 'nodelocal://1/b'", "path|text"),
    (
        "SHOW BACKUP FROM LATEST IN 'nodelocal://1/b'",
        "database_name|text parent_schema_name|text object_name|text object_type|text backup_type|text \
         start_time|timestamp end_time|timestamp size_bytes|bigint rows|bigint is_full_cluster|boolean \
         regions|text",
    ),
    (
        "SHOW BACKUP SCHEMAS FROM LATEST IN 'nodelocal://1/b'",
        "database_name|text parent_schema_name|text object_name|text object_type|text backup_type|text \
         start_time|timestamp end_time|timestamp size_bytes|bigint rows|bigint is_full_cluster|boolean \
         create_statement|text regions|text",
    ),
    (
        "SHOW BACKUP FROM LATEST IN 'nodelocal://1/b' WITH check_files",
        "database_name|text parent_schema_name|text object_name|text object_type|text backup_type|text \
         start_time|timestamp end_time|timestamp size_bytes|bigint rows|bigint is_full_cluster|boolean \
         regions|text file_bytes|bigint",
    ),
    ("SHOW BACKUP FROM LATEST IN 'nodelocal://1/b' WITH as_json", "manifest|text"),
    (
        "SHOW BACKUP FILES FROM LATEST IN 'nodelocal://1/b'",
        "path|text backup_type|text start_pretty|text end_pretty|text start_key|text end_key|text \
         size_bytes|bigint rows|bigint locality|text file_bytes|bigint",
    ),
    ("SHOW EXTERNAL CONNECTION a", "connection_name|text connection_uri|text connection_type|text"),
    ("SHOW EXTERNAL CONNECTIONS", "connection_name|text connection_uri|text connection_type|text"),
    ("SHOW CLUSTER SETTING feature.backup.enabled", "feature.backup.enabled|text"),
    (
        "SHOW CLUSTER SETTINGS",
        "variable|text value|text setting_type|text description|text default_value|text origin|text",
    ),
    ("SHOW ALL BACKHAUL SETTINGS", "name|text value|text default_value|text scope|text description|text"),
];

fn demo() -> Demo {
    Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"])
}

/// Where a text has something, as an error tells it.
fn place(text: &str, what: &str) -> usize {
    1 + text[..text.find(what).unwrap()].chars().count()
}

/// Query, in whichever encoding.
fn query(text: &[u8]) -> Vec<u8> {
    let length = u32::try_from(4 + text.len() + 1).unwrap().to_be_bytes();
    [b"Q", &length[..], text, b"\0"].concat()
}

#[test]
fn a_prepared_text_with_row_sources_is_like_any_other() {
    let demo = demo();
    for (node, zone) in demo.nodes.iter().zip(["a", "b"]) {
        let mut wire = Wire::login(&node.address, "postgres");
        let text = "SELECT j.status, $2::int + 1 AS two, l.locality FROM (SELECT 1) AS one \
                    LEFT JOIN [SHOW JOB $1] AS j ON true, [SHOW LOCALITY] AS l";
        wire.parse("s", text).describe(b'S', "s").parse("theirs", "SELECT 5 AS five").sync();
        assert_eq!(wire.hear(), "1\nt 2:20:23\nT status:25:0|two:23:0|locality:25:0\n1\nZ I");
        // The types are the client's to choose, and values come in any format.
        for _ in 0..2 {
            wire.bind_values("", "s", &[(1, Some(&7_i64.to_be_bytes())), (0, Some(b"1"))], &[0, 1, 0]);
            wire.describe(b'P', "").execute("", 0).bind("", "theirs", 0).execute("", 0);
        }
        let row = format!("D NULL|\\x00\\x00\\x00\\x02|region=us-east-1,zone={zone}");
        let cycle = format!("2\nT status:25:0|two:23:1|locality:25:0\n{row}\nC SELECT 1\n2\nD 5\nC SELECT 1\n");
        assert_eq!(wire.sync().hear(), format!("{}Z I", cycle.repeat(2)));
        // Row limits.
        let two = "SELECT node_id FROM [SHOW NODES] ORDER BY 1";
        wire.parse("", two).bind("p", "", 0).execute("p", 1).execute("p", 1).execute("p", 1).close(b'P', "p");
        assert_eq!(wire.sync().hear(), "1\n2\nD 1\ns\nD 2\ns\nC SELECT 0\n3\nZ I");
        // Of a simple query nothing is left behind, nor of all this.
        assert_eq!(wire.query("COPY (SELECT 'é' FROM [SHOW LOCALITY]) TO STDOUT").hear(), "H\nd\nc\nC COPY 1\nZ I");
        let left = wire.query("SELECT name FROM pg_prepared_statements ORDER BY 1").hear();
        assert_eq!(left, "T name:25:0\nD s\nD theirs\nC SELECT 2\nZ I");
        // By SQL it could only give rows of another time.
        let executed = wire.query("EXECUTE s(1, 2)").hear();
        assert!(executed.contains("C22P02 Minvalid input syntax for type json"), "{executed}");
        assert!(
            wire.bind("", "s", 0)
                .sync()
                .hear()
                .contains("C08P01 Mbind message supplies 0 parameters, but prepared statement \"s\" requires 2")
        );
        // Names are the server's, and go as they do there.
        assert_eq!(wire.query("DEALLOCATE s").hear(), "C DEALLOCATE\nZ I");
        let gone = "E SERROR C26000 Mprepared statement \"s\" does not exist\nZ I";
        assert_eq!(wire.bind("", "s", 0).sync().hear(), gone);
        assert_eq!(wire.parse("s", text).close(b'S', "s").sync().hear(), "1\n3\nZ I");
        assert_eq!(wire.bind("", "s", 0).sync().hear(), gone);
        assert!(wire.parse("theirs", two).sync().hear().contains("C42P05"));
        // The unnamed one belongs to whoever was parsed last.
        wire.parse("", two).parse("", "SHOW LOCALITY").parse("", "SELECT 7 AS seven").bind("", "", 0).execute("", 0);
        assert_eq!(wire.sync().hear(), "1\n1\n1\n2\nD 7\nC SELECT 1\nZ I");
        assert!(wire.parse("", "SELECT 1; SELECT 2 FROM [SHOW NODES]").sync().hear().contains("C42601"));
    }
}

#[test]
fn an_error_points_at_the_client_s_own_text() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    let text = "SELECT 'é' FROM [SHOW LOCALITY] l, [SHOW NODES] AS n WHERE nothing = 1";
    let expected = format!("E SERROR C42703 Mcolumn \"nothing\" does not exist P{}", place(text, "nothing"));
    assert_eq!(wire.query(text).hear(), format!("{expected}\nZ I"));
    assert_eq!(wire.parse("", text).sync().hear(), format!("{expected}\nZ I"));
    let inner = "SELECT 1 FROM [SHOW JOBS SELECT x FROM [SHOW JOBS] j WHERE nothing = 1]";
    let expected = format!("E SERROR C42703 Mcolumn \"x\" does not exist P{}", place(inner, "x FROM"));
    assert_eq!(wire.query(inner).hear(), format!("{expected}\nZ I"));
    assert_eq!(wire.parse("", inner).sync().hear(), format!("{expected}\nZ I"));
    let deeper = "WITH é AS (SHOW JOBS SELECT job_id FROM [SHOW JOBS SELECT 1 AS é FROM pg_class c, y]) TABLE é";
    let expected = format!("E SERROR C42P01 Mrelation \"y\" does not exist P{}\nZ I", place(deeper, "y]"));
    assert_eq!(wire.parse("", deeper).sync().hear(), expected);
    assert_eq!(wire.query(deeper).hear(), expected);
    let named = "SHOW JOBS SELECT nothing";
    let expected = format!("E SERROR C42703 Mcolumn \"nothing\" does not exist P{}\nZ I", place(named, "nothing"));
    assert_eq!(wire.query(named).hear(), expected);
    assert_eq!(wire.parse("", named).sync().hear(), expected);
    let ours = "SELECT 1 FROM [SHOW LOCALITY] l, [SHOW JOB *]";
    let expected = format!("E SERROR C42601 Mat or near \"*\": syntax error P{}\nZ I", place(ours, "*]"));
    assert_eq!(wire.query(ours).hear(), expected);
    assert_eq!(wire.parse("", ours).sync().hear(), expected);

    // What was sound when it was prepared; and then the next one is not disturbed.
    let late = "SELECT l.locality FROM [SHOW LOCALITY] l, t";
    assert!(wire.query("CREATE TEMPORARY TABLE t AS SELECT 1").hear().ends_with("Z I"));
    assert_eq!(wire.parse("late", late).sync().hear(), "1\nZ I");
    assert!(wire.query("ALTER TABLE t RENAME TO u").hear().ends_with("Z I"));
    let expected = format!("E SERROR C42P01 Mrelation \"t\" does not exist P{}\nZ I", late.len());
    assert_eq!(wire.bind("", "late", 0).execute("", 0).sync().hear(), expected);
    assert!(wire.query("ALTER TABLE u RENAME TO t").hear().ends_with("Z I"));
    let row = "2\nD region=us-east-1,zone=b\nC SELECT 1\nZ I";
    assert_eq!(wire.bind("", "late", 0).execute("", 0).sync().hear(), row);
    let zero = "SELECT 1 / $1 FROM [SHOW LOCALITY] WHERE 1 / $1 > 0";
    wire.parse("zero", zero)
        .bind_values("", "zero", &[(0, Some(b"0"))], &[])
        .execute("", 0)
        .parse("", "SELECT 1")
        .sync();
    assert_eq!(wire.hear(), "1\nE SERROR C22012 Mdivision by zero\nZ I");
    wire.bind_values("", "zero", &[(0, Some(b"1"))], &[]).execute("", 0).sync();
    assert_eq!(wire.hear(), "2\nD 1\nC SELECT 1\nZ I");
    wire.bind_values("", "zero", &[(0, Some(b"x"))], &[]).execute("", 0).sync();
    assert!(wire.hear().starts_with("E SERROR C22P02"));
    assert_eq!(wire.bind("", "late", 0).execute("", 0).sync().hear(), row);
}

#[test]
fn transactions_pipelines_and_encodings_are_the_server_s() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    let locality = "SELECT locality FROM [SHOW LOCALITY]";
    assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
    let row = "T locality:25:0\nD region=us-east-1,zone=a\nC SELECT 1";
    assert_eq!(wire.query(locality).hear(), format!("{row}\nZ T"));
    assert!(wire.query("SELECT 1 FROM [SHOW JOB x]").hear().ends_with("Z E"));
    let failed = "E SERROR C25P02 Mcurrent transaction is aborted, commands ignored until end of transaction block";
    assert_eq!(wire.query(locality).hear(), format!("{failed}\nZ E"));
    assert_eq!(wire.parse("", locality).sync().hear(), format!("{failed}\nZ E"));
    assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");

    // Queries sent at once are answered in order, and an error in one is nobody else's.
    wire.query(locality).query("SELECT nothing").query("SHOW LOCALITY").query("SELECT 2 AS two").query(locality);
    assert_eq!(wire.hear(), format!("{row}\nZ I"));
    assert_eq!(wire.hear(), "E SERROR C42703 Mcolumn \"nothing\" does not exist P8\nZ I");
    assert_eq!(wire.hear(), "T locality:25:0\nD region=us-east-1,zone=a\nC SHOW\nZ I");
    assert_eq!(wire.hear(), "T two:23:0\nD 2\nC SELECT 1\nZ I");
    assert_eq!(wire.hear(), format!("{row}\nZ I"));
    // After an error nothing is run up to its Sync.
    wire.parse("", "SELECT 1/0")
        .bind("", "", 0)
        .execute("", 0)
        .parse("x", locality)
        .bind("", "x", 0)
        .execute("", 0)
        .sync();
    assert_eq!(wire.hear(), "1\nE SERROR C22012 Mdivision by zero\nZ I");
    wire.parse("x", "SELECT 1 FROM [SHOW JOB 1 2]").bind("", "x", 0).execute("", 0).parse("y", "SELECT 1").sync();
    assert!(wire.hear().starts_with("E SERROR C42601"));
    assert_eq!(wire.query("SELECT count(*) FROM pg_prepared_statements").hear(), "T count:20:0\nD 0\nC SELECT 1\nZ I");

    let long = wire.query(&format!("{locality} /* {} */", "x".repeat(100_000))).hear();
    assert!(long.starts_with("E SERROR C53400") && long.ends_with("Z I"), "{long}");
    assert_eq!(wire.query("SET client_encoding = LATIN1").hear(), "C SET\nZ I");
    let not_utf8 = wire.send(&query(b"SELECT '\xe9' FROM [SHOW LOCALITY] AS l")).hear();
    assert!(not_utf8.starts_with("E SERROR C22021") && not_utf8.ends_with("Z I"), "{not_utf8}");
    let theirs = wire.send(&query(b"SELECT '\xe9 FROM [SHOW LOCALITY] x'")).hear();
    assert!(theirs.contains("D \\xe9 FROM [SHOW LOCALITY] x"), "{theirs}");
    // In this encoding the letter's second byte is a backslash, which would hide the end of the literal.
    assert_eq!(wire.query("SET client_encoding = SJIS").hear(), "C SET\nZ I");
    let theirs = wire.send(&query(b"SELECT E'\x83\\' AS so -- ' FROM [SHOW LOCALITY] x; BACKUP")).hear();
    assert_eq!(theirs, "T so:25:0\nD \\x83\\\\\nC SELECT 1\nZ I");
    let theirs = wire.send(&query(b"SELECT E'\x83\\' AS so; SELECT 2 -- '; SHOW LOCALITY")).hear();
    assert!(theirs.starts_with("T so:25:0\n") && theirs.ends_with("D 2\nC SELECT 1\nZ I"), "{theirs}");
    assert_eq!(wire.query(locality).hear(), format!("{row}\nZ I"));
    assert_eq!(wire.query("SET client_encoding = UTF8").hear(), "C SET\nZ I");
    // What was read when a backslash was one.
    let slash = r"SELECT locality || '\' AS l FROM [SHOW LOCALITY]";
    assert_eq!(wire.parse("slash", slash).parse("plain", locality).sync().hear(), "1\n1\nZ I");
    let l = "2\nD region=us-east-1,zone=a\\\\\nC SELECT 1\nZ I";
    assert_eq!(wire.bind("", "slash", 0).execute("", 0).sync().hear(), l);
    assert_eq!(wire.query("SET standard_conforming_strings = off").hear(), "C SET\nZ I");
    assert!(wire.bind("", "slash", 0).execute("", 0).sync().hear().starts_with("E SERROR C0A000"));
    let plain = wire.bind("", "plain", 0).execute("", 0).sync().hear();
    assert_eq!(plain, "2\nD region=us-east-1,zone=a\nC SELECT 1\nZ I");
    assert!(wire.query(locality).hear().contains("C42601"), "texts cannot be read safely now");
}

#[test]
fn a_wait_in_a_row_source_ends_when_it_is_cancelled_or_takes_too_long() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1"]);
    // It pauses, and never ends by itself.
    let paused = "SET backhaul.debug_pausepoints = 'backup.after_lock'";
    let backup = "BACKUP DATABASE movr INTO 'nodelocal://1/w' WITH DETACHED";
    let output = demo.psql(1).args(["-qAt", "-c", paused, "-c", backup]).output().unwrap();
    let job = String::from_utf8(output.stdout).unwrap();
    let wait = format!("SELECT status FROM [SHOW JOB WHEN COMPLETE {}]", job.trim());
    let cancelled = "E SERROR C57014 Mcanceling statement due to user request\nZ I";
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        let canceller = wire.canceller();
        assert_eq!(wire.query(&wait).hear(), cancelled);
        let heard = wire.parse("w", &wait).bind("", "w", 0).execute("", 0).sync().hear();
        // It may have come between two steps.
        assert!(heard.ends_with(cancelled), "{heard}");
        drop(canceller);
        // While a query that names jobs runs on the server, that is where it is cancelled.
        let naming = "SELECT 1 FROM [SHOW JOBS SELECT 1 FROM pg_sleep(600)]";
        let canceller = wire.canceller();
        assert_eq!(wire.query(naming).hear(), cancelled);
        let heard = wire.parse("n", naming).bind("", "n", 0).execute("", 0).sync().hear();
        assert!(heard.ends_with(cancelled), "{heard}");
        drop(canceller);
        // The last request may have come after its statement.
        let mut usable = || wire.parse("late", &wait).sync().hear();
        assert!(usable() == "1\nZ I" || usable() == "1\nZ I");
        assert_eq!(wire.query("SET statement_timeout = '1s'").hear(), "C SET\nZ I");
        let late = "E SERROR C57014 Mcanceling statement due to statement timeout\nZ I";
        assert_eq!(wire.query(&wait).hear(), late);
        assert_eq!(wire.bind("", "late", 0).execute("", 0).sync().hear(), late);
        assert_eq!(wire.query(naming).hear(), late);
        assert_eq!(wire.query("SET statement_timeout = 0").hear(), "C SET\nZ I");
        assert_eq!(wire.query("SELECT 1 AS one").hear(), "T one:23:0\nD 1\nC SELECT 1\nZ I");
    }
    demo.ask(1, &format!("CANCEL JOB {}", job.trim()));
}

/// What each answer is called, as the documentation does; the same in brackets as alone.
#[test]
fn every_answer_has_its_columns_alone_and_as_a_row_source() {
    let demo = Demo::start(&["--nodes", "1", "--rows", "10"]);
    let dir = directory();
    for (statement, expected) in COLUMNS {
        let file = dir.path().join("described.sql");
        std::fs::write(&file, format!("{statement} \\gdesc\nSELECT * FROM [{statement}] AS shown \\gdesc\n")).unwrap();
        let described = both(&demo.psql(1).arg("-At").arg("-f").arg(&file).output().unwrap());
        let expected: Vec<&str> = expected.split_whitespace().collect();
        let mut of_psql = described.replace("timestamp without time zone", "timestamp").replace(" precision", "");
        of_psql = of_psql.replace("timestamp with time zone", "timestamptz");
        assert_eq!(of_psql.lines().collect::<Vec<_>>(), expected.repeat(2), "{statement}");
    }
}
