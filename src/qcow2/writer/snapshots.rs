//! Internal snapshots: made, applied and deleted. Each is there as a whole or not at all, whenever a crash comes.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::Writer;
use super::free_clusters::FreeClusters;
use super::new_snapshot::NewSnapshot;
use super::rebuild::{Next, Rebuild};
use super::refcounts::clusters;
use crate::qcow2::address::HostOffset;
use crate::qcow2::bitmap;
use crate::qcow2::check::CheckLimits;
use crate::qcow2::error::{Error, Result};
use crate::qcow2::header::Table;
use crate::qcow2::l1::l1_entries;
use crate::qcow2::snapshot::{self, Snapshot};
use crate::qcow2::wire::{L1_BYTES_MAX, RawSnapshot, SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use crate::storage::{Storage, to_usize};

/// The snapshot table, entry by entry.
#[derive(Default)]
struct Entries {
    snapshots: Vec<Snapshot>,
    /// Each with all that it has, known or not.
    bytes: Vec<Vec<u8>>,
}

impl Writer {
    /// The internal snapshots, in the order of their table.
    ///
    /// # Errors
    /// What is wrong with the table: [`Error::Invalid`], [`Error::Truncated`], [`Error::Io`].
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(self.entries()?.snapshots)
    }

    /// Keeps the disk as it is now as an internal snapshot, and returns its new ID.
    ///
    /// # Errors
    /// [`Error::RefcountOverflow`] where refcounts are too narrow for one more owner, and [`Error::TooMany`],
    /// [`Error::TableTooLarge`], [`Error::DamagedTables`]: nothing is changed then. What the system says.
    pub fn create_snapshot(&mut self, name: &str, date: Duration) -> Result<String> {
        self.create_snapshot_within(name, date, CheckLimits::default())
    }

    /// As [`create_snapshot`](Self::create_snapshot), with so much in memory at a time; the image is the same.
    pub(super) fn create_snapshot_within(&mut self, name: &str, date: Duration, limits: CheckLimits) -> Result<String> {
        self.flush()?;
        let mut entries = self.entries()?;
        let (count, most) = (entries.snapshots.len() as u64 + 1, u64::from(SNAPSHOTS_MAX));
        if count > most {
            return Err(Error::TooMany { what: "internal snapshots", count, most });
        }
        let id = entries.unused_id();
        let storage = Arc::clone(&self.storage);
        let mut free = self.free_clusters(&storage, &entries)?;
        let l1 = self.tables.entries().to_vec();
        let l1_table = free.take_l1(self.header(), l1.len())?;
        let old_snapshot_table = entries.table()?.len() as u64;
        entries.bytes.push(new_entry(&id, name, date, l1_table, self.header().size)?);
        let next = self.next(l1, &entries, &mut free)?;
        let refcounts = &mut self.refcounts;
        let new = NewSnapshot { storage: &storage, free, refcounts, old_snapshot_table, l1_table, limits };
        let made = new.run(&mut self.head, next);
        self.reopen(made)?;
        Ok(id)
    }

    /// Makes the disk what it was at a snapshot, which is looked for by ID, then by name, and stays. The disk gets its size.
    ///
    /// # Errors
    /// [`Error::NoSuch`]; [`Error::NotWritable`] where the image has bitmaps, which know nothing of such a change: nothing
    /// is changed then. As [`Writer::create_snapshot`].
    pub fn apply_snapshot(&mut self, id_or_name: &str) -> Result<()> {
        self.rebuilt(|writer, free| {
            let entries = writer.entries()?;
            let snapshot = entries.snapshots.get(entries.find(id_or_name)?);
            if bitmap::consistent(writer.header()).is_some_and(|bitmaps| bitmaps.nb_bitmaps > 0) {
                return Err(Error::NotWritable {
                    reason: "it has bitmaps, which would not say what a snapshot changes",
                });
            }
            let size = snapshot.and_then(|snapshot| snapshot.disk_size).unwrap_or(writer.header().size);
            let mut l1 = snapshot.map_or_else(
                || Ok(Vec::new()),
                |snapshot| l1_entries(&writer.storage, snapshot.l1, "the L1 table of a snapshot"),
            )?;
            let needed = writer.header().geometry.l1_entries(size);
            l1.resize(l1.len().max(to_usize(needed.min(L1_BYTES_MAX / 8))), 0);
            let next = writer.next(l1, &Entries::default(), free)?;
            let (nb_snapshots, snapshots_offset) = (writer.header().nb_snapshots, writer.header().snapshots_offset);
            Ok((Next { size, nb_snapshots, snapshots_offset, ..next }, ()))
        })
    }

    /// Deletes a snapshot, which is looked for by ID, then by name.
    ///
    /// # Errors
    /// [`Error::NoSuch`]: nothing is changed then. As [`Writer::create_snapshot`].
    pub fn delete_snapshot(&mut self, id_or_name: &str) -> Result<()> {
        self.rebuilt(|writer, free| {
            let mut entries = writer.entries()?;
            let index = entries.find(id_or_name)?;
            entries.bytes.remove(index);
            Ok((writer.next(writer.tables.entries().to_vec(), &entries, free)?, ()))
        })
    }

    /// Free clusters, none of which tables are in, whatever their refcounts say.
    fn free_clusters<'a>(&self, storage: &'a dyn Storage, entries: &Entries) -> Result<FreeClusters<'a>> {
        let header = self.header();
        let snapshots = clusters(header.snapshots_offset, entries.table()?.len() as u64, header.geometry);
        let used = self.refcounts.metadata().iter().copied().chain(snapshots);
        FreeClusters::by_refcounts(storage, header, used.collect())
    }

    /// Flushes, makes the state that `next` describes, and goes on with that.
    fn rebuilt<T>(&mut self, next: impl FnOnce(&Self, &mut FreeClusters<'_>) -> Result<(Next, T)>) -> Result<T> {
        self.flush()?;
        let storage = Arc::clone(&self.storage);
        let mut free = self.free_clusters(&storage, &self.entries()?)?;
        let (next, result) = next(self, &mut free)?;
        let rebuild = Rebuild { storage: &storage, free, takes_damage: false, limits: CheckLimits::default() };
        let made = rebuild.run(&mut self.head, next, &mut |_| ControlFlow::Continue(()));
        self.reopen(made)?;
        Ok(result)
    }

    /// Goes on with tables that were made beside the old.
    fn reopen(&mut self, made: Result<()>) -> Result<()> {
        // other errors were found before anything was written that the image leads to
        self.failed |= matches!(made, Err(Error::Io { .. } | Error::Write { .. } | Error::Sync { .. }));
        made?;
        self.failed = true;
        // those that this writer keeps up to date say that they are in use, and it still knows what they do not
        let bitmaps = std::mem::take(&mut self.bitmaps);
        *self = Self { bitmaps, ..Self::open(Arc::clone(&self.storage))? };
        Ok(())
    }

    fn entries(&self) -> Result<Entries> {
        let mut entries = Entries::default();
        snapshot::read(&self.storage, self.header(), |entry| {
            entry.check_l1(self.header())?;
            let mut bytes = vec![0; to_usize(entry.length)];
            let io = |source| Error::Io { what: "the snapshot table", offset: entry.offset, source };
            self.storage.read_exact_at(&mut bytes, entry.offset.0).map_err(io)?;
            entries.bytes.push(bytes);
            entries.snapshots.push(entry.snapshot);
            Ok(())
        })?;
        Ok(entries)
    }

    /// This disk with an L1 table and snapshots.
    fn next(&self, l1: Vec<u64>, entries: &Entries, free: &mut FreeClusters<'_>) -> Result<Next> {
        let snapshot_table = entries.table()?;
        let length = snapshot_table.len() as u64;
        let snapshots_offset = if length == 0 { HostOffset(0) } else { free.take_run(length)? };
        Ok(Next {
            l1,
            size: self.header().size,
            nb_snapshots: u32::try_from(entries.bytes.len()).unwrap_or(u32::MAX),
            snapshots_offset,
            snapshot_table,
            features: self.header().features.incompatible,
        })
    }
}

