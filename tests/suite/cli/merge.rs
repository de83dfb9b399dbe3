//! `qmprestore merge` from outside: options, restore points, outputs, what it refuses and with which exit code.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::program::{Backup, Ended, SIZE, TIMES, event, is_root, qmprestore};
use crate::support::{oracle, sparse, tools};

fn info(path: &Path) -> Value {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(path));
    serde_json::from_str(&info).unwrap()
}

fn assert_disk(backup: &Backup, qcow2: &Path, last: usize) {
    tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(qcow2));
    let raw = backup.path("of the output");
    oracle::convert(qcow2, &raw);
    sparse::assert_same(&raw, &backup.expected(last), "the merged disk");
}

#[test]
fn the_newest_restore_point_becomes_a_qcow2_image() {
    let backup = Backup::new();
    let before = sparse::fingerprints(&backup.dir);
    let out = backup.path("deep/er/disk.qcow2");
    let ended = backup.merged([Path::new("--out"), &out]).with(0);
    assert_eq!(ended.stdout, "");
    let ended = ended.says("INC-1793847600-disk.qcow2 of disk.qcow2 is in ").says("a disk of 64 MiB, 4 MiB moved in ");
    let (time, rest) = ended.stderr.split_once(']').unwrap();
    assert!(time.len() == "[2022-01-27 19:41:33,819".len() && time.as_bytes()[20] == b',', "{time}");
    assert!(rest.starts_with("    INFO  INC-"), "{rest}");
    assert_disk(&backup, &out, 3);
    assert_eq!(sparse::fingerprints(&backup.dir), before);
}

#[test]
fn every_way_to_write_gives_the_same_disk() {
    let backup = Backup::new();
    let cases: [(&[&str], u64, &str); 8] = [
        (&[], 16384, "zlib"),
        (&["--cluster-size", "64K"], 65536, "zlib"),
        (&["--cluster-size=512"], 512, "zlib"),
        (&["--cluster-size", "2MiB", "--threads", "3"], 2 << 20, "zlib"),
        (&["--compress"], 16384, "zlib"),
        (&["--compress", "zstd", "--format", "qcow2"], 16384, "zstd"),
        (&["--skip-check", "--rate-limit", "0"], 16384, "zlib"),
        (&["--source-format=qcow2", "--rate-limit", "1GiB", "--allow-partial"], 16384, "zlib"),
    ];
    for (number, (arguments, cluster_size, codec)) in cases.into_iter().enumerate() {
        let out = backup.path(&number.to_string());
        backup.merged(arguments.iter().copied().chain(["--targetfile", out.to_str().unwrap()])).with(0);
        let info = info(&out);
        assert_eq!(info["cluster-size"], cluster_size, "{arguments:?}");
        assert_eq!(info["format-specific"]["data"]["compression-type"], codec, "{arguments:?}");
        assert_disk(&backup, &out, 3);
    }
    assert!(backup.path("4").metadata().unwrap().len() < backup.path("0").metadata().unwrap().len() / 4);
}

#[test]
fn a_backing_file_may_be_named_with_its_protocol_or_as_options() {
    let backup = Backup::new();
    for number in 1..4 {
        let name = backup.name(number - 1);
        let nested = format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":{name:?}}}}}");
        let flat =
            format!("json:{{\"driver\":\"qcow2\",\"file.driver\":\"throttle\",\"file.file.filename\":{name:?}}}");
        let below = &[format!("file:{name}"), nested, flat][number - 1];
        let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below];
        tools::run(tools::qemu_img().args(rebase).arg(&backup.images[number]));
    }
    backup.merged(["--out", "out.qcow2"]).with(0);
    assert_disk(&backup, &backup.path("out.qcow2"), 3);
    let other = "json:{\"driver\":\"qcow2\",\"file.filename\":\"other\"}";
    tools::run(tools::qemu_img().args(["rebase", "-u", "-F", "qcow2", "-b", other]).arg(&backup.images[3]));
    backup.merged(["--out", "other.qcow2"]).with(4).says("as its backing file, but the image before it");
    backup.merged(["--salvage", "--out", "other.qcow2"]).with(3).says("other  the image is missing");
}

