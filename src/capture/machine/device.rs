//! The disks of a machine as its monitor tells them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::capture::machine::file_name::FileName;
use crate::chain::{BACKUP_FORMAT, FormatHint};

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
    /// The last part of the file's name, which images bear; with `snapshot=on` that of the lowest image, since the
    /// temporary overlay has another name at each start.
    pub base: String,
    /// The folder of the disk's file, where it is a local file and the path is absolute.
    pub folder: Option<PathBuf>,
    /// The format: `qcow2`, `raw`, …; `raw`, too, where a protocol has no format above it.
    pub format: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// The cluster size of the image, where it has one.
    pub cluster_size: Option<u64>,
    /// Whether nobody can write to it.
    pub read_only: bool,
    /// Whether more than one device or export writes to it.
    pub shared: bool,
    /// Whether its bitmaps outlive QEMU: qcow2 version 3, neither read-only nor the temporary overlay of `snapshot=on`.
    pub persistent: bool,
    /// The file names of the images below it, nearest first: the disk is an overlay, an external snapshot was taken.
    pub backing: Vec<String>,
    /// The names of bitmaps on the images below it.
    pub bitmaps_below: Vec<String>,
    /// The bitmaps on the format node.
    pub bitmaps: Vec<Bitmap>,
    /// What QEMU says of the format node's image, as `qemu-img info --output json` prints it.
    pub image: Value,
}

impl Device {
    /// The path of the disk's file, where it is local; a relative one is resolved in QEMU's working directory.
    #[must_use]
    pub fn absolute(&self, cwd: Option<&Path>) -> Option<PathBuf> {
        FileName::parse(&self.file).absolute(cwd)
    }

    /// What images of the disk may bear: the last part of its file's name, and of those below, which were the disk's own
    /// before somebody took an external snapshot.
    #[must_use]
    pub(crate) fn bases(&self) -> Vec<String> {
        let below = self.backing.iter().filter_map(|file| FileName::parse(file).base);
        let mut bases = vec![self.base.clone()];
        bases.extend(below.filter(|base| *base != self.base));
        bases
    }

    /// Whether there are filters above the node with its format.
    pub(crate) fn is_filtered(&self) -> bool {
        self.node != self.format_node
    }

    /// Whether it has a bitmap of this name.
    pub(crate) fn has_bitmap(&self, name: &str) -> bool {
        self.bitmaps.iter().any(|bitmap| bitmap.name == name)
    }

    /// The disk as `info --show blockdev` prints it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "node": self.node,
            "device": self.device,
            "qdev": self.qdev,
            "format": self.format,
            "filename": self.file,
            "virtual_size": self.virtual_size,
            "backing_image": !self.backing.is_empty(),
            "has_bitmap": !self.bitmaps.is_empty(),
            "bitmaps": self.bitmaps.iter().map(Bitmap::to_json).collect::<Vec<_>>(),
            "driver": FileName::parse(&self.file).driver,
            "path": self.folder.as_deref().map(Path::to_string_lossy),
        })
    }
}

/// What the `.config` of a disk holds: its image as `qemu-img info --output json` prints it, and the format of all its backups
/// where that is another one; not where some are `foreign`, whose format that of the disk tells.
#[must_use]
pub(crate) fn config(device: &Device, foreign: bool) -> Value {
    let mut image = device.image.clone();
    // Without a format node QEMU names the protocol here; who restores wants the format
    if let Some(format) = image.get_mut("format") {
        *format = device.format.clone().into();
    }
    let fields = image.as_object_mut().filter(|_| !foreign && device.format != FormatHint::Qcow2.as_str());
    if let Some(fields) = fields {
        fields.insert(BACKUP_FORMAT.to_owned(), FormatHint::Qcow2.as_str().into());
    }
    image
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

impl Bitmap {
    /// The bitmap as QEMU describes it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "count": self.count,
            "granularity": self.granularity,
            "recording": self.recording,
            "busy": self.busy,
            "persistent": self.persistent,
            "inconsistent": self.inconsistent,
        })
    }
}

/// A disk that is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// A name that the user knows: the device's, or the node's.
    pub name: String,
    /// Why.
    pub why: Why,
    /// Whether `--include` names it, and `--exclude` does not.
    pub wanted: bool,
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
