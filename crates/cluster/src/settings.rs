//! Settings of the whole fleet.
//!
//! They stand in the registry, one row each where they are not the default, so that every node goes by the same ones and
//! a failover keeps them. A node hears of a change with its next heartbeat; whatever must not miss one reads the
//! registry. CockroachDB's names are used where it has such a setting.

use std::collections::BTreeMap;
use std::time::Duration;

use pgerror::{PgError, SqlState};

/// What a setting may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A truth value.
    Bool,
    /// A time, between these many milliseconds.
    Duration(i64, i64),
    /// Bytes: none, or between these many.
    Bytes(i64, i64),
    /// A number: none, or between these.
    Count(i64, i64),
}

/// A setting.
#[derive(Debug)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// What it does.
    pub description: &'static str,
    /// The name of its row.
    row: &'static str,
    /// In milliseconds, in bytes, a number, or 0 and 1.
    default: i64,
}

const MINUTE: i64 = 60_000;
const DAY: i64 = 24 * 60 * MINUTE;
const KIB: i64 = 1024;

/// A session that lives for less would end while a busy server answers a single heartbeat.
const LIFE_MIN: i64 = 300;

/// With a longer life, the jobs of a node that died would wait for longer than anybody has patience.
const LIFE_MAX: i64 = 10 * MINUTE;

/// Whoever waits for a job has to find its row when it has ended.
const RETENTION_MIN: i64 = MINUTE;
const RETENTION_MAX: i64 = 3660 * DAY;

/// With less, a single piece of rows would be waited for so long that its server gives up.
const RATE_MIN: i64 = 64 * KIB;
const RATE_MAX: i64 = 1024 * KIB * KIB * KIB;

/// A point that may not grow this old cannot be read at all.
const AGE_MIN: i64 = MINUTE;
const AGE_MAX: i64 = 30 * DAY;

/// A standby that stands for longer is none any more.
const PAUSE_MIN: i64 = 1000;
const PAUSE_MAX: i64 = DAY;

/// With less, the WAL of one moment would end every pause; and no disk has more.
const ROOM_MIN: i64 = 1024 * KIB;
const ROOM_MAX: i64 = 1024 * 1024 * KIB * KIB * KIB;

/// With fewer, a busy primary would end a backup before it begins. Of more than these PostgreSQL would stop itself.
const XMIN_MIN: i64 = 10_000;
const XMIN_MAX: i64 = 1_000_000_000;

/// All of them, by name.
pub const SETTINGS: [Setting; 11] = [
    Setting {
        name: "bulkio.backup.node_rate_limit",
        kind: Kind::Bytes(RATE_MIN, RATE_MAX),
        description: "how many bytes of rows a node reads for backups in a second, all its jobs together; 0 is no limit",
        row: "bulkio.backup.node_rate_limit",
        default: 0,
    },
    Setting {
        name: "bulkio.backup.snapshot_age_limit",
        kind: Kind::Duration(AGE_MIN, AGE_MAX),
        description: "how old the point of a backup may grow while it is read; beyond it the backup fails",
        row: "bulkio.backup.snapshot_age_limit",
        default: DAY,
    },
    Setting {
        name: "bulkio.backup.standby_free_space_floor",
        kind: Kind::Bytes(ROOM_MIN, ROOM_MAX),
        description: "with less room on its disk a standby is not kept paused for a backup; 0 is no floor",
        row: "bulkio.backup.standby_free_space_floor",
        default: 2 * KIB * KIB * KIB,
    },
    Setting {
        name: "bulkio.backup.standby_lag_limit",
        kind: Kind::Bytes(ROOM_MIN, ROOM_MAX),
        description: "a standby with more WAL between it and its primary is passed over by backups; 0 is no limit",
        row: "bulkio.backup.standby_lag_limit",
        default: KIB * KIB * KIB,
    },
    Setting {
        name: "bulkio.backup.standby_pause_limit",
        kind: Kind::Duration(PAUSE_MIN, PAUSE_MAX),
        description: "how long a standby is kept paused for backups; beyond it replay goes on, and so do they",
        row: "bulkio.backup.standby_pause_limit",
        default: 30 * MINUTE,
    },
    Setting {
        name: "bulkio.backup.standby_wal_limit",
        kind: Kind::Bytes(ROOM_MIN, ROOM_MAX),
        description: "with more WAL to replay a standby is kept neither paused nor waiting for a backup; 0 is no limit",
        row: "bulkio.backup.standby_wal_limit",
        default: 8 * KIB * KIB * KIB,
    },
    Setting {
        name: "bulkio.backup.xmin_age_limit",
        kind: Kind::Count(XMIN_MIN, XMIN_MAX),
        description: "of how many transactions a backup may keep dead rows on a primary; beyond it, it fails; 0 is no limit",
        row: "bulkio.backup.xmin_age_limit",
        default: 100_000_000,
    },
    Setting {
        name: "feature.backup.enabled",
        kind: Kind::Bool,
        description: "whether BACKUP may make jobs; those that exist go on",
        row: "feature.backup.enabled",
        default: 1,
    },
    Setting {
        name: "feature.restore.enabled",
        kind: Kind::Bool,
        description: "whether RESTORE may make jobs; those that exist go on",
        row: "feature.restore.enabled",
        default: 1,
    },
    Setting {
        name: "jobs.retention_time",
        kind: Kind::Duration(RETENTION_MIN, RETENTION_MAX),
        description: "how long a job that has ended is kept in the registry",
        row: "jobs.retention_time",
        default: 14 * DAY,
    },
    Setting {
        name: "server.sqlliveness.ttl",
        kind: Kind::Duration(LIFE_MIN, LIFE_MAX),
        description: "how long a node that is not heard of keeps its jobs",
        // The registry's first version has it under this name.
        row: "session_life_ms",
        default: 10_000,
    },
];

