//! What SQL cannot see: frames, the order of messages, transactions that ours stand in, cancel.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::Demo;
use crate::support::wire::Wire;
use crate::support::{DEADLINE, until};

fn demo() -> Demo {
    Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"])
}

/// What a connection answers to raw bytes, up to its end.
fn answer_to(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut heard = Vec::new();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut heard);
    heard.escape_ascii().to_string()
}

#[test]
fn packets_that_lie_are_refused_and_harm_nobody() {
    let demo = demo();
    for node in &demo.nodes {
        for (what, bytes, words) in [
            ("oversized startup", [0, 1, 0, 0, 0, 3, 0, 0].as_slice(), "08P01\\x00Minvalid length of startup packet"),
            ("tiny startup", &[0, 0, 0, 5], "08P01\\x00Minvalid length of startup packet"),
            (
                "startup without its end",
                &[0, 0, 0, 12, 0, 3, 0, 0, b'u', b's', b'e', b'r'],
                "08P01\\x00Minvalid startup packet layout",
            ),
            (
                "plain text behind a TLS request",
                &[0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f, 0, 0, 0, 16, 0, 3, 0, 0, b'u', b's', b'e', b'r', 0, b'r', 0, 0],
                "08P01\\x00Mreceived unencrypted data after SSL request",
            ),
            ("protocol 4.0", &[0, 0, 0, 8, 0, 4, 0, 0], "0A000\\x00Munsupported frontend protocol 4.0"),
            ("a greeting of HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "08P01"),
            (
                "a hop that is none",
                &[0, 0, 0, 9, 4, 0xd2, 0x16, 0xf4, b'{'],
                "08P01\\x00Minvalid startup packet layout",
            ),
        ] {
            let heard = answer_to(&node.address, bytes);
            assert!(heard.contains(words), "{what}: {heard}");
        }
        for (what, bytes) in [
            ("a length below four", [b'Q', 0, 0, 0, 3].as_slice()),
            ("a length of two gigabytes", &[b'Q', 0x7f, 0xff, 0xff, 0xff]),
        ] {
            let mut wire = Wire::login(&node.address, "postgres");
            let heard = wire.send(bytes).hear();
            assert!(heard.starts_with("E SFATAL") && heard.contains("C08P01"), "{what}: {heard}");
        }
        // An early end, at any byte of a startup packet.
        drop(TcpStream::connect(&node.address).unwrap());
        TcpStream::connect(&node.address).unwrap().write_all(&[0, 0, 0, 50, 0, 3]).unwrap();
        assert_eq!(
            Wire::login(&node.address, "postgres").query("SELECT 1").hear(),
            "T ?column?:23:0\nD 1\nC SELECT 1\nZ I"
        );
    }
}

#[test]
fn ours_look_like_postgresql_s_in_the_simple_protocol() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    let locality = "T locality:25:0\nD region=us-east-1,zone=b\nC SHOW";
    assert_eq!(wire.query("SHOW LOCALITY").hear(), format!("{locality}\nZ I"));
    assert_eq!(wire.query("show locality; ; /* and */ SHOW LOCALITY;").hear(), format!("{locality}\n{locality}\nZ I"));
    assert_eq!(wire.query("SHOW LOCALITY x").hear(), "E SERROR C42601 Mat or near \"x\": syntax error P15\nZ I");
    let mixed = wire.query("SHOW LOCALITY; SELECT 1").hear();
    assert_eq!(mixed, format!("{locality}\nT ?column?:23:0\nD 1\nC SELECT 1\nZ I"));
    let long = wire.query(&format!("SHOW LOCALITY /* {} */", "x".repeat(100_000))).hear();
    assert!(long.starts_with("E SERROR C53400") && long.ends_with("Z I"), "{long}");
    let not_utf8 = wire.send(b"Q\0\0\0\x16SHOW LOCALITY '\xe9'\0").hear();
    assert!(not_utf8.starts_with("E SERROR C22021") && not_utf8.ends_with("Z I"), "{not_utf8}");
    // Near misses are PostgreSQL's to judge.
    assert!(wire.query("SHOW locality_of").hear().contains("C42704"));
    assert!(wire.query("SELECT 'SHOW LOCALITY'").hear().contains("D SHOW LOCALITY"));
    assert_eq!(wire.query("SET standard_conforming_strings = off").hear(), "C SET\nZ I");
    assert!(wire.query("SHOW LOCALITY").hear().contains("C42704"), "texts cannot be read safely now");
}

