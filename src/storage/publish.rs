//! Files that exist under their name only when they are whole and on stable storage.
//!
//! Where the file system can, the file has no name at all until then, so that even a killed process leaves nothing; where it
//! replaces another, it has a name that nobody can guess for the moment between the two, which whoever replaces a file in
//! that folder next removes. Elsewhere it has such a name from the beginning, and is removed when it is dropped.

use std::fs::{File, Metadata, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use tempfile::{NamedTempFile, PathPersistError, TempPath};

use super::folder::{NewFolders, give_to_owner, parent, sync_names};
use super::leftover;

/// A file on its way to its name.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    target: PathBuf,
    directory: PathBuf,
    /// The name of the moment, where the file system has no files without one.
    name: Option<TempPath>,
    folders: NewFolders,
}

impl NewFile {
    /// Starts a file that will be `target`, with these permissions; missing parent folders are made.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(target: &Path, mode: u32) -> io::Result<Self> {
        Self::start(target, mode, unnamed)
    }

    fn start(target: &Path, mode: u32, unnamed: fn(&Path, u32) -> io::Result<Option<File>>) -> io::Result<Self> {
        let directory = parent(target).to_owned();
        let folders = NewFolders::create(&directory)?;
        let (file, name) = if let Some(file) = unnamed(&directory, mode)? {
            (file, None)
        } else {
            leftover::remove(&directory, AGE);
            let mut builder = leftover::builder();
            builder.permissions(Permissions::from_mode(mode));
            let (file, name) = builder.tempfile_in(&directory)?.into_parts();
            leftover::hold(&file);
            (file, Some(name))
        };
        Ok(Self { file, target: target.to_owned(), directory, name, folders })
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Syncs the file, gives it its name and syncs the folder. `replace` permits that the name is taken.
    ///
    /// # Errors
    /// `AlreadyExists`, or what the system says; the file is gone then. But where it has replaced another and the folder
    /// cannot be synced, it stays, since the other is gone; [`Undurable`] is inside of the error then.
    pub fn publish(self, replace: bool) -> io::Result<()> {
        self.file.sync_all()?;
        let Self { file, target, directory, name, folders } = self;
        let replaced = match name {
            Some(name) => rename(name, &target, replace)?,
            None => link(&file, &target, &directory, replace)?,
        };
        match sync_names(&directory).and_then(|()| folders.sync()) {
            Ok(()) => folders.keep(),
            Err(error) if replaced => return Err(io::Error::other(Undurable(error))),
            Err(error) => {
                // what went wrong first is what to tell; the folders go after it
                let _ = std::fs::remove_file(&target);
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Writes a small file with these permissions, or replaces it: it is there whole and on stable storage, as it was before, or
/// not at all. Missing parent folders are made. What root makes so may be for the owner of something else.
///
/// # Errors
/// As [`NewFile::publish`].
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32, of: Option<&Metadata>) -> io::Result<()> {
    let new = NewFile::create(path, mode)?;
    if let Some(of) = of {
        give_to_owner(new.file(), of);
    }
    new.file().write_all(bytes)?;
    new.publish(true)
}

/// A file has its name, in place of the one before it, but its folder could not be synced.
#[derive(Debug, thiserror::Error)]
#[error("it is there and whole, but its folder cannot be synced: a power cut may undo it")]
pub struct Undurable(#[source] io::Error);

/// For how long nobody wrote to a file that is taken for left over, where it has its name for a moment before it is held.
const AGE: Duration = Duration::from_secs(3600);

/// A file without a name, where there can be such, and a way to name it later.
fn unnamed(directory: &Path, mode: u32) -> io::Result<Option<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match retry_on_intr(|| rustix::fs::openat(CWD, directory, flags, Mode::from_raw_mode(mode))) {
        Ok(file) => Ok(Some(File::from(file)).filter(|file| by_descriptor(file).exists())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn by_descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives a file its name instead of that of the moment; whether it may have replaced another.
fn rename(name: TempPath, target: &Path, replace: bool) -> io::Result<bool> {
    match name.persist_noclobber(target) {
        Ok(()) => Ok(false),
        // the name is taken, or this file system can only replace
        Err(PathPersistError { error, path }) if replace && may_replace(error.kind()) => {
            path.persist(target)?;
            Ok(true)
        }
        Err(error) => Err(error.into()),
    }
}

fn may_replace(error: io::ErrorKind) -> bool {
    use io::ErrorKind::{AlreadyExists, InvalidInput, PermissionDenied, Unsupported};
    matches!(error, AlreadyExists | InvalidInput | PermissionDenied | Unsupported)
}

/// Names a file that has no name; whether it has replaced another.
fn link(file: &File, target: &Path, directory: &Path, replace: bool) -> io::Result<bool> {
    let open = by_descriptor(file);
    let link = |path: &Path| rustix::fs::linkat(CWD, &open, CWD, path, AtFlags::SYMLINK_FOLLOW);
    match link(target) {
        // a link cannot replace, a rename can
        Err(Errno::EXIST) if replace => {
            leftover::remove(directory, Duration::ZERO);
            leftover::hold(file);
            let named: NamedTempFile<()> = leftover::builder().make_in(directory, |path| Ok(link(path)?))?;
            named.persist(target)?;
            Ok(true)
        }
        result => Ok(result.map(|()| false)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    type Unnamed = fn(&Path, u32) -> io::Result<Option<File>>;

    /// With and without files that have no name.
    const WAYS: [Unnamed; 2] = [unnamed, |_, _| Ok(None)];

    #[test]
    fn nothing_is_there_before_and_everything_after() {
        for unnamed in WAYS {
            let directory = tempfile::tempdir().unwrap();
            let target = directory.path().join("a/b/disk");
            let new = NewFile::start(&target, 0o640, unnamed).unwrap();
            new.file().write_all(b"data").unwrap();
            assert!(!target.exists());
            new.publish(false).unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"data");
            assert_eq!(target.metadata().unwrap().permissions().mode() & 0o777, 0o640);
            assert_eq!(names(&directory.path().join("a/b")), ["disk"]);
        }
    }

    #[test]
    fn what_is_not_published_leaves_nothing_not_even_folders() {
        for unnamed in WAYS {
            let directory = tempfile::tempdir().unwrap();
            drop(NewFile::start(&directory.path().join("a/b/disk"), 0o600, unnamed).unwrap());
            assert!(names(directory.path()).is_empty());
        }
    }

    #[test]
    fn what_a_killed_process_left_beside_its_output_goes_with_the_next() {
        for unnamed in WAYS {
            let directory = tempfile::tempdir().unwrap();
            let target = directory.path().join("disk");
            std::fs::write(&target, "old").unwrap();
            let left = File::create(directory.path().join(".qmpbackup-Abc123")).unwrap();
            left.set_modified(std::time::SystemTime::now() - 2 * AGE).unwrap();
            drop(left);
            let held = NewFile::start(&directory.path().join("other"), 0o600, |_, _| Ok(None)).unwrap();
            held.file().set_modified(std::time::SystemTime::now() - 2 * AGE).unwrap();
            NewFile::start(&target, 0o600, unnamed).unwrap().publish(true).unwrap();
            held.publish(false).unwrap();
            let mut there = names(directory.path());
            there.sort();
            assert_eq!(there, ["disk", "other"]);
        }
    }

    #[test]
    fn a_name_that_is_taken_is_replaced_only_on_request() {
        for unnamed in WAYS {
            let directory = tempfile::tempdir().unwrap();
            let target = directory.path().join("disk");
            std::fs::write(&target, "old").unwrap();
            let error = NewFile::start(&target, 0o600, unnamed).unwrap().publish(false).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(std::fs::read(&target).unwrap(), b"old");
            NewFile::start(&target, 0o600, unnamed).unwrap().publish(true).unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"");
            assert_eq!(names(directory.path()), ["disk"]);
        }
    }
}
