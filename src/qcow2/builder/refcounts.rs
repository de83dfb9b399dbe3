//! Refcounts of a new image, made from front to back in the order of the clusters.

use std::collections::VecDeque;

use byteorder::{BigEndian, ByteOrder};

use super::layout::Layout;
use crate::qcow2::address::HostOffset;
use crate::storage::to_usize;

/// Turns counts into the bytes of refcount blocks, one block in memory at a time.
///
/// Clusters are final in order, but for those that the caller still [holds open](RefcountWriter::settle).
#[derive(Debug)]
pub struct RefcountWriter<'a> {
    layout: &'a Layout,
    /// The counts of the clusters from `settled` on.
    open: VecDeque<u16>,
    settled: u64,
    block: Vec<u8>,
}

impl<'a> RefcountWriter<'a> {
    /// Starts with the metadata in front of the data: each of its clusters is used once.
    ///
    /// # Errors
    /// What `write` says.
    pub fn new<E>(layout: &'a Layout, write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>) -> Result<Self, E> {
        let block = vec![0; to_usize(layout.geometry().cluster_size())];
        let mut writer = Self { layout, open: VecDeque::new(), settled: 0, block };
        let front = layout.data_cluster(0).0 / layout.geometry().cluster_size();
        writer.repeat(front, 1, write)?;
        Ok(writer)
    }

    /// Counts the next clusters once each, when none is open.
    ///
    /// # Errors
    /// What `write` says.
    pub fn repeat<E>(
        &mut self,
        clusters: u64,
        count: u16,
        mut write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for _ in 0..clusters {
            self.emit(count, &mut write)?;
        }
        Ok(())
    }

    /// One more reference to each cluster that these bytes touch, as far as the layout has it and it is not final yet.
    pub fn count(&mut self, host: HostOffset, length: u64) {
        let bits = self.layout.geometry().cluster_bits();
        if length == 0 {
            return;
        }
        let end =
            host.0.saturating_add(length).min(self.layout.length()).div_ceil(self.layout.geometry().cluster_size());
        for cluster in (host.0 >> bits).max(self.settled)..end {
            let place = to_usize(cluster - self.settled);
            if self.open.len() <= place {
                self.open.resize(place + 1, 0);
            }
            if let Some(count) = self.open.get_mut(place) {
                *count = count.saturating_add(1);
            }
        }
    }

    /// Whether this cluster can have no more references.
    #[must_use]
    pub fn is_full(&self, cluster: u64) -> bool {
        let place = cluster.checked_sub(self.settled).map(to_usize);
        place.and_then(|place| self.open.get(place)).is_some_and(|count| *count == u16::MAX)
    }

    /// Clusters before this one get no further references.
    ///
    /// # Errors
    /// What `write` says.
    pub fn settle<E>(
        &mut self,
        cluster: u64,
        mut write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.settled < cluster {
            let Some(count) = self.open.pop_front() else { break };
            self.emit(count, &mut write)?;
        }
        Ok(())
    }

    /// Writes the last block and the refcount table.
    ///
    /// # Errors
    /// What `write` says.
    pub fn finish<E>(mut self, mut write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>) -> Result<(), E> {
        self.settle(u64::MAX, &mut write)?;
        let (index, place) = self.place();
        if place > 0 && index < self.layout.refcount_blocks() {
            self.block.get_mut(place..).unwrap_or_default().fill(0);
            write(self.layout.refcount_block(index), &self.block)?;
        }
        let mut table = vec![0; to_usize(self.layout.refcount_blocks() * 8)];
        for (index, entry) in (0..).zip(table.chunks_exact_mut(8)) {
            BigEndian::write_u64(entry, self.layout.refcount_block(index).0);
        }
        write(self.layout.refcount_table(), &table)
    }

    /// The block and the byte in it where the next count goes.
    fn place(&self) -> (u64, usize) {
        let bytes = self.settled * Layout::REFCOUNT_BYTES;
        (bytes / self.block.len() as u64, to_usize(bytes % self.block.len() as u64))
    }

    fn emit<E>(&mut self, count: u16, mut write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let (index, place) = self.place();
        if let Some(bytes) = self.block.get_mut(place..place + 2) {
            BigEndian::write_u16(bytes, count);
        }
        self.settled += 1;
        if place + 2 == self.block.len() && index < self.layout.refcount_blocks() {
            write(self.layout.refcount_block(index), &self.block)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::{CompressionType, Geometry};

    #[test]
    fn what_the_layout_has_no_place_for_is_not_counted() {
        let geometry = Geometry::new(9, false).unwrap();
        let layout = Layout::new(geometry, 1 << 20, CompressionType::Deflate, 1, 10).unwrap();
        let mut file = vec![0; to_usize(layout.length())];
        let mut put = |host: HostOffset, bytes: &[u8]| {
            file.get_mut(to_usize(host.0)..to_usize(host.0) + bytes.len()).ok_or(())?.copy_from_slice(bytes);
            Ok::<_, ()>(())
        };
        let mut refcounts = RefcountWriter::new(&layout, &mut put).unwrap();
        let data = layout.data_cluster(0);
        for (host, length) in
            [(data, 0), (HostOffset(data.0 + 7), 0), (data, u64::MAX), (HostOffset(0), 513), (HostOffset(u64::MAX), 1)]
        {
            refcounts.count(host, length);
        }
        refcounts.repeat(1000, 1, &mut put).unwrap();
        refcounts.finish(&mut put).unwrap();
        assert!(file[to_usize(layout.l1_entry(0).0)..].iter().all(|byte| *byte == 0));
    }
}
