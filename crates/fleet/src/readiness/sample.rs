//! A server that lacks nothing. The tests of what is found on servers begin with it, here and in `crates/node/check`, and
//! spoil what they are about.

use std::collections::BTreeSet;

use chrono::DateTime;

use super::{DatabaseFacts, HbaFacts, RoleFacts, ServerFacts, StandbyFacts};

/// A primary, reached over TCP.
pub(super) fn sound() -> ServerFacts {
    let settings = [
        ("max_connections", "100"),
        ("superuser_reserved_connections", "3"),
        ("max_locks_per_transaction", "64"),
        ("max_prepared_transactions", "0"),
        ("old_snapshot_threshold", "-1"),
        ("hot_standby_feedback", "on"),
        ("max_standby_streaming_delay", "30000"),
        ("wal_receiver_status_interval", "10"),
        ("recovery_min_apply_delay", "0"),
        ("primary_slot_name", "n2"),
    ];
    ServerFacts {
        address: "127.0.0.1:5432".to_owned(),
        is_local_socket: false,
        database: "postgres".to_owned(),
        version: 150_018,
        clock: DateTime::UNIX_EPOCH,
        role: RoleFacts {
            name: "backhaul".to_owned(),
            is_super: false,
            reads_all: true,
            monitors: true,
            bypasses_rls: true,
            reads_large_objects: true,
            may_pause: true,
            connection_limit: -1,
            restorer_exists: true,
            restorer_is_super: true,
            may_restore: true,
        },
        standby: None,
        slots: Vec::new(),
        settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().collect(),
        on_command_line: BTreeSet::new(),
        superuser: Some("root".to_owned()),
        sessions: 10,
        databases: vec![DatabaseFacts { name: "shop".to_owned(), may_connect: true, tables: Some(12) }],
        hba: Some(HbaFacts { broken: Vec::new(), replication: true }),
        open_door: None,
        programs: Vec::new(),
    }
}

/// What a standby is besides, whose primary is at `host` and `port`.
pub(super) fn following(host: &str, port: &str) -> StandbyFacts {
    StandbyFacts {
        receiver: Some("streaming".to_owned()),
        upstream_host: Some(host.to_owned()),
        upstream_port: Some(port.to_owned()),
        may_be_led: true,
        is_past_fork: false,
        pause_state: "not paused".to_owned(),
        paused_by_backup: false,
    }
}
