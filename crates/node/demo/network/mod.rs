//! `demo --closed-network`: regions that only nodes can speak across.
//!
//! ```text
//!                    host  bh<pid>
//!                      │
//!     region 0 ── backbone ── region 1      every box a network namespace, every line a veth pair,
//!                   │    │                  all of them inside 198.18.n.0/24
//!            region 2    store              (RFC 2544: addresses for trying out networks)
//! ```
//!
//! The backbone routes, and its packet filter decides what passes. Neither the host's filters nor its settings are
//! touched: on the host there are one interface and one route, which go with the backbone.

mod filter;
mod namespaces;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use anyhow::{Context as _, bail};
use cluster::Locality;
use nix::unistd::Uid;

use super::plan::PlannedNode;
use filter::{Counters, Filter};
pub(super) use namespaces::Namespace;
use namespaces::{end, end_of_the_dead, host_interface, run};

/// The port of every node, when the user names none: each has an address of its own.
const NODE_PORT: u16 = 26257;

/// The port of the S3 server.
pub(super) const STORE_PORT: u16 = 9000;

/// A network is divided into so many pieces of 16 addresses: one for the host, one for the store, one for each region.
const REGIONS_MAX: usize = 14;

/// A region's piece has so many addresses besides the backbone's own.
const NODES_PER_REGION_MAX: usize = 13;

/// Networks that can stand side by side on one host.
const SLOTS: u32 = 512;

/// A closed network that stands.
pub(super) struct Network {
    backbone: Namespace,
    store: Namespace,
    regions: Vec<(Region, Namespace)>,
    addresses: Addresses,
    node_port: u16,
    http_port: u16,
}

/// Where a node or the store is.
pub(super) struct Place<'a> {
    pub(super) namespace: &'a Namespace,
    pub(super) address: Ipv4Addr,
}

/// The nodes that have the first tier of their localities in common.
#[derive(Debug, PartialEq, Eq)]
struct Region {
    tier: String,
    /// The tier's value, fit to be part of a name.
    label: String,
    /// Numbers of nodes.
    nodes: Vec<usize>,
}

/// Which of the networks this is.
#[derive(Clone, Copy)]
struct Addresses {
    slot: u32,
}

impl Addresses {
    fn at(self, last: usize) -> Ipv4Addr {
        // 198.18.0.0/15, 256 addresses for each network.
        Ipv4Addr::from_bits(0xC612_0000 + self.slot * 256 + u32::try_from(last).unwrap_or(0))
    }

    fn host(self) -> Ipv4Addr {
        self.at(1)
    }

    fn backbone_to_host(self) -> Ipv4Addr {
        self.at(2)
    }

    /// The backbone's address in a piece; others in it follow. Piece 1 is the store's, those from 2 on are regions'.
    fn gateway(self, piece: usize) -> Ipv4Addr {
        self.at(piece * 16 + 1)
    }

    fn in_piece(self, piece: usize, index: usize) -> Ipv4Addr {
        self.at(piece * 16 + 2 + index)
    }
}

/// The piece of the store.
const STORE_PIECE: usize = 1;

/// The piece of the first region.
const FIRST_REGION_PIECE: usize = 2;

impl Network {
    /// Makes the network for these nodes, after removing those whose demos were killed together with their clean-up.
    ///
    /// # Errors
    ///
    /// The localities do not make regions, or this process may not make networks; the message says what is missing.
    pub(super) fn make(planned: &[PlannedNode], sql_port: u16, http_port: u16) -> anyhow::Result<Self> {
        let localities: Vec<(usize, &Locality)> = planned.iter().map(|node| (node.number, &node.locality)).collect();
        let regions = regions(&localities)?;
        Self::build(regions, sql_port, http_port).context("a closed network cannot be made here")
    }