#[test]
fn zeroes_that_are_data_become_holes_where_that_is_wanted() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    let image = dir.join("FULL-1600000000-disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M"));
    let writes = ["write -P 0 0 40M", "write -P 1 4k 4k", "write -P 1 1028k 100", "write -P 1 20M 300k"];
    let commands = writes.iter().flat_map(|write| ["-c", *write]);
    tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(commands).arg(&image));
    let raw = root.path().join("of qemu-img");
    oracle::convert(&image, &raw);
    let extents = |path: &Path| sparse::data_extents(&File::open(path).unwrap());
    for format in ["qcow2", "raw"] {
        let merge = |name: &str, more: &[&str]| {
            let out = root.path().join(format!("{name}.{format}"));
            let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
            command
                .args(["merge", "--verify", "--format", format, "--dir"])
                .arg(&dir)
                .arg("--out")
                .arg(&out)
                .args(more);
            // nothing was summed
            assert_eq!(tools::output(&mut command).status.code(), Some(3));
            out
        };
        let plain = merge("plain", &[]);
        assert!(plain.metadata().unwrap().blocks() * 512 >= 40 << 20);
        let sparse = merge("sparse", &["--detect-zeroes"]);
        let (data, tables) = ((4 << 10) + (4 << 10) + (300 << 10), 1 << 20);
        assert!(sparse.metadata().unwrap().blocks() * 512 <= data + tables, "{format}");
        assert_eq!(sparse.metadata().unwrap().len(), plain.metadata().unwrap().len());
        let one = merge("one thread", &["--detect-zeroes", "--threads", "1"]);
        assert_eq!(extents(&one), extents(&sparse));
        if format == "qcow2" {
            tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(&sparse));
        }
        tools::run(tools::qemu_img().args(["compare", "-q", "-F", "raw", "-f", format]).args([&sparse, &raw]));
    }
}

#[test]
fn raw_goes_to_a_file_with_holes_and_to_stdout() {
    let backup = Backup::new();
    let expected = backup.expected(3);
    let out = backup.path("raw");
    backup.merged(["--format", "raw", "--out", "raw"]).with(0);
    sparse::assert_same(&out, &expected, "a raw file");
    assert!(out.metadata().unwrap().blocks() * 512 < SIZE / 4);

    let stream = backup.path("stream");
    let output = backup.merge(["--out", "-"]).stdout(File::create(&stream).unwrap()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    sparse::assert_same(&stream, &expected, "stdout");
    let output = tools::output(&mut backup.merge(["--out=-", "--format=raw", "--threads=2"]));
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == std::fs::read(&expected).unwrap(), "a pipe");
    assert!(String::from_utf8(output.stderr).unwrap().contains(" is in stdout: "));
}

#[test]
fn stdout_that_nobody_reads_is_an_error_without_a_panic() {
    let backup = Backup::new();
    let mut child = backup.merge(["--out", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended =
        Ended::new(child.wait_with_output().unwrap()).with(1).says("the output stream: cannot be written: Broken pipe");
    assert_eq!(ended.stderr.lines().count(), 1);

    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = backup.merge(["--out", "-"]).stdout(full).output().unwrap();
    Ended::new(output).with(7).says("No space left on device");
}

#[test]
fn stdout_that_is_the_disk_gets_no_error_of_the_arguments() {
    let backup = Backup::new();
    let outs = [&["--out", "-"][..], &["--out=-"], &["--targetfile", "-"], &["--targetfile=-"]];
    for out in outs {
        let words = [out, &["--json", "--bogus"]].concat();
        let output = backup.merge(words).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(2), &b""[..]));
        assert!(String::from_utf8(output.stderr).unwrap().contains("{\"event\":\"error\""));
    }
    let output = backup.merge(["--json", "--out", "x", "--bogus"]).output().unwrap();
    assert!(output.stdout.starts_with(b"{\"event\":\"error\""));
}

