//! Giving a whole database what its users know it by: owner, privileges, settings, comment, and at last the name.
//!
//! All of it is one transaction. Before it the database is the job's, and can be removed; after it, it is the user's,
//! bears no mark, and nothing here touches it again.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use pgerror::SqlState;
use tokio::time::sleep;

use super::Finish;
use super::acting::{Acting, end_sessions, literal, own_name};
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

/// Gives the database its name and all the rest.
pub(super) async fn publish(outside: &Acting, request: &Finish) -> anyhow::Result<()> {
    let grants = grants(&outside.session, &request.plan).await?;
    let statements = statements(&own_name(request.job), &request.target, &request.plan, &grants);
    let mut tries = TRIES;
    loop {
        end_sessions(&outside.session, request.database_oid, None).await?;
        tries -= 1;
        match outside.run_long(&statements).await {
            Err(error) if tries > 0 && has_code(&error, &[SqlState::OBJECT_IN_USE]) => {
                outside.session.run("ROLLBACK").await?;
                sleep(PAUSE).await;
            }
            result => return result.context("give the database its name"),
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

fn statements(name: &str, target: &str, plan: &DatabasePlan, grants: &[(Option<String>, String, bool)]) -> String {
    let (name, owner) = (quoted(name), quoted(&plan.owner));
    let mut text = format!("BEGIN; SET LOCAL synchronous_commit = on; ALTER DATABASE {name} OWNER TO {owner};");
    let mut say = |statement: String| {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{statement};");
    };
    if plan.acl.is_some() {
        say(format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC, {owner}"));
    }
    for (grantee, privilege, is_grantable) in grants {
        let grantee = grantee.as_ref().map_or_else(|| "PUBLIC".to_owned(), |role| quoted(role));
        let option = if *is_grantable { " WITH GRANT OPTION" } else { "" };
        say(format!("GRANT {privilege} ON DATABASE {name} TO {grantee}{option}"));
    }
    let of_all = plan.settings.iter().map(|setting| (format!("ALTER DATABASE {name}"), setting));
    let of_roles = plan.role_settings.iter();
    let of_roles = of_roles.map(|(role, setting)| (format!("ALTER ROLE {} IN DATABASE {name}", quoted(role)), setting));
    for (whose, setting) in of_all.chain(of_roles) {
        if let Some((variable, value)) = setting.split_once('=') {
            say(format!("{whose} SET {} TO {}", variable_name(variable), value_of(variable, value)));
        }
    }
    let comment = plan.comment.as_ref().map_or_else(|| "NULL".to_owned(), |comment| literal(comment));
    say(format!("COMMENT ON DATABASE {name} IS {comment}"));
    say(format!("ALTER DATABASE {name} RENAME TO {}", quoted(target)));
    say("COMMIT".to_owned());
    text
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
