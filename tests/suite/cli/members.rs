//! Members of a restore point that are missing, of another chain, or cannot be checked.

use std::path::Path;

use qmpbackup::chain::{Checksums, FolderLock, Manifest};

use crate::support::program::{Backup, Ended, TIMES, event};

#[test]
fn a_time_does_not_mean_an_older_restore_point_because_the_newer_one_is_missing() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let gone = &backup.images[2];
    for file in [gone.clone(), Manifest::path(gone), Checksums::path(gone)] {
        std::fs::remove_file(file).unwrap();
    }
    let says = format!("builds on {}, which is missing", gone.file_name().unwrap().to_str().unwrap());
    for time in [TIMES[2], TIMES[3] - 1] {
        let until = format!("--until={time}");
        backup.merged([until.as_str(), "--out=out"]).fails(4).says(&says);
        for command in ["commit", "snapshotrebase", "rebase"] {
            backup.does(&[command, &until]).fails(4).says(&says);
        }
        let salvaged = backup.merged(["--salvage", "--json", until.as_str(), "--out=out", "--force"]).with(3);
        assert_eq!(event(&salvaged.events(), "loss")["kind"], "stale");
    }
    // nor does it mean a COPY of before
    let copy = backup.dir.join(format!("COPY-{}-disk.qcow2", TIMES[2] - 5));
    std::fs::copy(&backup.images[0], &copy).unwrap();
    backup.merged([&format!("--until={}", TIMES[2]), "--out=out", "--force"]).fails(4).says(&says);
    std::fs::remove_file(copy).unwrap();
    // those before it are nobody's loss
    for until in [format!("--until={}", TIMES[2] - 1), "--until=INC-1793674800".to_owned()] {
        backup.merged([until.as_str(), "--out=out", "--force"]).with(0);
    }
}

#[test]
fn an_inc_of_another_chain_is_known_from_its_checksums_where_its_manifest_is_gone() {
    let [backup, other] = [Backup::new(), Backup::new()];
    for backup in [&backup, &other] {
        backup.does(&["manifest"]).with(0);
    }
    std::fs::copy(&other.images[2], &backup.images[2]).unwrap();
    std::fs::copy(Checksums::path(&other.images[2]), Checksums::path(&backup.images[2])).unwrap();
    std::fs::remove_file(Manifest::path(&backup.images[2])).unwrap();
    backup.merged(["--out=out"]).fails(4).says("one of the two was exchanged");
    backup.does(&["verify"]).fails(4).says("one of the two was exchanged");
}

#[test]
fn a_full_that_was_exchanged_is_told_where_it_is_restored_alone() {
    let [backup, other] = [Backup::new(), Backup::new()];
    for backup in [&backup, &other] {
        backup.does(&["manifest"]).with(0);
    }
    for file in [Path::to_owned, Manifest::path, Checksums::path] {
        std::fs::copy(file(&other.images[0]), file(&backup.images[0])).unwrap();
    }
    for options in [&[][..], &["--verify"], &["--salvage"]] {
        let words = ["--until=FULL-1793588400", "--out=out", "--force"];
        let merged = backup.merged(words.iter().chain(options));
        merged.with(3).says("builds on another image of the name FULL-1793588400-disk.qcow2");
    }
    other.merged(["--until=FULL-1793588400", "--out=out"]).with(0);
}

#[test]
fn an_image_that_has_lost_manifest_and_checksums_is_told_and_gets_those_that_its_inc_knows() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    for image in &backup.images[..3] {
        for file in [Manifest::path(image), Checksums::path(image)] {
            std::fs::remove_file(file).unwrap();
        }
        let name = image.file_name().unwrap().to_str().unwrap();
        for ended in [backup.does(&["list"]), backup.merged(["--out=out", "--force"])] {
            ended.with(3).says(name).says("has neither manifest nor checksums any more");
        }
        backup.does(&["manifest"]).with(3);
        backup.does(&["list"]).with(0);
        backup.does(&["verify"]).with(0);
    }
    backup.merged(["--out=out", "--force"]).with(0);
    // nothing follows the newest, which could know it
    for file in [Manifest::path(&backup.images[3]), Checksums::path(&backup.images[3])] {
        std::fs::remove_file(file).unwrap();
    }
    backup.does(&["list"]).with(0);
}

fn says_anywhere(ended: &Ended, what: &str) -> bool {
    ended.events().iter().any(|event| event["event"] == "anywhere" && event["message"].as_str().unwrap().contains(what))
}

#[test]
fn a_salvage_tells_all_that_speaks_against_its_images() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let from = &backup.images[2];
    let to = &from.with_file_name(format!("INC-{}-disk.qcow2", TIMES[3] + 500));
    for file in [Path::to_owned, Manifest::path, Checksums::path] {
        std::fs::rename(file(from), file(to)).unwrap();
    }
    backup.merged(["--out=out"]).fails(4);
    let salvaged = backup.merged(["--salvage", "--json", "--out=out"]).with(3);
    assert!(says_anywhere(&salvaged, "was made as"), "{salvaged:?}");
    // the second of two things that are wrong
    let backup = Backup::new();
    let other = Backup::new();
    for backup in [&backup, &other] {
        backup.does(&["manifest"]).with(0);
    }
    std::fs::remove_file(&backup.images[1]).unwrap();
    for file in [Path::to_owned, Manifest::path, Checksums::path] {
        std::fs::copy(file(&other.images[2]), file(&backup.images[2])).unwrap();
    }
    let salvaged = backup.merged(["--salvage", "--json", "--out=out"]).with(3);
    assert!(says_anywhere(&salvaged, "was exchanged"), "{salvaged:?}");
}

#[test]
fn what_looks_broken_while_somebody_works_on_it_is_in_use() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    std::fs::remove_file(&backup.images[2]).unwrap();
    let held = FolderLock::take(&backup.dir).unwrap();
    for more in [&["--out=out"][..], &["--verify", "--out=out"]] {
        backup.merged(more).fails(6).says("is locked");
    }
    // what is damaged is that all the same
    let whole = std::fs::read(&backup.images[0]).unwrap();
    std::fs::write(&backup.images[0], &whole[..whole.len() / 2]).unwrap();
    backup.merged(["--until=FULL", "--out=out"]).fails(4).says("bytes, but");
    std::fs::write(&backup.images[0], whole).unwrap();
    drop(held);
    backup.merged(["--out=out"]).fails(4).says("is missing, only its manifest is there");
}
