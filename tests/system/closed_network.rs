//! `backhaul demo --closed-network`: on a network that blocks everything but the nodes' ports, a backup runs where its
//! store can be reached, and nowhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use crate::support::demo::{Demo, assert_nothing_runs_in, command, directory};
use crate::support::jobs::{WEST, completed, detached, relocated, succeeded};
use crate::support::{both, run, until};

/// What every demo here says when this machine does not let it make a network.
const CANNOT: &str = "a closed network cannot be made here";

/// Why this machine cannot have namespaces or packet filters, found out without the program under test.
fn obstacle() -> Option<String> {
    let name = format!("backhaul-test-{}-{:?}", std::process::id(), std::thread::current().id());
    let name = name.replace(['(', ')'], "");
    let tried = |program: &str, arguments: &[&str]| match Command::new(program).args(arguments).output() {
        Err(error) => Some(format!("{program}: {error}")),
        Ok(output) if !output.status.success() => Some(both(&output)),
        Ok(_) => None,
    };
    let found = tried("ip", &["netns", "add", &name])
        .or_else(|| tried("ip", &["netns", "exec", &name, "nft", "add", "table", "inet", "tried"]));
    let _ = Command::new("ip").args(["netns", "delete", &name]).output();
    found
}

/// Whether the test can be made; where it cannot, the reason is printed, and the demo has to give one, too.
fn possible() -> bool {
    let Some(reason) = obstacle() else { return true };
    // Around what catches the output of tests that pass.
    let _ = writeln!(std::io::stderr(), "closed networks are not tested here: {reason}");
    let dir = directory();
    let output = command(&dir, &["--closed-network", "-e", "SHOW LOCALITY"]).output().unwrap();
    assert!(!output.status.success() && both(&output).contains(CANNOT), "{}", both(&output));
    false
}

/// The word behind `before` in what the demo printed.
#[track_caller]
fn word_after(demo: &Demo, before: &str) -> String {
    let rest = demo.said.iter().find_map(|line| line.split_once(before)).expect(before).1;
    rest.split([' ', ',']).next().unwrap().to_owned()
}

/// Packets by counter.
#[track_caller]
fn counters(demo: &Demo) -> BTreeMap<String, u64> {
    let backbone = word_after(demo, "packets are counted: ip netns exec ");
    let text = run(Command::new("ip").args(["netns", "exec", &backbone, "nft", "-j", "list", "counters"]));
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    let counters = list["nftables"].as_array().unwrap().iter().filter_map(|entry| entry.get("counter"));
    counters.map(|c| (c["name"].as_str().unwrap().to_owned(), c["packets"].as_u64().unwrap())).collect()
}

/// Namespaces and interfaces of the demo with this pid.
fn left_of(demo: Pid) -> Vec<String> {
    let of_demo = [format!("backhaul-{demo}-"), format!("bh{demo}")];
    let names =
        ["/run/netns", "/sys/class/net"].into_iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten());
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(&of_demo[0]) || *name == of_demo[1]).collect()
}

#[track_caller]
fn until_gone(demo: Pid) {
    until("the network to be gone", || match left_of(demo) {
        none if none.is_empty() => Ok(()),
        some => Err(some.join(" ")),
    });
}

/// What the demo prints of its counters at its end, as they are named.
#[track_caller]
fn printed(said: &str) -> BTreeMap<String, u64> {
    let account = said.split_once("Packets between regions, all to or from port ").expect(said).1;
    let mut to_store = false;
    let mut counters = BTreeMap::new();
    for line in account.lines().skip(1) {
        let Some((name, packets)) = line.split_once(": ") else {
            to_store = line == "Packets between the S3 server and regions:";
            continue;
        };
        let name = match (name.trim(), to_store) {
            ("Other packets between regions, refused", _) => "refused".to_owned(),
            (region, true) => format!("{region}_to_store"),
            (way, false) => way.replace(" to ", "_to_"),
        };
        counters.insert(name, packets.trim_end_matches(", refused").parse().unwrap());
    }
    counters
}

/// The counters that have not counted anything.
fn at_zero(counters: &BTreeMap<String, u64>) -> Vec<&str> {
    counters.iter().filter(|(_, packets)| **packets == 0).map(|(name, _)| name.as_str()).collect()
}

/// The store of a closed demo.
#[track_caller]
fn store(demo: &Demo) -> String {
    format!("s3://backups/fleet?{}", word_after(demo, "s3://backups/?"))
}

/// What of the host's own network a demo must leave as it is.
fn host() -> (String, String) {
    let forwards = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    (run(Command::new("nft").args(["--stateless", "list", "ruleset"])), forwards)
}

/// Servers beside n1 and n2; n2's region reaches the store.
const THREE_REGIONS: [&str; 7] = ["--closed-network", "--nodes", "3", "--servers", "2", "--voters", "1"];

