//! `backhaul check`: a sound fleet lacks nothing; what is broken is named, and the printed statements mend it.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::{Demo, directory, psql};
use crate::support::fleet::{Node, Server};
use crate::support::{backhaul, both, run, until};

/// What a check prints, and its exit code.
fn check(arguments: &[&str]) -> (i32, String) {
    let output = backhaul().arg("check").args(arguments).output().unwrap();
    (output.status.code().unwrap(), both(&output))
}

/// The same, of a demo through node `number`.
fn check_demo(demo: &Demo, number: usize) -> (i32, String) {
    check(&["--insecure", "--host", &demo.nodes[number - 1].address])
}

/// Waits until nothing is missing any more.
#[track_caller]
fn until_sound(demo: &Demo) -> String {
    until("a sound fleet", || match check_demo(demo, 1) {
        (0, said) if said.contains("\n0 missing, ") => Ok(said),
        (code, said) => Err(format!("{code}\n{said}")),
    })
}

/// Waits until a check says this with this exit code, and gives all that it says.
#[track_caller]
fn until_said(demo: &Demo, number: usize, code: i32, what: &str) -> String {
    until(what, || match check_demo(demo, number) {
        (found, said) if found == code && said.contains(what) => Ok(said),
        (found, said) => Err(format!("{found}\n{said}")),
    })
}

/// The lines that a check prints to mend what its line `what` says.
#[track_caller]
fn mending(said: &str, what: &str) -> String {
    let below = said.lines().skip_while(|line| !line.contains(what)).skip(1);
    let steps = below.take_while(|line| line.starts_with("           "));
    let typed: Vec<&str> = steps.filter_map(|line| line.strip_prefix("               ")).collect();
    assert!(!typed.is_empty(), "nothing mends {what}:\n{said}");
    typed.join("\n")
}

