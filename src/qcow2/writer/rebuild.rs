//! Refcounts and COPIED flags made new beside the old, exact, and true by one write of the header's sector.
//!
//! ```text
//! 1  the active L1 table, where the walk finds it
//! 2  references are counted; L2 tables of the active disk with wrong flags are copied, with right ones
//! 3  L1 tables that lead to the copies; places for refcount blocks and table
//! 4  references are counted again, now with all that is new: refcount blocks, flags of the L1 table     sync
//! 5  the header                                                                                         sync
//! ```
//!
//! All of it goes to clusters that nothing in the image leads to. Before step 5 the image is the old one, after it the new.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use super::free_clusters::FreeClusters;
use super::head::Head;
use super::refcounts::write;
use super::sync;
use crate::qcow2::address::HostOffset;
use crate::qcow2::check::{CheckLimits, Progress, Recount};
use crate::qcow2::error::{Error, Result};
use crate::qcow2::features::Features;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, Table};
use crate::qcow2::image::read_to_end;
use crate::qcow2::refcount;
use crate::qcow2::wire::{FLAG_COPIED, OFFSET_MASK, REFCOUNT_TABLE_BYTES_MAX, RawHeader};
use crate::storage::{Storage, WritableStorage, to_usize};

/// The state that the header leads to at the end.
#[derive(Debug, Clone)]
pub(in crate::qcow2) struct Next {
    /// The entries of the active L1 table; their COPIED flags may be anything.
    pub(in crate::qcow2) l1: Vec<u64>,
    pub(in crate::qcow2) size: u64,
    pub(in crate::qcow2) nb_snapshots: u32,
    pub(in crate::qcow2) snapshots_offset: HostOffset,
    /// A new snapshot table; empty where there is none, or the old one stays.
    pub(in crate::qcow2) snapshot_table: Vec<u8>,
    /// Incompatible features.
    pub(in crate::qcow2) features: u64,
}

/// What is worked with.
pub(in crate::qcow2) struct Rebuild<'a> {
    pub(in crate::qcow2) storage: &'a Arc<dyn WritableStorage>,
    /// Where new tables of the caller's are, too.
    pub(in crate::qcow2) free: FreeClusters<'a>,
    /// Damaged tables are no reason to stop.
    pub(in crate::qcow2) takes_damage: bool,
    pub(in crate::qcow2) limits: CheckLimits,
}

type Observer<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// New refcount blocks by index, and their table.
pub(super) struct Places {
    pub(super) blocks: BTreeMap<u64, HostOffset>,
    pub(super) table: Table,
    /// The entries of the table that they replace.
    old: Vec<u64>,
}

/// What only the header does not say yet.
pub(super) struct Made {
    pub(super) next: Next,
    pub(super) l1_table: HostOffset,
    pub(super) refcount_table: Table,
}

