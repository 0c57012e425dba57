//! Settings of the fleet and of the session: shown, and the former set.

use std::sync::LazyLock;

use backup::Requester;
use cluster::settings::{FleetSettings, SETTINGS, Setting};
use pgerror::{PgError, SqlState};
use sql::{Settings, Text};

use crate::Gateway;
use crate::answer::{Answer, Column, Kind, Value, column};
use crate::route::TARGET;

/// `SHOW ALL BACKHAUL SETTINGS`.
const ALL: [Column; 5] = [
    column("name", Kind::Text),
    column("value", Kind::Text),
    column("default_value", Kind::Text),
    column("scope", Kind::Text),
    column("description", Kind::Text),
];

/// `SHOW CLUSTER SETTINGS`; CockroachDB's columns.
const FLEET: [Column; 6] = [
    column("variable", Kind::Text),
    column("value", Kind::Text),
    column("setting_type", Kind::Text),
    column("description", Kind::Text),
    column("default_value", Kind::Text),
    column("origin", Kind::Text),
];

/// `SHOW CLUSTER SETTING name`: one column, which has the setting's name.
static ONE: LazyLock<Vec<[Column; 1]>> =
    LazyLock::new(|| SETTINGS.iter().map(|setting| [column(setting.name, Kind::Text)]).collect());

/// The columns of an answer.
pub(crate) fn columns(statement: &Settings) -> &'static [Column] {
    match statement {
        Settings::All => &ALL,
        Settings::Fleet => &FLEET,
        // One that does not exist has no row either.
        Settings::One { name } => match SETTINGS.iter().position(|setting| setting.name == *name) {
            Some(index) => &ONE[index],
            None => &ALL[1..2],
        },
        Settings::Set { .. } => &[],
    }
}

/// Runs one of the statements about settings.
pub(crate) async fn run(gateway: &Gateway, statement: &Settings, requester: &Requester) -> anyhow::Result<Answer> {
    let jobs = &gateway.backups.jobs;
    match statement {
        Settings::All => {
            let fleet = jobs.settings().await?;
            let mut rows: Vec<Vec<Value>> = SETTINGS.iter().map(|setting| all_row(setting, &fleet)).collect();
            rows.extend(session_rows(requester));
            Ok(Answer::of(rows))
        }
        Settings::Fleet => {
            let fleet = jobs.settings().await?;
            Ok(Answer::of(SETTINGS.iter().map(|setting| fleet_row(setting, &fleet)).collect()))
        }
        Settings::One { name } => {
            let setting = Setting::named(name)?;
            let value = jobs.settings().await?.get(setting);
            Ok(Answer::of(vec![vec![text(setting.print(value))]]))
        }
        Settings::Set { name, value } => {
            let setting = Setting::named(name)?;
            if !requester.superuser {
                return Err(denied(name).into());
            }
            let value = value.as_ref().and_then(Text::literal);
            let value = value.map_or(Ok(setting.default()), |value| setting.parse(value))?;
            jobs.set(setting, value).await?;
            let (value, user) = (setting.print(value), &requester.user);
            tracing::info!(setting = name, %value, %user, "a setting of the fleet was set");
            Ok(Answer::of(Vec::new()))
        }
    }
}

fn denied(name: &str) -> PgError {
    // CockroachDB's text; the privilege has no other form here yet.
    let message =
        format!("only users with the MODIFYCLUSTERSETTING privilege are allowed to set cluster setting '{name}'");
    PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).hint("Ask a superuser to set it.")
}

fn text(text: impl Into<String>) -> Value {
    Value::Text(Some(text.into()))
}

fn all_row(setting: &Setting, fleet: &FleetSettings) -> Vec<Value> {
    let (value, default) = (setting.print(fleet.get(setting)), setting.print(setting.default()));
    vec![text(setting.name), text(value), text(default), text("fleet"), text(setting.description)]
}

fn session_rows(requester: &Requester) -> impl Iterator<Item = Vec<Value>> + use<> {
    let of_session = requester.settings.listed().map(|(name, value, default, description)| {
        vec![text(name), text(value), text(default), text("session"), text(description)]
    });
    let what =
        "\"local\" leads to the server beside the node, whatever its role; only options=-c at the connection's start";
    // It was spent when the connection was made.
    let of_connection = vec![text(TARGET), Value::Text(None), text("leaseholder"), text("connection"), text(what)];
    of_session.into_iter().chain([of_connection])
}

fn fleet_row(setting: &Setting, fleet: &FleetSettings) -> Vec<Value> {
    let value = fleet.get(setting);
    let origin = if value == setting.default() { "default" } else { "override" };
    let (value, default) = (setting.print(value), setting.print(setting.default()));
    [setting.name, &value, setting.letter(), setting.description, &default, origin].map(text).to_vec()
}
