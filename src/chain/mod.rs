//! What lies in a backup folder: names, order, restore points.
//!
//! [`discover()`] finds the disks below a folder, and [`Disk::select`] the images that a restore of one moment opens;
//! [`Disk::select_salvage`] what there is of them where the chain is broken.
//! [`FolderLock`] keeps others from writing to a folder.
//!
//! Nothing here opens an image: all is told by names, folders and the `.config` and `.qmpbackup` files beside. So a chain
//! that is whole by its names may still hold damaged or foreign images, and the layers that read them have to look.
//!
//! # What is an image
//!
//! ```text
//! <disk>/FULL-1643308898-disk.qcow2     and INC-…, COPY-…: level, time, base name of the disk's file
//! <disk>/FULL-1643308898                the oldest names, without the disk
//! FULL-1643308898-disk.qcow2            several disks in one folder, told apart by their names
//! <disk>/disk.qcow2                     a FULL or COPY without a time, see below
//! 2021-11/<disk>/…                      any of these, in a folder for each month
//! ….partial                             not whole: never read
//! ```
//!
//! - Only regular files are images, and links to regular files where the name has a time. The link `image` that a
//!   rebase leaves is none. Hidden files and folders, settings, logs, fleece images and editors' backups are none.
//! - A file with the bare name of a disk is an image where a link `FULL-<name>` or `COPY-<name>` or an INC of the disk
//!   lies beside it; else where it has a [`Manifest`], its `.config` lies in the same folder or the one above, or it is the
//!   only disk image of a folder without other images, unless the disk's own folder is below: then it is a disk that was
//!   restored. It is a FULL, older than all images with a time in its folder, unless only a link `COPY-<name>` lies beside it.
//! - A FULL begins a chain, an INC belongs to the newest FULL before it *in its folder*; a COPY stands alone. Order is by
//!   the time in the name. In the same second, the FULL comes before the INC; two INCs in one second have no order.
//! - An INC that was written into its FULL is gone, and the FULL holds its moment: the FULL's [`Manifest`] tells, and it is
//!   the restore point of that time. To which FULL an INC belongs is told by names alone. While such work goes on, and when
//!   it was broken off, none of the chain's restore points is whole: see [`Unfinished`].
//! - The format of an image is what its [`Manifest`] says, else what the `.config` says, never what its content looks like.
//!   Where that says only that the disk was raw, images of another tool are raw, and who opens them has to tell them from ours.
//! - Manifests tell of each INC what it builds on: one that is missing, foreign or out of order breaks the chain from there.
//!   An image whose manifest is there and which is not, of a chain whose FULL is there, is a broken restore point.
//!
//! # Listing restore points
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let target = tempfile::tempdir()?;
//! # std::fs::create_dir(target.path().join("ide0-hd0"))?;
//! # for name in ["FULL-1643308898-disk.qcow2", "INC-1643308928-disk.qcow2"] {
//! #     std::fs::write(target.path().join("ide0-hd0").join(name), "")?;
//! # }
//! use qmpbackup::chain::{Clock, State, When, discover};
//!
//! let inventory = discover(target.path())?;
//! let disk = inventory.disk(None)?;
//! let names: Vec<String> = disk.points().iter().map(|point| point.image().display_name()).collect();
//! assert_eq!(disk.label(), "ide0-hd0");
//! assert_eq!(names, ["FULL-1643308898-disk.qcow2", "INC-1643308928-disk.qcow2"]);
//! assert!(disk.points().iter().all(|point| *point.state() == State::Sound));
//!
//! let when: When = "2022-01-27T18:42:00Z".parse()?;
//! let point = disk.select(&when, &Clock::system(), false)?;
//! assert_eq!((point.time, point.members.len()), (Some(1_643_308_898), 1));
//! # Ok(())
//! # }
//! ```

mod backing;
mod checksums;
mod config;
mod discover;
mod disk;
mod durable;
mod error;
mod held;
mod id;
mod image;
mod image_id;
mod journal;
pub(crate) mod json_file;
mod layout;
mod lineage;
mod links;
mod lock;
mod manifest;
mod name;
mod note;
mod point;
mod run_journal;
mod salvage;
mod scan;
mod select;
#[cfg(test)]
mod tests;
mod timeless;
mod unnamed;
mod verified;
mod when;

pub(crate) use backing::{leads_to, name_in};
pub use checksums::{BLOCK, Checksums, ChecksumsError, SumError, block_sums, create as create_checksums};
pub(crate) use checksums::{KnownSums, Renewal, ZEROES as ZERO_BLOCK_SUM, create_watched as create_checksums_watched};
#[cfg(feature = "capture")]
pub(crate) use config::BACKUP_FORMAT;
pub use config::FormatHint;
pub(crate) use config::MAX_CONFIG_BYTES;
pub(crate) use discover::MAX_DEPTH;
pub use discover::{Inventory, MAX_ENTRIES, discover};
pub use disk::Disk;
pub(crate) use durable::sync_names;
pub use error::Error;
pub(crate) use id::chain_id;
pub use id::is_chain_id;
#[cfg(feature = "capture")]
pub(crate) use id::random_id;
pub use image::Image;
#[cfg(feature = "capture")]
pub(crate) use image::Month;
pub use image_id::ImageId;
pub use journal::{Stage, Unfinished, Work};
pub use lineage::Lineage;
pub use links::Chain;
pub use lock::{FolderLock, UUID};
pub use manifest::{BOOKKEEPING, Manifest, ManifestError};
pub(crate) use name::POINT_LINK;
pub use name::{ImageName, Level};
#[cfg(feature = "capture")]
pub(crate) use name::{means_else, partial_path};
pub use note::Note;
pub use point::{Doubt, Fault, Point, RestorePoint, State};
#[cfg(feature = "capture")]
pub(crate) use run_journal::{FLEECE, RUN_JOURNAL_VERSION, RunEntry, RunJournal};
pub use salvage::{Member, SalvagePoint};
pub use verified::{SegmentTimes, Verifications, segments};
pub use when::{Clock, WHEN_FORMS, When};
