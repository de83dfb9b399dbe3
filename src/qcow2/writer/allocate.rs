//! Places for guest data: clusters of the active disk's own, with what of the old content is not overwritten.

use std::ops::Range;

use super::Writer;
use super::refcounts;
use crate::qcow2::address::{GuestOffset, HostOffset};
use crate::qcow2::entry::L2Entry;
use crate::qcow2::error::{Allowed, Error, Result};
use crate::qcow2::geometry::SUBCLUSTERS;
use crate::qcow2::wire::FLAG_COPIED;
use crate::storage::{Storage, push_joined, to_usize};

/// Where bytes of the guest go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The bytes of the disk.
    pub guest: Range<u64>,
    /// Where its first byte goes; the others follow.
    pub host: HostOffset,
}

impl Writer {
    /// Makes room for guest data, which the caller writes to these places of the [storage](Writer::storage) before the next
    /// [flush](Writer::flush). Until then, readers of the image see what was there before; what the caller does
    /// not write is garbage after it.
    ///
    /// Places come in guest order. Where clusters are written in part, the rest keeps its content.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn allocate(&mut self, guest: Range<u64>, mut each: impl FnMut(Place)) -> Result<()> {
        self.end(GuestOffset(guest.start), guest.end.saturating_sub(guest.start))?;
        if guest.is_empty() {
            return Ok(());
        }
        self.refuse_backing(&guest)?;
        self.guarded(|writer| {
            writer.begin_change(guest.clone())?;
            let bits = writer.header().geometry.cluster_bits();
            let mut joined: Option<Place> = None;
            for (cluster, part) in writer.clusters(guest) {
                let host = HostOffset(writer.place(cluster, &part)?.0 + part.start);
                let guest = (cluster << bits) + part.start..(cluster << bits) + part.end;
                match &mut joined {
                    Some(last) if last.host.0 + (last.guest.end - last.guest.start) == host.0 => {
                        last.guest.end = guest.end;
                    }
                    last => last.replace(Place { guest, host }).into_iter().for_each(&mut each),
                }
            }
            joined.into_iter().for_each(&mut each);
            Ok(())
        })
    }

    /// Data must begin in the file, and not where tables are.
    pub(super) fn check_place(&self, entry: L2Entry) -> Result<(), Allowed> {
        let (first, end) = (self.header().geometry.cluster_size(), self.storage.length());
        let mut clusters = self.host_clusters(entry);
        if clusters.start == 0 && !clusters.is_empty() {
            return Err(Allowed::BehindHeader(first));
        }
        if clusters.any(|cluster| self.refcounts.is_metadata(cluster)) {
            return Err(Allowed::Otherwise("but a table lies there"));
        }
        let host = match entry {
            L2Entry::Data { host, .. } | L2Entry::Subclusters { host: Some(host), .. } => host,
            L2Entry::Compressed(data) => data.host,
            L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Subclusters { host: None, .. } => return Ok(()),
        };
        // what was taken since the last flush is behind it
        if host.0 >= end.max(self.refcounts.end()) { Err(Allowed::BeforeEnd(end)) } else { Ok(()) }
    }

    /// What is copied when clusters at the ends of a range are written in part must not be in a backing file.
    pub(super) fn refuse_backing(&mut self, guest: &Range<u64>) -> Result<()> {
        let Some(name) = self.header().backing.as_ref().map(|backing| backing.name.clone()) else { return Ok(()) };
        let unit = self.header().geometry.subcluster_size();
        let size = self.header().size;
        let (first, last) = (guest.start / unit * unit, guest.end.next_multiple_of(unit).min(size));
        for rest in [first..guest.start, guest.end..last] {
            for (cluster, part) in self.clusters(rest).filter(|(_, part)| !part.is_empty()) {
                let entry = self.entry(cluster)?;
                if self.shows_backing(entry, part.start) {
                    let guest = GuestOffset((cluster << self.header().geometry.cluster_bits()) + part.start);
                    return Err(Error::NeedsBacking { name, guest });
                }
            }
        }
        Ok(())
    }

    /// Whether a byte of a cluster is not in the image.
    pub(super) fn shows_backing(&self, entry: L2Entry, at: u64) -> bool {
        match entry {
            L2Entry::Unallocated => true,
            L2Entry::Subclusters { allocated, zero, .. } => {
                (allocated | zero) >> (at / self.header().geometry.subcluster_size()) & 1 == 0
            }
            L2Entry::Zero { .. } | L2Entry::Data { .. } | L2Entry::Compressed(_) => false,
        }
    }

    /// A cluster of the active disk's own for a guest cluster of which a part will be written.
    pub(super) fn place(&mut self, cluster: u64, part: &Range<u64>) -> Result<HostOffset> {
        let entry = self.entry(cluster)?;
        if self.header().geometry.extended_l2() {
            return self.place_subclusters(cluster, entry, part);
        }
        match entry {
            L2Entry::Data { host, copied: true } => Ok(host),
            L2Entry::Zero { host: Some(host), copied: true } => {
                self.fill(entry, cluster, part, host)?;
                self.set_entry(cluster, (host.0 | FLAG_COPIED, 0))?;
                Ok(host)
            }
            _ => {
                let host = self.take()?;
                self.fill(entry, cluster, part, host)?;
                self.set_entry(cluster, (host.0 | FLAG_COPIED, 0))?;
                self.release(entry);
                Ok(host)
            }
        }
    }

    /// Copies what lies around a part of a cluster.
    fn fill(&mut self, entry: L2Entry, cluster: u64, part: &Range<u64>, host: HostOffset) -> Result<()> {
        let end = self.header().geometry.cluster_size();
        self.copy(entry, cluster, 0..part.start, host)?;
        self.copy(entry, cluster, part.end..end, host)
    }

    /// Copies a part of a cluster to its new place; what is behind the end of the disk becomes zeroes.
    fn copy(&mut self, entry: L2Entry, cluster: u64, part: Range<u64>, host: HostOffset) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let mut bytes = vec![0; to_usize(part.end - part.start)];
        let start = cluster << self.header().geometry.cluster_bits();
        let end = self.header().size.saturating_sub(start).clamp(part.start, part.end);
        // behind the end of the disk there is nothing to read, not even in a backing file
        if part.start < end {
            let inside = bytes.get_mut(..to_usize(end - part.start)).unwrap_or_default();
            self.read_entry(entry, cluster, part.start..end, inside)?;
        }
        refcounts::write(&*self.storage, "guest data", host.0 + part.start, &bytes)
    }

    fn place_subclusters(&mut self, cluster: u64, entry: L2Entry, part: &Range<u64>) -> Result<HostOffset> {
        let size = self.header().geometry.subcluster_size();
        let (own, allocated, zero) = match entry {
            L2Entry::Unallocated => (None, 0, 0),
            L2Entry::Zero { host, copied } => (host.filter(|_| copied), 0, u32::MAX),
            L2Entry::Data { host, copied } => (Some(host).filter(|_| copied), u32::MAX, 0),
            L2Entry::Compressed(_) => (None, u32::MAX, 0),
            L2Entry::Subclusters { host, copied, allocated, zero } => (host.filter(|_| copied), allocated, zero),
        };
        let host = own.map_or_else(|| self.take(), Ok)?;
        let (mut touched, mut kept): (u32, Vec<Range<u64>>) = (0, Vec::new());
        for index in 0..u64::from(SUBCLUSTERS) {
            let (start, end) = (index * size, (index + 1) * size);
            let is_allocated = allocated >> index & 1 == 1;
            let is_touched = start < part.end && part.start < end;
            touched |= u32::from(is_touched) << index;
            // what is there stays there, what is not there and not touched is not copied
            if if is_allocated { own.is_none() } else { is_touched } {
                for piece in [start..part.start.clamp(start, end), part.end.clamp(start, end)..end] {
                    push_joined(&mut kept, piece);
                }
            }
        }
        for piece in kept {
            self.copy(entry, cluster, piece, host)?;
        }
        let (allocated, zero) = (allocated | touched, zero & !touched);
        let bitmap = u64::from(zero) << 32 | u64::from(allocated);
        self.set_entry(cluster, (host.0 | FLAG_COPIED, bitmap))?;
        if own.is_none() {
            self.release(entry);
        }
        Ok(host)
    }
}
