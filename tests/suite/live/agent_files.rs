//! What a guest has written is in the backup, in file systems that need no repair.

use std::path::{Path, PathBuf};

use super::file_system::{self, files};
use super::quiesced::Quiesced;
use super::tool::restore_to;
use crate::support::program::event;
use crate::support::seeds;

/// A restore point: its time, and the folders of its disks.
struct Point {
    time: i64,
    folders: Vec<PathBuf>,
}

impl Point {
    /// Of the events of a backup.
    fn of(events: &[serde_json::Value]) -> Self {
        let mut images: Vec<&Path> = events
            .iter()
            .filter(|event| event["event"] == "image")
            .map(|event| Path::new(event["path"].as_str().unwrap()))
            .collect();
        images.sort();
        let folders = images.iter().map(|image| image.parent().unwrap().to_owned()).collect();
        Self { time: event(events, "done")["time"].as_i64().unwrap(), folders }
    }

    /// The disks as raw files.
    fn restore(&self, folder: &Path) -> Vec<PathBuf> {
        let raw = |number: usize| folder.join(format!("raw-{}-{number}", self.time));
        let disks = self.folders.iter().enumerate();
        disks.map(|(number, dir)| restore_to(dir, &self.time.to_string(), &raw(number))).collect()
    }
}

fn file_systems_are_clean(release: &'static str, stops: bool) {
    let mut machine = Quiesced::boot(release, 2);
    machine.write();
    let mut points = Vec::new();
    for level in ["full", "inc", "inc"] {
        // A freeze brings to the disks what the guest has written, synced or not
        let before = machine.written();
        let events = machine.backup("qmp", level, &["--json"]).with(0).events();
        let moment = event(&events, "moment");
        assert_eq!(moment["file_systems"], 2, "{moment}");
        assert!(moment["frozen_ms"].as_f64().unwrap() > 0.0, "{moment}");
        assert_eq!(moment["stopped_ms"].is_number(), stops, "{moment}");
        machine.assert_writes_go_on();
        points.push((Point::of(&events), before..machine.written()));
    }
    let ended = machine.backup("qmp", "inc", &[]).with(0).says(", 2 file systems were frozen for ");
    assert_eq!(ended.stderr.contains("the machine was stopped for "), stops, "{ended:#?}");
    let loose = machine.tool.run(&[
        "--json",
        "--socket",
        machine.vm.socket().to_str().unwrap(),
        "backup",
        "--level=inc",
        "--target",
        machine.vm.path("target").to_str().unwrap(),
    ]);
    let loose = Point::of(&loose.with(0).events());
    machine.assert_clean();
    machine.vm.kill();

    let folder = tempfile::tempdir().unwrap();
    for (point, known) in &points {
        let disks = point.restore(folder.path());
        assert_eq!(disks.len(), 2);
        for disk in &disks {
            file_system::assert_clean(disk);
        }
        let moment = machine.moment(&disks.iter().map(|disk| files(disk)).collect::<Vec<_>>());
        assert!(known.contains(&moment), "{release}: {moment} writes of {known:?}");
    }
    // The judge knows the difference
    assert!(loose.restore(folder.path()).iter().any(|disk| file_system::needs_recovery(disk)));
}

#[test]
fn quiesced_file_systems_of_qemu_5_2_need_no_repair() {
    file_systems_are_clean("5.2", false);
}

#[test]
fn quiesced_file_systems_of_qemu_7_2_need_no_repair() {
    if seeds::are_many() {
        file_systems_are_clean("7.2", false);
    }
}

#[test]
fn quiesced_file_systems_of_qemu_10_0_need_no_repair() {
    file_systems_are_clean("10.0", true);
}

#[test]
fn quiesced_file_systems_of_qemu_11_need_no_repair() {
    if seeds::are_many() {
        file_systems_are_clean("11", true);
    }
}
