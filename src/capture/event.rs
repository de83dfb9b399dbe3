//! What a run tells while it goes on.

use std::path::PathBuf;
use std::time::Duration;

use crate::capture::machine::device::{Skipped, Why};
use crate::chain::Level;
use crate::qmp::{Command, Version};

/// Follows a run, on any thread.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: &Event);

    /// Whether the run shall end. It is asked often, and never during the moment of the snapshot.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// How much an [`Event`] matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// For those who look for a fault.
    Debug,
    /// What one expects.
    Info,
    /// Something to know; nothing is wrong with the backup.
    Notice,
    /// The backup is not what was asked for, or something is left to do.
    Warning,
}

/// How far the job of a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The disk.
    pub disk: String,
    /// Bytes that are copied.
    pub done: u64,
    /// Bytes to copy: for an INC those that changed.
    pub total: u64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The monitor answers.
    Connected {
        /// Of QEMU.
        version: Version,
    },
    /// What the machine is and does.
    Machine {
        /// Its name.
        name: Option<String>,
        /// `running`, `paused`, …
        status: String,
    },
    /// A command was sent.
    Sent(Command),
    /// A disk is left out.
    Skipped(Skipped),
    /// The machine has no disk of these names.
    NoSuchDisk {
        /// The names.
        names: Vec<String>,
        /// Whether they were to be backed up, and not to be left out.
        wanted: bool,
    },
    /// The machine has an emulated TPM, whose state is on no disk.
    Tpm {
        /// Its name.
        id: String,
    },
    /// The machine has a disk that another program keeps, which QEMU cannot back up.
    ForeignDisk {
        /// Its device.
        id: String,
        /// The kind of device.
        kind: String,
    },
    /// What an earlier run has left is put in order.
    Recovered {
        /// What.
        what: String,
    },
    /// Another tool's or chain's bitmaps make the guest's writes slower.
    ForeignBitmaps {
        /// The disk.
        disk: String,
        /// How many.
        count: usize,
    },
    /// The folder has a chain already, with another id.
    OtherUuid {
        /// The one that was asked for.
        wanted: String,
        /// The one that counts.
        chain: String,
    },
    /// The newest image is of a time that has not come yet, and what is made now gets a later one.
    ClockBehind {
        /// Of the new images, seconds since 1970.
        time: i64,
    },
    /// What a disk gets.
    Level {
        /// The disk.
        disk: String,
        /// The level.
        level: Level,
        /// Why.
        reason: String,
        /// Bytes that have changed; INCs only.
        changed: Option<u64>,
        /// Whether it is what was asked for.
        severity: Severity,
    },
    /// Fleecing is off, though it was not asked to be.
    NoFleece {
        /// The disk, or none where it is all of them.
        disk: Option<String>,
        /// Why.
        reason: String,
    },
    /// A fleece image goes where the images are, since the disk is no file in a folder that is known.
    FleeceInTarget {
        /// The disk.
        disk: String,
        /// The folder.
        folder: PathBuf,
    },
    /// The image that is made of a disk.
    Target {
        /// The disk.
        disk: String,
        /// The image, under its last name.
        path: PathBuf,
        /// Bytes of the disk.
        size: u64,
    },
    /// The guest's file systems are not frozen, though they should be.
    NotFrozen {
        /// Why.
        reason: String,
    },
    /// The moment of the snapshot is over.
    Moment {
        /// How long the machine stood still.
        stopped: Option<Duration>,
        /// How long the guest's file systems were frozen, and how many.
        frozen: Option<(Duration, u64)>,
    },
    /// How far the jobs are.
    Progress(Vec<Progress>),
    /// All jobs are done.
    Copied {
        /// Bytes of the disks that the jobs went through: of a FULL all, of an INC those that changed.
        bytes: u64,
        /// How long it took.
        elapsed: Duration,
    },
    /// All jobs are done, and checksums of the images are computed while they go to stable storage.
    Sealing {
        /// Bytes of the images that are summed.
        done: u64,
        /// Bytes of the images.
        total: u64,
    },
    /// The images are on stable storage and have checksums.
    Sealed {
        /// Bytes of the images.
        bytes: u64,
        /// How long it took.
        elapsed: Duration,
    },
    /// An image has its name.
    Published {
        /// The disk.
        disk: String,
        /// The image.
        path: PathBuf,
        /// The level.
        level: Level,
        /// Seconds since 1970.
        time: i64,
    },
    /// A bitmap goes.
    BitmapRemoved {
        /// Its name.
        name: String,
        /// The node it was on.
        node: String,
    },
    /// Something that could not be done, without harm to the backup.
    Trouble {
        /// What.
        what: String,
    },
}

impl Event {
    /// How much it matters.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::Sent(_) => Severity::Debug,
            Self::Connected { .. }
            | Self::Machine { .. }
            | Self::NoFleece { disk: None, .. }
            | Self::FleeceInTarget { .. }
            | Self::Target { .. }
            | Self::Moment { .. }
            | Self::Progress(_)
            | Self::Copied { .. }
            | Self::Sealing { .. }
            | Self::Sealed { .. }
            | Self::Published { .. }
            | Self::BitmapRemoved { .. } => Severity::Info,
            Self::Skipped(skipped) => match skipped.why {
                _ if skipped.wanted => Severity::Warning,
                Why::Empty => Severity::Debug,
                Why::Removable | Why::Excluded | Why::NotIncluded => Severity::Info,
                Why::Raw => Severity::Notice,
            },
            Self::NoSuchDisk { wanted: false, .. }
            | Self::Tpm { .. }
            | Self::ForeignDisk { .. }
            | Self::Recovered { .. }
            | Self::ForeignBitmaps { .. }
            | Self::OtherUuid { .. }
            | Self::NoFleece { .. } => Severity::Notice,
            Self::Level { severity, .. } => *severity,
            Self::NoSuchDisk { wanted: true, .. }
            | Self::ClockBehind { .. }
            | Self::NotFrozen { .. }
            | Self::Trouble { .. } => Severity::Warning,
        }
    }
}
