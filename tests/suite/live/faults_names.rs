//! The program dies between the names of two images: the next one gives the other its name, too. One that dies a moment
//! sooner has made nothing.

use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;

use qmpbackup::chain::{Checksums, Manifest};

use super::faults_scene::{Scene, Way, folders};
use super::proxy::{Action, Hook};
use crate::support::sealed::seal;
use crate::support::sparse::{Fingerprint, fingerprints};

const WHERE: [(&str, Way); 3] = [("5.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Plain)];

fn journal(target: &Path) -> PathBuf {
    target.join(".qmpbackup/run.json")
}

/// Kills it when all images are whole, and none has its name.
fn kill_when_whole(target: &Path) -> Hook {
    let journal = journal(target);
    Box::new(move |_, _| {
        let journal = std::fs::read(&journal).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let publishing = journal.is_some_and(|journal| journal["publishing"] == true);
        if publishing { Action::KillBefore(Signal::KILL) } else { Action::Forward }
    })
}

/// The images that have no name yet.
fn partials(target: &Path) -> Vec<PathBuf> {
    let entries = folders(target).into_iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "partial")).collect()
}

/// All files in the folders of the disks.
fn files(target: &Path) -> Vec<(PathBuf, Fingerprint)> {
    let of_folder = |folder: PathBuf| {
        let prints = fingerprints(&folder).into_iter().map(move |(path, print)| (folder.join(path), print));
        prints.filter(|(path, _)| path.is_file())
    };
    folders(target).into_iter().flat_map(of_folder).collect()
}

/// Brings it to the point where both images are whole.
fn whole(scene: &Scene, level: &str, more: &[&str]) -> Vec<PathBuf> {
    scene.write();
    let words = [&["--level", level], more].concat();
    assert_eq!(scene.run_with(&words, kill_when_whole(&scene.target)).code, None);
    scene.write();
    let partials = partials(&scene.target);
    assert_eq!(partials.len(), 2);
    partials
}

#[test]
fn when_one_image_has_its_name_the_other_gets_it_too() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        let target = scene.target.to_str().unwrap().to_owned();
        for (number, level) in ["inc", "full", "inc", "full"].into_iter().enumerate() {
            let partials = whole(&scene, level, &[]);
            // in the order of the program: first what is known of it
            let partial = &partials[number / 2];
            let all = [Checksums::path(partial), Manifest::path(partial), partial.clone()];
            for partial in all.into_iter().take([3, 1, 2, 3][number]) {
                let named = partial.to_str().unwrap().replace(".partial", "");
                std::fs::rename(&partial, named).unwrap();
            }
            if number % 2 == 0 {
                scene.recover(&["--target", &target]).with(0).says("the run of");
                scene.assert_clean();
            } else {
                scene.run(&["--level", "inc"]).with(0).says("the run of");
            }
            for partial in &partials {
                assert!(partial.with_extension("").exists() && !partial.exists(), "{partial:?}");
            }
            scene.assert_continues(&[]);
        }
    }
}

/// The same place, but the journal does not say yet that it was reached.
fn take_back(scene: &mut Scene, level: &str, more: &[&str]) {
    let before = files(&scene.target);
    whole(scene, level, more);
    let path = journal(&scene.target);
    let mut journal: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(journal["publishing"], true);
    journal["publishing"] = false.into();
    seal(&mut journal);
    std::fs::write(&path, journal.to_string()).unwrap();
    scene.recover(&[]).with(0).says("the run of");
    scene.assert_clean();
    assert_eq!(files(&scene.target), before);
    scene.assert_continues(&[]);
}

#[test]
fn when_the_journal_does_not_say_that_images_are_whole_they_are_none() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        take_back(&mut scene, "full", &[]);
        take_back(&mut scene, "inc", &[]);
        // An image without a time is told from the one that would replace it
        let mut scene = Scene::without_backup(release, way);
        scene.run(&["--level", "full", "--no-timestamp"]).with(0);
        take_back(&mut scene, "full", &["--no-timestamp"]);
    }
}
