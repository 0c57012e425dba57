//! `backhaul start`: a node, put together.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use backup::{
    Backups, EXPORT, Export, IMPORT, Import, JOB_TYPE, PROBE, Probe as StoreProbe, RESTORE_TYPE, Resume, ResumeRestore,
    SHOW, SealSource, Show,
};
use cluster::registry::Registry;
use cluster::secret::ClusterSecret;
use cluster::store::Store;
use cluster::{Cluster, Dialer, NodeId, NodeInfo, Peers, Role, ServerInfo, follow_peers};
use fleet::Server;
use fleet::founders::{FOUNDERS, Founders};
use fleet::loader::{LOADER, Loader};
use fleet::probe::{Door, Probe};
use gateway::{Gateway, OwnServer};
use jobs::{Jobs, Ledger};
use storage::{FILES, Files, Seal, Stores};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::check::{CHECK, Check, Place};
use crate::flags::Start;
use crate::health;

/// Runs a node until it is told to stop.
///
/// The port opens before anything else is known: what a client needs that is not there yet is waited for, or refused
/// with a reason, connection by connection.
///
/// # Errors
///
/// The store or the address is in use, a flag cannot be, or the fleet must not have this node.
pub(crate) async fn run(flags: Start) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("BACKHAUL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();

    let server = flags.postgres.as_deref().map(Server::from_conninfo).transpose()?;
    let tls = flags.trust.tls()?;
    // A secret that is not there yet may come; one that is there has to be in order.
    if flags.trust.secret_file.as_ref().is_some_and(|file| file.exists()) {
        flags.trust.secret().read()?;
    }
    let store = Arc::new(Store::open(&flags.store)?);
    let extern_dir = flags.external_io_dir.clone().unwrap_or_else(|| flags.store.join("extern"));
    std::fs::create_dir_all(&extern_dir).with_context(|| format!("create {}", extern_dir.display()))?;
    let listener =
        TcpListener::bind(&flags.listen_addr).await.with_context(|| format!("listen on {}", flags.listen_addr))?;
    let me = describe(&flags, &listener, &store, server.is_some())?;
    tracing::info!(address = %me.address, locality = %me.locality, shard = %me.shard, "node is starting");
    let address = me.address.clone();
    if flags.trust.insecure && !listener.local_addr()?.ip().is_loopback() {
        tracing::warn!("whoever reaches {address} is trusted as a node of this fleet (--insecure)");
    }

    let cluster = Cluster::new(me, &flags.join, store)?;
    let registry = Registry::default();
    let shutdown = CancellationToken::new();
    let door = watch::Sender::new(Door::Unchecked);
    let own = server.clone().map(|server| OwnServer { server, door: door.subscribe() });
    let dialer = Dialer::new(flags.trust.secret(), tls.to_nodes(), format!("backhaul {address}"));
    let peers = Peers::new(cluster.clone(), dialer.clone());
    let ledger = Ledger::default();
    let jobs = Jobs::new(cluster.clone(), registry.clone(), ledger.clone(), dialer.clone());
    let backups = offer(&peers, &jobs, &extern_dir, server.clone(), flags.trust.secret());
    peers.offer(CHECK, Check::new(&peers, &registry, Place::of(&flags, &listener, server.clone(), &extern_dir)?));
    let gateway = Gateway::new(gateway::Parts {
        cluster: cluster.clone(),
        registry: registry.clone(),
        server: own,
        peers,
        backups,
        secret: flags.trust.secret(),
        tls,
        shutdown: shutdown.clone(),
    });
    let mut serving = tokio::spawn(gateway.serve(listener));

    if let Some(file) = &flags.listening_url_file {
        publish_url(file, &address)?;
    }
    let http = match &flags.http_addr {
        Some(http) => Some(TcpListener::bind(http).await.with_context(|| format!("listen on {http}"))?),
        None => None,
    };
    if let Some(http) = &http {
        tracing::info!(address = %http.local_addr()?, "HTTP is served");
    }
    let requested = flags.node_id.map(NodeId);
    let stopped = drained(&jobs)?;
    let ended = tokio::select! {
        () = stopped => Ok(()),
        error = probe(server, flags.trust.insecure, door, cluster.clone()) => Err(error),
        () = follow_peers(cluster.clone(), dialer.clone()) => Ok(()),
        error = registry.clone().run(cluster.clone(), dialer.clone(), requested) => Err(error),
        () = ledger.run(cluster.clone(), dialer) => Ok(()),
        () = jobs.clone().run() => Ok(()),
        () = Box::pin(jobs.clone().forget_the_ended()) => Ok(()),
        error = health::serve(http, cluster, registry) => Err(error),
        _ = &mut serving => bail!("the node's port was closed"),
    };
    tracing::info!("node is stopping");
    shutdown.cancel();
    serving.await.context("close the node's port")?;
    ended
}

