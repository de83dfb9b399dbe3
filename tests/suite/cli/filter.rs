//! `--filter` of work in place takes a disk by its whole name; elsewhere a part of it will do.

use crate::support::in_place::copy_folder;
use crate::support::program::{Backup, Ended, program, qmprestore};
use crate::support::sparse;

#[test]
fn a_part_of_a_name_is_enough_to_read_a_disk_but_not_to_change_it() {
    let backup = Backup::named("backup/vda-old", "old.qcow2", crate::support::program::TIMES);
    copy_folder(&backup.dir, &backup.path("backup/vdb"));
    let root = backup.path("backup");
    let before = sparse::fingerprints(&root);
    for command in ["commit", "snapshotrebase", "rebase"] {
        for more in [&["--dry-run"][..], &[]] {
            let refused = Ended::of(qmprestore([command, "--filter=vda", "--dir"]).arg(&root).args(more)).with(2);
            refused.says("vda-old").says("whole name").says_not("vdb");
        }
    }
    let mut qmprebase = program(env!("CARGO_BIN_EXE_qmprebase"), ["rebase", "--filter=vda", "--dir"]);
    Ended::of(qmprebase.arg(&root)).with(2).says("vda-old");
    assert!(sparse::fingerprints(&root) == before);
    Ended::of(qmprestore(["commit", "--filter=nothing", "--dir"]).arg(&root)).with(2).says("no disk matches");
    for command in ["list", "verify", "check"] {
        let read = Ended::of(qmprestore([command, "--filter=vda", "--dir"]).arg(&root));
        assert!(matches!(read.code, Some(0 | 3)), "{read:?}");
    }
    Ended::of(qmprestore(["merge", "--filter=vda", "--dir"]).arg(&root).arg("--out").arg(backup.path("out"))).with(0);
    Ended::of(qmprestore(["commit", "--dry-run", "--filter=old", "--dir"]).arg(&backup.dir)).with(0);
    Ended::of(qmprestore(["commit", "--filter=vda-old", "--dir"]).arg(&root)).with(0);
    assert!(!backup.images[1].exists());
}
