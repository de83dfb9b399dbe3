//! All that an image can hold, and all that a writer can be asked, beside a model of a few arrays.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use qmpbackup::qcow2::{Backing, Content, Error, Extent, GuestOffset, Image, MapBuffer, Reader, Snapshot, Writer};
use qmpbackup::storage::WritableStorage;

use crate::bitmaps_kept::{granules, list};
use crate::support::edited::{Bench, assert_same_disk, faults, memory};
use crate::support::layer::Knobs;
use crate::support::prng::Prng;
use crate::support::tools;
use crate::support::writer_ops::{Draw, Op, within};

const SECTOR: u64 = 512;
const BASES: [&str; 2] = ["base", "other-name-of-base"];

/// A disk: its bytes, and which of them are in the backing file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) bytes: Vec<u8>,
    /// Empty where there is no backing file.
    below: Vec<bool>,
}

impl Disk {
    fn resize(&mut self, size: u64) {
        let size = within(&(0..size), 0).end;
        self.bytes.resize(size, 0);
        if !self.below.is_empty() {
            self.below.resize(size, false);
        }
    }

    fn apply(&mut self, op: &Op, cluster: u64) {
        op.apply(&mut self.bytes, cluster);
        if let Some((range, _)) = op.changes(self.bytes.len() as u64, cluster) {
            self.below.get_mut(within(&range, 0)).unwrap_or_default().fill(false);
        }
    }

    pub(crate) fn has_backing(&self) -> bool {
        !self.below.is_empty()
    }

    pub(crate) fn lose_backing(&mut self) {
        for (byte, _) in self.bytes.iter_mut().zip(std::mem::take(&mut self.below)).filter(|(_, below)| *below) {
            *byte = 0;
        }
    }
}

/// An internal snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) disk: Rc<Disk>,
}

/// A persistent bitmap.
#[derive(Clone, Debug)]
pub(crate) struct Marks {
    pub(crate) name: String,
    granularity_bits: u32,
    pub(crate) auto: bool,
    /// In use, and never again anything else.
    pub(crate) lost: bool,
    /// The sectors that it must know.
    pub(crate) must: Vec<bool>,
}

/// All that is in an image.
#[derive(Clone, Debug)]
pub(crate) struct Sight {
    pub(crate) disk: Disk,
    pub(crate) snapshots: Vec<Kept>,
    pub(crate) bitmaps: Vec<Marks>,
}

impl Sight {
    /// What our readers see.
    pub(crate) fn of(image: &[u8], base: &[u8]) -> Self {
        let snapshots = Image::open(memory(image)).unwrap().snapshots().unwrap().into_iter().map(|snapshot| {
            let disk = Rc::new(view(&alone(image, &snapshot), base));
            Kept { id: snapshot.id, name: snapshot.name, disk }
        });
        let disk = view(image, base);
        let sectors = (disk.bytes.len() as u64).div_ceil(SECTOR);
        let bitmaps = list(image).into_iter().map(|bitmap| {
            let mut must = Vec::new();
            if !bitmap.in_use {
                let each = 1 << (bitmap.granularity_bits - 9);
                must =
                    granules(image, &bitmap.name).into_iter().flat_map(|set| std::iter::repeat_n(set, each)).collect();
                must.resize(within(&(0..sectors), 0).end, false);
            }
            let granularity_bits = bitmap.granularity_bits;
            Marks { name: bitmap.name, granularity_bits, auto: bitmap.auto, lost: bitmap.in_use, must }
        });
        Self { snapshots: snapshots.collect(), bitmaps: bitmaps.collect(), disk }
    }

    pub(crate) fn lose_backing(&mut self) {
        self.disk.lose_backing();
        self.snapshots.iter_mut().for_each(|kept| Rc::make_mut(&mut kept.disk).lose_backing());
    }

    /// The same names and bytes; not a word of bitmaps.
    pub(crate) fn assert_same_snapshots(&self, should: &[Kept], said: &str) {
        let names = |kept: &[Kept]| kept.iter().map(|one| (one.id.clone(), one.name.clone())).collect::<Vec<_>>();
        assert_eq!(names(&self.snapshots), names(should), "{said}");
        for (is, should) in self.snapshots.iter().zip(should) {
            assert_same_disk(&is.disk.bytes, &should.disk.bytes, &format!("{said}\nsnapshot {}", should.id));
        }
    }
}

