//! What the backup folder already holds of a disk.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::capture::error::Error;
use crate::capture::machine::device::Device;
use crate::capture::machine::live::Live;
use crate::capture::names;
use crate::chain::{self, Checksums, Image, ImageId, Inventory, Level, discover};
use crate::qcow2;
use crate::storage::FileStorage;

/// What there is of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct History {
    /// The newest FULL or INC.
    pub(crate) newest: Option<Newest>,
    /// What a failed run of another tool has left since the newest FULL: changes may be in it and in no bitmap.
    pub(crate) partial: Option<PathBuf>,
    /// The latest time of any image, whatever its level.
    pub(crate) latest: Option<i64>,
    /// Whether images are of another tool, or may be, since they have no manifest.
    pub(crate) foreign: bool,
    /// All FULLs and INCs directly in the folder, those too of which only the manifest is there; but old ones of those.
    pub(crate) chained: Vec<Arc<Image>>,
}

/// The image that an INC would build on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Newest {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// The time of its restore point; unknown where neither its name nor its manifest has one.
    pub(crate) time: Option<i64>,
    /// Its id, where its manifest tells.
    pub(crate) id: Option<ImageId>,
    /// The bitmap that goes back to it, where its manifest tells.
    pub(crate) bitmap: Option<String>,
    /// The size of the disk in it; unknown where it cannot be read.
    pub(crate) size: Option<u64>,
    /// Why no INC may build on it.
    pub(crate) fault: Option<String>,
}

impl Newest {
    /// Whether a disk has the bitmap that goes back to it.
    pub(crate) fn is_followed_by(&self, device: &Device) -> bool {
        self.bitmap.as_ref().is_some_and(|bitmap| device.has_bitmap(bitmap))
    }
}

impl History {
    /// The time of the newest image; the earliest there is, where it has none.
    pub(crate) fn since(&self) -> Option<i64> {
        self.newest.as_ref().map(|newest| newest.time.unwrap_or(i64::MIN))
    }

    /// Makes sure that an image whose name has no time costs no restore point, neither what it replaces nor by its place:
    /// such a FULL stands before all images with a time. A COPY of the Python tool may have nothing that tells it from a FULL,
    /// but that tool makes no id of a chain for it.
    pub(crate) fn allows_timeless(&self, image: &Path, level: Level, has_chain: bool) -> Result<(), Error> {
        let path = image.to_owned();
        if level != Level::Inc && image.file_name().is_some_and(chain::means_else) {
            return Err(Error::Ambiguous { path });
        }
        let (own, others): (Vec<_>, Vec<_>) = self.chained.iter().partition(|chained| chained.path == image);
        let full = others.iter().find(|other| other.level == Level::Full);
        let after = full.or_else(|| others.first().filter(|_| own.is_empty()));
        let link = [OsStr::new("FULL-"), image.file_name().unwrap_or_default()].join(OsStr::new(""));
        let is_told = own.iter().any(|own| own.known().is_some()) || image.with_file_name(link).is_symlink();
        let may_be_copy = !has_chain && others.is_empty() && !is_told;
        match (level, after) {
            (Level::Full, Some(after)) => Err(Error::Timeless { path, before: after.display_name() }),
            (Level::Full, None) if !others.is_empty() => Err(Error::Replaces { path }),
            (Level::Copy, _) if !own.is_empty() && !may_be_copy => Err(Error::Replaces { path }),
            _ => Ok(()),
        }
    }

