//! The id of a chain: what stands in the file `uuid` of the folder that a machine's backups go to.

use std::io::{self, ErrorKind};
use std::path::Path;

use super::UUID;
use crate::storage::{FileStorage, Storage, to_usize};

/// Characters in an id: a bitmap's name has room for 1023 bytes.
const CHARACTERS_MAX: usize = 200;

/// Larger files are none of ours.
const BYTES_MAX: u64 = 1 << 12;

/// Where the system gives out random ids.
pub(crate) const RANDOM: &str = "/proc/sys/kernel/random/uuid";

/// Whether bitmaps can bear this id.
#[must_use]
pub fn is_chain_id(text: &str) -> bool {
    (1..=CHARACTERS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A random id, as the system writes them, for a chain or a name that nobody can guess.
///
/// # Errors
/// The system has no random numbers.
pub(crate) fn random_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(RANDOM)?.trim().to_owned())
}

/// The id of a folder's chain; `None` where none has begun.
///
/// # Errors
/// `InvalidData` where what stands there cannot be an id; else what the system says.
pub(crate) fn chain_id(folder: &Path) -> io::Result<Option<String>> {
    let file = match FileStorage::open(&folder.join(UUID)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = vec![0; to_usize(file.length().min(BYTES_MAX))];
    file.read_exact_at(&mut bytes, 0)?;
    let text = String::from_utf8(bytes).ok().map(|text| text.trim().to_owned());
    let id = text.filter(|id| is_chain_id(id) && file.length() <= BYTES_MAX);
    id.map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
}
