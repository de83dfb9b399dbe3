//! Repairs of images that were damaged on purpose or left dirty: `qemu-img check` is the judge.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use qmpbackup::qcow2::{self, Error, GuestOffset, Image, Reader, Repair, Repaired, Report, Writer, repair};
use qmpbackup::storage::{Access, FileStorage, MemoryStorage, Storage, WritableStorage};

use crate::check::{Disk, Map, Numbers, folder, judge, number, put};
use crate::support::program::{Ended, event};
use crate::support::seeds::are_many;

const MIB: u64 = 1 << 20;

fn check(storage: &dyn Storage) -> Report {
    qcow2::check(storage, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn repaired(storage: &Arc<MemoryStorage>, what: Repair) -> Repaired {
    let writable = Arc::clone(storage) as Arc<dyn WritableStorage>;
    repair(&writable, what, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// What a guest reads, piece by piece; `None` where it cannot.
pub(crate) fn content(bytes: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let image = Image::open(Arc::new(MemoryStorage::new(bytes.to_vec()))).ok()?;
    let mut reader = Reader::new(&image);
    let piece = image.header().geometry.cluster_size();
    let pieces = (0..image.size()).step_by(usize::try_from(piece).unwrap());
    let read = pieces.map(|start| {
        let mut buffer = vec![0; usize::try_from(piece.min(image.size() - start)).unwrap()];
        reader.read(&mut buffer, GuestOffset(start)).ok().map(|()| buffer)
    });
    Some(read.collect())
}

fn pokes() -> u64 {
    if are_many() { 2000 } else { 50 }
}

/// Whether only refcounts were poked.
fn is_refcount(what: &str) -> bool {
    what.split("; ").all(|what| what.starts_with("refcount") || what.starts_with("kind 5"))
}

fn damage_and_repair(disk: &Disk) {
    let sound = disk.bytes();
    let map = Map::of(&sound);
    let mut numbers = Numbers(sound.len() as u64 + 1);
    let path = disk.path.with_extension("repaired");
    let mut clean = 0;
    for _ in 0..pokes() {
        let mut bytes = sound.clone();
        let mut what = map.poke(&mut bytes, &mut numbers);
        if numbers.below(3) == 0 {
            what = format!("{what}; {}", map.poke(&mut bytes, &mut numbers));
        }
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let Repaired { before, after } = repaired(&storage, Repair::All);
        let now = storage.to_vec();
        let context = format!("{}: {what}\n{before:#?}\n{after:#?}", disk.name());
        assert_eq!(check(&storage), after, "{context}");
        if before == after {
            assert!(now == bytes, "nothing was repaired, but something written: {context}");
        } else {
            assert_eq!((after.leaks, after.refcount_errors, after.dirty), (0, 0, false), "{context}");
        }
        if is_refcount(&what) {
            assert_eq!(after.corruptions() + after.leaks, 0, "{context}");
        }
        if after.corruptions() + after.leaks == 0 {
            clean += 1;
            std::fs::write(&path, &now).unwrap();
            let judgement = judge(&path);
            assert!(judgement.opened, "{context}\n{judgement:#?}");
            assert_eq!((judgement.corruptions, judgement.leaks), (0, 0), "{context}\n{judgement:#?}");
        }
        // old and new are beside each other: but for the header nothing is overwritten, but by zeroes what nobody needs
        let mut sectors = now[512..bytes.len()].chunks(512).zip(bytes[512..].chunks(512));
        assert!(sectors.all(|(now, old)| now == old || now.iter().all(|byte| *byte == 0)), "{context}");
        assert!(content(&now) == content(&bytes), "a guest sees that something was repaired: {context}");
        let again = repaired(&storage, Repair::All);
        assert!(storage.to_vec() == now && again.after == after, "repaired twice: {context}\n{again:#?}");
    }
    assert!(clean > pokes() / 5, "only {clean} of {} were repaired", pokes());
}

#[test]
fn what_is_wrong_with_refcounts_is_made_right_and_nothing_else_changes() {
    let folder = folder();
    let kinds = [
        ("plain", "cluster_size=4096", true),
        ("extended", "cluster_size=16384,extended_l2=on", true),
        ("version-2", "cluster_size=4096,compat=0.10", false),
        ("refcount-2", "cluster_size=4096,refcount_bits=2", false),
        ("refcount-64", "cluster_size=1024,refcount_bits=64", true),
    ];
    for (name, options, bitmaps) in kinds {
        let mut disk = Disk::create(folder.path(), name, 4 * MIB, options);
        if bitmaps {
            disk.img(&["bitmap", "--add", "-g", "512", disk.name(), "first"]);
        }
        disk.io("write -P 1", 8, 100 << 10).io("write -z", 4, 50 << 10);
        disk.snapshot("-c", "one").io("write -P 2", 4, 50 << 10);
        damage_and_repair(&disk);
    }
}

#[test]
fn a_refcount_table_of_garbage_is_made_new() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "garbage", 4 * MIB, "cluster_size=4096");
    disk.io("write -P 1", 8, 100 << 10).snapshot("-c", "one").io("write -P 2", 4, 50 << 10);
    let sound = disk.bytes();
    let map = Map::of(&sound);
    let table = map.header.refcount_table.offset.0;
    let mut numbers = Numbers(3);
    for round in 0..10 {
        let mut bytes = sound.clone();
        match round {
            0 => bytes[48..56].copy_from_slice(&(1_u64 << 40).to_be_bytes()),
            1 => bytes[48..56].copy_from_slice(&0_u64.to_be_bytes()),
            2 => put(&mut bytes, table, 0),
            3 => put(&mut bytes, table, sound.len() as u64 + (1 << 20)),
            4 => put(&mut bytes, table, map.header.l1_table.offset.0),
            // nothing is there that it could count
            5 => put(&mut bytes, table + 511 * 8, 1),
            // there is none
            6 => bytes[56..60].fill(0),
            _ => (0..512).for_each(|index| put(&mut bytes, table + index * 8, numbers.below(u64::MAX))),
        }
        let storage = Arc::new(MemoryStorage::new(bytes));
        let Repaired { before, after } = repaired(&storage, Repair::All);
        assert!(before.corruptions() > 0, "{round}");
        assert_eq!(after.findings, [], "{round}: {before:#?}");
        std::fs::write(&disk.path, storage.to_vec()).unwrap();
        let judgement = judge(&disk.path);
        assert_eq!((judgement.corruptions, judgement.leaks), (0, 0), "{round}: {judgement:#?}");
        assert!(content(&storage.to_vec()) == content(&sound), "{round}");
    }
}

#[test]
fn a_refcount_block_that_is_data_too_is_left_to_the_data() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "overlap", 4 * MIB, "cluster_size=4096");
    disk.img(&["bench", "-q", "-w", "-c", "1", "-f", "qcow2", disk.name()]);
    let mut bytes = disk.bytes();
    let map = Map::of(&bytes);
    let block = number(&bytes, map.refcount_table[0]);
    // a guest cluster that was not allocated
    put(&mut bytes, map.l2.last().unwrap() + 80, block);
    let refcount = (block + block / 4096 * 2) as usize;
    bytes[refcount..refcount + 2].copy_from_slice(&2_u16.to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let Repaired { before, after } = repaired(&storage, Repair::All);
    assert_eq!((before.structure_errors, before.refcount_errors, before.leaks), (1, 0, 0), "{before:#?}");
    assert_eq!(after.findings, []);
    assert!(content(&storage.to_vec()) == content(&bytes));
    disk.io("read", 1, 512);
}

/// An image that a program with lazy refcounts did not close.
fn dirty(folder: &Path) -> Disk {
    let mut disk = Disk::create(folder, "dirty", 20 * MIB, "lazy_refcounts=on");
    disk.io("write -P 1", 5, 200 << 10).snapshot("-c", "one");
    disk.write_unclosed("write -P 2 10M 3M");
    disk
}

#[test]
fn a_dirty_image_is_clean_after_a_repair_of_all_and_untouched_by_one_of_leaks() {
    let folder = folder();
    let disk = dirty(folder.path());
    let bytes = disk.bytes();
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let leaks = repaired(&storage, Repair::Leaks);
    assert!(leaks.before.dirty && leaks.before == leaks.after && storage.to_vec() == bytes);
    assert!(leaks.before.refcount_errors > 0);
    let all = repaired(&storage, Repair::All);
    assert_eq!((all.after.dirty, &all.after.findings[..]), (false, &[][..]));
    assert!(content(&storage.to_vec()) == content(&bytes));
    std::fs::write(&disk.path, storage.to_vec()).unwrap();
    assert_eq!(judge(&disk.path).corruptions, 0);
    // and can be written to
    let mut writer = Writer::open(storage).unwrap();
    writer.delete_snapshot("one").unwrap();
    writer.finish().unwrap();
}

#[test]
fn bits_that_announce_damage_go_where_there_is_none() {
    let folder = folder();
    let disk = Disk::create(folder.path(), "marked", 4 * MIB, "cluster_size=4096");
    let sound = disk.bytes();
    for bits in 0..4 {
        let mut bytes = sound.clone();
        bytes[79] |= bits;
        let storage = Arc::new(MemoryStorage::new(bytes));
        let Repaired { before, after } = repaired(&storage, Repair::All);
        assert_eq!((before.dirty, before.marked_corrupt), (bits & 1 > 0, bits & 2 > 0));
        assert!(!after.dirty && !after.marked_corrupt);
        assert!(storage.to_vec() == sound, "nothing but a bit was to be changed");
    }
}

#[test]
fn leaks_are_given_back_where_nothing_else_is_wrong() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "leaks", 4 * MIB, "cluster_size=4096");
    disk.io("write -P 1", 8, 100 << 10);
    let mut bytes = disk.bytes();
    let map = Map::of(&bytes);
    put(&mut bytes, map.l2[0], 0);
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let Repaired { before, after } = repaired(&storage, Repair::Leaks);
    assert_eq!((before.leaks, before.corruptions(), after.findings.len()), (1, 0, 0));
    // with a dirty bit or a wrong flag, too, they are not touched
    let mut dirty = bytes.clone();
    dirty[79] |= 1;
    let storage = Arc::new(MemoryStorage::new(dirty.clone()));
    let Repaired { before, after } = repaired(&storage, Repair::Leaks);
    assert!(before == after && before.leaks == 1 && storage.to_vec() == dirty);
    let flagged = number(&bytes, map.l2[1]) ^ 1 << 63;
    put(&mut bytes, map.l2[1], flagged);
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let Repaired { before, after } = repaired(&storage, Repair::Leaks);
    assert!(before == after && before.leaks == 1 && storage.to_vec() == bytes);
}

