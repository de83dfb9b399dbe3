//! The parts of a merge, each by itself, and a whole one.
//!
//! `benches/compare` measures the merge beside `qemu-img convert`; this shows where its time goes. Decode and lay out are
//! the serial arithmetic, plan is decode and resolve of the real chain with all threads.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a benchmark ends where its data is wrong"
)]

use std::convert::Infallible;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use qmpbackup::chain::{Clock, When, discover};
use qmpbackup::qcow2::{
    CompressionType, Deflater, Geometry, HostOffset, Image, Inflater, Layout, MapBuffer, RefcountWriter,
};
use qmpbackup::restore::{Layers, Merge, MergeOptions, Output, OutputFormat, Silent, Source};
use qmpbackup::storage::MemoryStorage;

const CLUSTER: u64 = 1 << 16;

/// An image of one full L2 table, whose clusters lie in guest order with a jump at every eighth.
fn one_table() -> Image {
    let geometry = Geometry::new(16, false).expect("a usual cluster size");
    let clusters = geometry.l2_entries();
    let size = geometry.l2_coverage();
    let layout = Layout::new(geometry, size, CompressionType::Deflate, 1, clusters * 2).expect("a small image");
    let mut bytes = vec![0; usize::try_from(layout.length()).expect("it fits")];
    let mut put = |offset: u64, part: &[u8]| {
        let start = usize::try_from(offset).expect("it fits");
        bytes[start..start + part.len()].copy_from_slice(part);
    };
    put(0, &layout.header());
    put(layout.l1_entry(0).0, &Layout::entry(layout.l2_table(0)).to_be_bytes());
    for cluster in 0..clusters {
        let place = layout.data_cluster(cluster + cluster / 8);
        put(layout.l2_table(0).0 + cluster * 8, &Layout::entry(place).to_be_bytes());
    }
    Image::open(Arc::new(MemoryStorage::new(bytes))).expect("a sound image")
}

fn decode(c: &mut Criterion) {
    let image = one_table();
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(image.header().geometry.l2_entries()));
    let mut buffer = MapBuffer::default();
    group.bench_function("an L2 table", |b| {
        b.iter(|| {
            image
                .map(0..image.size(), &mut buffer, |extent| {
                    black_box(extent);
                })
                .expect("a sound image");
        });
    });
    group.finish();
}

/// Text-like: it compresses to about a third.
fn cluster() -> Vec<u8> {
    let words = ["qcow2", "cluster", "refcount", "table", "offset", "snapshot", "bitmap", "dirty"];
    let mut state = 1u32;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < CLUSTER {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend_from_slice(words[(state >> 24) as usize % words.len()].as_bytes());
        bytes.extend_from_slice((state >> 20).to_string().as_bytes());
    }
    bytes.truncate(usize::try_from(CLUSTER).expect("it fits"));
    bytes
}

/// Places for a disk of 1 TiB with 64 GiB of data, and its refcounts.
fn lay_out(c: &mut Criterion) {
    let geometry = Geometry::new(16, false).expect("a usual cluster size");
    let clusters = 1 << 20;
    let mut group = c.benchmark_group("lay out");
    group.throughput(Throughput::Elements(clusters));
    group.bench_function("64 GiB of data", |b| {
        b.iter(|| {
            let layout =
                Layout::new(geometry, 1 << 40, CompressionType::Deflate, 1 << 11, clusters).expect("a usual disk");
            let mut write = |host: HostOffset, bytes: &[u8]| {
                black_box((host, bytes));
                Ok::<_, Infallible>(())
            };
            let mut refcounts = RefcountWriter::new(&layout, &mut write).expect("nothing fails");
            refcounts.repeat(clusters, 1, &mut write).expect("nothing fails");
            refcounts.finish(&mut write).expect("nothing fails");
        });
    });
    group.finish();
}

