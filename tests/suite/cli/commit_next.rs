//! What a commit up to an earlier INC does to the one that comes next.

use std::fs;
use std::path::{Path, PathBuf};

use qmpbackup::chain::{Checksums, Manifest};
use qmpbackup::qcow2::Header;
use qmpbackup::storage::FileStorage;

use crate::support::program::{Backup, Ended};
use crate::support::sparse;

const COMMANDS: [&str; 2] = ["commit", "snapshotrebase"];

fn backing(image: &Path) -> String {
    Header::read(&FileStorage::open(image).unwrap()).unwrap().backing.unwrap().name
}

fn books(image: &Path) -> [PathBuf; 2] {
    [Manifest::path(image), Checksums::path(image)]
}

/// The newest INC is broken, after a command up to the first one as before it.
fn assert_stays_broken(backup: &Backup, says: &str) {
    let manifest = |backup: &Backup| fs::read(Manifest::path(&backup.images[3])).unwrap();
    for command in COMMANDS {
        let copy = backup.copied();
        copy.does(&["list"]).with(3).says(says);
        copy.does(&[command, "--until=INC-1793674800"]).with(0);
        assert!(manifest(&copy) == manifest(backup), "the INC was changed");
        copy.does(&["list"]).with(3).says("INC-1793847600-disk.qcow2").says("broken");
        copy.does(&["verify"]).fails(4);
        copy.merged(["--out=no"]).with(4).says("builds on");
    }
}

#[test]
fn an_inc_that_builds_on_one_that_is_missing_stays_broken() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    fs::remove_file(&backup.images[2]).unwrap();
    for book in books(&backup.images[2]) {
        fs::remove_file(book).unwrap();
    }
    assert_stays_broken(&backup, "builds on INC-1793761200-disk.qcow2, which is missing");
}

#[test]
fn an_inc_that_builds_on_one_that_was_exchanged_stays_broken() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let manifest = Manifest::read(&backup.images[3]).unwrap().unwrap();
    let parent_id = Manifest::read(&backup.images[1]).unwrap().unwrap().id;
    Manifest { parent_id, ..manifest }.write(&backup.images[3]).unwrap();
    for command in COMMANDS {
        let copy = backup.copied();
        copy.does(&["list"]).with(3).says("builds on another image of the name");
        copy.does(&[command, "--until=INC-1793761200"]).with(0);
        copy.does(&["list"]).with(3).says("builds on INC-1793761200-disk.qcow2, which is missing");
        copy.merged(["--out=no"]).with(4).says("builds on");
    }
}

#[test]
fn an_inc_whose_header_names_one_that_is_missing_stays_broken() {
    let backup = Backup::new();
    backup.does(&["rebase"]).with(0);
    fs::remove_dir_all(backup.dir.join(".qmpbackup")).unwrap();
    fs::remove_file(&backup.images[2]).unwrap();
    for command in COMMANDS {
        let copy = backup.copied();
        copy.does(&[command, "--until=INC-1793674800"]).with(0);
        assert_eq!(backing(&copy.images[3]), backup.name(2));
        copy.merged(["--out=no"]).fails(4).says("INC-1793761200-disk.qcow2");
    }
}

#[test]
fn an_inc_that_is_away_meanwhile_fits_when_it_is_back() {
    let backup = Backup::new();
    let expected = backup.expected(3);
    backup.does(&["manifest"]).with(0);
    for command in COMMANDS {
        let copy = backup.copied();
        let away = copy.path("away");
        fs::rename(&copy.images[2], &away).unwrap();
        copy.does(&[command, "--until=INC-1793674800"]).with(0);
        copy.does(&["list"]).with(3).says("is missing, only its manifest is there");
        fs::rename(&away, &copy.images[2]).unwrap();
        copy.does(&["list"]).with(0);
        copy.does(&["verify"]).with(0);
        copy.merged(["--format=raw", "--out=merged"]).with(0);
        sparse::assert_same(&copy.path("merged"), &expected, command);
    }
}

#[test]
fn an_inc_that_builds_on_the_full_already_is_refused() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let manifest = Manifest::read(&backup.images[2]).unwrap().unwrap();
    let (parent, parent_id) = (Some(backup.name(0).to_owned()), Manifest::read(&backup.images[0]).unwrap().unwrap().id);
    Manifest { parent, parent_id, ..manifest }.write(&backup.images[2]).unwrap();
    for command in COMMANDS {
        backup.refuses(&[command, "--until=INC-1793674800"], 1, "builds on the FULL, not on the INC before it");
    }
}

#[test]
fn a_full_of_before_that_was_put_back_is_noticed() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    for command in COMMANDS {
        let copy = backup.copied();
        let full = copy.images[0].clone();
        let files = [std::slice::from_ref(&full), &books(&full)[..]].concat();
        let away: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
        copy.does(&[command, "--until=INC-1793761200"]).with(0);
        copy.does(&["verify"]).with(0);
        // all of it, or but for the manifest
        fs::write(&files[0], &away[0]).unwrap();
        fs::write(&files[2], &away[2]).unwrap();
        copy.does(&["verify"]).fails(4).says("has the checksums of image");
        copy.merged(["--verify", "--out=no"]).fails(4).says("has the checksums of image");
        for command in COMMANDS {
            copy.refuses(&[command], 4, "has the checksums of image");
        }
        Ended::run(["check", "--repair=all", full.to_str().unwrap()]).fails(4).says("has the checksums of image");
        assert_eq!(fs::read(&full).unwrap(), away[0]);
        fs::write(&files[1], &away[1]).unwrap();
        copy.does(&["list"]).with(3).says("builds on another image of the name");
        copy.does(&["verify"]).fails(4).says("builds on another image of the name");
        copy.merged(["--out=no"]).with(4).says("builds on another image of the name");
    }
}
