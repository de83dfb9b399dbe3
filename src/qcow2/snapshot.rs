//! The table of internal snapshots.

use std::time::Duration;

use byteorder::{BigEndian, ByteOrder};

use super::address::HostOffset;
use super::cursor::Cursor;
use super::error::{Allowed, Invalid, Result};
use super::header::{Header, Table};
use super::image::Image;
use super::wire::{self, RawSnapshot};
use crate::storage::Storage;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// What no other snapshot of this image is called.
    pub id: String,
    /// The name that its maker gave.
    pub name: String,
    /// Its L1 table.
    pub l1: Table,
    /// When it was made, since the epoch.
    pub date: Duration,
    /// How long the guest had been running.
    pub vm_clock: Duration,
    /// Bytes of saved RAM and devices; zero where only the disk was saved.
    pub vm_state_size: u64,
    /// Bytes of the disk at that time, where the table says it.
    pub disk_size: Option<u64>,
}

impl Image {
    /// The internal snapshots, in the order of their table.
    ///
    /// # Errors
    /// What is wrong with the table: [`Error::Invalid`](super::Error::Invalid), [`Error::Truncated`](super::Error::Truncated), [`Error::Io`](super::Error::Io).
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let mut snapshots = Vec::new();
        read(self.storage(), self.header(), |entry| {
            entry.check_l1(self.header())?;
            entry.snapshot.l1.check_inside(self.storage(), "the L1 table of a snapshot")?;
            snapshots.push(entry.snapshot);
            Ok(())
        })?;
        Ok(snapshots)
    }

    /// Bytes of the table of internal snapshots, with more of these names; none where that could not hold them.
    ///
    /// # Errors
    /// What is wrong with the table: [`Error::Invalid`](super::Error::Invalid), [`Error::Truncated`](super::Error::Truncated), [`Error::Io`](super::Error::Io).
    pub(crate) fn snapshot_table_with<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<Option<u64>> {
        let length = read(self.storage(), self.header(), |_| Ok(()))?.next_multiple_of(8);
        let there = (u64::from(self.header().nb_snapshots), length);
        let (count, bytes) = names.fold(there, |(count, bytes), name| (count + 1, bytes + entry_bytes(name)));
        Ok((count <= u64::from(wire::SNAPSHOTS_MAX) && bytes <= wire::SNAPSHOT_TABLE_BYTES_MAX).then_some(bytes))
    }
}

/// Bytes of an entry that a [`Writer`](super::Writer) makes, whatever number its ID is.
fn entry_bytes(name: &str) -> u64 {
    const EXTRA: usize = 24;
    const ID_MAX: usize = 20;
    ((size_of::<RawSnapshot>() + EXTRA + ID_MAX + name.len()) as u64).next_multiple_of(8)
}

/// An entry of the table, and where it is.
pub(super) struct SnapshotEntry {
    pub(super) offset: HostOffset,
    /// Its bytes, without those that fill up before the next.
    pub(super) length: u64,
    pub(super) extra_data_size: u32,
    pub(super) snapshot: Snapshot,
}

impl SnapshotEntry {
    /// The L1 table must be aligned and within QEMU's limits.
    pub(super) fn check_l1(&self, header: &Header) -> Result<(), Invalid> {
        let (table, unit) = (self.snapshot.l1, header.geometry.cluster_size());
        let (value, allowed) = (table.offset.0, Allowed::MultipleOf(unit));
        if value % unit != 0 {
            return Err(Invalid { field: "snapshot l1_table_offset", offset: self.offset, value, allowed });
        }
        let (offset, allowed) = (HostOffset(self.offset.0 + 8), Allowed::Range(0, wire::L1_BYTES_MAX / 8));
        if table.bytes() > wire::L1_BYTES_MAX {
            return Err(Invalid { field: "snapshot l1_size", offset, value: table.entries, allowed });
        }
        Ok(())
    }

