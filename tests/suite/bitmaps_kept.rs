//! Persistent bitmaps of images that are changed in place: what they said before and what was written since, or that they
//! are not to be believed.

use std::fmt::Write as _;
use std::process::Stdio;
use std::sync::Arc;

use qmpbackup::qcow2::{Bitmap, Error, GuestOffset, Image, Writer};
use qmpbackup::storage::Storage;
use serde_json::Value;

use crate::support::edited::{Bench, edit, edit_in, faults, memory, read};
use crate::support::prng::Prng;
use crate::support::recorder::Recorder;
use crate::support::seeds::shared_seeds;
use crate::support::tools;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

pub(crate) fn list(image: &[u8]) -> Vec<Bitmap> {
    Image::open(memory(image)).unwrap().bitmaps().unwrap()
}

fn number(image: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(*image[index(at)..].first_chunk().unwrap())
}

/// The granules of a bitmap, decoded by hand.
pub(crate) fn granules(image: &[u8], name: &str) -> Vec<bool> {
    let header = Image::open(memory(image)).unwrap();
    let (size, cluster) = (header.size(), header.header().geometry.cluster_size());
    let bitmap = list(image).into_iter().find(|bitmap| bitmap.name == name).unwrap();
    let granules = size.div_ceil(1 << bitmap.granularity_bits);
    let bit = |granule: u64| {
        let entry = number(image, bitmap.table.offset.0 + granule / 8 / cluster * 8);
        match entry {
            0 | 1 => entry == 1,
            host => image[index(host + granule / 8 % cluster)] >> (granule % 8) & 1 == 1,
        }
    };
    (0..granules).map(bit).collect()
}

/// What the bitmaps are called and what they are, without their places.
fn described(image: &[u8]) -> Vec<(String, u32, bool, bool)> {
    let describe = |bitmap: Bitmap| (bitmap.name, bitmap.granularity_bits, bitmap.auto, bitmap.in_use);
    list(image).into_iter().map(describe).collect()
}

/// An image whose bitmaps QEMU made and filled: `auto` ones of two granularities, a disabled one, an old one.
fn make(bench: &Bench, options: &str, size: u64) -> Vec<u8> {
    bench.create("image", options, size);
    bench.img(&["bitmap", "--add", "-g", "64k", "image", "coarse"]);
    bench.img(&["bitmap", "--add", "-g", "512", "image", "fine"]);
    bench.img(&["bitmap", "--add", "-g", "4k", "image", "still"]);
    bench.io("image", &[&format!("write -q -P 3 {} {}", size / 4, size / 16), "write -q -P 4 0 513"]);
    bench.img(&["bitmap", "--disable", "image", "still"]);
    bench.load("image")
}

fn options(prng: &mut Prng) -> String {
    let bits = prng.between(9, 17);
    let extended = if bits >= 14 && prng.one_in(2) { ",extended_l2=on" } else { "" };
    format!("cluster_size={}{extended}", 1 << bits)
}

/// Changes the disk; `changed` gets the sectors.
fn change(prng: &mut Prng, writer: &mut Writer, changed: &mut [bool]) {
    let size = writer.header().size;
    let cluster = writer.header().geometry.cluster_size();
    let start = prng.below(size);
    let mut range = start..start + prng.between(1, (size - start).min(100 * KIB));
    match prng.below(4) {
        0 => writer.write_zeroes(range.clone()).unwrap(),
        1 => writer.discard(range.clone()).unwrap(),
        2 => {
            range = start / cluster * cluster..(start / cluster * cluster + cluster).min(size);
            let bytes = vec![7; index(range.end - range.start)];
            writer.write_compressed(&bytes, GuestOffset(range.start)).unwrap();
        }
        _ => writer.write(&prng.bytes(index(range.end - range.start)), GuestOffset(start)).unwrap(),
    }
    // a discard or zeroes work on whole clusters, and not where there is nothing to do
    let sectors = range.start / 512..range.end.div_ceil(512);
    changed[index(sectors.start)..index(sectors.end)].fill(true);
}

