//! Work in a FULL image that was begun and has not ended: `.qmpbackup/<FULL>.in-place.json` beside it.
//!
//! `commit` and `snapshotrebase` write INCs into their FULL and remove them. Until that is done the FULL holds no moment of
//! its disk, and nothing in it tells. So this file is there from before the first write until the last INC is gone: none of
//! the chain's restore points is whole meanwhile, and the work can only be ended.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::json_file::{self, invalid, seal, seal_fits};
use super::manifest::beside;
use super::{BOOKKEEPING, Image, ImageId, ImageName, Level, MAX_CONFIG_BYTES};

/// The version of the file. The first had no `crc32`, which is that of a manifest.
const VERSION: u64 = 2;

/// The end of the names of such journals, after that of the FULL.
const EXTENSION: &str = "in-place.json";

/// Work in a FULL that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// What it is.
    pub work: Work,
    /// How far it has come.
    pub stage: Stage,
    /// The file name of the FULL.
    pub full: String,
    /// The file names of all INCs that it takes, oldest first; some may be gone already.
    pub incs: Vec<String>,
    /// The id that the FULL had before, where it had one: it becomes another image.
    pub full_id: Option<ImageId>,
}

/// What is done in a FULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// INCs are written into it.
    Commit,
    /// The same, with an internal snapshot after each.
    SnapshotRebase,
}

impl Work {
    const ALL: [Self; 2] = [Self::Commit, Self::SnapshotRebase];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::SnapshotRebase => "snapshotrebase",
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How far work in a FULL has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The FULL is a mixture of moments.
    Writing,
    /// The FULL holds all of the INCs, which only have to go.
    Removing,
}

impl Stage {
    const ALL: [Self; 2] = [Self::Writing, Self::Removing];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Writing => "writing",
            Self::Removing => "removing",
        }
    }
}

impl Unfinished {
    /// Where the journal of a FULL is, if there is one.
    #[must_use]
    pub fn path(full: &Path) -> PathBuf {
        beside(full, EXTENSION)
    }

    /// Whether a file of this name is such a journal, and no manifest.
    pub(super) fn is_journal(name: &OsStr) -> bool {
        name.as_bytes().strip_suffix(EXTENSION.as_bytes()).is_some_and(|image| image.ends_with(b"."))
    }

    /// The journal of a FULL; `None` where nothing was begun.
    ///
    /// # Errors
    /// `InvalidData` where the file is damaged, of a newer version or of another FULL; else what the system says.
    pub fn read(full: &Path) -> io::Result<Option<Self>> {
        let value = match json_file::read(&Self::path(full)) {
            // the name of the FULL is so long that none can be written
            Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => None,
            read => read?,
        };
        let Some(value) = value else { return Ok(None) };
        let unfinished = Self::parse(&value).map_err(invalid)?;
        unfinished.check(full).map_err(invalid)?;
        Ok(Some(unfinished))
    }

    /// Writes the journal of a FULL, or replaces it: there is a whole one at any time, and it outlives a power cut.
    ///
    /// # Errors
    /// `InvalidInput` where [`read`](Self::read) would refuse it; else what the system says.
    pub fn write(&self, full: &Path) -> io::Result<()> {
        self.check_writable(full)?;
        json_file::write(&Self::path(full), &self.to_json())?;
        // the lock may just have made the folder of the journal
        File::open(full.with_file_name("."))?.sync_all()
    }

    /// Whether it would be read again.
    ///
    /// # Errors
    /// `InvalidInput` where it would not.
    pub fn check_writable(&self, full: &Path) -> io::Result<()> {
        let refused = |reason: String| io::Error::new(ErrorKind::InvalidInput, reason);
        self.check(full).map_err(refused)?;
        let length = format!("{:#}\n", self.to_json()).len() as u64;
        if length > MAX_CONFIG_BYTES {
            return Err(refused(format!("{length} bytes long, at most {MAX_CONFIG_BYTES} are read")));
        }
        match std::fs::symlink_metadata(Self::path(full)) {
            Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => Err(error)?,
            _ => {}
        }
        Ok(())
    }

