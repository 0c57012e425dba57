//! From a statement to a job: everything that can be wrong is found here, before anything exists.
//!
//! The order is CockroachDB's: the filter's text, then the targets, then the rights, then the URI, then whether any
//! live node matches; the job's row comes last. No store is touched while planning, because the gateway may be a node
//! that must not.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use cluster::{Filter, PeerSession, Peers, Purpose, said_by_server, spoken};
use jobs::{Birth, Job, JobId, Jobs, NewJob, Retryable, Taken};
use pgerror::{PgError, SqlState};
use serde_json::Value;
use sql::{Backup, Statement, Text};
use storage::{Connections, Seal, Uri};
use tokio::time::timeout;

use crate::layout;
use crate::point::{leaseholder, readable};
use crate::resume::{JOB_TYPE, Payload};
use crate::rules::{Replicas, Rules, modes};
use crate::settings::{OnRelocation, Settings};
use crate::targets::{Targets, remark};

/// Gives the fleet's seal. Asked for at each use, because the cluster secret may come, or be replaced, at any time.
pub type SealSource = Arc<dyn Fn() -> anyhow::Result<Seal> + Send + Sync>;

/// Who asks, as PostgreSQL knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The current role of the client's session.
    pub user: String,
    /// Whether that role is a superuser.
    pub superuser: bool,
    /// The session's `statement_timeout`.
    pub statement_timeout: Option<Duration>,
    /// The session's database.
    pub database: String,
    /// The schemas in which an unqualified name is looked for, in order.
    pub search_path: Vec<String>,
    /// The session's own settings of ours.
    pub settings: Settings,
}

/// Is told of the job that a client begins to wait for.
pub type OnWait<'w> = &'w (dyn Fn(JobId) + Send + Sync);

/// What became of a BACKUP statement.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// DETACHED: the job has been made.
    Detached {
        /// The job.
        id: JobId,
        /// What the client should know beside: shards that are not in the backup.
        notices: Vec<String>,
    },
    /// The job has come to its end here.
    Finished(Finished),
}

/// The result row of an attached BACKUP.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The job.
    pub id: JobId,
    /// `succeeded`.
    pub status: String,
    /// 1.
    pub fraction_completed: f64,
    /// Rows of all tables.
    pub rows: i64,
    /// 0: PostgreSQL builds indexes anew.
    pub index_entries: i64,
    /// Bytes of the rows, before compression.
    pub bytes: i64,
    /// What the client should know beside: shards and objects that are not in the backup.
    pub notices: Vec<String>,
}

/// A statement that nothing is wrong with.
pub(crate) struct Judged {
    pub(crate) rules: Rules,
    pausepoints: Vec<String>,
    id: JobId,
    created: DateTime<Utc>,
    /// The shards that hold any of the databases, and those that do not, or cannot be reached.
    pub(crate) targets: Targets,
    shown: String,
    resolved: Uri,
}

/// Plans backups and makes their jobs.
#[derive(Clone)]
pub struct Backups {
    /// Other nodes, and the way to leaseholders.
    pub peers: Peers,
    /// Where jobs are made.
    pub jobs: Jobs,
    /// Hides URIs from whoever reads the registry.
    pub seal: SealSource,
}

impl Backups {
    /// Runs a BACKUP statement for `requester`. The job of a detached one is there when its birth says so; an attached
    /// one is waited for, so its job is there at once.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the statement, before a job exists; for an attached one the relocation
    /// (`execution of job … relocated to …`), or the reason for which the job failed.
    pub async fn run(
        &self,
        statement: &Backup,
        requester: &Requester,
        birth: &Birth,
        on_wait: OnWait<'_>,
    ) -> anyhow::Result<Outcome> {
        self.jobs.settings().await?.check_feature("backup", "BACKUP")?;
        for _ in 0..PLANS_MAX {
            let (new, notices) = in_time(Box::pin(self.plan(statement, requester))).await?;
            match self.start(&new, statement.options.detached.then_some(birth), requester, on_wait).await {
                // Planned again it has a later moment, and another directory.
                Err(error) if error.downcast_ref::<Taken>().is_some() => {}
                Ok(Outcome::Detached { id, .. }) => return Ok(Outcome::Detached { id, notices }),
                Err(error) => return Err(noticed(error, &notices)),
                finished => return finished,
            }
        }
        let message = "too many backups are begun at the same moment";
        Err(PgError::new(SqlState::OBJECT_IN_USE, message).hint("Try again.").into())
    }

