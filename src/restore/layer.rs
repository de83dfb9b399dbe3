//! An image of a chain, opened: qcow2, or raw with holes.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Error, Result};
use super::raw::RawImage;
use super::resolve::Mapped;
use super::salvage::Tolerance;
use crate::qcow2::{Content, Extent, Image, MapBuffer};
use crate::storage::{HOLE_MIN, Storage};

/// An image of a chain.
#[derive(Debug)]
pub struct Layer {
    path: PathBuf,
    body: Body,
    /// What goes on when a part of it cannot be read; `None` where that is an error.
    tolerance: Option<Tolerance>,
    /// The size of the disk, where it is known and no header tells it.
    told: Option<u64>,
}

#[derive(Debug)]
enum Body {
    Qcow2(Box<Image>),
    Raw(RawImage),
    /// Nothing of it can be had.
    Absent,
}

/// How the bytes of an image are to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The format of QEMU.
    Qcow2,
    /// The disk's bytes, with holes.
    Raw,
}

impl Layer {
    pub(super) fn new(path: PathBuf, storage: Arc<dyn Storage>, format: Format) -> Result<Self> {
        let body = match format {
            Format::Raw => Body::Raw(Self::raw(&path, storage)?),
            Format::Qcow2 => match Image::open(storage) {
                Ok(image) => Body::Qcow2(Box::new(image)),
                Err(source) => return Err(Error::image(&path)(source)),
            },
        };
        Ok(Self { path, body, tolerance: None, told: None })
    }

    /// An image of which as much is read as can be.
    pub(super) fn damaged(
        path: PathBuf,
        storage: Arc<dyn Storage>,
        format: Format,
        size: Option<u64>,
        tolerance: Tolerance,
    ) -> Result<Self> {
        let body = match format {
            Format::Raw => Body::Raw(Self::raw(&path, storage)?),
            Format::Qcow2 => match Image::open_damaged_as(storage, size, tolerance.header_damage()) {
                Ok(image) => Body::Qcow2(Box::new(image)),
                Err(source) => return Err(Error::image(&path)(source)),
            },
        };
        Ok(Self { path, body, tolerance: Some(tolerance), told: size })
    }

    /// An image of which nothing can be read, as the tolerance says.
    pub(super) fn absent(path: PathBuf, size: Option<u64>, tolerance: Tolerance) -> Self {
        Self { path, body: Body::Absent, tolerance: Some(tolerance), told: size }
    }

    fn raw(path: &Path, storage: Arc<dyn Storage>) -> Result<RawImage> {
        RawImage::open(storage).map_err(|source| Error::Open { path: path.to_owned(), source })
    }

    /// Whether nothing of the image can be had: see [`Layers::open_salvage`](super::Layers::open_salvage).
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self.body, Body::Absent)
    }

    /// The size of its disk, where that is known.
    pub(super) fn known_size(&self) -> Option<u64> {
        if self.is_absent() { self.told } else { Some(self.size()) }
    }

    /// Whether the size is told by nothing but a header that does not fit its checksum.
    pub(super) fn has_doubtful_size(&self) -> bool {
        let (Some(image), None) = (self.image(), self.told) else { return false };
        let file = self.tolerance.as_ref().and_then(|tolerance| tolerance.file.as_ref());
        file.is_some_and(|file| !file.misfits(0..image.header().header_length).is_empty())
    }

    pub(super) fn tolerance(&self) -> Option<&Tolerance> {
        self.tolerance.as_ref()
    }

    /// Where the image is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How its bytes are understood.
    #[must_use]
    pub fn format(&self) -> Format {
        match &self.body {
            Body::Qcow2(_) => Format::Qcow2,
            Body::Raw(_) | Body::Absent => Format::Raw,
        }
    }

    /// The smallest part of the disk of which the image says where it is.
    pub(super) fn granularity(&self) -> u64 {
        self.image().map_or(HOLE_MIN as u64, |image| image.header().geometry.subcluster_size())
    }

    /// The qcow2 image, if it is one.
    #[must_use]
    pub fn image(&self) -> Option<&Image> {
        match &self.body {
            Body::Qcow2(image) => Some(image),
            Body::Raw(_) | Body::Absent => None,
        }
    }

    /// Whether some program found the image damaged and marked it.
    pub(super) fn is_marked_corrupt(&self) -> bool {
        self.image().is_some_and(|image| image.header().is_corrupt())
    }

    /// The file with the guest's bytes.
    #[must_use]
    pub fn data(&self) -> &dyn Storage {
        match &self.body {
            Body::Qcow2(image) => image.data(),
            Body::Raw(image) => image.storage(),
            Body::Absent => &Nothing,
        }
    }

    /// The open file, where there is one.
    pub(super) fn file(&self) -> Option<&File> {
        self.data().as_file()
    }

    /// Guest ranges outside of which the layer holds nothing, in order.
    pub(super) fn occupied(&self) -> Vec<Range<u64>> {
        match &self.body {
            Body::Qcow2(image) => image.occupied(),
            Body::Raw(image) => image.occupied().to_vec(),
            Body::Absent => Vec::new(),
        }
    }

    pub(super) fn read_error(&self, offset: u64, source: std::io::Error) -> Error {
        Error::misfit(&self.path, &source).unwrap_or_else(|| Error::Read { path: self.path.clone(), offset, source })
    }
}

/// The storage of an image that is not there.
struct Nothing;

impl Storage for Nothing {
    fn length(&self) -> u64 {
        0
    }

    fn read_exact_at(&self, _: &mut [u8], _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::UnexpectedEof.into())
    }
}

impl Mapped for Layer {
    type Error = Error;
    type Scratch = MapBuffer;

    fn size(&self) -> u64 {
        match &self.body {
            Body::Qcow2(image) => image.size(),
            Body::Raw(image) => self.told.unwrap_or(image.storage().length()),
            // what ends nowhere hides nothing
            Body::Absent => self.told.unwrap_or(u64::MAX),
        }
    }

    fn map_all(&self, ranges: &[Range<u64>], scratch: &mut MapBuffer, each: &mut dyn FnMut(Extent)) -> Result<()> {
        match (&self.body, &self.tolerance) {
            (Body::Qcow2(image), Some(tolerance)) => {
                tolerance.map(image, ranges, scratch, each, &mut |_, _| ());
                Ok(())
            }
            (Body::Qcow2(image), None) => image.map_ranges(ranges, scratch, each).map_err(Error::image(&self.path)),
            (Body::Raw(image), _) => {
                for range in ranges {
                    image.map(range.clone(), each);
                }
                Ok(())
            }
            (Body::Absent, _) => {
                for range in ranges {
                    each(Extent { guest: range.clone(), content: Content::Unallocated });
                }
                Ok(())
            }
        }
    }

    fn map(&self, guest: Range<u64>, scratch: &mut MapBuffer, each: &mut dyn FnMut(Extent)) -> Result<()> {
        self.map_all(&[guest], scratch, each)
    }
}
