//! Work in place that was broken off and is done again, and what is refused before it begins.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qmpbackup::chain::{Checksums, Clock, ImageId, Manifest, RestorePoint, Stage, Unfinished, When, Work, discover};
use qmpbackup::qcow2::Writer;
use qmpbackup::restore::{self, Commit, CommitOptions, Phase, Silent};
use qmpbackup::storage::FileStorage;
use serde_json::Value;

use crate::support::meanwhile::Meanwhile;
use crate::support::program::{Backup, Ended, TIMES};
use crate::support::{sparse, tools};

fn run(backup: &Backup, words: &[&str]) -> Ended {
    Ended::run(words[..1].iter().chain(&["--dir", backup.dir.to_str().unwrap()]).chain(&words[1..]))
}

fn name(image: &Path) -> String {
    image.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Says that work in the FULL was begun, which takes all INCs.
fn begin(backup: &Backup, work: Work, stage: Stage) {
    let incs = backup.images[1..].iter().map(|image| name(image)).collect();
    let unfinished = Unfinished { work, stage, full: name(&backup.images[0]), incs, full_id: None };
    unfinished.write(&backup.images[0]).unwrap();
}

fn is_begun(backup: &Backup) -> bool {
    Unfinished::read(&backup.images[0]).unwrap().is_some()
}

/// The names of the snapshots of the FULL.
fn snapshots(backup: &Backup) -> Vec<String> {
    let info = tools::run(tools::qemu_img().args(["info", "--output", "json"]).arg(&backup.images[0]));
    let info: Value = serde_json::from_str(&info).unwrap();
    let names = info["snapshots"].as_array().into_iter().flatten();
    names.map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
}

fn create_snapshot(backup: &Backup, name: &str, time: i64) {
    let storage = Arc::new(FileStorage::open_writable(&backup.images[0]).unwrap());
    let mut writer = Writer::open(storage).unwrap();
    writer.create_snapshot(name, Duration::from_secs(time.try_into().unwrap())).unwrap();
    writer.finish().unwrap();
}

#[track_caller]
fn assert_full_is(backup: &Backup, raw: &Path) {
    let merged = backup.path("merged");
    backup.merged(["--force", "--format", "raw", "--out", "merged"]).with(0);
    sparse::assert_same(&merged, raw, "the FULL");
    tools::run(tools::qemu_img().args(["check", "-q"]).arg(&backup.images[0]));
}

/// All of a file that a test puts back.
fn kept(path: &Path) -> (PathBuf, Vec<u8>) {
    (path.to_owned(), fs::read(path).unwrap())
}

#[test]
fn an_inc_that_is_gone_while_the_full_is_a_mixture_is_missed() {
    for (work, command, gone) in
        [(Work::Commit, "commit", 1), (Work::Commit, "commit", 3), (Work::SnapshotRebase, "snapshotrebase", 2)]
    {
        let backup = Backup::new();
        begin(&backup, work, Stage::Writing);
        let expected = backup.expected(3);
        let (path, bytes) = kept(&backup.images[gone]);
        fs::remove_file(&path).unwrap();
        let last = name(&backup.images[3]);
        run(&backup, &[command, "--until", &last]).with(4).says(&name(&path)).says("put it back");
        assert!(is_begun(&backup));
        fs::write(&path, bytes).unwrap();
        run(&backup, &[command, "--until", &last]).with(0);
        assert_full_is(&backup, &expected);
    }
}

#[test]
fn all_incs_may_be_gone_when_only_the_journal_is_left() {
    for (work, command, stage) in
        [(Work::Commit, "commit", Stage::Removing), (Work::SnapshotRebase, "snapshotrebase", Stage::Writing)]
    {
        let backup = Backup::new();
        let expected = backup.expected(3);
        backup.does(&["manifest"]).with(0);
        let known = [Manifest::path(&backup.images[2]), Checksums::path(&backup.images[2])].map(|path| kept(&path));
        run(&backup, &[command]).with(0);
        begin(&backup, work, stage);
        // a power cut may bring back what was known of one that is gone
        for (path, bytes) in &known {
            fs::write(path, bytes).unwrap();
        }
        run(&backup, &["merge", "--out", backup.path("none").to_str().unwrap()]).with(4).says(command);
        run(&backup, &[command]).with(0);
        assert!(!is_begun(&backup) && !known.iter().any(|(path, _)| path.exists()));
        assert_full_is(&backup, &expected);
    }
}

#[test]
fn a_snapshot_of_somebody_else_is_not_taken_for_one_of_an_inc() {
    let backup = Backup::new();
    create_snapshot(&backup, "mine", TIMES[2]);
    let before = fs::read(&backup.images[0]).unwrap();
    run(&backup, &["snapshotrebase"]).with(1).says("mine");
    assert!(fs::read(&backup.images[0]).unwrap() == before, "the FULL was changed");
    assert!(!is_begun(&backup) && backup.images[1..].iter().all(|image| image.exists()));
}

#[test]
fn the_moment_that_a_full_holds_gets_a_snapshot_before_it_goes() {
    let backup = Backup::new();
    let of = |number: usize| name(&backup.images[number]);
    run(&backup, &["snapshotrebase", "--until", &of(1)]).with(0);
    run(&backup, &["commit", "--until", &of(2)]).with(0);
    assert_eq!(snapshots(&backup), ["FULL-BACKUP", "2026-11-03-03:00:00"]);
    run(&backup, &["snapshotrebase"]).with(0);
    let found = snapshots(&backup);
    assert_eq!(found, ["FULL-BACKUP", "2026-11-03-03:00:00", "2026-11-04-03:00:00", "2026-11-05-03:00:00"]);
}

fn select(backup: &Backup) -> RestorePoint {
    let inventory = discover(&backup.dir).unwrap();
    let disk = inventory.disk(None).unwrap();
    disk.select_in_place(&When::Latest, &Clock::system(), false).unwrap()
}

/// What it builds on would be gone, and its parent would not be renamed.
#[test]
fn an_inc_that_comes_before_the_folder_is_locked_is_noticed() {
    let backup = Backup::new();
    let newest = backup.images.last().unwrap();
    let away = newest.with_file_name("away");
    fs::rename(newest, &away).unwrap();
    let point = select(&backup);
    fs::rename(&away, newest).unwrap();
    assert!(point.is_current().unwrap());
    let again = || {
        let inventory = discover(&backup.dir)?;
        inventory.disk(None)?.select_in_place(&"INC-1793761200".parse().unwrap(), &Clock::system(), false)
    };
    let options = CommitOptions { work: Work::Commit, threads: None, rate_limit: None, dry_run: false };
    assert!(matches!(Commit::plan(&point, again, options, &Silent), Err(restore::Error::Changed)));
    Commit::plan(&again().unwrap(), again, options, &Silent).unwrap().run(&Silent).unwrap();
    assert_eq!(discover(&backup.dir).unwrap().disk(None).unwrap().points().len(), 2);
}

#[test]
fn a_restore_point_that_was_chosen_before_other_work_began_is_not_worked_on() {
    let backup = Backup::new();
    let point = select(&backup);
    let options = CommitOptions { work: Work::Commit, threads: None, rate_limit: None, dry_run: false };
    begin(&backup, Work::Commit, Stage::Writing);
    assert!(!point.is_current().unwrap());
    let again = || Ok(select(&backup));
    assert!(matches!(Commit::plan(&point, again, options, &Silent), Err(restore::Error::Changed)));
    assert!(select(&backup).is_current().unwrap());
    Commit::plan(&select(&backup), again, options, &Silent).unwrap().run(&Silent).unwrap();
    assert!(!point.is_current().unwrap());
    assert!(select(&backup).is_current().unwrap());
}

#[test]
fn incs_stay_when_their_full_is_replaced_while_they_are_written_into_it() {
    for work in [Work::Commit, Work::SnapshotRebase] {
        let backup = Backup::new();
        let expected = backup.path("expected");
        backup.merged(["--format", "raw", "--out", "expected"]).with(0);
        let (full, copy) = (backup.images[0].clone(), backup.path("copy"));
        fs::copy(&full, &copy).unwrap();
        let options = CommitOptions { work, threads: None, rate_limit: None, dry_run: false };
        let plan = || Commit::plan(&select(&backup), || Ok(select(&backup)), options, &Silent).unwrap();
        let replacing = Meanwhile::new(|phase| {
            if matches!(phase, Phase::Copying { .. }) {
                fs::rename(&copy, &full).unwrap();
            }
        });
        let error = plan().run(&replacing).unwrap_err();
        assert!(matches!(&error, restore::Error::InPlace { path, .. } if *path == full), "{error:?}");
        assert!(backup.images.iter().all(|image| image.exists()));
        // the older one gets them, too
        plan().run(&Silent).unwrap();
        backup.merged(["--format", "raw", "--out", "after"]).with(0);
        assert_eq!(fs::read(backup.path("after")).unwrap(), fs::read(&expected).unwrap());
    }
}

#[test]
fn an_inc_that_somebody_writes_to_while_it_is_committed_stays() {
    let backup = Backup::new();
    let options = CommitOptions { work: Work::Commit, threads: None, rate_limit: None, dry_run: false };
    let commit = Commit::plan(&select(&backup), || Ok(select(&backup)), options, &Silent).unwrap();
    let inc = backup.images[1].clone();
    let overwriting = Meanwhile::new(|phase| {
        if matches!(phase, Phase::Copying { .. }) {
            let inc = fs::File::options().write(true).open(&inc).unwrap();
            inc.set_len(inc.metadata().unwrap().len() + 512).unwrap();
        }
    });
    let error = commit.run(&overwriting).unwrap_err();
    assert!(matches!(&error, restore::Error::Overwritten { path } if *path == inc), "{error:?}");
    assert!(backup.images.iter().all(|image| image.exists()) && is_begun(&backup));
}

#[test]
fn work_that_was_begun_is_not_refused_for_the_snapshots_that_it_has_made() {
    let backup = Backup::new();
    let expected = backup.path("expected");
    backup.merged(["--format", "raw", "--out", "expected"]).with(0);
    // so narrow that twice the snapshots would not fit
    let (full, narrow) = (&backup.images[0], backup.path("narrow"));
    let options = ["convert", "-f", "qcow2", "-O", "qcow2", "-o", "refcount_bits=4,cluster_size=16k"];
    tools::run(tools::qemu_img().args(options).args([full, &narrow]));
    fs::rename(&narrow, full).unwrap();
    run(&backup, &["snapshotrebase", "--until", &name(&backup.images[2])]).with(0);
    let incs = vec![name(&backup.images[3])];
    let begun = Unfinished { work: Work::SnapshotRebase, stage: Stage::Writing, full: name(full), incs, full_id: None };
    begun.write(full).unwrap();
    run(&backup, &["snapshotrebase"]).with(0);
    assert_eq!(snapshots(&backup).len(), 4);
    assert_full_is(&backup, &expected);
}

/// INCs are about to go that are written into another FULL.
#[test]
fn a_full_of_before_that_was_put_back_meanwhile_is_refused() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let full = &backup.images[0];
    let incs = backup.images[1..].iter().map(|inc| name(inc)).collect();
    let full_id = Manifest::read(full).unwrap().unwrap().id;
    let begun = Unfinished { work: Work::Commit, stage: Stage::Removing, full: name(full), incs, full_id };
    begun.write(full).unwrap();
    backup.does(&["commit"]).with(1).says("is the one from before the INCs were written into it");
    assert!(backup.images.iter().all(|image| image.exists()));
}

