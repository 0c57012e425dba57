//! Files in a node's external I/O directory.
//!
//! ```text
//! <external I/O directory>/.part/<uuid>     a file that is being written
//!                          <collection>/... files, whole
//! ```
//!
//! A finished file is synced and then gets its name in one step: by a hard link when the name must be new (the kernel
//! refuses a second one, so two writers never both win), by a rename otherwise. The directories above are synced, too;
//! without that a power loss takes the name back, also for a loser who says that the name was taken. What is made is
//! for the node's user only: it holds other people's rows. Symbolic links are followed: they are the operator's own doing.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use cluster::service::{Boxed, ByteStream, PIECE_MAX, Upload};
use futures_util::stream;
use tokio::io::AsyncReadExt as _;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use uuid::Uuid;

use crate::REQUEST_DEADLINE;
use crate::store::{Entry, LIST_MAX, Medium, too_many};
use crate::trouble::Place;
use crate::uri::invalid;

/// Where files are until they are whole.
const PARTS: &str = ".part";

/// So long before whoever asked for a file is told that it is late, it is given its name or none at all: naming takes a
/// moment, too, and another node that asked has waited a little longer.
const NAMED_BEFORE: Duration = Duration::from_secs(2);

/// An unfinished file that nobody has written to for so long is nobody's any more.
const PART_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// An empty file that has its name for so long, on a file system without hard links, is of a writer that died between
/// taking the name and giving it to its file; the next one may have it.
const TAKEN_AGE_MAX: Duration = Duration::from_secs(300);

/// So often a file is given its name while its directory is being removed, again and again, by others.
const NAME_TRIES: u32 = 10;

/// The node's user, and nobody else.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// A collection in a directory of this host.
#[derive(Clone)]
pub(crate) struct Directory {
    external: PathBuf,
    root: String,
    place: Place,
}

impl Directory {
    /// The collection at `root`, a path that stays inside of `external`.
    pub(crate) fn new(external: &Path, root: String, place: Place) -> Self {
        Self { external: external.to_owned(), root, place }
    }

    fn resolve(&self, path: &str) -> anyhow::Result<PathBuf> {
        let whole = Path::new(&self.root).join(path);
        if whole.starts_with(PARTS) {
            return Err(invalid(format!("directory \"{PARTS}\" is reserved for files that are being written")).into());
        }
        Ok(self.external.join(whole))
    }

    /// Does blocking work with a deadline. Work that is late goes on by itself and its outcome is dropped; a file that is not
    /// durable shortly before is given no name ([`NAMED_BEFORE`]).
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let done = timeout(REQUEST_DEADLINE, spawn_blocking(work)).await.map_err(|_| self.place.late())?;
        done.context("work on files")?.map_err(|error| self.place.of_io(&error))
    }
}

impl Medium for Directory {
    fn upload(&self, path: String, once: bool) -> Boxed<'_, Box<dyn Upload>> {
        Box::pin(async move {
            let target = self.resolve(&path)?;
            let parts = self.external.join(PARTS);
            let part = self.blocking(move || Part::new(&parts)).await?;
            Ok(Box::new(Landing { directory: self.clone(), part: Some(part), path, target, once }) as Box<dyn Upload>)
        })
    }

    fn download(&self, path: String) -> Boxed<'_, Option<ByteStream>> {
        Box::pin(async move {
            let path = self.resolve(&path)?;
            let opened = self.blocking(move || match File::open(path) {
                Err(error) if is_absent(&error) => Ok(None),
                opened => opened.map(Some),
            });
            Ok(opened.await?.map(|file| pieces(file, self.place.clone())))
        })
    }

    fn list(&self, prefix: String) -> Boxed<'_, Vec<Entry>> {
        Box::pin(async move {
            let root = self.resolve("").map(|_| self.external.join(&self.root))?;
            let listed = self.blocking(move || walk(&root, &prefix)).await?;
            listed.ok_or_else(|| too_many(&self.place).into())
        })
    }

    fn delete(&self, path: String) -> Boxed<'_, ()> {
        Box::pin(async move {
            let path = self.resolve(&path)?;
            let external = self.external.clone();
            let removed = self.blocking(move || match fs::remove_file(&path) {
                Err(error) if is_absent(&error) => Ok(()),
                removed => removed.map(|()| remove_empty(&path, &external)),
            });
            removed.await
        })
    }
}

