//! A backup in a few lines, without the program: the simplest right order of commands, and wrong ones for the judge to find.
//!
//! It knows its machine and takes no care at all: an error ends the test.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::monitor::Monitor;
use super::spec::Format;
use super::vm::Vm;
use crate::support::tools;

const CHAIN: &str = "1b4e28ba-2fa1-11d2-883f-0016d3cca427";
/// Slow enough that many commands, and the writes before them, come while it copies.
const SPEED: u64 = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The new bitmap begins and the old one ends in the moment of the backup, for all disks.
    Right,
    /// The new bitmap begins one command later: what is written between is in no image.
    BitmapLater,
    /// One disk, then the next: each has a moment of its own.
    DiskAfterDisk,
}

struct ClientDisk {
    node: String,
    size: u64,
    persistent: bool,
    folder: PathBuf,
}

pub(crate) struct Client {
    monitor: Monitor,
    disks: Vec<ClientDisk>,
    way: Way,
    newest: Option<u64>,
}

impl Client {
    /// For the disks of a machine, with the folders for them below `target`.
    pub(crate) fn new(vm: &mut Vm, socket: &Path, target: &Path, way: Way) -> Self {
        let count = vm.disks.len();
        let disk = |number: usize| {
            let folder = folder(target, number);
            std::fs::create_dir_all(&folder).unwrap();
            let (node, spec) = (vm.node(number), &vm.disks[number]);
            let persistent = matches!(spec.format, Format::Qcow2 { .. });
            ClientDisk { node, size: spec.size, persistent, folder }
        };
        let disks = (0..count).map(disk).collect();
        Self { monitor: Monitor::connect(socket), disks, way, newest: None }
    }

    /// Makes a restore point: a FULL, or an INC on the newest one.
    pub(crate) fn backup(&mut self, time: u64) {
        let level = if self.newest.is_some() { "INC" } else { "FULL" };
        let names: Vec<PathBuf> =
            self.disks.iter().map(|disk| disk.folder.join(format!("{level}-{time}-disk"))).collect();
        let all = 0..self.disks.len();
        for number in all.clone() {
            let partial = names[number].with_extension("partial");
            let size = self.disks[number].size.to_string();
            tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&partial).arg(size));
            let file = json!({ "driver": "file", "filename": partial });
            self.run("blockdev-add", &json!({ "node-name": node(number), "driver": "qcow2", "file": file }));
        }
        let (bitmaps, jobs) = (|number| self.bitmap_actions(number, time), |number| self.job_action(number));
        let transactions: Vec<Vec<Value>> = match self.way {
            Way::Right => vec![all.clone().flat_map(bitmaps).chain(all.clone().map(jobs)).collect()],
            Way::BitmapLater => vec![all.clone().map(jobs).collect(), all.clone().flat_map(bitmaps).collect()],
            Way::DiskAfterDisk => {
                all.clone().map(|number| bitmaps(number).into_iter().chain([jobs(number)]).collect()).collect()
            }
        };
        for actions in transactions {
            self.run("transaction", &json!({ "actions": actions }));
        }
        self.finish_jobs();
        for (number, name) in names.iter().enumerate() {
            self.run("blockdev-del", &json!({ "node-name": node(number) }));
            std::fs::rename(name.with_extension("partial"), name).unwrap();
        }
        for number in all {
            if let Some(old) = self.newest {
                let arguments = json!({ "node": self.disks[number].node, "name": bitmap(old) });
                self.run("block-dirty-bitmap-remove", &arguments);
            }
        }
        self.newest = Some(time);
    }

    fn bitmap_actions(&self, number: usize, time: u64) -> Vec<Value> {
        let ClientDisk { node, persistent, .. } = &self.disks[number];
        let new = json!({ "node": node, "name": bitmap(time), "persistent": persistent });
        let mut actions = vec![json!({ "type": "block-dirty-bitmap-add", "data": new })];
        // In the wrong order a job has it already
        if let Some(old) = self.newest.filter(|_| self.way != Way::BitmapLater) {
            let old = json!({ "node": node, "name": bitmap(old) });
            actions.push(json!({ "type": "block-dirty-bitmap-disable", "data": old }));
        }
        actions
    }

    fn job_action(&self, number: usize) -> Value {
        let mut job = json!({
            "job-id": node(number), "device": self.disks[number].node, "target": node(number), "sync": "full",
            "auto-dismiss": false, "speed": SPEED,
        });
        if let Some(old) = self.newest {
            job["sync"] = "bitmap".into();
            job["bitmap"] = bitmap(old).into();
            job["bitmap-mode"] = "never".into();
        }
        json!({ "type": "blockdev-backup", "data": job })
    }

    fn finish_jobs(&mut self) {
        loop {
            let jobs = self.run("query-jobs", &json!({}));
            let jobs = jobs.as_array().unwrap();
            assert_eq!(jobs.len(), self.disks.len());
            assert!(jobs.iter().all(|job| job.get("error").is_none()), "{jobs:#?}");
            if jobs.iter().all(|job| job["status"] == "concluded") {
                break;
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        for number in 0..self.disks.len() {
            self.run("job-dismiss", &json!({ "id": node(number) }));
        }
    }

    fn run(&mut self, name: &str, arguments: &Value) -> Value {
        self.monitor.execute(name, arguments).unwrap_or_else(|error| panic!("{name} {arguments}: {error}"))
    }
}

/// Where the images of a disk are.
pub(crate) fn folder(target: &Path, number: usize) -> PathBuf {
    target.join(format!("disk{number}"))
}

/// The node of a target, and its job.
fn node(number: usize) -> String {
    format!("qmpbackup-{number}")
}

fn bitmap(time: u64) -> String {
    format!("qmpbackup-{time}-{CHAIN}")
}
