//! References to host clusters, counted: as many clusters at a time as memory permits, wherever in the file they are.

use std::collections::HashMap;
use std::ops::Range;

use memmap2::MmapMut;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::spans::Spans;
use super::tables::first_left;
use crate::qcow2::error::{Error, Result};
use crate::storage::to_usize;

/// References, up to this many: then they are "at least" so many.
pub(super) const COUNT_MAX: u32 = (1 << 30) - 1;

/// Clusters that are counted together, wherever one of them is used.
const GROUP: usize = 16;

/// Who refers to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Guest data: any number of entries may.
    Data,
    /// An L2 table: any number of L1 tables may refer to it, but nothing else.
    L2Table,
    /// Anything else: once and for nothing else.
    Metadata,
}

/// What refers to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub(super) struct Counter(u32);

impl Counter {
    /// The cluster holds metadata.
    const METADATA: u32 = 1 << 31;
    /// The cluster holds metadata and has a second owner.
    const OVERLAP: u32 = 1 << 30;

    pub(super) fn add(&mut self, references: u32, owner: Owner) {
        let mut flags = self.0 & !COUNT_MAX;
        let used = self.references() > 0;
        let is_metadata = flags & Self::METADATA != 0;
        if is_metadata || (used && owner != Owner::Data) || (owner == Owner::Metadata && references > 1) {
            flags |= Self::OVERLAP;
        }
        if owner != Owner::Data {
            flags |= Self::METADATA;
        }
        self.0 = flags | self.references().saturating_add(references).min(COUNT_MAX);
    }

    /// How many references there are.
    pub(super) fn references(self) -> u32 {
        self.0 & COUNT_MAX
    }

    /// Whether it has owners that must not share.
    pub(super) fn overlaps(self) -> bool {
        self.0 & Self::OVERLAP != 0
    }
}

/// The counters of groups, in an anonymous map: memory is taken where they are touched.
struct Groups(MmapMut);

impl Groups {
    fn new(count: usize) -> Result<Self> {
        let bytes = count * size_of::<[Counter; GROUP]>();
        let map = MmapMut::map_anon(bytes).map_err(|source| Error::Memory { bytes: bytes as u64, source })?;
        Ok(Self(map))
    }

    fn get(&self, place: usize) -> Option<&[Counter; GROUP]> {
        <[[Counter; GROUP]]>::ref_from_bytes(&self.0).ok()?.get(place)
    }

    fn get_mut(&mut self, place: usize) -> Option<&mut [Counter; GROUP]> {
        <[[Counter; GROUP]]>::mut_from_bytes(&mut self.0).ok()?.get_mut(place)
    }
}

/// Counters of one pass: for the lowest clusters from some cluster on that are referred to, in groups. The others are for
/// the next pass.
pub(super) struct Counters<'a> {
    spans: &'a Spans,
    from: u64,
    below: u64,
    /// Where the groups are, by number.
    places: HashMap<u64, usize>,
    groups: Groups,
    unused: Vec<usize>,
    /// The group that was used last.
    last: Option<(u64, usize)>,
    limit: usize,
}

impl<'a> Counters<'a> {
    /// Counts up to so many clusters from this one on, beside those in spans.
    pub(super) fn new(spans: &'a Spans, from: u64, limit: u64) -> Result<Self> {
        let limit = to_usize(limit / GROUP as u64).max(1);
        let groups = Groups::new(limit + 1)?;
        Ok(Self { spans, from, below: u64::MAX, places: HashMap::new(), groups, unused: Vec::new(), last: None, limit })
    }

    /// Counts so many references to each of the clusters, as far as they belong to this pass.
    pub(super) fn add(&mut self, clusters: Range<u64>, references: u32, owner: Owner) {
        for cluster in clusters {
            if !(self.from..self.below).contains(&cluster) {
                continue;
            }
            let place = self.place(cluster / GROUP as u64);
            let group = self.groups.get_mut(place);
            if let Some(counter) = group.and_then(|group| group.get_mut(to_usize(cluster % GROUP as u64))) {
                counter.add(references, owner);
            }
            if self.places.len() > self.limit {
                self.drop_highest();
            }
        }
    }

    fn place(&mut self, group: u64) -> usize {
        if let Some((_, place)) = self.last.filter(|(last, _)| *last == group) {
            return place;
        }
        let place = self.places.get(&group).copied().unwrap_or_else(|| {
            let mut clusters = group * GROUP as u64..;
            let counters = [(); GROUP].map(|()| clusters.next().map(|cluster| self.spans.get(cluster)));
            let counters = counters.map(Option::unwrap_or_default);
            let place = self.unused.pop().unwrap_or(self.places.len());
            if let Some(group) = self.groups.get_mut(place) {
                *group = counters;
            }
            self.places.insert(group, place);
            place
        });
        self.last = Some((group, place));
        place
    }

    fn drop_highest(&mut self) {
        let below = first_left(self.places.keys().copied(), self.limit);
        let unused = &mut self.unused;
        self.places.retain(|group, place| {
            let stays = *group < below;
            unused.extend((!stays).then_some(*place));
            stays
        });
        self.below = below * GROUP as u64;
        self.last = None;
    }

