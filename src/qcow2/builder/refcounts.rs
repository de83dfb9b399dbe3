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

    /// One more reference to each cluster that these bytes touch.
    pub fn count(&mut self, host: HostOffset, length: u64) {
        let bits = self.layout.geometry().cluster_bits();
        let (first, last) = (host.0 >> bits, (host.0 + length - 1) >> bits);
        for cluster in first..=last {
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
        if place > 0 {
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
        if place + 2 == self.block.len() {
            write(self.layout.refcount_block(index), &self.block)?;
        }
        Ok(())
    }
}
