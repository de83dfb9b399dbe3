//! A new snapshot, written beside the image as it is, and true by one write of the header's sector: all that the active disk
//! leads to gets one reference more.
//!
//! ```text
//! 1  what the active disk refers to is counted, and compared with the refcounts
//! 2  L2 tables with COPIED flags are found: each gets a copy without them, since its clusters are shared now
//! 3  copies, L1 tables for the disk and the snapshot, the snapshot table
//! 4  what the active disk refers to is counted again, into refcount blocks beside the old ones of the same clusters;
//!    other blocks stay; a table that leads to all of them                                                sync
//! 5  the header                                                                                         sync
//! ```
//!
//! What other snapshots hold is not read, so that one takes as long as another however many there are. Nothing is written
//! before step 3, and then only to clusters that neither the active disk nor a table that is known here is in.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::free_clusters::FreeClusters;
use super::head::Head;
use super::rebuild::{Made, Next, Places, count, grow, switch, write_entries};
use super::refcounts::{Refcounts, clusters, clusters_of, write};
use super::sync;
use crate::qcow2::address::HostOffset;
use crate::qcow2::check::{CheckLimits, Recount, Window};
use crate::qcow2::error::{Error, Result};
use crate::qcow2::features::Features;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, Table};
use crate::qcow2::image::read_to_end;
use crate::qcow2::refcount;
use crate::qcow2::wire::{FLAG_COPIED, OFFSET_MASK};
use crate::storage::{WritableStorage, to_usize};

/// What a snapshot is made with.
pub(super) struct NewSnapshot<'a> {
    pub(super) storage: &'a Arc<dyn WritableStorage>,
    /// Where the tables that the caller has placed are, too.
    pub(super) free: FreeClusters<'a>,
    /// Those of the image as it is.
    pub(super) refcounts: &'a mut Refcounts,
    /// Bytes of the snapshot table as it is.
    pub(super) old_snapshot_table: u64,
    /// The L1 table of the new snapshot.
    pub(super) l1_table: Table,
    pub(super) limits: CheckLimits,
}

/// An L2 table, and a free cluster for its copy.
type Copies = BTreeMap<HostOffset, HostOffset>;