#[test]
fn an_error_of_ours_fails_the_transaction() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
        assert!(wire.query("SHOW LOCALITY").hear().ends_with("C SHOW\nZ T"));
        assert_eq!(wire.query("SHOW LOCALITY x").hear(), "E SERROR C42601 Mat or near \"x\": syntax error P15\nZ E");
        for text in ["SELECT 1", "SHOW LOCALITY"] {
            let heard = wire.query(text).hear();
            assert!(heard.starts_with("E SERROR C25P02") && heard.ends_with("Z E"), "{text}: {heard}");
        }
        assert_eq!(wire.query("COMMIT").hear(), "C ROLLBACK\nZ I");

        // The same in the extended protocol, where the transaction is implicit.
        wire.parse("", "CREATE TABLE never (i int)").bind("", "", 0).execute("", 0);
        wire.parse("", "SHOW LOCALITY x").bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear(), "1\n2\nC CREATE TABLE\nE SERROR C42601 Mat or near \"x\": syntax error P15\nZ I");
        assert!(wire.query("SELECT to_regclass('never')").hear().contains("D NULL"));
    }
}

#[test]
fn pipelines_answer_in_order() {
    let demo = demo();
    for node in &demo.nodes {
        let here = if node.address == demo.nodes[0].address { "a" } else { "b" };
        let row = format!("D region=us-east-1,zone={here}");
        let mut wire = Wire::login(&node.address, "postgres");
        wire.parse("theirs", "SELECT 1 AS one")
            .parse("ours", "SHOW LOCALITY")
            .describe(b'S', "ours")
            .describe(b'S', "theirs");
        for _ in 0..3 {
            wire.bind("", "theirs", 0)
                .execute("", 0)
                .bind("p", "ours", 1)
                .describe(b'P', "p")
                .execute("p", 0)
                .close(b'P', "p");
        }
        wire.sync().query("SELECT 2 AS two").query("SHOW LOCALITY");
        let cycle = format!("2\nD 1\nC SELECT 1\n2\nT locality:25:1\n{row}\nC SHOW\n3\n");
        let described = "1\n1\nt 0\nT locality:25:0\nt 0\nT one:23:0\n";
        assert_eq!(wire.hear(), format!("{described}{}Z I", cycle.repeat(3)));
        assert_eq!(wire.hear(), "T two:23:0\nD 2\nC SELECT 1\nZ I");
        assert_eq!(wire.hear(), format!("T locality:25:0\n{row}\nC SHOW\nZ I"));

        // Answers come at a Flush, without a Sync.
        wire.bind("", "theirs", 0).execute("", 0).bind("p", "ours", 0).execute("p", 0).flush();
        let mut completed = 0;
        let heard = wire.hear_until(|tag| {
            completed += i32::from(tag == b'C');
            completed == 2
        });
        assert_eq!(heard, format!("2\nD 1\nC SELECT 1\n2\n{row}\nC SHOW"));
        assert_eq!(wire.sync().hear(), "Z I");
    }
}

#[test]
fn an_error_skips_everything_up_to_its_sync() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        // Theirs fails first: ours behind it does not run.
        wire.parse("", "SELECT 1/0").bind("", "", 0).execute("", 0).parse("mine", "SHOW LOCALITY").bind("", "mine", 0);
        wire.execute("", 0).sync().parse("", "SHOW LOCALITY").sync();
        assert_eq!(wire.hear(), "1\nE SERROR C22012 Mdivision by zero\nZ I");
        assert_eq!(wire.hear(), "1\nZ I");
        // Ours fails first: theirs behind it does not run.
        wire.parse("", "SHOW NODES (").bind("", "", 0).parse("", "SELECT 1").bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear(), "E SERROR C42601 Mat or near \"(\": syntax error P12\nZ I");
        assert!(wire.query("SELECT 1").hear().ends_with("Z I"));
    }
}

