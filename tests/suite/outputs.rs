//! What stands at the place of the output.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use qmpbackup::storage::{Access, FileStorage};
use tempfile::TempDir;

use crate::support::{sparse, tools};

/// A FULL and an INC of one disk.
fn chain() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("disk0");
    fs::create_dir(&dir).unwrap();
    for (name, write) in [("FULL-1600000000-disk", "write -P 1 0 4M"), ("INC-1600000001-disk", "write -P 2 1M 64k")] {
        let path = dir.join(name);
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("4M"));
        tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", write]).arg(&path));
    }
    (root, dir)
}

/// Merges the FULL, and returns the exit code and the last line that was said.
fn merge(dir: &Path, out: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
    command.args(["merge", "--until", "FULL", "--dir"]).arg(dir).arg("--out").arg(out).args(more);
    let output = tools::output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr);
    (output.status.code(), said.lines().last().unwrap_or_default().to_owned())
}

#[test]
fn no_image_of_the_backup_is_replaced_be_it_read_or_not() {
    let (root, dir) = chain();
    fs::write(dir.join("INC-1600000002-disk.partial"), "partial").unwrap();
    let before = sparse::fingerprints(&dir);
    let newer = dir.join("INC-1600000001-disk");
    let link = root.path().join("link");
    symlink(&newer, &link).unwrap();
    let same = root.path().join("same");
    fs::hard_link(&newer, &same).unwrap();
    let full = dir.join("FULL-1600000000-disk");
    for out in [full, newer, dir.join("INC-1600000002-disk.partial"), link, same] {
        let (code, said) = merge(&dir, &out, &["--force"]);
        assert_eq!(code, Some(1), "{}: {said}", out.display());
        assert!(said.contains("is itself a part of the chain"), "{}: {said}", out.display());
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
    let full = fs::File::options().write(true).open(dir.join("FULL-1600000000-disk")).unwrap();
    let status = command.args(["merge", "--out", "-", "--dir"]).arg(&dir).stdout(full).status().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(sparse::fingerprints(&dir), before);
}

#[test]
fn no_output_becomes_an_image_of_the_backup() {
    let (root, dir) = chain();
    let before = sparse::fingerprints(&dir);
    for name in ["INC-1600000002-disk", "FULL-1600000002", "disk"] {
        let (code, said) = merge(&dir, &dir.join(name), &[]);
        assert!(code == Some(1) && said.contains("would be taken for an image"), "{name}: {said}");
    }
    assert_eq!(sparse::fingerprints(&dir), before);
    // as another disk, also in a folder that is to be made
    for (dir, name) in
        [(root.path(), "new/FULL-1-new"), (root.path(), "INC-1600000003-disk"), (&dir, "INC-1600000003-disk")]
    {
        let (code, said) = merge(dir, &root.path().join(name), &[]);
        assert!(code == Some(1) && said.contains("would be taken for an image"), "{name}: {said}");
    }
    assert_eq!(sparse::fingerprints(&dir), before);
    // another name does there, and any elsewhere
    assert_eq!(merge(&dir, &dir.join("restored"), &[]).0, Some(0));
    let elsewhere = tempfile::tempdir().unwrap();
    assert_eq!(merge(&dir, &elsewhere.path().join("INC-1600000002-disk"), &[]).0, Some(0));
}

#[test]
fn no_bookkeeping_of_a_backup_is_replaced_nor_an_image_of_another() {
    let (root, dir) = chain();
    let other = root.path().join("elsewhere/disk.qcow2");
    let manifest = qmpbackup::chain::Manifest::path(&other);
    for folder in [manifest.parent().unwrap(), &dir.join(".qmpbackup")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(manifest, "{}").unwrap();
    fs::write(&other, "another backup").unwrap();
    for name in ["uuid", "disk0/uuid", "disk0/disk.config", "disk0/.qmpbackup/lock"] {
        fs::write(root.path().join(name), "kept").unwrap();
    }
    let before = sparse::fingerprints(root.path());
    let bookkeeping = ["uuid", "disk0/uuid", "disk0/disk.config", "disk0/new.config", "disk0/.qmpbackup/lock"];
    let more = [
        "elsewhere/uuid",
        "elsewhere/new.partial",
        "elsewhere/new.config",
        "disk0/.qmpbackup/new",
        "elsewhere/disk.qcow2",
        "elsewhere/.qmpbackup/disk.qcow2.json",
    ];
    for name in bookkeeping.iter().chain(&more) {
        let (code, said) = merge(&dir, &root.path().join(name), &["--force"]);
        assert!(code == Some(1) && said.contains("of a backup"), "{name}: {said}");
        assert_eq!(sparse::fingerprints(root.path()), before);
    }
    // elsewhere they are names as any other
    fs::remove_file(dir.join("disk.config")).unwrap();
    for name in ["uuid", "disk.config"] {
        let apart = tempfile::tempdir().unwrap();
        assert_eq!(merge(&dir, &apart.path().join(name), &[]).0, Some(0));
    }
}

#[test]
fn a_file_that_somebody_uses_is_not_replaced() {
    let (root, dir) = chain();
    let out = root.path().join("out");
    fs::write(&out, "a disk that a machine runs from").unwrap();
    for access in [Access::Read, Access::Write] {
        let user = FileStorage::open(&out).unwrap();
        user.lock(access).unwrap();
        let (code, said) = merge(&dir, &out, &["--force"]);
        assert_eq!(code, Some(6), "{said}");
        assert!(said.contains("another process has the image open; nothing was written"), "{said}");
        drop(user);
        assert_eq!(fs::read(&out).unwrap(), b"a disk that a machine runs from");
    }
    // also who comes while the work goes on
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
    command.args(["merge", "--json", "--force", "--rate-limit=2M", "--progress-interval=0.1", "--dir"]).arg(&dir);
    let mut child = command.arg("--out").arg(&out).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("\"progress\"")));
    let user = FileStorage::open(&out).unwrap();
    user.lock(Access::Write).unwrap();
    assert!(lines.any(|line| line.unwrap().contains("another process has the image open")));
    assert_eq!(child.wait().unwrap().code(), Some(6));
    drop(user);
    assert_eq!(fs::read(&out).unwrap(), b"a disk that a machine runs from");
    assert_eq!(merge(&dir, &out, &["--force"]).0, Some(0));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
}

