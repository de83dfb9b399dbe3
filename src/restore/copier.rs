//! Moves bytes: in the kernel where that gains something, else by large reads gathered into large writes.
//!
//! # What was tried
//!
//! 1.27 GB go from one file to a new one on ext4, by two threads in slices of 8 MiB. Seconds until it is synced / of
//! processor time, medians of five; the disk alone needs 0.63. What is done are reads and writes of 256 KiB, whose figures
//! stand above those of what was tried instead:
//!
//! | way | 256 KiB, all read before: **0.65 / 0.56** |
//! |---|---|
//! | 64 KiB; 1 MiB | 0.67 / 0.65; 1.04 / 1.24 |
//! | 1 MiB by one thread; one write at a time | 0.68 / 0.53; 0.66 / 0.52 |
//! | 1 MiB, `fallocate` before | 1.00 / 1.12 |
//! | write-back begun by `sync_file_range`; not before the sync | 1.04 / 1.32; 0.89 / 0.54 |
//! | `copy_file_range` by two threads; by one | 0.67 / 0.75; 0.67 / 0.42 |
//! | mapped source; output; both | 0.66 / 0.73; 0.85 / 1.01; 1.43 / 2.46 |
//! | `O_DIRECT` output; `fallocate` before | 0.97 / 0.33; 0.69 / 0.24 |
//!
//! | way | 256 KiB, all read before, another day: **0.46 / 0.57** |
//! |---|---|
//! | buffers in huge pages | 0.48 / 0.62 |
//! | clusters of zeroes looked for and left out, where there are none | 0.50 / 0.58 |
//! | `io_uring`, 8 at once: plain buffers; registered ones; the kernel's workers | 0.52 / 0.68; 0.51 / 0.63; 0.50 / 0.81 |
//! | `io_uring` by one thread | 0.51 / 0.65 |
//! | `io_uring` to `O_DIRECT` output; `fallocate` before | 0.69 / 0.63; 0.67 / 0.55 |
//!
//! | way | 256 KiB, nothing read before: **1.14** |
//! |---|---|
//! | `POSIX_FADV_SEQUENTIAL`; `RANDOM` | 1.11; 2.04 |
//! | `WILLNEED` for the slice at hand, or the one after the next | 1.62 |
//!
//! So the kernel's own readahead is left alone.
//!
//! Mapped files are out in any case: one that is truncated meanwhile would kill the program.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use super::error::{Error, Result};
use super::layer::Layer;
use super::limiter::Limiter;
use super::observer::Observer;
use super::plan::{self, Operation, Origin};
use super::resolve::Piece;
use crate::qcow2::{ClusterReader, CompressedCluster, GuestOffset, HostOffset};
use crate::storage::{HOLE_MIN, LastHole, WritableStorage, offload_min, start_writeback, to_usize};

/// What all threads of a merge share.
#[derive(Clone, Copy)]
pub(super) struct Transfer<'a> {
    pub(super) layers: &'a [Layer],
    pub(super) limiter: Option<&'a Limiter>,
    pub(super) observer: &'a dyn Observer,
    pub(super) holes: Holes,
}

/// What is not written, since the output reads as zeroes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holes {
    /// Nothing: the output is no new file.
    None,
    /// What is a hole in the file of an image.
    Kept,
    /// Blocks of zeroes, too.
    Made,
}

impl Transfer<'_> {
    /// At most so many bytes move between two looks at the observer.
    const STEP: u64 = 4 << 20;
    /// The longest sleep between two looks at the observer.
    const NAP: Duration = Duration::from_millis(50);

    /// Before bytes move: waits for the limit, and gives up where the observer does.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(super) fn pace(&self, bytes: u64) -> Result<()> {
        let mut wait = self.limiter.map_or(Duration::ZERO, |limiter| limiter.reserve(bytes));
        loop {
            self.observer.go_on()?;
            if wait.is_zero() {
                return Ok(());
            }
            std::thread::sleep(wait.min(Self::NAP));
            wait = wait.saturating_sub(Self::NAP);
        }
    }

    /// The copies for the pieces of a slice.
    pub(super) fn operations(&self, pieces: Vec<Piece>, place: impl FnMut(u64) -> u64) -> Vec<Operation> {
        // all layers of a salvage are tolerant
        if self.layers.first().is_some_and(|layer| layer.tolerance().is_some()) {
            plan::operations_apart(pieces, place)
        } else {
            plan::operations(pieces, place)
        }
    }

    fn step(&self) -> u64 {
        self.limiter.map_or(Self::STEP, |limiter| limiter.step().min(Self::STEP))
    }
}