    /// Version 3 wants to know the size of the disk; QEMU reads snapshots without it all the same.
    pub(super) fn check_extra(&self, header: &Header) -> Result<(), Invalid> {
        let least = if header.version > 2 { wire::SNAPSHOT_EXTRA_MIN_V3 } else { 0 };
        check_extra_size(self.offset, self.extra_data_size, least)
    }
}

fn check_extra_size(entry: HostOffset, size: u32, least: u32) -> Result<(), Invalid> {
    if (least..=wire::SNAPSHOT_EXTRA_MAX).contains(&size) {
        return Ok(());
    }
    let allowed = Allowed::Range(u64::from(least), u64::from(wire::SNAPSHOT_EXTRA_MAX));
    let offset = HostOffset(entry.0 + 36);
    Err(Invalid { field: "snapshot extra_data_size", offset, value: u64::from(size), allowed })
}

/// Calls `each` for every entry of the table and returns the length of the table in bytes.
pub(super) fn read(
    storage: &dyn Storage,
    header: &Header,
    mut each: impl FnMut(SnapshotEntry) -> Result<()>,
) -> Result<u64> {
    let limit = (wire::SNAPSHOT_TABLE_BYTES_MAX, "bytes of the snapshot table");
    let mut cursor = Cursor::new(storage, "the snapshot table", header.snapshots_offset, limit);
    for _ in 0..header.nb_snapshots {
        cursor.pad();
        each(entry(&mut cursor)?)?;
    }
    Ok(cursor.done())
}

fn entry(cursor: &mut Cursor<'_>) -> Result<SnapshotEntry> {
    let offset = cursor.offset();
    let raw: RawSnapshot = zerocopy::transmute!(cursor.take_array::<{ size_of::<RawSnapshot>() }>()?);
    let extra_data_size = raw.extra_data_size.get();
    check_extra_size(offset, extra_data_size, 0)?;
    let extra = cursor.take(u64::from(extra_data_size))?;
    let number = |at: usize| extra.get(at..at + 8).map(BigEndian::read_u64);
    let (vm_state_size, disk_size) = (number(0).unwrap_or(u64::from(raw.vm_state_size.get())), number(8));
    let snapshot = Snapshot {
        id: cursor.take_text(raw.id_size.get())?,
        name: cursor.take_text(raw.name_size.get())?,
        l1: Table { offset: HostOffset(raw.l1_table_offset.get()), entries: u64::from(raw.l1_size.get()) },
        date: Duration::from_secs(u64::from(raw.date_seconds.get()))
            + Duration::from_nanos(u64::from(raw.date_nanoseconds.get())),
        vm_clock: Duration::from_nanos(raw.vm_clock_nanoseconds.get()),
        vm_state_size,
        disk_size,
    };
    Ok(SnapshotEntry { offset, length: cursor.offset().0 - offset.0, extra_data_size, snapshot })
}

#[cfg(test)]
mod tests {
    use std::iter::repeat_n;
    use std::sync::Arc;

    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn more_snapshots_fit_as_long_as_neither_they_nor_their_bytes_are_too_many() {
        let image = include_bytes!("../../testdata/chain/disk0/FULL-1793588400-disk.qcow2");
        let image = Image::open(Arc::new(MemoryStorage::new(image.to_vec()))).unwrap();
        let fit = |count, name: &str| image.snapshot_table_with(repeat_n(name, count)).unwrap();
        assert_eq!(fit(0, ""), Some(0));
        // 40 bytes, 24 of extra data, 20 of an ID and the name, filled up
        assert_eq!(fit(2, "name"), Some(2 * 88));
        assert_eq!((fit(65_536, "name").is_some(), fit(65_537, "name")), (true, None));
        let longest = "n".repeat(1024 - 84);
        assert_eq!((fit(65_536, &longest), fit(65_536, &"n".repeat(1025 - 84))), (Some(64 << 20), None));
    }
}
