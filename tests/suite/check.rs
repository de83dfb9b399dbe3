//! Checks of sound and of damaged images: `qemu-img check` is the judge.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use qmpbackup::qcow2::{self, CheckLimits, Error, Finding, Header, Image, Report};
use qmpbackup::storage::{FileStorage, MemoryStorage};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Numbers that are the same in every run (splitmix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn must(program: &str, arguments: &[&str]) {
    let output = run(program, arguments);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {complaint}");
}

/// An image that `qemu-img` and `qemu-io` work on.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    size: u64,
    numbers: Numbers,
}

impl Disk {
    pub(crate) fn create(folder: &Path, name: &str, size: u64, options: &str) -> Self {
        let path = folder.join(format!("{name}.qcow2"));
        let options = if options.is_empty() { "compat=1.1" } else { options };
        let options = options.replace("FOLDER", folder.to_str().unwrap());
        must("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, path.to_str().unwrap(), &size.to_string()]);
        let seed = name.bytes().map(u64::from).sum();
        Self { path, size, numbers: Numbers(seed) }
    }

    /// Writes as a program does that ends before it closes the image.
    pub(crate) fn write_unclosed(&self, write: &str) {
        run("qemu-io", &["-f", "qcow2", "-c", write, "-c", "flush", "-c", "abort", self.name()]);
    }

    pub(crate) fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub(crate) fn img(&self, arguments: &[&str]) -> &Self {
        must("qemu-img", arguments);
        self
    }

    /// Seeded writes of a kind: "write -P 1", "write -z", "discard" and so on.
    pub(crate) fn io(&mut self, kind: &str, count: u64, longest: u64) -> &mut Self {
        // VM state knows no parts of sectors
        let unit = if kind.contains(" -b") { 512 } else { 1 };
        let mut commands = Vec::new();
        for _ in 0..count {
            let offset = self.numbers.below(self.size) / unit * unit;
            let length = (1 + self.numbers.below(longest.min(self.size - offset))).next_multiple_of(unit);
            commands.extend(["-c".to_owned(), format!("{kind} {offset} {length}")]);
        }
        let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
        arguments.extend(commands.iter().map(String::as_str));
        arguments.push(self.path.to_str().unwrap());
        must("qemu-io", &arguments);
        self
    }

    pub(crate) fn snapshot(&mut self, action: &str, name: &str) -> &mut Self {
        self.img(&["snapshot", action, name, self.name()]);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

/// What `qemu-img check` says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) opened: bool,
    pub(crate) corruptions: u64,
    pub(crate) leaks: u64,
    check_errors: u64,
    allocated: u64,
    compressed: u64,
    fragmented: u64,
    total: u64,
    image_end_offset: u64,
    pub(crate) words: String,
}

pub(crate) fn judge(path: &Path) -> Judgement {
    let output = run("qemu-img", &["check", "-f", "qcow2", "--output", "json", path.to_str().unwrap()]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let Ok(json) = serde_json::from_slice::<Value>(&output.stdout) else {
        return Judgement { words, ..Judgement::default() };
    };
    let number = |name: &str| json.get(name).and_then(Value::as_u64).unwrap_or_default();
    Judgement {
        opened: true,
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        allocated: number("allocated-clusters"),
        compressed: number("compressed-clusters"),
        fragmented: number("fragmented-clusters"),
        total: number("total-clusters"),
        image_end_offset: number("image-end-offset"),
        words,
    }
}

fn check(path: &Path) -> Result<Report, Error> {
    qcow2::check(&FileStorage::open(path).unwrap(), &mut |_| ControlFlow::Continue(()))
}

/// Both give the same numbers, and so do small limits.
fn assert_agree(disk: &Disk) -> Report {
    let (judgement, report) = (judge(&disk.path), check(&disk.path).unwrap());
    let clusters = report.clusters;
    let ours = Judgement {
        opened: true,
        corruptions: report.corruptions(),
        leaks: report.leaks,
        check_errors: 0,
        allocated: clusters.allocated,
        compressed: clusters.compressed,
        fragmented: clusters.fragmented,
        total: clusters.total,
        image_end_offset: report.image_end_offset.0,
        words: judgement.words.clone(),
    };
    assert_eq!(ours, judgement, "{}: {:#?}", disk.name(), report.findings);
    if let Ok(image) = Image::open(Arc::new(FileStorage::open(&disk.path).unwrap())) {
        let clusters = report.image_end_offset.0 / image.header().geometry.cluster_size();
        let limits = [(7 + clusters / 10, 3), (1 << 20, 2), (u64::MAX, usize::MAX)];
        for limits in limits.map(|(window, tables)| CheckLimits { window, tables }) {
            assert_same(&report, &image.check(limits, &mut |_| ControlFlow::Continue(())).unwrap());
        }
    }
    report
}

/// The same report but for the order of the findings.
fn assert_same(report: &Report, other: &Report) {
    let sorted = |report: &Report| {
        let mut report = report.clone();
        report.findings.sort_by_key(ToString::to_string);
        if report.findings_dropped() > 0 {
            report.findings.clear();
        }
        report
    };
    assert_eq!(sorted(report), sorted(other));
}

fn assert_clean(disk: &Disk) {
    let report = assert_agree(disk);
    assert_eq!(report.findings, [], "{}", disk.name());
    assert!(!report.is_corrupt() && !report.has_leaks());
}

/// Writes, zeroes, discards, a resize and snapshots that come and go, with a look in between.
fn live(disk: &mut Disk) {
    assert_clean(disk);
    disk.io("write -P 1", 20, 300 << 10).io("write -z", 8, 200 << 10).io("discard", 8, 300 << 10);
    assert_clean(disk);
    disk.io("write -z -u", 8, 200 << 10).io("write -P 2", 5, 4096);
    assert_clean(disk);
}

fn live_with_snapshots(disk: &mut Disk) {
    live(disk);
    disk.snapshot("-c", "first");
    disk.io("write -P 3", 10, 200 << 10).io("write -b -P 9", 3, 200 << 10);
    assert_clean(disk);
    disk.snapshot("-c", "second").snapshot("-c", "third");
    disk.io("discard", 10, 500 << 10).io("write -P 4", 3, 100 << 10);
    assert_clean(disk);
    disk.snapshot("-d", "second");
    assert_clean(disk);
    disk.snapshot("-a", "first").io("write -P 5", 10, 100 << 10);
    assert_clean(disk);
    disk.snapshot("-d", "first").snapshot("-d", "third");
    assert_clean(disk);
}

pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn images_of_all_cluster_sizes_are_clean() {
    let folder = folder();
    for (bits, size) in [(9, 5 * MIB + 512), (12, 40 * MIB), (16, 3000 * MIB), (18, 777_777_777), (21, 9000 * MIB)] {
        let options = format!("cluster_size={}", 1 << bits);
        live_with_snapshots(&mut Disk::create(folder.path(), &format!("cluster-{bits}"), size, &options));
    }
    let options = "cluster_size=65536,compat=0.10";
    live_with_snapshots(&mut Disk::create(folder.path(), "version-2", 1000 * MIB, options));
}

#[test]
fn images_with_refcounts_of_all_widths_are_clean() {
    let folder = folder();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let options = format!("cluster_size=4096,refcount_bits={bits}");
        let mut disk = Disk::create(folder.path(), &format!("refcount-{bits}"), 64 * MIB, &options);
        if bits < 4 { live(&mut disk) } else { live_with_snapshots(&mut disk) }
    }
}

#[test]
fn images_with_subclusters_are_clean() {
    let folder = folder();
    for bits in [14, 16, 21] {
        let options = format!("extended_l2=on,cluster_size={}", 1 << bits);
        live_with_snapshots(&mut Disk::create(folder.path(), &format!("extended-{bits}"), 500 * MIB, &options));
    }
}

#[test]
fn preallocated_images_are_clean() {
    let folder = folder();
    for preallocation in ["metadata", "falloc", "full"] {
        for extended in ["off", "on"] {
            let options = format!("extended_l2={extended},preallocation={preallocation}");
            let name = format!("{preallocation}-{extended}");
            let mut disk = Disk::create(folder.path(), &name, 20 * MIB + 1536, &options);
            live(&mut disk);
            disk.img(&["resize", "-q", "--preallocation", preallocation, disk.name(), "31M"]);
            disk.size = 31 * MIB;
            live(&mut disk);
        }
    }
}

#[test]
fn resized_images_are_clean() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "resized", 100 * MIB, "cluster_size=4096");
    live(&mut disk);
    disk.img(&["resize", "-q", disk.name(), "900M"]);
    disk.size = 900 * MIB;
    live(&mut disk);
    disk.img(&["resize", "-q", "--shrink", disk.name(), "50M"]);
    disk.size = 50 * MIB;
    live(&mut disk);
}

