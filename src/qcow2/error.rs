//! What is wrong with an image: kind, place, value and what would have been right.
//!
//! The path of the file is not in here: the layer that knows it adds it.

use std::fmt;
use std::io;

use super::address::{GuestOffset, HostOffset};
use super::wire::{FLAG_COMPRESSED, OFFSET_MASK};

/// The result of everything that reads an image.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field holds what the format does not allow, or what no supported image has.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A table or a cluster lies beyond the end of the file.
    #[error(
        "{what} at offset {offset} is {length} bytes long, but the file ends at {file_length:#x}: it was truncated"
    )]
    Truncated {
        /// What lies there.
        what: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// Its bytes.
        length: u64,
        /// Bytes of the file.
        file_length: u64,
    },
    /// Incompatible feature bits that this program does not know.
    #[error("unknown incompatible features at offset 72: {}", names.join(", "))]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
        /// What the image's own feature name table calls them, else their numbers.
        names: Vec<String>,
    },
    /// The guest's data is encrypted.
    #[error("the image is encrypted ({method}, crypt_method at offset 32): encrypted images are not supported")]
    Encrypted {
        /// The name of the method.
        method: &'static str,
    },
    /// The guest's data lies in another file, which nobody gave.
    #[error("the image keeps its data in an external file, {name:?}, which is not opened: {reason}")]
    DataFile {
        /// The name in the image.
        name: String,
        /// Why it is not opened.
        reason: String,
    },
    /// The image rests on a backing file where only a complete image will do.
    #[error("the image rests on a backing file, {name:?}, at guest offset {guest}")]
    NeedsBacking {
        /// The name in the image.
        name: String,
        /// The first guest offset that is in the backing file.
        guest: GuestOffset,
    },
    /// A read beyond the end of the virtual disk.
    #[error("{length} bytes at guest offset {offset} extend past the end of the disk, which has {size} bytes")]
    BeyondDisk {
        /// Where the read starts.
        offset: GuestOffset,
        /// How many bytes.
        length: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// Two L1 entries point to one L2 table.
    #[error("L1 entries {first} and {second} both point to the L2 table at offset {table}")]
    SharedL2Table {
        /// The lower index.
        first: u64,
        /// The higher index.
        second: u64,
        /// The table.
        table: HostOffset,
    },
    /// An L1 entry that cannot be used, of an image that was [opened all the same](super::Image::open_damaged).
    #[error("the L2 table of L1 entry {index} is unknown: {reason}")]
    DamagedL1 {
        /// Its index.
        index: u64,
        /// What is wrong with it, or with the L1 table.
        reason: String,
    },
    /// A compressed cluster cannot be inflated.
    #[error("the compressed cluster at offset {host} (guest offset {guest}) is damaged: {reason}")]
    Compressed {
        /// Where the compressed data starts.
        host: HostOffset,
        /// The guest cluster that it holds.
        guest: GuestOffset,
        /// What the codec found.
        reason: String,
    },
    /// A text in the image is not what it should be.
    #[error("{what} at offset {offset} {reason}")]
    Text {
        /// Which text.
        what: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// What is wrong with it.
        reason: String,
    },
    /// The system has no memory for tables of a bounded size.
    #[error("cannot get {bytes} bytes of memory")]
    Memory {
        /// How many.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// An observer asked to stop.
    #[error("the work was cancelled")]
    Cancelled,
    /// The system could not read.
    #[error("cannot read {what} at offset {offset}")]
    Io {
        /// What lies there.
        what: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// What the system said.
        source: io::Error,
    },
    /// The system could not write.
    #[error("cannot write {what} at offset {offset}")]
    Write {
        /// What was to lie there.
        what: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// What the system said.
        source: io::Error,
    },
    /// The system could not bring what was written to stable storage.
    #[error("cannot sync the image")]
    Sync {
        /// What the system said.
        source: io::Error,
    },
    /// An earlier write failed, and nothing more is written.
    #[error("an earlier write to the image failed: open it again")]
    Failed,
    /// The image can be read, but not changed in place.
    #[error("the image cannot be changed in place: {reason}")]
    NotWritable {
        /// Why not.
        reason: &'static str,
    },
    /// Tables of an image that is to be changed in place are damaged.
    #[error("its tables are damaged, and what they lead to cannot be counted: check the image")]
    DamagedTables,
    /// A cluster that something refers to counts as free.
    #[error("the cluster at offset {cluster} is in use, but its refcount is 0: repair the image first")]
    InUse {
        /// Where the cluster starts.
        cluster: HostOffset,
    },
    /// Two tables lie in one cluster.
    #[error("{what} and another table both lie in the cluster at offset {cluster}: repair the image first")]
    SharedMetadata {
        /// One of them.
        what: &'static str,
        /// Where the cluster starts.
        cluster: HostOffset,
    },
    /// A refcount of this width cannot count one more reference.
    #[error("the cluster at offset {cluster} has as many references as refcounts of {bits} bits can count")]
    RefcountOverflow {
        /// The host cluster.
        cluster: HostOffset,
        /// Bits in a refcount.
        bits: u32,
    },
    /// A table would be longer than QEMU takes.
    #[error("{what} would have {bytes} bytes, at most {most} are possible")]
    TableTooLarge {
        /// Which table.
        what: &'static str,
        /// The bytes that it would have.
        bytes: u64,
        /// The bytes that it may have.
        most: u64,
    },
    /// The header cannot be changed so that a crash does no harm: it has no free room for what is to come.
    #[error("{what} finds no room in the header, which has a cluster of {cluster_size} bytes")]
    NoRoomInHeader {
        /// What was to be written.
        what: &'static str,
        /// Bytes in a cluster of the image.
        cluster_size: u64,
    },
    /// A name that no image can have in its header.
    #[error("{what} cannot be {name:?}: it {reason}")]
    Name {
        /// What the name is for.
        what: &'static str,
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// More of something than QEMU takes.
    #[error("{count} {what}, but at most {most} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// How many there may be.
        most: u64,
    },
    /// The image has no internal snapshot or bitmap of that name.
    #[error("the image has no {what} {name:?}")]
    NoSuch {
        /// What was looked for.
        what: &'static str,
        /// The name.
        name: String,
    },
}

/// A field with a value that is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// The name of the field in the specification.
    pub field: &'static str,
    /// Where the field lies in the file.
    pub offset: HostOffset,
    /// What it holds.
    pub value: u64,
    /// What it may hold.
    pub allowed: Allowed,
}

