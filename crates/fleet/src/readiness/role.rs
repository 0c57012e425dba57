//! What the service role lacks, and whether it gets in at all.

use super::facts::{Closed, ServerFacts};
use super::{Finding, Place, Seat};
use crate::founders::session::quoted;
use crate::loader::RESTORE_ROLE;

/// The functions that [`make_service_role`] lets the role call.
const PAUSE_FUNCTIONS: &str = "pg_catalog.pg_wal_replay_pause(), pg_catalog.pg_wal_replay_resume()";

/// The statements that make the service role, or complete one that is there: it reads everything, sees replication, and
/// may pause replay. Rights on functions belong to the database in which this is run, the one that nodes log into.
pub fn make_service_role(role: &str, exists: bool) -> Vec<String> {
    let verb = if exists { "ALTER" } else { "CREATE" };
    let mut statements = vec![format!("{verb} ROLE {} LOGIN BYPASSRLS;", quoted(role))];
    statements.push(format!("GRANT pg_read_all_data, pg_monitor TO {};", quoted(role)));
    statements.extend([reads_large_objects(role), may_pause(role)]);
    statements
}

/// The statements that make the role by which nodes restore: what is in a backup runs as SQL with all rights, so this
/// one has them.
pub fn make_restore_role(service_role: &str, exists: bool) -> Vec<String> {
    let verb = if exists { "ALTER" } else { "CREATE" };
    vec![
        format!("{verb} ROLE {RESTORE_ROLE} SUPERUSER NOLOGIN;"),
        format!("GRANT {RESTORE_ROLE} TO {};", quoted(service_role)),
    ]
}

/// `pg_read_all_data` does not reach large objects; this setting does, and only a superuser can give it.
fn reads_large_objects(role: &str) -> String {
    format!("ALTER ROLE {} SET lo_compat_privileges = on;", quoted(role))
}

fn may_pause(role: &str) -> String {
    format!("GRANT EXECUTE ON FUNCTION {PAUSE_FUNCTIONS} TO {};", quoted(role))
}

/// What the service role lacks. All of it is mended on the primary.
pub(super) fn findings(facts: &ServerFacts) -> Vec<Finding> {
    let role = &facts.role;
    let (name, of) = (&role.name, quoted(&role.name));
    let primary = || Place::Primary { database: facts.database.clone() };
    let mut found = Vec::new();
    let mut lacks = |lacking: bool, what: String, statement: String| {
        if lacking {
            found.push(Finding::missing(what).mended(primary(), [statement]));
        }
    };
    lacks(!role.reads_all, format!("role {of} may not read all tables"), format!("GRANT pg_read_all_data TO {of};"));
    lacks(
        !role.monitors,
        format!("role {of} may not see replication and other sessions"),
        format!("GRANT pg_monitor TO {of};"),
    );
    lacks(
        !role.is_super && !role.bypasses_rls,
        format!("role {of} is subject to row security, and tables with it cannot be backed up"),
        format!("ALTER ROLE {of} BYPASSRLS;"),
    );
    lacks(
        !role.is_super && !role.reads_large_objects,
        format!("role {of} may not read large objects of others"),
        reads_large_objects(name),
    );
    lacks(
        !role.may_pause,
        format!("role {of} may not pause replay, so standbys give a point only while their replay stands still"),
        may_pause(name),
    );
    for database in facts.databases.iter().filter(|database| !database.may_connect) {
        lacks(
            true,
            format!("role {of} may not connect to database {}", quoted(&database.name)),
            format!("GRANT CONNECT ON DATABASE {} TO {of};", quoted(&database.name)),
        );
    }
    found.extend(restores(facts));
    found
}

fn restores(facts: &ServerFacts) -> Option<Finding> {
    let role = &facts.role;
    if role.is_super || (role.may_restore && role.restorer_is_super) {
        return None;
    }
    let primary = Place::Primary { database: facts.database.clone() };
    let statements = make_restore_role(&role.name, role.restorer_exists);
    Some(match role.restorer_exists {
        false => Finding::advice("nodes may not restore backups; if they shall, this makes a superuser role for it")
            .mended(primary, statements),
        true => {
            let what = match role.may_restore {
                true => format!("role \"{RESTORE_ROLE}\", by which nodes restore, is not a superuser"),
                false => format!("role {} may not take on \"{RESTORE_ROLE}\" to restore", quoted(&role.name)),
            };
            Finding::missing(what).mended(primary, statements)
        }
    })
}

