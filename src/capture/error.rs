//! Why a run fails.

use std::io;
use std::path::{Path, PathBuf};

use crate::capture::machine::reply::DeviceError;
use crate::errors::ErrorKind;
use crate::storage::is_full;
use crate::{chain, qcow2, qmp};

/// Why a run fails. Unless it says otherwise, the machine is as it was, and the next INC holds what this one would have.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The monitor does not do what it is told.
    #[error(transparent)]
    Monitor(#[from] qmp::Error),
    /// QEMU was told to stop the machine, and does not answer to `cont`.
    #[error(
        "the machine perhaps stands still: then `qmpbackup recover` lets it go on as soon as QEMU answers, or `cont`"
    )]
    Standing {
        /// What was not answered.
        source: qmp::Error,
    },
    /// All is in order, but for file systems of the guest that a run has frozen and no agent thaws.
    #[error(
        "the guest is perhaps frozen: `recover` or the next run thaws it when the agent answers at {agents}, or where \
         --agent-socket says (if it is not, `blockdev-del` the node qmpbackup-frozen): {reason}"
    )]
    Frozen {
        /// Where agents were asked.
        agents: String,
        /// What they said.
        reason: String,
    },
    /// QEMU says of its disks what cannot be understood.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The backup folder cannot be understood.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// A disk cannot have an image.
    #[error("{disk}: no image can be made")]
    Layout {
        /// The disk.
        disk: String,
        /// Why.
        source: qcow2::LayoutError,
    },
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Work beside the run has come to no end, which is a fault of this program.
    #[error("a thread of this program has failed; please report that")]
    Thread,
    /// There can be no fleece image where it should be.
    #[error("{disk}: no fleece image can be made in {}", folder.display())]
    Fleece {
        /// The disk.
        disk: String,
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A path that cannot be told in JSON.
    #[error("{}: QEMU takes only paths that are UTF-8", path.display())]
    NotUtf8 {
        /// The path.
        path: PathBuf,
    },
    /// A journal that was not written by this program.
    #[error("{}: cannot be understood; remove it if no newer version of this program has written it", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
    },
    /// The id that a new chain was to get, and no bitmap can have.
    #[error("{id:?} cannot be the id of a chain, which is 1 to 200 printable ASCII characters, without spaces")]
    ChainId {
        /// The id.
        id: String,
    },
    /// The id of a chain that no bitmap can have.
    #[error("{}: the id of a chain is one line of 1 to 200 printable characters, without spaces", path.display())]
    Uuid {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else has the backup folder.
    #[error("{} is locked: another run uses this folder or machine", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// Somebody else makes a backup of the machine.
    #[error("this machine cannot be backed up now: {what}")]
    Busy {
        /// How that is known.
        what: String,
    },
    /// This QEMU would crash if it were asked for its nodes now.
    #[error(
        "the job {job} of somebody else has concluded and was not dismissed: this old QEMU would crash; dismiss it first"
    )]
    Fragile {
        /// The job.
        job: String,
    },
    /// The machine is in a state in which its disks are not its own.
    #[error("the machine is in state {status}: it can be backed up before or after that")]
    State {
        /// The state.
        status: String,
    },
    /// Somebody has stopped the machine or let it go on while the run was prepared.
    #[error("the machine has come into state {status} just now; try again")]
    Changed {
        /// The state.
        status: String,
    },
    /// Somebody has exchanged a disk, or taken a snapshot of it, while the run was prepared.
    #[error("{disk}: the device has got another image just now; try again")]
    Exchanged {
        /// The disk.
        disk: String,
    },
    /// Somebody has resized a disk while the run was prepared.
    #[error("{disk}: the disk was resized just now; try again")]
    Resized {
        /// The disk.
        disk: String,
    },
    /// No disk is left to back up.
    #[error("the machine has no disk to back up")]
    NoDisk,
    /// Names that are none of a disk.
    #[error("no disk is called {}", names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", "))]
    NoSuchDisk {
        /// The names.
        names: Vec<String>,
    },
    /// An INC has nothing to build on.
    #[error("{disk}: there is no FULL in {}", folder.display())]
    NoFull {
        /// The disk.
        disk: String,
        /// Where it should be.
        folder: PathBuf,
    },
    /// The chain cannot be continued.
    #[error("{disk}: no INC can follow, {reason}")]
    Broken {
        /// The disk.
        disk: String,
        /// Why.
        reason: String,
    },
    /// An image without a time would replace a FULL that a chain needs.
    #[error("{}: a chain needs this FULL; take another folder, or names with a time", path.display())]
    Replaces {
        /// The FULL.
        path: PathBuf,
    },
    /// An image without a time would replace a file that is in use: a disk of a machine, perhaps of this one.
    #[error("{}: is in use, perhaps as the disk of a machine: take another folder, or names with a time", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// An image without a time would replace a file that nothing says to be a backup.
    #[error(
        "{}: is there, and may be no backup: a folder of backups has a file `uuid`; take another folder, or names with a time",
        path.display()
    )]
    NoBackup {
        /// The file.
        path: PathBuf,
    },
    /// A FULL without a time would stand before images that are older, as names tell the order.
    #[error("{}: this name has no time and stands before {before}; take another folder, or names with a time", path.display())]
    Timeless {
        /// The FULL.
        path: PathBuf,
        /// The name of an older image.
        before: String,
    },
    /// The file of the disk is called as an image with a time is, or as no image.
    #[error("{}: without a time, its name would not tell that this is an image, or tell another one: leave --no-timestamp out", path.display())]
    Ambiguous {
        /// The image.
        path: PathBuf,
    },
    /// A file has the name that an image has until it is whole.
    #[error("{}: is in the way. A run that failed left it, perhaps of another tool, and changes may be in it alone, which no \
        INC would hold: move it away, and run with --level full", path.display())]
    InTheWay {
        /// The file.
        path: PathBuf,
    },
    /// Somebody has removed an image while an INC that builds on it was made.
    #[error("{}: on this image the INC builds, and it was removed meanwhile; what was written since stays recorded, and \
        `--level auto` makes what can be restored", path.display())]
    ParentGone {
        /// The image.
        path: PathBuf,
    },
    /// Somebody has removed all images of the run before they had their names.
    #[error("{}: all images were removed before they had their names", folder.display())]
    NoImage {
        /// The backup folder.
        folder: PathBuf,
    },
    /// A job failed.
    #[error("{disk}: the job failed: {reason}")]
    Job {
        /// The disk.
        disk: String,
        /// What QEMU says.
        reason: String,
    },
    /// The target is full.
    #[error("{disk}: there is no space left in {}", folder.display())]
    TargetFull {
        /// The disk.
        disk: String,
        /// The folder of the image.
        folder: PathBuf,
    },
    /// The fleece image could not take what the guest has overwritten.
    #[error(
        "{disk}: the snapshot was given up, since what the guest overwrote could not be copied to its fleece image in {} in \
         time: is there space, and can all of the disk be read?",
        folder.display()
    )]
    FleeceFull {
        /// The disk.
        disk: String,
        /// The folder of the fleece image.
        folder: PathBuf,
    },
    /// QEMU says that a job is done, and there is no such image.
    #[error("{}: QEMU says that the image is whole, but it is not: {reason}", path.display())]
    Torn {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Jobs do not end though they were told to.
    #[error("jobs do not end: {}", jobs.join(", "))]
    JobsLeft {
        /// The jobs.
        jobs: Vec<String>,
    },
    /// The observer wanted no more.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// What the system says of a file.
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> Self + Copy {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    /// Whether QEMU has a node of that name already.
    pub(super) fn is_duplicate(&self) -> bool {
        let Self::Monitor(error) = self else { return false };
        error.refused().is_some_and(|(_, what)| what.to_lowercase().contains("duplicate"))
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Monitor(error) if error.refused().is_none() => ErrorKind::Unreachable,
            Self::Standing { .. } => ErrorKind::Unreachable,
            Self::Io { source, .. } | Self::Fleece { source, .. } if is_full(source) => ErrorKind::Full,
            Self::TargetFull { .. } | Self::FleeceFull { .. } => ErrorKind::Full,
            Self::Locked { .. } | Self::Busy { .. } => ErrorKind::Locked,
            Self::NoDisk | Self::NoSuchDisk { .. } | Self::NotUtf8 { .. } | Self::ChainId { .. } => ErrorKind::Usage,
            Self::Broken { .. } | Self::Journal { .. } => ErrorKind::Damaged,
            Self::Chain(error) => error.kind(),
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Monitor(_)
            | Self::Frozen { .. }
            | Self::Device(_)
            | Self::Layout { .. }
            | Self::Io { .. }
            | Self::Thread
            | Self::Fleece { .. }
            | Self::Uuid { .. }
            | Self::Fragile { .. }
            | Self::State { .. }
            | Self::Changed { .. }
            | Self::Exchanged { .. }
            | Self::Resized { .. }
            | Self::NoFull { .. }
            | Self::Replaces { .. }
            | Self::InUse { .. }
            | Self::NoBackup { .. }
            | Self::Timeless { .. }
            | Self::Ambiguous { .. }
            | Self::InTheWay { .. }
            | Self::NoImage { .. }
            | Self::ParentGone { .. }
            | Self::Job { .. }
            | Self::Torn { .. }
            | Self::JobsLeft { .. } => ErrorKind::Other,
        }
    }
}