    /// Removes the journal of a FULL, so that it stays away after a power cut. It may be gone already.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(full: &Path) -> io::Result<()> {
        match std::fs::remove_file(Self::path(full)) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(()),
            removed => removed.and_then(|()| File::open(full.with_file_name(BOOKKEEPING))?.sync_all()),
        }
    }

    /// The name of the last INC that the work takes.
    #[must_use]
    pub fn last(&self) -> &str {
        self.incs.last().map_or("", String::as_str)
    }

    /// The names of the INCs that the work takes.
    pub(super) fn taken(&self) -> Taken<'_> {
        let is_needed = self.work == Work::Commit && self.stage == Stage::Writing;
        let names = self.incs.iter().map(String::as_str).collect();
        Taken { names, may_be_gone: !is_needed, full_id: self.full_id }
    }

    /// Says what is wrong where it is not the journal of this FULL, or may not be acted upon: the names are of files
    /// that will be removed.
    fn check(&self, full: &Path) -> Result<(), String> {
        if full.file_name() != Some(self.full.as_ref()) {
            return Err(format!("of the FULL {:?}, not of the one beside it", self.full));
        }
        let is_inc = |name: &str| {
            let parsed = ImageName::parse(name.as_ref()).filter(|name| name.level == Level::Inc && !name.partial);
            parsed.is_some() && !name.contains('/')
        };
        if let Some(name) = self.incs.iter().find(|name| !is_inc(name)) {
            return Err(format!("{name:?} is no name of an INC"));
        }
        if self.incs.is_empty() { Err("names no INC".to_owned()) } else { Ok(()) }
    }

    fn to_json(&self) -> Value {
        let mut value = json!({
            "version": VERSION,
            "work": self.work.as_str(),
            "phase": self.stage.as_str(),
            "full": self.full,
            "incs": self.incs,
            "full-id": self.full_id.map(|id| id.to_string()),
        });
        if let Some(keys) = value.as_object_mut() {
            seal(keys);
        }
        value
    }

    fn parse(value: &Value) -> Result<Self, String> {
        let version = value.get("version").and_then(Value::as_u64).ok_or("no version")?;
        if !(1..=VERSION).contains(&version) {
            return Err(format!("version {version}, known is {VERSION}"));
        }
        if version > 1 && value.as_object().and_then(seal_fits) != Some(true) {
            return Err("damaged: its crc32 does not fit".to_owned());
        }
        let text = |key: &str| value.get(key).and_then(Value::as_str).ok_or_else(|| format!("no {key}"));
        let (work, phase) = (text("work")?, text("phase")?);
        let incs = value.get("incs").and_then(Value::as_array).ok_or("no incs")?.iter();
        Ok(Self {
            work: Work::ALL.into_iter().find(|known| known.as_str() == work).ok_or(format!("work is {work:?}"))?,
            stage: Stage::ALL.into_iter().find(|known| known.as_str() == phase).ok_or(format!("phase is {phase:?}"))?,
            full: text("full")?.to_owned(),
            incs: incs.map(|inc| inc.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or("incs are no names")?,
            full_id: value.get("full-id").and_then(Value::as_str).and_then(ImageId::parse),
        })
    }
}

/// The INCs that unfinished work takes.
#[derive(Debug, Default)]
pub(super) struct Taken<'a> {
    names: BTreeSet<&'a str>,
    may_be_gone: bool,
    full_id: Option<ImageId>,
}

