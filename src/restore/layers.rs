//! The images of a restore point, opened and found to fit together.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checked_file::{self, CheckedFile, Unchecked, Unverified};
use super::error::{Error, Result};
use super::format::{Evidence, Start};
use super::layer::{Format, Layer};
use super::observer::{Observer, Warning};
use super::salvage::{self, Cause, Slot, Tolerance};
use super::source::{
    Source, check_backing, check_length, check_size, decide, evidence, lock, open, open_error, open_locked,
};
use crate::chain::{self, BLOCK, Checksums, ChecksumsError, FormatHint, RestorePoint};
use crate::qcow2::{self, Geometry};
use crate::storage::{self, Access, FileStorage, Storage};

/// The images of a restore point, oldest first.
#[derive(Debug)]
#[expect(clippy::struct_field_names, reason = "layers are what the field's own word for them is")]
pub struct Layers {
    layers: Vec<Layer>,
    /// The files, as they are on disk, and their paths.
    files: Vec<(PathBuf, Arc<FileStorage>)>,
    /// The first image that the system had no lock for.
    unlocked: Option<PathBuf>,
    /// What could not be checked, where that was wanted.
    unchecked: Vec<Unchecked>,
    /// What nothing tells the format of, and whether it is read as raw; only where it is salvaged.
    guessed: Vec<(PathBuf, bool)>,
    /// All start with the magic of qcow2.
    all_magic: bool,
}

impl Layers {
    /// Opens the images of a restore point, as [`open`](Self::open) does, or to verify them as
    /// [`open_verified`](Self::open_verified) does, and sees that it is still what was found: before they were open, nobody
    /// kept others from changing the FULL in place. `told` is their format, where somebody says it.
    ///
    /// # Errors
    /// As with [`open`](Self::open) or [`open_verified`](Self::open_verified); [`Error::Changed`].
    pub fn open_point(point: &RestorePoint, told: Option<Format>, verify: bool) -> Result<Self> {
        let sources: Vec<Source> = point.members.iter().map(|image| Source::of(image, told)).collect();
        let layers = if verify { Self::open_verified(&sources)? } else { Self::open(&sources)? };
        check_current(point)?;
        Ok(layers)
    }

    /// Opens a FULL and its INCs, in this order, each for reading only. Until they are closed, nobody else opens them for
    /// writing, see [`FileStorage::lock`].
    ///
    /// # Errors
    /// [`Error::Locked`] where somebody has one of them open for writing; what is wrong with one of them, or between two.
    pub fn open(sources: &[Source]) -> Result<Self> {
        Self::open_as(sources, |_, file, _| Ok(file.clone()))
    }

    /// As [`open`](Self::open), and whatever is read of an image is checked against its checksums when it is read first, as
    /// far as it has some.
    ///
    /// # Errors
    /// As with [`open`](Self::open), and [`Error::Length`]; [`Error::Checksum`], also from all that reads later.
    pub fn open_verified(sources: &[Source]) -> Result<Self> {
        let mut unchecked = Vec::new();
        let layers = Self::open_as(sources, |source, file, format| {
            let (sums, reason) = match Checksums::open(&source.path) {
                // who wants them checked takes no others for none
                Err(error @ (ChecksumsError::Damaged { .. } | ChecksumsError::Io { .. })) => return Err(error.into()),
                opened => checked_file::own_sums(opened)?,
            };
            unchecked.extend(reason.map(|reason| Unchecked { path: source.path.clone(), reason }));
            let verified = Arc::new(CheckedFile::new(file.clone(), sums, false));
            // what became a hole of a raw image is no data that is read
            let holes = if format == Format::Raw { verified.check_holes() } else { Ok(()) };
            holes.map_err(|error| Error::misfit(&source.path, &error).unwrap_or_else(|| open_error(source, error)))?;
            Ok(verified)
        })?;
        Ok(Self { unchecked, ..layers })
    }

