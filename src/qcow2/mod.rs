//! The qcow2 format, versions 2 and 3, as QEMU's `docs/interop/qcow2.rst` describes it.
//!
//! ```text
//! header ─ l1_table_offset ──> L1 table ──> L2 tables ──> data clusters, plain or compressed
//!        ├ refcount_table_offset ──> refcount table ──> refcount blocks
//!        ├ snapshots_offset ──> snapshot table ──> an L1 table for each
//!        └ extensions ──> bitmap directory ──> bitmap tables ──> bitmap data
//! ```
//!
//! Nothing in an image is trusted: offsets must lie in the file, behind the header and on their boundaries, tables
//! within QEMU's own limits, and a file that an image names is opened only by a [`Gate`]. What is wrong becomes an
//! [`Error`] with place, value and allowed range. Reading never writes.
//!
//! ```
//! use std::sync::Arc;
//! use qmpbackup::qcow2::{GuestOffset, Image, Reader};
//! use qmpbackup::storage::FileStorage;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/FULL-1793588400-disk.qcow2"));
//! let image = Image::open(Arc::new(FileStorage::open(&path)?))?;
//! let mut sector = [0; 512];
//! Reader::new(&image).read(&mut sector, GuestOffset(1024))?;
//! # assert_eq!(sector[56..58], [0x53, 0xef], "the magic of a superblock of ext4");
//! # Ok(())
//! # }
//! ```

mod address;
mod bitmap;
mod builder;
mod check;
mod codec;
mod cursor;
mod entry;
mod error;
mod extensions;
mod features;
mod geometry;
mod header;
mod image;
mod l1;
mod locate;
mod map;
mod noise;
mod pieces;
mod reader;
mod refcount;
mod repair;
mod snapshot;
mod wire;
mod writer;

pub use address::{GuestOffset, HostOffset};
pub use bitmap::Bitmap;
pub(crate) use builder::Packer;
pub use builder::{Layout, LayoutError, RefcountWriter};
pub(crate) use check::check_apart;
pub use check::{CheckLimits, ClusterCounts, Finding, Progress, Report, Severity, check};
pub use codec::{CompressionType, Deflater, Inflater};
pub use entry::CompressedCluster;
pub use error::{Allowed, Error, Invalid, Result};
pub use extensions::{BitmapsExtension, Extensions};
pub use features::{FeatureName, Features};
pub use geometry::Geometry;
pub use header::{Backing, Header, Table};
pub(crate) use header::{CRYPT_METHOD, KnownDamage};
pub use image::{ClosedGate, Gate, Image};
pub use locate::{ImageRegion, Located, locate};
pub(crate) use map::Unmapped;
pub use map::{Content, Extent, MapBuffer};
pub use reader::{ClusterReader, Reader};
pub use repair::{Repair, Repaired, repair};
pub use snapshot::Snapshot;
pub(crate) use writer::plan_backing;
pub use writer::{Place, Writer, set_backing};

pub(crate) use wire::{FLAG_ZERO as ZERO_CLUSTER, MAGIC};
