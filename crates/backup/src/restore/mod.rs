//! Restores: from a statement to databases under their own names.
//!
//! [`plan`] judges the statement, and touches no store, because the gateway may be a node that must not. Which shard's
//! part goes where is [`shard_map`]'s, and what of the backup comes back [`parts`] tells. On the coordinator, [`story`]
//! finds the backup and verifies its index ([`source`]), has databases made beside each shard's leaseholder under
//! temporary names, deals their files to workers ([`import`]), and has the rest built and the databases named and given
//! to their user when every table has its rows ([`giving`]). What happens in a database itself is [`fleet::loader`]'s.
//!
//! **What a crash leaves.** Databases `_backhaul_<job>`, `_backhaul_<job>_1` and so on with the job's mark, which the
//! next coordinator takes up: which files are in them stands in the databases themselves, committed with their rows. A
//! job that fails removes them.

mod created;
mod giving;
mod import;
mod parts;
mod plan;
mod shard_map;
mod show;
mod source;
mod story;
mod target;

pub use created::Created;
pub use import::{IMPORT, Import};
pub use show::{SHOW, Show, Shown};
pub(crate) use source::places;
#[cfg(test)]
pub(crate) use story::may_pass;
pub use story::{RESTORE_TYPE, ResumeRestore};
