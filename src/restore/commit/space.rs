//! Whether there is room for what will be written to an image in place.

use std::ops::Range;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use crate::chain::{BLOCK, Checksums};
use crate::qcow2::{self, Content, Geometry, GuestOffset, HostOffset, Image, MapBuffer};
use crate::restore::commit::apply;
use crate::restore::error::{Error, Result};
use crate::restore::layer::Layer;
use crate::restore::observer::Observer;
use crate::restore::plan;
use crate::restore::pool;
use crate::restore::resolve::{Bytes, Changes, Mapped, Piece, changes};
use crate::storage::{LastHole, moved_block};

/// What a commit writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Needs {
    /// Guest bytes.
    pub(super) bytes: u64,
    /// The most bytes that the image may need in addition to what it has.
    pub(super) growth: u64,
    /// The most bytes of what it has that may get another place.
    pub(super) moved: u64,
}

/// What one group changes in a slice of the disk.
struct Slice {
    bytes: u64,
    /// Clusters that need a place of their own.
    clusters: u64,
    /// Bytes of others that get another place in the file system.
    moved: u64,
    /// L2 tables that change, in order.
    tables: Vec<u64>,
}

/// Looks at what groups of layers change in an image, one group after the other, with a snapshot before the first and after
/// each if that is `snapshots`.
pub(super) fn needed(
    path: &Path,
    full: &Image,
    groups: &[&[Layer]],
    snapshots: bool,
    observer: &dyn Observer,
) -> Result<Needs> {
    let failed = Error::image(path);
    let header = full.header();
    let geometry = header.geometry;
    let cluster = geometry.cluster_size();
    // what a snapshot holds is never overwritten
    let shared = snapshots || header.nb_snapshots > 0;
    let block = full.storage().as_file().and_then(moved_block);
    let (mut bytes, mut clusters, mut moved, mut most_tables, mut size) = (0, 0, 0, 0, header.size);
    for (at, layers) in groups.iter().enumerate() {
        size = size.max(layers.last().map_or(0, Mapped::size));
        let earlier = groups.get(..at).unwrap_or_default().iter().copied().flatten();
        let below = || Ok::<_, Error>(full.occupied().into_iter().chain(earlier.flat_map(Layer::occupied)).collect());
        let slices = apply::slices(layers, size, below)?;
        let look = |(buffer, below): &mut (MapBuffer, MapBuffer), guest| -> Result<Slice> {
            observer.go_on()?;
            let found = changes(layers, guest, buffer)?;
            let touched = touched(&found, geometry);
            let tables = tables(&found, geometry);
            let all = touched.len() as u64;
            let clusters = if shared { all } else { missing(full, &touched, geometry, below).map_err(failed)? };
            let moved = block
                .map_or(0, |block| moved_bytes(&found, geometry, block).min((all - clusters) * cluster.max(block)));
            let bytes = found.data.iter().map(|piece| piece.guest.end - piece.guest.start).sum();
            Ok(Slice { bytes, clusters, moved, tables })
        };
        // neighbours may change the same table
        let (mut tables, mut last) = (0, None);
        pool::in_order(slices.ranges(), Default::default, look, |slice| {
            bytes += slice.bytes;
            clusters += slice.clusters;
            moved += slice.moved;
            tables += slice.tables.iter().filter(|table| last < Some(**table)).count() as u64;
            last = slice.tables.last().copied().or(last);
            Ok(())
        })?;
        clusters += tables;
        most_tables = most_tables.max(tables);
    }
    // an L1 table that becomes longer or is kept by a snapshot, an entry for that, and a bit of all that has to be moved
    let l1 = geometry.clusters(geometry.l1_entries(size) * 8);
    clusters += (2 * l1 + 2) * (groups.len() as u64 + 1) + 8;
    if snapshots {
        // tables are written anew when they are shared, before the old ones go
        clusters += most_tables + full.l1().tables().count() as u64;
    }
    let length = full.storage().length() + clusters * cluster;
    clusters += refcounts(length, full) * if snapshots { 3 } else { 1 };
    Ok(Needs { bytes, growth: clusters * cluster, moved })
}

/// The most bytes of blocks that are written to, and not exchanged for blocks of an INC.
fn moved_bytes(found: &Changes, geometry: Geometry, block: u64) -> u64 {
    let is_whole = |guest: &Range<u64>| (guest.start | guest.end) % block == 0;
    let has_blocks = |piece: &&Piece| {
        matches!(piece.bytes, Bytes::Plain(HostOffset(host)) if host % block == 0) && is_whole(&piece.guest)
    };
    // clusters that are smaller may each be in a block of their own
    let unit = geometry.cluster_size().min(block);
    let is_small = unit < block;
    let data = found.data.iter().filter(|piece| is_small || !has_blocks(piece)).map(|piece| &piece.guest);
    let ends = found.zeroes.iter().filter(|range| !is_whole(range));
    let blocks = data.map(|guest| guest.end.div_ceil(unit) - guest.start / unit).sum::<u64>() + 2 * ends.count() as u64;
    blocks * block
}

/// The clusters that change; where zeroes begin or end within one, its rest stays.
fn touched(found: &Changes, geometry: Geometry) -> Vec<u64> {
    let bits = geometry.cluster_bits();
    let unit = geometry.cluster_size();
    let ends = found.zeroes.iter().flat_map(|range| [range.start, range.end]);
    let mut touched = plan::touched(&found.data, geometry);
    touched.extend(ends.filter(|end| end % unit != 0).map(|end| end >> bits));
    touched.sort_unstable();
    touched.dedup();
    touched
}