/// Also when what should be a directory above is a file.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Removes the directories above a file that is gone, as far as they are empty and look like ours. One that cannot be
/// removed does no harm.
fn remove_empty(path: &Path, external: &Path) {
    for directory in path.ancestors().skip(1).take_while(|above| above.starts_with(external) && *above != external) {
        let is_ours = fs::symlink_metadata(directory)
            .is_ok_and(|metadata| metadata.is_dir() && metadata.permissions().mode() & 0o777 == DIRECTORY_MODE);
        if !is_ours || fs::remove_dir(directory).is_err() {
            return;
        }
    }
}

fn pieces(file: File, place: Place) -> ByteStream {
    let file = tokio::fs::File::from_std(file);
    Box::pin(stream::try_unfold((file, place), |(mut file, place)| async move {
        let mut piece = BytesMut::with_capacity(PIECE_MAX);
        let read = timeout(REQUEST_DEADLINE, file.read_buf(&mut piece)).await.map_err(|_| place.late())?;
        match read.map_err(|error| place.of_io(&error))? {
            0 => Ok(None),
            _ => Ok(Some((piece.freeze(), (file, place)))),
        }
    }))
}

/// The files below `root` whose relative path begins with `prefix`; none when they are too many.
fn walk(root: &Path, prefix: &str) -> io::Result<Option<Vec<Entry>>> {
    let above = prefix.rfind('/').map_or("", |slash| &prefix[..slash]);
    let mut entries = Vec::new();
    let mut directories = vec![above.to_owned()];
    while let Some(directory) = directories.pop() {
        let listed = match fs::read_dir(root.join(&directory)) {
            Err(error) if is_absent(&error) => continue,
            listed => listed?,
        };
        for found in listed {
            let found = found?;
            // A name that is not UTF-8 is not one of ours.
            let Ok(name) = found.file_name().into_string() else { continue };
            let is_ours = !(directory.is_empty() && name == PARTS);
            let path = if directory.is_empty() { name } else { format!("{directory}/{name}") };
            let metadata = match fs::metadata(found.path()) {
                // Removed meanwhile, or a link that leads nowhere.
                Err(error) if is_absent(&error) => continue,
                metadata => metadata?,
            };
            if metadata.is_dir() && is_ours && (path.starts_with(prefix) || prefix.starts_with(&path)) {
                directories.push(path);
            } else if metadata.is_file() && path.starts_with(prefix) {
                entries.push(Entry { path, size: metadata.len() });
            }
            if entries.len() > LIST_MAX || directories.len() > LIST_MAX {
                return Ok(None);
            }
        }
    }
    Ok(Some(entries))
}

/// A file without a name yet. Dropped, it is gone.
struct Part {
    file: File,
    path: PathBuf,
}

impl Part {
    fn new(parts: &Path) -> io::Result<Self> {
        make(parts)?;
        let path = parts.join(Uuid::new_v4().to_string());
        let file = new_file(&path)?;
        Ok(Self { file, path })
    }

