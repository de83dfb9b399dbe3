//! The programs that the tests run. Each either does what it was told or ends the test with all that it said.
//!
//! `qemu-img` and `qemu-io` are looked for in the folder `$QMPBACKUP_TEST_QEMU`, then in `PATH` if QEMU is at least 10
//! there, then in `${QMPBACKUP_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qmpbackup-tests}/qemu/10.0`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// What the tests were written against; older ones know neither all options nor all fixes.
const OLDEST_MAJOR: u32 = 10;

pub(crate) fn qemu_img() -> Command {
    tool("qemu-img")
}

pub(crate) fn qemu_io() -> Command {
    tool("qemu-io")
}

/// Runs a command that must succeed, and returns what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{}", told(command, &output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command, whatever becomes of it.
pub(crate) fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{}: {error}", line(command)))
}

/// All there is to say about a command that ran.
pub(crate) fn told(command: &Command, output: &Output) -> String {
    format!(
        "{}\n{}\nstdout: {}\nstderr: {}",
        line(command),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quoted(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

pub(crate) fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=,:+".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn tool(name: &str) -> Command {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    match FOLDER.get_or_init(folder) {
        Some(folder) => Command::new(folder.join(name)),
        None => Command::new(name),
    }
}

/// Where QEMU's tools are; `None` for `PATH`.
fn folder() -> Option<PathBuf> {
    if let Some(asked) = std::env::var_os("QMPBACKUP_TEST_QEMU") {
        return Some(asked.into());
    }
    if major(Path::new("qemu-img")).is_some_and(|major| major >= OLDEST_MAJOR) {
        return None;
    }
    let cached = cache().join("qemu/10.0");
    assert!(
        major(&cached.join("qemu-img")).is_some(),
        "no qemu-img of QEMU {OLDEST_MAJOR} or later in PATH, nor in {}, and QMPBACKUP_TEST_QEMU is not set",
        cached.display()
    );
    Some(cached)
}

/// The `qemu-img` of a release, as `tests/setup/qemu` has unpacked it.
pub(crate) fn qemu_img_of(release: &str) -> Command {
    of_release(release, "qemu-img")
}

/// The `qemu-io` of a release.
pub(crate) fn qemu_io_of(release: &str) -> Command {
    of_release(release, "qemu-io")
}

/// The `qemu-nbd` of a release.
pub(crate) fn qemu_nbd_of(release: &str) -> Command {
    of_release(release, "qemu-nbd")
}

/// The `qemu-system-x86_64` of a release.
pub(crate) fn qemu_system_of(release: &str) -> Command {
    of_release(release, "qemu-system-x86_64")
}

fn of_release(release: &str, name: &str) -> Command {
    Command::new(cache().join("qemu").join(release).join(name))
}

/// A file of the Linux guest that `tests/setup/guest` has made: `vmlinuz` or `initramfs`.
pub(crate) fn guest_file(name: &str) -> PathBuf {
    cache().join("guest").join(name)
}

/// A program for ext4 that `tests/setup/tools` has unpacked: `mkfs.ext4`, `e2fsck` or `debugfs`.
pub(crate) fn e2fs(name: &str) -> Command {
    Command::new(cache().join("bin").join(name))
}

fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    set("QMPBACKUP_TEST_CACHE").unwrap_or_else(|| {
        let caches = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        caches.unwrap_or_default().join("qmpbackup-tests")
    })
}

fn major(qemu_img: &Path) -> Option<u32> {
    let output = Command::new(qemu_img).arg("--version").output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    said.strip_prefix("qemu-img version ")?.split('.').next()?.parse().ok()
}

#[test]
fn a_command_is_shown_as_one_would_type_it() {
    let mut command = Command::new("qemu-io");
    command.args(["-c", "write -P 1 0 64k", "it's", "--", ""]);
    assert_eq!(line(&command), r"qemu-io -c 'write -P 1 0 64k' 'it'\''s' -- ''");
}

#[test]
#[should_panic(expected = "No such file or directory")]
fn a_command_that_fails_ends_the_test_with_what_it_said() {
    run(qemu_img().args(["info", "/nowhere/at all"]));
}