#[test]
fn names_of_statements_and_portals_follow_the_rules() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    assert_eq!(
        wire.parse("s", "SHOW LOCALITY").parse("s", "SHOW LOCALITY").sync().hear(),
        "1\nE SERROR C42P05 Mprepared statement \"s\" already exists\nZ I"
    );
    let several = "E SERROR C42601 Mcannot insert multiple commands into a prepared statement\nZ I";
    for text in
        ["SHOW LOCALITY; SHOW LOCALITY", "SHOW LOCALITY; SELECT 1", "SELECT 1; SHOW LOCALITY", "SELECT 1; SELECT 2"]
    {
        assert_eq!(wire.parse("m", text).sync().hear(), several, "{text}");
    }
    // Row limits, and a portal that ends with its transaction.
    assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
    wire.parse("nodes", "SHOW NODES").bind("p", "nodes", 0).execute("p", 1).execute("p", 1).execute("p", 1).sync();
    let heard = wire.hear();
    let kinds: String = heard.lines().filter_map(|line| line.chars().next()).collect();
    assert_eq!(kinds, "12DsDCCZ", "{heard}");
    assert_eq!(wire.query("COMMIT").hear(), "C COMMIT\nZ I");
    assert!(wire.execute("p", 0).sync().hear().contains("C34000"), "the portal is gone");
    // The unnamed statement belongs to whoever was parsed last.
    wire.parse("", "SHOW LOCALITY").parse("", "SELECT 7 AS seven").bind("", "", 0).execute("", 0).sync();
    assert_eq!(wire.hear(), "1\n1\n2\nD 7\nC SELECT 1\nZ I");
    // The server knows the names of ours, and says so when they are taken or go.
    assert_eq!(wire.parse("gone", "SHOW LOCALITY").sync().hear(), "1\nZ I");
    assert!(wire.parse("gone", "SELECT 1").sync().hear().contains("C42P05"));
    assert!(wire.query("PREPARE gone AS SELECT 1").hear().contains("C42P05"));
    assert_eq!(wire.query("DEALLOCATE gone").hear(), "C DEALLOCATE\nZ I");
    assert_eq!(
        wire.close(b'S', "s").parse("s", "SELECT 8 AS eight").bind("", "s", 0).execute("", 0).sync().hear(),
        "3\n1\n2\nD 8\nC SELECT 1\nZ I"
    );
    assert_eq!(wire.close(b'S', "s").parse("s", "SHOW LOCALITY").sync().hear(), "3\n1\nZ I");
    assert_eq!(wire.query("DISCARD ALL").hear(), "C DISCARD ALL\nZ I");
    assert!(wire.bind("", "s", 0).sync().hear().contains("C26000"), "the statement is gone");
}

#[test]
fn copy_in_by_drivers_that_send_sync_early_keeps_the_order() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.query("CREATE TEMPORARY TABLE t (i int)").hear(), "C CREATE TABLE\nZ I");
        wire.parse("", "COPY t FROM STDIN").bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear_until(|tag| tag == b'G'), "1\n2\nG");
        assert_eq!(wire.copy("1\n2\n").sync().hear(), "C COPY 2\nZ I");
        assert!(wire.query("SHOW LOCALITY").hear().ends_with("C SHOW\nZ I"));
        wire.parse("", "COPY t FROM STDIN").bind("", "", 0).execute("", 0).sync().copy("3\n").sync();
        assert_eq!(wire.hear(), "1\n2\nG\nC COPY 1\nZ I");
        assert!(wire.query("SHOW LOCALITY").hear().ends_with("C SHOW\nZ I"));
    }
}

#[test]
fn a_copy_in_the_middle_of_a_pipeline_keeps_the_order() {
    let demo = demo();
    for (node, zone) in demo.nodes.iter().zip(["a", "b"]) {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.query("CREATE TEMPORARY TABLE t (i int)").hear(), "C CREATE TABLE\nZ I");
        for last in ["SHOW LOCALITY", "SELECT locality FROM [SHOW LOCALITY]"] {
            wire.parse("", "SHOW LOCALITY").bind("", "", 0).execute("", 0);
            wire.parse("", "COPY t FROM STDIN").bind("", "", 0).execute("", 0).copy("1\n2\n");
            wire.parse("", last).bind("", "", 0).execute("", 0).sync();
            let row = format!("1\n2\nD region=us-east-1,zone={zone}\nC");
            let tag = if last.starts_with("SHOW") { "SHOW" } else { "SELECT 1" };
            assert_eq!(wire.hear(), format!("{row} SHOW\n1\n2\nG\nC COPY 2\n{row} {tag}\nZ I"), "{last}");
        }
        assert_eq!(wire.query("SELECT count(*) AS n FROM t").hear(), "T n:20:0\nD 4\nC SELECT 1\nZ I");
    }
}

#[test]
fn the_end_of_a_copy_that_has_failed_holds_nothing_up() {
    let demo = demo();
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    assert_eq!(wire.query("CREATE TEMPORARY TABLE t (i int)").hear(), "C CREATE TABLE\nZ I");
    assert_eq!(wire.query("COPY t FROM STDIN").hear_until(|tag| tag == b'G'), "G");
    let failed = wire.send(b"d\0\0\0\x06x\n").hear();
    assert!(failed.starts_with("E SERROR C22P02") && failed.ends_with("Z I"), "{failed}");
    assert!(wire.copy("1\n").query("SHOW LOCALITY").hear().ends_with("C SHOW\nZ I"));
    assert!(wire.query("SELECT 1").hear().ends_with("C SELECT 1\nZ I"));
}

