//! Which blocks are to be compared: all, or those that it is time for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::Due;
use super::look::{Looked, Subject};
use crate::chain::{BLOCK, SegmentTimes, Verifications, segments};

/// What is to be done with an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Chosen {
    /// The blocks to compare.
    pub(super) blocks: Vec<Range<u64>>,
    /// Whether its tables are checked.
    pub(super) structure: bool,
}

impl Chosen {
    /// The bytes that will be told as done.
    pub(super) fn bytes(&self, looked: &Looked) -> u64 {
        match &looked.sums {
            Some(_) => self.blocks.iter().map(|blocks| bytes(blocks, looked)).sum(),
            None => looked.length,
        }
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.blocks.is_empty() && !self.structure
    }
}

fn bytes(blocks: &Range<u64>, looked: &Looked) -> u64 {
    let sums = looked.sums.as_ref().map_or(0, |sums| sums.length);
    let end = (blocks.end * BLOCK).min(sums).min(looked.length);
    end.saturating_sub(blocks.start * BLOCK)
}

/// A part of an image, and when it was verified.
struct Segment {
    subject: usize,
    blocks: Range<u64>,
    times: SegmentTimes,
    made: Option<i64>,
}

/// Chooses what is due.
pub(super) fn choose(subjects: &[Subject<'_>], looked: &[Looked], due: Option<Due>) -> Vec<Chosen> {
    let Some(due) = due else {
        let whole = |looked: &Looked| std::iter::once(0..looked.blocks()).filter(|blocks| !blocks.is_empty()).collect();
        let all = |looked: &Looked| Chosen { blocks: whole(looked), structure: looked.open };
        return looked.iter().map(all).collect();
    };
    // without checksums nothing can be remembered, and tables are small
    let structure = |looked: &Looked| looked.open && looked.blocks() == 0;
    let start = |looked| Chosen { blocks: Vec::new(), structure: structure(looked) };
    let mut chosen: Vec<Chosen> = looked.iter().map(start).collect();
    let mut left =
        due.sample.map(|share| share.of(looked.iter().map(|looked| bytes(&(0..looked.blocks()), looked)).sum()));
    let mut parts = parts(subjects, looked, due.now);
    if let Some(age) = due.max_age {
        let latest = due.now.saturating_sub(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
        parts.retain(|part| part.times.right.is_none_or(|right| right <= latest));
    }
    // what was never tried is as old as its image: a new one does not go before all others
    parts.sort_by_key(|part| part.times.tried.or(part.made));
    for part in parts {
        let Some(looked) = looked.get(part.subject) else { continue };
        match &mut left {
            Some(0) => break,
            Some(left) => *left = left.saturating_sub(bytes(&part.blocks, looked)),
            None => {}
        }
        if let Some(chosen) = chosen.get_mut(part.subject) {
            chosen.structure = true;
            chosen.blocks.push(part.blocks);
        }
    }
    for chosen in &mut chosen {
        chosen.blocks.sort_by_key(|blocks| blocks.start);
    }
    chosen
}

/// The segments of all images, in order.
fn parts(subjects: &[Subject<'_>], looked: &[Looked], now: i64) -> Vec<Segment> {
    let mut folders: BTreeMap<&Path, Verifications> = BTreeMap::new();
    let mut parts = Vec::new();
    for (subject, (image, looked)) in subjects.iter().map(|subject| subject.image).zip(looked).enumerate() {
        // what cannot be remembered would be due for ever
        let Some((name, sums)) = image.name().to_str().zip(looked.sums.as_ref()).filter(|_| looked.open) else {
            continue;
        };
        let folder = image.path.parent().unwrap_or(Path::new(""));
        let known = folders.entry(folder).or_insert_with(|| Verifications::read(folder));
        let times = known.times(name, sums.list, sums.length);
        for (blocks, times) in segments(sums.length).zip(times) {
            let blocks = blocks.start..blocks.end.min(looked.blocks());
            // a clock that was wrong says nothing
            let [right, tried] = [times.right, times.tried].map(|time| time.filter(|time| *time <= now));
            let times = SegmentTimes { right, tried };
            let made = image.time.filter(|time| *time <= now);
            parts.extend((!blocks.is_empty()).then_some(Segment { subject, blocks, times, made }));
        }
    }
    parts
}
