//! Levels: what `auto` picks and why, what `inc` refuses, and that a COPY is nobody's business.

use super::field::Field;
use super::field_setup::{Setup, releases};
use crate::support::program::event;

fn disk(release: &'static str) -> Field {
    let mut field = Setup::of(release).disk("disk0").start();
    field.scribble("disk0");
    field
}

#[test]
fn an_inc_into_an_empty_folder_is_refused_with_what_to_do() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.backup("--level inc", 1).says("there is no FULL in").says("`--level full` or `auto` makes one");
        assert!(!field.target.join("disk0").exists() && !field.target.join("uuid").exists());
        assert_eq!(field.bitmaps("disk0"), [""; 0]);
    }
}

#[test]
fn auto_makes_a_full_or_an_inc_and_says_why() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        let ended = field.makes("--level auto", 0, "disk0 FULL").says("disk0: FULL, there is none in the folder yet");
        assert_eq!(event(&ended.events(), "level")["level"], "FULL");
        let full = field.newest("disk0").file_name().unwrap().to_str().unwrap().to_owned();
        field.write("disk0", 7, 128 << 10, 64 << 10);
        let ended = field
            .makes("--level auto", 0, "disk0 INC")
            .says(&format!("disk0: INC on top of {full}, 64 KiB have changed"));
        assert_eq!(event(&ended.events(), "level")["changed"], 64 << 10);
        assert_eq!(event(&ended.events(), "copied")["bytes"], 64 << 10);
        field.run("cleanup --remove-bitmap").with(0);
        field.makes("--level auto", 3, "disk0 FULL").says("no bitmap goes back to the newest image");
        field.verify();
    }
}

#[test]
fn a_copy_is_outside_of_any_chain() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        field.makes("--level copy", 0, "disk0 COPY");
        assert_eq!(field.bitmaps("disk0"), [""; 0]);
        assert!(!field.target.join("uuid").exists());
        field.makes("--level full", 0, "disk0 FULL");
        let bitmaps = field.bitmaps("disk0");
        field.scribble("disk0");
        field.makes("--level copy", 0, "disk0 COPY");
        assert_eq!(field.bitmaps("disk0"), bitmaps);
        field.makes("--level inc", 0, "disk0 INC");
        field.scribble("disk0");
        field.makes("--level copy", 0, "disk0 COPY");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn a_full_begins_anew_whatever_was_before() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        for (level, made) in [("full", "FULL"), ("inc", "INC"), ("full", "FULL"), ("inc", "INC"), ("inc", "INC")] {
            field.scribble("disk0");
            field.makes(&format!("--level {level}"), 0, &format!("disk0 {made}"));
            assert_eq!(field.bitmaps("disk0").len(), 1);
        }
        field.verify();
    }
}

#[test]
fn an_inc_of_nothing_is_an_empty_image() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.makes("--level full", 0, "disk0 FULL");
        let ended = field.makes("--level inc", 0, "disk0 INC");
        assert_eq!(event(&ended.events(), "copied")["bytes"], 0);
        field.verify();
    }
}

#[test]
fn two_folders_have_chains_that_do_not_touch_each_other() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.makes("--level full", 0, "disk0 FULL");
        let first = std::mem::replace(&mut field.target, field.vm.path("other"));
        let first_points = std::mem::take(&mut field.points);
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 INC");
        field.verify();
        (field.target, field.points) = (first, first_points);
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
        assert_eq!(field.bitmaps("disk0").len(), 2);
    }
}
