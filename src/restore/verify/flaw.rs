//! What may be wrong with a backup.

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::path::PathBuf;
use std::sync::Arc;

use crate::chain::{ChecksumsError, Doubt, Fault, Image, ManifestError};
use crate::errors::ErrorKind;
use crate::qcow2::{self, ImageRegion};
use crate::restore::error::Error;

/// Ranges that a message lists before it only counts the rest.
const LISTED: usize = 4;

/// Something that is not as it should be, where it is, and what it harms.
#[derive(Debug)]
#[non_exhaustive]
pub struct Flawed {
    /// The label of the disk.
    pub disk: String,
    /// The image, or the file beside it that is meant.
    pub path: PathBuf,
    /// What it is.
    pub flaw: Flaw,
    /// The restore points that suffer from it.
    pub points: Points,
}

/// Restore points by their images, oldest first. Where many flaws of a chain harm what comes after, they share one list.
#[derive(Debug, Clone)]
pub struct Points {
    images: Arc<[Arc<Image>]>,
    range: Range<usize>,
}

impl Points {
    pub(super) fn within(images: &Arc<[Arc<Image>]>, range: Range<usize>) -> Self {
        Self { images: Arc::clone(images), range }
    }
}

impl From<Vec<Arc<Image>>> for Points {
    fn from(images: Vec<Arc<Image>>) -> Self {
        Self { range: 0..images.len(), images: images.into() }
    }
}

impl Deref for Points {
    type Target = [Arc<Image>];

    fn deref(&self) -> &[Arc<Image>] {
        self.images.get(self.range.clone()).unwrap_or_default()
    }
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Flaw {
    /// These restore points cannot be restored, as names and manifests tell.
    #[error("{0}")]
    Chain(Fault),
    /// These restore points may lack changes, as names tell.
    #[error("may lack changes: {0}")]
    Doubtful(Doubt),
    /// The image has no manifest: whether it belongs there is told by its name alone.
    #[error("has no manifest: whether it is the right image is told by its name alone")]
    NoManifest,
    /// The manifest cannot be used.
    #[error(transparent)]
    Manifest(ManifestError),
    /// The image has no checksums: only its tables were checked.
    #[error("has no checksums: only its tables were checked")]
    NoChecksums,
    /// The checksums cannot be used.
    #[error(transparent)]
    Checksums(ChecksumsError),
    /// Work in the image was broken off, and of these bytes nobody knows what they should be.
    #[error("bytes {} were about to be changed in place, which was interrupted: run that command again", Bytes(.0))]
    Unsettled(Range<u64>),
    /// The image cannot be opened or understood.
    #[error(transparent)]
    Unreadable(Error),
    /// The tables of the image are damaged.
    #[error("its tables are damaged, errors: {errors}, wrong refcounts: {refcount_errors}{}", match .first {
        Some(first) => format!(", the first: {first}"),
        None => String::new(),
    })]
    Structure {
        /// Errors in tables.
        errors: u64,
        /// Wrong refcounts. If there is nothing else, all can be read.
        refcount_errors: u64,
        /// The worst that was kept.
        first: Option<Box<qcow2::Finding>>,
    },
    /// Some program found the image damaged and marked it.
    #[error("some program found it damaged and marked it as corrupt")]
    MarkedCorrupt,
    /// The image was not closed, and refcounts may be stale.
    #[error("was not closed, its refcounts may be stale: that harms nothing that is read")]
    Stale,
    /// Space in the file is lost.
    #[error("space is lost, leaked clusters: {0}")]
    Leaks(u64),
    /// Bytes of the file are not what they were.
    #[error("bytes {} {}: {}", Bytes(.file), match .unreadable {
        Some(error) => format!("cannot be read ({error})"),
        None => "do not fit their checksums".to_owned(),
    }, Harm(.guest.as_deref(), .parts))]
    Blocks {
        /// Where they are in the file, in whole blocks of 64 KiB.
        file: Range<u64>,
        /// What of the disk they hold; `None` where that cannot be told, and may be all of it.
        guest: Option<Vec<Range<u64>>>,
        /// What they are. Nothing is refcounts, snapshots, bitmaps and free space.
        parts: Vec<ImageRegion>,
        /// What the system said, where they cannot be read at all.
        unreadable: Option<io::Error>,
    },
    /// More blocks of the file are not what they were.
    #[error("{0} more blocks of 64 KiB do not fit their checksums")]
    MoreBlocks(u64),
    /// The file has another length than when it was made.
    #[error("has {is} bytes and should have {should}: {}", if .is < .should {
        "it was cut short"
    } else {
        "something was appended"
    })]
    Length {
        /// Bytes that there are.
        is: u64,
        /// Bytes that the checksums are of.
        should: u64,
    },
    /// The image has the content of another one.
    #[error("holds the content of {}", .0.display_name())]
    Holds(Arc<Image>),
}

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlawSeverity {
    /// All that a restore reads is right.
    Note,
    /// Not all could be checked.
    InPart,
    /// It could not be looked at: in use, or refused by the system.
    Failed,
    /// A restore point, or what checks it, is damaged.
    Damage,
}

