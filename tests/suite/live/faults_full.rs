//! There is no space left: not for the images, or not for what the guest overwrites. Needs root for the mounts.

use std::sync::Arc;

use serde_json::Value;

use super::faults_hooks::while_copying;
use super::faults_scene::{Scene, Way};
use super::proxy::Action;
use super::vm::fleeces;
use crate::support::program::is_root;
use crate::support::small_disk::Small;

#[test]
fn a_target_that_gets_full_costs_one_run() {
    if !is_root() {
        return;
    }
    for (release, way) in [("5.2", Way::Plain), ("7.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Plain)] {
        // A QEMU that cannot be told otherwise breaks the guest's write where a job cannot keep old data
        let writes = fleeces(release);
        let mut scene = Scene::without_backup(release, way);
        let small = Small::mount(&scene.target, "24m");
        scene.run(&["--level", "full"]).with(0);
        scene.assert_restorable();
        // Too little for bookkeeping, for empty images, and for what is in them
        for left in [0, 64 << 10, 1 << 20] {
            for level in ["full", "inc"] {
                scene.writer.lock().unwrap().write_surely(60);
                small.fill(left);
                let ended = if writes {
                    scene.run_with(&["--level", level], Box::new(|_, _| Action::Forward))
                } else {
                    scene.run(&["--level", level])
                };
                ended.with(7).says("free space and run again");
                scene.assert_clean();
                small.free();
                scene.assert_continues(&[]);
            }
        }
        scene.vm.kill();
        drop(small);
    }
}

/// When it closes an image, QEMU tells nobody of them.
#[test]
fn tables_that_cannot_be_written_any_more_cost_one_run() {
    for (release, way) in [("5.2", Way::Plain), ("7.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Fleece)] {
        let mut scene = Scene::new(release, way);
        for words in [&["--level", "full"][..], &["--level", "inc"], &["--level", "full", "--compress"]] {
            // it can only be asked by those that are newer
            let says = match (release, words.len()) {
                ("5.2", 2) => "QEMU says that the image is whole, but it is not: its last tables could not be written",
                ("5.2", _) => continue,
                _ => "Error flushing drive: File too large",
            };
            scene.write();
            let limit = scene.vm.file_limit();
            let hook = move |command: &Value, _| {
                let is_target = |value: &Value| value.as_str().is_some_and(|node| node.ends_with("-target"));
                let closed = &command["arguments"]["node-name"];
                let flushed = &command["arguments"]["options"][0]["node-name"];
                let is_it = match command["execute"].as_str() {
                    Some("blockdev-del") => is_target(closed),
                    Some("blockdev-reopen") => is_target(flushed),
                    _ => false,
                };
                limit.set(is_it.then_some(0));
                Action::Forward
            };
            let ended = scene.run_between(words, Box::new(hook));
            scene.vm.file_limit().set(None);
            ended.with(1).says(says);
            scene.assert_clean();
            scene.assert_continues(&[]);
        }
    }
}

#[test]
fn a_fleece_image_that_gets_full_costs_one_run_and_no_write() {
    if !is_root() {
        return;
    }
    for release in ["10.0", "11"] {
        let mut scene = Scene::new(release, Way::Fleece);
        let fleece = scene.vm.path("fleece");
        let small = Small::mount(&fleece, "1m");
        for level in ["full", "inc"] {
            scene.writer.lock().unwrap().write_surely(60);
            let writer = Arc::clone(&scene.writer);
            let hook = while_copying(move || {
                writer.lock().unwrap().write_surely(200);
                Action::Forward
            });
            let words = ["--level", level, "--speed-limit", "3K", "--fleece-dir", fleece.to_str().unwrap()];
            let ended = scene.run_with(&words, hook);
            ended.with(7).says(fleece.to_str().unwrap()).says("--fleece-dir names a folder with more space");
            scene.assert_clean();
            scene.assert_continues(&[]);
        }
        scene.vm.kill();
        drop(small);
    }
}

#[test]
fn where_a_job_keeps_old_data_itself_a_full_target_costs_no_write() {
    if !is_root() {
        return;
    }
    let mut scene = Scene::without_backup("11", Way::Plain);
    let small = Small::mount(&scene.target, "24m");
    scene.run(&["--level", "full"]).with(0);
    scene.assert_restorable();
    small.fill(1 << 20);
    let writer = Arc::clone(&scene.writer);
    let hook = while_copying(move || {
        writer.lock().unwrap().write_surely(200);
        Action::Forward
    });
    let ended = scene.run_with(&["--level", "full", "--speed-limit", "64K"], hook);
    ended.with(7).says("free space and run again");
    scene.assert_clean();
    small.free();
    scene.assert_continues(&[]);
    scene.vm.kill();
}