/// The clusters of the FULL set no limit to what is no qcow2 image.
#[test]
fn a_raw_output_may_be_larger_than_an_image_with_such_clusters() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join("disk0").join(name);
    std::fs::create_dir(root.path().join("disk0")).unwrap();
    let create = |name: &str, options: &str, size: &str, write: &str| {
        let options = ["create", "-q", "-f", "qcow2", "-o", options];
        tools::run(tools::qemu_img().args(options).arg(path(name)).arg(size));
        tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", write]).arg(path(name)));
    };
    create("FULL-1600000000-disk", "cluster_size=512", "1M", "write -P 1 0 64k");
    create("INC-1600000001-disk", "cluster_size=64k", "200G", "write -P 2 150G 64k");
    let merge = |words: &[&str]| {
        let mut merge = qmprestore(["merge", "--dir"]);
        Ended::of(merge.arg(root.path()).arg("--out").arg(root.path().join("out")).args(words))
    };
    merge(&[]).with(2).says("take larger clusters");
    merge(&["--format=raw"]).with(0);
    let out = File::open(root.path().join("out")).unwrap();
    assert_eq!(out.metadata().unwrap().len(), 200 << 30);
    assert_eq!(sparse::data_extents(&out), [0..64 << 10, 150 << 30..(150 << 30) + (64 << 10)]);
}

#[test]
fn arguments_that_do_not_go_together_are_refused() {
    let backup = Backup::new();
    let before = sparse::fingerprints(backup.root.path());
    let cases: [&[&str]; 17] = [
        &[],
        &["--out", "-", "--format", "qcow2"],
        &["--out", "-", "--compress"],
        &["--out", "-", "--cluster-size", "64K"],
        &["--out", "x", "--format", "raw", "--compress"],
        &["--out", "x", "--format", "raw", "--cluster-size", "64K"],
        &["--out", "x", "--format", "vmdk"],
        &["--out", "x", "--cluster-size", "many"],
        &["--out", "x", "--cluster-size", "3000"],
        &["--out", "x", "--cluster-size", "4M"],
        &["--out", "x", "--compress=lz4"],
        &["--out", "x", "--compress", "lz4"],
        &["--out", "x", "--threads", "0"],
        &["--out", "x", "--rate-limit", "fast"],
        &["--out", "x", "--until", ""],
        &["--out", "x", "--until", "2026-13-01"],
        &["--out", "x", "--progress-interval", "0"],
    ];
    for arguments in cases {
        let ended = backup.merged(arguments).with(2);
        assert!(ended.stdout.is_empty() && !ended.stderr.is_empty(), "{arguments:?}");
    }
    assert_eq!(sparse::fingerprints(backup.root.path()), before);
    Ended::run(["merge", "--out", "x"]).with(2).says("--dir");
    Ended::run(["no such command"]).with(2);
    Ended::run::<&str>([]).with(2);
}

#[test]
fn every_form_of_until_finds_its_restore_point() {
    let now = jiff::Timestamp::now().as_second();
    let days = [9, 5, 3, 1].map(|days| now - days * 24 * 3600);
    let recent = Backup::named("backup/disk0", "disk.qcow2", days);
    let fixed = Backup::new();
    let cases = [
        (&fixed, "latest", 3),
        (&fixed, "1793674800", 1),
        (&fixed, "1793761199", 1),
        (&fixed, "INC-1793761200-disk.qcow2", 2),
        (&fixed, "INC-17936", 1),
        (&fixed, "FULL", 0),
        (&fixed, "2026-11-03T02:59:59Z", 0),
        (&fixed, "2026-11-03T04:00:00+01:00", 1),
        (&fixed, "2026-11-03 03:59", 0),
        (&fixed, "2026-11-03 04:00", 1),
        (&fixed, "2026-11-03T04:00:00", 1),
        (&fixed, "2026-11-03 03:59:59", 0),
        (&fixed, "2026-11-04", 2),
        (&recent, "-2d", 2),
        (&recent, "-97h", 1),
        (&recent, "-1w", 0),
    ];
    for (backup, until, expected) in cases {
        for arguments in [vec!["--until", until], vec![format!("--until={until}").leak() as &str]] {
            let arguments = arguments.into_iter().chain(["--out", "x", "--dry-run", "--json"]);
            let mut command = backup.merge(arguments);
            let ended = Ended::of(command.env("TZ", "CET-1")).with(0);
            let images = event(&ended.events(), "plan")["images"].as_array().unwrap().len();
            assert_eq!(images, expected + 1, "{until}");
        }
    }
    backup_lists_points(&fixed, "INC-2", 2);
    backup_lists_points(&fixed, "2020-01-01", 2);
    backup_lists_points(&fixed, "INC", 2);
    backup_lists_points(&recent, "-4w", 2);
}

