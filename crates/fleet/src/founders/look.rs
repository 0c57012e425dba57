//! A look at a server's databases, for plans that are shown and not carried out.
//!
//! It reads the same catalogs as a point does ([`super::catalog`]), in a short transaction of a session of its own in
//! each database, one after the other. Nothing is paused, dumped or exported.

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use super::budget;
use super::catalog;
use super::dump::Program;
use super::open::FACTS;
use super::session::Session;
use super::types::Looked;
use crate::Server;

/// Sizes are read of tables that nobody has locked for long; a wait for others ends with an error.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '5s'";

/// The number of no job: it stands in `pg_stat_activity` while the look lasts.
const NO_JOB: i64 = 0;

/// Looks at these databases; where it is `to_read` them, as a point of them would.
pub(super) async fn look(server: &Server, databases: &[String], to_read: bool) -> anyhow::Result<Looked> {
    let end = CancellationToken::new();
    let control = Session::open(server, server.database(), NO_JOB, &end).await?;
    let facts = control.row(FACTS, &[]).await.context("ask the server what it is")?;
    let (in_recovery, may_pause) = (facts.get(0), facts.get(3));
    let budget = Some(budget::room(&control).await?.budget);
    drop(control);
    if to_read {
        Program::find(facts.get(1)).await?;
    }
    let mut plans = Vec::new();
    for database in databases {
        let session = Session::open(server, database, NO_JOB, &end).await?;
        session.run(BEGIN).await?;
        let plan = catalog::plan(&session, in_recovery).await;
        let plan = plan.with_context(|| format!("look at database {database:?}"))?;
        if to_read && plan.large_objects > 0 {
            catalog::may_read_large_objects(&session, database).await?;
        }
        plans.push(plan);
    }
    Ok(Looked { in_recovery, may_pause, budget, databases: plans })
}
