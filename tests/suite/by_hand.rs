//! The commands that a dry run prints make the same disk, in any shell, with any names.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use crate::support::oracle::{Oracle, convert};
use crate::support::program::{Backup, Ended, TIMES, event, qmprestore, rude_name};
use crate::support::random_chain::Chain;
use crate::support::seeds::Told;
use crate::support::{sparse, tools};

/// Runs commands with a shell that finds this qemu-img, and `qmprestore`.
pub(crate) fn shell(commands: &str, folder: &Path, qemu_img: &Command) {
    let qmprestore = Path::new(env!("CARGO_BIN_EXE_qmprestore")).parent();
    let qemu_img = Path::new(qemu_img.get_program()).parent().filter(|parent| parent.is_absolute());
    let mut shell = Command::new("sh");
    shell
        .args(["-e", "-c", commands])
        .current_dir(folder)
        .env("PATH", path_with(qemu_img.into_iter().chain(qmprestore)));
    tools::run(&mut shell);
}

/// The search path with these folders before the others.
pub(crate) fn path_with<'a>(folders: impl Iterator<Item = &'a Path>) -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(folders.map(Path::to_owned).chain(std::env::split_paths(&path))).unwrap()
}

/// The commands as the text of a dry run has them.
pub(crate) fn commands(ended: &Ended) -> String {
    let (_, commands) = ended.stdout.split_once("the same by hand\n").unwrap_or_else(|| panic!("{ended:?}"));
    commands.to_owned()
}

fn names() -> Vec<(OsString, &'static str)> {
    let names = ["disk.qcow2", "it's \"my\" disk, größe=1 $HOME `x`\\.img", "-rf", "json:a"];
    let names = names.into_iter().map(OsString::from).chain([rude_name()]);
    let options = ["", "--format=raw", "--compress", "--compress=zstd", "--cluster-size=128K"];
    names.zip(options).collect()
}

#[test]
fn printed_commands_make_the_same_disk_whatever_the_names_are() {
    for (name, option) in names() {
        let backup = Backup::named(Path::new("backup").join(&name), &name, TIMES);
        let before = sparse::fingerprints(&backup.dir);
        let folder = backup.root.path().join("work ing");
        std::fs::create_dir(&folder).unwrap();
        let mut out = OsString::from("out:");
        out.push(&name);
        for dir in [backup.dir.clone(), Path::new("../backup").join(&name)] {
            let mut command = qmprestore(["merge", "--dry-run", "--dir"]);
            command.arg(dir).arg("--out").arg(&out).args(Some(option).filter(|option| !option.is_empty()));
            let ended = Ended::of(command.current_dir(&folder)).with(0);
            shell(&commands(&ended), &folder, &tools::qemu_img());
            let made: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(made, [out.clone()], "{name:?}");
            let made = folder.join(&out);
            let raw = backup.path("raw");
            if option == "--format=raw" {
                std::fs::copy(&made, &raw).unwrap();
            } else {
                convert(&made, &raw);
            }
            sparse::assert_same(&raw, &backup.expected(3), &format!("{name:?} {option}"));
            std::fs::remove_file(made).unwrap();
        }
        assert!(sparse::fingerprints(&backup.dir) == before, "the commands changed the backups");
    }
}

#[test]
fn printed_commands_make_the_same_disk_of_any_chain() {
    for seed in 0..6 {
        let chain = Chain::generate(seed);
        let _told = Told(&chain);
        let oracle = Oracle::new(&chain);
        let last = chain.layers.len() - 1;
        let room = chain.room("by hand");
        let mut command = qmprestore([OsStr::new("merge"), "--dry-run".as_ref(), "--json".as_ref(), "--dir".as_ref()]);
        let ended = Ended::of(command.arg(&chain.dir).args(["--out", "out"])).with(0);
        let plan = event(&ended.events(), "plan").clone();
        let commands: Vec<&str> =
            plan["commands"].as_array().unwrap().iter().filter_map(|word| word.as_str()).collect();
        shell(&commands.join("\n"), &room, &tools::qemu_img());
        convert(&room.join("out"), &room.join("raw"));
        sparse::assert_same(&room.join("raw"), &oracle.raw(&chain, last), "by hand");
    }
}

/// A disk that grows, in a folder that JSON and the shell must quote.
#[test]
fn every_qemu_img_from_5_2_on_knows_the_commands() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("a \"b\", c's");
    std::fs::create_dir(&dir).unwrap();
    for (name, size, write) in [
        ("FULL-1-x", "3M", "write -P 1 0 3M"),
        ("INC-2-x", "4M", "write -z 1M 1M"),
        ("INC-3-x", "4M", "write -P 3 64K 2M"),
    ] {
        let image = dir.join(name);
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(size));
        tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", write]).arg(&image));
    }
    let merge = |out: &str, more: &[&str]| {
        let arguments = ["merge", "--format=raw", "--out", out, "--dir", dir.to_str().unwrap()];
        Ended::of(qmprestore(arguments.iter().chain(more)).current_dir(root.path())).with(0)
    };
    merge("merged", &[]);
    for release in ["5.2", "7.2", "10.0", "11"] {
        let by_hand = commands(&merge(release, &["--dry-run"]));
        shell(&by_hand, root.path(), &tools::qemu_img_of(release));
        sparse::assert_same(&root.path().join(release), &root.path().join("merged"), release);
    }
}

#[test]
fn a_chain_that_is_too_long_for_a_word_is_copied() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("x".repeat(200)).join("y".repeat(200));
    std::fs::create_dir_all(&dir).unwrap();
    let full = dir.join("FULL-1-disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&full).arg("1M"));
    for time in 2..300 {
        std::fs::copy(&full, dir.join(format!("INC-{time}-disk"))).unwrap();
    }
    let list = |more: &[&str]| {
        let arguments = ["merge", "--dry-run", "--out", "out", "--dir", dir.to_str().unwrap()];
        commands(&Ended::run(arguments.iter().chain(more)).with(0))
    };
    assert!(list(&[]).contains("qemu-img rebase -u -f qcow2 -F qcow2 -b 297 \"$scratch/298\""));
    assert!(list(&["--until=INC-20-"]).starts_with("  qemu-img convert -O qcow2 -o cluster_size=65536 'json:{"));
}
