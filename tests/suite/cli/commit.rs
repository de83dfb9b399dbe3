//! `qmprestore commit` from outside: what it changes, what it says and with which exit code.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use qmpbackup::chain::{FolderLock, FormatHint, Level, Manifest};
use qmpbackup::storage::{Access, FileStorage};
use serde_json::{Value, json};

use crate::support::in_place::assert_sound;
use crate::support::oracle::convert;
use crate::support::program::{Backup, Ended, TIMES, event};
use crate::support::{sparse, tools};

fn manifest(image: &str, level: Level, time: i64, parent: Option<&str>) -> Manifest {
    let parent = parent.map(str::to_owned);
    Manifest {
        image: image.to_owned(),
        level,
        time: Some(time),
        chain: Some("id".to_owned()),
        parent,
        id: None,
        parent_id: None,
        bitmap: None,
        format: FormatHint::Qcow2,
        virtual_size: 64 << 20,
        qemu: "10.0.2".to_owned(),
    }
}

#[test]
fn the_full_holds_the_newest_restore_point_and_the_incs_are_gone() {
    let backup = Backup::new();
    let expected = backup.expected(3);
    let ended = backup.does(&["commit"]).with(0);
    assert_eq!(ended.stdout, "");
    for number in 1..4 {
        ended.clone().says(&format!("{}: the FULL holds it\n", backup.name(number)));
    }
    ended.says("INC-1793847600-disk.qcow2 of disk.qcow2 is in ").says("moved in");
    backup.assert_holds(3, &expected);
    assert_sound(&backup.images[0], false);
    assert_eq!(backup.bookkeeping(), [&format!("{}.json", backup.name(0)), "lock"]);

    assert_eq!(backup.held_time(), TIMES[3]);
    backup.does(&["list"]).with(0).says("2026-11-05");
    backup.does(&["check"]).with(0);
    let earlier = (TIMES[3] - 1).to_string();
    backup.merged(["--out=no", "--until", &earlier]).with(2).says("no restore point at or before");
    for until in ["latest".to_owned(), TIMES[3].to_string(), backup.name(0).to_owned()] {
        backup.merged(["--force", "--format=raw", "--out=merged", "--until", &until]).with(0);
        sparse::assert_same(&backup.path("merged"), &expected, &until);
    }
    for words in [["commit", "--quiet"], ["snapshotrebase", "--skip-check"], ["commit", "--dry-run"]] {
        backup.refuses(&words, 2, "there is nothing to commit");
    }
}

#[test]
fn until_picks_by_time_and_name_and_later_incs_still_fit() {
    for until in ["1793761200", "INC-1793761200", "2026-11-04 08:00", "2026-11-04T03:00:00Z"] {
        let backup = Backup::new();
        let expected: Vec<_> = (0..4).map(|last| backup.expected(last)).collect();
        let ended = backup.does(&["commit", "--until", until]);
        let ended = ended.with(0).says("INC-1793761200-disk.qcow2 of disk.qcow2 is in").says_not(backup.name(3));
        assert_eq!(ended.stdout, "");
        backup.assert_holds(2, &expected[2]);
        backup.merged(["--format=raw", "--out=merged"]).with(0);
        sparse::assert_same(&backup.path("merged"), &expected[3], until);
        assert_eq!(backup.held_time(), TIMES[2]);
        // the FULL by its own name is what it holds now, which needs no commit
        backup.refuses(&["commit", "--until=FULL"], 2, "there is nothing to commit");
        backup.refuses(&["commit", "--until=1793674800"], 2, "no restore point at or before");
        backup.refuses(&["commit", "--until=nothing"], 2, "nothing");
        backup.does(&["commit"]).with(0);
        backup.assert_holds(3, &expected[3]);
    }
}

#[test]
fn what_an_inc_hides_from_others_the_full_hides_then() {
    for command in ["commit", "snapshotrebase"] {
        let backup = Backup::new();
        let set =
            |number: usize, mode| fs::set_permissions(&backup.images[number], Permissions::from_mode(mode)).unwrap();
        let mode = || backup.images[0].metadata().unwrap().mode() & 0o7777;
        backup.does(&["manifest"]).with(0);
        let sums = backup.dir.join(".qmpbackup").join(format!("{}.crc32", backup.name(0)));
        fs::set_permissions(&sums, Permissions::from_mode(0o644)).unwrap();
        for (number, of_image) in [0o664, 0o640, 0o606, 0o400].into_iter().enumerate() {
            set(number, of_image);
        }
        backup.does(&[command, "--dry-run"]).with(0);
        assert_eq!(mode(), 0o664);
        backup.does(&[command, "--until=INC-1793674800"]).with(0);
        assert_eq!((mode(), sums.metadata().unwrap().mode() & 0o777), (0o640, 0o640));
        // what the owner may do he may, and nobody gets more
        set(3, 0o600);
        backup.does(&[command]).with(0);
        assert_eq!((mode(), sums.metadata().unwrap().mode() & 0o777), (0o600, 0o600));
    }
}

