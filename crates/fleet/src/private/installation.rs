//! Finding PostgreSQL's programs, and the user who may run them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use nix::unistd::{Gid, Uid, User};

/// The oldest release that Backhaul works with: TID range scans came with it.
const RELEASE_MIN: u32 = 14;

/// What a folder must hold to count as an installation.
const PROGRAMS: [&str; 5] = ["postgres", "initdb", "pg_basebackup", "pg_ctl", "pg_dump"];

/// The directory under which Debian keeps one folder per release.
const DEBIAN: &str = "/usr/lib/postgresql";

/// One release of PostgreSQL on this machine.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Where `postgres`, `initdb` and the rest are.
    pub bin: PathBuf,
    /// As it prints it: `15.18`.
    pub version: String,
}

impl Installation {
    /// Finds the newest release in Debian's folders and on PATH.
    ///
    /// # Errors
    ///
    /// There is none of release 14 or newer; the message says where was looked and what to install.
    pub fn find() -> anyhow::Result<Self> {
        Self::newest(Self::all())
    }

    /// Finds this release, or the newest one where it is not installed.
    ///
    /// # Errors
    ///
    /// As [`Installation::find`].
    pub(crate) fn find_release(release: u32) -> anyhow::Result<Self> {
        let mut all = Self::all();
        match all.iter().rposition(|one| one.release() == release) {
            Some(index) => Ok(all.swap_remove(index)),
            None => Self::newest(all),
        }
    }

    fn newest(all: Vec<Self>) -> anyhow::Result<Self> {
        match all.into_iter().max_by_key(Self::release) {
            Some(newest) if newest.release() >= RELEASE_MIN => Ok(newest),
            Some(old) => bail!("PostgreSQL {} is too old; install release {RELEASE_MIN} or newer", old.version),
            None => bail!("PostgreSQL was found neither in {DEBIAN} nor on PATH; install the package postgresql"),
        }
    }

    /// Of equals the last one is to be taken: Debian's folders are complete, PATH may hold single links into them.
    fn all() -> Vec<Self> {
        let debian = fs::read_dir(DEBIAN).into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
        let on_path: Vec<PathBuf> =
            env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
        on_path.into_iter().chain(debian).filter_map(|bin| Self::at(&bin)).collect()
    }

    fn at(bin: &Path) -> Option<Self> {
        if !PROGRAMS.iter().all(|program| bin.join(program).is_file()) {
            return None;
        }
        let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text.split_ascii_whitespace().nth(2)?.to_owned();
        Some(Self { bin: bin.to_owned(), version })
    }

    fn release(&self) -> u32 {
        let digits: String = self.version.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    }

    /// One of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

/// As whom servers run, when not as the user of this process.
#[derive(Clone, Debug)]
pub struct RunAs {
    /// The user's name.
    pub name: String,
    pub(super) uid: Uid,
    pub(super) gid: Gid,
}

impl RunAs {
    /// `None` unless this process is root's; then `postgres`, or `nobody` where that does not exist.
    ///
    /// # Errors
    ///
    /// Neither user exists.
    pub fn choose() -> anyhow::Result<Option<Self>> {
        if !Uid::effective().is_root() {
            return Ok(None);
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name).with_context(|| format!("look up the user {name}"))? {
                return Ok(Some(Self { name: user.name, uid: user.uid, gid: user.gid }));
            }
        }
        bail!("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")
    }
}
