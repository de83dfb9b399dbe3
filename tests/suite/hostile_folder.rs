//! Backup folders in which somebody has put what does not belong there. Whatever it is, the program ends in time with a
//! code that the help text explains and a word for each failure, changes nothing where it only looks, leaves no half
//! output, and opens no file that an image names.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::inotify;
use serde_json::{Value, json};

use crate::support::program::{Backup, Ended, TIMES, program};
use crate::support::tools;

/// What only looks, or writes elsewhere.
const COMMANDS: [&[&str]; 5] =
    [&["list"], &["check"], &["merge", "--out", "../../out"], &["rebase", "--dry-run"], &["commit", "--dry-run"]];

/// Runs all of them in a folder, each with little time and memory, and returns what they said.
#[track_caller]
fn run_all(backup: &Backup, what: &str) -> Vec<Ended> {
    let before = state(&backup.dir);
    let run = |words: &[&str]| {
        let limits = ["-s", "KILL", "20", "prlimit", "--as=1073741824"];
        let mut command = program("timeout", limits);
        command.arg(env!("CARGO_BIN_EXE_qmprestore")).args(words).arg("--dir").arg(&backup.dir);
        let output = tools::output(command.current_dir(&backup.dir));
        let ended = Ended {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(matches!(ended.code, Some(0..=4 | 6)), "{what}: {words:?}: {ended:#?}");
        assert!(!ended.stderr.contains("panicked"), "{what}: {words:?}: {ended:#?}");
        let is_silent = ended.stdout.is_empty() && ended.stderr.is_empty();
        assert!(ended.code == Some(0) || !is_silent, "{what}: {words:?}: {ended:#?}");
        let out = backup.path("out");
        assert_eq!(out.exists(), words[0] == "merge" && matches!(ended.code, Some(0 | 3)), "{what}: {ended:#?}");
        let _ = fs::remove_file(out);
        let beside: Vec<OsString> = names(backup.root.path());
        assert!(beside.iter().all(|name| !name.as_bytes().contains(&b'~') && !name.as_bytes().starts_with(b".tmp")));
        ended
    };
    let said = COMMANDS.map(run).to_vec();
    let mut after = state(&backup.dir);
    // the lock of a folder is there before anybody knows that there is nothing to do
    after.retain(|(path, ..)| before.iter().any(|(known, ..)| known == path) || !path.ends_with(".qmpbackup/lock"));
    assert_eq!(after, before, "{what}");
    said
}

fn names(folder: &Path) -> Vec<OsString> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

/// All that is in a folder, without following or opening anything: path, kind, length, time of the last change.
fn state(folder: &Path) -> Vec<(PathBuf, u32, u64, i64)> {
    let mut all = Vec::new();
    for name in names(folder) {
        let path = folder.join(name);
        let metadata = path.symlink_metadata().unwrap();
        if metadata.is_dir() {
            all.extend(state(&path));
        } else {
            all.push((path, metadata.mode(), metadata.len(), metadata.mtime_nsec()));
        }
    }
    all.sort();
    all
}

/// Files that are no files, and texts that are none.
fn put(kind: &str, path: &Path) -> Option<UnixListener> {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _ = fs::remove_file(path);
    match kind {
        "fifo" => drop(tools::run(Command::new("mkfifo").arg(path))),
        "folder" => fs::create_dir(path).unwrap(),
        "loop" => symlink(path.file_name().unwrap(), path).unwrap(),
        "dangling" => symlink("nowhere/at/all", path).unwrap(),
        "zero" => symlink("/dev/zero", path).unwrap(),
        "passwd" => symlink("/etc/passwd", path).unwrap(),
        "socket" => return Some(UnixListener::bind(path).unwrap()),
        _ => panic!("{kind}"),
    }
    None
}

const KINDS: [&str; 7] = ["fifo", "folder", "loop", "dangling", "zero", "passwd", "socket"];

/// What stands in a file of JSON that somebody has changed: not JSON, no end, the wrong types, the wrong numbers.
fn texts(sound: &Value) -> Vec<Vec<u8>> {
    let mut texts: Vec<Vec<u8>> =
        ["", "{", "null", "[]", "7", "NaN", "{\"time\": NaN}", "{\"time\": 1e999}", "\u{feff}{}"]
            .iter()
            .map(|text| text.as_bytes().to_vec())
            .collect();
    texts.push(b"{\"version\": 1, \"level\": \"\xff\xfe\"}".to_vec());
    texts.push(b"[".repeat(1 << 20));
    texts.push(b"{\"a\":".repeat(200_000));
    texts.push(vec![b' '; (1 << 20) + 1]);
    texts.push(vec![0; 4096]);
    let whole = sound.to_string();
    texts.push(whole.as_bytes()[..whole.len() / 2].to_vec());
    // the last one of two counts, or the first
    texts.push(whole.replacen('{', "{\"time\": -1, \"version\": 7, \"incs\": [\"x\"], ", 1).into_bytes());
    texts.push(whole.replacen('}', ", \"time\": -1, \"version\": 7, \"incs\": [\"x\"]}", 1).into_bytes());
    let values = [
        json!(null),
        json!(-1),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1.5e300),
        json!(""),
        json!("../../x\n\u{1b}[2J"),
        json!("x".repeat(100_000)),
        json!([]),
        json!([[], {}]),
        json!({"a": []}),
    ];
    for key in sound.as_object().unwrap().keys() {
        for value in &values {
            let mut changed = sound.clone();
            changed[key] = value.clone();
            texts.push(changed.to_string().into_bytes());
        }
    }
    texts
}

