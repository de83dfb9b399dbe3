//! The programs as a user runs them, over files alone.

pub(crate) mod backup_words;
pub(crate) mod commit;
pub(crate) mod commit_full;
pub(crate) mod commit_half;
pub(crate) mod commit_kept;
pub(crate) mod commit_kill;
pub(crate) mod commit_next;
pub(crate) mod commit_refused;
pub(crate) mod commit_sums;
pub(crate) mod filter;
pub(crate) mod hostile;
pub(crate) mod log_file;
pub(crate) mod manifest;
pub(crate) mod members;
mod merge;
pub(crate) mod qmprebase;
pub(crate) mod rebase;
pub(crate) mod repair_sums;
pub(crate) mod salvage;
mod salvage_known;
pub(crate) mod signals;
pub(crate) mod snapshotrebase;
pub(crate) mod stdout;
pub(crate) mod verify;
pub(crate) mod words;
