//! From text to our statements.
//!
//! Nearly everything that passes a node is PostgreSQL's and must reach it untouched. So reading a text happens in two
//! steps of very different cost. [`is_ours`] looks at the first words of the raw bytes, whatever their encoding, and
//! is asked for every statement of every client. Only what it accepts is tokenized and parsed ([`parse`]), with
//! positions, so that an error points at the character it means.
//!
//! We take only texts that a bare PostgreSQL rejects: `SHOW LOCALITY` is 42704 there. What we do not take is never
//! judged: a text that this crate cannot tokenize is simply not ours.
//!
//! The verbs that nodes speak among themselves ([`Verb`]) are texts too and are printed and read here, so that both
//! ends of a peer session share one definition.
//!
//! Nothing here is async and nothing here does I/O.

mod parser;
mod scan;
mod verb;

pub use parser::{Statement, parse};
pub use scan::is_ours;
pub use verb::Verb;
