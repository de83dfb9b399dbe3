//! Snapshots that are made, applied and deleted in place, beside `qemu-img snapshot` on a copy of the image.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use qmpbackup::qcow2::{Error, GuestOffset, Writer};
use qmpbackup::storage::{FileStorage, MemoryStorage, Storage, WritableStorage};
use serde_json::Value;

use crate::support::prng::Prng;
use crate::support::seeds::are_many;
use crate::support::tools;

const MIB: u64 = 1 << 20;

/// One image for us, and the same for QEMU.
struct Pair {
    folder: tempfile::TempDir,
    size: u64,
    /// Refcounts soon run over.
    narrow: bool,
    done: Vec<String>,
}

/// What is done to both.
#[derive(Clone, Debug)]
enum Deed {
    Write { byte: u8, offset: u64, length: u64 },
    Zero { offset: u64, length: u64 },
    Create(String),
    Apply(String),
    Delete(String),
}

impl Pair {
    fn new(options: &str, size: u64, compressed: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let narrow = options.contains("refcount_bits=2");
        let pair = Self { folder, size, narrow, done: vec![format!("create {options} {size}")] };
        let theirs = pair.theirs();
        if compressed {
            let raw = pair.folder.path().join("raw");
            let bytes: Vec<u8> = (0..size).map(|at| (at / 700 % 250) as u8).collect();
            std::fs::write(&raw, bytes).unwrap();
            let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
            tools::run(tools::qemu_img().args(convert).args([&raw, &theirs]));
        } else {
            let create = ["create", "-q", "-f", "qcow2", "-o", options];
            tools::run(tools::qemu_img().args(create).arg(&theirs).arg(size.to_string()));
        }
        pair
    }

    fn ours(&self) -> PathBuf {
        self.folder.path().join("ours.qcow2")
    }

    fn theirs(&self) -> PathBuf {
        self.folder.path().join("theirs.qcow2")
    }

    /// From now on there are two.
    fn part(&self) {
        std::fs::copy(self.theirs(), self.ours()).unwrap();
    }

    /// Does all, by one writer, and in QEMU one after the other.
    fn both(&mut self, deeds: &[Deed]) {
        self.done.push(format!("{deeds:?}"));
        let mut writer = open(&self.ours());
        let mut one_sided = false;
        for deed in deeds {
            let ours = do_ours(&mut writer, deed);
            let theirs = self.do_theirs(deed);
            // QEMU counts more references for a while than there are at the end
            one_sided |= self.narrow && ours.is_ok() && theirs.is_err();
            assert!(ours.is_ok() == theirs.is_ok() || one_sided, "{deed:?}: {ours:?} {theirs:?}");
            if matches!(ours, Err(Error::RefcountOverflow { .. })) {
                // what QEMU leaves when it gives up half-way
                tools::output(tools::qemu_img().args(["check", "-q", "-r", "all"]).arg(self.theirs()));
            }
        }
        writer.finish().unwrap();
        if one_sided {
            assert_sound(&self.ours());
            std::fs::copy(self.ours(), self.theirs()).unwrap();
        }
        self.size = info(&self.ours())["virtual-size"].as_u64().unwrap();
        self.compare();
    }

    fn do_theirs(&self, deed: &Deed) -> Result<(), String> {
        let theirs = self.theirs();
        let io = |words: String| tools::qemu_io().args(["-f", "qcow2", "-c", &words]).arg(&theirs).output();
        let snapshot = |flag: &str, name: &str| tools::qemu_img().args(["snapshot", flag, name]).arg(&theirs).output();
        let output = match deed {
            Deed::Write { byte, offset, length } => io(format!("write -q -P {byte} {offset} {length}")),
            Deed::Zero { offset, length } => io(format!("write -q -z {offset} {length}")),
            Deed::Create(name) => snapshot("-c", name),
            Deed::Apply(name) => snapshot("-a", name),
            Deed::Delete(name) => snapshot("-d", name),
        };
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    }

