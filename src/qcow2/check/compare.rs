//! Holds counted references against stored refcounts.

use std::ops::Range;

use super::counters::{COUNT_MAX, Counted, Counter};
use super::finding::Finding;
use super::report::{FINDINGS_KEPT, Report};
use super::stored::Stored;
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::Result;
use crate::qcow2::geometry::Geometry;

/// Reports every cluster of a range whose refcount is not the number of its references, and metadata that is used twice.
/// Of what is behind the `clusters` of the file, only what something refers to.
pub(super) fn compare(
    range: Range<u64>,
    counted: &Counted<'_>,
    stored: &Stored<'_>,
    clusters: u64,
    geometry: Geometry,
    report: &mut Report,
) -> Result<()> {
    stored.runs(range, &mut |run, refcount| {
        counted.runs(run, &mut |mut run, counter| {
            if counter.references() == 0 {
                run.end = run.end.min(clusters);
            }
            if !run.is_empty() {
                judge(&run, refcount, counter, geometry, report);
            }
            Ok(())
        })
    })
}

/// A run of clusters with one refcount and one counter.
fn judge(run: &Range<u64>, refcount: Option<u64>, found: Counter, geometry: Geometry, report: &mut Report) {
    let counted = u64::from(found.references());
    if counted == 0 && refcount.is_none_or(|refcount| refcount == 0) {
        return;
    }
    report.image_end_offset = HostOffset(run.end << geometry.cluster_bits());
    let offset = |cluster: u64| HostOffset(cluster << geometry.cluster_bits());
    let wrong = |cluster: u64| {
        let cluster = offset(cluster);
        match refcount {
            Some(stored) if stored < counted => Some(Finding::RefcountTooLow { cluster, stored, counted }),
            // a counter at its end says "at least"
            Some(stored) if stored > counted && found.references() < COUNT_MAX => {
                Some(Finding::Leak { cluster, stored, counted })
            }
            _ => None,
        }
    };
    let overlap = |cluster: u64| found.overlaps().then_some(Finding::Overlap { cluster: offset(cluster) });
    let told = run.end.min(run.start.saturating_add(FINDINGS_KEPT as u64));
    for cluster in run.start..told {
        wrong(cluster).into_iter().chain(overlap(cluster)).for_each(|finding| report.add(finding));
    }
    // no more are kept
    for finding in wrong(told).into_iter().chain(overlap(told)) {
        report.add_all(finding, run.end - told);
    }
}
