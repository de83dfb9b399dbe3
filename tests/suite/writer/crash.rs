//! What a crash, or a write that fails, may leave of an image: leaks at most, and all that was flushed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qmpbackup::qcow2::{Error, Writer};
use qmpbackup::storage::{MemoryStorage, Storage, WritableStorage};

use crate::support::prng::Prng;
use crate::support::recorder::{Recorder, Step};
use crate::support::seeds::{self, shared_seeds};
use crate::support::tools;
use crate::support::writer_base::{Base, assert_same};
use crate::support::writer_ops::{Draw, Op, check, read};

const SECTOR: usize = 512;

shared_seeds! {
    judge, 48;
    a_crash_leaks_at_most_0 = 0,
    a_crash_leaks_at_most_1 = 1,
    a_crash_leaks_at_most_2 = 2,
    a_crash_leaks_at_most_3 = 3,
    a_crash_leaks_at_most_4 = 4,
    a_crash_leaks_at_most_5 = 5,
    a_crash_leaks_at_most_6 = 6,
    a_crash_leaks_at_most_7 = 7,
}

/// The disk after each operation, and how many steps the storage had seen by then.
struct History {
    states: Vec<(usize, Vec<u8>)>,
    /// The states that were flushed.
    flushed: Vec<usize>,
}

impl History {
    fn new(disk: Vec<u8>) -> Self {
        Self { states: vec![(0, disk)], flushed: vec![0] }
    }

    fn add(&mut self, op: &Op, steps: usize, cluster: u64) {
        let mut disk = self.states.last().unwrap().1.clone();
        op.apply(&mut disk, cluster);
        self.states.push((steps, disk));
        if matches!(op, Op::Flush) {
            self.flushed.push(self.states.len() - 1);
        }
    }

    /// Each sector is as it was flushed, or as something made it that was asked since.
    fn assert_holds(&self, is: &[u8], steps: usize, said: &str) {
        let flushed = *self.flushed.iter().rfind(|state| self.states[**state].0 <= steps).unwrap();
        // the operation in which the crash came counts as well
        let begun = self.states.iter().position(|(done, _)| *done > steps).unwrap_or(self.states.len() - 1);
        let may_be = &self.states[flushed..=begun.max(flushed)];
        assert_eq!(is.len(), self.states[0].1.len());
        for (number, sector) in is.chunks(SECTOR).enumerate() {
            let range = number * SECTOR..number * SECTOR + sector.len();
            let is_right = may_be.iter().any(|(_, disk)| &disk[range.clone()] == sector);
            assert!(is_right, "sector {number} after {steps} steps, flushed state {flushed} of {begun}\n{said}");
        }
    }
}

fn draw(base: &Base) -> Draw {
    Draw {
        size: base.disk.len() as u64,
        cluster: base.knobs.cluster_size(),
        unit: SECTOR as u64,
        longest: 3 * base.knobs.cluster_size().min(1 << 14),
    }
}

fn judge(seed: u64) {
    let base = Base::make(seed, 15, 256 << 10);
    let prng = &mut Prng::stream(seed, 22);
    let recorder = Arc::new(Recorder::new(base.image.clone()));
    let mut history = History::new(base.disk.clone());
    let mut writer = Writer::open(recorder.clone()).unwrap();
    let mut asked = Vec::new();
    for _ in 0..prng.between(5, 60) {
        let op = draw(&base).op(prng);
        op.ask(&mut writer).unwrap();
        asked.push(format!(
            "{:?} -> {}",
            op.changes(history.states[0].1.len() as u64, base.knobs.cluster_size())
                .map(|(range, bytes)| (range, bytes.is_some())),
            recorder.count()
        ));
        history.add(&op, recorder.count(), base.knobs.cluster_size());
    }
    writer.finish().unwrap();
    history.add(&Op::Flush, recorder.count(), base.knobs.cluster_size());
    let said = format!("{}\n{}", base.said(), asked.join("\n"));
    let count = recorder.count();
    let moments = if seeds::are_many() { 400 } else { 60 };
    for number in 0..moments {
        let steps = if count <= moments { number.min(count) } else { prng.below(count as u64 + 1) as usize };
        let left = recorder.crashed(steps, prng);
        assert_only_leaks(&left, &said);
        let disk = read(&left);
        history.assert_holds(&disk, steps, &said);
        if number % 20 == 19 {
            base.judge(&left, &disk, true);
        }
        go_on(&base, prng, left, disk, &said);
    }
}

fn assert_only_leaks(image: &[u8], said: &str) {
    let report = check(image);
    assert_eq!(report.corruptions(), 0, "{report:?}\n{said}");
}

/// The next writer does not care about what the crash has left.
fn go_on(base: &Base, prng: &mut Prng, image: Vec<u8>, mut disk: Vec<u8>, said: &str) {
    let storage = Arc::new(MemoryStorage::new(image));
    let mut writer = Writer::open(storage.clone()).unwrap();
    for _ in 0..prng.below(8) {
        let op = draw(base).op(prng);
        op.ask(&mut writer).unwrap();
        op.apply(&mut disk, base.knobs.cluster_size());
    }
    writer.finish().unwrap();
    let image = storage.to_vec();
    assert_only_leaks(&image, said);
    assert_same(&read(&image), &disk, said);
}

/// A storage that fails at the n-th change, and counts those that somebody tries after it.
pub(crate) struct Faulty {
    pub(crate) inner: Recorder,
    left: AtomicUsize,
    after: AtomicUsize,
    kind: io::ErrorKind,
}