/// Reads guest bytes of any layer; one for each thread.
///
/// Pieces of a large compressed cluster may take turns with those of smaller ones in newer layers. Where they do, no
/// two have the same size, since the newer one would hide all of the older: so of each size, the last is kept.
#[derive(Debug, Default)]
pub(super) struct LayerReader {
    inflated: BTreeMap<u64, Inflated>,
}

/// The cluster of one size that was inflated last.
#[derive(Debug, Default)]
struct Inflated {
    reader: ClusterReader,
    /// Its layer and place.
    last: Option<(usize, CompressedCluster)>,
}

impl LayerReader {
    /// Fills `buffer` with the bytes of an operation from `done` on; with older ones where that is tolerated.
    pub(super) fn read(&mut self, layers: &[Layer], operation: &Operation, done: u64, buffer: &mut [u8]) -> Result<()> {
        if layers.get(operation.layer).is_some_and(|layer| layer.tolerance().is_some()) {
            return self.rescue(layers, &operation.part(done, buffer.len() as u64), buffer);
        }
        self.try_read(layers, operation, done, buffer)
    }

    /// Fills `buffer` with the bytes of an operation from `done` on.
    pub(super) fn try_read(
        &mut self,
        layers: &[Layer],
        operation: &Operation,
        done: u64,
        buffer: &mut [u8],
    ) -> Result<()> {
        let layer = layers.get(operation.layer).ok_or(Error::Changed)?;
        match operation.source {
            Origin::Plain(host) => read_plain(layer, HostOffset(host.0 + done), buffer),
            Origin::Compressed { cluster, data, skip } => {
                let bytes = self.cluster(operation.layer, layer, cluster, data)?;
                let start = to_usize(skip + done);
                buffer.copy_from_slice(bytes.get(start..start.saturating_add(buffer.len())).ok_or(Error::Changed)?);
                Ok(())
            }
        }
    }

    /// Several pieces of one cluster are inflated once.
    fn cluster(&mut self, number: usize, layer: &Layer, guest: GuestOffset, data: CompressedCluster) -> Result<&[u8]> {
        let image = layer.image().ok_or(Error::Changed)?;
        let inflated = self.inflated.entry(image.header().geometry.cluster_size()).or_default();
        if inflated.last != Some((number, data)) {
            inflated.last = None;
            let read = inflated.reader.read(image, guest, data);
            read.map_err(Error::image(layer.path()))?;
            inflated.last = Some((number, data));
        }
        Ok(inflated.reader.last())
    }
}

fn read_plain(layer: &Layer, host: HostOffset, buffer: &mut [u8]) -> Result<()> {
    match layer.image() {
        Some(image) => image.read_data(buffer, host).map_err(Error::image(layer.path())),
        None => layer.data().read_exact_at(buffer, host.0).map_err(|source| layer.read_error(host.0, source)),
    }
}

/// Copies to a file or a device at the places that operations name; one for each thread.
pub(super) struct Copier<'a> {
    work: &'a Transfer<'a>,
    output: &'a Path,
    target: &'a dyn WritableStorage,
    reader: LayerReader,
    /// Shorter copies are gathered; longer ones are left to the kernel, if any.
    offload_min: Option<u64>,
    /// The holes of images that were found last, by layer.
    holes: BTreeMap<usize, LastHole>,
    gathered: Vec<u8>,
    /// Where the gathered bytes go.
    start: u64,
}

impl<'a> Copier<'a> {
    /// Bytes gathered into one write: they are in the processor's cache still when they are written.
    const GATHER: usize = 256 << 10;

