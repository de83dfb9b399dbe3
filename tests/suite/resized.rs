//! Disks that become longer and shorter in place.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::Arc;

use qmpbackup::qcow2::{self, Error, GuestOffset, Writer};

use crate::support::edited::{Bench, assert_same_disk, edit, edit_in, faults, memory, read};
use crate::support::prng::Prng;
use crate::support::recorder::Recorder;
use crate::support::seeds::shared_seeds;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// A size that makes L1 tables longer and shorter where clusters are small.
fn size(prng: &mut Prng, unit: u64) -> u64 {
    let most = *prng.pick(&[70 * KIB, 700 * KIB, 5 * MIB]);
    prng.between(1, most / unit) * unit
}

fn change(prng: &mut Prng, writer: &mut Writer, disk: &mut [u8], said: &mut String) {
    let size = disk.len() as u64;
    let start = prng.below(size);
    let end = start + prng.between(1, (size - start).min(300 * KIB));
    let kind = prng.below(4);
    write!(said, "\n{kind}: {start}..{end}").unwrap();
    let part = &mut disk[index(start)..index(end)];
    match kind {
        0 => {
            writer.write_zeroes(start..end).unwrap();
            part.fill(0);
        }
        1 => {
            writer.discard(start..end).unwrap();
            writer.read(part, GuestOffset(start)).unwrap();
        }
        _ => {
            part.copy_from_slice(&prng.bytes(part.len()));
            writer.write(part, GuestOffset(start)).unwrap();
        }
    }
}

fn draw_options(prng: &mut Prng) -> String {
    let bits = prng.between(9, 17);
    let extended = bits >= 14 && prng.one_in(2);
    let version = if !extended && prng.one_in(4) { "compat=0.10" } else { "compat=1.1" };
    let refcounts = if version == "compat=1.1" { 1 << prng.between(3, 6) } else { 16 };
    let extended = if extended { ",extended_l2=on" } else { "" };
    format!("{version},cluster_size={},refcount_bits={refcounts}{extended}", 1 << bits)
}

/// A compressed cluster if there is room for one, and others.
fn fill(bench: &Bench, options: &str, size: u64) {
    let cluster = options.split(['=', ',']).find_map(|word| word.parse::<u64>().ok()).unwrap();
    let compressed = format!("write -q -c -P 9 0 {}", cluster.min(size));
    bench.io("image", &[&compressed, &format!("write -q -P 7 {} {}", size / 3, size / 2)]);
}

fn sizes_go_up_and_down(seed: u64) {
    let prng = &mut Prng::stream(seed, 70);
    let (bench, options) = (Bench::new(), draw_options(prng));
    let unit = *prng.pick(&[1, 512, 512]);
    let first = size(prng, 512);
    let mut said = format!("seed {seed}: {options}, {first} bytes");
    bench.create("image", &options, first);
    fill(&bench, &options, first);
    let has_snapshot = options.contains("1.1") && prng.one_in(2);
    if has_snapshot {
        bench.img(&["snapshot", "-c", "s", "image"]);
    }
    let mut disk = bench.disk("image", None);
    let of_snapshot = disk.clone();
    let mut image = bench.load("image");
    for _ in 0..6 {
        let to = size(prng, unit);
        write!(said, "\nsize {to}").unwrap();
        // QEMU's own way to this size
        if to % 512 == 0 {
            bench.save("theirs", &image);
            bench.img(&["resize", "-q", "-f", "qcow2", "--shrink", "theirs", &to.to_string()]);
        }
        image = edit(&image, |writer| {
            writer.resize(to).unwrap();
            assert_eq!(writer.header().size, to);
        });
        disk.resize(index(to), 0);
        assert_same_disk(&read(&image), &disk, &said);
        bench.assert_clean(&image, &said);
        if to % 512 == 0 {
            assert_same_disk(&bench.disk("theirs", None), &disk, &said);
            assert_same_disk(&bench.disk("judged", None), &disk, &said);
        }
        if has_snapshot {
            // QEMU shows as much of it as the disk is long now
            let shown = bench.disk("judged", Some("s"));
            let both = shown.len().min(of_snapshot.len());
            assert_same_disk(&shown[..both], &of_snapshot[..both], &said);
        }
        image = edit(&image, |writer| {
            for _ in 0..prng.below(6) {
                change(prng, writer, &mut disk, &mut said);
                if prng.one_in(4) {
                    let to = size(prng, unit);
                    write!(said, "\nsize {to} at once").unwrap();
                    writer.resize(to).unwrap();
                    disk.resize(index(to), 0);
                }
            }
        });
        assert_same_disk(&read(&image), &disk, &said);
        bench.assert_clean(&image, &said);
    }
}

shared_seeds! {
    sizes_go_up_and_down, 48;
    any_size_after_any_other_0 = 0, any_size_after_any_other_1 = 1,
    any_size_after_any_other_2 = 2, any_size_after_any_other_3 = 3,
    any_size_after_any_other_4 = 4, any_size_after_any_other_5 = 5,
    any_size_after_any_other_6 = 6, any_size_after_any_other_7 = 7,
}

