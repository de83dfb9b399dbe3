//! `merge --verify` and `merge --salvage` from outside.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use qmpbackup::chain::{BLOCK, Checksums, create_checksums};
use qmpbackup::qcow2::{Image, locate};
use qmpbackup::storage::FileStorage;

use crate::support::oracle::convert;
use crate::support::program::{Backup, Ended, SIZE, event, qmprestore};
use crate::support::{sparse, tools};

fn with_checksums() -> Backup {
    let backup = Backup::new();
    backup.images.iter().for_each(|path| create_checksums(path, &FileStorage::open(path).unwrap()).unwrap());
    backup
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn a_flipped_bit_in_any_block_that_is_read_is_found_and_leaves_no_output() {
    let backup = with_checksums();
    let right = backup.path("right");
    backup.merged(["--verify", "--format=raw", "--out=right"]).with(0);
    sparse::assert_same(&right, &backup.expected(3), "a verified merge");
    let (mut found, mut blocks) = (0, 0);
    for image in &backup.images {
        let length = image.metadata().unwrap().len();
        for block in 0..length.div_ceil(BLOCK) {
            let start = block * BLOCK;
            let at = start + (length - start).min(BLOCK) * 2 / 3;
            flip(image, at);
            blocks += 1;
            let out = backup.path("out");
            let arguments = ["--verify", "--skip-check", "--out", "out", "--format", "raw", "--json"];
            let ended = backup.merged(arguments);
            if ended.code == Some(0) {
                sparse::assert_same(&out, &right, "a damaged block that is not read");
                std::fs::remove_file(&out).unwrap();
            } else {
                let ended = ended.with(4).says(&format!("the block at offset {start:#x} does not fit its checksum"));
                assert!(ended.stdout.contains(image.file_name().unwrap().to_str().unwrap()), "{ended:#?}");
                assert!(!out.exists());
                found += 1;
            }
            flip(image, at);
        }
    }
    // what newer images hide is not read, nor are refcounts
    assert!(found > 10 && found < blocks, "{found} of {blocks}");
    backup.merged(["--verify", "--out=again"]).with(0);
}

#[test]
fn a_damaged_block_is_listed_with_what_it_holds_and_no_more() {
    let backup = with_checksums();
    backup.merged(["--format=raw", "--out=right"]).with(0);
    let right = std::fs::read(backup.path("right")).unwrap();
    let mut found = 0;
    for image in &backup.images {
        let length = image.metadata().unwrap().len();
        for block in 0..length.div_ceil(BLOCK) {
            let range = block * BLOCK..((block + 1) * BLOCK).min(length);
            let held = |image: &Path| {
                let image = Image::open_damaged(Arc::new(FileStorage::open(image).unwrap()), None).ok()?;
                Some(locate(&image, std::slice::from_ref(&range)).unwrap().remove(0).guest)
            };
            let mut may_change = held(image).unwrap();
            let at = range.start + (range.end - range.start) / 3;
            flip(image, at);
            may_change.extend(held(image).unwrap_or_default());
            let verified = backup.merged(["--verify", "--skip-check", "--format=raw", "--out=verified", "--force"]);
            let ended = backup.merged(["--salvage", "--format=raw", "--out=out", "--force", "--json"]);
            let what = format!("{block} of {}: {ended:#?}", image.display());
            assert_eq!(ended.code, Some(if verified.code == Some(0) { 0 } else { 3 }), "{what}");
            found += u64::from(verified.code == Some(4));
            let mut out = std::fs::read(backup.path("out")).unwrap();
            for loss in ended.events().iter().filter(|event| event["event"] == "loss") {
                let number = |key: &str| loss[key].as_u64().unwrap();
                let (start, end) = (number("start"), number("start") + number("bytes"));
                let touches = |range: &Range<u64>| range.start < end && start < range.end;
                assert!(may_change.iter().any(touches), "{what}");
                let bytes = start as usize..end as usize;
                out[bytes.clone()].copy_from_slice(&right[bytes]);
            }
            assert!(out == right, "{what}");
            let compressed = ["--salvage", "--compress", "--out=compressed", "--force"];
            assert_eq!(backup.merged(compressed).code, ended.code, "{what}");
            convert(&backup.path("compressed"), &backup.path("of compressed"));
            sparse::assert_same(&backup.path("of compressed"), &backup.path("out"), &what);
            flip(image, at);
        }
    }
    assert!(found > 10, "{found}");
}

#[test]
fn what_cannot_be_checked_is_a_warning() {
    let backup = with_checksums();
    std::fs::remove_file(Checksums::path(&backup.images[1])).unwrap();
    let ended = backup.merged(["--verify", "--out=out"]).with(3);
    let name = |number: usize| backup.images[number].file_name().unwrap().to_str().unwrap().to_owned();
    let ended = ended.says(&format!("{}: is read without checksums: it has no checksums", name(1)));
    ended.says_not(&name(0)).says_not(&name(2));
    assert!(backup.path("out").exists());
    // but what is damaged is damaged
    flip(&Checksums::path(&backup.images[2]), 60);
    let ended = backup.merged(["--verify", "--out=other"]).with(4);
    ended.says(&format!("{}.crc32 is damaged", name(2))).says("without --verify it is merged as it is");
    assert!(!backup.path("other").exists());
    let ended = backup.merged(["--salvage", "--out=salvaged"]).with(3);
    let ended = ended.says(&format!("{}: is read without checksums: it has no checksums", name(1)));
    ended.says(&format!("{}.crc32 is damaged", name(2))).says_not(&name(0));

    let output = tools::output(&mut with_checksums().merge(["--verify", "--out=-"]));
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout.len() as u64, SIZE);
    assert!(String::from_utf8(output.stderr).unwrap().contains("a pipe cannot be read again"));
}

