//! The disks of a machine as its monitor tells them.

use serde_json::Value;

/// A disk that can be backed up.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// The name of the block backend (`-drive id=`); empty with `-blockdev`.
    pub device: String,
    /// The device in QEMU's object model that reads and writes through the property `drive`, if there is one.
    pub qdev: Option<String>,
    /// The node that the device reads and writes: the top of the graph, a filter perhaps.
    pub node: String,
    /// The node that holds the disk's format: the first below the top that is no filter. Bitmaps live here.
    pub format_node: String,
    /// Names for the disk's folder, the best one first: all that this and other versions of the tool may have taken.
    pub names: Vec<String>,
    /// The disk's file as QEMU names it: a path, perhaps relative to QEMU's working directory, or what stands for one.
    pub file: String,
    /// The last part of the file's name, which images bear.
    pub base: String,
    /// The folder of the disk's file, where it is a local file and the path is absolute.
    pub folder: Option<std::path::PathBuf>,
    /// The format: `qcow2`, `raw`, …
    pub format: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// The cluster size of the image, where it has one.
    pub cluster_size: Option<u64>,
    /// Whether nobody can write to it.
    pub read_only: bool,
    /// Whether its bitmaps outlive QEMU: qcow2 version 3, not read-only.
    pub persistent: bool,
    /// The file names of the images below it, nearest first: the disk is an overlay, an external snapshot was taken.
    pub backing: Vec<String>,
    /// The bitmaps on the format node.
    pub bitmaps: Vec<Bitmap>,
    /// What `query-block` says of the image, as `qemu-img info --output json` prints it.
    pub image: Value,
}

/// A dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are QEMU's, and independent of each other")]
pub struct Bitmap {
    /// Its name; empty where it has none.
    pub name: String,
    /// The node that it is on.
    pub node: String,
    /// Bytes that are dirty.
    pub count: u64,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Whether writes are recorded.
    pub recording: bool,
    /// Whether a job uses it.
    pub busy: bool,
    /// Whether it is stored in the image when QEMU ends.
    pub persistent: bool,
    /// Whether QEMU ended without storing it: it can only be removed.
    pub inconsistent: bool,
}

/// A disk that is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// A name that the user knows: the device's, or the node's.
    pub name: String,
    /// Why.
    pub why: Why,
}

/// Why a disk is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A drive without a medium.
    Empty,
    /// A CD-ROM or floppy.
    Removable,
    /// A raw disk, and raw disks are not asked for.
    Raw,
    /// `--exclude` names it.
    Excluded,
    /// `--include` does not name it.
    NotIncluded,
}