impl Setting {
    /// The one of this name.
    ///
    /// # Errors
    ///
    /// 42704 when there is none.
    pub fn named(name: &str) -> Result<&'static Self, PgError> {
        SETTINGS.iter().find(|setting| setting.name == name).ok_or_else(|| {
            PgError::new(SqlState::UNDEFINED_OBJECT, format!("unknown cluster setting '{name}'"))
                .hint("SHOW CLUSTER SETTINGS lists them; those of a session are set with SET backhaul.name = value.")
        })
    }

    /// Its kind by CockroachDB's letter.
    pub fn letter(&self) -> &'static str {
        match self.kind {
            Kind::Bool => "b",
            Kind::Duration(..) => "d",
            Kind::Bytes(..) => "z",
            Kind::Count(..) => "i",
        }
    }

    /// Reads a value as a user writes it.
    ///
    /// # Errors
    ///
    /// 22023: it is no such value, or it is out of range; the HINT says what would be one.
    pub fn parse(&self, text: &str) -> Result<i64, PgError> {
        let invalid = |what: &str| {
            let message = format!("invalid value for cluster setting \"{}\": \"{text}\"", self.name);
            PgError::new(SqlState::INVALID_PARAMETER_VALUE, message).hint(what.to_owned())
        };
        let between = |least, most| format!("It has to be between {} and {}", self.print(least), self.print(most));
        match self.kind {
            Kind::Bool => truth(text).map(i64::from).ok_or_else(|| invalid("It has to be true or false.")),
            Kind::Duration(least, most) => measured(text, &TIMES)
                .filter(|value| (least..=most).contains(value))
                .ok_or_else(|| invalid(&format!("{}, with a unit: ms, s, min, h or d.", between(least, most)))),
            Kind::Bytes(least, most) => measured(text, &SIZES)
                .filter(|value| *value == 0 || (least..=most).contains(value))
                .ok_or_else(|| invalid(&format!("{}, or 0; units are B, KiB, MiB and GiB.", between(least, most)))),
            Kind::Count(least, most) => (text.trim().parse().ok())
                .filter(|value| *value == 0 || (least..=most).contains(value))
                .ok_or_else(|| invalid(&format!("{}, or 0.", between(least, most)))),
        }
    }

    /// A value as it is shown.
    pub fn print(&self, value: i64) -> String {
        match self.kind {
            Kind::Bool => (value != 0).to_string(),
            Kind::Duration(..) => in_units(value, &["d", "h", "min", "s", "ms"], &TIMES, ""),
            Kind::Bytes(..) => in_units(value, &["GiB", "MiB", "KiB", "B"], &SIZES, " "),
            Kind::Count(..) => value.to_string(),
        }
    }

    /// What stands in the registry for a value.
    pub fn stored(&self, value: i64) -> String {
        match self.kind {
            Kind::Bool => (value != 0).to_string(),
            Kind::Duration(..) | Kind::Bytes(..) | Kind::Count(..) => value.to_string(),
        }
    }

    /// The name of its row in the registry.
    pub fn row(&self) -> &'static str {
        self.row
    }

    /// The value that it has unless it is set.
    pub fn default(&self) -> i64 {
        self.default
    }
}

/// Units of time, in milliseconds, and of size, in bytes; the first is meant where none is told.
const TIMES: [(&str, i64); 7] =
    [("ms", 1), ("s", 1000), ("m", MINUTE), ("min", MINUTE), ("h", 60 * MINUTE), ("d", DAY), ("day", DAY)];
