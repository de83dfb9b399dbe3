//! `qmprestore snapshotrebase` from outside: the snapshots that it makes, in the eyes of QEMU.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::in_place::{assert_sound, snapshots};
use crate::support::oracle::convert;
use crate::support::program::{Backup, Ended, TIMES, event};
use crate::support::{sparse, tools};

/// A chain that each release can read, with a disk that grows, at these times.
fn plain(times: [i64; 4]) -> Backup {
    let backup = Backup::named("backup/disk0", "disk", times);
    for (number, image) in backup.images.iter().enumerate() {
        std::fs::remove_file(image).unwrap();
        let size = ["4M", "4M", "6M", "5M"][number];
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", "compat=1.1"]).arg(image).arg(size));
        let writes = [format!("write -P {} {number}M 1M", number + 1), format!("write -z {}k 100k", number * 512)];
        tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", &writes[0], "-c", &writes[1]]).arg(image));
    }
    backup
}

/// QEMU of a release goes to each snapshot and finds its restore point.
fn assert_applies(backup: &Backup, release: &str) {
    let expected: Vec<_> = (0..4).map(|last| backup.expected(last)).collect();
    let ended = backup.does(&["snapshotrebase"]).with(0).says("the FULL has the snapshot FULL-BACKUP\n");
    assert_eq!(ended.stdout, "");
    backup.assert_holds(3, &expected[3]);
    assert_sound(&backup.images[0], false);
    let full = &backup.images[0];
    let listed = tools::run(tools::qemu_img_of(release).args(["snapshot", "-l"]).arg(full).env("TZ", "UTC"));
    let names = ["FULL-BACKUP", "2026-11-03-03:00:00", "2026-11-04-03:00:00", "2026-11-05-03:00:00"];
    let at = names.map(|name| listed.find(name).unwrap_or_else(|| panic!("no {name} in {listed}")));
    assert!(at.is_sorted(), "{listed}");
    for day in 2..6 {
        assert!(listed.contains(&format!(" 2026-11-0{day} 03:00:00 ")), "{listed}");
    }
    for (name, expected) in names.iter().zip(&expected).rev() {
        tools::run(tools::qemu_img_of(release).args(["snapshot", "-a", name]).arg(full));
        let raw = backup.path("applied");
        tools::run(tools::qemu_img_of(release).args(["convert", "-f", "qcow2", "-O", "raw"]).args([full, &raw]));
        sparse::assert_same(&raw, expected, name);
        tools::run(tools::qemu_img_of(release).args(["check", "-q", "-f", "qcow2"]).arg(full));
    }
}

#[test]
fn qemu_goes_to_each_restore_point() {
    // the recorded chain is zstd, which the oldest does not know
    assert_applies(&Backup::new(), "10.0");
    assert_applies(&Backup::new(), "11");
    for release in ["5.2", "7.2", "10.0", "11"] {
        assert_applies(&plain(TIMES), release);
    }
}

/// Names and dates of the snapshots.
fn made(backup: &Backup) -> Vec<(String, i64)> {
    snapshots(&backup.images[0], &backup.path("snapshots")).into_iter().map(|(name, date, _)| (name, date)).collect()
}

fn expected(names: &[(&str, i64)]) -> Vec<(String, i64)> {
    names.iter().map(|(name, date)| ((*name).to_owned(), *date)).collect()
}

#[test]
fn names_are_local_times_also_in_the_hour_that_comes_twice() {
    let backup = plain([1_792_880_000, 1_792_888_200, 1_792_891_800, 1_792_895_400]);
    let words = ["snapshotrebase", "--json"];
    let in_berlin = |words: &[&str]| Ended::of(backup.command(words).env("TZ", "Europe/Berlin")).with(0).events();
    let names = ["FULL-BACKUP", "2026-10-25-02:30:00", "2026-10-25-02:30:00+0100", "2026-10-25-03:30:00"];
    let planned = in_berlin(&["snapshotrebase", "--json", "--dry-run"]);
    assert_eq!(event(&planned, "plan")["snapshots"], json!(names));
    let events = in_berlin(&words);
    let told: Vec<&Value> = events.iter().filter(|it| it["event"] == "snapshot").map(|it| &it["name"]).collect();
    assert_eq!(told, names);
    let times = [1_792_880_000, 1_792_888_200, 1_792_891_800, 1_792_895_400];
    let dated: Vec<(&str, i64)> = names.into_iter().zip(times).collect();
    assert_eq!(made(&backup), expected(&dated));
}

#[test]
fn later_incs_are_added_and_the_full_is_kept_once() {
    let backup = Backup::new();
    let last = backup.expected(3);
    backup.does(&["snapshotrebase", "--until=INC-1793674800"]).with(0);
    let first = expected(&[("FULL-BACKUP", TIMES[0]), ("2026-11-03-03:00:00", TIMES[1])]);
    assert_eq!(made(&backup), first);
    // stopped and done again in another time zone
    let until = ["snapshotrebase", "--until=INC-1793761200"];
    backup.stopped(&until, Signal::INT).with(130);
    let planned = backup.planned(&until);
    assert_eq!(planned["snapshots"], json!(["2026-11-04-03:00:00"]));
    Ended::of(backup.command(&until).env("TZ", "Asia/Tokyo")).with(0).says_not("FULL-BACKUP");
    backup.does(&["snapshotrebase"]).with(0).says_not("FULL-BACKUP");
    let later = expected(&[("2026-11-04-12:00:00", TIMES[2]), ("2026-11-05-03:00:00", TIMES[3])]);
    assert_eq!(made(&backup), [first, later].concat());
    backup.assert_holds(3, &last);
    assert_sound(&backup.images[0], false);
    // what is in the snapshots stays when an INC is committed
    let kept = snapshots(&backup.images[0], &backup.path("kept"));
    let inc = backup.dir.join("INC-1793900000-disk.qcow2");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&inc).arg("64M"));
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write -P 9 0 64M"]).arg(&inc));
    backup.does(&["commit"]).with(0);
    let after = snapshots(&backup.images[0], &backup.path("after"));
    assert_eq!(kept.len(), 4);
    for ((name, _, before), (_, _, after)) in kept.iter().zip(&after) {
        sparse::assert_same(after, before, name);
    }
    assert_is(&backup.images[0], 9);
}

/// All of a disk is this byte.
fn assert_is(image: &Path, byte: u8) {
    let raw = image.with_file_name("raw");
    convert(image, &raw);
    assert!(std::fs::read(raw).unwrap().iter().all(|is| *is == byte));
}