    /// The same disk, the same snapshots, nothing wrong and nothing lost.
    fn compare(&self) {
        assert_sound(&self.ours());
        let [ours, theirs] = [self.ours(), self.theirs()].map(|path| info(&path));
        assert_eq!(ours["virtual-size"], theirs["virtual-size"]);
        let list = |info: &Value| info["snapshots"].as_array().cloned().unwrap_or_default();
        let [ours, theirs] = [list(&ours), list(&theirs)];
        for key in ["id", "name", "vm-state-size"] {
            let values = |list: &[Value]| list.iter().map(|snapshot| snapshot[key].clone()).collect::<Vec<_>>();
            assert_eq!(values(&ours), values(&theirs), "{key}");
        }
        assert!(bytes(&self.ours(), None) == bytes(&self.theirs(), None), "the disks differ");
        for snapshot in &ours {
            let id = snapshot["id"].as_str().unwrap();
            let same = bytes(&self.ours(), Some(id)) == bytes(&self.theirs(), Some(id));
            assert!(same, "the disks differ at snapshot {id}");
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what was done:\n{}", self.done.join("\n"));
        }
    }
}

fn open(path: &Path) -> Writer {
    Writer::open(Arc::new(FileStorage::open_writable(path).unwrap())).unwrap()
}

fn do_ours(writer: &mut Writer, deed: &Deed) -> Result<(), Error> {
    match deed {
        Deed::Write { byte, offset, length } => {
            writer.write(&vec![*byte; usize::try_from(*length).unwrap()], GuestOffset(*offset))
        }
        Deed::Zero { offset, length } => writer.write_zeroes(*offset..offset + length),
        Deed::Create(name) => writer.create_snapshot(name, Duration::new(1_600_000_000, 7)).map(drop),
        Deed::Apply(name) => writer.apply_snapshot(name),
        Deed::Delete(name) => writer.delete_snapshot(name),
    }
}

fn info(path: &Path) -> Value {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(path));
    serde_json::from_str(&info).unwrap()
}

pub(crate) fn assert_sound(path: &Path) {
    let output = tools::output(tools::qemu_img().args(["check", "-f", "qcow2"]).arg(path));
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// The bytes of the disk, or of a snapshot.
pub(crate) fn bytes(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    bytes_by(tools::qemu_img(), path, snapshot)
}

fn bytes_by(mut qemu_img: Command, path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let convert = qemu_img.args(["convert", "-f", "qcow2", "-O", "raw"]);
    if let Some(id) = snapshot {
        convert.args(["-l", &format!("snapshot.id={id}")]);
    }
    tools::run(convert.args([path, &raw]));
    std::fs::read(&raw).unwrap()
}

fn draw(prng: &mut Prng, size: u64, number: u64) -> Deed {
    let offset = prng.below(size);
    let length = prng.between(1, (size - offset).min(300 << 10));
    match prng.below(10) {
        0..=2 => Deed::Write { byte: prng.next() as u8, offset, length },
        3 => Deed::Zero { offset, length },
        4..=6 => Deed::Create(format!("name {number} ß")),
        // an ID; whether there is such a snapshot is a question of luck
        7 | 8 => Deed::Apply(prng.between(1, 4).to_string()),
        // qemu-img deletes by name only
        _ => Deed::Delete(format!("name {} ß", prng.below(number + 1))),
    }
}

fn lives_as_in_qemu(options: &str, size: u64, compressed: bool) {
    for seed in 0..if are_many() { 30 } else { 1 } {
        let mut prng = Prng::stream(seed, options.bytes().map(u64::from).sum());
        let mut pair = Pair::new(options, size, compressed);
        for _ in 0..4 {
            let Deed::Write { .. } = pair.first_write(&mut prng) else { panic!() };
        }
        pair.part();
        for number in 0..7 {
            let size = pair.size;
            let deeds: Vec<Deed> = (0..prng.between(1, 3)).map(|_| draw(&mut prng, size, number)).collect();
            let applies = deeds.iter().any(|deed| matches!(deed, Deed::Apply(_)));
            pair.both(&deeds);
            // snapshots remember how large the disk was
            if applies && !options.contains("compat=0.10") && prng.one_in(2) {
                let size = (pair.size + prng.between(1, 8) * 65536).to_string();
                for path in [pair.ours(), pair.theirs()] {
                    tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(path).arg(&size));
                }
                pair.done.push(format!("resize {size}"));
                pair.compare();
                pair.size = size.parse().unwrap();
            }
        }
    }
}

impl Pair {
    fn first_write(&self, prng: &mut Prng) -> Deed {
        let offset = prng.below(self.size);
        let length = prng.between(1, (self.size - offset).min(300 << 10));
        let deed = Deed::Write { byte: prng.next() as u8, offset, length };
        self.do_theirs(&deed).unwrap();
        deed
    }
}

