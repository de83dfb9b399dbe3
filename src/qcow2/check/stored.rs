//! Refcounts as the image has them, read block by block.

use std::collections::HashSet;
use std::ops::Range;

use super::report::Report;
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::{Allowed, Invalid, Result};
use crate::qcow2::header::{Header, Table};
use crate::qcow2::image::read_to_end;
use crate::qcow2::l1::read_table;
use crate::qcow2::pieces::Pieces;
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
    /// Whether there is a table at all.
    known: bool,
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
            known: header.refcount_table.entries > 0,
            blocks: Vec::new(),
            references: Vec::new(),
            cluster_size,
            entries: header.refcounts_per_block(),
            order: header.refcount_order,
            clusters: storage.length().div_ceil(cluster_size),
        };
        let mut known = HashSet::new();
        let table = inside(storage, header.refcount_table);
        if table.entries == 0 {
            // all of it is beyond the end
            return Ok(stored);
        }
        read_table(storage, table, "the refcount table", |index, value| {
            let offset = HostOffset(table.offset.0 + index * 8);
            let block = stored.block(value, &mut known, |allowed| {
                report.add(Invalid { field: "refcount table entry", offset, value, allowed });
            });
            stored.blocks.resize(to_usize(index), Block::Zero);
            stored.blocks.push(block);
            Ok(())
        })?;
        Ok(stored)
    }

    fn block(&mut self, value: u64, known: &mut HashSet<u64>, mut report: impl FnMut(Allowed)) -> Block {
        let offset = value & REFCOUNT_OFFSET_MASK;
        if offset % self.cluster_size != 0 {
            report(Allowed::MultipleOf(self.cluster_size));
            return Block::Unknown;
        }
        if offset / self.cluster_size >= self.clusters {
            report(Allowed::BeforeEnd(self.storage.length()));
            return Block::Zero;
        }
        if offset == 0 {
            report(Allowed::Bits(REFCOUNT_OFFSET_MASK));
            return Block::Zero;
        }
        // no block counts two parts of the file; if one is twice in the table, its references tell
        let block = if known.insert(offset) { Block::At(offset) } else { Block::Unknown };
        if value != offset {
            report(Allowed::Bits(REFCOUNT_OFFSET_MASK));
            return block;
        }
        if offset + self.cluster_size > self.storage.length() {
            report(Allowed::Because("but the block does not end before the end of the file"));
        }
        self.references.push(HostOffset(offset));
        block
    }

    /// Calls `each` for the parts of a range of clusters that have one refcount, in order and without gaps; `None` where the
    /// block is damaged, or there is no table. Clusters behind the end of the file have refcounts, too.
    pub(in crate::qcow2) fn runs(
        &self,
        range: Range<u64>,
        each: &mut dyn FnMut(Range<u64>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        if !self.known {
            return each(range, None);
        }
        let mut pieces = Pieces::default();
        let mut start = range.start;
        while start < range.end {
            let index = start / self.entries;
            let Some(block) = self.blocks.get(to_usize(index)) else { return each(start..range.end, Some(0)) };
            let end = range.end.min((index + 1) * self.entries);
            match block {
                Block::Zero => each(start..end, Some(0))?,
                Block::Unknown => each(start..end, None)?,
                Block::At(offset) => self.block_runs(*offset, start..end, &mut pieces, each)?,
            }
            start = end;
        }
        Ok(())
    }

    /// The same for clusters whose refcounts are in the block at this offset.
    fn block_runs(
        &self,
        offset: u64,
        range: Range<u64>,
        pieces: &mut Pieces,
        each: &mut dyn FnMut(Range<u64>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        let first = range.start / self.entries * self.entries;
        // sectors hold whole refcounts
        let sector = |cluster: u64| ((cluster - first) << self.order) / 8 / 512 * 512;
        let bytes = offset + sector(range.start)..offset + sector(range.end - 1) + 512;
        let mut run = range.start..range.start;
        let mut last = 0;
        let mut grow = |end: u64, refcount: u64| -> Result<()> {
            if refcount != last && !run.is_empty() {
                each(run.clone(), Some(last))?;
                run.start = run.end;
            }
            last = refcount;
            run.end = end.max(run.end);
            Ok(())
        };
        pieces.read(self.storage, bytes, "a refcount block", |start, bytes| {
            let start = first + (((start - offset) * 8) >> self.order);
            let clusters = start..start + ((bytes.len() as u64 * 8) >> self.order);
            // a hole
            grow(start.min(range.end), 0)?;
            for cluster in clusters.start.max(range.start)..clusters.end.min(range.end) {
                grow(cluster + 1, refcount::get(bytes, to_usize(cluster - start), self.order))?;
            }
            Ok(())
        })?;
        grow(range.end, 0)?;
        if run.is_empty() { Ok(()) } else { each(run, Some(last)) }
    }
}

/// Refcounts of single clusters: what was read of the blocks last is kept.
pub(super) struct Lookup<'a> {
    stored: &'a Stored<'a>,
    /// Parts of blocks by offset.
    parts: Vec<(u64, Vec<u8>)>,
}

impl<'a> Lookup<'a> {
    /// Parts that are kept: 4 MiB.
    const PARTS: u64 = 1 << 10;
    /// Bytes of a part, if blocks are not smaller.
    const PART: u64 = 4096;

    pub(super) fn new(stored: &'a Stored<'a>) -> Self {
        Self { stored, parts: vec![(0, Vec::new()); to_usize(Self::PARTS)] }
    }

    /// Whether a cluster has refcount one, which those in a damaged block have not; `None` where there is no table.
    pub(super) fn is_one(&mut self, cluster: u64) -> Result<Option<bool>> {
        Ok(if self.stored.known { Some(self.get(cluster)? == 1) } else { None })
    }

    /// The refcount of a cluster; zero where the block is damaged.
    fn get(&mut self, cluster: u64) -> Result<u64> {
        let Self { stored, parts } = self;
        let Some(Block::At(block)) = stored.blocks.get(to_usize(cluster / stored.entries)) else { return Ok(0) };
        let size = Self::PART.min(stored.cluster_size);
        let in_part = (size * 8) >> stored.order;
        let offset = block + cluster % stored.entries / in_part * size;
        let Some((kept, bytes)) = parts.get_mut(to_usize(offset / size % Self::PARTS)) else { return Ok(0) };
        if *kept != offset {
            bytes.resize(to_usize(size), 0);
            read_to_end(stored.storage, bytes, HostOffset(offset), "a refcount block")?;
            *kept = offset;
        }
        Ok(refcount::get(bytes, to_usize(cluster % in_part), stored.order))
    }
}

/// The part of a table that the file has.
pub(super) fn inside(storage: &dyn Storage, table: Table) -> Table {
    let entries = storage.length().saturating_sub(table.offset.0) / 8;
    Table { entries: table.entries.min(entries), ..table }
}
