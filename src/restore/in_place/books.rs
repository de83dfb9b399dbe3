//! What is known of images beside them, while they are changed in place.

use std::io;
use std::path::{Path, PathBuf};

use super::files::remove_file;
use crate::chain::{Checksums, FormatHint, Image, ImageId, Level, Manifest};
use crate::restore::error::{Error, Result};

/// What is known of a FULL that now holds the moment of an INC.
pub(in crate::restore) fn renew(full: &Path, held: &Image, size: u64) -> Result<()> {
    let (old, inc) = (read_manifest(full)?, read_manifest(&held.path)?);
    let id = old.as_ref().and_then(|old| old.id);
    // that of the FULL goes back to an older moment
    let bitmap = inc.as_ref().and_then(|inc| inc.bitmap.clone());
    let (chain, qemu) = inc.or(old).map(|manifest| (manifest.chain, manifest.qemu)).unwrap_or_default();
    let image = full.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let manifest = Manifest {
        image,
        id,
        level: Level::Full,
        time: held.time,
        chain,
        parent: None,
        parent_id: None,
        bitmap,
        format: FormatHint::Qcow2,
        virtual_size: size,
        qemu,
    };
    write_manifest(full, &manifest)
}

/// The id of an image, where its manifest tells one.
pub(in crate::restore) fn id(image: &Path) -> Result<Option<ImageId>> {
    Ok(read_manifest(image)?.and_then(|manifest| manifest.id))
}

/// Gives an image a new id where it still has this one.
pub(in crate::restore) fn give_id(image: &Path, former: Option<ImageId>) -> Result<()> {
    let Some(manifest) = read_manifest(image)?.filter(|manifest| manifest.id.is_some() && manifest.id == former) else {
        return Ok(());
    };
    let id = ImageId::random().map_err(|source| Error::Write { path: Manifest::path(image), source })?;
    write_manifest(image, &Manifest { id: Some(id), ..manifest })
}

pub(super) fn read_manifest(image: &Path) -> Result<Option<Manifest>> {
    Manifest::read_again(image).map_err(|source| Error::Open { path: Manifest::path(image), source })
}

pub(super) fn write_manifest(image: &Path, manifest: &Manifest) -> Result<()> {
    manifest.write(image).map_err(|source| Error::Write { path: Manifest::path(image), source })
}

/// Removes what is known of images of the FULL's folder that are gone: after a power cut it may be there again.
pub(in crate::restore) fn remove_books_of_gone(full: &Path, images: &[String]) -> Result<()> {
    let paths = images.iter().map(|name| full.with_file_name(name));
    let is_gone = |path: &PathBuf| path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    paths.filter(is_gone).try_for_each(|path| remove_books(&path))
}

pub(super) fn remove_books(image: &Path) -> Result<()> {
    remove_file(&Checksums::path(image))?;
    remove_file(&Manifest::path(image)).map(drop)
}