    /// What the [inventory] of a folder has of a disk. What the machine itself writes to is no image of it, whatever its name.
    fn of(inventory: &Inventory, folder: &Path, base: &str, live: &Live) -> Result<Self, Error> {
        // those of other months, if there are folders of months here; or of other folders that have disks of the same name
        let here = |image: &&Arc<Image>| image.path.parent() == Some(folder) && !live.writes_to(&image.path);
        // QEMU may still have open what a run was killed over
        let left = |partial: &&Arc<Image>| partial.path.parent() == Some(folder) && partial.level != Level::Copy;
        let is_here = |disk: &&chain::Disk| {
            disk.images().iter().any(|image| here(&image)) || disk.partials().iter().any(|partial| left(&partial))
        };
        let own = |disk: &&chain::Disk| disk.name() == Some(OsStr::new(base));
        // the oldest names do not tell the disk
        let nameless = |disk: &&chain::Disk| disk.name().is_none();
        let named = inventory.disks.iter().find(|disk| own(disk) && is_here(disk));
        let disk = named.or_else(|| inventory.disks.iter().find(own)).or_else(|| inventory.disks.iter().find(nameless));
        let Some(disk) = disk else { return Ok(Self::default()) };
        let chained = disk.chains().iter().flat_map(chain::Chain::images);
        let chained = chained.filter(|image| image.level != Level::Copy && here(image)).cloned().collect();
        let latest = disk.images().iter().filter(here).filter_map(|image| image.time).max();
        let foreign = disk.images().iter().filter(here).any(|image| !image.missing && image.manifest.is_none());
        let images: Vec<_> = disk.images().iter().filter(here).filter(|image| image.level != Level::Copy).collect();
        let Some(newest) = images.last() else {
            return Ok(Self { latest, foreign, chained, ..Self::default() });
        };
        let full = images.iter().rfind(|image| image.level == Level::Full);
        // not the moment that it holds: INCs that were written into it since may lack what is in the partial
        let since = full.and_then(|full| full.named);
        let partial =
            disk.partials().iter().filter(left).find(|partial| partial.time.is_none() || partial.time >= since);
        let state = disk.points().iter().find(|point| point.image().path == newest.path).map(chain::Point::state);
        let fault = match state {
            Some(chain::State::Broken(chain::Fault::NoFull)) => {
                Some("the newest image has no FULL before it".to_owned())
            }
            // what cannot be read may say anything
            Some(chain::State::Broken(fault @ chain::Fault::JournalUnread { .. })) => {
                return Err(chain::Error::Broken { path: newest.path.clone(), fault: fault.clone() }.into());
            }
            Some(chain::State::Broken(fault)) => Some(fault.to_string()),
            Some(chain::State::Doubtful(doubt)) => Some(doubt.to_string()),
            Some(chain::State::Sound) | None => None,
        };
        // a disk may be put back to what it was before an image was made that is gone: an INC could not be told from one that
        // builds on that
        let builds_on_it = |image: &&Arc<Image>| {
            let parent = image.known().and_then(|manifest| manifest.parent.as_deref());
            image.missing && image.level == Level::Inc && parent.map(OsStr::new) == newest.path.file_name()
        };
        let gone = disk.chains().iter().flat_map(chain::Chain::images).filter(here).find(builds_on_it);
        let fault = fault
            .or_else(|| gone.map(|gone| format!("{} is missing, only its manifest is there", gone.display_name())));
        // whose it is, and which bitmap goes back to it, nobody knows then
        let untold = newest.manifest.as_ref().and_then(|manifest| manifest.as_ref().err());
        let fault =
            fault.or_else(|| untold.map(|why| format!("the manifest of the newest image cannot be used: {why}")));
        // that of an older moment says nothing
        let is_of = |bitmap: &String| newest.time.is_some_and(|time| names::is_epoch(bitmap, time));
        let bitmap = newest.known().and_then(|manifest| manifest.bitmap.clone()).filter(is_of);
        let id = newest.known().and_then(|manifest| manifest.id);
        let size = size(newest);
        let fault = fault.or_else(|| size.is_none().then(|| "the newest image cannot be read".to_owned()));
        let full = images.iter().rposition(|image| image.level == Level::Full).unwrap_or_default();
        let in_chain = images.get(full..).unwrap_or_default();
        let fault = fault.or_else(|| in_chain.iter().find_map(|image| other_length(image)));
        let before = std::iter::once(None).chain(in_chain.iter().copied().map(Some));
        let fault = fault.or_else(|| before.zip(in_chain).find_map(|(before, image)| other_backing(before, image)));
        Ok(Self {
            newest: Some(Newest { path: newest.path.clone(), time: newest.time, id, bitmap, size, fault }),
            partial: partial.map(|partial| partial.path.clone()),
            latest,
            foreign,
            chained,
        })
    }
}