    /// Gives the file its name. False when `once` and the name is taken.
    fn land(self, target: &Path, external: &Path, once: bool, by: Instant) -> io::Result<bool> {
        self.file.sync_all()?;
        if Instant::now() >= by {
            // Whoever asked for the file has been told that it failed, and may have removed all that there was.
            return Err(io::ErrorKind::TimedOut.into());
        }
        let above = target.parent().unwrap_or(external);
        let is_new = match self.name(above, target, once) {
            Err(error) if once && error.kind() == io::ErrorKind::AlreadyExists => {
                // Whoever hears of the other file may count on it, so it must not be taken back either.
                match File::open(target) {
                    Err(error) if is_absent(&error) => {}
                    opened => opened?.sync_all()?,
                }
                false
            }
            named => named.map(|()| true)?,
        };
        for directory in above.ancestors().take_while(|directory| directory.starts_with(external)) {
            File::open(directory)?.sync_all()?;
        }
        Ok(is_new)
    }

    /// The directory may go between its making and its first file: somebody has removed the last one of others.
    fn name(&self, above: &Path, target: &Path, once: bool) -> io::Result<()> {
        let mut tries = 1;
        loop {
            let named = make(above).and_then(|()| match once {
                true => self.link(target),
                false => fs::rename(&self.path, target),
            });
            match named {
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < NAME_TRIES => tries += 1,
                named => return named,
            }
        }
    }

    fn link(&self, target: &Path) -> io::Result<()> {
        match fs::hard_link(&self.path, target) {
            Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) => {
                self.take(target)
            }
            linked => linked,
        }
    }

    /// Where the file system has no hard links the name is taken by an empty file first, which a reader may see for a
    /// moment; that is still better than two winners.
    fn take(&self, target: &Path) -> io::Result<()> {
        match new_file(target) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_left_behind(target) => {}
            made => drop(made?),
        }
        fs::rename(&self.path, target).inspect_err(|_| {
            // Left there, it would keep the name from everybody.
            if fs::metadata(target).is_ok_and(|metadata| metadata.len() == 0) {
                drop(fs::remove_file(target));
            }
        })
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)
}

fn is_left_behind(target: &Path) -> bool {
    let Ok(metadata) = fs::metadata(target) else { return false };
    let age = metadata.modified().map(|modified| SystemTime::now().duration_since(modified).unwrap_or_default());
    metadata.is_file() && metadata.len() == 0 && age.is_ok_and(|age| age > TAKEN_AGE_MAX)
}

/// Makes a directory and those above it, each of them durable in the one that it is in.
fn make(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let above = match directory.parent() {
        Some(above) if above != Path::new("") => above,
        _ => Path::new("."),
    };
    if directory != above {
        make(above)?;
    }
    match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
        // A file there, or a directory that has been removed since; in no way a name that another writer has won.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::read_dir(directory).map(drop),
        made => made.and_then(|()| File::open(above)?.sync_all()),
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // It has been renamed, or it is of no use; what cannot be removed now is removed when it is old.
        drop(fs::remove_file(&self.path));
    }
}

struct Landing {
    directory: Directory,
    /// Away while it is being written to; if that fails it stays away.
    part: Option<Part>,
    path: String,
    target: PathBuf,
    once: bool,
}

impl Upload for Landing {
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            let mut part = self.part.take().context("write to a file after it failed")?;
            let written = self.directory.blocking(move || part.file.write_all(&bytes).map(|()| part)).await?;
            self.part = Some(written);
            Ok(())
        })
    }

    fn finish(mut self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            let part = self.part.take().context("finish a file after it failed")?;
            let (target, external, once) = (self.target.clone(), self.directory.external.clone(), self.once);
            let by = Instant::now() + REQUEST_DEADLINE - NAMED_BEFORE;
            match self.directory.blocking(move || part.land(&target, &external, once, by)).await? {
                true => Ok(()),
                false => Err(self.directory.place.exists(&self.path).into()),
            }
        })
    }
}