const SIZES: [(&str, i64); 7] = [
    ("b", 1),
    ("kib", KIB),
    ("mib", KIB * KIB),
    ("gib", KIB * KIB * KIB),
    // As PostgreSQL's settings have them.
    ("kb", KIB),
    ("mb", KIB * KIB),
    ("gb", KIB * KIB * KIB),
];

/// Numbers with units, one behind the other, as their sum: `1h30m`, `14 days`, `16MiB`.
fn measured(text: &str, units: &[(&str, i64)]) -> Option<i64> {
    let mut rest = text.trim();
    let mut sum: Option<i64> = None;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: i64 = rest[..digits].parse().ok()?;
        let behind = rest[digits..].trim_start();
        let letters = behind.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(behind.len());
        let (unit, next) = behind.split_at(letters);
        let unit = unit.to_ascii_lowercase();
        let factor = match unit.as_str() {
            "" => units.first()?.1,
            unit => units.iter().find(|(name, _)| *name == unit || format!("{name}s") == unit)?.1,
        };
        sum = Some(sum.unwrap_or(0).checked_add(number.checked_mul(factor)?)?);
        rest = next.trim_start();
    }
    sum
}

/// In the largest unit of which it is a whole number.
fn in_units(value: i64, names: &[&str], units: &[(&str, i64)], between: &str) -> String {
    let factor = |name: &str| units.iter().find(|(unit, _)| unit.eq_ignore_ascii_case(name)).map_or(1, |unit| unit.1);
    let name = names.iter().find(|name| value != 0 && value % factor(name) == 0);
    let name = name.or(names.last()).copied().unwrap_or_default();
    format!("{}{between}{name}", value / factor(name))
}

/// A truth value as it is written in either database.
fn truth(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "t" | "on" | "yes" | "1" => Some(true),
        "false" | "f" | "off" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// What a backup may cost a server that it reads, and that server's primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// How many bytes of WAL a standby may be behind its primary when it is chosen; 0 is any number.
    pub lag: u64,
    /// How long replay of a standby is kept paused.
    pub pause: Duration,
    /// Bytes of WAL that may wait to be replayed meanwhile; 0 is any number.
    pub wal: u64,
    /// Bytes that have to be free on the standby's disk; 0 is none.
    pub free: u64,
    /// How old a point may grow.
    pub age: Duration,
    /// Of how many transactions a primary may have to keep dead rows; 0 is any number.
    pub xmin_age: u64,
}

/// The values of all settings at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FleetSettings(BTreeMap<&'static str, i64>);

impl FleetSettings {
    /// From the rows of the registry. What somebody wrote there by hand and is no value counts as not set.
    pub fn of_rows(rows: impl IntoIterator<Item = (String, String)>) -> Self {
        let known = |(row, value): (String, String)| {
            let setting = SETTINGS.iter().find(|setting| setting.row == row)?;
            // The bounds are for people; a test may go below them.
            let value = match setting.kind {
                Kind::Bool => truth(&value).map(i64::from),
                Kind::Duration(..) | Kind::Bytes(..) | Kind::Count(..) => {
                    value.parse().ok().filter(|value: &i64| *value >= 0)
                }
            };
            value.map(|value| (setting.name, value))
        };
        Self(rows.into_iter().filter_map(known).collect())
    }

    /// The value of a setting.
    pub fn get(&self, setting: &Setting) -> i64 {
        self.0.get(setting.name).copied().unwrap_or(setting.default)
    }

    fn named(&self, name: &str) -> i64 {
        SETTINGS.iter().find(|setting| setting.name == name).map_or(0, |setting| self.get(setting))
    }

    /// Sees to it that a feature (`backup`, `restore`) has not been switched off; `statement` is what it is called.
    ///
    /// # Errors
    ///
    /// 57000, in CockroachDB's words.
    pub fn check_feature(&self, feature: &str, statement: &str) -> Result<(), PgError> {
        let name = format!("feature.{feature}.enabled");
        if self.named(&name) != 0 {
            return Ok(());
        }
        let message = format!("feature {statement} was disabled by the database administrator");
        Err(PgError::new(SqlState::OPERATOR_INTERVENTION, message)
            .hint(format!("A superuser allows it again with SET CLUSTER SETTING {name} = true.")))
    }

    /// How many bytes of rows this node may read for backups in a second; `None` is any number.
    pub fn backup_rate(&self) -> Option<u64> {
        u64::try_from(self.named("bulkio.backup.node_rate_limit")).ok().filter(|rate| *rate > 0)
    }

