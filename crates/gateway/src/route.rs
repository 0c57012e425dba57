//! To which server a client goes.

use std::sync::Arc;
use std::time::Duration;

use cluster::socket::{Socket, connect};
use cluster::{Cluster, NodeInfo, ServerInfo, View};
use fleet::probe::Door;
use pgerror::{PgError, SqlState};
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;
use uuid::Uuid;

use crate::Gateway;
use crate::startup::{Hop, Startup};

/// The setting by which a client chooses: `leaseholder` (the default) or `local`.
pub(crate) const TARGET: &str = "backhaul.target";

/// How long a client waits for a leader to become known, for instance right after this node's start.
const LEADER_PATIENCE: Duration = Duration::from_secs(3);

/// A node that does not take a connection within this time is unreachable.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Where a session's server is.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    /// Beside this node.
    Own,
    /// Beside another node, which leads the shard.
    Through {
        /// The node's address.
        address: String,
        /// The node in words.
        name: String,
        /// What is said to it first.
        hop: Hop,
    },
}

/// A route and the leader it leads to, if it does: the session ends when another one leads.
#[derive(Clone, Debug)]
pub(crate) struct Chosen {
    pub(crate) route: Route,
    pub(crate) follows: Option<Uuid>,
}

/// Chooses the server for a client's session.
///
/// # Errors
///
/// 22023 for an unknown target, 55000 for the local server of a node that has none, 57P03 while no leader is known.
pub(crate) async fn choose(cluster: &Cluster, startup: &Startup) -> Result<Chosen, PgError> {
    match startup.setting(TARGET).as_deref() {
        None | Some("leaseholder") => leaseholder(cluster).await,
        Some("local") => local(cluster),
        Some(other) => {
            let message = format!("invalid value for parameter \"{TARGET}\": \"{other}\"");
            let hint = "Available values: leaseholder, local.";
            Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).hint(hint))
        }
    }
}

fn local(cluster: &Cluster) -> Result<Chosen, PgError> {
    let me = cluster.me();
    if me.server.is_none() {
        let message = format!("{} has no PostgreSQL server of its own", me.name());
        return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
            .hint(format!("Connect without {TARGET}=local to reach the leaseholder of shard \"{}\".", me.shard)));
    }
    // A standby stays what it is; a primary may be overtaken, and what is written to it then is lost.
    let writable = me.server_state().is_some_and(|server| !server.in_recovery);
    if writable && let Some(leader) = cluster.view().leader(&me.shard).filter(|leader| leader.instance != me.instance) {
        let message = format!("the server beside {} is a primary that has been overtaken", me.name());
        return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
            .detail(format!("Shard \"{}\" is led by {} now.", me.shard, leader.name()))
            .hint("Stop that server and make it a standby (pg_rewind)."));
    }
    Ok(Chosen { route: Route::Own, follows: writable.then_some(me.instance) })
}

async fn leaseholder(cluster: &Cluster) -> Result<Chosen, PgError> {
    let me = cluster.me();
    let mut views = cluster.subscribe();
    let known = timeout(LEADER_PATIENCE, views.wait_for(|view| view.leader(&me.shard).is_some())).await;
    let view = match known {
        Ok(Ok(view)) => Arc::clone(&view),
        Ok(Err(_)) | Err(_) => return Err(no_leader(&me, &cluster.view())),
    };
    let leader = view.leader(&me.shard).ok_or_else(|| no_leader(&me, &view))?;
    let route = if leader.instance == me.instance {
        Route::Own
    } else {
        let timeline = leader.server_state().map_or(0, |server| server.timeline);
        Route::Through {
            address: leader.address.clone(),
            name: leader.name(),
            hop: Hop { shard: me.shard.clone(), timeline },
        }
    };
    Ok(Chosen { route, follows: Some(leader.instance) })
}

