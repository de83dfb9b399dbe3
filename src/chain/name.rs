//! The names of images: level, time and disk, as `FULL-1643308898-disk.qcow2` spells them.
//!
//! Names are bytes, not text: a disk may be called anything that a file system allows.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The end of the name of an image that is not whole.
pub(super) const PARTIAL: &[u8] = b".partial";

/// Files that lie beside images and are named like them, but are none: logs, checksums, settings, leftovers of editors.
const SIDECARS: [&[u8]; 18] = [
    b".config", b".json", b".log", b".txt", b".md5", b".sha1", b".sha256", b".sha512", b".asc", b".sig", b".lock",
    b".pid", b".sock", b".swp", b".swo", b".bak", b".orig", b".tmp",
];

/// What an image holds, in the order of images of the same second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// The whole disk, outside of any chain: no INC builds on it.
    Copy,
    /// The whole disk, first of a chain.
    Full,
    /// What changed since the image before it.
    Inc,
}

impl Level {
    pub(super) const ALL: [Self; 3] = [Self::Copy, Self::Full, Self::Inc];

    /// The level as file names spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "COPY",
            Self::Full => "FULL",
            Self::Inc => "INC",
        }
    }

    /// The level that a name begins with, and what follows its dash.
    pub(super) fn split(name: &[u8]) -> Option<(Self, &[u8])> {
        Self::ALL
            .into_iter()
            .find_map(|level| Some((level, name.strip_prefix(level.as_str().as_bytes())?.strip_prefix(b"-")?)))
    }
}

