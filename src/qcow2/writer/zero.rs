//! Zeroes and clusters that are given back.

use std::ops::Range;

use super::Writer;
use crate::qcow2::address::GuestOffset;
use crate::qcow2::entry::L2Entry;
use crate::qcow2::error::Result;
use crate::qcow2::wire::{FLAG_COPIED, FLAG_ZERO};
use crate::storage::to_usize;

impl Writer {
    /// Makes a guest range read as zeroes. Whole clusters become zero clusters, also where the image has no
    /// backing file; in version 2, which has none, they are written.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write_zeroes(&mut self, guest: Range<u64>) -> Result<()> {
        self.end(GuestOffset(guest.start), guest.end.saturating_sub(guest.start))?;
        if !guest.is_empty() {
            self.refuse_backing(&guest)?;
        }
        for (cluster, part) in self.clusters(guest) {
            self.relieve()?;
            let entry = self.entry(cluster)?;
            if self.header().version > 2 && self.is_whole(cluster, &part) {
                self.guarded(|writer| writer.zero_cluster(cluster, entry))?;
            } else if self.header().geometry.extended_l2() {
                self.zero_subclusters(cluster, entry, part)?;
            } else {
                self.zero_bytes(cluster, entry, part)?;
            }
        }
        Ok(())
    }

    /// Gives the clusters of a guest range back, those that are whole in it. They read as zeroes then; in version 2
    /// nothing is given back where there is a backing file, since its bytes would show.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn discard(&mut self, guest: Range<u64>) -> Result<()> {
        self.end(GuestOffset(guest.start), guest.end.saturating_sub(guest.start))?;
        let has_backing = self.header().backing.is_some();
        if has_backing && self.header().version == 2 {
            return Ok(());
        }
        let mut clusters = self.clusters(guest.clone());
        while let Some((cluster, part)) = clusters.next() {
            if !has_backing && !self.tables.has_table(cluster) {
                // on to the next table
                let geometry = self.header().geometry;
                let next = (cluster / geometry.l2_entries() + 1) * geometry.l2_entries();
                clusters = self.clusters((next << geometry.cluster_bits()).min(guest.end)..guest.end);
                continue;
            }
            if !self.is_whole(cluster, &part) {
                continue;
            }
            self.relieve()?;
            let entry = self.entry(cluster)?;
            self.guarded(|writer| match entry {
                _ if has_backing => writer.zero_cluster(cluster, entry),
                L2Entry::Unallocated => Ok(()),
                _ => writer.replace(cluster, entry, (0, 0)),
            })?;
        }
        Ok(())
    }

    /// Whether a part is all that the disk has of a cluster.
    pub(super) fn is_whole(&self, cluster: u64, part: &Range<u64>) -> bool {
        let geometry = self.header().geometry;
        let rest = self.header().size.saturating_sub(cluster << geometry.cluster_bits());
        part.start == 0 && part.end >= geometry.cluster_size().min(rest)
    }

    fn zero_cluster(&mut self, cluster: u64, entry: L2Entry) -> Result<()> {
        if matches!(entry, L2Entry::Zero { .. }) { Ok(()) } else { self.replace(cluster, entry, self.zero_entry()) }
    }

    /// What makes a cluster of version 3 read as zeroes.
    pub(super) fn zero_entry(&self) -> (u64, u64) {
        if self.header().geometry.extended_l2() { (0, u64::from(u32::MAX) << 32) } else { (FLAG_ZERO, 0) }
    }

    /// What the disk has of a cluster.
    fn bytes_of(&self, cluster: u64) -> Range<u64> {
        let geometry = self.header().geometry;
        let start = cluster << geometry.cluster_bits();
        start..(start + geometry.cluster_size()).min(self.header().size)
    }

    fn replace(&mut self, cluster: u64, old: L2Entry, new: (u64, u64)) -> Result<()> {
        self.begin_change(self.bytes_of(cluster))?;
        self.set_entry(cluster, new)?;
        self.release(old);
        Ok(())
    }

    /// Writes zeroes where it does not read as zeroes already.
    fn zero_bytes(&mut self, cluster: u64, entry: L2Entry, part: Range<u64>) -> Result<()> {
        let reads_zero = match entry {
            L2Entry::Zero { .. } => true,
            L2Entry::Unallocated => self.header().backing.is_none(),
            _ => false,
        };
        if reads_zero || part.is_empty() {
            return Ok(());
        }
        let start = cluster << self.header().geometry.cluster_bits();
        let zeroes = vec![0; to_usize(part.end - part.start)];
        self.write(&zeroes, GuestOffset(start + part.start))
    }

    /// Marks subclusters that are whole, and writes zeroes to those that are not.
    fn zero_subclusters(&mut self, cluster: u64, entry: L2Entry, part: Range<u64>) -> Result<()> {
        let (host, copied, allocated, zero) = match entry {
            L2Entry::Zero { .. } => return Ok(()),
            L2Entry::Compressed(_) => return self.zero_bytes(cluster, entry, part),
            L2Entry::Unallocated => (None, false, 0, 0),
            L2Entry::Data { host, copied } => (Some(host), copied, u32::MAX, 0),
            L2Entry::Subclusters { host, copied, allocated, zero } => (host, copied, allocated, zero),
        };
        let size = self.header().geometry.subcluster_size();
        let start = cluster << self.header().geometry.cluster_bits();
        let (first, last) = (part.start.next_multiple_of(size), part.end / size * size);
        let last = if start + part.end == self.header().size { part.end.next_multiple_of(size) } else { last };
        let whole = first.min(last)..last;
        let mask = (whole.start / size..whole.end / size).fold(0_u32, |mask, index| mask | 1 << index);
        if mask != 0 {
            let (allocated, zero) = (allocated & !mask, zero | mask);
            let kept = host.filter(|_| allocated != 0);
            let value = kept.map_or(0, |host| host.0 | if copied { FLAG_COPIED } else { 0 });
            let new = (value, u64::from(zero) << 32 | u64::from(allocated));
            self.guarded(|writer| {
                writer.begin_change(start + part.start..start + part.end)?;
                writer.set_entry(cluster, new)?;
                if kept.is_none() {
                    writer.release(entry);
                }
                Ok(())
            })?;
        }
        let edges =
            if mask == 0 { [part.clone(), 0..0] } else { [part.start..whole.start, whole.end.min(part.end)..part.end] };
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            self.zero_edge(cluster, edge)?;
        }
        Ok(())
    }

    /// Writes zeroes to a part of a subcluster, or of two neighbours.
    fn zero_edge(&mut self, cluster: u64, part: Range<u64>) -> Result<()> {
        let size = self.header().geometry.subcluster_size();
        let mut start = part.start;
        while start < part.end {
            let end = part.end.min((start / size + 1) * size);
            let entry = self.entry(cluster)?;
            let reads_zero = match entry {
                L2Entry::Subclusters { allocated, zero, .. } => {
                    let bit = |bits: u32| bits >> (start / size) & 1 == 1;
                    bit(zero) || (!bit(allocated) && self.header().backing.is_none())
                }
                _ => false,
            };
            if !reads_zero {
                self.zero_bytes(cluster, entry, start..end)?;
            }
            start = end;
        }
        Ok(())
    }
}
