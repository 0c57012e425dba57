//! Which session a cancel key belongs to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::route::Route;

/// A session that can be cancelled.
pub(crate) struct Cancelable {
    /// Where its server is.
    pub(crate) route: Route,
    /// The statement of ours that it waits for, if any.
    waiting: Mutex<Option<CancellationToken>>,
}

impl Cancelable {
    pub(crate) fn new(route: Route) -> Arc<Self> {
        Arc::new(Self { route, waiting: Mutex::new(None) })
    }

    /// A statement of ours begins; the token is cancelled when the client asks for it.
    pub(crate) fn begin(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        token
    }

    /// The statement of ours goes on, after a question to the server, which would have had to be cancelled there.
    pub(crate) fn go_on(&self, token: CancellationToken) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }

    /// The statement of ours has ended, or asks the server something.
    pub(crate) fn end(&self) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Cancels a statement of ours; false when none runs, and the server has to be asked.
    pub(crate) fn cancel(&self) -> bool {
        match &*self.waiting.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(token) => {
                token.cancel();
                true
            }
            None => false,
        }
    }
}

/// The keys of this gateway's sessions. They are the servers' own, process id and secret, passed on unchanged.
#[derive(Clone, Default)]
pub(crate) struct CancelKeys(Arc<Mutex<HashMap<Bytes, Arc<Cancelable>>>>);

/// A key in the table; dropping it takes the key out.
pub(crate) struct Registered {
    keys: CancelKeys,
    key: Bytes,
}

impl CancelKeys {
    pub(crate) fn register(&self, key: Bytes, session: Arc<Cancelable>) -> Registered {
        self.lock().insert(key.clone(), session);
        Registered { keys: self.clone(), key }
    }

    pub(crate) fn find(&self, key: &Bytes) -> Option<Arc<Cancelable>> {
        self.lock().get(key).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Bytes, Arc<Cancelable>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.keys.lock().remove(&self.key);
    }
}
