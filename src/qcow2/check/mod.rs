//! What `qemu-img check` looks for, without writing: do refcounts and references agree, and are the tables sound?
//!
//! ```text
//! roots ──> walk ──> counters ──┐
//!                               ├──> compare ──> report
//! refcount table ──> stored ────┘
//! ```
//!
//! Only so many clusters are counted at a time, and L2 tables are walked in batches, so memory stays below 64 MiB for an
//! image of any size. Each table is read once in a pass, however often the image refers to it; what is a hole in the file
//! is not read, and what nothing refers to is not looked at. So time goes with what the tables hold, whatever the image
//! claims, and however long its file is; a pass counts the clusters of 448 GiB, where they are of the usual size and
//! beside each other.
//!
//! Stricter than QEMU, since a backup that was cut must not pass: L2 tables and refcount blocks must be whole in the
//! file, and data must be there up to the last sector that the disk has of it. Also metadata clusters must not be
//! shared even where the refcounts say so, the zero flag is damage in version 2 and with extended L2 entries, and in
//! an external data file guest and host offsets must agree.

mod compare;
mod counters;
mod finding;
mod l2;
mod recount;
mod report;
mod roots;
mod spans;
mod stored;
mod tables;
mod walk;

use std::ops::ControlFlow;

pub use finding::{Finding, Severity};
pub(super) use recount::{Recount, Window};
pub use report::{ClusterCounts, Report};
pub(super) use roots::Roots;
pub(super) use stored::Stored;

use self::compare::compare;
use self::counters::Counters;
use self::spans::Spans;
use self::stored::Lookup;
use self::walk::Walk;
use super::entry::EntryRules;
use super::error::{Error, Result};
use super::header::Header;
use super::image::Image;
use crate::storage::Storage;

/// How far a check has come, in bytes of the file; several passes over a very large file count as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// The most that a check holds in memory at a time. The report is the same for any numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckLimits {
    /// Host clusters that are counted, for four bytes each; 7 Mi by default. Where they lie apart it is fewer.
    pub window: u64,
    /// L2 tables; 256 Ki by default.
    pub tables: usize,
}

impl Default for CheckLimits {
    fn default() -> Self {
        Self { window: 7 << 20, tables: 256 << 10 }
    }
}

/// Checks an image. Damage becomes findings of the report; only a header that cannot be read is an error.
///
/// Neither backing nor data files are opened. `observer` hears how far the check has come and may end it.
///
/// # Errors
/// What is wrong with the header, [`Error::Cancelled`], [`Error::Memory`], [`Error::Io`].
pub fn check(storage: &dyn Storage, observer: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<Report> {
    check_apart(storage, storage, observer)
}

/// Checks an image of which refcounts are read from another storage than all else, which may be stricter.
///
/// # Errors
/// As [`check`].
pub(crate) fn check_apart(
    storage: &dyn Storage,
    refcounts: &dyn Storage,
    observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Report> {
    check_header(storage, refcounts, &Header::read_to_check(storage)?, CheckLimits::default(), observer)
}

impl Image {
    /// Checks the image, as [`check`] does, with limits of the caller's choice. Images that are damaged so much that
    /// they cannot be opened need [`check`].
    ///
    /// # Errors
    /// As [`check`].
    pub fn check(&self, limits: CheckLimits, observer: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<Report> {
        check_header(self.storage(), self.storage(), self.header(), limits, observer)
    }

    /// The highest refcount of all clusters.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn highest_refcount(&self) -> Result<u64> {
        let stored = Stored::read(self.storage(), self.header(), &mut Report::default())?;
        let mut highest = 0;
        let clusters = self.header().geometry.clusters(self.storage().length());
        stored.runs(0..clusters, &mut |_, refcount| {
            highest = refcount.unwrap_or_default().max(highest);
            Ok(())
        })?;
        Ok(highest)
    }
}

fn check_header(
    storage: &dyn Storage,
    refcounts: &dyn Storage,
    header: &Header,
    limits: CheckLimits,
    observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Report> {
    let geometry = header.geometry;
    let rules = EntryRules::of(header);
    let mut report = Report { dirty: header.is_dirty(), marked_corrupt: header.is_corrupt(), ..Report::default() };
    report.clusters.total = geometry.clusters(header.size);
    header.check_refcount_table().unwrap_or_else(|invalid| report.add(Finding::Unopenable(invalid)));
    let roots = Roots::read(storage, header, &mut report)?;
    let stored = Stored::read(refcounts, header, &mut report)?;
    let clusters = geometry.clusters(storage.length());
    let window = limits.window.min(clusters.max(CheckLimits::default().window));
    let spans = Spans::of(&roots, geometry);
    let mut lookup = Lookup::new(&stored);
    let mut observe = Observe { observer, start: 0, share: 0, length: storage.length() };
    let mut first = 0;
    // a cluster that is cut by the end of the file may reach into the next one
    while first <= clusters {
        observe.pass(first << geometry.cluster_bits(), window.saturating_mul(geometry.cluster_size()));
        observe.tell(0)?;
        let mut counters = Counters::new(&spans, first, window)?;
        let mut tally = report.clusters;
        let mut walk = Walk {
            storage,
            header,
            rules,
            counters: &mut counters,
            clusters: &mut tally,
            found: &mut |finding| report.add(finding),
            first: first == 0,
            is_one: &mut |cluster| if first == 0 { lookup.is_one(cluster) } else { Ok(None) },
        };
        walk.run(&roots, &stored.references, limits, &mut observe)?;
        report.clusters = tally;
        let counted = counters.finish();
        // what is referred to behind the end of the file is a finding already, and has no refcount to compare
        let below = counted.below().min(clusters + 1);
        compare(first..below, &counted, &stored, clusters, geometry, &mut report)?;
        first = below.max(first + 1);
    }
    Ok(report)
}

/// Tells the observer.
struct Observe<'a> {
    observer: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// Bytes of the file that earlier passes count for, and this one.
    start: u64,
    share: u64,
    length: u64,
}

impl Observe<'_> {
    /// Begins a pass that counts for so many bytes, if there are so many.
    fn pass(&mut self, start: u64, share: u64) {
        self.start = start.min(self.length);
        self.share = share.min(self.length - self.start);
    }

    /// Tells how far a pass is, in bytes of the file.
    fn tell(&mut self, offset: u64) -> Result<()> {
        let part = u128::from(self.share) * u128::from(offset.min(self.length)) / u128::from(self.length.max(1));
        let done = self.start.saturating_add(u64::try_from(part).unwrap_or(self.share));
        match (self.observer)(Progress { done, total: self.length }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}
