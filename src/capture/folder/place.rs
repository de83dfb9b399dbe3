//! Where the images of a disk lie.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::capture::error::Error;
use crate::capture::folder::history::{Histories, Newest};
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
    pub(crate) fn all(
        target: &Path,
        devices: &[Device],
        subdir: bool,
        histories: &mut Histories<'_>,
    ) -> Result<Vec<Self>, Error> {
        let shared: BTreeSet<&str> = devices
            .iter()
            .enumerate()
            .filter(|(at, device)| devices.iter().take(*at).any(|before| before.base == device.base))
            .map(|(_, device)| device.base.as_str())
            .collect();
        let mut taken = BTreeSet::new();
        let mut bases: BTreeSet<String> = devices.iter().map(|device| device.base.clone()).collect();
        let mut places = Vec::new();
        for device in devices {
            let (name, base) = if subdir {
                folder(target, device, &taken, histories)?
            } else {
                // what several disks stand on is the name of the one that goes on from its newest image
                let is_free = |base: &str, newest: &Newest| {
                    let is_other = |other: &Device| other != device && other.bases().iter().any(|name| name == base);
                    !bases.contains(base) && (newest.is_followed_by(device) || !devices.iter().any(is_other))
                };
                let name = device.names.first().unwrap_or(&device.base);
                (name.clone(), before(target, device, histories, is_free)?.unwrap_or_else(|| device.base.clone()))
            };
            let name = unique(&name, &mut taken);
            let is_shared = shared.contains(base.as_str());
            let base = if is_shared && !subdir { with_name(&name, device, &base, &mut bases) } else { base };
            bases.insert(base.clone());
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

/// The name under which the disk has images that it goes on from, else the first under which it has images, else its best
/// name; and what the images bear.
fn folder(
    target: &Path,
    device: &Device,
    taken: &BTreeSet<String>,
    histories: &mut Histories<'_>,
) -> Result<(String, String), Error> {
    let free = || device.names.iter().filter(|name| !taken.contains(*name));
    for name in free() {
        if let Some((base, _)) = histories.followed_by(&target.join(name), device)? {
            return Ok((name.clone(), base));
        }
    }
    for name in free() {
        if let Some(base) = before(&target.join(name), device, histories, |_, _| true)? {
            return Ok((name.clone(), base));
        }
    }
    Ok((device.names.first().unwrap_or(&device.base).clone(), device.base.clone()))
}

/// What the disk's images in a folder bear, if there are some.
fn before(
    folder: &Path,
    device: &Device,
    histories: &mut Histories<'_>,
    is_free: impl Fn(&str, &Newest) -> bool,
) -> Result<Option<String>, Error> {
    for base in device.bases() {
        let newest = histories.of(folder, &base)?.newest;
        if newest.is_some_and(|newest| base == device.base || is_free(&base, &newest)) {
            return Ok(Some(base));
        }
    }
    Ok(None)
}

/// What images bear where several disks have files of one name: one of the disk's own names with it, which is that of no
/// other disk.
fn with_name(name: &str, device: &Device, base: &str, bases: &mut BTreeSet<String>) -> String {
    let names = std::iter::once(name).chain(device.names.iter().map(String::as_str));
    let mut all = names.map(|name| format!("{name}-{base}"));
    all.find(|name| !bases.contains(name)).unwrap_or_else(|| unique(&format!("{name}-{base}"), bases))
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
    use crate::capture::machine::device::Bitmap;
    use crate::capture::machine::file_name::component;
    use crate::capture::machine::live::Live;
    use crate::capture::names;
    use crate::chain::{FormatHint, ImageId, Manifest};

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
            bitmaps_below: Vec::new(),
            bitmaps: Vec::new(),
            image: Value::Null,
        }
    }

    /// A bitmap, and a FULL from which it goes on.
    fn full(target: &Path, base: &str, bitmap: &str) {
        let path = target.join(format!("FULL-1600000000-{base}"));
        std::fs::write(&path, "").unwrap();
        std::fs::create_dir_all(target.join(".qmpbackup")).unwrap();
        let manifest = Manifest {
            image: format!("FULL-1600000000-{base}"),
            id: None,
            level: Level::Full,
            time: Some(1_600_000_000),
            chain: None,
            parent: None,
            parent_id: None,
            bitmap: Some(bitmap.to_owned()),
            format: FormatHint::Qcow2,
            virtual_size: 1 << 20,
            qemu: String::new(),
        };
        manifest.write(&path).unwrap();
    }

    fn bases(target: &Path, devices: &[Device]) -> Vec<String> {
        let places = Place::all(target, devices, false, &mut Histories::new(&Live::default())).unwrap();
        places.into_iter().map(|place| place.base).collect()
    }

    fn bitmap(name: &str) -> Bitmap {
        Bitmap {
            node: "n".to_owned(),
            name: name.to_owned(),
            count: 0,
            granularity: 1 << 16,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
        }
    }

    /// Two overlays on what was a disk before.
    #[test]
    fn what_several_disks_stand_on_is_the_name_of_the_one_that_goes_on_from_there() {
        let target = tempfile::tempdir().unwrap();
        let overlay = |name: &str| Device { backing: vec!["base.qcow2".to_owned()], ..device(name) };
        let (first, second) = (overlay("one.qcow2"), overlay("two.qcow2"));
        let own = |device: &Device| device.base.clone();
        let epoch = names::epoch(1_600_000_000, ImageId::random().unwrap(), "chain");
        full(target.path(), "base.qcow2", &epoch);
        // nobody knows whose it was
        let both = [first.clone(), second.clone()];
        assert_eq!(bases(target.path(), &both), [own(&first), own(&second)]);
        assert_eq!(bases(target.path(), &both[..1]), ["base.qcow2"]);
        let goes_on = Device { bitmaps: vec![bitmap(&epoch)], ..second };
        assert_eq!(bases(target.path(), &[first.clone(), goes_on.clone()]), [own(&first), "base.qcow2".to_owned()]);
        // a copy of an image has its bitmaps
        let copied = Device { bitmaps: goes_on.bitmaps.clone(), ..first };
        assert_eq!(bases(target.path(), &[copied, goes_on.clone()]), ["base.qcow2".to_owned(), own(&goes_on)]);
    }

    #[test]
    fn a_name_that_is_made_for_a_disk_is_that_of_no_other() {
        let target = tempfile::tempdir().unwrap();
        let named = |id: &str, file: &str| {
            let device = device(file);
            Device { names: vec![id.to_owned(), device.base.clone()], ..device }
        };
        let devices = [named("v0", "disk"), named("v1", "disk"), named("v2", "v0-disk")];
        let bases = bases(target.path(), &devices);
        assert_eq!(bases, ["disk-disk", "v1-disk", "v0-disk"]);
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
                let places = Place::all(target.path(), devices, subdir, &mut Histories::new(&Live::default())).unwrap();
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
