//! Checksums of an image that is changed in place: only those of the blocks that were written to become new ones. So what was
//! damaged before, elsewhere in the image, is found as before. Where a block is written to in part, it is compared with its
//! sum before: if it does not fit then, it gets one that does not fit either.
//!
//! ```text
//! the blocks that may change become unsettled ── sync ── the image changes ── sync ── new checksums, all settled
//! ```
//!
//! A program that dies between leaves unsettled blocks. When the work is done again, all of those are summed anew: nobody
//! knows which of them the program has written to.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::compute::{READ, SumError, sums_of, write};
use super::header::Header;
use super::{BLOCK, Checksums, ChecksumsError, id_of};
use crate::storage::{BlockSet, FileStorage, Storage, Touched, to_usize};

/// Checksums of an image that is about to change.
#[derive(Debug)]
pub(crate) struct Renewal {
    image: PathBuf,
    /// None where the image had none, or none that could be used.
    sums: Option<Checksums>,
    /// Why those that it has cannot be used.
    unusable: Option<ChecksumsError>,
    unsettled: Range<u64>,
    /// Blocks that did not fit when they were written to in part.
    damaged: BlockSet,
}

impl Renewal {
    /// Says that blocks of an image are about to change; it may get more of them.
    ///
    /// Damaged and foreign checksums stay as they are: they say nothing of the image, and making new ones would say that all
    /// of it is right.
    ///
    /// # Errors
    /// It cannot be written down; or a later version of this program has made them, which this one cannot renew.
    pub(crate) fn begin(image: &Path, blocks: Range<u64>) -> Result<Self, SumError> {
        let (mut sums, unusable) = match Checksums::open_writable(image) {
            Ok(sums) => (sums, None),
            Err(error @ (ChecksumsError::Io { .. } | ChecksumsError::Version { .. })) => return Err(error.into()),
            Err(error @ (ChecksumsError::Damaged { .. } | ChecksumsError::Foreign { .. })) => (None, Some(error)),
        };
        let mut unsettled = blocks;
        if let Some(sums) = &mut sums {
            // it may have become another image
            if let Some(id) = &mut sums.header.id {
                *id = id_of(image)?.unwrap_or(*id);
            }
            let before = sums.header.unsettled;
            if before.1 > 0 {
                unsettled = unsettled.start.min(before.0)..unsettled.end.max(before.0.saturating_add(before.1));
            }
            let header = Header {
                unsettled: (unsettled.start, unsettled.end.saturating_sub(unsettled.start)),
                ..sums.header.clone()
            };
            header.overwrite(sums.file.file())?;
            // only what was unsettled before is summed whether it was written to or not
            unsettled = sums.unsettled();
        }
        Ok(Self { image: image.to_owned(), sums, unusable, unsettled, damaged: BlockSet::default() })
    }

    /// Why the image has checksums that stay as they are.
    pub(crate) fn unusable(&self) -> Option<&ChecksumsError> {
        self.unusable.as_ref()
    }

    /// Sums what a program that died has left unsettled, where nobody writes to the image now. Most images have nothing
    /// to settle, and are not touched.
    ///
    /// # Errors
    /// As with [`Renewal::begin`] and [`Renewal::finish`].
    pub(crate) fn settle(image: &Path, storage: &Arc<FileStorage>) -> Result<(), SumError> {
        match Checksums::open(image) {
            Ok(Some(sums)) if sums.header.unsettled.1 > 0 => {}
            Err(error @ (ChecksumsError::Io { .. } | ChecksumsError::Version { .. })) => return Err(error.into()),
            _ => return Ok(()),
        }
        Self::begin(image, 0..0)?.finish(&**storage, &Touched::new(Arc::clone(storage), BLOCK)).map(drop)
    }