#[test]
fn compressed_images_are_clean() {
    let folder = folder();
    for (codec, bits) in [("zlib", 9), ("zlib", 16), ("zstd", 16), ("zstd", 21)] {
        let mut source = Disk::create(folder.path(), "source", 60 * MIB + 512, "");
        source.io("write -P 7", 20, 900 << 10).io("write -P 8", 20, 3000);
        let disk = folder.path().join(format!("{codec}-{bits}.qcow2"));
        let options = format!("compression_type={codec},cluster_size={}", 1 << bits);
        let name = disk.to_str().unwrap();
        must("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", &options, source.name(), name]);
        let mut disk = Disk { path: disk, ..source };
        assert!(assert_agree(&disk).clusters.compressed > 0);
        live_with_snapshots(&mut disk);
    }
}

#[test]
fn images_with_bitmaps_are_clean_until_the_autoclear_bit_goes() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "bitmaps", 500 * MIB, "");
    for (name, granularity) in [("first", "512"), ("second", "64K"), ("third", "4096")] {
        disk.img(&["bitmap", "--add", "-g", granularity, disk.name(), name]);
        live(&mut disk);
    }
    disk.img(&["bitmap", "--remove", disk.name(), "second"]);
    disk.img(&["bitmap", "--disable", disk.name(), "third"]);
    assert_clean(&disk);
    let bitmaps = Image::open(Arc::new(FileStorage::open(&disk.path).unwrap())).unwrap().bitmaps().unwrap();
    let seen: Vec<_> = bitmaps.iter().map(|b| (b.name.as_str(), b.granularity_bits, b.auto, b.in_use)).collect();
    assert_eq!(seen, [("first", 9, true, false), ("third", 12, false, false)]);
    let mut bytes = disk.bytes();
    bytes[95] &= !1;
    std::fs::write(&disk.path, &bytes).unwrap();
    assert!(assert_agree(&disk).leaks > 0);
    assert!(Image::open(Arc::new(MemoryStorage::new(bytes))).unwrap().bitmaps().unwrap().is_empty());
}

