//! A restored disk is what the guest left, and every QEMU from 5.2 on boots with it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::tools;

const POINTS: [&str; 4] = ["1793588400", "1793674800", "1793761200", "1793847600"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn restored(folder: &Path, point: &str, options: &[&str]) -> PathBuf {
    let out = folder.join(format!("disk-{point}{}", options.concat()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
    command.arg("merge").arg("--dir").arg(root().join("testdata/chain")).args(["--until", point]);
    tools::run(command.args(options).arg("--out").arg(&out));
    out
}

#[test]
fn every_restore_point_of_the_real_chain_has_the_bytes_of_its_day() {
    let folder = tempfile::tempdir().unwrap();
    for point in POINTS {
        for options in [&[][..], &["--format", "raw"], &["--compress"], &["--compress=zstd", "--cluster-size=4096"]] {
            let out = restored(folder.path(), point, options);
            tools::run(Command::new(root().join("testdata/check")).arg(&out).arg(point));
        }
    }
}

#[test]
fn every_qemu_reads_what_is_compressed_here_with_the_longest_window_of_deflate() {
    let folder = tempfile::tempdir().unwrap();
    let image = restored(folder.path(), POINTS[3], &["--compress", "--cluster-size=1M"]);
    let expected = std::fs::read_to_string(root().join("testdata/SHA256SUMS")).unwrap();
    for release in ["5.2", "7.2", "10.0", "11"] {
        let raw = folder.path().join(format!("raw-{release}"));
        tools::run(tools::qemu_img_of(release).args(["convert", "-O", "raw"]).arg(&image).arg(&raw));
        let sum = tools::run(Command::new("sha256sum").stdin(std::fs::File::open(&raw).unwrap()));
        let line = format!("{}  disk-{}.raw", sum.split(' ').next().unwrap(), POINTS[3]);
        assert!(expected.lines().any(|known| known == line), "QEMU {release}: {line}");
    }
}

/// Boots a disk and returns what the guest says of it.
fn boot(image: &Path, release: &str) -> String {
    tools::run(Command::new(root().join("tests/setup/boot")).arg(image).arg(release))
}

fn boots(release: &str) {
    let folder = tempfile::tempdir().unwrap();
    for (point, options) in [(POINTS[2], &[][..]), (POINTS[3], &["--compress"]), (POINTS[1], &["--compress=zstd"])] {
        // Debian built this one without zstd
        if release == "5.2" && options == ["--compress=zstd"] {
            continue;
        }
        let told = boot(&restored(folder.path(), point, options), release);
        let sums = std::fs::read(root().join(format!("testdata/files/{point}.md5"))).unwrap();
        let sum = tools::run(Command::new("md5sum").stdin(file(&folder.path().join("sums"), &sums)));
        let number = POINTS.iter().position(|other| *other == point).unwrap() + 1;
        assert!(told.contains(&format!("RESTORE-POINT {number}")), "{told}");
        assert!(told.contains(&format!("FILES-MD5 {}", sum.split(' ').next().unwrap())), "{told}");
    }
}

fn file(path: &Path, bytes: &[u8]) -> std::fs::File {
    std::fs::write(path, bytes).unwrap();
    std::fs::File::open(path).unwrap()
}

#[test]
fn qemu_5_2_boots_restored_disks() {
    boots("5.2");
}

#[test]
fn qemu_7_2_boots_restored_disks() {
    boots("7.2");
}

#[test]
fn qemu_10_0_boots_restored_disks() {
    boots("10.0");
}

#[test]
fn qemu_11_boots_restored_disks() {
    boots("11");
}
