//! What work in place refuses, before anything is changed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qmpbackup::chain::{Checksums, Manifest};
use qmpbackup::qcow2::Image;
use qmpbackup::storage::MemoryStorage;

use crate::check::{Map, judge, number, put};
use crate::support::program::{Backup, Ended, TIMES, qmprestore, rude_name};
use crate::support::tools;

/// Both commands refuse, also to plan it.
#[track_caller]
fn assert_refused(backup: &Backup, words: &[&str], code: i32, says: &str) {
    for command in ["commit", "snapshotrebase"] {
        backup.refuses(&[&[command], words].concat(), code, says);
        backup.refuses(&[&[command, "--dry-run"], words].concat(), code, says);
    }
}

fn qemu_img(words: &[&str], image: &Path) {
    tools::run(tools::qemu_img().args(words).arg(image));
}

fn create(image: &Path, options: &str, size: &str) {
    let _ = fs::remove_file(image);
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(image).arg(size));
}

fn based_on(backing: &str, image: &Path) {
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing], image);
}

#[test]
fn raw_images_are_refused() {
    for number in [0, 1, 3] {
        let backup = Backup::new();
        fs::write(backup.dir.join("disk.qcow2.config"), r#"{"format":"raw"}"#).unwrap();
        for image in &backup.images[number..] {
            fs::write(image, vec![1; 1 << 20]).unwrap();
        }
        assert_refused(&backup, &[], 1, "is a raw image: only qcow2 images can be changed in place");
    }
}

#[test]
fn links_are_refused() {
    for number in [0, 1, 3] {
        let backup = Backup::new();
        let elsewhere = backup.path("elsewhere");
        fs::rename(&backup.images[number], &elsewhere).unwrap();
        symlink(&elsewhere, &backup.images[number]).unwrap();
        assert_refused(&backup, &[], 1, &format!("{}: is a link", backup.name(number)));
        fs::remove_file(&backup.images[number]).unwrap();
        fs::hard_link(&elsewhere, &backup.images[number]).unwrap();
        assert_refused(&backup, &[], 1, &format!("{}: has other names (hard links)", backup.name(number)));
    }
}

/// The INC after those that go has to name the FULL.
#[test]
fn an_inc_that_cannot_follow_the_full_is_found_before() {
    let until = ["--until=INC-1793761200"];
    let backup = Backup::new();
    let elsewhere = backup.path("elsewhere");
    backup.does(&["rebase"]).with(0);
    fs::rename(&backup.images[3], &elsewhere).unwrap();
    symlink(&elsewhere, &backup.images[3]).unwrap();
    assert_refused(&backup, &until, 1, &format!("{}: is a link", backup.name(3)));
}

#[test]
fn an_inc_that_needs_no_change_may_be_anything() {
    let backup = Backup::new();
    let expected = backup.expected(2);
    let elsewhere = backup.path("elsewhere");
    fs::rename(&backup.images[3], &elsewhere).unwrap();
    symlink(&elsewhere, &backup.images[3]).unwrap();
    let before = fs::read(&elsewhere).unwrap();
    backup.does(&["commit", "--until=INC-1793761200"]).with(0);
    backup.assert_holds(2, &expected);
    assert!(fs::read(&elsewhere).unwrap() == before);
}

#[test]
fn images_that_rest_on_others_are_refused() {
    let backup = Backup::new();
    based_on("foreign", &backup.images[0]);
    assert_refused(&backup, &[], 4, "it is the first of its chain: what is in that file would be lost");
    let backup = Backup::new();
    based_on("foreign", &backup.images[2]);
    assert_refused(&backup, &[], 4, "an image is missing or foreign");
    for number in [0, 2] {
        let backup = Backup::new();
        let data = backup.path("data");
        create(&backup.images[number], &format!("data_file={}", data.display()), "64M");
        assert_refused(&backup, &[], 4, "keeps its data in an external file");
    }
}

#[test]
fn a_copy_is_no_full() {
    let backup = Backup::new();
    fs::rename(&backup.images[0], backup.dir.join(format!("COPY-{}-disk.qcow2", TIMES[3] + 1))).unwrap();
    for image in &backup.images[1..] {
        fs::remove_file(image).unwrap();
    }
    assert_refused(&backup, &[], 2, "there is nothing to commit");
    assert_refused(&backup, &["--until=COPY"], 2, "there is nothing to commit");
}

#[test]
fn a_newer_copy_is_not_what_a_time_means() {
    let backup = Backup::new();
    let copy = backup.dir.join(format!("COPY-{}-disk.qcow2", TIMES[2] + 1));
    fs::copy(&backup.images[0], &copy).unwrap();
    let newest = backup.dir.join(format!("COPY-{}-disk.qcow2", TIMES[3] + 1));
    fs::copy(&backup.images[0], &newest).unwrap();
    let expected = backup.expected(3);
    backup.does(&["rebase"]).with(0).says(backup.name(3));
    backup.does(&["commit", "--until", &(TIMES[2] + 1).to_string()]).with(0);
    assert_eq!(backup.held_time(), TIMES[2]);
    backup.does(&["commit", "--until=COPY"]).with(2);
    backup.does(&["snapshotrebase"]).with(0);
    backup.assert_holds(3, &expected);
    assert!(copy.exists() && newest.exists());
}

#[test]
fn a_full_whose_journal_could_have_no_name_is_refused_and_restored() {
    let disk = format!("{}.qcow2", "d".repeat(225));
    let backup = Backup::named("backup/disk0", &disk, TIMES);
    for command in ["commit", "snapshotrebase"] {
        backup.does(&[command]).with(1).says("File name too long").says("nothing was changed");
    }
    let expected = backup.expected(3);
    backup.does(&["manifest"]).with(0);
    backup.does(&["list"]).with(0);
    backup.merged(["--format=raw", "--out=out"]).with(0);
    crate::support::sparse::assert_same(&backup.path("out"), &expected, "long");
}

#[test]
fn names_that_are_not_text_are_refused() {
    let backup = Backup::named("backup/disk0", rude_name(), TIMES);
    assert_refused(&backup, &[], 1, "its name is not UTF-8");
    // of INCs alone
    let backup = Backup::named("backup/disk0", rude_name(), TIMES);
    fs::rename(&backup.images[0], backup.dir.join("FULL-1793588400")).unwrap();
    assert_refused(&backup, &[], 1, "its name is not UTF-8");
}

#[test]
fn a_disk_whose_size_changes_is_refused_where_snapshots_cannot_say_it() {
    let backup = Backup::new();
    create(&backup.images[0], "compat=0.10", "64M");
    qemu_img(&["snapshot", "-c", "mine"], &backup.images[0]);
    create(&backup.images[1], "compat=1.1", "65M");
    create(&backup.images[2], "compat=1.1", "65M");
    create(&backup.images[3], "compat=1.1", "65M");
    assert_refused(&backup, &[], 1, "the size of the disk changes, which snapshots of a version 2 image do not hold");
}

#[test]
fn what_is_marked_as_corrupt_is_refused() {
    for number in [0, 1, 3] {
        let backup = Backup::new();
        backup.patch(number, 72, |bytes| bytes[7] |= 2);
        assert_refused(&backup, &[], 4, "some program marked it as corrupt");
        assert_refused(&backup, &["--skip-check"], 4, "some program marked it as corrupt: repair it first");
    }
}

/// What would end the work when a part of it is done, and each time that it is done again.
#[test]
fn a_full_with_damaged_tables_is_refused_whether_it_is_to_be_checked_or_not() {
    let backup = Backup::new();
    let sound = fs::read(&backup.images[0]).unwrap();
    let map = Map::of(&sound);
    let entries = [map.l2[0], map.l2[map.l2.len() - 1]];
    // bits that nothing uses, and a cluster behind the end of the file
    let damages = entries.into_iter().flat_map(|at| [(at, 1 << 57), (at, 1 << 63 | 1 << 50)]);
    for (at, value) in damages.chain([(map.refcount_table[0], 512)]) {
        let mut bytes = sound.clone();
        put(&mut bytes, at, value);
        fs::write(&backup.images[0], bytes).unwrap();
        for words in [&["--skip-check"][..], &[]] {
            assert_refused(&backup, words, 4, "nothing was changed");
        }
    }
    // and when it is right again, nothing was begun
    fs::write(&backup.images[0], sound).unwrap();
    backup.does(&["snapshotrebase", "--skip-check"]).with(0);
}

#[test]
fn refcounts_that_cannot_count_the_snapshots_are_refused() {
    let backup = Backup::new();
    create(&backup.images[0], "refcount_bits=1", "64M");
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write 0 1M"]).arg(&backup.images[0]));
    backup.refuses(&["snapshotrebase"], 1, "its refcounts are too narrow for so many snapshots");
    backup.does(&["commit"]).with(0);
}

fn bitmap(words: &[&str], image: &Path) {
    tools::run(tools::qemu_img().arg("bitmap").args(words).arg(image).arg("b0"));
}

fn image_bits(image: &[u8]) -> u32 {
    Map::of(image).header.geometry.cluster_bits()
}

/// Sets a refcount of 16 bits.
fn set_refcount(image: &mut [u8], cluster: u64, refcount: u16) {
    let block = number(image, Map::of(image).refcount_table[0]);
    let at = usize::try_from(block + 2 * cluster).unwrap();
    image[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
}

#[test]
fn a_size_that_a_bitmap_of_the_full_cannot_have_is_refused() {
    let backup = Backup::new();
    let says = format!("{}: has a bitmap that a disk of the size of an INC cannot have", backup.name(0));
    bitmap(&["--add", "-g", "512"], &backup.images[0]);
    for size in ["0", "5T"] {
        create(&backup.images[1], "compat=1.1", size);
        backup.refuses(&["snapshotrebase"], 1, &says);
        assert_refused(&backup, &["--until=INC-1793674800"], 1, &says);
    }
    // where only INCs in between have it
    let expected = backup.expected(3);
    backup.does(&["commit"]).with(0);
    backup.assert_holds(3, &expected);
    let backup = Backup::new();
    bitmap(&["--add", "-g", "512", "--disable"], &backup.images[0]);
    create(&backup.images[3], "compat=1.1", "5T");
    assert_refused(&backup, &[], 1, &says);
    bitmap(&["--remove"], &backup.images[0]);
    backup.does(&["snapshotrebase"]).with(0);
}

#[test]
fn clusters_of_bitmaps_that_may_be_those_of_others_are_refused() {
    let backup = Backup::new();
    let full = &backup.images[0];
    bitmap(&["--add", "-g", "64k"], full);
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write 0 1M"]).arg(full));
    let sound = fs::read(full).unwrap();
    let image = Image::open(Arc::new(MemoryStorage::new(sound.clone()))).unwrap();
    let table = image.bitmaps().unwrap()[0].table.offset.0;
    let directory = image.header().extensions.bitmaps.unwrap().directory_offset.0;
    for offset in [directory, table, number(&sound, table)] {
        let mut image = sound.clone();
        set_refcount(&mut image, offset >> image_bits(&sound), 2);
        fs::write(full, image).unwrap();
        assert_refused(&backup, &[], 1, "a cluster of its bitmaps does not have refcount 1: check it");
    }
    fs::write(full, sound).unwrap();
    backup.does(&["snapshotrebase"]).with(0);
}

/// The format holds 65536.
#[test]
fn a_full_without_places_for_the_snapshots_is_refused() {
    let backup = Backup::new();
    let full = &backup.images[0];
    create(full, "compat=1.1", "64M");
    let mut image = fs::read(full).unwrap();
    let there: u32 = 65_536 - 3;
    let mut table: Vec<u8> = Vec::new();
    for number in 1..=there {
        let id = format!("{number:05}");
        // no L1 table, five bytes of ID and no name, a date, and 16 bytes of extra data: the size of the disk
        for words in [[0, 0], [0, 5 << 16], [number, 0], [0, 0], [0, 16], [0, 0], [0, 64 << 20]] {
            table.extend(words.iter().flat_map(|word| word.to_be_bytes()));
        }
        table.extend(id.bytes());
        table.resize(table.len().next_multiple_of(8), 0);
    }
    let bits = image_bits(&image);
    image.resize(image.len().next_multiple_of(1 << bits), 0);
    let first = (image.len() >> bits) as u64;
    image.extend(&table);
    image.resize(image.len().next_multiple_of(1 << bits), 0);
    for cluster in first..(image.len() >> bits) as u64 {
        set_refcount(&mut image, cluster, 1);
    }
    image[60..64].copy_from_slice(&there.to_be_bytes());
    put(&mut image, 64, first << bits);
    fs::write(full, image).unwrap();
    for words in [&["snapshotrebase"][..], &["snapshotrebase", "--dry-run", "--skip-check"]] {
        backup.refuses(words, 1, "cannot hold so many internal snapshots more");
    }
    // two are two
    backup.does(&["snapshotrebase", "--until=INC-1793674800"]).with(0);
    backup.does(&["commit"]).with(0);
}

/// Dates of snapshots have 32 bits, and tell what is done when the work is done again.
#[test]
fn times_that_no_snapshot_can_have_are_refused() {
    let last = i64::from(u32::MAX);
    let backup = Backup::named("backup/disk0", "disk.qcow2", [last - 2, last - 1, last, last + 1]);
    let says = format!("{}: has a time after 2106", backup.name(3));
    backup.refuses(&["snapshotrebase"], 1, &says);
    backup.refuses(&["snapshotrebase", "--dry-run"], 1, &says);
    let expected = backup.expected(3);
    backup.does(&["snapshotrebase", "--until", &last.to_string()]).with(0);
    backup.does(&["commit"]).with(0);
    backup.assert_holds(3, &expected);
}

#[test]
fn a_full_that_was_not_closed_is_repaired_first() {
    let backup = Backup::new();
    create(&backup.images[0], "lazy_refcounts=on", "64M");
    let killed = ["-f", "qcow2", "-c", "write -P 7 32M 1M", "-c", "flush", "-c", "sigraise 9"];
    tools::output(tools::qemu_io().args(killed).arg(&backup.images[0]));
    let expected = backup.expected(3);
    backup.does(&["commit"]).with(0);
    backup.assert_holds(3, &expected);
    crate::support::in_place::assert_sound(&backup.images[0], false);
}

/// Halfway it would be too late: then the FULL is a mixture that nothing could end.
#[test]
fn a_compressed_cluster_that_cannot_be_inflated_is_found_before() {
    let backup = Backup::new();
    let compressed = backup.path("compressed");
    tools::run(tools::qemu_img().args(["convert", "-c", "-O", "qcow2"]).arg(&backup.images[2]).arg(&compressed));
    let mut image = fs::read(&compressed).unwrap();
    let entries = Map::of(&image).l2.into_iter().map(|place| number(&image, place));
    // at this cluster size, 54 bits of a descriptor say where the stream starts
    let first = entries.filter(|entry| entry & 1 << 62 != 0).map(|entry| entry & ((1 << 54) - 1)).next().unwrap();
    put(&mut image, first, u64::MAX);
    fs::write(&backup.images[2], image).unwrap();
    fs::remove_file(&compressed).unwrap();
    for command in ["commit", "snapshotrebase"] {
        backup.refuses(&[command], 4, &format!("{}: the compressed cluster at offset {first:#x}", backup.name(2)));
        backup.refuses(&[command], 4, "nothing was changed");
    }
    let expected = backup.expected(1);
    backup.does(&["commit", "--until=INC-1793674800"]).with(0);
    backup.assert_holds(1, &expected);
}

/// What cannot be removed at the end, or replaced. An image that must not change is not even opened.
#[test]
fn what_cannot_be_removed_is_found_before() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let fixed = [
        (backup.images[1].clone(), "i", "INC-1793674800-disk.qcow2: cannot be opened"),
        (Manifest::path(&backup.images[2]), "i", "INC-1793761200-disk.qcow2.json: must not change"),
        (Checksums::path(&backup.images[0]), "i", "FULL-1793588400-disk.qcow2.crc32"),
        (backup.dir.clone(), "i", "is in a folder that must not change"),
    ];
    for (path, flag, says) in fixed {
        let Some(_fixed) = Fixed::new(&path, flag) else {
            eprintln!("skipped: files cannot be made immutable here");
            return;
        };
        assert_refused(&backup, &[], 1, says);
    }
}

/// A file that must not change until this goes.
struct Fixed<'a>(&'a Path, &'static str);

impl<'a> Fixed<'a> {
    fn new(path: &'a Path, flag: &'static str) -> Option<Self> {
        let set = Command::new("chattr").arg(format!("+{flag}")).arg(path).status();
        set.is_ok_and(|set| set.success()).then_some(Self(path, flag))
    }
}

impl Drop for Fixed<'_> {
    fn drop(&mut self) {
        tools::run(Command::new("chattr").arg(format!("-{}", self.1)).arg(self.0));
    }
}

