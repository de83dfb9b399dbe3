//! `qmprebase rebase`: what the oldest users know, in the words that they know.

use crate::by_hand::shell;
use crate::support::in_place::assert_sound;
use crate::support::program::{Backup, Ended, program};
use crate::support::{sparse, tools};

fn qmprebase(backup: &Backup, words: &[&str]) -> Ended {
    let at = words.iter().position(|word| *word == "rebase").unwrap();
    let (before, after) = words.split_at(at + 1);
    let mut command = program(env!("CARGO_BIN_EXE_qmprebase"), before);
    Ended::of(command.arg("--dir").arg(&backup.dir).args(after))
}

/// The messages of log lines at `INFO`, without their times.
#[track_caller]
fn infos(ended: &Ended) -> Vec<&str> {
    assert_eq!(ended.stdout, "");
    ended.stderr.lines().filter_map(|line| line.split_once("INFO  ")).map(|(_, message)| message).collect()
}

const END: [&str; 2] =
    ["Rollback of latest [FULL]<-[INC] chain complete, ignoring older chains", "Image files rollback successful."];

#[test]
fn a_dry_run_says_which_commands_do_the_same_and_that_is_right() {
    for (until, last) in [(None, 3), (Some("INC-1793761200"), 2), (Some("INC-1793761200-disk.qcow2"), 2)] {
        let backup = Backup::new();
        let before = sparse::fingerprints(backup.root.path());
        let until: Vec<&str> = until.into_iter().flat_map(|until| ["--until", until]).collect();
        let ended = qmprebase(&backup, &[&["rebase", "--dry-run"], &until[..]].concat()).with(0);
        ended.clone().says_not("Rollback").says_not("successful");
        assert_eq!(sparse::fingerprints(backup.root.path()), before);
        let infos = infos(&ended);
        assert!(infos[0].starts_with(concat!("Version: ", env!("CARGO_PKG_VERSION"))), "{infos:?}");
        assert_eq!(infos[1], "Dry run activated, not applying any changes");
        let skipped = |image: &std::path::PathBuf| {
            format!("Skipping checkpoint: {} as requested with --until option", image.display())
        };
        let skipped: Vec<String> = backup.images[last + 1..].iter().rev().map(skipped).collect();
        let commands = &infos[2 + skipped.len()..];
        assert_eq!(infos[2..2 + skipped.len()], skipped);

        let expected = backup.expected(last);
        shell(&commands.join("\n"), backup.root.path(), &tools::qemu_img());
        backup.assert_holds(last, &expected);
    }
}

#[test]
fn the_chain_is_rolled_into_the_full() {
    let backup = Backup::new();
    let expected = [backup.expected(1), backup.expected(3)];
    let ended = qmprebase(&backup, &["--debug", "rebase", "--until", "INC-1793674800"]).with(0).says("DEBUG");
    backup.assert_holds(1, &expected[0]);
    let said = infos(&ended);
    assert!(said[0].starts_with("Version: "), "{said:?}");
    assert!(said.iter().all(|line| !line.contains("Dry run")), "{said:?}");
    assert_eq!(said[said.len() - 2..], END);
    let ended = qmprebase(&backup, &["rebase", "--debug"]).with(0).says("DEBUG");
    assert_eq!(infos(&ended)[infos(&ended).len() - 2..], END);
    backup.assert_holds(3, &expected[1]);
    assert_sound(&backup.images[0], false);
    qmprebase(&backup, &["rebase"]).with(2).says("there is nothing to commit").says_not(END[1]);
    qmprebase(&backup, &["rebase", "--filter=other"]).with(2).says_not(END[1]);
}

#[test]
fn what_is_refused_is_not_called_successful() {
    let backup = Backup::new();
    backup.set_header_refcount(2, 0);
    let before = backup.files();
    for words in [&["rebase"][..], &["rebase", "--dry-run"]] {
        qmprebase(&backup, words).with(4).says("nothing was changed").says_not("Rollback");
    }
    assert_eq!(backup.files(), before);
    for word in ["--help", "--version"] {
        Ended::of(&mut program(env!("CARGO_BIN_EXE_qmprebase"), [word])).with(0).says("qmprebase");
    }
}
