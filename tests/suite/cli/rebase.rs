//! `qmprestore rebase` from outside: what it changes, what it leaves alone, what it refuses and with which exit code.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use qmpbackup::chain::FolderLock;
use qmpbackup::storage::{Access, FileStorage};
use serde_json::{Value, json};

use crate::check::Map;
use crate::support::oracle::convert;
use crate::support::prng::Prng;
use crate::support::program::{Backup, Ended, TIMES, event, qmprestore, rude_name};
use crate::support::sums::assert_fit;
use crate::support::{sparse, tools};

fn rebase<I: AsRef<OsStr>>(backup: &Backup, arguments: impl IntoIterator<Item = I>) -> Ended {
    Ended::of(qmprestore(["rebase", "--dir"]).arg(&backup.dir).args(arguments).current_dir(backup.root.path()))
}

fn backing(image: &Path) -> Value {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(image));
    serde_json::from_str::<Value>(&info).unwrap()["backing-filename"].clone()
}

fn names(images: &[PathBuf]) -> Vec<&str> {
    images.iter().map(|image| image.file_name().unwrap().to_str().unwrap()).collect()
}

#[track_caller]
fn assert_reads(backup: &Backup, link: &Path, last: usize) {
    let raw = backup.path("of the link");
    convert(link, &raw);
    sparse::assert_same(&raw, &backup.expected(last), "the link");
}

#[test]
fn qemu_opens_the_restore_point_where_it_lies_and_where_it_is_moved() {
    let backup = Backup::new();
    let ended = rebase(&backup, [""; 0]).with(0);
    assert_eq!(ended.stdout, "");
    let names = names(&backup.images);
    for (below, name) in names.iter().zip(&names[1..]) {
        assert!(ended.stderr.contains(&format!("{name} is based on {below}\n")), "{ended:?}");
    }
    ended.says("/backup/disk0/image leads to INC-1793847600-disk.qcow2\n");
    for (image, below) in backup.images[1..].iter().zip(&names) {
        assert_eq!(backing(image), *below);
        tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(image));
    }
    assert_reads(&backup, &backup.dir.join("image"), 3);

    let before = sparse::fingerprints(&backup.dir);
    rebase(&backup, [""; 0]).with(0).says("done already").says_not("is based on");
    assert_eq!(sparse::fingerprints(&backup.dir), before, "the second run changed something");
    Ended::run([OsStr::new("list"), "--dir".as_ref(), backup.dir.as_os_str()]).with(0).says_not("broken");
    backup.merged(["--format", "raw", "--out", "merged"]).with(0);
    sparse::assert_same(&backup.path("merged"), &backup.expected(3), "merged");

    let moved = backup.path("moved");
    fs::rename(&backup.dir, &moved).unwrap();
    let raw = backup.path("raw");
    for mut qemu_img in [tools::qemu_img(), tools::qemu_img_of("11")] {
        tools::run(qemu_img.args(["convert", "-f", "qcow2", "-O", "raw"]).args([&moved.join("image"), &raw]));
        fs::rename(&moved, &backup.dir).unwrap();
        sparse::assert_same(&raw, &backup.expected(3), "moved");
        fs::rename(&backup.dir, &moved).unwrap();
    }
}

#[test]
fn until_moves_the_link_and_changes_no_more_images_than_it_needs() {
    let backup = Backup::new();
    let last = fs::read(&backup.images[3]).unwrap();
    rebase(&backup, ["--until", "1793761200"]).with(0).says_not("INC-1793847600");
    assert_eq!(fs::read(&backup.images[3]).unwrap(), last);
    assert_reads(&backup, &backup.dir.join("image"), 2);
    rebase(&backup, [""; 0])
        .with(0)
        .says("INC-1793847600-disk.qcow2 is based on")
        .says_not("INC-1793761200-disk.qcow2 is");
    assert_reads(&backup, &backup.dir.join("image"), 3);
    rebase(&backup, ["--until=INC-1793674800", "--skip-check"]).with(0).says_not("is based on");
    assert_reads(&backup, &backup.dir.join("image"), 1);
    assert_eq!(backing(&backup.images[3]), names(&backup.images)[2], "it may keep its name");

    let before = sparse::fingerprints(backup.root.path());
    rebase(&backup, ["--until", "FULL"]).with(2).says("no incremental images found, nothing to rebase");
    rebase(&backup, ["--until", "nothing"]).with(2);
    rebase(&backup, ["--filter", "other"]).with(2);
    assert_eq!(sparse::fingerprints(backup.root.path()), before);
}

