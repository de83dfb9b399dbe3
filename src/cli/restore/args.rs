//! The arguments of `qmprestore`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::chain::When;
use crate::cli::exit::Exit;
use crate::cli::start::Global;
use crate::cli::units;
use crate::qcow2::{CompressionType, Repair};
use crate::restore::{Format, Share};

/// Restores disk images from backup folders
///
/// A backup folder holds a FULL image of a disk and the INC images that were made after it. The newest INC, or any
/// image before it, and all that it builds on become one disk image. Only `commit`,
/// `snapshotrebase`, `rebase` and `check --repair` change backups.
#[derive(Debug, Parser)]
#[command(name = "qmprestore", version, propagate_version = true, after_help = Exit::table())]
pub struct Arguments {
    #[command(flatten)]
    pub(super) global: Global,
    /// As with the command, where the Python tool has it
    #[arg(long, hide = true)]
    pub(super) skip_check: bool,
    /// Does nothing here
    #[arg(long, hide = true)]
    pub(super) use_writeback: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

impl Command {
    /// Does not check images before they are read, where the command knows that.
    pub(super) fn skip_check(&mut self) {
        match self {
            Self::Merge(merge) => merge.skip_check = true,
            Self::Commit(commit) | Self::Snapshotrebase(commit) => commit.skip_check = true,
            Self::Rebase(rebase) => rebase.skip_check = true,
            Self::List(_) | Self::Check(_) | Self::Verify(_) | Self::Manifest(_) => {}
        }
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    #[command(alias = "restore")]
    Merge(Box<Merge>),
    /// Write INC images into their FULL and remove them
    ///
    /// The FULL holds the restore point then; those before it are gone. INC images after it still fit on top. The images
    /// are changed in place: what was interrupted must be done again, and ends right.
    Commit(Box<Commit>),
    /// Write INC images into their FULL, with an internal snapshot of each
    ///
    /// The FULL gets a snapshot FULL-BACKUP of what it was, unless it has one, and one for each INC, named by its local
    /// time. Then the INC images are gone, and `qemu-img snapshot -a` goes to any of their restore points.
    Snapshotrebase(Box<Commit>),
    List(List),
    Check(Check),
    Verify(Box<Verify>),
    Rebase(Rebase),
    Manifest(Manifest),
}

/// Make one disk image of a restore point
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
#[expect(clippy::struct_excessive_bools, reason = "they are switches on a command line, independent of each other")]
pub(super) struct Merge {
    #[command(flatten)]
    pub(super) place: Place,
    /// The restore point: a time, or the file name of an image or its first characters
    ///
    /// A time picks the newest image that is not after it: a unix time (1643308928), RFC 3339
    /// (2026-11-22T19:41:33Z), a local time ("2026-11-22", "2026-11-22 19:41", "2026-11-22 19:41:33") or a time
    /// before now (-90s, -30m, -6h, -2d, -1w). A name is that of its last image's file, or its first characters
    /// (INC-1643308928)
    #[arg(long, value_name = "WHEN", default_value = "latest", allow_hyphen_values = true, value_parser = When::from_str)]
    pub(super) until: When,
    /// The file or block device to write; `-` writes raw bytes to stdout
    #[arg(long, visible_alias = "targetfile", value_name = "FILE")]
    pub(super) out: PathBuf,
    /// The format of the output [default: qcow2; raw for `--out -`, and where all images are]
    #[arg(long, value_enum)]
    pub(super) format: Option<FormatName>,
    /// The cluster size of a qcow2 output, 512 to 2M [default: that of the FULL]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    pub(super) cluster_size: Option<u64>,
    /// Compress a qcow2 output [default: zlib]
    #[arg(long, value_enum, value_name = "CODEC", num_args = 0..=1, default_missing_value = "zlib")]
    pub(super) compress: Option<CodecName>,
    /// Leave holes in a new file where the images hold zeroes as data, in blocks of 4 KiB
    ///
    /// Compressed images do so in any case. All data is read for this, also where the file system could share it.
    #[arg(long)]
    pub(super) detect_zeroes: bool,
    /// Replace an existing file that nobody uses, overwrite a block device that is not empty
    #[arg(long)]
    pub(super) force: bool,
    /// Guest data to move in a second, such as 50M or 1.5GiB; 0 is no limit
    #[arg(long, value_name = "BYTES", value_parser = units::parse_size, default_value = "0", hide_default_value = true)]
    pub(super) rate_limit: u64,
    /// Threads to work with, at most 256 [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<NonZeroUsize>,
    /// Do not check the metadata of the images before they are read, nor compressed clusters that are passed through
    #[arg(long)]
    pub(super) skip_check: bool,
    /// Check all that is read against the images' checksums, and the output by reading it again
    ///
    /// The exit code is 3 where some of it could not be checked: images have no checksums, or the output is stdout.
    #[arg(long)]
    pub(super) verify: bool,
    /// Restore as much as can be read of a damaged chain, and list what cannot
    ///
    /// What an image does not hold any more comes from the images before it (stale), or is zeroes where there are none
    /// (lost); blocks that do not fit their checksums are taken as they are (damaged). The exit code is 3 where there is
    /// anything to list.
    #[arg(long)]
    pub(super) salvage: bool,
    /// Restore even where a failed backup run may have lost changes
    #[arg(long)]
    pub(super) allow_partial: bool,
    /// The format of all images of the chain, where it cannot be told
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(super) source_format: Option<FormatName>,
    /// Print what would be done, and the qemu-img commands that do the same
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    pub(super) progress: Progress,
}

/// Put INC images into their FULL
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
pub(in crate::cli) struct Commit {
    #[command(flatten)]
    pub(in crate::cli) place: Place,
    /// The last restore point to write: a time, or the file name of an image or its first characters, as with merge
    #[arg(long, value_name = "WHEN", default_value = "latest", allow_hyphen_values = true, value_parser = When::from_str)]
    pub(in crate::cli) until: When,
    /// Guest data to move in a second, such as 50M or 1.5GiB; 0 is no limit
    #[arg(long, value_name = "BYTES", value_parser = units::parse_size, default_value = "0", hide_default_value = true)]
    pub(in crate::cli) rate_limit: u64,
    /// Threads to work with, at most 256 [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(in crate::cli) threads: Option<NonZeroUsize>,
    /// Do not check the INC images before they are written into the FULL; the metadata of the FULL is checked all the same
    #[arg(long)]
    pub(in crate::cli) skip_check: bool,
    /// Go on even where a failed backup run may have lost changes
    #[arg(long)]
    pub(in crate::cli) allow_partial: bool,
    /// Print what would be done, and the qemu-img commands that do the same
    #[arg(long)]
    pub(in crate::cli) dry_run: bool,
    #[command(flatten)]
    pub(in crate::cli) progress: Progress,
}

/// List disks and restore points
///
/// "Allocated" is what an image itself holds of the disk. A restore point is `ok`, `doubtful` (a failed run may have
/// lost changes; merge --allow-partial restores it), `marked corrupt` (by a program that found damage) or `broken`.
/// The exit code is 3 where one is not ok.
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
pub(super) struct List {
    #[command(flatten)]
    pub(super) place: Place,
}

/// Check images as `qemu-img check` does, and repair them if that is asked for
///
/// The exit code is 0 where all are clean, 3 where nothing but space is lost or a program said that an image may be
/// wrong, 4 where an image is damaged; with --repair it says what is left. Without --repair nothing is changed. An
/// image that somebody writes to is not checked, which is exit code 6, and nobody begins to before the check ends.
#[derive(Debug, Args)]
#[command(
    after_help = Exit::table(),
    override_usage = "qmprestore check [OPTIONS] <IMAGE>...\n       qmprestore check [OPTIONS] --dir <DIR> [--filter <TEXT>]"
)]
pub(super) struct Check {
    /// The qcow2 images to check
    #[arg(value_name = "IMAGE", required_unless_present = "dir", conflicts_with_all = ["dir", "filter"])]
    pub(super) images: Vec<PathBuf>,
    /// Check all images of all disks in this folder
    #[arg(long, value_name = "DIR")]
    pub(super) dir: Option<PathBuf>,
    /// Only this disk of the folder: its label, folder or file name, or a part of one
    #[arg(long, value_name = "TEXT", requires = "dir")]
    pub(super) filter: Option<String>,
    /// Make refcounts right again: `leaks` only where nothing else is wrong, `all` whatever is wrong with them
    ///
    /// Damaged tables are not guessed at and stay as they are. An image is as it was until all is written; one that is
    /// clean, or in use, is not touched.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(super) repair: Option<RepairName>,
    #[command(flatten)]
    pub(super) progress: Progress,
}

