//! Everything that the header leads to, but for refcounts: where the walk starts.

use std::ops::Range;

use super::finding::Finding;
use super::report::Report;
use super::stored::inside;
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::{Allowed, Error, Invalid, Result};
use crate::qcow2::features::Features;
use crate::qcow2::header::{Header, Table};
use crate::qcow2::{bitmap, snapshot};
use crate::storage::Storage;

pub(super) const REFCOUNT_TABLE: &str = "the refcount table";

/// What is in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// L2 tables of the active disk.
    ActiveL1,
    /// L2 tables of snapshots.
    SnapshotL1,
    /// Bits.
    Bitmap,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ActiveL1 => "the active L1 table",
            Self::SnapshotL1 => "the L1 table of a snapshot",
            Self::Bitmap => "a bitmap table",
        }
    }

    fn is_l1(self) -> bool {
        self != Self::Bitmap
    }
}

/// A table, and how many times the image refers to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) kind: Kind,
    pub(super) table: Table,
    pub(super) references: u32,
}

impl Root {
    /// The bytes of the table.
    pub(super) fn range(self) -> Range<u64> {
        range(self.table)
    }
}

/// Where the walk starts. The tables do not overlap, so that the work is bounded by the length of the file, however
/// many snapshots and bitmaps the image claims to have.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Roots {
    /// Bytes with metadata that points nowhere else.
    pub(super) metadata: Vec<Range<u64>>,
    /// L1 tables and bitmap tables; the active L1 table first.
    pub(super) tables: Vec<Root>,
    /// Some could not be read: it is not known what they lead to.
    lost: bool,
}

impl Roots {
    /// Reads the snapshot table and the bitmap directory, and reports what is wrong with them.
    pub(in crate::qcow2) fn read(storage: &dyn Storage, header: &Header, report: &mut Report) -> Result<Self> {
        let mut roots = Self::default();
        roots.metadata.push(0..header.geometry.cluster_size());
        let autoclear = header.features.autoclear;
        if autoclear & Features::DATA_FILE_RAW != 0 && !header.has_data_file() {
            let allowed = Allowed::Because("but bit 1 is for images with an external data file");
            report.add(Invalid { field: "autoclear_features", offset: HostOffset(88), value: autoclear, allowed });
        }
        header.extensions.refused.iter().for_each(|invalid| report.add(Finding::Unopenable(invalid.clone())));
        let table = within(storage, header.refcount_table, REFCOUNT_TABLE, report);
        roots.metadata.push(range(table));
        let mut claimed = Vec::new();
        let mut claim = |kind: Kind, table, report: &mut Report| {
            let table = within(storage, table, kind.name(), report);
            if table.entries > 0 {
                claimed.push(Root { kind, table, references: 1 });
            }
        };
        claim(Kind::ActiveL1, header.l1_table, report);
        let snapshots = snapshots(storage, header, &mut roots.metadata, report, &mut claim)?;
        let bitmaps = bitmaps(storage, header, &mut roots.metadata, report, &mut claim)?;
        let before = report.structure_errors;
        roots.tables = distinct(claimed, report);
        roots.lost = !snapshots || !bitmaps || report.structure_errors > before;
        Ok(roots)
    }

    /// Whether it is not known what all of them lead to.
    pub(in crate::qcow2) fn is_lost(&self) -> bool {
        self.lost
    }
}

type Claim<'a> = dyn FnMut(Kind, Table, &mut Report) + 'a;

/// False where something could not be read.
fn snapshots(
    storage: &dyn Storage,
    header: &Header,
    metadata: &mut Vec<Range<u64>>,
    report: &mut Report,
    claim: &mut Claim<'_>,
) -> Result<bool> {
    if header.nb_snapshots > 0 && header.has_data_file() {
        report.add(Finding::SnapshotsWithDataFile);
    }
    let mut all = true;
    let length = snapshot::read(storage, header, |entry| {
        entry.check_extra(header).unwrap_or_else(|invalid| report.add(invalid));
        match entry.check_l1(header) {
            Ok(()) => claim(Kind::SnapshotL1, entry.snapshot.l1, report),
            Err(invalid) => {
                all = false;
                report.add(invalid);
            }
        }
        Ok(())
    });
    let length = reported(length, report)?;
    metadata.extend(length.map(|length| header.snapshots_offset.0..header.snapshots_offset.0 + length));
    Ok(all && length.is_some())
}