/// A run was killed before it removed INCs, and the FULL was changed or damaged since.
#[test]
fn incs_are_kept_that_a_full_no_longer_holds() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    begin(&backup, Work::Commit, Stage::Removing);
    let full = &backup.images[0];
    let flip = || {
        let mut bytes = fs::read(full).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(full, bytes).unwrap();
    };
    flip();
    backup.does(&["commit"]).with(1).says("is not what it was when the INCs were written into it");
    assert!(backup.images.iter().all(|image| image.exists()));
    flip();
    backup.does(&["commit"]).with(0);
    assert!(backup.images[1..].iter().all(|image| !image.exists()));
}

/// Nothing tells whether it still does.
#[test]
fn incs_go_into_a_full_without_checksums_once_more() {
    let backup = Backup::new();
    let expected = backup.expected(3);
    backup.does(&["manifest"]).with(0);
    let full = &backup.images[0];
    fs::remove_file(Checksums::path(full)).unwrap();
    let manifest = Manifest::read(full).unwrap().unwrap();
    let (full_id, id) = (manifest.id, ImageId::parse("0123456789abcdef0123456789abcdef"));
    let incs = backup.images[1..].iter().map(|inc| name(inc)).collect();
    Unfinished { work: Work::Commit, stage: Stage::Removing, full: name(full), incs, full_id }.write(full).unwrap();
    Manifest { id, ..manifest }.write(full).unwrap();
    backup.does(&["commit"]).with(0);
    assert!(backup.images[1..].iter().all(|image| !image.exists()));
    // what is killed meanwhile is still known by it
    assert_eq!(Manifest::read(full).unwrap().unwrap().id, id);
    assert_full_is(&backup, &expected);
}

