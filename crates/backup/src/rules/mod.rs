//! Where a backup runs and what it reads: the rules, as one pure function.
//!
//! [`decide`] takes what a node knows of a shard's servers and of all nodes ([`Fleet`]), and what the statement allows
//! ([`Rules`]), and says everything at once: which server is read and which would be next, which are passed over and
//! why, which nodes take part, and which do not and why. A job goes by it when it takes a point and when it deals out
//! spans ([`mod@crate::assign`]); EXPLAIN BACKUP prints it. So what is explained is what is done.
//!
//! **Which server.** One that is fit ([`Reason`] lists what is not), best first: the leaseholder if its node takes part,
//! because then all spans are that node's; else one beside a node that takes part, then the closest to one by shared
//! leading tiers, then by kind (an asynchronous standby bothers nobody, a primary somebody, and a synchronous standby is
//! never paused), by round trip, by id. `balanced` leaves out the first of these.
//!
//! **Which servers beside it** is told in [`together`], and **what keeps what is read** in [`mod@modes`].

mod modes;
mod together;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use cluster::{Filter, Locality, NodeId, Role, Tier, View};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};

pub(crate) use self::modes::modes;
pub use self::modes::{Chosen, Hindrance, Mode, Wanted, choose};
pub use self::together::{Apart, TOGETHER_MAX, nearest};
use crate::assign::{Anchor, Worker};

/// Which servers a statement lets its rows be read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Replicas {
    /// Any that is fit.
    #[default]
    Any,
    /// Standbys: never the primary.
    Standby,
    /// Asynchronous standbys: never one that commits may wait for.
    NonVoting,
}

impl Replicas {
    /// Reads the value of the option `replica`.
    ///
    /// # Errors
    ///
    /// 22023 for any other word.
    pub(crate) fn parse(text: &str) -> Result<Self, PgError> {
        match text.to_ascii_lowercase().as_str() {
            "any" => Ok(Self::Any),
            "standby" => Ok(Self::Standby),
            "nonvoting" => Ok(Self::NonVoting),
            _ => {
                let message = format!("invalid value for option \"replica\": \"{text}\"");
                Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message)
                    .hint("Available values: any, standby, nonvoting."))
            }
        }
    }

    /// Whether a server of this role may be read.
    fn allows(self, role: Role) -> bool {
        match self {
            Self::Any => true,
            Self::Standby => role != Role::Leaseholder,
            Self::NonVoting => role == Role::NonVoting,
        }
    }
}

/// What a statement, and the fleet that it is for, allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The tiers that a node must have to take part.
    pub filter: Filter,
    /// Whether a server outside the filter may not even be read.
    pub strict: bool,
    /// Which servers may be read.
    pub replicas: Replicas,
    /// Whether spans are shared among all matching nodes that hold a replica, instead of being the leaseholder's.
    pub balanced: bool,
    /// What is to keep standbys from taking away what is read.
    pub standby_mode: Wanted,
    /// The fleet's limit for bytes of WAL that a standby may be behind its primary; 0 is any number.
    pub lag_limit: u64,
}

impl Rules {
    /// Nothing but a filter.
    pub fn matching(filter: &Filter) -> Self {
        Self { filter: filter.clone(), ..Self::default() }
    }

    /// Whether the statement keeps us away from the leaseholder's rows and tables, as far as that is known while nobody
    /// leads the shard.
    pub(crate) fn forbid(&self, leaseholder: Option<&Locality>) -> bool {
        let is_outside = |place: &Locality| place.first_unmatched(&self.filter).is_some();
        !self.replicas.allows(Role::Leaseholder) || self.strict && leaseholder.is_some_and(is_outside)
    }

    /// Why a server that is read may be read no more: of its roles those that the statement keeps away from. Only one that
    /// it is known to have counts: a server that restarts, or follows nobody while nobody leads, is not another one yet.
    pub(crate) fn withdraw(&self, role: Role, place: &Locality) -> Option<Reason> {
        let is_withdrawn = match role {
            Role::Leaseholder => self.forbid(Some(place)),
            Role::Voting => !self.replicas.allows(role),
            Role::NonVoting | Role::Detached | Role::Overtaken | Role::Down | Role::None => false,
        };
        let outside = || place.first_unmatched(&self.filter).cloned().map(Reason::Outside);
        match is_withdrawn {
            false => None,
            true if self.replicas.allows(role) => outside(),
            true => Some(Reason::NotAsked(self.replicas)),
        }
    }
}

