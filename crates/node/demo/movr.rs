//! The data set of the demo: vehicle sharing, as CockroachDB's, with one of everything that PostgreSQL can hold.

use anyhow::Context as _;

use crate::client::{local_session, spoken};
use crate::flags::Trust;

/// The database's name.
pub(super) const DATABASE: &str = "movr";

/// Which rows to load; the same numbers give the same rows.
pub(super) struct Part {
    /// Rides in all shards together; everything else is in proportion.
    pub(super) rows: u32,
    /// This shard, counted from 0.
    pub(super) shard: usize,
    /// How many share the rows.
    pub(super) shards: usize,
}

/// Creates the database and fills it, through the node beside the shard's primary.
///
/// # Errors
///
/// PostgreSQL refuses.
pub(super) async fn load(host: &str, user: &str, part: &Part) -> anyhow::Result<()> {
    let trust = Trust { secret_file: None, insecure: true, certs_dir: None };
    let session = local_session(host, user, "postgres", &trust).await?;
    session.client.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await.map_err(spoken)?;
    let session = local_session(host, user, DATABASE, &trust).await?;
    let settings =
        format!("SET movr.rows = {}; SET movr.shard = {}; SET movr.shards = {}", part.rows, part.shard, part.shards);
    session.client.batch_execute(&settings).await.map_err(spoken)?;
    for (name, script) in [("schema", include_str!("movr_schema.sql")), ("rows", include_str!("movr_rows.sql"))] {
        session.client.batch_execute(script).await.map_err(spoken).with_context(|| format!("load the {name}"))?;
    }
    Ok(())
}