/// False where something could not be read.
fn bitmaps(
    storage: &dyn Storage,
    header: &Header,
    metadata: &mut Vec<Range<u64>>,
    report: &mut Report,
    claim: &mut Claim<'_>,
) -> Result<bool> {
    let Some(extension) = bitmap::consistent(header) else { return Ok(true) };
    let mut all = true;
    let read = bitmap::read(storage, header, extension, |entry| {
        match entry.bitmap {
            Ok(bitmap) => {
                entry.refused.into_iter().for_each(|invalid| report.add(Finding::Unopenable(invalid)));
                claim(Kind::Bitmap, bitmap.table, report);
            }
            Err(invalid) => {
                all = false;
                report.add(invalid);
            }
        }
        Ok(())
    });
    let read = reported(read, report)?;
    let start = extension.directory_offset.0;
    metadata.extend(read.map(|()| start..start + extension.directory_size));
    Ok(all && read.is_some())
}

/// Damage becomes a finding; what the system says stays an error.
fn reported<T>(result: Result<T>, report: &mut Report) -> Result<Option<T>> {
    match result {
        Ok(value) => return Ok(Some(value)),
        Err(Error::Invalid(invalid)) => report.add(invalid),
        Err(Error::Truncated { what, offset, length, file_length }) => {
            report.add(Finding::BeyondEnd { what, offset, length, file_length });
        }
        Err(other) => return Err(other),
    }
    Ok(None)
}

/// The part of a table that the file has; the rest is reported.
fn within(storage: &dyn Storage, table: Table, what: &'static str, report: &mut Report) -> Table {
    let part = inside(storage, table);
    if part != table {
        let (offset, length, file_length) = (table.offset, table.bytes(), storage.length());
        report.add(Finding::BeyondEnd { what, offset, length, file_length });
    }
    part
}

fn range(table: Table) -> Range<u64> {
    table.offset.0..table.offset.0 + table.bytes()
}

/// Tables that lie in the same place become one with a multiplicity; those that overlap in part are reported and
/// dropped, but never the active L1 table.
fn distinct(mut claimed: Vec<Root>, report: &mut Report) -> Vec<Root> {
    let active = claimed.first().copied().filter(|root| root.kind == Kind::ActiveL1);
    claimed.sort_unstable_by_key(|root| (root.table.offset, root.table.entries, root.kind));
    let mut tables: Vec<Root> = active.map(|root| Root { references: 0, ..root }).into_iter().collect();
    let mut end = HostOffset(0);
    for root in claimed {
        let same = |other: &&mut Root| other.table == root.table && other.kind.is_l1() == root.kind.is_l1();
        let twin = if active.is_some_and(|active| active.table == root.table) {
            tables.first_mut()
        } else {
            tables.last_mut()
        };
        if let Some(twin) = twin.filter(same) {
            twin.references = twin.references.saturating_add(1);
            continue;
        }
        let (place, what) = (range(root.table), root.kind.name());
        let hits_active = active
            .map(|root| range(root.table))
            .is_some_and(|active| place.start < active.end && active.start < place.end);
        if hits_active || place.start < end.0 {
            report.add(Finding::OverlappingTable { what, offset: root.table.offset, length: root.table.bytes() });
            continue;
        }
        end = HostOffset(place.end);
        tables.push(root);
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(kind: Kind, offset: u64, entries: u64) -> Root {
        Root { kind, table: Table { offset: HostOffset(offset), entries }, references: 1 }
    }

    #[test]
    fn tables_in_one_place_are_walked_once() {
        let mut report = Report::default();
        let mut claimed = vec![root(Kind::ActiveL1, 512, 4)];
        claimed.extend((0..1000).map(|_| root(Kind::SnapshotL1, 1024, 4)));
        claimed.extend((0..3).map(|_| root(Kind::SnapshotL1, 512, 4)));
        let tables = distinct(claimed, &mut report);
        let references: Vec<_> = tables.iter().map(|root| (root.kind, root.references)).collect();
        assert_eq!(references, [(Kind::ActiveL1, 4), (Kind::SnapshotL1, 1000)]);
        assert_eq!(report.findings, []);
    }

    #[test]
    fn tables_that_overlap_in_part_are_reported_and_the_active_one_stays() {
        let mut report = Report::default();
        let claimed = vec![
            root(Kind::ActiveL1, 4096, 128),
            root(Kind::SnapshotL1, 3584, 128),
            root(Kind::SnapshotL1, 4096, 64),
            root(Kind::Bitmap, 4096, 128),
            root(Kind::SnapshotL1, 8192, 128),
            root(Kind::Bitmap, 8704, 1),
        ];
        let tables = distinct(claimed, &mut report);
        assert_eq!(tables, [root(Kind::ActiveL1, 4096, 128), root(Kind::SnapshotL1, 8192, 128)]);
        assert_eq!(report.structure_errors, 4);
    }
}
