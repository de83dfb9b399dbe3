//! Disks however they are given to QEMU: by drive or node, with filters, from any folder. What is on them does not matter
//! here.

use serde_json::{Value, json};

use super::faults_hooks::begins_jobs;
use super::field::Field;
use super::field_setup::{Setup, qcow2, releases};
use super::monitor::Monitor;
use super::proxy::Action;
use super::vm::fleeces;

/// A FULL and two INCs with writes between them.
fn three_points(field: &mut Field, ids: &[&str], disks: &[&str]) {
    let levels = |level: &str| disks.iter().map(|disk| format!("{disk} {level}")).collect::<Vec<_>>().join(", ");
    for (wanted, level) in [("full", "FULL"), ("inc", "INC"), ("auto", "INC")] {
        for id in ids {
            field.scribble(id);
        }
        field.makes(&format!("--level {wanted}"), 0, &levels(level));
    }
    let named: Vec<(&str, &str)> = disks.iter().copied().zip(ids.iter().copied()).collect();
    field.verify_as(&named);
}

#[test]
fn drives_have_folders_by_their_ids_and_nodes_by_their_names_on_every_release() {
    for release in releases(&["7.2", "11"]) {
        let mut field = Setup::of(release)
            .image("a.qcow2", "4M", "")
            .words("-drive if=none,id=drive0,format=qcow2,file=@/a.qcow2")
            .words("-device virtio-blk-pci,id=dev0,drive=drive0")
            .disk("node1")
            .start();
        assert!(field.drive("dev0")["inserted"]["node-name"].as_str().unwrap().starts_with("#block"));
        three_points(&mut field, &["dev0", "node1"], &["drive0", "node1"]);
        assert!(field.newest("drive0").starts_with(field.target.join("drive0")));
        // Another number after each start
        field.restart();
        field.scribble("dev0");
        field.makes("--level inc", 0, "drive0 INC, node1 INC");
        field.verify_as(&[("drive0", "dev0")]);
    }
}

fn same_names(release: &'static str) -> Field {
    let setup = Setup::of(release).image("a/disk.qcow2", "4M", "").image("b/disk.qcow2", "4M", "");
    setup.qcow2("disk0", "a/disk.qcow2").qcow2("disk1", "b/disk.qcow2").start()
}

#[test]
fn two_disks_with_the_same_file_name_do_not_mix() {
    for release in releases(&["10.0"]) {
        let mut field = same_names(release);
        three_points(&mut field, &["disk0", "disk1"], &["disk0", "disk1"]);
        for config in ["disk0/disk.qcow2.config", "disk1/disk.qcow2.config"] {
            assert!(field.target.join(config).is_file(), "{config}");
        }
    }
}

#[test]
fn two_disks_with_the_same_file_name_do_not_mix_in_one_folder() {
    for release in releases(&["10.0"]) {
        let mut field = same_names(release);
        for level in ["full", "inc", "auto"] {
            field.scribble("disk0");
            field.scribble("disk1");
            field.backup(&format!("--level {level} --no-subdir"), 0);
        }
        field.makes("--level inc --no-subdir", 0, "disk0 INC, disk1 INC");
        field.verify();
        for config in ["disk0-disk.qcow2.config", "disk1-disk.qcow2.config"] {
            assert!(field.target.join(config).is_file(), "{config}");
        }
        assert!(!field.target.join("disk0").exists());
    }
}

#[test]
fn the_longest_node_name_is_no_trouble() {
    for release in releases(&["5.2", "10.0"]) {
        let name = "a-node-name-of-31-characters--x";
        assert_eq!(name.len(), 31);
        let mut field = Setup::of(release).disk(name).start();
        three_points(&mut field, &[name], &[name]);
    }
}

/// A disk below a filter.
fn throttled(release: &'static str) -> Field {
    Setup::of(release)
        .image("disk.qcow2", "4M", "")
        .words("-object throttle-group,id=group,x-iops-total=100000")
        .words(&format!("-blockdev {}", qcow2("format", "disk.qcow2")))
        .words("-blockdev node-name=top,driver=throttle,throttle-group=group,file=format")
        .words("-device virtio-blk-pci,id=dev,drive=top")
        .start()
}

#[test]
fn a_throttle_filter_stays_above_the_disk() {
    for release in releases(&["7.2", "10.0"]) {
        let mut field = throttled(release);
        three_points(&mut field, &["dev"], &["top"]);
        assert_eq!(field.bitmaps("format").len(), 1);
    }
}

/// The node on top stays the same then.
#[test]
fn a_snapshot_below_a_filter_at_the_moment_itself_is_noticed() {
    for (release, at) in [("7.2", "transaction"), ("10.0", "stop"), ("10.0", "qom-set"), ("11", "stop")] {
        let mut field = throttled(release);
        field.makes("--level full", 0, "top FULL");
        let hand = field.vm.path("hand");
        let overlay = json!({
            "node-name": "format",
            "snapshot-file": field.vm.path("overlay"),
            "snapshot-node-name": "overlay",
            "format": "qcow2",
        });
        let mut done = false;
        let snapshot = move |command: &Value, _: usize| {
            let is_moment = command["execute"] == at && (at != "transaction" || begins_jobs(command));
            if is_moment && !done {
                done = true;
                Monitor::connect(&hand).execute("blockdev-snapshot-sync", &overlay).unwrap();
            }
            Action::Forward
        };
        let words = format!("backup --level inc --target {}", field.target.display());
        let ended = field.run_through(Box::new(snapshot), &words);
        ended.with(1).says("top: the device has got another image just now");
        field.stays();
    }
}

