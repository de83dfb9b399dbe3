use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::compute::write;
use super::*;
use crate::storage::{MemoryStorage, Touched, WritableStorage};

/// An image of a few blocks, the last of them short, with its checksums.
fn image(length: usize) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("INC-5-disk");
    let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
    fs::write(&path, bytes).unwrap();
    create(&path, &FileStorage::open(&path).unwrap()).unwrap();
    (folder, path)
}

fn sums(path: &Path) -> Vec<u32> {
    let sums = Checksums::open(path).unwrap().unwrap();
    sums.read(0..sums.blocks()).unwrap()
}

/// The sums as they should be.
fn expected(path: &Path) -> Vec<u32> {
    fs::read(path).unwrap().chunks(1 << 16).map(crc32fast::hash).collect()
}

#[test]
fn each_block_has_its_sum() {
    for length in [0, 1, 65_536, 65_537, 1_000_000] {
        let (_folder, path) = image(length);
        let open = Checksums::open(&path).unwrap().unwrap();
        assert_eq!((open.length(), open.unsettled()), (length as u64, 0..0));
        assert_eq!(sums(&path), expected(&path), "{length}");
    }
    // as other programs say
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    assert!(Checksums::open(Path::new("/nowhere/image")).unwrap().is_none());
}

#[test]
fn holes_have_the_sum_of_zeroes() {
    let (_folder, path) = image(300_000);
    fs::File::options().write(true).open(&path).unwrap().set_len(5_000_000).unwrap();
    create(&path, &FileStorage::open(&path).unwrap()).unwrap();
    assert_eq!(sums(&path), expected(&path));
    let memory = MemoryStorage::new(fs::read(&path).unwrap());
    assert_eq!(block_sums(&memory, 3..9).unwrap(), expected(&path)[3..9]);
}

#[test]
fn an_image_that_cannot_be_read_is_no_fault_of_its_checksums() {
    /// The second half of it is on bad sectors.
    struct Bad(MemoryStorage);
    impl Storage for Bad {
        fn length(&self) -> u64 {
            self.0.length()
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let is_bad = offset + buffer.len() as u64 > self.length() / 2;
            if is_bad { Err(io::Error::other("bad sector")) } else { self.0.read_exact_at(buffer, offset) }
        }
    }
    let (_folder, path) = image(300_000);
    let bad = Bad(MemoryStorage::new(vec![1; 40 * usize::try_from(BLOCK).unwrap()]));
    let error = create(&path, &bad).unwrap_err();
    let SumError::Image { offset, .. } = error else { panic!("{error:?}") };
    assert!((16 * BLOCK..40 * BLOCK).contains(&offset), "{offset:#x}");
    // that of the checksums
    let error = create(&path.join("no folder"), &MemoryStorage::new(vec![1; 9])).unwrap_err();
    assert!(matches!(error, SumError::Write { .. }), "{error:?}");
    let stop = |_| std::ops::ControlFlow::Break(());
    let memory = MemoryStorage::new(vec![1; 9]);
    let error = create_watched(&path, &memory, &KnownSums::default(), &stop).unwrap_err();
    assert!(matches!(error, SumError::Cancelled), "{error:?}");
    assert_eq!(sums(&path), expected(&path));
}

#[test]
fn any_flipped_bit_of_the_checksums_is_noticed() {
    for id in [None, Some(ImageId::random().unwrap())] {
        any_flipped_bit_is_noticed(id);
    }
}