#[test]
fn a_folder_of_several_disks_needs_a_filter() {
    let backup = Backup::new();
    for number in 0..4 {
        let name = backup.name(number).replace("disk.qcow2", "other");
        fs::copy(&backup.images[number], backup.dir.join(name)).unwrap();
    }
    let others = || {
        let mut files = backup.files();
        files.retain(|name, _| name.ends_with("other"));
        files
    };
    let (before, expected) = (others(), backup.expected(3));
    backup.refuses(&["commit"], 2, "--filter");
    backup.refuses(&["commit", "--filter=third"], 2, "third");
    backup.does(&["commit", "--filter=disk.qcow2"]).with(0);
    backup.assert_holds(3, &expected);
    assert!(others() == before, "another disk was changed");
    backup.does(&["commit", "--filter=other"]).with(0);
    assert_eq!(others().len(), 1);
}

#[test]
fn a_dry_run_changes_nothing_and_prints_commands_that_do_the_same() {
    for (name, command) in [("disk.qcow2", "commit"), ("json:it's \x1b[2J", "commit"), ("a disk", "snapshotrebase")] {
        let backup = Backup::named("backup/disk0", name, TIMES);
        let expected = backup.expected(2);
        let before = sparse::fingerprints(backup.root.path());
        let ended = backup.does(&[command, "--dry-run", "--until=1793761200", "--quiet"]).with(0);
        assert_eq!(ended.stderr, "");
        assert_eq!(sparse::fingerprints(backup.root.path()), before, "not even a lock file");
        let (plan, commands) = ended.stdout.split_once("the same by hand\n").unwrap();
        for words in
            ["disk           ", "\nrestore point  INC-1793761200-", "\nwritten to     ", "  written, then removed\n"]
        {
            assert!(plan.contains(words), "{words} in {plan}");
        }
        assert!(plan.contains("\ndisk size      64 MiB (67108864 bytes)\n"), "{plan}");
        assert!(plan.contains("\nFULL grows by  at most "), "{plan}");
        assert!(!plan.contains("INC-1793847600"), "{plan}");
        let by_hand = backup.copied();
        let commands = commands.replace(backup.root.path().to_str().unwrap(), by_hand.root.path().to_str().unwrap());
        tools::run(Command::new("sh").args(["-e", "-c", &commands]).current_dir(by_hand.root.path()));
        backup.does(&[command, "--until=1793761200"]).with(0);
        for backup in [&by_hand, &backup] {
            backup.assert_holds(2, &expected);
            let names = crate::support::in_place::snapshots(&backup.images[0], &backup.path("snapshots"));
            let names: Vec<String> = names.into_iter().map(|(name, ..)| name).collect();
            let made = ["FULL-BACKUP", "2026-11-03-03:00:00", "2026-11-04-03:00:00"];
            let made = if command == "commit" { &[][..] } else { &made };
            assert_eq!(names, made);
        }
    }
}

#[test]
fn json_tells_what_is_planned_and_what_was_done() {
    let backup = Backup::new();
    let path = |number: usize| backup.images[number].to_str().unwrap();
    let planned = backup.does(&["commit", "--json", "--dry-run"]).with(0).events();
    let plan = event(&planned, "plan").clone();
    assert_eq!(*planned.last().unwrap(), json!({"event": "done", "exit_code": 0}));
    let events = backup.does(&["commit", "--json"]).with(0).events();
    let done_plan = event(&events, "plan");
    for key in ["disk", "restore_point", "time", "full", "incs", "rest", "size", "bytes", "growth", "commands"] {
        assert!(plan[key] == done_plan[key] && !plan[key].is_null(), "{key}");
    }
    assert_eq!((&plan["dry_run"], &done_plan["dry_run"]), (&true.into(), &false.into()));
    assert_eq!((&plan["disk"], &plan["restore_point"]), (&"disk.qcow2".into(), &backup.name(3).into()));
    assert_eq!((&plan["time"], &plan["size"], &plan["full"]), (&TIMES[3].into(), &(64 << 20).into(), &path(0).into()));
    assert_eq!((&plan["incs"], &plan["rest"]), (&json!([path(1), path(2), path(3)]), &json!([])));
    assert_eq!(plan["commands"].as_array().unwrap().len(), 3);

    let order: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(order, ["phase", "plan", "phase", "phase", "phase", "removed", "removed", "removed", "done"]);
    let phases: Vec<&Value> = events.iter().filter(|event| event["event"] == "phase").map(|it| &it["phase"]).collect();
    assert_eq!(phases, ["planning", "checking", "copying", "syncing"]);
    let removed =
        events.iter().filter(|event| event["event"] == "removed").map(|event| event["path"].as_str().unwrap());
    assert!(removed.eq((1..4).map(path)));
    let done = events.last().unwrap();
    assert_eq!((&done["output"], &done["size"]), (&path(0).into(), &plan["size"]));
    assert_eq!((&done["bytes"], &done["exit_code"]), (&plan["bytes"], &0.into()));
    assert!(done["seconds"].is_f64() && done["rate"].is_u64(), "{done}");
    let failed = backup.does(&["commit", "--json"]).with(2).events();
    assert_eq!(failed.last().unwrap()["event"], "error");
}