#[test]
fn a_file_of_another_length_is_found() {
    for change in [-1_i64, 1] {
        let backup = with_checksums();
        let file = File::options().write(true).open(&backup.images[1]).unwrap();
        file.set_len(file.metadata().unwrap().len().checked_add_signed(change).unwrap()).unwrap();
        backup.merged(["--verify", "--out=out"]).with(4).says("when its checksums were made");
        assert!(!backup.path("out").exists());
    }
}

#[test]
fn what_was_lost_is_listed() {
    let backup = with_checksums();
    backup.merged(["--salvage", "--format=raw", "--out=whole"]).with(0).says_not("lost");
    sparse::assert_same(&backup.path("whole"), &backup.expected(3), "nothing is damaged");

    std::fs::write(&backup.images[0], "no image").unwrap();
    let ended = backup.merged(["--salvage", "--out=out"]).with(3);
    let header = ended.stdout.lines().next().unwrap();
    assert_eq!(header.split_whitespace().collect::<Vec<_>>(), ["KIND", "START", "BYTES", "IMAGE", "CAUSE"]);
    let ended = ended.says("lost").says("FULL-1793588400-disk.qcow2").says(&format!(" of {SIZE} bytes are lost"));
    assert!(!ended.stdout.contains("stale"), "{ended:#?}");
    tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(backup.path("out")));

    let ended = backup.merged(["--salvage", "--out=other", "--json", "--dry-run"]).with(3);
    let events = ended.events();
    assert_eq!(event(&events, "done")["stale"], 0);
    assert!(events.iter().any(|event| event["event"] == "loss" && event["cause"] == "image"), "{events:#?}");
}

#[test]
fn what_cannot_be_salvaged_is_refused() {
    let backup = Backup::new();
    backup.merged(["--salvage", "--out=out", "--until=FULL-9"]).with(2);
    for image in &backup.images {
        std::fs::write(image, "no image").unwrap();
    }
    backup.merged(["--salvage", "--out=out"]).with(4);
    backup.merged(["--salvage", "--out=out", "--until=yesterday noon"]).with(2);

    let backup = Backup::new();
    backup.patch(0, 32, |bytes| bytes[3] = 1);
    backup.merged(["--salvage", "--out=out"]).with(4).says("the image is encrypted");
    assert!(!backup.path("out").exists());
}

