//! Checksums of an image that is changed in place: only those of the blocks that were written to become new ones. So what was
//! damaged before, elsewhere in the image, is found as before.
//!
//! ```text
//! the blocks that may change become unsettled ── sync ── the image changes ── sync ── new checksums, all settled
//! ```
//!
//! A program that dies between leaves unsettled blocks. When the work is done again, all of those are summed anew: nobody
//! knows which of them the program has written to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::compute::{block_sums, write};
use super::header::Header;
use super::{BLOCK, Checksums, ChecksumsError};
use crate::storage::{Storage, Touched, to_usize};

/// Checksums of an image that is about to change.
#[derive(Debug)]
pub struct Renewal {
    image: PathBuf,
    /// None where the image had none, or none that could be used.
    sums: Option<Checksums>,
    unsettled: Range<u64>,
}

impl Renewal {
    /// Says that blocks of an image are about to change; it may get more of them.
    ///
    /// Checksums that cannot be used stay as they are: they say nothing of the image, and making new ones would say that all
    /// of it is right.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn begin(image: &Path, blocks: Range<u64>) -> io::Result<Self> {
        let sums = match Checksums::open(image) {
            Ok(sums) => sums,
            Err(ChecksumsError::Io { source, .. }) => return Err(source),
            Err(ChecksumsError::Version { .. } | ChecksumsError::Damaged { .. }) => None,
        };
        let mut unsettled = blocks;
        if let Some(sums) = &sums {
            let before = sums.header.unsettled;
            if before.1 > 0 {
                unsettled = unsettled.start.min(before.0)..unsettled.end.max(before.0.saturating_add(before.1));
            }
            let header = Header {
                unsettled: (unsettled.start, unsettled.end.saturating_sub(unsettled.start)),
                ..sums.header.clone()
            };
            header.overwrite(&File::options().write(true).open(&sums.path)?)?;
            // only what was unsettled before is summed whether it was written to or not
            unsettled = sums.unsettled();
        }
        Ok(Self { image: image.to_owned(), sums, unsettled })
    }

    /// Sums what was written to, when all of it is on stable storage.
    ///
    /// # Errors
    /// What the system says; the blocks are still unsettled then.
    pub fn finish(self, storage: &(impl Storage + ?Sized), touched: &Touched) -> io::Result<()> {
        let Some(old) = self.sums else { return Ok(()) };
        let shorter = old.length().min(storage.length()) / BLOCK;
        write(&self.image, storage.length(), |blocks| {
            let known = old.read(blocks.clone()).map_err(io::Error::other)?;
            let mut sums = Vec::with_capacity(known.len());
            let is_new = |block: u64| touched.contains(block) || self.unsettled.contains(&block) || block >= shorter;
            let mut start = blocks.start;
            while start < blocks.end {
                let new = is_new(start);
                let end = (start + 1..blocks.end).find(|block| is_new(*block) != new).unwrap_or(blocks.end);
                if new {
                    sums.extend(block_sums(storage, start..end)?);
                } else {
                    let kept = known.get(to_usize(start - blocks.start)..to_usize(end - blocks.start));
                    sums.extend_from_slice(kept.unwrap_or_default());
                }
                start = end;
            }
            Ok(sums)
        })
    }
}
