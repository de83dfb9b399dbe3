//! What parts of an image's file mean for the guest: the way back from offsets in the file to offsets of the disk.

use std::ops::Range;

use super::address::HostOffset;
use super::error::Result;
use super::image::Image;
use super::map::{Content, Extent, MapBuffer};
use crate::storage::{joined, push_joined};

/// What a range of an image's file holds of the disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Located {
    /// What is there, each kind once, in the order of [`ImageRegion`]. Where nothing is: refcounts, snapshots, bitmaps, free space.
    pub parts: Vec<ImageRegion>,
    /// The ranges of the disk that may read differently where the range of the file is damaged, in order and merged.
    pub guest: Vec<Range<u64>>,
}

/// What a part of an image's file is, of that on which the bytes of the disk depend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ImageRegion {
    /// The header with its extensions and the backing name.
    Header,
    /// The active L1 table.
    L1Table,
    /// An active L2 table.
    L2Table,
    /// The disk's bytes as they are.
    Data,
    /// Compressed clusters.
    Compressed,
}

/// Finds what ranges of an image's file mean for its disk as it is now, snapshots left out. The ranges are in order and do
/// not overlap; the answers are in the same order.
///
/// The tables are believed as they are. Where some cannot be, the parts of the disk that they map are left out, unless the
/// table is in one of the ranges itself.
///
/// # Errors
/// The image cannot be read.
pub fn locate(image: &Image, ranges: &[Range<u64>]) -> Result<Vec<Located>> {
    let mut search = Search { ranges, found: vec![Located::default(); ranges.len()] };
    let header = image.header();
    search.note(0..header.end.0, ImageRegion::Header, |_| 0..image.size());
    search.tables(image);
    // what lies in another file is in none of the ranges
    let with_data = !header.has_data_file();
    let mut buffer = MapBuffer::default();
    for occupied in image.occupied() {
        let mut extents = Vec::new();
        for guest in pieces(occupied, header.geometry.l2_coverage()) {
            extents.clear();
            if image.map(guest.clone(), &mut buffer, |extent| extents.push(extent)).is_err() {
                extents.clear();
                for cluster in pieces(guest, header.geometry.cluster_size()) {
                    // the others are as good as they were
                    let _ = image.map(cluster, &mut buffer, |extent| extents.push(extent));
                }
            }
            extents.iter().filter(|_| with_data).for_each(|extent| search.extent(extent));
        }
    }
    search.found.iter_mut().for_each(Located::settle);
    Ok(search.found)
}

/// A range in parts that end at multiples of `size`.
fn pieces(range: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = (start / size).saturating_add(1).saturating_mul(size).min(range.end);
        let piece = start..end;
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

struct Search<'a> {
    ranges: &'a [Range<u64>],
    found: Vec<Located>,
}

impl Search<'_> {
    /// Adds what a part of the file means to the ranges that it is in; `guest` tells it for a piece of that part.
    fn note(&mut self, host: Range<u64>, part: ImageRegion, guest: impl Fn(Range<u64>) -> Range<u64>) {
        let first = self.ranges.partition_point(|range| range.end <= host.start);
        let touched =
            self.ranges.iter().zip(&mut self.found).skip(first).take_while(|(range, _)| range.start < host.end);
        for (range, meaning) in touched {
            let piece = range.start.max(host.start)..range.end.min(host.end);
            if !piece.is_empty() {
                meaning.add(part, guest(piece));
            }
        }
    }

    fn tables(&mut self, image: &Image) {
        let header = image.header();
        let (geometry, size) = (header.geometry, image.size());
        let table = header.l1_table;
        let needed = geometry.l1_entries(size).min(table.entries) * 8;
        let disk = |bytes: Range<u64>, start: u64, entry: u64, covers: u64| {
            let at = |index: u64| index.saturating_mul(covers).saturating_add(start).min(size);
            at(bytes.start / entry)..at(bytes.end.div_ceil(entry))
        };
        let start = table.offset.0;
        self.note(start..start.saturating_add(needed), ImageRegion::L1Table, |piece| {
            disk(piece.start - start..piece.end - start, 0, 8, geometry.l2_coverage())
        });
        for (index, HostOffset(start)) in image.l1().tables() {
            self.note(start..start.saturating_add(geometry.cluster_size()), ImageRegion::L2Table, |piece| {
                let bytes = piece.start - start..piece.end - start;
                disk(
                    bytes,
                    index.saturating_mul(geometry.l2_coverage()),
                    geometry.l2_entry_size(),
                    geometry.cluster_size(),
                )
            });
        }
    }

    fn extent(&mut self, Extent { guest, content }: &Extent) {
        match content {
            Content::Data(HostOffset(host)) => {
                let length = guest.end - guest.start;
                self.note(*host..host.saturating_add(length), ImageRegion::Data, |piece| {
                    guest.start + (piece.start - host)..guest.start + (piece.end - host)
                });
            }
            Content::Compressed { data, .. } => {
                let host = data.host.0..data.host.0.saturating_add(data.length);
                self.note(host, ImageRegion::Compressed, |_| guest.clone());
            }
            Content::Unallocated | Content::Zero => {}
        }
    }
}

impl Located {
    fn add(&mut self, part: ImageRegion, guest: Range<u64>) {
        if !self.parts.contains(&part) {
            self.parts.push(part);
        }
        if !guest.is_empty() {
            push_joined(&mut self.guest, guest);
        }
    }

    /// Puts all in order.
    fn settle(&mut self) {
        self.parts.sort_unstable();
        self.guest = joined(std::mem::take(&mut self.guest));
    }
}