/// What `pg_hba.conf` lets in that it must not, and what is wrong in it.
pub(super) fn doors(facts: &ServerFacts, seat: &Seat) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(open) = facts.open_door.as_ref().filter(|_| !seat.insecure) {
        let instead = match facts.is_local_socket {
            true => {
                ": connect it to 127.0.0.1 instead, with such lines of type host, or let these replace the lines of \
                 type local that ask for no password"
            }
            false => ": let these replace the lines of type host that ask for no password",
        };
        let what = format!("{open}, and a node in front of it would let in everybody{instead}");
        let lines = ["all", "replication"].map(|database| guarded(facts.is_local_socket, database, "all"));
        found.push(Finding::missing(what).mended(Place::Hba, lines));
    }
    let Some(hba) = &facts.hba else {
        if !seat.insecure {
            let name = quoted(&facts.role.name);
            let what = "the node may not read pg_hba.conf, and does not see a door that is open to one role only";
            let statement = format!("GRANT EXECUTE ON FUNCTION pg_catalog.pg_hba_file_rules() TO {name};");
            let primary = Place::Primary { database: facts.database.clone() };
            found.push(Finding::advice(what).mended(primary, [statement]));
        }
        return found;
    };
    for (line, error) in &hba.broken {
        let what = format!(
            "line {line} of pg_hba.conf is wrong ({error}); none of its changes are taken up until it is right"
        );
        found.push(Finding::missing(what));
    }
    found
}

/// Why the service role does not get in.
pub fn closed(closed: &Closed) -> Finding {
    let Closed { address, user, database, code, reason, .. } = closed;
    let (of, primary) = (quoted(user), Place::Primary { database: database.clone() });
    let finding = Finding::missing(format!("the node cannot ask the server {address} as role {of}: {reason}"));
    match code.as_str() {
        "28000" if reason.contains("pg_hba.conf") => {
            finding.mended(Place::Hba, [guarded(closed.is_local_socket, "all", &of)])
        }
        "28000" if reason.contains("not permitted to log in") => {
            finding.mended(primary, [format!("ALTER ROLE {of} LOGIN;")])
        }
        "28000" if reason.contains("does not exist") => finding.mended(primary, make_service_role(user, false)),
        // Whether the role or only its password is wrong, the server does not tell.
        "28000" | "28P01" => finding
            .mended(primary, make_sure_of_service_role(user))
            .mended(Place::Node, ["BACKHAUL_POSTGRES, with the same password, in the node's environment".to_owned()]),
        "3D000" => {
            finding.mended(Place::Node, [format!("--postgres with a database that exists, not dbname={database}")])
        }
        "42501" if reason.contains("for database") => {
            finding.mended(primary, [format!("GRANT CONNECT ON DATABASE {} TO {of};", quoted(database))])
        }
        "53300" if reason.contains("for role") => {
            finding.mended(primary, [format!("ALTER ROLE {of} CONNECTION LIMIT -1;")])
        }
        "57P03" if reason.contains("ot standby mode") => finding.mended(Place::Conf, ["hot_standby = on".to_owned()]),
        "" if reason.contains("password missing") => finding
            .mended(Place::Node, ["BACKHAUL_POSTGRES, with the role's password, in the node's environment".to_owned()]),
        _ => finding,
    }
}

/// Statements that are right whether the role is there or not, and its password.
fn make_sure_of_service_role(role: &str) -> Vec<String> {
    let create = format!("CREATE ROLE {};", quoted(role));
    let mut lines = vec![format!("DO $$ BEGIN {create} EXCEPTION WHEN duplicate_object THEN NULL; END $$;")];
    lines.extend(make_service_role(role, true));
    lines.push(format!("\\password {}", quoted(role)));
    lines
}

/// The line of `pg_hba.conf` by which a server lets in whoever proves a password, on the way that its node takes to it.
pub fn guarded(is_local_socket: bool, database: &str, role: &str) -> String {
    match is_local_socket {
        true => format!("local  {database:11}  {role}  scram-sha-256"),
        false => format!("host  {database:11}  {role}  127.0.0.1/32  scram-sha-256"),
    }
}
