//! What a FULL keeps around what changes is right before anything is written to it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::program::Ended;
use crate::support::{sparse, tools};

/// A folder with a FULL, and one or more INCs on top.
struct Chain(TempDir);

impl Chain {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, options: &str, size: &str, writes: &[&str]) {
        tools::run(
            tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(self.path(name)).arg(size),
        );
        for write in writes {
            tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", write]).arg(self.path(name)));
        }
    }

    fn run(&self, words: &[&str]) -> Ended {
        let dir = self.0.path().to_str().unwrap();
        Ended::run([&words[..1], &["--dir", dir], &words[1..]].concat())
    }

    /// A command that refuses, and changes nothing.
    fn refuses(&self, command: &str, says: &str) {
        let before = sparse::fingerprints(self.0.path());
        for words in [&[command][..], &[command, "--skip-check"]] {
            self.run(words).with(4).says(says).says("nothing was changed");
            let mut after = sparse::fingerprints(self.0.path());
            // the lock of the folder stays
            after.retain(|name, _| before.contains_key(name));
            assert_eq!(after, before, "{words:?}");
        }
    }
}

/// The entry of a guest cluster in the first L2 table: its place in the file, and what it says.
fn entry(image: &Path, cluster: u64) -> (u64, u64) {
    let file = File::open(image).unwrap();
    let number = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2 = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    (l2 + 8 * cluster, number(l2 + 8 * cluster))
}

fn overwrite(image: &Path, offset: u64, bytes: &[u8]) {
    File::options().write(true).open(image).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn what_cannot_be_inflated_is_found_before_the_full_is_a_mixture() {
    let text: Vec<u8> =
        (0..1_081_344_u32).map(|at| b"a text that can be deflated"[at as usize * at as usize % 27]).collect();
    // the last cluster, as the disk grows, one of which a small cluster changes a part, and one that changes whole, in two
    for (cluster, options, size, writes) in [
        (16, "cluster_size=64k", "2M", &["write -q -P 2 0 64k"][..]),
        (3, "cluster_size=4k", "1081344", &["write -q -P 2 200k 4k"]),
        (3, "cluster_size=4k", "1081344", &["write -q -P 2 192k 32k", "write -q -z 224k 32k"]),
    ] {
        for command in ["commit", "snapshotrebase"] {
            let chain = Chain::new();
            let (raw, full) = (chain.path("raw"), chain.path("FULL-100-d"));
            fs::write(&raw, &text).unwrap();
            tools::run(tools::qemu_img().args(["convert", "-c", "-f", "raw", "-O", "qcow2"]).args([&raw, &full]));
            fs::remove_file(raw).unwrap();
            let (_, compressed) = entry(&full, cluster);
            overwrite(&full, (compressed & ((1 << 54) - 1)) + 3, &[0xff; 8]);
            chain.create("INC-200-d", options, size, writes);
            chain.refuses(command, "FULL-100-d");
        }
    }
}

#[test]
fn damage_that_would_be_copied_does_not_get_checksums_that_fit() {
    for (command, snapshot) in [("snapshotrebase", false), ("commit", true)] {
        for damages_table in [true, false] {
            let chain = Chain::new();
            let full = chain.path("FULL-100-d");
            chain.create("FULL-100-d", "cluster_size=64k", "1M", &["write -q -P 1 0 1M"]);
            if snapshot {
                tools::run(tools::qemu_img().args(["snapshot", "-c", "user"]).arg(&full));
            }
            chain.create("INC-200-d", "cluster_size=4k", "1M", &["write -q -P 2 0 4k"]);
            chain.run(&["manifest"]).with(0);
            if damages_table {
                // one bit: all of a cluster is zeroes
                let (place, says) = entry(&full, 8);
                overwrite(&full, place, &(says | 1).to_be_bytes());
            } else {
                let (_, says) = entry(&full, 0);
                overwrite(&full, (says & 0x00ff_ffff_ffff_fe00) + 0x8000, &[3]);
            }
            chain.refuses(command, "does not fit its checksum");
            chain.run(&["verify"]).with(4);
        }
    }
}

#[test]
fn damage_in_what_changes_whole_does_not_matter() {
    let chain = Chain::new();
    let full = chain.path("FULL-100-d");
    chain.create("FULL-100-d", "cluster_size=64k", "1M", &["write -q -P 1 0 1M"]);
    chain.create("INC-200-d", "cluster_size=4k", "1M", &["write -q -P 2 0 64k"]);
    chain.run(&["manifest"]).with(0);
    let (_, says) = entry(&full, 0);
    overwrite(&full, (says & 0x00ff_ffff_ffff_fe00) + 0x8000, &[3]);
    chain.run(&["commit"]).with(0);
    chain.run(&["verify"]).with(0);
}
