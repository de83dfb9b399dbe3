//! Why a restore point cannot be restored. Here the path joins what the lower layers found.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::checked_file::Misfit;
use crate::chain::{self, Checksums, ChecksumsError, Manifest, ManifestError, SumError, Work};
use crate::errors::ErrorKind;
use crate::qcow2::{self, Finding, LayoutError};
use crate::storage::is_full;

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
    /// Another process uses an image in a way that does not go with what is to be done.
    #[error("{}", .path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// How the other one uses it.
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
    /// Bytes of an image are not what they were when its checksums were made.
    #[error("{}: the block at offset {offset:#x} does not fit its checksum: it is damaged{}", .path.display(), match .guest {
        Some(guest) => format!(", and holds bytes {:#x} to {:#x} of the disk", guest.start, guest.end),
        None => String::new(),
    })]
    Checksum {
        /// The image.
        path: PathBuf,
        /// Where the block begins in the file.
        offset: u64,
        /// The first bytes of the disk that it holds, or whose place it tells, where that is known.
        guest: Option<Range<u64>>,
    },
    /// An image is longer or shorter than when its checksums were made.
    #[error(
        "{}: has {length} bytes, but {expected} when its checksums were made; where another program has changed it on purpose, \
         remove {} and run `qmprestore manifest`",
        .path.display(),
        Checksums::path(.path).display()
    )]
    Length {
        /// The image.
        path: PathBuf,
        /// Its bytes.
        length: u64,
        /// The bytes that it had then.
        expected: u64,
    },
    /// The disk of an image has another size than its manifest says.
    #[error(
        "{}: says that the disk has {size} bytes, but its manifest says {expected}: it is damaged, and `merge --salvage` takes \
         the size of the manifest; where it was resized on purpose, remove {} and run `qmprestore manifest`",
        .path.display(),
        Manifest::path(.path).display()
    )]
    DiskSize {
        /// The image.
        path: PathBuf,
        /// Bytes of the disk as its header says, or of a raw image.
        size: u64,
        /// Bytes of the disk as the manifest says.
        expected: u64,
    },
    /// The output, read again, is not what was written.
    #[error("{}: what was written does not read back: byte {offset:#x} of the disk differs", .path.display())]
    ReadBack {
        /// The output.
        path: PathBuf,
        /// The first byte of the disk that differs.
        offset: u64,
    },
    /// The output cannot be read again.
    #[error("{}: what was written does not read back", .path.display())]
    Unreadable {
        /// The output.
        path: PathBuf,
        /// Why.
        source: Box<Error>,
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
    /// A program has marked an image as corrupt, and nobody may change it before it is repaired.
    #[error("{}: some program marked it as corrupt: repair it first", .path.display())]
    MarkedCorrupt {
        /// The image.
        path: PathBuf,
    },
    /// The file of an image cannot be read.
    #[error("{}: cannot be read at offset {offset:#x}", .path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Where, in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// There is no INC up to the restore point.
    #[error("{}: no incremental images found, nothing to rebase", .path.display())]
    NothingToRebase {
        /// The FULL or COPY.
        path: PathBuf,
    },
    /// The name of the link to the restore point is that of something else.
    #[error("{}: is no link, and the link to the restore point has this name", .path.display())]
    LinkTaken {
        /// Where the link would be.
        path: PathBuf,
    },
    /// There is no image at all.
    #[error("there is no image to merge")]
    Empty,
    /// The images were opened to be salvaged, and a merge would not tell what is lost.
    #[error("the images were opened to be salvaged, but not to be merged: what is lost would not be told")]
    ForSalvage,
    /// The images were not opened to be salvaged.
    #[error("the images were opened to be merged, but not to be salvaged: no loss would be tolerated")]
    NotForSalvage,
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
    /// Between planning and copying the tables of an image became others, or what they tell does not fit together.
    #[error("an image of the chain was changed while it was read: nothing else may write to it")]
    Changed,
    /// Somebody has written to an image since it was opened.
    #[error("{}: was written to, or got another time, while it was read: nothing else may write to it", path.display())]
    Overwritten {
        /// The image.
        path: PathBuf,
    },
    /// The new image cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// No image can have this cluster size.
    #[error("cluster size {size} is not a power of two from 512 to 2097152")]
    ClusterSize {
        /// The bytes that were asked for.
        size: u64,
    },
    /// A compressed image has grown beyond what its L2 entries can hold.
    #[error("a compressed image with clusters of this size ends before {offset:#x}: take smaller clusters")]
    CompressedTooLarge {
        /// The first offset of the file that does not fit.
        offset: u64,
    },
    /// The output exists and may not be replaced.
    #[error("{}: exists already", .path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// The output is a block device that holds something, which may not be overwritten.
    #[error("{}: is not empty", .path.display())]
    DeviceNotEmpty {
        /// The block device.
        path: PathBuf,
    },
    /// The image may be raw or qcow2.
    #[error("{}: starts as a qcow2 image does, but its .config says that the disk was raw: `merge --source-format \
        qcow2` takes it for such an image, and `raw` for a copy of the disk; \"backup-format\": \"qcow2\" or \"raw\" in \
        the .config says so for good", .path.display())]
    EitherFormat {
        /// The image.
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
        /// Its bytes.
        length: u64,
        /// Bytes of the virtual disk.
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
    /// The manifest of an image cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The checksums of an image cannot be used.
    #[error(transparent)]
    Checksums(#[from] ChecksumsError),
    /// Not an image that can be changed in place.
    #[error("{}: {reason}", .path.display())]
    InPlace {
        /// The image.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// No INC follows the FULL, up to the wanted restore point.
    #[error("no INC images up to that restore point: there is nothing to commit")]
    NothingToCommit,
    /// Other work in place was begun, and has to be ended first.
    #[error(
        "{}: a {work} up to {until} was begun and not finished: run `qmprestore {work}` again first, with --until {until} or later",
        .path.display()
    )]
    Unfinished {
        /// The FULL.
        path: PathBuf,
        /// What was begun.
        work: Work,
        /// The last INC that it takes.
        until: String,
    },
    /// An INC that goes into the FULL is gone before the FULL holds all of it.
    #[error("{}: is gone, and its FULL holds only a part of it: put it back", .path.display())]
    Gone {
        /// Where it should be.
        path: PathBuf,
    },
    /// The FULL has a snapshot that could be taken for that of an INC.
    #[error("{}: its snapshot {name:?} has the time of an INC, and could be taken for that of the INC: delete it first", .path.display())]
    SnapshotThere {
        /// The FULL.
        path: PathBuf,
        /// The name of the snapshot.
        name: String,
    },
    /// The work would not find the room that it needs.
    #[error("{}: {needed} bytes may be needed in its file system, but only {available} are free", .path.display())]
    NoSpace {
        /// The image that would grow.
        path: PathBuf,
        /// The most bytes that it would grow by, and those that files beside it need.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// The backup folder cannot be had.
    #[error(transparent)]
    Folder(#[from] chain::Error),
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

/// Whether the system could not read what may be sound.
pub(super) fn is_unread(error: &qcow2::Error) -> bool {
    matches!(error, qcow2::Error::Io { source, .. } if source.kind() != io::ErrorKind::UnexpectedEof)
}

impl Error {
    /// What is wrong with a qcow2 image.
    pub(super) fn image(path: &Path) -> impl Fn(qcow2::Error) -> Self + Copy + '_ {
        move |source| {
            let misfit = if let qcow2::Error::Io { source, .. } = &source { Self::misfit(path, source) } else { None };
            misfit.unwrap_or_else(|| match source {
                qcow2::Error::Cancelled => Self::Cancelled,
                source => Self::Image { path: path.to_owned(), source },
            })
        }
    }

    /// Why an image has no checksums.
    pub(super) fn sums(path: &Path, error: SumError) -> Self {
        match error {
            SumError::Image { offset, source } => {
                Self::misfit(path, &source).unwrap_or_else(|| Self::Read { path: path.to_owned(), offset, source })
            }
            SumError::Write { source } => Self::Write { path: Checksums::path(path), source },
            SumError::Old(error) => error.into(),
            SumError::Cancelled => Self::Cancelled,
        }
    }

    /// A checksum that does not fit, if that is why something could not be read.
    pub(super) fn misfit(path: &Path, source: &io::Error) -> Option<Self> {
        let misfit = source.get_ref()?.downcast_ref::<Misfit>()?;
        Some(Self::Checksum { path: path.to_owned(), offset: misfit.offset, guest: None })
    }

    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image { source: qcow2::Error::Write { source, .. } | qcow2::Error::Sync { source }, .. }
            | Self::Write { source, .. } => full_or_other(source),
            Self::Image { source: qcow2::Error::Io { source, .. }, .. }
            | Self::Read { source, .. }
            | Self::Manifest(ManifestError::Io { source, .. })
            | Self::Checksums(ChecksumsError::Io { source, .. })
            | Self::Open { source, .. } => match source.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => ErrorKind::Damaged,
                _ => ErrorKind::Other,
            },
            Self::Image {
                source:
                    qcow2::Error::Memory { .. }
                    | qcow2::Error::NoRoomInHeader { .. }
                    | qcow2::Error::Failed
                    | qcow2::Error::NotWritable { .. }
                    | qcow2::Error::RefcountOverflow { .. }
                    | qcow2::Error::TableTooLarge { .. },
                ..
            }
            | Self::InPlace { .. }
            | Self::LinkTaken { .. }
            | Self::SnapshotThere { .. }
            | Self::Empty
            | Self::ForSalvage
            | Self::NotForSalvage
            | Self::Changed
            | Self::Overwritten { .. }
            | Self::CompressedTooLarge { .. }
            | Self::OutputExists { .. }
            | Self::DeviceNotEmpty { .. }
            | Self::OutputIsSource { .. }
            | Self::OutputKind { .. }
            | Self::DeviceTooSmall { .. }
            | Self::Manifest(ManifestError::Version { .. })
            | Self::Checksums(ChecksumsError::Version { .. })
            | Self::Threads { .. } => ErrorKind::Other,
            Self::Image { .. }
            | Self::Damaged { .. }
            | Self::MarkedCorrupt { .. }
            | Self::Checksum { .. }
            | Self::Length { .. }
            | Self::DiskSize { .. }
            | Self::Backing { .. }
            | Self::Manifest(_)
            | Self::Checksums(_)
            | Self::Unfinished { .. }
            | Self::Gone { .. } => ErrorKind::Damaged,
            Self::ReadBack { .. } | Self::Unreadable { .. } => ErrorKind::ReadBack,
            Self::NoSpace { .. } => ErrorKind::Full,
            Self::ClusterSize { .. }
            | Self::EitherFormat { .. }
            | Self::Layout(_)
            | Self::NothingToCommit
            | Self::NothingToRebase { .. } => ErrorKind::Usage,
            Self::Folder(error) => error.kind(),
            Self::Locked { .. } => ErrorKind::Locked,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }
}

fn full_or_other(error: &io::Error) -> ErrorKind {
    if is_full(error) { ErrorKind::Full } else { ErrorKind::Other }
}