/// The L2 tables that change.
fn tables(found: &Changes, geometry: Geometry) -> Vec<u64> {
    let ranges = found.data.iter().map(|piece| &piece.guest).chain(&found.zeroes);
    let index = |guest| geometry.l1_index(GuestOffset(guest));
    let mut tables: Vec<u64> = ranges.flat_map(|range| index(range.start)..=index(range.end - 1)).collect();
    tables.sort_unstable();
    tables.dedup();
    tables
}

/// Clusters for the refcounts of a file of this length, and the table that leads to them.
fn refcounts(length: u64, image: &Image) -> u64 {
    let geometry = image.header().geometry;
    let counted = geometry.clusters(length);
    let blocks = geometry.clusters((counted * u64::from(image.header().refcount_bits())).div_ceil(8)) + 1;
    // the table is written anew when it becomes longer
    blocks + 2 * geometry.clusters(blocks * 8) + 2
}

/// How many of these clusters, which come in order, have no place of their own in the image, or one that is a hole.
fn missing(full: &Image, touched: &[u64], geometry: Geometry, buffer: &mut MapBuffer) -> qcow2::Result<u64> {
    let (Some(first), Some(last)) = (touched.first(), touched.last()) else { return Ok(0) };
    let bits = geometry.cluster_bits();
    let mut missing = touched.len() as u64;
    let mut rest = touched;
    let mut hole = LastHole::default();
    let mut lacks_blocks = |place: Range<u64>| {
        // who cannot say needs no more than he has
        let data = hole.next_data_within(full.storage(), place.clone()).unwrap_or(Some(place.start));
        data != Some(place.start)
    };
    let mapped = full.map(first << bits..(last + 1) << bits, buffer, |extent| {
        if let Content::Data(HostOffset(host)) = extent.content {
            let (start, end) = (extent.guest.start >> bits, extent.guest.end.div_ceil(1 << bits));
            rest = rest.get(rest.partition_point(|cluster| *cluster < start)..).unwrap_or_default();
            let held = rest.partition_point(|cluster| *cluster < end);
            let (here, behind) = rest.split_at_checked(held).unwrap_or_default();
            let place = |cluster: u64| host.saturating_add((cluster << bits).saturating_sub(extent.guest.start));
            let held = here.iter().map(|cluster| place(*cluster)).filter(|at| !lacks_blocks(*at..at + (1 << bits)));
            missing -= held.count() as u64;
            rest = behind;
        }
    });
    mapped.map(|()| missing)
}

/// The most bytes that the files beside an image need in addition while it takes so many INCs: each is written beside the
/// one that it replaces.
fn beside(path: &Path, image: &Image, growth: u64, incs: usize) -> u64 {
    /// Journal and manifests, and the name of an INC in the journal.
    const FILES: u64 = 32 << 10;
    const NAME: u64 = 1 << 10;
    /// The header of checksums, and each of them.
    const HEADER: u64 = 64;
    const SUM: u64 = 4;
    let files = FILES + NAME * incs as u64;
    // those that cannot be used stay as they are
    match Checksums::open(path) {
        Ok(Some(_)) => files + HEADER + SUM * (image.storage().length() + growth).div_ceil(BLOCK),
        Ok(None) | Err(_) => files,
    }
}

/// Refuses what has no room for what is written to an image, and beside it.
pub(super) fn check(path: &Path, image: &Image, needs: Needs, incs: usize) -> Result<()> {
    let system =
        rustix::fs::statvfs(path).map_err(|error| Error::Open { path: path.to_owned(), source: error.into() })?;
    // some do not say
    let free = if system.f_blocks == 0 { u64::MAX } else { system.f_bavail.saturating_mul(system.f_frsize) };
    let may_grow = getrlimit(Resource::Fsize).current.map(|most| most.saturating_sub(image.storage().length()));
    let needed = needs.growth + beside(path, image, needs.growth, incs);
    let all = [(needed.saturating_add(needs.moved), free), (needed, may_grow.unwrap_or(u64::MAX))];
    match all.into_iter().find(|(needed, available)| needed > available) {
        Some((needed, available)) => Err(Error::NoSpace { path: path.to_owned(), needed, available }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::CompressedCluster;

    #[test]
    fn only_whole_blocks_of_an_inc_are_taken_as_they_are() {
        const K: u64 = 1 << 10;
        let plain = |guest, host| Piece { guest, layer: 0, bytes: Bytes::Plain(HostOffset(host)) };
        let data = CompressedCluster { host: HostOffset(320 * K), length: 512 };
        let compressed = Bytes::Compressed { cluster: GuestOffset(192 * K), data };
        let moved = |data: &[Piece], zeroes: &[Range<u64>], bits, block| {
            let found = Changes { data: data.to_vec(), zeroes: zeroes.to_vec() };
            moved_bytes(&found, Geometry::new(bits, false).unwrap(), block)
        };
        assert_eq!(moved(&[plain(0..64 * K, 64 * K)], &[], 16, 4 * K), 0);
        // a part of a block, and blocks that begin elsewhere
        assert_eq!(moved(&[plain(64 * K..65 * K, 128 * K)], &[], 16, 4 * K), 4 * K);
        assert_eq!(moved(&[plain(0..64 * K, 64 * K + 512)], &[], 16, 4 * K), 64 * K);
        assert_eq!(moved(&[Piece { guest: 192 * K..256 * K, layer: 0, bytes: compressed }], &[], 16, 4 * K), 64 * K);
        // blocks that are larger than what is written
        assert_eq!(moved(&[plain(0..64 * K, 64 * K)], &[], 16, 128 * K), 128 * K);
        assert_eq!(moved(&[plain(0..4 * K, 64 * K)], &[], 9, 4 * K), 8 * 4 * K);
        assert_eq!(moved(&[], &[0..64 * K, 100..200], 16, 4 * K), 2 * 4 * K);
    }
}
