//! All references of an image as a header says it that need not be in it yet, for refcounts that are made new.

use std::ops::{ControlFlow, Range};

use super::counters::{COUNT_MAX, Counted, Counter, Counters};
use super::finding::{Finding, Severity};
use super::report::{ClusterCounts, Report};
use super::roots::Roots;
use super::spans::Spans;
use super::walk::Walk;
use super::{CheckLimits, Observe, Progress};
use crate::qcow2::address::HostOffset;
use crate::qcow2::entry::EntryRules;
use crate::qcow2::error::Result;
use crate::qcow2::header::Header;
use crate::storage::Storage;

/// Counts as many clusters at a time as memory permits.
pub(in crate::qcow2) struct Recount<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    /// Where the refcount blocks are.
    blocks: &'a [HostOffset],
    limits: CheckLimits,
    roots: Roots,
    spans: Spans,
    damaged: bool,
}

/// A part of the file, and who refers to its clusters.
pub(in crate::qcow2) struct Window<'a, 'b> {
    recount: &'a Recount<'b>,
    counted: &'a Counted<'a>,
    range: Range<u64>,
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
        let spans = Spans::of(&roots, header.geometry);
        Ok(Self { storage, header, blocks, limits, roots, spans, damaged: report.structure_errors > 0 })
    }

    /// Whether a table or an entry is damaged, as far as it was counted.
    pub(in crate::qcow2) fn is_damaged(&self) -> bool {
        self.damaged
    }

    /// Calls `each` for windows that follow each other from the first cluster on, up to the end of the file.
    pub(in crate::qcow2) fn windows(
        &mut self,
        observer: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
        mut each: impl FnMut(&mut Window<'_, 'a>) -> Result<()>,
    ) -> Result<()> {
        let geometry = self.header.geometry;
        let length = self.storage.length();
        let mut observe = Observe { observer, start: 0, share: 0, length };
        let clusters = geometry.clusters(length);
        let mut first = 0;
        while first <= clusters {
            observe.pass(first << geometry.cluster_bits(), self.limits.window.saturating_mul(geometry.cluster_size()));
            // each window may be walked twice
            observe.share /= 2;
            let mut damaged = false;
            let mut counters = Counters::new(&self.spans, first, self.limits.window)?;
            let found = &mut |finding: Finding| damaged |= finding.severity() == Severity::Structure;
            self.walk(&mut counters, first == 0, &mut observe, found, &mut |_| Ok(None))?;
            let counted = counters.finish();
            let range = first..counted.below().min(clusters + 1);
            counted.runs(range.clone(), &mut |_, counter| {
                damaged |= counter.overlaps();
                Ok(())
            })?;
            first = range.end.max(first + 1);
            each(&mut Window { recount: self, counted: &counted, range, observe: &mut observe })?;
            self.damaged |= damaged;
        }
        Ok(())
    }

    fn walk(
        &self,
        counters: &mut Counters<'_>,
        first: bool,
        observe: &mut Observe<'_>,
        found: &mut dyn FnMut(Finding),
        is_one: &mut dyn FnMut(u64) -> Result<Option<bool>>,
    ) -> Result<()> {
        let (storage, header, rules) = (self.storage, self.header, EntryRules::of(self.header));
        let clusters = &mut ClusterCounts::default();
        let mut walk = Walk { storage, header, rules, counters, clusters, found, first, is_one };
        walk.run(&self.roots, self.blocks, self.limits, observe)
    }
}

impl Window<'_, '_> {
    /// The clusters.
    pub(in crate::qcow2) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// References to a cluster; `None` where they are too many to be counted.
    pub(in crate::qcow2) fn references(&self, cluster: u64) -> Option<u64> {
        references(self.counted.get(cluster))
    }

    /// Calls `each` for the clusters of a range that something refers to, those with as many references together.
    pub(in crate::qcow2) fn runs(
        &self,
        range: Range<u64>,
        mut each: impl FnMut(Range<u64>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        self.counted.runs(range, &mut |run, counter| {
            if counter.references() > 0 { each(run, references(counter)) } else { Ok(()) }
        })
    }

    /// Calls `each` with the place of every L2 entry of the active disk that leads into this window and whose COPIED flag
    /// is wrong, and with what it is.
    pub(in crate::qcow2) fn wrong_flags(&mut self, each: &mut dyn FnMut(HostOffset, bool)) -> Result<()> {
        let Self { recount, counted, range, observe } = self;
        observe.start += observe.share;
        let mut none = Counters::new(&recount.spans, u64::MAX, 0)?;
        let found = &mut |finding: Finding| {
            if let Finding::Copied { table: "L2", entry, copied, .. } = finding {
                each(entry, copied);
            }
        };
        let is_one = &mut |cluster| Ok(range.contains(&cluster).then(|| counted.get(cluster).references() == 1));
        recount.walk(&mut none, false, observe, found, is_one)
    }
}

fn references(counter: Counter) -> Option<u64> {
    (counter.references() < COUNT_MAX).then_some(u64::from(counter.references()))
}
