//! `-L FILE`: what a log is appended to.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::program::{Backup, Ended, qmprestore};
use crate::support::{sparse, tools};

fn list(backup: &Backup, log: &Path) -> Ended {
    Ended::of(qmprestore(["list", "--dir"]).arg(&backup.dir).arg("-L").arg(log).current_dir(backup.root.path()))
}

#[test]
fn a_log_is_appended_to_files_and_terminals_only() {
    let backup = Backup::new();
    let (log, link, fifo) = (backup.path("log"), backup.path("link"), backup.path("fifo"));
    fs::write(&log, "before\n").unwrap();
    symlink("log", &link).unwrap();
    for log in [log.as_path(), &link, Path::new("/dev/null"), Path::new("new")] {
        list(&backup, log).with(0);
    }
    assert!(fs::read_to_string(&log).unwrap().starts_with("before\n") && backup.path("new").exists());
    tools::run(std::process::Command::new("mkfifo").arg(&fifo));
    list(&backup, &fifo).with(1).says("fifo: cannot be opened for the log").says_not("ok");
}

#[test]
fn a_log_is_not_appended_to_a_backup() {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    let (link, plain) = (backup.path("link"), backup.path("disk.qcow2"));
    symlink(&backup.images[1], &link).unwrap();
    fs::copy(&backup.images[0], &plain).unwrap();
    let raw = backup.path("backup/disk1/FULL-1-raw");
    fs::create_dir(raw.parent().unwrap()).unwrap();
    fs::write(&raw, "raw").unwrap();
    let before = sparse::fingerprints(backup.root.path());
    let images = [link, plain, raw, backup.images[0].clone()];
    let books = ["log", "lock"].map(|name| backup.dir.join(".qmpbackup").join(name));
    for log in images.iter().chain(&books) {
        list(&backup, log).with(1).says("is a part of a backup");
        assert!(sparse::fingerprints(backup.root.path()) == before, "{}", log.display());
    }
}
