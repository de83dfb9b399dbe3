//! Names in a backup folder that outlive a power cut.

use std::io;
use std::path::Path;

use super::BOOKKEEPING;
use crate::storage;

/// Has the names of an image and of what is known of it on stable storage, where their folders are there and can be synced.
///
/// # Errors
/// What the system says.
pub(crate) fn sync_names(image: &Path) -> io::Result<()> {
    let folder = storage::parent(image);
    [&folder.join(BOOKKEEPING), folder].into_iter().try_for_each(|folder| match storage::sync_names(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        synced => synced,
    })
}
