//! Whether an image is qcow2 or raw, without believing what a guest wrote.
//!
//! A raw image starts with bytes of the guest, who can make it look like anything, and a damaged qcow2 image must
//! not pass as raw: so a raw image is taken for one only where everything speaks for it, and nothing that an image
//! names is ever opened because of it.

use std::ffi::OsStr;
use std::path::Path;

use super::layer::Format;
use super::source::Source;
use crate::chain::FormatHint;
use crate::qcow2::MAGIC;
use crate::storage::Storage;

/// What is known of an image before it is parsed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evidence<'a> {
    pub(super) path: &'a Path,
    /// What somebody wrote down or says.
    pub(super) hint: FormatHint,
    pub(super) start: Start,
}

impl<'a> Evidence<'a> {
    pub(super) fn of(source: &'a Source, start: Start) -> Self {
        Self { path: &source.path, hint: source.format, start }
    }
    fn told(&self) -> Option<Format> {
        match self.hint {
            FormatHint::Qcow2 => Some(Format::Qcow2),
            FormatHint::Raw => Some(Format::Raw),
            FormatHint::RawDisk | FormatHint::Unknown => None,
        }
    }
}

/// What an image starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// The magic of qcow2.
    Magic,
    /// Fields that make sense in a qcow2 header, behind a wrong magic; or nothing at all.
    Damaged,
    /// Something else.
    Foreign,
}

impl Start {
    /// # Errors
    /// What the system says.
    pub(super) fn read(storage: &dyn Storage) -> std::io::Result<Self> {
        let mut head = [0; 24];
        if storage.length() < head.len() as u64 {
            return Ok(Self::Damaged);
        }
        storage.read_exact_at(&mut head, 0)?;
        Ok(match head {
            _ if head.starts_with(&MAGIC.to_be_bytes()) => Self::Magic,
            [_, _, _, _, 0, 0, 0, 2 | 3, .., 0, 0, 0, 9..=21] => Self::Damaged,
            _ => Self::Foreign,
        })
    }
}

/// The formats of the images of a chain, oldest first.
///
/// # Errors
/// The image that may be either: one of a raw disk, made by another tool and raw, or one that its guest wrote the header of a
/// qcow2 image to; or one that we made, of which all is lost that tells so.
pub(super) fn decide(images: &[Evidence<'_>]) -> Result<Vec<Format>, usize> {
    let any_qcow2 = images.iter().any(|image| image.start == Start::Magic);
    let is_open = |image: &Evidence<'_>| image.hint == FormatHint::RawDisk;
    // a guest may write a header to its disk once, but hardly before each backup
    let is_raw = images.iter().any(|image| is_open(image) && image.start != Start::Magic);
    // who makes an INC of a raw disk makes it in the format of what it builds on
    let mut before = None;
    let one = |(number, image): (usize, &Evidence<'_>)| {
        let told = image.told();
        before = told.or(before);
        match (told.or(before.filter(|_| is_open(image))), image.start) {
            (Some(format), _) => Ok(format),
            (None, _) if is_open(image) => {
                if is_raw {
                    Ok(Format::Raw)
                } else {
                    Err(number)
                }
            }
            (None, Start::Foreign) if !any_qcow2 && !named_qcow2(image.path) => Ok(Format::Raw),
            (None, _) => Ok(Format::Qcow2),
        }
    };
    images.iter().enumerate().map(one).collect()
}

impl From<Format> for FormatHint {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => Self::Qcow2,
            Format::Raw => Self::Raw,
        }
    }
}

fn named_qcow2(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    fn decided(name: &str, told: Option<Format>, starts: &[Start]) -> Vec<Format> {
        let one = |start: &Start| Evidence {
            path: Path::new(name),
            hint: told.map_or(FormatHint::Unknown, FormatHint::from),
            start: *start,
        };
        decide(&starts.iter().map(one).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn images_of_a_raw_disk_are_raw_or_ours_or_nobody_knows() {
        use Start::{Damaged, Foreign, Magic};
        let decided = |told: Option<Format>, starts: &[Start]| {
            let one = |(number, start): (usize, &Start)| Evidence {
                path: Path::new("FULL-1-disk.raw"),
                hint: told.filter(|_| number == 0).map_or(FormatHint::RawDisk, FormatHint::from),
                start: *start,
            };
            decide(&starts.iter().enumerate().map(one).collect::<Vec<_>>())
        };
        assert_eq!(decided(None, &[Foreign, Magic, Damaged]), Ok(vec![Format::Raw; 3]));
        assert_eq!(decided(None, &[Magic]), Err(0));
        assert_eq!(decided(None, &[Magic, Magic]), Err(0));
        assert_eq!(decided(Some(Format::Qcow2), &[Magic, Magic, Damaged]), Ok(vec![Format::Qcow2; 3]));
        assert_eq!(decided(Some(Format::Raw), &[Magic, Damaged]), Ok(vec![Format::Raw; 2]));
        assert_eq!(decided(Some(Format::Raw), &[Magic, Magic]), Ok(vec![Format::Raw; 2]));
        // our INC on a FULL of another tool, and on one of which nothing tells whose it is
        let below = |start| {
            let image = |hint, start| Evidence { path: Path::new("disk.raw"), hint, start };
            decide(&[image(FormatHint::RawDisk, start), image(FormatHint::Qcow2, Magic)])
        };
        assert_eq!(below(Foreign), Ok(vec![Format::Raw, Format::Qcow2]));
        assert_eq!(below(Magic), Err(0));
    }

    #[test]
    fn a_damaged_qcow2_image_never_passes_as_raw() {
        use Start::{Damaged, Foreign, Magic};
        assert_eq!(decided("FULL-1-disk", None, &[Damaged]), [Format::Qcow2]);
        assert_eq!(decided("FULL-1-disk", None, &[Foreign, Magic]), [Format::Qcow2; 2]);
        assert_eq!(decided("FULL-1-disk.qcow2", None, &[Foreign]), [Format::Qcow2]);
        assert_eq!(decided("FULL-1-disk", Some(Format::Qcow2), &[Foreign]), [Format::Qcow2]);
    }

    #[test]
    fn a_raw_disk_is_raw_also_where_its_guest_wrote_a_qcow2_header() {
        use Start::{Damaged, Foreign, Magic};
        assert_eq!(decided("FULL-1-disk", None, &[Foreign, Foreign]), [Format::Raw; 2]);
        assert_eq!(decided("FULL-1-disk", Some(Format::Raw), &[Magic, Damaged]), [Format::Raw; 2]);
    }

    #[test]
    fn an_empty_file_is_a_damaged_image() {
        assert_eq!(Start::read(&MemoryStorage::default()).unwrap(), Start::Damaged);
    }
}
