//! The `.config` beside a disk's images: what `qemu-img info --output json` said of the disk, and the format of its images
//! where we made them.
//!
//! Only the formats are taken from it. They come from the machine that ran the VM, never from what a guest wrote.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{MAX_ENTRIES, Note, json_file};
use crate::storage::read_folder;

/// Larger files are not read: `qemu-img info` prints some kilobytes, and a description of a thousand snapshots fits.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The folder of the image, and how many above it may hold its settings: that of all disks, and that of all months.
const FOLDERS: usize = 3;

/// The format of the images, where it is not that of the disk: other tools do not have this.
pub(crate) const BACKUP_FORMAT: &str = "backup-format";

/// The format of an image, as far as the files beside it tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FormatHint {
    /// The settings say qcow2.
    Qcow2,
    /// The settings say raw.
    Raw,
    /// The settings say only that the disk was raw: the images of another tool are raw, too.
    RawDisk,
    /// There are no settings, or they name another format.
    Unknown,
}

impl FormatHint {
    /// The name of the format; empty where it is unknown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw | Self::RawDisk => "raw",
            Self::Unknown => "",
        }
    }

    /// The format of this name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        [Self::Qcow2, Self::Raw].into_iter().find(|format| format.as_str() == name)
    }
}

/// Reads each `.config` once.
#[derive(Debug, Default)]
pub(super) struct Configs {
    known: BTreeMap<PathBuf, Result<Option<FormatHint>, String>>,
}

impl Configs {
    /// The format of a disk's images in a folder; without a name of the disk, what the only settings of the nearest
    /// folder with any say. What is wrong with them is added to the notes.
    pub(super) fn format(&mut self, folder: &Path, disk: Option<&OsStr>, notes: &mut Vec<Note>) -> FormatHint {
        for folder in folder.ancestors().take(FOLDERS) {
            let path = match disk {
                Some(disk) => file_for(folder, disk),
                None => match all(folder).as_slice() {
                    [] => continue,
                    [only] => only.clone(),
                    _ => return FormatHint::Unknown,
                },
            };
            match self.known.entry(path.clone()).or_insert_with(|| read(&path)) {
                Ok(Some(format)) => return *format,
                Ok(None) => {}
                Err(reason) => {
                    let note = Note::Config { path, reason: reason.clone() };
                    if !notes.contains(&note) {
                        notes.push(note);
                    }
                }
            }
        }
        FormatHint::Unknown
    }
}

/// The settings of a disk in a folder, there or not.
pub(super) fn file_for(folder: &Path, disk: &OsStr) -> PathBuf {
    let mut name = OsString::from(disk);
    name.push(".config");
    folder.join(name)
}

fn all(folder: &Path) -> Vec<PathBuf> {
    let entries = read_folder(folder).into_iter().flatten().take(MAX_ENTRIES).flatten();
    let names = entries.map(|(name, _)| name);
    let configs = names.filter(|name| name.as_bytes().ends_with(b".config") && !name.as_bytes().starts_with(b"."));
    configs.map(|name| folder.join(name)).filter(|path| path.is_file()).collect()
}

/// The format in a file; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<FormatHint>, String> {
    let Some(value) = json_file::read(path).map_err(|error| error.to_string())? else { return Ok(None) };
    let format = |key: &str| value.get(key).and_then(Value::as_str);
    match (format(BACKUP_FORMAT), format("format")) {
        (Some("qcow2"), _) | (None, Some("qcow2")) => Ok(Some(FormatHint::Qcow2)),
        (Some("raw"), _) => Ok(Some(FormatHint::Raw)),
        (None, Some("raw")) => Ok(Some(FormatHint::RawDisk)),
        (Some(_), _) | (None, Some(_)) => Ok(Some(FormatHint::Unknown)),
        (None, None) => Err("names no format".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hint(folder: &Path, disk: Option<&OsStr>) -> FormatHint {
        Configs::default().format(folder, disk, &mut Vec::new())
    }

    fn format(text: &[u8]) -> (FormatHint, usize) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("disk.config"), text).unwrap();
        let mut notes = Vec::new();
        let format = Configs::default().format(folder.path(), Some(OsStr::new("disk")), &mut notes);
        (format, notes.len())
    }

    #[test]
    fn the_format_is_what_the_settings_say() {
        assert_eq!(format(br#"{"format": "qcow2", "filename": "/x"}"#), (FormatHint::Qcow2, 0));
        assert_eq!(format(br#"{"format": "raw"}"#), (FormatHint::RawDisk, 0));
        assert_eq!(format(br#"{"format": "raw", "backup-format": "qcow2"}"#), (FormatHint::Qcow2, 0));
        assert_eq!(format(br#"{"format": "qcow2", "backup-format": "raw"}"#), (FormatHint::Raw, 0));
        assert_eq!(format(br#"{"format": "raw", "backup-format": "new"}"#), (FormatHint::Unknown, 0));
        assert_eq!(format(br#"{"format": "vmdk"}"#), (FormatHint::Unknown, 0));
    }

    #[test]
    fn broken_settings_are_noted_and_ignored() {
        for text in [&b""[..], b"{", b"[]", b"{}", br#"{"format": 7}"#, b"\xff", "[".repeat(100_000).as_bytes()] {
            assert_eq!(format(text), (FormatHint::Unknown, 1));
        }
    }

    #[test]
    fn settings_of_more_than_a_mebibyte_are_not_read() {
        let text = |length: usize| {
            let mut text = br#"{"format": "raw"}"#.to_vec();
            text.resize(length, b' ');
            text
        };
        let limit = usize::try_from(MAX_CONFIG_BYTES).unwrap();
        assert_eq!(format(&text(limit)), (FormatHint::RawDisk, 0));
        assert_eq!(format(&text(limit + 1)), (FormatHint::Unknown, 1));
    }

    #[test]
    fn the_nearest_sound_settings_count_up_to_two_folders_above() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b/c");
        fs::create_dir_all(&folder).unwrap();
        let disk = Some(OsStr::new("disk"));
        fs::write(root.path().join("disk.config"), r#"{"format": "raw"}"#).unwrap();
        assert_eq!(hint(&folder, disk), FormatHint::Unknown);
        fs::write(root.path().join("a/disk.config"), r#"{"format": "raw"}"#).unwrap();
        assert_eq!(hint(&folder, disk), FormatHint::RawDisk);
        fs::write(folder.join("disk.config"), r#"{"format": "qcow2"}"#).unwrap();
        assert_eq!(hint(&folder, disk), FormatHint::Qcow2);
        fs::write(folder.join("disk.config"), "broken").unwrap();
        assert_eq!(hint(&folder, disk), FormatHint::RawDisk);
    }

    #[test]
    fn a_disk_without_a_name_takes_the_only_settings() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("ide0-hd0");
        fs::create_dir(&folder).unwrap();
        fs::write(root.path().join("disk.config"), r#"{"format": "raw"}"#).unwrap();
        assert_eq!(hint(&folder, None), FormatHint::RawDisk);
        fs::write(root.path().join("other.config"), r#"{"format": "raw"}"#).unwrap();
        assert_eq!(hint(&folder, None), FormatHint::Unknown);
    }
}
