//! Commit: INCs are written into their FULL, in place, and removed.
//!
//! ```text
//! journal: writing ── data and tables of the FULL ── sync ── journal: removing ── INCs go, oldest first ── journal goes
//!                   └─ its checksums are unsettled ────────┘
//! ```
//!
//! The FULL becomes another image, with an id of its own: one that is put back from before does not fit the next INC.
//!
//! While the journal says `writing`, the FULL is a mixture, and the chain has no restore point but for this work: done again
//! from its beginning, it ends with the same disk, since each INC is still there. While it says `removing`, the FULL
//! holds all of them, and what is left of them only has to go.
//!
//! With snapshots, each INC is written by itself, a snapshot of the moment is made, and the INC goes before the next
//! one begins. A snapshot has the time of its INC as its date: that tells what is done already when the work is done again.
//! The checksums of the FULL are renewed once, before the journal goes.
//!
//! ```
//! use qmpbackup::chain::{Clock, When, Work, discover};
//! use qmpbackup::restore::{Commit, CommitOptions, Silent};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let backup = tempfile::tempdir()?;
//! # for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0"))? {
//! #     let file = file?;
//! #     if file.file_type()?.is_file() {
//! #         std::fs::copy(file.path(), backup.path().join(file.file_name()))?;
//! #     }
//! # }
//! let select =
//!     || discover(backup.path())?.disk(None)?.select_in_place(&When::Latest, &Clock::system(), false);
//! let options = CommitOptions { work: Work::Commit, threads: None, rate_limit: None, dry_run: false };
//! let mut commit = Commit::plan(&select()?, select, options, &Silent)?;
//! commit.check(&Silent)?;
//! commit.run(&Silent)?;
//! # assert_eq!(discover(backup.path())?.disk(None)?.points().len(), 1);
//! # Ok(())
//! # }
//! ```

mod apply;
mod kept;
mod refuse;
mod snapshots;
mod space;
mod sums;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::apply::apply_layers;
use crate::chain::{self, Checksums, Image, ImageId, RestorePoint, Stage, Unfinished, Work};
use crate::qcow2::Writer;
use crate::restore::check;
use crate::restore::copier::{Holes, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::in_place::{self, InPlace};
use crate::restore::layer::Layer;
use crate::restore::layers::check_current;
use crate::restore::limiter::Limiter;
use crate::restore::observer::{Done, Observer, Phase};
use crate::restore::pool;
use crate::restore::resolve::Mapped;

/// The name of the snapshot of the FULL as it was.
pub const FULL_SNAPSHOT: &str = "FULL-BACKUP";

type Images = Vec<Arc<Image>>;

/// How INCs are committed.
#[derive(Debug, Clone, Copy)]
pub struct CommitOptions {
    /// Whether restore points become internal snapshots, or are gone.
    pub work: Work,
    /// Threads, at most 256; all that the machine has by default.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of guest data in a second.
    pub rate_limit: Option<NonZeroU64>,
    /// Only to be planned: the folder is not locked, and [`Commit::run`] does nothing.
    pub dry_run: bool,
}

/// A commit that is decided.
#[derive(Debug)]
pub struct Commit {
    options: CommitOptions,
    chain: InPlace,
    /// INCs whose content the FULL holds already.
    rest: Vec<Arc<Image>>,
    /// INCs to write, oldest first: the layers above the FULL.
    incs: Vec<Arc<Image>>,
    resumed: Option<Unfinished>,
    summary: CommitSummary,
    /// Whether the tables of the FULL are known to be right.
    checked: bool,
    pool: rayon::ThreadPool,
}

/// What a commit will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitSummary {
    /// The image that is written to.
    pub full: PathBuf,
    /// The images that are written into it, oldest first, and then removed.
    pub incs: Vec<PathBuf>,
    /// The images that an earlier run has written, and that are only removed.
    pub rest: Vec<PathBuf>,
    /// The name of a snapshot that the FULL gets as it is, if that is to be kept.
    pub full_snapshot: Option<String>,
    /// For each of `incs` the name of the snapshot that it becomes; none where an earlier run has made it.
    pub snapshots: Vec<Option<String>>,
    /// For each of `incs` the bytes of the disk before it and of its own, where that is smaller.
    pub shrinks: Vec<Option<(u64, u64)>>,
    /// The INC that will follow the FULL; none where the next one builds on something else, and stays as it is.
    pub next: Option<PathBuf>,
    /// Whether the INC that will follow the FULL names the image before it, and has to name the FULL.
    pub next_is_based: bool,
    /// Bytes of the disk afterwards.
    pub size: u64,
    /// Guest bytes to write.
    pub bytes: u64,
    /// The most bytes by which the FULL may grow.
    pub growth: u64,
}