fn backup_lists_points(backup: &Backup, until: &str, code: i32) {
    let ended = backup.merged(["--until", until, "--out", "x"]).with(code);
    for image in &backup.images[1..] {
        assert!(ended.stderr.contains(image.file_name().unwrap().to_str().unwrap()), "{until}: {ended:?}");
    }
}

#[test]
fn a_folder_with_several_disks_needs_a_filter() {
    let backup = Backup::new();
    let other = backup.path("backup/disk1");
    std::fs::create_dir(&other).unwrap();
    for image in &backup.images[..2] {
        let name = image.file_name().unwrap().to_str().unwrap().replace("disk.qcow2", "data.qcow2");
        std::fs::copy(image, other.join(name)).unwrap();
    }
    let merge = |more: &[&str]| {
        let arguments = ["merge", "--dir", "backup", "--out", "x", "--dry-run"];
        let mut command = qmprestore(arguments.iter().chain(more));
        Ended::of(command.current_dir(backup.root.path()))
    };
    merge(&[]).with(2).says("disk0, disk1").says("--filter");
    merge(&["--filter", "disk1"]).with(0).says("INC-1793674800-data.qcow2");
    merge(&["--filter=data"]).with(0).says("backup/disk1/");
    merge(&["--filter", "disk2"]).with(2).says("no disk matches").says("disk0, disk1");
    Ended::run([
        "merge",
        "--dir",
        other.parent().unwrap().parent().unwrap().to_str().unwrap(),
        "--out",
        "x",
        "--filter",
        "disk0",
        "--dry-run",
    ])
    .with(0);
    std::fs::create_dir(backup.path("empty")).unwrap();
    Ended::run([Path::new("merge"), Path::new("--dir"), &backup.path("empty"), Path::new("--out=x")])
        .with(2)
        .says("holds no backup");
    Ended::run(["merge", "--dir", "/no/such/folder", "--out=x"]).with(1).says("No such file or directory");
}

#[test]
fn an_existing_output_is_replaced_only_by_force_and_a_source_never() {
    let backup = Backup::new();
    std::fs::write(backup.path("out"), "precious").unwrap();
    backup.merged(["--out", "out"]).with(1).says("exists already; --force replaces it");
    assert_eq!(std::fs::read(backup.path("out")).unwrap(), b"precious");
    backup.merged(["--out", "out", "--force"]).with(0);
    assert_disk(&backup, &backup.path("out"), 3);

    let before = sparse::fingerprints(&backup.dir);
    let source = backup.images[1].clone();
    std::os::unix::fs::symlink(&source, backup.path("link")).unwrap();
    std::fs::hard_link(&source, backup.path("hard")).unwrap();
    for out in [source, backup.path("link"), backup.path("hard")] {
        backup.merged([Path::new("--force"), Path::new("--out"), &out]).with(1).says("is itself a part of the chain");
    }
    std::fs::create_dir(backup.path("folder")).unwrap();
    backup.merged(["--force", "--out", "folder"]).with(1).says("is a folder");
    assert_eq!(sparse::fingerprints(&backup.dir), before);
}

#[test]
fn damage_found_by_the_check_is_exit_code_4_and_no_output() {
    let backup = Backup::new();
    backup.set_header_refcount(1, 0);
    let before = sparse::fingerprints(backup.root.path());
    let arguments = ["--out", "new/folder/out"];
    let ended = backup
        .merged(arguments)
        .with(4)
        .says("INC-1793674800-disk.qcow2: its metadata is damaged, errors: 1, the first: ");
    ended.says("refcount 0, but 1 references").says("nothing was written");
    backup.merged(["--dry-run", "--out", "x"]).with(4);
    assert_eq!(sparse::fingerprints(backup.root.path()), before, "parents are gone again");
    backup.merged(["--until", "FULL", "--out", "older"]).with(0);
    backup.merged(arguments.into_iter().chain(["--skip-check"])).with(0);
    assert_disk(&backup, &backup.path("new/folder/out"), 3);
}

