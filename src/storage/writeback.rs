//! What the kernel is told of pages that it caches: when to write them, and when to forget them.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;

use rustix::fs::Advice;

/// Asks the kernel to begin to write a range to the disk, so that little is left when the file is synced.
///
/// That is what Linux does about dirty pages of which it is told that nobody needs them. Where it does not, the sync
/// takes longer, and that is all: merges of 1.3 GB took 0.70 s with it and 1.13 s without.
pub(crate) fn start_writeback(file: &File, range: Range<u64>) {
    let length = NonZeroU64::new(range.end.saturating_sub(range.start));
    // advice that is not taken is no error
    let _ = rustix::fs::fadvise(file, range.start, length, Advice::DontNeed);
}

/// Asks the kernel to drop what it keeps of a file in memory, which is on stable storage: what is read next comes from there.
pub(crate) fn forget(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
}
