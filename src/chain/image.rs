//! One image file of a disk, as its name and place tell; nothing here was read from the image.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::FormatHint;
use super::journal::Unfinished;
use super::layout::Told;
use super::manifest::Manifest;
use super::name::Level;
use super::point::Fault;

/// A file that holds an image of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Image {
    /// Where it is: the folder that was searched, and the path below.
    pub path: PathBuf,
    /// The path below the folder that was searched.
    pub relative: PathBuf,
    /// The base name of the disk's file; the oldest layout does not tell.
    pub disk: Option<OsString>,
    /// What it holds.
    pub level: Level,
    /// The moment that it holds, seconds since 1970: that of its name, or of its manifest where its name has none or a
    /// FULL holds a later one since INCs were written into it. `None` where the name is the bare name of the disk, and no
    /// manifest tells.
    pub time: Option<i64>,
    /// The time in its name, when it was made, seconds since 1970.
    pub named: Option<i64>,
    /// Whether the image is not whole, because it is being made or its run failed.
    pub partial: bool,
    /// The format that the settings beside the image claim.
    pub format: FormatHint,
    /// What is known of it from the run that made it, or why there is a manifest that tells nothing.
    pub manifest: Option<Result<Arc<Manifest>, String>>,
    /// Whether only its manifest is there. Such an image is a broken restore point and nothing else.
    pub missing: bool,
    /// The monthly folder it is in.
    pub(super) month: Option<Month>,
    /// What tells its level.
    pub(super) told: Told,
    /// The time in its name, or the earliest that one without can have been made; `None` is before everything.
    pub(super) since: Option<i64>,
    /// The moment that the manifest of a FULL claims.
    pub(super) claimed: Option<i64>,
    /// The journal of a FULL that is being written to, or what that is which cannot be read.
    pub(super) in_place: Option<Result<Arc<Unfinished>, Fault>>,
}

impl Image {
    /// The name of the file.
    #[must_use]
    pub fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    /// The name of the file for messages.
    #[must_use]
    pub fn display_name(&self) -> String {
        self.name().to_string_lossy().into_owned()
    }

    /// What is known of it from the run that made it, if that can be read.
    #[must_use]
    pub fn known(&self) -> Option<&Manifest> {
        self.manifest.as_ref()?.as_ref().ok().map(Arc::as_ref)
    }

    /// Takes level and time of a COPY from its manifest, where its name does not tell. The manifest may be that of another
    /// image which had this name: so not where a link tells otherwise, or this `is_needed` as the FULL of INCs.
    pub(super) fn take_level(&mut self, is_needed: bool) {
        let Some(copy) = self.known().filter(|manifest| manifest.level == Level::Copy) else { return };
        let time = copy.time;
        if self.level == Level::Copy || (self.told == Told::Never && !is_needed) {
            self.level = Level::Copy;
            self.time = self.named.or(time);
        }
    }

    pub(super) fn folder(&self) -> &Path {
        self.relative.parent().unwrap_or_else(|| Path::new(""))
    }

    /// When the image was made: chains are in this order.
    pub(super) fn made(&self) -> (Option<i64>, Option<Month>, Level) {
        (self.since, self.month, self.level)
    }

    /// Where the image stands among the restore points of its disk.
    pub(super) fn moment(&self) -> (Option<i64>, Option<Month>, Level) {
        (self.time.or(self.since), self.month, self.level)
    }
}

/// The year and month of a `--monthly` folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Month {
    year: i16,
    month: i8,
}

impl Month {
    /// Reads `2021-11`.
    pub(crate) fn parse(name: &OsStr) -> Option<Self> {
        let (year, month) = std::str::from_utf8(name.as_bytes()).ok()?.split_once('-')?;
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if (year.len(), month.len()) != (4, 2) || !digits(year) || !digits(month) {
            return None;
        }
        let (year, month) = (year.parse().ok()?, month.parse().ok()?);
        (1..=12).contains(&month).then_some(Self { year, month })
    }

    /// The first month that a path names.
    pub(super) fn of(path: &Path) -> Option<Self> {
        path.iter().find_map(Self::parse)
    }

    /// Its first second in Greenwich, or `None` where calendars do not reach.
    pub(super) fn start(self) -> Option<i64> {
        let first = jiff::civil::Date::new(self.year, self.month, 1).ok()?.at(0, 0, 0, 0);
        jiff::tz::TimeZone::UTC.to_timestamp(first).ok().map(jiff::Timestamp::as_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_month_is_four_digits_and_two() {
        assert_eq!(Month::parse(OsStr::new("2021-11")), Some(Month { year: 2021, month: 11 }));
        for name in ["2021-00", "2021-13", "2021-1", "21-11", "2021-11-01", "2021_11", "+021-11", "2021-+1", ""] {
            assert_eq!(Month::parse(OsStr::new(name)), None, "{name}");
        }
        assert_eq!(Month::of(Path::new("vm/2021-11/ide0-hd0")), Some(Month { year: 2021, month: 11 }));
        assert_eq!(Month { year: 2021, month: 11 }.start(), Some(1_635_724_800));
    }
}
