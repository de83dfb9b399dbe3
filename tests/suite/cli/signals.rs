//! A merge that is told to stop leaves nothing, and says by its exit code who told it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::program::{Backup, Ended, ending_signals, events};
use crate::support::sparse;

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Starts a slow merge, sends a signal when it copies, and returns how it ended and all its JSON lines.
fn stopped(backup: &Backup, arguments: &[&str], signal: Signal) -> Ended {
    let slow = ["--json", "--rate-limit", "300K", "--progress-interval", "0.1"];
    let mut command = backup.merge(slow.iter().chain(arguments));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut stdout = String::new();
    while !stdout.contains("\"progress\"") {
        assert_ne!(lines.read_line(&mut stdout).unwrap(), 0, "it ended before it copied: {stdout}");
    }
    let sent = Instant::now();
    send(&child, signal);
    lines.read_to_string(&mut stdout).unwrap();
    let ended = Ended::new(child.wait_with_output().unwrap());
    assert!(sent.elapsed() < Duration::from_secs(2), "it took {:?} to stop", sent.elapsed());
    Ended { stdout, ..ended }
}

#[test]
fn a_signal_stops_a_merge_and_nothing_is_left() {
    let backup = Backup::new();
    let before = sparse::fingerprints(backup.root.path());
    for (signal, code) in ending_signals() {
        for format in [&["--format=raw"][..], &["--compress"], &["--threads=1"]] {
            let arguments = [&["--out", "new/folder/out"], format].concat();
            let ended = stopped(&backup, &arguments, signal).with(code).says("cancelled; nothing was left");
            let error = events(&ended.stdout).pop().unwrap();
            assert_eq!((&error["event"], &error["exit_code"]), (&"error".into(), &code.into()), "{ended:?}");
            assert_eq!(sparse::fingerprints(backup.root.path()), before, "{arguments:?}");
        }
    }
}

#[test]
fn a_signal_keeps_what_was_to_be_replaced() {
    let backup = Backup::new();
    std::fs::write(backup.path("out"), "precious").unwrap();
    stopped(&backup, &["--force", "--out", "out"], Signal::INT).with(130);
    assert_eq!(std::fs::read(backup.path("out")).unwrap(), b"precious");
}

#[test]
fn one_signal_ends_a_disk_that_goes_to_who_does_not_read_it() {
    let backup = Backup::new();
    for (signal, code) in ending_signals() {
        let mut command = backup.merge(["--out", "-"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // it has begun, and no pipe holds all of it
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 4096]).unwrap();
        let sent = Instant::now();
        send(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(sent.elapsed() < Duration::from_secs(6), "it took {:?} to stop", sent.elapsed());
    }
}

/// `timeout` sends it to the process and to its group, which the process is in.
#[test]
fn a_signal_that_comes_twice_at_once_is_one() {
    let backup = Backup::new();
    let before = sparse::fingerprints(backup.root.path());
    for delay in ["0.3", "0.6", "0.9"] {
        let merge = backup.merge(["--rate-limit=300K", "--out=new/folder/out"]);
        let mut timeout = Command::new("timeout");
        timeout.args(["--signal=TERM", "--preserve-status", delay]).arg(merge.get_program()).args(merge.get_args());
        let output = timeout.current_dir(merge.get_current_dir().unwrap_or(backup.root.path())).output().unwrap();
        Ended::new(output).with(143).says("cancelled; nothing was left");
        assert_eq!(sparse::fingerprints(backup.root.path()), before);
    }
}

#[test]
fn the_second_signal_ends_it_at_once() {
    let backup = Backup::new();
    // nobody reads: the writer waits for the pipe, where it cannot look at signals
    let mut child =
        backup.merge(["--out", "-", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("copying") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0);
    }
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..2 {
        assert!(child.try_wait().unwrap().is_none(), "it did not wait");
        send(&child, Signal::INT);
        std::thread::sleep(Duration::from_millis(300));
    }
    let status = child.try_wait().unwrap();
    if status.is_none() {
        child.kill().unwrap();
    }
    assert_eq!(status.map(|status| status.code()), Some(Some(130)));
}

#[test]
fn a_key_that_is_held_down_ends_it() {
    let backup = Backup::new();
    let mut child = backup.merge(["--out", "-", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(30));
        // which fails where it has ended
        let _ = kill_process(Pid::from_child(&child), Signal::INT);
    }
    let status = child.try_wait().unwrap();
    if status.is_none() {
        child.kill().unwrap();
    }
    assert_eq!(status.map(|status| status.code()), Some(Some(130)));
}
