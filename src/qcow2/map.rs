//! Where the bytes of a guest range are: L2 tables decoded to extents.

use std::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use super::address::{GuestOffset, HostOffset};
use super::entry::{CompressedCluster, EntryRules, L2Entry};
use super::error::{Allowed, Error, Invalid, Result};
use super::geometry::{Geometry, SUBCLUSTERS};
use super::image::Image;
use crate::storage::{LastHole, to_usize};

/// A range of the disk of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The bytes of the disk.
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
        self.map_ranges(&[guest], buffer, each)
    }

    /// The same for several guest ranges, in order and apart. What they need of an L2 table is read once.
    ///
    /// # Errors
    /// As with [`map`](Self::map).
    pub(crate) fn map_ranges(
        &self,
        ranges: &[Range<u64>],
        buffer: &mut MapBuffer,
        mut each: impl FnMut(Extent),
    ) -> Result<()> {
        self.map_parts(ranges, buffer, |part| part.map(&mut each).map_err(|unmapped| unmapped.error))
    }

    /// The same for an image that may be damaged: what cannot be mapped is a part, too, as small as what is wrong: an entry, or
    /// all that was wanted of a table. `each` says whether it goes on.
    ///
    /// # Errors
    /// What `each` returns.
    pub(crate) fn map_parts(
        &self,
        ranges: &[Range<u64>],
        buffer: &mut MapBuffer,
        each: impl FnMut(Mapping) -> Result<()>,
    ) -> Result<()> {
        let geometry = self.header().geometry;
        let mut joined = Joined { pending: None, each };
        let (mut read, mut was_empty, mut hole) = (None, false, LastHole::default());
        for (number, guest) in ranges.iter().enumerate() {
            let end = guest.end.min(self.size());
            let mut start = guest.start;
            while start < end {
                let index = geometry.l1_index(GuestOffset(start));
                let of_table = |index: u64| {
                    index.checked_mul(geometry.l2_coverage()).map_or(self.size(), |at| at.min(self.size()))
                };
                if let Some((index, error)) = self.l1().damage(index) {
                    let guest = start..of_table(index).min(end);
                    start = guest.end;
                    joined.break_off(Unmapped { guest, error })?;
                    continue;
                }
                let next = of_table(index + 1);
                let stop = next.min(end);
                let guest = start..stop;
                start = stop;
                let Some(table) = self.l1().get(index) else {
                    joined.push(Extent { guest, content: Content::Unallocated })?;
                    continue;
                };
                let piece = if let Some(piece) = read.take().filter(|piece: &Piece| piece.index == index) {
                    Ok(Some(piece))
                } else {
                    let behind = ranges.iter().skip(number).take_while(|range| range.start < next);
                    let last = behind.last().map_or(stop, |range| range.end.min(next));
                    self.read_table(index, table, guest.start..last, was_empty, &mut hole, buffer)
                };
                was_empty = piece.as_ref().is_ok_and(|piece| piece.as_ref().is_none_or(|piece| piece.is_empty));
                match piece {
                    Ok(Some(piece)) => {
                        self.map_table(&piece, guest, buffer, &mut joined)?;
                        read = Some(piece);
                    }
                    Ok(None) => joined.push(Extent { guest, content: Content::Unallocated })?,
                    Err(error) => joined.break_off(Unmapped { guest, error })?,
                }
            }
            joined.flush()?;
        }
        Ok(())
    }

    /// Reads the entries for a guest range that lies in one L2 table; `None` where all lie in a hole, which is asked where there
    /// are many, or where it is likely.
    fn read_table(
        &self,
        index: u64,
        table: HostOffset,
        guest: Range<u64>,
        likely_hole: bool,
        hole: &mut LastHole,
        buffer: &mut MapBuffer,
    ) -> Result<Option<Piece>> {
        /// Fewer bytes are read sooner than the system says whether they are a hole.
        const FEW: usize = 64 << 10;
        let geometry = self.header().geometry;
        let first = geometry.l2_index(GuestOffset(guest.start));
        let last = geometry.l2_index(GuestOffset(guest.end - 1));
        let offset = HostOffset(table.0 + first * geometry.l2_entry_size());
        let length = to_usize((last - first + 1) * geometry.l2_entry_size());
        let io = |source| Error::Io { what: "an L2 table", offset, source };
        let end = offset.0 + length as u64;
        // a table that was cut off is for whoever reads it
        let is_asked = (likely_hole || length >= FEW) && end <= self.storage().length();
        if is_asked && hole.next_data_within(self.storage(), offset.0..end).map_err(io)?.is_none() {
            return Ok(None);
        }
        buffer.table.resize(buffer.table.len().max(length), 0);
        let bytes = buffer.table.get_mut(..length).unwrap_or_default();
        self.storage().read_exact_at(bytes, offset.0).map_err(io)?;
        let is_empty = bytes.iter().all(|byte| *byte == 0);
        Ok(Some(Piece { index, offset, first, length, is_empty }))
    }

    fn map_table(
        &self,
        piece: &Piece,
        guest: Range<u64>,
        buffer: &MapBuffer,
        joined: &mut Joined<impl FnMut(Mapping) -> Result<()>>,
    ) -> Result<()> {
        let rules = self.rules();
        let geometry = rules.geometry;
        let entry_size = geometry.l2_entry_size();
        let entries = |address: u64| geometry.l2_index(GuestOffset(address)) - piece.first;
        let skipped = entries(guest.start) * entry_size;
        let end = to_usize((entries(guest.end - 1) + 1) * entry_size).min(piece.length);
        let bytes = buffer.table.get(to_usize(skipped)..end).unwrap_or_default();
        let mut cluster = guest.start - geometry.offset_in_cluster(guest.start);
        for (index, entry) in (0..).zip(bytes.chunks_exact(to_usize(entry_size))) {
            let value = entry.get(..8).map_or(0, BigEndian::read_u64);
            let bitmap = entry.get(8..16).map_or(0, BigEndian::read_u64);
            let part = guest.start.max(cluster)..guest.end.min(cluster + geometry.cluster_size());
            // most entries of a sparse disk
            let is_empty = value == 0 && bitmap == 0;
            let entry =
                if is_empty { Ok(L2Entry::Unallocated) } else { self.decode(value, bitmap, rules, cluster, &part) };
            match entry {
                Ok(L2Entry::Subclusters { host, allocated, zero, .. }) => {
                    for (part, number) in subclusters(geometry, cluster, &part) {
                        let content = match host {
                            Some(host) if allocated >> number & 1 == 1 => data(host, cluster, part.start),
                            _ if zero >> number & 1 == 1 => Content::Zero,
                            _ => Content::Unallocated,
                        };
                        joined.push(Extent { guest: part, content })?;
                    }
                }
                Ok(entry) => joined.push(Extent { content: content(&entry, cluster, part.start), guest: part })?,
                Err(allowed) => {
                    let offset = HostOffset(piece.offset.0 + skipped + index * entry_size);
                    let error = Invalid { field: "L2 entry", offset, value, allowed }.into();
                    joined.break_off(Unmapped { guest: part, error })?;
                }
            }
            cluster += geometry.cluster_size();
        }
        Ok(())
    }

    /// An entry of which all that the part of its cluster needs can be in the file.
    fn decode(
        &self,
        value: u64,
        bitmap: u64,
        rules: EntryRules,
        cluster: u64,
        guest: &Range<u64>,
    ) -> Result<L2Entry, Allowed> {
        let entry = L2Entry::decode(value, bitmap, rules)?;
        match &entry {
            L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Subclusters { host: None, .. } => {}
            L2Entry::Data { host, .. } => self.check_data(*host, guest.end - cluster)?,
            L2Entry::Compressed(data) => self.check_compressed(*data)?,
            L2Entry::Subclusters { host: Some(host), allocated, .. } => {
                for (part, number) in subclusters(rules.geometry, cluster, guest) {
                    if allocated >> number & 1 == 1 {
                        self.check_data(*host, part.end - cluster)?;
                    }
                }
            }
        }
        Ok(entry)
    }

    /// The first `length` bytes of a cluster must be in the file.
    fn check_data(&self, host: HostOffset, length: u64) -> Result<(), Allowed> {
        let cluster_size = self.header().geometry.cluster_size();
        if host.0 < cluster_size && !self.header().has_data_file() {
            return Err(Allowed::BehindHeader(cluster_size));
        }
        let end = self.data().length();
        if host.0 + length > end { Err(Allowed::BeforeEnd(end)) } else { Ok(()) }
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

/// A part of an L2 table that is in the buffer.
struct Piece {
    /// The L1 index of the table.
    index: u64,
    /// Where its first entry is in the file, and the number of that in the table.
    offset: HostOffset,
    first: u64,
    /// Its bytes.
    length: usize,
    /// Whether all of them are zeroes.
    is_empty: bool,
}

/// What a part of an image's disk is, or why that cannot be told.
pub(crate) type Mapping = std::result::Result<Extent, Unmapped>;

/// A guest range that cannot be mapped.
#[derive(Debug)]
pub(crate) struct Unmapped {
    pub(crate) guest: Range<u64>,
    pub(crate) error: Error,
}

/// What an entry without subclusters says of its cluster from `start` on.
fn content(entry: &L2Entry, cluster: u64, start: u64) -> Content {
    match entry {
        L2Entry::Unallocated | L2Entry::Subclusters { .. } => Content::Unallocated,
        L2Entry::Zero { .. } => Content::Zero,
        L2Entry::Data { host, .. } => data(*host, cluster, start),
        L2Entry::Compressed(data) => Content::Compressed { cluster: GuestOffset(cluster), data: *data },
    }
}

/// The bytes of a cluster from `start` on.
fn data(host: HostOffset, cluster: u64, start: u64) -> Content {
    Content::Data(HostOffset(host.0 + (start - cluster)))
}

/// The subclusters that a guest range touches, each with its number.
fn subclusters(geometry: Geometry, cluster: u64, guest: &Range<u64>) -> impl Iterator<Item = (Range<u64>, u32)> {
    let (size, guest) = (geometry.subcluster_size(), guest.clone());
    let part = move |number: u32| {
        let start = cluster + u64::from(number) * size;
        (start.max(guest.start)..(start + size).min(guest.end), number)
    };
    (0..SUBCLUSTERS).map(part).filter(|(part, _)| !part.is_empty())
}

/// Joins neighbours of one kind.
struct Joined<F> {
    pending: Option<Extent>,
    each: F,
}

impl<F: FnMut(Mapping) -> Result<()>> Joined<F> {
    fn push(&mut self, next: Extent) -> Result<()> {
        if let Some(pending) = &mut self.pending {
            let length = pending.guest.end - pending.guest.start;
            let joins = match (pending.content, next.content) {
                (Content::Unallocated, Content::Unallocated) | (Content::Zero, Content::Zero) => true,
                (Content::Data(host), Content::Data(follows)) => host.0 + length == follows.0,
                _ => false,
            };
            if joins {
                pending.guest.end = next.guest.end;
                return Ok(());
            }
        }
        self.pending.replace(next).map_or(Ok(()), |done| (self.each)(Ok(done)))
    }

    fn break_off(&mut self, unmapped: Unmapped) -> Result<()> {
        self.flush()?;
        (self.each)(Err(unmapped))
    }

    fn flush(&mut self) -> Result<()> {
        self.pending.take().map_or(Ok(()), |last| (self.each)(Ok(last)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::qcow2::{CompressionType, Geometry, Layout};
    use crate::storage::MemoryStorage;

    /// An image with four L2 tables of 64 clusters of 512 bytes, of which the third is not there.
    fn image(held: &[bool]) -> Image {
        let geometry = Geometry::new(9, false).unwrap();
        let layout = Layout::new(geometry, 4 * geometry.l2_coverage() - 100, CompressionType::Deflate, 3, 256).unwrap();
        let mut bytes = vec![0; to_usize(layout.length())];
        let mut put = |offset: HostOffset, part: &[u8]| {
            bytes[to_usize(offset.0)..to_usize(offset.0) + part.len()].copy_from_slice(part);
        };
        put(HostOffset(0), &layout.header());
        for (table, index) in [0, 1, 3].into_iter().enumerate() {
            let table = layout.l2_table(table as u64);
            put(layout.l1_entry(index), &Layout::entry(table).to_be_bytes());
            for entry in (0..64).filter(|entry| held[to_usize(index * 64 + entry)]) {
                let place = layout.data_cluster(index * 64 + entry);
                put(HostOffset(table.0 + entry * 8), &Layout::entry(place).to_be_bytes());
            }
        }
        Image::open(Arc::new(MemoryStorage::new(bytes))).unwrap()
    }

    proptest! {
        #[test]
        fn several_ranges_are_mapped_as_each_by_itself(
            held in prop::collection::vec(any::<bool>(), 256),
            mut ends in prop::collection::btree_set(0u64..4 * 64 * 512 - 100, 2..40),
        ) {
            if ends.len() % 2 == 1 {
                ends.pop_last();
            }
            let ends: Vec<u64> = ends.into_iter().collect();
            let ranges: Vec<Range<u64>> = ends.chunks(2).map(|pair| pair[0]..pair[1]).collect();
            let image = image(&held);
            let (mut together, mut apart) = (Vec::new(), Vec::new());
            image.map_ranges(&ranges, &mut MapBuffer::default(), |extent| together.push(extent)).unwrap();
            for range in ranges {
                image.map(range, &mut MapBuffer::default(), |extent| apart.push(extent)).unwrap();
            }
            prop_assert_eq!(together, apart);
        }
    }
}