#[test]
fn a_rate_limit_holds_and_progress_is_told() {
    let backup = Backup::new();
    let bytes = backup.planned(&["commit"])["bytes"].as_u64().unwrap();
    let begun = Instant::now();
    let limit = format!("--rate-limit={}", bytes / 2);
    let ended = backup.does(&["commit", &limit, "--progress-interval=0.2"]).with(0);
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1400) && took < Duration::from_secs(20), "{took:?}");
    ended.says("copying: ").says(" of 3 MiB, ").says("/s");
    let backup = Backup::new();
    let ended = backup.does(&["commit", "--quiet", "--progress-interval=0.01"]).with(0);
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
}

#[test]
fn any_number_of_threads_makes_the_same_full() {
    let made = ["commit", "snapshotrebase"].map(|command| {
        ["1", "4", "13"].map(|threads| {
            let backup = Backup::new();
            backup.does(&[command, "--threads", threads]).with(0);
            fs::read(&backup.images[0]).unwrap()
        })
    });
    for [one, four, thirteen] in made {
        assert!(one == four && one == thirteen);
    }
}

#[test]
fn damage_is_found_before_anything_is_changed() {
    for number in [0, 2, 3] {
        let backup = Backup::new();
        backup.set_header_refcount(number, 0);
        for command in ["commit", "snapshotrebase"] {
            backup.refuses(&[command], 4, "its metadata is damaged, errors: 1");
            backup.refuses(&[command, "--dry-run"], 4, "nothing was changed");
        }
        if number > 0 {
            backup.does(&["commit", "--skip-check"]).with(0);
        }
    }
    let backup = Backup::new();
    fs::remove_file(&backup.images[0]).unwrap();
    backup.refuses(&["commit"], 4, "qmprestore list");
    let backup = Backup::new();
    fs::write(backup.dir.join(format!("INC-{}-disk.qcow2.partial", TIMES[1] + 5)), "").unwrap();
    backup.refuses(&["commit"], 4, "may lack changes");
    let expected = backup.expected(3);
    backup.does(&["commit", "--allow-partial"]).with(3).says("may lack changes");
    backup.assert_holds(3, &expected);
    // what the INCs lacked, the FULL lacks now
    backup.merged(["--out=no"]).with(4).says("may lack changes");
    backup.merged(["--out=merged", "--allow-partial"]).with(3);
}

#[test]
fn what_somebody_uses_is_not_changed() {
    let backup = Backup::new();
    let commands = [&["commit"][..], &["commit", "--until=INC-1793674800"], &["snapshotrebase"]];
    for number in [0, 1] {
        let read = FileStorage::open(&backup.images[number]).unwrap();
        read.lock(Access::Read).unwrap();
        for words in commands {
            backup.refuses(words, 6, "nothing was changed; run again when it is closed there");
        }
    }
    let locks = FolderLock::take_all(&backup.dir).unwrap();
    for words in commands {
        backup.refuses(words, 6, "a backup or another command uses this folder");
    }
    backup.does(&["commit", "--dry-run"]).with(0);
    drop(locks);
    for (number, flag) in [(0, &["-r"][..]), (2, &["-r"]), (2, &[])] {
        let mut qemu = tools::qemu_io();
        let qemu = qemu.args(["-f", "qcow2"]).args(flag).arg(&backup.images[number]);
        let mut qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        backup.refuses(&["commit"], 6, "nothing was changed; run again when it is closed there");
        drop(qemu.stdin.take());
        qemu.wait().unwrap();
    }
    let expected = backup.expected(3);
    backup.does(&["commit"]).with(0);
    backup.assert_holds(3, &expected);
}

