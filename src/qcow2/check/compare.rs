//! Holds counted references against stored refcounts.

use super::counters::{COUNT_MAX, Counters};
use super::finding::Finding;
use super::report::Report;
use super::stored::Stored;
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::Result;
use crate::qcow2::geometry::Geometry;

/// Reports every cluster of the window whose refcount is not the number of its references, and metadata that is
/// used twice.
pub(super) fn compare(
    counters: &mut Counters,
    stored: &Stored<'_>,
    clusters: u64,
    geometry: Geometry,
    report: &mut Report,
) -> Result<()> {
    stored.for_each(counters.window(), |index, refcount| {
        let (references, overlap) = counters.get(index);
        // behind the end of the file only what something refers to
        let refcount = refcount.filter(|_| index < clusters || references > 0);
        if references == 0 && refcount.is_none_or(|refcount| refcount == 0) {
            return;
        }
        report.image_end_offset = HostOffset((index + 1) * geometry.cluster_size());
        let (cluster, counted) = (HostOffset(index * geometry.cluster_size()), u64::from(references));
        match refcount {
            Some(stored) if stored < counted => report.add(Finding::RefcountTooLow { cluster, stored, counted }),
            // a counter at its end says "at least"
            Some(stored) if stored > counted && references < COUNT_MAX => {
                report.add(Finding::Leak { cluster, stored, counted });
            }
            _ => {}
        }
        if overlap {
            report.add(Finding::Overlap { cluster });
        }
    })
}
