//! What the run that made an image knows of it and the image itself does not tell: `.qmpbackup/<image>.json` beside it.
//!
//! A JSON object of plain values, which may have more keys than these:
//!
//! ```text
//! version       2
//! image         the name of the image: one that was renamed is noticed
//! id            32 hexadecimal digits: what tells the image from all others; its checksums have it, too; or null
//! level         FULL, INC or COPY
//! time          the moment that it holds, seconds since 1970; null where nobody knows
//! chain         the id of its chain; null with COPY
//! parent        the name of the image that an INC builds on, else null
//! parent-id     the id of that image, where it has one; else null
//! bitmap        the bitmap that records what is written after it, or null
//! format        qcow2 or raw
//! virtual-size  bytes of the disk
//! qemu          the version of QEMU; empty where another tool made the image
//! crc32         8 digits: the CRC-32 of all other keys in order of the alphabet, each as `key:value` and a line end,
//!               the value as JSON
//! ```
//!
//! Version 1 had no `image`, `bitmap` and `crc32`; the ids came later to version 2. Of a version after 2 nothing is believed. Images of other tools have
//! none, until `qmprestore manifest` makes them.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::json_file::{self, seal, seal_fits};
use super::{FormatHint, ImageId, Level};

/// The folder for all bookkeeping, beside the images. Other tools list only images.
pub const BOOKKEEPING: &str = ".qmpbackup";

/// The version that is written.
const VERSION: u64 = 2;

/// The end of a manifest's name.
const EXTENSION: &str = "json";

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its name; empty in version 1.
    pub image: String,
    /// What tells it from all others; none in older manifests.
    pub id: Option<ImageId>,
    /// What it holds.
    pub level: Level,
    /// The moment that it holds, seconds since 1970, also where the name does not tell. It is later than that of the name
    /// where INCs were written into a FULL.
    pub time: Option<i64>,
    /// The id of its chain; none with COPY.
    pub chain: Option<String>,
    /// The name of the image that it builds on; INCs only.
    pub parent: Option<String>,
    /// The id of that image, where it has one.
    pub parent_id: Option<ImageId>,
    /// The bitmap that records what is written after it.
    pub bitmap: Option<String>,
    /// How its bytes are to be understood.
    pub format: FormatHint,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The version of QEMU.
    pub qemu: String,
}

/// Why there is a manifest of which nothing is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// It cannot be read, or is no JSON.
    #[error("{}", path.display())]
    Io {
        /// The manifest.
        path: PathBuf,
        /// What the system says, or where it is no JSON.
        source: io::Error,
    },
    /// A later version of this program has made it.
    #[error("{} is of version {version}: this program knows 1 to {VERSION}", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        version: u64,
    },
    /// Its bytes have changed since it was written.
    #[error("{} is damaged: its crc32 does not fit", path.display())]
    Damaged {
        /// The manifest.
        path: PathBuf,
    },
    /// A value is missing or cannot be.
    #[error("{}: {key} is missing or invalid", path.display())]
    Field {
        /// The manifest.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
}

/// The values that are texts of any kind.
const TEXTS: [&str; 5] = ["image", "chain", "parent", "bitmap", "qemu"];

/// Bytes of such a text: more than a name of a file, of a bitmap or of a release of QEMU has. All manifests of a folder are in
/// memory at once.
const TEXT_MAX: usize = 4096;

impl Manifest {
    /// Where the manifest of an image is, if it has one.
    #[must_use]
    pub fn path(image: &Path) -> PathBuf {
        beside(image, EXTENSION)
    }

    /// The name of the image whose manifest has this name.
    pub(super) fn image_of(manifest: &OsStr) -> Option<OsString> {
        let name = manifest.as_bytes().strip_suffix(b".json")?;
        Some(OsStr::from_bytes(name).to_owned())
    }