#[test]
fn leaks_and_stale_refcounts_are_no_reason_to_stop() {
    let backup = Backup::new();
    backup.set_header_refcount(0, 2);
    backup.set_header_refcount(1, 0);
    // the dirty bit
    backup.patch(1, 72, |bytes| bytes[7] |= 1);
    let ended = backup.merged(["--out", "out"]).with(0);
    ended.says_not("WARNING");
    Ended::run([Path::new("check"), &backup.images[0]])
        .with(3)
        .says("good, but space is lost")
        .says("leaked clusters: 1");
    Ended::run([Path::new("check"), &backup.images[1]]).with(3).says("its refcounts may be stale");
}

#[test]
fn an_image_marked_corrupt_is_read_with_a_warning() {
    let backup = Backup::new();
    backup.patch(2, 72, |bytes| bytes[7] |= 2);
    let warning = "some program found this image damaged";
    backup.merged(["--out", "out"]).with(3).says(" WARNING  ").says(warning);
    backup.merged(["--out", "quiet", "--quiet"]).with(3).says(warning).says_not("INFO");
    backup.merged(["--out", "older", "--until", "INC-17936"]).with(0).says_not("WARNING");
    let ended = backup.merged(["--out", "json", "--json"]).with(3).says(warning);
    assert_eq!(event(&ended.events(), "done")["exit_code"], 3);
    assert!(event(&ended.events(), "warning")["message"].as_str().unwrap().contains(warning));
}

#[test]
fn a_broken_chain_is_exit_code_4() {
    let backup = Backup::new();
    std::fs::remove_file(&backup.images[0]).unwrap();
    backup.merged(["--out", "out"]).with(4).says("cannot be restored: no FULL before it").says("qmprestore list");

    let backup = Backup::new();
    let file = File::options().write(true).open(&backup.images[2]).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let before = sparse::fingerprints(backup.root.path());
    for more in [&["--skip-check"][..], &[]] {
        backup.merged([&["--out", "a/b"][..], more].concat()).with(4).says("INC-1793761200-disk.qcow2");
    }
    assert_eq!(sparse::fingerprints(backup.root.path()), before);

    let backup = Backup::new();
    backup.patch(0, 0, |bytes| bytes[0] = 0);
    backup.merged(["--out", "out"]).with(4).says("FULL-1793588400-disk.qcow2: magic is 0x");

    let backup = Backup::new();
    let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "elsewhere"];
    tools::run(tools::qemu_img().args(rebase).arg(&backup.images[1]));
    backup.merged(["--out", "out"]).with(4).says("names \"elsewhere\" as its backing file");
}

#[test]
fn what_a_failed_run_left_needs_allow_partial() {
    let backup = Backup::new();
    let partial = backup.dir.join(format!("INC-{}-disk.qcow2.partial", TIMES[1] + 5));
    std::fs::write(partial, "half").unwrap();
    let ended = backup.merged(["--out", "out"]).with(4).says("may lack changes").says("--allow-partial");
    ended.says("the newest restore point without doubt is INC-1793674800-disk.qcow2");
    backup.merged(["--out", "sound", "--until", "INC-17936748"]).with(0);
    backup
        .merged(["--out", "out", "--allow-partial"])
        .with(3)
        .says(" WARNING  INC-1793847600-disk.qcow2 may lack changes");
    assert_disk(&backup, &backup.path("out"), 3);
}

