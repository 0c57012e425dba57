//! What is asked of a loader, and what it answers.
//!
//! These travel between nodes as JSON; what comes back is said at each variant of [`Request`]. Every request may be
//! made again, by anybody who runs the same job, because a coordinator may die and another one repeats its last step.
//! Three refusals are part of that and have to be told apart from failures: [`is_already_loaded`] (go on with the next
//! span), [`needs_schema`] (send the schema again, then repeat), and [`is_superseded`] (stop, silently).

use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};

use super::JobDatabase;
use crate::founders::DatabasePlan;

/// The name under which a node offers its loader.
pub const LOADER: &str = "loader";

/// The role that a restore acts as on the server. The service role needs no more than to be a member of it.
pub const RESTORE_ROLE: &str = "backhaul_restore";

/// What a node can be asked.
///
/// A coordinator that was stopped and goes on does not know that another one runs its job. So every request that changes
/// something carries the number of its coordinator's run, which is higher for each later one; the highest that has come
/// is remembered with the database, and [`is_superseded`] is the answer to a lower one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Make the database of a job, or find the one that was made. Answered with [`Created`].
    Create(Box<Create>),
    /// Takes bytes: a schema that `pg_dump -Fc` wrote. At their end its first section is restored, unless it was
    /// before; the schema is kept for [`Request::Finish`].
    ///
    /// All of it runs as a superuser. The caller has verified that it is what the backup wrote.
    PreData {
        /// Which of a job's databases.
        job: JobDatabase,
        /// Its database.
        database_oid: u32,
        /// The number of the coordinator's run.
        run: i64,
    },
    /// Takes bytes: COPY's text format in UTF-8. At their end they are committed, together with the span's number.
    Load(Load),
    /// Make the database whole. Answered with null, after as long as indexes take.
    Finish(Box<Finish>),
    /// Give the whole database its name, while nobody may connect to it yet. Answered with null.
    Publish(Box<Publish>),
    /// Give it to its user: owner, privileges, settings. Answered with null. From then on it is not the job's any more.
    Release(Box<Publish>),
    /// Remove what the job made, unless its user has it already. Answered with null, also when there is nothing.
    Drop {
        /// Which of a job's databases.
        job: JobDatabase,
        /// The number of the coordinator's run.
        run: i64,
    },
    /// What a database needs and the server does not have: roles, tablespaces, versions of extensions. Answered with a
    /// list of names, of which [`incomplete`](super::incomplete) makes an error.
    Missing {
        /// Which of a job's databases.
        job: JobDatabase,
        /// What the database is to be like.
        plan: Box<DatabasePlan>,
    },
    /// How far the job is. Answered with [`Progress`].
    Progress {
        /// Which of a job's databases.
        job: JobDatabase,
    },
}

impl Request {
    /// The database that it is about.
    pub fn job(&self) -> JobDatabase {
        match self {
            Self::Create(request) => request.job,
            Self::Load(request) => request.job,
            Self::Finish(request) => request.job,
            Self::Publish(request) | Self::Release(request) => request.job,
            Self::PreData { job, .. } | Self::Drop { job, .. } | Self::Missing { job, .. } | Self::Progress { job } => {
                *job
            }
        }
    }
}

/// Makes the database of a job, under a name of the job's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Create {
    /// Which of a job's databases.
    pub job: JobDatabase,
    /// The number of the coordinator's run.
    pub run: i64,
    /// The name that the database gets when it is whole. It must be free now, and then. Who repeats a job whose
    /// database has got it knows the OID, and goes on with [`Request::Finish`].
    pub target: String,
    /// What the database is to be like.
    pub plan: DatabasePlan,
}

/// The database of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// Its OID, which it keeps.
    pub oid: u32,
    /// What is in it already.
    pub progress: Progress,
}

/// How far a job is. It is read from the database that the rows are in, so it is right after any failure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Whether tables have been made, so that rows can be loaded.
    pub pre_data: bool,
    /// The spans that are committed, in order.
    pub spans: Vec<u32>,
    /// Whether nothing is left to do but to give the name; spans are not known any more.
    pub whole: bool,
}

