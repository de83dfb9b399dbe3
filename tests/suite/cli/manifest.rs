//! `qmprestore manifest`: what images of other tools get, and what is left as it is.

use std::fs;

use qmpbackup::chain::{Checksums, FolderLock, FormatHint, Level, Manifest};
use qmpbackup::storage::{Access, FileStorage};

use crate::support::program::{Backup, Ended, SIZE, TIMES, event, rude_name};
use crate::support::sparse;
use crate::support::sums::{assert_fit, wrong};

/// The names in the folder of bookkeeping, but for the lock.
fn books(backup: &Backup) -> Vec<String> {
    backup.bookkeeping().into_iter().filter(|name| name != "lock").collect()
}

fn made(ended: &Ended) -> Vec<usize> {
    let events = ended.events();
    let images = events.iter().filter(|event| event["event"] == "manifest");
    images.map(|image| image["made"].as_array().unwrap().len()).collect()
}

#[test]
fn images_of_another_tool_get_manifests_and_checksums_and_the_chain_goes_on() {
    let backup = Backup::new();
    fs::write(backup.path("backup/uuid"), "an-id\n").unwrap();
    let before = backup.files();
    let ended = backup.does(&["manifest", "--json"]).with(0);
    assert_eq!(made(&ended), [2; 4]);
    assert_eq!(backup.files(), before, "the images are not changed");
    assert_eq!(assert_fit(&backup.dir), backup.images);
    let id = |number: usize| Manifest::read(&backup.images[number]).unwrap().unwrap().id;
    for (number, image) in backup.images.iter().enumerate() {
        assert!(id(number).is_some() && Checksums::open(image).unwrap().unwrap().id() == id(number));
        let manifest = Manifest {
            image: backup.name(number).to_owned(),
            level: if number == 0 { Level::Full } else { Level::Inc },
            time: Some(TIMES[number]),
            chain: Some("an-id".to_owned()),
            parent: number.checked_sub(1).map(|before| backup.name(before).to_owned()),
            id: id(number),
            parent_id: number.checked_sub(1).and_then(id),
            bitmap: None,
            format: FormatHint::Qcow2,
            virtual_size: SIZE,
            qemu: String::new(),
        };
        assert_eq!(Manifest::read(image).unwrap(), Some(manifest));
    }
    backup.does(&["list"]).with(0);
    let all = sparse::fingerprints(&backup.dir);
    assert_eq!(made(&backup.does(&["manifest", "--json"]).with(0)), [0; 4]);
    backup.does(&["manifest"]).with(0).says("INC-1793674800-disk.qcow2: has both already");
    assert_eq!(sparse::fingerprints(&backup.dir), all);

    let expected = backup.expected(2);
    let last = backup.expected(3);
    backup.does(&["rebase"]).with(0);
    assert_eq!(assert_fit(&backup.dir).len(), 4);
    backup.does(&["commit", "--until", "INC-1793761200"]).with(0);
    assert_eq!(assert_fit(&backup.dir), [backup.images[0].clone(), backup.images[3].clone()]);
    backup.assert_holds(2, &expected);
    backup.merged(["--format", "raw", "--out", "merged"]).with(0);
    sparse::assert_same(&backup.path("merged"), &last, "merged");
}

#[test]
fn only_what_is_lacking_is_made_and_what_is_there_is_not_looked_at() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    fs::remove_file(Checksums::path(&backup.images[1])).unwrap();
    fs::remove_file(Manifest::path(&backup.images[2])).unwrap();
    // an image that has both and is damaged since
    backup.patch(3, 4096, |bytes| bytes[0] ^= 1);
    let ended = backup.does(&["manifest", "--json", "--threads=1"]).with(0);
    assert_eq!(made(&ended), [0, 0, 1, 1]);
    assert_eq!(books(&backup).len(), 8);
    assert_eq!(wrong(&backup.images[3]), [0]);
    assert_eq!((wrong(&backup.images[1]), wrong(&backup.images[2])), (vec![], vec![]));
}

#[test]
fn a_dry_run_says_what_would_be_made_and_makes_nothing() {
    let backup = Backup::new();
    let before = sparse::fingerprints(backup.root.path());
    backup.does(&["manifest", "--dry-run"]).with(0).says("would get manifest and checksums");
    assert_eq!(made(&backup.does(&["manifest", "--dry-run", "--json"])), [2; 4]);
    assert_eq!(sparse::fingerprints(backup.root.path()), before);
}

