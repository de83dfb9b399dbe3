//! Ranges of a disk whose clusters in the file have a second owner: another range, or a table. Only one of the two can be
//! right, and what the wrong one holds can be read all the same.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::errors;
use crate::qcow2::{self, CheckLimits, Content, Finding, HostOffset, Image, MapBuffer, Severity};
use crate::restore::bits::Bits;
use crate::restore::error::{Error, Result};
use crate::restore::layer::Layer;
use crate::restore::observer::{Observer, Uncounted, Warning, observed};
use crate::restore::pool;
use crate::restore::resolve::Mapped;
use crate::restore::slices::Slices;
use crate::storage::{BlockSet, to_usize};

/// Clusters of a file that are looked at: three bits for each make 48 MiB. What lies behind them counts as shared.
const CLUSTERS: u64 = 1 << 27;

/// Who uses the clusters of a file.
struct Owners {
    cluster: u64,
    /// Tables, or plain data of one guest cluster.
    one: Bits,
    /// Plain data, and something else.
    two: Bits,
    /// Compressed data, of any number.
    compressed: Bits,
    found: AtomicBool,
}

/// Finds these ranges of an image that may be damaged, and has the layer remember them. Where checksums say that the image is
/// as it was made there are none.
pub(super) fn find(layer: &Layer, observer: &dyn Observer) -> Result<()> {
    let (Some(image), Some(tolerance)) = (layer.image(), layer.tolerance()) else { return Ok(()) };
    if image.header().has_data_file() || tolerance.file.as_ref().is_some_and(|file| file.is_as_made()) {
        return Ok(());
    }
    tell_damage(layer, image, observer)?;
    let owners = Owners::of(layer, image);
    walk(layer, image, observer, &|_, content| owners.enter(content))?;
    if owners.found.load(Ordering::Relaxed) {
        walk(layer, image, observer, &|guest, content| {
            if owners.is_shared(content) {
                tolerance.shared().insert(guest, ());
            }
        })?;
    }
    Ok(())
}

/// Tells of tables that cannot be right: which part of the disk that costs, they do not say.
fn tell_damage(layer: &Layer, image: &Image, observer: &dyn Observer) -> Result<()> {
    let report = match observed(&Uncounted(observer), |each| image.check(CheckLimits::default(), each)) {
        Ok(report) => report,
        Err(qcow2::Error::Cancelled) => return Err(Error::Cancelled),
        Err(error) => {
            let (path, reason) = (layer.path().to_owned(), errors::line(&error));
            observer.warning(Warning::UncheckedTables { path, reason });
            return Ok(());
        }
    };
    // what lies behind the end of the file is listed, and what only QEMU refuses is no contradiction
    let contradicts = |finding: &&Finding| {
        let is_structure = finding.severity() == Severity::Structure;
        is_structure && !matches!(finding, Finding::BeyondEnd { .. } | Finding::Unopenable(_))
    };
    if let Some(first) = report.findings.iter().find(contradicts) {
        let (path, first) = (layer.path().to_owned(), Box::new(first.clone()));
        observer.warning(Warning::DamagedTables { path, first });
        return Ok(());
    }
    // refcounts that are wrong in other ways, or of an image that was not closed, say nothing
    let is_lost = |finding: &&Finding| matches!(finding, Finding::Leak { .. });
    let lost =
        report.findings.iter().find(is_lost).filter(|_| report.corruptions() == report.unopenable && !report.dirty);
    if let Some(first) = lost {
        observer.warning(Warning::LostClusters { path: layer.path().to_owned(), first: Box::new(first.clone()) });
    }
    Ok(())
}

/// Calls `each` for each guest cluster with data, once.
fn walk(
    layer: &Layer,
    image: &Image,
    observer: &dyn Observer,
    each: &(dyn Fn(Range<u64>, &Content) + Sync),
) -> Result<()> {
    let cluster = image.header().geometry.cluster_size();
    pool::for_each(Slices::new(image.size(), image.occupied()).ranges(), MapBuffer::default, |buffer, slice| {
        observer.go_on()?;
        let mut done = slice.start;
        layer.map(slice, buffer, &mut |extent| {
            let Content::Data(host) = extent.content else {
                if matches!(extent.content, Content::Compressed { .. }) {
                    each(extent.guest, &extent.content);
                }
                return;
            };
            // a cluster may come in parts
            let first = extent.guest.start / cluster * cluster;
            let host = host.0 - (extent.guest.start - first);
            for start in (first.max(done)..extent.guest.end).step_by(to_usize(cluster)) {
                let guest = start..(start + cluster).min(image.size());
                each(guest, &Content::Data(HostOffset(host + (start - first))));
                done = start + cluster;
            }
        })
    })
}

impl Owners {
    /// With the tables of an image. Whoever's L2 table lies on another table has not a byte that is certain.
    fn of(layer: &Layer, image: &Image) -> Self {
        let cluster = image.header().geometry.cluster_size();
        let clusters = image.storage().length().div_ceil(cluster).min(CLUSTERS);
        let bits = || Bits::new(clusters);
        let (one, two, compressed) = (bits(), bits(), bits());
        let mut metadata = Vec::new();
        let overlaps = BlockSet::default();
        // refcounts that are lost cannot tell
        image.add_metadata(&mut metadata).ok();
        for table in metadata {
            for number in table.start / cluster..table.end.div_ceil(cluster).min(clusters) {
                if one.set(number) {
                    overlaps.insert(number..number + 1);
                }
            }
        }
        for (index, _) in image.l1().tables().filter(|(_, table)| overlaps.contains(table.0 / cluster)) {
            let coverage = image.header().geometry.l2_coverage();
            let range = index * coverage..(index + 1).saturating_mul(coverage).min(image.size());
            if let Some(tolerance) = layer.tolerance().filter(|_| !range.is_empty()) {
                tolerance.shared().insert(range, ());
            }
        }
        Self { cluster, one, two, compressed, found: AtomicBool::new(false) }
    }

    /// The clusters of the file that are used.
    fn clusters(&self, content: &Content) -> Range<u64> {
        let bytes = match content {
            Content::Data(host) => host.0..host.0.saturating_add(self.cluster),
            Content::Compressed { data, .. } => data.host.0..data.host.0.saturating_add(data.length),
            Content::Unallocated | Content::Zero => 0..0,
        };
        bytes.start / self.cluster..bytes.end.div_ceil(self.cluster)
    }

    fn enter(&self, content: &Content) {
        let is_plain = matches!(content, Content::Data(_));
        for number in self.clusters(content) {
            if !is_plain {
                self.compressed.set(number);
            } else if self.one.set(number) {
                self.two.set(number);
            }
            // of two threads, the later sees what both have set
            if self.has_other(number, is_plain) {
                self.found.store(true, Ordering::Relaxed);
            }
        }
    }

    fn is_shared(&self, content: &Content) -> bool {
        let is_plain = matches!(content, Content::Data(_));
        self.clusters(content).any(|number| self.has_other(number, is_plain))
    }

    /// Whether a cluster has another owner than the one with plain data, or than those with compressed data.
    fn has_other(&self, number: u64, is_plain: bool) -> bool {
        let has_other =
            if is_plain { self.two.get(number) || self.compressed.get(number) } else { self.one.get(number) };
        has_other || number >= CLUSTERS
    }
}
