//! Lists of ranges of bytes.

use std::ops::Range;

/// Puts a range behind others, which come in order; where it begins where the last one ends, it becomes one with that.
pub(crate) fn push_joined(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

/// Ranges in any order as ranges in order that do not touch.
pub(crate) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
    ranges
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_joined_covers_the_same_and_does_not_touch(put in prop::collection::vec((0u64..200, 1u64..30), 0..30)) {
            let put: Vec<_> = put.into_iter().map(|(start, length)| start..start + length).collect();
            let joined = joined(put.clone());
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
            let bytes = |ranges: Vec<Range<u64>>| ranges.into_iter().flatten().collect::<BTreeSet<u64>>();
            prop_assert_eq!(bytes(joined), bytes(put));
        }
    }
}
