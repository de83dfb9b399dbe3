//! What of the guest was changed since the image was opened, in memory that is bounded.

use std::ops::Range;

use crate::storage::to_usize;

/// Bits that are kept at most; a larger disk is kept in larger units.
const MOST: u64 = 32 << 20;

/// Guest ranges that were changed, in units of a power of two.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    unit_bits: u32,
    words: Vec<u64>,
}

impl Dirty {
    /// Nothing, in units of this many bits.
    pub(super) fn new(unit_bits: u32) -> Self {
        Self { unit_bits, words: Vec::new() }
    }

    /// Notes all units that a guest range touches.
    pub(super) fn mark(&mut self, guest: Range<u64>) {
        if guest.is_empty() {
            return;
        }
        while (guest.end - 1) >> self.unit_bits >= MOST {
            self.coarsen();
        }
        let (first, last) = (guest.start >> self.unit_bits, (guest.end - 1) >> self.unit_bits);
        let words = to_usize(last / 64 + 1);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        for (index, word) in (0..).zip(&mut self.words).take(words).skip(to_usize(first / 64)) {
            let from = first.max(index * 64) - index * 64;
            let to = last.min(index * 64 + 63) - index * 64;
            *word |= u64::MAX << from & u64::MAX >> (63 - to);
        }
    }

    /// The guest ranges that were noted, in order.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, 0)?;
            at = self.next(start, u64::MAX).unwrap_or(self.words.len() as u64 * 64);
            Some(start << self.unit_bits..at << self.unit_bits)
        })
    }

    /// The first unit at or after one that is set, or not set where the words are flipped.
    fn next(&self, from: u64, flip: u64) -> Option<u64> {
        let words = (0_u64..).zip(&self.words).skip(to_usize(from / 64));
        let mut found = words.map(|(index, word)| (index, (word ^ flip) & u64::MAX << from.saturating_sub(index * 64)));
        found.find(|(_, word)| *word != 0).map(|(index, word)| index * 64 + u64::from(word.trailing_zeros()))
    }

    /// Makes units twice as large.
    fn coarsen(&mut self) {
        let half = |word: &u64| (0..32).fold(0, |bits, at| bits | u64::from(word >> (2 * at) & 3 != 0) << at);
        let joined = |pair: &[u64]| pair.iter().rev().fold(0, |bits, word| bits << 32 | half(word));
        self.words = self.words.chunks(2).map(joined).collect();
        self.unit_bits += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_what_was_marked_rounded_to_units() {
        let mut dirty = Dirty::new(9);
        assert_eq!(dirty.ranges().next(), None);
        dirty.mark(5..5);
        dirty.mark(1000..1030);
        dirty.mark(512 * 60..512 * 200);
        dirty.mark(512 * 200..512 * 200 + 1);
        dirty.mark(512 * 255..512 * 256);
        let ranges: Vec<_> = dirty.ranges().collect();
        assert_eq!(ranges, [512..1536, 512 * 60..512 * 201, 512 * 255..512 * 256]);
    }

    #[test]
    fn a_mark_far_behind_makes_units_larger_and_loses_nothing() {
        let mut dirty = Dirty::new(9);
        dirty.mark(512..1024);
        dirty.mark(512 * 191..512 * 193);
        dirty.mark((1 << 40) - 1..1 << 40);
        let unit = (1 << 40) / MOST;
        let ranges: Vec<_> = dirty.ranges().collect();
        assert_eq!(
            ranges,
            [0..unit, 512 * 191 / unit * unit..512 * 193_u64.next_multiple_of(64), (1 << 40) - unit..1 << 40]
        );
        dirty.mark(u64::MAX - 1..u64::MAX);
        assert!(dirty.words.len() as u64 <= MOST / 64);
        assert_eq!(dirty.ranges().next().map(|range| range.start), Some(0));
    }
}
