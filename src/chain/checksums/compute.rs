//! Sums of blocks, on all threads of the pool.

use std::io::{self, Seek, SeekFrom, Write};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::LazyLock;

use byteorder::{BigEndian, ByteOrder};

use super::header::Header;
use super::known::KnownSums;
use super::{BLOCK, Checksums, ChecksumsError, id_of};
use crate::chain::ImageId;
use crate::errors;
use crate::storage::{self, NewFile, Storage, to_usize};
use crate::threads;

/// Blocks that a thread reads at once: what it sums is still in the processor's cache.
pub(super) const READ: u64 = 8;

/// Blocks whose sums are in memory at once.
const BATCH: u64 = 1 << 14;

/// The checksum of a whole block of zeroes.
pub(crate) static ZEROES: LazyLock<u32> = LazyLock::new(|| crc32fast::hash(&vec![0; to_usize(BLOCK)]));

/// Hears how many more bytes are summed, on any thread, and gives up where it wants to.
type Watch<'a> = dyn Fn(u64) -> ControlFlow<()> + Sync + 'a;

/// Why there are no checksums.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SumError {
    /// The image cannot be read.
    #[error("the image cannot be read at offset {offset:#x}")]
    Image {
        /// Where a part of it begins that cannot be read.
        offset: u64,
        /// What the system says.
        source: io::Error,
    },
    /// The file with the checksums cannot be written.
    #[error("its checksums cannot be written")]
    Write {
        /// What the system says.
        #[from]
        source: io::Error,
    },
    /// Those that it has cannot be read.
    #[error(transparent)]
    Old(#[from] ChecksumsError),
    /// Whoever watches wanted no more.
    #[error("cancelled")]
    Cancelled,
}

impl From<SumError> for io::Error {
    fn from(error: SumError) -> Self {
        match error {
            SumError::Write { source } => source,
            other => Self::other(errors::line(&other)),
        }
    }
}

/// The sums of some [blocks](BLOCK) of an image, as far as it has them; holes are not read.
///
/// # Errors
/// [`SumError::Image`].
pub fn block_sums(image: &(impl Storage + ?Sized), blocks: Range<u64>) -> Result<Vec<u32>, SumError> {
    let blocks = blocks.start..blocks.end.min(image.length().div_ceil(BLOCK));
    watched_sums(image, blocks, &KnownSums::default(), &|_| ControlFlow::Continue(()))
}

pub(super) fn watched_sums(
    image: &(impl Storage + ?Sized),
    blocks: Range<u64>,
    known: &KnownSums,
    each: &Watch<'_>,
) -> Result<Vec<u32>, SumError> {
    let parts = blocks.end.saturating_sub(blocks.start).div_ceil(READ);
    let part = |number: u64| {
        let start = blocks.start + number * READ;
        start..(start + READ).min(blocks.end)
    };
    let sums: Vec<Vec<u32>> = threads::try_map(0..parts, Vec::new, |buffer, number| {
        let part = part(number);
        let sums = unknown_sums(image, part.clone(), known, buffer)?;
        match each((part.end * BLOCK).min(image.length()) - part.start * BLOCK) {
            ControlFlow::Continue(()) => Ok(sums),
            ControlFlow::Break(()) => Err(SumError::Cancelled),
        }
    })?;
    Ok(sums.into_iter().flatten().collect())
}

/// The sums of some blocks, which lie in ranges of at most [`READ`] blocks.
pub(super) fn sums_of(image: &(impl Storage + ?Sized), parts: &[Range<u64>]) -> Result<Vec<Vec<u32>>, SumError> {
    threads::try_map(parts, Vec::new, |buffer, part| sums(image, part.clone(), buffer))
}