    /// All is counted that belongs to this pass.
    pub(super) fn finish(self) -> Counted<'a> {
        let mut places: Vec<(u64, usize)> = self.places.into_iter().collect();
        places.sort_unstable();
        Counted { spans: self.spans, below: self.below, places, groups: self.groups }
    }
}

/// Counters that were counted in a pass.
pub(super) struct Counted<'a> {
    spans: &'a Spans,
    below: u64,
    /// The groups in order.
    places: Vec<(u64, usize)>,
    groups: Groups,
}

impl Counted<'_> {
    /// The first cluster that was left to the next pass; `u64::MAX` where none was.
    pub(super) fn below(&self) -> u64 {
        self.below
    }

    pub(super) fn get(&self, cluster: u64) -> Counter {
        let place = self.places.binary_search_by_key(&(cluster / GROUP as u64), |(group, _)| *group);
        let group = place.ok().and_then(|place| self.places.get(place)).and_then(|(_, place)| self.groups.get(*place));
        let counter = group.and_then(|group| group.get(to_usize(cluster % GROUP as u64)));
        counter.copied().unwrap_or_else(|| self.spans.get(cluster))
    }

    /// Calls `each` for the parts of a range that have one counter, in order and without gaps.
    pub(super) fn runs(
        &self,
        range: Range<u64>,
        each: &mut dyn FnMut(Range<u64>, Counter) -> Result<()>,
    ) -> Result<()> {
        let first = self.places.partition_point(|(group, _)| (group + 1) * (GROUP as u64) <= range.start);
        let mut start = range.start;
        for (group, place) in self.places.iter().skip(first) {
            let group = group * GROUP as u64..(group + 1) * GROUP as u64;
            if group.start >= range.end {
                break;
            }
            if start < group.start {
                self.spans.within(start..group.start).try_for_each(|(part, counter)| each(part, counter))?;
            }
            let counters = group.clone().zip(self.groups.get(*place).into_iter().flatten());
            for (cluster, counter) in counters.filter(|(cluster, _)| range.contains(cluster)) {
                each(cluster..cluster + 1, *counter)?;
            }
            start = group.end;
        }
        if start < range.end {
            self.spans.within(start..range.end).try_for_each(|(part, counter)| each(part, counter))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn metadata_shares_with_nothing_and_an_l2_table_only_with_itself() {
        let overlaps = |first: (u32, Owner), second: Option<Owner>| {
            let mut counter = Counter::default();
            counter.add(first.0, first.1);
            if let Some(owner) = second {
                counter.add(1, owner);
            }
            counter.overlaps()
        };
        assert!(!overlaps((7, Owner::Data), Some(Owner::Data)));
        assert!(!overlaps((7, Owner::L2Table), None));
        assert!(!overlaps((1, Owner::Metadata), None));
        assert!(overlaps((2, Owner::Metadata), None));
        for owner in [Owner::L2Table, Owner::Metadata] {
            assert!(overlaps((1, Owner::Data), Some(owner)));
            assert!(overlaps((1, owner), Some(Owner::Data)));
            assert!(overlaps((1, owner), Some(Owner::L2Table)));
        }
    }

    #[test]
    fn counters_stop_before_they_run_over() {
        let mut counter = Counter::default();
        counter.add(u32::MAX, Owner::Data);
        counter.add(u32::MAX, Owner::Data);
        assert_eq!((counter.references(), counter.overlaps()), (COUNT_MAX, false));
    }

    proptest! {
        #[test]
        fn passes_count_each_cluster_once_wherever_it_is(
            claims in prop::collection::vec((0u64..40, 0u64..50, 1u64..4), 0..60),
            table in 0u64..200,
            limit in 0u64..200,
        ) {
            // far apart and near each other
            let claims: Vec<_> = claims.iter().map(|(far, near, count)| ((far << 40) + near, *count)).collect();
            let mut spans = Spans::default();
            spans.add(table..table + 30, 1, Owner::Metadata);
            let mut model: BTreeMap<u64, Counter> = BTreeMap::new();
            (table..table + 30).for_each(|cluster| model.entry(cluster).or_default().add(1, Owner::Metadata));
            for (first, count) in &claims {
                (*first..first + count).for_each(|cluster| model.entry(cluster).or_default().add(3, Owner::Data));
            }
            let (mut found, mut from) = (BTreeMap::new(), 0);
            while from < 1 << 50 {
                let mut counters = Counters::new(&spans, from, limit).unwrap();
                for (first, count) in &claims {
                    counters.add(*first..first + count, 3, Owner::Data);
                }
                let counted = counters.finish();
                let mut end = from;
                counted.runs(from..counted.below().min(1 << 50), &mut |part, counter| {
                    assert_eq!(std::mem::replace(&mut end, part.end), part.start);
                    if counter != Counter::default() {
                        for cluster in part {
                            assert_eq!(counted.get(cluster), counter);
                            assert_eq!(found.insert(cluster, counter), None);
                        }
                    }
                    Ok(())
                }).unwrap();
                prop_assert_eq!(end, counted.below().min(1 << 50));
                from = counted.below();
            }
            prop_assert_eq!(found, model);
        }
    }
}
