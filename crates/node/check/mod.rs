//! `backhaul check`: what each server of a fleet lacks for backups and restores, with the statements that mend it.
//!
//! A node can be asked about its own server and host, and any node about the fleet: it asks all others and puts
//! together what they say ([`service`]). What the facts mean is decided there by pure rules ([`rules`], [`following`],
//! [`anew`], and for one server alone `fleet::readiness`), and printed here ([`report`]). Before there is any node, one
//! server can be looked at from its host.

mod anew;
mod following;
mod report;
mod rules;
mod service;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use cluster::settings::FleetSettings;
use cluster::{Dialer, Purpose};
use fleet::Server;
use fleet::readiness::{self, Seat};
use sql::Verb;

use self::report::{Part, Report};
use self::service::Request;
pub(crate) use self::service::{CHECK, Check, Place};
use crate::flags::CheckFlags;
use crate::print_line;

/// The node that is asked has to ask all others first.
const DEADLINE: Duration = Duration::from_secs(120);

/// Prints what is missing; the code tells whether anything is.
///
/// # Errors
///
/// The node cannot be reached or refuses the secret, or the connection string cannot be read.
pub(crate) async fn run(flags: &CheckFlags) -> anyhow::Result<ExitCode> {
    let report = match &flags.postgres {
        Some(conninfo) => of_server(&Server::from_conninfo(conninfo)?, flags.trust.insecure).await,
        None => of_fleet(flags).await?,
    };
    report.lines().iter().for_each(|line| print_line(line));
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn of_fleet(flags: &CheckFlags) -> anyhow::Result<Report> {
    let dialer = Dialer::new(flags.trust.secret(), flags.trust.authority()?, "backhaul check".to_owned());
    let session = dialer.dial(&flags.host, &Purpose::Verbs).await?;
    let request = serde_json::to_string(&Request::Fleet)?;
    let answer = session.ask(Verb::Call { service: CHECK.to_owned(), request }, DEADLINE).await?;
    serde_json::from_str(&answer).context("read what the node found")
}

/// One server, without a fleet around it.
async fn of_server(server: &Server, insecure: bool) -> Report {
    let seat = Seat {
        insecure,
        readers: backup::READERS,
        lag_max: FleetSettings::default().holding().lag,
        slot_name: "backhaul".to_owned(),
        ..Seat::default()
    };
    let (title, findings) = match readiness::read(server, !insecure).await {
        Ok(facts) => {
            let title = format!(
                "server {}: PostgreSQL {}, {}",
                facts.address,
                facts.release(),
                readiness::reading(&facts, &seat)
            );
            (title, readiness::findings(&facts, &seat))
        }
        Err(closed) => (format!("server {}", closed.address), vec![readiness::closed(&closed)]),
    };
    let note = "one server alone was looked at: who follows whom, and on which timeline, is seen by a check of the fleet, \
                backhaul check --host";
    Report { parts: vec![Part { title, findings }], note: Some(note.to_owned()) }
}
