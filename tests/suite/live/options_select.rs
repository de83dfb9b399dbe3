//! `--include` and `--exclude`: disks by any of their names.

use super::field::Field;
use super::field_setup::{Setup, releases};

/// A disk by drive, one by node.
fn two(release: &'static str) -> Field {
    Setup::of(release)
        .image("a.qcow2", "2M", "")
        .image("b.qcow2", "2M", "")
        .words("-drive if=none,id=drive0,format=qcow2,file=@/a.qcow2 -device virtio-blk-pci,id=dev0,drive=drive0")
        .words("-blockdev node-name=node1,driver=qcow2,file.driver=file,file.filename=@/b.qcow2")
        .words("-device virtio-blk-pci,id=dev1,drive=node1")
        .start()
}

#[test]
fn disks_are_chosen_by_drive_node_and_device() {
    for release in releases(&["10.0"]) {
        let mut field = two(release);
        for (words, made) in [
            ("--include drive0", "drive0 COPY"),
            ("--include node1", "node1 COPY"),
            ("--include dev0", "drive0 COPY"),
            ("--include dev1,drive0", "drive0 COPY, node1 COPY"),
            ("--exclude drive0", "node1 COPY"),
            ("--exclude node1", "drive0 COPY"),
            ("--exclude dev1", "drive0 COPY"),
            ("-e dev0", "node1 COPY"),
            ("-i dev0", "drive0 COPY"),
        ] {
            let ended = field.makes(&format!("--level copy {words}"), 0, made);
            let skipped = ended.events().iter().filter(|event| event["event"] == "skipped").count();
            assert_eq!(skipped, 1 - made.matches(", ").count(), "{ended:#?}");
        }
        let file = field.vm.path("a.qcow2");
        field.makes(&format!("--level copy --include {}", file.display()), 0, "drive0 COPY");
    }
}

#[test]
fn names_of_no_disk_are_refused_before_anything_is_done() {
    for release in releases(&["10.0"]) {
        let mut field = two(release);
        field.backup("--level full --include wrong,other", 2).says("no disk is called \"wrong\", \"other\"");
        field.backup("--level full --exclude dev0,dev1", 2).says("has no disk to back up");
        assert!(field.points.is_empty());
        assert!(!field.target.join("uuid").exists() && !field.target.join("drive0").exists());
        field.backup("--level full --include dev0 --exclude dev1", 2);
    }
}

#[test]
fn a_name_of_no_disk_keeps_no_other_from_its_backup() {
    for release in releases(&["10.0"]) {
        let mut field = two(release);
        for (words, code, made, what) in [
            ("--exclude wrong", 0, "drive0 COPY, node1 COPY", "nothing to exclude"),
            ("--exclude wrong,dev1", 0, "drive0 COPY", "nothing to exclude"),
            ("--include drive0,wrong", 3, "drive0 COPY", "nothing to include"),
        ] {
            field.makes(&format!("--level copy {words}"), code, made).says("no disk is called \"wrong\"").says(what);
        }
    }
}

#[test]
fn two_runs_have_two_times_whatever_disks_they_are_of() {
    for release in releases(&["10.0"]) {
        let mut field = two(release);
        for words in ["--level full --include dev0", "--level full --include dev1", "--level inc --include dev0"] {
            field.backup(words, 0);
        }
        let times: Vec<i64> = field.points.iter().map(|point| point.time).collect();
        assert!(times.len() == 3 && times.is_sorted_by(|one, next| one < next), "{times:?}");
    }
}

#[test]
fn a_disk_that_was_left_out_has_its_inc_later() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = two(release);
        field.scribble("dev0");
        field.makes("--level full", 0, "drive0 FULL, node1 FULL");
        field.scribble("dev0");
        field.scribble("dev1");
        field.makes("--level inc --include node1", 0, "node1 INC");
        field.scribble("dev0");
        field.scribble("dev1");
        field.makes("--level inc", 0, "drive0 INC, node1 INC");
        field.verify_as(&[("drive0", "dev0"), ("node1", "dev1")]);
    }
}
