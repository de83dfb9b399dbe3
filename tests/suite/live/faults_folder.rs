//! The folder of the backup goes away while one is made, and somebody else ends its jobs or its bitmaps.

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::faults_hooks::{begins_jobs, while_copying};
use super::faults_scene::{Scene, Way};
use super::monitor::Monitor;
use super::proxy::{Action, Hook};

const WHERE: [(&str, Way); 4] = [("5.2", Way::Plain), ("7.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Fleece)];

/// Removes a folder at the first command of a kind.
fn remove_at(folder: &Path, what: fn(&Value) -> bool) -> Hook {
    let (folder, mut done) = (folder.to_owned(), false);
    Box::new(move |command, _| {
        if !done && what(command) {
            done = true;
            std::fs::remove_dir_all(&folder).unwrap();
        }
        Action::Forward
    })
}

#[test]
fn a_target_that_is_removed_meanwhile_leaves_nothing_in_the_machine() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        let first = |command: &Value| command["execute"] == "query-name";
        let locked = |command: &Value| command["execute"] == "blockdev-add";
        for (number, what) in [first, locked, begins_jobs].into_iter().enumerate() {
            for level in ["full", "inc"] {
                let ended = scene.run_with(&["--level", level], remove_at(&scene.target, what));
                assert_eq!(ended.code, Some(1), "{ended:#?}");
                // The next one is made elsewhere
                scene.target = scene.vm.path(&format!("target-{number}-{level}"));
                scene.forget();
                scene.run(&["--level", "full"]).with(0);
                scene.assert_clean();
                scene.assert_restorable();
                scene.assert_continues(&[]);
            }
        }
    }
}

/// Removes the image of a disk when all are whole, and none has its name.
fn remove_whole(folder: &Path, disk: &str) -> Hook {
    let (journal, disk) = (folder.join(".qmpbackup/run.json"), folder.join(disk));
    Box::new(move |_, _| {
        let text = std::fs::read_to_string(&journal).unwrap_or_default();
        if serde_json::from_str(&text).is_ok_and(|journal: Value| journal["publishing"] == true) {
            let files = std::fs::read_dir(&disk).unwrap().map(|entry| entry.unwrap().path());
            files.filter(|path| path.to_str().unwrap().ends_with(".partial")).for_each(|path| {
                std::fs::remove_file(path).unwrap();
            });
        }
        Action::Forward
    })
}

#[test]
fn an_image_that_is_removed_before_it_has_its_name_is_not_said_to_be_made() {
    for words in [&["--level", "full"][..], &["--level", "copy", "--no-timestamp"]] {
        let mut scene = Scene::new("10.0", Way::Fleece);
        if words.contains(&"copy") {
            // the image of an earlier run has the name
            scene.run(words).with(0);
        }
        let ended = scene.run_with(words, remove_whole(&scene.target, "disk0")).with(3);
        let ended =
            ended.says("was removed before it had its name").says_not("disk0: FULL is").says_not("disk0: COPY is");
        ended.says("disk1: ").says("the backup is done: 1 image in");
        scene.assert_clean();
    }
}

/// Removes an image when jobs begin.
fn remove_image(image: &Path) -> Hook {
    let image = image.to_owned();
    Box::new(move |command, _| {
        if begins_jobs(command) {
            std::fs::remove_file(&image).unwrap();
        }
        Action::Forward
    })
}

#[test]
fn an_inc_whose_parent_is_removed_meanwhile_is_not_said_to_be_made() {
    let mut scene = Scene::new("10.0", Way::Fleece);
    scene.run(&["--level", "inc"]).with(0);
    let images = std::fs::read_dir(scene.target.join("disk0")).unwrap().map(|entry| entry.unwrap().path());
    let mut images: Vec<_> = images.filter(|path| path.is_file()).collect();
    images.sort_by_key(|path| path.symlink_metadata().unwrap().modified().unwrap());
    let parent = images.pop().unwrap();
    let ended = scene.run_with(&["--level", "inc"], remove_image(&parent)).with(1);
    ended.says(parent.to_str().unwrap()).says("was removed meanwhile");
    scene.forget();
    scene.assert_clean();
    scene.run(&["--level", "auto"]).with(3);
    scene.assert_clean();
}

