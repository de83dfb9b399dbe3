//! The outside judges: `qemu-img` first, imago second, and models of a few lines third.
//!
//! Everything here looks at the programs from outside, over files. [`random_chain`](support::random_chain) makes backup folders by a seed,
//! [`oracle`](support::oracle) says what QEMU makes of them, [`disk`](support::disk) is the model that says whether QEMU is asked the right way.
//!
//! - `QMPBACKUP_SEEDS=17..18` runs these seeds only, to see one failure again.
//! - `QMPBACKUP_LONG=1` runs many more than the usual ones.
//! - `QMPBACKUP_KEEP=1` leaves the folder of a failing chain in place.
//! - `QMPBACKUP_TEST_QEMU=DIR` names a folder with `qemu-img` and `qemu-io`; see [`tools`](support::tools).

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "in a test these are how a failure is reported, and helpers outside of #[test] are tests too"
)]

mod architecture;
mod arguments;
mod atomic;
mod bitmaps_kept;
mod boot;
mod by_hand;
mod by_hand_in_place;
mod check;
mod cli;
mod commit_crash;
mod commit_random;
mod commit_resume;
mod compressed;
mod corpus;
#[cfg(target_arch = "x86_64")]
mod faults;
mod header_crash;
mod holes;
mod hostile_folder;
mod imago_judge;
mod library;
mod limits;
mod live;
mod locate;
mod malformed;
mod merge_random;
mod outputs;
mod pokes;
mod qmp_live;
mod raw_chain;
mod rebase_random;
mod repair;
mod resized;
mod salvage_random;
mod snapshots;
mod support;
mod unreadable;
mod verify;
mod verify_due;
mod whole_crash;
mod writer;
