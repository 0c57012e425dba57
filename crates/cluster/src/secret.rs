//! The cluster secret: what makes a connection a peer.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use uuid::Uuid;

/// A shorter secret could be guessed by whoever overhears a peer's proof.
const LENGTH_MIN: usize = 32;

/// Where a node finds the secret that all nodes of a fleet share.
///
/// `init` makes the file and an operator copies it to every host. It is read afresh at each use, so a node may start
/// before the file is there, and a replaced secret needs no restart. The text itself never appears in a log or an error.
#[derive(Clone, Debug)]
pub enum ClusterSecret {
    /// No secret: whoever reaches the port is a peer. Only with `--insecure`.
    Insecure,
    /// The secret is the file's first line.
    File(PathBuf),
}

impl ClusterSecret {
    /// Reads the secret; `None` when the fleet has none.
    ///
    /// # Errors
    ///
    /// The file is missing, too short, or readable by other users of the host.
    pub fn read(&self) -> anyhow::Result<Option<String>> {
        let Self::File(path) = self else { return Ok(None) };
        let shown = path.display();
        let mode =
            fs::metadata(path).with_context(|| format!("read the cluster secret in {shown}"))?.permissions().mode();
        if mode & 0o077 != 0 {
            bail!("the cluster secret in {shown} may be read by other users (mode {:o}); use chmod 600", mode & 0o777);
        }
        let text = fs::read_to_string(path).with_context(|| format!("read the cluster secret in {shown}"))?;
        match text.lines().next().map(str::trim) {
            Some(line) if line.len() >= LENGTH_MIN => Ok(Some(line.to_owned())),
            _ => bail!("the cluster secret in {shown} is shorter than {LENGTH_MIN} characters"),
        }
    }

    /// Makes the file with a new random secret unless it exists; true when it was made.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn create(path: &Path) -> anyhow::Result<bool> {
        let opened = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(false),
            Err(error) => return Err(error).with_context(|| format!("write the cluster secret to {}", path.display())),
        };
        // Two random UUIDs are 244 bits from the system's generator.
        writeln!(file, "{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())?;
        file.sync_all()?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_made_once_and_kept_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let secret = ClusterSecret::File(path.clone());
        assert!(secret.read().is_err(), "missing");
        assert!(ClusterSecret::create(&path).unwrap());
        let first = secret.read().unwrap();
        assert!(first.as_ref().is_some_and(|text| text.len() == 64));
        assert!(!ClusterSecret::create(&path).unwrap(), "made twice");
        assert_eq!(secret.read().unwrap(), first);

        let short = dir.path().join("short");
        fs::write(&short, "too short\n").unwrap();
        fs::set_permissions(&short, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(ClusterSecret::File(short).read().unwrap_err().to_string().contains("shorter than"));

        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = secret.read().unwrap_err().to_string();
        assert!(error.contains("chmod 600") && !error.contains(&first.unwrap()), "{error}");
    }
}
