//! From a folder to the disks that it holds backups of.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::checksums::Checksums;
use super::config::Configs;
use super::disk::Disk;
use super::held;
use super::id::chain_id;
use super::image::{Image, Month};
use super::journal::Unfinished;
use super::layout::{Found, Layout};
use super::manifest::{BOOKKEEPING, Manifest, ManifestError};
use super::name::partial;
use super::note::Note;
use super::point::Fault;
use super::scan::{Folder, Stamp, scan};
use super::unnamed::Unnamed;
use super::{Error, FormatHint, Level, UUID};
use crate::storage::read_folder;

/// How many folders deep images are looked for: the VM, the month, the disk.
pub(crate) const MAX_DEPTH: usize = 3;

/// How many files are looked at: an image each minute for half a year. More is not a backup but a file server.
pub const MAX_ENTRIES: usize = 1 << 18;

/// How often folders are looked at that somebody changes at the same time.
const LOOKS: usize = 4;

/// What a folder holds.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Inventory {
    /// The folder that was searched.
    pub dir: PathBuf,
    /// The disks, sorted by label.
    pub disks: Vec<Disk>,
    /// The folders that were left out, which may hold any disk; for all that should be known of some disks see
    /// [`notes_of`](Self::notes_of).
    pub notes: Vec<Note>,
    /// The folders, and what they were like before anything of them was read.
    stamps: Vec<(PathBuf, Stamp)>,
}

/// Finds the disks below a folder: the folder of one disk, one with the images or folders of several, one of months, or
/// one of VMs.
///
/// Folders of months are no disks of their own: the same disk in several months is one, with the chains of all.
///
/// Where somebody changes the folders meanwhile, they are looked at again, some times at most.
///
/// # Errors
/// The folder cannot be read or holds more than [`MAX_ENTRIES`] files.
pub fn discover(dir: &Path) -> Result<Inventory, Error> {
    let mut inventory = look(dir)?;
    for _ in 1..LOOKS {
        if inventory.is_current() {
            break;
        }
        inventory = look(dir)?;
    }
    Ok(inventory)
}

