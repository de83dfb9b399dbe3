//! Checksums of images that are changed in place.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use qmpbackup::chain::{BLOCK, Checksums, Manifest, Stage, Unfinished, Work, create_checksums};
use qmpbackup::storage::FileStorage;

use crate::support::program::{Backup, Ended};
use crate::support::sums::{assert_fit, unsettle, wrong};

/// The recorded chain with manifests and checksums.
fn known() -> Backup {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    backup
}

fn flip(image: &Path, offset: u64) {
    let file = fs::File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[test]
fn a_damaged_inc_is_refused_by_name_and_place_and_nothing_is_changed() {
    for command in ["commit", "snapshotrebase"] {
        let backup = known();
        flip(&backup.images[2], 12_000);
        let says = format!("{}: the block at offset 0x0 does not fit its checksum", backup.name(2));
        backup.refuses(&[command], 4, &says);
        backup.refuses(&[command, "--until=INC-1793761200"], 4, "nothing was changed");
        // one before it is none of its business
        backup.does(&[command, "--until=INC-1793674800"]).with(0);
        backup.does(&[command, "--skip-check"]).with(0);
        assert_eq!(assert_fit(&backup.dir), [backup.images[0].clone()]);
    }
    let backup = known();
    let inc = fs::File::options().write(true).open(&backup.images[3]).unwrap();
    inc.set_len(inc.metadata().unwrap().len() + 1).unwrap();
    backup.refuses(&["commit"], 4, "bytes, but ");
    fs::write(Checksums::path(&backup.images[3]), "QMPBSUMS").unwrap();
    backup.refuses(&["commit"], 4, "nothing was changed");
}

#[test]
fn damage_that_was_there_before_is_still_seen_after_a_commit() {
    for command in ["commit", "snapshotrebase"] {
        let backup = Backup::new();
        let full = fs::File::options().write(true).open(&backup.images[0]).unwrap();
        full.set_len(8 << 20).unwrap();
        backup.does(&["manifest"]).with(0);
        let before = fs::read(&backup.images[0]).unwrap();
        // a block that no INC writes to
        let other = backup.copied();
        other.does(&[command]).with(0);
        let after = fs::read(&other.images[0]).unwrap();
        let same = before.chunks(BLOCK as usize).zip(after.chunks(BLOCK as usize)).rposition(|(old, new)| old == new);
        let Some(block) = same.filter(|block| *block > 0) else { panic!("all blocks are written to") };
        flip(&backup.images[0], block as u64 * BLOCK + 99);
        backup.does(&[command, "--skip-check"]).with(0);
        assert_eq!(wrong(&backup.images[0]), [block as u64], "{command}");
    }
}

#[test]
fn an_inc_that_follows_the_full_now_has_right_checksums() {
    for command in ["commit", "snapshotrebase"] {
        for rebased in [false, true] {
            let backup = known();
            if rebased {
                backup.does(&["rebase"]).with(0);
            }
            backup.does(&[command, "--until=INC-1793674800"]).with(0);
            assert_eq!(assert_fit(&backup.dir).len(), 3);
        }
    }
}

#[test]
fn what_was_left_unsettled_is_settled_by_a_rebase_that_was_done_already() {
    let backup = known();
    backup.does(&["rebase"]).with(0);
    unsettle(&backup.images[2], 0..1);
    let before = backup.files();
    backup.does(&["rebase"]).with(0).says_not("is based on");
    assert_eq!(backup.files(), before);
    assert_eq!(assert_fit(&backup.dir).len(), 4);
    backup.does(&["rebase"]).with(0).says("done already");
}

#[test]
fn a_rebase_renews_only_what_the_header_is_in() {
    let backup = known();
    let at = backup.images[1].metadata().unwrap().len() - 1;
    flip(&backup.images[1], at);
    backup.does(&["rebase"]).with(0);
    assert_eq!(wrong(&backup.images[1]), [at / BLOCK]);
}

#[test]
fn a_repair_renews_checksums_and_settles_what_one_that_was_killed_left() {
    let backup = known();
    backup.set_header_refcount(1, 0);
    let image = backup.images[1].to_str().unwrap();
    let repair = || Ended::run(["check", "--repair=all", image]);
    fs::remove_file(Checksums::path(&backup.images[1])).unwrap();
    backup.does(&["manifest"]).with(4);
    // as they were before the damage
    let file = FileStorage::open(&backup.images[1]).unwrap();
    create_checksums(&backup.images[1], &file).unwrap();
    repair().with(0);
    assert_eq!(assert_fit(&backup.dir).len(), 4);
    unsettle(&backup.images[1], 0..1);
    repair().with(0);
    assert_eq!(assert_fit(&backup.dir).len(), 4);
    // an image that nothing is known of gets nothing
    let alone = backup.path("alone.qcow2");
    backup.set_header_refcount(2, 0);
    fs::copy(&backup.images[2], &alone).unwrap();
    Ended::run(["check".as_ref(), "--repair=all".as_ref(), alone.as_os_str()]).with(0);
    assert!(!backup.path(".qmpbackup").exists());
}

#[test]
fn damage_beside_what_is_written_is_found_as_before() {
    // the last byte of the block that the header is in, which no table needs
    let flip = |image: &Path| flip(image, BLOCK - 1);
    let says = "1 of the blocks that were changed in part had been damaged before";
    for command in ["commit", "snapshotrebase"] {
        let backup = known();
        flip(&backup.images[0]);
        // of the FULL nothing tells what is lost in its tables
        backup.refuses(&[command], 4, "the block at offset 0x0 does not fit its checksum");
    }
    let backup = known();
    flip(&backup.images[2]);
    backup.does(&["rebase"]).with(3).says(says);
    assert_eq!(wrong(&backup.images[2]), [0]);
    assert_eq!((wrong(&backup.images[1]), wrong(&backup.images[3])), (Vec::new(), Vec::new()));
    let backup = known();
    backup.set_header_refcount(1, 0);
    flip(&backup.images[1]);
    let damaged = fs::read(&backup.images[1]).unwrap();
    let says = "the block at offset 0x0 does not fit its checksum";
    Ended::run(["check", "--repair=all", backup.images[1].to_str().unwrap()]).with(4).says(says);
    assert!(fs::read(&backup.images[1]).unwrap() == damaged);
}

#[test]
fn damage_of_guest_data_beside_what_is_written_is_found_as_before() {
    let mut told = 0;
    for block in 1.. {
        let backup = known();
        let end = (block + 1) * BLOCK;
        if end > backup.images[0].metadata().unwrap().len() {
            break;
        }
        flip(&backup.images[0], end - 1);
        let expected = backup.expected(3);
        let ended = backup.does(&["commit"]);
        if ended.code == Some(3) {
            ended.says("1 of the blocks that were changed in part had been damaged before");
            assert_eq!(wrong(&backup.images[0]), [block]);
            backup.assert_holds(3, &expected);
            told += 1;
        }
    }
    assert!(told > 0);
}

#[test]
fn checksums_that_are_links_or_have_other_names_are_not_written_to() {
    for (number, command) in [(0, "commit"), (0, "snapshotrebase"), (2, "rebase")] {
        for (link, says) in [(true, "is a link, and may lead anywhere"), (false, "has other names (hard links)")] {
            let backup = known();
            let (sums, elsewhere) = (Checksums::path(&backup.images[number]), backup.path("elsewhere"));
            fs::rename(&sums, &elsewhere).unwrap();
            if link {
                symlink(&elsewhere, &sums).unwrap();
            } else {
                fs::hard_link(&elsewhere, &sums).unwrap();
            }
            let before = fs::read(&elsewhere).unwrap();
            backup.refuses(&[command], 1, says);
            assert!(fs::read(&elsewhere).unwrap() == before, "{command}");
        }
    }
    let backup = known();
    let before = fs::read(&backup.images[1]).unwrap();
    fs::hard_link(&backup.images[1], backup.path("kept")).unwrap();
    backup.refuses(&["rebase"], 1, "has other names (hard links), where it would change, too");
    assert!(fs::read(backup.path("kept")).unwrap() == before);
}

#[test]
fn checksums_of_an_image_that_is_claimed_to_be_huge_are_not_read() {
    let backup = known();
    let path = Checksums::path(&backup.images[1]);
    // a list of 200 GiB, of which the sums of the header are right
    let mut header = fs::read(&path).unwrap();
    header.truncate(64);
    header[16..24].copy_from_slice(&((50_u64 << 30) * BLOCK).to_be_bytes());
    let sum = crc32fast::hash(&header[..60]);
    header[60..].copy_from_slice(&sum.to_be_bytes());
    fs::write(&path, header).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(64 + (200 << 30)).unwrap();
    let start = std::time::Instant::now();
    backup.does(&["verify"]).with(4).says("the length of the image at offset 16");
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

/// The number of a later version, in a header that is whole.
fn make_later(image: &Path) {
    let path = Checksums::path(image);
    let mut bytes = fs::read(&path).unwrap();
    bytes[11] = 3;
    let sum = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&sum.to_be_bytes());
    fs::write(&path, bytes).unwrap();
}

#[test]
fn what_a_later_version_has_written_down_is_not_outdated() {
    let says = "is of version 3: this program knows 1 and 2";
    for number in [0, 2] {
        let backup = known();
        make_later(&backup.images[number]);
        for command in ["commit", "snapshotrebase"] {
            backup.refuses(&[command], 1, says);
        }
        if number > 0 {
            backup.refuses(&["rebase"], 1, says);
        }
    }
    let backup = known();
    backup.set_header_refcount(1, 0);
    make_later(&backup.images[1]);
    let before = fs::read(&backup.images[1]).unwrap();
    Ended::run(["check", "--repair=all", backup.images[1].to_str().unwrap()]).with(1).says(says);
    assert!(fs::read(&backup.images[1]).unwrap() == before);

    let backup = known();
    // without a sum that would have to fit
    let path = Manifest::path(&backup.images[3]);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    value["version"] = 3.into();
    value.as_object_mut().unwrap().remove("crc32");
    fs::write(&path, value.to_string()).unwrap();
    for command in ["commit", "snapshotrebase", "rebase"] {
        backup.refuses(&[command], 1, "is of version 3: this program knows 1 to 2");
    }
}

#[test]
fn a_full_that_was_not_closed_is_repaired_before_and_its_checksums_follow() {
    let backup = Backup::new();
    let expected = backup.expected(3);
    // dirty, with a refcount that is too high
    backup.patch(0, 72, |bytes| bytes[7] |= 1);
    backup.set_header_refcount(0, 7);
    let file = FileStorage::open(&backup.images[0]).unwrap();
    create_checksums(&backup.images[0], &file).unwrap();
    drop(file);
    backup.does(&["commit", "--skip-check"]).with(0);
    assert_eq!(assert_fit(&backup.dir), [backup.images[0].clone()]);
    backup.assert_holds(3, &expected);
}

#[test]
fn a_snapshotrebase_whose_last_inc_was_gone_when_it_was_killed_settles_the_full() {
    let backup = known();
    let unfinished = Unfinished {
        work: Work::SnapshotRebase,
        stage: Stage::Writing,
        full: backup.name(0).to_owned(),
        incs: vec![backup.name(1).to_owned()],
        full_id: None,
    };
    backup.does(&["snapshotrebase", "--until=INC-1793674800"]).with(0);
    unfinished.write(&backup.images[0]).unwrap();
    unsettle(&backup.images[0], 0..1);
    backup.does(&["snapshotrebase", "--until=INC-1793674800"]).with(0);
    assert_eq!(assert_fit(&backup.dir).len(), 3);
}

/// What is left of them says nothing of the image, and does not end the work halfway either.
#[test]
fn checksums_that_were_cut_off_keep_nobody_from_a_commit() {
    for (command, length) in [
        ("commit", 0),
        ("commit", 30),
        ("commit", 47),
        ("commit", 64),
        ("commit", 70),
        ("snapshotrebase", 5),
        ("snapshotrebase", 68),
        ("rebase", 5),
    ] {
        let backup = known();
        let image = if command == "rebase" { &backup.images[3] } else { &backup.images[0] };
        let sums = fs::File::options().write(true).open(Checksums::path(image)).unwrap();
        sums.set_len(length).unwrap();
        // which is told
        backup.does(&[command]).with(3).says("is damaged");
        assert!(!Unfinished::path(&backup.images[0]).exists());
        backup.merged(["--out=out"]).with(0);
        backup.does(&["list"]).with(0);
    }
}

#[test]
fn what_cannot_be_read_beside_an_image_is_found_before_it_is_changed() {
    for command in ["commit", "snapshotrebase", "rebase"] {
        for path in [Checksums::path, Manifest::path] {
            for at in [0, 3] {
                let backup = known();
                let path = path(&backup.images[at]);
                fs::remove_file(&path).unwrap();
                fs::create_dir(&path).unwrap();
                let ended = backup.does(&[command]);
                assert!(ended.code == Some(0) || ended.stderr.contains("nothing was changed"), "{ended:?}");
                assert!(!Unfinished::path(&backup.images[0]).exists());
            }
        }
    }
}

/// New checksums would say that it is right: so nothing is changed, also without a check.
#[test]
fn an_image_of_another_length_stays_as_it_is() {
    for (number, by) in [(0, -100), (0, 100), (0, 1 << 16), (2, -100), (2, 1 << 16)] {
        let backup = known();
        let image = &backup.images[number];
        let length = fs::metadata(image).unwrap().len();
        let wrong = length.checked_add_signed(by).unwrap();
        fs::File::options().write(true).open(image).unwrap().set_len(wrong).unwrap();
        let says = format!("{}: has {wrong} bytes, but {length} when", backup.name(number));
        for words in [&["commit"][..], &["commit", "--skip-check"], &["snapshotrebase", "--skip-check"], &["rebase"]] {
            backup.refuses(words, 4, &says);
        }
        backup.does(&["list"]).with(3).says("bytes, but");
        backup.merged(["--out=no"]).with(4).says(&says);
        Ended::run(["check", "--repair=all", image.to_str().unwrap()]).with(4).says("when its checksums were made");
        backup.does(&["verify"]).fails(4).says(backup.name(number));
    }
}

#[test]
fn an_image_with_the_content_of_another_is_noticed_by_its_length() {
    let backup = known();
    let away = backup.path("away");
    fs::rename(&backup.images[1], &away).unwrap();
    fs::rename(&backup.images[2], &backup.images[1]).unwrap();
    fs::rename(&away, &backup.images[2]).unwrap();
    backup.does(&["list"]).with(3).says("when its checksums were made");
    backup.merged(["--out=no"]).with(4).says("when its checksums were made");
    backup.refuses(&["snapshotrebase", "--skip-check"], 4, "when its checksums were made");
}
