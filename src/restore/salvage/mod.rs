//! Salvage: as much of a disk as its images still hold, and a list of what they do not.
//!
//! What an image cannot tell or give comes from the images before it, and is zeroes where none is left: so all of it that can
//! be had is had, and nothing is made up. A range that one entry of a table maps is the least that a damaged table costs, a
//! page the least of a disk that cannot be read, and a cluster where it is compressed.
//!
//! Nothing is listed while bytes move: [`list()`] asks all layers again at the end, and finds each range once.

mod layer;
mod list;
mod loss;
mod rescue;
mod shared;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) use list::list;
pub use loss::{Cause, Loss, LossKind, Losses};
pub(super) use rescue::reason;

use super::checked_file::CheckedFile;
use super::ranges::Ranges;
use super::source::Source;
use crate::qcow2::{CRYPT_METHOD, KnownDamage};
use crate::storage::Storage as _;

/// An image of a restore point, or the place of one that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slot {
    /// An image to open.
    Image(Source),
    /// An image that is missing.
    Missing {
        /// Where it should be.
        path: std::path::PathBuf,
        /// Bytes of its disk, where that is known.
        size: Option<u64>,
    },
}

/// What is known of an image of which a part may be lost.
#[derive(Debug)]
pub(super) struct Tolerance {
    /// Why all of it is lost, if it is.
    pub(super) absent: Option<Cause>,
    /// The file, when it is one that checks what is read.
    pub(super) file: Option<Arc<CheckedFile>>,
    /// Ranges of the disk of which the tables could not be read: they stay unknown, so that plan, output and list are of one
    /// disk.
    unmapped: Mutex<Ranges<Cause>>,
    /// Ranges of the disk that the image holds and does not give.
    unreadable: Mutex<Ranges<Cause>>,
    /// Ranges of the disk whose places in the file are those of something else, too.
    shared: Mutex<Ranges<()>>,
}

impl Tolerance {
    /// Ranges that are remembered.
    const MOST: usize = 1 << 20;
    /// Ranges of which it is remembered that they share their places.
    const MOST_SHARED: usize = 1 << 16;

    pub(super) fn of(file: Arc<CheckedFile>) -> Self {
        let ranges = || Mutex::new(Ranges::new(Self::MOST));
        Self { absent: None, file: Some(file), unmapped: ranges(), unreadable: ranges(), shared: Self::none() }
    }

    pub(super) fn absent(cause: Cause) -> Self {
        let ranges = || Mutex::new(Ranges::new(1));
        Self { absent: Some(cause), file: None, unmapped: ranges(), unreadable: ranges(), shared: Self::none() }
    }

    fn none() -> Mutex<Ranges<()>> {
        Mutex::new(Ranges::new(Self::MOST_SHARED))
    }

    fn shared(&self) -> MutexGuard<'_, Ranges<()>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why parts of the file may not be what they were, with the parts of a range of which that is so.
    fn doubts(&self) -> impl Iterator<Item = (Cause, impl Fn(Range<u64>) -> Vec<Range<u64>> + '_)> {
        let misfits: fn(&CheckedFile, Range<u64>) -> _ = CheckedFile::misfits;
        let causes = [(Cause::Checksum, misfits), (Cause::Unchecked, CheckedFile::torn)];
        let file = self.file.as_deref();
        causes.into_iter().filter_map(move |(cause, find)| file.map(|file| (cause, move |range| find(file, range))))
    }

    /// Whether the first block, where the header is, does not fit its checksum.
    pub(super) fn header_is_damaged(&self) -> bool {
        self.file.as_ref().is_some_and(|file| {
            // to read any of it is to check all of it
            file.read_exact_at(&mut [0], 0).is_ok() && !file.misfits(0..1).is_empty()
        })
    }

    /// What is certain of a header that is damaged.
    pub(super) fn header_damage(&self) -> Option<KnownDamage> {
        let file = self.file.as_ref().filter(|_| self.header_is_damaged())?;
        Some(KnownDamage { is_plain: file.starts_with_but_zeroes(CRYPT_METHOD) })
    }

    /// Why what is read later, or the header, is not checked, though there are checksums.
    fn unchecked(&self) -> Option<&str> {
        let file = self.file.as_ref()?;
        let header = || {
            let is_torn = !file.torn(0..1).is_empty();
            is_torn.then_some(
                "a part of the block of its header cannot be read, so that nothing says if the header is right",
            )
        };
        file.unchecked().or_else(header)
    }

    fn unmapped(&self) -> MutexGuard<'_, Ranges<Cause>> {
        self.unmapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unreadable(&self) -> MutexGuard<'_, Ranges<Cause>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all of a range is known to be unreadable.
    fn is_unreadable(&self, range: &Range<u64>) -> bool {
        matches!(self.unreadable().within(range).as_slice(), [(all, _)] if all == range)
    }
}