/// What the copier chooses from, in memory where the disk adds no moods: see `storage::offload_min`.
fn copies(c: &mut Criterion) {
    const LENGTH: u64 = 64 << 20;
    let folder = tempfile::tempdir_in("/dev/shm").expect("room in memory");
    let make = |name: &str| {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(folder.path().join(name));
        let file = file.expect("a file");
        file.write_all_at(&vec![0x5a; usize::try_from(LENGTH).expect("it fits")], 0).expect("room");
        file
    };
    let (source, target) = (make("source"), make("target"));
    let mut group = c.benchmark_group("copy");
    group.throughput(Throughput::Bytes(LENGTH)).sample_size(20);
    for size in [64 << 10, 256 << 10, 1 << 20, 4 << 20] {
        let mut buffer = vec![0; size];
        group.bench_function(format!("read and write {} KiB", size >> 10), |b| {
            b.iter(|| {
                for offset in (0..LENGTH).step_by(size) {
                    source.read_exact_at(&mut buffer, offset).expect("it is there");
                    target.write_all_at(&buffer, offset).expect("it is there");
                }
            });
        });
    }
    group.bench_function("copy_file_range", |b| {
        b.iter(|| {
            let (mut from, mut to) = (0, 0);
            while from < LENGTH {
                let rest = usize::try_from(LENGTH - from).expect("it fits");
                rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), rest)
                    .expect("it is there");
            }
        });
    });
    group.finish();
}

fn codecs(c: &mut Criterion) {
    let plain = cluster();
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(CLUSTER));
    for codec in [CompressionType::Deflate, CompressionType::Zstd] {
        let mut deflater = Deflater::new(codec, CLUSTER);
        let stream = deflater.deflate(&plain).expect("it compresses").to_vec();
        let mut inflater = Inflater::default();
        let mut out = plain.clone();
        group.bench_function(format!("inflate {codec}"), |b| {
            b.iter(|| inflater.inflate(codec, black_box(&stream), &mut out).expect("a sound stream"));
        });
        if codec == CompressionType::Deflate {
            group.bench_function("inflate zlib with miniz_oxide", |b| {
                let inflate = miniz_oxide::inflate::decompress_slice_iter_to_slice;
                b.iter(|| {
                    inflate(&mut out, std::iter::once(black_box(&stream[..])), false, true).expect("a sound stream")
                });
            });
        }
        group.bench_function(format!("deflate {codec}"), |b| {
            b.iter(|| deflater.deflate(black_box(&plain)).map(<[u8]>::len));
        });
    }
    group.finish();
}

/// The real chain of the test data.
fn sources() -> Vec<Source> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/chain");
    let inventory = discover(&dir).expect("the test data");
    let disk = inventory.disk(None).expect("one disk");
    let point = disk.select(&When::Latest, &Clock::system(), false).expect("a sound chain");
    point.members.iter().map(|image| Source::from(&**image)).collect()
}

fn planned(sources: &[Source], out: &Path, format: OutputFormat) -> Merge {
    let options = MergeOptions { replace: true, ..MergeOptions::new(Output::File(out.to_owned()), format) };
    Merge::plan(Layers::open(sources).expect("a sound chain"), options, &Silent).expect("a plan")
}

fn merge(c: &mut Criterion) {
    let sources = sources();
    let folder = tempfile::tempdir().expect("room for output");
    let out = folder.path().join("disk");
    let plain = OutputFormat::Qcow2 { cluster_size: None, compression: None };
    let bytes = planned(&sources, &out, plain).summary().bytes;
    let mut group = c.benchmark_group("merge");
    group.bench_function("plan", |b| b.iter(|| planned(&sources, &out, plain)));
    group.throughput(Throughput::Bytes(bytes)).sample_size(20);
    let zlib = OutputFormat::Qcow2 { cluster_size: None, compression: Some(CompressionType::Deflate) };
    for (name, format) in [("to plain", plain), ("to raw", OutputFormat::Raw), ("to zlib", zlib)] {
        let setup = || planned(&sources, &out, format);
        group.bench_function(name, |b| b.iter_batched(setup, |merge| merge.run(&Silent), BatchSize::PerIteration));
    }
    group.finish();
}

criterion_group!(benches, decode, lay_out, codecs, copies, merge);
criterion_main!(benches);