/// Verify backups against their checksums
///
/// Compares all images with their checksums, checks their tables and their order, and names what is damaged, what of the
/// disk is there, and which restore points suffer. The exit code is 0 where all is right, 3 where something could be
/// checked in part only, 4 where there is damage. Nothing is changed; with --sample and --max-age, `.qmpbackup` remembers
/// what was verified when.
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
pub(super) struct Verify {
    #[command(flatten)]
    pub(super) place: Place,
    /// Only the images of this restore point: a time, or the file name of an image or its first characters, as with merge
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true, value_parser = When::from_str)]
    pub(super) until: Option<When>,
    /// Compare only about this part of all bytes, such as 5%: what was verified longest ago, or never, first
    #[arg(long, value_name = "PERCENT", value_parser = units::parse_share)]
    pub(super) sample: Option<Share>,
    /// Compare only what was not verified for so long: 90s, 30m, 6h, 30d, 4w
    #[arg(long, value_name = "AGE", value_parser = units::parse_age)]
    pub(super) max_age: Option<Duration>,
    /// Threads to work with, at most 256 [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<NonZeroUsize>,
    #[command(flatten)]
    pub(super) progress: Progress,
}

/// Base the images of a restore point on each other, so that QEMU opens it where it lies
///
/// Each INC up to the restore point gets the name of the image before it as its backing file, and the link `image` in
/// their folder leads to the restore point. No data moves, and the folder can be moved afterwards. Whoever writes to one
/// of the images spoils all restore points after it: open an overlay, or `merge` instead.
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
pub(super) struct Rebase {
    #[command(flatten)]
    pub(super) place: Place,
    /// The restore point, as for `merge`
    #[arg(long, value_name = "WHEN", default_value = "latest", allow_hyphen_values = true, value_parser = When::from_str)]
    pub(super) until: When,
    /// Rebase even where a failed backup run may have lost changes
    #[arg(long)]
    pub(super) allow_partial: bool,
    /// Do not check the metadata of the images before they are changed
    #[arg(long)]
    pub(super) skip_check: bool,
    /// Print what would be changed, and the qemu-img commands that do the same
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Has no effect, since no data moves
    #[arg(long, hide = true, value_name = "BYTES", value_parser = units::parse_size, default_value = "0")]
    pub(super) rate_limit: u64,
    #[command(flatten)]
    pub(super) progress: Progress,
}

