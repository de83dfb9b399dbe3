//! All that a check has found, counted.

use super::finding::{Finding, Severity};
use super::roots::REFCOUNT_TABLE;
use crate::qcow2::address::HostOffset;

/// Findings that a report keeps; all are counted.
pub(super) const FINDINGS_KEPT: usize = 100;

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// The dirty bit is set: a program with lazy refcounts did not close the image, so refcounts and COPIED flags
    /// may well be wrong. [`Report::is_corrupt`] does not count them then.
    pub dirty: bool,
    /// The corrupt bit is set: some program found damage before.
    pub marked_corrupt: bool,
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Refcounts that are too low and COPIED flags that do not fit the refcount.
    pub refcount_errors: u64,
    /// Damaged tables.
    pub structure_errors: u64,
    /// Those of them for which QEMU does not open the image, but which no read of the disk needs.
    pub unopenable: u64,
    /// The first findings.
    pub findings: Vec<Finding>,
    /// Something that is not the refcount table ends beyond the end of the file.
    pub beyond_end: bool,
    /// Guest clusters.
    pub clusters: ClusterCounts,
    /// Behind the last cluster that has a refcount or a reference.
    pub image_end_offset: HostOffset,
}

/// Guest clusters of the active disk and its VM state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClusterCounts {
    /// Those of the disk.
    pub total: u64,
    /// Those that have a host cluster.
    pub allocated: u64,
    /// Those of them that are compressed.
    pub compressed: u64,
    /// Those that do not follow their neighbour in the file; compressed ones always count.
    pub fragmented: u64,
}

impl Report {
    /// What `qemu-img check` calls corruptions: everything but leaks.
    #[must_use]
    pub fn corruptions(&self) -> u64 {
        self.refcount_errors + self.structure_errors
    }

    /// Whether something is wrong that an image in good order cannot have. Wrong refcounts count only where the
    /// image is not dirty: that is what the dirty bit announces.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.structure_errors > 0 || (self.refcount_errors > 0 && !self.dirty)
    }

    /// Whether the image is corrupt in a way that may harm who only reads the disk.
    #[must_use]
    pub fn harms_reads(&self) -> bool {
        self.structure_errors > self.unopenable || (self.refcount_errors > 0 && !self.dirty)
    }

    /// The first finding of the worst that there are, where the image is corrupt. Of very many findings not all are kept.
    #[must_use]
    pub fn worst(&self) -> Option<&Finding> {
        let worst = if self.structure_errors > 0 { Severity::Structure } else { Severity::Refcount };
        let all = || self.findings.iter().filter(|finding| self.is_corrupt() && finding.severity() >= worst);
        all().find(|finding| !matches!(finding, Finding::Unopenable(_))).or_else(|| all().next())
    }

    /// Whether space is lost.
    #[must_use]
    pub fn has_leaks(&self) -> bool {
        self.leaks > 0
    }

    /// Findings that were counted but not kept.
    #[must_use]
    pub fn findings_dropped(&self) -> u64 {
        self.corruptions() + self.leaks - self.findings.len() as u64
    }

    pub(super) fn add(&mut self, finding: impl Into<Finding>) {
        self.add_all(finding.into(), 1);
    }

    /// Counts so many findings of a kind, of which this is the first.
    pub(super) fn add_all(&mut self, finding: Finding, times: u64) {
        let counter = match finding.severity() {
            Severity::Leak => &mut self.leaks,
            Severity::Refcount => &mut self.refcount_errors,
            Severity::Structure => &mut self.structure_errors,
        };
        *counter = counter.saturating_add(times);
        if matches!(finding, Finding::Unopenable(_)) {
            self.unopenable = self.unopenable.saturating_add(times);
        }
        // refcounts can be made again, what else was cut off is lost
        self.beyond_end |= matches!(finding, Finding::BeyondEnd { what, .. } if what != REFCOUNT_TABLE);
        if times > 0 && self.findings.len() < FINDINGS_KEPT {
            self.findings.push(finding);
        }
    }
}