fn look(dir: &Path) -> Result<Inventory, Error> {
    let real = fs::canonicalize(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
    let mut notes = Vec::new();
    let folders = scan(dir, &mut notes)?;
    let layouts: Vec<(&Path, Layout)> = folders.iter().map(|f| (f.relative.as_path(), Layout::new(f))).collect();
    let below = disks_below(&layouts);
    let targets: Vec<PathBuf> = folders.iter().map(|folder| real.join(&folder.relative)).collect();
    // a run knows the folder by the path that it was given, which may lead over a link
    let given = std::path::absolute(dir).ok();
    let above = [real.parent(), given.as_deref().and_then(Path::parent)];
    let unnamed = Unnamed::in_folders(targets.iter().map(PathBuf::as_path).chain(above.into_iter().flatten()));

    let mut groups: BTreeMap<PathBuf, BTreeMap<Option<OsString>, Vec<Image>>> = BTreeMap::new();
    for (folder, layout) in &layouts {
        let group = groups.entry(without_months(folder)).or_default();
        let none = BTreeSet::new();
        for found in layout.images(&real.join(folder), below.get(folder).unwrap_or(&none)) {
            let relative = folder.join(&found.file);
            group.entry(found.disk.clone()).or_default().push(image(dir, relative, found));
        }
    }
    let mut left = MAX_ENTRIES;
    for folder in &folders {
        for found in missing(dir, folder, &mut left, &mut notes)? {
            let group = groups.entry(without_months(&folder.relative)).or_default();
            let disk = found.disk.clone();
            let missing = Image { missing: true, ..image(dir, folder.relative.join(&found.file), found) };
            match group.get_mut(&disk) {
                Some(images) => images.push(missing),
                // nothing else tells of such a disk
                None if is_or_was_manifest(&missing.path) => drop(group.insert(disk, vec![missing])),
                None => {}
            }
        }
    }

    let mut configs = Configs::default();
    let mut labels = Labels { root: real.file_name().unwrap_or_default().to_owned(), used: BTreeMap::new() };
    let mut disks = Vec::new();
    for (node, mut group) in groups {
        adopt_nameless(&mut group);
        let shared = group.len() > 1;
        for (name, mut images) in group {
            let (mut formats, mut notes) = (BTreeMap::new(), Vec::new());
            let has = |level| images.iter().any(|image| image.level == level && image.named.is_some());
            // of INCs whose FULL is the image without a time, whatever was of that name before
            let is_needed = has(Level::Inc) && !has(Level::Full);
            for image in &mut images {
                image.manifest = Manifest::read(&image.path).transpose().map(|read| {
                    let unknown = |error: ManifestError| {
                        let reason = match &error {
                            ManifestError::Io { source, .. } => source.to_string(),
                            other => other.to_string(),
                        };
                        notes.push(Note::Manifest { path: Manifest::path(&image.path), reason: reason.clone() });
                        reason
                    };
                    read.map(Arc::new).map_err(unknown)
                });
                let format = || configs.format(&real.join(image.folder()), name.as_deref(), &mut notes);
                image.format = match image.known().map(|manifest| manifest.format) {
                    Some(format) => format,
                    None => *formats.entry(image.folder().to_owned()).or_insert_with(format),
                };
                image.take_level(is_needed);
                if image.level == Level::Full && !image.partial {
                    image.claimed = image.known().and_then(|manifest| manifest.time);
                    image.time = held::time(image.named, image.claimed);
                    let journal = Unfinished::read(&image.path).transpose();
                    let fault = |error| Fault::of_journal(&image.path, &error);
                    image.in_place = journal.map(|read| read.map(Arc::new).map_err(fault));
                }
                let place = real.join(&image.relative);
                if let Some(partial) = unnamed.owner_of_manifest(&place) {
                    image.in_place = Some(Err(Fault::Replaced { by: partial.to_owned() }));
                }
                if unnamed.is_left(&place) {
                    let file = if image.partial { image.name().to_owned() } else { partial(image.name()) };
                    notes.push(Note::Unnamed { path: image.path.with_file_name(file) });
                }
            }
            notes.extend(foreign(&images, &real));
            // where others have them, and checksums are there, the FULL had one, too
            let are_kept = images.iter().any(|image| image.manifest.is_some());
            let had = |image: &Image| image.manifest.is_some() || are_kept && Checksums::path(&image.path).is_file();
            let full = |image: &&Image| image.level == Level::Full && !image.partial && !image.missing;
            let lost = images.iter().filter(full).filter(|image| image.known().is_none() && had(image));
            notes.extend(lost.map(|image| Note::Moment { path: image.path.clone() }));
            let label = labels.label(&node, name.as_deref(), &images, shared);
            let folder = node.file_name().unwrap_or(&labels.root).to_string_lossy().into_owned();
            disks.push(Disk::new(label, folder, name, (images, notes)));
        }
    }
    disks.sort_by(|a, b| a.label().cmp(b.label()));
    let stamps = folders.iter().map(|folder| (dir.join(&folder.relative), folder.stamp)).collect();
    Ok(Inventory { dir: dir.to_owned(), disks, notes, stamps })
}

impl Inventory {
    /// Whether no file has come or gone since in the folders that there were, nor any manifest or journal.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.stamps.iter().all(|(folder, stamp)| Stamp::of(folder) == *stamp)
    }

    /// The disk that is meant: the one whose label, else folder or file, is or, where none is, contains `filter`. Without a
    /// filter, there must be only one.
    ///
    /// # Errors
    /// No disk, or more than one, is meant; or a folder that may hold it cannot be read.
    pub fn disk(&self, filter: Option<&str>) -> Result<&Disk, Error> {
        match self.matching(filter)?.as_slice() {
            [disk] => Ok(disk),
            several => Err(Error::WhichDisk { disks: labels(several) }),
        }
    }

    /// The disk that is to be changed: as [`disk`](Self::disk), but of a name only its ending may be left out.
    ///
    /// # Errors
    /// As [`disk`](Self::disk), and [`Error::NotWholeName`].
    pub fn disk_by_whole_name(&self, filter: Option<&str>) -> Result<&Disk, Error> {
        let matches = self.matching(filter)?;
        match filter.filter(|text| !matches.iter().any(|disk| disk.is_called(text))) {
            Some(text) => Err(Error::NotWholeName { filter: text.to_owned(), disks: labels(&matches) }),
            None => self.disk(filter),
        }
    }

    /// The disks that may be meant: those whose label, else folder or file, is or, where none is, contains `filter`. Without
    /// a filter, all.
    ///
    /// # Errors
    /// No disk is meant, or a folder that may hold it cannot be read.
    pub fn matching(&self, filter: Option<&str>) -> Result<Vec<&Disk>, Error> {
        let all: Vec<&Disk> = self.disks.iter().collect();
        let unread = || {
            let (path, reason) = self.notes.iter().find_map(Note::folder)?;
            Some(Error::FolderUnread { path: path.to_owned(), reason: reason.to_owned() })
        };
        if all.is_empty() {
            return Err(unread().unwrap_or_else(|| Error::NoDisk { path: self.dir.clone() }));
        }
        let Some(text) = filter else { return Ok(all) };
        let fits: [fn(&Disk, &str) -> bool; 3] = [|disk, text| disk.label() == text, Disk::is, Disk::contains];
        let matching = |fits: &fn(&Disk, &str) -> bool| all.iter().copied().filter(|disk| fits(disk, text)).collect();
        let matches: Vec<&Disk> =
            fits.iter().map(matching).find(|matches: &Vec<_>| !matches.is_empty()).unwrap_or_default();
        if matches.is_empty() {
            let none = || Error::NoSuchDisk { filter: text.to_owned(), disks: labels(&all) };
            return Err(unread().unwrap_or_else(none));
        }
        Ok(matches)
    }

    /// What was left out of the disks that [may be meant](Self::matching), or may be of them, each once.
    ///
    /// # Errors
    /// As [`matching`](Self::matching).
    pub fn notes_of(&self, filter: Option<&str>) -> Result<Vec<&Note>, Error> {
        let disks = self.matching(filter)?;
        let may_matter = |note: &&Note| {
            let (Some(text), Some(path)) = (filter, note.place()) else { return true };
            let node = without_months(path.strip_prefix(&self.dir).unwrap_or(path));
            let images = disks.iter().flat_map(|disk| disk.images().iter().chain(disk.partials()));
            node.to_string_lossy().contains(text)
                || images.into_iter().any(|image| without_months(image.folder()).starts_with(&node))
        };
        let mut told = HashSet::new();
        let notes = self.notes.iter().filter(may_matter).chain(disks.iter().flat_map(|disk| disk.notes()));
        Ok(notes.filter(|note| told.insert(*note)).collect())
    }
}