#[test]
fn snapshots_in_clusters_of_all_sizes_are_those_of_qemu() {
    for (bits, size) in [(9, MIB + 512), (12, 2 * MIB), (16, 5 * MIB + 1536), (21, 9 * MIB)] {
        lives_as_in_qemu(&format!("cluster_size={}", 1 << bits), size, false);
    }
}

#[test]
fn snapshots_with_refcounts_of_all_widths_are_those_of_qemu() {
    for bits in [1, 2, 4, 8, 32, 64] {
        lives_as_in_qemu(&format!("cluster_size=4096,refcount_bits={bits}"), 2 * MIB, false);
    }
}

#[test]
fn snapshots_of_version_2_are_those_of_qemu() {
    lives_as_in_qemu("compat=0.10,cluster_size=1024", 2 * MIB, false);
    lives_as_in_qemu("compat=0.10", 3 * MIB, true);
}

#[test]
fn snapshots_with_subclusters_are_those_of_qemu() {
    lives_as_in_qemu("extended_l2=on,cluster_size=16384", 3 * MIB, false);
    lives_as_in_qemu("extended_l2=on,lazy_refcounts=on", 6 * MIB, false);
}

#[test]
fn snapshots_of_compressed_clusters_are_those_of_qemu() {
    lives_as_in_qemu("cluster_size=4096", 2 * MIB, true);
    lives_as_in_qemu("compression_type=zstd,extended_l2=on", 3 * MIB, true);
}

#[test]
fn bitmaps_survive_snapshots_and_forbid_to_apply_one() {
    let mut pair = Pair::new("cluster_size=4096", 2 * MIB, false);
    tools::run(tools::qemu_img().args(["bitmap", "--add"]).arg(pair.theirs()).arg("first"));
    pair.first_write(&mut Prng::stream(1, 1));
    pair.part();
    pair.both(&[Deed::Create("one".into())]);
    pair.both(&[Deed::Apply("one".into())]);
    pair.both(&[Deed::Create("two".into()), Deed::Delete("one".into())]);
    let bitmaps = |path: &Path| info(path)["format-specific"]["data"]["bitmaps"].clone();
    assert_eq!(bitmaps(&pair.ours()), bitmaps(&pair.theirs()));
    assert_eq!(bitmaps(&pair.ours())[0]["name"], "first");
}

#[test]
fn the_state_of_a_machine_goes_along_with_a_snapshot() {
    let mut pair = Pair::new("cluster_size=4096", 2 * MIB, false);
    pair.first_write(&mut Prng::stream(2, 1));
    let state = ["-f", "qcow2", "-c", "write -b -P 9 0 100k"];
    tools::run(tools::qemu_io().args(state).arg(pair.theirs()));
    pair.part();
    pair.both(&[Deed::Create("one".into()), Deed::Zero { offset: 0, length: MIB }]);
    let other = ["-f", "qcow2", "-c", "write -b -P 7 0 100k"];
    tools::run(tools::qemu_io().args(other).arg(pair.ours()));
    tools::run(tools::qemu_io().args(other).arg(pair.theirs()));
    pair.both(&[Deed::Apply("one".into())]);
    let read = ["-f", "qcow2", "-c", "read -b -P 9 0 100k"];
    let said = tools::run(tools::qemu_io().args(read).arg(pair.ours()));
    assert!(!said.contains("verification failed"), "{said}");
}

#[test]
fn a_snapshot_says_its_name_date_and_size() {
    let pair = Pair::new("compat=1.1", 3 * MIB, false);
    pair.part();
    let mut writer = open(&pair.ours());
    assert_eq!(writer.create_snapshot("einß", Duration::new(1_700_000_000, 123_456_789)).unwrap(), "1");
    assert_eq!(writer.create_snapshot("7", Duration::ZERO).unwrap(), "2");
    let [one, two] = writer.snapshots().unwrap().try_into().unwrap();
    assert_eq!((one.id.as_str(), one.disk_size, one.vm_state_size), ("1", Some(3 * MIB), 0));
    assert_eq!((two.name.as_str(), two.date), ("7", Duration::ZERO));
    // an ID comes before a name
    writer.create_snapshot("1", Duration::ZERO).unwrap();
    writer.delete_snapshot("1").unwrap();
    assert_eq!(writer.snapshots().unwrap()[1].name, "1");
    assert!(matches!(writer.delete_snapshot("einß"), Err(Error::NoSuch { .. })));
    let long = "x".repeat(65536);
    assert!(matches!(writer.create_snapshot(&long, Duration::ZERO), Err(Error::TooMany { .. })));
    assert_eq!(writer.create_snapshot(&long[1..], Duration::new(1_700_000_000, 5)).unwrap(), "4");
    writer.finish().unwrap();
    let list = info(&pair.ours())["snapshots"].clone();
    assert_eq!(list[2]["date-sec"], 1_700_000_000);
    assert_eq!(list[2]["date-nsec"], 5);
    // QEMU keeps nothing longer than this, and says nothing of instructions that nobody counted
    assert_eq!(list[0].get("icount"), None);
    assert_sound(&pair.ours());
}

