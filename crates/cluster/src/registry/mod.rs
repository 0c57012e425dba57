//! The registry as a member of the fleet sees it: joining, and staying alive.
//!
//! The registry is a database on the system shard's primary. A node finds that server through the view, like any
//! other, asks the node beside it for a session there, and joins: its shard is compared with the durable list, it is
//! given its number, and a session row begins to live. From then on it renews that session; everything that must not
//! be done by a node that others believe dead asks [`Session::is_valid`] first.
//!
//! **Clocks.** A session's end is decided by the registry server's clock alone. A node judges its own session by its
//! monotonic clock, from *before* it sent the renewal, so it always stops earlier than others may take over. No wall
//! clock of any node is compared with anything; one that differs is reported, because it will confuse people.
//!
//! **Losing the registry** ends nothing at once: the node tries again until it is back, on whichever server leads the
//! system shard by then, and renews the same session if that has not run out.

mod membership;
mod schema;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use membership::Refused;
pub use schema::{DATABASE, migrate};

use crate::dial::spoken;
use crate::settings::FleetSettings;
use crate::{Cluster, Dialer, NodeId, PeerSession, Purpose, View};

/// Wait between tries to reach the registry.
const RETRY: Duration = Duration::from_millis(250);

/// How long a question to the registry may take before the asker is told that it is not reachable.
const QUESTION_DEADLINE: Duration = Duration::from_secs(2);

/// How long joining may take, waits for another process's session aside.
const JOIN_DEADLINE: Duration = Duration::from_secs(10);

/// A heartbeat must not wait for a synchronous standby: the node is alive whatever that standby does. The timeouts end
/// on the server what a node that froze has begun, so that it never holds up the others.
const SESSION_SETTINGS: &str = "
    SET synchronous_commit = local; SET lock_timeout = '5s'; SET statement_timeout = '10s';
    SET idle_in_transaction_session_timeout = '10s'";

/// A wall clock that is this far from the registry's is reported.
const CLOCK_OFFSET_TOLERATED: chrono::TimeDelta = chrono::TimeDelta::milliseconds(500);

/// A node's right to act, for as long as it is renewed.
#[derive(Clone, Debug)]
pub struct Session {
    /// The node.
    pub node_id: NodeId,
    /// Unique to this session; a node that comes back later has another.
    pub id: Uuid,
    /// Counts the node's sessions.
    pub epoch: i64,
    valid_until: Instant,
}

impl Session {
    /// Whether others still have to believe that this node lives.
    pub fn is_valid(&self) -> bool {
        Instant::now() < self.valid_until
    }
}

/// Where this node stands with the registry.
#[derive(Clone, Debug)]
pub enum Standing {
    /// Not joined now; the reason is for an operator.
    Apart {
        /// Why.
        reason: String,
    },
    /// Joined.
    Member(Session),
}

/// A node as the registry lists it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its number.
    pub id: NodeId,
    /// Its address when it last joined.
    pub address: String,
    /// Its locality, as text.
    pub locality: String,
    /// Its shard.
    pub shard: String,
    /// Its program's version.
    pub build: String,
    /// When its process started.
    pub started_at: DateTime<Utc>,
    /// When it last renewed its session or joined.
    pub updated_at: DateTime<Utc>,
    /// Whether its session has not run out, by the registry's clock.
    pub is_live: bool,
}

struct Shared {
    standing: watch::Sender<Standing>,
    session: watch::Sender<Option<Arc<PeerSession>>>,
    /// As the last heartbeat brought them.
    settings: watch::Sender<FleetSettings>,
    /// Cancelled when the node leaves for good.
    leaving: CancellationToken,
}

/// The handle; clones share one membership.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

impl Default for Registry {
    fn default() -> Self {
        let apart = Standing::Apart { reason: "the node has just started".to_owned() };
        let (standing, session) = (watch::Sender::new(apart), watch::Sender::new(None));
        let settings = watch::Sender::default();
        Self(Arc::new(Shared { standing, session, settings, leaving: CancellationToken::new() }))
    }
}

impl Registry {
    /// Where this node stands.
    pub fn standing(&self) -> Standing {
        self.0.standing.borrow().clone()
    }

    /// Waits until this node is a member, at most so long.
    pub async fn joined(&self, deadline: Duration) {
        let mut standings = self.0.standing.subscribe();
        let is_member = |standing: &Standing| matches!(standing, Standing::Member(session) if session.is_valid());
        let _ = timeout(deadline, standings.wait_for(is_member)).await;
    }

    /// The fleet's settings, as this node last heard of them.
    pub fn settings(&self) -> watch::Receiver<FleetSettings> {
        self.0.settings.subscribe()
    }

    /// All nodes that ever joined, by number.
    ///
    /// # Errors
    ///
    /// The registry is not reachable, or does not answer in time.
    pub async fn nodes(&self) -> anyhow::Result<Vec<Listed>> {
        let session = self.0.session.borrow().clone().context("reach the registry")?;
        let listing = timeout(QUESTION_DEADLINE, session.query(membership::LIST_NODES, &[]));
        let rows = listing.await.context("list the registry's nodes")?.map_err(spoken)?;
        Ok(rows.iter().map(membership::listed).collect())
    }

