//! Small files of a backup folder, written so that they outlive a power cut.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::capture::error::Error;
use crate::chain::json_file;
use crate::storage;

/// Writes a file at once, for all to read: it is there whole, as it was before, or not at all.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    storage::write_whole(path, bytes, 0o644, None).map_err(Error::io(path))
}

/// The same for those only who may read the images.
pub(crate) fn write_secret_json(path: &Path, value: &Value) -> Result<(), Error> {
    let written = storage::write_whole(path, &json_file::text(value), 0o600, None);
    written.map_err(Error::io(path))
}

/// Whether nothing leads out of a backup folder: see [`storage::check_inside`].
pub(crate) fn check_inside(folder: &Path, below: &Path) -> Result<(), Error> {
    let inside = storage::check_inside(folder, below);
    inside.map_err(Error::io(&folder.join(below)))
}

/// Makes what was done to a folder's names outlive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), Error> {
    storage::sync_folder(folder).map_err(Error::io(folder))
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io { path: path.to_owned(), source }),
        _ => Ok(()),
    }
}

/// Removes a fleece image if it is there; the run may not even have found its folder.
pub(crate) fn remove_fleece(path: &Path) -> Result<(), Error> {
    match path.symlink_metadata() {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
        _ => remove(path),
    }
}

/// A path as JSON has it: all paths of a run are UTF-8, see [`utf8`].
pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The path, if QEMU can be told of it.
pub(crate) fn utf8(path: PathBuf) -> Result<PathBuf, Error> {
    if path.to_str().is_some() { Ok(path) } else { Err(Error::NotUtf8 { path }) }
}
