//! The program on random machines that are written to before each of its commands: every restore point is one moment of
//! all disks, and nothing is left behind.

use std::path::{Path, PathBuf};

use super::draw::draw_disks;
use super::spec::DiskSpec;
use super::stage::Stage;
use super::tool::{Tool, restore};
use super::vm::RELEASES;
use crate::support::prng::Prng;
use crate::support::seeds::shared_seeds;

/// The images of a disk in the folders below a target, as their folder, time and level.
fn images(target: &Path, disk: &DiskSpec) -> Vec<(PathBuf, u64, String)> {
    let mut images = Vec::new();
    for folder in std::fs::read_dir(target).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let Some(point) = name.strip_suffix(&format!("-{}", disk.name)) else { continue };
            let (level, time) = point.split_once('-').unwrap();
            images.push((folder.clone(), time.parse().unwrap(), level.to_owned()));
        }
    }
    images.sort_by_key(|(_, time, _)| *time);
    images
}

/// The contents of all disks at each restore point.
fn restored(target: &Path, disks: &[DiskSpec], runs: usize) -> Vec<Vec<Vec<u8>>> {
    let all: Vec<_> = disks.iter().map(|disk| images(target, disk)).collect();
    let point = |number: usize| {
        let of_disk = |images: &Vec<(PathBuf, u64, String)>| {
            assert_eq!(images.len(), runs, "{images:?}");
            let (folder, time, level) = &images[number];
            assert_eq!((level.as_str(), *time), (if number == 0 { "FULL" } else { "INC" }, all[0][number].1));
            restore(folder, &format!("{level}-{time}"))
        };
        all.iter().map(of_disk).collect()
    };
    (0..runs).map(point).collect()
}

fn every_restore_point_is_a_moment(seed: u64) {
    let prng = &mut Prng::stream(seed, 0);
    let (release, disks, runs) = (*prng.pick(&RELEASES), draw_disks(prng), prng.between(3, 5) as usize);
    let tool = Tool::built("qmpbackup");
    let mut stage = Stage::new(release, &disks, &tool.victim, Prng::stream(seed, 1), 6);
    let (socket, target) = (stage.proxy.path().to_owned(), stage.target.clone());
    for run in 0..runs {
        if run == runs - 1 {
            stage.quiet();
        }
        let level = if run == 0 { "full" } else { "inc" };
        let words = ["--socket", socket.to_str().unwrap(), "backup", "--include-raw", "--level", level, "--target"];
        let ended = tool.run(&[&words[..], &[target.to_str().unwrap()]].concat());
        let commands = stage.proxy.transcript().commands().join(" ");
        assert_eq!(ended.code, Some(0), "seed {seed}, QEMU {release}, {disks:#?}: {ended:#?} after {commands}");
        stage.assert_clean();
    }
    let judgement = stage.judge(&restored(&target, &disks, runs));
    assert!(judgement.is_ok(), "seed {seed}, QEMU {release}, {disks:#?}: {judgement:?}");
}

mod every_restore_point_of_random_machines_is_a_moment {
    super::shared_seeds! {
        super::every_restore_point_is_a_moment, 16;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}