    /// Joins and stays a member. Returns only when this node must not run at all.
    ///
    /// # Errors
    ///
    /// A [`Refused`] (the root of the chain): another shard, a number or a store that is in use, another cluster.
    pub async fn run(self, cluster: Cluster, dialer: Dialer, requested: Option<NodeId>) -> anyhow::Error {
        let mut kept = None;
        loop {
            let ended = tokio::select! {
                ended = self.attend(&cluster, &dialer, requested, &mut kept) => ended,
                () = self.0.leaving.cancelled() => std::future::pending().await,
            };
            self.0.session.send_replace(None);
            let error = match ended {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if error.downcast_ref::<Refused>().is_some() {
                return error;
            }
            match &kept {
                // Nobody may believe this node dead yet, and the next connection renews the same session.
                Some(session) if session.is_valid() => tracing::info!("the registry is lost for now: {error:#}"),
                _ => self.apart(format!("{error:#}")),
            }
            sleep(RETRY).await;
        }
    }

    /// Ends this node's session before its time: from now on others may do what only it could. It never joins again.
    pub async fn leave(&self) {
        let session = self.0.session.borrow().clone();
        let standing = self.standing();
        self.0.leaving.cancel();
        self.apart("the node is stopping".to_owned());
        let (Some(session), Standing::Member(mine)) = (session, standing) else { return };
        let end = "UPDATE registry.sessions SET expires_at = clock_timestamp() WHERE node_id = $1 AND id = $2";
        if !matches!(timeout(QUESTION_DEADLINE, session.execute(end, &[&mine.node_id.0, &mine.id])).await, Ok(Ok(_))) {
            tracing::info!("this node's session was not ended in the registry; it runs out by itself");
        }
    }

    fn apart(&self, reason: String) {
        self.0.standing.send_if_modified(|standing| {
            if matches!(standing, Standing::Apart { reason: before } if *before == reason) {
                return false;
            }
            tracing::warn!("not a member of the registry: {reason}");
            *standing = Standing::Apart { reason };
            true
        });
    }

    /// One connection to the registry, from finding it to losing it.
    async fn attend(
        &self,
        cluster: &Cluster,
        dialer: &Dialer,
        requested: Option<NodeId>,
        kept: &mut Option<Session>,
    ) -> anyhow::Result<std::convert::Infallible> {
        let (beside, address, cluster_id) = match cluster.view().registry() {
            Some((node, cluster_id)) => (node.instance, node.address.clone(), cluster_id),
            None if cluster.me().cluster_id.is_some() => {
                bail!("no server that holds the registry can be written to now")
            }
            None => bail!("no node knows a registry; has \"backhaul init\" been run?"),
        };
        let purpose = Purpose::Server { database: schema::DATABASE.to_owned() };
        let session = Arc::new(dialer.dial(&address, &purpose).await?);
        let prepared = timeout(JOIN_DEADLINE, async {
            session.batch_execute(SESSION_SETTINGS).await.map_err(spoken)?;
            migrate(&session).await?;
            membership::check_cluster(&session, cluster, cluster_id).await
        });
        prepared.await.context("prepare the session with the registry")??;
        let (joined, mut life) = membership::join(&session, cluster, requested, kept.as_ref()).await?;
        self.0.session.send_replace(Some(Arc::clone(&session)));
        self.become_member(kept, joined);
        let (mut views, instance) = (cluster.subscribe(), cluster.me().instance);
        let mut reported = false;
        let mut checked = None;
        while let Some(standing) = kept.as_mut() {
            let sent = Instant::now();
            let beat = timeout(life / 3, async {
                membership::check_shard(&session, &cluster.me(), &mut checked).await?;
                membership::renew(&session, standing, life).await
            });
            let Some(renewed) = beat.await.map_err(|_| anyhow!("the registry did not answer in time"))?? else {
                *kept = None;
                bail!("the node's session has run out");
            };
            standing.valid_until = sent + life;
            self.0.standing.send_replace(Standing::Member(standing.clone()));
            report_offset(renewed.registry_time - Utc::now(), &mut reported);
            cluster.confirm_members(renewed.addresses);
            cluster.confirm_shards(&renewed.shards);
            // The session was renewed for the life of before: one that is longer from now on is not lived yet.
            let lived = life.min(renewed.life);
            life = renewed.life;
            self.0.settings.send_if_modified(|settings| {
                let news = *settings != renewed.settings;
                *settings = renewed.settings;
                news
            });
            let has_moved = |view: &View| view.registry().is_some_and(|(node, _)| node.instance != beside);
            let is_unlisted = |view: &View| membership::is_unlisted(view, instance, checked.as_ref());
            let news = views.wait_for(|view| has_moved(view) || is_unlisted(view));
            tokio::select! {
                news = news => match news {
                    Ok(view) if !has_moved(&view) => {}
                    _ => bail!("the registry has moved to another server"),
                },
                () = session.lost() => bail!("the connection to the registry was lost"),
                () = sleep(lived / 4) => {}
            }
        }
        bail!("the node has no session")
    }

    fn become_member(&self, kept: &mut Option<Session>, joined: Session) {
        if kept.as_ref().map(|session| session.id) != Some(joined.id) {
            tracing::info!(node = %joined.node_id, epoch = joined.epoch, "node has a session in the registry");
        }
        self.0.standing.send_replace(Standing::Member(joined.clone()));
        *kept = Some(joined);
    }
}

/// Nothing depends on wall clocks, but people compare times.
fn report_offset(offset: chrono::TimeDelta, reported: &mut bool) {
    if offset.abs() > CLOCK_OFFSET_TOLERATED && !*reported {
        *reported = true;
        let milliseconds = offset.num_milliseconds();
        tracing::warn!("this host's clock differs from the registry's by {milliseconds} ms; times will look wrong");
    }
}