    /// Looks at the blocks of which only a part is about to change, before they do; one caller at a time. What was touched
    /// before was looked at before.
    ///
    /// # Errors
    /// What is there cannot be read: nobody knows whether it is damaged, and it must not change.
    pub(crate) fn before_write(&self, bytes: &Range<u64>, touched: &Touched) -> Result<(), SumError> {
        let Some(sums) = &self.sums else { return Ok(()) };
        let end = bytes.end.div_ceil(BLOCK).min(sums.blocks());
        for block in bytes.start / BLOCK..end {
            let all = block * BLOCK..(block + 1).saturating_mul(BLOCK).min(sums.length());
            if bytes.start <= all.start && all.end <= bytes.end {
                self.damaged.remove(block);
            } else {
                self.look_at(sums, block, all, touched)?;
            }
        }
        Ok(())
    }

    /// Looks at a block of which nothing has changed yet, or all of what it had is still there.
    fn look_at(&self, sums: &Checksums, block: u64, bytes: Range<u64>, touched: &Touched) -> Result<(), SumError> {
        if !touched.contains(block) && !self.unsettled.contains(&block) && !fits(sums, block, bytes, touched)? {
            self.damaged.insert(block..block + 1);
        }
        Ok(())
    }

    /// The block with the old end of a file that has grown is another one now, also where nobody wrote to its old part.
    fn look_at_end(&self, old: &Checksums, length: u64, touched: &Touched) -> Result<(), SumError> {
        let (block, end) = (old.length() / BLOCK, old.length());
        let bytes = block * BLOCK..end;
        if length > end && !bytes.is_empty() {
            self.look_at(old, block, bytes, touched)?;
        }
        Ok(())
    }

    /// Takes back that the image is about to change, where it has not, or is again what it was.
    ///
    /// # Errors
    /// It cannot be written down.
    pub(crate) fn abandon(self) -> io::Result<()> {
        self.sums.map_or(Ok(()), |sums| sums.header.overwrite(sums.file.file()))
    }

    /// Sums what was written to, when all of it is on stable storage. How many blocks did not fit before comes back.
    ///
    /// # Errors
    /// Which file fails, and why; the blocks are still unsettled then.
    pub(crate) fn finish(self, storage: &(impl Storage + ?Sized), touched: &Touched) -> Result<u64, SumError> {
        let Some(old) = &self.sums else { return Ok(0) };
        let length = storage.length();
        self.look_at_end(old, length, touched)?;
        // where the end has moved, the old sums say nothing of what is behind either end, or of the block that it is in
        let known = if length == old.length() { old.blocks() } else { length.min(old.length()) / BLOCK };
        write(&self.image, old.id(), length, |blocks| {
            let mut sums = old.read(blocks.clone())?;
            sums.resize(to_usize(blocks.end - blocks.start), 0);
            let is_new = |block: u64| touched.contains(block) || self.unsettled.contains(&block) || block >= known;
            let parts = parts(&blocks, is_new);
            for (part, new) in parts.iter().zip(sums_of(storage, &parts)?) {
                let range = to_usize(part.start - blocks.start)..to_usize(part.end - blocks.start);
                let new =
                    part.clone().zip(new).map(|(block, sum)| if self.damaged.contains(block) { !sum } else { sum });
                sums.splice(range, new);
            }
            Ok(sums)
        })?;
        Ok(self.damaged.count())
    }
}

/// Whether a block is what its sum says.
fn fits(sums: &Checksums, block: u64, bytes: Range<u64>, storage: &Touched) -> Result<bool, SumError> {
    let mut buffer = vec![0; to_usize(bytes.end - bytes.start)];
    let read = storage.read_exact_at(&mut buffer, bytes.start);
    read.map_err(|source| SumError::Image { offset: bytes.start, source })?;
    Ok(sums.read(block..block + 1)? == [crc32fast::hash(&buffer)])
}

/// The blocks of a range that are new, in ranges of a few.
fn parts(blocks: &Range<u64>, is_new: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    for block in blocks.clone().filter(|block| is_new(*block)) {
        match parts.last_mut().filter(|part| part.end == block && part.end - part.start < READ) {
            Some(part) => part.end += 1,
            None => parts.push(block..block + 1),
        }
    }
    parts
}
