//! Live backups of standalone QEMU virtual machines, and the engine that restores them.
//!
//! A backup folder holds one FULL image of a disk and the INC images that QEMU pushed after it, all of them
//! plain qcow2. This crate has a running QEMU push them, finds such chains, checks them and makes one flattened disk
//! image of any restore point, in parallel and without `qemu-img`.
//!
//! # Layers
//!
//! ```text
//! qmpbackup:  bin -> cli -> capture -> agent -> qmp
//!                                   -> chain -> qcow2 -> storage
//! qmprestore: bin -> cli -> restore -> chain -> qcow2 -> storage
//! ```
//!
//! - `errors`: which kind an error is of; errors in one line
//! - `json`: texts of others, within bounds
//! - `threads`: work in parallel
//! - [`storage`]: bytes at offsets; files and memory, holes, copies in the kernel, publishing by link and rename
//! - [`qcow2`]: the format; header, tables, cluster map, compression, refcounts, the builder of new images, the writer that
//!   changes one in place, check and repair
//! - [`chain`]: what lies in a backup folder; names, order, restore points
//! - [`restore`]: merge, as plan, execution and sink; commit and rebase, in place
//! - `qmp`, `agent` (feature `capture`): QEMU's monitor, and the agent in the guest
//! - `capture` (feature `capture`): one backup of a running machine, as plan, execution and recovery
//! - `cli` (feature `cli`): arguments, progress, listings, exit codes; only this layer prints
//!
//! A layer knows only those to its right. Answers come back as values or as events to an observer.
//!
//! Sizes, lengths, offsets and ranges are in bytes, and moments in seconds since 1970, where nothing else is said.
//!
//! # Promises
//!
//! - Nothing that a guest wrote is lost between two restore points, and a restore point is one moment of all its disks.
//! - A run that fails or is killed costs that run and nothing else.
//! - Reading never writes: backups are opened read-only but for work in place, and that ends right when it is done again,
//!   whenever it was broken off.
//! - A file exists under its final name only when it is whole and on stable storage.
//! - No input makes the engine panic, hang, read outside the chain or use memory out of proportion to the input;
//!   damage gets a typed error that names file, offset and field.
//! - Memory is bounded by threads and table size, never by disk size or by chain length times disk size.

const _: () = assert!(usize::BITS >= 64, "offsets in images need a 64-bit host");

#[cfg(feature = "capture")]
pub mod agent;
#[cfg(feature = "capture")]
pub mod capture;
pub mod chain;
#[cfg(feature = "cli")]
pub mod cli;
mod errors;
mod json;
pub mod qcow2;
#[cfg(feature = "capture")]
pub mod qmp;
pub mod restore;
pub mod storage;
mod threads;

pub use errors::ErrorKind;
