//! `merge --salvage` of images whose metadata can be read and is wrong.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use qmpbackup::chain::{Checksums, Manifest, Stage, Unfinished, Work};
use qmpbackup::qcow2::{CompressionType, Deflater};

use crate::support::program::{Backup, Ended, SIZE, event, qmprestore};
use crate::support::tools;

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
fn what_no_checksums_vouch_for_is_a_warning_where_that_was_asked_for() {
    let backup = Backup::new();
    backup.merged(["--salvage", "--out=out"]).with(0);
    for verify in [&["--verify"][..], &["--verify", "--salvage"]] {
        backup.merged([&["--force", "--out=out"], verify].concat()).with(3).says("FULL-1793588400-disk.qcow2");
    }
}

#[test]
fn a_header_field_that_no_read_needs_costs_nothing() {
    for manifests in [true, false] {
        let backup = if manifests { with_manifests() } else { Backup::new() };
        let right = merged_raw(&backup);
        let fields = [
            (8, 1 << 50),
            (8, 5),
            (48, 0x10001),
            (56, 1 << 50),
            (60, 0xffff_ffff << 32),
            (64, 1),
            (96, 9 << 32 | 0x68),
            (96, 4 << 32 | 7),
        ];
        for (at, value) in fields {
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
                // refcounts that are left out of a header contradict nothing
                assert!(!ended.events().iter().any(|event| event["event"] == "anywhere"), "{at}: {ended:#?}");
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
fn a_size_that_only_a_damaged_header_tells_is_called_a_guess() {
    for with_manifest in [false, true] {
        let backup = with_manifests();
        if !with_manifest {
            backup.images.iter().for_each(|image| std::fs::remove_file(Manifest::path(image)).unwrap());
        }
        put(&backup.images[3], 24, SIZE / 2);
        let ended = backup.merged(["--salvage", "--format=raw", "--out=out"]).with(3);
        assert_eq!(ended.stderr.contains("33554432 bytes are a guess"), !with_manifest, "{ended:#?}");
    }
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
pub(crate) fn build(path: &Path, (cluster_bits, size): (u32, u64), entry: impl Fn(u64, u64) -> u64, data: &[u8]) {
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
pub(crate) struct Cost {
    pub(crate) code: Option<i32>,
    /// Its peak of memory in KiB.
    peak: u64,
    pub(crate) reads: u64,
    /// Of all its processors together: that others use them, too, makes it no longer.
    time: Duration,
}

/// Runs a command to its end.
pub(crate) fn measured(mut command: Command) -> Cost {
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
        let mut stream = Deflater::new(CompressionType::Deflate, 2 << 20).deflate(&vec![7; 2 << 20]).unwrap().to_vec();
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

#[test]
fn an_l1_table_that_leads_to_one_place_costs_as_much_as_its_entries_not_as_the_disk() {
    const ENTRIES: u64 = 65_536;
    const COVERAGE: u64 = 1 << 39;
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("FULL-1700000000-disk");
    // every one of them; and every other one, the rest leads nowhere
    for step in [1, 2] {
        build(&full, (21, COVERAGE), |number, data| if number == 0 { 1 << 63 | data } else { 0 }, &[5; 512]);
        put(&full, 24, ENTRIES * COVERAGE);
        File::options().write(true).open(&full).unwrap().write_all_at(&[0, 1, 0, 0], 36).unwrap();
        let (l1, l2) = (3 << 21, 4 << 21);
        let table = (0..ENTRIES).flat_map(|entry| if entry % step == 0 { l2 } else { 0_u64 }.to_be_bytes());
        File::options().write(true).open(&full).unwrap().write_all_at(&table.collect::<Vec<u8>>(), l1).unwrap();
        let salvage = |words: &[&str]| {
            let mut command = qmprestore(["merge", "--salvage", "--force", "--dir"]);
            command.arg(folder.path()).arg("--out").arg(folder.path().join("out/out")).args(words);
            command
        };
        let cost = measured(salvage(&[]));
        assert_eq!(cost.code, Some(3), "{step}: {cost:?}");
        assert!(cost.time < Duration::from_secs(5) && cost.peak < 256 << 10, "{step}: {cost:?}");
        let lost = listed(&Ended::of(&mut salvage(&["--json"])).with(3), "lost");
        let each: Vec<Range<u64>> = (0..ENTRIES / 2).map(|at| at * 2 * COVERAGE..(at * 2 + 1) * COVERAGE).collect();
        if step == 1 {
            assert_eq!(lost, std::slice::from_ref(&(0..ENTRIES * COVERAGE)));
        } else {
            assert!(lost == each[..lost.len()] && lost.len() == 10_000, "{}", lost.len());
        }
    }
}

#[test]
fn where_a_list_of_losses_ends_is_said() {
    const LISTED: u64 = 10_000;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("FULL-1700000000-disk");
    let salvage = |losses: u64, words: &[&str]| {
        build(&image, (9, losses * 1024), |number, _| if number % 2 == 1 { BAD } else { 0 }, &[]);
        let mut command = qmprestore(["merge", "--salvage", "--format=raw", "--force", "--dir"]);
        command.arg(folder.path()).args(words).arg("--out").arg(folder.path().join("out"));
        Ended::of(&mut command).with(3)
    };
    for words in [&[][..], &["--dry-run"]] {
        let json = [words, &["--json"]].concat();
        let whole = salvage(LISTED, &json);
        assert_eq!(listed(&whole, "lost").len() as u64, LISTED);
        assert!(whole.events().iter().all(|event| event["event"] != "unlisted"));
        salvage(LISTED, words).says_not("more, from");

        let ended = salvage(LISTED + 7, &json);
        let losses = listed(&ended, "lost");
        let start = LISTED * 1024 + 512;
        assert_eq!((losses.len() as u64, losses.last().unwrap().end), (LISTED, start - 512));
        let events = ended.events();
        let unlisted = event(&events, "unlisted");
        assert_eq!((&unlisted["start"], &unlisted["losses"]), (&start.into(), &7.into()), "{unlisted}");
        let done = event(&events, "done");
        assert_eq!((&done["losses"], &done["unlisted"]), (&(LISTED + 7).into(), &7.into()), "{done}");
        assert_eq!(done["lost"], (LISTED + 7) * 512, "{done}");
        salvage(LISTED + 7, words).says(&format!("and 7 more, from {start:#x} on"));
    }
}

/// What work in place or a failed run leaves behind is wrong somewhere, and nobody knows where.
#[test]
fn what_may_be_wrong_anywhere_is_said_where_it_cannot_be_listed() {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let judge = |backup: &Backup, kind: &str, said: &str| {
        for dry in [&[][..], &["--dry-run"]] {
            let words = [&["--salvage", "--format=raw", "--out=out", "--force", "--json"], dry].concat();
            let ended = backup.merged(words).with(3).says(said);
            assert_eq!(event(&ended.events(), "anywhere")["kind"], kind, "{ended:#?}");
            assert!(event(&ended.events(), "anywhere")["message"].as_str().is_some(), "{ended:#?}");
        }
        backup.merged(["--format=raw", "--out=other"]).with(4);
    };
    let backup = Backup::new();
    backup.merged(["--salvage", "--format=raw", "--out=out", "--json"]).with(0).says_not("anywhere");
    let full = &backup.images[0];
    let incs = backup.images[1..3].iter().map(|inc| name(inc)).collect();
    let (work, stage) = (Work::Commit, Stage::Writing);
    std::fs::create_dir(backup.dir.join(".qmpbackup")).unwrap();
    Unfinished { work, stage, full: name(full), incs, full_id: None }.write(full).unwrap();
    judge(&backup, "damaged", "may be wrong anywhere: a commit up to");

    let backup = Backup::new();
    let partial = backup.dir.join(format!("INC-1793761300-{}.partial", "disk.qcow2"));
    std::fs::copy(&backup.images[2], partial).unwrap();
    judge(&backup, "stale", "may lack changes: a run before it failed and left");
}

#[test]
fn a_format_that_nothing_tells_is_called_a_guess() {
    let folder = |images: &[&Path]| {
        let folder = tempfile::tempdir().unwrap();
        for (number, image) in images.iter().enumerate() {
            let level = if number == 0 { "FULL" } else { "INC" };
            std::fs::copy(image, folder.path().join(format!("{level}-{}-disk", 1_700_000_000 + number))).unwrap();
        }
        folder
    };
    let salvage = |folder: &Path, words: &[&str]| {
        let mut command = qmprestore(["merge", "--salvage", "--format=raw", "--force", "--dir"]);
        Ended::of(command.arg(folder).args(words).arg("--out").arg(folder.join("out")))
    };
    let backup = Backup::new();
    let [full, inc, ..] = backup.images.as_slice() else { panic!("{:?}", backup.images) };
    let raw = backup.expected(0);
    let (as_raw, as_qcow2) = ("it is read as a raw image;", "it is read as a damaged qcow2 image,");

    // a header of which nothing is left, and a disk that never had one, look the same
    let damaged = folder(&[full]);
    File::options()
        .write(true)
        .open(damaged.path().join("FULL-1700000000-disk"))
        .unwrap()
        .write_all_at(&[7; 512], 0)
        .unwrap();
    salvage(damaged.path(), &[]).with(3).says(as_raw);
    salvage(damaged.path(), &["--source-format=qcow2"])
        .with(4)
        .says_not("--salvage")
        .says("`qmprestore list` shows other restore points");
    let alone = folder(&[&raw]);
    salvage(alone.path(), &[]).with(3).says(as_raw);
    salvage(alone.path(), &["--source-format=raw"]).with(0);
    assert!(std::fs::read(alone.path().join("out")).unwrap() == std::fs::read(&raw).unwrap());

    for images in [[&raw, inc], [full, &raw]] {
        let mixed = folder(&images.map(PathBuf::as_path));
        let ended = salvage(mixed.path(), &["--json"]).with(3).says(as_qcow2).says_not(as_raw);
        let kinds = [listed(&ended, "lost").len(), listed(&ended, "stale").len()];
        assert_ne!(kinds, [0, 0], "{ended:#?}");
    }
    let right = folder(&[full, inc]);
    salvage(right.path(), &[]).with(0);
}

/// Stdout has the disk and nothing else, and the list is on stderr.
#[test]
fn what_is_salvaged_to_stdout_is_what_a_file_would_hold() {
    let backup = with_manifests();
    std::fs::remove_file(&backup.images[2]).unwrap();
    let (at, _) = data_entries(&backup.images[0], 1 << (word(&backup.images[0], 16) & 63))[0];
    put(&backup.images[0], at, BAD);
    let losses = |lines: &str| {
        let lines = crate::support::program::events(lines).into_iter();
        lines.filter(|event| event["event"] == "loss").collect::<Vec<_>>()
    };
    let file = backup.merged(["--salvage", "--format=raw", "--out=file", "--json"]).with(3);
    let file = (std::fs::read(backup.path("file")).unwrap(), losses(&file.stdout));
    assert!(["damaged", "stale"].iter().all(|kind| file.1.iter().any(|loss| loss["kind"] == *kind)), "{:?}", file.1);
    let output = tools::output(&mut backup.merge(["--salvage", "--out=-", "--json"]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(output.stdout == file.0 && losses(&stderr) == file.1, "{stderr}");
    assert_eq!(event(&crate::support::program::events(&stderr), "done")["losses"], file.1.len(), "{stderr}");

    let output = tools::output(&mut backup.merge(["--salvage", "--out=-"]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(output.stdout == file.0, "{stderr}");
    let rows = stderr.lines().filter(|line| line.starts_with("damaged ") || line.starts_with("stale "));
    assert!(rows.count() == file.1.len() && stderr.contains("bytes are lost"), "{stderr}");
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

#[test]
fn tables_that_lie_on_others_are_told_though_all_of_them_can_be_read() {
    let backup = Backup::new();
    let (image, point) = (&backup.images[0], backup.images[0].file_name().unwrap().to_str().unwrap());
    let full = |words: &[&str]| {
        let words = [&["--until", point, "--format=raw", "--force", "--json", "--out=out"], words].concat();
        (backup.merged(&words), std::fs::read(backup.path("out")).unwrap_or_default())
    };
    let cluster_size = 1 << (word(image, 16) & 63);
    let (entry, _) = data_entries(image, cluster_size)[0];
    tools::run(tools::qemu_img().args(["snapshot", "-c", "one"]).arg(image));
    let (ended, right) = full(&[]);
    ended.with(0);
    let (ended, salvaged) = full(&["--salvage"]);
    ended.with(0);
    assert!(salvaged == right);
    let whole = std::fs::read(image).unwrap();
    let l1 = word(image, 40);

    // an L2 table that is the refcount table: nothing of what it maps is certain
    put(image, l1, 1 << 63 | word(image, 48));
    let (ended, salvaged) = full(&["--salvage"]);
    let ended = ended.with(3).says("its tables contradict each other");
    let listed: Vec<Range<u64>> = ["lost", "damaged"].iter().flat_map(|kind| listed(&ended, kind)).collect();
    let differ = (0_u64..).zip(salvaged.iter().zip(&right)).filter(|(_, (is, should))| is != should);
    let mut wrong = 0;
    for (at, _) in differ {
        wrong += 1;
        assert!(listed.iter().any(|range| range.contains(&at)), "{at:#x} is in none of {listed:?}");
    }
    assert!(wrong > 0);
    std::fs::write(image, &whole).unwrap();

    // data that is the L1 table of a snapshot
    put(image, entry, 1 << 63 | word(image, word(image, 64)));
    full(&[]).0.fails(4);
    let (ended, salvaged) = full(&["--salvage"]);
    let ended = ended.with(3).says("its tables contradict each other").says("may be wrong anywhere");
    assert_eq!(event(&ended.events(), "anywhere")["kind"], "damaged");
    assert!(salvaged != right);
}