/// The image whose disk is that of a snapshot.
fn alone(image: &[u8], snapshot: &Snapshot) -> Vec<u8> {
    let mut alone = image.to_vec();
    alone[36..40].copy_from_slice(&u32::try_from(snapshot.l1.entries).unwrap().to_be_bytes());
    alone[40..48].copy_from_slice(&snapshot.l1.offset.0.to_be_bytes());
    alone[24..32].copy_from_slice(&snapshot.disk_size.unwrap().to_be_bytes());
    alone
}

fn view(image: &[u8], base: &[u8]) -> Disk {
    let image = Image::open(memory(image)).unwrap();
    let size = within(&(0..image.size()), 0).end;
    let mut disk = Disk { bytes: vec![0; size], below: Vec::new() };
    let mut reader = Reader::new(&image);
    if image.header().backing.is_none() {
        reader.read(&mut disk.bytes, GuestOffset(0)).unwrap();
        return disk;
    }
    disk.below = vec![false; size];
    let each = |extent: Extent| {
        let range = within(&extent.guest, 0);
        if extent.content == Content::Unallocated {
            disk.below[range.clone()].fill(true);
            let below = base.get(range.start..range.end.min(base.len())).unwrap_or_default();
            disk.bytes[range.start..range.start + below.len()].copy_from_slice(below);
        } else {
            reader.read(&mut disk.bytes[range], GuestOffset(extent.guest.start)).unwrap();
        }
    };
    image.map(0..image.size(), &mut MapBuffer::default(), each).unwrap();
    disk
}

/// Bits of a bitmap for these sectors.
fn covers(granule: usize, bits: u32) -> std::ops::Range<usize> {
    granule << (bits - 9)..(granule + 1) << (bits - 9)
}

/// What a seed is.
pub(crate) struct Start {
    pub(crate) bench: Bench,
    pub(crate) knobs: Knobs,
    pub(crate) image: Vec<u8>,
    /// Of the backing file; empty where there is none.
    pub(crate) base: Vec<u8>,
    pub(crate) said: String,
    /// All sizes and offsets are multiples of it.
    unit: u64,
    most: u64,
}

impl Start {
    pub(crate) fn make(seed: u64, most: u64, largest_cluster_bits: u64, units: &[u64]) -> Self {
        let prng = &mut Prng::stream(seed, 90);
        let bench = Bench::new();
        let has_base = prng.one_in(6);
        let size = prng.between(1, most / SECTOR) * SECTOR;
        let mut knobs = Knobs::draw(prng, 9, size);
        knobs.killed = false;
        knobs.preallocated &= !has_base;
        if knobs.cluster_bits > largest_cluster_bits || prng.one_in(2) {
            knobs.cluster_bits = prng.between(if knobs.extended_l2 { 14 } else { 9 }, largest_cluster_bits.min(14));
        }
        let unit = if has_base { knobs.cluster_size() } else { *prng.pick(units) };
        let mut options = knobs.options();
        let mut base = Vec::new();
        if has_base {
            let length = prng.between(1, most / SECTOR) * SECTOR;
            bench.create(BASES[0], "cluster_size=64k", length);
            bench.io(BASES[0], &[&format!("write -q -P 119 0 {length}"), &format!("write -q -z 0 {}", length / 3)]);
            std::fs::hard_link(bench.path(BASES[0]), bench.path(BASES[1])).unwrap();
            base = bench.disk(BASES[0], None);
            options += ",backing_fmt=qcow2,backing_file=base";
        }
        bench.create("image", &options, size);
        if knobs.version_3 && prng.one_in(2) {
            for number in 0..prng.between(1, 3) {
                let granularity = (1 << prng.between(9, 17)).to_string();
                let mut words = vec!["bitmap", "--add", "-g", &granularity];
                words.extend(prng.one_in(3).then_some("--disable"));
                let name = format!("b{number}");
                bench.img(&[&words[..], &["image", &name]].concat());
            }
        }
        if prng.one_in(2) {
            let end = prng.between(1, size / SECTOR) * SECTOR;
            bench.io("image", &[&format!("write -q -P 85 {} {}", end / 1024 * 512, end - end / 1024 * 512)]);
        }
        let said = format!("seed {seed}: {options}, {size} bytes in units of {unit}");
        let image = bench.load("image");
        let start = Self { bench, knobs, image, base, said, unit, most };
        assert_same_disk(
            &Sight::of(&start.image, &start.base).disk.bytes,
            &start.bench.disk("image", None),
            &start.said,
        );
        start
    }
}

