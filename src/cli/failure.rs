//! Why a program fails: what happened, where, why, what to do next, and with which exit code.

use std::io;
use std::path::PathBuf;

use super::exit::Exit;
use super::signals;
use crate::chain::ChecksumsError;
use crate::errors::ErrorKind;
use crate::storage::is_full;
use crate::{capture, chain, errors, qmp, restore};

/// Why a program fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Arguments that do not go together.
    #[error("{0}")]
    Usage(&'static str),
    #[error(transparent)]
    Chain(#[from] chain::Error),
    #[error(transparent)]
    Restore(#[from] restore::Error),
    /// The output is one that does not go away: a block device, or what has left through stdout.
    #[error(transparent)]
    Unfinished(restore::Error),
    /// Images were to be changed in place, and nothing was changed.
    #[error(transparent)]
    Refused(restore::Error),
    /// Images are changed in part: the same command has to be run again.
    #[error(transparent)]
    InPlace(restore::Error),
    /// Images are changed as they were to be, but nobody knows whether the last change stays.
    #[error(transparent)]
    Undurable(restore::Error),
    /// A rebase has changed some of its images.
    #[error(transparent)]
    HalfRebased(restore::Error),
    /// Nothing of the restore point can be salvaged.
    #[error(transparent)]
    Unsalvageable(Box<Self>),
    #[error(transparent)]
    Capture(#[from] capture::Error),
    #[error("{}: is itself a part of the chain, or of one beside it", .path.display())]
    OutputIsBackup { path: PathBuf },
    #[error("{}: would be taken for an image of the backup: take another name", .path.display())]
    OutputNamedAsBackup { path: PathBuf },
    #[error("{}: is a part of a backup, or would be taken for one: take another name", .path.display())]
    OutputOfBackup { path: PathBuf },
    #[error("cannot print the result")]
    Print { source: io::Error },
    #[error("{}: cannot be opened for the log", .path.display())]
    LogFile { path: PathBuf, source: io::Error },
    #[error("{}: is a part of a backup, and no log: name another file with -L", .path.display())]
    LogOfBackup { path: PathBuf },
    #[error("cannot watch for signals")]
    Signals { source: io::Error },
    #[error("cannot wait for sockets")]
    Runtime { source: io::Error },
}

impl Failure {
    /// The error and its causes.
    pub(super) fn message(&self) -> String {
        errors::line(self)
    }

    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Unsalvageable(failure) => failure.exit(),
            Self::Usage(_) => Exit::Usage,
            Self::Chain(error) => of_kind(error.kind()),
            Self::Restore(error)
            | Self::Unfinished(error)
            | Self::Refused(error)
            | Self::InPlace(error)
            | Self::Undurable(error)
            | Self::HalfRebased(error) => of_kind(error.kind()),
            Self::Capture(error) => of_kind(error.kind()),
            Self::Print { source } if is_full(source) => Exit::Full,
            Self::OutputIsBackup { .. }
            | Self::OutputNamedAsBackup { .. }
            | Self::OutputOfBackup { .. }
            | Self::LogOfBackup { .. }
            | Self::Print { .. }
            | Self::LogFile { .. }
            | Self::Signals { .. }
            | Self::Runtime { .. } => Exit::Error,
        }
    }

    /// The failure of a salvage.
    pub(super) fn of_salvage(self) -> Self {
        if self.exit() == Exit::Damaged { Self::Unsalvageable(Box::new(self)) } else { self }
    }

    /// What to do next, where the message does not say it.
    pub(super) fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Unsalvageable(_) => {
                Some("nothing was written; `qmprestore list` shows other restore points, --until names one")
            }
            Self::Chain(chain::Error::Doubtful { .. }) => {
                Some("name an earlier one with --until, or take this one as it is with --allow-partial")
            }
            Self::Chain(error) => match error.kind() {
                ErrorKind::Damaged => Some(
                    "`qmprestore list` shows which restore points are whole; `merge --salvage` restores what can still be read",
                ),
                ErrorKind::Locked => Some("run again when it has ended"),
                _ => None,
            },
            Self::Restore(restore::Error::OutputExists { .. }) => Some("--force replaces it"),
            Self::Restore(restore::Error::Checksums(ChecksumsError::Damaged { .. } | ChecksumsError::Io { .. })) => {
                Some("nothing was written; without --verify it is merged as it is")
            }
            Self::Restore(restore::Error::DeviceNotEmpty { .. }) => Some("--force overwrites it"),
            Self::Restore(error) => match error.kind() {
                ErrorKind::Damaged => Some(
                    "nothing was written; `qmprestore list` shows other restore points, --until names one; `merge \
                         --salvage` restores what can still be read",
                ),
                ErrorKind::ReadBack => {
                    Some("nothing was left there; the disk that it was written to, or the memory, cannot be trusted")
                }
                ErrorKind::Locked => Some("nothing was written; run again when it is closed there"),
                ErrorKind::Full => Some("nothing was left there; free space, or name another place with --out"),
                ErrorKind::Cancelled => Some("nothing was left of the output"),
                _ => None,
            },
            Self::Unfinished(_) => Some("what was written is not the whole disk"),
            Self::Refused(error) => match (error, error.kind()) {
                (restore::Error::Unfinished { .. }, _) | (_, ErrorKind::Usage) => None,
                (_, ErrorKind::Locked) => Some("nothing was changed; run again when it is closed there"),
                (restore::Error::Checksum { .. }, _) => Some(
                    "nothing was changed; if it is certain that another program has changed the image as it should, remove \
                     its .crc32 file and run `qmprestore manifest`",
                ),
                _ => Some("nothing was changed"),
            },
            Self::InPlace(error) => Some(match error.kind() {
                ErrorKind::Full => "the work is done in part, and nothing is lost: free space and run the same again",
                ErrorKind::Damaged => {
                    "the work is done in part, and cannot end before this is mended; `merge --salvage` restores what can \
                     still be read"
                }
                _ => "the work is done in part, and nothing is lost: run the same again",
            }),
            Self::Undurable(_) => {
                Some("the work is done, but a power cut may undo the end of it: then run the same again")
            }
            Self::HalfRebased(_) => Some("the images are right as they are; run again for the rest"),
            Self::Capture(error) => of_capture(error),
            Self::Usage(_)
            | Self::OutputIsBackup { .. }
            | Self::OutputNamedAsBackup { .. }
            | Self::OutputOfBackup { .. }
            | Self::LogOfBackup { .. }
            | Self::Print { .. }
            | Self::LogFile { .. }
            | Self::Signals { .. }
            | Self::Runtime { .. } => None,
        }
    }
}

