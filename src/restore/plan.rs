//! The merge decided before a byte moves: which slices hold data, how much, and where it goes in a new image.
//!
//! Counts are kept for each slice, the layers of its clusters are not: they are looked up again when the slice is
//! copied, so that memory does not grow with the disk.

use std::ops::Range;

use super::error::Result;
use super::layers::Layers;
use super::observer::Observer;
use super::pool;
use super::resolve::{Bytes, Piece, resolve};
use super::slices::Slices;
use crate::qcow2::{Geometry, GuestOffset, HostOffset, MapBuffer};

/// What a merge will move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Guest bytes that are not known to be zeroes.
    pub bytes: u64,
    /// Clusters of the new image that hold them.
    pub clusters: u64,
    /// L2 tables of the new image.
    pub l2_tables: u64,
    pub(super) slices: Vec<PlannedSlice>,
}

/// A slice with data in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedSlice {
    pub(super) guest: Range<u64>,
    pub(super) bytes: u64,
    /// The number of its first data cluster, and how many there are.
    pub(super) first_cluster: u64,
    pub(super) clusters: u64,
    /// The number of the L2 table of that cluster.
    pub(super) first_table: u64,
    /// Whether an earlier slice enters that table in the L1 table.
    pub(super) shares_first_table: bool,
}

/// What a slice has to say before its place is known.
struct Count {
    guest: Range<u64>,
    bytes: u64,
    clusters: u64,
    tables: u64,
    first_l1: u64,
    last_l1: u64,
}

impl Plan {
    /// Reads the tables of all layers in parallel.
    pub(super) fn new(layers: &Layers, geometry: Geometry, observer: &dyn Observer) -> Result<Self> {
        let occupied = layers.as_slice().iter().flat_map(super::layer::Layer::occupied);
        let slices = Slices::new(layers.size(), occupied);
        let counts = pool::filter_map(slices.ranges(), MapBuffer::default, |buffer, guest| -> Result<Option<Count>> {
            observer.go_on()?;
            let pieces = resolve(layers.as_slice(), guest.clone(), buffer)?;
            Ok(count(&pieces, guest, geometry))
        })?;
        Ok(Self::place(layers.size(), counts.into_iter()))
    }

    /// The prefix sums.
    fn place(size: u64, counts: impl Iterator<Item = Count>) -> Self {
        let mut plan = Self { size, bytes: 0, clusters: 0, l2_tables: 0, slices: Vec::new() };
        let mut last_l1 = None;
        for count in counts {
            let shares_first_table = last_l1 == Some(count.first_l1);
            let first_table = plan.l2_tables - u64::from(shares_first_table);
            plan.slices.push(PlannedSlice {
                guest: count.guest,
                bytes: count.bytes,
                first_cluster: plan.clusters,
                clusters: count.clusters,
                first_table,
                shares_first_table,
            });
            plan.bytes += count.bytes;
            plan.clusters += count.clusters;
            plan.l2_tables = first_table + count.tables;
            last_l1 = Some(count.last_l1);
        }
        plan
    }
}

fn count(pieces: &[Piece], guest: Range<u64>, geometry: Geometry) -> Option<Count> {
    let clusters = touched(pieces, geometry);
    let l1_index = |cluster: u64| cluster / geometry.l2_entries();
    let (first, last) = (clusters.first()?, clusters.last()?);
    let changes = clusters.windows(2).filter(|pair| match pair {
        [one, next] => l1_index(*one) != l1_index(*next),
        _ => false,
    });
    Some(Count {
        guest,
        bytes: pieces.iter().map(|piece| piece.guest.end - piece.guest.start).sum(),
        clusters: clusters.len() as u64,
        tables: 1 + changes.count() as u64,
        first_l1: l1_index(*first),
        last_l1: l1_index(*last),
    })
}

/// The guest clusters of a new image that these pieces need, in order.
pub(super) fn touched(pieces: &[Piece], geometry: Geometry) -> Vec<u64> {
    let mut clusters: Vec<u64> = Vec::new();
    for piece in pieces {
        let first = piece.guest.start >> geometry.cluster_bits();
        let last = (piece.guest.end - 1) >> geometry.cluster_bits();
        let first = if clusters.last() == Some(&first) { first + 1 } else { first };
        clusters.extend(first..=last);
    }
    clusters
}

