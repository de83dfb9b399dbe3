//! The outside judges: `qemu-img` first, imago second, and models of a few lines third.
//!
//! Everything here looks at the programs from outside, over files. [`random_chain`] makes backup folders by a seed,
//! [`oracle`] says what QEMU makes of them, [`disk`] is the model that says whether QEMU is asked the right way.
//!
//! - `QMPBACKUP_SEEDS=17..18` runs these seeds only, to see one failure again.
//! - `QMPBACKUP_LONG=1` runs many more than the usual ones.
//! - `QMPBACKUP_KEEP=1` leaves the folder of a failing chain in place.
//! - `QMPBACKUP_TEST_QEMU=DIR` names a folder with `qemu-img` and `qemu-io`; see [`tools`].

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "in a test these are how a failure is reported, and helpers outside of #[test] are tests too"
)]

mod architecture;
mod atomic;
mod bitmaps_kept;
mod boot;
mod by_hand;
mod by_hand_in_place;
mod check;
mod cli_backup_words;
mod cli_commit;
mod cli_commit_full;
mod cli_commit_half;
mod cli_commit_kill;
mod cli_commit_refused;
mod cli_commit_sums;
mod cli_filter;
mod cli_hostile;
mod cli_log_file;
mod cli_manifest;
mod cli_merge;
mod cli_qmprebase;
mod cli_rebase;
mod cli_salvage;
mod cli_signals;
mod cli_snapshotrebase;
mod cli_stdout;
mod cli_verify;
mod cli_words;
mod commit_crash;
mod commit_random;
mod commit_resume;
mod compressed;
mod corpus;
mod disk;
mod edited;
#[cfg(target_arch = "x86_64")]
mod faults;
mod header_crash;
mod holes;
mod hostile_folder;
mod imago_judge;
mod in_place;
mod layer;
mod library;
mod limits;
mod live;
mod locate;
mod malformed;
mod merge;
mod merge_random;
mod oracle;
mod outputs;
mod pokes;
mod prng;
mod program;
mod qmp_live;
mod random_chain;
mod raw_chain;
mod rebase_random;
mod recorder;
mod repair;
mod resized;
mod salvage_damage;
mod salvage_random;
mod seeds;
mod small_disk;
mod snapshots;
mod sparse;
mod sums;
mod tools;
mod unreadable;
mod verify;
mod verify_due;
mod whole_crash;
mod world;
mod writer_backing;
mod writer_base;
mod writer_crash;
mod writer_hostile;
mod writer_ops;
mod writer_random;
mod writer_whole;
