//! The statements by which a node joins the registry and keeps its session.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use crate::dial::spoken;
use crate::registry::{JOIN_DEADLINE, Listed, Session};
use crate::settings::FleetSettings;
use crate::{Cluster, NodeId, NodeInfo, View};

/// Why a node must not run in this fleet; whoever starts it again has to change something first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its server is not one of the shard that it was told.
    #[error(
        "the server beside this node does not belong to shard \"{shard}\": it has system identifier {found}, the shard has {expected}"
    )]
    OtherShard {
        /// The shard it was told.
        shard: String,
        /// The shard's identity.
        expected: String,
        /// The server's identity.
        found: String,
    },
    /// Its number belongs to another store.
    #[error("node id {0} belongs to another node")]
    NumberTaken(NodeId),
    /// The same store runs elsewhere; one of the two is a copy.
    #[error("node {id} is already running at {address}; was its store copied?")]
    AlreadyRunning {
        /// The node.
        id: NodeId,
        /// Where the other process is.
        address: String,
    },
    /// Its store has been a member of another cluster.
    #[error("this node belongs to cluster {mine}, and the registry that it found to cluster {theirs}")]
    OtherCluster {
        /// As the store says.
        mine: Uuid,
        /// As the registry says.
        theirs: Uuid,
    },
}

/// Held while a node joins. Like the schema's lock, the number only has to be the same everywhere.
const JOIN_LOCK: i64 = 0x6261_636b_6861_756d;

pub(super) const LIST_NODES: &str = "
    SELECT n.id, n.address, n.locality, n.shard, n.build, n.started_at, n.updated_at,
           coalesce(s.expires_at > clock_timestamp(), false)
    FROM registry.nodes n LEFT JOIN registry.sessions s ON s.node_id = n.id ORDER BY n.id";

pub(super) fn listed(row: &Row) -> Listed {
    Listed {
        id: NodeId(row.get(0)),
        address: row.get(1),
        locality: row.get(2),
        shard: row.get(3),
        build: row.get(4),
        started_at: row.get(5),
        updated_at: row.get(6),
        is_live: row.get(7),
    }
}

/// Sees to it that a store is a member of one cluster only.
pub(super) async fn check_cluster(client: &Client, cluster: &Cluster, announced: Uuid) -> anyhow::Result<()> {
    let row = client.query_opt("SELECT id FROM registry.cluster", &[]).await.map_err(spoken)?;
    let theirs: Uuid = row.map_or(announced, |row| row.get(0));
    let mut identity = cluster.store().identity()?;
    match identity.cluster_id {
        Some(mine) if mine != theirs => Err(Refused::OtherCluster { mine, theirs }.into()),
        Some(_) => Ok(()),
        None => {
            identity.cluster_id = Some(theirs);
            cluster.store().set_identity(&identity)?;
            cluster.update_me(|me| {
                me.cluster_id = Some(theirs);
                true
            });
            Ok(())
        }
    }
}

/// How long a session lives without renewal.
async fn session_life(client: &Client) -> anyhow::Result<Duration> {
    let query = "SELECT value::bigint FROM registry.settings WHERE name = 'session_life_ms'";
    let row = client.query_one(query, &[]).await.map_err(spoken).context("read the session life")?;
    Ok(life_of(row.get(0)))
}

fn life_of(milliseconds: i64) -> Duration {
    // Below 300 ms the deadline of a single heartbeat would be shorter than a busy server's answer.
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0).max(300))
}

