//! A chain that is opened to be changed: nobody else has its images, and all of them are plain qcow2 files.

mod books;
mod files;
mod next;

use std::fs::{Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

pub(super) use self::books::{give_id, id, remove_books_of_gone, renew};
use self::books::{read_manifest, write_manifest};
pub(super) use self::files::{link_to, point_link, remove, sync_names};
use self::next::Next;
use super::checked_file::{CheckedFile, own_sums};
use super::error::{Error, Result};
use super::layer::{Format, Layer};
use super::layers;
use super::observer::Observer;
use super::renewed::{Renewed, check_renewable};
use super::resolve::Mapped;
use super::source::{self, Source};
use crate::chain::{Checksums, FolderLock, Image, Manifest, RestorePoint, Work};
use crate::qcow2::{self, Backing, Repair, Writer};
use crate::storage::{self, FileStorage, Storage as _, access_list};
use crate::threads;

/// A FULL and INCs above it, locked.
#[derive(Debug)]
pub(super) struct InPlace {
    images: Vec<Arc<Image>>,
    storages: Vec<Arc<FileStorage>>,
    layers: Vec<Layer>,
    /// The INC that will follow the FULL.
    next: Option<Next>,
    _folders: Vec<FolderLock>,
}

impl InPlace {
    /// Opens images of a restore point, oldest first, whose backing names must fit, if they have any. It keeps the locks
    /// of their folders; there are none where they are only to be looked at.
    pub(super) fn open(images: &[Arc<Image>], point: &RestorePoint, folders: Vec<FolderLock>) -> Result<Self> {
        let Some(full) = images.first() else { return Err(Error::Empty) };
        images.iter().chain(point.next.as_ref()).try_for_each(|image| check_renewable(&image.path))?;
        let sources: Vec<Source> = images.iter().map(|image| Source::from(&**image)).collect();
        let storages: Vec<_> = sources.iter().map(open).collect::<Result<_>>()?;
        // new checksums would not tell any more that an image is not as long as it was
        sources
            .iter()
            .zip(&storages)
            .try_for_each(|(source, file)| source::check_length(&source.path, file.length()))?;
        let evidence: Vec<_> = sources.iter().zip(&storages).map(source::evidence).collect::<Result<_>>()?;
        let formats = source::decide(&evidence)?;
        if let Some((source, _)) = sources.iter().zip(formats).find(|(_, format)| *format != Format::Qcow2) {
            return Err(refused(
                &source.path,
                "is a raw image: only qcow2 images can be changed in place, merge makes a new one",
            ));
        }
        let layers = sources.iter().zip(&storages);
        let layers: Vec<_> = layers
            .map(|(source, storage)| Layer::new(source.path.clone(), storage.clone(), Format::Qcow2))
            .collect::<Result<_>>()?;
        // work that was broken off may have resized the FULL before its manifest
        if point.unfinished.is_none() {
            sources.iter().zip(&layers).try_for_each(|(source, layer)| source::check_size(source, layer))?;
        }
        let before = std::iter::once(None).chain(layers.iter().map(|layer| Some(layer.path())));
        // an earlier run may have ended between naming the FULL in an INC and removing the one before it
        let named = point.unfinished.is_some().then_some(full.path.as_path());
        layers.iter().zip(before).try_for_each(|(layer, before)| {
            let checked = source::check_backing(before, layer);
            checked.or_else(|error| if named.is_some() { source::check_backing(named, layer) } else { Err(error) })
        })?;
        if let Some(layer) = layers.iter().find(|layer| layer.is_marked_corrupt()) {
            return Err(Error::MarkedCorrupt { path: layer.path().to_owned() });
        }
        let next = Next::find(images, point)?;
        Ok(Self { images: images.to_vec(), storages, layers, next, _folders: folders })
    }

    /// Whether the header of an INC that names another image can name the FULL.
    pub(super) fn check_followers(&self, work: Work) -> Result<()> {
        let Some(full) = self.images.first() else { return Ok(()) };
        let each = self.images.iter().zip(&self.storages).skip(2).filter(|_| work == Work::SnapshotRebase);
        let next = self.next.as_ref().and_then(|next| Some((&next.image, next.based.as_ref()?)));
        for (image, storage) in each.chain(next) {
            let failed = Error::image(&image.path);
            if qcow2::Header::read(&**storage).map_err(failed)?.backing.is_some() {
                qcow2::plan_backing(&**storage, Some(&backing(full))).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Whether the bitmaps of the FULL can be kept right while its disk gets these sizes.
    pub(super) fn check_bitmaps(&self, sizes: &[u64]) -> Result<()> {
        let Some((layer, storage)) = self.layers.first().zip(self.storages.first()) else { return Ok(()) };
        let header = layer.image().map(qcow2::Image::header);
        // one that was not closed gets right refcounts before it is written to
        let Some(header) = header.filter(|header| header.extensions.bitmaps.is_some() && !header.is_dirty()) else {
            return Ok(());
        };
        let resized = sizes.iter().any(|size| *size != header.size);
        let checked = Writer::open(storage.clone()).and_then(|mut writer| writer.check_bitmaps(resized));
        checked.map_err(Error::image(layer.path()))
    }

    /// The INC that will follow the FULL: the next one, where it builds on the last of the images.
    pub(super) fn next(&self) -> Option<&Arc<Image>> {
        self.next.as_ref().map(|next| &next.image)
    }

    /// Whether the INC that will follow the FULL names another image.
    pub(super) fn next_is_based(&self) -> bool {
        self.next.as_ref().is_some_and(|next| next.based.is_some())
    }

    /// The open file of an image; none where it is not one of these.
    pub(super) fn open_file(&self, path: &Path) -> Option<&FileStorage> {
        let held = self.images.iter().zip(&self.storages).find(|(image, _)| image.path == path);
        held.map(|(_, storage)| &**storage)
    }

    /// Makes sure that what was written to is what its name leads to: else images would go that nothing holds.
    pub(super) fn check_name(&self) -> Result<()> {
        let Some((image, storage)) = self.images.first().zip(self.storages.first()) else { return Ok(()) };
        match (storage.file().metadata(), image.path.symlink_metadata()) {
            (Ok(open), Ok(named)) if number(&open) == number(&named) => Ok(()),
            _ => Err(refused(
                &image.path,
                "was moved, removed or replaced while INCs were written into it, and no more of them are removed: put it back, \
                 and run the same command again",
            )),
        }
    }

    /// Makes sure that nobody has written to the INCs since they were opened.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let mut incs = self.images.iter().zip(&self.storages).skip(1);
        let changed = incs.find(|(_, storage)| storage.is_changed().unwrap_or(false));
        changed.map_or(Ok(()), |(image, _)| Err(Error::Overwritten { path: image.path.clone() }))
    }

    /// The INCs.
    pub(super) fn incs(&self) -> &[Layer] {
        self.layers.get(1..).unwrap_or_default()
    }

    /// The FULL as a file of the backup.
    pub(super) fn image(&self) -> Option<&Arc<Image>> {
        self.images.first()
    }

    /// The FULL.
    pub(super) fn full(&self) -> Option<&qcow2::Image> {
        self.full_layer().and_then(Layer::image)
    }

    /// The FULL as the layer below the INCs.
    pub(super) fn full_layer(&self) -> Option<&Layer> {
        self.layers.first()
    }

    /// The FULL, so that what is read of it is compared with its checksums, if it has some that can be used.
    pub(super) fn checked_full(&self) -> Result<Layer> {
        let (image, storage) = self.images.first().zip(self.storages.first()).ok_or(Error::Empty)?;
        let (sums, _) = own_sums(Checksums::open(&image.path))?;
        let file = CheckedFile::new(Arc::<FileStorage>::clone(storage), sums, false);
        Layer::new(image.path.clone(), Arc::new(file), Format::Qcow2)
    }

    /// The size of the disk in the newest image.
    pub(super) fn size(&self) -> u64 {
        self.layers.last().map_or(0, Mapped::size)
    }

    /// Closes all images at once: the file system gives back what those had that are removed, which takes its time.
    pub(super) fn close(self) {
        drop(self.layers);
        threads::map(self.storages, drop);
    }

    /// When the FULL was made.
    pub(super) fn full_date(&self) -> Duration {
        let full = self.images.first();
        let modified =
            || full.and_then(|full| full.path.metadata().ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok());
        full.and_then(|full| seconds(full.time)).or_else(modified).unwrap_or_default()
    }

    /// The moment that the FULL holds, where that is a later one than that of its name.
    pub(super) fn later_moment(&self) -> Option<i64> {
        self.images.first().filter(|full| full.time > full.named).and_then(|full| full.time)
    }

    /// A writer for the FULL, which is repaired first if a program did not close it.
    pub(super) fn writer(&self, observer: &dyn Observer) -> Result<(Writer, Arc<Renewed>)> {
        let full = Arc::new(self.renewed_full()?);
        let failed = Error::image(&full.path);
        if self.full().is_some_and(|full| full.header().is_dirty()) {
            full.repair(Repair::All, observer)?;
        }
        let writer = Writer::open(full.clone()).map_err(failed)?;
        Ok((writer, full))
    }

    /// Takes the FULL away from those who may not read and write all of the INCs, which it will hold.
    pub(super) fn restrict(&self) -> Result<()> {
        let Some((image, (storage, incs))) = self.images.first().zip(self.storages.split_first()) else {
            return Ok(());
        };
        let failed = |source| Error::Write { path: image.path.clone(), source };
        let full = storage.file().metadata().map_err(failed)?;
        let list = access_list(storage.file()).map_err(failed)?;
        // its owner works with it
        let mut kept = full.mode() & 0o7777;
        for inc in incs {
            let of_list = || {
                let there = inc.file().metadata().ok()?;
                let is_same = access_list(inc.file()).ok()? == list && there.gid() == full.gid();
                is_same.then(|| there.mode())
            };
            let allowed =
                if list.is_none() { layers::allowed(inc.file(), full.gid()).ok() } else { of_list() }.unwrap_or(0o600);
            kept &= allowed | 0o7711;
        }
        if kept == full.mode() & 0o7777 {
            return Ok(());
        }
        storage.file().set_permissions(Permissions::from_mode(kept)).map_err(failed)
    }

    /// Gives back what a run that was interrupted has allocated in the FULL and nothing uses, and makes its checksums right.
    /// Where the former cannot be, as on a full disk, it stays: that harms nothing.
    pub(super) fn free_leaks(&self, observer: &dyn Observer) -> Result<()> {
        match Arc::new(self.renewed_full()?).repair(Repair::Leaks, observer) {
            Ok(_) => Ok(()),
            Err(Error::Cancelled) => Err(Error::Cancelled),
            Err(_) => self.renewed_full()?.finish(observer),
        }
    }

    /// The FULL as a file whose checksums follow what is written.
    fn renewed_full(&self) -> Result<Renewed> {
        let full = self.images.first().zip(self.storages.first());
        full.map(|(image, storage)| Renewed::whole(&image.path, storage)).ok_or(Error::Empty)
    }

    /// Lets an INC follow the FULL where it followed an INC that goes.
    pub(super) fn follow(&self, next: &Arc<Image>, observer: &dyn Observer) -> Result<()> {
        let Some(full) = self.images.first() else { return Ok(()) };
        let failed = Error::image(&next.path);
        let held = self.images.iter().zip(&self.storages).find(|(image, _)| image.path == next.path);
        let based = || self.next.as_ref().and_then(|next| next.based.as_ref());
        if let Some(storage) = held.map(|(_, storage)| storage).or_else(based) {
            let header = qcow2::Header::read(&**storage).map_err(failed)?;
            if header.backing.is_some() {
                let renewed = Renewed::header(&next.path, storage, header.geometry);
                qcow2::set_backing(&renewed, Some(&backing(full))).map_err(failed)?;
                renewed.finish(observer)?;
            }
        }
        let Some(manifest) = read_manifest(&next.path)? else { return Ok(()) };
        let parent_id = read_manifest(&full.path)?.and_then(|full| full.id);
        write_manifest(&next.path, &Manifest { parent: Some(full.display_name()), parent_id, ..manifest })
    }
}

/// What an INC says that follows the FULL.
fn backing(full: &Image) -> Backing {
    Backing { name: relative_name(&full.display_name()), format: Some("qcow2".to_owned()) }
}

/// Locks the folder of an image, and the targets above it.
pub(super) fn lock(image: &Path) -> Result<Vec<FolderLock>> {
    FolderLock::take_all(storage::parent(image)).map_err(Error::Folder)
}

/// Opens an image that is one file under one name, here, and locks it.
pub(super) fn open(source: &Source) -> Result<Arc<FileStorage>> {
    let open_error = |error| source::open_error(source, error);
    let metadata = source.path.symlink_metadata().map_err(open_error)?;
    if metadata.is_symlink() {
        return Err(refused(&source.path, "is a link: what it leads to is not changed from here"));
    }
    let storage = source::open_writable(&source.path)?;
    let file = storage.file().metadata().map_err(open_error)?;
    if number(&file) != number(&metadata) {
        return Err(Error::Changed);
    }
    if file.nlink() > 1 {
        return Err(refused(&source.path, OTHER_NAMES));
    }
    Ok(storage)
}

/// Device and number of a file: what it is, whatever its name.
pub(super) fn number(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Why a file is not changed that is in two places.
pub(super) const OTHER_NAMES: &str = "has other names (hard links), where it would change, too: copy it first";

pub(super) fn refused(path: &Path, reason: &'static str) -> Error {
    Error::InPlace { path: path.to_owned(), reason }
}

/// A name that QEMU takes for a file in the same folder, and not for a protocol.
pub(super) fn relative_name(name: &str) -> String {
    if name.contains(':') { format!("./{name}") } else { name.to_owned() }
}

/// A restore point's time as a date.
pub(super) fn seconds(time: Option<i64>) -> Option<Duration> {
    time.and_then(|time| u64::try_from(time).ok()).map(Duration::from_secs)
}
