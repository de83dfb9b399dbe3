//! Reads what was chosen and compares it with the checksums; checks the tables meanwhile.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::due::Chosen;
use super::flaw::Flaw;
use super::look::{Looked, Subject, Sums};
use crate::chain::{BLOCK, Checksums, ZERO_BLOCK_SUM};
use crate::qcow2::{self, Report};
use crate::restore::error::{Error, Result};
use crate::restore::layer::{Format, Layer};
use crate::restore::observer::{Observer, Uncounted, observed};
use crate::restore::slices;
use crate::restore::source;
use crate::storage::{FileStorage, Storage, to_usize};

/// Blocks that one thread takes at a time.
const ITEM: u64 = 64;

/// Blocks that are read at once: what is summed is still in the processor's cache.
const READ: u64 = 4;

/// Ranges of bad blocks that are kept of an image.
const KEPT: usize = 1 << 12;

/// What reading an image brought up.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) flaws: Vec<Flaw>,
    /// What is bad, in no order before it is [settled](Found::settle).
    pub(super) bad: Vec<Bad>,
    /// Blocks that are bad, too.
    pub(super) more: u64,
    /// Bytes that were compared.
    pub(super) compared: u64,
    /// Whether the tables were checked.
    pub(super) structure: bool,
}

impl Found {
    /// Puts what is bad in order; neighbours become one.
    pub(super) fn settle(&mut self) {
        let mut bad = std::mem::take(&mut self.bad);
        bad.sort_by_key(|bad| bad.blocks.start);
        for bad in bad {
            push(&mut self.bad, bad);
        }
    }
}

/// Blocks that are not what they were.
#[derive(Debug)]
pub(super) struct Bad {
    pub(super) blocks: Range<u64>,
    /// Where they cannot be read at all.
    pub(super) error: Option<io::Error>,
}

/// An image that is being read.
struct Opened<'a> {
    subject: &'a Subject<'a>,
    found: &'a Mutex<Found>,
    storage: Arc<FileStorage>,
    sums: Option<Checksums>,
}

/// Work for one thread.
pub(super) struct Item<'a> {
    image: Arc<Opened<'a>>,
    what: What,
}

enum What {
    Structure,
    Blocks(Range<u64>),
}

/// Opens an image, for as long as one of these is there.
pub(super) fn items<'a>(
    subject: &'a Subject<'a>,
    looked: &'a Looked,
    chosen: &'a Chosen,
    found: &'a Mutex<Found>,
) -> impl Iterator<Item = Item<'a>> + Send + use<'a> {
    let opened = if chosen.is_nothing() { None } else { open(subject, looked, found) };
    let structure = opened.clone().filter(|_| chosen.structure);
    let structure = structure.map(|image| Item { image, what: What::Structure });
    let blocks = opened.filter(|image| image.sums.is_some()).into_iter().flat_map(|image| {
        let parts = chosen.blocks.iter().flat_map(|blocks| slices::parts(blocks.clone(), ITEM));
        parts.map(move |blocks| Item { image: Arc::clone(&image), what: What::Blocks(blocks) })
    });
    structure.into_iter().chain(blocks)
}

fn open<'a>(subject: &'a Subject<'a>, looked: &Looked, found: &'a Mutex<Found>) -> Option<Arc<Opened<'a>>> {
    let flawed = |flaw| {
        lock(found).flaws.push(flaw);
        None
    };
    let storage = match source::open_locked(&subject.source()) {
        Ok(storage) => storage,
        Err(error) => return flawed(Flaw::Unreadable(error)),
    };
    let sums = match looked.sums.as_ref().map(|_| Checksums::open(&subject.image.path)).transpose() {
        Ok(sums) => sums.flatten(),
        Err(error) => return flawed(Flaw::Checksums(error)),
    };
    if storage.length() != looked.length || sums.as_ref().map(Sums::of) != looked.sums {
        return flawed(Flaw::Unreadable(Error::Changed));
    }
    Some(Arc::new(Opened { subject, found, storage, sums }))
}

fn lock(found: &Mutex<Found>) -> MutexGuard<'_, Found> {
    found.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Item<'_> {
    /// Does the work.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(super) fn run(self, buffer: &mut Vec<u8>, observer: &dyn Observer) -> Result<()> {
        match (self.what, &self.image.sums) {
            (What::Structure, _) => self.image.check(observer),
            (What::Blocks(blocks), Some(sums)) => self.image.compare(sums, blocks, buffer, observer),
            (What::Blocks(_), None) => Ok(()),
        }
    }
}