#[test]
fn what_nobody_knows_of_a_snapshot_is_kept() {
    let pair = Pair::new("cluster_size=512", MIB, false);
    for name in ["one", "two"] {
        pair.do_theirs(&Deed::Create(name.into())).unwrap();
    }
    let mut image = std::fs::read(pair.theirs()).unwrap();
    let number = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let table = usize::try_from(number(&image, 64)).unwrap();
    // eight more bytes of extra data in front of the ID of the second, which is the last
    let second = table + 72;
    assert_eq!(image[second + 39], 24);
    image[second + 39] = 32;
    image.resize(image.len().next_multiple_of(512), 0);
    let (end, extra) = (second + 40 + 24 + 4, second + 40 + 24);
    image.copy_within(extra..end, extra + 8);
    image[extra..extra + 8].copy_from_slice(b"unknown!");
    std::fs::write(pair.ours(), &image).unwrap();
    let mut writer = open(&pair.ours());
    writer.delete_snapshot("one").unwrap();
    writer.create_snapshot("three", Duration::ZERO).unwrap();
    writer.finish().unwrap();
    let image = std::fs::read(pair.ours()).unwrap();
    let table = usize::try_from(number(&image, 64)).unwrap();
    assert_eq!(&image[table + 64..table + 76], b"unknown!2two");
    assert_sound(&pair.ours());
}

#[test]
fn a_refcount_that_is_too_narrow_leaves_all_as_it_was() {
    let pair = Pair::new("cluster_size=4096,refcount_bits=1", MIB, false);
    pair.first_write(&mut Prng::stream(3, 1));
    let before = std::fs::read(pair.theirs()).unwrap();
    let storage = Arc::new(MemoryStorage::new(before.clone()));
    let mut writer = Writer::open(Arc::clone(&storage) as Arc<dyn WritableStorage>).unwrap();
    let result = writer.create_snapshot("one", Duration::ZERO);
    assert!(matches!(result, Err(Error::RefcountOverflow { bits: 1, .. })), "{result:?}");
    assert_eq!(storage.length(), before.len() as u64);
    // and the writer can be used
    writer.write(&[1], GuestOffset(0)).unwrap();
    writer.finish().unwrap();
    std::fs::write(pair.ours(), storage.to_vec()).unwrap();
    assert_sound(&pair.ours());
}

#[test]
fn a_disk_gets_the_size_back_that_it_had() {
    let mut pair = Pair::new("cluster_size=512", MIB, false);
    pair.first_write(&mut Prng::stream(6, 1));
    pair.part();
    pair.both(&[Deed::Create("small".into())]);
    for path in [pair.ours(), pair.theirs()] {
        tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(path).arg("9M"));
    }
    pair.both(&[Deed::Write { byte: 3, offset: 8 * MIB, length: MIB }, Deed::Create("large".into())]);
    pair.both(&[Deed::Apply("small".into())]);
    assert_eq!(pair.size, MIB);
    pair.both(&[Deed::Apply("large".into())]);
    assert_eq!(pair.size, 9 * MIB);
}

#[test]
fn an_image_with_damaged_tables_is_not_rebuilt() {
    let pair = Pair::new("cluster_size=4096", MIB, false);
    pair.first_write(&mut Prng::stream(7, 1));
    let mut image = std::fs::read(pair.theirs()).unwrap();
    let number = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let l1 = usize::try_from(number(&image, 40)).unwrap();
    let l2 = usize::try_from(number(&image, l1) & !(1 << 63)).unwrap();
    image[l2] |= 2;
    let storage = Arc::new(MemoryStorage::new(image.clone()));
    let mut writer = Writer::open(Arc::clone(&storage) as Arc<dyn WritableStorage>).unwrap();
    let result = writer.create_snapshot("one", Duration::ZERO);
    assert!(matches!(result, Err(Error::DamagedTables)), "{result:?}");
    assert!(storage.to_vec()[..512] == image[..512] && storage.length() == image.len() as u64);
}

