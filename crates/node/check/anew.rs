//! What makes a standby of its shard's leaseholder out of a server whose WAL has gone another way: a primary that was
//! overtaken, or a standby that has replayed more than the leaseholder's history has.
//!
//! Such a server has to be stopped before it is mended, and then tells nothing. Its node remembers what it was.

use cluster::{Role, ServerState};
use fleet::readiness::{Finding, Place, ServerFacts};
use serde::{Deserialize, Serialize};

use super::rules::{Fleet, Seen};

/// What a node's server was when it was last asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Last {
    /// What was known of it.
    pub(super) facts: ServerFacts,
    /// Where it stood in its shard.
    pub(super) state: ServerState,
}

/// Mended, while the server of these facts is stopped, by `pg_rewind` if its WAL allows that, else by a new copy. Any
/// node's port leads to the leaseholder.
pub(super) fn made(finding: Finding, leader: &Seen, facts: &ServerFacts) -> Finding {
    let Some((host, port)) = leader.address.rsplit_once(':') else { return finding };
    let host = host.trim_matches(['[', ']']);
    let of_leader = leader.facts().and_then(|leader| leader.superuser.as_deref());
    let user = of_leader.or(facts.superuser.as_deref()).map_or("…".to_owned(), value);
    let source = shell(&format!("host={host} port={port} user={user} dbname=postgres"));
    let data = facts.settings.get("data_directory").map_or("…", String::as_str);
    let (old, data) = (shell(&format!("{data}.old")), shell(data));
    let lines = match allows_rewind(facts) {
        true => vec![
            "# brings the leaseholder's files postgresql.conf and pg_hba.conf, too, if they are in its data directory"
                .to_owned(),
            format!("pg_rewind --target-pgdata={data} --write-recovery-conf --source-server={source}"),
        ],
        false => vec![
            format!("mv {data} {old}"),
            format!("pg_basebackup --pgdata={data} --checkpoint=fast --write-recovery-conf --dbname={source}"),
            "# then put its own postgresql.conf and pg_hba.conf back, if they were in its data directory".to_owned(),
        ],
    };
    finding.mended(Place::Stopped, lines)
}

/// Only then is each page that was changed since the fork in its WAL.
fn allows_rewind(facts: &ServerFacts) -> bool {
    ["wal_log_hints", "data_checksums"].iter().any(|name| facts.settings.get(*name).is_some_and(|value| value == "on"))
}

/// A server that is stopped, perhaps because it was told to be.
pub(super) fn stopped(fleet: &Fleet, seen: &Seen) -> Option<Finding> {
    let leader = fleet.leader(&seen.shard).filter(|_| seen.role == Some(Role::Down))?;
    let timeline = leader.server.as_ref()?.timeline;
    let Some(last) = seen.answer.as_ref()?.as_ref().ok().and_then(|own| own.last.as_ref()) else {
        // The first timeline has overtaken nobody.
        return (timeline > 1).then(|| {
            Finding::advice(format!(
                "what the server was is not known: if it was a primary before {} reached timeline {timeline}, make it \
                 a standby of that one by pg_rewind or pg_basebackup before it is started",
                leader.name()
            ))
        });
    };
    let was = last.state.timeline;
    let what = match &last.facts.standby {
        None => "a primary",
        Some(standby) if standby.is_past_fork => "a standby beyond the fork, with more WAL of it than the leaseholder,",
        Some(_) => return None,
    };
    let finding = Finding::missing(format!(
        "the server is stopped, and was {what} on timeline {was}; shard \"{}\" has reached timeline {timeline}: make \
         it a standby before it is started",
        seen.shard
    ));
    (was < timeline).then(|| made(finding, leader, &last.facts))
}

/// A value of a connection string.
pub(super) fn value(text: &str) -> String {
    match !text.is_empty() && text.chars().all(|char| char.is_alphanumeric() || "_-.:/".contains(char)) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'")),
    }
}

/// A word of a shell.
fn shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_for_the_connection_string_and_for_the_shell() {
        assert_eq!(shell(&format!("user={}", value("postgres"))), "'user=postgres'");
        assert_eq!(shell(&format!("user={}", value("o'b x"))), r"'user='\''o\'\''b x'\'''");
    }
}