/// Takes what is listed as lost from what is right; all else must be right already.
fn assert_all_is_listed(ended: &Ended, out: &Path, right: &[u8]) {
    let mut out = std::fs::read(out).unwrap();
    assert_eq!(out.len(), right.len());
    let events = ended.events();
    let losses: Vec<_> = events.iter().filter(|event| event["event"] == "loss").collect();
    assert!(!losses.is_empty(), "{ended:#?}");
    for loss in losses {
        let number = |key: &str| usize::try_from(loss[key].as_u64().unwrap()).unwrap();
        let bytes = number("start")..number("start") + number("bytes");
        out[bytes.clone()].copy_from_slice(&right[bytes]);
    }
    assert!(out == right, "{ended:#?}");
}

#[test]
fn a_header_that_says_that_the_disk_is_smaller_costs_nothing() {
    let backup = Backup::new();
    Ended::of(qmprestore(["manifest", "--dir"]).arg(&backup.dir)).with(0);
    backup.merged(["--format=raw", "--out=right"]).with(0);
    let right = std::fs::read(backup.path("right")).unwrap();
    for image in &backup.images {
        let file = File::options().write(true).open(image).unwrap();
        file.write_all_at(&(SIZE / 4).to_be_bytes(), 24).unwrap();
        let ended = backup.merged(["--salvage", "--format=raw", "--out=out", "--force", "--json"]).with(3);
        assert!(std::fs::read(backup.path("out")).unwrap() == right, "{ended:#?}");
        file.write_all_at(&SIZE.to_be_bytes(), 24).unwrap();
    }
}

#[test]
fn what_of_a_raw_image_became_a_hole_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["FULL-1600000000-disk.raw", "INC-1600000001-disk.raw"];
    for (name, byte) in names.into_iter().zip([1, 2]) {
        let image = folder.path().join(name);
        std::fs::write(&image, vec![byte; 4 * BLOCK as usize]).unwrap();
        create_checksums(&image, &FileStorage::open(&image).unwrap()).unwrap();
    }
    let out = folder.path().join("out");
    let merge = || {
        let mut command =
            qmprestore(["merge", "--salvage", "--format=raw", "--source-format=raw", "--json", "--force"]);
        Ended::of(command.arg("--dir").arg(folder.path()).arg("--out").arg(&out))
    };
    merge().with(0);
    let right = std::fs::read(&out).unwrap();
    let inc = File::options().write(true).open(folder.path().join(names[1])).unwrap();
    inc.set_len(BLOCK).unwrap();
    inc.set_len(2 * BLOCK).unwrap();
    inc.write_all_at(&vec![2; 2 * BLOCK as usize], 2 * BLOCK).unwrap();
    let ended = merge().with(3);
    assert!(std::fs::read(&out).unwrap() != right, "the test itself punched no hole");
    assert_all_is_listed(&ended, &out, &right);
}

#[test]
fn what_lies_behind_a_size_that_may_be_damaged_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (name, write) in
        [("FULL-1-x", "write -P 1 0 2M"), ("INC-2-x", "write -P 2 1M 64K"), ("INC-3-x", "write -P 3 0 64K")]
    {
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(path(name)).arg("2M"));
        tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", write]).arg(path(name)));
        create_checksums(&path(name), &FileStorage::open(&path(name)).unwrap()).unwrap();
    }
    // 2 MiB become 64 KiB
    let file = File::options().write(true).open(path("INC-2-x")).unwrap();
    file.write_all_at(&(64_u64 << 10).to_be_bytes(), 24).unwrap();
    let arguments = ["merge", "--salvage", "--format=raw", "--json", "--out", "out", "--dir", "."];
    let ended = Ended::of(qmprestore(arguments).current_dir(folder.path())).with(3);
    let events = ended.events();
    let loss = event(&events, "loss");
    assert_eq!((&loss["start"], &loss["bytes"]), (&65_536.into(), &((2 << 20) - 65_536).into()), "{events:?}");
}