#[test]
fn snapshots_are_read_as_qemu_lists_them() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "snapshots", 500 * MIB, "");
    disk.io("write -P 1", 5, 100 << 10).snapshot("-c", "einß").io("write -P 1", 5, 100 << 10).snapshot("-c", "two");
    disk.img(&["resize", "-q", disk.name(), "600M"]);
    disk.snapshot("-c", "three");
    let output = run("qemu-img", &["info", "--output", "json", disk.name()]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let snapshots = Image::open(Arc::new(FileStorage::open(&disk.path).unwrap())).unwrap().snapshots().unwrap();
    let expected = info["snapshots"].as_array().unwrap();
    assert_eq!(snapshots.len(), expected.len());
    for (ours, theirs) in snapshots.iter().zip(expected) {
        assert_eq!(ours.id, theirs["id"]);
        assert_eq!(ours.name, theirs["name"]);
        assert_eq!(ours.date.as_secs(), theirs["date-sec"]);
        assert_eq!(ours.date.subsec_nanos(), theirs["date-nsec"]);
        assert_eq!(ours.vm_state_size, theirs["vm-state-size"]);
    }
    assert_eq!(snapshots.last().unwrap().disk_size, Some(600 * MIB));
}

#[test]
fn images_with_a_data_file_are_clean() {
    let folder = folder();
    for raw in ["off", "on"] {
        let options = format!("data_file=FOLDER/{raw}.data,data_file_raw={raw}");
        live(&mut Disk::create(folder.path(), &format!("data-file-{raw}"), 100 * MIB, &options));
    }
}

