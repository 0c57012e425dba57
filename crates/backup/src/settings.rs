//! Settings of a client's session that a statement of ours goes by.
//!
//! They are PostgreSQL's placeholder settings (`SET backhaul.x = …`, `options=-c backhaul.x=…`), so PostgreSQL takes any
//! value, and what it means is judged here, by the statement that needs it. An empty one is as good as none: that is
//! what a placeholder setting is after its RESET.

use pgerror::{PgError, SqlState};

use crate::PAUSEPOINTS;
use crate::plan::Requester;
use crate::rules::Wanted;

/// What a pausepoint may end in.
const HOLD: &str = ":hold";

/// The settings, as the session has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `backhaul.debug_pausepoints`.
    pub pausepoints: String,
    /// `backhaul.on_relocation`.
    pub on_relocation: String,
    /// `backhaul.progress`.
    pub progress: String,
    /// `backhaul.backup.balanced_distribution`.
    pub balanced: String,
    /// `backhaul.backup.standby_mode`.
    pub standby_mode: String,
}

/// What an attached client gets when its job has to run elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnRelocation {
    /// The error of the original.
    Error,
    /// What it would have got here.
    Wait,
}

impl Settings {
    /// Their names, values, defaults, and what they do.
    pub fn listed(&self) -> [(&'static str, String, &'static str, &'static str); 5] {
        let value = |value: &str, default: &str| if value.is_empty() { default.to_owned() } else { value.to_owned() };
        [
            (
                "backhaul.backup.balanced_distribution",
                value(&self.balanced, "off"),
                "off",
                "whether all matching nodes that hold a replica share a backup's spans, the leaseholder's or not",
            ),
            (
                "backhaul.backup.standby_mode",
                value(&self.standby_mode, "auto"),
                "auto",
                "what keeps a standby from taking away what is read on it: paused, feedback, retry, or auto",
            ),
            (
                "backhaul.debug_pausepoints",
                value(&self.pausepoints, ""),
                "",
                "where jobs that this session makes stop by themselves, for tests and demonstrations",
            ),
            (
                "backhaul.on_relocation",
                value(&self.on_relocation, "error"),
                "error",
                "what an attached client gets when its job has to run elsewhere: the error, or, with \"wait\", the row",
            ),
            (
                "backhaul.progress",
                value(&self.progress, "off"),
                "off",
                "whether a client that waits for a job is told how far it is",
            ),
        ]
    }

    pub(crate) fn on_relocation(&self) -> Result<OnRelocation, PgError> {
        match self.on_relocation.to_ascii_lowercase().as_str() {
            "" | "error" => Ok(OnRelocation::Error),
            "wait" => Ok(OnRelocation::Wait),
            _ => Err(invalid("backhaul.on_relocation", &self.on_relocation).hint("Available values: error, wait.")),
        }
    }

    /// Whether the client wants to be told how far a job is while it waits.
    ///
    /// # Errors
    ///
    /// 22023 for what is no truth value.
    pub fn progress(&self) -> Result<bool, PgError> {
        truth("backhaul.progress", &self.progress)
    }

    /// Whether all matching nodes that hold a replica share a backup's spans.
    pub(crate) fn balanced(&self) -> Result<bool, PgError> {
        truth("backhaul.backup.balanced_distribution", &self.balanced)
    }

    /// What is to keep a standby from taking away what is read on it.
    pub(crate) fn standby_mode(&self) -> Result<Wanted, PgError> {
        Wanted::parse(&self.standby_mode).ok_or_else(|| {
            invalid("backhaul.backup.standby_mode", &self.standby_mode)
                .hint("Available values: auto, paused, feedback, retry.")
        })
    }
}

/// A truth value as PostgreSQL reads it; an empty text is false.
fn truth(name: &str, value: &str) -> Result<bool, PgError> {
    let value = value.to_ascii_lowercase();
    let begins = |whole: &str, least: usize| value.len() >= least && whole.starts_with(&value);
    if begins("true", 1) || begins("yes", 1) || value == "on" || value == "1" {
        Ok(true)
    } else if value.is_empty() || begins("false", 1) || begins("no", 1) || begins("off", 2) || value == "0" {
        Ok(false)
    } else {
        // PostgreSQL's own words.
        let message = format!("parameter \"{name}\" requires a Boolean value");
        Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message))
    }
}

impl Requester {
    /// Where a job that this one makes is to pause by itself.
    pub(crate) fn pausepoints(&self) -> Result<Vec<String>, PgError> {
        let setting = &self.settings.pausepoints;
        let named: Vec<String> =
            setting.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
        let is_known = |name: &String| PAUSEPOINTS.contains(&name.strip_suffix(HOLD).unwrap_or(name));
        if let Some(unknown) = named.iter().find(|name| !is_known(name)) {
            let hint = format!("Available values: {}; each may end in {HOLD}.", PAUSEPOINTS.join(", "));
            return Err(invalid("backhaul.debug_pausepoints", unknown).hint(hint));
        }
        if !named.is_empty() && !self.superuser {
            let message = "only superusers may set pausepoints for a job";
            return Err(
                PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).hint("Use RESET backhaul.debug_pausepoints.")
            );
        }
        Ok(named)
    }
}

fn invalid(name: &str, value: &str) -> PgError {
    // PostgreSQL's own words.
    PgError::new(SqlState::INVALID_PARAMETER_VALUE, format!("invalid value for parameter \"{name}\": \"{value}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truth_is_read_as_postgresql_reads_it() {
        for (value, expected) in [
            ("", Some(false)),
            ("on", Some(true)),
            ("ON", Some(true)),
            ("t", Some(true)),
            ("yes", Some(true)),
            ("1", Some(true)),
            ("of", Some(false)),
            ("n", Some(false)),
            ("0", Some(false)),
            ("o", None),
            ("truely", None),
            ("2", None),
        ] {
            let settings = Settings { progress: value.to_owned(), ..Settings::default() };
            assert_eq!(settings.progress().ok(), expected, "{value}");
        }
    }

    #[test]
    fn pausepoints_are_known_names_of_a_superuser() {
        let requester = |pausepoints: &str, superuser| Requester {
            user: "me".to_owned(),
            superuser,
            statement_timeout: None,
            database: "db".to_owned(),
            search_path: Vec::new(),
            settings: Settings { pausepoints: pausepoints.to_owned(), ..Settings::default() },
        };
        let first = PAUSEPOINTS[0];
        let named = requester(&format!(" {first}, {first}:hold,"), true).pausepoints();
        assert_eq!(named, Ok(vec![first.to_owned(), format!("{first}:hold")]));
        assert_eq!(requester(" ", false).pausepoints(), Ok(Vec::new()));
        let denied = requester(first, false).pausepoints().expect_err("not a superuser");
        assert_eq!(denied.code, SqlState::INSUFFICIENT_PRIVILEGE);
        for unknown in ["nowhere", ":hold", &format!("{first}:held")] {
            let refused = requester(unknown, true).pausepoints().expect_err(unknown);
            assert_eq!(refused.code, SqlState::INVALID_PARAMETER_VALUE);
            assert!(refused.hint.is_some_and(|hint| hint.contains(first)), "{unknown}");
        }
    }
}
