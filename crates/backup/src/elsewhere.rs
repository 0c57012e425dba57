//! Rows that were read outside of the execution locality: no error, and never silent.
//!
//! A shard may have no server in the locality. Then the closest one elsewhere is read, and the job says so: as its
//! `running_status` once it has succeeded, and as a notice to a client that waits for it. What each node has read, and
//! how much of it across localities, stands in the manifest.

use std::collections::BTreeMap;

use cluster::{Filter, Locality, NodeId, View};

use crate::explain::crosses;
use crate::manifest::Manifest;

/// Servers that are named; of more than these the sum is told.
const NAMED_MAX: usize = 5;

/// What was read of one server, and how much of it by nodes that share no leading tier with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Read {
    bytes: u64,
    across: u64,
}

/// What a job says of rows that came from servers outside of its execution locality; none if there were no such rows.
/// Where a node was whose locality is not known any more cannot be told, and nothing is said of it.
pub(crate) fn note(manifest: &Manifest, view: &View) -> Option<String> {
    // It was read by the job already.
    let filter: Filter = manifest.filter.parse().ok()?;
    let place = |node: NodeId| view.node(node).map(|known| known.info.locality.clone());
    let mut reads: BTreeMap<(String, NodeId), Read> = BTreeMap::new();
    for shard in &manifest.shards {
        for file in shard.files.iter().filter(|file| file.what.is_some()) {
            let server = file.read_from.unwrap_or(shard.read_from);
            let Some(there) = place(server).filter(|there| there.first_unmatched(&filter).is_some()) else { continue };
            let read = reads.entry((shard.shard.clone(), server)).or_default();
            read.bytes += file.bytes;
            if place(file.written_by).is_some_and(|here| crosses(&here, &there)) {
                read.across += file.bytes;
            }
        }
    }
    words(&reads, place)
}

fn words(reads: &BTreeMap<(String, NodeId), Read>, place: impl Fn(NodeId) -> Option<Locality>) -> Option<String> {
    let across = |read: &Read| {
        if read.across > 0 { format!(", {} of them across localities", read.across) } else { String::new() }
    };
    let one = |((shard, node), read): (&(String, NodeId), &Read)| {
        let place = place(*node).map(|place| format!(" ({place})")).unwrap_or_default();
        format!("{} bytes of shard {shard} from node {node}{place}{}", read.bytes, across(read))
    };
    let mut told: Vec<String> = reads.iter().take(NAMED_MAX).map(one).collect();
    if reads.len() > NAMED_MAX {
        let others = reads.values().skip(NAMED_MAX).fold(Read::default(), |sum, read| Read {
            bytes: sum.bytes + read.bytes,
            across: sum.across + read.across,
        });
        told.push(format!("{} bytes from others{}", others.bytes, across(&others)));
    }
    (!told.is_empty()).then(|| format!("read outside of the execution locality: {}", told.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_named_with_their_bytes_and_many_are_summed_up() {
        let place = |node: NodeId| (node != NodeId(2)).then(|| "region=east".parse::<Locality>().unwrap());
        let reads = |count: i32| -> BTreeMap<_, _> {
            (1..=count)
                .map(|n| (("s1".to_owned(), NodeId(n)), Read { bytes: 100, across: 10 * (n as u64 - 1) }))
                .collect()
        };
        assert_eq!(words(&reads(0), place), None);
        assert_eq!(
            words(&reads(2), place).unwrap(),
            "read outside of the execution locality: 100 bytes of shard s1 from node 1 (region=east); 100 bytes of \
             shard s1 from node 2, 10 of them across localities"
        );
        assert!(words(&reads(7), place).unwrap().ends_with("; 200 bytes from others, 110 of them across localities"));
    }
}
