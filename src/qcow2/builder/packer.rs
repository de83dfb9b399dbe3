//! Places for clusters whose length is known only when they are written: compressed ones lie byte by byte behind
//! each other, plain ones on cluster boundaries, all in the order in which they come.

use std::ops::Range;

use super::layout::Layout;
use super::refcounts::RefcountWriter;
use crate::qcow2::address::HostOffset;

/// Gives out places and counts references. No more is asked for than the layout has room for.
#[derive(Debug)]
pub(crate) struct Packer<'a> {
    refcounts: RefcountWriter<'a>,
    cluster_size: u64,
    /// The first cluster that nobody uses.
    free: u64,
    /// What is left of the last cluster with compressed data.
    open: Range<u64>,
}

impl<'a> Packer<'a> {
    /// Clusters that the half-filled one may lag behind; memory is two bytes for each.
    const LAG_MAX: u64 = 1 << 16;

    /// Packs behind the metadata of a layout.
    ///
    /// # Errors
    /// What `write` says.
    pub(crate) fn new<E>(layout: &'a Layout, write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>) -> Result<Self, E> {
        let refcounts = RefcountWriter::new(layout, write)?;
        let free = layout.data_cluster(0).0;
        Ok(Self { refcounts, cluster_size: layout.geometry().cluster_size(), free, open: free..free })
    }

    /// A place for a plain cluster.
    pub(crate) fn plain(&mut self) -> HostOffset {
        let host = HostOffset(self.free);
        self.free += self.cluster_size;
        self.refcounts.count(host, self.cluster_size);
        host
    }

    /// A place for the `length` bytes of a compressed cluster.
    pub(crate) fn compressed(&mut self, length: u64) -> HostOffset {
        let full = self.refcounts.is_full(self.open.start / self.cluster_size);
        let fits = self.open.end - self.open.start >= length || self.open.end == self.free;
        if full || !fits {
            self.open = self.free..self.free;
        }
        let host = self.open.start;
        let end = host + length;
        self.free = self.free.max(end.next_multiple_of(self.cluster_size));
        self.open = end..end.next_multiple_of(self.cluster_size);
        self.refcounts.count(HostOffset(host), length);
        HostOffset(host)
    }

    /// Writes the refcounts that are final.
    ///
    /// # Errors
    /// What `write` says.
    pub(crate) fn settle<E>(&mut self, write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>) -> Result<(), E> {
        if self.free - self.open.start > Self::LAG_MAX * self.cluster_size {
            self.open = self.free..self.free;
        }
        let first = if self.open.is_empty() { self.free } else { self.open.start };
        self.refcounts.settle(first / self.cluster_size, write)
    }

    /// Writes the rest of the refcounts; the number of bytes of the file comes back.
    ///
    /// # Errors
    /// What `write` says.
    pub(crate) fn finish<E>(self, write: impl FnMut(HostOffset, &[u8]) -> Result<(), E>) -> Result<u64, E> {
        self.refcounts.finish(write)?;
        Ok(self.free)
    }
}