/// Make manifests and checksums for images that have none
///
/// Backups have both in the folder `.qmpbackup` beside their images; those of other tools, and of versions of this program
/// before them, have not. This makes them for all chains that are whole: what they say is what is known now, so images are
/// checked first, and nothing is made for a chain in which one is damaged (exit code 4), or of which it is not certain
/// that it is whole (3). What an image has already is neither changed nor looked at. The images are not changed.
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
pub(super) struct Manifest {
    #[command(flatten)]
    pub(super) place: Place,
    /// Threads to work with, at most 256 [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<NonZeroUsize>,
    /// Make nothing, only say what would be made
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    pub(super) progress: Progress,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Place {
    /// The folder of a disk's images, or one with several of these
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) dir: PathBuf,
    /// The disk: its label, folder or file name; a part of one is enough where the disk is not changed
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) filter: Option<String>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Progress {
    /// Time between two progress lines, where no bar is drawn
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = units::parse_seconds)]
    pub(in crate::cli) progress_interval: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum FormatName {
    Qcow2,
    Raw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CodecName {
    Zlib,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RepairName {
    Leaks,
    All,
}

impl From<RepairName> for Repair {
    fn from(name: RepairName) -> Self {
        match name {
            RepairName::Leaks => Self::Leaks,
            RepairName::All => Self::All,
        }
    }
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Qcow2 => Self::Qcow2,
            FormatName::Raw => Self::Raw,
        }
    }
}

impl From<CodecName> for CompressionType {
    fn from(name: CodecName) -> Self {
        match name {
            CodecName::Zlib => Self::Deflate,
            CodecName::Zstd => Self::Zstd,
        }
    }
}

impl Merge {
    /// Whether the output is stdout.
    pub(super) fn streams(&self) -> bool {
        self.out == Path::new("-")
    }
}
