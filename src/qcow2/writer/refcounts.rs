//! Refcounts of an image that is changed in place: who is free, who is taken, and in which order the image hears of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::head::Head;
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::{Allowed, Error, Invalid, Result};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, Table};
use crate::qcow2::l1::read_table;
use crate::qcow2::refcount;
use crate::qcow2::wire::{REFCOUNT_OFFSET_MASK, REFCOUNT_TABLE_BYTES_MAX};
use crate::storage::{Storage, WritableStorage, to_usize};

/// Bytes of blocks in memory, beside those that must be written: twice of what gathers before a flush, so that many go
/// at once.
const KEPT: u64 = 64 << 20;

/// The refcount structure in memory.
///
/// Clusters are taken at once, in memory, and given back only when [`Refcounts::settle`] says that no table in the image
/// leads to them any more.
#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    order: u32,
    /// The refcount table: where blocks are.
    table: Vec<u64>,
    table_offset: HostOffset,
    /// The table in the image is another one.
    moved: bool,
    /// Entries that the table in the image does not have yet.
    new_entries: BTreeSet<u64>,
    blocks: BTreeMap<u64, Block>,
    /// Blocks that the image does not have yet.
    dirty: u64,
    /// Clusters with tables: no guest data may come there, whatever refcounts and entries say.
    metadata: BTreeSet<u64>,
    /// No cluster before this one is free.
    hint: u64,
    /// Behind the last cluster that was taken since the file was last made long enough.
    end: u64,
    /// Clusters that lose a reference when the tables are on stable storage.
    released: Vec<u64>,
}

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    dirty: bool,
}

