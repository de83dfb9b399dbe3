//! What a run writes down before it does it, so that another can end what it has begun.
//!
//! `TARGET/.qmpbackup/run.json` is there from before the first change until after the last. Until all images are whole it
//! says what to remove; from then on, what name each of them gets.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::name::partial_path;
use super::{BOOKKEEPING, ImageName, json_file};

/// The end of the name of a fleece image.
pub(crate) const FLEECE: &str = ".fleece.qcow2";

/// The journal's own version: the first had no checksum.
pub(crate) const RUN_JOURNAL_VERSION: u64 = 2;

/// An image on the way to its name; paths are below the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunEntry {
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
pub(crate) struct RunJournal {
    /// The time of its restore point.
    pub(crate) time: i64,
    /// The chain; none with COPY.
    pub(crate) chain: Option<String>,
    /// Whether all images are whole.
    pub(crate) publishing: bool,
    /// The images.
    pub(crate) entries: Vec<RunEntry>,
    /// The fleece images.
    pub(crate) fleece: Vec<PathBuf>,
}

impl RunJournal {
    pub(crate) fn path(target: &Path) -> PathBuf {
        target.join(BOOKKEEPING).join("run.json")
    }

    /// Reads the journal of a target; none is there where no run has died.
    ///
    /// # Errors
    /// `InvalidData` where it cannot be understood; else what the system says.
    pub(crate) fn read(target: &Path) -> io::Result<Option<Self>> {
        match json_file::read(&Self::path(target)) {
            Ok(Some(value)) => Self::parse(&value).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into()),
            Ok(None) => Ok(None),
            // a link that leads nowhere is no journal of ours, and is replaced
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Nothing in it leads out of the target, but for fleece images, which have the time of the run in their names.
    fn parse(value: &Value) -> Option<Self> {
        match (value.get("version")?.as_u64()?, json_file::seal_fits(value.as_object()?)) {
            (RUN_JOURNAL_VERSION, Some(true)) | (1, None) => {}
            _ => return None,
        }
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let entries = value.get("images")?.as_array()?.iter().map(|entry| {
            let below = |key| entry.get(key).and_then(Value::as_str).and_then(below);
            let image = below("image")?;
            Some(RunEntry {
                disk: text(entry, "disk")?,
                partial: below("partial").filter(|path| *path == partial_path(&image))?,
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
            fleece: fleece.filter_map(|path| fleece_path(path.as_str()?, time)).collect(),
        })
    }
}

/// The path of a fleece image of the run of this time; `None` where it is none.
fn fleece_path(text: &str, time: i64) -> Option<PathBuf> {
    let path = PathBuf::from(text);
    // it begins as the name of the image
    let stem = path.file_name()?.to_str()?.strip_suffix(FLEECE)?;
    let name = ImageName::parse(OsStr::new(stem))?;
    (path.is_absolute() && name.time == time).then_some(path)
}

/// A path that stays below where it starts.
fn below(text: &str) -> Option<PathBuf> {
    let path = PathBuf::from(text);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    (inside && path.file_name().is_some()).then_some(path)
}
