//! Are the tables of images sound, and can they be made so? In parallel, an image each thread.

use std::path::Path;
use std::sync::Arc;

use super::checked_file::{CheckedFile, own_sums};
use super::error::{Error, Result, is_unread};
use super::format::{Evidence, Start};
use super::in_place;
use super::layer::{Format, Layer};
use super::observer::{Observer, Phase, observed};
use super::pool;
use super::renewed::Renewed;
use super::resolve::Mapped;
use super::slices::Slices;
use super::source::{self, Source};
use crate::chain::{Checksums, FolderLock};
use crate::qcow2::{
    self, Bitmap, CheckLimits, ClusterReader, Content, Header, Image, MapBuffer, Repair, Report, Snapshot,
};
use crate::storage::{self, FileStorage, Storage};

/// An image that was checked.
#[derive(Debug)]
#[non_exhaustive]
pub enum Checked {
    /// A raw image, in which nothing can be wrong.
    Raw {
        /// Bytes of the file.
        length: u64,
    },
    /// A qcow2 image.
    Qcow2(Box<CheckedImage>),
}

/// A qcow2 image that was checked.
#[derive(Debug)]
pub struct CheckedImage {
    /// The header.
    pub header: Header,
    /// What was found; where a repair was asked for, what is left.
    pub report: Report,
    /// What was found before the repair, where one was asked for.
    pub before: Option<Report>,
    /// The internal snapshots; none where their table is damaged.
    pub snapshots: Vec<Snapshot>,
    /// The bitmaps; none where their directory is damaged.
    pub bitmaps: Vec<Bitmap>,
    /// Bytes of the file.
    pub length: u64,
}

