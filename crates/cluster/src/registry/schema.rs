//! The registry's tables, made and brought up to date by numbered steps.

use anyhow::{Context as _, bail};
use tokio_postgres::Client;

/// The registry's database on the system shard.
pub const DATABASE: &str = "backhaul";

/// The steps in order; a step that was once released is never changed.
const STEPS: [&str; 5] = [
    include_str!("0001_nodes_and_sessions.sql"),
    include_str!("0002_jobs.sql"),
    include_str!("0003_control.sql"),
    include_str!("0004_transactions.sql"),
    include_str!("0005_privileges.sql"),
];

/// Held while the schema is looked at and changed, so that nodes that start together do it one by one.
/// The number spells "backhaul" in no particular way; it only has to be the same in all versions.
const ADVISORY_LOCK: i64 = 0x6261_636b_6861_756c;

/// Brings the schema up to this program's version; each step and its number are one transaction.
///
/// # Errors
///
/// A newer program has been here (its schema may mean things this one does not know), or a step fails, which leaves
/// the steps before it done.
pub async fn migrate(client: &Client) -> anyhow::Result<()> {
    client.execute("SELECT pg_advisory_lock($1)", &[&ADVISORY_LOCK]).await.context("lock the registry's schema")?;
    let outcome = migrate_locked(client).await;
    client.execute("SELECT pg_advisory_unlock($1)", &[&ADVISORY_LOCK]).await.context("unlock the registry's schema")?;
    outcome
}

async fn migrate_locked(client: &Client) -> anyhow::Result<()> {
    let exists: bool = client.query_one("SELECT to_regclass('registry.schema_version') IS NOT NULL", &[]).await?.get(0);
    if !exists {
        let ground = "BEGIN;
             CREATE SCHEMA IF NOT EXISTS registry;
             CREATE TABLE registry.schema_version
                 (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now());
             COMMIT";
        client.batch_execute(ground).await.context("make the registry's schema")?;
    }
    let row = client.query_one("SELECT coalesce(max(version), 0) FROM registry.schema_version", &[]).await?;
    let found = usize::try_from(row.get::<_, i32>(0)).unwrap_or(0);
    if found > STEPS.len() {
        bail!("the registry has schema version {found}, and this program knows only up to {}", STEPS.len());
    }
    for (step, number) in STEPS.iter().zip(1..).skip(found) {
        let script = format!("BEGIN; {step}; INSERT INTO registry.schema_version VALUES ({number}); COMMIT");
        if let Err(error) = client.batch_execute(&script).await {
            client.batch_execute("ROLLBACK").await?;
            return Err(error).with_context(|| format!("bring the registry to schema version {number}"));
        }
        tracing::info!(version = number, "registry schema is up to date");
    }
    Ok(())
}