fn any_flipped_bit_is_noticed(id: Option<ImageId>) {
    let (_folder, path) = image(200_000);
    let file = Checksums::path(&path);
    write(&path, id, 200_000, |blocks| block_sums(&FileStorage::open(&path)?, blocks)).unwrap();
    let sound = fs::read(&file).unwrap();
    assert_eq!(sound.len(), if id.is_some() { 80 } else { 64 });
    for bit in 0..sound.len() * 8 {
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&file, bytes).unwrap();
        assert!(matches!(Checksums::open(&path), Err(ChecksumsError::Damaged { .. })), "bit {bit}");
    }
    for length in 0..sound.len() {
        fs::write(&file, &sound[..length]).unwrap();
        Checksums::open(&path).unwrap_err();
    }
    fs::write(&file, [sound.as_slice(), &[0]].concat()).unwrap();
    assert!(matches!(Checksums::open(&path), Err(ChecksumsError::Damaged { .. })));
}

#[test]
fn a_later_version_is_named() {
    let (_folder, path) = image(1);
    let file = Checksums::path(&path);
    let mut bytes = fs::read(&file).unwrap();
    bytes[11] = 3;
    bytes.resize(64, 0);
    let sum = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&sum.to_be_bytes());
    fs::write(&file, bytes).unwrap();
    assert!(matches!(Checksums::open(&path), Err(ChecksumsError::Version { version: 3, .. })));
}

#[test]
fn a_huge_image_that_is_claimed_costs_no_memory() {
    let (_folder, path) = image(1);
    let header = Header { length: u64::MAX, unsettled: (0, u64::MAX), id: None, list: 0 };
    fs::write(Checksums::path(&path), header.bytes()).unwrap();
    assert!(matches!(Checksums::open(&path), Err(ChecksumsError::Damaged { .. })));
}

fn open_touched(path: &Path) -> Touched {
    Touched::new(Arc::new(FileStorage::open_writable(path).unwrap()), BLOCK)
}

#[test]
fn only_what_was_written_to_is_summed_anew() {
    for length in [100_000, 400_000, 700_000] {
        let (_folder, path) = image(400_000);
        // damaged before, in the middle and in the last block, which is short
        let file = fs::File::options().write(true).open(&path).unwrap();
        for place in [70_000, 399_999] {
            std::os::unix::fs::FileExt::write_all_at(&file, b"!", place).unwrap();
        }
        let before = expected(&path);
        let old = sums(&path);
        let renewal = Renewal::begin(&path, 0..u64::MAX).unwrap();
        assert_eq!(Checksums::open(&path).unwrap().unwrap().unsettled(), 0..7);
        let touched = open_touched(&path);
        touched.write_all_at(b"new", 140_000).unwrap();
        touched.set_length(length).unwrap();
        renewal.finish(&touched, &touched).unwrap();
        assert_eq!(Checksums::open(&path).unwrap().unwrap().unsettled(), 0..0);
        let mut should = expected(&path);
        if length > 200_000 {
            assert_eq!(should[1], before[1]);
            should[1] = old[1];
        }
        if length == 400_000 {
            assert_ne!(should[6], old[6]);
            should[6] = old[6];
        }
        assert_eq!(sums(&path), should, "{length}");
    }
}

#[test]
fn a_block_that_does_not_fit_when_it_is_written_to_in_part_does_not_fit_afterwards() {
    let (_folder, path) = image(400_000);
    let file = fs::File::options().write(true).open(&path).unwrap();
    for block in [1, 2, 6] {
        std::os::unix::fs::FileExt::write_all_at(&file, b"!", block * BLOCK + 100).unwrap();
    }
    let renewal = Renewal::begin(&path, 0..u64::MAX).unwrap();
    let touched = open_touched(&path);
    let write = |place: u64, length: usize| {
        renewal.before_write(&(place..place + length as u64), &touched).unwrap();
        touched.write_all_at(&vec![9; length], place).unwrap();
    };
    // of damaged ones a part, twice, and all; a part of a sound one; the end of the last one, which is short
    write(BLOCK + 5, 10);
    write(BLOCK + 5000, 10);
    write(2 * BLOCK + 7, 10);
    write(2 * BLOCK, 1 << 16);
    write(3 * BLOCK, 100);
    write(399_000, 1000);
    assert_eq!(renewal.finish(&touched, &touched).unwrap(), 2);
    let wrong: Vec<usize> = (0..7).filter(|at| sums(&path)[*at] != expected(&path)[*at]).collect();
    assert_eq!(wrong, [1, 6]);
}

