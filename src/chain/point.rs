//! Restore points, and what may speak against them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Error;
use super::image::Image;
use super::journal::Unfinished;
use super::lineage::Lineage;
use super::manifest::Manifest;
use super::name::Level;

/// A restore point as a listing shows it.
#[derive(Debug, Clone)]
pub struct Point {
    pub(super) image: Arc<Image>,
    pub(super) state: State,
    /// The state for those who know what to do with unfinished work in the FULL.
    pub(super) otherwise: State,
    pub(super) chain: usize,
    pub(super) depth: usize,
}

impl Point {
    /// The image that holds the newest of its data; its name is the restore point's.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whether it can be restored.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The same, if unfinished work in the FULL were ended.
    pub(crate) fn state_after_work(&self) -> &State {
        &self.otherwise
    }
}

/// Whether a restore point can be restored, as far as names tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing speaks against it.
    Sound,
    /// Changes may be missing.
    Doubtful(Doubt),
    /// It cannot be restored.
    Broken(Fault),
}

/// Why changes may be missing.
///
/// An INC holds what changed since the run before it, as a bitmap in QEMU remembers. Tools that clear the bitmap when
/// a run begins lose, when that run fails, what it was to save: it is in the `.partial` image or nowhere. That is so for
/// a failed FULL as for a failed INC, where later INCs still build on an older FULL; a new FULL ends the doubt. A failed
/// COPY has a bitmap of its own and harms nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Doubt {
    /// A run before it, after the FULL, failed and left this. A `.partial` without a time may be from before any INC.
    Partial(Arc<Image>),
    /// This image, which has no time in its name, was written as FULL and as COPY: the FULL may be gone.
    Overwritten(Arc<Image>),
    /// The manifest of this FULL says that it holds a later moment than this INC of its chain, which should be gone then:
    /// see [`Fault::LeftOver`].
    LeftOver(Arc<Image>),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partial(partial) => {
                write!(f, "a run before it failed and left {}", partial.path.display())
            }
            Self::Overwritten(full) => write!(f, "{} was written as FULL and as COPY", full.path.display()),
            Self::LeftOver(inc) => {
                write!(f, "its manifest says that it holds a later moment than {}", inc.path.display())
            }
        }
    }
}

/// Why a restore point cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// An INC without a FULL before it in its folder.
    NoFull,
    /// These two have the same time: their order is unknown.
    SameTime(Arc<Image>, Arc<Image>),
    /// The manifest of the FULL says that it holds a later moment than an INC of its chain, which was written into it then
    /// and should be gone. Either it was put back, and the two make a mixture, or the manifest is wrong.
    LeftOver {
        /// The FULL.
        full: Arc<Image>,
        /// The first of such INCs.
        inc: Arc<Image>,
    },
    /// The manifests say that an image is none of this chain, or that one is missing.
    Lineage(Lineage),
    /// Work in the FULL was begun and has not ended: the FULL holds no moment.
    Unfinished(Arc<Unfinished>),
    /// There is a journal of such work that cannot be understood.
    Journal {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Whether there is such a journal, and what it says, is unknown: the system does not let it be read.
    JournalUnread {
        /// The file, which may not be there.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// Another image was about to get this one's name when its run was killed, and its manifest has got it already.
    Replaced {
        /// The other.
        by: PathBuf,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFull => f.write_str("no FULL before it in its folder"),
            Self::SameTime(first, second) => {
                write!(
                    f,
                    "{} and {} have the same time: their order is unknown",
                    first.display_name(),
                    second.display_name()
                )
            }
            Self::LeftOver { full, inc } => {
                let (full, inc) = (full.path.display(), inc.path.display());
                write!(
                    f,
                    "the manifest of {full} says that it holds a later moment than {inc}: move the INC away if it was \
                     written into the FULL"
                )
            }
            Self::Lineage(lineage) => lineage.fmt(f),
            Self::Unfinished(unfinished) => unfinished.fmt(f),
            Self::Journal { path, reason } => {
                write!(f, "{} cannot be understood, what was begun in the FULL is unknown: {reason}", path.display())
            }
            Self::JournalUnread { path, reason } => {
                write!(f, "{} cannot be read, what was begun in the FULL is unknown: {reason}", path.display())
            }
            Self::Replaced { by } => write!(
                f,
                "its manifest is that of {}, which a run was about to give this name: if it was killed, the next run or \
                 `qmpbackup recover` does it",
                by.display()
            ),
        }
    }
}

