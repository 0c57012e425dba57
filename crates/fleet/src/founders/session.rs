//! One session on the server, set up as `pg_dump` sets up its own.
//!
//! Every statement has a deadline, and an error of the server's is a [`PgError`] in its own words. A session ends when
//! it is dropped, or when the lease it belongs to ends, whoever holds it then.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::Server;

/// A session that is not open by then is given up.
const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// A statement that gives no rows of a backup and takes longer than this fails.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(120);

/// A cancel request that is not taken by then is given up.
const CANCEL_DEADLINE: Duration = Duration::from_secs(5);

/// What `pg_dump` sets, so that text means the same on every server, and no timeout ends a session that stands idle for
/// its snapshot. Beyond it: no parallel workers (their connections are in nobody's budget, and rows would come in any
/// order), and settings that a role may have changed and that show in text. What has to hold before the first statement is
/// in the options of every session (`crate::server`).
const SETTINGS: &str = "
    SET client_encoding = 'UTF8'; SET datestyle = 'ISO'; SET intervalstyle = 'postgres'; SET extra_float_digits = 3;
    SET timezone = 'UTC'; SET bytea_output = 'hex'; SET xmlbinary = 'base64'; SET statement_timeout = 0;
    SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0;
    SET row_security = off; SET synchronize_seqscans = off; SET max_parallel_workers_per_gather = 0;
    SET search_path = '';
    SELECT pg_catalog.set_config(name, CASE name WHEN 'transaction_timeout' THEN '0' ELSE 'view, foreign-table' END, false)
    FROM pg_catalog.pg_settings WHERE name IN ('transaction_timeout', 'restrict_nonsystem_relation_kind')";

/// One session.
pub(crate) struct Session {
    pub(crate) client: Client,
    _connection: AbortOnDropHandle<()>,
}

impl Session {
    /// Opens one in `database`, for `job`; it lasts until `end` at most.
    pub(crate) async fn open(
        server: &Server,
        database: &str,
        job: impl std::fmt::Display,
        end: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let opening = async {
            let (client, connection) = server.open_in(database, &format!("backhaul job {job}")).await?;
            let end = end.clone();
            let driving = tokio::spawn(async move {
                tokio::select! {
                    // Its errors reach every request on the client.
                    _ = connection => {}
                    () = end.cancelled() => {}
                }
            });
            let session = Self { client, _connection: AbortOnDropHandle::new(driving) };
            session.client.batch_execute(SETTINGS).await?;
            Ok(session)
        };
        let opened = timeout(OPEN_DEADLINE, opening).await;
        opened.map_err(|_| late(OPEN_DEADLINE))?.map_err(said).context("open a session on the server")
    }

    /// Runs statements that give nothing.
    pub(crate) async fn run(&self, statements: &str) -> anyhow::Result<()> {
        within(STATEMENT_DEADLINE, self.client.batch_execute(statements)).await
    }

    /// Runs a query.
    pub(crate) async fn rows(&self, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> anyhow::Result<Vec<Row>> {
        within(STATEMENT_DEADLINE, self.client.query(query, parameters)).await
    }

    /// Runs a query of one row.
    pub(crate) async fn row(&self, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> anyhow::Result<Row> {
        within(STATEMENT_DEADLINE, self.client.query_one(query, parameters)).await
    }

    /// Cancels what the session runs. Nothing happens when it runs nothing.
    pub(crate) async fn cancel(&self) {
        cancel(self.client.cancel_token()).await;
    }

    /// Whether the server, or the network, has ended it.
    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }
}

/// Cancels what a session runs.
pub(crate) async fn cancel(token: tokio_postgres::CancelToken) {
    if !matches!(timeout(CANCEL_DEADLINE, token.cancel_query(NoTls)).await, Ok(Ok(()))) {
        tracing::debug!("a statement could not be cancelled");
    }
}

/// What a statement gives, if it does so in time.
pub(crate) async fn within<T>(
    deadline: Duration,
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> anyhow::Result<T> {
    timeout(deadline, asked).await.map_err(|_| late(deadline))?.map_err(said)
}

/// A server's error in its own words, or that the session is gone.
pub(crate) fn said(error: tokio_postgres::Error) -> anyhow::Error {
    let Some(said) = error.as_db_error() else {
        let lost = PgError::new(SqlState::CONNECTION_FAILURE, "a session with the server was lost");
        return if error.is_closed() { lost.into() } else { lost.detail(sentence(&error)).into() };
    };
    let code = SqlState::parse(said.code().code()).unwrap_or(SqlState::INTERNAL_ERROR);
    let mut spoken = PgError::new(code, said.message());
    spoken.detail = said.detail().map(str::to_owned);
    spoken.hint = said.hint().map(str::to_owned);
    spoken.into()
}

/// An error of the library's, which prints only what kind it is, with its cause.
fn sentence(error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("The session ended with \"{error}{cause}\".")
}

/// That the server, or what is done with it, took longer than it may.
pub(super) fn late(deadline: Duration) -> PgError {
    PgError::new(SqlState::CONNECTION_FAILURE, "the server did not answer in time")
        .detail(format!("It was given {} seconds.", deadline.as_secs()))
}

/// Whether the innermost error that was meant for a client has this code.
pub(crate) fn has_code(error: &anyhow::Error, codes: &[SqlState]) -> bool {
    PgError::of(error).is_some_and(|said| codes.contains(&said.code))
}

/// An identifier as SQL reads it back.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