fn a_crash(seed: u64) {
    let prng = &mut Prng::stream(seed, 71);
    let (bench, options) = (Bench::new(), draw_options(prng));
    let first = size(prng, 512);
    bench.create("image", &options, first);
    fill(&bench, &options, first);
    if options.contains("1.1") && prng.one_in(2) {
        bench.img(&["snapshot", "-c", "s", "image"]);
    }
    let disk = bench.disk("image", None);
    let to = size(prng, 512);
    let said = format!("seed {seed}: {options}, from {first} to {to}");
    let recorder = Arc::new(Recorder::new(bench.load("image")));
    edit_in(recorder.clone(), |writer| writer.resize(to).unwrap());
    let mut sizes = std::collections::BTreeSet::new();
    let kept = index(first.min(to));
    for done in 0..=recorder.steps().len() {
        for _ in 0..6 {
            let image = recorder.crashed(done, prng);
            assert_eq!(faults(&image).0, 0, "{said}, {done} steps");
            let now = read(&image);
            assert!([first, to].contains(&(now.len() as u64)), "{said}, {done} steps: {}", now.len());
            assert_same_disk(&now[..kept], &disk[..kept], &said);
            if to > first && now.len() as u64 == to {
                assert!(now[kept..].iter().all(|byte| *byte == 0), "{said}, {done} steps");
            }
            sizes.insert(now.len());
        }
    }
    assert_eq!(sizes.len(), if first == to { 1 } else { 2 }, "{said}");
}

shared_seeds! {
    a_crash, 48;
    a_crash_leaves_the_old_size_or_the_new_0 = 0, a_crash_leaves_the_old_size_or_the_new_1 = 1,
    a_crash_leaves_the_old_size_or_the_new_2 = 2, a_crash_leaves_the_old_size_or_the_new_3 = 3,
    a_crash_leaves_the_old_size_or_the_new_4 = 4, a_crash_leaves_the_old_size_or_the_new_5 = 5,
    a_crash_leaves_the_old_size_or_the_new_6 = 6, a_crash_leaves_the_old_size_or_the_new_7 = 7,
}

#[test]
fn new_space_does_not_show_a_longer_backing_file() {
    for options in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "extended_l2=on,cluster_size=16k"] {
        let bench = Bench::new();
        bench.create("below", "cluster_size=64k", MIB).io("below", &["write -q -P 5 0 1M"]);
        let based = format!("{options},backing_file=below,backing_fmt=qcow2");
        bench.create("image", &based, 256 * KIB).io("image", &["write -q -P 6 100k 9k"]);
        let mut disk = bench.disk("image", None);
        let image = edit(&bench.load("image"), |writer| {
            writer.resize(700 * KIB).unwrap();
            writer.resize(300 * KIB).unwrap();
            writer.resize(900 * KIB).unwrap();
        });
        bench.assert_clean(&image, options);
        disk.resize(index(900 * KIB), 0);
        assert_same_disk(&bench.disk("judged", None), &disk, options);
    }
}

#[test]
fn a_crash_never_shows_a_longer_backing_file() {
    let prng = &mut Prng::stream(0, 72);
    let bench = Bench::new();
    bench.create("below", "cluster_size=64k", MIB).io("below", &["write -q -P 5 0 1M"]);
    bench.create("image", "cluster_size=512,backing_file=below,backing_fmt=qcow2", 20 * KIB);
    let recorder = Arc::new(Recorder::new(bench.load("image")));
    edit_in(recorder.clone(), |writer| writer.resize(3 * MIB).unwrap());
    let steps = recorder.steps().len();
    let mut grown = 0;
    for done in 0..=steps {
        let image = recorder.crashed(done, prng);
        assert_eq!(faults(&image).0, 0, "{done} steps");
        if Writer::open(memory(&image)).unwrap().header().size == 3 * MIB {
            bench.save("crashed", &image);
            let disk = bench.disk("crashed", None);
            assert!(disk[index(20 * KIB)..].iter().all(|byte| *byte == 0), "{done} steps");
            grown += 1;
        }
    }
    assert!(grown > 0);
}

#[test]
fn a_crash_never_shows_a_backing_file_behind_the_end_of_a_smaller_disk() {
    let prng = &mut Prng::stream(0, 73);
    for options in ["cluster_size=512", "compat=0.10,cluster_size=512"] {
        let bench = Bench::new();
        bench.create("below", "cluster_size=64k", 256 * KIB).io("below", &["write -q -P 5 0 256k"]);
        let based = format!("{options},backing_file=below,backing_fmt=qcow2");
        bench.create("image", &based, 256 * KIB).io("image", &["write -q -P 6 100k 100k"]);
        let (before, disk) = (bench.load("image"), bench.disk("image", None));
        let recorder = Arc::new(Recorder::new(before));
        edit_in(recorder.clone(), |writer| writer.resize(50 * KIB).unwrap());
        for done in 0..=recorder.count() {
            let image = recorder.crashed(done, prng);
            assert_eq!(faults(&image).0, 0, "{options}, {done} steps");
            bench.save("crashed", &image);
            let now = bench.disk("crashed", None);
            assert!([50 * KIB, 256 * KIB].contains(&(now.len() as u64)), "{options}, {done} steps");
            assert_same_disk(&now, &disk[..now.len()], &format!("{options}, {done} steps"));
        }
        bench.assert_clean(&recorder.now(), options);
    }
}

