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
use crate::storage::{HOLE_MIN, LastHole, shares_blocks};

/// What a commit writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Needs {
    /// Guest bytes.
    pub(super) bytes: u64,
    /// The most bytes that the image may need in addition to what it has.
    pub(super) growth: u64,
}

/// What one group changes in a slice of the disk.
struct Slice {
    bytes: u64,
    /// Clusters that need a place of their own.
    clusters: u64,
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
    let failed = |source| Error::Image { path: path.to_owned(), source };
    let header = full.header();
    let geometry = header.geometry;
    let cluster = geometry.cluster_size();
    // what a snapshot holds is never overwritten
    let shared = snapshots || header.nb_snapshots > 0;
    // blocks that are shared with another file, or copied on every write, are not overwritten either
    let copies = full.storage().as_file().is_some_and(|file| shares_blocks(file, file));
    let (mut bytes, mut clusters, mut most_tables, mut size) = (0, 0, 0, header.size);
    for (at, layers) in groups.iter().enumerate() {
        size = size.max(layers.last().map_or(0, Mapped::size));
        let earlier = groups.get(..at).unwrap_or_default().iter().copied().flatten();
        let below = || Ok::<_, Error>(full.occupied().into_iter().chain(earlier.flat_map(Layer::occupied)).collect());
        let slices = apply::slices(layers, size, below)?;
        let look = |(buffer, below): &mut (MapBuffer, MapBuffer), guest| {
            if observer.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let found = changes(layers, guest, buffer)?;
            let touched = touched(&found, geometry);
            let tables = tables(&found, geometry);
            let clusters = if shared {
                touched.len() as u64
            } else {
                let anew = if copies { written(&found, geometry) } else { Vec::new() };
                let rest: Vec<u64> = touched.into_iter().filter(|at| anew.binary_search(at).is_err()).collect();
                anew.len() as u64 + missing(full, &rest, geometry, below).map_err(failed)?
            };
            let bytes = found.data.iter().map(|piece| piece.guest.end - piece.guest.start).sum();
            Ok(Slice { bytes, clusters, tables })
        };
        // neighbours may change the same table
        let (mut tables, mut last) = (0, None);
        pool::in_order(slices.ranges(), Default::default, look, |slice| {
            bytes += slice.bytes;
            clusters += slice.clusters;
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
        clusters += most_tables + full.l1().indices().count() as u64;
    }
    let length = full.storage().length() + clusters * cluster;
    clusters += refcounts(length, full) * if snapshots { 3 } else { 1 };
    Ok(Needs { bytes, growth: clusters * cluster })
}

/// The clusters that get bytes, not blocks that an INC has already.
fn written(found: &Changes, geometry: Geometry) -> Vec<u64> {
    let block = HOLE_MIN as u64;
    let has_blocks = |piece: &&Piece| match piece.bytes {
        Bytes::Plain(HostOffset(host)) => (host | piece.guest.start | piece.guest.end) % block == 0,
        Bytes::Compressed { .. } => false,
    };
    let is_small = geometry.cluster_size() < block;
    let bytes = found.data.iter().filter(|piece| is_small || !has_blocks(piece)).cloned();
    plan::touched(&bytes.collect::<Vec<_>>(), geometry)
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

/// Refuses what has no room for an image that grows by so many bytes, and for what is written beside it.
pub(super) fn check(path: &Path, image: &Image, growth: u64, incs: usize) -> Result<()> {
    let needed = growth + beside(path, image, growth, incs);
    let system =
        rustix::fs::statvfs(path).map_err(|error| Error::Open { path: path.to_owned(), source: error.into() })?;
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    let may_grow = getrlimit(Resource::Fsize).current.map(|most| most.saturating_sub(image.storage().length()));
    let available = may_grow.map_or(free, |most| most.min(free));
    if needed > available {
        return Err(Error::NoSpace { path: path.to_owned(), needed, available });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::CompressedCluster;

    #[test]
    fn only_whole_blocks_of_an_inc_need_no_others() {
        const K: u64 = 1 << 10;
        let plain = |guest, host| Piece { guest, layer: 0, bytes: Bytes::Plain(HostOffset(host)) };
        let data = CompressedCluster { host: HostOffset(320 * K), length: 512 };
        let compressed = Bytes::Compressed { cluster: GuestOffset(192 * K), data };
        let data = vec![
            plain(0..64 * K, 64 * K),
            plain(64 * K..65 * K, 128 * K),
            plain(128 * K..192 * K, 192 * K + 512),
            Piece { guest: 192 * K..256 * K, layer: 0, bytes: compressed },
        ];
        let found = Changes { data, zeroes: Vec::new() };
        assert_eq!(written(&found, Geometry::new(16, false).unwrap()), [1, 2, 3]);
        assert_eq!(written(&found, Geometry::new(9, false).unwrap()).len(), (128 + 2) + 128 + 128);
    }
}
