//! What several commands say of folders, images and times.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::chain::{self, Fault, Inventory};
use crate::cli::console::Console;
use crate::cli::failure::Failure;
use crate::restore::{self, Layers, Source};

/// Says what was left out of the disks that are meant.
pub(super) fn warn(inventory: &Inventory, filter: Option<&str>, console: &Console) -> Result<(), Failure> {
    inventory.notes_of(filter)?.into_iter().for_each(|note| console.warning(&note.to_string()));
    Ok(())
}

/// Why a restore point cannot be had. Work in its FULL that has not ended may go on just now.
pub(super) fn not_selected(error: chain::Error) -> Failure {
    if let chain::Error::Broken { path, fault: Fault::Unfinished(unfinished) } = &error {
        let full = Source::new(path.with_file_name(&unfinished.full));
        if let Err(locked @ restore::Error::Locked { .. }) = Layers::open(&[full]) {
            return locked.into();
        }
    }
    error.into()
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
