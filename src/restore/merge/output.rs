//! Where the output goes, looked at before anything is written.

use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::restore::error::{Error, Result};
use crate::restore::layer::Format;
use crate::restore::layers::Layers;
use crate::restore::merge::OutputFormat;
use crate::restore::source;
use crate::storage::{Access, FileStorage, NewFile, access_list};

/// What stands at the place of the output.
#[derive(Debug)]
pub(super) enum Destination {
    File(NewFile),
    Device(File),
}

impl Destination {
    /// What is written to; `path` is its name for errors.
    pub(super) fn target<'a>(&'a self, path: &'a Path) -> Target<'a> {
        let file = match self {
            Self::File(new) => new.file(),
            Self::Device(device) => device,
        };
        Target { path, file }
    }

    /// Gives up what was written, before it is written anew. A device is overwritten.
    pub(super) fn empty(&self, target: Target<'_>) -> Result<()> {
        match self {
            Self::File(_) => target.set_len(0),
            Self::Device(_) => Ok(()),
        }
    }

    /// How its bytes are to be understood.
    pub(super) fn format(&self, format: OutputFormat) -> Format {
        match (self, format) {
            (Self::File(_), OutputFormat::Qcow2 { .. }) => Format::Qcow2,
            (Self::File(_), OutputFormat::Raw) | (Self::Device(_), _) => Format::Raw,
        }
    }
}

/// An output that is open.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    /// Its name for errors.
    pub(super) path: &'a Path,
    pub(super) file: &'a File,
}

impl Target<'_> {
    pub(super) fn set_len(&self, length: u64) -> Result<()> {
        self.file.set_len(length).map_err(|source| self.error(source))
    }

    pub(super) fn error(&self, source: io::Error) -> Error {
        Error::Write { path: self.path.to_owned(), source }
    }
}

/// Whether the output may be made, as far as can be said without touching it.
pub(super) fn check(path: &Path, format: OutputFormat, replace: bool, layers: &Layers) -> Result<()> {
    let wrong = |reason| Err(Error::OutputKind { path: path.to_owned(), reason });
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return wrong("is a folder: name the file in it");
    }
    let Some(there) = there(path)? else {
        // a link that leads nowhere takes the name, too
        let taken = !replace && path.symlink_metadata().is_ok();
        return if taken { Err(Error::OutputExists { path: path.to_owned() }) } else { Ok(()) };
    };
    let kind = there.file_type();
    if layers.contain(&there) {
        return Err(Error::OutputIsSource { path: path.to_owned() });
    }
    if kind.is_block_device() {
        return match format {
            OutputFormat::Raw => open_device(path, replace, layers).map(drop),
            OutputFormat::Qcow2 { .. } => wrong("is a block device: it takes --format raw only"),
        };
    }
    if kind.is_dir() {
        return wrong("is a folder: name the file in it");
    }
    if !kind.is_file() {
        return wrong("is neither a file nor a block device; `--out -` writes to a pipe");
    }
    if replace { unused(path).map(drop) } else { Err(Error::OutputExists { path: path.to_owned() }) }
}

/// A file that is to be replaced, locked so that nobody opens it; none where there is none, or nobody can tell.
fn unused(path: &Path) -> Result<Option<FileStorage>> {
    let storage = match FileStorage::open(path) {
        Ok(storage) => storage,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            return Ok(None);
        }
        Err(source) => return Err(Error::Open { path: path.to_owned(), source }),
    };
    match source::lock(path, &storage, Access::Write) {
        Err(error @ Error::Locked { .. }) => return Err(error),
        // the file system has no locks
        Err(_) => return Ok(None),
        Ok(()) => {}
    }
    Ok(Some(storage))
}

/// Opens what [`check`] has allowed.
pub(super) fn open(path: &Path, replace: bool, layers: &Layers) -> Result<Destination> {
    if there(path)?.is_some_and(|there| there.file_type().is_block_device()) {
        return open_device(path, replace, layers).map(Destination::Device);
    }
    let write_error = |source| Error::Write { path: path.to_owned(), source };
    let group = group_of_new(path);
    let new = NewFile::create(path, layers.mode(group)).map_err(write_error)?;
    restrict(new.file(), group, layers).map_err(write_error)?;
    Ok(Destination::File(new))
}

/// The group that a new file will have, as far as its folder tells.
fn group_of_new(path: &Path) -> u32 {
    /// The group of a folder goes to what is made in it.
    const SET_GROUP: u32 = 0o2000;
    let folder = path.parent().and_then(|folder| Path::new(".").join(folder).metadata().ok());
    let given = folder.filter(|folder| folder.mode() & SET_GROUP != 0).map(|folder| folder.gid());
    given.unwrap_or_else(|| rustix::process::getegid().as_raw())
}

/// Takes a new file away from those who may not read all of the images, where it has another group, or its folder a list of
/// those who may use it.
fn restrict(new: &File, expected: u32, layers: &Layers) -> io::Result<()> {
    let there = new.metadata()?;
    let has_list = access_list(new).map_or(true, |list| list.is_some());
    let allowed = match there.gid() {
        _ if has_list => 0o600,
        group if group == expected => return Ok(()),
        group => layers.mode(group),
    };
    new.set_permissions(Permissions::from_mode(there.mode() & allowed))
}

/// Syncs the output and gives a file its name.
pub(super) fn finish(path: &Path, destination: Destination, replace: bool) -> Result<()> {
    let result = match destination {
        Destination::File(file) => {
            // somebody may have opened it since it was looked at
            let _held = if replace { unused(path)? } else { None };
            file.publish(replace)
        }
        Destination::Device(device) => device.sync_all(),
    };
    result.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::OutputExists { path: path.to_owned() },
        _ => Error::Write { path: path.to_owned(), source },
    })
}

fn there(path: &Path) -> Result<Option<Metadata>> {
    match path.metadata() {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Write { path: path.to_owned(), source }),
    }
}

/// A device is written only if nobody uses it, the disk fits, and there is nothing on it yet or it may be replaced.
fn open_device(path: &Path, replace: bool, layers: &Layers) -> Result<File> {
    /// Partition tables, file systems and volume headers start here.
    const START: usize = 1 << 20;
    let write_error = |source| Error::Write { path: path.to_owned(), source };
    // on a block device this means: nobody has mounted or claimed it
    let device = File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
    let mut device = device.map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => Error::Locked { path: path.to_owned(), source },
        _ => write_error(source),
    })?;
    if !device.metadata().map_err(write_error)?.file_type().is_block_device() {
        // it was one when it was looked at
        return Err(Error::OutputKind { path: path.to_owned(), reason: "is no block device any more" });
    }
    let length = device.seek(SeekFrom::End(0)).map_err(write_error)?;
    if length < layers.size() {
        return Err(Error::DeviceTooSmall { path: path.to_owned(), length, needed: layers.size() });
    }
    let mut start = Vec::new();
    device.rewind().map_err(write_error)?;
    (&device).take(START as u64).read_to_end(&mut start).map_err(write_error)?;
    if !replace && start.iter().any(|byte| *byte != 0) {
        return Err(Error::DeviceNotEmpty { path: path.to_owned() });
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::Source;

    #[test]
    fn what_has_taken_the_place_of_a_device_is_not_written() {
        let full = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/FULL-1793588400-disk.qcow2");
        let layers = Layers::open(&[Source::new(full.into())]).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        assert!(matches!(open_device(file.path(), true, &layers), Err(Error::OutputKind { .. })));
    }
}