/// QEMU 10 and 11 would abort where the guest writes beyond the end of the fleece image, and an image would end too early.
#[test]
fn a_disk_that_grows_before_the_moment_gets_no_image() {
    for (release, level) in [("7.2", "full"), ("10.0", "full"), ("11", "inc")] {
        let mut field = Setup::of(release)
            .image("disk.qcow2", "4M", "")
            .words("-drive if=none,id=drive0,format=qcow2,file=@/disk.qcow2")
            .words("-device virtio-blk-pci,id=dev,drive=drive0")
            .start();
        field.makes("--level full", 0, "drive0 FULL");
        let hand = field.vm.path("hand");
        let mut done = false;
        let grow = move |command: &Value, _: usize| {
            // the new image is there, and a fleece image beside it
            if !done && command["execute"] == "blockdev-add" && command["arguments"]["driver"] == "qcow2" {
                done = true;
                let size = json!({"device": "drive0", "size": 8 << 20});
                Monitor::connect(&hand).execute("block_resize", &size).unwrap();
            }
            Action::Forward
        };
        let words = format!("backup --level {level} --target {}", field.target.display());
        let ended = field.run_through(Box::new(grow), &words);
        ended.with(1).says("drive0: the disk was resized just now; try again");
        field.stays();
    }
}

#[test]
fn what_copy_on_read_copies_is_not_lost() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release)
            .image("below.qcow2", "4M", "")
            .image("disk.qcow2", "4M", "backing_file=@/below.qcow2,backing_fmt=qcow2")
            .words("-drive if=none,id=cor,format=qcow2,copy-on-read=on,file=@/disk.qcow2")
            .words("-device virtio-blk-pci,id=dev,drive=cor")
            .start();
        three_points(&mut field, &["dev"], &["cor"]);
    }
}

#[test]
fn a_file_name_in_json_names_the_file() {
    for release in releases(&["5.2", "10.0"]) {
        let json = r#"json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"@/some.qcow2"}}"#;
        let mut field = Setup::of(release)
            .image("some.qcow2", "4M", "")
            .words(&format!("-drive if=none,id=drive0,file={json}"))
            .words("-device virtio-blk-pci,id=dev,drive=drive0")
            .start();
        three_points(&mut field, &["dev"], &["drive0"]);
        assert!(field.newest("drive0").to_str().unwrap().ends_with("-some.qcow2"));
    }
}

#[test]
fn disks_in_a_thread_of_their_own_are_backed_up_like_others() {
    for release in releases(&["7.2", "11"]) {
        let mut field = Setup::of(release)
            .image("disk0", "4M", "")
            .image("disk1", "4M", "")
            .words("-object iothread,id=io0 -object iothread,id=io1")
            .words(&format!("-blockdev {} -blockdev {}", qcow2("disk0", "disk0"), qcow2("disk1", "disk1")))
            .words("-device virtio-blk-pci,id=disk0,drive=disk0,iothread=io0")
            .words("-device virtio-scsi-pci,id=scsi,iothread=io1 -device scsi-hd,bus=scsi.0,id=disk1,drive=disk1")
            .start();
        three_points(&mut field, &["disk0", "disk1"], &["disk0", "disk1"]);
    }
}

#[test]
fn a_relative_file_name_is_one_of_qemus_folder() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release)
            .image("some/disk.qcow2", "4M", "")
            .image("flat.qcow2", "4M", "")
            .words("-blockdev node-name=disk0,driver=qcow2,file.driver=file,file.filename=some/disk.qcow2")
            .words("-device virtio-blk-pci,id=disk0,drive=disk0")
            .words("-drive if=none,id=disk1,format=qcow2,file=file:flat.qcow2")
            .words("-device virtio-blk-pci,id=disk1,drive=disk1")
            .start();
        // Where the fleece image goes, if there is one, is said in the plan
        let plan = field.backup("--level full --dry-run", 0);
        let folder = field.vm.path("").to_str().unwrap().trim_end_matches('/').to_owned();
        for start in [format!("{folder}/some/FULL-"), format!("{folder}/FULL-")] {
            if !fleeces(release) {
                break;
            }
            plan.clone().says(&format!("\"filename\":\"{start}"));
        }
        three_points(&mut field, &["disk0", "disk1"], &["disk0", "disk1"]);
    }
}

#[test]
fn a_device_whose_id_something_else_has_too_is_backed_up_like_others() {
    for release in releases(&["10.0", "11"]) {
        let mut field = Setup::of(release)
            .image("a.qcow2", "4M", "")
            .image("b.qcow2", "4M", "")
            .words(&format!("-blockdev {} -blockdev {}", qcow2("node0", "a.qcow2"), qcow2("node1", "b.qcow2")))
            // Its bus has its name
            .words("-device nvme,serial=a,id=nv,drive=node0")
            .words("-object throttle-group,id=hd")
            .words("-device virtio-scsi-pci,id=scsi -device scsi-hd,bus=scsi.0,id=hd,drive=node1")
            .start();
        assert_eq!(field.drive("nv")["qdev"], "nv");
        three_points(&mut field, &["nv", "hd"], &["node0", "node1"]);
        field.makes("--level inc --include nv", 0, "node0 INC");
    }
}
