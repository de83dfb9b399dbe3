//! An image's file that is checked against its checksums when it is read.
//!
//! Each block is checked once, as a whole, when any of it is read first. Copies in the kernel would go around that: the file
//! is not given away.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::bits::Bits;
use crate::chain::{BLOCK, Checksums, ChecksumsError, ZERO_BLOCK_SUM};
use crate::errors;
use crate::storage::{Storage, to_usize};

/// Bytes that are given up together where they cannot be read: a page.
pub(super) const PIECE: u64 = 4096;

/// Pieces that cannot be read which are remembered.
const PIECES_MOST: usize = 1 << 20;

/// A block that is not what it was when its checksum was made.
#[derive(Debug)]
pub(super) struct Misfit {
    /// Its first byte.
    pub(super) offset: u64,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the block at offset {:#x} does not fit its checksum", self.offset)
    }
}

impl std::error::Error for Misfit {}

/// A file, its checksums, and what is known of it by now.
pub(super) struct CheckedFile {
    file: Arc<dyn Storage>,
    sums: Option<Checksums>,
    /// Whether a block that does not fit is read all the same, and what cannot be read is remembered.
    lenient: bool,
    checked: Bits,
    misfits: Bits,
    /// Blocks of which a part was read, and another part cannot be.
    torn: Bits,
    /// Offsets of pieces that cannot be read. Disks may take seconds for each, and may change their mind.
    unreadable: Mutex<BTreeSet<u64>>,
    /// Why checksums could not be read, where that is allowed.
    unchecked: OnceLock<String>,
}

impl fmt::Debug for CheckedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckedFile").field("sums", &self.sums).finish_non_exhaustive()
    }
}

impl CheckedFile {
    pub(super) fn new(file: Arc<dyn Storage>, sums: Option<Checksums>, lenient: bool) -> Self {
        let blocks = sums.as_ref().map_or(0, Checksums::blocks);
        let bits = || Bits::new(blocks);
        let (checked, misfits, torn) = (bits(), bits(), bits());
        Self { file, sums, lenient, checked, misfits, torn, unreadable: Mutex::default(), unchecked: OnceLock::new() }
    }

    /// Why some of what was read was not checked, though there are checksums.
    pub(super) fn unchecked(&self) -> Option<&str> {
        self.unchecked.get().map(String::as_str)
    }

    /// Whether the first block would fit its checksum with zeroes in this range.
    pub(super) fn starts_with_but_zeroes(&self, range: Range<u64>) -> bool {
        let Some(sums) = &self.sums else { return false };
        let mut block = vec![0; to_usize(sums.length().min(BLOCK))];
        let read = self.file.read_exact_at(&mut block, 0);
        block.get_mut(to_usize(range.start)..to_usize(range.end)).unwrap_or_default().fill(0);
        read.is_ok() && sums.read(0..1).is_ok_and(|sum| sum == [crc32fast::hash(&block)])
    }

    /// Whether all that was read is what it was when the image was made.
    pub(super) fn is_as_made(&self) -> bool {
        let Some(sums) = &self.sums else { return false };
        let fits = sums.unsettled().is_empty() && self.unchecked().is_none() && self.unreadable().is_empty();
        fits && self.misfits(0..sums.length()).is_empty() && self.file.length() == sums.length()
    }

    /// The parts of a range in blocks that were read and do not fit.
    pub(super) fn misfits(&self, range: Range<u64>) -> Vec<Range<u64>> {
        parts(&range, self.misfits.within(blocks(&range)))
    }

    /// The parts of a range in blocks of which a part cannot be read: their checksums say nothing of the others.
    pub(super) fn torn(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let torn = self.torn.within(blocks(&range));
        // the disk may have changed its mind
        parts(&range, torn.into_iter().filter(|block| !self.checked.get(*block)))
    }