impl Refcounts {
    pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let geometry = header.geometry;
        let mut table = vec![0; to_usize(header.refcount_table.entries)];
        read_table(storage, header.refcount_table, "the refcount table", |index, value| {
            let block = value & REFCOUNT_OFFSET_MASK;
            let last = storage.length().saturating_sub(geometry.cluster_size());
            let allowed = if value != block {
                Allowed::Bits(REFCOUNT_OFFSET_MASK)
            } else if block % geometry.cluster_size() != 0 {
                Allowed::MultipleOf(geometry.cluster_size())
            } else if block > last {
                Allowed::BeforeEnd(storage.length())
            } else {
                if let Some(entry) = table.get_mut(to_usize(index)) {
                    *entry = value;
                }
                return Ok(());
            };
            let offset = HostOffset(header.refcount_table.offset.0 + index * 8);
            Err(Invalid { field: "refcount table entry", offset, value, allowed }.into())
        })?;
        let table_clusters = clusters_of(header.refcount_table, geometry);
        let blocks: Vec<u64> =
            table.iter().filter(|block| **block != 0).map(|block| block >> geometry.cluster_bits()).collect();
        let mut refcounts = Self {
            geometry,
            order: header.refcount_order,
            table,
            table_offset: header.refcount_table.offset,
            moved: false,
            new_entries: BTreeSet::new(),
            blocks: BTreeMap::new(),
            dirty: 0,
            metadata: BTreeSet::from([0]),
            hint: 1,
            end: 0,
            released: Vec::new(),
        };
        refcounts.guard("the refcount table", table_clusters)?;
        refcounts.guard("a refcount block", blocks)?;
        Ok(refcounts)
    }

    /// Keeps guest data away from tables, which must not share clusters.
    pub(super) fn guard(&mut self, what: &'static str, clusters: impl IntoIterator<Item = u64>) -> Result<()> {
        for cluster in clusters {
            if !self.metadata.insert(cluster) {
                let cluster = HostOffset(cluster << self.geometry.cluster_bits());
                return Err(Error::SharedMetadata { what, cluster });
            }
        }
        Ok(())
    }

    /// Clusters with tables of the active disk, of refcounts, and the header.
    pub(super) fn metadata(&self) -> &BTreeSet<u64> {
        &self.metadata
    }

    /// Whether a table lies in a cluster.
    pub(super) fn is_metadata(&self, cluster: u64) -> bool {
        self.metadata.contains(&cluster)
    }

    /// The refcount of a cluster.
    pub(super) fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64> {
        let (index, place) = self.place(cluster);
        let order = self.order;
        Ok(self.block(storage, index)?.map_or(0, |block| refcount::get(&block.bytes, place, order)))
    }

    /// The bytes of a block, as they are in memory.
    pub(super) fn bytes(&mut self, storage: &dyn Storage, index: u64) -> Result<Option<&[u8]>> {
        Ok(self.block(storage, index)?.map(|block| &*block.bytes))
    }

    /// Takes one free cluster.
    pub(super) fn take(&mut self, storage: &dyn Storage) -> Result<u64> {
        let mut index = self.hint / self.entries();
        while index < self.table.len() as u64 {
            let from = to_usize(self.hint.saturating_sub(index * self.entries()));
            if self.table.get(to_usize(index)) == Some(&0) {
                // the block counts itself
                let own = index * self.entries();
                self.refuse_metadata(own)?;
                self.add_block(index, own);
                self.set(storage, own, 1)?;
            }
            let order = self.order;
            let free = self.block(storage, index)?.and_then(|block| refcount::find_free(&block.bytes, from, order));
            if let Some(place) = free {
                let cluster = index * self.entries() + place as u64;
                self.refuse_metadata(cluster)?;
                self.hint = cluster + 1;
                self.set(storage, cluster, 1)?;
                return Ok(cluster);
            }
            index += 1;
            self.hint = self.hint.max(index * self.entries());
        }
        self.append(storage, 1)
    }

    /// Takes clusters that follow each other, for a table; the first of them comes back.
    pub(super) fn take_run(&mut self, storage: &dyn Storage, count: u64) -> Result<u64> {
        let first = if count == 1 { self.take(storage)? } else { self.append(storage, count)? };
        self.metadata.extend(first..first + count);
        Ok(first)
    }

    /// One more reference to a cluster that has some.
    pub(super) fn share(&mut self, storage: &dyn Storage, cluster: u64) -> Result<()> {
        let before = self.get(storage, cluster)?;
        if before == refcount::most(self.order) {
            let cluster = HostOffset(cluster << self.geometry.cluster_bits());
            return Err(Error::RefcountOverflow { cluster, bits: 1 << self.order });
        }
        self.set(storage, cluster, before + 1)
    }

    /// Whether a cluster can have no more references.
    pub(super) fn is_full(&mut self, storage: &dyn Storage, cluster: u64) -> Result<bool> {
        Ok(self.get(storage, cluster)? == refcount::most(self.order))
    }

    /// One reference less, but not before the tables are on stable storage.
    pub(super) fn release(&mut self, cluster: u64) {
        self.released.push(cluster);
    }

    /// Bytes in memory that the image does not have yet.
    pub(super) fn pending(&self) -> u64 {
        self.dirty * self.geometry.cluster_size() + self.released.len() as u64 * 8
    }

    /// Writes what may be written before anything leads to it: counts and blocks.
    pub(super) fn write_blocks(&mut self, storage: &dyn WritableStorage) -> Result<()> {
        let length = self.end << self.geometry.cluster_bits();
        if length > storage.length() {
            let io = |source| Error::Write { what: "the end of the file", offset: HostOffset(length), source };
            storage.set_length(length).map_err(io)?;
        }
        for (index, block) in self.blocks.iter_mut().filter(|(_, block)| block.dirty) {
            let offset = self.table.get(to_usize(*index)).copied().unwrap_or_default();
            write(storage, "a refcount block", offset, &block.bytes)?;
            block.dirty = false;
        }
        self.dirty = 0;
        if self.moved {
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            write(storage, "the refcount table", self.table_offset.0, &bytes)?;
        }
        Ok(())
    }

    /// Makes the image find new blocks, which are on stable storage; false where there are none.
    pub(super) fn write_table(&mut self, storage: &dyn WritableStorage, head: &mut Head) -> Result<bool> {
        if self.moved {
            let clusters = self.geometry.clusters(self.table.len() as u64 * 8);
            let offset = self.table_offset.0;
            head.update(storage, |raw| {
                raw.refcount_table_offset = offset.into();
                raw.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX).into();
            })?;
        } else {
            for index in &self.new_entries {
                let entry = self.table.get(to_usize(*index)).copied().unwrap_or_default();
                write(storage, "the refcount table", self.table_offset.0 + index * 8, &entry.to_be_bytes())?;
            }
        }
        let written = self.moved || !self.new_entries.is_empty();
        self.moved = false;
        self.new_entries.clear();
        Ok(written)
    }

    /// The tables are on stable storage: what was released is free now. The counts may be written at any time.
    pub(super) fn settle(&mut self, storage: &dyn WritableStorage) -> Result<()> {
        for cluster in std::mem::take(&mut self.released) {
            let count = self.get(&storage, cluster)?;
            if count == 0 {
                return Err(self.in_use(cluster));
            }
            self.set(&storage, cluster, count - 1)?;
            if count == 1 {
                self.metadata.remove(&cluster);
                self.hint = self.hint.min(cluster);
            }
        }
        self.write_blocks(storage)
    }

    fn in_use(&self, cluster: u64) -> Error {
        Error::InUse { cluster: HostOffset(cluster << self.geometry.cluster_bits()) }
    }

    /// A table that counts as free must not be overwritten.
    fn refuse_metadata(&self, cluster: u64) -> Result<()> {
        if self.is_metadata(cluster) { Err(self.in_use(cluster)) } else { Ok(()) }
    }

    /// Refcounts in a block.
    fn entries(&self) -> u64 {
        (self.geometry.cluster_size() * 8) >> self.order
    }

    fn place(&self, cluster: u64) -> (u64, usize) {
        (cluster / self.entries(), to_usize(cluster % self.entries()))
    }

    fn block(&mut self, storage: &dyn Storage, index: u64) -> Result<Option<&mut Block>> {
        let Some(offset) = self.table.get(to_usize(index)).copied().filter(|offset| *offset != 0) else {
            return Ok(None);
        };
        if !self.blocks.contains_key(&index) {
            let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
            let io = |source| Error::Io { what: "a refcount block", offset: HostOffset(offset), source };
            storage.read_exact_at(&mut bytes, offset).map_err(io)?;
            if self.blocks.len() as u64 >= KEPT / self.geometry.cluster_size() {
                self.blocks.retain(|_, block| block.dirty);
            }
            self.blocks.insert(index, Block { bytes, dirty: false });
        }
        Ok(self.blocks.get_mut(&index))
    }

    /// Sets the refcount of a cluster that has a block.
    fn set(&mut self, storage: &dyn Storage, cluster: u64, count: u64) -> Result<()> {
        let (index, place) = self.place(cluster);
        let order = self.order;
        if count > 0 {
            self.end = self.end.max(cluster + 1);
        }
        if let Some(block) = self.block(storage, index)? {
            refcount::set(&mut block.bytes, place, order, count);
            let was_dirty = std::mem::replace(&mut block.dirty, true);
            self.dirty += u64::from(!was_dirty);
        }
        Ok(())
    }

    /// A new block at this cluster, all zeroes.
    fn add_block(&mut self, index: u64, cluster: u64) {
        let bytes = vec![0; to_usize(self.geometry.cluster_size())];
        self.blocks.insert(index, Block { bytes, dirty: true });
        self.dirty += 1;
        self.metadata.insert(cluster);
        if let Some(entry) = self.table.get_mut(to_usize(index)) {
            *entry = cluster << self.geometry.cluster_bits();
        }
        self.new_entries.insert(index);
    }

    /// Takes clusters behind all that are in use, with new blocks behind them, and a longer table if need be.
    fn append(&mut self, storage: &dyn Storage, count: u64) -> Result<u64> {
        let first = self.first_unused(storage)?;
        let (mut table_clusters, mut table_length, mut blocks) = (0, self.table.len() as u64, 0);
        let most = REFCOUNT_TABLE_BYTES_MAX;
        // each round needs a fraction of what the round before did
        let absent = loop {
            let end = first + count + table_clusters + blocks;
            let last = (end - 1) / self.entries();
            if last >= table_length {
                let longer = (last + last / 2 + 1).next_multiple_of(self.geometry.cluster_size() / 8);
                table_length = longer.min(most / 8).max(last + 1);
                table_clusters = self.geometry.clusters(table_length * 8);
                continue;
            }
            let is_absent = |index: &u64| self.table.get(to_usize(*index)).is_none_or(|entry| *entry == 0);
            let absent: Vec<u64> = (first / self.entries()..=last).filter(is_absent).collect();
            if absent.len() as u64 == blocks {
                break absent;
            }
            blocks = absent.len() as u64;
        };
        if table_length * 8 > most {
            return Err(Error::TableTooLarge { what: "the refcount table", bytes: table_length * 8, most });
        }
        if table_clusters > 0 {
            let old = self.table_offset.0 >> self.geometry.cluster_bits();
            let clusters = self.geometry.clusters(self.table.len() as u64 * 8);
            self.released.extend(old..old + clusters);
            self.table.resize(to_usize(table_length), 0);
            self.table_offset = HostOffset((first + count) << self.geometry.cluster_bits());
            self.metadata.extend(clusters_of(self.table(), self.geometry));
            self.moved = true;
        }
        for (index, cluster) in absent.iter().zip(first + count + table_clusters..) {
            self.add_block(*index, cluster);
        }
        for cluster in first..first + count + table_clusters + absent.len() as u64 {
            self.set(storage, cluster, 1)?;
        }
        Ok(first)
    }

    /// The first cluster behind all that are in the file or have a refcount.
    pub(super) fn first_unused(&mut self, storage: &dyn Storage) -> Result<u64> {
        let in_file = self.geometry.clusters(storage.length()).max(self.end);
        let (entries, order) = (self.entries(), self.order);
        let blocks: Vec<u64> = (in_file / entries..self.table.len() as u64).rev().collect();
        for index in blocks {
            let used = self.block(storage, index)?.and_then(|block| {
                (0..to_usize(entries)).rev().find(|place| refcount::get(&block.bytes, *place, order) > 0)
            });
            if let Some(place) = used {
                return Ok(in_file.max(index * entries + place as u64 + 1));
            }
        }
        Ok(in_file)
    }

    /// Behind the last cluster that was taken, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.end << self.geometry.cluster_bits()
    }

    /// Where blocks are, by index; zero where there is none.
    pub(super) fn blocks(&self) -> &[u64] {
        &self.table
    }

    /// Where the table is.
    pub(super) fn table(&self) -> Table {
        Table { offset: self.table_offset, entries: self.table.len() as u64 }
    }
}

/// The clusters of a table.
pub(in crate::qcow2) fn clusters_of(table: Table, geometry: Geometry) -> Range<u64> {
    clusters(table.offset, table.bytes(), geometry)
}

/// The clusters of so many bytes.
pub(super) fn clusters(offset: HostOffset, bytes: u64, geometry: Geometry) -> Range<u64> {
    let first = offset.0 >> geometry.cluster_bits();
    first..first + geometry.clusters(bytes)
}

pub(in crate::qcow2) fn write(
    storage: &dyn WritableStorage,
    what: &'static str,
    offset: u64,
    bytes: &[u8],
) -> Result<()> {
    let offset = HostOffset(offset);
    storage.write_all_at(bytes, offset.0).map_err(|source| Error::Write { what, offset, source })
}

#[cfg(test)]
mod tests;
