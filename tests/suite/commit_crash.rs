//! Crashes and failing storages while INCs are written into their FULL: what is left holds the restore points that it must
//! hold, and the work done again ends right.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use qmpbackup::chain::FormatHint;
use qmpbackup::qcow2::{self, Repair, Writer};
use qmpbackup::restore::{
    Error, FULL_SNAPSHOT, Layers, Merge, MergeOptions, Output, OutputFormat, Silent, Source, apply_layers,
};
use qmpbackup::storage::{MemoryStorage, Storage, WritableStorage};

use crate::support::edited::{Bench, assert_same_disk, faults, memory, read};
use crate::support::oracle::Oracle;
use crate::support::prng::Prng;
use crate::support::random_chain::Chain;
use crate::support::recorder::Recorder;
use crate::support::seeds::{Told, are_many, shared_seeds};
use crate::support::sparse;
use crate::support::world::Sight;
use crate::writer::crash::Faulty;

/// Whole disks and images lie in memory here.
const LARGEST: u64 = 12 << 20;

type Commit = fn(&Work, Arc<dyn WritableStorage>) -> Result<(), Error>;

/// A chain, and INCs of it that are to be written into their FULL.
struct Work {
    chain: Chain,
    oracle: Oracle,
    full: usize,
    until: usize,
    image: Vec<u8>,
    path: PathBuf,
}

impl Work {
    /// `None` where the chain has no INC, or is too large.
    fn make(seed: u64, prng: &mut Prng) -> Option<Self> {
        let chain = Chain::generate(seed);
        let points: Vec<usize> = (0..chain.layers.len()).filter(|number| !chain.layers[*number].full).collect();
        let until = *points.get(usize::try_from(prng.below(points.len().max(1) as u64)).unwrap())?;
        let full = until + 1 - chain.until(until).len();
        let path = chain.dir.join(&chain.layers[full].name);
        let is_large = chain.layers.iter().any(|layer| layer.alone.size() > LARGEST);
        if is_large || path.metadata().unwrap().len() > LARGEST {
            return None;
        }
        let storage: Arc<dyn WritableStorage> = memory(&std::fs::read(&path).unwrap());
        if chain.layers[full].knobs.killed {
            qcow2::repair(&storage, Repair::All, &mut |_| ControlFlow::Continue(())).unwrap();
        }
        let mut image = vec![0; usize::try_from(storage.length()).unwrap()];
        storage.read_exact_at(&mut image, 0).unwrap();
        Some(Self { oracle: Oracle::new(&chain), chain, full, until, image, path })
    }

    fn layers(&self, numbers: std::ops::RangeInclusive<usize>) -> Layers {
        let source = |layer: &crate::support::layer::Layer| Source {
            path: self.chain.dir.join(&layer.name),
            format: FormatHint::Unknown,
            size: None,
        };
        Layers::open(&self.chain.layers[numbers].iter().map(source).collect::<Vec<_>>()).unwrap()
    }

    fn point(&self, number: usize) -> Vec<u8> {
        std::fs::read(self.oracle.raw(&self.chain, number)).unwrap()
    }

    /// What a commit does to the FULL.
    fn commit(&self, storage: Arc<dyn WritableStorage>) -> Result<(), Error> {
        let failed = |source| Error::Image { path: self.path.clone(), source };
        let mut writer = Writer::open(storage).map_err(failed)?;
        let done = apply_layers(&self.layers(self.full + 1..=self.until), &self.path, &mut writer, &Silent);
        if let Err(error) = done {
            // places that did not get their bytes stay out of the image
            let refused = matches!(&error, Error::Image { source: qcow2::Error::NotWritable { .. }, .. });
            assert!(refused || matches!(writer.finish(), Err(qcow2::Error::Failed)), "{error:?}");
            return Err(error);
        }
        writer.finish().map_err(failed)
    }

    /// The same with a snapshot of each restore point, from that on that is not there yet.
    fn commit_with_snapshots(&self, storage: Arc<dyn WritableStorage>) -> Result<(), Error> {
        let failed = |source| Error::Image { path: self.path.clone(), source };
        let mut writer = Writer::open(storage).map_err(failed)?;
        let there: Vec<String> =
            writer.snapshots().map_err(failed)?.into_iter().map(|snapshot| snapshot.name).collect();
        if !there.iter().any(|name| name == FULL_SNAPSHOT) {
            writer.create_snapshot(FULL_SNAPSHOT, Duration::ZERO).map_err(failed)?;
        }
        for number in self.full + 1..=self.until {
            let name = point_name(number);
            if !there.contains(&name) {
                apply_layers(&self.layers(number..=number), &self.path, &mut writer, &Silent)?;
                writer.create_snapshot(&name, Duration::ZERO).map_err(failed)?;
            }
        }
        writer.finish().map_err(failed)
    }

