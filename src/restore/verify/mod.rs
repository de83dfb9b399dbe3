//! Are backups what they were when they were made? Chains, tables and checksums of all images, in parallel.
//!
//! ```text
//! names, manifests ──> faults of chains ─────────────────────────────────────────────┐
//! each image ──> locked, manifest, checksums, length ──> blocks that are due ──> bad ├──> flaws, and the restore
//!                                                    └─> its tables ──> findings ────┘    points that suffer
//! ```
//!
//! An image is locked and open only while it is worked on, so that chains may be of any length.

mod due;
mod faults;
mod flaw;
mod identity;
mod judge;
mod look;
mod read;
mod remember;
mod suffer;

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use flaw::{Flaw, FlawSeverity, Flawed, Points};

use self::judge::{Judged, Reach};
use self::look::{Looked, Members, Subject};
use self::read::{Found, Item};
use self::suffer::Flaws;
use super::error::Result;
use super::observer::{Observer, Phase};
use super::pool;
use crate::chain::{Checksums, Disk, Image, Manifest, RestorePoint};

/// What to verify.
#[derive(Debug, Clone, Copy)]
pub enum VerifyTarget<'a> {
    /// All images of all chains of a disk.
    Disk(&'a Disk),
    /// The images that a restore point of a disk is made of.
    Point(&'a Disk, &'a RestorePoint),
}

/// How to verify.
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions {
    /// Threads, at most 256; all that the machine has by default.
    pub threads: Option<NonZeroUsize>,
    /// Only a part of the bytes, and what was verified when is remembered; else all, and nothing is written.
    pub due: Option<Due>,
}

/// Which part of the bytes it is time to verify.
#[derive(Debug, Clone, Copy)]
pub struct Due {
    /// At most about this part of all bytes: what was verified longest ago, or never, first.
    pub sample: Option<Share>,
    /// Only what was not verified for so long.
    pub max_age: Option<Duration>,
    /// Now, in seconds since 1970.
    pub now: i64,
}

/// A part of a whole: more than nothing, and not more than all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u32);

impl Share {
    /// So many millionths; `None` for none and for more than a million.
    #[must_use]
    pub fn millionths(count: u32) -> Option<Self> {
        (1..=1_000_000).contains(&count).then_some(Self(count))
    }

    /// This part of a number, rounded up.
    fn of(self, whole: u64) -> u64 {
        let part = (u128::from(whole) * u128::from(self.0)).div_ceil(1_000_000);
        u64::try_from(part).unwrap_or(u64::MAX)
    }
}

/// What was found.
#[derive(Debug)]
#[non_exhaustive]
pub struct Verified {
    /// What is not as it should be: chains first, then images in their order.
    pub flaws: Vec<Flawed>,
    /// The images, disk by disk and chain by chain.
    pub images: Vec<VerifiedImage>,
}

/// An image that was verified.
#[derive(Debug)]
#[non_exhaustive]
pub struct VerifiedImage {
    /// The label of its disk.
    pub disk: String,
    /// The image.
    pub image: Arc<Image>,
    /// Bytes of its file.
    pub length: u64,
    /// Bytes that were compared with their checksums.
    pub compared: u64,
    /// Whether its tables were checked. Raw images have none, which is as good.
    pub structure: bool,
    /// The worst that was found in it; faults of chains are not counted.
    pub worst: Option<FlawSeverity>,
}

impl Verified {
    /// The worst of all that was found.
    #[must_use]
    pub fn worst(&self) -> Option<FlawSeverity> {
        self.flaws.iter().map(|flawed| flawed.flaw.severity()).max()
    }
}

