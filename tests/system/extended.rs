//! Ours in the extended protocol: what a driver may rely on. Each test is one promise, and what keeps it elsewhere is
//! named here.
//!
//! | promise | kept by |
//! |---|---|
//! | named and unnamed statements; Parse of the unnamed one replaces it; names are taken, closed and known on the server | `wire.rs`: names; here: deallocated |
//! | Describe of statements and portals; types of parameters, the client's own included | here: types, queries |
//! | results in text and binary, by column | `wire.rs`: pipelines; here: formats; every type in binary: `drivers.rs` |
//! | row limits, PortalSuspended, the end with the transaction; the names of portals | here: portals; `wire.rs`: names; `rows.rs` |
//! | pipelines of ours and theirs answer in order, a COPY among them; Flush | `wire.rs`: pipelines, copy |
//! | an error skips up to its Sync and fails the transaction, which a pipeline may end | `wire.rs`: errors; here: queries, end |
//! | DISCARD ALL, DEALLOCATE ALL, DEALLOCATE of one, Close | here: deallocated |
//! | `statement_timeout` and cancel end a wait | here: waits; `wire.rs`: waits; `rows.rs`; `control.rs` |

use crate::support::demo::Demo;
use crate::support::wire::Wire;

fn demo() -> Demo {
    Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"])
}

#[test]
fn a_parameter_has_the_type_that_the_client_gave_it_or_its_own() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    let eight = 7_i64.to_be_bytes();
    for (types, told, format, value, end) in [
        ([].as_slice(), "20", 0, b"7".as_slice(), "C SHOW"),
        (&[0], "20", 1, &eight, "C SHOW"),
        (&[23], "23", 1, &eight[4..], "C SHOW"),
        (&[21], "21", 1, &eight[6..], "C SHOW"),
        (&[25], "25", 0, b"7", "C SHOW"),
        // Four letters are no number of four bytes.
        (&[25], "25", 1, b"1234", "C SHOW"),
        (&[25], "25", 1, b"four", "E SERROR C22P02 Minvalid input syntax for type bigint: \"four\""),
        (&[20], "20", 1, b"123", "E SERROR C22P03 Mincorrect binary data format in bind parameter"),
        (&[1700], "1700", 0, b"7", "C SHOW"),
    ] {
        wire.parse_typed("", "SHOW JOB $1", types).describe(b'S', "").flush();
        wire.bind_values("", "", &[(format, Some(value))], &[]).execute("", 0).sync();
        let heard = wire.hear();
        assert!(heard.starts_with(&format!("1\nt 1:{told}\nT job_id:20:0|")), "{types:?}: {heard}");
        assert!(heard.ends_with(&format!("\n{end}\nZ I")), "{types:?} {value:?}: {heard}");
    }
    wire.parse_typed("", "SHOW JOB $1", &[1700]).bind_values("", "", &[(1, Some(b"\0\0\0\0\0\0\0\0"))], &[]).sync();
    assert!(wire.hear().contains("C0A000"));
    wire.parse("", "SHOW JOBS VALUES ($1), ($2)")
        .bind_values("", "", &[(0, None), (1, None)], &[])
        .execute("", 0)
        .sync();
    assert_eq!(wire.hear(), "1\n2\nC SHOW\nZ I");
    assert!(wire.parse("", "SHOW JOB $2").sync().hear().contains("C42P18"));
    let heard = wire.parse("two", "SHOW JOBS VALUES ($1), ($2)").bind("", "two", 0).sync().hear();
    let count = "bind message supplies 0 parameters, but prepared statement \"two\" requires 2";
    assert_eq!(heard, format!("1\nE SERROR C08P01 M{count}\nZ I"));
}

#[test]
fn results_have_the_formats_that_were_asked_for() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    let mut row = |formats: &[i16]| {
        wire.parse("", "SHOW NODES").bind_values("", "", &[], formats).execute("", 1).sync();
        wire.hear().lines().nth(2).unwrap().split('|').map(str::to_owned).collect::<Vec<_>>()
    };
    let text = row(&[]);
    assert_eq!((text[0].as_str(), text[5].as_str()), ("D 1", "t"));
    assert_eq!(row(&[0]), text);
    let binary = row(&[1]);
    assert_eq!((binary[0].as_str(), binary[5].as_str()), ("D \\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x01", "\\x01"));
    assert_eq!(binary[2], text[2]);
    let mixed = row(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((&mixed[0], &mixed[5]), (&binary[0], &text[5]));
    let heard = wire.parse("", "SHOW NODES").bind_values("", "", &[], &[1, 0]).sync().hear();
    assert_eq!(heard, "1\nE SERROR C08P01 Mbind message has 2 result formats but query has 12 columns\nZ I");
}