/// A writer and its model.
pub(crate) struct World<'a> {
    start: &'a Start,
    storage: Arc<dyn WritableStorage>,
    writer: Option<Writer>,
    pub(crate) now: Sight,
    /// What the disk has been since it was flushed, and is.
    since: Vec<Disk>,
    pub(crate) said: Vec<String>,
    number: u64,
}

impl<'a> World<'a> {
    pub(crate) fn open(start: &'a Start, storage: Arc<dyn WritableStorage>) -> Self {
        let writer = Writer::open(Arc::clone(&storage)).unwrap();
        let now = Sight::of(&bytes(&storage), &start.base);
        let said = vec![start.said.clone()];
        // names come once
        let number = now.snapshots.iter().filter_map(|kept| kept.name.rsplit(' ').next()?.parse().ok()).max();
        let since = vec![now.disk.clone()];
        Self { start, storage, writer: Some(writer), since, now, said, number: number.unwrap_or_default() }
    }

    pub(crate) fn image(&self) -> Vec<u8> {
        bytes(&self.storage)
    }

    pub(crate) fn said(&self) -> String {
        self.said.join("\n")
    }

    /// Whether nothing is lost now, if the storage keeps what was synced.
    pub(crate) fn is_flushed(&self) -> bool {
        self.since.len() == 1
    }