#[test]
fn overlays_and_committed_images_are_clean() {
    let folder = folder();
    let mut base = Disk::create(folder.path(), "base", 200 * MIB, "");
    live_with_snapshots(&mut base);
    let options = format!("backing_file={},backing_fmt=qcow2,extended_l2=on", base.name());
    let mut overlay = Disk::create(folder.path(), "overlay", 200 * MIB, &options);
    live(&mut overlay);
    overlay.img(&["commit", "-q", overlay.name()]);
    assert_clean(&overlay);
    assert_clean(&base);
}

#[test]
fn dirty_images_have_wrong_refcounts_but_are_not_corrupt() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "dirty", 200 * MIB, "lazy_refcounts=on");
    disk.io("write -P 1", 5, 200 << 10);
    assert_clean(&disk);
    disk.write_unclosed("write -P 2 100M 3M");
    let report = assert_agree(&disk);
    assert!(report.dirty && report.refcount_errors > 0);
    assert!(!report.is_corrupt(), "{:#?}", report.findings);
}

/// Places in an image that are worth a poke.
pub(crate) struct Map {
    pub(crate) header: Header,
    /// Offsets of entries of eight bytes that are not zero.
    l1: Vec<u64>,
    pub(crate) l2: Vec<u64>,
    pub(crate) refcount_table: Vec<u64>,
    refcount_blocks: Vec<u64>,
    bitmaps: Vec<u64>,
}

