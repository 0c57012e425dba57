//! What is found amiss, and what mends it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ServerFacts;

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
    /// A psql on the server itself, which then has to be restarted.
    Restart,
    /// What the server is started with.
    CommandLine,
    /// The file that has the last word on a setting, of a server that cannot be asked.
    Conf,
    /// A shell on the server's host, while the server is stopped.
    Stopped,
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
            Self::Restart => f.write_str("in psql on this server, as a superuser; then restart the server:"),
            Self::CommandLine => {
                f.write_str("on the command line that starts this server, which overrides its files; then restart it:")
            }
            Self::Conf => f.write_str(
                "in postgresql.conf of this server (or in postgresql.auto.conf, if that sets it); then restart it:",
            ),
            Self::Stopped => f.write_str(
                "on this server's host, as the user that it runs as, while it is stopped; after that start it:",
            ),
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
    pub fn reloaded(self, facts: &ServerFacts, name: &str, value: &str) -> Self {
        self.set(facts, name, value, Place::Server, ["SELECT pg_reload_conf();"])
    }

    /// Mended by a setting that only a restart makes known. The statement overrides `postgresql.conf`, and an earlier
    /// statement, which a line in that file would not.
    #[must_use]
    pub fn restarted(self, facts: &ServerFacts, name: &str, value: &str) -> Self {
        self.set(facts, name, value, Place::Restart, [])
    }

    fn set<const N: usize>(self, facts: &ServerFacts, name: &str, value: &str, at: Place, then: [&str; N]) -> Self {
        if facts.on_command_line.contains(name) {
            return self.mended(Place::CommandLine, [format!("-c {name}='{value}'")]);
        }
        let statement = format!("ALTER SYSTEM SET {name} = '{value}';");
        self.mended(at, std::iter::once(statement).chain(then.map(str::to_owned)))
    }

    /// Whether it is mended on the shard's primary, and so is the same finding on each of the shard's servers.
    pub fn is_of_shard(&self) -> bool {
        self.steps.first().is_some_and(|step| matches!(step.place, Place::Primary { .. }))
    }
}