    fn build(regions: Vec<Region>, sql_port: u16, http_port: u16) -> anyhow::Result<Self> {
        if !Uid::effective().is_root() {
            bail!("network namespaces and packet filters need root; start the demo with sudo");
        }
        run("ip", &["-V"], "")?;
        run("nft", &["--version"], "")?;
        end_of_the_dead()?;
        let pid = std::process::id();
        let backbone = Namespace::make(pid, "backbone").context(
            "make a network namespace, which needs CAP_SYS_ADMIN and CAP_NET_ADMIN (a container has to be given them)",
        )?;
        let addresses = connect_host(pid, &backbone).context("connect the host")?;
        let store = Namespace::make(pid, "store")?;
        let mut placed = Vec::new();
        for region in regions {
            let namespace = Namespace::make(pid, &region.label)?;
            placed.push((region, namespace));
        }
        let node_port = if sql_port == 0 { NODE_PORT } else { sql_port };
        let network = Self { backbone, store, regions: placed, addresses, node_port, http_port };
        // The filter stands before there is anything that could pass.
        let rules = network.filter().rules()?;
        network.backbone.within(|| run("nft", &["-f", "-"], &rules)).context("set the packet filter")?;
        network.connect(&network.store, "store", STORE_PIECE, 1)?;
        for (index, (region, namespace)) in network.regions.iter().enumerate() {
            network.connect(namespace, &format!("r{index}"), FIRST_REGION_PIECE + index, region.nodes.len())?;
        }
        let forward = || Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?);
        network.backbone.within(forward).context("let the backbone forward packets")?;
        Ok(network)
    }

    /// Puts a cable between the backbone and a namespace that has so many addresses.
    fn connect(&self, namespace: &Namespace, interface: &str, piece: usize, count: usize) -> anyhow::Result<()> {
        let gateway = self.addresses.gateway(piece);
        let (backbone, name) = (&self.backbone, &namespace.name);
        let ours = format!(
            "link add {interface} type veth peer name eth0 netns {name}\n\
             address add {gateway}/28 dev {interface}\nlink set {interface} up\n"
        );
        backbone.ip(&ours).with_context(|| format!("connect {name}"))?;
        let mut theirs = "link set lo up\n".to_owned();
        for index in 0..count {
            writeln!(theirs, "address add {}/28 dev eth0", self.addresses.in_piece(piece, index))?;
        }
        writeln!(theirs, "link set eth0 up\nroute add default via {gateway}")?;
        namespace.ip(&theirs).with_context(|| format!("connect {name}"))
    }

    /// Where node `number` is.
    ///
    /// # Errors
    ///
    /// There is no such node.
    pub(super) fn place(&self, number: usize) -> anyhow::Result<Place<'_>> {
        let found = self.regions.iter().enumerate().find_map(|(index, (region, namespace))| {
            let among = region.nodes.iter().position(|node| *node == number)?;
            Some(Place { namespace, address: self.addresses.in_piece(FIRST_REGION_PIECE + index, among) })
        });
        found.context("find a node's place in the network")
    }

    /// Where the S3 server is.
    pub(super) fn store(&self) -> Place<'_> {
        Place { namespace: &self.store, address: self.addresses.in_piece(STORE_PIECE, 0) }
    }

    /// The tier whose nodes reach the store: the second region's, so that it is not beside the leaseholder.
    pub(super) fn store_tier(&self) -> &str {
        self.regions.get(1).map_or("", |(region, _)| &region.tier)
    }

    /// The port of every node.
    pub(super) fn node_port(&self) -> u16 {
        self.node_port
    }

    /// What a user has to know to look inside.
    pub(super) fn describe(&self) -> Vec<String> {
        let names: Vec<&str> = self.regions.iter().map(|(_, namespace)| namespace.name.as_str()).collect();
        let (port, backbone) = (self.node_port, &self.backbone.name);
        vec![
            format!("closed network: between {} only port {port} of the nodes passes", names.join(", ")),
            format!("packets are counted: ip netns exec {backbone} nft list counters"),
        ]
    }

    /// What has crossed so far, for a reader.
    ///
    /// # Errors
    ///
    /// The counters cannot be read.
    pub(super) fn account(&self) -> anyhow::Result<Vec<String>> {
        let text = self.backbone.within(|| run("nft", &["-j", "list", "counters"], ""))?;
        Ok(self.filter().account(&Counters::read(&text)?))
    }

    fn filter(&self) -> Filter<'_> {
        Filter {
            regions: self.regions.iter().map(|(region, _)| region.label.as_str()).collect(),
            near_store: 1,
            node_port: self.node_port,
            http_port: self.http_port,
            store_port: STORE_PORT,
            host: self.addresses.host(),
        }
    }
}

/// Ends what runs in the network of the demo `pid`, and removes it.
///
/// # Errors
///
/// A part of it cannot be removed.
pub(super) fn remove(pid: u32) -> anyhow::Result<()> {
    end(pid).context("remove the closed network")
}