/// Writes this node's row, giving it its number the first time, and begins its session or takes up `kept`. Gives the
/// session and how long it lives without renewal.
pub(super) async fn join(
    client: &Client,
    cluster: &Cluster,
    requested: Option<NodeId>,
    kept: Option<&Session>,
) -> anyhow::Result<(Session, Duration)> {
    let mut identity = cluster.store().identity()?;
    loop {
        let attempt = timeout(JOIN_DEADLINE, async {
            client.batch_execute(&format!("BEGIN; SELECT pg_advisory_xact_lock({JOIN_LOCK})")).await.map_err(spoken)?;
            let attempt = join_locked(client, &cluster.me(), identity.store_id, requested, kept).await;
            let end = if attempt.is_ok() { "COMMIT" } else { "ROLLBACK" };
            client.batch_execute(end).await.map_err(spoken)?;
            attempt
        });
        match attempt.await.context("join the registry")?? {
            Attempt::Joined(session, life) => {
                if identity.node_id != Some(session.node_id) {
                    identity.node_id = Some(session.node_id);
                    cluster.store().set_identity(&identity)?;
                }
                cluster.update_me(|me| {
                    let news = me.node_id != Some(session.node_id);
                    me.node_id = Some(session.node_id);
                    news
                });
                return Ok((session, life));
            }
            Attempt::Elsewhere { id, address, session, remaining } => {
                // Either a process that is gone, whose session will run out, or a copy that renews it.
                tracing::info!("waiting for the session of node {id} at {address} to end");
                sleep(remaining + Duration::from_millis(100)).await;
                let query = "SELECT 1 FROM registry.sessions WHERE id = $1 AND expires_at > clock_timestamp()";
                if client.query_opt(query, &[&session]).await.map_err(spoken)?.is_some() {
                    return Err(Refused::AlreadyRunning { id, address }.into());
                }
            }
        }
    }
}

enum Attempt {
    Joined(Session, Duration),
    Elsewhere { id: NodeId, address: String, session: Uuid, remaining: Duration },
}

