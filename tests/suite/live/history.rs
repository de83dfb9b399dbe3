//! All that was ever written to the disks of a machine, in order, and which moment of it a set of restored disks is.
//!
//! A moment is a number of writes: the first `k` have happened, on all the disks, and no other. Where a write changes
//! nothing, or changes back what was, several moments look alike, and all of them are the answer.

use std::ops::Range;
use std::sync::{Arc, Mutex};

const BLOCK: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// This byte, again and again.
    Fill(u8),
    Zeroes,
    /// Zeroes that need no room.
    Unmap,
    /// One that was done, and reads as zeroes.
    Discard,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) disk: usize,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) kind: Kind,
}

impl Write {
    fn range(&self) -> Range<usize> {
        usize::try_from(self.offset).unwrap()..usize::try_from(self.offset + self.length).unwrap()
    }

    fn byte(&self) -> u8 {
        match self.kind {
            Kind::Fill(byte) => byte,
            Kind::Zeroes | Kind::Unmap | Kind::Discard => 0,
        }
    }
}

/// Disks that begin as zeroes, or with what they have.
pub(crate) struct History {
    initial: Vec<Vec<u8>>,
    log: Vec<Write>,
}

impl History {
    pub(crate) fn new(initial: Vec<Vec<u8>>) -> Self {
        Self { initial, log: Vec::new() }
    }

    /// For disks that nobody has written to, and several who will know of it.
    pub(crate) fn zeroes(sizes: &[u64]) -> Arc<Mutex<Self>> {
        let initial = sizes.iter().map(|size| vec![0; usize::try_from(*size).unwrap()]).collect();
        Arc::new(Mutex::new(Self::new(initial)))
    }

    pub(crate) fn push(&mut self, write: Write) {
        assert!(write.range().end <= self.initial[write.disk].len(), "{write:?} is past the end");
        self.log.push(write);
    }

    /// The last write has failed.
    pub(crate) fn take_back(&mut self, write: Write) {
        assert_eq!(self.log.pop(), Some(write));
    }

    /// The number of writes so far.
    pub(crate) fn now(&self) -> usize {
        self.log.len()
    }

    /// The moments that have exactly these contents, the same for all disks; or what is wrong with the one that comes
    /// closest.
    pub(crate) fn moments(&self, images: &[Vec<u8>]) -> Result<Vec<usize>, String> {
        let sizes = |disks: &[Vec<u8>]| disks.iter().map(Vec::len).collect::<Vec<_>>();
        if sizes(images) != sizes(&self.initial) {
            return Err(format!("disks of {:?} bytes are {:?}", sizes(&self.initial), sizes(images)));
        }
        let mut comparison = Comparison::new(&self.initial, images);
        let mut moments = Vec::new();
        let mut closest = (usize::MAX, 0, Vec::new());
        for moment in 0..=self.log.len() {
            if let Some(write) = moment.checked_sub(1).map(|last| self.log[last]) {
                comparison.apply(&write);
            }
            if comparison.different == 0 {
                moments.push(moment);
            } else if comparison.different < closest.0 {
                closest = (comparison.different, moment, comparison.blocks());
            }
        }
        if moments.is_empty() {
            let (different, moment, blocks) = closest;
            let blocks: Vec<_> = blocks.iter().take(8).collect();
            return Err(format!(
                "no moment of {} writes: after {moment} of them {different} blocks differ: {blocks:?}; the next is {:?}",
                self.log.len(),
                self.log.get(moment)
            ));
        }
        Ok(moments)
    }

    /// One moment for each set of images, none before the one before it.
    pub(crate) fn ascending(&self, points: &[Vec<Vec<u8>>]) -> Result<Vec<usize>, String> {
        let mut chosen: Vec<usize> = Vec::new();
        for (number, images) in points.iter().enumerate() {
            let moments = self.moments(images).map_err(|error| format!("restore point {number}: {error}"))?;
            let earliest = chosen.last().copied().unwrap_or(0);
            let moment = moments.iter().find(|moment| **moment >= earliest);
            let early = || format!("restore point {number} is of {moments:?}, the one before it of {earliest}");
            chosen.push(*moment.ok_or_else(early)?);
        }
        Ok(chosen)
    }
}

/// Contents that change, against images that do not. Only the blocks that a write touches are looked at again.
struct Comparison<'a> {
    disks: Vec<Vec<u8>>,
    images: &'a [Vec<u8>],
    same: Vec<Vec<bool>>,
    different: usize,
}

impl<'a> Comparison<'a> {
    fn new(initial: &[Vec<u8>], images: &'a [Vec<u8>]) -> Self {
        let blocks = |(a, b): (&Vec<u8>, &Vec<u8>)| a.chunks(BLOCK).zip(b.chunks(BLOCK)).map(|(a, b)| a == b).collect();
        let same: Vec<Vec<bool>> = initial.iter().zip(images).map(blocks).collect();
        let different = same.iter().flatten().filter(|same| !**same).count();
        Self { disks: initial.to_vec(), images, same, different }
    }