#[test]
fn a_client_that_closes_its_side_still_gets_all_its_answers() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        wire.query("SELECT pg_sleep(0.1)")
            .query("SHOW LOCALITY")
            .query("CREATE TABLE kept (i int)")
            .query("DROP TABLE kept");
        wire.send_and_close();
        assert!(wire.hear().ends_with("C SELECT 1\nZ I"));
        assert!(wire.hear().ends_with("C SHOW\nZ I"));
        assert_eq!(wire.hear(), "C CREATE TABLE\nZ I");
        assert_eq!(wire.hear(), "C DROP TABLE\nZ I");
        assert_eq!(wire.hear(), "end");
    }
}

#[test]
fn a_peer_that_talks_nonsense_is_refused() {
    let demo = demo();
    let mut startup = vec![0, 0, 0, 0, 0, 3, 0, 0];
    startup.extend_from_slice(b"user\0x\0options\0-c backhaul.peer=verbs\0\0");
    startup[3] = startup.len() as u8;
    for nonsense in [b"Q\0\0\0\x05\0".as_slice(), b"p\0\0\0\x04", b"Q\0\0\0\x1bBACKHAUL GIVE ME IT ALL\0"] {
        let mut wire = Wire::connect(&demo.nodes[0].address);
        let heard = wire.send(&startup).hear();
        assert_eq!(heard, "Z I");
        let heard = wire.send(nonsense).hear();
        assert!(heard.contains("C0A000") || heard.contains("CXX000"), "{heard}");
    }
    assert!(Wire::login(&demo.nodes[0].address, "postgres").query("SELECT 1").hear().ends_with("Z I"));
}

#[test]
fn a_client_that_vanishes_leaves_no_session() {
    let demo = demo();
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.query("SET application_name = 'vanishing'; BEGIN").hear(), "C SET\nC BEGIN\nZ T");
        drop(wire);
        until("the session to end", || {
            let seen = demo.ask(1, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'vanishing'");
            if seen == "0" { Ok(()) } else { Err(seen) }
        });
    }
}

#[test]
fn a_statement_of_ours_that_waits_can_be_cancelled_and_tells_what_it_lacks() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "2", "--shards", "2", "--no-example-database"]);
    // The registry is n1's; the second node's sessions there freeze, so that SHOW NODES on n2 has to wait for it.
    let name = format!("backhaul {}", demo.nodes[1].address);
    let frozen = demo.ask(1, &format!("SELECT pid FROM pg_stat_activity WHERE application_name = '{name}'"));
    let frozen: Vec<Pid> = frozen.lines().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect();
    let signal = |signal: Signal| frozen.iter().for_each(|pid| kill(*pid, signal).unwrap());
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    signal(Signal::SIGSTOP);
    let canceller = wire.canceller();
    let heard = wire.query("SHOW NODES").hear();
    drop(canceller);
    signal(Signal::SIGCONT);
    assert_eq!(heard, "E SERROR C57014 Mcanceling statement due to user request\nZ I");
    // The server is frozen, too: new sessions get no further than those.
    assert_eq!(wire.query("SET statement_timeout = '500ms'").hear(), "C SET\nZ I");
    let server = demo.server_pid(1);
    kill(server, Signal::SIGSTOP).unwrap();
    signal(Signal::SIGSTOP);
    let texts = ["SHOW NODES", "SELECT count(*) FROM [SHOW NODES]", "SHOW JOBS SELECT node_id FROM [SHOW NODES]"];
    let heard = texts.map(|text| wire.query(text).hear());
    kill(server, Signal::SIGCONT).unwrap();
    signal(Signal::SIGCONT);
    heard.iter().zip(texts).for_each(|(heard, text)| {
        assert_eq!(heard, "E SERROR C57014 Mcanceling statement due to statement timeout\nZ I", "{text}");
    });
    assert_eq!(wire.query("RESET statement_timeout").hear(), "C RESET\nZ I");

    // With the registry's server gone the answer is this node's own, and says so.
    kill(demo.server_pid(1), Signal::SIGINT).unwrap();
    until("the registry to be gone", || {
        let heard = wire.query("SHOW NODES").hear();
        let told = heard.starts_with("N SNOTICE C08006 Mthe registry cannot be reached\nT node_id:20:0");
        if told && heard.contains("|NULL|t|") { Ok(()) } else { Err(heard) }
    });
}
