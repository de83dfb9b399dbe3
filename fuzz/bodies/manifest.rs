//! The small files beside images: what is understood can be written again and means the same, the rest is refused. Checksums
//! are tried as they come, and with the sums that make them whole.

use std::fs;
use std::path::Path;

use qmpbackup::chain::{BLOCK, BOOKKEEPING, Checksums, Manifest, Unfinished, discover};

use super::input::Input;

const FULL: &str = "FULL-100-d";

pub(super) fn manifest(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let kind = input.byte() % 5;
    let root = super::folder();
    let full = root.path().join(FULL);
    fs::write(&full, "").unwrap();
    fs::write(root.path().join("INC-200-d"), "").unwrap();
    fs::create_dir(root.path().join(BOOKKEEPING)).unwrap();
    let place = match kind {
        0 => Manifest::path(&full),
        1 => Unfinished::path(&full),
        2 => root.path().join("d.config"),
        _ => Checksums::path(&full),
    };
    let mut bytes = input.rest().to_vec();
    if kind == 4 {
        seal(&mut bytes);
    }
    fs::write(place, bytes).unwrap();
    known(&full);
    sums(&full);
    for disk in &discover(root.path()).unwrap().disks {
        assert!(disk.points().len() <= 2, "{:?}", disk.points());
    }
}

/// Makes the two sums of a file with checksums fit: they end its header, which is longer since version 2.
fn seal(bytes: &mut [u8]) {
    let size = if bytes.get(8..12) == Some(&[0, 0, 0, 1]) { 48 } else { 64 };
    let Some((header, list)) = bytes.split_at_mut_checked(size) else { return };
    header[size - 8..size - 4].copy_from_slice(&crc32fast::hash(list).to_be_bytes());
    let sum = crc32fast::hash(&header[..size - 4]);
    header[size - 4..].copy_from_slice(&sum.to_be_bytes());
}

/// All sums are there that should be.
fn sums(full: &Path) {
    let Ok(Some(sums)) = Checksums::open(full) else { return };
    let all = sums.read(0..sums.blocks()).unwrap();
    assert_eq!(all.len() as u64, sums.length().div_ceil(BLOCK));
    assert!(sums.unsettled().end <= sums.blocks());
}

/// What was read is written and read again.
fn known(full: &Path) {
    if let Ok(Some(manifest)) = Manifest::read(full) {
        manifest.write(full).unwrap();
        assert_eq!(Manifest::read(full).unwrap(), Some(manifest));
    }
    if let Ok(Some(unfinished)) = Unfinished::read(full) {
        unfinished.write(full).unwrap();
        assert_eq!(Unfinished::read(full).unwrap(), Some(unfinished));
    }
}
