//! A storage that remembers every write and sync, so that each state can be made again that a crash could have left.

use std::io;
use std::sync::{Mutex, PoisonError};

use qmpbackup::storage::{MemoryStorage, Storage, WritableStorage};

use crate::support::prng::Prng;

/// What a power cut leaves whole.
const SECTOR: usize = 512;

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write { offset: u64, bytes: Vec<u8> },
    Length(u64),
    Sync,
}

/// An image in memory, what it was at first, and all that was done to it.
#[derive(Debug)]
pub(crate) struct Recorder {
    before: Vec<u8>,
    now: MemoryStorage,
    steps: Mutex<Vec<Step>>,
}

impl Recorder {
    pub(crate) fn new(before: Vec<u8>) -> Self {
        Self { now: MemoryStorage::new(before.clone()), before, steps: Mutex::default() }
    }

    pub(crate) fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many steps there were.
    pub(crate) fn count(&self) -> usize {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The image as it is.
    pub(crate) fn now(&self) -> Vec<u8> {
        self.now.to_vec()
    }

    /// What a crash after the first `done` steps may have left: all up to the last sync, and of what was written since,
    /// sector by sector, what chance says.
    pub(crate) fn crashed(&self, done: usize, prng: &mut Prng) -> Vec<u8> {
        let steps = self.steps();
        let synced = steps[..done].iter().rposition(|step| matches!(step, Step::Sync)).map_or(0, |at| at + 1);
        let image = MemoryStorage::new(self.before.clone());
        steps[..synced].iter().for_each(|step| redo(&image, step));
        // mostly kept, mostly lost, or half and half
        let odds = *prng.pick(&[0, 1, 8, 15, 16]);
        let mut kept = || prng.below(16) < odds;
        for step in &steps[synced..done] {
            match step {
                Step::Write { offset, bytes } => {
                    for (offset, bytes) in sectors(*offset, bytes) {
                        if kept() {
                            redo(&image, &Step::Write { offset, bytes: bytes.to_vec() });
                        }
                    }
                }
                Step::Length(_) if kept() => redo(&image, step),
                Step::Length(_) | Step::Sync => {}
            }
        }
        image.to_vec()
    }

    fn record(&self, step: Step) {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).push(step);
    }
}

/// The parts of a write that a crash keeps or loses as a whole.
fn sectors(mut offset: u64, mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let mut parts = Vec::new();
    while !bytes.is_empty() {
        let rest = SECTOR - usize::try_from(offset % SECTOR as u64).unwrap();
        let (part, behind) = bytes.split_at(rest.min(bytes.len()));
        parts.push((offset, part));
        offset += part.len() as u64;
        bytes = behind;
    }
    parts
}

fn redo(image: &MemoryStorage, step: &Step) {
    match step {
        Step::Write { offset, bytes } => image.write_all_at(bytes, *offset).unwrap(),
        Step::Length(length) => image.set_length(*length).unwrap(),
        Step::Sync => {}
    }
}

impl Storage for Recorder {
    fn length(&self) -> u64 {
        self.now.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.now.read_exact_at(buffer, offset)
    }
}

impl WritableStorage for Recorder {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.record(Step::Write { offset, bytes: bytes.to_vec() });
        self.now.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.record(Step::Length(length));
        self.now.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.record(Step::Sync);
        self.now.sync()
    }
}
