//! What a FULL keeps of clusters of which only a part changes, where they get another place.
//!
//! It is read to be copied, so it must be right before the FULL is a mixture: what cannot be read would end the work each
//! time that it is done again, and what is damaged would get checksums that fit.

use std::ops::Range;

use crate::qcow2::{ClusterReader, Content, Geometry, HostOffset, MapBuffer};
use crate::restore::commit::apply;
use crate::restore::error::{Error, Result};
use crate::restore::layer::Layer;
use crate::restore::observer::Observer;
use crate::restore::pool;
use crate::restore::resolve::{Changes, Mapped, changes};
use crate::storage::to_usize;

/// What one thread reads with.
#[derive(Default)]
struct Scratch {
    changes: MapBuffer,
    full: MapBuffer,
    clusters: ClusterReader,
    bytes: Vec<u8>,
}

/// Reads what groups of layers leave of such clusters of a FULL, which compares it where its storage does. With `snapshots`
/// one is made before the first group and after each.
///
/// # Errors
/// What cannot be read or inflated; [`Error::Checksum`]; [`Error::Cancelled`].
pub(super) fn check(full: &Layer, groups: &[&[Layer]], snapshots: bool, observer: &dyn Observer) -> Result<()> {
    let Some(image) = full.image() else { return Ok(()) };
    let geometry = image.header().geometry;
    let shared = snapshots || image.header().nb_snapshots > 0;
    let mut size = image.size();
    for layers in groups {
        let before = size;
        size = layers.last().map_or(size, Mapped::size);
        let ends = [before, size].map(|end| end..end);
        read(full, &cut(&ends, geometry), shared, &mut Scratch::default())?;
        pool::for_each(
            apply::slices(layers, size, || Ok::<_, Error>(image.occupied()))?.ranges(),
            Scratch::default,
            |scratch, guest| {
                observer.go_on()?;
                let found = changes(layers, guest, &mut scratch.changes)?;
                read(full, &cut(&changed(&found), geometry), shared, scratch)
            },
        )?;
    }
    Ok(())
}

/// The ranges that are changed at once: each of zeroes by itself, and runs of data.
fn changed(found: &Changes) -> Vec<Range<u64>> {
    let runs = found.data.chunk_by(|one, next| one.guest.end == next.guest.start);
    let runs = runs.filter_map(|run| Some(run.first()?.guest.start..run.last()?.guest.end));
    runs.chain(found.zeroes.iter().cloned()).collect()
}

/// The clusters in which ranges begin or end, not at their ends: in order, each once.
fn cut(ranges: &[Range<u64>], geometry: Geometry) -> Vec<u64> {
    let unit = geometry.cluster_size();
    let ends = ranges.iter().flat_map(|range| [range.start, range.end]);
    let mut cut: Vec<u64> = ends.filter(|end| end % unit != 0).map(|end| end / unit).collect();
    cut.sort_unstable();
    cut.dedup();
    cut
}

/// Reads those of some clusters that get another place: compressed ones, and those that a snapshot shares.
fn read(full: &Layer, clusters: &[u64], shared: bool, scratch: &mut Scratch) -> Result<()> {
    let Some(image) = full.image() else { return Ok(()) };
    let unit = image.header().geometry.cluster_size();
    let clusters = clusters.iter().map(|cluster| cluster * unit..((cluster + 1) * unit).min(image.size()));
    for guest in clusters.filter(|guest| !guest.is_empty()) {
        let mut found = Vec::new();
        full.map(guest, &mut scratch.full, &mut |extent| found.push(extent))?;
        for extent in found {
            match extent.content {
                Content::Compressed { cluster, data } => {
                    let inflated = scratch.clusters.read(image, cluster, data);
                    inflated.map_err(Error::image(full.path()))?;
                }
                Content::Data(HostOffset(host)) if shared => {
                    scratch.bytes.resize(to_usize(extent.guest.end - extent.guest.start), 0);
                    let read = image.storage().read_exact_at(&mut scratch.bytes, host);
                    read.map_err(|source| full.read_error(host, source))?;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_cut_where_a_range_begins_or_ends_within_it() {
        let geometry = Geometry::new(12, false).unwrap();
        let ranges = [0..4096, 5000..8192, 12288..16384, 16385..16386, 40960..40960, 50000..50000];
        assert_eq!(cut(&ranges, geometry), [1, 4, 12]);
    }
}
