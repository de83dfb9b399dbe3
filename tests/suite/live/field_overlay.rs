//! External snapshots that somebody takes between two backups: the disk then is an overlay on what it was.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use serde_json::json;

use super::field::Field;
use super::field_setup::{Setup, releases};
use crate::support::tools;

/// As `virsh snapshot-create --disk-only` does.
fn take_snapshot(field: &mut Field, node: &str) {
    let file = field.vm.path("overlay.qcow2");
    let words = json!({ "node-name": node, "snapshot-file": file, "format": "qcow2", "snapshot-node-name": "overlay" });
    field.execute("blockdev-snapshot-sync", &words);
    field.look();
}

/// As `virsh blockcommit --pivot` does.
fn commit(field: &mut Field) {
    field.execute("block-commit", &json!({ "job-id": "commit", "device": "overlay" }));
    let until = Instant::now() + Duration::from_secs(60);
    let mut completed = false;
    loop {
        let jobs = field.execute("query-jobs", &json!({}));
        let Some(job) = jobs.as_array().unwrap().first() else { break };
        if job["status"] == "ready" && !completed {
            field.execute("job-complete", &json!({ "id": "commit" }));
            completed = true;
        }
        assert!(Instant::now() < until, "{jobs}");
        std::thread::sleep(Duration::from_millis(5));
    }
    field.look();
}

fn disk(release: &'static str) -> Field {
    let mut field = Setup::of(release).image("disk.qcow2", "4M", "").qcow2("disk0", "disk.qcow2").start();
    field.scribble("disk0");
    field.makes("--level full", 0, "disk0 FULL");
    field
}

#[test]
fn an_inc_does_not_follow_when_the_disk_has_become_an_overlay_and_auto_makes_a_full() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        field.scribble("disk0");
        take_snapshot(&mut field, "disk0");
        field.scribble("disk0");
        field.backup("--level inc", 4).says("no INC can follow").says("--level full");
        field.makes("--level auto", 3, "disk0 FULL").says("no INC can follow");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        // Another FULL is due when it is one image again: the bitmap there goes back to another one
        commit(&mut field);
        field.scribble("disk0");
        field.backup("--level inc", 4);
        field.makes("--level auto", 3, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
        assert_eq!(field.newest("disk0").parent().unwrap(), field.target.join("disk0"));
        let folders = std::fs::read_dir(&field.target).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir());
        let folders: Vec<_> =
            folders.map(|entry| entry.unwrap().file_name()).filter(|name| name != ".qmpbackup").collect();
        assert_eq!(folders, ["disk0"]);
    }
}

/// As `virsh blockpull` does: what was below is in the overlay, and its name is no name of the disk any more.
#[test]
fn an_inc_follows_when_what_was_below_is_streamed_into_the_overlay() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        take_snapshot(&mut field, "disk0");
        field.scribble("disk0");
        field.makes("--level auto", 3, "disk0 FULL");
        field.scribble("disk0");
        field.execute("block-stream", &json!({ "job-id": "stream", "device": "overlay" }));
        let until = Instant::now() + Duration::from_secs(60);
        while !field.execute("query-jobs", &json!({})).as_array().unwrap().is_empty() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
        field.look();
        for level in ["inc", "auto"] {
            field.scribble("disk0");
            field.makes(&format!("--level {level}"), 0, "disk0 INC");
        }
        field.verify();
        assert_eq!(field.bitmaps("overlay").len(), 1);
    }
}

