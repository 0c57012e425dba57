//! Which shards hold the databases that a backup is of, and which these are when none is named (`whole`).
//!
//! Every shard that ever joined is asked, all at once: a database may be in some of them or in all, and only the shard
//! itself knows. So one that cannot be reached is an error that names it, never a shorter backup, unless the statement
//! says `skip_unreachable_shards`: then the job, the manifest, and everybody who asks for either are told that it is
//! left out. One that answers and refuses is an error with the option, too. What is left out is decided once, when the
//! statement is planned; a shard that is lost later is waited for.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use cluster::spoken;
use fleet::founders::Skipped;
use futures_util::future::join_all;
use pgerror::{PgError, SqlState};
use sql::Targets as Named;
use tokio::time::timeout;

use crate::plan::{Backups, Requester, leaseholder_session};
use crate::whole::{Holding, server_wide};

/// A shard that has not told by then what it holds cannot be reached: a server that froze keeps its connections open.
const SHARD_DEADLINE: Duration = Duration::from_secs(20);

/// A shard that nobody is known to lead may be one that a gateway which has just begun has not heard of yet.
const LEADER_WAIT: Duration = Duration::from_secs(2);

/// What the shards of the fleet have told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Targets {
    /// The shards that hold any of the databases, and which of them.
    pub(crate) shards: BTreeMap<String, Vec<String>>,
    /// The shards that hold none of them.
    pub(crate) without: Vec<String>,
    /// The shards that have told nothing, and why.
    pub(crate) unreachable: BTreeMap<String, PgError>,
    /// What a backup of the whole cluster leaves out of the shards that it holds.
    pub(crate) left_out: Vec<Skipped>,
}

impl Backups {
    /// Asks every shard for these databases, or for all that it has; the requester may read all that are found. `skips`
    /// where the statement leaves out what cannot be reached.
    ///
    /// # Errors
    ///
    /// A database is named twice, or is nowhere, or may not be read; nothing is named, and there is nothing; a shard that
    /// answers refuses.
    pub(crate) async fn targets(&self, named: &Named, skips: bool, requester: &Requester) -> anyhow::Result<Targets> {
        once_each(named.databases())?;
        let shards = self.shards().await?;
        let answers = join_all(shards.iter().map(|shard| self.ask_shard(shard, named, requester))).await;
        let mut targets = Targets::default();
        for (shard, answer) in shards.into_iter().zip(answers) {
            match answer {
                Ok(Holding { databases, skipped }) => {
                    targets.left_out.extend(skipped);
                    if databases.is_empty() {
                        targets.without.push(shard);
                    } else {
                        targets.shards.insert(shard, databases);
                    }
                }
                Err(error) => match PgError::of(&error).filter(|said| said.code == SqlState::CONNECTION_FAILURE) {
                    Some(said) => drop(targets.unreachable.insert(shard, said.clone())),
                    None => return Err(error),
                },
            }
        }
        // A database that nobody has may be in what could not be asked: where nothing is left out, that is told instead.
        if skips || targets.unreachable.is_empty() {
            targets.check(named)?;
        }
        if *named == Named::Cluster {
            targets.left_out.push(server_wide());
        }
        Ok(targets)
    }

    /// Which of these databases the shard holds.
    async fn ask_shard(&self, shard: &str, named: &Named, requester: &Requester) -> anyhow::Result<Holding> {
        let mut views = self.peers.cluster().subscribe();
        let is_led = views.wait_for(|view| view.leader(shard).is_some());
        drop(timeout(LEADER_WAIT, is_led).await);
        let asked = async {
            let databases = match named {
                Named::Cluster => return self.holding(shard, requester).await,
                Named::Databases(databases) => databases,
            };
            let session = leaseholder_session(&self.peers, shard, "postgres").await?;
            let query = "SELECT datname FROM pg_catalog.pg_database WHERE datname = ANY($1) AND datallowconn";
            let found = session.query(query, &[&databases]).await.map_err(spoken).context("look for the databases")?;
            let found: Vec<String> = found.iter().map(|row| row.get(0)).collect();
            for database in &found {
                self.check_rights(shard, database, requester).await?;
            }
            Ok(Holding { databases: found, skipped: Vec::new() })
        };
        timeout(SHARD_DEADLINE, Box::pin(asked)).await.unwrap_or_else(|_| {
            let seconds = SHARD_DEADLINE.as_secs();
            Err(PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached"))
                .detail(format!("Its leaseholder does not answer within {seconds} seconds."))
                .into())
        })
    }
}

/// Sees to it that no database is named twice.
///
/// # Errors
///
/// 42712 naming the first that is.
pub(crate) fn once_each(databases: &[String]) -> Result<(), PgError> {
    let mut seen = databases.iter().enumerate();
    match seen.find(|(index, name)| databases[..*index].contains(name)) {
        None => Ok(()),
        Some((_, name)) => {
            Err(PgError::new(SqlState::DUPLICATE_ALIAS, format!("database \"{name}\" is named more than once")))
        }
    }
}

impl Targets {
    /// Sees to it that every database was found, or any at all where none is named.
    fn check(&self, named: &Named) -> Result<(), PgError> {
        let is_missing = |name: &&String| !self.shards.values().flatten().any(|found| found == *name);
        let what = match named {
            Named::Cluster if self.shards.is_empty() => "there is no database to back up".to_owned(),
            Named::Cluster => return Ok(()),
            Named::Databases(databases) => match databases.iter().find(is_missing) {
                Some(missing) => format!("database \"{missing}\" does not exist"),
                None => return Ok(()),
            },
        };
        let message = format!("failed to resolve targets specified in the BACKUP stmt: {what}");
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
            left_out: Vec::new(),
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
        let asked = Named::Databases(vec!["db".to_owned(), "other".to_owned()]);
        assert_eq!(targets(&["s1"], &["s2"]).check(&Named::Databases(vec!["db".to_owned()])), Ok(()));
        let nowhere = targets(&["s1"], &[]).check(&asked).unwrap_err();
        assert_eq!((nowhere.code.as_str(), nowhere.detail), ("3D000", None));
        let perhaps = targets(&["s1"], &["s2"]).check(&asked).unwrap_err();
        assert_eq!(perhaps.detail.as_deref(), Some("It may be in what cannot be reached: shard \"s2\"."));
        // Where none is named there has to be one all the same.
        assert_eq!(targets(&["s1"], &["s2"]).check(&Named::Cluster), Ok(()));
        assert_eq!(targets(&[], &[]).check(&Named::Cluster).unwrap_err().code.as_str(), "3D000");
    }

    #[test]
    fn a_remark_ends_where_it_ends() {
        assert_eq!(remark(&[]), "");
        assert_eq!(remark(&targets(&[], &["a */ b", "c"]).skipped()), " /* left out: shard a * / b, shard c */");
    }
}
