//! What the program prints: tables, JSON lines, log lines, progress; on a terminal and elsewhere.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::program::{Backup, Ended, TIMES, event, events, qmprestore, rude_name};
use crate::support::tools;

#[test]
fn a_listing_is_a_table() {
    let backup = Backup::new();
    let ended = Ended::run([Path::new("list"), Path::new("--dir"), &backup.path("backup")]).with(0);
    let expected = "\
disk0 (disk.qcow2)
  CHAIN  TIME                 LEVEL    DISK  ALLOCATED       FILE  NAME                        STATE
      1  2026-11-02 03:00:00  FULL   64 MiB    5.1 MiB    236 KiB  FULL-1793588400-disk.qcow2  ok
      1  2026-11-03 03:00:00  INC    64 MiB    1.3 MiB    256 KiB  INC-1793674800-disk.qcow2   ok
      1  2026-11-04 03:00:00  INC    64 MiB      1 MiB  240.4 KiB  INC-1793761200-disk.qcow2   ok
      1  2026-11-05 03:00:00  INC    64 MiB      2 MiB  107.3 KiB  INC-1793847600-disk.qcow2   ok
";
    assert_eq!(ended.stdout, expected);
    assert_eq!(ended.stderr, "");
    let mut command = qmprestore([Path::new("list"), Path::new("--dir"), &backup.dir]);
    Ended::of(command.env("TZ", "CET-1")).with(0).says("2026-11-05 04:00:00");
}

#[test]
fn a_listing_goes_on_past_damage_and_says_where_it_is() {
    let backup = Backup::new();
    backup.patch(2, 20, |bytes| bytes[3] = 63);
    let list = |more: &[&str]| {
        let dir = backup.dir.to_str().unwrap();
        Ended::run(["list", "--dir", dir].iter().chain(more))
    };
    let ended = list(&[]).with(3).says("ok\n").says("broken: cluster_bits is 63, supported range is 9..=21");
    ended.says("broken: needs INC-1793761200-disk.qcow2, which is damaged");

    let events = list(&["--json"]).with(3).events();
    let states: Vec<&str> = events.iter().filter_map(|event| event["state"].as_str()).collect();
    assert_eq!(states, ["ok", "ok", "broken", "broken"]);
    assert_eq!(events[0]["allocated"], 5_373_952);
    assert_eq!(events[0]["rfc3339"], "2026-11-02T03:00:00Z");
    assert_eq!(event(&events, "done")["exit_code"], 3);

    // an image that is gone, one that is marked, what a failed run left
    std::fs::remove_file(&backup.images[0]).unwrap();
    list(&[]).with(3).says("broken: no FULL before it");
    let backup = Backup::new();
    backup.patch(1, 72, |bytes| bytes[7] |= 2);
    std::fs::write(backup.dir.join(format!("INC-{}-disk.qcow2.partial", TIMES[2] + 5)), "").unwrap();
    let ended = Ended::run([Path::new("list"), Path::new("--dir"), &backup.dir]).with(3);
    let states: Vec<&str> = ended
        .stdout
        .lines()
        .filter_map(|line| line.split_once("-disk.qcow2  "))
        .map(|(_, state)| state.trim())
        .collect();
    let through = "marked corrupt: INC-1793674800-disk.qcow2 in its chain is";
    assert_eq!(states, ["ok", "marked corrupt: some program found damage in it", through, through]);
    ended.says("left by a run that failed or goes on, never read");
    Ended::run(["list", "--dir", "/no/such/folder"]).with(1);
}

