//! What lies in a folder.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType};

/// Lists a folder: names, and of what kind they are. Unlike that of the standard library, this does not panic where the
/// folder cannot be closed.
///
/// # Errors
/// What the system says, also instead of an entry; nothing comes after that.
pub(crate) fn read_folder(path: &Path) -> io::Result<impl Iterator<Item = io::Result<(OsString, FileType)>>> {
    // what is no folder is refused at once, also where it would make us wait
    let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
    let entries = Dir::new(OwnedFd::from(File::options().read(true).custom_flags(flags).open(path)?))?;
    let folder: PathBuf = path.to_owned();
    let named = entries.map(move |entry| {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        let kind = match entry.file_type() {
            FileType::Unknown => kind(&folder.join(&name))?,
            known => known,
        };
        Ok((name, kind))
    });
    Ok(named.filter(|entry| !matches!(entry, Ok((name, _)) if name == "." || name == "..")))
}

/// The kind of what a file system that does not list kinds has; unknown where it is gone by now.
fn kind(path: &Path) -> io::Result<FileType> {
    match rustix::fs::lstat(path) {
        Ok(there) => Ok(FileType::from_raw_mode(there.st_mode)),
        Err(rustix::io::Errno::NOENT) => Ok(FileType::Unknown),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_listed_with_kinds_and_without_itself() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        std::fs::create_dir(folder.path().join("below")).unwrap();
        std::os::unix::fs::symlink("file", folder.path().join("link")).unwrap();
        let mut all: Vec<_> = read_folder(folder.path()).unwrap().map(Result::unwrap).collect();
        all.sort_by(|one, other| one.0.cmp(&other.0));
        let should = [("below", FileType::Directory), ("file", FileType::RegularFile), ("link", FileType::Symlink)];
        assert_eq!(all, should.map(|(name, kind)| (name.into(), kind)));
        for (name, should) in should {
            assert_eq!(kind(&folder.path().join(name)).unwrap(), should);
        }
        assert_eq!(kind(&folder.path().join("gone")).unwrap(), FileType::Unknown);
        assert!(read_folder(&folder.path().join("gone")).is_err());
    }
}
