//! How the data goes: compressed, slowly, with the machine stopped, without fleece images or with some elsewhere, around
//! the cache.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use super::field::Field;
use super::field_setup::{Setup, releases};
use super::monitor::Monitor;
use super::proxy::{Action, Proxy};
use super::tool::Tool;
use super::vm::fleeces;
use crate::support::program::{Ended, event};
use crate::support::tools;

fn disk(release: &'static str) -> Field {
    let mut field = Setup::of(release).disk("disk0").start();
    field.scribble("disk0");
    field
}

/// A FULL and an INC with these words.
fn both(field: &mut Field, words: &str) -> [Ended; 2] {
    let full = field.makes(&format!("--level full {words}"), 0, "disk0 FULL");
    field.scribble("disk0");
    let inc = field.makes(&format!("--level inc {words}"), 0, "disk0 INC");
    field.verify();
    [full, inc]
}

#[test]
fn compressed_images_are_compressed_and_come_back() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        field.write("disk0", 0x5a, 1 << 20, 1 << 20);
        both(&mut field, "--compress");
        for point in &field.points {
            let image = &point.images[0].path;
            let told = tools::run(tools::qemu_img().args(["check", "--output", "json"]).arg(image));
            let told: Value = serde_json::from_str(&told).unwrap();
            assert!(told["compressed-clusters"].as_u64().unwrap() > 0, "{told:#}");
        }
    }
}

#[test]
fn a_speed_limit_takes_its_time() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release).image("disk0", "16M", "").qcow2("disk0", "disk0").start();
        field.write("disk0", 1, 0, 8 << 20);
        let seconds = |ended: &Ended| event(&ended.events(), "copied")["seconds"].as_f64().unwrap();
        let fast = seconds(&field.makes("--level copy", 0, "disk0 COPY"));
        let slow = seconds(&field.makes("--level copy --speed-limit 4M", 0, "disk0 COPY"));
        assert!(slow > 1.0 && slow > 2.0 * fast, "{slow} and {fast} seconds");
    }
}

#[test]
fn a_machine_is_stopped_only_where_that_is_needed_or_asked_for() {
    for release in releases(&["5.2", "7.2", "10.0"]) {
        for (words, stopped) in
            [("--no-fleece", false), ("--no-fleece --pause", true), ("", fleeces(release)), ("--pause", true)]
        {
            let mut field = disk(release);
            for ended in both(&mut field, words) {
                let moment = event(&ended.events(), "moment").clone();
                assert_eq!(moment["stopped_ms"].is_f64(), stopped, "{release} {words}: {moment}");
            }
        }
    }
}

#[test]
fn a_pause_is_around_the_transaction() {
    let mut field = disk("10.0");
    let told = field.backup("--level full --no-fleece --pause --dry-run", 0);
    let commands: Vec<(String, String)> = told
        .events()
        .iter()
        .filter(|event| event["event"] == "command")
        .map(|event| {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            (text(&event["phase"]), text(&event["command"]["execute"]))
        })
        .filter(|(phase, _)| phase == "moment")
        .collect();
    let names: Vec<&str> = commands.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["stop", "transaction", "cont"]);
}

#[test]
fn fleece_images_go_where_they_are_told_to_or_nowhere() {
    // The oldest one has none
    for release in releases(&["10.0"]).into_iter().filter(|release| *release != "5.2") {
        let mut field = disk(release);
        let fleece = field.vm.path("fleece");
        std::fs::create_dir(&fleece).unwrap();
        let words = "--fleece-dir @/fleece";
        let folder = format!("\"filename\":\"{}/FULL-", fleece.display());
        field.backup(&format!("--level full {words} --dry-run"), 0).says(&folder);
        field.backup("--level full --no-fleece --dry-run", 0).says_not(".fleece");
        both(&mut field, words);
        assert_eq!(std::fs::read_dir(&fleece).unwrap().count(), 0);
        field.backup("--level full --no-fleece --fleece-dir @/fleece", 2);
        field.backup("--level inc --fleece-dir @/nowhere", 1).says("nowhere");
    }
}

#[test]
fn images_are_written_around_the_cache() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        let probe = rustix::fs::open(
            field.vm.path("probe"),
            OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT,
            Mode::from_raw_mode(0o600),
        );
        if probe.is_err() {
            eprintln!("skipped: the file system of temporary files has no O_DIRECT");
            return;
        }
        both(&mut field, "--blockdev-disable-cache");
        field.backup("--level copy --blockdev-disable-cache --dry-run", 0).says("\"cache\":{\"direct\":true}");
    }
}

#[test]
fn images_are_written_with_the_ring_of_the_kernel_where_qemu_has_it() {
    for release in releases(&["5.2", "10.0", "11"]) {
        let mut field = disk(release);
        let ended = field.run("backup --target @/probe --level copy --blockdev-aio io_uring");
        if ended.code != Some(0) && ended.stderr.contains("io_uring") {
            eprintln!("skipped: QEMU {release} was built without io_uring, or the kernel has none");
            continue;
        }
        ended.with(0);
        both(&mut field, "--blockdev-aio io_uring");
    }
}

#[test]
fn images_stay_attached_as_long_as_they_are_told_to() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        let started = Instant::now();
        field.makes("--level full --remove-delay 1.5", 0, "disk0 FULL");
        assert!(started.elapsed() > Duration::from_millis(1500));
        field.verify();
    }
}

/// Else a guest that writes much while it is backed up fills the folder of its fleece image.
#[test]
fn what_is_copied_takes_no_room_in_the_fleece_image() {
    for release in releases(&["10.0", "11"]) {
        let mut field = Setup::of(release).image("disk.qcow2", "64M", "").qcow2("disk0", "disk.qcow2").start();
        field.write("disk0", 7, 0, 64 << 20);
        let mut monitor = Monitor::connect(&field.vm.path("hand"));
        let device = field.drive("disk0")["qdev"].as_str().unwrap().to_owned();
        let sizes = Arc::new(Mutex::new(Vec::new()));
        let (seen, mut at) = (Arc::clone(&sizes), 0);
        let hook = move |command: &Value, _| {
            // before the job, or behind it
            if command["execute"] == "query-jobs" {
                at = (at + 24) % 56;
                assert_eq!(monitor.hmp(&format!("qemu-io -d {device} \"write -P 9 {at}M 8M\"")), "");
                let nodes = monitor.execute("query-named-block-nodes", &json!({ "flat": true })).unwrap();
                let fleece = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "qmpbackup-0-fleece");
                seen.lock().unwrap().extend(fleece.and_then(|node| node["image"]["actual-size"].as_u64()));
            }
            Action::Forward
        };
        let tool = Tool::built("qmpbackup");
        let proxy = Proxy::start(&field.vm.path("proxy"), &field.vm.socket(), &tool.victim, Box::new(hook));
        let (socket, target) = (proxy.path().to_str().unwrap(), field.target.to_str().unwrap());
        let words = ["--socket", socket, "backup", "--level", "full", "--speed-limit", "16M", "--target", target];
        tool.run(&words).with(0);
        proxy.end();
        let sizes = sizes.lock().unwrap();
        let (most, last) = (sizes.iter().max().unwrap(), sizes.last().unwrap());
        // without room given back the last is the most; what QEMU copies just while the job reads the same may stay
        assert!(*most > 4 << 20 && *last + (3 << 20) < *most, "{release}: {sizes:?}");
    }
}
