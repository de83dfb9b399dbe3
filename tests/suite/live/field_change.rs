//! Machines that change between two backups: disks come, go and grow, and QEMU itself is another one.

use std::time::{Duration, Instant};

use serde_json::json;

use super::field::Field;
use super::field_setup::{Setup, releases};
use crate::support::tools;

fn scsi(release: &'static str) -> Setup {
    Setup::of(release).disk("disk0").words("-device virtio-scsi-pci,id=scsi")
}

fn add(field: &mut Field, name: &str) {
    let path = field.vm.path(name);
    if !path.exists() {
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("4M"));
    }
    let file = json!({ "driver": "file", "filename": path });
    field.execute("blockdev-add", &json!({ "node-name": name, "driver": "qcow2", "file": file }));
    field.execute("device_add", &json!({ "driver": "scsi-hd", "bus": "scsi.0", "id": name, "drive": name }));
    field.look();
}

fn remove(field: &mut Field, name: &str) {
    field.execute("device_del", &json!({ "id": name }));
    let until = Instant::now() + Duration::from_secs(60);
    // The device goes a little later
    while let Err(error) = field.vm.monitor.execute("blockdev-del", &json!({ "node-name": name })) {
        assert!(Instant::now() < until, "{error}");
        std::thread::sleep(Duration::from_millis(5));
    }
    field.look();
}

#[test]
fn a_disk_that_was_added_gets_a_full_while_the_others_get_incs() {
    for release in releases(&["7.2", "11"]) {
        let mut field = scsi(release).start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL");
        add(&mut field, "new");
        field.scribble("disk0");
        field.scribble("new");
        let ended = field.makes("--level inc", 0, "disk0 INC, new FULL");
        ended.says("new: FULL, the disk is new in this backup");
        field.scribble("new");
        field.makes("--level inc", 0, "disk0 INC, new INC");
        field.verify();
    }
}

#[test]
fn a_disk_that_was_removed_is_no_trouble_and_may_come_back() {
    for release in releases(&["10.0"]) {
        let mut field = scsi(release).start();
        add(&mut field, "guest");
        field.scribble("guest");
        field.makes("--level full", 0, "disk0 FULL, guest FULL");
        remove(&mut field, "guest");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        // Its bitmap came back with its image, and goes back to the newest image of this disk
        add(&mut field, "guest");
        field.scribble("guest");
        field.makes("--level inc", 0, "disk0 INC, guest INC");
        field.verify();
    }
}

#[test]
fn a_disk_that_has_got_the_name_of_another_does_not_go_on_with_its_images() {
    for release in releases(&["7.2", "10.0"]) {
        let setup = Setup::of(release).image("p/disk.qcow2", "4M", "").image("q/disk.qcow2", "4M", "");
        let mut field = setup.qcow2("disk0", "p/disk.qcow2").qcow2("disk1", "q/disk.qcow2").start();
        for disk in ["disk0", "disk1"] {
            field.scribble(disk);
        }
        field.makes("--level full", 0, "disk0 FULL, disk1 FULL");
        field.exchange(["p/disk.qcow2", "q/disk.qcow2"], ["disk0", "disk1"]);
        field.scribble("disk1");
        field.backup("--level inc", 4).says("no bitmap goes back to the newest image");
        field.makes("--level auto", 3, "disk0 FULL, disk1 FULL");
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 INC, disk1 INC");
        field.verify();
    }
}

#[test]
fn a_disk_that_was_resized_gets_a_full_and_each_point_has_its_size() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Setup::of(release).disk("disk0").disk("disk1").start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL, disk1 FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC, disk1 INC");
        field.execute("block_resize", &json!({ "node-name": "disk0", "size": 6 << 20 }));
        field.look();
        field.scribble("disk0");
        let ended = field.makes("--level inc", 0, "disk0 FULL, disk1 INC");
        ended.says("disk0: FULL, the disk was resized from 4194304 to 6291456 bytes");
        field.scribble("disk0");
        field.makes("--level auto", 0, "disk0 INC, disk1 INC");
        field.verify();
    }
}

#[test]
fn a_chain_goes_on_when_qemu_was_upgraded() {
    for (before, after) in [("5.2", "7.2"), ("7.2", "10.0"), ("10.0", "11")] {
        let mut field = Setup::of(before)
            .disk("disk0")
            .image("drive.qcow2", "4M", "")
            .words("-drive if=none,id=disk1,format=qcow2,file=@/drive.qcow2")
            .words("-device virtio-blk-pci,id=disk1,drive=disk1")
            .start();
        field.scribble("disk0");
        field.makes("--level full", 0, "disk0 FULL, disk1 FULL");
        field.vm.release = after;
        field.scribble("disk0");
        field.scribble("disk1");
        field.restart();
        field.scribble("disk1");
        field.makes("--level inc", 0, "disk0 INC, disk1 INC");
        field.verify();
    }
}

#[test]
fn a_machine_that_was_killed_has_lost_its_bitmaps_and_gets_a_full() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release).disk("disk0").start();
        field.makes("--level full", 0, "disk0 FULL");
        field.restart();
        field.scribble("disk0");
        field.flush("disk0");
        field.vm.kill();
        field.vm.restart();
        field.look();
        field.backup("--level inc", 4).says("is inconsistent").says("--level full");
        field.makes("--level auto", 3, "disk0 FULL").says("is inconsistent");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}