/// What a field may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Allowed {
    /// Any number between two others, both included.
    Range(u64, u64),
    /// Just this.
    Exactly(u64),
    /// Offsets that are multiples of this.
    MultipleOf(u64),
    /// Offsets below the end of the file, which is here.
    BeforeEnd(u64),
    /// Offsets behind the header cluster, which ends here.
    BehindHeader(u64),
    /// No bits but these.
    Bits(u64),
    /// Another number, for this reason.
    Because(&'static str),
    /// Other bits, for this reason.
    Otherwise(&'static str),
}

impl std::error::Error for Invalid {}

impl Invalid {
    /// How much of a plain cluster is in the file, in whole sectors, where this is an L2 entry that is wrong because the file
    /// ends before the cluster does.
    pub(crate) fn held(&self) -> Option<u64> {
        match self.allowed {
            Allowed::BeforeEnd(end) if self.value & FLAG_COMPRESSED == 0 => {
                (end / 512 * 512).checked_sub(self.value & OFFSET_MASK)
            }
            _ => None,
        }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, offset, value, allowed } = self;
        match allowed {
            Allowed::Range(..) | Allowed::Because(_) => write!(f, "{field} is {value}, {allowed} (offset {offset})"),
            _ => write!(f, "{field} is {value:#x}, {allowed} (offset {offset})"),
        }
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(least, most) => write!(f, "supported range is {least}..={most}"),
            Self::Exactly(value) => write!(f, "it must be {value:#x}"),
            Self::MultipleOf(unit) => write!(f, "it must be a multiple of {unit}"),
            Self::BeforeEnd(end) => write!(f, "it must lie before the end of the file at {end:#x}"),
            Self::BehindHeader(end) => write!(f, "it must lie behind the header, which ends at {end:#x}"),
            Self::Bits(mask) => write!(f, "only the bits {mask:#x} may be set"),
            Self::Because(reason) | Self::Otherwise(reason) => f.write_str(reason),
        }
    }
}