#[test]
fn a_backup_runs_where_the_store_can_be_reached_and_only_node_ports_are_crossed() {
    if !possible() {
        return;
    }
    let before = host();
    let demo = Demo::start(&THREE_REGIONS);
    assert_eq!(host(), before, "the host's filters and its forwarding are its own");
    let uri = store(&demo);

    // PostgreSQL listens on no network at all: its standby streams through its own node, and that through the primary's.
    let receiver = "SELECT status, sender_host || ':' || sender_port FROM pg_stat_wal_receiver";
    let seen = both(&demo.psql_direct(2).args(["-Atc", receiver, "-c", "SHOW listen_addresses"]).output().unwrap());
    assert_eq!(seen, format!("streaming|{}\n\n", demo.nodes[1].address));

    // Asked of another region, attached and not, it moves to where the store is.
    let told = demo.ask(1, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}"));
    let (job, to) = relocated(&told);
    assert_eq!(to, "2", "{told}");
    let columns = completed(&demo, 3, job);
    assert_eq!([5, 12, 13].map(|i| columns[i].as_str()), ["succeeded", "", "2"], "{columns:?}");
    let job = detached(&demo, 3, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}, DETACHED"));
    let columns = completed(&demo, 1, &job);
    assert_eq!([5, 12, 13].map(|i| columns[i].as_str()), ["succeeded", "", "2"], "{columns:?}");

    // And back, through a gateway in a third region.
    let restore = format!("RESTORE DATABASE movr FROM LATEST IN '{uri}' WITH new_db_name = 'again', {WEST}, DETACHED");
    let columns = completed(&demo, 1, &demo.ask(3, &restore));
    assert_eq!([5, 12, 13].map(|i| columns[i].as_str()), ["succeeded", "", "2"], "{columns:?}");
    let again = demo.nodes[2].url.replace("/movr", "/again");
    let rows = both(&crate::support::demo::psql(&again).args(["-Atc", "SELECT count(*) FROM rides"]).output().unwrap());
    assert_eq!(rows.trim(), "1000");

    // Whatever else there was has been let through as a node's port: between regions no rule accepts anything else. Until
    // the demo's end, and so it is printed.
    let others = ["eu-west-1_to_store", "refused", "us-east-1_to_store"];
    assert_eq!(at_zero(&counters(&demo)), others, "{:?}", counters(&demo));
    let pid = demo.pid();
    let (dir, said) = demo.end_hearing(Signal::SIGTERM);
    let account = printed(&said.join("\n"));
    assert_eq!((at_zero(&account), account.len()), (others.to_vec(), 10), "{account:?}");
    assert_eq!((left_of(pid), host()), (Vec::new(), before.clone()));
    assert_nothing_runs_in(dir.path());

    // The same fleet once more, and what is not to be tried is.
    let demo = Demo::start_in(dir, &THREE_REGIONS);
    asked_where_the_store_is_reached(&demo, &store(&demo));
    blocked_without_the_filter(&demo, &store(&demo));
    blocked_beside_the_ports(&demo);
    let counted = counters(&demo);
    let (dir, said) = demo.end_hearing(Signal::SIGTERM);
    let account = printed(&said.join("\n"));
    for name in others {
        assert!(account[name] > 0 && account[name] == counted[name], "{name}: {account:?} {counted:?}");
    }
    assert_eq!(host(), before);
    assert_nothing_runs_in(dir.path());
}

