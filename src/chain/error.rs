//! What can go wrong between a folder and a restore point.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::point::{Doubt, Fault};
use super::when::WHEN_FORMS;
use crate::errors::ErrorKind;
use crate::storage::is_full;

/// How many names a message lists before it only counts the rest.
const LISTED: usize = 100;

/// Why there is no restore point.
///
/// Names are those of the files, unescaped; where they were not UTF-8 they hold replacement characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A folder or a manifest cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The lock of a folder cannot be taken.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The lock, or the folder that it should be in.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody else writes to the folder.
    #[error("{} is locked: a backup or another command uses this folder", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// There are more files below the folder than a backup has.
    #[error("{} holds more than {limit} files; say which of its folders holds the backup", path.display())]
    TooManyEntries {
        /// The folder that was to be searched.
        path: PathBuf,
        /// How many files are looked at.
        limit: usize,
    },
    /// No image was found.
    #[error("{} holds no backup", path.display())]
    NoDisk {
        /// The folder that was searched.
        path: PathBuf,
    },
    /// The filter fits no disk.
    #[error("no disk matches {filter:?}; there are: {}", Names(disks))]
    NoSuchDisk {
        /// What was to be matched.
        filter: String,
        /// The labels of all disks.
        disks: Vec<String>,
    },
    /// The filter is only a part of names, and the disk is to be changed.
    #[error("no disk is called {filter:?}; what changes a backup takes a whole name with --filter: {}", Names(disks))]
    NotWholeName {
        /// What was to be matched.
        filter: String,
        /// The labels of the disks that have it in one of their names.
        disks: Vec<String>,
    },
    /// No disk fits, but a folder that may hold it cannot be read.
    #[error("cannot read {}, which may hold the disk that is meant: {reason}", path.display())]
    FolderUnread {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// Several disks could be meant.
    #[error("several disks could be meant; say which with --filter: {}", Names(disks))]
    WhichDisk {
        /// The labels of those that match.
        disks: Vec<String>,
    },
    /// A text that says no moment.
    #[error("{text:?} is not a time; accepted are {WHEN_FORMS}")]
    Syntax {
        /// The text.
        text: String,
    },
    /// No image has that name.
    #[error("{disk} has no restore point named {name:?}; there are: {}; accepted are {WHEN_FORMS}", Names(points))]
    NoSuchPoint {
        /// The disk's label.
        disk: String,
        /// The name that was wanted.
        name: String,
        /// The names of all restore points.
        points: Vec<String>,
    },
    /// Several images have that name or beginning.
    #[error("{name:?} could be any of {}", Names(points))]
    WhichPoint {
        /// The name that was wanted.
        name: String,
        /// The paths, below the folder that was searched, of those that match.
        points: Vec<String>,
    },
    /// Everything is newer than the wanted moment.
    #[error("{disk} has no restore point at or before unix time {wanted}; there are: {}", Names(points))]
    TooEarly {
        /// The disk's label.
        disk: String,
        /// The wanted moment, seconds since 1970.
        wanted: i64,
        /// The names of all restore points.
        points: Vec<String>,
    },
    /// The disk has no whole image.
    #[error("{disk} has no restore point, only what failed runs left: {}", Names(partials))]
    NoPoint {
        /// The disk's label.
        disk: String,
        /// The names of the images that are not whole.
        partials: Vec<String>,
    },
    /// The named image is not whole.
    #[error("{} is what a failed run left, not a whole image", path.display())]
    Partial {
        /// The image.
        path: PathBuf,
    },
    /// The chain is not what was made.
    #[error("{} cannot be restored: {fault}", path.display())]
    Broken {
        /// The image of the restore point.
        path: PathBuf,
        /// What is wrong.
        fault: Fault,
    },
    /// The image may lack changes.
    #[error(
        "{} may lack changes: {doubt}; the newest restore point without doubt is {}",
        path.display(),
        sound.as_deref().unwrap_or("none")
    )]
    Doubtful {
        /// The image.
        path: PathBuf,
        /// Why.
        doubt: Doubt,
        /// The name of the newest restore point before it that nothing speaks against.
        sound: Option<String>,
    },
}

impl Error {
    /// What the error asks of the caller.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Lock { source, .. } if is_full(source) => ErrorKind::Full,
            Self::Io { .. }
            | Self::Lock { .. }
            | Self::FolderUnread { .. }
            | Self::Broken { fault: Fault::JournalUnread { .. }, .. } => ErrorKind::Other,
            Self::Locked { .. } => ErrorKind::Locked,
            Self::Broken { .. } | Self::Doubtful { .. } | Self::NoPoint { .. } => ErrorKind::Damaged,
            Self::TooManyEntries { .. }
            | Self::NoDisk { .. }
            | Self::NoSuchDisk { .. }
            | Self::NotWholeName { .. }
            | Self::WhichDisk { .. }
            | Self::Syntax { .. }
            | Self::NoSuchPoint { .. }
            | Self::WhichPoint { .. }
            | Self::TooEarly { .. }
            | Self::Partial { .. } => ErrorKind::Usage,
        }
    }
}

struct Names<'a>(&'a [String]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, name) in self.0.iter().take(LISTED).enumerate() {
            write!(f, "{}{name}", if at == 0 { "" } else { ", " })?;
        }
        match self.0.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_counted_in_the_end() {
        let points = (0..103).map(|at| format!("INC-{at}")).collect();
        let error = Error::TooEarly { disk: "vda".to_owned(), wanted: -1, points };
        let text = error.to_string();
        assert!(text.contains("there are: INC-0, INC-1, "), "{text}");
        assert!(text.ends_with("INC-99 and 3 more"), "{text}");
    }
}
