//! Guest ranges with a word to each, that grow together, and of which only so many are kept.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that do not overlap, in order.
///
/// Of too many, neighbours become one together with what is between them: so whatever was put in is in one of them.
#[derive(Debug)]
pub(super) struct Ranges<T> {
    most: usize,
    ranges: BTreeMap<u64, (u64, T)>,
}

impl<T: Clone> Ranges<T> {
    /// For at most so many.
    pub(super) fn new(most: usize) -> Self {
        Self { most: most.max(1), ranges: BTreeMap::new() }
    }

    /// Puts a range in. Where it touches others, it becomes one with them; the word is that of the first.
    pub(super) fn insert(&mut self, range: Range<u64>, word: T) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end, mut word) = (range.start, range.end, word);
        while let Some((first, (last, known))) = self.ranges.range(..=end).next_back() {
            if *last < start {
                break;
            }
            let first = *first;
            (start, end) = (start.min(first), end.max(*last));
            word = known.clone();
            self.ranges.remove(&first);
        }
        if self.ranges.len() == self.most {
            let before = self.ranges.range(..start).next_back();
            let neighbour = before.or_else(|| self.ranges.range(end..).next());
            if let Some((first, (last, known))) =
                neighbour.map(|(first, (last, known))| (*first, (*last, known.clone())))
            {
                (start, end, word) = (start.min(first), end.max(last), known);
                self.ranges.remove(&first);
            }
        }
        self.ranges.insert(start, (end, word));
    }

    /// The parts of a range that are in it, in order.
    pub(super) fn within(&self, range: &Range<u64>) -> Vec<(Range<u64>, T)> {
        let before = self.ranges.range(..range.start).next_back();
        let touching = before.into_iter().chain(self.ranges.range(range.start..range.end));
        let parts =
            touching.map(|(start, (end, word))| ((*start).max(range.start)..(*end).min(range.end), word.clone()));
        parts.filter(|(part, _)| !part.is_empty()).collect()
    }
}

/// What of a range is in none of the others, which are in order and do not overlap.
pub(super) fn without(range: Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = others.partition_point(|other| other.end <= range.start);
    let mut rest = Vec::new();
    let mut start = range.start;
    for other in others.iter().skip(first).take_while(|other| other.start < range.end) {
        if start < other.start {
            rest.push(start..other.start);
        }
        start = start.max(other.end);
    }
    if start < range.end {
        rest.push(start..range.end);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn bytes<'a>(ranges: impl IntoIterator<Item = &'a Range<u64>>) -> BTreeSet<u64> {
        ranges.into_iter().cloned().flatten().collect()
    }

    proptest! {
        #[test]
        fn what_was_put_in_is_there_and_nothing_else_while_there_is_room(
            put in prop::collection::vec((0u64..200, 0u64..30), 0..30), most in 1usize..40, asked in 0u64..200,
        ) {
            let mut ranges = Ranges::new(most);
            let put: Vec<_> = put.into_iter().map(|(start, length)| start..start + length).collect();
            for range in &put {
                ranges.insert(range.clone(), ());
            }
            let all = bytes(&put);
            let kept: Vec<_> = ranges.within(&(0..1000)).into_iter().map(|(range, ())| range).collect();
            prop_assert!(kept.len() <= most);
            prop_assert!(kept.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert!(bytes(&kept).is_superset(&all));
            if most > 30 {
                prop_assert_eq!(bytes(&kept), all.clone());
            }
            let range = asked..asked + 20;
            let within: Vec<_> = ranges.within(&range).into_iter().map(|(range, ())| range).collect();
            let expected: BTreeSet<u64> = range.clone().filter(|byte| bytes(&kept).contains(byte)).collect();
            prop_assert_eq!(bytes(&within), expected.clone());
            let rest: BTreeSet<u64> = range.clone().filter(|byte| !expected.contains(byte)).collect();
            prop_assert_eq!(bytes(&without(range, &within)), rest);
        }
    }
}
