//! What a client has set for its session holds for ours as for PostgreSQL's: timeouts, encoding, dates, messages.

use crate::support::demo::Demo;
use crate::support::jobs::{detached, succeeded};
use crate::support::wire::Wire;

/// A job that waits to be resumed.
fn held(demo: &Demo) -> String {
    let paused = "SET backhaul.debug_pausepoints = 'backup.after_lock'";
    let backup = "BACKUP DATABASE movr INTO 'nodelocal://1/held' WITH DETACHED";
    crate::support::run(demo.psql(1).args(["-qAt", "-c", paused, "-c", backup])).trim().to_owned()
}

#[track_caller]
fn say(wire: &mut Wire, text: &str) {
    let heard = wire.query(text).hear();
    assert!(!heard.contains("E SERROR") && heard.contains("\nZ "), "{text}: {heard}");
}

/// The server's patience with those who do nothing is shorter here than any of the waits, and longer than a busy machine
/// takes from one message to the next. All wait at once.
#[test]
fn a_session_that_waits_for_ours_is_not_idle() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--rows", "100"]);
    let job = held(&demo);
    let login = || Wire::login(&demo.nodes[1].address, "movr");
    let waits = [
        format!("SHOW JOB WHEN COMPLETE {job}"),
        format!("SHOW JOBS WHEN COMPLETE SELECT {job}"),
        format!("SHOW LOCALITY; SHOW JOB WHEN COMPLETE {job}"),
        format!("SELECT status FROM [SHOW JOB WHEN COMPLETE {job}]"),
    ];
    std::thread::scope(|scope| {
        for text in &waits {
            for (begin, setting, last) in
                [("SELECT 1", "idle_session_timeout", "Z I"), ("BEGIN", "idle_in_transaction_session_timeout", "Z E")]
            {
                scope.spawn(move || {
                    let mut wire = login();
                    say(&mut wire, "SET statement_timeout = '12s'");
                    say(&mut wire, begin);
                    say(&mut wire, &format!("SET {setting} = '5s'"));
                    let heard = wire.query(text).hear();
                    let late = "E SERROR C57014 Mcanceling statement due to statement timeout";
                    assert!(heard.ends_with(&format!("{late}\n{last}")), "{setting}: {text}: {heard}");
                    say(&mut wire, "ROLLBACK");
                });
            }
        }
        // Behind a statement of ours the session is idle again, whether it has failed or not.
        for text in ["SHOW LOCALITY", "SHOW JOBS", "SHOW JOB x"] {
            scope.spawn(move || {
                let mut wire = login();
                say(&mut wire, "SET idle_session_timeout = '5s'");
                let heard = wire.query(text).hear();
                assert!(heard.ends_with("Z I"), "{heard}");
                let heard = wire.hear();
                assert!(heard.starts_with("E SFATAL") && heard.contains("C57P05"), "{text}: {heard}");
            });
        }
    });
}

/// What it hears of ours is what it hears of the server's own rows.
#[test]
fn rows_come_in_the_client_s_encoding_and_style_of_dates() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"]);
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    say(&mut wire, "CREATE DATABASE \"größe\" TEMPLATE template0");
    let backup = "BACKUP DATABASE \"größe\" INTO 'nodelocal://1/d' WITH DETACHED";
    let job = detached(&demo, 1, backup);
    succeeded(&demo, 2, &job);
    let rows = |heard: &str| heard.lines().filter(|line| line.starts_with("D ")).map(str::to_owned).collect::<Vec<_>>();
    let (utf8, latin1) = ("gr\\xc3\\xb6\\xc3\\x9fe", "gr\\xf6\\xdfe");
    for (setting, database, is_server_s) in [
        ("client_encoding = 'UTF8'", utf8, false),
        ("client_encoding = 'LATIN1'", latin1, true),
        ("datestyle = 'SQL, DMY'", latin1, true),
        ("client_encoding = 'UTF8'", utf8, true),
        ("datestyle = 'German'", utf8, true),
        ("datestyle = 'ISO'", utf8, false),
    ] {
        say(&mut wire, &format!("SET {setting}"));
        let expected = wire.query(&format!("SELECT * FROM [SHOW JOB {job}]")).hear();
        let same = |heard: String, expected: &str| {
            let (heard, expected) = (rows(&heard), rows(expected));
            assert!(heard.len() == 1 && heard[0].contains(database), "{setting}: {heard:?}");
            assert!(heard == expected || !is_server_s, "{setting}: {heard:?}\n{expected:?}");
        };
        same(wire.query(&format!("SHOW JOB {job}")).hear(), &expected);
        let several = wire.query(&format!("SHOW LOCALITY; ;SHOW JOB {job}")).hear();
        assert!(several.starts_with("T locality:25:0\nD region=us-east-1,zone=b\nC S"), "{several}");
        same(several.lines().skip(3).collect::<Vec<_>>().join("\n"), &expected);
        for format in [0, 1] {
            let mut run = |text: &str| {
                let value: &[(i16, Option<&[u8]>)] = &[(0, Some(job.as_bytes()))];
                wire.parse("s", text).describe(b'S', "s").bind_values("", "s", value, &[format]);
                wire.describe(b'P', "").execute("", 0).close(b'S', "s").sync();
                wire.hear()
            };
            let (ours, theirs) = (run("SHOW JOB $1"), run("SELECT * FROM [SHOW JOB $1]"));
            let tag = ours.lines().rev().nth(2).unwrap_or_default();
            assert_eq!(tag, if is_server_s { "C SELECT 1" } else { "C SHOW" }, "{setting}: {ours}");
            let described = |heard: &str| heard.lines().filter(|line| line.starts_with(['t', 'T'])).collect::<String>();
            assert_eq!(described(&ours), described(&theirs), "{setting}");
            same(ours, &theirs);
        }
    }
    // As for any row with signs that the client's encoding does not have.
    say(&mut wire, "SET client_encoding = 'SJIS'");
    let heard = wire.query(&format!("SHOW JOB {job}")).hear();
    assert!(heard.contains("E SERROR C22P05") && heard.ends_with("Z I"), "{heard}");
    // What is wrong is told at the place where it stands, whoever has written the rows.
    say(&mut wire, "SET client_encoding = 'LATIN1'");
    assert_eq!(wire.query("SHOW JOBS SELECT x").hear(), "E SERROR C42703 Mcolumn \"x\" does not exist P18\nZ I");
    // Our statements are read as UTF-8, and what their errors repeat can be read by the client.
    let heard = wire.query("BACKUP DATABASE \"prüfung\" INTO 'nodelocal://1/d'").hear();
    assert!(heard.contains("\"pr?fung\"") && heard.ends_with("Z I"), "{heard}");
}

