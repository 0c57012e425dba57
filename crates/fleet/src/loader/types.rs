//! What is asked of a loader, and what it answers.
//!
//! These travel between nodes as JSON; what comes back is said at each variant of [`Request`]. Every request may be
//! made again, by anybody who runs the same job, because a coordinator may die and another one repeats its last step.
//! Two refusals are part of that and have to be told apart from failures: [`is_already_loaded`] (go on with the next
//! span) and [`needs_schema`] (send the schema again, then repeat).

use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};

use crate::founders::DatabasePlan;

/// The name under which a node offers its loader.
pub const LOADER: &str = "loader";

/// The role that a restore acts as on the server. The service role needs no more than to be a member of it.
pub const RESTORE_ROLE: &str = "backhaul_restore";

/// What a node can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Make the database of a job, or find the one that was made. Answered with [`Created`].
    Create(Box<Create>),
    /// Takes bytes: a schema that `pg_dump -Fc` wrote. At their end its first section is restored, unless it was
    /// before; the schema is kept for [`Request::Finish`].
    ///
    /// All of it runs as a superuser. The caller has verified that it is what the backup wrote.
    PreData {
        /// The job.
        job: i64,
        /// Its database.
        database_oid: u32,
    },
    /// Takes bytes: COPY's text format in UTF-8. At their end they are committed, together with the span's number.
    Load(Load),
    /// Make the database whole and give it its name. Answered with null, after as long as indexes take.
    Finish(Box<Finish>),
    /// Remove what the job made, unless it has its name already. Answered with null, also when there is nothing.
    Drop {
        /// The job.
        job: i64,
    },
    /// How far the job is. Answered with [`Progress`].
    Progress {
        /// The job.
        job: i64,
    },
}

/// Makes the database of a job, under a name of the job's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Create {
    /// The job.
    pub job: i64,
    /// The name that the database gets when it is whole. It must be free now, and then. Who repeats a job whose
    /// database has got it knows the OID, and asks for [`Request::Finish`] first.
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
    /// Whether nothing is left to do but [`Request::Finish`], which only gives the name; spans are not known any more.
    pub whole: bool,
}

/// Loads one span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// The job.
    pub job: i64,
    /// Its database.
    pub database_oid: u32,
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
    /// The job.
    pub job: i64,
    /// Its database.
    pub database_oid: u32,
    /// The name that it gets.
    pub target: String,
    /// What it is to be like.
    pub plan: DatabasePlan,
    /// How many rows each table must have now: schema, name, rows.
    pub rows: Vec<(String, String, u64)>,
}

const ALREADY_LOADED: &str = "has been loaded already";
const NO_SCHEMA: &str = "is not kept on this node";

pub(super) fn already_loaded(job: i64, span: u32) -> PgError {
    PgError::new(SqlState::DUPLICATE_OBJECT, format!("span {span} of restore job {job} {ALREADY_LOADED}"))
}

pub(super) fn no_schema(job: i64) -> PgError {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusals_are_told_apart() {
        let (loaded, schema) = (already_loaded(7, 3), no_schema(7));
        assert_eq!((is_already_loaded(&loaded), needs_schema(&loaded)), (true, false));
        assert_eq!((is_already_loaded(&schema), needs_schema(&schema)), (false, true));
        assert_eq!(loaded.message, "span 3 of restore job 7 has been loaded already");
    }

    #[test]
    fn requests_survive_the_wire() {
        let what = Loaded::Table { schema: "s".to_owned(), name: "t".to_owned(), columns: Vec::new() };
        let request = Request::Load(Load { job: 7, database_oid: 16384, span: 3, what, encoding: String::new() });
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