/// Damages a FULL with bitmaps so that no QEMU opens it, though all of its disk can be read.
fn assert_is_for_nobody(bitmaps: &[&str], damage: impl Fn(&mut Vec<u8>), says: &str) {
    let backup = Backup::new();
    let full = &backup.images[0];
    for name in bitmaps {
        tools::run(tools::qemu_img().args(["bitmap", "--add"]).arg(full).arg(name));
    }
    let mut image = fs::read(full).unwrap();
    backup.merged(["--format=raw", "--out=right"]).with(0);
    damage(&mut image);
    fs::write(full, image).unwrap();
    assert!(!judge(full).opened, "{says}");
    Ended::of(qmprestore(["check"]).arg(full)).with(4).says("DAMAGED").says(says);
    backup.refuses(&["check", "--repair=all"], 4, says);
    assert_refused(&backup, &[], 4, says);
    backup.merged(["--format=raw", "--out=out"]).with(0);
    backup.merged(["--format=raw", "--out=salvaged", "--salvage", "--json"]).with(0).says_not("anywhere");
    let read = |name| fs::read(backup.path(name)).unwrap();
    assert!(read("out") == read("right") && read("salvaged") == read("right"), "{says}");
}

/// Where the entry of the second bitmap is in the directory.
fn second_bitmap(image: &[u8]) -> usize {
    let directory = Map::of(image).header.extensions.bitmaps.unwrap().directory_offset.0;
    // 24 bytes, a name of two, and padding
    usize::try_from(directory).unwrap() + 32
}

