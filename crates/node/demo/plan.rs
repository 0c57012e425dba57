//! What a demo consists of, worked out from its flags before anything is started.

use anyhow::{Context as _, bail};
use cluster::{Locality, Role};

use crate::flags::Demo;

/// Beyond this, one machine is no place to try things.
const NODES_MAX: usize = 64;

/// The localities of nodes that are not told any: two regions with two zones each, then more of the same.
const REGIONS: [&str; 3] = ["us-east-1", "us-west-1", "eu-west-1"];
const ZONES: [&str; 3] = ["a", "b", "c"];

/// One node of a demo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedNode {
    /// Counted from 1.
    pub(super) number: usize,
    pub(super) locality: Locality,
    /// `s1`, `s2`, …
    pub(super) shard: String,
    pub(super) part: Part,
}

/// What stands beside a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// A primary.
    Leaseholder,
    /// A synchronous standby.
    Voting,
    /// An asynchronous standby.
    NonVoting,
    /// No server.
    None,
}

impl PlannedNode {
    /// `n1`, `n2`, …: the node's directory, and the name of its server among its shard's standbys.
    pub(super) fn name(&self) -> String {
        format!("n{}", self.number)
    }

    /// The role that the fleet finds it in once it is whole.
    pub(super) fn role(&self) -> Role {
        match self.part {
            Part::Leaseholder => Role::Leaseholder,
            Part::Voting => Role::Voting,
            Part::NonVoting => Role::NonVoting,
            Part::None => Role::None,
        }
    }
}

/// Lays the fleet out.
///
/// # Errors
///
/// The numbers do not go together; the message says which.
pub(super) fn plan(flags: &Demo) -> anyhow::Result<Vec<PlannedNode>> {
    let nodes = flags.nodes;
    if !(1..=NODES_MAX).contains(&nodes) {
        bail!("--nodes must be between 1 and {NODES_MAX}");
    }
    let servers = flags.servers.unwrap_or(nodes.saturating_sub(1).max(1));
    if servers < flags.shards || servers > nodes {
        bail!("--servers must be between the number of shards ({}) and the number of nodes ({nodes})", flags.shards);
    }
    if flags.shards == 0 || flags.voters == 0 {
        bail!("--shards and --voters must be at least 1");
    }
    let localities = localities(flags, nodes)?;
    let planned = localities.into_iter().enumerate().map(|(index, locality)| {
        // The place among the servers of the same shard: the first leads.
        let part = match index / flags.shards {
            _ if index >= servers => Part::None,
            0 => Part::Leaseholder,
            place if place < flags.voters => Part::Voting,
            _ => Part::NonVoting,
        };
        PlannedNode { number: index + 1, locality, shard: format!("s{}", index % flags.shards + 1), part }
    });
    Ok(planned.collect())
}

fn localities(flags: &Demo, nodes: usize) -> anyhow::Result<Vec<Locality>> {
    let texts: Vec<String> = match &flags.demo_locality {
        Some(given) => given.split(':').map(str::to_owned).collect(),
        None if flags.closed_network => spread(nodes),
        None => {
            let zones = if nodes <= 4 { 2 } else { ZONES.len() };
            let place = |n: usize| format!("region={},zone={}", REGIONS[n / zones % REGIONS.len()], ZONES[n % zones]);
            (0..nodes).map(place).collect()
        }
    };
    if texts.len() != nodes {
        bail!("--demo-locality names {} localities for {nodes} nodes", texts.len());
    }
    texts.iter().map(|text| text.parse().with_context(|| format!("read the locality \"{text}\""))).collect()
}

/// A closed network is shown best with all regions there are.
fn spread(nodes: usize) -> Vec<String> {
    let count = REGIONS.len();
    // Node n of all of them is in region n * count / nodes; the first one there makes it zone a.
    let place = |n: usize| {
        let region = n * count / nodes;
        let first = (region * nodes).div_ceil(count);
        let zone = ZONES.get(n - first).map_or_else(|| format!("z{}", n - first), |zone| (*zone).to_owned());
        format!("region={},zone={zone}", REGIONS[region])
    };
    (0..nodes).map(place).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::flags::{Command, Flags};

    fn planned(arguments: &str) -> Result<Vec<String>, String> {
        let words = ["backhaul", "demo"].into_iter().chain(arguments.split_ascii_whitespace());
        let Command::Demo(demo) = Flags::try_parse_from(words).unwrap().command else { panic!("not a demo") };
        let nodes = plan(&demo).map_err(|error| error.to_string())?;
        Ok(nodes.iter().map(|n| format!("{} {} {:?}", n.locality, n.shard, n.part)).collect())
    }

    #[test]
    fn the_default_is_two_regions_and_a_node_without_a_server() {
        let expected = [
            "region=us-east-1,zone=a s1 Leaseholder",
            "region=us-east-1,zone=b s1 Voting",
            "region=us-west-1,zone=a s1 NonVoting",
            "region=us-west-1,zone=b s1 None",
        ];
        assert_eq!(planned("").unwrap(), expected);
    }

    #[test]
    fn a_closed_network_has_all_regions() {
        let places = |arguments: &str| -> Vec<String> {
            let nodes = planned(arguments).unwrap();
            nodes
                .iter()
                .map(|node| node.split(' ').next().unwrap().replace("region=", "").replace("zone=", ""))
                .collect()
        };
        assert_eq!(places("--closed-network"), ["us-east-1,a", "us-east-1,b", "us-west-1,a", "eu-west-1,a"]);
        assert_eq!(places("--closed-network --nodes 3"), ["us-east-1,a", "us-west-1,a", "eu-west-1,a"]);
        assert_eq!(places("--closed-network --nodes 2"), ["us-east-1,a", "us-west-1,a"]);
        assert_eq!(places("--closed-network --nodes 12")[7..9], ["us-west-1,z3", "eu-west-1,a"]);
    }

    #[test]
    fn servers_are_dealt_to_shards_in_turn() {
        let expected = ["r=a s1 Leaseholder", "r=b s2 Leaseholder", "r=c s1 NonVoting", "r=d s2 NonVoting"];
        let arguments = "--servers 4 --shards 2 --voters 1 --demo-locality r=a:r=b:r=c:r=d";
        assert_eq!(planned(arguments).unwrap(), expected);
    }

    #[test]
    fn numbers_that_do_not_go_together_are_named() {
        for (arguments, word) in [
            ("--nodes 0", "--nodes"),
            ("--nodes 65", "--nodes"),
            ("--nodes 2 --servers 3", "--servers"),
            ("--shards 2 --servers 1", "--servers"),
            ("--shards 0", "--shards"),
            ("--voters 0", "--voters"),
            ("--nodes 2 --demo-locality r=a", "--demo-locality"),
            ("--nodes 1 --demo-locality r", "locality \"r\""),
        ] {
            let error = planned(arguments).expect_err(arguments);
            assert!(error.contains(word), "{arguments}: {error}");
        }
    }
}