/// A server of the shard, as it is seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it is to the shard.
    pub role: Role,
    /// Bytes of WAL that it has not replayed.
    pub behind: u64,
    /// What its WAL receiver does, if that is not streaming.
    pub not_streaming: Option<String>,
    /// `recovery_min_apply_delay`, if there is one.
    pub delay: Option<String>,
    /// Whether somebody has paused its replay.
    pub paused: bool,
    /// Whether its node's role may pause its replay.
    pub may_pause: bool,
    /// `hot_standby_feedback`.
    pub feedback: bool,
    /// Bytes that its disk has free, if that is known.
    pub free: Option<u64>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub id: NodeId,
    /// Its tiers.
    pub locality: Locality,
    /// Whether it answers.
    pub reachable: bool,
    /// How long the answers of others take it, in milliseconds, as far as it has had any.
    pub round_trips: BTreeMap<NodeId, u32>,
    /// Its server, if that is one of the shard in question.
    pub server: Option<Standing>,
}

/// All nodes, with the servers of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    /// The nodes that have a number.
    pub places: Vec<Place>,
}

impl Place {
    /// How far another one is from here: the leading tiers that they share, then the time that an answer takes.
    fn distance(&self, other: &Self) -> (Reverse<usize>, u32) {
        let measured = self.round_trips.get(&other.id).copied();
        let round_trip = if self.id == other.id { 0 } else { measured.unwrap_or(u32::MAX) };
        (Reverse(self.locality.shared_prefix(&other.locality)), round_trip)
    }
}

impl Fleet {
    /// What `view` knows, with the servers of `shard`.
    pub fn of(view: &View, shard: &str) -> Self {
        let head = view.leader(shard).and_then(|node| node.server_state()).map(|server| server.lsn.0);
        let place = |known: &cluster::Known| {
            let state = known.info.server_state();
            let behind = head.unwrap_or(0).saturating_sub(state.map_or(0, |state| state.lsn.0));
            let upstream = state.and_then(|state| state.upstream.as_ref());
            let standing = || Standing {
                role: view.role(&known.info),
                behind: if state.is_some() { behind } else { 0 },
                not_streaming: upstream.map(|it| it.status.clone()).filter(|status| status != "streaming"),
                delay: state.and_then(|state| state.replay.delay.clone()),
                paused: state.is_some_and(|state| state.replay.paused),
                may_pause: state.is_some_and(|state| state.replay.may_pause),
                feedback: state.is_some_and(|state| state.replay.feedback),
                free: state.and_then(|state| state.replay.free),
            };
            Some(Place {
                id: known.info.node_id?,
                locality: known.info.locality.clone(),
                reachable: known.reachable,
                round_trips: known.info.round_trips.clone(),
                server: (known.info.shard == shard && known.info.server.is_some()).then(standing),
            })
        };
        Self { places: view.nodes.values().filter_map(place).collect() }
    }

    /// The node of this number.
    pub(crate) fn place(&self, id: NodeId) -> Option<&Place> {
        self.places.iter().find(|place| place.id == id)
    }

    /// The node beside the primary, if it answers.
    pub(crate) fn leaseholder(&self) -> Option<&Place> {
        let leads = |place: &&Place| place.server.as_ref().is_some_and(|server| server.role == Role::Leaseholder);
        self.places.iter().filter(|place| place.reachable).find(leads)
    }
}

/// Why a server is not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its node does not answer.
    Unreachable,
    /// It does not answer its node.
    Down,
    /// It is a primary that does not lead the shard.
    Overtaken,
    /// It follows another primary, or nobody.
    Detached,
    /// Its WAL receiver does something else.
    NotStreaming(String),
    /// It is this many bytes of WAL behind, and so many are allowed.
    Lags(u64, u64),
    /// It replays late on purpose, by so much.
    Delayed(String),
    /// Somebody else has paused its replay.
    Paused,
    /// The option `replica` does not allow its role.
    NotAsked(Replicas),
    /// Its node lacks a tier of a strict filter.
    Outside(Tier),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable => f.write_str("its node does not answer"),
            Self::Down => f.write_str("it does not answer"),
            Self::Overtaken => f.write_str("it is a primary that does not lead its shard"),
            Self::Detached => f.write_str("it does not follow the shard's primary"),
            Self::NotStreaming(status) => write!(f, "it does not stream from its primary ({status})"),
            Self::Lags(bytes, most) => {
                write!(f, "it is {bytes} bytes of WAL behind, more than bulkio.backup.standby_lag_limit = {most}")
            }
            Self::Delayed(by) => write!(f, "its replay is late by recovery_min_apply_delay = {by}"),
            Self::Paused => f.write_str("its replay is paused by somebody else"),
            Self::NotAsked(Replicas::Standby) => f.write_str("the statement says replica = 'standby'"),
            Self::NotAsked(_) => f.write_str("the statement says replica = 'nonvoting'"),
            Self::Outside(tier) => write!(f, "its node lacks {tier}, and the execution locality is strict"),
        }
    }
}

