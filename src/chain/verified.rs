//! When which parts of images were verified last: `.qmpbackup/verified.json` beside them.
//!
//! ```text
//! version   1
//! images    for each image, by its name:
//!   sums      8 digits: the CRC-32 of its list of checksums; an image that was renewed was never found right
//!   length    bytes of its file
//!   times     for each of its segments when it was found right last, in seconds since 1970, or `-`; `TIME*N` for N of them
//!   tried     the same for when it was to be verified last, whatever came of it; where it is absent, that is as `times`
//! crc32     8 digits, as in a manifest
//! ```
//!
//! What the file holds may be anything: where it is damaged, or foreign, nothing was verified.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::json_file::{self, seal, seal_fits};
use super::{BLOCK, BOOKKEEPING};
use crate::json;

const VERSION: u64 = 1;

/// The most segments that are remembered of one image.
const SEGMENTS: u64 = 64;

/// Blocks that a segment has at least: 16 MiB.
const SHORTEST: u64 = (16 << 20) / BLOCK;

/// Bytes of the file: enough for some ten thousand images.
const LIMIT: u64 = 16 << 20;

/// Images in it: five values each.
const IMAGES_MAX: usize = json::VALUES_MAX / 8;

/// When parts of the images of a folder were verified.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verifications {
    images: BTreeMap<String, Entry>,
}

/// When a segment was verified, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentTimes {
    /// When it was found right last.
    pub right: Option<i64>,
    /// When it was to be verified last, whatever came of it.
    pub tried: Option<i64>,
}

/// What is remembered of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    sums: u32,
    length: u64,
    times: Vec<SegmentTimes>,
}

/// The segments of an image of this many bytes, as ranges of [blocks](super::BLOCK).
pub fn segments(length: u64) -> impl Iterator<Item = Range<u64>> {
    let blocks = length.div_ceil(BLOCK);
    let each = blocks.div_ceil(SEGMENTS).max(SHORTEST);
    (0..blocks.div_ceil(each)).map(move |number| number * each..((number + 1) * each).min(blocks))
}

impl Verifications {
    /// Where they are for the images of a folder.
    #[must_use]
    pub fn path(folder: &Path) -> PathBuf {
        folder.join(BOOKKEEPING).join("verified.json")
    }

    /// What is remembered of a folder's images; nothing where the file cannot be believed.
    #[must_use]
    pub fn read(folder: &Path) -> Self {
        let value = json_file::read_up_to(&Self::path(folder), LIMIT).ok().flatten();
        value.as_ref().and_then(Self::parse).unwrap_or_default()
    }

    /// When each segment of an image was verified. The CRC-32 of its checksums and the number of bytes of its file say which
    /// content is meant: other content was never found right, but its segments keep their turn.
    #[must_use]
    pub fn times(&self, name: &str, sums: u32, length: u64) -> Vec<SegmentTimes> {
        let known = self.images.get(name);
        let same = known.is_some_and(|known| (known.sums, known.length) == (sums, length));
        let times = known.map(|known| known.times.as_slice()).unwrap_or_default();
        let times = times.iter().map(|times| if same { *times } else { SegmentTimes { right: None, ..*times } });
        let never = std::iter::repeat(SegmentTimes::default());
        segments(length).zip(times.chain(never)).map(|(_, times)| times).collect()
    }

    /// Remembers when each segment of an image was verified.
    pub fn set(&mut self, name: &str, sums: u32, length: u64, times: Vec<SegmentTimes>) {
        self.images.insert(name.to_owned(), Entry { sums, length, times });
    }

    /// Forgets all images but these.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.images.retain(|name, _| keep(name));
    }

    /// Writes them down: the file is whole at any time. What does not fit into it is forgotten.
    ///
    /// # Errors
    /// What the system says; what was there before is still there then.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let mut images = Map::new();
        let mut left = LIMIT;
        for (name, entry) in self.images.iter().take(IMAGES_MAX) {
            let times = packed(entry.times.iter().map(|times| times.right));
            let tried = packed(entry.times.iter().map(|times| times.tried));
            // names may have to be escaped, and lines are indented
            left = left.saturating_sub((name.len() * 6 + times.len() + tried.len() + 200) as u64);
            if left > 0 {
                let sums = format!("{:08x}", entry.sums);
                let entry = json!({ "sums": sums, "length": entry.length, "times": times, "tried": tried });
                images.insert(name.clone(), entry);
            }
        }
        let mut keys = Map::from_iter([("version".to_owned(), VERSION.into()), ("images".to_owned(), images.into())]);
        seal(&mut keys);
        json_file::write(&Self::path(folder), &keys.into())
    }

    fn parse(value: &Value) -> Option<Self> {
        let keys = value.as_object()?;
        if keys.get("version")?.as_u64()? != VERSION || seal_fits(keys) != Some(true) {
            return None;
        }
        let images = keys.get("images")?.as_object()?;
        let entry = |(name, value): (&String, &Value)| Some((name.clone(), Entry::parse(value)?));
        Some(Self { images: images.iter().filter_map(entry).collect() })
    }
}

