//! `merge --salvage` of images whose metadata can be read and is wrong.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use qmpbackup::chain::{Checksums, Manifest};
use qmpbackup::qcow2::{Codec, Deflater};

use crate::program::{Backup, Ended, SIZE, event, qmprestore};
use crate::tools;

fn with_manifests() -> Backup {
    let backup = Backup::new();
    Ended::of(qmprestore(["manifest", "--dir"]).arg(&backup.dir)).with(0);
    backup
}

fn word(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

fn put(path: &Path, at: u64, value: u64) {
    File::options().write(true).open(path).unwrap().write_all_at(&value.to_be_bytes(), at).unwrap();
}

fn merged_raw(backup: &Backup) -> Vec<u8> {
    backup.merged(["--format=raw", "--out=right", "--force"]).with(0);
    std::fs::read(backup.path("right")).unwrap()
}

/// The ranges of a kind that are listed.
fn listed(ended: &Ended, kind: &str) -> Vec<Range<u64>> {
    let losses = ended.events().into_iter().filter(|event| event["event"] == "loss" && event["kind"] == kind);
    let range = |loss: serde_json::Value| {
        let start = loss["start"].as_u64().unwrap();
        start..start + loss["bytes"].as_u64().unwrap()
    };
    losses.map(range).collect()
}

#[test]
fn the_size_in_a_header_is_that_of_the_manifest_or_it_is_refused() {
    for with_sums in [true, false] {
        let backup = with_manifests();
        let right = merged_raw(&backup);
        for image in &backup.images {
            if !with_sums {
                std::fs::remove_file(Checksums::path(image)).unwrap();
            }
            for size in [SIZE * 2, SIZE + 512, SIZE / 2] {
                put(image, 24, size);
                let ended = backup.merged(["--format=raw", "--out=out", "--force"]).with(4);
                // a larger disk may need a longer L1 table
                let said = format!("says that the disk has {size} bytes, but its manifest says {SIZE}");
                assert!(ended.stderr.contains(&said) || size > SIZE && ended.stderr.contains("l1_size"), "{ended:#?}");
                assert!(!backup.path("out").exists());
                let ended = backup.merged(["--salvage", "--format=raw", "--out=salvaged", "--force", "--json"]).with(3);
                let ended = ended.says("is read without what is damaged in its header");
                let salvaged = std::fs::read(backup.path("salvaged")).unwrap();
                assert_eq!(salvaged.len() as u64, SIZE, "{ended:#?}");
                assert!(salvaged == right, "{ended:#?}");
                assert_eq!(event(&ended.events(), "done")["size"], SIZE);
                put(image, 24, SIZE);
            }
        }
    }
}

#[test]
fn a_header_field_that_no_read_needs_costs_nothing() {
    for manifests in [true, false] {
        let backup = if manifests { with_manifests() } else { Backup::new() };
        let right = merged_raw(&backup);
        for (at, value) in
            [(8, 1 << 50), (48, 0x10001), (56, 1 << 50), (64, 1), (96, 9 << 32 | 0x68), (96, 4 << 32 | 7)]
        {
            for image in &backup.images {
                let kept = (word(image, at), word(image, 56));
                put(image, at, value);
                if at == 64 {
                    // the offset matters where there are snapshots
                    put(image, 56, kept.1 | 1);
                }
                let words = ["--salvage", "--format=raw", "--out=salvaged", "--force", "--json"];
                let ended = backup.merged(words);
                let salvaged = std::fs::read(backup.path("salvaged")).unwrap_or_default();
                assert!(salvaged == right, "{at} of {}: {ended:#?}", image.display());
                let plain = backup.merged(["--skip-check", "--format=raw", "--out=out", "--force"]);
                let is_ok = plain.code == Some(0) && !manifests;
                assert_eq!(ended.code, Some(if is_ok { 0 } else { 3 }), "{at}: {ended:#?} {plain:#?}");
                put(image, at, kept.0);
                put(image, 56, kept.1);
            }
        }
    }
}

#[test]
fn a_disk_that_grew_between_two_backups_is_merged() {
    let backup = Backup::new();
    tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(&backup.images[2]).arg("80M"));
    tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(&backup.images[3]).arg("96M"));
    Ended::of(qmprestore(["manifest", "--dir"]).arg(&backup.dir)).with(0);
    assert_eq!(merged_raw(&backup).len(), 96 << 20);
    backup.merged(["--salvage", "--format=raw", "--out=salvaged"]).with(0);
    let right = merged_raw(&backup);
    assert!(std::fs::read(backup.path("salvaged")).unwrap() == right);
    let until = backup.images[2].file_name().unwrap().to_str().unwrap();
    Ended::of(qmprestore(["commit", "--until", until, "--dir"]).arg(&backup.dir)).with(0);
    assert!(merged_raw(&backup) == right);
    Ended::of(qmprestore(["rebase", "--dir"]).arg(&backup.dir)).with(0);
    assert!(merged_raw(&backup) == right);
}