    /// Checks the blocks that no read will see: holes, which are zeroes. Where it is lenient, those that should be something
    /// else are misfits from then on.
    ///
    /// # Errors
    /// A block that should be something else, unless it is lenient; what the system says.
    pub(super) fn check_holes(&self) -> io::Result<()> {
        let Some(sums) = &self.sums else { return Ok(()) };
        let mut start = 0;
        while start < sums.length() {
            let data = self.file.next_data(start)?.unwrap_or(sums.length()..u64::MAX);
            let hole_end = if data.start < sums.length() { data.start / BLOCK } else { sums.blocks() };
            for batch in batches(start.div_ceil(BLOCK)..hole_end) {
                for block in self.not_zeroes(sums, batch).map_err(io::Error::other)? {
                    if self.lenient {
                        self.misfits.set(block);
                    } else {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, Misfit { offset: block * BLOCK }));
                    }
                }
            }
            start = data.end;
        }
        Ok(())
    }

    /// Those of some blocks that should be something else than zeroes, if they were not checked yet.
    fn not_zeroes(&self, sums: &Checksums, blocks: Range<u64>) -> Result<Vec<u64>, ChecksumsError> {
        let last = sums.blocks().saturating_sub(1);
        let zeroes = |block: u64| {
            if block < last {
                return *ZERO_BLOCK_SUM;
            }
            let length = to_usize((sums.length() - block * BLOCK).min(BLOCK));
            crc32fast::hash(&vec![0; length])
        };
        let known = blocks.clone().zip(sums.read(blocks)?);
        Ok(known.filter(|(block, sum)| self.wants(*block) && *sum != zeroes(*block)).map(|(block, _)| block).collect())
    }

    /// Whether a block has a sum that says anything, and was not checked yet.
    fn wants(&self, block: u64) -> bool {
        let Some(sums) = &self.sums else { return false };
        block < sums.blocks() && !sums.unsettled().contains(&block) && !self.checked.get(block)
    }

    /// Compares whole blocks with their sums.
    fn compare(&self, sums: &Checksums, first: u64, bytes: &[u8]) -> io::Result<()> {
        let blocks = first..first + (bytes.len() as u64).div_ceil(BLOCK);
        let expected = match sums.read(blocks.clone()) {
            Ok(expected) => expected,
            Err(error) if self.lenient => {
                let error = io::Error::other(error);
                let _ = self.unchecked.set(format!("its checksums cannot be read: {error}"));
                return Ok(());
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        for ((block, bytes), expected) in blocks.zip(bytes.chunks(to_usize(BLOCK))).zip(expected) {
            if !self.wants(block) {
                continue;
            }
            if crc32fast::hash(bytes) != expected {
                if !self.lenient {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, Misfit { offset: block * BLOCK }));
                }
                self.misfits.set(block);
            }
            self.checked.set(block);
        }
        Ok(())
    }

    /// Reads what has to be checked in whole blocks.
    fn read_checked(&self, sums: &Checksums, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let length = self.file.length();
        let mut whole = Vec::new();
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let block = at / BLOCK;
            let end = ((block + 1) * BLOCK).min(length);
            let left = buffer.len() - done;
            let wants = self.wants(block);
            // as many blocks as there are in whole
            let aligned = at == block * BLOCK && at + left as u64 >= end && wants;
            let part = if aligned {
                let blocks = left / to_usize(BLOCK) * to_usize(BLOCK);
                if at + left as u64 >= length { left } else { blocks }
            } else {
                left.min(to_usize(end.saturating_sub(at)))
            };
            let place = buffer.get_mut(done..done + part).unwrap_or_default();
            if part == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if aligned {
                self.read_plain(place, at)?;
                self.compare(sums, block, place)?;
            } else if wants {
                match self.read_whole(&mut whole, block * BLOCK..end) {
                    Ok(()) => {
                        self.compare(sums, block, &whole)?;
                        let start = to_usize(at - block * BLOCK);
                        place.copy_from_slice(whole.get(start..start + part).unwrap_or_default());
                    }
                    // what can be read of it cannot be checked
                    Err(_) if self.lenient => {
                        self.read_plain(place, at)?;
                        self.torn.set(block);
                    }
                    Err(error) => return Err(error),
                }
            } else {
                self.read_plain(place, at)?;
            }
            done += part;
        }
        Ok(())
    }

    fn read_whole(&self, whole: &mut Vec<u8>, block: Range<u64>) -> io::Result<()> {
        whole.resize(to_usize(block.end - block.start), 0);
        self.read_plain(whole, block.start)
    }

    /// Reads, unless a piece is known to be unreadable; remembers those that are.
    fn read_plain(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.lenient {
            return self.file.read_exact_at(buffer, offset);
        }
        let pieces = offset / PIECE..(offset + buffer.len() as u64).div_ceil(PIECE);
        if self.unreadable().range(pieces.clone()).next().is_some() {
            return Err(io::Error::other("an earlier read failed"));
        }
        let Err(error) = self.file.read_exact_at(buffer, offset) else { return Ok(()) };
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return Err(error);
        }
        let mut page = vec![0; to_usize(PIECE)];
        let mut is_lasting = false;
        for piece in pieces {
            let length = self.file.length().saturating_sub(piece * PIECE).min(PIECE);
            let page = page.get_mut(..to_usize(length)).unwrap_or_default();
            if self.file.read_exact_at(page, piece * PIECE).is_err() {
                is_lasting = true;
                if self.unreadable().len() < PIECES_MOST {
                    self.unreadable().insert(piece);
                }
            }
        }
        if is_lasting { Err(error) } else { self.file.read_exact_at(buffer, offset) }
    }

    fn unreadable(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for CheckedFile {
    fn length(&self) -> u64 {
        self.file.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.sums {
            Some(sums) => self.read_checked(sums, buffer, offset),
            None => self.read_plain(buffer, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }

    /// What became a hole and should be something else is no hole: whoever reads it is told.
    fn next_data_within(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        let data = self.file.next_data_within(range.clone())?;
        let Some(sums) = &self.sums else { return Ok(data) };
        let blocks = range.start / BLOCK..data.unwrap_or(range.end).div_ceil(BLOCK).min(sums.blocks());
        if range.is_empty() || blocks.is_empty() {
            return Ok(data);
        }
        let lost = batches(blocks).find_map(|batch| match self.not_zeroes(sums, batch.clone()) {
            Ok(blocks) => blocks.first().map(|block| (block * BLOCK).max(range.start)),
            // so is whoever reads where that cannot be said
            Err(_) => Some((batch.start * BLOCK).max(range.start)),
        });
        Ok([lost, data].into_iter().flatten().min())
    }
}

/// The blocks that a range touches.
fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK..range.end.div_ceil(BLOCK)
}

/// What a range has of these blocks.
fn parts(range: &Range<u64>, blocks: impl IntoIterator<Item = u64>) -> Vec<Range<u64>> {
    let part = |block: u64| (block * BLOCK).max(range.start)..((block + 1) * BLOCK).min(range.end);
    blocks.into_iter().map(part).collect()
}

/// Blocks in parts whose sums are in memory at once: the first are few, since most are looked at for one that is near.
fn batches(blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    const MOST: u64 = 1 << 14;
    let (mut first, mut length) = (blocks.start, 16);
    std::iter::from_fn(move || {
        let batch = first..(first + length).min(blocks.end);
        first = batch.end;
        length = (2 * length).min(MOST);
        (!batch.is_empty()).then_some(batch)
    })
}

/// Why nothing, or not all, of an image can be checked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unverified {
    /// There are no checksums.
    None,
    /// They cannot be used.
    Unusable(String),
    /// A change in place was not finished, and those of some blocks say nothing.
    Unsettled {
        /// How many blocks.
        blocks: u64,
    },
}

impl fmt::Display for Unverified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("it has no checksums"),
            Self::Unusable(reason) => f.write_str(reason),
            Self::Unsettled { blocks } => write!(f, "a change of {blocks} of its blocks was begun and not finished"),
        }
    }
}

