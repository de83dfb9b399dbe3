//! The active L1 table, kept sparse: memory goes with what is allocated, not with the size of the disk.

use std::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use super::address::HostOffset;
use super::entry::L1Entry;
use super::error::{Allowed, Error, Invalid, Result};
use super::geometry::Geometry;
use super::header::Table;
use super::pieces::Pieces;
use crate::storage::{Storage, to_usize};

/// Entries that are lost together where they cannot be read: those of a page.
const PIECE: u64 = 512;

/// Entries for tables that other entries lead to, too, which are used all the same.
const SHARED: usize = 1 << 10;

/// The L2 tables of a disk, by L1 index.
#[derive(Debug, Clone, Default)]
pub(crate) struct L1Table {
    /// Where its first entry is in the file.
    offset: HostOffset,
    entries: Vec<(u64, HostOffset)>,
    /// The indices of entries that cannot be used, in order, and why; only where that was allowed.
    damaged: Vec<(Range<u64>, Reason)>,
    /// The indices of entries that lead where others do, too, in order; only where that was allowed.
    shared: Vec<Range<u64>>,
}

/// Why entries cannot be used.
#[derive(Debug, Clone)]
enum Reason {
    /// The first of them has this value.
    Invalid { value: u64, allowed: Allowed },
    /// Others point to the same L2 table.
    Shared(HostOffset),
    /// The table has only so many.
    Short(u64),
    /// This part of the table cannot be read.
    Unread(Box<str>),
}

impl L1Table {
    /// Reads the entries that the disk needs and checks each: aligned, behind the header, whole in the file, and
    /// no table twice, so that the work to map a disk is bounded by the length of its file.
    pub(crate) fn read(storage: &dyn Storage, table: Table, needed: u64, geometry: Geometry) -> Result<Self> {
        let table = Table { entries: needed.min(table.entries), ..table };
        let mut entries = Vec::new();
        read_table(storage, table, "the L1 table", |index, value| {
            let offset = HostOffset(table.offset.0 + index * 8);
            let invalid = |allowed| Invalid { field: "L1 entry", offset, value, allowed };
            if let Some(entry) = L1Entry::decode(value, geometry).map_err(invalid)? {
                check_inside(entry.table, storage, geometry, geometry.cluster_size()).map_err(invalid)?;
                entries.push((index, entry.table));
            }
            Ok(())
        })?;
        refuse_shared(&entries)?;
        Ok(Self { offset: table.offset, entries, ..Self::default() })
    }

    /// As [`read`](Self::read), but what is wrong with an entry, or with a part of the table, costs only that. Of several
    /// entries for one table nobody knows which is right: all are used and [told](Self::shared), or none where they are many.
    pub(crate) fn read_damaged(storage: &dyn Storage, table: Table, needed: u64, geometry: Geometry) -> Self {
        let mut read = Self { offset: table.offset, ..Self::default() };
        for start in (0..needed.min(table.entries)).step_by(to_usize(PIECE)) {
            let indices = start..(start + PIECE).min(needed).min(table.entries);
            let entries = indices.end - indices.start;
            let piece = Table { offset: HostOffset(table.offset.0.saturating_add(start * 8)), entries };
            let whole = read_table(storage, piece, "the L1 table", |index, value| {
                read.judge(storage, start + index, value, geometry);
                Ok(())
            });
            if let Err(error) = whole {
                read.lose(indices, Reason::Unread(error.to_string().into()));
            }
        }
        // behind the end of the table
        if table.entries < needed {
            read.lose(table.entries..needed, Reason::Short(table.entries));
        }
        read.judge_shared();
        read
    }

    /// Takes an entry that is right.
    fn judge(&mut self, storage: &dyn Storage, index: u64, value: u64, geometry: Geometry) {
        let entry = L1Entry::decode(value, geometry).and_then(|entry| match entry {
            // what is left of a table that was cut off can be read
            Some(entry) => check_inside(entry.table, storage, geometry, 1).map(|()| Some(entry)),
            None => Ok(None),
        });
        match entry {
            Ok(entry) => self.entries.extend(entry.map(|entry| (index, entry.table))),
            Err(allowed) => self.lose(index..index + 1, Reason::Invalid { value, allowed }),
        }
    }

    /// Neighbours are lost together, for the reason of the first.
    fn lose(&mut self, indices: Range<u64>, reason: Reason) {
        push_joined(&mut self.damaged, indices, reason);
    }

    fn judge_shared(&mut self) {
        let mut tables: Vec<HostOffset> = self.entries.iter().map(|(_, table)| *table).collect();
        tables.sort_unstable();
        let mut shared: Vec<HostOffset> = Vec::new();
        for pair in tables.windows(2) {
            if let [one, other] = pair {
                if one == other && shared.last() != Some(one) {
                    shared.push(*one);
                }
            }
        }
        let is_shared = |(_, table): &(u64, HostOffset)| shared.binary_search(table).is_ok();
        let all: Vec<(u64, HostOffset)> = self.entries.iter().copied().filter(is_shared).collect();
        if all.len() <= SHARED {
            let mut joined = Vec::new();
            for (index, _) in &all {
                push_joined(&mut joined, *index..*index + 1, ());
            }
            self.shared = joined.into_iter().map(|(indices, ())| indices).collect();
            return;
        }
        self.entries.retain(|entry| !is_shared(entry));
        let mut lost = Vec::new();
        for (index, table) in &all {
            push_joined(&mut lost, *index..*index + 1, Reason::Shared(*table));
        }
        self.damaged.append(&mut lost);
        self.damaged.sort_by_key(|(indices, _)| indices.start);
    }

