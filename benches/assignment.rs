//! What it costs to decide where a backup runs: spans dealt out to nodes, in memory, at three sizes, so that the growth
//! shows.
//!
//! `cargo bench --bench assignment`. Exits with 1 when 1,000,000 spans over 1,000 nodes take longer than a second.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "it prints its figures")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use backup::{Fleet, Place, Rules, Standing, anchor, assign, decide, workers};
use cluster::{NodeId, Role};

const NODES: i32 = 1000;
const ROUNDS: usize = 7;
const MOST: usize = 1_000_000;
const LONGEST: Duration = Duration::from_secs(1);

fn main() {
    let fleet = fleet();
    let rules = Rules::matching(&"region=west".parse().unwrap());
    let mut slowest = Duration::ZERO;
    for spans in [10_000, 100_000, MOST] {
        // Sizes of tables, from empty to large, in no order.
        let weights: Vec<u64> = (0..spans as u64).map(|n| (n * 2_654_435_761) % (64 << 20)).collect();
        let mut times: Vec<Duration> = (0..ROUNDS).map(|_| timed(&fleet, &rules, &weights)).collect();
        times.sort();
        let median = times[ROUNDS / 2];
        let each = median.as_nanos() / spans as u128;
        println!("{spans:>9} spans over {NODES} nodes: {:>8.1} ms, {each} ns each", median.as_secs_f64() * 1e3);
        slowest = slowest.max(median);
    }
    if slowest > LONGEST {
        println!("{MOST} spans take longer than {LONGEST:?}");
        std::process::exit(1);
    }
}

/// A primary in the east, and a thousand nodes in the west, every third one with a standby.
fn fleet() -> Fleet {
    let standing = |role| Standing {
        role,
        behind: 0,
        not_streaming: None,
        delay: None,
        paused: false,
        may_pause: true,
        feedback: true,
        free: None,
    };
    let place = |id: i32, locality: String, role: Option<Role>| Place {
        id: NodeId(id),
        locality: locality.parse().unwrap(),
        reachable: true,
        round_trips: BTreeMap::new(),
        server: role.map(standing),
    };
    let west = |id: i32| {
        let role = (id % 3 == 0).then_some(Role::NonVoting);
        place(id, format!("region=west,zone={},rack={}", id % 4, id % 50), role)
    };
    let mut places: Vec<Place> = (1..=NODES).map(west).collect();
    places.push(place(NODES + 1, "region=east,zone=1,rack=1".to_owned(), Some(Role::Leaseholder)));
    Fleet { places }
}

fn timed(fleet: &Fleet, rules: &Rules, weights: &[u64]) -> Duration {
    let begun = Instant::now();
    let decision = decide(fleet, rules);
    let anchor = anchor(fleet, rules, &decision.together).unwrap();
    let assigned = assign(weights, &anchor, &workers(fleet, rules, &decision.together), rules.balanced);
    let time = begun.elapsed();
    assert_eq!(assigned.len(), weights.len());
    let mut used = assigned;
    used.sort();
    used.dedup();
    assert_eq!(used.len(), NODES as usize, "nobody shares a tier with the leaseholder, so all help");
    time
}