/// The checksums that were [opened](Checksums::open), and what stands against them. Those of another image are an error.
pub(super) fn own_sums(
    opened: Result<Option<Checksums>, ChecksumsError>,
) -> Result<(Option<Checksums>, Option<Unverified>), ChecksumsError> {
    match opened {
        Err(error @ ChecksumsError::Foreign { .. }) => Err(error),
        opened => Ok(judged(opened)),
    }
}

/// The checksums of an image, and what stands against them.
pub(super) fn sums(image: &Path) -> (Option<Checksums>, Option<Unverified>) {
    judged(Checksums::open(image))
}

fn judged(opened: Result<Option<Checksums>, ChecksumsError>) -> (Option<Checksums>, Option<Unverified>) {
    match opened {
        Ok(Some(sums)) => {
            let unsettled = sums.unsettled();
            let blocks = unsettled.end.saturating_sub(unsettled.start);
            (Some(sums), (blocks > 0).then_some(Unverified::Unsettled { blocks }))
        }
        Ok(None) => (None, Some(Unverified::None)),
        Err(error) => (None, Some(Unverified::Unusable(errors::line(&error)))),
    }
}

/// An image that could not be checked, or not all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unchecked {
    pub(super) path: PathBuf,
    pub(super) reason: Unverified,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{Renewal, create_checksums};
    use crate::storage::FileStorage;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    /// A raw image of eight blocks and a bit, the second a hole, with checksums.
    fn image() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        let bytes: Vec<u8> = (0..8 * BLOCK + 100).map(|at| u8::try_from(at % 251).unwrap()).collect();
        FileExt::write_all_at(&file, &bytes[..to_usize(BLOCK)], 0).unwrap();
        FileExt::write_all_at(&file, &bytes[to_usize(2 * BLOCK)..], 2 * BLOCK).unwrap();
        create_checksums(&path, &FileStorage::open(&path).unwrap()).unwrap();
        (folder, path)
    }

    fn flip(path: &Path, at: u64) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        FileExt::read_exact_at(&file, &mut byte, at).unwrap();
        FileExt::write_all_at(&file, &[byte[0] ^ 1], at).unwrap();
    }

    fn open(path: &Path, lenient: bool) -> CheckedFile {
        let (sums, _) = sums(path);
        CheckedFile::new(Arc::new(FileStorage::open(path).unwrap()), sums, lenient)
    }

    #[test]
    fn any_read_that_touches_a_damaged_block_fails_and_no_other() {
        let (_folder, path) = image();
        for at in [0, BLOCK - 1, 3 * BLOCK + 7, 8 * BLOCK + 99] {
            flip(&path, at);
            let wrong = at / BLOCK;
            for (offset, length) in [(0, 1), (0, BLOCK), (5, 3 * BLOCK), (3 * BLOCK, 2 * BLOCK), (0, 8 * BLOCK + 100)]
                .into_iter()
                .chain([(4 * BLOCK, 4 * BLOCK + 100), (8 * BLOCK + 50, 10), (3 * BLOCK - 1, 2), (2 * BLOCK, BLOCK)])
            {
                let touched = offset / BLOCK <= wrong && wrong <= (offset + length - 1) / BLOCK;
                let mut buffer = vec![0; to_usize(length)];
                let read = open(&path, false).read_exact_at(&mut buffer, offset);
                assert_eq!(read.is_err(), touched, "{at}: {offset} {length}");
                let lenient = open(&path, true);
                lenient.read_exact_at(&mut buffer, offset).unwrap();
                let should = std::fs::read(&path).unwrap();
                assert!(buffer == should[to_usize(offset)..to_usize(offset + length)], "{at}: {offset} {length}");
                let misfits = lenient.misfits(0..9 * BLOCK);
                let expected: Vec<_> = touched.then_some(wrong * BLOCK..(wrong + 1) * BLOCK).into_iter().collect();
                assert_eq!(misfits, expected, "{at}: {offset} {length}");
            }
            flip(&path, at);
        }
    }

    #[test]
    fn a_block_that_became_a_hole_is_noticed() {
        let (_folder, path) = image();
        open(&path, false).check_holes().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, punch, 4 * BLOCK, BLOCK).unwrap();
        assert_eq!(open(&path, false).check_holes().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_hole_that_should_be_data_is_read_by_who_leaves_out_holes() {
        let (_folder, path) = image();
        let next = |range: Range<u64>| open(&path, false).next_data_within(range).unwrap();
        assert_eq!([next(BLOCK..2 * BLOCK), next(BLOCK..3 * BLOCK), next(0..1)], [None, Some(2 * BLOCK), Some(0)]);
        let file = File::options().write(true).open(&path).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        // a whole block, and a page of one
        rustix::fs::fallocate(&file, punch, 4 * BLOCK, BLOCK).unwrap();
        rustix::fs::fallocate(&file, punch, 6 * BLOCK + 8192, 4096).unwrap();
        for hole in [4 * BLOCK + 5..5 * BLOCK, 6 * BLOCK + 8192..6 * BLOCK + 9000] {
            assert_eq!(next(hole.clone()), Some(hole.start));
            let image: Arc<dyn Storage> = Arc::new(open(&path, true));
            assert_eq!(image.next_data_within(hole.clone()).unwrap(), Some(hole.start));
        }
    }

    #[test]
    fn unsettled_blocks_are_not_checked_and_that_is_told() {
        let (_folder, path) = image();
        drop(Renewal::begin(&path, 3..5).unwrap());
        for at in [3 * BLOCK, 5 * BLOCK - 1] {
            flip(&path, at);
        }
        let mut buffer = vec![0; to_usize(8 * BLOCK + 100)];
        open(&path, false).read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(sums(&path).1, Some(Unverified::Unsettled { blocks: 2 }));
        flip(&path, 5 * BLOCK);
        open(&path, false).read_exact_at(&mut buffer, 0).unwrap_err();
    }
}