/// A run that was killed after it had given the FULL its new id, or before.
#[test]
fn a_full_gets_one_other_id_however_often_it_is_begun() {
    for has_new_id in [false, true] {
        let backup = Backup::new();
        backup.does(&["manifest"]).with(0);
        let full = &backup.images[0];
        let expected = backup.expected(3);
        let incs = backup.images[1..3].iter().map(|inc| name(inc)).collect();
        let manifest = Manifest::read(full).unwrap().unwrap();
        let full_id = manifest.id;
        Unfinished { work: Work::Commit, stage: Stage::Writing, full: name(full), incs, full_id }.write(full).unwrap();
        if has_new_id {
            let id = ImageId::parse("0123456789abcdef0123456789abcdef");
            Manifest { id, ..manifest }.write(full).unwrap();
        }
        backup.does(&["commit", "--until=INC-1793761200"]).with(0);
        let id = Manifest::read(full).unwrap().unwrap().id;
        assert_ne!(id, full_id);
        assert_eq!(id == ImageId::parse("0123456789abcdef0123456789abcdef"), has_new_id);
        backup.does(&["verify"]).with(0);
        backup.merged(["--verify", "--format=raw", "--out=merged"]).with(0);
        sparse::assert_same(&backup.path("merged"), &expected, "merged");
    }
}
