//! Chains of raw images: what is data in an INC overrides what lies below, zeroes included; its holes do not.
//!
//! No outside judge knows such chains, so the model decides.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::support::disk::Disk;
use crate::support::merge::Wanted;
use crate::support::oracle::convert;
use crate::support::prng::Prng;
use crate::support::program::{Ended, qmprestore};
use crate::support::seeds::shared_seeds;
use crate::support::sparse;

/// Holes come in blocks of the file system, and no usual one has larger blocks than this.
const BLOCK: u64 = 64 << 10;

struct RawChain {
    root: TempDir,
    dir: PathBuf,
    /// For each restore point its name and the disk then.
    points: Vec<(String, Disk)>,
}

impl RawChain {
    fn generate(prng: &mut Prng) -> Self {
        let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let disk = *prng.pick(&["raw disk-0.img", "vm-102-disk-0.raw"]);
        let dir = root.path().join("backup").join(disk);
        std::fs::create_dir_all(&dir).unwrap();
        if prng.one_in(2) {
            std::fs::write(root.path().join(format!("backup/{disk}.config")), r#"{"format":"raw"}"#).unwrap();
        }
        let mut chain = Self { root, dir, points: Vec::new() };
        let mut size = prng.between(1, 4 << 20).next_multiple_of(512);
        let mut time = 1_640_000_000 + prng.below(100_000_000);
        let mut now = Disk::new(size);
        for number in 0..prng.between(2, 5) {
            if number > 0 && prng.one_in(3) {
                size = prng.between(size / 2, size * 2).next_multiple_of(512);
                now.resize(size);
            }
            time += prng.between(1, 90_000);
            let point = format!("{}-{time}", if number == 0 { "FULL" } else { "INC" });
            let path = chain.dir.join(format!("{point}-{disk}"));
            chain.make_layer(prng, &path, &mut now);
            chain.points.push((point, now.clone()));
        }
        chain
    }

    fn make_layer(&self, prng: &mut Prng, path: &PathBuf, now: &mut Disk) {
        let size = now.size();
        let file = File::create(path).unwrap();
        file.set_len(size).unwrap();
        for _ in 0..prng.between(u64::from(self.points.is_empty()), 8) {
            let start = prng.below(size.div_ceil(BLOCK)) * BLOCK;
            let end = size.min(start + BLOCK * prng.between(1, 8));
            let len = usize::try_from(end - start).unwrap();
            let bytes = match prng.below(3) {
                0 => vec![0; len],
                1 => vec![prng.next().to_le_bytes()[0]; len],
                _ => prng.bytes(len),
            };
            file.write_all_at(&bytes, start).unwrap();
            now.write(start, &bytes);
        }
    }
}

fn raw_layers_override_by_their_extents(seed: u64) {
    let prng = &mut Prng::stream(seed, 2);
    let chain = RawChain::generate(prng);
    let before = sparse::fingerprints(&chain.root.path().join("backup"));
    let out = chain.root.path().join("merged");
    for (point, expected) in &chain.points {
        std::fs::create_dir(&out).unwrap();
        let wanted = Wanted { raw: true, ..Wanted::default() };
        let raw = wanted.merge(&chain.dir, point, &out, "raw", prng.between(1, 4));
        assert_eq!(expected.first_difference(&raw), None, "seed {seed}, {point} as raw");

        let qcow2 = Wanted::default().merge(&chain.dir, point, &out, "qcow2", prng.between(1, 4));
        convert(&qcow2, &out.join("of qcow2"));
        assert_eq!(expected.first_difference(&out.join("of qcow2")), None, "seed {seed}, {point} as qcow2");
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert_eq!(sparse::fingerprints(&chain.root.path().join("backup")), before, "the merge changed the backups");
}

shared_seeds! {
    raw_layers_override_by_their_extents, 40;
    first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
}

#[test]
fn a_raw_disk_whose_guest_wrote_a_qcow2_header_stays_raw() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("guest.img");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(root.path().join("guest.img.config"), r#"{"format":"raw"}"#).unwrap();
    let mut disk = Disk::new(256 << 10);
    let full = dir.join("FULL-1640000000-guest.img");
    crate::support::tools::run(
        crate::support::tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&full).arg("1G"),
    );
    let header = std::fs::read(&full).unwrap();
    let file = File::create(&full).unwrap();
    file.set_len(disk.size()).unwrap();
    file.write_all_at(&header[..4096], 0).unwrap();
    disk.write(0, &header[..4096]);

    // one of our images looks the same where its manifest is lost
    let out = root.path().join("raw");
    let merge = |words: &[&str]| {
        let mut command = qmprestore(["merge", "--format=raw", "--dir"]);
        command.arg(&dir).arg("--out").arg(&out).args(words);
        Ended::of(&mut command)
    };
    for words in [&[][..], &["--salvage"]] {
        merge(words).with(2).says("--source-format qcow2");
        assert!(!out.exists());
    }
    // nothing is written to it, and nothing said of tables that may be none
    let before = std::fs::read(&full).unwrap();
    for words in [&["check"][..], &["check", "--repair=all"], &["verify"]] {
        let ended = Ended::of(qmprestore(words).arg("--dir").arg(&dir)).with(1);
        ended.says("--source-format qcow2").says_not("refcount");
        assert!(std::fs::read(&full).unwrap() == before);
    }
    merge(&["--source-format=raw"]).with(0);
    assert_eq!(disk.first_difference(&out), None);
    std::fs::write(root.path().join("guest.img.config"), r#"{"format":"raw","backup-format":"raw"}"#).unwrap();
    merge(&["--force"]).with(0);
    assert_eq!(disk.first_difference(&out), None);
}

#[test]
fn a_chain_that_is_said_to_be_raw_but_looks_like_qcow2_gets_a_warning() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("disk");
    std::fs::create_dir(&dir).unwrap();
    for name in ["FULL-1640000000-disk", "INC-1640000001-disk"] {
        crate::support::tools::run(
            crate::support::tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(dir.join(name)).arg("1M"),
        );
    }
    std::fs::write(root.path().join("disk.config"), r#"{"format":"qcow2","backup-format":"raw"}"#).unwrap();
    for (format, code) in [(None, 3), (Some("qcow2"), 0)] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_qmprestore"));
        let out = root.path().join(format!("out {code}"));
        command.args(["merge", "--quiet", "--dir"]).arg(&dir).arg("--out").arg(out);
        command.args(format.map(|format| format!("--source-format={format}")));
        let output = crate::support::tools::output(&mut command);
        assert_eq!(output.status.code(), Some(code), "{}", crate::support::tools::told(&command, &output));
    }
}

/// QEMU counts sectors: it leaves out what of the last one a qcow2 image does not hold whole, and fills up that of a raw one.
#[test]
fn the_last_bytes_of_a_disk_without_a_whole_last_sector_are_in_a_qcow2_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut disk = vec![7; 1_000_003];
    std::fs::write(path("FULL-1-x"), &disk).unwrap();
    std::fs::write(path("x.config"), r#"{"format": "raw"}"#).unwrap();
    let merged = |words: &[&str]| {
        let arguments = ["merge", "--force", "--verify", "--skip-check", "--out", "out", "--dir", "."];
        Ended::of(qmprestore(arguments.iter().chain(words)).current_dir(folder.path())).with(3);
    };
    merged(&["--format=raw"]);
    assert!(std::fs::read(path("out")).unwrap() == disk);
    disk.resize(1_000_448, 0);
    for option in ["--cluster-size=64K", "--cluster-size=512", "--compress"] {
        merged(&[option]);
        convert(&path("out"), &path("raw"));
        assert!(std::fs::read(path("raw")).unwrap() == disk, "{option}");
    }
}
