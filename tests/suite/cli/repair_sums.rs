//! `qmprestore check --repair` of images with checksums.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use qmpbackup::chain::{BLOCK, Checksums, create_checksums};
use qmpbackup::qcow2::Repair;
use qmpbackup::restore::{self, Error, Observer, Source};
use qmpbackup::storage::FileStorage;

use crate::support::program::{Ended, is_root};
use crate::support::small_disk::Small;
use crate::support::sums::wrong;
use crate::support::tools;

/// Where what an image is made of lies: its clusters are as long as the blocks of checksums.
struct Places {
    l1: u64,
    l2: u64,
    data: u64,
    refcounts: u64,
}

/// An image with wrong refcounts, and the checksums of that.
fn known(folder: &Path) -> (PathBuf, Places) {
    let image = folder.join("FULL-100-d");
    let path = image.to_str().unwrap();
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", path, "8M"]));
    let writes = ["-c", "write -q -P 1 0 64k", "-c", "write -q -P 2 1M 64k"];
    tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(writes).arg(path));
    let bytes = fs::read(&image).unwrap();
    let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let (l1, refcounts) = (word(40), word(word(48)));
    let places = Places { l1, l2: word(l1), data: word(word(l1)), refcounts };
    // of the header
    flip(&image, refcounts + 1);
    create_checksums(&image, &FileStorage::open(&image).unwrap()).unwrap();
    (image, places)
}

fn flip(image: &Path, offset: u64) {
    let file = fs::File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

fn repair(image: &Path) -> Ended {
    Ended::run(["check", "--repair=all", image.to_str().unwrap()])
}

fn bytes(image: &Path) -> [Vec<u8>; 2] {
    [image.to_owned(), Checksums::path(image)].map(|path| fs::read(path).unwrap())
}

#[test]
fn damaged_tables_are_not_repaired() {
    // bits that the image itself does not show to be wrong: other places, and bytes that nothing needs
    for place in [|_: &Places| 4000, |at: &Places| at.l1 + 5, |at: &Places| at.l2 + 16 * 8 + 5] {
        let folder = tempfile::tempdir().unwrap();
        let (image, places) = known(folder.path());
        let at = place(&places);
        flip(&image, at);
        let before = bytes(&image);
        let says = format!("the block at offset {:#x} does not fit its checksum", at / BLOCK * BLOCK);
        repair(&image).with(4).says(&says);
        assert!(bytes(&image) == before, "something was changed");
    }
}

#[test]
fn damaged_refcounts_are_repaired_and_other_damage_is_found_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let (image, places) = known(folder.path());
    flip(&image, places.refcounts + 3);
    flip(&image, places.data + 99);
    repair(&image).with(0);
    // nothing leads to the old refcounts any more, and they are gone
    assert_eq!(wrong(&image), [places.data / BLOCK]);
    tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(&image));
}

/// Gives up when its question is answered with yes.
struct Impatient<F>(F);

impl<F: Fn() -> bool + Sync> Observer for Impatient<F> {
    fn is_cancelled(&self) -> bool {
        (self.0)()
    }
}

#[test]
fn a_repair_that_is_cancelled_leaves_nothing_unsettled() {
    for is_late in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (image, places) = known(folder.path());
        flip(&image, places.data + 99);
        let before = bytes(&image);
        // when there is something behind the end, or when the header leads to it
        let has_changed = || {
            let (old, now) = (&before[0], fs::read(&image).unwrap());
            if is_late { !now.starts_with(old) } else { now.len() > old.len() }
        };
        let sources = [vec![Source::new(image.clone())]];
        let ended = restore::check(&sources, Some(Repair::All), &Impatient(has_changed));
        assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
        assert_eq!(bytes(&image) == before, !is_late);
        assert_eq!(Checksums::open(&image).unwrap().unwrap().unsettled(), 0..0);
        assert_eq!(wrong(&image), [places.data / BLOCK]);
    }
}

#[test]
fn a_repair_that_has_no_room_leaves_checksums_as_they_were() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let small = Small::mount(&folder.path().join("small"), "16m");
    let (image, places) = known(&folder.path().join("small"));
    flip(&image, places.data + 99);
    let before = bytes(&image);
    small.fill(0);
    repair(&image).with(7);
    assert!(bytes(&image) == before, "something was changed");
    small.free();
    repair(&image).with(0);
    assert_eq!(wrong(&image), [places.data / BLOCK]);
}

/// Checksums that cannot be used say nothing of how long the image is that a repair has made longer.
#[test]
fn a_repaired_image_with_damaged_checksums_can_be_read_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let (image, _) = known(folder.path());
    let sums = Checksums::path(&image);
    flip(&sums, fs::metadata(&sums).unwrap().len() - 1);
    let length = fs::metadata(&image).unwrap().len();
    repair(&image).with(3).says("is damaged");
    assert!(fs::metadata(&image).unwrap().len() > length);
    let words = |command: &'static str| [command, "--dir", folder.path().to_str().unwrap()].map(str::to_owned);
    let out = folder.path().join("merged").to_str().unwrap().to_owned();
    Ended::run(words("list")).with(0);
    Ended::run(words("merge").into_iter().chain(["--out".to_owned(), out])).with(0);
}