/// A server that may be read, and how it compares with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The node beside it.
    pub node: NodeId,
    /// What it is to the shard.
    pub role: Role,
    /// Whether all spans are its own node's.
    pub is_home: bool,
    /// Whether its node takes part.
    pub matches: bool,
    /// The leading tiers that its node, if it does not take part itself, shares with the closest one that does.
    pub shared: usize,
}

impl fmt::Display for Replica {
    /// Why it is where it is among the others.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.is_home, self.matches, self.shared) {
            (true, ..) => return f.write_str("it is the leaseholder, and its node takes part"),
            (_, true, _) => f.write_str("its node takes part")?,
            (_, false, 0) => f.write_str("its node does not take part, and shares no tier with one that does")?,
            (_, false, n) => {
                write!(f, "its node does not take part, and shares {n} leading tier(s) with one that does")?
            }
        }
        f.write_str(match self.role {
            Role::NonVoting => "; no commit waits for it",
            Role::Voting => "; commits may wait for it, so its replay is never paused",
            _ => "; it serves the shard's writes, too",
        })
    }
}

/// Why a node does not take part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// It lacks this tier of the filter.
    Lacks(Tier),
    /// It does not answer.
    Unreachable,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lacks(tier) => write!(f, "lacks {tier}"),
            Self::Unreachable => f.write_str("does not answer"),
        }
    }
}

/// Everything that the rules say of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The servers that may be read, the best first.
    pub reads: Vec<Replica>,
    /// Those of them that are read at once, at one proven point: the one that the schema is dumped on first. At least
    /// one, if there is any.
    pub together: Vec<NodeId>,
    /// Those that are as near as these, and cannot be read beside others.
    pub apart: Vec<(NodeId, Role, Apart)>,
    /// The others, with the reason.
    pub passed_over: Vec<(NodeId, Role, Reason)>,
    /// The nodes that take part.
    pub workers: Vec<NodeId>,
    /// The others, with the reason.
    pub excluded: Vec<(NodeId, Exclusion)>,
}

impl Decision {
    /// Those that are read, if each of them gives a point.
    pub(crate) fn first(&self) -> Vec<NodeId> {
        let alone = || self.reads.first().map(|replica| replica.node).into_iter().collect();
        if self.together.is_empty() { alone() } else { self.together.clone() }
    }

    /// The servers that may be read, in the order in which they are asked for a point.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = &Replica> {
        let is_first = |replica: &&Replica| self.together.first() == Some(&replica.node);
        self.reads.iter().filter(is_first).chain(self.reads.iter().filter(move |replica| !is_first(replica)))
    }
}