    /// The committed restore point and those behind it, by a merge over what is left of the FULL.
    fn assert_points(&self, left: &[u8]) {
        let path = self.chain.room("left").join(&self.chain.layers[self.full].name);
        std::fs::write(&path, left).unwrap();
        let behind = (self.until + 1..self.chain.layers.len()).take_while(|at| !self.chain.layers[*at].full);
        for number in std::iter::once(self.until).chain(behind) {
            let incs = &self.chain.layers[self.full + 1..=number];
            let incs = incs.iter().map(|layer| self.chain.dir.join(&layer.name));
            let sources: Vec<Source> = std::iter::once(path.clone()).chain(incs).map(Source::new).collect();
            let out = path.with_file_name("merged.raw");
            let options =
                MergeOptions { replace: true, ..MergeOptions::new(Output::File(out.clone()), OutputFormat::Raw) };
            let merge = Merge::plan(Layers::open(&sources).unwrap(), options, &Silent).unwrap();
            merge.check(&Silent).unwrap();
            merge.run(&Silent).unwrap();
            sparse::assert_same(&out, &self.oracle.raw(&self.chain, number), &self.chain.layers[number].point);
        }
    }

    fn assert_ended(&self, storage: &MemoryStorage, what: &str) {
        let image = storage.to_vec();
        assert_eq!(faults(&image).0, 0, "{what}");
        assert_same_disk(&read(&image), &self.point(self.until), what);
    }

    /// Which snapshots there must be, and what is in them: those of the FULL, and those of the commit in their order.
    fn assert_snapshots(&self, left: &[u8], points: &BTreeMap<String, Vec<u8>>, what: &str) -> usize {
        let before = Sight::of(&self.image, &[]).snapshots;
        let mut snapshots = Sight::of(left, &[]).snapshots;
        let made = snapshots.split_off(before.len());
        for (is, should) in snapshots.iter().zip(&before) {
            assert_eq!((&is.id, &is.name), (&should.id, &should.name), "{what}");
            assert_same_disk(&is.disk.bytes, &should.disk.bytes, what);
        }
        let names = std::iter::once(FULL_SNAPSHOT.to_owned()).chain((self.full + 1..=self.until).map(point_name));
        for (is, name) in made.iter().zip(names) {
            assert_eq!(is.name, name, "{what}");
            assert_same_disk(&is.disk.bytes, &points[&name], &format!("{what}: {name}"));
        }
        made.len()
    }

    fn points(&self) -> BTreeMap<String, Vec<u8>> {
        let full = std::iter::once((FULL_SNAPSHOT.to_owned(), self.point(self.full)));
        full.chain((self.full + 1..=self.until).map(|number| (point_name(number), self.point(number)))).collect()
    }
}

fn point_name(number: usize) -> String {
    format!("point {number}")
}

/// Moments of all steps, or some of them.
fn moments(count: usize, most: usize, prng: &mut Prng) -> Vec<usize> {
    if count < most {
        return (0..=count).collect();
    }
    (0..most).map(|_| usize::try_from(prng.below(count as u64 + 1)).unwrap()).collect()
}

fn a_crash_amid_a_commit(seed: u64) {
    let prng = &mut Prng::stream(seed, 93);
    let Some(work) = Work::make(seed, prng) else { return };
    let _told = Told(&work.chain);
    let recorder = Arc::new(Recorder::new(work.image.clone()));
    if let Err(error) = work.commit(recorder.clone()) {
        // disks of snapshots whose size nobody could tell
        assert!(!work.chain.layers[work.full].knobs.version_3, "{error}: {error:?}");
        assert!(recorder.now() == work.image);
        return;
    }
    work.assert_ended(&MemoryStorage::new(recorder.now()), "at once");
    for (number, steps) in moments(recorder.count(), if are_many() { 150 } else { 16 }, prng).into_iter().enumerate() {
        let what = format!("after {steps} of {} steps", recorder.count());
        let left = recorder.crashed(steps, prng);
        assert_eq!(faults(&left).0, 0, "{what}");
        if number % 5 == 0 {
            work.assert_points(&left);
        }
        let again = memory(&left);
        work.commit(again.clone()).unwrap_or_else(|error| panic!("{what}: {error}: {error:?}"));
        work.assert_ended(&again, &what);
    }
}

shared_seeds! {
    a_crash_amid_a_commit, 16;
    a_commit_that_crashed_is_done_again_0 = 0, a_commit_that_crashed_is_done_again_1 = 1,
    a_commit_that_crashed_is_done_again_2 = 2, a_commit_that_crashed_is_done_again_3 = 3,
    a_commit_that_crashed_is_done_again_4 = 4, a_commit_that_crashed_is_done_again_5 = 5,
    a_commit_that_crashed_is_done_again_6 = 6, a_commit_that_crashed_is_done_again_7 = 7,
}

