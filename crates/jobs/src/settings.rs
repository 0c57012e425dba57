//! Settings of the fleet, as jobs and whoever makes them go by them.

use anyhow::Context as _;
use cluster::settings::{FleetSettings, Setting};
use tokio::sync::watch;

use crate::ledger::Ledger;
use crate::run::Run;
use crate::runner::Jobs;

impl Jobs {
    /// The settings as the registry has them now.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn settings(&self) -> anyhow::Result<FleetSettings> {
        read(self.ledger()).await
    }

    /// The settings as this node last heard of them: with its last heartbeat.
    pub fn settings_heard(&self) -> watch::Receiver<FleetSettings> {
        self.registry().settings()
    }

    /// Gives a setting a value for the whole fleet, at once and whatever becomes of the client's transaction.
    ///
    /// # Errors
    ///
    /// The registry is not reachable; whether the setting has the value is then not known.
    pub async fn set(&self, setting: &Setting, value: i64) -> anyhow::Result<()> {
        let write = "INSERT INTO registry.settings (name, value) VALUES ($1, $2)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value";
        let written = self.ledger().query(write, &[&setting.row(), &setting.stored(value)]).await;
        written.context("write a setting of the fleet").map(drop)
    }
}

impl Run {
    /// The settings as the registry has them now.
    ///
    /// # Errors
    ///
    /// The registry is not reachable.
    pub async fn settings(&self) -> anyhow::Result<FleetSettings> {
        read(&self.ledger).await
    }
}

async fn read(ledger: &Ledger) -> anyhow::Result<FleetSettings> {
    let rows = ledger.query("SELECT name, value FROM registry.settings", &[]).await;
    let rows = rows.context("read the settings of the fleet")?;
    Ok(FleetSettings::of_rows(rows.iter().map(|row| (row.get(0), row.get(1)))))
}
