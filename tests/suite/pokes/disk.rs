//! The disk in an image that may say anything: only what is not zeroes, however large it claims to be.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qmpbackup::qcow2::{Content, Error, GuestOffset, Image, MapBuffer, Reader};

use crate::support::edited::memory;

const CHUNK: u64 = 64 << 10;

/// The size of a disk, and its chunks that are not zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) size: u64,
    chunks: BTreeMap<u64, Vec<u8>>,
}

impl Disk {
    /// What the engine reads.
    pub(super) fn read(image: &[u8]) -> Result<Self, Error> {
        let image = Image::open(memory(image))?;
        let mut reader = Reader::new(&image);
        let (mut disk, mut extents) = (Self { size: image.size(), chunks: BTreeMap::new() }, Vec::new());
        let has_backing = image.header().backing.is_some();
        image.map(0..image.size(), &mut MapBuffer::default(), |extent| match extent.content {
            Content::Unallocated if !has_backing => {}
            Content::Zero => {}
            _ => extents.push(extent.guest),
        })?;
        for extent in extents {
            let mut start = extent.start;
            while start < extent.end {
                let end = extent.end.min((start / CHUNK + 1) * CHUNK);
                let mut bytes = vec![0; (end - start) as usize];
                reader.read(&mut bytes, GuestOffset(start))?;
                disk.put(start, &bytes);
                start = end;
            }
        }
        Ok(disk)
    }

    /// A part of a chunk.
    pub(super) fn put(&mut self, start: u64, bytes: &[u8]) {
        if bytes.iter().any(|byte| *byte != 0) {
            let chunk = self.chunks.entry(start / CHUNK * CHUNK).or_insert_with(|| vec![0; CHUNK as usize]);
            let first = (start % CHUNK) as usize;
            chunk[first..first + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// Reads a part of a chunk.
    pub(super) fn get(&self, start: u64, bytes: &mut [u8]) {
        if let Some(chunk) = self.chunks.get(&(start / CHUNK * CHUNK)) {
            let first = (start % CHUNK) as usize;
            bytes.copy_from_slice(&chunk[first..first + bytes.len()]);
        }
    }

    /// Zeroes.
    pub(super) fn clear(&mut self, range: Range<u64>) {
        for (start, chunk) in self.chunks.range_mut(..range.end) {
            let first = range.start.saturating_sub(*start).min(CHUNK) as usize;
            chunk[first..CHUNK.min(range.end - start) as usize].fill(0);
        }
        self.chunks.retain(|_, chunk| chunk.iter().any(|byte| *byte != 0));
    }

    /// The disk of another size: cut off, or with zeroes behind it.
    pub(super) fn resized(&self, size: u64) -> Self {
        let mut disk = Self { size, chunks: BTreeMap::new() };
        for (start, chunk) in self.chunks.range(..size) {
            disk.put(*start, &chunk[..chunk.len().min((size - start) as usize)]);
        }
        disk
    }

    pub(super) fn of_bytes(bytes: &[u8]) -> Self {
        let mut disk = Self { size: bytes.len() as u64, chunks: BTreeMap::new() };
        (0..).step_by(CHUNK as usize).zip(bytes.chunks(CHUNK as usize)).for_each(|(at, part)| disk.put(at, part));
        disk
    }

    /// As a file with holes.
    pub(super) fn save(&self, path: &Path) {
        let file = File::create(path).unwrap();
        for (start, chunk) in &self.chunks {
            file.write_all_at(chunk, *start).unwrap();
        }
        file.set_len(self.size).unwrap();
    }
}
