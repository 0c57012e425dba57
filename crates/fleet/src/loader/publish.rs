//! Giving whole databases what their users know them by, in all shards or in none.
//!
//! First each gets its name, while nobody can connect to it: should the name be taken in one shard, none of the others
//! has been seen, and all are removed by their marks. Then each is given to its user: owner, privileges, settings and
//! comment, which takes the mark's place, in one transaction that was tried before. Before that the database is the
//! job's; after it, it is the user's, and nothing here touches it again. Both steps can be repeated.

use std::time::Duration;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio::time::sleep;

use super::acting::{Acting, end_sessions, literal};
use super::found::{Found, Mark, Stage, gone};
use super::{JobDatabase, Publish};
use crate::founders::DatabasePlan;
use crate::founders::session::{Session, has_code, quoted};

/// A database in which somebody has a session cannot be renamed. So often it is tried to be quicker than they are.
const TRIES: usize = 3;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Settings that are lists of names, whose elements are quoted one by one, as in `pg_dump`.
const LISTS: [&str; 6] = [
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
    "unix_socket_directories",
];

/// Gives the database its name. Nobody can connect to it yet, and it can still be removed.
pub(super) async fn publish(outside: &Acting, request: &Publish) -> anyhow::Result<()> {
    let (job, session) = (request.job, &outside.session);
    let Some(found) = found(session, request).await? else { return Ok(()) };
    match found.admit(session, job, request.run).await? {
        Stage::Named => return Ok(()),
        Stage::Whole => {}
        Stage::Filling => {
            let message = format!("the database of restore job {job} is not whole");
            return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).into());
        }
    }
    let name = job.own_name();
    // What would be refused later, when another shard's database has been given to its user, is refused now.
    let rehearsed = outside.run_long(&format!("{} ROLLBACK", given(session, &name, &request.plan).await?)).await;
    rehearsed.context("try to give the database its properties")?;
    let mark = Mark { job, run: request.run, stage: Stage::Named };
    let (own, target) = (quoted(&name), quoted(&request.target));
    let statements = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; ALTER DATABASE {own} ALLOW_CONNECTIONS false;
         {}; ALTER DATABASE {own} RENAME TO {target}; COMMIT",
        mark.statement(&name)
    );
    alone(outside, request.database_oid, &statements).await.context("give the database its name")
}

/// Gives the database to its user.
pub(super) async fn release(outside: &Acting, request: &Publish) -> anyhow::Result<()> {
    let session = &outside.session;
    let Some(found) = found(session, request).await? else { return Ok(()) };
    if found.admit(session, request.job, request.run).await? != Stage::Named {
        let message = format!("the database of restore job {} has no name yet", request.job);
        return Err(PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message).into());
    }
    let statements = format!("{} COMMIT", given(session, &found.name, &request.plan).await?);
    outside.run_long(&statements).await.context("give the database to its user")
}

/// Takes the name of a job's database back, so that it can be removed as any other. PostgreSQL renames by name only; if
/// somebody has put another database under it meanwhile, nothing is done.
pub(super) async fn take_back(session: &Session, found: &Found, job: JobDatabase, run: i64) -> anyhow::Result<()> {
    let own = quoted(&job.own_name());
    let mark = Mark { job, run, stage: Stage::Whole };
    let statements = format!(
        "BEGIN; ALTER DATABASE {} RENAME TO {own}; {}; ALTER DATABASE {own} ALLOW_CONNECTIONS true",
        quoted(&found.name),
        mark.statement(&job.own_name())
    );
    session.run(&statements).await.context("take the database's name back")?;
    let is_it = Found::by_name(session, &job.own_name()).await?.is_some_and(|renamed| renamed.oid == found.oid);
    session.run(if is_it { "COMMIT" } else { "ROLLBACK" }).await.context("take the database's name back")
}

/// The database, unless its user has it already: the answer to an earlier request was lost.
async fn found(session: &Session, request: &Publish) -> anyhow::Result<Option<Found>> {
    let found = Found::by_oid(session, request.database_oid).await?.ok_or_else(|| gone(request.job))?;
    Ok(if found.is_released(&request.target) { None } else { Some(found) })
}

/// Runs statements for which nobody may be in the database.
async fn alone(outside: &Acting, oid: u32, statements: &str) -> anyhow::Result<()> {
    let mut tries = TRIES;
    loop {
        end_sessions(&outside.session, oid, None).await?;
        tries -= 1;
        match outside.run_long(statements).await {
            Err(error) if tries > 0 && has_code(&error, &[SqlState::OBJECT_IN_USE]) => {
                outside.session.run("ROLLBACK").await?;
                sleep(PAUSE).await;
            }
            result => return result,
        }
    }
}

