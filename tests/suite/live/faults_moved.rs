//! A disk that somebody moves to another file while it is backed up.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::faults_hooks::{begins_jobs, changing};
use super::faults_scene::{Scene, Way};
use super::monitor::Monitor;
use super::proxy::Action;
use crate::support::tools;

/// How the move was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// The run was over sooner.
    Never,
    Refused,
    Moving,
}

/// Begins to move the first disk before the command with a number; of those that only look while jobs run, there are many.
fn backup_while_moving(scene: &mut Scene, at: usize) -> Begun {
    let path = scene.vm.path("copy.qcow2");
    if scene.vm.monitor.execute("blockdev-del", &json!({ "node-name": "copy" })).is_ok() {
        std::fs::remove_file(&path).unwrap();
    }
    let size = scene.vm.device(0)["inserted"]["image"]["virtual-size"].to_string();
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(size));
    let file = json!({ "driver": "file", "filename": path });
    let copy = json!({ "node-name": "copy", "driver": "qcow2", "file": file });
    scene.vm.monitor.execute("blockdev-add", &copy).unwrap();
    let mirror = json!({ "job-id": "move", "device": scene.vm.node(0), "target": "copy", "sync": "full" });
    let mut monitor = Monitor::connect(&scene.vm.path("qmp2"));
    let begun = Arc::new(Mutex::new(Begun::Never));
    let seen = Arc::clone(&begun);
    let (mut number, mut copies) = (0, false);
    let hook = move |command: &Value, _: usize| {
        copies |= begins_jobs(command);
        let counts = !copies || changing(command["execute"].as_str().unwrap());
        number += usize::from(counts);
        if counts && number == at {
            let moved = monitor.execute("blockdev-mirror", &mirror);
            eprintln!("{number}, before {}: {moved:?}", command["execute"]);
            *seen.lock().unwrap() = if moved.is_ok() { Begun::Moving } else { Begun::Refused };
        }
        Action::Forward
    };
    let ended = scene.run_with(&["--level", "full", "--speed-limit", "4M"], Box::new(hook));
    let begun = *begun.lock().unwrap();
    match begun {
        Begun::Never | Begun::Refused => drop(ended.with(0)),
        // what was copied is right where the job began after the last of the run
        Begun::Moving if ended.code == Some(0) => {}
        Begun::Moving => drop(ended.says("somebody else")),
    }
    begun
}

/// The device goes over to what it was moved to.
fn complete(scene: &mut Scene) {
    let until = Instant::now() + Duration::from_secs(60);
    let mut completed = false;
    loop {
        let jobs = scene.vm.monitor.execute("query-jobs", &json!({})).unwrap();
        let Some(job) = jobs.as_array().unwrap().first() else { break };
        if job["status"] == "ready" && !completed {
            scene.write();
            scene.vm.monitor.execute("job-complete", &json!({ "id": "move" })).unwrap();
            completed = true;
        }
        assert!(Instant::now() < until, "{jobs}");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(scene.vm.node(0), "copy");
}

#[test]
fn a_disk_that_is_moved_from_any_command_on_has_all_that_was_written() {
    let mut scene = Scene::without_backup("10.0", Way::Fleece);
    // before, the run refuses such a machine at its first look
    for at in (16..).step_by(2) {
        match backup_while_moving(&mut scene, at) {
            Begun::Never => {
                assert!(at > 60, "{at} commands are no backup");
                return;
            }
            Begun::Refused => {}
            Begun::Moving => {
                complete(&mut scene);
                scene.target = scene.vm.path("after");
                assert!(matches!(scene.run(&["--level", "full"]).code, Some(0 | 3)));
                scene.assert_restorable();
                scene = Scene::without_backup("10.0", Way::Fleece);
            }
        }
    }
}