impl Faulty {
    pub(crate) fn new(image: Vec<u8>, fails: usize, kind: io::ErrorKind) -> Self {
        Self { inner: Recorder::new(image), left: fails.into(), after: 0.into(), kind }
    }

    fn step(&self) -> io::Result<()> {
        match self.left.load(Ordering::SeqCst) {
            0 => {
                self.after.fetch_add(1, Ordering::SeqCst);
                Err(self.kind.into())
            }
            left => {
                self.left.store(left - 1, Ordering::SeqCst);
                Ok(())
            }
        }
    }
}

impl Storage for Faulty {
    fn length(&self) -> u64 {
        self.inner.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_exact_at(buffer, offset)
    }
}

impl WritableStorage for Faulty {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Err(error) = self.step() {
            // some of it may be there
            self.inner.write_all_at(&bytes[..bytes.len() / 2 / SECTOR * SECTOR], offset)?;
            return Err(error);
        }
        self.inner.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.step()?;
        self.inner.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.inner.sync()
    }
}

/// With clusters of 512 bytes and counts of eight, a refcount table of one cluster counts 2 MiB.
#[test]
fn a_crash_while_the_refcount_table_moves_leaks_at_most() {
    let folder = tempfile::tempdir().unwrap();
    let mut create = tools::qemu_img();
    create.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "image", "4M"]);
    tools::run(create.current_dir(folder.path()));
    let recorder = Arc::new(Recorder::new(std::fs::read(folder.path().join("image")).unwrap()));
    let mut writer = Writer::open(recorder.clone()).unwrap();
    let before = writer.header().refcount_table;
    let mut history = History::new(vec![0; 4 << 20]);
    for start in (0..4 << 20).step_by(1 << 20) {
        for op in [Op::Write(start..start + (1 << 20), vec![start.to_be_bytes()[5] + 1; 1 << 20]), Op::Flush] {
            op.ask(&mut writer).unwrap();
            history.add(&op, recorder.count(), 512);
        }
    }
    assert_ne!(writer.header().refcount_table, before);
    let prng = &mut Prng::stream(1, 25);
    let steps = recorder.steps();
    // the header is written where the table has moved
    let moves = (0..steps.len()).filter(|at| matches!(steps[*at], Step::Write { offset: 0, .. }));
    let near: Vec<usize> = moves.flat_map(|at| at.saturating_sub(3)..(at + 6).min(steps.len())).collect();
    assert!(!near.is_empty());
    for (number, done) in near.iter().cycle().take(120).enumerate() {
        // now and then any other moment
        let done = if number % 4 == 3 { prng.below(steps.len() as u64) as usize } else { *done };
        let left = recorder.crashed(done, prng);
        assert_only_leaks(&left, "");
        history.assert_holds(&read(&left), done, "");
    }
}

#[test]
fn after_a_write_that_fails_nothing_is_written_and_a_crash_would_have_left_no_more() {
    let seeds = if seeds::are_many() { 1000..1200 } else { 1000..1008 };
    for seed in seeds {
        let base = Base::make(seed, 14, 64 << 10);
        let ops: Vec<Op> = {
            let prng = &mut Prng::stream(seed, 23);
            (0..25).map(|_| draw(&base).op(prng)).collect()
        };
        let mut fails = 0;
        while let Some(()) = fail_at(&base, &ops, fails, seed) {
            fails += 1;
        }
        assert!(fails > 3, "{fails}");
    }
}

/// `None` where all was done before it could fail.
fn fail_at(base: &Base, ops: &[Op], fails: usize, seed: u64) -> Option<()> {
    let prng = &mut Prng::stream(seed, fails as u64);
    let kind = if fails % 2 == 0 { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
    let storage = Arc::new(Faulty::new(base.image.clone(), fails, kind));
    let mut writer = Writer::open(storage.clone()).unwrap();
    let mut history = History::new(base.disk.clone());
    let mut all = ops.iter().chain([&Op::Flush]);
    let cluster = base.knobs.cluster_size();
    let (op, error) = loop {
        let op = all.next()?;
        match op.ask(&mut writer) {
            Ok(_) => history.add(op, storage.inner.count(), cluster),
            Err(error) => break (op, error),
        }
    };
    assert!(
        matches!(&error, Error::Write { source, .. } | Error::Sync { source } if source.kind() == kind),
        "{error:?}"
    );
    let own_write = matches!(op, Op::Allocate(..)) && matches!(error, Error::Write { what: "guest data", .. });
    let begun = match op {
        // a flush that failed has not flushed, but it may have
        Op::Flush => &Op::Read(0..0),
        op => op,
    };
    history.add(begun, usize::MAX, cluster);
    let tried = storage.after.load(Ordering::SeqCst);
    assert_eq!(tried, 1);
    // the writer knows nothing of what its caller writes by itself
    if !own_write {
        for op in ops.iter().filter(|op| op.changes(base.disk.len() as u64, cluster).is_some()) {
            let again = op.ask(&mut writer);
            let silent = matches!(again, Ok(_) | Err(Error::Failed));
            assert!(silent, "{op:?}: {again:?}");
        }
        assert!(matches!(writer.flush(), Err(Error::Failed)));
        assert_eq!(storage.after.load(Ordering::SeqCst), tried);
        assert!(matches!(writer.finish(), Err(Error::Failed)));
    }
    let steps = storage.inner.count();
    for left in [storage.inner.now(), storage.inner.crashed(steps, prng)] {
        assert_only_leaks(&left, base.said());
        let disk = read(&left);
        history.assert_holds(&disk, steps, base.said());
        go_on(base, prng, left, disk, base.said());
    }
    Some(())
}