/// One copy: bytes of one layer that go to one place in the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) layer: usize,
    pub(super) source: Origin,
    pub(super) target: u64,
    pub(super) length: u64,
    /// Where it is on the disk; of several pieces that lie apart there, the first.
    pub(super) guest: u64,
}

impl Operation {
    /// A part of it, which goes to the start of a buffer.
    pub(super) fn part(&self, start: u64, length: u64) -> Self {
        let source = match self.source {
            Origin::Plain(host) => Origin::Plain(HostOffset(host.0 + start)),
            Origin::Compressed { cluster, data, skip } => Origin::Compressed { cluster, data, skip: skip + start },
        };
        Self { layer: self.layer, source, target: 0, length, guest: self.guest + start }
    }
}

/// Where the bytes of an operation come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Plain(HostOffset),
    /// The bytes from `skip` on of an inflated cluster.
    Compressed {
        cluster: GuestOffset,
        data: crate::qcow2::CompressedCluster,
        skip: u64,
    },
}

impl Origin {
    pub(super) fn of(piece: &Piece) -> Self {
        match piece.bytes {
            Bytes::Plain(host) => Self::Plain(host),
            Bytes::Compressed { cluster, data } => {
                Self::Compressed { cluster, data, skip: piece.guest.start - cluster.0 }
            }
        }
    }
}

/// The copies for the pieces of a slice. What lies next to each other in source and output is one operation.
pub(super) fn operations(pieces: Vec<Piece>, place: impl FnMut(u64) -> u64) -> Vec<Operation> {
    joined(pieces, false, place)
}

/// The same, where each operation is one range of the disk.
pub(super) fn operations_apart(pieces: Vec<Piece>, place: impl FnMut(u64) -> u64) -> Vec<Operation> {
    joined(pieces, true, place)
}

fn joined(pieces: Vec<Piece>, apart: bool, mut place: impl FnMut(u64) -> u64) -> Vec<Operation> {
    let mut operations: Vec<Operation> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let source = Origin::of(&piece);
        let Piece { guest, layer, .. } = piece;
        let (target, length) = (place(guest.start), guest.end - guest.start);
        if let (Some(last), Origin::Plain(host)) = (operations.last_mut(), source) {
            let follows = match last.source {
                Origin::Plain(before) => before.0 + last.length == host.0,
                Origin::Compressed { .. } => false,
            };
            let follows = follows && (!apart || last.guest + last.length == guest.start);
            if follows && last.layer == layer && last.target + last.length == target {
                last.length += length;
                continue;
            }
        }
        operations.push(Operation { layer, source, target, length, guest: guest.start });
    }
    operations
}

