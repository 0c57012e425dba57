//! Where backups go.
//!
//! A [`Uri`] says where a collection is; [`Stores`] opens it as a [`Store`]: files of a node (its own, or another
//! one's through [`Files`], which every node offers to its peers), or an object store. Whatever holds the bytes, the
//! same few things hold:
//!
//! * A file is whole or not there. Bytes go to a place beside and appear under their name when all of them are durable;
//!   a writer that is dropped leaves nothing that could be taken for a file.
//! * [`Store::create`] writes a name once. When the answer to it was lost, it is found out by reading what is there, so
//!   that the one who won never takes itself for a loser.
//! * Every request has a deadline and a bounded number of tries, every buffer a limit.
//! * Errors name the store by its redacted URI; [`is_transient`] says which may pass.
//!
//! Stores are not believed to keep the promise of writing once: some ignore the condition. Whoever needs it fences by
//! the registry; [`Store::is_write_once`] finds out what to expect.
//!
//! [`Connections`] keeps named URIs in the registry, sealed by [`Seal`]. Nothing outside of this crate knows the
//! library behind the object stores.
//!
//! What a crash leaves: unfinished files in the directory `.part` beside the collections, removed after a day, and on
//! object stores unfinished multipart uploads, which a lifecycle rule of the bucket should remove.

mod connections;
mod directory;
mod files;
mod object;
mod s3;
mod seal;
mod store;
mod trouble;
mod uri;

#[cfg(test)]
mod tests;

use std::sync::Once;
use std::time::Duration;

pub use connections::{Change, Connections, Listed, unknown};
pub use files::{FILES, Files};
pub use seal::Seal;
pub use store::{Created, Entry, LIST_MAX, READ_MAX, Store, Stores, Writer};
pub use trouble::is_transient;
pub use uri::Uri;

/// A request that takes longer has failed and, where that is harmless, is made again. A stream has this long for each
/// piece.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// A request that fails in a way that may pass is made so many times in all; then the last error stands.
const TRIES: usize = 4;

/// The wait before the second try; each further one is twice as long.
const FIRST_DELAY: Duration = Duration::from_millis(100);

/// Makes object stores usable in this process. To be called once rustls has its provider; more calls do nothing.
pub fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(opendal_http_transport_reqwest::install_default);
}
