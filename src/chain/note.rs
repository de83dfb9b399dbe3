//! What a listing leaves out or doubts.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{BOOKKEEPING, MAX_DEPTH};

/// Something that was left out of an [`Inventory`](super::Inventory) or a [`Disk`](super::Disk), or that speaks against it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Note {
    /// Settings that could not be read: the format of the disk's images is what other files tell, or unknown.
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A manifest that could not be read: what it told of its image is unknown.
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A folder that could not be read: its images are missing here.
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Manifests that could not be listed: images of the folder may be missing without a word.
    Manifests {
        /// The folder with the images.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A link to a folder elsewhere: images in there are missing here.
    Link {
        /// The link.
        path: PathBuf,
    },
    /// A link that leads nowhere, perhaps to a folder with images that is not there now.
    Dangling {
        /// The link.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// What has the name of an image and is no file: the image is missing here.
    NoFile {
        /// What it is.
        path: PathBuf,
    },
    /// A folder with images that is too far below the one that was searched: they are missing here.
    Deep {
        /// The folder.
        path: PathBuf,
    },
    /// An image that has lost its manifest and its checksums: nothing says that it is the one that an INC builds on.
    Unknown {
        /// The image.
        path: PathBuf,
        /// The name of the INC.
        inc: String,
    },
    /// A FULL that had a manifest, which would tell whether INCs were written into it.
    Moment {
        /// The FULL.
        path: PathBuf,
    },
    /// An image that is whole but has not got its name, since its run was killed.
    Unnamed {
        /// The image.
        path: PathBuf,
    },
    /// FULLs that are missing, as are all INCs that build on them, while an older image is there.
    Gone {
        /// The first of them.
        path: PathBuf,
        /// How many more.
        more: usize,
    },
    /// The newest INC of a chain, which has no manifest, while the backup before it wrote one.
    Untold {
        /// The INC.
        path: PathBuf,
    },
    /// An image of another machine than the folder: the manifest and the file `uuid` have different ids.
    Foreign {
        /// The image.
        path: PathBuf,
        /// The file `uuid`.
        uuid: PathBuf,
    },
}

impl Note {
    /// Where images may be missing.
    pub(super) fn place(&self) -> Option<&Path> {
        match self {
            Self::Folder { path, .. }
            | Self::Manifests { path, .. }
            | Self::Link { path }
            | Self::Deep { path }
            | Self::NoFile { path }
            | Self::Dangling { path, .. } => Some(path),
            Self::Config { .. }
            | Self::Manifest { .. }
            | Self::Unknown { .. }
            | Self::Moment { .. }
            | Self::Unnamed { .. }
            | Self::Gone { .. }
            | Self::Untold { .. }
            | Self::Foreign { .. } => None,
        }
    }

    /// The folder that could not be read, and why.
    pub(super) fn folder(&self) -> Option<(&Path, &str)> {
        if let Self::Folder { path, reason } = self { Some((path, reason)) } else { None }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config { path, reason } | Self::Manifest { path, reason } | Self::Folder { path, reason } => {
                write!(f, "{} is ignored: {reason}", path.display())
            }
            Self::Manifests { path, reason } => {
                write!(f, "{} is ignored: {reason}", path.join(BOOKKEEPING).display())
            }
            Self::Link { path } => {
                write!(f, "{} is ignored: it leads to a folder elsewhere, which --dir can name", path.display())
            }
            Self::Deep { path } => {
                write!(
                    f,
                    "{} is ignored: it is more than {MAX_DEPTH} folders below, --dir can name one nearer",
                    path.display()
                )
            }
            Self::NoFile { path } => {
                write!(f, "{} is ignored: it has the name of an image, and is no file", path.display())
            }
            Self::Dangling { path, reason } => {
                write!(f, "{} is ignored: the link leads nowhere ({reason})", path.display())
            }
            Self::Unknown { path, inc } => write!(
                f,
                "{} has neither manifest nor checksums any more: nothing says that it is the image that {inc} builds on",
                path.display()
            ),
            Self::Moment { path } => {
                write!(
                    f,
                    "{} may hold a later moment than that of its name: only its manifest would tell",
                    path.display()
                )
            }
            Self::Unnamed { path } => write!(
                f,
                "{}: a run ended while it gave whole images their names, so that its restore point is not there yet: the \
                 next run or `qmpbackup recover` ends that, or, where the machine is gone, removing `.partial` from the names of \
                 the image and of its files in {BOOKKEEPING}, and `qmprestore verify`",
                path.display()
            ),
            Self::Gone { path, more } => {
                let path = path.display();
                let and = if *more > 0 { format!(", and so are {more} more FULLs") } else { String::new() };
                write!(
                    f,
                    "{path} is missing with all that builds on it{and}, though an older backup is there: if somebody has removed \
                     them, their files in {BOOKKEEPING} are to go, too"
                )
            }
            Self::Untold { path } => write!(
                f,
                "{} has no manifest, though the image before it has one: nothing says that it is of this chain",
                path.display()
            ),
            Self::Foreign { path, uuid } => write!(
                f,
                "{} was made for another machine than {}: the id in its manifest is another",
                path.display(),
                uuid.display()
            ),
        }
    }
}
