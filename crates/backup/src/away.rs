//! Nodes and servers that stop answering: what is a moment, and what is an end.
//!
//! A node that does not answer in time, a peer session that has to be opened anew, a server that is late with one answer:
//! each makes a node or a server look lost for a moment. What it was doing may go on all the same, so it is given up
//! only when it stays away. Work that fails by itself meanwhile is not waited for: that is judged where it is watched. A
//! server that has come to be what the statement keeps away from is given up at once.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use cluster::{NodeId, Peers, View};
use pgerror::{PgError, SqlState};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::rules::Rules;

/// What does not answer for so long is given up, with the work that it had. Shorter than a session lives by default, so
/// that a node which is lost for good is not waited for by two clocks one after the other.
pub(crate) const BLIP_MAX: Duration = Duration::from_secs(5);

/// Returns when `node` stays away.
pub(crate) async fn node(peers: &Peers, node: NodeId) {
    stays_away(peers.cluster().subscribe(), |view: &Arc<View>| has_node(view, node), || sleep(BLIP_MAX)).await;
}

/// Awaits work on the server beside `node` for as long as that server, and the node itself, are not away for a whole
/// `moment`. A server may keep its connections open all the same, as one that is frozen does, and what waits for it has
/// deadlines that are meant for one that is slow.
///
/// # Errors
///
/// 08006 when it stays away, saying that it was lost while `what`; or as the work says.
pub(crate) async fn watching<T>(
    peers: &Peers,
    node: NodeId,
    moment: Duration,
    what: &str,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let is_there = |view: &Arc<View>| has_server(view, node);
    tokio::select! {
        // What the work itself has come to counts, whatever else has become known.
        biased;
        outcome = work => outcome,
        () = stays_away(peers.cluster().subscribe(), is_there, || sleep(moment)) => {
            let message = format!("the server beside node {node} was lost while {what}");
            Err(PgError::new(SqlState::CONNECTION_FAILURE, message).into())
        }
    }
}

/// Whether `node` answers now.
pub(crate) fn has_node(view: &View, node: NodeId) -> bool {
    view.node(node).is_some_and(|known| known.reachable)
}

/// Whether the server beside `node` answers now.
pub(crate) fn has_server(view: &View, node: NodeId) -> bool {
    view.node(node).is_some_and(|known| known.reachable && known.info.server_state().is_some())
}

/// Why the server beside `node` may not be read any more, if the statement keeps away from what it has come to be: a
/// standby that was promoted, say. Its founders outlive that, and would be read on.
pub(crate) fn withdrawn(view: &View, rules: &Rules, node: NodeId) -> Option<PgError> {
    let known = view.node(node).filter(|known| known.reachable)?;
    let role = view.role(&known.info);
    let reason = rules.withdraw(role, &known.info.locality)?;
    let message = format!("the server beside node {node} may not be read any more");
    let error = PgError::new(SqlState::CONNECTION_FAILURE, message);
    Some(error.detail(format!("Its role is now \"{role}\", and {reason}.")))
}

/// Returns why the server beside `node` may not be read any more, as soon as that is so.
pub(crate) async fn withdrawal(peers: &Peers, rules: &Rules, node: NodeId) -> PgError {
    let mut views = peers.cluster().subscribe();
    loop {
        let why = withdrawn(&views.borrow_and_update(), rules, node);
        if let Some(why) = why {
            return why;
        }
        if views.changed().await.is_err() {
            // There is nothing more to be seen.
            return pending().await;
        }
    }
}

/// Returns when it has not been there for a whole `moment` without a break, or when there is nothing more to be seen.
async fn stays_away<V, M: Future<Output = ()>>(
    mut views: watch::Receiver<V>,
    is_there: impl Fn(&V) -> bool,
    moment: impl Fn() -> M,
) {
    loop {
        if views.wait_for(|view| !is_there(view)).await.is_err() {
            return;
        }
        tokio::select! {
            back = views.wait_for(|view| is_there(view)) => if back.is_err() { return },
            () = moment() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use tokio::sync::Notify;

    use super::*;

    /// Plays what is seen, with `over` where a moment is; gives whether it was given up then, and how many moments were
    /// begun.
    async fn played(steps: &str) -> (bool, u32) {
        let (sender, views) = watch::channel(true);
        let (over, begun) = (Notify::new(), Cell::new(0));
        let moment = || {
            begun.set(begun.get() + 1);
            over.notified()
        };
        let mut watched = pin!(stays_away(views, |is_there| *is_there, moment));
        let mut sender = Some(sender);
        let mut is_given_up = false;
        for step in steps.split(' ') {
            match step {
                "over" => over.notify_waiters(),
                "end" => drop(sender.take()),
                seen => drop(sender.as_ref().unwrap().send_replace(seen == "there")),
            }
            assert!(!is_given_up, "{steps}");
            is_given_up = poll_fn(|context| Poll::Ready(watched.as_mut().poll(context).is_ready())).await;
        }
        (is_given_up, begun.get())
    }

    #[tokio::test]
    async fn only_what_stays_away_is_given_up() {
        for (steps, expected) in [
            ("there over over", (false, 0)),
            ("away", (false, 1)),
            ("away over", (true, 1)),
            ("away there over over", (false, 1)),
            // A moment, and another: they do not add up, and each is a whole one.
            ("away there away there", (false, 2)),
            ("away there away over", (true, 2)),
            // Further news of the same does not begin it anew.
            ("away away away over", (true, 1)),
            // Whoever sees nothing any more does not wait.
            ("end", (true, 0)),
            ("away end", (true, 1)),
        ] {
            assert_eq!(played(steps).await, expected, "{steps}");
        }
    }
}
