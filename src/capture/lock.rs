//! One run at a time in a backup folder.
//!
//! The lock is the kernel's, on a file that stays: it ends with the process that has it, however that ends. QEMU has the
//! file open as a node while a run goes on, so that other runs on the same machine find out who has it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::error::Error;
use super::files;

/// A backup folder that nobody else writes to.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn path_in(target: &Path) -> PathBuf {
        target.join(files::FOLDER).join("lock")
    }

    /// Whether a folder has ever had a lock.
    pub(super) fn is_in(target: &Path) -> bool {
        Self::path_in(target).is_file()
    }

    /// Takes the lock of a folder.
    pub(super) fn take(target: &Path) -> Result<Self, Error> {
        let path = Self::path_in(target);
        let folder = target.join(files::FOLDER);
        std::fs::create_dir_all(&folder).map_err(|source| Error::Io { path: folder, source })?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|source| Error::Io { path: path.clone(), source })?;
        Self::hold(file, path)
    }

    /// Takes a lock that a node of QEMU names; `None` where it is gone with its folder.
    pub(super) fn take_over(path: &Path) -> Result<Option<Self>, Error> {
        match File::open(path) {
            Ok(file) => Self::hold(file, path.to_owned()).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // who has it may be at work
            Err(source) => Err(Error::Io { path: path.to_owned(), source }),
        }
    }

    fn hold(file: File, path: PathBuf) -> Result<Self, Error> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path, _file: file }),
            Err(Errno::WOULDBLOCK) => Err(Error::Locked { path }),
            Err(error) => Err(Error::Io { path, source: error.into() }),
        }
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The backup folder.
    pub(super) fn target(&self) -> &Path {
        self.path.parent().and_then(Path::parent).unwrap_or(Path::new("/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lock_that_is_gone_is_nobodys() {
        let target = tempfile::tempdir().unwrap();
        let lock = Lock::take(target.path()).unwrap();
        assert!(matches!(Lock::take_over(lock.path()), Err(Error::Locked { .. })));
        assert!(matches!(Lock::take_over(&lock.path().join("below")), Err(Error::Io { .. })));
        assert!(Lock::take_over(&target.path().join("gone")).unwrap().is_none());
    }
}