fn labels(disks: &[&Disk]) -> Vec<String> {
    disks.iter().map(|disk| disk.label().to_owned()).collect()
}

/// An image as its name and place tell.
fn image(dir: &Path, relative: PathBuf, found: Found) -> Image {
    Image {
        path: dir.join(&relative),
        month: relative.parent().and_then(Month::of),
        relative,
        disk: found.disk,
        level: found.level,
        time: found.time,
        named: found.time,
        partial: found.partial,
        format: FormatHint::Unknown,
        manifest: None,
        missing: false,
        told: found.told,
        since: found.time,
        claimed: None,
        in_place: None,
    }
}

/// Whether what may be the manifest of an image is one, perhaps a damaged one.
fn is_or_was_manifest(image: &Path) -> bool {
    match Manifest::read(image) {
        Ok(read) => read.is_some(),
        Err(ManifestError::Io { source, .. }) => {
            matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
        }
        Err(error) => matches!(error, ManifestError::Damaged { .. }),
    }
}

/// That the newest of the images belongs to another machine than the folder that they are in.
fn foreign(images: &[Image], dir: &Path) -> Option<Note> {
    let made = images.iter().filter(|image| !image.partial && !image.missing);
    let of_chains = made.filter_map(|image| Some((image, image.known()?.chain.as_ref()?)));
    let (newest, chain) = of_chains.max_by_key(|(image, _)| image.time)?;
    let place = dir.join(newest.folder());
    // the folder of a disk is in that of the machine, or is that
    let (folder, id) =
        [place.as_path(), place.parent()?].into_iter().find_map(|folder| Some((folder, chain_id(folder).ok()??)))?;
    let uuid = folder.join(UUID);
    let modified = uuid.metadata().and_then(|uuid| uuid.modified()).ok()?.duration_since(UNIX_EPOCH).ok()?;
    // what is older than the file may be of the id before
    let is_newer = newest.time.is_none_or(|time| u64::try_from(time).is_ok_and(|time| time >= modified.as_secs()));
    (*chain != id && is_newer).then(|| Note::Foreign { path: newest.path.clone(), uuid })
}

