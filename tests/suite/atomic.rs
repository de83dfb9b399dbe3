//! Crashes during changes that are all or nothing: whatever is kept of the writes, the image is the old one or the new one.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use qmpbackup::qcow2::{self, Image, Repair, Writer, repair};
use qmpbackup::storage::{MemoryStorage, WritableStorage};

use crate::check::{Disk, folder, put};
use crate::repair::content;
use crate::support::prng::Prng;
use crate::support::recorder::Recorder;
use crate::support::seeds::are_many;

const MIB: u64 = 1 << 20;

type Content = Option<Vec<Option<Vec<u8>>>>;

/// What there is to see: the disk, and each snapshot with its ID, name and bytes.
#[derive(PartialEq, Eq)]
struct Sight {
    disk: Content,
    snapshots: Vec<(String, String, Content)>,
}

fn look(bytes: &[u8]) -> Sight {
    let image = Image::open(Arc::new(MemoryStorage::new(bytes.to_vec()))).unwrap();
    let snapshots = image.snapshots().unwrap().into_iter().map(|snapshot| {
        let mut alone = bytes.to_vec();
        alone[36..40].copy_from_slice(&u32::try_from(snapshot.l1.entries).unwrap().to_be_bytes());
        put(&mut alone, 40, snapshot.l1.offset.0);
        put(&mut alone, 24, snapshot.disk_size.unwrap());
        (snapshot.id, snapshot.name, content(&alone))
    });
    Sight { snapshots: snapshots.collect(), disk: content(bytes) }
}

/// Does the work and looks at many states that a crash could have left.
fn crash(name: &str, before: &[u8], is_clean: bool, work: impl FnOnce(Arc<dyn WritableStorage>)) -> Vec<u8> {
    let recorder = Arc::new(Recorder::new(before.to_vec()));
    work(Arc::clone(&recorder) as Arc<dyn WritableStorage>);
    let steps = recorder.steps().len();
    let mut prng = Prng::stream(steps as u64, 1);
    let after = recorder.crashed(steps, &mut prng);
    let [old, new] = [look(before), look(&after)];
    let check =
        |bytes: &[u8]| qcow2::check(&MemoryStorage::new(bytes.to_vec()), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(check(&after).findings, [], "{name}");
    let mut seen = [0, 0];
    for round in 0..if are_many() { 2000 } else { 70 } {
        // the last writes are those that count
        let last = steps as u64 + 1;
        let done = last - 1 - if round % 3 == 0 { prng.below(4) } else { prng.below(last) };
        let done = usize::try_from(done).unwrap();
        let state = recorder.crashed(done, &mut prng);
        let report = check(&state);
        let sight = look(&state);
        let is_new = state[..512] == after[..512];
        assert!(is_new || state[..512] == before[..512], "{name}: a header that nobody wrote at step {done}");
        assert!(sight == *if is_new { &new } else { &old }, "{name}: neither old nor new at step {done}");
        if is_clean || is_new {
            assert_eq!(report.corruptions(), 0, "{name}: step {done} of {steps}: {report:#?}");
        }
        seen[usize::from(is_new)] += 1;
    }
    assert!(seen[0] > 5 && seen[1] > 5, "{name}: {seen:?} old and new");
    after
}

fn image(options: &str) -> Vec<u8> {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "atomic", 2 * MIB, options);
    disk.io("write -P 1", 8, 100 << 10).snapshot("-c", "one").io("write -P 2", 8, 50 << 10).io("write -z", 3, 50 << 10);
    disk.bytes()
}

fn snapshots_come_and_go(options: &str) {
    let before = image(options);
    let open = |storage| Writer::open(storage).unwrap();
    let created = crash("create", &before, true, |storage| {
        open(storage).create_snapshot("two", Duration::ZERO).unwrap();
    });
    let applied = crash("apply", &created, true, |storage| open(storage).apply_snapshot("one").unwrap());
    let deleted = crash("delete", &applied, true, |storage| open(storage).delete_snapshot("one").unwrap());
    crash("delete the last", &deleted, true, |storage| open(storage).delete_snapshot("two").unwrap());
}

#[test]
fn a_crash_leaves_a_snapshot_or_none() {
    snapshots_come_and_go("cluster_size=4096");
    snapshots_come_and_go("cluster_size=512,refcount_bits=64");
}

#[test]
fn a_crash_leaves_a_snapshot_or_none_with_subclusters_and_in_version_2() {
    snapshots_come_and_go("cluster_size=16384,extended_l2=on");
    snapshots_come_and_go("cluster_size=1024,compat=0.10");
}

#[test]
fn a_crash_leaves_a_repair_or_none() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "dirty", 2 * MIB, "lazy_refcounts=on,cluster_size=4096");
    disk.io("write -P 1", 8, 100 << 10).snapshot("-c", "one");
    disk.write_unclosed("write -P 2 1M 300k");
    crash("repair", &disk.bytes(), false, |storage| {
        repair(&storage, Repair::All, &mut |_| ControlFlow::Continue(())).unwrap();
    });
}
