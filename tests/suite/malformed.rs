//! Damaged and hostile images: each class is refused with the error that says where and why, and nothing else
//! happens.

use std::sync::Arc;

use qmpbackup::qcow2::{CompressionType, Geometry, GuestOffset, HostOffset, Image, Layout, Reader, RefcountWriter};
use qmpbackup::storage::MemoryStorage;

const CLUSTER: usize = 1 << 16;
const SIZE: u64 = 1 << 20;

/// A sound image: guest cluster 0 is data, 1 is zero, 2 is compressed, the rest is unallocated.
fn sound() -> Vec<u8> {
    let layout = Layout::new(Geometry::new(16, false).unwrap(), SIZE, CompressionType::Deflate, 1, 2).unwrap();
    let mut bytes = vec![0; usize::try_from(layout.length()).unwrap()];
    let mut put = |host: HostOffset, part: &[u8]| {
        let start = usize::try_from(host.0).unwrap();
        bytes[start..start + part.len()].copy_from_slice(part);
        Ok::<_, ()>(())
    };
    put(HostOffset(0), &layout.header()).unwrap();
    let mut refcounts = RefcountWriter::new(&layout, &mut put).unwrap();
    refcounts.repeat(2, 1, &mut put).unwrap();
    refcounts.finish(&mut put).unwrap();
    let (data, compressed) = (layout.data_cluster(0), layout.data_cluster(1));
    let stream = qmpbackup::qcow2::Deflater::new(CompressionType::Deflate, CLUSTER as u64)
        .deflate(&vec![7; CLUSTER])
        .unwrap()
        .to_vec();
    let entries = [Layout::entry(data), 1, layout.compressed_entry(compressed, stream.len() as u64).unwrap()];
    put(layout.l1_entry(0), &Layout::entry(layout.l2_table(0)).to_be_bytes()).unwrap();
    put(layout.l2_table(0), &entries.map(u64::to_be_bytes).concat()).unwrap();
    put(data, &vec![5; CLUSTER]).unwrap();
    put(compressed, &stream).unwrap();
    bytes
}

/// Where the parts of the sound image are.
const REFCOUNT_TABLE: u64 = 0x1_0000;
const L1: usize = 0x3_0000;
const L2: usize = 0x4_0000;
const DATA: u64 = 0x5_0000;
const END: u64 = 0x7_0000;

/// Reads all of an image.
fn read(bytes: Vec<u8>) -> Result<Vec<u8>, qmpbackup::qcow2::Error> {
    let image = Image::open(Arc::new(MemoryStorage::new(bytes)))?;
    image.snapshots()?;
    image.bitmaps()?;
    let mut disk = vec![0xaa; usize::try_from(image.size()).unwrap()];
    Reader::new(&image).read(&mut disk, GuestOffset(0))?;
    Ok(disk)
}

fn poked(pokes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = sound();
    for (offset, part) in pokes {
        bytes[*offset..*offset + part.len()].copy_from_slice(part);
    }
    bytes
}

#[track_caller]
fn refused(pokes: &[(usize, &[u8])], message: &str) {
    assert_eq!(read(poked(pokes)).unwrap_err().to_string(), message);
}

#[test]
fn the_sound_image_is_read() {
    let disk = read(sound()).unwrap();
    assert!(disk[..CLUSTER].iter().all(|byte| *byte == 5));
    assert!(disk[CLUSTER..2 * CLUSTER].iter().all(|byte| *byte == 0));
    assert!(disk[2 * CLUSTER..3 * CLUSTER].iter().all(|byte| *byte == 7));
    assert!(disk[3 * CLUSTER..].iter().all(|byte| *byte == 0));
    assert_eq!((sound().len() as u64, sound()[usize::try_from(DATA).unwrap()]), (END, 5));
}

#[test]
fn magic_and_version() {
    refused(&[(0, b"XFI\xfb")], "magic is 0x584649fb, it must be 0x514649fb (offset 0x0)");
    for version in [0, 1, 4, u32::MAX] {
        let message = format!("version is {version}, supported range is 2..=3 (offset 0x4)");
        refused(&[(4, &version.to_be_bytes())], &message);
    }
}

#[test]
fn header_length_and_extensions() {
    for length in [0u32, 72, 103, 65_544, u32::MAX] {
        let message = format!("header_length is {length}, supported range is 104..=65536 (offset 0x64)");
        refused(&[(100, &length.to_be_bytes())], &message);
    }
    refused(&[(100, &[0, 0, 0, 109])], "header_length is 0x6d, it must be a multiple of 8 (offset 0x64)");
    let extension = [0x68, 0x03, 0xf8, 0x57, 0xff, 0xff, 0xff, 0xff];
    refused(&[(112, &extension)], "header extension length is 4294967295, supported range is 0..=65416 (offset 0x74)");
    // so is that of the end marker, which needs none
    refused(&[(116, &[0xff; 4])], "header extension length is 4294967295, supported range is 0..=65416 (offset 0x74)");
    let bitmaps = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 8];
    refused(&[(112, &bitmaps)], "bitmaps extension length is 0x8, it must be 0x18 (offset 0x74)");
}

