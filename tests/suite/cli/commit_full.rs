//! There is no space left for a FULL that takes INCs.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::time::Duration;

use crate::support::in_place::{SLOW, assert_sound, copy_folder};
use crate::support::program::{Backup, Ended, TIMES, is_root};
use crate::support::small_disk::Small;
use crate::support::tools;

/// The recorded chain in a file system with some room.
fn small_backup() -> (Backup, Small) {
    let mut backup = Backup::new();
    let small = Small::mount(&backup.path("small"), "16m");
    let dir = backup.path("small/disk0");
    copy_folder(&backup.dir, &dir);
    for image in &mut backup.images {
        *image = dir.join(image.file_name().unwrap());
    }
    backup.dir = dir;
    (backup, small)
}

#[test]
fn what_has_no_room_is_refused_before_anything_is_changed() {
    if !is_root() {
        return;
    }
    for command in ["commit", "snapshotrebase"] {
        let (backup, small) = small_backup();
        let expected = backup.expected(3);
        let growth = backup.planned(&[command])["growth"].as_u64().unwrap();
        small.fill(growth / 2);
        backup.refuses(&[command], 7, "bytes may be needed in its file system, but only");
        backup.refuses(&[command, "--dry-run"], 7, "nothing was changed");
        small.free();
        // what is asked for is enough, and not much more than is needed
        let length = || backup.images[0].metadata().unwrap().len();
        let before = length();
        small.fill(growth + (128 << 10));
        backup.does(&[command]).with(0);
        let grown = length() - before;
        assert!(grown <= growth && growth < 2 * grown, "{grown} of {growth}");
        backup.assert_holds(3, &expected);
        assert_sound(&backup.images[0], false);
    }
}

#[test]
fn places_in_the_full_that_are_holes_need_room_as_well() {
    if !is_root() {
        return;
    }
    let (backup, small) = small_backup();
    let options = "preallocation=metadata";
    let full = &backup.images[0];
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(full).arg("64M"));
    let planned = || backup.planned(&["commit", "--until=INC-1793674800"])["growth"].as_u64().unwrap();
    let growth = planned();
    small.fill(growth / 2);
    backup.refuses(&["commit", "--until=INC-1793674800"], 7, "bytes may be needed in its file system, but only");
    small.free();
    let used = || full.metadata().unwrap().blocks() * 512;
    let before = used();
    small.fill(growth + (128 << 10));
    backup.does(&["commit", "--until=INC-1793674800"]).with(0);
    let grown = used() - before;
    assert!(grown > 1 << 20 && grown <= growth && growth < 3 * grown, "{grown} of {growth}");
}

#[test]
fn checksums_that_are_written_beside_the_old_need_room_as_well() {
    if !is_root() {
        return;
    }
    for command in ["commit", "snapshotrebase"] {
        let (backup, small) = small_backup();
        let expected = backup.expected(3);
        // 512 KiB of them
        File::options().write(true).open(&backup.images[0]).unwrap().set_len(8 << 30).unwrap();
        backup.does(&["manifest"]).with(0);
        let growth = backup.planned(&[command])["growth"].as_u64().unwrap();
        small.fill(growth + (256 << 10));
        backup.refuses(&[command], 7, "bytes may be needed in its file system, but only");
        backup.refuses(&[command, "--dry-run"], 7, "nothing was changed");
        small.free();
        small.fill(growth + (640 << 10));
        backup.does(&[command]).with(0);
        small.free();
        backup.assert_holds(3, &expected);
        backup.does(&["verify"]).with(0);
    }
}

#[test]
fn a_disk_that_gets_full_meanwhile_stops_the_work_which_ends_right_later() {
    if !is_root() {
        return;
    }
    for command in ["commit", "snapshotrebase"] {
        for left in [0, 64 << 10, 1 << 20] {
            let (backup, small) = small_backup();
            let expected = backup.expected(3);
            let words = [&[command][..], &SLOW].concat();
            let run = backup.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            while !backup.bookkeeping().iter().any(|name| name.ends_with(".in-place.json")) {
                std::thread::sleep(Duration::from_millis(2));
            }
            small.fill(left);
            let ended = Ended::new(run.wait_with_output().unwrap()).with(7);
            ended.says("nothing is lost: free space and run the same again");
            backup.does(&["list"]).with(3).says("was begun and not finished");
            let again = backup.does(&[command]);
            assert!(matches!(again.code, Some(7)), "{again:?}");
            small.free();
            backup.does(&[command]).with(0);
            backup.assert_holds(3, &expected);
            assert_sound(&backup.images[0], false);
            assert_eq!(backup.held_time(), TIMES[3]);
        }
    }
}

#[test]
fn a_full_that_may_not_grow_so_far_is_not_begun_with() {
    let backup = Backup::new();
    let before = backup.images[0].metadata().unwrap().len();
    let limited = |words: &str| {
        let program = env!("CARGO_BIN_EXE_qmprestore");
        let script = format!("ulimit -f {}; exec {program} {words}", before.div_ceil(1024) + 1);
        let mut command = std::process::Command::new("bash");
        Ended::of(command.args(["-c", &script]).current_dir(backup.root.path()))
    };
    let dir = backup.dir.display();
    limited(&format!("commit --dir {dir}")).with(7).says("nothing was changed");
    // the write itself fails, and no signal ends the program
    let out = backup.path("out.raw");
    limited(&format!("merge --dir {dir} --format raw --out {}", out.display())).with(1).says("File too large");
    assert!(!out.exists());
    backup.does(&["commit"]).with(0);
}

#[test]
fn a_file_system_that_tells_no_sizes_is_not_full() {
    if !is_root() {
        return;
    }
    let mut backup = Backup::new();
    let _small = Small::mount(&backup.path("small"), "0");
    let dir = backup.path("small/disk0");
    copy_folder(&backup.dir, &dir);
    backup.dir = dir;
    backup.does(&["commit"]).with(0);
}