#[test]
fn a_listing_that_is_cut_by_its_reader_is_quiet() {
    let root = tempfile::tempdir().unwrap();
    for time in 0..2000 {
        std::fs::write(root.path().join(format!("INC-{time}-{}", "x".repeat(200))), "").unwrap();
    }
    let mut command = qmprestore([Path::new("list"), Path::new("--dir"), root.path()]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = Ended::new(child.wait_with_output().unwrap()).with(3);
    assert_eq!(ended.stderr, "");
    let full = File::options().write(true).open("/dev/full").unwrap();
    Ended::new(command.stdout(full).output().unwrap()).with(7).says("cannot print the result");
}

#[test]
fn check_tells_what_an_image_is_and_what_is_wrong_with_it() {
    let backup = Backup::new();
    let image = backup.path("image");
    let options = "cluster_size=32K,lazy_refcounts=on,compression_type=zstd";
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&image).arg("1G"));
    tools::run(tools::qemu_img().args(["snapshot", "-c", "before\x1b[2J"]).arg(&image));
    tools::run(tools::qemu_img().args(["bitmap", "--add"]).arg(&image).arg("nightly"));
    let ended = Ended::run([Path::new("check"), &image]).with(0).says("/image: clean\n");
    let ended = ended.says("qcow2 version 3, disk of 1 GiB (1073741824 bytes)").says("clusters of 32 KiB, zstd");
    ended
        .says("features: compression type, lazy refcounts, bitmaps")
        .says("snapshots: before\\u{1b}[2J\n")
        .says("bitmaps: nightly\n");
    let ended = Ended::run([Path::new("check"), &image, Path::new("--json")]).with(0);
    let checked = event(&ended.events(), "check").clone();
    assert_eq!((&checked["verdict"], &checked["snapshots"]), (&"clean".into(), &serde_json::json!(["before\x1b[2J"])));

    Ended::run(["check", "--dir", backup.dir.to_str().unwrap()]).with(0);
    Ended::run(["check", "--dir", backup.dir.to_str().unwrap(), "--filter", "none"]).with(2);
    Ended::run(["check"]).with(2).says("<IMAGE>");
    Ended::run(["check", "x", "--dir", "y"]).with(2);
    backup.set_header_refcount(3, 7);
    Ended::run(["check", "--dir", backup.dir.to_str().unwrap()]).with(3).says("good, but space is lost");
    backup.set_header_refcount(3, 0);
    let ended = Ended::run(["check", "--dir", backup.dir.to_str().unwrap()]).with(4).says("DAMAGED");
    ended.says(
        "errors in tables: 0, wrong refcounts: 1, leaked clusters: 0\n  - the cluster at offset 0x0 has refcount 0",
    );
    let all = [Path::new("check"), Path::new("/no/such/image"), &backup.images[3], &image, Path::new("--json")];
    let events = Ended::run(all).with(4).events();
    let verdicts: Vec<&str> = events.iter().filter_map(|event| event["verdict"].as_str()).collect();
    assert_eq!(verdicts, ["unreadable", "damaged", "clean"]);
    assert_eq!(events[2]["refcount_errors"], 1);
    Ended::run(["check", "/no/such/image"]).with(1).says("UNREADABLE: cannot be opened: No such file");
    Ended::run(["check", "/dev/null", "/etc/passwd"]).with(4).says("/etc/passwd: UNREADABLE: magic is");
}

#[test]
fn an_image_that_is_missing_beside_its_manifest_is_damage_to_the_chain() {
    let backup = Backup::new();
    let dir = backup.dir.to_str().unwrap();
    Ended::run(["manifest", "--dir", dir]).with(0);
    std::fs::remove_file(&backup.images[1]).unwrap();
    Ended::run(["check", "--dir", dir]).with(4).says("UNREADABLE: cannot be opened: No such file");
}

