//! An image that is changed in place, whose checksums follow.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::checked_file::Unverified;
use super::error::{Error, Result};
use super::in_place;
use super::observer::{Observer, Warning, observed};
use crate::chain::{BLOCK, Checksums, ChecksumsError, Manifest, ManifestError, Renewal, SumError};
use crate::errors;
use crate::qcow2::{self, Geometry, Repair, Repaired};
use crate::storage::{FileStorage, Storage, Touched, WritableStorage};

/// A file whose checksums are unsettled from before the first write on, until [`Renewed::finish`].
#[derive(Debug)]
pub(super) struct Renewed {
    pub(super) path: PathBuf,
    /// The blocks that may be written to.
    blocks: Range<u64>,
    file: Arc<FileStorage>,
    touched: Touched,
    /// Bytes of the file before it changed.
    length: u64,
    /// Whether anything below that may have changed.
    changed: AtomicBool,
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
        Self {
            path: path.to_owned(),
            blocks,
            file: Arc::clone(file),
            touched,
            length: file.length(),
            changed: AtomicBool::new(false),
            renewal: Mutex::default(),
        }
    }

    /// Says that the image is about to change. The first write says it by itself, but copies in the kernel do not.
    pub(super) fn begin(&self) -> Result<()> {
        self.unsettle(0..0).map_err(|error| Error::sums(&self.path, error))
    }

    /// Before these bytes change.
    fn unsettle(&self, bytes: Range<u64>) -> Result<(), SumError> {
        let mut renewal = self.renewal.lock().unwrap_or_else(PoisonError::into_inner);
        let renewal = match &mut *renewal {
            Some(renewal) => renewal,
            none => none.insert(Renewal::begin(&self.path, self.blocks.clone())?),
        };
        if !bytes.is_empty() {
            self.changed.fetch_or(bytes.start < self.length, Ordering::Relaxed);
            // nobody else writes to a part of these blocks before they were looked at
            renewal.before_write(&bytes, &self.touched)?;
            self.touched.will_be_written(bytes)?;
        }
        Ok(())
    }

    /// Makes the checksums right, when all that was written is on stable storage; also where nothing was written now, but
    /// by an earlier run that ended before it was. What was damaged before, and was written to in part, is told.
    pub(super) fn finish(&self, observer: &dyn Observer) -> Result<()> {
        let renewal = self.renewal.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(renewal) = renewal else {
            self.file.sync().map_err(|source| Error::Write { path: self.path.clone(), source })?;
            in_place::sync_names(&self.path)?;
            return Renewal::settle(&self.path, &self.file).map_err(|error| Error::sums(&self.path, error));
        };
        if let Some(error) = renewal.unusable() {
            let reason = Unverified::Unusable(errors::line(error));
            observer.warning(Warning::Unchecked { path: self.path.clone(), reason });
        }
        let blocks = renewal.finish(&self.touched, &self.touched).map_err(|error| Error::sums(&self.path, error))?;
        if blocks > 0 {
            observer.warning(Warning::WasDamaged { path: self.path.clone(), blocks });
        }
        Ok(())
    }

    /// Repairs the image. Where that fails, its checksums still tell what was damaged before.
    pub(super) fn repair(self: &Arc<Self>, what: Repair, observer: &dyn Observer) -> Result<Repaired> {
        let storage: Arc<dyn WritableStorage> = Arc::<Self>::clone(self);
        let repaired = observed(observer, |each| qcow2::repair(&storage, what, each)).map_err(|source| {
            // what is wrong is told; blocks that stay unsettled are settled by the next run. Nobody knows what has become of
            // an image that could not be synced, and the next sync says nothing of that
            if !matches!(source, qcow2::Error::Sync { .. }) {
                let _ = self.give_up(observer);
            }
            Error::image(&self.path)(source)
        })?;
        self.finish(observer)?;
        Ok(repaired)
    }

    /// Makes the checksums right after work that failed: what they were, where the image has nothing new but behind its old
    /// end, which goes.
    fn give_up(&self, observer: &dyn Observer) -> Result<()> {
        let changed = self.changed.load(Ordering::Relaxed);
        if !changed && self.file.length() != self.length {
            self.file.set_length(self.length).map_err(|source| self.error(source))?;
        }
        self.file.sync().map_err(|source| self.error(source))?;
        if changed {
            return self.finish(observer);
        }
        let renewal = self.renewal.lock().unwrap_or_else(PoisonError::into_inner).take();
        renewal.map_or(Ok(()), Renewal::abandon).map_err(|source| self.error(source))
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
        self.unsettle(offset..offset.saturating_add(bytes.len() as u64))?;
        self.touched.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let old = self.touched.length();
        self.unsettle(old.min(length)..old.max(length))?;
        self.touched.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.touched.sync()
    }

    fn will_be_written(&self, range: Range<u64>) -> io::Result<()> {
        Ok(self.unsettle(range)?)
    }
}

/// Refuses an image whose manifest or checksums could not be renewed: a later version of this program has made them, they
/// cannot be read, or the one is of another image than the other.
pub(super) fn check_renewable(image: &Path) -> Result<()> {
    let checksums = match Checksums::open_writable(image) {
        // nothing is changed there, but it can be looked at
        Err(ChecksumsError::Io { source, .. }) if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            Checksums::open(image)
        }
        opened => opened,
    };
    match (Manifest::read(image), checksums) {
        (Err(error @ (ManifestError::Version { .. } | ManifestError::Io { .. })), _) => Err(error.into()),
        (
            _,
            Err(error @ (ChecksumsError::Version { .. } | ChecksumsError::Io { .. } | ChecksumsError::Foreign { .. })),
        ) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Whether a run that was killed has left checksums of an image unsettled.
pub(super) fn is_unsettled(image: &Path) -> bool {
    Checksums::open(image).is_ok_and(|sums| sums.is_some_and(|sums| !sums.unsettled().is_empty()))
}
