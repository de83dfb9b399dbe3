//! Folders as they are found in the field, and what is made of them.

mod doubts;
mod in_place;
mod layouts;
mod lineage;
mod selection;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tempfile::TempDir;

use super::{Clock, Disk, Error, Fault, Inventory, Level, RestorePoint, State, When, discover};

/// A backup folder.
struct Tree(TempDir);

impl Tree {
    /// Makes empty files; what ends in `/` becomes a folder, and `a -> b` a link.
    fn new<'a>(paths: impl IntoIterator<Item = &'a str>) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        paths.into_iter().for_each(|path| tree.add(path));
        tree
    }

    fn add(&self, path: &str) {
        let (path, target) = path.split_once(" -> ").map_or((path, None), |(path, target)| (path, Some(target)));
        let full = self.0.path().join(path);
        fs::create_dir_all(full.parent().unwrap()).unwrap();
        match target {
            Some(target) => symlink(target, full).unwrap(),
            None if path.ends_with('/') => fs::create_dir_all(full).unwrap(),
            None => fs::write(full, "").unwrap(),
        }
    }

    fn write(&self, path: &str, text: &str) {
        self.add(path);
        fs::write(self.path(path), text).unwrap();
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    fn discover(&self) -> Inventory {
        discover(self.0.path()).unwrap()
    }

    /// The only disk.
    fn disk(&self) -> Disk {
        self.discover().disk(None).unwrap().clone()
    }

    fn labels(&self) -> Vec<String> {
        self.discover().disks.iter().map(|disk| disk.label().to_owned()).collect()
    }
}

fn clock() -> Clock {
    Clock { now: Timestamp::from_second(1000).unwrap(), zone: TimeZone::UTC }
}

fn select(disk: &Disk, when: &str) -> Result<RestorePoint, Error> {
    disk.select(&when.parse()?, &clock(), false)
}

/// The paths of what is restored, below the folder.
fn members(disk: &Disk, when: &str) -> Vec<String> {
    paths(&select(disk, when).unwrap())
}

fn paths(point: &RestorePoint) -> Vec<String> {
    point.members.iter().map(|image| text(image.relative.as_os_str())).collect()
}

fn text(name: &OsStr) -> String {
    name.to_str().unwrap().to_owned()
}

/// All restore points as `name` or, where something speaks against one, `name?` or `name!`.
fn points(disk: &Disk) -> Vec<String> {
    let sign = |state: &State| match state {
        State::Sound => "",
        State::Doubtful(_) => "?",
        State::Broken(_) => "!",
    };
    disk.points().iter().map(|point| format!("{}{}", point.image().display_name(), sign(point.state()))).collect()
}