/// Looks into folders of disks, into each of them once for all disks, and at the images of each disk once.
#[derive(Debug)]
pub(crate) struct Histories<'a> {
    live: &'a Live,
    inventories: BTreeMap<PathBuf, Option<Inventory>>,
    known: BTreeMap<(PathBuf, String), History>,
}

impl<'a> Histories<'a> {
    pub(crate) fn new(live: &'a Live) -> Self {
        Self { live, inventories: BTreeMap::new(), known: BTreeMap::new() }
    }

    /// What a folder has of a disk.
    pub(crate) fn of(&mut self, folder: &Path, base: &str) -> Result<History, Error> {
        let place = (folder.to_owned(), base.to_owned());
        if let Some(known) = self.known.get(&place) {
            return Ok(known.clone());
        }
        let live = self.live;
        let of = |inventory: &Inventory| History::of(inventory, folder, base, live);
        let history = self.inventory(folder)?.map_or_else(|| Ok(History::default()), of)?;
        Ok(self.known.entry(place).or_insert(history).clone())
    }

    /// The images in a folder that a disk goes on from, whatever its file was called when they were made: it has the bitmap
    /// of the newest. And what they bear of its name.
    pub(crate) fn followed_by(&mut self, folder: &Path, device: &Device) -> Result<Option<(String, Newest)>, Error> {
        let Some(inventory) = self.inventory(folder)? else { return Ok(None) };
        let bases = inventory.disks.iter().filter_map(|disk| disk.name()?.to_str());
        for base in bases.map(str::to_owned).collect::<Vec<_>>() {
            let newest = self.of(folder, &base)?.newest;
            if let Some(newest) = newest.filter(|newest| newest.is_followed_by(device)) {
                return Ok(Some((base, newest)));
            }
        }
        Ok(None)
    }

    fn inventory(&mut self, folder: &Path) -> Result<Option<&Inventory>, Error> {
        let inventory = match self.inventories.entry(folder.to_owned()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(inventory(folder)?),
        };
        Ok(inventory.as_ref())
    }
}

/// What a folder holds, where there is one.
fn inventory(folder: &Path) -> Result<Option<Inventory>, Error> {
    match folder.metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(Some(discover(folder)?)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // what cannot be seen may be there
        Err(source) => Err(Error::Io { path: folder.to_owned(), source }),
    }
}

/// What speaks against an image that was cut short, or has become longer.
fn other_length(image: &Image) -> Option<String> {
    let length = image.path.metadata().ok()?.len();
    let expected = Checksums::other_length(&image.path, length)?;
    Some(format!("{} has {length} bytes, but {expected} when its checksums were made", image.display_name()))
}

/// What speaks against an image that rests on another than the one before it, as one that somebody has rebased: no restore
/// reads what it rests on. What cannot be read tells so elsewhere.
fn other_backing(before: Option<&Arc<Image>>, image: &Image) -> Option<String> {
    let backing = header(image)?.backing?;
    let what = format!("{} names {:?} as its backing file", image.display_name(), backing.name);
    match before {
        Some(before) if chain::leads_to(&backing.name, before.name()) => None,
        Some(before) => Some(format!("{what}, not {}", before.display_name())),
        None => Some(format!("{what}, and a FULL has none")),
    }
}

/// The header of an image that is no raw one.
fn header(image: &Image) -> Option<qcow2::Header> {
    let is_raw = matches!(image.format, chain::FormatHint::Raw | chain::FormatHint::RawDisk);
    let storage = if is_raw { None } else { FileStorage::open(&image.path).ok() };
    qcow2::Header::read(&storage?).ok()
}