#[test]
fn a_portal_is_there_until_its_transaction_ends_or_a_query_replaces_it() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        let row = |id: &str, heard: &str| heard.starts_with(&format!("D \\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x0{id}|"));
        // A row limit where the transaction is the pipeline's own, and its first piece is heard before the next is asked for.
        wire.parse("", "SHOW NODES").bind("p", "", 1).flush();
        assert_eq!(wire.hear_until(|tag| tag == b'2'), "1\n2");
        let first = wire.execute("p", 1).flush().hear_until(|tag| tag == b's');
        assert!(row("1", &first) && first.ends_with("\ns") && first.lines().count() == 2, "{first}");
        let rest = wire.execute("p", 0).flush().hear_until(|tag| tag == b'C');
        assert!(row("2", &rest) && rest.ends_with("\nC SHOW") && rest.lines().count() == 2, "{rest}");
        assert_eq!(wire.sync().hear(), "Z I");
        assert_eq!(wire.execute("p", 0).sync().hear(), "E SERROR C34000 Mportal \"p\" does not exist\nZ I");
        // A query replaces the unnamed one, and no other.
        for query in ["SELECT 1", "SHOW LOCALITY", "SELECT 1 FROM [SHOW LOCALITY]", "SELECT 1; SHOW LOCALITY"] {
            assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
            wire.parse("", "SHOW LOCALITY").bind("", "", 0).bind("p", "", 0).sync().query(query);
            assert_eq!((wire.hear().as_str(), wire.hear().lines().last()), ("1\n2\n2\nZ T", Some("Z T")), "{query}");
            assert!(wire.execute("p", 0).sync().hear().ends_with("C SHOW\nZ T"), "{query}");
            let heard = wire.execute("", 0).sync().hear();
            assert_eq!(heard, "E SERROR C34000 Mportal \"\" does not exist\nZ E", "{query}");
            assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
        }
    }
}

#[test]
fn a_portal_s_name_may_be_the_server_s() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.parse("theirs", "SELECT 1").parse("ours", "SHOW LOCALITY").sync().hear(), "1\n1\nZ I");
        for name in ["p", "Größe 'x' \"y\" \\"] {
            let quoted = name.replace('"', "\"\"");
            for how in ["DECLARE", "Bind"] {
                assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
                let taken = match how {
                    "DECLARE" => wire.query(&format!("DECLARE \"{quoted}\" CURSOR FOR SELECT 1")).hear(),
                    _ => wire.bind(name, "theirs", 0).sync().hear(),
                };
                assert!(taken.ends_with("Z T"), "{how}: {taken}");
                // Another name is free.
                assert_eq!(wire.bind("q", "ours", 0).sync().hear(), "2\nZ T", "{how}");
                let heard = wire.bind(name, "ours", 0).execute(name, 0).sync().hear();
                assert!(heard.starts_with("E SERROR C42P03 Mcursor ") && heard.ends_with("Z E"), "{how}: {heard}");
                assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
            }
            // In one pipeline, and free again behind Close.
            wire.bind(name, "theirs", 0).close(b'P', name).bind(name, "ours", 0).execute(name, 0).sync();
            assert!(wire.hear().ends_with("C SHOW\nZ I"));
            assert!(wire.bind(name, "theirs", 0).bind(name, "ours", 0).sync().hear().contains("C42P03"));
        }
    }
}

