//! A set of blocks, a bit for each, that many threads fill.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use super::to_usize;

/// Numbers of blocks; it takes a bit for each up to the largest.
#[derive(Debug, Default)]
pub(crate) struct BlockSet {
    words: RwLock<Vec<AtomicU64>>,
}

impl BlockSet {
    /// Whether a block is in it.
    #[must_use]
    pub(crate) fn contains(&self, block: u64) -> bool {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        words.get(to_usize(block / 64)).is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (block % 64)) != 0)
    }

    /// Puts blocks in.
    pub(crate) fn insert(&self, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        let needed = to_usize(blocks.end.div_ceil(64));
        let mut words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        if words.len() < needed {
            drop(words);
            let mut grown = self.words.write().unwrap_or_else(PoisonError::into_inner);
            let length = grown.len().max(needed);
            grown.resize_with(length, AtomicU64::default);
            drop(grown);
            words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        }
        for block in blocks {
            if let Some(word) = words.get(to_usize(block / 64)) {
                word.fetch_or(1 << (block % 64), Ordering::Relaxed);
            }
        }
    }

    /// Takes a block out.
    pub(crate) fn remove(&self, block: u64) {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(word) = words.get(to_usize(block / 64)) {
            word.fetch_and(!(1 << (block % 64)), Ordering::Relaxed);
        }
    }

    /// How many there are.
    #[must_use]
    pub(crate) fn count(&self) -> u64 {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_what_was_put_in_and_not_taken_out(
            steps in prop::collection::vec((any::<bool>(), 0u64..500, 0u64..70), 0..40),
        ) {
            let (blocks, mut model) = (BlockSet::default(), BTreeSet::new());
            for (puts, first, count) in steps {
                if puts {
                    blocks.insert(first..first + count);
                    model.extend(first..first + count);
                } else {
                    blocks.remove(first);
                    model.remove(&first);
                }
                prop_assert_eq!(blocks.count(), model.len() as u64);
                prop_assert!((0..600).all(|block| blocks.contains(block) == model.contains(&block)));
            }
        }
    }
}