#[test]
fn names_that_qemu_would_take_for_protocols_or_options_are_names() {
    for name in ["json:{}", "nbd:localhost:1,file=x", "it's \"my\" disk, größe=1 $HOME `x`\\.img", "a\u{1b}[2J\nb"] {
        let backup = Backup::named("backup/disk0", name, TIMES);
        rebase(&backup, ["--rate-limit", "1M"]).with(0);
        assert_reads(&backup, &backup.dir.join("image"), 3);
        let raw = backup.path("raw");
        let relative = ["convert", "-f", "qcow2", "-O", "raw", "image"];
        tools::run(tools::qemu_img().args(relative).arg(&raw).current_dir(&backup.dir));
        sparse::assert_same(&raw, &backup.expected(3), name);
        let merged = backup.path("merged");
        backup.merged([OsStr::new("--format=raw"), "--out".as_ref(), merged.as_os_str()]).with(0);
        sparse::assert_same(&merged, &raw, name);
        let before = sparse::fingerprints(&backup.dir);
        rebase(&backup, [""; 0]).with(0).says("done already");
        assert_eq!(sparse::fingerprints(&backup.dir), before);
    }
}

/// A FULL under the bare name of a disk that looks like a protocol.
#[test]
fn a_full_without_a_time_may_have_any_name() {
    let backup = Backup::named("backup/disk0", "nbd:x", TIMES);
    fs::rename(&backup.images[0], backup.dir.join("nbd:x")).unwrap();
    rebase(&backup, [""; 0]).with(0);
    assert_eq!(backing(&backup.images[1]), "./nbd:x");
    let raw = backup.path("raw");
    convert(&backup.dir.join("image"), &raw);
    fs::rename(backup.dir.join("nbd:x"), &backup.images[0]).unwrap();
    sparse::assert_same(&raw, &backup.expected(3), "a bare name");
}

#[test]
fn names_as_the_python_tool_or_people_write_them_become_relative() {
    let backup = Backup::new();
    let absolute = backup.images[0].to_str().unwrap().to_owned();
    let in_folder = format!("./{}", names(&backup.images)[1]);
    for (number, name) in [(1, &absolute), (2, &in_folder)] {
        let based = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name];
        tools::run(tools::qemu_img().args(based).arg(&backup.images[number]));
    }
    symlink(&backup.images[1], backup.dir.join("image")).unwrap();
    let right = fs::read(&backup.images[2]).unwrap();
    rebase(&backup, [""; 0]).with(0);
    assert_eq!(backing(&backup.images[1]), names(&backup.images)[0]);
    assert_eq!(fs::read(&backup.images[2]).unwrap(), right, "it means the same");
    assert_reads(&backup, &backup.dir.join("image"), 3);
}

/// Nothing is changed, also of the images before the one that is wrong.
#[track_caller]
fn assert_refused(backup: &Backup, arguments: &[&str], code: i32, says: &str) {
    let before = sparse::fingerprints(backup.root.path());
    let ended = rebase(backup, arguments).with(code).says(says);
    assert_eq!(ended.stdout, "");
    assert_eq!(sparse::fingerprints(backup.root.path()), before, "{arguments:?}");
}

