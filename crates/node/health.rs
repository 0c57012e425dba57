//! `/health`: is the node there, and is it ready?

use std::convert::Infallible;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use cluster::Cluster;
use cluster::registry::{Registry, Standing};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

#[derive(Clone)]
struct Asked {
    cluster: Cluster,
    registry: Registry,
}

/// As CockroachDB: a node that answers is healthy; with `?ready=1` it must also be of use.
#[derive(Deserialize)]
struct Question {
    #[serde(default)]
    ready: String,
}

/// Serves until the listener fails; without one, never returns.
pub(crate) async fn serve(listener: Option<TcpListener>, cluster: Cluster, registry: Registry) -> anyhow::Error {
    let Some(listener) = listener else {
        let never: Infallible = std::future::pending().await;
        match never {}
    };
    let router = Router::new().route("/health", get(health)).with_state(Asked { cluster, registry });
    match axum::serve(listener, router).await {
        Ok(()) => anyhow::anyhow!("the HTTP port was closed"),
        Err(error) => anyhow::Error::new(error).context("serve HTTP"),
    }
}

/// Ready is a node that is a member of the registry, whose own server (if it has one) answers, and whose shard is led.
async fn health(State(asked): State<Asked>, Query(question): Query<Question>) -> Response {
    let view = asked.cluster.view();
    let me = asked.cluster.me();
    let member = matches!(asked.registry.standing(), Standing::Member(session) if session.is_valid());
    let server = me.server.as_ref().map(|_| me.server_state().is_some());
    let leader = view.leader(&me.shard).map(cluster::NodeInfo::name);
    let ready = member && server != Some(false) && leader.is_some();
    let wanted = matches!(question.ready.as_str(), "1" | "true");
    let status = if wanted && !ready { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let body = json!({
        "node_id": me.node_id, "address": me.address, "locality": me.locality, "shard": me.shard,
        "role": view.role(&me).to_string(), "ready": ready, "member": member, "server_answers": server,
        "leaseholder": leader, "build": me.build,
    });
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
