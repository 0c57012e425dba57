//! `backhaul init`: the registry, the service role and the cluster secret of a new fleet.
//!
//! Every step may be done again: a run that was cut short is finished by the next one. The mark by which nodes know
//! the registry (the comment on its database) comes last.

use anyhow::{Context as _, bail};
use cluster::registry::{DATABASE, migrate};
use cluster::secret::ClusterSecret;
use fleet::loader::RESTORE_ROLE;
use fleet::probe::REGISTRY_MARK;
use fleet::readiness::{make_restore_role, make_service_role};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::client::{local_session, spoken};
use crate::flags::Init;

/// Makes what is missing and tells `say` what is left to do.
///
/// # Errors
///
/// The fleet has been initialized, the node stands beside a standby, or PostgreSQL refuses.
pub(crate) async fn run(flags: &Init, say: impl Fn(&str)) -> anyhow::Result<()> {
    let session = local_session(&flags.host, &flags.user, "postgres", &flags.trust).await?;
    check_node(&session.client, &flags.host).await?;
    check_primary(&session.client, &flags.host).await?;
    service_role(&session.client, &flags.service_role).await?;
    if flags.allow_restore {
        restore_role(&session.client, &flags.service_role).await?;
    }
    if flags.service_role_only {
        say(&format!("role \"{}\" is ready", flags.service_role));
        return Ok(());
    }
    let id = make_registry(&session.client, flags).await?;
    let made_secret = match &flags.trust.secret_file {
        Some(file) if !flags.trust.insecure => Some((file, ClusterSecret::create(file)?)),
        _ => None,
    };
    say(&format!("cluster {id} is initialized; its registry is the database \"{DATABASE}\""));
    if let Some((file, made)) = made_secret {
        let verb = if made { "was written to" } else { "was found in" };
        say(&format!("the cluster secret {verb} {}; copy that file to every node's host", file.display()));
    }
    if !flags.trust.insecure {
        let role = &flags.service_role;
        say(&format!(
            "give the role a password (\\password {role}, in psql on that server itself), and each node its --postgres with it"
        ));
        say("lines for pg_hba.conf of every server, above all others for 127.0.0.1:");
        say(&format!("  host  all          {role}  127.0.0.1/32  scram-sha-256"));
        say("  host  all          all       127.0.0.1/32  scram-sha-256");
        say("  host  replication  all       127.0.0.1/32  scram-sha-256");
    }
    warn_of_no_standby(&session.client, say).await
}

/// A bare PostgreSQL does not know our statements.
async fn check_node(client: &Client, host: &str) -> anyhow::Result<()> {
    if client.simple_query("SHOW LOCALITY").await.is_err() {
        bail!("there is no node at {host}; give the address that \"backhaul start\" listens on");
    }
    Ok(())
}

async fn check_primary(client: &Client, host: &str) -> anyhow::Result<()> {
    let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await.map_err(spoken)?;
    if row.get(0) {
        bail!("the server beside the node at {host} is a standby; run init on the node beside the primary");
    }
    Ok(())
}

/// Makes the service role. Rights on functions belong to one database: `client` is in the one that nodes log into,
/// `postgres`.
///
/// # Errors
///
/// PostgreSQL refuses.
pub(crate) async fn service_role(client: &Client, role: &str) -> anyhow::Result<()> {
    let exists = client.query_opt("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&role]).await.map_err(spoken)?;
    let script = make_service_role(role, exists.is_some()).concat();
    client.batch_execute(&script).await.map_err(spoken).with_context(|| format!("make the role \"{role}\""))
}

/// Makes the role that restores.
async fn restore_role(client: &Client, service_role: &str) -> anyhow::Result<()> {
    let exists = client.query_opt("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&RESTORE_ROLE]).await;
    let script = make_restore_role(service_role, exists.map_err(spoken)?.is_some()).concat();
    client.batch_execute(&script).await.map_err(spoken).with_context(|| format!("make the role \"{RESTORE_ROLE}\""))
}

async fn make_registry(client: &Client, flags: &Init) -> anyhow::Result<Uuid> {
    let query = "SELECT coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database WHERE datname = $1";
    let found = client.query_opt(query, &[&DATABASE]).await.map_err(spoken)?;
    let role = quote(&flags.service_role);
    match found.map(|row| row.get::<_, String>(0)) {
        Some(comment) if comment.starts_with(REGISTRY_MARK) => {
            bail!("cluster has already been initialized; \"backhaul node status\" shows it")
        }
        Some(_) => {}
        None => {
            let create = format!("CREATE DATABASE {DATABASE} OWNER {role}");
            client.batch_execute(&create).await.map_err(spoken).context("create the registry's database")?;
        }
    }
    let registry = local_session(&flags.host, &flags.user, DATABASE, &flags.trust).await?;
    let client = &registry.client;
    client.batch_execute(&format!("SET ROLE {role}")).await.map_err(spoken)?;
    migrate(client).await?;
    let insert = "INSERT INTO registry.cluster (id) VALUES ($1) ON CONFLICT (single) DO NOTHING";
    client.execute(insert, &[&Uuid::new_v4()]).await.map_err(spoken)?;
    let id: Uuid = client.query_one("SELECT id FROM registry.cluster", &[]).await.map_err(spoken)?.get(0);
    let publish = format!(
        "RESET ROLE;
         COMMENT ON DATABASE {DATABASE} IS '{REGISTRY_MARK}{id}'"
    );
    client.batch_execute(&publish).await.map_err(spoken).context("publish the registry")?;
    Ok(id)
}

/// The registry survives the loss of its server only as far as a standby has confirmed it.
async fn warn_of_no_standby(client: &Client, say: impl Fn(&str)) -> anyhow::Result<()> {
    let query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')";
    let standbys: i64 = client.query_one(query, &[]).await.map_err(spoken)?.get(0);
    if standbys == 0 {
        say("WARNING: this server has no synchronous standby; a failover may forget the last jobs");
    }
    Ok(())
}

fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}
