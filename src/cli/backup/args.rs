//! The words on the command line of `qmpbackup`: what they are, not what is done with them.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::chain;
use crate::cli::exit::Exit;
use crate::cli::start::Global;
use crate::cli::units;
use crate::qmp::Address;

const EXAMPLES: &str = "\
Examples:
  qmpbackup --socket /run/vm.qmp backup --level full --target /backup/vm
  qmpbackup --socket /run/vm.qmp backup --level auto --target /backup/vm --monthly
  qmpbackup --socket tcp:localhost:4444 backup --level inc --target /backup/vm --exclude disk1
  qmpbackup --socket /run/vm.qmp --agent-socket /run/vm.qga backup --level inc --target /backup/vm --quiesce
  qmpbackup --socket /run/vm.qmp info --show bitmaps
  qmpbackup --socket /run/vm.qmp cleanup --remove-bitmap";

fn after_help() -> String {
    format!("{EXAMPLES}\n\n{}", Exit::table())
}

/// Backs up the disks of a running virtual machine
///
/// QEMU writes the images itself: a FULL holds all of a disk, an INC what changed since the image before it. All disks
/// are as they were at one moment. `qmprestore` makes disks of the images again.
#[derive(Debug, Parser)]
#[command(
    name = "qmpbackup",
    version,
    propagate_version = true,
    after_help = after_help(),
    override_usage = "qmpbackup --socket <PATH|tcp:HOST:PORT> [OPTIONS] <COMMAND>"
)]
pub(super) struct Words {
    #[command(flatten)]
    pub(super) machine: Machine,
    #[command(flatten)]
    pub(super) global: Global,
    /// Send the log to the local syslog, too
    #[arg(long, global = true, help_heading = "Common options")]
    pub(super) syslog: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(super) struct Machine {
    /// The QMP monitor of the machine; required
    // global arguments cannot be required: whoever reads the words looks for it
    #[arg(long, global = true, value_name = "PATH|tcp:HOST:PORT", value_parser = Address::from_str)]
    pub(super) socket: Option<Address>,
    /// The guest agent of the machine
    #[arg(long, global = true, value_name = "PATH|tcp:HOST:PORT", value_parser = Address::from_str)]
    pub(super) agent_socket: Option<Address>,
    /// How long one command of the monitor may take, and a guest to freeze
    #[arg(long, global = true, value_name = "SECONDS", default_value = "60", value_parser = units::parse_seconds)]
    pub(super) timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Backup(Box<Backup>),
    Cleanup(Cleanup),
    Info(Info),
    Recover(Recover),
}

/// Back up the disks of the machine
#[derive(Debug, Args)]
#[command(
    after_help = Exit::table(),
    override_usage = "qmpbackup --socket <PATH|tcp:HOST:PORT> backup [OPTIONS] --level <LEVEL> --target <DIR>"
)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches on a command line, independent of each other")]
pub(super) struct Backup {
    /// What to make of each disk
    #[arg(short, long, value_enum)]
    pub(super) level: Level,
    /// The backup folder; made where it is missing
    #[arg(short, long, value_name = "DIR")]
    pub(super) target: PathBuf,
    /// All disks but these: device, node, device id or file name, as `info --show blockdev` lists them
    #[arg(short, long, value_name = "NAME,…", value_delimiter = ',', conflicts_with = "include")]
    pub(super) exclude: Vec<String>,
    /// Only these disks: device, node, device id or file name, as `info --show blockdev` lists them
    #[arg(short, long, value_name = "NAME,…", value_delimiter = ',')]
    pub(super) include: Option<Vec<String>>,
    /// Raw disks, too: they can have FULL and COPY images, and INCs until QEMU ends
    #[arg(long)]
    pub(super) include_raw: bool,
    /// A folder for each month, as 2026-11, below the target
    #[arg(long)]
    pub(super) monthly: bool,
    /// No folder for each disk
    #[arg(long)]
    pub(super) no_subdir: bool,
    /// No time in the names of FULL and COPY images
    #[arg(long)]
    pub(super) no_timestamp: bool,
    /// No links that tell the level of images without a time
    #[arg(long)]
    pub(super) no_symlink: bool,
    /// The id of a new chain: 1 to 200 printable characters, without spaces [default: a random one]
    #[arg(long, value_name = "ID", value_parser = parse_chain)]
    pub(super) uuid: Option<String>,
    /// Bitmaps that end with QEMU: the first run after its start makes a FULL
    #[arg(long)]
    pub(super) no_persist: bool,
    /// Freeze the file systems of the guest for the moment of the snapshot; needs --agent-socket
    #[arg(long, alias = "quisce")]
    pub(super) quiesce: bool,
    /// Stop the machine for the moment of the snapshot also where QEMU does not need it
    #[arg(long)]
    pub(super) pause: bool,
    /// Where old data waits while the target takes it [default: beside each disk]
    #[arg(long, value_name = "DIR", conflicts_with = "no_fleece")]
    pub(super) fleece_dir: Option<PathBuf>,
    /// Let the guest's writes wait for the target instead; before QEMU 10.1 they fail if it is full
    #[arg(long)]
    pub(super) no_fleece: bool,
    /// How long a write of the guest waits for old data to be kept, before the backup is given up; 0 is forever
    #[arg(long, value_name = "SECONDS", default_value = "45")]
    pub(super) cbw_timeout: u32,
    /// Compress the images
    #[arg(long)]
    pub(super) compress: bool,
    /// Bytes of each disk to copy in a second, such as 50M or 1.5GiB, of which QEMU counts holes, too; 0 is no limit
    #[arg(long, value_name = "BYTES", value_parser = speed, default_value = "0", hide_default_value = true)]
    pub(super) speed_limit: u64,
    /// How QEMU writes the images
    #[arg(long, value_enum, value_name = "MODE", default_value = "threads")]
    pub(super) blockdev_aio: Aio,
    /// Write the images around the host's cache
    #[arg(long)]
    pub(super) blockdev_disable_cache: bool,
    /// How long the images stay attached after copying
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = units::parse_delay,
        default_value = "0",
        hide_default_value = true
    )]
    pub(super) remove_delay: Duration,
    /// Time between two progress lines, where no bar is drawn
    #[arg(
        long,
        alias = "refresh-rate",
        value_name = "SECONDS",
        default_value = "10",
        value_parser = units::parse_seconds
    )]
    pub(super) progress_interval: Duration,
    /// Print the commands that QEMU would get
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// Remove the bitmaps that backups have left in the machine
///
/// Without them the next INC has nothing to build on, and the guest's writes are a little faster.
#[derive(Debug, Args)]
#[command(
    after_help = Exit::table(),
    override_usage = "qmpbackup --socket <PATH|tcp:HOST:PORT> cleanup [OPTIONS] --remove-bitmap"
)]
pub(super) struct Cleanup {
    /// Remove them; the only thing there is to clean up
    #[arg(long, visible_alias = "remove-bitmaps", required = true)]
    pub(super) remove_bitmap: bool,
    /// Only those of this chain: what stands in the file `uuid` of its folder
    #[arg(long, value_name = "ID", value_parser = parse_chain)]
    pub(super) uuid: Option<String>,
}

