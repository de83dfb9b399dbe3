//! What can be asked of a writer, drawn by chance, and what it does to an array of bytes.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use qmpbackup::qcow2::{self, Error, GuestOffset, Image, Reader, Report, Writer};
use qmpbackup::storage::MemoryStorage;

use crate::support::prng::Prng;

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(Range<u64>, Vec<u8>),
    /// The caller writes to the places.
    Allocate(Range<u64>, Vec<u8>),
    Compressed(Range<u64>, Vec<u8>),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Read(Range<u64>),
    Flush,
}

/// Draws what is asked.
pub(crate) struct Draw {
    pub(crate) size: u64,
    pub(crate) cluster: u64,
    /// All offsets are multiples of it.
    pub(crate) unit: u64,
    pub(crate) longest: u64,
}

impl Draw {
    pub(crate) fn op(&self, prng: &mut Prng) -> Op {
        let range = self.range(prng);
        match prng.below(16) {
            0..=3 => Op::Write(range.clone(), content(prng, &range)),
            4..=5 => Op::Allocate(range.clone(), content(prng, &range)),
            6..=8 => {
                let start = range.start / self.cluster * self.cluster;
                let range = start..self.size.min(start + self.cluster);
                let mut bytes = content(prng, &range);
                for byte in &mut bytes {
                    *byte &= 0x11;
                }
                Op::Compressed(range, bytes)
            }
            9..=10 => Op::Zero(range),
            11..=12 => Op::Discard(range),
            13..=14 => Op::Read(range),
            _ => Op::Flush,
        }
    }

    fn range(&self, prng: &mut Prng) -> Range<u64> {
        let (size, cluster) = (self.size, self.cluster);
        let start = match prng.below(6) {
            0 => 0,
            1 => size.saturating_sub(prng.between(1, 3 * cluster)),
            _ => prng.below(size),
        };
        let start = if prng.one_in(3) { start / cluster * cluster } else { start / self.unit * self.unit };
        let length = match prng.below(6) {
            0 => cluster,
            1 => prng.between(1, 4) * cluster,
            2 => prng.below(self.unit * 4),
            _ => prng.below(self.longest.min(3 * cluster)),
        };
        start..(start + length.min(self.longest).next_multiple_of(self.unit)).min(size)
    }
}

/// Noise, or one byte again and again.
fn content(prng: &mut Prng, range: &Range<u64>) -> Vec<u8> {
    let length = usize::try_from(range.end - range.start).unwrap();
    if prng.one_in(3) { prng.bytes(length) } else { vec![prng.next().to_le_bytes()[0]; length] }
}

impl Op {
    /// Asks the writer.
    pub(crate) fn ask(&self, writer: &mut Writer) -> Result<Option<Vec<u8>>, Error> {
        match self {
            Self::Write(range, bytes) => writer.write(bytes, GuestOffset(range.start))?,
            Self::Compressed(range, bytes) => writer.write_compressed(bytes, GuestOffset(range.start))?,
            Self::Zero(range) => writer.write_zeroes(range.clone())?,
            Self::Discard(range) => writer.discard(range.clone())?,
            Self::Flush => writer.flush()?,
            Self::Allocate(range, bytes) => {
                let mut places = Vec::new();
                writer.allocate(range.clone(), |place| places.push(place))?;
                let mut next = range.start;
                for place in places {
                    assert_eq!(place.guest.start, next);
                    next = place.guest.end;
                    let part = within(&place.guest, range.start);
                    writer.storage().write_all_at(&bytes[part], place.host.0).map_err(|source| Error::Write {
                        what: "guest data",
                        offset: place.host,
                        source,
                    })?;
                }
                assert_eq!(next, range.end);
            }
            Self::Read(range) => {
                let mut bytes = vec![0xaa; within(range, range.start).end];
                writer.read(&mut bytes, GuestOffset(range.start))?;
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// The guest range that changes, and what is there then; `None` for zeroes.
    pub(crate) fn changes(&self, size: u64, cluster: u64) -> Option<(Range<u64>, Option<&[u8]>)> {
        match self {
            Self::Write(range, bytes) | Self::Allocate(range, bytes) | Self::Compressed(range, bytes) => {
                Some((range.clone(), Some(bytes)))
            }
            Self::Zero(range) => Some((range.clone(), None)),
            Self::Discard(range) => {
                let start = range.start.next_multiple_of(cluster);
                let end = if range.end == size { size } else { range.end / cluster * cluster };
                (start < end).then_some((start..end, None))
            }
            Self::Read(_) | Self::Flush => None,
        }
    }

    /// Does it to the model.
    pub(crate) fn apply(&self, disk: &mut [u8], cluster: u64) {
        if let Some((range, bytes)) = self.changes(disk.len() as u64, cluster) {
            let part = &mut disk[within(&range, 0)];
            match bytes {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
        }
    }
}

/// A range as indices of a buffer that begins at `start`.
pub(crate) fn within(range: &Range<u64>, start: u64) -> Range<usize> {
    usize::try_from(range.start - start).unwrap()..usize::try_from(range.end - start).unwrap()
}

/// All of a disk, as the reader of images sees it.
pub(crate) fn read(image: &[u8]) -> Vec<u8> {
    let image = Image::open(Arc::new(MemoryStorage::new(image.to_vec()))).unwrap();
    let mut disk = vec![0xaa; usize::try_from(image.size()).unwrap()];
    Reader::new(&image).read(&mut disk, GuestOffset(0)).unwrap();
    disk
}

pub(crate) fn check(image: &[u8]) -> Report {
    qcow2::check(&MemoryStorage::new(image.to_vec()), &mut |_| ControlFlow::Continue(())).unwrap()
}
