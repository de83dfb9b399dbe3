//! Runs what changes a FULL in place, and says what must be there afterwards.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::oracle::convert;
use crate::support::program::{Backup, Ended, event, qmprestore};
use crate::support::{sparse, tools};

/// The words of a command that is slow enough to be stopped in the middle.
pub(crate) const SLOW: [&str; 3] = ["--rate-limit=300K", "--threads=1", "--skip-check"];

impl Backup {
    /// `qmprestore COMMAND --dir DIR` and more.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = qmprestore([words[0], "--dir"]);
        command.arg(&self.dir).args(&words[1..]).current_dir(self.root.path());
        command
    }

    /// Runs `qmprestore COMMAND --dir DIR` and more.
    pub(crate) fn does(&self, words: &[&str]) -> Ended {
        Ended::of(&mut self.command(words))
    }

    /// The file name of an image.
    pub(crate) fn name(&self, number: usize) -> &str {
        self.images[number].file_name().unwrap().to_str().unwrap()
    }

    /// The same backup in another folder, as it is now; images that are gone are named all the same.
    pub(crate) fn copied(&self) -> Self {
        let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let dir = root.path().join("backup/disk0");
        copy_folder(&self.dir, &dir);
        let images = self.images.iter().map(|image| dir.join(image.file_name().unwrap())).collect();
        Self { root, dir, images }
    }

    /// All files in the folder, but those of bookkeeping.
    pub(crate) fn files(&self) -> BTreeMap<String, sparse::Fingerprint> {
        let mut files = sparse::fingerprints(&self.dir);
        files.retain(|path, _| !path.starts_with(".qmpbackup"));
        files
    }

    /// The names in the folder of bookkeeping.
    pub(crate) fn bookkeeping(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.join(".qmpbackup")) else { return Vec::new() };
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The FULL alone holds the restore point with this number, INCs before it are gone, and nothing else is left.
    #[track_caller]
    pub(crate) fn assert_holds(&self, last: usize, expected: &Path) {
        let raw = self.path("held");
        convert(&self.images[0], &raw);
        sparse::assert_same(&raw, expected, "the FULL");
        for (number, image) in self.images.iter().enumerate().skip(1) {
            assert_eq!(image.exists(), number > last, "{}", image.display());
        }
        let books = |name: &str| [format!("{name}.json"), format!("{name}.crc32")];
        let there = (0..self.images.len()).filter(|number| *number == 0 || *number > last);
        let known: Vec<String> = there.flat_map(|number| books(self.name(number))).chain(["lock".to_owned()]).collect();
        let left: Vec<String> = self.bookkeeping().into_iter().filter(|name| !known.contains(name)).collect();
        assert_eq!(left, [""; 0]);
    }

    /// The command is refused like this, and nothing was changed; in the folder there may be a lock that was not there.
    #[track_caller]
    pub(crate) fn refuses(&self, words: &[&str], code: i32, says: &str) {
        let before = (self.files(), std::fs::read_link(self.dir.join("image")).ok());
        let bookkeeping = self.bookkeeping();
        self.does(words).with(code).says(says);
        let after = (self.files(), std::fs::read_link(self.dir.join("image")).ok());
        assert!(before == after, "{words:?} changed something");
        let new: Vec<String> = self.bookkeeping().into_iter().filter(|name| !bookkeeping.contains(name)).collect();
        assert!(new.iter().all(|name| name == "lock"), "{new:?}");
    }

    /// Starts a command with [`SLOW`], and stops it by a signal when it copies.
    pub(crate) fn stopped(&self, words: &[&str], signal: Signal) -> Ended {
        let slow = ["--json", "--progress-interval=0.1"];
        let words = [words, &SLOW, &slow].concat();
        let mut child = self.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut stdout = String::new();
        while !stdout.contains("\"progress\"") {
            assert_ne!(lines.read_line(&mut stdout).unwrap(), 0, "it ended before it copied: {stdout}");
        }
        send(&child, signal);
        lines.read_to_string(&mut stdout).unwrap();
        let ended = Ended::new(child.wait_with_output().unwrap());
        Ended { stdout, ..ended }
    }

    /// The moment of the FULL, as a listing tells.
    pub(crate) fn held_time(&self) -> Value {
        let events = self.does(&["list", "--json"]).events();
        let full = events.iter().find(|event| event["event"] == "restore_point" && event["name"] == self.name(0));
        full.unwrap()["time"].clone()
    }

    /// What the plan of a dry run says.
    pub(crate) fn planned(&self, words: &[&str]) -> Value {
        let events = self.does(&[words, &["--dry-run", "--json"]].concat()).with(0).events();
        event(&events, "plan").clone()
    }
}

pub(crate) fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Copies a folder with all that is in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    tools::run(Command::new("cp").args(["-a", "--sparse=always"]).args([from, to]));
}

/// What `qemu-img check` says: no errors, and leaks only where a program was killed.
#[track_caller]
pub(crate) fn assert_sound(image: &Path, leaks: bool) {
    let mut check = tools::qemu_img();
    check.args(["check", "-f", "qcow2"]).arg(image);
    let output = tools::output(&mut check);
    let code = output.status.code().unwrap();
    assert!(code == 0 || (leaks && code == 3), "{}", tools::told(&check, &output));
}

/// Each internal snapshot of an image as `qemu-img info` tells: name, date in seconds and content.
pub(crate) fn snapshots(image: &Path, room: &Path) -> Vec<(String, i64, PathBuf)> {
    std::fs::create_dir_all(room).unwrap();
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(image));
    let info: Value = serde_json::from_str(&info).unwrap();
    let snapshot = |snapshot: &Value| {
        let (id, name) = (snapshot["id"].as_str().unwrap(), snapshot["name"].as_str().unwrap());
        let raw = room.join(format!("{id}.raw"));
        let which = format!("snapshot.id={id}");
        let convert = ["convert", "-f", "qcow2", "-O", "raw", "-l", &which];
        tools::run(tools::qemu_img().args(convert).args([image, &raw]));
        (name.to_owned(), snapshot["date-sec"].as_i64().unwrap(), raw)
    };
    info["snapshots"].as_array().into_iter().flatten().map(snapshot).collect()
}
