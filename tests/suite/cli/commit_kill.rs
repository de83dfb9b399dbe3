//! Work in place that is killed at any moment ends right when it is done again.
//!
//! A run is stopped again and again, and what it has done so far is copied: each copy is what a kill would have left. The
//! moments at which files come and go are all taken, the others by chance. `QMPBACKUP_LONG=1` takes many more.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

use crate::support::in_place::{assert_sound, send, snapshots};
use crate::support::oracle::convert;
use crate::support::prng::Prng;
use crate::support::program::{Backup, TIMES};
use crate::support::seeds::are_many;
use crate::support::sparse;
use crate::support::sums::assert_fit;

/// A limit with which the work takes this many milliseconds.
fn limit(backup: &Backup, command: &str, milliseconds: u64) -> String {
    let bytes = backup.planned(&[command])["bytes"].as_u64().unwrap();
    format!("--rate-limit={}", bytes * 1000 / milliseconds)
}

/// Which files there are, and what small ones say.
fn shape(backup: &Backup) -> Vec<(String, Vec<u8>)> {
    let books = backup.dir.join(".qmpbackup");
    let all = [&backup.dir, &books].into_iter().flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten());
    let mut shape: Vec<(String, Vec<u8>)> = all
        .map(|entry| {
            let path = entry.unwrap().path();
            let is_small = path.extension().is_some_and(|extension| extension == "json");
            let content = if is_small { std::fs::read(&path).unwrap() } else { Vec::new() };
            (path.display().to_string(), content)
        })
        .collect();
    shape.sort();
    shape
}

/// What there is at moments of a run.
fn moments(backup: &Backup, words: &[&str], prng: &mut Prng) -> Vec<Backup> {
    let mut child = backup.command(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (mut taken, mut last) = (Vec::new(), Vec::new());
    let often = if are_many() { 8 } else { 40 };
    loop {
        std::thread::sleep(Duration::from_micros(prng.between(200, 4000)));
        send(&child, Signal::STOP);
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(Pid::from_child(&child)), options).unwrap().unwrap();
        if status.exited() {
            break;
        }
        let now = shape(backup);
        if now != last || prng.one_in(often) {
            taken.push(backup.copied());
            last = now;
        }
        send(&child, Signal::CONT);
    }
    assert!(child.wait().unwrap().success());
    taken
}

/// The backup after all is done, and what was expected of each restore point.
fn assert_right(backup: &Backup, command: &str, rebased: bool, expected: &[PathBuf]) {
    assert_eq!(assert_fit(&backup.dir), [backup.images[0].clone()]);
    backup.assert_holds(3, &expected[3]);
    assert_sound(&backup.images[0], false);
    assert_eq!(backup.held_time(), TIMES[3]);
    if rebased {
        let raw = backup.path("link");
        convert(&backup.dir.join("image"), &raw);
        sparse::assert_same(&raw, &expected[3], "the link");
    }
    let found = snapshots(&backup.images[0], &backup.path("snapshots"));
    let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
    let all = ["FULL-BACKUP", "2026-11-03-03:00:00", "2026-11-04-03:00:00", "2026-11-05-03:00:00"];
    assert_eq!(names, if command == "commit" { &[][..] } else { &all });
    for (((name, date, content), expected), time) in found.iter().zip(expected).zip(TIMES) {
        sparse::assert_same(content, expected, name);
        assert_eq!(*date, time);
    }
}

/// Whether there is nothing left to do.
fn is_done(backup: &Backup) -> bool {
    let has_journal = backup.bookkeeping().iter().any(|name| name.contains("in-place"));
    !has_journal && !backup.images[1..].iter().any(|image| image.exists())
}

/// Does it again, killed at some moment, and says whether it was.
fn killed(backup: &Backup, command: &str, slow: &str, prng: &mut Prng) -> bool {
    let mut run = backup.command(&[command, "--skip-check", slow]);
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(prng.below(500)));
    run.kill().unwrap();
    let code = run.wait().unwrap().code();
    assert!(matches!(code, None | Some(0)), "{code:?}");
    code.is_none()
}

/// Ends it after some more kills.
fn finish(backup: &Backup, command: &str, prng: &mut Prng) {
    for _ in 0..prng.below(3) {
        if !is_done(backup) {
            killed(backup, command, &limit(backup, command, prng.between(50, 1000)), prng);
        }
    }
    if !is_done(backup) {
        backup.does(&[command]).with(0);
    }
}

fn any_moment(command: &str, rebased: bool, stream: u64) {
    let prng = &mut Prng::stream(stream, 31);
    let all = if are_many() { 10 } else { 1 };
    for _ in 0..all {
        let backup = Backup::new();
        backup.does(&["manifest"]).with(0);
        let expected: Vec<PathBuf> = (0..4).map(|last| backup.expected(last)).collect();
        if rebased {
            backup.does(&["rebase"]).with(0);
        }
        let slow = limit(&backup, command, 1500);
        let taken = moments(&backup, &[command, "--skip-check", &slow], prng);
        assert!(taken.len() > 3, "only {} moments", taken.len());
        let begun = taken.iter().filter(|backup| backup.bookkeeping().iter().any(|name| name.contains("in-place")));
        assert!(begun.count() > 1);
        assert_right(&backup, command, rebased, &expected);
        for backup in &taken {
            finish(backup, command, prng);
            assert_right(backup, command, rebased, &expected);
        }
    }
}

#[test]
fn a_commit_that_is_killed_at_any_moment_ends_right() {
    any_moment("commit", false, 1);
}

#[test]
fn a_commit_in_a_rebased_folder_that_is_killed_at_any_moment_ends_right() {
    any_moment("commit", true, 2);
}

#[test]
fn a_snapshotrebase_that_is_killed_at_any_moment_ends_right() {
    any_moment("snapshotrebase", false, 3);
}

#[test]
fn a_snapshotrebase_in_a_rebased_folder_that_is_killed_at_any_moment_ends_right() {
    any_moment("snapshotrebase", true, 4);
}

/// Nothing but kills, from outside.
#[test]
fn killed_again_and_again_it_ends_right() {
    let prng = &mut Prng::stream(5, 31);
    let mut kills = 0;
    for number in 0..if are_many() { 100 } else { 4 } {
        let command = ["commit", "snapshotrebase"][number % 2];
        let backup = Backup::new();
        backup.does(&["manifest"]).with(0);
        let expected: Vec<PathBuf> = (0..4).map(|last| backup.expected(last)).collect();
        let slow = limit(&backup, command, 600);
        for _ in 0..8 {
            kills += usize::from(!is_done(&backup) && killed(&backup, command, &slow, prng));
        }
        if !is_done(&backup) {
            backup.does(&[command]).with(0);
        }
        assert_right(&backup, command, false, &expected);
    }
    assert!(kills > 5, "killed {kills} times");
}
