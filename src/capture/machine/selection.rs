//! Which of a machine's drives are backed up.

use crate::capture::machine::device::{Device, Skipped, Why};

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Only the disks that these name; without it, all.
    pub include: Option<Vec<String>>,
    /// None of the disks that these name.
    pub exclude: Vec<String>,
    /// Raw disks, too.
    pub include_raw: bool,
}

/// A drive of the machine, with or without a medium.
#[derive(Debug)]
pub(crate) struct Drive {
    /// A name that the user knows.
    pub(crate) label: String,
    /// All names by which it can be chosen.
    pub(crate) keys: Vec<String>,
    /// Whether it is a CD-ROM or floppy.
    pub(crate) removable: bool,
    /// Whether it is the machine's flash, whose few bytes a machine may not start without.
    pub(crate) is_flash: bool,
    /// The medium.
    pub(crate) disk: Option<Device>,
}

impl Drive {
    fn is_any_of(&self, names: &[String]) -> bool {
        names.iter().any(|name| self.keys.contains(name))
    }
}

impl Selection {
    /// The drive's disk, or why it is left out.
    pub(crate) fn choose(&self, drive: Drive) -> Result<Device, Skipped> {
        let is_named = self.include.as_ref().map(|names| drive.is_any_of(names));
        let is_excluded = drive.is_any_of(&self.exclude);
        let wanted = is_named == Some(true) && !is_excluded;
        let skip = |why| Err(Skipped { name: drive.label.clone(), why, wanted });
        match drive.disk {
            None => skip(Why::Empty),
            // QEMU 5.2 aborts where a job begins on it
            Some(disk) if disk.virtual_size == 0 => skip(Why::Empty),
            Some(_) if drive.removable => skip(Why::Removable),
            Some(_) if is_excluded => skip(Why::Excluded),
            Some(_) if is_named == Some(false) => skip(Why::NotIncluded),
            Some(disk) if disk.format == "raw" && !self.include_raw && !drive.is_flash => skip(Why::Raw),
            Some(disk) => Ok(disk),
        }
    }

    /// What is asked for and names no drive.
    pub(crate) fn unmatched(&self, drives: &[Drive]) -> Vec<String> {
        let mut unmatched: Vec<String> = Vec::new();
        for name in self.include.iter().flatten().chain(&self.exclude) {
            if !unmatched.contains(name) && !drives.iter().any(|drive| drive.keys.contains(name)) {
                unmatched.push(name.clone());
            }
        }
        unmatched
    }
}