impl Fault {
    pub(super) fn into_error(self, image: &Image) -> Error {
        Error::Broken { path: image.path.clone(), fault: self }
    }

    /// Why the journal of a FULL says nothing.
    pub(super) fn of_journal(full: &Path, error: &io::Error) -> Self {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        let (path, reason) = (Unfinished::path(full), error.to_string());
        match error.kind() {
            // it is no file, or not what it should be
            InvalidInput | InvalidData | UnexpectedEof => Self::Journal { path, reason },
            _ => Self::JournalUnread { path, reason },
        }
    }
}

/// A moment of a disk that can be restored: all that a restore opens, by value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestorePoint {
    /// The disk's label.
    pub disk: String,
    /// Seconds since 1970; `None` where neither name nor manifest of the image tells.
    pub time: Option<i64>,
    /// The level of the last member.
    pub level: Level,
    /// The images from the FULL or COPY to the wanted INC, in the order in which they were made.
    pub members: Vec<Arc<Image>>,
    /// What speaks against it, if that was allowed.
    pub doubt: Option<Doubt>,
    /// The INCs of the same chain after the wanted one, oldest first.
    pub later: Vec<Arc<Image>>,
    /// The INC of the same chain that comes after the wanted one, also where only its manifest is there.
    pub next: Option<Arc<Image>>,
    /// Work in the FULL that was begun and has not ended; only where [that was allowed](super::Disk::select_in_place).
    pub unfinished: Option<Unfinished>,
}

impl RestorePoint {
    /// Its name for messages: that of the image that holds the newest of its data.
    #[must_use]
    pub fn name(&self) -> String {
        self.members.last().map(|image| image.display_name()).unwrap_or_default()
    }

    /// That the INC after it was made on top of another image than its last one: one of the two was exchanged.
    #[must_use]
    pub fn doubted_by_next(&self) -> Option<Lineage> {
        let members: Vec<&Arc<Image>> = self.members.iter().collect();
        let lineage = Lineage::after(&members, self.next.as_ref()?, None)?;
        matches!(lineage, Lineage::Exchanged { .. }).then_some(lineage)
    }

    /// Whether the FULL still holds the moment that was found, and no other work in it was begun: to be asked when the
    /// images are locked, since they were found before.
    ///
    /// # Errors
    /// The manifest of the FULL or the journal of such work cannot be read, or the journal cannot be understood.
    pub fn is_current(&self) -> Result<bool, Error> {
        let Some(full) = self.members.first().filter(|full| full.level == Level::Full) else { return Ok(true) };
        let manifest = Manifest::read_again(&full.path);
        let manifest = manifest.map_err(|source| Error::Io { path: Manifest::path(&full.path), source })?;
        Ok(manifest.and_then(|manifest| manifest.time) == full.claimed && self.is_left_alone()?)
    }

    /// Whether no other work in the FULL was begun since it was found: what can be asked where its manifest cannot be read.
    ///
    /// # Errors
    /// The journal of such work cannot be read, or cannot be understood.
    pub fn is_left_alone(&self) -> Result<bool, Error> {
        let Some(full) = self.members.first().filter(|full| full.level == Level::Full) else { return Ok(true) };
        let unfinished = Unfinished::read(&full.path);
        let unfinished = unfinished.map_err(|error| Fault::of_journal(&full.path, &error).into_error(full))?;
        Ok(unfinished == self.unfinished)
    }
}
