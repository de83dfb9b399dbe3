//! One thing that is wrong with an image, and how bad it is.

use std::fmt;

use crate::qcow2::address::HostOffset;
use crate::qcow2::error::Invalid;

/// Something that is wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A cluster has a higher refcount than references: space is lost, nothing else.
    Leak {
        /// The host cluster.
        cluster: HostOffset,
        /// Its refcount.
        stored: u64,
        /// References that were found.
        counted: u64,
    },
    /// A cluster has more references than its refcount says: the next write may destroy it.
    RefcountTooLow {
        /// The host cluster.
        cluster: HostOffset,
        /// Its refcount.
        stored: u64,
        /// References that were found.
        counted: u64,
    },
    /// The COPIED flag of an entry is set, but the refcount is not exactly one, or the other way round.
    Copied {
        /// "L1" or "L2".
        table: &'static str,
        /// Where the entry is.
        entry: HostOffset,
        /// The cluster that it points to.
        cluster: HostOffset,
        /// What the flag is.
        copied: bool,
    },
    /// A cluster with metadata is used for something else, too.
    Overlap {
        /// The host cluster.
        cluster: HostOffset,
    },
    /// A table overlaps another one; what it points to was not counted.
    OverlappingTable {
        /// Which table.
        what: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// Its length in bytes.
        length: u64,
    },
    /// Several entries of one L1 table point to one L2 table.
    SharedL2Table {
        /// The L2 table.
        table: HostOffset,
        /// The second of them.
        entry: HostOffset,
    },
    /// A field or an entry holds what the format does not allow.
    Invalid(Invalid),
    /// For what a field or an entry holds, QEMU does not open the image. No read of the disk needs it.
    Unopenable(Invalid),
    /// Something ends beyond the end of the file.
    BeyondEnd {
        /// What.
        what: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// Its length in bytes.
        length: u64,
        /// Where the file ends.
        file_length: u64,
    },
    /// An image with an external data file has internal snapshots.
    SnapshotsWithDataFile,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Space is lost.
    Leak,
    /// Refcounts or COPIED flags are wrong: the image can be read but must not be written to.
    Refcount,
    /// Tables are damaged: parts of the disk may be lost.
    Structure,
}

impl Finding {
    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::Leak { .. } => Severity::Leak,
            Self::RefcountTooLow { .. } | Self::Copied { .. } => Severity::Refcount,
            Self::Overlap { .. }
            | Self::OverlappingTable { .. }
            | Self::SharedL2Table { .. }
            | Self::Invalid(_)
            | Self::Unopenable(_)
            | Self::BeyondEnd { .. }
            | Self::SnapshotsWithDataFile => Severity::Structure,
        }
    }
}

impl From<Invalid> for Finding {
    fn from(invalid: Invalid) -> Self {
        Self::Invalid(invalid)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leak { cluster, stored, counted } => {
                write!(f, "leaked: the cluster at offset {cluster} has refcount {stored}, but {counted} references")
            }
            Self::RefcountTooLow { cluster, stored, counted } => {
                write!(f, "the cluster at offset {cluster} has refcount {stored}, but {counted} references")
            }
            Self::Copied { table, entry, cluster, copied } => {
                let (flag, refcount) = if *copied { ("has", "not") } else { ("lacks", "exactly") };
                write!(
                    f,
                    "the {table} entry at offset {entry} {flag} the COPIED flag, but the refcount of the cluster at \
                     offset {cluster} is {refcount} 1"
                )
            }
            Self::Overlap { cluster } => {
                write!(f, "the cluster at offset {cluster} holds metadata, and something else uses it, too")
            }
            Self::OverlappingTable { what, offset, length } => {
                write!(f, "{what} at offset {offset}, {length} bytes long, overlaps another table")
            }
            Self::SharedL2Table { table, entry } => write!(
                f,
                "the L1 entry at offset {entry} points to the L2 table at offset {table}, and so does another entry \
                 of that L1 table"
            ),
            Self::Invalid(invalid) => invalid.fmt(f),
            Self::Unopenable(invalid) => write!(f, "QEMU does not open the image: {invalid}"),
            Self::BeyondEnd { what, offset, length, file_length } => {
                write!(f, "{what} at offset {offset} is {length} bytes long, but the file ends at {file_length:#x}")
            }
            Self::SnapshotsWithDataFile => {
                f.write_str("the image has internal snapshots, which images with an external data file cannot have")
            }
        }
    }
}