/// The sums of a few blocks that lie next to each other, where those that are known need not be read.
fn unknown_sums(
    image: &(impl Storage + ?Sized),
    blocks: Range<u64>,
    known: &KnownSums,
    buffer: &mut Vec<u8>,
) -> Result<Vec<u32>, SumError> {
    // of a block that is short now, nothing was known
    let whole = image.length() / BLOCK;
    let known = |block: &u64| known.get(*block).filter(|_| *block < whole);
    let mut found = Vec::new();
    let mut next = blocks.start;
    while next < blocks.end {
        found.extend((next..blocks.end).map_while(|block| known(&block)));
        next = blocks.start + found.len() as u64;
        let end = (next..blocks.end).find(|block| known(block).is_some()).unwrap_or(blocks.end);
        if next < end {
            found.extend(sums(image, next..end, buffer)?);
        }
        next = end;
    }
    Ok(found)
}

/// The sums of a few blocks that lie next to each other.
pub(super) fn sums(
    image: &(impl Storage + ?Sized),
    blocks: Range<u64>,
    buffer: &mut Vec<u8>,
) -> Result<Vec<u32>, SumError> {
    let start = blocks.start * BLOCK;
    let end = (blocks.end * BLOCK).min(image.length());
    let unread = |source| SumError::Image { offset: start, source };
    buffer.resize(to_usize(end.saturating_sub(start)), 0);
    if image.next_data_start(start).map_err(unread)?.is_none_or(|data| data >= end) {
        if blocks.end * BLOCK == end {
            return Ok(vec![*ZEROES; to_usize(blocks.end - blocks.start)]);
        }
        buffer.fill(0);
    } else {
        image.read_exact_at(buffer, start).map_err(unread)?;
    }
    Ok(buffer.chunks(to_usize(BLOCK)).map(crc32fast::hash).collect())
}

/// Computes the checksums of an image that nobody writes to, and writes them down beside what `image` names, which may be
/// a name that it will have later. They replace others, and have the id that the manifest has which is there.
///
/// # Errors
/// Which file fails, and why; earlier checksums are still there then.
pub fn create(image: &Path, storage: &(impl Storage + ?Sized)) -> Result<(), SumError> {
    create_watched(image, storage, &KnownSums::default(), &|_| ControlFlow::Continue(()))
}

/// As [`create`], but does not read what is known, and tells `each` on any thread how many more bytes are summed, which may
/// give up.
///
/// # Errors
/// As with [`create`]; [`SumError::Cancelled`] where `each` breaks off.
pub(crate) fn create_watched(
    image: &Path,
    storage: &(impl Storage + ?Sized),
    known: &KnownSums,
    each: &Watch<'_>,
) -> Result<(), SumError> {
    write(image, id_of(image)?, storage.length(), |blocks| watched_sums(storage, blocks, known, each))
}

/// Writes a file with checksums: it is there whole and on stable storage, as it was before, or not at all.
pub(super) fn write(
    image: &Path,
    id: Option<ImageId>,
    length: u64,
    mut sums: impl FnMut(Range<u64>) -> Result<Vec<u32>, SumError>,
) -> Result<(), SumError> {
    // whoever may not read the image learns nothing of it here, either
    let of = std::fs::metadata(image).ok();
    let mode = of.as_ref().map_or(0o600, |image| image.permissions().mode() & 0o666);
    let path = Checksums::path(image);
    storage::create_folders(storage::parent(&path))?;
    let new = NewFile::create(&path, mode)?;
    if let Some(of) = of {
        storage::give_to_owner(new.file(), &of);
    }
    let mut file = new.file();
    let mut header = Header { length, unsettled: (0, 0), id, list: 0 };
    let mut hasher = crc32fast::Hasher::new();
    file.seek(SeekFrom::Start(header.size()))?;
    let mut start = 0;
    while start < header.blocks() {
        let end = (start + BATCH).min(header.blocks());
        let sums = sums(start..end)?;
        let mut bytes = vec![0; sums.len() * 4];
        BigEndian::write_u32_into(&sums, &mut bytes);
        hasher.update(&bytes);
        file.write_all(&bytes)?;
        start = end;
    }
    header.list = hasher.finalize();
    std::os::unix::fs::FileExt::write_all_at(file, &header.bytes(), 0)?;
    Ok(new.publish(true)?)
}
