//! The databases of restores among all others, and the mark by which they are known.
//!
//! The mark is the database's comment: whose it is, how far it is, and the highest number of a coordinator's run that
//! has worked on it. With its owner, and while it is being filled its name, it tells a database of ours from any other;
//! none is touched by its name alone. When a database is given to its user, the user's comment takes the mark's place.

use std::fmt;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_postgres::types::ToSql;

use super::acting::literal;
use super::{JobDatabase, superseded};
use crate::founders::session::{Session, quoted};

/// How far a database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is being filled, or made whole.
    Filling,
    /// All is in it.
    Whole,
    /// It has its name, but nobody may connect to it yet.
    Named,
}

/// What the comment on a database of ours says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) job: JobDatabase,
    pub(super) run: i64,
    pub(super) stage: Stage,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match self.stage {
            Stage::Filling => "",
            Stage::Whole => ", whole",
            Stage::Named => ", named",
        };
        write!(f, "backhaul restore of job {}, run {}{stage}", self.job, self.run)
    }
}

impl Mark {
    fn parse(comment: &str) -> Option<Self> {
        let mut parts = comment.strip_prefix("backhaul restore of job ")?.split(", ");
        let (job, run) = (JobDatabase::parse(parts.next()?)?, parts.next()?.strip_prefix("run ")?.parse().ok()?);
        let stage = match parts.next() {
            None => Stage::Filling,
            Some("whole") => Stage::Whole,
            Some("named") => Stage::Named,
            Some(_) => return None,
        };
        Some(Self { job, run, stage })
    }

    /// The statement that writes it on a database.
    pub(super) fn statement(&self, name: &str) -> String {
        format!("COMMENT ON DATABASE {} IS {}", quoted(name), literal(&self.to_string()))
    }
}

/// The database of a job is not there, or it is another one.
pub(super) fn gone(job: JobDatabase) -> PgError {
    PgError::new(SqlState::UNDEFINED_DATABASE, format!("the database of restore job {job} does not exist"))
}

/// A database of the server.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) oid: u32,
    pub(super) name: String,
    mark: Option<Mark>,
    /// Whether whoever asks owns it.
    pub(super) is_mine: bool,
}

impl Found {
    /// How far it is, if it is of `job`: whoever else may make databases could have made one with name and mark
    /// beforehand, so the role that restores must own it, too.
    pub(super) fn stage(&self, job: JobDatabase) -> Option<Stage> {
        let mark = self.mark.filter(|mark| self.is_mine && mark.job == job)?;
        (mark.stage == Stage::Named || self.name == job.own_name()).then_some(mark.stage)
    }

    /// Whether its user has it under this name.
    pub(super) fn is_released(&self, target: &str) -> bool {
        self.mark.is_none() && self.name == target
    }

    /// Whether no run newer than this one has worked on it.
    pub(super) fn admits(&self, run: i64) -> bool {
        self.mark.is_none_or(|mark| mark.run <= run)
    }

    /// Notes on it that this run works on it, unless a newer one does.
    pub(super) async fn admit(&self, session: &Session, job: JobDatabase, run: i64) -> anyhow::Result<Stage> {
        let stage = self.stage(job).ok_or_else(|| gone(job))?;
        if !self.admits(run) {
            return Err(superseded(job).into());
        }
        let mark = Mark { job, run, stage };
        if self.mark != Some(mark) {
            session.run(&mark.statement(&self.name)).await.context("mark the database")?;
        }
        Ok(stage)
    }

    pub(super) async fn by_oid(session: &Session, oid: u32) -> anyhow::Result<Option<Self>> {
        Self::one(session, "oid = $1", &oid).await
    }

    pub(super) async fn by_name(session: &Session, name: &str) -> anyhow::Result<Option<Self>> {
        Self::one(session, "datname = $1", &name).await
    }

    /// The database of `job` that has its name already and was not given to its user.
    pub(super) async fn named(session: &Session, job: JobDatabase) -> anyhow::Result<Option<Self>> {
        let condition = "pg_catalog.starts_with(pg_catalog.shobj_description(oid, 'pg_database'), $1)";
        let prefix = format!("backhaul restore of job {job}, ");
        let found = Self::all(session, condition, &prefix).await?;
        Ok(found.into_iter().find(|found| found.stage(job) == Some(Stage::Named)))
    }

    async fn one(session: &Session, condition: &str, value: &(dyn ToSql + Sync)) -> anyhow::Result<Option<Self>> {
        Ok(Self::all(session, condition, value).await?.into_iter().next())
    }

    async fn all(session: &Session, condition: &str, value: &(dyn ToSql + Sync)) -> anyhow::Result<Vec<Self>> {
        let query = format!(
            "SELECT oid, datname::text, pg_catalog.shobj_description(oid, 'pg_database'),
                    pg_catalog.pg_get_userbyid(datdba) = current_user
             FROM pg_catalog.pg_database WHERE {condition}"
        );
        let rows = session.rows(&query, &[value]).await.context("look for a database")?;
        let found = rows.iter().map(|row| Self {
            oid: row.get(0),
            name: row.get(1),
            mark: row.get::<_, Option<&str>>(2).and_then(Mark::parse),
            is_mine: row.get(3),
        });
        Ok(found.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_of_a_job_by_mark_owner_and_name() {
        use Stage::{Filling, Named, Whole};
        for (name, comment, expected) in [
            ("_backhaul_7", "backhaul restore of job 7, run 3", Some(Filling)),
            ("_backhaul_7", "backhaul restore of job 7, run 3, whole", Some(Whole)),
            ("shop", "backhaul restore of job 7, run 3, named", Some(Named)),
            ("shop", "backhaul restore of job 7, run 3, whole", None),
            ("_backhaul_7", "backhaul restore of job 7, run 3, mine", None),
            ("_backhaul_7", "backhaul restore of job 7", None),
            ("_backhaul_7", "mine", None),
            ("_backhaul_8", "backhaul restore of job 7, run 3", None),
            ("_backhaul_7", "backhaul restore of job 77, run 3", None),
            ("_backhaul_7_1", "backhaul restore of job 7.1, run 3", None),
            ("_backhaul_7", "backhaul restore of job 7.1, run 3", None),
        ] {
            let mark = Mark::parse(comment);
            let mut found = Found { oid: 1, name: name.to_owned(), mark, is_mine: true };
            assert_eq!(found.stage(7.into()), expected, "{name} {comment}");
            assert_eq!(found.admits(2), mark.is_none(), "{name} {comment}");
            assert!(found.admits(3) && found.is_released(name) == mark.is_none(), "{name} {comment}");
            assert!(mark.is_none_or(|mark| mark.to_string() == comment), "{comment}");
            found.is_mine = false;
            assert_eq!(found.stage(7.into()), None, "{name} {comment}");
        }
    }
}
