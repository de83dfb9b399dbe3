//! What the backup folder already holds of a disk.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::Error;
use crate::chain::{self, Image, Level, discover};
use crate::qcow2;
use crate::storage::FileStorage;

/// What there is of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct History {
    /// The newest FULL or INC.
    pub(super) newest: Option<Newest>,
    /// What a failed run of another tool has left since the newest FULL: changes may be in it and in no bitmap.
    pub(super) partial: Option<PathBuf>,
    /// The latest time of any image, whatever its level.
    pub(super) latest: Option<i64>,
    /// All FULLs and INCs that are not in folders of other months, in the order in which they were made.
    pub(super) chained: Vec<Arc<Image>>,
}

/// The image that an INC would build on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Newest {
    /// Where it is.
    pub(super) path: PathBuf,
    /// The time of its restore point; unknown where neither its name nor its manifest has one.
    pub(super) time: Option<i64>,
    /// The size of the disk in it; unknown where it cannot be read.
    pub(super) size: Option<u64>,
    /// Why no INC may build on it.
    pub(super) fault: Option<String>,
}

impl History {
    /// The time of the newest image; the earliest there is, where it has none.
    pub(super) fn since(&self) -> Option<i64> {
        self.newest.as_ref().map(|newest| newest.time.unwrap_or(i64::MIN))
    }

    /// Makes sure that an image whose name has no time costs no restore point, neither what it replaces nor by its place:
    /// such a FULL stands before all images with a time.
    pub(super) fn allows_timeless(&self, image: &Path, level: Level) -> Result<(), Error> {
        let path = || image.to_owned();
        if level == Level::Copy {
            let is_full = self.chained.iter().any(|chained| chained.path == image);
            return if is_full { Err(Error::Replaces { path: path() }) } else { Ok(()) };
        }
        let others = || self.chained.iter().filter(|chained| chained.path != image);
        if let Some(full) = others().find(|other| other.level == Level::Full) {
            return Err(Error::Timeless { path: path(), before: full.display_name() });
        }
        if others().next().is_some() { Err(Error::Replaces { path: path() }) } else { Ok(()) }
    }

    /// Looks into the folder of a disk.
    pub(super) fn read(folder: &Path, base: &str) -> Result<Self, Error> {
        match folder.metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Ok(Self::default()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            // what cannot be seen may be there
            Err(source) => return Err(Error::Io { path: folder.to_owned(), source }),
        }
        let inventory = discover(folder)?;
        let mut disks: Vec<&chain::Disk> = inventory.disks.iter().collect();
        let own = |disk: &&chain::Disk| disk.name() == Some(OsStr::new(base));
        if let Some(only) = disks.iter().copied().find(own) {
            disks = vec![only];
        } else {
            // the oldest names do not tell the disk
            disks.retain(|disk| disk.name().is_none());
        }
        let Some(disk) = disks.first() else { return Ok(Self::default()) };
        // those of other months, if there are folders of months here
        let here = |image: &&Arc<Image>| image.path.parent() == Some(folder);
        let latest = disk.images().iter().filter(here).filter_map(|image| image.time).max();
        let chained: Vec<Arc<Image>> =
            disk.images().iter().filter(here).filter(|image| image.level != Level::Copy).cloned().collect();
        let Some(newest) = chained.last() else {
            return Ok(Self { latest, ..Self::default() });
        };
        let full = chained.iter().rfind(|image| image.level == Level::Full);
        // not the moment that it holds: INCs that were written into it since may lack what is in the partial
        let since = full.and_then(|full| full.named);
        let partials = disk.partials().iter().filter(here).filter(|partial| partial.level != Level::Copy);
        let partial = partials.into_iter().find(|partial| partial.time.is_none() || partial.time >= since);
        let state = disk.points().iter().find(|point| point.image().path == newest.path).map(chain::Point::state);
        let fault = match state {
            Some(chain::State::Broken(chain::Fault::NoFull)) => {
                Some("the newest image has no FULL before it".to_owned())
            }
            // what cannot be read may say anything
            Some(chain::State::Broken(chain::Fault::JournalUnread { path, reason })) => {
                return Err(chain::Error::JournalUnread { path: path.clone(), reason: reason.clone() }.into());
            }
            Some(chain::State::Broken(fault)) => Some(fault.to_string()),
            Some(chain::State::Doubtful(doubt)) => Some(doubt.to_string()),
            Some(chain::State::Sound) | None => None,
        };
        let size = size(newest);
        let fault = fault.or_else(|| size.is_none().then(|| "the newest image cannot be read".to_owned()));
        Ok(Self {
            newest: Some(Newest { path: newest.path.clone(), time: newest.time, size, fault }),
            partial: partial.map(|partial| partial.path.clone()),
            latest,
            chained,
        })
    }
}

