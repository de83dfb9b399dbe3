//! Folders: what lies in them, and new ones.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags};

/// Folders are for their owner to write to, whatever the umask permits.
const MODE: u32 = 0o755;

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

/// The folder that a path is in.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

/// Has the names in a folder on stable storage.
///
/// # Errors
/// What the system says.
pub(crate) fn sync_folder(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// The same where that can be: a folder that only takes what is put in cannot be opened, and some file systems sync none.
pub(crate) fn sync_names(directory: &Path) -> io::Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied};
    sync_folder(directory).or_else(|error| match error.kind() {
        PermissionDenied | InvalidInput => Ok(()),
        _ => Err(error),
    })
}

/// Gives what root has just made to the owner of what it belongs to, who shall be able to go on alone. Where that cannot be,
/// it stays root's.
pub(crate) fn give_to_owner(made: &File, of: &Metadata) {
    let is_roots = made.metadata().is_ok_and(|made| made.uid() == 0);
    if rustix::process::geteuid().is_root() && is_roots && (of.uid(), of.gid()) != (0, 0) {
        let _ = std::os::unix::fs::fchown(made, Some(of.uid()), Some(of.gid()));
    }
}

/// Makes a folder, and those above it that are missing, which stay whatever becomes of the system. They belong to who owns the
/// folder that they are in.
///
/// # Errors
/// What the system says.
pub(crate) fn create_folders(path: &Path) -> io::Result<()> {
    let made = NewFolders::create(path)?;
    if !path.metadata()?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    for path in &made.made {
        // not where a link leads, and to nobody but the owner of the folder that it is in now
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let Ok(folder) = File::options().read(true).custom_flags(flags).open(path) else { continue };
        let above =
            rustix::fs::openat(&folder, "..", OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        if let Ok(above) = above.map_err(io::Error::from).and_then(|above| File::from(above).metadata()) {
            give_to_owner(&folder, &above);
        }
    }
    made.sync()?;
    made.keep();
    Ok(())
}

/// Folders that were made; removed again unless they are to be kept.
#[derive(Debug, Default)]
pub(super) struct NewFolders {
    made: Vec<PathBuf>,
}

impl NewFolders {
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        let missing: Vec<_> = directory
            .ancestors()
            .filter(|path| *path != Path::new(""))
            .take_while(|path| path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound))
            .map(Path::to_owned)
            .collect();
        let mut folders = Self::default();
        for path in missing.into_iter().rev() {
            match DirBuilder::new().mode(MODE).create(&path) {
                Ok(()) => folders.made.push(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(folders)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.made.iter().try_for_each(|path| sync_names(parent(path)))
    }

    pub(super) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for NewFolders {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            // it stays where somebody else put something in
            let _ = std::fs::remove_dir(path);
        }
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
