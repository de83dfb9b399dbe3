//! What a run writes down before it does it, so that another can end what it has begun.
//!
//! `TARGET/.qmpbackup/run.json` is there from before the first change until after the last. Until all images are whole it
//! says what to remove; from then on, what name each of them gets.

use std::io;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use crate::capture::error::Error;
use crate::capture::folder::files;
use crate::chain::{BOOKKEEPING, json_file};

/// The journal's own version: the first had no checksum.
const VERSION: u64 = 2;

/// An image on the way to its name; paths are below the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The disk, for messages.
    pub(crate) disk: String,
    /// Its name until it is whole.
    pub(crate) partial: PathBuf,
    /// Its name from then on.
    pub(crate) image: PathBuf,
    /// The link beside it that tells its level.
    pub(crate) link: Option<PathBuf>,
}

/// A run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Journal {
    /// The time of its restore point.
    pub(crate) time: i64,
    /// The chain; none with COPY.
    pub(crate) chain: Option<String>,
    /// Whether all images are whole.
    pub(crate) publishing: bool,
    /// The images.
    pub(crate) entries: Vec<Entry>,
    /// The fleece images.
    pub(crate) fleece: Vec<PathBuf>,
}

impl Journal {
    fn path(target: &Path) -> PathBuf {
        target.join(BOOKKEEPING).join("run.json")
    }

    /// Reads the journal of a target; none is there where no run has died.
    pub(crate) fn read(target: &Path) -> Result<Option<Self>, Error> {
        let path = Self::path(target);
        let value = match json_file::read(&path) {
            Ok(Some(value)) => value,
            Ok(None) => return Ok(None),
            // a link that leads nowhere is no journal of ours, and is replaced
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) if source.kind() == io::ErrorKind::InvalidData => return Err(Error::Journal { path }),
            Err(source) => return Err(Error::Io { path, source }),
        };
        Self::parse(&value).map(Some).ok_or(Error::Journal { path })
    }

    /// Writes it, so that it outlives a power cut.
    pub(crate) fn write(&self, target: &Path) -> Result<(), Error> {
        let path = Self::path(target);
        json_file::write(&path, &self.to_json()).map_err(Error::io(&path))
    }

    /// Removes it.
    pub(crate) fn remove(target: &Path) -> Result<(), Error> {
        let path = Self::path(target);
        match std::fs::remove_file(&path) {
            Ok(()) => files::sync_folder(&target.join(BOOKKEEPING)),
            // gone, perhaps with the whole target
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    fn to_json(&self) -> Value {
        let text = |path: &Path| files::text(path);
        let entries = self.entries.iter().map(|entry| {
            json!({
                "disk": entry.disk,
                "partial": text(&entry.partial),
                "image": text(&entry.image),
                "link": entry.link.as_deref().map(text),
            })
        });
        let mut value = json!({
            "version": VERSION,
            "time": self.time,
            "chain": self.chain,
            "publishing": self.publishing,
            "images": entries.collect::<Vec<_>>(),
            "fleece": self.fleece.iter().map(|path| text(path)).collect::<Vec<_>>(),
        });
        if let Some(keys) = value.as_object_mut() {
            json_file::seal(keys);
        }
        value
    }

    /// Nothing in it leads out of the target, but for fleece images, which have the time of the run in their names.
    fn parse(value: &Value) -> Option<Self> {
        match (value.get("version")?.as_u64()?, json_file::seal_fits(value.as_object()?)) {
            (VERSION, Some(true)) | (1, None) => {}
            _ => return None,
        }
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let entries = value.get("images")?.as_array()?.iter().map(|entry| {
            let below = |key| entry.get(key).and_then(Value::as_str).and_then(below);
            let image = below("image")?;
            Some(Entry {
                disk: text(entry, "disk")?,
                partial: below("partial").filter(|path| *path == files::partial(&image))?,
                image,
                link: below("link"),
            })
        });
        let fleece = value.get("fleece")?.as_array()?.iter();
        let time = value.get("time")?.as_i64()?;
        Some(Self {
            time,
            chain: text(value, "chain"),
            publishing: value.get("publishing")?.as_bool()?,
            entries: entries.collect::<Option<_>>()?,
            fleece: fleece.filter_map(|path| files::fleece(path.as_str()?, time)).collect(),
        })
    }
}

/// A path that stays below where it starts.
fn below(text: &str) -> Option<PathBuf> {
    let path = PathBuf::from(text);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    (inside && path.file_name().is_some()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::ErrorKind;

    fn journal() -> Journal {
        Journal {
            time: 5,
            chain: Some("c".to_owned()),
            publishing: true,
            entries: vec![Entry {
                disk: "disk0".to_owned(),
                partial: "disk0/FULL-5-disk.partial".into(),
                image: "disk0/FULL-5-disk".into(),
                link: None,
            }],
            fleece: vec!["/vm/FULL-5-disk0-x.fleece.qcow2".into()],
        }
    }

    #[test]
    fn a_journal_is_read_as_it_was_written_and_gone_when_removed() {
        let target = tempfile::tempdir().unwrap();
        assert_eq!(Journal::read(target.path()).unwrap(), None);
        journal().write(target.path()).unwrap();
        assert_eq!(Journal::read(target.path()).unwrap(), Some(journal()));
        Journal::remove(target.path()).unwrap();
        Journal::remove(target.path()).unwrap();
        assert_eq!(Journal::read(target.path()).unwrap(), None);
    }

    /// Reads what somebody has changed and sealed again.
    fn parsed(mut value: Value) -> Option<Journal> {
        json_file::seal(value.as_object_mut().unwrap());
        Journal::parse(&value)
    }

    #[test]
    fn any_flipped_bit_of_a_journal_is_found() {
        let target = tempfile::tempdir().unwrap();
        journal().write(target.path()).unwrap();
        let path = Journal::path(target.path());
        let whole = std::fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, flipped).unwrap();
            match Journal::read(target.path()) {
                Err(error @ Error::Journal { .. }) => assert_eq!(error.kind(), ErrorKind::Damaged),
                // space between the values
                read => assert_eq!(read.unwrap(), Some(journal()), "{bit}"),
            }
        }
    }

    #[test]
    fn a_journal_that_leads_out_of_its_folder_is_refused() {
        for (key, path) in [("image", "../x"), ("image", "uuid"), ("partial", "a/../../x.partial"), ("partial", "disk")]
        {
            let mut value = journal().to_json();
            value["images"][0][key] = path.into();
            assert_eq!(parsed(value), None, "{path}");
        }
        let mut value = journal().to_json();
        for foreign in
            ["/etc/passwd", "/vm/FULL-6-disk0-x.fleece.qcow2", "FULL-5-disk0-x.fleece.qcow2", "/vm/x.fleece.qcow2"]
        {
            value["fleece"][0] = foreign.into();
            assert_eq!(parsed(value.clone()).unwrap().fleece, Vec::<PathBuf>::new(), "{foreign}");
        }
        assert_eq!(Journal::parse(&value), None);
        value["version"] = 3.into();
        assert_eq!(parsed(value), None);
    }
}
