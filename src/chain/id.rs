//! The id of a chain: what stands in the file `uuid` of the folder that a machine's backups go to.

use std::io::{self, ErrorKind};
use std::path::Path;

use rustix::io::retry_on_intr;
use rustix::rand::GetRandomFlags;

use super::UUID;
use crate::storage::{FileStorage, Storage, to_usize};

/// Characters in an id: a bitmap's name has room for 1023 bytes.
const CHARACTERS_MAX: usize = 200;

/// Larger files are none of ours.
const BYTES_MAX: u64 = 1 << 12;

/// Whether bitmaps can bear this id.
#[must_use]
pub fn is_chain_id(text: &str) -> bool {
    (1..=CHARACTERS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Bytes that nobody can guess.
///
/// # Errors
/// The system has no random numbers.
pub(super) fn random_bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let length = retry_on_intr(|| rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()))?;
    if length == bytes.len() { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// A random id for a chain or a name that nobody can guess: a UUID of version 4.
///
/// # Errors
/// The system has no random numbers.
#[cfg(any(feature = "capture", test))]
pub(crate) fn random_id() -> io::Result<String> {
    const VERSION: u128 = 0xf << 76;
    const VARIANT: u128 = 3 << 62;
    let random = u128::from_be_bytes(random_bytes()?);
    let uuid = format!("{:032x}", random & !VERSION & !VARIANT | 4 << 76 | 2 << 62);
    let mut rest = uuid.as_str();
    let parts = [8, 4, 4, 4, 12].map(|length| {
        let (part, after) = rest.split_at(length);
        rest = after;
        part
    });
    Ok(parts.join("-"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_is_a_uuid_and_never_the_same() {
        let ids = [random_id().unwrap(), random_id().unwrap()];
        assert_ne!(ids[0], ids[1]);
        for id in ids {
            let parts: Vec<usize> = id.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
            assert_eq!(id.as_bytes()[14], b'4', "{id}");
            assert!(b"89ab".contains(&id.as_bytes()[19]) && is_chain_id(&id), "{id}");
        }
    }
}
