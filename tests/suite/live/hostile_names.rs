//! Machines and disks whose names would do something to a terminal: nothing that is said of them does, and no file of theirs
//! is anywhere but in the backup folder.

use std::path::Path;

use super::field_setup::Setup;
use crate::cli::hostile::assert_harmless;
use crate::support::program::{Ended, program};

/// Without what ends a word of the test's own command line.
const NAME: &str = "x\u{1b}]0;owned\u{7}\u{9b}2J\u{7f}\u{202e}\u{61c}\u{feff}y";

#[track_caller]
fn harmless(ended: &Ended) {
    assert_harmless(&ended.stdout);
    assert_harmless(&ended.stderr);
}

#[test]
fn no_name_in_a_machine_does_anything_to_a_terminal_or_leads_out_of_the_folder() {
    let file = format!("{NAME}.qcow2");
    let words = format!("-name {NAME} -blockdev node-name=n,driver=qcow2,file.driver=file,file.filename=@/{file}");
    // without an id, the name of the file is what there is
    let setup = Setup::of("10.0").image(&file, "4M", "").words(&words).words("-device virtio-blk-pci,drive=n");
    let field = setup.disk("plain").start();
    let log = field.vm.path("log");
    let target = field.target.display().to_string();
    let options = format!("--debug -L {} ", log.display());
    for words in [
        "info --show blockdev",
        "info --show bitmaps --json",
        &format!("backup --level full --dry-run --target {target}"),
        &format!("backup --level full --no-subdir --target {target}"),
        &format!("backup --level inc --no-subdir --json --target {target}"),
        &format!("backup --level copy --target {target} --include {NAME}"),
        &format!("recover --target {target}/{NAME}"),
        &format!("backup --level full --target {target} --fleece-dir @/no/{NAME}"),
        "cleanup --remove-bitmap --json",
    ] {
        let ended = field.run(&format!("{options}{words}"));
        harmless(&ended);
        let may_fail = ["--include", "recover", "--fleece-dir"].iter().any(|word| words.contains(word));
        assert!(may_fail || ended.code == Some(0), "{words}: {ended:#?}");
    }
    assert_harmless(&std::fs::read_to_string(&log).unwrap());
    let restore = env!("CARGO_BIN_EXE_qmprestore");
    // what is changed is named as a whole
    let disk = "x_]0;owned__2J_\u{202e}\u{61c}\u{feff}y.qcow2";
    for words in [&["list"][..], &["check"], &["commit", "--dry-run", "--filter", disk]] {
        let ended = Ended::of(program(restore, words).arg("--dir").arg(Path::new(&target))).with(0);
        harmless(&ended);
    }
    let names =
        std::fs::read_dir(&field.target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: Vec<String> = names.filter(|name| name.starts_with("FULL-") || name.starts_with("INC-")).collect();
    assert!(names.len() == 4 && !names.iter().any(|name| name.contains(char::is_control)), "{names:?}");
}
