//! How much room is left where a server keeps its data.
//!
//! SQL does not tell it. A node stands on its server's host, so it is asked of the operating system, as far as the
//! node's own user may look there: the directory of the WAL, which may be a disk of its own, or else that of the data.
//! A disk that does not answer keeps nobody waiting; what is not known is told as that.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tokio::time::timeout;
use tokio_postgres::Client;

/// A disk that does not answer by then is one whose room is not known.
const DEADLINE: Duration = Duration::from_secs(2);

/// Only some roles may see where the data is, so for others there is no row.
const DIRECTORY: &str = "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_directory'";

/// The bytes that are free where `path` is, if this process may look there.
pub fn free(path: &Path) -> Option<u64> {
    let stat = statvfs(path).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Where a server keeps its data, as far as its node may know it.
#[derive(Clone, Debug, Default)]
pub(crate) struct DataDirectory(Option<PathBuf>);

impl DataDirectory {
    /// Asks the server. One that does not say it is asked again with the next session.
    pub(crate) async fn of(client: &Client) -> Self {
        let rows = timeout(DEADLINE, client.query(DIRECTORY, &[])).await;
        let directory = rows.ok().and_then(Result::ok).and_then(|rows| rows.first()?.get::<_, Option<String>>(0));
        Self(directory.map(PathBuf::from))
    }

    /// The bytes that are free there for WAL, if that is known.
    pub(crate) async fn free(&self) -> Option<u64> {
        let directory = self.0.clone()?;
        let looking = tokio::task::spawn_blocking(move || free(&directory.join("pg_wal")).or_else(|| free(&directory)));
        timeout(DEADLINE, looking).await.ok()?.ok()?
    }
}
