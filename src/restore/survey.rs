//! What the images of a chain are, each looked at by itself: damage in one does not hide the others.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::error::{Error, Result};
use super::format::{self, Evidence, Start};
use super::layer::{Format, Layer};
use super::resolve::Mapped;
use super::source::{self, Source};
use crate::qcow2::{Content, MapBuffer};
use crate::storage::Storage as _;
use crate::threads;

/// What an image says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// How its bytes are to be understood.
    pub format: Format,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Guest bytes that the image holds, before compression; zeroes that it only names are not counted.
    pub allocated: u64,
    /// Bytes of the file, holes too.
    pub file_length: u64,
    /// Bytes that the file takes in its file system.
    pub file_usage: u64,
    /// Some program found the image damaged and marked it.
    pub marked_corrupt: bool,
}

/// Looks at a FULL and its INCs, in this order: at their headers and tables, not at the data.
#[must_use]
pub fn survey(chain: &[Source]) -> Vec<Result<Facts>> {
    let starts: Vec<Result<Start>> = threads::map(chain.iter().collect(), start);
    // what cannot be opened says nothing about the others
    let evidence = chain.iter().zip(&starts);
    let evidence =
        evidence.map(|(source, start)| Evidence::of(source, start.as_ref().map_or(Start::Damaged, |start| *start)));
    let Ok(formats) = format::decide(&evidence.collect::<Vec<_>>()) else {
        return chain.iter().map(|source| Err(Error::EitherFormat { path: source.path.clone() })).collect();
    };
    let before = std::iter::once(None).chain(chain.iter().map(|source| Some(source.path.as_path())));
    let images: Vec<_> = chain.iter().zip(before).zip(starts).zip(formats).collect();
    threads::map(images, |(((source, before), start), format)| start.and(look(source, before, format)))
}

fn start(source: &Source) -> Result<Start> {
    source::start(source, &*source::open(source)?)
}

fn look(source: &Source, before: Option<&Path>, format: Format) -> Result<Facts> {
    let file = source::open(source)?;
    source::check_length(&source.path, file.length())?;
    let layer = Layer::new(source.path.clone(), file, format)?;
    source::check_backing(before, &layer)?;
    let mut allocated = 0;
    let mut buffer = MapBuffer::default();
    for range in layer.occupied() {
        layer.map(range, &mut buffer, &mut |extent| match extent.content {
            Content::Data(_) | Content::Compressed { .. } => allocated += extent.guest.end - extent.guest.start,
            Content::Unallocated | Content::Zero => {}
        })?;
    }
    let file = layer.file().map(File::metadata).transpose().map_err(|error| source::open_error(source, error))?;
    Ok(Facts {
        format,
        size: layer.size(),
        allocated,
        file_length: layer.data().length(),
        file_usage: file.map_or(0, |file| file.blocks() * 512),
        marked_corrupt: layer.is_marked_corrupt(),
    })
}
