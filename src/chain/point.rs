//! Restore points, and what may speak against them.

use std::fmt;
use std::sync::Arc;

use super::Error;
use super::image::Image;
use super::name::Level;

/// A restore point as a listing shows it.
#[derive(Debug, Clone)]
pub struct Point {
    pub(super) image: Arc<Image>,
    pub(super) state: State,
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
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partial(partial) => {
                write!(f, "a run before it failed and left {}", partial.path.display())
            }
            Self::Overwritten(full) => write!(f, "{} was written as FULL and as COPY", full.path.display()),
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
}

impl Fault {
    pub(super) fn into_error(self, image: &Image) -> Error {
        match self {
            Self::NoFull => Error::NoFull { path: image.path.clone() },
            Self::SameTime(first, second) => Error::SameTime { first: first.path.clone(), second: second.path.clone() },
        }
    }
}

/// A moment of a disk that can be restored: all that a restore opens, by value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestorePoint {
    /// The disk's label.
    pub disk: String,
    /// Seconds since 1970; `None` where the name of the image has no time.
    pub time: Option<i64>,
    /// The level of the last member.
    pub level: Level,
    /// The images from the FULL or COPY to the wanted INC, in the order in which they were made.
    pub members: Vec<Arc<Image>>,
    /// What speaks against it, if that was allowed.
    pub doubt: Option<Doubt>,
}