impl CommitSummary {
    /// The names of the snapshots that the FULL gets.
    fn new_snapshots(&self) -> impl Iterator<Item = &str> {
        self.full_snapshot.iter().chain(self.snapshots.iter().flatten()).map(String::as_str)
    }
}

impl Commit {
    /// Locks the images and the folder, reads all tables and decides everything. Nothing is changed yet.
    ///
    /// `again` finds the restore point once more when the folder is locked: before that, others may have changed it, and an
    /// INC that has come meanwhile builds on one that goes. It is not asked where nothing is locked, in a dry run.
    ///
    /// # Errors
    /// Who else uses the images; what is wrong with them; [`Error::Changed`] where the restore point is another one by now;
    /// [`Error::NothingToCommit`]; [`Error::Unfinished`] where other work was begun; [`Error::NoSpace`].
    pub fn plan(
        point: &RestorePoint,
        again: impl FnOnce() -> Result<RestorePoint, chain::Error>,
        options: CommitOptions,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let Some(full) = point.members.first() else { return Err(Error::Empty) };
        // first: what looks as if it was not finished may be going on
        let folders = if options.dry_run { Vec::new() } else { in_place::lock(&full.path)? };
        let (rest, incs) = split(point, options.work)?;
        let mut members = vec![Arc::clone(full)];
        members.extend(incs.iter().cloned());
        if let Some(image) = members.iter().find(|image| image.name().to_str().is_none()) {
            return Err(in_place::refused(
                &image.path,
                "its name is not UTF-8, and cannot be written down while the work goes on: merge makes a new image",
            ));
        }
        let chain = InPlace::open(&members, point, folders)?;
        check_current(point)?;
        if !options.dry_run && again()? != *point {
            return Err(Error::Changed);
        }
        let pool = pool::start(options.threads)?;
        observer.phase(Phase::Planning);
        let groups = groups(options.work, chain.incs());
        let Some(image) = chain.full() else { return Err(Error::Empty) };
        let keeps = options.work == Work::SnapshotRebase;
        let needs = pool.install(|| space::needed(&full.path, image, &groups, keeps, observer))?;
        let path = |image: &Arc<Image>| image.path.clone();
        let there = match options.work {
            Work::Commit => Vec::new(),
            Work::SnapshotRebase => image.snapshots().map_err(Error::image(&full.path))?,
        };
        let (full_snapshot, names) = match options.work {
            Work::Commit => (None, Vec::new()),
            Work::SnapshotRebase => {
                let first = snapshots::full_snapshot(&chain, &there);
                let taken = there.iter().map(|snapshot| snapshot.name.clone()).chain(first.clone()).collect();
                (first, snapshots::names(&incs, &there, taken, point.unfinished.is_some()))
            }
        };
        let summary = CommitSummary {
            full: full.path.clone(),
            incs: incs.iter().map(path).collect(),
            rest: rest.iter().map(path).collect(),
            full_snapshot,
            snapshots: names,
            shrinks: shrinks(image.size(), chain.incs()),
            next: chain.next().map(path),
            next_is_based: chain.next_is_based(),
            size: chain.size(),
            bytes: needs.bytes,
            growth: needs.growth,
        };
        let resumed = point.unfinished.is_some();
        refuse::impossible(options.work, &chain, image, &full.path, summary.new_snapshots(), resumed)?;
        refuse::mixture(point, options.work, &there, &incs)?;
        chain.check_followers(options.work)?;
        if !incs.is_empty() {
            let journal = journal(options.work, Stage::Writing, full, &incs, in_place::id(&full.path)?);
            journal.check_writable(&full.path).map_err(|source| journal_error(&full.path, source))?;
        }
        refuse::unremovable(&[&*rest, &*incs].concat(), full, chain.next())?;
        // what was begun can only be ended, and what it wrote before needs no room again
        if point.unfinished.is_none() {
            refuse::refcounts(image, &full.path, needs.growth)?;
            space::check(&full.path, image, needs, incs.len())?;
        }
        Ok(Self { options, chain, rest, incs, resumed: point.unfinished.clone(), summary, checked: false, pool })
    }

    /// What will be done.
    #[must_use]
    pub fn summary(&self) -> &CommitSummary {
        &self.summary
    }

    /// Checks the tables of all images as `qemu-img check` does, and the checksums of the INCs that have some: all that is
    /// read of them. Those that have none are read, and their compressed clusters inflated: what cannot be read must be found
    /// before the FULL is a mixture. What the FULL holds is compared with its checksums as far as it is read.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Checksum`], [`Error::Length`], or what makes an image or its checksums unreadable.
    pub fn check(&mut self, observer: &dyn Observer) -> Result<()> {
        let (full, incs) = (self.chain.checked_full()?, self.chain.incs());
        self.pool.install(|| {
            check::check_to_change(&full, incs, observer)?;
            sums::verify(incs, observer)?;
            self.check_kept(&full, observer)
        })?;
        self.checked = true;
        Ok(())
    }

