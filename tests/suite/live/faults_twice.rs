//! Two runs at once: the second one goes away, and the first one does not notice. A first one that died is cleaned up
//! after, wherever the next one goes.

use qmpbackup::chain::FolderLock;
use serde_json::{Value, json};

use super::faults_hooks::kill_while_copying;
use super::faults_power::wait_for_jobs;
use super::faults_scene::{Scene, Way, run};
use super::monitor::Monitor;
use super::proxy::Action;
use super::tool::Tool;

const WHERE: [(&str, Way); 4] = [("5.2", Way::Plain), ("7.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Fleece)];

#[test]
fn a_second_run_on_the_same_folder_or_machine_goes_away() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        scene.writer.lock().unwrap().write_surely(60);
        let words = scene.words(&scene.vm.socket(), &["--level", "full", "--speed-limit", "1M"]);
        let tool = || Tool::built("qmpbackup");
        std::thread::scope(|scope| {
            let runs = scope.spawn(|| run(&tool(), &words));
            wait_for_jobs(&mut scene);
            let other = scene.vm.path("qmp2");
            let same_folder = scene.words(&other, &["--level", "inc"]);
            run(&tool(), &same_folder).with(6).says("another run uses this folder").says("run again when it has ended");
            let elsewhere = scene.vm.path("elsewhere").to_str().unwrap().to_owned();
            let other = other.to_str().unwrap();
            let backup = ["--socket", other, "backup", "--level", "full", "--target", &elsewhere];
            tool().run(&backup).with(6).says("another run uses this folder or machine");
            tool().run(&["--socket", other, "recover"]).with(6);
            tool().run(&["--socket", other, "recover", "--target", &elsewhere]).with(6);
            tool().run(&["--socket", other, "cleanup", "--remove-bitmap"]).with(6);
            assert!(!runs.is_finished(), "nothing was tested");
            runs.join().unwrap().with(0);
        });
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}

/// Whoever looked before the other was there takes nothing of it for what a dead run has left.
#[test]
fn a_run_that_began_just_now_keeps_the_machine() {
    for (release, way) in WHERE {
        let scene = Scene::new(release, way);
        let other = scene.vm.path("elsewhere");
        std::fs::create_dir(&other).unwrap();
        let lock = FolderLock::take(&other).unwrap();
        let node = json!({
            "driver": "file",
            "node-name": "qmpbackup-lock",
            "filename": lock.path(),
            "read-only": true,
            "locking": "off",
        });
        let hand = scene.vm.path("qmp2");
        let mut looks = 0;
        let begin = move |command: &Value, _: usize| {
            looks += usize::from(command["execute"] == "query-jobs");
            if looks == 2 {
                looks += 1;
                Monitor::connect(&hand).execute("blockdev-add", &node).unwrap();
            }
            Action::Forward
        };
        let ended = scene.run_with(&["--level", "full"], Box::new(begin));
        ended.with(6).says("another run uses this folder or machine");
        let mut monitor = Monitor::connect(&scene.vm.path("qmp2"));
        let nodes = monitor.execute("query-named-block-nodes", &json!({ "flat": true })).unwrap();
        assert!(nodes.as_array().unwrap().iter().any(|node| node["node-name"] == "qmpbackup-lock"), "{release}");
    }
}

#[test]
fn a_run_that_died_is_put_in_order_by_one_that_goes_elsewhere() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        for level in ["inc", "full"] {
            scene.writer.lock().unwrap().write_surely(60);
            let ended = scene.run_with(&["--level", level, "--speed-limit", "3K"], kill_while_copying());
            assert_eq!(ended.code, None);
            scene.write();
            let (socket, elsewhere) = (scene.vm.socket(), scene.vm.path("elsewhere"));
            let words = ["--socket", socket.to_str().unwrap(), "backup", "--level", "full"];
            let target = ["--target", elsewhere.to_str().unwrap()];
            Tool::built("qmpbackup").run(&[&words[..], &target].concat()).with(0).says("the run of");
            scene.assert_clean();
            scene.assert_continues(&[]);
            // One of this chain, one of the other
            Tool::built("qmpbackup").run(&["--socket", words[1], "cleanup", "--remove-bitmap"]).with(0);
            std::fs::remove_dir_all(&elsewhere).unwrap();
            scene.run(&["--level", "full"]).with(0);
            scene.assert_restorable();
        }
    }
}
