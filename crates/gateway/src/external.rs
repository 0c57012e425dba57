//! External connections: names for stores.

use std::time::Duration;

use backup::Requester;
use cluster::NodeId;
use futures_util::future::join_all;
use pgerror::{PgError, SqlState};
use serde_json::json;
use sql::{Grant, Statement, Text};
use storage::{Change, Connections, Uri};
use tokio_postgres::Client;

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value, column};

pub(crate) const COLUMNS: [Column; 3] = [
    column("connection_name", Kind::Text),
    column("connection_uri", Kind::Text),
    column("connection_type", Kind::Text),
];

/// A node that has not reached a store by then has not reached it.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// Runs one of the statements about external connections.
pub(crate) async fn run(gateway: &Gateway, statement: &Statement, requester: &Requester) -> anyhow::Result<Answer> {
    let connections = gateway.backups.connections()?;
    let session = gateway.backups.jobs.ledger().session().await?;
    match statement {
        Statement::CreateExternalConnection { name, uri, if_not_exists } => {
            check_superuser(requester)?;
            let uri = Uri::parse(text(uri)?)?;
            let notice = reach(gateway, &uri).await?;
            connections.create(&session, text(name)?, &uri, &requester.user, *if_not_exists).await?;
            Ok(Answer { notices: vec![notice], ..Answer::of(Vec::new()) })
        }
        Statement::DropExternalConnection { name } => {
            let name = text(name)?;
            for listed in &connections.list(&session, Some(name)).await? {
                gateway.backups.check_privilege("DROP", listed, requester).await?;
            }
            connections.drop(&session, name).await?;
            Ok(Answer::of(Vec::new()))
        }
        Statement::Grant(statement) => {
            grant(gateway, &connections, &session, statement, requester).await?;
            Ok(Answer::of(Vec::new()))
        }
        Statement::ShowExternalConnections { name } => {
            let name = name.as_ref().map(text).transpose()?;
            let listed = gateway.backups.visible(connections.list(&session, name).await?, requester).await?;
            let row = |listed: storage::Listed| {
                let texts = [listed.name, listed.uri_redacted, "STORAGE".to_owned()];
                texts.map(|text| Value::Text(Some(text))).to_vec()
            };
            Ok(Answer::of(listed.into_iter().map(row).collect()))
        }
        other => anyhow::bail!("{} is not about external connections", other.tag()),
    }
}

/// GRANT and REVOKE: everything is judged before anything is changed.
async fn grant(
    gateway: &Gateway,
    connections: &Connections,
    session: &Client,
    statement: &Grant,
    requester: &Requester,
) -> anyhow::Result<()> {
    let names: Vec<&str> = statement.connections.iter().map(text).collect::<Result<_, _>>()?;
    let listed = connections.list(session, None).await?;
    let privileges = statement.parts();
    let mut on = Vec::with_capacity(names.len());
    for name in &names {
        let found = listed.iter().find(|one| one.name == **name).ok_or_else(|| storage::unknown(name))?;
        gateway.backups.check_grantor(&privileges, found, requester).await?;
        on.push(found);
    }
    gateway.backups.check_roles(&statement.roles, &on, requester).await?;
    let Grant { gives, roles, .. } = statement;
    let change = Change { gives: *gives, privileges: &privileges, names: &names, roles };
    connections.change(session, &change).await
}

fn text(text: &Text) -> anyhow::Result<&str> {
    text.literal().ok_or_else(|| anyhow::anyhow!("a statement runs with a parameter that is not bound"))
}

fn check_superuser(requester: &Requester) -> Result<(), PgError> {
    if requester.superuser {
        return Ok(());
    }
    // CockroachDB's text; the privilege has no other form here yet.
    let message = "only users with the EXTERNALCONNECTION system privilege are allowed to CREATE EXTERNAL CONNECTION";
    Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).hint("Ask a superuser to make it."))
}

/// Which nodes reach the store: one is enough, since a filter may keep the others from it for good.
async fn reach(gateway: &Gateway, uri: &Uri) -> anyhow::Result<PgError> {
    let view = gateway.cluster.view();
    let mut nodes: Vec<NodeId> =
        view.nodes.values().filter(|known| known.reachable).filter_map(|known| known.info.node_id).collect();
    nodes.sort_unstable();
    let request = json!({ "uri": uri.exposed() });
    let probes = nodes
        .iter()
        .map(|node| async { (*node, gateway.peers.call::<()>(*node, backup::PROBE, &request, PROBE_DEADLINE).await) });
    let (mut reached, mut missed, mut last) = (Vec::new(), Vec::new(), None);
    for (node, outcome) in join_all(probes).await {
        match outcome {
            Ok(()) => reached.push(node.to_string()),
            Err(error) => {
                missed.push(node.to_string());
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if reached.is_empty() => Err(error),
        _ => {
            let mut notice = PgError::new(
                SqlState::SUCCESSFUL_COMPLETION,
                format!("the store is reached by nodes {}", reached.join(", ")),
            );
            if !missed.is_empty() {
                notice = notice.detail(format!("It is not reached by nodes {}.", missed.join(", ")));
            }
            Ok(notice)
        }
    }
}
