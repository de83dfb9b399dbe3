//! The built program and a backup folder for it: a copy of the recorded chain, under any names.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::tools;

/// The times of the recorded images.
pub(crate) const TIMES: [i64; 4] = [1_793_588_400, 1_793_674_800, 1_793_761_200, 1_793_847_600];
/// The size of the recorded disk.
pub(crate) const SIZE: u64 = 64 << 20;

const LEVELS: [&str; 4] = ["FULL", "INC", "INC", "INC"];

/// `qmprestore` with nothing of the environment that changes what it says.
pub(crate) fn qmprestore<I: AsRef<OsStr>>(arguments: impl IntoIterator<Item = I>) -> Command {
    program(env!("CARGO_BIN_EXE_qmprestore"), arguments)
}

/// Any of the programs with nothing of the environment that changes what it says.
pub(crate) fn program<I: AsRef<OsStr>>(path: &str, arguments: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(path);
    command.args(arguments).env("TZ", "UTC").env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
    command
}

/// A program that ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Runs `qmprestore`.
    pub(crate) fn run<I: AsRef<OsStr>>(arguments: impl IntoIterator<Item = I>) -> Self {
        Self::of(&mut qmprestore(arguments))
    }

    pub(crate) fn of(command: &mut Command) -> Self {
        Self::new(tools::output(command))
    }

    #[track_caller]
    pub(crate) fn with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// It fails like this; but where the images had their names already, it warns of what is left to do.
    #[track_caller]
    pub(crate) fn fails(self, code: i32) -> Self {
        let code = if self.stderr.contains("the backup is done") { 3 } else { code };
        self.with(code)
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text) || self.stdout.contains(text), "no {text:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub(crate) fn says_not(self, text: &str) -> Self {
        assert!(!self.stderr.contains(text) && !self.stdout.contains(text), "{text:?} in {self:#?}");
        self
    }

    /// The JSON lines of stdout.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        events(&self.stdout)
    }
}

#[track_caller]
pub(crate) fn events(lines: &str) -> Vec<Value> {
    let event = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let events: Vec<Value> = lines.lines().map(event).collect();
    assert!(events.iter().all(|event| event["event"].is_string()), "{lines}");
    events
}

/// The one event of a kind.
#[track_caller]
pub(crate) fn event<'a>(events: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<&Value> = events.iter().filter(|event| event["event"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind} in {events:#?}");
    found[0]
}

/// A backup folder with one disk, and room beside it.
pub(crate) struct Backup {
    pub(crate) root: TempDir,
    /// The folder of the disk.
    pub(crate) dir: PathBuf,
    pub(crate) images: Vec<PathBuf>,
}

impl Backup {
    /// The recorded chain as it is.
    pub(crate) fn new() -> Self {
        Self::named("backup/disk0", "disk.qcow2", TIMES)
    }

    /// The recorded chain in another folder, of another disk, at other times.
    pub(crate) fn named(dir: impl AsRef<OsStr>, disk: impl AsRef<OsStr>, times: [i64; 4]) -> Self {
        let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let dir = root.path().join(dir.as_ref());
        std::fs::create_dir_all(&dir).unwrap();
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/chain/disk0");
        let image = |((level, old), time): ((&str, i64), i64)| {
            let mut name = OsString::from(format!("{level}-{time}-"));
            name.push(disk.as_ref());
            let path = dir.join(name);
            std::fs::copy(recorded.join(format!("{level}-{old}-disk.qcow2")), &path).unwrap();
            path
        };
        let images = LEVELS.into_iter().zip(TIMES).zip(times).map(image).collect();
        Self { root, dir, images }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// `merge --dir DIR` and more.
    pub(crate) fn merge<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = qmprestore(["merge", "--dir"]);
        command.arg(&self.dir).args(arguments).current_dir(self.root.path());
        command
    }

    /// Runs `merge`.
    pub(crate) fn merged<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Ended {
        Ended::of(&mut self.merge(arguments))
    }

    /// Changes bytes of an image.
    pub(crate) fn patch(&self, number: usize, offset: u64, change: impl FnOnce(&mut [u8; 8])) {
        let file = File::options().read(true).write(true).open(&self.images[number]).unwrap();
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        change(&mut bytes);
        file.write_all_at(&bytes, offset).unwrap();
    }

    /// Sets the refcount of the header cluster, which is one.
    pub(crate) fn set_header_refcount(&self, number: usize, refcount: u8) {
        let image = std::fs::read(&self.images[number]).unwrap();
        let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        let block = word(word(48) as usize);
        self.patch(number, block, |bytes| bytes[1] = refcount);
    }

    /// What QEMU makes of a restore point, as a raw file.
    pub(crate) fn expected(&self, last: usize) -> PathBuf {
        let room = tempfile::Builder::new().prefix("expected-").tempdir_in(self.root.path()).unwrap().keep();
        for number in 0..=last {
            std::fs::copy(&self.images[number], room.join(number.to_string())).unwrap();
            if number > 0 {
                let below = (number - 1).to_string();
                let based = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below.as_str(), &number.to_string()];
                tools::run(tools::qemu_img().args(based).current_dir(&room));
            }
        }
        let raw = room.join("raw");
        crate::support::oracle::convert(&room.join(last.to_string()), &raw);
        raw
    }
}

/// A name that is not text and would ring a bell, clear a terminal, end a line and turn the text around.
pub(crate) fn rude_name() -> OsString {
    OsString::from_vec(b"it's \x1b[2J\x07\n\xff\xe2\x80\xae disk".to_vec())
}

/// Whether the tests may mount and use loop devices; says so where not.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: it needs root for a loop device or a mount");
    }
    root
}

/// The signals that ask a program to end, and the exit codes that tell of them. Under `nohup` one of them asks nobody.
pub(crate) fn ending_signals() -> Vec<(Signal, i32)> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignores_hangup = u64::from_str_radix(ignored.trim(), 16).unwrap() & 1 == 1;
    let all = [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)];
    all.into_iter().filter(|(signal, _)| !ignores_hangup || *signal != Signal::HUP).collect()
}
