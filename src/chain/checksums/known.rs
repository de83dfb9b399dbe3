//! Sums that were computed while other parts of the image were still written.

use std::ops::Range;

use super::BLOCK;
use super::compute::{READ, SumError, sums};
use crate::storage::{BlockSet, Storage, to_usize};

/// Blocks whose sums are kept at most: 64 MiB of them, for 1 TiB of the image.
const MOST: u64 = 1 << 24;

/// The sums of some blocks from the start of an image on.
#[derive(Debug, Default)]
pub(crate) struct KnownSums {
    sums: Vec<u32>,
    /// What was read last: it is taken again.
    buffer: Vec<u8>,
    /// Those of them that cannot be relied on.
    forgotten: BlockSet,
}

#[cfg_attr(not(any(feature = "capture", test)), expect(dead_code, reason = "only a backup knows sums before"))]
impl KnownSums {
    /// Sums the next few blocks, of those that end at most `settled` bytes into the image, which nobody writes to. Whether
    /// there may be more of them comes back.
    ///
    /// # Errors
    /// [`SumError::Image`].
    pub(crate) fn extend(&mut self, image: &impl Storage, settled: u64) -> Result<bool, SumError> {
        let start = self.sums.len() as u64;
        let end = (settled.min(image.length()) / BLOCK).min(start + READ).min(MOST);
        if end <= start {
            return Ok(false);
        }
        self.sums.extend(sums(image, start..end, &mut self.buffer)?);
        Ok(true)
    }

    /// Forgets the sums of all blocks that have a byte of these ranges of the image.
    pub(crate) fn forget(&mut self, ranges: &[Range<u64>]) {
        let known = self.sums.len() as u64;
        for range in ranges {
            self.forgotten.insert(range.start / BLOCK..range.end.div_ceil(BLOCK).min(known));
        }
    }

    pub(super) fn get(&self, block: u64) -> Option<u32> {
        let sum = self.sums.get(to_usize(block));
        sum.filter(|_| !self.forgotten.contains(block)).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use proptest::prelude::*;

    use super::super::compute::watched_sums;
    use super::*;
    use crate::storage::MemoryStorage;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_known_is_not_read_again_and_what_was_forgotten_is(
            settled in 0..40 * BLOCK,
            lengths in prop::array::uniform2(1..40 * BLOCK),
            ranges in prop::collection::vec((0..40 * BLOCK, 1..3 * BLOCK), 0..6),
            asked in (0u64..30, 1u64..30),
        ) {
            let image = |byte, length| MemoryStorage::new(vec![byte; to_usize(length)]);
            let [early, late] = [image(1, lengths[0]), image(2, lengths[1])];
            let mut known = KnownSums::default();
            while known.extend(&early, settled).unwrap() {}
            let ranges: Vec<_> = ranges.into_iter().map(|(start, length)| start..start + length).collect();
            known.forget(&ranges);
            let last = lengths[1].div_ceil(BLOCK);
            let asked = asked.0.min(last)..(asked.0 + asked.1).min(last);
            let sums = watched_sums(&late, asked.clone(), &known, &|_| ControlFlow::Continue(())).unwrap();
            let expected = asked.map(|block| {
                let bytes = block * BLOCK..((block + 1) * BLOCK).min(lengths[1]);
                let whole = bytes.end - bytes.start == BLOCK && bytes.end <= settled.min(lengths[0]);
                let forgotten = ranges.iter().any(|range| range.start < bytes.end && bytes.start < range.end);
                let byte = if whole && !forgotten { 1 } else { 2 };
                crc32fast::hash(&vec![byte; to_usize(bytes.end - bytes.start)])
            });
            prop_assert_eq!(sums, expected.collect::<Vec<_>>());
        }
    }
}
