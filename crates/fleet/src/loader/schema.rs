//! The schema as it comes in, kept in a file without a name, and its first section.

use std::fs::File;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use cluster::service::{Boxed, Upload};
use pgerror::{PgError, SqlState};
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;

use super::acting::Acting;
use super::full::told;
use super::pg_restore::{Restorer, What};
use super::turns::Order;
use super::{JobDatabase, Loader};
use crate::founders::SCHEMA_BYTES_MAX;

/// The first section's name, for sessions and in the state.
pub(super) const PRE_DATA: &str = "backhaul pre-data";

/// A schema as it comes in.
pub(super) struct SchemaUpload {
    loader: Arc<Loader>,
    job: JobDatabase,
    oid: u32,
    run: i64,
    file: tokio::fs::File,
    bytes: u64,
}

impl SchemaUpload {
    /// Begins to take one, for a database that must exist.
    pub(super) async fn begin(loader: Arc<Loader>, job: JobDatabase, oid: u32, run: i64) -> anyhow::Result<Self> {
        Acting::inside(&loader.server, job, oid, run, &CancellationToken::new()).await?;
        let file = tokio::task::spawn_blocking(tempfile::tempfile).await?.context("make a file for the schema")?;
        Ok(Self { loader, job, oid, run, file: tokio::fs::File::from_std(file), bytes: 0 })
    }
}

impl Upload for SchemaUpload {
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            self.bytes += bytes.len() as u64;
            if self.bytes > SCHEMA_BYTES_MAX {
                let message = format!("the schema of restore job {} is longer than 512 MiB", self.job);
                return Err(PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).into());
            }
            self.file.write_all(&bytes).await.context("keep the schema")
        })
    }

    fn finish(mut self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            self.file.flush().await.context("keep the schema")?;
            let Self { loader, job, oid, run, file, .. } = *self;
            let file = Arc::new(file.into_std().await);
            let turn = loader.turns.of(job);
            let made = turn.take(Order(run, false), pre_data(&loader, job, oid, run, file)).await;
            made.map_err(|error| told(error, &loader.server, job))
        })
    }
}

async fn pre_data(loader: &Loader, job: JobDatabase, oid: u32, run: i64, schema: Arc<File>) -> anyhow::Result<()> {
    loader.keep_schema(job, schema.clone());
    let inside = Acting::inside(&loader.server, job, oid, run, &CancellationToken::new()).await?;
    Restorer::new(loader, &inside, job, oid, &schema).await?.make(PRE_DATA, &What::Section("pre-data")).await
}