    /// What is wrong with a BACKUP or a RESTORE before anything is asked about its transaction: that its feature is
    /// switched off, or its filter is none.
    ///
    /// # Errors
    ///
    /// These two, in this order. While the registry cannot be read nothing is known of features, and that is no error.
    pub async fn check_first(&self, statement: &Statement) -> anyhow::Result<()> {
        let (feature, locality) = match statement {
            Statement::Backup(backup) => ("backup", &backup.options.execution_locality),
            Statement::Restore(restore) => ("restore", &restore.options.execution_locality),
            _ => return Ok(()),
        };
        if let Ok(settings) = self.jobs.settings().await {
            settings.check_feature(feature, statement.tag())?;
        }
        filter_of(locality.as_ref()).map(drop)
    }

    /// Makes the job, and, unless the client wants its id only (`detached`), waits for its end.
    pub(crate) async fn start(
        &self,
        new: &NewJob,
        detached: Option<&Birth>,
        requester: &Requester,
        on_wait: OnWait<'_>,
    ) -> anyhow::Result<Outcome> {
        let on_relocation = requester.settings.on_relocation()?;
        if let Some(birth) = detached {
            self.jobs.create(new, birth).await?;
            return Ok(Outcome::Detached { id: new.id, notices: Vec::new() });
        }
        on_wait(new.id);
        let job = match on_relocation {
            OnRelocation::Error => self.jobs.run_attached(new).await?,
            OnRelocation::Wait => self.jobs.run_followed(new).await?,
        };
        finished(job).map(Outcome::Finished)
    }

    /// The fleet's external connections.
    ///
    /// # Errors
    ///
    /// The cluster secret cannot be read.
    pub fn connections(&self) -> anyhow::Result<Connections> {
        Ok(Connections::new((self.seal)()?))
    }

    /// Judges everything about a statement that does not depend on which nodes and servers are fit now.
    pub(crate) async fn judge(&self, statement: &Backup, requester: &Requester) -> anyhow::Result<Judged> {
        let mut rules = rules_of(statement, requester)?;
        let pausepoints = requester.pausepoints()?;
        // Whoever cannot make a job need not plan one.
        let id = self.jobs.new_id().await?;
        rules.lag_limit = self.jobs.settings().await?.holding().lag;
        let created = Utc::now();
        let targets = self.targets(&statement.targets, statement.options.skip_unreachable_shards, requester).await?;
        let uri = Uri::parse(literal(&statement.into)?)?;
        let resolved = self.resolve(&uri, requester).await?;
        Ok(Judged { rules, pausepoints, id, created, targets, shown: uri.redacted(), resolved })
    }

    /// The job, and what its client should know.
    async fn plan(&self, statement: &Backup, requester: &Requester) -> anyhow::Result<(NewJob, Vec<String>)> {
        let Judged { rules, pausepoints, id, created, targets, shown, resolved } =
            self.judge(statement, requester).await?;
        if let Some(failure) = targets.failure().filter(|_| !statement.options.skip_unreachable_shards) {
            return Err(failure.into());
        }
        let (skipped_shards, skipped, shards) = (targets.skipped(), targets.left_out, targets.shards);
        self.jobs.check_filter(&rules.filter).await?;
        let view = self.peers.cluster().view();
        let limits = self.jobs.settings().await?.holding();
        for shard in shards.keys() {
            let (fleet, decision) = readable(&view, shard, &rules)?;
            modes(&fleet, &decision.first(), rules.standby_mode, &limits)?;
        }
        let subdir = layout::subdir(created);
        let description = format!("{}{}", statement.description(&subdir, &shown), remark(&skipped_shards));
        let notices = skipped_shards.iter().chain(&skipped).map(crate::manifest::left_out).collect();
        let full_cluster = statement.targets == sql::Targets::Cluster;
        let databases = match full_cluster {
            true => shards.values().flatten().collect::<BTreeSet<_>>().into_iter().cloned().collect(),
            false => statement.targets.databases().to_vec(),
        };
        let payload = Payload {
            databases,
            full_cluster,
            filter: rules.filter.to_string(),
            strict: rules.strict,
            replicas: rules.replicas,
            balanced: rules.balanced,
            standby_mode: rules.standby_mode,
            subdir,
            created,
            description: description.clone(),
            shards: shards.clone(),
            skipped_shards,
            skipped,
        };
        let new = NewJob {
            id,
            job_type: JOB_TYPE.to_owned(),
            description,
            statement: statement.redacted(&shown),
            user: requester.user.clone(),
            filter: rules.filter,
            prefers: shards.into_keys().collect(),
            payload: serde_json::to_value(&payload)?,
            sealed: Some((self.seal)()?.seal(&resolved.exposed())?),
            exclusive: Some(payload.subdir),
            pausepoints,
        };
        Ok((new, notices))
    }