#[test]
fn a_query_that_names_jobs_has_parameters_of_the_server_s_types() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        let pause =
            "PAUSE JOBS SELECT id FROM (VALUES (1, now())) AS t (id, at) WHERE id = $2 AND at > $3 WITH REASON = $1";
        wire.parse("pause", pause).describe(b'S', "pause").sync();
        assert_eq!(wire.hear(), "1\nt 3:25:23:1184\nn\nZ I");
        let mut run = |id: i32| {
            let values: [(i16, Option<&[u8]>); 3] =
                [(0, Some(b"r")), (1, Some(&id.to_be_bytes())), (0, Some(b"epoch"))];
            wire.bind_values("p", "pause", &values, &[]).describe(b'P', "p").execute("p", 0).close(b'P', "p").sync();
            wire.hear()
        };
        assert_eq!(run(2), "2\nn\nC PAUSE JOBS 0\n3\nZ I");
        let missing = "2\nn\nE SERROR CXXUUU Mjob with ID 1 does not exist";
        assert!(run(1).starts_with(missing), "{}", run(1));
        // What fails in the query is the statement's failure, and leaves nothing behind.
        wire.parse("zero", "SHOW JOBS WHEN COMPLETE SELECT 1 / $1").describe(b'S', "zero").sync();
        assert!(wire.hear().starts_with("1\nt 1:23\nT job_id:20:0|"));
        for (value, end) in [(b"0", "E SERROR C22012 Mdivision by zero\nZ I"), (b"2", "C SHOW\nZ I")] {
            for _ in 0..2 {
                wire.bind_values("", "zero", &[(0, Some(value))], &[]).execute("", 0).sync();
                assert_eq!(wire.hear(), format!("2\n{end}"));
            }
        }
        // The types are the client's to choose here, too.
        wire.parse_typed("", "SHOW JOBS SELECT length($1)", &[25]).describe(b'S', "").sync();
        assert!(wire.hear().starts_with("1\nt 1:25\nT "));
        let left = wire.query("SELECT name FROM pg_prepared_statements WHERE name LIKE 'backhaul%'").hear();
        assert_eq!(left, "T name:25:0\nC SELECT 0\nZ I");
    }
}

