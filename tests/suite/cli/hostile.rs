//! Names that would do something to a terminal or a shell, and outputs that others must not read: whatever is said, to
//! whomever, holds no control character, and what is made is for those only who may read the backups.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::support::program::{Backup, Ended, TIMES, program, qmprestore};
use crate::support::tools;

/// Sets the title of a terminal, rings, begins a line, turns the direction, and the same in other characters.
pub(crate) const HOSTILE: &str =
    "x\u{1b}]0;owned\u{7}\n[2026] ERROR\r\u{8}\u{7f}\u{9b}2J\u{202e}\u{2066}\u{61c}\u{200f}\u{2028}\u{feff}y";

/// Fails where text could do anything to a terminal.
#[track_caller]
pub(crate) fn assert_harmless(text: &str) {
    let bad = |letter: &char| {
        let seen = matches!(*letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{feff}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}');
        seen || (letter.is_control() && *letter != '\n')
    };
    let found: Vec<char> = text.chars().filter(bad).collect();
    assert!(found.is_empty(), "{found:?} in {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("[2026] ERROR")), "a name has begun a line: {text:?}");
}

fn hostile() -> OsString {
    OsString::from_vec([HOSTILE.as_bytes(), b"\xff"].concat())
}

/// Runs a command, with a log that says all, and looks at everything that it says.
fn assert_says_harmless(backup: &Backup, program_path: &str, words: &[&OsStr], codes: &[i32]) {
    for json in [false, true] {
        let log = backup.path("log");
        let mut command = program(program_path, words);
        command.args(["--debug", "--logfile"]).arg(&log).current_dir(backup.root.path());
        if json {
            command.arg("--json");
        }
        let ended = Ended::new(tools::output(&mut command));
        assert!(codes.contains(&ended.code.unwrap()), "{words:?}: {ended:#?}");
        assert_harmless(&ended.stdout);
        assert_harmless(&ended.stderr);
        assert!(!(ended.stdout.clone() + &ended.stderr).is_empty(), "{words:?}");
        assert_harmless(&std::fs::read_to_string(&log).unwrap_or_default());
        let _ = std::fs::remove_file(&log);
    }
}

#[test]
fn no_name_does_anything_to_a_terminal_whatever_is_done_with_it() {
    let name = hostile();
    let backup = Backup::named(Path::new("backup").join(&name), HOSTILE, TIMES);
    for left in ["INC-1793761205-", "COPY-5-"] {
        let mut partial = OsString::from(left);
        partial.push(HOSTILE);
        partial.push(".partial");
        std::fs::write(backup.dir.join(partial), "").unwrap();
    }
    let mut config = OsString::from(HOSTILE);
    config.push(".config");
    std::fs::write(backup.dir.join(config), "{}").unwrap();
    tools::run(tools::qemu_img().args(["snapshot", "-c", "a\u{1b}[2J\u{202e}"]).arg(&backup.images[0]));
    let (dir, image, out) = (backup.dir.as_os_str(), backup.images[1].as_os_str(), backup.path("out"));
    let word = OsStr::new;
    let restore = env!("CARGO_BIN_EXE_qmprestore");
    let says = |words: &[&OsStr], codes: &[i32]| assert_says_harmless(&backup, restore, words, codes);
    let below = backup.dir.join(HOSTILE);
    for (command, codes) in [
        ("list", &[0, 3][..]),
        ("check", &[0, 3]),
        ("rebase", &[0, 2, 3, 4]),
        ("commit", &[2, 3, 4]),
        ("snapshotrebase", &[2, 3, 4]),
    ] {
        let more: &[&OsStr] = if command.len() > 5 { &[word("--dry-run"), word("--allow-partial")] } else { &[] };
        says(&[&[word(command), word("--dir"), dir], more].concat(), codes);
        says(&[word(command), word("--dir"), &name], &[1]);
        says(&[word(command), word("--dir"), dir, &name], &[1, 2]);
    }
    says(&[word("check"), image, below.as_os_str(), word("--repair=all")], &[1]);
    for more in [
        [word("--until"), word(HOSTILE)],
        [word("--filter"), word(HOSTILE)],
        [word("--force"), word("--allow-partial")],
    ] {
        let merge = [word("merge"), word("--dir"), dir, word("--out"), out.as_os_str()];
        says(&[&merge[..], &more[..]].concat(), &[0, 2, 3, 4]);
    }
    let here = [word("merge"), word("--allow-partial"), word("--dir"), dir, word("--out"), below.as_os_str()];
    says(&here, &[1, 3]);
    let rebase = env!("CARGO_BIN_EXE_qmprebase");
    assert_says_harmless(&backup, rebase, &[word("rebase"), word("--dry-run"), word("--dir"), dir], &[0, 3, 4]);
    assert_says_harmless(&backup, rebase, &[word("rebase"), word("--dir"), &name], &[1, 2]);
}

#[test]
fn no_word_of_a_command_line_does_anything_to_a_terminal() {
    let backup = Backup::new();
    // without spaces, which are as wrong where escapes are right
    let bare = "x\u{1b}]0;owned\u{7}\u{202e}\u{9b}2Jy";
    let programs = [
        (env!("CARGO_BIN_EXE_qmpbackup"), &["backup", "cleanup", "info", "recover", ""][..]),
        (env!("CARGO_BIN_EXE_qmprestore"), &["merge", "list", "check", "rebase", "commit", "snapshotrebase", ""]),
        (env!("CARGO_BIN_EXE_qmprebase"), &["rebase", ""]),
    ];
    let options = [
        "--uuid",
        "--socket",
        "--level",
        "--until",
        "--format",
        "--compress",
        "--rate-limit",
        "--threads",
        "--timeout",
        "--show",
        "--cluster-size",
        "--speed-limit",
        "--blockdev-aio",
        "--repair",
        "--source-format",
        "--unknown",
        "",
    ];
    for (path, commands) in programs {
        for command in commands {
            for option in options {
                for value in [bare, HOSTILE] {
                    let words = [*command, "--remove-bitmap", &format!("{option}={value}")];
                    let words = words.iter().filter(|word| {
                        !word.is_empty() && (path.ends_with("qmpbackup") || **word != "--remove-bitmap")
                    });
                    let ended = Ended::of(program(path, words).current_dir(backup.root.path()));
                    // a path may be anything, but there is no such image or monitor
                    assert!(matches!(ended.code, Some(1 | 2 | 5)), "{command} {option}: {ended:?}");
                    assert_harmless(&(ended.stdout + &ended.stderr));
                }
            }
            let ended = Ended::of(&mut program(path, [OsStr::new(command), &hostile(), OsStr::new("--json")]));
            assert!(matches!(ended.code, Some(1 | 2)), "{command}: {ended:?}");
            assert_harmless(&(ended.stdout + &ended.stderr));
        }
    }
    let uuid = ["--socket=s", "cleanup", "--remove-bitmap", "--uuid", bare];
    Ended::of(&mut program(env!("CARGO_BIN_EXE_qmpbackup"), uuid)).with(2).says("1 to 200 printable");
}

#[test]
fn a_command_that_is_shown_is_for_these_files_only() {
    let backup = Backup::named("backup/disk0", "$(touch owned)`touch owned`\"; touch owned; \"'", TIMES);
    let dir = backup.dir.to_str().unwrap();
    let mut rebase = program(env!("CARGO_BIN_EXE_qmprebase"), ["rebase", "--dry-run", "--dir", dir]);
    let mut commands: Vec<String> = Ended::of(&mut rebase).with(0).stderr.lines().map(str::to_owned).collect();
    for words in [
        &["merge", "--dry-run", "--out", "out"][..],
        &["rebase", "--dry-run"],
        &["commit", "--dry-run"],
        &["snapshotrebase", "--dry-run"],
    ] {
        commands.extend(Ended::run([words, &["--dir", dir]].concat()).with(0).stdout.lines().map(str::to_owned));
    }
    let lines = commands.iter().filter_map(|line| line.find("qemu-img ").map(|at| &line[at..]));
    let commands: Vec<&str> = lines.map(|line| line.trim_end_matches(" &&")).collect();
    assert!(commands.len() > 10, "{commands:?}");
    let (room, programs) = (backup.path("room"), backup.path("programs"));
    std::fs::create_dir(&room).unwrap();
    std::fs::create_dir(&programs).unwrap();
    for name in ["qemu-img", "cp", "ln", "rm"] {
        std::fs::write(programs.join(name), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(programs.join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:/usr/bin:/bin", programs.display());
    for command in commands {
        let mut sh = Command::new("sh");
        tools::run(sh.args(["-c", command]).env("PATH", &path).current_dir(&room));
        assert_eq!(std::fs::read_dir(&room).unwrap().count(), 0, "{command}");
    }
}

/// Merges with this umask, and returns the mode of what is made.
fn merged(backup: &Backup, umask: &str, out: &str) -> u32 {
    let set =
        ["-c", "umask \"$0\" && exec \"$@\"", umask, env!("CARGO_BIN_EXE_qmprestore"), "merge", "--force", "--dir"];
    let mut command = Command::new("sh");
    command.args(set).arg(&backup.dir).args(["--out", out]).current_dir(backup.root.path());
    Ended::of(&mut command).with(0);
    backup.path(out).metadata().unwrap().mode() & 0o7777
}

#[test]
fn what_is_restored_is_for_those_who_may_read_all_of_the_images() {
    let set = |backup: &Backup, modes: [u32; 4]| {
        for (image, mode) in backup.images.iter().zip(modes) {
            std::fs::set_permissions(image, PermissionsExt::from_mode(mode)).unwrap();
        }
    };
    let backup = Backup::new();
    for (modes, expected) in
        [([0o600; 4], 0o600), ([0o644; 4], 0o644), ([0o644, 0o644, 0o600, 0o644], 0o600), ([0o440; 4], 0o640)]
    {
        set(&backup, modes);
        assert_eq!(merged(&backup, "000", "out"), expected, "{modes:?}");
        assert_eq!(merged(&backup, "077", "out"), 0o600, "{modes:?}");
    }
    assert_eq!(merged(&backup, "000", "new/folder/out"), 0o640);
    assert_eq!(backup.path("new/folder").metadata().unwrap().mode() & 0o022, 0);
    // those of another group may not
    set(&backup, [0o640; 4]);
    if std::os::unix::fs::chown(&backup.images[2], None, Some(12345)).is_ok() {
        assert_eq!(merged(&backup, "000", "out"), 0o600);
    }
    // a folder may give its group to what is made in it
    let backup = Backup::new();
    set(&backup, [0o640; 4]);
    let shared = backup.path("shared");
    std::fs::create_dir(&shared).unwrap();
    if std::os::unix::fs::chown(&shared, None, Some(12345)).is_ok() {
        std::fs::set_permissions(&shared, PermissionsExt::from_mode(0o2775)).unwrap();
        assert_eq!(merged(&backup, "000", "shared/out"), 0o600);
        assert_eq!(backup.path("shared/out").metadata().unwrap().gid(), 12345);
    }
}

/// An access list, as the kernel has it, that lets one more user read and not the group; `false` where there are none here.
fn give_list(path: &Path, name: &std::ffi::CStr) -> bool {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(0x01, 6, NOBODY), (0x02, 4, 4242), (0x04, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY)];
    let entry =
        |(tag, may, id): &(u16, u16, u32)| [&tag.to_le_bytes()[..], &may.to_le_bytes(), &id.to_le_bytes()].concat();
    let list = [&2_u32.to_le_bytes()[..], &entries.iter().flat_map(entry).collect::<Vec<u8>>()].concat();
    rustix::fs::setxattr(path, name, &list, rustix::fs::XattrFlags::empty()).is_ok()
}

#[test]
fn who_may_use_an_image_by_a_list_gets_nothing_that_others_hold() {
    const LIST: &std::ffi::CStr = c"system.posix_acl_access";
    let backup = Backup::new();
    if !give_list(&backup.images[1], LIST) {
        eprintln!("skipped: this file system has no access lists");
        return;
    }
    assert_eq!(backup.images[1].metadata().unwrap().mode() & 0o777, 0o640, "the most that the list gives");
    assert_eq!(merged(&backup, "000", "out"), 0o600);
    // nor does the list of a folder give it to anybody
    let backup = Backup::new();
    let folder = backup.path("folder");
    std::fs::create_dir(&folder).unwrap();
    assert!(give_list(&folder, c"system.posix_acl_default"));
    assert_eq!(merged(&backup, "000", "folder/out"), 0o600);
    // a FULL that INCs are written into
    let full_mode = |backup: &Backup| {
        Ended::of(qmprestore(["commit", "--dir"]).arg(&backup.dir)).with(0);
        backup.images[0].metadata().unwrap().mode() & 0o777
    };
    assert!(give_list(&backup.images[0], LIST));
    assert_eq!(full_mode(&backup), 0o600);
    let backup = Backup::new();
    assert!(give_list(&backup.images[2], LIST));
    assert_eq!(full_mode(&backup), 0o600);
    // all have the same
    let backup = Backup::new();
    assert!(backup.images.iter().all(|image| give_list(image, LIST)));
    assert_eq!(full_mode(&backup), 0o640);
}

#[test]
fn a_link_is_replaced_itself_and_what_it_leads_to_stays() {
    let backup = Backup::new();
    std::fs::write(backup.path("precious"), "precious").unwrap();
    for to in ["precious", "new"] {
        symlink(backup.path(to), backup.path("out")).unwrap();
        backup.merged(["--out", "out"]).with(1).says("exists already");
        backup.merged(["--out", "out", "--force"]).with(0);
        assert!(!backup.path("out").is_symlink() && !backup.path("new").exists());
        std::fs::remove_file(backup.path("out")).unwrap();
    }
    assert_eq!(std::fs::read(backup.path("precious")).unwrap(), b"precious");
}

#[test]
fn no_image_is_repaired_over_a_link_in_a_folder() {
    let backup = Backup::new();
    let elsewhere = backup.path("elsewhere");
    backup.set_header_refcount(3, 7);
    std::fs::rename(&backup.images[3], &elsewhere).unwrap();
    symlink(&elsewhere, &backup.images[3]).unwrap();
    let before = std::fs::read(&elsewhere).unwrap();
    let repair = [OsStr::new("check"), OsStr::new("--repair=all")];
    Ended::of(qmprestore(repair).arg("--dir").arg(&backup.dir)).with(3).says("it is a link");
    assert!(std::fs::read(&elsewhere).unwrap() == before);
    // its checksums would not be those beside the link
    Ended::of(qmprestore(repair).arg(&backup.images[3])).with(1).says("is a link");
    std::fs::hard_link(&elsewhere, backup.path("other name")).unwrap();
    Ended::of(qmprestore(repair).arg(&elsewhere)).with(1).says("has other names (hard links)");
    assert!(std::fs::read(&elsewhere).unwrap() == before);
    std::fs::remove_file(backup.path("other name")).unwrap();
    Ended::of(qmprestore(repair).arg(&elsewhere)).with(0);
    assert!(std::fs::read(&elsewhere).unwrap() != before);
}

#[test]
fn no_bookkeeping_is_written_where_a_link_leads() {
    let backup = Backup::new();
    let elsewhere = backup.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, backup.dir.join(".qmpbackup")).unwrap();
    for command in ["commit", "snapshotrebase"] {
        Ended::of(qmprestore([command, "--dir"]).arg(&backup.dir)).with(1).says("is a link");
    }
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    assert!(backup.images.iter().all(|image| image.exists()));
    // what is only read may be read there
    Ended::of(qmprestore(["list", "--dir"]).arg(&backup.dir)).with(0);
}
