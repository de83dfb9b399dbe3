//! What several commands say of folders, images and times.

use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::chain::{self, Fault, FolderLock, Inventory, discover};
use crate::cli::console::Console;
use crate::cli::failure::Failure;
use crate::restore;
use crate::storage;

/// How often backups are looked at that somebody changes at the same time.
const LOOKS: usize = 4;

/// Says what was left out of the disks that are meant.
pub(super) fn warn(inventory: &Inventory, filter: Option<&str>, console: &Console) -> Result<(), Failure> {
    inventory.notes_of(filter)?.into_iter().for_each(|note| console.warning(&note.to_string()));
    Ok(())
}

/// Finds backups and does something with them: again where that fails and somebody has changed them meanwhile.
pub(super) fn with_current<T>(
    dir: &Path,
    mut work: impl FnMut(&Inventory) -> Result<T, Failure>,
) -> Result<(Inventory, Result<T, Failure>), Failure> {
    let mut left = LOOKS;
    loop {
        let inventory = discover(dir)?;
        let done = work(&inventory);
        left -= 1;
        if done.is_ok() || left == 0 || inventory.is_current() {
            return Ok((inventory, done));
        }
    }
}

/// Why a restore point cannot be had.
pub(super) fn not_selected(error: chain::Error) -> Failure {
    match &error {
        chain::Error::Broken { path, fault } if !matches!(fault, Fault::NoFull | Fault::SameTime(..)) => {
            let path = path.clone();
            unless_at_work(error.into(), &path)
        }
        _ => error.into(),
    }
}

/// Why images that were there a moment ago cannot be used: somebody may have begun to work on them.
pub(super) fn not_opened(failure: Failure, newest: &Path) -> Failure {
    match failure {
        Failure::Restore(
            restore::Error::Changed | restore::Error::Overwritten { .. } | restore::Error::Gone { .. },
        ) => unless_at_work(failure, newest),
        _ => failure,
    }
}

/// The failure, or that somebody works in the folder of an image now, which may be why.
fn unless_at_work(failure: Failure, image: &Path) -> Failure {
    let held = FolderLock::held_in(storage::parent(image));
    held.map_or(failure, |path| chain::Error::Locked { path }.into())
}

/// A restore point's time in the local zone.
pub(super) fn local_time(time: Option<i64>) -> String {
    match time.map(Timestamp::from_second) {
        Some(Ok(time)) => time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Some(Err(_)) => "outside the calendar".to_owned(),
        None => "unknown".to_owned(),
    }
}

/// The same for machines.
pub(super) fn rfc3339(time: Option<i64>) -> Option<String> {
    time.and_then(|time| Timestamp::from_second(time).ok()).map(|time| time.to_string())
}
