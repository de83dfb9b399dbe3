//! The files below a folder. Nothing is opened here, so that a FIFO cannot make us wait.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::manifest::BOOKKEEPING;
use super::name::{POINT_LINK, is_stray};
use super::{Error, ImageName, Level, MAX_DEPTH, MAX_ENTRIES, Note};
use crate::storage::read_folder;

/// A folder, and the files in it that may be images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Folder {
    /// Its path below the folder that was searched.
    pub(super) relative: PathBuf,
    /// Its files, by name.
    pub(super) files: BTreeMap<OsString, Kind>,
    /// When it was looked at.
    pub(super) stamp: Stamp,
}

/// When names in a folder, and in the one with its bookkeeping, were changed last: seconds and nanoseconds of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp([Option<(i64, i64)>; 2]);

impl Stamp {
    pub(super) fn of(folder: &Path) -> Self {
        let changed = |path: &Path| fs::metadata(path).ok().map(|folder| (folder.ctime(), folder.ctime_nsec()));
        Self([changed(folder), changed(&folder.join(BOOKKEEPING))])
    }
}

impl Folder {
    /// Whether a file of this name is there, which may be an image: a link that leads nowhere is none, where its name has no
    /// time.
    pub(super) fn has_image(&self, name: &OsStr) -> bool {
        self.files.get(name).is_some_and(|kind| match kind {
            Kind::File | Kind::Link(Leads::ToFile) => true,
            Kind::Link(Leads::Nowhere) => ImageName::parse(name).is_some(),
            Kind::Link(Leads::ToOther) => false,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    /// A symbolic link.
    Link(Leads),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leads {
    ToFile,
    /// To a FIFO, a device, a socket.
    ToOther,
    /// What it leads to is not there, or cannot be reached.
    Nowhere,
}

/// Lists a folder and those below it, sorted by path. Hidden folders and links to folders are left alone; where such a link
/// leads elsewhere, that is noted.
pub(super) fn scan(dir: &Path, notes: &mut Vec<Note>) -> Result<Vec<Folder>, Error> {
    let mut folders = Vec::new();
    let mut queue = VecDeque::from([(PathBuf::new(), 0)]);
    let mut left = MAX_ENTRIES;
    while let Some((relative, depth)) = queue.pop_front() {
        let path = if depth == 0 { dir.to_owned() } else { dir.join(&relative) };
        let mut folder = Folder { relative, files: BTreeMap::new(), stamp: Stamp::of(&path) };
        let listing = read_folder(&path).and_then(|entries| {
            for entry in entries {
                let Some(fewer) = left.checked_sub(1) else { return Ok(false) };
                left = fewer;
                let (name, kind) = entry?;
                let entry = entry_of(kind, || path.join(&name));
                notes.extend(no_file(&name, entry.as_ref(), || path.join(&name)));
                match entry {
                    Some(Entry::Link) if !name.as_bytes().starts_with(b".") => {
                        notes.extend(elsewhere(dir, path.join(&name)));
                    }
                    Some(Entry::Folder) if !name.as_bytes().starts_with(b".") => {
                        if depth < MAX_DEPTH {
                            queue.push_back((folder.relative.join(name), depth.saturating_add(1)));
                        } else if path.join(&name).join(BOOKKEEPING).is_dir() {
                            notes.push(Note::Deep { path: path.join(name) });
                        }
                    }
                    Some(Entry::File(kind)) => {
                        notes.extend(dangling(&name, kind, || path.join(&name)));
                        folder.files.insert(name, kind);
                    }
                    Some(Entry::Folder | Entry::Link | Entry::Other) | None => {}
                }
            }
            Ok(true)
        });
        match listing {
            Ok(true) => folders.push(folder),
            Ok(false) => return Err(Error::TooManyEntries { path: dir.to_owned(), limit: MAX_ENTRIES }),
            Err(source) if depth == 0 => return Err(Error::Io { path, source }),
            Err(error) => notes.push(Note::Folder { path, reason: error.to_string() }),
        }
    }
    folders.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok(folders)
}

/// A note where a link leads to a folder that is not found otherwise.
fn elsewhere(dir: &Path, link: PathBuf) -> Option<Note> {
    let is_below =
        fs::canonicalize(dir).ok().zip(fs::canonicalize(&link).ok()).is_none_or(|(dir, to)| to.starts_with(dir));
    (!is_below).then_some(Note::Link { path: link })
}

/// A note where an entry that is no file has the name of an image. Folders may be somebody's for older images, but hardly
/// with the disk in their names: containers make one of a file that is missing.
fn no_file(name: &OsStr, entry: Option<&Entry>, path: impl Fn() -> PathBuf) -> Option<Note> {
    let named = ImageName::parse(name).filter(|named| !named.partial)?;
    let is_none = match entry? {
        Entry::Folder => named.level == Level::Inc && named.disk.is_some(),
        Entry::File(kind) => *kind == Kind::Link(Leads::ToOther),
        Entry::Link => false,
        Entry::Other => true,
    };
    is_none.then(|| Note::NoFile { path: path() })
}

/// A note where a link leads nowhere that tells neither of an image nor of the level of one.
fn dangling(name: &OsStr, kind: Kind, path: impl Fn() -> PathBuf) -> Option<Note> {
    let is_known = || is_stray(name) || Level::split(name.as_bytes()).is_some() || name == POINT_LINK;
    if kind != (Kind::Link(Leads::Nowhere)) || is_known() {
        return None;
    }
    let path = path();
    let reason = fs::metadata(&path).err()?.to_string();
    Some(Note::Dangling { path, reason })
}

enum Entry {
    Folder,
    /// A link to a folder.
    Link,
    File(Kind),
    /// A FIFO, a device, a socket.
    Other,
}

/// What an entry is; `None` for what cannot be told, as what is gone by now.
fn entry_of(kind: FileType, path: impl Fn() -> PathBuf) -> Option<Entry> {
    match kind {
        FileType::Directory => Some(Entry::Folder),
        FileType::RegularFile => Some(Entry::File(Kind::File)),
        FileType::Symlink => {
            let leads = match fs::metadata(path()) {
                Ok(target) if target.is_dir() => return Some(Entry::Link),
                Ok(target) if target.is_file() => Leads::ToFile,
                Ok(_) => Leads::ToOther,
                Err(_) => Leads::Nowhere,
            };
            Some(Entry::File(Kind::Link(leads)))
        }
        FileType::Unknown => None,
        _ => Some(Entry::Other),
    }
}
