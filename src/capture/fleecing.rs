//! Which disks keep their moment in a fleece image, and where it goes. Nothing is made here.

use std::path::{Path, PathBuf};

use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::capture::folder::files;
use crate::capture::folder::place::Place;
use crate::capture::folder::target;
use crate::capture::machine::Machine;
use crate::capture::machine::abilities;
use crate::capture::machine::device::Device;
use crate::capture::plan::{self, FleeceImage};
use crate::capture::request::{Fleece, Request};
use crate::chain::{FLEECE, Level};

/// Where fleece images go, or why there are none.
pub(super) struct Fleecing<'a> {
    wanted: &'a Fleece,
    target: &'a Path,
    cwd: Option<PathBuf>,
}

impl<'a> Fleecing<'a> {
    pub(super) fn new(machine: &Machine<'_>, request: &'a Request, target: &'a Path) -> Self {
        let able = abilities::can_fleece(&machine.features);
        if !able && request.fleece != Fleece::Off {
            let reason = "this QEMU has none to trust; writes of the guest wait for the target, and fail if it is full"
                .to_owned();
            machine.tell(&Event::NoFleece { disk: None, reason });
        }
        Self { wanted: if able { &request.fleece } else { &Fleece::Off }, target, cwd: machine.cwd() }
    }

    /// Where the moment of a disk is kept, if it gets a fleece image.
    pub(super) async fn image(
        &self,
        machine: &Machine<'_>,
        device: &Device,
        place: &Place,
        level: Level,
        time: i64,
    ) -> Result<Option<FleeceImage>, Error> {
        if device.read_only {
            // its disk is as it was as long as the job runs
            return Ok(None);
        }
        let named = match self.wanted {
            Fleece::Off => return Ok(None),
            Fleece::In(folder) => Some(std::path::absolute(folder).unwrap_or_else(|_| folder.clone())),
            Fleece::BesideDisk => self.beside(device),
        };
        let none = |reason: &str| {
            machine.tell(&Event::NoFleece { disk: Some(place.disk.clone()), reason: reason.to_owned() });
            Ok(None)
        };
        let Some(qdev) = device.qdev.clone() else { return none("no device of the machine reads it") };
        if device.shared {
            // the filter would see what one of them writes
            return none("more than one device or export writes to it");
        }
        // a slash in its id is one in its path
        match machine.monitor.execute(&plan::property(&qdev, "drive")).await {
            Ok(_) => {}
            Err(error) if error.refused().is_some() => return none("QEMU does not find the device that reads it"),
            Err(error) => return Err(error.into()),
        }
        let folder = named.unwrap_or_else(|| {
            let (disk, folder) = (place.disk.clone(), self.target.to_owned());
            machine.tell(&Event::FleeceInTarget { disk, folder: folder.clone() });
            folder
        });
        // a name that nobody can guess, since the folder may be one that others write to
        let name = format!("{level}-{time}-{}-{}{}", beginning(&place.disk), target::new_id()?, FLEECE);
        Ok(Some(FleeceImage { qdev, file: files::utf8(folder.join(name))? }))
    }

    /// The folder of the disk's file, where it is a file in a folder that is known.
    fn beside(&self, device: &Device) -> Option<PathBuf> {
        let file = device.absolute(self.cwd.as_deref()).and_then(|file| file.canonicalize().ok());
        let regular = file.filter(|file| file.is_file());
        regular.and_then(|file| file.parent().map(Path::to_owned))
    }
}

/// So much of a disk's name that there is room for the rest of a file name.
fn beginning(disk: &str) -> &str {
    const BYTES: usize = 100;
    let end = disk.char_indices().map(|(at, letter)| at + letter.len_utf8()).take_while(|end| *end <= BYTES).last();
    disk.get(..end.unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_between_letters() {
        assert_eq!((beginning(""), beginning("disk")), ("", "disk"));
        assert_eq!(beginning(&"ö".repeat(60)), "ö".repeat(50));
        assert_eq!(beginning(&format!("x{}", "ö".repeat(60))), format!("x{}", "ö".repeat(49)));
    }
}
