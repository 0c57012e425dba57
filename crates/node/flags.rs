//! The command line, as typed. Names are CockroachDB's where it has the same thing.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// CockroachDB's backup jobs for fleets of PostgreSQL servers that span regions.
#[derive(Debug, Parser)]
#[command(name = "backhaul", version, about, max_term_width = 100)]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a node, normally beside a PostgreSQL server.
    Start(Start),
    /// Make the registry of a new fleet.
    Init(Init),
    /// Look at the nodes of a fleet.
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Say what each server lacks for backups and restores, with the statements that mend it.
    Check(CheckFlags),
    /// Start a private fleet on this machine, with PostgreSQL servers of its own, to try things.
    Demo(Demo),
    /// Ends and cleans what a demo started, once its standard input closes.
    #[command(hide = true)]
    DemoReaper {
        dir: PathBuf,
        #[arg(long)]
        remove: bool,
        #[arg(long)]
        network_of: Option<u32>,
    },
    /// Print the version.
    Version,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the nodes, their places and their roles.
    Status(Status),
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Where this node is, from the most to the least inclusive tier: region=us-west-1,zone=a
    #[arg(long, value_parser = tiers, value_name = "TIERS")]
    pub(crate) locality: Option<cluster::Locality>,

    /// Address to listen on for clients and nodes.
    #[arg(long, default_value = "127.0.0.1:26257", value_name = "HOST:PORT")]
    pub(crate) listen_addr: String,

    /// Address that clients and nodes reach this node at; the listen address when left out.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise_addr: Option<String>,

    /// Address to serve /health on; not served when left out.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) http_addr: Option<String>,

    /// Addresses of some other nodes of the fleet.
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT,…")]
    pub(crate) join: Vec<String>,

    /// Connection string of the PostgreSQL server beside this node, with its service role; a node without a server
    /// leaves it out. Give it by the environment when it holds a password.
    #[arg(long, env = "BACKHAUL_POSTGRES", hide_env_values = true, value_name = "CONNINFO")]
    pub(crate) postgres: Option<String>,

    /// The shard that the server belongs to, and that this node's clients are relayed to.
    #[arg(long, default_value = "s1", value_name = "NAME")]
    pub(crate) shard: String,

    /// Directory for what this node has to remember.
    #[arg(long, default_value = "backhaul-data", value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// Directory of nodelocal:// storage; STORE/extern when left out.
    #[arg(long, value_name = "DIR")]
    pub(crate) external_io_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) trust: Trust,

    /// Number to ask for when this node first joins; the registry gives the next free one when left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) node_id: Option<i32>,

    /// File to write the connection URL to once the node listens; useful with port 0.
    #[arg(long, value_name = "FILE")]
    pub(crate) listening_url_file: Option<PathBuf>,
}

/// How a node or a tool knows whom it talks to.
#[derive(Clone, Debug, Args)]
pub(crate) struct Trust {
    /// File with the cluster secret, which "init" makes and every node needs.
    #[arg(long, value_name = "FILE", required_unless_present = "insecure")]
    pub(crate) secret_file: Option<PathBuf>,

    /// Trust whoever reaches the port: no cluster secret, no check of how PostgreSQL lets clients in.
    #[arg(long)]
    pub(crate) insecure: bool,

    /// Directory with node.crt and node.key to offer TLS, and ca.crt to insist on it between nodes.
    #[arg(long, value_name = "DIR")]
    pub(crate) certs_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// A node beside the primary that shall hold the registry.
    #[arg(long, default_value = "127.0.0.1:26257", value_name = "HOST:PORT")]
    pub(crate) host: String,

    /// A superuser of that server; the password comes from PGPASSWORD.
    #[arg(long, default_value = "postgres", value_name = "ROLE")]
    pub(crate) user: String,

    /// The role that nodes log in as.
    #[arg(long, default_value = "backhaul", value_name = "ROLE")]
    pub(crate) service_role: String,

    /// Only make the service role: for the primaries of further shards.
    #[arg(long)]
    pub(crate) service_role_only: bool,

    /// Let nodes restore backups on this server: makes a superuser role that the service role may take on. Whoever holds
    /// the cluster secret could then do anything on the server.
    #[arg(long)]
    pub(crate) allow_restore: bool,

    #[command(flatten)]
    pub(crate) trust: Trust,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Any node of the fleet.
    #[arg(long, default_value = "127.0.0.1:26257", value_name = "HOST:PORT")]
    pub(crate) host: String,

    #[command(flatten)]
    pub(crate) trust: Trust,
}

#[derive(Debug, Args)]
pub(crate) struct CheckFlags {
    /// Any node of the fleet.
    #[arg(long, default_value = "127.0.0.1:26257", value_name = "HOST:PORT")]
    pub(crate) host: String,

    /// Look at this one server instead, from its own host, as its service role: what a node would be started with,
    /// whether there is one or not. With --insecure nobody looks for open doors.
    #[arg(long, value_name = "CONNINFO", conflicts_with = "host")]
    pub(crate) postgres: Option<String>,

    #[command(flatten)]
    pub(crate) trust: Trust,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// How many nodes.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub(crate) nodes: usize,

    /// How many of them, from the first on, have a PostgreSQL server; all but the last when left out.
    #[arg(long, value_name = "N")]
    pub(crate) servers: Option<usize>,

    /// Voting replicas of each shard, its leaseholder among them.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(crate) voters: usize,

    /// How many shards; server i belongs to shard i modulo N.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) shards: usize,

    /// A locality for each node, with colons between them.
    #[arg(long, value_name = "L1:L2:…")]
    pub(crate) demo_locality: Option<String>,

    /// The first node's port, the others follow; 0 for any.
    #[arg(long, default_value_t = 26257, value_name = "PORT")]
    pub(crate) sql_port: u16,

    /// The first node's HTTP port, the others follow; 0 for any.
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    pub(crate) http_port: u16,

    /// Give each region (first tier) a network of its own, out of which only the nodes' ports can be reached, and an S3
    /// server that the second region alone reaches. Needs root, iproute2 and nftables. Nodes have addresses of their own
    /// and one port, and PostgreSQL streams through it, too.
    #[arg(long)]
    pub(crate) closed_network: bool,

    /// Directory for the fleet, which is kept; a temporary one, which is not, when left out.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,

    /// Leave the database "movr" out.
    #[arg(long)]
    pub(crate) no_example_database: bool,

    /// How many rides the database "movr" holds; a million make about 400 MB.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub(crate) rows: u32,

    /// Run this on the first node, print the result as psql does, and exit with psql's status. Can be repeated.
    #[arg(short, long = "execute", value_name = "SQL")]
    pub(crate) execute: Vec<String>,
}

/// A locality that somebody gives has a tier, as CockroachDB's has.
fn tiers(text: &str) -> Result<cluster::Locality, String> {
    match text.parse() {
        Ok(locality) if cluster::Locality::is_empty(&locality) => Err("can't have empty locality".to_owned()),
        read => read.map_err(|error| error.to_string()),
    }
}
