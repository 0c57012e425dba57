//! Room for what a backup or a restore opens: connections, locks, and the programs on the node's host.

use cluster::Role;

use super::facts::ServerFacts;
use super::{Finding, Place, Seat};
use crate::founders::Open;
use crate::founders::session::quoted;
use crate::loader::LOADERS_MAX;

/// The node's own session, by which it asks the server what it is.
const PROBE_SESSIONS: i64 = 1;

/// What a restore opens beside the sessions that load rows: for its progress, the schema, and the view of both.
const RESTORE_EXTRA: i64 = 4;

/// `max_connections` is raised in steps of this.
const STEP: i64 = 10;

/// What the server has no room for.
pub(super) fn findings(facts: &ServerFacts, seat: &Seat) -> Vec<Finding> {
    let mut found = Vec::new();
    found.extend(connections(facts, seat));
    found.extend(role_limit(facts, seat));
    found.extend(locks(facts));
    if facts.settings.contains_key("old_snapshot_threshold") && facts.number("old_snapshot_threshold") >= 0 {
        let what = "old_snapshot_threshold is set: a backup that takes longer fails with \"snapshot too old\"";
        found.push(Finding::missing(what).restarted(facts, "old_snapshot_threshold", "-1"));
    }
    found
}

/// What one backup of one database, or one restore, opens here at most.
fn needed(facts: &ServerFacts, seat: &Seat) -> i64 {
    let backup = i64::try_from(Open::connections_for(1, seat.readers)).unwrap_or(i64::MAX);
    let restores = facts.role.may_restore && !facts.in_recovery();
    let restore = i64::try_from(LOADERS_MAX).unwrap_or(i64::MAX).saturating_add(RESTORE_EXTRA);
    if restores { backup.max(restore) } else { backup }
}

/// What all nodes hold here as long as they run.
fn held(seat: &Seat) -> i64 {
    PROBE_SESSIONS.saturating_add(i64::try_from(seat.registry_sessions).unwrap_or(i64::MAX))
}

fn connections(facts: &ServerFacts, seat: &Seat) -> Option<Finding> {
    let max = facts.number("max_connections");
    let kept_back = match facts.role.is_super {
        true => 0,
        false => facts.number("superuser_reserved_connections") + facts.number("reserved_connections"),
    };
    let (needed, held) = (needed(facts, seat), held(seat));
    let (room, free) = (max - kept_back - held, max - kept_back - facts.sessions);
    let budget = format!(
        "a backup or restore opens up to {needed} connections here, beside {held} of the nodes; of max_connections = \
         {max}, {kept_back} are kept back and {} in use",
        facts.sessions
    );
    let lacking = needed - room.min(free);
    let raised = (max + lacking + STEP - 1) / STEP * STEP;
    let first = match facts.in_recovery() || seat.role == Some(Role::Leaseholder) {
        true => "; raise it on the standbys first, which may not have fewer than their primary",
        false => "",
    };
    let finding = match (room < needed, free < needed) {
        (true, _) => Finding::missing(format!("{budget}{first}")),
        (false, true) => Finding::advice(format!("{budget}: at this moment that is not enough{first}")),
        (false, false) => return None,
    };
    Some(finding.restarted(facts, "max_connections", &raised.to_string()))
}

fn role_limit(facts: &ServerFacts, seat: &Seat) -> Option<Finding> {
    let limit = i64::from(facts.role.connection_limit);
    let wanted = needed(facts, seat) + held(seat);
    if facts.role.is_super || limit < 0 || limit >= wanted {
        return None;
    }
    let name = quoted(&facts.role.name);
    let what =
        format!("role {name} may have {limit} connections, and a backup or restore with the nodes' own needs {wanted}");
    let primary = Place::Primary { database: facts.database.clone() };
    Some(Finding::missing(what).mended(primary, [format!("ALTER ROLE {name} CONNECTION LIMIT -1;")]))
}

/// `pg_dump` locks all tables of a database in one transaction.
fn locks(facts: &ServerFacts) -> Option<Finding> {
    let slots = facts.number("max_connections") + facts.number("max_prepared_transactions");
    let per_transaction = facts.number("max_locks_per_transaction");
    let (tables, name) = facts.databases.iter().filter_map(|one| Some((one.tables?, &one.name))).max()?;
    if slots <= 0 || tables < slots * per_transaction {
        return None;
    }
    let raised = (2 * tables + slots - 1) / slots;
    let what = format!(
        "database {} has {tables} tables, which pg_dump locks at once, and the server has room for {} locks",
        quoted(name),
        slots * per_transaction
    );
    Some(Finding::missing(what).restarted(facts, "max_locks_per_transaction", &raised.to_string()))
}

/// The programs of PostgreSQL that the node's host lacks.
pub(super) fn programs(facts: &ServerFacts) -> Vec<Finding> {
    let release = facts.version / 10_000;
    let install = format!("apt-get install postgresql-client-{release} postgresql-{release}");
    let lacking = facts.programs.iter().map(|program| Finding::missing(program.wrong.clone()));
    lacking.map(|finding| finding.mended(Place::Host, [install.clone()])).collect()
}