impl NewSnapshot<'_> {
    /// Makes all of it and switches. What fails before the switch leaves the image as it was.
    pub(super) fn run(mut self, head: &mut Head, next: Next) -> Result<()> {
        switch(&**self.storage, head, |head| self.make(head.header(), next))
    }

    /// Writes all that the header will lead to.
    fn make(&mut self, header: &Header, mut next: Next) -> Result<Made> {
        let (storage, geometry) = (&**self.storage, header.geometry);
        let disk = active_disk(header);
        let used = self.referred(&disk)?;
        let copies = self.copies(&next.l1, geometry)?;
        let l1_table = self.free.take_l1(header, next.l1.len())?;
        let mut changes = self.changes(header, &next, l1_table, &copies);
        let used = used.into_iter().chain(changes.0.keys().map(|cluster| cluster / header.refcounts_per_block()));
        let old = self.refcounts.blocks().to_vec();
        let places = Places::find(used.collect(), old, &mut self.free, header)?;
        changes.replace(&places, geometry);

        grow(storage, self.free.end())?;
        for (from, to) in &copies {
            self.write_copy(*from, *to, geometry)?;
        }
        for entry in &mut next.l1 {
            let table = HostOffset(*entry & OFFSET_MASK);
            *entry = copies.get(&table).map_or(*entry, |to| to.0) & !FLAG_COPIED;
        }
        write_entries(storage, "the L1 table", l1_table.offset, &next.l1)?;
        write_entries(storage, "the L1 table of a snapshot", self.l1_table.offset, &next.l1)?;
        write(storage, "the snapshot table", next.snapshots_offset.0, &next.snapshot_table)?;
        self.write_refcounts(&disk, &places, &changes)?;
        write_entries(storage, "the refcount table", places.table.offset, &places.entries())?;
        sync(storage)?;
        Ok(Made { next, l1_table: l1_table.offset, refcount_table: places.table })
    }

    /// The indices of the refcount blocks that count what the active disk refers to, which count all of that.
    fn referred(&mut self, disk: &Header) -> Result<BTreeSet<u64>> {
        let mut used = BTreeSet::new();
        let (unit, order) = (disk.refcounts_per_block(), disk.refcount_order);
        let (storage, refcounts) = (self.storage, &mut *self.refcounts);
        windows(storage, disk, self.limits, |window| {
            let range = window.range();
            let counted = refcounts.blocks().len() as u64;
            for index in range.start / unit..range.end.div_ceil(unit).min(counted) {
                let clusters = index * unit..(index + 1) * unit;
                let mut block: Option<Vec<u8>> = None;
                window.runs(clusters.start.max(range.start)..clusters.end.min(range.end), |mut run, references| {
                    let references = count(references, run.start, disk)?;
                    if block.is_none() {
                        used.insert(index);
                        block = Some(refcounts.bytes(storage, index)?.unwrap_or_default().to_vec());
                    }
                    let block = block.as_deref().unwrap_or_default();
                    let is_counted =
                        |cluster| refcount::get(block, to_usize(cluster - clusters.start), order) >= references;
                    if run.all(is_counted) { Ok(()) } else { Err(Error::DamagedTables) }
                })?;
            }
            // the table is too short to count these
            let others = range.start.max(counted * unit)..range.end;
            if others.is_empty() { Ok(()) } else { window.runs(others, |_, _| Err(Error::DamagedTables)) }
        })?;
        Ok(used)
    }

    /// L2 tables with COPIED flags.
    fn copies(&mut self, l1: &[u64], geometry: Geometry) -> Result<Copies> {
        let mut copies = Copies::new();
        let mut bytes = vec![0; to_usize(geometry.cluster_size())];
        for table in l1.iter().map(|entry| HostOffset(entry & OFFSET_MASK)).filter(|table| table.0 != 0) {
            read_to_end(self.storage, &mut bytes, table, "an L2 table")?;
            if flags(&mut bytes, geometry).any(|flags| *flags & COPIED != 0) {
                copies.insert(table, self.free.take()?);
            }
        }
        Ok(copies)
    }

    fn write_copy(&self, from: HostOffset, to: HostOffset, geometry: Geometry) -> Result<()> {
        let mut bytes = vec![0; to_usize(geometry.cluster_size())];
        read_to_end(self.storage, &mut bytes, from, "an L2 table")?;
        flags(&mut bytes, geometry).for_each(|flags| *flags &= !COPIED);
        write(&**self.storage, "an L2 table", to.0, &bytes)
    }

    /// All that changes but for refcount blocks and their new table.
    fn changes(&self, header: &Header, next: &Next, l1_table: Table, copies: &Copies) -> Changes {
        let geometry = header.geometry;
        let mut changes = Changes::default();
        // among what the disk refers to, but nobody shares it: the header, tables that are replaced
        changes.add(0..1, -1);
        changes.add(clusters_of(header.l1_table, geometry), -2);
        for (from, to) in copies {
            changes.add(clusters(*from, 1, geometry), -2);
            changes.add(clusters(*to, 1, geometry), 2);
        }
        changes.add(clusters(header.snapshots_offset, self.old_snapshot_table, geometry), -1);
        changes.add(clusters(next.snapshots_offset, next.snapshot_table.len() as u64, geometry), 1);
        changes.add(clusters_of(l1_table, geometry), 1);
        changes.add(clusters_of(self.l1_table, geometry), 1);
        changes.add(clusters_of(self.refcounts.table(), geometry), -1);
        changes
    }

    fn write_refcounts(&mut self, disk: &Header, places: &Places, changes: &Changes) -> Result<()> {
        let (unit, size) = (disk.refcounts_per_block(), to_usize(disk.geometry.cluster_size()));
        let (storage, refcounts) = (self.storage, &mut *self.refcounts);
        windows(storage, disk, self.limits, |window| {
            let range = window.range();
            for (index, place) in places.blocks.range(range.start / unit..range.end.div_ceil(unit)) {
                let clusters = index * unit..(index + 1) * unit;
                let mut block = vec![0; size];
                if clusters.start < range.start {
                    // an earlier window has counted a part of it
                    read_to_end(storage, &mut block, *place, "a refcount block")?;
                } else if let Some(bytes) = refcounts.bytes(storage, *index)? {
                    block.copy_from_slice(bytes);
                }
                let mut add = |cluster: u64, references: u64| {
                    let entry = to_usize(cluster - clusters.start);
                    let before = refcount::get(&block, entry, disk.refcount_order);
                    let after = before.saturating_add(references).checked_add_signed(changes.of(cluster));
                    let after = count(Some(after.ok_or(Error::DamagedTables)?), cluster, disk)?;
                    refcount::set(&mut block, entry, disk.refcount_order, after);
                    Ok(())
                };
                let part = clusters.start.max(range.start)..clusters.end.min(range.end);
                window.runs(part.clone(), |mut run, references| {
                    let references = references.unwrap_or(u64::MAX);
                    run.try_for_each(|cluster| add(cluster, references))
                })?;
                let mut others = changes.within(part).filter(|cluster| window.references(*cluster) == Some(0));
                others.try_for_each(|cluster| add(cluster, 0))?;
                write(&**storage, "a refcount block", place.0, &block)?;
            }
            Ok(())
        })
    }
}

/// By how much the refcounts of clusters change, beside those that the active disk refers to.
#[derive(Default)]
struct Changes(BTreeMap<u64, i64>);

