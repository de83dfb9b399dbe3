//! A backup, and a command that changes images of the same target: who comes second goes away.

use qmpbackup::ErrorKind;
use qmpbackup::chain::{Error, FolderLock};

use super::faults_power::wait_for_jobs;
use super::faults_scene::{Scene, Way, folders, run};
use super::tool::Tool;

#[test]
fn images_are_not_changed_while_a_backup_makes_more_of_them_and_the_other_way_round() {
    for (release, way) in [("5.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Fleece)] {
        let mut scene = Scene::new(release, way);
        let disk = folders(&scene.target).remove(0);
        scene.writer.lock().unwrap().write_surely(60);
        let words = scene.words(&scene.vm.socket(), &["--level", "full", "--speed-limit", "1M"]);
        std::thread::scope(|scope| {
            let runs = scope.spawn(|| run(&Tool::built("qmpbackup"), &words));
            wait_for_jobs(&mut scene);
            let error = FolderLock::take_all(&disk).unwrap_err();
            assert!(
                matches!(&error, Error::Locked { path } if *path == scene.target.join(".qmpbackup/lock")),
                "{error:?}"
            );
            assert_eq!(error.kind(), ErrorKind::Locked);
            assert!(!runs.is_finished(), "nothing was tested");
            runs.join().unwrap().with(0);
        });
        let locks = FolderLock::take_all(&disk).unwrap();
        assert_eq!(locks.len(), 2);
        scene.run(&["--level", "inc"]).with(6).says("another run uses this folder").says("run again when it has ended");
        let target = scene.target.to_str().unwrap().to_owned();
        scene.recover(&["--target", &target]).with(6);
        drop(locks);
        scene.recover(&["--target", &target]).with(0);
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}
