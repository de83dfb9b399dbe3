//! The commands that a dry run of work in place prints: they stop where one fails, and leave a backup that is whole.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::by_hand::{commands, path_with, shell};
use crate::support::in_place::copy_folder;
use crate::support::oracle::convert;
use crate::support::program::{Backup, Ended, program, qmprestore};
use crate::support::{sparse, tools};

const UNTIL: &str = "--until=INC-1793761200";

/// Has a shell that does not stop at errors run commands with a `qemu-img` that fails at this one of its own.
fn run_failing(backup: &Backup, commands: &str, fails: &str) {
    let bin = backup.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let fake = format!("#!/bin/sh\n[ \"$1\" != {fails} ] || exit 1\n");
    std::fs::write(bin.join("qemu-img"), fake).unwrap();
    std::fs::set_permissions(bin.join("qemu-img"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", commands]).current_dir(backup.root.path());
    let output = tools::output(shell.env("PATH", path_with([bin.as_path()].into_iter())));
    assert!(!output.status.success(), "{output:?}");
}

#[test]
fn nothing_is_done_after_a_command_that_fails() {
    for (command, fails) in [
        ("commit", "rebase"),
        ("commit", "commit"),
        ("snapshotrebase", "snapshot"),
        ("snapshotrebase", "commit"),
        ("rebase", "rebase"),
    ] {
        for (described, json) in [(false, false), (true, false), (true, true)] {
            let backup = Backup::new();
            if described {
                backup.does(&["manifest"]).with(0);
            }
            let commands = if json {
                let planned = backup.planned(&[command]);
                planned["commands"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|line| line.as_str().unwrap().to_owned() + "\n")
                    .collect()
            } else {
                commands(&backup.does(&[command, "--dry-run"]).with(0))
            };
            let before = sparse::fingerprints(&backup.dir);
            run_failing(&backup, &commands, fails);
            assert!(sparse::fingerprints(&backup.dir) == before, "{command}: {commands}");
        }
    }
}

#[test]
fn what_was_done_by_hand_is_known_to_be_whole_where_all_was_known_before() {
    for command in ["commit", "snapshotrebase", "rebase", "qmprebase"] {
        for rebased in [false, true] {
            let backup = Backup::new();
            let expected = [backup.expected(2), backup.expected(3)];
            if rebased {
                backup.does(&["rebase"]).with(0);
            }
            backup.does(&["manifest"]).with(0);
            if command == "rebase" && rebased {
                continue;
            }
            let commands = if command == "qmprebase" {
                qmprebase(&backup)
            } else {
                commands(&backup.does(&[command, "--dry-run", UNTIL]).with(0))
            };
            shell(&commands, backup.root.path(), &tools::qemu_img());
            backup.does(&["list"]).with(0);
            backup.does(&["verify"]).with(0);
            for (until, expected) in [UNTIL, "--until=latest"].iter().zip(&expected) {
                // the FULL has its own name still
                let until = if command == "rebase" || *until != UNTIL { until } else { "--until=FULL" };
                backup.merged(["--verify", "--format=raw", "--force", "--out=raw", until]).with(0);
                sparse::assert_same(&backup.path("raw"), expected, command);
            }
            assert_eq!(backup.images[1].exists(), command == "rebase");
        }
    }
}

/// The commands in the log of a dry run.
fn qmprebase(backup: &Backup) -> String {
    let mut command = program(env!("CARGO_BIN_EXE_qmprebase"), ["rebase", "--dry-run", UNTIL, "--dir"]);
    let ended = Ended::of(command.arg(&backup.dir)).with(0).says_not("successful");
    let lines = ended.stderr.lines().filter_map(|line| line.split_once("INFO  ")).map(|(_, line)| line);
    let is_command = |line: &&str| ["qemu-img ", "rm ", "qmprestore "].iter().any(|word| line.starts_with(word));
    lines.filter(is_command).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_was_begun_can_be_ended_by_hand() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let expected = backup.expected(3);
    backup.stopped(&["commit"], rustix::process::Signal::INT).with(130);
    let begun = backup.path("begun");
    copy_folder(&backup.dir, &begun);
    let commands = commands(&backup.does(&["commit", "--dry-run"]).with(0));
    shell(&commands, Path::new("/"), &tools::qemu_img());
    backup.does(&["list"]).with(0);
    backup.does(&["verify"]).with(0);
    backup.assert_holds(3, &expected);
}

#[test]
fn a_disk_that_became_smaller_and_larger_is_the_same_by_hand() {
    for command in ["commit", "snapshotrebase"] {
        for (count, version) in [(2, "compat=1.1"), (3, "compat=1.1"), (3, "compat=0.10")] {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("disk");
            std::fs::create_dir(&dir).unwrap();
            let images = [
                ("FULL-1-x", "3M", "write -P 1 0 3M"),
                ("INC-2-x", "1025K", "write -P 2 64K 64K"),
                ("INC-3-x", "2M", "write -P 3 0 4K"),
            ];
            for (name, size, write) in images.into_iter().take(count) {
                let image = dir.join(name);
                let version = if name.starts_with("INC") { version } else { "compat=1.1" };
                tools::run(
                    tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", version]).arg(&image).arg(size),
                );
                tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", write]).arg(&image));
            }
            let does = |words: &[&str]| Ended::of(qmprestore(words).arg("--dir").arg(&dir)).with(0);
            let (right, raw) = (root.path().join("right"), root.path().join("raw"));
            does(&["merge", "--format=raw", "--out", right.to_str().unwrap()]);
            shell(&commands(&does(&[command, "--dry-run"])), root.path(), &tools::qemu_img());
            convert(&dir.join("FULL-1-x"), &raw);
            sparse::assert_same(&raw, &right, &format!("{command} of {count} images, {version}"));
        }
    }
}
