//! Images that are about to be read for the last time, compared with their checksums.

use std::ops::Range;

use crate::chain::{BLOCK, Checksums, ChecksumsError, block_sums};
use crate::restore::check::check_streams;
use crate::restore::error::{Error, Result};
use crate::restore::layer::Layer;
use crate::restore::observer::{Observer, Phase};
use crate::restore::pool;
use crate::storage::to_usize;

/// Blocks between two looks at the observer.
const BATCH: u64 = 1 << 10;

/// Compares images with their checksums. Those that have none are read, and their compressed clusters inflated.
///
/// # Errors
/// [`Error::Checksum`] of the first block that is another, [`Error::Length`], why checksums cannot be used, or what cannot
/// be inflated.
pub(super) fn verify(layers: &[Layer], observer: &dyn Observer) -> Result<()> {
    let (mut known, mut unsummed) = (Vec::new(), Vec::new());
    for layer in layers {
        let sums = Checksums::open(layer.path())?;
        // of blocks that work left unsettled, nothing is known
        if sums.as_ref().is_none_or(|sums| !sums.unsettled().is_empty()) {
            unsummed.push(layer);
        }
        known.extend(sums.map(|sums| (layer, sums)));
    }
    if !known.is_empty() {
        compare_all(known, observer)?;
    }
    unsummed.into_iter().try_for_each(|layer| {
        check_streams(layer, observer)?;
        read_all(layer, observer)
    })
}

/// Whether an image is what it was when its checksums were made; where there are none that can be used, nobody knows.
///
/// # Errors
/// What the system says, or [`Error::Cancelled`].
pub(super) fn fits(layer: &Layer, observer: &dyn Observer) -> Result<bool> {
    let compared = Checksums::open(layer.path()).map_err(Error::from).and_then(|sums| {
        let known = sums.map(|sums| (layer, sums));
        known.map_or(Ok(()), |known| compare_all(vec![known], observer))
    });
    match compared {
        Err(Error::Checksum { .. } | Error::Length { .. }) => Ok(false),
        Err(Error::Checksums(error)) if !matches!(error, ChecksumsError::Io { .. }) => Ok(true),
        compared => compared.map(|()| true),
    }
}

/// Reads all data of an image's file.
fn read_all(layer: &Layer, observer: &dyn Observer) -> Result<()> {
    const BYTES: u64 = 1 << 20;
    let file = layer.data();
    let mut next = 0;
    let parts = std::iter::from_fn(|| {
        let data = file.next_data(next).map_err(|source| layer.read_error(next, source)).transpose()?;
        Some(data.map(|data| {
            next = data.end.min(data.start + BYTES);
            data.start..next
        }))
    });
    pool::for_each(parts, Vec::new, |buffer, part| {
        observer.go_on()?;
        let part = part?;
        buffer.resize(to_usize(part.end - part.start), 0);
        file.read_exact_at(buffer, part.start).map_err(|source| layer.read_error(part.start, source))
    })
}

fn compare_all(known: Vec<(&Layer, Checksums)>, observer: &dyn Observer) -> Result<()> {
    observer.phase(Phase::Checking { bytes: known.iter().map(|(layer, _)| layer.data().length()).sum() });
    for (layer, sums) in known {
        let (length, expected) = (layer.data().length(), sums.length());
        if length != expected {
            return Err(Error::Length { path: layer.path().to_owned(), length, expected });
        }
        for start in (0..sums.blocks()).step_by(to_usize(BATCH)) {
            observer.go_on()?;
            let blocks = start..(start + BATCH).min(sums.blocks());
            compare(layer, &sums, blocks.clone())?;
            observer.advance((blocks.end * BLOCK).min(length) - blocks.start * BLOCK);
        }
    }
    Ok(())
}

fn compare(layer: &Layer, sums: &Checksums, blocks: Range<u64>) -> Result<()> {
    let unsettled = sums.unsettled();
    let found = block_sums(layer.data(), blocks.clone()).map_err(|error| Error::sums(layer.path(), error))?;
    for ((block, found), expected) in blocks.clone().zip(found).zip(sums.read(blocks)?) {
        if found != expected && !unsettled.contains(&block) {
            return Err(Error::Checksum { path: layer.path().to_owned(), offset: block * BLOCK, guest: None });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::qcow2::{Content, Extent, MapBuffer};
    use crate::restore::Silent;
    use crate::restore::layer::Format;
    use crate::restore::resolve::Mapped;
    use crate::storage::{MemoryStorage, Storage};

    /// A file with a bad sector.
    struct Bad(MemoryStorage, u64);

    impl Storage for Bad {
        fn length(&self) -> u64 {
            self.0.length()
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            if (offset..offset + buffer.len() as u64).contains(&self.1) {
                return Err(io::Error::other("bad sector"));
            }
            self.0.read_exact_at(buffer, offset)
        }
    }

    #[test]
    fn plain_data_that_cannot_be_read_is_found_without_checksums_too() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/chain/disk0/INC-1793761200-disk.qcow2");
        let bytes = std::fs::read(&path).unwrap();
        let layer = |bad| {
            let storage = Arc::new(Bad(MemoryStorage::new(bytes.clone()), bad));
            Layer::new("inc".into(), storage, Format::Qcow2).unwrap()
        };
        let sound = layer(u64::MAX);
        let mut data = None;
        let mut find = |extent: Extent| {
            if let Content::Data(host) = extent.content {
                data = Some(host.0);
            }
        };
        sound.map(0..sound.size(), &mut MapBuffer::default(), &mut find).unwrap();
        verify(&[sound], &Silent).unwrap();
        let error = verify(&[layer(data.unwrap() + 5)], &Silent).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error:?}");
    }
}
