//! A bit for each of many blocks, set by many threads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::storage::to_usize;

pub(super) struct Bits(Vec<AtomicU64>);

impl Bits {
    pub(super) fn new(blocks: u64) -> Self {
        Self(std::iter::repeat_with(AtomicU64::default).take(to_usize(blocks.div_ceil(64))).collect())
    }

    pub(super) fn get(&self, block: u64) -> bool {
        self.0.get(to_usize(block / 64)).is_some_and(|word| word.load(Ordering::Relaxed) >> (block % 64) & 1 == 1)
    }

    /// Sets a bit; whether it was set before.
    pub(super) fn set(&self, block: u64) -> bool {
        let word = self.0.get(to_usize(block / 64));
        word.is_some_and(|word| word.fetch_or(1 << (block % 64), Ordering::Relaxed) >> (block % 64) & 1 == 1)
    }

    /// The blocks of a range that are set.
    pub(super) fn within(&self, blocks: Range<u64>) -> Vec<u64> {
        let words = to_usize(blocks.start / 64)..self.0.len().min(to_usize(blocks.end.div_ceil(64)));
        let words = self.0.get(words.start.min(words.end)..words.end).unwrap_or_default().iter();
        let numbered = (blocks.start / 64 * 64..).step_by(64).zip(words);
        let set =
            numbered.filter(|(_, word)| word.load(Ordering::Relaxed) != 0).flat_map(|(first, _)| first..first + 64);
        set.filter(|block| blocks.contains(block) && self.get(*block)).collect()
    }
}