#[test]
fn what_cannot_be_said_is_refused_before_anything_is_changed() {
    let bench = Bench::new();
    bench.create("v2", "compat=0.10,cluster_size=512", MIB).img(&["snapshot", "-c", "s", "v2"]);
    bench.create("below", "cluster_size=64k", MIB);
    bench.create("v2-based", "compat=0.10,backing_file=below,backing_fmt=qcow2", MIB);
    bench.create("odd-based", "backing_file=below,backing_fmt=qcow2", 100 * KIB);
    bench.create("small", "cluster_size=512", MIB);
    // L1 entries of 32 KiB each, of which there may be 4 Mi
    let limit = (4 * MIB) * 32 * KIB;
    for (name, to, why) in [
        ("v2", 2 * MIB, "snapshots of version 2"),
        ("v2", MIB / 2, "snapshots of version 2"),
        ("v2-based", 2 * MIB, "version 2 has no zero clusters"),
        ("odd-based", MIB, "rests on a backing file"),
        ("small", limit + 1, "the L1 table would have"),
        ("small", u64::MAX, "the L1 table would have"),
    ] {
        let storage = memory(&bench.load(name));
        let mut writer = Writer::open(storage.clone()).unwrap();
        let error = writer.resize(to).unwrap_err();
        assert!(error.to_string().contains(why), "{name}: {error}");
        assert!(!matches!(error, Error::Failed));
        // nothing has failed: it goes on
        writer.flush().unwrap();
        assert!(storage.to_vec() == bench.load(name), "{name} was changed");
    }
    let image = edit(&bench.load("v2-based"), |writer| writer.resize(MIB / 2).unwrap());
    bench.assert_clean(&image, "v2-based");
    let image = edit(&bench.load("small"), |writer| writer.resize(limit / 64).unwrap());
    bench.assert_clean(&image, "small");
}

#[test]
fn what_lies_behind_the_end_of_a_disk_is_zeroes_when_it_grows() {
    let bench = Bench::new();
    for (name, options) in [("a", "cluster_size=4k"), ("b", "cluster_size=64k,extended_l2=on"), ("c", "compat=0.10")] {
        bench.create(name, options, MIB).io(name, &["write -q -P 5 0 1M"]);
        let mut image = bench.load(name);
        // a disk that somebody made shorter without a look at its clusters
        image[24..32].copy_from_slice(&(100 * KIB + 1).to_be_bytes());
        let image = edit(&image, |writer| writer.resize(MIB).unwrap());
        bench.assert_clean(&image, name);
        let mut disk = vec![5; index(100 * KIB + 1)];
        disk.resize(index(MIB), 0);
        assert_same_disk(&read(&image), &disk, name);
    }
}

#[test]
fn the_state_of_a_machine_stays_behind_a_disk_that_shrinks_and_does_not_show_in_one_that_grows() {
    let bench = Bench::new();
    // an L1 entry stands for 32 KiB
    bench.create("image", "cluster_size=512", 64 * KIB).io("image", &["write -q -P 5 0 64k", "write -q -b -P 9 0 20k"]);
    let image = edit(&bench.load("image"), |writer| writer.resize(40 * KIB).unwrap());
    bench.assert_clean(&image, "shrunk");
    bench.io("judged", &["read -q -b -P 9 0 20k"]);
    let image = edit(&image, |writer| writer.resize(300 * KIB).unwrap());
    bench.assert_clean(&image, "grown");
    let disk = read(&image);
    assert!(disk[..index(40 * KIB)].iter().all(|byte| *byte == 5));
    assert!(disk[index(40 * KIB)..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_smaller_disk_gives_its_clusters_back() {
    let bench = Bench::new();
    bench.create("image", "cluster_size=512", MIB).io("image", &["write -q -P 5 0 1M"]);
    let image = edit(&bench.load("image"), |writer| writer.resize(KIB).unwrap());
    bench.assert_clean(&image, "shrunk");
    let report = qcow2::check(&*memory(&image), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(report.clusters.allocated, 2);
    let before = image.len();
    let image = edit(&image, |writer| {
        writer.resize(MIB).unwrap();
        writer.write(&vec![6; index(MIB / 2)], GuestOffset(MIB / 2)).unwrap();
    });
    assert_eq!(image.len(), before);
}