fn no_leader(me: &NodeInfo, view: &View) -> PgError {
    let of_shard = view.nodes.values().filter(|known| known.reachable && known.info.shard == me.shard);
    let down = of_shard.filter_map(|known| match &known.info.server {
        Some(ServerInfo::Down { reason }) => {
            Some(format!("the server beside {}: {}", known.info.name(), first_line(reason)))
        }
        Some(ServerInfo::Up(_)) | None => None,
    });
    let silent = view.troubles.iter().map(|(address, reason)| match view.nodes.get(address) {
        Some(known) => format!("{} does not answer: {}", known.info.name(), first_line(reason)),
        None => format!("nobody answers at {address}: {}", first_line(reason)),
    });
    let known: Vec<String> = down.chain(silent).collect();
    let detail = match known.as_slice() {
        [] => "No node stands beside a primary of this shard.".to_owned(),
        known => format!("Known: {}.", known.join("; ")),
    };
    PgError::new(SqlState::CANNOT_CONNECT_NOW, format!("shard \"{}\" has no leaseholder now", me.shard))
        .detail(detail)
        .hint("Try again; \"backhaul node status\" shows the fleet meanwhile.")
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Sees to it that a client that another node passed on is at the right place: by this node's own view, and on no older
/// timeline than the sender knows.
///
/// # Errors
///
/// 57P03 when the server beside this node is not, or no longer, what the sender takes it for.
pub(crate) fn check_hop(cluster: &Cluster, hop: &Hop) -> Result<(), PgError> {
    let me = cluster.me();
    let leads = cluster.view().leader(&hop.shard).is_some_and(|leader| leader.instance == me.instance);
    if leads && me.server_state().is_some_and(|server| server.timeline >= hop.timeline) {
        return Ok(());
    }
    let message = format!("the server beside {} is not the leaseholder of shard \"{}\" now", me.name(), hop.shard);
    Err(PgError::new(SqlState::CANNOT_CONNECT_NOW, message).hint("Connect again."))
}

impl Gateway {
    /// Opens the connection to the server of `route`; nothing of the client has been sent on it yet.
    ///
    /// # Errors
    ///
    /// 57P03 or 08006 that name the node.
    pub(crate) async fn open(&self, route: &Route) -> anyhow::Result<Socket> {
        match route {
            Route::Own => self.open_own().await,
            Route::Through { address, name, hop } => {
                let opened = timeout(CONNECT_DEADLINE, self.open_through(address, hop)).await;
                let error = match opened {
                    Ok(Ok(socket)) => return Ok(socket),
                    Ok(Err(error)) => format!("{error:#}"),
                    Err(_) => format!("no answer within {} seconds", CONNECT_DEADLINE.as_secs()),
                };
                let message = format!("{name} at {address} cannot be reached");
                Err(PgError::new(SqlState::CONNECTION_FAILURE, message)
                    .detail(format!("{error}."))
                    .hint("Try again; another node may lead the shard by then.")
                    .into())
            }
        }
    }

    async fn open_own(&self) -> anyhow::Result<Socket> {
        let name = self.cluster.me().name();
        let Some(server) = &self.server else {
            let message = format!("{name} has no PostgreSQL server of its own");
            return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).into());
        };
        let mut door = server.door.clone();
        let checked = timeout(CONNECT_DEADLINE, door.wait_for(|door| *door == Door::Guarded)).await;
        let guarded = matches!(checked, Ok(Ok(_)));
        drop(checked);
        let connected = match guarded {
            true => server.server.connect().await.map_err(|error| error.to_string()),
            false => Err("how it lets clients in could not be checked yet".to_owned()),
        };
        connected.map_err(|error| {
            let message = format!("the PostgreSQL server beside {name} does not accept connections");
            PgError::new(SqlState::CANNOT_CONNECT_NOW, message)
                .detail(format!("{error}."))
                .hint("Try again when the server is up.")
                .into()
        })
    }

    async fn open_through(&self, address: &str, hop: &Hop) -> anyhow::Result<Socket> {
        let mut socket = connect(address, self.tls.to_nodes.as_ref()).await?;
        socket.write_all(&hop.encode()).await?;
        Ok(socket)
    }
}
