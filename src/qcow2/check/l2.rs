//! The part of the walk that reads L2 tables.

use byteorder::{BigEndian, ByteOrder};

use super::counters::Owner;
use super::finding::Finding;
use super::tables::Noted;
use super::walk::Walk;
use crate::qcow2::address::HostOffset;
use crate::qcow2::entry::{CompressedCluster, L2Entry, SECTOR};
use crate::qcow2::error::{Allowed, Invalid, Result};
use crate::qcow2::pieces::Pieces;
use crate::qcow2::wire::{FLAG_COMPRESSED, FLAG_COPIED, OFFSET_MASK};
use crate::storage::to_usize;

/// An L2 entry, where it is and what refers to its table.
#[derive(Clone, Copy)]
struct Place {
    entry: HostOffset,
    value: u64,
    references: u32,
    /// The active L1 table leads here.
    active: bool,
    /// The guest cluster, where the entry is one of the active disk.
    guest: Option<u64>,
}

impl Walk<'_, '_> {
    /// Counts what an L2 table refers to, and the table itself.
    pub(super) fn l2(&mut self, cluster: u64, noted: Noted, pieces: &mut Pieces) -> Result<()> {
        let geometry = self.rules.geometry;
        let table = cluster * self.cluster_size();
        self.claim(table, self.cluster_size(), noted.references, Owner::L2Table);
        if let Some(entry) = noted.shared {
            self.find(Finding::SharedL2Table { table: HostOffset(table), entry });
        }
        let first = noted.active.and_then(|index| u64::from(index).checked_mul(geometry.l2_coverage()));
        let mut follows = 0;
        let storage = self.storage;
        pieces.read(storage, table..table + self.cluster_size(), "an L2 table", |start, bytes| {
            let start = (start - table) / geometry.l2_entry_size();
            for (index, bytes) in (start..).zip(bytes.chunks_exact(to_usize(geometry.l2_entry_size()))) {
                let (value, bitmap) = bytes.split_at(8);
                let bitmap = bitmap.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
                let value = BigEndian::read_u64(value);
                if value == 0 && bitmap == 0 {
                    continue;
                }
                let guest = first.and_then(|first| first.checked_add(index << geometry.cluster_bits()));
                let place = Place {
                    entry: HostOffset(table + index * geometry.l2_entry_size()),
                    value,
                    references: noted.references,
                    active: noted.active.is_some(),
                    guest: guest.filter(|guest| *guest < self.header.size),
                };
                self.entry(place, bitmap)?;
                if self.first && place.active {
                    self.tally(value, &mut follows);
                }
            }
            Ok(())
        })
    }

    fn entry(&mut self, place: Place, bitmap: u64) -> Result<()> {
        match L2Entry::decode(place.value, bitmap, self.rules) {
            Ok(L2Entry::Unallocated) => Ok(()),
            Ok(L2Entry::Zero { host, copied }) => self.data(place, host, copied, 0),
            Ok(L2Entry::Data { host, copied }) => self.data(place, Some(host), copied, self.cluster_size()),
            Ok(L2Entry::Subclusters { host, copied, allocated, .. }) => {
                let used = u64::from(u32::BITS - allocated.leading_zeros());
                self.data(place, host, copied, used * self.rules.geometry.subcluster_size())
            }
            Ok(L2Entry::Compressed(data)) => {
                self.compressed(place, data);
                Ok(())
            }
            Err(allowed) => {
                self.invalid(place, allowed);
                self.claim_invalid(place, bitmap)
            }
        }
    }

    fn invalid(&mut self, place: Place, allowed: Allowed) {
        self.find(Invalid { field: "L2 entry", offset: place.entry, value: place.value, allowed });
    }

    /// `used`: bytes of the cluster that hold data.
    fn data(&mut self, place: Place, host: Option<HostOffset>, copied: bool, used: u64) -> Result<()> {
        let Some(HostOffset(host)) = host else { return Ok(()) };
        if self.rules.data_file {
            self.external(place, host, copied);
            return Ok(());
        }
        // the last cluster of the disk need not be whole, and nothing is known of VM state and snapshots
        let used = used.min(place.guest.map_or(1, |guest| self.header.size - guest));
        let file_length = self.storage.length();
        if !self.claim_inside("a data cluster", host, self.cluster_size(), place.references, Owner::Data) {
            return Ok(());
        }
        if host + used > file_length {
            let offset = HostOffset(host);
            self.find(Finding::BeyondEnd { what: "a data cluster", offset, length: used, file_length });
        }
        if place.active { self.copied("L2", place.entry, host, copied) } else { Ok(()) }
    }

    /// Clusters of an external data file have no refcounts, and guest and host offsets are the same.
    fn external(&mut self, place: Place, host: u64, copied: bool) {
        if place.active && !copied {
            let (entry, cluster) = (place.entry, HostOffset(host));
            self.find(Finding::Copied { table: "L2", entry, cluster, copied });
        }
        if let Some(guest) = place.guest.filter(|guest| *guest != host) {
            self.invalid(place, Allowed::Exactly(guest | FLAG_COPIED));
        }
    }

    fn compressed(&mut self, place: Place, data: CompressedCluster) {
        const WHAT: &str = "a compressed cluster";
        let (offset, length, file_length) = (data.host, data.length, self.storage.length());
        let inside = self.claim_inside(WHAT, offset.0, length, place.references, Owner::Data);
        // a stream has bytes in its last sector
        if inside && offset.0 + length > file_length.next_multiple_of(SECTOR) {
            self.find(Finding::BeyondEnd { what: WHAT, offset, length, file_length });
        }
    }

    /// As QEMU, counts what an entry with wrong bits most probably means, so that one wrong bit does not make leaks.
    fn claim_invalid(&mut self, place: Place, bitmap: u64) -> Result<()> {
        if self.rules.data_file {
            return Ok(());
        }
        let offset = place.value & OFFSET_MASK;
        if place.value & FLAG_COMPRESSED != 0 {
            if let Ok(L2Entry::Compressed(data)) = L2Entry::decode(place.value & !FLAG_COPIED, bitmap, self.rules) {
                self.compressed(place, data);
            }
        } else if offset != 0 && (bitmap >> 32) & bitmap == 0 {
            let length = self.cluster_size();
            let inside = self.claim_inside("a data cluster", offset, length, place.references, Owner::Data);
            if inside && place.active {
                return self.copied("L2", place.entry, offset, place.value & FLAG_COPIED != 0);
            }
        }
        Ok(())
    }

    fn tally(&mut self, value: u64, follows: &mut u64) {
        let clusters = &mut *self.clusters;
        let host = value & OFFSET_MASK;
        if value & FLAG_COMPRESSED != 0 {
            clusters.allocated += 1;
            clusters.compressed += 1;
            clusters.fragmented += 1;
        } else if host != 0 || (self.rules.data_file && value & FLAG_COPIED != 0) {
            clusters.allocated += 1;
            clusters.fragmented += u64::from(*follows != 0 && *follows != host);
            *follows = host + self.rules.geometry.cluster_size();
        }
    }
}