/// Types lines into psql, as an operator would.
#[track_caller]
fn type_into(mut psql: Command, lines: &str) {
    psql.args(["-v", "ON_ERROR_STOP=1"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = psql.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{lines}\n{}", both(&output));
}

#[test]
fn what_is_broken_is_named_and_its_statement_mends_it() {
    let demo = Demo::start(&["--no-example-database"]);
    let sound = until_sound(&demo);
    for part in [
        "node 1 at ",
        ": leaseholder, shard \"s1\", PostgreSQL ",
        ": voting replica, shard \"s1\", ",
        "never paused, because commits may wait for it",
        "paused for the moment in which a backup takes its point",
        ": no server, shard \"s1\"",
    ] {
        assert!(sound.contains(part), "{part}:\n{sound}");
    }
    // The server that is broken and mended, how, the exit code, and what is said.
    for (number, broken, code, what) in [
        (1, "REVOKE EXECUTE ON FUNCTION pg_wal_replay_pause() FROM backhaul;", 1, "may not pause replay"),
        (1, "REVOKE pg_monitor FROM backhaul;", 1, "may not see replication"),
        (1, "REVOKE pg_read_all_data FROM backhaul;", 1, "may not read all tables"),
        (1, "ALTER ROLE backhaul NOBYPASSRLS;", 1, "is subject to row security"),
        (1, "ALTER ROLE backhaul RESET lo_compat_privileges;", 1, "may not read large objects"),
        (1, "ALTER ROLE backhaul CONNECTION LIMIT 20;", 1, "may have 20 connections"),
        (1, "ALTER ROLE backhaul NOLOGIN;", 1, "is not permitted to log in"),
        (1, "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;", 1, "permission denied for database"),
        (1, "CREATE DATABASE shut; REVOKE CONNECT ON DATABASE shut FROM PUBLIC;", 1, "connect to database \"shut\""),
        (1, "REVOKE backhaul_restore FROM backhaul;", 1, "may not take on \"backhaul_restore\""),
        (1, "DROP ROLE backhaul_restore;", 0, "nodes may not restore backups"),
        (
            1,
            "ALTER SYSTEM SET synchronous_standby_names = ''; SELECT pg_reload_conf();",
            0,
            "has no synchronous standby: a failover may forget the last jobs",
        ),
        (3, "ALTER SYSTEM SET hot_standby_feedback = off; SELECT pg_reload_conf();", 0, "hot_standby_feedback is off"),
        (3, "ALTER SYSTEM SET max_standby_streaming_delay = '1s'; SELECT pg_reload_conf();", 0, "_delay is 1000 ms"),
        (3, "ALTER SYSTEM SET recovery_min_apply_delay = '2ms'; SELECT pg_reload_conf();", 0, "replay is 2 ms late"),
        (3, "SELECT pg_wal_replay_pause();", 1, "replay is paused, and not by a backup"),
    ] {
        assert!(!sound.contains(what), "{what}:\n{sound}");
        type_into(demo.psql_direct(number), broken);
        let said = until_said(&demo, 4, code, what);
        type_into(demo.psql_direct(number), &mending(&said, what));
        until("it to be mended", || match check_demo(&demo, 2) {
            (0, said) if !said.contains(what) => Ok(()),
            (code, said) => Err(format!("{code}\n{said}")),
        });
    }
    type_into(demo.psql_direct(1), "ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf();");
    // What a shard's primary mends is told once for the whole shard.
    type_into(demo.psql_direct(1), "REVOKE EXECUTE ON FUNCTION pg_wal_replay_resume() FROM backhaul;");
    until("one line for three servers", || match check_demo(&demo, 3) {
        (1, said)
            if said.matches("may not pause replay").count() == 1
                && said.matches("stands still, or by").count() == 1 =>
        {
            Ok(())
        }
        (code, said) => Err(format!("{code}\n{said}")),
    });
}

#[test]
fn servers_nodes_and_roles_that_are_gone_are_named() {
    let demo =
        Demo::start(&["--nodes", "3", "--servers", "2", "--shards", "2", "--voters", "1", "--no-example-database"]);
    // Without a standby nothing confirms the registry, and no statement makes one.
    assert!(until_sound(&demo).contains("  advice   the registry's server, beside node 1 at "));
    let gone = "DROP OWNED BY backhaul; DROP ROLE backhaul;";
    type_into(demo.psql_direct(2), gone);
    let said = until_said(&demo, 1, 1, "role \"backhaul\" does not exist");
    type_into(demo.psql_direct(2), &mending(&said, "role \"backhaul\" does not exist"));
    let said = until_said(&demo, 1, 1, "may not take on \"backhaul_restore\"");
    type_into(demo.psql_direct(2), &mending(&said, "may not take on"));
    until_sound(&demo);

    kill(demo.server_pid(2), Signal::SIGINT).unwrap();
    let said = until_said(&demo, 1, 1, "shard \"s2\" has no leaseholder");
    assert!(said.contains(": server down, shard \"s2\"") && said.contains("the node cannot ask the server "), "{said}");
    demo.restart_server(2);
    until_sound(&demo);

    kill(Pid::from_raw(demo.nodes[2].pid), Signal::SIGKILL).unwrap();
    let said = until_said(&demo, 2, 1, "the node does not answer: ");
    assert!(said.contains("node 3 at ") && said.contains(": does not answer\n"), "{said}");
}

/// Types what a check prints to lead the standby beside node `number` to its leaseholder, each line where it belongs.
#[track_caller]
fn lead(demo: &Demo, number: usize, leader: usize, said: &str) {
    let lines = mending(said, "the standby does not follow the leaseholder");
    let (slot, rest): (Vec<&str>, Vec<&str>) = lines.lines().partition(|line| line.contains("_replication_slot("));
    type_into(demo.psql_direct(leader), &slot.join("\n"));
    type_into(demo.psql_direct(number), &rest.join("\n"));
}

#[test]
fn an_overtaken_primary_is_made_a_standby_by_what_is_printed() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "2", "--voters", "1", "--no-example-database"]);
    demo.promote(2);
    let overtaken = "the server is a primary on timeline 1, and shard \"s1\" has reached timeline 2";
    let said = until_said(&demo, 2, 1, overtaken);
    assert!(said.contains(": overtaken primary, ") && said.contains(", not read, because another primary"), "{said}");
    let lines = mending(&said, overtaken);
    kill(demo.server_pid(1), Signal::SIGINT).unwrap();
    // What is printed for it while it runs is printed still when it has been stopped.
    let stopped = "the server is stopped, and was a primary on timeline 1";
    let said = until_said(&demo, 2, 1, stopped);
    assert_eq!(mending(&said, stopped), lines);

    let (home, data) = (demo.node_dir(1), demo.node_dir(1).join("pg"));
    let owner = std::fs::metadata(&data).unwrap();
    std::os::unix::fs::chown(&home, Some(owner.uid()), Some(owner.gid())).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-ec", &lines]).current_dir("/").uid(owner.uid()).gid(owner.gid()).env("HOME", &home);
    run(&mut shell);
    std::fs::copy(home.join("pg.old/postgresql.conf"), data.join("postgresql.conf")).unwrap();
    demo.restart_server(1);
    // It has come with the setting of the slot that the promoted one held when it was a standby.
    let said = until_said(&demo, 2, 1, "slot('n2');");
    lead(&demo, 1, 2, &said);
    until_sound(&demo);
}

