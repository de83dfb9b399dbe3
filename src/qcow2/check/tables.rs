//! The distinct L2 tables of an image and who refers to them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::qcow2::address::HostOffset;

/// What is known of an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Noted {
    /// References from all L1 tables.
    pub(super) references: u32,
    /// Its first index in the active L1 table, if it is there.
    pub(super) active: Option<u32>,
    /// An entry of an L1 table that has another entry for this table.
    pub(super) shared: Option<HostOffset>,
    /// The number of the L1 table that referred to it last.
    last: u32,
}

/// L2 tables by host cluster: no more than a limit, the lowest from some cluster on. The others are for the next
/// pass, so that memory is bounded whatever the L1 tables say.
pub(super) struct Tables {
    noted: HashMap<u64, Noted>,
    from: u64,
    below: u64,
    limit: usize,
}

impl Tables {
    pub(super) fn new(from: u64, limit: usize) -> Self {
        Self { noted: HashMap::new(), from, below: u64::MAX, limit: limit.max(1) }
    }

    /// Notes that an entry of the L1 table `number`, one of the active one if it has an index there, leads to this cluster.
    pub(super) fn note(&mut self, cluster: u64, number: u32, entry: HostOffset, references: u32, active: Option<u32>) {
        if !(self.from..self.below).contains(&cluster) {
            return;
        }
        match self.noted.entry(cluster) {
            Entry::Occupied(mut there) => {
                let noted = there.get_mut();
                noted.references = noted.references.saturating_add(references);
                noted.active = noted.active.or(active);
                if noted.last == number {
                    noted.shared = noted.shared.or(Some(entry));
                }
                noted.last = number;
            }
            Entry::Vacant(place) => {
                place.insert(Noted { references, active, shared: None, last: number });
            }
        }
        if self.noted.len() > self.limit {
            self.drop_highest();
        }
    }

    fn drop_highest(&mut self) {
        self.below = first_left(self.noted.keys().copied(), self.limit);
        self.noted.retain(|cluster, _| *cluster < self.below);
    }

    /// Where the next pass starts, if there has to be one.
    pub(super) fn next(&self) -> Option<u64> {
        (self.below < u64::MAX).then_some(self.below)
    }

    /// The tables of this pass, in the order of the file.
    pub(super) fn into_sorted(self) -> Vec<(u64, Noted)> {
        let mut noted: Vec<_> = self.noted.into_iter().collect();
        noted.sort_unstable_by_key(|(cluster, _)| *cluster);
        noted
    }
}

/// The first of more numbers than a limit, which is no zero, that is left to the next pass: an eighth is, so that it happens
/// seldom.
pub(super) fn first_left(numbers: impl Iterator<Item = u64>, limit: usize) -> u64 {
    let mut numbers: Vec<u64> = numbers.collect();
    let kept = (limit - limit / 8).max(1);
    let (_, first, _) = numbers.select_nth_unstable(kept);
    *first
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn passes_note_each_table_once_with_all_its_references(
            entries in prop::collection::vec((0u64..30, 0u32..3), 0..60),
            limit in 1usize..40,
        ) {
            let mut expected = BTreeMap::<u64, u32>::new();
            for (cluster, _) in &entries {
                *expected.entry(*cluster).or_default() += 5;
            }
            let mut found = BTreeMap::new();
            let mut start = Some(0);
            while let Some(from) = start {
                let mut tables = Tables::new(from, limit);
                for (cluster, l1) in &entries {
                    tables.note(*cluster, *l1, HostOffset(0), 5, None);
                }
                start = tables.next();
                for (cluster, noted) in tables.into_sorted() {
                    prop_assert_eq!(found.insert(cluster, noted.references), None);
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