/// Verifies disks and restore points. Images are opened for reading only, and locked meanwhile, see
/// [`FileStorage::lock`](crate::storage::FileStorage::lock). What is wrong with images is in the result.
///
/// ```
/// use std::path::Path;
///
/// use qmpbackup::chain::discover;
/// use qmpbackup::restore::{FlawSeverity, Silent, VerifyOptions, VerifyTarget, verify};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let inventory = discover(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain")))?;
/// let targets: Vec<VerifyTarget> = inventory.disks.iter().map(VerifyTarget::Disk).collect();
/// let verified = verify(&targets, &VerifyOptions::default(), &Silent)?;
/// assert_eq!(verified.images.len(), 4);
/// // an older tool made them: there are no checksums, but their tables and their order are right
/// assert_eq!(verified.worst(), Some(FlawSeverity::InPart));
/// let lines = verified.flaws.iter().map(|flawed| format!("{}: {}", flawed.path.display(), flawed.flaw));
/// assert!(lines.into_iter().any(|line| line.contains("has no checksums")));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Cancelled`](super::Error::Cancelled), [`Error::Threads`](super::Error::Threads).
pub fn verify(targets: &[VerifyTarget<'_>], options: &VerifyOptions, observer: &dyn Observer) -> Result<Verified> {
    pool::start(options.threads)?.install(|| run(targets, options, observer))
}

fn run(targets: &[VerifyTarget<'_>], options: &VerifyOptions, observer: &dyn Observer) -> Result<Verified> {
    let (chains, subjects) = look::subjects(targets);
    let mut looked: Vec<Looked> =
        pool::map(subjects.iter(), || (), |(), subject| observer.go_on().map(|()| look::look(subject)))?;
    let found = |looked: &mut Looked| Found { flaws: std::mem::take(&mut looked.flaws), ..Found::default() };
    let found: Vec<Mutex<Found>> = looked.iter_mut().map(found).map(Mutex::new).collect();
    let chosen = due::choose(&subjects, &looked, options.due);
    let bytes = looked.iter().zip(&chosen).map(|(looked, chosen)| chosen.bytes(looked)).sum();
    observer.phase(Phase::Verifying { bytes });

    let items = subjects.iter().zip(&looked).zip(&chosen).zip(&found);
    let items = items.flat_map(|(((subject, looked), chosen), found)| read::items(subject, looked, chosen, found));
    pool::for_each(items, Vec::new, |buffer, item: Item<'_>| item.run(buffer, observer))?;

    let settled = |found: Mutex<Found>| {
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.settle();
        found
    };
    let found: Vec<Found> = found.into_iter().map(settled).collect();
    let others = identity::others(&subjects, &found, observer)?;
    let judged: Vec<Judged> = pool::map(
        subjects.iter().zip(&looked).zip(found.into_iter().zip(others)),
        || (),
        |(), ((subject, looked), (found, other))| {
            observer.go_on().map(|()| judge::judge(subject, looked, found, other))
        },
    )?;
    let points = points(&chains, &subjects, &judged, observer)?;
    if let Some(due) = options.due {
        let outcomes = subjects.iter().zip(&looked).zip(&chosen).zip(&judged);
        let outcomes = outcomes.map(|(((subject, looked), chosen), judged)| (subject, looked, chosen, judged));
        remember::remember(outcomes, due.now, observer);
    }
    Ok(told(targets, &subjects, &looked, judged, points))
}

/// For each of the flaws of each image the restore points that suffer.
fn points(
    chains: &[Members<'_>],
    subjects: &[Subject<'_>],
    judged: &[Judged],
    observer: &dyn Observer,
) -> Result<Vec<Vec<Points>>> {
    let untrusted = judged.iter().zip(subjects).filter(|(judged, _)| judged.untrusted);
    let untrusted: BTreeSet<(usize, usize)> = untrusted.map(|(_, subject)| (subject.chain, subject.depth)).collect();
    let mut flawed: Vec<Vec<Flaws<'_>>> = chains.iter().map(|_| Vec::new()).collect();
    for (subject, judged) in subjects.iter().zip(judged) {
        let reaches = judged.flaws.iter().map(|(_, reach)| reach).collect();
        if let Some(of_chain) = flawed.get_mut(subject.chain) {
            of_chain.push(Flaws { depth: subject.depth, reaches });
        }
    }
    // images come chain by chain
    let points = pool::map(
        chains.iter().zip(&flawed).enumerate(),
        || (),
        |(), (chain, (members, flawed))| {
            suffer::points(members, flawed, |place| untrusted.contains(&(chain, place)), || observer.go_on())
        },
    )?;
    Ok(points.into_iter().flatten().collect())
}

/// Puts all that was found together.
fn told(
    targets: &[VerifyTarget<'_>],
    subjects: &[Subject<'_>],
    looked: &[Looked],
    judged: Vec<Judged>,
    points: Vec<Vec<Points>>,
) -> Verified {
    let is_busy = |(_, judged): &(&Subject<'_>, &Judged)| judged.is_locked();
    let busy = subjects.iter().zip(&judged).filter(is_busy).map(|(subject, _)| subject.image.path.as_path());
    let busy: BTreeSet<&Path> = busy.collect();
    let mut flaws = faults::faults(targets, |path| busy.contains(path));
    let mut images = Vec::new();
    for (((subject, looked), judged), points) in subjects.iter().zip(looked).zip(judged).zip(points) {
        let disk = subject.disk.label().to_owned();
        images.push(VerifiedImage {
            disk: disk.clone(),
            image: Arc::clone(subject.image),
            length: looked.length,
            compared: judged.compared,
            structure: judged.structure,
            worst: judged.flaws.iter().map(|(flaw, _)| flaw.of_image()).max(),
        });
        let flawed = |((flaw, _), points): ((Flaw, Reach), Points)| {
            let path = match &flaw {
                Flaw::Manifest(_) => Manifest::path(&subject.image.path),
                Flaw::Checksums(_) => Checksums::path(&subject.image.path),
                _ => subject.image.path.clone(),
            };
            Flawed { disk: disk.clone(), path, flaw, points }
        };
        flaws.extend(judged.flaws.into_iter().zip(points).map(flawed));
    }
    Verified { flaws, images }
}
