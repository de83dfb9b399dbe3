//! How long work tells what it does, and is told to stop.

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::checked_file::Unverified;
use super::error::{Error, Result};
use crate::qcow2::{self, Finding, Progress};

/// Follows work. Calls come from many threads.
pub trait Observer: Sync {
    /// A new phase begins.
    fn phase(&self, _phase: Phase) {}

    /// So many more of the bytes of this phase are done.
    fn advance(&self, _bytes: u64) {}

    /// A part of the work is done for good.
    fn done(&self, _done: Done) {}

    /// Something is not as it should be, and the work goes on.
    fn warning(&self, _warning: Warning) {}

    /// Asked again and again: whether to give up.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl dyn Observer + '_ {
    /// # Errors
    /// [`Error::Cancelled`] where it is time to give up.
    pub(super) fn go_on(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// The same for those who know no errors.
    pub(super) fn flow(&self) -> ControlFlow<()> {
        if self.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Tells an observer how far one image is.
pub(super) fn observed<T>(
    observer: &dyn Observer,
    check: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> qcow2::Result<T>,
) -> qcow2::Result<T> {
    let mut told = Progress { done: 0, total: 0 };
    let report = check(&mut |progress| {
        observer.advance(progress.done.saturating_sub(told.done));
        told = Progress { done: progress.done.max(told.done), total: progress.total };
        observer.flow()
    })?;
    observer.advance(told.total.saturating_sub(told.done));
    Ok(report)
}

/// The observer that looks away.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Observer for Silent {}

/// What the work does now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The images are checked.
    Checking {
        /// The length of all files together.
        bytes: u64,
    },
    /// Checksums of images are computed.
    Summing {
        /// The length of all files together.
        bytes: u64,
    },
    /// The bytes of images are compared with their checksums.
    Verifying {
        /// Those that are to be compared, of all images.
        bytes: u64,
    },
    /// The tables are read to find which layer holds what.
    Planning,
    /// Guest data moves.
    Copying {
        /// Guest bytes to move.
        bytes: u64,
    },
    /// The output goes to stable storage.
    Syncing,
    /// The output is read again and compared with the images.
    Comparing {
        /// Guest bytes to compare.
        bytes: u64,
    },
}

/// A part of work in place that is done for good.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Done {
    /// The FULL has an internal snapshot of a restore point.
    Snapshot {
        /// Its name.
        name: String,
    },
    /// An INC is gone, since the FULL holds all of it.
    Removed {
        /// The image.
        path: PathBuf,
    },
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// A program marked the image as damaged.
    #[error("{}: some program found this image damaged and marked it as corrupt; it is read as it is", .path.display())]
    MarkedCorrupt {
        /// The image.
        path: PathBuf,
    },
    /// The system had no lock for an image, nor perhaps for those after it.
    #[error("{}: is not locked, the system has no lock for it now: nobody may write to the images meanwhile", .path.display())]
    NotLocked {
        /// The image.
        path: PathBuf,
    },
    /// The header of an image that is salvaged is damaged.
    #[error("{}: is read without what is damaged in its header: {reason}", .path.display())]
    DamagedHeader {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Somebody has written to an image while it was salvaged.
    #[error("{}: was written to, or got another time, while it was read: what was restored of it may be a mixture", .path.display())]
    Overwritten {
        /// The image.
        path: PathBuf,
    },
    /// The tables of an image that is salvaged contradict each other.
    #[error("{}: its tables contradict each other, and what they make of the disk may be wrong anywhere: {first}", .path.display())]
    DamagedTables {
        /// The image.
        path: PathBuf,
        /// The first place where they do.
        first: Box<Finding>,
    },
    /// Clusters of an image that is salvaged are in use, and no table leads to them.
    #[error("{}: a table has perhaps lost clusters, and what they hold may be missing anywhere: {first}", .path.display())]
    LostClusters {
        /// The image.
        path: PathBuf,
        /// The first of them.
        first: Box<Finding>,
    },
    /// Whether the tables of an image that is salvaged contradict each other could not be told.
    #[error("{}: its tables are not checked, and what they make of the disk may be wrong anywhere: {reason}", .path.display())]
    UncheckedTables {
        /// The image.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The newest image that is salvaged does not tell the size of the disk, or its header does not fit its checksum, and nothing
    /// else tells it.
    #[error("{}: the size of the disk is not known: {size} bytes are a guess", .path.display())]
    SizeGuessed {
        /// The image, or where it should be.
        path: PathBuf,
        /// Bytes of the disk that is made.
        size: u64,
    },
    /// Nothing says the format of an image that is salvaged, and it does not start as a qcow2 image.
    #[error("{}: nothing says its format, and it does not start as qcow2 images do: it is read as {}", .path.display(),
        if *.is_raw { "a raw image; where it is a damaged qcow2 image, the output is none of the disk, and --source-format \
        qcow2 is right" } else { "a damaged qcow2 image, as its name or others of its chain are those of qcow2 images; where \
        it is a raw image, only a manifest can say so" })]
    FormatGuessed {
        /// The image.
        path: PathBuf,
        /// Whether it is read as a raw image.
        is_raw: bool,
    },
    /// What was verified when could not be written down: the same parts will be due next time.
    #[error("{}: what was verified cannot be remembered: {reason}", .path.display())]
    NotRemembered {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The bytes of an image are not, or not all, checked.
    #[error("{}: is read without checksums: {}", .path.display(), .reason)]
    Unchecked {
        /// The image.
        path: PathBuf,
        /// Why.
        reason: Unverified,
    },
    /// What was changed in part had been damaged before, and its checksums still say so.
    #[error("{}: {blocks} of the blocks that were changed in part had been damaged before: verify says where", .path.display())]
    WasDamaged {
        /// The image.
        path: PathBuf,
        /// How many blocks, of 64 KiB.
        blocks: u64,
    },
    /// The output is not read again.
    #[error("what left through a pipe cannot be read again: only what was read of the images was checked")]
    NotReadBack,
    /// The images were said to be raw, but each of a chain starts as qcow2 does.
    #[error("{}: is read as raw, as its settings say, but all images of this chain start as qcow2 images do: where they are, \
        the output is none of the disk, and --source-format qcow2 is right", .path.display())]
    LooksLikeQcow2 {
        /// The first image.
        path: PathBuf,
    },
}

/// Passes on whether to give up, and nothing else.
pub(super) struct Uncounted<'a>(pub(super) &'a dyn Observer);

impl Observer for Uncounted<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
