//! Small JSON files beside the images. What they hold may be anything; what is written is there whole or not at all.

use std::io::{self, ErrorKind};
use std::path::Path;

use serde_json::{Map, Value};

use super::MAX_CONFIG_BYTES;
use crate::json;
use crate::storage::{self, FileStorage, Storage, to_usize};

/// The JSON in a file; `None` where there is no such file.
pub(crate) fn read(path: &Path) -> io::Result<Option<Value>> {
    read_up_to(path, MAX_CONFIG_BYTES)
}

/// The same, of a file that has at most so many bytes.
pub(super) fn read_up_to(path: &Path, limit: u64) -> io::Result<Option<Value>> {
    let file = match FileStorage::open(path) {
        Err(error) if is_absent(path, &error) => return Ok(None),
        opened => opened?,
    };
    if file.length() > limit {
        return Err(invalid(format!("{} bytes long, at most {limit} are read", file.length())));
    }
    let mut bytes = vec![0; to_usize(file.length())];
    file.read_exact_at(&mut bytes, 0)?;
    json::parse(&bytes).map(Some).map_err(invalid)
}

/// Whether a file that cannot be opened is not there. Where it, or its folder, is a link to what is not there now, nobody knows
/// what it tells.
pub(super) fn is_absent(path: &Path, error: &io::Error) -> bool {
    let folder = storage::parent(path);
    let leads_nowhere = || path.is_symlink() || folder.is_symlink() && !folder.exists();
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) && !leads_nowhere()
}

/// Writes a file in a folder for bookkeeping, as people read it: it is there whole and on stable storage, as it was before,
/// or not at all. It belongs to who owns the folder.
pub(crate) fn write(path: &Path, value: &Value) -> io::Result<()> {
    let folder = storage::parent(path);
    storage::check_inside(storage::parent(folder), Path::new(folder.file_name().unwrap_or_default()))?;
    storage::create_folders(folder)?;
    storage::write_whole(path, &text(value), 0o644, Some(&folder.metadata()?))
}

/// A value as such files have it.
pub(crate) fn text(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Adds the `crc32` of all keys that are there.
pub(crate) fn seal(keys: &mut Map<String, Value>) {
    let sum = checksum(keys);
    keys.insert("crc32".to_owned(), sum.into());
}

/// Whether the `crc32` fits, if there is one.
pub(crate) fn seal_fits(keys: &Map<String, Value>) -> Option<bool> {
    keys.get("crc32").map(|sum| sum.as_str() == Some(&checksum(keys)))
}

/// The CRC-32 of all keys but `crc32`.
fn checksum(keys: &Map<String, Value>) -> String {
    let mut keys: Vec<_> = keys.iter().filter(|(key, _)| *key != "crc32").collect();
    keys.sort_by_key(|(key, _)| *key);
    let mut hasher = crc32fast::Hasher::new();
    for (key, value) in keys {
        hasher.update(format!("{key}:{value}\n").as_bytes());
    }
    format!("{:08x}", hasher.finalize())
}

/// What a file holds is not what it should.
pub(super) fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}