/// The size of the disk in an image.
fn size(image: &Image) -> Option<u64> {
    let storage = FileStorage::open(&image.path).ok()?;
    match image.format {
        chain::FormatHint::Raw => Some(crate::storage::Storage::length(&storage)),
        chain::FormatHint::Qcow2 | chain::FormatHint::Unknown => {
            qcow2::Header::read(&storage).ok().map(|header| header.size)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::ErrorKind;
    use crate::chain::{FormatHint, Manifest, Phase, Unfinished, Work};

    #[test]
    fn an_image_without_a_time_is_there_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(History::read(folder.path(), "disk.qcow2").unwrap().since(), None);
        std::fs::write(folder.path().join("disk.qcow2"), "").unwrap();
        std::os::unix::fs::symlink("disk.qcow2", folder.path().join("FULL-disk.qcow2")).unwrap();
        assert_eq!(History::read(folder.path(), "disk.qcow2").unwrap().since(), Some(i64::MIN));
        std::fs::write(folder.path().join("INC-7-disk.qcow2"), "").unwrap();
        assert_eq!(History::read(folder.path(), "disk.qcow2").unwrap().since(), Some(7));
    }

    #[test]
    fn a_full_that_incs_were_written_into_is_of_the_moment_that_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("FULL-5-disk");
        std::fs::write(&full, "").unwrap();
        let manifest = Manifest {
            image: String::new(),
            id: None,
            parent_id: None,
            bitmap: None,
            format: FormatHint::Qcow2,
            level: Level::Full,
            time: Some(9),
            chain: Some("c".to_owned()),
            parent: None,
            virtual_size: 0,
            qemu: String::new(),
        };
        manifest.write(&full).unwrap();
        let history = History::read(folder.path(), "disk").unwrap();
        assert_eq!((history.since(), history.latest), (Some(9), Some(9)));
        // what a failed run has left between them is in neither
        std::fs::write(folder.path().join("INC-7-disk.partial"), "").unwrap();
        assert!(History::read(folder.path(), "disk").unwrap().partial.is_some());
    }

    #[test]
    fn nothing_is_built_on_a_full_that_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("FULL-5-disk");
        std::fs::write(&full, "").unwrap();
        let unfinished = Unfinished {
            work: Work::Commit,
            phase: Phase::Removing,
            full: "FULL-5-disk".to_owned(),
            incs: vec!["INC-9-disk".to_owned()],
        };
        unfinished.write(&full).unwrap();
        let fault = || History::read(folder.path(), "disk").unwrap().newest.unwrap().fault.unwrap();
        assert!(fault().contains("up to INC-9-disk was begun and not finished"), "{}", fault());
        std::fs::write(Unfinished::path(&full), "{").unwrap();
        assert!(fault().contains("FULL-5-disk.in-place.json cannot be understood"), "{}", fault());
        // nor is a new chain begun where a system does not say what is
        Unfinished::remove(&full).unwrap();
        std::os::unix::fs::symlink(Unfinished::path(&full), Unfinished::path(&full)).unwrap();
        let error = History::read(folder.path(), "disk").unwrap_err();
        assert!(error.to_string().contains("FULL-5-disk.in-place.json cannot be read"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Other);
    }

    #[test]
    fn a_folder_that_cannot_be_seen_is_not_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(History::read(&folder.path().join("none"), "disk").unwrap(), History::default());
        std::os::unix::fs::symlink("round", folder.path().join("round")).unwrap();
        assert!(History::read(&folder.path().join("round"), "disk").is_err());
    }
}