impl Changes {
    fn add(&mut self, clusters: Range<u64>, change: i64) {
        for cluster in clusters {
            *self.0.entry(cluster).or_default() += change;
        }
    }

    /// Refcount blocks get other places, and their table.
    fn replace(&mut self, places: &Places, geometry: Geometry) {
        self.add(clusters_of(places.table, geometry), 1);
        for (old, new) in places.replaced() {
            self.add(clusters(HostOffset(old), u64::from(old != 0), geometry), -1);
            self.add(clusters(new, 1, geometry), 1);
        }
    }

    fn of(&self, cluster: u64) -> i64 {
        self.0.get(&cluster).copied().unwrap_or_default()
    }

    fn within(&self, clusters: Range<u64>) -> impl Iterator<Item = u64> {
        self.0.range(clusters).map(|(cluster, _)| *cluster)
    }
}

/// The COPIED flag in the first byte of an entry.
const COPIED: u8 = 1 << 7;

/// The first bytes of all entries of an L2 table.
fn flags(table: &mut [u8], geometry: Geometry) -> impl Iterator<Item = &mut u8> {
    table.iter_mut().step_by(to_usize(geometry.l2_entry_size()))
}

/// A header that leads to the active disk only.
fn active_disk(header: &Header) -> Header {
    let features = Features { autoclear: 0, ..header.features };
    let refcount_table = Table { offset: HostOffset(0), entries: 0 };
    Header { refcount_table, nb_snapshots: 0, features, ..header.clone() }
}

/// Calls `each` for all references of the active disk.
fn windows(
    storage: &Arc<dyn WritableStorage>,
    disk: &Header,
    limits: CheckLimits,
    each: impl FnMut(&mut Window<'_, '_>) -> Result<()>,
) -> Result<()> {
    let observer = &mut |_| ControlFlow::Continue(());
    let mut recount = Recount::read(storage, disk, &[], limits)?;
    recount.windows(observer, each)?;
    if recount.is_damaged() { Err(Error::DamagedTables) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::qcow2::{CompressionType, GuestOffset, Layout, RefcountWriter, Writer, check};
    use crate::storage::{MemoryStorage, Storage as _};

    const SIZE: u64 = 1 << 20;

    /// An empty image with clusters of 512 bytes, where what a snapshot counts is soon more than a few.
    fn image() -> Arc<MemoryStorage> {
        let storage = MemoryStorage::default();
        let layout = Layout::new(Geometry::new(9, false).unwrap(), SIZE, CompressionType::Deflate, 0, 0).unwrap();
        let mut put = |host: HostOffset, bytes: &[u8]| storage.write_all_at(bytes, host.0);
        put(HostOffset(0), &layout.header()).unwrap();
        RefcountWriter::new(&layout, &mut put).unwrap().finish(&mut put).unwrap();
        storage.set_length(layout.length()).unwrap();
        Arc::new(storage)
    }

    fn open(image: &Arc<MemoryStorage>) -> Writer {
        Writer::open(Arc::clone(image) as Arc<dyn WritableStorage>).unwrap()
    }

    #[test]
    fn the_image_is_the_same_however_few_clusters_are_counted_at_a_time() {
        let few = CheckLimits { window: 16, tables: 2 };
        let made = [CheckLimits::default(), few].map(|limits| {
            let image = image();
            let mut writer = open(&image);
            for number in 0..12u8 {
                for place in (0..40).map(|at| at * 25_600 + u64::from(number) * 512) {
                    writer.write(&[number + 1; 512], GuestOffset(place)).unwrap();
                }
                writer.create_snapshot_within(&number.to_string(), Duration::ZERO, limits).unwrap();
                let report = check(&*image, &mut |_| ControlFlow::Continue(())).unwrap();
                assert!(!report.is_corrupt() && !report.has_leaks(), "{number}: {:?}", report.findings);
            }
            writer.finish().unwrap();
            image.to_vec()
        });
        assert!(made[0] == made[1]);
    }

    #[test]
    fn tables_whose_own_refcount_is_zero_are_not_overwritten() {
        let header = Header::read(&*image()).unwrap();
        let table = header.refcount_table.offset;
        let mut block = [0; 8];
        image().read_exact_at(&mut block, table.0).unwrap();
        let block = HostOffset(u64::from_be_bytes(block));
        for place in [table, block, header.l1_table.offset] {
            let image = image();
            let count = block.0 + (place.0 >> 9) * 2;
            image.write_all_at(&[0; 2], count).unwrap();
            let before = image.to_vec();
            let made = open(&image).create_snapshot("one", Duration::ZERO);
            assert!(matches!(made, Err(Error::DamagedTables)), "{place}: {made:?}");
            assert!(image.to_vec() == before, "{place}");
        }
    }
}
