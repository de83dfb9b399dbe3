//! Files under a name of the moment, which a process that was killed has left beside its output.
//!
//! Whoever has such a file holds its lock, from before it has the name, and the lock ends with the process. Where a file
//! system has no such locks, nothing is removed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FileType, FlockOperation, flock};

use super::folder::read_folder;

/// What names of the moment begin with.
pub(super) const PREFIX: &str = ".qmpbackup-";

/// How many letters and digits follow, which nobody can guess.
const RANDOM: usize = 6;

/// Makes files with such a name.
pub(super) fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).rand_bytes(RANDOM);
    builder
}

/// Says that a file is somebody's, until it is closed.
pub(super) fn hold(file: &File) {
    // where that is not possible, it is not asked for either
    let _ = flock(file, FlockOperation::NonBlockingLockExclusive);
}

/// Removes the files of the user in a folder that nobody holds, and that were not written to for so long. What cannot be
/// removed stays, since nothing depends on it.
pub(super) fn remove(folder: &Path, age: Duration) {
    let entries = read_folder(folder).into_iter().flatten().flatten();
    let names = entries.filter(|(name, kind)| *kind == FileType::RegularFile && is_of_a_moment(name));
    let names: Vec<OsString> = names.map(|(name, _)| name).collect();
    for path in names.into_iter().map(|name| folder.join(name)) {
        if is_left(&path, age) {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn is_of_a_moment(name: &OsStr) -> bool {
    let random = name.as_bytes().strip_prefix(PREFIX.as_bytes());
    random.is_some_and(|random| random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric))
}

/// Whether a file is one that was left. Once nobody holds it, nobody comes back to it.
fn is_left(path: &Path, age: Duration) -> bool {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let Ok(file) = File::options().read(true).custom_flags(flags).open(path) else { return false };
    let Ok(there) = file.metadata() else { return false };
    // of a clock that is behind, nothing is known
    let is_old = age.is_zero() || there.modified().is_ok_and(|time| time.elapsed().is_ok_and(|elapsed| elapsed >= age));
    there.is_file()
        && there.uid() == rustix::process::geteuid().as_raw()
        && there.nlink() == 1
        && is_old
        && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_files_that_nobody_holds_go() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let kept =
            [".qmpbackup-held12", ".qmpbackup-short", ".qmpbackup-long123", ".qmpbackup-a.bc12", "qmpbackup-abc123"];
        for name in kept.iter().chain(&[".qmpbackup-aBc123", ".qmpbackup-000000", "FULL-5-disk", "linked"]) {
            std::fs::write(at(name), name).unwrap();
        }
        let held = File::open(at(kept[0])).unwrap();
        hold(&held);
        std::fs::create_dir(at(".qmpbackup-folder")).unwrap();
        symlink("FULL-5-disk", at(".qmpbackup-link12")).unwrap();
        std::fs::hard_link(at("linked"), at(".qmpbackup-linked")).unwrap();
        let before = names(folder.path());
        remove(folder.path(), LONG);
        assert_eq!(names(folder.path()), before);
        remove(folder.path(), Duration::ZERO);
        let mut expected = before;
        expected.retain(|name| name != ".qmpbackup-aBc123" && name != ".qmpbackup-000000");
        assert_eq!(names(folder.path()), expected);
        drop(held);
        remove(folder.path(), Duration::ZERO);
        assert!(!at(kept[0]).exists());
    }

    #[test]
    fn what_was_not_written_to_for_long_goes_and_what_is_of_others_stays() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in [".qmpbackup-old123", ".qmpbackup-other1"] {
            let file = File::create(at(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - 2 * LONG).unwrap();
        }
        // only root makes files of others
        let other = chown(at(".qmpbackup-other1"), Some(12345), None).is_ok();
        remove(folder.path(), LONG);
        assert_eq!((at(".qmpbackup-old123").exists(), at(".qmpbackup-other1").exists()), (false, other));
    }
}
