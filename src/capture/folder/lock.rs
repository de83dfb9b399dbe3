//! One run at a time in a backup folder.
//!
//! QEMU has the file of the lock open as a node while a run goes on, so that other runs on the same machine find out who
//! has it.

use std::path::Path;

use crate::capture::error::Error;
use crate::chain::{self, FolderLock};

/// Takes the lock of a folder.
pub(crate) fn take(target: &Path) -> Result<FolderLock, Error> {
    FolderLock::take(target).map_err(of_run)
}

/// Takes a lock that a node of QEMU names; `None` where it is gone with its folder.
pub(crate) fn take_over(path: &Path, own: Option<&FolderLock>) -> Result<Option<FolderLock>, Error> {
    FolderLock::take_over(path, own).map_err(of_run)
}

/// The error as one of a run, which may as well have met another run on its machine.
fn of_run(error: chain::Error) -> Error {
    match error {
        chain::Error::Locked { path } => Error::Locked { path },
        chain::Error::Lock { path, source } => Error::Io { path, source },
        error => Error::Chain(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_somebody_has_says_that_a_run_goes_on() {
        let target = tempfile::tempdir().unwrap();
        let lock = take(target.path()).unwrap();
        for error in [take(target.path()).unwrap_err(), take_over(lock.path(), None).unwrap_err()] {
            assert!(matches!(&error, Error::Locked { path } if path == lock.path()), "{error:?}");
        }
        assert!(matches!(take(&lock.path().join("below")), Err(Error::Io { .. })));
    }
}