    /// How long, and at what price for others, a backup may hold back what it reads.
    pub fn holding(&self) -> Holding {
        let number = |name: &str| u64::try_from(self.named(&format!("bulkio.backup.{name}"))).unwrap_or(0);
        Holding {
            lag: number("standby_lag_limit"),
            pause: Duration::from_millis(number("standby_pause_limit")),
            wal: number("standby_wal_limit"),
            free: number("standby_free_space_floor"),
            age: Duration::from_millis(number("snapshot_age_limit")),
            xmin_age: number("xmin_age_limit"),
        }
    }

    /// How long a node that is not heard of keeps its jobs.
    pub fn session_life(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.named("server.sqlliveness.ttl")).unwrap_or(0))
    }

    /// How long a job that has ended is kept.
    pub fn retention(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.named("jobs.retention_time")).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_people_write_it_and_shown_in_one_way() {
        for (name, text, shown) in [
            ("feature.backup.enabled", "FALSE", "false"),
            ("feature.backup.enabled", "on", "true"),
            ("feature.restore.enabled", "0", "false"),
            ("server.sqlliveness.ttl", "10s", "10s"),
            ("server.sqlliveness.ttl", "5000", "5s"),
            ("server.sqlliveness.ttl", "1m30s", "90s"),
            ("server.sqlliveness.ttl", "300 ms", "300ms"),
            ("jobs.retention_time", "336h0m0s", "14d"),
            ("jobs.retention_time", "2 Days 12 hours", ""),
            ("jobs.retention_time", "2 days 12h", "60h"),
            ("bulkio.backup.node_rate_limit", "16MiB", "16 MiB"),
            ("bulkio.backup.node_rate_limit", "16 mb", "16 MiB"),
            ("bulkio.backup.node_rate_limit", "65537", "65537 B"),
            ("bulkio.backup.node_rate_limit", "0", "0 B"),
            ("feature.backup.enabled", "perhaps", ""),
            ("feature.backup.enabled", "", ""),
            ("server.sqlliveness.ttl", "299ms", ""),
            ("server.sqlliveness.ttl", "11 min", ""),
            ("server.sqlliveness.ttl", "-10s", ""),
            ("server.sqlliveness.ttl", "10 parsecs", ""),
            ("jobs.retention_time", "0", ""),
            ("jobs.retention_time", "99999999999999999d", ""),
            ("bulkio.backup.node_rate_limit", "1 KiB", ""),
            ("bulkio.backup.xmin_age_limit", "50000000", "50000000"),
            ("bulkio.backup.xmin_age_limit", "0", "0"),
            ("bulkio.backup.xmin_age_limit", "many", ""),
            ("bulkio.backup.xmin_age_limit", "9999", ""),
            ("bulkio.backup.standby_wal_limit", "64 MiB", "64 MiB"),
            ("bulkio.backup.standby_pause_limit", "90min", "90min"),
            ("bulkio.backup.standby_pause_limit", "0", ""),
        ] {
            let setting = Setting::named(name).expect(name);
            match setting.parse(text) {
                Ok(value) => assert_eq!(setting.print(value), shown, "{name} = {text}"),
                Err(error) => {
                    assert_eq!((shown, error.code), ("", SqlState::INVALID_PARAMETER_VALUE), "{name} = {text}");
                    assert!(error.hint.is_some_and(|hint| hint.starts_with("It has to be")), "{name} = {text}");
                }
            }
        }
    }

    #[test]
    fn what_is_shown_can_be_set() {
        for setting in &SETTINGS {
            let shown = setting.print(setting.default);
            assert_eq!(setting.parse(&shown), Ok(setting.default), "{}", setting.name);
            let row = (setting.row.to_owned(), setting.stored(setting.default));
            assert_eq!(FleetSettings::of_rows([row]).get(setting), setting.default);
        }
        assert!(SETTINGS.is_sorted_by_key(|setting| setting.name));
    }

    #[test]
    fn rows_that_mean_nothing_are_defaults() {
        let rows = [("session_life_ms", "soon"), ("jobs.retention_time", "-1"), ("other", "1")];
        let settings = FleetSettings::of_rows(rows.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(settings, FleetSettings::default());
        assert_eq!(settings.retention(), Duration::from_secs(14 * 24 * 3600));
        assert_eq!(settings.session_life(), Duration::from_secs(10));
        assert_eq!(settings.backup_rate(), None);
        assert_eq!(settings.check_feature("backup", "BACKUP"), Ok(()));
        let off = FleetSettings::of_rows([("feature.backup.enabled".to_owned(), "false".to_owned())]);
        let error = off.check_feature("backup", "BACKUP").expect_err("switched off");
        assert_eq!(error.message, "feature BACKUP was disabled by the database administrator");
        assert_eq!(error.code.as_str(), "57000");
    }
}
