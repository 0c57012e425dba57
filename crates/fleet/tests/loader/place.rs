//! A server with a loader, and a backup to be restored there.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cluster::service::{Reply, Upload};
use fleet::Server;
use fleet::founders::{self, DatabasePlan, Founders, Open, Opened, PointLimits, SpanRequest, What};
use fleet::loader::{Create, Created, Finish, JobDatabase, Load, Loaded, Loader, Publish, RESTORE_ROLE, Request};
use fleet::private::{Installation, Instance, RunAs};
use futures_util::StreamExt as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgerror::PgError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tokio::time::timeout;
use uuid::Uuid;

/// A primary with the database `shop`, and a role `svc` that may restore.
pub(crate) struct Place {
    instance: Instance,
    pub(crate) dir: TempDir,
}

impl Place {
    pub(crate) async fn start(setup: &str) -> Self {
        Self::speaking("UTF8", "C.UTF-8", setup).await
    }

    /// The same with another encoding and locale.
    pub(crate) async fn speaking(encoding: &'static str, locale: &'static str, setup: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let data = dir.path().join("primary");
        std::fs::create_dir_all(&data).unwrap();
        let instance = Instance::new(Installation::find().unwrap(), RunAs::choose().unwrap(), &data).unwrap();
        let mut instance = instance.speaking(encoding, locale);
        instance.init("root", &vec![("autovacuum".to_owned(), "off".to_owned())]).unwrap();
        instance.start("root", &dir.path().join("log")).await.unwrap();
        let place = Self { instance, dir };
        for statement in ["CREATE DATABASE shop", "CREATE ROLE svc LOGIN", "CREATE ROLE nobody LOGIN"] {
            place.run("postgres", statement).await;
        }
        place
            .run("postgres", &format!("CREATE ROLE {RESTORE_ROLE} SUPERUSER NOLOGIN; GRANT {RESTORE_ROLE} TO svc"))
            .await;
        place.run("shop", setup).await;
        place
    }

    /// Starts it again in recovery, as one that follows another.
    pub(crate) async fn become_standby(&mut self) {
        let child = self.instance.child().unwrap();
        kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGINT).unwrap();
        child.wait().await.unwrap();
        std::fs::write(self.instance.data().join("standby.signal"), "").unwrap();
        self.instance.start("root", &self.dir.path().join("log")).await.unwrap();
    }

    pub(crate) fn server(&self, role: &str) -> Server {
        self.instance.server(role).unwrap()
    }

    pub(crate) fn loader(&self) -> Arc<Loader> {
        Loader::new(self.server("svc"))
    }

    pub(crate) async fn run(&self, database: &str, statements: &str) {
        let (client, _connection) = self.server("root").session_in(database).await.unwrap();
        client.batch_execute(statements).await.unwrap();
    }

    /// The first column of all rows.
    pub(crate) async fn ask(&self, database: &str, query: &str) -> Vec<String> {
        let (client, _connection) = self.server("root").session_in(database).await.unwrap();
        let messages = client.simple_query(query).await.unwrap();
        let text = |message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
            _ => None,
        };
        messages.into_iter().filter_map(text).collect()
    }

    pub(crate) fn dump(&self, database: &str) -> String {
        let program = Installation::find().unwrap().program("pg_dump");
        let conninfo = format!("{} dbname={database}", self.instance.conninfo("root"));
        let arguments = ["--schema-only", "--create", "--restrict-key=x", "--dbname", &conninfo];
        let output = std::process::Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let child = self.instance.child().unwrap();
        kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGQUIT).unwrap();
        while child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What a backup of `shop` holds.
pub(crate) struct Backup {
    pub(crate) plan: DatabasePlan,
    pub(crate) schema: Bytes,
    pub(crate) spans: Vec<(Loaded, Bytes)>,
}

impl Backup {
    pub(crate) async fn of(place: &Place) -> Self {
        let (founders, lease) = (Founders::new(place.server("root")), Uuid::new_v4());
        let databases = vec!["shop".to_owned()];
        let open = Open {
            lease,
            job: 1,
            databases,
            readers: 1,
            voting: false,
            life_ms: 60_000,
            pause: None,
            limits: PointLimits::default(),
        };
        let mut opened: Opened = answer(&founders, &founders::Request::Open(open)).await.unwrap();
        let plan = opened.databases.remove(0);
        let database = plan.name.clone();
        let schema = download(&founders, &founders::Request::Schema { lease, database: database.clone() }).await;
        let mut spans = Vec::new();
        let tables = plan.tables.iter().map(|table| {
            let (schema, name, columns) = (table.schema.clone(), table.name.clone(), table.columns.clone());
            let what = What::Table { oid: table.oid, from_block: 0, to_block: None };
            (what, Loaded::Table { schema, name, columns })
        });
        let objects = [(What::LargeObjects, Loaded::LargeObjects), (What::LargeObjectData, Loaded::LargeObjectData)];
        for (what, loaded) in tables.chain(objects) {
            let request = SpanRequest { lease, database: database.clone(), what };
            spans.push((loaded, download(&founders, &founders::Request::Span(request)).await));
        }
        Self { plan, schema, spans }
    }

    pub(crate) fn create(&self, job: impl Into<JobDatabase> + Copy, target: &str) -> Request {
        self.create_by(1, job, target)
    }

    pub(crate) fn create_by(&self, run: i64, job: impl Into<JobDatabase> + Copy, target: &str) -> Request {
        Request::Create(Box::new(Create { job: job.into(), run, target: target.to_owned(), plan: self.plan.clone() }))
    }

