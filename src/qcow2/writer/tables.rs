//! L1 and L2 tables of the active disk, in memory where they are used, and what of them the image does not have yet.

use std::collections::{BTreeMap, BTreeSet};

use byteorder::{BigEndian, ByteOrder};

use super::head::SECTOR;
use super::refcounts::{Refcounts, write};
use crate::qcow2::address::HostOffset;
use crate::qcow2::entry::L1Entry;
use crate::qcow2::error::{Allowed, Error, Invalid, Result};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, Table};
use crate::qcow2::l1::l1_entries;
use crate::qcow2::wire::{FLAG_COPIED, OFFSET_MASK};
use crate::storage::{Storage, WritableStorage, push_joined, to_usize};

/// Bytes of L2 tables in memory, beside those that must be written: twice of what gathers before a flush, so that many
/// go at once.
const KEPT: u64 = 64 << 20;

/// The tables of the active disk.
#[derive(Debug)]
pub(super) struct Tables {
    geometry: Geometry,
    l1: Vec<u64>,
    l1_offset: HostOffset,
    /// Entries that the L1 table in the image does not have yet.
    l1_dirty: BTreeSet<u64>,
    l2: BTreeMap<u64, L2Table>,
    /// L2 tables of which the image does not have all yet.
    pending: u64,
}

#[derive(Debug)]
struct L2Table {
    host: HostOffset,
    bytes: Vec<u8>,
    /// Sectors that the image does not have yet.
    dirty: BTreeSet<usize>,
    /// Nothing in the image leads to it yet.
    fresh: bool,
}

impl L2Table {
    fn is_pending(&self) -> bool {
        self.fresh || !self.dirty.is_empty()
    }
}

