//! Raising a demo's fleet: servers, the nodes beside them, the registry, the data set.

use anyhow::{Context as _, bail};
use cluster::Role;
use fleet::private::{Installation, Instance, RunAs};

use super::ground::Ground;
use super::movr;
use super::network::Network;
use super::nodes::{self, Listen, RunningNode};
use super::object_store::{self, ObjectStore};
use super::plan::{Part, PlannedNode};
use super::servers::{SUPERUSER, Workshop, stream_through_own_nodes, through};
use crate::flags::{Demo, Init, Trust};
use crate::init;

/// From so many rides on, the user is told what takes so long.
const ROWS_THAT_TAKE_A_WHILE: u32 = 50_000;

/// What a fleet is raised from.
pub(super) struct Site<'a> {
    pub(super) flags: &'a Demo,
    pub(super) planned: &'a [PlannedNode],
    pub(super) installation: &'a Installation,
    pub(super) run_as: Option<&'a RunAs>,
    pub(super) ground: &'a Ground,
    /// Once there is one.
    pub(super) network: Option<Network>,
}

/// A fleet that stands.
pub(super) struct Raised {
    pub(super) running: Vec<RunningNode>,
    pub(super) roles: Vec<Role>,
    /// With the names of the nodes that they are beside.
    pub(super) servers: Vec<(String, Instance)>,
    pub(super) store: Option<ObjectStore>,
}

impl Site<'_> {
    /// Starts everything, and makes what an earlier start in the same directory has not made; `say` hears what takes long.
    ///
    /// # Errors
    ///
    /// Something cannot be started, or the directory holds a fleet that was raised from other flags.
    pub(super) async fn raise(&self, say: impl Fn(&str)) -> anyhow::Result<Raised> {
        let layout = self.layout();
        let is_new = match self.ground.ready_layout() {
            Some(before) if before != layout => {
                let dir = self.ground.dir.display();
                bail!("{dir} holds another fleet ({before}); give the same flags or another directory")
            }
            before => before.is_none(),
        };
        let bin = self.installation.bin.display();
        say(&format!("PostgreSQL {} from {bin}, data in {}", self.installation.version, self.ground.dir.display()));
        let mut store = match &self.network {
            Some(network) => object_store::start(network, &self.ground.dir)?,
            None => None,
        };
        let (mut running, servers) = self.start().await?;
        if is_new {
            initialize(&running).await?;
        }
        let mut roles = nodes::wait_until_whole(&mut running, is_new).await?;
        if let Some(network) = &self.network {
            stream_through_own_nodes(&running).await?;
            roles = nodes::wait_until_whole(&mut running, is_new).await?;
            if let Some(store) = &mut store {
                store.ready(network).await?;
            }
        }
        if is_new && !self.flags.no_example_database {
            if self.flags.rows >= ROWS_THAT_TAKE_A_WHILE {
                say(&format!("loading {} rides into the database {}", self.flags.rows, movr::DATABASE));
            }
            load_movr(self.flags, &running).await?;
        }
        self.ground.set_ready(&layout)?;
        Ok(Raised { running, roles, servers, store })
    }

    /// What two starts in one directory must have in common.
    fn layout(&self) -> String {
        let nodes: Vec<String> =
            self.planned.iter().map(|node| format!("n{} {} {:?}", node.number, node.shard, node.part)).collect();
        let movr = match self.flags.no_example_database {
            true => "no example database".to_owned(),
            false => format!("{} rows", self.flags.rows),
        };
        let network = if self.network.is_some() { "; closed network" } else { "" };
        format!("{}; {movr}{network}", nodes.join(", "))
    }

    /// Starts each server and the node beside it, primaries first: in a closed network standbys reach them through
    /// their nodes only.
    async fn start(&self) -> anyhow::Result<(Vec<RunningNode>, Vec<(String, Instance)>)> {
        let (installation, run_as, nodes) = (self.installation, self.run_as, self.planned);
        let workshop = Workshop { installation, run_as, dir: &self.ground.dir, nodes };
        let mut order: Vec<&PlannedNode> = nodes.iter().collect();
        order.sort_by_key(|node| node.part != Part::Leaseholder);
        let (mut running, mut servers): (Vec<RunningNode>, Vec<(&PlannedNode, Instance)>) = (Vec::new(), Vec::new());
        for node in order {
            let listen = self.listen(node)?;
            if node.part != Part::None {
                let source = self.source(node, &running, &servers)?;
                let server = workshop.start(node, source.as_deref(), listen.namespace.as_ref()).await?;
                servers.push((node, server));
            }
            let server = servers.last().filter(|(beside, _)| beside.number == node.number).map(|(_, server)| server);
            let join: Vec<String> = running.first().map(|first| first.address.clone()).into_iter().collect();
            running.push(nodes::start(&self.ground.dir, node, &listen, server, &join).await?);
        }
        running.sort_by_key(|node| node.planned.number);
        servers.sort_by_key(|(node, _)| node.number);
        Ok((running, servers.into_iter().map(|(node, server)| (node.name(), server)).collect()))
    }

    fn listen(&self, node: &PlannedNode) -> anyhow::Result<Listen> {
        if let Some(network) = &self.network {
            let place = network.place(node.number)?;
            let (sql, http) = (network.node_port(), self.flags.http_port);
            let [sql, http] = [sql, http].map(|port| format!("{}:{port}", place.address));
            return Ok(Listen { sql, http, namespace: Some(place.namespace.clone()) });
        }
        let at = |base: u16| nodes::port(base, node.number - 1).map(|port| format!("127.0.0.1:{port}"));
        Ok(Listen { sql: at(self.flags.sql_port)?, http: at(self.flags.http_port)?, namespace: None })
    }

    /// What a server is made from: nothing, or its shard's primary, directly or through the node beside it.
    fn source(
        &self,
        node: &PlannedNode,
        running: &[RunningNode],
        servers: &[(&PlannedNode, Instance)],
    ) -> anyhow::Result<Option<String>> {
        let leads = |other: &PlannedNode| other.shard == node.shard && other.part == Part::Leaseholder;
        if leads(node) {
            return Ok(None);
        }
        if self.network.is_some() {
            let leader = running.iter().find(|running| leads(&running.planned));
            return leader.map(|leader| through(&leader.address)).transpose();
        }
        Ok(servers.iter().find(|(other, _)| leads(other)).map(|(_, server)| server.conninfo(SUPERUSER)))
    }
}

fn leaseholders(running: &[RunningNode]) -> impl Iterator<Item = &RunningNode> {
    running.iter().filter(|node| node.planned.part == Part::Leaseholder)
}

/// The registry on the first shard, the service role on all of them.
async fn initialize(running: &[RunningNode]) -> anyhow::Result<()> {
    for (index, node) in leaseholders(running).enumerate() {
        let init = Init {
            host: node.address.clone(),
            user: SUPERUSER.to_owned(),
            service_role: "backhaul".to_owned(),
            service_role_only: index > 0,
            allow_restore: true,
            trust: Trust { secret_file: None, insecure: true, certs_dir: None },
        };
        init::run(&init, |_| ()).await.with_context(|| format!("initialize {}", node.planned.shard))?;
    }
    Ok(())
}

async fn load_movr(flags: &Demo, running: &[RunningNode]) -> anyhow::Result<()> {
    let shards = leaseholders(running).count();
    for (index, node) in leaseholders(running).enumerate() {
        let part = movr::Part { rows: flags.rows, shard: index, shards };
        movr::load(&node.address, SUPERUSER, &part)
            .await
            .with_context(|| format!("load the database {} into {}", movr::DATABASE, node.planned.shard))?;
    }
    Ok(())
}