    /// Checks the FULL only: its tables, and what it keeps of clusters of which a part changes. What is damaged there would
    /// end the work when a part of it is done, and each time that it is done again.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Checksum`], or what makes the FULL unreadable.
    pub fn check_full(&mut self, observer: &dyn Observer) -> Result<()> {
        // what only removes INCs does not write to it
        if !self.checked && !self.incs.is_empty() {
            let full = self.chain.checked_full()?;
            self.pool.install(|| {
                check::check_to_change(&full, &[], observer)?;
                self.check_kept(&full, observer)
            })?;
        }
        self.checked = true;
        Ok(())
    }

    fn check_kept(&self, full: &Layer, observer: &dyn Observer) -> Result<()> {
        let keeps = self.options.work == Work::SnapshotRebase;
        kept::check(full, &groups(self.options.work, self.chain.incs()), keeps, observer)
    }

    /// Makes sure that the FULL is what it was when an earlier run had written INCs into it, before these go for good.
    fn check_holds_rest(&self, observer: &dyn Observer) -> Result<()> {
        let Some(full) = self.chain.full_layer().filter(|_| !self.rest.is_empty()) else { return Ok(()) };
        if self.pool.install(|| sums::fits(full, observer))? {
            return Ok(());
        }
        Err(in_place::refused(
            full.path(),
            "is not what it was when the INCs were written into it, so that they are not removed: put that one back, or, where \
             all of them are there still, remove its .crc32 to have them written once more",
        ))
    }

    /// Writes the INCs into the FULL and removes them. The FULL is [checked](Self::check_full) before, if it was not yet.
    ///
    /// # Errors
    /// What is wrong with an image, what the system says, or [`Error::Cancelled`]. Unless nothing was changed yet, the same
    /// work must be done again then.
    pub fn run(mut self, observer: &dyn Observer) -> Result<()> {
        if self.options.dry_run {
            return Ok(());
        }
        self.check_full(observer)?;
        self.check_holds_rest(observer)?;
        let full = self.summary.full.as_path();
        if let Some(unfinished) = &self.resumed {
            // an earlier run may have ended between writing it and its sync
            unfinished.write(full).map_err(|source| journal_error(full, source))?;
        }
        self.remove(&self.rest, observer)?;
        if !self.incs.is_empty() {
            self.chain.restrict()?;
            let (mut writer, image) = self.chain.writer(observer)?;
            let full_id = self.former_id()?;
            self.journal(Stage::Writing, full_id)?;
            in_place::give_id(full, full_id)?;
            image.begin()?;
            observer.phase(Phase::Copying { bytes: self.summary.bytes });
            match self.options.work {
                Work::Commit => {
                    self.write(&mut writer, 0..self.incs.len(), observer)?;
                    observer.phase(Phase::Syncing);
                    finish(full, writer)?;
                    self.chain.check_name()?;
                    self.chain.check_unchanged()?;
                    image.finish(observer)?;
                    self.renew(self.incs.len() - 1, observer)?;
                    self.journal(Stage::Removing, full_id)?;
                }
                Work::SnapshotRebase => {
                    self.write_snapshots(writer, observer)?;
                    image.finish(observer)?;
                }
            }
        }
        if let Some(begun) = &self.resumed {
            in_place::remove_books_of_gone(full, &begun.incs)?;
        }
        self.remove(&self.incs, observer)?;
        if self.resumed.is_some() {
            self.pool.install(|| self.chain.free_leaks(observer))?;
        }
        Unfinished::remove(full).map_err(|source| journal_error(full, source))?;
        self.pool.install(|| self.chain.close());
        Ok(())
    }

    /// Writes what some of the INCs hold together.
    fn write(&self, writer: &mut Writer, incs: std::ops::Range<usize>, observer: &dyn Observer) -> Result<()> {
        let limiter = self.options.rate_limit.map(Limiter::new);
        let layers = self.chain.incs().get(incs).unwrap_or_default();
        let work = Transfer { layers, limiter: limiter.as_ref(), observer, holes: Holes::None };
        self.pool.install(|| apply::apply(&work, &self.summary.full, writer))
    }

    fn write_snapshots(&self, mut writer: Writer, observer: &dyn Observer) -> Result<()> {
        let full = self.summary.full.as_path();
        let failed = Error::image(full);
        // snapshots of an earlier run, which may have ended before its last sync
        writer.flush().map_err(failed)?;
        if let Some(name) = &self.summary.full_snapshot {
            writer.create_snapshot(name, self.chain.full_date()).map_err(failed)?;
            observer.done(Done::Snapshot { name: name.clone() });
        }
        for (at, (inc, name)) in self.incs.iter().zip(&self.summary.snapshots).enumerate() {
            if let Some(name) = name {
                self.write(&mut writer, at..at + 1, observer)?;
                writer.create_snapshot(name, snapshots::date(inc)).map_err(failed)?;
                observer.done(Done::Snapshot { name: name.clone() });
            }
            self.chain.check_name()?;
            self.renew(at, observer)?;
            self.remove(std::slice::from_ref(inc), observer)?;
        }
        finish(full, writer)
    }