#[test]
fn what_is_refused_is_refused_whole() {
    let backup = Backup::named("backup/disk0", rude_name(), TIMES);
    assert_refused(&backup, &[], 1, "whose name is not UTF-8; nothing was changed");

    let backup = Backup::new();
    fs::write(backup.dir.join("image"), "precious").unwrap();
    assert_refused(&backup, &[], 1, "image: is no link");

    let backup = Backup::new();
    let elsewhere = backup.path("elsewhere");
    fs::rename(&backup.images[3], &elsewhere).unwrap();
    symlink(&elsewhere, &backup.images[3]).unwrap();
    assert_refused(&backup, &[], 1, "INC-1793847600-disk.qcow2: is a link");

    let backup = Backup::new();
    fs::write(backup.dir.join("disk.qcow2.config"), r#"{"format":"raw"}"#).unwrap();
    fs::write(&backup.images[3], vec![1; 1 << 20]).unwrap();
    assert_refused(&backup, &[], 1, "is raw");

    let backup = Backup::new();
    backup.set_header_refcount(3, 0);
    assert_refused(&backup, &[], 4, "its metadata is damaged, errors: 1");
    rebase(&backup, ["--skip-check"]).with(0);
    // it writes to headers only: damaged tables do not keep it from its end
    let backup = Backup::new();
    for number in [0, 1] {
        let image = fs::read(&backup.images[number]).unwrap();
        backup.patch(number, Map::of(&image).l2[0], |bytes| bytes[0] |= 2);
    }
    rebase(&backup, ["--skip-check"]).with(0);
    rebase(&backup, ["--skip-check"]).with(0).says("done already");

    let backup = Backup::new();
    backup.patch(3, 72, |bytes| bytes[7] |= 2);
    assert_refused(&backup, &["--skip-check"], 4, "marked");

    let backup = Backup::new();
    let based = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "foreign"];
    tools::run(tools::qemu_img().args(based).arg(&backup.images[3]));
    assert_refused(&backup, &[], 4, "an image is missing or foreign");

    let backup = Backup::new();
    fs::write(backup.dir.join(format!("INC-{}-disk.qcow2.partial", TIMES[2] + 5)), "").unwrap();
    assert_refused(&backup, &[], 4, "may lack changes");
    rebase(&backup, ["--allow-partial"]).with(3).says("may lack changes");
}

#[test]
fn what_somebody_uses_is_not_changed() {
    let backup = Backup::new();
    let read = FileStorage::open(&backup.images[3]).unwrap();
    read.lock(Access::Read).unwrap();
    let before = backup.images.iter().map(|image| fs::read(image).unwrap()).collect::<Vec<_>>();
    let refused = |says: &str| {
        rebase(&backup, [""; 0]).with(6).says(says);
        let now = backup.images.iter().map(|image| fs::read(image).unwrap()).collect::<Vec<_>>();
        assert!(now == before && !backup.dir.join("image").exists());
    };
    refused("nothing was changed; run again when it is closed there");
    drop(read);
    let locks = FolderLock::take_all(&backup.dir).unwrap();
    refused("a backup or another command uses this folder");
    rebase(&backup, ["--dry-run"]).with(0);
    drop(locks);
    // a FULL that is read by others stays readable
    let full = FileStorage::open(&backup.images[0]).unwrap();
    full.lock(Access::Read).unwrap();
    rebase(&backup, [""; 0]).with(0);
}

#[test]
fn a_dry_run_prints_commands_that_do_the_same_and_changes_nothing() {
    for name in ["disk.qcow2", "json:it's \x1b[2J"] {
        let backup = Backup::named("backup/disk0", name, TIMES);
        let before = sparse::fingerprints(backup.root.path());
        let ended = rebase(&backup, ["--dry-run"]).with(0);
        assert_eq!(sparse::fingerprints(backup.root.path()), before);
        let (plan, commands) = ended.stdout.split_once("the same by hand\n").unwrap();
        assert!(plan.contains("\nrestore point  INC-1793847600-"), "{plan}");
        tools::run(std::process::Command::new("sh").args(["-e", "-c", commands]));
        assert_reads(&backup, &backup.dir.join("image"), 3);
        rebase(&backup, [""; 0]).with(0).says("done already");
        rebase(&backup, ["--dry-run"]).with(0).says("as it is already").says_not("by hand");
    }
}