fn bitmaps_know_what_was_written(seed: u64) {
    let prng = &mut Prng::stream(seed, 80);
    let (bench, options) = (Bench::new(), options(prng));
    let size = prng.between(1, 6 * MIB / 512) * 512;
    let said = format!("seed {seed}: {options}, {size} bytes");
    let mut image = make(&bench, &options, size);
    let described_before = described(&image);
    for _ in 0..3 {
        let before = image.clone();
        let disk = read(&before);
        let mut touched = vec![false; index(size / 512)];
        image = edit(&before, |writer| {
            for _ in 0..prng.below(8) {
                change(prng, writer, &mut touched);
            }
        });
        // at least what reads otherwise now
        let now = read(&image);
        let differs: Vec<bool> = disk.chunks(512).zip(now.chunks(512)).map(|(old, new)| old != new).collect();
        for (name, granularity) in [("coarse", 64 * KIB), ("fine", 512)] {
            let (old, new) = (granules(&before, name), granules(&image, name));
            let each = index(granularity / 512);
            for (granule, is_set) in new.iter().enumerate() {
                let sectors = granule * each..differs.len().min((granule + 1) * each);
                let must = old[granule] || differs[sectors.clone()].contains(&true);
                assert!(*is_set || !must, "{said}: {name} has lost granule {granule}");
                let cluster = index(cluster_of(&options).max(granularity) / 512);
                let near = sectors.start / cluster * cluster..sectors.end.next_multiple_of(cluster).min(touched.len());
                let may = old[granule] || touched[near].contains(&true);
                assert!(!*is_set || may, "{said}: {name} has granule {granule} without reason");
            }
        }
        assert_eq!(granules(&before, "still"), granules(&image, "still"), "{said}");
        assert_eq!(described(&image), described_before, "{said}");
        bench.assert_clean(&image, &said);
    }
    // QEMU goes on with it
    bench.img(&["bitmap", "--remove", "judged", "coarse"]).img(&["bitmap", "--add", "judged", "new"]);
    bench.io("judged", &["write -q -P 8 0 512"]);
    bench.assert_clean(&bench.load("judged"), &said);
}

fn cluster_of(options: &str) -> u64 {
    options.split(['=', ',']).find_map(|word| word.parse().ok()).unwrap()
}

shared_seeds! {
    bitmaps_know_what_was_written, 32;
    bitmaps_know_what_was_written_0 = 0, bitmaps_know_what_was_written_1 = 1,
    bitmaps_know_what_was_written_2 = 2, bitmaps_know_what_was_written_3 = 3,
    bitmaps_know_what_was_written_4 = 4, bitmaps_know_what_was_written_5 = 5,
    bitmaps_know_what_was_written_6 = 6, bitmaps_know_what_was_written_7 = 7,
}

fn bitmaps_follow_the_size(seed: u64) {
    let prng = &mut Prng::stream(seed, 81);
    let (bench, options) = (Bench::new(), options(prng));
    let size = |prng: &mut Prng| {
        let most = *prng.pick(&[MIB, 8 * MIB]);
        prng.between(1, most / 512) * 512
    };
    let first = size(prng);
    let mut said = format!("seed {seed}: {options}, {first} bytes");
    let mut image = make(&bench, &options, first);
    let described_before = described(&image);
    for _ in 0..4 {
        let to = size(prng);
        write!(said, ", {to}").unwrap();
        let before = image;
        image = edit(&before, |writer| writer.resize(to).unwrap());
        for (name, granularity) in [("coarse", 64 * KIB), ("fine", 512), ("still", 4 * KIB)] {
            let kept = index(Image::open(memory(&before)).unwrap().size().min(to).div_ceil(granularity));
            let (old, new) = (granules(&before, name), granules(&image, name));
            assert_eq!(new.len() as u64, to.div_ceil(granularity), "{said}: {name}");
            assert!(old[..kept] == new[..kept], "{said}: {name} is not what it was");
            assert!(!new[kept..].contains(&true), "{said}: {name} has bits of new space");
        }
        assert_eq!(described(&image), described_before, "{said}");
        bench.assert_clean(&image, &said);
    }
    bench.img(&["resize", "-q", "-f", "qcow2", "judged", "9M"]).img(&["bitmap", "--clear", "judged", "fine"]);
    bench.assert_clean(&bench.load("judged"), &said);
}

shared_seeds! {
    bitmaps_follow_the_size, 32;
    bitmaps_follow_the_size_0 = 0, bitmaps_follow_the_size_1 = 1,
    bitmaps_follow_the_size_2 = 2, bitmaps_follow_the_size_3 = 3,
    bitmaps_follow_the_size_4 = 4, bitmaps_follow_the_size_5 = 5,
    bitmaps_follow_the_size_6 = 6, bitmaps_follow_the_size_7 = 7,
}