pub(crate) fn number(bytes: &[u8], offset: u64) -> u64 {
    let range = offset as usize..offset as usize + 8;
    bytes.get(range).map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

pub(crate) fn put(bytes: &mut [u8], offset: u64, value: u64) {
    bytes[offset as usize..offset as usize + 8].copy_from_slice(&value.to_be_bytes());
}

impl Map {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let header = Header::parse(bytes).unwrap();
        let used = |table: u64, entries: u64| {
            (0..entries).map(move |index| table + index * 8).filter(|place| number(bytes, *place) & OFFSET != 0)
        };
        let cluster_size = header.geometry.cluster_size();
        let l1: Vec<u64> = used(header.l1_table.offset.0, header.l1_table.entries).collect();
        let l2 = l1.iter().flat_map(|place| used(number(bytes, *place) & OFFSET, cluster_size / 8)).collect();
        let refcount_table: Vec<u64> = used(header.refcount_table.offset.0, header.refcount_table.entries).collect();
        let refcount_blocks = refcount_table.iter().map(|place| number(bytes, *place) & OFFSET).collect();
        let image = Image::open(Arc::new(MemoryStorage::new(bytes.to_vec()))).unwrap();
        let tables = image.bitmaps().unwrap();
        let bitmaps = tables.iter().flat_map(|bitmap| (0..bitmap.table.entries).map(|i| bitmap.table.offset.0 + i * 8));
        Self { l1, l2, refcount_table, refcount_blocks, bitmaps: bitmaps.collect(), header }
    }

    /// Damages one place and says what was done.
    pub(crate) fn poke(&self, bytes: &mut [u8], numbers: &mut Numbers) -> String {
        let kind = numbers.below(10);
        let places = match kind {
            0 => &self.l1,
            1..=4 => &self.l2,
            5 => &self.refcount_table,
            7 if self.header.nb_snapshots > 0 => return self.poke_snapshot(bytes, numbers),
            8 if !self.bitmaps.is_empty() => return self.poke_bitmap(bytes, numbers),
            9 if !self.bitmaps.is_empty() => &self.bitmaps,
            _ => return self.poke_block(bytes, numbers),
        };
        let place = *numbers.pick(places);
        let old = number(bytes, place);
        let value = match numbers.below(4) {
            0 => old ^ 1 << 63,
            1 => number(bytes, *numbers.pick(places)),
            2 => old ^ 1 << numbers.below(64),
            _ => old.wrapping_add(self.header.geometry.cluster_size() * (1 + numbers.below(3))),
        };
        put(bytes, place, value);
        format!("kind {kind}: entry at {place:#x} from {old:#x} to {value:#x}")
    }

    fn poke_block(&self, bytes: &mut [u8], numbers: &mut Numbers) -> String {
        let clusters = bytes.len() as u64 / self.header.geometry.cluster_size();
        let place =
            numbers.pick(&self.refcount_blocks) + numbers.below(clusters) * u64::from(self.header.refcount_bits()) / 8;
        let value = *numbers.pick(&[0, 1, 2, 3, 0xff]);
        let Some(byte) = bytes.get_mut(place as usize) else { return "nothing".to_owned() };
        let old = std::mem::replace(byte, value);
        format!("refcount byte at {place:#x} from {old:#x} to {value:#x}")
    }

    fn poke_snapshot(&self, bytes: &mut [u8], numbers: &mut Numbers) -> String {
        let place = self.header.snapshots_offset.0 + numbers.below(40);
        bytes[place as usize] ^= 1 << numbers.below(8);
        format!("snapshot table at {place:#x}")
    }

    fn poke_bitmap(&self, bytes: &mut [u8], numbers: &mut Numbers) -> String {
        let place = self.header.extensions.bitmaps.unwrap().directory_offset.0 + numbers.below(24);
        bytes[place as usize] ^= 1 << numbers.below(8);
        format!("bitmap directory at {place:#x}")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Clean,
    Leaks,
    Corrupt,
}

fn verdict(corrupt: bool, leaks: u64) -> Verdict {
    match (corrupt, leaks) {
        (true, _) => Verdict::Corrupt,
        (false, 0) => Verdict::Clean,
        (false, _) => Verdict::Leaks,
    }
}

/// What we call damage though `qemu-img check` does not.
fn stricter(finding: &Finding, header: &Header) -> bool {
    match finding {
        Finding::Overlap { .. }
        | Finding::OverlappingTable { .. }
        | Finding::SharedL2Table { .. }
        | Finding::BeyondEnd { .. } => true,
        Finding::Invalid(invalid) => {
            let no_zero_flag = header.version == 2 || header.geometry.extended_l2();
            invalid.field == "L2 entry" && invalid.value & 1 == 1 && no_zero_flag
        }
        _ => false,
    }
}

/// Pokes for each image; more for a longer look.
fn pokes() -> u64 {
    std::env::var("QMPBACKUP_POKES").ok().and_then(|pokes| pokes.parse().ok()).unwrap_or(60)
}

fn damage(disk: &Disk, pokes: u64) {
    let sound = disk.bytes();
    let map = Map::of(&sound);
    let mut numbers = Numbers(sound.len() as u64);
    let damaged = disk.path.with_extension("damaged");
    for _ in 0..pokes {
        let mut bytes = sound.clone();
        let mut what = map.poke(&mut bytes, &mut numbers);
        if numbers.below(4) == 0 {
            what = format!("{what}; {}", map.poke(&mut bytes, &mut numbers));
        }
        std::fs::write(&damaged, &bytes).unwrap();
        let judgement = judge(&damaged);
        let report = check(&damaged).unwrap();
        let theirs = verdict(!judgement.opened || judgement.corruptions + judgement.check_errors > 0, judgement.leaks);
        let ours = verdict(report.corruptions() > 0, report.leaks);
        let context = format!("{}: {what}\n{judgement:#?}\n{report:#?}", disk.name());
        if ours == theirs {
            if ours == Verdict::Leaks {
                assert_eq!(report.leaks, judgement.leaks, "{context}");
            }
        } else {
            let by_intention = ours > theirs
                && report
                    .findings
                    .iter()
                    .all(|finding| matches!(finding, Finding::Leak { .. }) || stricter(finding, &map.header));
            assert!(by_intention, "{context}");
        }
        if let Ok(image) = Image::open(Arc::new(MemoryStorage::new(bytes))) {
            let limits = CheckLimits { window: 130, tables: 2 };
            assert_same(&report, &image.check(limits, &mut |_| ControlFlow::Continue(())).unwrap());
        }
    }
}

#[test]
fn damaged_images_get_the_verdict_of_qemu() {
    let folder = folder();
    let kinds = [
        ("plain", "cluster_size=4096", true),
        ("extended", "cluster_size=16384,extended_l2=on", true),
        ("version-2", "cluster_size=4096,compat=0.10", false),
        ("refcount-1", "cluster_size=4096,refcount_bits=1", false),
        ("refcount-64", "cluster_size=1024,refcount_bits=64", true),
    ];
    for (name, options, bitmaps) in kinds {
        let mut disk = Disk::create(folder.path(), name, 8 * MIB, options);
        if bitmaps {
            disk.img(&["bitmap", "--add", "-g", "512", disk.name(), "first"]);
            disk.img(&["bitmap", "--add", "-g", "4096", disk.name(), "second"]);
        }
        disk.io("write -P 1", 8, 100 << 10).io("write -z", 4, 50 << 10);
        if name != "refcount-1" {
            disk.snapshot("-c", "one").io("write -P 2", 4, 50 << 10).snapshot("-c", "two");
        }
        disk.io("write -P 3", 4, 50 << 10);
        assert_clean(&disk);
        damage(&disk, pokes());
    }
}

#[test]
fn damaged_compressed_images_get_the_verdict_of_qemu() {
    let folder = folder();
    let mut source = Disk::create(folder.path(), "source", 8 * MIB, "");
    source.io("write -P 7", 20, 300 << 10);
    let disk = folder.path().join("compressed.qcow2");
    let name = disk.to_str().unwrap();
    must("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4096", source.name(), name]);
    let mut disk = Disk { path: disk, ..source };
    disk.io("write -P 1", 5, 50 << 10);
    damage(&disk, pokes());
}