    fn size(&self) -> u64 {
        self.now.disk.bytes.len() as u64
    }

    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().unwrap()
    }

    fn tell(&mut self, what: String) {
        self.said.push(what);
    }

    fn flushed(&mut self) {
        self.since = vec![self.now.disk.clone()];
    }

    /// One thing more.
    pub(crate) fn step(&mut self, prng: &mut Prng) {
        match prng.below(40) {
            0..=1 => self.create(),
            2 if !self.now.snapshots.is_empty() => self.apply(prng),
            3 if !self.now.snapshots.is_empty() => self.delete(prng),
            4..=5 => self.resize(prng),
            6 => self.remove_bitmap(prng),
            7 => self.set_backing(prng),
            8 => self.drop_writer(),
            9 => self.finish(),
            _ => self.change(prng),
        }
    }

    fn change(&mut self, prng: &mut Prng) {
        let cluster = self.start.knobs.cluster_size();
        let draw = Draw { size: self.size(), cluster, unit: self.start.unit, longest: 300 << 10 };
        let draw = Draw { longest: draw.longest.max(self.start.unit), ..draw };
        let op = draw.op(prng);
        self.tell(match &op {
            Op::Write(range, _) => format!("write {range:?}"),
            Op::Allocate(range, _) => format!("allocate {range:?}"),
            Op::Compressed(range, _) => format!("compressed {range:?}"),
            Op::Zero(_) | Op::Discard(_) | Op::Read(_) | Op::Flush => format!("{op:?}"),
        });
        let has_backing = self.now.disk.has_backing();
        if let Op::Read(range) = &op {
            if !has_backing {
                let got = op.ask(self.writer()).unwrap().unwrap();
                assert_same_disk(&got, &self.now.disk.bytes[within(range, 0)], &self.said());
            }
            return;
        }
        let said = self.said();
        op.ask(self.writer()).unwrap_or_else(|error| panic!("{error}: {error:?}\n{said}"));
        if matches!(op, Op::Flush) {
            return self.flushed();
        }
        if matches!(op, Op::Discard(_)) && has_backing && !self.start.knobs.version_3 {
            return;
        }
        let before = self.now.disk.clone();
        self.now.disk.apply(&op, cluster);
        let sectors = before.bytes.chunks(512).zip(self.now.disk.bytes.chunks(512));
        let differs: Vec<bool> = sectors.map(|(old, new)| old != new).collect();
        for marks in self.now.bitmaps.iter_mut().filter(|marks| marks.auto && !marks.lost) {
            marks.must.iter_mut().zip(&differs).for_each(|(must, differs)| *must |= differs);
        }
        self.since.push(self.now.disk.clone());
    }

    fn create(&mut self) {
        self.number += 1;
        let name = format!("snapshot {}", self.number);
        let result = self.writer().create_snapshot(&name, Duration::new(1_600_000_000, 0));
        self.tell(format!("create: {result:?}"));
        self.flushed();
        match result {
            Ok(id) => {
                let disk = Rc::new(self.now.disk.clone());
                self.now.snapshots.push(Kept { id, name, disk });
            }
            Err(Error::RefcountOverflow { .. }) if self.start.knobs.refcount_bits < 16 => {}
            Err(error) => panic!("{error}: {error:?}\n{}", self.said()),
        }
    }

    fn apply(&mut self, prng: &mut Prng) {
        let kept = prng.pick(&self.now.snapshots).clone();
        let result = self.writer().apply_snapshot(&kept.id);
        self.tell(format!("apply {}: {result:?}", kept.id));
        let has_bitmaps = !self.now.bitmaps.is_empty();
        match result {
            Ok(()) if !has_bitmaps => self.now.disk = (*kept.disk).clone(),
            Err(Error::NotWritable { .. }) if has_bitmaps => {}
            Err(Error::RefcountOverflow { .. }) if self.start.knobs.refcount_bits < 16 => {}
            result => panic!("{result:?}\n{}", self.said()),
        }
        self.flushed();
    }

    fn delete(&mut self, prng: &mut Prng) {
        let place = within(&(0..prng.below(self.now.snapshots.len() as u64)), 0).end;
        let kept = self.now.snapshots.remove(place);
        let result = self.writer().delete_snapshot(&kept.id);
        self.tell(format!("delete {}: {result:?}", kept.id));
        assert!(result.is_ok(), "{result:?}\n{}", self.said());
        self.flushed();
    }

    fn resize(&mut self, prng: &mut Prng) {
        let most = *prng.pick(&[self.start.most / 10, self.start.most]);
        let unit = self.start.unit.min(SECTOR);
        let to = prng.between(1, (most / unit).max(1)) * unit;
        let result = self.writer().resize(to);
        self.tell(format!("resize {to}: {result:?}"));
        let version_2 = !self.start.knobs.version_3;
        let has_backing = self.now.disk.has_backing();
        match result {
            Ok(()) => {
                self.now.disk.resize(to);
                for marks in self.now.bitmaps.iter_mut().filter(|marks| !marks.lost) {
                    marks.must.resize(within(&(0..to.div_ceil(SECTOR)), 0).end, false);
                }
                self.flushed();
            }
            Err(Error::NotWritable { .. }) if version_2 && (has_backing || !self.now.snapshots.is_empty()) => {}
            Err(Error::NeedsBacking { .. }) if has_backing => {}
            Err(error) => panic!("{error}: {error:?}\n{}", self.said()),
        }
    }

    fn remove_bitmap(&mut self, prng: &mut Prng) {
        if self.now.bitmaps.is_empty() || prng.one_in(2) {
            return;
        }
        let place = within(&(0..prng.below(self.now.bitmaps.len() as u64)), 0).end;
        let name = self.now.bitmaps.remove(place).name;
        let result = self.writer().remove_bitmap(&name);
        self.tell(format!("remove bitmap {name}: {result:?}"));
        assert!(result.is_ok(), "{result:?}\n{}", self.said());
        self.flushed();
    }

    fn set_backing(&mut self, prng: &mut Prng) {
        if !self.now.disk.has_backing() {
            return;
        }
        let name = prng.pick(&[Some(BASES[0]), Some(BASES[1]), None]).map(ToOwned::to_owned);
        let backing = name.map(|name| Backing { name, format: Some("qcow2".to_owned()) });
        let result = self.writer().set_backing(backing.as_ref());
        self.tell(format!("backing {backing:?}: {result:?}"));
        match result {
            Ok(()) if backing.is_none() => {
                self.now.lose_backing();
                self.since.iter_mut().for_each(Disk::lose_backing);
            }
            Ok(()) | Err(Error::NoRoomInHeader { .. }) => {}
            Err(error) => panic!("{error}: {error:?}\n{}", self.said()),
        }
    }

    /// A writer that ends without a word.
    fn drop_writer(&mut self) {
        self.tell("drop".to_owned());
        self.writer = None;
        let image = self.image();
        let said = self.said();
        assert_eq!(faults(&image).0, 0, "{said}");
        let seen = Sight::of(&image, &self.start.base);
        assert_is_one_of(&seen.disk.bytes, &self.since.iter(), &said);
        seen.assert_same_snapshots(&self.now.snapshots, &said);
        self.assert_bitmaps(&image, true);
        // the bits of those that nobody has marked
        for (marks, seen) in self.now.bitmaps.iter_mut().zip(&seen.bitmaps) {
            marks.lost = seen.lost;
        }
        self.now.disk = seen.disk;
        self.since.push(self.now.disk.clone());
        self.writer = Some(Writer::open(Arc::clone(&self.storage)).unwrap());
    }

    /// All is as it should be.
    pub(crate) fn finish(&mut self) {
        self.tell("finish".to_owned());
        let said = self.said();
        self.writer.take().unwrap().finish().unwrap_or_else(|error| panic!("{error}: {error:?}\n{said}"));
        self.flushed();
        let image = self.image();
        assert_eq!(faults(&image).0, 0, "{said}");
        let seen = Sight::of(&image, &self.start.base);
        assert_same_disk(&seen.disk.bytes, &self.now.disk.bytes, &said);
        seen.assert_same_snapshots(&self.now.snapshots, &said);
        self.assert_bitmaps(&image, false);
        // bits that need not be set may be
        self.now.bitmaps = seen.bitmaps;
        self.writer = Some(Writer::open(Arc::clone(&self.storage)).unwrap());
    }

    fn assert_bitmaps(&self, image: &[u8], may_be_lost: bool) {
        let said = self.said();
        let found = list(image);
        let names = |names: &mut dyn Iterator<Item = String>| names.collect::<Vec<_>>();
        let should = names(&mut self.now.bitmaps.iter().map(|marks| marks.name.clone()));
        assert_eq!(names(&mut found.iter().map(|bitmap| bitmap.name.clone())), should, "{said}");
        for (bitmap, marks) in found.iter().zip(&self.now.bitmaps) {
            let name = &marks.name;
            assert_eq!((bitmap.auto, bitmap.granularity_bits), (marks.auto, marks.granularity_bits), "{name}\n{said}");
            assert!(bitmap.in_use == marks.lost || (may_be_lost && marks.auto), "{name}: {}\n{said}", bitmap.in_use);
            if bitmap.in_use {
                continue;
            }
            for (granule, is_set) in granules(image, name).into_iter().enumerate() {
                let range = covers(granule, marks.granularity_bits);
                let must = marks.must[range.start..range.end.min(marks.must.len())].contains(&true);
                assert!(is_set || !must, "{name} has lost granule {granule}\n{said}");
                assert!(marks.auto || is_set == must, "{name} has granule {granule}\n{said}");
            }
        }
    }

    /// QEMU finds nothing, and reads the same.
    pub(crate) fn judge(&self, no_leaks: bool) {
        let (bench, said, image) = (&self.start.bench, self.said(), self.image());
        if no_leaks {
            bench.assert_clean(&image, &said);
        } else {
            bench.save("image", &image);
            let mut check = tools::qemu_img();
            check.args(["check", "-f", "qcow2"]).arg(bench.path("image"));
            let output = tools::output(&mut check);
            assert!(matches!(output.status.code(), Some(0 | 3)), "{said}\n{}", tools::told(&check, &output));
        }
        if self.size() % SECTOR != 0 {
            return;
        }
        bench.save("image", &image);
        assert_same_disk(&bench.disk("image", None), &self.now.disk.bytes, &said);
        for kept in &self.now.snapshots {
            // QEMU shows as much of it as the disk is long now
            let shown = bench.disk("image", Some(&kept.name));
            let both = shown.len().min(kept.disk.bytes.len());
            assert_same_disk(&shown[..both], &kept.disk.bytes[..both], &format!("{}\n{said}", kept.name));
        }
    }
}

/// Each sector is as it was in one of these; behind the end of a disk there are zeroes.
pub(crate) fn assert_is_one_of<'d>(is: &[u8], may_be: &(impl Iterator<Item = &'d Disk> + Clone), said: &str) {
    let lengths: BTreeSet<usize> = may_be.clone().map(|disk| disk.bytes.len()).collect();
    assert!(lengths.contains(&is.len()), "{} of {lengths:?}\n{said}", is.len());
    for (number, sector) in is.chunks(512).enumerate() {
        let start = number * 512;
        let is_right = may_be.clone().any(|disk| {
            let known = disk.bytes.get(start..disk.bytes.len().min(start + sector.len())).unwrap_or_default();
            sector.starts_with(known) && sector[known.len()..].iter().all(|byte| *byte == 0)
        });
        assert!(is_right, "sector {number}\n{said}");
    }
}

fn bytes(storage: &Arc<dyn WritableStorage>) -> Vec<u8> {
    let mut bytes = vec![0; within(&(0..storage.length()), 0).end];
    storage.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
