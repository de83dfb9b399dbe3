//! Locks of images, by other people's programs both ways: what a QEMU has open is not touched here, and what is open here
//! is not touched by any QEMU.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmpbackup::ErrorKind;
use qmpbackup::restore::{Error, Layers, Source, open_writable};
use qmpbackup::storage::FileStorage;
use tempfile::TempDir;

use super::tool::Tool;
use super::vm::{Vm, new_folder};
use crate::support::program::{Backup, Ended};
use crate::support::{oracle, sparse, tools};

const WHERE: [&str; 3] = ["5.2", "10.0", "11"];

fn image() -> (TempDir, PathBuf) {
    let folder = new_folder();
    let path = folder.path().join("FULL-1-disk.qcow2");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M"));
    (folder, path)
}

/// The words for a disk of a machine.
fn disk(path: &Path, read_only: bool) -> [String; 4] {
    let read_only = if read_only { "on" } else { "off" };
    let node = "node-name=disk,driver=qcow2,file.driver=file";
    let node = format!("{node},read-only={read_only},file.filename={}", path.display());
    ["-blockdev".to_owned(), node, "-device".to_owned(), "virtio-blk-pci,drive=disk".to_owned()]
}

/// Somebody who has an image open.
enum User {
    Machine { _vm: Vm },
    Program(Child),
}

impl User {
    fn machine(release: &'static str, path: &Path, read_only: bool) -> Self {
        Self::Machine { _vm: Vm::builder(release).words(disk(path, read_only)).start() }
    }