#[test]
fn of_two_at_the_same_time_one_is_refused() {
    let backup = Backup::new();
    let expected = backup.expected(3);
    let slow = ["commit", "--rate-limit=1M", "--json", "--progress-interval=0.1"];
    let mut first = backup.command(&slow).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !backup.bookkeeping().iter().any(|name| name.ends_with(".in-place.json")) {
        assert!(first.try_wait().unwrap().is_none(), "it ended before it copied");
        std::thread::sleep(Duration::from_millis(5));
    }
    for words in [["commit", "--quiet"], ["snapshotrebase", "--quiet"], ["commit", "--until=INC-1793847600"]] {
        backup.does(&words).with(6).says("a backup or another command uses this folder");
    }
    assert!(first.wait().unwrap().success());
    backup.assert_holds(3, &expected);
}

/// What QEMU reads through the names in the images.
#[track_caller]
fn assert_reads(image: &std::path::Path, expected: &std::path::Path) {
    let room = tempfile::tempdir().unwrap();
    for release in ["10.0", "11"] {
        let raw = room.path().join("raw");
        let mut convert = tools::qemu_img_of(release);
        tools::run(convert.args(["convert", "-f", "qcow2", "-O", "raw"]).args([image, &raw]));
        sparse::assert_same(&raw, expected, release);
    }
}

fn backing(image: &std::path::Path) -> Value {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(image));
    serde_json::from_str::<Value>(&info).unwrap()["backing-filename"].clone()
}

#[test]
fn a_folder_that_was_rebased_stays_one() {
    for command in ["commit", "snapshotrebase"] {
        for (name, named) in [("disk.qcow2", ""), ("nbd:x", "./")] {
            let backup = Backup::named("backup/disk0", name, TIMES);
            let expected = [backup.expected(2), backup.expected(3)];
            let link = backup.dir.join("image");
            backup.does(&["rebase"]).with(0);
            for (number, level) in ["FULL", "INC", "INC", "INC"].iter().enumerate() {
                let level = if *level == "FULL" { Level::Full } else { Level::Inc };
                let parent = number.checked_sub(1).map(|parent| backup.name(parent));
                manifest(backup.name(number), level, TIMES[number], parent).write(&backup.images[number]).unwrap();
            }
            backup.does(&[command, "--until=1793761200"]).with(0);
            backup.assert_holds(2, &expected[0]);
            assert_eq!(backing(&backup.images[3]), format!("{named}{}", backup.name(0)));
            assert_eq!(link.read_link().unwrap(), OsStr::new(backup.name(3)));
            assert_reads(&link, &expected[1]);
            let full = manifest(backup.name(0), Level::Full, TIMES[2], None);
            assert_eq!(Manifest::read(&backup.images[0]).unwrap(), Some(full));
            let later = manifest(backup.name(3), Level::Inc, TIMES[3], Some(backup.name(0)));
            assert_eq!(Manifest::read(&backup.images[3]).unwrap(), Some(later));
            assert_eq!(Manifest::read(&backup.images[2]).unwrap(), None);
            backup.merged(["--format=raw", "--out=merged"]).with(0);
            sparse::assert_same(&backup.path("merged"), &expected[1], "merged");
            backup.does(&["rebase"]).with(0).says("done already");

            backup.does(&[command]).with(0);
            backup.assert_holds(3, &expected[1]);
            assert_eq!(link.read_link().unwrap(), OsStr::new(backup.name(0)));
            assert_reads(&link, &expected[1]);
            backup.does(&["list"]).with(0);
        }
    }
}

#[test]
fn a_link_to_an_inc_that_goes_leads_to_the_full_and_another_stays() {
    let backup = Backup::new();
    let expected = backup.expected(1);
    backup.does(&["rebase", "--until=1793674800"]).with(0);
    backup.does(&["commit", "--until=1793674800"]).with(0);
    assert_reads(&backup.dir.join("image"), &expected);
    fs::remove_file(backup.dir.join("image")).unwrap();
    fs::write(backup.dir.join("image"), "precious").unwrap();
    backup.does(&["commit"]).with(0);
    assert_eq!(fs::read(backup.dir.join("image")).unwrap(), b"precious");
}

#[test]
fn a_full_without_a_time_in_its_name_takes_incs_too() {
    let backup = Backup::new();
    let bare = backup.dir.join("disk.qcow2");
    let expected = backup.expected(3);
    fs::rename(&backup.images[0], &bare).unwrap();
    backup.does(&["commit"]).with(0);
    let raw = backup.path("raw");
    convert(&bare, &raw);
    sparse::assert_same(&raw, &expected, "the bare name");
    let listed: Ended = backup.does(&["list", "--json"]).with(0);
    assert_eq!(event(&listed.events(), "restore_point")["time"], TIMES[3]);
}