#[test]
fn raw_chains_are_merged_with_a_note() {
    let root = tempfile::tempdir().unwrap();
    for (name, byte) in [("FULL-1-disk.raw", 1), ("INC-2-disk.raw", 2)] {
        std::fs::write(root.path().join(name), vec![byte; 70_000]).unwrap();
    }
    let dir = root.path().to_str().unwrap();
    let out = root.path().join("out/raw");
    let arguments = ["merge", "--dir", dir, "--format=raw", "--out", out.to_str().unwrap()];
    Ended::run(arguments).with(0).says("INFO  NOTE: zeroes in raw INC").says_not("WARNING");
    assert_eq!(std::fs::read(&out).unwrap(), vec![2; 70_000]);
    Ended::run(arguments.into_iter().chain(["--force", "--dry-run"])).with(0).says("qemu-img cannot merge raw INC");
    Ended::run(arguments.into_iter().chain(["--force", "--until=FULL-1"])).with(0).says_not("NOTE");
    Ended::run(arguments.into_iter().chain(["--force", "--source-format=qcow2"])).with(4).says("magic");
}

#[test]
fn a_fifo_among_the_images_or_as_output_does_not_hang() {
    let backup = Backup::new();
    for name in ["backup/disk0/INC-1793847700-disk.qcow2", "backup/disk0/pipe", "fifo"] {
        tools::run(Command::new("mkfifo").arg(backup.path(name)));
    }
    let limited = |arguments: &[&str]| {
        let mut command = Command::new("timeout");
        command.args(["20", env!("CARGO_BIN_EXE_qmprestore")]).args(arguments).current_dir(backup.root.path());
        Ended::of(&mut command)
    };
    limited(&["merge", "--dir", "backup", "--out", "out"]).with(3).says("is no file");
    limited(&["list", "--dir", "backup"]).with(3).says("is no file");
    limited(&["check", "--dir", "backup"]).with(3).says("is no file");
    limited(&["check", "fifo"]).with(1).says("neither a regular file nor a block device");
    limited(&["merge", "--dir", "backup", "--out", "fifo", "--force"]).with(1).says("--out -");
}

#[test]
fn the_permissions_are_those_of_the_full() {
    let backup = Backup::new();
    std::fs::set_permissions(&backup.images[0], PermissionsExt::from_mode(0o640)).unwrap();
    backup.merged(["--out", "out"]).with(0);
    let mode = backup.path("out").metadata().unwrap().mode() & 0o777;
    assert!(mode & !0o640 == 0 && mode & 0o600 == 0o600, "{mode:o}");
}

#[test]
fn a_log_file_gets_what_stderr_gets_and_more() {
    let backup = Backup::new();
    let log = backup.path("log");
    std::fs::write(&log, "before\n").unwrap();
    backup.merged(["--quiet", "-L", "log", "--out", "one"]).with(0).says_not("INFO");
    backup.merged(["--debug", "--logfile=log", "--out", "two"]).with(0).says("   DEBUG  phase: copying");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.starts_with("before\n[") && log.contains("    INFO  INC-") && log.contains("   DEBUG  "), "{log}");
    backup.merged(["-L", "new/folder/log", "--out", "three"]).with(0);
    assert!(std::fs::read_to_string(backup.path("new/folder/log")).unwrap().contains("    INFO  INC-"));
    let file = backup.path("log/below");
    let before_subcommand = ["--debug", "-L", file.to_str().unwrap(), "list", "--dir", "x"];
    Ended::run(before_subcommand).with(1).says("log/below: cannot be opened for the log: Not a directory");
}

#[test]
fn a_full_target_is_exit_code_7_and_nothing_is_left() {
    let backup = Backup::new();
    if !is_root() {
        return;
    }
    let target = backup.path("target");
    std::fs::create_dir(&target).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=128k", "none"];
    tools::run(Command::new("mount").args(mount).arg(&target));
    let _unmount = Undo(vec!["umount".to_owned(), target.to_str().unwrap().to_owned()]);
    for arguments in [&[][..], &["--format=raw"], &["--compress", "--cluster-size=512"]] {
        backup.merged([&["--out", "target/a/disk"], arguments].concat()).with(7).says("free space");
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0, "{arguments:?}");
    }
}

