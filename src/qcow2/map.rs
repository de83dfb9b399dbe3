//! Where the bytes of a guest range are: L2 tables decoded to extents.

use std::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use super::address::{GuestOffset, HostOffset};
use super::entry::{CompressedCluster, EntryRules, L2Entry};
use super::error::{Allowed, Error, Invalid, Result};
use super::geometry::SUBCLUSTERS;
use super::image::Image;
use crate::storage::to_usize;

/// A guest range of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The guest range.
    pub guest: Range<u64>,
    /// What is there.
    pub content: Content,
}

/// What a layer holds in a guest range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing: the layer below shows through.
    Unallocated,
    /// Zeroes.
    Zero,
    /// Bytes as they are, from here on.
    Data(HostOffset),
    /// (A part of) a compressed cluster.
    Compressed {
        /// Where the guest cluster starts.
        cluster: GuestOffset,
        /// Where its bytes are.
        data: CompressedCluster,
    },
}

/// Room for pieces of L2 tables, used again from call to call.
#[derive(Debug, Default)]
pub struct MapBuffer {
    table: Vec<u8>,
}

impl Image {
    /// Calls `each` for the extents of a guest range, in order and without gaps. Behind the end of the disk there
    /// are none. Neighbours of one kind come as one extent, compressed clusters each by itself.
    ///
    /// # Errors
    /// What is wrong with an L2 table or one of its entries in this range.
    pub fn map(&self, guest: Range<u64>, buffer: &mut MapBuffer, each: impl FnMut(Extent)) -> Result<()> {
        let geometry = self.header().geometry;
        let end = guest.end.min(self.size());
        let mut joined = Joined { pending: None, each };
        let mut start = guest.start;
        while start < end {
            let index = geometry.l1_index(GuestOffset(start));
            let stop = (index + 1).checked_mul(geometry.l2_coverage()).map_or(end, |next| next.min(end));
            if let Some(error) = self.l1().damage(index) {
                return Err(error);
            }
            match self.l1().get(index) {
                Some(table) => self.map_table(table, start..stop, buffer, &mut joined)?,
                None => joined.push(Extent { guest: start..stop, content: Content::Unallocated }),
            }
            start = stop;
        }
        joined.finish();
        Ok(())
    }

    fn map_table(
        &self,
        table: HostOffset,
        guest: Range<u64>,
        buffer: &mut MapBuffer,
        joined: &mut Joined<impl FnMut(Extent)>,
    ) -> Result<()> {
        let rules = self.rules();
        let geometry = rules.geometry;
        let entry_size = geometry.l2_entry_size();
        let first = geometry.l2_index(GuestOffset(guest.start));
        let last = geometry.l2_index(GuestOffset(guest.end - 1));
        let offset = HostOffset(table.0 + first * entry_size);
        let length = to_usize((last - first + 1) * entry_size);
        buffer.table.resize(buffer.table.len().max(length), 0);
        let bytes = buffer.table.get_mut(..length).unwrap_or_default();
        let io = |source| Error::Io { what: "an L2 table", offset, source };
        self.storage().read_exact_at(bytes, offset.0).map_err(io)?;
        let mut cluster = guest.start - geometry.offset_in_cluster(guest.start);
        for (index, entry) in (0..).zip(bytes.chunks_exact(to_usize(entry_size))) {
            let value = entry.get(..8).map_or(0, BigEndian::read_u64);
            let bitmap = entry.get(8..16).map_or(0, BigEndian::read_u64);
            let part = guest.start.max(cluster)..guest.end.min(cluster + geometry.cluster_size());
            self.map_entry((value, bitmap), rules, cluster, part, joined).map_err(|allowed| Invalid {
                field: "L2 entry",
                offset: HostOffset(offset.0 + index * entry_size),
                value,
                allowed,
            })?;
            cluster += geometry.cluster_size();
        }
        Ok(())
    }

    fn map_entry(
        &self,
        (value, bitmap): (u64, u64),
        rules: EntryRules,
        cluster: u64,
        guest: Range<u64>,
        joined: &mut Joined<impl FnMut(Extent)>,
    ) -> Result<(), Allowed> {
        let content = match L2Entry::decode(value, bitmap, rules)? {
            L2Entry::Unallocated => Content::Unallocated,
            L2Entry::Zero { .. } => Content::Zero,
            L2Entry::Data { host, .. } => {
                self.check_data(host, guest.end - cluster)?;
                Content::Data(HostOffset(host.0 + (guest.start - cluster)))
            }
            L2Entry::Compressed(data) => {
                self.check_compressed(data)?;
                Content::Compressed { cluster: GuestOffset(cluster), data }
            }
            L2Entry::Subclusters { host, allocated, zero, .. } => {
                let size = rules.geometry.subcluster_size();
                for index in 0..SUBCLUSTERS {
                    let start = cluster + u64::from(index) * size;
                    let part = start.max(guest.start)..(start + size).min(guest.end);
                    if part.is_empty() {
                        continue;
                    }
                    let content = match host {
                        Some(host) if allocated >> index & 1 == 1 => {
                            self.check_data(host, part.end - cluster)?;
                            Content::Data(HostOffset(host.0 + (part.start - cluster)))
                        }
                        _ if zero >> index & 1 == 1 => Content::Zero,
                        _ => Content::Unallocated,
                    };
                    joined.push(Extent { guest: part, content });
                }
                return Ok(());
            }
        };
        joined.push(Extent { guest, content });
        Ok(())
    }

    /// The first `length` bytes of a cluster must be in the file, but for the rest of its last sector.
    fn check_data(&self, host: HostOffset, length: u64) -> Result<(), Allowed> {
        let cluster_size = self.header().geometry.cluster_size();
        if host.0 < cluster_size && !self.header().has_data_file() {
            return Err(Allowed::BehindHeader(cluster_size));
        }
        let end = self.data().length();
        if host.0 + length > end.next_multiple_of(512) { Err(Allowed::BeforeEnd(end)) } else { Ok(()) }
    }

    /// Compressed bytes must start in the file; their last sector may end behind it.
    fn check_compressed(&self, data: CompressedCluster) -> Result<(), Allowed> {
        let geometry = self.header().geometry;
        if data.host.0 < geometry.cluster_size() {
            return Err(Allowed::BehindHeader(geometry.cluster_size()));
        }
        let end = self.storage().length();
        if data.host.0 >= end { Err(Allowed::BeforeEnd(end)) } else { Ok(()) }
    }
}

/// Joins neighbours of one kind.
struct Joined<F> {
    pending: Option<Extent>,
    each: F,
}

impl<F: FnMut(Extent)> Joined<F> {
    fn push(&mut self, next: Extent) {
        if let Some(pending) = &mut self.pending {
            let length = pending.guest.end - pending.guest.start;
            let joins = match (pending.content, next.content) {
                (Content::Unallocated, Content::Unallocated) | (Content::Zero, Content::Zero) => true,
                (Content::Data(host), Content::Data(follows)) => host.0 + length == follows.0,
                _ => false,
            };
            if joins {
                pending.guest.end = next.guest.end;
                return;
            }
        }
        if let Some(done) = self.pending.replace(next) {
            (self.each)(done);
        }
    }

    fn finish(self) {
        let Self { pending, mut each } = self;
        if let Some(last) = pending {
            each(last);
        }
    }
}
