//! Whose content an image holds that is not its own: two images that were swapped, or one that was copied over another.
//!
//! All images are asked about together: the checksums of each are opened once, however many images hold something else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::flaw::Flaw;
use super::look::Subject;
use super::read::Found;
use crate::chain::{BLOCK, Chain, Checksums, Disk, Image, ZERO_BLOCK_SUM, block_sums};
use crate::restore::error::Result;
use crate::restore::observer::Observer;
use crate::restore::pool;
use crate::restore::source;
use crate::storage::{Storage, to_usize};

/// Blocks that are looked at, beside the bad ones, for such that are not zeroes.
const SEARCHED: u64 = 256;

/// Blocks of each kind that must fit.
const COMPARED: usize = 64;

/// Blocks whose checksums are compared at once.
const BATCH: u64 = 1 << 14;

/// What an image holds.
struct Content {
    length: u64,
    /// Blocks that tell it from others, and their checksums; those that are bad last.
    blocks: Vec<(u64, u32)>,
}

/// For each image the other image of the same disk whose checksums fit its content, if it is damaged and there is one.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn others<'a>(
    subjects: &[Subject<'a>],
    found: &[Found],
    observer: &dyn Observer,
) -> Result<Vec<Option<Arc<Image>>>> {
    let contents: Vec<Option<Content>> = pool::map(
        subjects.iter().zip(found),
        || (),
        |(), (subject, found)| observer.go_on().map(|()| content(subject, found)),
    )?;
    let mut disks: BTreeMap<&str, (&'a Disk, Contents<'_>)> = BTreeMap::new();
    for (number, (subject, content)) in subjects.iter().zip(&contents).enumerate() {
        let Some(content) = content else { continue };
        disks.entry(subject.disk.label()).or_insert_with(|| (subject.disk, Contents::default())).1.add(number, content);
    }
    let mut others = vec![None; subjects.len()];
    for (disk, wanted) in disks.into_values() {
        // those that are missing have checksums, too
        for image in disk.chains().iter().flat_map(Chain::images) {
            observer.go_on()?;
            let Ok(Some(sums)) = Checksums::open(&image.path) else { continue };
            for number in wanted.fitting(&sums) {
                let is_own = subjects.get(number).is_some_and(|subject| subject.image.path == image.path);
                let Some(other) = others.get_mut(number).filter(|other| other.is_none() && !is_own) else { continue };
                let parts = subjects.get(number).zip(found.get(number));
                if parts.is_some_and(|(subject, found)| !contradicts(subject, found, &sums)) {
                    *other = Some(Arc::clone(image));
                }
            }
        }
    }
    Ok(others)
}

/// The contents that are looked for, by length.
#[derive(Default)]
struct Contents<'c>(BTreeMap<u64, ByBlock<'c>>);

/// Contents and the numbers of their images, by one of their blocks and its checksum.
type ByBlock<'c> = BTreeMap<(u64, u32), Vec<(usize, &'c Content)>>;

impl<'c> Contents<'c> {
    fn add(&mut self, number: usize, content: &'c Content) {
        // hardly another image has what a bad block holds now
        if let Some(last) = content.blocks.last() {
            self.0.entry(content.length).or_default().entry(*last).or_default().push((number, content));
        }
    }

    /// The images that hold what these checksums are of.
    fn fitting(&self, sums: &Checksums) -> Vec<usize> {
        let Some(wanted) = self.0.get(&sums.length()) else { return Vec::new() };
        let sum = |block: u64| sums.read(block..block + 1).ok()?.first().copied();
        let blocks: BTreeSet<u64> = wanted.keys().map(|(block, _)| *block).collect();
        let known = blocks.into_iter().filter_map(|block| wanted.get(&(block, sum(block)?))).flatten();
        let fits = |(_, content): &&(usize, &Content)| {
            content.blocks.iter().all(|(block, wanted)| sum(*block).is_some_and(|sum| sum == *wanted))
        };
        known.filter(fits).map(|(number, _)| *number).collect()
    }
}

/// Whether blocks of an image fit its own checksums and not those of another, so that it does not hold the other's content.
/// Where not all was compared, nobody knows which fit.
fn contradicts(subject: &Subject<'_>, found: &Found, other: &Checksums) -> bool {
    let Ok(Some(own)) = Checksums::open(&subject.image.path) else { return false };
    if own.length() != other.length() || found.compared < own.length() {
        return false;
    }
    let mut bad = found.bad.iter().flat_map(|bad| bad.blocks.clone()).peekable();
    let mut contradictions = 0;
    for start in (0..own.blocks()).step_by(to_usize(BATCH)) {
        let blocks = start..(start + BATCH).min(own.blocks());
        let Ok((own, other)) = own.read(blocks.clone()).and_then(|own| Ok((own, other.read(blocks.clone())?))) else {
            return false;
        };
        for (block, (own, other)) in blocks.zip(own.iter().zip(&other)) {
            while bad.next_if(|bad| *bad < block).is_some() {}
            contradictions += u64::from(own != other && bad.peek() != Some(&block));
        }
        // of those that are bad not all may be listed
        if contradictions > found.more {
            return true;
        }
    }
    false
}

/// What a damaged image holds; `None` where it is nothing but zeroes, or cannot be read.
fn content(subject: &Subject<'_>, found: &Found) -> Option<Content> {
    let is_damaged = !found.bad.is_empty() || found.flaws.iter().any(|flaw| matches!(flaw, Flaw::Length { .. }));
    let storage = is_damaged.then(|| source::open_locked(&subject.source()).ok()).flatten()?;
    let length = storage.length();
    let sums = block_sums(&storage, 0..length.div_ceil(BLOCK).min(SEARCHED)).ok()?;
    let telling = |(_, sum): &(u64, u32)| *sum != *ZERO_BLOCK_SUM;
    let mut blocks: Vec<(u64, u32)> = (0..).zip(sums).filter(telling).take(COMPARED).collect();
    for block in found.bad.iter().flat_map(|bad| bad.blocks.clone()).take(COMPARED) {
        let sum = block_sums(&storage, block..block + 1).ok()?.first().copied()?;
        blocks.push((block, sum));
    }
    blocks.iter().any(telling).then_some(Content { length, blocks })
}