async fn join_locked(
    client: &Client,
    me: &NodeInfo,
    store_id: Uuid,
    requested: Option<NodeId>,
    kept: Option<&Session>,
) -> anyhow::Result<Attempt> {
    let known = client.query_opt("SELECT id FROM registry.nodes WHERE store_id = $1", &[&store_id]).await;
    let id = match known.map_err(spoken)? {
        Some(row) => NodeId(row.get(0)),
        None => new_number(client, requested).await?,
    };
    let other = "
        SELECT id, address, extract(epoch FROM expires_at - clock_timestamp())::float8
        FROM registry.sessions
        WHERE node_id = $1 AND instance <> $2 AND address <> $3 AND expires_at > clock_timestamp()";
    // A session under this node's own address is no obstacle: the process that had it lost the port to this one.
    if let Some(row) = client.query_opt(other, &[&id.0, &me.instance, &me.address]).await.map_err(spoken)? {
        let remaining = Duration::from_secs_f64(row.get::<_, f64>(2).max(0.0));
        return Ok(Attempt::Elsewhere { id, address: row.get(1), session: row.get(0), remaining });
    }
    let write = "
        INSERT INTO registry.nodes (id, store_id, address, locality, shard, build, started_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        ON CONFLICT (id) DO UPDATE SET address = excluded.address, locality = excluded.locality,
            shard = excluded.shard, build = excluded.build, started_at = excluded.started_at, updated_at = now()";
    let locality = me.locality.to_string();
    client
        .execute(write, &[&id.0, &store_id, &me.address, &locality, &me.shard, &me.build, &me.started_at])
        .await
        .map_err(spoken)
        .context("write the node's row")?;
    let life = session_life(client).await?;
    Ok(Attempt::Joined(begin_session(client, me, id, kept, life).await?, life))
}

/// Begins the node's session, or goes on with `kept` when that has not run out.
async fn begin_session(
    client: &Client,
    me: &NodeInfo,
    node_id: NodeId,
    kept: Option<&Session>,
    life: Duration,
) -> anyhow::Result<Session> {
    let begin = "
        INSERT INTO registry.sessions AS s (node_id, id, epoch, instance, address, expires_at)
        VALUES ($1, $2, 1, $3, $4, clock_timestamp() + $5::float8 * interval '1 ms')
        ON CONFLICT (node_id) DO UPDATE SET
            id = CASE WHEN s.id = $6 AND s.expires_at > clock_timestamp() THEN s.id ELSE excluded.id END,
            epoch = CASE WHEN s.id = $6 AND s.expires_at > clock_timestamp() THEN s.epoch ELSE s.epoch + 1 END,
            instance = excluded.instance, address = excluded.address, expires_at = excluded.expires_at
        RETURNING id, epoch";
    let kept = kept.map_or_else(Uuid::nil, |session| session.id);
    let sent = Instant::now();
    let row = client
        .query_one(begin, &[&node_id.0, &Uuid::new_v4(), &me.instance, &me.address, &milliseconds(life), &kept])
        .await
        .map_err(spoken)
        .context("begin the node's session")?;
    Ok(Session { node_id, id: row.get(0), epoch: row.get(1), valid_until: sent + life })
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Compares the server beside a node with the durable list of shards, as soon as the server is known and whenever it
/// is another one; a shard that is new is added. `checked` remembers the last server that was found in order.
pub(super) async fn check_shard(client: &Client, me: &NodeInfo, checked: &mut Option<String>) -> anyhow::Result<()> {
    let Some(found) = me.server_state().map(|server| &server.system_identifier) else { return Ok(()) };
    if checked.as_ref() == Some(found) {
        return Ok(());
    }
    let add = "INSERT INTO registry.shards (name, system_identifier) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
    client.execute(add, &[&me.shard, found]).await.map_err(spoken)?;
    let query = "SELECT system_identifier FROM registry.shards WHERE name = $1";
    let expected: String = client.query_one(query, &[&me.shard]).await.map_err(spoken)?.get(0);
    if expected != *found {
        return Err(Refused::OtherShard { shard: me.shard.clone(), expected, found: found.clone() }.into());
    }
    *checked = Some(found.clone());
    Ok(())
}

/// Whether the server beside this process is another one than was found in order, or was not known then: that is not put
/// off.
pub(super) fn is_unlisted(view: &View, instance: Uuid, checked: Option<&String>) -> bool {
    let me = view.nodes.values().find(|known| known.info.instance == instance);
    let server = me.and_then(|known| known.info.server_state());
    server.is_some_and(|server| checked != Some(&server.system_identifier))
}

async fn new_number(client: &Client, requested: Option<NodeId>) -> anyhow::Result<NodeId> {
    let Some(wanted) = requested else {
        let row = client.query_one("SELECT coalesce(max(id), 0) + 1 FROM registry.nodes", &[]).await.map_err(spoken)?;
        return Ok(NodeId(row.get(0)));
    };
    match client.query_opt("SELECT 1 FROM registry.nodes WHERE id = $1", &[&wanted.0]).await.map_err(spoken)? {
        Some(_) => Err(Refused::NumberTaken(wanted).into()),
        None => Ok(wanted),
    }
}

/// What a heartbeat brings back.
pub(super) struct Renewed {
    pub(super) life: Duration,
    pub(super) registry_time: DateTime<Utc>,
    pub(super) addresses: Vec<String>,
    pub(super) shards: Vec<(String, String)>,
    pub(super) settings: FleetSettings,
}

/// Renews the session: one statement, sent once, that is either there or not. Nothing comes back for a session that has
/// run out or was taken over; the node has to join again.
pub(super) async fn renew(client: &Client, session: &Session, life: Duration) -> anyhow::Result<Option<Renewed>> {
    let beat = "
        WITH beat AS (
            UPDATE registry.sessions SET expires_at = clock_timestamp() + $3::float8 * interval '1 ms'
            WHERE node_id = $1 AND id = $2 AND expires_at > clock_timestamp() RETURNING node_id),
        seen AS (UPDATE registry.nodes SET updated_at = clock_timestamp() WHERE id = (SELECT node_id FROM beat))
        SELECT clock_timestamp(),
               (SELECT value::bigint FROM registry.settings WHERE name = 'session_life_ms'),
               (SELECT array_agg(address) FROM registry.nodes WHERE id <> $1),
               (SELECT array_agg(name ORDER BY name) FROM registry.shards),
               (SELECT array_agg(system_identifier ORDER BY name) FROM registry.shards),
               (SELECT array_agg(name ORDER BY name) FROM registry.settings),
               (SELECT array_agg(value ORDER BY name) FROM registry.settings)
        FROM beat";
    let renewed = client.query_opt(beat, &[&session.node_id.0, &session.id, &milliseconds(life)]).await;
    let Some(row) = renewed.map_err(spoken).context("renew the node's session")? else { return Ok(None) };
    let texts = |column| row.get::<_, Option<Vec<String>>>(column).unwrap_or_default();
    Ok(Some(Renewed {
        registry_time: row.get(0),
        life: life_of(row.get(1)),
        addresses: texts(2),
        shards: texts(3).into_iter().zip(texts(4)).collect(),
        settings: FleetSettings::of_rows(texts(5).into_iter().zip(texts(6))),
    }))
}