#[test]
fn json_tells_what_was_changed() {
    let backup = Backup::new();
    rebase(&backup, ["--until=1793674800"]).with(0);
    let ended = rebase(&backup, ["--json", "--dry-run"]).with(0);
    let planned = event(&ended.events(), "plan").clone();
    let done: Vec<&Value> = planned["images"].as_array().unwrap().iter().map(|image| &image["done"]).collect();
    assert_eq!(done, [true, false, false]);
    assert_eq!((&planned["dry_run"], &planned["link"]["done"]), (&true.into(), &false.into()));
    assert_eq!(planned["commands"].as_array().unwrap().len(), 3);

    let events = rebase(&backup, ["--json"]).with(0).events();
    let rebased: Vec<&Value> = events.iter().filter(|event| event["event"] == "rebased").collect();
    let names = names(&backup.images);
    let path = |number: usize| backup.images[number].to_str().unwrap();
    assert_eq!(*rebased[0], json!({"event": "rebased", "path": path(2), "backing": names[1]}));
    assert_eq!(*rebased[1], json!({"event": "rebased", "path": path(3), "backing": names[2]}));
    let link = backup.dir.join("image");
    assert_eq!(*event(&events, "link"), json!({"event": "link", "path": link.to_str(), "target": names[3]}));
    assert_eq!(events.last().unwrap()["event"], "done");
    let events = rebase(&backup, ["--json"]).with(0).events();
    assert!(events.iter().all(|event| event["event"] != "rebased" && event["event"] != "link"));
}

#[test]
fn monthly_folders_have_a_link_each() {
    let backup = Backup::named("backup/2026-11/disk0", "disk.qcow2", TIMES);
    let root = backup.path("backup");
    let month = root.join("2026-12/disk0");
    fs::create_dir_all(&month).unwrap();
    for (number, name) in [(0, "FULL-1796342400-disk.qcow2"), (1, "INC-1796428800-disk.qcow2")] {
        fs::copy(&backup.images[number], month.join(name)).unwrap();
    }
    Ended::run([OsStr::new("rebase"), "--dir".as_ref(), root.as_os_str()]).with(0);
    assert_reads(&backup, &month.join("image"), 1);
    assert!(backup.dir.join("image").symlink_metadata().is_err());
    Ended::run([OsStr::new("rebase"), "--until=1793847600".as_ref(), "--dir".as_ref(), root.as_os_str()]).with(0);
    assert_reads(&backup, &backup.dir.join("image"), 3);
}

#[test]
fn a_rebase_that_is_killed_at_any_moment_is_finished_by_the_next() {
    let prng = &mut Prng::stream(3, 3);
    let times = [100, 200, 300, 400];
    let (mut killed, mut half) = (0, 0);
    for _ in 0..30 {
        let backup = Backup::named("backup/disk0", "disk", times);
        // a chain that takes a while
        for time in 500..560 {
            let image = backup.dir.join(format!("INC-{time}-disk"));
            fs::copy(&backup.images[1], image).unwrap();
        }
        backup.does(&["manifest"]).with(0);
        let mut child = qmprestore(["rebase", "--skip-check", "--dir"])
            .arg(&backup.dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(prng.below(60_000)));
        child.kill().unwrap();
        killed += usize::from(child.wait().unwrap().code().is_none());
        let images = || {
            let names = fs::read_dir(&backup.dir).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<OsString> = names.filter(|name| name.to_str().unwrap().starts_with("INC-")).collect();
            names.sort();
            names
        };
        // each has the right name or none, and the link is there when all have
        let before: Vec<Value> = images().iter().map(|name| backing(&backup.dir.join(name))).collect();
        let with = before.iter().take_while(|name| !name.is_null()).count();
        assert!(before[with..].iter().all(Value::is_null), "{before:?}");
        half += usize::from(with > 0 && with < before.len());
        assert!(with == before.len() || backup.dir.join("image").symlink_metadata().is_err());
        rebase(&backup, [""; 0]).with(0);
        assert_eq!(assert_fit(&backup.dir).len(), 64);
        let all = images();
        let below = [OsString::from("FULL-100-disk")].into_iter().chain(all.clone());
        for (name, below) in all.iter().zip(below) {
            assert_eq!(backing(&backup.dir.join(name)), below.to_str().unwrap());
        }
        assert_eq!(backup.dir.join("image").read_link().unwrap(), Path::new("INC-559-disk"));
        let hidden = fs::read_dir(&backup.dir).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(hidden.filter(|name| name.to_str().unwrap().starts_with(".qmpbackup-")).count(), 0);
        if half >= 2 && killed >= 3 {
            return;
        }
    }
    panic!("killed {killed} times, {half} times in the middle");
}