/// A statement without a filter is answered by a node that reaches the store, whichever node is asked.
#[track_caller]
fn asked_where_the_store_is_reached(demo: &Demo, uri: &str) {
    // After a second start a node may not have its session in the registry yet.
    let job = until("a job", || {
        let told = demo.ask(3, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {WEST}, DETACHED"));
        if told.parse::<i64>().is_ok() { Ok(told) } else { Err(told) }
    });
    succeeded(demo, 1, &job);
    // Nor has it found every other one.
    until("the node that reaches the store", || {
        let shown = demo.ask(1, &format!("SHOW BACKUPS IN '{uri}'"));
        if shown.starts_with("/20") { Ok(()) } else { Err(shown) }
    });
    let made = demo.ask(3, &format!("CREATE EXTERNAL CONNECTION far AS '{uri}'"));
    assert!(made.contains("NOTICE:  00000: the store is reached by nodes 2\n"), "{made}");
}

/// Where the store cannot be reached from, the job fails, and says from where it tried.
#[track_caller]
fn blocked_without_the_filter(demo: &Demo, uri: &str) {
    let told = demo.ask(1, &format!("BACKUP DATABASE movr INTO '{uri}'"));
    let store = "the store at s3://backups/fleet/";
    assert!(told.starts_with(&format!("ERROR:  58030: {store}")), "{told}");
    assert!(told.contains(" cannot be reached from node 1\n") && told.contains("Connection refused"), "{told}");

    let elsewhere = "EXECUTION LOCALITY = 'region=eu-west-1', DETACHED";
    let job = demo.ask(1, &format!("BACKUP DATABASE movr INTO '{uri}' WITH {elsewhere}"));
    let columns = completed(demo, 2, &job);
    assert_eq!([5, 13].map(|i| columns[i].as_str()), ["failed", "3"], "{columns:?}");
    assert!(columns[12].contains(store) && columns[12].contains("cannot be reached from node 3"), "{columns:?}");

    let counted = counters(demo);
    let tried = ["us-east-1_to_store", "eu-west-1_to_store", "refused"].map(|name| counted[name] > 0);
    assert_eq!(tried, [true, true, false], "{counted:?}");
}

/// The network is as closed as it says: a node's other ports, and the store from the host.
#[track_caller]
fn blocked_beside_the_ports(demo: &Demo) {
    let east = word_after(demo, "closed network: between ");
    let west = demo.nodes[1].address.rsplit_once(':').unwrap().0.to_owned();
    let reach = |port: &str| {
        let attempt = format!("exec 3<>/dev/tcp/{west}/{port}");
        Command::new("ip").args(["netns", "exec", &east, "bash", "-c", &attempt]).output().unwrap()
    };
    assert!(reach("26257").status.success());
    assert!(both(&reach("5432")).contains("refused"), "{}", both(&reach("5432")));
    let after_one = counters(demo)["refused"];
    assert!(after_one > 0);
    let store: SocketAddr = word_after(demo, "AWS_ENDPOINT=http://").parse().unwrap();
    let error = TcpStream::connect_timeout(&store, Duration::from_secs(20)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(counters(demo)["refused"] > after_one);
}

/// A closed demo that is as small as one can be.
const SMALL: [&str; 7] = ["--closed-network", "--nodes", "2", "--servers", "1", "--voters", "1"];

#[test]
fn a_killed_demo_leaves_no_network_and_the_next_one_removes_what_nobody_could() {
    if !possible() {
        return;
    }
    // The clean-up lives on.
    let demo = Demo::start(&SMALL);
    let pid = demo.pid();
    assert_eq!(left_of(pid).len(), 5, "{:?}", left_of(pid));
    let dir = demo.end(Signal::SIGKILL);
    until_gone(pid);
    assert_nothing_runs_in(dir.path());

    // In the same directory again, at other addresses, with another demo beside it.
    let demo = Demo::start_in(dir, &SMALL);
    let other = directory();
    let beside = || {
        let arguments = [&SMALL[..], &["--no-example-database", "-e", "SHOW LOCALITY"]].concat();
        let output = command(&other, &arguments).output().unwrap();
        // Results alone are on standard output; what was counted is told all the same.
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && told.contains("region=us-east-1,zone=a"), "{}", both(&output));
        assert!(!told.contains("ackets"), "{told}");
        let account = printed(&String::from_utf8_lossy(&output.stderr));
        assert!(account["us-east-1_to_us-west-1"] > 0 && account["refused"] == 0, "{account:?}");
    };
    beside();
    assert_eq!(demo.ask(2, "SELECT count(*) FROM rides"), "1000", "one demo leaves the other alone");

    // The clean-up dies, too: whatever is left then goes with the next start.
    let pid = demo.pid();
    kill(reaper_of(demo.dir.path()), Signal::SIGKILL).unwrap();
    let dir = demo.end(Signal::SIGKILL);
    assert_eq!(left_of(pid).len(), 5, "{:?}", left_of(pid));
    beside();
    assert_eq!(left_of(pid), Vec::<String>::new());
    assert_nothing_runs_in(dir.path());
}

/// The process that cleans up after the demo in `dir`.
#[track_caller]
fn reaper_of(dir: &Path) -> Pid {
    let is_it = |pid: &i32| {
        let words = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: BTreeSet<&str> = words.split('\0').collect();
        words.contains("demo-reaper") && words.contains(dir.to_str().unwrap())
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let found = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_it);
    Pid::from_raw(found.expect("the demo's reaper"))
}

#[test]
fn a_network_that_cannot_be_made_is_refused_in_words() {
    let refused = |program: &mut Command, words: &str| {
        let dir = directory();
        let told = command(&dir, &["--closed-network"]);
        program.args(told.get_args()).args(["--nodes", "2"]);
        let output = program.output().unwrap();
        assert!(!output.status.success() && both(&output).contains(words), "{words}: {}", both(&output));
        assert_nothing_runs_in(dir.path());
    };
    let one_region = ["--demo-locality", "region=a:region=a,zone=b"];
    let dir = directory();
    let output = command(&dir, &[&["--closed-network", "--nodes", "2"][..], &one_region].concat()).output().unwrap();
    assert!(
        both(&output).contains("needs 2 to 14 regions (first tiers); these localities make 1"),
        "{}",
        both(&output)
    );

    let tools = directory();
    let mut backhaul = crate::support::backhaul();
    if !Uid::effective().is_root() {
        return refused(&mut backhaul, &format!("{CANNOT}: network namespaces and packet filters need root"));
    }
    refused(backhaul.env("PATH", tools.path()), "the program ip is missing; install the package iproute2");
    std::os::unix::fs::symlink("/bin/true", tools.path().join("ip")).unwrap();
    let mut backhaul = crate::support::backhaul();
    refused(backhaul.env("PATH", tools.path()), "the program nft is missing; install the package nftables");
    if possible() {
        let mut unable = Command::new("setpriv");
        unable.arg("--bounding-set=-sys_admin").arg(crate::support::backhaul().get_program());
        refused(&mut unable, "make a network namespace, which needs CAP_SYS_ADMIN and CAP_NET_ADMIN");
    }
}
