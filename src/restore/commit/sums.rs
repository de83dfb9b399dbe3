//! Images that are about to be read for the last time, compared with their checksums.

use std::ops::Range;

use crate::chain::{BLOCK, Checksums, block_sums};
use crate::restore::check::check_streams;
use crate::restore::error::{Error, Result};
use crate::restore::layer::Layer;
use crate::restore::observer::{Observer, Phase};
use crate::storage::to_usize;

/// Blocks between two looks at the observer.
const BATCH: u64 = 1 << 10;

/// Compares images with their checksums. The compressed clusters of those that have none are inflated.
///
/// # Errors
/// [`Error::Checksum`] of the first block that is another, [`Error::Length`], why checksums cannot be used, or what cannot
/// be inflated.
pub(super) fn verify(layers: &[Layer], observer: &dyn Observer) -> Result<()> {
    let (mut known, mut unsummed) = (Vec::new(), Vec::new());
    for layer in layers {
        match Checksums::open(layer.path())? {
            Some(sums) => known.push((layer, sums)),
            None => unsummed.push(layer),
        }
    }
    if !known.is_empty() {
        compare_all(known, observer)?;
    }
    unsummed.into_iter().try_for_each(|layer| check_streams(layer, observer))
}

fn compare_all(known: Vec<(&Layer, Checksums)>, observer: &dyn Observer) -> Result<()> {
    observer.phase(Phase::Checking { bytes: known.iter().map(|(layer, _)| layer.data().length()).sum() });
    for (layer, sums) in known {
        let (length, expected) = (layer.data().length(), sums.length());
        if length != expected {
            return Err(Error::Length { path: layer.path().to_owned(), length, expected });
        }
        for start in (0..sums.blocks()).step_by(to_usize(BATCH)) {
            if observer.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let blocks = start..(start + BATCH).min(sums.blocks());
            compare(layer, &sums, blocks.clone())?;
            observer.advance((blocks.end * BLOCK).min(length) - blocks.start * BLOCK);
        }
    }
    Ok(())
}

fn compare(layer: &Layer, sums: &Checksums, blocks: Range<u64>) -> Result<()> {
    let unsettled = sums.unsettled();
    let found = block_sums(layer.data(), blocks.clone());
    let found = found.map_err(|source| layer.read_error(blocks.start * BLOCK, source))?;
    for ((block, found), expected) in blocks.clone().zip(found).zip(sums.read(blocks)?) {
        if found != expected && !unsettled.contains(&block) {
            return Err(Error::Checksum { path: layer.path().to_owned(), offset: block * BLOCK, guest: None });
        }
    }
    Ok(())
}
