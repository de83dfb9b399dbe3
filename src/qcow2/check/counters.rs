//! References to host clusters, counted in a window of the file.

use std::ops::Range;

use memmap2::MmapMut;
use zerocopy::FromBytes;

use crate::qcow2::error::{Error, Result};
use crate::storage::to_usize;

/// The cluster holds metadata.
const METADATA: u32 = 1 << 31;
/// The cluster holds metadata and has a second owner.
const OVERLAP: u32 = 1 << 30;
/// The image says that the refcount is exactly one.
const STORED_ONE: u32 = 1 << 29;
/// References, up to this many.
pub(super) const COUNT_MAX: u32 = STORED_ONE - 1;

/// Who refers to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Guest data: any number of entries may.
    Data,
    /// An L2 table: any number of L1 tables may refer to it, but nothing else.
    L2Table,
    /// Anything else: once and for nothing else.
    Metadata,
}

/// Counters for the clusters of a window: an anonymous map, so that memory is paid for only where a cluster is used.
pub(super) struct Counters {
    window: Range<u64>,
    map: MmapMut,
    next: Option<u64>,
}

impl Counters {
    /// Zeroes.
    pub(super) fn new(window: Range<u64>) -> Result<Self> {
        let bytes = (window.end - window.start).max(1) * 4;
        let map = MmapMut::map_anon(to_usize(bytes)).map_err(|source| Error::Memory { bytes, source })?;
        Ok(Self { window, map, next: None })
    }

    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// The first cluster behind the window that was referred to.
    pub(super) fn next(&self) -> Option<u64> {
        self.next
    }

    /// Counts so many references to each of the clusters.
    pub(super) fn add(&mut self, clusters: Range<u64>, references: u32, owner: Owner) {
        if clusters.end > self.window.end {
            let behind = clusters.start.max(self.window.end);
            self.next = Some(self.next.map_or(behind, |next| next.min(behind)));
        }
        for counter in self.slice(clusters) {
            let count = (*counter & COUNT_MAX).saturating_add(references).min(COUNT_MAX);
            let mut flags = *counter & !COUNT_MAX;
            let used = *counter & COUNT_MAX != 0;
            if flags & METADATA != 0 || (used && owner != Owner::Data) || (owner == Owner::Metadata && references > 1) {
                flags |= OVERLAP;
            }
            if owner != Owner::Data {
                flags |= METADATA;
            }
            *counter = flags | count;
        }
    }

    /// Notes that the refcount is exactly one.
    pub(super) fn store_one(&mut self, cluster: u64) {
        if let Some(counter) = self.slice(cluster..cluster + 1).first_mut() {
            *counter |= STORED_ONE;
        }
    }

    /// Whether the refcount is exactly one; `None` outside of the window.
    pub(super) fn is_stored_one(&mut self, cluster: u64) -> Option<bool> {
        self.slice(cluster..cluster + 1).first().map(|counter| *counter & STORED_ONE != 0)
    }

    /// References to a cluster of the window, and whether it has owners that must not share.
    pub(super) fn get(&mut self, cluster: u64) -> (u32, bool) {
        let counter = self.slice(cluster..cluster + 1).first().copied().unwrap_or_default();
        (counter & COUNT_MAX, counter & OVERLAP != 0)
    }

    fn slice(&mut self, clusters: Range<u64>) -> &mut [u32] {
        let start = clusters.start.max(self.window.start);
        let end = clusters.end.min(self.window.end);
        let range = to_usize(start.saturating_sub(self.window.start))..to_usize(end.saturating_sub(self.window.start));
        // a map is aligned to a page
        let counters = <[u32]>::mut_from_bytes(&mut self.map).unwrap_or_default();
        counters.get_mut(range).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_inside_the_window_and_remembers_what_is_behind() {
        let mut counters = Counters::new(10..20).unwrap();
        counters.add(5..12, 1, Owner::Data);
        counters.add(11..12, 2, Owner::Data);
        counters.add(18..40, 1, Owner::Data);
        counters.add(30..31, 1, Owner::Data);
        counters.add(25..26, 1, Owner::Data);
        counters.add(2..3, 1, Owner::Data);
        let counts: Vec<u32> = (10..20).map(|cluster| counters.get(cluster).0).collect();
        assert_eq!(counts, [1, 3, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(counters.next(), Some(20));
        assert_eq!(counters.is_stored_one(20), None);
    }

    #[test]
    fn metadata_shares_with_nothing_and_an_l2_table_only_with_itself() {
        let overlaps = |first: (u32, Owner), second: Option<Owner>| {
            let mut counters = Counters::new(0..1).unwrap();
            counters.add(0..1, first.0, first.1);
            if let Some(owner) = second {
                counters.add(0..1, 1, owner);
            }
            counters.get(0).1
        };
        assert!(!overlaps((7, Owner::Data), Some(Owner::Data)));
        assert!(!overlaps((7, Owner::L2Table), None));
        assert!(!overlaps((1, Owner::Metadata), None));
        assert!(overlaps((2, Owner::Metadata), None));
        for owner in [Owner::L2Table, Owner::Metadata] {
            assert!(overlaps((1, Owner::Data), Some(owner)));
            assert!(overlaps((1, owner), Some(Owner::Data)));
            assert!(overlaps((1, owner), Some(Owner::L2Table)));
        }
    }

    #[test]
    fn counters_stop_before_they_run_over() {
        let mut counters = Counters::new(0..1).unwrap();
        counters.store_one(0);
        counters.add(0..1, u32::MAX, Owner::Data);
        counters.add(0..1, u32::MAX, Owner::Data);
        assert_eq!(counters.get(0), (COUNT_MAX, false));
        assert_eq!(counters.is_stored_one(0), Some(true));
    }
}