impl Tables {
    pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let l1 = l1_entries(storage, header.l1_table, "the L1 table")?;
        Ok(Self {
            geometry: header.geometry,
            l1,
            l1_offset: header.l1_table.offset,
            l1_dirty: BTreeSet::new(),
            l2: BTreeMap::new(),
            pending: 0,
        })
    }

    /// Where the L1 table is.
    pub(super) fn l1_table(&self) -> Table {
        Table { offset: self.l1_offset, entries: self.l1.len() as u64 }
    }

    /// The entries of the L1 table.
    pub(super) fn entries(&self) -> &[u64] {
        &self.l1
    }

    /// Makes a copy of the L1 table that is as long as `table` the active one; the image has both.
    pub(super) fn move_l1(&mut self, table: Table) {
        self.l1.resize(to_usize(table.entries), 0);
        self.l1_offset = table.offset;
    }

    /// The bytes of the L1 table, and zeroes up to this many entries.
    pub(super) fn l1_bytes(&self, entries: u64) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(bytes.len().max(to_usize(entries * 8)), 0);
        bytes
    }

    /// Forgets the L2 table of a guest cluster with all its entries, and returns its place, for it to be released.
    pub(super) fn drop_table(&mut self, cluster: u64) -> Option<HostOffset> {
        let index = self.place(cluster).0;
        let entry = self.l1.get_mut(to_usize(index)).filter(|entry| **entry & OFFSET_MASK != 0)?;
        let host = std::mem::take(entry) & OFFSET_MASK;
        self.l1_dirty.insert(index);
        self.l2.remove(&index);
        Some(HostOffset(host))
    }

    /// The clusters of the L2 tables.
    pub(super) fn hosts(&self) -> impl Iterator<Item = u64> + '_ {
        let bits = self.geometry.cluster_bits();
        self.l1.iter().map(move |entry| (entry & OFFSET_MASK) >> bits).filter(|cluster| *cluster != 0)
    }

    /// Whether there is an L2 table for a guest cluster.
    pub(super) fn has_table(&self, cluster: u64) -> bool {
        self.l1_entry(self.place(cluster).0) & OFFSET_MASK != 0
    }

    /// The entry of a guest cluster, and its subcluster bitmap where there is one.
    pub(super) fn entry(&mut self, storage: &dyn Storage, cluster: u64) -> Result<(u64, u64)> {
        let (index, place) = self.place(cluster);
        let size = to_usize(self.geometry.l2_entry_size());
        let Some(table) = self.table(storage, index)? else { return Ok((0, 0)) };
        let bytes = table.bytes.get(place * size..(place + 1) * size).unwrap_or_default();
        let number = |at: usize| bytes.get(at..at + 8).map_or(0, BigEndian::read_u64);
        Ok((number(0), number(8)))
    }

    /// Where the entry of a guest cluster is in the image, for messages.
    pub(super) fn entry_offset(&self, cluster: u64) -> HostOffset {
        let (index, place) = self.place(cluster);
        let table = self.l2.get(&index).map_or(0, |table| table.host.0);
        HostOffset(table + place as u64 * self.geometry.l2_entry_size())
    }

    /// Changes the entry of a guest cluster. A table that snapshots share is copied first, one that is missing is made.
    pub(super) fn set_entry(
        &mut self,
        storage: &dyn Storage,
        refcounts: &mut Refcounts,
        cluster: u64,
        (value, bitmap): (u64, u64),
    ) -> Result<()> {
        let (index, place) = self.place(cluster);
        self.own(storage, refcounts, index)?;
        let size = to_usize(self.geometry.l2_entry_size());
        let Some(table) = self.l2.get_mut(&index) else { return Ok(()) };
        let bytes = table.bytes.get_mut(place * size..(place + 1) * size).unwrap_or_default();
        for (to, number) in bytes.chunks_exact_mut(8).zip([value, bitmap]) {
            BigEndian::write_u64(to, number);
        }
        self.pending += u64::from(!table.is_pending());
        table.dirty.insert(place * size / SECTOR);
        Ok(())
    }

    /// Bytes in memory that the image does not have yet.
    pub(super) fn pending(&self) -> u64 {
        self.pending * self.geometry.cluster_size()
    }

    /// Writes tables to which nothing leads yet.
    pub(super) fn write_fresh(&mut self, storage: &dyn WritableStorage) -> Result<()> {
        for table in self.l2.values_mut().filter(|table| table.fresh) {
            write(storage, "an L2 table", table.host.0, &table.bytes)?;
            table.dirty.clear();
        }
        Ok(())
    }

    /// Writes what leads to clusters that are on stable storage, with refcounts; false where there is nothing.
    pub(super) fn write_links(&mut self, storage: &dyn WritableStorage) -> Result<bool> {
        let mut written = !self.l1_dirty.is_empty();
        for table in self.l2.values_mut().filter(|table| !table.dirty.is_empty()) {
            for run in runs(table.dirty.iter().map(|sector| *sector as u64)) {
                let (start, end) = (to_usize(run.start) * SECTOR, to_usize(run.end) * SECTOR);
                let bytes = table.bytes.get(start..end.min(table.bytes.len())).unwrap_or_default();
                write(storage, "an L2 table", table.host.0 + start as u64, bytes)?;
            }
            table.dirty.clear();
            written = true;
        }
        for run in runs(self.l1_dirty.iter().copied()) {
            let entries = self.l1.get(to_usize(run.start)..to_usize(run.end)).unwrap_or_default();
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            write(storage, "the L1 table", self.l1_offset.0 + run.start * 8, &bytes)?;
        }
        self.l1_dirty.clear();
        self.l2.values_mut().for_each(|table| table.fresh = false);
        self.pending = 0;
        Ok(written)
    }

    fn place(&self, cluster: u64) -> (u64, usize) {
        let entries = self.geometry.l2_entries();
        (cluster / entries, to_usize(cluster % entries))
    }

    fn l1_entry(&self, index: u64) -> u64 {
        self.l1.get(to_usize(index)).copied().unwrap_or_default()
    }

    /// The L2 table with this index, if there is one.
    fn table(&mut self, storage: &dyn Storage, index: u64) -> Result<Option<&mut L2Table>> {
        if !self.l2.contains_key(&index) {
            let value = self.l1_entry(index);
            let offset = HostOffset(self.l1_offset.0 + index * 8);
            let invalid = |allowed| Invalid { field: "L1 entry", offset, value, allowed };
            let Some(entry) = L1Entry::decode(value, self.geometry).map_err(invalid)? else { return Ok(None) };
            let host = entry.table;
            if host.0 < self.geometry.cluster_size() {
                return Err(invalid(Allowed::BehindHeader(self.geometry.cluster_size())).into());
            }
            if host.0 + self.geometry.cluster_size() > storage.length() {
                return Err(invalid(Allowed::BeforeEnd(storage.length())).into());
            }
            let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
            let io = |source| Error::Io { what: "an L2 table", offset: host, source };
            storage.read_exact_at(&mut bytes, host.0).map_err(io)?;
            if self.l2.len() as u64 >= KEPT / self.geometry.cluster_size() {
                self.l2.retain(|_, table| table.is_pending());
            }
            self.l2.insert(index, L2Table { host, bytes, dirty: BTreeSet::new(), fresh: false });
        }
        Ok(self.l2.get_mut(&index))
    }

    /// Makes the L2 table with this index one that belongs to the active disk alone.
    fn own(&mut self, storage: &dyn Storage, refcounts: &mut Refcounts, index: u64) -> Result<()> {
        let value = self.l1_entry(index);
        let bytes = match self.table(storage, index)? {
            Some(_) if value & FLAG_COPIED != 0 => return Ok(()),
            Some(shared) => std::mem::take(&mut shared.bytes),
            None => vec![0; to_usize(self.geometry.cluster_size())],
        };
        let bits = self.geometry.cluster_bits();
        let host = match refcounts.take_run(storage, 1) {
            Ok(cluster) => HostOffset(cluster << bits),
            Err(error) => {
                // what is left of the old table must not stay in memory
                self.l2.remove(&index);
                return Err(error);
            }
        };
        if value & OFFSET_MASK != 0 {
            refcounts.release((value & OFFSET_MASK) >> bits);
        }
        self.l2.insert(index, L2Table { host, bytes, dirty: BTreeSet::new(), fresh: true });
        self.pending += 1;
        if let Some(entry) = self.l1.get_mut(to_usize(index)) {
            *entry = host.0 | FLAG_COPIED;
        }
        self.l1_dirty.insert(index);
        Ok(())
    }
}

/// Numbers that come in order as ranges.
fn runs(numbers: impl Iterator<Item = u64>) -> Vec<std::ops::Range<u64>> {
    let mut runs = Vec::new();
    numbers.for_each(|number| push_joined(&mut runs, number..number + 1));
    runs
}
