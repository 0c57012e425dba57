//! What is found amiss, and what mends it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How grave it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// Backups or restores fail, or are not what they could be by the service role's own rights.
    Missing,
    /// They work; this would make them better, or is good to know.
    Advice,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Missing => "missing",
            Self::Advice => "advice",
        })
    }
}

/// Where a line belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A psql on the shard's primary; standbys take it over.
    Primary {
        /// The database, because some rights belong to one.
        database: String,
    },
    /// A psql on the server itself.
    Server,
    /// The server's `postgresql.conf`.
    Conf,
    /// The server's `pg_hba.conf`.
    Hba,
    /// A shell on the node's host.
    Host,
    /// What the node is started with.
    Node,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary { database } => {
                write!(f, "in psql on the shard's primary, as a superuser, in database \"{database}\":")
            }
            Self::Server => f.write_str("in psql on this server, as a superuser:"),
            Self::Conf => f.write_str("in postgresql.conf of this server, which then has to be restarted:"),
            Self::Hba => {
                f.write_str("in pg_hba.conf of this server, above all other lines; then SELECT pg_reload_conf():")
            }
            Self::Host => f.write_str("on the node's host:"),
            Self::Node => f.write_str("where the node is started:"),
        }
    }
}

/// Lines for one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Where.
    pub place: Place,
    /// The lines, as they are to be typed.
    pub lines: Vec<String>,
}

/// One thing that is amiss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How grave it is.
    pub severity: Severity,
    /// What it is, as a clause without a full stop.
    pub what: String,
    /// What mends it, in this order; nothing, where that takes somebody's judgement.
    pub steps: Vec<Step>,
}

impl Finding {
    /// Something that has to be mended.
    pub fn missing(what: impl Into<String>) -> Self {
        Self { severity: Severity::Missing, what: what.into(), steps: Vec::new() }
    }

    /// Something that could be better.
    pub fn advice(what: impl Into<String>) -> Self {
        Self { severity: Severity::Advice, what: what.into(), steps: Vec::new() }
    }

    /// Mended by these lines at that place, after what was already said.
    #[must_use]
    pub fn mended<L: Into<String>>(mut self, place: Place, lines: impl IntoIterator<Item = L>) -> Self {
        self.steps.push(Step { place, lines: lines.into_iter().map(Into::into).collect() });
        self
    }

    /// Mended by a setting that a reload makes known.
    #[must_use]
    pub fn reloaded(self, setting: &str) -> Self {
        self.mended(Place::Server, [&*format!("ALTER SYSTEM SET {setting};"), "SELECT pg_reload_conf();"])
    }

    /// Whether it is mended on the shard's primary, and so is the same finding on each of the shard's servers.
    pub fn is_of_shard(&self) -> bool {
        self.steps.first().is_some_and(|step| matches!(step.place, Place::Primary { .. }))
    }
}
