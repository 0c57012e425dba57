//! Where a server stands to its shard, and what keeps a standby from following.

use cluster::{Role, ServerState};
use fleet::readiness::{Finding, Place};

use super::rules::{Fleet, Seen};

/// Where a server stands to its shard: another identity, an older timeline, an upstream that is not the leaseholder.
pub(super) fn findings(fleet: &Fleet, seen: &Seen) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(server) = &seen.server else { return found };
    let (shard, leader) = (&seen.shard, fleet.leader(&seen.shard));
    if let Some(floor) = fleet.floors.get(shard).filter(|floor| floor.system_identifier != server.system_identifier) {
        let (is, expected) = (&server.system_identifier, &floor.system_identifier);
        let what = format!(
            "the server has system identifier {is}, and shard \"{shard}\" has {expected}: it belongs to another one"
        );
        found.push(Finding::missing(what).mended(Place::Node, ["--shard NAME, with the server's own shard"]));
    }
    let ahead = leader.and_then(|leader| leader.server.as_ref());
    if let Some(ahead) = ahead.filter(|ahead| ahead.version / 10_000 != server.version / 10_000) {
        let (is, leads) = (server.version / 10_000, ahead.version / 10_000);
        found.push(Finding::missing(format!(
            "the server is of release {is}, and the shard's leaseholder of release {leads}"
        )));
    }
    match seen.role {
        Some(Role::Overtaken) => found.push(overtaken(fleet, seen, server)),
        Some(Role::Detached) => found.push(detached(fleet, seen, server)),
        _ => {}
    }
    found.extend(replication_line(fleet, seen));
    found
}

fn overtaken(fleet: &Fleet, seen: &Seen, server: &ServerState) -> Finding {
    let floor = fleet.floors.get(&seen.shard).map_or(0, |floor| floor.timeline);
    let leader = fleet.leader(&seen.shard);
    let reached = leader.and_then(|leader| leader.server.as_ref()).map_or(floor, |ahead| ahead.timeline.max(floor));
    let what = format!(
        "the server is a primary on timeline {}, and shard \"{}\" has reached timeline {reached}: stop it, and make it \
         a standby",
        server.timeline, seen.shard
    );
    let finding = Finding::missing(what);
    let (Some(leader), Some(facts)) = (leader, seen.facts()) else { return finding };
    let Some((host, port)) = leader.address.rsplit_once(':') else { return finding };
    let data = facts.settings.get("data_directory").map_or("DATA", String::as_str);
    // Any node's port leads to the leaseholder.
    finding.mended(
        Place::Host,
        [format!(
            "pg_rewind --target-pgdata='{data}' --write-recovery-conf --source-server='host={host} port={port} \
             user=postgres dbname=postgres'"
        )],
    )
}

fn detached(fleet: &Fleet, seen: &Seen, server: &ServerState) -> Finding {
    let standby = seen.facts().and_then(|facts| facts.standby.as_ref());
    let does = standby.and_then(|one| one.receiver.clone()).unwrap_or_else(|| "not receiving".to_owned());
    let from = match standby.and_then(|one| Some((one.upstream_host.as_ref()?, one.upstream_port.as_deref()))) {
        Some((host, port)) => format!(", and is to receive from {host}:{}", port.unwrap_or("5432")),
        None => String::new(),
    };
    let leader = fleet.leader(&seen.shard);
    let whom = leader.map_or("the shard has no leaseholder".to_owned(), |leader| {
        let timeline = leader.server.as_ref().map_or(0, |ahead| ahead.timeline);
        format!("the leaseholder is {} on timeline {timeline}", leader.name())
    });
    let timeline = server.timeline;
    let finding = Finding::missing(format!(
        "the standby does not follow the leaseholder: its WAL receiver is \"{does}\" on timeline {timeline}{from}; \
         {whom}"
    ));
    // The one cause that has a statement.
    let slot = seen.facts().and_then(|facts| facts.settings.get("primary_slot_name")).filter(|name| !name.is_empty());
    match slot.zip(leader.and_then(Seen::facts)) {
        Some((slot, primary)) if primary.slots.iter().all(|there| there.name != *slot) => {
            let create = format!("SELECT pg_create_physical_replication_slot('{}');", slot.replace('\'', "''"));
            finding.mended(Place::Primary { database: primary.database.clone() }, [create])
        }
        _ => finding,
    }
}

/// On a leaseholder that no line lets standbys into, though one of them is to stream through a node's port.
fn replication_line(fleet: &Fleet, seen: &Seen) -> Option<Finding> {
    if seen.role != Some(Role::Leaseholder) || seen.facts()?.hba.as_ref()?.replication {
        return None;
    }
    let through_a_port = |standby: &&Seen| {
        let upstream = standby.facts().and_then(|facts| {
            let standby = facts.standby.as_ref()?;
            Some(format!("{}:{}", standby.upstream_host.as_ref()?, standby.upstream_port.as_ref()?))
        });
        standby.shard == seen.shard && upstream.is_some_and(|at| fleet.nodes.iter().any(|node| node.address == at))
    };
    let standby = fleet.nodes.iter().find(through_a_port)?;
    let what = format!("no line lets in standbys that stream through the nodes' ports, as {} is to", standby.name());
    Some(Finding::missing(what).mended(Place::Hba, ["host  replication  all  127.0.0.1/32  scram-sha-256"]))
}
