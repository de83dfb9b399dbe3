//! What is no ordinary disk: media, empty drives, the machine's flash, and overlays that end with QEMU.

use super::field_setup::{Setup, qcow2, releases};

#[test]
fn media_and_empty_drives_are_left_out() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Setup::of(release)
            .disk("disk0")
            .file("cd.iso", &vec![7; 1 << 20])
            .words("-drive if=none,id=medium,media=cdrom,readonly=on,format=raw,file=@/cd.iso")
            .words("-device ide-cd,id=cd0,bus=ide.0,drive=medium -device ide-cd,id=cd1,bus=ide.1")
            .start();
        for level in ["full", "inc"] {
            field.scribble("disk0");
            let level_made = level.to_uppercase();
            let ended = field.makes(&format!("--level {level} --include-raw"), 0, &format!("disk0 {level_made}"));
            let events = ended.events();
            let skipped = events.iter().filter(|event| event["event"] == "skipped");
            let why: Vec<&str> = skipped.map(|event| event["why"].as_str().unwrap()).collect();
            assert_eq!(why, ["removable", "empty"], "{ended:#?}");
        }
        field.verify();
    }
}

#[test]
fn what_is_asked_for_by_its_name_and_left_out_is_a_warning() {
    let mut field = Setup::of("10.0")
        .disk("disk0")
        .file("cd.iso", &vec![7; 1 << 20])
        .file("raw", &vec![7; 1 << 20])
        .words("-drive if=none,id=medium,media=cdrom,readonly=on,format=raw,file=@/cd.iso")
        .words("-device ide-cd,id=cd0,bus=ide.0,drive=medium -device ide-cd,id=cd1,bus=ide.1")
        .words("-blockdev node-name=raw0,driver=raw,file.driver=file,file.filename=@/raw")
        .words("-device virtio-blk-pci,id=raw0,drive=raw0")
        .start();
    for (name, why) in [("cd0", "a removable medium"), ("cd1", "the drive is empty"), ("raw0", "a raw disk")] {
        let ended = field.makes(&format!("--level full --include disk0,{name}"), 3, "disk0 FULL");
        let warnings = ended.events().into_iter().filter(|event| event["event"] == "warning");
        let warnings: Vec<String> = warnings.map(|event| event["message"].as_str().unwrap().to_owned()).collect();
        assert!(matches!(&warnings[..], [warning] if warning.contains(why)), "{ended:#?}");
    }
    field.makes("--level full --include disk0", 0, "disk0 FULL");
}

#[test]
fn a_machine_with_media_only_has_nothing_to_back_up() {
    let mut field = Setup::of("10.0").words("-device ide-cd,id=cd1,bus=ide.1").start();
    field.backup("--level full", 2).says("the machine has no disk to back up");
}

/// Flash with these contents; the machine must not run it.
fn flash(release: &'static str) -> (Setup, Vec<u8>, Vec<u8>) {
    let (firmware, settings) = (vec![0x11; 256 << 10], (0..=255).cycle().take(128 << 10).collect::<Vec<u8>>());
    let setup = Setup::of(release)
        .prelaunch()
        .file("code.fd", &firmware)
        .file("vars.fd", &settings)
        .words("-drive if=pflash,unit=0,format=raw,readonly=on,file=@/code.fd")
        .words("-drive if=pflash,unit=1,format=raw,file=@/vars.fd");
    (setup, firmware, settings)
}

#[test]
fn flash_is_in_the_backup_though_it_is_raw_and_its_firmware_read_only() {
    for release in releases(&["5.2", "10.0"]) {
        let (setup, firmware, settings) = flash(release);
        let mut field = setup.disk("disk0").start();
        let ended = field.makes("--level full", 0, "disk0 FULL, pflash0 FULL, pflash1 FULL");
        ended.says_not("--include-raw");
        for (disk, expected) in [("pflash0", &firmware), ("pflash1", &settings)] {
            let image = field.newest(disk);
            let until = image.file_name().unwrap().to_str().unwrap();
            assert!(super::tool::restore(image.parent().unwrap(), until) == *expected, "{disk} of {release}");
        }
        field.makes("--level inc", 0, "disk0 INC, pflash0 INC, pflash1 INC");
        // What the bitmaps of flash knew is gone
        field.restart();
        let ended = field.makes("--level inc", 0, "disk0 INC, pflash0 FULL, pflash1 FULL");
        ended.says("no bitmap is left of the newest image: those of this disk end with QEMU");
    }
}

#[test]
fn flash_can_be_excluded() {
    let (setup, ..) = flash("10.0");
    let mut field = setup.disk("disk0").start();
    field.makes("--level full --exclude pflash0,pflash1", 0, "disk0 FULL");
}

#[test]
fn an_overlay_that_ends_with_qemu_is_backed_up_with_what_is_below_it() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release)
            .image("disk.qcow2", "4M", "")
            .words("-drive if=none,id=disk0,format=qcow2,file=@/disk.qcow2,snapshot=on")
            .words("-device virtio-blk-pci,id=disk0,drive=disk0")
            .start();
        for (level, made) in [("full", "FULL"), ("inc", "INC"), ("auto", "INC")] {
            field.scribble("disk0");
            field.makes(&format!("--level {level}"), 0, &format!("disk0 {made}"));
        }
        // The name of the overlay is another one at each start
        assert!(field.newest("disk0").to_str().unwrap().ends_with("-disk.qcow2"));
        field.verify();
        field.points.clear();
        field.restart();
        field.forget("disk0");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 FULL").says("those of this disk end with QEMU");
        field.verify();
    }
}

#[test]
fn a_disk_that_other_machines_may_write_to_is_backed_up_with_a_warning() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Setup::of(release)
            .image("own", "4M", "")
            .words(&format!("-blockdev {}", qcow2("disk0", "own")))
            .words("-device virtio-blk-pci,id=disk0,drive=disk0,share-rw=on")
            .disk("disk1")
            .start();
        for level in ["FULL", "INC"] {
            field.scribble("disk0");
            let made = format!("disk0 {level}, disk1 {level}");
            let ended = field.makes(&format!("--level {level}").to_lowercase(), 3, &made);
            ended.says("disk0: other machines may write to it").says_not("disk1: other machines");
        }
        field.verify();
    }
}

#[test]
fn a_device_that_no_path_leads_to_is_backed_up_without_a_fleece_image() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release)
            .image("own", "4M", "")
            .words(&format!("-blockdev {}", qcow2("disk0", "own")))
            .words(r#"-device {"driver":"virtio-blk-pci","id":"a/b","drive":"disk0"}"#)
            .start();
        let ended = field.backup("--level full", 0);
        ended.says("no fleece image, QEMU does not find the device that reads it");
        field.backup("--level inc", 0);
    }
}