impl Rebuild<'_> {
    /// Makes all of it and switches. What fails before the switch leaves the image as it was.
    pub(in crate::qcow2) fn run(mut self, head: &mut Head, next: Next, observer: Observer<'_>) -> Result<()> {
        switch(&**self.storage, head, |head| self.make(head, next, observer))
    }

    /// Writes all that the header will lead to.
    fn make(&mut self, head: &Head, mut next: Next, observer: Observer<'_>) -> Result<Made> {
        let storage = &**self.storage;
        let active = self.free.take_l1(head.header(), next.l1.len())?.offset;
        write(storage, "the snapshot table", next.snapshots_offset.0, &next.snapshot_table)?;
        write_entries(storage, "the L1 table", active, &next.l1)?;
        grow(storage, self.free.end())?;
        let header = head.preview(|raw| next.put(raw, active))?;
        let header = Header { refcount_table: Table { offset: HostOffset(0), entries: 0 }, ..header };
        let (used, moved) = self.first_count(&header, &mut *observer)?;
        for entry in &mut next.l1 {
            let table = HostOffset(*entry & OFFSET_MASK);
            *entry = moved.get(&table).map_or(*entry, |to| *entry & !OFFSET_MASK | to.0);
        }
        write_entries(storage, "the L1 table", active, &next.l1)?;
        let places = Places::find(used, Vec::new(), &mut self.free, &header)?;
        grow(storage, self.free.end())?;
        let header = Header { refcount_table: places.table, ..header };
        self.second_count(&header, &places, &mut next.l1, observer)?;
        write_entries(storage, "the refcount table", places.table.offset, &places.entries())?;
        write_entries(storage, "the L1 table", active, &next.l1)?;
        sync(storage)?;
        Ok(Made { next, l1_table: active, refcount_table: places.table })
    }

    /// Finds which blocks have something to count, and copies L2 tables whose flags are wrong.
    fn first_count(
        &mut self,
        header: &Header,
        observer: Observer<'_>,
    ) -> Result<(BTreeSet<u64>, BTreeMap<HostOffset, HostOffset>)> {
        let storage = self.storage;
        let (mut used, mut moved) = (BTreeSet::new(), BTreeMap::new());
        let unit = header.refcounts_per_block();
        let mut observer = share(storage.length(), 0, 2, observer);
        let mut recount = Recount::read(storage, header, &[], self.limits)?;
        recount.windows(&mut observer, |window| {
            window.runs(window.range(), |run, references| {
                count(references, run.start, header)?;
                used.extend(run.start / unit..run.end.div_ceil(unit));
                check_table(&used)
            })?;
            let mut flags =
                Flags { storage, free: &mut self.free, moved: &mut moved, table: None, geometry: header.geometry };
            let mut result = Ok(());
            window.wrong_flags(&mut |entry, copied| {
                if result.is_ok() {
                    result = flags.set(entry, !copied);
                }
            })?;
            result?;
            flags.write()
        })?;
        if recount.is_damaged() && !self.takes_damage {
            return Err(Error::DamagedTables);
        }
        Ok((used, moved))
    }

    /// Writes the refcount blocks, and sets the flags of the active L1 table.
    fn second_count(&self, header: &Header, places: &Places, l1: &mut [u64], observer: Observer<'_>) -> Result<()> {
        let (storage, geometry, unit) = (self.storage, header.geometry, header.refcounts_per_block());
        let mut observer = share(storage.length(), 1, 2, observer);
        let offsets: Vec<HostOffset> = places.blocks.values().copied().collect();
        Recount::read(storage, header, &offsets, self.limits)?.windows(&mut observer, |window| {
            let range = window.range();
            for (index, place) in places.blocks.range(range.start / unit..range.end.div_ceil(unit)) {
                let clusters = index * unit..(index + 1) * unit;
                let mut block = vec![0; to_usize(geometry.cluster_size())];
                // an earlier window has counted a part of it
                if clusters.start < range.start {
                    read_to_end(storage, &mut block, *place, "a refcount block")?;
                }
                let part = clusters.start.max(range.start)..clusters.end.min(range.end);
                window.runs(part, |run, references| {
                    let references = count(references, run.start, header)?;
                    for cluster in run {
                        let entry = to_usize(cluster - clusters.start);
                        refcount::set(&mut block, entry, header.refcount_order, references);
                    }
                    Ok(())
                })?;
                write(&**storage, "a refcount block", place.0, &block)?;
            }
            for entry in l1.iter_mut() {
                let table = *entry & OFFSET_MASK;
                let cluster = table >> geometry.cluster_bits();
                let is_table = table != 0 && geometry.offset_in_cluster(table) == 0;
                if is_table && range.contains(&cluster) && table < storage.length() {
                    let flag = if window.references(cluster) == Some(1) { FLAG_COPIED } else { 0 };
                    *entry = *entry & !FLAG_COPIED | flag;
                }
            }
            Ok(())
        })
    }
}

impl Next {
    fn put(&self, raw: &mut RawHeader, active: HostOffset) {
        raw.l1_table_offset = active.0.into();
        raw.l1_size = u32::try_from(self.l1.len()).unwrap_or(u32::MAX).into();
        raw.size = self.size.into();
        raw.nb_snapshots = self.nb_snapshots.into();
        raw.snapshots_offset = self.snapshots_offset.0.into();
        raw.incompatible_features = self.features.into();
        // others were made to be changed by programs of their version only
        raw.autoclear_features = (raw.autoclear_features.get() & Features::BITMAPS).into();
    }
}

impl Places {
    /// Finds places for refcount blocks with these indices, which count themselves and their table, and no more those that
    /// a table with entries `old` leads to.
    pub(super) fn find(
        mut used: BTreeSet<u64>,
        old: Vec<u64>,
        free: &mut FreeClusters<'_>,
        header: &Header,
    ) -> Result<Self> {
        let (geometry, unit) = (header.geometry, header.refcounts_per_block());
        let mut blocks = BTreeMap::new();
        let mut table = Table { offset: HostOffset(0), entries: 0 };
        loop {
            used.extend(free.blocks());
            let missing: Vec<u64> = used.iter().copied().filter(|index| !blocks.contains_key(index)).collect();
            for index in &missing {
                blocks.insert(*index, free.take()?);
                let replaced = old.get(to_usize(*index)).filter(|block| **block != 0);
                used.extend(replaced.map(|block| (block >> geometry.cluster_bits()) / unit));
            }
            let entries = used.last().map_or(0, |last| last + 1).max(old.len() as u64);
            if !missing.is_empty() {
                continue;
            }
            if entries <= table.entries {
                return Ok(Self { blocks, table, old });
            }
            check_table(&used)?;
            let bytes = (entries * 8).next_multiple_of(geometry.cluster_size());
            // one that is too short is not used, so that it is free
            table = Table { offset: free.take_run(bytes)?, entries: bytes / 8 };
        }
    }