    pub(super) fn new(work: &'a Transfer<'a>, output: &'a Path, target: &'a dyn WritableStorage) -> Self {
        // what is left to the kernel is not looked at
        let offload_min = target.as_file().filter(|_| work.holes != Holes::Made).and_then(offload_min);
        let (reader, holes, gathered) = (LayerReader::default(), BTreeMap::new(), Vec::new());
        Self { work, output, target, reader, offload_min, holes, gathered, start: 0 }
    }

    /// Does the operations of a slice.
    pub(super) fn copy(&mut self, operations: &[Operation]) -> Result<()> {
        for operation in operations {
            let mut done = 0;
            while done < operation.length {
                let length = (operation.length - done).min(self.work.step());
                self.work.pace(length)?;
                self.copy_part(operation, done, length)?;
                self.work.observer.advance(length);
                done += length;
            }
        }
        self.flush()?;
        if let (Some(first), Some(last)) = (operations.first(), operations.last()) {
            let written = first.target..last.target + last.length;
            // in place, the last may lie before the first
            if !written.is_empty() {
                self.start_writeback(written);
            }
        }
        Ok(())
    }

    /// Has the kernel begin to write what lies there.
    pub(super) fn start_writeback(&self, written: Range<u64>) {
        if let Some(file) = self.target.as_file() {
            start_writeback(file, written);
        }
    }

    fn copy_part(&mut self, operation: &Operation, start: u64, length: u64) -> Result<()> {
        let mut done = self.hole(operation, start, length);
        if self.offload_min.is_some_and(|min| length - done >= min) {
            done += self.offload(operation, start + done, length - done)?;
        }
        while done < length {
            done += self.hole(operation, start + done, length - done);
            let part = to_usize(length - done).min(Self::GATHER);
            if part == 0 {
                break;
            }
            let target = operation.target + start + done;
            self.make_room(target, part)?;
            let before = self.gathered.len();
            self.gathered.resize(before + part, 0);
            let buffer = self.gathered.get_mut(before..).ok_or(Error::Changed)?;
            self.reader.read(self.work.layers, operation, start + done, buffer)?;
            done += part as u64;
        }
        Ok(())
    }

    /// How many bytes there are none of to copy: the image has a hole first, as files have that were made with all their
    /// metadata.
    fn hole(&mut self, operation: &Operation, start: u64, length: u64) -> u64 {
        let (Origin::Plain(host), Some(layer)) = (operation.source, self.work.layers.get(operation.layer)) else {
            return 0;
        };
        if self.work.holes == Holes::None {
            return 0;
        }
        let range = host.0 + start..host.0 + start + length;
        let data = self.holes.entry(operation.layer).or_default().next_data_within(layer.data(), range.clone());
        let hole = data.map_or(0, |data| data.unwrap_or(range.end) - range.start);
        // what is behind the end is none, and reading it says that
        if range.start + hole <= layer.data().length() { hole } else { 0 }
    }

    /// Copies what the kernel takes, which may be nothing: then the caller reads and writes.
    fn offload(&self, operation: &Operation, start: u64, length: u64) -> Result<u64> {
        let (Origin::Plain(host), Some(layer)) = (operation.source, self.work.layers.get(operation.layer)) else {
            return Ok(0);
        };
        let (Some(file), Some(target)) = (layer.file(), self.target.as_file()) else { return Ok(0) };
        let mut from = host.0 + start;
        // the last sector of a file may be short
        let end = (from + length).min(layer.data().length());
        let mut to = operation.target + start;
        let first = from;
        let written = to..to.saturating_add(end.saturating_sub(from));
        self.target.will_be_written(written).map_err(|source| self.write_error(source))?;
        while from < end {
            let rest = to_usize(end - from);
            match rustix::fs::copy_file_range(file, Some(&mut from), target, Some(&mut to), rest) {
                // some file systems say so before the end; where it is the end, a plain read says that
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => {
                    return Err(self.write_error(io::ErrorKind::StorageFull.into()));
                }
                // another file system, a device, an old kernel, an error that a plain read or write will name
                Err(_) => break,
            }
        }
        Ok(from - first)
    }