/// Decides for one shard.
pub fn decide(fleet: &Fleet, rules: &Rules) -> Decision {
    let mut decision = Decision::default();
    for place in &fleet.places {
        match exclusion(place, rules) {
            None => decision.workers.push(place.id),
            Some(why) => decision.excluded.push((place.id, why)),
        }
    }
    let participants: Vec<&Place> = fleet.places.iter().filter(|place| exclusion(place, rules).is_none()).collect();
    let mut ranked = Vec::new();
    for (place, server) in fleet.places.iter().filter_map(|place| Some((place, place.server.as_ref()?))) {
        if let Some(reason) = unfit(place, server, rules) {
            decision.passed_over.push((place.id, server.role, reason));
            continue;
        }
        let kind = match server.role {
            Role::NonVoting => 0,
            Role::Leaseholder => 1,
            _ => 2,
        };
        let matches = exclusion(place, rules).is_none();
        let is_home = !rules.balanced && matches && server.role == Role::Leaseholder;
        // Its own node is the nearest to it; that one has more tiers than others have is no merit.
        let others = || participants.iter().map(|near| near.distance(place)).min();
        let nearest = if matches { None } else { others() };
        let (shared, round_trip) = nearest.unwrap_or((Reverse(0), 0));
        let rank = (!is_home, !matches, shared, kind, round_trip, place.id);
        ranked.push((rank, Replica { node: place.id, role: server.role, is_home, matches, shared: shared.0 }));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    decision.reads = ranked.into_iter().map(|(_, replica)| replica).collect();
    (decision.together, decision.apart) = together::together(fleet, &participants, &decision.reads);
    decision.passed_over.sort_by_key(|(node, ..)| *node);
    decision.workers.sort();
    decision.excluded.sort_by_key(|(node, _)| *node);
    decision
}

fn exclusion(place: &Place, rules: &Rules) -> Option<Exclusion> {
    match place.locality.first_unmatched(&rules.filter) {
        Some(tier) => Some(Exclusion::Lacks(tier.clone())),
        None => (!place.reachable).then_some(Exclusion::Unreachable),
    }
}

fn unfit(place: &Place, server: &Standing, rules: &Rules) -> Option<Reason> {
    if !place.reachable {
        return Some(Reason::Unreachable);
    }
    match server.role {
        Role::Down | Role::None => return Some(Reason::Down),
        Role::Overtaken => return Some(Reason::Overtaken),
        Role::Detached => return Some(Reason::Detached),
        Role::Leaseholder | Role::Voting | Role::NonVoting => {}
    }
    if !rules.replicas.allows(server.role) {
        return Some(Reason::NotAsked(rules.replicas));
    }
    if let Some(tier) = place.locality.first_unmatched(&rules.filter).filter(|_| rules.strict) {
        return Some(Reason::Outside(tier.clone()));
    }
    if server.role == Role::Leaseholder {
        return None;
    }
    if let Some(status) = &server.not_streaming {
        return Some(Reason::NotStreaming(status.clone()));
    }
    if let Some(by) = &server.delay {
        return Some(Reason::Delayed(by.clone()));
    }
    if server.paused {
        return Some(Reason::Paused);
    }
    let most = rules.lag_limit;
    (most > 0 && server.behind > most).then_some(Reason::Lags(server.behind, most))
}

/// The nodes that take part, as those that export what is read from the servers beside `servers`.
pub fn workers(fleet: &Fleet, rules: &Rules, servers: &[NodeId]) -> Vec<Worker> {
    let holds = |place: &Place| {
        let role = place.server.as_ref().map(|server| server.role);
        matches!(role, Some(Role::Leaseholder | Role::Voting | Role::NonVoting))
    };
    let taking_part = fleet.places.iter().filter(|place| exclusion(place, rules).is_none());
    let worker = |place: &Place| Worker {
        id: place.id,
        locality: place.locality.clone(),
        reads_own_server: servers.contains(&place.id),
        holds_replica: holds(place),
    };
    let mut workers: Vec<Worker> = taking_part.map(worker).collect();
    workers.sort_by_key(|worker| worker.id);
    workers
}

/// The node that the rule of assignment starts from: the leaseholder's, or, where the statement does not let the
/// leaseholder be read, the one beside the first of the servers that are.
pub fn anchor(fleet: &Fleet, rules: &Rules, servers: &[NodeId]) -> Option<Anchor> {
    let stands_in = !rules.replicas.allows(Role::Leaseholder);
    let place = match stands_in {
        false => fleet.leaseholder(),
        true => servers.first().and_then(|server| fleet.place(*server)),
    };
    place.map(|place| Anchor { id: Some(place.id), locality: place.locality.clone(), stands_in })
}

/// That no server of `shard` may be read.
pub(crate) fn nothing_to_read(shard: &str, decision: &Decision, rules: &Rules) -> PgError {
    let reasons: Vec<String> =
        decision.passed_over.iter().map(|(node, role, reason)| format!("node {node} ({role}): {reason}")).collect();
    let message = format!("shard \"{shard}\" has no server that the backup may read");
    let error = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
        .detail(format!("Passed over: {}.", reasons.join("; ")));
    if rules.strict || rules.replicas != Replicas::Any {
        error.hint("Nothing else is read instead; leave out STRICT EXECUTION LOCALITY or replica to allow it.")
    } else {
        error.hint("SHOW NODES tells which nodes and servers are there.")
    }
}

#[cfg(test)]
pub(crate) mod tests;