#[test]
fn a_standby_of_a_primary_that_is_gone_is_led_to_the_next_one() {
    let demo = Demo::start(&["--nodes", "3", "--servers", "3", "--voters", "1", "--no-example-database"]);
    kill(demo.server_pid(1), Signal::SIGINT).unwrap();
    until_said(&demo, 3, 1, ": server down, shard");
    demo.promote(2);
    let detached = ": detached standby, ";
    until_said(&demo, 2, 1, "the leaseholder is node 2 at ");
    // Nobody has asked for the first server before it was stopped.
    let said = until_said(&demo, 2, 1, "what the server was is not known: if it was a primary before node 2 at ");
    assert!(said.contains(detached) && said.contains(" port="), "{said}");
    lead(&demo, 3, 2, &said);
    until("the standby to follow", || match check_demo(&demo, 2) {
        (_, said) if said.contains(": non-voting replica, ") && !said.contains(detached) => Ok(()),
        (code, said) => Err(format!("{code}\n{said}")),
    });
}

#[test]
fn a_standby_past_the_fork_is_told_to_be_made_anew() {
    let demo = Demo::start(&["--nodes", "3", "--servers", "3", "--voters", "1", "--no-example-database"]);
    type_into(demo.psql_direct(2), "ALTER SYSTEM SET primary_conninfo = ''; SELECT pg_reload_conf();");
    let apart = "SELECT count(*) FROM pg_stat_wal_receiver";
    until("the second server to be cut off", || {
        let seen = run(demo.psql_direct(2).args(["-Atc", apart]));
        if seen.trim() == "0" { Ok(()) } else { Err(seen) }
    });
    type_into(demo.psql_direct(1), "CREATE TABLE only_the_third_one_has ();");
    let there = "SELECT count(*) FROM pg_class WHERE relname = 'only_the_third_one_has'";
    until("the third server to have it", || {
        let seen = run(demo.psql_direct(3).args(["-Atc", there]));
        if seen.trim() == "1" { Ok(()) } else { Err(seen) }
    });
    kill(demo.server_pid(1), Signal::SIGINT).unwrap();
    demo.promote(2);
    // The position of the new primary does not betray where it began.
    type_into(demo.psql_direct(2), "CREATE TABLE another (); SELECT pg_switch_wal(); CREATE TABLE third ();");
    let said = until("lines that lead the standby", || match check_demo(&demo, 2) {
        (1, said) if said.contains("\\gexec") && !said.contains("go on from there") => Ok(said),
        (code, said) => Err(format!("{code}\n{said}")),
    });
    lead(&demo, 3, 2, &said);
    let said = until_said(&demo, 2, 1, "than the leaseholder has, and cannot go on from there");
    let lines = mending(&said, "cannot go on from there");
    assert!(lines.contains(&format!("--pgdata='{}'", demo.node_dir(3).join("pg").display())), "{lines}");
}

#[test]
fn one_server_can_be_looked_at_before_there_is_a_node() {
    let dir = directory();
    let mut server = Server::primary(dir.path(), "server", &Vec::new());
    let conninfo = server.instance.conninfo("backhaul");
    let one = |trust: &[&str]| check(&[&["--postgres", &conninfo], trust].concat());
    let superuser = format!("{} dbname=postgres", server.instance.conninfo("root"));
    let root = || psql(&superuser);
    let (code, said) = one(&["--insecure"]);
    assert_eq!(code, 1, "{said}");
    type_into(root(), &mending(&said, "role \"backhaul\" does not exist"));
    let (code, said) = one(&["--insecure"]);
    assert!(code == 0 && said.contains("\n0 missing, 1 advised") && said.contains("nodes may not restore"), "{said}");
    type_into(root(), &mending(&said, "nodes may not restore"));
    let (code, said) = one(&["--insecure"]);
    assert!(code == 0 && said.contains("read at an exported snapshot\n0 missing, 0 advised\n"), "{said}");
    assert!(said.lines().last().unwrap().starts_with("one server alone was looked at: who follows whom"), "{said}");

    // A statement overrides what an earlier one has set, as no line of postgresql.conf does.
    server.ask("ALTER SYSTEM SET max_connections = 12");
    server.stop(Signal::SIGINT);
    server.start();
    let (code, said) = one(&["--insecure"]);
    assert_eq!(code, 1, "{said}");
    type_into(root(), &mending(&said, "of max_connections = 12"));
    server.stop(Signal::SIGINT);
    server.start();
    assert!(one(&["--insecure"]).1.contains("\n0 missing, 0 advised\n"));

    // A node with a secret must not stand before this server, which lets in everybody.
    let (code, said) = one(&["--secret-file", "/nowhere"]);
    assert!(code == 1 && said.contains("the server lets in role \"backhaul\" without a password"), "{said}");
    let closes = mending(&said, "the server lets in role");
    type_into(root(), "ALTER ROLE backhaul PASSWORD 'of backhaul'; ALTER ROLE root PASSWORD 'of root';");
    type_into(root(), &mending(&said, "the node may not read pg_hba.conf"));
    let guarded = format!("{closes}\n");
    server.set_hba(&guarded);
    // Not taken up: a server does not start with such a line, nor reload.
    server.instance.set_hba(&format!("{guarded}local all all nonsense\n")).unwrap();
    let known = format!("{conninfo} password='of backhaul'");
    let (code, said) = check(&["--postgres", &known, "--secret-file", "/nowhere"]);
    assert!(code == 1 && said.contains("line 3 of pg_hba.conf is wrong"), "{said}");
    let wrong = format!("{conninfo} password='of another'");
    let (code, said) = check(&["--postgres", &wrong, "--secret-file", "/nowhere"]);
    assert!(code == 1 && said.contains("password authentication failed") && !said.contains("of another"), "{said}");
    assert!(said.contains("\\password \"backhaul\"\n"), "{said}");
    let (code, said) = one(&["--secret-file", "/nowhere"]);
    assert!(code == 1 && said.contains("BACKHAUL_POSTGRES, with the role's password"), "{said}");
}

