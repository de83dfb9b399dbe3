//! What is asked of a run.

use std::path::PathBuf;
use std::time::Duration;

use crate::capture::machine::selection::Selection;
use crate::qmp::Address;

/// How to reach a machine.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The monitor.
    pub monitor: Address,
    /// The guest agent.
    pub agent: Option<Address>,
    /// How long one command of the monitor may take, and a guest to freeze.
    pub timeout: Duration,
}

/// The level that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedLevel {
    /// All of each disk, outside of any chain.
    Copy,
    /// All of each disk, as the first image of a chain.
    Full,
    /// What changed since the newest image; a disk that has none gets a FULL.
    Inc,
    /// An INC where that can be, else a FULL.
    Auto,
}

/// Where old data waits while a slow target takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fleece {
    /// In files beside the disks.
    BesideDisk,
    /// In files in this folder.
    In(PathBuf),
    /// Nowhere: the guest's writes wait for the target. If that fails, QEMU before 10.1 lets them fail, too.
    Off,
}

/// How QEMU reads and writes the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// A pool of threads.
    Threads,
    /// The kernel's ring.
    IoUring,
}

/// What is asked of a backup.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches of a command line, independent of each other")]
pub struct Request {
    /// The machine.
    pub connection: Connection,
    /// The level.
    pub level: RequestedLevel,
    /// The backup folder.
    pub target: PathBuf,
    /// A folder for each month below it.
    pub monthly: bool,
    /// Which disks.
    pub selection: Selection,
    /// A folder for each disk.
    pub subdir: bool,
    /// The time in the names of FULL and COPY images.
    pub timestamp: bool,
    /// Links that tell the level of images without a time.
    pub symlink: bool,
    /// The id of a new chain: see [`is_chain_id`](crate::chain::is_chain_id).
    pub uuid: Option<String>,
    /// Bitmaps that stay when QEMU ends, where the disk can keep them.
    pub persist: bool,
    /// Freeze the guest's file systems for the moment of the snapshot.
    pub quiesce: bool,
    /// Stop the machine for that moment also where QEMU does not need it.
    pub pause: bool,
    /// Where old data waits.
    pub fleece: Fleece,
    /// Seconds that a write of the guest waits for the fleece image before the run is given up; 0 is forever.
    pub cbw_timeout: u32,
    /// Compress the images.
    pub compress: bool,
    /// Bytes that each disk's job may move in a second; 0 is no limit.
    pub speed_limit: u64,
    /// How long the images stay attached when all is done.
    pub remove_delay: Duration,
    /// Go around the host's cache for the images.
    pub direct: bool,
    /// How QEMU writes the images.
    pub aio: Aio,
    /// Time between two looks at the jobs that are told.
    pub progress_interval: Duration,
}

impl Request {
    /// Asks for what the program does by itself: all disks, a folder for each, fleecing beside the disks, no limits.
    #[must_use]
    pub fn new(connection: Connection, level: RequestedLevel, target: PathBuf) -> Self {
        Self {
            connection,
            level,
            target,
            monthly: false,
            selection: Selection::default(),
            subdir: true,
            timestamp: true,
            symlink: true,
            uuid: None,
            persist: true,
            quiesce: false,
            pause: false,
            fleece: Fleece::BesideDisk,
            cbw_timeout: 45,
            compress: false,
            speed_limit: 0,
            remove_delay: Duration::ZERO,
            direct: false,
            aio: Aio::Threads,
            progress_interval: Duration::from_secs(10),
        }
    }
}
