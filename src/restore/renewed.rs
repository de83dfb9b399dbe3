//! An image that is changed in place, whose checksums follow.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::error::{Error, Result};
use crate::chain::{BLOCK, Checksums, ChecksumsError, Manifest, ManifestError, Renewal};
use crate::qcow2::Geometry;
use crate::storage::{FileStorage, Storage, Touched, WritableStorage};

/// A file whose checksums are unsettled from before the first write on, until [`Renewed::finish`].
#[derive(Debug)]
pub(super) struct Renewed {
    pub(super) path: PathBuf,
    /// The blocks that may be written to.
    blocks: Range<u64>,
    file: Arc<FileStorage>,
    touched: Touched,
    renewal: Mutex<Option<Renewal>>,
}

impl Renewed {
    /// An image of which any block may change.
    pub(super) fn whole(path: &Path, file: &Arc<FileStorage>) -> Self {
        Self::of(path, file, 0..u64::MAX)
    }

    /// An image of which only the header changes.
    pub(super) fn header(path: &Path, file: &Arc<FileStorage>, geometry: Geometry) -> Self {
        Self::of(path, file, 0..geometry.cluster_size().div_ceil(BLOCK))
    }

    fn of(path: &Path, file: &Arc<FileStorage>, blocks: Range<u64>) -> Self {
        let touched = Touched::new(Arc::clone(file), BLOCK);
        Self { path: path.to_owned(), blocks, file: Arc::clone(file), touched, renewal: Mutex::default() }
    }

    /// Says that the image is about to change. The first write says it by itself, but copies in the kernel do not.
    pub(super) fn begin(&self) -> Result<()> {
        self.unsettle().map_err(|source| self.error(source))
    }

    fn unsettle(&self) -> io::Result<()> {
        let mut renewal = self.renewal.lock().unwrap_or_else(PoisonError::into_inner);
        if renewal.is_none() {
            *renewal = Some(Renewal::begin(&self.path, self.blocks.clone())?);
        }
        Ok(())
    }

    /// Makes the checksums right, when all that was written is on stable storage; also where nothing was written now, but
    /// by an earlier run that was killed.
    pub(super) fn finish(&self) -> Result<()> {
        let renewal = self.renewal.lock().unwrap_or_else(PoisonError::into_inner).take();
        let finished = match renewal {
            Some(renewal) => renewal.finish(&self.touched, &self.touched),
            None => Renewal::settle(&self.path, &self.file),
        };
        finished.map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Write { path: Checksums::path(&self.path), source }
    }
}

impl Storage for Renewed {
    fn length(&self) -> u64 {
        self.touched.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.touched.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.touched.next_data(offset)
    }

    fn next_data_start(&self, offset: u64) -> io::Result<Option<u64>> {
        self.touched.next_data_start(offset)
    }

    fn as_file(&self) -> Option<&File> {
        self.touched.as_file()
    }
}

impl WritableStorage for Renewed {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.unsettle()?;
        self.touched.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.unsettle()?;
        self.touched.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.touched.sync()
    }

    fn written(&self, range: Range<u64>) {
        self.touched.written(range);
    }
}

/// Refuses an image whose manifest or checksums could not be renewed: a later version of this program has made them, or they
/// cannot be read.
pub(super) fn check_renewable(image: &Path) -> Result<()> {
    match (Manifest::read(image), Checksums::open(image)) {
        (Err(error @ (ManifestError::Version { .. } | ManifestError::Io { .. })), _) => Err(error.into()),
        (_, Err(error @ (ChecksumsError::Version { .. } | ChecksumsError::Io { .. }))) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Whether a run that was killed has left checksums of an image unsettled.
pub(super) fn is_unsettled(image: &Path) -> bool {
    Checksums::open(image).is_ok_and(|sums| sums.is_some_and(|sums| !sums.unsettled().is_empty()))
}
