//! FULL or INC, and why.
//!
//! Pure: from what is asked, the images that there are and the bitmaps to a level for each disk.

use std::path::Path;

use crate::capture::event::Severity;
use crate::capture::folder::history::{History, Newest};
use crate::capture::machine::device::Bitmap;
use crate::capture::order::settle::Bitmaps;
use crate::capture::request::RequestedLevel;
use crate::chain::Level;

/// What is known of a disk when its level is decided.
#[derive(Debug)]
pub(super) struct Situation<'a> {
    /// Its images.
    pub(super) history: &'a History,
    /// Its bitmaps of the chain.
    pub(super) bitmaps: &'a Bitmaps<'a>,
    /// The names of bitmaps on the images below it.
    pub(super) bitmaps_below: &'a [String],
    /// Its size now.
    pub(super) size: u64,
    /// Whether QEMU can keep its bitmaps when it ends.
    pub(super) persistent: bool,
    /// Whether another disk of the machine has images here.
    pub(super) others_have_images: bool,
}

/// What a disk gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision<'a> {
    /// An image of this level.
    Take {
        level: Level,
        /// What an INC follows.
        old: Option<&'a Bitmap>,
        reason: String,
        severity: Severity,
    },
    /// Nothing: there is no FULL.
    NoFull,
    /// Nothing: the chain cannot go on.
    Broken { reason: String },
}

impl<'a> Decision<'a> {
    fn full(reason: impl Into<String>, severity: Severity) -> Self {
        Self::Take { level: Level::Full, old: None, reason: reason.into(), severity }
    }

    pub(super) fn new(wanted: RequestedLevel, situation: &Situation<'a>) -> Self {
        match wanted {
            RequestedLevel::Copy => {
                Self::Take { level: Level::Copy, old: None, reason: "as asked".to_owned(), severity: Severity::Info }
            }
            RequestedLevel::Full => Self::full("as asked", Severity::Info),
            RequestedLevel::Inc | RequestedLevel::Auto => Self::next(wanted, situation),
        }
    }

    fn next(wanted: RequestedLevel, situation: &Situation<'a>) -> Self {
        let Some(newest) = &situation.history.newest else {
            return match wanted {
                _ if situation.others_have_images => Self::full("the disk is new in this backup", Severity::Notice),
                RequestedLevel::Auto => Self::full("there is none in the folder yet", Severity::Info),
                _ => Self::NoFull,
            };
        };
        if newest.size.is_some_and(|size| size != situation.size) {
            let before = newest.size.unwrap_or_default();
            let reason = format!("the disk was resized from {before} to {} bytes", situation.size);
            return Self::full(reason, Severity::Notice);
        }
        match usable(newest, situation) {
            Ok(old) => Self::Take {
                level: Level::Inc,
                old: Some(old),
                reason: format!("on top of {}", name(&newest.path)),
                severity: Severity::Info,
            },
            // the bitmap ended with QEMU, as it had to
            Err(Unusable::Absent(_)) if !situation.persistent => {
                Self::full("no bitmap is left of the newest image: those of this disk end with QEMU", Severity::Notice)
            }
            Err(Unusable::Absent(reason) | Unusable::Bad(reason)) if wanted == RequestedLevel::Auto => {
                Self::full(format!("no INC can follow: {reason}"), Severity::Warning)
            }
            Err(Unusable::Absent(reason) | Unusable::Bad(reason)) => Self::Broken { reason },
        }
    }
}

enum Unusable {
    Absent(String),
    Bad(String),
}