/// Show what the machine has, as JSON
#[derive(Debug, Args)]
#[command(
    after_help = Exit::table(),
    override_usage = "qmpbackup --socket <PATH|tcp:HOST:PORT> info [OPTIONS] --show <WHAT>"
)]
pub(super) struct Info {
    /// What to show
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(super) show: Show,
}

/// Put in order what a run that was killed has left
///
/// The next backup does so, too. Images that are whole get their names, others go; the machine and its guest go on, and
/// the next INC holds what is missing.
#[derive(Debug, Args)]
#[command(
    after_help = Exit::table(),
    override_usage = "qmpbackup --socket <PATH|tcp:HOST:PORT> recover [OPTIONS]"
)]
pub(super) struct Recover {
    /// The backup folder [default: the one that the machine knows of]
    #[arg(short, long, value_name = "DIR")]
    pub(super) target: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Level {
    /// All of it, outside of any chain
    Copy,
    /// All of it, as the first image of a chain
    Full,
    /// What changed since the newest image; a disk that is new gets a FULL
    Inc,
    /// INC where that can be, else FULL
    Auto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Aio {
    /// A pool of threads
    Threads,
    /// The kernel's ring; not every QEMU has it
    #[value(name = "io_uring")]
    IoUring,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Show {
    /// The disks
    Blockdev,
    /// The bitmaps of each node
    Bitmaps,
}

/// QEMU counts with a sign.
fn speed(text: &str) -> Result<u64, String> {
    let bytes = units::parse_size(text)?;
    if i64::try_from(bytes).is_ok() { Ok(bytes) } else { Err(format!("{text:?} is more than QEMU can count")) }
}

fn parse_chain(text: &str) -> Result<String, &'static str> {
    if chain::is_chain_id(text) {
        Ok(text.to_owned())
    } else {
        Err("the id of a chain is 1 to 200 printable ASCII characters, without spaces")
    }
}