#[test]
fn a_fleet_with_passwords_is_led_from_nothing_to_sound() {
    let dir = directory();
    let mut server = Server::primary(dir.path(), "server", &Vec::new());
    server.ask("ALTER ROLE root PASSWORD 'of root'");
    server.set_hba("local all all scram-sha-256\nlocal replication all scram-sha-256\n");
    let secret = dir.path().join("secret");
    cluster::secret::ClusterSecret::create(&secret).unwrap();
    let postgres = format!("{} password='of backhaul'", server.instance.conninfo("backhaul"));
    let trust = ["--secret-file", secret.to_str().unwrap()];
    let node = Node::start(dir.path(), "n1", &[&trust[..], &["--postgres", &postgres]].concat());
    let checked = || check(&[&trust[..], &["--host", &node.address]].concat());
    let root = || {
        let mut root = psql(&format!("{} dbname=postgres", server.instance.conninfo("root")));
        root.env("PGPASSWORD", "of root");
        root
    };
    // One node asks the other although neither has a number yet; only the one that joined knows of both.
    let second = Node::start(dir.path(), "n2", &[&trust[..], &["--join", &node.address]].concat());
    let through_second = || check(&[&trust[..], &["--host", &second.address]].concat());
    let title = format!("the node at {}: server down, shard \"s1\"\n", node.address);
    until("the first node to be asked by the second", || match through_second() {
        (1, said) if said.contains(&title) && said.contains("the node cannot ask the server ") => Ok(()),
        (code, said) => Err(format!("{code}\n{said}")),
    });
    // The server does not tell whether the role or its password is wrong: the lines mend both.
    let (code, said) = checked();
    assert!(code == 1 && said.contains("the fleet has no registry"), "{said}");
    let lines = mending(&said, "password authentication failed");
    let statements: Vec<&str> = lines.lines().filter(|line| line.ends_with(';')).collect();
    assert!(lines.contains("\n\\password \"backhaul\"\n"), "{said}");
    for _ in 0..2 {
        type_into(root(), &statements.join("\n"));
    }
    type_into(root(), "ALTER ROLE backhaul PASSWORD 'of backhaul';");
    let said = until("the node to know its server", || match checked() {
        (1, said) if said.contains("backhaul init --host ") => Ok(said),
        (code, said) => Err(format!("{code}\n{said}")),
    });
    let line = mending(&said, "the fleet has no registry");
    let words = line.split_ascii_whitespace().skip(1);
    run(backhaul().args(words).args(["--user", "root"]).args(trust).env("PGPASSWORD", "of root"));
    let said = until("a sound fleet", || match checked() {
        (0, said) => Ok(said),
        (code, said) => Err(format!("{code}\n{said}")),
    });
    for advice in ["no synchronous standby", "nodes may not restore", "the node may not read pg_hba.conf"] {
        assert!(said.contains(advice), "{advice}:\n{said}");
    }
    // Nobody without the secret is told anything, and what is told holds none.
    let other = dir.path().join("other");
    cluster::secret::ClusterSecret::create(&other).unwrap();
    let (code, refused) = check(&["--secret-file", other.to_str().unwrap(), "--host", &node.address]);
    assert!(code == 1 && refused.contains("the cluster secret does not match"), "{refused}");
    let secrets = [std::fs::read_to_string(&secret).unwrap(), "of backhaul".to_owned()];
    assert!(secrets.iter().all(|secret| !said.contains(secret.trim()) && !node.log().contains(secret.trim())));
}