#[test]
fn an_image_that_was_cut_is_not_made_longer_over_what_is_missing() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "cut", 4 * MIB, "cluster_size=4096");
    disk.io("write -P 1", 8, 100 << 10);
    let mut bytes = disk.bytes();
    let map = Map::of(&bytes);
    put(&mut bytes, map.refcount_table[0], 1);
    bytes.truncate(bytes.len() - 8192);
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let Repaired { before, after } = repaired(&storage, Repair::All);
    assert!(before.beyond_end && before == after && storage.to_vec() == bytes, "{before:#?}");
}

#[test]
fn clusters_are_not_given_back_while_nobody_knows_what_a_table_leads_to() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "lost", 4 * MIB, "cluster_size=4096");
    disk.img(&["bitmap", "--add", "-g", "512", disk.name(), "first"]);
    disk.io("write -P 1", 8, 100 << 10).snapshot("-c", "one");
    let sound = disk.bytes();
    let header = Map::of(&sound).header;
    let directory = header.extensions.bitmaps.unwrap().directory_offset.0;
    // the types of a bitmap, the L1 tables of a snapshot
    for (place, value) in [(directory + 16, 0x55), (header.snapshots_offset.0 + 7, 1)] {
        let mut bytes = sound.clone();
        bytes[place as usize] = value;
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let Repaired { before, after } = repaired(&storage, Repair::All);
        assert!(before.leaks > 0 && before == after && storage.to_vec() == bytes, "{before:#?}");
    }
}

