//! Files of a few KiB that claim to be terabytes: the answer takes as long as what is in them, not as what they claim.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qmpbackup::qcow2::{self, Image};
use qmpbackup::storage::FileStorage;

use crate::support::program::Ended;
use crate::support::tools;

const GIB: u64 = 1 << 30;

/// The length of the files.
const LENGTH: u64 = 8 << 40;

const COPIED: u64 = 1 << 63;

/// Seconds of processor time, and bytes, that are enough for any of them.
const SECONDS: u64 = 5;
const MEMORY: i64 = 256 << 20;

/// An image of which only the header is written; the L1 table is in the fourth cluster, the refcount table in the second.
struct Claim {
    _folder: tempfile::TempDir,
    dir: PathBuf,
    file: File,
    cluster: u64,
}

impl Claim {
    fn new(cluster_bits: u32, l1_size: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("disk0");
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("FULL-1600000000-disk");
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(LENGTH).unwrap();
        let cluster = 1 << cluster_bits;
        let claim = Self { _folder: folder, dir, file, cluster };
        let size = (u64::from(l1_size) * (cluster / 8)).saturating_mul(cluster).min(1 << 62);
        claim.numbers(0, &[0x5146_49fb_0000_0003]);
        claim.numbers(16, &[u64::from(cluster_bits), size, u64::from(l1_size), 3 * cluster, cluster, 1 << 32]);
        claim.numbers(96, &[(4 << 32) + 104]);
        claim
    }

    fn path(&self) -> PathBuf {
        self.dir.join("FULL-1600000000-disk")
    }

    fn numbers(&self, offset: u64, numbers: &[u64]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        self.file.write_all_at(&bytes, offset).unwrap();
    }

    /// Writes a table of clusters that begin so far apart.
    fn table(&self, offset: u64, entries: u64, (first, apart): (u64, u64)) {
        let entries: Vec<u64> = (0..entries).map(|index| (first + index * apart) | COPIED).collect();
        self.numbers(offset, &entries);
    }

    /// As many snapshots as the format has, each with the largest L1 table that there is, in a place of its own.
    fn snapshots(&self) {
        let most = 4 << 20;
        let entry = |index: u64| [(GIB << 6) + index * most * 8, most << 32, 0, 0, 16, 0, 0];
        let entries: Vec<u64> = (0..65_536).flat_map(entry).collect();
        self.numbers(GIB, &entries);
        self.numbers(56, &[(1 << 32) + 65_536, GIB]);
    }
}

/// Runs the program, which must have come to an end by itself, and returns its exit code.
#[track_caller]
fn run(words: &[&OsStr]) -> i32 {
    let script = format!(
        "import resource, subprocess, sys\n\
         limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))\n\
         code = subprocess.run(sys.argv[1:], preexec_fn=limit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode\n\
         print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    );
    let told = tools::run(Command::new("python3").args(["-c", &script, env!("CARGO_BIN_EXE_qmprestore")]).args(words));
    let numbers: Vec<i64> = told.split_whitespace().map(|number| number.parse().unwrap()).collect();
    assert!(numbers[0] >= 0, "killed after {SECONDS} s: {words:?}");
    assert!(numbers[1] * 1024 < MEMORY, "{} KiB: {words:?}", numbers[1]);
    numbers[0].try_into().unwrap()
}

/// Each command answers in time; those that look at the image find that its refcounts are wrong.
#[track_caller]
fn assert_answered(claim: &Claim) {
    let word = OsStr::new;
    let (dir, path, out) = (claim.dir.as_os_str(), claim.path(), claim.dir.with_file_name("out"));
    assert_eq!(run(&[word("check"), path.as_os_str()]), 4);
    assert_eq!(run(&[word("verify"), word("--dir"), dir]), 4);
    let merge = [word("merge"), word("--dir"), dir, word("--force"), word("--out"), out.as_os_str()];
    assert_eq!(run(&merge), 4);
    assert_eq!(run(&[&merge[..], &[word("--format"), word("raw")]].concat()), 4);
    for how in ["--skip-check", "--salvage"] {
        assert!([0, 3].contains(&run(&[&merge[..], &[word(how)]].concat())), "{how}");
    }
    // with refcounts for all that is referred to the file may become longer than the system permits
    let copy = claim.dir.with_file_name("copy");
    crate::support::sparse::copy(&path, &copy);
    assert!([0, 1, 4].contains(&run(&[word("check"), word("--repair=all"), copy.as_os_str()])));
}

#[test]
fn clusters_that_lie_far_apart_are_counted_as_fast_as_neighbours() {
    let claim = Claim::new(9, 64);
    claim.table(3 * 512, 64, (GIB, 512));
    claim.table(GIB, 4096, (2 * GIB, (LENGTH - 3 * GIB) / 4096 / 512 * 512));
    assert_answered(&claim);
}

#[test]
fn tables_that_are_holes_are_not_read() {
    for (bits, tables) in [(21, 1 << 12), (16, 1 << 18), (12, 1 << 20)] {
        let claim = Claim::new(bits, tables);
        claim.table(3 << bits, tables.into(), (GIB, 1 << bits));
        assert_answered(&claim);
    }
}

#[test]
fn a_hole_of_two_million_tables_is_asked_for_once() {
    let tables = 2 << 20;
    let claim = Claim::new(16, tables);
    // an order without neighbours
    let places = (0..u64::from(tables)).map(|index| index * 1_234_567 % u64::from(tables));
    let entries: Vec<u64> = places.map(|place| (GIB + (place << 16)) | COPIED).collect();
    claim.numbers(3 << 16, &entries);
    let out = claim.dir.with_file_name("out");
    let merge = ["merge", "--salvage", "--dir"].map(OsStr::new);
    assert_eq!(run(&[&merge[..], &[claim.dir.as_os_str(), OsStr::new("--out"), out.as_os_str()]].concat()), 0);
    assert_eq!(run(&[OsStr::new("check"), claim.path().as_os_str()]), 4);
}

#[test]
fn l1_tables_of_snapshots_that_are_holes_are_not_read_and_not_counted_one_by_one() {
    let claim = Claim::new(9, 1);
    claim.snapshots();
    assert_answered(&claim);
    let report = qcow2::check(&FileStorage::open(&claim.path()).unwrap(), &mut |_| std::ops::ControlFlow::Continue(()));
    let report = report.unwrap();
    // header, refcount table, L1 table, snapshot table, and the L1 tables of the snapshots
    assert_eq!(report.refcount_errors, 3 + 65_536 * 56 / 512 + 65_536 * 65_536);
    assert_eq!((report.findings.len(), report.findings_dropped()), (100, report.refcount_errors - 100));
}

#[test]
fn a_refcount_block_that_is_everywhere_is_read_once() {
    let claim = Claim::new(9, 1);
    // one bit for each refcount, of which every other is set
    claim.numbers(96, &[104]);
    claim.numbers(48, &[GIB, 16_384 << 32]);
    claim.numbers(GIB, &vec![GIB / 2; 1 << 20]);
    claim.numbers(GIB / 2, &[0x5555_5555_5555_5555; 64]);
    assert_answered(&claim);
}

#[test]
fn millions_of_damaged_l1_entries_are_salvaged_in_little_memory() {
    for (entries, is_garbage) in [(4 << 20, false), (1 << 20, true)] {
        let claim = Claim::new(9, entries);
        // all lead to one table, or every other one nowhere
        let value =
            |index| if is_garbage && index % 2 == 0 { 1 } else { (GIB + u64::from(is_garbage) * index * 512) | COPIED };
        claim.numbers(3 * 512, &(0..entries.into()).map(value).collect::<Vec<u64>>());
        let (dir, out) = (claim.dir.as_os_str(), claim.dir.with_file_name("out"));
        let words = ["merge", "--salvage", "--dir"].map(OsStr::new);
        assert_eq!(run(&[&words[..], &[dir, OsStr::new("--out"), out.as_os_str()]].concat()), 3, "{entries}");
    }
}

/// Each of them harms all restore points from it on.
#[test]
fn thousands_of_damaged_incs_of_one_chain_are_named_in_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(path("FULL-1600000000-disk")).arg("1M"));
    for time in 1_600_000_001..1_600_010_000 {
        File::create(path(&format!("INC-{time}-disk"))).unwrap();
    }
    assert_eq!(run(&[OsStr::new("verify"), OsStr::new("--dir"), folder.path().as_os_str()]), 4);
}

