//! A writer against an array of bytes: it does what the array does, and nothing is wrong with the image after it. Then
//! bytes of the image are overwritten, and it does what it is asked for, or refuses.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use qmpbackup::qcow2::{Error, Repair, Report, Writer, check, repair};
use qmpbackup::storage::{MemoryStorage, WritableStorage};

use super::empty::Empty;
use super::input::Input;
use crate::support::writer_ops::{self, Op, within};

/// No disk of the model is larger.
const LARGEST: u64 = 256 << 10;

/// Nothing that is written at once is longer.
const LONGEST: u64 = 80 << 10;

enum Deed {
    Op(Op),
    Resize(u64),
    Create,
    Apply(String),
    Delete(String),
    Reopen,
}

pub(super) fn writer_model(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let empty = Empty::draw(&mut input);
    let storage = Arc::new(MemoryStorage::new(empty.image()));
    let mut model = Model { disk: vec![0; writer_size(&empty)], snapshots: Vec::new(), storage: storage.clone() };
    let deeds = input.below(48);
    model.live(&mut input, deeds);
    if !input.is_empty() {
        attack(&mut input, storage.to_vec());
    }
}

fn writer_size(empty: &Empty) -> usize {
    usize::try_from(empty.size).unwrap_or_default()
}

/// What the image should hold.
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    storage: Arc<MemoryStorage>,
}

impl Model {
    fn live(&mut self, input: &mut Input<'_>, deeds: u64) {
        let mut writer = Writer::open(self.storage.clone()).unwrap();
        for _ in 0..deeds {
            if input.is_empty() {
                break;
            }
            match draw(input, &writer, LARGEST) {
                Deed::Reopen => {
                    writer.finish().unwrap();
                    self.judge();
                    writer = Writer::open(self.storage.clone()).unwrap();
                }
                deed => self.both(&mut writer, deed),
            }
        }
        writer.finish().unwrap();
        self.judge();
        for (id, disk) in &self.snapshots {
            let storage = Arc::new((*self.storage).clone());
            let mut writer = Writer::open(storage.clone()).unwrap();
            match writer.apply_snapshot(id) {
                Ok(()) => writer.finish().unwrap(),
                // one owner more than refcounts can count
                Err(Error::RefcountOverflow { bits, .. }) if bits < 16 => continue,
                Err(error) => panic!("{error:?}"),
            }
            assert!(writer_ops::read(&storage.to_vec()) == *disk, "snapshot {id} is another one");
        }
    }

    /// What the writer does, the array does, and what the one cannot do, the other does not.
    fn both(&mut self, writer: &mut Writer, deed: Deed) {
        let cluster = writer.header().geometry.cluster_size();
        match deed {
            Deed::Op(op) => {
                let got = op.ask(writer).unwrap();
                op.apply(&mut self.disk, cluster);
                if let (Op::Read(range), Some(bytes)) = (&op, got) {
                    assert!(bytes == self.disk[within(range, 0)], "{range:?} is read as something else");
                }
            }
            Deed::Resize(size) => match writer.resize(size) {
                Ok(()) => self.disk.resize(usize::try_from(size).unwrap(), 0),
                Err(Error::NotWritable { .. }) => assert!(writer.header().version == 2 && !self.snapshots.is_empty()),
                Err(error) => panic!("{error:?}"),
            },
            Deed::Create => match writer.create_snapshot("of a moment", Duration::from_secs(1)) {
                Ok(id) => self.snapshots.push((id, self.disk.clone())),
                Err(Error::RefcountOverflow { bits, .. }) => assert!(bits < 16, "{bits} bits are enough"),
                Err(error) => panic!("{error:?}"),
            },
            Deed::Apply(id) => {
                match (writer.apply_snapshot(&id), self.snapshots.iter().find(|(known, _)| *known == id)) {
                    (Ok(()), Some((_, disk))) => self.disk.clone_from(disk),
                    (Err(Error::NoSuch { .. }), None) | (Err(Error::RefcountOverflow { .. }), Some(_)) => {}
                    (result, _) => panic!("{id}: {result:?}"),
                }
            }
            Deed::Delete(id) => {
                let place = self.snapshots.iter().position(|(known, _)| *known == id);
                match (writer.delete_snapshot(&id), place) {
                    (Ok(()), Some(place)) => drop(self.snapshots.remove(place)),
                    (Err(Error::NoSuch { .. }), None) => {}
                    (result, _) => panic!("{id}: {result:?}"),
                }
            }
            Deed::Reopen => {}
        }
    }