/// The bitmap that holds all that was written since the newest image.
fn usable<'a>(newest: &Newest, situation: &Situation<'a>) -> Result<&'a Bitmap, Unusable> {
    if let Some(partial) = &situation.history.partial {
        return Err(Unusable::Bad(format!("a run before failed and left {}", partial.display())));
    }
    if let Some(fault) = &newest.fault {
        return Err(Unusable::Bad(fault.clone()));
    }
    let bitmap = situation.bitmaps.since(newest.time.unwrap_or(i64::MIN));
    // that of another disk, which had this name before, or of a tool that made images before
    let bitmap = bitmap.filter(|bitmap| newest.bitmap.as_ref().is_none_or(|own| *own == bitmap.name));
    let bitmap = bitmap.ok_or_else(|| {
        let other = situation.bitmaps.last().map_or_else(
            || {
                "; the disk has none of this chain: it was restored or exchanged, QEMU was killed before it stored one, or \
                 somebody has removed it, or the file uuid of the folder"
                    .to_owned()
            },
            |other| {
                format!(
                    "; {} is of another image: perhaps another folder has the same uuid, images were removed, or the disk was \
                     read-only when the newest was made",
                    other.name
                )
            },
        );
        Unusable::Absent(format!("no bitmap goes back to the newest image{other}"))
    })?;
    let bad = |what: &str| Err(Unusable::Bad(format!("the bitmap {} {what}", bitmap.name)));
    // who takes an external snapshot may begin an empty one on the overlay for each that is there
    if situation.bitmaps_below.contains(&bitmap.name) {
        return bad("is on an image below, too: it lacks what was written before the snapshot");
    }
    if bitmap.inconsistent {
        return bad("is inconsistent, QEMU did not end orderly");
    }
    if bitmap.busy {
        return bad("is used by another job");
    }
    if !bitmap.recording {
        return bad("is disabled: writes may be missing in it");
    }
    Ok(bitmap)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let newest = Newest {
            path: "/t/disk/FULL-5-disk".into(),
            time: Some(5),
            id: None,
            bitmap: None,
            size: Some(100),
            fault: None,
        };
        History { newest: Some(newest), partial: None, latest: Some(5), foreign: false, chained: Vec::new() }
    }

    fn bitmap() -> Bitmap {
        Bitmap {
            name: "qmpbackup-5-c".to_owned(),
            node: "disk".to_owned(),
            count: 7,
            granularity: 65536,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
        }
    }

    /// The level and how much it matters, or why there is none.
    fn decide(
        wanted: RequestedLevel,
        history: &History,
        bitmaps: &[Bitmap],
        persistent: bool,
    ) -> Result<(Level, Severity), String> {
        let bitmaps = Bitmaps::of(bitmaps, "c", &[]);
        let situation = Situation {
            history,
            bitmaps: &bitmaps,
            bitmaps_below: &[],
            size: 100,
            persistent,
            others_have_images: false,
        };
        match Decision::new(wanted, &situation) {
            Decision::Take { level, old, severity, .. } => {
                assert_eq!(level == Level::Inc, old.is_some());
                Ok((level, severity))
            }
            Decision::NoFull => Err("no FULL".to_owned()),
            Decision::Broken { reason } => Err(reason),
        }
    }

    #[test]
    fn an_inc_needs_a_bitmap_that_goes_back_to_the_newest_image() {
        for wanted in [RequestedLevel::Inc, RequestedLevel::Auto] {
            assert_eq!(decide(wanted, &history(), &[bitmap()], true), Ok((Level::Inc, Severity::Info)));
            let python = Bitmap { name: "qmpbackup-c".to_owned(), ..bitmap() };
            assert_eq!(decide(wanted, &history(), &[python], true), Ok((Level::Inc, Severity::Info)));
        }
        let mut known = history();
        known.newest.as_mut().unwrap().bitmap = Some("qmpbackup-5-c".to_owned());
        assert_eq!(decide(RequestedLevel::Auto, &known, &[bitmap()], true), Ok((Level::Inc, Severity::Info)));
        for other in ["qmpbackup-c", "qmpbackup-5-01234567-c"] {
            let other = Bitmap { name: other.to_owned(), ..bitmap() };
            assert_eq!(
                decide(RequestedLevel::Auto, &known, std::slice::from_ref(&other), true),
                Ok((Level::Full, Severity::Warning))
            );
            assert!(decide(RequestedLevel::Inc, &known, &[other], true).unwrap_err().contains("no bitmap goes back"));
        }
        let bad = [
            Vec::new(),
            vec![Bitmap { name: "qmpbackup-4-c".to_owned(), ..bitmap() }],
            vec![Bitmap { inconsistent: true, ..bitmap() }],
            vec![Bitmap { recording: false, ..bitmap() }],
            vec![Bitmap { busy: true, ..bitmap() }],
        ];
        for bitmaps in bad {
            assert!(decide(RequestedLevel::Inc, &history(), &bitmaps, true).is_err(), "{bitmaps:?}");
            assert_eq!(decide(RequestedLevel::Auto, &history(), &bitmaps, true), Ok((Level::Full, Severity::Warning)));
        }
    }

    #[test]
    fn a_disk_whose_bitmaps_end_with_qemu_gets_a_full_when_they_have() {
        assert_eq!(decide(RequestedLevel::Inc, &history(), &[], false), Ok((Level::Full, Severity::Notice)));
        let disabled = Bitmap { recording: false, ..bitmap() };
        assert!(decide(RequestedLevel::Inc, &history(), &[disabled], false).is_err());
    }

    #[test]
    fn the_first_image_is_a_full_that_auto_makes_and_inc_does_not() {
        let none = History::default();
        assert_eq!(decide(RequestedLevel::Inc, &none, &[bitmap()], true), Err("no FULL".to_owned()));
        assert_eq!(decide(RequestedLevel::Auto, &none, &[], true), Ok((Level::Full, Severity::Info)));
        let situation = Situation {
            history: &none,
            bitmaps: &Bitmaps::of(&[], "c", &[]),
            bitmaps_below: &[],
            size: 100,
            persistent: true,
            others_have_images: true,
        };
        assert!(matches!(Decision::new(RequestedLevel::Inc, &situation), Decision::Take { level: Level::Full, .. }));
    }

    #[test]
    fn a_resized_disk_gets_a_full() {
        let mut resized = history();
        resized.newest.as_mut().unwrap().size = Some(99);
        assert_eq!(decide(RequestedLevel::Inc, &resized, &[bitmap()], true), Ok((Level::Full, Severity::Notice)));
    }

    #[test]
    fn what_another_tool_has_left_half_done_ends_the_chain() {
        let partial = History { partial: Some("/t/disk/INC-6-disk.partial".into()), ..history() };
        let mut faulty = history();
        faulty.newest.as_mut().unwrap().fault = Some("no FULL".to_owned());
        for history in [partial, faulty] {
            assert!(decide(RequestedLevel::Inc, &history, &[bitmap()], true).is_err());
            assert_eq!(decide(RequestedLevel::Auto, &history, &[bitmap()], true), Ok((Level::Full, Severity::Warning)));
            assert_eq!(decide(RequestedLevel::Full, &history, &[bitmap()], true), Ok((Level::Full, Severity::Info)));
            assert_eq!(decide(RequestedLevel::Copy, &history, &[bitmap()], true), Ok((Level::Copy, Severity::Info)));
        }
    }
}