#[test]
fn the_block_with_the_old_end_of_a_file_that_grows_behind_it_is_as_damaged_as_before() {
    for is_damaged in [false, true] {
        let (_folder, path) = image(400_000);
        if is_damaged {
            let file = fs::File::options().write(true).open(&path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"!", 399_000).unwrap();
        }
        let renewal = Renewal::begin(&path, 0..u64::MAX).unwrap();
        let touched = open_touched(&path);
        renewal.before_write(&(600_000..600_010), &touched).unwrap();
        touched.write_all_at(&[9; 10], 600_000).unwrap();
        assert_eq!(renewal.finish(&touched, &touched).unwrap(), u64::from(is_damaged));
        let wrong: Vec<usize> = (0..10).filter(|at| sums(&path)[*at] != expected(&path)[*at]).collect();
        assert_eq!(wrong, if is_damaged { vec![6] } else { vec![] });
    }
}

#[test]
fn checksums_know_whose_they_are() {
    let (_folder, path) = image(200_000);
    let manifest = |id| Manifest {
        image: "INC-5-disk".to_owned(),
        id,
        level: crate::chain::Level::Inc,
        time: Some(5),
        chain: None,
        parent: None,
        parent_id: None,
        bitmap: None,
        format: crate::chain::FormatHint::Qcow2,
        virtual_size: 0,
        qemu: String::new(),
    };
    let (own, other) = (ImageId::random().unwrap(), ImageId::random().unwrap());
    manifest(Some(own)).write(&path).unwrap();
    // those of before have none
    assert_eq!(Checksums::open(&path).unwrap().unwrap().id(), None);
    create(&path, &FileStorage::open(&path).unwrap()).unwrap();
    let touched = open_touched(&path);
    let renewal = Renewal::begin(&path, 0..1).unwrap();
    touched.write_all_at(b"new", 0).unwrap();
    renewal.finish(&touched, &touched).unwrap();
    assert_eq!((Checksums::open(&path).unwrap().unwrap().id(), sums(&path)), (Some(own), expected(&path)));
    manifest(Some(other)).write(&path).unwrap();
    let error = Checksums::open(&path).unwrap_err();
    assert!(matches!(error, ChecksumsError::Foreign { id, expected, .. } if (id, expected) == (own, other)), "{error}");
    manifest(None).write(&path).unwrap();
    assert!(Checksums::open(&path).unwrap().is_some());
}

#[test]
fn after_a_crash_all_that_was_unsettled_is_summed_anew() {
    let (_folder, path) = image(400_000);
    drop(Renewal::begin(&path, 2..4).unwrap());
    // and the program died when it had written this
    let file = fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"new", 140_000).unwrap();
    assert_eq!(Checksums::open(&path).unwrap().unwrap().unsettled(), 2..4);
    let renewal = Renewal::begin(&path, 0..1).unwrap();
    assert_eq!(Checksums::open(&path).unwrap().unwrap().unsettled(), 0..4);
    let touched = open_touched(&path);
    renewal.finish(&touched, &touched).unwrap();
    assert_eq!(sums(&path), expected(&path));
}

#[test]
fn checksums_that_are_damaged_or_missing_stay_so() {
    let (_folder, path) = image(400_000);
    let file = Checksums::path(&path);
    let mut bytes = fs::read(&file).unwrap();
    bytes[50] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let touched = open_touched(&path);
    Renewal::begin(&path, 0..9).unwrap().finish(&touched, &touched).unwrap();
    assert_eq!(fs::read(&file).unwrap(), bytes);
    fs::remove_file(&file).unwrap();
    Renewal::begin(&path, 0..9).unwrap().finish(&touched, &touched).unwrap();
    assert!(!file.exists());
}
