//! Restoring: a chain of images becomes one disk again.
//!
//! [`Merge`] opens a FULL and its INCs, decides where each cluster of the new image comes from and goes to, and then
//! moves the bytes on all processors. [`Layers::open_verified`] has it check what it reads, [`MergeOptions::read_back`] what it
//! wrote, and [`Merge::salvage`] makes the most of a damaged chain. [`Commit`] writes INCs into their FULL, in place.
//! [`Rebase`] has each INC name the image before it, so that QEMU opens the chain where it lies. [`Describe`] makes manifests
//! and checksums. [`survey()`] and [`check()`] look at images without reading the data in them, [`verify()`] reads all of them
//! and says whether they are what they were.
//!
//! ```
//! use std::path::{Path, PathBuf};
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! use qmpbackup::chain::{Clock, When, discover};
//! use qmpbackup::restore::{Layers, Merge, MergeOptions, Observer, Output, OutputFormat};
//!
//! /// Counts the bytes that are done.
//! #[derive(Default)]
//! struct Progress(AtomicU64);
//!
//! impl Observer for Progress {
//!     fn advance(&self, bytes: u64) {
//!         self.0.fetch_add(bytes, Ordering::Relaxed);
//!     }
//! }
//!
//! fn restore(dir: &Path, when: &When, output: PathBuf) -> Result<u64, Box<dyn std::error::Error>> {
//!     let inventory = discover(dir)?;
//!     let point = inventory.disk(None)?.select(when, &Clock::system(), false)?;
//!     let format = OutputFormat::Qcow2 { cluster_size: None, compression: None };
//!     let options = MergeOptions::new(Output::File(output), format);
//!     let progress = Progress::default();
//!     let merge = Merge::plan(Layers::open_point(&point, None, false)?, options, &progress)?;
//!     merge.check(&progress)?;
//!     progress.0.store(0, Ordering::Relaxed);
//!     let merged = merge.run(&progress)?;
//!     assert_eq!(progress.0.into_inner(), merged.bytes);
//!     Ok(merged.size)
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain"));
//! # let folder = tempfile::tempdir()?;
//! let size = restore(dir, &"2026-11-04T12:00:00Z".parse()?, folder.path().join("disk.qcow2"))?;
//! assert_eq!(size, 64 << 20);
//! # Ok(())
//! # }
//! ```
//!
//! What takes no number of threads works on rayon's pool of the process.

mod bits;
mod check;
mod checked_file;
mod commit;
mod copier;
mod error;
mod format;
mod in_place;
mod layer;
mod layers;
mod limiter;
mod line;
mod manifests;
mod merge;
mod observer;
mod plan;
mod pool;
mod ranges;
mod raw;
mod rebase;
mod renewed;
mod resolve;
mod salvage;
mod slices;
mod source;
mod survey;
mod verify;

pub use check::{Checked, CheckedImage, check};
pub use checked_file::Unverified;
pub use commit::{Commit, CommitOptions, CommitSummary, FULL_SNAPSHOT, apply_layers};
pub use error::{Error, Result};
pub use layer::{Format, Layer};
pub use layers::{Layers, check_current};
pub use manifests::{Describe, Described, lock_folders};
pub use merge::{Merge, MergeOptions, Merged, Output, OutputFormat};
pub use observer::{Done, Observer, Phase, Silent, Warning};
pub use plan::Plan;
pub use rebase::{Based, PointLink, Rebase};
pub use salvage::{Cause, Loss, LossKind, Losses, Slot};
pub use source::{Source, open_writable};
pub use survey::{Facts, survey};
pub use verify::{
    Due, Flaw, FlawSeverity, Flawed, Points, Share, Verified, VerifiedImage, VerifyOptions, VerifyTarget, verify,
};
