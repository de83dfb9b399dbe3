//! What `qemu-img check` looks for, without writing: do refcounts and references agree, and are the tables sound?
//!
//! ```text
//! roots ──> walk ──> counters ──┐
//!                               ├──> compare ──> report
//! refcount table ──> stored ────┘
//! ```
//!
//! Refcounts are compared in windows of the file, and L2 tables are walked in batches, so memory stays below 64 MiB
//! for an image of any size. Each table is read once in a pass, however often the image refers to it, so that time
//! goes with the length of the file, whatever the image claims.
//!
//! Stricter than QEMU, since a backup that was cut must not pass: L2 tables and refcount blocks must be whole in the
//! file, and data must be there up to the last sector that the disk has of it. Also metadata clusters must not be
//! shared even where the refcounts say so, the zero flag is damage in version 2 and with extended L2 entries, and in
//! an external data file guest and host offsets must agree. Less strict: bitmaps may have compatible extra data.

mod compare;
mod counters;
mod finding;
mod l2;
mod recount;
mod report;
mod roots;
mod stored;
mod tables;
mod walk;

use std::ops::ControlFlow;

pub use finding::{Finding, Severity};
pub(super) use recount::Recount;
pub use report::{ClusterCounts, Report};
pub(super) use roots::Roots;
pub(super) use stored::Stored;

use self::compare::compare;
use self::counters::Counters;
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

/// What a check may hold in memory at a time. The report is the same for any numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckLimits {
    /// Host clusters with a counter of four bytes; 8 Mi by default.
    pub window: u64,
    /// L2 tables; 256 Ki by default.
    pub tables: usize,
}

impl Default for CheckLimits {
    fn default() -> Self {
        Self { window: 8 << 20, tables: 256 << 10 }
    }
}

/// Checks an image. Damage becomes findings of the report; only a header that cannot be read is an error.
///
/// Neither backing nor data files are opened. `observer` hears how far the check has come and may end it.
///
/// # Errors
/// What is wrong with the header, [`Error::Cancelled`], [`Error::Memory`], [`Error::Io`].
pub fn check(storage: &dyn Storage, observer: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<Report> {
    check_header(storage, &Header::read(storage)?, CheckLimits::default(), observer)
}

impl Image {
    /// Checks the image, as [`check`] does, with limits of the caller's choice. Images that are damaged so much that
    /// they cannot be opened need [`check`].
    ///
    /// # Errors
    /// As [`check`].
    pub fn check(&self, limits: CheckLimits, observer: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<Report> {
        check_header(self.storage(), self.header(), limits, observer)
    }
}

impl Image {
    /// The highest refcount of all clusters.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn highest_refcount(&self) -> Result<u64> {
        let stored = Stored::read(self.storage(), self.header(), &mut Report::default())?;
        let mut highest = 0;
        let clusters = self.header().geometry.clusters(self.storage().length());
        stored.for_each_used(0..clusters, |_, refcount| highest = refcount.max(highest))?;
        Ok(highest)
    }
}

fn check_header(
    storage: &dyn Storage,
    header: &Header,
    limits: CheckLimits,
    observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Report> {
    let geometry = header.geometry;
    let rules = EntryRules::of(header);
    let mut report = Report { dirty: header.is_dirty(), marked_corrupt: header.is_corrupt(), ..Report::default() };
    report.clusters.total = geometry.clusters(header.size);
    let roots = Roots::read(storage, header, &mut report)?;
    let stored = Stored::read(storage, header, &mut report)?;
    let clusters = geometry.clusters(storage.length());
    let window = limits.window.max(1);
    let mut observe = Observe { observer, pass: 0, passes: clusters.div_ceil(window), length: storage.length() };
    let mut start = Some(0);
    while let Some(first) = start {
        observe.tell(0)?;
        // a cluster that is cut by the end of the file may reach into the next one
        let mut counters = Counters::new(first..first.saturating_add(window).min(clusters + 1))?;
        stored.for_each_used(counters.window(), |cluster, refcount| {
            if refcount == 1 {
                counters.store_one(cluster);
            }
        })?;
        let mut tally = report.clusters;
        let mut walk = Walk {
            storage,
            header,
            rules,
            counters: &mut counters,
            clusters: &mut tally,
            found: &mut |finding| report.add(finding),
            first: first == 0,
        };
        walk.run(&roots, &stored.references, limits, &mut observe)?;
        report.clusters = tally;
        compare(&mut counters, &stored, clusters, geometry, &mut report)?;
        // what is referred to behind the end of the file is a finding already, and has no refcount to compare
        let next = [counters.next(), stored.next(counters.window().end)].into_iter().flatten().min();
        start = next.filter(|next| *next <= clusters);
        observe.pass = start.unwrap_or_default() / window;
    }
    Ok(report)
}

/// Tells the observer.
struct Observe<'a> {
    observer: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    pass: u64,
    passes: u64,
    length: u64,
}

impl Observe<'_> {
    fn tell(&mut self, offset: u64) -> Result<()> {
        let pass = u128::from(self.pass) * u128::from(self.length) + u128::from(offset);
        let done = u64::try_from(pass / u128::from(self.passes.max(1))).unwrap_or(u64::MAX).min(self.length);
        match (self.observer)(Progress { done, total: self.length }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}
