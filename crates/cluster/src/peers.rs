//! Following every other node: one peer session each, asking *who are you* without end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sql::Verb;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

use crate::{Cluster, Dialer, NodeInfo, PeerSession, Purpose};

/// A node holds its answer back for at most this long when it has nothing new to say.
pub(crate) const ANSWER_HOLD: Duration = Duration::from_secs(2);

/// A node whose answer is this late counts as unreachable.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// How often it is measured how long an answer takes. The first one may have been late by chance.
const MEASURE_EVERY: Duration = Duration::from_secs(60);

/// Waits between tries to reach a node that does not answer: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(2);

/// How often a second name of a node that is followed under its own is looked at again.
const ALIAS_RECHECK: Duration = Duration::from_secs(10);

/// Follows all addresses that the cluster knows, or comes to know, for as long as it does. Ends only by being dropped.
pub async fn follow_peers(cluster: Cluster, dialer: Dialer) {
    let mut addresses = cluster.addresses();
    let mut following: BTreeMap<String, AbortHandle> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let known = addresses.borrow_and_update().clone();
        for (_, forgotten) in following.extract_if(.., |address, _| !known.contains(address)) {
            forgotten.abort();
        }
        for address in known {
            let follow = follow(cluster.clone(), dialer.clone(), address.clone());
            following.entry(address).or_insert_with(|| tasks.spawn(follow));
        }
        tokio::select! {
            changed = addresses.changed() => if changed.is_err() { return },
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Why following an address came to a halt.
enum Halt {
    /// It is this node's own port under another name.
    Myself,
    /// The node there calls itself by another address and is followed there.
    Alias(String),
}

async fn follow(cluster: Cluster, dialer: Dialer, address: String) {
    let mut wait = RETRY_FIRST;
    loop {
        let started = Instant::now();
        match attend(&cluster, &dialer, &address).await {
            Ok(Halt::Myself) => return,
            Ok(Halt::Alias(own)) => {
                cluster.learn([own.clone()]);
                sleep(ALIAS_RECHECK).await;
                while cluster.view().nodes.get(&own).is_some_and(|known| known.reachable) {
                    sleep(ALIAS_RECHECK).await;
                }
            }
            Err(error) => {
                let reason = format!("{error:#}");
                if cluster.view().troubles.get(&address) != Some(&reason) {
                    tracing::warn!(node = %address, "node does not answer: {reason}");
                }
                cluster.unreachable(&address, reason);
                if started.elapsed() > ANSWER_HOLD {
                    wait = RETRY_FIRST;
                }
                sleep(wait).await;
                wait = (wait * 2).min(RETRY_LAST);
            }
        }
    }
}

async fn attend(cluster: &Cluster, dialer: &Dialer, address: &str) -> anyhow::Result<Halt> {
    let session = dialer.dial(address, &Purpose::Verbs).await?;
    let mut measured = Instant::now();
    let mut info = ask(&session, None).await?;
    let mut round_trip = measured.elapsed();
    loop {
        if info.instance == cluster.me().instance {
            return Ok(Halt::Myself);
        }
        if info.address != address {
            return Ok(Halt::Alias(info.address));
        }
        // An answer to a plain question is not held back.
        let since = Some(info.revision).filter(|_| measured.elapsed() < MEASURE_EVERY);
        cluster.answered(info, round_trip)?;
        let asked = Instant::now();
        info = ask(&session, since).await?;
        if since.is_none() {
            (measured, round_trip) = (asked, asked.elapsed());
        }
    }
}

async fn ask(session: &PeerSession, since: Option<u64>) -> anyhow::Result<NodeInfo> {
    let answer = session.ask(Verb::WhoAreYou { since }, ANSWER_DEADLINE).await.context("ask who are you")?;
    serde_json::from_str(&answer).context("read the answer to who are you")
}

impl Cluster {
    /// The answer to *who are you*: at once when it is newer than `since`, else when there is news or after a
    /// bounded wait.
    pub async fn who_am_i(&self, since: Option<u64>) -> NodeInfo {
        let mut views = self.subscribe();
        let news =
            async { while since.is_some_and(|seen| seen == self.me().revision) && views.changed().await.is_ok() {} };
        // Running out of time is an answer too: it proves life, and carries the present WAL position.
        let _ = tokio::time::timeout(ANSWER_HOLD, news).await;
        self.me()
    }
}