    fn io(release: &'static str, path: &Path, read_only: bool) -> Self {
        let mut command = tools::qemu_io_of(release);
        command.args(["-f", "qcow2"]).args(read_only.then_some("-r")).arg(path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // it asks for a command when it has the image
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        Self::Program(child)
    }

    fn nbd(release: &'static str, path: &Path, read_only: bool) -> Self {
        let socket = path.with_file_name("nbd");
        let mut command = tools::qemu_nbd_of(release);
        command.args(["-t", "-f", "qcow2", "-k"]).arg(&socket).args(read_only.then_some("-r")).arg(path);
        let user = Self::Program(command.spawn().unwrap());
        let until = Instant::now() + Duration::from_secs(60);
        // the socket may be there before the image is open, but then nobody greets
        while UnixStream::connect(&socket).and_then(|mut nbd| nbd.read_exact(&mut [0; 8])).is_err() {
            assert!(Instant::now() < until, "{}", tools::line(&command));
            std::thread::sleep(Duration::from_millis(5));
        }
        user
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if let Self::Program(child) = self {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

const USERS: [fn(&'static str, &Path, bool) -> User; 3] = [User::machine, User::io, User::nbd];

fn open_to_read(path: &Path) -> Result<Layers, Error> {
    Layers::open(&[Source::new(path.to_owned())])
}

#[track_caller]
fn assert_locked<T>(result: Result<T, Error>, image: &Path) {
    let Err(error) = result else { panic!("{} was opened", image.display()) };
    assert!(matches!(&error, Error::Locked { path, .. } if path == image), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Locked);
}

#[test]
fn what_a_qemu_has_open_is_not_written_and_what_it_writes_is_not_read() {
    for release in WHERE {
        for (number, open) in USERS.iter().enumerate() {
            let (_folder, path) = image();
            let user = open(release, &path, false);
            assert_locked(open_writable(&path), &path);
            assert_locked(open_to_read(&path), &path);
            drop(user);
            open_writable(&path).unwrap();
            let user = open(release, &path, true);
            assert_locked(open_writable(&path), &path);
            open_to_read(&path).unwrap_or_else(|error| panic!("user {number} of {release}: {error}"));
            drop(user);
            open_writable(&path).unwrap();
        }
    }
}

/// What programs of a release say when they want to read or write an image.
fn tries(release: &str, path: &Path) -> (Vec<Ended>, Vec<Ended>) {
    let mut reads = [tools::qemu_img_of(release), tools::qemu_img_of(release), tools::qemu_io_of(release)];
    let words: [&[&str]; 3] =
        [&["info", "-f", "qcow2"], &["check", "-f", "qcow2"], &["-r", "-f", "qcow2", "-c", "read 0 4k"]];
    let run = |command: &mut Command| Ended::of(command.arg(path));
    let reads = reads.iter_mut().zip(words).map(|(command, words)| run(command.args(words))).collect();
    let write = run(tools::qemu_io_of(release).args(["-f", "qcow2", "-c", "write 0 4k"]));
    let system = tools::qemu_system_of(release);
    let words = ["-accel", "tcg", "-nodefaults", "-display", "none", "-S"].map(str::to_owned);
    let words: Vec<String> = words.into_iter().chain(disk(path, false)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let machine = Tool::of(Path::new(system.get_program())).limit(Duration::from_secs(60)).run(&words);
    (reads, vec![write, machine])
}

#[track_caller]
fn assert_refused(all: Vec<Ended>) {
    for ended in all {
        ended.with(1).says("Failed to get ").says("lock");
    }
}

#[test]
fn what_is_written_here_is_refused_by_every_qemu_and_what_is_read_here_can_be_read() {
    for release in WHERE {
        let (_folder, path) = image();
        let held = open_writable(&path).unwrap();
        let (reads, writes) = tries(release, &path);
        assert_refused(reads);
        assert_refused(writes);
        drop(held);
        let held = open_to_read(&path).unwrap();
        let (reads, writes) = tries(release, &path);
        for read in reads {
            read.with(0);
        }
        assert_refused(writes);
        drop(held);
        drop(User::machine(release, &path, false));
    }
}

#[test]
fn what_is_listed_here_is_in_nobodys_way_and_what_is_written_is_not_checked() {
    let backup = Backup::new();
    let mut user = User::io("10.0", &backup.images[3], false);
    let dir = backup.dir.to_str().unwrap();
    Ended::run(["list", "--dir", dir]).with(0).says_not("open for writing");
    Ended::run(["check", "--dir", dir]).with(6).says("NOT CHECKED: another process has the image open for writing");
    let unlocked = FileStorage::open(&backup.images[3]).unwrap();
    if let User::Program(child) = &mut user {
        child.stdin.take().unwrap().write_all(b"write 0 4k\nquit\n").unwrap();
        assert!(child.wait().unwrap().success());
    }
    drop(unlocked);
}

#[test]
fn a_chain_is_merged_unless_somebody_writes_to_an_image_of_it() {
    for release in WHERE {
        let backup = Backup::new();
        let before = sparse::fingerprints(backup.root.path());
        let user = User::machine(release, &backup.images[2], false);
        for more in [&[][..], &["--dry-run"], &["--format=raw"], &["--skip-check"]] {
            let ended = backup.merged([&["--out", "new/out"], more].concat()).with(6);
            ended.says("INC-1793761200-disk.qcow2: another process has the image open for writing").says("run again");
        }
        backup.merged(["--out", "older", "--until", "INC-1793674800"]).with(0);
        drop(user);
        std::fs::remove_file(backup.path("older")).unwrap();
        assert_eq!(sparse::fingerprints(backup.root.path()), before);
        let _user = User::machine(release, &backup.images[2], true);
        backup.merged(["--out", "out"]).with(0);
        let raw = backup.path("raw");
        oracle::convert(&backup.path("out"), &raw);
        sparse::assert_same(&raw, &backup.expected(3), "the merged disk");
    }
}

#[test]
fn only_a_regular_file_is_opened_to_be_changed() {
    let (folder, path) = image();
    let fifo = folder.path().join("fifo");
    tools::run(Command::new("mkfifo").arg(&fifo));
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let others = ["/dev/null", "/dev/zero", "/no/such/file", folder.path().to_str().unwrap(), fifo.to_str().unwrap()];
    for other in others.map(Path::new) {
        let error = open_writable(other).unwrap_err();
        assert!(matches!(&error, Error::Open { path, .. } if path == other), "{error:?}");
    }
    let held = open_writable(&link).unwrap();
    assert_locked(open_writable(&path), &path);
    drop(held);
}
