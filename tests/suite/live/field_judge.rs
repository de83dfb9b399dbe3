//! Whether restored disks are what they were: each point is restored by `qmprestore` and by `qemu-img` alone.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::field::Field;
use crate::support::program::qmprestore;
use crate::support::sums::assert_fit;
use crate::support::tools;

/// A restore point.
pub(crate) struct Point {
    pub(crate) time: i64,
    pub(crate) images: Vec<Image>,
    /// What was on the disks, by the device's id.
    pub(super) contents: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) disk: String,
    pub(crate) level: String,
    pub(crate) path: PathBuf,
}

impl Field {
    /// Restores all points of the disks, whose devices have the same names.
    #[track_caller]
    pub(crate) fn verify(&self) {
        self.verify_as(&[]);
    }

    /// The same for disks that have other names than the devices.
    #[track_caller]
    pub(crate) fn verify_as(&self, ids: &[(&str, &str)]) {
        assert_fit(&self.target);
        let mut compared = 0;
        for (number, point) in self.points.iter().enumerate() {
            for image in &point.images {
                let id = ids.iter().find(|(disk, _)| *disk == image.disk).map_or(image.disk.as_str(), |(_, id)| id);
                let expected = point.contents.get(id).unwrap_or_else(|| panic!("no device {id} for {image:?}"));
                let place = format!("{} of point {number}", image.path.display());
                assert!(restored(image, point.time) == *expected, "{place} by qmprestore");
                assert!(by_hand(&self.chain(number, image)) == *expected, "{place} by hand");
                compared += 1;
            }
        }
        assert_ne!(compared, 0);
    }

    /// The images that one builds on, and itself.
    fn chain(&self, number: usize, image: &Image) -> Vec<PathBuf> {
        let of_disk = |point: &Point| point.images.iter().find(|other| other.disk == image.disk).cloned();
        let mut chain: Vec<PathBuf> = vec![image.path.clone()];
        if image.level == "INC" {
            let before = self.points[..number].iter().rev().filter_map(of_disk).filter(|other| other.level != "COPY");
            for other in before {
                chain.push(other.path.clone());
                if other.level == "FULL" {
                    break;
                }
            }
        }
        chain.reverse();
        chain
    }
}

/// What `qmprestore` makes of an image.
pub(super) fn restored(image: &Image, time: i64) -> Vec<u8> {
    let room = tempfile::tempdir().unwrap();
    let raw = room.path().join("raw");
    let name = image.path.file_name().unwrap().to_str().unwrap();
    let until = if image.level == "COPY" { name.to_owned() } else { time.to_string() };
    let mut command = qmprestore(["merge", "--format", "raw", "--until", &until, "--dir"]);
    command.arg(image.path.parent().unwrap()).arg("--out").arg(&raw);
    // level, time and the name of the disk, which the oldest names do not have
    let timed = name.starts_with(&format!("{}-", image.level));
    if let Some(disk) = if timed { name.splitn(3, '-').nth(2) } else { Some(name) } {
        command.args(["--filter", disk]);
    }
    tools::run(&mut command);
    std::fs::read(raw).unwrap()
}

/// What `qemu-img` makes of a chain, which it finds sound.
fn by_hand(chain: &[PathBuf]) -> Vec<u8> {
    let room = tempfile::tempdir().unwrap();
    let image = |number: usize| room.path().join(number.to_string());
    for (number, path) in chain.iter().enumerate() {
        std::fs::copy(path, image(number)).unwrap();
        tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(path));
        if let Some(below) = number.checked_sub(1) {
            let based = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &below.to_string(), &number.to_string()];
            tools::run(tools::qemu_img().args(based).current_dir(room.path()));
        }
    }
    let raw = room.path().join("raw");
    crate::support::oracle::convert(&image(chain.len() - 1), &raw);
    std::fs::read(raw).unwrap()
}
