//! A program of PostgreSQL that was ended by a signal.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use pgerror::{PgError, SqlState};

/// How a program has failed. One that a signal has ended says nothing itself: the kernel ends one when memory runs out, an
/// operator by mistake. It may be started again, as after the crash of a server.
pub(crate) fn told(failed: PgError, status: ExitStatus) -> PgError {
    let Some(signal) = status.signal() else { return failed };
    PgError { code: SqlState::CRASH_SHUTDOWN, ..failed }
        .detail(format!("It was ended by signal {signal}."))
        .hint("The kernel's log on the node's host says whether its memory has run out.")
}
