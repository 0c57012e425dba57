//! Looking into a collection: on the gateway if it reaches the store and is let in, else on another node that is.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cluster::service::{Boxed, Reply, Service};
use cluster::{Filter, NodeId, Peers};
use pgerror::{PgError, SqlState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sql::{ShowBackup, ShowBackupOptions, ShowBackupWhat, Subdir, Text};
use storage::{Stores, Uri};

use super::created::{self, Created};
use super::source::{self, Source, may_be_read_elsewhere};
use crate::manifest::{FileEntry, Manifest};
use crate::plan::{Backups, Requester, literal};

/// The name under which a node looks into collections.
pub const SHOW: &str = "show";

/// A listing, or the check of a backup's files.
const DEADLINE: Duration = Duration::from_secs(600);

#[derive(Clone, Serialize, Deserialize)]
enum Request {
    Backups { uri: String },
    Backup { uri: String, subdir: Option<String>, check_files: bool, schemas: bool },
}

/// What one backup holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shown {
    /// Its manifest, verified.
    pub manifest: Manifest,
    /// The statements that create its objects, where they were asked for.
    pub created: Vec<Created>,
}

/// Looks into collections for other nodes.
pub struct Show {
    peers: Peers,
    stores: Stores,
}

impl Show {
    /// A service to be offered as [`SHOW`].
    pub fn new(peers: Peers, stores: Stores) -> Arc<Self> {
        Arc::new(Self { peers, stores })
    }

    async fn answer(&self, request: Request) -> anyhow::Result<serde_json::Value> {
        match request {
            Request::Backups { uri } => {
                let found = source::list(&self.stores, &self.peers, &Uri::parse(&uri)?).await?;
                Ok(serde_json::to_value(found)?)
            }
            Request::Backup { uri, subdir, check_files, schemas } => {
                // A statement without a filter is for every node.
                let (uri, all) = (Uri::parse(&uri)?, Filter::default());
                let source = Source::find(&self.stores, &self.peers, &uri, subdir.as_deref(), &all).await?;
                if check_files {
                    let parts = source.manifest.shards.iter();
                    let files: Vec<&FileEntry> =
                        parts.flat_map(|part| part.files.iter().chain(&part.schemas)).collect();
                    source.check(&files).await?;
                }
                let created = if schemas { created::created(&source).await? } else { Vec::new() };
                Ok(serde_json::to_value(Shown { manifest: source.manifest, created })?)
            }
        }
    }
}

impl Service for Show {
    fn call(&self, request: serde_json::Value) -> Boxed<'_, Reply> {
        Box::pin(async move {
            let request = serde_json::from_value(request).context("read what to look for")?;
            Ok(Reply::Answer(self.answer(request).await?))
        })
    }
}

impl Backups {
    /// The directories of the backups in a collection, oldest first.
    ///
    /// # Errors
    ///
    /// No node reaches the store and is let in; the requester may not use it.
    pub async fn show_backups(&self, collection: &Text, requester: &Requester) -> anyhow::Result<Vec<String>> {
        let uri = self.resolve(&Uri::parse(literal(collection)?)?, requester).await?.exposed();
        self.look(&Request::Backups { uri }).await
    }

    /// One backup's manifest, verified, and what else the statement asks for.
    ///
    /// # Errors
    ///
    /// There is none, or it is damaged; no node reaches the store and is let in; the requester may not use it.
    pub async fn show_backup(&self, statement: &ShowBackup, requester: &Requester) -> anyhow::Result<Shown> {
        let uri = self.resolve(&Uri::parse(literal(&statement.collection)?)?, requester).await?.exposed();
        let subdir = match &statement.from {
            Subdir::Latest => None,
            Subdir::Named(text) => Some(literal(text)?.to_owned()),
        };
        let ShowBackupOptions { check_files, as_json } = statement.options;
        let schemas = statement.what == ShowBackupWhat::Schemas && !as_json;
        self.look(&Request::Backup { uri, subdir, check_files, schemas }).await
    }

