//! Folders and files that the user may not read: that is a failure and no damage.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::program::{Backup, Ended, is_root, program};
use crate::support::tools;

/// A user who may do nothing.
const NOBODY: u32 = 12345;

/// Another, who has no other process.
const ALONE: u32 = 12346;

/// Two disks with manifests and checksums, which belong to a user who is not root.
struct Scene {
    root: TempDir,
    program: PathBuf,
}

impl Scene {
    fn new() -> Self {
        Self::of(NOBODY)
    }

    fn of(owner: u32) -> Self {
        let recorded = Backup::new();
        Ended::run([Path::new("manifest"), Path::new("--dir"), &recorded.dir]).with(0);
        let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let scene = Self { program: root.path().join("qmprestore"), root };
        for disk in ["disk0", "disk1"] {
            fs::create_dir_all(scene.path("vm")).unwrap();
            tools::run(std::process::Command::new("cp").arg("-r").arg(&recorded.dir).arg(scene.path("vm").join(disk)));
        }
        // where the program was built is perhaps a folder for root only
        fs::copy(env!("CARGO_BIN_EXE_qmprestore"), &scene.program).unwrap();
        if rustix::process::geteuid().is_root() {
            let mut folders = vec![scene.root.path().to_owned()];
            while let Some(path) = folders.pop() {
                chown(&path, Some(owner), Some(owner)).unwrap();
                if path.is_dir() {
                    folders.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                }
            }
        }
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn run(&self, words: &str) -> Ended {
        let mut command = program(self.program.to_str().unwrap(), words.split(' '));
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        Ended::of(command.current_dir(self.root.path()))
    }

    /// Runs commands while nobody may read a file or folder.
    fn without<const N: usize>(&self, name: &str, commands: [&str; N]) -> [Ended; N] {
        let before = fs::metadata(self.path(name)).unwrap().permissions();
        fs::set_permissions(self.path(name), Permissions::from_mode(0o000)).unwrap();
        let ended = commands.map(|words| self.run(words));
        fs::set_permissions(self.path(name), before).unwrap();
        ended
    }
}

const MERGE: &str = "merge --dir vm --filter disk0 --out made";

#[test]
fn bookkeeping_that_may_not_be_read_is_a_failure_and_no_damage() {
    let scene = Scene::new();
    let commands = [MERGE, "verify --dir vm/disk0 --until latest", "rebase --dir vm/disk0", "commit --dir vm/disk0"];
    for ended in scene.without("vm/disk0/.qmpbackup", commands) {
        let ended = ended.with(1).says(".in-place.json cannot be read").says("Permission denied");
        ended.says_not("damaged").says_not("cannot be understood");
    }
    let [listed, verified] = scene.without("vm/disk0/.qmpbackup", ["list --dir vm/disk0", "verify --dir vm/disk0"]);
    listed
        .with(3)
        .says("broken: ")
        .says(".in-place.json cannot be read, what was begun in the FULL is unknown: Permission denied");
    verified.with(1).says("FAILED: ").says("in-place.json cannot be read").says_not("DAMAGED");
    let salvage = format!("{MERGE} --salvage --force");
    let commands = [MERGE, &salvage];
    let [merged, salvaged] = scene.without("vm/disk0/.qmpbackup/FULL-1793588400-disk.qcow2.json", commands);
    merged.with(1).says("ERROR  cannot read ").says("FULL-1793588400-disk.qcow2.json: Permission denied");
    salvaged.with(3).says("FULL-1793588400-disk.qcow2.json is ignored: Permission denied").says_not("ERROR");
    let salvaged = fs::read(scene.path("made")).unwrap();
    fs::remove_file(scene.path("made")).unwrap();
    scene.run(MERGE).with(0);
    assert!(fs::read(scene.path("made")).unwrap() == salvaged);
}

#[test]
fn a_disk_in_a_folder_that_may_not_be_read_is_not_one_that_is_not_there() {
    let scene = Scene::new();
    for ended in scene.without("vm/disk0", [MERGE, "verify --dir vm --filter disk0", "list --dir vm --filter disk0"]) {
        ended.with(1).says("cannot read vm/disk0, which may hold the disk that is meant: Permission denied");
    }
    let [ended] = scene.without("vm", ["list --dir vm"]);
    ended.with(1).says("cannot read vm: Permission denied");
}

#[test]
fn an_image_that_may_not_be_read_is_not_called_damaged() {
    let scene = Scene::new();
    let [listed] = scene.without("vm/disk0/INC-1793674800-disk.qcow2", ["list --dir vm/disk0"]);
    listed
        .with(3)
        .says("Permission denied")
        .says("needs INC-1793674800-disk.qcow2, which cannot be read")
        .says_not("damaged");
}

#[test]
fn what_is_wrong_with_other_disks_is_not_told() {
    let scene = Scene::new();
    let commands = [
        "list --dir vm --filter disk1",
        "check --dir vm --filter disk1",
        "verify --dir vm --filter disk1",
        "manifest --dir vm --filter disk1",
        "merge --dir vm --filter disk1 --out made --force",
        "rebase --dir vm --filter disk1 --dry-run",
        "commit --dir vm --filter disk1 --dry-run",
    ];
    for name in ["vm/disk0", "vm/disk0/.qmpbackup/FULL-1793588400-disk.qcow2.json"] {
        for ended in scene.without(name, commands) {
            ended.with(0).says_not("disk0").says_not("is ignored");
        }
        let [listed] = scene.without(name, ["list --dir vm"]);
        listed.with(3).says("vm/disk0").says("is ignored: Permission denied");
    }
    fs::write(scene.path("vm/disk0/.qmpbackup/FULL-1793588400-disk.qcow2.json"), "{").unwrap();
    for words in commands {
        scene.run(words).with(0).says_not("disk0").says_not("is ignored");
    }
    scene.run("list --dir vm --filter disk0").with(3).says("FULL-1793588400-disk.qcow2.json is ignored");
}

/// A month's folder, or one with the name that was asked for, may have held it.
#[test]
fn a_folder_that_may_have_held_images_of_the_disk_is_told() {
    let scene = Scene::new();
    fs::create_dir_all(scene.path("months/2026-11")).unwrap();
    fs::create_dir_all(scene.path("months/2026-12/disk0")).unwrap();
    fs::rename(scene.path("vm/disk0"), scene.path("months/2026-11/disk0")).unwrap();
    fs::rename(scene.path("vm/disk1"), scene.path("months/2026-11/disk01")).unwrap();
    for name in ["months/2026-12", "months/2026-12/disk0"] {
        let [disk, other] =
            scene.without(name, ["list --dir months --filter disk0", "list --dir months --filter disk01"]);
        disk.with(3).says("2026-12").says("is ignored");
        // the folder of a disk is of no other
        let told = name == "months/2026-12";
        assert_eq!(
            (other.code, other.stderr.contains("2026-12")),
            (Some(if told { 3 } else { 0 }), told),
            "{other:#?}"
        );
    }
}

#[test]
fn what_root_makes_in_a_folder_of_another_user_is_of_that_user() {
    if !is_root() {
        return;
    }
    for command in ["manifest", "rebase", "commit", "snapshotrebase", "verify --sample 50%", "check --repair all"] {
        let scene = Scene::new();
        let dir = scene.path("vm/disk0");
        let books = dir.join(".qmpbackup");
        if command == "manifest" {
            fs::remove_dir_all(&books).unwrap();
        }
        let words = command.split(' ').map(PathBuf::from);
        Ended::run(words.chain([PathBuf::from("--dir"), dir.clone()])).with(0);
        let files = fs::read_dir(&books).unwrap().map(|entry| entry.unwrap().path());
        for path in files.chain([books.clone()]) {
            assert_eq!(path.metadata().unwrap().uid(), NOBODY, "{command}: {}", path.display());
        }
        scene.run("verify --dir vm/disk0").with(0);
        scene.run("rebase --dir vm/disk1").with(0);
    }
}

/// Where a service may have no more processes, threads are none, either: all but the one that waits for signals.
#[test]
fn what_needs_no_threads_does_without() {
    if !is_root() {
        eprintln!("skipped: only root can be a user who has no other processes");
        return;
    }
    let scene = Scene::of(ALONE);
    let run = |words: &str| {
        let limited = ["-c", "ulimit -u 2 && exec \"$0\" \"$@\"", scene.program.to_str().unwrap()];
        let mut command = program("bash", limited.into_iter().chain(words.split(' ')));
        Ended::of(command.uid(ALONE).gid(ALONE).current_dir(scene.root.path()))
    };
    for words in ["list --dir vm", "check --dir vm", "check --repair=all --dir vm", "rebase --dir vm --filter disk0"] {
        run(words).with(0);
    }
    for words in ["verify --dir vm", MERGE] {
        run(words).with(1).says("Resource temporarily unavailable");
    }
}
