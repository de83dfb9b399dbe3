//! Backups go on after INCs were written into their FULL; and what is said of a FULL where that was broken off.

use std::path::{Path, PathBuf};

use qmpbackup::chain::{Checksums, Manifest, Stage, Unfinished, Work};

use super::field::Field;
use super::field_judge::Image;
use super::field_setup::{Setup, releases};
use crate::support::program::{Ended, event, qmprestore};

impl Field {
    /// Writes the INCs of the first restore points of the only disk, which begin with a FULL, into that.
    pub(super) fn commit(&mut self, incs: usize) {
        self.put("commit", incs);
    }

    /// Puts the INCs of the first restore points into their FULL, by one of the commands that do so.
    fn put(&mut self, command: &str, incs: usize) {
        let mut points: Vec<_> = self.points.drain(..=incs).collect();
        let full = points[0].images[0].clone();
        let mut last = points.pop().unwrap();
        let until = name(&last.images[0].path);
        Ended::of(qmprestore([command, "--until", &until, "--dir"]).arg(&self.target)).with(0).says(&until);
        last.images = vec![Image { level: "FULL".to_owned(), ..full }];
        self.points.insert(0, last);
    }

    /// A chain of a FULL and three INCs.
    fn with_three_incs(words: &str, release: &'static str) -> Self {
        let mut field = Setup::of(release).disk("disk0").start();
        for (level, made) in [("full", "FULL"), ("inc", "INC"), ("inc", "INC"), ("inc", "INC")] {
            field.scribble("disk0");
            field.makes(&format!("--level {level} {words}"), 0, &format!("disk0 {made}"));
        }
        field
    }

    fn list(&self) -> Ended {
        Ended::of(qmprestore(["list", "--dir"]).arg(&self.target))
    }

    fn merge(&self, until: &str) -> Ended {
        Ended::of(qmprestore(["merge", "--out", "-", "--until", until, "--dir"]).arg(&self.target))
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn an_inc_builds_on_a_full_that_all_before_it_were_written_into() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Field::with_three_incs("", release);
        field.commit(3);
        let full = name(field.newest("disk0"));
        let held = field.points[0].time;
        assert!(!full.contains(&held.to_string()));
        let listed = Ended::of(qmprestore(["list", "--json", "--dir"]).arg(&field.target)).with(0).events();
        assert_eq!(event(&listed, "restore_point")["time"], held);
        for before in [full, "INC-".to_owned()] {
            field.scribble("disk0");
            field.makes("--level inc", 0, "disk0 INC").says(&format!("disk0: INC on top of {before}"));
            assert_eq!(field.bitmaps("disk0").len(), 1);
        }
        field.verify();
        field.merge(&(held - 1).to_string()).with(2).says("no restore point at or before");
    }
}

/// Each image has an id, which its checksums have, too, and an INC has that of the image before it.
fn assert_ids<'a>(images: impl IntoIterator<Item = &'a Path>) {
    let mut before = None;
    for image in images {
        let manifest = Manifest::read(image).unwrap().unwrap();
        let sums = Checksums::open(image).unwrap().unwrap();
        assert!(manifest.id.is_some() && manifest.id != before, "{manifest:#?}");
        assert_eq!((manifest.parent_id, sums.id()), (before, manifest.id), "{}", image.display());
        before = manifest.id;
    }
}

#[test]
fn an_inc_that_stays_is_built_on_when_those_before_it_were_written_into_their_full() {
    for release in releases(&["10.0"]) {
        let mut field = Field::with_three_incs("", release);
        assert_ids(field.points.iter().map(|point| point.images[0].path.as_path()));
        field.commit(2);
        assert_ids([field.points[0].images[0].path.as_path(), field.newest("disk0")]);
        let inc = name(field.newest("disk0"));
        let parent = Manifest::read(field.newest("disk0")).unwrap().unwrap().parent;
        assert_eq!(parent, Some(name(&field.points[0].images[0].path)));
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 INC").says(&format!("disk0: INC on top of {inc}"));
        field.verify();
        // and once more
        field.commit(2);
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn backups_go_on_after_a_snapshotrebase() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Field::with_three_incs("", release);
        for incs in [3, 1] {
            field.put("snapshotrebase", incs);
            let full = name(field.newest("disk0"));
            field.scribble("disk0");
            field.makes("--level inc", 0, "disk0 INC").says(&format!("disk0: INC on top of {full}"));
            field.verify();
        }
    }
}

#[test]
fn a_full_without_a_time_in_its_name_goes_on_too() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Field::with_three_incs("--no-timestamp", release);
        field.commit(3);
        field.scribble("disk0");
        field.makes("--level inc --no-timestamp", 0, "disk0 INC").says("disk0: INC on top of disk0");
        field.verify();
        let held = field.points[0].time;
        field.merge(&(held - 1).to_string()).with(2).says("no restore point at or before");
    }
}

#[test]
fn while_a_full_is_written_to_nothing_is_built_on_it_or_restored() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Field::with_three_incs("", release);
        let paths: Vec<PathBuf> = field.points.iter().map(|point| point.images[0].path.clone()).collect();
        let work = Unfinished {
            work: Work::Commit,
            stage: Stage::Writing,
            full: name(&paths[0]),
            incs: paths[1..3].iter().map(|path| name(path)).collect(),
            full_id: None,
        };
        work.write(&paths[0]).unwrap();
        let last = name(&paths[2]);
        let what = format!(
            "a commit up to {last} was begun and not finished: unless it goes on, run `qmprestore commit` again"
        );
        let bitmaps = field.bitmaps("disk0");
        field.scribble("disk0");
        field.backup("--level inc", 4).says(&format!("no INC can follow, {what} with --until {last}; `--level full`"));
        assert_eq!(field.bitmaps("disk0"), bitmaps);
        field.list().with(3).says(&format!("broken: {what}"));
        for until in ["latest", &last, &field.points[0].time.to_string()] {
            field.merge(until).with(4).says(&what).says("qmprestore list");
        }
        Ended::of(qmprestore(["check", "--dir"]).arg(&field.target)).with(0);
        field.makes("--level auto", 3, "disk0 FULL").says(&format!("FULL, no INC can follow: {what}"));
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 INC");
        // the chain of before waits for its end, and is whole then
        let before: Vec<_> = field.points.drain(..4).collect();
        field.verify();
        field.list().with(3).says(&format!("broken: {what}"));
        Unfinished::remove(&paths[0]).unwrap();
        field.points.splice(..0, before);
        field.verify();
        field.list().with(0);
    }
}

#[test]
fn a_new_full_under_the_name_of_one_that_was_written_to_is_whole() {
    for release in releases(&["10.0"]) {
        let mut field = Field::with_three_incs("--no-timestamp", release);
        let incs = field.points[1..].iter().map(|point| name(&point.images[0].path)).collect();
        field.commit(3);
        let full = field.points[0].images[0].path.clone();
        let work = Unfinished { work: Work::Commit, stage: Stage::Removing, full: name(&full), incs, full_id: None };
        work.write(&full).unwrap();
        field.backup("--level inc --no-timestamp", 4).says("was begun and not finished");
        field.points.clear();
        field.scribble("disk0");
        field.makes("--level auto --no-timestamp", 3, "disk0 FULL").says("was begun and not finished");
        assert_eq!(field.newest("disk0"), full);
        assert_eq!(Unfinished::read(&full).unwrap(), None);
        field.list().with(0);
        field.scribble("disk0");
        field.makes("--level inc --no-timestamp", 0, "disk0 INC");
        field.verify();
    }
}