/// The privileges that were recorded: grantee, privilege, whether it may be passed on.
async fn grants(session: &Session, plan: &DatabasePlan) -> anyhow::Result<Vec<(Option<String>, String, bool)>> {
    let query = "SELECT CASE grantee WHEN 0 THEN NULL ELSE pg_catalog.pg_get_userbyid(grantee)::text END,
                        privilege_type, is_grantable
                 FROM pg_catalog.aclexplode(($1::text)::aclitem[])";
    let rows = session.rows(query, &[&plan.acl]).await.context("read the privileges on the database")?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

/// What gives the database called `name` to its user, up to the COMMIT.
async fn given(session: &Session, name: &str, plan: &DatabasePlan) -> anyhow::Result<String> {
    let (owner, name) = (quoted(&plan.owner), quoted(name));
    let mut statements = vec![
        "BEGIN".to_owned(),
        "SET LOCAL synchronous_commit = on".to_owned(),
        format!("ALTER DATABASE {name} OWNER TO {owner}"),
    ];
    if plan.acl.is_some() {
        statements.push(format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC, {owner}"));
    }
    for (grantee, privilege, is_grantable) in grants(session, plan).await? {
        let grantee = grantee.map_or_else(|| "PUBLIC".to_owned(), |role| quoted(&role));
        let option = if is_grantable { " WITH GRANT OPTION" } else { "" };
        statements.push(format!("GRANT {privilege} ON DATABASE {name} TO {grantee}{option}"));
    }
    let comment = plan.comment.as_ref().map_or_else(|| "NULL".to_owned(), |comment| literal(comment));
    statements.push(format!("COMMENT ON DATABASE {name} IS {comment}"));
    statements.push(format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"));
    statements.extend(properties(&name, plan));
    Ok(statements.iter().map(|statement| format!("{statement};\n")).collect())
}

/// The statements that give a database, whose name is `name` as SQL has it, the settings and limits of a plan; at the
/// end perhaps that nobody may connect to it.
pub fn properties(name: &str, plan: &DatabasePlan) -> Vec<String> {
    let of_all = plan.settings.iter().map(|setting| (format!("ALTER DATABASE {name}"), setting));
    let of_roles = plan.role_settings.iter();
    let of_roles = of_roles.map(|(role, setting)| (format!("ALTER ROLE {} IN DATABASE {name}", quoted(role)), setting));
    let mut statements: Vec<String> = of_all
        .chain(of_roles)
        .filter_map(|(whose, setting)| {
            let (variable, value) = setting.split_once('=')?;
            Some(format!("{whose} SET {} TO {}", variable_name(variable), value_of(variable, value)))
        })
        .collect();
    if plan.connection_limit >= 0 {
        statements.push(format!("ALTER DATABASE {name} CONNECTION LIMIT {}", plan.connection_limit));
    }
    if plan.is_template {
        statements.push(format!("ALTER DATABASE {name} IS_TEMPLATE true"));
    }
    if !plan.allows_connections {
        statements.push(format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"));
    }
    statements
}

/// A setting's name; an extension's has two parts.
fn variable_name(variable: &str) -> String {
    variable.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

fn value_of(variable: &str, value: &str) -> String {
    if !LISTS.contains(&variable.to_ascii_lowercase().as_str()) || value.is_empty() {
        return literal(value);
    }
    elements(value).iter().map(|element| literal(element)).collect::<Vec<_>>().join(", ")
}

/// The elements of a list of names, each of them quoted or not.
fn elements(list: &str) -> Vec<String> {
    let mut elements = vec![String::new()];
    let mut chars = list.chars().peekable();
    let mut is_quoted = false;
    while let Some(char) = chars.next() {
        let Some(element) = elements.last_mut() else { break };
        match char {
            '"' if is_quoted && chars.peek() == Some(&'"') => {
                chars.next();
                element.push('"');
            }
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => elements.push(String::new()),
            char if char.is_ascii_whitespace() && !is_quoted => {}
            char => element.push(char),
        }
    }
    elements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_given_back_as_they_were() {
        for (variable, value, expected) in [
            ("work_mem", "5MB", "'5MB'"),
            ("search_path", "\"$user\", public, \"A, \"\"b\"\"\"", "'$user', 'public', 'A, \"b\"'"),
            ("search_path", "\"\"", "''"),
            ("app.list", "a, b", "'a, b'"),
            ("app.note", "it's", "'it''s'"),
        ] {
            assert_eq!(value_of(variable, value), expected, "{variable}={value}");
        }
        assert_eq!(variable_name("app.Note"), "\"app\".\"Note\"");
    }
}
