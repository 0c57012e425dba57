//! Where a server stands to its shard, and what keeps a standby from following.

use cluster::{Role, ServerState};
use fleet::readiness::{Finding, Place, ServerFacts, StandbyFacts, guarded};

use super::anew;
use super::rules::{Fleet, Seen};

/// Where a server stands to its shard: another identity, an older timeline, an upstream that is not the leaseholder.
pub(super) fn findings(fleet: &Fleet, seen: &Seen) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(server) = &seen.server else {
        found.extend(anew::stopped(fleet, seen));
        return found;
    };
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
    match leader.zip(seen.facts()) {
        Some((leader, facts)) => anew::made(finding, leader, facts),
        None => finding,
    }
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
    match (leader, seen.facts(), standby) {
        (Some(leader), Some(facts), Some(standby)) => led(fleet, (seen, server, facts, standby), leader, finding),
        _ => finding,
    }
}

/// What leads a standby to the leaseholder: a new copy, if it is past the fork; else its slot and its way there.
fn led(
    fleet: &Fleet,
    (seen, server, facts, standby): (&Seen, &ServerState, &ServerFacts, &StandbyFacts),
    leader: &Seen,
    mut finding: Finding,
) -> Finding {
    let behind = leader.server.as_ref().filter(|ahead| ahead.timeline > server.timeline);
    // Who has replayed more than the leaseholder has written at all is past the fork wherever that was.
    if behind.is_some_and(|ahead| standby.is_past_fork || server.lsn > ahead.lsn) {
        finding.what.push_str(
            "; it has replayed more of its timeline than the leaseholder has, and cannot go on from there: stop it, and \
             make it a standby anew",
        );
        return anew::made(finding, leader, facts);
    }
    let slot = facts.settings.get("primary_slot_name").filter(|name| !name.is_empty());
    if let Some((slot, primary)) = slot.zip(leader.facts())
        && primary.slots.iter().all(|there| there.name != *slot)
    {
        let create = format!("SELECT pg_create_physical_replication_slot('{}');", slot.replace('\'', "''"));
        finding = finding.mended(Place::Primary { database: primary.database.clone() }, [create]);
    }
    if !leads(fleet, seen, standby, leader) {
        return turned(finding, standby, leader);
    }
    if behind.is_some() && finding.steps.is_empty() {
        finding.what.push_str(
            "; if the server's log says that it is not in the history of that one, it needs pg_rewind or a new \
             pg_basebackup",
        );
    }
    finding
}

/// Whether a standby is to receive from a port of its shard's nodes, or from the leaseholder's server itself.
fn leads(fleet: &Fleet, seen: &Seen, standby: &StandbyFacts, leader: &Seen) -> bool {
    let Some(host) = &standby.upstream_host else { return false };
    let port = standby.upstream_port.as_deref().unwrap_or("5432");
    let at = format!("{host}:{port}");
    if fleet.nodes.iter().any(|node| node.shard == seen.shard && node.address == at) {
        return true;
    }
    let host_of = |seen: &Seen| seen.address.rsplit_once(':').map(|(host, _)| host.to_owned());
    let is_same_host = host_of(seen) == host_of(leader);
    leader.facts().is_some_and(|primary| match primary.is_local_socket {
        true => is_same_host && primary.address == format!("{host}/.s.PGSQL.{port}"),
        false => {
            let is_there = host_of(leader).as_ref() == Some(host) && primary.address.ends_with(&format!(":{port}"));
            is_there || is_same_host && primary.address == at
        }
    })
}

/// The connection string of a standby, led to the leaseholder through its node's port. It is put together on the server:
/// it may hold a password, which nobody else is to see.
fn turned(mut finding: Finding, standby: &StandbyFacts, leader: &Seen) -> Finding {
    let Some((host, port)) = leader.address.rsplit_once(':') else { return finding };
    let place = format!("host={} port={port}", anew::value(host.trim_matches(['[', ']'])));
    if !standby.may_be_led {
        finding.what.push_str(&format!("; its primary_conninfo has to say {place}, and user=, as whom it receives"));
        return finding;
    }
    let added = format!("current_setting('primary_conninfo') || ' {}'", place.replace('\'', "''"));
    let set = format!("SELECT format('ALTER SYSTEM SET primary_conninfo = %L;', {added}) \\gexec");
    finding.mended(Place::Server, [set, "SELECT pg_reload_conf();".to_owned()])
}

/// On a leaseholder that no line lets standbys into, though one of them is to stream through a node's port.
fn replication_line(fleet: &Fleet, seen: &Seen) -> Option<Finding> {
    let facts = seen.facts().filter(|_| seen.role == Some(Role::Leaseholder))?;
    if facts.hba.as_ref()?.replication {
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
    Some(Finding::missing(what).mended(Place::Hba, [guarded(facts.is_local_socket, "replication", "all")]))
}