/// Gives the place in a new image for guest addresses that come in order: data clusters are numbered by the
/// touched guest clusters.
pub(super) fn packed(clusters: &[u64], first: HostOffset, geometry: Geometry) -> impl FnMut(u64) -> u64 + use<'_> {
    let mut rank = 0;
    move |guest| {
        let cluster = guest >> geometry.cluster_bits();
        while clusters.get(rank).is_some_and(|touched| *touched < cluster) {
            rank += 1;
        }
        first.0 + rank as u64 * geometry.cluster_size() + geometry.offset_in_cluster(guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_operation_of_neighbours_in_the_files_is_one_range_of_the_disk_where_that_is_wanted() {
        let piece =
            |start: u64, host| Piece { guest: start..start + 512, layer: 0, bytes: Bytes::Plain(HostOffset(host)) };
        let pieces = vec![piece(0, 4096), piece(512, 4608), piece(5120, 5120)];
        let place = |guest: u64| if guest < 1024 { guest } else { guest - 4096 };
        let lengths =
            |operations: Vec<Operation>| operations.iter().map(|one| (one.guest, one.length)).collect::<Vec<_>>();
        assert_eq!(lengths(operations(pieces.clone(), place)), [(0, 1536)]);
        assert_eq!(lengths(operations_apart(pieces, place)), [(0, 1024), (5120, 512)]);
    }

    /// Pieces that do not overlap, at any places.
    fn pieces() -> impl Strategy<Value = Vec<Piece>> {
        prop::collection::vec((0u64..3000, 1u64..5000, 0usize..3), 0..40).prop_map(|gaps| {
            let mut end = 0;
            let piece = |(gap, length, layer)| {
                let guest = end + gap..end + gap + length;
                end = guest.end;
                Piece { bytes: Bytes::Plain(HostOffset(1 << 20 | guest.start)), guest, layer }
            };
            gaps.into_iter().map(piece).collect()
        })
    }

    proptest! {
        #[test]
        fn every_byte_goes_to_the_cluster_with_the_rank_of_its_own(pieces in pieces()) {
            let geometry = Geometry::new(9, false).unwrap();
            let clusters = touched(&pieces, geometry);
            let model: std::collections::BTreeSet<u64> =
                pieces.iter().flat_map(|piece| piece.guest.clone()).map(|byte| byte / 512).collect();
            prop_assert!(clusters.iter().eq(&model));
            let mut expected = Vec::new();
            for piece in &pieces {
                for byte in piece.guest.clone() {
                    let rank = model.iter().position(|cluster| *cluster == byte / 512).unwrap() as u64;
                    expected.push((piece.layer, 1 << 20 | byte, 4096 + rank * 512 + byte % 512));
                }
            }
            let mut found = Vec::new();
            let place = || packed(&clusters, HostOffset(4096), geometry);
            let mut apart = Vec::new();
            for operation in operations_apart(pieces.clone(), place()) {
                let Origin::Plain(host) = operation.source else { panic!() };
                prop_assert_eq!(host.0, 1 << 20 | operation.guest);
                let part = operation.part(operation.length / 2, 1);
                prop_assert_eq!((part.guest, part.source), (operation.guest + operation.length / 2, Origin::Plain(HostOffset(host.0 + operation.length / 2))));
                for i in 0..operation.length {
                    // where it is on the disk tells where it comes from
                    apart.push((operation.layer, 1 << 20 | (operation.guest + i), operation.target + i));
                }
            }
            prop_assert_eq!(&apart, &expected);
            for operation in operations(pieces, place()) {
                let Origin::Plain(host) = operation.source else { panic!() };
                found.extend((0..operation.length).map(|i| (operation.layer, host.0 + i, operation.target + i)));
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn slices_get_the_places_that_one_long_slice_would_give(pieces in pieces()) {
            let geometry = Geometry::new(9, false).unwrap();
            let part = |range: Range<u64>| -> Vec<Piece> {
                let clip = |piece: &Piece| Piece {
                    guest: piece.guest.start.max(range.start)..piece.guest.end.min(range.end),
                    ..piece.clone()
                };
                pieces.iter().map(clip).filter(|piece| !piece.guest.is_empty()).collect()
            };
            // a quarter of an L2 table, and four of them
            for length in [512 * 16, 512 * 256] {
                let ranges = (0..400_000 / length).map(|number| number * length..(number + 1) * length);
                let counts = ranges.filter_map(|range| count(&part(range.clone()), range, geometry));
                let plan = Plan::place(400_000, counts);
                let all = touched(&pieces, geometry);
                let tables: std::collections::BTreeSet<u64> = all.iter().map(|cluster| cluster / 64).collect();
                prop_assert_eq!(plan.clusters, all.len() as u64);
                prop_assert_eq!(plan.l2_tables, tables.len() as u64);
                for slice in &plan.slices {
                    let first = all.iter().find(|cluster| **cluster * 512 >= slice.guest.start).unwrap();
                    let rank = all.iter().position(|cluster| cluster == first).unwrap() as u64;
                    prop_assert_eq!(slice.first_cluster, rank);
                    prop_assert_eq!(slice.first_table, tables.range(..first / 64).count() as u64);
                    let earlier = all.iter().any(|cluster| cluster < first && cluster / 64 == first / 64);
                    prop_assert_eq!(slice.shares_first_table, earlier);
                }
            }
        }
    }
}