/// After a crash, a bitmap that is not in use knows all that reads otherwise than before.
#[test]
fn a_crash_leaves_a_bitmap_that_is_right_or_says_that_it_is_not() {
    for (seed, options) in (0..).zip(["cluster_size=512", "cluster_size=4k", "cluster_size=64k"]) {
        for work in ["write", "shrink", "grow", "remove"] {
            let prng = &mut Prng::stream(seed, 82);
            let bench = Bench::new();
            let before = make(&bench, options, MIB);
            let disk = read(&before);
            let recorder = Arc::new(Recorder::new(before.clone()));
            edit_in(recorder.clone(), |writer| match work {
                "write" => {
                    writer.write(&prng.bytes(70_000), GuestOffset(1000)).unwrap();
                    writer.flush().unwrap();
                    writer.discard(300_000..600_000).unwrap();
                }
                "shrink" => writer.resize(300 * KIB).unwrap(),
                "grow" => writer.resize(20 * MIB).unwrap(),
                _ => writer.remove_bitmap("fine").unwrap(),
            });
            for done in 0..=recorder.steps().len() {
                for _ in 0..4 {
                    let said = format!("{options}, {work}, {done} steps");
                    let image = recorder.crashed(done, prng);
                    assert_eq!(faults(&image).0, 0, "{said}");
                    let now = read(&image);
                    for bitmap in list(&image).into_iter().filter(|bitmap| !bitmap.in_use) {
                        let granularity = 1 << bitmap.granularity_bits;
                        let (was, is) = (granules(&before, &bitmap.name), granules(&image, &bitmap.name));
                        for (granule, (old, new)) in disk.chunks(granularity).zip(now.chunks(granularity)).enumerate() {
                            let cut = old.len().min(new.len());
                            let must = was[granule] || (bitmap.auto && old[..cut] != new[..cut]);
                            assert!(is[granule] || !must, "{said}: {} has lost granule {granule}", bitmap.name);
                        }
                    }
                }
            }
            bench.assert_clean(&recorder.crashed(recorder.steps().len(), prng), work);
        }
    }
}

#[test]
fn a_writer_that_never_finished_leaves_bitmaps_that_say_so_and_nobody_believes_them_again() {
    let bench = Bench::new();
    let before = make(&bench, "cluster_size=4k", MIB);
    let storage = memory(&before);
    let mut writer = Writer::open(storage.clone()).unwrap();
    assert!(storage.to_vec() == before, "an image was changed when it was opened");
    writer.write(&[1; 5], GuestOffset(9)).unwrap();
    assert!(writer.bitmaps().iter().all(|bitmap| !bitmap.in_use));
    writer.flush().unwrap();
    drop(writer);
    let in_use = |image: &[u8]| -> Vec<bool> { list(image).iter().map(|bitmap| bitmap.in_use).collect() };
    let left = storage.to_vec();
    assert_eq!(in_use(&left), [true, true, false]);
    bench.assert_clean(&left, "left");
    let image = edit(&left, |writer| {
        assert_eq!(writer.bitmaps().iter().filter(|bitmap| bitmap.in_use).count(), 2);
        writer.write(&[2; 5], GuestOffset(9)).unwrap();
        writer.resize(5 * MIB).unwrap();
        writer.remove_bitmap("fine").unwrap();
    });
    assert_eq!(in_use(&image), [true, false]);
    bench.assert_clean(&image, "once more");
}

/// Making and deleting snapshots does not end a writer's knowledge of what was written before.
#[test]
fn bitmaps_know_what_was_written_before_and_after_a_snapshot_was_made() {
    for options in ["cluster_size=512", "cluster_size=64k"] {
        let bench = Bench::new();
        let before = make(&bench, options, MIB);
        let image = edit(&before, |writer| {
            writer.write(&[1; 5], GuestOffset(9)).unwrap();
            let id = writer.create_snapshot("one", std::time::Duration::ZERO).unwrap();
            assert!(writer.bitmaps().iter().all(|bitmap| !bitmap.in_use));
            writer.write(&[1; 5], GuestOffset(700_000)).unwrap();
            writer.delete_snapshot(&id).unwrap();
            writer.resize(2 * MIB).unwrap();
        });
        assert_eq!(described(&image), described(&before), "{options}");
        let fine = granules(&image, "fine");
        assert!(fine[0] && fine[700_000 / 512], "{options}");
        bench.assert_clean(&image, options);
    }
}

#[test]
fn removed_bitmaps_give_their_clusters_back_and_the_last_takes_the_extension_with_it() {
    for options in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k"] {
        let bench = Bench::new();
        let mut image = make(&bench, options, 4 * MIB);
        for (name, left) in [("fine", vec!["coarse", "still"]), ("coarse", vec!["still"]), ("still", vec![])] {
            let before = image;
            image = edit(&before, |writer| {
                writer.remove_bitmap(name).unwrap();
                assert!(matches!(writer.remove_bitmap(name), Err(Error::NoSuch { .. })));
                assert_eq!(writer.bitmaps().len(), left.len());
            });
            bench.assert_clean(&image, name);
            let names: Vec<String> = list(&image).into_iter().map(|bitmap| bitmap.name).collect();
            assert_eq!(names, left);
            for name in left {
                assert!(granules(&before, name) == granules(&image, name));
            }
        }
        let header = Image::open(memory(&image)).unwrap().header().clone();
        assert_eq!((header.extensions.bitmaps, header.features.autoclear), (None, 0));
        bench.img(&["bitmap", "--add", "judged", "again"]);
    }
}