    /// Says beside the FULL, and in the INC that follows it now, that the FULL holds the moment of this INC.
    fn renew(&self, last: usize, observer: &dyn Observer) -> Result<()> {
        let full = self.summary.full.as_path();
        let (Some(held), Some(layer)) = (self.incs.get(last), self.chain.incs().get(last)) else { return Ok(()) };
        in_place::renew(full, held, layer.size())?;
        let next = self.incs.get(last + 1).or(self.chain.next());
        next.map_or(Ok(()), |next| self.chain.follow(next, observer))
    }

    /// The id of the FULL before it becomes another image, which an earlier run may have begun.
    fn former_id(&self) -> Result<Option<ImageId>> {
        // INCs that are written once more have made it another image already
        let again = |name: &String| self.incs.iter().any(|inc| inc.display_name() == *name);
        let begun = self.resumed.as_ref();
        let begun = begun.filter(|begun| begun.stage == Stage::Writing || begun.incs.iter().any(again));
        match begun.and_then(|begun| begun.full_id) {
            None => in_place::id(&self.summary.full),
            former => Ok(former),
        }
    }

    fn journal(&self, stage: Stage, full_id: Option<ImageId>) -> Result<()> {
        let Some(full) = self.chain.image() else { return Err(Error::Empty) };
        let written = journal(self.options.work, stage, full, &self.incs, full_id).write(&full.path);
        written.map_err(|source| journal_error(&full.path, source))
    }

    fn remove(&self, images: &[Arc<Image>], observer: &dyn Observer) -> Result<()> {
        self.chain.check_name()?;
        in_place::point_link(&self.summary.full, images)?;
        for image in images {
            self.chain.check_name()?;
            if in_place::remove(&image.path, self.chain.open_file(&image.path))? {
                observer.done(Done::Removed { path: image.path.clone() });
            }
        }
        in_place::sync_names(&self.summary.full)
    }
}

/// What is written down while INCs go into a FULL.
fn journal(work: Work, stage: Stage, full: &Image, incs: &[Arc<Image>], full_id: Option<ImageId>) -> Unfinished {
    let incs = incs.iter().map(|image| image.display_name()).collect();
    Unfinished { work, stage, full: full.display_name(), incs, full_id }
}

fn journal_error(full: &Path, source: std::io::Error) -> Error {
    Error::Write { path: Unfinished::path(full), source }
}

/// The INCs that only have to go, and those that are to be written.
fn split(point: &RestorePoint, work: Work) -> Result<(Images, Images)> {
    let Some((full, incs)) = point.members.split_first() else { return Err(Error::Empty) };
    let Some(unfinished) = &point.unfinished else {
        return if incs.is_empty() { Err(Error::NothingToCommit) } else { Ok((Vec::new(), incs.to_vec())) };
    };
    let begun = |image: &Arc<Image>| unfinished.incs.iter().any(|name| *name == image.display_name());
    let has_sums = || matches!(Checksums::open(&full.path), Ok(Some(_)));
    let is_there = |name: &String| incs.iter().any(|image| image.display_name() == *name);
    if unfinished.work != work || point.later.iter().any(begun) {
        return Err(Error::Unfinished {
            path: full.path.clone(),
            work: unfinished.work,
            until: unfinished.incs.last().cloned().unwrap_or_default(),
        });
    }
    match unfinished.stage {
        Stage::Writing => Ok((Vec::new(), incs.to_vec())),
        // without checksums nothing tells whether the FULL is still what it was then: it is written once more
        Stage::Removing if unfinished.incs.iter().all(is_there) && !has_sums() => Ok((Vec::new(), incs.to_vec())),
        Stage::Removing => Ok(incs.iter().cloned().partition(begun)),
    }
}

/// The layers that are written together.
fn groups(work: Work, incs: &[Layer]) -> Vec<&[Layer]> {
    match work {
        Work::Commit => vec![incs],
        Work::SnapshotRebase => incs.iter().map(std::slice::from_ref).collect(),
    }
}

/// Where the disk becomes smaller, from what it was to what it is.
fn shrinks(full: u64, incs: &[Layer]) -> Vec<Option<(u64, u64)>> {
    let sizes = || incs.iter().map(Layer::size);
    let before = std::iter::once(full).chain(sizes());
    before.zip(sizes()).map(|(before, size)| (size < before).then_some((before, size))).collect()
}

fn finish(full: &Path, writer: Writer) -> Result<()> {
    writer.finish().map_err(Error::image(full))
}
