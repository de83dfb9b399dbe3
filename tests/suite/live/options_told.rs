//! What the program tells of a machine: JSON lines, logs, plans, listings; and what it cleans up.

use std::path::Path;

use serde_json::Value;

use super::field::Field;
use super::field_setup::{Setup, releases};
use super::proxy::{Action, Proxy, Victim};
use super::vm::fleeces;
use crate::support::program::{Ended, event};

/// The events that `src/cli/mod.rs` lists.
const EVENTS: [&str; 20] = [
    "connected",
    "machine",
    "skipped",
    "level",
    "target",
    "moment",
    "progress",
    "copied",
    "sealing",
    "sealed",
    "image",
    "recovered",
    "bitmap_removed",
    "notice",
    "warning",
    "command",
    "blockdev",
    "bitmaps",
    "error",
    "done",
];

fn disk(release: &'static str) -> Field {
    let mut field = Setup::of(release).disk("disk0").start();
    field.scribble("disk0");
    field
}

#[test]
fn each_line_is_a_documented_event_and_the_last_one_is_done_or_error() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        let runs = [
            field.backup("--level inc", 1),
            field.backup("--level full", 0),
            field.backup("--level auto --dry-run", 0),
            field.run("--json info --show blockdev"),
            field.run("--json info --show bitmaps"),
            field.run("--json recover"),
            field.run("--json cleanup --remove-bitmap"),
            field.backup("--level auto", 3),
        ];
        for ended in runs {
            let events = ended.events();
            let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
            assert!(names.iter().all(|name| EVENTS.contains(name)), "{names:?}");
            let last = events.last().unwrap();
            assert_eq!(last["event"], if ended.code == Some(1) { "error" } else { "done" }, "{ended:#?}");
            assert_eq!(last["exit_code"].as_i64(), ended.code.map(i64::from));
        }
    }
}

#[test]
fn a_log_goes_to_a_file_and_to_syslog_if_there_is_one() {
    let mut field = disk("10.0");
    field.backup("--level full --logfile @/log", 0);
    let ended = field.backup("--level inc -L @/log --quiet", 0);
    assert_eq!(ended.stderr, "");
    let log = std::fs::read_to_string(field.vm.path("log")).unwrap();
    for what in ["called with:", "disk0: FULL, as asked", "disk0: INC is in", "the backup is done: 1 image"] {
        assert!(log.contains(what), "{log}");
    }
    if Path::new("/dev/log").exists() {
        field.backup("--level inc --syslog", 0);
    } else {
        field.backup("--level inc --syslog", 3).says("/dev/log: no log goes to syslog");
    }
}

#[test]
fn images_that_are_dated_ahead_of_the_clock_are_a_warning() {
    let mut field = disk("10.0");
    let folder = field.target.join("disk0");
    std::fs::create_dir_all(&folder).unwrap();
    let future = folder.join("FULL-4000000000-disk0");
    std::fs::write(&future, "").unwrap();
    let ended = field.backup("--level full", 3);
    ended.says("a time that has not come yet: the new ones are of 4000000001");
    std::fs::remove_file(future).unwrap();
    field.backup("--level full", 3).says("4000000002");
}

/// The phases and commands of a plan.
fn commands(ended: &Ended) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let events = ended.events();
    let commands = events.iter().filter(|event| event["event"] == "command");
    commands.map(|event| format!("{} {}", text(&event["phase"]), text(&event["command"]["execute"]))).collect()
}

