//! The model: a disk is an array of bytes, kept as the pages that are not zero.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::support::sparse;

const PAGE: u64 = 4096;

#[derive(Clone)]
pub(crate) struct Disk {
    size: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Disk {
    pub(crate) fn new(size: u64) -> Self {
        Self { size, pages: BTreeMap::new() }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(&(size..self.size));
        }
        self.size = size;
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        assert!(end <= self.size, "a write to {offset}..{end} of {} bytes", self.size);
        for page in offset / PAGE..end.div_ceil(PAGE) {
            let part = cut(&page_range(page), &(offset..end));
            let bytes = &bytes[within(&part, offset)];
            let kept = self.pages.entry(page).or_insert_with(|| vec![0; within(&page_range(page), page * PAGE).end]);
            kept[within(&part, page * PAGE)].copy_from_slice(bytes);
        }
    }

    pub(crate) fn zero(&mut self, range: &Range<u64>) {
        let touched: Vec<u64> =
            self.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)).map(|(n, _)| *n).collect();
        for page in touched {
            let part = cut(&page_range(page), range);
            if part == page_range(page) {
                self.pages.remove(&page);
            } else if let Some(kept) = self.pages.get_mut(&page) {
                kept[within(&part, page * PAGE)].fill(0);
            }
        }
    }

    /// Takes over what `from` has in a range.
    pub(crate) fn copy(&mut self, from: &Self, range: &Range<u64>) {
        self.zero(range);
        for (page, bytes) in from.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)) {
            let part = cut(&page_range(*page), range);
            self.write(part.start, &bytes[within(&part, page * PAGE)]);
        }
    }

    /// The first offset at which a file differs from this disk.
    pub(crate) fn first_difference(&self, path: &Path) -> Option<u64> {
        let file = File::open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let in_file =
            sparse::data_extents(&file).into_iter().flat_map(|data| data.start / PAGE..data.end.div_ceil(PAGE));
        let mut pages: Vec<u64> = self.pages.keys().copied().chain(in_file).collect();
        pages.sort_unstable();
        pages.dedup();
        let zeroes = vec![0; within(&page_range(0), 0).end];
        for page in pages {
            let part = cut(&page_range(page), &(0..len.min(self.size)));
            if part.is_empty() {
                break;
            }
            let should = &self.pages.get(&page).unwrap_or(&zeroes)[within(&part, page * PAGE)];
            if let Some(at) = sparse::difference(&sparse::read(&file, &part), should) {
                return Some(part.start + at);
            }
        }
        (len != self.size).then_some(len.min(self.size))
    }
}

fn page_range(page: u64) -> Range<u64> {
    page * PAGE..(page + 1) * PAGE
}

fn cut(range: &Range<u64>, by: &Range<u64>) -> Range<u64> {
    range.start.max(by.start)..range.end.min(by.end)
}

/// A range as indices of a buffer that begins at `start`.
fn within(range: &Range<u64>, start: u64) -> Range<usize> {
    usize::try_from(range.start - start).unwrap()..usize::try_from(range.end - start).unwrap()
}

#[test]
fn a_disk_that_shrinks_and_grows_again_has_zeroes_there() {
    let mut disk = Disk::new(10_000);
    disk.write(4000, &[7; 6000]);
    disk.resize(5000);
    disk.resize(10_000);
    let mut should = Disk::new(10_000);
    should.write(4000, &[7; 1000]);
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = vec![0; 10_000];
    bytes[4000..5000].fill(7);
    std::fs::write(file.path(), &bytes).unwrap();
    assert_eq!(disk.first_difference(file.path()), None);
    assert_eq!(should.first_difference(file.path()), None);
    bytes[9999] = 1;
    std::fs::write(file.path(), &bytes).unwrap();
    assert_eq!(disk.first_difference(file.path()), Some(9999));
}