#[test]
fn a_size_that_only_older_images_tell_is_called_a_guess() {
    for backup in [Backup::new(), with_manifests()] {
        put(&backup.images[3], 0, 0);
        let ended = backup.merged(["--salvage", "--format=raw", "--out=out"]).with(3);
        let is_known = Manifest::path(&backup.images[3]).exists();
        assert_eq!(ended.stderr.contains("are a guess"), !is_known, "{ended:#?}");
        assert_eq!(backup.path("out").metadata().unwrap().len(), SIZE);
    }
}

#[test]
fn an_image_that_is_gone_behind_a_damaged_one_is_listed_too() {
    let backup = Backup::new();
    Ended::of(qmprestore(["rebase", "--dir"]).arg(&backup.dir)).with(0);
    put(&backup.images[1], 0, 0);
    std::fs::remove_file(&backup.images[2]).unwrap();
    let ended = backup.merged(["--salvage", "--format=raw", "--out=out", "--json"]).with(3);
    let losses: Vec<_> = ended.events().into_iter().filter(|event| event["event"] == "loss").collect();
    for (number, cause) in [(1, "image"), (2, "missing")] {
        let path = backup.images[number].to_str().unwrap();
        let is_listed = losses.iter().any(|loss| loss["image"] == path && loss["cause"] == cause);
        assert!(is_listed, "{number}: {ended:#?}");
    }
}

/// The places of the entries for plain data in the first L2 table of an image, and the guest clusters that they map.
fn data_entries(image: &Path, cluster_size: u64) -> Vec<(u64, u64)> {
    let table = word(image, word(image, 40)) & 0x00ff_ffff_ffff_fe00;
    let entries = (0..cluster_size / 8).map(|cluster| (table + cluster * 8, cluster));
    entries.filter(|(at, _)| word(image, *at) >> 62 == 2 && word(image, *at) & 1 == 0).collect()
}

#[test]
fn clusters_with_two_owners_are_listed_as_damaged() {
    let backup = Backup::new();
    let image = &backup.images[2];
    let cluster_size = 1 << (word(image, 16) & 63);
    let entries = data_entries(image, cluster_size);
    let ((first, one), (second, other)) = (entries[0], entries[1]);
    let (kept, l1) = (word(image, second), word(image, 40));
    let table = word(image, l1) & 0x00ff_ffff_ffff_fe00;
    let places = [(word(image, first), vec![one, other]), (1 << 63 | l1, vec![other]), (1 << 63 | table, vec![other])];
    for (entry, clusters) in places {
        put(image, second, entry);
        backup.merged(["--format=raw", "--out=out"]).with(4);
        for dry in [&[][..], &["--dry-run"]] {
            let words = [&["--salvage", "--format=raw", "--out=salvaged", "--force", "--json"], dry].concat();
            let ended = backup.merged(words).with(3);
            let listed = listed(&ended, "damaged");
            let held = |cluster: &u64| listed.iter().any(|range| range.contains(&(cluster * cluster_size)));
            assert!(clusters.iter().all(held), "{ended:#?}");
            let bytes: u64 = listed.iter().map(|range| range.end - range.start).sum();
            assert_eq!(bytes, clusters.len() as u64 * cluster_size, "{ended:#?}");
        }
        put(image, second, kept);
    }
    backup.merged(["--salvage", "--format=raw", "--out=out"]).with(0);
}

