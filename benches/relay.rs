//! What the relay costs: COPY out and in, and small transactions, through a node and through a hop, against the server
//! itself. Every figure is a ratio of runs that took turns in one go, so it holds when the machine's speed drifts.
//!
//! `cargo bench --bench relay`. Exits with 1 when COPY costs more than 10 % of the direct way.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "it prints its figures")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::demo::{Demo, psql};
use support::{postgres_program, run};

#[path = "../tests/support/mod.rs"]
mod support;

const ROUNDS: usize = 7;
const ROWS: u32 = 1_000_000;
/// The share of the direct way's time that COPY through one node may cost on top.
const COPY_OVERHEAD_MAX: f64 = 0.10;

fn main() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"]);
    let ways =
        [("direct", demo.direct_url(1)), ("node", demo.nodes[0].url.clone()), ("hop", demo.nodes[1].url.clone())];
    let make = format!(
        "CREATE UNLOGGED TABLE t AS SELECT i, md5(i::text) a, repeat(md5((i + 1)::text), 5) b FROM generate_series(1, {ROWS}) i;
         CREATE UNLOGGED TABLE sink (LIKE t)"
    );
    run(psql(&ways[0].1).args(["-c", &make]));
    let file = demo.dir.path().join("rows");
    let out = |url: &str| timed(psql(url).args(["-c", &format!("\\copy t TO '{}'", file.display())]));
    let into = |url: &str| {
        run(psql(url).args(["-c", "TRUNCATE sink"]));
        timed(psql(url).args(["-c", &format!("\\copy sink FROM '{}'", file.display())]))
    };
    let mut worst = 0.0_f64;
    for (what, measure) in [("COPY out", &out as &dyn Fn(&str) -> Duration), ("COPY in", &into)] {
        let ratios = in_turn(&ways, measure);
        println!("{what}: through a node {:.3}, through a hop {:.3} of the direct time", ratios[1], ratios[2]);
        worst = worst.max(ratios[1]);
    }
    for mode in ["simple", "prepared"] {
        run(postgres_program("pgbench").args(["-i", "-q", &ways[0].1]).stderr(Stdio::null()));
        let ratios = in_turn(&ways, &|url| {
            timed(postgres_program("pgbench").args(["-n", "-S", "-M", mode, "-c", "4", "-j", "2", "-t", "2000", url]))
        });
        println!(
            "pgbench -S -M {mode}: through a node {:.2}, through a hop {:.2} of the direct time",
            ratios[1], ratios[2]
        );
    }
    drop(demo);
    if worst > 1.0 + COPY_OVERHEAD_MAX {
        println!("COPY through a node costs more than {:.0} %", COPY_OVERHEAD_MAX * 100.0);
        std::process::exit(1);
    }
}

fn timed(command: &mut Command) -> Duration {
    let begun = Instant::now();
    run(command);
    begun.elapsed()
}

/// The ways take turns; the median of each way's ratio to the first of its round.
fn in_turn(ways: &[(&str, String)], measure: &dyn Fn(&str) -> Duration) -> Vec<f64> {
    let mut ratios: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
    for round in 0..=ROUNDS {
        let times: Vec<Duration> = ways.iter().map(|(_, url)| measure(url)).collect();
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
