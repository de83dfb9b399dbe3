//! An image of a chain, opened: qcow2, or raw with holes.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Error, Result};
use super::resolve::Mapped;
use crate::qcow2::{Content, Extent, HostOffset, Image, MapBuffer};
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
    /// Data extents of the file, zeroes included, hide what is below; holes show it.
    Raw(Arc<FileStorage>),
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
            Format::Raw => Body::Raw(storage),
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

    /// The file with the guest's bytes.
    #[must_use]
    pub fn data(&self) -> &dyn Storage {
        match &self.body {
            Body::Qcow2(image) => image.data(),
            Body::Raw(storage) => &**storage,
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
            Body::Raw(storage) => std::iter::once(0..storage.length()).collect(),
        }
    }

    pub(super) fn read_error(&self, offset: u64, source: std::io::Error) -> Error {
        Error::Read { path: self.path.clone(), offset, source }
    }

    fn map_raw(&self, storage: &FileStorage, guest: Range<u64>, each: &mut dyn FnMut(Extent)) -> Result<()> {
        let mut start = guest.start;
        while start < guest.end {
            let next = storage.next_data(start).map_err(|source| self.read_error(start, source))?;
            let data = next.unwrap_or(guest.end..guest.end);
            let hole = start..data.start.clamp(start, guest.end);
            let data = hole.end..data.end.clamp(hole.end, guest.end);
            start = data.end;
            if !hole.is_empty() {
                each(Extent { guest: hole, content: Content::Unallocated });
            }
            if !data.is_empty() {
                each(Extent { content: Content::Data(HostOffset(data.start)), guest: data });
            }
        }
        Ok(())
    }
}

impl Mapped for Layer {
    type Error = Error;
    type Scratch = MapBuffer;

    fn size(&self) -> u64 {
        match &self.body {
            Body::Qcow2(image) => image.size(),
            Body::Raw(storage) => storage.length(),
        }
    }

    fn map(&self, guest: Range<u64>, scratch: &mut MapBuffer, each: &mut dyn FnMut(Extent)) -> Result<()> {
        match &self.body {
            Body::Qcow2(image) => {
                image.map(guest, scratch, each).map_err(|source| Error::Image { path: self.path.clone(), source })
            }
            Body::Raw(storage) => self.map_raw(storage, guest, each),
        }
    }
}