/// Ends one of the jobs with a command.
fn end_job(other: &Arc<Mutex<Monitor>>, command: &'static str, key: &'static str) -> Hook {
    let other = Arc::clone(other);
    while_copying(move || {
        let mut other = other.lock().unwrap();
        let jobs = other.execute("query-jobs", &json!({})).unwrap();
        other.execute(command, &json!({ key: jobs[0]["id"] })).unwrap();
        Action::Forward
    })
}

#[test]
fn a_job_that_somebody_else_ends_costs_one_run() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        let other = Arc::new(Mutex::new(Monitor::connect(&scene.vm.path("qmp2"))));
        for (command, key) in [("job-cancel", "id"), ("block-job-cancel", "device")] {
            for level in ["full", "inc"] {
                scene.writer.lock().unwrap().write_surely(60);
                let words = ["--level", level, "--speed-limit", "3K"];
                let ended = scene.run_with(&words, end_job(&other, command, key));
                ended.with(1).says("cancel");
                scene.assert_clean();
                scene.assert_continues(&[]);
            }
        }
    }
}

/// Does something to all bitmaps that no job uses.
fn end_bitmaps(other: &Arc<Mutex<Monitor>>, command: &'static str) -> Hook {
    let other = Arc::clone(other);
    while_copying(move || {
        let mut other = other.lock().unwrap();
        for node in other.execute("query-named-block-nodes", &json!({})).unwrap().as_array().unwrap() {
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                // those of jobs have no name
                if bitmap["busy"] == false && bitmap["name"].is_string() {
                    other.execute(command, &json!({ "node": node["node-name"], "name": bitmap["name"] })).unwrap();
                }
            }
        }
        Action::Forward
    })
}

#[test]
fn a_bitmap_that_somebody_else_ends_is_told_by_the_run_that_began_it() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        let other = Arc::new(Mutex::new(Monitor::connect(&scene.vm.path("qmp2"))));
        for command in ["block-dirty-bitmap-remove", "block-dirty-bitmap-disable"] {
            let words = ["--level", "full", "--speed-limit", "1M"];
            let ended = scene.run_with(&words, end_bitmaps(&other, command));
            ended.with(3).says("disk0").says("disk1").says("no INC can follow");
            scene.run(&["--level", "inc"]).with(4);
            let untold = scene.run(&["--level", "full"]).with(0);
            assert!(!untold.stderr.contains("no INC can follow"), "{untold:?}");
        }
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}

#[test]
fn a_target_that_is_away_while_its_images_get_their_names_goes_on_when_it_is_back() {
    for (release, way) in [("5.2", Way::Plain), ("10.0", Way::Fleece)] {
        let mut scene = Scene::new(release, way);
        let (target, away) = (scene.target.clone(), scene.vm.path("away"));
        let journal = target.join(".qmpbackup/run.json");
        for level in ["inc", "full"] {
            let (target, away, journal) = (target.clone(), away.clone(), journal.clone());
            let hook: Hook = Box::new(move |_, _| {
                let text = std::fs::read_to_string(&journal).unwrap_or_default();
                if text.contains("\"publishing\":true") || text.contains("\"publishing\": true") {
                    std::fs::rename(&target, &away).unwrap();
                }
                Action::Forward
            });
            scene.run_with(&["--level", level], hook).with(1).says("the bitmaps stay for when it comes back");
            scene.write();
            std::fs::rename(scene.vm.path("away"), &scene.target).unwrap();
            scene.run(&["--level", "inc"]).with(0).says("the run of");
            scene.assert_clean();
            scene.assert_restorable();
        }
    }
}
