//! Persistent bitmaps of an image that is changed in place.
//!
//! Bitmaps that record what is written (`auto`) are marked as in use before the first change of the guest's data, as QEMU
//! does it: what a crash leaves says of itself that it is old. [`Writer::finish`] adds what was changed and takes the
//! mark away. Disabled bitmaps are left as they are, and so are those that were in use when the image was opened.
//!
//! Where the autoclear bit is not set, there are no bitmaps, whatever the extension says: it is left as it is.

use std::collections::BTreeSet;
use std::ops::Range;

use super::dirty::Dirty;
use super::refcounts::{clusters_of, write};
use super::{Writer, sync};
use crate::qcow2::address::HostOffset;
use crate::qcow2::bitmap::{self, Bitmap};
use crate::qcow2::error::{Error, Result};
use crate::qcow2::extensions::BitmapsExtension;
use crate::qcow2::header::{Header, Table};
use crate::qcow2::wire::{BITMAP_FLAG_AUTO, BITMAP_FLAG_IN_USE, RawBitmapsExtension};
use crate::storage::{Storage, to_usize};

/// The bitmaps of the image, and what they do not know yet.
#[derive(Debug, Default)]
pub(super) struct Bitmaps {
    pub(super) entries: Vec<Entry>,
    pub(super) dirty: Dirty,
}

/// A bitmap and its place.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// What the directory in the image says.
    pub(super) bitmap: Bitmap,
    /// Where its entry is, from the start of the directory.
    pub(super) at: u64,
    /// It stays in use: it was when the image was opened.
    pub(super) lost: bool,
}

impl Entry {
    /// Its flags as they stand in the directory.
    pub(super) fn flags(&self) -> u32 {
        let flag = |set, flag| if set { flag } else { 0 };
        flag(self.bitmap.in_use, BITMAP_FLAG_IN_USE) | flag(self.bitmap.auto, BITMAP_FLAG_AUTO)
    }
}

impl Bitmaps {
    pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let Some(extension) = bitmap::consistent(header) else { return Ok(Self::default()) };
        let mut entries = Vec::new();
        bitmap::read(storage, header, extension, |entry| {
            let bitmap = entry.bitmap?;
            entry.refused.map_or(Ok(()), Err)?;
            bitmap.table.check_inside(storage, "a bitmap table")?;
            let lost = bitmap.in_use;
            entries.push(Entry { bitmap, at: entry.offset.0 - extension.directory_offset.0, lost });
            Ok(())
        })?;
        refuse_overlaps(&entries)?;
        let automatic = entries.iter().filter(|entry| entry.bitmap.auto && !entry.lost);
        let dirty = Dirty::new(automatic.map(|entry| entry.bitmap.granularity_bits).min().unwrap_or_default());
        Ok(Self { entries, dirty })
    }
}

/// Tables in the same place would be work out of proportion to the file.
fn refuse_overlaps(entries: &[Entry]) -> Result<()> {
    let mut tables: Vec<_> = entries.iter().map(|entry| entry.bitmap.table).collect();
    tables.sort_unstable_by_key(|table| table.offset);
    let overlap = |pair: &[_]| matches!(pair, [first, second] if end(*first) > second.offset.0);
    let reason = "tables of its bitmaps lie in the same place: check it";
    if tables.windows(2).any(overlap) { Err(Error::NotWritable { reason }) } else { Ok(()) }
}

fn end(table: Table) -> u64 {
    table.offset.0 + table.bytes()
}

impl Writer {
    /// The persistent bitmaps, in the order of their directory. Those that this writer only keeps up to date are not in
    /// use.
    #[must_use]
    pub fn bitmaps(&self) -> Vec<Bitmap> {
        let entries = self.bitmaps.entries.iter();
        entries.map(|entry| Bitmap { in_use: entry.bitmap.in_use && entry.lost, ..entry.bitmap.clone() }).collect()
    }

    /// Removes a persistent bitmap, also one that is in use; the others stay as they are.
    ///
    /// # Errors
    /// [`Error::NoSuch`]; what is wrong with its table; what the system says.
    pub fn remove_bitmap(&mut self, name: &str) -> Result<()> {
        let place = self.bitmaps.entries.iter().position(|entry| entry.bitmap.name == name);
        let (Some(place), Some(extension)) = (place, self.header().extensions.bitmaps) else {
            return Err(Error::NoSuch { what: "bitmap", name: name.to_owned() });
        };
        self.guarded(|writer| {
            let mut entries = writer.bitmaps.entries.clone();
            let removed = entries.remove(place);
            let data = writer.bitmap_clusters(&removed.bitmap)?;
            let old = writer.directory(extension)?;
            // each entry has its padding, also the last
            let next = entries.get(place).map_or(extension.directory_size, |entry| entry.at);
            let length = next - removed.at;
            let mut bytes = old.get(..to_usize(removed.at)).unwrap_or_default().to_vec();
            bytes.extend(old.get(to_usize(next)..).unwrap_or_default());
            entries.iter_mut().skip(place).for_each(|entry| entry.at -= length);
            writer.switch_directory(extension, entries, &bytes)?;
            writer.release_run(removed.bitmap.table.offset, removed.bitmap.table.bytes());
            for cluster in data {
                writer.refcounts.release(cluster);
            }
            Ok(())
        })
    }

