//! Images that a writer starts from: what `qemu-img` and `qemu-io` make of a seed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::layer::Knobs;
use crate::support::prng::Prng;
use crate::support::tools;

/// An image, and the bytes of its disks.
pub(crate) struct Base {
    folder: TempDir,
    pub(crate) knobs: Knobs,
    pub(crate) image: Vec<u8>,
    /// The active disk.
    pub(crate) disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    /// How it was made, for whoever sees a test fail.
    said: String,
}

impl Base {
    /// A seed is an image. Clusters are not larger than asked for, nor is the disk.
    pub(crate) fn make(seed: u64, largest_cluster_bits: u64, largest: u64) -> Self {
        let prng = &mut Prng::stream(seed, 20);
        let size = match prng.below(8) {
            0 => prng.between(1, 16) * 512,
            1..=2 => largest / 512 * 512,
            _ => prng.between(1, largest / 512) * 512,
        };
        let mut knobs = Knobs::draw(prng, 9, size);
        knobs.killed = false;
        if knobs.cluster_bits > largest_cluster_bits {
            knobs.cluster_bits = prng.between(if knobs.extended_l2 { 14 } else { 9 }, largest_cluster_bits.max(14));
        }
        let folder = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let said = format!("seed {seed}: {size} bytes, {}", knobs.options());
        let mut base = Self { folder, knobs, image: Vec::new(), disk: Vec::new(), snapshots: Vec::new(), said };
        base.create(prng, size);
        // a refcount of one bit cannot count a snapshot
        let snapshots = if base.knobs.refcount_bits > 1 && prng.one_in(3) { prng.between(1, 2) } else { 0 };
        // compressed clusters share host clusters, and a snapshot counts each of them once more
        let compresses = !base.knobs.preallocated && (snapshots == 0 || base.knobs.refcount_bits >= 8);
        base.fill(prng, size, compresses);
        for number in 0..snapshots {
            let name = format!("s{number}");
            base.run(tools::qemu_img().args(["snapshot", "-c", &name, "image"]));
            let bytes = base.convert("image", &["-l", &format!("snapshot.name={name}")]);
            base.snapshots.push((name, bytes));
            if prng.one_in(2) {
                base.fill(prng, size, false);
            }
        }
        if base.knobs.version_3 && prng.one_in(5) {
            base.run(tools::qemu_img().args(["bitmap", "--add", "--disable", "image", "b0"]));
        }
        base.image = std::fs::read(base.path("image")).unwrap();
        base.disk = base.convert("image", &[]);
        base
    }

    pub(crate) fn said(&self) -> &str {
        &self.said
    }

    /// Writes an image to a file and holds it against what its disks should be; `leaks` says whether some may be.
    pub(crate) fn judge(&self, image: &[u8], disk: &[u8], leaks: bool) {
        let path = self.path("judged");
        std::fs::write(&path, image).unwrap();
        let mut check = tools::qemu_img();
        check.args(["check", "-f", "qcow2"]).arg(&path);
        let output = tools::output(&mut check);
        let clean = match output.status.code() {
            Some(0) => output.stderr.is_empty(),
            Some(3) => leaks,
            _ => false,
        };
        assert!(clean, "{}\n{}", self.said, tools::told(&check, &output));
        assert_same(&self.convert("judged", &[]), disk, &self.said);
        for (name, bytes) in &self.snapshots {
            let now = self.convert("judged", &["-l", &format!("snapshot.name={name}")]);
            assert_same(&now, bytes, &format!("{} {name}", self.said));
        }
    }

    fn create(&mut self, prng: &mut Prng, size: u64) {
        let options = self.knobs.options();
        self.run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", &options, "image", &size.to_string()]));
        std::fs::write(self.path("noise"), prng.bytes(70_001)).unwrap();
    }

    fn fill(&mut self, prng: &mut Prng, size: u64, mut compresses: bool) {
        let mut qemu_io = tools::qemu_io();
        qemu_io.args(["-f", "qcow2", "-t", "unsafe", "-d", "unmap"]);
        // QEMU compresses only into clusters that hold nothing
        let mut packed = BTreeSet::new();
        for _ in 0..prng.below(12) {
            let start = prng.below(size);
            let length = prng.between(1, (size - start).min(3 * self.knobs.cluster_size()));
            let cluster = self.knobs.cluster_size();
            let whole = start / cluster * cluster;
            let command = match if compresses && prng.one_in(2) { 4 } else { prng.below(8) } {
                0..=2 => format!("write -q -s noise {start} {length}"),
                3 => format!("write -q -P {} {start} {length}", prng.below(256)),
                4..=5 if compresses && packed.insert(whole) => {
                    format!("write -q -c -P {} {whole} {}", prng.below(256), cluster.min(size - whole))
                }
                6 => format!("write -q -z {start} {length}"),
                _ => format!("write -q -z -u {whole} {}", cluster.min(size - whole)),
            };
            compresses &= command.contains(" -c ");
            qemu_io.args(["-c", &command]);
        }
        self.run(qemu_io.arg("image"));
    }

    fn run(&mut self, command: &mut std::process::Command) {
        tools::run(command.current_dir(self.folder.path()));
        write!(self.said, "\n{}", tools::line(command)).unwrap();
    }

    fn convert(&self, name: &str, options: &[&str]) -> Vec<u8> {
        let raw = self.path("raw");
        tools::run(
            tools::qemu_img()
                .args(["convert", "-f", "qcow2", "-O", "raw"])
                .args(options)
                .args([self.path(name), raw.clone()]),
        );
        std::fs::read(raw).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }
}

/// The same bytes, or where they begin to differ.
#[track_caller]
pub(crate) fn assert_same(is: &[u8], should: &[u8], said: &str) {
    assert_eq!(is.len(), should.len(), "{said}");
    if let Some(at) = is.iter().zip(should).position(|(is, should)| is != should) {
        panic!("byte {at:#x} is {:#x}, not {:#x}\n{said}", is[at], should[at]);
    }
}