fn manifest() -> Value {
    json!({
        "version": 1, "level": "FULL", "time": TIMES[0], "chain": "id", "parent": null, "format": "qcow2",
        "virtual-size": 64 << 20, "qemu": "10.0.2",
    })
}

fn journal(backup: &Backup) -> Value {
    let name = |number: usize| backup.images[number].file_name().unwrap().to_str().unwrap().to_owned();
    json!({"version": 1, "work": "commit", "phase": "writing", "full": name(0), "incs": [name(1)]})
}

/// Each file of the bookkeeping, and what a sound one holds.
fn bookkeeping(backup: &Backup) -> Vec<(PathBuf, Value)> {
    let dir = &backup.dir;
    let beside = |number: usize, end: &str| {
        let mut name = backup.images[number].file_name().unwrap().to_owned();
        name.push(end);
        dir.join(".qmpbackup").join(name)
    };
    vec![
        (beside(0, ".json"), manifest()),
        (beside(2, ".json"), manifest()),
        (beside(0, ".in-place.json"), journal(backup)),
        (dir.join("disk.qcow2.config"), json!({"format": "qcow2"})),
    ]
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn bookkeeping_may_hold_anything() {
    let backup = Backup::new();
    for (at, (path, sound)) in bookkeeping(&backup).into_iter().enumerate() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for (number, text) in texts(&sound).into_iter().enumerate() {
            // a sample: what is no JSON, and some of the rest
            if (number >= 17 || at % 2 == 1) && (number + at) % 25 != 0 && !crate::support::seeds::are_many() {
                continue;
            }
            fs::write(&path, &text).unwrap();
            let start = String::from_utf8_lossy(&text[..text.len().min(100)]).into_owned();
            run_all(&backup, &format!("{} is {start}", name(&path)));
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn bookkeeping_may_be_no_file() {
    for kind in KINDS {
        let backup = Backup::new();
        let mut paths: Vec<PathBuf> = bookkeeping(&backup).into_iter().map(|(path, _)| path).collect();
        paths.extend([backup.dir.join("uuid"), backup.path("backup/uuid"), backup.dir.join(".qmpbackup/lock")]);
        for path in paths {
            let held = put(kind, &path);
            run_all(&backup, &format!("{} is a {kind}", path.display()));
            drop(held);
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
        }
        let folder = backup.dir.join(".qmpbackup");
        fs::remove_dir_all(&folder).unwrap();
        let _held = put(kind, &folder);
        run_all(&backup, &format!("the bookkeeping is a {kind}"));
    }
}

#[test]
fn a_folder_may_hold_what_is_no_image_under_the_names_of_images() {
    for kind in KINDS {
        let backup = Backup::new();
        let held: Vec<_> = ["INC-1793847700-disk.qcow2", "FULL-1793588300-disk.qcow2", "other.qcow2", "disk1"]
            .map(|name| put(kind, &backup.dir.join(name)))
            .into_iter()
            .collect();
        run_all(&backup, kind);
        drop(held);
        // in the middle of the chain
        let backup = Backup::new();
        let _held = put(kind, &backup.images[1]);
        for ended in run_all(&backup, kind) {
            assert!(ended.stdout.len() + ended.stderr.len() > 0);
        }
    }
}

#[test]
fn images_may_have_any_name() {
    let long = format!("INC-1793847700-{}", "x".repeat(240));
    let digits = format!("INC-{}-disk.qcow2", "9".repeat(30));
    let names: [&[u8]; 16] = [
        b"INC-1793847700-\xff\xfe\xfd",
        b"INC-1793847700-a\nb",
        b"INC-1793847700-\x1b[2J\x07\r",
        b"INC-1793847700-..",
        b"INC-1793847700-.",
        b"INC-9223372036854775807-disk.qcow2",
        b"INC-9223372036854775808-disk.qcow2",
        b"INC-253402300800-disk.qcow2",
        b"INC-0-disk.qcow2",
        b"INC--1-disk.qcow2",
        b"FULL-9223372036854775807-disk.qcow2",
        b"FULL-0-disk.qcow2",
        b"COPY-9223372036854775807-disk.qcow2",
        b"INC-1793847700-disk.qcow2.json",
        long.as_bytes(),
        digits.as_bytes(),
    ];
    for name in names {
        let backup = Backup::new();
        fs::copy(&backup.images[3], backup.dir.join(OsStr::from_bytes(name))).unwrap();
        let what = String::from_utf8_lossy(name).into_owned();
        for ended in run_all(&backup, &what) {
            let said = ended.stdout + &ended.stderr;
            assert!(!said.contains(['\x1b', '\x07', '\r']), "{what}: {said}");
        }
    }
    // folders, too
    for folder in [b"backup/\xff\n\x1b[2J".to_vec(), b"backup/2026-99".to_vec(), b"backup/-1".to_vec()] {
        let backup = Backup::named(OsString::from_vec(folder), "disk.qcow2", TIMES);
        run_all(&backup, "a folder");
    }
}

/// Tells whether somebody opened a file.
struct Watch(std::os::fd::OwnedFd);

impl Watch {
    fn on(path: &Path) -> Self {
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, path, inotify::WatchFlags::OPEN | inotify::WatchFlags::ACCESS).unwrap();
        Self(watch)
    }

    fn was_opened(&self) -> bool {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 1024];
        inotify::Reader::new(&self.0, &mut buffer).next().is_ok()
    }
}

#[test]
fn a_file_that_is_watched_is_seen_to_be_opened() {
    let backup = Backup::new();
    let watch = Watch::on(&backup.images[0]);
    assert!(!watch.was_opened());
    for ended in run_all(&backup, "nothing is wrong") {
        ended.with(0);
    }
    assert!(watch.was_opened());
}

/// Writes a backing name as it is into an image that has room for it.
fn set_backing(image: &Path, backing: &str) {
    let mut bytes = fs::read(image).unwrap();
    let at = 4096_usize;
    bytes[8..16].copy_from_slice(&(at as u64).to_be_bytes());
    bytes[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
    bytes[at..at + backing.len()].copy_from_slice(backing.as_bytes());
    fs::write(image, bytes).unwrap();
}

#[test]
fn files_that_images_name_are_not_opened() {
    for number in [0, 1, 3] {
        let backup = Backup::new();
        let original = fs::read(&backup.images[number]).unwrap();
        let (elsewhere, fifo) = (backup.path("elsewhere"), backup.path("fifo"));
        fs::create_dir(&elsewhere).unwrap();
        // under the very name of the image that is meant
        let canary = elsewhere.join(backup.images[number.saturating_sub(1)].file_name().unwrap());
        fs::copy(&backup.images[0], &canary).unwrap();
        put("fifo", &fifo);
        let watch = Watch::on(&canary);
        let (path, own) = (canary.to_str().unwrap(), name(&backup.images[number]));
        let names = [
            path.to_owned(),
            own.clone(),
            format!("./{own}"),
            fifo.to_str().unwrap().to_owned(),
            format!("file:{path}"),
            format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":{path:?}}}}}"),
            "json:{".to_owned(),
            format!("json:{}", "[".repeat(1000)),
            "nbd://127.0.0.1:1/x".to_owned(),
            "/etc/passwd".to_owned(),
            "/dev/zero".to_owned(),
            "../".repeat(300),
            "x".repeat(1023),
            "a\n\u{1b}[2J".to_owned(),
        ];
        for name in names {
            set_backing(&backup.images[number], &name);
            let said = run_all(&backup, &name);
            assert!(!watch.was_opened(), "{name}");
            let merged = &said[2];
            // the last part of a name is all that counts of it, also where options tell it
            let tells = |name: &str| Path::new(name).file_name() == canary.file_name();
            let is_right = number > 0 && (tells(&name) || name.starts_with("json:") && name.contains(path));
            assert_eq!(merged.code == Some(0), is_right, "{name}: {merged:#?}");
        }
        fs::write(&backup.images[number], original).unwrap();
        for ended in run_all(&backup, "it is as it was") {
            ended.with(0);
        }
    }
}
