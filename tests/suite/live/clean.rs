//! That nothing of a backup is left: not in the machine, and no unfinished file.
//!
//! Only what is left is looked for. Whether the backup is any good is the business of [`super::history`].

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::monitor::Monitor;
use super::vm::Vm;

/// A machine as it was found.
pub(crate) struct Found {
    nodes: Vec<String>,
    status: Value,
}

impl Found {
    pub(crate) fn of(vm: &mut Vm) -> Self {
        let nodes = (0..vm.disks.len()).map(|number| vm.node(number)).collect();
        Self { nodes, status: status(&mut vm.monitor) }
    }

    /// Fails if the machine is not as it was found, or if there is an unfinished file in a folder.
    #[track_caller]
    pub(crate) fn assert_clean(&self, vm: &mut Vm, folder: &Path) {
        assert_eq!(self.differences(vm, folder), [""; 0]);
    }

    /// What is not as it was.
    pub(crate) fn differences(&self, vm: &mut Vm, folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for (number, node) in self.nodes.iter().enumerate() {
            let now = vm.node(number);
            if now != *node {
                found.push(format!("disk {number} is {now}, was {node}"));
            }
        }
        let now = status(&mut vm.monitor);
        if now != self.status {
            found.push(format!("the machine is {now}, was {}", self.status));
        }
        let jobs = vm.monitor.execute("query-jobs", &json!({})).unwrap();
        found.extend(jobs.as_array().unwrap().iter().map(|job| format!("job {job}")));
        let nodes = vm.monitor.execute("query-named-block-nodes", &json!({})).unwrap();
        for node in nodes.as_array().unwrap() {
            let name = node["node-name"].as_str().unwrap();
            if name.starts_with("qmpbackup") {
                found.push(format!("node {name}"));
            }
            found.extend(strange_bitmaps(name, node["dirty-bitmaps"].as_array().map_or(&[], Vec::as_slice)));
        }
        unfinished(folder, &mut found);
        found
    }
}

fn status(monitor: &mut Monitor) -> Value {
    monitor.execute("query-status", &json!({})).unwrap()["status"].clone()
}

/// Bitmaps that no backup leaves: of another name, or more than one of a chain.
fn strange_bitmaps(node: &str, bitmaps: &[Value]) -> Vec<String> {
    let mut strange = Vec::new();
    let mut chains: HashMap<&str, u32> = HashMap::new();
    for bitmap in bitmaps {
        let name = bitmap["name"].as_str().unwrap_or("without a name");
        match epoch(name) {
            Some(chain) => *chains.entry(chain).or_default() += 1,
            None => strange.push(format!("bitmap {name} of {node}")),
        }
    }
    strange
        .extend(chains.iter().filter(|(_, n)| **n > 1).map(|(chain, n)| format!("{n} bitmaps of {chain} of {node}")));
    strange
}

/// Whether there is just the bitmap of this time and chain.
pub(crate) fn is_of(bitmaps: &[String], time: i64, chain: &str) -> bool {
    matches!(bitmaps, [name] if name.starts_with(&format!("qmpbackup-{time}-")) && name.ends_with(&format!("-{chain}")))
}

/// The chain of `qmpbackup-<digits>-<8 digits>-<uuid>`; the oldest versions had no digits between.
fn epoch(name: &str) -> Option<&str> {
    let (digits, uuid) = name.strip_prefix("qmpbackup-")?.split_once('-')?;
    let uuid =
        uuid.split_once('-').filter(|(tag, uuid)| tag.len() == 8 && uuid.len() == 36).map_or(uuid, |(_, uuid)| uuid);
    let digit_parts: Vec<usize> = uuid.split('-').map(str::len).collect();
    let is_uuid = digit_parts == [8, 4, 4, 4, 12] && uuid.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    let is_time = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit());
    (is_time && is_uuid).then_some(uuid)
}

fn unfinished(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            unfinished(&path, found);
        } else if name.contains(".partial") || name.contains(".fleece") {
            found.push(format!("file {}", path.display()));
        }
    }
}