    fn apply(&mut self, write: &Write) {
        let range = write.range();
        let (disk, image) = (&mut self.disks[write.disk], &self.images[write.disk]);
        disk[range.clone()].fill(write.byte());
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            let bytes = block * BLOCK..((block + 1) * BLOCK).min(disk.len());
            let same = disk[bytes.clone()] == image[bytes];
            let before = std::mem::replace(&mut self.same[write.disk][block], same);
            self.different = self.different + usize::from(before) - usize::from(same);
        }
    }

    /// The disks and offsets of the blocks that differ.
    fn blocks(&self) -> Vec<(usize, usize)> {
        let of_disk = |(disk, same): (usize, &Vec<bool>)| {
            let blocks = same.iter().enumerate().filter(|(_, same)| !**same);
            blocks.map(|(block, _)| (disk, block * BLOCK)).collect::<Vec<_>>()
        };
        self.same.iter().enumerate().flat_map(of_disk).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::prng::Prng;

    const SIZES: [u64; 2] = [512 << 10, (200 << 10) + 512];

    /// Disks after each number of writes, made the slow way.
    fn random(seed: u64) -> (History, Vec<Vec<Vec<u8>>>) {
        let prng = &mut Prng::stream(seed, 0);
        let mut disks: Vec<Vec<u8>> = SIZES.iter().map(|size| prng.bytes(usize::try_from(*size).unwrap())).collect();
        let mut history = History::new(disks.clone());
        let mut all = vec![disks.clone()];
        for number in 0..40_u8 {
            let disk = usize::from(prng.one_in(2));
            let length = 512 * prng.between(1, 200);
            let offset = 512 * prng.below((SIZES[disk] - length) / 512 + 1);
            let kind = *prng.pick(&[Kind::Fill(number + 1), Kind::Fill(200), Kind::Zeroes, Kind::Unmap, Kind::Discard]);
            let write = Write { disk, offset, length, kind };
            disks[disk][write.range()].fill(write.byte());
            history.push(write);
            all.push(disks.clone());
        }
        (history, all)
    }

    #[test]
    fn each_moment_is_found_and_whatever_looks_like_it() {
        for seed in 0..4 {
            let (history, all) = random(seed);
            for images in &all {
                let alike: Vec<usize> = (0..all.len()).filter(|other| all[*other] == *images).collect();
                assert_eq!(history.moments(images), Ok(alike));
            }
        }
    }

    #[test]
    fn disks_of_different_moments_are_no_moment() {
        let (history, all) = random(7);
        for (first, second) in (0..all.len()).flat_map(|a| (0..all.len()).map(move |b| (a, b))) {
            let torn = vec![all[first][0].clone(), all[second][1].clone()];
            assert_eq!(history.moments(&torn).is_ok(), all.contains(&torn), "{first} and {second}");
        }
    }

    #[test]
    fn two_disks_at_the_fifth_and_the_seventh_write_are_torn() {
        let mut history = History::new(vec![vec![0; 4096], vec![0; 4096]]);
        let mut images = vec![vec![0; 4096], vec![0; 4096]];
        for number in 0..10_u8 {
            let disk = usize::from(number % 2);
            let write = Write { disk, offset: 512, length: 512, kind: Kind::Fill(number + 1) };
            history.push(write);
            // Disk 0 has the first five writes, disk 1 the first seven and the eighth
            if (disk == 0 && number < 5) || (disk == 1 && number < 8) {
                images[disk][512..1024].fill(number + 1);
            }
        }
        let error = history.moments(&images).unwrap_err();
        assert!(error.contains("after 5 of them 1 blocks differ: [(1, 0)]"), "{error}");
    }

    #[test]
    fn a_single_byte_is_enough_to_be_no_moment() {
        let (history, mut all) = random(9);
        let images = all.last_mut().unwrap();
        *images[1].last_mut().unwrap() ^= 0x80;
        assert!(history.moments(images).unwrap_err().contains("1 blocks differ: [(1, 196608)]"));
        images[1].pop();
        assert!(history.moments(images).unwrap_err().contains("bytes are"));
    }

    #[test]
    fn restore_points_that_go_back_in_time_are_refused() {
        let mut history = History::new(vec![vec![0; 4096]]);
        for byte in [1, 2, 1] {
            history.push(Write { disk: 0, offset: 0, length: 4096, kind: Kind::Fill(byte) });
        }
        let point = |byte| vec![vec![byte; 4096]];
        assert_eq!(history.ascending(&[point(1), point(2), point(1)]), Ok(vec![1, 2, 3]));
        assert!(history.ascending(&[point(2), point(0)]).unwrap_err().contains("is of [0], the one before it of 2"));
    }
}
