//! All that is told about an image without reading it: by its manifest, its checksums' header and its length.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::VerifyTarget;
use super::flaw::Flaw;
use crate::chain::{BLOCK, Checksums, Disk, Image, Manifest};
use crate::restore::check;
use crate::restore::error::Error;
use crate::restore::layer::Format;
use crate::restore::source::{self, Source};
use crate::storage::Storage;

/// A chain of which at least one image is verified.
pub(super) struct Members<'a> {
    /// The FULL and its INCs, also those that are missing.
    pub(super) images: Vec<&'a Arc<Image>>,
    pub(super) formats: Vec<Format>,
}

/// An image that is verified.
pub(super) struct Subject<'a> {
    pub(super) disk: &'a Disk,
    pub(super) image: &'a Arc<Image>,
    /// The number of its chain, and its place there.
    pub(super) chain: usize,
    pub(super) depth: usize,
    pub(super) format: Format,
    /// Whether it may be of another format.
    pub(super) is_either: bool,
    /// The image before it in its chain.
    pub(super) before: Option<&'a Path>,
    /// Whether work in the FULL of its chain was begun and has not ended.
    pub(super) in_work: bool,
}

/// What is known of an image before it is read.
pub(super) struct Looked {
    /// Bytes of its file.
    pub(super) length: u64,
    /// The size of its disk, as the manifest says.
    pub(super) disk_size: Option<u64>,
    pub(super) sums: Option<Sums>,
    /// Whether it can be opened.
    pub(super) open: bool,
    pub(super) flaws: Vec<Flaw>,
}

/// What the header of its checksums says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) list: u32,
    pub(super) length: u64,
    pub(super) unsettled: Range<u64>,
}

impl Sums {
    pub(super) fn of(sums: &Checksums) -> Self {
        Self { list: sums.list_sum(), length: sums.length(), unsettled: sums.unsettled() }
    }
}

impl Subject<'_> {
    pub(super) fn source(&self) -> Source {
        Source::from(&**self.image)
    }
}

impl Looked {
    /// The blocks that can be compared.
    pub(super) fn blocks(&self) -> u64 {
        let sums = self.sums.as_ref().filter(|_| self.open);
        sums.map_or(0, |sums| sums.length.min(self.length).div_ceil(BLOCK))
    }
}

/// The images to verify, and their chains.
pub(super) fn subjects<'a>(targets: &[VerifyTarget<'a>]) -> (Vec<Members<'a>>, Vec<Subject<'a>>) {
    let (mut chains, mut subjects) = (Vec::new(), Vec::new());
    for target in targets {
        let (disk, point) = match *target {
            VerifyTarget::Disk(disk) => (disk, None),
            VerifyTarget::Point(disk, point) => (disk, Some(point)),
        };
        let wanted = |image: &Arc<Image>| {
            !image.missing && point.is_none_or(|point| point.members.iter().any(|member| Arc::ptr_eq(member, image)))
        };
        for chain in disk.chains() {
            let images: Vec<&Arc<Image>> = chain.images().collect();
            if !images.iter().any(|image| wanted(image)) {
                continue;
            }
            let in_work = chain.unfinished().is_some();
            let sources: Vec<Source> = images.iter().map(|image| Source::from(&***image)).collect();
            let formats = check::formats(&sources);
            let is_either = formats.is_err();
            // of what has no tables no tables are checked
            let formats = formats.unwrap_or_else(|_| vec![Format::Raw; sources.len()]);
            let before = std::iter::once(None).chain(images.iter().map(|image| Some(image.path.as_path())));
            let members = images.iter().zip(&formats).zip(before).enumerate();
            let wanted = members.filter(|(_, ((image, _), _))| wanted(image));
            subjects.extend(wanted.map(|(depth, ((image, format), before))| Subject {
                disk,
                image,
                chain: chains.len(),
                depth,
                format: *format,
                is_either,
                before,
                in_work,
            }));
            chains.push(Members { images, formats });
        }
    }
    (chains, subjects)
}

pub(super) fn look(subject: &Subject<'_>) -> Looked {
    let path = subject.image.path.as_path();
    let mut looked = Looked { length: 0, disk_size: None, sums: None, open: false, flaws: Vec::new() };
    // nobody changes anything of it while it is locked
    let storage = match source::open_locked(&subject.source()) {
        Ok(storage) => storage,
        Err(error) => {
            looked.flaws.push(Flaw::Unreadable(error));
            return looked;
        }
    };
    looked.length = storage.length();
    looked.open = true;
    if subject.is_either {
        looked.flaws.push(Flaw::Unreadable(Error::EitherFormat { path: path.to_owned() }));
    }
    match Manifest::read(path) {
        Ok(manifest) => {
            let is_known = subject.image.manifest.as_ref().is_none_or(Result::is_ok);
            if is_known && manifest.as_ref() != subject.image.known() {
                looked.open = false;
                looked.flaws.push(Flaw::Unreadable(Error::Changed));
            }
            looked.disk_size = manifest.as_ref().map(|manifest| manifest.virtual_size);
            looked.flaws.extend(manifest.is_none().then_some(Flaw::NoManifest));
        }
        Err(error) => looked.flaws.push(Flaw::Manifest(error)),
    }
    match Checksums::open(path) {
        Ok(Some(sums)) => {
            let sums = Sums::of(&sums);
            // what is changed in place may become longer
            let may_be_longer = !sums.unsettled.is_empty() && sums.length < looked.length;
            if sums.length != looked.length && !may_be_longer {
                looked.flaws.push(Flaw::Length { is: looked.length, should: sums.length });
            }
            if !sums.unsettled.is_empty() {
                let end = (sums.unsettled.end * BLOCK).min(sums.length);
                looked.flaws.push(Flaw::Unsettled(sums.unsettled.start * BLOCK..end));
            }
            looked.sums = Some(sums);
        }
        Ok(None) => looked.flaws.push(Flaw::NoChecksums),
        Err(error) => looked.flaws.push(Flaw::Checksums(error)),
    }
    looked
}
