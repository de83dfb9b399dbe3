//! Which files of a folder are images: those with a time in their name, and those that bear the bare name of a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use super::config;
use super::manifest::Manifest;
use super::name::{ImageName, Level, is_stray, strip_partial};
use super::scan::{Folder, Kind, Leads};

/// The extensions of disk images: one such file in a folder is an image even if nothing else tells.
const EXTENSIONS: [&str; 4] = ["qcow2", "qcow", "img", "raw"];

/// An image as its folder tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) file: OsString,
    pub(super) disk: Option<OsString>,
    pub(super) level: Level,
    pub(super) time: Option<i64>,
    pub(super) partial: bool,
    pub(super) told: Told,
}

/// What tells the level of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Its name, or the link beside it.
    Once,
    /// Neither.
    Never,
    /// Links for FULL and COPY: it was written as both.
    Twice,
}

impl Found {
    /// The image of this name, if it has a time.
    pub(super) fn timed(file: OsString) -> Option<Self> {
        ImageName::parse(&file).map(|name| Self::new(file, name))
    }

    /// The FULL of this name, which has no time.
    pub(super) fn timeless(file: OsString) -> Self {
        let disk = Some(file.clone());
        Self { file, disk, level: Level::Full, time: None, partial: false, told: Told::Once }
    }

    fn new(file: OsString, name: ImageName) -> Self {
        let ImageName { level, time, disk, partial } = name;
        Self { file, disk, level, time: Some(time), partial, told: Told::Once }
    }
}

/// The files of one folder, sorted into kinds.
#[derive(Debug, Default)]
pub(super) struct Layout {
    timed: Vec<(OsString, ImageName)>,
    /// The disks that images with a time tell, and those of INCs among them.
    disks: BTreeSet<Option<OsString>>,
    inc_disks: BTreeSet<Option<OsString>>,
    /// Names that have no time: the file's, the disk's, and whether the image is not whole.
    bare: Vec<(OsString, OsString, bool)>,
    /// The levels that links beside bare names tell: `FULL-disk.qcow2` leads to `disk.qcow2`.
    marks: BTreeMap<OsString, BTreeSet<Level>>,
}

impl Layout {
    pub(super) fn new(folder: &Folder) -> Self {
        let mut layout = Self::default();
        for (name, kind) in &folder.files {
            let parsed = ImageName::parse(name);
            let mark = Level::split(name.as_bytes());
            let marked = mark.filter(|(level, disk)| {
                *level != Level::Inc && folder.files.get(OsStr::from_bytes(disk)) == Some(&Kind::File)
            });
            match (parsed, marked, kind) {
                (None, Some((level, disk)), _) | (Some(_), Some((level, disk)), Kind::Link(_)) => {
                    layout.marks.entry(OsString::from_vec(disk.to_vec())).or_default().insert(level);
                }
                (_, _, Kind::Link(Leads::ToOther)) => {}
                // also a link that leads nowhere: what it led to cannot be had, and others build on it
                (Some(parsed), ..) => {
                    layout.disks.insert(parsed.disk.clone());
                    if parsed.level == Level::Inc {
                        layout.inc_disks.insert(parsed.disk.clone());
                    }
                    layout.timed.push((name.clone(), parsed));
                }
                // a link with any other name may lead to the disk itself, or be the `image` that a rebase leaves
                (None, None, Kind::File) if mark.is_none() && !is_stray(name) => {
                    let (disk, partial) = strip_partial(name);
                    layout.bare.push((name.clone(), OsString::from_vec(disk.to_vec()), partial));
                }
                (None, ..) => {}
            }
        }
        layout
    }

    /// The names of disks that images with a time tell.
    pub(super) fn timed_disks(&self) -> &BTreeSet<Option<OsString>> {
        &self.disks
    }

    /// The images of the folder at `path`, sorted by name. `below` are the disks of images with a time in the folders
    /// below it.
    pub(super) fn images(&self, path: &Path, below: &BTreeSet<Option<OsString>>) -> Vec<Found> {
        let timed = self.timed.iter().map(|(file, name)| Found::new(file.clone(), name.clone()));
        let alone = self.timed.is_empty() && below.is_empty() && {
            let mut likely = self.bare.iter().filter(|(_, disk, partial)| !partial && has_extension(disk));
            likely.next().is_some() && likely.next().is_none()
        };
        let is_image = |disk: &OsString, partial| {
            if partial { self.is_failed(path, disk) } else { self.is_whole(path, disk, alone, below) }
        };
        let bare = self.bare.iter().filter(|(_, disk, partial)| is_image(disk, *partial));
        let bare = bare.map(|(file, disk, partial)| {
            let marks = self.marks.get(disk);
            let marked = |level| marks.is_some_and(|marks| marks.contains(&level));
            let (full, copy) = (marked(Level::Full), marked(Level::Copy));
            Found {
                file: file.clone(),
                disk: Some(disk.clone()),
                level: if copy && !full { Level::Copy } else { Level::Full },
                time: None,
                partial: *partial,
                told: match (full, copy) {
                    (true, true) => Told::Twice,
                    (false, false) => Told::Never,
                    _ => Told::Once,
                },
            }
        });
        timed.chain(bare).collect()
    }

    /// Whether a file with a disk's bare name is an image of it: it may as well be a restored disk, or no image at all.
    /// `alone` says that it is if it is named like one.
    fn is_whole(&self, path: &Path, disk: &OsString, alone: bool, below: &BTreeSet<Option<OsString>>) -> bool {
        let name = Some(disk.clone());
        if self.marks.contains_key(disk) || self.inc_disks.contains(&name) {
            return true;
        }
        // above its own images, it is a disk that was restored
        let is_known = || matches!(Manifest::read(&path.join(disk)), Ok(Some(_)));
        !below.contains(&name) && (has_config(path, disk) || is_known() || (alone && has_extension(disk)))
    }

    /// Whether a file with a disk's bare name and `.partial` is what a failed run left.
    fn is_failed(&self, path: &Path, disk: &OsString) -> bool {
        self.disks.contains(&Some(disk.clone())) || has_config(path, disk) || has_extension(disk)
    }
}

/// Whether the folder or the one above it holds the disk's settings.
fn has_config(folder: &Path, disk: &OsStr) -> bool {
    folder.ancestors().take(2).any(|folder| config::file_for(folder, disk).is_file())
}

fn has_extension(disk: &OsStr) -> bool {
    Path::new(disk).extension().is_some_and(|found| EXTENSIONS.iter().any(|known| found.eq_ignore_ascii_case(known)))
}
