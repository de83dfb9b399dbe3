//! What files and folders are called: `--monthly`, `--no-subdir`, `--no-timestamp`, `--no-symlink`, `--uuid`.

use std::path::Path;

use serde_json::Value;

use super::clean::is_of;
use super::field::Field;
use super::field_setup::{Setup, releases};
use super::tool::Tool;

fn disk(release: &'static str) -> Field {
    let mut field = Setup::of(release).image("disk.qcow2", "4M", "").qcow2("disk0", "disk.qcow2").start();
    field.scribble("disk0");
    field
}

/// The names in a folder that are not the program's own.
fn names(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name != ".qmpbackup").collect();
    names.sort();
    names
}

#[test]
fn a_month_has_a_folder_and_a_chain_of_its_own() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.makes("--level full --monthly", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc --monthly", 0, "disk0 INC");
        field.verify();
        let [month] = names(&field.target).try_into().unwrap();
        let (year, number) = month.split_once('-').unwrap();
        assert!(year.len() == 4 && (1..=12).contains(&number.parse::<u32>().unwrap()), "{month}");
        // As if it were the next one
        std::fs::rename(field.target.join(&month), field.target.join("2020-01")).unwrap();
        field.points.clear();
        field.backup("--level inc --monthly", 1).says("there is no FULL in");
        field.makes("--level auto --monthly", 0, "disk0 FULL");
        field.scribble("disk0");
        // what cannot be put in order there is told, and keeps nobody from this month's
        let journal = field.target.join("2020-01/.qmpbackup/run.json");
        std::fs::write(&journal, "{").unwrap();
        field.backup("--level auto --monthly", 3).says("not all is in order yet");
        std::fs::remove_file(&journal).unwrap();
        field.scribble("disk0");
        field.makes("--level auto --monthly", 0, "disk0 INC");
        field.verify();
        let uuid = |month: &str| std::fs::read_to_string(field.target.join(month).join("uuid")).unwrap();
        assert_ne!(uuid("2020-01"), uuid(&month));
        // the clock was ahead once
        std::fs::rename(field.target.join("2020-01"), field.target.join("2999-01")).unwrap();
        field
            .makes("--level auto --monthly", 3, "disk0 INC")
            .says("2999-01 is of a later month")
            .says("look at the clock");
    }
}

#[test]
fn without_folders_for_disks_all_lies_in_one() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release).disk("a.qcow2").disk("b.qcow2").start();
        for level in ["full", "inc", "auto"] {
            field.scribble("a.qcow2");
            field.scribble("b.qcow2");
            field.backup(&format!("--level {level} --no-subdir"), 0);
        }
        field.verify();
        let [full, inc, auto] = [0, 1, 2].map(|point| field.points[point].time);
        let mut expected = vec!["uuid".to_owned()];
        for base in ["a.qcow2", "b.qcow2"] {
            expected.push(format!("{base}.config"));
            expected.push(format!("FULL-{full}-{base}"));
            expected.extend([inc, auto].map(|time| format!("INC-{time}-{base}")));
        }
        expected.sort();
        assert_eq!(names(&field.target), expected);
    }
}

#[test]
fn a_full_without_a_time_has_the_name_of_the_disk_and_a_link_that_tells_its_level() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        field.makes("--level full --no-timestamp", 0, "disk0 FULL");
        assert_eq!(names(&field.target.join("disk0")), ["FULL-disk.qcow2", "disk.qcow2"]);
        let link = std::fs::read_link(field.target.join("disk0/FULL-disk.qcow2")).unwrap();
        assert_eq!(link, Path::new("disk.qcow2"));
        // Another one replaces it as long as nothing builds on it
        field.points.clear();
        field.scribble("disk0");
        field.makes("--level full --no-timestamp", 0, "disk0 FULL");
        field.backup("--level copy --no-timestamp", 1).says("a chain needs this FULL");
        for level in ["inc", "auto"] {
            field.scribble("disk0");
            field.makes(&format!("--level {level} --no-timestamp"), 0, "disk0 INC");
        }
        field.backup("--level full --no-timestamp", 1).says("a chain needs this FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn without_links_there_are_none_and_the_chain_is_the_same() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.makes("--level full --no-timestamp --no-symlink", 0, "disk0 FULL");
        assert_eq!(names(&field.target.join("disk0")), ["disk.qcow2"]);
        field.scribble("disk0");
        field.makes("--level inc --no-timestamp --no-symlink", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn a_copy_without_a_time_is_replaced_by_the_next_one() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        for _ in 0..2 {
            field.points.clear();
            field.scribble("disk0");
            field.makes("--level copy --no-timestamp", 0, "disk0 COPY");
            assert_eq!(names(&field.target.join("disk0")), ["COPY-disk.qcow2", "disk.qcow2"]);
            field.verify();
        }
    }
}