/// Removes what writers that died long ago have left.
pub(crate) fn sweep(external: &Path) {
    let Ok(parts) = fs::read_dir(external.join(PARTS)) else { return };
    for part in parts.flatten() {
        let written = part.metadata().and_then(|metadata| metadata.modified());
        let age = written.map(|written| SystemTime::now().duration_since(written).unwrap_or_default());
        if age.is_ok_and(|age| age > PART_AGE_MAX) {
            drop(fs::remove_file(part.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn part(external: &Path, text: &str) -> Part {
        let mut part = Part::new(&external.join(PARTS)).unwrap();
        part.file.write_all(text.as_bytes()).unwrap();
        part
    }

    fn land(part: Part, target: &Path, external: &Path, once: bool) -> io::Result<bool> {
        part.land(target, external, once, Instant::now() + REQUEST_DEADLINE)
    }

    #[test]
    fn what_is_made_is_for_the_node_only() {
        let dir = tempfile::tempdir().unwrap();
        let external = dir.path().join("not/there");
        let target = external.join("a/b/file");
        for (once, is_new) in [(true, true), (true, false), (false, true)] {
            assert_eq!(land(part(&external, "rows"), &target, &external, once).unwrap(), is_new);
        }
        assert_eq!(mode(&target), FILE_MODE);
        for directory in ["not", "not/there", "not/there/.part", "not/there/a", "not/there/a/b"] {
            assert_eq!(mode(&dir.path().join(directory)), DIRECTORY_MODE, "{directory}");
        }
        assert_eq!(mode(&part(&external, "").path), FILE_MODE);
        assert_eq!(fs::read_dir(external.join(PARTS)).unwrap().count(), 0);
    }

    #[test]
    fn a_name_is_taken_once_without_hard_links_and_never_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("file");
        let exists = |taken: io::Result<()>| taken.unwrap_err().kind() == io::ErrorKind::AlreadyExists;
        part(dir.path(), "first").take(&target).unwrap();
        assert!(exists(part(dir.path(), "second").take(&target)));
        assert_eq!(fs::read(&target).unwrap(), b"first");
        // An empty file may be of somebody who is about to win, until it is old.
        let empty = File::create(&target).unwrap();
        assert!(exists(part(dir.path(), "third").take(&target)));
        empty.set_modified(SystemTime::now() - 2 * TAKEN_AGE_MAX).unwrap();
        part(dir.path(), "fourth").take(&target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"fourth");
        fs::remove_file(&target).unwrap();
        let gone = part(dir.path(), "fifth");
        fs::remove_file(&gone.path).unwrap();
        assert!(gone.take(&target).is_err() && !target.exists());
    }

    #[test]
    fn directories_go_with_their_last_file_but_the_operator_s_stay() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        fs::set_permissions(&theirs, fs::Permissions::from_mode(0o755)).unwrap();
        let [first, second] = ["a/b/data/1", "a/b/2"].map(|path| theirs.join(path));
        for file in [&first, &second] {
            land(part(dir.path(), "rows"), file, dir.path(), true).unwrap();
        }
        for (file, gone, there) in [(&first, "a/b/data", "a/b"), (&second, "a", "")] {
            fs::remove_file(file).unwrap();
            remove_empty(file, dir.path());
            assert!(!theirs.join(gone).exists() && theirs.join(there).exists(), "{gone}");
        }
    }

    #[test]
    fn a_file_that_is_durable_too_late_gets_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a/file");
        for once in [true, false] {
            let late = part(dir.path(), "rows").land(&target, dir.path(), once, Instant::now());
            assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
            assert!(!target.exists());
        }
        assert_eq!(fs::read_dir(dir.path().join(PARTS)).unwrap().count(), 0);
    }

    #[test]
    fn a_file_lands_while_its_directory_is_being_removed() {
        let dir = tempfile::tempdir().unwrap();
        let external = dir.path();
        thread::scope(|scope| {
            for writer in 0..2 {
                scope.spawn(move || {
                    for number in 0..200 {
                        let target = external.join(format!("a/b/{writer}-{number}"));
                        assert!(land(part(external, "rows"), &target, external, true).unwrap());
                        fs::remove_file(&target).unwrap();
                        remove_empty(&target, external);
                    }
                });
            }
        });
        assert!(!external.join("a").exists());
    }
}