impl Entries {
    /// The place of a snapshot in the table.
    fn find(&self, id_or_name: &str) -> Result<usize> {
        let by_id = self.snapshots.iter().position(|snapshot| snapshot.id == id_or_name);
        let found = by_id.or_else(|| self.snapshots.iter().position(|snapshot| snapshot.name == id_or_name));
        found.ok_or_else(|| Error::NoSuch { what: "internal snapshot", name: id_or_name.to_owned() })
    }

    /// As QEMU has it: the number behind the highest that an ID begins with.
    fn unused_id(&self) -> String {
        let number = |id: &str| {
            let digits = id.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(id.len());
            id.get(..digits).and_then(|digits| digits.parse::<u64>().ok())
        };
        let highest = self.snapshots.iter().filter_map(|snapshot| number(&snapshot.id)).max().unwrap_or_default();
        if let Some(id) = highest.checked_add(1) {
            return id.to_string();
        }
        let taken: BTreeSet<&str> = self.snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
        (1..=taken.len() + 1).map(|id| id.to_string()).find(|id| !taken.contains(id.as_str())).unwrap_or_default()
    }

    /// The bytes of a table of all entries.
    fn table(&self) -> Result<Vec<u8>> {
        let mut table = Vec::new();
        for entry in &self.bytes {
            table.resize(table.len().next_multiple_of(8), 0);
            table.extend(entry);
        }
        let (bytes, most) = (table.len() as u64, SNAPSHOT_TABLE_BYTES_MAX);
        if bytes > most {
            return Err(Error::TableTooLarge { what: "the snapshot table", bytes, most });
        }
        Ok(table)
    }
}

/// An entry for a snapshot without VM state.
fn new_entry(id: &str, name: &str, date: Duration, l1: Table, disk_size: u64) -> Result<Vec<u8>> {
    let most = u64::from(u16::MAX);
    let what = "bytes in the name of a snapshot";
    let name_size = u16::try_from(name.len()).map_err(|_| Error::TooMany { what, count: name.len() as u64, most })?;
    // no VM state, and no instructions that were counted
    let extra = [0, disk_size, u64::MAX];
    let raw = RawSnapshot {
        l1_table_offset: l1.offset.0.into(),
        l1_size: u32::try_from(l1.entries).unwrap_or(u32::MAX).into(),
        id_size: u16::try_from(id.len()).unwrap_or(u16::MAX).into(),
        name_size: name_size.into(),
        date_seconds: u32::try_from(date.as_secs()).unwrap_or(u32::MAX).into(),
        date_nanoseconds: date.subsec_nanos().into(),
        vm_clock_nanoseconds: 0.into(),
        vm_state_size: 0.into(),
        extra_data_size: 24.into(),
    };
    let extra = extra.iter().flat_map(|number| number.to_be_bytes());
    Ok(raw.as_bytes().iter().copied().chain(extra).chain(id.bytes()).chain(name.bytes()).collect())
}
