//! Small files of a backup folder, written so that they outlive a power cut.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::Error;
pub(super) use crate::chain::BOOKKEEPING as FOLDER;
use crate::chain::ImageName;
use crate::json;
use crate::storage::{self, FileStorage, NewFile, Storage};

/// The end of the name of a fleece image.
pub(super) const FLEECE: &str = ".fleece.qcow2";

/// The end of the name of an image that is not whole.
const PARTIAL: &str = ".partial";

/// Larger files are none of ours.
const BYTES_MAX: u64 = 1 << 20;

/// What a file holds; `None` where there is no file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let file = match FileStorage::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    if file.length() > BYTES_MAX {
        return Err(failed(io::Error::other(format!("is longer than {BYTES_MAX} bytes"))));
    }
    let mut bytes = vec![0; storage::to_usize(file.length())];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    Ok(Some(bytes))
}

/// The JSON in a file; `None` where there is no file.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let value = json::parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
    value.map(Some).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Writes a file at once, for all to read: it is there whole, as it was before, or not at all.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_with(path, bytes, 0o644)
}

/// The same for those only who may read the images.
pub(super) fn write_secret_json(path: &Path, value: &Value) -> Result<(), Error> {
    write_with(path, &pretty(value), 0o600)
}

fn write_with(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let write = || {
        let new = NewFile::create(path, mode)?;
        new.file().write_all(bytes)?;
        new.publish(true)
    };
    write().map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Writes JSON as people read it.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    write(path, &pretty(value))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Whether nothing leads out of a backup folder: see [`storage::check_inside`].
pub(super) fn check_inside(folder: &Path, below: &Path) -> Result<(), Error> {
    let inside = storage::check_inside(folder, below);
    inside.map_err(|source| Error::Io { path: folder.join(below), source })
}

/// Makes what was done to a folder's names outlive a power cut.
pub(super) fn sync_folder(folder: &Path) -> Result<(), Error> {
    storage::sync_folder(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })
}

/// Removes a file that may be gone already.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io { path: path.to_owned(), source }),
        _ => Ok(()),
    }
}

/// Adds the end that says that an image is not whole.
pub(super) fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PARTIAL);
    name.into()
}

/// The path of a fleece image of the run of this time; `None` where it is none.
pub(super) fn fleece(text: &str, time: i64) -> Option<PathBuf> {
    let path = PathBuf::from(text);
    // it begins as the name of the image
    let stem = path.file_name()?.to_str()?.strip_suffix(FLEECE)?;
    let name = ImageName::parse(OsStr::new(stem))?;
    (path.is_absolute() && name.time == time).then_some(path)
}

/// A path as JSON has it: all paths of a run are UTF-8, see [`utf8`].
pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The path, if QEMU can be told of it.
pub(super) fn utf8(path: PathBuf) -> Result<PathBuf, Error> {
    if path.to_str().is_some() { Ok(path) } else { Err(Error::NotUtf8 { path }) }
}