#[test]
fn a_full_that_no_qemu_opens_for_what_no_read_needs_is_refused_and_merged_all_the_same() {
    const BITMAPS: [&str; 2] = ["b0", "b1"];
    let same_name = |image: &mut Vec<u8>| {
        let name = second_bitmap(image) + 24;
        image[name..name + 2].copy_from_slice(b"b0");
    };
    assert_is_for_nobody(
        &BITMAPS,
        same_name,
        "the number of bitmaps with this name is 2, but each needs a name of its own",
    );
    let flag = |image: &mut Vec<u8>| {
        let flags = second_bitmap(image) + 15;
        image[flags] |= 4;
    };
    assert_is_for_nobody(&BITMAPS, flag, "bitmap flags is 0x6, only the bits 0x3 may be set");
    let extra_data = |image: &mut Vec<u8>| {
        let entry = second_bitmap(image);
        image[entry + 23] = 6;
        image[entry + 24..entry + 32].copy_from_slice(b"extra!b1");
    };
    assert_is_for_nobody(&BITMAPS, extra_data, "bitmap extra_data_size is 0x6, it must be 0x0");
    let long_format = |image: &mut Vec<u8>| {
        let start = usize::try_from(Map::of(image).header.header_length).unwrap();
        let extension = [&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16][..], b"qcow2-and-longer", &[0; 8]].concat();
        image[start..start + extension.len()].copy_from_slice(&extension);
    };
    assert_is_for_nobody(&[], long_format, "backing format length is 16, supported range is 0..=15");
}
