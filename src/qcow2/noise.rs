//! Bytes that deflate cannot make fewer, told in a quarter of the time in which it finds out: encrypted or compressed data,
//! of which disks hold a lot.
//!
//! What deflate gains comes from bytes that are more frequent than others, and from bytes that were there before. So noise
//! is what has neither. Of 64 KiB of random bytes deflate makes more bytes in 550 µs.

use crate::storage::to_usize;

/// Bytes that are looked at first: most data shows at once that it is something else.
const SAMPLE: usize = 4096;

/// The most for [`unevenness`] of noise. It is 255 on average, with a deviation of 23; a code that makes use of it gains
/// that many bits divided by 1.4, which is less than its own description takes.
const UNEVEN: u64 = 500;

/// The most places where four bytes of noise [were there before](repeats), beside four times as many as there are by chance.
const REPEATS: usize = 8;

/// The table for them has so many bits' places.
const REMEMBERED: u32 = 14;

/// Whether these bytes are noise.
pub(super) fn is_noise(bytes: &[u8]) -> bool {
    bytes.len() >= SAMPLE
        && bytes.get(..SAMPLE).is_some_and(|sample| unevenness(sample) < UNEVEN)
        && unevenness(bytes) < UNEVEN
        && repeats(bytes).nth(REPEATS + (bytes.len() >> (32 - REMEMBERED - 2))).is_none()
}

/// The sum of the squared differences of all bytes' counts from their mean, divided by that.
fn unevenness(bytes: &[u8]) -> u64 {
    // neighbours that are equal do not wait for each other
    let mut counts = [[0u32; 256]; 4];
    for chunk in bytes.chunks(4) {
        for (counts, byte) in counts.iter_mut().zip(chunk) {
            if let Some(count) = counts.get_mut(usize::from(*byte)) {
                *count += 1;
            }
        }
    }
    let [first, second, third, fourth] = counts;
    let totals = first.into_iter().zip(second).zip(third.into_iter().zip(fourth));
    let squares: u64 = totals.map(|((a, b), (c, d))| u64::from(a + b + c + d).pow(2)).sum();
    let length = bytes.len() as u64;
    (squares * 256 / length.max(1)).saturating_sub(length)
}

/// The places of four bytes that were there before, as far as a small table remembers.
fn repeats(bytes: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let mut last = vec![0u32; 1 << REMEMBERED];
    bytes.windows(4).enumerate().filter_map(move |(place, window)| {
        let word = u32::from_le_bytes(window.try_into().ok()?);
        let slot = last.get_mut(to_usize(u64::from(word.wrapping_mul(0x9e37_79b1) >> (32 - REMEMBERED))))?;
        (std::mem::replace(slot, word) == word).then_some(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::codec::{CompressionType, Deflater};

    /// Bytes of which no one follows from others.
    fn random(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes()[4]
        };
        std::iter::repeat_with(&mut next).take(length).collect()
    }

    #[test]
    fn random_bytes_are_noise_in_clusters_of_all_sizes() {
        for bits in 12..=21 {
            for seed in 0..10 {
                assert!(is_noise(&random(1 << bits, seed)), "{bits} {seed}");
            }
        }
    }

    #[test]
    fn what_deflate_would_make_smaller_is_no_noise() {
        let noise = random(65536, 1);
        let mut found = Vec::new();
        // a part that was there before, near or far
        for (length, distance) in [(64, 64), (64, 5000), (600, 20_000), (3000, 30_000)] {
            let mut bytes = noise.clone();
            bytes.copy_within(0..length, distance);
            found.push(bytes);
        }
        // one byte of twenty is the same; a few values are missing
        found.push(noise.iter().enumerate().map(|(index, byte)| if index % 20 == 0 { 7 } else { *byte }).collect());
        found.push(noise.iter().map(|byte| if *byte < 10 { byte + 100 } else { *byte }).collect());
        // half of it is text
        found.push([&noise[..32768], &b"all work and no play".repeat(1639)[..32768]].concat());
        for (number, bytes) in found.iter().enumerate() {
            assert!(!is_noise(bytes), "{number}");
        }
    }

    #[test]
    fn noise_is_what_deflate_cannot_make_smaller() {
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::new(5).unwrap());
        let (mut room, mut found) = (vec![0; 70_000], [0, 0]);
        for seed in 0..60 {
            // a few bytes were there before, and some have one value: more and more of them
            let mut bytes = random(65536, seed);
            let [from, to] = [seed * 977 % 60_000, seed * 7919 % 60_000].map(to_usize);
            bytes.copy_within(from..from + to_usize(seed), to);
            (0..to_usize(seed * 3)).for_each(|index| bytes[index * 331] = 7);
            let length = compressor.deflate_compress(&bytes, &mut room).unwrap();
            let is_noise = is_noise(&bytes);
            assert!(!is_noise || length > 65_400, "{seed}: {length}");
            found[usize::from(is_noise)] += 1;
        }
        assert!(found.iter().all(|count| *count >= 15), "{found:?}");
    }

    #[test]
    fn noise_is_stored_as_it_is() {
        assert!(Deflater::new(CompressionType::Deflate, 65536).deflate(&random(65536, 3)).is_none());
    }
}
