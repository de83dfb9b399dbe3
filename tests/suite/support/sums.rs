//! Whether the checksums beside images fit.

use std::ops::Range;
use std::path::{Path, PathBuf};

use qmpbackup::chain::Checksums;

/// All images below a folder that have checksums, settled and fitting.
#[track_caller]
pub(crate) fn assert_fit(folder: &Path) -> Vec<PathBuf> {
    let mut images = Vec::new();
    walk(folder, &mut images);
    images.sort();
    for image in &images {
        let sums = Checksums::open(image).unwrap().unwrap();
        assert_eq!(sums.unsettled(), 0..0, "{} is unsettled", image.display());
        assert_eq!(wrong(image), [0; 0], "{}", image.display());
    }
    images
}

/// Makes blocks of an image unsettled, as a program does that is killed then.
pub(crate) fn unsettle(image: &Path, blocks: Range<u64>) {
    let path = Checksums::path(image);
    let mut bytes = std::fs::read(&path).unwrap();
    let header = if bytes[11] == 1 { 44 } else { 60 };
    bytes[24..32].copy_from_slice(&blocks.start.to_be_bytes());
    bytes[32..40].copy_from_slice(&(blocks.end - blocks.start).to_be_bytes());
    let sum = crc32(&bytes[..header]);
    bytes[header..header + 4].copy_from_slice(&sum.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(Checksums::open(image).unwrap().unwrap().unsettled(), blocks);
}

/// The blocks of an image whose checksums do not fit.
pub(crate) fn wrong(image: &Path) -> Vec<u64> {
    let sums = Checksums::open(image).unwrap().unwrap();
    let bytes = std::fs::read(image).unwrap();
    assert_eq!(sums.length(), bytes.len() as u64, "{}", image.display());
    let is = bytes.chunks(1 << 16).map(crc32);
    let pairs = is.zip(sums.read(0..sums.blocks()).unwrap()).zip(0..);
    pairs.filter(|((is, said), _)| is != said).map(|(_, block)| block).collect()
}

fn walk(folder: &Path, images: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, images);
        } else if path.extension().is_some_and(|extension| extension == "crc32") {
            images.push(path.parent().unwrap().with_file_name(path.file_stem().unwrap()));
        }
    }
}

/// The CRC-32 as a table of all bytes says it.
fn crc32(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256_u32)
        .map(|byte| (0..8).fold(byte, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }))
        .collect();
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ table[(crc as u8 ^ byte) as usize])
}
