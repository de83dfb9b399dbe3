//! Images to open, alone or beside those that they must fit.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Error, Result};
use super::format::{self, Evidence, Start};
use super::layer::{Format, Layer};
use super::resolve::Mapped;
use crate::chain::{self, Checksums, FormatHint};
use crate::storage::{Access, FileStorage, Storage};

/// An image to open, and what is known of its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Where the image is.
    pub path: PathBuf,
    /// What somebody wrote down of its format, or says; where that does not tell, the image must.
    pub format: FormatHint,
    /// Bytes of its disk, where somebody wrote it down: the image must say the same.
    pub size: Option<u64>,
}

impl Source {
    /// An image of which nothing is known.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, format: FormatHint::Unknown, size: None }
    }

    /// An image of a chain, of which somebody may say what format it has.
    #[must_use]
    pub fn of(image: &chain::Image, told: Option<Format>) -> Self {
        let source = Self::from(image);
        let Some(told) = told.map(FormatHint::from) else { return source };
        // what is known of one format says nothing of another
        let size = source.size.filter(|_| told == source.format);
        Self { format: told, size, ..source }
    }
}

impl From<&chain::Image> for Source {
    fn from(image: &chain::Image) -> Self {
        let size = image.known().map(|known| known.virtual_size);
        Self { path: image.path.clone(), format: image.format, size }
    }
}

/// Opens an image for reading only, whoever else uses it.
pub(super) fn open(source: &Source) -> Result<Arc<FileStorage>> {
    FileStorage::open(&source.path).map(Arc::new).map_err(|error| open_error(source, error))
}

/// Opens an image for reading only, so that nobody writes to it meanwhile.
pub(super) fn open_locked(source: &Source) -> Result<Arc<FileStorage>> {
    let storage = open(source)?;
    lock(&source.path, &storage, Access::Read)?;
    Ok(storage)
}

/// Opens an image that is to be changed where it is. Until it is closed, nobody else opens it, see [`FileStorage::lock`].
///
/// # Errors
/// [`Error::Open`], also where it is no regular file; [`Error::Locked`] where somebody has it open already, this process
/// included.
pub fn open_writable(path: &Path) -> Result<Arc<FileStorage>> {
    let storage = FileStorage::open_writable(path);
    let storage = storage.map_err(|source| Error::Open { path: path.to_owned(), source })?;
    lock(path, &storage, Access::Write)?;
    Ok(Arc::new(storage))
}

pub(super) fn lock(path: &Path, storage: &FileStorage, access: Access) -> Result<()> {
    storage.lock(access).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::ResourceBusy => Error::Locked { path, source },
            _ => Error::Open { path, source },
        }
    })
}

pub(super) fn open_error(source: &Source, error: io::Error) -> Error {
    Error::Open { path: source.path.clone(), source: error }
}

/// What an image starts with.
pub(super) fn start(source: &Source, storage: &dyn Storage) -> Result<Start> {
    Start::read(storage).map_err(|error| open_error(source, error))
}

pub(super) fn evidence<'a>((source, storage): (&'a Source, &Arc<FileStorage>)) -> Result<Evidence<'a>> {
    Ok(Evidence::of(source, start(source, &**storage)?))
}

/// As [`format::decide`].
pub(super) fn decide(images: &[Evidence<'_>]) -> Result<Vec<Format>> {
    format::decide(images).map_err(|either| {
        let path = images.get(either).map_or_else(PathBuf::new, |image| image.path.to_owned());
        Error::EitherFormat { path }
    })
}

/// An image must have a disk of the size that was written down when it was made.
pub(super) fn check_size(source: &Source, layer: &Layer) -> Result<()> {
    let size = layer.size();
    match source.size.filter(|expected| *expected != size) {
        Some(expected) => Err(Error::DiskSize { path: source.path.clone(), size, expected }),
        None => Ok(()),
    }
}

/// An image must be as long as when its checksums were made.
pub(super) fn check_length(path: &Path, length: u64) -> Result<()> {
    match Checksums::other_length(path, length) {
        Some(expected) => Err(Error::Length { path: path.to_owned(), length, expected }),
        None => Ok(()),
    }
}

/// A backing name inside an image must be that of the image before it: a directory that was rebased reads as it
/// did before, and a chain with a gap is noticed.
pub(super) fn check_backing(before: Option<&Path>, layer: &Layer) -> Result<()> {
    let Some(backing) = layer.image().and_then(|image| image.header().backing.as_ref()) else { return Ok(()) };
    let expected = before.and_then(Path::file_name);
    if expected.is_some_and(|expected| chain::leads_to(&backing.name, expected)) {
        return Ok(());
    }
    Err(Error::Backing {
        path: layer.path().to_owned(),
        backing: backing.name.clone(),
        expected: expected.map(OsStr::to_string_lossy).map(String::from),
    })
}