impl Flaw {
    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> FlawSeverity {
        let damage_if = |damage| if damage { FlawSeverity::Damage } else { FlawSeverity::Failed };
        match self {
            Self::Leaks(_) | Self::Stale => FlawSeverity::Note,
            Self::Doubtful(_)
            | Self::NoManifest
            | Self::NoChecksums
            | Self::Unsettled(_)
            | Self::Chain(Fault::Unfinished(_))
            | Self::MarkedCorrupt
            | Self::Manifest(ManifestError::Version { .. })
            | Self::Checksums(ChecksumsError::Version { .. }) => FlawSeverity::InPart,
            Self::Manifest(ManifestError::Io { source, .. }) | Self::Checksums(ChecksumsError::Io { source, .. }) => {
                damage_if(is_damage(source))
            }
            Self::Chain(Fault::JournalUnread { .. }) => FlawSeverity::Failed,
            Self::Unreadable(error) => damage_if(error.kind() == ErrorKind::Damaged),
            Self::Chain(_)
            | Self::Manifest(_)
            | Self::Checksums(_)
            | Self::Structure { .. }
            | Self::Blocks { .. }
            | Self::MoreBlocks(_)
            | Self::Length { .. }
            | Self::Holds(_) => FlawSeverity::Damage,
        }
    }

    /// How bad it is for the image: what is beside it can only keep it from being checked.
    pub(super) fn of_image(&self) -> FlawSeverity {
        match self {
            Self::Manifest(_) | Self::Checksums(_) => FlawSeverity::InPart,
            flaw => flaw.severity(),
        }
    }

    /// One or two words for it.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Chain(_) => "chain",
            Self::Doubtful(_) => "doubtful",
            Self::NoManifest => "no manifest",
            Self::Manifest(_) => "manifest",
            Self::NoChecksums => "no checksums",
            Self::Checksums(_) => "checksums",
            Self::Unsettled(_) => "unsettled",
            Self::Unreadable(_) => "unreadable",
            Self::Structure { .. } => "structure",
            Self::MarkedCorrupt => "marked corrupt",
            Self::Stale => "stale",
            Self::Leaks(_) => "leaks",
            Self::Blocks { .. } => "blocks",
            Self::MoreBlocks(_) => "more blocks",
            Self::Length { .. } => "length",
            Self::Holds(_) => "content",
        }
    }
}

struct Bytes<'a>(&'a Range<u64>);

impl fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} to {:#x}", self.0.start, self.0.end)
    }
}

/// What a guest loses.
struct Harm<'a>(Option<&'a [Range<u64>]>, &'a [ImageRegion]);

impl fmt::Display for Harm<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(guest, parts) = self;
        for (at, part) in parts.iter().enumerate() {
            let part = match part {
                ImageRegion::Header => "the header",
                ImageRegion::L1Table => "the L1 table",
                ImageRegion::L2Table => "an L2 table",
                ImageRegion::Data => "guest data",
                ImageRegion::Compressed => "compressed guest data",
            };
            write!(f, "{}{part}", if at == 0 { "" } else { ", " })?;
        }
        match guest {
            None => return f.write_str("all of the disk may be wrong"),
            Some([]) if parts.is_empty() => return f.write_str("nothing of the disk as it is now"),
            Some([]) => return Ok(()),
            Some(_) => f.write_str(" of the disk at ")?,
        }
        let guest = guest.unwrap_or_default();
        for (at, range) in guest.iter().take(LISTED).enumerate() {
            write!(f, "{}{}", if at == 0 { "" } else { ", " }, Bytes(range))?;
        }
        match guest.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, " and {more} more ranges"),
        }
    }
}
/// Whether a file beside an image is none, or is cut, for whoever reads it.
fn is_damage(error: &io::Error) -> bool {
    match error.raw_os_error() {
        // a link to itself, a socket
        Some(code) => [libc::ELOOP, libc::ENXIO].contains(&code),
        None => matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof
        ),
    }
}