/// The images of a folder of which only manifests are there; `left` more entries may be looked at.
fn missing(dir: &Path, folder: &Folder, left: &mut usize, notes: &mut Vec<Note>) -> Result<Vec<Found>, Error> {
    let path = dir.join(&folder.relative);
    let listing = read_folder(&path.join(BOOKKEEPING))
        .and_then(|entries| entries.take(left.saturating_add(1)).collect::<io::Result<Vec<_>>>());
    let entries = listing.unwrap_or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound || path.join(BOOKKEEPING).is_symlink() {
            notes.push(Note::Manifests { path, reason: error.to_string() });
        }
        Vec::new()
    });
    let too_many = || Error::TooManyEntries { path: dir.to_owned(), limit: MAX_ENTRIES };
    *left = left.checked_sub(entries.len()).ok_or_else(too_many)?;
    let manifests = entries.iter().filter(|(name, _)| !Unfinished::is_journal(name));
    let names = manifests.filter_map(|(name, _)| Manifest::image_of(name));
    let path = dir.join(&folder.relative);
    // a name without a time may be that of anything
    let timeless = |name: OsString| {
        let manifest = Manifest::read(&path.join(&name)).ok()??;
        (manifest.level == Level::Full && name == manifest.image.as_str()).then(|| Found::timeless(name))
    };
    let mut missing: Vec<Found> = names
        .filter(|name| !folder.has_image(name) && !folder.has_image(&partial(name)))
        .filter_map(|name| Found::timed(name.clone()).or_else(|| timeless(name)))
        .filter(|found| !found.partial)
        .collect();
    missing.sort_by(|one, other| one.file.cmp(&other.file));
    Ok(missing)
}

/// For each folder, the disks of images with a time in the folders below it.
fn disks_below<'a>(layouts: &[(&'a Path, Layout)]) -> BTreeMap<&'a Path, BTreeSet<Option<OsString>>> {
    let mut below: BTreeMap<&Path, BTreeSet<Option<OsString>>> = BTreeMap::new();
    for (folder, layout) in layouts {
        for above in folder.ancestors().skip(1) {
            below.entry(above).or_default().extend(layout.timed_disks().iter().cloned());
        }
    }
    below
}

fn without_months(folder: &Path) -> PathBuf {
    folder.iter().filter(|name| Month::parse(name).is_none()).collect()
}

/// Images whose names tell no disk are of the one disk that others tell; where they tell several, nobody knows.
fn adopt_nameless(group: &mut BTreeMap<Option<OsString>, Vec<Image>>) {
    if group.len() != 2 {
        return;
    }
    if let (Some(images), Some(named)) = (group.remove(&None), group.values_mut().next()) {
        named.extend(images);
    }
}

/// Names for disks, each given once.
struct Labels {
    root: OsString,
    /// Each label, and how often it was wanted.
    used: BTreeMap<String, u64>,
}

impl Labels {
    /// The disk's folder, without the month where there are several; with the disk's file where others share the folder.
    fn label(&mut self, node: &Path, name: Option<&OsStr>, images: &[Image], shared: bool) -> String {
        let folders: BTreeSet<&Path> = images.iter().map(Image::folder).collect();
        let folder = folders.first().filter(|_| folders.len() == 1).copied().unwrap_or(node);
        let path = match name {
            Some(name) if shared || folder.as_os_str().is_empty() => folder.join(name),
            None if folder.as_os_str().is_empty() => PathBuf::from(&self.root),
            _ => folder.to_owned(),
        };
        let label = path.to_string_lossy().into_owned();
        loop {
            let count = self.used.entry(label.clone()).or_default();
            *count = count.saturating_add(1);
            let unique = if *count == 1 { return label } else { format!("{label} ({count})") };
            if !self.used.contains_key(&unique) {
                self.used.insert(unique.clone(), 1);
                return unique;
            }
        }
    }
}