/// Connects the host and the backbone by addresses that nobody has. The route to them is what says that they are taken:
/// there cannot be two of the same.
fn connect_host(pid: u32, backbone: &Namespace) -> anyhow::Result<Addresses> {
    let interface = host_interface(pid);
    run("ip", &["link", "add", &interface, "type", "veth", "peer", "name", "host", "netns", &backbone.name], "")?;
    run("ip", &["link", "set", &interface, "up"], "")?;
    backbone.ip("link set lo up\nlink set host up\n")?;
    for tried in 0..SLOTS {
        let addresses = Addresses { slot: (pid + tried) % SLOTS };
        let (network, gateway) = (format!("{}/24", addresses.at(0)), addresses.backbone_to_host().to_string());
        let known = run("ip", &["-4", "route", "show", "table", "all", "to", "match", &network], "")?;
        if known.lines().any(|line| !line.starts_with("default")) {
            continue;
        }
        if run("ip", &["route", "add", &network, "via", &gateway, "dev", &interface, "onlink"], "").is_err() {
            continue;
        }
        run("ip", &["address", "add", &format!("{}/32", addresses.host()), "dev", &interface], "")?;
        backbone.ip(&format!("address add {gateway}/28 dev host\n"))?;
        return Ok(addresses);
    }
    bail!("all of 198.18.0.0/15 is in use on this host")
}

/// Finds the regions, in the order of their first nodes.
fn regions(nodes: &[(usize, &Locality)]) -> anyhow::Result<Vec<Region>> {
    let mut regions: Vec<Region> = Vec::new();
    let mut labels: BTreeSet<String> = ["backbone", "store", "host"].map(str::to_owned).into();
    for (number, locality) in nodes {
        let Some(tier) = locality.tiers().first().map(ToString::to_string) else {
            bail!("node {number} has no locality; a closed network has a region for each first tier")
        };
        if let Some(known) = regions.iter_mut().find(|region| region.tier == tier) {
            known.nodes.push(*number);
            continue;
        }
        let mut label = label(&tier);
        if !labels.insert(label.clone()) {
            label = format!("{label}-{}", regions.len());
            labels.insert(label.clone());
        }
        regions.push(Region { tier, label, nodes: vec![*number] });
    }
    if !(2..=REGIONS_MAX).contains(&regions.len()) {
        bail!(
            "a closed network needs 2 to {REGIONS_MAX} regions (first tiers); these localities make {}",
            regions.len()
        );
    }
    if let Some(full) = regions.iter().find(|region| region.nodes.len() > NODES_PER_REGION_MAX) {
        bail!("{} has more than {NODES_PER_REGION_MAX} nodes, too many for a closed network", full.tier);
    }
    Ok(regions)
}

/// A word for the names of namespaces and counters: it begins with a letter, and is short enough for both.
fn label(tier: &str) -> String {
    let value = tier.split_once('=').map_or(tier, |(_, value)| value);
    let plain = value.chars().take(40).map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect::<String>();
    if plain.starts_with(|c: char| c.is_ascii_alphabetic()) { plain } else { format!("r{plain}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(localities: &[&str]) -> Result<Vec<(String, Vec<usize>)>, String> {
        let parsed: Vec<Locality> = localities.iter().map(|text| text.parse().unwrap()).collect();
        let numbered: Vec<(usize, &Locality)> = (1..).zip(&parsed).collect();
        let regions = regions(&numbered).map_err(|error| error.to_string())?;
        Ok(regions.into_iter().map(|region| (region.label, region.nodes)).collect())
    }

    #[test]
    fn a_region_is_a_first_tier() {
        let seen =
            found(&["region=a,zone=1", "region=b,zone=1", "region=a,zone=2", "cloud=1/x", "region=1-x", "c=store"]);
        let expected =
            [("a", vec![1, 3]), ("b", vec![2]), ("r1-x", vec![4]), ("r1-x-3", vec![5]), ("store-4", vec![6])];
        assert_eq!(seen.unwrap(), expected.map(|(label, nodes)| (label.to_owned(), nodes)));
        assert!(found(&["region=a", "region=a,zone=b"]).unwrap_err().contains("these localities make 1"));
        assert!(found(&["region=a", ""]).unwrap_err().contains("node 2 has no locality"));
        let crowd: Vec<&str> = ["region=b"].into_iter().chain(["region=a"; 14]).collect();
        assert!(found(&crowd).unwrap_err().contains("region=a has more than 13 nodes"));
    }

    #[test]
    fn no_address_is_given_twice() {
        for slot in [0, SLOTS - 1] {
            let here = Addresses { slot };
            let mut all = vec![here.host(), here.backbone_to_host()];
            for piece in STORE_PIECE..FIRST_REGION_PIECE + REGIONS_MAX {
                all.push(here.gateway(piece));
                all.extend((0..NODES_PER_REGION_MAX).map(|index| here.in_piece(piece, index)));
            }
            let (first, last) = (Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 19, 255, 254));
            assert!(all.iter().all(|address| (first..=last).contains(address)), "{all:?}");
            assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        }
    }
}