#[test]
fn a_statement_that_was_deallocated_is_gone() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    let gone = |name: &str| format!("E SERROR C26000 Mprepared statement \"{name}\" does not exist\nZ I");
    for how in ["DEALLOCATE one", "DEALLOCATE ALL", "DISCARD ALL", "DO $$ BEGIN EXECUTE 'DEALLOCATE one'; END $$"] {
        wire.parse("one", "SHOW LOCALITY").parse("two", "SHOW JOBS SELECT 1").sync();
        assert_eq!(wire.hear(), "1\n1\nZ I", "{how}");
        let done = wire.query(how).hear();
        assert!(done.ends_with("Z I") && !done.starts_with('E'), "{how}: {done}");
        assert_eq!(wire.bind("", "one", 0).execute("", 0).sync().hear(), gone("one"), "{how}");
        assert_eq!(wire.describe(b'S', "one").sync().hear(), gone("one"), "{how}");
        let two = wire.bind("", "two", 0).execute("", 0).sync().hear();
        assert_eq!(two == "2\nC SHOW\nZ I", how.contains("one"), "{how}: {two}");
        assert!(wire.query("DEALLOCATE ALL").hear().ends_with("Z I"));
    }
    // The name is the server's to give: to something else, or not yet.
    wire.parse("s", "SHOW LOCALITY").sync().query("DEALLOCATE s");
    assert_eq!((wire.hear().as_str(), wire.hear().as_str()), ("1\nZ I", "C DEALLOCATE\nZ I"));
    wire.parse("s", "SELECT 3 AS three").bind("", "s", 0).execute("", 0).sync();
    assert_eq!(wire.hear(), "1\n2\nD 3\nC SELECT 1\nZ I");
    wire.parse("t", "SHOW LOCALITY").parse("t", "SELECT 3 AS three").sync();
    assert!(wire.hear().starts_with("1\nE SERROR C42P05"));
    let heard = wire.bind("", "t", 0).execute("", 0).sync().hear();
    assert!(heard.starts_with("2\nD region=us-east-1"), "{heard}");
    assert!(wire.query("DEALLOCATE ALL").hear().ends_with("Z I"));
    // Each answer of the server is about its own name, however many of ours are given away in one pipeline, ...
    wire.parse("s", "SHOW LOCALITY").parse("t", "SHOW LOCALITY").sync().query("DEALLOCATE s").query("DEALLOCATE t");
    assert_eq!([(); 3].map(|()| wire.hear()), ["1\n1\nZ I", "C DEALLOCATE\nZ I", "C DEALLOCATE\nZ I"]);
    wire.parse("s", "SELECT 3 AS three").parse("t", "SELECT 4 AS four");
    wire.bind("", "s", 0).execute("", 0).bind("", "t", 0).execute("", 0).sync();
    assert_eq!(wire.hear(), "1\n1\n2\nD 3\nC SELECT 1\n2\nD 4\nC SELECT 1\nZ I");
    assert!(wire.query("DEALLOCATE ALL").hear().ends_with("Z I"));
    // ... and whatever else is parsed in front of it.
    wire.parse("s", "SHOW LOCALITY").parse("u", "SELECT 3 AS three").parse("s", "SELECT 4 AS four").sync();
    assert!(wire.hear().starts_with("1\n1\nE SERROR C42P05"));
    let heard = wire.bind("", "s", 0).execute("", 0).bind("", "u", 0).execute("", 0).sync().hear();
    assert_eq!(heard, "2\nD region=us-east-1,zone=a\nC SHOW\n2\nD 3\nC SELECT 1\nZ I");
    assert!(wire.query("DEALLOCATE ALL").hear().ends_with("Z I"));
    // Given to something else by SQL, in one text or two.
    for how in [
        ["DEALLOCATE one", "PREPARE one AS SELECT 3 AS three"],
        ["DEALLOCATE one; PREPARE one AS SELECT 3 AS three", "SELECT 1"],
    ] {
        wire.parse("one", "SHOW LOCALITY").parse("two", "SHOW LOCALITY").sync();
        assert_eq!(wire.hear(), "1\n1\nZ I", "{how:?}");
        how.iter().for_each(|text| assert!(wire.query(text).hear().ends_with("Z I")));
        let one = wire.bind("", "one", 0).describe(b'P', "").execute("", 0).describe(b'S', "one").sync().hear();
        assert_eq!(one, "2\nT three:23:0\nD 3\nC SELECT 1\nt 0\nT three:23:0\nZ I", "{how:?}");
        let two = wire.bind("", "two", 0).execute("", 0).sync().hear();
        assert_eq!(two, "2\nD region=us-east-1,zone=a\nC SHOW\nZ I", "{how:?}");
        assert!(wire.query("DEALLOCATE ALL").hear().ends_with("Z I"));
    }
    // One that stands alone still does: the question about its name was not the client's.
    wire.parse("set", "SET CLUSTER SETTING feature.backup.enabled = true").sync().query("PREPARE p AS SELECT 1");
    assert_eq!((wire.hear().as_str(), wire.hear().as_str()), ("1\nZ I", "C PREPARE\nZ I"));
    assert_eq!(wire.bind("", "set", 0).execute("", 0).sync().hear(), "2\nC SET CLUSTER SETTING\nZ I");
    assert!(wire.query("DEALLOCATE ALL").hear().ends_with("Z I"));
    // Closed, and parsed again; a portal stays what it was.
    wire.parse("s", "SHOW LOCALITY").bind("p", "s", 0).close(b'S', "s").parse("s", "SELECT 3 AS three");
    wire.execute("p", 0).bind("", "s", 0).execute("", 0).close(b'P', "p").execute("p", 0).sync();
    let heard = wire.hear();
    let expected = "1\n2\n3\n1\nD region=us-east-1,zone=a\nC SHOW\n2\nD 3\nC SELECT 1\n3\nE SERROR C34000";
    assert!(heard.starts_with(expected), "{heard}");
    // A simple query drops the unnamed statement.
    wire.parse("", "SHOW LOCALITY").sync().query("SELECT 1 AS one");
    assert_eq!((wire.hear().as_str(), wire.hear().as_str()), ("1\nZ I", "T one:23:0\nD 1\nC SELECT 1\nZ I"));
    assert!(wire.bind("", "", 0).sync().hear().starts_with("E SERROR C26000"));
    // A portal's name is taken until it is closed.
    wire.parse("", "SHOW LOCALITY").bind("p", "", 0).bind("p", "", 0).sync();
    assert_eq!(wire.hear(), "1\n2\nE SERROR C42P03 Mcursor \"p\" already exists\nZ I");
}

