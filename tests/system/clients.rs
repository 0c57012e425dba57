//! psql and PostgreSQL's own programs, through every node, against what the server itself answers.

use std::io::Write as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::{Demo, directory};
use crate::support::{both, postgres_program, run, until};

/// What a user may do in psql. Prints the same each time it is run on the same data.
const SESSION: &str = r#"
\set ON_ERROR_STOP 0
\set VERBOSITY verbose
\d
\dt+ users
\d rides
\d+ vehicles
\dn+
\df
\dT+
\l movr
\du root
SELECT 1 AS "é", NULL AS n, 'a' \gdesc
SELECT * FROM users ORDER BY id LIMIT 5;
\x on
SELECT * FROM vehicles ORDER BY id LIMIT 2;
\x off
SELECT 1/0;
SELECT * FORM users;
SELECT unknown_column FROM rides;
BEGIN; SELECT 1/0; SELECT 1; ROLLBACK;
BEGIN; CREATE TEMPORARY TABLE t (i int, t text);
\copy t FROM stdin
1	one
2	zwei é
\.
\copy (SELECT * FROM t ORDER BY i) TO stdout WITH (FORMAT csv, HEADER)
COPY t TO stdout;
SAVEPOINT s; INSERT INTO t VALUES ('x'); ROLLBACK TO s; SELECT count(*) FROM t; COMMIT;
LISTEN news;
NOTIFY news, 'payload';
SELECT 1 AS after_notify;
DO $$ BEGIN RAISE NOTICE 'a notice'; RAISE WARNING 'a warning'; END $$;
PREPARE p (int) AS SELECT $1 + 1; EXECUTE p (41);
DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 10); FETCH 3 FROM c; CLOSE c;
\set FETCH_COUNT 100
SELECT sum(i) FROM generate_series(1, 1000) i;
SELECT repeat('x', 3) FROM generate_series(1, 250);
\unset FETCH_COUNT
\o /dev/null
\lo_import 'FILE' 'a comment'
\o
SELECT length(lo_get(:LASTOID)), md5(lo_get(:LASTOID));
\o /dev/null
\lo_unlink :LASTOID
\o
\encoding LATIN1
SELECT 'latin' || chr(233) AS latin;
SELECT name FROM users WHERE name LIKE 'Zo%' LIMIT 1;
SELECT name FROM users WHERE name LIKE '%🛵%' LIMIT 1;
\encoding UTF8
SELECT 1; SELECT 2 \; SELECT 3;
SET backhaul.note = 'mine'; SHOW backhaul.note; SHOW server_version; SHOW locality_of_nothing;
"#;

fn session(mut psql: Command, script: &str) -> String {
    psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = psql.spawn().unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    // A notification names the process of its sender, which differs from session to session.
    let text = output.stdout.escape_ascii().to_string() + &output.stderr.escape_ascii().to_string();
    text.replace("\\n", "\n")
        .lines()
        .map(|line| match line.split_once("from server process with PID") {
            Some((before, _)) => before,
            None => line,
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn psql_gets_the_server_s_own_answers() {
    let demo = Demo::start(&[]);
    let file = demo.dir.path().join("lo");
    std::fs::write(&file, "large \u{e9} ".repeat(20_000)).unwrap();
    let script = SESSION.replace("FILE", &file.to_string_lossy());
    let expected = session(demo.psql_direct(1), &script);
    for word in
        ["division by zero", "payload", "a notice", "zwei", "latin\\xe9", "22P02", "LINE 1: SELECT * FORM users"]
    {
        assert!(expected.contains(word), "the script itself is broken: {word}\n{expected}");
    }
    for number in 1..=4 {
        let seen = session(demo.psql(number), &script);
        let differs = seen.lines().zip(expected.lines()).find(|(seen, expected)| seen != expected);
        assert!(seen == expected, "through node {number}: {differs:?}");
    }
}

#[test]
fn dumps_benchmarks_and_base_backups_go_through() {
    let demo = Demo::start(&[]);
    let dump = |url: &str| run(postgres_program("pg_dump").args(["--restrict-key=x", "-d", url]));
    let expected = dump(&demo.direct_url(1));
    let scratch = directory();
    run(postgres_program("pgbench").args(["-i", "-q", "-s", "1", &demo.nodes[0].url]).stderr(Stdio::null()));
    for (index, node) in demo.nodes.iter().enumerate() {
        let archive = scratch.path().join(format!("{index}.dump"));
        run(postgres_program("pg_dump").args(["-Fc", "--exclude-table=pgbench*", "-d", &node.url, "-f"]).arg(&archive));
        let mut restored = postgres_program("pg_restore");
        restored.args(["--restrict-key=x", "-f", "-"]).arg(&archive);
        let data =
            |dump: String| dump.lines().filter(|line| !line.starts_with("--")).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(data(run(&mut restored)), data(expected.clone()), "through node {}", index + 1);
        for mode in ["simple", "extended", "prepared"] {
            let report =
                run(postgres_program("pgbench").args(["-n", "-M", mode, "-c", "4", "-j", "2", "-t", "40", &node.url]));
            assert!(report.contains("number of transactions actually processed: 160/160"), "{report}");
        }
        let base = scratch.path().join(format!("base{index}"));
        run(postgres_program("pg_basebackup").args(["-c", "fast", "-X", "stream", "-d", &node.url, "-D"]).arg(&base));
        run(postgres_program("pg_verifybackup").arg(&base));
    }
}

#[test]
fn ctrl_c_cancels_through_every_node() {
    let demo = Demo::start(&[]);
    for number in 1..=4 {
        let mut psql = demo.psql(number);
        psql.env("PGAPPNAME", format!("sleeper{number}")).args(["-c", "SELECT pg_sleep(300)"]);
        let child = psql.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("the statement to run", || {
            let query = format!(
                "SELECT state FROM pg_stat_activity WHERE application_name = 'sleeper{number}' AND query LIKE '%pg_sleep%'"
            );
            let seen = both(&demo.psql_direct(1).args(["-Atc", &query]).output().unwrap());
            if seen.trim() == "active" { Ok(()) } else { Err(seen) }
        });
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        let said = both(&child.wait_with_output().unwrap());
        assert!(said.contains("ERROR:  canceling statement due to user request"), "node {number}: {said}");
    }
}

#[test]
fn a_client_may_ask_for_the_server_beside_the_node() {
    let demo = Demo::start(&[]);
    let local = |number: usize, target: &str| {
        let mut psql = demo.psql(number);
        psql.env("PGOPTIONS", format!("-c backhaul.target={target}"));
        both(&psql.args(["-Atc", "SELECT pg_is_in_recovery()"]).output().unwrap()).trim().to_owned()
    };
    assert_eq!((1..=3).map(|number| local(number, "local")).collect::<Vec<_>>(), ["f", "t", "t"]);
    assert_eq!((1..=4).map(|number| local(number, "leaseholder")).collect::<Vec<_>>(), ["f", "f", "f", "f"]);
    assert!(local(4, "local").contains("node 4 has no PostgreSQL server of its own"));
    assert!(local(1, "moon").contains("invalid value for parameter \"backhaul.target\": \"moon\""));
}