    /// Of the table.
    pub(super) fn entries(&self) -> Vec<u64> {
        let old = self.old.iter().copied().chain(std::iter::repeat(0));
        let entry = |(index, old)| self.blocks.get(&index).map_or(old, |place: &HostOffset| place.0);
        (0..self.table.entries).zip(old).map(entry).collect()
    }

    /// The places of blocks, as they were, or zero, and as they are.
    pub(super) fn replaced(&self) -> impl Iterator<Item = (u64, HostOffset)> {
        let old = |index: u64| self.old.get(to_usize(index)).copied().unwrap_or_default();
        self.blocks.iter().map(move |(index, place)| (old(*index), *place))
    }
}

impl Made {
    pub(super) fn put(&self, raw: &mut RawHeader) {
        self.next.put(raw, self.l1_table);
        raw.refcount_table_offset = self.refcount_table.offset.0.into();
        // it fills clusters
        let clusters = self.refcount_table.bytes() >> raw.cluster_bits.get();
        raw.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX).into();
    }
}

/// Sets COPIED flags, in copies.
struct Flags<'a, 'b> {
    storage: &'a Arc<dyn WritableStorage>,
    free: &'a mut FreeClusters<'b>,
    moved: &'a mut BTreeMap<HostOffset, HostOffset>,
    geometry: Geometry,
    /// A table, its copy and the bytes of that.
    table: Option<(HostOffset, HostOffset, Vec<u8>)>,
}

impl Flags<'_, '_> {
    fn set(&mut self, entry: HostOffset, copied: bool) -> Result<()> {
        let place = self.geometry.offset_in_cluster(entry.0);
        let table = HostOffset(entry.0 - place);
        if self.table.as_ref().is_none_or(|(open, ..)| *open != table) {
            self.write()?;
            let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
            let copy = self.moved.get(&table).copied();
            read_to_end(self.storage, &mut bytes, copy.unwrap_or(table), "an L2 table")?;
            let copy = copy.map_or_else(|| self.free.take(), Ok)?;
            self.moved.insert(table, copy);
            self.table = Some((table, copy, bytes));
        }
        if let Some(byte) = self.table.as_mut().and_then(|(.., bytes)| bytes.get_mut(to_usize(place))) {
            *byte = *byte & 0x7f | u8::from(copied) << 7;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        match self.table.take() {
            Some((_, copy, bytes)) => write(&**self.storage, "an L2 table", copy.0, &bytes),
            None => Ok(()),
        }
    }
}

/// Has the header lead to what is made beside the old.
pub(super) fn switch(
    storage: &dyn WritableStorage,
    head: &mut Head,
    work: impl FnOnce(&Head) -> Result<Made>,
) -> Result<()> {
    let length = storage.length();
    let made = work(head).inspect_err(|_| {
        // nothing leads there; a file that stays longer is no harm
        let _ = storage.set_length(length);
    })?;
    head.update(storage, |raw| made.put(raw))?;
    sync(storage)
}

/// A refcount table can lead to these blocks.
fn check_table(used: &BTreeSet<u64>) -> Result<()> {
    let (bytes, most) = (used.last().map_or(0, |last| (last + 1) * 8), REFCOUNT_TABLE_BYTES_MAX);
    if bytes > most { Err(Error::TableTooLarge { what: "the refcount table", bytes, most }) } else { Ok(()) }
}

/// References that a refcount can count.
pub(super) fn count(references: Option<u64>, cluster: u64, header: &Header) -> Result<u64> {
    references.filter(|references| *references <= refcount::most(header.refcount_order)).ok_or_else(|| {
        let cluster = HostOffset(cluster << header.geometry.cluster_bits());
        Error::RefcountOverflow { cluster, bits: header.refcount_bits() }
    })
}

pub(super) fn write_entries(
    storage: &dyn WritableStorage,
    what: &'static str,
    offset: HostOffset,
    entries: &[u64],
) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    write(storage, what, offset.0, &bytes)
}

/// Makes the file so long that all that was taken is in it.
pub(super) fn grow(storage: &dyn WritableStorage, length: u64) -> Result<()> {
    if length <= storage.length() {
        return Ok(());
    }
    let io = |source| Error::Write { what: "the end of the file", offset: HostOffset(length), source };
    storage.set_length(length).map_err(io)
}

/// Tells an observer of a part of the work; the parts are all of the same length.
pub(in crate::qcow2) fn share(
    length: u64,
    part: u64,
    parts: u64,
    observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> impl FnMut(Progress) -> ControlFlow<()> {
    move |progress| {
        let done = u128::from(progress.done) * u128::from(length) / u128::from(progress.total.max(1));
        let done = part * length + u64::try_from(done).unwrap_or(length);
        observer(Progress { done, total: parts * length })
    }
}
