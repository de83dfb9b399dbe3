//! All references of an image as a header says it that need not be in it yet, for refcounts that are made new.

use std::ops::{ControlFlow, Range};

use super::counters::{COUNT_MAX, Counters};
use super::finding::{Finding, Severity};
use super::report::{ClusterCounts, Report};
use super::roots::Roots;
use super::walk::Walk;
use super::{CheckLimits, Observe, Progress};
use crate::qcow2::address::HostOffset;
use crate::qcow2::entry::EntryRules;
use crate::qcow2::error::Result;
use crate::qcow2::header::Header;
use crate::storage::Storage;

/// Counts window by window.
pub(in crate::qcow2) struct Recount<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    /// Where the refcount blocks are.
    blocks: &'a [HostOffset],
    limits: CheckLimits,
    roots: Roots,
    damaged: bool,
}

/// A part of the file, and who refers to its clusters.
pub(in crate::qcow2) struct Window<'a, 'b> {
    recount: &'a mut Recount<'b>,
    counters: Counters,
    observe: &'a mut Observe<'b>,
}

impl<'a> Recount<'a> {
    pub(in crate::qcow2) fn read(
        storage: &'a dyn Storage,
        header: &'a Header,
        blocks: &'a [HostOffset],
        limits: CheckLimits,
    ) -> Result<Self> {
        let mut report = Report::default();
        let roots = Roots::read(storage, header, &mut report)?;
        Ok(Self { storage, header, blocks, limits, roots, damaged: report.structure_errors > 0 })
    }

    /// Whether a table or an entry is damaged, as far as it was counted.
    pub(in crate::qcow2) fn is_damaged(&self) -> bool {
        self.damaged
    }

    /// Calls `each` for windows that begin and end between refcount blocks; those that nothing refers to are left out.
    pub(in crate::qcow2) fn windows(
        &mut self,
        observer: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
        mut each: impl FnMut(&mut Window<'_, 'a>) -> Result<()>,
    ) -> Result<()> {
        let geometry = self.header.geometry;
        let unit = (geometry.cluster_size() * 8) >> self.header.refcount_order;
        let size = (self.limits.window / unit).max(1) * unit;
        let clusters = geometry.clusters(self.storage.length());
        let end = (clusters + 1).next_multiple_of(unit);
        let (length, passes) = (self.storage.length(), clusters.div_ceil(size));
        // each window may be walked twice
        let mut observe = Observe { observer, pass: 0, passes: passes * 2, length };
        let mut start = Some(0);
        while let Some(first) = start {
            let mut counters = Counters::new(first..first.saturating_add(size).min(end))?;
            self.count(&mut counters, first == 0, &mut observe)?;
            start = counters.next().map(|next| next / unit * unit).filter(|next| *next < clusters);
            each(&mut Window { recount: self, counters, observe: &mut observe })?;
            observe.pass = start.unwrap_or_default() / size * 2;
        }
        Ok(())
    }

    fn count(&mut self, counters: &mut Counters, first: bool, observe: &mut Observe<'_>) -> Result<()> {
        let mut damaged = false;
        self.walk(counters, first, observe, &mut |finding| damaged |= finding.severity() == Severity::Structure)?;
        self.damaged |= damaged;
        Ok(())
    }

    fn walk(
        &self,
        counters: &mut Counters,
        first: bool,
        observe: &mut Observe<'_>,
        found: &mut dyn FnMut(Finding),
    ) -> Result<()> {
        let (storage, header, rules) = (self.storage, self.header, EntryRules::of(self.header));
        let clusters = &mut ClusterCounts::default();
        let mut walk = Walk { storage, header, rules, counters, clusters, found, first };
        walk.run(&self.roots, self.blocks, self.limits, observe)
    }
}

impl Window<'_, '_> {
    /// The clusters.
    pub(in crate::qcow2) fn range(&self) -> Range<u64> {
        self.counters.window()
    }

    /// References to a cluster; `None` where they are too many to be counted.
    pub(in crate::qcow2) fn references(&mut self, cluster: u64) -> Option<u64> {
        let (references, overlap) = self.counters.get(cluster);
        self.recount.damaged |= overlap;
        (references < COUNT_MAX).then_some(u64::from(references))
    }

    /// Calls `each` with the place of every L2 entry of the active disk that leads into this window and whose COPIED flag
    /// is wrong, and with what it is. Nothing is known of references any more then.
    pub(in crate::qcow2) fn wrong_flags(&mut self, each: &mut dyn FnMut(HostOffset, bool)) -> Result<()> {
        for cluster in self.range() {
            if self.counters.get(cluster).0 == 1 {
                self.counters.store_one(cluster);
            }
        }
        let Self { recount, counters, observe } = self;
        observe.pass += 1;
        recount.walk(counters, false, observe, &mut |finding| {
            if let Finding::Copied { table: "L2", entry, copied, .. } = finding {
                each(entry, copied);
            }
        })
    }
}