    fn open_as<S: Storage + 'static>(
        sources: &[Source],
        mut wrap: impl FnMut(&Source, &Arc<FileStorage>, Format) -> Result<Arc<S>>,
    ) -> Result<Self> {
        let files: Vec<_> = sources.iter().map(open_locked).collect::<Result<_>>()?;
        let evidence: Vec<_> = sources.iter().zip(&files).map(evidence).collect::<Result<_>>()?;
        let formats = decide(&evidence)?;
        let all_magic = evidence.iter().all(|image| image.start == Start::Magic);
        sources.iter().zip(&files).try_for_each(|(source, file)| check_length(&source.path, file.length()))?;
        let images = sources.iter().zip(&files).zip(formats);
        let layers: Vec<_> = images
            .map(|((source, file), format)| {
                let layer = Layer::new(source.path.clone(), wrap(source, file, format)?, format)?;
                check_size(source, &layer)?;
                Ok(layer)
            })
            .collect::<Result<_>>()?;
        if layers.is_empty() {
            return Err(Error::Empty);
        }
        let before = std::iter::once(None).chain(layers.iter().map(|layer| Some(layer.path())));
        layers.iter().zip(before).try_for_each(|(layer, before)| check_backing(before, layer))?;
        let unlocked = sources.iter().zip(&files).find(|(_, file)| file.is_unlocked());
        let unlocked = unlocked.map(|(source, _)| source.path.clone());
        let files = sources.iter().map(|source| source.path.clone()).zip(files).collect();
        Ok(Self { layers, files, unlocked, unchecked: Vec::new(), guessed: Vec::new(), all_magic })
    }

    /// Opens what there is of a FULL and its INCs, in this order, so that all of it is read that can be: see
    /// [`Merge::salvage`](super::Merge::salvage). What is read is checked against the images' checksums, as far as they have
    /// some; that none has any is a [warning](Warning::Unchecked) only for who wants to `verify`.
    ///
    /// An image that is missing, or of which nothing can be had, is an [absent](Layer::is_absent) layer.
    ///
    /// # Errors
    /// [`Error::Locked`]; [`Error::Open`] where an image cannot be locked, or this process can open no more files;
    /// [`Error::Empty`] or what is wrong with the first image, where no image can be had;
    /// [`Error::Image`] where the FULL is encrypted.
    pub fn open_salvage(slots: &[Slot], verify: bool) -> Result<Self> {
        let mut opened = Vec::new();
        for slot in slots {
            opened.push(match slot {
                Slot::Image(source) => match open(source) {
                    Ok(file) => {
                        lock(&source.path, &file, Access::Read)?;
                        Ok(file)
                    }
                    Err(error) if is_short_of_means(&error) => return Err(error),
                    Err(error) => Err(Some(error)),
                },
                Slot::Missing { .. } => Err(None),
            });
        }
        let path = |slot: &Slot| match slot {
            Slot::Image(Source { path, .. }) | Slot::Missing { path, .. } => path.clone(),
        };
        let paths: Vec<PathBuf> = slots.iter().map(path).collect();
        let evidence: Vec<Evidence<'_>> = (slots.iter().zip(&paths).zip(&opened))
            .map(|((slot, path), file)| {
                let start = file.as_ref().ok().and_then(|file| Start::read(&**file).ok()).unwrap_or(Start::Damaged);
                match slot {
                    Slot::Image(source) => Evidence::of(source, start),
                    Slot::Missing { .. } => Evidence { path, hint: FormatHint::Unknown, start },
                }
            })
            .collect();
        let formats = decide(&evidence)?;
        let all_magic = evidence.iter().all(|image| image.start == Start::Magic);
        let doubtful = evidence.iter().zip(&formats).zip(&opened).filter(|((image, _), file)| {
            file.is_ok() && image.hint == FormatHint::Unknown && image.start == Start::Foreign
        });
        let guessed = doubtful.map(|((image, format), _)| (image.path.to_owned(), *format == Format::Raw)).collect();
        let (mut layers, mut files, mut first, mut unchecked) = (Vec::new(), Vec::new(), None, Vec::new());
        let mut unlocked = None;
        for (((slot, path), file), format) in slots.iter().zip(&paths).zip(opened).zip(formats) {
            let (Slot::Image(Source { size, .. }) | Slot::Missing { size, .. }) = slot;
            let layer = file.and_then(|file| {
                let (sums, reason) = checked_file::sums(path);
                unchecked.extend(reason.map(|reason| Unchecked { path: path.clone(), reason }));
                let layer = damaged(path, Arc::clone(&file), sums, format, *size).map_err(Some);
                if file.is_unlocked() {
                    unlocked.get_or_insert_with(|| path.clone());
                }
                files.push((path.clone(), file));
                layer
            });
            let cause = match layer {
                Ok(layer) => {
                    layers.extend(gap_before(layers.last(), &layer));
                    layers.push(layer);
                    continue;
                }
                Err(Some(error @ Error::Image { source: qcow2::Error::Encrypted { .. }, .. })) if layers.is_empty() => {
                    return Err(error);
                }
                Err(Some(error)) => {
                    let cause = Cause::Image(salvage::reason(&error));
                    first = first.or(Some(error));
                    cause
                }
                Err(None) => Cause::Missing,
            };
            layers.push(Layer::absent(path.clone(), *size, Tolerance::absent(cause)));
        }
        if layers.iter().all(Layer::is_absent) {
            return Err(first.unwrap_or(Error::Empty));
        }
        // images of a tool that makes no checksums are no surprise
        let without = unchecked.len() == files.len() && unchecked.iter().all(|image| image.reason == Unverified::None);
        if without && !verify {
            unchecked.clear();
        }
        Ok(Self { layers, files, unlocked, unchecked, guessed, all_magic })
    }

    /// Layers as they are.
    #[cfg(test)]
    pub(super) fn of(layers: Vec<Layer>) -> Self {
        Self { layers, files: Vec::new(), unlocked: None, unchecked: Vec::new(), guessed: Vec::new(), all_magic: true }
    }

    /// Why images could not be read, as far as they tell: that somebody has written to the one since it was opened, or what
    /// of the disk a block holds that does not fit its checksum.
    pub(super) fn explained(&self, error: Error) -> Error {
        let unreadable = match &error {
            Error::Image { path, .. } | Error::Read { path, .. } | Error::Checksum { path, .. } => Some(path.as_path()),
            // it may be any of them
            Error::Changed => None,
            _ => return error,
        };
        if let Some(path) = self.overwritten().find(|path| unreadable.is_none_or(|unreadable| unreadable == *path)) {
            return Error::Overwritten { path: path.to_owned() };
        }
        let Error::Checksum { path, offset, .. } = error else { return error };
        let image = self.layers.iter().find(|layer| layer.path() == path).and_then(Layer::image);
        let found = image.and_then(|image| qcow2::locate(image, std::slice::from_ref(&(offset..offset + BLOCK))).ok());
        let guest = found.and_then(|found| found.first()?.guest.first().cloned());
        Error::Checksum { path, offset, guest }
    }

    /// The layers, oldest first.
    #[must_use]
    pub fn as_slice(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers themselves, oldest first.
    pub(super) fn into_vec(self) -> Vec<Layer> {
        self.layers
    }

    /// Whether they were opened so that as much is read as can be.
    pub(super) fn are_tolerant(&self) -> bool {
        self.layers.first().is_some_and(|layer| layer.tolerance().is_some())
    }

    /// Bytes of the disk at the restore point.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layers.iter().rev().find_map(Layer::known_size).unwrap_or_default()
    }

    /// Whether the size of the disk is that of a raw image: of the newest that tells one, or of any where a manifest does.
    pub(super) fn is_raw(&self) -> bool {
        let is_raw = |layer: &Layer| !layer.is_absent() && layer.image().is_none();
        match self.layers.iter().rev().find(|layer| layer.known_size().is_some()) {
            Some(layer) if layer.is_absent() => self.layers.iter().any(is_raw),
            layer => layer.is_some_and(is_raw),
        }
    }

    /// Bytes in a cluster of the FULL; 64 KiB, as QEMU has it, for a raw FULL.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        let full = self.layers.iter().find(|layer| !layer.is_absent()).and_then(Layer::image);
        full.map_or(1 << 16, |image| image.header().geometry.cluster_size())
    }

    /// Whether zeroes in an INC cannot be told from holes: the chain has raw INCs.
    #[must_use]
    pub fn has_raw_increments(&self) -> bool {
        self.layers.iter().skip(1).any(|layer| layer.image().is_none() && !layer.is_absent())
    }

    /// What is not as it should be, but can be read.
    pub fn warnings(&self) -> impl Iterator<Item = Warning> + '_ {
        let corrupt = self.layers.iter().filter(|layer| layer.is_marked_corrupt());
        let corrupt = corrupt.map(|layer| Warning::MarkedCorrupt { path: layer.path().to_owned() });
        let headers = self.layers.iter().filter_map(|layer| {
            let reason = layer.image()?.damage()?.to_owned();
            Some(Warning::DamagedHeader { path: layer.path().to_owned(), reason })
        });
        let size = self.layers.last().filter(|layer| layer.known_size().is_none() || layer.has_doubtful_size());
        let size = size.map(|layer| Warning::SizeGuessed { path: layer.path().to_owned(), size: self.size() });
        let formats = self.guessed.iter().cloned();
        let formats = formats.map(|(path, is_raw)| Warning::FormatGuessed { path, is_raw });
        // a guest may write a header to a raw disk once, but hardly before each backup
        let doubtful = self.all_magic && self.has_raw_increments();
        let raw = self.layers.first().filter(|layer| doubtful && layer.image().is_none());
        // what one image lacks, the others mostly lack, too
        let unlocked = self.unlocked.iter().map(|path| Warning::NotLocked { path: path.clone() });
        let unchecked = self.unchecked.iter().cloned();
        let unchecked = unchecked.map(|Unchecked { path, reason }| Warning::Unchecked { path, reason });
        corrupt
            .chain(headers)
            .chain(formats)
            .chain(size)
            .chain(unlocked)
            .chain(unchecked)
            .chain(raw.map(|layer| Warning::LooksLikeQcow2 { path: layer.path().to_owned() }))
    }

    /// Whether a file is, or may be, one of the images.
    pub(super) fn contain(&self, file: &Metadata) -> bool {
        self.files
            .iter()
            .filter_map(|(_, image)| Some(image.as_file()?.metadata().ok()))
            .any(|image| image.is_none_or(|image| (image.dev(), image.ino()) == (file.dev(), file.ino())))
    }

    /// Makes sure that nobody has written to the images since they were opened: no lock keeps other programs than QEMU from it.
    /// A salvage takes what it got, with a warning.
    ///
    /// # Errors
    /// [`Error::Overwritten`].
    pub(super) fn check_unchanged(&self, observer: &dyn Observer) -> Result<()> {
        for path in self.overwritten() {
            let path = path.to_owned();
            if !self.are_tolerant() {
                return Err(Error::Overwritten { path });
            }
            observer.warning(Warning::Overwritten { path });
        }
        Ok(())
    }

    /// The images that somebody has written to since they were opened.
    fn overwritten(&self) -> impl Iterator<Item = &Path> {
        // what cannot be told is no reason to throw away what was read
        let changed = self.files.iter().filter(|(_, file)| file.is_changed().unwrap_or(false));
        changed.map(|(path, _)| path.as_path())
    }

    /// Who may read what is restored, as the mode of a file of this group: those who may read all of the images.
    pub(super) fn mode(&self, group: u32) -> u32 {
        let files = self.files.iter().map(|(_, image)| allowed(image.as_file()?, group).ok());
        let all = files.map(Option::unwrap_or_default).reduce(|all, one| all & one);
        all.unwrap_or_default() | 0o600
    }

    /// The cluster size of a new image as geometry.
    pub(super) fn geometry(cluster_size: u64) -> Result<Geometry> {
        let geometry = cluster_size.is_power_of_two().then(|| Geometry::new(cluster_size.trailing_zeros(), false));
        geometry.flatten().ok_or(Error::ClusterSize { size: cluster_size })
    }
}

