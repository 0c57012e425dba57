//! Who may use, remove and grant an external connection.
//!
//! Privileges stand in the registry by the names of roles; who is a member of what is PostgreSQL's to say. So only when a
//! user has nothing by their own name is the leaseholder of the gateway's shard asked, where that user logged in. A
//! superuser may do everything, as everywhere.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use cluster::spoken;
use pgerror::{PgError, SqlState};
use storage::Listed;
use tokio::time::timeout;

use crate::plan::{Backups, Requester, leaseholder_session};

/// A leaseholder that has not told by then whose member somebody is does not tell.
const ROLES_DEADLINE: Duration = Duration::from_secs(20);

/// The role that everybody is.
const PUBLIC: &str = "public";

impl Backups {
    /// Of these connections, those that the requester may use, remove, or owns.
    ///
    /// # Errors
    ///
    /// The leaseholder cannot be asked.
    pub async fn visible(&self, listed: Vec<Listed>, requester: &Requester) -> anyhow::Result<Vec<Listed>> {
        if requester.superuser {
            return Ok(listed);
        }
        let holders = listed.iter().flat_map(|one| one.users.iter().chain(&one.droppers)).cloned().collect();
        let roles = self.roles_of(requester, holders).await?;
        let sees = |one: &Listed| {
            one.owner == requester.user || one.users.iter().chain(&one.droppers).any(|role| roles.contains(role))
        };
        Ok(listed.into_iter().filter(sees).collect())
    }

    /// Refuses a requester without this privilege (`USAGE`, `DROP`) on a connection.
    ///
    /// # Errors
    ///
    /// 42501 in CockroachDB's words; the leaseholder cannot be asked.
    pub async fn check_privilege(&self, privilege: &str, on: &Listed, requester: &Requester) -> anyhow::Result<()> {
        let holders = if privilege == "DROP" { &on.droppers } else { &on.users };
        let holders = holders.iter().cloned().collect();
        if requester.superuser || !self.roles_of(requester, holders).await?.is_empty() {
            return Ok(());
        }
        let (user, name) = (&requester.user, &on.name);
        let message = format!("user {user} does not have {privilege} privilege on external_connection {name}");
        Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
            .hint(format!("Its owner and superusers give it with GRANT {privilege} ON EXTERNAL CONNECTION … TO …."))
            .into())
    }

    /// Refuses who may not give these privileges on a connection to others: anybody but superusers, and its owner as far
    /// as nobody has taken them away.
    ///
    /// # Errors
    ///
    /// 42501; the leaseholder cannot be asked.
    pub async fn check_grantor(&self, privileges: &[&str], on: &Listed, requester: &Requester) -> anyhow::Result<()> {
        if !requester.superuser && on.owner != requester.user {
            let message = format!("must be owner of external connection {}", on.name);
            return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).into());
        }
        for privilege in privileges {
            self.check_privilege(privilege, on, requester).await?;
        }
        Ok(())
    }

    /// Refuses names that are no role of the gateway's shard, unless they hold something that can be taken away.
    ///
    /// # Errors
    ///
    /// 42704 in PostgreSQL's words; the leaseholder cannot be asked.
    pub async fn check_roles(&self, roles: &[String], known: &[&Listed], requester: &Requester) -> anyhow::Result<()> {
        let holds = |role: &&String| known.iter().any(|on| on.users.contains(role) || on.droppers.contains(role));
        let asked = roles.iter().filter(|role| *role != PUBLIC && !holds(role)).cloned().collect();
        let missing = "SELECT name FROM pg_catalog.unnest($1::pg_catalog.text[]) AS name
            WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname::pg_catalog.text = name) ORDER BY name";
        match self.ask_for_roles(requester, missing, None, asked).await?.first() {
            None => Ok(()),
            Some(role) => {
                Err(PgError::new(SqlState::UNDEFINED_OBJECT, format!("role \"{role}\" does not exist")).into())
            }
        }
    }

    /// Of these roles, those whose privileges the requester has.
    async fn roles_of(&self, requester: &Requester, roles: BTreeSet<String>) -> anyhow::Result<BTreeSet<String>> {
        let own = |role: &String| role == PUBLIC || *role == requester.user;
        let (mut held, asked): (BTreeSet<String>, BTreeSet<String>) = roles.into_iter().partition(own);
        let members = "SELECT g.rolname::pg_catalog.text FROM pg_catalog.pg_roles g, pg_catalog.pg_roles u
            WHERE g.rolname::pg_catalog.text = ANY($1::pg_catalog.text[]) AND u.rolname = $2
              AND pg_catalog.pg_has_role(u.oid, g.oid, 'USAGE')";
        held.extend(self.ask_for_roles(requester, members, Some(&requester.user), asked).await?);
        Ok(held)
    }

    async fn ask_for_roles(
        &self,
        requester: &Requester,
        query: &str,
        user: Option<&str>,
        roles: BTreeSet<String>,
    ) -> anyhow::Result<Vec<String>> {
        if roles.is_empty() {
            return Ok(Vec::new());
        }
        let (shard, roles) = (self.peers.cluster().me().shard, Vec::from_iter(roles));
        let work = async {
            let session = leaseholder_session(&self.peers, &shard, &requester.database).await?;
            let rows = match &user {
                Some(user) => session.query(query, &[&roles, user]).await,
                None => session.query(query, &[&roles]).await,
            };
            rows.map_err(spoken).context("ask who is a member of a role")
        };
        let late = || {
            let message = format!("the leaseholder of shard \"{shard}\" does not tell who is a member of a role");
            PgError::new(SqlState::CONNECTION_FAILURE, message)
        };
        let rows = timeout(ROLES_DEADLINE, work).await.map_err(|_| late())??;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