#[test]
fn nothing_is_made_for_a_chain_that_is_damaged_broken_or_doubtful_and_others_go_on() {
    let backup = Backup::new();
    backup.set_header_refcount(3, 0);
    let later: Vec<_> = (1..3).map(|number| TIMES[3] + number).collect();
    let copy = |from: usize, name: String| fs::copy(&backup.images[from], backup.dir.join(name)).unwrap();
    copy(0, format!("FULL-{}-disk.qcow2", later[0]));
    copy(1, format!("INC-{}-disk.qcow2", later[1]));
    let ended = backup.does(&["manifest"]).with(4).says("nothing is made for a chain of ");
    ended.says("INC-1793847600-disk.qcow2: its metadata is damaged");
    assert_eq!(books(&backup).len(), 4, "{:?}", books(&backup));
    assert_eq!(assert_fit(&backup.dir).len(), 2);

    let backup = Backup::new();
    fs::remove_file(&backup.images[0]).unwrap();
    backup.does(&["manifest"]).with(4).says("is broken: ");
    assert!(books(&backup).is_empty());

    let backup = Backup::new();
    fs::write(backup.dir.join(format!("INC-{}-disk.qcow2.partial", TIMES[2] + 5)), "").unwrap();
    backup.does(&["manifest"]).with(3).says("may lack changes");
    assert!(books(&backup).is_empty());

    let backup = Backup::new();
    fs::create_dir(backup.dir.join(".qmpbackup")).unwrap();
    fs::write(Manifest::path(&backup.images[1]), "{").unwrap();
    let events = backup.does(&["manifest", "--json"]).with(4).events();
    assert_eq!(event(&events, "done")["exit_code"], 4);
    assert_eq!(books(&backup).len(), 1);
}

#[test]
fn raw_images_and_names_that_are_no_text_have_manifests_too() {
    let backup = Backup::named("backup/disk0", rude_name(), TIMES);
    backup.does(&["manifest"]).with(0);
    let manifest = Manifest::read(&backup.images[1]).unwrap().unwrap();
    assert_eq!((manifest.image.as_str(), manifest.parent, manifest.chain), ("", None, None));
    backup.does(&["list"]).with(0);

    let backup = Backup::new();
    for (image, length) in backup.images.iter().zip([70_000, 70_000, 80_000, 80_001]) {
        let image = image.with_file_name(image.file_name().unwrap().to_str().unwrap().replace("qcow2", "img"));
        fs::write(image, vec![5; length]).unwrap();
    }
    backup.images.iter().for_each(|image| fs::remove_file(image).unwrap());
    backup.does(&["manifest"]).with(0);
    let last = backup.dir.join("INC-1793847600-disk.img");
    let manifest = Manifest::read(&last).unwrap().unwrap();
    assert_eq!((manifest.format, manifest.virtual_size), (FormatHint::Raw, 80_001));
    assert_eq!(assert_fit(&backup.dir).len(), 4);
}

#[test]
fn images_that_somebody_writes_to_are_left() {
    let backup = Backup::new();
    let writer = FileStorage::open_writable(&backup.images[2]).unwrap();
    writer.lock(Access::Write).unwrap();
    backup.does(&["manifest"]).with(6).says("INC-1793761200-disk.qcow2");
    assert!(books(&backup).is_empty());
    drop(writer);
    let _folder = FolderLock::take(&backup.dir).unwrap();
    backup.does(&["manifest"]).with(6).says("nothing was changed");
    backup.does(&["manifest", "--dry-run"]).with(0);
}

#[test]
fn an_image_that_was_exchanged_with_its_checksums_is_noticed() {
    let says = "has the checksums of image ";
    // the same in one folder, and one of another disk with the same names
    for of_other in [false, true] {
        let (backup, other) = (Backup::new(), Backup::new());
        for backup in [&backup, &other] {
            backup.does(&["manifest"]).with(0);
        }
        let from = if of_other { &other.images[2] } else { &backup.images[1] };
        fs::copy(from, &backup.images[2]).unwrap();
        fs::copy(Checksums::path(from), Checksums::path(&backup.images[2])).unwrap();
        backup.does(&["verify"]).with(4).says(says);
        let out = backup.path("out");
        backup.does(&["merge", "--verify", "--out", out.to_str().unwrap()]).with(4).says(says);
        assert!(!out.exists());
        backup.refuses(&["commit"], 4, says);
        backup.merged(["--out=out"]).with(4).says("and the manifest of");
        backup.does(&["list"]).with(3).says("and the manifest of");
        backup.merged(["--salvage", "--json", "--out=out"]).with(3).says("\"anywhere\"");
        fs::remove_file(&out).unwrap();
        // with its manifest, too: others build on the one that was there
        fs::copy(Manifest::path(from), Manifest::path(&backup.images[2])).unwrap();
        let says =
            if of_other { "builds on another image of the name INC-1793674800-disk.qcow2" } else { "was made as" };
        for command in ["verify", "list"] {
            let code = if command == "list" { 3 } else { 4 };
            backup.does(&[command]).with(code).says(says);
        }
        backup.does(&["merge", "--out", out.to_str().unwrap()]).with(4).says(says);
    }
}