impl Taken<'_> {
    pub(super) fn contains(&self, inc: &Image) -> bool {
        inc.name().to_str().is_some_and(|name| self.has(name))
    }

    /// Whether one of them has this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Whether the FULL had this id before it.
    pub(super) fn was_full(&self, id: ImageId) -> bool {
        self.full_id == Some(id)
    }

    /// Whether it is one of them, and the FULL may hold all of it already.
    pub(super) fn may_be_gone(&self, inc: &Image) -> bool {
        self.may_be_gone && self.contains(inc)
    }
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (work, last) = (self.work, self.last());
        write!(
            f,
            "a {work} up to {last} was begun and not finished: unless it goes on, run `qmprestore {work}` again with --until \
             {last}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "FULL-100-d";

    fn unfinished() -> Unfinished {
        Unfinished {
            work: Work::Commit,
            stage: Stage::Writing,
            full: FULL.to_owned(),
            incs: vec!["INC-200-d".to_owned(), "INC-300-d".to_owned()],
            full_id: ImageId::parse("0123456789abcdef0123456789abcdef"),
        }
    }

    #[test]
    fn a_journal_is_read_as_it_was_written_and_gone_when_removed() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join(FULL);
        assert_eq!(Unfinished::read(&full).unwrap(), None);
        for (work, stage) in [(Work::Commit, Stage::Writing), (Work::SnapshotRebase, Stage::Removing)] {
            let written = Unfinished { work, stage, ..unfinished() };
            written.write(&full).unwrap();
            assert_eq!(Unfinished::read(&full).unwrap(), Some(written));
        }
        assert!(folder.path().join(".qmpbackup/FULL-100-d.in-place.json").is_file());
        Unfinished::remove(&full).unwrap();
        Unfinished::remove(&full).unwrap();
        assert_eq!(Unfinished::read(&full).unwrap(), None);
        Unfinished::remove(Path::new("nowhere/FULL-100-d")).unwrap();
    }

    #[test]
    fn a_damaged_journal_is_not_none() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join(FULL);
        unfinished().write(&full).unwrap();
        let mut texts = vec![String::new(), "{".to_owned(), "[]".to_owned(), "7".to_owned(), "[".repeat(100_000)];
        for (key, value) in [
            ("version", json!(3)),
            ("version", json!(null)),
            ("work", json!("rebase")),
            ("phase", json!("")),
            ("full", json!("FULL-200-d")),
            ("incs", json!([])),
            ("incs", json!("INC-200-d")),
            ("incs", json!([7])),
        ] {
            let mut changed = unfinished().to_json();
            changed[key] = value;
            seal(changed.as_object_mut().unwrap());
            texts.push(changed.to_string());
        }
        for text in texts {
            std::fs::write(Unfinished::path(&full), &text).unwrap();
            assert_eq!(Unfinished::read(&full).unwrap_err().kind(), ErrorKind::InvalidData, "{text}");
        }
        std::fs::remove_file(Unfinished::path(&full)).unwrap();
        std::fs::create_dir(Unfinished::path(&full)).unwrap();
        assert!(Unfinished::read(&full).is_err());
    }

    #[test]
    fn a_journal_of_before_checksums_is_read_and_no_flipped_bit_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join(FULL);
        let mut old = unfinished().to_json();
        old["version"] = 1.into();
        old.as_object_mut().unwrap().remove("crc32");
        std::fs::create_dir(folder.path().join(BOOKKEEPING)).unwrap();
        std::fs::write(Unfinished::path(&full), old.to_string()).unwrap();
        assert_eq!(Unfinished::read(&full).unwrap(), Some(unfinished()));

        unfinished().write(&full).unwrap();
        let text = std::fs::read(Unfinished::path(&full)).unwrap();
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(Unfinished::path(&full), &flipped).unwrap();
            // white space may become other white space
            let read = Unfinished::read(&full).unwrap_or_else(|_| Some(unfinished()));
            assert_eq!(read, Some(unfinished()), "{}", String::from_utf8_lossy(&flipped));
        }
    }

    #[test]
    fn only_names_of_incs_are_written_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join(FULL);
        unfinished().write(&full).unwrap();
        for name in ["", ".", "..", "INC-200-a/b", "../INC-200-d", FULL, "uuid", "INC-200-d.partial", "/INC-200-d"] {
            let bad = Unfinished { incs: vec!["INC-200-d".to_owned(), name.to_owned()], ..unfinished() };
            assert_eq!(bad.write(&full).unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
            std::fs::write(Unfinished::path(&full), bad.to_json().to_string()).unwrap();
            assert_eq!(Unfinished::read(&full).unwrap_err().kind(), ErrorKind::InvalidData, "{name}");
        }
    }

    #[test]
    fn a_journal_of_more_than_a_mebibyte_is_neither_written_nor_read() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join(FULL);
        let of =
            |count: usize| Unfinished { incs: vec![format!("INC-200-{}", "d".repeat(200)); count], ..unfinished() };
        of(4000).write(&full).unwrap();
        assert_eq!(Unfinished::read(&full).unwrap(), Some(of(4000)));
        assert_eq!(of(6000).write(&full).unwrap_err().kind(), ErrorKind::InvalidInput);
        std::fs::write(Unfinished::path(&full), of(6000).to_json().to_string()).unwrap();
        assert_eq!(Unfinished::read(&full).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn a_journal_says_what_to_do() {
        let text = Unfinished { work: Work::SnapshotRebase, ..unfinished() }.to_string();
        assert!(
            text.starts_with("a snapshotrebase up to INC-300-d was begun and not finished: unless it goes on, run"),
            "{text}"
        );
        assert!(text.ends_with("`qmprestore snapshotrebase` again with --until INC-300-d"), "{text}");
    }
}