/// Whether an image without a time would be taken for something else if it had this name: for one with a time, a link that
/// tells a level, or no image at all; or its manifest for another file of the folder.
#[cfg_attr(not(any(feature = "capture", test)), expect(dead_code, reason = "only a backup makes names"))]
pub(crate) fn means_else(name: &OsStr) -> bool {
    const FILES: [&str; 2] = ["run", "verified"];
    is_stray(name)
        || ImageName::parse(name).is_some()
        || Level::split(name.as_bytes()).is_some()
        || FILES.iter().any(|file| name == *file)
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The name of an image that has a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName {
    /// What the image holds.
    pub level: Level,
    /// Seconds since 1970.
    pub time: i64,
    /// The base name of the disk's file; the oldest layout goes without.
    pub disk: Option<OsString>,
    /// Whether the name ends in `.partial`: the image is not whole.
    pub partial: bool,
}

impl ImageName {
    /// Reads `LEVEL-TIME`, `LEVEL-TIME-DISK` and both with `.partial` at the end; anything else is `None`.
    #[must_use]
    pub fn parse(name: &OsStr) -> Option<Self> {
        if is_stray(name) {
            return None;
        }
        let (stem, partial) = strip_partial(name);
        let (level, rest) = Level::split(stem)?;
        let (digits, rest) = rest.split_at_checked(rest.iter().take_while(|byte| byte.is_ascii_digit()).count())?;
        let time = std::str::from_utf8(digits).ok()?.parse().ok()?;
        let disk = match rest.split_first() {
            None => None,
            Some((b'-', disk)) if !disk.is_empty() => Some(OsString::from_vec(disk.to_vec())),
            Some(_) => return None,
        };
        Some(Self { level, time, disk, partial })
    }

    /// The file name that [`ImageName::parse`] reads.
    #[must_use]
    pub fn file_name(&self) -> OsString {
        let mut name = OsString::from(format!("{}-{}", self.level, self.time));
        if let Some(disk) = &self.disk {
            name.push("-");
            name.push(disk);
        }
        if self.partial {
            name.push(OsStr::from_bytes(PARTIAL));
        }
        name
    }
}

/// The name of the link to the restore point that a rebase makes, in the folder of the images.
pub(crate) const POINT_LINK: &str = "image";

/// The path that an image has until it is whole.
pub(crate) fn partial_path(image: &Path) -> PathBuf {
    image.with_file_name(partial(image.file_name().unwrap_or_default()))
}

/// The name without `.partial`, and whether it was there.
pub(super) fn strip_partial(name: &OsStr) -> (&[u8], bool) {
    let bytes = name.as_bytes();
    bytes.strip_suffix(PARTIAL).map_or((bytes, false), |stem| (stem, true))
}

/// The name that an image has until it is whole.
pub(super) fn partial(name: &OsStr) -> OsString {
    OsString::from_vec([name.as_bytes(), PARTIAL].concat())
}

/// Whether a file cannot be an image, whatever else its name says: hidden files, the `uuid`, settings, logs, fleece
/// images, leftovers of editors.
pub(super) fn is_stray(name: &OsStr) -> bool {
    let (stem, _) = strip_partial(name);
    let ends_with = |end: &&[u8]| {
        stem.len()
            .checked_sub(end.len())
            .and_then(|at| stem.get(at..))
            .is_some_and(|tail| tail.eq_ignore_ascii_case(end))
    };
    stem.is_empty()
        || stem.starts_with(b".")
        || stem == b"uuid"
        || stem.ends_with(b"~")
        || (stem.starts_with(b"#") && stem.ends_with(b"#"))
        || SIDECARS.iter().any(ends_with)
        || is_fleece(stem)
}

/// `FULL-1643308898-ide0-hd0.fleece.qcow2`: scratch space of a run, left behind by one that died.
fn is_fleece(stem: &[u8]) -> bool {
    let dot = stem.iter().rposition(|byte| *byte == b'.');
    dot.and_then(|dot| stem.get(..dot)).is_some_and(|front| front.ends_with(b".fleece"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(name: &str) -> Option<(Level, i64, Option<String>, bool)> {
        let name = ImageName::parse(OsStr::new(name))?;
        Some((name.level, name.time, name.disk.map(|disk| disk.into_string().unwrap()), name.partial))
    }

    #[test]
    fn a_name_tells_level_time_and_disk() {
        let disk = |name: &str| Some(name.to_owned());
        assert_eq!(parse("FULL-1643308898-disk.qcow2"), Some((Level::Full, 1_643_308_898, disk("disk.qcow2"), false)));
        assert_eq!(parse("INC-12-my disk-1.qcow2"), Some((Level::Inc, 12, disk("my disk-1.qcow2"), false)));
        assert_eq!(parse("COPY-12-2021-11.raw"), Some((Level::Copy, 12, disk("2021-11.raw"), false)));
        assert_eq!(parse("INC-12-disk.partial"), Some((Level::Inc, 12, disk("disk"), true)));
    }

    #[test]
    fn the_oldest_names_have_no_disk() {
        assert_eq!(parse("FULL-1643308898"), Some((Level::Full, 1_643_308_898, None, false)));
        assert_eq!(parse("INC-1643308928.partial"), Some((Level::Inc, 1_643_308_928, None, true)));
    }

    #[test]
    fn what_only_looks_like_a_name_is_none() {
        for name in [
            "",
            "FULL",
            "FULL-",
            "FULL--1-disk",
            "FULL-x-disk",
            "FULL-1x-disk",
            "FULL-1-",
            "FULL-1.qcow2",
            "full-1-disk",
            "DIFF-1-disk",
            "FULL-+1-disk",
            "FULL-99999999999999999999-disk",
            "XFULL-1-disk",
            "INC-1-.partial",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    #[test]
    fn files_beside_images_are_stray() {
        for name in [
            "uuid",
            ".hidden",
            "disk.qcow2.config",
            "FULL-1-disk.qcow2.log",
            "FULL-1-ide0-hd0.fleece.qcow2",
            "INC-1-vda.fleece.raw",
            "FULL-1-disk~",
            "#FULL-1-disk#",
            ".FULL-1-disk.swp",
            "FULL-1-disk.BAK",
            "FULL-1-disk.sha256",
            ".partial",
        ] {
            assert!(is_stray(OsStr::new(name)), "{name}");
            assert_eq!(parse(name), None, "{name}");
        }
        for name in ["disk.qcow2", "log", "fleece.qcow2", "FULL-1-config", "INC-2-uuid"] {
            assert!(!is_stray(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn names_need_not_be_text() {
        let name = OsString::from_vec(b"INC-5-d\xff\xfe".to_vec());
        let parsed = ImageName::parse(&name).unwrap();
        assert_eq!(parsed.disk.as_deref().unwrap().as_bytes(), b"d\xff\xfe");
        assert_eq!(parsed.file_name(), name);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_name_or_none(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let name = OsString::from_vec(bytes);
            if let Some(parsed) = ImageName::parse(&name) {
                prop_assert_eq!(ImageName::parse(&parsed.file_name()), Some(parsed));
            }
        }

        #[test]
        fn names_round_trip(
            level in prop::sample::select(&Level::ALL[..]),
            time in 0..=i64::MAX,
            disk in prop::option::of(prop::collection::vec(1..=255_u8, 1..20)),
            partial: bool,
        ) {
            let disk = disk.map(OsString::from_vec);
            let name = ImageName { level, time, disk, partial };
            prop_assume!(!is_stray(&name.file_name()) && !name.disk.iter().any(|disk| strip_partial(disk).1));
            prop_assert_eq!(ImageName::parse(&name.file_name()), Some(name));
        }
    }
}