#[test]
fn a_place_where_no_file_can_be_is_refused_before_the_work() {
    let (root, dir) = chain();
    damage(&dir);
    let (code, said) = merge(&dir, &root.path().join("out"), &[]);
    assert_eq!(code, Some(4), "{said}");

    let (code, said) = merge(&dir, &root.path().join("new/"), &[]);
    assert!(code == Some(1) && said.contains("is a folder: name the file in it"), "{said}");
    let nowhere = root.path().join("nowhere");
    symlink("there is nothing", &nowhere).unwrap();
    let (code, said) = merge(&dir, &nowhere, &[]);
    assert!(code == Some(1) && said.contains("exists already"), "{said}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "something was left");
}

/// Makes a FULL whose damage is found only when its data is read.
fn damage(dir: &Path) {
    let path = dir.join("FULL-1600000000-disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("4M"));
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write -c -P 3 0 64k"]).arg(&path));
    let mut bytes = fs::read(&path).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = word(&bytes, 40) as usize;
    let l2 = (word(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let stream = (word(&bytes, l2) & ((1 << 54) - 1)) as usize;
    bytes[stream..stream + 16].fill(0xff);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_stream_that_fails_does_not_say_that_nothing_was_written() {
    let (root, dir) = chain();
    damage(&dir);
    let (code, said) = merge(&dir, Path::new("-"), &[]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("what was written is not the whole disk"), "{said}");
    let (code, said) = merge(&dir, &root.path().join("out"), &[]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("nothing was written"), "{said}");
}

#[test]
fn the_last_json_line_of_a_dry_run_says_how_it_ended() {
    let (root, dir) = chain();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
    command.args(["merge", "--json", "--dry-run", "--dir"]).arg(&dir).arg("--out").arg(root.path().join("out"));
    let said = tools::run(&mut command);
    assert_eq!(said.lines().last(), Some(r#"{"event":"done","exit_code":0}"#));
}
