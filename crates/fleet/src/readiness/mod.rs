//! Is a server ready for backups and restores, and if not, what makes it so?
//!
//! What can be known of a server is read first, one query for each subject, as [`ServerFacts`] (`read`); a server that
//! does not let its node in is [`Closed`]. What is missing is then decided by pure functions from these facts and from
//! the server's [`Seat`] in its fleet: [`findings`], in the parts `role`, `standby` and `room`. Each [`Finding`] says
//! what is amiss and, wherever that is possible, the very statement or line that mends it, and where it belongs.
//!
//! Nothing here changes anything. What the service role needs is written down here once ([`make_service_role`],
//! [`make_restore_role`]), for whoever makes it and for whoever misses it.

mod facts;
mod finding;
mod read;
mod role;
mod room;
mod standby;
#[cfg(test)]
mod tests;

pub use facts::{Closed, DatabaseFacts, HbaFacts, Program, RoleFacts, ServerFacts, SlotFacts, StandbyFacts};
pub use finding::{Finding, Place, Severity, Step};
pub use read::read;
pub use role::{closed, guarded, make_restore_role, make_service_role};

use cluster::Role;

/// What a server is in its fleet, as far as that bears on what it needs.
#[derive(Clone, Debug, Default)]
pub struct Seat {
    /// What its node is to the shard; unknown where no fleet was asked.
    pub role: Option<Role>,
    /// Whether its node trusts whoever reaches it: then nobody is told how to keep people out.
    pub insecure: bool,
    /// Bytes of WAL that it is behind its primary.
    pub lag: u64,
    /// A standby that is further behind is passed over.
    pub lag_max: u64,
    /// Sessions per database that a backup lends at the same time.
    pub readers: usize,
    /// The replication slot that a standby without one is advised to hold.
    pub slot_name: String,
    /// Sessions that all nodes together hold for the registry, if that is on this server.
    pub registry_sessions: usize,
}

/// What the server lacks, the gravest first.
pub fn findings(facts: &ServerFacts, seat: &Seat) -> Vec<Finding> {
    let mut found = role::findings(facts);
    found.extend(role::doors(facts, seat));
    found.extend(standby::findings(facts, seat));
    found.extend(standby::slots(facts));
    found.extend(room::findings(facts, seat));
    found.extend(room::programs(facts));
    found.sort_by_key(|finding| finding.severity);
    found
}

/// How a backup would read the server, as a clause.
pub fn reading(facts: &ServerFacts, seat: &Seat) -> &'static str {
    if seat.role == Some(Role::Overtaken) {
        return "not read, because another primary has overtaken it";
    }
    if !facts.in_recovery() {
        return "read at an exported snapshot";
    }
    match seat.role {
        Some(Role::Detached) => "not read, because it does not follow its primary",
        Some(Role::Voting) => "never paused, because commits may wait for it; read where its replay stands still",
        _ if facts.role.may_pause => "paused for the moment in which a backup takes its point",
        _ => "read where its replay stands still, or by one session",
    }
}
