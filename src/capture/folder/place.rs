//! Where the images of a disk lie.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::capture::error::Error;
use crate::capture::folder::history::History;
use crate::capture::folder::live::Live;
use crate::capture::machine::device::Device;
use crate::chain::{ImageName, Level};

/// Where the images of a disk lie, and what they are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The disk, for people.
    pub(crate) disk: String,
    /// The folder of its images.
    pub(crate) folder: PathBuf,
    /// What images bear of the disk's name.
    pub(crate) base: String,
    /// Its settings, as `qemu-img info` prints them.
    pub(crate) config: PathBuf,
}

impl Place {
    /// Finds a place for each disk, the one where images of it are already before any other. No two share one.
    pub(crate) fn all(target: &Path, devices: &[Device], subdir: bool, live: &Live) -> Result<Vec<Self>, Error> {
        let shared: BTreeSet<&str> = devices
            .iter()
            .enumerate()
            .filter(|(at, device)| devices.iter().take(*at).any(|before| before.base == device.base))
            .map(|(_, device)| device.base.as_str())
            .collect();
        let mut taken = BTreeSet::new();
        let mut places = Vec::new();
        for device in devices {
            let is_other = |base: &str| devices.iter().any(|other| other != device && other.base == base);
            let (name, base) = if subdir {
                folder(target, device, &taken, live)?
            } else {
                let name = device.names.first().unwrap_or(&device.base);
                (name.clone(), before(target, device, live, is_other)?.unwrap_or_else(|| device.base.clone()))
            };
            let name = unique(&name, &mut taken);
            let is_shared = shared.contains(base.as_str());
            let base = if is_shared && !subdir { format!("{name}-{base}") } else { base };
            let folder = if subdir { target.join(&name) } else { target.to_owned() };
            let configs = if is_shared && subdir { &folder } else { target };
            let config = configs.join(format!("{base}.config"));
            places.push(Self { disk: name, folder, base, config });
        }
        Ok(places)
    }

    /// The image of a level and time.
    pub(crate) fn image(&self, level: Level, time: i64, timestamp: bool) -> PathBuf {
        if !timestamp && level != Level::Inc {
            return self.folder.join(&self.base);
        }
        let name = ImageName { level, time, disk: Some(self.base.clone().into()), partial: false };
        self.folder.join(name.file_name())
    }

    /// The link that tells the level of an image without a time.
    pub(crate) fn link(&self, level: Level) -> PathBuf {
        self.folder.join(format!("{level}-{}", self.base))
    }
}

/// The first of the disk's names under which it has images, else its best name; and what the images bear.
fn folder(target: &Path, device: &Device, taken: &BTreeSet<String>, live: &Live) -> Result<(String, String), Error> {
    for name in device.names.iter().filter(|name| !taken.contains(*name)) {
        if let Some(base) = before(&target.join(name), device, live, |_| false)? {
            return Ok((name.clone(), base));
        }
    }
    Ok((device.names.first().unwrap_or(&device.base).clone(), device.base.clone()))
}

/// What the disk's images in a folder bear, if there are some.
fn before(
    folder: &Path,
    device: &Device,
    live: &Live,
    is_other: impl Fn(&str) -> bool,
) -> Result<Option<String>, Error> {
    for base in device.bases() {
        if (base == device.base || !is_other(&base)) && History::read(folder, &base, live)?.newest.is_some() {
            return Ok(Some(base));
        }
    }
    Ok(None)
}

fn unique(name: &str, taken: &mut BTreeSet<String>) -> String {
    let mut unique = name.to_owned();
    let mut number = 1;
    while !taken.insert(unique.clone()) {
        number += 1;
        unique = format!("{name}-{number}");
    }
    unique
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::capture::machine::file_name::component;

    fn device(name: &str) -> Device {
        Device {
            device: String::new(),
            qdev: None,
            node: "n".to_owned(),
            format_node: "n".to_owned(),
            names: component(name).into_iter().collect(),
            file: name.to_owned(),
            base: component(name).unwrap_or_else(|| "disk".to_owned()),
            folder: None,
            format: "qcow2".to_owned(),
            virtual_size: 0,
            cluster_size: None,
            read_only: false,
            shared: false,
            persistent: true,
            backing: Vec::new(),
            bitmaps: Vec::new(),
            image: Value::Null,
        }
    }

    #[test]
    fn whatever_a_disk_is_called_its_files_are_in_the_folder() {
        let target = tempfile::tempdir().unwrap();
        let long = "x".repeat(300);
        for name in
            ["../../etc/passwd", "/etc/passwd", "..", ".", "", "-rf", "a\0b", "\u{1b}[2J\n", "a/..", long.as_str()]
        {
            for subdir in [true, false] {
                let devices = [device(name), device(name)];
                let devices = if name.len() < 100 { &devices[..] } else { &devices[..1] };
                let places = Place::all(target.path(), devices, subdir, &Live::default()).unwrap();
                for place in places {
                    let image = place.image(Level::Full, i64::MAX, true);
                    let timeless = place.image(Level::Copy, 0, false);
                    for path in [image, timeless, place.link(Level::Copy), place.config.clone()] {
                        let below = path.strip_prefix(target.path()).unwrap();
                        let parts: Vec<_> = below.components().collect();
                        assert!((1..=2).contains(&parts.len()), "{path:?}");
                        let is_name = |part: &std::path::Component<'_>| {
                            let name = part.as_os_str().to_str().unwrap();
                            // with the longest end that it gets
                            let fits = name.len() + ".partial.json".len() <= 255;
                            fits && matches!(part, std::path::Component::Normal(_)) && !name.contains(char::is_control)
                        };
                        assert!(parts.iter().all(is_name), "{path:?}");
                    }
                }
            }
        }
    }
}