    /// The indices in a range of entries that lead where others do, too.
    pub(crate) fn shared(&self, indices: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let start = self.shared.partition_point(|shared| shared.end <= indices.start);
        let behind = self.shared.get(start..).unwrap_or_default().iter();
        let within = behind.take_while(move |shared| shared.start < indices.end);
        within.map(move |shared| shared.start.max(indices.start)..shared.end.min(indices.end))
    }

    /// Why the entry cannot be used, if it cannot, nor those that follow it up to another one.
    pub(crate) fn damage(&self, index: u64) -> Option<(u64, Error)> {
        let place = self.damaged.partition_point(|(indices, _)| indices.end <= index);
        let (indices, reason) = self.damaged.get(place).filter(|(indices, _)| indices.contains(&index))?;
        let because =
            |field, offset, value, allowed| Error::from(Invalid { field, offset, value, allowed }).to_string();
        let reason = match reason {
            Reason::Invalid { value, allowed } => {
                because("L1 entry", HostOffset(self.offset.0 + indices.start * 8), *value, *allowed)
            }
            Reason::Shared(table) => format!("another L1 entry points to the L2 table at offset {table}, too"),
            Reason::Short(entries) => {
                because("l1_size", HostOffset(36), *entries, Allowed::Because("the disk needs more entries"))
            }
            Reason::Unread(why) => why.to_string(),
        };
        Some((indices.end, Error::DamagedL1 { index, reason }))
    }

    /// The entries with a table whose indices are in a range.
    pub(crate) fn within(&self, indices: Range<u64>) -> &[(u64, HostOffset)] {
        let start = self.entries.partition_point(|(index, _)| *index < indices.start);
        let end = self.entries.partition_point(|(index, _)| *index < indices.end);
        self.entries.get(start..end.max(start)).unwrap_or_default()
    }

    pub(crate) fn get(&self, index: u64) -> Option<HostOffset> {
        let place = self.entries.binary_search_by_key(&index, |(index, _)| *index).ok()?;
        self.entries.get(place).map(|(_, table)| *table)
    }

    /// The indices and tables of the entries that have one, in order.
    pub(crate) fn tables(&self) -> impl Iterator<Item = (u64, HostOffset)> + '_ {
        self.entries.iter().copied()
    }
}

fn push_joined<T>(all: &mut Vec<(Range<u64>, T)>, indices: Range<u64>, why: T) {
    match all.last_mut() {
        Some((last, _)) if last.end == indices.start => last.end = indices.end,
        _ => all.push((indices, why)),
    }
}

/// At least so many bytes of an L2 table must be in the file.
fn check_inside(table: HostOffset, storage: &dyn Storage, geometry: Geometry, bytes: u64) -> Result<(), Allowed> {
    if table.0 < geometry.cluster_size() {
        return Err(Allowed::BehindHeader(geometry.cluster_size()));
    }
    let last = storage.length().checked_sub(bytes);
    if last.is_none_or(|last| table.0 > last) { Err(Allowed::BeforeEnd(storage.length())) } else { Ok(()) }
}

fn refuse_shared(entries: &[(u64, HostOffset)]) -> Result<()> {
    let mut tables = entries.to_vec();
    tables.sort_unstable_by_key(|(index, table)| (*table, *index));
    for pair in tables.windows(2) {
        match pair {
            [(first, table), (second, other)] if table == other => {
                return Err(Error::SharedL2Table { first: *first, second: *second, table: *table });
            }
            _ => {}
        }
    }
    Ok(())
}

/// All entries of an L1 table as they are.
pub(super) fn l1_entries(storage: &dyn Storage, table: Table, what: &'static str) -> Result<Vec<u64>> {
    let mut entries = Vec::new();
    read_table(storage, table, what, |index, value| {
        entries.resize(to_usize(index), 0);
        entries.push(value);
        Ok(())
    })?;
    entries.resize(to_usize(table.entries), 0);
    Ok(entries)
}

/// Calls `each` for every entry of a table that is not zero.
pub(crate) fn read_table(
    storage: &dyn Storage,
    table: Table,
    what: &'static str,
    mut each: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    table.check_inside(storage, what)?;
    let (offset, length) = (table.offset, table.bytes());
    Pieces::default().read(storage, offset.0..offset.0 + length, what, |start, bytes| {
        for (index, bytes) in ((start - offset.0) / 8..).zip(bytes.chunks_exact(8)) {
            let value = BigEndian::read_u64(bytes);
            if value != 0 {
                each(index, value)?;
            }
        }
        Ok(())
    })
}
