//! From text to our statements.
//!
//! Nearly everything that passes a node is PostgreSQL's and must reach it untouched. So reading a text happens in two
//! steps of very different cost. [`is_ours`] looks at the first words of the raw bytes, whatever their encoding, and
//! is asked for every statement of every client. Only what it accepts is tokenized and parsed ([`parse`]), with
//! positions, so that an error points at the character it means.
//!
//! We take only texts that a bare PostgreSQL rejects: `SHOW LOCALITY` is 42704 there, `BACKUP` 42601. What we do not
//! take is never judged: a text that this crate cannot tokenize is simply not ours.
//!
//! A text of PostgreSQL's may have a SHOW of ours where a table could stand. [`has_row_source`] finds that out for every
//! text, too: cheaply, because it looks for the word first. [`Sourced`] reads such a text and puts rows into it. A text of
//! several statements may have ours among PostgreSQL's: [`is_mixed`] finds that out, and [`read_mixed`] cuts it.
//!
//! The grammar is CockroachDB's. What it allows and we cannot do yet is read to its end and then refused by its name
//! (0A000), so that nobody looks for a typing error in a sound statement. A statement may carry a store's keys in its
//! URIs: they are in no `Debug` output and, in the echo of a text that does not parse, replaced by stars.
//!
//! The verbs that nodes speak among themselves ([`Verb`]) are texts too and are printed and read here, so that both
//! ends of a peer session share one definition.
//!
//! Nothing here is async and nothing here does I/O.

mod backup;
mod collection;
mod control;
mod cursor;
mod expression;
mod external;
mod grant;
mod lexer;
mod names;
mod options;
mod parameters;
mod parser;
mod print;
mod ranges;
mod restore;
mod rows;
mod scan;
mod schedules;
mod script;
mod selection;
mod settings;
mod show;
mod show_backup;
mod statement;
mod syntax;
mod targets;
mod verb;

pub use control::{ControlJobs, ControlVerb};
pub use grant::{Grant, Privilege};
pub use parameters::ParameterType;
pub use parser::parse;
pub use print::Literals;
pub use rows::{Inner, Put, Rewritten, RowSource, Sourced, has_row_source};
pub use scan::is_ours;
pub use script::{Part, PartWork, is_mixed, read_mixed};
pub use selection::{IDS_MAX, JobKind, Query, Selection};
pub use settings::Settings;
pub use statement::{
    Backup, BackupOptions, Number, RangesOf, Restore, RestoreOptions, ShowBackup, ShowBackupOptions, ShowBackupWhat,
    ShowJobs, ShowRanges, Statement, Subdir, Text,
};
pub use targets::Targets;
pub use verb::Verb;
