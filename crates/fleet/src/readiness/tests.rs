//! A sound server lacks nothing; each fact that is amiss is found, with what mends it.

use cluster::Role;

use super::*;
use sample::sound;

#[path = "sample.rs"]
mod sample;

fn standby() -> ServerFacts {
    ServerFacts { standby: Some(sample::following("10.0.1.5", "5432")), ..sound() }
}

fn seat(role: Role) -> Seat {
    let registry_sessions = if role == Role::Leaseholder { 8 } else { 0 };
    Seat {
        role: Some(role),
        readers: 4,
        lag_max: 1 << 30,
        slot_name: "n2".to_owned(),
        registry_sessions,
        ..Seat::default()
    }
}

fn set(facts: &mut ServerFacts, name: &str, value: &str) {
    facts.settings.insert(name.to_owned(), value.to_owned());
}

fn slot(active: bool, wal_status: &str, kept: i64) -> SlotFacts {
    SlotFacts { name: "n2".to_owned(), active, wal_status: Some(wal_status.to_owned()), kept: Some(kept) }
}

/// One line for each finding: what it is, and every line that mends it.
fn told(found: &[Finding]) -> String {
    let lines = found.iter().map(|finding| {
        let steps: Vec<&str> = finding.steps.iter().flat_map(|step| &step.lines).map(String::as_str).collect();
        format!("{}: {} [{}]", finding.severity, finding.what, steps.join(" "))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_sound_server_lacks_nothing() {
    assert_eq!(told(&findings(&sound(), &seat(Role::Leaseholder))), "");
    assert_eq!(told(&findings(&standby(), &seat(Role::NonVoting))), "");
    let mut superuser = sound();
    superuser.role = RoleFacts { is_super: true, bypasses_rls: false, reads_large_objects: false, ..superuser.role };
    assert_eq!(told(&findings(&superuser, &seat(Role::Leaseholder))), "");
}

type Case = (&'static str, fn(&mut ServerFacts), Severity, &'static str, &'static str);

fn assert_found(cases: &[Case], sound: fn() -> ServerFacts, seat: &Seat) {
    for (case, spoil, severity, what, mended) in cases {
        let mut facts = sound();
        spoil(&mut facts);
        let found = findings(&facts, seat);
        let told = told(&found);
        let [one] = &found[..] else { panic!("{case}: {told}") };
        assert!(one.severity == *severity && one.what.contains(what) && told.contains(mended), "{case}: {told}");
    }
}

#[test]
fn each_right_that_the_role_lacks_is_named_with_its_grant() {
    use Severity::{Advice, Missing};
    let cases: &[Case] = &[
        ("tables", |f| f.role.reads_all = false, Missing, "read all tables", "GRANT pg_read_all_data TO \"backhaul\";"),
        ("monitor", |f| f.role.monitors = false, Missing, "see replication", "GRANT pg_monitor TO \"backhaul\";"),
        ("rls", |f| f.role.bypasses_rls = false, Missing, "row security", "ALTER ROLE \"backhaul\" BYPASSRLS;"),
        ("large", |f| f.role.reads_large_objects = false, Missing, "large objects", "SET lo_compat_privileges = on;"),
        (
            "pause",
            |f| f.role.may_pause = false,
            Missing,
            "pause replay",
            "pg_catalog.pg_wal_replay_resume() TO \"backhaul\";",
        ),
        ("limit", |f| f.role.connection_limit = 5, Missing, "5 connections", "CONNECTION LIMIT -1;"),
        (
            "connect",
            |f| f.databases[0].may_connect = false,
            Missing,
            "connect to database \"shop\"",
            "GRANT CONNECT ON DATABASE \"shop\" TO \"backhaul\";",
        ),
        (
            "no restores",
            |f| (f.role.restorer_exists, f.role.restorer_is_super, f.role.may_restore) = (false, false, false),
            Advice,
            "may not restore",
            "CREATE ROLE backhaul_restore SUPERUSER NOLOGIN; GRANT backhaul_restore TO \"backhaul\";",
        ),
        ("not a member", |f| f.role.may_restore = false, Missing, "take on", "GRANT backhaul_restore TO \"backhaul\";"),
        (
            "no superuser",
            |f| f.role.restorer_is_super = false,
            Missing,
            "not a superuser",
            "ALTER ROLE backhaul_restore SUPERUSER NOLOGIN;",
        ),
    ];
    assert_found(cases, sound, &seat(Role::Leaseholder));
}

#[test]
fn a_primary_without_room_is_named() {
    use Severity::{Advice, Missing};
    let cases: &[Case] = &[
        // 12 for a restore, 9 of the nodes, 3 kept back: four too many.
        (
            "few",
            |f| set(f, "max_connections", "20"),
            Missing,
            "up to 12 connections",
            "ALTER SYSTEM SET max_connections = '30';",
        ),
        ("full", |f| f.sessions = 90, Advice, "90 in use: at this moment", "max_connections = '110';"),
        ("locks", |f| f.databases[0].tables = Some(6400), Missing, "6400 tables", "max_locks_per_transaction = '128';"),
        ("old", |f| set(f, "old_snapshot_threshold", "60"), Missing, "too old", "old_snapshot_threshold = '-1';"),
        ("lost", |f| f.slots = vec![slot(false, "lost", 0)], Missing, "has lost", "pg_drop_replication_slot('n2');"),
        (
            "going",
            |f| f.slots = vec![slot(true, "unreserved", 0)],
            Missing,
            "about to lose",
            "max_slot_wal_keep_size = '-1';",
        ),
        (
            "kept",
            |f| f.slots = vec![slot(false, "extended", 5 << 30)],
            Advice,
            "5120 MiB",
            "pg_drop_replication_slot('n2');",
        ),
        (
            "broken",
            |f| f.hba = Some(HbaFacts { broken: vec![(7, "x".to_owned())], replication: true }),
            Missing,
            "line 7",
            "",
        ),
        ("unread", |f| f.hba = None, Advice, "pg_hba.conf", "pg_catalog.pg_hba_file_rules() TO \"backhaul\";"),
        (
            "door",
            |f| f.open_door = Some("the server lets in anybody".to_owned()),
            Missing,
            "everybody",
            "[host  all          all  127.0.0.1/32  scram-sha-256 host  replication  all  127.0.0.1/32  scram-sha-256]",
        ),
        (
            "a socket's door",
            |f| (f.open_door, f.is_local_socket) = (Some("the server lets in anybody".to_owned()), true),
            Missing,
            "connect it to 127.0.0.1 instead",
            "[local  all          all  scram-sha-256 local  replication  all  scram-sha-256]",
        ),
        (
            "command line",
            |f| {
                set(f, "max_connections", "20");
                f.on_command_line.insert("max_connections".to_owned());
            },
            Missing,
            "up to 12 connections",
            "[-c max_connections='30']",
        ),
        (
            "program",
            |f| f.programs = vec![Program { name: "pg_dump".to_owned(), wrong: "pg_dump 14 is older".to_owned() }],
            Missing,
            "older",
            "apt-get install postgresql-client-15",
        ),
    ];
    assert_found(cases, sound, &seat(Role::Leaseholder));
}

#[test]
fn what_disturbs_reading_a_standby_is_named() {
    use Severity::{Advice, Missing};
    let cases: &[Case] = &[
        (
            "feedback",
            |f| set(f, "hot_standby_feedback", "off"),
            Advice,
            "VACUUM",
            "ALTER SYSTEM SET hot_standby_feedback = 'on'; SELECT pg_reload_conf();",
        ),
        ("interval", |f| set(f, "wal_receiver_status_interval", "0"), Advice, "never reaches", "= '10s';"),
        (
            "delay",
            |f| set(f, "max_standby_streaming_delay", "700"),
            Advice,
            "700 ms",
            "max_standby_streaming_delay = '30s';",
        ),
        (
            "late",
            |f| set(f, "recovery_min_apply_delay", "5000"),
            Advice,
            "5000 ms late",
            "recovery_min_apply_delay = '0';",
        ),
        ("no slot", |f| set(f, "primary_slot_name", ""), Advice, "no replication slot", "primary_slot_name = 'n2';"),
        (
            "paused",
            |f| f.standby.as_mut().unwrap().pause_state = "paused".to_owned(),
            Missing,
            "replay is paused",
            "SELECT pg_wal_replay_resume();",
        ),
    ];
    assert_found(cases, standby, &seat(Role::NonVoting));
    let mut ours = standby();
    ours.standby =
        ours.standby.map(|one| StandbyFacts { pause_state: "paused".to_owned(), paused_by_backup: true, ..one });
    set(&mut ours, "max_standby_streaming_delay", "-1");
    assert_eq!(told(&findings(&ours, &seat(Role::NonVoting))), "", "a backup's own pause, and a wait without an end");
    let behind = Seat { lag: 3 << 30, ..seat(Role::NonVoting) };
    assert!(told(&findings(&standby(), &behind)).contains("3072 MiB behind"));
    assert_eq!(told(&findings(&sound(), &Seat { lag: 3 << 30, ..seat(Role::Leaseholder) })), "");
}

#[test]
fn an_insecure_node_is_told_of_no_doors() {
    let mut facts = sound();
    (facts.hba, facts.open_door) = (None, Some("the server lets in anybody".to_owned()));
    assert_eq!(told(&findings(&facts, &Seat { insecure: true, ..seat(Role::Leaseholder) })), "");
}

#[test]
fn how_a_server_is_read_follows_its_role_and_its_rights() {
    let mut weak = standby();
    weak.role.may_pause = false;
    for (facts, role, words) in [
        (sound(), Role::Leaseholder, "exported"),
        (standby(), Role::NonVoting, "paused for the moment"),
        (standby(), Role::Voting, "never paused"),
        (standby(), Role::Detached, "not read"),
        (sound(), Role::Overtaken, "not read"),
        (weak, Role::NonVoting, "stands still"),
    ] {
        assert!(reading(&facts, &seat(role)).contains(words), "{role}: {words}");
    }
}

#[test]
fn a_login_that_fails_is_told_what_lets_it_in() {
    let refused = |code: &str, reason: &str| Closed {
        address: "127.0.0.1:5432".to_owned(),
        is_local_socket: false,
        user: "backhaul".to_owned(),
        database: "postgres".to_owned(),
        code: code.to_owned(),
        reason: reason.to_owned(),
    };
    for (code, reason, mended) in [
        ("28000", "role \"backhaul\" does not exist", "CREATE ROLE \"backhaul\" LOGIN BYPASSRLS;"),
        ("28000", "role \"backhaul\" is not permitted to log in", "ALTER ROLE \"backhaul\" LOGIN;"),
        (
            "28000",
            "no pg_hba.conf entry for host \"127.0.0.1\"",
            "host  all          \"backhaul\"  127.0.0.1/32  scram-sha-256",
        ),
        ("28P01", "password authentication failed", "\\password \"backhaul\""),
        ("42501", "permission denied for database \"postgres\"", "GRANT CONNECT ON DATABASE \"postgres\""),
        ("53300", "too many connections for role \"backhaul\"", "CONNECTION LIMIT -1;"),
        ("57P03", "not accepting connections (Hot standby mode is disabled.)", "hot_standby = on"),
        ("", "invalid configuration: password missing", "BACKHAUL_POSTGRES"),
    ] {
        let finding = closed(&refused(code, reason));
        assert!(finding.severity == Severity::Missing && finding.what.contains(reason), "{reason}");
        assert!(told(std::slice::from_ref(&finding)).contains(mended), "{}", told(&[finding]));
    }
    let down = closed(&refused("", "error connecting to server: Connection refused"));
    assert!(down.steps.is_empty() && down.what.contains("127.0.0.1:5432"), "{down:?}");
}
