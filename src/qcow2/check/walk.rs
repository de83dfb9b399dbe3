//! Counts references: from the roots through L1 and L2 tables to data. Each table is read once, with a multiplicity.

use super::counters::{Counters, Owner};
use super::finding::Finding;
use super::report::ClusterCounts;
use super::roots::{Kind, Root, Roots};
use super::tables::Tables;
use super::{CheckLimits, Observe};
use crate::qcow2::address::HostOffset;
use crate::qcow2::bitmap::BitmapTableEntry;
use crate::qcow2::entry::{EntryRules, L1Entry};
use crate::qcow2::error::{Allowed, Invalid, Result};
use crate::qcow2::header::Header;
use crate::qcow2::l1::read_table;
use crate::qcow2::pieces::Pieces;
use crate::qcow2::wire::{FLAG_COPIED, OFFSET_MASK};
use crate::storage::Storage;

/// One pass over all tables.
pub(super) struct Walk<'a, 'c> {
    pub(super) storage: &'a dyn Storage,
    pub(super) header: &'a Header,
    pub(super) rules: EntryRules,
    pub(super) counters: &'a mut Counters<'c>,
    pub(super) clusters: &'a mut ClusterCounts,
    /// Hears what is wrong.
    pub(super) found: &'a mut dyn FnMut(Finding),
    /// The first pass: what has nothing to do with counters is reported and counted now.
    pub(super) first: bool,
    /// Says of a cluster whether its refcount is exactly one, where that is to be known.
    pub(super) is_one: &'a mut dyn FnMut(u64) -> Result<Option<bool>>,
}

impl Walk<'_, '_> {
    /// Counts all but the spans, and the refcount blocks, which are at these places.
    pub(super) fn run(
        &mut self,
        roots: &Roots,
        blocks: &[HostOffset],
        limits: CheckLimits,
        observe: &mut Observe<'_>,
    ) -> Result<()> {
        for block in blocks {
            self.claim(block.0, self.cluster_size(), 1, Owner::Metadata);
        }
        roots.tables.iter().filter(|root| root.kind == Kind::Bitmap).try_for_each(|root| self.bitmap(*root))?;
        let mut start = Some(0);
        while let Some(from) = start {
            let mut tables = Tables::new(from, limits.tables);
            for (number, root) in (0..).zip(&roots.tables).filter(|(_, root)| root.kind != Kind::Bitmap) {
                self.l1(*root, number, &mut tables, from == 0)?;
            }
            start = tables.next();
            let mut pieces = Pieces::default();
            for (cluster, noted) in tables.into_sorted() {
                observe.tell(cluster * self.cluster_size())?;
                self.l2(cluster, noted, &mut pieces)?;
            }
        }
        Ok(())
    }

    pub(super) fn cluster_size(&self) -> u64 {
        self.rules.geometry.cluster_size()
    }

    /// Adds a finding in the first pass.
    pub(super) fn find(&mut self, finding: impl Into<Finding>) {
        if self.first {
            (self.found)(finding.into());
        }
    }

    /// Counts references to all clusters that the bytes touch.
    pub(super) fn claim(&mut self, offset: u64, length: u64, references: u32, owner: Owner) {
        let bits = self.rules.geometry.cluster_bits();
        let end = (offset + length).div_ceil(self.cluster_size());
        self.counters.add(offset >> bits..end, references, owner);
    }

    /// As [`Walk::claim`], where the bytes start in the file and end less than a cluster behind it: as in QEMU, the
    /// last cluster of a file may be cut.
    pub(super) fn claim_inside(
        &mut self,
        what: &'static str,
        offset: u64,
        length: u64,
        references: u32,
        owner: Owner,
    ) -> bool {
        let file_length = self.storage.length();
        let last = file_length.saturating_add(self.cluster_size());
        let inside = offset < file_length && offset + length < last;
        if inside {
            self.claim(offset, length, references, owner);
        } else {
            self.find(Finding::BeyondEnd { what, offset: HostOffset(offset), length, file_length });
        }
        inside
    }

    fn bitmap(&mut self, root: Root) -> Result<()> {
        read_table(self.storage, root.table, root.kind.name(), |index, value| {
            let entry = HostOffset(root.table.offset.0 + index * 8);
            let allowed = match BitmapTableEntry::decode(value, self.rules.geometry) {
                Ok(BitmapTableEntry::At(bits)) => {
                    self.claim_inside("bitmap data", bits.0, self.cluster_size(), root.references, Owner::Metadata);
                    return Ok(());
                }
                Ok(BitmapTableEntry::Zeroes | BitmapTableEntry::Ones) => return Ok(()),
                Err(allowed) => allowed,
            };
            self.find(Invalid { field: "bitmap table entry", offset: entry, value, allowed });
            Ok(())
        })
    }

    /// Notes the L2 tables of an L1 table and, in the first of several scans, checks its entries.
    fn l1(&mut self, root: Root, number: u32, tables: &mut Tables, first_scan: bool) -> Result<()> {
        let active = root.kind == Kind::ActiveL1;
        read_table(self.storage, root.table, root.kind.name(), |index, value| {
            let entry = HostOffset(root.table.offset.0 + index * 8);
            let table = value & OFFSET_MASK;
            let usable = if first_scan { self.l1_entry(root, entry, value)? } else { self.holds_table(table) };
            if usable {
                let index = u32::try_from(index).ok().filter(|_| active);
                let cluster = table >> self.rules.geometry.cluster_bits();
                tables.note(cluster, number, entry, root.references, index);
            }
            Ok(())
        })
    }

    fn holds_table(&self, table: u64) -> bool {
        table != 0 && table % self.cluster_size() == 0 && table < self.storage.length()
    }

    /// Checks an entry; true where it leads to a table that can be walked.
    fn l1_entry(&mut self, root: Root, entry: HostOffset, value: u64) -> Result<bool> {
        let (table, cluster_size) = (value & OFFSET_MASK, self.cluster_size());
        let because = Allowed::Because("which has flags but no offset");
        match L1Entry::decode(value, self.rules.geometry) {
            Ok(Some(_)) => {}
            Ok(None) => self.find(Invalid { field: "L1 entry", offset: entry, value, allowed: because }),
            Err(allowed) => self.find(Invalid { field: "L1 entry", offset: entry, value, allowed }),
        }
        if !self.holds_table(table) {
            if table != 0 {
                self.claim_inside("an L2 table", table, cluster_size, root.references, Owner::L2Table);
            }
            return Ok(false);
        }
        let file_length = self.storage.length();
        if table + cluster_size > file_length {
            let offset = HostOffset(table);
            self.find(Finding::BeyondEnd { what: "an L2 table", offset, length: cluster_size, file_length });
        }
        if root.kind == Kind::ActiveL1 {
            self.copied("L1", entry, table, value & FLAG_COPIED != 0)?;
        }
        Ok(true)
    }

    /// In the active tables, COPIED says that the refcount is exactly one.
    pub(super) fn copied(&mut self, table: &'static str, entry: HostOffset, offset: u64, copied: bool) -> Result<()> {
        let cluster = offset >> self.rules.geometry.cluster_bits();
        if (self.is_one)(cluster)?.is_some_and(|one| one != copied) {
            let cluster = HostOffset(cluster * self.cluster_size());
            (self.found)(Finding::Copied { table, entry, cluster, copied });
        }
        Ok(())
    }
}
