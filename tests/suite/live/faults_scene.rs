//! A machine whose disks are written to, a backup of it, and what must be so after any fault: nothing of the run is left,
//! images that were there are as they were, and the next INC holds all that is missing.
//!
//! Which faults there are is the business of the modules beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::clean::Found;
use super::draw::draw_write;
use super::faults_hooks::begins_jobs;
use super::hand::{Hand, Written};
use super::history::History;
use super::proxy::{Action, Hook, Proxy};
use super::spec::DiskSpec;
use super::tool::{Tool, restore};
use super::vm::Vm;
use crate::support::oracle::convert;
use crate::support::prng::Prng;
use crate::support::program::Ended;
use crate::support::sparse::{Fingerprint, fingerprints};
use crate::support::sums::assert_fit;

const SIZES: [u64; 2] = [2 << 20, (1 << 20) + 512];
/// A chain that gets longer than this makes place for a new one.
const LONGEST: usize = 8;

/// How the moment of a backup is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Fleece,
    Plain,
}

/// The guest, as far as it matters: it writes.
pub(super) struct Writer {
    hand: Hand,
    prng: Prng,
    disks: Vec<DiskSpec>,
}

impl Writer {
    /// Some writes, and one more that meets what comes next.
    pub(super) fn write(&mut self) {
        for _ in 0..2 {
            self.hand.guest_write(draw_write(&mut self.prng, &self.disks));
        }
        self.hand.begin_guest_write(draw_write(&mut self.prng, &self.disks));
    }

    /// Writes that must all be done.
    pub(super) fn write_surely(&mut self, count: usize) {
        for _ in 0..count {
            assert_eq!(self.hand.guest_write(draw_write(&mut self.prng, &self.disks)), Written::Done);
        }
    }
}

/// What has become of a run that something was done to.
#[derive(Debug)]
pub(super) struct Faulted {
    pub(super) ended: Ended,
    /// The command at which it was done; none if the run was over sooner.
    pub(super) at: Option<String>,
    /// Whether the jobs had begun by then, or were about to.
    pub(super) copying: bool,
}

pub(super) struct Scene {
    pub(super) vm: Vm,
    pub(super) target: PathBuf,
    pub(super) writer: Arc<Mutex<Writer>>,
    way: Way,
    found: Found,
    history: Arc<Mutex<History>>,
    images: BTreeMap<String, Fingerprint>,
}

impl Scene {
    /// A machine that was written to, and has a FULL.
    pub(super) fn new(release: &'static str, way: Way) -> Self {
        let mut scene = Self::without_backup(release, way);
        scene.run(&["--level", "full"]).with(0);
        scene.remember();
        scene
    }

    pub(super) fn without_backup(release: &'static str, way: Way) -> Self {
        let spec = |number: usize| DiskSpec::new(&format!("disk{number}.qcow2"), SIZES[number]);
        let mut vm = Vm::builder(release).disk(spec(0)).disk(spec(1)).start();
        let history = History::zeroes(&SIZES);
        let hand = vm.hand(&history);
        let mut writer = Writer { hand, prng: Prng::stream(1, 0), disks: vm.disks.clone() };
        writer.write_surely(30);
        let found = Found::of(&mut vm);
        let target = vm.path("target");
        Self { vm, target, writer: Arc::new(Mutex::new(writer)), way, found, history, images: BTreeMap::new() }
    }

    /// The words of a backup; `more` has the level.
    pub(super) fn words(&self, socket: &Path, more: &[&str]) -> Vec<String> {
        let (socket, target) = (socket.to_str().unwrap(), self.target.to_str().unwrap());
        let mut words = vec!["--socket", socket, "backup", "--target", target];
        if self.way == Way::Plain {
            words.push("--no-fleece");
        }
        words.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }

    /// Runs a backup with nobody in between.
    pub(super) fn run(&self, more: &[&str]) -> Ended {
        run(&Tool::built("qmpbackup"), &self.words(&self.vm.socket(), more))
    }

    pub(super) fn recover(&self, more: &[&str]) -> Ended {
        let socket = self.vm.socket();
        let words = ["--socket", socket.to_str().unwrap(), "recover"];
        Tool::built("qmpbackup").run(&[&words, more].concat())
    }

    /// Runs a backup with somebody in between, who writes before each command.
    pub(super) fn run_with(&self, more: &[&str], mut hook: Hook) -> Ended {
        let writer = Arc::clone(&self.writer);
        let hook = move |command: &Value, number| {
            writer.lock().unwrap().write();
            hook(command, number)
        };
        self.run_between(more, Box::new(hook))
    }

    /// Runs a backup with somebody in between.
    pub(super) fn run_between(&self, more: &[&str], hook: Hook) -> Ended {
        let tool = Tool::built("qmpbackup");
        let proxy = Proxy::start(&self.vm.path("proxy"), &self.vm.socket(), &tool.victim, hook);
        let ended = run(&tool, &self.words(proxy.path(), more));
        proxy.end();
        ended
    }

