//! What may pass between the regions of a closed network, and how much of it has.
//!
//! The filter stands in the namespace that all regions are connected through. It keeps no state: a packet passes by its
//! interfaces and ports, answers are those from a port that do not begin a connection. Each rule has a counter, so
//! that afterwards it can be said what crossed, and what tried to.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use anyhow::Context as _;
use serde_json::Value;

/// Packets that nothing allows, wherever they come from.
const REFUSED: &str = "refused";

/// Who is where, and what may pass.
pub(super) struct Filter<'a> {
    /// The regions' labels; the interface that leads to region i is `r<i>`.
    pub(super) regions: Vec<&'a str>,
    /// The region that reaches the store.
    pub(super) near_store: usize,
    /// The port of every node.
    pub(super) node_port: u16,
    /// The port on which nodes tell their health to the host.
    pub(super) http_port: u16,
    /// The store's port.
    pub(super) store_port: u16,
    /// The host, whose user tries things.
    pub(super) host: Ipv4Addr,
}

impl Filter<'_> {
    /// The filter in the language of nftables.
    pub(super) fn rules(&self) -> anyhow::Result<String> {
        let mut rules = Vec::new();
        let count = self.regions.len();
        for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))).filter(|(a, b)| a != b) {
            let counter = crossing(self.regions[from], self.regions[to]);
            let (port, way) = (self.node_port, format!("iifname \"r{from}\" oifname \"r{to}\" tcp"));
            rules.push((counter.clone(), format!("{way} dport {port}"), "accept"));
            rules.push((counter, format!("{way} sport {port} {ANSWER}"), "accept"));
        }
        let (host, ports) = (self.host, format!("{{ {}, {} }}", self.node_port, self.http_port));
        rules.push(("host".to_owned(), format!("iifname \"host\" ip saddr {host} tcp dport {ports}"), "accept"));
        rules.push((
            "host".to_owned(),
            format!("oifname \"host\" ip daddr {host} tcp sport {ports} {ANSWER}"),
            "accept",
        ));
        let port = self.store_port;
        for (index, region) in self.regions.iter().enumerate() {
            let (counter, way) = (to_store(region), format!("iifname \"r{index}\" oifname \"store\" tcp dport {port}"));
            if index == self.near_store {
                rules.push((counter.clone(), way, "accept"));
                let back = format!("iifname \"store\" oifname \"r{index}\" tcp sport {port} {ANSWER}");
                rules.push((counter, back, "accept"));
            } else {
                rules.push((counter, way, "reject with tcp reset"));
            }
        }
        rules.push((REFUSED.to_owned(), "meta l4proto tcp".to_owned(), "reject with tcp reset"));
        rules.push((REFUSED.to_owned(), String::new(), "reject"));
        table(&rules)
    }

    /// What the counters say, for a reader.
    pub(super) fn account(&self, counters: &Counters) -> Vec<String> {
        let packets = |name: &str| counters.packets(name);
        let mut lines = vec![format!("Packets between regions, all to or from port {} of a node:", self.node_port)];
        for (from, to) in self.regions.iter().flat_map(|from| self.regions.iter().map(move |to| (from, to))) {
            if from != to {
                lines.push(format!("  {from} to {to}: {}", packets(&crossing(from, to))));
            }
        }
        lines.push("Packets between the S3 server and regions:".to_owned());
        for (index, region) in self.regions.iter().enumerate() {
            let fate = if index == self.near_store { "" } else { ", refused" };
            lines.push(format!("  {region}: {}{fate}", packets(&to_store(region))));
        }
        lines.push(format!("Other packets between regions, refused: {}", packets(REFUSED)));
        lines
    }
}

/// Part of a connection that the other side has begun.
const ANSWER: &str = "tcp flags & (syn | ack) != syn";

fn crossing(from: &str, to: &str) -> String {
    format!("{from}_to_{to}")
}

fn to_store(region: &str) -> String {
    crossing(region, "store")
}

fn table(rules: &[(String, String, &str)]) -> anyhow::Result<String> {
    let mut text = "table inet backhaul {\n".to_owned();
    let mut counters: Vec<&String> = rules.iter().map(|(counter, ..)| counter).collect();
    counters.dedup();
    for counter in counters {
        writeln!(text, "  counter {counter} {{ }}")?;
    }
    text.push_str("  chain crossing {\n    type filter hook forward priority 0; policy drop;\n");
    for (counter, packets, verdict) in rules {
        writeln!(text, "    {packets} counter name {counter} {verdict}")?;
    }
    text.push_str("  }\n}\n");
    Ok(text)
}

/// What has been counted so far.
pub(super) struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Reads what `nft -j list counters` prints.
    ///
    /// # Errors
    ///
    /// It is not what it was.
    pub(super) fn read(text: &str) -> anyhow::Result<Self> {
        let list: Value = serde_json::from_str(text).context("read the counters")?;
        let entries = list["nftables"].as_array().context("read the list of counters")?;
        let counters = entries.iter().filter_map(|entry| {
            let counter = entry.get("counter")?;
            Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))
        });
        Ok(Self(counters.collect()))
    }

    fn packets(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter() -> Filter<'static> {
        let (regions, host) = (vec!["east", "west"], Ipv4Addr::new(198, 18, 0, 1));
        Filter { regions, near_store: 1, node_port: 26257, http_port: 8080, store_port: 9000, host }
    }

    #[test]
    fn only_node_ports_pass_and_only_one_region_reaches_the_store() {
        let rules = filter().rules().unwrap();
        let between = |from: &str, to: &str| {
            let way = format!("iifname \"{from}\" oifname \"{to}\" ");
            let lines = rules.lines().filter_map(move |line| line.trim().strip_prefix(&way));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let pair = |name: &str| {
            [
                format!("tcp dport 26257 counter name {name} accept"),
                format!("tcp sport 26257 {ANSWER} counter name {name} accept"),
            ]
        };
        assert_eq!(between("r0", "r1"), pair("east_to_west"));
        assert_eq!(between("r1", "r0"), pair("west_to_east"));
        assert_eq!(between("r1", "store"), ["tcp dport 9000 counter name west_to_store accept"]);
        assert_eq!(between("r0", "store"), ["tcp dport 9000 counter name east_to_store reject with tcp reset"]);
        assert!(between("host", "store").is_empty() && between("r0", "r0").is_empty());
        assert!(rules.contains("policy drop") && rules.trim_end().ends_with("counter name refused reject\n  }\n}"));
        assert_eq!(rules.matches("counter host { }").count(), 1);
    }

    #[test]
    fn what_was_counted_is_told_by_region() {
        let text = r#"{"nftables": [{"metainfo": {}}, {"counter": {"name": "west_to_store", "packets": 7}},
            {"counter": {"name": "west_to_east", "packets": 5}}]}"#;
        let lines = filter().account(&Counters::read(text).unwrap());
        let expected = [
            "Packets between regions, all to or from port 26257 of a node:",
            "  east to west: 0",
            "  west to east: 5",
            "Packets between the S3 server and regions:",
            "  east: 0, refused",
            "  west: 7",
            "Other packets between regions, refused: 0",
        ];
        assert_eq!(lines, expected);
        assert!(Counters::read("Error: syntax").is_err());
    }
}