/// Writes an image of version 3 that has one L1 table, L2 tables with the given entries and some data.
fn build(path: &Path, (cluster_bits, size): (u32, u64), entry: impl Fn(u64, u64) -> u64, data: &[u8]) {
    let cluster = 1_u64 << cluster_bits;
    let clusters = size.div_ceil(cluster);
    let tables = clusters.div_ceil(cluster / 8);
    let l1 = 3 * cluster;
    let l2 = l1 + (tables * 8).div_ceil(cluster) * cluster;
    let behind = l2 + tables * cluster;
    let mut header = [0; 104];
    let number = |value: u64| u32::try_from(value).unwrap();
    for (at, value) in
        [(0, 0x5146_49fb), (4, 3), (20, cluster_bits), (36, number(tables)), (56, 1), (96, 4), (100, 104)]
    {
        header[at..at + 4].copy_from_slice(&u32::to_be_bytes(value));
    }
    for (at, value) in [(24, size), (40, l1), (48, cluster)] {
        header[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
    }
    let file = File::create(path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    let entries = |count: u64, entry: &dyn Fn(u64) -> u64| (0..count).flat_map(|at| entry(at).to_be_bytes()).collect();
    let l1_entries: Vec<u8> = entries(tables, &|table| 1 << 63 | (l2 + table * cluster));
    file.write_all_at(&l1_entries, l1).unwrap();
    let l2_entries: Vec<u8> = entries(clusters, &|number| entry(number, behind));
    file.write_all_at(&l2_entries, l2).unwrap();
    file.write_all_at(data, behind).unwrap();
}

/// What a program took, as looks now and then show it.
#[derive(Debug, Default)]
struct Cost {
    code: Option<i32>,
    /// Its peak of memory in KiB.
    peak: u64,
    reads: u64,
    /// Of all its processors together: that others use them, too, makes it no longer.
    time: Duration,
}

/// Runs a command to its end.
fn measured(mut command: Command) -> Cost {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut cost = Cost::default();
    while child.try_wait().unwrap().is_none() {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", child.id())).unwrap_or_default();
        let number = |file: &str, key: &str| -> u64 {
            let line = read(file).lines().find_map(|line| line.strip_prefix(key).map(str::to_owned));
            line.map_or(0, |line| line.trim().trim_end_matches(" kB").parse().unwrap())
        };
        cost.peak = cost.peak.max(number("status", "VmHWM:"));
        cost.reads = cost.reads.max(number("io", "syscr:"));
        // behind the name in brackets, user and system time are the 12th and 13th field, in hundredths of a second
        let stat = read("stat");
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
        cost.time = cost.time.max(Duration::from_millis(ticks * 10));
        std::thread::sleep(Duration::from_millis(5));
    }
    Cost { code: child.wait().unwrap().code(), ..cost }
}

/// An L2 entry that no image may have.
const BAD: u64 = 0x7f00_0000_0000_0001;

#[test]
fn hostile_images_take_little_time_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("FULL-1700000000-disk");
    let inc = |number: u64| folder.path().join(format!("INC-{}-disk", 1_700_000_000 + number));
    let salvage = |what: &str| {
        let mut command = qmprestore(["merge", "--salvage", "--format=raw", "--threads=2", "--force", "--dir"]);
        let out = tempfile::tempdir().unwrap();
        command.arg(folder.path()).arg("--out").arg(out.path().join("out"));
        let cost = measured(command);
        println!("{what}: {cost:?}");
        assert_eq!(cost.code, Some(3), "{what}");
        assert!(cost.peak < 256 << 10, "{what}: {cost:?}");
        assert!(cost.time < Duration::from_secs(5), "{what}: {cost:?}");
        cost
    };
    // each other cluster is bad
    build(&full, (9, 128 << 20), |number, data| if number % 2 == 1 { BAD } else { 1 << 63 | data }, &[5; 512]);
    salvage("bad entries");
    // in many layers
    let size = 16 << 20;
    build(&full, (9, size), |number, data| if number % 2 == 1 { BAD } else { 1 << 63 | data }, &[5; 512]);
    for number in 1..100 {
        build(&inc(number), (9, size), |number, _| if number % 2 == 1 { BAD } else { 0 }, &[]);
    }
    let tables = 100 * size / 512 / 64;
    let Cost { reads, .. } = salvage("bad entries of many images");
    assert!(reads < 8 * tables, "{reads} reads of {tables} tables");
    (2..100).for_each(|number| std::fs::remove_file(inc(number)).unwrap());
    // a damaged stream of a large cluster, of which each other sector is hidden
    let stream = {
        let mut stream = Deflater::new(Codec::Deflate, 2 << 20).deflate(&vec![7; 2 << 20]).unwrap().to_vec();
        let end = stream.len() - 4;
        stream.truncate(end);
        stream.resize(end.next_multiple_of(512), 0xff);
        stream
    };
    let sectors = stream.len() as u64 / 512 - 1;
    build(&full, (21, size), |_, data| 1 << 62 | sectors << 49 | data, &stream);
    build(&inc(1), (9, size), |number, _| number % 2, &[]);
    salvage("damaged streams");
}

/// What a file that ends within a cluster, or within an L2 table, still holds is salvaged.
#[test]
fn what_lies_before_the_end_of_a_truncated_file_is_not_lost() {
    let backup = Backup::new();
    let (image, point) = (&backup.images[0], backup.images[0].file_name().unwrap().to_str().unwrap());
    let full = |words: &[&str]| {
        let words = [&["--until", point, "--format=raw", "--force", "--json"], words].concat();
        (backup.merged(&words), std::fs::read(backup.path("out")).unwrap())
    };
    let (_, right) = full(&["--out=out"]);
    let cluster_size = 1 << (word(image, 16) & 63);
    let whole = std::fs::read(image).unwrap();
    let entries = data_entries(image, cluster_size);
    let (at, cluster) = *entries.iter().max_by_key(|(at, _)| word(image, *at) & 0x00ff_ffff_ffff_fe00).unwrap();
    let host = word(image, at) & 0x00ff_ffff_ffff_fe00;
    for held in [1000, 4096, cluster_size - 600] {
        File::options().write(true).open(image).unwrap().set_len(host + held).unwrap();
        let (ended, salvaged) = full(&["--salvage", "--out=out"]);
        let losses = listed(&ended.with(3), "lost");
        let start = cluster * cluster_size;
        let cut = start + held / 512 * 512;
        assert!(losses.contains(&(cut..start + cluster_size)), "{held}: {losses:?}");
        let mut right = right.clone();
        for loss in losses {
            right[usize::try_from(loss.start).unwrap()..usize::try_from(loss.end).unwrap()].fill(0);
        }
        assert!(salvaged == right, "{held}");
        std::fs::write(image, &whole).unwrap();
    }

    let l1 = word(image, 40);
    let table = word(image, l1) & 0x00ff_ffff_ffff_fe00;
    let end = (whole.len() as u64).next_multiple_of(cluster_size);
    let split = entries[entries.len() / 2].1;
    let kept = usize::try_from(table).unwrap()..usize::try_from(table + split * 8 + 3).unwrap();
    File::options().write(true).open(image).unwrap().write_all_at(&whole[kept], end).unwrap();
    put(image, l1, 1 << 63 | end);
    let (ended, salvaged) = full(&["--salvage", "--out=out"]);
    let cut = split * cluster_size;
    assert_eq!(listed(&ended.with(3), "lost"), vec![cut..SIZE.min(cluster_size / 8 * cluster_size)]);
    let cut = usize::try_from(cut).unwrap();
    assert!(salvaged[..cut] == right[..cut] && salvaged[..cut].iter().any(|byte| *byte != 0));
}
