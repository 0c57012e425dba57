//! From a RESTORE statement to a job.

use anyhow::Context as _;
use cluster::{Peers, spoken};
use jobs::{Birth, NewJob};
use pgerror::{PgError, SqlState};
use sql::{Restore, Subdir, Targets};
use storage::Uri;

use super::parts::check_names;
use super::shard_map::ShardMap;
use super::story::{Payload, RESTORE_TYPE};
use crate::plan::{Backups, OnWait, Outcome, Requester, filter_of, in_time, leaseholder_session, literal};
use crate::targets::once_each;

impl Backups {
    /// Runs a RESTORE statement for `requester`; see [`Backups::run`].
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the statement, before a job exists; for an attached one the relocation, or the reason for
    /// which the job failed.
    pub async fn restore(
        &self,
        statement: &Restore,
        requester: &Requester,
        birth: &Birth,
        on_wait: OnWait<'_>,
    ) -> anyhow::Result<Outcome> {
        self.jobs.settings().await?.check_feature("restore", "RESTORE")?;
        let new = in_time(self.plan_restore(statement, requester)).await?;
        self.start(&new, statement.options.detached.then_some(birth), requester, on_wait).await
    }

    async fn plan_restore(&self, statement: &Restore, requester: &Requester) -> anyhow::Result<NewJob> {
        let filter = filter_of(statement.options.execution_locality.as_ref())?;
        let shard_map = match &statement.options.shard_map {
            Some(pairs) => ShardMap::parse(literal(pairs)?)?,
            None => ShardMap::default(),
        };
        let pausepoints = requester.pausepoints()?;
        let id = self.jobs.new_id().await?;
        let fleet = self.shards().await?;
        shard_map.check_targets(&fleet)?;
        let shards = shard_map.possible_targets(&fleet);
        superuser_of(&self.peers, shards.iter().copied(), &requester.user).await?;
        let databases = statement.targets.databases();
        once_each(databases)?;
        let new_name = statement.options.new_db_name.as_ref().map(literal).transpose()?.map(str::to_owned);
        let uri = Uri::parse(literal(&statement.collection)?)?;
        let shown = uri.redacted();
        let resolved = self.resolve(&uri, requester).await?;
        // Into which of the shards the backup has rows to bring is not known before it is read, nor what is in it.
        let wanted: Vec<&str> = match &new_name {
            Some(name) => vec![name],
            None => databases.iter().map(String::as_str).collect(),
        };
        let wanted_in = shards.iter().map(|shard| (*shard, wanted.clone())).collect();
        check_names(&self.peers, &wanted_in, databases.len() == 1).await?;
        self.jobs.check_filter(&filter).await?;
        let subdir = match &statement.from {
            Subdir::Latest => None,
            Subdir::Named(text) => Some(literal(text)?.to_owned()),
        };
        let description = statement.description(subdir.as_deref().unwrap_or("latest"), &shown);
        // A character that no name begins or ends with, and that is printed as it is.
        let around = statement.description("\u{1}", &shown);
        let around = around.split_once('\u{1}').map(|(before, behind)| (before.to_owned(), behind.to_owned()));
        let payload = Payload {
            databases: databases.to_vec(),
            full_cluster: statement.targets == Targets::Cluster,
            new_name,
            subdir,
            filter: filter.to_string(),
            user: requester.user.clone(),
            description: around,
            shard_map,
            fleet,
            gateway: self.peers.cluster().me().node_id,
        };
        Ok(NewJob {
            id,
            job_type: RESTORE_TYPE.to_owned(),
            description,
            statement: statement.redacted(&shown),
            user: requester.user.clone(),
            filter,
            prefers: Vec::new(),
            payload: serde_json::to_value(&payload)?,
            sealed: Some((self.seal)()?.seal(&resolved.exposed())?),
            exclusive: None,
            pausepoints,
        })
    }
}

/// Sees to it that `user` is a superuser in each of these shards, as far as they can be reached: what is in a backup
/// runs there as SQL, with all rights.
///
/// # Errors
///
/// 42501, or a leaseholder does not answer.
pub(crate) async fn superuser_of(peers: &Peers, shards: impl Iterator<Item = &str>, user: &str) -> anyhow::Result<()> {
    let view = peers.cluster().view();
    for shard in shards {
        if view.leader(shard).is_none() {
            continue;
        }
        let session = leaseholder_session(peers, shard, "postgres").await?;
        let query = "SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = $1 AND rolsuper";
        if session.query_opt(query, &[&user]).await.map_err(spoken).context("look for the user")?.is_none() {
            let message = format!("user {user} does not have RESTORE privilege");
            return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
                .detail(format!("The user is not a superuser in shard \"{shard}\"."))
                .hint("A restore runs SQL from the backup; only a superuser may do that.")
                .into());
        }
    }
    Ok(())
}
