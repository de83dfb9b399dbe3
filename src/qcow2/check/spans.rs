//! References to runs of host clusters that the header leads to: a table is one span, however long it claims to be.

use std::collections::BTreeMap;
use std::ops::Range;

use super::counters::{Counter, Owner};
use super::roots::Roots;
use crate::qcow2::geometry::Geometry;

/// Counters that are the same from a cluster on, up to the next one.
#[derive(Debug, Default)]
pub(super) struct Spans(BTreeMap<u64, Counter>);

impl Spans {
    /// All that is metadata and known before the walk begins.
    pub(super) fn of(roots: &Roots, geometry: Geometry) -> Self {
        let mut spans = Self::default();
        let metadata = roots.metadata.iter().map(|range| (range.clone(), 1));
        let tables = roots.tables.iter().map(|root| (root.range(), root.references));
        for (bytes, references) in metadata.chain(tables) {
            let clusters = bytes.start >> geometry.cluster_bits()..geometry.clusters(bytes.end);
            spans.add(clusters, references, Owner::Metadata);
        }
        spans
    }

    pub(super) fn add(&mut self, clusters: Range<u64>, references: u32, owner: Owner) {
        if clusters.is_empty() {
            return;
        }
        for edge in [clusters.start, clusters.end] {
            self.0.insert(edge, self.get(edge));
        }
        self.0.range_mut(clusters).for_each(|(_, counter)| counter.add(references, owner));
    }

    pub(super) fn get(&self, cluster: u64) -> Counter {
        self.0.range(..=cluster).next_back().map(|(_, counter)| *counter).unwrap_or_default()
    }

    /// The parts of a range that have one counter, in order.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Counter)> + '_ {
        let mut start = range.start;
        std::iter::from_fn(move || {
            let counter = self.get(start);
            let next = self.0.range(start + 1..).next().map_or(range.end, |(next, _)| range.end.min(*next));
            let part = start..next;
            start = next;
            (!part.is_empty()).then_some((part, counter))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::to_usize;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn spans_count_as_each_cluster_by_itself(
            adds in prop::collection::vec((0u64..60, 0u64..30, 1u32..3), 0..20), start in 0u64..50, length in 0u64..60,
        ) {
            let (mut spans, mut model) = (Spans::default(), vec![Counter::default(); 100]);
            for (first, count, references) in adds {
                spans.add(first..first + count, references, Owner::Metadata);
                (first..first + count).for_each(|cluster| model[to_usize(cluster)].add(references, Owner::Metadata));
            }
            let mut end = start;
            for (part, counter) in spans.within(start..start + length) {
                prop_assert_eq!(part.start, end);
                end = part.end;
                part.for_each(|cluster| assert_eq!(model.get(to_usize(cluster)).copied().unwrap_or_default(), counter));
            }
            prop_assert_eq!(end, start + length);
        }
    }
}
