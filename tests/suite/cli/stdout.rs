//! Results that cannot be printed.

use std::fs::File;
use std::process::{Command, Stdio};

use crate::support::program::{Backup, Ended};

/// Runs `qmprestore` with a stdout that is full.
fn to_full(backup: &Backup, words: &[&str]) -> Ended {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = backup.command(words).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    Ended::new(child.wait_with_output().unwrap())
}

#[test]
fn a_result_that_cannot_be_printed_is_told_by_the_exit_code() {
    let backup = Backup::new();
    for words in [&["list"][..], &["check"], &["merge", "--dry-run", "--out", "made"]] {
        to_full(&backup, words).with(7).says("cannot print the result: No space left on device");
    }
}

#[test]
fn json_lines_that_cannot_be_printed_are_a_warning_and_the_work_is_done() {
    let backup = Backup::new();
    for words in [&["list", "--json"][..], &["check", "--json"], &["merge", "--json", "--out", "made"]] {
        let ended = to_full(&backup, words).with(3);
        assert_eq!(ended.stderr.matches("JSON lines are missing").count(), 1, "{ended:#?}");
    }
    assert!(backup.path("made").is_file());
}

#[test]
fn a_disk_that_goes_to_a_stdout_that_is_closed_is_a_warning() {
    let backup = Backup::new();
    let program = env!("CARGO_BIN_EXE_qmprestore");
    let merge = |to: &str| {
        let words = format!("exec '{program}' merge --quiet --dir '{}' --out - {to}", backup.dir.display());
        Ended::of(Command::new("sh").args(["-c", &words]))
    };
    merge(">&-").with(3).says("stdout is closed");
    merge(">/dev/null").with(0);
}