/// What QEMU says is dirty, over NBD.
fn dirty(bench: &Bench, name: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = bench.path("nbd");
    let mut server = tools::qemu_nbd_of("10.0");
    server.args(["-r", "-f", "qcow2", "-B", bitmap, "-k"]).arg(&socket).arg(bench.path(name));
    let mut server = server.stdout(Stdio::null()).spawn().unwrap();
    while !socket.exists() && server.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let server_path = socket.to_str().unwrap();
    let export =
        format!("driver=nbd,server.type=unix,server.path={server_path},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}");
    let map = tools::run(tools::qemu_img().args(["map", "--output=json", "--image-opts", &export]));
    server.wait().unwrap();
    let map: Value = serde_json::from_str(&map).unwrap();
    let extents = map.as_array().unwrap().iter().filter(|extent| extent["data"] == false);
    extents.map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap())).collect()
}

#[test]
fn qemu_reads_the_bits_that_were_written() {
    let bench = Bench::new();
    bench.create("image", "cluster_size=64k", 4 * MIB).img(&["bitmap", "--add", "-g", "4k", "image", "b"]);
    bench.io("image", &["write -q -P 1 1M 4k"]);
    let image = edit(&bench.load("image"), |writer| {
        writer.write(&[1; 10], GuestOffset(5000)).unwrap();
        writer.resize(8 * MIB).unwrap();
        writer.write(&[1; 10], GuestOffset(8 * MIB - 10)).unwrap();
    });
    bench.save("image", &image);
    assert_eq!(dirty(&bench, "image", "b"), [(4096, 4096), (MIB, 4096), (8 * MIB - 4096, 4096)]);
    // all of it: one table entry says so
    let image = edit(&image, |writer| writer.write_zeroes(0..8 * MIB).unwrap());
    bench.assert_clean(&image, "all");
    assert!(granules(&image, "b").iter().all(|is_set| *is_set));
}

#[test]
fn bitmaps_that_nobody_believes_are_left_alone() {
    let bench = Bench::new();
    let mut before = make(&bench, "cluster_size=4k", MIB);
    // some program that knows no bitmaps wrote to the image
    before[88..96].fill(0);
    let leaks = faults(&before);
    let image = edit(&before, |writer| {
        assert_eq!(writer.bitmaps(), []);
        writer.write(&[1; 5000], GuestOffset(9)).unwrap();
        writer.resize(2 * MIB).unwrap();
        assert!(matches!(writer.remove_bitmap("fine"), Err(Error::NoSuch { .. })));
    });
    assert_eq!(faults(&image), leaks);
    assert_eq!(list(&image), []);
}

#[test]
fn what_would_make_a_bitmap_wrong_is_refused_before_anything_is_changed() {
    let bench = Bench::new();
    let before = make(&bench, "cluster_size=2M", 4 * MIB);
    // bits of 512 bytes each, in at most 512 MiB
    let most = (512 * MIB) * 8 * 512;
    for (size, why) in [(0, "cannot have bitmaps"), (most + 1, "a bitmap would have")] {
        let storage = memory(&before);
        let mut writer = Writer::open(storage.clone()).unwrap();
        let error = writer.resize(size).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        drop(writer);
        assert!(storage.to_vec() == before);
    }
}

#[test]
fn damaged_bitmaps_are_errors() {
    let bench = Bench::new();
    let image = make(&bench, "cluster_size=4k", MIB);
    let tables: Vec<u64> = list(&image).iter().map(|bitmap| bitmap.table.offset.0).collect();
    let directory = Image::open(memory(&image)).unwrap().header().extensions.bitmaps.unwrap().directory_offset.0;
    let write = |image: &[u8]| {
        let mut writer = Writer::open(memory(image))?;
        writer.write(&[1; 5], GuestOffset(900_000))?;
        writer.finish()
    };
    write(&image).unwrap();
    let broken = |at: u64, value: u64| {
        let mut image = image.clone();
        image[index(at)..index(at) + 8].copy_from_slice(&value.to_be_bytes());
        write(&image).unwrap_err().to_string()
    };
    let length = memory(&image).length();
    assert!(broken(tables[0], 7).contains("bitmap table entry is 0x7"));
    assert!(broken(tables[0], 512).contains("bitmap table entry is 0x200"));
    assert!(broken(tables[0], length.next_multiple_of(4096) + 4096).contains("before the end"));
    assert!(broken(tables[1], u64::MAX).contains("bitmap table entry"));
    assert!(broken(directory, tables[1]).contains("lie in the same place"));
    assert!(broken(directory, length.next_multiple_of(4096)).contains("bitmap table"));
    assert!(broken(directory + 8, u64::MAX).contains("bitmap_table_size"));
}
