//! A disk that is full, told as such: where, and for which database.
//!
//! It may be the server's, in whatever statement, or this node's own, where schemas are kept.

use pgerror::{PgError, SqlState};

use super::JobDatabase;
use crate::Server;
use crate::founders::session::has_code;

/// An error, or in its place that a disk is full.
pub(super) fn told(error: anyhow::Error, server: &Server, job: JobDatabase) -> anyhow::Error {
    let name = job.own_name();
    if has_code(&error, &[SqlState::DISK_FULL]) {
        let Some(said) = PgError::of(&error) else { return error };
        // Told once, by whoever was nearest to it.
        if said.message.starts_with(NO_SPACE) {
            return error;
        }
        let message = format!("{NO_SPACE} on server {} for database \"{name}\"", server.address());
        let mut detail = format!("The server said: {}.", said.message);
        if let Some(more) = &said.detail {
            detail = format!("{detail} {more}");
        }
        let hint = "What the job has made is removed. Make room, and restore anew.";
        return PgError::new(SqlState::DISK_FULL, message).detail(detail).hint(hint).into();
    }
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
    };
    if error.chain().any(is_full) {
        let message = format!("{NO_SPACE} on the node beside server {}", server.address());
        let detail = format!("It keeps the schema of database \"{name}\" in a temporary file.");
        return PgError::new(SqlState::DISK_FULL, message).detail(detail).into();
    }
    error
}

const NO_SPACE: &str = "no space left on device";

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_full_disk_says_whose_it_is() {
        let server = Server::from_conninfo("host=/tmp/s user=svc").unwrap();
        let said = PgError::new(SqlState::DISK_FULL, "could not extend file \"base/5/1\": No space left on device");
        let error = told(anyhow::Error::from(said).context("load"), &server, 7.into());
        let error = told(error, &server, 7.into());
        let full = PgError::of(&error).unwrap();
        let expected = format!("no space left on device on server {} for database \"_backhaul_7\"", server.address());
        assert_eq!((full.code, full.message.as_str()), (SqlState::DISK_FULL, expected.as_str()));
        assert!(full.detail.as_ref().unwrap().contains("could not extend file"));
        let own = Err::<(), _>(std::io::Error::from(std::io::ErrorKind::StorageFull)).context("keep").unwrap_err();
        assert_eq!(PgError::of(&told(own, &server, 7.into())).unwrap().code, SqlState::DISK_FULL);
        let other = told(PgError::new(SqlState::IO_ERROR, "x").into(), &server, 7.into());
        assert_eq!(PgError::of(&other).unwrap().message, "x");
    }
}
