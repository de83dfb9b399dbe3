//! Why a restore point cannot be restored. Here the path joins what the lower layers found.

use std::io;
use std::path::PathBuf;

use crate::qcow2::{self, Finding, LayoutError};

/// The result of everything in this layer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why there is no output.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An image cannot be opened.
    #[error("{}: cannot be opened", .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An image cannot be read.
    #[error("{}", .path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: qcow2::Error,
    },
    /// The metadata of an image is damaged.
    #[error("{}: its metadata is damaged, errors: {errors}{}", .path.display(), match .first {
        Some(first) => format!(", the first: {first}"),
        None => String::new(),
    })]
    Damaged {
        /// The image.
        path: PathBuf,
        /// How many errors were found.
        errors: u64,
        /// The first of them, if it was kept.
        first: Option<Box<Finding>>,
    },
    /// A raw image cannot be read.
    #[error("{}: cannot be read at offset {offset:#x}", .path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// There is no image at all.
    #[error("there is no image to merge")]
    Empty,
    /// An image says that it rests on something else than the image before it.
    #[error("{}: names {backing:?} as its backing file, but {}", .path.display(), match .expected {
        Some(expected) => format!("the image before it in the chain is {expected:?}: an image is missing or foreign"),
        None => "it is the first of its chain: what is in that file would be lost".to_owned(),
    })]
    Backing {
        /// The image.
        path: PathBuf,
        /// The name in the image.
        backing: String,
        /// The name that would be right.
        expected: Option<String>,
    },
    /// Between planning and copying the tables of an image became others.
    #[error("an image of the chain was changed while it was read: nothing else may write to it")]
    Changed,
    /// The new image cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// No image can have this cluster size.
    #[error("cluster size {size} is not a power of two from 512 to 2097152")]
    ClusterSize {
        /// What was asked for.
        size: u64,
    },
    /// A compressed image has grown beyond what its L2 entries can hold.
    #[error("a compressed image with clusters of this size ends before {offset:#x}: take smaller clusters")]
    CompressedTooLarge {
        /// The first offset that does not fit.
        offset: u64,
    },
    /// The output exists and may not be replaced.
    #[error("{}: exists already; --force replaces it", .path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// The output is one of the images that are read.
    #[error("{}: is itself a part of the chain", .path.display())]
    OutputIsSource {
        /// The output.
        path: PathBuf,
    },
    /// The output is something that no image can be written to.
    #[error("{}: {reason}", .path.display())]
    OutputKind {
        /// The output.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// The block device is smaller than the disk.
    #[error("{}: has {length} bytes, the disk needs {needed}", .path.display())]
    DeviceTooSmall {
        /// The block device.
        path: PathBuf,
        /// Its size.
        length: u64,
        /// The size of the virtual disk.
        needed: u64,
    },
    /// The output cannot be written.
    #[error("{}: cannot be written", .path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The threads cannot be started.
    #[error("cannot start threads")]
    Threads {
        /// What the system said.
        source: rayon::ThreadPoolBuildError,
    },
    /// The observer gave up.
    #[error("cancelled")]
    Cancelled,
}

/// What a caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was asked for does not make sense.
    Usage,
    /// The chain is broken or an image is damaged.
    Damaged,
    /// The output's file system is full.
    Full,
    /// The observer gave up.
    Cancelled,
    /// Anything else.
    Other,
}

impl Error {
    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image { source: qcow2::Error::Io { source, .. }, .. }
            | Self::Read { source, .. }
            | Self::Open { source, .. } => match source.kind() {
                io::ErrorKind::UnexpectedEof => ErrorKind::Damaged,
                _ => ErrorKind::Other,
            },
            Self::Image { source: qcow2::Error::Memory { .. }, .. }
            | Self::Empty
            | Self::Changed
            | Self::CompressedTooLarge { .. }
            | Self::OutputExists { .. }
            | Self::OutputIsSource { .. }
            | Self::OutputKind { .. }
            | Self::DeviceTooSmall { .. }
            | Self::Threads { .. } => ErrorKind::Other,
            Self::Image { .. } | Self::Damaged { .. } | Self::Backing { .. } => ErrorKind::Damaged,
            Self::Write { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Full,
                _ => ErrorKind::Other,
            },
            Self::ClusterSize { .. } | Self::Layout(_) => ErrorKind::Usage,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }
}
