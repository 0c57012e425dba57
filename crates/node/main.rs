//! The program: one binary for nodes, for the tools around them, and for a fleet to try.

mod check;
mod client;
mod demo;
mod flags;
mod health;
mod init;
mod start;
mod status;

use std::process::ExitCode;

use clap::Parser as _;
use flags::{Command, Flags, NodeCommand};

fn main() -> ExitCode {
    let flags = Flags::parse();
    // With ring as the only provider in the tree this cannot have been done before, and cannot fail.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    let outcome = runtime.block_on(run(flags.command));
    // Tasks that are still open have said what they had to say.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| failed(&error))
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Start(start) => start::run(start).await.map(|()| ExitCode::SUCCESS),
        Command::Init(init) => init::run(&init, print_line).await.map(|()| ExitCode::SUCCESS),
        Command::Node { command: NodeCommand::Status(status) } => {
            status::run(&status).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Check(flags) => check::run(&flags).await,
        Command::Demo(demo) => demo::run(&demo).await,
        Command::DemoReaper { dir, remove, network_of } => {
            demo::reap(&dir, remove, network_of).map(|()| ExitCode::SUCCESS)
        }
        Command::Version => {
            print_line(&format!("backhaul {}", env!("CARGO_PKG_VERSION")));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The only place where an error is printed.
fn failed(error: &anyhow::Error) -> ExitCode {
    use std::io::Write as _;
    // With nobody to read it there is nothing left to do.
    let _ = writeln!(std::io::stderr(), "ERROR: {error:#}");
    ExitCode::FAILURE
}

/// Prints a line for the user beside results that somebody may read from standard output.
fn print_beside(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints a line for the user; a reader who has left (`| head`) is no error.
fn print_line(line: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