/// As libvirt does: the bitmap below is read-only then, and holds what was written before.
#[test]
fn an_inc_does_not_follow_a_bitmap_that_began_with_the_overlay() {
    for release in releases(&["5.2", "10.0", "11"]) {
        let mut field = disk(release);
        field.scribble("disk0");
        let bitmaps = field.bitmaps("disk0");
        let name = bitmaps.iter().find(|name| name.starts_with("qmpbackup-")).unwrap().clone();
        let file = field.vm.path("overlay.qcow2");
        let mut create = tools::qemu_img();
        create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(field.vm.path("disk.qcow2"));
        tools::run(create.arg(&file).arg("4M"));
        let overlay = json!({ "driver": "qcow2", "node-name": "overlay", "backing": null,
            "file": { "driver": "file", "filename": file } });
        field.execute("blockdev-add", &overlay);
        let snapshot = json!({ "type": "blockdev-snapshot", "data": { "node": "disk0", "overlay": "overlay" } });
        let bitmap = json!({ "node": "overlay", "name": name, "persistent": true });
        let bitmap = json!({ "type": "block-dirty-bitmap-add", "data": bitmap });
        field.execute("transaction", &json!({ "actions": [snapshot, bitmap] }));
        field.look();
        field.scribble("disk0");
        field.backup("--level inc", 4).says("lacks what was written before the snapshot");
        field.makes("--level auto", 3, "disk0 FULL").says("lacks what was written before the snapshot");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn the_full_of_an_overlay_holds_no_more_than_its_disk_does() {
    for release in releases(&["7.2", "10.0", "11"]) {
        let mut field = Setup::of(release).image("disk.qcow2", "256M", "").qcow2("disk0", "disk.qcow2").start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL");
        take_snapshot(&mut field, "disk0");
        for (level, makes) in [("--level full", "disk0 FULL"), ("--level inc", "disk0 INC")] {
            field.scribble("disk0");
            field.makes(level, 0, makes);
            let bytes = field.newest("disk0").metadata().unwrap().blocks() * 512;
            assert!(bytes < 16 << 20, "{release}: {bytes} bytes");
        }
        field.verify();
    }
}

#[test]
fn an_overlay_that_came_and_went_between_two_backups_is_in_the_inc() {
    for release in releases(&["10.0"]) {
        let mut field = disk(release);
        field.scribble("disk0");
        take_snapshot(&mut field, "disk0");
        field.scribble("disk0");
        commit(&mut field);
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}

#[test]
fn a_drive_keeps_its_folder_when_it_becomes_an_overlay() {
    for release in releases(&["7.2"]) {
        let mut field = Setup::of(release)
            .image("disk.qcow2", "4M", "")
            .words("-drive if=none,id=drive0,format=qcow2,file=@/disk.qcow2")
            .words("-device virtio-blk-pci,id=dev0,drive=drive0")
            .start();
        field.scribble("dev0");
        field.makes("--level full", 0, "drive0 FULL");
        let file = field.vm.path("overlay.qcow2");
        field.execute(
            "blockdev-snapshot-sync",
            &json!({ "device": "drive0", "snapshot-file": file, "format": "qcow2" }),
        );
        field.look();
        field.scribble("dev0");
        field.backup("--level inc", 4);
        field.makes("--level auto", 3, "drive0 FULL");
        assert_eq!(field.newest("drive0").parent().unwrap(), field.target.join("drive0"));
        field.verify_as(&[("drive0", "dev0")]);
    }
}

#[test]
fn an_overlay_keeps_the_name_of_the_disk_in_a_flat_folder() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release).image("disk.qcow2", "4M", "").qcow2("disk0", "disk.qcow2").start();
        field.scribble("disk0");
        field.makes("--level full --no-subdir", 0, "disk0 FULL");
        take_snapshot(&mut field, "disk0");
        field.scribble("disk0");
        field.backup("--level inc --no-subdir", 4);
        for (level, code) in [("auto", 3), ("inc", 0)] {
            field.backup(&format!("--level {level} --no-subdir"), code);
            field.scribble("disk0");
            let image = field.points.last().unwrap().images[0].path.clone();
            assert!(image.to_str().unwrap().ends_with("-disk.qcow2"), "{}", image.display());
        }
        field.verify_as(&[("overlay", "disk0")]);
    }
}

#[test]
fn disks_on_the_same_template_do_not_mix() {
    for release in releases(&["10.0"]) {
        let options = "backing_file=@/template.qcow2,backing_fmt=qcow2";
        let mut field = Setup::of(release)
            .image("template.qcow2", "4M", "")
            .image("a.qcow2", "4M", options)
            .image("b.qcow2", "4M", options)
            .qcow2("disk0", "a.qcow2")
            .qcow2("disk1", "b.qcow2")
            .start();
        for words in ["", "--no-subdir"] {
            field.target = field.vm.path(&format!("target{words}"));
            field.points.clear();
            for (level, made) in [("full", "FULL"), ("inc", "INC"), ("auto", "INC")] {
                field.scribble("disk0");
                field.scribble("disk1");
                field.makes(&format!("--level {level} {words}"), 0, &format!("disk0 {made}, disk1 {made}"));
            }
            field.verify();
        }
    }
}

#[test]
fn bitmaps_below_an_overlay_do_not_keep_others_from_being_removed() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = disk(release);
        take_snapshot(&mut field, "disk0");
        field.makes("--level auto", 3, "disk0 FULL");
        field.run("cleanup --remove-bitmap").with(0).says("removed 1 bitmap");
        assert_eq!((field.bitmaps("disk0").len(), field.bitmaps("overlay").len()), (1, 0), "{release}");
    }
}

/// A linked clone of what the disk was before its snapshot.
#[test]
fn two_disks_that_stand_on_one_file_have_images_of_their_own_in_a_flat_folder() {
    for release in releases(&["10.0"]) {
        let setup = Setup::of(release).image("disk.qcow2", "4M", "").qcow2("disk0", "disk.qcow2");
        let mut field = setup.words("-device virtio-scsi-pci,id=scsi").start();
        field.scribble("disk0");
        field.makes("--level full --no-subdir", 0, "disk0 FULL");
        take_snapshot(&mut field, "disk0");
        field.makes("--level auto --no-subdir", 3, "overlay FULL");
        field.scribble("disk0");
        field.makes("--level inc --no-subdir", 0, "overlay INC");

        let clone = field.vm.path("clone.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "disk.qcow2"];
        tools::run(tools::qemu_img().args(create).arg(&clone));
        let file = json!({ "driver": "file", "filename": clone });
        field.execute("blockdev-add", &json!({ "node-name": "clone", "driver": "qcow2", "file": file }));
        field.execute("device_add", &json!({ "driver": "scsi-hd", "bus": "scsi.0", "id": "clone", "drive": "clone" }));
        field.look();
        let raw = field.vm.path("raw");
        tools::run(tools::qemu_img().args(["convert", "-U", "-O", "raw"]).arg(&clone).arg(&raw));
        field.holds("clone", &std::fs::read(raw).unwrap());
        for (level, made) in [("auto", "clone FULL, overlay INC"), ("auto", "clone INC, overlay INC")] {
            field.scribble("disk0");
            field.write("clone", 7, 1 << 20, 1 << 16);
            field.makes(&format!("--level {level} --no-subdir"), 0, made);
            let image = |disk: &str| field.newest(disk).file_name().unwrap().to_str().unwrap().to_owned();
            assert!(image("overlay").ends_with("-disk.qcow2") && image("clone").ends_with("-clone.qcow2"));
        }
        field.verify_as(&[("overlay", "disk0")]);
    }
}
