//! Symbolic links that lead somewhere at any moment, and files that are not to be links.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

use rustix::io::Errno;

use super::folder::{parent, sync_folder};
use super::leftover::PREFIX;

/// Opens a regular file that is no link to another one, nor a FIFO that makes us wait.
///
/// # Errors
/// `PermissionDenied` where it is a link, else what the system says.
pub(crate) fn open_unlinked(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = options.custom_flags(flags).open(path);
    let file = file.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => io::Error::new(io::ErrorKind::PermissionDenied, "is a link, and may lead anywhere"),
        _ => error,
    })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("is no regular file")) }
}

/// Makes a symbolic link lead to `target`, whether there is one or not, and syncs its folder.
///
/// # Errors
/// `AlreadyExists` where something else bears that name, else what the system says; the link is what it was then.
pub(crate) fn set_link(link: &Path, target: &Path) -> io::Result<()> {
    let mut hidden = OsString::from(PREFIX);
    hidden.push(link.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    let hidden = link.with_file_name(hidden);
    check(link)?;
    // that of a process which was killed
    if check(&hidden)? {
        fs::remove_file(&hidden)?;
    }
    symlink(target, &hidden)?;
    let renamed = fs::rename(&hidden, link);
    if renamed.is_err() {
        // what went wrong first is what to tell
        let _ = fs::remove_file(&hidden);
    }
    renamed?;
    sync_folder(parent(link))
}

/// Whether there is a link; anything else is an error.
fn check(link: &Path) -> io::Result<bool> {
    match link.symlink_metadata() {
        Ok(there) if there.is_symlink() => Ok(true),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_link_is_made_and_moves_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("image");
        for target in ["one", "two"] {
            symlink("left by a process that was killed", folder.path().join(".qmpbackup-image")).unwrap();
            set_link(&link, Path::new(target)).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(target));
            assert_eq!(names(folder.path()), ["image"]);
        }
    }

    #[test]
    fn what_is_no_link_stays() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["image", ".qmpbackup-image"] {
            let precious = folder.path().join(name);
            fs::write(&precious, "precious").unwrap();
            let error = set_link(&folder.path().join("image"), Path::new("one")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&precious).unwrap(), b"precious");
            assert_eq!(names(folder.path()), [name]);
            fs::remove_file(precious).unwrap();
        }
    }
}