/// Waits until the node is told to stop, and lets others take its jobs while everything else here still works.
fn drained(jobs: &Jobs) -> anyhow::Result<impl Future<Output = ()>> {
    let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let jobs = jobs.clone();
    Ok(async move {
        tokio::select! {
            _ = interrupted.recv() => {}
            _ = terminated.recv() => {}
        }
        tracing::info!("node is told to stop");
        jobs.drain().await;
    })
}

/// What this node does for others, and the jobs it can do.
fn offer(peers: &Peers, jobs: &Jobs, extern_dir: &Path, server: Option<Server>, secret: ClusterSecret) -> Backups {
    storage::install();
    let stores = Stores::new(peers.clone(), extern_dir.to_owned());
    let cluster = peers.cluster().clone();
    let seal: SealSource = Arc::new(move || {
        let id = cluster.me().cluster_id.context("seal a URI as a member of a cluster")?;
        Ok(Seal::new(secret.read()?.as_deref(), id))
    });
    peers.offer(FILES, Arc::new(Files::new(extern_dir, stores.clone())));
    if let Some(server) = server {
        let cluster = peers.cluster().clone();
        // Only the leaseholder's node knows, and it may be away.
        let is_voting = Arc::new(move || match cluster.view().role(&cluster.me()) {
            Role::Voting => Some(true),
            Role::NonVoting => Some(false),
            Role::Leaseholder | Role::Detached | Role::Overtaken | Role::Down | Role::None => None,
        });
        peers.offer(FOUNDERS, Founders::beside(server.clone(), is_voting));
        peers.offer(LOADER, Loader::new(server));
    }
    peers.offer(EXPORT, Export::new(peers.clone(), stores.clone(), jobs.clone()));
    peers.offer(PROBE, StoreProbe::new(stores.clone()));
    peers.offer(IMPORT, Import::new(peers.clone(), stores.clone()));
    peers.offer(SHOW, Show::new(peers.clone(), stores.clone()));
    jobs.register(RESTORE_TYPE, ResumeRestore::new(peers.clone(), stores.clone(), Arc::clone(&seal)));
    jobs.register(JOB_TYPE, Resume::new(peers.clone(), stores, Arc::clone(&seal)));
    Backups { peers: peers.clone(), jobs: jobs.clone(), seal }
}

async fn probe(server: Option<Server>, insecure: bool, door: watch::Sender<Door>, cluster: Cluster) -> anyhow::Error {
    let Some(server) = server else { return std::future::pending().await };
    let probe = Probe { server, insecure, door };
    probe
        .run(|seen| {
            cluster.update_me(|me| {
                let news = match (&me.server, &seen) {
                    (Some(ServerInfo::Up(before)), ServerInfo::Up(now)) => now.differs(before),
                    (before, now) => before.as_ref() != Some(now),
                };
                match &seen {
                    ServerInfo::Down { reason } if news => tracing::warn!("the server is not there: {reason}"),
                    ServerInfo::Up(_) if me.server_state().is_none() => tracing::info!("the server answers"),
                    ServerInfo::Down { .. } | ServerInfo::Up(_) => {}
                }
                me.server = Some(seen);
                news
            });
        })
        .await
}

fn describe(flags: &Start, listener: &TcpListener, store: &Store, has_server: bool) -> anyhow::Result<NodeInfo> {
    let bound = listener.local_addr()?;
    let address = match &flags.advertise_addr {
        Some(given) if given.contains(':') => given.clone(),
        Some(host) => format!("{host}:{}", bound.port()),
        None if bound.ip().is_unspecified() => {
            bail!("listening on every address of this host; give the one that other nodes use with --advertise-addr")
        }
        None => bound.to_string(),
    };
    let identity = store.identity()?;
    let unknown = ServerInfo::Down { reason: "not asked yet".to_owned() };
    Ok(NodeInfo {
        instance: Uuid::new_v4(),
        node_id: identity.node_id,
        cluster_id: identity.cluster_id,
        address,
        locality: flags.locality.clone().unwrap_or_default(),
        shard: flags.shard.clone(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        started_at: chrono::Utc::now(),
        server: has_server.then_some(unknown),
        peers: Vec::new(),
        round_trips: BTreeMap::new(),
        shards: std::collections::BTreeMap::new(),
        revision: 1,
    })
}

/// Written beside and renamed: who finds the file finds it whole.
fn publish_url(file: &std::path::Path, address: &str) -> anyhow::Result<()> {
    let beside = file.with_extension("new");
    std::fs::write(&beside, format!("postgresql://{address}\n"))
        .and_then(|()| std::fs::rename(&beside, file))
        .with_context(|| format!("write {}", file.display()))
}