/// Loads one span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Which of a job's databases.
    pub job: JobDatabase,
    /// Its database.
    pub database_oid: u32,
    /// The number of the coordinator's run.
    pub run: i64,
    /// The span's number, which means the same rows each time.
    pub span: u32,
    /// What its rows are.
    pub what: Loaded,
    /// The encoding of its rows; empty for UTF-8. A database without an encoding of its own holds bytes.
    #[serde(default)]
    pub encoding: String,
}

/// What the rows of a span are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loaded {
    /// Rows of a table.
    Table {
        /// Its schema.
        schema: String,
        /// Its name.
        name: String,
        /// The columns that the rows have, in their order.
        columns: Vec<String>,
    },
    /// What [`What::LargeObjects`](crate::founders::What::LargeObjects) gave.
    LargeObjects,
    /// What [`What::LargeObjectData`](crate::founders::What::LargeObjectData) gave.
    LargeObjectData,
}

/// Makes a database whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finish {
    /// Which of a job's databases.
    pub job: JobDatabase,
    /// Its database.
    pub database_oid: u32,
    /// The number of the coordinator's run.
    pub run: i64,
    /// The name that it is to get; a database that has it already, and no mark any more, was finished before.
    pub target: String,
    /// What it is to be like.
    pub plan: DatabasePlan,
    /// How many rows each table must have now: schema, name, rows.
    pub rows: Vec<(String, String, u64)>,
}

/// Gives a whole database its name, or what else its user knows it by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Publish {
    /// Which of a job's databases.
    pub job: JobDatabase,
    /// Its database.
    pub database_oid: u32,
    /// The number of the coordinator's run.
    pub run: i64,
    /// The name that it gets.
    pub target: String,
    /// What it is to be like.
    pub plan: DatabasePlan,
}

const ALREADY_LOADED: &str = "has been loaded already";
const NO_SCHEMA: &str = "is not kept on this node";
const SUPERSEDED: &str = "is run by somebody else now";

pub(super) fn already_loaded(job: JobDatabase, span: u32) -> PgError {
    PgError::new(SqlState::DUPLICATE_OBJECT, format!("span {span} of restore job {job} {ALREADY_LOADED}"))
}

pub(super) fn superseded(job: JobDatabase) -> PgError {
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, format!("restore job {job} {SUPERSEDED}"))
}

pub(super) fn no_schema(job: JobDatabase) -> PgError {
    PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, format!("the schema of restore job {job} {NO_SCHEMA}"))
        .detail("The node was started anew, or another node was asked before.")
}

/// Whether a span was refused because its rows are in the database. The bytes that were meant for it are not needed.
pub fn is_already_loaded(error: &PgError) -> bool {
    error.code == SqlState::DUPLICATE_OBJECT && error.message.ends_with(ALREADY_LOADED)
}

/// Whether [`Request::Finish`] was refused because the schema has to come again, by [`Request::PreData`].
pub fn needs_schema(error: &PgError) -> bool {
    error.code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE && error.message.ends_with(NO_SCHEMA)
}

/// Whether a request was refused because a newer run of the job has come, or has removed all: the claim is lost.
pub fn is_superseded(error: &PgError) -> bool {
    error.code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE && error.message.ends_with(SUPERSEDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusals_are_told_apart() {
        let (loaded, schema) = (already_loaded(7.into(), 3), no_schema(7.into()));
        assert_eq!((is_already_loaded(&loaded), needs_schema(&loaded)), (true, false));
        assert_eq!((is_already_loaded(&schema), needs_schema(&schema)), (false, true));
        assert_eq!((is_superseded(&schema), is_superseded(&superseded(7.into()))), (false, true));
        assert_eq!(loaded.message, "span 3 of restore job 7 has been loaded already");
    }

    #[test]
    fn requests_survive_the_wire() {
        let what = Loaded::Table { schema: "s".to_owned(), name: "t".to_owned(), columns: Vec::new() };
        let request =
            Request::Load(Load { job: 7.into(), database_oid: 16384, run: 1, span: 3, what, encoding: String::new() });
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
