//! Links in backup folders: what they lead to is read, and missed where it is not there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use qmpbackup::chain::{BOOKKEEPING, Manifest};

use crate::support::program::{Backup, Ended, TIMES, qmprestore};

/// Moves something away and leaves a link to it.
fn lies_elsewhere(path: &Path, elsewhere: &Path) {
    fs::create_dir_all(elsewhere).unwrap();
    let there = elsewhere.join(path.file_name().unwrap());
    fs::rename(path, &there).unwrap();
    symlink(there, path).unwrap();
}

#[track_caller]
fn fails(ended: Ended, about: &str) {
    assert_ne!(ended.code, Some(0), "{ended:#?}");
    ended.says(about);
}

#[test]
fn an_image_that_a_link_leads_to_is_missed_where_it_cannot_be_reached() {
    for with_manifests in [false, true] {
        for number in [0, 1, 2, 3] {
            let backup = Backup::new();
            if with_manifests {
                backup.does(&["manifest"]).with(0);
            }
            backup.merged(["--out=right"]).with(0);
            lies_elsewhere(&backup.images[number], &backup.path("elsewhere"));
            backup.merged(["--out=out"]).with(0);
            assert_eq!(fs::read(backup.path("right")).unwrap(), fs::read(backup.path("out")).unwrap());
            fs::rename(backup.path("elsewhere"), backup.path("away")).unwrap();
            let name = backup.images[number].file_name().unwrap().to_str().unwrap();
            for words in [&["list"][..], &["verify"], &["check"], &["commit"], &["snapshotrebase"], &["rebase"]] {
                backup.does(words).with(if words[0] == "list" { 3 } else { 4 }).says(name);
            }
            backup.merged(["--out=out", "--force"]).with(4).says(name);
            let salvaged = backup.merged(["--salvage", "--out=out", "--force"]).says(name);
            salvaged.with(if number == 0 && !with_manifests { 4 } else { 3 }).says_not("wrong anywhere");
            if number > 1 {
                backup.merged([&format!("--until={}", TIMES[1]), "--out=out", "--force"]).with(0);
            }
            // it comes back, and nothing has changed
            fs::rename(backup.path("away"), backup.path("elsewhere")).unwrap();
            backup.merged(["--out=out", "--force"]).with(0);
            assert_eq!(fs::read(backup.path("right")).unwrap(), fs::read(backup.path("out")).unwrap());
        }
    }
}

#[test]
fn a_full_that_cannot_be_reached_is_not_replaced_by_an_older_one() {
    let backup = Backup::new();
    let newer = backup.dir.join(format!("FULL-{}-disk.qcow2", TIMES[1] + 5));
    symlink(backup.path("nowhere"), newer).unwrap();
    backup.merged(["--out=out"]).with(4).says("FULL-1793674805");
    backup.merged([&format!("--until={}", TIMES[1]), "--out=out"]).with(0);
}

#[test]
fn manifests_that_cannot_be_reached_are_not_taken_for_none() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    fs::remove_file(&backup.images[2]).unwrap();
    lies_elsewhere(&backup.dir.join(BOOKKEEPING), &backup.path("elsewhere"));
    assert!(Manifest::path(&backup.images[1]).is_file());
    fs::rename(backup.path("elsewhere"), backup.path("away")).unwrap();
    fails(backup.merged(["--out=out"]), BOOKKEEPING);
    assert!(!backup.path("out").exists());
}

#[test]
fn a_folder_that_cannot_be_reached_is_told() {
    let backup = Backup::new();
    symlink(backup.path("nowhere"), backup.dir.with_file_name("disk1")).unwrap();
    backup.does(&["list"]).with(0).says_not("leads nowhere");
    let above = backup.dir.parent().unwrap();
    Ended::of(qmprestore(["list", "--dir"]).arg(above)).with(3).says("leads nowhere");
}
