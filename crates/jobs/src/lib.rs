//! Jobs: durable intentions, and who works on them.
//!
//! A job is a row in the registry. It outlives the client that asked for it, the node that took the statement and the
//! node that works on it. What a job does is not known here: for each type of job somebody registers a [`Resumer`],
//! and this crate decides which node calls it, and when.
//!
//! **Claims.** A node works on a job only while the row carries its claim: a fresh id, the node, and the session by
//! which the node is alive ([`cluster::registry`]). Every write to a row is guarded by the claim id ([`run`]), so one
//! that lost its claim finds out at its next write, and changes nothing. A node that cannot renew its session stops by
//! its own clock before others may take over ([`runner`]). What a claim obliges to (run the job, pause it) is done in
//! [`attend`], the removal of what a job made in [`revert`]; people ask for it by [`control`].
//!
//! **The gateway check** ([`gate`]). Whoever holds a claim first compares its own locality with the job's filter. If it
//! does not match, it writes the claim over to a live node that does and rings; that takes milliseconds. A client that
//! waits attached is told so: `execution of job N relocated to M`. A job that nobody waits for is handed over also by a
//! node that matches, once, when another one is the better coordinator.
//!
//! **Transactions** ([`settle`]). A job may be made inside a transaction of its client's: its row is written at once, and
//! is there for others only when that transaction has committed. A registry that is lost while a row is written is asked
//! again, so that the job is there once and its client is told the truth ([`made`]).
//!
//! **Ringing.** Nodes LISTEN on one channel ([`ledger`]). A notification says only that something has changed; what,
//! is read from the rows, so a lost one costs a moment and nothing else. Rows are written and rung for in separate
//! transactions: together they would hold a lock of the whole server while a synchronous standby is awaited.
//!
//! **The end.** A job that has ended is forgotten after a while ([`retention`]); it, and more, is a setting of the fleet
//! ([`settings`]).

mod attend;
mod birth;
mod control;
mod gate;
mod job;
mod ledger;
mod made;
mod retention;
mod revert;
mod run;
mod runner;
mod settings;
mod settle;
mod show;

pub use attend::may_pass;
pub use birth::{Birth, Transaction};
pub use control::{Control, Controller};
pub use job::{Job, JobId, NewJob, Taken};
pub use ledger::Ledger;
pub use run::{LostClaim, Retryable, Run};
pub use runner::{Jobs, Resumer};
