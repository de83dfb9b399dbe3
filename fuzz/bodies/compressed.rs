//! Compressed clusters: any bytes are one cluster or refused, what was deflated is inflated to the same, and an image
//! reads what its entries say.

use std::sync::Arc;

use qmpbackup::qcow2::{CompressionType, Content, Deflater, GuestOffset, Image, Inflater, MapBuffer, Reader};
use qmpbackup::storage::MemoryStorage;

use super::empty::Empty;
use super::input::Input;

pub(super) fn compressed(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let codec = input.pick(&[CompressionType::Deflate, CompressionType::Zstd]);
    // most are small, which is faster
    let bits = 9 + input.pick(&[0, 1, 2, 0, 3, 4, 0, 1, 2, 3, 0, 5, 6, 7, 0, 1, 2, 8, 9, 0, 1, 10, 11, 12]);
    match input.below(3) {
        0 => stream(codec, 1 << bits, input.rest()),
        1 => round_trip(codec, 1 << bits, &mut input),
        _ => entries(codec, bits, &mut input),
    }
}

/// Twice the same comes out, or twice nothing.
fn stream(codec: CompressionType, size: usize, bytes: &[u8]) {
    let (mut one, mut two) = (vec![0x55; size], vec![0xaa; size]);
    let mut inflater = Inflater::default();
    let first = inflater.inflate(codec, bytes, &mut one);
    let again = inflater.inflate(codec, bytes, &mut two);
    assert_eq!(first, again);
    if first.is_err() {
        return;
    }
    assert!(one == two, "not all of the cluster was filled");
    // exactly one cluster: neither more of it nor less
    assert!(inflater.inflate(codec, bytes, &mut one[1..]).is_err() || codec == CompressionType::Zstd);
    one.push(0);
    assert!(inflater.inflate(codec, bytes, &mut one).is_err() || codec == CompressionType::Zstd);
}

/// A cluster of one or several streams, with something behind it.
fn round_trip(codec: CompressionType, size: usize, input: &mut Input<'_>) {
    // frames may follow each other in zstd only
    let frames = if codec == CompressionType::Zstd { 1 << input.below(4) } else { 1 };
    let pattern = input.take(4096);
    let pattern = if pattern.is_empty() { &[0] } else { pattern };
    let cluster: Vec<u8> = pattern.iter().copied().cycle().take(size).collect();
    let mut bytes = Vec::new();
    for part in cluster.chunks(size / frames) {
        let Some(stream) = Deflater::new(codec, part.len() as u64).deflate(part).map(<[u8]>::to_vec) else { return };
        assert!(stream.len() < part.len());
        bytes.extend(stream);
    }
    let mut out = vec![0; size];
    for behind in [&[][..], input.rest()] {
        bytes.extend(behind);
        assert_eq!(Inflater::default().inflate(codec, &bytes, &mut out), Ok(()));
        assert!(out == cluster, "another cluster comes out");
    }
}

/// Entries of an L2 table lead to bytes in the file, which may end before them.
fn entries(codec: CompressionType, bits: u32, input: &mut Input<'_>) {
    let cluster = 1_u64 << bits;
    let count = 1 + input.below(4);
    let empty = Empty { size: count * cluster, cluster_bits: bits, codec, ..Empty::default() };
    let (mut image, table) = empty.with_l2_table();
    let data = image.len() as u64;
    let entries: Vec<(u64, u64)> = (0..count)
        .map(|_| {
            let host = if input.flag() { input.below(1 << 40) } else { data + input.below(512) };
            (host, input.below(1 << (bits - 8)))
        })
        .collect();
    image.extend(input.rest());
    for (index, (host, sectors)) in entries.iter().enumerate() {
        let entry = 1 << 62 | sectors << (62 - (bits - 8)) | host;
        image[table + index * 8..][..8].copy_from_slice(&entry.to_be_bytes());
    }
    let file = image.clone();
    let image = Image::open(Arc::new(MemoryStorage::new(image))).unwrap();
    let mut buffer = MapBuffer::default();
    for (index, (host, sectors)) in (0..).zip(entries) {
        let guest = index * cluster..(index + 1) * cluster;
        let mut out = vec![0x55; usize::try_from(cluster).unwrap_or_default()];
        let read = Reader::new(&image).read(&mut out, GuestOffset(guest.start));
        let (start, end) = (host as usize, ((host / 512 + sectors + 1) * 512).min(file.len() as u64) as usize);
        // zeroes behind the end of the file are no part of it
        let stream = file.get(start..end).unwrap_or_default();
        let mut should = vec![0xaa; out.len()];
        let inflated = Inflater::default().inflate(codec, stream, &mut should);
        // an entry may also be refused for where it leads to
        assert!(read.is_err() || inflated.is_ok(), "{inflated:?}");
        assert!(read.is_err() || out == should, "another cluster comes out");
        let mapped = image.map(guest, &mut buffer, |extent| {
            assert!(matches!(extent.content, Content::Compressed { .. }), "{extent:?}");
        });
        assert!(mapped.is_ok() || read.is_err(), "{mapped:?}");
        assert!(read.is_ok() || inflated.is_err() || start < data as usize, "{read:?}");
    }
}
