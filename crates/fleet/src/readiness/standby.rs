//! What a standby lacks to be read in peace, and what slots keep or have lost.

use cluster::Role;

use super::facts::ServerFacts;
use super::{Finding, Place, Seat};

/// Replay that waits for a query for less than this ends most reads of a backup: PostgreSQL's own default, in ms.
const STREAMING_DELAY_MIN: i64 = 30_000;

/// A slot that nobody holds and that keeps more than this is told, in bytes.
const KEPT_MAX: i64 = 1024 * 1024 * 1024;

/// What a standby lacks; nothing on a primary.
pub(super) fn findings(facts: &ServerFacts, seat: &Seat) -> Vec<Finding> {
    let Some(standby) = &facts.standby else { return Vec::new() };
    let mut found = Vec::new();
    if standby.pause_state != "not paused" && !standby.paused_by_backup {
        found.push(
            Finding::missing("replay is paused, and not by a backup: it falls behind, and is not read")
                .mended(Place::Server, ["SELECT pg_wal_replay_resume();"]),
        );
    }
    if facts.settings.get("hot_standby_feedback").is_some_and(|value| value == "off") {
        let what = "hot_standby_feedback is off: a backup keeps this server paused while it reads, or begins anew what \
                    VACUUM on the primary ends";
        found.push(Finding::advice(what).reloaded(facts, "hot_standby_feedback", "on"));
    } else if facts.settings.get("wal_receiver_status_interval").is_some_and(|value| value == "0") {
        let what = "wal_receiver_status_interval is 0, so hot_standby_feedback never reaches the primary";
        found.push(Finding::advice(what).reloaded(facts, "wal_receiver_status_interval", "10s"));
    }
    if facts.settings.contains_key("max_standby_streaming_delay") {
        let delay = facts.number("max_standby_streaming_delay");
        if (0..STREAMING_DELAY_MIN).contains(&delay) {
            let what = format!(
                "max_standby_streaming_delay is {delay} ms: any change of a schema soon ends what a backup reads here"
            );
            found.push(Finding::advice(what).reloaded(facts, "max_standby_streaming_delay", "30s"));
        }
    }
    let late = facts.number("recovery_min_apply_delay");
    if late > 0 {
        let what =
            format!("replay is {late} ms late by recovery_min_apply_delay, and a backup that reads here is as old");
        found.push(Finding::advice(what).reloaded(facts, "recovery_min_apply_delay", "0"));
    }
    let follows = matches!(seat.role, None | Some(Role::Voting | Role::NonVoting));
    if seat.lag_max > 0 && seat.lag > seat.lag_max && follows {
        let (lag, max) = (mebibytes(seat.lag), mebibytes(seat.lag_max));
        found.push(Finding::advice(format!(
            "it is {lag} MiB behind its primary, and passed over while that is more than {max} MiB"
        )));
    }
    let receives = standby.receiver.as_deref() == Some("streaming");
    if receives && facts.settings.get("primary_slot_name").is_some_and(String::is_empty) {
        found.push(without_slot(facts, seat));
    }
    found
}

fn mebibytes(bytes: u64) -> u64 {
    bytes / (1024 * 1024)
}

fn without_slot(facts: &ServerFacts, seat: &Seat) -> Finding {
    let what = "it holds no replication slot: what it tells the primary is forgotten whenever it reconnects, and WAL \
                that it needs may be gone";
    let slot = seat.slot_name.clone();
    Finding::advice(what)
        .mended(
            Place::Primary { database: facts.database.clone() },
            [format!("SELECT pg_create_physical_replication_slot('{slot}');")],
        )
        .reloaded(facts, "primary_slot_name", &slot)
}

/// What the server's own slots keep, or have lost.
pub(super) fn slots(facts: &ServerFacts) -> Vec<Finding> {
    let mut found = Vec::new();
    for slot in &facts.slots {
        let name = &slot.name;
        let literal = name.replace('\'', "''");
        let drop = format!("SELECT pg_drop_replication_slot('{literal}');");
        match slot.wal_status.as_deref() {
            Some("lost") => found.push(
                Finding::missing(format!(
                    "replication slot \"{name}\" has lost WAL that its standby needs; that one has to be made anew"
                ))
                .mended(Place::Server, [drop])
                .mended(Place::Host, [format!("pg_basebackup --create-slot --slot={name} --write-recovery-conf …")]),
            ),
            Some("unreserved") => found.push(
                Finding::missing(format!("replication slot \"{name}\" is about to lose WAL that its standby needs"))
                    .reloaded(facts, "max_slot_wal_keep_size", "-1"),
            ),
            _ if !slot.active && slot.kept.is_some_and(|kept| kept > KEPT_MAX) => {
                let kept = mebibytes(slot.kept.unwrap_or(0).unsigned_abs());
                let what = format!(
                    "replication slot \"{name}\" is held by nobody and keeps {kept} MiB of WAL; if its standby is \
                     gone for good, drop it"
                );
                found.push(Finding::advice(what).mended(Place::Server, [drop]));
            }
            _ => {}
        }
    }
    found
}