    /// Writes bytes of the output's own: tables.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.target.write_all_at(bytes, offset).map_err(|source| self.write_error(source))
    }

    /// Writes bytes together with what comes next, if that follows them.
    pub(super) fn gather(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.make_room(offset, bytes.len())?;
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    /// Makes the gathered bytes end at `target` with room for `length` more.
    fn make_room(&mut self, target: u64, length: usize) -> Result<()> {
        let end = self.start + self.gathered.len() as u64;
        if end != target || self.gathered.len() + length > Self::GATHER {
            self.flush()?;
            self.start = target;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if self.work.holes == Holes::Made {
            for part in not_zero(&self.gathered, self.start) {
                let offset = self.start + part.start as u64;
                self.write(self.gathered.get(part).unwrap_or_default(), offset)?;
            }
        } else if !self.gathered.is_empty() {
            self.write(&self.gathered, self.start)?;
        }
        self.gathered.clear();
        Ok(())
    }

    fn write_error(&self, source: io::Error) -> Error {
        Error::Write { path: self.output.to_owned(), source }
    }
}

/// The parts of bytes that go to this place in a file, but for its blocks of zeroes.
fn not_zero(bytes: &[u8], start: u64) -> Vec<Range<usize>> {
    static ZEROES: [u8; HOLE_MIN] = [0; HOLE_MIN];
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = HOLE_MIN - to_usize((start + at as u64) % HOLE_MIN as u64);
        let end = bytes.len().min(at + rest);
        if bytes.get(at..end) != ZEROES.get(..end - at) {
            match parts.last_mut().filter(|last| last.end == at) {
                Some(last) => last.end = end,
                None => parts.push(at..end),
            }
        }
        at = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::restore::{Layers, Source};

    proptest! {
        #[test]
        fn what_is_left_out_is_zero_and_whole_blocks_of_zeroes_are_left_out(
            start in 0u64..10_000,
            runs in prop::collection::vec((0usize..6000, 0u8..2), 0..12),
        ) {
            let bytes: Vec<u8> = runs.iter().flat_map(|(length, byte)| vec![*byte; *length]).collect();
            let mut written = vec![0; bytes.len()];
            let parts = not_zero(&bytes, start);
            for part in &parts {
                written[part.clone()].copy_from_slice(&bytes[part.clone()]);
            }
            prop_assert_eq!(&written, &bytes);
            for at in (0..bytes.len()).filter(|at| (start + *at as u64) % 4096 == 0) {
                if bytes.get(at..at + 4096).is_some_and(|block| block.iter().all(|byte| *byte == 0)) {
                    prop_assert!(!parts.iter().any(|part| part.contains(&at)));
                }
            }
        }
    }

    /// A read of what no image has would leave zeroes in the output.
    #[test]
    fn what_a_layer_does_not_have_is_an_error_and_not_zeroes() {
        let full = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/FULL-1793588400-disk.qcow2");
        let layers = Layers::open(&[Source::new(full.into())]).unwrap();
        let read = |layer, source| {
            let operation = Operation { layer, source, target: 0, length: 512, guest: 0 };
            LayerReader::default().try_read(layers.as_slice(), &operation, 0, &mut [0; 512])
        };
        read(0, Origin::Plain(HostOffset(0))).unwrap();
        assert!(matches!(read(1, Origin::Plain(HostOffset(0))), Err(Error::Changed)));
        let data = compressed(&layers);
        let compressed = |skip| read(0, Origin::Compressed { cluster: data.0, data: data.1, skip });
        let size = layers.cluster_size();
        compressed(size - 512).unwrap();
        for skip in [size - 511, size, u64::MAX - 1] {
            assert!(matches!(compressed(skip), Err(Error::Changed)), "{skip}");
        }
    }

    /// Any compressed cluster of a chain.
    fn compressed(layers: &Layers) -> (GuestOffset, CompressedCluster) {
        let mut buffer = crate::qcow2::MapBuffer::default();
        let pieces = crate::restore::resolve::resolve(layers.as_slice(), 0..layers.size(), &mut buffer).unwrap();
        let found = pieces.iter().find_map(|piece| match Origin::of(piece) {
            Origin::Compressed { cluster, data, .. } => Some((cluster, data)),
            Origin::Plain(_) => None,
        });
        found.unwrap()
    }
}
