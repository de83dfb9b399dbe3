//! QEMU ends, in the middle of a run or between two. Bitmaps that it could not save are worth nothing, and everybody who
//! wants an INC is told.

use std::time::{Duration, Instant};

use serde_json::json;

use super::faults_scene::{Scene, Way, run};
use super::tool::Tool;
use crate::support::program::Ended;

const WHERE: [(&str, Way); 4] = [("5.2", Way::Plain), ("7.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Fleece)];

/// Kills QEMU while a backup copies.
fn cut(scene: &mut Scene, level: &str) -> Ended {
    scene.write();
    let words = scene.words(&scene.vm.socket(), &["--level", level, "--speed-limit", "3K"]);
    let ended = std::thread::scope(|scope| {
        let runs = scope.spawn(|| run(&Tool::built("qmpbackup"), &words));
        wait_for_jobs(scene);
        scene.vm.kill();
        runs.join().unwrap()
    });
    scene.restart();
    ended
}

/// Waits until jobs copy.
pub(super) fn wait_for_jobs(scene: &mut Scene) {
    let until = Instant::now() + Duration::from_secs(60);
    while scene.vm.monitor.execute("query-jobs", &json!({})).unwrap() == json!([]) {
        assert!(Instant::now() < until, "no job begins");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The machine is as after any power cut: no INC, but `auto` finds a way, and says that it had to.
fn assert_begins_again(scene: &mut Scene) {
    scene.run(&["--level", "inc"]).with(4).says("no INC can follow").says("`--level full` or `auto`");
    scene.assert_clean();
    scene.run(&["--level", "auto"]).with(3).says("no INC can follow");
    scene.assert_restorable();
    scene.assert_continues(&[]);
}

#[test]
fn a_qemu_that_was_killed_in_a_run_has_lost_its_bitmaps_and_auto_begins_again() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        cut(&mut scene, "inc").with(5);
        assert_begins_again(&mut scene);
        scene.vm.quit();
        scene.restart();
        // The bitmaps were saved, and are inconsistent after the next cut
        cut(&mut scene, "inc").with(5);
        scene.run(&["--level", "inc"]).with(4).says("is inconsistent, QEMU did not end orderly");
        assert_begins_again(&mut scene);
        // Of those that are inconsistent none is left behind
        assert_eq!(scene.run(&["--level", "inc"]).code, Some(0));
    }
}

#[test]
fn a_qemu_that_was_killed_in_the_first_run_of_all_leaves_nothing() {
    for (release, way) in WHERE {
        let mut scene = Scene::without_backup(release, way);
        cut(&mut scene, "full").with(5);
        let target = scene.target.to_str().unwrap().to_owned();
        scene.recover(&["--target", &target]).with(0);
        scene.assert_clean();
        scene.run(&["--level", "auto"]).with(0);
        scene.assert_restorable();
        scene.assert_continues(&[]);
    }
}

#[test]
fn a_qemu_that_quits_between_runs_keeps_its_bitmaps() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        for _ in 0..3 {
            scene.write();
            scene.vm.quit();
            scene.restart();
            scene.assert_continues(&[]);
        }
    }
}
