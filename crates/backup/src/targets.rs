//! Which shards hold the databases that a backup is of.
//!
//! Every shard that ever joined is asked, all at once: a database may be in some of them or in all, and only the shard
//! itself knows. So one that cannot be reached is an error that names it, never a shorter backup, unless the statement
//! says `skip_unreachable_shards`: then the job, the manifest, and everybody who asks for either are told that it is
//! left out. What is left out is decided once, when the statement is planned; a shard that is lost later is waited for.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use cluster::spoken;
use fleet::founders::Skipped;
use futures_util::future::join_all;
use pgerror::{PgError, SqlState};
use tokio::time::timeout;

use crate::plan::{Backups, Requester, leaseholder_session};

/// A shard that has not told by then what it holds cannot be reached: a server that froze keeps its connections open.
const SHARD_DEADLINE: Duration = Duration::from_secs(20);

/// What the shards of the fleet have told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Targets {
    /// The shards that hold any of the databases, and which of them.
    pub(crate) shards: BTreeMap<String, Vec<String>>,
    /// The shards that hold none of them.
    pub(crate) without: Vec<String>,
    /// The shards that have told nothing, and why.
    pub(crate) unreachable: BTreeMap<String, PgError>,
}

impl Backups {
    /// Asks every shard for these databases; the requester may read all that are found.
    ///
    /// # Errors
    ///
    /// A database is named twice, or is nowhere, or may not be read.
    pub(crate) async fn targets(&self, databases: &[String], requester: &Requester) -> anyhow::Result<Targets> {
        for (index, name) in databases.iter().enumerate() {
            if databases[..index].contains(name) {
                let message = format!("database \"{name}\" is named more than once");
                return Err(PgError::new(SqlState::DUPLICATE_ALIAS, message).into());
            }
        }
        let shards = self.shards().await?;
        let answers = join_all(shards.iter().map(|shard| self.ask_shard(shard, databases, requester))).await;
        let mut targets = Targets::default();
        for (shard, answer) in shards.into_iter().zip(answers) {
            match answer {
                Ok(found) if found.is_empty() => targets.without.push(shard),
                Ok(found) => drop(targets.shards.insert(shard, found)),
                Err(error) => match PgError::of(&error).filter(|said| said.code == SqlState::CONNECTION_FAILURE) {
                    Some(said) => drop(targets.unreachable.insert(shard, said.clone())),
                    None => return Err(error),
                },
            }
        }
        targets.check(databases)?;
        Ok(targets)
    }

    /// Which of these databases the shard holds.
    async fn ask_shard(&self, shard: &str, databases: &[String], requester: &Requester) -> anyhow::Result<Vec<String>> {
        let asked = async {
            let session = leaseholder_session(&self.peers, shard, "postgres").await?;
            let query = "SELECT datname FROM pg_catalog.pg_database WHERE datname = ANY($1) AND datallowconn";
            let found = session.query(query, &[&databases]).await.map_err(spoken).context("look for the databases")?;
            let found: Vec<String> = found.iter().map(|row| row.get(0)).collect();
            for database in &found {
                self.check_rights(shard, database, requester).await?;
            }
            Ok(found)
        };
        timeout(SHARD_DEADLINE, Box::pin(asked)).await.unwrap_or_else(|_| {
            let seconds = SHARD_DEADLINE.as_secs();
            Err(PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached"))
                .detail(format!("Its leaseholder does not answer within {seconds} seconds."))
                .into())
        })
    }
}

impl Targets {
    /// Sees to it that every database was found.
    fn check(&self, databases: &[String]) -> Result<(), PgError> {
        let is_missing = |name: &&String| !self.shards.values().flatten().any(|found| found == *name);
        let Some(missing) = databases.iter().find(is_missing) else { return Ok(()) };
        let message =
            format!("failed to resolve targets specified in the BACKUP stmt: database \"{missing}\" does not exist");
        let error = PgError::new(SqlState::UNDEFINED_DATABASE, message);
        match self.unreachable.is_empty() {
            true => Err(error),
            false => Err(error
                .detail(format!("It may be in what cannot be reached: {}.", self.unreachable_names()))
                .hint("SHOW NODES tells which nodes and servers are there.")),
        }
    }