#[test]
fn a_name_without_a_time_never_costs_a_restore_point() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.makes("--level full --no-timestamp", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.makes("--level full", 0, "disk0 FULL");
        field.backup("--level copy --no-timestamp", 1).says("a chain needs this FULL");
        field.backup("--level full --no-timestamp", 1).says("this name has no time and stands before FULL-");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();

        let mut field = disk(release);
        field.makes("--level full", 0, "disk0 FULL");
        field.backup("--level full --no-timestamp", 1).says("this name has no time and stands before FULL-");
        // no chain has anything to do with it
        field.makes("--level copy --no-timestamp", 0, "disk0 COPY");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn auto_makes_a_full_with_a_time_where_one_without_would_replace_what_a_chain_needs() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.makes("--level auto --no-timestamp", 0, "disk0 FULL");
        field.makes("--level auto --no-timestamp", 0, "disk0 INC");
        field.run("cleanup --remove-bitmap").with(0);
        field.backup("--level full --no-timestamp", 1).says("a chain needs this FULL");
        let told = field.makes("--level auto --no-timestamp", 3, "disk0 FULL");
        told.says("this FULL has a time in its name").says("a chain needs this FULL");
        field.scribble("disk0");
        field.makes("--level auto --no-timestamp", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn bitmaps_that_are_not_to_stay_end_with_qemu() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        field.makes("--level full --no-persist", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc --no-persist", 0, "disk0 INC");
        field.restart();
        assert_eq!(field.bitmaps("disk0"), [""; 0]);
        field.makes("--level inc --no-persist", 0, "disk0 FULL").says("those of this disk end with QEMU");
        field.verify();
    }
}

#[test]
fn what_another_tool_has_left_in_the_place_of_an_image_stays_there() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.usual.push(".partial".to_owned());
        let partial = field.target.join("disk0/disk.qcow2.partial");
        std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
        std::fs::write(&partial, "changes").unwrap();
        for _ in 0..2 {
            field.backup("--level auto --no-timestamp", 1).says("disk.qcow2.partial: is in the way");
            assert_eq!(std::fs::read(&partial).unwrap(), b"changes");
        }
        std::fs::remove_file(&partial).unwrap();
        field.makes("--level auto --no-timestamp", 0, "disk0 FULL");
        field.verify();
    }
}

#[test]
fn a_name_without_a_time_tells_the_level_of_the_last_image() {
    for release in releases(&["10.0"]) {
        for links in ["", "--no-symlink"] {
            let mut field = disk(release);
            field.makes(&format!("--level copy --no-timestamp {links}"), 0, "disk0 COPY");
            field.points.clear();
            field.scribble("disk0");
            field.makes(&format!("--level full --no-timestamp {links}"), 0, "disk0 FULL");
            field.scribble("disk0");
            field.makes("--level inc", 0, "disk0 INC");
            field.verify();
        }

        let mut field = disk(release);
        field.makes("--level copy --no-timestamp --no-symlink", 0, "disk0 COPY");
        let listed = Tool::built("qmprestore").run(&["list", "--json", "--dir", field.target.to_str().unwrap()]);
        let point: Value = serde_json::from_str(listed.with(0).stdout.lines().next().unwrap()).unwrap();
        assert_eq!((&point["level"], &point["time"]), (&"COPY".into(), &field.points[0].time.into()));
        field.scribble("disk0");
        field.backup("--level inc", 1).says("there is no FULL");
        field.verify();
    }
}

#[test]
fn a_chain_has_the_id_that_was_asked_for_and_keeps_it() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.usual.push("qmpbackup-".to_owned());
        field.makes("--level full --uuid my_chain-1", 0, "disk0 FULL");
        let uuid = field.target.join("uuid");
        assert_eq!(std::fs::read_to_string(&uuid).unwrap(), "my_chain-1");
        let time = field.points[0].time;
        assert!(is_of(&field.bitmaps("disk0"), time, "my_chain-1"));
        field.scribble("disk0");
        field.makes("--level inc --uuid another", 0, "disk0 INC").says("the id another is not used");
        assert_eq!(std::fs::read_to_string(&uuid).unwrap(), "my_chain-1");
        field.verify();
        for wrong in ["größe", ""] {
            field.backup(&format!("--level full --uuid={wrong}"), 2);
        }
    }
}