#[test]
fn cluster_bits_refcount_order_and_sizes() {
    for bits in [0u32, 8, 22, 31, 63, 64, u32::MAX] {
        let message = format!("cluster_bits is {bits}, supported range is 9..=21 (offset 0x14)");
        refused(&[(20, &bits.to_be_bytes())], &message);
    }
    for order in [7u32, 31, u32::MAX] {
        let message = format!("refcount_order is {order}, supported range is 0..=6 (offset 0x60)");
        refused(&[(96, &order.to_be_bytes())], &message);
    }
    for size in [u64::MAX, 1 << 63, 1 << 61] {
        let message = format!("size is {size}, more than L1 tables of this cluster size can map (offset 0x18)");
        refused(&[(24, &size.to_be_bytes())], &message);
    }
    refused(&[(24, &(1u64 << 40).to_be_bytes())], "l1_size is 1, supported range is 2048..=4194304 (offset 0x24)");
    let extended = [(79, &[0x10][..]), (20, &[0, 0, 0, 13])];
    refused(&extended, "cluster_bits is 13, extended L2 entries need at least 14 (offset 0x14)");
}

#[test]
fn tables_that_are_huge_unaligned_or_beyond_the_end() {
    refused(&[(36, &[0xff; 4])], "l1_size is 4294967295, supported range is 1..=4194304 (offset 0x24)");
    refused(
        &[(40, &[0, 0, 0, 0, 0, 3, 0, 1])],
        "l1_table_offset is 0x30001, it must be a multiple of 65536 (offset 0x28)",
    );
    let message =
        "the L1 table at offset 0x4000000000000000 is 8 bytes long, but the file ends at 0x70000: it was truncated";
    refused(&[(40, &[0x40, 0, 0, 0, 0, 0, 0, 0])], message);
    let message = "the L1 table at offset 0x70000 is 8 bytes long, but the file ends at 0x70000: it was truncated";
    refused(&[(40, &END.to_be_bytes())], message);
    let message = "refcount_table_offset is 0x10200, it must be a multiple of 65536 (offset 0x30)";
    refused(&[(48, &(REFCOUNT_TABLE + 512).to_be_bytes())], message);
    for clusters in [0u32, 129, u32::MAX] {
        let message = format!("refcount_table_clusters is {clusters}, supported range is 1..=128 (offset 0x38)");
        refused(&[(56, &clusters.to_be_bytes())], &message);
    }
    refused(&[(60, &[0xff; 4])], "nb_snapshots is 4294967295, supported range is 0..=65536 (offset 0x3c)");
    for count in [0, 1] {
        let snapshots = [(60, &[0, 0, 0, count][..]), (64, &[0, 0, 0, 0, 0, 0, 2, 0])];
        refused(&snapshots, "snapshots_offset is 0x200, it must be a multiple of 65536 (offset 0x40)");
    }
    let message = "snapshots_offset is 9223372036854775808, supported range is 0..=9223372036854775807 (offset 0x40)";
    refused(&[(64, &[0x80])], message);
}

#[test]
fn features_compression_type_and_encryption() {
    refused(&[(72, &[0x80])], "unknown incompatible features at offset 72: bit 63");
    let mut table = vec![0; 56];
    table[..8].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48]);
    table[8..10].copy_from_slice(&[0, 5]);
    table[10..20].copy_from_slice(b"time lapse");
    let named = "unknown incompatible features at offset 72: \"time lapse\" (bit 5), bit 6";
    refused(&[(79, &[0x60]), (112, &table)], named);
    let message =
        "compression_type is 1, but the compression type feature (incompatible bit 3) is not set (offset 0x68)";
    refused(&[(104, &[1])], message);
    let message = "compression_type is 0, but the compression type feature (incompatible bit 3) is set (offset 0x68)";
    refused(&[(79, &[8])], message);
    refused(&[(79, &[8]), (104, &[2])], "compression_type is 2, supported range is 0..=1 (offset 0x68)");
    let encrypted = |method| {
        format!("the image is encrypted ({method}, crypt_method at offset 32): encrypted images are not supported")
    };
    refused(&[(35, &[1])], &encrypted("AES"));
    refused(&[(35, &[2])], &encrypted("LUKS"));
    refused(&[(35, &[3])], "crypt_method is 3, supported range is 0..=2 (offset 0x20)");
    let message =
        "the image keeps its data in an external file, \"\", which is not opened: an image is read by itself alone";
    refused(&[(79, &[4])], message);
}

