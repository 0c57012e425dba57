//! What keeps a standby from taking away what is read on it.
//!
//! A standby replays what its primary did, and what VACUUM removed or DDL changed there conflicts with whoever reads the
//! rows of before. In mode `paused` its replay stands until everything is read; in `feedback` the primary keeps what is
//! read (`hot_standby_feedback`); in `retry` nothing is done, and what is lost is read anew at another point. A primary
//! has no mode. A pause costs those who wait for the standby, so it is for one that nobody's commits wait for, that may
//! be paused, and that has room for what it does not replay meanwhile.

use std::collections::BTreeMap;
use std::fmt;

use cluster::settings::Holding;
use cluster::{NodeId, Role};
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};

use super::{Fleet, Standing};

/// What a session asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// The best that each standby can have.
    #[default]
    Auto,
    /// This one and no other.
    #[serde(untagged)]
    Only(Mode),
}

/// A mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Replay stands until everything is read.
    Paused,
    /// The primary keeps what is read.
    Feedback,
    /// What is lost is read anew.
    Retry,
}

impl Wanted {
    /// Reads the value of the setting; an empty one is `auto`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "" | "auto" => Some(Self::Auto),
            "paused" => Some(Self::Only(Mode::Paused)),
            "feedback" => Some(Self::Only(Mode::Feedback)),
            "retry" => Some(Self::Only(Mode::Retry)),
            _ => None,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Paused => "paused",
            Self::Feedback => "feedback",
            Self::Retry => "retry",
        })
    }
}

/// Why a standby cannot have a mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hindrance {
    /// Commits may wait for it.
    Voting,
    /// Its node's role may not pause it.
    NoRight,
    /// It replays late on purpose, by so much.
    Delayed(String),
    /// Somebody else has paused it.
    Paused,
    /// It has so many bytes of WAL to replay already, more than so many.
    Lags(u64, u64),
    /// So many bytes of its disk are free, fewer than so many.
    Full(u64, u64),
    /// How much room its disk has is not known.
    NoRoomKnown,
    /// `hot_standby_feedback` is off.
    NoFeedback,
}

impl fmt::Display for Hindrance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Voting => f.write_str("commits may wait for it, so its replay is never paused"),
            Self::NoRight => f.write_str("the role of its node may not pause its replay"),
            Self::Delayed(by) => write!(f, "its replay is late by recovery_min_apply_delay = {by}"),
            Self::Paused => f.write_str("its replay is paused by somebody else"),
            Self::Lags(bytes, most) => {
                write!(f, "it has {bytes} bytes of WAL to replay, more than bulkio.backup.standby_wal_limit = {most}")
            }
            Self::Full(bytes, least) => {
                write!(f, "its disk has {bytes} bytes free, less than bulkio.backup.standby_free_space_floor = {least}")
            }
            Self::NoRoomKnown => f.write_str("how much room its disk has cannot be known from its node"),
            Self::NoFeedback => f.write_str("hot_standby_feedback is off"),
        }
    }
}

/// The mode of a standby, and why it has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The mode.
    pub mode: Mode,
    /// As a clause.
    pub why: String,
}

/// Chooses the mode of one server; a primary has none.
///
/// # Errors
///
/// It cannot have the one that is wanted.
pub fn choose(server: &Standing, wanted: Wanted, limits: &Holding) -> Result<Option<Chosen>, Hindrance> {
    if server.role == Role::Leaseholder {
        return Ok(None);
    }
    let chosen = |mode: Mode, why: String| Ok(Some(Chosen { mode, why }));
    match wanted {
        Wanted::Auto if server.feedback => {
            chosen(Mode::Feedback, "hot_standby_feedback is on: the primary keeps what is read here".to_owned())
        }
        Wanted::Auto => match hindrance(server, limits, true) {
            None => {
                let why = "no commit waits for it, and it may be paused: its replay stands until everything is read";
                chosen(Mode::Paused, why.to_owned())
            }
            Some(why) => {
                let off = "hot_standby_feedback is off: a read that VACUUM ends is begun anew";
                chosen(Mode::Retry, format!("{off}; not paused, because {why}"))
            }
        },
        Wanted::Only(mode) => {
            let hindrance = match mode {
                // Where the room is not known, whoever asks for a pause has to know it.
                Mode::Paused => hindrance(server, limits, false),
                Mode::Feedback => (!server.feedback).then_some(Hindrance::NoFeedback),
                Mode::Retry => None,
            };
            match hindrance {
                Some(why) => Err(why),
                None => chosen(mode, "backhaul.backup.standby_mode asks for it".to_owned()),
            }
        }
    }
}

/// Why a standby cannot be kept paused; the reason that another one would not mend away first.
fn hindrance(server: &Standing, limits: &Holding, is_room_needed: bool) -> Option<Hindrance> {
    if server.role != Role::NonVoting {
        return Some(Hindrance::Voting);
    }
    if !server.may_pause {
        return Some(Hindrance::NoRight);
    }
    if let Some(by) = &server.delay {
        return Some(Hindrance::Delayed(by.clone()));
    }
    if server.paused {
        return Some(Hindrance::Paused);
    }
    if limits.wal > 0 && server.behind > limits.wal {
        return Some(Hindrance::Lags(server.behind, limits.wal));
    }
    match server.free {
        Some(free) => (free < limits.free).then_some(Hindrance::Full(free, limits.free)),
        None => (is_room_needed && limits.free > 0).then_some(Hindrance::NoRoomKnown),
    }
}

/// The modes of those of `nodes` whose servers are standbys.
///
/// # Errors
///
/// 55000, naming the first one that cannot have what is wanted.
pub(crate) fn modes(
    fleet: &Fleet,
    nodes: &[NodeId],
    wanted: Wanted,
    limits: &Holding,
) -> Result<BTreeMap<NodeId, Chosen>, PgError> {
    let mut modes = BTreeMap::new();
    for node in nodes {
        let Some(server) = fleet.place(*node).and_then(|place| place.server.as_ref()) else { continue };
        let chosen = choose(server, wanted, limits).map_err(|why| {
            let Wanted::Only(mode) = wanted else { return PgError::new(SqlState::INTERNAL_ERROR, why.to_string()) };
            let message = format!("the standby beside node {node} cannot be read in mode \"{mode}\"");
            PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
                .detail(format!("The reason: {why}."))
                .hint("RESET backhaul.backup.standby_mode lets each standby be read in the best mode that it can have.")
        })?;
        modes.extend(chosen.map(|chosen| (*node, chosen)));
    }
    Ok(modes)
}
