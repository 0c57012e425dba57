//! The open-door check.
//!
//! All clients of a node reach PostgreSQL from the node's own host. Lines of `pg_hba.conf` that were written for people
//! who already have a login on that host (`trust`, `peer`, `ident` for the local socket or the loopback address) would
//! then let in everybody who reaches the node's port. A server with such a line is not relayed to.

use anyhow::Context as _;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::Server;
use crate::login::{FirstAnswer, knock};

/// A way in that needs no proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenDoor {
    /// What was found, as a sentence without its full stop.
    pub found: String,
}

/// Looks for a way into `server` without a proof: by knocking as the service role, as `postgres`, as somebody who does
/// not exist, and for replication.
///
/// # Errors
///
/// The server cannot be reached, or refuses for a reason that says nothing about proofs.
pub async fn check(server: &Server) -> anyhow::Result<Option<OpenDoor>> {
    let stranger = format!("backhaul_{}", Uuid::new_v4().simple());
    for (user, database, replication) in [
        (server.user(), server.database(), "false"),
        ("postgres", "postgres", "false"),
        (stranger.as_str(), "postgres", "false"),
        (server.user(), "postgres", "true"),
        (stranger.as_str(), "postgres", "true"),
    ] {
        let parameters = [("user", user), ("database", database), ("replication", replication)];
        let answer = knock(server, &parameters).await?;
        if let FirstAnswer::NotNow(reason) = answer {
            return Err(anyhow::Error::new(reason).context("find out how the server lets clients in"));
        }
        if let FirstAnswer::LetIn = answer {
            let who = if user == stranger { "anybody".to_owned() } else { format!("role \"{user}\"") };
            let what = if replication == "true" { " for replication" } else { "" };
            return Ok(Some(OpenDoor { found: format!("the server lets in {who}{what} without a password") }));
        }
    }
    Ok(None)
}

/// The first rule that applies to connections from this node and asks for no proof that can travel, where `session`
/// may read the rules. It finds what is open to one role or in one database only, at which [`check`] does not knock.
///
/// # Errors
///
/// The session is lost.
pub async fn open_rule(server: &Server, session: &Client) -> anyhow::Result<Option<OpenDoor>> {
    let may_read = "SELECT has_function_privilege('pg_catalog.pg_hba_file_rules()', 'EXECUTE')";
    if !session.query_one(may_read, &[]).await.context("ask for the right to read pg_hba.conf")?.get::<_, bool>(0) {
        return Ok(None);
    }
    // Host names other than localhost are not resolved: the knocking above covers what really applies.
    let query = "
        SELECT line_number, auth_method FROM pg_catalog.pg_hba_file_rules
        WHERE error IS NULL AND auth_method IN ('trust', 'peer', 'ident')
          AND CASE WHEN $1 THEN type = 'local'
              ELSE type IN ('host', 'hostnossl')
                   AND (address IN ('all', 'samehost', 'samenet', 'localhost', '127.0.0.1', '::1', '0.0.0.0', '::')
                        OR address LIKE '127.%') END
        ORDER BY line_number LIMIT 1";
    let row = session.query_opt(query, &[&server.is_local_socket()]).await.context("read the rules of pg_hba.conf")?;
    Ok(row.map(|row| OpenDoor {
        found: format!(
            "line {} of pg_hba.conf lets in by \"{}\" whoever connects from this host",
            row.get::<_, i32>(0),
            row.get::<_, String>(1)
        ),
    }))
}
