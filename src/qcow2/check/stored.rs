//! Refcounts as the image has them, read block by block.

use std::ops::Range;

use super::report::Report;
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::{Allowed, Invalid, Result};
use crate::qcow2::header::{Header, Table};
use crate::qcow2::image::read_to_end;
use crate::qcow2::l1::read_table;
use crate::qcow2::refcount;
use crate::qcow2::wire::REFCOUNT_OFFSET_MASK;
use crate::storage::{Storage, to_usize};

/// Where the refcounts of a range of clusters are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Block {
    /// Nowhere: all are zero.
    #[default]
    Zero,
    /// In the cluster at this offset.
    At(u64),
    /// The entry is damaged.
    Unknown,
}

/// The refcount table.
pub(in crate::qcow2) struct Stored<'a> {
    storage: &'a dyn Storage,
    /// By index; QEMU allows 8 MiB of table.
    blocks: Vec<Block>,
    /// Blocks that are clusters of the file, each a reference.
    pub(in crate::qcow2) references: Vec<HostOffset>,
    cluster_size: u64,
    entries: u64,
    order: u32,
    /// Clusters of the file.
    clusters: u64,
}

impl<'a> Stored<'a> {
    /// Reads the refcount table and reports damaged entries.
    pub(in crate::qcow2) fn read(storage: &'a dyn Storage, header: &Header, report: &mut Report) -> Result<Self> {
        let cluster_size = header.geometry.cluster_size();
        let mut stored = Self {
            storage,
            blocks: Vec::new(),
            references: Vec::new(),
            cluster_size,
            entries: (cluster_size * 8) >> header.refcount_order,
            order: header.refcount_order,
            clusters: storage.length().div_ceil(cluster_size),
        };
        let table = inside(storage, header.refcount_table);
        if table.entries == 0 {
            // all of it is beyond the end
            return Ok(stored);
        }
        read_table(storage, table, "the refcount table", |index, value| {
            let offset = HostOffset(table.offset.0 + index * 8);
            let block = stored.block(value, |allowed| {
                report.add(Invalid { field: "refcount table entry", offset, value, allowed });
            });
            stored.blocks.resize(to_usize(index), Block::Zero);
            stored.blocks.push(block);
            Ok(())
        })?;
        Ok(stored)
    }

    fn block(&mut self, value: u64, mut report: impl FnMut(Allowed)) -> Block {
        let offset = value & REFCOUNT_OFFSET_MASK;
        if offset % self.cluster_size != 0 {
            report(Allowed::MultipleOf(self.cluster_size));
            return Block::Unknown;
        }
        if offset >= self.clusters * self.cluster_size {
            report(Allowed::BeforeEnd(self.storage.length()));
            return Block::Zero;
        }
        if value != offset {
            report(Allowed::Bits(REFCOUNT_OFFSET_MASK));
            return Block::At(offset);
        }
        if offset + self.cluster_size > self.storage.length() {
            report(Allowed::Because("but the block does not end before the end of the file"));
        }
        self.references.push(HostOffset(offset));
        Block::At(offset)
    }

    /// The first cluster at or behind this one that may have a refcount.
    pub(super) fn next(&self, cluster: u64) -> Option<u64> {
        let first = cluster / self.entries;
        let blocks = self.blocks.get(to_usize(first)..).unwrap_or_default();
        let skipped = blocks.iter().position(|block| *block != Block::Zero)? as u64;
        Some(cluster.max((first + skipped) * self.entries)).filter(|cluster| *cluster < self.clusters)
    }

    /// Calls `each` with every cluster of the range and its refcount; `None` where the block is damaged.
    /// Clusters behind the end of the file have refcounts, too.
    pub(in crate::qcow2) fn for_each(&self, range: Range<u64>, mut each: impl FnMut(u64, Option<u64>)) -> Result<()> {
        let mut bytes = vec![0; to_usize(self.cluster_size)];
        let mut cluster = range.start;
        while cluster < range.end {
            let index = cluster / self.entries;
            let end = range.end.min((index + 1) * self.entries);
            match self.blocks.get(to_usize(index)).copied().unwrap_or_default() {
                Block::Zero => (cluster..end).for_each(|cluster| each(cluster, Some(0))),
                Block::Unknown => (cluster..end).for_each(|cluster| each(cluster, None)),
                Block::At(offset) => {
                    read_to_end(self.storage, &mut bytes, HostOffset(offset), "a refcount block")?;
                    (cluster..end).for_each(|cluster| each(cluster, Some(self.refcount(&bytes, cluster))));
                }
            }
            cluster = end;
        }
        Ok(())
    }

    /// As [`Stored::for_each`], but only for clusters whose refcount may be other than zero.
    pub(super) fn for_each_used(&self, range: Range<u64>, mut each: impl FnMut(u64, u64)) -> Result<()> {
        let mut start = range.start;
        while let Some(cluster) = self.next(start).filter(|cluster| *cluster < range.end) {
            start = range.end.min((cluster / self.entries + 1) * self.entries);
            self.for_each(cluster..start, |cluster, refcount| each(cluster, refcount.unwrap_or_default()))?;
        }
        Ok(())
    }

    fn refcount(&self, block: &[u8], cluster: u64) -> u64 {
        refcount::get(block, to_usize(cluster % self.entries), self.order)
    }
}

/// The part of a table that the file has.
pub(super) fn inside(storage: &dyn Storage, table: Table) -> Table {
    let entries = storage.length().saturating_sub(table.offset.0) / 8;
    Table { entries: table.entries.min(entries), ..table }
}