#[test]
fn every_line_of_json_parses_and_tells_the_story() {
    let backup = Backup::new();
    let slow = ["--json", "--rate-limit", "8M", "--progress-interval", "0.05", "--compress=zstd", "--out"];
    let out = backup.path("out").to_str().unwrap().to_owned();
    let ended = backup.merged(slow.into_iter().chain([out.as_str()])).with(0);
    let told = ended.events();
    let plan = event(&told, "plan");
    assert_eq!((plan["size"].as_u64(), plan["bytes"].as_u64()), (Some(64 << 20), Some(4 << 20)));
    assert_eq!((&plan["output"]["compression"], &plan["dry_run"]), (&"zstd".into(), &false.into()));
    assert_eq!(plan["images"][3]["level"], "INC");
    let phases: Vec<&str> =
        told.iter().filter(|event| event["event"] == "phase").filter_map(|event| event["phase"].as_str()).collect();
    assert_eq!(phases, ["planning", "checking", "copying", "syncing"]);
    let progress = told.iter().filter(|event| event["event"] == "progress").collect::<Vec<_>>();
    assert!(progress.len() > 2, "{told:#?}");
    for event in progress {
        assert!(event["done"].as_u64() <= event["total"].as_u64() && event["rate"].is_u64(), "{event}");
    }
    let done = event(&told, "done");
    assert_eq!((&done["output"], &done["exit_code"]), (&out.into(), &0.into()));
    assert_eq!(done["length"].as_u64(), Some(backup.path("out").metadata().unwrap().len()));
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);

    let ended = backup.merged(["--json", "--out", "out"]).with(1).says("ERROR");
    let error = event(&ended.events(), "error").clone();
    assert!(error["message"].as_str().unwrap().contains("exists already"));
    assert_eq!(error["exit_code"], 1);
    let error = event(&Ended::run(["merge", "--json"]).with(2).events(), "error").clone();
    let message = "the following required arguments were not provided: --dir <DIR> --out <FILE>";
    assert_eq!((&error["exit_code"], &error["message"]), (&2.into(), &message.into()));

    let output = tools::output(&mut backup.merge(["--json", "--out", "-"]));
    assert_eq!(output.stdout.len(), 64 << 20);
    let told = events(&String::from_utf8(output.stderr).unwrap());
    assert_eq!(event(&told, "done")["output"], "-");
}

#[test]
fn progress_lines_have_no_control_characters() {
    let backup = Backup::new();
    let ended = backup.merged(["--rate-limit", "8M", "--progress-interval", "0.1", "--out", "out"]).with(0);
    let lines: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("copying: ")).collect();
    assert!(lines.len() > 1, "{ended:?}");
    for line in lines {
        assert!(
            line.contains(" % of ") || (line.contains(" %, ") && line.contains(" of 4 MiB, ") && line.contains("/s")),
            "{line}"
        );
    }
    assert!(!ended.stderr.contains(|letter: char| letter.is_control() && letter != '\n'), "{ended:?}");
}

#[test]
fn names_cannot_do_anything_to_a_terminal() {
    let rude = rude_name();
    let backup = Backup::named(Path::new("backup").join(&rude), &rude, TIMES);
    backup.patch(1, 72, |bytes| bytes[7] |= 2);
    let dir = backup.dir.to_str().map_or_else(|| backup.dir.as_os_str().to_owned(), Into::into);
    let out = backup.root.path().join(&rude);
    let image = &backup.images[1];
    let commands: [&[&std::ffi::OsStr]; 9] = [
        &["list".as_ref(), "--dir".as_ref(), &dir],
        &["list".as_ref(), "--json".as_ref(), "--dir".as_ref(), &dir],
        &["check".as_ref(), "--dir".as_ref(), &dir],
        &["check".as_ref(), image.as_ref(), &rude, "--json".as_ref()],
        &["merge".as_ref(), "--dry-run".as_ref(), "--dir".as_ref(), &dir, "--out".as_ref(), out.as_ref()],
        &["merge".as_ref(), "--json".as_ref(), "--dir".as_ref(), &dir, "--out".as_ref(), out.as_ref()],
        &["merge".as_ref(), "--dir".as_ref(), &dir, "--out".as_ref(), out.as_ref()],
        &["merge".as_ref(), "--dir".as_ref(), &dir, "--out".as_ref(), "x".as_ref(), "--until".as_ref(), &rude],
        &["merge".as_ref(), &rude],
    ];
    for command in commands {
        let ended = Ended::run(command);
        let all = ended.stdout.clone() + &ended.stderr;
        let bad = all.contains(|letter: char| (letter.is_control() && letter != '\n') || letter == '\u{202e}');
        assert!(!bad && !all.is_empty(), "{ended:#?}");
        assert!(!all.lines().any(|line| line.starts_with('\u{fffd}')), "a name made a line of its own: {ended:#?}");
    }
}

