//! An image of a chain, opened: qcow2, or raw with holes.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Error, Result};
use super::raw::RawImage;
use super::resolve::Mapped;
use crate::qcow2::{Extent, Image, MapBuffer};
use crate::storage::{FileStorage, Storage};

/// An image of a chain.
#[derive(Debug)]
pub struct Layer {
    path: PathBuf,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Qcow2(Box<Image>),
    Raw(RawImage),
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
    pub(super) fn new(path: PathBuf, storage: Arc<FileStorage>, format: Format) -> Result<Self> {
        let body = match format {
            Format::Raw => match RawImage::open(storage) {
                Ok(image) => Body::Raw(image),
                Err(source) => return Err(Error::Open { path, source }),
            },
            Format::Qcow2 => match Image::open(storage) {
                Ok(image) => Body::Qcow2(Box::new(image)),
                Err(source) => return Err(Error::Image { path, source }),
            },
        };
        Ok(Self { path, body })
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
            Body::Raw(_) => Format::Raw,
        }
    }

    /// The qcow2 image, if it is one.
    #[must_use]
    pub fn image(&self) -> Option<&Image> {
        match &self.body {
            Body::Qcow2(image) => Some(image),
            Body::Raw(_) => None,
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
        }
    }

    pub(super) fn read_error(&self, offset: u64, source: std::io::Error) -> Error {
        Error::Read { path: self.path.clone(), offset, source }
    }
}

impl Mapped for Layer {
    type Error = Error;
    type Scratch = MapBuffer;

    fn size(&self) -> u64 {
        match &self.body {
            Body::Qcow2(image) => image.size(),
            Body::Raw(image) => image.size(),
        }
    }

    fn map(&self, guest: Range<u64>, scratch: &mut MapBuffer, each: &mut dyn FnMut(Extent)) -> Result<()> {
        match &self.body {
            Body::Qcow2(image) => {
                image.map(guest, scratch, each).map_err(|source| Error::Image { path: self.path.clone(), source })
            }
            Body::Raw(image) => {
                image.map(guest, each);
                Ok(())
            }
        }
    }
}