    /// Asks this node, and while the store is not reached or lets nobody in, the others.
    async fn look<T: DeserializeOwned>(&self, request: &Request) -> anyhow::Result<T> {
        let view = self.peers.cluster().view();
        let me = self.peers.cluster().me().node_id;
        let (asked, away): (Vec<_>, Vec<_>) = view.nodes.values().partition(|known| known.reachable);
        let [mut nodes, away] =
            [asked, away].map(|nodes| nodes.iter().filter_map(|known| known.info.node_id).collect::<Vec<NodeId>>());
        nodes.sort_unstable_by_key(|node| (Some(*node) != me, *node));
        let mut failed = anyhow::anyhow!("no node has a number yet");
        for node in nodes {
            match self.peers.call(node, SHOW, request, DEADLINE).await {
                Ok(answer) => return Ok(answer),
                Err(error) if may_be_read_elsewhere(&error) => failed = to_tell(failed, error),
                Err(error) => return Err(error),
            }
        }
        Err(not_asked(failed, &away))
    }
}

/// Which of two nodes' errors is told when no node answers: the first refusal, because whoever was refused has reached the
/// store, and the gateway is asked first; else the later one.
fn to_tell(before: anyhow::Error, error: anyhow::Error) -> anyhow::Error {
    let is_refusal = PgError::of(&before).is_some_and(|said| said.code == SqlState::INSUFFICIENT_PRIVILEGE);
    if is_refusal { before } else { error }
}

/// A node's error; one of those that do not answer may have reached the store.
fn not_asked(failed: anyhow::Error, away: &[NodeId]) -> anyhow::Error {
    let Some(mut said) = PgError::of(&failed).filter(|_| !away.is_empty()).cloned() else { return failed };
    let away: Vec<String> = away.iter().map(NodeId::to_string).collect();
    let line = format!("These nodes do not answer, and were not asked: {}.", away.join(", "));
    said.detail = Some(said.detail.into_iter().chain([line]).collect::<Vec<_>>().join("\n"));
    said.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_refuses_one_node_may_let_in_another() {
        let [refused, unreached, gone, missing] = [
            SqlState::INSUFFICIENT_PRIVILEGE,
            SqlState::IO_ERROR,
            SqlState::CONNECTION_FAILURE,
            SqlState::UNDEFINED_FILE,
        ];
        for (code, passes) in [(refused, true), (unreached, true), (gone, true), (missing, false)] {
            assert_eq!(may_be_read_elsewhere(&PgError::new(code, "no").into()), passes, "{code}");
        }
        for (codes, told) in [
            ([refused, refused, refused], "0"),
            ([refused, unreached, gone], "0"),
            ([unreached, refused, gone], "1"),
            ([unreached, gone, refused], "2"),
            ([unreached, gone, unreached], "2"),
        ] {
            let errors = codes.into_iter().enumerate();
            let errors = errors.map(|(node, code)| anyhow::Error::from(PgError::new(code, node.to_string())));
            let failed = errors.fold(anyhow::anyhow!("nobody was asked"), to_tell);
            assert_eq!(PgError::of(&failed).unwrap().message, told, "{codes:?}");
        }
    }

    #[test]
    fn nodes_that_were_not_asked_are_named() {
        let nodes = [2, 3].map(NodeId);
        for (detail, away, expected) in [
            (Some("Refused."), &nodes[..], Some("Refused.\nThese nodes do not answer, and were not asked: 2, 3.")),
            (None, &nodes[..1], Some("These nodes do not answer, and were not asked: 2.")),
            (Some("Refused."), &[], Some("Refused.")),
        ] {
            let mut error = PgError::new(SqlState::IO_ERROR, "the store cannot be reached");
            error.detail = detail.map(str::to_owned);
            let said = not_asked(error.into(), away);
            assert_eq!(PgError::of(&said).unwrap().detail.as_deref(), expected);
        }
    }
}