    /// The manifest of an image, where one that cannot be believed is none.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_again(image: &Path) -> io::Result<Option<Self>> {
        match Self::read(image) {
            Err(ManifestError::Io { source, .. })
                if !matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Err(source)
            }
            read => Ok(read.ok().flatten()),
        }
    }

    /// The manifest of an image; `None` where it has none.
    ///
    /// # Errors
    /// There is one, of which nothing can be believed.
    pub fn read(image: &Path) -> Result<Option<Self>, ManifestError> {
        let path = Self::path(image);
        match json_file::read(&path) {
            Ok(Some(value)) => Self::parse(&value, path).map(Some),
            Ok(None) => Ok(None),
            Err(source) => Err(ManifestError::Io { path, source }),
        }
    }

    /// Writes the manifest of an image, or replaces it: there is a whole one at any time.
    ///
    /// # Errors
    /// What the system says; the one before is still there then, unless only the last sync failed.
    pub fn write(&self, image: &Path) -> io::Result<()> {
        json_file::write(&Self::path(image), &self.to_json())
    }

    /// What the file holds.
    fn to_json(&self) -> Value {
        let mut value = json!({
            "version": VERSION,
            "image": self.image,
            "id": self.id.map(|id| id.to_string()),
            "level": self.level.as_str(),
            "time": self.time,
            "chain": self.chain,
            "parent": self.parent,
            "parent-id": self.parent_id.map(|id| id.to_string()),
            "bitmap": self.bitmap,
            "format": self.format.as_str(),
            "virtual-size": self.virtual_size,
            "qemu": self.qemu,
        });
        if let Some(keys) = value.as_object_mut() {
            seal(keys);
        }
        value
    }

    fn parse(value: &Value, path: PathBuf) -> Result<Self, ManifestError> {
        let field = |key| move |path: PathBuf| ManifestError::Field { path, key };
        let Some(keys) = value.as_object() else { return Err(field("version")(path)) };
        match (keys.get("version").and_then(Value::as_u64), seal_fits(keys)) {
            // whatever version it says that it is
            (_, Some(false)) | (Some(VERSION), None) => return Err(ManifestError::Damaged { path }),
            (Some(1), _) | (Some(VERSION), Some(true)) => {}
            (Some(version), _) => return Err(ManifestError::Version { path, version }),
            (None, _) => return Err(field("version")(path)),
        }
        let text = |key: &str| keys.get(key).and_then(Value::as_str);
        let long = TEXTS.into_iter().find(|key| text(key).is_some_and(|text| text.len() > TEXT_MAX));
        if let Some(key) = long {
            return Err(field(key)(path));
        }
        let owned = |key: &str| text(key).map(str::to_owned);
        let id = |key: &str| text(key).and_then(ImageId::parse);
        let level = text("level").and_then(|text| Level::ALL.into_iter().find(|level| level.as_str() == text));
        let format = text("format").and_then(FormatHint::parse);
        let time = keys.get("time").and_then(|time| if time.is_null() { Some(None) } else { time.as_i64().map(Some) });
        let (Some(level), Some(format), Some(time), Some(virtual_size)) =
            (level, format, time, keys.get("virtual-size").and_then(Value::as_u64))
        else {
            let key = match (level, format, time) {
                (None, ..) => "level",
                (_, None, _) => "format",
                (.., None) => "time",
                _ => "virtual-size",
            };
            return Err(field(key)(path));
        };
        Ok(Self {
            image: owned("image").unwrap_or_default(),
            id: id("id"),
            level,
            time,
            chain: owned("chain"),
            parent: owned("parent"),
            parent_id: id("parent-id"),
            bitmap: owned("bitmap"),
            format,
            virtual_size,
            qemu: owned("qemu").unwrap_or_default(),
        })
    }
}

/// A file of the bookkeeping for an image.
pub(super) fn beside(image: &Path, extension: &str) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(extension);
    image.with_file_name(BOOKKEEPING).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            image: "INC-1643308928-disk".to_owned(),
            id: ImageId::parse("0123456789abcdef0123456789abcdef"),
            level: Level::Inc,
            time: Some(1_643_308_928),
            chain: Some("id".to_owned()),
            parent: Some("FULL-1643308898-disk".to_owned()),
            parent_id: ImageId::parse("00000000000000000000000000000001"),
            bitmap: Some("qmpbackup-1643308928-id".to_owned()),
            format: FormatHint::Qcow2,
            virtual_size: 1 << 40,
            qemu: "10.0.2".to_owned(),
        }
    }

    fn parse(value: &Value) -> Result<Manifest, String> {
        Manifest::parse(value, "M".into()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_can_be_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("INC-1643308928-disk");
        assert_eq!(Manifest::read(&image).unwrap(), None);
        manifest().write(&image).unwrap();
        assert_eq!(Manifest::read(&image).unwrap(), Some(manifest()));
        // of an image of another tool
        let bare = Manifest {
            id: None,
            chain: None,
            parent: None,
            parent_id: None,
            bitmap: None,
            time: None,
            format: FormatHint::Raw,
            qemu: String::new(),
            ..manifest()
        };
        bare.write(&image).unwrap();
        assert_eq!(Manifest::read(&image).unwrap(), Some(bare));
    }

    #[test]
    fn any_flipped_bit_of_a_manifest_is_noticed_or_harms_nothing() {
        let text = manifest().to_json().to_string();
        for bit in 0..text.len() * 8 {
            let mut bytes = text.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(value) = serde_json::from_slice::<Value>(&bytes) else { continue };
            let error = parse(&value).unwrap_err();
            assert!(!error.contains("is of version"), "bit {bit} of {text}: {error}");
        }
    }

    #[test]
    fn the_version_before_had_less_and_is_read() {
        let old = json!({
            "version": 1, "level": "INC", "time": 1_643_308_928, "chain": "id", "parent": "FULL-1643308898-disk",
            "format": "qcow2", "virtual-size": 1_u64 << 40, "qemu": "10.0.2",
        });
        assert_eq!(
            parse(&old),
            Ok(Manifest { image: String::new(), id: None, parent_id: None, bitmap: None, ..manifest() })
        );
    }

    #[test]
    fn what_cannot_be_is_named() {
        let sealed = |key: &str, value: Value| {
            let mut changed = manifest().to_json();
            changed[key] = value;
            seal(changed.as_object_mut().unwrap());
            parse(&changed).unwrap_err()
        };
        for (key, value) in [
            ("level", json!("DIFF")),
            ("time", json!("x")),
            ("format", json!("vmdk")),
            ("virtual-size", json!(-1)),
            ("version", json!("2")),
        ] {
            assert_eq!(sealed(key, value), format!("M: {key} is missing or invalid"));
        }
        assert_eq!(sealed("version", json!(3)), "M is of version 3: this program knows 1 to 2");
        assert_eq!(parse(&json!([])).unwrap_err(), "M: version is missing or invalid");
    }

    #[test]
    fn a_text_that_no_name_is_as_long_as_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("FULL-1-d");
        Manifest { qemu: "x".repeat(TEXT_MAX), ..manifest() }.write(&image).unwrap();
        assert!(Manifest::read(&image).unwrap().is_some());
        Manifest { qemu: "x".repeat(TEXT_MAX + 1), ..manifest() }.write(&image).unwrap();
        assert!(matches!(Manifest::read(&image), Err(ManifestError::Field { key: "qemu", .. })));
    }
}
