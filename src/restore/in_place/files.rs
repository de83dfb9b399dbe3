//! The files of a chain that is changed in place: images that go, and the link that leads to one of them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::books::remove_books;
use super::number;
use crate::chain::{self, Image, POINT_LINK};
use crate::restore::error::{Error, Result};
use crate::storage::{self, FileStorage};

/// The link `image` that a rebase has left beside the FULL, where it leads to one of these images.
pub(in crate::restore) fn link_to(full: &Path, images: &[Arc<Image>]) -> Result<Option<PathBuf>> {
    let link = full.with_file_name(POINT_LINK);
    let leads_to = match std::fs::read_link(&link) {
        Ok(leads_to) => leads_to,
        // there is none, or it is none
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => return Ok(None),
        Err(source) => return Err(Error::Open { path: link, source }),
    };
    let is_one = leads_to.file_name().is_some_and(|name| images.iter().any(|image| image.name() == name));
    Ok(is_one.then_some(link))
}

/// Lets that link lead to the FULL.
pub(in crate::restore) fn point_link(full: &Path, images: &[Arc<Image>]) -> Result<()> {
    let Some(link) = link_to(full, images)? else { return Ok(()) };
    let name = full.file_name().unwrap_or_default();
    storage::set_link(&link, Path::new(name)).map_err(|source| Error::Write { path: link, source })
}

/// Removes an image and what is known of it; false if it is gone already. Where it is open, nothing else goes that has got
/// its name meanwhile.
pub(in crate::restore) fn remove(image: &Path, open: Option<&FileStorage>) -> Result<bool> {
    let is_other = |open: &FileStorage| match (open.file().metadata(), image.symlink_metadata()) {
        (Ok(open), Ok(named)) => number(&open) != number(&named),
        // removing says what is wrong
        _ => false,
    };
    if open.is_some_and(is_other) {
        return Err(Error::Changed);
    }
    // where only one of them goes, the image is still there to be found
    remove_books(image)?;
    remove_file(image)
}

/// False where it is gone already.
pub(super) fn remove_file(path: &Path) -> Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Write { path: path.to_owned(), source }),
    }
}

/// Returns when names that were made or removed stay so.
pub(in crate::restore) fn sync_names(image: &Path) -> Result<()> {
    chain::sync_names(image).map_err(|source| Error::Write { path: storage::parent(image).to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_has_got_the_name_of_an_image_meanwhile_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (image, other) = (folder.path().join("INC-1-disk"), folder.path().join("other"));
        std::fs::write(&image, "image").unwrap();
        let open = FileStorage::open(&image).unwrap();
        std::fs::write(&other, "other").unwrap();
        std::fs::rename(&other, &image).unwrap();
        assert!(matches!(remove(&image, Some(&open)), Err(Error::Changed)));
        assert_eq!(std::fs::read(&image).unwrap(), b"other");
        std::os::unix::fs::symlink("/dev/null", &other).unwrap();
        std::fs::rename(&other, &image).unwrap();
        assert!(matches!(remove(&image, Some(&open)), Err(Error::Changed)));
        std::fs::remove_file(&image).unwrap();
        assert!(!remove(&image, Some(&open)).unwrap());
        // the one that is open, and one that nobody has opened
        std::fs::write(&image, "image").unwrap();
        assert!(remove(&image, Some(&FileStorage::open(&image).unwrap())).unwrap() && !image.exists());
        std::fs::write(&image, "image").unwrap();
        assert!(remove(&image, None).unwrap() && !image.exists());
    }
}