/// Checks images, which are known as members of chains, oldest first, or alone, and repairs those that need it if that is
/// asked for. The results come in their order; an image that somebody else writes to, or with a repair has open, is
/// [`Error::Locked`].
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Folder`] where images with checksums are to be repaired, and somebody else has their
/// folder; what is wrong with an image is a result of its own.
pub fn check(chains: &[Vec<Source>], repair: Option<Repair>, observer: &dyn Observer) -> Result<Vec<Result<Checked>>> {
    let images: Vec<&Source> = chains.iter().flatten().collect();
    let _folders = if repair.is_some() { lock_checksums(&images)? } else { Vec::new() };
    let formats: Vec<Option<Format>> = chains
        .iter()
        .flat_map(|chain| {
            formats(chain).map_or_else(|_| vec![None; chain.len()], |formats| formats.into_iter().map(Some).collect())
        })
        .collect();
    let bytes: u64 = images.iter().filter_map(|source| source.path.metadata().ok()).map(|file| file.len()).sum();
    observer.phase(Phase::Checking { bytes: bytes * walks(repair) });
    pool::map(
        images.into_iter().zip(formats),
        || (),
        |(), (source, format)| {
            let Some(format) = format else { return Ok(Err(Error::EitherFormat { path: source.path.clone() })) };
            match check_file(source, format, repair, observer) {
                Err(Error::Cancelled) => Err(Error::Cancelled),
                result => Ok(result),
            }
        },
    )
}

/// Keeps others from the folders of images with checksums.
fn lock_checksums(images: &[&Source]) -> Result<Vec<FolderLock>> {
    let known = images.iter().filter(|source| Checksums::path(&source.path).exists());
    Ok(FolderLock::take_all_of(known.map(|source| storage::parent(&source.path)))?)
}

/// # Errors
/// [`Error::EitherFormat`].
pub(super) fn formats(chain: &[Source]) -> Result<Vec<Format>> {
    let start = |source: &Source| source::open(source).and_then(|storage| source::start(source, &*storage));
    // the check will say why one cannot be read
    let evidence = chain.iter().map(|source| Evidence::of(source, start(source).unwrap_or(Start::Damaged)));
    source::decide(&evidence.collect::<Vec<_>>())
}

/// A repair looks at the tables before, meanwhile and after, and compares them with their checksums first.
fn walks(repair: Option<Repair>) -> u64 {
    if repair.is_some() { 4 } else { 1 }
}

fn check_file(source: &Source, format: Format, repair: Option<Repair>, observer: &dyn Observer) -> Result<Checked> {
    let path = source.path.as_path();
    let storage = match repair {
        Some(_) if format == Format::Qcow2 => in_place::open(source)?,
        _ => source::open_locked(source)?,
    };
    if format == Format::Raw {
        let length = storage.length();
        observer.advance(length * walks(repair));
        return Ok(Checked::Raw { length });
    }
    let failed = Error::image(path);
    Header::read_to_check(&*storage).map_err(failed)?;
    let (before, report) = match repair {
        Some(what) => {
            check_sums(path, &storage, observer)?;
            let renewed = Arc::new(Renewed::whole(path, &storage));
            let repaired = renewed.repair(what, observer)?;
            (Some(repaired.before), repaired.after)
        }
        None => (None, observed(observer, |each| qcow2::check(&*storage, each)).map_err(failed)?),
    };
    let header = Header::read_to_check(&*storage).map_err(failed)?;
    let length = storage.length();
    let image = if_sound(Image::open(storage)).map_err(failed)?;
    let snapshots = image.as_ref().map(|image| if_sound(image.snapshots())).transpose().map_err(failed)?;
    let bitmaps = image.as_ref().map(|image| if_sound(image.bitmaps())).transpose().map_err(failed)?;
    let (snapshots, bitmaps) = (snapshots.flatten().unwrap_or_default(), bitmaps.flatten().unwrap_or_default());
    Ok(Checked::Qcow2(Box::new(CheckedImage { header, report, before, snapshots, bitmaps, length })))
}

/// Whether header and tables are what their checksums say, where there are some that can be used. New refcounts are made
/// from them, and free what damaged ones do not lead to; the old refcounts may be damaged.
fn check_sums(path: &Path, storage: &Arc<FileStorage>, observer: &dyn Observer) -> Result<()> {
    let (Some(sums), _) = own_sums(Checksums::open(path))? else {
        observer.advance(storage.length());
        return Ok(());
    };
    source::check_length(path, storage.length())?;
    let checked = CheckedFile::new(storage.clone(), Some(sums), false);
    let report = observed(observer, |each| qcow2::check_apart(&checked, &**storage, each));
    report.map(drop).map_err(Error::image(path))
}

/// What is damaged is none, and has findings in its report.
fn if_sound<T>(result: qcow2::Result<T>) -> qcow2::Result<Option<T>> {
    match result {
        Err(error) if is_unread(&error) => Err(error),
        result => Ok(result.ok()),
    }
}

/// Checks the images of a chain that is about to be read: damage is an error, wrong refcounts of an image that says
/// so by its dirty bit, lost space, and what only QEMU refuses, are not.
pub(super) fn check_layers<'a>(
    layers: impl IntoIterator<Item = &'a Layer, IntoIter: Clone + Send>,
    observer: &dyn Observer,
) -> Result<()> {
    check_each(layers, |_, report| report.harms_reads(), observer)
}

/// Checks a FULL that is about to be changed, in which QEMU must find nothing to refuse, and INCs that are to be read.
pub(super) fn check_to_change(full: &Layer, incs: &[Layer], observer: &dyn Observer) -> Result<()> {
    let is_wrong = |path: &Path, report: &Report| report.harms_reads() || path == full.path() && report.is_corrupt();
    check_each(std::iter::once(full).chain(incs), is_wrong, observer)
}

fn check_each<'a>(
    layers: impl IntoIterator<Item = &'a Layer, IntoIter: Clone + Send>,
    is_wrong: impl Fn(&Path, &Report) -> bool + Sync,
    observer: &dyn Observer,
) -> Result<()> {
    let layers = layers.into_iter();
    let images = || layers.clone().filter_map(|layer| Some((layer.path(), layer.image()?)));
    observer.phase(Phase::Checking { bytes: images().map(|(_, image)| image.storage().length()).sum() });
    pool::for_each(
        images(),
        || (),
        |(), (path, image)| {
            let report = observed(observer, |each| image.check(CheckLimits::default(), each));
            let report = report.map_err(Error::image(path))?;
            if !is_wrong(path, &report) {
                return Ok(());
            }
            Err(Error::Damaged {
                path: path.to_owned(),
                errors: report.structure_errors + if report.dirty { 0 } else { report.refcount_errors },
                first: report.worst().cloned().map(Box::new),
            })
        },
    )
}

/// Whether the compressed clusters of an image can be inflated.
pub(super) fn check_streams(layer: &Layer, observer: &dyn Observer) -> Result<()> {
    let Some(image) = layer.image() else { return Ok(()) };
    let scratch = || (MapBuffer::default(), ClusterReader::default());
    pool::for_each(Slices::new(image.size(), image.occupied()).ranges(), scratch, |(map, clusters), slice| {
        let mut streams = Vec::new();
        layer.map(slice, map, &mut |extent| {
            if let Content::Compressed { cluster, data } = extent.content {
                streams.push((cluster, data));
            }
        })?;
        for (cluster, data) in streams {
            observer.go_on()?;
            clusters.read(image, cluster, data).map_err(Error::image(layer.path()))?;
        }
        Ok(())
    })
}