    pub(crate) fn finish(&self, job: impl Into<JobDatabase> + Copy, database_oid: u32, target: &str) -> Request {
        self.finish_by(1, job, database_oid, target)
    }

    pub(crate) fn finish_by(
        &self,
        run: i64,
        job: impl Into<JobDatabase> + Copy,
        database_oid: u32,
        target: &str,
    ) -> Request {
        let (target, plan) = (target.to_owned(), self.plan.clone());
        let rows = self.spans.iter().filter_map(|(loaded, bytes)| {
            let Loaded::Table { schema, name, .. } = loaded else { return None };
            let rows = bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
            Some((schema.clone(), name.clone(), rows))
        });
        Request::Finish(Box::new(Finish { job: job.into(), database_oid, run, target, plan, rows: rows.collect() }))
    }

    pub(crate) fn publish(
        &self,
        run: i64,
        job: impl Into<JobDatabase> + Copy,
        database_oid: u32,
        target: &str,
    ) -> Box<Publish> {
        Box::new(Publish { job: job.into(), database_oid, run, target: target.to_owned(), plan: self.plan.clone() })
    }

    /// From loaded rows to the user's database.
    pub(crate) async fn end(
        &self,
        loader: &Arc<Loader>,
        job: impl Into<JobDatabase> + Copy,
        database_oid: u32,
        target: &str,
    ) -> anyhow::Result<()> {
        answer::<_, ()>(loader, &self.finish(job, database_oid, target)).await?;
        let publish = || self.publish(1, job, database_oid, target);
        answer::<_, ()>(loader, &Request::Publish(publish())).await?;
        answer(loader, &Request::Release(publish())).await
    }

    pub(crate) fn load(&self, job: impl Into<JobDatabase> + Copy, database_oid: u32, span: usize) -> Request {
        self.load_by(1, job, database_oid, span)
    }

    pub(crate) fn load_by(
        &self,
        run: i64,
        job: impl Into<JobDatabase> + Copy,
        database_oid: u32,
        span: usize,
    ) -> Request {
        let (what, encoding) = (self.spans[span].0.clone(), self.plan.copy_encoding.clone());
        Request::Load(Load { job: job.into(), database_oid, run, span: span as u32, what, encoding })
    }

    /// Creates the database and loads all of it but `but`.
    pub(crate) async fn load_all(
        &self,
        loader: &Arc<Loader>,
        job: impl Into<JobDatabase> + Copy,
        target: &str,
        but: Option<usize>,
    ) -> u32 {
        let created: Created = answer(loader, &self.create(job, target)).await.unwrap();
        send(loader, &Request::PreData { job: job.into(), database_oid: created.oid, run: 1 }, &self.schema)
            .await
            .unwrap();
        for (span, (_, bytes)) in self.spans.iter().enumerate().filter(|(span, _)| Some(*span) != but) {
            send(loader, &self.load(job, created.oid, span), bytes).await.unwrap();
        }
        created.oid
    }
}

pub(crate) async fn call<S: cluster::service::Service>(
    service: &Arc<S>,
    request: &impl Serialize,
) -> anyhow::Result<Reply> {
    timeout(Duration::from_secs(60), service.call(serde_json::to_value(request).unwrap())).await.unwrap()
}

pub(crate) async fn answer<S, T>(service: &Arc<S>, request: &impl Serialize) -> anyhow::Result<T>
where
    S: cluster::service::Service,
    T: DeserializeOwned,
{
    let Reply::Answer(value) = call(service, request).await? else { panic!("not an answer") };
    Ok(serde_json::from_value(value).unwrap())
}

pub(crate) async fn download(founders: &Arc<Founders>, request: &founders::Request) -> Bytes {
    let Reply::Download(mut stream) = call(founders, request).await.unwrap() else { panic!("not a download") };
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece.unwrap());
    }
    bytes.into()
}

pub(crate) async fn upload(loader: &Arc<Loader>, request: &Request) -> anyhow::Result<Box<dyn Upload>> {
    let Reply::Upload(upload) = call(loader, request).await? else { panic!("not an upload") };
    Ok(upload)
}

pub(crate) async fn send(loader: &Arc<Loader>, request: &Request, bytes: &Bytes) -> anyhow::Result<()> {
    let mut upload = upload(loader, request).await?;
    for piece in bytes.chunks(1000) {
        upload.write(Bytes::copy_from_slice(piece)).await?;
    }
    upload.finish().await
}

pub(crate) fn said<T>(result: anyhow::Result<T>) -> PgError {
    let Err(error) = result else { panic!("this is refused") };
    PgError::of(&error).unwrap_or_else(|| panic!("{error:#}")).clone()
}

/// Removes a job's database through a node that remembers nothing.
pub(crate) async fn removed(place: &Place, job: impl Into<JobDatabase> + Copy) {
    answer::<_, ()>(&place.loader(), &Request::Drop { job: job.into(), run: 1 }).await.unwrap();
}

/// Makes a directory in which the server can write.
pub(crate) fn give(directory: &Path) {
    std::fs::create_dir_all(directory).unwrap();
    if nix::unistd::Uid::effective().is_root() {
        let given = std::process::Command::new("chown").arg("postgres").arg(directory).status().unwrap();
        assert!(given.success());
    }
}

pub(crate) const OURS: &str = "SELECT 1 FROM pg_database WHERE datname ~ '^_backhaul'";
