//! What was lost.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// A range of the disk that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loss {
    /// The image that does not hold it, or not right.
    pub image: PathBuf,
    /// What it reads as.
    pub kind: LossKind,
    /// Why.
    pub cause: Cause,
    /// The bytes of the disk.
    pub guest: Range<u64>,
}

/// What a range of which something was lost reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LossKind {
    /// Zeroes: no image holds it any more.
    Lost,
    /// What the images before that one hold: what it may have changed is missing.
    Stale,
    /// What the image holds, though its checksum does not fit, or cannot be compared, or its tables cannot be right.
    Damaged,
}

impl LossKind {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Stale => "stale",
            Self::Damaged => "damaged",
        }
    }
}

impl fmt::Display for LossKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why something was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// The image is missing.
    Missing,
    /// The image cannot be opened.
    Image(String),
    /// A part of its tables cannot be read or cannot be right.
    Tables(String),
    /// A part of its data cannot be read or cannot be inflated.
    Data(String),
    /// A block does not fit its checksum: data, or tables, by which the image may hold something else there, or nothing.
    Checksum,
    /// A part of a block cannot be read, and its checksum says nothing of the others: data, or tables.
    Unchecked,
    /// The file ends before the disk does.
    Truncated,
    /// Something else is in the same place of the file, too: another range of the disk, or a table.
    Shared,
}

impl Cause {
    /// Whether both are of one kind.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// Its name.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Image(_) => "image",
            Self::Tables(_) => "tables",
            Self::Data(_) => "data",
            Self::Checksum => "checksum",
            Self::Unchecked => "unchecked",
            Self::Truncated => "truncated",
            Self::Shared => "shared",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("the image is missing"),
            Self::Image(reason) | Self::Tables(reason) | Self::Data(reason) => f.write_str(reason),
            Self::Checksum => f.write_str("a checksum does not fit"),
            Self::Unchecked => f.write_str("cannot be checked, since a part of its block cannot be read"),
            Self::Truncated => f.write_str("the file was truncated"),
            Self::Shared => f.write_str("its place in the file is that of something else, too"),
        }
    }
}

/// All that was lost.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Losses {
    /// In the order of the disk; neighbours of one image, kind and cause are one. A range may have several causes.
    pub list: Vec<Loss>,
    /// How many more losses there are.
    pub unlisted: u64,
    /// The byte of the disk where the first of those begins: all that begin before it are in the list.
    pub unlisted_from: Option<u64>,
    /// Bytes that are zeroes now.
    pub lost: u64,
    /// Bytes that are older now.
    pub stale: u64,
    /// Bytes, of the others, that may be damaged.
    pub damaged: u64,
}

impl Losses {
    /// Whether nothing was lost.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}
