//! The loader: what makes a database of a backup again.
//!
//! The node beside a shard's primary does it, for whoever runs a restore. It makes a database under a name of the
//! job's own (`create`), restores the first section of the schema (`schema`), takes rows span by span from many senders
//! (`load`), builds all the rest (`finish`, `post_data`, `views`) and at last gives the database its name and then to its
//! user (`publish`). Until then no user knows it, and it can be removed without a trace (`remove`).
//!
//! What has been done is written in the database itself, in a schema that is gone at the end, in the transactions that
//! do it. The loader keeps nothing but the schema's file, which it can be sent again; so a coordinator, this node, or
//! the server may die at any time, and whoever comes next repeats the last step.

mod acting;
mod create;
mod finish;
mod found;
mod full;
mod holds;
mod job_database;
mod load;
mod pg_restore;
mod post_data;
mod publish;
mod remove;
mod schema;
mod toc;
mod turns;
mod types;
mod views;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cluster::service::{Boxed, Reply, Service};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use tokio::sync::Semaphore;

use self::acting::Acting;
pub use self::create::incomplete;
pub use self::job_database::JobDatabase;
pub(crate) use self::pg_restore::find as find_pg_restore;
pub use self::post_data::BUILDERS_MAX;
pub use self::publish::properties;
use self::turns::{Order, Turns};
pub use self::types::*;
use crate::Server;

/// Sessions that load rows at the same time; another span waits until one of them is free.
pub const LOADERS_MAX: usize = 8;

/// Schemas that are kept at the same time, each in a file; for one more the oldest is let go, and has to come again.
pub const SCHEMAS_MAX: usize = 8;

/// The loader of the server beside this node.
pub struct Loader {
    server: Server,
    sessions: Arc<Semaphore>,
    schemas: Mutex<VecDeque<(JobDatabase, Arc<File>)>>,
    turns: Turns,
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
            turns: Turns::default(),
            holds: holds::Holds::default(),
            me: me.clone(),
        })
    }

    async fn answer(&self, request: Value) -> anyhow::Result<Reply> {
        let request: Request = serde_json::from_value(request)
            .map_err(|_| PgError::new(SqlState::PROTOCOL_VIOLATION, "the request for the loader cannot be read"))?;
        let job = request.job();
        self.serve(request).await.map_err(|error| full::told(error, &self.server, job))
    }

    async fn serve(&self, request: Request) -> anyhow::Result<Reply> {
        let turn = self.turns.of(request.job());
        let null = Ok(Reply::Answer(Value::Null));
        match request {
            Request::Create(request) => {
                let order = Order(request.run, false);
                let _held = turn.hold(order).await?;
                let created = Box::pin(create::create(self, &request)).await?;
                turn.admit(order)?;
                Ok(Reply::Answer(serde_json::to_value(created)?))
            }
            Request::PreData { job, database_oid, run } => {
                turn.admit(Order(run, false))?;
                let Some(me) = self.me.upgrade() else { return Err(anyhow::anyhow!("the loader has ended")) };
                Ok(Reply::Upload(Box::new(schema::SchemaUpload::begin(me, job, database_oid, run).await?)))
            }
            Request::Load(load) => {
                turn.admit(Order(load.run, false))?;
                Ok(Reply::Upload(Box::new(load::begin(self, load).await?)))
            }
            Request::Finish(request) => {
                turn.take(Order(request.run, false), Box::pin(finish::finish(self, &request))).await?;
                null
            }
            Request::Publish(request) => {
                let outside = Acting::outside(&self.server, request.job).await?;
                turn.take(Order(request.run, false), publish::publish(&outside, &request)).await?;
                null
            }
            Request::Release(request) => {
                let outside = Acting::outside(&self.server, request.job).await?;
                turn.take(Order(request.run, false), publish::release(&outside, &request)).await?;
                null
            }
            Request::Drop { job, run } => {
                Box::pin(remove::remove(self, job, run)).await?;
                null
            }
            Request::Missing { job, plan } => {
                let outside = Acting::outside(&self.server, job).await?;
                Ok(Reply::Answer(serde_json::to_value(create::missing(&outside.session, &plan).await?)?))
            }
            Request::Progress { job } => Ok(Reply::Answer(serde_json::to_value(create::progress(self, job).await?)?)),
        }
    }

    fn keep_schema(&self, job: JobDatabase, file: Arc<File>) {
        let mut schemas = self.schemas.lock().unwrap_or_else(PoisonError::into_inner);
        schemas.retain(|(kept, _)| *kept != job);
        schemas.push_back((job, file));
        while schemas.len() > SCHEMAS_MAX {
            schemas.pop_front();
        }
    }

    fn schema(&self, job: JobDatabase) -> Option<Arc<File>> {
        let schemas = self.schemas.lock().unwrap_or_else(PoisonError::into_inner);
        schemas.iter().find(|(kept, _)| *kept == job).map(|(_, file)| file.clone())
    }

    fn forget_schema(&self, job: JobDatabase) {
        self.schemas.lock().unwrap_or_else(PoisonError::into_inner).retain(|(kept, _)| *kept != job);
    }
}

impl Service for Loader {
    fn call(&self, request: Value) -> Boxed<'_, Reply> {
        Box::pin(self.answer(request))
    }
}