    fn unreachable_names(&self) -> String {
        let names: Vec<String> = self.unreachable.keys().map(|shard| format!("shard \"{shard}\"")).collect();
        names.join(", ")
    }

    /// That some shard cannot be reached, for a statement that leaves none out.
    pub(crate) fn failure(&self) -> Option<PgError> {
        let detail = match self.unreachable.len() {
            0 => return None,
            1 => self.unreachable.values().next().and_then(|error| error.detail.clone()).unwrap_or_default(),
            _ => {
                let told = self.skipped().into_iter().map(|it| format!("{} \"{}\": {}", it.kind, it.object, it.reason));
                format!("{}.", told.collect::<Vec<_>>().join("; "))
            }
        };
        let message = format!("{} cannot be reached", self.unreachable_names());
        Some(PgError::new(SqlState::CONNECTION_FAILURE, message).detail(detail).hint(
            "SHOW NODES tells which nodes are there. WITH skip_unreachable_shards makes a backup without what they hold.",
        ))
    }

    /// The shards that cannot be reached, as what a backup leaves out.
    pub(crate) fn skipped(&self) -> Vec<Skipped> {
        let skipped = |(shard, error): (&String, &PgError)| {
            let why = error.detail.as_deref().unwrap_or(&error.message).trim_end_matches('.');
            let mut why: Vec<char> = why.chars().collect();
            // A sentence becomes a part of one.
            if let Some(first) = why.first_mut() {
                *first = first.to_ascii_lowercase();
            }
            let reason = format!("it could not be reached ({})", why.into_iter().collect::<String>());
            Skipped { kind: "shard".to_owned(), object: shard.clone(), reason }
        };
        self.unreachable.iter().map(skipped).collect()
    }
}

/// What goes behind a job's description, so that whoever looks at the job sees what it leaves out: a comment, because the
/// description stays a statement.
pub(crate) fn remark(skipped: &[Skipped]) -> String {
    let names: Vec<String> = skipped
        .iter()
        .map(|it| format!("{} {}", it.kind, it.object.replace("*/", "* /").replace("/*", "/ *")))
        .collect();
    if names.is_empty() { String::new() } else { format!(" /* left out: {} */", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(shards: &[&str], unreachable: &[&str]) -> Targets {
        let lost = |shard: &&str| {
            let error = PgError::new(SqlState::CONNECTION_FAILURE, "gone").detail("No node that answers is there.");
            ((*shard).to_owned(), error)
        };
        Targets {
            shards: shards.iter().map(|shard| ((*shard).to_owned(), vec!["db".to_owned()])).collect(),
            without: Vec::new(),
            unreachable: unreachable.iter().map(lost).collect(),
        }
    }

    #[test]
    fn a_shard_that_cannot_be_reached_is_named() {
        assert_eq!(targets(&["s1"], &[]).failure(), None);
        let one = targets(&["s1"], &["s2"]).failure().unwrap();
        assert_eq!((one.code.as_str(), one.message.as_str()), ("08006", "shard \"s2\" cannot be reached"));
        assert_eq!(one.detail.as_deref(), Some("No node that answers is there."));
        assert!(one.hint.unwrap().contains("skip_unreachable_shards"));
        let two = targets(&["s1"], &["s2", "s3"]).failure().unwrap();
        assert_eq!(two.message, "shard \"s2\", shard \"s3\" cannot be reached");
        assert!(two.detail.unwrap().contains("shard \"s3\": it could not be reached (no node that answers is there)"));
    }

    #[test]
    fn a_database_that_was_not_found_may_be_where_nobody_could_look() {
        let asked = ["db".to_owned(), "other".to_owned()];
        assert_eq!(targets(&["s1"], &["s2"]).check(&asked[..1]), Ok(()));
        let nowhere = targets(&["s1"], &[]).check(&asked).unwrap_err();
        assert_eq!((nowhere.code.as_str(), nowhere.detail), ("3D000", None));
        let perhaps = targets(&["s1"], &["s2"]).check(&asked).unwrap_err();
        assert_eq!(perhaps.detail.as_deref(), Some("It may be in what cannot be reached: shard \"s2\"."));
    }

    #[test]
    fn a_remark_ends_where_it_ends() {
        assert_eq!(remark(&[]), "");
        assert_eq!(remark(&targets(&[], &["a */ b", "c"]).skipped()), " /* left out: shard a * / b, shard c */");
    }
}