fn a_crash_amid_snapshots(seed: u64) {
    let prng = &mut Prng::stream(seed, 94);
    let Some(work) = Work::make(seed, prng) else { return };
    let _told = Told(&work.chain);
    let recorder = Arc::new(Recorder::new(work.image.clone()));
    if let Err(error) = work.commit_with_snapshots(recorder.clone()) {
        let knobs = &work.chain.layers[work.full].knobs;
        assert!(!knobs.version_3 || knobs.refcount_bits < 16, "{error}: {error:?}");
        return;
    }
    let points = work.points();
    work.assert_ended(&MemoryStorage::new(recorder.now()), "at once");
    for (number, steps) in moments(recorder.count(), if are_many() { 150 } else { 12 }, prng).into_iter().enumerate() {
        let what = format!("after {steps} of {} steps", recorder.count());
        let left = recorder.crashed(steps, prng);
        assert_eq!(faults(&left).0, 0, "{what}");
        work.assert_snapshots(&left, &points, &what);
        if number % 8 == 0 {
            work.assert_points(&left);
        }
        let again = memory(&left);
        work.commit_with_snapshots(again.clone()).unwrap_or_else(|error| panic!("{what}: {error}: {error:?}"));
        work.assert_ended(&again, &what);
        assert_eq!(work.assert_snapshots(&again.to_vec(), &points, &what), points.len(), "{what}");
    }
}

shared_seeds! {
    a_crash_amid_snapshots, 8;
    each_snapshot_of_a_commit_that_crashed_is_whole_0 = 0, each_snapshot_of_a_commit_that_crashed_is_whole_1 = 1,
    each_snapshot_of_a_commit_that_crashed_is_whole_2 = 2, each_snapshot_of_a_commit_that_crashed_is_whole_3 = 3,
    each_snapshot_of_a_commit_that_crashed_is_whole_4 = 4, each_snapshot_of_a_commit_that_crashed_is_whole_5 = 5,
    each_snapshot_of_a_commit_that_crashed_is_whole_6 = 6, each_snapshot_of_a_commit_that_crashed_is_whole_7 = 7,
}

fn is_of(error: &Error, kind: io::ErrorKind) -> bool {
    let (Error::Write { source, .. }
    | Error::Image { source: qcow2::Error::Write { source, .. } | qcow2::Error::Sync { source }, .. }) = error
    else {
        return false;
    };
    source.kind() == kind
}

#[test]
fn a_commit_that_fails_anywhere_is_done_again() {
    for seed in if are_many() { 0..60 } else { 0..4 } {
        let prng = &mut Prng::stream(seed, 95);
        let Some(work) = Work::make(seed, prng) else { continue };
        let _told = Told(&work.chain);
        for commit in [Work::commit as Commit, Work::commit_with_snapshots] {
            let recorder = Arc::new(Recorder::new(work.image.clone()));
            if commit(&work, recorder.clone()).is_err() {
                continue;
            }
            let count = recorder.count();
            assert!(count > 0);
            for fails in moments(count - 1, if are_many() { 100 } else { 8 }, prng) {
                let fails = fails.min(count - 1);
                let kind = *prng.pick(&[io::ErrorKind::StorageFull, io::ErrorKind::Other]);
                let storage = Arc::new(Faulty::new(work.image.clone(), fails, kind));
                let error = commit(&work, storage.clone()).unwrap_err();
                assert!(is_of(&error, kind), "{error}: {error:?}");
                for left in [storage.inner.now(), storage.inner.crashed(storage.inner.count(), prng)] {
                    let what = format!("step {fails} of {count} fails");
                    assert_eq!(faults(&left).0, 0, "{what}");
                    let again = memory(&left);
                    commit(&work, again.clone()).unwrap_or_else(|error| panic!("{what}: {error}: {error:?}"));
                    work.assert_ended(&again, &what);
                }
            }
        }
    }
}

/// Slices enough for all threads, in several batches.
#[test]
fn any_number_of_threads_makes_the_same_image() {
    let bench = Bench::new();
    for (number, name) in ["full", "inc"].into_iter().enumerate() {
        bench.create(name, "cluster_size=64k", 4 << 30);
        let write =
            |at: u64| format!("write -q -P {} {} 100k", at % 200 + 1, at * (29 << 20) + (7 << 20) * number as u64);
        let writes: Vec<String> = (0..130).map(write).collect();
        bench.io(name, &writes.iter().map(String::as_str).collect::<Vec<_>>());
    }
    bench.io("inc", &["write -q -z 1G 64M"]);
    let layers = Layers::open(&[Source::new(bench.path("inc"))]).unwrap();
    let images = [1, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let storage = memory(&bench.load("full"));
        let mut writer = Writer::open(storage.clone()).unwrap();
        pool.install(|| apply_layers(&layers, &bench.path("full"), &mut writer, &Silent)).unwrap();
        writer.finish().unwrap();
        storage.to_vec()
    });
    assert!(images[0] == images[1]);
    bench.assert_clean(&images[0], "large");
}