#[test]
fn what_the_tables_map_is_where_they_are_no_holes() {
    let claim = Claim::new(21, 3);
    claim.table(3 << 21, 3, (GIB, 1 << 21));
    claim.table(GIB + (1 << 21) + (192 << 10), 1, (2 * GIB, 0));
    let image = Image::open(Arc::new(FileStorage::open(&claim.path()).unwrap())).unwrap();
    let start = (1 << 39) + (192 << 10) / 8 * claim.cluster;
    let part = start..start + (64 << 10) / 8 * claim.cluster;
    assert_eq!(image.occupied(), std::slice::from_ref(&part));
    assert!(image.size() > 1 << 40);
}

/// The same image without holes has the same report.
#[test]
fn holes_are_zeroes() {
    let claim = Claim::new(9, 40);
    claim.table(3 * 512, 40, (1 << 20, 4096));
    claim.table(1 << 20, 64, (2 << 20, 512));
    claim.table((1 << 20) + 8192, 64, (3 << 20, 8192));
    claim.numbers(512, &[64 * 512]);
    claim.numbers(64 * 512 + 8, &[0x0001_0002_0000_0001]);
    claim.file.set_len(4 << 20).unwrap();
    let check = |path: &Path| {
        let storage = FileStorage::open(path).unwrap();
        qcow2::check(&storage, &mut |_| std::ops::ControlFlow::Continue(())).unwrap()
    };
    let report = check(&claim.path());
    let bytes = std::fs::read(claim.path()).unwrap();
    std::fs::write(claim.path(), bytes).unwrap();
    assert!(report.corruptions() > 100 && report.leaks > 0, "{report:#?}");
    assert_eq!(check(&claim.path()), report);
}

#[test]
fn what_is_a_hole_in_an_image_is_one_in_what_is_made_of_it() {
    const MIB: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("FULL-100-disk");
    let create = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"];
    tools::run(tools::qemu_img().args(create).arg(&full).arg("256M"));
    tools::run(tools::qemu_io().args(["-c", "write -q -P 7 10M 1100k"]).arg(&full));
    let dir = folder.path().to_str().unwrap();
    let all = [&[][..], &["--format", "raw"], &["--detect-zeroes"], &["--verify"], &["--salvage"], &["--threads", "1"]];
    for has_sums in [false, true] {
        if has_sums {
            Ended::run(["manifest", "--dir", dir]).with(0);
        }
        for options in all {
            let out = folder.path().join("out");
            let words = ["merge", "--force", "--dir", dir, "--out", out.to_str().unwrap()];
            // without checksums not all can be verified
            let code = if has_sums || !options.contains(&"--verify") { 0 } else { 3 };
            let ended = Ended::run(words.iter().chain(options)).with(code);
            tools::run(tools::qemu_img().args(["compare", "-q"]).args([&full, &out]));
            let blocks = out.metadata().unwrap().blocks() * 512;
            assert!(blocks < 4 * MIB, "{options:?}: {blocks} {ended:?}");
        }
    }
}
