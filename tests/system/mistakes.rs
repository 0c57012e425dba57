//! Fleets that were put together wrongly: each says what is wrong.

use std::net::TcpListener;

use crate::support::demo::directory;
use crate::support::fleet::{Node, Server};
use crate::support::{backhaul, both, free_ports, run, until};

/// A primary that trusts its host, and a node beside it with an initialized registry.
fn fleet(dir: &std::path::Path) -> (Server, Node) {
    let server = Server::primary(dir, "server", &Vec::new());
    let node = Node::start(dir, "n1", &["--insecure", "--postgres", &server.instance.conninfo("backhaul")]);
    run(backhaul().args(["init", "--insecure", "--user", "root", "--host", &node.address]));
    node.until_logged("has a session in the registry node=1");
    (server, node)
}

#[test]
fn a_server_of_another_shard_is_refused() {
    let dir = directory();
    let (_server, first) = fleet(dir.path());
    let stranger = Server::primary(dir.path(), "stranger", &Vec::new());
    stranger.ask("CREATE ROLE backhaul LOGIN; GRANT pg_monitor TO backhaul");
    let postgres = stranger.instance.conninfo("backhaul");
    let wrong = Node::start(dir.path(), "n2", &["--insecure", "--join", &first.address, "--postgres", &postgres]);
    let (code, log) = wrong.until_ended();
    assert!(code == Some(1) && log.contains("does not belong to shard \"s1\""), "{log}");
    // As a shard of its own it is welcome.
    let flags = ["--insecure", "--join", &first.address, "--postgres", &postgres, "--shard", "s2"];
    Node::start(dir.path(), "n3", &flags).until_logged("has a session in the registry");
}

#[test]
fn one_store_and_one_number_belong_to_one_node() {
    let dir = directory();
    let (_server, first) = fleet(dir.path());
    let second = Node::start(dir.path(), "n2", &["--insecure", "--join", &first.address]);
    second.until_logged("has a session in the registry node=2");

    let same_store = dir.path().join("n2/store");
    let log = Node::try_start(dir.path(), "n3", &["--insecure", "--store", same_store.to_str().unwrap()]);
    let log = log.err().expect("two nodes on one store");
    assert!(log.contains(&format!("is in use by process {}", second.pid())), "{log}");

    let taken = Node::start(dir.path(), "n4", &["--insecure", "--join", &first.address, "--node-id", "2"]);
    let (code, log) = taken.until_ended();
    assert!(code == Some(1) && log.contains("node id 2 belongs to another node"), "{log}");

    // A copied store: the copy waits for the session to run out, sees it renewed, and gives up.
    let home = dir.path().join("n5/store");
    std::fs::create_dir_all(&home).unwrap();
    for name in ["node.json", "fleet.json"] {
        std::fs::copy(same_store.join(name), home.join(name)).unwrap();
    }
    let copy = Node::start(dir.path(), "n5", &["--insecure", "--join", &first.address]);
    let (code, log) = copy.until_ended();
    assert!(code == Some(1) && log.contains("node 2 is already running at"), "{log}");
}

#[test]
fn an_address_that_is_taken_is_named() {
    let dir = directory();
    let node = Node::start(dir.path(), "n1", &["--insecure"]);
    let mut second = backhaul();
    second.args(["start", "--insecure", "--listen-addr", &node.address, "--store"]).arg(dir.path().join("other"));
    let output = second.output().unwrap();
    let words = format!("listen on {}: Address already in use", node.address);
    assert!(!output.status.success() && both(&output).contains(&words), "{}", both(&output));
}

#[test]
fn an_address_that_never_answers_is_given_up_again_and_again() {
    let dir = directory();
    // Takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_address = silent.local_addr().unwrap().to_string();
    let (_server, first) = fleet(dir.path());
    let join = format!("{silent_address},{},nowhere.invalid:1", first.address);
    let node = Node::start(dir.path(), "n2", &["--insecure", "--join", &join]);
    node.until_logged("has a session in the registry node=2");
    node.until_logged("no answer within 5 seconds");
    until("the fleet through the node", || {
        let output = node.psql("root", "postgres").args(["-Atc", "SELECT 1"]).output().unwrap();
        if both(&output).trim() == "1" { Ok(()) } else { Err(both(&output)) }
    });
}

#[test]
fn a_node_finds_its_fleet_again_without_an_address() {
    let dir = directory();
    let (_server, first) = fleet(dir.path());
    let second = Node::start(dir.path(), "n2", &["--insecure", "--join", &first.address]);
    second.until_logged("has a session in the registry node=2");
    let address = second.address.clone();
    drop(second);
    let again = Node::start(dir.path(), "n2", &["--insecure", "--listen-addr", &address]);
    again.until_logged("has a session in the registry node=2");
    // And others find the fleet through it alone.
    let third = Node::start(dir.path(), "n3", &["--insecure", "--join", &again.address]);
    third.until_logged("has a session in the registry node=3");
}

