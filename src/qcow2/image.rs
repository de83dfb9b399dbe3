//! An open image: its header and where its L2 tables are.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::address::HostOffset;
use super::entry::EntryRules;
use super::error::{Error, Result};
use super::header::{Header, KnownDamage, Table};
use super::l1::{L1Table, read_table};
use crate::storage::{LastHole, Storage, push_joined};

/// An image that was opened for reading.
pub struct Image {
    header: Header,
    l1: L1Table,
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    /// What is wrong with the header, where that was allowed.
    damage: Option<String>,
}

/// Who decides whether a file that an image names may be opened.
///
/// The name is data out of the image: a gate must not open what it does not expect.
pub trait Gate {
    /// Opens the external data file, or says why not.
    ///
    /// # Errors
    /// The reason, which becomes part of [`Error::DataFile`].
    fn open_data_file(&self, name: &str) -> Result<Arc<dyn Storage>, String>;
}

/// The gate that opens nothing.
#[derive(Debug, Clone, Copy)]
pub struct ClosedGate;

impl Gate for ClosedGate {
    fn open_data_file(&self, _: &str) -> Result<Arc<dyn Storage>, String> {
        Err("an image is read by itself alone".to_owned())
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("header", &self.header).finish_non_exhaustive()
    }
}

impl Image {
    /// Opens an image that needs no other file. A backing name is read but never followed.
    ///
    /// # Errors
    /// What is wrong with the header or the L1 table; [`Error::DataFile`] where the data lies elsewhere.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        Self::open_with(storage, &ClosedGate)
    }

    /// Opens an image and, if the gate permits, its external data file.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_with(storage: Arc<dyn Storage>, gate: &dyn Gate) -> Result<Self> {
        let header = Header::read(&*storage)?;
        let data_file = data_file(&header, gate)?;
        let needed = header.geometry.l1_entries(header.size);
        let l1 = L1Table::read(&*storage, header.l1_table, needed, header.geometry)?;
        Ok(Self { header, l1, storage, data_file, damage: None })
    }

    /// Opens an image as [`Image::open`] does, whatever is wrong with its L1 table: to [map](Image::map) a range of which
    /// that says nothing is an error. Nor need fields of the header be right that no read needs, nor the size of the disk,
    /// where it is given.
    ///
    /// # Errors
    /// What is wrong with the other fields of the header; [`Error::DataFile`].
    pub fn open_damaged(storage: Arc<dyn Storage>, size: Option<u64>) -> Result<Self> {
        Self::open_damaged_as(storage, size, None)
    }

    /// As [`open_damaged`](Self::open_damaged), and where it is certain that the header is damaged, other fields of it, too.
    pub(crate) fn open_damaged_as(
        storage: Arc<dyn Storage>,
        size: Option<u64>,
        known: Option<KnownDamage>,
    ) -> Result<Self> {
        let (header, damage) = Header::read_damaged(&*storage, size, known)?;
        let data_file = data_file(&header, &ClosedGate)?;
        let needed = header.geometry.l1_entries(header.size);
        let l1 = L1Table::read_damaged(&*storage, header.l1_table, needed, header.geometry);
        Ok(Self { header, l1, storage, data_file, damage })
    }

    /// What is wrong with the header of an image that was [opened all the same](Image::open_damaged).
    #[must_use]
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// Adds where the tables of the disk and its refcounts lie, and the header: whole clusters.
    ///
    /// # Errors
    /// The refcount table cannot be read; of its blocks not all are among what was added, then.
    pub(crate) fn add_metadata(&self, metadata: &mut Vec<Range<u64>>) -> Result<()> {
        let (header, cluster) = (&self.header, self.header.geometry.cluster_size());
        let of = |table: Table| table.offset.0..table.offset.0.saturating_add(table.bytes());
        metadata.extend([0..cluster, of(header.l1_table), of(header.refcount_table)]);
        let block = |offset: u64| offset..offset.saturating_add(cluster);
        metadata.extend(self.l1.tables().map(|(_, table)| block(table.0)));
        read_table(&*self.storage, header.refcount_table, "the refcount table", |_, entry| {
            metadata.push(block(entry / cluster * cluster));
            Ok(())
        })
    }

    /// The checked header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The size of the virtual disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The file with the metadata.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The file with the guest's clusters: the same, or the external data file.
    #[must_use]
    pub fn data(&self) -> &dyn Storage {
        self.data_file.as_deref().unwrap_or(&*self.storage)
    }

    /// Reads guest data of a [mapped](Image::map) extent. Behind the end of the file, where only the rest of its
    /// last sector can be, there are zeroes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_data(&self, buffer: &mut [u8], host: HostOffset) -> Result<()> {
        read_to_end(self.data(), buffer, host, "guest data")
    }

    /// Guest ranges outside of which nothing is allocated, in order: what the L2 tables map, but for those parts of the
    /// tables that are holes in the file.
    #[must_use]
    pub fn occupied(&self) -> Vec<Range<u64>> {
        /// Bytes of a table that are holes or not, as far as this goes.
        const PART: u64 = 64 << 10;
        let geometry = self.header.geometry;
        let (cluster, entry) = (geometry.cluster_size(), geometry.l2_entry_size());
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut hole = LastHole::default();
        for (index, HostOffset(table)) in self.l1.tables() {
            let guest = |bytes: u64| {
                let in_table = (bytes - table) / entry * cluster;
                index.saturating_mul(geometry.l2_coverage()).saturating_add(in_table).min(self.size())
            };
            let (mut done, end) = (table, table + cluster);
            // who reads the table is told why it cannot be read
            while let Some(data) = hole.next_data_within(&*self.storage, done..end).unwrap_or(Some(done)) {
                let start = (table + (data - table) / PART * PART).max(done);
                done = start.saturating_add(PART).min(end);
                let part = guest(start)..guest(done);
                push_joined(&mut ranges, part);
                if done == end {
                    break;
                }
            }
        }
        ranges
    }

    /// The parts of a guest range whose L2 tables are those of other ranges, too; only where the image was
    /// [opened all the same](Image::open_damaged).
    pub(crate) fn with_shared_tables(&self, guest: &Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let (coverage, start, end) = (self.header.geometry.l2_coverage(), guest.start, guest.end.min(self.size()));
        self.l1
            .shared(start / coverage..end.div_ceil(coverage))
            .map(move |indices| start.max(indices.start * coverage)..end.min(indices.end.saturating_mul(coverage)))
    }

    /// The parts of a guest range whose entries, in L1 or L2 table, lie where `wrong` says that the file is not right. Asked
    /// for parts of the file, it names parts of these.
    pub(crate) fn mapped_from(
        &self,
        guest: &Range<u64>,
        wrong: &dyn Fn(Range<u64>) -> Vec<Range<u64>>,
    ) -> Vec<Range<u64>> {
        let geometry = self.header.geometry;
        let (coverage, entry_size) = (geometry.l2_coverage(), geometry.l2_entry_size());
        let end = guest.end.min(self.size());
        if guest.start >= end {
            return Vec::new();
        }
        let indices = guest.start / coverage..end.div_ceil(coverage);
        let tables = self.l1.within(indices).iter().map(|(index, table)| (index * coverage, coverage, table.0));
        let mut parts = Vec::new();
        for (start, length, table) in std::iter::once((0, u64::MAX, self.header.l1_table.offset.0)).chain(tables) {
            let (unit, size) = if length == coverage { (geometry.cluster_size(), entry_size) } else { (coverage, 8) };
            let part = guest.start.max(start)..end.min(start.saturating_add(length));
            let entries = (part.start - start) / unit..(part.end - start).div_ceil(unit);
            for bytes in wrong(table + entries.start * size..table + entries.end * size) {
                let first = start + (bytes.start - table) / size * unit;
                let behind = (bytes.end - table).div_ceil(size).saturating_mul(unit).saturating_add(start);
                parts.push(first.max(part.start)..behind.min(part.end));
            }
        }
        parts
    }

    pub(crate) fn l1(&self) -> &L1Table {
        &self.l1
    }

    pub(crate) fn rules(&self) -> EntryRules {
        EntryRules::of(&self.header)
    }
}

fn data_file(header: &Header, gate: &dyn Gate) -> Result<Option<Arc<dyn Storage>>> {
    if !header.has_data_file() {
        return Ok(None);
    }
    let name = header.extensions.data_file.clone().unwrap_or_default();
    gate.open_data_file(&name).map(Some).map_err(|reason| Error::DataFile { name, reason })
}

/// Reads what there is and fills the rest with zeroes.
pub(super) fn read_to_end(
    storage: &dyn Storage,
    buffer: &mut [u8],
    host: HostOffset,
    what: &'static str,
) -> Result<()> {
    let there = storage.length().saturating_sub(host.0).min(buffer.len() as u64);
    let (inside, behind) = buffer.split_at_mut(crate::storage::to_usize(there));
    behind.fill(0);
    storage.read_exact_at(inside, host.0).map_err(|source| Error::Io { what, offset: host, source })
}
