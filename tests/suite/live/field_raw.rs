//! Raw disks: left out unless they are asked for, and then in qcow2 images like any other, zeroes too.

use super::field::Field;
use super::field_judge::restored;
use super::field_setup::{Setup, releases};
use crate::support::program::qmprestore;
use crate::support::tools;

/// A machine with a raw disk of these bytes, and a qcow2 disk.
fn machine(release: &'static str, bytes: &[u8]) -> Field {
    let mut field = Setup::of(release)
        .disk("disk0")
        .file("disk.raw", bytes)
        .words("-blockdev node-name=raw0,driver=raw,discard=unmap,file.driver=file,file.discard=unmap,file.filename=@/disk.raw")
        .words("-device virtio-blk-pci,id=raw0,drive=raw0")
        .start();
    field.holds("raw0", bytes);
    field
}

#[test]
fn a_raw_disk_is_left_out_and_said_unless_it_is_asked_for() {
    for release in releases(&["10.0"]) {
        let mut field = machine(release, &vec![3; 1 << 20]);
        let ended = field.makes("--level full", 0, "disk0 FULL");
        let said = "raw0: skipped, a raw disk: --include-raw includes it, --exclude says that it is left out";
        let told = ended.events().iter().any(|event| event["event"] == "notice" && event["message"] == said);
        assert!(told, "{ended:#?}");
        ended.says(said);
        assert!(!field.target.join("raw0").exists());
        field.backup("--level full --include raw0", 2).says("has no disk to back up");
    }
}

#[test]
fn a_raw_disk_has_incs_until_qemu_ends_and_then_a_full_of_its_own() {
    for release in releases(&["7.2", "11"]) {
        let mut field = machine(release, &vec![3; 2 << 20]);
        for (level, made) in [("full", "FULL"), ("inc", "INC"), ("auto", "INC")] {
            field.scribble("raw0");
            field.scribble("disk0");
            field.makes(&format!("--level {level} --include-raw"), 0, &format!("disk0 {made}, raw0 {made}"));
        }
        field.restart();
        for level in ["inc", "auto"] {
            field.scribble("raw0");
            field.scribble("disk0");
            let raw = if level == "inc" { "FULL" } else { "INC" };
            let ended = field.makes(&format!("--level {level} --include-raw"), 0, &format!("disk0 INC, raw0 {raw}"));
            if level == "inc" {
                ended.says("raw0: FULL, no bitmap is left of the newest image: those of this disk end with QEMU");
            }
        }
        field.verify();
    }
}

#[test]
fn zeroes_on_a_raw_disk_are_zeroes_in_the_inc() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = machine(release, &vec![0xaa; 2 << 20]);
        field.makes("--level full --include-raw", 0, "disk0 FULL, raw0 FULL");
        field.zero("raw0", 64 << 10, 512 << 10);
        field.zero("raw0", (1 << 20) + 512, 1024);
        field.write("raw0", 0, 1 << 20, 512);
        field.makes("--level inc --include-raw", 0, "disk0 INC, raw0 INC");
        field.verify();
        // the images are qcow2 also where nothing but their settings tells
        std::fs::remove_dir_all(field.target.join("raw0/.qmpbackup")).unwrap();
        let point = &field.points[1];
        let newest = point.images.iter().find(|image| image.disk == "raw0").unwrap();
        assert!(restored(newest, point.time) == point.contents["raw0"]);
    }
}

#[test]
fn raw_images_of_another_tool_stay_what_they_are() {
    for release in releases(&["10.0"]) {
        let mut field = machine(release, &vec![3; 1 << 20]);
        let folder = field.target.join("raw0");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(field.target.join("disk.raw.config"), r#"{"format":"raw"}"#).unwrap();
        let older = vec![9; 1 << 20];
        std::fs::write(folder.join("FULL-1600000000-disk.raw"), &older).unwrap();
        for level in ["full", "inc"] {
            field.backup(&format!("--level {level} --include-raw"), 0);
            let out = field.vm.path("out");
            let mut merge = qmprestore(["merge", "--format=raw", "--force", "--until=FULL-1600000000", "--dir"]);
            tools::run(merge.arg(&folder).arg("--out").arg(&out));
            assert!(std::fs::read(&out).unwrap() == older);
        }
        field.verify();
    }
}

#[test]
fn raw_images_of_a_disk_that_is_qcow2_now_stay_what_they_are() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release).disk("disk0").start();
        let folder = field.target.join("disk0");
        std::fs::create_dir_all(&folder).unwrap();
        let settings = field.target.join("disk0.config");
        std::fs::write(&settings, r#"{"format":"raw"}"#).unwrap();
        let older = vec![9; 1 << 20];
        std::fs::write(folder.join("FULL-1600000000-disk0"), &older).unwrap();
        for (level, exit) in [("full --fleece-dir /does/not/exist", 1), ("full", 0), ("inc", 0)] {
            field.backup(&format!("--level {level}"), exit);
            assert_eq!(std::fs::read_to_string(&settings).unwrap(), r#"{"format":"raw"}"#, "{level}");
            let out = field.vm.path("out");
            let mut merge = qmprestore(["merge", "--format=raw", "--force", "--until=FULL-1600000000", "--dir"]);
            tools::run(merge.arg(&folder).arg("--out").arg(&out));
            assert!(std::fs::read(&out).unwrap() == older, "{level}");
        }
        field.verify();
    }
}

#[test]
fn a_raw_file_of_any_length_is_a_disk_of_whole_sectors() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = machine(release, &vec![9; (1 << 20) + 65_536 + 700]);
        field.makes("--level full --include-raw", 0, "disk0 FULL, raw0 FULL");
        field.write("raw0", 1, 65_536, 512);
        field.makes("--level inc --include-raw", 0, "disk0 INC, raw0 INC");
        field.verify();
    }
}

#[test]
fn a_disk_without_a_format_is_raw() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release)
            .file("disk.img", &vec![5; 1 << 20])
            .words("-blockdev node-name=disk0,driver=file,filename=@/disk.img")
            .words("-device virtio-blk-pci,id=disk0,drive=disk0")
            .start();
        field.holds("disk0", &vec![5; 1 << 20]);
        field.backup("--level full", 2).says("--include-raw");
        for (level, made) in [("full", "FULL"), ("inc", "INC")] {
            field.makes(&format!("--level {level} --include-raw"), 0, &format!("disk0 {made}"));
            field.scribble("disk0");
        }
        field.verify();
    }
}
