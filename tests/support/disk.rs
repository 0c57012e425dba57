//! A small disk, to be filled up.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A disk of its own; unmounted when dropped.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts one of 64 MiB at a directory, for its owner to write to, where the one who asks may do so.
    pub(crate) fn mount(place: &Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64m,mode=755", "none"]).arg(place);
        mount.output().is_ok_and(|output| output.status.success()).then(|| Self(place.to_owned()))
    }

    /// Leaves no room at all.
    pub(crate) fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    /// Gives back the room.
    pub(crate) fn free(&self) {
        let _ = std::fs::remove_file(self.filler());
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
