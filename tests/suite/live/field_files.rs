//! Disks, fleece images and links in places where they cannot be, or should not.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qmpbackup::storage::{Access, FileStorage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::faults_hooks::kill_while_copying;
use super::field_setup::{Setup, releases};
use super::monitor::Monitor;
use super::proxy::Action;
use super::tool::{Tool, restore};
use super::vm::Vm;
use crate::support::program::{Ended, is_root, program};
use crate::support::tools;

#[test]
fn a_disk_that_lies_where_its_backups_go_is_neither_replaced_nor_taken_for_one() {
    for release in releases(&["7.2", "10.0"]) {
        let setup = Setup::of(release).image("target/disk.qcow2", "4M", "");
        let mut field = setup.qcow2("disk0", "target/disk.qcow2").start();
        let disk = field.vm.path("target/disk.qcow2");
        let file = |path: &Path| path.metadata().unwrap().ino();
        let before = file(&disk);
        field.scribble("disk0");
        for level in ["full", "auto", "copy"] {
            let refused = field.backup(&format!("--level {level} --no-subdir --no-timestamp"), 1);
            refused.says("disk.qcow2: is in use, perhaps as the disk of a machine");
        }
        assert_eq!(file(&disk), before);
        // names with a time do no harm, and the disk is no FULL of theirs
        field.makes("--level auto --no-subdir", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc --no-subdir", 0, "disk0 INC");
        let point = field.points.last().unwrap();
        assert!(restore(&field.target, &point.time.to_string()) == point.contents["disk0"], "{release}");
        assert_eq!(file(&disk), before);
    }
}

#[test]
fn an_image_without_a_time_that_another_machine_has_open_is_not_replaced() {
    let mut field = Setup::of("10.0").disk("disk0").start();
    field.makes("--level full --no-timestamp", 0, "disk0 FULL");
    let image = field.target.join("disk0/disk0");
    let there = FileStorage::open_writable(&image).unwrap();
    there.lock(Access::Write).unwrap();
    field.backup("--level full --no-timestamp", 1).says("disk0/disk0: is in use");
    drop(there);
    field.makes("--level full --no-timestamp", 0, "disk0 FULL");
}

#[test]
fn fleece_images_that_cannot_be_made_cost_that_run_only() {
    for release in releases(&["10.0", "11"]) {
        let mut field = Setup::of(release).disk("disk0").file("file", b"no folder").start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL");
        field.scribble("disk0");
        field.backup("--level inc --fleece-dir @/file", 1).says("no fleece image can be made in");
        field.makes("--level inc", 0, "disk0 INC").says_not("put in order");
        field.verify();
    }
}

#[test]
fn a_disk_that_nobody_writes_to_has_no_fleece_image() {
    let setup = Setup::of("10.0").disk("disk0").image("system/code.qcow2", "4M", "");
    let file =
        "driver=qcow2,node-name=code,read-only=on,file.driver=file,file.read-only=on,file.filename=@/system/code.qcow2";
    let setup = setup.words(&format!("-blockdev {file}")).words("-device virtio-blk-pci,id=code,drive=code");
    let mut field = setup.start();
    let planned = field.backup("--level full --dry-run", 0);
    let filters = planned.stdout.matches("copy-before-write").count();
    assert!(filters == 1 && !planned.stdout.contains("system/FULL"), "{planned:#?}");
    field.scribble("disk0");
    field.makes("--level auto", 0, "code FULL, disk0 FULL");
    field.scribble("disk0");
    field.backup("--level auto", 0);
    field.verify();
}

#[test]
fn a_disk_without_bytes_is_left_out() {
    for release in releases(&["5.2", "10.0"]) {
        let setup = Setup::of(release).disk("disk0").image("none", "0", "").qcow2("none", "none");
        let mut field = setup.start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn a_link_that_cannot_be_made_is_a_warning() {
    let mut field = Setup::of("10.0").disk("disk0").start();
    let folder = field.target.join("disk0");
    std::fs::create_dir_all(&folder).unwrap();
    // what a link is before it has its name
    std::fs::write(folder.join(".qmpbackup-FULL-disk0"), "in the way").unwrap();
    for _ in 0..2 {
        field.makes("--level full --no-timestamp", 3, "disk0 FULL").says("no link tells the level of disk0/disk0: ");
    }
    field.makes("--level full --no-timestamp --no-symlink", 0, "disk0 FULL");
    field.scribble("disk0");
    field.makes("--level inc", 0, "disk0 INC");
    let latest = restore(&folder, "latest");
    assert!(latest == field.points.last().unwrap().contents["disk0"]);
}

#[test]
fn a_machine_that_has_become_another_user_gets_images_that_it_can_write_to() {
    if !is_root() {
        eprintln!("only root can start it");
        return;
    }
    for (release, words) in [("7.2", "-runas nobody"), ("10.0", "-run-with user=nobody")] {
        let mut field = Setup::of(release).disk("disk0").words(words).start();
        for path in [field.vm.path(""), field.vm.path("disk0")] {
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
        }
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn told_twice_to_end_it_puts_the_machine_in_order_all_the_same() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Setup::of(release).disk("disk0").start();
        field.makes("--level full", 0, "disk0 FULL");
        let (socket, target) = (field.vm.socket(), field.target.clone());
        let words = ["--level", "full", "--speed-limit", "3K"];
        let mut command = program(env!("CARGO_BIN_EXE_qmpbackup"), ["--socket"]);
        command.arg(socket).arg("backup").arg("--target").arg(target).args(words);
        let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while field.execute("query-jobs", &json!({})).as_array().unwrap().is_empty() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
        for _ in 0..2 {
            kill_process(Pid::from_child(&child), Signal::INT).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        Ended::new(child.wait_with_output().unwrap()).with(130).says("cancelled");
        field.assert_clean();
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn a_backup_of_a_machine_that_is_migrated_away_meanwhile_is_none() {
    for release in releases(&["10.0", "11"]) {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk0");
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("16M"));
        tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write -q -P 7 0 16M"]).arg(&disk));
        let node = format!("qcow2,node-name=disk0,file.driver=file,file.locking=off,file.filename={}", disk.display());
        let words = ["-blockdev", &node, "-device", "virtio-blk-pci,id=disk0,drive=disk0"].map(str::to_owned);
        let mut here = Vm::builder(release).words(words.clone()).start();
        let away = format!("unix:{}", folder.path().join("migration").display());
        let mut there = Vm::builder(release).words(words).words(["-incoming".to_owned(), away.clone()]).start();
        let backup = |socket: PathBuf, level: &str, limit: &str| {
            let socket = socket.to_str().unwrap().to_owned();
            let (target, level) = (folder.path().join("target").to_str().unwrap().to_owned(), level.to_owned());
            let limit = limit.to_owned();
            std::thread::spawn(move || {
                let words = ["--socket", &socket, "backup", "-l", &level, "-t", &target, "--speed-limit", &limit];
                Tool::built("qmpbackup").run(&words)
            })
        };
        let running = backup(here.socket(), "full", "4M");
        let until = Instant::now() + Duration::from_secs(60);
        let wait = |vm: &mut Vm, command: &str, done: &dyn Fn(&serde_json::Value) -> bool| {
            while !done(&vm.monitor.execute(command, &json!({})).unwrap()) {
                assert!(Instant::now() < until && !running.is_finished(), "{command}");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        wait(&mut here, "query-jobs", &|jobs| jobs[0]["current-progress"].as_u64().is_some_and(|done| done > 0));
        here.monitor.execute("migrate", &json!({ "uri": away })).unwrap();
        wait(&mut here, "query-status", &|status| status["status"] == "postmigrate");
        wait(&mut there, "query-status", &|status| status["status"] != "inmigrate");
        assert_eq!(there.monitor.hmp("qemu-io -d /machine/peripheral/disk0/virtio-backend \"write -P 99 0 16M\""), "");
        let ended = running.join().unwrap().with(1).says("the machine is in state postmigrate");
        let images = || std::fs::read_dir(folder.path().join("target/disk0")).into_iter().flatten().flatten();
        let left: Vec<_> = images().map(|file| file.file_name()).filter(|name| name != ".qmpbackup").collect();
        assert!(left.is_empty(), "{left:?} {ended:#?}");
        // the disks are the other's now, and so are the backups
        backup(here.socket(), "full", "0").join().unwrap().with(1).says("postmigrate");
        let there = backup(there.socket(), "full", "0").join().unwrap().with(0);
        assert!(!there.stderr.contains("postmigrate"));
        assert!(restore(&folder.path().join("target"), "latest").iter().all(|byte| *byte == 99));
    }
}

#[test]
fn the_disk_of_a_machine_that_is_off_is_not_replaced() {
    let mut field = Setup::of("10.0").disk("disk0").start();
    let other = field.target.join("disk0");
    std::fs::create_dir_all(&field.target).unwrap();
    std::fs::copy(field.vm.path("disk0"), &other).unwrap();
    let words = "--no-subdir --no-timestamp --level";
    for level in ["auto", "full", "copy"] {
        field.backup(&format!("{words} {level}"), 1).says("disk0: is there, and may be no backup");
    }
    // but a COPY of the Python tool is, which leaves no `uuid`
    std::os::unix::fs::symlink("disk0", field.target.join("COPY-disk0")).unwrap();
    field.makes(&format!("{words} copy"), 0, "disk0 COPY");
    std::fs::remove_file(other).unwrap();
    field.makes(&format!("{words} full"), 0, "disk0 FULL");
    field.makes(&format!("{words} full"), 0, "disk0 FULL");
}

#[test]
fn a_disk_that_is_exchanged_at_the_last_moment_is_noticed() {
    for (release, words) in [("5.2", ""), ("10.0", ""), ("10.0", "--no-fleece")] {
        let mut field = Setup::of(release).disk("disk0").start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL");
        let hand = field.vm.path("hand");
        let overlay = json!({
            "node-name": "disk0",
            "snapshot-file": field.vm.path("overlay"),
            "snapshot-node-name": "overlay",
            "format": "qcow2",
        });
        let (mut locked, mut done) = (false, false);
        let exchange = move |command: &serde_json::Value, _: usize| {
            locked |= command["arguments"]["node-name"] == "qmpbackup-lock";
            // the last question before the moment begins
            if locked && !done && command["execute"] == "query-status" {
                done = true;
                Monitor::connect(&hand).execute("blockdev-snapshot-sync", &overlay).unwrap();
            }
            Action::Forward
        };
        let words = format!("backup --level inc {words} --target {}", field.target.display());
        let ended = field.run_through(Box::new(exchange), &words);
        ended.with(1).says("disk0: the device has got another image just now");
        field.stays();
        field.look();
        // those of the backing file are out of reach
        field.usual.push("2 bitmaps of ".to_owned());
        field.scribble("disk0");
        field.makes("--level auto", 3, "disk0 FULL");
        let point = field.points.last().unwrap();
        assert!(restore(&field.target, &point.time.to_string()) == point.contents["disk0"], "{release} {words}");
    }
}

#[test]
fn a_folder_that_is_ill_does_not_keep_a_machine_from_its_backups_elsewhere() {
    let mut field = Setup::of("10.0").disk("disk0").start();
    field.scribble("disk0");
    let ill = field.vm.path("ill");
    let words = format!("backup --level full --speed-limit 3K --target {}", ill.display());
    let killed = field.run_through(kill_while_copying(), &words);
    assert_eq!(killed.code, None, "{killed:#?}");
    let journal = ill.join(".qmpbackup/run.json");
    let whole = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, &whole[..10]).unwrap();
    let made = field.run(&format!("backup --level auto --target {}", field.target.display()));
    made.with(3).says("another target, stays as a killed run left it");
    field.run(&format!("backup --level auto --target {}", field.target.display())).with(0);
    field.run(&format!("recover --target {}", ill.display())).with(4).says("run.json").says_not("--level");
    std::fs::write(&journal, &whole).unwrap();
    field.run(&format!("recover --target {}", ill.display())).with(0).says("put in order");
}
