//! Whose content an image holds that is not its own: two images that were swapped, or one that was copied over another.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::look::Subject;
use super::read::Bad;
use crate::chain::{Checksums, Disk, Image, ZERO_BLOCK_SUM, block_sums};
use crate::storage::Storage;

/// Blocks that are looked at, beside the bad ones, for such that are not zeroes.
const SEARCHED: u64 = 256;

/// Blocks of each kind that must fit.
const COMPARED: usize = 64;

/// The images of disks by the lengths that their checksums tell; they are opened only when they are asked for.
#[derive(Default)]
pub(super) struct Identities<'a> {
    disks: Mutex<BTreeMap<&'a str, Arc<ByLength<'a>>>>,
}

type ByLength<'a> = BTreeMap<u64, Vec<&'a Arc<Image>>>;

impl<'a> Identities<'a> {
    /// The other image of the same disk whose checksums fit the content of this one.
    pub(super) fn of(&self, subject: &Subject<'a>, storage: &dyn Storage, bad: &[Bad]) -> Option<Arc<Image>> {
        let disk = self.disk(subject.disk);
        let others = disk.get(&storage.length())?;
        let content = content(storage, bad)?;
        let is_own = |path: &Path| path == subject.image.path;
        let found = others.iter().find(|image| !is_own(&image.path) && fits(&image.path, &content));
        found.map(|image| Arc::clone(image))
    }

    fn disk(&self, disk: &'a Disk) -> Arc<ByLength<'a>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || {
            let mut lengths = ByLength::new();
            // those that are missing have checksums, too
            let chains = disk.chains().iter();
            for image in chains.flat_map(|chain| chain.full().into_iter().chain(chain.incs())) {
                if let Ok(Some(sums)) = Checksums::open(&image.path) {
                    lengths.entry(sums.length()).or_default().push(image);
                }
            }
            Arc::new(lengths)
        };
        Arc::clone(disks.entry(disk.label()).or_insert_with(read))
    }
}

/// Blocks that tell an image from others, and their checksums; `None` where it holds nothing but zeroes.
fn content(storage: &dyn Storage, bad: &[Bad]) -> Option<Vec<(u64, u32)>> {
    let blocks = storage.length().div_ceil(crate::chain::BLOCK);
    let sums = block_sums(storage, 0..blocks.min(SEARCHED)).ok()?;
    let telling = |(_, sum): &(u64, u32)| *sum != *ZERO_BLOCK_SUM;
    let mut content: Vec<(u64, u32)> = (0..).zip(sums).filter(telling).take(COMPARED).collect();
    for block in bad.iter().flat_map(|bad| bad.blocks.clone()).take(COMPARED) {
        let sum = block_sums(storage, block..block + 1).ok()?.first().copied()?;
        content.push((block, sum));
    }
    content.iter().any(telling).then_some(content)
}

/// Whether checksums are of this content.
fn fits(image: &Path, content: &[(u64, u32)]) -> bool {
    let Ok(Some(sums)) = Checksums::open(image) else { return false };
    let fits = |(block, sum): &(u64, u32)| {
        sums.read(*block..*block + 1).is_ok_and(|known| known.first().is_some_and(|known| known == sum))
    };
    content.iter().all(fits)
}