/// A disk that is full after so many writes.
struct Full {
    image: MemoryStorage,
    left: AtomicI64,
}

impl Full {
    fn count(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::Relaxed) > 0 { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
}

impl Storage for Full {
    fn length(&self) -> u64 {
        self.image.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.image.read_exact_at(buffer, offset)
    }
}

impl WritableStorage for Full {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.count()?;
        self.image.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        // to become shorter needs no space
        if length > self.length() {
            self.count()?;
        }
        self.image.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

type Work = fn(Arc<dyn WritableStorage>) -> Result<(), Error>;

#[test]
fn a_full_disk_leaves_the_image_as_it_was() {
    let folder = folder();
    let disk = dirty(folder.path());
    let dirty = disk.bytes();
    let storage = Arc::new(MemoryStorage::new(dirty.clone()));
    repaired(&storage, Repair::All);
    let clean = storage.to_vec();
    let works: [(&[u8], Work); 4] = [
        (&dirty, |storage| repair(&storage, Repair::All, &mut |_| ControlFlow::Continue(())).map(drop)),
        (&clean, |storage| Writer::open(storage)?.create_snapshot("two", Duration::ZERO).map(drop)),
        (&clean, |storage| Writer::open(storage)?.apply_snapshot("one")),
        (&clean, |storage| Writer::open(storage)?.delete_snapshot("one")),
    ];
    for (number, (before, work)) in works.into_iter().enumerate() {
        let mut failed = 0;
        for left in 0.. {
            let full = Arc::new(Full { image: MemoryStorage::new(before.to_vec()), left: AtomicI64::new(left) });
            match work(Arc::clone(&full) as Arc<dyn WritableStorage>) {
                Ok(()) => break,
                Err(Error::Write { what, .. }) => {
                    failed += 1;
                    let now = full.image.to_vec();
                    // free clusters may hold anything
                    assert_eq!(check(&full.image), check(&MemoryStorage::new(before.to_vec())), "{number} {left}");
                    assert!(content(&now) == content(before) && now[..512] == before[..512], "{number} {left}");
                    assert!(now.len() == before.len() || what == "the header", "{number} {left} {what}");
                }
                Err(error) => panic!("{number} {left}: {error}"),
            }
        }
        assert!(failed >= 5, "{number}: {failed}");
    }
}

#[test]
fn an_observer_hears_of_a_repair_and_can_end_it() {
    let folder = folder();
    let disk = dirty(folder.path());
    let bytes = disk.bytes();
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let writable = Arc::clone(&storage) as Arc<dyn WritableStorage>;
    let mut heard = Vec::new();
    repair(&writable, Repair::All, &mut |progress| {
        heard.push((progress.done, progress.total));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(heard.is_sorted() && heard.iter().all(|(done, total)| done <= total && *total == heard[0].1), "{heard:?}");
    for (calls, (done, total)) in heard.iter().enumerate() {
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let writable = Arc::clone(&storage) as Arc<dyn WritableStorage>;
        let mut left = calls;
        let result = repair(&writable, Repair::All, &mut |_| match left.checked_sub(1) {
            Some(less) => {
                left = less;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        });
        assert!(matches!(result, Err(Error::Cancelled)), "{calls} {result:?}");
        let switched = done * 3 >= total * 2;
        assert!(switched || storage.to_vec() == bytes, "{calls}");
    }
}

#[test]
fn check_repairs_what_it_is_told_to_and_says_what_is_left() {
    let folder = folder();
    let mut disk = dirty(folder.path());
    let name = disk.name().to_owned();
    Ended::run(["check", &name]).with(3).says("its refcounts may be stale");
    Ended::run(["check", &name, "--repair", "leaks"]).with(3).says("nothing was repaired");
    let ended = Ended::run(["check", &name, "--repair", "all", "--json"]).with(0);
    let checked = event(&ended.events(), "check").clone();
    assert_eq!((&checked["verdict"], &checked["before"]["verdict"]), (&"clean".into(), &"dirty".into()));
    assert!(checked["before"]["refcount_errors"].as_u64().unwrap() > 0);
    assert_eq!(judge(&disk.path).corruptions, 0);
    let clean = disk.bytes();
    Ended::run(["check", &name, "--repair", "all"]).with(0).says(": clean\n").says_not("repair");
    assert!(disk.bytes() == clean);
    Ended::run(["check", &name, "--repair", "some"]).with(2);
    // not closed, but as it should be
    let mut open = clean.clone();
    open[79] |= 1;
    std::fs::write(&disk.path, &open).unwrap();
    Ended::run(["check", &name]).with(3).says("it was not closed").says_not("errors in tables");
    Ended::run(["check", &name, "--repair", "all"]).with(0);
    assert!(disk.bytes() == clean);

    let mut bytes = clean;
    let map = Map::of(&bytes);
    put(&mut bytes, map.refcount_table[0], 512 * 7);
    std::fs::write(&disk.path, &bytes).unwrap();
    Ended::run(["check", &name, "--repair", "leaks"]).with(4).says("DAMAGED");
    Ended::run(["check", &name, "--repair", "all"]).with(0).says("before the repair: errors in tables: 1, wrong");
    // an entry that leads nowhere is not guessed at
    let mut bytes = disk.bytes();
    let map = Map::of(&bytes);
    let entry = number(&bytes, map.l2[0]) | 1 << 57;
    put(&mut bytes, map.l2[0], entry);
    std::fs::write(&disk.path, &bytes).unwrap();
    Ended::run(["check", &name, "--repair", "all"]).with(4).says("L2 entry is").says("nothing was repaired");
    disk.io("read", 1, 512);

    let busy = qmpbackup::restore::open_writable(&disk.path).unwrap();
    Ended::run(["check", &name, "--repair", "all"]).with(6).says("NOT CHECKED: another process has");
    // tables that are being written look damaged
    Ended::run(["check", &name]).with(6).says("NOT CHECKED: another process has the image open for writing");
    drop(busy);
    let reader = FileStorage::open(&disk.path).unwrap();
    reader.lock(Access::Read).unwrap();
    Ended::run(["check", &name]).with(4).says("DAMAGED");
}

/// A header without snapshots may hold anything where their table would be.
#[test]
fn where_no_snapshot_is_a_repair_does_not_look_for_their_table() {
    for garbage in [1, 1 << 40, 1 << 62, i64::MAX as u64, u64::MAX - 511, u64::MAX] {
        let folder = folder();
        let disk = Disk::create(folder.path(), "dirty", 20 * MIB, "lazy_refcounts=on");
        disk.write_unclosed("write -P 2 10M 3M");
        let mut image = disk.bytes();
        image[64..72].copy_from_slice(&u64::to_be_bytes(garbage));
        let path = folder.path().join("garbage");
        std::fs::write(&path, &image).unwrap();
        let repaired = Ended::run(["check", "--repair", "all", path.to_str().unwrap()]);
        let after = std::fs::read(&path).unwrap();
        // no QEMU opens an image with such an offset
        if garbage % 65536 != 0 {
            repaired.with(4).says("snapshots_offset is ");
            assert!(after == image, "{garbage:#x}");
            continue;
        }
        repaired.with(0);
        assert!(after.len() < image.len() * 2 && content(&after) == content(&image), "{garbage:#x}");
        let judgement = judge(&path);
        assert!(judgement.opened && judgement.corruptions + judgement.leaks == 0, "{garbage:#x}: {}", judgement.words);
    }
}