/// The size of the disk in an image.
fn size(image: &Image) -> Option<u64> {
    match image.format {
        chain::FormatHint::Raw | chain::FormatHint::RawDisk => {
            Some(crate::storage::Storage::length(&FileStorage::open(&image.path).ok()?))
        }
        chain::FormatHint::Qcow2 | chain::FormatHint::Unknown => Some(header(image)?.size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{FormatHint, Manifest, Stage, Unfinished, Work, create_checksums};
    use crate::errors::ErrorKind;

    fn read(folder: &Path, base: &str) -> Result<History, Error> {
        Histories::new(&Live::default()).of(folder, base)
    }

    fn manifest() -> Manifest {
        Manifest {
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
        }
    }

    #[test]
    fn an_image_without_a_time_is_there_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path(), "disk.qcow2").unwrap().since(), None);
        std::fs::write(folder.path().join("disk.qcow2"), "").unwrap();
        std::os::unix::fs::symlink("disk.qcow2", folder.path().join("FULL-disk.qcow2")).unwrap();
        assert_eq!(read(folder.path(), "disk.qcow2").unwrap().since(), Some(i64::MIN));
        std::fs::write(folder.path().join("INC-7-disk.qcow2"), "").unwrap();
        assert_eq!(read(folder.path(), "disk.qcow2").unwrap().since(), Some(7));
    }

    #[test]
    fn a_full_that_incs_were_written_into_is_of_the_moment_that_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("FULL-5-disk");
        std::fs::write(&full, "").unwrap();
        manifest().write(&full).unwrap();
        let history = read(folder.path(), "disk").unwrap();
        assert_eq!((history.since(), history.latest), (Some(9), Some(9)));
        // what a failed run has left between them is in neither
        std::fs::write(folder.path().join("INC-7-disk.partial"), "").unwrap();
        assert!(read(folder.path(), "disk").unwrap().partial.is_some());
    }

    #[test]
    fn nothing_is_built_on_a_chain_with_an_image_of_another_length() {
        let folder = tempfile::tempdir().unwrap();
        let fault = || read(folder.path(), "disk").unwrap().newest.unwrap().fault;
        let images = ["FULL-5-disk", "INC-6-disk", "INC-7-disk"].map(|name| folder.path().join(name));
        for image in &images {
            std::fs::copy(
                concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/INC-1793674800-disk.qcow2"),
                image,
            )
            .unwrap();
            create_checksums(image, &FileStorage::open(image).unwrap()).unwrap();
        }
        assert_eq!(fault(), None);
        for image in &images {
            let length = image.metadata().unwrap().len();
            let file = std::fs::File::options().write(true).open(image).unwrap();
            file.set_len(length + 1).unwrap();
            let name = image.file_name().unwrap().to_str().unwrap();
            assert!(fault().unwrap().starts_with(&format!("{name} has {} bytes, but {length} when", length + 1)));
            file.set_len(length).unwrap();
        }
        // those of a chain before do not matter
        std::fs::copy(&images[0], folder.path().join("FULL-9-disk")).unwrap();
        std::fs::write(&images[1], "").unwrap();
        assert_eq!(fault(), None);
    }

    /// The Python tool once left INCs that it had written into the FULL, each of which names the FULL.
    #[test]
    fn nothing_is_built_on_a_chain_with_an_image_that_names_another_backing_file() {
        let folder = tempfile::tempdir().unwrap();
        let images = ["FULL-5-disk", "INC-6-disk", "INC-7-disk"].map(|name| folder.path().join(name));
        for image in &images {
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/INC-1793674800-disk.qcow2");
            std::fs::copy(source, image).unwrap();
        }
        let name = |image: &Path, backing: Option<&str>| {
            let backing = backing.map(|name| qcow2::Backing { name: name.to_owned(), format: None });
            qcow2::set_backing(&FileStorage::open_writable(image).unwrap(), backing.as_ref()).unwrap();
        };
        let fault = || read(folder.path(), "disk").unwrap().newest.unwrap().fault;
        name(&images[1], Some("/elsewhere/FULL-5-disk"));
        name(&images[2], Some("INC-6-disk"));
        assert_eq!(fault(), None);
        name(&images[2], Some("FULL-5-disk"));
        let expected = "INC-7-disk names \"FULL-5-disk\" as its backing file, not INC-6-disk";
        assert_eq!(fault().as_deref(), Some(expected));
        name(&images[2], None);
        name(&images[0], Some("base"));
        assert!(fault().unwrap().starts_with("FULL-5-disk names \"base\""));
    }

    #[test]
    fn nothing_is_built_on_an_image_whose_manifest_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let newest = || read(folder.path(), "disk").unwrap().newest.unwrap();
        for (level, name) in [(Level::Full, "FULL-5-disk"), (Level::Inc, "INC-6-disk")] {
            let image = folder.path().join(name);
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/INC-1793674800-disk.qcow2");
            std::fs::copy(source, &image).unwrap();
            let id = Some(ImageId::random().unwrap());
            Manifest { level, time: None, id, ..manifest() }.write(&image).unwrap();
            assert_eq!((newest().fault, newest().id), (None, id));
        }
        for text in ["{", "[]", r#"{"version": 99}"#] {
            std::fs::write(Manifest::path(&folder.path().join("INC-6-disk")), text).unwrap();
            let fault = newest().fault.unwrap();
            assert!(fault.starts_with("the manifest of the newest image cannot be used: "), "{fault}");
        }
    }

    /// The disk was put back to what it was before an INC that is gone.
    #[test]
    fn nothing_is_built_on_an_image_before_one_that_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/INC-1793674800-disk.qcow2");
        std::fs::copy(source, folder.path().join("FULL-5-disk")).unwrap();
        let fault = || read(folder.path(), "disk").unwrap().newest.unwrap().fault;
        assert_eq!(fault(), None);
        let (image, parent) = ("INC-6-disk".to_owned(), Some("FULL-5-disk".to_owned()));
        let inc = Manifest { image, level: Level::Inc, time: Some(6), parent, ..manifest() };
        inc.write(&folder.path().join("INC-6-disk")).unwrap();
        assert_eq!(fault().as_deref(), Some("INC-6-disk is missing, only its manifest is there"));
        std::fs::copy(source, folder.path().join("FULL-7-disk")).unwrap();
        assert_eq!(fault(), None);
    }

    #[test]
    fn nothing_is_built_on_a_full_that_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("FULL-5-disk");
        std::fs::write(&full, "").unwrap();
        let unfinished = Unfinished {
            work: Work::Commit,
            stage: Stage::Removing,
            full: "FULL-5-disk".to_owned(),
            incs: vec!["INC-9-disk".to_owned()],
            full_id: None,
        };
        unfinished.write(&full).unwrap();
        let fault = || read(folder.path(), "disk").unwrap().newest.unwrap().fault.unwrap();
        assert!(fault().contains("up to INC-9-disk was begun and not finished"), "{}", fault());
        std::fs::write(Unfinished::path(&full), "{").unwrap();
        assert!(fault().contains("FULL-5-disk.in-place.json cannot be understood"), "{}", fault());
        // nor is a new chain begun where a system does not say what is
        Unfinished::remove(&full).unwrap();
        std::os::unix::fs::symlink(Unfinished::path(&full), Unfinished::path(&full)).unwrap();
        let error = read(folder.path(), "disk").unwrap_err();
        assert!(error.to_string().contains("FULL-5-disk.in-place.json cannot be read"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Other);
    }

    #[test]
    fn a_name_without_a_time_takes_no_restore_point_from_others() {
        let asked_of = |names: &[&str], level, has_chain| {
            let folder = tempfile::tempdir().unwrap();
            for name in names {
                std::fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
                std::fs::write(folder.path().join(name), "").unwrap();
            }
            let history = read(folder.path(), "vm.qcow2").unwrap();
            match history.allows_timeless(&folder.path().join("vm.qcow2"), level, has_chain) {
                Ok(()) => "yes".to_owned(),
                Err(Error::Timeless { before, .. }) => before,
                Err(Error::Replaces { .. }) => "a chain needs it".to_owned(),
                Err(error) => panic!("{error}"),
            }
        };
        let full_and_copy = |names: &[&str]| [Level::Full, Level::Copy].map(|level| asked_of(names, level, true));
        assert_eq!(full_and_copy(&[]), ["yes", "yes"]);
        assert_eq!(full_and_copy(&["vm.qcow2"]), ["yes", "a chain needs it"]);
        assert_eq!(full_and_copy(&["vm.qcow2", "INC-7-vm.qcow2"]), ["a chain needs it", "a chain needs it"]);
        let later = ["vm.qcow2", "INC-7-vm.qcow2", "FULL-9-vm.qcow2"];
        assert_eq!(full_and_copy(&later), ["FULL-9-vm.qcow2", "a chain needs it"]);
        assert_eq!(full_and_copy(&["FULL-9-vm.qcow2"]), ["FULL-9-vm.qcow2", "yes"]);
        assert_eq!(full_and_copy(&["COPY-9-vm.qcow2"]), ["yes", "yes"]);
        assert_eq!(full_and_copy(&["INC-7-vm.qcow2"]), ["INC-7-vm.qcow2", "yes"]);
        // folders of other layouts below have disks of the same name
        assert_eq!(full_and_copy(&["ide0-hd0/FULL-3-vm.qcow2", "FULL-9-vm.qcow2"]), ["FULL-9-vm.qcow2", "yes"]);
        assert_eq!(full_and_copy(&["2021-11/FULL-3-vm.qcow2"]), ["yes", "yes"]);
        // without a chain and a link, it is a COPY
        assert_eq!(asked_of(&["vm.qcow2"], Level::Copy, false), "yes");
        assert_eq!(asked_of(&["vm.qcow2", "INC-7-vm.qcow2"], Level::Copy, false), "a chain needs it");
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("vm.qcow2");
        std::fs::write(&full, "").unwrap();
        std::os::unix::fs::symlink("vm.qcow2", folder.path().join("FULL-vm.qcow2")).unwrap();
        let history = read(folder.path(), "vm.qcow2").unwrap();
        assert!(matches!(history.allows_timeless(&full, Level::Copy, false), Err(Error::Replaces { .. })));
    }

    #[test]
    fn a_name_without_a_time_stands_before_an_image_of_which_only_the_manifest_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("FULL-5-vm.qcow2");
        manifest().write(&full).unwrap();
        let history = read(folder.path(), "vm.qcow2").unwrap();
        assert_eq!(history.newest, None);
        let refused = history.allows_timeless(&folder.path().join("vm.qcow2"), Level::Full, true);
        assert!(matches!(refused, Err(Error::Timeless { before, .. }) if before == "FULL-5-vm.qcow2"));
    }

    #[test]
    fn a_disk_that_is_called_like_an_image_or_like_none_has_none_without_a_time() {
        let history = History::default();
        for name in ["FULL-5-vm.qcow2", "INC-5", "COPY-5-x", "FULL-vm", "run", "verified", ".vm.qcow2", "#vm#"] {
            for level in [Level::Full, Level::Copy] {
                let refused = history.allows_timeless(&Path::new("/backup").join(name), level, true);
                assert!(matches!(refused, Err(Error::Ambiguous { .. })), "{name}");
            }
        }
        history.allows_timeless(Path::new("/backup/INC-5-FULL-5-vm.qcow2"), Level::Inc, true).unwrap();
        history.allows_timeless(Path::new("/backup/FULLY.qcow2"), Level::Full, true).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_seen_is_not_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(&folder.path().join("none"), "disk").unwrap(), History::default());
        std::os::unix::fs::symlink("round", folder.path().join("round")).unwrap();
        assert!(read(&folder.path().join("round"), "disk").is_err());
    }
}