#[test]
fn backing_names() {
    let backing = |offset: u64, length: u32| {
        let mut field = offset.to_be_bytes().to_vec();
        field.extend(length.to_be_bytes());
        field
    };
    let message = "backing_file_offset is 65537, supported range is 112..=65536 (offset 0x8)";
    refused(&[(8, &backing(65_537, 4))], message);
    let message = "backing_file_offset is 65537, supported range is 0..=65536 (offset 0x8)";
    refused(&[(8, &backing(65_537, 0))], message);
    refused(&[(8, &backing(40, 4))], "backing_file_offset is 40, supported range is 112..=65536 (offset 0x8)");
    refused(&[(8, &backing(512, 1024))], "backing_file_size is 1024, supported range is 0..=1023 (offset 0x10)");
    refused(&[(8, &backing(65_530, 7))], "backing_file_size is 7, supported range is 0..=6 (offset 0x10)");
    let message = "the backing file name at offset 0x200 has a NUL at byte 2";
    refused(&[(8, &backing(512, 4)), (512, b"ab\0c")], message);
    let message = "the image rests on a backing file, \"/etc/passwd\", at guest offset 0x30000";
    refused(&[(8, &backing(512, 11)), (512, b"/etc/passwd")], message);
}

#[test]
fn l1_entries() {
    let entry = |value: u64| value.to_be_bytes();
    let bits =
        |value: u64| format!("L1 entry is {value:#x}, only the bits 0x80fffffffffffe00 may be set (offset 0x30000)");
    for value in [1 << 62 | 0x4_0000, 0x4_0001, 1 << 56] {
        refused(&[(L1, &entry(value))], &bits(value));
    }
    refused(&[(L1, &entry(0x4_0200))], "L1 entry is 0x40200, it must be a multiple of 65536 (offset 0x30000)");
    let message = "L1 entry is 0x70000, it must lie before the end of the file at 0x70000 (offset 0x30000)";
    refused(&[(L1, &entry(END))], message);
    // two L1 entries, one table
    let pokes = [(24, &(1u64 << 30).to_be_bytes()[..]), (39, &[2]), (L1, &entry(0x4_0000)), (L1 + 8, &entry(0x4_0000))];
    refused(&pokes, "L1 entries 0 and 1 both point to the L2 table at offset 0x40000");
}

#[test]
fn l2_entries() {
    let entry = |value: u64| value.to_be_bytes();
    let at = |value: u64, wrong: &str| format!("L2 entry is {value:#x}, {wrong} (offset 0x40000)");
    let check = |value: u64, wrong: &str| refused(&[(L2, &entry(value))], &at(value, wrong));
    check(0x5_0002, "only the bits 0x80fffffffffffe01 may be set");
    check(1 << 56 | 0x5_0000, "only the bits 0x80fffffffffffe01 may be set");
    check(0x5_0200, "it must be a multiple of 65536");
    check(END, "it must lie before the end of the file at 0x70000");
    check(0xff_ffff_ffff_0000, "it must lie before the end of the file at 0x70000");
    let compressed = 1 << 62;
    let value = compressed | END;
    check(value, "it must lie before the end of the file at 0x70000");
    check(compressed | 0x200, "it must lie behind the header, which ends at 0x10000");
    refused(
        &[(L2, &entry(compressed | 1 << 63 | DATA))],
        "L2 entry is 0xc000000000050000, compressed clusters have no COPIED flag (offset 0x40000)",
    );
    let garbage = "the compressed cluster at offset 0x50000 (guest offset 0x0) is damaged: not a deflate stream";
    refused(&[(L2, &entry(compressed | 100 << 54 | DATA)), (0x5_0000, &[0xff; 512])], garbage);
    // version 2 has no zero flag
    let version_2 = [(4, &[0, 0, 0, 2][..]), (L2, &entry(1))];
    refused(&version_2, &at(1, "only the bits 0x80fffffffffffe00 may be set"));
}

#[test]
fn subclusters() {
    let bitmap = 1u64 << 32 | 1;
    let pokes = [(79, &[0x10][..]), (L2 + 8, &bitmap.to_be_bytes())];
    let message = "L2 entry is 0x8000000000050000, a subcluster is either allocated or zero (offset 0x40000)";
    refused(&pokes, message);
}

#[test]
fn truncation_anywhere_is_an_error_or_harms_nothing() {
    let whole = read(sound()).unwrap();
    let mut errors = 0;
    for length in (0..sound().len()).step_by(509) {
        let mut bytes = sound();
        bytes.truncate(length);
        match read(bytes) {
            Ok(disk) => assert_eq!(disk, whole, "cut at {length}"),
            Err(_) => errors += 1,
        }
    }
    // all but the end of the last cluster, which holds a short compressed stream
    assert!(errors >= 6 * CLUSTER / 509, "{errors}");
}