#[test]
fn a_client_that_wants_no_notices_gets_none() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--rows", "100"]);
    let job = held(&demo);
    let mut wire = Wire::login(&demo.nodes[0].address, "movr");
    say(&mut wire, "SET backhaul.progress = on");
    for (number, (least, told)) in
        [("notice", true), ("warning", false), ("error", false), ("debug1", true)].into_iter().enumerate()
    {
        say(&mut wire, &format!("SET client_min_messages = {least}"));
        let is_told = |heard: String| heard.lines().any(|line| line.starts_with("N SNOTICE"));
        let create = |extended: &str| format!("CREATE EXTERNAL CONNECTION c{extended}{number} AS 'nodelocal://1/c'");
        assert_eq!(is_told(wire.query(&create("q")).hear()), told, "{least}");
        assert_eq!(is_told(wire.parse("", &create("p")).bind("", "", 0).execute("", 0).sync().hear()), told, "{least}");
        let wait = format!("SHOW JOB WHEN COMPLETE {job}");
        if told {
            assert!(is_told(wire.query(&wait).hear_until(|tag| tag == b'N')), "{least}");
            let _canceller = wire.canceller();
            let heard = wire.hear();
            assert!(heard.ends_with("Mcanceling statement due to user request\nZ I"), "{heard}");
        } else {
            say(&mut wire, "SET statement_timeout = '1500ms'");
            let heard = wire.query(&wait).hear();
            assert!(heard.ends_with("Mcanceling statement due to statement timeout\nZ I"), "{heard}");
            assert!(!is_told(heard), "{least}");
            say(&mut wire, "SET statement_timeout = 0");
        }
    }
}

/// Python's False is a boolean, which no statement of ours asks for by itself.
#[test]
fn a_setting_may_be_given_as_what_it_is() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"]);
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    let rate = 65_536_f64.to_be_bytes();
    for (setting, oid, format, value, shown) in [
        ("feature.backup.enabled", 16, 1, b"\0".as_slice(), "false"),
        ("feature.backup.enabled", 16, 0, b"t", "true"),
        ("feature.backup.enabled", 16, 0, b"f", "false"),
        ("feature.backup.enabled", 16, 1, b"\x01", "true"),
        ("bulkio.backup.node_rate_limit", 701, 1, &rate, "64 KiB"),
        ("bulkio.backup.node_rate_limit", 1700, 0, b"131072", "128 KiB"),
        ("bulkio.backup.node_rate_limit", 20, 1, &0_i64.to_be_bytes(), "0 B"),
    ] {
        wire.parse_typed("", &format!("SET CLUSTER SETTING {setting} = $1"), &[oid]);
        wire.bind_values("", "", &[(format, Some(value))], &[]).execute("", 0).sync();
        assert_eq!(wire.hear(), "1\n2\nC SET CLUSTER SETTING\nZ I", "{setting}");
        assert_eq!(demo.ask(2, &format!("SHOW CLUSTER SETTING {setting}")), shown);
    }
}

/// What says nothing, before or behind, makes no second statement.
#[test]
fn blanks_and_comments_are_no_statements() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--rows", "100"]);
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "movr");
        for text in [
            "BACKUP DATABASE movr INTO 'nodelocal://1/b'; -- nightly",
            "; BACKUP DATABASE movr INTO 'nodelocal://1/b'; /* app */",
            "/* app */;\n;BACKUP DATABASE movr INTO 'nodelocal://1/b'",
        ] {
            let row = wire.query(text).hear();
            assert!(row.contains("|succeeded|") && row.ends_with("C BACKUP\nZ I"), "{text}: {row}");
            let row = wire.parse("", text).bind("", "", 0).execute("", 0).sync().hear();
            assert!(row.contains("|succeeded|") && row.ends_with("C BACKUP\nZ I"), "{text}: {row}");
        }
        let set = wire.query("SET CLUSTER SETTING feature.restore.enabled = true; /* on */ ").hear();
        assert_eq!(set, "C SET CLUSTER SETTING\nZ I");
        let two = wire.query(";SHOW LOCALITY; SELECT 1 AS one; -- end").hear();
        assert!(two.ends_with("C SHOW\nT one:23:0\nD 1\nC SELECT 1\nZ I"), "{two}");
    }
}