#[test]
fn a_backup_that_was_cut_is_corrupt_even_where_qemu_says_it_is_clean() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "cut", 8 * MIB, "");
    disk.io("write -P 1", 5, 300 << 10);
    let bytes = disk.bytes();
    let cut = check(&disk.path).unwrap().image_end_offset.0 - 65536 + 1024;
    std::fs::write(&disk.path, &bytes[..cut as usize]).unwrap();
    assert_eq!(judge(&disk.path).corruptions, 0);
    let report = check(&disk.path).unwrap();
    assert!(report.is_corrupt());
    assert!(report.findings[0].to_string().contains("but the file ends at"), "{}", report.findings[0]);
}

#[test]
fn an_observer_can_end_a_check() {
    let folder = folder();
    let disk = Disk::create(folder.path(), "cancelled", 8 * MIB, "");
    let storage = FileStorage::open(&disk.path).unwrap();
    assert!(matches!(qcow2::check(&storage, &mut |_| ControlFlow::Break(())), Err(Error::Cancelled)));
}

/// An image with a table of 4 Mi entries behind its end, all pointing to the L2 table behind that.
fn hostile(folder: &Path, name: &str) -> (Vec<u8>, u64) {
    let disk = Disk::create(folder, name, MIB, "cluster_size=512,refcount_bits=64");
    let mut bytes = disk.bytes();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let (table, entries) = (bytes.len() as u64, 4 << 20);
    let l2 = table + entries * 8;
    bytes.resize(l2 as usize + 512, 0xff);
    (0..entries).for_each(|index| put(&mut bytes, table + index * 8, l2 | 1 << 63));
    (0..64).for_each(|index| put(&mut bytes, l2 + index * 8, 0x200 | 1 << 63));
    (bytes, table)
}

