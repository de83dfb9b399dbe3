//! One writer at a time in a backup folder.
//!
//! The lock is the kernel's, on a file that stays: it ends with the process that has it, however that ends. A backup has
//! that of its target; who changes images that are there already has those of their folder and of all targets above it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{BOOKKEEPING, Error, MAX_DEPTH};

/// The file with the id of the chain that a folder is the target of.
pub const UUID: &str = "uuid";

/// A folder that nobody else writes to.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    _file: File,
}

impl FolderLock {
    fn path_in(folder: &Path) -> PathBuf {
        folder.join(BOOKKEEPING).join("lock")
    }

    /// Whether a folder has ever had a lock.
    #[must_use]
    pub fn is_in(folder: &Path) -> bool {
        Self::path_in(folder).is_file()
    }

    /// Takes the lock of a folder.
    ///
    /// # Errors
    /// [`Error::Locked`] where somebody has it, this process included; [`Error::Lock`].
    pub fn take(folder: &Path) -> Result<Self, Error> {
        let path = Self::path_in(folder);
        let bookkeeping = folder.join(BOOKKEEPING);
        std::fs::create_dir_all(&bookkeeping).map_err(|source| Error::Lock { path: bookkeeping, source })?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|source| Error::Lock { path: path.clone(), source })?;
        Self::hold(file, path)
    }

    /// Takes the locks that somebody needs who changes images in a folder: its own, and those of the targets of backups
    /// that it may be a part of, three folders up. They are no targets unless they have an id or had a lock before.
    ///
    /// # Errors
    /// As [`FolderLock::take`]; nothing is locked then.
    pub fn take_all(folder: &Path) -> Result<Vec<Self>, Error> {
        let failed = |source| Error::Lock { path: folder.to_owned(), source };
        // the folder of a bare file name is empty
        let given = std::path::absolute(Path::new(".").join(folder)).map_err(failed)?;
        let own = given.canonicalize().map_err(failed)?;
        // a run knows the folder by the path that it was given, which may lead over a link
        let above = [&given, &own].into_iter().flat_map(|path| path.ancestors().skip(1).take(MAX_DEPTH));
        let targets = above.filter(|folder| Self::is_in(folder) || folder.join(UUID).is_file());
        let mut folders: BTreeSet<PathBuf> =
            targets.map(Path::canonicalize).collect::<Result<_, _>>().map_err(failed)?;
        folders.remove(&own);
        // a run is met before anything is made in a folder of its target
        folders.iter().chain([&own]).map(|folder| Self::take(folder)).collect()
    }

    /// Takes a lock by the path of its file; `None` where it is gone with its folder.
    ///
    /// # Errors
    /// As [`FolderLock::take`].
    pub fn take_over(path: &Path) -> Result<Option<Self>, Error> {
        match File::open(path) {
            Ok(file) => Self::hold(file, path.to_owned()).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // who has it may be at work
            Err(source) => Err(Error::Lock { path: path.to_owned(), source }),
        }
    }

    fn hold(file: File, path: PathBuf) -> Result<Self, Error> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path, _file: file }),
            Err(Errno::WOULDBLOCK) => Err(Error::Locked { path }),
            Err(error) => Err(Error::Lock { path, source: error.into() }),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.path.parent().and_then(Path::parent).unwrap_or(Path::new("/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with folders below it.
    fn tree(below: &str) -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let lowest = root.path().join(below);
        std::fs::create_dir_all(&lowest).unwrap();
        (root, lowest)
    }

    fn locked(locks: &[FolderLock]) -> Vec<&Path> {
        locks.iter().map(FolderLock::folder).collect()
    }

    #[test]
    fn only_a_lock_that_is_gone_is_nobodys() {
        let target = tempfile::tempdir().unwrap();
        let lock = FolderLock::take(target.path()).unwrap();
        assert!(matches!(FolderLock::take_over(lock.path()), Err(Error::Locked { .. })));
        assert!(matches!(FolderLock::take_over(&lock.path().join("below")), Err(Error::Lock { .. })));
        assert!(FolderLock::take_over(&target.path().join("gone")).unwrap().is_none());
    }

    #[test]
    fn a_lock_of_images_is_one_of_all_targets_above_them_outermost_first() {
        let (root, disk) = tree("far/vm/2026-11/disk0");
        let at = |path: &str| root.path().join(path);
        assert_eq!(locked(&FolderLock::take_all(&disk).unwrap()), [&disk]);
        for target in ["", "far", "far/vm/2026-11"] {
            std::fs::write(at(target).join(UUID), "id").unwrap();
        }
        let locks = FolderLock::take_all(&disk).unwrap();
        assert_eq!(locked(&locks), [&at("far"), &at("far/vm/2026-11"), &disk]);
        for taken in ["far", "far/vm/2026-11", "far/vm/2026-11/disk0"] {
            assert!(matches!(FolderLock::take(&at(taken)), Err(Error::Locked { path }) if path.starts_with(at(taken))));
        }
        drop(locks);
        // a run that has not written an id yet
        std::fs::remove_file(at("far/vm/2026-11").join(UUID)).unwrap();
        let run = FolderLock::take(&at("far/vm/2026-11")).unwrap();
        assert!(matches!(FolderLock::take_all(&disk), Err(Error::Locked { path }) if path == run.path()));
        FolderLock::take(&at("far")).unwrap();
        FolderLock::take(&disk).unwrap();
    }

    #[test]
    fn a_target_is_found_over_a_link_and_nothing_is_made_below_one_that_is_locked() {
        let (root, elsewhere) = tree("elsewhere");
        let target = root.path().join("target");
        std::fs::create_dir(&target).unwrap();
        std::os::unix::fs::symlink(&elsewhere, target.join("disk0")).unwrap();
        let run = FolderLock::take(&target).unwrap();
        assert!(matches!(FolderLock::take_all(&target.join("disk0")), Err(Error::Locked { .. })));
        assert!(!FolderLock::is_in(&elsewhere));
        drop(run);
        assert_eq!(locked(&FolderLock::take_all(&target.join("disk0")).unwrap()).len(), 2);
        assert!(FolderLock::is_in(&elsewhere));
        assert!(matches!(FolderLock::take_all(&target.join("disk1")), Err(Error::Lock { .. })));
    }
}