/// Who may read and write an image, as the mode of a file of this group: those of another group are others there, and where a
/// list says who may, a mode cannot, but of the owner.
pub(super) fn allowed(image: &File, group: u32) -> io::Result<u32> {
    let there = image.metadata()?;
    let mode = there.mode() & 0o666;
    let others = mode & 0o006;
    Ok(match storage::access_list(image)? {
        Some(_) => mode & 0o600,
        None if there.gid() == group => mode,
        None => mode & 0o600 | others << 3 | others,
    })
}

/// Whether an image may well be there, and this process could not open it.
fn is_short_of_means(error: &Error) -> bool {
    const MEANS: [i32; 3] = [libc::EMFILE, libc::ENFILE, libc::ENOMEM];
    matches!(error, Error::Open { source, .. } if source.raw_os_error().is_some_and(|code| MEANS.contains(&code)))
}

/// Opens an image of which parts may be lost.
fn damaged(
    path: &Path,
    file: Arc<FileStorage>,
    sums: Option<Checksums>,
    format: Format,
    size: Option<u64>,
) -> Result<Layer> {
    let length = sums.as_ref().filter(|_| format == Format::Raw).map(Checksums::length);
    let file = Arc::new(CheckedFile::new(file, sums, true));
    if format == Format::Raw {
        // where the system cannot tell holes, they are read as all else
        let _ = file.check_holes();
    }
    let size = size.or(length);
    Layer::damaged(path.to_owned(), file.clone(), format, size, Tolerance::of(file))
}

/// The layer for what is missing between two images, if the second names something else as its backing file.
fn gap_before(before: Option<&Layer>, layer: &Layer) -> Option<Layer> {
    // of an image that is missing the name may be unknown: then it is this one
    if before.is_some_and(|before| before.is_absent() && Some(before.path()) == layer.path().parent()) {
        return None;
    }
    // nor is a name believed that may be damaged
    if layer.tolerance().is_some_and(Tolerance::header_is_damaged) {
        return None;
    }
    let Err(Error::Backing { backing, .. }) = check_backing(before.map(Layer::path), layer) else { return None };
    let path = layer.path().with_file_name(chain::name_in(&backing).unwrap_or_default());
    Some(Layer::absent(path, None, Tolerance::absent(Cause::Missing)))
}

/// Whether a restore point is still what was found, to be asked when its images are open: before that, nobody kept others
/// from changing the FULL in place.
///
/// # Errors
/// [`Error::Changed`]; [`Error::Folder`] where it cannot be told.
pub fn check_current(point: &RestorePoint) -> Result<()> {
    if point.is_current()? { Ok(()) } else { Err(Error::Changed) }
}
