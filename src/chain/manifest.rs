//! What the run that made an image knows of it and the image itself does not tell: `.qmpbackup/<image>.json` beside it.
//!
//! Images of other tools have none.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Level, json_file};

/// The folder for all bookkeeping, beside the images. Other tools list only images.
pub const BOOKKEEPING: &str = ".qmpbackup";

/// The version of the file.
const VERSION: u64 = 1;

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// What it holds.
    pub level: Level,
    /// The moment that it holds, seconds since 1970, also where the name does not tell. It is later than that of the name
    /// where INCs were written into a FULL.
    pub time: i64,
    /// The id of its chain; none with COPY.
    pub chain: Option<String>,
    /// The name of the image that it builds on; INCs only.
    pub parent: Option<String>,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The version of QEMU.
    pub qemu: String,
}

impl Manifest {
    /// Where the manifest of an image is, if it has one.
    #[must_use]
    pub fn path(image: &Path) -> PathBuf {
        let mut name = image.file_name().unwrap_or_default().to_owned();
        name.push(".json");
        image.with_file_name(BOOKKEEPING).join(name)
    }

    /// The manifest of an image; one that cannot be read is none.
    #[must_use]
    pub fn read(image: &Path) -> Option<Self> {
        Self::parse(&json_file::read(&Self::path(image)).ok().flatten()?)
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
        json!({
            "version": VERSION,
            "level": self.level.as_str(),
            "time": self.time,
            "chain": self.chain,
            "parent": self.parent,
            "format": "qcow2",
            "virtual-size": self.virtual_size,
            "qemu": self.qemu,
        })
    }

    fn parse(value: &Value) -> Option<Self> {
        (value.get("version")?.as_u64()? == VERSION && value.get("format")? == "qcow2").then_some(())?;
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let level = text("level")?;
        Some(Self {
            level: Level::ALL.into_iter().find(|known| known.as_str() == level)?,
            time: value.get("time")?.as_i64()?,
            chain: text("chain"),
            parent: text("parent"),
            virtual_size: value.get("virtual-size")?.as_u64()?,
            qemu: text("qemu").unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            level: Level::Inc,
            time: 1_643_308_928,
            chain: Some("id".to_owned()),
            parent: Some("FULL-1643308898-disk".to_owned()),
            virtual_size: 1 << 40,
            qemu: "10.0.2".to_owned(),
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_can_be_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("INC-1643308928-disk");
        assert_eq!(Manifest::read(&image), None);
        manifest().write(&image).unwrap();
        assert_eq!(Manifest::read(&image), Some(manifest()));
        // of an image of another tool
        let bare = Manifest { chain: None, parent: None, qemu: String::new(), ..manifest() };
        bare.write(&image).unwrap();
        assert_eq!(Manifest::read(&image), Some(bare));
    }

    #[test]
    fn what_is_no_manifest_of_this_version_is_none() {
        assert_eq!(Manifest::parse(&manifest().to_json()), Some(manifest()));
        for (key, value) in
            [("version", json!(2)), ("format", json!("raw")), ("level", json!("DIFF")), ("time", json!("x"))]
        {
            let mut changed = manifest().to_json();
            changed[key] = value;
            assert_eq!(Manifest::parse(&changed), None, "{key}");
        }
        assert_eq!(Manifest::parse(&json!([])), None);
    }
}
