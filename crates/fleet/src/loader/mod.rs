//! The loader: what makes a database of a backup again.
//!
//! The node beside a shard's primary does it, for whoever runs a restore. It makes a database under a name of the
//! job's own (`create`), restores the first section of the schema (`schema`), takes rows span by span from many senders
//! (`load`), builds all the rest (`finish`, `views`) and at last gives the database its name (`publish`). Until then no
//! user knows it, and it can be removed without a trace.
//!
//! What has been done is written in the database itself, in a schema that is gone at the end, in the transactions that
//! do it. The loader keeps nothing but the schema's file, which it can be sent again; so a coordinator, this node, or
//! the server may die at any time, and whoever comes next repeats the last step.

mod acting;
mod create;
mod finish;
mod holds;
mod load;
mod publish;
mod schema;
mod types;
mod views;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use cluster::service::{Boxed, Reply, Service};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio::sync::{OwnedMutexGuard, Semaphore};
use tokio::time::timeout;

pub(crate) use self::schema::find as find_pg_restore;
pub use self::types::*;
use crate::Server;

/// Sessions that load rows at the same time; another span waits until one of them is free.
pub const LOADERS_MAX: usize = 8;

/// Schemas that are kept at the same time, each in a file; for one more the oldest is let go, and has to come again.
pub const SCHEMAS_MAX: usize = 8;

/// A job that somebody else works on for longer is not worked on by this request.
const TURN_WAIT: Duration = Duration::from_secs(600);

/// The loader of the server beside this node.
pub struct Loader {
    server: Server,
    sessions: Arc<Semaphore>,
    schemas: Mutex<VecDeque<(i64, Arc<File>)>>,
    turns: Mutex<HashMap<i64, Weak<tokio::sync::Mutex<()>>>>,
    holds: holds::Holds,
    me: Weak<Self>,
}

impl Loader {
    /// The loader of `server`.
    pub fn new(server: Server) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            server,
            sessions: Arc::new(Semaphore::new(LOADERS_MAX)),
            schemas: Mutex::default(),
            turns: Mutex::default(),
            holds: holds::Holds::default(),
            me: me.clone(),
        })
    }

    async fn answer(&self, request: Value) -> anyhow::Result<Reply> {
        let request: Request = serde_json::from_value(request)
            .map_err(|_| PgError::new(SqlState::PROTOCOL_VIOLATION, "the request for the loader cannot be read"))?;
        match request {
            Request::Create(request) => {
                let created = Box::pin(create::create(self, &request)).await?;
                Ok(Reply::Answer(serde_json::to_value(created)?))
            }
            Request::PreData { job, database_oid } => {
                let Some(me) = self.me.upgrade() else { return Err(anyhow::anyhow!("the loader has ended")) };
                Ok(Reply::Upload(Box::new(schema::SchemaUpload::begin(me, job, database_oid).await?)))
            }
            Request::Load(load) => Ok(Reply::Upload(Box::new(load::begin(self, load).await?))),
            Request::Finish(request) => {
                Box::pin(finish::finish(self, &request)).await?;
                Ok(Reply::Answer(Value::Null))
            }
            Request::Drop { job } => {
                Box::pin(create::remove(self, job)).await?;
                Ok(Reply::Answer(Value::Null))
            }
            Request::Progress { job } => Ok(Reply::Answer(serde_json::to_value(create::progress(self, job).await?)?)),
        }
    }

    /// Waits until nobody else on this node changes the job's database as a whole.
    async fn turn(&self, job: i64) -> anyhow::Result<OwnedMutexGuard<()>> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let turn = turns.get(&job).and_then(Weak::upgrade).unwrap_or_default();
            turns.insert(job, Arc::downgrade(&turn));
            turn
        };
        timeout(TURN_WAIT, turn.lock_owned()).await.map_err(|_| {
            let message = format!("the database of restore job {job} is being worked on by somebody else");
            PgError::new(SqlState::OBJECT_IN_USE, message).into()
        })
    }

    fn keep_schema(&self, job: i64, file: Arc<File>) {
        let mut schemas = self.schemas.lock().unwrap_or_else(PoisonError::into_inner);
        schemas.retain(|(kept, _)| *kept != job);
        schemas.push_back((job, file));
        while schemas.len() > SCHEMAS_MAX {
            schemas.pop_front();
        }
    }

    fn schema(&self, job: i64) -> Option<Arc<File>> {
        let schemas = self.schemas.lock().unwrap_or_else(PoisonError::into_inner);
        schemas.iter().find(|(kept, _)| *kept == job).map(|(_, file)| file.clone())
    }

    fn forget_schema(&self, job: i64) {
        self.schemas.lock().unwrap_or_else(PoisonError::into_inner).retain(|(kept, _)| *kept != job);
    }
}

impl Service for Loader {
    fn call(&self, request: Value) -> Boxed<'_, Reply> {
        Box::pin(self.answer(request))
    }
}
