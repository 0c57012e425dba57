//! What the relay costs: COPY out and in, and small transactions, through a node and through a hop, against the server
//! itself over TCP, which is how a client of a node would reach it otherwise. Every figure is a ratio of runs that took
//! turns in one go, so it holds when the machine's speed drifts.
//!
//! `cargo bench --bench relay`. Exits with 1 when COPY costs more than 10 % of the direct way for each node that it
//! passes. All of it shares this machine's cores, which a client, its nodes and its server do not in a fleet.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "it prints its figures")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::demo::{directory, psql};
use support::fleet::{Node, Server};
use support::{backhaul, postgres_program, run};

#[path = "../tests/support/mod.rs"]
mod support;

const ROUNDS: usize = 15;
const ROWS: u32 = 1_000_000;
/// The share of the direct way's time that COPY may cost on top for each node that it passes.
const COPY_OVERHEAD_MAX: f64 = 0.10;

fn main() {
    let dir = directory();
    // Nobody else on this machine asks for ports while it measures.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = Server::primary_on(dir.path(), "server", port);
    let socket = format!("{} dbname=postgres", server.instance.conninfo("root"));
    let conninfo = server.instance.conninfo("backhaul");
    let first = Node::start(dir.path(), "n1", &["--insecure", "--postgres", &conninfo]);
    run(backhaul().args(["init", "--insecure", "--user", "root", "--host", &first.address]));
    let second = Node::start(dir.path(), "n2", &["--insecure", "--join", &first.address]);
    second.until_logged("shard has a leaseholder");
    let url = |address: &str| format!("postgresql://root@{address}/postgres");
    let ways = [url(&format!("127.0.0.1:{port}")), socket, url(&first.address), url(&second.address)];
    let make = format!(
        "CREATE UNLOGGED TABLE t AS SELECT i, md5(i::text) a, repeat(md5((i + 1)::text), 5) b FROM generate_series(1, {ROWS}) i;
         CREATE UNLOGGED TABLE sink (LIKE t)"
    );
    run(psql(&ways[0]).args(["-c", &make]));
    let file = dir.path().join("rows");
    let out = |url: &str| timed(psql(url).args(["-c", &format!("\\copy t TO '{}'", file.display())]));
    let into = |url: &str| {
        run(psql(url).args(["-c", "TRUNCATE sink"]));
        timed(psql(url).args(["-c", &format!("\\copy sink FROM '{}'", file.display())]))
    };
    let mut worst = 0.0_f64;
    for (what, measure) in [("COPY out", &out as &dyn Fn(&str) -> Duration), ("COPY in", &into)] {
        let ratios = in_turn(&ways, measure);
        report(what, &ratios);
        // A hop passes two nodes.
        worst = worst.max(ratios[2] - 1.0).max((ratios[3] - 1.0) / 2.0);
    }
    for mode in ["simple", "prepared"] {
        run(postgres_program("pgbench").args(["-i", "-q", &ways[0]]).stderr(Stdio::null()));
        let ratios = in_turn(&ways, &|url| {
            timed(postgres_program("pgbench").args(["-n", "-S", "-M", mode, "-c", "4", "-j", "2", "-t", "2000", url]))
        });
        println!(
            "pgbench -S -M {mode}: through a node {:.2}, through a hop {:.2} of the direct time",
            ratios[1], ratios[2]
        );
    }
    drop((first, second, server));
    if worst > COPY_OVERHEAD_MAX {
        println!("COPY costs more than {:.0} % for each node that it passes", COPY_OVERHEAD_MAX * 100.0);
        std::process::exit(1);
    }
}

fn report(what: &str, ratios: &[f64]) {
    let [_, socket, node, hop] = ratios else { unreachable!("four ways") };
    println!(
        "{what}: over the socket {socket:.2}, through a node {node:.2}, through a hop {hop:.2} of the direct time"
    );
}

fn timed(command: &mut Command) -> Duration {
    let begun = Instant::now();
    run(command);
    begun.elapsed()
}

/// The ways take turns; the median of each way's ratio to the first of its round.
fn in_turn(ways: &[String], measure: &dyn Fn(&str) -> Duration) -> Vec<f64> {
    let mut ratios: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
    for round in 0..=ROUNDS {
        let times: Vec<Duration> = ways.iter().map(|url| measure(url)).collect();
        // The first round warms up.
        if round > 0 {
            let direct = times[0].as_secs_f64();
            ratios.iter_mut().zip(&times).for_each(|(ratios, time)| ratios.push(time.as_secs_f64() / direct));
        }
    }
    ratios
        .into_iter()
        .map(|mut ratios| {
            ratios.sort_by(f64::total_cmp);
            ratios[ratios.len() / 2]
        })
        .collect()
}