impl Opened<'_> {
    /// Checks the tables.
    fn check(&self, observer: &dyn Observer) -> Result<()> {
        // where there are checksums, the bytes count that are compared
        let observer: &dyn Observer = if self.sums.is_some() { &Uncounted(observer) } else { observer };
        let mut flaws = Vec::new();
        if self.subject.format == Format::Raw {
            observer.advance(self.storage.length());
            flaws.extend(self.fits().err().map(Flaw::Unreadable));
        } else {
            let path = &self.subject.image.path;
            let report = observed(observer, |each| qcow2::check(&*self.storage, each));
            match report.map_err(Error::image(path)) {
                Ok(report) => {
                    flaws.extend(judged(&report));
                    match self.fits() {
                        Err(error) if !report.is_corrupt() => flaws.push(Flaw::Unreadable(error)),
                        _ => {}
                    }
                }
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => flaws.push(Flaw::Unreadable(error)),
            }
        }
        let mut found = lock(self.found);
        found.structure = true;
        found.flaws.extend(flaws);
        Ok(())
    }

    /// Whether the disk has the size that the manifest says, and the backing name is that of the image before.
    fn fits(&self) -> Result<()> {
        // work that was broken off has changed either, or not
        if self.subject.in_work {
            return Ok(());
        }
        let path = self.subject.image.path.clone();
        let layer = Layer::new(path, self.storage.clone(), self.subject.format)?;
        source::check_size(&self.subject.source(), &layer)?;
        source::check_backing(self.subject.before, &layer)
    }

    /// Compares blocks with their checksums.
    fn compare(
        &self,
        sums: &Checksums,
        blocks: Range<u64>,
        buffer: &mut Vec<u8>,
        observer: &dyn Observer,
    ) -> Result<()> {
        let expected = match sums.read(blocks.clone()) {
            Ok(expected) => expected,
            Err(error) => {
                let flaws = &mut lock(self.found).flaws;
                if !flaws.iter().any(|flaw| matches!(flaw, Flaw::Checksums(_))) {
                    flaws.push(Flaw::Checksums(error));
                }
                return Ok(());
            }
        };
        let end = sums.length().min(self.storage.length());
        let bytes = |blocks: &Range<u64>| blocks.start * BLOCK..(blocks.end * BLOCK).min(end);
        let all = bytes(&blocks);
        let is_hole = self.storage.next_data_start(all.start).is_ok_and(|data| data.is_none_or(|data| data >= all.end));
        let (mut bad, mut compared) = (Vec::new(), 0);
        for (part, expected) in slices::parts(blocks, READ).zip(expected.chunks(to_usize(READ))) {
            observer.go_on()?;
            let mut sum = |blocks: &Range<u64>| self.sums(bytes(blocks), is_hole, buffer);
            // what cannot be read is looked for block by block
            let together = sum(&part);
            for (block, expected) in part.clone().zip(expected) {
                if sums.unsettled().contains(&block) {
                    continue;
                }
                compared += bytes(&(block..block + 1)).end - block * BLOCK;
                let is = match &together {
                    Ok(sums) => Ok(sums.get(to_usize(block - part.start)).copied()),
                    Err(_) => sum(&(block..block + 1)).map(|sums| sums.first().copied()),
                };
                let error = match is {
                    Ok(is) if is == Some(*expected) => continue,
                    is => is.err(),
                };
                push(&mut bad, Bad { blocks: block..block + 1, error });
            }
            let part = bytes(&part);
            observer.advance(part.end - part.start);
        }
        let mut found = lock(self.found);
        found.compared += compared;
        for bad in bad {
            if found.bad.len() < KEPT {
                found.bad.push(bad);
            } else {
                found.more += bad.blocks.end - bad.blocks.start;
            }
        }
        Ok(())
    }

    /// The checksums of the blocks in a range of the file.
    fn sums(&self, range: Range<u64>, is_hole: bool, buffer: &mut Vec<u8>) -> io::Result<Vec<u32>> {
        let length = to_usize(range.end - range.start);
        if is_hole && range.end - range.start == READ * BLOCK {
            return Ok(vec![*ZERO_BLOCK_SUM; to_usize(READ)]);
        }
        buffer.resize(buffer.len().max(length), 0);
        let bytes = buffer.get_mut(..length).unwrap_or_default();
        self.storage.read_exact_at(bytes, range.start)?;
        Ok(bytes.chunks(to_usize(BLOCK)).map(crc32fast::hash).collect())
    }
}

/// Adds blocks to a list, to the last ones where they are neighbours.
fn push(list: &mut Vec<Bad>, next: Bad) {
    let kind = |bad: &Bad| bad.error.as_ref().map(io::Error::kind);
    match list.last_mut() {
        Some(before) if before.blocks.end == next.blocks.start && kind(before) == kind(&next) => {
            before.blocks.end = next.blocks.end;
        }
        _ => list.push(next),
    }
}

fn judged(report: &Report) -> Vec<Flaw> {
    let mut flaws = Vec::new();
    if report.is_corrupt() {
        flaws.push(Flaw::Structure {
            errors: report.structure_errors,
            refcount_errors: report.refcount_errors,
            first: report.worst().cloned().map(Box::new),
        });
    } else if report.refcount_errors > 0 || report.dirty {
        flaws.push(Flaw::Stale);
    }
    flaws.extend(report.marked_corrupt.then_some(Flaw::MarkedCorrupt));
    flaws.extend(report.has_leaks().then_some(Flaw::Leaks(report.leaks)));
    flaws
}