#[test]
fn a_node_alone_says_what_is_missing() {
    let dir = directory();
    let node = Node::start(dir.path(), "n1", &["--insecure", "--http-addr", "127.0.0.1:0"]);
    let said = both(&node.psql("root", "postgres").args(["-c", "SELECT 1"]).output().unwrap());
    assert!(said.contains("FATAL:  shard \"s1\" has no leaseholder now"), "{said}");
    assert!(said.contains("No node stands beside a primary of this shard."), "{said}");
    node.until_logged("has \"backhaul init\" been run?");

    let http = until("the HTTP address", || {
        let log = node.log();
        let found = log
            .lines()
            .find_map(|line| line.split_once("HTTP is served address=").map(|(_, address)| address.to_owned()));
        found.ok_or(log)
    });
    let get = |path: &str| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(&http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let alive = get("/health");
    assert!(alive.starts_with("HTTP/1.1 200") && alive.contains("\"ready\":false"), "{alive}");
    assert!(get("/health?ready=1").starts_with("HTTP/1.1 503"));
}

#[test]
fn a_standby_cannot_hold_a_new_registry() {
    let dir = directory();
    let primary = Server::primary(dir.path(), "primary", &Vec::new());
    let standby = Server::standby(dir.path(), "standby", &primary.instance.conninfo("root"));
    let node = Node::start(dir.path(), "n1", &["--insecure", "--postgres", &standby.instance.conninfo("root")]);
    let output = backhaul().args(["init", "--insecure", "--user", "root", "--host", &node.address]).output().unwrap();
    assert!(both(&output).contains("is a standby; run init on the node beside the primary"), "{}", both(&output));

    // Nor can a server without a node, and a failed init leaves no secret behind.
    let bare = Server::primary_on(dir.path(), "bare", free_ports(1));
    let secret = dir.path().join("secret");
    let mut init = backhaul();
    init.args(["init", "--user", "root", "--host", &bare.address(), "--secret-file"]).arg(&secret);
    let said = both(&init.output().unwrap());
    assert!(said.contains("there is no node at") && !secret.exists(), "{said}");
}

#[test]
fn a_clock_that_is_wrong_is_reported_and_changes_nothing() {
    let dir = directory();
    let (_server, first) = fleet(dir.path());
    let library =
        std::fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path().join("faketime/libfaketime.so.1"));
    let library =
        library.into_iter().find(|path| path.exists()).expect("faketime is installed; run scripts/prepare --tests");
    let environment = [("LD_PRELOAD", library.to_str().unwrap()), ("FAKETIME", "+1h"), ("DONT_FAKE_MONOTONIC", "1")];
    let flags = ["--insecure", "--join", &first.address];
    let ahead = Node::try_start_with(dir.path(), "n2", &flags, &environment).expect("the node starts");
    ahead.until_logged("this host's clock differs from the registry's by -36");
    for node in [&first, &ahead] {
        until("both to be live", || {
            let said = both(&node.psql("root", "postgres").args(["-Atc", "SHOW NODES"]).output().unwrap());
            if said.matches("|t|t|").count() == 2 { Ok(()) } else { Err(said) }
        });
    }
}

#[test]
fn a_registry_of_a_newer_program_is_left_alone() {
    let dir = directory();
    let (_server, first) = fleet(dir.path());
    let mut psql = first.psql("root", "backhaul");
    run(psql.args(["-c", "INSERT INTO registry.schema_version VALUES (99)"]));
    let node = Node::start(dir.path(), "n2", &["--insecure", "--join", &first.address]);
    node.until_logged("the registry has schema version 99, and this program knows only up to");
    let said = both(&node.psql("root", "postgres").args(["-Atc", "SELECT 1"]).output().unwrap());
    assert_eq!(said.trim(), "1", "clients are relayed all the same");
}

#[test]
fn a_locality_that_is_none_is_refused_at_the_start() {
    let dir = directory();
    for (locality, told) in [
        ("", "can't have empty locality"),
        ("region", "tier must be in the form \"key=value\" not \"region\""),
        ("region=a,", "tier must be in the form \"key=value\" not \"\""),
    ] {
        let log = Node::try_start(dir.path(), "n1", &["--insecure", "--locality", locality]).err();
        let log = log.unwrap_or_else(|| panic!("a node at \"{locality}\""));
        assert!(log.contains(told), "{log}");
    }
}