#[test]
fn every_qemu_can_apply_our_snapshots() {
    for release in ["5.2", "7.2", "10.0", "11"] {
        let pair = Pair::new("compat=1.1", 3 * MIB, false);
        pair.first_write(&mut Prng::stream(4, 1));
        pair.part();
        let before = bytes(&pair.ours(), None);
        let mut writer = open(&pair.ours());
        writer.create_snapshot("ours", Duration::new(1_700_000_000, 0)).unwrap();
        writer.write(&vec![0xee; 2 << 20], GuestOffset(0)).unwrap();
        writer.finish().unwrap();
        assert!(bytes_by(tools::qemu_img_of(release), &pair.ours(), Some("1")) == before, "{release}");
        tools::run(tools::qemu_img_of(release).args(["snapshot", "-a", "ours"]).arg(pair.ours()));
        assert!(bytes(&pair.ours(), None) == before, "{release}");
        tools::run(tools::qemu_img_of(release).args(["snapshot", "-d", "ours"]).arg(pair.ours()));
        assert_sound(&pair.ours());
    }
}

/// Counts the bytes that are read.
struct Counting(MemoryStorage, AtomicU64);

impl Storage for Counting {
    fn length(&self) -> u64 {
        self.0.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.1.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.0.read_exact_at(buffer, offset)
    }
}

impl WritableStorage for Counting {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

#[test]
fn a_snapshot_is_made_without_a_look_at_what_others_hold() {
    // one cluster for each L2 table
    let tables = 32;
    let places = || (0..tables).map(|table| GuestOffset(table * 2 * MIB));
    let pair = Pair::new("cluster_size=4096", tables * 2 * MIB, false);
    let image = std::fs::read(pair.theirs()).unwrap();
    let storage = Arc::new(Counting(MemoryStorage::new(image), AtomicU64::new(0)));
    let mut writer = Writer::open(Arc::clone(&storage) as Arc<dyn WritableStorage>).unwrap();
    let mut read = Vec::new();
    for number in 0..30u8 {
        places().for_each(|place| writer.write(&[number; 4096], place).unwrap());
        writer.flush().unwrap();
        storage.1.store(0, Ordering::Relaxed);
        writer.create_snapshot(&number.to_string(), Duration::ZERO).unwrap();
        read.push(storage.1.load(Ordering::Relaxed));
    }
    // all that grows is the file, with its refcounts, and the table of snapshots
    assert!(read[29] < read[1] + read[1] / 10, "{read:?}");
    writer.finish().unwrap();
    std::fs::write(pair.ours(), storage.0.to_vec()).unwrap();
    assert_sound(&pair.ours());
    for number in [0, 17, 29u8] {
        let disk = bytes(&pair.ours(), Some(&(number + 1).to_string()));
        places().for_each(|place| assert!(disk[place.0 as usize..][..4096] == [number; 4096]));
    }
}

#[test]
fn refcount_tables_of_several_clusters_are_given_back() {
    let pair = Pair::new("cluster_size=512", 32 * MIB, false);
    pair.part();
    let mut writer = open(&pair.ours());
    writer.write(&vec![1; 17 << 20], GuestOffset(0)).unwrap();
    for number in 0..60 {
        writer.write(&[7; 4096], GuestOffset(4 * MIB)).unwrap();
        writer.create_snapshot(&number.to_string(), Duration::ZERO).unwrap();
        if number % 10 == 0 {
            assert_sound(&pair.ours());
        }
    }
    writer.finish().unwrap();
    assert_sound(&pair.ours());
}

#[test]
fn snapshots_that_come_and_go_do_not_make_the_file_grow() {
    let pair = Pair::new("cluster_size=512", 4 * MIB, false);
    for _ in 0..10 {
        pair.first_write(&mut Prng::stream(5, 1));
    }
    pair.part();
    let mut writer = open(&pair.ours());
    let mut lengths = Vec::new();
    for _ in 0..20 {
        writer.create_snapshot("again", Duration::ZERO).unwrap();
        writer.write(&[7; 600], GuestOffset(1000)).unwrap();
        writer.apply_snapshot("again").unwrap();
        writer.delete_snapshot("again").unwrap();
        lengths.push(writer.storage().length());
    }
    assert_eq!(lengths[5], lengths[19], "{lengths:?}");
    writer.finish().unwrap();
    assert_sound(&pair.ours());
}