#[test]
fn a_dry_run_prints_all_commands_in_order_and_changes_nothing() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        let plan = field.backup("--level auto --dry-run", 0);
        assert!(!field.target.exists(), "there is a folder");
        assert_eq!(field.bitmaps("disk0"), [""; 0]);
        let begin = ["lock blockdev-add", "prepare transaction", "prepare blockdev-add"];
        let rest: &[&str] = if fleeces(release) {
            &[
                "prepare blockdev-add",
                "prepare blockdev-add",
                "moment stop",
                "moment qom-set",
                "moment cont",
                "start blockdev-add",
                "start transaction",
            ]
        } else {
            &["moment transaction"]
        };
        assert_eq!(commands(&plan), [&begin, rest].concat(), "{plan:#?}");

        field.makes("--level full", 0, "disk0 FULL");
        let (bitmaps, files) = (field.bitmaps("disk0"), crate::support::sparse::fingerprints(&field.target));
        field.backup("--level inc --dry-run", 0).says("disk0: INC on top of");
        assert_eq!(field.bitmaps("disk0"), bitmaps);
        assert!(crate::support::sparse::fingerprints(&field.target) == files, "a file was changed");
        let words = format!("backup --level inc --dry-run --target {}", field.target.display());
        field.run(&words).with(0).says("# moment: the moment of the snapshot");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn the_disks_and_bitmaps_of_a_machine_are_shown() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        field.makes("--level full", 0, "disk0 FULL");
        let shown = field.run("--json info --show blockdev").with(0);
        let disk = event(&shown.events(), "blockdev")["disks"][0].clone();
        assert_eq!(disk["node"], "disk0");
        assert_eq!(disk["format"], "qcow2");
        assert_eq!(disk["virtual_size"], 4 << 20);
        assert_eq!(disk["has_bitmap"], true);
        let shown = field.run("--json info --show bitmaps").with(0);
        let bitmap = event(&shown.events(), "bitmaps")["nodes"]["disk0"][0].clone();
        assert_eq!(bitmap["name"], field.bitmaps("disk0")[0].as_str());
        assert_eq!((&bitmap["recording"], &bitmap["persistent"]), (&true.into(), &true.into()));
        // As text it is JSON without the event
        let text = field.run("info --show blockdev").with(0).stdout;
        let text: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(text, Value::Array(vec![disk]));
    }
}

#[test]
fn bitmaps_are_removed_of_one_chain_or_of_all() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Setup::of(release).disk("disk0").disk("disk1").start();
        field.usual.extend(["qmpbackup-".to_owned(), "bitmap mine".to_owned()]);
        let target = field.target.clone();
        for (folder, uuid) in [("a", "chain-a"), ("b", "chain-b")] {
            field.target = target.join(folder);
            field.backup(&format!("--level full --uuid {uuid}"), 0);
        }
        field.execute("block-dirty-bitmap-add", &serde_json::json!({ "node": "disk0", "name": "mine" }));
        for other in ["chain", "a"] {
            let words = format!("cleanup --remove-bitmap --uuid {other}");
            field.run(&words).with(0).says("there is no bitmap to remove");
        }
        let ended = field.run("--json cleanup --remove-bitmaps --uuid chain-a").with(0);
        assert_eq!(event(&ended.events(), "done")["removed"], 2);
        let kept = field.bitmaps("disk0");
        assert_eq!(kept.len(), 2);
        assert!(kept.iter().any(|name| name.ends_with("-chain-b")) && kept.iter().any(|name| name == "mine"));
        field.run("cleanup --remove-bitmap").with(0).says("removed 2 bitmaps");
        assert_eq!(field.bitmaps("disk0"), ["mine"]);
        field.run("cleanup").with(2);
        field.backup("--level inc", 4).says("no bitmap goes back to the newest image");
    }
}

#[test]
fn a_bitmap_that_qemu_keeps_does_not_keep_others() {
    let mut field = Setup::of("10.0").disk("disk0").disk("disk1").start();
    field.makes("--level full", 0, "disk0 FULL, disk1 FULL");
    let mut refused = false;
    let hook = move |command: &Value, _: usize| {
        if command["execute"] != "block-dirty-bitmap-remove" || std::mem::replace(&mut refused, true) {
            return Action::Forward;
        }
        Action::Fail("not now".to_owned())
    };
    let proxy = Proxy::start(&field.vm.path("proxy"), &field.vm.socket(), &Victim::default(), Box::new(hook));
    let ended = field.run("cleanup --remove-bitmap --socket @/proxy").with(3);
    ended.says("removed 1 bitmap").says("cannot be removed: ").says("not now");
    proxy.end();
    assert_eq!(field.bitmaps("disk0").len() + field.bitmaps("disk1").len(), 1);
    field.run("cleanup --remove-bitmap").with(0).says("removed 1 bitmap");
}