#[test]
fn a_chain_that_nobody_can_write_to_is_merged() {
    let backup = Backup::new();
    if !is_root() {
        return;
    }
    let folder = backup.dir.to_str().unwrap();
    tools::run(Command::new("mount").args(["--bind", folder, folder]));
    let _unmount = Undo(vec!["umount".to_owned(), folder.to_owned()]);
    tools::run(Command::new("mount").args(["-o", "remount,bind,ro", folder]));
    assert!(File::options().write(true).open(&backup.images[0]).is_err(), "nothing was tested");
    backup.merged(["--out", "out"]).with(0);
    assert_disk(&backup, &backup.path("out"), 3);
}

#[test]
fn a_block_device_takes_raw_and_only_what_fits() {
    let backup = Backup::new();
    if !is_root() {
        return;
    }
    let image = backup.path("device");
    std::fs::write(&image, b"").unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(SIZE + 4096).unwrap();
    let (_detach, device) = loop_device(&image);
    backup.merged(["--out", &device]).with(1).says("is a block device: it takes --format raw only");
    backup.merged(["--format=raw", "--out", &device]).with(0);
    let start = backup.path("start");
    let read = |path: &Path| {
        tools::run(Command::new("sync").arg(&device));
        let dd = [format!("if={device}"), format!("of={}", path.display()), "bs=1M".to_owned(), "count=64".to_owned()];
        tools::run(Command::new("dd").args(dd).arg("status=none"));
    };
    read(&start);
    sparse::assert_same(&start, &backup.expected(3), "an empty device");

    // something is on it now, also where the disk has zeroes
    let noise = format!("if=/dev/urandom of={device} bs=1M count=64 status=none oflag=direct");
    tools::run(Command::new("dd").args(noise.split(' ')));
    backup.merged(["--format=raw", "--out", &device]).with(1).says("is not empty; --force overwrites it");
    backup.merged(["--format=raw", "--force", "--until=INC-17936", "--out", &device]).with(0);
    read(&start);
    sparse::assert_same(&start, &backup.expected(1), "a device that was used");

    let holder = File::options().read(true).custom_flags(libc::O_EXCL).open(&device).unwrap();
    backup.merged(["--format=raw", "--force", "--out", &device]).with(6).says("busy");
    drop(holder);

    let small = backup.path("small");
    File::create(&small).unwrap().set_len(SIZE - 4096).unwrap();
    let (_detach, device) = loop_device(&small);
    let refused = backup.merged(["--format=raw", "--force", "--out", &device]).with(1);
    refused.says(&format!("has {} bytes, the disk needs {SIZE}", SIZE - 4096));
}

#[test]
fn a_device_whose_file_is_an_image_of_the_backup_is_not_written_to() {
    let backup = Backup::new();
    let image = &backup.images[1];
    let before = std::fs::read(image).unwrap();
    let (_detach, device) = loop_device(image);
    let merged = backup.merged(["--format=raw", "--force", "--until=FULL-17935", "--out", &device]);
    merged.with(1).says("is itself a part of the chain");
    assert_eq!(std::fs::read(image).unwrap(), before);
}

fn loop_device(file: &Path) -> (Undo, String) {
    let device = tools::run(Command::new("losetup").args(["-f", "--show"]).arg(file));
    let device = device.trim().to_owned();
    (Undo(vec!["losetup".to_owned(), "-d".to_owned(), device.clone()]), device)
}

/// A command that runs in the end.
struct Undo(Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let undone = Command::new(&self.0[0]).args(&self.0[1..]).status();
        assert!(std::thread::panicking() || undone.unwrap().success(), "{:?}", self.0);
    }
}

#[test]
fn more_images_than_the_usual_limit_of_open_files() {
    let root = tempfile::tempdir().unwrap();
    let full = root.path().join("FULL-1-disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&full).arg("1M"));
    for time in 2..300 {
        std::fs::copy(&full, root.path().join(format!("INC-{time}-disk"))).unwrap();
    }
    let out = root.path().join("out/raw");
    let script = "ulimit -S -n 64; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_qmprestore"), "merge", "--format=raw", "--dir"]);
    Ended::of(command.arg(root.path()).arg("--out").arg(&out)).with(0);
    assert_eq!(out.metadata().unwrap().len(), 1 << 20);
}