    fn judge(&self) {
        let image = self.storage.to_vec();
        let report = writer_ops::check(&image);
        assert!(report.corruptions() == 0 && report.leaks == 0, "{report:?}");
        assert!(writer_ops::read(&image) == self.disk, "the disk is another one");
    }
}

/// Damages an image, and goes on with it.
fn attack(input: &mut Input<'_>, mut image: Vec<u8>) {
    for _ in 0..=input.below(8) {
        let place = if input.flag() { input.below(112) } else { input.below(image.len() as u64) };
        let value = input.take(8);
        let end = image.len().min(place as usize + value.len());
        let length = end - place as usize;
        image[place as usize..end].copy_from_slice(&value[..length]);
    }
    let storage = Arc::new(MemoryStorage::new(image.clone()));
    mend(storage.clone(), input);
    if let Ok(mut writer) = Writer::open(storage.clone()) {
        for _ in 0..24 {
            if input.is_empty() {
                break;
            }
            // any error is right
            let _ = match draw(input, &writer, 1 << 30) {
                Deed::Op(op) => op.ask(&mut writer).map(drop),
                Deed::Resize(size) => writer.resize(size),
                Deed::Create => writer.create_snapshot("of a moment", Duration::ZERO).map(drop),
                Deed::Apply(id) => writer.apply_snapshot(&id),
                Deed::Delete(id) => writer.delete_snapshot(&id),
                Deed::Reopen => writer.flush(),
            };
        }
        let _ = writer.finish();
    }
    let _ = check(&*storage, &mut |_| ControlFlow::Continue(()));
}

/// What a repair says of the image is what a check finds.
fn mend(storage: Arc<MemoryStorage>, input: &mut Input<'_>) {
    let how = input.pick(&[None, Some(Repair::Leaks), Some(Repair::All)]);
    let Some(how) = how else { return };
    let storage: Arc<dyn WritableStorage> = storage;
    if let Ok(repaired) = repair(&storage, how, &mut |_| ControlFlow::Continue(())) {
        let now = check(&storage, &mut |_| ControlFlow::Continue(())).unwrap();
        let faults = |report: &Report| (report.corruptions(), report.leaks, report.marked_corrupt);
        assert_eq!(faults(&repaired.after), faults(&now), "{repaired:?}");
    }
}

fn draw(input: &mut Input<'_>, writer: &Writer, largest: u64) -> Deed {
    let (size, cluster) = (writer.header().size, writer.header().geometry.cluster_size());
    let kind = input.below(24);
    let id = |input: &mut Input<'_>| (1 + input.below(4)).to_string();
    match kind {
        18 => return Deed::Resize(input.below(largest)),
        19 => return Deed::Create,
        20 => return Deed::Apply(id(input)),
        21 => return Deed::Delete(id(input)),
        22 | 23 => return Deed::Reopen,
        _ => {}
    }
    let range = range(input, size, cluster);
    Deed::Op(match kind {
        0..=3 => Op::Write(range.clone(), content(input, &range)),
        4..=5 => Op::Allocate(range.clone(), content(input, &range)),
        6..=9 => {
            let start = range.start / cluster * cluster;
            let range = start..size.min(start.saturating_add(cluster));
            Op::Compressed(range.clone(), content(input, &range))
        }
        10..=11 => Op::Zero(range),
        12..=14 => Op::Discard(range),
        15..=16 => Op::Read(range),
        _ => Op::Flush,
    })
}

/// In the disk; many begin or end where a cluster does.
fn range(input: &mut Input<'_>, size: u64, cluster: u64) -> Range<u64> {
    let shape = input.byte();
    let mut start = input.below(size.max(1)).min(size);
    if shape & 3 != 0 {
        start = start / cluster * cluster;
    }
    let mut length = match shape >> 2 & 3 {
        0 => input.below(3 * cluster),
        1 => cluster,
        2 => (1 + input.below(4)) * cluster,
        _ => input.below(1024),
    };
    length = length.min(LONGEST);
    start..start.saturating_add(length).min(size)
}

/// The same byte again and again, or what hardly shrinks.
fn content(input: &mut Input<'_>, range: &Range<u64>) -> Vec<u8> {
    let length = usize::try_from(range.end - range.start).unwrap_or_default();
    let byte = input.byte();
    if byte & 3 != 3 {
        return vec![byte; length];
    }
    let mut state = u32::from(byte);
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3] & if byte & 4 == 0 { 0xff } else { 0x13 }
    });
    noise.take(length).collect()
}