    /// Every shard that ever joined, and those that are led: a new one is listed a moment after it is there.
    pub(crate) async fn shards(&self) -> anyhow::Result<Vec<String>> {
        let rows =
            self.jobs.ledger().query("SELECT name FROM registry.shards", &[]).await.context("list the shards")?;
        let mut shards: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
        shards.extend(self.peers.cluster().view().led().map(str::to_owned));
        Ok(shards.into_iter().collect())
    }

    /// A user may back up what they may read: CockroachDB's rules of before the BACKUP privilege.
    pub(crate) async fn check_rights(&self, shard: &str, database: &str, requester: &Requester) -> anyhow::Result<()> {
        let session = leaseholder_session(&self.peers, shard, database).await?;
        let user = requester.user.as_str();
        // A superuser of the gateway's shard need not be one of another.
        let role = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = $1";
        match session.query_opt(role, &[&user]).await.map_err(spoken).context("look for the user")? {
            Some(row) if row.get::<_, bool>(0) => return Ok(()),
            Some(_) => {}
            None => {
                let message = format!("role \"{user}\" does not exist in shard \"{shard}\"");
                return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).into());
            }
        }
        let objects = "
            SELECT m.oid::text FROM pg_catalog.pg_largeobject_metadata m, pg_catalog.pg_roles r
            WHERE r.rolname = $1 AND NOT pg_catalog.pg_has_role(r.oid, m.lomowner, 'USAGE')
              AND NOT EXISTS (SELECT FROM pg_catalog.aclexplode(m.lomacl) a WHERE a.privilege_type = 'SELECT'
                              AND (a.grantee = 0 OR pg_catalog.pg_has_role(r.oid, a.grantee, 'USAGE')))
            LIMIT 1";
        let object = session.query_opt(objects, &[&user]).await.map_err(spoken).context("check large objects")?;
        let query = "
            SELECT CASE n.nspname WHEN 'public' THEN pg_catalog.quote_ident(c.relname)
                   ELSE pg_catalog.format('%I.%I', n.nspname, c.relname) END,
                   pg_catalog.has_table_privilege(r.oid, c.oid, 'SELECT')
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, pg_catalog.pg_roles r
            WHERE r.rolname = $1 AND c.relkind IN ('r', 'p', 'm', 'S') AND c.relpersistence <> 't'
              AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg_toast%'
              AND (NOT pg_catalog.has_table_privilege(r.oid, c.oid, 'SELECT')
                   OR c.relrowsecurity AND NOT r.rolbypassrls AND NOT pg_catalog.pg_has_role(r.oid, c.relowner, 'USAGE'))
            ORDER BY 1 LIMIT 1";
        let connect = "SELECT pg_catalog.has_database_privilege($1, pg_catalog.current_database(), 'CONNECT')";
        let may_connect: bool = session.query_one(connect, &[&user]).await.map_err(spoken)?.get(0);
        let denied = session.query_opt(query, &[&user]).await.map_err(spoken).context("check the user's rights")?;
        let denied = denied.map(|row| (row.get::<_, String>(0), row.get::<_, bool>(1)));
        let (privilege, object) = match (may_connect, denied) {
            (false, _) => ("CONNECT", format!("database {database}")),
            (true, Some((relation, false))) => ("SELECT", format!("relation {relation}")),
            (true, Some((relation, true))) => ("BYPASSRLS", format!("relation {relation}")),
            (true, None) => match object {
                Some(row) => ("SELECT", format!("large object {}", row.get::<_, String>(0))),
                None => return Ok(()),
            },
        };
        let message = format!("user {user} does not have {privilege} privilege on {object}");
        Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
            .hint("A backup holds every row of the database, so its user has to be able to read every row.")
            .into())
    }

    /// The store behind the URI, if the requester may use it.
    pub(crate) async fn resolve(&self, uri: &Uri, requester: &Requester) -> anyhow::Result<Uri> {
        let resolved = match uri.connection() {
            None => uri.clone(),
            Some(name) => {
                let session = self.jobs.ledger().session().await?;
                let connections = self.connections()?;
                for listed in &connections.list(&session, Some(name)).await? {
                    self.check_privilege("USAGE", listed, requester).await?;
                }
                return connections.resolve(&session, uri).await;
            }
        };
        check_use(&resolved, requester)?;
        self.check_node(&resolved)?;
        Ok(resolved)
    }

    fn check_node(&self, uri: &Uri) -> anyhow::Result<()> {
        let Some(node) = uri.node() else { return Ok(()) };
        match self.peers.cluster().view().node(node) {
            Some(_) => Ok(()),
            None => {
                Err(PgError::new(SqlState::UNDEFINED_FILE, format!("node {node} of {} is not known", uri.redacted()))
                    .hint("SHOW NODES lists the nodes.")
                    .into())
            }
        }
    }
}