    /// Runs a backup and does something at the command with a number, of those that count.
    pub(super) fn fault(&self, more: &[&str], counts: fn(&str) -> bool, at: usize, action: &Action) -> Faulted {
        let hit = Arc::new(Mutex::new((None, false)));
        let (seen, action) = (Arc::clone(&hit), action.clone());
        let mut number = 0;
        let hook = move |command: &Value, _: usize| {
            let name = command["execute"].as_str().unwrap();
            let (at_command, copying) = &mut *seen.lock().unwrap();
            if at_command.is_none() {
                *copying |= begins_jobs(command);
            }
            let is_it = counts(name) && number == at;
            number += usize::from(counts(name));
            if is_it {
                *at_command = Some(name.to_owned());
                return action.clone();
            }
            Action::Forward
        };
        let ended = self.run_with(more, Box::new(hook));
        let (at, copying) = hit.lock().unwrap().clone();
        Faulted { ended, at, copying }
    }

    /// Nothing of a run is left in the machine and in the folders.
    #[track_caller]
    pub(super) fn assert_clean(&mut self) {
        let folder = self.vm.path("");
        self.found.assert_clean(&mut self.vm, &folder);
        assert!(!self.target.join(".qmpbackup/run.json").exists());
        self.assert_images();
    }

    /// What images there were are there.
    #[track_caller]
    pub(super) fn assert_images(&self) {
        let now = images(&self.target);
        for (path, print) in &self.images {
            assert_eq!(now.get(path), Some(print), "{path}");
        }
    }

    /// The next INC holds all that is missing, and then nothing of any run is left.
    #[track_caller]
    pub(super) fn assert_continues(&mut self, more: &[&str]) {
        self.write();
        let before = images(&self.target);
        self.run(&[&["--level", "inc"], more].concat()).with(0);
        self.assert_clean();
        let now = images(&self.target);
        let new: Vec<_> =
            now.keys().filter(|path| !before.contains_key(*path) && !path.contains("/.qmpbackup/")).collect();
        let incs = new.iter().filter(|path| path.contains("/INC-")).count();
        // What a run that died had whole comes with it
        assert!(incs >= SIZES.len(), "{new:?}");
        self.assert_restorable();
    }

    /// The newest restore point is what the disks are now.
    #[track_caller]
    pub(super) fn assert_restorable(&mut self) {
        self.writer.lock().unwrap().hand.finish();
        let known = assert_fit(&self.target);
        let all = images(&self.target).into_keys().filter(|path| !path.contains(".qmpbackup/"));
        // some are links
        let mut all: Vec<PathBuf> = all.map(|path| self.target.join(path).canonicalize().unwrap()).collect();
        all.sort();
        assert_eq!(known, all, "checksums");
        let restored: Vec<Vec<u8>> =
            folders(&self.target).iter().map(|folder| restore(folder, &newest(folder))).collect();
        {
            let mut history = self.history.lock().unwrap();
            let now = history.now();
            let moments = history.moments(&restored).unwrap();
            assert!(moments.contains(&now), "the last of {now} writes is in no image of {moments:?}");
            *history = History::new(restored);
        }
        self.remember();
        let chain = std::fs::read_dir(&folders(&self.target)[0]).unwrap().count();
        if chain > LONGEST {
            self.shorten();
        }
    }

    pub(super) fn write(&self) {
        let mut writer = self.writer.lock().unwrap();
        writer.write();
        writer.hand.finish();
    }

    /// Starts the machine again that has ended, and takes its disks as they are now.
    pub(super) fn restart(&mut self) {
        let content = |disk: &DiskSpec| {
            let raw = self.vm.path("raw");
            convert(&self.vm.path(&disk.name), &raw);
            std::fs::read(raw).unwrap()
        };
        *self.history.lock().unwrap() = History::new(self.vm.disks.iter().map(content).collect());
        self.vm.restart();
        self.writer.lock().unwrap().hand = self.vm.hand(&self.history);
    }

    /// Begins a new chain in a folder that is empty.
    fn shorten(&mut self) {
        std::fs::remove_dir_all(&self.target).unwrap();
        let socket = self.vm.socket();
        let words = ["--socket", socket.to_str().unwrap(), "cleanup", "--remove-bitmap"];
        Tool::built("qmpbackup").run(&words).with(0);
        self.run(&["--level", "full"]).with(0);
        self.remember();
    }

    /// What images there were are gone, and nobody minds.
    pub(super) fn forget(&mut self) {
        self.images.clear();
    }

    fn remember(&mut self) {
        self.images = images(&self.target);
    }
}

/// Runs a tool with words that somebody owns.
pub(super) fn run(tool: &Tool, words: &[String]) -> Ended {
    tool.run(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The images and what lies with them, by their paths; none that is not whole.
fn images(target: &Path) -> BTreeMap<String, Fingerprint> {
    let mut all = fingerprints(target);
    all.retain(|path, _| {
        let name = path.rsplit('/').next().unwrap_or_default();
        (name.starts_with("FULL-") || name.starts_with("INC-")) && !name.contains(".partial")
    });
    all
}

/// The folders of the disks.
pub(super) fn folders(target: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(target).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> =
        entries.filter(|path| path.is_dir() && path.file_name().unwrap() != ".qmpbackup").collect();
    folders.sort();
    assert_eq!(folders.len(), SIZES.len());
    folders
}

/// The time of the newest image of a disk.
fn newest(folder: &Path) -> String {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let names = std::fs::read_dir(folder).unwrap().map(name);
    let times = names.filter_map(|name| name.split('-').nth(1)?.parse::<u64>().ok());
    times.max().unwrap().to_string()
}