#[test]
fn a_pipeline_may_end_a_transaction_that_has_failed() {
    let demo = demo();
    let backup = "BACKUP DATABASE postgres INTO 'nodelocal://1/p' WITH DETACHED";
    for (node, zone) in demo.nodes.iter().zip(["a", "b"]) {
        let mut wire = Wire::login(&node.address, "postgres");
        let begin = |wire: &mut Wire| {
            assert_eq!(wire.query("BEGIN; SAVEPOINT a").hear(), "C BEGIN\nC SAVEPOINT\nZ T");
            wire.parse("empty", "").bind("empty", "empty", 0).close(b'S', "empty").sync();
            assert_eq!(wire.hear(), "1\n2\n3\nZ T");
            assert!(wire.query("SELECT nothing").hear().ends_with("Z E"));
        };
        for (end, status) in [("ROLLBACK", "I"), ("COMMIT", "I"), ("ROLLBACK TO a", "T"), ("ROLLBACK AND CHAIN", "T")] {
            begin(&mut wire);
            wire.parse("", end).bind("", "", 0).execute("", 0);
            wire.parse("", "SHOW LOCALITY").bind("", "", 0).execute("", 0);
            wire.parse("", backup).bind("", "", 0).execute("", 0).sync();
            let heard = wire.hear();
            let is_id = |value: &&str| value.parse::<i64>().is_ok();
            let job = heard.lines().filter_map(|line| line.strip_prefix("D ")).find(is_id).unwrap_or_default();
            let locality = format!("D region=us-east-1,zone={zone}\nC SHOW");
            let expected = format!("1\n2\nC ROLLBACK\n1\n2\n{locality}\n1\n2\nD {job}\nC BACKUP\nZ {status}");
            assert_eq!(heard, expected, "{end}");
            if status == "T" {
                assert_eq!(wire.query("COMMIT").hear(), "C COMMIT\nZ I", "{end}");
            }
            let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {job}"));
            assert!(row.contains("|succeeded|"), "{end}: {row}");
        }
        // Nothing else ends it: not an empty statement, which may be executed in it, and not an error of ours.
        begin(&mut wire);
        let refused =
            "E SERROR C25P02 Mcurrent transaction is aborted, commands ignored until end of transaction block";
        wire.execute("empty", 0).parse("", "SHOW LOCALITY").bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear(), format!("I\n{refused}\nZ E"));
        wire.parse("", "SHOW LOCALITY").parse("", "ROLLBACK").bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear(), format!("{refused}\nZ E"));
        assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
    }
}

#[test]
fn a_wait_in_the_extended_protocol_can_be_cancelled_and_has_its_time() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1"]);
    let paused = "SET backhaul.debug_pausepoints = 'backup.after_lock'";
    let backup = "BACKUP DATABASE movr INTO 'nodelocal://1/w' WITH DETACHED";
    let output = demo.psql(1).args(["-qAt", "-c", paused, "-c", backup]).output().unwrap();
    let job = String::from_utf8(output.stdout).unwrap();
    let job = job.trim();
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    assert_eq!(wire.parse("wait", "SHOW JOB WHEN COMPLETE $1").sync().hear(), "1\nZ I");
    let id: i64 = job.parse().unwrap();
    let wait = |wire: &mut Wire| {
        wire.bind_values("", "wait", &[(1, Some(&id.to_be_bytes()))], &[1]).execute("", 0);
        wire.parse("", "SELECT 1").sync();
    };
    let canceller = wire.canceller();
    wait(&mut wire);
    let heard = wire.hear();
    assert!(heard.ends_with("E SERROR C57014 Mcanceling statement due to user request\nZ I"), "{heard}");
    drop(canceller);
    let mut set = || wire.query("SET statement_timeout = '2s'").hear();
    assert!(set() == "C SET\nZ I" || set() == "C SET\nZ I");
    wait(&mut wire);
    assert_eq!(wire.hear(), "2\nE SERROR C57014 Mcanceling statement due to statement timeout\nZ I");
    assert_eq!(wire.query("SET statement_timeout = 0").hear(), "C SET\nZ I");
    wait(&mut wire);
    assert_eq!(wire.hear_until(|tag| tag == b'2'), "2");
    assert_eq!(demo.ask(1, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
    let heard = wire.hear();
    assert!(heard.starts_with("D ") && heard.contains("canceled") && heard.ends_with("C SHOW\n1\nZ I"), "{heard}");
}
