//! Sums of blocks, on all threads of the pool.

use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::LazyLock;

use byteorder::{BigEndian, ByteOrder};
use rayon::prelude::*;

use super::header::Header;
use super::known::KnownSums;
use super::{BLOCK, Checksums, id_of};
use crate::chain::ImageId;
use crate::storage::{NewFile, Storage, to_usize};

/// Blocks that a thread reads at once: what it sums is still in the processor's cache.
pub(super) const READ: u64 = 8;

/// Blocks whose sums are in memory at once.
const BATCH: u64 = 1 << 14;

/// The checksum of a whole block of zeroes.
pub(crate) static ZEROES: LazyLock<u32> = LazyLock::new(|| crc32fast::hash(&vec![0; to_usize(BLOCK)]));

/// Hears how many more bytes are summed, on any thread, and gives up where it wants to.
type Watch<'a> = dyn Fn(u64) -> io::Result<()> + Sync + 'a;

/// The sums of some [blocks](BLOCK) of an image; holes are not read.
///
/// # Errors
/// What the system says.
pub fn block_sums(image: &(impl Storage + ?Sized), blocks: Range<u64>) -> io::Result<Vec<u32>> {
    watched_sums(image, blocks, &KnownSums::default(), &|_| Ok(()))
}

pub(super) fn watched_sums(
    image: &(impl Storage + ?Sized),
    blocks: Range<u64>,
    known: &KnownSums,
    each: &Watch<'_>,
) -> io::Result<Vec<u32>> {
    let parts = blocks.end.saturating_sub(blocks.start).div_ceil(READ);
    let part = |number: u64| {
        let start = blocks.start + number * READ;
        start..(start + READ).min(blocks.end)
    };
    let sums: Vec<Vec<u32>> = (0..parts)
        .into_par_iter()
        .map_init(Vec::new, |buffer, number| {
            let part = part(number);
            let sums = unknown_sums(image, part.clone(), known, buffer)?;
            each((part.end * BLOCK).min(image.length()) - part.start * BLOCK)?;
            Ok(sums)
        })
        .collect::<io::Result<_>>()?;
    Ok(sums.into_iter().flatten().collect())
}

/// The sums of some blocks, which lie in ranges of at most [`READ`] blocks.
pub(super) fn sums_of(image: &(impl Storage + ?Sized), parts: &[Range<u64>]) -> io::Result<Vec<Vec<u32>>> {
    parts.par_iter().map_init(Vec::new, |buffer, part| sums(image, part.clone(), buffer)).collect()
}

/// The sums of a few blocks that lie next to each other, where those that are known need not be read.
fn unknown_sums(
    image: &(impl Storage + ?Sized),
    blocks: Range<u64>,
    known: &KnownSums,
    buffer: &mut Vec<u8>,
) -> io::Result<Vec<u32>> {
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
pub(super) fn sums(image: &(impl Storage + ?Sized), blocks: Range<u64>, buffer: &mut Vec<u8>) -> io::Result<Vec<u32>> {
    let start = blocks.start * BLOCK;
    let end = (blocks.end * BLOCK).min(image.length());
    buffer.resize(to_usize(end.saturating_sub(start)), 0);
    if image.next_data_start(start)?.is_none_or(|data| data >= end) {
        if blocks.end * BLOCK == end {
            return Ok(vec![*ZEROES; to_usize(blocks.end - blocks.start)]);
        }
        buffer.fill(0);
    } else {
        image.read_exact_at(buffer, start)?;
    }
    Ok(buffer.chunks(to_usize(BLOCK)).map(crc32fast::hash).collect())
}

/// Computes the checksums of an image that nobody writes to, and writes them down beside what `image` names, which may be
/// a name that it will have later. They replace others, and have the id that the manifest has which is there.
///
/// # Errors
/// What the system says of either file; earlier checksums are still there then.
pub fn create(image: &Path, storage: &(impl Storage + ?Sized)) -> io::Result<()> {
    create_watched(image, storage, &KnownSums::default(), &|_| Ok(()))
}

/// As [`create`], but does not read what is known, and tells `each` on any thread how many more bytes are summed, which may
/// give up.
///
/// # Errors
/// As with [`create`]; what `each` says.
pub(crate) fn create_watched(
    image: &Path,
    storage: &(impl Storage + ?Sized),
    known: &KnownSums,
    each: &Watch<'_>,
) -> io::Result<()> {
    write(image, id_of(image), storage.length(), |blocks| watched_sums(storage, blocks, known, each))
}

/// Writes a file with checksums: it is there whole and on stable storage, as it was before, or not at all.
pub(super) fn write(
    image: &Path,
    id: Option<ImageId>,
    length: u64,
    mut sums: impl FnMut(Range<u64>) -> io::Result<Vec<u32>>,
) -> io::Result<()> {
    // whoever may not read the image learns nothing of it here, either
    let mode = std::fs::metadata(image).map_or(0o600, |image| image.permissions().mode() & 0o666);
    let new = NewFile::create(&Checksums::path(image), mode)?;
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
    new.publish(true)
}