impl Entry {
    fn parse(value: &Value) -> Option<Self> {
        let sums = u32::from_str_radix(value.get("sums")?.as_str()?, 16).ok()?;
        let length = value.get("length")?.as_u64()?;
        let right = unpacked(value.get("times")?.as_str()?)?;
        let tried = value.get("tried").map_or_else(|| Some(right.clone()), |tried| unpacked(tried.as_str()?))?;
        if [right.len(), tried.len()] != [segments(length).count(); 2] {
            return None;
        }
        let times = right.into_iter().zip(tried).map(|(right, tried)| SegmentTimes { right, tried }).collect();
        Some(Self { sums, length, times })
    }
}

/// Times as a text.
fn packed(times: impl Iterator<Item = Option<i64>>) -> String {
    let mut text = String::new();
    let times: Vec<_> = times.collect();
    for run in times.chunk_by(|one, next| one == next) {
        let space = if text.is_empty() { "" } else { " " };
        let time = run.first().copied().flatten().map_or_else(|| "-".to_owned(), |time| time.to_string());
        let _ = write!(text, "{space}{time}");
        if run.len() > 1 {
            let _ = write!(text, "*{}", run.len());
        }
    }
    text
}

/// A text as times; `None` where it is none, or has too many.
fn unpacked(text: &str) -> Option<Vec<Option<i64>>> {
    let mut times = Vec::new();
    for word in text.split_whitespace() {
        let (time, count) = word.split_once('*').unwrap_or((word, "1"));
        let time = if time == "-" { None } else { Some(time.parse().ok()?) };
        let count: u64 = count.parse().ok()?;
        if times.len() as u64 + count.min(SEGMENTS + 1) > SEGMENTS {
            return None;
        }
        times.extend((0..count).map(|_| time));
    }
    Some(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn an_image_has_at_most_64_segments_of_16_mebibytes_at_least() {
        let lengths = |length: u64| segments(length).map(|blocks| blocks.end - blocks.start).collect::<Vec<_>>();
        assert!(lengths(0).is_empty());
        assert_eq!(lengths(1), [1]);
        assert_eq!(lengths((16 << 20) + 1), [256, 1]);
        assert_eq!(lengths(GIB), [256; 64]);
        assert_eq!(lengths(GIB + 1).len(), 64);
        for length in [3, 100 * BLOCK, GIB - 1, GIB + 1, 77 * GIB + 13, 1 << 45] {
            let all: Vec<_> = segments(length).collect();
            assert!(all.len() <= 64 && all.iter().rev().skip(1).all(|blocks| blocks.end - blocks.start >= 256));
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((all[0].start, all.last().unwrap().end), (0, length.div_ceil(BLOCK)));
        }
    }

    #[test]
    fn times_are_read_as_they_were_written_and_only_of_the_same_content() {
        let folder = tempfile::tempdir().unwrap();
        let mut known = Verifications::read(folder.path());
        assert_eq!(known.times("a", 7, GIB), vec![SegmentTimes::default(); 64]);
        let times =
            |at: i64| SegmentTimes { right: (at % 3 > 0).then_some(at / 8), tried: (at % 5 > 0).then_some(at / 8) };
        let times: Vec<_> = (0..64).map(times).collect();
        let at = |time| vec![SegmentTimes { right: time, tried: Some(9) }];
        known.set("a", 7, GIB, times.clone());
        known.set("größe \"x\"\n", u32::MAX, 5, at(Some(-1)));
        known.set("gone", 0, 5, at(None));
        known.retain(|name| name != "gone");
        known.write(folder.path()).unwrap();
        let read = Verifications::read(folder.path());
        assert_eq!(read, known);
        assert_eq!(read.times("a", 7, GIB), times);
        assert_eq!(read.times("gone", 0, 5), [SegmentTimes::default()]);
        // of another content, but each has its turn as before
        let tried: Vec<_> = times.iter().map(|times| SegmentTimes { right: None, ..*times }).collect();
        assert_eq!(read.times("a", 8, GIB), tried);
        assert_eq!(read.times("a", 7, GIB + 1), tried);
        assert_eq!(read.times("a", 7, GIB / 2), tried[..32]);
        let longer = read.times("größe \"x\"\n", 1, GIB);
        assert_eq!(longer[..2], [SegmentTimes { right: None, tried: Some(9) }, SegmentTimes::default()]);
    }

    #[test]
    fn of_a_file_that_is_damaged_or_foreign_nothing_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let mut known = Verifications::default();
        known.set("a", 7, GIB, vec![SegmentTimes { right: Some(1), tried: Some(2) }; 64]);
        known.write(folder.path()).unwrap();
        let path = Verifications::path(folder.path());
        let text = std::fs::read_to_string(&path).unwrap();
        for bit in 0..text.len() * 8 {
            let mut bytes = text.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let value: Option<Value> = serde_json::from_slice(&bytes).ok();
            let read = value.as_ref().and_then(Verifications::parse).unwrap_or_default();
            assert!(read == known || read == Verifications::default(), "bit {bit}: {read:?}");
        }
        for foreign in ["", "[]", "{", "{\"version\": 1}", "7"] {
            std::fs::write(&path, foreign).unwrap();
            assert_eq!(Verifications::read(folder.path()), Verifications::default());
        }
        for times in ["1*65", "1*18446744073709551615 1", "x", "1*x", "1*63"] {
            assert_eq!(Entry::parse(&json!({ "sums": "0", "length": GIB, "times": times })), None, "{times}");
        }
    }
}
