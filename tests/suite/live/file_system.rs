//! Judges of a restored ext4: its own programs. Nothing here knows what a backup is.

use std::collections::BTreeMap;
use std::path::Path;

use crate::support::tools;

/// Fails unless the file system is whole as it is, without its journal.
#[track_caller]
pub(crate) fn assert_clean(raw: &Path) {
    tools::run(tools::e2fs("e2fsck").arg("-fn").arg(raw));
    assert!(!needs_recovery(raw), "{}: its journal was not flushed", raw.display());
}

/// Whether there is something in the journal that is not in its place yet: that is so while it is mounted and not frozen.
pub(crate) fn needs_recovery(raw: &Path) -> bool {
    tools::run(tools::e2fs("debugfs").args(["-R", "show_super_stats -h"]).arg(raw)).contains("needs_recovery")
}

/// All files of the topmost folder, by name.
pub(crate) fn files(raw: &Path) -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("rdump / {}", folder.path().display());
    tools::run(tools::e2fs("debugfs").args(["-R", &script]).arg(raw));
    let entries = std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap);
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    files.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}