/// What reaches a node's own files, or a store with the node's own credentials, is for superusers.
///
/// # Errors
///
/// 42501, CockroachDB's text.
pub(crate) fn check_use(uri: &Uri, requester: &Requester) -> Result<(), PgError> {
    if requester.superuser || !uri.uses_rights_of_the_node() {
        return Ok(());
    }
    let scheme = uri.scheme();
    let message = format!(
        "only users with the admin role or the EXTERNALIOIMPLICITACCESS system privilege are allowed to access the \
         specified {scheme} URI"
    );
    Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
        .hint("Ask a superuser to make an external connection, and use external://name."))
}

/// A backup's directory is named for its moment. If another one has it, the next moment is taken, so often.
const PLANS_MAX: u32 = 20;

/// A plan that takes longer is given up: a server that froze keeps its connections open.
const PLAN_DEADLINE: Duration = Duration::from_secs(60);

/// Ends a plan that does not come to its end.
///
/// # Errors
///
/// As the plan; 08006 when it takes too long.
pub(crate) async fn in_time<T>(plan: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(PLAN_DEADLINE, plan).await.unwrap_or_else(|_| {
        let message = format!("the statement could not be planned within {} seconds", PLAN_DEADLINE.as_secs());
        Err(PgError::new(SqlState::CONNECTION_FAILURE, message)
            .detail("A server that has to be asked does not answer.")
            .hint("SHOW NODES tells which nodes and servers are there.")
            .into())
    })
}

/// A session on the leaseholder of `shard`.
///
/// # Errors
///
/// 08006 naming the shard where it does not answer; where it refuses, the server's code and words.
pub(crate) async fn leaseholder_session(peers: &Peers, shard: &str, database: &str) -> anyhow::Result<PeerSession> {
    let view = peers.cluster().view();
    // The error for a shard without one names it.
    leaseholder(&view, shard)?;
    let leader = view.leader(shard).context("find the leaseholder")?;
    let purpose = Purpose::Server { database: database.to_owned() };
    peers.dialer().dial(&leader.address, &purpose).await.map_err(|error| {
        tracing::info!("{error:#}");
        let refusal = no_session(shard, database, said_by_server(&error));
        match refusal.code {
            // A job may find room later.
            SqlState::TOO_MANY_CONNECTIONS => anyhow::Error::new(refusal).context(Retryable),
            _ => refusal.into(),
        }
    })
}

/// That there is no session on the leaseholder of `shard`. One that says nothing, or that it is about to go or to come,
/// cannot be reached; whatever else it says is its answer, and a shard that answers is not left out of a backup.
fn no_session(shard: &str, database: &str, answer: Option<PgError>) -> PgError {
    let unreached = || PgError::new(SqlState::CONNECTION_FAILURE, format!("shard \"{shard}\" cannot be reached"));
    let Some(answer) = answer else { return unreached().detail("Its leaseholder does not answer.") };
    let (code, words) = (answer.code, answer.message.trim_end_matches('.'));
    if code == SqlState::CONNECTION_FAILURE || code.as_str().starts_with("57P0") {
        return unreached().detail(format!("Its leaseholder says: {words}."));
    }
    let more = answer.detail.map(|detail| format!(" {detail}")).unwrap_or_default();
    let message = format!("shard \"{shard}\" refuses a session in database \"{database}\"");
    let mut refusal = PgError::new(code, message).detail(format!("Its leaseholder says: {words}.{more}"));
    refusal.hint = answer.hint;
    refusal
}

