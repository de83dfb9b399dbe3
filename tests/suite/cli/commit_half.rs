//! A FULL that is written to in part: what can be done then, and what not.

use std::path::PathBuf;

use qmpbackup::chain::{FolderLock, Unfinished};
use rustix::process::Signal;

use crate::support::in_place::assert_sound;
use crate::support::program::{Backup, Ended, TIMES, program};
use crate::support::{sparse, tools};

/// A backup in whose FULL a command up to the second INC was stopped in the middle, and what its restore points were.
fn half(command: &str, signal: Signal, code: i32) -> (Backup, Vec<PathBuf>) {
    let backup = Backup::new();
    let expected = (0..4).map(|last| backup.expected(last)).collect();
    let ended = backup.stopped(&[command, "--until=INC-1793761200"], signal).with(code);
    ended.says("cancelled; the work is done in part, and nothing is lost: run the same again");
    assert!(Unfinished::read(&backup.images[0]).unwrap().is_some());
    (backup, expected)
}

#[test]
fn everything_says_what_to_run_while_a_full_is_written_in_part() {
    for (command, other) in [("commit", "snapshotrebase"), ("snapshotrebase", "commit")] {
        let (backup, _) = half(command, Signal::INT, 130);
        let last = backup.name(2);
        let begun = format!(
            "a {command} up to {last} was begun and not finished: unless it goes on, run `qmprestore {command}` again"
        );
        // whoever has locked the folder knows that it does not
        let stopped = format!("a {command} up to {last} was begun and not finished: run `qmprestore {command}` again");
        let before = sparse::fingerprints(&backup.dir);
        let listed = backup.does(&["list"]).with(3).says(&begun);
        assert_eq!(listed.stdout.matches("broken").count(), 4, "{listed:?}");
        for until in ["latest", "FULL", "INC-1793674800", "1793761200", last] {
            backup.merged(["--out=no", "--until", until]).with(4).says(&begun);
            backup.does(&["rebase", "--until", until]).with(4).says(&begun);
            backup.does(&[other, "--until", until]).with(4).says(&stopped);
            backup.does(&[other, "--dry-run", "--until", until]).with(4).says(&stopped);
        }
        let mut qmprebase = program(env!("CARGO_BIN_EXE_qmprebase"), ["rebase", "--dir"]);
        if command == "snapshotrebase" {
            Ended::of(qmprebase.arg(&backup.dir)).with(4).says(&stopped);
        }
        for until in ["FULL", "INC-1793674800", "1793674800"] {
            let first = format!("run `qmprestore {command}` again first, with --until {last} or later");
            backup.does(&[command, "--until", until]).with(4).says("was begun and not finished").says(&first);
        }
        backup.does(&[command, "--dry-run"]).with(0).says("the same by hand");
        assert_eq!(sparse::fingerprints(&backup.dir), before);
        // the images themselves are sound at any time
        let checked = backup.does(&["check"]);
        assert!(matches!(checked.code, Some(0 | 3)), "{checked:?}");
    }
}

#[test]
fn an_image_that_is_missing_meanwhile_is_named() {
    for gone in [1, 3] {
        let backup = Backup::new();
        backup.does(&["manifest"]).with(0);
        backup.stopped(&["commit", "--until=INC-1793761200"], Signal::INT).with(130);
        backup.does(&["verify"]).with(3);
        std::fs::rename(&backup.images[gone], backup.path("kept")).unwrap();
        let missing = format!("{} is missing, only its manifest is there", backup.images[gone].display());
        backup.does(&["verify"]).with(4).says(&missing);
        backup.does(&["commit"]).with(4).says(&missing);
        std::fs::rename(backup.path("kept"), &backup.images[gone]).unwrap();
        backup.does(&["commit"]).with(0);
        backup.does(&["verify"]).with(0);
    }
}

#[test]
fn what_goes_on_just_now_is_not_to_be_run_again() {
    let (backup, _) = half("commit", Signal::INT, 130);
    let _held = FolderLock::take(&backup.dir).unwrap();
    let said = format!("{}/.qmpbackup/lock is locked", backup.dir.display());
    backup.merged(["--out=no"]).with(6).says(&said).says_not("commit");
    backup.does(&["verify", "--until=latest"]).with(6).says(&said).says_not("commit");
    backup.does(&["rebase"]).with(6).says(&said).says_not("commit");
}

#[test]
fn the_same_again_or_more_ends_right() {
    for (command, signal, code) in [("commit", Signal::TERM, 143), ("snapshotrebase", Signal::INT, 130)] {
        let (backup, expected) = half(command, signal, code);
        for (until, last) in [
            ("INC-1793761200", 2),
            ("INC-1793761200-disk.qcow2", 2),
            ("1793761200", 2),
            ("1793847599", 2),
            ("1793847600", 3),
            ("latest", 3),
            ("INC-1793847600", 3),
        ] {
            let again = backup.copied();
            again.does(&[command, "--until", until]).with(0);
            again.assert_holds(last, &expected[last]);
            assert_sound(&again.images[0], false);
            assert_eq!(again.held_time(), TIMES[last]);
            again.does(&["list"]).with(0);
            again.merged(["--format=raw", "--out=merged"]).with(0);
            sparse::assert_same(&again.path("merged"), &expected[3], until);
            let before = (TIMES[last] - 1).to_string();
            again.merged(["--out=no", "--until", &before]).with(2).says("no restore point at or before");
        }
        // more than once, each time up to another INC
        backup.stopped(&[command], Signal::INT).with(130);
        backup.does(&[command, "--until=INC-1793761200"]).with(4).says("--until INC-1793847600-disk.qcow2 or later");
        backup.does(&[command]).with(0);
        backup.assert_holds(3, &expected[3]);
    }
}

#[test]
fn a_journal_that_nobody_understands_stops_everything() {
    let backup = Backup::new();
    std::fs::create_dir(backup.dir.join(".qmpbackup")).unwrap();
    std::fs::write(Unfinished::path(&backup.images[0]), "{}").unwrap();
    let before = sparse::fingerprints(&backup.dir);
    for words in [["commit", "--quiet"], ["snapshotrebase", "--quiet"], ["commit", "--dry-run"], ["rebase", "--quiet"]]
    {
        backup.does(&words).with(4).says("in-place.json").says("cannot be understood").says("no version");
    }
    backup.merged(["--out=no"]).with(4).says("cannot be understood");
    backup.does(&["list"]).with(3).says("cannot be understood");
    assert_eq!(sparse::fingerprints(&backup.dir), before);
}

/// The INC that follows may have been told already that the FULL is before it.
#[test]
fn an_inc_that_names_the_full_too_early_does_not_stop_what_was_begun() {
    let (backup, expected) = half("commit", Signal::INT, 130);
    let based = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backup.name(0)];
    tools::run(tools::qemu_img().args(based).arg(&backup.images[3]));
    backup.does(&["commit"]).with(0);
    backup.assert_holds(3, &expected[3]);

    let backup = Backup::new();
    tools::run(tools::qemu_img().args(based).arg(&backup.images[3]));
    backup.refuses(&["commit"], 4, "an image is missing or foreign");
}
