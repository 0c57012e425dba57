//! Backups: from a statement to a sealed manifest, and back.
//!
//! Read in this order. [`plan`] judges a statement before anything exists: filter, databases (and the shards that hold
//! them: [`targets`], [`whole`]), rights, URI. A job is made, and on whichever node coordinates it, [`resume`] tells the story step by step: the lock, a point for each
//! shard ([`point`]) on a server that the rules choose ([`rules`]), spans cut from tables ([`spans`]) and dealt to
//! workers ([`mod@assign`], [`queues`], [`deal`], [`busy`]) that may be [`away`] for a moment, their export watched ([`drive`]), tables that keep changing held still
//! ([`hold`]), the manifest written and sealed ([`manifest`], [`seal`], [`written`]), and what is left over removed ([`revert`]) wherever it is ([`holders`]). What a worker does with one span is [`export`], and how fast [`limit`];
//! how far a job is [`pace`] says, what it read outside of its locality [`elsewhere`], and which value of a sequence counts [`sequences`]. The way back is
//! [`restore`]. What is in a backup, and under which names, is [`layout`]; how it opens without us is [`restore_text`];
//! what a plan looks like before it is carried out is [`explain`], and the spans by themselves are [`ranges`];
//! what a session sets is [`settings`], who may name a store [`privileges`], where a job can be made to stop [`pausepoints`].
//!
//! **What a crash leaves.** Objects are written once and under names that carry the claim, so two coordinators of one
//! job never write the same object. Before the seal there is a lock and files that nobody's manifest names; after it
//! the backup is whole. Finished spans stand in the job's checkpoint, as long as the point they were read at lives.
//!
//! **What a filter means.** Only matching nodes are given spans, and a worker that is asked checks once more. The node
//! that lends founders may be any node: it reads rows, but never touches the store.

mod assign;
mod away;
mod busy;
mod deal;
mod drive;
mod elsewhere;
mod explain;
mod export;
mod hold;
mod holders;
mod layout;
mod limit;
mod manifest;
mod pace;
mod patience;
mod pausepoints;
mod plan;
mod point;
mod privileges;
mod queues;
mod ranges;
mod restore;
mod restore_text;
mod resume;
mod revert;
mod rules;
mod seal;
mod sequences;
mod settings;
mod spans;
mod targets;
mod together;
mod whole;
mod written;

pub use assign::{Anchor, Share, Worker, assign, sharers};
pub use export::{EXPORT, Export, PROBE, Probe};
pub use layout::COLLECTION_FILES;
pub use manifest::{FileEntry, Manifest, ShardPart, left_out, left_out_of};
pub use pausepoints::PAUSEPOINTS;
pub use plan::{Backups, Finished, OnWait, Outcome, Requester, SealSource};
pub use point::READERS;
pub use ranges::{Range, Region};
pub use restore::{Created, IMPORT, Import, RESTORE_TYPE, ResumeRestore, SHOW, Show, Shown};
pub use resume::{JOB_TYPE, Resume};
pub use rules::{
    Apart, Chosen, Decision, Exclusion, Fleet, Hindrance, Mode, Place, Reason, Replica, Replicas, Rules, Standing,
    TOGETHER_MAX, Wanted, anchor, choose, decide, nearest, workers,
};
pub use settings::Settings;
