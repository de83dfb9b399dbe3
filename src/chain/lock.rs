//! One writer at a time in a backup folder.
//!
//! The lock is the kernel's, on a file that stays: it ends with the process that has it, however that ends. A backup has
//! that of its target; who changes images that are there already has those of their folder and of all targets above it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, retry_on_intr};

use super::{BOOKKEEPING, Error, MAX_DEPTH};
use crate::storage::{self, open_unlinked};

/// The file with the id of the chain that a folder is the target of.
pub const UUID: &str = "uuid";

/// A folder that nobody else writes to.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    /// Has the lock, for as long as it is open.
    file: File,
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

    /// The lock of a folder, if somebody has it now.
    #[must_use]
    pub fn held_in(folder: &Path) -> Option<PathBuf> {
        let path = Self::path_in(folder);
        let file = open_unlinked(File::options().read(true), &path).ok()?;
        let locked = retry_on_intr(|| flock(&file, FlockOperation::NonBlockingLockShared));
        (locked == Err(Errno::WOULDBLOCK)).then_some(path)
    }

    /// Takes the lock of a folder.
    ///
    /// # Errors
    /// [`Error::Locked`] where somebody has it, this process included; [`Error::Lock`].
    pub fn take(folder: &Path) -> Result<Self, Error> {
        let path = Self::path_in(folder);
        let bookkeeping = folder.join(BOOKKEEPING);
        let made = storage::create_folders(folder).and_then(|()| {
            storage::check_inside(folder, Path::new(BOOKKEEPING))?;
            storage::create_folders(&bookkeeping)
        });
        made.map_err(|source| Error::Lock { path: bookkeeping.clone(), source })?;
        let mut options = File::options();
        // QEMU reads it, which may be another user
        options.read(true).write(true).mode(0o644);
        let file = match open_unlinked(options.clone().create_new(true), &path) {
            Ok(new) => bookkeeping.metadata().map(|folder| {
                storage::give_to_owner(&new, &folder);
                new
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                open_unlinked(options.create(true).truncate(false), &path)
            }
            Err(error) => Err(error),
        };
        Self::hold(file.map_err(|source| Error::Lock { path: path.clone(), source })?, path)
    }

    /// Takes the locks that somebody needs who changes images in a folder: its own, and those of the targets of backups
    /// that it may be a part of, three folders up. They are no targets unless they have an id or had a lock before.
    ///
    /// # Errors
    /// As [`FolderLock::take`]; nothing is locked then.
    pub fn take_all(folder: &Path) -> Result<Vec<Self>, Error> {
        Self::take_all_of([folder])
    }

    /// As [`FolderLock::take_all`], for several folders at once.
    ///
    /// # Errors
    /// As [`FolderLock::take`]; nothing is locked then.
    pub fn take_all_of<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<Vec<Self>, Error> {
        let (mut owns, mut targets) = (BTreeSet::new(), BTreeSet::new());
        for folder in folders {
            let failed = |source| Error::Lock { path: folder.to_owned(), source };
            // the folder of a bare file name is empty
            let given = std::path::absolute(Path::new(".").join(folder)).map_err(failed)?;
            let own = given.canonicalize().map_err(failed)?;
            // a run knows the folder by the path that it was given, which may lead over a link
            for target in [&given, &own].into_iter().flat_map(|path| path.ancestors().skip(1).take(MAX_DEPTH)) {
                if is_file(&Self::path_in(target))? || is_file(&target.join(UUID))? {
                    targets.insert(target.canonicalize().map_err(failed)?);
                }
            }
            owns.insert(own);
        }
        // a run is met before anything is made in a folder of its target
        targets.iter().filter(|target| !owns.contains(*target)).chain(&owns).map(|folder| Self::take(folder)).collect()
    }

    /// Takes a lock by the path of its file; `None` where it is gone with its folder. The path is what a machine says, and
    /// what a journal in that folder says will be done: so the folder must be ours, the administrator's, or of the owner of
    /// `own`, a folder that the user has named.
    ///
    /// # Errors
    /// As [`FolderLock::take`].
    pub fn take_over(path: &Path, own: Option<&Self>) -> Result<Option<Self>, Error> {
        let failed = |source| Error::Lock { path: path.to_owned(), source };
        let file = match open_unlinked(File::options().read(true), path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // who has it may be at work
            Err(source) => return Err(failed(source)),
        };
        let lock = Self { path: path.to_owned(), file };
        lock.check_named_by_machine(own.map(Self::folder)).map_err(failed)?;
        Self::hold(lock.file, lock.path).map(Some)
    }

    fn check_named_by_machine(&self, own: Option<&Path>) -> io::Result<()> {
        let folder = self.folder();
        if Self::path_in(folder) != self.path {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the machine names it, but it is no lock"));
        }
        storage::check_inside(folder, Path::new(BOOKKEEPING))?;
        let owner = own.unwrap_or(Path::new("/")).metadata()?;
        if storage::is_trusted(&folder.metadata()?, &owner) {
            return Ok(());
        }
        let reason = "the machine names it, but its folder is of another user: `recover --target` names it for sure";
        Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
    }

    fn hold(file: File, path: PathBuf) -> Result<Self, Error> {
        match retry_on_intr(|| flock(&file, FlockOperation::NonBlockingLockExclusive)) {
            Ok(()) => Ok(Self { path, file }),
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

/// Whether a file is there, as far as we may look.
fn is_file(path: &Path) -> Result<bool, Error> {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    match path.metadata() {
        Ok(there) => Ok(there.is_file()),
        Err(error) if matches!(error.kind(), NotFound | NotADirectory | PermissionDenied) => Ok(false),
        Err(source) => Err(Error::Lock { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::os::unix::fs::{chown, symlink};

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
        assert_eq!(FolderLock::held_in(target.path()), None);
        drop(FolderLock::take(target.path()).unwrap());
        assert_eq!(FolderLock::held_in(target.path()), None);
        let lock = FolderLock::take(target.path()).unwrap();
        assert_eq!(FolderLock::held_in(target.path()).as_deref(), Some(lock.path()));
        assert!(matches!(FolderLock::take_over(lock.path(), None), Err(Error::Locked { .. })));
        assert!(matches!(FolderLock::take_over(&lock.path().join("below"), None), Err(Error::Lock { .. })));
        assert!(FolderLock::take_over(&target.path().join("gone"), None).unwrap().is_none());
    }

    #[test]
    fn a_file_that_is_there_already_is_given_to_nobody() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let target = tempfile::tempdir().unwrap();
        chown(target.path(), Some(12345), Some(12345)).unwrap();
        let owner = |path: &Path| std::os::unix::fs::MetadataExt::uid(&path.metadata().unwrap());
        let path = FolderLock::take(target.path()).unwrap().path().to_owned();
        assert_eq!([owner(&path), owner(path.parent().unwrap())], [12345; 2]);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "an image of root").unwrap();
        drop(FolderLock::take(target.path()).unwrap());
        assert_eq!(owner(&path), 0);
    }

    #[test]
    fn nothing_is_locked_or_made_where_a_link_leads() {
        let (root, elsewhere) = tree("elsewhere");
        let precious = elsewhere.join("precious");
        std::fs::write(&precious, "precious").unwrap();
        let (folder, file) = (root.path().join("folder"), root.path().join("file"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir_all(file.join(BOOKKEEPING)).unwrap();
        for to in [&elsewhere, &root.path().join("new")] {
            symlink(to, folder.join(BOOKKEEPING)).unwrap();
            let error = FolderLock::take(&folder).unwrap_err();
            assert!(error.source().unwrap().to_string().contains("is a link"), "{error:?}");
            std::fs::remove_file(folder.join(BOOKKEEPING)).unwrap();
        }
        for to in [&precious, &root.path().join("new")] {
            let lock = FolderLock::path_in(&file);
            symlink(to, &lock).unwrap();
            for error in [FolderLock::take(&file).unwrap_err(), FolderLock::take_over(&lock, None).unwrap_err()] {
                assert!(error.source().unwrap().to_string().contains("is a link"), "{error:?}");
            }
            std::fs::remove_file(lock).unwrap();
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, FolderLock::path_in(&file), 0o600.into()).unwrap();
        assert!(matches!(FolderLock::take_over(&FolderLock::path_in(&file), None), Err(Error::Lock { .. })));
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 1);
        assert!(!root.path().join("new").exists());
    }

    #[test]
    fn a_folder_that_a_machine_names_is_not_that_of_a_stranger() {
        let (root, folder) = tree("folder");
        let path = FolderLock::take(&folder).unwrap().path;
        std::fs::copy(&path, folder.join("lock")).unwrap();
        assert!(matches!(FolderLock::take_over(&folder.join("lock"), None), Err(Error::Lock { .. })));
        // only root makes folders of others
        if chown(&folder, Some(12345), None).is_err() {
            return;
        }
        let error = FolderLock::take_over(&path, None).unwrap_err();
        assert!(error.source().unwrap().to_string().contains("of another user"), "{error:?}");
        let (_other, own) = tree("own");
        chown(&own, Some(12345), None).unwrap();
        assert!(FolderLock::take_over(&path, Some(&FolderLock::take(&own).unwrap())).unwrap().is_some());
        drop(root);
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
        symlink(&elsewhere, target.join("disk0")).unwrap();
        let run = FolderLock::take(&target).unwrap();
        assert!(matches!(FolderLock::take_all(&target.join("disk0")), Err(Error::Locked { .. })));
        assert!(!FolderLock::is_in(&elsewhere));
        drop(run);
        assert_eq!(locked(&FolderLock::take_all(&target.join("disk0")).unwrap()).len(), 2);
        assert!(FolderLock::is_in(&elsewhere));
        assert!(matches!(FolderLock::take_all(&target.join("disk1")), Err(Error::Lock { .. })));
    }
}