pub(crate) fn literal(text: &Text) -> anyhow::Result<&str> {
    text.literal().context("run a statement whose parameters are bound")
}

pub(crate) fn filter_of(option: Option<&Text>) -> anyhow::Result<Filter> {
    let Some(text) = option else { return Ok(Filter::default()) };
    let parsed = literal(text)?.parse::<Filter>();
    Ok(parsed.map_err(|error| PgError::new(SqlState::UNCATEGORIZED, error.to_string()))?)
}

fn rules_of(statement: &Backup, requester: &Requester) -> anyhow::Result<Rules> {
    let options = &statement.options;
    Ok(Rules {
        filter: filter_of(options.execution_locality.as_ref())?,
        strict: options.strict,
        replicas: match &options.replica {
            Some(which) => Replicas::parse(literal(which)?)?,
            None => Replicas::Any,
        },
        balanced: requester.settings.balanced()?,
        standby_mode: requester.settings.standby_mode()?,
        ..Rules::default()
    })
}

/// An error that ends a statement whose job is there, with what the job's client should know.
fn noticed(mut error: anyhow::Error, notices: &[String]) -> anyhow::Error {
    if let Some(said) = error.downcast_mut::<PgError>().filter(|_| !notices.is_empty()) {
        let before = said.detail.take().map(|detail| format!("{detail} ")).unwrap_or_default();
        said.detail = Some(format!("{before}Note: {}.", notices.join("; ")));
    }
    error
}

fn finished(job: Job) -> anyhow::Result<Finished> {
    let count =
        |name: &str| job.result.as_ref().and_then(|result| result.get(name)).and_then(Value::as_i64).unwrap_or(0);
    if job.status != "succeeded" {
        return Err(job.failure().into());
    }
    let left_out = job.result.as_ref().and_then(|result| result.get("left_out")).and_then(Value::as_array);
    let note = job.result.as_ref().and_then(|result| result.get("note"));
    let notices = left_out.into_iter().flatten().chain(note).filter_map(Value::as_str).map(str::to_owned).collect();
    Ok(Finished {
        id: job.id,
        status: job.status.clone(),
        fraction_completed: job.fraction_completed,
        rows: count("rows"),
        index_entries: count("index_entries"),
        bytes: count("bytes"),
        notices,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_answers_is_not_taken_for_one_that_cannot_be_reached() {
        let unreached = |detail: &str| ("08006", "shard \"s2\" cannot be reached".to_owned(), detail.to_owned());
        let refused = |code: &'static str, detail: &str| {
            (code, "shard \"s2\" refuses a session in database \"db\"".to_owned(), detail.to_owned())
        };
        for (answer, expected) in [
            (None, unreached("Its leaseholder does not answer.")),
            (Some(("57P01", "going", None)), unreached("Its leaseholder says: going.")),
            (Some(("57P02", "crashed", None)), unreached("Its leaseholder says: crashed.")),
            (Some(("57P03", "starting up", None)), unreached("Its leaseholder says: starting up.")),
            (Some(("08006", "lost", None)), unreached("Its leaseholder says: lost.")),
            (Some(("53300", "too many", None)), refused("53300", "Its leaseholder says: too many.")),
            (
                Some(("42501", "permission denied", Some("User lacks CONNECT."))),
                refused("42501", "Its leaseholder says: permission denied. User lacks CONNECT."),
            ),
            (Some(("28000", "no entry", None)), refused("28000", "Its leaseholder says: no entry.")),
            (Some(("28P01", "no secret", None)), refused("28P01", "Its leaseholder says: no secret.")),
            (Some(("3D000", "it is gone", None)), refused("3D000", "Its leaseholder says: it is gone.")),
            (Some(("XX000", "internal error", None)), refused("XX000", "Its leaseholder says: internal error.")),
        ] {
            let answer = answer.map(|(code, words, detail)| {
                let said = PgError::new(SqlState::parse(code).unwrap(), words).hint("Look.");
                detail.map_or_else(|| said.clone(), |detail: &str| said.clone().detail(detail))
            });
            let told = no_session("s2", "db", answer);
            // What the server advises stays with what it says.
            assert_eq!(told.hint.is_some(), expected.0 != "08006", "{told:?}");
            assert_eq!((told.code.as_str(), told.message, told.detail.unwrap()), expected);
        }
    }
}