/// Appends a snapshot table; the L1 tables start so many bytes apart.
fn add_snapshots(bytes: &mut Vec<u8>, table: u64, apart: u64) {
    let (offset, count) = (bytes.len() as u64, 65_536);
    bytes.resize(bytes.len() + 56 * count as usize, 0);
    for index in 0..count {
        let entry = offset + index * 56;
        put(bytes, entry, table + index * apart);
        put(bytes, entry + 8, (4 << 20) << 32);
        put(bytes, entry + 32, 16);
    }
    bytes[60..64].copy_from_slice(&(count as u32).to_be_bytes());
    put(bytes, 64, offset);
}

#[test]
fn tables_that_are_claimed_a_thousand_times_are_read_once() {
    let folder = folder();
    for apart in [0, 512] {
        let (mut bytes, table) = hostile(folder.path(), &format!("apart-{apart}"));
        bytes[36..40].copy_from_slice(&(4_u32 << 20).to_be_bytes());
        put(&mut bytes, 40, table);
        add_snapshots(&mut bytes, table, apart);
        let start = std::time::Instant::now();
        let storage = MemoryStorage::new(bytes);
        let report = qcow2::check(&storage, &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(report.is_corrupt() && report.findings_dropped() > 0);
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}

#[test]
fn no_bytes_make_a_check_panic() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "garbage", 8 * MIB, "cluster_size=16384,extended_l2=on");
    disk.img(&["bitmap", "--add", disk.name(), "first"]);
    disk.io("write -P 1", 4, 100 << 10).snapshot("-c", "one").io("write -z", 4, 50 << 10);
    let sound = disk.bytes();
    let map = Map::of(&sound);
    let mut places = [map.l1, map.l2, map.refcount_table, map.refcount_blocks, map.bitmaps].concat();
    places.extend((0..32).map(|index| index * 8));
    places.extend((0..6).map(|index| map.header.snapshots_offset.0 + index * 8));
    places.extend((0..4).map(|index| map.header.extensions.bitmaps.unwrap().directory_offset.0 + index * 8));
    let mut numbers = Numbers(7);
    for _ in 0..2000 {
        let mut bytes = sound.clone();
        for _ in 0..numbers.below(4) {
            let value = numbers.next() >> numbers.below(64);
            put(&mut bytes, *numbers.pick(&places), value);
        }
        bytes.truncate(numbers.pick(&[bytes.len(), numbers.0 as usize % bytes.len()]).to_owned());
        let _ = qcow2::check(&MemoryStorage::new(bytes), &mut |_| ControlFlow::Continue(()));
    }
}

#[test]
fn one_wrong_bit_is_one_finding_and_makes_no_leaks() {
    let folder = folder();
    let mut disk = Disk::create(folder.path(), "one-bit", 8 * MIB, "cluster_size=4096");
    disk.img(&["bitmap", "--add", "-g", "512", disk.name(), "first"]);
    disk.io("write -P 1", 8, 100 << 10);
    let sound = disk.bytes();
    let map = Map::of(&sound);
    let bitmap = *map.bitmaps.iter().find(|place| number(&sound, **place) > 1).unwrap();
    let pokes = [(map.l1[0], 1 << 57), (map.l2[0], 1 << 57), (map.l2[1], 1 << 1)];
    for (place, bit) in pokes {
        let mut bytes = sound.clone();
        put(&mut bytes, place, number(&sound, place) ^ bit);
        std::fs::write(&disk.path, &bytes).unwrap();
        let report = check(&disk.path).unwrap();
        let [Finding::Invalid(invalid)] = report.findings.as_slice() else { panic!("{report:#?}") };
        assert_eq!((invalid.offset.0, invalid.value), (place, number(&bytes, place)));
        let judgement = judge(&disk.path);
        assert_eq!((judgement.corruptions, judgement.leaks), (1, 0), "{judgement:#?}");
    }
    // as in QEMU, what a damaged entry of a bitmap table points to is not counted
    for change in [512, 1, 1 << 60] {
        let mut bytes = sound.clone();
        put(&mut bytes, bitmap, number(&sound, bitmap) + change);
        let report = qcow2::check(&MemoryStorage::new(bytes), &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(report.findings[0].to_string().starts_with("bitmap table entry is"), "{:#?}", report.findings);
        assert_eq!((report.structure_errors, report.leaks), (1, 1));
    }
}