#[test]
fn colours_and_bars_are_for_terminals() {
    let backup = Backup::new();
    backup.patch(1, 72, |bytes| bytes[7] |= 2);
    let merge = |out: &str, environment: &[(&str, &str)], more: &[&str]| {
        let mut command = backup.merge(["--rate-limit", "8M", "--out", out].iter().chain(more));
        command.env("TERM", "xterm").envs(environment.iter().copied());
        on_terminal(command)
    };
    let yellow = "\x1b[33mWARNING\x1b[0m";
    let shown = merge("1", &[], &[]);
    assert!(shown.contains(yellow) && shown.contains("copying [") && shown.contains("MiB/s"), "{shown}");
    let plain = merge("2", &[("NO_COLOR", "1")], &[]);
    assert!(!plain.contains("\x1b[3") && plain.contains("] WARNING  ") && plain.contains("copying ["), "{plain:?}");
    let dumb = merge("3", &[("TERM", "dumb")], &["--progress-interval", "0.1"]);
    assert!(!dumb.contains('\x1b') && dumb.contains("copying: "), "{dumb:?}");
    let quiet = merge("4", &[], &["--quiet"]);
    assert!(quiet.contains(yellow) && !quiet.contains("copying"), "{quiet:?}");
    for (environment, coloured) in [(&[][..], true), (&[("NO_COLOR", "1")], false)] {
        let mut help = qmprestore(["--help"]);
        help.env("TERM", "xterm").envs(environment.iter().copied());
        assert_eq!(on_terminal(help).contains('\x1b'), coloured);
    }
    let mut stream = backup.merge(["--out", "-"]);
    stream.env("TERM", "xterm");
    assert!(on_terminal(stream).contains("does not go to a terminal"));
}

/// What a command shows on a terminal of its own.
fn on_terminal(mut command: Command) -> String {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let size = rustix::termios::Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size).unwrap();
    let terminal = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    command.stdin(Stdio::null()).stdout(terminal.try_clone().unwrap()).stderr(terminal);
    let mut child = command.spawn().unwrap();
    // the only open ends of the terminal are the child's now
    drop(command);
    let mut shown = Vec::new();
    // ends with an error where the last user of the terminal is gone
    let _ = File::from(master).read_to_end(&mut shown);
    child.wait().unwrap();
    String::from_utf8_lossy(&shown).into_owned()
}

#[test]
fn help_and_version_say_what_there_is() {
    for command in ["", "merge", "list", "check"] {
        for word in ["-h", "--help"] {
            let ended = Ended::run([command, word].into_iter().filter(|word| !word.is_empty())).with(0);
            let ended = ended.says("130  ended by SIGINT").says("Usage: qmprestore");
            assert_eq!(ended.stderr, "");
        }
    }
    let version = concat!("qmprestore ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(Ended::run(["-V"]).with(0).stdout, version);
    Ended::run(["merge", "-V"]).with(0).says(env!("CARGO_PKG_VERSION"));
}

#[test]
fn options_of_the_python_tool_may_stand_before_the_command() {
    let backup = Backup::new();
    let (dir, out) = (backup.dir.to_str().unwrap(), backup.path("made"));
    let merge = |option| Ended::run([option, "merge", "--dir", dir, "--out", out.to_str().unwrap()]);
    backup.set_header_refcount(0, 0);
    merge("--use-writeback").fails(4);
    merge("--skip-check").with(0);
}

#[test]
fn where_no_image_is_whole_there_is_nothing_to_verify() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("FULL-5-disk.partial"), "").unwrap();
    Ended::run(["verify", "--dir", folder.path().to_str().unwrap()]).with(3).says("there is no image to verify");
}