    /// Whether the bitmaps could be kept right while the guest's data changes, and the size of the disk if it is `resized`:
    /// what is overwritten in place, [then](Writer::finish) at the latest, must be nobody else's.
    ///
    /// # Errors
    /// [`Error::NotWritable`]; what is wrong with a table; what the system says.
    pub(crate) fn check_bitmaps(&mut self, resized: bool) -> Result<()> {
        let changes = |entry: &&Entry| !entry.lost && (entry.bitmap.auto || resized);
        let bitmaps: Vec<Bitmap> =
            self.bitmaps.entries.iter().filter(changes).map(|entry| entry.bitmap.clone()).collect();
        let Some(extension) = self.header().extensions.bitmaps.filter(|_| !bitmaps.is_empty()) else { return Ok(()) };
        let geometry = self.header().geometry;
        let directory = Table { offset: extension.directory_offset, entries: extension.directory_size / 8 };
        clusters_of(directory, geometry).try_for_each(|cluster| self.check_own(cluster))?;
        for bitmap in &bitmaps {
            let data = self.bitmap_clusters(bitmap)?;
            clusters_of(bitmap.table, geometry).chain(data).try_for_each(|cluster| self.check_own(cluster))?;
        }
        Ok(())
    }

    /// What must be in the image before the guest's data changes; to be called before each change, in
    /// [`Writer::guarded`].
    pub(super) fn begin_change(&mut self, guest: Range<u64>) -> Result<()> {
        self.clear_autoclear()?;
        self.hold(|bitmap| bitmap.auto)?;
        if self.bitmaps.entries.iter().any(|entry| entry.bitmap.auto && !entry.lost) {
            self.bitmaps.dirty.mark(guest);
        }
        Ok(())
    }

    /// Marks bitmaps as in use.
    pub(super) fn hold(&mut self, which: impl Fn(&Bitmap) -> bool) -> Result<()> {
        let held = |entry: &mut Entry| {
            let holds = !entry.bitmap.in_use && which(&entry.bitmap);
            entry.bitmap.in_use |= holds;
            holds
        };
        self.set_in_use(held)
    }

    /// Takes the mark away from the bitmaps that this writer kept up to date.
    pub(super) fn let_go(&mut self) -> Result<()> {
        let free = |entry: &mut Entry| {
            let frees = entry.bitmap.in_use && !entry.lost;
            entry.bitmap.in_use &= !frees;
            frees
        };
        self.set_in_use(free)
    }

    /// Writes the flags of the bitmaps that `change` has changed.
    fn set_in_use(&mut self, mut change: impl FnMut(&mut Entry) -> bool) -> Result<()> {
        let Some(extension) = self.header().extensions.bitmaps else { return Ok(()) };
        let bits = self.header().geometry.cluster_bits();
        let changed =
            self.bitmaps.entries.iter_mut().filter_map(|entry| change(entry).then(|| (entry.at, entry.flags())));
        // flags are at the twelfth byte
        let changed: Vec<(u64, u32)> =
            changed.map(|(at, flags)| (extension.directory_offset.0 + at + 12, flags)).collect();
        if changed.is_empty() {
            return Ok(());
        }
        let clusters: BTreeSet<u64> = changed.iter().map(|(offset, _)| offset >> bits).collect();
        clusters.into_iter().try_for_each(|cluster| self.check_own(cluster))?;
        for (offset, flags) in changed {
            write(&*self.storage, "the bitmap directory", offset, &flags.to_be_bytes())?;
        }
        sync(&*self.storage)
    }

    /// What is overwritten in place must be nobody else's.
    pub(super) fn check_own(&mut self, cluster: u64) -> Result<()> {
        let reason = "a cluster of its bitmaps does not have refcount 1: check it";
        if self.refcounts.get(&self.storage, cluster)? == 1 { Ok(()) } else { Err(Error::NotWritable { reason }) }
    }

    /// The bytes of the directory.
    pub(super) fn directory(&self, extension: BitmapsExtension) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(extension.directory_size)];
        let io = |source| Error::Io { what: "the bitmap directory", offset: extension.directory_offset, source };
        self.storage.read_exact_at(&mut bytes, extension.directory_offset.0).map_err(io)?;
        Ok(bytes)
    }

    /// Writes a directory beside the old one, makes it the true one and gives the old one back.
    pub(super) fn switch_directory(&mut self, old: BitmapsExtension, entries: Vec<Entry>, bytes: &[u8]) -> Result<()> {
        let new = if entries.is_empty() {
            None
        } else {
            let directory_offset = self.write_beside("the bitmap directory", bytes)?;
            Some(RawBitmapsExtension {
                nb_bitmaps: u32::try_from(entries.len()).unwrap_or(u32::MAX).into(),
                reserved: 0.into(),
                directory_size: (bytes.len() as u64).into(),
                directory_offset: directory_offset.0.into(),
            })
        };
        self.flush()?;
        self.head.set_bitmaps(&*self.storage, new)?;
        self.bitmaps.entries = entries;
        self.release_run(old.directory_offset, old.directory_size);
        Ok(())
    }

    /// Writes a table into free clusters that follow each other; nothing leads to it yet.
    pub(super) fn write_beside(&mut self, what: &'static str, bytes: &[u8]) -> Result<HostOffset> {
        let geometry = self.header().geometry;
        let count = geometry.clusters(bytes.len() as u64).max(1);
        let offset = self.refcounts.take_run(&self.storage, count)? << geometry.cluster_bits();
        let mut whole = bytes.to_vec();
        whole.resize(to_usize(count << geometry.cluster_bits()), 0);
        write(&*self.storage, what, offset, &whole)?;
        Ok(HostOffset(offset))
    }

    /// Gives the clusters of a table back to which nothing in the image leads any more.
    pub(super) fn release_run(&mut self, offset: HostOffset, length: u64) {
        let geometry = self.header().geometry;
        let first = offset.0 >> geometry.cluster_bits();
        (first..first + geometry.clusters(length)).for_each(|cluster| self.refcounts.release(cluster));
    }
}
