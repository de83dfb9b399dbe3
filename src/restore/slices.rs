//! The disk in slices: the unit of parallel work, small enough to balance and to hold in memory.

use std::ops::Range;

use crate::storage::{joined, to_usize};

/// Slices are at least this long: several clusters of the largest size.
const SMALLEST: u64 = 8 << 20;
/// And at most this: the tables of a slice stay small.
const LARGEST: u64 = 128 << 20;
/// Between these, so many for a disk.
const USUAL_NUMBER: u64 = 1 << 14;

/// A disk cut into slices, of which only some hold anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slices {
    size: u64,
    length: u64,
    /// Numbers of slices, in order and apart.
    numbers: Vec<Range<u64>>,
}

impl Slices {
    /// The slices that touch one of the occupied ranges.
    pub(super) fn new(size: u64, occupied: impl IntoIterator<Item = Range<u64>>) -> Self {
        let length = (size / USUAL_NUMBER).clamp(SMALLEST, LARGEST).next_power_of_two();
        let numbers = occupied
            .into_iter()
            .map(|range| range.start..range.end.min(size))
            .filter(|range| !range.is_empty())
            .map(|range| range.start / length..range.end.div_ceil(length));
        let numbers = joined(numbers.collect());
        Self { size, length, numbers }
    }

    /// All slices of a disk.
    pub(super) fn all(size: u64) -> Self {
        Self::new(size, std::iter::once(0..size))
    }

    /// The bytes of a slice.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The guest ranges of the slices, in order.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let (size, length) = (self.size, self.length);
        let range = move |number: u64| number * length..((number + 1) * length).min(size);
        self.numbers.clone().into_iter().flatten().map(range)
    }
}

/// A range in parts of at most `unit` bytes.
pub(super) fn parts(range: Range<u64>, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = (range.start..range.end).step_by(to_usize(unit));
    starts.map(move |start| start..(start + unit).min(range.end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slices_cover_what_is_occupied_once_and_in_order(
            size in 0u64..1 << 46, ranges in prop::collection::vec((0u64..1 << 46, 0u64..1 << 30), 0..10),
        ) {
            let occupied: Vec<_> = ranges.iter().map(|(start, length)| *start..start + length).collect();
            let all: Vec<_> = Slices::new(size, occupied.clone()).ranges().collect();
            for pair in all.windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
            }
            for range in &occupied {
                for place in [range.start, u64::midpoint(range.start, range.end), range.end.saturating_sub(1)] {
                    if range.contains(&place) && place < size {
                        prop_assert!(all.iter().any(|slice| slice.contains(&place)));
                    }
                }
            }
        }
    }
}