fn of_kind(kind: ErrorKind) -> Exit {
    match kind {
        ErrorKind::Usage => Exit::Usage,
        ErrorKind::Damaged | ErrorKind::ReadBack => Exit::Damaged,
        ErrorKind::Unreachable => Exit::Unreachable,
        ErrorKind::Locked => Exit::Locked,
        ErrorKind::Full => Exit::Full,
        ErrorKind::Cancelled => signals::caught().unwrap_or(Exit::Error),
        ErrorKind::Other => Exit::Error,
    }
}

/// What to do when a backup fails.
fn of_capture(error: &capture::Error) -> Option<&'static str> {
    match (error.kind(), error) {
        (ErrorKind::Unreachable, capture::Error::Monitor(error)) => Some(match error {
            qmp::Error::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "the machine was not touched; run as a user who may write to the socket, root for example"
            }
            qmp::Error::Connect { .. } | qmp::Error::NotQmp { .. } => {
                "the machine was not touched; does it run, and is --socket its QMP monitor (a path, or tcp:HOST:PORT)?"
            }
            qmp::Error::NoGreeting { .. } => "the machine was not touched",
            _ => "the next run or `qmpbackup recover` puts in order what this one has begun",
        }),
        (ErrorKind::Damaged, capture::Error::Journal { .. }) => None,
        (ErrorKind::Damaged, _) => Some("`--level full` or `auto` begins a new chain"),
        (_, capture::Error::NoFull { .. }) => Some("`--level full` or `auto` makes one"),
        (_, capture::Error::NoSuchDisk { .. }) => Some("`qmpbackup info --show blockdev` lists all"),
        (_, capture::Error::Fleece { .. }) => Some("--fleece-dir names another folder"),
        (_, capture::Error::JobsLeft { .. }) => Some("try `qmpbackup recover` later"),
        (ErrorKind::Locked, _) => Some("run again when it has ended"),
        (ErrorKind::Full, capture::Error::FleeceFull { .. }) => Some(
            "nothing is lost, the next run copies it; --fleece-dir names a folder with more space, --no-fleece wants none",
        ),
        (ErrorKind::Full, _) => Some("nothing is lost, the next run copies it; free space and run again"),
        (ErrorKind::Cancelled, _) => Some("no image was made, and nothing is lost"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_that_is_used_up_is_exit_code_7_as_a_full_disk_is() {
        for error in [libc::ENOSPC, libc::EDQUOT] {
            let (path, source) = (PathBuf::from("disk"), || io::Error::from_raw_os_error(error));
            let failures = [
                Failure::Print { source: source() },
                Failure::Restore(restore::Error::Write { path: path.clone(), source: source() }),
                Failure::Capture(capture::Error::Io { path, source: source() }),
            ];
            for failure in failures {
                assert_eq!(failure.exit(), Exit::Full, "{failure:?}");
            }
        }
    }

    #[test]
    fn what_somebody_else_uses_is_exit_code_6_with_an_advice() {
        let path = PathBuf::from("disk");
        let source = io::Error::from(io::ErrorKind::ResourceBusy);
        let failures = [
            Failure::Chain(chain::Error::Locked { path: path.clone() }),
            Failure::Restore(restore::Error::Locked { path: path.clone(), source }),
            Failure::Capture(capture::Error::Locked { path: path.clone() }),
            Failure::Capture(capture::Error::Chain(chain::Error::Locked { path })),
        ];
        for failure in failures {
            assert_eq!(failure.exit(), Exit::Locked, "{failure}");
            assert!(failure.advice().is_some_and(|advice| advice.contains("run again when it ")), "{failure}");
        }
    }
}
